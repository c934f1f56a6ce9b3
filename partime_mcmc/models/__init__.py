"""Built-in models: small, real, and quick to sample.

`MODELS` maps a name to a function without arguments that describes the model; nothing is read or traced before its
`make_target(key)` is called.
"""

from typing import Callable

from partime_mcmc.models import banana, eight_schools, logistic
from partime_mcmc.models.builtin import BuiltIn

MODELS: dict[str, Callable[[], BuiltIn]] = {
    "eight_schools": eight_schools.built_in,
    "logistic": logistic.built_in,
    "banana": banana.built_in,
}
"""Every built-in model by name."""

__all__ = ["MODELS", "BuiltIn"]
