"""Prefix scans of affine maps side by side: `python -m benchmarks.scans --out DIR`.

x_t = a_t x_{t-1} + b_t for diagonal a_t (D numbers), and for small dense ones (D × D), by every scan of the library.
|a_t| < 1 as in a clipped solve. All are timed in turn, short ones up to 200 times,
those more than twenty times slower than the fastest once; medians. On an accelerator the plain loop takes a kernel
per step: with `--loop-steps` it is timed for so many steps and scaled (*). The one in use, `default_scan` of these
maps, is one of them and is not timed again: the same program twice would differ by noise alone. `difference` is the
largest against the path in float64, relative to the largest state, and must stay below what rounding explains.
Bandwidth counts what must be moved at least (read a and b, write x) and stands beside that of a copy of the same
arrays.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, in_turn, keep, prepared, settled
from partime_mcmc.scan import AssociativeScan, ChunkedScan, SequentialScan, default_scan
from partime_mcmc.scan.affine import Dense, Diagonal

LENGTHS, WIDTHS, DENSE_WIDTHS = (1_000, 100_000, 1_000_000), (1, 8, 64), (2, 8)
_MOST_NUMBERS = 2**27


def scans(num_steps: int) -> dict:
    """The candidates by name; chunks near √T balance the two depths of a chunked scan."""
    return {
        "plain loop": SequentialScan(),
        "chunked": ChunkedScan(max(8, round(num_steps**0.5))),
        "associative": AssociativeScan(),
    }


def in_use(elements, candidates: dict) -> str:
    """The name of the scan that the library takes for these maps."""
    taken = default_scan(elements)
    names = [name for name, scan in candidates.items() if scan == taken]
    if not names:
        raise ValueError(
            f"default_scan took {taken!r}, which is not among the candidates {list(candidates)}"
        )
    return names[0]


def problem(kind: str, num_steps: int, width: int, dtype: str):
    """Maps and a start, drawn from a fixed seed; linear parts have norm below 1."""
    random = np.random.default_rng(0)
    shape = (num_steps, width) if kind == "diagonal" else (num_steps, width, width)
    linear = random.uniform(-1, 1, shape) * (1.0 if kind == "diagonal" else 1 / width)
    make = Diagonal if kind == "diagonal" else Dense
    shift = random.normal(size=(num_steps, width))
    return make(jnp.asarray(linear, dtype), jnp.asarray(shift, dtype)), jnp.ones(width, dtype)


def exact(elements, start) -> np.ndarray:
    """The path in float64, whatever the maps are in: by NumPy, and the longest by the plain loop on the host."""
    if elements.shift.shape[0] > 100_000:
        with jax.enable_x64(True), jax.default_device(jax.devices("cpu")[0]):
            wide = jax.tree.map(
                lambda leaf: jnp.asarray(np.asarray(leaf, np.float64)), (elements, start)
            )
            return np.asarray(SequentialScan()(*wide))
    linear, shift = (np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(elements))
    value, path = np.asarray(start, np.float64), np.empty(shift.shape)
    for t in range(len(shift)):
        value = (linear[t] * value if linear.ndim == 2 else linear[t] @ value) + shift[t]
        path[t] = value
    return path


def measure(
    kind: str, num_steps: int, width: int, dtype: str, repeats: int, loop_steps: int
) -> dict:
    """One size: every scan, interleaved, and a copy of the same bytes."""
    elements, start = problem(kind, num_steps, width, dtype)
    candidates = scans(num_steps)
    looked = min(num_steps, loop_steps)
    shorter = jax.tree.map(lambda leaf: leaf[:looked], elements)
    runs = {
        name: (jax.jit(scan.__call__), (shorter if name == "plain loop" else elements, start))
        for name, scan in candidates.items()
    }
    runs["copy"] = (
        jax.jit(lambda elements: jax.tree.map(lambda leaf: leaf + 1, elements)),
        (elements,),
    )
    found = prepared(runs)
    in_turn(found, 1)
    # The first round shows how long they take, and who is out of the race.
    fastest = min(found[name]["seconds"] for name in candidates)
    close = {name: one for name, one in found.items() if one["seconds"] < max(20 * fastest, 0.02)}
    in_turn(close, settled(repeats, sum(one["seconds"] for one in close.values())))
    found["plain loop"]["seconds"] *= num_steps / looked
    reference = exact(elements, start)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(elements))
    moved = size + start.nbytes * num_steps
    largest = np.abs(reference).max()
    paths = {name: np.asarray(found[name]["value"], np.float64) for name in candidates}
    differences = {
        name: float(np.abs(path - reference[: len(path)]).max() / largest)
        for name, path in paths.items()
    }
    # |a_t| < 1 keeps errors from growing: every one of a few hundred summands that are not forgotten rounds once.
    if not max(differences.values()) <= 512 * float(jnp.finfo(dtype).eps):
        raise ValueError(
            f"scans of {kind} maps, T = {num_steps:,}, D = {width}, {dtype} disagree: {differences}"
        )
    return {
        "kind": kind,
        "num_steps": num_steps,
        "width": width,
        "dtype": dtype,
        "loop_seconds": found["plain loop"]["seconds"],
        "in_use": in_use(elements, candidates),
        "repeats": max(len(one["times"]) for one in found.values()),
        "loop_scaled": looked < num_steps,
        "copy_bytes_per_second": 2 * size / found["copy"]["seconds"],
        "scans": {
            name: {
                "seconds": one["seconds"],
                "ratio": found["plain loop"]["seconds"] / one["seconds"],
                "bytes_per_second": moved / one["seconds"],
                "compile": one["compile"],
                "temp_bytes": one["temp_bytes"],
                "difference": differences[name],
            }
            for name, one in found.items()
            if name != "copy"
        },
    }


def table(rows: list[dict], left_out: list[str]) -> str:
    """The Markdown table."""
    names = list(rows[0]["scans"]) if rows else []
    lines = [
        f"| maps | T | D | {' | '.join(f'{name}, ms' for name in names)} | in use | in use / fastest other | "
        "largest difference | bandwidth in use / copy | repeats |",
        "|---" * (8 + len(names)) + "|",
    ]
    for row in rows:
        times, taken = {name: one["seconds"] for name, one in row["scans"].items()}, row["in_use"]
        fastest = min(seconds for name, seconds in times.items() if name != taken)
        marks = {"plain loop": "*" * row["loop_scaled"]}
        worst = max(one["difference"] for one in row["scans"].values())
        share = row["scans"][taken]["bytes_per_second"] / row["copy_bytes_per_second"]
        lines.append(
            f"| {row['kind']}, {row['dtype']} | {row['num_steps']:,} | {row['width']} | "
            + " | ".join(f"{1e3 * times[name]:.3f}{marks.get(name, '')}" for name in names)
            + f" | {taken} | {times[taken] / fastest:.2f} | {worst:.0e} | {share:.0%} | {row['repeats']} |"
        )
    return "\n".join(lines + ["", *(f"Left out, for memory: {name}." for name in left_out)]) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure every size and write `scans-cpu.json` and `.md`, named by the platform."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--repeats",
        type=int,
        default=15,
        help="of slow ones; short ones are repeated up to 200 times",
    )
    parser.add_argument(
        "--dtype", nargs="*", default=["float32"], choices=["float32", "float64", "bfloat16"]
    )
    parser.add_argument("--longest", type=int, default=max(LENGTHS), help="largest T")
    parser.add_argument(
        "--widths", type=int, nargs="*", default=sorted({*WIDTHS, *DENSE_WIDTHS}), help="which D"
    )
    parser.add_argument(
        "--loop-steps", type=int, default=10**9, help="steps for which the plain loop is timed"
    )
    arguments = parser.parse_args(argv)
    stored, rows, left_out = arguments.out / f"scans-{jax.default_backend()}.json", [], []
    sizes = [
        (kind, width, num_steps)
        for kind, widths in (("diagonal", WIDTHS), ("dense", DENSE_WIDTHS))
        for width in widths
        for num_steps in LENGTHS
        if num_steps <= arguments.longest and width in arguments.widths
    ]
    for dtype in arguments.dtype:
        with jax.enable_x64(dtype == "float64"):
            for kind, width, num_steps in sizes:
                if num_steps * width * (width if kind == "dense" else 1) > _MOST_NUMBERS:
                    left_out.append(f"{kind}, {dtype}, T = {num_steps:,}, D = {width}")
                    continue
                rows.append(
                    measure(kind, num_steps, width, dtype, arguments.repeats, arguments.loop_steps)
                )
                print(table(rows[-1:], []).splitlines()[2], flush=True)
                keep(stored, {"rows": rows, "left_out": left_out}, table(rows, left_out))


if __name__ == "__main__":
    main()
