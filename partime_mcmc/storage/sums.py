"""Totals of what a kernel reports of its steps, chain by chain, without keeping it.

Per chain sum, smallest, largest and where, and how many were not finite. Totals of consecutive chunks merge exactly; a
NaN stays. Left out: anything that needs the order of steps, such as the energy's increments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Total:
    """Totals of one thing that the kernel reports of every step, one entry per chain, shapes `(C,)`.

    Attributes:
        sum: Sum over draws; of flags a count.
        smallest: NaN if there was a NaN.
        largest: NaN if there was a NaN.
        where_largest: The step of the first largest one, or of the first NaN; from 0 on.
        nonfinite: How many were not finite.
    """

    sum: np.ndarray
    smallest: np.ndarray
    largest: np.ndarray
    where_largest: np.ndarray
    nonfinite: np.ndarray

    @classmethod
    def of(cls, values: np.ndarray, first: int) -> Total:
        """The totals of `values`, shape `(C, n)` with n >= 1, the first of which is step number `first`."""
        values = values.astype(np.float64)
        where = values.argmax(axis=1)
        return cls(
            values.sum(axis=1),
            values.min(axis=1),
            values.max(axis=1),
            first + where,
            (~np.isfinite(values)).sum(axis=1),
        )

    def then(self, later: Total) -> Total:
        """The totals of both."""
        # Not "later is larger": a NaN is kept from when it first comes.
        moved = ~np.isnan(self.largest) & ~(later.largest <= self.largest)
        largest = np.where(moved, later.largest, self.largest)
        return Total(
            self.sum + later.sum,
            np.minimum(self.smallest, later.smallest),
            largest,
            np.where(moved, later.where_largest, self.where_largest),
            self.nonfinite + later.nonfinite,
        )

    def to_array(self) -> np.ndarray:
        """All of it, shape `(5, C)`: counts and steps are exact in float64 up to 2**53."""
        return np.stack([getattr(self, field.name) for field in dataclasses.fields(self)]).astype(
            np.float64
        )

    @classmethod
    def from_array(cls, array: np.ndarray) -> Total:
        """The totals that gave this array."""
        return cls(*array[:3], *array[3:].astype(np.int64))


def summed(info: Mapping[str, Total], num_draws: int) -> dict[str, Any]:
    """Totals over chains, by plain names.

    Args:
        info: By the kernel's names.
        num_draws: n, draws per chain.

    Returns:
        Where the kernel reports it: `divergences`, `accepted`, `acceptance_rate` (mean), `max_residual`, `worst` (its
        chain and step); and `nonfinite`, how many entries were not finite, by name.
    """
    found: dict[str, Any] = {}
    for name, count in (("divergences", "diverging"), ("accepted", "accepted")):
        if count in info:
            found[name] = int(info[count].sum.sum())
    if "acceptance_rate" in info:
        found["acceptance_rate"] = float(
            info["acceptance_rate"].sum.sum() / (num_draws * len(info["acceptance_rate"].sum))
        )
    if "residual" in info:
        residual = info["residual"]
        chain = int(np.argmax(residual.largest))
        found |= {
            "max_residual": float(residual.largest[chain]),
            "worst": (chain, int(residual.where_largest[chain])),
        }
    found["nonfinite"] = {
        name: int(total.nonfinite.sum()) for name, total in info.items() if total.nonfinite.any()
    }
    return found
