"""A NumPyro model as a `Target`.

NumPyro maps every latent site z to unconstrained x by the bijection b of its support, z = b(x), and

    logdensity(x) = log p(b(x), data) + log |det b'(x)|,      constrain(x) = {latent and deterministic sites at b(x)}.

Starts are NumPyro's own: `init_strategy`, by default uniform on (-2, 2) in x, up to 100 tries for a finite log density
and gradient. NumPy data stay NumPy, in the dtypes of the precision that is on while the model runs.

Discrete latent sites are summed out as NumPyro's HMC does it, by funsor; their values are not among the draws (NumPyro's
`infer_discrete` draws them afterwards). A model without a free coordinate, such as one of deterministic sites alone, is
sampled along a standard normal coordinate of its own, so that it has as many draws as any.

Left out: subsampling plates (the density would be random, and NumPyro's fixes one subsample in silence), and fitting
`numpyro.param` (held at its initial value).
"""

import contextlib
import functools
import warnings
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax.flatten_util import ravel_pytree
from jax.interpreters.partial_eval import dce_jaxpr
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import ParamInfo, constrain_fn, initialize_model, potential_energy

from partime_mcmc.compile_cache import compiler_options
from partime_mcmc.numpyro.centring import find_centring
from partime_mcmc.numpyro.sites import (
    JaxObservations,
    SiteNames,
    Sites,
    WithData,
    anywhere,
    check_observed_sites,
    checked_sites,
    latent,
    parameters_unchecked,
    traced,
    unsuspicious_sites,
)
from partime_mcmc.sampling.target import Target
from partime_mcmc.tracing import Explicit, explicit, origin_of
from partime_mcmc.types import AnyArray, Array, Key, PyTree
from partime_mcmc.validation import InvalidStart, check_key, check_outside_transforms


def called(model: Callable, data: dict[str, Any], key: Key) -> tuple[Any, bool]:
    """What a function returns, and whether it is a NumPyro model: whether it reaches a site.

    A model that fails after a site is one, and returns None here: `from_numpyro` says better what is wrong with it.

    Args:
        model: The function.
        data: Its keyword arguments.
        key: PRNG key, shape ().

    Raises:
        Exception: Whatever the function raises before it reaches a site.
    """
    recorder = SiteNames(seed(JaxObservations(model), key))
    try:
        returned = recorder(**data)
    except Exception:
        if not recorder.names:
            raise
        returned = None
    return returned, bool(recorder.names)


def from_numpyro(
    model: Callable, *args: Any, key: Key, init_strategy: Callable | None = None, **kwargs: Any
) -> Target:
    """The posterior of a NumPyro model, ready to sample.

    Args:
        model: A NumPyro model.
        *args: Its positional arguments.
        key: PRNG key, shape (): for tracing the model and one trial start, as in NumPyro's `MCMC.run`.
        init_strategy: A NumPyro initialisation strategy (`init_to_median`, ...); None: `init_to_uniform`.
        **kwargs: The model's keyword arguments.

    Returns:
        A target whose positions are dicts of unconstrained arrays by latent site. `initial(key)` searches a start and
        may be vmapped (but finds no fault then); `constrain` gives latent and deterministic sites of one position.

    Raises:
        TypeError: If `model` or `init_strategy` is no function, or the key no key.
        ValueError: If the model has a latent site that is a Delta, or discrete with values that cannot be listed, a site
            name twice, a subsampling plate, a Python branch on a latent value, or observations that are NaN or outside the
            support.
        ModuleNotFoundError: If a discrete site is to be summed out and funsor is not installed.
        InvalidStart: If no start with finite log density and gradient is found.
        Exception: Whatever the model itself raises, with a note on the last site it reached.

    Warns:
        UserWarning: For a `numpyro.param` site on which the density depends, and NumPyro's own remarks on missing plates.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from partime_mcmc import from_numpyro
        >>> def model():
        ...     numpyro.sample("scale", dist.HalfNormal(1))
        >>> target = from_numpyro(model, key=jax.random.key(0))
        >>> position = target.start(jax.random.key(1))
        >>> bool(target.constrain(position)["scale"] > 0)
        True
    """
    check_outside_transforms("from_numpyro", args=args, key=key, **kwargs)
    posterior = Posterior(model, args, kwargs, key, init_strategy)
    posterior.check_found(posterior.search(posterior.key)[1])
    return posterior.target


class Posterior:
    """A NumPyro model with its data, traced and checked; no start is searched yet.

    Args:
        model: A NumPyro model.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        key: PRNG key, shape (), for tracing.
        init_strategy: As for `from_numpyro`.
        forward_mode_differentiation: As NumPyro's kernels have it.

    Attributes:
        target: The target.
        search: A start and whether it is a good one, by key; NumPyro's own search, compiled.
        shapes: Shape and type of every latent site's unconstrained value.

    Raises:
        TypeError, ValueError, Exception: As `from_numpyro`.
    """

    def __init__(
        self,
        model: Callable,
        args: tuple,
        kwargs: dict,
        key: Key,
        init_strategy: Callable | None = None,
        forward_mode_differentiation: bool = False,
    ):
        if not callable(model):
            raise TypeError(
                f"model: got {model!r} of type {type(model).__name__}; wanted a NumPyro model (a function)"
            )
        self.strategy = init_to_uniform if init_strategy is None else init_strategy
        if not callable(self.strategy):
            raise TypeError(
                f"init_strategy: got {self.strategy!r}; wanted a NumPyro initialisation strategy, or None"
            )
        self.key, self.forward_mode_differentiation = check_key(key), forward_mode_differentiation
        self.run = WithData(model, args, kwargs)
        self._refusal: ValueError | None = None
        looking = self.strategy if self.radius is None else anywhere
        found, unsampled = unsuspicious_sites(self.run, self.key, looking), list
        checks = parameters_unchecked
        if found is None:
            found, unsampled = self._looked_at_closely()
            checks = contextlib.nullcontext
        # Keys that a model draws for itself are part of the density: one key, once and for all.
        prepared = seed(self.run, self.key) if "prng_key" in found.kinds else self.run
        has_discrete = found.discrete is not None
        if has_discrete:
            prepared = _enumerated(prepared, found)
        self.shapes = dict(found.shapes)
        is_empty = not any(one.size for one in self.shapes.values())
        if is_empty:
            self.shapes[_OWN_COORDINATE] = jax.ShapeDtypeStruct((), jnp.result_type(float))
        self.search = jax.jit(self._search, compiler_options=compiler_options())
        # With options a program cannot be part of another.
        inside = jax.jit(self._search)

        def logdensity(position: PyTree) -> Array:
            position, own = _without_own_coordinate(position)
            with checks():
                energy = potential_energy(prepared, (), {}, position, enum=has_discrete)
            return -jnp.asarray(energy) - own**2 / 2 if is_empty else -jnp.asarray(energy)

        def initial(key: Key) -> PyTree:
            return inside(key)[0]

        def shapes() -> PyTree:
            wide = jnp.result_type(float)
            return {
                name: jax.ShapeDtypeStruct(one.shape, wide) for name, one in self.shapes.items()
            }

        def constrain(position: PyTree) -> dict[str, Array]:
            position, _ = _without_own_coordinate(position)
            with checks():
                return constrain_fn(prepared, (), {}, position, return_deterministic=True)

        # To trace NumPyro's search takes a tenth of a second.
        initial.shapes_of_starts = shapes
        # With other data these are the same functions of other arrays.
        origin = self.run.model, has_discrete, is_empty
        logdensity.origin, constrain.origin = ("density", *origin), ("constrain", *origin)
        _check_traceable(lambda position: -logdensity(position), self.shapes)
        if params := unsampled():
            warnings.warn(
                f"numpyro.param sites {params} are not sampled: they stay at their initial values",
                stacklevel=3,
            )
        density = forward_only(logdensity) if forward_mode_differentiation else logdensity
        # Locations and scales that hang on a discrete value are several.
        centring = None if has_discrete or is_empty else find_centring(prepared, self.shapes)
        self.target = Target(density, initial, constrain, found.reported, found.dims, centring)

    def _looked_at_closely(self) -> tuple[Sites, Callable[[], list[str]]]:
        """What is known of the sites, and a function that lists parameters which matter and are not sampled.

        Raises:
            ValueError, Exception: As `from_numpyro`.
        """
        sites, bare = self._first_trace(), self.run
        found = checked_sites(sites)
        fixed = {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] in ("param", "mutable")
        }
        if fixed:
            self.run = WithData(substitute(bare.model, data=fixed), bare.args, bare.kwargs)
        if found.discrete is None:
            check_observed_sites(self.run, self.key, sites)
        return found, functools.partial(_params_that_matter, bare, sites, self.key)

    def _first_trace(self) -> dict:
        """All sites at a start. Where NumPyro refuses a law's parameters, a later start may have better ones: then unchecked."""
        try:
            return traced(self.run, self.key, self.strategy)
        except ValueError as error:
            if self.run.nonfinite_arguments():
                raise
            try:
                with numpyro.validation_enabled(False), warnings.catch_warnings(action="ignore"):
                    sites = traced(self.run, self.key, self.strategy)
            except Exception:  # what is wrong is something else
                raise error from None
            self._refusal = error
            return sites

    @property
    def radius(self) -> float | None:
        """r, where starts are uniform on (-r, r) in every coordinate; None under another strategy."""
        strategy, options = self.strategy, {}
        if isinstance(strategy, functools.partial) and not strategy.args:
            strategy, options = strategy.func, strategy.keywords
        if strategy is not init_to_uniform or options.keys() - {"radius"}:
            return None
        return options.get("radius", 2)

    def _search(self, key: Key) -> tuple[PyTree, Array]:
        # NumPyro's remarks on the model were made once, when it was traced.
        with warnings.catch_warnings(action="ignore"):
            try:
                found = self._found(key)
            except ValueError:
                # NumPyro refuses a start that is known beforehand (`init_to_value`); here it is no good start.
                with numpyro.validation_enabled(False):
                    found = self._found(key)
        leaves = jax.tree.leaves((found.potential_energy, found.z_grad))
        good = jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()
        start = {name: jnp.asarray(leaf, jnp.result_type(float)) for name, leaf in found.z.items()}
        if _OWN_COORDINATE in self.shapes:
            start[_OWN_COORDINATE] = jax.random.normal(key)
        return start, good

    def _found(self, key: Key) -> ParamInfo:
        return initialize_model(
            key,
            self.run,
            init_strategy=self.strategy,
            forward_mode_differentiation=self.forward_mode_differentiation,
        ).param_info

    def check_found(self, good: AnyArray) -> None:
        """Raise unless all starts are good.

        Raises:
            InvalidStart: Saying which arguments or sites look bad.
        """
        if np.asarray(good).all():
            return
        causes = self.run.nonfinite_arguments()
        with warnings.catch_warnings(action="ignore"):
            for name, site in self._first_trace().items():
                if site["type"] == "sample" and (cause := _cause(site)):
                    causes.append(f"site {name!r} {cause}")
        if self._refusal is not None:
            causes.append(str(self._refusal).rstrip("."))
        seen = f"Seen: {'; '.join(causes)}." if causes else ""
        raise InvalidStart(
            "model: got no start with a finite log density and gradient in 100 tries; wanted one. "
            + (seen or "Try another init_strategy, or tighter priors.")
        )


# The coordinate of a model that has none.
_OWN_COORDINATE = "a coordinate of its own"


def _without_own_coordinate(position: dict[str, Array]) -> tuple[dict[str, Array], Array | float]:
    sites = {name: leaf for name, leaf in position.items() if name != _OWN_COORDINATE}
    return sites, position.get(_OWN_COORDINATE, 0.0)


def _cause(site: dict) -> str | None:
    """What is wrong with the value of a site at a start."""
    value, law = site["value"], site["fn"]
    if not site["is_observed"] and not np.asarray(law.support(value)).all():
        return f"starts at {np.asarray(value)}, which is not in its support {law.support}"
    values = np.asarray(law.log_prob(value))
    bad = values[~np.isfinite(values)]
    return f"has log probability {bad[0]} at a random start" if bad.size else None


def _enumerated(model: Callable, sites: Sites) -> Callable:
    """The model with its discrete latent sites summed out, each in a dimension of its own to the left of all plates."""
    try:
        from numpyro.contrib.funsor import config_enumerate, enum
    except ImportError as error:
        raise ModuleNotFoundError(
            f"site {sites.discrete!r}: got a discrete latent variable, which is summed out by funsor; install "
            "partime_mcmc[funsor], or sum it out yourself, e.g. with MixtureSameFamily",
            name="funsor",
        ) from error
    return enum(config_enumerate(model), -sites.nesting - 1)


def _params_that_matter(bare: WithData, sites: dict, key: Key) -> list[str]:
    """The `numpyro.param` sites, and their leaves, on which the density depends.

    Those of modules whose parameters all have priors (`random_flax_module`) are there, and looked at by nobody.
    """
    params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
    if not params:
        return []
    others = {name: site["value"] for name, site in latent(sites).items()}
    others |= {name: one["value"] for name, one in sites.items() if one["type"] == "mutable"}
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)

    def log_densities(*values):
        data = jax.tree.unflatten(structure, values) | others
        run = seed(WithData(substitute(bare.model, data=data), bare.args, bare.kwargs), key)
        found = trace(run).get_trace().values()
        return [one["fn"].log_prob(one["value"]) for one in found if one["type"] == "sample"]

    arrays = [jnp.asarray(leaf) for _, leaf in leaves]
    jaxpr = jax.make_jaxpr(log_densities)(*arrays).jaxpr
    # As JAX leaves out what nothing depends on.
    _, used = dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
    paths = [path for (path, _), is_used in zip(leaves, used) if is_used]
    return sorted({f"{path[0].key}{jax.tree_util.keystr(path[1:])}" for path in paths})


def forward_only(logdensity: Callable[[PyTree], Array]) -> Callable[[PyTree], Array]:
    """A log density whose gradient is always taken in forward mode, also where reverse mode is asked for.

    A `lax.while_loop` in a model has no reverse mode. The derivative is linear in the tangent whatever is inside, so that
    everything else goes on as ever, at the cost of D evaluations per gradient.

    Args:
        logdensity: `position -> scalar`.
    """

    def density(position):
        # Captured data become arguments: what a derivative of its own captures is in no text of a program, and would be kept with it.
        traced, (captured, _) = explicit(logdensity, position)
        return _forward_only(traced, captured, position)

    if (origin := origin_of(logdensity)) is not None:
        density.origin = "in forward mode", origin
    return density


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _forward_only(traced: Explicit, captured: list, position: PyTree) -> Array:
    return traced((captured, position))


@_forward_only.defjvp
def _(traced, primals, tangents):
    (captured, position), (_, tangent) = primals, tangents
    flat, unravel = ravel_pytree(position)
    slope = jax.jacfwd(lambda x: traced((captured, unravel(x))))(flat)
    return traced((captured, position)), jnp.vdot(slope, ravel_pytree(tangent)[0])


def _check_traceable(potential: Callable, position: dict) -> None:
    try:
        jax.eval_shape(potential, position)
    except jax.errors.JAXTypeError as cause:
        culprits, fixed = (
            [],
            {name: np.ones(one.shape, one.dtype) for name, one in position.items()},
        )
        for name, value in fixed.items():
            try:
                # vmap, not jit: under jit the values that are not traced would be staged too, and every site look guilty
                jax.vmap(lambda x, name=name: potential({**fixed, name: x}))(value[None])
            except jax.errors.JAXTypeError:
                culprits.append(name)
        raise ValueError(
            f"site {', '.join(map(repr, culprits or position))}: got Python control flow, or a NumPy function, on a latent "
            "value; wanted operations that JAX can trace (jnp.where, jax.lax.cond, jax.numpy)"
        ) from cause
