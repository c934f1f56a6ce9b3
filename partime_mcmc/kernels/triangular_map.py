"""A triangular map: some coordinates are scales, on which the place and the log width of all others depend linearly.

With H the scales, R the others and m a typical value of the scales, coordinates y become positions x by

    x_H = y_H,     x_R = c + V (x_H − m) + exp(W (x_H − m)) ∘ y_R,     log |det| = Σ W (x_H − m),

so that of a funnel x_R | x_H ~ N(0, exp(2 x_H)) a standard normal is left, and of a ridge x_R ~ b exp(−x_H) its cross-section. One
layer of an affine autoregressive flow (Dinh, Sohl-Dickstein & Bengio 2017, arXiv:1605.08803; for samplers Hoffman et al. 2019,
arXiv:1903.03704), with so few coordinates to depend on that some hundred draws determine it. How V, W and c are learned is
`warmup.triangular_fit`.
"""

from typing import Self

import jax.numpy as jnp
import numpy as np

from partime_mcmc.types import AnyArray, Array, PyTree, pytree


@pytree()
class TriangularMap:
    """Coordinates whose place and log width depend linearly on K scales.

    Attributes:
        scales: The coordinates that are scales, shape `(K,)`, integers. Columns of zeros in `slopes` and `log_slopes` are
            room for more: which coordinate they name does not matter.
        middle: m, shape `(K,)`.
        origin: c, shape `(D,)`; 0 for scales.
        slopes: V, shape `(D, K)`; rows of zeros for scales.
        log_slopes: W, the same.
    """

    scales: AnyArray
    middle: AnyArray
    origin: AnyArray
    slopes: AnyArray
    log_slopes: AnyArray

    @property
    def weights(self) -> PyTree:
        return {
            "scales": self.scales,
            "middle": self.middle,
            "origin": self.origin,
            "slopes": self.slopes,
            "log_slopes": self.log_slopes,
        }

    def leave(self, y: Array) -> tuple[Array, Array]:
        offset = y[self.scales] - self.middle
        log_width = self.log_slopes @ offset
        place = jnp.asarray(self.origin) + self.slopes @ offset
        return place + jnp.exp(log_width) * y, jnp.sum(log_width)

    def enter(self, x: Array) -> Array:
        offset = x[self.scales] - self.middle
        return (x - self.origin - self.slopes @ offset) * jnp.exp(-self.log_slopes @ offset)

    def reweighted(self, weights: PyTree) -> Self:
        return type(self)(**weights)

    def describe(self) -> str:
        # Without JAX, which would compile a program for each operation.
        slopes, log_slopes = np.asarray(self.slopes), np.asarray(self.log_slopes)
        count = int(((slopes != 0) | (log_slopes != 0)).any(axis=0).sum())
        others = int((log_slopes != 0).any(axis=1).sum())
        if not others:
            return ""
        scales = "1 scale" if count == 1 else f"{count} scales"
        return (
            f"A triangular map on {scales}, by which the width of {others} other coordinates goes."
        )
