"""Statistics of draws that are not kept: moments, quantiles, R-hat, effective sample size, totals, your own folds.

    statistics = StreamingStatistics.start()
    for values, info in chunks:                       # values: name -> (C, n, ...), info: name -> (C, n)
        statistics = statistics.update(values, info)
    rows, totals = statistics.summary(), statistics.totals()

Memory does not grow with the draws. Everything is NumPy in float64 on the host. A `StreamingStatistics` is never changed;
`to_arrays` gives plain arrays, and one restored by `from_arrays` goes on as if nothing had happened, bit for bit, if it
is given the same chunks (on one machine, with the same NumPy).

Accuracy: moments are exact up to rounding (Chan, Golub, LeVeque 1983). A quantile's error in rank is bounded by
`rank_error`, the share of the draws in its bin (see `histogram`). R-hat and effective sample size come from batches
(see `batch_means`): about 15% for four chains, and not rank-normalised. What is not finite stays so: the mean, or all of a
row, becomes NaN.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from partime_mcmc.storage.batch_means import BLOCK, BatchMeans
from partime_mcmc.storage.histogram import Histogram
from partime_mcmc.types import PyTree


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


_QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
_FEW = 10  # A healthy chain may stand still for as many draws.


@dataclasses.dataclass(frozen=True)
class Fold:
    """Something of your own, accumulated over draws.

    `update(carry, values, info)` gets the chunks that `StreamingStatistics.update` gets, and must not depend on how draws are
    divided into chunks.

    Attributes:
        initial: The first carry, a pytree of arrays or numbers.
        update: To the next carry, with the same structure.
    """

    initial: PyTree
    update: Callable[[PyTree, Mapping[str, np.ndarray], Mapping[str, np.ndarray]], PyTree]


@dataclasses.dataclass(frozen=True, eq=False)
class StreamingStatistics:
    """The statistics so far: C chains, n draws each, D scalar coordinates in all values together.

    Attributes:
        layout: Name and shape of every value, in order; coordinates follow one another in C order.
        batches: Moments by batch; None before the first draws.
        histogram: For quantiles.
        extremes: Smallest and largest draw per coordinate and chain, shape `(2, D, C)`.
        info: Sums of what the kernel reports, by name.
        folds: Functions of your own, by name.
        carries: Where they stand, by name.
    """

    layout: tuple[tuple[str, tuple[int, ...]], ...] = ()
    batches: BatchMeans | None = None
    histogram: Histogram | None = None
    extremes: np.ndarray | None = None
    info: Mapping[str, Total] = dataclasses.field(default_factory=dict)
    folds: Mapping[str, Fold] = dataclasses.field(default_factory=dict)
    carries: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(cls, folds: Mapping[str, Fold] | None = None) -> StreamingStatistics:
        """Nothing yet.

        Args:
            folds: Functions of your own, by name.

        Raises:
            TypeError: If one is no `Fold`.
        """
        folds = dict(folds or {})
        for name, fold in folds.items():
            if not isinstance(fold, Fold):
                raise TypeError(
                    f"folds: {name!r} is a {type(fold).__name__}, wanted a Fold(initial, update)"
                )
        return cls(
            folds=folds, carries={name: _on_host(fold.initial) for name, fold in folds.items()}
        )

    @property
    def num_draws(self) -> int:
        """n, draws per chain."""
        return 0 if self.batches is None else self.batches.num_draws

    @property
    def num_chains(self) -> int:
        """C; 0 before the first draws."""
        return 0 if self.batches is None else self.batches.means.shape[1]

    @property
    def labels(self) -> list[str]:
        """Names of coordinates, such as `theta[3]`."""
        return [
            f"{name}[{', '.join(map(str, index))}]" if index else name
            for name, shape in self.layout
            for index in np.ndindex(shape)
        ]

    def update(
        self, values: Mapping[str, np.ndarray], info: Mapping[str, np.ndarray] | None = None
    ) -> StreamingStatistics:
        """The statistics with more draws.

        Args:
            values: Name to real array `(C, n, ...)`; the same names and shapes every time, n may differ.
            info: Name to array `(C, n)`; likewise.

        Raises:
            ValueError: If names, chains or shapes differ from those before, or from each other.
        """
        values, info = (
            {name: np.asarray(array) for name, array in given.items()}
            for given in (values, info or {})
        )
        x, layout = flat_values(values)
        for name, array in info.items():
            if array.shape != x.shape[1:]:
                raise ValueError(
                    f"info: {name!r} has shape {array.shape}, wanted (num_chains, num_draws) = {x.shape[1:]}"
                )
        if self.batches is not None:
            self._check(layout, x.shape[1], info)
        if not x.shape[2]:
            return self
        with np.errstate(all="ignore"):
            together = x.reshape(x.shape[0], -1)
            histogram = (
                Histogram.around(together) if self.histogram is None else self.histogram
            ).add(together)
            extremes = np.stack([x.min(axis=2), x.max(axis=2)])
            if self.extremes is not None:
                extremes = np.stack(
                    [
                        np.minimum(self.extremes[0], extremes[0]),
                        np.maximum(self.extremes[1], extremes[1]),
                    ]
                )
            batches = (self.batches or BatchMeans.empty(*x.shape[:2])).add(x)
            totals = {name: Total.of(array, self.num_draws) for name, array in info.items()}
            totals = {
                name: self.info[name].then(total) if self.info else total
                for name, total in totals.items()
            }
            return dataclasses.replace(
                self,
                layout=layout,
                batches=batches,
                histogram=histogram,
                extremes=extremes,
                info=totals,
                carries={
                    name: _on_host(fold.update(self.carries[name], values, info))
                    for name, fold in self.folds.items()
                },
            )

    def _check(self, layout, num_chains: int, info: Mapping[str, np.ndarray]) -> None:
        if layout != self.layout:
            raise ValueError(
                f"values: got {dict(layout)}, wanted the names and shapes of before, {dict(self.layout)}"
            )
        if num_chains != self.num_chains:
            raise ValueError(f"values: got {num_chains} chains, wanted {self.num_chains} as before")
        if set(info) != set(self.info):
            raise ValueError(f"info: got {sorted(info)}, wanted {sorted(self.info)} as before")

    def mean(self) -> np.ndarray:
        """Mean of every chain, shape `(C, D)`."""
        return self._begun()[0].per_chain()[0].T

    def variance(self) -> np.ndarray:
        """Variance of every chain about its own mean, shape `(C, D)`."""
        batches, _, _ = self._begun()
        with np.errstate(all="ignore"):
            return batches.per_chain()[1].T / np.float64(batches.num_draws - 1)

    def quantiles(self, probabilities) -> tuple[np.ndarray, np.ndarray]:
        """Quantiles of all chains together, and bounds on the errors of their ranks as shares of the draws.

        Args:
            probabilities: Shape `(Q,)`.

        Returns:
            Both of shape `(D, Q)`; NaN for coordinates with a NaN among their draws.
        """
        _, histogram, (low, high) = self._begun()
        return histogram.quantiles(probabilities, low.min(axis=1), high.max(axis=1))

    def summary(self) -> list[dict[str, Any]]:
        """A row per coordinate, as `summary_table` gives them for draws that are kept.

        Returns:
            Dicts with `name`, `mean`, `sd`, `q05`, `q50`, `q95`, `mcse_mean`, `mcse_sd`, `ess` (for the mean), `r_hat`,
            `rank_error` (bound on the error in rank of the three quantiles, as a share of the draws) and `frozen`; NaN
            where undefined. None before any draws.
        """
        if self.batches is None:
            return []
        with np.errstate(all="ignore"):
            mean, m = self.batches.pooled()
            sd = np.sqrt(m / np.float64(self.num_draws * self.num_chains - 1))
        quantiles, errors = self.quantiles(list(_QUANTILES.values()))
        columns = {
            "mean": mean,
            "sd": sd,
            **dict(zip(_QUANTILES, quantiles.T)),
            "mcse_mean": self.batches.mcse_mean(),
            "mcse_sd": self.batches.mcse_sd(),
            "ess": self.batches.effective(),
            "r_hat": self.batches.rhat(),
            "rank_error": errors.max(axis=1),
        }
        frozen = self._frozen()
        return [
            {
                "name": label,
                **{name: float(column[j]) for name, column in columns.items()},
                "frozen": bool(frozen[j]),
            }
            for j, label in enumerate(self.labels)
        ]

    def _frozen(self) -> np.ndarray:
        """Coordinates that stand still in a chain, unless it is a constant of the model, `(D,)`."""
        low, high = self._begun()[2]
        stuck = (low == high) & (self.num_draws >= _FEW)
        constant = low.min(axis=1) == high.max(axis=1)
        never = (
            self.info["accepted"].sum == 0
            if "accepted" in self.info
            else np.zeros(self.num_chains, bool)
        )
        return (stuck & (~constant[:, None] | never)).any(axis=1)

    def totals(self) -> dict[str, Any]:
        """Totals of the run in plain values.

        Returns:
            `num_chains`, `num_draws` (per chain), and where the kernel reports it: `divergences`, `accepted`,
            `acceptance_rate` (mean), `max_residual`, `worst` (chain and step of it), `nonfinite` (by name of what was
            not finite, if anything).
        """
        return {
            "num_chains": self.num_chains,
            "num_draws": self.num_draws,
            **summed(self.info, self.num_draws),
        }

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays from which `from_arrays` restores this, names without slashes; functions of your own are not
        among them."""
        header = {"layout": self.layout, "info": list(self.info), "folds": list(self.folds)}
        arrays = {"header": np.frombuffer(json.dumps(header).encode(), np.uint8)}
        for i, carry in enumerate(self.carries.values()):
            arrays |= {f"fold_{i}_{j}": leaf for j, leaf in enumerate(jax.tree.leaves(carry))}
        if self.batches is None:
            return arrays
        batches, histogram, arrays["extremes"] = self._begun()
        for part, found in (("batches", batches), ("histogram", histogram)):
            arrays |= {f"{part}_{name}": array for name, array in found.to_arrays().items()}
        return arrays | {
            f"info_{i}": total.to_array() for i, total in enumerate(self.info.values())
        }

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], folds: Mapping[str, Fold] | None = None
    ) -> StreamingStatistics:
        """The statistics that gave these arrays.

        Args:
            arrays: As `to_arrays` gave them.
            folds: The functions of your own, by the same names.

        Raises:
            ValueError: If the names of `folds`, or the number of arrays in a carry, are not those of before.
        """
        arrays, start = (
            {name: np.asarray(array) for name, array in arrays.items()},
            cls.start(folds),
        )
        header = json.loads(arrays["header"].tobytes())
        if set(header["folds"]) != set(start.folds):
            raise ValueError(
                f"folds: got {sorted(start.folds)}, wanted those of before, {sorted(header['folds'])}"
            )
        carries = {}
        for i, name in enumerate(header["folds"]):
            leaves, structure = jax.tree.flatten(start.carries[name])
            if sum(key.startswith(f"fold_{i}_") for key in arrays) != len(leaves):
                raise ValueError(
                    f"folds: {name!r} has {len(leaves)} arrays in its carry, another number before"
                )
            carries[name] = jax.tree.unflatten(
                structure, [arrays[f"fold_{i}_{j}"] for j in range(len(leaves))]
            )
        folds = {name: start.folds[name] for name in header["folds"]}
        if "extremes" not in arrays:
            return cls(folds=folds, carries=carries)
        layout = tuple((name, tuple(shape)) for name, shape in header["layout"])
        histogram = Histogram.from_arrays(_part(arrays, "histogram_"))
        return cls(
            layout,
            BatchMeans.from_arrays(_part(arrays, "batches_")),
            histogram,
            arrays["extremes"],
            {name: Total.from_array(arrays[f"info_{i}"]) for i, name in enumerate(header["info"])},
            folds,
            carries,
        )

    def _begun(self) -> tuple[BatchMeans, Histogram, np.ndarray]:
        if self.batches is None or self.histogram is None or self.extremes is None:
            raise ValueError("there are no draws yet: update(values, info) first")
        return self.batches, self.histogram, self.extremes


def without_folds(arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The arrays of `StreamingStatistics.to_arrays` for readers who do not have the functions behind its folds."""
    header = json.loads(arrays["header"].tobytes()) | {"folds": []}
    return {**arrays, "header": np.frombuffer(json.dumps(header).encode(), np.uint8)}


def _part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def flat_values(values: Mapping[str, np.ndarray]) -> tuple[np.ndarray, tuple]:
    """All coordinates as one float64 array `(D, C, n)`, and the layout."""
    leads = {array.shape[:2] for array in values.values()}
    if (
        len(leads) != 1
        or min(array.ndim for array in values.values()) < 2
        or not next(iter(leads))[0]
    ):
        shapes = {name: array.shape for name, array in values.items()}
        raise ValueError(
            f"values: got shapes {shapes}, wanted arrays of one (num_chains, num_draws, ...)"
        )
    if any(np.iscomplexobj(array) for array in values.values()):
        raise ValueError("values: got complex arrays, wanted real ones")
    lead = leads.pop()
    flat = [
        np.moveaxis(array.reshape(*lead, math.prod(array.shape[2:])), 2, 0)
        for array in values.values()
    ]
    x = np.empty((sum(array.shape[0] for array in flat), *lead))
    for start in range(0, lead[1], BLOCK):
        steps = (..., slice(start, start + BLOCK))
        np.concatenate([array[steps] for array in flat], axis=0, out=x[steps], casting="unsafe")
    return x, tuple((name, array.shape[2:]) for name, array in values.items())


def _on_host(carry: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: np.array(leaf), carry)
