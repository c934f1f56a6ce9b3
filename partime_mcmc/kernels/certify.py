"""The certificate: one independent pass that says whether a path is the chain of its kernel.

All steps are evaluated at once from the path itself, x_t against f(x_{t-1}, k_t), whatever solver made the path, and

    ρ_t = max_j |f(x_{t-1}, k_t) − x_t|_j / scale_j

is reported in units that mean something: standard deviations of the proposal's noise where the kernel knows it (an
accepted step of MALA with ρ_t is *exactly* a step whose noise was shifted by ρ_t standard deviations), standard deviations
of the chain otherwise. A wrong accept decision shows as ρ_t of order 1.

The margin of a decision is |acceptance probability − uniform|. Where it is smaller than what rounding can change, the
decision is *ambiguous*: another compilation of the same kernel may decide otherwise.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.closures import explicit
from partime_mcmc.kernels.kernel import Carry, Kernel, Tape
from partime_mcmc.kernels.observe import Observe, in_pieces, look_again
from partime_mcmc.kernels.records import Records
from partime_mcmc.reduction import largest
from partime_mcmc.solvers.shooting import device_lanes
from partime_mcmc.types import Array, PyTree, pytree

# Noise units. The floors seen are 4e-15 and 2e-6; a flipped decision shows as 1 or more.
_TOLERANCE = {jnp.dtype("float64"): 1e-8, jnp.dtype("float32"): 1e-4}
# A healthy chain may reject as many proposals in a row.
FEWEST_TO_FREEZE = 10
# Ten times the difference in acceptance probability that was seen between two compilations of one kernel.
_AMBIGUOUS = {jnp.dtype("float64"): 1e-11, jnp.dtype("float32"): 2e-3}


@pytree()
class Certificate:
    """What an independent pass found; one number per chain, shape `(C,)` where chains are batched.

    Attributes:
        certified: All finite, and every step within `tolerance`.
        max_residual: The largest ρ_t.
        worst_step: Where it is, counted from 0.
        tolerance: The bound on ρ_t.
        num_steps: T.
        finite: Whether all states are finite.
        frozen: Whether the chain never moves in ten steps or more.
        num_rejected: Rejected proposals; −1 where the kernel makes no such decision.
        longest_rejection: Longest run of steps without movement.
        num_nonfinite_proposals: Proposals with a log density or energy that is not finite (they are rejected). Kernels
            without an energy do not all show their proposals: there, an acceptance probability of exactly 0 counts, too.
        num_ambiguous: Decisions with a margin below `10 ×` rounding; −1 where margins are not known.
        min_margin: The smallest margin; NaN where margins are not known.
        min_lattice_margin: With coalescing dice, the smallest distance to where the noise jumps, in its standard deviations;
            NaN without.
        discrete_consistent: Whether the tape's discrete leaves are the ones that the path produces.
        accepted: Decisions, shape `(..., T)`; all True where the kernel makes none.
        residual: ρ_t, shape `(..., T)`.
    """

    certified: Array
    max_residual: Array
    worst_step: Array
    tolerance: Array
    num_steps: Array
    finite: Array
    frozen: Array
    num_rejected: Array
    longest_rejection: Array
    num_nonfinite_proposals: Array
    num_ambiguous: Array
    min_margin: Array
    min_lattice_margin: Array
    discrete_consistent: Array
    accepted: Array
    residual: Array


def certify(kernel: Kernel, initial: PyTree, states: PyTree, drives: Tape, *, scale: Array | None = None) -> Certificate:
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
    """
    return certify_with_records(kernel, initial, states, drives, scale=scale)[0]


def certify_with_records(kernel: Kernel, initial: PyTree, states: PyTree, drives: Tape, *,
                         scale: Array | None = None) -> tuple[Certificate, Records]:
    """As `certify`, with what the kernel says of each step of the path."""
    observe, params, unit = _observer(kernel, initial, states, drives, scale)
    return _certify(observe, params, initial, states, drives, unit)


def certify_held(kernel: Kernel, initial: PyTree, states: PyTree, drives: Tape, *,
                 scale: Array | None = None) -> tuple[Certificate, Records, PyTree]:
    """As `certify_with_records`, of the path made to stand still by `hold`, which comes third.

    Only the steps that start from another state for that are evaluated again. Chains have a leading axis `C` everywhere, and all
    their steps share one set of lanes.
    """
    observe, params, unit = _observer(kernel, *(jax.tree.map(lambda leaf: leaf[0], tree) for tree in (initial, states, drives)), scale)
    return _certify_held(observe, params, initial, states, drives, unit)


def _observer(kernel, initial, states, drives, scale):
    _check_path(initial, states, drives)
    first = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), drives)
    observe, params = explicit(Observe(kernel), None, initial, first)
    return observe, params, kernel.noise_scale if scale is None else check_scale(scale, "scale")


def check_scale(scale: Array | float, name: str) -> Array | float:
    """Refuse a unit with which any path would pass.

    Raises:
        ValueError: Naming `name`, if a concrete scale is not positive and finite (traced ones pass).
    """
    if not isinstance(scale, jax.core.Tracer):
        values = np.asarray(scale)
        if not np.issubdtype(values.dtype, np.floating) and not np.issubdtype(values.dtype, np.integer) or not (
                np.isfinite(values).all() and (values > 0).all()):
            raise ValueError(f"{name}: got {scale!r}, wanted positive finite numbers")
    return scale


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
    index = jnp.arange(held.shape[0]) + 1
    last = jax.lax.cummax(jnp.where(held, 0, index))
    everything = jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), initial, states)
    return jax.tree.map(lambda leaf: leaf[last], everything)


def _check_path(initial: PyTree, states: PyTree, drives: Tape) -> None:
    if not isinstance(drives, Tape):
        raise TypeError(f"drives: got a {type(drives).__name__}, wanted a Tape: kernel.tape(key, num_steps, state)")
    if hasattr(initial, "_asdict") and hasattr(initial, "logdensity"):
        raise TypeError(f"initial: got a {type(initial).__name__}, wanted its carry: kernel.carry(state)")
    steps = {leaf.shape[0] for leaf in (*jax.tree.leaves(states), *jax.tree.leaves(drives))}
    if len(steps) > 1:
        raise ValueError(f"states and drives: leading axes {sorted(steps)}, wanted one common length T")


@functools.partial(jax.jit, static_argnums=0)
def _certify(observe, params, initial, states, drives, unit):
    seen = in_pieces(functools.partial(observe, params), _before(initial, states), drives)
    return _judge(seen, initial, states, drives, unit)


@functools.partial(jax.jit, static_argnums=0)
def _certify_held(observe, params, initial, states, drives, unit):
    look = functools.partial(observe, params)
    # One axis of steps: with chains as an axis of their own, products of matrices took twice as long.
    shape = jax.tree.leaves(drives)[0].shape[:2]
    one_axis = jax.tree.map(lambda leaf: leaf.reshape(math.prod(shape), *leaf.shape[2:]), (jax.vmap(_before)(initial, states), drives))
    seen = in_pieces(look, *one_axis, piece=device_lanes())
    seen = jax.tree.map(lambda leaf: leaf.reshape(*shape, *leaf.shape[1:]), seen)
    return jax.vmap(functools.partial(_hold_and_judge, look), in_axes=(0, 0, 0, 0, None))(seen, initial, states, drives, unit)


def _hold_and_judge(look, seen, initial, states, drives, unit):
    before = _before(initial, states)
    still = hold(initial, states, (_flat(seen[0]) == _flat(before)).all(axis=1))
    moved = [(new != old) & ~(jnp.isnan(new) & jnp.isnan(old)) for new, old in zip(
        jax.tree.leaves(_before(initial, still)), jax.tree.leaves(before))]
    again = functools.reduce(jnp.logical_or, [flags.any(axis=tuple(range(1, flags.ndim))) for flags in moved])
    seen = look_again(look, seen, _before(initial, still), drives, again)
    return *_judge(seen, initial, still, drives, unit), still


def _before(initial: PyTree, states: PyTree) -> PyTree:
    return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b[:-1]])[: b.shape[0]], initial, states)


def _flat(carries: PyTree) -> Array:
    return jax.vmap(lambda carry: ravel_pytree(carry)[0])(carries)


def _judge(seen, initial, states, drives, unit):
    before, flatten = _before(initial, states), _flat
    values, discrete, records, uniform = seen
    path, expected, previous = flatten(states), flatten(values), flatten(before)
    num_steps, dtype = path.shape[0], path.dtype
    if num_steps == 0:
        path, expected, previous = (jnp.zeros((0, ravel_pytree(initial)[0].size), dtype) for _ in range(3))
    unit = _spread(path) if unit is None else jnp.asarray(unit, dtype)
    # A unit that is not positive and finite would let anything pass.
    usable = (unit > 0) & jnp.isfinite(unit)
    residual = largest(jnp.where(usable, jnp.abs(expected - path) / unit, jnp.nan), axis=1)
    finite = jnp.isfinite(path).all()
    tolerance = jnp.asarray(_TOLERANCE.get(dtype, 1e-4), dtype)
    positions = [carry.position if isinstance(carry, Carry) else carry for carry in (states, before)]
    moved = (flatten(positions[0]) != flatten(positions[1])).any(axis=1) if num_steps else jnp.zeros(0, bool)
    accepted = jnp.ones(num_steps, bool) if records.accepted is None else jnp.broadcast_to(
        records.accepted, (num_steps,))
    held = ~moved | ~accepted
    num_ambiguous, min_margin = _margins(uniform, records, dtype)
    consistent = _consistent(discrete, drives.discrete)
    worst = jnp.argmax(jnp.where(jnp.isnan(residual), jnp.inf, residual)) if num_steps else jnp.zeros((), jnp.int32)
    certificate = Certificate(
        certified=finite & jnp.all(residual <= tolerance) & consistent,
        max_residual=largest(residual), worst_step=worst, tolerance=tolerance,
        num_steps=jnp.asarray(num_steps), finite=finite, frozen=(num_steps >= FEWEST_TO_FREEZE) & held.all(),
        num_rejected=jnp.asarray(-1) if records.accepted is None else jnp.sum(~accepted),
        longest_rejection=_longest_run(held),
        num_nonfinite_proposals=jnp.sum(records.nonfinite), num_ambiguous=num_ambiguous, min_margin=min_margin,
        min_lattice_margin=jnp.asarray(jnp.nan, dtype) if records.lattice_margin is None else jnp.min(
            records.lattice_margin, initial=jnp.inf),
        discrete_consistent=consistent, accepted=accepted, residual=residual)
    return certificate, dataclasses.replace(records, held=(expected == previous).all(axis=1))


def _spread(path: Array) -> Array:
    """Standard deviation of each coordinate; 1 where it does not move, so that any residual there shows.

    The interquartile range speaks where it is the smaller one: a path that explodes somewhere must not set the unit by which
    it is judged.
    """
    if not path.shape[0]:
        return jnp.ones(path.shape[1:], path.dtype)
    low, high = jnp.quantile(path, jnp.asarray([0.25, 0.75], path.dtype), axis=0)
    spread, middle = jnp.std(path, axis=0), (high - low) / 1.349
    spread = jnp.where((middle > 0) & ~(middle > spread), middle, spread)
    return jnp.where(jnp.isfinite(spread) & (spread > 0), spread, 1)


def _margins(uniform, records, dtype):
    unknown = jnp.asarray(-1), jnp.asarray(jnp.nan, dtype)
    threshold = _AMBIGUOUS.get(dtype, 2e-3)
    if records.decision_margin is not None:
        return jnp.sum(records.decision_margin < threshold), jnp.min(records.decision_margin, initial=jnp.inf)
    if uniform is None or records.accepted is None:
        return unknown
    margin = jnp.abs(records.acceptance_rate - uniform)
    # Only if this uniform explains every decision is it the kernel's own.
    explains = jnp.all((uniform < records.acceptance_rate) == records.accepted) & jnp.any(~records.accepted)
    ambiguous = jnp.sum(margin < threshold)
    return (jnp.where(explains, ambiguous, -1),
            jnp.where(explains, jnp.min(margin, initial=jnp.inf), jnp.nan).astype(dtype))


def _consistent(produced, taped):
    """Whether the discrete leaves after each step are the tape's before the next one."""
    same = [jnp.all(_raw(new)[:-1] == _raw(old)[1:]) for new, old in zip(jax.tree.leaves(produced),
                                                                         jax.tree.leaves(taped))]
    return functools.reduce(jnp.logical_and, same, jnp.ones((), bool))


def _raw(leaf):
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def _longest_run(flags: Array) -> Array:
    def advance(run, flag):
        run = jnp.where(flag, run + 1, 0)
        return run, run

    runs = jax.lax.scan(advance, jnp.zeros((), jnp.int32), flags)[1]
    return jnp.max(runs, initial=0)
