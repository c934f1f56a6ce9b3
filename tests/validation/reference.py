"""Reference posteriors: where they are, their models, and how draws are held against them.

The folder is named by the variable PARTIME_REFERENCE_POSTERIORS and holds `models.py` (NumPyro models by name) and one
JSON file per posterior with data and, for every parameter, moments and quantiles of some 10,000 nearly independent
draws with their MCSEs.

For an estimate e from C chains with MCSE s and a reference r with MCSE q, z = (e - r) / hypot(s, q), about standard
normal if both sampled one law. Looked at are means, log standard deviations and the 5, 50 and 95% quantiles of every
parameter; the largest |z| of m may reach the normal quantile at 1 - alpha / 2m. Gates come first (finite, moving, at
least four chains, bulk and tail ESS at least 400), because a test without power passes anything; the shift that would
have been found is part of the verdict.
"""

import dataclasses
import importlib.util
import json
import os
import pathlib

import jax
import numpy as np
from scipy import special

from partime_mcmc.diagnostics import arviz
from partime_mcmc.numpyro import HMC, MALA, NUTS, CoalescingHMC, ParallelMCMC

VARIABLE = "PARTIME_REFERENCE_POSTERIORS"
NAMES = (
    "arK-arK",
    "earnings-logearn_interaction",
    "eight_schools-eight_schools_noncentered",
    "gp_pois_regr-gp_regr",
    "kidiq-kidscore_interaction",
    "low_dim_gauss_mix-low_dim_gauss_mix",
    "mesquite-logmesquite_logvas",
    "nes2000-nes",
    "sblri-blr",
)
KERNELS = {"CoalescingHMC": CoalescingHMC, "HMC": HMC, "NUTS": NUTS, "MALA": MALA}
SAMPLES = {"CoalescingHMC": 3000, "HMC": 3000, "NUTS": 1000, "MALA": 8000}
ALPHA, MIN_ESS, MIN_CHAINS, POWER = 1e-3, 400, 4, 0.99
_QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}


def folder():
    """The folder, or None where the variable is not set; a variable that names no such folder is an error."""
    named = os.environ.get(VARIABLE)
    if not named:
        return None
    path = pathlib.Path(named)
    missing = [name for name in NAMES if not (path / f"{name}.json").is_file()]
    if missing or not (path / "models.py").is_file():
        raise FileNotFoundError(
            f"{VARIABLE}={named}: wanted models.py and {missing or 'all posteriors'} there"
        )
    return path


@dataclasses.dataclass(frozen=True)
class Posterior:
    """A model with its data, and the reference's numbers by flat parameter name."""

    name: str
    model: object
    data: dict
    reference: dict
    flat: object


def load(name):
    """One posterior; data become arrays of the precision that is on."""
    path = folder()
    spec = importlib.util.spec_from_file_location("reference_models", path / "models.py")
    models = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(models)
    stored = json.loads((path / f"{name}.json").read_text())
    model, prepare = models.MODELS[name]
    return Posterior(name, model, prepare(stored["data"]), stored["reference"], models.flat)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Gates not met, z-scores by (parameter, quantity), the bound on |z|, and the shift of a mean, in sd, that would be found."""

    gates: list
    scores: dict
    bound: float
    detectable: float
    least_ess: float

    @property
    def failures(self):
        return {key: round(z, 1) for key, z in self.scores.items() if not abs(z) <= self.bound}

    @property
    def ok(self):
        return not self.gates and not self.failures

    def __str__(self):
        worst = max(self.scores.items(), key=lambda item: abs(item[1]))
        return (
            f"{len(self.scores)} z-scores, largest {worst[1]:.2f} ({', '.join(worst[0])}) of {self.bound:.2f} allowed; least ESS "
            f"{self.least_ess:.0f}; a shift of {self.detectable:.3f} sd would be found"
            + "".join(f"; {gate}" for gate in self.gates)
        )


def sampled(kernel, name):
    """Four chains of a kernel with default settings on a posterior: the finished run, and its verdict."""
    posterior = load(name)
    mcmc = ParallelMCMC(
        KERNELS[kernel](posterior.model), num_warmup=1000, num_samples=SAMPLES[kernel], num_chains=4
    )
    mcmc.run(jax.random.key(2), **posterior.data)
    draws = posterior.flat(mcmc.get_samples(group_by_chain=True), posterior.reference)
    return mcmc, judge(draws, posterior.reference)


def judge(draws, reference):
    """The verdict on draws by flat name, `(C, T)` each."""
    gates, scores, least, theirs = [], {}, np.inf, np.inf
    for name, ref in reference.items():
        x = np.asarray(draws[name], float)
        if x.shape[0] < MIN_CHAINS or not np.isfinite(x).all() or (np.ptp(x, axis=1) == 0).any():
            gates.append(
                f"{name}: {x.shape[0]} chains, finite {np.isfinite(x).all()}, a chain stands still or they are too few"
            )
            continue
        ess = min(arviz.ess_bulk(x), arviz.ess_tail(x))
        least, theirs = min(least, ess), min(theirs, ref["ess_bulk"])
        if not ess >= MIN_ESS:
            gates.append(f"{name}: bulk or tail ESS {ess:.0f} below {MIN_ESS}")
        sd = x.std(ddof=1)
        pairs = {
            "mean": (x.mean(), arviz.mcse_mean(x), ref["mean"], ref["mcse_mean"]),
            "log sd": (
                np.log(sd),
                arviz.mcse_sd(x) / sd,
                np.log(ref["sd"]),
                ref["mcse_sd"] / ref["sd"],
            ),
        }
        for quantity, q in _QUANTILES.items():
            pairs[quantity] = (
                np.quantile(x, q),
                arviz.mcse_quantile(x, q),
                ref[quantity],
                ref[f"mcse_{quantity}"],
            )
        for quantity, (ours, error, wanted, other) in pairs.items():
            scores[name, quantity] = float((ours - wanted) / np.hypot(error, other))
    bound = float(-special.ndtri(ALPHA / (2 * max(len(scores), 1))))
    detectable = float((bound + special.ndtri(POWER)) * np.sqrt(1 / least + 1 / theirs))
    return Verdict(gates, scores, bound, detectable, float(least))
