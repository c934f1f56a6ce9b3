"""The folder of a stored run: which files there are, how they get there whole, and how damage is found.

    run.json                                    what was asked for, with its checksum; written before anything is computed
    start-<sha256>.npz                          what warm-up tuned and what was chosen; written once, before the first draw
    chunk-<index>-<step>-<sha256>.nc            certified draws up to step <step>, and what it takes to go on from there
    part-<index>-<host>-<number>-<sha256>.nc    of a chunk that several hosts wrote: draws of one of them (see `chunks`)
    lock                                        held by the one process that writes

Every file is written aside, flushed to the disk, and renamed; the names of the others hold the checksums of their
bytes, so that the rename commits both, and a file is either there and whole, or not there. What is damaged later is found
by its checksum.
Chunks count only as far as they follow one another without a gap; parts only where a chunk lists them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any, Iterator

from partime_mcmc.storage.chunks import CHUNK_NAME, PART_NAME, Chunk, StoreError, flaw

_START = re.compile(r"start-([0-9a-f]{64})\.npz$")
_RUN, _LOCK, _ASIDE, _SUM = "run.json", "lock", ".damaged", "sha256"

# Of all files of a store together. 2: certificates say whether they are independent; run.json holds its checksum. 3: a
# chunk may be in parts.
FORMAT_VERSION = 3


class Folder:
    """The files of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)

    @property
    def holds_run(self) -> bool:
        """Whether a run was begun here."""
        return (self.path / _RUN).is_file()

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Be the only writer.

        Raises:
            StoreError: If another process writes here, or the folder cannot be made.
        """
        import fcntl

        try:
            self.path.mkdir(parents=True, exist_ok=True)
            handle = open(self.path / _LOCK, "ab")
        except OSError as error:
            raise StoreError(
                f"store: {self.path} cannot be written: {error.strerror or error}"
            ) from error
        with handle:
            try:
                # The kernel lets go of it when the process dies, however it dies.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(
                    f"store: another run is writing to {self.path}; wait for it, or choose another "
                    "folder"
                ) from error
            for left in (*self.path.glob(".partial-*"), *self.path.glob(".shared-*")):
                left.unlink(missing_ok=True)
            yield

    def write_run(self, run: dict[str, Any]) -> None:
        """Write what was asked for.

        Raises:
            StoreError: If it cannot be written.
        """
        self._commit(
            _RUN, json.dumps(run | {_SUM: _sum_of(run)}, indent=1, sort_keys=True).encode()
        )

    def read_run(self) -> dict[str, Any]:
        """What was asked for.

        Raises:
            FileNotFoundError: If there is no run here.
            StoreError: If it is of another version of the format, or has changed since it was written.
        """
        if not self.holds_run:
            raise FileNotFoundError(f"store: no run in {self.path} (no file {_RUN})")
        try:
            run = json.loads((self.path / _RUN).read_text())
        except ValueError as error:
            raise StoreError(f"store: {self.path / _RUN} is damaged: {error}") from error
        version = run.get("format_version") if isinstance(run, dict) else None
        if version != FORMAT_VERSION:
            raise StoreError(
                f"store: {self.path} has format {version}, wanted {FORMAT_VERSION}; read it with the version "
                "of partime_mcmc that wrote it"
            )
        if run.pop(_SUM, None) != _sum_of(run):
            raise StoreError(
                f"store: {self.path / _RUN} has changed since it was written (its checksum is not the one in "
                "it): put back what was there, or begin another run in a new folder"
            )
        return run

    def write_start(self, data: bytes) -> None:
        """Write what warm-up tuned.

        Raises:
            StoreError: If it cannot be written.
        """
        self._commit(f"start-{hashlib.sha256(data).hexdigest()}.npz", data)

    def read_start(self) -> bytes | None:
        """What warm-up tuned; None if it never got so far.

        Raises:
            StoreError: If the file is damaged: without it no draw can be trusted or continued.
        """
        for path in sorted(self.path.glob("start-*.npz")):
            named = _START.match(path.name)
            if named:
                data = path.read_bytes()
                if hashlib.sha256(data).hexdigest() != named[1]:
                    raise StoreError(
                        f"store: {path} is damaged (its checksum is not the one in its name): this run "
                        "cannot go on; begin another in a new folder"
                    )
                return data
        return None

    def write_chunk(self, index: int, stop: int, suffix: str, data: bytes) -> None:
        """Write one chunk.

        Raises:
            StoreError: If it cannot be written; what was there before is untouched.
        """
        self._commit(
            f"chunk-{index:06d}-{stop:012d}-{hashlib.sha256(data).hexdigest()}.{suffix}", data
        )

    def chunks(self) -> list[Chunk]:
        """The chunks that follow one another from the first step on, by their names alone."""
        found: dict[int, Chunk] = {}
        for path in self.path.glob("chunk-*"):
            named = CHUNK_NAME.match(path.name)
            if named:
                found[int(named[1])] = Chunk(int(named[1]), 0, int(named[2]), named[3], path)
        chunks, start = [], 0
        for index in range(len(found)):
            if index not in found or found[index].stop <= start:
                break
            chunks.append(found[index]._replace(start=start))
            start = found[index].stop
        return chunks

    def write_part(
        self, index: int, host: int, number: int, suffix: str, data: bytes
    ) -> tuple[str, str]:
        """Write one part of a chunk, which counts once the chunk lists it.

        Returns:
            The file's name and its checksum.

        Raises:
            StoreError: If it cannot be written.
        """
        digest = hashlib.sha256(data).hexdigest()
        name = f"part-{index:06d}-{host:04d}-{number:02d}-{digest}.{suffix}"
        self._commit(name, data)
        return name, digest

    def drop_damaged(self) -> tuple[list[Chunk], str | None]:
        """Read every chunk and set aside the first damaged one and all after it, which go on from it, as `*.damaged`. Parts
        that no chunk lists are removed: a host had written them when the run ended.

        Returns:
            The chunks that are whole, and a sentence about those that are not; None if all are.

        Raises:
            StoreError: If a chunk cannot be read, which does not mean that it is damaged: nothing is touched then.
        """
        everything = {path for path in self.path.glob("chunk-*") if CHUNK_NAME.match(path.name)}
        chunks = self.chunks()
        flaws = ((k, flaw(chunk)) for k, chunk in enumerate(chunks))
        good, reason = next(
            ((k, said) for k, said in flaws if said),
            (len(chunks), f"chunk-{len(chunks):06d} is missing"),
        )
        bad = everything - {chunk.path for chunk in chunks[:good]}
        self._set_aside(good, bad)
        if not bad:
            return chunks, None
        kept = chunks[good - 1].stop if good else 0
        return chunks[:good], (
            f"{reason}: {len(bad)} chunk{'s' if len(bad) > 1 else ''} dropped, and the run goes on from "
            f"step {kept:,}; what was dropped is kept as *{_ASIDE}"
        )

    def _set_aside(self, good: int, bad: set[Path]) -> None:
        """Take away damaged chunks with their parts, and parts of chunks that never came to be."""
        parts = [
            (int(named[1]), path)
            for path in self.path.glob("part-*")
            if (named := PART_NAME.match(path.name))
        ]
        listed = {int(CHUNK_NAME.match(path.name)[1]) for path in bad}
        try:
            for path in sorted(bad | {path for index, path in parts if index in listed}):
                os.replace(path, path.with_name(path.name + _ASIDE))
            for index, path in parts:
                if index >= good and index not in listed:
                    path.unlink(missing_ok=True)
            if bad:
                _sync_folder(self.path)
        except OSError as error:
            said = f"store: {self.path} holds damaged chunks that could not be set aside: {error.strerror or error}"
            raise StoreError(error.errno, said) from error

    def _commit(self, name: str, data: bytes) -> None:
        partial = self.path / f".partial-{name}"
        try:
            with open(partial, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(partial, self.path / name)
            _sync_folder(self.path)
        except OSError as error:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            said = f"store: {self.path / name} could not be written: {error.strerror or error}"
            raise StoreError(error.errno, said) from error


def _sum_of(run: dict[str, Any]) -> str:
    """The checksum of a description, whatever its layout."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()


def _sync_folder(path: Path) -> None:
    """Make renames durable: a folder is a file, too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
