"""Many devices give what one gives: eight forced ones in a process of their own, and real processes over loopback.

The path is compared with the sequential one in float64 to 1e-10: shards add up in another order, over at most some hundred
steps, and a path may differ by its tolerance times what a recurrence makes of it.
"""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import pytest

from partime_mcmc.distributed import hosts

HERE = Path(__file__).parent
# Stated by `distributed.launch`: heartbeats (5 s here) and 5 s; the rest is for a busy machine.
DEADLINE = 5 + 5 + 20


def environment():
    kept = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return {**kept, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}


@pytest.mark.parametrize("options", [(), pytest.param(("--all",), marks=pytest.mark.slow)], ids=["checks", "all"])
def test_eight_devices(options):
    done = subprocess.run([sys.executable, HERE / "distributed_checks.py", *options], capture_output=True, text=True,
                          env=environment(), timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert done.stdout.count("passed") >= 9


def start(num_hosts, what):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [subprocess.Popen([sys.executable, HERE / "distributed_hosts.py", str(host), str(num_hosts), str(port), what],
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
            for host in range(num_hosts)]


@pytest.mark.slow
@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_agree_with_one_device(num_hosts):
    for host in start(num_hosts, "everything"):
        said, errors = host.communicate(timeout=1200)
        assert host.returncode == 0 and "agreed" in said, said + errors[-3000:]


@pytest.mark.parametrize("lost", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_hosts_agree_and_say_so_when_one_is_lost(lost):
    both = start(2, "wait")
    try:
        for host in both:
            # JAX's runtime says things, too.
            assert any("agreed" in line for line in host.stdout), host.stderr.read()[-3000:]
        begin = time.monotonic()
        both[lost].send_signal(signal.SIGKILL)
        _, errors = both[1 - lost].communicate(timeout=60)
        assert time.monotonic() - begin < DEADLINE
        assert both[1 - lost].returncode != 0
        said = rf"^partime_mcmc: host {1 - lost} of 2 (ends|was ended, most likely) because another host was lost .*resume"
        assert re.search(said, errors, re.MULTILINE), errors
    finally:
        for host in both:
            host.kill()
            host.communicate()


@pytest.mark.slow
def test_a_stored_run_that_lost_a_host_goes_on_with_one(tmp_path):
    folder = tmp_path / "run"
    both = start(2, str(folder))
    try:
        begin = time.monotonic()
        while len(list(folder.glob("chunk*"))) < 3 and time.monotonic() - begin < 600:
            assert both[0].poll() is None, both[0].communicate()
            time.sleep(0.02)
        both[1].send_signal(signal.SIGKILL)
        _, errors = both[0].communicate(timeout=DEADLINE)
        assert "because another host was lost" in errors
    finally:
        for host in both:
            host.kill()
            host.communicate()
    kept = len(list(folder.glob("chunk*")))
    assert 3 <= kept < 32
    alone, = start(1, str(folder))
    _, errors = alone.communicate(timeout=600)
    assert alone.returncode == 0, errors
    assert len(list(folder.glob("chunk*"))) == 32


@pytest.mark.parametrize("given, error, said", [
    (("10.0.0.1:1234",), ValueError, "wanted all three"), (("10.0.0.1", 2, 0), ValueError, "must be HOST:PORT"),
    (("10.0.0.1:1234", 2, 2), ValueError, "host_id must be below"), (("10.0.0.1:1234", 0, 0), ValueError, "num_hosts must"),
    (("10.0.0.1:1234", 2, True), ValueError, "host_id must be"),
    (("10.0.0.1:1234", 2, 0), RuntimeError, "arrays exist already")])
def test_what_cannot_be_joined_is_refused(given, error, said):
    kept = jnp.ones(3)
    with pytest.raises(error, match=said):
        with hosts(*given):
            raise AssertionError
    assert kept.sum() == 3
