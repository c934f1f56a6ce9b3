"""Zarr's view of a store: the metadata of a checkpoint, and files of draws that are what was written.

    key                                     where it is read from
    posterior/theta/zarr.json               the checkpoint: an array is as long as there are committed draws
    posterior/theta/c.0.7.0                 the checkpoint if the file is partly filled, and so written again by the next
                                            chunk; else the file, if it has its digest

What a checkpoint does not name does not exist. Needs zarr 3, and is imported only where draws are written or read.
"""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from zarr.abc.buffer import Buffer
from zarr.buffer import default_buffer_prototype
from zarr.storage import LocalStore

from partime_mcmc.storage.files import Damaged, read_file, write_copy, write_file

_METADATA = "zarr.json"


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
    return key.rpartition("/")[2].startswith((_METADATA, "."))
