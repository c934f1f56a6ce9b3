"""From solved chains to draws: the certificate, what the kernel says of each step, and the model's own space.

Where all steps were recorded while they were rolled, the certificate is read from the notes. Elsewhere it is one independent
pass over the whole path, which also finds acceptance probabilities, energies and the like; a solver stops within a
tolerance, so steps on which the kernel stands still are then made to stand still to the last bit, and what is returned is
what was certified.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

from partime_mcmc.closures import Named
from partime_mcmc.kernels import Certificate, Kernel, certify_held, certify_recorded
from partime_mcmc.kernels.records import said_by
from partime_mcmc.sampling.run_recorder import RunRecorder
from partime_mcmc.sampling.chain_groups import joined, run_explicit_groups
from partime_mcmc.sampling.draws import Draws, End, RunReport
from partime_mcmc.kernels.kernel_program import program_and_params
from partime_mcmc.compile_cache import Timings, run_explicit
from partime_mcmc.sampling.local import Chains
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Warmup
from partime_mcmc.solution import Status
from partime_mcmc.types import PyTree


def finish(
    target: Target, kernel: Kernel, chains: Chains, warmup: Warmup | None, plan: dict[str, Any]
) -> Draws:
    """Certify and describe chains.

    Args:
        target: For the model's own space.
        kernel: Whose chains they are.
        chains: As solved.
        warmup: The warm-up before them, if any.
        plan: What gives these draws again.
    """
    clock = chains.clock
    family, numbers = program_and_params(kernel)
    paths = [chains.initial, chains.carries, chains.tape]
    if chains.notes is None:
        judge = _Judge(family)
    else:
        judge, paths = _Read(family), [*paths, chains.notes, chains.defects]
    found = joined(
        run_explicit_groups(judge, numbers, list(zip(*paths)), clock=clock, what="certify")
    )
    certificate, records, last, positions = found
    constrained = constrained_values(target, positions, clock)
    shape = certificate.residual.shape
    info = said_by(records, shape) | {"residual": certificate.residual}
    report = run_report(
        chains.books, certificate, clock, jax.tree.leaves(chains.carries)[0].dtype, device()
    )
    return Draws(
        positions,
        constrained,
        info,
        certificate,
        report,
        plan,
        warmup,
        dict(target.dims) if target.dims else None,
        tuple(target.names) if target.names else None,
        chains.advice,
        _end(chains, last),
    )


def run_report(
    books: RunRecorder,
    certificate: Certificate,
    clock: Timings,
    dtype: Any,
    where: str,
    by_part: tuple[float, ...] = (),
) -> RunReport:
    """How a run went.

    Args:
        books: Of all its stretches.
        certificate: One entry per chain.
        clock: What time was spent on.
        dtype: Of the states.
        where: The devices, in words.
        by_part: Evaluations per draw of each device, where there are several.
    """
    # A path that is not certified is not known to stand still: its own verdict comes first.
    frozen, seconds = (
        np.asarray(certificate.frozen) & np.asarray(certificate.certified),
        clock.seconds,
    )
    status = tuple(
        Status.FROZEN if frozen[c] and one == Status.CONVERGED else one
        for c, one in enumerate(books.status)
    )
    return RunReport(
        status,
        books.iterations,
        books.evaluations_per_sample,
        books.jvps_per_sample,
        int(books.depth.max()),
        tuple(books.fallbacks),
        books.num_sequential,
        books.history,
        seconds["advise"],
        seconds["compile"],
        seconds["run"],
        seconds["certify"],
        str(dtype),
        where,
        versions(),
        by_part,
        books.interrupted,
    )


def _end(chains: Chains, last: PyTree) -> End:
    steps = jax.tree.leaves(chains.carries)[0].shape[1]
    return End(last, chains.discrete, chains.first + steps, chains.books.failed_running)


def _last(carries: PyTree, initial: PyTree) -> PyTree:
    return jax.tree.map(
        lambda leaf, first: leaf[:, -1] if leaf.shape[1] else first, carries, initial
    )


class _Judge(Named):
    """Certificate, records, the last carries of the path standing still where its kernel does, and its positions; the part
    is the family."""

    def __call__(self, numbers, initial, carries, tape):
        kernel = self.parts[0].kernel(numbers)
        certificate, records, still = certify_held(kernel, initial, carries, tape)
        return (
            certificate,
            records,
            _last(still, initial),
            jax.vmap(jax.vmap(kernel.position))(still),
        )


class _Read(Named):
    """As `_Judge`, from what steps noted."""

    def __call__(self, numbers, initial, carries, tape, notes, defects):
        kernel = self.parts[0].kernel(numbers)
        certificate, records = jax.vmap(functools.partial(certify_recorded, kernel))(
            initial, carries, tape, notes, defects
        )
        return (
            certificate,
            records,
            _last(carries, initial),
            jax.vmap(jax.vmap(kernel.position))(carries),
        )


class _Constrain(Named):
    """Named values in the model's space of all draws; the part is the target's function."""

    def __call__(self, params, positions):
        del params
        return jax.vmap(jax.vmap(self.parts[0]))(positions)


def constrained_values(target: Target, positions: PyTree, clock: Timings) -> dict:
    """Named values in the model's space of positions `(C, T, ...)`."""
    if target.constrain is not None:
        return dict(
            run_explicit(_Constrain(target.constrain), None, positions, clock=clock, what="certify")
        )
    if isinstance(positions, dict):
        return dict(positions)
    leaves = jax.tree_util.tree_leaves_with_path(positions)
    return {jax.tree_util.keystr(path) or "x": leaf for path, leaf in leaves}


@functools.cache
def device() -> str:
    """The device, in words."""
    first = jax.devices()[0]
    return f"{first.platform}: {first.device_kind}"


def versions() -> dict[str, str]:
    """Versions of what decides about bits."""
    return dict(_versions())


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("partime_mcmc", "jax", "jaxlib", "blackjax", "numpyro", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return tuple(found.items())
