"""Sampling: every choice made once, then chunk after chunk solved, certified and kept.

    draws = sample(key, target, hmc, num_samples=4096)
    draws = sample(key, target, hmc, num_samples=10_000_000, store="runs/schools", thinning=10)
    draws = resume("runs/schools", target, hmc)       after a crash, an interrupt, a full disk; or when all is done

All chains are solved together (`vmap`), time in windows. A chain that a solver cannot finish within its bound is finished
sequentially with the same random numbers, and the report says so: the result is always the exact chain, slower at worst.

Random numbers: `key` is split into keys for starts, warm-up and chains; chain c has `jax.random.split(chains_key, C)[c]`,
and its step t has `jax.random.split(chain_key, T)[t]`, as a user of BlackJAX would write it.

A model is code, and code cannot live in a store safely: `resume` is given target and kernel again, and refuses them if
they are not what the run was begun with. Everything else comes from the store, and the draws are those of a run that was
never interrupted: on the same machine and versions, bit for bit.
"""

import contextlib
import dataclasses
import functools
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Callable

import jax
import numpy as np
from jax.sharding import Mesh

from partime_mcmc.captured_data import data_read_by
from partime_mcmc.certify.recorded import Certification, CertifyWhileRolling
from partime_mcmc.compile_cache import keep_on_disk
from partime_mcmc.diagnostics.checks import check_deterministic, check_precision, check_starts
from partime_mcmc.distributed.collectives import check_mesh, check_same_arguments
from partime_mcmc.distributed.executor import MeshExecutor
from partime_mcmc.engine import Schedule, Tolerance, Windows
from partime_mcmc.host_keys import fold_in, split, split_into
from partime_mcmc.kernels import Kernel
from partime_mcmc.kernels.coupling import Coupling
from partime_mcmc.kernels.kernel_program import Builder, fixed_coupling
from partime_mcmc.sampling.ahead import compiling_first_chunk
from partime_mcmc.sampling.arguments import (
    SampleArguments,
    as_store,
    check_strategies,
    device_of,
    key_words,
    on_device,
)
from partime_mcmc.sampling.chunk import (
    ChainState,
    Chunk,
    interrupted,
    merge_certificates,
    merge_reports,
)
from partime_mcmc.sampling.draws import Draws, hardly_moves, spread_positions
from partime_mcmc.sampling.local import LocalExecutor
from partime_mcmc.sampling.pilots import advise_plan, choose_coupling_by_pilots
from partime_mcmc.sampling.plan import FEWEST_WARMUP, SHORT_RUN, Plan, prepare
from partime_mcmc.sampling.progress import Progress, chosen_progress
from partime_mcmc.sampling.score import scores_at
from partime_mcmc.sampling.target import Target
from partime_mcmc.solvers import Solver
from partime_mcmc.storage.saved_run import StoreMismatch, read_arguments
from partime_mcmc.storage.sink import SharedStoreSink, StoreSink
from partime_mcmc.storage.store import Store
from partime_mcmc.storage.stored_draws import StoredDraws
from partime_mcmc.storage.streaming_statistics import Fold
from partime_mcmc.types import Key, PyTree, nan_is_a_value
from partime_mcmc.validation import (
    check_count,
    check_generator,
    check_key,
    check_outside_transforms,
)
from partime_mcmc.warmup.warmup import Adaptation, Warmup


class MemorySink(contextlib.AbstractContextManager):
    """Keeps all chunks in memory, on every host.

    A sink is given the chunks in order. It is a context manager, closed last.
    """

    def __exit__(self, *error: Any) -> None:
        pass

    def start(self, make_plan: Callable[[], tuple[Plan, ChainState]]) -> tuple[Plan, ChainState]:
        """A new plan: nothing in memory was begun before."""
        self._plan, state = make_plan()
        self._chunks: list[Chunk] = []
        return self._plan, state

    def write(self, chunk: Chunk) -> None:
        """Keep a chunk."""
        self._chunks.append(chunk)

    def interrupt(self) -> None:
        """Return the chunks that are done; raise the interrupt again if there is none."""
        if not self._chunks:
            raise KeyboardInterrupt
        report = self._chunks[-1].report
        report = dataclasses.replace(report, status=interrupted(report.status), interrupted=True)
        self._chunks[-1] = dataclasses.replace(self._chunks[-1], report=report)

    def close(self) -> Draws:
        """The draws of all chunks, one after another."""
        plan, first = self._plan, self._chunks[0]
        certificate, report, done = first.certificate, first.report, first.num_steps
        for chunk in self._chunks[1:]:
            certificate = merge_certificates(certificate, chunk.certificate)
            report = merge_reports(report, chunk.report, (done, chunk.num_steps), certificate)
            done += chunk.num_steps
        trees = [(chunk.positions, chunk.constrained, chunk.info) for chunk in self._chunks]
        positions, constrained, info = (
            trees[0]
            if len(trees) == 1
            else jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), *trees)
        )

        @functools.cache
        def advice():
            warmup = plan.warmup
            return advise_plan(plan, spread_positions(positions) if warmup is None else warmup.pool)

        return Draws(
            positions,
            constrained,
            info,
            certificate,
            report,
            plan.describe() | {"num_samples": done},
            plan.warmup,
            dict(plan.target.dims) if plan.target.dims else None,
            tuple(plan.target.names) if plan.target.names else None,
            self._chunks[-1].state,
            advice if done else None,
            functools.partial(scores_at, plan),
        )


def sample(
    key: Key,
    target: Target,
    kernel: Kernel | Builder | Warmup,
    *,
    num_samples: int,
    num_chains: int = 4,
    num_warmup: int = 1000,
    adaptation: Adaptation | None = None,
    coupling: Coupling | None = None,
    solver: Solver | None = None,
    schedule: Schedule | None = None,
    tolerance: Tolerance | None = None,
    max_iterations: int | None = None,
    max_bytes: int | None = None,
    store: Store | str | os.PathLike | None = None,
    thinning: int = 1,
    mesh: Mesh | None = None,
    certificate: Certification = CertifyWhileRolling(),
    progress: Progress | bool = True,
) -> Draws | StoredDraws:
    """Sample a target with exact chains, parallel over time.

    Args:
        key: One key, typed or legacy.
        target: What to sample.
        kernel: A tuned `Kernel` of the target's density (it is the kernel's own density that is sampled; chains start at
            the target's starts, no warm-up), the warm-up of another run (chains start where it ended), or a builder such
            as `hmc`, `mala`, `nuts`, which warm-up tunes.
        num_samples: Draws per chain, T ≥ 0.
        num_chains: Chains, C ≥ 1.
        num_warmup: Warm-up steps per chain at most, at least 20, for a builder; ignored where the kernel comes tuned.
        adaptation: How a builder's chains find the typical set and a metric; None is `PooledAdaptation()`.
        coupling: For a builder, how its noise is drawn: `CommonRandomNumbers()` gives BlackJAX's own draws bit for bit,
            `MultishiftCoupling()` the same law with a shorter memory. None: in runs of 1,024 draws or more that the default
            solver computes in parallel the coupling with which pilot pairs meet sooner, and the warm-up's notes say so;
            plain otherwise.
        solver: A recipe; None is shooting with as many segments as fill the device. A chain that does not converge in a
            window is finished sequentially; after two windows in which none did, the rest of the run is sequential, and
            `draws.advice` says why. On a processor None is the loop over all steps, for a builder, where that ends before a parallel
            solver would be compiled (in a second, by an estimate), and neither schedule, tolerance nor max_iterations is given.
        schedule: How time is cut; None is windows of 16,384 steps.
        tolerance: How small residuals must be; None is a small part of what the certificate allows.
        max_iterations: Iterations per window before a chain is finished sequentially; None is the solver's default.
        max_bytes: Memory that the run may take, over a mesh on each device; None is most of the device's. Checked before
            anything is allocated.
        store: A folder, or a `Store` of one, for runs longer than memory: draws are certified and written there chunk by
            chunk. If the folder holds this very run already, that is continued; see `resume`.
        thinning: With a store, of so many draws the last is kept; statistics and certificate are of all of them.
        mesh: Devices, of one or several hosts, to spread chains and time over, from `distributed.time_mesh`: the same
            draws to rounding, as NumPy arrays on every host. With a store, all hosts see its folder and the first one
            writes. Its axis `data` must be 1: a density over data spread over devices is for `sharded_solve`. None is the
            default device alone.
        certificate: What it rests on: `CertifyWhileRolling()` on what every step reported while it was rolled, at no cost;
            `CertifyIndependently()` on one more evaluation of every step, apart from the solver. Other solvers than shooting and
            the loop, chains that fell back and those on a mesh have the latter in any case;
            `draws.certificate.independent` says which.
        progress: True shows one line per stage on a terminal; or `quiet`, `progress_line`, or your own.

    Returns:
        The draws, certified; with a store, an object that reads them from there when they are looked at. After an interrupt
        from the keyboard, those that were certified by then, with the verdict INTERRUPTED; on several hosts it ends the
        run.

    Raises:
        StoreMismatch: If the store holds another run, naming what differs.
        StoreError: If the store cannot be written; what was safe before is safe.
        TypeError: If an argument has the wrong type.
        ValueError: If an argument has a value that cannot work, or a start has no finite density or gradient.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target, mala, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> draws = sample(jax.random.key(0), target, kernel, num_samples=500).or_raise()
        >>> draws.positions.shape
        (4, 500)
    """
    start = target.initial if isinstance(target, Target) else None
    check_outside_transforms("sample", key=key, **{"target.initial": start})
    keep_on_disk()
    key = check_key(key)
    check_generator(key, "key")
    check_strategies(
        target, kernel, solver, schedule, tolerance, max_iterations, certificate, adaptation
    )
    given = None if callable(start) else start, key
    device = device_of(given, data_read_by(target.logdensity).arrays) if mesh is None else None
    if device is not None:
        key = jax.device_put(key, device)
        if not callable(start):
            target = dataclasses.replace(target, initial=jax.device_put(start, device))
    num_samples = check_count(num_samples, "num_samples", 0)
    num_chains = check_count(num_chains, "num_chains", 1)
    fewest = 0 if isinstance(kernel, (Kernel, Warmup)) else FEWEST_WARMUP
    num_warmup = check_count(num_warmup, "num_warmup", fewest)
    thinning = check_count(thinning, "thinning", 1)
    if thinning > 1 and store is None:
        raise ValueError(
            f"thinning: got {thinning} without a store; draws in memory are all kept: slice them, or give store="
        )
    if mesh is not None and not (schedule is None or isinstance(schedule, Windows)):
        raise ValueError(f"schedule: got {schedule!r} with a mesh, wanted Windows(size) or None")
    arguments = _arguments(
        key,
        target,
        kernel,
        num_chains,
        num_samples=num_samples,
        num_warmup=num_warmup,
        adaptation=adaptation,
        coupling=coupling,
        solver=solver,
        schedule=schedule,
        tolerance=tolerance,
        max_iterations=None if max_iterations is None else int(max_iterations),
        max_bytes=None if max_bytes is None else check_count(max_bytes, "max_bytes", 1),
        thinning=thinning,
        certificate=certificate,
        mesh=mesh,
        store=as_store(store),
    )
    progress = _progress_of_first_host(progress, mesh)
    with on_device(device):
        draws = run(arguments, progress)[1]
    progress.note(str(draws))
    trouble = hardly_moves(draws.certificate, draws.num_samples) if draws.num_samples else None
    if trouble:
        progress.warn(trouble)
    if draws.num_samples:
        draws.verdict.warn()
    return draws


@contextlib.contextmanager
def termination_interrupts() -> Iterator[None]:
    """Inside, a run that is asked to end keeps everything that is finished: SIGTERM raises `KeyboardInterrupt` in the main thread.

    Batch systems, containers and shutdowns send SIGTERM and kill some seconds later; Python would die at once. A program that has
    an answer of its own keeps it, and so does JAX where it watches for preemption. In other threads Python allows no handlers:
    nothing changes.
    """
    ours = (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if not ours:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@termination_interrupts()
@nan_is_a_value()
def run(arguments: SampleArguments, progress: Progress) -> tuple[Plan, Draws | StoredDraws]:
    """Plan a run, execute it chunk by chunk, and keep its draws in memory or in a store.

    Args:
        arguments: What is asked for.
        progress: Shown meanwhile.

    Returns:
        The plan and the draws.
    """
    mesh, store = arguments.mesh, arguments.store
    if mesh is not None:
        check_same_arguments(arguments)
    sink = MemorySink()
    if store is not None:
        several = mesh is not None and jax.process_count() > 1
        sink = (SharedStoreSink if several else StoreSink)(store, arguments, progress)
    with sink:
        plan, state = sink.start(
            functools.partial(prepare, arguments, progress, compiling_first_chunk)
        )
        executor = LocalExecutor(plan, progress)
        # Without steps there is nothing to spread over a mesh.
        if mesh is not None and plan.num_samples:
            executor = MeshExecutor(plan, progress, mesh, everywhere=store is None)
        try:
            for chunk in executor.chunks(state):
                sink.write(chunk)
        except KeyboardInterrupt:
            sink.interrupt()
        return plan, sink.close()


def resume(
    path: str | os.PathLike,
    target: Target,
    kernel: Kernel | Builder | Warmup,
    *,
    folds: Mapping[str, Fold] | None = None,
    mesh: Mesh | None = None,
    progress: Progress | bool = True,
) -> Draws | StoredDraws:
    """Go on with a stored run, to its end.

    A run that was killed during warm-up warms up again, with the stored key. A finished run is returned as it is.
    Chunks that are damaged are dropped with all that follow them, and drawn again; a warning says so.

    Args:
        path: The folder.
        target: What is sampled, as it was when the run was begun.
        kernel: The kernel, as it was, or its builder.
        folds: The functions of your own that the run accumulates.
        mesh: Devices to go on with, however many the run was begun with: the same draws to rounding. Of several hosts each
            calls this, with a folder that all of them see.
        progress: As for `sample`.

    Returns:
        The draws.

    Raises:
        ValueError: If the chains cannot be laid on the mesh, or hosts ask for different things.
        FileNotFoundError: If there is no stored run.
        StoreMismatch: If model, data, kernel, floating-point type, device or versions are not those that the run was begun
            with, naming what differs.
        StoreError: If the store cannot be written or is damaged beyond its chunks, or another process writes there.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target, mala, resume, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> _ = sample(jax.random.key(0), target, kernel, num_samples=1000, store="runs/normal")
        >>> resume("runs/normal", target, kernel).num_samples  # would go on, had it been interrupted
        1000
    """
    check_strategies(target, kernel)
    asked = read_arguments(path, kernel)
    if asked.pop("front") != "sample":
        raise StoreMismatch(
            f"store: {path} was begun by ParallelMCMC.run: go on with it there, with the same arguments"
        )
    words = jax.numpy.asarray(asked.pop("key_words"), np.uint32)
    key = jax.random.wrap_key_data(words, impl=asked.pop("key_impl"))
    arguments = _arguments(
        key,
        target,
        kernel,
        asked.pop("num_chains"),
        mesh=mesh,
        store=Store(path, asked.pop("chunk"), folds),
        **asked,
    )
    return run(arguments, _progress_of_first_host(progress, mesh))[1]


def _arguments(
    key: Key,
    target: Target,
    kernel: Kernel | Builder | Warmup,
    num_chains: int,
    *,
    coupling: Coupling | None,
    **others: Any,
) -> SampleArguments:
    """The arguments of `sample` with all that follows from its key."""
    start_key, warmup_key, chains_key = split_into(key, 3)
    choose, tuned = None, isinstance(kernel, (Kernel, Warmup))
    if coupling is not None:
        kernel = fixed_coupling(kernel, coupling)
    elif others["solver"] is None and others["num_samples"] >= SHORT_RUN and not tuned:
        pilots_key = fold_in(warmup_key, 1)
        choose = functools.partial(choose_coupling_by_pilots, key=pilots_key)
    if others["mesh"] is not None:
        check_mesh(others["mesh"], num_chains)
    return SampleArguments(
        front="sample",
        target=target,
        kernel=kernel,
        starts=functools.partial(_checked_starts, target, start_key),
        warmup_key=warmup_key,
        chain_keys=split(chains_key, num_chains),
        key_words=key_words(key),
        key_impl=str(jax.random.key_impl(key)),
        coupling=coupling,
        choose_coupling=choose,
        **others,
    )


def _checked_starts(target: Target, key: Key, count: int) -> PyTree:
    """Starts of a target, refused if no chain could move from one of them."""
    positions = target.starts(split(key, count))
    first = jax.tree.map(lambda leaf: leaf[0], positions)
    check_starts(target.logdensity, positions)
    check_deterministic(target.logdensity, first)
    check_precision(target.logdensity, first)
    return positions


def _progress_of_first_host(progress: Progress | bool, mesh: Mesh | None) -> Progress:
    """The progress that is shown: of several hosts the first one speaks for all."""
    return chosen_progress(progress if mesh is None or jax.process_index() == 0 else False)
