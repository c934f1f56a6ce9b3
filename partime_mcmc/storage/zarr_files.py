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

import asyncio
import math
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.abc.buffer import Buffer
from zarr.buffer import default_buffer_prototype
from zarr.codecs import Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore

from partime_mcmc.diagnostics.arviz import axis_names
from partime_mcmc.diagnostics.values import escaped, original
from partime_mcmc.storage.files import Damaged, digest_of, read_file, write_copy, write_file
from partime_mcmc.storage.store import Checkpoint

_LARGEST_FILE = 2**28


class CommittedFiles(LocalStore):
    """The files of a zarr group as far as they are committed.

    Args:
        root: The group's folder.
        metadata: Documents by key.
        tail: Partly filled files by key.
        digests: Of all other files, by key; not needed to write.
        read_only: Whether nothing may be written.
    """

    def __init__(
        self,
        root: Path,
        metadata: dict[str, bytes],
        tail: dict[str, bytes],
        digests: dict[str, str] | None = None,
        *,
        read_only: bool = False,
    ):
        super().__init__(root, read_only=read_only)
        self.metadata, self.tail, self.digests = dict(metadata), dict(tail), digests or {}
        self._written: dict[str, bytes] = {}

    def take_written(self) -> dict[str, bytes]:
        """What was written since this was called last, by key."""
        written, self._written = self._written, {}
        return written

    def publish(self) -> None:
        """Write the metadata to where other programs look for it; done after a commit, they see committed draws only."""
        for key, data in self.metadata.items():
            write_copy(self.root / key, data)

    def get_sync(self, key: str, *, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        """As `LocalStore.get_sync`.

        Raises:
            Damaged: If the file is missing, or holds other bytes than were written.
        """
        data = self.metadata.get(key, self.tail.get(key))
        if key in self.digests and data is None:
            data = read_file(self.root / key, self.digests[key])
        if data is None:
            if self.read_only and not _is_metadata(key):
                raise Damaged(f"store: {self.root / key} is not named by any checkpoint")
            return None
        if byte_range is not None:
            raise NotImplementedError("files of draws are read whole")
        return (prototype or default_buffer_prototype()).buffer.from_bytes(data)

    async def get(self, key: str, prototype: Any = None, byte_range: Any = None) -> Buffer | None:
        """As `get_sync`."""
        return await asyncio.to_thread(
            self.get_sync, key, prototype=prototype, byte_range=byte_range
        )

    def set_sync(self, key: str, value: Buffer) -> None:
        """Write a file; metadata are kept for the checkpoint."""
        data = value.to_bytes()
        if _is_metadata(key):
            self.metadata[key] = data
        else:
            write_file(self.root / key, data)
            self._written[key] = data

    async def set(self, key: str, value: Buffer) -> None:
        """As `set_sync`."""
        await asyncio.to_thread(self.set_sync, key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """As `LocalStore.set_if_not_exists`."""
        if not await self.exists(key):
            await self.set(key, value)

    async def exists(self, key: str) -> bool:
        """As `LocalStore.exists`."""
        return key in self.metadata or key in self.tail or key in self.digests

    async def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """As `LocalStore.list_dir`, of arrays and groups."""
        start = f"{prefix.rstrip('/')}/" if prefix else ""
        inside = (key.removeprefix(start) for key in self.metadata if key.startswith(start))
        for name in dict.fromkeys(path.split("/")[0] for path in inside):
            yield name


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
        metadata, tail = (checkpoint.metadata, checkpoint.tail) if checkpoint else ({}, {})
        self.files = CommittedFiles(path, metadata, tail)
        self._length, self._dims, self._attributes = length, dims, attributes

    def append(
        self, groups: Mapping[str, Mapping[str, np.ndarray]], draws: np.ndarray
    ) -> dict[str, str]:
        """Write draws.

        Args:
            groups: Values of these draws, arrays `(C, n, ...)` by group and name.
            draws: Their numbers, ascending.

        Returns:
            Digests of the files that are full now, by key; the others are `files.tail`.

        Raises:
            StoreError: If a file cannot be written.
        """
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

    def _create(self, groups: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, str]:
        root = zarr.create_group(self.files, attributes=dict(self._attributes), zarr_format=3)
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

    # Runs are longer than memory: what is read is not kept. xarray's types leave out stores of zarr.
    files: Any = CommittedFiles(
        path, checkpoint.metadata, checkpoint.tail, dict(digests), read_only=True
    )
    found = xarray.open_dataset(
        files,
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
