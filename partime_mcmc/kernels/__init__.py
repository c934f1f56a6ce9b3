"""Markov kernels as dynamical systems."""

from partime_mcmc.kernels.blackjax import from_blackjax
from partime_mcmc.kernels.builders import coalescing_hmc, hmc, mala, nuts, random_walk
from partime_mcmc.kernels.coupling import CommonRandomNumbers, MultishiftCoupling
from partime_mcmc.kernels.kernel import Carry, Kernel, Tape, blackjax_loop
from partime_mcmc.kernels.whitening import Whitening

__all__ = [
    "Carry",
    "CommonRandomNumbers",
    "Kernel",
    "MultishiftCoupling",
    "Tape",
    "Whitening",
    "blackjax_loop",
    "coalescing_hmc",
    "from_blackjax",
    "hmc",
    "mala",
    "nuts",
    "random_walk",
]
