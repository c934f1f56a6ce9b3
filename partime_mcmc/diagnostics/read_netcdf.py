"""Draws read back from a file of `save_netcdf`, as an object that `compare` and the tables take.

Files hold values in the model's space, what the kernel recorded of each step, and the certificate, the plan and the
report of the run as JSON in their attributes. Left out: unconstrained positions, warm-up and advice, which are in no
file.
"""

from __future__ import annotations

import dataclasses
import json
import os
from types import SimpleNamespace
from typing import Any

import numpy as np

from partime_mcmc.diagnostics.arviz import STAT_NAMES, read_netcdf

_OWN_NAMES = {arviz: own for own, arviz in STAT_NAMES.items()}


@dataclasses.dataclass(frozen=True)
class ReadDraws:
    """Draws from a file; attributes as those of the draws that were written.

    Attributes:
        constrained: Name to array `(C, T, ...)`.
        info: Name to array `(C, T)`.
        certificate: Its fields per chain, shape `(C,)`; None if the file has none.
        report: Some fields of the run's report; None likewise.
        plan: What gives these draws again.
    """

    constrained: dict[str, np.ndarray]
    info: dict[str, np.ndarray]
    certificate: Any
    report: Any
    plan: dict[str, Any]


def read_draws(path: str | os.PathLike) -> ReadDraws:
    """Read a file of `save_netcdf`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no draws.
    """
    try:
        tree = read_netcdf(path)
        posterior, attributes = tree["posterior"], {**tree["posterior"].attrs, **tree.attrs}
    except FileNotFoundError:
        raise
    except Exception as error:  # HDF5, xarray and either ArviZ have errors of their own
        raise ValueError(
            f"{path} holds no draws: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    stats = tree["sample_stats"].data_vars if "sample_stats" in tree else {}
    info = {_OWN_NAMES.get(name, name): one.values for name, one in stats.items()}
    certificate = _object(attributes.get("certificate"), info)
    return ReadDraws(
        {name: one.values for name, one in posterior.data_vars.items()},
        info,
        certificate,
        _object(attributes.get("run"), {}),
        json.loads(attributes.get("plan", "{}")),
    )


def _object(text: str | None, info: dict[str, np.ndarray]) -> SimpleNamespace | None:
    """The fields in a JSON text, and what was recorded per draw."""
    if text is None:
        return None
    recorded = {name: info[name] for name in ("accepted", "residual") if name in info}
    fields = {name: _number(value) for name, value in json.loads(text).items()}
    return SimpleNamespace(**recorded | fields)


def _number(value: Any) -> Any:
    """Arrays for lists of numbers, among which JSON writes NaN and infinities as text."""
    words = ("nan", "inf", "-inf")
    if (
        isinstance(value, list)
        and value
        and all(isinstance(one, int | float) or one in words for one in value)
    ):
        return np.asarray([float(one) if one in words else one for one in value])
    return float(value) if value in words else value
