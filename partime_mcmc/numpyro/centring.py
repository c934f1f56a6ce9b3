"""The location-scale sites of a NumPyro model: which can be recentred, and how.

A latent site qualifies if its law has a location l and a scale s for each value (Normal, StudentT, Cauchy, Laplace, Logistic,
Gumbel, the logarithm of a LogNormal, a Gaussian random walk's step, means and standard deviations of a multivariate normal), and
l or s depends on other latent sites. The map is a bijection whatever the law; it helps where the law scales with s. One run of the model computes every l and s in the
order of its sites, as NumPyro's `LocScaleReparam` does:

    leave:  x = l + s^(1 − c) (y − c l)        enter:  y = c l + (x − l) / s^(1 − c)

Sites that the user has reparametrised are left as they are, and so are sites inside NumPyro's `scan`, which no handler outside
of it can see.
"""

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
from jax.extend.core import Literal
from numpyro.distributions import biject_to
from numpyro.handlers import substitute
from numpyro.primitives import Messenger

from partime_mcmc.numpyro.sites import parameters_unchecked, unwrapped
from partime_mcmc.types import Array, PyTree

_LAWS = (
    dist.Normal,
    dist.StudentT,
    dist.Cauchy,
    dist.Laplace,
    dist.Logistic,
    dist.Gumbel,
    dist.LogNormal,
    dist.GaussianRandomWalk,
    dist.MultivariateNormal,
)
# The name that NumPyro's `LocScaleReparam` gives to the site it makes.
_REPARAMETRISED = "_decentered"


class SiteCentring:
    """The location-scale sites of a model, and the change of coordinates that recentres them.

    Args:
        model: Without arguments.
        names: The sites to recentre.
    """

    def __init__(self, model: Callable[[], Any], names: tuple[str, ...]):
        self.model, self.names = model, names
        self.origin = "centring", getattr(model, "model", model), names

    def leave(self, weights: PyTree, y: PyTree) -> tuple[PyTree, Array]:
        """The position of partly centred values `y`, and the log Jacobian determinant, shape ()."""
        recentred = _Recentred(self.model, y, self._checked(weights), _position_of)
        recentred.run()
        return recentred.found, recentred.log_jacobian

    def enter(self, weights: PyTree, x: PyTree) -> PyTree:
        """Partly centred values of the position `x`."""
        recentred = _Recentred(self.model, x, self._checked(weights), _centred_value)
        recentred.run()
        return recentred.entered

    def _checked(self, weights: PyTree) -> PyTree:
        if set(weights) != set(self.names):
            raise ValueError(f"weights: got sites {sorted(weights)}, wanted {sorted(self.names)}")
        return weights


def find_centring(model: Callable[[], Any], position: PyTree) -> SiteCentring | None:
    """The sites of a model that can be recentred; None where there are none.

    Args:
        model: Without arguments.
        position: Shapes and types of an unconstrained position.
    """

    def laws(position):
        plain = _Recentred(model, position, {}, _position_of)
        plain.run()
        return plain.laws

    jaxpr, shapes = jax.make_jaxpr(laws, return_shape=True)(position)
    depends = iter(_depend_on_inputs(jaxpr.jaxpr))
    # A law may depend on its own site in no way but through others, since its parameters are known before its value.
    hangs = {name: any([next(depends) for _ in law]) for name, law in shapes.items()}
    names = tuple(name for name, moves in hangs.items() if moves and position[name].size)
    return SiteCentring(model, names) if names else None


class _Recentred(Messenger):
    """Runs a model at given unconstrained values, some of them partly centred.

    Attributes:
        found: Unconstrained values as the model sees them, by site.
        entered: What `value_of` made of them.
        laws: Location and scale, by location-scale site.
        log_jacobian: Of `found` with respect to the given values where these are partly centred.
    """

    def __init__(self, model: Callable, values: PyTree, weights: PyTree, value_of: Callable):
        super().__init__(model)
        self._values, self._weights, self._value_of = values, weights, value_of
        self.found, self.entered, self.laws = dict(values), dict(values), {}
        self._seen: set[str] = set()
        self.log_jacobian = jnp.zeros((), jnp.result_type(float))

    def run(self) -> None:
        """Run the model. Sites inside of loops, which only NumPyro's own handlers reach, get their values as they are."""

        def inside(site):
            name = site["name"]
            if site["type"] != "sample" or name in self._seen or name not in self._values:
                return None
            return biject_to(site["fn"].support)(self._values[name])

        with parameters_unchecked():
            substitute(self, substitute_fn=inside)()

    def process_message(self, message):
        # A value that is there already comes from inside of a loop, which shows its sites once more when it is done.
        if message["type"] != "sample" or message["is_observed"] or message["value"] is not None:
            return
        name = message["name"]
        if name not in self._values:
            return
        value, law = self._values[name], _law_of(message)
        self._seen.add(name)
        if law is not None:
            self.laws[name] = law
        if name in self._weights:
            weight, (location, scale) = self._weights[name], self.laws[name]
            log_scale = jnp.broadcast_to((1 - weight) * jnp.log(scale), jnp.shape(value))
            stretch = jnp.exp(log_scale)
            self.log_jacobian += log_scale.sum()
            value, self.entered[name] = self._value_of(value, weight, location, stretch)
        self.found[name] = value
        message["value"] = biject_to(message["fn"].support)(value)


def _position_of(y, weight, location, stretch):
    return location + stretch * (y - weight * location), y


def _centred_value(x, weight, location, stretch):
    return x, weight * location + (x - location) / stretch


def _law_of(message: dict) -> tuple[Array, Array] | None:
    """Location and scale of the site's unconstrained value, or None."""
    law = unwrapped(message["fn"])
    if type(law) not in _LAWS or message["name"].endswith(_REPARAMETRISED):
        return None
    if isinstance(law, dist.MultivariateNormal):
        location, scale = jnp.asarray(law.loc), jnp.sqrt(law.variance)
    else:
        # A Gaussian random walk has no location: it starts at 0.
        location, scale = jnp.asarray(getattr(law, "loc", 0.0)), jnp.asarray(law.scale)
        # One parameter for a whole walk.
        location, scale = (
            value[..., None] if isinstance(law, dist.GaussianRandomWalk) else value
            for value in (location, scale)
        )
    try:
        fits = (
            jnp.broadcast_shapes(location.shape, scale.shape, message["fn"].shape())
            == message["fn"].shape()
        )
    except ValueError:
        return None
    return (location, scale) if fits else None


def _depend_on_inputs(jaxpr) -> list[bool]:
    """Whether each result of a jaxpr depends on one of its arguments."""
    known = set(jaxpr.invars)
    for equation in jaxpr.eqns:
        if any(not isinstance(atom, Literal) and atom in known for atom in equation.invars):
            known.update(equation.outvars)
    return [not isinstance(atom, Literal) and atom in known for atom in jaxpr.outvars]
