"""Checks that refuse a wrong argument by name, before anything is traced."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from partime_mcmc.types import Array, PyTree


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
    structures = jax.tree.structure(got), jax.tree.structure(wanted)
    if structures[0] != structures[1]:
        raise TypeError(
            f"{what} structure {structures[0]}, wanted {structures[1]} as in `{reference}`"
        )
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
    if not isinstance(scale, jax.core.Tracer):
        values = np.asarray(scale)
        if (
            not np.issubdtype(values.dtype, np.floating)
            and not np.issubdtype(values.dtype, np.integer)
            or not (np.isfinite(values).all() and (values > 0).all())
        ):
            raise ValueError(f"{name}: got {scale!r}, wanted positive finite numbers")
    return scale
