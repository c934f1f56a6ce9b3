"""NumPyro's own `HMC` and `NUTS` as kernels of ours, so that a script changes the name of one class.

What was left at NumPyro's default is left to our warm-up: a step size of 1 is where NumPyro's adaptation starts, and a
path of 2π, in coordinates as well whitened as ours, ends where it began. What was set is kept. No choice changes
the law that is sampled. Left out: kernels that are not one of these two themselves, other kinetic energies than the
Euclidean one, and metrics given by blocks; they are refused.
"""

from __future__ import annotations

import inspect
from typing import Any

from numpyro.infer import HMC as TheirHMC
from numpyro.infer import NUTS as TheirNUTS
from numpyro.infer.hmc_util import euclidean_kinetic_energy
from numpyro.infer.mcmc import MCMCKernel

from partime_mcmc.numpyro.base import ParallelKernel
from partime_mcmc.numpyro.kernels import HMC, NUTS

_OURS = {TheirHMC: HMC, TheirNUTS: NUTS}
# NumPyro keeps every argument under its name with an underscore; a test holds it to that.
_CARRIED = (
    "model",
    "potential_fn",
    "inverse_mass_matrix",
    "dense_mass",
    "target_accept_prob",
    "init_strategy",
    "adapt_mass_matrix",
    "find_heuristic_step_size",
    "forward_mode_differentiation",
    "regularize_mass_matrix",
)
_OWN = {TheirHMC: ("num_steps", "trajectory_length"), TheirNUTS: ("max_tree_depth",)}


def from_numpyro_kernel(sampler: MCMCKernel) -> ParallelKernel:
    """A kernel of ours for one of ours, or for NumPyro's `HMC` or `NUTS`.

    Args:
        sampler: The kernel.

    Raises:
        TypeError: For any other kernel.
        ValueError: For a setting that cannot be carried over.
    """
    if isinstance(sampler, ParallelKernel):
        return sampler
    kind = type(sampler)
    if kind not in _OURS:
        raise TypeError(
            f"sampler: got a {kind.__module__}.{kind.__name__}, wanted one of CoalescingHMC, HMC, NUTS, MALA or "
            "BlackJAXKernel of partime_mcmc, or NumPyro's own HMC or NUTS"
        )
    if _stored(sampler, "kinetic_fn") is not euclidean_kinetic_energy:
        raise ValueError(
            f"sampler.kinetic_fn: got {_stored(sampler, 'kinetic_fn')!r}, wanted NumPyro's Euclidean kinetic energy"
        )
    parameters = inspect.signature(kind.__init__).parameters
    said = {name: _stored(sampler, name) for name in (*_CARRIED, *_OWN[kind])}
    options = {
        name: value
        for name, value in said.items()
        if not _is_default(value, parameters[name].default)
    }
    if not _stored(sampler, "adapt_step_size"):
        options |= {"step_size": _stored(sampler, "step_size"), "adapt_step_size": False}
    return _OURS[kind](**options)


def _stored(sampler: MCMCKernel, name: str) -> Any:
    try:
        return getattr(sampler, f"_{name}")
    except AttributeError:
        raise TypeError(
            f"sampler: this version of NumPyro does not say its kernel's {name}; wanted a kernel of partime_mcmc"
        ) from None


def _is_default(value: Any, default: Any) -> bool:
    return value is default or (isinstance(value, (bool, int, float)) and value == default)
