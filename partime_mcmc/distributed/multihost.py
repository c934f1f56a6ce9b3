"""Stored runs on several hosts: the first host plans, writes and reads; the others compute their shards of the same chunks.

    first host    reads or begins the store, and broadcasts the plan and where the chains stand
    others        take both from it, compute, and keep nothing
    all           meet at the end and open the same store

A store is resumed by any number of hosts, however many worked on it. If a host is lost the run ends on all of them, and what
was written stays.

Left out: runs that go on by themselves with the hosts that are left; a store whose hosts share no folder; several hosts that
write one store. Hosts that should each keep their own chains make runs of their own, with a key and a store each, which
`storage.concat_draws` opens together.
"""

import contextlib
from typing import Any, Callable

import numpy as np
from jax.experimental import multihost_utils

from partime_mcmc.distributed.collectives import gather_to_host0
from partime_mcmc.sampling.arguments import SampleArguments
from partime_mcmc.sampling.chunk import ChainState, Chunk
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.storage.saved_run import unpack_plan
from partime_mcmc.storage.sink import StoreSink
from partime_mcmc.storage.store import Store
from partime_mcmc.storage.stored_draws import StoredDraws, open_draws


class FirstHostSink(StoreSink):
    """A store whose plan and state are broadcast to the other hosts."""

    gather = staticmethod(gather_to_host0)

    def start(self, make_plan: Callable[[], tuple[Plan, ChainState]]) -> tuple[Plan, ChainState]:
        """As `StoreSink.start`; the other hosts wait for it."""
        plan, state = super().start(make_plan)
        broadcast_bytes(self.folder.read_plan() or b"")
        return plan, broadcast_chain_state(state)

    def interrupt(self) -> None:
        """Raise the interrupt again: the other hosts wait inside a window, and the store resumes."""
        raise KeyboardInterrupt

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            _barrier()


class OtherHostSink(contextlib.AbstractContextManager):
    """The sink of a host that keeps nothing.

    Args:
        arguments: What was asked for.
    """

    gather = staticmethod(gather_to_host0)

    def __init__(self, arguments: SampleArguments, store: Store):
        self._arguments, self._store = arguments, store

    def __exit__(self, *error: Any) -> None:
        pass

    def start(self, make_plan: Callable[[], tuple[Plan, ChainState]]) -> tuple[Plan, ChainState]:
        """The plan and the state of the first host."""
        asked = self._arguments
        plan, state = unpack_plan(broadcast_bytes(b""), asked.target, asked.kernel)
        return plan, broadcast_chain_state(state)

    def write(self, chunk: Chunk) -> None:
        """Nothing is kept here."""

    def interrupt(self) -> None:
        """Raise the interrupt again."""
        raise KeyboardInterrupt

    def close(self) -> StoredDraws:
        """The draws that the first host has written."""
        _barrier()
        return open_draws(self._store.path, folds=self._store.folds)


def broadcast_bytes(data: bytes) -> bytes:
    """The first host's bytes, on all hosts; what the others give is not looked at."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    mine = np.zeros(size, np.uint8)
    mine[: min(size, len(data))] = np.frombuffer(data[:size], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes()


def broadcast_chain_state(state: ChainState) -> ChainState:
    """Where the chains stand, as the first host knows it."""
    # A limit of 0 steps at once stands for none.
    counts = [state.num_steps, state.num_failed_windows, state.max_window or 0]
    carries, discrete, counts = multihost_utils.broadcast_one_to_all(
        (state.carries, state.discrete, np.array(counts, np.int32))
    )
    num_steps, num_failed, max_window = (int(count) for count in counts)
    return ChainState(carries, discrete, num_steps, num_failed, max_window or None)


def _barrier() -> None:
    """Wait until all hosts are here."""
    multihost_utils.sync_global_devices("partime_mcmc: stored run")
