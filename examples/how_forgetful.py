"""How forgetful is a chain? Pairs of chains with the same random numbers, and the distance between them, step by step.

What one sees: a chain can be solved in parallel over time if two chains with the same random numbers become one, wherever they
start, and the sooner the better. In whitened coordinates HMC with a path of about a quarter period (π/2) does so fastest; a
short path forgets slowly, a long one turns around and remembers; MALA and NUTS lie between. Random-walk Metropolis never
does: both chains take the same increments, so their difference changes only when one accepts and the other does not.

The picture is the mean of log10 of the distance over pairs; the table shows when pairs met to within the solver's tolerance,
and what `advise` makes of it.

    python examples/how_forgetful.py --out how_forgetful.png
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from partime_mcmc import hmc, mala, nuts, random_walk, sample
from partime_mcmc.forgetting import advise, distances, meeting_times
from partime_mcmc.models import MODELS

KERNELS = {
    "MALA": lambda density, metric: mala(density, 0.3, metric),
    "HMC, path 0.4": lambda density, metric: hmc(density, 0.2, metric, 2),
    "HMC, path π/2": lambda density, metric: hmc(density, 0.2, metric, 8),
    "HMC, path 4.8": lambda density, metric: hmc(density, 0.2, metric, 24),
    "NUTS": lambda density, metric: nuts(density, 0.5, metric),
    "random walk": lambda density, metric: random_walk(density, 0.5, metric),
}


def main(argv=None):
    """Warm up once, couple pairs for every kernel, draw and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", choices=list(KERNELS), default=list(KERNELS))
    parser.add_argument("--model", choices=sorted(MODELS), default="eight_schools")
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--num-pairs", type=int, default=16)
    parser.add_argument("--num-warmup", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", default="how_forgetful.png")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    target = MODELS[args.model]().make_target(jax.random.key(args.seed))
    key, dice_key = jax.random.split(jax.random.key(args.seed + 1))
    warmup = sample(
        key, target, hmc, num_samples=0, num_warmup=args.num_warmup, progress=False
    ).warmup
    # Far-apart starts: draws of the warm-up, each paired with the next.
    starts = jax.vmap(warmup.whitening.enter)(
        jax.tree.map(lambda leaf: leaf[: args.num_pairs + 1], warmup.pool)
    )

    figure = Figure(figsize=(7.5, 4.5), layout="constrained")
    axis = figure.add_subplot()
    print(
        f"{'kernel':<16}{'met':>8}{'median':>8}{'worst':>8}   advice for one chain of 65,536 steps"
    )
    found = {}
    for name in args.kernels:
        kernel = KERNELS[name](target.logdensity, warmup.whitening)
        tapes = jax.vmap(lambda key: kernel.tape(key, args.num_steps, None))(
            jax.random.split(dice_key, len(starts) - 1)
        )
        apart = np.asarray(distances(kernel.dynamics(), starts[:-1], starts[1:], tapes))
        axis.plot(np.log10(np.maximum(apart, 1e-16)).mean(axis=0), label=name)
        met = meeting_times(kernel.dynamics(), starts[:-1], starts[1:], tapes)
        steps = np.asarray(met.steps)
        advice = advise(
            kernel.dynamics(),
            starts[0],
            jax.tree.map(lambda leaf: leaf[0], tapes),
            starts=starts,
            num_steps=65_536,
        )
        verdict = (
            f"{advice.num_segments} segments, {advice.evaluations_per_step:.2f} evaluations per step"
            if advice.parallel
            else "sequential"
        )
        found[name] = met, advice
        print(
            f"{name:<16}{int(jnp.sum(met.met)):>4}/{len(steps)}{np.median(steps):>8.0f}{steps.max():>8}   {verdict}"
        )
    axis.set(
        xlabel="step",
        ylabel="log₁₀ distance, mean over pairs",
        title=f"Same random numbers, different starts: {args.model}",
    )
    axis.legend(frameon=False)
    figure.savefig(args.out, dpi=150)
    print(f"picture: {args.out}")
    return found


if __name__ == "__main__":
    main()
