"""Every kernel of BlackJAX as a recurrence, and how it forgets: `python -m benchmarks.blackjax_kernels --out DIR`.

On a correlated normal density with a quartic wall, in three dimensions and float64, each algorithm of `blackjax.mcmc` whose step is a
pure function makes a chain of T steps by BlackJAX's own loop and, with the same keys, by `from_blackjax` and shooting. A row says

    evaluations     steps evaluated per draw: near 1 where segments meet soon; where they do not shooting gives up, and what follows
                    is of the chain evaluated sequentially, as `sample` does then
    difference      the largest between the two chains
    residual        of the solved chain, from its certificate
    meets           the share of 32 pairs of chains with the same keys, from starts far apart, that are equal to 1e-8 within T steps,
                    and after how many in the median
    ms              of the loop and of shooting, medians of runs in turn, compilation not counted

NAMES are those of BlackJAX. `LEFT_OUT` says why the others have no row. Rows of algorithms that were measured before and are not
named are kept.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Callable

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
from blackjax.mcmc.integrators import isokinetic_velocity_verlet
from blackjax.mcmc.random_walk import normal

from benchmarks.record import OUT, keep, timed
from partime_mcmc import Status, Tolerance, certify, from_blackjax, sequential, shooting, solve
from partime_mcmc.forgetting import meeting_times
from partime_mcmc.kernels.kernel import blackjax_loop

STEPS, PAIRS, REPEATS = 4096, 32, 5
_NEAR = 1e-8
_PRECISION = np.array([[1.5, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.8]])
_ONES = np.ones(3)


def logdensity(x: jax.Array) -> jax.Array:
    """A correlated normal density with a quartic wall."""
    return -0.5 * x @ _PRECISION @ x - 0.05 * jnp.sum(x**4)


def log_joint(theta: jax.Array, x: jax.Array) -> jax.Array:
    """The same of `x`, with a latent number that is normal given the first of them, for algorithms that integrate one out."""
    return logdensity(x) - 0.5 * jnp.sum((theta - x[:1]) ** 2)


def _a_few_steps(key: jax.Array) -> jax.Array:
    return jax.random.randint(key, (), 1, 4)


KERNELS: dict[str, Callable[[], Any]] = {
    "additive_step_random_walk": lambda: blackjax.additive_step_random_walk(
        logdensity, normal(0.8 * _ONES)
    ),
    "rmh": lambda: blackjax.rmh(
        logdensity, lambda key, x: x + 0.8 * jax.random.normal(key, x.shape)
    ),
    "irmh": lambda: blackjax.irmh(logdensity, lambda key: 1.2 * jax.random.normal(key, (3,))),
    "mala": lambda: blackjax.mala(logdensity, 0.35),
    "barker": lambda: blackjax.barker(logdensity, 0.9),
    "hmc": lambda: blackjax.hmc(logdensity, 0.8, _ONES, 2),
    "multinomial_hmc": lambda: blackjax.multinomial_hmc(logdensity, 0.7, _ONES, 2),
    "dynamic_hmc": lambda: blackjax.dynamic_hmc(
        logdensity, 0.8, _ONES, integration_steps_fn=_a_few_steps
    ),
    "dmhmc": lambda: blackjax.dmhmc(logdensity, 0.7, _ONES, integration_steps_fn=_a_few_steps),
    "nuts": lambda: blackjax.nuts(logdensity, 0.6, _ONES, max_num_doublings=4),
    "rmhmc": lambda: blackjax.rmhmc(logdensity, 0.5, _ONES, 3),
    "ghmc": lambda: blackjax.ghmc(logdensity, 0.8, _ONES, 0.5, 0.3),
    "gist_step_size": lambda: blackjax.gist_step_size(logdensity, _ONES, 0.8, 2),
    "gist_trajectory_length": lambda: blackjax.gist_trajectory_length(
        logdensity, _ONES, 0.5, max_num_steps=16
    ),
    "mclmc": lambda: blackjax.mclmc(
        logdensity, L=2.0, step_size=0.4, integrator=isokinetic_velocity_verlet
    ),
    "adjusted_mclmc": lambda: blackjax.adjusted_mclmc(logdensity, 0.6, num_integration_steps=3),
    "adjusted_mclmc_dynamic": lambda: blackjax.adjusted_mclmc_dynamic(
        logdensity, 0.6, integration_steps_fn=_a_few_steps
    ),
    "elliptical_slice": lambda: blackjax.elliptical_slice(logdensity, mean=0 * _ONES, cov=_ONES),
    "slice_sampling": lambda: blackjax.slice_sampling(logdensity),
    "coordinate_slice": lambda: blackjax.coordinate_slice(logdensity),
    "mgrad_gaussian": lambda: blackjax.mgrad_gaussian(
        lambda x: -0.05 * jnp.sum(x**4), covariance=jnp.linalg.inv(_PRECISION), step_size=0.5
    ),
    "laplace_hmc": lambda: blackjax.laplace_hmc(log_joint, jnp.zeros(1), 0.8, _ONES, 2),
    "laplace_mhmc": lambda: blackjax.laplace_mhmc(log_joint, jnp.zeros(1), 0.7, _ONES, 2),
    "laplace_dhmc": lambda: blackjax.laplace_dhmc(
        log_joint, jnp.zeros(1), 0.8, _ONES, integration_steps_fn=_a_few_steps
    ),
    "laplace_dmhmc": lambda: blackjax.laplace_dmhmc(
        log_joint, jnp.zeros(1), 0.7, _ONES, integration_steps_fn=_a_few_steps
    ),
}
# Why an algorithm of `blackjax.mcmc` has no row.
LEFT_OUT: dict[str, str] = {
    "barker_proposal": "another name of barker",
    "dhmc": "another name of dynamic_hmc",
    "mhmc": "another name of multinomial_hmc",
    "orbital_hmc": "its state is a whole orbit, with directions that are whole numbers, and not a point",
}


def algorithms() -> list[str]:
    """The names under which `blackjax` has its algorithms for chains."""
    found = {name: getattr(blackjax, name) for name in dir(blackjax)}
    return [
        name
        for name, one in found.items()
        if type(one).__name__ == "GenerateSamplingAPI"
        and getattr(one.init, "__module__", "").startswith("blackjax.mcmc")
    ]


def measure(name: str, num_steps: int = STEPS, repeats: int = REPEATS) -> dict[str, Any]:
    """The row of an algorithm."""
    kernel = from_blackjax(KERNELS[name](), name=name)
    start_key, tape_key, pair_key = jax.random.split(jax.random.key(0), 3)
    state = kernel.init(jnp.array([1.0, -0.5, 0.3]), start_key)
    tape = kernel.tape(tape_key, num_steps, state)
    carry, dynamics = kernel.carry(state), kernel.dynamics()
    runs = timed(
        {
            "loop": (
                jax.jit(lambda state, keys: blackjax_loop(kernel, state, keys)),
                (state, tape.randomness),
            ),
            "shooting": (
                jax.jit(lambda carry, tape: solve(dynamics, carry, tape, solver=shooting())),
                (carry, tape),
            ),
        },
        repeats,
    )
    (carries, info), shot = (runs[one]["value"] for one in ("loop", "shooting"))
    gave_up = shot.verdict is not Status.CONVERGED
    found = solve(dynamics, carry, tape, solver=sequential()) if gave_up else shot
    certificate = certify(kernel, carry, found.states, tape)
    pairs = [
        jax.vmap(lambda key: kernel.carry(kernel.init(3 * jax.random.normal(key, (3,)), key)))(keys)
        for keys in jax.random.split(pair_key, (2, PAIRS))
    ]
    met = meeting_times(dynamics, *pairs, tape, tolerance=Tolerance(_NEAR, 0.0))
    moved = getattr(info, "is_accepted", None)
    return {
        "name": name,
        "rejected": None if moved is None else float(1 - np.mean(moved)),
        "evaluations": float(shot.stats.evaluations),
        "gave_up": gave_up,
        "difference": float(
            max(
                np.abs(np.asarray(a) - np.asarray(b)).max()
                for a, b in zip(*map(jax.tree.leaves, (carries, found.states)))
            )
        ),
        "residual": float(certificate.max_residual),
        "certified": bool(certificate.certified),
        "steps": num_steps,
        "met": float(np.mean(met.met)),
        "median_steps": float(np.median(met.steps)),
        "loop_ms": 1e3 * runs["loop"]["seconds"],
        "shooting_ms": 1e3 * runs["shooting"]["seconds"],
    }


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| algorithm | rejected | pairs that meet | after steps (median) | evaluations per draw | certified, residual | "
        "difference from BlackJAX's loop | loop, ms | shooting, ms |",
        "|---" * 9 + "|",
    ]
    for row in rows:
        rejected = "–" if row["rejected"] is None else f"{row['rejected']:.0%}"
        steps = f"{row['median_steps']:.0f}" if row["met"] >= 0.5 else "–"
        lines.append(
            f"| {row['name']} | {rejected} | {row['met']:.0%} | {steps} | {row['evaluations']:.2f}"
            f"{', gave up' if row['gave_up'] else ''} | "
            f"{'yes' if row['certified'] else 'NO'}, {row['residual']:.0e} | {row['difference']:.0e} | "
            f"{row['loop_ms']:.1f} | {row['shooting_ms']:.1f} |"
        )
    steps = sorted({row["steps"] for row in rows})
    lines += ["", f"T = {', '.join(f'{one:,}' for one in steps)}."]
    lines += ["", "Without a row: " + "; ".join(f"{k} ({v})" for k, v in LEFT_OUT.items()) + "."]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """The command line; 1 if a chain is not certified."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=OUT)
    arguments = parser.parse_args(argv)
    stored = arguments.out / "blackjax-kernels-cpu.json"
    before = json.loads(stored.read_text())["rows"] if stored.exists() else []
    found = {row["name"]: row for row in before}
    with jax.enable_x64(True):
        for name in arguments.names or KERNELS:
            found[name] = measure(name, arguments.steps)
            print(found[name], flush=True)
            rows = [found[one] for one in KERNELS if one in found]
            keep(stored, {"rows": rows}, table(rows))
    print(table(rows))
    return int(not all(row["certified"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
