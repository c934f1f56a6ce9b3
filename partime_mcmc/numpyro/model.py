"""A NumPyro model as a `Target`.

NumPyro maps every latent site z to unconstrained x by the bijection b of its support, z = b(x), and

    logdensity(x) = log p(b(x), data) + log |det b'(x)|,      constrain(x) = {latent and deterministic sites at b(x)}.

Starts are NumPyro's own: `init_strategy`, by default uniform on (-2, 2) in x, up to 100 tries for a finite log density
and gradient. NumPy data stay NumPy, in the dtypes of the precision that is on while the model runs.

Left out: discrete latent sites (sum them out, e.g. with `MixtureSameFamily`), subsampling plates (the density would be
random, and NumPyro's fixes one subsample in silence), and fitting `numpyro.param` (held at its initial value).
"""

import dataclasses
import functools
import inspect
import warnings
from typing import Any, Callable, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import constrain_fn, initialize_model, potential_energy
from numpyro.primitives import Messenger

from partime_mcmc.compile_cache import compiler_options
from partime_mcmc.numpyro.centring import find_centring
from partime_mcmc.sampling.target import Target
from partime_mcmc.types import AnyArray, Array, Key, PyTree, jax_config
from partime_mcmc.validation import InvalidStart, check_key


@dataclasses.dataclass(frozen=True)
class Data:
    """The arguments of a model as they are at one time; equal to the same objects with the same contents.

    Attributes:
        structure: Of all arguments.
        ids: Of the objects.
        contents: Type, shape and bytes of arrays that can be changed in place, so that NaN equals itself; None for other
            leaves.
        in_float64: Whether they are seen in 64 bits.
        kept: The objects and copies of their entries, so that nothing else gets their ids.
    """

    structure: Any
    ids: tuple[int, ...]
    contents: tuple[tuple | None, ...]
    in_float64: bool
    kept: tuple = dataclasses.field(compare=False, repr=False)

    @classmethod
    def of(cls, args: tuple, kwargs: dict) -> Self:
        """The arguments as they are now."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        arrays = [np.array(leaf, copy=True) if _can_change(leaf) else None for leaf in leaves]
        return cls(
            structure,
            tuple(map(id, leaves)),
            tuple(one if one is None else (one.dtype, one.shape, one.tobytes()) for one in arrays),
            jax_config.jax_enable_x64,
            (leaves, [one for one in arrays if one is not None and one.dtype == object]),
        )


def _can_change(leaf: Any) -> bool:
    """NumPy arrays, and what hands one out (a data frame's column); JAX's arrays and scalars stay what they are."""
    return hasattr(leaf, "__array__") and not isinstance(leaf, (jax.Array, np.generic))


class WithData:
    """A model bound to its data: a model without arguments.

    NumPy arrays are handed over as NumPy arrays, so that a model may still branch and index on its data, but as a copy
    for each precision: JAX remembers captured NumPy arrays by identity, and one array used with x64 on and off comes
    back in the dtype of the other mode.
    """

    def __init__(self, model: Callable, args: tuple, kwargs: dict):
        self.model, self.args, self.kwargs = model, args, kwargs
        self._data: dict = {}

    def __call__(self):
        precision = jnp.result_type(float)
        if precision not in self._data:  # one copy each, so that traces capture the same arrays
            self._data[precision] = jax.tree.map(_in_jax_dtype, (self.args, self.kwargs))
        args, kwargs = self._data[precision]
        return _JaxObservations(self.model)(*args, **kwargs)

    def nonfinite_arguments(self) -> list[str]:
        """What is NaN or infinite among the data, by the model's own parameter names."""
        try:
            arguments = dict(
                inspect.signature(self.model).bind(*self.args, **self.kwargs).arguments
            )
        except (TypeError, ValueError):  # no such signature: the model itself says so when it runs
            arguments = {
                **{f"args[{index}]": value for index, value in enumerate(self.args)},
                **self.kwargs,
            }
        found = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]:
            if not (
                isinstance(leaf, np.ndarray | jax.Array) and np.issubdtype(leaf.dtype, np.floating)
            ):
                continue
            if count := int(np.sum(~np.isfinite(np.asarray(leaf)))):
                where = f"{path[0].key!r}{jax.tree_util.keystr(path[1:])}"
                found.append(f"argument {where} has {count} NaN or infinite of {leaf.size} entries")
        return found


def _in_jax_dtype(leaf: Any) -> Any:
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "iufc":
        return leaf.astype(jax.dtypes.canonicalize_dtype(leaf.dtype), copy=True)
    return leaf


class _JaxObservations(Messenger):
    """Makes observed NumPy values JAX arrays: NumPyro compares the former with traced bounds of a support by NumPy."""

    def process_message(self, message):
        if message["type"] == "sample" and isinstance(message["value"], np.ndarray):
            message["value"] = jnp.asarray(message["value"])


class _SiteNames(Messenger):
    """Writes down the sites a model reaches, in order, also when it fails on the way."""

    def __init__(self, fn: Callable):
        super().__init__(fn)
        self.names: list[str] = []

    def process_message(self, message):
        if message["type"] in ("sample", "deterministic"):
            self.names.append(message["name"])


def traced(run: WithData, key: Key, strategy: Callable) -> dict:
    """All sites of one run, latent values from `strategy`; what the model raises gets a note with the last site."""
    recorder = _SiteNames(substitute(seed(run, key), substitute_fn=strategy))
    try:
        return trace(recorder).get_trace()
    except Exception as error:
        twice = sorted({name for name in recorder.names if recorder.names.count(name) > 1})
        if isinstance(error, AssertionError) and twice:
            raise ValueError(
                f"site {twice[0]!r}: got two sites of this name; wanted unique names"
            ) from error
        last = f"after site {recorder.names[-1]!r}" if recorder.names else "before its first site"
        if isinstance(error, ValueError) and (causes := run.nonfinite_arguments()):
            # NumPyro checks the parameters of distributions, but names neither the site nor the data
            raise ValueError(
                f"{'; '.join(causes)}; wanted finite data. The model failed {last}: {error}"
            ) from error
        error.add_note(f"The NumPyro model failed {last}.")
        raise


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
    recorder = _SiteNames(seed(_JaxObservations(model), key))
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
        ValueError: If the model has no latent site, or a latent site that is discrete or a Delta, a site name twice, a
            subsampling plate, a Python branch on a latent value, or observations that are NaN or outside the support.
        InvalidStart: If no start with finite log density and gradient is found.
        Exception: Whatever the model itself raises, with a note on the last site it reached.

    Warns:
        UserWarning: For a `numpyro.param` site.
    """
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
        sites = traced(self.run, self.key, self.strategy)
        _check_latent_sites(sites)
        fixed = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
        if fixed:
            warnings.warn(
                f"numpyro.param sites {sorted(fixed)} are not sampled: they stay at their initial values",
                stacklevel=3,
            )
            self.run = WithData(substitute(model, data=fixed), args, kwargs)
        _check_observed_sites(self.run, self.key, sites)
        self.search = jax.jit(self._search, compiler_options=compiler_options())
        # With options a program cannot be part of another.
        inside = jax.jit(self._search)
        # Keys that a model draws for itself are part of the density: one key, once and for all.
        kinds = {site["type"] for site in sites.values()}
        prepared = seed(self.run, self.key) if "prng_key" in kinds else self.run
        latent = _latent(sites)
        names = tuple(
            name
            for name, site in sites.items()
            if name in latent or site["type"] == "deterministic"
        )

        def logdensity(position: PyTree) -> Array:
            return -jnp.asarray(potential_energy(prepared, (), {}, position))

        def initial(key: Key) -> PyTree:
            return inside(key)[0]

        def constrain(position: PyTree) -> dict[str, Array]:
            return constrain_fn(prepared, (), {}, position, return_deterministic=True)

        # Computed without running anything.
        self.shapes = {
            name: jax.eval_shape(
                lambda value, site=site: biject_to(site["fn"].support).inv(value), site["value"]
            )
            for name, site in latent.items()
        }
        _check_traceable(lambda position: -logdensity(position), self.shapes)
        density = forward_only(logdensity) if forward_mode_differentiation else logdensity
        centring = find_centring(prepared, self.shapes)
        self.target = Target(
            density, initial, constrain, names, _plate_dims(sites, names), centring
        )

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
            found = initialize_model(
                key,
                self.run,
                init_strategy=self.strategy,
                forward_mode_differentiation=self.forward_mode_differentiation,
            ).param_info
        leaves = jax.tree.leaves((found.potential_energy, found.z_grad))
        return found.z, jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()

    def check_found(self, good: AnyArray) -> None:
        """Raise unless all starts are good.

        Raises:
            InvalidStart: Saying which arguments or sites look bad.
        """
        if np.asarray(good).all():
            return
        causes = self.run.nonfinite_arguments()
        for name, site in traced(self.run, self.key, self.strategy).items():
            if site["type"] == "sample":
                values = np.asarray(site["fn"].log_prob(site["value"]))
                bad = values[~np.isfinite(values)]
                if bad.size:
                    causes.append(f"site {name!r} has log probability {bad[0]} at a random start")
        seen = f"Seen: {'; '.join(causes)}." if causes else ""
        raise InvalidStart(
            "model: got no start with a finite log density and gradient in 100 tries; wanted one. "
            + (seen or "Try another init_strategy, or tighter priors.")
        )


def forward_only(logdensity: Callable[[PyTree], Array]) -> Callable[[PyTree], Array]:
    """A log density whose gradient is always taken in forward mode, also where reverse mode is asked for.

    A `lax.while_loop` in a model has no reverse mode. The derivative is linear in the tangent whatever is inside, so that
    everything else goes on as ever, at the cost of D evaluations per gradient.

    Args:
        logdensity: `position -> scalar`.
    """
    density = jax.custom_jvp(lambda position: logdensity(position))

    @density.defjvp
    def _(primals, tangents):
        flat, unravel = ravel_pytree(primals[0])
        slope = jax.jacfwd(lambda x: logdensity(unravel(x)))(flat)
        return logdensity(primals[0]), jnp.vdot(slope, ravel_pytree(tangents[0])[0])

    return density


# --- what a model may hold -------------------------------------------------------------------------------------------


def _latent(sites: dict) -> dict:
    return {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def _check_latent_sites(sites: dict) -> None:
    for name, site in sites.items():
        if site["type"] == "plate" and site["args"][0] != len(site["value"]):
            raise ValueError(
                f"plate {name!r}: got a subsample of {len(site['value'])} out of {site['args'][0]}; wanted all of the data"
            )
    latent = _latent(sites)
    for name, site in latent.items():
        base = _base(site["fn"])
        if site["fn"].support.is_discrete:
            raise ValueError(
                f"site {name!r}: got a discrete latent variable ({type(base).__name__}); wanted continuous ones. Sum it out, e.g. "
                "with MixtureSameFamily, or observe it"
            )
        if isinstance(base, dist.Delta):
            raise ValueError(
                f"site {name!r}: got a latent variable with a Delta distribution; wanted a density. Report the value "
                "with numpyro.deterministic instead"
            )
    if not latent:
        raise ValueError(
            f"model: got no latent sites (its sites: {sorted(sites) or 'none'}); wanted at least one"
        )


def _check_observed_sites(run: WithData, key: Key, sites: dict) -> None:
    """NaN observations, and observations outside a support that does not hang on latent values."""
    for name in _fixed_supports(run, key):
        site = sites[name]
        distribution, value = site["fn"], np.asarray(site["value"])
        if isinstance(distribution, dist.MaskedDistribution | dist.Unit) or value.dtype == object:
            continue
        # Only a float differs from itself.
        missing = np.asarray(value != value)
        if missing.any():
            raise ValueError(
                f"site {name!r}: got {missing.sum()} NaN among its {value.size} observed values (the first at index "
                f"{_first(missing)}); wanted numbers. Leave missing values out, or mask them"
            )
        outside = ~np.asarray(distribution.support(site["value"]))
        if outside.any():
            seen = value.reshape(outside.shape + (-1,))[_first(outside)]
            raise ValueError(
                f"site {name!r}: got {outside.sum()} observed value(s) outside the support of "
                f"{type(_base(distribution)).__name__}, the first {seen.squeeze()} at index {_first(outside)}; wanted "
                f"values in {distribution.support}"
            )


def _fixed_supports(run: WithData, key: Key) -> list[str]:
    """Observed sites whose values and support are the same whatever the latent values: looked at twice."""
    try:
        first, second = (traced(run, one, init_to_uniform) for one in jax.random.split(key))
    except Exception:  # a model that fails at random latent values: what is wrong shows elsewhere
        return []
    names = []
    for name, site in first.items():
        if site["type"] == "sample" and site["is_observed"] and name in second:
            one, other = (
                jax.tree.leaves((it["value"], it["fn"].support)) for it in (site, second[name])
            )
            if len(one) == len(other) and all(
                np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other)
            ):
                names.append(name)
    return names


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


def _base(distribution: dist.Distribution) -> dist.Distribution:
    while isinstance(
        distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution
    ):
        distribution = distribution.base_dist
    return distribution


def _first(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(int(index) for index in np.argwhere(flags)[0])


# --- what a trace says of its sites -------------------------------------------------------------------------------------


def _plate_dims(sites: dict, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Axis names, by site, for those of `names` whose axes are exactly their plates."""
    dims = {}
    for name in names:
        frames = sorted(sites[name].get("cond_indep_stack", ()), key=lambda frame: frame.dim)
        if frames and len(frames) == np.ndim(sites[name]["value"]):
            dims[name] = tuple(frame.name for frame in frames)
    return dims
