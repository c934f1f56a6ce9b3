"""The data of a NumPyro model: what its arguments were, and the model bound to them.

NumPy data stay NumPy, in the dtypes of the precision that is on while the model runs; what is equal by content is the same data, so
that nothing is traced twice for it.
"""

import dataclasses
import inspect
from typing import Any, Callable, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.primitives import Messenger

from partime_mcmc.types import jax_config


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
