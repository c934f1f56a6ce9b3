"""Where chunks of draws go: memory, or a store on disk (`storage.sink`).

with sink:
    plan, state = sink.start(make_plan)      a plan that was stored, or one made now
    for chunk in executor.chunks(state):
        sink.write(chunk)
    draws = sink.close()
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, Callable, Protocol

from partime_mcmc.distributed.collectives import Gather, gather_to_all
from partime_mcmc.sampling.chunk import ChainState, Chunk
from partime_mcmc.sampling.draws import Draws, draws_of_chunks
from partime_mcmc.sampling.pilots import advise_plan
from partime_mcmc.sampling.plan import Plan


class Sink(contextlib.AbstractContextManager["Sink"], Protocol):
    """Takes chunks of draws, in order; a context manager, left once after everything else.

    Attributes:
        gather: In a run over a mesh, which hosts get the draws of a chunk (`distributed.collectives`).
    """

    @property
    def gather(self) -> Gather: ...

    def start(self, make_plan: Callable[[], tuple[Plan, ChainState]]) -> tuple[Plan, ChainState]:
        """The plan of the run and where its chains stand; `make_plan` is called where no run has begun yet."""
        ...

    def write(self, chunk: Chunk) -> None:
        """Take the next chunk."""
        ...

    def interrupt(self) -> None:
        """Take note of an interrupt from the keyboard: raises it again where nothing was kept."""
        ...

    def close(self) -> Any:
        """All draws."""
        ...


class MemorySink:
    """Keeps all chunks in memory, on every host."""

    gather = staticmethod(gather_to_all)

    def __enter__(self) -> MemorySink:
        return self

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
        """Raise the interrupt again: there is no whole chunk."""
        raise KeyboardInterrupt

    def close(self) -> Draws:
        """The draws of all chunks, one after another."""
        return draws_of_chunks(self._plan, self._chunks, functools.partial(advise_plan, self._plan))
