"""Refusing an argument of the wrong kind, by name, before anything is traced."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from partime_mcmc.types import Array


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
    """Refuse a unit with which any path would pass.

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
