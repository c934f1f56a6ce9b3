"""Checks that refuse a wrong argument by name, before anything is traced: what it got, and what was wanted.

Memory is plain arithmetic: with C chains, T steps solved at once, D numbers of state and m numbers per linear map, the
peak of one iteration is about

    bytes = 6 · C · T · (m + D) · itemsize,     m = D² for dense Jacobians, D for diagonal ones, 0 for none.
"""

import operator
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import get_opaque_trace_state

from partime_mcmc.types import Array, PyTree, Tracer, is_key

# The state of JAX's tracing when this is imported, before any function is traced.
_NOTHING_TRACED = get_opaque_trace_state()


def check_has(value: Any, name: str, methods: tuple[str, ...], wanted: str) -> None:
    """Refuse a strategy that lacks one of its methods, or a class or function where its instance is meant.

    Args:
        value: What was given.
        name: The argument's name.
        methods: What an instance must have.
        wanted: What to give, in words.

    Raises:
        TypeError: Naming the argument, what it got and what it wanted.
    """
    if isinstance(value, type) or not all(
        callable(getattr(value, method, None)) for method in methods
    ):
        raise TypeError(f"{name}: got {describe(value)}, wanted {wanted}")


def check_like(what: str, got: PyTree, wanted: PyTree, reference: str) -> None:
    """Refuse a pytree that differs in structure, shapes or types from another one.

    Args:
        what: The beginning of the message, such as "dynamics: step returns".
        got: Arrays, or their shapes and types.
        wanted: Likewise.
        reference: The name of the argument that `wanted` is.

    Raises:
        TypeError: Naming the first difference.
    """
    structure, expected = jax.tree.structure(got), jax.tree.structure(wanted)
    if structure != expected:
        raise TypeError(f"{what} structure {structure}, wanted {expected} as in `{reference}`")
    for (path, new), old in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted)):
        if new.shape != old.shape or new.dtype != old.dtype:
            raise TypeError(
                f"{what} {jax.tree_util.keystr(path) or 'an array'} with shape {new.shape} and type {new.dtype}, "
                f"wanted {old.shape} and {old.dtype} as in `{reference}`"
            )


def describe(value: Any) -> str:
    """A value in an error message: plain values as they are, others by their type."""
    if isinstance(value, type):
        return f"the class {value.__name__} (an instance is wanted: {value.__name__}(...))"
    if isinstance(value, (str, int, float, bool, type(None))):
        return repr(value)
    return (
        f"the function {value.__name__}"
        if hasattr(value, "__name__")
        else f"a {type(value).__name__}"
    )


def check_scale(scale: Array | float, name: str) -> Array | float:
    """Refuse a scale of residuals with which any path would pass.

    Raises:
        ValueError: Naming `name`, if a concrete scale is not positive and finite (traced ones pass).
    """
    if not isinstance(scale, Tracer):
        values = np.asarray(scale)
        # "fiu": floats and integers, signed or not.
        if values.dtype.kind not in "fiu" or not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name}: got {scale!r}, wanted positive finite numbers")
    return scale


# Live copies of the per-step numbers at the peak of one iteration: path, values, maps, scan levels, new path.
WORKING_COPIES = 6


class InvalidStart(ValueError):
    """A start from which no chain can run."""


class TooLarge(ValueError, MemoryError):
    """A run that would need more memory than allowed. It is both a `ValueError` and a `MemoryError`."""


def check_key(key: Any, name: str = "key") -> jax.Array:
    """Returns one typed PRNG key.

    Args:
        key: A typed key, shape (), or one legacy key: uint32 of the default generator's width, shape (2,) for threefry.
        name: The argument's name, for the message.

    Returns:
        The typed key, shape ().

    Raises:
        TypeError: For anything that is no key (an int, a float, another dtype).
        ValueError: For a batch of keys, or a legacy key of another width.
    """
    wanted = "wanted one key, as jax.random.key(0) makes it"
    if not isinstance(key, jax.Array | np.ndarray | np.generic):
        raise TypeError(f"{name}: got {key!r} of type {type(key).__name__}; {wanted}")
    if is_key(key):
        if key.shape != ():
            raise ValueError(
                f"{name}: got a batch of keys of shape {key.shape}; {wanted} (it is split inside)"
            )
        return jnp.asarray(key)
    if key.dtype != jnp.uint32:
        raise TypeError(
            f"{name}: got an array of dtype {key.dtype} and shape {key.shape}; {wanted}"
        )
    width = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    if key.ndim > 1 and key.shape[-1:] == width:
        raise ValueError(
            f"{name}: got a batch of legacy keys of shape {key.shape}; {wanted} (it is split inside)"
        )
    if key.shape != width:
        raise ValueError(
            f"{name}: got uint32 numbers of shape {key.shape}; {wanted}, or a legacy key of shape {width}"
        )
    return jax.random.wrap_key_data(jnp.asarray(key))


def check_outside_transforms(what: str, **values: PyTree) -> None:
    """Refuse a call inside of `jit`, `vmap`, `grad` and the like, from a function that compiles what it needs itself.

    Args:
        what: The function, for the message.
        **values: Its arguments, by name.

    Raises:
        TypeError: Naming the first argument that is traced, or the function if what is traced comes another way.
    """
    advice = f"call {what} outside jit, vmap and grad (it compiles what it needs itself)"
    for name, value in values.items():
        for path, leaf in _flattened(value, name)[0]:
            if isinstance(leaf, Tracer):
                raise TypeError(f"{name}{jax.tree_util.keystr(path)}: got a traced value; {advice}")
    if get_opaque_trace_state() != _NOTHING_TRACED:
        raise TypeError(f"{what}: called while JAX traces or maps a function; {advice}")


def check_generator(key: Any, name: str) -> None:
    """Refuse keys of generators whose numbers depend on how many are drawn side by side.

    JAX documents that under `vmap` the generators `rbg` and `unsafe_rbg` give other numbers than one key after another. A path
    that is found in parallel would then be another one than the loop's.

    Args:
        key: Typed keys, or their shape and type.
        name: The argument's name, for the message.

    Raises:
        ValueError: For keys of another generator than `threefry2x32`.
    """
    found = str(jax.random.key_impl(key))
    if "threefry" not in found:
        raise ValueError(
            f"{name}: got a key of the generator {found}; wanted one of threefry2x32, as jax.random.key(0, "
            "impl='threefry2x32') makes it: the numbers of other generators depend on how many are drawn side by side, so that "
            "a parallel chain would not be the sequential one"
        )


def check_count(value: Any, name: str, minimum: int) -> int:
    """Returns `value` as a Python int of at least `minimum`.

    Raises:
        TypeError: For a bool, a float (even 4.0), a string, an array that is no concrete integer scalar.
        ValueError: For an int below `minimum`.
    """
    wanted = f"wanted an int of at least {minimum}"
    if isinstance(value, bool | np.bool_) or getattr(value, "dtype", None) == np.bool_:
        raise TypeError(f"{name}: got the bool {value}; {wanted}")
    try:
        count = operator.index(value)
    except TypeError as error:
        raise TypeError(
            f"{name}: got {value!r} of type {type(value).__name__}; {wanted}"
        ) from error
    if count < minimum:
        raise ValueError(f"{name}: got {count}; {wanted}")
    return count


def _flattened(tree: PyTree, name: str) -> tuple[list, Any]:
    """Leaves with their paths, and the structure.

    Raises:
        InvalidStart: For a dict that JAX cannot sort.
    """
    try:
        return jax.tree_util.tree_flatten_with_path(tree)
    except (TypeError, ValueError) as error:
        raise InvalidStart(
            f"{name}: got a dict with keys of several types; wanted keys that can be sorted, such as strings"
        ) from error


def check_dtypes(position: PyTree, name: str = "initial") -> PyTree:
    """Returns `position` with JAX leaves of the default floating dtype, so that no float32 and float64 meet in the carry.

    While x64 is on that is float64, also for float32 leaves: the random numbers of most kernels are float64 then, and nothing
    is lost by it. While it is off, NumPy's float64 becomes float32 as elsewhere in JAX. Integers become floats with a
    warning. It works on traced leaves too.

    Raises:
        InvalidStart: For bool, complex, object or string leaves, and for floats of two bytes.
    """
    paths, tree = _flattened(position, name)
    leaves, dtype = {}, jnp.dtype(jnp.result_type(float))
    for path, given in paths:
        label = name + jax.tree_util.keystr(path)
        kind = getattr(given, "dtype", None) or np.asarray(given).dtype
        if not (jnp.issubdtype(kind, jnp.floating) or jnp.issubdtype(kind, jnp.integer)):
            raise InvalidStart(
                f"{label}: got {given!r} of dtype {kind}; wanted real floating-point numbers"
            )
        leaves[label] = leaf = jnp.asarray(given)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize < 4:
            raise InvalidStart(
                f"{label}: got {leaf.dtype}; wanted float32 or float64: in so few digits the residual of a path proves nothing"
            )
    if not leaves:
        raise InvalidStart(
            f"{name}: got a position without entries (dimension 0); wanted at least one parameter"
        )
    for label, leaf in leaves.items():
        if jnp.issubdtype(leaf.dtype, jnp.integer):
            warnings.warn(
                f"{label}: got integers ({leaf.dtype}); they become {dtype}", stacklevel=2
            )
    return jax.tree.unflatten(tree, [jnp.asarray(leaf, dtype=dtype) for leaf in leaves.values()])


def check_bytes(
    num_steps: int,
    dimension: int,
    itemsize: int,
    max_bytes: int,
    *,
    per_step: int,
    num_chains: int = 1,
    more: int = 0,
) -> int:
    """Bytes at the peak of one solver iteration; arithmetic only, nothing is allocated.

    Args:
        num_steps: Steps solved at once, T.
        dimension: Flat state size D.
        itemsize: Bytes of one number: 4 or 8.
        max_bytes: The limit.
        per_step: Numbers in the linear map of one step: D² for dense Jacobians, D for diagonal ones, 0 for none.
        num_chains: Chains solved at once, C.
        more: Further bytes per step and chain.

    Returns:
        C · T · ((per_step + D) · itemsize · `WORKING_COPIES` + more).

    Raises:
        TooLarge: If that exceeds `max_bytes`, with the longest window (a power of two) that fits.
    """
    one_step = num_chains * ((per_step + dimension) * itemsize * WORKING_COPIES + more)
    total = num_steps * one_step
    if total <= max_bytes:
        return total
    fits = max_bytes // one_step
    advice = (
        f"solve in windows, schedule=Windows({1 << (fits.bit_length() - 1)})"
        if fits
        else "take fewer chains: not even one step fits"
    )
    if per_step > dimension:
        advice += ", or keep diagonal Jacobians only, solver=quasi_deer()"
    raise TooLarge(
        f"num_samples: got {num_steps} steps of dimension {dimension} in {num_chains} chain(s), about "
        f"{_readable(total)}; wanted at most max_bytes={max_bytes} ({_readable(max_bytes)}): {advice}, or raise "
        "max_bytes"
    )


def _readable(num_bytes: int) -> str:
    exponent = min((max(num_bytes, 1).bit_length() - 1) // 10, 6)
    return f"{num_bytes / 1024**exponent:.3g} {('B', 'KiB', 'MiB', 'GiB', 'TiB', 'PiB', 'EiB')[exponent]}"
