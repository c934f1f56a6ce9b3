"""Stand-ins for a run's draws, chains of known law with a certificate, a plan and a report made to measure; and what short runs must show."""

from types import SimpleNamespace
from typing import Any

import numpy as np

from partime_mcmc.sampling.draws import raise_unless_good


def exact_path(draws: Any) -> Any:
    """These draws, if they are the chains of their kernel, however short of the posterior."""
    raise_unless_good(draws.report.status, draws.certificate)
    return draws


def chains(
    seed: int, *, num_chains: int = 4, num_samples: int = 1000, dim: int = 2, memory: float = 0.3
) -> np.ndarray:
    """Stationary first-order autoregressions with standard normal law, (C, T, dim) float64."""
    noise = np.random.default_rng(seed).normal(size=(num_samples, num_chains, dim))
    states = [noise[0]]
    for step in noise[1:]:
        states.append(memory * states[-1] + np.sqrt(1 - memory**2) * step)
    return np.stack(states, axis=1)


def draws(
    x: np.ndarray, *, key: int = 7, certified: Any = True, **info: np.ndarray
) -> SimpleNamespace:
    """A run whose model-space values are ``mu``, the first coordinate, and ``theta``, exp of the others.

    Args:
        x: positions (C, T, D).
        key: identifies the random numbers.
        certified: one verdict, or one per chain.
        info: what the kernel recorded, (C, T) each; decisions and acceptance rate are made up unless given.
    """
    num_chains, num_samples = x.shape[:2]
    rng = np.random.default_rng(11)
    rate = rng.uniform(0.6, 1.0, size=(num_chains, num_samples))
    info = {"acceptance_rate": rate, "accepted": rng.uniform(size=rate.shape) < rate} | info
    return SimpleNamespace(
        positions={"mu": x[..., 0], "theta": x[..., 1:]},
        constrained={"mu": x[..., 0], "theta": np.exp(x[..., 1:])},
        info=info,
        certificate=certificate(num_chains, num_samples, certified),
        report=report(num_chains),
        plan={
            "key": [0, key],
            "num_samples": num_samples,
            "num_chains": num_chains,
            "solver": "shooting",
        },
        warmup=None,
    )


def certificate(num_chains: int, num_samples: int, certified: Any = True) -> SimpleNamespace:
    """A certificate with small residuals; the largest, 3e-10, at step 5 of chain 1."""
    residual = np.full((num_chains, num_samples), 1e-13)
    residual[1:2, 5:6] = 3e-10
    ones = np.ones(num_chains, int)
    return SimpleNamespace(
        num_steps=num_samples * ones,
        finite=ones.astype(bool),
        max_residual=residual.max(axis=1, initial=0.0),
        worst_step=residual.argmax(axis=1) if num_samples else 0 * ones,
        num_rejected=20 * ones,
        longest_rejection=3 * ones,
        num_nonfinite_proposals=0 * ones,
        frozen=~ones.astype(bool),
        num_ambiguous=0 * ones,
        min_margin=1e-4 * ones,
        min_lattice_margin=np.nan * ones,
        tolerance=1e-8 * ones,
        certified=np.broadcast_to(certified, (num_chains,)),
        accepted=None,
        residual=residual,
    )


def report(num_chains: int) -> SimpleNamespace:
    """A report whose residual history ends at different iterations, as padded by NaN and starting at infinity."""
    history = np.full((num_chains, 20), np.nan)
    for chain in range(num_chains):
        history[chain, : 12 + chain] = 10.0 ** (2 - np.arange(12 + chain))
    history[0, 0] = np.inf
    return SimpleNamespace(
        status=["CONVERGED"] * num_chains,
        iterations=12 + np.arange(num_chains),
        evaluations_per_sample=1.3,
        jvps_per_sample=0.0,
        fallbacks=[],
        seconds_compile=1.0,
        seconds_run=2.0,
        residual_history=history,
        dtype="float64",
        device="cpu",
        versions={"partime_mcmc": "0.1.0", "jax": "0.0"},
    )
