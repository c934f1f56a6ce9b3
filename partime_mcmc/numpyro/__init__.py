"""NumPyro at the border: its models as targets, our kernels in its shape, and its `MCMC` in parallel time."""

from partime_mcmc.numpyro.kernels import (
    HMC,
    MALA,
    NUTS,
    BlackJAXKernel,
    CoalescingHMC,
    ParallelKernel,
)
from partime_mcmc.numpyro.mcmc import ParallelMCMC, ParallelReport
from partime_mcmc.numpyro.model import from_numpyro

__all__ = [
    "BlackJAXKernel",
    "CoalescingHMC",
    "HMC",
    "MALA",
    "NUTS",
    "ParallelKernel",
    "ParallelMCMC",
    "ParallelReport",
    "from_numpyro",
]
