"""The independent pass: every step of a path is evaluated once more, all at once, whatever solver made it.

Its results are judged as `certificate` describes. Chains that `sample` returns can have their steps recorded while they are
rolled (`recorded`), at no cost; this pass shares nothing with the solver but the kernel, and costs one evaluation per step.
"""

import functools
import math

import jax
import jax.numpy as jnp

from partime_mcmc.certify.certificate import (
    Certificate,
    flat_steps,
    judged,
    may_be_random,
    refuse_random_steps,
)
from partime_mcmc.certify.step_record import Records, decision_uniform, record
from partime_mcmc.engine import LocalTime
from partime_mcmc.executions import run_jitted
from partime_mcmc.kernels.explicit_randomness import anyone
from partime_mcmc.kernels.kernel import Kernel, Tape, raw
from partime_mcmc.tracing import HashableFunction, explicit
from partime_mcmc.types import Array, PyTree, nan_is_a_value
from partime_mcmc.validation import check_scale, describe


class Observe(HashableFunction):
    """One step of a kernel and its record; equal for equal kernels."""

    def __init__(self, kernel: Kernel):
        super().__init__(kernel.algorithm.init, kernel.algorithm.step)
        self.kernel = kernel

    def __call__(self, params, carry, drive):
        new, state, info = self.kernel.transition(carry, drive)
        return (
            new,
            self.kernel.discrete(state),
            record(state, info),
            decision_uniform(drive.randomness, info),
        )


def in_batches(function, *args, size=None):
    """`vmap(function)(*args)`, one batch of `size` steps after another where there are many steps.

    A batch takes every P-th step, P a multiple of four: in a kernel that is a cycle of two or four, all steps of a batch are
    then at the same point of it, and work that none of them needs is skipped.
    """
    num_steps, size = jax.tree.leaves(args)[0].shape[0], size or steps_at_once()
    if num_steps <= 2 * size:
        return jax.vmap(function)(*args)
    num_batches = 4 * -(-num_steps // (4 * size))
    # The last rows are filled up with the last step.
    index = jnp.minimum(jnp.arange(num_batches * size), num_steps - 1).reshape(size, num_batches).T
    found = jax.lax.map(
        lambda some: jax.vmap(function)(*some), jax.tree.map(lambda leaf: leaf[index], args)
    )
    return jax.tree.map(
        lambda leaf: jnp.swapaxes(leaf, 0, 1).reshape(-1, *leaf.shape[2:])[:num_steps], found
    )


def reevaluate(function, seen, before, drives, again):
    """Evaluate the steps flagged in `again` once more and replace their results in `seen`, one batch at a time."""
    num_steps = again.shape[0]

    def one_batch(value):
        seen, again = value
        index = jnp.nonzero(again, size=steps_at_once(), fill_value=num_steps)[0]
        some = jax.tree.map(lambda leaf: leaf[jnp.minimum(index, num_steps - 1)], (before, drives))
        found = jax.vmap(function)(*some)
        seen = jax.tree.map(lambda old, new: old.at[index].set(new, mode="drop"), seen, found)
        return seen, again.at[index].set(False, mode="drop")

    if not num_steps:
        return seen
    return jax.lax.while_loop(lambda value: anyone(value[1].any()), one_batch, (seen, again))[0]


def steps_at_once() -> int:
    """Steps that are evaluated in one batch: on a CPU as many as stay in its caches, elsewhere as many as fill the device."""
    return 32 if jax.default_backend() == "cpu" else 1024


@nan_is_a_value()
def certify(
    kernel: Kernel, initial: PyTree, states: PyTree, drives: Tape, *, scale: Array | None = None
) -> Certificate:
    """Check a path of carries against its kernel, all steps at once.

    Args:
        kernel: The kernel.
        initial: The carry before the first step.
        states: The path of carries, leading axis `T`.
        drives: The tape, leading axis `T`.
        scale: The unit of the residual in flat coordinates, a scalar or shape `(D,)`; None takes the kernel's noise
            scale, or the standard deviation of the path.

    Returns:
        The certificate.

    Raises:
        ValueError: If `scale` is not positive and finite.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import certify, mala, rollout
        >>> kernel = mala(lambda x: -0.5 * jnp.sum(x**2), 0.5)
        >>> state = kernel.init(jnp.ones(2))
        >>> tape = kernel.tape(jax.random.key(0), 100, state)
        >>> path = rollout(kernel.dynamics(), kernel.carry(state), tape)
        >>> bool(certify(kernel, kernel.carry(state), path, tape).certified)
        True
        >>> bool(certify(kernel, kernel.carry(state), path.at[7].add(0.1), tape).certified)
        False
    """
    return certify_with_records(kernel, initial, states, drives, scale=scale)[0]


def certify_with_records(
    kernel: Kernel, initial: PyTree, states: PyTree, drives: Tape, *, scale: Array | None = None
) -> tuple[Certificate, Records]:
    """As `certify`, with the records of the steps of the path."""
    observe, params, unit = _observer(kernel, initial, states, drives, scale)
    return run_jitted(_certify, observe, params, initial, states, drives, unit)


def certify_held(
    kernel: Kernel, initial: PyTree, states: PyTree, drives: Tape, *, scale: Array | None = None
) -> tuple[Certificate, Records, PyTree]:
    """As `certify_with_records`, of the path made to stand still by `hold`, which comes third.

    Only the steps that start from another state for that are evaluated again. Chains have a leading axis `C` everywhere, and all
    their steps share one set of lanes.
    """
    observe, params, unit = _observer(
        kernel,
        *(jax.tree.map(lambda leaf: leaf[0], tree) for tree in (initial, states, drives)),
        scale=scale,
    )
    return run_jitted(_certify_held, observe, params, initial, states, drives, unit)


def _observer(kernel, initial, states, drives, scale):
    if not isinstance(kernel, Kernel):
        raise TypeError(
            f"kernel: got {describe(kernel)}, wanted a Kernel, such as mala(...) returns"
        )
    _check_path(initial, states, drives)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), drives)
    observe, params = explicit(Observe(kernel), None, initial, first)
    return observe, params, kernel.noise_scale if scale is None else check_scale(scale, "scale")


def hold(initial: PyTree, states: PyTree, held: Array) -> PyTree:
    """Make a path stand still to the last bit where its kernel does.

    A solver stops within a tolerance, so a rejected step may differ from the state before it by some ulp; no noise of the
    proposal can explain that. Every such step takes the last state that moved.

    Args:
        initial: The carry before the first step.
        states: The path, leading axis `T`.
        held: Where the kernel returns the state it was given, shape `(T,)`.

    Returns:
        The path, exact on rejected steps.
    """
    last = jax.lax.cummax(jnp.where(held, 0, jnp.arange(held.shape[0]) + 1))
    everything = jax.tree.map(
        lambda first, rest: jnp.concatenate([first[None], rest]), initial, states
    )
    return jax.tree.map(lambda leaf: leaf[last], everything)


def _check_path(initial: PyTree, states: PyTree, drives: Tape) -> None:
    if not isinstance(drives, Tape):
        raise TypeError(
            f"drives: got a {type(drives).__name__}, wanted a Tape: kernel.tape(key, num_steps, state)"
        )
    if hasattr(initial, "_asdict") and hasattr(initial, "logdensity"):
        raise TypeError(
            f"initial: got a {type(initial).__name__}, wanted its carry: kernel.carry(state)"
        )
    structure, wanted = jax.tree.structure(states), jax.tree.structure(initial)
    if structure != wanted:
        raise TypeError(
            f"states: got the structure {structure}, wanted that of `initial`, {wanted}, its leaves with a leading axis T"
        )
    for (path, got), state in zip(
        jax.tree_util.tree_leaves_with_path(states), jax.tree.leaves(initial)
    ):
        if jnp.shape(got)[1:] != jnp.shape(state) or not jnp.ndim(got):
            raise ValueError(
                f"states{jax.tree_util.keystr(path)}: got the shape {jnp.shape(got)}, wanted a leading axis T and then "
                f"{jnp.shape(state)}, as `initial` has it"
            )
    steps = {leaf.shape[0] for leaf in (*jax.tree.leaves(states), *jax.tree.leaves(drives))}
    if len(steps) > 1:
        raise ValueError(
            f"states and drives: leading axes {sorted(steps)}, wanted one common length T"
        )


@functools.partial(jax.jit, static_argnums=0)
def _certify(observe, params, initial, states, drives, unit):
    evaluate = functools.partial(observe, params)
    seen = in_batches(evaluate, LocalTime().previous(initial, states), drives)
    certificate, records = _judge(seen, initial, states, drives, unit)
    if may_be_random(observe.jaxpr):
        certificate = refuse_random_steps(certificate, evaluate, initial, states, drives)
    return certificate, records


@functools.partial(jax.jit, static_argnums=0)
def _certify_held(observe, params, initial, states, drives, unit):
    evaluate = functools.partial(observe, params)
    # One axis of steps: with chains as an axis of their own, products of matrices took twice as long.
    shape = jax.tree.leaves(drives)[0].shape[:2]
    one_axis = jax.tree.map(
        lambda leaf: leaf.reshape(math.prod(shape), *leaf.shape[2:]),
        (jax.vmap(LocalTime().previous)(initial, states), drives),
    )
    seen = in_batches(evaluate, *one_axis, size=4 * steps_at_once())
    seen = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), seen)
    certificate, records, still = jax.vmap(
        functools.partial(_hold_and_judge, evaluate), in_axes=(0, 0, 0, 0, None)
    )(seen, initial, states, drives, unit)
    if may_be_random(observe.jaxpr):
        twice = lambda found, *path: refuse_random_steps(found, evaluate, *path)
        certificate = jax.vmap(twice)(certificate, initial, still, drives)
    return certificate, records, still


def _hold_and_judge(evaluate, seen, initial, states, drives, unit):
    before = LocalTime().previous(initial, states)
    still = hold(initial, states, (flat_steps(seen[0]) == flat_steps(before)).all(axis=1))
    moved = [
        (new != old) & ~(jnp.isnan(new) & jnp.isnan(old))
        for new, old in zip(
            jax.tree.leaves(LocalTime().previous(initial, still)), jax.tree.leaves(before)
        )
    ]
    again = functools.reduce(
        jnp.logical_or, [flags.any(axis=tuple(range(1, flags.ndim))) for flags in moved]
    )
    seen = reevaluate(evaluate, seen, LocalTime().previous(initial, still), drives, again)
    return *_judge(seen, initial, still, drives, unit), still


def _judge(seen, initial, states, drives, unit):
    values, discrete, records, uniform = seen
    # The discrete leaves after each step are to be the tape's before the next one.
    same = [
        jnp.all(raw(new)[:-1] == raw(old)[1:])
        for new, old in zip(jax.tree.leaves(discrete), jax.tree.leaves(drives.discrete))
    ]
    consistent = functools.reduce(jnp.logical_and, same, jnp.ones((), bool))
    return judged(values, consistent, records, uniform, initial, states, unit)
