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

import dataclasses
import functools
import inspect
import warnings
from typing import Any, Callable, Self

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax.extend.core import Literal
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.initialization import init_to_uniform
from numpyro.infer.util import ParamInfo, constrain_fn, initialize_model, potential_energy
from numpyro.primitives import Messenger
from numpyro.util import _validate_model

from partime_mcmc.compile_cache import compiler_options
from partime_mcmc.numpyro.centring import find_centring
from partime_mcmc.sampling.target import Target
from partime_mcmc.types import AnyArray, Array, Key, PyTree, jax_config
from partime_mcmc.validation import InvalidStart, check_key, check_outside_transforms


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

    def start(site):
        if site["type"] == "sample" and not site["is_observed"] and _support(site["fn"]) is None:
            raise ValueError(
                f"site {site['name']!r}: got a latent variable whose distribution ({type(_base(site['fn'])).__name__}) has no "
                "support; wanted one, such as constraints.real"
            )
        return strategy(site)

    recorder = _SiteNames(substitute(seed(run, key), substitute_fn=start))
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
        sites = self._first_trace()
        _check_latent_sites(sites)
        latent = {name: site for name, site in _latent(sites).items() if not _is_discrete(site)}
        has_discrete = len(latent) < len(_latent(sites))
        _validate_model(sites, plate_warning="error" if has_discrete else "loose")
        fixed = {
            name: site["value"]
            for name, site in sites.items()
            if site["type"] in ("param", "mutable")
        }
        if fixed:
            self.run = WithData(substitute(model, data=fixed), args, kwargs)
        if not has_discrete:
            _check_observed_sites(self.run, self.key, sites)
        # Keys that a model draws for itself are part of the density: one key, once and for all.
        kinds = {site["type"] for site in sites.values()}
        prepared = seed(self.run, self.key) if "prng_key" in kinds else self.run
        if has_discrete:
            prepared = _enumerated(prepared, sites)
        names = tuple(
            name
            for name, site in sites.items()
            if name in latent or site["type"] == "deterministic"
        )
        # Computed without running anything. Starts are as wide as floats are, whatever the parameters of their laws.
        self.shapes = {
            name: jax.ShapeDtypeStruct(
                jax.eval_shape(biject_to(site["fn"].support).inv, site["value"]).shape,
                jnp.result_type(float),
            )
            for name, site in latent.items()
        }
        is_empty = not any(one.size for one in self.shapes.values())
        if is_empty:
            self.shapes[_OWN_COORDINATE] = jax.ShapeDtypeStruct((), jnp.result_type(float))
        self.search = jax.jit(self._search, compiler_options=compiler_options())
        # With options a program cannot be part of another.
        inside = jax.jit(self._search)

        def logdensity(position: PyTree) -> Array:
            position, own = _without_own_coordinate(position)
            energy = potential_energy(prepared, (), {}, position, enum=has_discrete)
            return -jnp.asarray(energy) - own**2 / 2 if is_empty else -jnp.asarray(energy)

        def initial(key: Key) -> PyTree:
            return inside(key)[0]

        def constrain(position: PyTree) -> dict[str, Array]:
            position, _ = _without_own_coordinate(position)
            return constrain_fn(prepared, (), {}, position, return_deterministic=True)

        _check_traceable(lambda position: -logdensity(position), self.shapes)
        if unsampled := _params_that_matter(model, args, kwargs, sites, self.key):
            warnings.warn(
                f"numpyro.param sites {unsampled} are not sampled: they stay at their initial values",
                stacklevel=3,
            )
        density = forward_only(logdensity) if forward_mode_differentiation else logdensity
        # Locations and scales that hang on a discrete value are several.
        centring = None if has_discrete or is_empty else find_centring(prepared, self.shapes)
        self.target = Target(
            density, initial, constrain, names, _plate_dims(sites, names), centring
        )

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


def _enumerated(model: Callable, sites: dict) -> Callable:
    """The model with its discrete latent sites summed out, each in a dimension of its own to the left of all plates."""
    try:
        from numpyro.contrib.funsor import config_enumerate, enum
    except ImportError as error:
        name = next(name for name, site in _latent(sites).items() if _is_discrete(site))
        raise ModuleNotFoundError(
            f"site {name!r}: got a discrete latent variable, which is summed out by funsor; install "
            "partime_mcmc[funsor], or sum it out yourself, e.g. with MixtureSameFamily",
            name="funsor",
        ) from error
    plates = [frame for site in sites.values() for frame in site.get("cond_indep_stack", ())]
    nesting = max((-frame.dim for frame in plates), default=0)
    return enum(config_enumerate(model), -nesting - 1)


def _params_that_matter(
    model: Callable, args: tuple, kwargs: dict, sites: dict, key: Key
) -> list[str]:
    """The `numpyro.param` sites, and their leaves, on which the density depends.

    Those of modules whose parameters all have priors (`random_flax_module`) are there, and looked at by nobody.
    """
    params = {name: site["value"] for name, site in sites.items() if site["type"] == "param"}
    if not params:
        return []
    others = {name: site["value"] for name, site in _latent(sites).items()}
    others |= {name: one["value"] for name, one in sites.items() if one["type"] == "mutable"}
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)

    def log_densities(*values):
        data = jax.tree.unflatten(structure, values) | others
        run = seed(WithData(substitute(model, data=data), args, kwargs), key)
        found = trace(run).get_trace().values()
        return [one["fn"].log_prob(one["value"]) for one in found if one["type"] == "sample"]

    arrays = [jnp.asarray(leaf) for _, leaf in leaves]
    jaxpr = jax.make_jaxpr(log_densities)(*arrays).jaxpr
    needed = {atom for atom in jaxpr.outvars if not isinstance(atom, Literal)}
    for equation in reversed(jaxpr.eqns):
        if needed.intersection(equation.outvars):
            needed.update(atom for atom in equation.invars if not isinstance(atom, Literal))
    used = [path for (path, _), given in zip(leaves, jaxpr.invars) if given in needed]
    return sorted({f"{path[0].key}{jax.tree_util.keystr(path[1:])}" for path in used})


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


def _is_discrete(site: dict) -> bool:
    return site["fn"].support.is_discrete


def _check_latent_sites(sites: dict) -> None:
    for name, site in sites.items():
        if site["type"] == "plate" and site["args"][0] != len(site["value"]):
            raise ValueError(
                f"plate {name!r}: got a subsample of {len(site['value'])} out of {site['args'][0]}; wanted all of the data: "
                "leave subsample_size out"
            )
    for name, site in _latent(sites).items():
        law = type(_base(site["fn"])).__name__
        if _is_discrete(site):
            how = site["infer"].get("enumerate", "parallel")
            if not site["fn"].has_enumerate_support or how != "parallel":
                raise ValueError(
                    f"site {name!r}: got a discrete latent variable ({law}, enumerate={how!r}); wanted a continuous one, or "
                    "one of finitely many values with enumerate='parallel', which is summed out. Sum it out yourself, or "
                    "observe it"
                )
            if "enumerate" not in site["infer"]:
                warnings.warn(
                    f"site {name!r}: summed out, since it is discrete; NumPyro means to ask that enumerated sites be marked "
                    "with infer={'enumerate': 'parallel'}",
                    FutureWarning,
                    stacklevel=2,
                )
        if isinstance(_base(site["fn"]), dist.Delta):
            raise ValueError(
                f"site {name!r}: got a latent variable with a Delta distribution; wanted a density. Report the value "
                "with numpyro.deterministic instead"
            )


def _support(distribution: dist.Distribution) -> Any:
    """The support; None if the distribution does not say, as laws that users write for observations need not."""
    try:
        support = distribution.support
        return None if constraints.is_dependent(support) else support
    except NotImplementedError:
        return None


def _check_observed_sites(run: WithData, key: Key, sites: dict) -> None:
    """NaN observations, and observations outside a support that does not hang on latent values."""
    for name in _fixed_supports(run, key):
        site = sites[name]
        distribution = site["fn"]
        leaves = jax.tree.leaves(site["value"])
        if isinstance(distribution, dist.Unit) or len(leaves) != 1:
            continue
        value = np.asarray(leaves[0])
        if value.dtype == object:
            continue
        # Only a float differs from itself.
        missing = np.asarray(value != value)
        if _is_masked(distribution):
            # What is masked is nobody's business; the rest has a density.
            with warnings.catch_warnings(action="ignore"):
                finite = np.isfinite(np.asarray(distribution.log_prob(site["value"])))
            missing &= not finite.all()
        if missing.any():
            raise ValueError(
                f"site {name!r}: got {missing.sum()} NaN among its {value.size} observed values (the first at index "
                f"{_first(missing)}); wanted numbers. Leave missing values out, or mask them"
            )
        support = _support(distribution)
        if support is None or _is_masked(distribution):
            continue
        outside = ~np.asarray(support(site["value"]))
        if outside.any():
            seen = value.reshape(outside.shape + (-1,))[_first(outside)]
            raise ValueError(
                f"site {name!r}: got {outside.sum()} observed value(s) outside the support of "
                f"{type(_base(distribution)).__name__}, the first {seen.squeeze()} at index {_first(outside)}; wanted "
                f"values in {support}"
            )


def _is_masked(distribution: dist.Distribution) -> bool:
    """Whether some values of a distribution may be left out, under whatever wraps it."""
    while isinstance(distribution, dist.Independent | dist.ExpandedDistribution):
        distribution = distribution.base_dist
    return isinstance(distribution, dist.MaskedDistribution)


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
                jax.tree.leaves((it["value"], _support(it["fn"]))) for it in (site, second[name])
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
