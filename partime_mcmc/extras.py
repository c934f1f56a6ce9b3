"""Names that need an extra: imported when they are first used, with an error that says which extra is missing."""

import importlib
from typing import Any

# By sub-package; all others need "mcmc".
_EXTRAS = {"numpyro": "numpyro", "storage": "store"}


def import_name(asked: str, module: str, name: str | None = None) -> Any:
    """A module of this package, or a name in it.

    Args:
        asked: What the user wrote, for the message.
        module: Below the package, such as "numpyro.mcmc".
        name: What to take from the module; None is the module itself.

    Raises:
        ImportError: Naming the package that is not installed and the extra that brings it.
    """
    try:
        found = importlib.import_module(f"partime_mcmc.{module}")
    except ModuleNotFoundError as error:
        missing = (error.name or "partime_mcmc").split(".")[0]
        if missing == "partime_mcmc":
            raise
        extra = _EXTRAS.get(module.split(".")[0], "mcmc")
        # Of the same kind, so that a name which fails within another is reported once, as what the user asked for.
        raise ModuleNotFoundError(
            f"{asked} needs {missing}; install partime_mcmc[{extra}]", name=missing
        ) from error
    return found if name is None else getattr(found, name)
