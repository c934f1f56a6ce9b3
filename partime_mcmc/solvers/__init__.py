"""One pass over a path: Newton, Kalman trust regions, and the sequential loop in the same shape."""

from partime_mcmc.solvers.base import Proposal, Solver
from partime_mcmc.solvers.kalman import ConstantDamping, DampingPolicy, Kalman, RelaxingDamping
from partime_mcmc.solvers.newton import Newton
from partime_mcmc.solvers.sequential import Sequential
from partime_mcmc.solvers.shooting import Shooting

__all__ = [
    "ConstantDamping",
    "DampingPolicy",
    "Kalman",
    "Newton",
    "Proposal",
    "RelaxingDamping",
    "Sequential",
    "Shooting",
    "Solver",
]
