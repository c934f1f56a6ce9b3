"""Totals of what a kernel says of its steps, chain by chain, without keeping what it said.

Per chain sum, smallest, largest and where, and how many were not finite. Totals of consecutive pieces merge exactly; a
NaN stays. Left out: anything that needs the order of steps, such as the energy's increments.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class Total:
    """Totals of one thing that the kernel says of every step, one entry per chain, shapes `(C,)`.

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

    def beside(self, other: Total) -> Total:
        """The totals of both, whichever comes first in time; what has no draws has the sum 0 and the step -1."""

        def better(a, b):
            """Whether b has the first NaN, or the larger value, or the same one earlier."""
            sooner = b.where_largest < a.where_largest
            lost = np.isnan(a.largest), np.isnan(b.largest)
            larger = (b.largest > a.largest) | ((b.largest == a.largest) & sooner)
            return np.where(lost[0], lost[1] & sooner, lost[1] | larger)

        none = self.where_largest < 0, other.where_largest < 0
        second = none[0] | (~none[1] & better(self, other))
        pick = lambda a, b: np.where(none[0], b, np.where(none[1], a, np.minimum(a, b)))  # noqa: E731
        largest = np.where(second, other.largest, self.largest)
        where = np.where(second, other.where_largest, self.where_largest)
        return Total(
            self.sum + other.sum,
            pick(self.smallest, other.smallest),
            largest,
            where,
            self.nonfinite + other.nonfinite,
        )

    @classmethod
    def nothing(cls, num_chains: int) -> Total:
        """Of no draws."""
        zeros = np.zeros(num_chains)
        return cls(zeros, zeros, zeros, np.full(num_chains, -1), np.zeros(num_chains, np.int64))

    def of_some(self, chains: np.ndarray, num_chains: int) -> Total:
        """The totals of these chains as some of more chains, of which there are no draws."""
        fields = {}
        for field in dataclasses.fields(self):
            full = getattr(Total.nothing(num_chains), field.name).astype(
                getattr(self, field.name).dtype
            )
            full[chains] = getattr(self, field.name)
            fields[field.name] = full
        return Total(**fields)

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
        Where the kernel says it: `divergences`, `accepted`, `acceptance_rate` (mean), `max_residual`, `worst` (its
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
