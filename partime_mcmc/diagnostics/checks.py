"""Pre-flight checks: refuse, in plain words, what would fail late or be wrong in silence.

A sampler started where log p(x) is -inf, or where its gradient is NaN, rejects every proposal without a sign; a log
density that differs between two calls at the same x has no path to converge to. With a position x (a pytree of D
numbers in all), l(x) = log p(x) and g(x) its gradient, a run may begin where

    x finite,  D > 0,  l(x) a real scalar,  l(x) finite,  g(x) finite,  l(x) = l(x) bit for bit when asked twice,

and where l in float32 is close to l in float64. Everything here costs one or two evaluations of l and g, compiled with
the captured data as arguments, and comes before anything that depends on the number of steps. An error names the
argument, what it got and what it wanted.

Left out: a start that is bad only in law (far out in a tail), and a key that was used before; neither can be seen from one
evaluation. A density that calls random code away from the start is found when its path is certified (`certify.certificate`). All checks want concrete values: call them outside `jit`.
"""

import math
import warnings
from collections.abc import Iterator
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.compile_cache import compiler_options
from partime_mcmc.tracing import explicit, is_jaxpr
from partime_mcmc.types import Array, PyTree
from partime_mcmc.validation import InvalidStart

LogDensity = Callable[[PyTree], Array]

# Largest relative difference between float32 and float64 log densities that passes `check_precision`.
MAX_RELATIVE_ERROR = 1e-3
# `looks_improper`: growth of |x| over the scale of the starts, and the adapted step size, beyond which it warns.
IMPROPER_GROWTH, IMPROPER_STEP_SIZE = 1e6, 1e3


class NonDeterministicTarget(ValueError):
    """A log density that gives two answers for one position."""


class PrecisionWarning(UserWarning):
    """The log density loses too many digits in float32."""


def check_start(logdensity: LogDensity, position: PyTree, name: str = "initial") -> None:
    """Raises unless a chain can start from `position`.

    Args:
        logdensity: PyTree to real scalar.
        position: Pytree of floating leaves, D numbers in all.
        name: The argument's name, for the message.

    The gradient is judged wherever JAX can take one, in reverse or forward mode; a density without any derivative (a
    host callback, for a gradient-free kernel) is judged by its value alone.

    Raises:
        InvalidStart: If D = 0; a leaf is integer, bool or complex, or not finite; the log density is no real scalar, is
            NaN or infinite, or has another precision than the position; or its gradient is not finite.
    """
    _check_position(position, name)
    _check_at(_compiled_derivative(logdensity, position, name), position, name)


def check_starts(logdensity: LogDensity, positions: PyTree, name: str = "initial") -> None:
    """`check_start` for every chain of a batch, compiled once; the message names the first bad chain.

    Args:
        logdensity: PyTree to real scalar.
        positions: Pytree of floating leaves, shapes (C, ...), C >= 1.
        name: The argument's name, for the message.

    Raises:
        InvalidStart: As `check_start`, with the chain's number in front.
    """
    for chain in range(jax.tree.leaves(positions)[0].shape[0] if jax.tree.leaves(positions) else 1):
        position = jax.tree.map(lambda leaf: leaf[chain], positions)  # noqa: B023 (used at once)
        label = f"chain {chain}, {name}"
        _check_position(position, label)
        if chain == 0:
            evaluate = _compiled_derivative(logdensity, position, name)
        _check_at(evaluate, position, label)


def check_deterministic(logdensity: LogDensity, position: PyTree) -> None:
    """Evaluates twice, untraced, so that both host randomness and random callbacks show; and traces twice, so that a random
    number that tracing writes into the program shows wherever in the space it counts.

    Raises:
        NonDeterministicTarget: If the two values differ in any bit (NaN equals NaN here), or a number in the two programs.
    """
    first, second = np.asarray(logdensity(position)), np.asarray(logdensity(position))
    advice = "Take random numbers and subsampling out of the model: a chain's path is defined for a fixed density only"
    if not np.array_equal(first, second, equal_nan=True):
        raise NonDeterministicTarget(
            f"logdensity: got {first} and then {second} at the same position; wanted one value for one position. {advice}"
        )
    # JAX remembers what it traced by the function: each time another one.
    one, other = (
        list(_written_numbers(jax.make_jaxpr(lambda x: logdensity(x))(position))) for _ in range(2)
    )
    if len(one) == len(other):
        for was, now in zip(one, other):
            if was.shape == now.shape and not np.array_equal(was, now, equal_nan=True):
                raise NonDeterministicTarget(
                    f"logdensity: traced twice, it has {_some(was)} and then {_some(now)} written into it; wanted one program "
                    f"of one density. {advice}"
                )


def check_precision(logdensity: LogDensity, position: PyTree, value: Any = None) -> float | None:
    """Compares the log density in the position's precision with float64, and warns where digits are lost.

    Args:
        logdensity: PyTree to real scalar.
        position: Pytree of floating leaves of one dtype, D numbers in all.
        value: Of the log density there, where it is known.

    Returns:
        |l - l64| / max(1, |l64|), `inf` if only l64 is finite; None where there is nothing to compare: a float64
        position, a density that cannot be evaluated in float64 or is not finite there.

    Warns:
        PrecisionWarning: If the result exceeds `MAX_RELATIVE_ERROR`.

    The float64 value comes from running the function again under `jax.enable_x64`, for this call alone. JAX arrays that
    the function captured stay as they are, so what was lost when float32 data were made, or in steps that involve such
    data only, is not seen; NumPy float64 data are seen in full. One point is no proof either way.
    """
    leaves = jax.tree.leaves(position)
    if not leaves or any(leaf.dtype == jnp.float64 for leaf in leaves):
        return None
    here = float(_compiled(logdensity, position)(position) if value is None else value)
    try:
        with jax.enable_x64(True), warnings.catch_warnings(action="ignore"):
            wide = jax.device_put(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), position))
            value = _compiled(logdensity, wide)(wide)
    except Exception:  # whatever a model that insists on float32 raises
        return None
    there = float(value)
    if value.dtype != jnp.float64 or not math.isfinite(there):
        return None
    error = abs(here - there) / max(1.0, abs(there)) if math.isfinite(here) else math.inf
    if error > MAX_RELATIVE_ERROR:
        warnings.warn(
            f"logdensity: got {here:.7g} in {leaves[0].dtype} where float64 gives {there:.7g} (relative error "
            f"{error:.1e}); wanted at most {MAX_RELATIVE_ERROR:g}. Run in float64 (jax.enable_x64), or rescale the "
            "model",
            PrecisionWarning,
            stacklevel=2,
        )
    return error


def _written_numbers(closed: Any) -> Iterator[np.ndarray]:
    """The numbers that a traced function holds itself: constants, and those written between its operations."""
    for value in getattr(closed, "consts", ()):
        if _is_number(value):
            yield np.asarray(value)
    for equation in getattr(closed, "jaxpr", closed).eqns:
        for variable in equation.invars:
            if hasattr(variable, "val") and _is_number(variable.val):
                yield np.asarray(variable.val)
        for inner in jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(inner):
                yield from _written_numbers(inner)


def _is_number(value: Any) -> bool:
    return np.issubdtype(getattr(value, "dtype", type(value)), np.number)


def _some(value: np.ndarray) -> str:
    return str(value) if value.ndim == 0 else f"{value.ravel()[:3]}..."


def _check_position(position: PyTree, name: str) -> None:
    paths, _ = jax.tree_util.tree_flatten_with_path(position)
    if sum(np.size(leaf) for _, leaf in paths) == 0:
        raise InvalidStart(
            f"{name}: got a position without entries (dimension 0); wanted at least one parameter"
        )
    for path, leaf in paths:
        dtype = getattr(leaf, "dtype", None) or np.asarray(leaf).dtype
        if not jnp.issubdtype(dtype, jnp.floating):
            raise InvalidStart(
                f"{name}{jax.tree_util.keystr(path)}: got dtype {dtype}; wanted real floating-point numbers"
            )
    if bad := _first_nonfinite(position, name):
        raise InvalidStart(f"{bad[0]}: got {bad[1]}; wanted finite numbers")


def _check_at(evaluate: Callable, position: PyTree, name: str) -> None:
    value, gradient = evaluate(position)
    if not math.isfinite(value):
        raise InvalidStart(
            f"{name}: got a start where the log density is {value}; wanted a finite one (is the start outside the "
            "support, or are the data not finite?)"
        )
    if bad := _first_nonfinite(gradient, f"gradient with respect to {name}"):
        raise InvalidStart(
            f"{bad[0]}: got {bad[1]} where the log density itself is {float(value):.6g}; wanted a finite gradient. A `where` "
            "around sqrt, log or a division does not stop the NaN of the branch not taken: use the double-where trick, "
            "jnp.where(ok, f(jnp.where(ok, x, 1.0)), other)"
        )


def _compiled_derivative(logdensity: LogDensity, position: PyTree, name: str) -> Callable:
    """Compiled position -> (value, gradient); the gradient is empty where JAX has none."""
    try:
        shape = jax.eval_shape(logdensity, position)
    except Exception as error:
        error.add_note(
            f"logdensity failed at {name} = {jax.tree.map(jnp.shape, position)} (shapes)"
        )
        raise
    wanted = "wanted one real number, shape ()"
    if not hasattr(shape, "dtype") or not jnp.issubdtype(shape.dtype, jnp.floating):
        raise InvalidStart(f"logdensity: got {shape} at {name}; {wanted}")
    if shape.shape != ():
        raise InvalidStart(
            f"logdensity: got shape {shape.shape} at {name}; {wanted}: end it with `.sum()`"
        )
    dtypes = {jnp.dtype(leaf.dtype) for leaf in jax.tree.leaves(position)} | {
        jnp.dtype(shape.dtype)
    }
    if {jnp.dtype("float32"), jnp.dtype("float64")} <= dtypes:
        raise InvalidStart(
            f"logdensity: got {shape.dtype} at {name} of dtype {jax.tree.leaves(position)[0].dtype}; wanted one "
            "precision for position, data and log density"
        )

    def forward(position):
        return logdensity(position), jax.jacfwd(logdensity)(position)

    for derivative in (jax.value_and_grad(logdensity), forward):
        try:
            return _compiled(derivative, position)
        except Exception:  # no reverse mode through loops, no derivative through host callbacks
            continue
    return _compiled(lambda position: (logdensity(position), ()), position)


def _compiled(function: Callable, example: PyTree) -> Callable:
    """`jax.jit` with captured arrays as arguments: as constants XLA would spend its time folding them."""
    step, (captured, _) = explicit(function, example)
    run = jax.jit(step, compiler_options=compiler_options(0))
    return lambda position: run((captured, position))


def _first_nonfinite(tree: Any, name: str) -> tuple[str, float] | None:
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        values = np.asarray(leaf, dtype=np.float64)
        for index in np.argwhere(~np.isfinite(values)):
            where = f"[{', '.join(map(str, index))}]" if index.size else ""
            return name + jax.tree_util.keystr(path) + where, float(values[tuple(index)])
    return None


def looks_improper(positions_first: PyTree, positions_last: PyTree, step_size: Any) -> str | None:
    """Signs that the target has no finite integral, so that the chain only drifts.

    Args:
        positions_first: Starts, leaves of shape (C, ...).
        positions_last: PyTrees at the end of warm-up, same shapes.
        step_size: Adapted step size, scalar or (C,).

    Returns:
        What was seen, or None. Seen are: |x| beyond `IMPROPER_GROWTH` times max(1, |starts|), or a step size beyond
        `IMPROPER_STEP_SIZE`. It is a hint for a warning, not a proof: a very wide proper target can trip it (rescale
        it), and a slow drift, or a chain that rejects nearly everything on the way out, passes unseen.
    """
    sizes = [np.max(np.abs(leaf), initial=1.0) for leaf in jax.tree.leaves(positions_first)]
    scale = float(max(sizes, default=1.0))
    for path, leaf in jax.tree_util.tree_flatten_with_path(positions_last)[0]:
        largest = float(np.max(np.abs(leaf), initial=0.0))
        if largest > IMPROPER_GROWTH * scale:
            where = jax.tree_util.keystr(path) or "the position"
            return (
                f"possibly improper: {where} grew to {largest:.1e} from starts within {scale:.1e}"
            )
    largest = float(np.max(step_size))
    if largest > IMPROPER_STEP_SIZE:
        return f"possibly improper: the step size grew to {largest:.1e}"
    return None
