"""Reference posteriors, `ParallelMCMC` against NumPyro's NUTS: `python -m benchmarks.posteriors --out DIR`.

For every posterior of the folder that PARTIME_REFERENCE_POSTERIORS names, both samplers draw four chains of 7,168 in
float64, each in a process of its own: `CoalescingHMC` solved in parallel with default settings, and NUTS with a dense mass matrix and
1,000 warm-up steps at each of NumPyro's chain methods ("parallel" with four host devices), of which the fastest counts.

Seconds are those of a third warm-up and run with the same key, for which everything is compiled, less the time in
which JAX reports that it traced or compiled all the same; compilation is that time in the first. Reports nest and come
from several threads: what counts is the union of their intervals, so no second is taken off twice. `to 20,000` is
warm-up plus sampling, the latter scaled to a bulk ESS of 20,000 of the worst parameter. The certificate is part of
our sampling, on what it rests stands in the table. Beside them stands the time in which the same chains are computed
one step after another, `solver=sequential()`. ESS per 1,000 gradients is the smaller of the mean's and the square's,
worst parameter; gradients of landing steps count.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import re
import subprocess
import sys
import time

from benchmarks.record import OUT, keep, module_at, peak_resident

TARGET_ESS, CHAINS, WARMUP, SAMPLES = 20_000, 4, 1000, 7168
VARIABLE = "PARTIME_REFERENCE_POSTERIORS"
METHODS = {"ours": 1, "vectorized": 1, "sequential": 1, "parallel": CHAINS}


def load(name: str):
    """A model, its keyword arguments, and the function that flattens draws."""
    folder = pathlib.Path(os.environ[VARIABLE])
    models = module_at(folder / "models.py", "reference_models")
    stored = json.loads((folder / f"{name}.json").read_text())
    model, prepare = models.MODELS[name]
    return model, prepare(stored["data"]), list(stored["reference"]), models.flat


class Compilation:
    """When JAX reports that it traced and compiled."""

    def __init__(self):
        import jax

        self.intervals: list[tuple[float, float]] = []
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, name: str, seconds: float, **more) -> None:
        if name.endswith(
            ("jaxpr_trace_duration", "jaxpr_to_mlir_module_duration", "backend_compile_duration")
        ):
            # Events are reported at their end, by whatever thread.
            now = time.perf_counter()
            self.intervals.append((now - seconds, now))


def covered(intervals: list[tuple[float, float]], begin: float, end: float) -> float:
    """Seconds of `[begin, end]` that lie in any of the intervals."""
    total, reached = 0.0, begin
    for start, stop in sorted(intervals):
        start, stop = max(start, reached), min(stop, end)
        if stop > start:
            total, reached = total + stop - start, stop
    return total


def timed(run, compilation: Compilation) -> tuple[float, float]:
    """Seconds of a call without compilation, and of compilation."""
    begin = time.perf_counter()
    run()
    end = time.perf_counter()
    compiling = covered(compilation.intervals, begin, end)
    seconds = end - begin - compiling
    if not seconds > 0:
        raise RuntimeError(
            f"a call took {end - begin:.3f} s, of which JAX reports that it compiled all of the time"
        )
    return seconds, compiling


def measure(name: str, method: str) -> dict:
    """One sampler on one posterior, in this process."""
    import jax
    import numpy as np
    import numpyro

    jax.config.update("jax_enable_x64", True)
    from partime_mcmc import Windows, sequential
    from partime_mcmc.diagnostics.arviz import ess_bulk
    from partime_mcmc.numpyro import CoalescingHMC, ParallelMCMC
    from partime_mcmc.sampling.memory import DEFAULT_WINDOW

    model, data, names, flat = load(name)
    compilation, key = Compilation(), jax.random.key(1)

    def sampler(num_samples):
        if method == "ours":
            return ParallelMCMC(
                CoalescingHMC(model),
                num_warmup=WARMUP,
                num_samples=num_samples,
                num_chains=CHAINS,
                progress_bar=False,
                schedule=Windows(DEFAULT_WINDOW),
            )
        return numpyro.infer.MCMC(
            numpyro.infer.NUTS(model, dense_mass=True),
            num_warmup=WARMUP,
            num_samples=num_samples,
            num_chains=CHAINS,
            chain_method=method,
            progress_bar=False,
        )

    def draws(mcmc):
        return flat(jax.tree.map(np.asarray, mcmc.get_samples(group_by_chain=True)), names)

    def run(mcmc):
        mcmc.run(key, extra_fields=("num_steps",), **data)
        jax.block_until_ready(mcmc.get_samples())

    mcmc = sampler(SAMPLES)
    collected = {} if method == "ours" else {"collect_warmup": True}

    def warm_up():
        mcmc.warmup(key, extra_fields=("num_steps",), **collected, **data)
        jax.block_until_ready(mcmc.post_warmup_state)

    compile_seconds = 0.0
    for _ in range(3):  # the third time counts
        warmup_seconds, compiling = timed(warm_up, compilation)
        warmup_gradients = (
            warmup_report(mcmc)
            if method == "ours"
            else int(np.asarray(mcmc.get_extra_fields()["num_steps"]).sum())
        )
        sample_seconds, more = timed(lambda: run(mcmc), compilation)
        compile_seconds = compile_seconds or compiling + more
    x = draws(mcmc)
    ess = min(ess_bulk(values) for values in x.values())
    squares = min(ess_bulk((values - values.mean()) ** 2) for values in x.values())
    steps = float(np.asarray(mcmc.get_extra_fields()["num_steps"]).sum())
    more = {}
    if method == "ours":
        report = mcmc.report
        steps += CHAINS * SAMPLES / 4
        alone = ParallelMCMC(
            CoalescingHMC(model),
            num_warmup=WARMUP,
            num_samples=SAMPLES,
            num_chains=CHAINS,
            progress_bar=False,
            solver=sequential(),
        )
        for _ in range(2):
            alone.post_warmup_state = mcmc.post_warmup_state
            loop_seconds, _ = timed(lambda: run(alone), compilation)
        more = {
            "evaluations": report.run.evaluations_per_sample,
            "depth": report.run.depth,
            "level": report.level.name,
            "evidence": report.certificate.evidence,
            "loop_seconds": loop_seconds,
            "residual": float(np.max(np.asarray(report.certificate.max_residual))),
            "parallel": report.parallel,
            "run_seconds": report.run.seconds_run,
            "certify_seconds": report.run.seconds_certify,
        }
    return {
        "ess": ess,
        "ess_squares": squares,
        "num_samples": SAMPLES,
        "gradients": steps,
        "ess_per_1000_gradients": 1000 * min(ess, squares) / steps,
        "warmup_gradients": warmup_gradients,
        "warmup_seconds": warmup_seconds,
        "sample_seconds": sample_seconds,
        "compile_seconds": compile_seconds,
        "peak_resident_bytes": peak_resident(),
        "seconds_to_target": warmup_seconds + sample_seconds * TARGET_ESS / ess,
        **more,
    }


def warmup_report(mcmc) -> int:
    """Gradients of the warm-up that `mcmc.warmup` has just done."""
    return mcmc.warmed.num_gradients


def in_a_process(name: str, method: str) -> dict:
    """`measure` in a fresh process, with as many host devices as the method wants."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={METHODS[method]}"
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.posteriors", "--one", name, method],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": flags},
    )
    if done.returncode:
        # After the error JAX may note that it has shortened the traceback.
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {
            "failed": next(
                (line for line in reversed(lines) if re.match(r"[\w.]*(Error|Exception)\b", line)),
                lines[-1],
            )
        }
    return json.loads(done.stdout.strip().splitlines()[-1])


def table(rows: dict) -> str:
    """The Markdown table, with how many targets are met below it."""
    lines = [
        "| posterior | ESS/1,000 gradients, ours / NUTS | seconds to ESS 20,000, ours / NUTS (method) | faster | warm-up "
        "gradients, ours / NUTS | compile, ours / NUTS, s | evaluations per draw | "
        "sampling, ours / our loop, s | certificate |",
        "|---" * 9 + "|",
    ]
    for name, (ours, best, method) in _beside_nuts(rows).items():
        lines.append(
            f"| {name} | {ours['ess_per_1000_gradients']:.0f} / {best['ess_per_1000_gradients']:.0f} | "
            f"{ours['seconds_to_target']:.2f} / {best['seconds_to_target']:.2f} ({method}) | **{_gain(ours, best):.1f}×** | "
            f"{ours['warmup_gradients']:,} / {best['warmup_gradients']:,} | {ours['compile_seconds']:.1f} / "
            f"{best['compile_seconds']:.1f} | {ours['evaluations']:.2f} | {_against_loop(ours)} | "
            f"{ours['level']}, {ours['residual']:.0e} |"
        )
    lines += _all_in_all(rows)
    # Records of before certificates were recorded lack it.
    ours = [row["ours"] for row in rows.values() if "level" in row.get("ours", {})]
    evidence = sorted({one.get("evidence", "by an independent pass") for one in ours})
    methods = [
        m
        for m in METHODS
        if m != "ours" and any("seconds_to_target" in row.get(m, {}) for row in rows.values())
    ]
    lines.append(
        f"\nCertificates: {', '.join(evidence)}. NUTS: the fastest of {', '.join(methods)}."
    )
    lines += [
        f"\n{name}, {m}: failed, {row[m]['failed']}."
        for name, row in rows.items()
        for m in METHODS
        if "failed" in row.get(m, {})
    ]
    return "\n".join(lines) + "\n"


def short_table(record: dict) -> str:
    """Three of the posteriors for the README: the largest gain, the one in the middle, and the smallest."""
    found = _beside_nuts(record["rows"])
    order = sorted(found, key=lambda name: -_gain(*found[name][:2]))
    lines = [
        "| posterior | ESS per 1,000 gradients, this / NUTS | seconds to ESS 20,000, this / NUTS | gain | largest residual |",
        "|---" * 5 + "|",
    ]
    last = len(order) - 1
    for place in sorted({0, last // 2, last}):
        ours, best, _ = found[order[place]]
        lines.append(
            f"| {order[place]} | {ours['ess_per_1000_gradients']:.0f} / {best['ess_per_1000_gradients']:.0f} | "
            f"{ours['seconds_to_target']:.2f} / {best['seconds_to_target']:.2f} | {_gain(ours, best):.1f}× | "
            f"{ours['residual']:.0e} |"
        )
    return "\n".join([*lines, *_all_in_all(record["rows"])]) + "\n"


def _beside_nuts(rows: dict) -> dict[str, tuple[dict, dict, str]]:
    """By posterior on which both reached the target: ours, NUTS's fastest method, and its name."""
    found = {}
    for name, row in rows.items():
        methods = [m for m in METHODS if m != "ours" and "seconds_to_target" in row.get(m, {})]
        if methods and "seconds_to_target" in row.get("ours", {}):
            method = min(methods, key=lambda one: row[one]["seconds_to_target"])
            found[name] = row["ours"], row[method], method
    return found


def _gain(ours: dict, best: dict) -> float:
    return best["seconds_to_target"] / ours["seconds_to_target"]


def _all_in_all(rows: dict) -> list[str]:
    """One line on all posteriors; none if there are none."""
    pairs = [(ours, best) for ours, best, _ in _beside_nuts(rows).values()]
    if not pairs:
        return []
    draws = [
        ours["ess_per_1000_gradients"] / best["ess_per_1000_gradients"] for ours, best in pairs
    ]
    compiles = [ours["compile_seconds"] / best["compile_seconds"] for ours, best in pairs]
    ratios = [_gain(*pair) for pair in pairs]
    return [
        f"\nESS per gradient at least twice NUTS's: {sum(g >= 2 for g in draws)} of {len(draws)}. Faster to ESS 20,000: "
        f"{sum(r > 1 for r in ratios)} of {len(ratios)}, median {sorted(ratios)[len(ratios) // 2]:.1f}×. Compilation: "
        f"median {sorted(compiles)[len(compiles) // 2]:.1f} times NUTS's."
    ]


def _against_loop(ours: dict) -> str:
    """Seconds of sampling, parallel in time and one step after another; records of before have the first only."""
    loop = f"{ours['loop_seconds']:.2f}" if "loop_seconds" in ours else "not measured"
    return f"{ours['sample_seconds']:.2f} / {loop}"


def main(argv: list[str] | None = None) -> None:
    """Measure every posterior and write `posteriors-cpu.json` and `.md`; stored rows that are not asked for are kept."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument(
        "--only", nargs="*", default=[""], help="posteriors whose name contains one of these"
    )
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--one", nargs=2, metavar=("NAME", "METHOD"), help="measure in this process and print JSON"
    )
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure(*arguments.one)))
        return
    if not os.environ.get(VARIABLE):
        parser.error(
            f"{VARIABLE} is not set: it names the folder with models.py and one JSON file per posterior"
        )
    stored = arguments.out / "posteriors-cpu.json"
    rows = json.loads(stored.read_text())["rows"] if stored.exists() else {}
    for path in sorted(pathlib.Path(os.environ[VARIABLE]).glob("*.json")):
        if any(part in path.stem for part in arguments.only):
            rows[path.stem] = {
                **rows.get(path.stem, {}),
                **{m: in_a_process(path.stem, m) for m in arguments.methods},
            }
            print(json.dumps({path.stem: rows[path.stem]}), flush=True)
            keep(stored, {"chains": CHAINS, "rows": rows}, table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
