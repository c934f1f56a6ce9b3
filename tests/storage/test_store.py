"""Runs on disk: what is stored is what was drawn, whatever happens to the process, the disk and the files."""

import contextlib
import dataclasses
import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import store_case
from fakes import exact_path
from store_case import CHAINS, CHUNK, run

import partime_mcmc.sampling.chain_groups as chain_groups
import partime_mcmc.sampling.local as local
import partime_mcmc.sampling.sample as sampling
import partime_mcmc.storage.files as files
from partime_mcmc import AllAtOnce, elk, open_draws, resume, shooting
from partime_mcmc.compile_cache import Timings
from partime_mcmc.diagnostics.arviz import summary_table
from partime_mcmc.diagnostics.values import escaped, original
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
from partime_mcmc.linearize import Clipped, DiagonalJacobian
from partime_mcmc.sampling.chunk import merge_certificates, merge_reports, without_steps
from partime_mcmc.sampling.executor import RunRecorder
from partime_mcmc.sampling.memory import chunk_steps
from partime_mcmc.sampling.plan import SampleArguments
from partime_mcmc.sampling.progress import progress_line, quiet
from partime_mcmc.sampling.randomness import begin, draw_tapes
from partime_mcmc.sampling.target import Target
from partime_mcmc.solvers import Newton
from partime_mcmc.storage import serialize
from partime_mcmc.storage.files import StoreError
from partime_mcmc.storage.saved_run import StoreMismatch, fingerprint_of
from partime_mcmc.storage.store import Folder, Store, draws_per_file, kept_steps
from partime_mcmc.storage.stored_draws import concat_draws
from partime_mcmc.storage.streaming_statistics import Fold
from partime_mcmc.storage.zarr_files import file_shape
from partime_mcmc.validation import TooLarge
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


def checkpoints(path):
    return sorted(Path(path).glob("chunk-*.npz"))


def assert_same(draws, wanted):
    """Equal arrays, to the last bit: draws, what the kernel reports, certificate and streaming statistics."""
    mine, theirs = draws.load(), wanted.load()
    for group in ("constrained", "info"):
        jax.tree.map(np.testing.assert_array_equal, getattr(mine, group), getattr(theirs, group))
    jax.tree.map(np.testing.assert_array_equal, draws.certificate, wanted.certificate)
    assert draws.status == wanted.status
    jax.tree.map(
        np.testing.assert_array_equal, draws.statistics.to_arrays(), wanted.statistics.to_arrays()
    )


@pytest.mark.smoke
def test_what_is_stored_is_what_stays_in_memory(whole, memory):
    assert (
        whole.finished and len(checkpoints(whole.path)) == T // CHUNK and exact_path(whole) is whole
    )
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
        whole.statistics.mean()[:, 1:], np.mean(memory.constrained["place"], axis=1)
    )
    assert [row["name"] for row in summary_table(loaded)] == [
        row["name"] for row in whole.summary()
    ]


@pytest.mark.smoke
def test_draws_are_read_where_they_are_looked_at(whole, memory, monkeypatch):
    import partime_mcmc.storage.zarr_files as zarr_files

    place = np.asarray(memory.constrained["place"])
    lazy = open_draws(whole.path).posterior["place"]
    assert lazy.dims == ("chain", "draw", "site")
    read, inner = [], zarr_files.read_file
    monkeypatch.setattr(
        zarr_files, "read_file", lambda path, digest: read.append(path) or inner(path, digest)
    )
    np.testing.assert_array_equal(lazy.isel(draw=slice(20, 30), site=1), place[:, 20:30, 1])
    assert sorted(path.name for path in read) == ["c.0.0.0", "c.0.1.0"]
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
    assert (thin.certificate.num_steps == T).all() and thin.statistics.num_draws == T
    np.testing.assert_allclose(thin.statistics.carries["sum"], np.sum(memory.constrained["level"]))
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
                self.interrupt()

        yield count

    def interrupt(self):
        # No signal: workers of a parallel test run ignore it.
        raise KeyboardInterrupt


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
    assert np.asarray(draws.certificate.certified).all() and draws.state.num_steps == 72


def test_termination_is_an_interrupt(tmp_path, whole, memory):
    class Terminating(Interrupting):
        def interrupt(self):
            signal.raise_signal(signal.SIGTERM)

    part = run(progress=Terminating(70))
    assert part.num_samples == 72 and set(part.status) == {Status.INTERRUPTED}
    np.testing.assert_array_equal(
        part.constrained["place"], np.asarray(memory.constrained["place"])[:, :72]
    )
    stored = run(tmp_path / "run", progress=Terminating(70))
    assert 48 <= stored.num_samples <= 72 and set(stored.status) == {Status.INTERRUPTED}
    assert_same(go_on(tmp_path / "run"), whole)
    # Outside a run the process ends as it would have without this package, and an answer of its own is kept.
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    heard = []
    try:
        signal.signal(signal.SIGTERM, lambda *_: heard.append(True))
        assert run(progress=Terminating(70)).num_samples == T and heard
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def test_an_interrupt_while_draws_are_certified_loses_none(tmp_path, whole, memory, monkeypatch):
    inner, calls = local._certified, []

    def certified(*rest):
        calls.append(rest)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return inner(*rest)

    monkeypatch.setattr(local, "_certified", certified)
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
    inner, groups = local.draw_tapes, []

    def recorded(*rest):
        groups.append(rest[5])
        return inner(*rest)

    monkeypatch.setattr(local, "draw_tapes", recorded)
    monkeypatch.setattr(chain_groups, "num_cores", lambda: 2)
    complete = run(tmp_path / "complete")
    run(tmp_path / "run", progress=Interrupting(70))
    monkeypatch.setattr(chain_groups, "num_cores", lambda: 1)
    assert_same(go_on(tmp_path / "run"), complete)
    assert set(groups) == {2}


def test_an_interrupt_is_heard_when_all_chains_are_lost(tmp_path, memory, monkeypatch):
    inner = RunRecorder.record

    def record(self, *rest):
        self.status = [Status.NONFINITE] * CHAINS
        return inner(self, *rest)

    monkeypatch.setattr(RunRecorder, "record", record)
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


def swap_with_next(path):
    head, number, tail = re.match(r"(c\.0\.)(\d+)(.*)", path.name).groups()
    other = path.with_name(f"{head}{int(number) + 1}{tail}")
    mine = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(mine)


def rename_to_last(path):
    path.rename(path.with_name("c.0.99.0"))


def duplicate_of_first(path):
    path.write_bytes(path.with_name("c.0.0.0").read_bytes())


DAMAGE = {
    "truncated": truncate,
    "flipped": flip,
    "missing": Path.unlink,
    "swapped": swap_with_next,
    "renamed": rename_to_last,
    "duplicated": duplicate_of_first,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_draws_is_found_and_drawn_again(damage, tmp_path, whole):
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    DAMAGE[damage](path / "draws.zarr" / "posterior" / "place" / "c.0.2.0")
    draws = open_draws(path)
    np.testing.assert_array_equal(draws.posterior["level"], whole.posterior["level"])
    for read in (lambda: draws.posterior["place"].values, draws.load):
        with pytest.raises(StoreError, match=r"place/c\.0\.[23]\.0 is (missing|damaged)"):
            read()
    said = r"place/c\.0\.2\.0 is .*: 3 chunks dropped, and the run goes on from step 48"
    with pytest.warns(UserWarning, match=said):
        assert_same(go_on(path), whole)
    assert len(checkpoints(path / "damaged")) == 3 and len(checkpoints(path)) == T // CHUNK
    assert_same(go_on(path), whole)


@pytest.mark.parametrize(
    "damage, which, said",
    [
        (truncate, 4, "000004.* is damaged.*: 1 chunk dropped, and the run goes on from step 96"),
        (flip, 2, "000002.* is damaged.*: 3 chunks dropped, and the run goes on from step 48"),
        (
            Path.unlink,
            2,
            "checkpoint 2 is missing: 2 chunks dropped, and the run goes on from step 48",
        ),
    ],
)
def test_a_damaged_checkpoint_is_found_and_its_chunk_drawn_again(
    damage, which, said, tmp_path, whole
):
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    damage(checkpoints(path)[which])
    if which == 4:
        with pytest.raises(StoreError, match="is damaged"):
            open_draws(path)
    with pytest.warns(UserWarning, match=said):
        assert_same(go_on(path), whole)


def test_a_checkpoint_of_another_run_is_no_checkpoint_of_this_one(tmp_path, whole):
    path, other = tmp_path / "run", run(tmp_path / "other", key=1)
    shutil.copytree(whole.path, path)
    shutil.copy(checkpoints(other.path)[1], checkpoints(path)[1])
    with pytest.raises(StoreError, match="does not follow"):
        open_draws(path)
    with pytest.warns(UserWarning, match="000001.* does not follow .* goes on from step 24"):
        assert_same(go_on(path), whole)
    shutil.copy(checkpoints(path)[3], checkpoints(path)[4])
    with pytest.raises(StoreError, match="it holds checkpoint 3"):
        open_draws(path)
    # All files of draws and all checkpoints agree among themselves, and are of another run.
    shutil.rmtree(path)
    shutil.copytree(other.path, path)
    for name in ("run.json", "plan.npz"):
        shutil.copy(Path(whole.path) / name, path)
    with pytest.raises(StoreError, match="000000.* does not follow"):
        open_draws(path)
    with pytest.warns(UserWarning, match="goes on from step 0"):
        assert_same(go_on(path), whole)
    # The plan holds the keys of all chains.
    shutil.copy(Path(other.path) / "plan.npz", path)
    with pytest.raises(StoreError, match=r"plan\.npz is not the plan of the run"):
        go_on(path)


EXTRA = {
    "next": lambda last: last.with_name("chunk-000005-000000000144.npz"),
    "beside": lambda last: last.with_name("chunk-000004-000000000144.npz"),
    "later": lambda last: last.with_name("chunk-000007-000000000192.npz"),
}


@pytest.mark.parametrize("place", EXTRA)
def test_an_extra_chunk_is_noticed(place, tmp_path, whole):
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    last = checkpoints(path)[-1]
    shutil.copy(last, EXTRA[place](last))
    with pytest.raises(StoreError, match="does not follow|it holds checkpoint 4"):
        open_draws(path)
    with pytest.warns(UserWarning, match="1 chunk dropped, and the run goes on from step 120"):
        assert_same(go_on(path), whole)


def test_what_was_not_committed_is_not_read_and_drawn_again(tmp_path, whole):
    """A run that died between the last file of draws and its checkpoint."""
    path = tmp_path / "run"
    shutil.copytree(whole.path, path)
    checkpoints(path)[-1].unlink()
    draws = open_draws(path)
    assert draws.num_samples == 96 and draws.posterior.sizes["draw"] == 96
    np.testing.assert_array_equal(draws.posterior["place"], whole.posterior["place"][:, :96])
    (path / "draws.zarr" / ".partial-c").write_bytes(b"half")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(go_on(path), whole)


def test_files_that_do_not_end_with_chunks_are_written_again(tmp_path, memory):
    """Thinning by 7 of 120: kept draws do not divide into chunks, and one file takes those of all."""
    path = tmp_path / "run"
    kept = kept_steps(0, T, 7, T)
    part = run(path, thinning=7, progress=Interrupting(70))
    place = np.asarray(memory.constrained["place"])
    np.testing.assert_array_equal(part.posterior["place"], place[:, kept[kept < 48]])
    # As if it had died after writing the next draws.
    file = path / "draws.zarr" / "posterior" / "place" / "c.0.0.0"
    flip(file)
    np.testing.assert_array_equal(part.load().constrained["place"], place[:, kept[kept < 48]])
    done = go_on(path)
    np.testing.assert_array_equal(done.posterior["place"], place[:, kept])
    np.testing.assert_array_equal(part.posterior["place"], place[:, kept[kept < 48]])
    checkpoints(path)[-1].unlink()
    np.testing.assert_array_equal(open_draws(path).posterior["place"], place[:, kept[kept < 96]])
    assert_same(go_on(path), done)


def test_draws_per_file():
    assert draws_per_file(62_500, 1, 10**7 + 1) == 62_500, "the last chunk alone is shorter"
    assert draws_per_file(62_500, 10, 10**7) == 6_250
    assert draws_per_file(62_500, 10, 10**7 + 1) == 781
    assert draws_per_file(24, 50, 120) == 256


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
        (
            lambda words: words.update(format_version=3),
            "has format 3, wanted 5: read it with partime_mcmc 0.1.0",
        ),
        (
            lambda words: words.update(format_version=4),
            "has format 4, wanted 5: read it with the version of partime_mcmc that wrote it",
        ),
    ],
    ids=["num_samples", "thinning", "checksum", "version", "unreleased version"],
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


def test_a_description_that_lacks_a_field_names_it(tmp_path, whole):
    shutil.copytree(whole.path, tmp_path / "run")
    words = Folder(whole.path).read_run()
    Folder(tmp_path / "run").write_run({name: words[name] for name in words if name != "thinning"})
    for read in (open_draws, go_on):
        with pytest.raises(
            StoreError, match=r"run\.json is damaged: it lacks 'thinning'|does not follow"
        ):
            read(tmp_path / "run")


@pytest.mark.parametrize("path", ["", "a\0b"])
def test_a_path_that_is_none_is_refused(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for call in (run, open_draws, go_on, lambda path: run(Store(path))):
        with pytest.raises(ValueError, match="store: got .* wanted the path of a folder"):
            call(path)
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_read_is_not_damaged(whole, monkeypatch):
    def away(*_):
        raise OSError(errno.EIO, "Input/output error")

    before = sorted(Path(whole.path).rglob("*"))
    inner = Path.read_bytes
    monkeypatch.setattr(
        Path, "read_bytes", lambda self: away() if self.name == "c.0.0.0" else inner(self)
    )
    with pytest.raises(StoreError, match=r"c\.0\.0\.0 could not be read: Input/output error"):
        go_on(whole.path)
    assert sorted(Path(whole.path).rglob("*")) == before


def no_space(handle):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("failing", ["c.0.2.0", "chunk-000002"])
def test_a_full_disk_leaves_the_last_good_state(failing, tmp_path, whole, monkeypatch):
    from partime_mcmc.storage import store, zarr_files

    inner = files.write_file

    def full(path, data, **options):
        if failing in path.name:
            with monkeypatch.context() as patch:
                patch.setattr(files.os, "fsync", no_space)
                inner(path, data, **options)
        else:
            inner(path, data, **options)

    for module in (store, zarr_files):
        monkeypatch.setattr(module, "write_file", full)
    message = "No space left on device.* 48 draws per chain are safe in .* goes on from there"
    with pytest.raises(StoreError, match=message):
        run(tmp_path / "run")
    assert open_draws(tmp_path / "run").num_samples == 48
    assert not list((tmp_path / "run").rglob(".partial*"))
    monkeypatch.undo()
    assert_same(go_on(tmp_path / "run"), whole)


def test_a_run_that_died_before_its_first_draw_starts_again(tmp_path, whole):
    path = run(tmp_path / "run").path
    for file in (*checkpoints(path), Path(path) / "plan.npz"):
        file.unlink()
    assert open_draws(path).status == (Status.INTERRUPTED,) * CHAINS
    assert_same(go_on(path), whole)


def test_chains_that_do_not_forget_are_not_tried_again_after_a_resume(tmp_path):
    """Two stretches without convergence make the rest sequential, wherever the run was cut."""
    whole, memory = run(tmp_path / "whole", max_iterations=1), run(max_iterations=1)
    run(tmp_path / "run", max_iterations=1)
    for file in checkpoints(tmp_path / "run")[1:]:
        file.unlink()
    resumed = go_on(tmp_path / "run")
    assert_same(resumed, whole)
    assert resumed.report.fallbacks == whole.report.fallbacks == memory.report.fallbacks
    assert "from step 48 on all chains ran sequentially" in whole.report.fallbacks[-1]
    np.testing.assert_array_equal(resumed.report.num_sequential, memory.report.num_sequential)


def test_a_finished_run_is_returned_at_once(whole, monkeypatch):
    monkeypatch.setattr(local, "solve_windows", None)
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
        1.0,
        True,
    )


def test_another_warmup_is_refused_and_its_builder_will_do(tmp_path, monkeypatch):
    monkeypatch.setattr(sampling.LocalExecutor, "chunks", lambda *_: ())
    path = tmp_path / "run"
    run(path, kernel=warmup_of())
    for other in (warmup_of(step=0.31), warmup_of(scale=1.1), warmup_of(place=0.1), mala):
        with pytest.raises(StoreMismatch, match="kernel: the warm-up behind it is another one"):
            run(path, kernel=other)
    for same in (warmup_of(), mala):
        assert go_on(path, kernel=same).num_samples == 0
    (path / "plan.npz").unlink()
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
        report = merge_reports(
            begun, ended, (pieces[0][0], pieces[1][0]), merge_certificates(first, then)
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
        assert (merge_certificates(piece(*first), piece(*then)).num_ambiguous == wanted).all()


def test_a_limit_of_memory_is_remembered_until_chunks_are_chosen(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        sampling, "prepare", lambda arguments, *_: seen.append(arguments.max_bytes) or 1 / 0
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


def test_type_versions_and_arguments_are_refused_by_name(whole, monkeypatch):
    # Data of its own: JAX remembers a captured NumPy array by identity, in the type it first had.
    target = store_case.target_of(store_case.DATA.copy())
    with (
        jax.enable_x64(False),
        pytest.raises(StoreMismatch, match="dtype: the store has 'float64', got 'float32'"),
    ):
        go_on(whole.path, target=target, kernel=store_case.kernel_of(target))
    for changes, message in (
        ({"key": 1}, "key: it is another one"),
        ({"num_samples": 96}, "num_samples: the store has 120, got 96"),
        ({"thinning": 2}, "thinning"),
        ({"solver": sequential()}, "solver"),
    ):
        with pytest.raises(StoreMismatch, match=message):
            run(whole.path, **changes)
    from partime_mcmc.storage import saved_run

    now = saved_run.versions()
    monkeypatch.setattr(saved_run, "versions", lambda: now | {"jax": "0.1.0"})
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
        self.times, self.inner, self.steps = times, local.solve_windows, []

    def __call__(self, plan, state, steps, *rest):
        self.steps.append(steps)
        if len(self.steps) <= self.times:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return self.inner(plan, state, steps, *rest)


def test_a_full_device_gets_half_as_many_steps_at_once(tmp_path, memory, monkeypatch):
    for store in (None, tmp_path / "run"):
        device = Exhausted(2)
        monkeypatch.setattr(local, "solve_windows", device)
        draws = run(store, num_samples=CHUNK)
        monkeypatch.setattr(local, "solve_windows", device.inner)
        assert device.steps == [24, 12, 6, 6, 6, 6]
        np.testing.assert_allclose(
            draws.constrained["place"],
            np.asarray(memory.constrained["place"])[:, :CHUNK],
            atol=1e-8,
        )
        assert sum("ran out of memory" in said for said in draws.report.fallbacks) == 2
        assert np.asarray(draws.certificate.num_steps == CHUNK).all()
    monkeypatch.setattr(local, "solve_windows", Exhausted(4))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        run(num_samples=CHUNK)


def test_an_interrupt_after_a_whole_chunk_in_memory_keeps_that_chunk(memory, monkeypatch):
    class Interrupted(Exhausted):
        def __call__(self, *given):
            if len(self.steps) == 4:
                raise KeyboardInterrupt
            return super().__call__(*given)

    device = Interrupted(2)
    monkeypatch.setattr(local, "solve_windows", device)
    try:
        draws = run(num_samples=CHUNK)
    except KeyboardInterrupt:
        # By itself it would end the whole test run.
        pytest.fail("the finished chunk was lost")
    assert device.steps == [24, 12, 6, 6] and draws.num_samples == draws.plan["num_samples"] == 12
    assert set(draws.status) == {Status.INTERRUPTED} and not draws.finished
    np.testing.assert_allclose(
        draws.constrained["place"], np.asarray(memory.constrained["place"])[:, :12], atol=1e-8
    )
    # Before the first chunk is done there is nothing to keep.
    with pytest.raises(KeyboardInterrupt):
        run(num_samples=CHUNK)


def test_chunks_fit_and_divide_the_run():
    def steps(
        num_samples,
        schedule=Windows(1),
        max_bytes=2**30,
        wanted=None,
        chains=4,
        dimension=10,
        values=0,
    ):
        target = Target(
            lambda x: -jnp.sum(x**2),
            np.zeros(dimension),
            constrain=lambda x: {"values": jnp.zeros(values)},
        )
        asked = SampleArguments(
            front="sample",
            target=target,
            kernel=mala,
            starts=None,
            warmup_key=None,
            chain_keys=np.zeros(chains),
            key_words=[],
            key_impl="",
            num_samples=num_samples,
            solver=shooting(),
            schedule=schedule,
            max_bytes=max_bytes,
            store=Store("run", wanted),
        )
        return chunk_steps(asked)

    assert steps(2_500_000) == 62_500 and steps(1_000) == 1_000
    assert steps(10**7, max_bytes=2**20) * 2 * 4 * 10 * 8 * 6 <= 2**20
    assert steps(10**7, Windows(1000)) % 1000 == 0 and steps(100, wanted=24) == 24
    lean, rich = (steps(10**7, values=values, max_bytes=2**20) for values in (0, 1250))
    assert rich * 2 * 4 * 10**4 <= 2**20 < lean * 2 * 4 * 10**4
    for words, arguments in (
        ("schedule: ", {"schedule": Windows(10**6)}),
        ("store.chunk: ", {"wanted": 10**6}),
        ("num_chains: .* fewer chains", {"chains": 10**6, "dimension": 10**3}),
    ):
        with pytest.raises(TooLarge, match=words):
            steps(10**8, **arguments)


def test_tapes_start_anywhere():
    """The random numbers from step 30 on are those of the whole, whichever way keys are split."""
    kernel, keys = store_case.kernel(), jax.random.split(jax.random.key(5), CHAINS)
    positions = {"place": jnp.zeros((CHAINS, 3)), "level": jnp.zeros(CHAINS)}
    for partitionable in (True, False):
        with jax.threefry_partitionable(partitionable):
            first = begin(kernel, positions, keys, Timings())
            everything, later = (
                draw_tapes(kernel, keys, state, steps, Timings())[1]
                for steps, state in ((50, first), (20, dataclasses.replace(first, num_steps=30)))
            )
            np.testing.assert_array_equal(
                jax.random.key_data(everything.randomness)[:, 30:],
                jax.random.key_data(later.randomness),
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
        back = serialize.decode(json.loads(json.dumps(serialize.encode(value, "value"))))
        jax.tree.map(np.testing.assert_array_equal, back, value)
        assert type(back) is type(value)
    with pytest.raises(serialize.NotStorable, match="solver: got Opaque"):
        serialize.encode(type("Opaque", (), {})(), "solver")
    older = serialize.encode(Tolerance(1e-9), "tolerance")
    older["fields"]["other"] = 1
    with pytest.raises(
        StoreError, match=r"holds a Tolerance with the fields \['absolute', 'other', 'relative'\]"
    ):
        serialize.decode(older)
    for place in (
        "os:system",
        "partime_mcmc.storage.serialize:json",
        "partime_mcmc.storage.files:os",
    ):
        with pytest.raises(ValueError, match="a stored value names"):
            serialize.decode({"function": place})


@pytest.mark.smoke
def test_what_another_program_keeps_in_the_folder_is_not_touched(tmp_path):
    theirs = tmp_path / "results" / "draws.zarr" / "zarr.json"
    theirs.parent.mkdir(parents=True)
    theirs.write_text("{}")
    with pytest.raises(StoreError, match="choose another folder"):
        run(tmp_path / "results", num_samples=CHUNK)
    assert theirs.read_text() == "{}"

    run(tmp_path / "run", num_samples=CHUNK)
    model = tmp_path / "run" / "chunk-best.npz"
    model.write_bytes(b"of another program")
    draws = go_on(tmp_path / "run")
    assert draws.finished and model.read_bytes() == b"of another program"
    # Without the description of the run its draws are nobody's.
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(StoreError, match="choose another folder"):
        run(tmp_path / "run", num_samples=CHUNK)


def test_reading_keeps_nothing(whole):
    first = whole.posterior["place"]
    assert isinstance(first.values, np.ndarray) and not first.variable._in_memory


def test_others_read_the_group(whole):
    xarray, arviz = pytest.importorskip("xarray"), pytest.importorskip("arviz")
    path = whole.folder.draws
    with xarray.open_zarr(path, group="posterior", consolidated=False, chunks=None) as posterior:
        np.testing.assert_array_equal(posterior["draw"], np.arange(T))
        np.testing.assert_array_equal(posterior["chain"], np.arange(CHAINS))
        np.testing.assert_array_equal(posterior["place"], whole.posterior["place"])
        assert posterior["place"].dims == ("chain", "draw", "site")
    table = arviz.summary(whole.to_arviz())
    assert {"level", "place[0]", "place[2]"} <= set(table.index) and np.isfinite(
        table["mean"].astype(float)
    ).all()
    zarr = pytest.importorskip("zarr")
    attributes = zarr.open_group(path, mode="r").attrs
    solver, schedule, tolerance = (
        serialize.decode(attributes[name]) for name in ("solver", "schedule", "tolerance")
    )
    choices = whole.saved_plan["choices"]
    assert solver == choices["solver"] and schedule == Windows(CHUNK)
    assert tolerance.relative == choices["tolerance"].relative


def test_others_see_what_is_committed_while_the_run_goes_on(tmp_path):
    xarray = pytest.importorskip("xarray")
    part = run(tmp_path / "run", progress=Interrupting(70))
    path = part.folder.draws
    with xarray.open_zarr(path, group="posterior", consolidated=False, chunks=None) as posterior:
        assert posterior.sizes["draw"] == part.num_samples == 48


def test_files_are_not_too_large():
    assert file_shape([4, 24, 3], 8) == (4, 24, 3)
    large = file_shape([4, 10**6, 1000], 8)
    assert large[0] == 4 and large[2] == 1000 and 2**27 <= np.prod(large) * 8 <= 2**28
    assert file_shape([4, 24, 0], 8) == (4, 24, 1)


def test_any_name_can_be_that_of_a_value(tmp_path):
    names = ("a/b", "a%2Fb", ".", "..", "", "%", "zarr.json", "__x", "µ θ")
    assert [original(escaped(name)) for name in names] == list(names)
    assert len({escaped(name) for name in names}) == len(names)
    target = Target(
        store_case.target().logdensity,
        store_case.target().initial,
        constrain=lambda position: {name: position["level"] + i for i, name in enumerate(names)},
    )
    draws = run(tmp_path / "run", target=target, kernel=store_case.kernel_of(target))
    assert set(draws.posterior.data_vars) == set(names)
    for i, name in enumerate(names):
        np.testing.assert_array_equal(
            draws.posterior[name], np.asarray(draws.posterior["a/b"]) + i, strict=False
        ) if i == 0 else np.testing.assert_allclose(
            draws.posterior[name], draws.posterior["a/b"] + i
        )
    assert set(open_draws(tmp_path / "run").load().constrained) == set(names)


def test_values_that_are_all_zero_are_written(tmp_path):
    """Zarr leaves out what is nothing but its fill value, unless it is told not to."""
    target = Target(
        store_case.target().logdensity,
        store_case.target().initial,
        constrain=lambda position: {
            "nothing": 0 * position["level"],
            "no": position["level"] > 1e9,
        },
    )
    kernel = store_case.kernel_of(target)
    run(tmp_path / "run", target=target, kernel=kernel, progress=Interrupting(70))
    draws = go_on(tmp_path / "run", target=target, kernel=kernel)
    assert (draws.posterior["nothing"].values == 0).all()
    assert draws.posterior["no"].dtype == bool and not draws.posterior["no"].values.any()


def test_runs_that_were_kept_apart_are_opened_together(whole, memory, tmp_path):
    other = run(tmp_path / "other", key=1)
    tree = concat_draws([whole, other, memory])
    place = tree["posterior"]["place"]
    assert place.shape == (3 * CHAINS, T, 3) and list(place["chain"]) == list(range(3 * CHAINS))
    np.testing.assert_array_equal(place[CHAINS : 2 * CHAINS], other.posterior["place"])
    np.testing.assert_array_equal(place[2 * CHAINS :], memory.constrained["place"])
    assert tree["sample_stats"]["residual"].shape == (3 * CHAINS, T)
    with pytest.raises(ValueError, match="draws: got none"):
        concat_draws([])


def test_stored_draws_have_what_draws_in_memory_have(whole, memory):
    for name in ("certificate", "report", "plan", "warmup", "dims", "names", "status"):
        assert hasattr(whole, name), name
    assert whole.positions is None and whole.num_chains == memory.num_chains == CHAINS
    assert whole.plan == memory.plan and set(whole.info) == set(memory.info) | {"accepted"}
    np.testing.assert_array_equal(whole.constrained["place"], memory.constrained["place"])
    assert whole.state.num_steps == memory.state.num_steps
    jax.tree.map(
        np.testing.assert_array_equal,
        whole.state.carries,
        jax.tree.leaves(memory.state.carries),
    )
    np.testing.assert_allclose(
        whole.mean_acceptance, np.mean(memory.info["acceptance_rate"], axis=1)
    )
    assert len(repr(whole)) < 300 + len(whole.path) and repr(whole).count("\n") < 2


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
        left.append(
            open_draws(tmp_path / "run").num_samples if Folder(tmp_path / "run").holds_run else 0
        )
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
