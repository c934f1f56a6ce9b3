"""A kernel of one's own: Gibbs sampling for eight schools, solved parallel over time as a plain `Dynamics`.

    y_j ~ N(theta_j, sigma_j²),   theta_j ~ N(mu, tau²),   p(mu, tau) ∝ 1     (the centred form; BDA, section 5.5)

No BlackJAX here: any function of parameters, state and random numbers is a recurrence. Each conditional distribution is sampled
by its inverse distribution function at the random numbers, which is smooth in the state; nothing is ever rejected:

    theta_j = m_j + s_j Φ⁻¹(u_j),    mu = mean(theta) + tau/√J Φ⁻¹(u'),    tau² = Σ (theta_j - mu)² / Q(u'')

with m_j, s_j of the normal conditional and Q the quantiles of chi-square with J - 1 degrees of freedom. These families
are moved and scaled copies of one standard distribution, so Φ⁻¹(u) and Q(u'') depend on the random numbers alone: the tape holds
these numbers, drawn in bulk. The state is a pytree, with log tau, since a linearised tau may step below zero.

What one sees: the chain mixes slowly and still forgets its start, so DEER finds all 2,000 sweeps in about ten passes,
all of time in one window; quasi-DEER needs several times as many, since a sweep mixes all coordinates. Posterior means
agree with quadrature over tau, given which everything is normal, to the Monte Carlo error of a slowly mixing chain.

    python examples/own_kernel.py --num-samples 2000
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc import Dynamics, Status, deer, quasi_deer, residual, sequential, solve

EFFECT = np.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
STANDARD_ERROR = np.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


def gibbs(data, state, randomness):
    """One sweep: theta given mu, tau; mu given theta, tau; tau given theta, mu."""
    y, sigma = data
    tau_squared = jnp.exp(2 * state["log_tau"])
    precision = 1 / sigma**2 + 1 / tau_squared
    theta = (y / sigma**2 + state["mu"] / tau_squared) / precision + randomness["theta"] / jnp.sqrt(
        precision
    )
    mu = theta.mean() + jnp.sqrt(tau_squared / y.size) * randomness["mu"]
    log_tau = 0.5 * jnp.log(jnp.sum((theta - mu) ** 2) / randomness["chi_square"])
    return {"theta": theta, "mu": mu, "log_tau": log_tau}


def draw_randomness(key, num_samples, num_schools):
    """The randomness of one chain: standard normals and chi-square numbers with J - 1 degrees of freedom."""
    keys = jax.random.split(key, 3)
    return {
        "theta": jax.random.normal(keys[0], (num_samples, num_schools)),
        "mu": jax.random.normal(keys[1], (num_samples,)),
        "chi_square": jax.random.chisquare(keys[2], num_schools - 1, shape=(num_samples,)),
    }


def exact_means(y, sigma, tau=np.linspace(1e-4, 200, 200_000)):
    """E mu and E tau by quadrature: given tau everything is normal."""
    weight = 1 / (sigma**2 + tau[:, None] ** 2)
    mu = (weight * y).sum(axis=1) / weight.sum(axis=1)
    log_p = (
        0.5 * np.log(weight).sum(axis=1)
        - 0.5 * np.log(weight.sum(axis=1))
        - 0.5 * (weight * (y - mu[:, None]) ** 2).sum(axis=1)
    )
    p = np.exp(log_p - log_p.max())
    return (p * mu).sum() / p.sum(), (p * tau).sum() / p.sum()


def main(argv=None):
    """Solve the same chains three times, compare with the sequential path and with quadrature."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-samples", type=int, default=2000, help="sweeps per chain")
    parser.add_argument("--num-chains", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_x64", True)

    # What the step needs besides state and random numbers are parameters: arguments, not constants, and open to derivatives.
    dynamics = Dynamics(gibbs, params=(jnp.asarray(EFFECT), jnp.asarray(STANDARD_ERROR)))
    start = {
        "theta": jnp.asarray(EFFECT),
        "mu": jnp.asarray(EFFECT.mean()),
        "log_tau": jnp.log(10.0),
    }
    keys = jax.random.split(jax.random.key(args.seed), args.num_chains)
    randomness = jax.vmap(lambda key: draw_randomness(key, args.num_samples, EFFECT.size))(keys)

    rows, truth = [], None
    methods = [
        ("sequential", sequential()),
        ("DEER", deer()),
        ("quasi-DEER", quasi_deer(damping=0.1)),
    ]
    for name, solver in methods:
        chains = jax.vmap(lambda tape: solve(dynamics, start, tape, solver=solver))  # noqa: B023
        compiled = jax.jit(chains).lower(randomness).compile()
        begin = time.perf_counter()
        found = jax.block_until_ready(compiled(randomness))
        seconds = time.perf_counter() - begin
        truth = found.states if truth is None else truth
        checked = jax.vmap(lambda path, tape: residual(dynamics, start, path, tape))(
            found.states, randomness
        )
        gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), found.states, truth)
        row = dict(
            method=name,
            status=[Status(int(code)).name for code in found.status],
            iterations=found.iterations.tolist(),
            evaluations=float(found.stats.evaluations.mean()),
            jvps=float(found.stats.jvps.mean()),
            residual=float(checked.max()),
            differs=float(max(jax.tree.leaves(gaps))),
            seconds=seconds,
        )
        rows.append(row)
        print(
            f"{name:>10}: {'/'.join(sorted(set(row['status'])))}, passes per chain {row['iterations']}, "
            f"{row['evaluations']:.1f} evaluations and {row['jvps']:.1f} JVPs per sweep\n"
            f"{'':12}residual {row['residual']:.1e}, {row['differs']:.1e} from the sequential path, "
            f"{seconds:.3f} s (compilation apart)"
        )

    draws = found.states
    means = float(draws["mu"].mean()), float(jnp.exp(draws["log_tau"]).mean())
    exact = exact_means(EFFECT, STANDARD_ERROR)
    print(
        f"posterior means by Gibbs sampling: mu {means[0]:.2f}, tau {means[1]:.2f}; "
        f"by quadrature: mu {exact[0]:.2f}, tau {exact[1]:.2f}"
    )
    return rows, means, exact


if __name__ == "__main__":
    main()
