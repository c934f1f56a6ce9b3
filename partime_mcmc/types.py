"""Type aliases, and the decorator that makes a frozen dataclass a pytree.

Everything that travels through `jit` and `vmap` is a frozen dataclass whose array fields are leaves and whose other
fields (functions, numbers that fix shapes) are static. `pytree` declares both in one line, so that the head of a class
shows what is data and what is structure.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any, Callable, TypeAlias, TypeVar, dataclass_transform

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike as ArrayLike

Array: TypeAlias = jax.Array
PyTree: TypeAlias = Any
Key: TypeAlias = jax.Array
# Arrays of results, which the host may have put together.
AnyArray: TypeAlias = jax.Array | np.ndarray
Tracer: TypeAlias = jax.core.Tracer
# JAX adds its options to this object at run time, where type checkers do not see them.
jax_config: Any = jax.config

_Class = TypeVar("_Class", bound=type)
# JAX's settings that decide about results.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_threefry_partitionable",
    "jax_default_prng_impl",
    "jax_random_seed_offset",
    "jax_numpy_dtype_promotion",
    "jax_high_dynamic_range_gumbel",
)


def is_key(value: Any) -> bool:
    """Whether a value is a typed key, or several."""
    return hasattr(value, "dtype") and jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def settings() -> tuple:
    """JAX's settings that decide about results, as they are here and now."""
    return tuple(getattr(jax_config, name, None) for name in _SETTINGS)


@contextlib.contextmanager
def nan_is_a_value() -> Iterator[None]:
    """JAX's own searches for NaN and infinities (`jax_debug_nans`, `jax_debug_infs`) are off inside, in this thread.

    A proposal outside the support and a residual that was not computed are NaN or infinite in a program that is right; what
    is wrong shows in verdicts and certificates. Also a decorator.
    """
    with jax.debug_nans(False), jax.debug_infs(False):
        yield


@dataclass_transform(frozen_default=True)
def pytree(*, static: tuple[str, ...] = ()) -> Callable[[_Class], _Class]:
    """Make a class a frozen dataclass and register it as a JAX pytree.

    Args:
        static: Names of the fields that are part of the structure (hashed, compared, never traced).

    Returns:
        A class decorator.

    Raises:
        TypeError: If `static` names something that is not a field.
    """

    def decorate(cls: _Class) -> _Class:
        cls = dataclasses.dataclass(frozen=True)(cls)
        names = [field.name for field in dataclasses.fields(cls)]
        unknown = set(static) - set(names)
        if unknown:
            raise TypeError(
                f"static: {sorted(unknown)} are not fields of {cls.__name__}; its fields are {names}"
            )
        _register(cls, tuple(name for name in names if name not in static), tuple(static))
        return cls

    return decorate


def _register(cls: type, data: tuple[str, ...], static: tuple[str, ...]) -> None:
    """Register `cls`, with the class itself among its static data.

    `jax.tree_util.register_dataclass` is not used because the structures of two classes with equal fields compare equal
    there (seen on JAX 0.10 and 0.12): `jit` then takes compiled code of one solver for another whenever hashes collide.
    """

    def structure(value):
        return (cls, *(getattr(value, name) for name in static))

    def flatten(value):
        return tuple(getattr(value, name) for name in data), structure(value)

    def flatten_with_keys(value):
        return tuple(
            (jax.tree_util.GetAttrKey(name), getattr(value, name)) for name in data
        ), structure(value)

    def unflatten(structure, children):
        # Without __init__: JAX unflattens placeholders that no validation would let pass.
        value = object.__new__(cls)
        for name, field in (*zip(data, children), *zip(static, structure[1:])):
            object.__setattr__(value, name, field)
        return value

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
