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
(see `batch_means`): about 15% for four chains, and not rank-normalised. What is not finite makes the mean or row NaN.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Mapping
from typing import Any, Self

import jax
import numpy as np

from partime_mcmc.storage.batch_means import BLOCK, BatchMeans
from partime_mcmc.storage.histogram import Histogram
from partime_mcmc.storage.serialize import json_bytes, part_of
from partime_mcmc.types import PyTree

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
        histogram: For quantiles, with the smallest and largest draws; None likewise.
        info: Sums over draws of what the kernel reports, of flags counts, by name, shape `(C,)`.
        folds: Functions of your own, by name.
        carries: Where they stand, by name.
    """

    layout: tuple[tuple[str, tuple[int, ...]], ...] = ()
    batches: BatchMeans | None = None
    histogram: Histogram | None = None
    info: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    folds: Mapping[str, Fold] = dataclasses.field(default_factory=dict)
    carries: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)

    @classmethod
    def start(cls, folds: Mapping[str, Fold] | None = None) -> Self:
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
        return 0 if self.batches is None else self.batches.num_chains

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
    ) -> Self:
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
            return dataclasses.replace(
                self,
                layout=layout,
                batches=(self.batches or BatchMeans.empty(*x.shape[:2])).add(x),
                histogram=(self.histogram or Histogram.around(x)).add(x),
                info={
                    name: self.info.get(name, 0.0) + array.astype(np.float64).sum(axis=1)
                    for name, array in info.items()
                },
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
        with np.errstate(all="ignore"):
            return self._begun()[0].per_chain()[1].T / np.float64(self.num_draws - 1)

    def quantiles(self, probabilities) -> tuple[np.ndarray, np.ndarray]:
        """Quantiles of all chains together, and bounds on the errors of their ranks as shares of the draws.

        Args:
            probabilities: Shape `(Q,)`.

        Returns:
            Both of shape `(D, Q)`; NaN for coordinates with a NaN among their draws.
        """
        return self._begun()[1].quantiles(probabilities)

    def summary(self) -> list[dict[str, Any]]:
        """A row per coordinate, as `summary_table` gives them for draws that are kept.

        Returns:
            Dicts with `name`, `mean`, `sd`, `q05`, `q50`, `q95`, `mcse_mean`, `mcse_sd`, `ess` (for the mean), `r_hat`,
            `rank_error` (bound on the error in rank of the three quantiles, as a share of the draws) and `frozen`; NaN
            where undefined. None before any draws.
        """
        if self.batches is None:
            return []
        quantiles, errors = self.quantiles(list(_QUANTILES.values()))
        effective = self.batches.effective()
        with np.errstate(all="ignore"):
            mean, variance = self.batches.pooled()
            mcse_mean = np.sqrt(variance / effective)
        columns = {
            "mean": mean,
            "sd": np.sqrt(variance),
            **dict(zip(_QUANTILES, quantiles.T)),
            "mcse_mean": mcse_mean,
            "mcse_sd": self.batches.mcse_sd(),
            "ess": effective,
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
        low, high = self._begun()[1].extremes
        stuck = (low == high) & (self.num_draws >= _FEW)
        constant = low.min(axis=1) == high.max(axis=1)
        never = self.info.get("accepted", np.ones(self.num_chains)) == 0
        return (stuck & (~constant[:, None] | never)).any(axis=1)

    def totals(self) -> dict[str, Any]:
        """Totals of the run in plain values.

        Returns:
            `num_chains`, `num_draws` (per chain), and where the kernel reports it: `divergences`, `accepted`,
            `acceptance_rate` (mean).
        """
        sums = {name: total.sum() for name, total in self.info.items()}
        counts = {"divergences": "diverging", "accepted": "accepted"}
        found: dict[str, Any] = {"num_chains": self.num_chains, "num_draws": self.num_draws}
        found |= {name: int(sums[ours]) for name, ours in counts.items() if ours in sums}
        if "acceptance_rate" in sums:
            found["acceptance_rate"] = float(
                sums["acceptance_rate"] / (self.num_draws * self.num_chains)
            )
        return found

    def to_arrays(self) -> dict[str, np.ndarray]:
        """Plain arrays from which `from_arrays` restores this, names without slashes; functions of your own are not
        among them."""
        header = {"layout": self.layout, "info": list(self.info), "folds": list(self.folds)}
        arrays = {"header": json_bytes(header)}
        for i, carry in enumerate(self.carries.values()):
            arrays |= {f"fold_{i}_{j}": leaf for j, leaf in enumerate(jax.tree.leaves(carry))}
        if self.batches is None:
            return arrays
        for part, found in zip(("batches", "histogram"), self._begun()):
            arrays |= {f"{part}_{name}": np.asarray(value) for name, value in vars(found).items()}
        return arrays | {f"info_{i}": sums for i, sums in enumerate(self.info.values())}

    @classmethod
    def from_arrays(
        cls, arrays: Mapping[str, np.ndarray], folds: Mapping[str, Fold] | None = None
    ) -> Self:
        """The statistics that gave these arrays.

        Args:
            arrays: As `to_arrays` gave them.
            folds: The functions of your own, by the same names; None: what became of them is left out.

        Raises:
            ValueError: If the names of `folds`, or the number of arrays in a carry, are not those of before.
        """
        start = cls.start(folds)
        header = json.loads(arrays["header"].tobytes())
        names = [] if folds is None else header["folds"]
        if set(names) != set(start.folds):
            raise ValueError(
                f"folds: got {sorted(start.folds)}, wanted those of before, {sorted(names)}"
            )
        carries = {}
        for i, name in enumerate(names):
            leaves, structure = jax.tree.flatten(start.carries[name])
            if sum(key.startswith(f"fold_{i}_") for key in arrays) != len(leaves):
                raise ValueError(
                    f"folds: {name!r} has {len(leaves)} arrays in its carry, another number before"
                )
            carries[name] = jax.tree.unflatten(
                structure, [arrays[f"fold_{i}_{j}"] for j in range(len(leaves))]
            )
        folds = {name: start.folds[name] for name in names}
        if "batches_size" not in arrays:
            return cls(folds=folds, carries=carries)

        def fields(prefix: str) -> dict[str, Any]:
            parts = part_of(arrays, prefix).items()
            return {name: value if value.ndim else int(value) for name, value in parts}

        return cls(
            tuple((name, tuple(shape)) for name, shape in header["layout"]),
            BatchMeans(**fields("batches_")),
            Histogram(**fields("histogram_")),
            {name: arrays[f"info_{i}"] for i, name in enumerate(header["info"])},
            folds,
            carries,
        )

    def _begun(self) -> tuple[BatchMeans, Histogram]:
        if self.batches is None or self.histogram is None:
            raise ValueError("there are no draws yet: update(values, info) first")
        return self.batches, self.histogram


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
