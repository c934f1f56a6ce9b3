"""What a chunk is written as: groups of named arrays with named dimensions, in one file that others can read.

`NetCDF()` is NetCDF-4, i.e. HDF5, with a checksum on every block (Fletcher's) besides the one in the file's name:
xarray, ArviZ and whatever else reads NetCDF open a chunk as it is. `Zarr()` is a Zarr hierarchy in a zip file, for
those who have zarr (the extra `zarr`). A file is made in memory and written in one go, so that a full disk is an error
of one `write`, and never of a library in the middle of its own bookkeeping.
"""

from __future__ import annotations

import dataclasses
import io
import math
import tempfile
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

_LARGEST_BLOCK = 2**31


class Variable(NamedTuple):
    """An array and the names of its dimensions."""

    dims: tuple[str, ...]
    values: np.ndarray


Groups = dict[str, dict[str, Variable]]


class Format(Protocol):
    """How groups of arrays become a file.

    Attributes:
        suffix: Of the file's name.
    """

    suffix: str

    def pack(self, groups: Groups, attributes: dict[str, str | int | float]) -> bytes:
        """The bytes of a file; no dimension may have length 0.

        Args:
            groups: Variables by group and name.
            attributes: Of the whole file.
        """
        ...

    def describe(
        self, path: Path, group: str
    ) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], np.dtype]]:
        """Dimensions, shape and type of every variable of a group; empty if there is no such group."""
        ...

    def read(self, path: Path, group: str, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """A variable, or the part of it that an index of slices, integers and at most one array of integers names."""
        ...


@dataclasses.dataclass(frozen=True)
class NetCDF:
    """NetCDF-4 files, through h5netcdf."""

    suffix: str = dataclasses.field(default="nc", init=False)

    def pack(self, groups: Groups, attributes: dict[str, str | int | float]) -> bytes:
        """As `Format.pack`."""
        import h5netcdf

        buffer = io.BytesIO()
        with h5netcdf.File(buffer, "w") as file:
            file.attrs.update(attributes)
            for group, variables in groups.items():
                place = file.create_group(group)
                sizes = {
                    dim: size
                    for one in variables.values()
                    for dim, size in zip(one.dims, one.values.shape)
                }
                place.dimensions = sizes
                for name, one in variables.items():
                    # A checksum needs blocks, and a scalar has none.
                    options = {"fletcher32": True, "chunks": blocks(one.values)} if one.dims else {}
                    values = one.values.astype(np.int8) if one.values.dtype == bool else one.values
                    made = place.create_variable(
                        _escaped(name), one.dims, values.dtype, data=values, **options
                    )
                    if one.values.dtype == bool:
                        made.attrs["dtype"] = "bool"  # as xarray writes it
        return buffer.getvalue()

    def describe(
        self, path: Path, group: str
    ) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], np.dtype]]:
        """As `Format.describe`."""
        import h5netcdf

        with h5netcdf.File(path, "r") as file:
            variables = file.groups[group].variables if group in file.groups else {}
            return {
                _original(name): (
                    tuple(one.dimensions),
                    tuple(one.shape),
                    np.dtype(bool) if one.attrs.get("dtype") == "bool" else np.dtype(one.dtype),
                )
                for name, one in variables.items()
            }

    def read(self, path: Path, group: str, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """As `Format.read`."""
        import h5py

        with h5py.File(path, "r") as file:
            variable = file[group][_escaped(name)]
            values = np.asarray(variable[index if index else ...])
            return (
                values.astype(bool) if variable.attrs.get("dtype") in ("bool", b"bool") else values
            )


@dataclasses.dataclass(frozen=True)
class Zarr:
    """Zarr hierarchies, each in a zip file; needs zarr 3."""

    suffix: str = dataclasses.field(default="zip", init=False)

    def __post_init__(self):
        _zarr()

    def pack(self, groups: Groups, attributes: dict[str, str | int | float]) -> bytes:
        """As `Format.pack`."""
        zarr = _zarr()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "chunk.zip"
            with zarr.storage.ZipStore(path, mode="w") as store:
                root = zarr.create_group(store, attributes=attributes)
                for group, variables in groups.items():
                    place = root.create_group(group)
                    for name, one in variables.items():
                        place.create_array(
                            _escaped(name),
                            data=np.ascontiguousarray(one.values),
                            dimension_names=one.dims,
                            chunks=blocks(one.values) or "auto",
                        )
            return path.read_bytes()

    def describe(
        self, path: Path, group: str
    ) -> dict[str, tuple[tuple[str, ...], tuple[int, ...], np.dtype]]:
        """As `Format.describe`."""
        with self._opened(path) as store:
            root = _zarr().open_group(store, mode="r")
            arrays = dict(root[group].arrays()) if group in root else {}
            return {
                _original(name): (
                    tuple(one.metadata.dimension_names or ()),
                    tuple(one.shape),
                    np.dtype(one.dtype),
                )
                for name, one in arrays.items()
            }

    def read(self, path: Path, group: str, name: str, index: tuple[Any, ...] = ()) -> np.ndarray:
        """As `Format.read`."""
        with self._opened(path) as store:
            array = _zarr().open_group(store, mode="r")[group][_escaped(name)]
            return np.asarray(array.oindex[index] if index else array[...])

    def _opened(self, path):
        return _zarr().storage.ZipStore(path, mode="r")


def blocks(values: np.ndarray) -> tuple[int, ...]:
    """The shape of the blocks that an array is cut into: one, unless that is more than HDF5 takes (4 GiB)."""
    shape = list(values.shape)
    while math.prod(shape) * values.dtype.itemsize > _LARGEST_BLOCK:
        longest = shape.index(max(shape))
        shape[longest] = -(-shape[longest] // 2)
    return tuple(shape)


def _escaped(name: str) -> str:
    """A name without slashes, which mean groups."""
    return name.replace("%", "%25").replace("/", "%2F")


def _original(name: str) -> str:
    return name.replace("%2F", "/").replace("%25", "%")


def _zarr() -> Any:
    """The library.

    Raises:
        ImportError: Naming the extra.
    """
    try:
        import zarr
        import zarr.storage
    except ImportError as error:
        raise ImportError(
            "format: Zarr() needs zarr; install partime_mcmc[zarr], or take NetCDF()"
        ) from error
    return zarr


def format_of(suffix: str) -> Format:
    """The format of files with a suffix.

    Raises:
        ValueError: If there is none.
    """
    known = {"nc": NetCDF, "zip": Zarr}
    if suffix not in known:
        raise ValueError(f"store: files *.{suffix} are of no known format ({sorted(known)})")
    return known[suffix]()


def pack_arrays(arrays: dict[str, np.ndarray]) -> bytes:
    """Named arrays as the bytes of an .npz file; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def unpack_arrays(data: bytes) -> dict[str, np.ndarray]:
    """The arrays of `pack_arrays`; nothing in them is ever executed."""
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        return {name: file[name] for name in file.files}
