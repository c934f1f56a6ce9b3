"""Kernels of one builder on one density: compiled once, whatever warm-up chose.

A kernel that captures its step size, its metric and the model's data is a new program for every run. A `KernelProgram` is
what these kernels share (the density's program, the builder, the settings that fix shapes), and `KernelParams` what
distinguishes them; `ParametrisedKernel` is one of its kernels and hands its numbers to solvers as parameters of the dynamics.
Families compare equal where their kernels differ in numbers only, so that `jit` finds its code again, across seeds and
calls.
"""

import dataclasses
import functools
import inspect
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.kernels import Kernel, Whitening
from partime_mcmc.kernels.coupling import CommonRandomNumbers, Coupling, check_coupling
from partime_mcmc.kernels.traced_gradient import WithTracedGradient, unoptimised_seconds
from partime_mcmc.tracing import HashableFunction, WithoutParams, explicit
from partime_mcmc.types import Array, PyTree, pytree
from partime_mcmc.validation import describe

Builder = Callable[..., Kernel]

# What a transition costs besides gradients where the compiler was not asked to optimise, and how many gradients are usual.
_SECONDS_PER_STEP, _SECONDS_PER_COORDINATE, _GRADIENTS_PER_STEP = 3e-6, 1.5e-7, 5
# How many times faster gradients of some size are where it was; a loop over fewer chains takes as long as one over these.
_OPTIMISED, _CHAINS_OF_A_LOOP = 10, 4


@pytree()
class KernelParams:
    """What distinguishes kernels of a family.

    Attributes:
        data: What the density captured: the model's data.
        whitening: The coordinates.
        settings: Step sizes, and counts such as leapfrog steps, by the builder's argument names; scalars.
    """

    data: PyTree
    whitening: Whitening
    settings: dict[str, Array]


@dataclasses.dataclass(frozen=True)
class KernelProgram:
    """What kernels share.

    Attributes:
        density: `(data, position) -> log density`.
        builder: `(logdensity, *, metric, ...) -> Kernel`.
    """

    density: Callable[[PyTree, PyTree], Array]
    builder: Builder

    def kernel(self, numbers: KernelParams) -> Kernel:
        """The kernel of given numbers, which may be traced."""
        return self.builder(
            functools.partial(self.density, numbers.data),
            metric=numbers.whitening,
            **numbers.settings,
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParametrisedKernel(Kernel):
    """A kernel that knows its family, and whose `dynamics` and `recording` have its numbers as parameters."""

    family: KernelProgram
    numbers: KernelParams

    def _parts(self) -> tuple[Callable, PyTree]:
        return functools.partial(_Part, self.family), self.numbers

    def unoptimised_seconds(self, num_steps: float) -> float:
        """How long so many transitions take, random numbers and certificate included, in programs that were not optimised."""
        return self.own_seconds(num_steps) + self._gradient_seconds(num_steps)

    def loop_seconds(self, num_steps: int, num_chains: int) -> float:
        """How long a loop over the steps of chains takes at most, optimised or too short for that; by shapes and counts alone."""
        transitions = num_steps * max(num_chains, _CHAINS_OF_A_LOOP)
        return self.own_seconds(transitions) + self._gradient_seconds(transitions) / _OPTIMISED

    def own_seconds(self, transitions: float) -> float:
        """How long all but the gradients takes."""
        return transitions * (_SECONDS_PER_STEP + self._dimension * _SECONDS_PER_COORDINATE)

    def _gradient_seconds(self, transitions: float) -> float:
        num_gradients = transitions * _GRADIENTS_PER_STEP
        return unoptimised_seconds(self.family.density, self._dimension, num_gradients)

    @property
    def _dimension(self) -> int:
        return self.numbers.whitening.center.size


def parametrised_kernel(
    family: KernelProgram, data: PyTree, whitening: Whitening, settings: dict[str, Any]
) -> ParametrisedKernel:
    """The kernel of a family with the settings that warm-up chose.

    Args:
        family: What the kernel shares with others.
        data: What the density captured.
        whitening: The coordinates.
        settings: By the builder's argument names. All are numbers of the program, counts too, so that another number of
            leapfrog steps is no other program.
    """

    def number(value):
        is_count = jnp.issubdtype(jnp.result_type(value), np.integer)
        dtype = np.int32 if is_count else whitening.center.dtype
        # On the host: a conversion on the device is a program of its own.
        return (
            value.astype(dtype)
            if isinstance(value, jax.Array)
            else jax.device_put(np.asarray(value, dtype))
        )

    sizes = {name: number(value) for name, value in settings.items()}
    numbers = KernelParams(data, whitening, sizes)
    kernel = family.kernel(numbers)
    fields = {field.name: getattr(kernel, field.name) for field in dataclasses.fields(Kernel)}
    return ParametrisedKernel(**fields, family=family, numbers=numbers)


class _Part(HashableFunction):
    """A method of the kernels of a family, numbers first."""

    def __call__(self, numbers: KernelParams, *args: PyTree) -> PyTree:
        family, name = self.parts
        return getattr(family.kernel(numbers), name)(*args)


def density_of(
    logdensity: Callable[[PyTree], Array], example: PyTree
) -> tuple[WithTracedGradient, PyTree]:
    """A density as `(data, position) -> scalar`, the same object for the same density, and the data that it captured."""
    density, data = explicit(WithoutParams(logdensity), None, example)
    return WithTracedGradient(density), data


class _Alone(HashableFunction):
    """The family of a kernel that came tuned: itself, with its coordinates and the unit in which it is judged."""

    def __init__(self, kernel: Kernel):
        unit = None if kernel.noise_scale is None else np.asarray(kernel.noise_scale)
        told = None if unit is None else (unit.dtype.str, unit.shape, unit.tobytes())
        super().__init__(
            kernel.algorithm.init, kernel.algorithm.step, kernel.enter, kernel.leave, told
        )
        self._kernel = kernel

    def kernel(self, numbers: None) -> Kernel:
        """The kernel."""
        return self._kernel


def program_and_params(kernel: Kernel) -> tuple[Any, PyTree]:
    """What makes a kernel again inside a program, `family.kernel(numbers)`, and the numbers."""
    return (
        (kernel.family, kernel.numbers)
        if isinstance(kernel, ParametrisedKernel)
        else (_Alone(kernel), None)
    )


# --- what a builder has fixed ---------------------------------------------------------------------------------------


def unwrapped(builder: Builder) -> tuple[Builder, dict[str, Any]]:
    """A builder and what partial applications have fixed."""
    fixed: dict[str, Any] = {}
    while isinstance(builder, functools.partial):
        fixed = {**builder.keywords, **fixed}
        builder = builder.func
    return builder, fixed


@functools.cache
def with_coupling(builder: Builder, coupling: Coupling) -> Builder:
    """A builder with its coupling fixed; the same object each time, so that compiled code is found again."""
    return functools.partial(builder, coupling=coupling)


def takes_coupling(builder: Any) -> bool:
    """Whether a builder has an argument `coupling` that nobody has fixed."""
    builder, fixed = unwrapped(builder)
    try:
        return "coupling" in inspect.signature(builder).parameters and "coupling" not in fixed
    except (TypeError, ValueError):
        return False


def fixed_coupling(kernel: Any, coupling: Coupling) -> Builder:
    """The builder with the coupling that was asked for.

    Raises:
        TypeError: If `coupling` is none, or the kernel has no choice left.
    """
    check_coupling(coupling)
    if isinstance(kernel, Kernel) or not takes_coupling(kernel):
        raise TypeError(
            f"coupling: got {coupling!r} with {describe(kernel)}, wanted a builder that takes a coupling (mala, hmc, "
            "random_walk): that of other kernels is fixed"
        )
    return with_coupling(kernel, coupling)


def coupling_of(kernel: Kernel) -> str:
    """The coupling of a tuned kernel in words, for plans."""
    if not isinstance(kernel, ParametrisedKernel):
        return "the kernel's own"
    return repr(unwrapped(kernel.family.builder)[1].get("coupling", CommonRandomNumbers()))
