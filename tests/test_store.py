"""Runs on disk: what is stored is what was drawn, whatever happens to the process, the disk and the files."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import partime_mcmc.distributed.followers as followers
import partime_mcmc.sampling.resume as resuming
import partime_mcmc.storage.layout as layout
import partime_mcmc.storage.stored_run as storing
import pytest
import store_case
from partime_mcmc.storage.formats import Zarr, blocks
from partime_mcmc.storage.layout import Folder, StoreError
from partime_mcmc.storage.stored_run import Store
from store_case import CHAINS, CHUNK, run

import partime_mcmc.sampling.chain_groups as cores
import partime_mcmc.sampling.executor as streaming
import partime_mcmc.sampling.local as running
from partime_mcmc import (
    AllAtOnce,
    Clipped,
    DiagonalJacobian,
    Newton,
    elk,
    open_draws,
    resume,
    shooting,
    summary_table,
)
from partime_mcmc.compile_cache import Timings
from partime_mcmc.diagnostics.checks import TooLarge
from partime_mcmc.engine.recipes import sequential
from partime_mcmc.engine.solution import SolveError, Status, Tolerance
from partime_mcmc.engine.windows import Windows
from partime_mcmc.kernels import Whitening, from_blackjax, mala
from partime_mcmc.kernels.kernel_program import (
    KernelProgram,
    density_of,
    parametrised_kernel,
    program_and_params,
)
from partime_mcmc.sampling.draws import End
from partime_mcmc.sampling.memory import chunk_steps
from partime_mcmc.sampling.merge import join_certificates, join_reports, without_steps
from partime_mcmc.sampling.progress import progress_line, quiet
from partime_mcmc.sampling.randomness import begin, throw
from partime_mcmc.sampling.run_recorder import RunRecorder
from partime_mcmc.sampling.target import Target
from partime_mcmc.storage import codec
from partime_mcmc.storage.fingerprint import StoreMismatch, fingerprint_of
from partime_mcmc.storage.streaming_statistics import Fold
from partime_mcmc.warmup.warmup import Warmup

T = 120


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def memory():
    with jax.enable_x64(True):
        return run()


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing happened to."""
    with jax.enable_x64(True):
        return run(tmp_path_factory.mktemp("whole") / "run")


def go_on(path, **changes):
    return resume(
        path,
        **(
            {"target": store_case.target(), "kernel": store_case.kernel(), "progress": False}
            | changes
        ),
    )


def assert_same(draws, wanted):
    """Equal arrays, to the last bit: draws, what the kernel said, certificate and running statistics."""
    mine, theirs = draws.load(), wanted.load()
    for group in ("constrained", "info"):
        jax.tree.map(np.testing.assert_array_equal, getattr(mine, group), getattr(theirs, group))
    jax.tree.map(np.testing.assert_array_equal, draws.certificate, wanted.certificate)
    assert draws.status == wanted.status
    jax.tree.map(
        np.testing.assert_array_equal, draws.running.to_arrays(), wanted.running.to_arrays()
    )


@pytest.mark.smoke
def test_what_is_stored_is_what_stays_in_memory(whole, memory):
    assert whole.finished and len(whole.chunks) == T // CHUNK and whole.or_raise() is whole
    loaded = whole.load()
    for name, values in memory.constrained.items():
        np.testing.assert_array_equal(loaded.constrained[name], values)
    for name, values in memory.info.items():
        np.testing.assert_array_equal(loaded.info[name], values, err_msg=name)
    for name in (
        "certified",
        "max_residual",
        "worst_step",
        "num_steps",
        "num_rejected",
        "frozen",
        "min_margin",
        "accepted",
    ):
        np.testing.assert_array_equal(
            getattr(loaded.certificate, name), getattr(memory.certificate, name), err_msg=name
        )
    np.testing.assert_array_equal(whole.report.iterations, memory.report.iterations)
    assert whole.report.evaluations_per_sample == pytest.approx(
        memory.report.evaluations_per_sample
    )
    np.testing.assert_allclose(
        whole.running.mean()[:, 1:], np.mean(memory.constrained["place"], axis=1)
    )
    assert [row["name"] for row in summary_table(loaded)] == [
        row["name"] for row in whole.running.summary()
    ]


@pytest.mark.smoke
def test_draws_are_read_where_they_are_looked_at(whole, memory, monkeypatch):
    place = np.asarray(memory.constrained["place"])
    lazy = open_draws(whole.path).posterior["place"]
    assert lazy.dims == ("chain", "draw", "site")
    read = []
    packer = type(store_case.Store(whole.path).format)
    inner = packer.read
    monkeypatch.setattr(
        packer, "read", lambda self, path, *rest: read.append(path) or inner(self, path, *rest)
    )
    np.testing.assert_array_equal(lazy.isel(draw=slice(20, 30), site=1), place[:, 20:30, 1])
    assert len(set(read)) == 2
    np.testing.assert_array_equal(lazy.isel(draw=slice(5, None, 7), chain=1), place[1, 5::7])
    np.testing.assert_array_equal(lazy.isel(draw=-1), place[:, -1])
    np.testing.assert_array_equal(lazy.isel(draw=[3, 99, 50]), place[:, [3, 99, 50]])
    np.testing.assert_array_equal(lazy.isel(draw=slice(None, None, -40)), place[:, ::-40])
    np.testing.assert_array_equal(
        whole.to_arviz()["sample_stats"]["accepted"], np.asarray(memory.certificate.accepted)
    )


def test_thinning_keeps_the_last_of_each_and_counts_all(tmp_path, memory):
    sums = Fold(
        np.zeros(()), lambda carry, values, info: carry + jnp.asarray(values["level"]).sum()
    )
    thin = run(Store(tmp_path / "run", chunk=CHUNK, folds={"sum": sums}), thinning=50)
    kept = np.arange(T % 50 + 49, T, 50)
    np.testing.assert_array_equal(thin.posterior["draw"], kept)
    np.testing.assert_array_equal(
        thin.posterior["place"], np.asarray(memory.constrained["place"])[:, kept]
    )
    assert (thin.certificate.num_steps == T).all() and thin.running.num_draws == T
    np.testing.assert_allclose(thin.running.carries["sum"], np.sum(memory.constrained["level"]))
    with pytest.raises(ValueError, match="thinning: got 3 without a store"):
        run(thinning=3)


class Interrupting(type(quiet)):
    """Ctrl-C after so many steps."""

    def __init__(self, after):
        self.after, self.steps = after, 0

    @contextlib.contextmanager
    def stage(self, name, total):
        def count(steps, **shown):
            self.steps += steps
            if self.after <= self.steps:
                self.after = np.inf
                # No signal: workers of a parallel test run ignore it.
                raise KeyboardInterrupt

        yield count


def test_an_interrupt_keeps_what_is_certified(tmp_path, whole, memory):
    part = run(tmp_path / "run", progress=Interrupting(70))
    assert (
        part.status == (Status.INTERRUPTED,) * CHAINS
        and 0 < part.num_samples < T
        and not part.finished
    )
    assert part.posterior["level"].shape == (CHAINS, part.num_samples)
    with pytest.raises(SolveError, match="INTERRUPTED"):
        part.or_raise()
    assert_same(go_on(tmp_path / "run"), whole)
    draws = run(progress=Interrupting(70))
    assert draws.report.status == (Status.INTERRUPTED,) * CHAINS and draws.plan["num_samples"] == 72
    np.testing.assert_array_equal(
        draws.constrained["place"], np.asarray(memory.constrained["place"])[:, :72]
    )
    assert np.asarray(draws.certificate.certified).all() and draws.end.num_steps == 72


def test_an_interrupt_while_draws_are_certified_loses_none(tmp_path, whole, memory, monkeypatch):
    inner, calls = streaming.finish, []

    def finish(*rest):
        calls.append(rest)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return inner(*rest)

    monkeypatch.setattr(streaming, "finish", finish)
    draws = run()
    assert len(calls) == 2 and draws.report.status == (Status.CONVERGED,) * CHAINS, (
        "all had been drawn"
    )
    np.testing.assert_array_equal(draws.constrained["place"], memory.constrained["place"])
    calls.clear()
    interrupted = run(progress=Interrupting(70))
    assert (
        len(calls) == 2 and interrupted.plan["num_samples"] == 72 and interrupted.report.interrupted
    )
    # Of a stored run the chunks before are safe, and this one is drawn again.
    calls.clear()
    part = run(tmp_path / "run")
    assert (
        part.status == (Status.INTERRUPTED,) * CHAINS and part.num_samples == 0 and len(calls) == 1
    )
    assert_same(go_on(tmp_path / "run"), whole)


def test_a_run_goes_on_in_the_groups_that_it_was_begun_in(tmp_path, monkeypatch):
    """However many cores there are then: groups decide how sums are rounded."""
    assert CHAINS % 2 == 0
    inner, groups = running.throw_dice, []

    def throw_dice(*rest):
        groups.append(rest[-1])
        return inner(*rest)

    monkeypatch.setattr(running, "throw_dice", throw_dice)
    monkeypatch.setattr(cores, "num_cores", lambda: 2)
    complete = run(tmp_path / "complete")
    run(tmp_path / "run", progress=Interrupting(70))
    monkeypatch.setattr(cores, "num_cores", lambda: 1)
    assert_same(go_on(tmp_path / "run"), complete)
    assert set(groups) == {2}


def test_an_interrupt_is_heard_when_all_chains_are_lost(tmp_path, memory, monkeypatch):
    inner = RunRecorder.enter

    def enter(self, *rest):
        self.status = [Status.NONFINITE] * CHAINS
        return inner(self, *rest)

    monkeypatch.setattr(RunRecorder, "enter", enter)
    assert run(tmp_path / "run", progress=Interrupting(70)).num_samples == 48
    draws = run(progress=Interrupting(70))
    assert draws.plan["num_samples"] == 72 and draws.report.status == (Status.NONFINITE,) * CHAINS


def test_what_is_not_kept_yet_is_not_read(tmp_path):
    part = run(tmp_path / "run", thinning=50, progress=Interrupting(30))
    for read in (part.load, lambda: part.constrained):
        with pytest.raises(
            StoreError, match="has 24 draws per chain, and with thinning=50 none of them is kept"
        ):
            read()
    with pytest.raises(
        ValueError, match="thinning: got 121 with num_samples=120, wanted at most as many"
    ):
        run(tmp_path / "other", thinning=121)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "damage, which, said",
    [
        (
            truncate,
            4,
            "chunk-000004 does not have the checksum in its name: 1 chunk dropped, and the run goes on from step 96",
        ),
        (
            flip,
            2,
            "chunk-000002 does not have the checksum in its name: 3 chunks dropped, and the run goes on from step 48",
        ),
        (
            Path.unlink,
            2,
            "chunk-000002 is missing: 2 chunks dropped, and the run goes on from step 48",
        ),
    ],
)
def test_a_damaged_chunk_is_found_and_drawn_again(damage, which, said, tmp_path, whole):
    run(tmp_path / "run")
    damage(Folder(tmp_path / "run").chunks()[which].path)
    if damage is not Path.unlink:
        with pytest.raises(StoreError, match="is damaged"):
            open_draws(tmp_path / "run").posterior["level"].values
    with pytest.warns(UserWarning, match=said):
        assert_same(go_on(tmp_path / "run"), whole)
    aside = sorted(path.name[:12] for path in (tmp_path / "run").glob("*.damaged"))
    assert aside == [
        f"chunk-{index:06d}" for index in range(which + (damage is Path.unlink), T // CHUNK)
    ]


def edited(path, change):
    """The description with a change that keeps it readable."""
    file = path / "run.json"
    words = json.loads(file.read_text())
    change(words)
    file.write_text(json.dumps(words))


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda words: words.update(num_samples=124), "run.json has changed since it was written"),
        (lambda words: words.update(thinning=3), "run.json has changed since it was written"),
        (lambda words: words.pop("sha256"), "run.json has changed since it was written"),
        (lambda words: words.update(format_version=1), "has format 1, wanted 3"),
    ],
    ids=["num_samples", "thinning", "checksum", "version"],
)
def test_a_description_that_was_edited_is_refused(change, said, tmp_path, whole):
    shutil.copytree(whole.path, tmp_path / "run")
    edited(tmp_path / "run", lambda words: None)
    assert open_draws(tmp_path / "run").finished, (
        "another layout of the same words is none of our business"
    )
    edited(tmp_path / "run", change)
    for read in (open_draws, go_on, run):
        with pytest.raises(StoreError, match=said):
            read(tmp_path / "run")


def test_a_chunk_that_cannot_be_read_is_not_damaged(whole, monkeypatch):
    def away(*_):
        raise OSError(errno.EIO, "Input/output error")

    before = sorted(Path(whole.path).iterdir())
    monkeypatch.setattr(layout.hashlib, "file_digest", away)
    with pytest.raises(StoreError, match="chunk-000000.* could not be read: Input/output error"):
        go_on(whole.path)
    assert sorted(Path(whole.path).iterdir()) == before


def test_a_full_disk_leaves_the_last_good_state(tmp_path, whole, monkeypatch):
    inner, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 9:  # run, start, two chunks: a file and its folder each
            raise OSError(errno.ENOSPC, "No space left on device")
        return inner(handle)

    monkeypatch.setattr(layout.os, "fsync", full)
    with pytest.raises(
        StoreError,
        match="No space left on device.* 48 draws per chain are safe in .* goes on from there",
    ):
        run(tmp_path / "run")
    assert open_draws(tmp_path / "run").num_samples == 48 and not list(
        (tmp_path / "run").glob(".partial*")
    )
    assert_same(go_on(tmp_path / "run"), whole)


def test_a_run_that_died_before_its_first_draw_starts_again(tmp_path, whole):
    path = run(tmp_path / "run").path
    for file in (*Path(path).glob("chunk-*"), *Path(path).glob("start-*")):
        file.unlink()
    assert open_draws(path).status == (Status.INTERRUPTED,) * CHAINS
    assert_same(go_on(path), whole)


def test_chains_that_do_not_forget_are_not_tried_again_after_a_resume(tmp_path):
    """Two stretches without convergence make the rest sequential, wherever the run was cut."""
    whole, memory = run(tmp_path / "whole", max_iterations=1), run(max_iterations=1)
    run(tmp_path / "run", max_iterations=1)
    for chunk in Folder(tmp_path / "run").chunks()[1:]:
        chunk.path.unlink()
    resumed = go_on(tmp_path / "run")
    assert_same(resumed, whole)
    assert resumed.report.fallbacks == whole.report.fallbacks == memory.report.fallbacks
    assert "from step 48 on all chains ran sequentially" in whole.report.fallbacks[-1]
    np.testing.assert_array_equal(resumed.report.num_sequential, memory.report.num_sequential)


def test_a_finished_run_is_returned_at_once(whole, monkeypatch):
    monkeypatch.setattr(streaming, "run_chains", None)
    assert go_on(whole.path).finished and run(whole.path).finished


OTHER = {
    "model": lambda: {"target": store_case.target_of(power=3)},
    "data": lambda: {"target": store_case.target_of(store_case.DATA + 1e-9)},
    "settings": lambda: {"kernel": store_case.kernel(0.36)},
    "unit": lambda: {"kernel": dataclasses.replace(store_case.kernel(), noise_scale=9.0)},
    "kernel": lambda: {"kernel": store_case.sample},
}


@pytest.mark.parametrize("field", OTHER)
def test_what_has_changed_is_refused_by_name_even_when_all_is_done(field, whole):
    said = {
        "settings": "kernel: its step is another program .*setting",
        "unit": "kernel: its noise_scale",
    }
    with pytest.raises(StoreMismatch, match=said.get(field, f"{field}: ")) as caught:
        go_on(whole.path, **OTHER[field]())
    fields = {"model", "data", "kernel", "versions", "dtype"}
    assert [name for name in fields if f"{name}: " in str(caught.value)] == [
        "kernel" if field in said else field
    ]


def warmup_of(step=0.3, scale=1.0, place=0.0):
    example = {"place": jnp.zeros(3), "level": jnp.zeros(())}
    density, data = density_of(store_case.target().logdensity, example)
    whitening = Whitening(example, jnp.zeros(4), jnp.full(4, scale))
    kernel = parametrised_kernel(KernelProgram(density, mala), data, whitening, {"step_size": step})
    positions = {"place": jnp.full((CHAINS, 3), place), "level": jnp.zeros(CHAINS)}
    return Warmup(
        kernel,
        positions,
        np.zeros(CHAINS),
        positions,
        {"step_size": step},
        whitening,
        0.8,
        0.8,
        50,
        0,
        0,
        0,
        0.0,
        (),
    )


def test_another_warmup_is_refused_and_its_builder_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(storing, "_sample_on", lambda *_: None)
    path = tmp_path / "run"
    run(path, kernel=warmup_of())
    for other in (warmup_of(step=0.31), warmup_of(scale=1.1), warmup_of(place=0.1), mala):
        with pytest.raises(StoreMismatch, match="kernel: the warm-up behind it is another one"):
            run(path, kernel=other)
    for same in (warmup_of(), mala):
        assert go_on(path, kernel=same).num_samples == 0
    next(path.glob("start-*")).unlink()
    with pytest.raises(StoreMismatch, match="the warm-up behind it"):
        go_on(path, kernel=mala)


def test_kernels_on_one_algorithm_are_judged_each_in_its_own_unit():
    algorithm = blackjax.mala(store_case.target().logdensity, 0.35)
    families = [
        program_and_params(from_blackjax(algorithm, noise_scale=unit))[0]
        for unit in (0.5, 0.5, 0.7, np.full(4, 0.5))
    ]
    assert families[0] == families[1] and hash(families[0]) == hash(families[1])
    assert families[0] != families[2] and families[0] != families[3]


INSIDE = {
    "scan": lambda inner, x: jax.lax.scan(lambda x, _: (inner(x), None), x, None, length=2)[0],
    "cond": lambda inner, x: jax.lax.cond(x[0] > 0, inner, jnp.sin, x),
    "while": lambda inner, x: jax.lax.while_loop(lambda x: x[0] > 1, inner, x),
    "checkpoint": lambda inner, x: jax.checkpoint(inner)(x),
}


@pytest.mark.parametrize("place", INSIDE)
def test_arrays_inside_loops_and_branches_are_data(place):
    def target_of(scale):
        inner = jax.jit(lambda x: x * scale)
        return Target(lambda position: -jnp.sum(INSIDE[place](inner, position) ** 2), np.zeros(3))

    one, same, other = (
        fingerprint_of(target_of(scale), np.zeros(3))
        for scale in (np.ones(3), np.ones(3), np.full(3, 2.0))
    )
    assert one == same and one["model"] == other["model"] and one["data"] != other["data"]


def test_pieces_that_stand_still_stand_still_together(memory):
    def piece(steps, longest):
        status = Status.FROZEN if longest == steps >= 10 else Status.CONVERGED
        steps, longest, frozen = (
            np.full(CHAINS, one) for one in (steps, longest, status == Status.FROZEN)
        )
        certificate = dataclasses.replace(
            without_steps(memory.certificate),
            num_steps=steps,
            longest_rejection=longest,
            frozen=frozen,
        )
        return certificate, dataclasses.replace(memory.report, status=(status,) * CHAINS)

    for pieces, wanted in (
        (((24, 24), (6, 6)), Status.FROZEN),
        (((6, 6), (6, 6)), Status.FROZEN),
        (((24, 24), (6, 5)), Status.CONVERGED),
        (((24, 23), (24, 24)), Status.CONVERGED),
    ):
        (first, begun), (then, ended) = (piece(*one) for one in pieces)
        report = join_reports(
            begun, ended, (pieces[0][0], pieces[1][0]), join_certificates(first, then)
        )
        assert report.status == (wanted,) * CHAINS


def test_a_piece_without_rejections_leaves_the_count_of_close_calls_known(memory):
    def piece(ambiguous, rejected):
        return dataclasses.replace(
            without_steps(memory.certificate),
            num_ambiguous=np.full(CHAINS, ambiguous),
            num_rejected=np.full(CHAINS, rejected),
        )

    for first, then, wanted in (
        ((2, 5), (1, 3), 3),
        ((2, 5), (-1, 0), 2),
        ((-1, 0), (1, 3), 1),
        ((-1, 0), (-1, 0), -1),
        ((2, 5), (-1, 4), -1),
    ):
        assert (join_certificates(piece(*first), piece(*then)).num_ambiguous == wanted).all()


def test_a_limit_of_memory_is_remembered_until_chunks_are_chosen(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        resuming, "_make_start", lambda store, request, *_: seen.append(request.max_bytes) or 1 / 0
    )
    path = tmp_path / "run"
    for attempt in (
        lambda: run(path, max_bytes=2**20),
        lambda: run(path, max_bytes=2**21),
        lambda: go_on(path),
    ):
        with pytest.raises(ZeroDivisionError):
            attempt()
    assert seen == [2**20, 2**21, 2**21]


@pytest.mark.parametrize("stretch", [None, 6])
def test_other_hosts_are_told_how_many_steps_fit(stretch, monkeypatch):
    said = []
    monkeypatch.setattr(
        followers.multihost_utils, "broadcast_one_to_all", lambda tree: said.append(tree) or said[0]
    )
    followers.say_end(End(np.ones(2), {}, 48, 1, stretch), 0, 96)
    assert followers.say_end(End(np.zeros(2), {}), 0, 0)[0].stretch == stretch


def test_type_versions_and_arguments_are_refused_by_name(whole, monkeypatch):
    # Data of its own: JAX remembers a captured NumPy array by identity, in the type it first had.
    target = store_case.target_of(store_case.DATA.copy())
    with (
        jax.enable_x64(False),
        pytest.raises(StoreMismatch, match="dtype: the store has 'float64', got 'float32'"),
    ):
        go_on(whole.path, target=target, kernel=store_case.kernel_of(target))
    for changes, message in (
        ({"key": 1}, "key: "),
        ({"num_samples": 96}, "num_samples: the store has 120, got 96"),
        ({"thinning": 2}, "thinning"),
        ({"solver": sequential()}, "solver"),
    ):
        with pytest.raises(StoreMismatch, match=message):
            run(whole.path, **changes)
    from partime_mcmc.storage import fingerprint

    now = fingerprint.versions()
    monkeypatch.setattr(fingerprint, "versions", lambda: now | {"jax": "0.1.0"})
    with pytest.raises(StoreMismatch, match="versions: jax was .*, is 0.1.0"):
        go_on(whole.path)


def test_two_writers_exclude_each_other(whole):
    with Folder(whole.path).locked(), pytest.raises(StoreError, match="another run is writing"):
        go_on(whole.path)
    with pytest.raises(FileNotFoundError, match="no run in"):
        resume(whole.path + "-not", store_case.target(), store_case.kernel())


def test_progress_changes_no_draw(tmp_path, whole, capsys):
    assert_same(run(tmp_path / "run", progress=progress_line), whole)
    said = capsys.readouterr().err
    assert "120/120" in said and said.count("sampling") >= 1
    for word in ("draws/s=", "evals=", "residual=", "accept="):
        assert word in said


class Exhausted:
    """A device that runs out of memory so many times."""

    def __init__(self, times):
        self.times, self.inner, self.steps = times, streaming.run_chains, []

    def __call__(self, kernel, positions, keys, steps, **more):
        self.steps.append(steps)
        if len(self.steps) <= self.times:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return self.inner(kernel, positions, keys, steps, **more)


def test_a_full_device_gets_half_as_many_steps_at_once(tmp_path, memory, monkeypatch):
    for store in (None, tmp_path / "run"):
        device = Exhausted(2)
        monkeypatch.setattr(streaming, "run_chains", device)
        draws = run(store, num_samples=CHUNK)
        monkeypatch.setattr(streaming, "run_chains", device.inner)
        assert device.steps == [24, 12, 6, 6, 6, 6]
        np.testing.assert_allclose(
            draws.load().constrained["place"] if store else draws.constrained["place"],
            np.asarray(memory.constrained["place"])[:, :CHUNK],
            atol=1e-8,
        )
        assert sum("ran out of memory" in said for said in draws.report.fallbacks) == 2
        assert np.asarray(draws.certificate.num_steps == CHUNK).all()
    monkeypatch.setattr(streaming, "run_chains", Exhausted(4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        run(num_samples=CHUNK)


def test_chunks_fit_and_divide_the_run():
    def steps(num_samples, schedule=None, max_bytes=2**30, wanted=None, chains=4, dimension=10):
        return chunk_steps(
            shooting(), schedule, num_samples, chains, dimension, 8, max_bytes, wanted
        )

    assert steps(2_500_000) == 62_500 and steps(1_000) == 1_000
    assert steps(10**7, max_bytes=2**20) * 2 * 4 * 10 * 8 * 6 <= 2**20
    assert steps(10**7, Windows(1000)) % 1000 == 0 and steps(100, wanted=24) == 24
    lean, rich = (
        chunk_steps(shooting(), None, 10**7, 4, 10, 8, 2**20, None, more) for more in (0, 10**4)
    )
    assert rich * 2 * 4 * 10**4 <= 2**20 < lean * 2 * 4 * 10**4
    for words, arguments in (
        ("schedule: ", {"schedule": Windows(10**6)}),
        ("store.chunk: ", {"wanted": 10**6}),
        ("num_chains: .* fewer chains", {"chains": 10**6, "dimension": 10**3}),
    ):
        with pytest.raises(TooLarge, match=words):
            steps(10**8, **arguments)


def test_tapes_start_anywhere():
    """The dice from step 30 on are those of the whole, whichever way keys are split."""
    kernel, keys = store_case.kernel(), jax.random.split(jax.random.key(5), CHAINS)
    positions = {"place": jnp.zeros((CHAINS, 3)), "level": jnp.zeros(CHAINS)}
    for partitionable in (True, False):
        with jax.threefry_partitionable(partitionable):
            first = begin(kernel, positions, keys, Timings())
            everything, part = (
                throw(kernel, positions, keys, steps, end)[2]
                for steps, end in ((50, None), (20, type(first)(first.carries, first.discrete, 30)))
            )
            np.testing.assert_array_equal(
                jax.random.key_data(everything.randomness)[:, 30:],
                jax.random.key_data(part.randomness),
            )


def test_strategies_go_into_files_and_foreign_names_do_not_come_out():
    for value in (
        elk(),
        Newton(Clipped(DiagonalJacobian(), 0.5)),
        AllAtOnce(),
        Status.FROZEN,
        (1, [2.5, None]),
        Tolerance(1e-9, np.arange(3.0)),
    ):
        back = codec.from_json(codec.to_json(value, "value"))
        jax.tree.map(np.testing.assert_array_equal, back, value)
        assert type(back) is type(value)
    with pytest.raises(codec.NotStorable, match="solver: got Opaque"):
        codec.to_json(type("Opaque", (), {})(), "solver")
    older = codec.encode(Tolerance(1e-9), "tolerance")
    older["fields"]["other"] = 1
    with pytest.raises(
        StoreError, match=r"holds a Tolerance with the fields \['absolute', 'other', 'relative'\]"
    ):
        codec.decode(older)
    for place in (
        "os:system",
        "partime_mcmc.storage.codec:json",
        "partime_mcmc.storage.layout:os",
    ):
        with pytest.raises(ValueError, match="a stored value names"):
            codec.decode({"function": place})


@pytest.mark.smoke
def test_a_chunk_is_a_file_that_others_read(whole):
    xarray = pytest.importorskip("xarray")
    arviz = pytest.importorskip("arviz")
    chunk = whole.chunks[1]
    with xarray.open_dataset(chunk.path, group="posterior", engine="h5netcdf") as posterior:
        np.testing.assert_array_equal(posterior["draw"], np.arange(chunk.start, chunk.stop))
        np.testing.assert_array_equal(
            posterior["place"], whole.posterior["place"][:, chunk.start : chunk.stop]
        )
    table = arviz.summary(arviz.from_netcdf(str(chunk.path)))
    assert {"level", "place[0]", "place[2]"} <= set(table.index) and np.isfinite(
        table["mean"].astype(float)
    ).all()
    with xarray.open_dataset(chunk.path, engine="h5netcdf") as root:
        found = {
            name: json.loads(root.attrs[name])
            for name in ("solver", "schedule", "tolerance", "settings")
        }
    assert codec.decode(found["solver"]) == whole.settled.solver and found["settings"] is None
    assert codec.decode(found["schedule"]) == Windows(CHUNK)
    assert codec.decode(found["tolerance"]).relative == whole.settled.tolerance.relative


def test_blocks_are_as_large_as_hdf5_takes():
    assert blocks(np.zeros((4, 24, 3))) == (4, 24, 3)
    large = blocks(np.broadcast_to(0.0, (4, 10**6, 1000)))
    assert large[0] == 4 and large[2] == 1000 and 2**30 <= np.prod(large) * 8 <= 2**31


def test_zarr(tmp_path, whole):
    pytest.importorskip("zarr")
    assert_same(run(Store(tmp_path / "run", Zarr(), CHUNK)), whole)


# --- real deaths


def begin_process(path, cache, num_samples):
    environment = dict(os.environ) | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        [sys.executable, store_case.__file__, str(path), str(num_samples)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """What one process has compiled, the next ones find."""
    return tmp_path_factory.mktemp("cache")


def kill_and_resume(tmp_path, cache, num_kills, num_samples, ending):
    """End a run by a signal at random moments and begin it again; how many draws each process left behind."""
    dice, left = random.Random(num_kills), []
    for turn in range(num_kills):
        process = begin_process(tmp_path / "run", cache, num_samples)
        # Anywhere, tracing and compilation included, or while chunks are drawn and written.
        # The lines are "begin" and one for every solved chunk; once the third is solved, the first is on the disk.
        lines, seconds = (1, 6.0) if turn % 3 == 2 else (4, 0.5)
        for _ in range(lines):
            process.stdout.readline()
        time.sleep(dice.uniform(0, seconds))
        process.send_signal(ending)
        process.wait()
        process.stdout.close()
        chunks = Folder(tmp_path / "run").chunks()
        left.append(chunks[-1].stop if chunks else 0)
    process = begin_process(tmp_path / "run", cache, num_samples)
    said, _ = process.communicate()
    assert process.returncode == 0 and "CONVERGED" in said
    return left


@pytest.mark.parametrize(
    "ending, num_kills",
    [
        (signal.SIGKILL, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in ((signal.SIGINT, 1), (signal.SIGKILL, 30), (signal.SIGINT, 30))
        ),
    ],
)
def test_killed_and_resumed_is_never_killed(ending, num_kills, tmp_path, cache):
    num_samples = CHUNK * 60 * max(1, num_kills // 3)
    left = kill_and_resume(tmp_path, cache, num_kills, num_samples, ending)
    assert 0 < left[0] < num_samples and left == sorted(left)
    assert_same(open_draws(tmp_path / "run"), run(tmp_path / "whole", num_samples))
