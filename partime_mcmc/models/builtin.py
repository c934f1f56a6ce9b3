"""What a built-in model is: a target with a name, a description and a source."""

from dataclasses import dataclass
from typing import Callable

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
