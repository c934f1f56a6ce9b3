"""Does a chain forget where it started? Asked before a long run: only then can it be solved in parallel over time.

`lyapunov` looks at derivatives along a path, `meeting_times` and `distances` at pairs of paths with the same drives, and
`advise` turns meeting times into a solver.
"""

from partime_mcmc.forgetting.advise import Advice, Meeting, advise
from partime_mcmc.forgetting.coalescence import MeetingTimes, distances, meeting_times
from partime_mcmc.forgetting.lyapunov import Lyapunov, lyapunov

__all__ = [
    "Advice",
    "Lyapunov",
    "Meeting",
    "MeetingTimes",
    "advise",
    "distances",
    "lyapunov",
    "meeting_times",
]
