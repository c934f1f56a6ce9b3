"""A NumPyro model as a `Target`.

NumPyro maps every latent site z to unconstrained x by the bijection b of its support, z = b(x), and

    logdensity(x) = log p(b(x), data) + log |det b'(x)|,      constrain(x) = {latent and deterministic sites at b(x)}.

Starts are NumPyro's own: `init_strategy`, by default uniform on (-2, 2) in x, up to 100 tries for a finite log density
and gradient. NumPy data stay NumPy, in the dtypes of the precision that is on while the model runs.

Left out: discrete latent sites (sum them out, e.g. with `MixtureSameFamily`), subsampling plates (the density would be
random, and NumPyro's fixes one subsample in silence), and fitting `numpyro.param` (held at its initial value).
"""

import inspect
import warnings
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import initialize_model
from numpyro.primitives import Messenger

from partime_mcmc.diagnostics.checks import InvalidStart, check_key
from partime_mcmc.mcmc.sites import plate_dims, reported
from partime_mcmc.mcmc.target import Target
from partime_mcmc.types import Array, Key, PyTree


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
    if not callable(model):
        raise TypeError(f"model: got {model!r} of type {type(model).__name__}; wanted a NumPyro model (a function)")
    strategy = init_to_uniform if init_strategy is None else init_strategy
    if not callable(strategy):
        raise TypeError(f"init_strategy: got {strategy!r}; wanted a NumPyro initialisation strategy, or None")
    key = check_key(key)
    run = _WithData(model, args, kwargs)
    sites = _trace(run, key, strategy)
    _check_latent_sites(sites)
    fixed = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
    if fixed:
        warnings.warn(
            f"numpyro.param sites {sorted(fixed)} are not sampled: they stay at their initial values", stacklevel=2
        )
        run = _WithData(substitute(model, data=fixed), args, kwargs)
    _check_observed_sites(run, key, strategy, sites)
    found = _initialize(run, key, strategy)
    _check_traceable(found.potential_fn, found.param_info.z)
    potential, postprocess = found.potential_fn, found.postprocess_fn

    def logdensity(position: PyTree) -> Array:
        return -potential(position)

    def initial(key: Key) -> PyTree:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # NumPyro's remarks on the model were made once, above
            return _initialize(run, key, strategy).param_info.z

    def constrain(position: PyTree) -> dict[str, Array]:
        return postprocess(position)

    names = reported(sites)
    return Target(logdensity, initial, constrain, names, plate_dims(sites, names))


# --- running the model -----------------------------------------------------------------------------------------------


class _WithData:
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
            arguments = dict(inspect.signature(self.model).bind(*self.args, **self.kwargs).arguments)
        except (TypeError, ValueError):  # no such signature: the model itself says so when it runs
            arguments = {**{f"args[{index}]": value for index, value in enumerate(self.args)}, **self.kwargs}
        found = []
        for path, leaf in jax.tree_util.tree_flatten_with_path(arguments)[0]:
            if isinstance(leaf, np.ndarray | jax.Array) and np.issubdtype(leaf.dtype, np.floating):
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


def _trace(run: _WithData, key: Key, strategy: Callable) -> dict:
    """All sites of one run, latent values from `strategy`; what the model raises gets a note with the last site."""
    recorder = _SiteNames(substitute(seed(run, key), substitute_fn=strategy))
    try:
        return trace(recorder).get_trace()
    except Exception as error:
        twice = sorted({name for name in recorder.names if recorder.names.count(name) > 1})
        if isinstance(error, AssertionError) and twice:
            raise ValueError(f"site {twice[0]!r}: got two sites of this name; wanted unique names") from error
        last = f"after site {recorder.names[-1]!r}" if recorder.names else "before its first site"
        if isinstance(error, ValueError) and (causes := run.nonfinite_arguments()):
            # NumPyro checks the parameters of distributions, but names neither the site nor the data
            raise ValueError(f"{'; '.join(causes)}; wanted finite data. The model failed {last}: {error}") from error
        error.add_note(f"The NumPyro model failed {last}.")
        raise


def _initialize(run: _WithData, key: Key, strategy: Callable):
    """`numpyro.infer.util.initialize_model`, its failure named."""
    try:
        return initialize_model(key, run, init_strategy=strategy)
    except RuntimeError as error:
        if "valid initial parameters" not in str(error):
            raise
        raise InvalidStart(
            "model: got no start with a finite log density and gradient in 100 tries; wanted one."
            + _diagnosis(run, key, strategy)
        ) from error


def _diagnosis(run: _WithData, key: Key, strategy: Callable) -> str:
    """Which arguments hold non-finite numbers, and which sites have a non-finite log probability at a random start."""
    causes = run.nonfinite_arguments()
    for name, site in _trace(run, key, strategy).items():
        if site["type"] == "sample":
            values = np.asarray(site["fn"].log_prob(site["value"]))
            if not np.isfinite(values).all():
                worst = values[~np.isfinite(values)].ravel()[0]
                causes.append(f"site {name!r} has log probability {worst} at a random start")
    return " Seen: " + "; ".join(causes) + "." if causes else " Try another init_strategy, or tighter priors."


# --- what a model may hold -------------------------------------------------------------------------------------------


def _check_latent_sites(sites: dict) -> None:
    latent = {
        name: site["fn"] for name, site in sites.items() if site["type"] == "sample" and not site["is_observed"]
    }
    for name, site in sites.items():
        if site["type"] == "plate" and site["args"][0] != len(site["value"]):
            size, subsample = site["args"][0], len(site["value"])
            raise ValueError(f"plate {name!r}: got a subsample of {subsample} out of {size}; wanted all of the data")
    for name, distribution in latent.items():
        kind = type(_base(distribution)).__name__
        if distribution.support.is_discrete:
            raise ValueError(
                f"site {name!r}: got a discrete latent variable ({kind}); wanted continuous ones. Sum it out, e.g. "
                "with MixtureSameFamily, or observe it"
            )
        if isinstance(_base(distribution), dist.Delta):
            raise ValueError(
                f"site {name!r}: got a latent variable with a Delta distribution; wanted a density. Report the value "
                "with numpyro.deterministic instead"
            )
    if not latent:
        raise ValueError(f"model: got no latent sites (its sites: {sorted(sites) or 'none'}); wanted at least one")


def _check_observed_sites(run: _WithData, key: Key, strategy: Callable, sites: dict) -> None:
    """NaN observations, and observations outside a support that does not hang on latent values."""
    for name in _fixed_supports(run, key, strategy):
        site = sites[name]
        distribution, value = site["fn"], np.asarray(site["value"])
        if isinstance(distribution, dist.MaskedDistribution | dist.Unit) or value.dtype == object:
            continue
        missing = np.isnan(value) if np.issubdtype(value.dtype, np.floating) else np.zeros(value.shape, bool)
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


def _fixed_supports(run: _WithData, key: Key, strategy: Callable) -> list[str]:
    """Observed sites whose values and support stay concrete when the latent values are traced."""
    names = []

    def look(key):
        for name, site in _trace(run, key, strategy).items():
            if site["type"] == "sample" and site["is_observed"]:
                parts = jax.tree.leaves((site["value"], site["fn"].support))
                if not any(isinstance(part, jax.core.Tracer) for part in parts):
                    names.append(name)

    try:
        jax.vmap(look)(key[None])  # vmap, not jit: only what hangs on the key is traced, data stay concrete
    except jax.errors.JAXTypeError:  # a Python branch on a latent value: `_check_traceable` says it better
        return []
    return names


def _check_traceable(potential: Callable, position: dict) -> None:
    try:
        jax.eval_shape(potential, position)
        return
    except jax.errors.JAXTypeError as error:
        cause = error
    culprits = []
    for name, value in position.items():
        try:
            # vmap, not jit: under jit the values that are not traced would be staged too, and every site look guilty
            jax.vmap(lambda x, name=name: potential({**position, name: x}))(value[None])
        except jax.errors.JAXTypeError:
            culprits.append(name)
    raise ValueError(
        f"site {', '.join(map(repr, culprits or position))}: got Python control flow, or a NumPy function, on a latent "
        "value; wanted operations that JAX can trace (jnp.where, jax.lax.cond, jax.numpy)"
    ) from cause


def _base(distribution: dist.Distribution) -> dist.Distribution:
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        distribution = distribution.base_dist
    return distribution


def _first(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(int(index) for index in np.argwhere(flags)[0])
