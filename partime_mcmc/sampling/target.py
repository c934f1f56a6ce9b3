"""What to sample: a log density on unconstrained space, where to start, and how to read the draws.

    p(x) ∝ exp(logdensity(x)),   x a pytree of real arrays, D numbers in all;   θ = constrain(x) in the model's space.

A `Target` knows nothing of kernels, solvers or NumPyro; a bare log density is enough: `Target(logdensity, initial)`.
Left out: normalising constants, bounded positions (transform them and add the log Jacobian), discrete positions.
"""

import functools
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Callable, Sequence

import jax
import jax.numpy as jnp

from partime_mcmc.compile_cache import Timings, run_explicit
from partime_mcmc.kernels.coordinates import Centring
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Array, Key, PyTree, jax_config
from partime_mcmc.validation import InvalidStart, check_dtypes, check_key


@dataclass(frozen=True, eq=False)  # positions are arrays: two targets are equal if they are one
class Target:
    """A density to sample from.

    Attributes:
        logdensity: Unconstrained position to real scalar, shape (); differentiable for gradient-based kernels.
        initial: A position (every chain starts there), or a function of a key, shape (), that draws one.
        constrain: One position to a dict of named arrays in the model's space; None: draws are reported as positions.
        names: The constrained values worth a line in a table or a panel in a figure, in order; None: all of them.
        dims: Names of the axes of constrained values, by value name: `{"theta": ("school",)}`; None: unnamed axes.
        centring: The sites whose law is fixed by a location and a scale, for warm-up to recentre; None: there are none.

    Raises:
        TypeError: If `logdensity` or `constrain` is no function, `names` no sequence of strings or `dims` no mapping.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target
        >>> target = Target(lambda x: -0.5 * jnp.sum(x**2), initial=jnp.zeros(3))
        >>> target.start(jax.random.key(0)).shape
        (3,)
    """

    logdensity: Callable[[PyTree], Array]
    initial: PyTree | Callable[[Key], PyTree]
    constrain: Callable[[PyTree], dict[str, Array]] | None = None
    names: Sequence[str] | None = None
    dims: Mapping[str, Sequence[str]] | None = None
    centring: Centring | None = None

    def __post_init__(self):
        constrain, names, dims = self.constrain, self.names, self.dims
        are_strings = not isinstance(names, str) and all(
            isinstance(one, str) for one in (() if names is None else names)
        )
        function = "a function of a position"
        for name, good, wanted in (
            ("logdensity", callable(self.logdensity), function),
            ("constrain", constrain is None or callable(constrain), f"{function}, or None"),
            ("names", are_strings, "a sequence of strings, or None"),
            ("dims", isinstance(dims, Mapping | None), "a mapping from value names to axis names"),
        ):
            if not good:
                text, kind = repr(getattr(self, name)), type(getattr(self, name)).__name__
                text = text if len(text) <= 60 else f"{text[:57]}..."
                raise TypeError(f"{name}: got {text} of type {kind}; wanted {wanted}")
        if self.initial is None:
            raise TypeError(
                "initial: got None; wanted a position, or a function of a key that draws one"
            )

    def start(self, key: Key) -> PyTree:
        """One start, as JAX arrays of one floating dtype.

        Args:
            key: PRNG key, shape (); used only where `initial` is a function.

        Returns:
            A position. Integers become the default float with a warning; NumPy arrays follow JAX's default dtype.

        Raises:
            InvalidStart: For bool, complex, object or string entries, or float32 and float64 in one position.
            TypeError, ValueError: For a bad key.
        """
        key = check_key(key)
        return check_dtypes(self.initial(key) if callable(self.initial) else self.initial)

    def starts(self, keys: Key) -> PyTree:
        """One start per key, as `start` gives them; a function that JAX can batch is called once for all.

        Args:
            keys: PRNG keys, shape `(C,)`.

        Returns:
            Positions, leaves `(C, ...)`.

        Raises:
            InvalidStart, TypeError, ValueError: As `start`.
        """
        if callable(self.initial):
            try:
                return check_dtypes(
                    run_explicit(_Mapped(self.initial, 1), None, keys, timings=Timings())
                )
            except InvalidStart:
                raise
            except (
                Exception
            ):  # whatever a function for single keys raises on a batch: then one after another
                pass
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(self.start, keys))

    def example(self) -> PyTree:
        """Structure, shapes and types of a position, without computing one where that can be avoided."""
        # What there is to warn of is warned of where starts are made.
        with warnings.catch_warnings(action="ignore"):
            if callable(self.initial):
                if known := getattr(self.initial, "shapes_of_starts", None):
                    return known()
                try:
                    return _shapes_of(self.initial, jax_config.jax_enable_x64)
                except Exception:  # a function that JAX cannot trace
                    pass
            return self.start(jax.random.key(0))

    def constrained_values(
        self, positions: PyTree, timings: Timings, options: dict[str, Any] | None = None
    ) -> dict[str, Array]:
        """Named values in the model's space of positions `(C, T, ...)`.

        Args:
            positions: Unconstrained, leaves `(C, T, ...)`.
            timings: Where seconds are counted.
            options: As for `compile_cache.compiled`.
        """
        if self.constrain is not None:
            return dict(
                run_explicit(
                    *(_Mapped(self.constrain, 2), None, positions),
                    timings=timings,
                    what="certify",
                    options=options,
                )
            )
        if isinstance(positions, dict):
            return dict(positions)
        return {
            jax.tree_util.keystr(path) or "x": leaf
            for path, leaf in jax.tree_util.tree_leaves_with_path(positions)
        }


class _Mapped(HashableFunction):
    """A function of the target, mapped over the first axes of its argument; parts: the function, and how many axes."""

    def __call__(self, nothing, values):
        function, axes = self.parts
        for _ in range(axes):
            function = jax.vmap(function)
        return function(values)


@functools.lru_cache(maxsize=64)
def _shapes_of(initial: Callable, wide: bool) -> PyTree:
    """Shapes of what a function of a key draws, traced once for each setting (`wide`) that decides about its types."""
    return jax.eval_shape(lambda key: check_dtypes(initial(key)), jax.random.key(0))
