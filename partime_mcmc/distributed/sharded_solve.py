"""One path solved by many devices: `solve` under `jax.shard_map`, every device with its own steps and its own drives.

    mesh = time_mesh(num_time=8)
    found = sharded_solve(dynamics, initial, drives, mesh=mesh, solver=shooting())

The arguments are those of `solve`, the result is that of `solve` to rounding, and every solver runs as it is:
`ShardedTime` answers its questions. Chains go along a mesh axis of their own: `sharded_chains`. Further mesh axes are
free, for the data of a log density that no single device could hold (`params_spec`, and `summed` in `distributed.mesh`).

A length that devices cannot share evenly is filled up with steps that stand still: x_t = x_{t-1}, exact on sight, cut
off from what is returned. Derivatives go by the implicit function theorem around the whole path (`TimeOnMesh`), not
through the solve.

Schedules with a moving window are left out: call this for one window after another.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from partime_mcmc.distributed.mesh import CHAINS, TIME, solution_specs
from partime_mcmc.distributed.sharded_time import ShardedTime, TimeOnMesh
from partime_mcmc.engine import (
    Adjoint,
    CachedStep,
    Dynamics,
    Implicit,
    ImplicitSegmented,
    NoDerivatives,
    Solution,
    Tolerance,
    deer,
    ravel,
)
from partime_mcmc.engine.dynamics import check_state
from partime_mcmc.engine.solve import check_step, count_steps, flat_guess, solve
from partime_mcmc.solvers import Shooting, Solver
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, Key, PyTree, nan_is_a_value


@nan_is_a_value()
def sharded_solve(
    dynamics: Dynamics,
    initial: PyTree,
    drives: PyTree,
    *,
    mesh: Mesh,
    solver: Solver = deer(),
    tolerance: Tolerance = Tolerance(),
    max_iterations: int | None = None,
    guess: PyTree | None = None,
    adjoint: Adjoint | None = None,
    key: Key | None = None,
    params_spec: PyTree | None = None,
) -> Solution:
    """Solve a recurrence for its whole path, time spread over the devices of a mesh axis `time`.

    Args:
        dynamics: As for `solve`.
        initial: `x_0`, the same everywhere.
        drives: `u_1..u_T`, leaves with leading axis `T`. In a run of several processes either the same numbers in each
            of them, or global arrays of which every process holds its own part.
        mesh: From `time_mesh`, or any mesh with an axis `time`.
        solver: As for `solve`.
        tolerance: As for `solve`.
        max_iterations: As for `solve`.
        guess: As for `solve`.
        adjoint: How derivatives reach the path; None is `Implicit()`.
        key: As for `solve`. Solvers that estimate do so with the same numbers on every device.
        params_spec: Where `dynamics.params` lie, a prefix of them made of `PartitionSpec`; None: the same on every
            device. With it the step may use collectives over other mesh axes than `time`; it then captures no array,
            and its path has no derivatives: differentiating it raises.

    Returns:
        The solution, its states spread along the mesh axis; `stats.evaluations_by_part` says how even the work was.

    Raises:
        TypeError: As `solve` does; or if `adjoint` cannot go along a spread axis, or is given with `params_spec`; or if a
            path with `params_spec` is differentiated.
        ValueError: As `solve` does; or if the mesh has no axis `time`, or `params_spec` names an axis that it cannot.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, sharded_solve, time_mesh
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> found = sharded_solve(decay, jnp.zeros(1), jnp.ones((4, 1)), mesh=time_mesh(1))
        >>> print(found.states.ravel())
        [1.    1.5   1.75  1.875]
    """
    axis = time_axis(mesh)
    if isinstance(adjoint, ImplicitSegmented):
        raise TypeError(
            "adjoint: got ImplicitSegmented, wanted Implicit(): a segmented scan does not go across devices"
        )
    if params_spec is not None:
        _check_spec(params_spec, mesh)
        if adjoint is not None:
            raise TypeError(
                f"adjoint: got {adjoint!r} with params_spec, wanted None: such a path has no derivatives"
            )
    adjoint = Implicit() if adjoint is None else adjoint
    initial, drives = jax.tree.map(jnp.asarray, (initial, drives))
    check_state(initial)
    num_steps = count_steps(drives)
    if num_steps == 0:
        return solve(
            dynamics,
            initial,
            drives,
            solver=solver,
            tolerance=tolerance,
            guess=guess,
            adjoint=adjoint,
            key=key,
        )
    if params_spec is None:
        dynamics = check_step(dynamics, initial, drives)
    flat, start, unravel = ravel(dynamics, initial)
    path = None if guess is None else flat_guess(guess, initial, start, num_steps)
    # Every device has an equal part, in whole segments.
    unit = axis.num_parts
    if isinstance(solver, Shooting):
        segment = solver.segment_steps(num_steps, axis.num_parts)
        solver = dataclasses.replace(solver, num_segments=None, steps=segment)
        unit = axis.num_parts * segment
    filled = unit * math.ceil(num_steps / unit)
    still, tape, path = _padded(flat, drives, path, num_steps, filled)
    # As leaves and structure, which `jit` can compare.
    leaves, structure = jax.tree.flatten(params_spec, is_leaf=_is_spec)
    spec = None if params_spec is None else (tuple(leaves), structure)
    found = _solve_on(
        *lax.stop_gradient((still, start, tape, path)),
        solver,
        tolerance,
        jax.random.key(0) if key is None else key,
        mesh=mesh,
        axis=axis,
        spec=spec,
        max_iterations=max_iterations,
    )
    if params_spec is None:
        states = adjoint(still, start, tape, found.states, TimeOnMesh(mesh, axis))
    else:
        states = _without_derivatives(found.states, (still.params, start, tape))
    work = {
        name: getattr(found.stats, name) * (filled / num_steps)
        for name in ("evaluations", "jvps", "evaluations_by_part")
    }
    return dataclasses.replace(
        found,
        states=jax.vmap(unravel)(states[:num_steps]),
        num_exact=jnp.minimum(found.num_exact, num_steps),
        stats=dataclasses.replace(found.stats, **work),
    )


def sharded_chains(
    dynamics: Dynamics,
    initial: PyTree,
    drives: PyTree,
    *,
    mesh: Mesh,
    guess: PyTree | None = None,
    **options: Any,
) -> Solution:
    """Several paths of one recurrence, chains along the mesh axis `chains` and time along `time`.

    Args:
        dynamics: As for `solve`.
        initial: Leaves `(C, ...)`, C a multiple of the mesh axis.
        drives: Leaves `(C, T, ...)`.
        mesh: From `time_mesh`.
        guess: A path per chain, leaves `(C, T, ...)`; None as for `solve`.
        **options: As for `sharded_solve`.

    Returns:
        The solutions, every field with a leading axis `C`.

    Raises:
        ValueError: If the mesh has no axis `chains`, or it does not divide C, or there is not one tape and guess per chain.
    """
    num_chains = count_steps(initial)
    if CHAINS not in mesh.shape or num_chains % mesh.shape[CHAINS]:
        raise ValueError(
            f"initial: {num_chains} chains on a mesh of {dict(mesh.shape)}, wanted a multiple of its axis "
            f"{CHAINS!r}"
        )
    for name, given in (("drives", drives), ("guess", guess)):
        if any(jnp.shape(leaf)[:1] != (num_chains,) for leaf in jax.tree.leaves(given)):
            raise ValueError(
                f"{name}: got leaves of shapes {[jnp.shape(leaf) for leaf in jax.tree.leaves(given)]}, wanted "
                f"leaves ({num_chains}, T, ...): one per chain of initial"
            )

    def one(first, tape, guess):
        return sharded_solve(dynamics, first, tape, mesh=mesh, guess=guess, **options)

    return jax.vmap(one, spmd_axis_name=CHAINS)(initial, drives, guess)


def time_axis(mesh: Mesh) -> ShardedTime:
    """The axis of time of a mesh.

    Raises:
        ValueError: If it has none.
    """
    if not isinstance(mesh, Mesh) or TIME not in mesh.shape:
        raise ValueError(
            f"mesh: got {mesh!r}, wanted a Mesh with an axis {TIME!r}, e.g. time_mesh()"
        )
    return ShardedTime(mesh.shape[TIME], TIME, tuple(mesh.axis_names))


def _check_spec(params_spec: PyTree, mesh: Mesh) -> None:
    """Refuse what is no spec, or names an axis that the mesh lacks, or time: all steps have the same parameters."""
    wanted = [name for name in mesh.axis_names if name != TIME]
    for spec in jax.tree.leaves(params_spec, is_leaf=_is_spec):
        if not _is_spec(spec):
            raise TypeError(
                f"params_spec: got {spec!r}, wanted PartitionSpecs, e.g. PartitionSpec('data')"
            )
        named = [
            name
            for part in spec
            if part is not None
            for name in (part if isinstance(part, tuple) else (part,))
        ]
        if not set(named) <= set(wanted):
            raise ValueError(
                f"params_spec: got {spec} on a mesh of {dict(mesh.shape)}, wanted axes of {wanted}"
            )


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


@jax.custom_jvp
def _without_derivatives(states: Array, given: PyTree) -> Array:
    """`states`, a function of `given` whose derivative nobody knows."""
    return states


@_without_derivatives.defjvp
def _no_derivatives(primals, tangents):
    raise TypeError(
        "params_spec: got a derivative to take of a path whose step uses parameters spread over devices, wanted "
        "none: it is not known here. Put jax.lax.stop_gradient around dynamics.params, initial and drives, or "
        "leave params_spec out"
    )


@functools.partial(jax.jit, static_argnames=("mesh", "axis", "spec", "max_iterations"))
def _solve_on(
    dynamics: Dynamics,
    start: Array,
    drives: PyTree,
    guess: Array | None,
    solver: Solver,
    tolerance: Tolerance,
    key: Key,
    *,
    mesh: Mesh,
    axis: ShardedTime,
    spec: tuple | None,
    max_iterations: int | None,
) -> Solution:
    def here(params, cached_params, start, drives, guess):
        cached = dynamics.cached and dataclasses.replace(dynamics.cached, params=cached_params)
        return solve(
            dataclasses.replace(dynamics, params=params, cached=cached),
            start,
            drives,
            solver=solver,
            tolerance=tolerance,
            max_iterations=max_iterations,
            guess=guess,
            adjoint=NoDerivatives(),
            axis=axis,
            key=key,
        )

    along, same = PartitionSpec(axis.name), PartitionSpec()
    out = solution_specs(along, same)
    cached_params = dynamics.cached and dynamics.cached.params
    params_spec = same if spec is None else jax.tree.unflatten(spec[1], spec[0])
    given = (params_spec, (params_spec,) * 3 if cached_params else same, same, along, along)
    return jax.shard_map(here, mesh=mesh, in_specs=given, out_specs=out, check_vma=False)(
        dynamics.params, cached_params, start, drives, guess
    )


def _padded(dynamics: Dynamics, drives: PyTree, guess: Array | None, num_steps: int, filled: int):
    """The recurrence with steps that stand still at the end, so that there are `filled` of them."""
    if filled == num_steps:
        return dynamics, drives, guess

    def longer(leaf):
        return jnp.concatenate([leaf, jnp.repeat(leaf[-1:], filled - num_steps, axis=0)])

    cached = dynamics.cached
    if cached is not None:
        cached = CachedStep(
            _EnterFirst(cached.init), _MoveOrStay(cached.step), cached.state, cached.params
        )
    moves = jnp.arange(filled) < num_steps
    return (
        Dynamics(_MoveOrStay(dynamics.step), dynamics.params, cached),
        (moves, jax.tree.map(longer, drives)),
        None if guess is None else longer(guess),
    )


class _MoveOrStay(HashableFunction):
    """A step that moves where its drive says so."""

    def __call__(self, params, state, drive):
        moves, drive = drive
        return jax.tree.map(
            functools.partial(jnp.where, moves), self.parts[0](params, state, drive), state
        )


class _EnterFirst(HashableFunction):
    """`CachedStep.init` with a drive that says whether to move."""

    def __call__(self, params, state, drive):
        return self.parts[0](params, state, drive[1])
