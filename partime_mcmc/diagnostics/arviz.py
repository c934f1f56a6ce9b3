"""Draws as ArviZ objects, as NetCDF files and as a table of posterior summaries.

For one scalar quantity with draws ``x`` of shape ``(C, T)`` (C chains, T draws) ArviZ gives the rank-normalised bulk
and tail effective sample size, the rank-normalised split R-hat (Vehtari, Gelman, Simpson, Carpenter, Bürkner 2021,
arXiv:1903.08008) and Monte Carlo standard errors (MCSE); the wrappers here hand them on as Python floats.

Two generations are served and agree to rounding: ArviZ 0.23 (``InferenceData``, Python 3.11) and ArviZ 1.x (xarray's
``DataTree``, Python 3.12 and later). ArviZ is imported at the first call, never when this module is imported.

A chain that never moves deceives the usual diagnostics: ArviZ calls a constant coordinate N effective draws. Here it is
NaN, and tables and attributes carry a ``frozen`` flag of their own. Left out: warm-up draws, and plots other than those
of a page (ArviZ has them: give it :func:`to_arviz`).
"""

import functools
import importlib
import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from partime_mcmc.compile_cache import versions
from partime_mcmc.diagnostics.plots import adopt_figure, figure
from partime_mcmc.diagnostics.values import (
    coordinates,
    escaped,
    flat,
    frozen_chains,
    is_constant,
    named_draws,
    original,
    partly_constant,
    plain,
    stuck,
)

_PER_DRAW = ("accepted", "residual")  # of a certificate, written to sample_stats
# ArviZ's names of some things that kernels record.
STAT_NAMES = {"num_steps": "n_steps", "logdensity": "lp"}


@functools.cache
def _arviz() -> tuple[Any, Any]:
    """The modules that hold the statistics and the converters, whichever generation is installed."""
    if int(importlib.metadata.version("arviz").split(".")[0]) >= 1:
        return importlib.import_module("arviz_stats"), importlib.import_module("arviz_base")
    with warnings.catch_warnings():
        # 0.23 announces its successor on every import; both are served here, so the user has nothing to do about it.
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing a major refactor", FutureWarning)
        import arviz
    return arviz, arviz


def _statistic(name: str, x: np.ndarray, min_chains: int, **options: Any) -> float:
    """One ArviZ statistic of ``x`` (C, T), or NaN where ArviZ would warn or mislead: see :func:`ess_bulk`."""
    x = np.asarray(x, dtype=np.float64)
    if x.ndim != 2:
        raise ValueError(f"x must have shape (num_chains, num_draws), got {x.shape}")
    if x.shape[0] < min_chains or x.shape[1] < 4 or not np.isfinite(x).all() or is_constant(x):
        return float("nan")
    # A constant half of a chain divides 0 by 0 inside; the NaN that results is the answer.
    with np.errstate(all="ignore"):
        return float(getattr(_arviz()[0], name)(x, **options))


def ess_bulk(x: np.ndarray) -> float:
    """Rank-normalised bulk effective sample size of ``x`` (C, T); NaN if not finite, constant, or with T < 4."""
    return _statistic("ess", x, 1, method="bulk")


def ess_tail(x: np.ndarray) -> float:
    """Smaller effective sample size of the 5% and 95% quantiles of ``x`` (C, T); NaN as in :func:`ess_bulk`."""
    return _statistic("ess", x, 1, method="tail", prob=(0.05, 0.95))


def rhat(x: np.ndarray) -> float:
    """Rank-normalised split R-hat of ``x`` (C, T); NaN as in :func:`ess_bulk` and for a single chain."""
    return _statistic("rhat", x, 2, method="rank")


def mcse_mean(x: np.ndarray) -> float:
    """Monte Carlo standard error of the mean of ``x`` (C, T); NaN as in :func:`ess_bulk`."""
    return _statistic("mcse", x, 1, method="mean")


def mcse_sd(x: np.ndarray) -> float:
    """Monte Carlo standard error of the standard deviation of ``x`` (C, T); NaN as in :func:`ess_bulk`."""
    return _statistic("mcse", x, 1, method="sd")


def mcse_quantile(x: np.ndarray, q: float) -> float:
    """Monte Carlo standard error of the ``q`` quantile of ``x`` (C, T); NaN as in :func:`ess_bulk`."""
    return _statistic("mcse", x, 1, method="quantile", prob=q)


def summary_table(draws: Any) -> list[dict[str, Any]]:
    """Posterior summaries of every scalar coordinate, ready to print or to write as JSON.

    Returns:
        One dict per coordinate: ``name``, ``mean``, ``sd``, ``q05``, ``q50``, ``q95``, ``mcse_mean``, ``ess_bulk``,
        ``ess_tail``, ``r_hat`` (floats, NaN where undefined) and ``frozen`` (bool: some chain never moved, so that the
        row says nothing about the posterior).
    """
    frozen, rows = frozen_chains(draws), []
    for name, x in coordinates(named_draws(draws)):
        with np.errstate(all="ignore"):
            q05, q50, q95 = np.quantile(x, [0.05, 0.5, 0.95]) if x.size else [np.nan] * 3
            sd = x.std(ddof=1) if x.size > 1 else np.nan
        row = {
            "name": name,
            "mean": float(x.mean()) if x.size else float("nan"),
            "sd": float(sd),
            "q05": float(q05),
            "q50": float(q50),
            "q95": float(q95),
            "mcse_mean": mcse_mean(x),
            "ess_bulk": ess_bulk(x),
            "ess_tail": ess_tail(x),
            "r_hat": rhat(x),
            "frozen": bool((stuck(x) & frozen).any() or partly_constant(x)),
        }
        rows.append(row)
    return rows


def to_arviz(
    draws: Any, *, coords: Mapping[str, Any] | None = None, dims: Mapping[str, Any] | None = None
) -> Any:
    """Draws as ArviZ knows them: groups ``posterior`` and ``sample_stats``, plain NumPy inside.

    ``sample_stats`` holds what the kernel recorded, under ArviZ's names (``acceptance_rate``, ``diverging``,
    ``energy``, ``n_steps``, ``lp``), and the certificate's ``accepted`` and ``residual``. The attributes of the whole
    (and of ``posterior``) say which library, version and plan made the draws and what the certificate found;
    composite ones are JSON text, flags are 0 or 1, since NetCDF knows strings and numbers only.

    Args:
        draws: draws with ``constrained`` or ``positions`` of shapes (C, T, ...); the rest is optional.
        coords: labels of dimensions, as in ``arviz.from_dict``.
        dims: names of each variable's own dimensions, as in ``arviz.from_dict``.

    Returns:
        ``arviz.InferenceData`` with ArviZ 0.23, ``xarray.DataTree`` with ArviZ 1.x.

    Raises:
        ValueError: as :func:`named_draws`; or if a value has the name of an axis, which ArviZ would put in its place, or two
            axes have one name.

    With ArviZ 1.x names with a slash, which would be paths, are escaped as in addresses of the web: "a/b" is "a%2Fb".

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target, mala, sample, to_arviz
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> draws = sample(jax.random.key(0), target, kernel, num_samples=500)
        >>> dict(to_arviz(draws).posterior.sizes)
        {'chain': 4, 'draw': 500}
    """
    named = named_draws(draws)
    _check_names(named, dims or {})
    return _tree(draws, named, coords or {}, dims)


def _tree(
    draws: Any, named: Mapping[str, np.ndarray], coords: Mapping[str, Any], dims: Any = None
) -> Any:
    certificate = getattr(draws, "certificate", None)
    recorded = {name: getattr(certificate, name, None) for name in _PER_DRAW}
    recorded |= getattr(draws, "info", None) or {}
    recorded = {name: values for name, values in recorded.items() if values is not None}
    attributes = _attributes(draws)
    groups = {"posterior": draws_dataset(named, dims).assign_attrs(attributes)}
    if recorded:
        groups["sample_stats"] = stats_dataset(recorded)
    for group, data in groups.items():
        # As ArviZ does: an axis without labels is numbered.
        labels = {axis: coords.get(axis, np.arange(size)) for axis, size in data.sizes.items()}
        groups[group] = data.assign_coords(labels)
    return tree_of(groups, attributes)


def _check_names(named: Mapping[str, np.ndarray], dims: Mapping[str, Any]) -> None:
    """Refuse values that ArviZ would lose, because an axis has their name."""
    for name, own in dims.items():
        if twice := {"chain", "draw"} & {*own}:
            raise ValueError(
                f"dims: got an axis of {name!r} named {min(twice)!r}, wanted another name: all draws have an axis called so"
            )
    axes = {"chain", "draw"}.union(*(map(str, one) for one in dims.values()))
    for name in named:
        if name in axes:
            raise ValueError(
                f"draws: got a value named {name!r}, wanted another name: an axis of the draws is called so, and ArviZ keeps one "
                "of the two"
            )


def trace_plot(series: Mapping[str, np.ndarray]) -> Any:
    """ArviZ's plot of the draws of every chain, and of their densities.

    Args:
        series: Coordinates by label, `(C, T)` each, all finite.

    Returns:
        `matplotlib.figure.Figure`, drawn by pyplot and then taken from it.

    Raises:
        NoPlots: If matplotlib is missing.
    """
    return _drawn("plot_trace", series, compact=False)


def rank_plot(series: Mapping[str, np.ndarray]) -> Any:
    """ArviZ's plot of the ranks that every chain's draws have among those of all: uniform where chains agree.

    Args and the rest: As :func:`trace_plot`.
    """
    return _drawn("plot_rank", series, kind="vlines")


def _drawn(name: str, series: Mapping[str, np.ndarray], **options: Any) -> Any:
    """A figure by ArviZ's function of this name, which takes the options in generation 0.23."""
    figure(1, 1)  # refuses before ArviZ does
    # A user's name is no formula, and no path in a DataTree.
    posterior = {label.replace("$", r"\$").replace("/", "\u2044"): x for label, x in series.items()}
    converters = _arviz()[1]
    with warnings.catch_warnings(action="ignore"):  # both generations remark on their own insides
        tree = tree_of({"posterior": draws_dataset(posterior)}, {})
        if hasattr(converters, "InferenceData"):
            return adopt_figure(np.ravel(getattr(converters, name)(tree, **options))[0].figure)
        plot = getattr(importlib.import_module("arviz_plots"), name)
        return adopt_figure(plot(tree, backend="matplotlib").viz["figure"].item())


def tree_of(groups: Mapping[str, Any], attributes: Mapping[str, Any]) -> Any:
    """Datasets of xarray as one ArviZ object; nothing in them is read.

    Args:
        groups: Datasets by group.
        attributes: Of the whole.

    Returns:
        As :func:`to_arviz`.
    """
    converters = _arviz()[1]
    if hasattr(converters, "InferenceData"):
        return converters.InferenceData(
            attrs=dict(attributes), warn_on_custom_groups=False, **groups
        )
    import xarray

    groups = dict(groups)
    for group, data in groups.items():
        # Names with a slash would be paths: all of them are escaped where one has it.
        if any("/" in str(name) for name in (*data.variables, *data.dims)):
            groups[group] = _renamed(data, escaped)
    tree = xarray.DataTree.from_dict(groups)
    tree.attrs.update(attributes)
    return tree


def _attributes(draws: Any) -> dict[str, str | int | float]:
    """A file's attributes: strings and numbers only."""
    report, certificate = getattr(draws, "report", None), getattr(draws, "certificate", None)
    frozen = np.flatnonzero(frozen_chains(draws))
    version_of = versions() | (getattr(report, "versions", None) or {})
    attributes: dict[str, str | int | float] = {
        "inference_library": "partime_mcmc",
        "inference_library_version": str(version_of["partime_mcmc"]),
        "frozen": int(frozen.size > 0),
        "frozen_chains": json.dumps(frozen.tolist()),
        "plan": json.dumps(plain(getattr(draws, "plan", None) or {})),
    }
    if certificate is not None:
        fields = {name: value for name, value in vars(certificate).items() if name not in _PER_DRAW}
        attributes |= {
            "certificate": json.dumps(plain(fields)),
            "certified": int(np.all(np.asarray(certificate.certified))),
            "max_residual": float(np.max(np.asarray(certificate.max_residual), initial=0.0)),
        }
    if report is not None:
        wanted = ("status", "iterations", "fallbacks", "dtype", "device", "versions")
        attributes["run"] = json.dumps(
            plain({name: getattr(report, name, None) for name in wanted})
        )
        if getattr(report, "seconds_run", None) is not None:
            attributes["sampling_time"] = float(report.seconds_run)
    return attributes


_ESCAPED = "names_are_escaped"


def save_netcdf(draws: Any, path: str | os.PathLike) -> Path:
    """Write :func:`to_arviz` of the draws to one NetCDF file, which appears complete or not at all.

    Names that HDF5 has no variables of are escaped as in addresses of the web: "a/b" is "a%2Fb".

    Returns:
        The path written.

    Raises:
        OSError: if the file cannot be written; one already there stays as it was.
        ImportError: if h5netcdf or h5py is missing.
    """
    path = Path(path)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        named = named_draws(draws)
        _check_names(named, {})
        tree = _tree(draws, {escaped(name): values for name, values in named.items()}, {})
        tree.attrs[_ESCAPED] = 1
        tree.to_netcdf(str(partial), engine="h5netcdf")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def read_netcdf(path: str | os.PathLike) -> Any:
    """Read a file of :func:`save_netcdf` wholly into memory, so that no handle on it stays open.

    Returns:
        As :func:`to_arviz`.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    return tree_of(*_read_groups(path))


def _read_groups(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Datasets by group with the names that their values had, and the attributes of the whole."""
    import xarray

    if not Path(path).is_file():
        raise FileNotFoundError(f"no NetCDF file at {path}")
    with xarray.open_datatree(str(path), engine="h5netcdf") as tree:
        tree.load()
    groups = {name: one.to_dataset() for name, one in tree.children.items()}
    attributes = {str(name): value for name, value in tree.attrs.items()}
    if attributes.pop(_ESCAPED, None):
        groups = {name: _renamed(one, original) for name, one in groups.items()}
    return groups, attributes


def _renamed(dataset: Any, rename: Callable[[str], str]) -> Any:
    """A dataset with other names of values and axes."""
    names = map(str, {*dataset.variables, *dataset.dims})
    return dataset.rename({name: rename(name) for name in names if rename(name) != name})


def draws_dataset(values: Mapping[str, Any], dims: Mapping[str, Any] | None = None) -> Any:
    """Named arrays (C, T, ...) as an ``xarray.Dataset`` with the dimensions ``chain`` and ``draw`` first.

    Args:
        values: name -> array (C, T, ...).
        dims: names of each variable's own axes; those without one are called ``<name>_dim_<i>``.
    """
    import xarray

    arrays = flat(dict(values))
    axes = axis_names({name: value.shape[2:] for name, value in arrays.items()}, dims)
    variables = {name: (("chain", "draw", *axes[name]), value) for name, value in arrays.items()}
    shape = next(iter(arrays.values())).shape if arrays else (0, 0)
    coords = {"chain": np.arange(shape[0]), "draw": np.arange(shape[1])}
    return xarray.Dataset(variables, coords=coords)


def axis_names(
    shapes: Mapping[str, tuple[int, ...]], dims: Mapping[str, Any] | None
) -> dict[str, tuple[str, ...]]:
    """Names of the axes that values have of their own: those given, and ``<name>_dim_<i>`` for the rest.

    A given name must mean one thing: one that is a value's, that of chains or draws, twice in one value or of two lengths (a
    model may use the name of a plate again) is not used.

    Args:
        shapes: Of one draw of each value, by its name.
        dims: Names that are given, by the value's name.
    """
    given = {
        name: tuple((dims or {}).get(name, ()))[: len(shape)] for name, shape in shapes.items()
    }
    taken, twice, lengths = {"chain", "draw", *shapes}, set(), {}
    for name, own in given.items():
        twice |= {axis for axis in own if own.count(axis) > 1}
        for axis, length in zip(own, shapes[name]):
            lengths.setdefault(axis, set()).add(length)
    usable = {axis for axis, found in lengths.items() if len(found) == 1} - twice - taken

    def named(name, axis, own):
        if axis < len(own) and own[axis] in usable:
            return own[axis]
        made = f"{name}_dim_{axis}"
        while made in taken or made in usable:
            made += "_"
        return made

    return {
        name: tuple(named(name, axis, given[name]) for axis in range(len(shape)))
        for name, shape in shapes.items()
    }


def stats_dataset(info: Mapping[str, Any]) -> Any:
    """What a kernel reports of each step as an ``xarray.Dataset``, by ArviZ's names."""
    return draws_dataset({STAT_NAMES.get(name, name): value for name, value in info.items()})


_OWN_NAMES = {arviz: own for own, arviz in STAT_NAMES.items()}


def by_own_names(stats: Any) -> dict[str, Any]:
    """What a kernel reports of each step, of an ``xarray.Dataset`` by ArviZ's names, by our names; nothing is read."""
    return {_OWN_NAMES.get(name, str(name)): one for name, one in stats.data_vars.items()}


def read_draws(path: str | os.PathLike) -> SimpleNamespace:
    """Read a file of `save_netcdf`.

    Returns:
        Draws with attributes as those of the draws that were written: `constrained`, name to array `(C, T, ...)`;
        `info`, name to array `(C, T)`; `certificate`, its fields per chain, shape `(C,)`, or None if the file has none;
        `report`, some fields of the run's report, or None; `plan`, what gives these draws again.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no draws.
    """
    try:
        groups, attributes = _read_groups(path)
        posterior = groups["posterior"]
        attributes = posterior.attrs | attributes
    except FileNotFoundError:
        raise
    except Exception as error:  # HDF5 and xarray have errors of their own
        raise ValueError(
            f"{path} holds no draws: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from error
    stats = by_own_names(groups["sample_stats"]) if "sample_stats" in groups else {}
    info = {name: one.values for name, one in stats.items()}
    return SimpleNamespace(
        constrained={name: one.values for name, one in posterior.data_vars.items()},
        info=info,
        certificate=_object(attributes.get("certificate"), info),
        report=_object(attributes.get("run"), {}),
        plan=json.loads(attributes.get("plan", "{}")),
    )


def _object(text: str | None, info: dict[str, np.ndarray]) -> SimpleNamespace | None:
    """The fields in a JSON text, and what was recorded per draw."""
    if text is None:
        return None
    recorded = {name: info[name] for name in _PER_DRAW if name in info}
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
