"""Plain HMC for warm-up: one program for searching, for windows and for trials.

Chains move on flat positions x with a centre and a root R of the metric, Σ = R Rᵀ, and momenta p ~ N(0, I):

    p ← p + (h/2) Rᵀ∇log p(x),   x ← x + f h R p,   p ← p + (h/2) Rᵀ∇log p(x),        L times,

(`kernels.leapfrog`), accepted with probability min(1, exp(−ΔH)),
H = −log p(x) + |p|²/2: leapfrog in whitened coordinates without ever leaving x, so that a new metric changes numbers only.
Step sizes, lengths, the metric and the model's data are arguments. A trial is the same program with a fresh start in every
step, so that warm-up compiles nothing else. After each step log h grows by `gain · (acceptance − target)`; a gain of 0 keeps
it, as exact chains need.
"""

import functools
from typing import Callable, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree

from partime_mcmc.compile_cache import Timings, compiler_options, run_program
from partime_mcmc.kernels.coordinates import CoordinateMap, density_through
from partime_mcmc.kernels.coupling import normal_of
from partime_mcmc.kernels.metric_root import Root, times, transposed_times
from partime_mcmc.kernels.traced_gradient import unoptimised_seconds
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, ArrayLike, Key, PyTree


class SeedTree(NamedTuple):
    """A node.

    Attributes:
        root: The words of the key that the tree grows from.
        path: Which child of which child.
    """

    root: tuple[int, ...]
    path: tuple[int, ...] = ()

    @classmethod
    def of(cls, key: Key) -> Self:
        """The root of the tree of a key."""
        return cls(tuple(np.ravel(jax.random.key_data(key)).tolist()))

    def child(self, number: int) -> Self:
        """A node below, for each number from 0 on another."""
        return self._replace(path=(*self.path, number))

    @property
    def words(self) -> np.ndarray:
        """Of a key of JAX's own, shape `(2,)`, for `key_from` inside a program."""
        return np.random.SeedSequence(self.root, spawn_key=self.path).generate_state(2)

    @property
    def key(self) -> Key:
        """As a key."""
        return key_from(jax.numpy.asarray(self.words))

    @property
    def generator(self) -> np.random.Generator:
        """For random numbers on the host."""
        return np.random.default_rng(np.random.SeedSequence(self.root, spawn_key=self.path))


def key_from(words: Array) -> Key:
    """The key of a seed's words."""
    return jax.random.wrap_key_data(words, impl="threefry2x32")


STEPS = 16
"""Transitions in a row: the searching phase looks at its chains that often, and windows are multiples of it."""
# What one call makes at most: so many transitions, and so many numbers in their positions.
_LONGEST, _MOST_NUMBERS = 256, 2**20
# What a warm-up takes: by it the compiler is told how hard to try.
_USUAL_GRADIENTS = 40_000


def max_batch_steps(numbers: int) -> int:
    """Transitions that one call can make, a multiple of 16, where the states of all chains are so many numbers."""
    return STEPS * max(1, min(_LONGEST // STEPS, _MOST_NUMBERS // (STEPS * numbers)))


class HMCBatchResult(NamedTuple):
    """What a call returns; leading axes are steps S and chains C.

    Attributes:
        positions: Shape `(S, C, D)`.
        gradients: Of the log density there, `(S, C, D)`.
        logdensity: `(S, C)`.
        acceptance: Acceptance probabilities, `(S, C)`.
        step_sizes: After the last step, `(C,)`.
    """

    positions: np.ndarray
    gradients: np.ndarray
    logdensity: np.ndarray
    acceptance: np.ndarray
    step_sizes: np.ndarray

    def is_finite(self) -> bool:
        """Whether all positions and gradients are."""
        return bool(np.isfinite(self.positions).all() and np.isfinite(self.gradients).all())


class _Walk(HashableFunction):
    """Transitions of all chains; parts are the density and the longest batch."""

    def __call__(self, *numbers):
        return _walk(*self.parts, *numbers)


def _walk(
    density: Callable,
    longest: int,
    params: PyTree,
    example: PyTree,
    root: Root,
    starts: Array,
    fresh: Array,
    step_sizes: Array,
    lengths: Array,
    drift_fraction: Array,
    gain: Array,
    target: Array,
    words: Array,
    num_pieces: Array,
):
    unravel = ravel_pytree(example)[1]
    evaluate = jax.vmap(jax.value_and_grad(lambda x: density(params, unravel(x))))
    num_chains, dimension = starts.shape[1:]

    def energy(value, momentum):
        return 0.5 * jnp.sum(momentum**2, axis=1) - value

    def transition(carry, drive):
        state, log_steps = carry
        index, start, length, uniform, momentum = drive
        # One place for the density at a start: every copy of a gradient is compiled.
        state = lax.cond(fresh | (index == 0), lambda: (start, *evaluate(start)), lambda: state)
        step = jnp.exp(log_steps)[:, None]

        def leap(index, moving):
            x, value, gradient, p = moving
            half = p + 0.5 * step * transposed_times(root, gradient)
            new = x + drift_fraction * step * times(root, half)
            new_value, new_gradient = evaluate(new)
            ended = (
                new,
                new_value,
                new_gradient,
                half + 0.5 * step * transposed_times(root, new_gradient),
            )
            going = index < length
            return tuple(
                jnp.where(going.reshape(-1, *(1,) * (a.ndim - 1)), a, b)
                for a, b in zip(ended, moving)
            )

        *end, last = lax.fori_loop(0, jnp.max(length), leap, (*state, momentum))
        fall = energy(state[1], momentum) - energy(end[1], last)
        usable = jnp.isfinite(fall) & jnp.isfinite(end[2]).all(axis=1)
        rate = jnp.where(usable, jnp.exp(jnp.minimum(fall, 0)), 0)
        accepted = uniform < rate
        state = tuple(
            jnp.where(accepted.reshape(-1, *(1,) * (a.ndim - 1)), a, b) for a, b in zip(end, state)
        )
        log_steps = log_steps + gain * (rate - target)
        return (state, log_steps), (*state, rate)

    def piece(number, walked):
        carry, buffers = walked
        # All random numbers of a batch at once: to start the generator costs as much as a transition.
        key = jax.random.fold_in(key_from(words), number)
        uniforms = jax.random.uniform(key, (STEPS, num_chains, dimension + 1), starts.dtype)
        index = number * STEPS + jnp.arange(STEPS)
        drives = index, starts, lengths, uniforms[..., 0], normal_of(uniforms[..., 1:])
        carry, found = lax.scan(transition, carry, drives)
        write = functools.partial(
            lax.dynamic_update_slice_in_dim, start_index=number * STEPS, axis=0
        )
        return carry, jax.tree.map(write, buffers, found)

    nothing = jnp.zeros(num_chains, starts.dtype)
    first, shapes = (starts[0], nothing, starts[0]), (starts[0], nothing, starts[0], nothing)
    buffers = jax.tree.map(lambda leaf: jnp.zeros((longest, *leaf.shape), leaf.dtype), shapes)
    # The number of pieces is no part of the program: one serves searching, trials, and windows of all sizes.
    (_, log_steps), (x, value, gradient, rate) = lax.fori_loop(
        0, num_pieces, piece, ((first, jnp.log(step_sizes)), buffers)
    )
    return x, gradient, value, rate, jnp.exp(log_steps)


class _Mapped(HashableFunction):
    """A density of coordinates: of the position that maps make of them, with the log Jacobian."""

    def __call__(self, params, coordinates):
        data, maps = params
        flat, unravel = ravel_pytree(coordinates)
        return density_through(maps, lambda x: self.parts[0](data, unravel(x)), flat)


def usual_seconds(density: Callable, dimension: int) -> float:
    """How long the gradients of a usual warm-up take in programs that were not optimised; infinite where that is not known."""
    return unoptimised_seconds(density, dimension, _USUAL_GRADIENTS)


class HMCBatch:
    """The program for one density, with its books.

    Args:
        density: `(params, position) -> log density`; compared by identity or equality for compiled code.
        data: Its first argument.
        example: A position.
        num_chains: C.
        maps: From the coordinates in which chains move to positions. They may change between calls; their weights alone
            do so without a new program.
    """

    def __init__(
        self,
        density: Callable,
        data: PyTree,
        example: PyTree,
        num_chains: int,
        maps: tuple[CoordinateMap, ...] = (),
    ):
        self._density = density
        self.data, self.example, self.num_chains, self.maps = data, example, num_chains, maps
        flat = jax.eval_shape(lambda tree: ravel_pytree(tree)[0], example)
        self.dimension, self.dtype = flat.size, flat.dtype
        self.longest = max_batch_steps(num_chains * self.dimension)
        self.num_gradients = self.depth = self.num_steps = 0
        self._options = compiler_options(usual_seconds(density, self.dimension))

    @property
    def density(self) -> Callable:
        """`(params, coordinates) -> log density`, in the coordinates in which chains move."""
        return _Mapped(self._density) if self.maps else self._density

    @property
    def params(self) -> PyTree:
        """What the density takes first."""
        return (self.data, self.maps) if self.maps else self.data

    def walk(
        self,
        seed: SeedTree,
        starts: np.ndarray,
        root: Root,
        step_sizes: ArrayLike,
        lengths: ArrayLike,
        drift_fraction: float = 1.0,
        *,
        size: int = STEPS,
        gain: float = 0.0,
        target: float = 0.8,
    ) -> HMCBatchResult:
        """S transitions of every chain.

        Args:
            seed: Of the random numbers.
            starts: Shape `(C, D)`, where chains go on from; or `(16, C, D)`: each of 16 steps is a
                trial from its own start.
            root: Of the metric.
            step_sizes: h, `(C,)` or scalar.
            lengths: Gradients per trajectory, `(16, C)`, the same in every 16 steps, or scalar.
            drift_fraction: f.
            size: S, a multiple of 16, at most `max_batch_steps(C D)`.
            gain: How fast log step sizes follow the acceptance.
            target: The acceptance that they follow.
        """
        fresh = starts.ndim == 3
        leapfrogs = np.broadcast_to(np.asarray(lengths, np.int32), (STEPS, self.num_chains))
        starts = np.broadcast_to(
            np.asarray(starts, self.dtype), (STEPS, self.num_chains, self.dimension)
        )
        sizes = np.broadcast_to(np.asarray(step_sizes, self.dtype), (self.num_chains,))
        if size > self.longest:
            raise ValueError(f"size: got {size}, wanted at most {self.longest} transitions a call")
        found = run_program(
            _Walk(self.density, self.longest),
            self.params,
            self.example,
            jax.tree.map(lambda leaf: np.asarray(leaf, self.dtype), root),
            starts,
            np.asarray(fresh),
            sizes,
            leapfrogs,
            np.asarray(drift_fraction, self.dtype),
            np.asarray(gain, self.dtype),
            np.asarray(target, self.dtype),
            seed.words,
            np.int32(size // STEPS),
            timings=Timings(),
            options=self._options,
        )
        self.num_gradients += size // STEPS * int(leapfrogs.sum()) + self.num_chains * (
            STEPS + 1 if fresh else 1
        )
        self.depth += size // STEPS * int(leapfrogs.max(axis=1).sum())
        self.num_steps += 0 if fresh else size
        *paths, last_sizes = (np.asarray(part) for part in found)
        return HMCBatchResult(*(path[:size] for path in paths), step_sizes=last_sizes)
