"""Sampling: starts, warm-up, dice, the solve stretch by stretch, the certificate.

    draws = sample(key, target, hmc, num_samples=4096)

All chains are solved together (`vmap`), time in stretches, so that progress can be shown and memory stays bounded. A chain
that a solver cannot finish within its bound is finished sequentially with the same dice, and the report says so: the
result is always the exact chain, slower at worst. Data travel as arguments, so compilation does not grow with them.

The dice: `key` is split into keys for starts, warm-up and chains; chain c has `jax.random.split(chains_key, C)[c]`, and its
step t has `jax.random.split(chain_key, T)[t]`, as a user of BlackJAX would write it.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.closures import explicit
from partime_mcmc.diagnostics.checks import (check_count, check_deterministic, check_key, check_precision, check_starts,
                                             looks_improper)
from partime_mcmc.kernels import Kernel, certify_with_records, hold
from partime_mcmc.mcmc.arguments import check_memory, check_strategies, chosen_progress
from partime_mcmc.mcmc.draws import Draws, RunReport
from partime_mcmc.mcmc.progress import Progress
from partime_mcmc.mcmc.run import Chains, run_chains
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Builder, Warmup, warm_up
from partime_mcmc.predict.advise import advise
from partime_mcmc.recipes import sequential, shooting
from partime_mcmc.schedule import Schedule, Stretches
from partime_mcmc.solution import Status, Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.shooting import device_lanes
from partime_mcmc.types import Key, PyTree

DEFAULT_STRETCH = 16384
# Runs too short to be worth pilots.
_SHORT = 1024
_HARDLY = 0.98


def sample(key: Key, target: Target, kernel: Kernel | Builder | Warmup, *, num_samples: int, num_chains: int = 4,
           num_warmup: int = 1000, solver: Solver | None = None, schedule: Schedule | None = None,
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
        num_warmup: Warm-up steps per chain, at least 20, for a builder; ignored where the kernel comes tuned.
        solver: A recipe; None asks `advise`: pilot chains from the warm-up's draws say whether these chains forget, a cost
            model how many segments pay; chains that do not forget are run sequentially, and `draws.advice` says why.
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
    kernel, warmup, positions = _prepare(start_key, warmup_key, target, kernel, num_chains, num_warmup, progress)
    leaves = jax.tree.leaves(positions)
    check_memory(solver or sequential(), getattr(schedule or Stretches(DEFAULT_STRETCH), "size", num_samples),
                 num_samples, num_chains,
                 sum(leaf[0].size for leaf in leaves), leaves[0].dtype.itemsize, max_bytes)
    tolerance = default_tolerance(kernel, leaves[0].dtype) if tolerance is None else tolerance
    chains = run_chains(kernel, positions, jax.random.split(chains_key, num_chains), num_samples, choose=functools.partial(
        _choose, kernel, warmup, positions, solver, schedule, tolerance), tolerance=tolerance,
                        max_iterations=max_iterations, progress=progress)
    draws = _finish(target, kernel, chains, warmup, plan={
        "kernel": kernel.name, "solver": repr(chains.solver), "schedule": repr(chains.schedule),
        "num_samples": num_samples, "num_chains": num_chains, "num_warmup": warmup.num_steps if warmup else 0,
        "key": [int(word) for word in np.ravel(jax.random.key_data(key))]})
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


def _choose(kernel, warmup, positions, solver, schedule, tolerance, dynamics, initial, tape):
    """The solver and schedule asked for, or those that advice finds best for chains like these."""
    num_chains, num_samples = jax.tree.leaves(tape)[0].shape[:2]
    stretches = Stretches(DEFAULT_STRETCH) if schedule is None else schedule
    pool = positions if warmup is None else warmup.pool
    num_pool = jax.tree.leaves(pool)[0].shape[0]
    if solver is not None:
        return solver, stretches, None
    if num_samples < _SHORT or num_pool < 2:
        return default_solver(num_chains), stretches, None
    starts = jax.vmap(lambda position: kernel.carry(kernel.init(position)))(pool)
    one = functools.partial(jax.tree.map, lambda leaf: leaf[0])
    advice = advise(dynamics, one(initial), one(tape), starts=starts, num_steps=num_samples, num_chains=num_chains,
                    tolerance=tolerance)
    return advice.solver, advice.schedule if schedule is None else schedule, advice


def default_solver(num_chains: int = 1) -> Solver:
    """Shooting, the lanes of the device shared by all chains: near one evaluation per draw where chains forget."""
    return shooting(num_segments=max(1, device_lanes() // num_chains))


def default_tolerance(kernel: Kernel, dtype: Any) -> Tolerance:
    """A tenth (float32) to a thousandth (float64) of what the certificate allows, in the units of the kernel's noise.

    What is left to the certificate's bound is for conditioning: an error of one step reaches the next ones.
    """
    unit = jnp.minimum(1.0, jnp.min(jnp.asarray(1.0 if kernel.noise_scale is None else kernel.noise_scale)))
    size = 1e-11 if jnp.dtype(dtype) == jnp.float64 else 1e-5
    return Tolerance(relative=0.25 * size, absolute=size * unit)


def _prepare(start_key, warmup_key, target, kernel, num_chains, num_warmup, progress):
    """A tuned kernel and one position per chain."""
    if isinstance(kernel, Warmup):
        have = jax.tree.leaves(kernel.positions)[0].shape[0]
        if have != num_chains:
            raise ValueError(f"num_chains: got {num_chains}, but the warm-up given as `kernel` has {have} chains")
        return kernel.kernel, kernel, kernel.positions
    starts = [target.start(one) for one in jax.random.split(start_key, num_chains)]
    positions = jax.tree.map(lambda *leaves: jnp.stack(leaves), *starts)
    check_starts(target.logdensity, positions)
    check_deterministic(target.logdensity, starts[0])
    check_precision(target.logdensity, starts[0])
    if isinstance(kernel, Kernel):
        return kernel, None, positions
    with progress.stage("warm-up", num_warmup) as advance:
        warmup = warm_up(warmup_key, target.logdensity, kernel, positions, num_warmup, advance)
    suspicion = looks_improper(positions, warmup.positions, warmup.settings.get("step_size", 1.0))
    if suspicion:
        progress.warn(suspicion)
    return warmup.kernel, warmup, warmup.positions


def _finish(target: Target, kernel: Kernel, chains: Chains, warmup: Warmup | None, plan: dict[str, Any]) -> Draws:
    """Certificate, infos on the converged path, and the model's own space."""
    clock = chains.clock
    with clock.measure("certify"):
        check = jax.vmap(lambda first, path, tape: certify_with_records(kernel, first, path, tape))
        certificate, records = jax.block_until_ready(check(chains.initial, chains.carries, chains.tape))
        carries = jax.vmap(hold)(chains.initial, chains.carries, records.held)
        if not all(bool(jnp.all((a == b) | ~jnp.isfinite(b))) for a, b in zip(
                jax.tree.leaves(carries), jax.tree.leaves(chains.carries))):
            # Standing still to the last bit changes what the next steps start from: certify what is returned.
            certificate, records = jax.block_until_ready(check(chains.initial, carries, chains.tape))
    positions = jax.vmap(jax.vmap(kernel.position))(carries)
    constrained = _constrained(target, positions)
    shape = certificate.residual.shape
    named = {"accepted": records.accepted, "acceptance_rate": records.acceptance_rate, "diverging": records.diverging,
             "energy": records.energy, "num_steps": records.num_steps, "logdensity": records.logdensity,
             "residual": certificate.residual}
    info = {name: jnp.broadcast_to(value, shape) for name, value in named.items() if value is not None}
    # A path that is not certified is not known to stand still: its own verdict comes first.
    frozen = np.asarray(certificate.frozen) & np.asarray(certificate.certified)
    status = tuple(Status.FROZEN if frozen[c] and one == Status.CONVERGED else one for c, one in enumerate(chains.status))
    report = RunReport(
        status, chains.iterations, chains.evaluations_per_sample, chains.jvps_per_sample, chains.depth,
        tuple(chains.fallbacks), chains.num_sequential, chains.residual_history, clock.seconds["advise"],
        clock.seconds["compile"],
        clock.seconds["run"], clock.seconds["certify"], str(jax.tree.leaves(chains.carries)[0].dtype),
        _device(), versions())
    return Draws(positions, constrained, info, certificate, report, plan, warmup,
                 dict(target.dims) if target.dims else None, tuple(target.names) if target.names else None,
                 chains.advice)


def _constrained(target: Target, positions: PyTree) -> dict:
    if target.constrain is None:
        if isinstance(positions, dict):
            return dict(positions)
        leaves = jax.tree_util.tree_leaves_with_path(positions)
        return {jax.tree_util.keystr(path) or "x": leaf for path, leaf in leaves}
    one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[2:], leaf.dtype), positions)
    constrain, params = explicit(lambda _, position: target.constrain(position), None, one)
    both = jax.vmap(jax.vmap(constrain, in_axes=(None, 0)), in_axes=(None, 0))
    return dict(jax.jit(both)(params, positions))


def _sentence(draws: Draws) -> str:
    report, certified = draws.report, np.asarray(draws.certificate.certified)
    what = "all chains certified" if certified.all() else f"{int(certified.sum())} of {certified.size} chains certified"
    return (f"{what}: largest residual {float(np.max(np.asarray(draws.certificate.max_residual))):.1e} noise units, "
            f"{report.evaluations_per_sample:.1f} evaluations per draw, {len(report.fallbacks)} sequential fallbacks")


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.platform}: {device.device_kind}"


def versions() -> dict[str, str]:
    """Versions of what decides about bits."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("partime_mcmc", "jax", "jaxlib", "blackjax", "numpyro", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
