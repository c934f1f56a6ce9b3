"""StreamingStatistics a NumPyro model: with its data, traced, and what went wrong when it fails."""

import inspect
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import seed, substitute, trace
from numpyro.primitives import Messenger

from partime_mcmc.types import Key


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
            if isinstance(leaf, np.ndarray | jax.Array) and np.issubdtype(leaf.dtype, np.floating):
                if count := int(np.sum(~np.isfinite(np.asarray(leaf)))):
                    where = f"{path[0].key!r}{jax.tree_util.keystr(path[1:])}"
                    found.append(
                        f"argument {where} has {count} NaN or infinite of {leaf.size} entries"
                    )
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


def diagnosis(run: WithData, key: Key, strategy: Callable) -> str:
    """Which arguments hold non-finite numbers, and which sites have a non-finite log probability at a random start."""
    causes = run.nonfinite_arguments()
    for name, site in traced(run, key, strategy).items():
        if site["type"] == "sample":
            values = np.asarray(site["fn"].log_prob(site["value"]))
            if not np.isfinite(values).all():
                worst = values[~np.isfinite(values)].ravel()[0]
                causes.append(f"site {name!r} has log probability {worst} at a random start")
    return (
        " Seen: " + "; ".join(causes) + "."
        if causes
        else " Try another init_strategy, or tighter priors."
    )


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
