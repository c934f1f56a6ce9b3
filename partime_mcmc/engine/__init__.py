"""The engine: recurrences, the loop that solves them (`engine.solve`), and what it returns."""

from partime_mcmc.engine.adjoint import Adjoint, Implicit, ImplicitSegmented, NoDerivatives
from partime_mcmc.engine.dynamics import (
    CachedStep,
    Dynamics,
    ravel,
    residual,
    rollout,
    without_captures,
)
from partime_mcmc.engine.recipes import (
    deer,
    elk,
    jacobi,
    picard,
    quasi_deer,
    quasi_elk,
    sequential,
    shooting,
)
from partime_mcmc.engine.solution import Solution, SolveError, Stats, Status, Tolerance
from partime_mcmc.engine.time_axis import LocalTime, TimeAxis
from partime_mcmc.engine.windows import AllAtOnce, Schedule, SlidingWindow, Windows

__all__ = [
    "Adjoint",
    "AllAtOnce",
    "CachedStep",
    "Dynamics",
    "Implicit",
    "ImplicitSegmented",
    "LocalTime",
    "NoDerivatives",
    "Schedule",
    "SlidingWindow",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "TimeAxis",
    "Tolerance",
    "Windows",
    "deer",
    "elk",
    "jacobi",
    "picard",
    "quasi_deer",
    "quasi_elk",
    "ravel",
    "residual",
    "rollout",
    "sequential",
    "shooting",
    "without_captures",
]
