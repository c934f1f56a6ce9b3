"""The commit point of a chunk: where the chains stand after it, what is known of all draws so far, which files it wrote.

    checkpoint k:  state · certificate and report · streaming statistics · digests of files · checksum of checkpoint k-1

A checkpoint names every file of draws by its digest, and the checkpoint before it by its checksum, so that the newest one
vouches for all bytes of a run.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.sampling.chunk import RunReport
from partime_mcmc.storage.serialize import decode, encode, pack_arrays, unpack_arrays


@dataclasses.dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a chunk leaves behind.

    Attributes:
        index: The number of the chunk.
        step: Steps per chain up to here.
        previous: The checksum of the checkpoint before; empty for the first.
        state: The chains, as arrays (`saved_plan.state_arrays`).
        words: Plain values that belong to the state.
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
    state: dict[str, np.ndarray]
    words: dict[str, Any]
    certificate: Certificate
    report: RunReport
    statistics: dict[str, np.ndarray]
    files: dict[str, str]
    tail: dict[str, bytes]
    metadata: dict[str, bytes]
    checksum: str = ""

    def pack(self) -> tuple[bytes, str]:
        """The bytes of its file, and its checksum."""
        arrays = {f"state/{name}": value for name, value in self.state.items()}
        arrays |= {f"statistics/{name}": value for name, value in self.statistics.items()}
        for group in ("tail", "metadata"):
            files = getattr(self, group).items()
            arrays |= {f"{group}/{key}": np.frombuffer(data, np.uint8) for key, data in files}
        whole = {"certificate": self.certificate, "report": self.report}
        arrays["whole"] = np.frombuffer(json.dumps(encode(whole, "checkpoint")).encode(), np.uint8)
        plain = ("index", "step", "previous", "files")
        return pack_arrays(arrays, self.words | {name: getattr(self, name) for name in plain})

    @classmethod
    def unpack(cls, data: bytes, where: str) -> Checkpoint:
        """From the bytes of `pack`.

        Args:
            data: The bytes.
            where: The file, for messages.

        Raises:
            Damaged: If the bytes are not those that were written.
        """
        arrays, words, checksum = unpack_arrays(data, where)
        whole = decode(json.loads(arrays["whole"].tobytes()))
        plain = {name: words.pop(name) for name in ("index", "step", "previous", "files")}
        tail, metadata = (
            {key: value.tobytes() for key, value in part(arrays, f"{group}/").items()}
            for group in ("tail", "metadata")
        )
        return cls(
            state=part(arrays, "state/"),
            words=words,
            statistics=part(arrays, "statistics/"),
            tail=tail,
            metadata=metadata,
            checksum=checksum,
            **whole,
            **plain,
        )


def part(arrays: dict[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): value
        for name, value in arrays.items()
        if name.startswith(prefix)
    }
