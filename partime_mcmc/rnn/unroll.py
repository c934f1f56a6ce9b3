"""`lax.scan` for recurrent networks, in parallel over time where that is faster.

    (h_t, y_t) = cell(params, h_{t-1}, x_t),    t = 1..T

The path of the carry is solved as a recurrence; outputs are read off it. Three things decide how:

    solver=None     a static choice from shapes, types, the cell's arithmetic and the device (`plan`): `lax.scan` itself
                    where segments gain nothing or numbers are too coarse to be judged, a segmented scan elsewhere
    solver=...      any solver of the engine, through `solve`
    no convergence  one step after another, whatever the solver: the result is always that of `lax.scan`, and
                    `unroll_with_status` returns how it was found

Derivatives follow from the implicit function theorem; those of `lax.scan`, where it was chosen, are its own.

A masked step leaves the carry as it is, bit for bit. Steps that count are moved to the front, in their order, and solved
there as one shorter sequence; then every step is given the state after the last step that counted,

    k_t = number of counting steps among 1..t,       h_t = path[k_t],     path[0] = h_0,

so a state that stands still is the very same floats. Left in place, masked steps would carry a guessed state through whole
segments without forgetting it, and every pass of a solver would correct one segment only. After the last counting step the
packed sequence continues with a state of 0 that nothing depends on. Inputs of masked steps are set to 0 beforehand: in
practice they are often NaN, and 0 times NaN would reach the derivatives.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partime_mcmc.engine import (
    Adjoint,
    Dynamics,
    Implicit,
    ImplicitSegmented,
    LocalTime,
    NoDerivatives,
    Status,
    Tolerance,
    ravel,
)
from partime_mcmc.engine.dynamics import check_state
from partime_mcmc.engine.solution import nanaware_max
from partime_mcmc.engine.solve import check_iterations, solve
from partime_mcmc.executions import run_jitted
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.segmented_scan import (
    LEAN_LOOPS,
    SegmentedScanConfig,
    one_after_another,
    segmented_scan,
)
from partime_mcmc.tracing import HashableFunction, explicit
from partime_mcmc.types import Array, PyTree, pytree
from partime_mcmc.validation import check_count, check_has, check_like, describe

# Residual allowed per step, in units in the last place: a network's step rounds a few times, and its states are of size 1.
_ULPS = 32
# Where 32 of them are a quarter of the state, as in bfloat16, only what rounding itself leaves is let pass.
_COARSE_ULPS = 4
# Numbers of state per step that all lanes together should have, and how many lanes at least and at most. On a CPU more
# lanes read time at more places at once, which costs more than they save; a state of one number fills one vector register
# with 16 lanes, and its products stay inside the loop (0.20 ms, against 0.73 ms with 256 lanes, 32,768 steps).
_NUMBERS = {"cpu": (1024, 64, 256)}
_NUMBERS_ELSEWHERE = 262_144, 16, 1024
_SINGLE = 16
# A CPU leaves larger batches to `lax.scan`: products of matrices already run at full speed there, and narrow batches fill
# vectors (one unit, 16 sequences: the relay took four times as long; see benchmarks/gru.py). A single chain gains, however
# wide: a product with one vector runs at half the speed of one with many.
_MOST_CHAINS_ON_CPU = 1
# Bytes of a state that lean loops keep in one or two registers (16 or 32 units of float32): it is rolled as fast alone as in
# lanes, and its gradient faster (0.7 times the time).
_IN_REGISTERS = (64, 128) if LEAN_LOOPS else ()


def is_coarse(carry: PyTree) -> bool:
    """Whether a carry is of a type below float32, in which a residual within some units in the last place proves nothing."""
    return jnp.finfo(jax.tree.leaves(carry)[0].dtype).bits < 32


def network_tolerance(carry: PyTree) -> Tolerance:
    """The tolerance of a network's path."""
    ulps = _COARSE_ULPS if is_coarse(carry) else _ULPS
    return Tolerance(ulps * float(jnp.finfo(jax.tree.leaves(carry)[0].dtype).eps))


def plan_for(carry: PyTree) -> SegmentedScanConfig:
    """How many segments the sequences of a cell with such a carry are cut into.

    Args:
        carry: One carry.
    """
    size = sum(jnp.size(leaf) for leaf in jax.tree.leaves(carry))
    backend = jax.default_backend()
    numbers, fewest, most = _NUMBERS.get(backend, _NUMBERS_ELSEWHERE)
    lanes = max(fewest, min(most, numbers // max(size, 1)))
    if backend == "cpu" and size == 1:
        lanes = _SINGLE
    if backend == "cpu" and all(
        jnp.size(leaf) * leaf.dtype.itemsize in _IN_REGISTERS for leaf in jax.tree.leaves(carry)
    ):
        lanes = 1
    return SegmentedScanConfig(lanes, _MOST_CHAINS_ON_CPU if backend == "cpu" else None)


def read_outputs(
    cell: Callable, params: PyTree, carry: PyTree, states: PyTree, inputs: PyTree
) -> PyTree:
    """`y_1..y_T`, read off the path of the carry.

    Most cells return part of their new carry as their output: a GRU its state, an LSTM its `h`. The traced cell shows this,
    and then the outputs are the path itself. Any other cell is evaluated once more, at all steps side by side.

    Args:
        cell: A cell as `tracing.explicit` returns it, with its `jaxpr` and `structure`.
        params: Its parameters.
        carry: The initial carry.
        states: The path of the carry, leaves `(T, ...)`.
        inputs: Leaves `(T, ...)`.
    """
    shape = jax.tree.unflatten(cell.structure, cell.jaxpr.outvars)
    path = jax.tree.leaves(states)
    places = {id(variable): index for index, variable in enumerate(jax.tree.leaves(shape[0]))}
    sources = [places.get(id(variable)) for variable in jax.tree.leaves(shape[1])]
    outputs = jax.tree.structure(shape[1])
    found = [path[index] for index in sources if index is not None]
    if len(found) == len(sources):
        return jax.tree.unflatten(outputs, found)
    previous = LocalTime().previous(carry, states)
    return jax.vmap(lambda state, x: cell(params, state, x)[1])(previous, inputs)


def without_masked(tree: PyTree, mask: Array | None) -> PyTree:
    """Inputs or outputs `(T, ...)` with 0 where `mask` `(T,)` is False; random keys are left as they are."""
    if mask is None:
        return tree

    def clean(leaf):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            return leaf
        counts = mask.reshape(-1, *(1,) * (leaf.ndim - 1))
        return jnp.where(counts, leaf, jnp.zeros((), leaf.dtype))

    return jax.tree.map(clean, tree)


class Packed(NamedTuple):
    """Drives of a packed sequence: inputs `(T, ...)`, and whether each step counts, `(T,)`."""

    x: PyTree
    counts: Array


class PackedStep(HashableFunction):
    """The carry's part of a cell as the step of a recurrence; parts: the cell, and whether the drive says if a step counts."""

    def __call__(self, params: PyTree, carry: PyTree, drive: PyTree) -> PyTree:
        cell, counted = self.parts
        if not counted:
            return cell(params, carry, drive)[0]
        x, counts = drive
        new = cell(params, carry, x)[0]
        return jax.tree.map(lambda leaf: jnp.where(counts, leaf, jnp.zeros((), leaf.dtype)), new)


def batch_around(tree: PyTree) -> int:
    """How many sequences or networks the `vmap`s around a call run side by side; 1 without any.

    `custom_vmap` gives a function's rule the size of the mapped axis while the program is traced, so a function that only
    multiplies these sizes finds them. It cannot see a `vmap` outside of a `jit`, because that function is traced once for
    all callers.

    Args:
        tree: Arrays.
    """
    sizes = []

    @jax.custom_batching.custom_vmap
    def look(*leaves):
        return jnp.zeros(())

    @look.def_vmap
    def _(axis_size, in_batched, *leaves):
        sizes.append(axis_size)
        # The next `vmap` outside of this one, if there is one.
        return look(*leaves), False

    # A function with a batching rule of its own could not be differentiated, and nothing here needs to be.
    look(*lax.stop_gradient(jax.tree.leaves(tree)))
    return math.prod(sizes)


def check_inputs(
    carry: PyTree, inputs: PyTree, batch_axes: int
) -> tuple[tuple[int, ...], int, PyTree, PyTree]:
    """The batch's shape, T, and the shapes and types of one sequence's carry and of one step's inputs.

    Raises:
        TypeError: If the carry is not floating point of one type.
        ValueError: If there are no inputs, or axes do not fit.
    """
    check_count(batch_axes, "batch_axes", 0)
    leaves = jax.tree.leaves(inputs)
    if not leaves:
        raise ValueError(
            "inputs: no arrays, wanted at least one leaf with leading axis T (use jnp.arange(T) if the cell "
            "ignores its input)"
        )
    check_state(carry)
    heads = {leaf.shape[: batch_axes + 1] for leaf in leaves}
    short = min(map(len, heads)) <= batch_axes
    if len(heads) > 1 or short:
        raise ValueError(
            f"inputs: leading axes {sorted(heads)}, wanted one common "
            f"{'(batch..., T)' if batch_axes else '(T,)'} with batch_axes={batch_axes}"
        )
    *batch, num_steps = heads.pop()
    for path, leaf in jax.tree_util.tree_leaves_with_path(carry):
        if leaf.shape[:batch_axes] != tuple(batch):
            raise ValueError(
                f"carry: {jax.tree_util.keystr(path) or 'the array'} has shape {leaf.shape}, wanted the batch "
                f"axes {tuple(batch)} of `inputs` in front"
            )
    one, x = (
        jax.tree.map(
            lambda leaf, drop=drop: jax.ShapeDtypeStruct(leaf.shape[drop:], leaf.dtype), tree
        )
        for tree, drop in ((carry, batch_axes), (inputs, batch_axes + 1))
    )
    return tuple(batch), num_steps, one, x


def check_mask(mask: Array | None, shape: tuple[int, ...]) -> Array | None:
    """The mask as an array.

    Raises:
        TypeError: If it is not Boolean.
        ValueError: If its shape is not `shape`.
    """
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if mask.dtype != np.bool_:
        raise TypeError(f"mask: got type {mask.dtype}, wanted bool (True where the step counts)")
    if mask.shape != shape:
        raise ValueError(
            f"mask: got shape {mask.shape}, wanted {shape}, the leading axes of `inputs`"
        )
    return mask


def check_solver(solver: Any, tolerance: Any, max_iterations: Any, carry: PyTree) -> None:
    """Refuse a solver, a tolerance or a bound on passes that cannot be meant.

    Raises:
        TypeError: If `solver` is no solver or `tolerance` no `Tolerance`.
        ValueError: If a tolerance has a bad value or shape, or `max_iterations` is given without a solver or is not a
            positive integer.
    """
    if solver is not None:
        check_has(
            solver,
            "solver",
            ("init", "step", "map_size"),
            "a recipe such as shooting() or quasi_deer(), or None",
        )
    elif max_iterations is not None:
        raise ValueError(
            f"max_iterations: got {max_iterations!r} with solver=None, which makes no passes; give a solver, "
            "or leave it out"
        )
    check_iterations(max_iterations)
    if tolerance is not None:
        if not isinstance(tolerance, Tolerance):
            raise TypeError(
                f"tolerance: got {describe(tolerance)}, wanted Tolerance(relative, absolute) or None"
            )
        tolerance.check(sum(leaf.size for leaf in jax.tree.leaves(carry)))


# Up to this size of state the Jacobians of all steps fit beside the path, and a scan over them is faster than segments.
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
        solver: Any solver of the engine; None chooses between a segmented scan and `lax.scan`, from static facts:
            shapes, types, the device, and how many sequences or networks a `vmap` around this call runs side by side. On
            a CPU batches are left to `lax.scan`; types below float32 are everywhere.
        reverse: From the last step to the first, as in `lax.scan`.
        mask: Booleans, shape `(T,)` behind the batch axes: where False the carry stays as it is and `y` is 0. Inputs there
            have no effect, not even NaN.
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

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import unroll
        >>> from partime_mcmc.rnn import gru, gru_params
        >>> params = gru_params(jax.random.key(0), num_inputs=2, num_units=4)
        >>> last, outputs = unroll(gru, params, jnp.zeros(4), jnp.ones((50, 2)))
        >>> outputs.shape
        (50, 4)
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
    if not callable(cell):
        raise TypeError(
            f"cell: got {describe(cell)}, wanted a function (params, carry, input) -> (carry, output)"
        )
    params, carry, inputs = jax.tree.map(jnp.asarray, (params, carry, inputs))
    batch, num_steps, one, x = check_inputs(carry, inputs, batch_axes)
    mask = check_mask(mask, (*batch, num_steps))
    # Captured arrays become parameters: nothing is folded into the program, and derivatives reach them.
    cell, params = explicit(cell, params, one, x)
    result = jax.eval_shape(cell, params, one, x)
    if not isinstance(result, tuple) or len(result) != 2:
        raise TypeError(f"cell: returns {jax.tree.structure(result)}, wanted a pair (carry, y)")
    check_like("cell: returns a carry:", result[0], one, "carry")
    check_solver(solver, tolerance, max_iterations, one)
    tolerance = network_tolerance(one) if tolerance is None else tolerance
    around = batch_around((params, carry, inputs, mask))
    return run_jitted(
        _program,
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
    drives = inputs
    if mask is not None:
        # The steps that count, in their order, then the others; and k_t.
        order, count = jnp.argsort(~mask, stable=True), jnp.cumsum(mask)
        packed = jax.tree.map(lambda leaf: leaf[order], inputs)
        drives = Packed(packed, jnp.arange(num_steps) < count[-1])
    flat, start, unravel = ravel(Dynamics(PackedStep(cell, mask is not None), params), carry)
    path, status = _solved(flat, start, drives, solver, plan, tolerance, max_iterations)
    if mask is not None:
        path = jnp.concatenate([start[None], path])[count]
    states = jax.vmap(unravel)(path)
    final = jax.tree.map(lambda leaf: leaf[-1], states)
    ys = without_masked(read_outputs(cell, params, carry, states, inputs), mask)
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
    ys = without_masked(ys, mask)
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
        nanaware_max(jnp.abs(leaf))
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
    plan: SegmentedScanConfig,
    tolerance: Tolerance,
    max_iterations: int | None,
) -> tuple[Array, UnrollStatus]:
    """The path `(T, D)` with its derivatives, and how it was found; the caller judges the values that are returned."""
    fixed, first, tape = lax.stop_gradient((dynamics, initial, drives))
    if solver is None:
        path, report = segmented_scan(
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
    # In coarse numbers an agreement of states proves nothing: derivatives are computed one step after another.
    plan = SegmentedScanConfig(1) if is_coarse(initial) else plan
    adjoint: Adjoint = Implicit() if initial.size <= _NARROW else ImplicitSegmented(plan)
    return adjoint(dynamics, initial, drives, path, LocalTime()), found
