"""Draws by name and by coordinate, chains that never moved, and values as files hold them.

A chain of D numbers is D scalar series `(C, T)` with labels such as `theta[3]`; tables, comparisons and plots all walk
over these. A chain is frozen if a coordinate of its position has one value throughout: ArviZ would call that N
effective draws.
"""

import dataclasses
import enum
import math
from collections.abc import Iterator, Mapping
from typing import Any
from urllib.parse import unquote

import jax
import numpy as np

MIN_DRAWS_TO_FREEZE = 10


def named_positions(draws: Any) -> dict[str, np.ndarray]:
    """Leaves of `draws.positions` by their path: `{"a": {"b": leaf}}` is `"a.b"`, a bare array `"position"`.

    Returns:
        Name to array `(C, T, ...)`, plain NumPy; empty if there are no positions.
    """
    return {
        name or "position": one for name, one in flat(getattr(draws, "positions", None)).items()
    }


def flat(tree: Any) -> dict[str, np.ndarray]:
    """The arrays of a pytree by their path, plain NumPy: `{"a": {"b": leaf}}` is `{"a.b": leaf}`.

    Raises:
        ValueError: If two of them would have one name.
    """
    found: dict[str, np.ndarray] = {}
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree)):
        if name in found:
            raise ValueError(
                f"draws: got two values named {name!r}, one of them a part of another value: rename one"
            )
        found[name] = np.asarray(leaf)
    return found


def leaf_names(tree: Any) -> list[str]:
    """The paths of a pytree's arrays, joined by dots."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def named_draws(draws: Any) -> dict[str, np.ndarray]:
    """Values in the model's space, `draws.constrained`, or the positions if there are none; parts of a value by their path.

    Returns:
        Name to array `(C, T, ...)`, plain NumPy.

    Raises:
        ValueError: If `draws` holds neither, or an array that does not start with the same (C, T) as the others.
    """
    constrained = getattr(draws, "constrained", None) or {}
    named = flat(dict(constrained)) or named_positions(draws)
    if not named:
        raise ValueError("draws has neither constrained values nor positions")
    lead = next(iter(named.values())).shape[:2]
    for name, values in named.items():
        if values.ndim < 2 or values.shape[:2] != lead:
            raise ValueError(
                f"draws: {name!r} has shape {values.shape}, wanted (num_chains, num_draws, ...) = {lead}"
            )
    return named


def thinned_draws(draws: Any, most: int) -> dict[str, np.ndarray]:
    """As `named_draws`, but at most `most` draws of every chain; of a run on disk only these are read.

    Args:
        draws: A run with `posterior`, an `xarray.Dataset`, or as for `named_draws`.
        most: How many draws per chain.
    """
    posterior = getattr(draws, "posterior", None)
    named = named_draws(draws) if posterior is None else dict(posterior.data_vars)
    return {
        name: np.asarray(values[:, :: max(1, -(-values.shape[1] // most))])
        for name, values in named.items()
    }


def coordinates(named: Mapping[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    """Every scalar coordinate of `named` with its label, such as `theta[3]`, as a float64 array `(C, T)`."""
    for name, values in named.items():
        shape = values.shape[2:]
        for label, index in zip(_labels(name, shape), np.ndindex(shape)):
            yield label, values[(slice(None), slice(None), *index)].astype(np.float64)


def as_coordinates(named: Mapping[str, np.ndarray]) -> tuple[list[str], np.ndarray]:
    """The labels of all `coordinates`, and these in one array `(C, T, D)` of the values' own type."""
    labels = [label for name, value in named.items() for label in _labels(name, value.shape[2:])]
    columns = [value.reshape(*value.shape[:2], -1) for value in named.values()]
    return labels, np.concatenate(columns, axis=2)


def _labels(name: str, shape: tuple[int, ...]) -> list[str]:
    return [
        f"{name}[{', '.join(map(str, index))}]" if index else name for index in np.ndindex(shape)
    ]


def frozen_chains(draws: Any) -> np.ndarray:
    """Chains that never moved: called so by the certificate, or with a coordinate of their position constant.

    Fewer than ten draws are never called frozen: a healthy chain may reject as many proposals in a row.
    Without positions the constrained values are asked, where a coordinate constant at one value in every chain (the
    diagonal of a correlation matrix, say) does not count.

    Returns:
        `(C,)` bool.
    """
    positions = named_positions(draws)
    named = positions or named_draws(draws)
    num_chains, num_draws = next(iter(named.values())).shape[:2]
    frozen = np.zeros(num_chains, bool)
    for _, x in coordinates(named):
        if positions or not is_constant(x):
            frozen |= stuck(x)
    certified = getattr(getattr(draws, "certificate", None), "frozen", None)
    if certified is None or num_draws < MIN_DRAWS_TO_FREEZE:
        return frozen
    return frozen | np.asarray(certified, bool)


def stuck(x: np.ndarray) -> np.ndarray:
    """Chains `(C,)` of `x` `(C, T)` whose draws are all equal, where there are enough of them to judge."""
    return (x == x[:, :1]).all(axis=1) & (x.shape[1] >= MIN_DRAWS_TO_FREEZE)


def is_constant(x: np.ndarray) -> bool:
    """Whether all numbers in `x` are the same."""
    return bool(x.size and (x == x.flat[0]).all())


def partly_constant(x: np.ndarray) -> bool:
    """Whether some chain of `x` `(C, T)` is constant although `x` as a whole is not."""
    return bool(stuck(x).any() and not is_constant(x))


def escaped(name: str) -> str:
    """A name that can be that of a folder in a zarr group, or of a variable in an HDF5 file: as in addresses of the web."""
    if name in (".", "..", "zarr.json") or name.startswith("__"):
        return "".join(f"%{byte:02X}" for byte in name.encode())
    return name.replace("%", "%25").replace("/", "%2F") or "%"


def original(name: str) -> str:
    """The name that was `escaped`."""
    return "" if name == "%" else unquote(name)


def plain(value: Any) -> Any:
    """`value` in Python's own types, fit for strict JSON: dicts by string, lists, NaN as "nan", enums by name."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, str | bool):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, int | float) or hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
        if isinstance(value, list):
            return plain(value)
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return str(value)
