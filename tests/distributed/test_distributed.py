"""Many devices give what one gives: eight forced ones in a process of their own, and real processes over loopback.

The path is compared with the sequential one in float64 to 1e-10: shards add up in another order, over at most some hundred
steps, and a path may differ by its tolerance times what a recurrence makes of it.
"""

import argparse
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from partime_mcmc import cli, open_draws
from partime_mcmc.distributed import hosts
from partime_mcmc.storage.files import PARTIAL, StoreError

HERE = Path(__file__).parent
# As in `conftest.py`: what is compiled here runs once.
FAST = {"XLA_FLAGS": os.environ["XLA_FLAGS"]}
# JAX ends the others once heartbeats are missed, 5 s here; the rest is for ending and a busy machine.
DEADLINE = 5 + 5 + 20


def environment():
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in ("XLA_FLAGS", "JAX_PLATFORMS")
    }
    return {
        **kept,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), str(HERE)]),
    }


@pytest.mark.parametrize(
    "options", [(), pytest.param(("--all",), marks=pytest.mark.slow)], ids=["checks", "all"]
)
def test_eight_devices(options):
    done = subprocess.run(
        [sys.executable, HERE / "distributed_checks.py", *options],
        capture_output=True,
        text=True,
        env={**environment(), **FAST},
        timeout=3000,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("passed") >= 9


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def start(num_hosts, what):
    port = free_port()
    return [
        subprocess.Popen(
            [
                sys.executable,
                HERE / "distributed_hosts.py",
                str(host),
                str(num_hosts),
                str(port),
                what,
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        for host in range(num_hosts)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_agree_with_one_device(num_hosts):
    for host in start(num_hosts, "everything"):
        printed, errors = host.communicate(timeout=1200)
        assert host.returncode == 0 and "agreed" in printed, printed + errors[-3000:]


@pytest.mark.parametrize(
    "lost, how",
    [
        (1, signal.SIGTERM),
        pytest.param(1, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
    ],
)
def test_hosts_agree_and_all_end_when_one_is_lost(lost, how):
    both = start(2, "wait")
    try:
        for host in both:
            # JAX's runtime prints lines, too.
            assert any("agreed" in line for line in host.stdout), host.stderr.read()[-3000:]
        begin = time.monotonic()
        both[lost].send_signal(how)
        both[1 - lost].communicate(timeout=60)
        assert time.monotonic() - begin < DEADLINE
        assert both[1 - lost].returncode != 0
        assert both[lost].wait(timeout=5) == -how
    finally:
        for host in both:
            host.kill()
            host.communicate()


def test_hosts_that_ask_for_different_things_end_with_an_error_that_names_them():
    for host in start(2, "differ"):
        _, errors = host.communicate(timeout=120)
        assert host.returncode == 1, errors
        assert "hosts ask for different things: num_samples (here " in errors, errors


@pytest.mark.parametrize("num_hosts", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_first_host_writes_what_one_alone_writes(num_hosts, tmp_path):
    for host in start(num_hosts, f"together:{tmp_path}/run"):
        printed, errors = host.communicate(timeout=600)
        assert host.returncode == 0 and "agreed" in printed, printed + errors[-3000:]
    assert not [path.name for path in (tmp_path / "run").rglob("*") if PARTIAL in path.name]


@pytest.mark.slow
@pytest.mark.parametrize("num_hosts", [1, 2])
def test_a_damaged_chunk_is_drawn_again_by_any_number_of_hosts(num_hosts, tmp_path):
    folder = tmp_path / "run"
    for host in start(2, str(folder)):
        _, errors = host.communicate(timeout=600)
        assert host.returncode == 0, errors
    assert num_chunks(folder) == 32
    broken = max(folder.glob("draws.zarr/posterior/x/**/*"), key=lambda path: path.stat().st_size)
    broken.write_bytes(broken.read_bytes()[:-100])
    with pytest.raises(StoreError, match="is damaged"):
        _ = open_draws(folder).posterior["x"].values
    for host in start(num_hosts, str(folder)):
        _, errors = host.communicate(timeout=600)
        assert host.returncode == 0, errors
    assert num_chunks(folder) == 32 and open_draws(folder).posterior["x"].values.shape[1] == 4096
    assert list((folder / "damaged").glob("checkpoint*"))


def num_chunks(folder):
    """Of a stored run, as far as they are committed."""
    return len(list(folder.glob("chunk-*.npz")))


@pytest.mark.slow
def test_a_stored_run_that_lost_a_host_goes_on_with_one(tmp_path):
    folder = tmp_path / "run"
    both = start(2, str(folder))
    try:
        begin = time.monotonic()
        while num_chunks(folder) < 3 and time.monotonic() - begin < 600:
            assert both[0].poll() is None, both[0].communicate()
            time.sleep(0.02)
        both[1].send_signal(signal.SIGKILL)
        both[0].communicate(timeout=DEADLINE)
        assert both[0].returncode != 0
    finally:
        for host in both:
            host.kill()
            host.communicate()
    assert 3 <= num_chunks(folder) < 32
    (alone,) = start(1, str(folder))
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    assert num_chunks(folder) == 32


def by_hand(host):
    return {}, ["--host-id", str(host), "--num-hosts", "2", "--coordinator"]


def by_slurm(host):
    """What `srun` would set; JAX takes the port from the number of the job."""
    variables = {
        "JOB_ID": os.getpid(),
        "STEP_NODELIST": "localhost",
        "NTASKS": 2,
        "STEP_NUM_TASKS": 2,
        "STEP_NUM_NODES": 1,
        "PROCID": host,
        "LOCALID": host,
    }
    return {f"SLURM_{name}": str(value) for name, value in variables.items()}, []


@pytest.mark.slow
@pytest.mark.parametrize("launch", [by_hand, by_slurm])
def test_one_command_on_two_hosts(launch, tmp_path):
    (tmp_path / "model.py").write_text(
        "import jax.numpy as jnp\nfrom partime_mcmc import Target\n"
        "normal = Target(lambda x: -0.5 * jnp.sum(x**2), jnp.zeros(2))\n"
    )
    command = [
        sys.executable,
        "-m",
        "partime_mcmc",
        "sample",
        "model.py:normal",
        "--kernel",
        "mala",
        "--num-samples",
        "64",
        "--num-chains",
        "2",
        "--num-warmup",
        "20",
        "--store",
        "run",
        "--quiet",
    ]
    port, both = free_port(), []
    for host in range(2):
        variables, options = launch(host)
        options = [*options, f"127.0.0.1:{port}"] if options else []
        both.append(
            subprocess.Popen(
                [*command, *options],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env={**environment(), **FAST, **variables},
                cwd=tmp_path,
            )
        )
    (printed, errors), (nothing, more) = (host.communicate(timeout=600) for host in both)
    assert [host.returncode for host in both] == [0, 0], errors + more
    assert "on 2 cpu device(s)" in printed
    # What remains is printed by the library underneath, outside Python.
    assert all(line.startswith("[Gloo]") for line in nothing.splitlines()), nothing
    draws = open_draws(tmp_path / "run")
    assert (
        draws.finished
        and draws.posterior["x"].shape == (2, 64, 2)
        and draws.certificate.certified.all()
    )


def device_options(**given):
    """Options of the command line that name devices."""
    none = dict.fromkeys(("coordinator", "num_hosts", "host_id"))
    flags = dict.fromkeys(("all_devices", "cluster", "alone", "traceback"), False)
    return argparse.Namespace(**none | flags | given)


@pytest.mark.parametrize(
    "environment, together",
    [
        ({}, False),
        ({"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"SLURM_STEP_NUM_TASKS": "4"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, False),
    ],
)
def test_tasks_of_a_cluster_are_one_run_unless_they_are_to_be_alone(
    environment, together, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.started_together(environment) == together
    joined = []
    monkeypatch.setattr(
        cli, "hosts", lambda *given: joined.append(given) or contextlib.nullcontext()
    )
    for alone in (False, True):
        with cli.machines(device_options(alone=alone)):
            pass
    assert joined == [(None, None, None)] * together


def test_two_ways_to_name_hosts_are_refused():
    with (
        pytest.raises(ValueError, match="wanted at most one"),
        cli.machines(device_options(alone=True, cluster=True)),
    ):
        raise AssertionError


@pytest.mark.parametrize(
    "given, error, message",
    [
        (("10.0.0.1:1234",), ValueError, "wanted all three"),
        (("10.0.0.1", 2, 0), ValueError, "must be HOST:PORT"),
        (("10.0.0.1:1234", 2, 2), ValueError, "host_id must be below"),
        (("10.0.0.1:1234", 0, 0), ValueError, "num_hosts: got 0"),
        (("10.0.0.1:1234", 2, True), TypeError, "host_id: got the bool"),
        (("10.0.0.1:1234", 2, 0), RuntimeError, "arrays exist already"),
    ],
)
def test_what_cannot_be_joined_is_refused(given, error, message):
    kept = jnp.ones(3)
    with pytest.raises(error, match=message), hosts(*given):
        raise AssertionError
    assert kept.sum() == 3
