"""BlackJAX's sampling algorithms as kernels."""

from partime_mcmc.kernels.blackjax_without_backend import blackjax
from partime_mcmc.kernels.kernel import Kernel
from partime_mcmc.types import Array
from partime_mcmc.validation import check_scale


def from_blackjax(
    algorithm: blackjax.SamplingAlgorithm,
    *,
    noise_scale: Array | float | None = None,
    name: str = "blackjax",
) -> Kernel:
    """A BlackJAX sampling algorithm as a kernel.

    Works for algorithms whose step is a pure function: MALA, HMC, multinomial and dynamic HMC, NUTS, GHMC, MCLMC, Barker,
    elliptical slice, random walks, and your own.

    Args:
        algorithm: As returned by `blackjax.mala(logdensity, step_size)` and the like.
        noise_scale: Standard deviation of the proposal's noise in flat coordinates, if known: certificates then report
            residuals in this unit, otherwise in standard deviations of the chain.
        name: For reports.

    Raises:
        TypeError: If it has no `init` and `step`.
        ValueError: If `noise_scale` is not positive and finite.

    Examples:
        >>> import blackjax, jax, jax.numpy as jnp
        >>> from partime_mcmc import from_blackjax, rollout
        >>> kernel = from_blackjax(blackjax.barker_proposal(lambda x: -0.5 * jnp.sum(x**2), 0.5))
        >>> state = kernel.init(jnp.ones(2))
        >>> tape = kernel.tape(jax.random.key(0), 100, state)
        >>> path = rollout(kernel.dynamics(), kernel.carry(state), tape)
        >>> path.shape
        (100, 2)
    """
    for method in ("init", "step"):
        if not callable(getattr(algorithm, method, None)):
            raise TypeError(
                f"algorithm: got {type(algorithm).__name__} without a function `{method}`, wanted a BlackJAX "
                "SamplingAlgorithm such as blackjax.mala(logdensity, step_size)"
            )
    if noise_scale is not None:
        check_scale(noise_scale, "noise_scale")
    return Kernel(algorithm, noise_scale=noise_scale, name=name)
