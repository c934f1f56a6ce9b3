"""Multishift coupling: the same kernel law, but chains with the same random numbers become one within a few steps.

Left: one draw of layered multishift noise, as a map of where the chain is. Plain noise is a shift, x ↦ x + σ n: two chains keep
their distance. Multishift noise is a staircase around it: both land on the same number unless an edge lies between them, and for
each fixed x the result has the same normal law. Right: the distance of two chains from far-apart posterior draws, with the same
random numbers, step by step. The table shows after how many steps pairs are the same floats.

    python examples/coupling.py --out coupling.png
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from partime_mcmc import (
    CommonRandomNumbers,
    MultishiftCoupling,
    Tolerance,
    coalescing_hmc,
    hmc,
    mala,
    random_walk,
    sample,
)
from partime_mcmc.forgetting import distances, meeting_times
from partime_mcmc.kernels.coupling import draw_multishift_noise, multishift
from partime_mcmc.models import MODELS

KERNELS = {
    "MALA, plain": lambda density, metric: mala(
        density, 0.5, metric, coupling=CommonRandomNumbers()
    ),
    "MALA, coalescing": lambda density, metric: mala(
        density, 0.5, metric, coupling=MultishiftCoupling()
    ),
    "HMC, plain": lambda density, metric: hmc(density, 0.4, metric, 3),
    "coalescing HMC": lambda density, metric: coalescing_hmc(
        density, 0.4, metric, 4, mala_step_size=0.4
    ),
    "random walk, plain": lambda density, metric: random_walk(density, 0.8, metric),
    "random walk, coalescing": lambda density, metric: random_walk(
        density, 0.8, metric, coupling=MultishiftCoupling(), block=3
    ),
}


def staircase(axis):
    """One draw as a map of the position: plain noise and multishift noise of unit variance."""
    places = jnp.linspace(-4, 4, 2001)
    for seed, colour in ((3, "C0"), (8, "C1")):
        layers, _ = draw_multishift_noise(jax.random.key(seed), 1, places.dtype)
        value = jax.vmap(lambda x: multishift(x[None], 1.0, layers).value[0])(places)
        axis.plot(places, value, color=colour, lw=1.5, label=f"multishift, seed {seed}")
    axis.plot(places, places + 0.8, color="0.6", ls="--", label="plain")
    axis.set(xlabel="x", ylabel="y(x)", title="One draw, for every x")
    axis.legend(frameon=False, fontsize=8)


def pairs_of(warmup, num_pairs):
    """Starts that lie far apart, in whitened coordinates: draws of the warm-up, and other draws of it."""
    starts = jax.vmap(warmup.whitening.enter)(
        jax.tree.map(lambda leaf: leaf[:num_pairs], warmup.pool)
    )
    return starts, jnp.roll(starts, 1, axis=0)


def main(argv=None):
    """Warm up every model, couple pairs for every kernel, print the table and draw the first model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--models",
        nargs="+",
        choices=sorted(MODELS),
        default=["eight_schools", "logistic", "banana"],
    )
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--num-pairs", type=int, default=32)
    parser.add_argument("--num-warmup", type=int, default=600)
    parser.add_argument("--out", default="coupling.png")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    staircase(left)
    print(f"{'model':<15}{'kernel':<26}{'met exactly':>12}{'median':>8}{'90%':>6}{'worst':>7}")
    found = {}
    for model in args.models:
        target = MODELS[model]().make_target(jax.random.key(0))
        warmup = sample(
            jax.random.key(1),
            target,
            hmc,
            num_samples=0,
            num_warmup=args.num_warmup,
            progress=False,
        ).warmup
        starts, others = pairs_of(warmup, args.num_pairs)
        for name in args.kernels:
            kernel = KERNELS[name](target.logdensity, warmup.whitening)
            state = kernel.algorithm.init(starts[0])
            tapes = jax.vmap(lambda key: kernel.tape(key, args.num_steps, state))(
                jax.random.split(jax.random.key(2), len(starts))
            )
            met = meeting_times(
                kernel.dynamics(), starts, others, tapes, tolerance=Tolerance(0.0, 0.0)
            )
            steps = np.asarray(met.steps)
            found[model, name] = met
            print(
                f"{model:<15}{name:<26}{int(jnp.sum(met.met)):>9}/{len(steps)}{np.median(steps):>8.0f}"
                f"{np.quantile(steps, 0.9):>6.0f}{steps.max():>7}"
            )
            if model == args.models[0]:
                apart = np.asarray(distances(kernel.dynamics(), starts, others, tapes))
                right.plot(np.median(np.maximum(apart, 1e-17), axis=0), label=name)
    right.set(
        xlabel="step",
        ylabel="distance, median over pairs",
        yscale="log",
        xlim=(0, min(150, args.num_steps)),
        title=f"Same random numbers, different starts: {args.models[0]}",
    )
    right.legend(frameon=False, fontsize=8)
    figure.savefig(args.out, dpi=150)
    print(f"picture: {args.out}")
    return found


if __name__ == "__main__":
    main()
