"""Warm-up: from dispersed starts to a tuned kernel and one state per chain.

An `Adaptation` takes chains to the typical set and learns a metric from all of them; `tuning` then chooses step sizes
and paths for the kernel by trials, and the report says what was chosen, why, and what it cost. Two adaptations:

    PooledAdaptation   (`pooled`, the default) some hundred steps, chains pooled throughout, windows that can be solved
                       in parallel time
    WindowAdaptation   BlackJAX's Stan-like adaptation with NUTS in every chain, one step after another, then windows
    as above
"""

import dataclasses
import functools
import re
import time
from typing import Any, Callable, Protocol

import jax
import numpy as np
from jax.flatten_util import ravel_pytree
from threadpoolctl import ThreadpoolController

from partime_mcmc.compile_cache import compiler_options
from partime_mcmc.host_keys import fold_in, split_into
from partime_mcmc.kernels import Kernel, Whitening
from partime_mcmc.kernels.blackjax_without_backend import blackjax
from partime_mcmc.kernels.coordinates import Centring
from partime_mcmc.kernels.kernel_program import (
    Builder,
    KernelProgram,
    density_of,
    parametrised_kernel,
)
from partime_mcmc.kernels.metric_root import LowRank, is_diagonal
from partime_mcmc.types import Array, Key, PyTree
from partime_mcmc.warmup.hmc_batch import HMCBatch, SeedTree
from partime_mcmc.warmup.pooled import Pool, PooledAdaptation
from partime_mcmc.warmup.reparametrise import carry_over
from partime_mcmc.warmup.triangular_fit import first_maps, leave_map, split_maps
from partime_mcmc.warmup.tuning import (
    Path,
    TrajectoryRule,
    choose,
    own_trials,
    path_rule_of,
    target_of,
)

_NUM_POOL = 33
# What JAX says of loops, and of callbacks into Python.
_LACKS_GRADIENT = re.compile("[Rr]everse-mode|JVP|[Dd]ifferentiation rule")


class Adaptation(Protocol):
    """How chains find the typical set and a metric.

    Attributes:
        num_chains: Chains that it wants at least.
        target_acceptance: Mean acceptance that the kernel is tuned for; None is what suits it.
        path_length: Of HMC in whitened units; None is a quarter period.
    """

    @property
    def num_chains(self) -> int: ...

    @property
    def target_acceptance(self) -> float | None: ...

    @property
    def path_length(self) -> float | None: ...

    def __call__(
        self,
        walker: HMCBatch,
        key: Key,
        starts: np.ndarray,
        num_steps: int,
        path_rule: TrajectoryRule,
        advance: Callable[[int], None],
    ) -> tuple[Pool, Path]:
        """From starts `(C, D)` to a pool and the HMC path of its last window."""
        ...


@dataclasses.dataclass(frozen=True)
class Warmup:
    """What warm-up chose and what it cost.

    Attributes:
        kernel: The tuned kernel.
        positions: One position per chain to go on from, leaves `(C, ...)`.
        logdensity: There, shape `(C,)`.
        pool: Some of the draws of all chains, leaves `(K, ...)`: far-apart starts for pilot chains.
        settings: What was chosen for the builder: `step_size` and, for HMC, `num_integration_steps` and `drift_fraction`.
        whitening: The coordinates.
        acceptance: Mean acceptance probability in the trials of the chosen step size.
        target_acceptance: What was aimed at.
        num_steps: Transitions per chain.
        num_gradients: Gradients over all chains; trials included.
        depth: Gradients one after another.
        num_rescued: Chains that were lost and went on from another chain's state.
        seconds: Wall time, compilation included.
        notes: What a reader should know, in sentences.
        rhat: The largest split R-hat of all pooled chains in the last window, coordinates and log density.
        settled: Whether these chains agreed.
    """

    kernel: Kernel
    positions: PyTree
    logdensity: np.ndarray
    pool: PyTree
    settings: dict[str, Any]
    whitening: Whitening
    acceptance: float
    target_acceptance: float
    num_steps: int
    num_gradients: int
    depth: int
    num_rescued: int
    seconds: float
    notes: tuple[str, ...]
    rhat: float
    settled: bool

    def __str__(self) -> str:
        chosen = ", ".join(f"{name} {value:.3g}" for name, value in self.settings.items())
        root = self.whitening.scale
        if isinstance(root, LowRank):
            metric = f"a diagonal metric with {root.num_used} more directions"
        else:
            metric = "a diagonal metric" if is_diagonal(root) else "a dense metric"
        rescued = f"{self.num_rescued} chains rescued" if self.num_rescued else "no chain rescued"
        return " ".join(
            [
                f"Warm-up: {self.num_steps} steps per chain, {self.num_gradients:,} gradients in all, {self.depth:,} of them "
                f"one after another; {rescued}. Chosen for {self.kernel.name}: {chosen or 'nothing'}, {metric}; "
                f"accepted with probability {self.acceptance:.2f} in trials (wanted {self.target_acceptance:.2f}).",
                *self.notes,
            ]
        )


@functools.cache
def blas_libraries() -> ThreadpoolController:
    """Those that are loaded. Python's lock is taken once for each of hundreds of files: 20 ms, or most of a second while a
    thread is tracing."""
    return ThreadpoolController()


def _with_one_blas_thread(function: Callable) -> Callable:
    """The function with NumPy's and SciPy's linear algebra on one thread.

    Its matrices have some hundred rows: threads would wait for each other longer than they compute, up to 70 times as long
    where the other cores have other work, as they do while programs are compiled (D = 89, OpenBLAS).
    """

    @functools.wraps(function)
    def on_one_thread(*args, **kwargs):
        with blas_libraries().limit(limits=1, user_api="blas"):
            return function(*args, **kwargs)

    return on_one_thread


@_with_one_blas_thread
def warm_up(
    key: Key,
    logdensity: Callable[[PyTree], Array],
    builder: Builder,
    starts: PyTree,
    num_warmup: int,
    adaptation: Adaptation | None = None,
    advance: Callable[[int], None] = lambda steps: None,
    centring: Centring | None = None,
) -> Warmup:
    """Tune a kernel on a density.

    Args:
        key: One key.
        logdensity: `position -> scalar`.
        builder: `(logdensity, step_size, metric) -> Kernel`, such as `mala`, `hmc`, `nuts`, or a `functools.partial` of
            one. The metric it is given is a `Whitening`.
        starts: One position per chain, leaves `(C, ...)`, of finite density.
        num_warmup: Transitions per chain at most, at least 20.
        adaptation: None is `PooledAdaptation()`.
        advance: Called with the number of transitions done since the last call.
        centring: Of the target: its location-scale sites.

    Returns:
        The tuned kernel and where the chains are.
    """
    begin = time.perf_counter()
    adaptation = PooledAdaptation() if adaptation is None else adaptation
    # On the host: every small operation on arrays of a device is a program of its own.
    example = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf)[0], starts))
    density, data = density_of(logdensity, example)
    flat = _rows_of(starts)
    maps = first_maps(density, example, centring)
    walker = HMCBatch(density, data, example, len(flat), maps)
    target = (
        target_of(builder) if adaptation.target_acceptance is None else adaptation.target_acceptance
    )
    adapt_key, tune_key = split_into(key, 2)
    path_rule = path_rule_of(builder, target, adaptation.path_length)
    try:
        pool, path = adaptation(walker, adapt_key, flat, num_warmup, path_rule, advance)
    except (ValueError, NotImplementedError) as error:
        if _LACKS_GRADIENT.search(str(error)):
            raise ValueError(
                f"logdensity: got a function without a gradient in reverse mode; wanted one that JAX differentiates (models with "
                f"loops: forward_mode_differentiation=True). JAX says: {error}"
            ) from error
        raise
    whitening = Whitening.of_covariance(example, pool.center, pool.metric, walker.maps)
    triangular, recentred = split_maps(walker.maps)
    found = pool.draws if triangular is None else leave_map(triangular, pool.draws)
    if recentred:
        # As the model has it: every weight is 1.
        found = carry_over(recentred[0], maps[-1], found)
    family, draws = KernelProgram(density, builder), found.positions
    own = own_trials(family, data, whitening, draws, tune_key)
    settings, acceptance = choose(
        builder, path, pool.trials(walker, SeedTree.of(tune_key)), own, target
    )
    notes = [*pool.notes, *(told for one in walker.maps if (told := one.describe()))]
    if acceptance < target:
        notes.append(
            f"No step size reached the target acceptance {target:.2f}; the best reached {acceptance:.2f}."
        )
    return Warmup(
        parametrised_kernel(family, data, whitening, settings),
        _positions_of(draws[-1].astype(flat.dtype), example),
        found.logdensity[-1],
        _positions_of(_spread(draws).astype(flat.dtype), example),
        settings,
        whitening,
        acceptance,
        target,
        walker.num_steps,
        walker.num_gradients,
        walker.depth,
        pool.num_rescued,
        time.perf_counter() - begin,
        tuple(notes),
        pool.rhat,
        pool.settled,
    )


def _rows_of(positions: PyTree) -> np.ndarray:
    """Positions, leaves `(C, ...)`, as `(C, D)` on the host, where nothing is compiled."""
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(positions)]
    return np.concatenate([leaf.reshape(len(leaf), -1) for leaf in leaves], axis=1)


def _positions_of(rows: np.ndarray, example: PyTree) -> PyTree:
    """The positions whose numbers are in the rows `(C, D)`."""
    leaves, structure = jax.tree.flatten(example)
    cuts = np.cumsum([np.size(leaf) for leaf in leaves])[:-1]
    parts = zip(np.split(rows, cuts, axis=1), leaves)
    return jax.device_put(
        jax.tree.unflatten(
            structure, [part.reshape(len(rows), *np.shape(leaf)) for part, leaf in parts]
        )
    )


def _spread(draws: np.ndarray) -> np.ndarray:
    """Some of the draws `(S, C, D)` as `(K, D)`, neighbours from different chains: pilots pair neighbours, which must lie apart."""
    count = min(_NUM_POOL, draws.shape[0] * draws.shape[1])
    return draws[
        np.linspace(0, draws.shape[0] - 1, count).astype(int), np.arange(count) % draws.shape[1]
    ]


@dataclasses.dataclass(frozen=True)
class WindowAdaptation:
    """BlackJAX's window adaptation (NUTS, dense metric) in every chain, then pooled windows of HMC.

    A window adaptation alone leaves a poor dense metric on several regressions (step sizes five times smaller than
    need be), and it knows neither MALA nor paths; pooling and trials mend both.

    Attributes:
        num_chains: Chains at least.
        target_acceptance: None is what suits the kernel.
        path_length: None is a quarter period.

    Examples:
        >>> from partime_mcmc import WindowAdaptation
        >>> as_blackjax = WindowAdaptation(num_chains=8)
        >>> # draws = sample(key, target, hmc, num_samples=1000, adaptation=as_blackjax)
        >>> as_blackjax.num_chains
        8
    """

    num_chains: int = 1
    target_acceptance: float | None = None
    path_length: float | None = None

    def __call__(
        self,
        walker: HMCBatch,
        key: Key,
        starts: np.ndarray,
        num_steps: int,
        path_rule: TrajectoryRule,
        advance: Callable[[int], None],
    ) -> tuple[Pool, Path]:
        """From starts `(C, D)` to a pool and the HMC path of its last window."""
        first = max(20, num_steps // 2)
        last, metric, num_gradients = _adapt(walker, starts, fold_in(key, 0), first)
        walker.num_gradients += num_gradients
        walker.depth += num_gradients // len(starts)
        walker.num_steps += first
        advance(first)
        pooled = PooledAdaptation(self.num_chains, self.target_acceptance, self.path_length)
        return pooled.from_typical(
            walker, fold_in(key, 1), last, metric, num_steps - first, path_rule, advance
        )


def _adapt(
    walker: HMCBatch, starts: np.ndarray, key: Key, num_steps: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """BlackJAX's window adaptation in every chain: last positions, the chains' mean metric, gradients spent."""
    unravel = ravel_pytree(walker.example)[1]

    @functools.partial(jax.jit, compiler_options=compiler_options())
    def run(params, starts, keys):
        adaptation: Any = blackjax.window_adaptation(
            blackjax.nuts,
            lambda flat: walker.density(params, unravel(flat)),
            is_mass_matrix_diagonal=False,
            adaptation_info_fn=lambda state, info, _: info.num_integration_steps,
        )
        return jax.vmap(lambda key, start: adaptation.run(key, start, num_steps))(keys, starts)

    (state, tuned), steps = run(walker.params, starts, jax.random.split(key, len(starts)))
    return (
        np.asarray(state.position),
        np.asarray(tuned["inverse_mass_matrix"], float).mean(axis=0),
        int(np.sum(steps)),
    )
