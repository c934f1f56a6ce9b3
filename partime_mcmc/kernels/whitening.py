"""Whitened coordinates: x = center + scale · z, so that the posterior of z is nearly standard normal.

In these coordinates MALA's Jacobian is nearly a multiple of the identity (its diagonal says almost everything), the
dense metric of HMC is the identity, and chains forget their past at the same rate in every direction. A kernel that
works on z is exactly the kernel with metric `scale scaleᵀ` on x; only where rounding falls differs. The scale is diagonal, a
triangular matrix, or, beyond some hundred dimensions, diagonal with some directions apart (`metric_root`). Where an affine
map does not suffice, nonlinear maps follow it (`kernels.coordinates`), and the density of z gets their log Jacobians.
"""

from __future__ import annotations

import functools
from typing import Callable

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.coordinates import (
    CoordinateMap,
    density_through,
    enter_all,
    leave_all,
)
from partime_mcmc.kernels.metric_root import LowRank, Root, solve, times
from partime_mcmc.kernels.traced_gradient import WithTracedGradient
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import AnyArray, Array, ArrayLike, PyTree, pytree


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
    scale: Root
    maps: tuple[CoordinateMap, ...] = ()

    @classmethod
    def of_covariance(
        cls,
        example: PyTree,
        center: ArrayLike,
        covariance: ArrayLike | LowRank,
        maps: tuple[CoordinateMap, ...] = (),
    ) -> Whitening:
        """Whitening by a covariance in the maps' coordinates.

        Args:
            example: Any position.
            center: Shape `(D,)`.
            covariance: Variances of shape `(D,)`, a matrix of shape `(D, D)`, or the `LowRank` root of one.
            maps: Nonlinear maps that follow.

        Raises:
            ValueError: If shapes do not fit, or the covariance is not symmetric and positive definite.
        """
        flat = jax.eval_shape(lambda tree: ravel_pytree(tree)[0], example)
        middle, given = jax.tree.map(
            lambda leaf: np.asarray(leaf, flat.dtype), (center, covariance)
        )
        if middle.shape != flat.shape:
            raise ValueError(
                f"center: shape {middle.shape}, wanted {flat.shape} as the position has {flat.size} numbers"
            )
        root = (
            _checked_low_rank(given, flat.size, "covariance")
            if isinstance(given, LowRank)
            else checked_root(given, flat.size, "covariance")
        )
        middle, root = jax.device_put((middle, root))
        return cls(example, middle, root, maps)

    def enter(self, position: PyTree) -> Array:
        """`z` of a position, shape `(D,)`."""
        return solve(self.scale, enter_all(self.maps, ravel_pytree(position)[0]) - self.center)

    def leave(self, z: Array) -> PyTree:
        """The position of `z`."""
        return self._unravel(leave_all(self.maps, self._affine(z))[0])

    def density(self, logdensity: Callable[[PyTree], Array]) -> Callable[[Array], Array]:
        """The log density of z, up to a constant, of one of positions."""
        traced = getattr(logdensity, "func", None)
        if not isinstance(traced, WithTracedGradient):
            return functools.partial(self._density, logdensity)
        # The gradient by z, too, is traced once and called wherever it is wanted.
        return functools.partial(
            WithTracedGradient(_InCoordinates(traced)), (self, *logdensity.args)
        )

    def _density(self, logdensity: Callable[[PyTree], Array], z: Array) -> Array:
        return density_through(
            self.maps, lambda flat: logdensity(self._unravel(flat)), self._affine(z)
        )

    def _affine(self, z: Array) -> Array:
        return self.center + times(self.scale, z)

    def _unravel(self, flat: Array) -> PyTree:
        return ravel_pytree(self.example)[1](flat)


class _InCoordinates(HashableFunction):
    """`((whitening, data), z) -> log density`; the part is `(data, position) -> log density`."""

    def __call__(self, params, z):
        whitening, data = params
        return whitening._density(functools.partial(self.parts[0], data), z)


def _checked_low_rank(root: LowRank, dimension: int, name: str) -> LowRank:
    """The root, if its shapes fit, its numbers are positive and its directions orthonormal or zero."""
    rank = root.factors.size
    for field, shape in (("sigma", (dimension,)), ("directions", (dimension, rank))):
        if getattr(root, field).shape != shape:
            raise ValueError(
                f"{name}.{field}: shape {getattr(root, field).shape}, wanted {shape} for a position of {dimension} numbers"
            )
    for field in ("sigma", "factors"):
        value = getattr(root, field)
        if not (np.isfinite(value) & (value > 0)).all():
            raise ValueError(
                f"{name}.{field}: smallest entry {float(value.min()):.3g}, wanted positive finite numbers"
            )
    is_used = np.abs(root.directions).max(axis=0, initial=0) > 0
    error = np.abs(root.directions.T @ root.directions - np.diag(is_used)).max(initial=0)
    if not error < 1e-3 or (root.factors[~is_used] != 1).any():
        raise ValueError(f"{name}.directions: columns are orthonormal only to {error:.3g}")
    return root


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
