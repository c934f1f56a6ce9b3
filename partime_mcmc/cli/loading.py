"""What to sample, from the command line: `FILE.py:MODEL`, and data by name.

MODEL is a NumPyro model, a `Target`, or a function that returns a `Target`, or a pair `(logdensity, initial)`. Data are
the function's keyword arguments: the arrays of an `.npz` file, or the entries of a `.json` object, lists as arrays.
Loading a file runs it, as Python would. Left out: pickled data, which would run code of its own.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from partime_mcmc.numpyro import from_numpyro
from partime_mcmc.numpyro.model import called
from partime_mcmc.sampling.target import Target
from partime_mcmc.models import MODELS
from partime_mcmc.types import Key


def load_model(source: str) -> Any:
    """What `FILE.py:MODEL` names, or a `BuiltIn` by its name.

    Raises:
        ValueError: If the text is neither, the file cannot be run, or has no such name.
        FileNotFoundError: If there is no such file.
    """
    if source in MODELS:
        return MODELS[source]()
    file, colon, name = source.rpartition(":")
    if not colon or not file.endswith(".py") or not name.isidentifier():
        raise ValueError(
            f"model: got {source!r}, wanted FILE.py:MODEL, such as model.py:model, or a built-in model: "
            f"{', '.join(MODELS)}"
        )
    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"model: there is no file {file}")
    found = vars(_run_file(path))
    if name not in found:
        own = [
            one
            for one in found
            if not one.startswith("_") and callable(found[one]) or isinstance(found[one], Target)
        ]
        raise ValueError(f"model: {file} has no {name!r}{_meant(name, own)}")
    return found[name]


def _run_file(path: Path) -> Any:
    name = path.stem if path.stem not in sys.modules else f"_partime_mcmc_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    folder = str(path.resolve().parent)
    sys.path.insert(0, folder)  # as for `python FILE.py`
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        sys.modules.pop(name, None)
        raise ValueError(
            f"model: running {path} failed: {type(error).__name__}: {error}{_where(error, path)}"
        ) from error
    finally:
        sys.path.remove(folder)
    return module


def _where(error: BaseException, path: Path) -> str:
    """The line of the user's file, if the error came through it."""
    lines, step = [], error.__traceback__
    while step is not None:
        if step.tb_frame.f_code.co_filename == str(path):
            lines.append(step.tb_lineno)
        step = step.tb_next
    return f" (line {lines[-1]})" if lines else ""


def load_data(path: Path | None) -> dict[str, Any]:
    """Data by name; empty without a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither `.npz` nor `.json`, cannot be read, or is no object.
    """
    if path is None:
        return {}
    if not path.is_file():
        raise FileNotFoundError(f"--data: there is no file {path}")
    if path.suffix not in (".npz", ".json"):
        raise ValueError(f"--data: got {path.name}, wanted a file that ends in .npz or .json")
    try:
        if path.suffix == ".json":
            found = json.loads(path.read_text())
        else:
            with np.load(path, allow_pickle=False) as arrays:
                found = dict(arrays)
    except Exception as error:  # zip, pickle, text and JSON all have errors of their own
        raise ValueError(f"--data: {path} cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(
            f"--data: {path} holds a {type(found).__name__}, wanted an object with a name for every value"
        )
    return {name: _value(name, value) for name, value in found.items()}


def _value(name: str, value: Any) -> Any:
    if isinstance(value, list):
        value = np.asarray(value)
        if value.dtype == object:
            raise ValueError(f"--data: {name!r} is no rectangular array of numbers")
    # A number may be a size, which NumPyro wants as Python's own.
    return value.item() if isinstance(value, np.ndarray) and value.ndim == 0 else value


def make_target(model: Any, data: Mapping[str, Any], key: Key) -> Target:
    """The target that a model and its data make.

    Args:
        model: As `load_model` gives it.
        data: Its keyword arguments.
        key: PRNG key, shape (), for tracing and trial starts.

    Raises:
        ValueError: If data are missing or superfluous, or the model returns nothing that can be sampled; and as
            `from_numpyro`.
        TypeError: If the model is no function.
    """
    make = getattr(model, "make_target", None)
    if make is not None or isinstance(model, Target):
        if data:
            raise ValueError(f"--data: {sorted(data)} given, but this model takes no data")
        return make(key) if make is not None else model
    if not callable(model):
        raise TypeError(
            f"model: got a {type(model).__name__}, wanted a NumPyro model, a Target, or a function that "
            "returns one"
        )
    _check_arguments(model, data)
    returned, is_numpyro = called(model, data, key)
    if is_numpyro:
        return from_numpyro(model, key=key, **data)
    if isinstance(returned, Target):
        return returned
    if isinstance(returned, tuple) and len(returned) == 2 and callable(returned[0]):
        return Target(*returned)
    raise ValueError(
        f"model: {getattr(model, '__name__', 'it')} samples nothing with NumPyro and returns a "
        f"{type(returned).__name__}, wanted a Target or a pair (logdensity, initial)"
    )


def _check_arguments(model: Any, data: Mapping[str, Any]) -> None:
    try:
        signature = inspect.signature(model)
    except (TypeError, ValueError):  # a callable that does not say what it takes
        return
    kinds = inspect.Parameter
    named = {
        name: one
        for name, one in signature.parameters.items()
        if one.kind in (kinds.POSITIONAL_OR_KEYWORD, kinds.KEYWORD_ONLY)
    }
    title = f"{getattr(model, '__name__', 'model')}({', '.join(signature.parameters)})"
    held = f"it holds {', '.join(sorted(data))}" if data else "no data were given"
    missing = [
        name for name, one in named.items() if one.default is kinds.empty and name not in data
    ]
    if missing:
        raise ValueError(f"--data: {title} needs {', '.join(map(repr, missing))}; {held}")
    takes_all = any(one.kind == kinds.VAR_KEYWORD for one in signature.parameters.values())
    unknown = [] if takes_all else [name for name in data if name not in named]
    if unknown:
        raise ValueError(
            f"--data: {unknown[0]!r} is no argument of {title}{_meant(unknown[0], named)}"
        )


def _meant(name: str, choices: Iterable[str]) -> str:
    choices = list(choices)
    near = difflib.get_close_matches(name, choices, 1)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; it has {', '.join(choices[:8])}" if choices else ""
