"""The certificate of a path, and the rule by which a path is judged, whichever pass evaluated its steps.

All steps are compared with what the kernel makes of the state before them, x_t against f(x_{t-1}, k_t), and

    ρ_t = max_j |f(x_{t-1}, k_t) − x_t|_j / scale_j

is reported in units that mean something: standard deviations of the proposal's noise where the kernel knows it (an
accepted step of MALA with ρ_t is *exactly* a step whose noise was shifted by ρ_t standard deviations), standard deviations
of the chain otherwise. A wrong accept decision shows as ρ_t of order 1. On a rejected step, where the kernel returns the state
that it was given, no noise explains a difference: nothing but a solver's rounding, 256 units in the last place, is allowed.

The margin of a decision is |acceptance probability − uniform|. Where it is smaller than what rounding can change, the
decision is *ambiguous*: another compilation of the same kernel may decide otherwise.

The values come from `independent`, one more pass that shares nothing with the solver, or from `recorded`, where every step
was recorded while the path was rolled.

Where a step asks somebody whose answers its arguments need not determine (Python on the host, a library, a random number
generator of the device), f may be no function, and what was recorded of a path agrees with itself all the same. Then up to 256
steps are evaluated twice by one and the same program,

    64 accepted and 64 rejected ones all along the path, and the 128 that begin farthest from the start,

and where any bit of the new state, the decision or what the kernel reports differs, nothing is certified. There is no
tolerance, hence no false alarm: what rounds differently in another program is never compared. Left out: a density that changes
seldom enough to answer twice alike.
"""

import dataclasses
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.certify.step_record import Records
from partime_mcmc.engine import LocalTime
from partime_mcmc.engine.solution import DEFAULT_ULPS, nanaware_max
from partime_mcmc.kernels.kernel import Carry, raw
from partime_mcmc.tracing import primitives_of
from partime_mcmc.types import AnyArray, Array, PyTree, pytree

# Noise units. The floors seen are 4e-15 and 2e-6; a flipped decision shows as 1 or more.
_TOLERANCE = {jnp.dtype("float64"): 1e-8, jnp.dtype("float32"): 1e-4}
# A healthy chain may reject as many proposals in a row.
FEWEST_TO_FREEZE = 10
# Ten times the difference in acceptance probability that was seen between two compilations of one kernel.
AMBIGUOUS = {jnp.dtype("float64"): 1e-11, jnp.dtype("float32"): 2e-3}
# Steps that are evaluated twice.
_EVENLY, _FARTHEST = 64, 128
# Operations whose results their arguments need not determine.
_NOT_FUNCTIONS = {"pure_callback", "io_callback", "ffi_call", "call_tf", "rng_uniform"}


@pytree()
class Certificate:
    """Whether a path obeys its kernel, and by how much it fails to; one number per chain, shape `(C,)` where chains are batched.

    Attributes:
        certified: All finite, every step within `tolerance`, and rejected steps without a difference beyond rounding.
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
        min_lattice_margin: With multishift coupling, the smallest distance to where the noise jumps, in its standard deviations;
            NaN without.
        discrete_consistent: Whether the tape's discrete leaves are the ones that the path produces.
        independent: Whether steps were evaluated once more, apart from the solver; otherwise they were recorded while the path
            was rolled.
        accepted: Decisions, shape `(..., T)`; all True where the kernel makes none.
        residual: ρ_t, shape `(..., T)`.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target, mala, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> found = sample(jax.random.key(0), target, kernel, num_samples=500).certificate
        >>> bool(found.certified.all()), found.max_residual.shape
        (True, (4,))
    """

    certified: AnyArray
    max_residual: AnyArray
    worst_step: AnyArray
    tolerance: AnyArray
    num_steps: AnyArray
    finite: AnyArray
    frozen: AnyArray
    num_rejected: AnyArray
    longest_rejection: AnyArray
    num_nonfinite_proposals: AnyArray
    num_ambiguous: AnyArray
    min_margin: AnyArray
    min_lattice_margin: AnyArray
    discrete_consistent: AnyArray
    independent: AnyArray
    accepted: AnyArray
    residual: AnyArray

    @property
    def evidence(self) -> str:
        """How it was made, in words (not under tracing)."""
        return describe_certification(self.independent)


def describe_certification(independent: AnyArray | bool) -> str:
    """How certificates were made, in words.

    Args:
        independent: Whether steps were evaluated once more, of each chain.
    """
    each = np.asarray(independent)
    some = "" if each.all() or not each.any() else "partly "
    return (
        f"{some}by an independent pass" if each.any() else "recorded while the chains were rolled"
    )


def flat_steps(carries: PyTree) -> Array:
    """Carries with a leading axis `T` as vectors, shape `(T, D)`."""
    return jax.vmap(lambda carry: ravel_pytree(carry)[0])(carries)


def judged(
    values: PyTree,
    consistent: Array,
    records: Records,
    uniform: Array | None,
    initial: PyTree,
    states: PyTree,
    unit: Array | float | None,
    independent: bool = True,
) -> tuple[Certificate, Records]:
    """The certificate of one path, given the kernel's next state of each state.

    Args:
        values: `f(x_{t-1}, k_t)`, a pytree like the carry with leading axis `T`.
        consistent: Whether discrete leaves are the tape's.
        records: What the kernel reports of each step.
        uniform: The uniforms behind its decisions, shape `(T,)`; None where they are not known.
        initial: The carry before the first step.
        states: The path.
        unit: Of the residual; None is the path's spread.
        independent: Whether the values were computed apart from the path.
    """
    before, flatten = LocalTime().previous(initial, states), flat_steps
    path, expected, previous = flatten(states), flatten(values), flatten(before)
    num_steps, dtype = path.shape[0], path.dtype
    unit = _spread(path, expected) if unit is None else jnp.asarray(unit, dtype)
    # A unit that is not positive and finite would let anything pass.
    usable = (unit > 0) & jnp.isfinite(unit)
    residual = nanaware_max(jnp.where(usable, jnp.abs(expected - path) / unit, jnp.nan), axis=1)
    finite = jnp.isfinite(path).all()
    tolerance = jnp.asarray(_TOLERANCE.get(dtype, 1e-4), dtype)
    positions = [
        carry.position if isinstance(carry, Carry) else carry for carry in (states, before)
    ]
    moved = (flatten(positions[0]) != flatten(positions[1])).any(axis=1)
    accepted = (
        jnp.ones(num_steps, bool)
        if records.accepted is None
        else jnp.broadcast_to(records.accepted, (num_steps,))
    )
    held = ~moved | ~accepted
    returned = (expected == previous).all(axis=1)
    # Of the largest number of a coordinate, of which a small one may be a difference.
    sizes = jnp.abs(previous).max(axis=0, initial=0)
    rounding = 2 * DEFAULT_ULPS * jnp.finfo(dtype).eps * sizes
    moves_where_rejected = (
        ~accepted & returned & ~(jnp.abs(expected - path) <= rounding).all(axis=1)
    )
    num_ambiguous, min_margin = _margins(uniform, records, dtype)
    certificate = Certificate(
        certified=finite
        & jnp.all(residual <= tolerance)
        & ~moves_where_rejected.any()
        & consistent,
        max_residual=nanaware_max(residual),
        worst_step=jnp.argmax(jnp.where(jnp.isnan(residual), jnp.inf, residual))
        if num_steps
        else jnp.zeros((), jnp.int32),
        tolerance=tolerance,
        num_steps=jnp.asarray(num_steps),
        finite=finite,
        frozen=(num_steps >= FEWEST_TO_FREEZE) & held.all(),
        num_rejected=jnp.asarray(-1) if records.accepted is None else jnp.sum(~accepted),
        longest_rejection=_longest_run(held),
        num_nonfinite_proposals=jnp.sum(records.nonfinite),
        num_ambiguous=num_ambiguous,
        min_margin=min_margin,
        min_lattice_margin=jnp.asarray(jnp.nan, dtype)
        if records.lattice_margin is None
        else jnp.min(records.lattice_margin, initial=jnp.inf),
        discrete_consistent=consistent,
        independent=jnp.asarray(independent),
        accepted=accepted,
        residual=residual,
    )
    return certificate, dataclasses.replace(records, held=returned)


# Quartiles are taken from so many steps.
_SOME = 1024


def _spread(path: Array, expected: Array | None = None) -> Array:
    """Standard deviation of each coordinate; where it does not move its size, or that of the values expected of it: a path
    that stands still at 0 and ought not to is then off by 1.

    It is estimated from the interquartile range where that is smaller: a path that explodes somewhere must not set the unit
    by which it is judged.
    """
    if not path.shape[0]:
        return jnp.ones(path.shape[1:], path.dtype)
    # Quartiles of steps all along the path, to the nearest rank: a unit needs no more, and all would take as long as sampling
    # does.
    # In units of the largest number, because squares of others need not be numbers of this type.
    size = jnp.abs(path if expected is None else jnp.maximum(jnp.abs(path), jnp.abs(expected)))
    size = size.max(axis=0)
    size = jnp.where(jnp.isfinite(size) & (size > 0), size, 1)
    path = path / size
    some = path[:: -(-path.shape[0] // _SOME)]
    last = some.shape[0] - 1
    low, high = (_of_rank(some, round(share * last)) for share in (0.25, 0.75))
    spread, middle = jnp.std(path, axis=0), (high - low) / 1.349
    spread = jnp.where((middle > 0) & ~(middle > spread), middle, spread)
    return size * jnp.where(jnp.isfinite(spread) & (spread > 0), spread, 1)


def _of_rank(path: Array, rank: int) -> Array:
    """The number of a rank, from 0, in every coordinate of a path `(T, D)`; NaN comes last.

    Bit by bit: the largest number below which no more than `rank` of the others lie. Programs that sort cannot be kept on disk.
    """
    size = 8 * path.dtype.itemsize
    unsigned = jnp.dtype(f"uint{size}")
    top = unsigned.type(1 << (size - 1))

    # Numbers whose order is that of the floats: those of negative ones run backwards.
    bits = jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(path), jnp.nan, path), unsigned)
    places = jnp.where(bits & top, ~bits, bits | top)

    def with_next_bit(index, found):
        more = found | jax.lax.shift_right_logical(top, index.astype(unsigned))
        return jnp.where((places < more).sum(axis=0) <= rank, more, found)

    found = jax.lax.fori_loop(0, size, with_next_bit, jnp.zeros(path.shape[1:], unsigned))
    bits = jnp.where(found & top, found ^ top, ~found)
    return jax.lax.bitcast_convert_type(bits, path.dtype)


def _margins(uniform, records, dtype):
    threshold = AMBIGUOUS.get(dtype, 2e-3)
    if records.decision_margin is not None:
        return jnp.sum(records.decision_margin < threshold), jnp.min(
            records.decision_margin, initial=jnp.inf
        )
    if uniform is None or records.accepted is None:
        return jnp.asarray(-1), jnp.asarray(jnp.nan, dtype)
    margin = jnp.abs(records.acceptance_rate - uniform)
    # Only if this uniform explains every decision is it the kernel's own.
    explains = jnp.all((uniform < records.acceptance_rate) == records.accepted) & jnp.any(
        ~records.accepted
    )
    ambiguous = jnp.sum(margin < threshold)
    return (
        jnp.where(explains, ambiguous, -1),
        jnp.where(explains, jnp.min(margin, initial=jnp.inf), jnp.nan).astype(dtype),
    )


def _longest_run(flags: Array) -> Array:
    def advance(carry, flag):
        run = jnp.where(flag, carry[0] + 1, 0)
        return (run, jnp.maximum(carry[1], run)), None

    nothing = jnp.zeros((), jnp.int32)
    # Steps cost nothing but the loop around them.
    return jax.lax.scan(advance, (nothing, nothing), flags, unroll=16)[0][1]


def may_be_random(jaxpr: Any) -> bool:
    """Whether a traced function asks somebody whose answers its arguments need not determine."""
    return bool(primitives_of(jaxpr) & _NOT_FUNCTIONS)


def refuse_random_steps(
    certificate: Certificate,
    evaluate: Callable[[PyTree, PyTree], PyTree],
    initial: PyTree,
    states: PyTree,
    drives: PyTree,
) -> Certificate:
    """The certificate of a path of a step that `may_be_random`: not certified where a step has two answers.

    Args:
        certificate: Of the path.
        evaluate: One step, `(carry, drive) -> results`.
        initial: The carry before the first step.
        states: The path, leading axis `T`.
        drives: The tape.

    Returns:
        The certificate; steps with two answers have an infinite residual.
    """
    if not certificate.residual.size:
        return certificate
    before = LocalTime().previous(initial, states)
    chosen = jnp.concatenate(
        [
            _evenly(certificate.accepted),
            _evenly(~certificate.accepted),
            _farthest(flat_steps(before)),
        ]
    )

    def answers(places):
        some = jax.tree.map(lambda leaf: leaf[places], (before, drives))
        return jax.vmap(evaluate)(*some)

    # A loop, so that both answers come from one piece of code; the barrier keeps the compiler from seeing that they are one.
    twice = jax.lax.map(answers, jnp.stack([chosen, jax.lax.optimization_barrier(chosen)]))
    differs = jnp.zeros(chosen.shape, bool)
    for one, other in (raw(leaf) for leaf in jax.tree.leaves(twice)):
        unlike = (one != other) & ~((one != one) & (other != other))
        differs |= unlike.reshape(unlike.shape[0], -1).any(axis=1)
    random = jnp.zeros(certificate.residual.shape, bool).at[chosen].max(differs)
    return dataclasses.replace(
        certificate,
        certified=certificate.certified & ~random.any(),
        max_residual=jnp.where(random.any(), jnp.inf, certificate.max_residual),
        worst_step=jnp.where(random.any(), jnp.argmax(random), certificate.worst_step),
        residual=jnp.where(random, jnp.inf, certificate.residual),
    )


def _evenly(flags: AnyArray) -> Array:
    """The places of some steps that are flagged, all along the path; the last step where none is."""
    rank = jnp.cumsum(flags)
    wanted = 1 + (jnp.arange(_EVENLY) * jnp.maximum(rank[-1], 1)) // _EVENLY
    return jnp.minimum(jnp.searchsorted(rank, wanted), flags.shape[0] - 1)


def _farthest(path: Array) -> Array:
    """The places of the states `(T, D)` that are farthest from the first one, by the coordinate that has gone farthest in
    units of its own range."""
    apart = jnp.abs(path - path[0])
    widest = apart.max(axis=0)
    apart = (apart / jnp.where(widest > 0, widest, 1)).max(axis=1, initial=0)
    return jax.lax.top_k(apart, min(_FARTHEST, path.shape[0]))[1]
