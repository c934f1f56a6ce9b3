"""Predicting, before a long run, whether it can be solved in parallel over time and what that gains.

`lyapunov` looks at derivatives along a path, `meeting_times` and `distances` at pairs of paths with the same drives,
and `advise` turns meeting times and the cost of a compiled step into a plan.
"""

from partime_mcmc.predict.advise import Advice, Meeting, advise
from partime_mcmc.predict.calibrate import calibrate
from partime_mcmc.predict.coalescence import MeetingTimes, distances, meeting_times
from partime_mcmc.predict.lyapunov import Lyapunov, lyapunov
from partime_mcmc.predict.machine import CPU, GPU, Machine

__all__ = [
    "CPU",
    "GPU",
    "Advice",
    "Lyapunov",
    "Machine",
    "Meeting",
    "MeetingTimes",
    "advise",
    "calibrate",
    "distances",
    "lyapunov",
    "meeting_times",
]
