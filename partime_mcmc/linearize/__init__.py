"""What stands in for the Jacobian of a step."""

from partime_mcmc.linearize.base import Linearizer
from partime_mcmc.linearize.dense import DenseJacobian
from partime_mcmc.linearize.diagonal import DiagonalJacobian, HutchinsonDiagonal
from partime_mcmc.linearize.fixed import IdentityJacobian, ZeroJacobian
from partime_mcmc.linearize.modify import Clipped, Damped
from partime_mcmc.linearize.paired import PairedDiagonal

__all__ = [
    "Clipped",
    "Damped",
    "DenseJacobian",
    "DiagonalJacobian",
    "HutchinsonDiagonal",
    "IdentityJacobian",
    "Linearizer",
    "PairedDiagonal",
    "ZeroJacobian",
]
