"""What NumPyro's users give, checked by name before anything is compiled: keys, starts, step sizes, metrics, and what
cannot go together or has no effect here."""

from __future__ import annotations

import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.types import PyTree, Tracer
from partime_mcmc.validation import check_key


def is_typed(key: Any) -> bool:
    """Whether keys are of JAX's new style."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def check_keys(rng_key: Any, num_chains: int) -> Any:
    """One typed key, or a batch of keys as it came.

    Args:
        rng_key: One key, or one per chain, typed `()` and `(C,)`, or legacy `(2,)` and `(C, 2)`.
        num_chains: C.

    Raises:
        TypeError: For a traced value, or anything that is no key.
        ValueError: For another number of keys.
    """
    if isinstance(rng_key, Tracer):
        raise TypeError(
            "rng_key: got a traced value; call run outside jit and vmap (it compiles what it needs itself)"
        )
    is_array = hasattr(rng_key, "dtype") and hasattr(rng_key, "ndim")
    # A legacy key is two numbers: shape (2,) is one of these, or two typed keys.
    own_axes = 0 if is_array and is_typed(rng_key) else 1
    if num_chains == 1 or not is_array or rng_key.ndim <= own_axes:
        return check_key(rng_key, "rng_key")
    if rng_key.ndim > own_axes + 1 or rng_key.shape[0] != num_chains:
        raise ValueError(
            f"rng_key: got {' x '.join(map(str, rng_key.shape[: rng_key.ndim - own_axes]))} keys for {num_chains} chains; "
            "wanted one key, or one per chain"
        )
    check_key(rng_key[0], "rng_key")
    return rng_key


def check_leading(init_params: PyTree, num_chains: int) -> None:
    """Starts have the chains first, in every leaf.

    Raises:
        ValueError: Naming the first leaf that has not.
    """
    if init_params is None or num_chains == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(init_params)
    if not leaves:
        raise ValueError(
            f"init_params: got {init_params!r}, wanted starts with leaves ({num_chains}, ...), or None"
        )
    for path, leaf in leaves:
        if jnp.shape(leaf)[:1] != (num_chains,):
            where = jax.tree_util.keystr(path)
            raise ValueError(
                f"init_params{where}: got shape {jnp.shape(leaf)}, wanted ({num_chains}, ...): one start per chain"
            )


def check_sites(given: PyTree, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Starts are those of a model.

    Args:
        given: Starts, leaves `(C, ...)`.
        shapes: Of one start, by site.

    Raises:
        ValueError: Naming the sites, or the first whose shape is another.
    """
    if not isinstance(given, dict) or set(given) != set(shapes):
        got = f"sites {sorted(given)}" if isinstance(given, dict) else f"a {type(given).__name__}"
        raise ValueError(
            f"init_params: got {got}, wanted an unconstrained value for each of {sorted(shapes)}"
        )
    have = jax.tree.leaves(given)[0].shape[:1]
    for name, leaf in given.items():
        wanted = (*have, *shapes[name].shape)
        if jnp.shape(leaf) != wanted:
            raise ValueError(
                f"init_params[{name!r}]: got shape {jnp.shape(leaf)}, wanted {wanted}: one unconstrained value per chain"
            )


def check_positive(value: Any, name: str) -> Any:
    """The number, or None, as it came.

    Raises:
        ValueError: Unless it is None or a finite number above 0.
    """
    if value is None:
        return None
    try:
        usable = math.isfinite(value) and value > 0
    except TypeError:
        usable = False
    if not usable:
        raise ValueError(f"{name}: got {value!r}, wanted a finite number above 0")
    return value


def checked_metric(inverse_mass_matrix: Any) -> np.ndarray:
    """A metric given by the user.

    Raises:
        ValueError: If it is no vector of positive numbers and no symmetric positive definite matrix.
    """
    wanted = "wanted positive variances (D,) or a symmetric positive definite matrix (D, D)"
    if isinstance(inverse_mass_matrix, dict):
        raise ValueError(
            f"inverse_mass_matrix: got blocks by site {sorted(inverse_mass_matrix)}, {wanted}"
        )
    metric = np.asarray(inverse_mass_matrix, float)
    if metric.ndim not in (1, 2) or (metric.ndim == 2 and metric.shape[0] != metric.shape[1]):
        raise ValueError(f"inverse_mass_matrix: shape {metric.shape}, {wanted}")
    usable = np.isfinite(metric).all() and (metric.ndim == 2 or (metric > 0).all())
    if usable and metric.ndim == 2:
        usable = np.allclose(metric, metric.T, rtol=1e-3) and np.linalg.eigvalsh(metric).min() > 0
    if not usable:
        raise ValueError(f"inverse_mass_matrix: got {metric!r}, {wanted}")
    return metric


def check_alone(adaptation: Any, **choices: Any) -> None:
    """A whole warm-up strategy comes without the arguments that would set parts of one.

    Raises:
        ValueError: Naming those that were given.
    """
    given = [name for name, value in choices.items() if value is not None]
    if adaptation is not None and given:
        raise ValueError(
            f"adaptation: got a {type(adaptation).__name__} together with {', '.join(given)}, wanted one or the other: an "
            "adaptation has its own acceptance, path and metric"
        )


def warn_without_effect(find_heuristic_step_size: bool, regularize_mass_matrix: bool) -> None:
    """NumPyro's switches of its own warm-up have nothing to switch here.

    Warns:
        UserWarning: For one that is not at NumPyro's default.
    """
    for name, value, default, why in (
        (
            "find_heuristic_step_size",
            find_heuristic_step_size,
            False,
            "step sizes are found by trials in any case",
        ),
        (
            "regularize_mass_matrix",
            regularize_mass_matrix,
            True,
            "metrics are always shrunk towards the one before",
        ),
    ):
        if value is not default:
            warnings.warn(f"{name}: got {value!r}, which has no effect here: {why}", stacklevel=4)
