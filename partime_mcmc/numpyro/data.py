"""Whether a model's data are those of before, so that nothing is traced or compiled twice, and nothing stale is used."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Data:
    """The arguments of a model as they were once.

    Attributes:
        structure: Of all arguments.
        leaves: The very objects: kept, so that nothing else gets their ids.
        copies: Of arrays that can be changed in place; None for other leaves.
        in_float64: Whether they are seen in 64 bits.
    """

    structure: Any
    leaves: tuple[Any, ...]
    copies: tuple[np.ndarray | None, ...]
    in_float64: bool

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> Data:
        """The arguments as they are now."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        copies = tuple(np.array(leaf, copy=True) if _can_change(leaf) else None for leaf in leaves)
        return cls(structure, tuple(leaves), copies, jax.config.jax_enable_x64)

    def are(self, args: tuple, kwargs: dict) -> bool:
        """Whether arguments are the same objects with the same contents."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        return (
            structure == self.structure
            and jax.config.jax_enable_x64 == self.in_float64
            and all(one is other for one, other in zip(leaves, self.leaves))
            and all(
                copy is None or _equal(copy, np.asarray(leaf))
                for copy, leaf in zip(self.copies, leaves)
            )
        )


def _can_change(leaf: Any) -> bool:
    """NumPy arrays, and what hands one out (a data frame's column); JAX's arrays and scalars stay what they are."""
    return hasattr(leaf, "__array__") and not isinstance(leaf, (jax.Array, np.generic))


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    # Bit for bit: NaN equals itself, and any type of entries will do.
    return (
        one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()
    )
