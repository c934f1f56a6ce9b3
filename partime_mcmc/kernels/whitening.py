"""Whitened coordinates: x = center + scale · z, so that the posterior of z is nearly standard normal.

In these coordinates MALA's Jacobian is nearly a multiple of the identity (its diagonal says almost everything), the
dense metric of HMC is the identity, and chains forget their past at the same rate in every direction. A kernel that
works on z is exactly the kernel with metric `scale scaleᵀ` on x; only where rounding falls differs. The scale is diagonal, a
triangular matrix, or, beyond some hundred dimensions, diagonal with a few stretched directions (`LowRank`). Where an affine
map does not suffice, nonlinear maps follow it (`kernels.coordinates`), and the density of z gets their log Jacobians.
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.coordinates import (
    CoordinateMap,
    density_through,
    enter_all,
    leave_all,
)
from partime_mcmc.types import AnyArray, Array, ArrayLike, PyTree, pytree


@pytree()
class LowRank:
    """The matrix `diag(σ) (I + U (diag(s) − I) Uᵀ)`: a diagonal scale, and K directions stretched by more.

    Attributes:
        sigma: σ, shape `(D,)`, positive.
        directions: U, shape `(D, K)`, orthonormal columns.
        stretches: s, shape `(K,)`, positive.
    """

    sigma: Array
    directions: Array
    stretches: Array

    def times(self, z: Array) -> Array:
        """The matrix times `z`, shape `(D,)`, in O(D K)."""
        return self.sigma * (z + self.directions @ ((self.stretches - 1) * (self.directions.T @ z)))

    def solve(self, x: Array) -> Array:
        """Its inverse times `x`, shape `(D,)`, in O(D K)."""
        z = x / self.sigma
        return z + self.directions @ ((1 / self.stretches - 1) * (self.directions.T @ z))


@pytree()
class Whitening:
    """A change of coordinates between positions and vectors `z`: affine, then the maps.

    Attributes:
        example: Any position: its structure, shapes and type.
        center: Shape `(D,)`, in the order of `jax.flatten_util.ravel_pytree`.
        scale: Shape `(D,)` (diagonal), lower-triangular `(D, D)`, or `LowRank`.
        maps: Nonlinear maps from the affine image of z to positions, the first one first; mostly none.
    """

    example: PyTree
    center: Array
    scale: Array | LowRank
    maps: tuple[CoordinateMap, ...] = ()

    @classmethod
    def of_covariance(
        cls,
        example: PyTree,
        center: ArrayLike,
        covariance: ArrayLike,
        maps: tuple[CoordinateMap, ...] = (),
    ) -> Whitening:
        """Whitening by a covariance: variances of shape `(D,)` or a matrix of shape `(D, D)`, in the maps' coordinates.

        Raises:
            ValueError: If shapes do not fit, or the covariance is not symmetric and positive definite.
        """
        flat = jax.eval_shape(lambda tree: ravel_pytree(tree)[0], example)
        middle, matrix = np.asarray(center, flat.dtype), np.asarray(covariance, flat.dtype)
        if middle.shape != flat.shape:
            raise ValueError(
                f"center: shape {middle.shape}, wanted {flat.shape} as the position has {flat.size} numbers"
            )
        middle, root = jax.device_put((middle, checked_root(matrix, flat.size, "covariance")))
        return cls(example, middle, root, maps)

    @classmethod
    def of_low_rank(
        cls, example: PyTree, center: Array, sigma: Array, directions: Array, variances: Array
    ) -> Whitening:
        """Whitening by the covariance `diag(σ) (I + U (diag(v) − I) Uᵀ) diag(σ)`.

        Args:
            example: Any position.
            center: Shape `(D,)`.
            sigma: σ, shape `(D,)`.
            directions: U, shape `(D, K)`, orthonormal columns.
            variances: v, shape `(K,)`: of the directions, in units of σ.

        Raises:
            ValueError: If shapes do not fit, σ or v are not positive, or the columns of U are not orthonormal.
        """
        flat, _ = ravel_pytree(example)
        center, sigma, directions, variances = (
            jnp.asarray(value, flat.dtype) for value in (center, sigma, directions, variances)
        )
        rank = variances.size
        for name, value, shape in (
            ("center", center, flat.shape),
            ("sigma", sigma, flat.shape),
            ("directions", directions, (flat.size, rank)),
            ("variances", variances, (rank,)),
        ):
            if value.shape != shape:
                raise ValueError(
                    f"{name}: shape {value.shape}, wanted {shape} for a position of {flat.size} numbers"
                )
        for name, value in (("sigma", sigma), ("variances", variances)):
            if not bool((jnp.isfinite(value) & (value > 0)).all()):
                raise ValueError(
                    f"{name}: smallest entry {float(value.min()):.3g}, wanted positive finite numbers"
                )
        error = float(
            jnp.abs(directions.T @ directions - jnp.eye(rank, dtype=flat.dtype)).max(initial=0)
        )
        if not error < 1e-3:
            raise ValueError(f"directions: columns are orthonormal only to {error:.3g}")
        return cls(example, center, LowRank(sigma, directions, jnp.sqrt(variances)))

    def enter(self, position: PyTree) -> Array:
        """`z` of a position, shape `(D,)`."""
        offset = enter_all(self.maps, ravel_pytree(position)[0]) - self.center
        if isinstance(self.scale, LowRank):
            return self.scale.solve(offset)
        if self.scale.ndim == 1:
            return offset / self.scale
        return jnp.linalg.solve(self.scale, offset)

    def leave(self, z: Array) -> PyTree:
        """The position of `z`."""
        return self._unravel(leave_all(self.maps, self._affine(z))[0])

    def density(self, logdensity: Callable[[PyTree], Array]) -> Callable[[Array], Array]:
        """The log density of z, up to a constant, of one of positions."""
        return lambda z: density_through(
            self.maps, lambda flat: logdensity(self._unravel(flat)), self._affine(z)
        )

    def _affine(self, z: Array) -> Array:
        if isinstance(self.scale, LowRank):
            return self.center + self.scale.times(z)
        return self.center + (self.scale * z if self.scale.ndim == 1 else self.scale @ z)

    def _unravel(self, flat: Array) -> PyTree:
        return ravel_pytree(self.example)[1](flat)


def checked_root(covariance: AnyArray, dimension: int, name: str) -> np.ndarray:
    """The square root of variances `(D,)`, or the Cholesky factor of a matrix `(D, D)`; on the host, where nothing is compiled.

    Raises:
        ValueError: Naming `name`, if the shape does not fit, entries are not finite, a variance is not positive, or a
            matrix is not symmetric and positive definite.
    """
    if covariance.shape not in ((dimension,), (dimension, dimension)):
        raise ValueError(
            f"{name}: shape {covariance.shape}, wanted ({dimension},) or ({dimension}, {dimension}) for a "
            f"position of {dimension} numbers"
        )
    covariance = np.asarray(covariance)
    if not np.isfinite(covariance).all():
        raise ValueError(f"{name}: has entries that are not finite")
    if covariance.ndim == 1:
        if not (covariance > 0).all():
            raise ValueError(
                f"{name}: smallest variance {float(covariance.min()):.3g}, wanted positive ones"
            )
        return np.sqrt(covariance)
    asymmetry = float(np.abs(covariance - covariance.T).max())
    if asymmetry > 1e-3 * float(np.abs(covariance).max()):
        raise ValueError(
            f"{name}: not symmetric (entries differ by up to {asymmetry:.3g} from their mirror images)"
        )
    try:
        return np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        smallest = float(np.linalg.eigvalsh(covariance).min())
        raise ValueError(
            f"{name}: not positive definite (smallest eigenvalue {smallest:.3g})"
        ) from None
