"""`lax.scan` for recurrent networks, in parallel over time where that is faster.

    (h_t, y_t) = cell(params, h_{t-1}, x_t),    t = 1..T

The path of the carry is solved as a recurrence; outputs are read off it. Three things decide how:

    solver=None     a static choice from shapes, types, the cell's arithmetic and the device (`plan`): `lax.scan` itself
                    where lanes gain nothing or its numbers are too coarse to be judged, a relay of segments elsewhere
    solver=...      any solver of the engine, through `solve`
    no convergence  one step after another, whatever the solver: the result is always that of `lax.scan`, and
                    `unroll_with_status` says how it was found

Derivatives follow from the implicit function theorem; those of `lax.scan`, where it was chosen, are its own. A masked step
leaves the carry as it is, bit for bit (`masks`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from partime_mcmc.adjoint import Adjoint, Implicit, ImplicitRelay, NoDerivatives
from partime_mcmc.closures import explicit
from partime_mcmc.dynamics import Dynamics, ravel
from partime_mcmc.reduction import largest
from partime_mcmc.rnn.arguments import check_carry, check_inputs, check_mask, check_solver
from partime_mcmc.rnn.batches import batch_around
from partime_mcmc.rnn.masks import PackedStep, Packing, silence, without_masked
from partime_mcmc.rnn.outputs import read_outputs
from partime_mcmc.rnn.plan import is_coarse, network_tolerance, plan_for
from partime_mcmc.scan.time_axis import LocalTime
from partime_mcmc.solution import Status, Tolerance
from partime_mcmc.solve import solve
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.relay import one_after_another, relay
from partime_mcmc.solvers.relay_plan import RelayPlan
from partime_mcmc.types import Array, PyTree, pytree

# Up to here the Jacobians of all steps fit beside the path, and a scan over them beats a relay.
_NARROW = 4


@pytree()
class UnrollStatus:
    """How a path was found; under `vmap` every field has the batch's leading axes.

    Attributes:
        status: A `Status` as an integer: CONVERGED, or NONFINITE where the final carry or an output is not finite; the
            values are those of `lax.scan` in either case.
        parallel: Whether a parallel solver's path is returned; False where it was computed one step after another, because
            that was chosen or because the solver did not converge.
        solver_status: The verdict on the solver's own path, as a `Status`; CONVERGED where `lax.scan` was chosen.
        iterations: Passes of the solver.
        residual: Largest residual of the solver's own path; 0 where `lax.scan` was chosen.
        evaluations: Evaluations of the cell per step, the sequential fallback included.
    """

    status: Array
    parallel: Array
    solver_status: Array
    iterations: Array
    residual: Array
    evaluations: Array


def unroll(
    cell: Callable,
    params: PyTree,
    carry: PyTree,
    inputs: PyTree,
    *,
    solver: Solver | None = None,
    reverse: bool = False,
    mask: Array | None = None,
    batch_axes: int = 0,
    tolerance: Tolerance | None = None,
    max_iterations: int | None = None,
) -> tuple[PyTree, PyTree]:
    """Run a recurrent cell over a sequence, as `jax.lax.scan` does.

    Args:
        cell: `(params, carry, x) -> (carry, y)`, pure. Use one function object for one cell, or it is compiled again.
        params: What `cell` needs besides; a pytree.
        carry: The initial carry, a pytree of floating-point arrays of one type.
        inputs: Leaves with leading axis `T`, behind the batch axes.
        solver: Any solver of the engine; None chooses between a relay of segments and `lax.scan`, from static facts:
            shapes, types, the device, and how many sequences or networks a `vmap` around this call runs side by side. On
            a CPU batches are left to `lax.scan`; types below float32 are everywhere.
        reverse: From the last step to the first, as in `lax.scan`.
        mask: Booleans, shape `(T,)` behind the batch axes: where False the carry stays as it is and `y` is 0. Inputs there
            have no say, not even NaN.
        batch_axes: How many leading axes of `carry`, `inputs` and `mask` (not of `params`) are batches of sequences; the
            cell sees one sequence. `vmap` of `unroll` does the same; `vmap` of a `jit` that holds it is known only after
            the choice: on a CPU sequences and networks then share one loop over the steps, and derivatives are those of the
            implicit function theorem.
        tolerance: How small the residual must be; None is 32 units in the last place, 4 below float32.
        max_iterations: As in `solve`, for a solver that is given; with None it is refused.

    Returns:
        The final carry, and `y` of every step, leaves with leading axis `T` behind the batch axes.

    Raises:
        TypeError: If the carry is not floating point of one type, `cell` changes its structure, shapes or types, or `solver`
            or `tolerance` is of the wrong kind.
        ValueError: If the shapes of `carry`, `inputs`, `mask` or `tolerance` do not fit, or `max_iterations` is given
            without a solver or is not a positive integer.
    """
    return unroll_with_status(
        cell,
        params,
        carry,
        inputs,
        solver=solver,
        reverse=reverse,
        mask=mask,
        batch_axes=batch_axes,
        tolerance=tolerance,
        max_iterations=max_iterations,
    )[:2]


def unroll_with_status(
    cell: Callable,
    params: PyTree,
    carry: PyTree,
    inputs: PyTree,
    *,
    solver: Solver | None = None,
    reverse: bool = False,
    mask: Array | None = None,
    batch_axes: int = 0,
    tolerance: Tolerance | None = None,
    max_iterations: int | None = None,
) -> tuple[PyTree, PyTree, UnrollStatus]:
    """`unroll`, and how its path was found; arguments and failures as there."""
    params, carry, inputs = jax.tree.map(jnp.asarray, (params, carry, inputs))
    batch, num_steps, one, x = check_inputs(carry, inputs, batch_axes)
    mask = check_mask(mask, (*batch, num_steps))
    # Captured arrays become parameters: nothing is folded into the program, and derivatives reach them.
    cell, params = explicit(cell, params, one, x)
    check_carry(cell, params, one, x)
    check_solver(solver, tolerance, max_iterations, one)
    tolerance = network_tolerance(jax.tree.leaves(one)[0].dtype) if tolerance is None else tolerance
    around = batch_around((params, carry, inputs, mask))
    return _program(
        cell,
        params,
        carry,
        inputs,
        mask,
        solver,
        tolerance,
        reverse=bool(reverse),
        batch=batch,
        around=around,
        max_iterations=max_iterations,
    )


@functools.partial(
    jax.jit, static_argnums=0, static_argnames=("reverse", "batch", "around", "max_iterations")
)
def _program(
    cell, params, carry, inputs, mask, solver, tolerance, *, reverse, batch, around, max_iterations
):
    run = functools.partial(
        _one_sequence, cell, solver, tolerance, reverse, around * math.prod(batch), max_iterations
    )
    for _ in batch:
        run = jax.vmap(run, in_axes=(None, 0, 0, 0))
    return run(params, carry, inputs, mask)


def _one_sequence(
    cell, solver, tolerance, reverse, num_chains, max_iterations, params, carry, inputs, mask
):
    num_steps = jax.tree.leaves(inputs)[0].shape[0]
    plan = plan_for(carry)
    inputs = without_masked(inputs, mask)
    if (
        num_steps == 0
        or solver is None
        and (is_coarse(carry) or plan.segments(num_chains, num_steps, jax.default_backend()) == 1)
    ):
        return _by_scan(cell, params, carry, inputs, mask, reverse)
    if reverse:
        inputs, mask = jax.tree.map(lambda leaf: jnp.flip(leaf, 0), (inputs, mask))
    packing = None if mask is None else Packing.of(mask)
    drives = inputs if mask is None else packing.pack(inputs)
    flat, start, unravel = ravel(Dynamics(PackedStep(cell, mask is not None), params), carry)
    path, status = _solved(flat, start, drives, solver, plan, tolerance, max_iterations)
    states = jax.vmap(unravel)(path if mask is None else packing.unpack(start, path))
    final = jax.tree.map(lambda leaf: leaf[-1], states)
    ys = silence(read_outputs(cell, params, carry, states, inputs), mask)
    status = dataclasses.replace(status, status=_verdict(final, ys))
    return final, jax.tree.map(lambda leaf: jnp.flip(leaf, 0), ys) if reverse else ys, status


def _by_scan(cell, params, carry, inputs, mask, reverse):
    """`lax.scan` itself, with its own derivatives."""

    def advance(carry, xs):
        x, wanted = xs
        new, y = cell(params, carry, x)
        return (
            (new, y)
            if mask is None
            else (jax.tree.map(lambda a, b: jnp.where(wanted, a, b), new, carry), y)
        )

    final, ys = lax.scan(advance, carry, (inputs, mask), reverse=reverse)
    ys = silence(ys, mask)
    zero = jnp.zeros((), jnp.int32)
    return (
        final,
        ys,
        UnrollStatus(
            _verdict(final, ys), jnp.asarray(False), zero, zero, jnp.float32(0), jnp.float32(1)
        ),
    )


def _verdict(final, ys):
    """The status of what is returned, the same whichever way it was found."""
    sizes = [
        largest(jnp.abs(leaf))
        for leaf in jax.tree.leaves((final, ys))
        if leaf.size and jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    finite = jnp.stack([jnp.isfinite(size) for size in sizes]).all() if sizes else jnp.asarray(True)
    return jnp.where(finite, int(Status.CONVERGED), int(Status.NONFINITE)).astype(jnp.int32)


def _solved(
    dynamics: Dynamics,
    initial: Array,
    drives: PyTree,
    solver: Solver | None,
    plan: RelayPlan,
    tolerance: Tolerance,
    max_iterations: int | None,
) -> tuple[Array, UnrollStatus]:
    """The path `(T, D)` with its derivatives, and how it was found; what is returned is judged later."""
    fixed, first, tape = lax.stop_gradient((dynamics, initial, drives))
    if solver is None:
        path, report = relay(
            fixed.step, fixed.params, first, tape, tolerance.parts(first.dtype), plan
        )
        mine = jnp.where(
            report.parallel, int(Status.CONVERGED), int(Status.OUT_OF_ITERATIONS)
        ).astype(jnp.int32)
        found = UnrollStatus(
            mine, report.parallel, mine, jnp.int32(1), report.gap, report.evaluations
        )
    else:
        solution = solve(
            fixed,
            first,
            tape,
            solver=solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
            # Derivatives are attached once it is settled which path is returned.
            adjoint=NoDerivatives(),
        )
        converged = solution.status == Status.CONVERGED
        path, converged = one_after_another(
            fixed.step, fixed.params, first, tape, solution.states, converged
        )
        found = UnrollStatus(
            solution.status,
            converged,
            solution.status,
            solution.iterations,
            solution.residual,
            solution.stats.evaluations + ~converged,
        )
    # In coarse numbers a meeting proves nothing: their derivatives go one step after another.
    plan = RelayPlan(1) if is_coarse(initial) else plan
    adjoint: Adjoint = Implicit() if initial.size <= _NARROW else ImplicitRelay(plan)
    return adjoint(dynamics, initial, drives, path, LocalTime()), found
