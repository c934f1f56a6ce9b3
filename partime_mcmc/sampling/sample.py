"""Sampling: starts, warm-up, dice, the solve stretch by stretch, the certificate.

    draws = sample(key, target, hmc, num_samples=4096)

All chains are solved together (`vmap`), time in stretches, so that progress can be shown and memory stays bounded. A
chain that a solver cannot finish within its bound is finished sequentially with the same dice, and the report says so:
the result is always the exact chain, slower at worst. Data travel as arguments, so compilation does not grow with them.

The dice: `key` is split into keys for starts, warm-up and chains; chain c has `jax.random.split(chains_key, C)[c]`,
and its step t has `jax.random.split(chain_key, T)[t]`, as a user of BlackJAX would write it.
"""

from __future__ import annotations

import os

import jax
import numpy as np
from jax.sharding import Mesh

from partime_mcmc.contracts import check_has
from partime_mcmc.diagnostics.checks import check_count, check_key
from partime_mcmc.kernels import Evidence, Kernel, Recorded
from partime_mcmc.kernels.dice import Dice
from partime_mcmc.sampling.memory import check_strategies, chosen_progress
from partime_mcmc.sampling.chains import check_fits, default_tolerance, draw_chains
from partime_mcmc.sampling.draws import Draws
from partime_mcmc.distributed.collectives import check_mesh, check_same
from partime_mcmc.kernels.kernel_program import Builder
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.plan import Request, make_ready
from partime_mcmc.sampling.resume import as_store, key_words, sample_stored
from partime_mcmc.storage.stored_draws import StoredDraws
from partime_mcmc.storage.stored_run import Store
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Adaptation, Warmup
from partime_mcmc.schedule import Schedule
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.types import Key

__all__ = ["default_tolerance", "sample"]

_HARDLY = 0.98


def sample(
    key: Key,
    target: Target,
    kernel: Kernel | Builder | Warmup,
    *,
    num_samples: int,
    num_chains: int = 4,
    num_warmup: int = 1000,
    adaptation: Adaptation | None = None,
    dice: Dice | None = None,
    solver: Solver | None = None,
    schedule: Schedule | None = None,
    tolerance: Tolerance | None = None,
    max_iterations: int | None = None,
    max_bytes: int | None = None,
    store: Store | str | os.PathLike | None = None,
    thinning: int = 1,
    mesh: Mesh | None = None,
    certificate: Evidence = Recorded(),
    progress: Progress | bool = True,
) -> Draws | StoredDraws:
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
        dice: For a builder, how its noise is drawn: `PlainDice()` gives BlackJAX's own draws bit for bit,
            `CoalescingDice()` the same law with a shorter memory. None: in runs of 1,024 draws or more that choose their
            own solver, the dice with which pilot pairs meet sooner, and the warm-up's notes say so; plain ones otherwise.
        adaptation: How a builder's chains find the typical set and a metric; None is `PooledAdaptation()`.
        solver: A recipe; None asks `advise`: pilot chains from the warm-up's draws say whether these chains forget, a
            cost model how many segments pay; chains that do not forget are run sequentially, and `draws.advice` says
            why.
        schedule: How time is cut; None follows the advice, or takes stretches of 16,384 steps.
        tolerance: How small residuals must be; None is `default_tolerance(...)`.
        max_iterations: Passes per stretch before a chain is finished sequentially; None is the stated default.
        max_bytes: Memory that the run may take, over a mesh on each device; None is most of the device's. Checked before
            anything is allocated.
        store: A folder, or a `Store` of one, for runs longer than memory: draws are certified and written there chunk by
            chunk. A folder that holds this very run already is gone on with; see `resume`.
        thinning: With a store, of so many draws the last is kept; statistics and certificate are of all of them.
        mesh: Devices, of one or several hosts, to spread chains and time over, from `distributed.time_mesh`: the same
            draws to rounding, as NumPy arrays on every host. A solver of None is then shooting. With a store, all hosts see
            its folder and the first one writes. Its axis `data` must be 1: a density over data spread over devices is for
            `sharded_solve`. None is the default device alone.
        certificate: What it rests on: `Recorded()` on what every step said while it was rolled, at no cost;
            `Independent()` on one more evaluation of every step, apart from the solver. Other solvers than shooting and
            the loop, chains that
            fell back and those on a mesh have the latter in any case; `draws.certificate.independent` says which.
        progress: True shows one line per stage on a terminal; or `quiet`, `progress_line`, or your own.

    Returns:
        The draws, certified; with a store, an object that reads them from there when they are looked at. After an interrupt
        from the keyboard, those that were certified by then, with the verdict INTERRUPTED; on several hosts it ends the run.

    Raises:
        StoreMismatch: If the store holds another run, naming what differs.
        StoreError: If the store cannot be written; what was safe before is safe.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that cannot work, or a start has no finite density or gradient.
    """
    if isinstance(key, jax.core.Tracer):
        raise TypeError(
            "key: got a traced value; call sample outside jit and vmap (it compiles what it needs itself)"
        )
    # Of several hosts the first one speaks for all.
    key, progress = (
        check_key(key),
        chosen_progress(progress if mesh is None or jax.process_index() == 0 else False),
    )
    check_strategies(target, kernel, solver, schedule, tolerance, max_iterations)
    num_samples, num_chains = (
        check_count(num_samples, "num_samples", 0),
        check_count(num_chains, "num_chains", 1),
    )
    check_has(certificate, "certificate", ("dynamics",), "Recorded() or Independent()")
    check_count(num_warmup, "num_warmup", 20 if not isinstance(kernel, (Kernel, Warmup)) else 0)
    if check_count(thinning, "thinning", 1) > 1 and store is None:
        raise ValueError(
            f"thinning: got {thinning} without a store; draws in memory are all kept: slice them, or give "
            "store="
        )
    if mesh is not None:
        check_mesh(mesh, num_chains, schedule)
    request = Request(
        key,
        target,
        kernel,
        num_samples,
        num_chains,
        num_warmup,
        adaptation,
        dice,
        solver,
        schedule,
        tolerance,
        max_iterations,
        max_bytes,
        thinning,
        certificate,
    )
    store = None if store is None else as_store(store)
    if mesh is not None:
        check_same(request, mesh, store)
    if store is not None:
        draws = sample_stored(store, request, progress, mesh)
        progress.note(str(draws))
    else:
        draws = _in_memory(request, mesh, progress)
        if draws.advice is not None:
            progress.note(str(draws.advice))
        progress.note(_sentence(draws))
    trouble = _hardly_moves(draws) if draws.plan["num_samples"] else None
    if trouble:
        progress.warn(trouble)
    return draws


def _in_memory(request: Request, mesh: Mesh | None, progress: Progress) -> Draws:
    solver, schedule, num_samples = request.solver, request.schedule, request.num_samples
    check_fits(
        request.target,
        num_samples,
        request.num_chains,
        solver=solver,
        schedule=schedule,
        certificate=request.certificate,
        mesh=mesh,
        max_bytes=request.max_bytes,
    )
    kernel, warmup, positions, keys = ready = make_ready(request, progress)
    plan = {"num_warmup": warmup.num_steps if warmup else 0, "key": key_words(request.key)}
    return draw_chains(
        request.target,
        kernel,
        positions,
        keys,
        num_samples,
        warmup=warmup,
        solver=solver,
        schedule=schedule,
        tolerance=request.tolerance,
        max_iterations=request.max_iterations,
        plan=plan,
        progress=progress,
        choose=ready.choice(request) if mesh is None else None,
        mesh=mesh if num_samples else None,
        certificate=request.certificate,
    )


def _hardly_moves(draws: Draws) -> str | None:
    """What to say of chains that accept next to nothing: they are exact, and useless."""
    rejected, steps = np.asarray(draws.certificate.num_rejected), draws.plan["num_samples"]
    few = (rejected >= 0) & (rejected > _HARDLY * steps)
    if steps < 50 or not few.any():
        return None
    return (
        f"chains {np.flatnonzero(few).tolist()} accepted less than 2% of their proposals "
        f"({int(np.asarray(draws.certificate.num_nonfinite_proposals)[few].sum())} of which were out of range): the "
        "draws are exact and say little; look for an improper posterior, a bad start or a step size that is too large"
    )


def _sentence(draws: Draws) -> str:
    report, certified = draws.report, np.asarray(draws.certificate.certified)
    what = (
        "all chains certified"
        if certified.all()
        else f"{int(certified.sum())} of {certified.size} chains certified"
    )
    if report.interrupted:
        what = f"interrupted after {draws.plan['num_samples']:,} draws per chain; {what}"
    return (
        f"{what}: largest residual {float(np.max(np.asarray(draws.certificate.max_residual))):.1e} noise units, "
        f"{report.evaluations_per_sample:.1f} evaluations per draw, {len(report.fallbacks)} sequential fallbacks"
    )
