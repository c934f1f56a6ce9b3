"""Schedules: which window of time a solver works on, and when it moves on.

A schedule is a window of `size` steps and a rule for moving it, given how many steps at its front are exact:

    AllAtOnce()            the window is all of time and never moves
    Windows(size)          moves on by a whole window once all of it is exact: bounded memory, least work
    SlidingWindow(size)    moves on at once by however many steps are exact: work follows the front, as in
                           Shih et al. 2023, "Parallel sampling of diffusion models", arXiv:2305.16317

A window holds states and nothing else (no running statistics, no "nothing changed, so done" rule), so a window shorter
than a burst of rejections is slow and never wrong. The last window ends where time ends and may overlap exact steps.
"""

from typing import Protocol

import jax.numpy as jnp

from partime_mcmc.types import Array, pytree
from partime_mcmc.validation import check_count


class Schedule(Protocol):
    """A window and a rule for moving it."""

    def window(self, num_steps: int) -> int:
        """The window's size for a path of `num_steps`."""
        ...

    def advance(self, num_exact: Array, window: int) -> Array:
        """How far to move, given how many steps at the window's front are exact."""
        ...


@pytree()
class AllAtOnce:
    """All of time at once.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import AllAtOnce, Dynamics, solve
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> found = solve(decay, jnp.zeros(1), jnp.ones((4, 1)), schedule=AllAtOnce())
        >>> found.verdict.name
        'CONVERGED'
    """

    def window(self, num_steps: int) -> int:
        return num_steps

    def advance(self, num_exact: Array, window: int) -> Array:
        return jnp.zeros_like(num_exact)


@pytree(static=("size",))
class _Moving:
    """A window of `size` steps."""

    size: int

    def __post_init__(self):
        check_count(self.size, "size", 1)

    def window(self, num_steps: int) -> int:
        return min(self.size, num_steps)


@pytree(static=("size",))
class Windows(_Moving):
    """One window of `size` steps after another.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, Windows, solve
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> found = solve(decay, jnp.zeros(1), jnp.ones((8, 1)), schedule=Windows(4))
        >>> found.verdict.name
        'CONVERGED'
    """

    def advance(self, num_exact: Array, window: int) -> Array:
        return jnp.where(num_exact == window, num_exact, 0)


@pytree(static=("size",))
class SlidingWindow(_Moving):
    """A window of `size` steps whose front follows the exact steps.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, SlidingWindow, jacobi, solve
        >>> decay = Dynamics(lambda half, x, u: half * x + u, 0.5)
        >>> window = SlidingWindow(4)
        >>> found = solve(decay, jnp.zeros(1), jnp.ones((8, 1)), solver=jacobi(), schedule=window)
        >>> found.verdict.name
        'CONVERGED'
    """

    def advance(self, num_exact: Array, window: int) -> Array:
        return num_exact
