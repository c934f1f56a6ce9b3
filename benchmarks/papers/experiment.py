"""What an experiment is, and how it is run: times beside residuals, claims beside figures.

An experiment is a module of this folder with the sizes `SMALL` and `PAPER` (keyword arguments) and a function
`run(**size) -> Findings`. Its rows are dictionaries; a row with `seconds` has the `residual` of the path that took them and
the `loop_seconds` of the sequential loop in the same run, or `kept` refuses it. A claim says which text makes it, what was
measured, whether that is the same, and why not if it is not. Small sizes take under two minutes on two cores.

Everything runs with 64-bit floats switched on; an experiment in float32 makes its arrays so.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.record import keep, timed
from partime_mcmc import Dynamics, Kernel, Solution, Status, rollout, solve

NAMES = (
    "deer",
    "deer_training",
    "quasi_deer",
    "elk",
    "predictability",
    "observers",
    "gibbs",
    "mala",
    "adaptive_mala",
    "hmc",
    "fixed_points",
    "newcomers",
)
SIZES = ("small", "paper")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim.

    Attributes:
        source: The paper, as `arXiv:...`, or "the method" where its text predicts what no paper is known to state.
        says: What is claimed.
        measured: What was measured here, figures included.
        reproduced: Whether that is the same.
        why: Where it is not, or only in part: the reason.
    """

    source: str
    says: str
    measured: str
    reproduced: bool
    why: str = ""

    def __post_init__(self):
        if not self.reproduced and not self.why:
            raise ValueError(f"why: nothing given for a claim that is not reproduced ({self.says})")


def judged(
    source: str, says: str, measured: str, reproduced: bool, otherwise: str = "not explained"
) -> Claim:
    """A claim whose `why` is `otherwise` where it is not reproduced, and empty where it is."""
    return Claim(source, says, measured, bool(reproduced), "" if reproduced else otherwise)


@dataclasses.dataclass(frozen=True)
class Findings:
    """What an experiment gives back.

    Attributes:
        rows: One dictionary per measurement, of numbers and text.
        claims: What the papers say about it.
        figure: Drawn from the rows and traces of this run.
    """

    rows: list[dict[str, Any]]
    claims: list[Claim]
    figure: Figure


def solved(
    problem: str,
    dynamics: Dynamics,
    initial: Any,
    drives: Any,
    solvers: dict[str, Any],
    *,
    max_iterations: int | dict[str, int] = 200,
    repeats: int = 3,
    options: dict[str, dict] | None = None,
) -> list[dict[str, Any]]:
    """Solve a problem with every solver and with the loop, in turn, compilation apart.

    Args:
        problem: Its name.
        dynamics: The recurrence.
        initial: `x_0`.
        drives: `u_1..u_T`.
        solvers: By name.
        max_iterations: For all of them, or by name.
        repeats: Times are medians over so many runs.
        options: Further arguments of `solve` by the name of the solver.

    Returns:
        One row per solver.
    """
    bounds = (
        max_iterations
        if isinstance(max_iterations, dict)
        else dict.fromkeys(solvers, max_iterations)
    )
    options = options or {}
    arguments = (dynamics, initial, drives)
    programs: dict[Any, _Program] = {}
    runs: dict[Any, tuple[Any, tuple]] = {None: (jax.jit(rollout), arguments)}
    for name, solver in solvers.items():
        # Solvers that differ in numbers only, such as a damping, share one program.
        key = jax.tree.structure(solver), bounds[name], str(options.get(name))
        if key not in programs:
            programs[key] = _Program(bounds[name], options.get(name, {}))
        runs[name] = programs[key], (*arguments, solver)
    found = timed(runs, repeats)
    wanted = found[None]["value"]
    rows = []
    for name in solvers:
        value = found[name]["value"]
        gaps = jax.tree.map(lambda a, b: np.abs(a - b).max(), value.states, wanted)
        rows.append(
            {
                "problem": problem,
                "method": name,
                "T": jax.tree.leaves(drives)[0].shape[0],
                "D": sum(jnp.size(leaf) for leaf in jax.tree.leaves(initial)),
                "status": Status(int(value.status)).name,
                "iterations": int(value.iterations),
                "exact_steps": int(value.num_exact),
                "evaluations": float(value.stats.evaluations),
                "jvps": float(value.stats.jvps),
                "residual": float(value.residual),
                "difference": float(max(jax.tree.leaves(gaps))),
                "seconds": found[name]["seconds"],
                "loop_seconds": found[None]["seconds"],
                "compile": found[name]["compile"],
                "temp_bytes": found[name]["temp_bytes"],
                "history": history(value),
            }
        )
    return rows


class _Program:
    """`solve` with some arguments fixed, compiled once for all solvers of one structure."""

    def __init__(self, max_iterations: int, options: dict):
        def run(dynamics, initial, drives, solver):
            return solve(
                dynamics,
                initial,
                drives,
                solver=solver,
                max_iterations=max_iterations,
                **options,
            )

        self.jitted, self.compiled = jax.jit(run), None

    def lower(self, *arguments: Any) -> _Program:
        """As a jitted function has it."""
        if self.compiled is None:
            self.compiled = self.jitted.lower(*arguments).compile()
        return self

    def compile(self) -> Any:
        """As a lowered function has it."""
        return self.compiled


def history(solution: Solution) -> list[float]:
    """The largest residual at the start of each iteration, at most 100 of them; infinite where it is not finite."""
    count = min(int(solution.iterations) + 1, 100)
    values = np.asarray(solution.stats.residual_history, np.float64)[:count]
    return [float(value) for value in np.where(np.isfinite(values), values, np.inf)]


def row_of(rows: list[dict], **wanted: Any) -> dict:
    """The one row with these values."""
    (found,) = [row for row in rows if all(row.get(key) == one for key, one in wanted.items())]
    return found


def converged(row: dict) -> bool:
    """Whether the solve of a row converged."""
    return row["status"] == Status.CONVERGED.name


def ratio(row: dict) -> float:
    """How many times faster than the sequential loop."""
    return row["loop_seconds"] / row["seconds"]


def times(row: dict) -> str:
    """A row's time with what belongs beside it."""
    return (
        f"{1e3 * row['seconds']:.3g} ms against {1e3 * row['loop_seconds']:.3g} ms of the loop, "
        f"residual {row['residual']:.0e}"
    )


def draw_histories(axis: Axes, rows: list[dict], title: str) -> None:
    """The largest residual by iteration, a line per method; what is not finite is left out."""
    for row in rows:
        values = np.asarray(row["history"])
        shown = np.where(np.isfinite(values), np.clip(values, 1e-17, 1e12), np.nan)
        axis.semilogy(shown, label=row["method"], linewidth=1.2)
    axis.set_title(title, fontsize=10)
    axis.set_xlabel("iteration")
    axis.set_ylabel("largest residual")
    axis.legend(fontsize=7)


def said(row: dict) -> str:
    """A row in words."""
    return f"T = {row['T']:,}: {row['status']} after {row['iterations']} iterations, {times(row)}"


def shooting_claim(rolled: dict) -> Claim:
    """What shooting does with a chain of the papers, from its row."""
    return judged(
        "the method",
        "shooting solves the same chain at little more than one evaluation per draw, and faster than the loop",
        f"{rolled['evaluations']:.2f} evaluations per draw, {said(rolled)}",
        converged(rolled) and rolled["evaluations"] < 2 and ratio(rolled) > 1,
        "it takes two evaluations or more: the segments of so short a chain are not long against the steps in which it forgets",
    )


def chain(kernel: Kernel, position: Any, num_steps: int, seed: int) -> tuple[Dynamics, Any, Any]:
    """A kernel's recurrence with its random numbers."""
    state = kernel.init(position)
    return (
        kernel.dynamics(),
        kernel.carry(state),
        kernel.tape(jax.random.key(seed), num_steps, state),
    )


def train(
    loss: Callable, weights: Any, optimizer: Any, num_updates: int
) -> tuple[list, float, Any]:
    """Losses before each update and after the last, median seconds of an update without the first, and the weights.

    Args:
        loss: Of weights, a scalar.
        weights: To begin with.
        optimizer: Of optax.
        num_updates: How many.
    """
    from optax import apply_updates

    @jax.jit
    def update(weights, memory):
        value, gradient = jax.value_and_grad(loss)(weights)
        change, memory = optimizer.update(gradient, memory)
        return apply_updates(weights, change), memory, value

    memory, losses, seconds = optimizer.init(weights), [], []
    for _ in range(num_updates + 1):
        begin = time.perf_counter()
        weights, memory, value = jax.block_until_ready(update(weights, memory))
        seconds.append(time.perf_counter() - begin)
        losses.append(float(value))
    return losses, float(np.median(seconds[1:])), weights


def panels(count: int, width: float = 4.2, height: float = 3.2) -> tuple[Figure, list]:
    """An empty figure with so many panels in a row."""
    drawn = Figure(figsize=(width * count, height), layout="constrained")
    axes = drawn.subplots(1, count, squeeze=False)[0]
    for axis in axes:
        axis.grid(True, linewidth=0.4, alpha=0.6)
    return drawn, list(axes)


def run_experiment(name: str, size: str, out: Path, **changed: Any) -> Findings:
    """Run one experiment and keep its JSON, its table and its figure in a folder.

    Args:
        name: One of `NAMES`.
        size: One of `SIZES`.
        out: The folder; files are called `NAME-SIZE-PLATFORM`.
        changed: Values of the size to be replaced, for tests.
    """
    module = importlib.import_module(f"benchmarks.papers.{name}")
    chosen = getattr(module, size.upper()) | changed
    begin, cpu = time.perf_counter(), time.process_time()
    with jax.enable_x64(True):
        found: Findings = module.run(**chosen)
    total, cpu = time.perf_counter() - begin, time.process_time() - cpu
    for row in found.rows:
        if "seconds" in row and not {"residual", "loop_seconds"} <= set(row):
            raise ValueError(f"row: a time without its residual and the loop's time ({row})")
    stem = f"{name}-{size}-{jax.default_backend()}"
    record = {
        "experiment": name,
        "size": size,
        "settings": chosen,
        "total_seconds": total,
        "cpu_seconds": cpu,
        "rows": [_finite(row) for row in found.rows],
        "claims": [dataclasses.asdict(claim) for claim in found.claims],
    }
    text = f"# {title_of(module)}\n\n{claims_table(record['claims'])}\n{rows_table(found.rows)}"
    keep(out / f"{stem}.json", record, text)
    # The same numbers give the same file: no date, no random names of clipping paths.
    with matplotlib.rc_context({"svg.hashsalt": stem, "svg.fonttype": "none"}):
        found.figure.savefig(out / f"{stem}.svg", metadata={"Date": None})
    print(text)
    print(
        f"{name}, {size}: {total:.0f} s ({cpu:.0f} s of processors), kept in {out / stem}.json and .svg",
        flush=True,
    )
    return found


def title_of(module: ModuleType) -> str:
    """The first line of an experiment's docstring."""
    return (module.__doc__ or "").splitlines()[0]


def _finite(row: dict) -> dict:
    """JSON has no NaN and no infinities: text stands for them."""

    def plain(value):
        if isinstance(value, list):
            return [plain(one) for one in value]
        if not isinstance(value, float):
            return value
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)

    return {key: plain(value) for key, value in row.items()}


def claims_table(claims: list[dict]) -> str:
    """The table "paper says, we measured, where they differ and why"."""
    lines = [
        "| source | the paper says | we measured | reproduced | where they differ and why |",
        "|---|---|---|---|---|",
    ]
    for claim in claims:
        lines.append(
            f"| {claim['source']} | {claim['says']} | {claim['measured']} | "
            f"{'yes' if claim['reproduced'] else '**no**'} | {claim['why']} |"
        )
    return "\n".join(lines) + "\n"


def rows_table(rows: list[dict]) -> str:
    """All rows with the columns that any of them has."""
    columns = list(
        dict.fromkeys(
            key
            for row in rows
            for key in row
            if key != "temp_bytes" and not isinstance(row[key], list)
        )
    )
    lines = [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]
    for row in rows:
        lines.append("| " + " | ".join(_shown(row.get(key, "")) for key in columns) + " |")
    return "\n".join(lines) + "\n"


def _shown(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def report(folder: Path, platform: str = "cpu", size: str = "small") -> str:
    """The page of all claims, from the records in a folder; experiments without a record are listed at its end.

    Args:
        folder: Where `run_experiment` kept them.
        platform: Of the records.
        size: Of the records.
    """
    parts, count, right, missing = [], 0, 0, []
    for name in NAMES:
        stem = f"{name}-{size}-{platform}"
        title = title_of(importlib.import_module(f"benchmarks.papers.{name}"))
        if not (folder / f"{stem}.json").exists():
            missing.append(title)
            continue
        record = json.loads((folder / f"{stem}.json").read_text(encoding="utf-8"))
        parts.append(
            f"## {title}\n\n{claims_table(record['claims'])}\n"
            f"![{name}](../results/papers/{stem}.svg)\n\nAll rows: `benchmarks/results/papers/{stem}.md`; "
            f"{record['total_seconds']:.0f} s in all, {record['cpu_seconds']:.0f} s of processors, compilation included.\n"
        )
        count += len(record["claims"])
        right += sum(claim["reproduced"] for claim in record["claims"])
    parts += [f"Not measured at this size yet: {title}\n" for title in missing]
    return f"{count} claims, {right} reproduced.\n\n" + "\n".join(parts)
