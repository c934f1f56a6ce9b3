"""The kernels that a NumPyro user names: what is built and tuned, and which arguments fix what."""

from __future__ import annotations

import functools
from typing import Any, Callable

from partime_mcmc.diagnostics.checks import check_count
from partime_mcmc.kernels import (
    Kernel,
    MultishiftCoupling,
    Whitening,
    coalescing_hmc,
    hmc,
    mala,
    nuts,
)
from partime_mcmc.numpyro.arguments import check_positive
from partime_mcmc.numpyro.base import ParallelKernel


class HMC(ParallelKernel):
    """BlackJAX's HMC, by default with paths of a quarter period.

    Args:
        model, potential_fn, step_size, ...: As for every kernel here.
        num_steps: Fixed number of leapfrog steps; None lets warm-up choose.
        trajectory_length: Path length in whitened units; None is a quarter period of a standard normal.
    """

    builder = staticmethod(hmc)

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        num_steps: int | None = None,
        trajectory_length: float | None = None,
        **options: Any,
    ):
        self._num_steps = None if num_steps is None else check_count(num_steps, "num_steps", 1)
        self._trajectory_length = check_positive(trajectory_length, "trajectory_length")
        super().__init__(model, potential_fn, **options)

    def _path_length(self) -> float | None:
        return self._trajectory_length

    def _fixed(self) -> dict[str, Any]:
        return {
            **super()._fixed(),
            **({} if self._num_steps is None else {"num_integration_steps": self._num_steps}),
        }


class CoalescingHMC(HMC):
    """Quarter-period HMC with a coalescing Langevin step after every `every`-th trajectory: the kernel to take unless
    you know better.

    Args:
        model, potential_fn, step_size, num_steps, trajectory_length, ...: As for `HMC`.
        every: Trajectories per Langevin step.
    """

    builder = staticmethod(coalescing_hmc)

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        every: int = 4,
        **options: Any,
    ):
        self._every = check_count(every, "every", 1)
        super().__init__(model, potential_fn, **options)

    def _fixed(self) -> dict[str, Any]:
        return {**super()._fixed(), **({} if self._every == 4 else {"every": self._every})}


class MALA(ParallelKernel):
    """The Metropolis-adjusted Langevin algorithm with dice that coalesce; step sizes are BlackJAX's ε."""

    builder = staticmethod(functools.partial(mala, coupling=MultishiftCoupling()))


class NUTS(ParallelKernel):
    """BlackJAX's No-U-Turn sampler.

    Args:
        model, potential_fn, step_size, ...: As for every kernel here.
        max_tree_depth: Doublings at most; of a pair the second counts, as after NumPyro's warm-up.
    """

    builder = staticmethod(nuts)

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        max_tree_depth: int | tuple[int, int] = 10,
        **options: Any,
    ):
        depth = max_tree_depth[-1] if isinstance(max_tree_depth, tuple) else max_tree_depth
        self._max_tree_depth = check_count(depth, "max_tree_depth", 1)
        super().__init__(model, potential_fn, **options)

    def _fixed(self) -> dict[str, Any]:
        return {
            **super()._fixed(),
            **({} if self._max_tree_depth == 10 else {"max_num_doublings": self._max_tree_depth}),
        }


class BlackJAXKernel(ParallelKernel):
    """Any BlackJAX algorithm, in whitened coordinates.

    Args:
        build: `(logdensity, step_size) -> blackjax.SamplingAlgorithm`; positions are vectors `(D,)` there. The step
            size is tuned by trials of the algorithm itself unless given.
        model, potential_fn, ...: As for every kernel here.
    """

    def __init__(
        self,
        build: Callable,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        **options: Any,
    ):
        if not callable(build):
            raise TypeError(
                f"build: got {build!r}, wanted a function (logdensity, step_size) -> SamplingAlgorithm"
            )
        self.builder = _Whitened(build)
        super().__init__(model, potential_fn, **options)


class _Whitened:
    """A builder in our shape of one in BlackJAX's."""

    def __init__(self, build: Callable):
        self.build = build

    def __call__(self, logdensity: Callable, step_size: float, metric: Whitening) -> Kernel:
        algorithm = self.build(lambda z: logdensity(metric.leave(z)), step_size)
        return Kernel(algorithm, metric.enter, metric.leave, None, "blackjax")

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Whitened) and self.build == other.build

    def __hash__(self) -> int:
        return hash(self.build)
