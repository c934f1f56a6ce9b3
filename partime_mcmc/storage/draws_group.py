"""Draws as one zarr group, written chunk by chunk and read where they are looked at.

    posterior/<name>      (C, N, ...)     dimensions chain, draw, ...; named values in the model's space
    sample_stats/<name>   (C, N)          what the kernel reports of each step

xarray, ArviZ and whatever else reads Zarr version 3 open the group as it is. A name that cannot be a folder's is escaped
as in addresses of the web ("a/b" is "a%2Fb").
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from partime_mcmc.diagnostics.arviz import axis_names
from partime_mcmc.extras import import_name
from partime_mcmc.storage.files import digest_of
from partime_mcmc.storage.store import Checkpoint

Groups = Mapping[str, Mapping[str, np.ndarray]]
"""Arrays `(C, n, ...)` by group and name."""

_LARGEST_FILE = 2**28
# Draws per file where files do not end with chunks; as large as the batches of the streaming statistics.
_FEWEST_DRAWS = 256


def kept_steps(start: int, stop: int, thinning: int, num_samples: int) -> np.ndarray:
    """Which steps are kept, as NumPyro keeps them: the last of every `thinning`, counted from the end.

    Args:
        start: First step.
        stop: The step after the last.
        thinning: Of so many one is kept.
        num_samples: Steps of the whole run.
    """
    offset = num_samples % thinning + thinning - 1
    first = offset if start <= offset else start + (offset - start) % thinning
    return np.arange(first, stop, thinning)


def draws_per_file(chunk: int, thinning: int, num_samples: int) -> int:
    """Kept draws per file: those of a chunk, if all chunks keep as many, so that no file is written twice.

    Args:
        chunk: Steps per chunk.
        thinning: Of so many steps one is kept.
        num_samples: Steps of the whole run.
    """
    kept = max(1, chunk // thinning)
    aligned = chunk % thinning == 0 == num_samples % thinning
    return kept if aligned else max(kept // 8, _FEWEST_DRAWS)


class DrawsWriter:
    """Appends draws to a group.

    Args:
        path: The group's folder.
        checkpoint: What is committed; None: nothing.
        length: Draws per file.
        dims: Names of the values' own axes, by name.
        attributes: Of the whole group.
    """

    def __init__(
        self,
        path: Path,
        checkpoint: Checkpoint | None,
        length: int,
        dims: Mapping[str, Any],
        attributes: Mapping[str, Any],
    ):
        metadata, tail = (checkpoint.metadata, checkpoint.tail) if checkpoint else ({}, {})
        self.files = _committed_files(path, metadata, tail)
        self._length, self._dims, self._attributes = length, dims, attributes

    def append(self, groups: Groups, draws: np.ndarray) -> dict[str, str]:
        """Write draws.

        Args:
            groups: Values of these draws.
            draws: Their numbers, ascending.

        Returns:
            Digests of the files that are full now, by key; the others are `files.tail`.

        Raises:
            StoreError: If a file cannot be written.
        """
        import zarr

        digests = {} if self.files.metadata else self._create(groups)
        if not draws.size:
            return digests
        tail: dict[str, bytes] = {}
        for group, variables in groups.items():
            for name, values in {**variables, "draw": draws}.items():
                path, axis = f"{group}/{escaped(name)}", int(name != "draw")
                with zarr.config.set({"array.write_empty_chunks": True}):
                    array = zarr.open_array(self.files, path=path, mode="r+", zarr_format=3)
                    array.append(values, axis=axis)
                for key, data in self.files.take_written().items():
                    number = int(key.removeprefix(f"{path}/c.").split(".")[axis])
                    if (number + 1) * array.chunks[axis] <= array.shape[axis]:
                        digests[key] = digest_of(data)
                    else:
                        tail[key] = data
        self.files.tail = tail
        return digests

    def _create(self, groups: Groups) -> dict[str, str]:
        import zarr
        from zarr.codecs import Crc32cCodec, ZstdCodec

        root = zarr.create_group(self.files, attributes=dict(self._attributes), zarr_format=3)
        for group, variables in groups.items():
            place, created = root.create_group(group), {}
            num_chains = next(iter(variables.values())).shape[0]
            chains = np.arange(num_chains)
            arrays = {
                "chain": (("chain",), chains.shape, chains.dtype),
                "draw": (("draw",), (0,), chains.dtype),
            } | {
                name: (
                    ("chain", "draw", *axis_names(name, value.ndim - 2, self._dims)),
                    (num_chains, 0, *value.shape[2:]),
                    value.dtype,
                )
                for name, value in variables.items()
            }
            for name, (dims, shape, dtype) in arrays.items():
                lengths = [self._length if dim == "draw" else n for dim, n in zip(dims, shape)]
                created[name] = place.create_array(
                    escaped(name),
                    shape=shape,
                    dtype=dtype,
                    chunks=file_shape(lengths, dtype.itemsize),
                    dimension_names=dims,
                    compressors=[ZstdCodec(), Crc32cCodec()],
                    chunk_key_encoding={"name": "default", "separator": "."},
                )
            with zarr.config.set({"array.write_empty_chunks": True}):
                created["chain"][:] = chains
        return {key: digest_of(data) for key, data in self.files.take_written().items()}


def open_group(path: Path, checkpoint: Checkpoint, digests: Mapping[str, str], group: str) -> Any:
    """Committed draws of a group as an `xarray.Dataset` that reads what is looked at, and checks it.

    Args:
        path: The folder of all groups.
        checkpoint: The newest.
        digests: Of all files that are full, by key.
        group: `posterior` or `sample_stats`.

    Raises:
        Damaged: Now or when draws are read, if a file is missing or holds other bytes than were written.
    """
    import xarray

    files = _committed_files(
        path, checkpoint.metadata, checkpoint.tail, dict(digests), read_only=True
    )
    found = xarray.open_zarr(
        files, group=group, chunks=None, consolidated=False, zarr_format=3, decode_cf=False
    )
    return found.rename(
        {name: original(str(name)) for name in found if original(str(name)) != name}
    )


def file_shape(shape: list[int], itemsize: int) -> tuple[int, ...]:
    """The shape of the parts that an array is cut into: one, unless that is too large for a file."""
    shape = [max(1, size) for size in shape]
    while math.prod(shape) * itemsize > _LARGEST_FILE:
        longest = shape.index(max(shape))
        shape[longest] = -(-shape[longest] // 2)
    return tuple(shape)


def escaped(name: str) -> str:
    """A name that can be that of a folder in a zarr group."""
    if name in (".", "..", "zarr.json") or name.startswith("__"):
        return "".join(f"%{byte:02X}" for byte in name.encode())
    return name.replace("%", "%25").replace("/", "%2F") or "%"


def original(name: str) -> str:
    """The name that was `escaped`."""
    return "" if name == "%" else unquote(name)


def _committed_files(*args: Any, **options: Any) -> Any:
    """A `zarr_files.CommittedFiles`, which needs zarr."""
    return import_name("a store", "storage.zarr_files", "CommittedFiles")(*args, **options)
