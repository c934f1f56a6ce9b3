"""Stored draws as xarray knows them, read when they are looked at, one chunk's part after another.

A dataset of stored draws holds no numbers. Asking for a selection reads the chunks that it touches and only there;
asking for all of it reads all of it. Every chunk's checksum is compared the first time it is read. xarray's own
laziness does the rest: no dask. Of a chunk in parts those are read that hold something of the selection, one of them in
memory beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray
from xarray.backends import BackendArray
from xarray.core import indexing

from partime_mcmc.storage.chunks import Chunk, Part, damaged, intact, kept_steps, parts_of
from partime_mcmc.storage.formats import format_of


class Pieces:
    """The kept draws of consecutive chunks along one axis.

    Args:
        chunks: In order.
        thinning: Of so many draws one is kept.
        num_samples: Steps of the whole run: its last draw is kept, and so every `thinning`-th before it.
        num_chains: C.
    """

    def __init__(self, chunks: list[Chunk], thinning: int, num_samples: int, num_chains: int):
        self._format = format_of(chunks[0].path.suffix.removeprefix(".")) if chunks else None
        counts = [
            (chunk, len(kept_steps(chunk.start, chunk.stop, thinning, num_samples)))
            for chunk in chunks
        ]
        self.chunks = [chunk for chunk, count in counts if count]
        self.borders = np.cumsum([0, *(count for _, count in counts if count)])
        self._num_chains = num_chains
        self._seen: dict[str, tuple[Part, ...]] = {}

    def describe(self, group: str) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], np.dtype]]:
        """Dimensions, shape of all chunks together, and type of every variable of a group but coordinates."""
        if not self.chunks:
            return {}
        first, parts = self.chunks[0], self._parts(self.chunks[0])
        found = self._format.describe(
            first.path.with_name(parts[0].name) if parts else first.path, group
        )
        return {
            name: (dims, (self._num_chains, int(self.borders[-1]), *shape[2:]), dtype)
            for name, (dims, shape, dtype) in found.items()
            if dims[:2] == ("chain", "draw")
        }

    def read(self, group: str, name: str, index: tuple[Any, ...], empty: np.ndarray) -> np.ndarray:
        """Part of a variable: `index` has an integer or a slice with a positive step for every axis."""
        draws = index[1]
        if not isinstance(draws, slice):
            which = int(np.searchsorted(self.borders, draws, side="right")) - 1
            return self._read(
                which, group, name, (index[0], int(draws - self.borders[which]), *index[2:]), empty
            )
        start, stop, step = draws.indices(int(self.borders[-1]))
        found = []
        for which, (low, high) in enumerate(zip(self.borders, self.borders[1:])):
            first = start if start >= low else start + -(-(low - start) // step) * step
            if first < min(stop, high):
                local = slice(int(first - low), int(min(stop, high) - low), step)
                found.append(self._read(which, group, name, (index[0], local, *index[2:]), empty))
        return (
            np.concatenate(found, axis=int(isinstance(index[0], slice))) if found else empty[index]
        )

    def _read(self, which, group, name, index, empty):
        chunk = self.chunks[which]
        parts = self._parts(chunk)
        if not parts:
            return self._format.read(chunk.path, group, name, index)
        # An integer takes its axis away; a slice of one step does not, and is all that parts know.
        whole = tuple(
            slice(one, one + 1) if not isinstance(one, slice) else one for one in index[:2]
        )
        count = int(self.borders[which + 1] - self.borders[which])
        chains, draws = np.arange(self._num_chains)[whole[0]], np.arange(count)[whole[1]]
        found = np.empty((chains.size, draws.size, *empty[(0, 0, *index[2:])].shape), empty.dtype)
        missing = chains.size * draws.size
        for part in parts:
            _, at, mine = np.intersect1d(
                chains, part.chains, assume_unique=True, return_indices=True
            )
            _, when, then = np.intersect1d(
                draws, part.draws, assume_unique=True, return_indices=True
            )
            if at.size and when.size:
                cover = (
                    slice(int(mine[0]), int(mine[-1]) + 1),
                    slice(int(then[0]), int(then[-1]) + 1),
                )
                values = self._format.read(
                    chunk.path.with_name(part.name), group, name, (*cover, *index[2:])
                )
                found[np.ix_(at, when)] = values[np.ix_(mine - mine[0], then - then[0])]
                missing -= at.size * when.size
        if missing:
            raise damaged(chunk)
        return found[tuple(slice(None) if isinstance(one, slice) else 0 for one in index[:2])]

    def _parts(self, chunk: Chunk) -> tuple[Part, ...]:
        """The parts of a chunk, whose checksums are compared the first time."""
        if chunk.digest not in self._seen:
            if not intact(chunk):
                raise damaged(chunk)
            self._seen[chunk.digest] = parts_of(chunk)
        return self._seen[chunk.digest]


class _Stacked(BackendArray):
    """One variable over all chunks."""

    def __init__(
        self, pieces: Pieces, group: str, name: str, shape: tuple[int, ...], dtype: np.dtype
    ):
        self.shape, self.dtype = shape, np.dtype(dtype)
        self._pieces, self._group, self._name = pieces, group, name

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._read
        )

    def _read(self, index: tuple[Any, ...]) -> np.ndarray:
        index = tuple(one if isinstance(one, slice) else int(one) for one in index)
        empty = np.broadcast_to(np.zeros((), self.dtype), self.shape)
        return np.asarray(self._pieces.read(self._group, self._name, index, empty))


def lazy_dataset(
    pieces: Pieces, group: str, draws: np.ndarray, attributes: dict[str, Any]
) -> xarray.Dataset:
    """A group of all chunks as one dataset.

    Args:
        pieces: The chunks.
        group: `posterior` or `sample_stats`.
        draws: The number of the step behind every kept draw, the coordinate `draw`.
        attributes: Of the dataset.
    """
    variables = {
        name: xarray.Variable(
            dims, indexing.LazilyIndexedArray(_Stacked(pieces, group, name, shape, dtype))
        )
        for name, (dims, shape, dtype) in pieces.describe(group).items()
    }
    num_chains = next(iter(variables.values())).shape[0] if variables else 0
    coords = {"chain": np.arange(num_chains), "draw": draws} if variables else {}
    return xarray.Dataset(variables, coords=coords, attrs=attributes)
