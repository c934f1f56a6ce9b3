"""Files that are there and whole, or not there: written aside, flushed to the disk, renamed; read with their digest."""

import contextlib
import hashlib
import os
from pathlib import Path

PARTIAL = ".partial-"
"""What names of unfinished files begin with."""


class StoreError(OSError):
    """A store that cannot be written or read."""


class Damaged(StoreError):
    """A file of a store is missing, or holds other bytes than were written."""


def digest_of(data: bytes) -> str:
    """A hash of some bytes: BLAKE2b with 128 bits."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_file(path: Path, digest: str | None = None) -> bytes:
    """The bytes of a file.

    Args:
        path: Of the file.
        digest: That they must have; None: any.

    Raises:
        Damaged: If the file is missing or has another digest.
        StoreError: If it cannot be read: a disk that is away for a moment has damaged nothing.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise Damaged(f"store: {path} is missing") from error
    except OSError as error:
        raise StoreError(
            error.errno, f"store: {path} could not be read: {error.strerror or error}"
        ) from error
    if digest not in (None, digest_of(data)):
        raise Damaged(f"store: {path} is damaged (its digest is not the one recorded)")
    return data


def write_file(path: Path, data: bytes, durable: bool = True) -> None:
    """Write a file: whole or not there.

    Args:
        path: Of the file.
        data: Its bytes.
        durable: Whether it survives a loss of power once this returns; a file that can be made again need not.

    Raises:
        StoreError: If it cannot be written; what was there before is untouched.
    """
    partial = path.with_name(PARTIAL + path.name)
    try:
        make_folder(path.parent)
        with open(partial, "wb") as file:
            file.write(data)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(partial, path)
        if durable:
            _flush_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise StoreError(
            error.errno, f"store: {path} could not be written: {error.strerror or error}"
        ) from error


def make_folder(path: Path) -> None:
    """Make a folder, and those above it, durably."""
    if not path.is_dir():
        make_folder(path.parent)
        path.mkdir(exist_ok=True)
        _flush_folder(path.parent)


def _flush_folder(path: Path) -> None:
    """Make renames durable: a folder is a file, too."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
