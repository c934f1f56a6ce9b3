"""How many passes the published methods need on real posteriors: `python -m benchmarks.iterations --out DIR`.

Chains after the library's own warm-up: MALA on a logistic regression (944 × 25, T = 1,024) and HMC on the non-centred
eight schools (T = 4,096), each solved whole, the tolerance being that of `sample`. Beside every count stand the
evaluations and JVPs per draw, the residual, the certificate, and the times of the solve and of the sequential loop in
the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.record import OUT, keep
from partime_mcmc import (
    AllAtOnce,
    deer,
    hmc,
    jacobi,
    mala,
    quasi_deer,
    quasi_elk,
    sample,
    sequential,
    shooting,
)
from partime_mcmc.models import MODELS

HMC_8 = functools.partial(hmc, step_size=0.2, num_integration_steps=8)

CASES = (
    (
        "logistic, MALA",
        "logistic",
        "float32",
        mala,
        1024,
        {
            "quasi-DEER, 1 probe": quasi_deer(num_probes=1),
            "quasi-DEER, exact diagonal": quasi_deer(),
            "DEER": deer(),
            "Jacobi": jacobi(),
            "shooting": shooting(8),
        },
    ),
    (
        "eight schools, HMC 8×0.2",
        "eight_schools",
        "float64",
        HMC_8,
        4096,
        {
            "quasi-DEER, clipped, damped 0.3": quasi_deer(damping=0.3),
            "quasi-ELK, clipped": quasi_elk(clip=1.0),
            "Jacobi": jacobi(),
            "shooting": shooting(32),
        },
    ),
    (
        "eight schools, tuned HMC",
        "eight_schools",
        "float64",
        hmc,
        4096,
        {
            "quasi-DEER, clipped": quasi_deer(),
            "quasi-DEER, clipped, damped 0.2": quasi_deer(damping=0.2),
            "quasi-DEER, clipped, damped 0.3": quasi_deer(damping=0.3),
            "quasi-ELK, clipped": quasi_elk(clip=1.0),
            "DEER": deer(),
            "Jacobi": jacobi(),
            "shooting": shooting(32),
        },
    ),
)


def rows(
    chain: str, model: str, dtype: str, builder, num_steps: int, solvers: dict, seed: int
) -> list[dict]:
    """One line per solver, all on the same chain."""
    with jax.enable_x64(dtype == "float64"):
        target = MODELS[model]().make_target(jax.random.key(seed))
        common = dict(num_samples=num_steps, num_chains=1, schedule=AllAtOnce(), progress=False)
        pooled = sample(
            jax.random.key(seed), target, builder, num_samples=0, num_chains=4, progress=False
        ).warmup
        found, loop_seconds = [], None
        for name, solver in {"sequential": sequential(), **solvers}.items():
            begin = time.perf_counter()
            draws = sample(
                jax.random.key(seed),
                target_from(target, pooled),
                pooled.kernel,
                solver=solver,
                **common,
            )
            report, certificate = draws.report, draws.certificate
            loop_seconds = report.seconds_run if loop_seconds is None else loop_seconds
            fallback = bool(report.fallbacks)
            found.append(
                {
                    "chain": chain,
                    "settings": {key: float(value) for key, value in pooled.settings.items()},
                    "T": num_steps,
                    "dtype": dtype,
                    "method": name,
                    "passes": int(report.iterations.max()) if name != "sequential" else 1,
                    "solved": not fallback,
                    "evaluations": report.evaluations_per_sample,
                    "jvps": report.jvps_per_sample,
                    "residual": float(np.max(certificate.max_residual)),
                    "certified": bool(np.all(certificate.certified)),
                    "rejected": int(np.sum(certificate.num_rejected)),
                    "seconds": report.seconds_run,
                    "compile": report.seconds_compile,
                    "loop_seconds": loop_seconds,
                    "total_seconds": time.perf_counter() - begin,
                }
            )
            print(line(found[-1]), flush=True)
        return found


def target_from(target, warmup):
    """The target with its chain starting where the first chain of the warm-up ended."""
    return dataclasses.replace(target, initial=jax.tree.map(lambda leaf: leaf[0], warmup.positions))


def line(row: dict) -> str:
    """One line of the Markdown table."""
    passes = (
        f"{row['passes']}"
        if row["solved"]
        else f"not solved in {row['passes']}, finished sequentially"
    )
    return (
        f"| {row['chain']}, {row['dtype']}, T = {row['T']:,} | {row['method']} | {passes} | "
        f"{row['evaluations']:.1f} | {row['jvps']:.1f} | {row['residual']:.0e}, "
        f"{'certified' if row['certified'] else 'not certified'}, {row['rejected']} rejections | "
        f"{row['seconds']:.3f} | {row['loop_seconds']:.3f} |"
    )


HEADER = (
    "| chain | method | passes | evaluations per draw | JVPs per draw | residual (noise units) | s | loop, s |\n"
    "|---|---|---|---|---|---|---|---|"
)


def main(argv: list[str] | None = None) -> None:
    """Measure and write `iterations-cpu.json` and `.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    print(HEADER)
    found = [row for case in CASES for row in rows(*case, arguments.seed)]
    text = "\n".join([HEADER, *map(line, found)]) + "\n"
    keep(arguments.out / f"iterations-{jax.default_backend()}.json", {"rows": found}, text)


if __name__ == "__main__":
    main()
