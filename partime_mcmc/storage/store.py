"""The folder of a stored run: which files there are, one writer, and what damage costs.

    run.json                        what was asked for, with its checksum; written before anything is computed
    plan.npz                        what warm-up tuned and what was chosen; written once, before the first draw
    draws.zarr/                     draws, a zarr group that other programs read, too
    chunk-<index>-<step>.npz        the commit point of a chunk that ends at <step>: its checkpoint
    lock                            held by the one process that writes

A chunk's files of draws are written first and its checkpoint last: draws beyond the newest checkpoint do not exist. A
checkpoint names every file of draws by its digest, and the checkpoint before it by its checksum, the first one what was asked
for and chosen, so that the newest one vouches for all bytes of a run and for their order. A chunk with a file that is not
what was written, or that stands where it was not written, is dropped with all that follow, and drawn again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Self

import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.sampling.chunk import ChainState, RunReport
from partime_mcmc.storage.files import (
    PARTIAL,
    Damaged,
    StoreError,
    digest_of,
    make_folder,
    read_file,
    write_copy,
    write_file,
)
from partime_mcmc.storage.serialize import (
    decode,
    encode,
    json_bytes,
    pack_arrays,
    part_of,
    read_words,
    unpack_arrays,
)
from partime_mcmc.storage.streaming_statistics import Fold

FORMAT_VERSION = 5
"""Of all files of a store together. Up to 3: version 0.1.0, one file of draws per chunk. 4 was never released: its checkpoints
have other names and do not follow what was asked for."""
_LAST_OF_0_1 = 3
_RUN, _PLAN, _DRAWS, _LOCK, _DAMAGED, _SUM = (
    "run.json",
    "plan.npz",
    "draws.zarr",
    "lock",
    "damaged",
    "sha256",
)
# Draws per file where files do not end with chunks; as large as the batches of the streaming statistics.
_FEWEST_DRAWS = 256
_CHECKPOINT = re.compile(r"chunk-(\d{6,})-(\d{12,})\.npz$")


@dataclasses.dataclass(frozen=True)
class Store:
    """Where and how draws are kept.

    Attributes:
        path: A folder, made if need be.
        chunk: Steps per chunk, cut to whole windows if there is more than one; None is as many as are worth their overhead
            and fit into memory.
        folds: Functions of your own, accumulated over all draws, by name; their carries are stored.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Store, Target, mala, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> store = Store("runs/in_chunks", chunk=500)
        >>> sample(jax.random.key(0), target, kernel, num_samples=1000, store=store).finished
        True
    """

    path: str | os.PathLike
    chunk: int | None = None
    folds: Mapping[str, Fold] | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a chunk leaves behind.

    Attributes:
        index: The number of the chunk.
        step: Steps per chain up to here.
        previous: The checksum of the checkpoint before; of the first, `Folder.beginning`.
        state: The chains, with lists of leaves.
        certificate: Of all draws so far, without what it has of single steps.
        report: Of all chunks so far.
        statistics: Streaming statistics of all draws so far, as arrays.
        files: Digests of the files that this chunk wrote and no later one writes again, by key.
        tail: Files that the next chunk writes again because they are partly filled, by key.
        metadata: Documents of the zarr group, by key.
        checksum: Of this checkpoint; empty until it is read.
    """

    index: int
    step: int
    previous: str
    state: ChainState
    certificate: Certificate
    report: RunReport
    statistics: dict[str, np.ndarray]
    files: dict[str, str]
    tail: dict[str, bytes]
    metadata: dict[str, bytes]
    checksum: str = ""

    @property
    def name(self) -> str:
        """Of its file."""
        return f"chunk-{self.index:06d}-{self.step:012d}.npz"

    def pack(self) -> tuple[bytes, str]:
        """The bytes of its file, and its checksum."""
        arrays = {f"statistics/{name}": value for name, value in self.statistics.items()}
        for group in ("tail", "metadata"):
            files = getattr(self, group).items()
            arrays |= {f"{group}/{key}": np.frombuffer(data, np.uint8) for key, data in files}
        whole = {name: getattr(self, name) for name in ("state", "certificate", "report")}
        arrays["whole"] = json_bytes(encode(whole, "checkpoint"))
        plain = ("index", "step", "previous", "files")
        return pack_arrays(arrays, {name: getattr(self, name) for name in plain})

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Self:
        """From the bytes of `pack`.

        Args:
            data: The bytes.
            where: The file, for messages.

        Raises:
            Damaged: If the bytes are not those that were written.
        """
        arrays, words, checksum = unpack_arrays(data, where)
        tail, metadata = (
            {key: value.tobytes() for key, value in part_of(arrays, f"{group}/").items()}
            for group in ("tail", "metadata")
        )
        return cls(
            statistics=part_of(arrays, "statistics/"),
            tail=tail,
            metadata=metadata,
            checksum=checksum,
            **words,
            **decode(json.loads(arrays["whole"].tobytes())),
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


class Folder:
    """The files of one run.

    Args:
        path: The folder.

    Raises:
        ValueError: If it cannot be one: Python takes an empty path for the folder in which the program runs.
    """

    def __init__(self, path: str | os.PathLike):
        if not os.fspath(path) or "\0" in str(path):
            raise ValueError(f"store: got {os.fspath(path)!r}, wanted the path of a folder")
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
            make_folder(self.path)
            handle = open(self.path / _LOCK, "ab")  # noqa: SIM115 (closed below)
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
            older = isinstance(version, int) and version <= _LAST_OF_0_1
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

    def beginning(self) -> str:
        """A digest of what was asked for and chosen, which the first chunk follows: chunks of another run do not.

        Raises:
            StoreError: If it cannot be read.
        """
        return digest_of(self.run_sum().encode() + (self.read_plan() or b""))

    def run_sum(self) -> str:
        """The checksum of what was asked for; errors as `read_run`."""
        return _sum_of(self.read_run())

    def write_checkpoint(self, checkpoint: Checkpoint) -> Checkpoint:
        """Commit a chunk whose files of draws are written.

        Returns:
            The checkpoint, with its checksum.

        Raises:
            StoreError: If it cannot be written; what was there before is untouched.
        """
        data, checksum = checkpoint.pack()
        write_file(self.path / checkpoint.name, data)
        return dataclasses.replace(checkpoint, checksum=checksum)

    def newest(self) -> tuple[Checkpoint | None, dict[str, str]]:
        """The newest checkpoint, and the digests of all files of draws that are full, by key.

        Raises:
            StoreError: If it is damaged, or another one before it, or there are some that do not follow one another.
        """
        paths = self._checkpoints()
        if strays := self._all_checkpoints() - set(paths):
            raise Damaged(
                f"store: {min(strays)} does not follow the checkpoints before it: one is missing, or this one was never part of "
                "the run; resume(path, target, kernel) puts it aside and draws again what is missing"
            )
        if not paths:
            return None, {}
        newest, previous = self._read(paths[-1]), self.beginning()
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
        try:
            for path in paths:
                found = self._read(path)
                if found.previous != (good.checksum if good else self.beginning()):
                    raise Damaged(f"store: {path} does not follow the checkpoint before it")
                for key, digest in found.files.items():
                    read_file(self.draws / key, digest)
                good = found
                files.update(found.files)
        except Damaged as error:
            reason = str(error)
        dropped = self._all_checkpoints() - set(paths[: good.index + 1 if good else 0])
        try:
            self._go_back(good, files, dropped)
        except OSError as error:
            raise StoreError(
                error.errno, f"store: {self.path} could not be mended: {error.strerror or error}"
            ) from error
        if not dropped:
            return good, None
        return good, (
            f"{reason or f'store: checkpoint {len(paths)} is missing'}: {len(dropped)} "
            f"chunk{'s' if len(dropped) > 1 else ''} dropped, and the run goes on from step {good.step if good else 0:,}; what was dropped "
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
        kept = [path for path in extra if dropped and not path.name.startswith(PARTIAL)]
        for path in (*dropped, *kept):
            aside = self.path / _DAMAGED / path.relative_to(self.path)
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, aside)
        for path in extra:
            path.unlink(missing_ok=True)
        if good is None:
            shutil.rmtree(self.draws, ignore_errors=True)
        for key, data in wanted.items():
            write_copy(self.draws / key, data)

    def _all_checkpoints(self) -> set[Path]:
        return {path for path in self.path.glob("chunk-*.npz") if _CHECKPOINT.match(path.name)}

    def _checkpoints(self) -> list[Path]:
        """Those that follow one another from the first on, by their names alone; of two with one index the one that ends
        sooner: what was put beside it ends later, because its steps are there already."""
        found = {
            int(path.name.split("-")[1]): path
            for path in sorted(self._all_checkpoints(), reverse=True)
        }
        count = next(index for index in range(len(found) + 1) if index not in found)
        return [found[index] for index in range(count)]

    def _read(self, path: Path) -> Checkpoint:
        found = Checkpoint.unpack(read_file(path), str(path))
        if path.name != found.name:
            raise Damaged(f"store: {path} is damaged: it holds checkpoint {found.index}")
        return found


def _sum_of(run: dict[str, Any]) -> str:
    """The checksum of a description, whatever its layout."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()
