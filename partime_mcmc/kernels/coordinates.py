"""Nonlinear changes of coordinates in which a posterior is closer to a normal.

A map takes coordinates y to unconstrained positions x = m(y), both flat vectors of D numbers. The density of y is

    log p_y(y) = log p(m(y)) + log |det m'(y)|,

so a kernel that is exact on y is exact on x. Maps are frozen before a run begins: their weights are numbers of the kernel, as
its step size is, and every weight uses one compiled program.

A triangular map comes first, where there is one (`triangular_map`), then recentred sites. `Recentring` moves each site with a
location-scale law between its centred form (c = 1) and its non-centred form (c = 0):

    x = l + s^(1 − c) (y − c l),     y = c l + (x − l) / s^(1 − c),     log |det| = Σ (1 − c) log s,

with location l and scale s as the model computes them from the sites before (Papaspiliopoulos, Roberts & Sköld 2007; Gorinova,
Moore & Hoffman 2020, arXiv:1906.03028). How weights are learned is `warmup.reparametrise`.
"""

import dataclasses
from typing import Callable, Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from partime_mcmc.kernels.triangular_map import TriangularMap
from partime_mcmc.tracing import HashableFunction, explicit
from partime_mcmc.types import Array, PyTree, pytree


class CoordinateMap(Protocol):
    """A bijection between coordinates y and flat positions x; a pytree.

    Attributes:
        weights: What is learned, a pytree of arrays.
    """

    @property
    def weights(self) -> PyTree: ...

    def leave(self, y: Array) -> tuple[Array, Array]:
        """The position x of y, shape `(D,)`, and log |det dx/dy|, shape ()."""
        ...

    def enter(self, x: Array) -> Array:
        """The y of x, shape `(D,)`."""
        ...

    def reweighted(self, weights: PyTree) -> Self:
        """The same map with other weights."""
        ...

    def describe(self) -> str:
        """What the map does, in one sentence for reports; empty if it does nothing."""
        ...


def leave_all(maps: tuple[CoordinateMap, ...], y: Array) -> tuple[Array, Array]:
    """Through all maps, the first one first: the position, shape `(D,)`, and log |det dx/dy|, shape ()."""
    total = jnp.zeros((), y.dtype)
    for one in maps:
        y, change = one.leave(y)
        total += change
    return y, total


def enter_all(maps: tuple[CoordinateMap, ...], x: Array) -> Array:
    """The inverse of `leave_all`: coordinates, shape `(D,)`."""
    for one in reversed(maps):
        x = one.enter(x)
    return x


def density_through(
    maps: tuple[CoordinateMap, ...], logdensity: Callable[[Array], Array], y: Array
) -> Array:
    """The log density of coordinates y: of the position that the maps make of them, with the log Jacobian.

    Args:
        maps: The first one first.
        logdensity: Of flat positions.
        y: Shape `(D,)`.
    """
    x, log_jacobian = leave_all(maps, y)
    value = logdensity(x)
    return value + log_jacobian.astype(value.dtype) if maps else value


class Centring(Protocol):
    """What a target knows of its location-scale sites.

    Attributes:
        names: The sites, in the model's order.
    """

    names: tuple[str, ...]

    def leave(self, weights: PyTree, y: PyTree) -> tuple[PyTree, Array]:
        """The position of partly centred values, and the log Jacobian determinant, shape ()."""
        ...

    def enter(self, weights: PyTree, x: PyTree) -> PyTree:
        """Partly centred values of a position."""
        ...


def weights_of(maps: tuple[CoordinateMap, ...]) -> tuple[PyTree, ...]:
    """The weights of each map."""
    return tuple(one.weights for one in maps)


def reweighted(
    maps: tuple[CoordinateMap, ...], weights: tuple[PyTree, ...]
) -> tuple[CoordinateMap, ...]:
    """The same maps with other weights."""
    return tuple(one.reweighted(each) for one, each in zip(maps, weights, strict=True))


class _Method(HashableFunction):
    """A method of a centring, for `explicit`; parts: the centring and the method's name."""

    def __call__(self, nothing, weights, values):
        centring, name = self.parts
        return getattr(centring, name)(weights, values)


@pytree(static=("leaving", "entering"))
class Recentring:
    """Sites of location-scale laws, each value c-centred.

    Attributes:
        weights: c between 0 and 1, by site and of the site's shape; 1 is the model as written.
        example: A position.
        leave_data: Arrays that the model captured, for `leaving`.
        enter_data: The same for `entering`.
        leaving: `(data, weights, y) -> (x, log Jacobian)` on positions.
        entering: `(data, weights, x) -> y`.
    """

    weights: PyTree
    example: PyTree
    leave_data: PyTree
    enter_data: PyTree
    leaving: Callable
    entering: Callable

    @classmethod
    def of(cls, centring: Centring, example: PyTree) -> Self:
        """The map that changes nothing: every site as the model has it."""
        # On the host: every small operation on arrays of a device is a program of its own.
        weights = {
            name: jax.device_put(np.ones(example[name].shape, example[name].dtype))
            for name in centring.names
        }
        leaving, leave_data = explicit(_Method(centring, "leave"), None, weights, example)
        entering, enter_data = explicit(_Method(centring, "enter"), None, weights, example)
        return cls(weights, example, leave_data, enter_data, leaving, entering)

    def leave(self, y: Array) -> tuple[Array, Array]:
        unravel = ravel_pytree(self.example)[1]
        x, change = self.leaving(self.leave_data, self.weights, unravel(y))
        return ravel_pytree(x)[0], change

    def enter(self, x: Array) -> Array:
        unravel = ravel_pytree(self.example)[1]
        return ravel_pytree(self.entering(self.enter_data, self.weights, unravel(x)))[0]

    def reweighted(self, weights: PyTree) -> Self:
        return dataclasses.replace(self, weights=weights)

    def describe(self) -> str:
        said = []
        for name, weight in self.weights.items():
            values = np.asarray(weight)  # on the host, where nothing is compiled
            low, high = float(values.min()), float(values.max())
            if low < 1:
                said.append(f"{name} ({low:.2f}" + (f" to {high:.2f})" if high > low else ")"))
        return (
            f"Re-centred (1 as the model has it, 0 non-centred): {', '.join(said)}." if said else ""
        )


def maps_of(centring: Centring | None, example: PyTree) -> tuple[CoordinateMap, ...]:
    """The maps that warm-up may learn for a target, as yet without effect.

    Args:
        centring: Of the target; None where it has no location-scale sites.
        example: A position.
    """
    return () if centring is None else (Recentring.of(centring, example),)


def learned_maps(
    centring: Centring | None, example: PyTree, weights: tuple[PyTree, ...]
) -> tuple[CoordinateMap, ...]:
    """The maps that a warm-up has learned, from `weights_of` them; none if there are no weights."""
    if not weights:
        return ()
    known = maps_of(centring, example)
    # What comes before the maps that a target brings is a triangular one.
    first = len(weights) - len(known)
    found = tuple(TriangularMap(**one) for one in weights[:first])
    return found + reweighted(known, weights[first:])
