"""Programs of a run over many devices and hosts: segments of one chain on different devices, chains beside each other.

Under `jax.shard_map` each device draws the random numbers of its own steps, rolls its own segments, certifies its own shard
from the state that its neighbour ends with, and puts its own draws into the user's space.

    DrawTapes     the random numbers of steps [first, first + n P), every device its own n
    SolveWindow   one window of all chains
    FinishChains  chains that did not converge, rolled by one device after another from where they stop being exact
    Certify       certificate of every shard, records, positions; rejected steps stand still to the last bit

Step t of a chain has the key that it has on one device, so the draws are the same to rounding, and the same bits where
steps do not round by batch width (coalescing MALA). Left out: kernels whose counters follow from stepping only.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree
from jax.sharding import Mesh, PartitionSpec

from partime_mcmc.certify.independent import certify_with_records
from partime_mcmc.certify.step_record import info_dict
from partime_mcmc.distributed.mesh import solution_specs
from partime_mcmc.engine.adjoint import NoDerivatives
from partime_mcmc.engine.solution import Solution
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.time_axis import TimeAxis
from partime_mcmc.kernels.kernel import Carry
from partime_mcmc.sampling.randomness import step_keys
from partime_mcmc.scan.affine import Diagonal
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.sequential import finish_sequentially
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, PyTree

CHAINS, SAME = PartitionSpec("chains"), PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a window lies on the mesh.

    Attributes:
        mesh: The devices.
        axis: The time axis.
        steps: Steps per device.
        along: Where paths `(C, T, ...)` lie.
    """

    mesh: Mesh
    axis: TimeAxis
    steps: int
    along: PartitionSpec

    @property
    def length(self) -> int:
        """Steps in all."""
        return self.axis.length(self.steps)

    def run(self, function, given, found):
        """A function of what each device holds, as a function of whole arrays."""
        return jax.shard_map(
            function, mesh=self.mesh, in_specs=given, out_specs=found, check_vma=False
        )


class DrawTapes(HashableFunction):
    """The tape of a window, and the counters after it; parts are the program, a layout, the keys' kind, and what `step_keys`
    wants to know of T."""

    def __call__(self, params, words, carries, counters, first):
        program, layout, kind, total = self.parts

        def here(params, words, carries, counters, first):
            kernel, places = program.kernel(params), layout.axis.index(layout.steps)

            def one(word, carry, counters):
                key = jax.random.wrap_key_data(word, impl=kind)
                keys = step_keys(key, first + places.astype(jnp.uint32), total)
                tape = kernel.tape_of(keys, kernel.state(carry, counters))
                if not counters:
                    return tape, counters
                every = kernel.algorithm.count(counters, layout.length + 1)
                mine = jax.tree.map(lambda leaf: leaf[places], every)
                return dataclasses.replace(tape, discrete=mine), jax.tree.map(
                    lambda leaf: leaf[-1], every
                )

            return jax.vmap(one)(words, carries, counters)

        given = (SAME, CHAINS, CHAINS, CHAINS, SAME)
        return layout.run(here, given, (layout.along, CHAINS))(
            params, words, carries, counters, first
        )


class SolveWindow(HashableFunction):
    """One window of every chain; parts are the program, a layout and `max_iterations`."""

    def __call__(self, solver: Solver, tolerance, params, carries, tape) -> Solution:
        program, layout, max_iterations = self.parts

        def here(params, carries, tape):
            dynamics = program.kernel(params).dynamics()
            return jax.vmap(
                lambda first, drives: solve(
                    dynamics,
                    first,
                    drives,
                    solver=solver,
                    tolerance=tolerance,
                    max_iterations=max_iterations,
                    adjoint=NoDerivatives(),
                    axis=layout.axis,
                )
            )(carries, tape)

        found = solution_specs(layout.along, CHAINS)
        return layout.run(here, (SAME, CHAINS, layout.along), found)(params, carries, tape)


class FinishChains(HashableFunction):
    """Paths rolled by one device after another from where they stop being exact, and how many steps are then finite;
    the parts are the program and a layout."""

    def __call__(self, params, carries, tape, states, num_exact):
        program, layout = self.parts

        def here(params, carries, tape, states, num_exact):
            dynamics, axis = program.kernel(params).dynamics(), layout.axis
            exact = jnp.clip(num_exact - axis.index(layout.steps)[0], 0, layout.steps)

            def roll(first):
                return _swapped(finish_sequentially(dynamics, first, states, tape, exact))

            states = _swapped(axis.in_turn(roll, carries))
            finite = [
                jnp.isfinite(leaf).reshape(*leaf.shape[:2], -1).all(axis=2)
                for leaf in jax.tree.leaves(states)
            ]
            return states, jax.vmap(axis.length_of_true)(functools.reduce(jnp.logical_and, finite))

        given = (SAME, CHAINS, layout.along, layout.along, CHAINS)
        return layout.run(here, given, (layout.along, CHAINS))(
            params, carries, tape, states, num_exact
        )


class Certify(HashableFunction):
    """Certificates of all parts `(C, P)`, what the kernel says of each step, and the path standing still where its
    kernel does.

    The parts are the program and a layout. Returns certificates (with `accepted` and `residual` of every step), the
    lengths of the runs without movement with which each part begins and ends, records, the path, positions, the
    carries at the end, and whether standing still changed nothing.
    """

    def __call__(self, params, carries, states, tape):
        program, layout = self.parts

        def here(params, carries, states, tape):
            kernel = program.kernel(params)
            return jax.vmap(functools.partial(_certified_shard, kernel, layout.axis))(
                carries, states, tape
            )

        steps, parts = layout.along, layout.along
        found = (steps, parts, steps, steps, steps, CHAINS, parts)
        return layout.run(here, (SAME, CHAINS, layout.along, layout.along), found)(
            params, carries, states, tape
        )


def _certified_shard(kernel, axis: TimeAxis, carry: PyTree, states: PyTree, tape: PyTree):
    before = axis.previous(carry, states)
    first = jax.tree.map(lambda leaf: leaf[0], before)
    flatten = jax.vmap(lambda one: ravel_pytree(one)[0])
    flat = flatten(states)
    unit = kernel.noise_scale if kernel.noise_scale is not None else _spread(flat, axis)
    certificate, records = certify_with_records(kernel, first, states, tape, scale=unit)
    position = lambda one: one.position if isinstance(one, Carry) else one
    moved = (flatten(position(states)) != flatten(position(before))).any(
        axis=1
    ) & certificate.accepted
    # Where its kernel stands still the path takes the last state that moved, which may be on another device: a scan of maps
    # x -> x and x -> state, exact because every product is with 0 or 1.
    held = jnp.asarray(records.held)[:, None]
    flat_carry, unravel = ravel_pytree(carry)
    still = axis.prefix(Diagonal(held.astype(flat.dtype), jnp.where(held, 0, flat)), flat_carry)
    same = ((still == flat) | ~jnp.isfinite(flat)).all()
    still = jax.vmap(unravel)(still)
    runs = jnp.stack([_leading(~moved), _leading(~moved[::-1])])
    of_steps = {"accepted": certificate.accepted, "residual": certificate.residual}
    of_part = {
        field.name: getattr(certificate, field.name)
        for field in dataclasses.fields(certificate)
        if field.name not in of_steps
    }
    of_part = jax.tree.map(lambda leaf: leaf[None], {**of_part, "runs": runs})
    positions, end = jax.vmap(kernel.position)(still), axis.last(still)
    return of_steps, of_part, info_dict(records, flat.shape[:1]), still, positions, end, same[None]


def _swapped(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)


def _leading(flags: Array) -> Array:
    return jnp.sum(jnp.cumprod(flags.astype(jnp.int32)))


def _spread(flat: Array, axis: TimeAxis) -> Array:
    """Standard deviation of each coordinate over the whole window; 1 where it does not move."""
    count = axis.length(flat.shape[0])
    center = axis.total(flat) / count
    spread = jnp.sqrt(axis.total((flat - center) ** 2) / count)
    return jnp.where(jnp.isfinite(spread) & (spread > 0), spread, 1)
