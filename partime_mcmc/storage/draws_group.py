"""Draws as one zarr group, written chunk by chunk and read where they are looked at.

    posterior/<name>      (C, N, ...)     dimensions chain, draw, ...; named values in the model's space
    sample_stats/<name>   (C, N)          what the kernel reports of each step

xarray, ArviZ and whatever else reads Zarr version 3 open the group as it is. A name that cannot be a folder's is escaped
as in addresses of the web ("a/b" is "a%2Fb").
"""

import math
from urllib.parse import unquote

import numpy as np

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
