"""Draws read back from a file: what was written by `save_netcdf`, as an object that `compare` and the tables take.

Files hold values in the model's space, what the kernel said of each step, and the certificate, the plan and the report
of the run as JSON in their attributes. Left out: unconstrained positions, the warm-up and the advice, which are in no
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

_OURS = {theirs: ours for ours, theirs in STAT_NAMES.items()}


@dataclasses.dataclass(frozen=True)
class ReadDraws:
    """Draws from a file; attributes as those of the draws that were written.

    Attributes:
        constrained: Name to array `(C, T, ...)`.
        info: Name to array `(C, T)`.
        certificate: Its fields per chain, shape `(C,)`; None if the file has none.
        report: Some fields of the run's report; None likewise.
        plan: What gives these draws again.
        dims: Axis names of constrained values.
        names: The values worth showing; None: all.
        warmup: What is known of the warm-up, in words; None: nothing.
        advice: What was advised, likewise.
    """

    constrained: dict[str, np.ndarray]
    info: dict[str, np.ndarray]
    certificate: Any
    report: Any
    plan: dict[str, Any]
    dims: dict[str, tuple[str, ...]]
    names: tuple[str, ...] | None = None
    warmup: str | None = None
    advice: str | None = None


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
    return draws_of(
        posterior,
        dict(tree["sample_stats"].data_vars) if "sample_stats" in tree else {},
        attributes,
    )


def draws_of(posterior: Any, sample_stats: dict[str, Any], attributes: dict[str, Any]) -> ReadDraws:
    """The draws of xarray's groups.

    Args:
        posterior: Dataset with dimensions `chain` and `draw` first.
        sample_stats: By ArviZ's names, likewise.
        attributes: As `to_arviz` writes them.
    """
    certificate, run = _object(attributes, "certificate"), _object(attributes, "run")
    stats = {_OURS.get(name, name): np.asarray(one.values) for name, one in sample_stats.items()}
    if certificate is not None:
        vars(certificate).setdefault("accepted", stats.get("accepted"))
        vars(certificate).setdefault("residual", stats.get("residual"))
    return ReadDraws(
        {name: np.asarray(one.values) for name, one in posterior.data_vars.items()},
        stats,
        certificate,
        run,
        json.loads(attributes.get("plan", "{}")),
        {name: tuple(one.dims[2:]) for name, one in posterior.data_vars.items()},
    )


def _object(attributes: dict[str, Any], name: str) -> Any:
    if name not in attributes:
        return None
    return SimpleNamespace(
        **{field: _number(value) for field, value in json.loads(attributes[name]).items()}
    )


def _number(value: Any) -> Any:
    """Arrays for lists of numbers, among which JSON writes NaN as text."""
    words = ("nan", "inf", "-inf")
    if (
        isinstance(value, list)
        and value
        and all(isinstance(one, (int, float)) or one in words for one in value)
    ):
        return np.asarray([float(one) if one in words else one for one in value])
    return float(value) if value in words else value
