"""Draws as one zarr group, written chunk by chunk and read where they are looked at.

    posterior/<name>      (C, N, ...)     dimensions chain, draw, ...; named values in the model's space
    sample_stats/<name>   (C, N)          what the kernel reports of each step

xarray, ArviZ and whatever else reads Zarr version 3 open the group as it is. A name that cannot be a folder's is escaped
as in addresses of the web ("a/b" is "a%2Fb").

Zarr's view of it is the metadata of a checkpoint, and files of draws that are what was written:

    key                                     where it is read from
    posterior/theta/zarr.json               the checkpoint: an array is as long as there are committed draws
    posterior/theta/c.0.7.0                 the checkpoint while the file is partly filled; then the file, by its digest

What a checkpoint does not name does not exist. Needs zarr 3, and is imported only where draws are written or read.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import default_buffer_prototype
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import MemoryStore

from partime_mcmc.diagnostics.arviz import axis_names
from partime_mcmc.diagnostics.values import escaped, original
from partime_mcmc.storage.files import Damaged, digest_of, read_file, write_copy, write_file
from partime_mcmc.storage.store import Checkpoint

_LARGEST_FILE = 2**28


class CommittedFiles(dict[str, Buffer]):
    """The committed files of a zarr group, by key: what a checkpoint holds, and others, which are read when they are asked for.

    Args:
        folder: The group's.
        held: What the newest checkpoint holds.
        digests: Of all other files.
    """

    def __init__(self, folder: Path, held: Mapping[str, bytes], digests: Mapping[str, str]):
        super().__init__({key: _buffer(data) for key, data in held.items()})
        self._folder, self._digests = folder, digests

    def __missing__(self, key: str) -> Buffer:
        """A file that no checkpoint holds.

        Raises:
            Damaged: If it is missing, or holds other bytes than were written.
            KeyError: If there is no such metadata.
        """
        if key in self._digests:
            return _buffer(read_file(self._folder / key, self._digests[key]))
        if _is_metadata(key):
            raise KeyError(key)
        raise Damaged(f"store: {self._folder / key} is not named by any checkpoint")


def _buffer(data: bytes) -> Buffer:
    return default_buffer_prototype().buffer.from_bytes(data)


def _is_metadata(key: str) -> bool:
    # Names of version 2 begin with a dot.
    return key.rpartition("/")[2].startswith(("zarr.json", "."))


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
        held = checkpoint.metadata | checkpoint.tail if checkpoint else {}
        self._path, self._held = path, {key: _buffer(data) for key, data in held.items()}
        self._store = MemoryStore(self._held)
        self._length, self._dims, self._attributes = length, dims, attributes

    @property
    def metadata(self) -> dict[str, bytes]:
        """Documents of the group, by key."""
        return {key: one.to_bytes() for key, one in self._held.items() if _is_metadata(key)}

    @property
    def tail(self) -> dict[str, bytes]:
        """Files that are partly filled, by key."""
        return {key: one.to_bytes() for key, one in self._held.items() if not _is_metadata(key)}

    def publish(self) -> None:
        """Write what the checkpoint holds to where other programs look for it; done after a commit, they see committed draws
        only."""
        for key, data in (self.tail | self.metadata).items():
            write_copy(self._path / key, data)

    def append(
        self, groups: Mapping[str, Mapping[str, np.ndarray]], draws: np.ndarray
    ) -> dict[str, str]:
        """Write draws.

        Args:
            groups: Values of these draws, arrays `(C, n, ...)` by group and name.
            draws: Their numbers, ascending.

        Returns:
            Digests of the files that are full now, by key; the others are `tail`.

        Raises:
            StoreError: If a file cannot be written.
        """
        digests: dict[str, str] = {}
        with zarr.config.set({"array.write_empty_chunks": True}):
            if not self._held:
                self._create(groups)
                digests |= self._written(list(self.tail))
            for group, variables in groups.items() if draws.size else ():
                for name, values in {**variables, "draw": draws}.items():
                    path, axis = f"{group}/{escaped(name)}", int(name != "draw")
                    array = zarr.open_array(self._store, path=path, mode="r+", zarr_format=3)
                    array.append(values, axis=axis)
                    num_full = array.shape[axis] // array.chunks[axis]
                    start = f"{path}/c."
                    full = [
                        key
                        for key in self._held
                        if key.startswith(start)
                        and int(key.removeprefix(start).split(".")[axis]) < num_full
                    ]
                    digests |= self._written(full)
        return digests

    def _written(self, full: list[str]) -> dict[str, str]:
        """Write files that are full, and let go of them; their digests by key."""
        digests = {}
        for key in full:
            data = self._held.pop(key).to_bytes()
            write_file(self._path / key, data)
            digests[key] = digest_of(data)
        return digests

    def _create(self, groups: Mapping[str, Mapping[str, np.ndarray]]) -> None:
        """The arrays, without draws."""
        root = zarr.create_group(self._store, attributes=dict(self._attributes), zarr_format=3)
        for group, variables in groups.items():
            place, created = root.create_group(group), {}
            num_chains = next(iter(variables.values())).shape[0]
            chains = np.arange(num_chains)
            axes = axis_names(
                {name: value.shape[2:] for name, value in variables.items()}, self._dims
            )
            arrays = {
                "chain": (("chain",), chains.shape, chains.dtype),
                "draw": (("draw",), (0,), chains.dtype),
            } | {
                name: (
                    ("chain", "draw", *axes[name]),
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
            created["chain"][:] = chains


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

    files = CommittedFiles(path, checkpoint.metadata | checkpoint.tail, digests)
    # Runs are longer than memory: what is read is not kept. xarray's types leave out stores of zarr.
    store: Any = MemoryStore(files, read_only=True)
    found = xarray.open_dataset(
        store,
        engine="zarr",
        group=group,
        cache=False,
        consolidated=False,
        zarr_format=3,
        decode_cf=False,
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
