"""Scripts of the kinds in NumPyro's gallery, with one line changed: `python -m benchmarks.scripts [NAME...] --out DIR`.

Every script of `benchmarks.script_models` is run with its own settings, mostly one chain, in a process of its own, in float32, NumPyro's
default:

    NUTS         mcmc = MCMC(NUTS(model), ...)
    class        mcmc = ParallelMCMC(NUTS(model), ...), the class replaced and nothing else
    ours         mcmc = ParallelMCMC(CoalescingHMC(model), ...)

and goes on as scripts do: summary, groups for ArviZ, pointwise log likelihood, or discrete sites drawn afterwards, predictions. Posteriors are compared by the means and mean
squares of every element of every site: |z| is the largest difference to NUTS' in standard errors of both, of `moments` many. R-hat and
effective draws are the worst of these; effective draws per 1,000 gradients of sampling stand beside them.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
import warnings
from pathlib import Path
from statistics import NormalDist

import numpy as np

from benchmarks.record import OUT, figures, in_a_process, keep, rows_so_far

METHODS = ("NUTS", "class", "ours")
# A right script exceeds its bound on |z| this often.
FALSE_ALARM = 1e-3


def measure(name: str, method: str, seed: int) -> dict:
    """One script, in this process."""
    import jax
    import numpyro

    from benchmarks.script_models import SCRIPTS
    from partime_mcmc import CoalescingHMC, ParallelMCMC
    from partime_mcmc.diagnostics import mixing

    warnings.simplefilter("ignore")
    script, data = SCRIPTS[name], SCRIPTS[name].data()
    cls = numpyro.infer.MCMC if method == "NUTS" else ParallelMCMC
    kernel = CoalescingHMC if method == "ours" else numpyro.infer.NUTS
    begin = time.perf_counter()
    mcmc = cls(
        kernel(script.model),
        num_warmup=script.num_warmup,
        num_samples=script.num_samples,
        num_chains=script.num_chains,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed), extra_fields=("num_steps",), **data)
    row = {"name": name, "method": method, "seconds": time.perf_counter() - begin}
    samples = mcmc.get_samples(group_by_chain=True)
    _afterwards(script, mcmc, data)
    x = np.concatenate(
        [
            np.asarray(samples[site], float).reshape(script.num_chains, script.num_samples, -1)
            for site in sorted(script.compared or samples)
        ],
        axis=2,
    )
    # Entries that a law fixes, such as the zeros of a triangular root, are no moments.
    x = x[:, :, np.ptp(x, axis=(0, 1)) > 1e-6]
    both = np.concatenate([x, x**2], axis=2)
    ess = mixing.ess_mean_and_square(x).min()
    row |= {
        "moments": both.shape[2],
        "mean": both.mean(axis=(0, 1)).tolist(),
        "error": (both.std(axis=(0, 1)) / np.sqrt(mixing.ess_mean(both))).tolist(),
        "rhat": float(mixing.rank_rhat(x).max()),
        "ess": float(ess),
    }
    if method == "NUTS":
        row["gradients"] = int(mcmc.get_extra_fields()["num_steps"].sum())
        row["said"] = ""
    else:
        row["gradients"] = mcmc.report.num_gradients
        row["residual"] = float(np.max(np.asarray(mcmc.report.certificate.max_residual)))
        row["said"] = mcmc.report.verdict.outcome.value
    return row | {"ess_per_1000_gradients": 1000 * row["ess"] / row["gradients"]}


def _afterwards(script, mcmc, data: dict) -> None:
    """What a script does with its draws."""
    import jax
    from numpyro.infer import Predictive, log_likelihood

    with contextlib.redirect_stdout(io.StringIO()) as printed:
        mcmc.print_summary()
    if "n_eff" not in printed.getvalue():
        raise RuntimeError(f"the summary has no column n_eff: {printed.getvalue()[:200]}")
    samples = mcmc.get_samples()
    size = len(next(iter(samples.values())))
    has_discrete = script.summed_out is not None
    if script.summed_out:
        drawn = Predictive(script.model, samples, infer_discrete=True)(jax.random.key(2), **data)
        if any(len(drawn[site]) != size for site in script.summed_out):
            raise RuntimeError(f"{script.summed_out}: not drawn once for each of {size} draws")
    if not has_discrete:
        pointwise = log_likelihood(script.model, samples, **data)
        if not all(np.isfinite(np.asarray(value)).all() for value in pointwise.values()):
            raise RuntimeError("the pointwise log likelihood is not finite everywhere")
    if script.predicted:
        arguments = data | dict(script.unseen)
        drawn = Predictive(script.model, samples)(jax.random.key(1), **arguments)
        if len(drawn[script.predicted]) != size:
            raise RuntimeError(
                f"{len(drawn[script.predicted])} predictions, wanted one for each of {size} draws"
            )
    import arviz as az

    # ArviZ would compute pointwise log likelihoods, for which discrete sites need values.
    exported = az.from_numpyro(mcmc, **({"log_likelihood": False} if has_discrete else {}))
    if set(samples) - set(exported["posterior"]):
        raise RuntimeError(f"ArviZ lacks {sorted(set(samples) - set(exported['posterior']))}")


def worst_z(one: dict, other: dict) -> float:
    """The largest difference of moments, in standard errors of both."""
    gap = np.subtract(one["mean"], other["mean"])
    return float(np.max(np.abs(gap) / np.hypot(one["error"], other["error"])))


def most_z(moments: int) -> float:
    """What the largest |z| of as many moments of equal posteriors stays below."""
    return NormalDist().inv_cdf(1 - FALSE_ALARM / moments / 2)


def table(rows: list[dict]) -> str:
    """The Markdown table and what it adds up to."""
    scripts: dict[str, dict[str, dict]] = {}
    for row in rows:
        scripts.setdefault(row["name"], {})[row["method"]] = row
    lines = [
        "| script (chains) | R-hat, NUTS / class / ours | ESS | ESS per 1,000 gradients | \\|z\\|, class / ours (bound) | "
        "residual, class / ours | says |",
        "|---|---|---|---|---|---|---|",
    ]
    equal, ran, sound = 0, 0, 0
    for name, by_method in scripts.items():
        theirs = by_method.get("NUTS", {})
        changed = [by_method.get(method, {}) for method in METHODS[1:]]
        everything = [theirs, *changed]
        z, bound = [], most_z(theirs.get("moments", 1))
        for row in changed:
            if "mean" in row and "mean" in theirs:
                z.append(worst_z(row, theirs))
                ran, equal = ran + 1, equal + (z[-1] <= bound)
        if "ess" in theirs and "ess" in changed[1]:
            sound += changed[1]["ess"] >= 0.8 * theirs["ess"] and (
                changed[1]["rhat"] - 1 <= 1.2 * (theirs["rhat"] - 1) + 0.01
            )
        lines.append(
            f"| {name} | {figures(everything, 'rhat', '.3f')} | {figures(everything, 'ess', ',.0f')} | "
            f"{figures(everything, 'ess_per_1000_gradients', '.3g')} | "
            f"{' / '.join(f'{one:.1f}' for one in z)} ({bound:.1f}) | {figures(changed, 'residual', '.0e')} | "
            f"{' / '.join(row.get('said', 'failed') for row in changed)} |"
        )
    lines += [
        "",
        f"Posteriors equal to NUTS': {equal} of {ran}. `CoalescingHMC` has at least 0.8 times NUTS' effective draws, and an R-hat no worse "
        f"than 1.2 times as far from 1 or by 0.01, on {sound} of {len(scripts)}.",
        "",
        *(f"{row['name']}, {row['method']}: {row['failed']}.\n" for row in rows if "failed" in row),
    ]
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a script failed or has another posterior."""
    from benchmarks.script_models import SCRIPTS

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them by default")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=600, help="seconds for a run")
    parser.add_argument("--record", default="scripts-cpu", help="name of the record")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.one:
        print(json.dumps(measure(*json.loads(arguments.one))))
        return 0
    names = arguments.names or list(SCRIPTS)
    if unknown := [name for name in names if name not in SCRIPTS]:
        parser.error(f"NAME: got {', '.join(unknown)}, wanted some of {', '.join(SCRIPTS)}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    stored = arguments.out / f"{arguments.record}.jsonl"
    rows = rows_so_far(stored, "name", "method")
    for name in names:
        for method in arguments.methods.split(","):
            if (name, method) in rows:
                continue
            found = in_a_process(
                "benchmarks.scripts", [name, method, arguments.seed], arguments.limit
            )
            row = rows[name, method] = {"name": name, "method": method} | found
            shown = {key: row[key] for key in row if key not in ("mean", "error")}
            print(json.dumps(shown), flush=True)
            with open(stored, "a") as file:
                file.write(json.dumps(row) + "\n")
    found = [rows[name, method] for name in names for method in METHODS if (name, method) in rows]
    text = table(found)
    print(text)
    short = [{key: row[key] for key in row if key not in ("mean", "error")} for row in found]
    keep(arguments.out / f"{arguments.record}.json", {"rows": short}, text)
    return int(any("failed" in row for row in found))


if __name__ == "__main__":
    sys.exit(main())
