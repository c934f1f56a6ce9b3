"""How a window of warm-up is run: all chains side by side, or parallel in time as well.

Step size, path and metric are frozen within a window, so its chains are recurrences of fixed dice, x_t = f(x_{t-1},
u_t), and can be solved by shooting like any others: the depth of a window of n steps falls from n to a segment and the
time two paths need to meet, 32 + m steps, whatever n. All pieces of all windows are one compiled program: path
lengths, step sizes and metrics are arguments.

On a few CPU cores eight chains side by side fill the lanes, a window takes milliseconds, and compiling one more
program would cost more than all windows together: there `side_by_side` is the default. Where thousands of lanes are
free, `in_parallel_time` is.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from partime_mcmc.engine.dynamics import CachedStep, Dynamics
from partime_mcmc.engine.recipes import shooting
from partime_mcmc.engine.solution import Status, Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.kernels.coupling import normal_of
from partime_mcmc.warmup.trajectory_length import Path
from partime_mcmc.compile_cache import Timings, run_program
from partime_mcmc.warmup.host_rng import SeedTree
from partime_mcmc.warmup.hmc_batch import STEPS, HMCBatchResult, HMCBatch, max_batch_steps
from partime_mcmc.tracing import HashableFunction

_PIECE, _SEGMENT = 128, 32
# Adaptation asks for less than sampling: a millionth of the width of a posterior.
_TOLERANCE = 1e-6


def side_by_side(
    walker: HMCBatch, seed: SeedTree, positions: np.ndarray, root: np.ndarray, path: Path, size: int
) -> HMCBatchResult:
    """A window with all chains side by side, in as few calls as memory lets it be.

    Args:
        walker: The program for trajectories.
        seed: Of the dice.
        positions: Where the chains are, `(C, D)`.
        root: Of the metric.
        path: Step size and leapfrog steps.
        size: Steps; what is more than a multiple of 16 is left out.
    """
    pieces, longest, size = [], max_batch_steps(positions.size), max(1, size // STEPS) * STEPS
    for start in range(0, size, longest):
        found = walker.walk(
            seed.child(start),
            positions,
            root,
            path.step_size,
            path.num_steps,
            size=min(longest, size - start),
        )
        pieces.append(found)
        positions = found.positions[-1]
    return HMCBatchResult(
        *(np.concatenate(parts) for parts in list(zip(*pieces))[:4]), pieces[-1].step_sizes
    )


def in_parallel_time(
    walker: HMCBatch, seed: SeedTree, positions: np.ndarray, root: np.ndarray, path: Path, size: int
) -> HMCBatchResult:
    """A window solved in parallel time, 128 steps a piece; short ones, and pieces that do not forget, side by side.

    Args and result as for `side_by_side`.
    """
    if size < _PIECE:
        return side_by_side(walker, seed, positions, root, path, size)
    dtype, pieces = walker.dtype, []
    numbers = (
        walker.params,
        walker.example,
        jnp.asarray(root, dtype),
        jnp.asarray(path.step_size, dtype),
        jnp.asarray(path.num_steps, jnp.int32),
    )
    for number in range(size // _PIECE):
        one = seed.child(number)
        found, depth, status, evaluations = run_program(
            _Piece(walker.density),
            numbers,
            jnp.asarray(positions, dtype),
            one.key,
            timings=Timings(),
        )
        if (np.asarray(status) != Status.CONVERGED).any():
            pieces.append(side_by_side(walker, one, positions, root, path, _PIECE))
        else:
            pieces.append(
                HMCBatchResult(
                    *(np.asarray(part) for part in found), np.full(len(positions), path.step_size)
                )
            )
            walker.num_steps += _PIECE
            walker.depth += int(np.max(depth)) * path.num_steps
            walker.num_gradients += int(np.sum(evaluations) * _PIECE * path.num_steps)
        positions = pieces[-1].positions[-1]
    return HMCBatchResult(
        *(np.concatenate(parts) for parts in list(zip(*pieces))[:4]), pieces[-1].step_sizes
    )


class _Piece(HashableFunction):
    """All chains over one piece: positions, gradients, log densities and acceptance, then depth, status and work."""

    def __call__(self, numbers, positions, key):
        (density,) = self.parts
        num_chains, dimension = positions.shape
        drives = jax.random.uniform(key, (num_chains, _PIECE, dimension + 1), positions.dtype)
        parts = [_Hamiltonian(density, name) for name in ("enter", "advance", "leave")]
        dynamics = Dynamics(
            _Hamiltonian(density, "step"), numbers, CachedStep(*parts, (numbers,) * 3)
        )
        found = jax.vmap(
            lambda first, drive: solve(
                dynamics,
                first,
                drive,
                solver=shooting(steps=_SEGMENT),
                tolerance=Tolerance(_TOLERANCE, _TOLERANCE),
            )
        )(positions, drives)
        before = jnp.concatenate([positions[:, None], found.states[:, :-1]], axis=1)
        move = jax.vmap(jax.vmap(functools.partial(_move, density, numbers)))
        evaluate = jax.vmap(jax.vmap(functools.partial(_evaluate, density, numbers)))
        rate = move(evaluate(before), drives)[1]
        x, value, gradient = evaluate(found.states)
        across = [jnp.swapaxes(leaf, 0, 1) for leaf in (x, gradient, value, rate)]
        return across, found.stats.depth, found.status, found.stats.evaluations


class _Hamiltonian(HashableFunction):
    """One HMC transition as a recurrence on flat positions, driven by D + 1 uniforms; parts: the density, a name."""

    def __call__(self, numbers, *args):
        density, name = self.parts
        if name == "enter":
            return _evaluate(density, numbers, args[0])
        if name == "advance":
            return _move(density, numbers, *args)[0]
        if name == "leave":
            return args[0][0]
        return _move(density, numbers, _evaluate(density, numbers, args[0]), args[1])[0][0]


def _evaluate(density, numbers, x):
    params, example = numbers[:2]
    unravel = ravel_pytree(example)[1]
    return x, *jax.value_and_grad(lambda flat: density(params, unravel(flat)))(x)


def _move(density, numbers, state, uniforms):
    """The next state and the acceptance probability."""
    _, _, root, step, num_steps = numbers
    momentum = normal_of(uniforms[1:])

    def leap(_, moving):
        x, _, gradient, p = moving
        half = p + 0.5 * step * (root * gradient if root.ndim == 1 else root.T @ gradient)
        ended = _evaluate(
            density, numbers, x + step * (root * half if root.ndim == 1 else root @ half)
        )
        return *ended, half + 0.5 * step * (
            root * ended[2] if root.ndim == 1 else root.T @ ended[2]
        )

    *end, last = lax.fori_loop(0, num_steps, leap, (*state, momentum))
    fall = 0.5 * jnp.sum(momentum**2) - state[1] - 0.5 * jnp.sum(last**2) + end[1]
    usable = jnp.isfinite(fall) & jnp.isfinite(end[2]).all()
    rate = jnp.where(usable, jnp.exp(jnp.minimum(fall, 0)), 0)
    return tuple(jnp.where(uniforms[0] < rate, new, old) for new, old in zip(end, state)), rate


def default_window():
    """Side by side on a CPU, where chains fill the lanes; parallel in time elsewhere."""
    return side_by_side if jax.default_backend() == "cpu" else in_parallel_time
