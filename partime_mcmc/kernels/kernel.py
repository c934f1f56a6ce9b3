"""Markov kernels as dynamical systems: with its random numbers fixed, a chain is a recurrence.

A kernel is two pure functions, `init(position, key) -> state` and `step(key, state) -> (state, info)`, BlackJAX's own
shape. A *tape* holds the randomness of a path, drawn beforehand: with its keys k_1..k_T the kernel becomes
x_t = f(x_{t-1}, k_t), and any solver of this package finds the path of the kernel's own loop with the same keys.

What travels from step to step is the *carry*: the state without `logdensity` and `logdensity_grad`, which follow from the
position and which `init` recomputes. A state that holds nothing else than its position has the position itself as its
carry. Leaves that are not floating point (counters, keys) cannot be solved for; they must follow from the random numbers
alone, and the tape holds them.
"""

import dataclasses
import functools
import inspect
from typing import Any, Callable

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.certify.step_record import StepRecord, decision_uniform, record
from partime_mcmc.engine import CachedStep, Dynamics
from partime_mcmc.kernels.explicit_randomness import ExplicitRandomnessKernel
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, Key, PyTree, is_key, pytree
from partime_mcmc.validation import check_generator

_DERIVED = ("logdensity", "logdensity_grad")


@pytree()
class Tape:
    """The randomness of a chain, drawn beforehand, leaves with leading axis `T`.

    Attributes:
        randomness: One key per step; for an `ExplicitRandomnessKernel`, the numbers drawn from these keys.
        discrete: The leaves of the state before each step that are not floating point, by field name; often empty.
    """

    randomness: PyTree
    discrete: PyTree


@pytree()
class Carry:
    """The carry of a kernel whose state holds more than its position.

    Attributes:
        position: The kernel's position.
        others: Other floating-point fields of the state, by name.
    """

    position: PyTree
    others: dict


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A Markov kernel.

    A `Kernel` is itself a BlackJAX sampling algorithm: `init` and `step` run in BlackJAX's own loops.

    Attributes:
        algorithm: Anything with `init(position[, rng_key]) -> state` and `step(rng_key, state) -> (state, info)`. States
            are named tuples with a field `position`, or positions themselves. The random numbers of an
            `ExplicitRandomnessKernel` are drawn in one call.
        enter: From the user's position to the kernel's; None where they are the same.
        leave: From the kernel's position to the user's; None where they are the same.
        noise_scale: Standard deviation of the proposal's noise in the kernel's flat coordinates, a scalar or shape
            `(D,)`; None where it is not known. Residuals are reported in this unit.
        name: What to call it in reports.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import mala
        >>> kernel = mala(lambda x: -0.5 * jnp.sum(x**2), 0.5)
        >>> state, info = kernel.step(jax.random.key(0), kernel.init(jnp.ones(2)))
        >>> state.position.shape
        (2,)
    """

    algorithm: Any
    enter: Callable[[PyTree], PyTree] | None = None
    leave: Callable[[PyTree], PyTree] | None = None
    noise_scale: Any = None
    name: str = "kernel"

    def init(self, position: PyTree, rng_key: Key | None = None) -> PyTree:
        """The state at a position of the user's.

        Args:
            position: As the log density takes it.
            rng_key: For kernels whose state holds more than the position (momenta, slices); None is a fixed key.
        """
        return self._init(position if self.enter is None else self.enter(position), rng_key)

    def step(self, rng_key: Key, state: PyTree) -> tuple[PyTree, PyTree]:
        """One transition: `(new_state, info)`."""
        return self.algorithm.step(rng_key, state)

    def carry(self, state: PyTree) -> PyTree:
        """What travels from step to step: floating-point fields that `init` cannot recompute."""
        fields = _fields(state)
        if fields is None:
            return state
        others = {
            name: value
            for name, value in fields.items()
            if name not in (*_DERIVED, "position") and not _is_discrete(value)
        }
        return Carry(fields["position"], others) if others else fields["position"]

    def discrete(self, state: PyTree) -> dict:
        """The fields of a state that are not floating point."""
        fields = _fields(state) or {}
        return {
            name: value
            for name, value in fields.items()
            if name not in _DERIVED and _is_discrete(value)
        }

    def state(self, carry: PyTree, discrete: PyTree) -> PyTree:
        """The full state of a carry: log density and gradient are evaluated here."""
        carry = carry if isinstance(carry, Carry) else Carry(carry, {})
        state = self._init(carry.position, None)
        # The position is put back because `init` may have changed its type.
        return (
            state
            if _fields(state) is None
            else state._replace(position=carry.position, **carry.others, **discrete)
        )

    def position(self, carry: PyTree) -> PyTree:
        """The user's position of one carry."""
        position = carry.position if isinstance(carry, Carry) else carry
        return position if self.leave is None else self.leave(position)

    def transition(self, carry: PyTree, drive: Tape) -> tuple[PyTree, PyTree, PyTree]:
        """One step on carries: the new carry, the new state and the kernel's info."""
        state, info = self.act(drive.randomness, self.state(carry, drive.discrete))
        return self.carry(state), state, info

    def act(self, randomness: PyTree, state: PyTree) -> tuple[PyTree, PyTree]:
        """One transition with the randomness of one step of a tape, `(new_state, info)`."""
        return (
            self.algorithm.step_with
            if isinstance(self.algorithm, ExplicitRandomnessKernel)
            else self.algorithm.step
        )(randomness, state)

    def dynamics(self) -> Dynamics:
        """The kernel as a recurrence on carries, driven by a `Tape`; with the kernel's own memory for sequential use."""
        part, numbers = self._parts()
        cached = CachedStep(
            part("_init_cached"), part("_step_cached"), part("carry"), (numbers,) * 3
        )
        return Dynamics(part("_step_carry"), numbers, cached)

    def recording(self) -> Dynamics:
        """As `dynamics`, with the `StepRecord` of every step as its `aux` numbers: see `certify_recorded`."""
        part, numbers = self._parts()
        cached = CachedStep(
            part("_init_recording"),
            part("_step_recording"),
            part("_state_recording"),
            (numbers,) * 3,
            noted,
        )
        return dataclasses.replace(self.dynamics(), cached=cached)

    def _parts(self) -> tuple[Callable, PyTree]:
        """What makes a method a function with parameters first, and these parameters."""
        return functools.partial(_Method, self), None

    def step_record(self, carry: PyTree, drive: Tape) -> StepRecord:
        """The record of one step."""
        return self._record(self.state(carry, drive.discrete), drive)[1]

    def tape(self, key: Key, num_steps: int, state: PyTree) -> Tape:
        """The tape of one chain.

        Step t uses `jax.random.split(key, num_steps)[t]`, the keys a BlackJAX user's loop would use.

        Args:
            key: One key.
            num_steps: `T`.
            state: The state that the chain starts from.
        """
        return self.tape_of(jax.random.split(key, num_steps), state)

    def tape_of(self, keys: Key, state: PyTree) -> Tape:
        """The tape of given step keys, leading axis `T`, for a chain that starts from `state`."""
        return self.tape_and_discrete(keys, state)[0]

    def tape_and_discrete(self, keys: Key, state: PyTree) -> tuple[Tape, dict]:
        """As `tape_of`, with the discrete leaves after the last step: what the next tape of the chain starts from."""
        check_generator(keys, "key")
        start, randomness, num_steps = self.discrete(state), keys, keys.shape[0]
        if isinstance(self.algorithm, ExplicitRandomnessKernel):
            randomness = self.algorithm.sample_randomness(keys, state)
        if not start:
            return Tape(randomness, start), start
        if isinstance(self.algorithm, ExplicitRandomnessKernel) and self.algorithm.count:
            counted = self.algorithm.count(start, num_steps + 1)
            return (
                Tape(randomness, jax.tree.map(lambda leaf: leaf[:num_steps], counted)),
                jax.tree.map(lambda leaf: leaf[num_steps], counted),
            )

        def advance(discrete, key):
            # Positions stand still here: discrete leaves may not depend on them, which `certify` verifies.
            new_state, _ = self.step(key, state._replace(**discrete))
            return self.discrete(new_state), discrete

        after, before = lax.scan(advance, start, keys)
        return Tape(randomness, before), after

    def _init(self, position: PyTree, rng_key: Key | None) -> PyTree:
        if _takes_key(self.algorithm.init):
            return self.algorithm.init(position, jax.random.key(0) if rng_key is None else rng_key)
        return self.algorithm.init(position)

    def _step_carry(self, carry, drive):
        return self.transition(carry, drive)[0]

    def _init_cached(self, carry, drive):
        return self.state(carry, drive.discrete)

    def _step_cached(self, state, drive):
        return self.act(drive.randomness, state)[0]

    def _record(self, state, drive):
        new, info = self.act(drive.randomness, state)
        pairs = zip(jax.tree.leaves(self.discrete(state)), jax.tree.leaves(drive.discrete))
        consistent = functools.reduce(
            jnp.logical_and, [jnp.all(raw(a) == raw(b)) for a, b in pairs], jnp.ones((), bool)
        )
        records = dataclasses.replace(record(new, info), held=None)
        return new, StepRecord(records, decision_uniform(drive.randomness, info), consistent)

    def _init_recording(self, carry, drive):
        state = self.state(carry, drive.discrete)
        step_record = jax.eval_shape(self._record, state, drive)[1]
        return state, jnp.zeros(len(jax.tree.leaves(step_record)), self._dtype(state))

    def _step_recording(self, memory, drive):
        new, step_record = self._record(memory[0], drive)
        return new, step_record.packed(self._dtype(new))

    def _state_recording(self, memory):
        return self.carry(memory[0])

    def _dtype(self, state):
        return jax.tree.leaves(self.carry(state))[0].dtype


# Methods that check the carry and the drives that a user gave.
_CHECKED = ("_step_carry", "_init_cached", "_init_recording")


def noted(memory: tuple[PyTree, Array]) -> Array:
    """`CachedStep.aux` of a kernel that records."""
    return memory[1]


class _Method(HashableFunction):
    """A method of a kernel as a function with parameters first; equal for equal kernels, so that it is compiled once."""

    def __init__(self, kernel: Kernel, name: str):
        super().__init__(name, kernel.algorithm.init, kernel.algorithm.step)
        self.kernel, self.name = kernel, name

    def __call__(self, params, *args):
        if self.name in _CHECKED and not isinstance(args[1], Tape):
            raise TypeError(
                f"drives: got a {type(args[1]).__name__}, wanted a Tape: kernel.tape(key, num_steps, state)"
            )
        if self.name in _CHECKED and hasattr(args[0], "logdensity"):
            raise TypeError(
                f"initial: got a {type(args[0]).__name__}, wanted its carry: kernel.carry(state)"
            )
        return getattr(self.kernel, self.name)(*args)


def blackjax_loop(kernel: Kernel, state: PyTree, keys: Key) -> tuple[PyTree, PyTree]:
    """BlackJAX's own loop: `lax.scan` over `kernel.step` with full states, gradients cached.

    Args:
        kernel: The kernel.
        state: The state to start from, from `kernel.init`.
        keys: One key per step, leading axis `T`.

    Returns:
        Carries and infos, leading axis `T`.
    """

    def advance(state, key):
        state, info = kernel.step(key, state)
        return state, (kernel.carry(state), info)

    return lax.scan(advance, state, keys)[1]


def _fields(state: PyTree) -> dict | None:
    return state._asdict() if hasattr(state, "_asdict") and hasattr(state, "position") else None


def raw(leaf: Array) -> Array:
    """A discrete leaf as numbers, keys included."""
    return jax.random.key_data(leaf) if is_key(leaf) else leaf


def _is_discrete(value: PyTree) -> bool:
    leaves = jax.tree.leaves(value)
    return bool(leaves) and not any(
        jnp.issubdtype(
            jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype, jnp.floating
        )
        for leaf in leaves
    )


def _takes_key(init: Callable) -> bool:
    """Whether `init` takes a key besides the position."""
    try:
        parameters = inspect.signature(init).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    return len(positional) > 1
