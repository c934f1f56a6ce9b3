"""The folder of a stored run: which files there are, one writer, and what damage costs.

    run.json                        what was asked for, with its checksum; written before anything is computed
    plan.npz                        what warm-up tuned and what was chosen; written once, before the first draw
    draws.zarr/                     draws, a zarr group that other programs read, too
    checkpoint-<index>-<step>.npz   the commit point of a chunk that ends at <step> (`checkpoint`)
    lock                            held by the one process that writes

A chunk's files of draws are written first and its checkpoint last: draws beyond the newest checkpoint do not exist. A
chunk with a file that is not what was written is dropped with all that follow, and drawn again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Iterator

from partime_mcmc.storage.checkpoint import Checkpoint
from partime_mcmc.storage.files import (
    PARTIAL,
    Damaged,
    StoreError,
    read_file,
    write_copy,
    write_file,
)
from partime_mcmc.storage.serialize import read_words
from partime_mcmc.storage.streaming_statistics import Fold

FORMAT_VERSION = 4
"""Of all files of a store together. Up to 3: version 0.1.0, one file of draws per chunk."""
_RUN, _PLAN, _DRAWS, _LOCK, _DAMAGED, _SUM = (
    "run.json",
    "plan.npz",
    "draws.zarr",
    "lock",
    "damaged",
    "sha256",
)
_CHECKPOINT = re.compile(r"checkpoint-(\d{6,})-(\d{12,})\.npz$")


@dataclasses.dataclass(frozen=True)
class Store:
    """Where and how draws are kept.

    Attributes:
        path: A folder, made if need be.
        chunk: Steps per chunk, cut to whole windows if there is more than one; None is as many as are worth their overhead
            and fit into memory.
        folds: Functions of your own, accumulated over all draws, by name; their carries are stored.
    """

    path: str | os.PathLike
    chunk: int | None = None
    folds: Mapping[str, Fold] | None = None


class Folder:
    """The files of one run.

    Args:
        path: The folder.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.draws = self.path / _DRAWS

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
            handle = open(self.path / _LOCK, "ab")  # noqa: SIM115 (closed below)
        except OSError as error:
            message = f"store: {self.path} cannot be written: {error.strerror or error}"
            raise StoreError(message) from error
        with handle:
            try:
                # The kernel lets go of it when the process dies, however it dies.
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise StoreError(
                    f"store: another run is writing to {self.path}; wait for it, or choose another folder"
                ) from error
            for left in self.path.glob(f"{PARTIAL}*"):
                left.unlink(missing_ok=True)
            yield

    def write_run(self, run: dict[str, Any]) -> None:
        """Write what was asked for.

        Raises:
            StoreError: If it cannot be written.
        """
        run = run | {"format_version": FORMAT_VERSION}
        text = json.dumps(run | {_SUM: _sum_of(run)}, indent=1, sort_keys=True)
        write_file(self.path / _RUN, text.encode())

    def read_run(self) -> dict[str, Any]:
        """What was asked for.

        Raises:
            FileNotFoundError: If there is no run here.
            StoreError: If it was written by another version, or has changed since it was written.
        """
        file = self.path / _RUN
        if not file.is_file():
            raise FileNotFoundError(f"store: no run in {self.path} (no file {_RUN})")
        try:
            run = json.loads(read_file(file))
        except ValueError as error:
            raise StoreError(f"store: {file} is damaged: {error}") from error
        version = run.get("format_version") if isinstance(run, dict) else None
        if version != FORMAT_VERSION:
            older = isinstance(version, int) and version < FORMAT_VERSION
            reader = "partime_mcmc 0.1.0" if older else "the version of partime_mcmc that wrote it"
            raise StoreError(
                f"store: {self.path} has format {version}, wanted {FORMAT_VERSION}: read it with {reader}"
            )
        if run.pop(_SUM, None) != _sum_of(run):
            raise StoreError(
                f"store: {file} has changed since it was written (its checksum is not the one in it): put back what "
                "was there, or begin another run in a new folder"
            )
        return run

    def write_plan(self, data: bytes) -> None:
        """Write what warm-up tuned and what was chosen.

        Raises:
            StoreError: If it cannot be written.
        """
        write_file(self.path / _PLAN, data)

    def read_plan(self) -> bytes | None:
        """What warm-up tuned and what was chosen; None if the run never got so far.

        Raises:
            StoreError: If it cannot be read.
        """
        return read_file(self.path / _PLAN) if (self.path / _PLAN).is_file() else None

    def write_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Commit a chunk whose files of draws are written.

        Returns:
            The checkpoint, with its checksum.

        Raises:
            StoreError: If it cannot be written; what was there before is untouched.
        """
        data, checksum = checkpoint.pack()
        write_file(
            self.path / f"checkpoint-{checkpoint.index:06d}-{checkpoint.step:012d}.npz", data
        )
        return dataclasses.replace(checkpoint, checksum=checksum)

    def newest(self) -> tuple[Checkpoint | None, dict[str, str]]:
        """The newest checkpoint, and the digests of all files of draws that are full, by key.

        Raises:
            StoreError: If it is damaged, or another one before it.
        """
        paths = self._checkpoints()
        if not paths:
            return None, {}
        newest, previous = self._read(len(paths) - 1, paths[-1]), ""
        files: dict[str, str] = {}
        for index, path in enumerate(paths):
            # Of those before only what is small is read; the newest one vouches for their checksums.
            words, checksum = read_words(path)
            if (words["index"], words["previous"]) != (index, previous):
                raise Damaged(f"store: {path} does not follow the checkpoint before it")
            files.update(words["files"])
            previous = checksum
        return newest, files

    def recover(self) -> tuple[Checkpoint | None, str | None]:
        """Read everything, and go back to the newest checkpoint that all files vouch for.

        The files of chunks that are dropped, and those that were written without being committed, are taken away; dropped
        ones are kept in the folder `damaged`.

        Returns:
            That checkpoint, None before the first; and what was dropped and why, None if nothing was.

        Raises:
            StoreError: If a file cannot be read, which does not mean that it is damaged: nothing is touched then.
        """
        paths, good, reason = self._checkpoints(), None, None
        files: dict[str, str] = {}
        for index, path in enumerate(paths):
            try:
                found = self._read(index, path)
                if found.previous != (good.checksum if good else ""):
                    raise Damaged(f"store: {path} does not follow the checkpoint before it")
                for key, digest in found.files.items():
                    read_file(self.draws / key, digest)
            except Damaged as error:
                reason = str(error)
                break
            good = found
            files.update(found.files)
        dropped = set(self.path.glob("checkpoint-*.npz")) - set(
            paths[: good.index + 1 if good else 0]
        )
        if dropped and reason is None:
            reason = f"store: checkpoint {len(paths)} is missing"
        try:
            self._go_back(good, files, dropped)
        except OSError as error:
            message = f"store: {self.path} could not be mended: {error.strerror or error}"
            raise StoreError(error.errno, message) from error
        if not dropped:
            return good, None
        count = f"{len(dropped)} chunk{'s' if len(dropped) > 1 else ''}"
        return good, (
            f"{reason}: {count} dropped, and the run goes on from step {good.step if good else 0:,}; what was dropped "
            f"is kept in {self.path / _DAMAGED}"
        )

    def _go_back(self, good: Checkpoint | None, files: dict[str, str], dropped: set[Path]) -> None:
        wanted = {} if good is None else good.tail | good.metadata
        extra = [
            path
            for path in self.draws.rglob("*")
            if path.is_file()
            and (key := path.relative_to(self.draws).as_posix()) not in files
            and key not in wanted
        ]
        for path in (*dropped, *(extra if dropped else ())):
            if path.name.startswith(PARTIAL):
                continue
            aside = self.path / _DAMAGED / path.relative_to(self.path)
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, aside)
        for path in extra:
            path.unlink(missing_ok=True)
        if good is None:
            shutil.rmtree(self.draws, ignore_errors=True)
        for key, data in wanted.items():
            write_copy(self.draws / key, data)

    def _checkpoints(self) -> list[Path]:
        """Those that follow one another from the first on, by their names alone."""
        found = {}
        for path in self.path.glob("checkpoint-*.npz"):
            named = _CHECKPOINT.match(path.name)
            if named:
                found[int(named[1])] = path
        count = next(index for index in range(len(found) + 1) if index not in found)
        return [found[index] for index in range(count)]

    def _read(self, index: int, path: Path) -> Checkpoint:
        found = Checkpoint.unpack(read_file(path), str(path))
        named = _CHECKPOINT.match(path.name)
        if named is None or (found.index, found.step) != tuple(map(int, named.groups())):
            raise Damaged(f"store: {path} is damaged: it holds checkpoint {found.index}")
        return found


def _sum_of(run: dict[str, Any]) -> str:
    """The checksum of a description, whatever its layout."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
