"""A NumPyro model bound to its data, which stay NumPy's if they are, in the dtypes of the precision that is on while it runs."""

import inspect
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger


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
