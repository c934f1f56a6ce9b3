"""Prefix scans of affine maps side by side: `python -m benchmarks.scans --out benchmarks/results`.

x_t = a_t x_{t-1} + b_t for diagonal a_t (D numbers), and for small dense ones (D × D), by every scan of `scan.prefix` and by the
one that the library takes here. |a_t| < 1 as in a clipped solve. Ratios are against the plain loop of the same run; `difference`
is the largest against the plain loop in float64, relative to the largest state. Bandwidth counts what must be moved at least
(read a and b, write x) and stands beside that of a copy of the same arrays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.shooting import timed
from partime_mcmc.mcmc.finish import versions
from partime_mcmc.scan import AssociativeScan, ChunkedScan, SequentialScan, default_scan
from partime_mcmc.scan.affine import Dense, Diagonal

LENGTHS, WIDTHS, DENSE_WIDTHS = (1_000, 100_000, 1_000_000), (1, 8, 64), (2, 8)
_MOST_NUMBERS = 2**27


def scans(num_steps: int) -> dict:
    """The candidates by name; chunks near √T balance the two depths of a chunked scan."""
    return {"plain loop": SequentialScan(), "chunked": ChunkedScan(max(8, round(num_steps**0.5))),
            "associative": AssociativeScan(), "in use": default_scan()}


def problem(kind: str, num_steps: int, width: int, dtype: str):
    """Maps and a start, drawn from a fixed seed; linear parts have norm below 1."""
    random = np.random.default_rng(0)
    shape = (num_steps, width) if kind == "diagonal" else (num_steps, width, width)
    linear = random.uniform(-1, 1, shape) * (1.0 if kind == "diagonal" else 1 / width)
    make = Diagonal if kind == "diagonal" else Dense
    return make(jnp.asarray(linear, dtype), jnp.asarray(random.normal(size=(num_steps, width)), dtype)), jnp.ones(width, dtype)


def exact(elements, start) -> np.ndarray:
    """The path in float64, whatever the maps are in."""
    linear, shift = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(elements))
    value, path = np.asarray(start, np.float64), np.empty(shift.shape)
    for t in range(len(shift)):
        value = (linear[t] * value if linear.ndim == 2 else linear[t] @ value) + shift[t]
        path[t] = value
    return path


def measure(kind: str, num_steps: int, width: int, dtype: str, repeats: int) -> dict:
    """One size: every scan, interleaved, and a copy of the same bytes."""
    elements, start = problem(kind, num_steps, width, dtype)
    runs = {name: (jax.jit(scan.__call__), (elements, start)) for name, scan in scans(num_steps).items()}
    runs["copy"] = (jax.jit(lambda elements: jax.tree.map(lambda leaf: leaf + 1, elements)), (elements,))
    found = timed(runs, repeats)
    reference = exact(elements, start) if num_steps <= 100_000 else np.asarray(found["plain loop"]["value"], np.float64)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(elements))
    moved = size + start.nbytes * num_steps
    largest = np.abs(reference).max()
    return {
        "kind": kind, "num_steps": num_steps, "width": width, "dtype": dtype, "loop_seconds": found["plain loop"]["seconds"],
        "copy_bytes_per_second": 2 * size / found["copy"]["seconds"],
        "scans": {name: {"seconds": one["seconds"], "ratio": found["plain loop"]["seconds"] / one["seconds"],
                         "bytes_per_second": moved / one["seconds"], "compile": one["compile"],
                         "difference": float(np.abs(np.asarray(one["value"]) - reference).max() / largest)}
                  for name, one in found.items() if name != "copy"}}


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    names = list(scans(1))
    lines = [f"| maps | T | D | {' | '.join(f'{name}, ms' for name in names)} | in use / fastest other | largest difference | "
             "bandwidth in use / copy |", "|---" * (6 + len(names)) + "|"]
    for row in rows:
        times = {name: one["seconds"] for name, one in row["scans"].items()}
        fastest = min(seconds for name, seconds in times.items() if name != "in use")
        worst = max(one["difference"] for one in row["scans"].values())
        share = row["scans"]["in use"]["bytes_per_second"] / row["copy_bytes_per_second"]
        lines.append(f"| {row['kind']}, {row['dtype']} | {row['num_steps']:,} | {row['width']} | "
                     + " | ".join(f"{1e3 * times[name]:.3f}" for name in names)
                     + f" | {times['in use'] / fastest:.2f} | {worst:.0e} | {share:.0%} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure every size and write `scans-cpu.json` and `.md`, named by the platform."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--dtype", nargs="*", default=["float32"], choices=["float32", "float64", "bfloat16"])
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="largest T")
    arguments = parser.parse_args(argv)
    rows = []
    for dtype in arguments.dtype:
        with jax.enable_x64(dtype == "float64"):
            for kind, widths in (("diagonal", WIDTHS), ("dense", DENSE_WIDTHS)):
                for width in widths:
                    for num_steps in LENGTHS:
                        numbers = num_steps * width * (width if kind == "dense" else 1)
                        if num_steps <= arguments.longest and numbers <= _MOST_NUMBERS:
                            rows.append(measure(kind, num_steps, width, dtype, arguments.repeats))
                            print(table(rows[-1:]).splitlines()[-1], flush=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    stored = arguments.out / f"scans-{jax.default_backend()}.json"
    machine = {"platform": jax.default_backend(), "device": jax.devices()[0].device_kind, "versions": versions()}
    stored.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    stored.with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
