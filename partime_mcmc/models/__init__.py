"""Built-in models: small, real, and quick to sample.

`MODELS` maps a name to a function without arguments that describes the model; nothing is read or traced before its
`make_target(key)` is called.
"""

import functools
from dataclasses import dataclass
from typing import Callable

from partime_mcmc.models import banana, eight_schools, logistic
from partime_mcmc.sampling.target import Target
from partime_mcmc.types import Key


@dataclass(frozen=True)
class BuiltIn:
    """A model that ships with the library.

    Attributes:
        name: The name on the command line.
        description: One line.
        make_target: A key, shape (), to the `Target`; the data are read and the model is traced here.
        needs_float64: Whether float32 is too coarse for it; whoever runs it turns float64 on, the library never does.
        source: Where data and model come from.
    """

    name: str
    description: str
    make_target: Callable[[Key], Target]
    needs_float64: bool
    source: str


MODELS: dict[str, Callable[[], BuiltIn]] = {
    "eight_schools": functools.partial(
        BuiltIn,
        name="eight_schools",
        description="Eight schools, non-centred hierarchical normal model (D = 10)",
        make_target=eight_schools.make_target,
        needs_float64=True,
        source="Rubin (1981), Journal of Educational Statistics 6(4)",
    ),
    "logistic": functools.partial(
        BuiltIn,
        name="logistic",
        description="Logistic regression on the American National Election Study of 1996 (N = 944, D = 25)",
        make_target=logistic.make_target,
        needs_float64=False,
        source="American National Election Study 1996, public domain, via statsmodels.datasets.anes96",
    ),
    "banana": functools.partial(
        BuiltIn,
        name="banana",
        description="A bent normal density with known moments (D = 2)",
        make_target=banana.make_target,
        needs_float64=False,
        source="Haario, Saksman and Tamminen (1999), Computational Statistics 14",
    ),
}
"""Every built-in model by name."""

__all__ = ["MODELS", "BuiltIn"]
