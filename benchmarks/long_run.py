"""Runs longer than memory: `python -m benchmarks.long_run --out DIR`.

Four questions. Three are answered in a process of their own each, on eight schools (D = 10, float64, 4 chains, `coalescing_hmc`):

    memory      the largest resident memory of a process that draws `--num-draws` draws and keeps every
                `--thinning`-th on disk
    speed       draws per second of a stored run against one in memory, of a size that fits memory, interleaved
    progress    a run with a progress line against the same without

and one by `--steps N`: one chain of N transitions of MALA on a normal (D = 1, float64), solved and then evaluated once more, step by
step and in another program, piece after piece. How many of its decisions and states does that find wrong? The run goes on where the
last one ended, so it can be cut (`--limit`); nothing grows with its length.

Warm-up comes before, compilation is part of the long run only; the certificate of every draw is part of all times but
the loop's, streaming statistics, checksums and flushing to the disk of all stored runs. Beside the times stand the
largest residual and what the kernel's own loop takes for as many draws.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from benchmarks.record import OUT, keep, peak_resident
from partime_mcmc import (
    Dynamics,
    Status,
    StoredDraws,
    Windows,
    coalescing_hmc,
    mala,
    open_draws,
    rollout,
    sample,
    shooting,
    solve,
)
from partime_mcmc.certify.certificate import flat_steps
from partime_mcmc.compile_cache import compiler_options
from partime_mcmc.engine import LocalTime
from partime_mcmc.kernels import blackjax_loop
from partime_mcmc.models.eight_schools import make_target
from partime_mcmc.sampling.progress import progress_line, quiet
from partime_mcmc.warmup.warmup import Warmup

CHAINS, WINDOW = 4, 62_500


def prepared() -> tuple[Any, Any]:
    """The target and its warm-up."""
    jax.config.update("jax_enable_x64", True)
    target = make_target(jax.random.key(0))
    return target, sample(
        jax.random.key(1), target, coalescing_hmc, num_samples=8, num_chains=CHAINS, progress=False
    ).warmup


def draw(
    target: Any,
    warmup: Any,
    key: int,
    num_samples: int,
    store: str | None,
    thinning: int = 1,
    progress: Any = quiet,
) -> Any:
    """Chains of `num_samples` draws each, with a plan that both sides share."""
    return sample(
        jax.random.key(key),
        target,
        warmup,
        num_samples=num_samples,
        num_chains=CHAINS,
        solver=shooting(num_segments=32),
        schedule=Windows(WINDOW),
        store=store,
        thinning=thinning if store else 1,
        progress=progress,
    )


def memory(num_draws: int, thinning: int, folder: str) -> dict[str, Any]:
    """A stored run in a process that does nothing else, its warm-up included."""
    target, warmup = prepared()
    before, begin = peak_resident(), time.perf_counter()
    draws = draw(target, warmup, 2, num_draws // CHAINS, folder, thinning)
    seconds = time.perf_counter() - begin
    return {
        "num_draws": num_draws,
        "thinning": thinning,
        "seconds": seconds,
        "draws_per_second": num_draws / seconds,
        "seconds_compile": draws.report.seconds_compile,
        "peak_bytes": peak_resident(),
        "peak_bytes_before": before,
        "bytes_on_disk": sum(
            file.stat().st_size for file in Path(folder).rglob("*") if file.is_file()
        ),
        **judged(draws),
    }


def judged(draws: StoredDraws) -> dict[str, Any]:
    """What the certificate and the streaming statistics show."""
    rows = {row["name"]: row for row in draws.summary()}
    return {
        "certified": bool(np.all(draws.certificate.certified)),
        "max_residual": float(np.max(draws.certificate.max_residual)),
        "num_chunks": draws.checkpoint.index + 1,
        "fallbacks": len(draws.report.fallbacks),
        "evaluations_per_sample": draws.report.evaluations_per_sample,
        "mu": rows["mu"],
        "tau": rows["tau"],
    }


def speed(num_samples: int, repeats: int) -> dict[str, Any]:
    """Stored against in memory, with and without a progress line, and the kernel's own loop; interleaved."""
    target, warmup = prepared()
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            "memory": lambda key: draw(target, warmup, key, num_samples, None),
            "store": lambda key: draw(target, warmup, key, num_samples, f"{folder}/{key}"),
            "thinned store": lambda key: draw(
                target, warmup, key, num_samples, f"{folder}/thin{key}", 10
            ),
            "progress line": lambda key: draw(
                target, warmup, key, num_samples, f"{folder}/line{key}", 10, progress_line
            ),
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        residuals = dict.fromkeys(runs, 0.0)
        for repeat in range(repeats + 1):
            for name, run in runs.items():
                begin = time.perf_counter()
                draws = run(10 + repeat)
                if repeat:  # the first one compiles
                    seconds[name].append(time.perf_counter() - begin)
                residuals[name] = max(
                    residuals[name], float(np.max(draws.certificate.max_residual))
                )
    found = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "num_samples": num_samples,
        "num_chains": CHAINS,
        "repeats": repeats,
        "seconds": found,
        "all_seconds": seconds,
        "residuals": residuals,
        "store_against_memory": found["memory"] / found["store"],
        "thinned_against_memory": found["memory"] / found["thinned store"],
        "progress_costs": found["progress line"] / found["thinned store"] - 1,
        "loop_seconds": loop_seconds(warmup, num_samples),
    }


def loop_seconds(warmup: Warmup, num_samples: int) -> float:
    """The kernel's own sequential loop over all chains, nothing certified and nothing stored."""
    kernel = warmup.kernel

    @jax.jit
    def run(positions, keys):
        return jax.vmap(
            lambda position, key: blackjax_loop(
                kernel, kernel.init(position), jax.random.split(key, num_samples)
            )[0]
        )(positions, keys)

    times = []
    for seed in range(3):
        begin = time.perf_counter()
        jax.block_until_ready(run(warmup.positions, jax.random.split(jax.random.key(seed), CHAINS)))
        times.append(time.perf_counter() - begin)
    return min(times[1:])


# Steps of the long chain that are solved at once.
_PIECE = 10**6
# Standard deviations of the noise, as for certificates in float64.
_WRONG = 1e-8


def one_chain(done: dict[str, Any], num_steps: int, limit: float, save: Any) -> dict[str, Any]:
    """One long chain, piece by piece, each solved and then evaluated once more.

    Args:
        done: What was done already, as returned; empty at the beginning.
        num_steps: N, at least.
        limit: Seconds after which no piece is begun.
        save: Called with what is done, after each piece.
    """
    if done and done["steps"] >= num_steps:
        return done
    jax.config.update("jax_enable_x64", True)
    kernel, begin = mala(lambda x: -0.5 * jnp.sum(x**2), 0.7), time.monotonic()
    dynamics, start = kernel.dynamics(), kernel.init(jnp.zeros(1))
    first, unravel = ravel_pytree(kernel.carry(start))
    compiled = functools.partial(jax.jit, compiler_options=compiler_options())
    tape_of = compiled(lambda piece: kernel.tape(jax.random.fold_in(jax.random.key(0), piece), _PIECE, start))  # fmt: skip
    find = compiled(lambda carry, tape: solve(dynamics, carry, tape, solver=shooting()))
    look = compiled(functools.partial(evaluated_again, dynamics, kernel.noise_scale))
    carry = unravel(jnp.asarray(done.get("carry", first)))
    if not done:
        tape = tape_of(0)
        states = find(carry, tape).states
        loop = compiled(functools.partial(rollout, dynamics))
        jax.block_until_ready((look(carry, states, tape), loop(carry, tape)))
        with stopwatch() as spent:
            truth = jax.block_until_ready(loop(carry, tape))
        names = (
            "steps",
            "wrong",
            "rounded",
            "unconverged",
            "accepted",
            "sum",
            "sum_of_squares",
            "max_residual",
        )
        done = dict.fromkeys(names, 0) | {
            "loop": {"steps": _PIECE} | spent,
            "loop_differs": float(jnp.abs(flat_steps(truth) - flat_steps(states)).max()),
            "solve": {"seconds": 0.0, "core_seconds": 0.0},
            "evaluate": {"seconds": 0.0, "core_seconds": 0.0},
            "peaks": [],
        }
    else:  # what is compiled is apart from the times
        tape = tape_of(0)
        look(carry, find(carry, tape).states, tape)
    here = 0
    while done["steps"] < num_steps and time.monotonic() - begin < limit:
        with stopwatch() as spent:
            tape = tape_of(done["steps"] // _PIECE)
            found = jax.block_until_ready(find(carry, tape))
        with stopwatch() as again:
            seen = jax.block_until_ready(look(carry, found.states, tape))
        carry, counts = seen
        here += _PIECE
        done = done | {
            "steps": done["steps"] + _PIECE,
            "unconverged": done["unconverged"] + int(found.verdict != Status.CONVERGED),
            **{name: done[name] + counts[name].item() for name in ("wrong", "rounded", "accepted", "sum", "sum_of_squares")},
            "max_residual": max(done["max_residual"], counts["max_residual"].item()),
            "solve": {name: done["solve"][name] + spent[name] for name in spent},
            "evaluate": {name: done["evaluate"][name] + again[name] for name in again},
            "carry": np.asarray(ravel_pytree(carry)[0]).tolist(),
        }  # fmt: skip
        save(done | {"peaks": [*done["peaks"], [here, peak_resident()]]})
    return done | {"peaks": [*done["peaks"], *([[here, peak_resident()]] if here else [])]}


def evaluated_again(dynamics: Dynamics, unit: Any, carry: Any, states: Any, tape: Any) -> tuple:
    """Every step of a path evaluated once more: where the path ends, and what was found.

    Args:
        dynamics: The kernel's.
        unit: The standard deviation of its noise.
        carry: Before the first step.
        states: The path, leaves `(T, ...)`.
        tape: Its random numbers.
    """
    before = LocalTime().previous(carry, states)
    values = flat_steps(jax.lax.map(lambda one: dynamics(*one), (before, tape), batch_size=2**12))
    path, previous = flat_steps(states), flat_steps(before)
    residual = jnp.abs(values - path).max(axis=1) / unit
    accepted, moved = (values != previous).any(axis=1), (path != previous).any(axis=1)
    # NaN is no agreement.
    right = residual <= _WRONG
    return jax.tree.map(lambda leaf: leaf[-1], states), {
        "wrong": jnp.sum(~right),
        "rounded": jnp.sum(right & (accepted != moved)),
        "accepted": jnp.sum(accepted),
        "max_residual": jnp.max(residual),
        "sum": jnp.sum(path[:, 0]),
        "sum_of_squares": jnp.sum(path[:, 0] ** 2),
    }


@contextlib.contextmanager
def stopwatch() -> Iterator[dict[str, float]]:
    """Seconds, and seconds of all cores, that the body takes."""
    spent, begin, core = {}, time.perf_counter(), time.process_time()
    yield spent
    spent |= {"seconds": time.perf_counter() - begin, "core_seconds": time.process_time() - core}


def chain_table(chain: dict[str, Any]) -> str:
    """The long chain as Markdown."""
    steps, loop = chain["steps"], chain["loop"]
    mean, variance = chain["sum"] / steps, chain["sum_of_squares"] / steps
    scaled = {name: loop[name] * steps / loop["steps"] for name in ("seconds", "core_seconds")}
    peaks = [peak / 2**20 for _, peak in chain["peaks"]]
    longest = max(count for count, _ in chain["peaks"])
    lines = [
        "| one chain of MALA on a normal, D = 1, float64 | |",
        "|---|---|",
        f"| transitions | {steps:,} in pieces of {_PIECE:,} |",
        f"| decisions or states that another evaluation finds wrong | {chain['wrong']:,} |",
        f"| rejected steps that move by a rounding error (`sample` sets them to the state before) | {chain['rounded']:,} |",
        f"| largest residual | {chain['max_residual']:.0e} standard deviations of the noise |",
        f"| pieces that did not converge | {chain['unconverged']} of {steps // _PIECE:,} |",
        f"| solved in | {chain['solve']['seconds']:,.0f} s ({chain['solve']['core_seconds']:,.0f} s of a core) |",
        f"| evaluated once more in | {chain['evaluate']['seconds']:,.0f} s ({chain['evaluate']['core_seconds']:,.0f} s of a core) |",
        f"| kernel's own loop, scaled from {loop['steps']:,} | {scaled['seconds']:,.0f} s ({scaled['core_seconds']:,.0f} s of a core) |",
        f"| accepted | {chain['accepted'] / steps:.4%} |",
        f"| mean and mean square | {mean:+.1e}, 1 {variance - 1:+.1e} |",
        f"| resident memory | {max(peaks):.0f} MiB at most; the longest of {len(peaks)} processes made {longest:,} transitions |",
    ]
    return "\n".join(lines) + "\n"


def alone(function: Any, *args: Any) -> dict[str, Any]:
    """`function(*args)` in a fresh process, whose memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, args)


def table(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    big, fast = results["memory"], results["speed"]
    each, draws = fast["seconds"], fast["num_samples"] * fast["num_chains"]
    # Older records have no residuals of these rows.
    residual = {name: f"{value:.0e}" for name, value in fast.get("residuals", {}).items()}
    # The loop, scaled to as many draws as the long run's.
    loop = fast["loop_seconds"] * big["num_draws"] / draws
    lines = [
        "| run | draws | seconds | kernel's own loop, s | draws per second | against memory | residual, noise units |",
        "|---" * 7 + "|",
        *(
            f"| {name} | {draws:,} | {value:.2f} | {fast['loop_seconds']:.2f} | {draws / value:,.0f} | "
            f"{each['memory'] / value:.2f} | {residual.get(name, 'not recorded')} |"
            for name, value in each.items()
        ),
        f"| kernel's own loop, nothing certified | {draws:,} | {fast['loop_seconds']:.2f} | {fast['loop_seconds']:.2f} | "
        f"{draws / fast['loop_seconds']:,.0f} | | none measured |",
        f"| to disk, every {big['thinning']}th kept | {big['num_draws']:,} | {big['seconds']:.1f} | {loop:.1f} (scaled) | "
        f"{big['draws_per_second']:,.0f} | | {big['max_residual']:.0e} |",
        "",
        f"The long run: {big['peak_bytes'] / 2**30:.2f} GiB resident at most ({big['peak_bytes_before'] / 2**30:.2f} GiB "
        f"of it before the first draw), {big['bytes_on_disk'] / 1e6:,.0f} MB on disk in {big['num_chunks']} chunks, "
        f"{'all chains certified' if big['certified'] else 'NOT certified'}, largest residual "
        f"{big['max_residual']:.1e} noise units, {big['evaluations_per_sample']:.2f} evaluations per draw, "
        f"{big['fallbacks']} fallbacks, {big['seconds_compile']:.1f} s of it compilation. The progress line costs "
        f"{100 * fast['progress_costs']:+.1f}%.",
    ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Measure, and write `long-run-cpu.json` and `long-run-cpu.md`, named by the platform."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument(
        "--num-draws", type=int, default=10_000_000, help="of all chains, in the long run"
    )
    parser.add_argument("--thinning", type=int, default=10)
    parser.add_argument(
        "--num-samples",
        type=int,
        default=250_000,
        help="draws per chain where memory and disk are compared",
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of one long chain, and nothing else is measured")
    parser.add_argument(
        "--limit",
        type=float,
        default=float("inf"),
        help="seconds after which the long chain pauses",
    )
    parser.add_argument(
        "--only",
        choices=("memory", "speed"),
        help="measure this and keep the rest of the stored results",
    )
    arguments = parser.parse_args(argv)
    stored = arguments.out / f"long-run-{jax.default_backend()}.json"
    if arguments.steps:
        kept = arguments.out / "long-chain-cpu.json"
        done = json.loads(kept.read_text()) if kept.exists() else {}
        done.pop("about", None)
        save = lambda chain: keep(kept, chain, chain_table(chain))
        save(one_chain(done, arguments.steps, arguments.limit, save))
        print(kept.with_suffix(".md").read_text())
        return
    results = {}
    if arguments.only and stored.exists():
        results = json.loads(stored.read_text())
    if arguments.only != "speed":
        with tempfile.TemporaryDirectory() as folder:
            results["memory"] = alone(memory, arguments.num_draws, arguments.thinning, folder)
            print(open_draws(folder))
    if arguments.only != "memory":
        results["speed"] = alone(speed, arguments.num_samples, arguments.repeats)
    results.pop("about", None)
    text = (
        table(results)
        if {"memory", "speed"} <= set(results)
        else "Measured in part: run both questions for a table.\n"
    )
    keep(stored, results, text)
    print(text)


if __name__ == "__main__":
    main()
