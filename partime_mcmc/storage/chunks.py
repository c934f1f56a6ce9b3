"""Files of draws: a chunk is all draws of some steps, in one file or in parts that several hosts have written.

    chunk k in one file       draws, and what it takes to go on after them
    chunk k in parts          part files, each the draws of some chains at some steps, and a chunk file with what it takes to
                              go on and the list of its parts: their names, checksums and places

A chunk in parts is there once its chunk file is, which is written last; it is whole if all of its files are. The list is
in the chunk file, and the chunk file's checksum in its name, so that the one name vouches for all bytes of a chunk.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from partime_mcmc.storage.formats import Variable, format_of

CHUNK_NAME = re.compile(r"chunk-(\d{6,})-(\d{12,})-([0-9a-f]{64})\.(\w+)$")
PART_NAME = re.compile(r"part-(\d{6,})-(\d{4,})-(\d{2,})-([0-9a-f]{64})\.(\w+)$")


class StoreError(OSError):
    """A store that cannot be written or read."""


class Chunk(NamedTuple):
    """Draws of steps `start` to `stop` of every chain, and the file that stands for them."""

    index: int
    start: int
    stop: int
    digest: str
    path: Path


class Part(NamedTuple):
    """A file with the draws of some chains at some steps of a chunk.

    Attributes:
        name: Of the file, beside the chunk's.
        digest: Of its bytes.
        chains: Their numbers, ascending.
        draws: Which of the chunk's kept draws, ascending, from 0.
    """

    name: str
    digest: str
    chains: np.ndarray
    draws: np.ndarray

    def to_plain(self) -> dict[str, Any]:
        """Plain values, runs of numbers as their two ends."""
        return {
            "name": self.name,
            "sha256": self.digest,
            "chains": _runs(self.chains),
            "draws": _runs(self.draws),
        }

    @classmethod
    def from_plain(cls, words: dict[str, Any]) -> Part:
        """The part that gave these values."""
        return cls(
            words["name"], words["sha256"], _numbers(words["chains"]), _numbers(words["draws"])
        )


def parts_variable(parts: list[dict[str, Any]]) -> Variable:
    """The list of a chunk's parts, as it stands in the group `state` of its file.

    Args:
        parts: As `Part.to_plain` gives them.
    """
    return Variable(
        ("letter",), np.frombuffer(json.dumps(parts, sort_keys=True).encode(), np.uint8)
    )


def parts_of(chunk: Chunk) -> tuple[Part, ...]:
    """The parts of a chunk whose own file is whole; none where the draws are in it."""
    found = format_of(chunk.path.suffix.removeprefix("."))
    if "parts" not in found.describe(chunk.path, "state"):
        return ()
    return tuple(
        Part.from_plain(words)
        for words in json.loads(found.read(chunk.path, "state", "parts").tobytes())
    )


def intact(chunk: Chunk) -> bool:
    """Whether the bytes of a chunk and of all its parts are those that were written; False if a file is gone.

    Raises:
        StoreError: As `flaw`.
    """
    return flaw(chunk) is None


def flaw(chunk: Chunk) -> str | None:
    """What is wrong with a chunk, in words; None if all its bytes are those that were written.

    Raises:
        StoreError: If they cannot be read: a disk that is away for a moment has damaged nothing.
    """
    if not _as_written(chunk.path, chunk.digest):
        return f"{chunk.path.name[:12]} does not have the checksum in its name"
    for part in parts_of(chunk):
        if not _as_written(chunk.path.with_name(part.name), part.digest):
            return f"{part.name[:19]}, a part of {chunk.path.name[:12]}, is missing or does not have its checksum"
    return None


def _as_written(path: Path, digest: str) -> bool:
    try:
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest() == digest
    except FileNotFoundError:
        return False
    except OSError as error:
        raise StoreError(
            error.errno, f"store: {path} could not be read: {error.strerror or error}"
        ) from error


def damaged(chunk: Chunk) -> StoreError:
    """What to say of a chunk that is not intact."""
    return StoreError(
        f"store: {chunk.path} is damaged (its checksum is not the one in its name, or that of a part not the "
        "one it lists): resume(...) drops it and draws it again"
    )


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


def _runs(numbers: np.ndarray) -> list[list[int]]:
    """Ascending numbers as `[first, after the last]` of each run."""
    borders = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [[int(run[0]), int(run[-1]) + 1] for run in np.split(numbers, borders) if run.size]


def _numbers(runs: list[list[int]]) -> np.ndarray:
    return np.concatenate([np.arange(*run) for run in runs]) if runs else np.zeros(0, int)
