"""Markov kernels as dynamical systems, and the certificate of a chain."""

from partime_mcmc.kernels.blackjax import (
    coalescing_hmc,
    from_blackjax,
    hmc,
    mala,
    nuts,
    random_walk,
)
from partime_mcmc.kernels.certificate import Certificate
from partime_mcmc.kernels.certify import certify, certify_held, certify_with_records, hold
from partime_mcmc.kernels.dice import CoalescingDice, PlainDice
from partime_mcmc.kernels.kernel import Carry, Kernel, Tape, loop
from partime_mcmc.kernels.recorded import Evidence, Independent, Recorded, certify_recorded
from partime_mcmc.kernels.records import Records
from partime_mcmc.kernels.whiten import Whitening

__all__ = [
    "Carry",
    "Certificate",
    "CoalescingDice",
    "Evidence",
    "Independent",
    "Kernel",
    "PlainDice",
    "Recorded",
    "Records",
    "Tape",
    "Whitening",
    "certify",
    "certify_held",
    "certify_recorded",
    "certify_with_records",
    "coalescing_hmc",
    "from_blackjax",
    "hmc",
    "hold",
    "loop",
    "mala",
    "nuts",
    "random_walk",
]
