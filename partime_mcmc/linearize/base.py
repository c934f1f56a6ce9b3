"""Linearizers: what stands in for the Jacobian of a step, all steps at once.

Around a guess x̂ every step is replaced by an affine map

    f(x, u_t) ≈ f(x̂_{t-1}, u_t) + A_t (x − x̂_{t-1}),

and the choice of `A_t` names the method: the Jacobian gives DEER, its diagonal quasi-DEER, the identity Picard, zero
Jacobi. A linearizer returns the values `f(x̂_{t-1}, u_t)` and maps with the linear parts `A_t` and shift 0; the solver
sets the shift. Derivatives are taken in forward mode only: kernels hold `while` loops, and reverse mode through a
rejected proposal multiplies 0 by NaN.
"""

from typing import Protocol

from partime_mcmc.engine.dynamics import Dynamics
from partime_mcmc.scan.affine import AffineMap
from partime_mcmc.types import Array, Key, PyTree


class Linearizer(Protocol):
    """What stands in for the Jacobian."""

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, AffineMap]:
        """Linearise every step.

        Args:
            dynamics: The recurrence on flat states.
            previous: `x̂_0..x̂_{T-1}`, shape `(T, D)`.
            drives: Leaves with leading axis `T`.
            key: For linearizers that estimate; the same key gives the same estimate.

        Returns:
            The values `f(x̂_{t-1}, u_t)`, shape `(T, D)`, and T maps with shift 0.
        """
        ...

    def jvps(self, dimension: int) -> int:
        """Jacobian-vector products per step, for a state of `dimension` numbers."""
        ...

    def map_size(self, dimension: int) -> int:
        """Numbers in the linear part of one step's map: what memory per step is estimated from."""
        ...
