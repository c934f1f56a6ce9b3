"""Draws by name and by coordinate, and chains that never moved.

A chain of D numbers is D scalar series `(C, T)` with labels such as `theta[3]`; tables, comparisons and plots all walk
over these. A chain is frozen if a coordinate of its position has one value throughout: ArviZ would call that N
effective draws.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

MIN_DRAWS_TO_FREEZE = 10


def named_positions(draws: Any) -> dict[str, np.ndarray]:
    """Leaves of `draws.positions` by their path: `{"a": {"b": leaf}}` is `"a.b"`, a bare array `"position"`.

    Returns:
        Name to array `(C, T, ...)`, plain NumPy; empty if there are no positions.
    """
    leaves = jax.tree_util.tree_flatten_with_path(getattr(draws, "positions", None))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator=".") or "position": np.asarray(leaf)
        for path, leaf in leaves
    }


def named_draws(draws: Any) -> dict[str, np.ndarray]:
    """Values in the model's space, `draws.constrained`, or the positions if there are none.

    Returns:
        Name to array `(C, T, ...)`, plain NumPy.

    Raises:
        ValueError: If `draws` holds neither, or an array that does not start with the same (C, T) as the others.
    """
    constrained = getattr(draws, "constrained", None) or {}
    named = {name: np.asarray(values) for name, values in constrained.items()} or named_positions(
        draws
    )
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
        for index in np.ndindex(values.shape[2:]):
            label = f"{name}[{', '.join(map(str, index))}]" if index else name
            yield label, values[(slice(None), slice(None), *index)].astype(np.float64)


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
