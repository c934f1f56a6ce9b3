"""Joining hosts into one run: JAX's own distributed runtime, and one clear sentence when a host is lost.

    with hosts("10.0.0.1:9876", num_hosts=2, host_id=0):      # the same script on both hosts, with their own host_id
        draws = sample(key, target, hmc, num_samples=100_000, mesh=time_mesh())

Without arguments the cluster is found by `jax.distributed.initialize` itself (Slurm, Open MPI 4, Kubernetes, TPU pods);
processes of Slurm and Open MPI then get one GPU of their node each, so there are to be as many of them as GPUs.

All hosts run one program in step, so none can go on without the others. What ends a run, and when:

    a host dies            its neighbours' collectives fail at once, or, where the network stays silent, the coordinator
                           misses its heartbeats: every process has ended `heartbeat_seconds` + 5 later
    host 0, where the      JAX's runtime ends the others as soon as the connection breaks, or when a heartbeat is missed
    coordinator is, dies
    an exception on one    that host ends at once (host 0 after a second, or the others could not say what ended them, too),
                           so that the others see it gone instead of waiting for it

JAX's runtime ends a process by aborting it, which no Python code can catch. So a small process of its own waits beside
every host, and if the host ends without having finished it says why in one sentence on standard error. Nothing is
retried here: what a store holds is durable, and a run is resumed from it, by any number of hosts.

JAX's preemption service catches SIGTERM and leaves it to the program to look for it, which nobody does here: it is off
inside, so that `kill`, `timeout` and cluster managers end a host as they end any process.

Left out: hosts that join later, and runs that go on with fewer hosts.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
import time
import traceback
from typing import Iterator

import jax
import jax.extend.backend
import numpy as np

HEARTBEAT_SECONDS = 20
_LOST, _FAILED, _INTERRUPTED = 75, 1, 130
_LAST_WORDS_SECONDS = 1
_PREEMPTION = "jax_enable_preemption_service"
# What collectives and the coordination service say when a host is gone.
_GONE = re.compile(
    r"\bgloo\b|\bnccl\b|connection (reset|closed)|broken pipe|heartbeat|coordination service|unhealthy|"
    r"task .* died|DEADLINE_EXCEEDED|UNAVAILABLE",
    re.IGNORECASE,
)
# Runs in a process of its own: waits until its host closes the pipe, in whatever way.
_WITNESS = (
    "import sys; sys.stdin.buffer.read() == b'done' or sys.stderr.write(sys.argv[1] + chr(10))"
)


@contextlib.contextmanager
def hosts(
    coordinator: str | None = None,
    num_hosts: int | None = None,
    host_id: int | None = None,
    *,
    heartbeat_seconds: int = HEARTBEAT_SECONDS,
    start_seconds: int = 300,
) -> Iterator[None]:
    """Join hosts into one run, for as long as the `with` block lasts.

    To be entered before any array is made. On the way out all hosts wait for each other; if the block fails the
    process ends here (exit code 75 if another host was lost, 130 after an interrupt, else 1 or what it exits with),
    because JAX's own shutdown would wait for hosts that wait for it.

    Args:
        coordinator: `HOST:PORT` of host 0, reachable from all; None looks for a cluster.
        num_hosts: How many processes; None as above.
        host_id: Which one this is, from 0; None as above.
        heartbeat_seconds: How long a host may be silent before it counts as lost, at least 5.
        start_seconds: How long to wait for the others at the start.

    Raises:
        ValueError: If only some of the three are given, one of them makes no sense, or no cluster is found.
        RuntimeError: If arrays exist already, or the hosts do not come together in time.
    """
    _check(coordinator, num_hosts, host_id, heartbeat_seconds)
    _forget_imports()
    name = "this host" if host_id is None else f"host {host_id} of {num_hosts}"
    epitaph = _sentence(f"{name} was ended by a signal, or", heartbeat_seconds)
    witness = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WITNESS, epitaph],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        try:
            with _signals_left_alone():
                jax.distributed.initialize(
                    coordinator,
                    num_hosts,
                    host_id,
                    heartbeat_timeout_seconds=heartbeat_seconds,
                    initialization_timeout=start_seconds,
                )
        except (ValueError, RuntimeError) as error:
            _dismiss(witness)
            raise _did_not_start(coordinator, start_seconds, error) from error
        yield
        jax.distributed.shutdown()
    except SystemExit as ending:
        if ending.code not in (None, 0):
            _end(witness, name, host_id in (None, 0), heartbeat_seconds, ending)
        jax.distributed.shutdown()
        raise
    except BaseException as error:
        if witness.poll() is not None or witness.stdin.closed:
            raise
        _end(witness, name, host_id in (None, 0), heartbeat_seconds, error)
    finally:
        _dismiss(witness)


def _end(witness, name, maybe_first, heartbeat_seconds, error: BaseException) -> None:
    """End this process at once, with the reason."""
    if is_lost(error):
        print(
            f"{_sentence(f'{name} ends', heartbeat_seconds)}\n(What was heard: {str(error).splitlines()[0][:200]})",
            file=sys.stderr,
            flush=True,
        )
        code = _LOST
    else:
        interrupted = isinstance(error, KeyboardInterrupt)
        if not interrupted and not isinstance(error, SystemExit):
            traceback.print_exception(error)
        why = "it was interrupted" if interrupted else "of the error above"
        print(
            f"partime_mcmc: {name} ends because {why}, and with it the run on all hosts.",
            file=sys.stderr,
            flush=True,
        )
        code = (
            _INTERRUPTED
            if interrupted
            else error.code
            if isinstance(error, SystemExit)
            else _FAILED
        )
        if isinstance(code, str):
            print(code, file=sys.stderr)
        code = code if isinstance(code, int) else _FAILED
    _dismiss(witness)
    sys.stdout.flush()
    if code != _LOST and maybe_first:
        # With host 0 goes the coordinator, and JAX aborts the others where they stand.
        time.sleep(_LAST_WORDS_SECONDS)
    os._exit(code)


def is_lost(error: BaseException) -> bool:
    """Whether an error is what the loss of another host looks like from here."""
    return isinstance(error, (ValueError, RuntimeError)) and bool(_GONE.search(str(error)))


def _sentence(what: str, heartbeat_seconds: int) -> str:
    return (
        f"partime_mcmc: {what} because another host was lost (or was silent for {heartbeat_seconds} s): what has been "
        "stored is safe, resume from it with any number of hosts."
    )


def _dismiss(witness) -> None:
    if not witness.stdin.closed:
        with contextlib.suppress(BrokenPipeError):
            witness.stdin.write(b"done")
            witness.stdin.close()
        witness.wait()


def _check(coordinator, num_hosts, host_id, heartbeat_seconds) -> None:
    given = (coordinator is not None, num_hosts is not None, host_id is not None)
    if any(given) and not all(given):
        raise ValueError(
            f"coordinator, num_hosts, host_id: got {coordinator!r}, {num_hosts!r} and {host_id!r}, wanted all "
            "three, or none of them where the cluster says it (Slurm, Open MPI, Kubernetes)"
        )
    if all(given):
        for name, value, least in (("num_hosts", num_hosts, 1), ("host_id", host_id, 0)):
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
        if host_id >= num_hosts:
            raise ValueError(f"host_id must be below num_hosts = {num_hosts}, got {host_id}")
        if not re.fullmatch(r".+:\d+", str(coordinator)):
            raise ValueError(f"coordinator must be HOST:PORT, got {coordinator!r}")
    if not heartbeat_seconds >= 5:
        raise ValueError(f"heartbeat_seconds must be at least 5, got {heartbeat_seconds!r}")


@contextlib.contextmanager
def _signals_left_alone() -> Iterator[None]:
    """JAX's preemption service, which would swallow SIGTERM, is not started inside."""
    before = jax.config.values[_PREEMPTION]
    jax.config.update(_PREEMPTION, False)
    try:
        yield
    finally:
        jax.config.update(_PREEMPTION, before)


def _forget_imports() -> None:
    """Give back the backend that importing a neighbour may have started: JAX joins hosts only before that.

    Raises:
        RuntimeError: If arrays exist, which would be lost with it.
    """
    made = [array.shape for array in jax.live_arrays() if array.shape]
    if made:
        raise RuntimeError(
            f"hosts: {len(made)} arrays exist already (the first of shape {made[0]}); enter hosts(...) "
            "before any array or key is made"
        )
    jax.extend.backend.clear_backends()


def _did_not_start(coordinator, start_seconds, error: Exception) -> Exception:
    if coordinator is None:
        return ValueError(
            f"coordinator: none was given and no cluster was found ({error}); give coordinator='HOST:PORT', "
            "num_hosts and host_id"
        )
    return RuntimeError(
        f"hosts: not all hosts came together at {coordinator} within {start_seconds} s ({error})"
    )
