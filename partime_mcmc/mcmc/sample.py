"""Sampling: starts, warm-up, dice, the solve stretch by stretch, the certificate.

    draws = sample(key, target, hmc, num_samples=4096)

All chains are solved together (`vmap`), time in stretches, so that progress can be shown and memory stays bounded. A
chain that a solver cannot finish within its bound is finished sequentially with the same dice, and the report says so:
the result is always the exact chain, slower at worst. Data travel as arguments, so compilation does not grow with them.

The dice: `key` is split into keys for starts, warm-up and chains; chain c has `jax.random.split(chains_key, C)[c]`,
and its step t has `jax.random.split(chain_key, T)[t]`, as a user of BlackJAX would write it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.diagnostics.checks import (check_count, check_deterministic, check_key, check_precision, check_starts,
                                             looks_improper)
from partime_mcmc.kernels import Kernel
from partime_mcmc.kernels.dice import Dice
from partime_mcmc.mcmc.arguments import check_memory, check_strategies, chosen_progress
from partime_mcmc.mcmc.dice import dice_of, fixed_dice, sooner
from partime_mcmc.mcmc.draws import Draws
from partime_mcmc.mcmc.family import Builder
from partime_mcmc.mcmc.finish import finish
from partime_mcmc.mcmc.pooled import PooledAdaptation
from partime_mcmc.mcmc.progress import Progress, quiet
from partime_mcmc.mcmc.run import Choice, run_chains, throw
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Adaptation, Warmup, warm_up
from partime_mcmc.predict.advise import Advice, advise
from partime_mcmc.recipes import sequential, shooting
from partime_mcmc.schedule import Schedule, Stretches
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.shooting import device_lanes
from partime_mcmc.types import Key, PyTree

DEFAULT_STRETCH = 16384
# Runs too short to be worth pilots.
_SHORT = 1024
_HARDLY = 0.98
# Segments shorter than this meet too late to be worth their start.
_SHORTEST = 64


def sample(key: Key, target: Target, kernel: Kernel | Builder | Warmup, *, num_samples: int, num_chains: int = 4,
           num_warmup: int = 1000, adaptation: Adaptation | None = None, dice: Dice | None = None,
           solver: Solver | None = None, schedule: Schedule | None = None,
           tolerance: Tolerance | None = None, max_iterations: int | None = None, max_bytes: int | None = None,
           progress: Progress | bool = True) -> Draws:
    """Sample a target with exact chains, parallel over time.

    Args:
        key: One key, typed or legacy.
        target: What to sample.
        kernel: A tuned `Kernel` of the target's density (it is the kernel's own density that is sampled;
            chains start at the target's starts, no warm-up), the warm-up of another run (chains
            start where it ended), or a builder such as `hmc`, `mala`, `nuts`, which warm-up tunes.
        num_samples: Draws per chain, T ≥ 0.
        num_chains: Chains, C ≥ 1.
        num_warmup: Warm-up steps per chain at most, at least 20, for a builder; ignored where the kernel comes tuned.
        dice: For a builder, how its noise is drawn: `PlainDice()` gives BlackJAX's own draws bit for bit, `CoalescingDice()` the
            same law with a shorter memory. None: in runs of 1,024 draws or more that choose their own solver, the dice with which
            pilot pairs meet sooner, and the warm-up's notes say so; plain ones otherwise.
        adaptation: How a builder's chains find the typical set and a metric; None is `PooledAdaptation()`.
        solver: A recipe; None asks `advise`: pilot chains from the warm-up's draws say whether these chains forget, a
            cost model how many segments pay; chains that do not forget are run sequentially, and `draws.advice` says
            why.
        schedule: How time is cut; None follows the advice, or takes stretches of 16,384 steps.
        tolerance: How small residuals must be; None is `default_tolerance(...)`.
        max_iterations: Passes per stretch before a chain is finished sequentially; None is the stated default.
        max_bytes: Memory that the run may take; None is most of the device's. Checked before anything is allocated.
        progress: True shows one line per stage on a terminal; or `quiet`, `progress_line`, or your own.

    Returns:
        The draws, certified.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that cannot work, or a start has no finite density or gradient.
    """
    if isinstance(key, jax.core.Tracer):
        raise TypeError("key: got a traced value; call sample outside jit and vmap (it compiles what it needs itself)")
    key, progress = check_key(key), chosen_progress(progress)
    check_strategies(target, kernel, solver, schedule, tolerance, max_iterations)
    num_samples, num_chains = check_count(num_samples, "num_samples", 0), check_count(num_chains, "num_chains", 1)
    check_count(num_warmup, "num_warmup", 20 if not isinstance(kernel, (Kernel, Warmup)) else 0)
    start_key, warmup_key, chains_key = jax.random.split(key, 3)
    open_dice = dice is None and solver is None and num_samples >= _SHORT and not isinstance(kernel, (Kernel, Warmup))
    kernel = kernel if dice is None else fixed_dice(kernel, dice)
    adaptation = PooledAdaptation() if adaptation is None else adaptation
    kernel, warmup, positions = prepare(start_key, warmup_key, target, kernel, num_chains, num_warmup, adaptation, progress)
    leaves = jax.tree.leaves(positions)
    if open_dice:
        warmup = sooner(warmup, default_tolerance(kernel, leaves[0].dtype), jax.random.fold_in(warmup_key, 1))
        kernel = warmup.kernel
        progress.note(" ".join(warmup.notes))
    check_memory(solver or sequential(), getattr(schedule or Stretches(DEFAULT_STRETCH), "size", num_samples),
                 num_samples, num_chains,
                 sum(leaf[0].size for leaf in leaves), leaves[0].dtype.itemsize, max_bytes)
    pool = positions if warmup is None else warmup.pool
    choose = functools.partial(_advised, kernel, pool, schedule) if solver is None else None
    draws = draw_chains(target, kernel, positions, jax.random.split(chains_key, num_chains), num_samples, warmup=warmup,
                        solver=solver, schedule=schedule, tolerance=tolerance, max_iterations=max_iterations, choose=choose,
                        plan={"num_warmup": warmup.num_steps if warmup else 0,
                              "key": [int(word) for word in np.ravel(jax.random.key_data(key))]}, progress=progress)
    if draws.advice is not None:
        progress.note(str(draws.advice))
    progress.note(_sentence(draws))
    trouble = _hardly_moves(draws)
    if trouble:
        progress.warn(trouble)
    return draws


def _hardly_moves(draws: Draws) -> str | None:
    """What to say of chains that accept next to nothing: they are exact, and useless."""
    rejected, steps = np.asarray(draws.certificate.num_rejected), draws.plan["num_samples"]
    few = (rejected >= 0) & (rejected > _HARDLY * steps)
    if steps < 50 or not few.any():
        return None
    return (f"chains {np.flatnonzero(few).tolist()} accepted less than 2% of their proposals "
            f"({int(np.asarray(draws.certificate.num_nonfinite_proposals)[few].sum())} of which were out of range): the "
            "draws are exact and say little; look for an improper posterior, a bad start or a step size that is too large")


def draw_chains(target: Target, kernel: Kernel, positions: PyTree, keys: Key, num_samples: int, *, warmup: Warmup | None,
                solver: Solver | None = None, schedule: Schedule | None = None, tolerance: Tolerance | None = None,
                max_iterations: int | None = None, choose: Choice | None = None, plan: dict[str, Any] | None = None,
                skip: int = 0, carries: PyTree = None, progress: Progress = quiet) -> Draws:
    """Chains of a tuned kernel, certified.

    Args:
        target: For the model's own space.
        kernel: The kernel.
        positions: One per chain, leaves `(C, ...)`.
        keys: One per chain, shape `(C,)`.
        num_samples: T.
        warmup: The warm-up before them, if any.
        solver: A recipe; None is shooting with as many segments as fill the device.
        schedule: How time is cut; None is stretches of 16,384 steps.
        tolerance: None is `default_tolerance(...)`.
        max_iterations: As for `sample`.
        choose: Picks solver and schedule once dynamics and tapes are known; None takes those given.
        plan: More plain values for `Draws.plan`.
        skip: Steps for which the keys have been used already.
        carries: Where chains go on from, to the last bit; None is `positions`.
        progress: What to tell.
    """
    num_chains = keys.shape[0]
    stretches = Stretches(DEFAULT_STRETCH) if schedule is None else schedule
    fixed = default_solver(num_chains, num_samples) if solver is None else solver
    dtype = jax.tree.leaves(positions)[0].dtype
    chains = run_chains(
        kernel, positions, keys, num_samples, choose=choose or (lambda *_: (fixed, stretches, None)),
        tolerance=default_tolerance(kernel, dtype) if tolerance is None else tolerance, max_iterations=max_iterations,
        progress=progress, skip=skip, carries=carries)
    return finish(target, kernel, chains, warmup, plan={
        "kernel": kernel.name, "dice": dice_of(kernel), "solver": repr(chains.solver), "schedule": repr(chains.schedule),
        "num_samples": num_samples, "num_chains": num_chains, **(plan or {})})


def _advised(kernel, pool, schedule, dynamics, initial, tape):
    """The solver that advice finds best for chains like these, or for short runs the default one."""
    num_chains, num_samples = jax.tree.leaves(tape)[0].shape[:2]
    if num_samples < _SHORT or jax.tree.leaves(pool)[0].shape[0] < 2:
        stretches = Stretches(DEFAULT_STRETCH) if schedule is None else schedule
        return default_solver(num_chains, num_samples), stretches, None
    advice = _advice(kernel, pool, dynamics, initial, tape)
    return advice.solver, advice.schedule if schedule is None else schedule, advice


def _advice(kernel, pool, dynamics, initial, tape) -> Advice:
    num_chains, num_samples = jax.tree.leaves(tape)[0].shape[:2]
    starts = jax.vmap(lambda position: kernel.carry(kernel.init(position)))(pool)
    one = functools.partial(jax.tree.map, lambda leaf: leaf[0])
    tolerance = default_tolerance(kernel, jax.tree.leaves(initial)[0].dtype)
    return advise(dynamics, one(initial), one(tape), starts=starts, num_steps=num_samples, num_chains=num_chains,
                  tolerance=tolerance)


def pilot_advice(kernel: Kernel, pool: PyTree, keys: Key, num_samples: int) -> Advice:
    """What pilot chains from some draws, and the cost model, say of chains of a tuned kernel.

    Args:
        kernel: The kernel.
        pool: At least two far-apart draws, leaves `(K, ...)`.
        keys: One per chain, shape `(C,)`.
        num_samples: T.
    """
    dynamics, initial, tape, _ = throw(kernel, pool_starts(pool, keys.shape[0]), keys, num_samples)
    return _advice(kernel, pool, dynamics, initial, tape)


def pool_starts(pool: PyTree, num_chains: int) -> PyTree:
    """One of some draws per chain."""
    count = jax.tree.leaves(pool)[0].shape[0]
    return jax.tree.map(lambda leaf: leaf[np.arange(num_chains) % count], pool)


def default_solver(num_chains: int = 1, num_samples: int = DEFAULT_STRETCH) -> Solver:
    """Shooting, the lanes of the device shared by all chains: near one evaluation per draw where chains forget.

    Segments are a multiple of four steps long, so that kernels with a counter are at the same point of it in all lanes.
    """
    steps = max(_SHORTEST, math.ceil(min(num_samples, DEFAULT_STRETCH) * num_chains / device_lanes()))
    return shooting(steps=4 * math.ceil(steps / 4))


def default_tolerance(kernel: Kernel, dtype: Any) -> Tolerance:
    """A tenth (float32) to a thousandth (float64) of what the certificate allows, in the units of the kernel's noise.

    What is left to the certificate's bound is for conditioning: an error of one step reaches the next ones.
    """
    unit = jnp.minimum(1.0, jnp.min(jnp.asarray(1.0 if kernel.noise_scale is None else kernel.noise_scale)))
    size = 1e-11 if jnp.dtype(dtype) == jnp.float64 else 1e-5
    return Tolerance(relative=0.25 * size, absolute=size * unit)


def prepare(start_key: Key, warmup_key: Key, target: Target, kernel: Kernel | Builder | Warmup, num_chains: int,
            num_warmup: int, adaptation: Adaptation, progress: Progress) -> tuple[Kernel, Warmup | None, PyTree]:
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
            raise ValueError(f"num_chains: got {num_chains}, but the warm-up given as `kernel` has {have} chains")
        return kernel.kernel, kernel, kernel.positions
    num_starts = num_chains if isinstance(kernel, Kernel) else max(num_chains, adaptation.num_chains)
    positions = target.starts(jax.random.split(start_key, num_starts))
    first = jax.tree.map(lambda leaf: leaf[0], positions)
    check_starts(target.logdensity, positions)
    check_deterministic(target.logdensity, first)
    check_precision(target.logdensity, first)
    if isinstance(kernel, Kernel):
        return kernel, None, positions
    with progress.stage("warm-up", num_warmup) as advance:
        warmup = warm_up(warmup_key, target.logdensity, kernel, positions, num_warmup, adaptation, advance)
    suspicion = looks_improper(positions, warmup.positions, warmup.settings.get("step_size", 1.0))
    if suspicion:
        progress.warn(suspicion)
    warmup = dataclasses.replace(warmup, positions=jax.tree.map(lambda leaf: leaf[:num_chains], warmup.positions))
    progress.note(str(warmup))
    return warmup.kernel, warmup, warmup.positions


def _sentence(draws: Draws) -> str:
    report, certified = draws.report, np.asarray(draws.certificate.certified)
    what = "all chains certified" if certified.all() else f"{int(certified.sum())} of {certified.size} chains certified"
    return (f"{what}: largest residual {float(np.max(np.asarray(draws.certificate.max_residual))):.1e} noise units, "
            f"{report.evaluations_per_sample:.1f} evaluations per draw, {len(report.fallbacks)} sequential fallbacks")
