"""Do NumPyro's other kernels forget where they began? `python -m benchmarks.numpyro_kernels --out DIR`.

A chain can be solved for in parallel over time only if two chains with the same random numbers approach each other. For every
kernel of NumPyro that is run by NumPyro's own loop, two chains are warmed up apart, the second gets the first one's key, and both make the
same steps:

    d_t = largest distance of a coordinate, in standard deviations of that coordinate over both chains.

`met` is the first step after which both are the same chain, bit for bit, as shooting needs it; `d at the end` is the mean of d over the last
hundred steps. Beside them, for comparison, `CoalescingHMC` on a model of the same continuous sites.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.infer import (
    HMC,
    HMCECS,
    MCMC,
    NUTS,
    SA,
    BarkerMH,
    DiscreteHMCGibbs,
    HMCGibbs,
    MixedHMC,
)

from benchmarks.record import OUT, keep
from partime_mcmc import CoalescingHMC, ParallelMCMC, Windows

STEPS, WARMUP = 2_000, 500
Y = np.random.default_rng(0).normal(1.0, 2.0, 60)


def line():
    """A mean and a spread."""
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    spread = numpyro.sample("spread", dist.HalfNormal(3))
    numpyro.sample("y", dist.Normal(mean, spread), obs=Y)


def switches():
    """The same with ten switches that shift data."""
    with numpyro.plate("switches", 10):
        on = numpyro.sample("on", dist.Bernoulli(0.3))
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    spread = numpyro.sample("spread", dist.HalfNormal(3))
    numpyro.sample("y", dist.Normal(mean + 0.5 * jnp.repeat(on, 6), spread), obs=Y)


def subsampled():
    """The first in parts."""
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    spread = numpyro.sample("spread", dist.HalfNormal(3))
    with numpyro.plate("data", len(Y), subsample_size=20):
        numpyro.sample("y", dist.Normal(mean, spread), obs=numpyro.subsample(jnp.asarray(Y), 0))


def conjugate():
    """The mean by its own normal law, the spread by HMC."""
    mean = numpyro.sample("mean", dist.Normal(0, 5))
    spread = numpyro.sample("spread", dist.HalfNormal(3))
    numpyro.sample("y", dist.Normal(mean, spread), obs=Y)


def _mean_given_spread(rng_key, gibbs_sites, hmc_sites):
    precision = 1 / 25 + len(Y) / hmc_sites["spread"] ** 2
    centre = Y.sum() / hmc_sites["spread"] ** 2 / precision
    return {"mean": dist.Normal(centre, precision**-0.5).sample(rng_key)}


# The parts of a state that say where a chain stands.
_OWN = re.compile(r"\.(z|zs|pes|z_grad|potential_energy|energy)\b")

KERNELS: dict[str, Callable] = {
    "DiscreteHMCGibbs(NUTS)": lambda: DiscreteHMCGibbs(NUTS(switches), modified=True),
    "MixedHMC(HMC)": lambda: MixedHMC(
        HMC(switches, trajectory_length=1.2), num_discrete_updates=20
    ),
    "HMCGibbs(NUTS)": lambda: HMCGibbs(
        NUTS(conjugate), gibbs_fn=_mean_given_spread, gibbs_sites=["mean"]
    ),
    "HMCECS(NUTS)": lambda: HMCECS(NUTS(subsampled), num_blocks=4),
    "SA": lambda: SA(line),
    "BarkerMH": lambda: BarkerMH(line),
}


def measure(name: str, seed: int) -> dict:
    """One row."""
    kernel = KERNELS[name]()
    mcmc = MCMC(
        kernel,
        num_warmup=WARMUP,
        num_samples=1,
        num_chains=2,
        chain_method="sequential",
        progress_bar=False,
    )
    mcmc.run(jax.random.key(seed))
    # Both chains with all random numbers and all that was adapted of the first, from where each stands.
    state = mcmc.last_state

    def shared(path, leaf):
        is_own = _OWN.search(jax.tree_util.keystr(path)) is not None
        return leaf if is_own else jnp.stack([leaf[0], leaf[0]])

    together = jax.tree_util.tree_map_with_path(shared, state)

    def step(state, _):
        state = jax.vmap(lambda one: kernel.sample(one, (), {}))(state)
        return state, getattr(state, kernel.sample_field)

    _, path = jax.jit(lambda state: jax.lax.scan(step, state, None, STEPS))(together)
    x = np.concatenate(
        [np.asarray(leaf, float).reshape(STEPS, 2, -1) for leaf in jax.tree.leaves(path)], axis=2
    )
    gap = np.abs(x[:, 0] - x[:, 1])
    scale = x.reshape(-1, x.shape[2]).std(axis=0)
    distance = (gap / np.where(scale > 0, scale, 1)).max(axis=1)
    met = np.flatnonzero(distance > 0)
    after = 0 if not met.size else int(met[-1]) + 1
    return {
        "kernel": name,
        "met": after if after < STEPS else None,
        "at_start": float(distance[0]),
        "at_end": float(distance[-100:].mean()),
    }


def ours(seed: int) -> dict:
    """`CoalescingHMC` by pairs of chains, which say after how many steps all have met."""
    mcmc = ParallelMCMC(
        CoalescingHMC(line),
        num_warmup=WARMUP,
        num_samples=STEPS,
        num_chains=2,
        progress_bar=False,
        schedule=Windows(STEPS),
    )
    mcmc.run(jax.random.key(seed))
    return {
        "kernel": "CoalescingHMC",
        "met": mcmc.report.run.memory,
        "at_start": None,
        "at_end": 0.0 if mcmc.report.run.memory is not None else None,
    }


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| kernel | met after | d at the start | d at the end |",
        "|---|---|---|---|",
    ]
    for row in rows:
        met = f"{row['met']:,} steps" if row["met"] is not None else f"not in {STEPS:,} steps"
        cells = [
            "–" if row[name] is None else f"{row[name]:.2g}" for name in ("at_start", "at_end")
        ]
        lines.append(f"| {row['kernel']} | {met} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    warnings.simplefilter("ignore")
    rows = []
    for name in KERNELS:
        rows.append(measure(name, arguments.seed))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    rows.append(ours(arguments.seed))
    text = table(rows)
    print(text)
    keep(arguments.out / "numpyro-kernels-cpu.json", {"rows": rows}, text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
