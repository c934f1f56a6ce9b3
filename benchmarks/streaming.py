"""Streaming statistics: what they cost and how near they come, `python -m benchmarks.streaming --out DIR`.

First-order autoregressions of known memory and known law (normal, exp of a normal, Cauchy), four chains in chunks of
65,536 steps. Beside every estimate stands the one from all draws kept in memory: ArviZ's effective sample size and
R-hat, and quantiles by sorting, whose errors in rank are compared with the bound that the histogram states. The cost
is the median time of an update, per draw and per number, moments, quantiles and R-hat together.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
from scipy.signal import lfilter

from benchmarks.record import OUT, keep
from partime_mcmc.diagnostics import arviz
from partime_mcmc.storage.streaming_statistics import StreamingStatistics

CHUNK = 65_536
PROBABILITIES = (0.001, 0.05, 0.5, 0.95, 0.999)
LAWS = {
    "normal": lambda z: z,
    "exp": np.exp,
    "Cauchy": lambda z: z / np.abs(np.roll(z, 12_345, axis=1)),
}


def chains(memory: float, num_draws: int, seed: int) -> np.ndarray:
    """Four stationary autoregressions with standard normal law, shape `(4, num_draws)`."""
    noise = np.random.default_rng(seed).normal(size=(4, num_draws))
    noise[:, 1:] *= np.sqrt(1 - memory**2)
    return lfilter([1.0], [1.0, -memory], noise, axis=1)


def inefficiency(law: str, memory: float) -> float:
    """Draws that are worth one for the mean: 1 + 2 Σ_k ρ_k; NaN where the law has no mean."""
    powers = memory ** np.arange(1.0, 5000.0)
    correlations = {"normal": powers, "exp": np.expm1(powers) / np.expm1(1.0)}.get(
        law, np.array([np.nan])
    )
    return float(1 + 2 * correlations.sum())


def accuracy(law: str, memory: float, num_draws: int, seed: int) -> dict:
    """One line: errors of everything that is estimated."""
    x = LAWS[law](chains(memory, num_draws, seed))
    statistics = StreamingStatistics.start()
    for start in range(0, num_draws, CHUNK):
        statistics = statistics.update({"x": x[:, start : start + CHUNK]})
    (row,), (quantiles, bounds) = statistics.summary(), statistics.quantiles(PROBABILITIES)
    ranks = np.stack([(x < quantile).mean() for quantile in quantiles[0]])
    return {
        "law": law,
        "memory": memory,
        "draws per chain": num_draws,
        "rank error": float(np.abs(ranks - PROBABILITIES).max()),
        "stated bound": float(bounds.max()),
        "ESS": row["ess"],
        "bulk ESS by ArviZ": arviz.ess_bulk(x),
        "exact ESS of the mean": x.size / inefficiency(law, memory),
        "R-hat": row["r_hat"],
        "R-hat by ArviZ": arviz.rhat(x),
        "state, kB": sum(array.nbytes for array in statistics.to_arrays().values()) / 1e3,
    }


def cost(dimension: int, dtype: str, repeats: int = 9) -> dict:
    """One line: seconds of an update with a chunk of four chains."""
    x = np.random.default_rng(0).normal(size=(4, CHUNK, dimension)).astype(dtype)
    info = {"accepted": x[..., 0] > -1, "residual": np.abs(x[..., 0])}
    statistics, seconds = StreamingStatistics.start().update({"x": x}, info), []
    for _ in range(repeats):
        begin = time.perf_counter()
        statistics.update({"x": x}, info)
        seconds.append(time.perf_counter() - begin)
    median = float(np.median(seconds))
    return {
        "dimension": dimension,
        "dtype": dtype,
        "ns per number": 1e9 * median / x.size,
        "seconds per 10^7 draws": 1e7 * median / (4 * CHUNK),
    }


def table(rows: list[dict]) -> str:
    """Markdown."""

    def cell(value):
        return (
            f"{value:,.4g}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else value
        )

    lines = [" | ".join(rows[0]), " | ".join("---" for _ in rows[0])]
    lines += [" | ".join(cell(value) for value in row.values()) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)


def main(argv: list[str] | None = None) -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "--out", type=Path, default=OUT, help="folder for running-cpu.md and running-cpu.json"
    )
    parser.add_argument("--num-draws", type=int, default=1_000_000, help="draws per chain")
    arguments = parser.parse_args(argv)
    near = [
        accuracy(law, memory, arguments.num_draws, seed=1)
        for law, memory in (
            ("normal", 0.0),
            ("normal", 0.9),
            ("normal", 0.99),
            ("normal", -0.5),
            ("exp", 0.5),
            ("Cauchy", 0.0),
        )
    ]
    costs = [
        cost(dimension, dtype) for dimension in (10, 18, 100) for dtype in ("float64", "float32")
    ]
    text = f"{table(near)}\n\n{table(costs)}\n"
    print(text)
    keep(
        arguments.out / "running-cpu.json",
        {"accuracy": near, "cost": costs},
        f"# Streaming statistics\n\n{text}",
    )


if __name__ == "__main__":
    main()
