"""For a fixed budget of draws, more chains or longer ones? `python -m benchmarks.chains_or_time --out DIR`.

C chains of B / C draws each, for C from 1 to 256: by the loop over all chains side by side, and parallel in time with
the solver that is advised for C chains. Every chain starts from the target's own start and has to throw away a burn-in
of `BURN_IN` draws, with the metric and step size already known: that is what many short chains pay. Effective draws
are the bulk ESS of the worst coordinate of what is left. Medians of interleaved runs, compilation apart; the residual
stands beside them.
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, keep, timed
from benchmarks.shooting import EIGHT_SCHOOLS, LOGISTIC, fixed_hmc, tuned, warmed_up
from partime_mcmc import mala, rollout, solve
from partime_mcmc.diagnostics.arviz import ess_bulk
from partime_mcmc.engine.dynamics import without_captures
from partime_mcmc.forgetting import advise
from partime_mcmc.sampling.plan import default_tolerance

CASES = {
    "eight schools, MALA": (EIGHT_SCHOOLS, *tuned(mala)),
    "logistic regression 944×25, HMC 4×0.4": (LOGISTIC, *fixed_hmc(0.4, 4)),
}
CHAINS, BURN_IN = (1, 4, 16, 64, 256), 100


def measure(name: str, num_chains: int, budget: int, repeats: int) -> dict:
    """One number of chains."""
    model, builder, make = CASES[name]
    target, warmup = warmed_up(model, builder, 1000, "float64")
    kernel = make(target.logdensity, metric=warmup.whitening, settings=warmup.settings)
    num_steps = budget // num_chains
    starts = target.starts(jax.random.split(jax.random.key(3), num_chains))
    pool, initial = (
        jax.vmap(lambda position: kernel.carry(kernel.init(position)))(one)
        for one in (warmup.pool, starts)
    )
    state = kernel.init(jax.tree.map(lambda leaf: leaf[0], starts))
    tape = jax.jit(jax.vmap(lambda key: kernel.tape(key, num_steps, state)))(
        jax.random.split(jax.random.key(2), num_chains)
    )
    first = jax.tree.map(lambda leaf: leaf[0], (initial, tape))
    dynamics = without_captures(
        kernel.dynamics(), first[0], jax.tree.map(lambda leaf: leaf[0], first[1])
    )
    tolerance = default_tolerance(kernel, jnp.float64)
    advice = advise(
        dynamics,
        *first,
        starts=pool,
        num_steps=num_steps,
        num_chains=num_chains,
        tolerance=tolerance,
    )
    run = functools.partial(
        solve, solver=advice.solver, schedule=advice.schedule, tolerance=tolerance
    )
    found = timed(
        {
            "loop": (jax.jit(jax.vmap(rollout, in_axes=(None, 0, 0))), (dynamics, initial, tape)),
            "parallel": (jax.jit(jax.vmap(run, in_axes=(None, 0, 0))), (dynamics, initial, tape)),
        },
        repeats,
    )
    solution = found["parallel"]["value"]
    kept = np.asarray(solution.states).reshape(num_chains, num_steps, -1)[:, BURN_IN:]
    ess = min(ess_bulk(kept[..., d]) for d in range(kept.shape[-1]))
    return {
        "name": name,
        "chains": num_chains,
        "num_steps": num_steps,
        "segments": advice.num_segments,
        "ess": float(ess),
        "loop_seconds": found["loop"]["seconds"],
        "parallel_seconds": found["parallel"]["seconds"],
        "compile": found["parallel"]["compile"],
        "temp_bytes": found["parallel"]["temp_bytes"],
        "evaluations": float(np.mean(solution.stats.evaluations)),
        "residual": float(np.max(solution.residual)),
    }


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| target, kernel | chains × draws | loop, s | parallel in time, s | ratio | segments per chain | "
        "effective draws | per second: loop / parallel | residual |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {row['name']} | {row['chains']} × {row['num_steps']:,} | {row['loop_seconds']:.3f} | "
            f"{row['parallel_seconds']:.3f} | **{row['loop_seconds'] / row['parallel_seconds']:.2f}×** | "
            f"{row['segments']} | {row['ess']:,.0f} | "
            f"{row['ess'] / row['loop_seconds']:,.0f} / {row['ess'] / row['parallel_seconds']:,.0f} | "
            f"{row['residual']:.0e} |"
        )
    return "\n".join(lines) + f"\n\nThe first {BURN_IN} draws of every chain are left out.\n"


def main(argv: list[str] | None = None) -> None:
    """Measure every case and write `chains-or-time-cpu.json` and `.md`, named by the platform."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--budget", type=int, default=65_536, help="draws of all chains together")
    parser.add_argument("--chains", type=int, nargs="*", default=CHAINS)
    arguments = parser.parse_args(argv)
    rows = []
    with jax.enable_x64(True):
        for name in CASES:
            for count in arguments.chains:
                rows.append(measure(name, count, arguments.budget, arguments.repeats))
                print(table(rows[-1:]).splitlines()[2], flush=True)
    keep(
        arguments.out / f"chains-or-time-{jax.default_backend()}.json", {"rows": rows}, table(rows)
    )


if __name__ == "__main__":
    main()
