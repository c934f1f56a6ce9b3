"""All kernels on all reference posteriors, float64, default settings: `python -m benchmarks.validation --out DIR`.

Every pair draws four chains with one key and is held against the reference's moments and quantiles by the same verdict as in
`tests/validation`: gates (finite, moving, bulk and tail ESS of at least 400), and the largest |z| of all means, log standard
deviations and 5, 50 and 95% quantiles against the normal quantile at 1 - 0.001 / 2m of m scores. Kernels that do not mix on
a posterior fail their gates here: the table shows where a kernel is the wrong one.

The JSON keeps the seconds of every whole run, warm-up and compilation included; nothing is claimed about speed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import jax
import numpy as np

from benchmarks.record import OUT, keep, module_at

# What the tests hold draws against; needs PARTIME_REFERENCE_POSTERIORS.
REFERENCE = Path(__file__).resolve().parent.parent / "tests" / "validation" / "reference.py"


def measure(reference, kernel: str, name: str) -> dict:
    """One kernel on one posterior."""
    begin = time.perf_counter()
    mcmc, verdict = reference.sampled(kernel, name)
    report = mcmc.report
    worst, score = max(verdict.scores.items(), key=lambda item: abs(item[1]))
    return {
        "kernel": kernel,
        "posterior": name,
        "samples": reference.SAMPLES[kernel],
        "gates": verdict.gates,
        "failures": {" ".join(key): value for key, value in verdict.failures.items()},
        "num_scores": len(verdict.scores),
        "largest": score,
        "largest_of": " ".join(worst),
        "bound": verdict.bound,
        "least_ess": verdict.least_ess,
        "level": report.level.name,
        "parallel": bool(report.parallel),
        "fallbacks": list(report.run.fallbacks),
        "evaluations": float(report.run.evaluations_per_sample),
        "residual": float(np.max(np.asarray(report.certificate.max_residual))),
        "independent": bool(np.all(report.certificate.independent)),
        "seconds": time.perf_counter() - begin,
    }


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| kernel | posterior | draws | passes | largest z, allowed | least ESS | path | evaluations per draw | residual |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        verdict = (
            "yes"
            if not row["gates"] and not row["failures"]
            else ("no: ESS" if row["gates"] else f"no: {', '.join(row['failures'])}")
        )
        path = f"{row['level']}, {'parallel' if row['parallel'] else 'sequential'}"
        lines.append(
            f"| {row['kernel']} | {row['posterior']} | 4 × {row['samples']:,} | {verdict} | {abs(row['largest']):.2f}, "
            f"{row['bound']:.2f} | {row['least_ess']:,.0f} | {path} | {row['evaluations']:.2f} | "
            f"{row['residual']:.0e} |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Run the matrix and write `validation-cpu.json` and `validation-cpu.md`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--only", default="", help="pairs `kernel posterior` that contain this")
    arguments = parser.parse_args(argv)
    rows, reference = [], module_at(REFERENCE, "validation_reference")
    with jax.enable_x64(True):
        for kernel in reference.KERNELS:
            for name in reference.NAMES:
                if arguments.only in f"{kernel} {name}":
                    rows.append(measure(reference, kernel, name))
                    print(table(rows[-1:]).splitlines()[2], flush=True)
    keep(arguments.out / f"validation-{jax.default_backend()}.json", {"rows": rows}, table(rows))


if __name__ == "__main__":
    main()
