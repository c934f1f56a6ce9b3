"""What a solve returns: the path, a verdict, and the work it took.

The only judge is the exact residual of the recurrence, step by step,

    r_t = f(x_{t-1}, u_t) − x_t,      step t is exact  ⇔  |r_tj| ≤ absolute_j + relative · |x_tj| for all j,

never the size of the last update: on a chaotic map an update can vanish while the path is wrong by any amount.
Where no absolute tolerance is given, each coordinate is judged by its own size on the path,

    absolute_tj = relative · s_tj,      s_tj = (|x_tj| + |x_{t-1,j}| + … + |x_{t-15,j}|) / 16,

because `f` rounds by units in the last place of what it adds up, of which x_tj may be a small difference. The sizes are
those of earlier steps and of the step itself: they are right if these steps are exact, whatever the guess was further on.
A path in micrometres and one in metres are thus judged alike, and coordinates of one state each in units of their own.
Verdicts are integers (`Status`), so that they travel through `jit` and `vmap`; `or_raise` turns them into exceptions.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from partime_mcmc.types import Array, ArrayLike, PyTree, Tracer, pytree


def nanaware_max(values: Array, axis: int | None = None) -> Array:
    """The maximum of non-negative `values` over `axis` (None: all), 0 if there are none, NaN if any is NaN.

    A verdict must not depend on how a backend's `max` treats NaN: some JAX releases return NaN on a CPU, others (0.12.0 is
    one) skip it, and a path with a NaN in it would then pass as exact.

    Args:
        values: Floating point, any shape.
        axis: The axis to reduce.

    Returns:
        The shape of `values` without `axis`.
    """
    missing = jnp.isnan(values)
    top = jnp.max(jnp.where(missing, 0, values), axis=axis, initial=0.0)
    return jnp.where(missing.any(axis=axis), jnp.nan, top).astype(values.dtype)


# A path is accepted when its residual is within this many units in the last place of its sizes. The floor is some 2 to 20 ulp (one
# rounding per operation of f, amplified by its Jacobian); a wrong accept decision is some 1e15 ulp in float64.
DEFAULT_ULPS = 128


class Status(enum.IntEnum):
    """The verdict on a path.

    Examples:
        >>> from partime_mcmc import Status
        >>> Status.CONVERGED.message
        'every step obeys the recurrence to within the tolerance'
    """

    CONVERGED = 0
    OUT_OF_ITERATIONS = 1
    NONFINITE = 2
    STALLED = 3
    FROZEN = 4
    INTERRUPTED = 5

    @property
    def message(self) -> str:
        """One sentence saying what happened and what to do."""
        return _MESSAGES[self]


_MESSAGES = {
    Status.CONVERGED: "every step obeys the recurrence to within the tolerance",
    Status.OUT_OF_ITERATIONS: (
        "the iterations ran out before every step obeyed the recurrence; raise max_iterations, cut time into "
        "Windows, damp or clip the Jacobians, or run sequentially if the system does not forget its past"
    ),
    Status.NONFINITE: (
        "the recurrence itself leaves the finite numbers: the step after the exact prefix maps a finite state to NaN "
        "or infinity, so no solver can continue; look at the dynamics there"
    ),
    Status.STALLED: (
        "the iteration repeats itself without meeting the tolerance: either the tolerance is below what this floating "
        "point type can reach, or the linearisation cycles; loosen the tolerance, use float64, or damp"
    ),
    Status.FROZEN: "the chain never moves: no proposal was accepted; check the step size, the metric and the start",
    Status.INTERRUPTED: "the run was interrupted; it holds the steps that were certified before that",
}


class SolveError(RuntimeError):
    """A path that is not what was asked for, raised by `or_raise`."""


class Bound(NamedTuple):
    """A tolerance in numbers, for the states `(..., D)`.

    Attributes:
        absolute: Broadcasts against the states; None where coordinates are judged by their own sizes.
        relative: Broadcasts against the states.
    """

    absolute: Array | None
    relative: Array

    def at(self, states: Array, recent: Array | None) -> Array:
        """The largest residual allowed at `states`, of the mean sizes `recent`; None for these if `absolute` is given."""
        if self.absolute is not None:
            return self.absolute + self.relative * jnp.abs(states)
        assert recent is not None
        # Not as a sum of two products, which a compiler adds up first and multiplies then: that may leave the numbers.
        return 2 * self.relative * (recent + 0.5 * (jnp.abs(states) - recent))

    def scaled(self, factor: float) -> Bound:
        """A part of this tolerance."""
        absolute = None if self.absolute is None else factor * self.absolute
        return Bound(absolute, factor * self.relative)


@pytree()
class Tolerance:
    """How small a residual must be: `|r_tj| ≤ absolute_j + relative · |x_tj|`.

    Attributes:
        relative: A scalar; None is 128 units in the last place of the state's type.
        absolute: A scalar or an array of shape `(D,)`, in the units of the state; None is `relative` times the mean |x_j|
            of the step and the 15 before it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, Tolerance, jacobi, solve
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> rough = Tolerance(relative=0.0, absolute=0.1)
        >>> found = solve(decay, jnp.zeros(1), jnp.ones((9, 1)), solver=jacobi(), tolerance=rough)
        >>> bool(0 < found.residual <= 0.1)
        True
    """

    relative: ArrayLike | None = None
    absolute: ArrayLike | None = None

    def check(self, dimension: int) -> None:
        """Refuse a tolerance that no path, or any path, could meet.

        Args:
            dimension: D, numbers in a state.

        Raises:
            ValueError: If a part is negative, not finite (traced ones pass), or of the wrong shape.
        """
        self.check_values()
        for name, shapes in (("relative", ((),)), ("absolute", ((), (1,), (dimension,)))):
            value = getattr(self, name)
            if value is None:
                continue
            if jnp.shape(value) not in shapes:
                raise ValueError(
                    f"tolerance: {name} has shape {jnp.shape(value)}, wanted one of {shapes}"
                )

    def check_values(self) -> None:
        """Refuse numbers that no path, or any path, could meet.

        Raises:
            ValueError: If a part is no number, negative or not finite (traced ones pass).
        """
        for name, value in (("relative", self.relative), ("absolute", self.absolute)):
            if value is None or isinstance(value, Tracer):
                continue
            is_number = np.asarray(value).dtype.kind in "fiu"
            if not is_number or not (np.isfinite(value) & (np.asarray(value) >= 0)).all():
                raise ValueError(f"tolerance: {name} must be finite and at least 0, got {value!r}")

    def parts(self, dtype: jnp.dtype) -> Bound:
        """The tolerance in numbers of `dtype`."""
        unit = DEFAULT_ULPS * jnp.finfo(dtype).eps
        return Bound(
            None if self.absolute is None else jnp.asarray(self.absolute, dtype),
            jnp.asarray(unit if self.relative is None else self.relative, dtype),
        )

    def ratio(self, residual: Array, states: Array, recent: Array) -> Array:
        """How far each step is from the tolerance.

        Args:
            residual: Shape `(T, D)`.
            states: Shape `(T, D)`.
            recent: `time_axis.recent_sizes` of the states, shape `(T, D)`.

        Returns:
            Shape `(T,)`: at most 1 where the step is exact; NaN where the residual is not finite.
        """
        # Residual and bound are compared without dividing by zero: a tolerance of 0 asks for bitwise equality.
        bound = jnp.asarray(self.parts(states.dtype).at(states, recent), states.dtype)
        size = jnp.abs(residual)
        scaled = jnp.where(size == 0, 0.0, size / bound)
        # An infinite state has an infinite bound: that must not pass as exact.
        return nanaware_max(
            jnp.where(jnp.isfinite(size) & jnp.isfinite(bound), scaled, jnp.nan), axis=-1
        )


@pytree()
class Stats:
    """The work of a solve, in units that mean the same on every machine.

    Attributes:
        evaluations: Evaluations of `f` per step of the path, the final check included; a scalar.
        jvps: Jacobian-vector products of `f` per step of the path; a scalar.
        depth: The longest chain of dependent evaluations of `f`; a scalar.
        residual_history: Largest residual over the window at the start of each iteration, shape `(H,)`; NaN beyond.
        num_replaced_jacobians: Step Jacobians that were not finite and were replaced by 0, over all iterations.
        num_replaced_updates: Updates that overflowed and were replaced by `f` of the old iterate, over all iterations.
        evaluations_by_part: `evaluations` by the device that made them, in the order of time, shape `(P,)`; on one device
            that number itself.
    """

    evaluations: Array
    jvps: Array
    depth: Array
    residual_history: Array
    num_replaced_jacobians: Array
    num_replaced_updates: Array
    evaluations_by_part: Array


@pytree()
class Solution:
    """A path and the verdict on it; under `vmap` every field has the batch's leading axes.

    Attributes:
        states: `x_1..x_T`, a pytree like the initial state with a leading axis `T`.
        status: A `Status` as an integer array.
        iterations: Iterations done, an integer.
        residual: `max_t,j |f(x_{t-1}, u_t) − x_t|` of the states returned; a scalar, NaN if any is not finite.
        num_exact: How many steps from the start on are within the tolerance (`T` when converged).
        stats: The work done.
        notes: `CachedStep.aux` of every step of the path, shape `(T, R)`; None where the dynamics have no `aux`, or the
            solver keeps none.
        defects: `f(x_{t-1}, u_t) − x_t` in flat coordinates, shape `(T, D)`; None where there are no notes.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, solve
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> found = solve(decay, jnp.zeros(1), jnp.ones((4, 1)))
        >>> found.verdict.name, int(found.num_exact), float(found.residual)
        ('CONVERGED', 4, 0.0)
    """

    states: PyTree
    status: Array
    iterations: Array
    residual: Array
    num_exact: Array
    stats: Stats
    notes: Array | None = None
    defects: Array | None = None

    @property
    def verdict(self) -> Status:
        """The status of a single path as a `Status`, with its message; the worst one of a batch (not under tracing)."""
        return Status(int(np.max(np.asarray(self.status))))

    def or_raise(self) -> Solution:
        """This solution, if every path in it converged.

        Raises:
            SolveError: Naming the verdict, the residual and the exact prefix of the first path that did not.
        """
        status = np.atleast_1d(np.asarray(self.status))
        bad = np.flatnonzero(status.ravel() != Status.CONVERGED)
        if bad.size:
            first = int(bad[0])
            verdict = Status(int(status.ravel()[first]))
            residual = float(np.ravel(self.residual)[first])
            exact = int(np.ravel(self.num_exact)[first])
            which = f"path {first} of {status.size}" if status.size > 1 else "the path"
            raise SolveError(
                f"{verdict.name}: {which}: {verdict.message} (largest residual {residual:.3g}, the first "
                f"{exact} steps are exact, {int(np.ravel(self.iterations)[first])} iterations)"
            )
        return self
