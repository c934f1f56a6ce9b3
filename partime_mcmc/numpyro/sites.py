"""A NumPyro model bound to its data, what its sites are, and whether they are such as can be sampled.

A model is run once, its latent values at a start, and NumPyro, its handlers and the checks here look at laws, values and plates:

    parameters of laws in their ranges,   observations numbers and in the support,   no site that cannot be sampled.

Run operation by operation that is some twenty small programs, compiled one after another. `unsuspicious_sites` runs all of it inside of
one program, which says whether anything looks wrong. If something does, or the model cannot be run so, it is run again with values,
and what is wrong is said by name.
"""

import contextlib
import dataclasses
import inspect
import warnings
from typing import Any, Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import biject_to, constraints
from numpyro.handlers import seed, substitute, trace
from numpyro.infer.initialization import init_to_uniform
from numpyro.primitives import Messenger
from numpyro.util import _validate_model

from partime_mcmc.compile_cache import Timings, compiler_options, run_explicit
from partime_mcmc.types import Array, Key


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
        return JaxObservations(self.model)(*args, **kwargs)

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


class JaxObservations(Messenger):
    """Makes observed NumPy values JAX arrays: NumPyro compares the former with traced bounds of a support by NumPy."""

    def process_message(self, message):
        if message["type"] == "sample" and isinstance(message["value"], np.ndarray):
            message["value"] = jnp.asarray(message["value"])


@dataclasses.dataclass(frozen=True)
class Sites:
    """What is known of a model's sites.

    Attributes:
        shapes: Shape and type of the unconstrained value of every latent site that is sampled, in order.
        reported: Those, and deterministic sites, in order.
        dims: Axis names of sites whose axes are exactly their plates.
        discrete: The first latent site that is summed out, None if there is none.
        nesting: How many plates lie within each other at most.
        kinds: Types of NumPyro's messages.
    """

    shapes: dict[str, jax.ShapeDtypeStruct]
    reported: tuple[str, ...]
    dims: dict[str, tuple[str, ...]]
    discrete: str | None
    nesting: int
    kinds: frozenset[str]


def unsuspicious_sites(run: WithData, key: Key, strategy: Callable) -> Sites | None:
    """What is known of a model's sites, if nothing is wrong with them at first sight; None if they are to be looked at closely.

    Args:
        run: The model with its data.
        key: PRNG key, shape ().
        strategy: Of NumPyro, for latent values.
    """
    known: list[Sites] = []

    def looks_wrong(nothing, key):
        sites = traced(run, key, strategy)
        known.append(checked_sites(sites))
        return jnp.stack([jnp.asarray(False), *_suspicions(sites)]).any()

    looks_wrong.origin = "sites", run.model, strategy

    try:
        with (
            warnings.catch_warnings(record=True, action="always") as remarks,
            # NumPyro would check those parameters at once that are no tracers.
            numpyro.validation_enabled(False),
        ):
            wrong = run_explicit(
                looks_wrong, None, key, timings=Timings(), options=compiler_options(0)
            )
    except Exception:  # the same fails with values, where it can be said why
        return None
    # Values of parameters and of mutable state belong to the density.
    if remarks or bool(wrong) or known[0].kinds & {"param", "mutable"}:
        return None
    return known[0]


_CHECK_OF_PARAMETERS = dist.Distribution.validate_args


@contextlib.contextmanager
def parameters_unchecked() -> Iterator[None]:
    """Without NumPyro's check of laws' parameters, for which it compiles small programs whenever a model is traced.

    For models whose parameters were looked at before. A value outside of a support has density 0 as ever.
    """
    dist.Distribution.validate_args = lambda self, strict=True: None
    try:
        yield
    finally:
        # Not what was there before: in another thread that may have been this.
        dist.Distribution.validate_args = _CHECK_OF_PARAMETERS


def anywhere(site: dict) -> Array | None:
    """A strategy, as NumPyro's, for where any start will do: every unconstrained coordinate at one tenth, nothing random."""
    if site["type"] != "sample" or site["is_observed"] or is_discrete(site):
        return None
    transform = biject_to(site["fn"].support)
    shape = site["kwargs"]["sample_shape"] + transform.inverse_shape(site["fn"].shape())
    return transform(jnp.full(shape, 0.1))


def checked_sites(sites: dict) -> Sites:
    """What is known of the sites of a trace.

    Raises:
        ValueError: If one cannot be sampled, or plates are missing where they must not.

    Warns:
        UserWarning: NumPyro's remarks on missing plates.
        FutureWarning: As NumPyro, for a discrete site that is not marked.
    """
    _check_latent_sites(sites)
    summed_out = [name for name, site in latent(sites).items() if is_discrete(site)]
    # Starts are as wide as floats are, whatever the parameters of their laws.
    shapes = {
        name: jax.ShapeDtypeStruct(
            jax.eval_shape(biject_to(site["fn"].support).inv, site["value"]).shape,
            jnp.result_type(float),
        )
        for name, site in latent(sites).items()
        if name not in summed_out
    }
    reported = tuple(
        name for name, site in sites.items() if name in shapes or site["type"] == "deterministic"
    )
    plates = [frame for site in sites.values() for frame in site.get("cond_indep_stack", ())]
    _validate_model(sites, plate_warning="error" if summed_out else "loose")
    return Sites(
        shapes,
        reported,
        _plate_dims(sites, reported),
        next(iter(summed_out), None),
        max((-frame.dim for frame in plates), default=0),
        frozenset(site["type"] for site in sites.values()),
    )


def _suspicions(sites: dict) -> Iterator[Array]:
    """For everything that may be wrong, shape (): whether it looks so."""
    for site in sites.values():
        if site["type"] != "sample":
            continue
        for law in _laws_in(site["fn"]):
            for parameter, value in law.get_args().items():
                constraint = law.arg_constraints[parameter]
                if not constraints.is_dependent(constraint):
                    yield ~jnp.all(constraint(value))
        leaves = jax.tree.leaves(site["value"])
        if not site["is_observed"] or isinstance(_base(site["fn"]), dist.Unit) or len(leaves) != 1:
            continue
        value = jnp.asarray(leaves[0])
        yield jnp.any(value != value)
        support = _support(site["fn"])
        if support is not None:
            yield ~jnp.all(support(site["value"]))


def _laws_in(law: dist.Distribution) -> Iterator[dist.Distribution]:
    """A law and those that it is made of."""
    yield law
    inner = jax.tree.leaves(
        law, is_leaf=lambda one: isinstance(one, dist.Distribution) and one is not law
    )
    for one in inner:
        if isinstance(one, dist.Distribution):
            yield from _laws_in(one)


class SameName(ValueError, AssertionError):
    """Two sites of one name; an AssertionError, too, since NumPyro raises one."""


class SiteNames(Messenger):
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

    recorder = SiteNames(substitute(seed(run, key), substitute_fn=start))
    try:
        return trace(recorder).get_trace()
    except Exception as error:
        twice = sorted({name for name in recorder.names if recorder.names.count(name) > 1})
        if isinstance(error, AssertionError) and twice:
            raise SameName(
                f"site {twice[0]!r}: got two sites of this name; wanted unique names. NumPyro says: {error}"
            ) from error
        last = f"after site {recorder.names[-1]!r}" if recorder.names else "before its first site"
        if isinstance(error, ValueError) and (causes := run.nonfinite_arguments()):
            # NumPyro checks the parameters of distributions, but names neither the site nor the data
            raise ValueError(
                f"{'; '.join(causes)}; wanted finite data. The model failed {last}: {error}"
            ) from error
        error.add_note(f"The NumPyro model failed {last}.")
        raise


def latent(sites: dict) -> dict:
    """Of a trace the sites that are sampled or summed out."""
    return {
        name: site
        for name, site in sites.items()
        if site["type"] == "sample" and not site["is_observed"]
    }


def is_discrete(site: dict) -> bool:
    """Whether the values of a site can be counted."""
    return site["fn"].support.is_discrete


def _check_latent_sites(sites: dict) -> None:
    for name, site in sites.items():
        if site["type"] == "plate" and site["args"][0] != len(site["value"]):
            raise ValueError(
                f"plate {name!r}: got a subsample of {len(site['value'])} out of {site['args'][0]}; wanted all of the data: "
                "leave subsample_size out"
            )
    for name, site in latent(sites).items():
        law = type(_base(site["fn"])).__name__
        if is_discrete(site):
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


def check_observed_sites(run: WithData, key: Key, sites: dict) -> None:
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
        is_masked = isinstance(unwrapped(distribution), dist.MaskedDistribution)
        if is_masked:
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
        if support is None or is_masked:
            continue
        outside = ~np.asarray(support(site["value"]))
        if outside.any():
            seen = value.reshape(outside.shape + (-1,))[_first(outside)]
            raise ValueError(
                f"site {name!r}: got {outside.sum()} observed value(s) outside the support of "
                f"{type(_base(distribution)).__name__}, the first {seen.squeeze()} at index {_first(outside)}; wanted "
                f"values in {support}"
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
                jax.tree.leaves((it["value"], _support(it["fn"]))) for it in (site, second[name])
            )
            if len(one) == len(other) and all(
                np.array_equal(a, b, equal_nan=True) for a, b in zip(one, other)
            ):
                names.append(name)
    return names


def unwrapped(law: Any) -> Any:
    """The law inside of those that only arrange its values."""
    while isinstance(law, dist.Independent | dist.ExpandedDistribution):
        law = law.base_dist
    return law


def _base(law: dist.Distribution) -> dist.Distribution:
    """Likewise, inside of masks, too."""
    law = unwrapped(law)
    return _base(law.base_dist) if isinstance(law, dist.MaskedDistribution) else law


def _first(flags: np.ndarray) -> tuple[int, ...]:
    return tuple(int(index) for index in np.argwhere(flags)[0])


def _plate_dims(sites: dict, names: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Axis names, by site, for those of `names` whose axes are exactly their plates."""
    dims = {}
    for name in names:
        frames = sorted(sites[name].get("cond_indep_stack", ()), key=lambda frame: frame.dim)
        if frames and len(frames) == np.ndim(sites[name]["value"]):
            dims[name] = tuple(frame.name for frame in frames)
    return dims
