"""Markov kernels as dynamical systems."""

from typing import TYPE_CHECKING
from typing import Any as _Any

from partime_mcmc.extras import import_name as _import_name
from partime_mcmc.kernels.coupling import CommonRandomNumbers, MultishiftCoupling
from partime_mcmc.kernels.gibbs import gamma_quantile, gibbs
from partime_mcmc.kernels.kernel import Carry, Kernel, Tape, blackjax_loop
from partime_mcmc.kernels.whitening import Whitening

# Builders need BlackJAX, which certificates do not.
if TYPE_CHECKING:
    from partime_mcmc.kernels.blackjax import from_blackjax
    from partime_mcmc.kernels.builders import coalescing_hmc, hmc, mala, nuts, random_walk

__all__ = [
    "Carry",
    "CommonRandomNumbers",
    "Kernel",
    "MultishiftCoupling",
    "Tape",
    "Whitening",
    "blackjax_loop",
    "coalescing_hmc",
    "from_blackjax",
    "gamma_quantile",
    "gibbs",
    "hmc",
    "mala",
    "nuts",
    "random_walk",
]


def __getattr__(name: str) -> _Any:
    """A builder, imported when it is first used.

    Raises:
        AttributeError: If there is no such name.
        ImportError: If BlackJAX is not installed.
    """
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "kernels.blackjax" if name == "from_blackjax" else "kernels.builders"
    globals()[name] = found = _import_name(f"{__name__}.{name}", module, name)
    return found
