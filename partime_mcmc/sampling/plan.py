"""From keys and starts to chains that are ready to be sampled: checks, warm-up, and the choice of dice."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax

from partime_mcmc.diagnostics.checks import (
    check_deterministic,
    check_precision,
    check_starts,
    looks_improper,
)
from partime_mcmc.kernels import Evidence, Kernel, Recorded
from partime_mcmc.kernels.dice import Dice
from partime_mcmc.sampling.chains import SHORT, advised, default_tolerance
from partime_mcmc.sampling.choose_coupling import fixed_dice, sooner
from partime_mcmc.kernels.kernel_program import Builder
from partime_mcmc.warmup.pooled import PooledAdaptation
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.local import Choice
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Adaptation, Warmup, warm_up
from partime_mcmc.schedule import Schedule
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.types import Key, PyTree

_PILOTS = 16


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """The arguments of `sample`, by its names and in their own types."""

    key: Key
    target: Target
    kernel: Kernel | Builder | Warmup
    num_samples: int
    num_chains: int
    num_warmup: int
    adaptation: Adaptation | None
    dice: Dice | None
    solver: Solver | None
    schedule: Schedule | None
    tolerance: Tolerance | None
    max_iterations: int | None
    max_bytes: int | None
    thinning: int
    certificate: Evidence = Recorded()


class Ready(NamedTuple):
    """Chains before their first step.

    Attributes:
        kernel: ParametrisedKernel.
        warmup: Behind it, if any.
        positions: One per chain, leaves `(C, ...)`.
        keys: One per chain, shape `(C,)`.
    """

    kernel: Kernel
    warmup: Warmup | None
    positions: PyTree
    keys: Key

    def choice(self, request: Request) -> Choice | None:
        """What asks for advice, if no solver was asked for."""
        pool = _starts(request, self.positions) if self.warmup is None else self.warmup.pool
        return advised(self.kernel, pool, request.schedule) if request.solver is None else None


def _starts(request: Request, positions: PyTree) -> PyTree:
    """Starts for pilot pairs, where no warm-up has draws for them: those of the chains, or more from where they come from."""
    if callable(request.target.initial) and request.num_chains < _PILOTS:
        return request.target.starts(
            jax.random.split(jax.random.fold_in(request.key, _PILOTS), _PILOTS)
        )
    return positions


def make_ready(request: Request, progress: Progress) -> Ready:
    """Warm up, and choose dice where nobody has.

    Args:
        request: What is asked for.
        progress: What to tell.
    """
    kernel, dice, num_chains = request.kernel, request.dice, request.num_chains
    start_key, warmup_key, chains_key = jax.random.split(request.key, 3)
    open_dice = (
        dice is None
        and request.solver is None
        and request.num_samples >= SHORT
        and not isinstance(kernel, (Kernel, Warmup))
    )
    kernel = kernel if dice is None else fixed_dice(kernel, dice)
    adaptation = PooledAdaptation() if request.adaptation is None else request.adaptation
    kernel, warmup, positions = prepare(
        start_key,
        warmup_key,
        request.target,
        kernel,
        num_chains,
        request.num_warmup,
        adaptation,
        progress,
    )
    if open_dice:
        dtype = jax.tree.leaves(positions)[0].dtype
        warmup = sooner(warmup, default_tolerance(kernel, dtype), jax.random.fold_in(warmup_key, 1))
        kernel = warmup.kernel
        progress.note(" ".join(warmup.notes))
    return Ready(kernel, warmup, positions, jax.random.split(chains_key, num_chains))


def prepare(
    start_key: Key,
    warmup_key: Key,
    target: Target,
    kernel: Kernel | Builder | Warmup,
    num_chains: int,
    num_warmup: int,
    adaptation: Adaptation,
    progress: Progress,
) -> tuple[Kernel, Warmup | None, PyTree]:
    """A tuned kernel, the warm-up behind it, and one position per chain, leaves `(C, ...)`.

    Args:
        start_key: For starts.
        warmup_key: For warm-up.
        target: What to sample.
        kernel: As for `sample`.
        num_chains: C.
        num_warmup: As for `sample`.
        adaptation: As for `sample`.
        progress: What to tell.
    """
    if isinstance(kernel, Warmup):
        have = jax.tree.leaves(kernel.positions)[0].shape[0]
        if have != num_chains:
            raise ValueError(
                f"num_chains: got {num_chains}, but the warm-up given as `kernel` has {have} chains"
            )
        return kernel.kernel, kernel, kernel.positions
    num_starts = (
        num_chains if isinstance(kernel, Kernel) else max(num_chains, adaptation.num_chains)
    )
    positions = target.starts(jax.random.split(start_key, num_starts))
    first = jax.tree.map(lambda leaf: leaf[0], positions)
    check_starts(target.logdensity, positions)
    check_deterministic(target.logdensity, first)
    check_precision(target.logdensity, first)
    if isinstance(kernel, Kernel):
        return kernel, None, positions
    with progress.stage("warm-up", num_warmup) as advance:
        warmup = warm_up(
            warmup_key, target.logdensity, kernel, positions, num_warmup, adaptation, advance
        )
    suspicion = looks_improper(positions, warmup.positions, warmup.settings.get("step_size", 1.0))
    if suspicion:
        progress.warn(suspicion)
    warmup = dataclasses.replace(
        warmup, positions=jax.tree.map(lambda leaf: leaf[:num_chains], warmup.positions)
    )
    progress.note(str(warmup))
    return warmup.kernel, warmup, warmup.positions
