"""Strategies, verdicts and reports of this package as JSON, and back.

A frozen dataclass is its name and its fields, an enumeration's member its name, a function of a module where it is
found, an array its bytes; plain values are themselves. Only names of this package are ever looked up, and no code comes
out of a file: what is read is built by the constructors that a user would call. Objects of other packages are refused
when they are written.
"""

from __future__ import annotations

import base64
import dataclasses
import enum
import importlib
import inspect
import json
from typing import Any

import jax
import numpy as np

from partime_mcmc.storage.chunks import StoreError

_PACKAGE = "partime_mcmc"


class NotStorable(TypeError):
    """A value that a store cannot hold, because it is not of this package."""


def to_json(value: Any, name: str) -> str:
    """A value as JSON text.

    Args:
        value: Plain values, arrays, and frozen dataclasses, enumerations and functions of this package.
        name: What the value is, for the message.

    Raises:
        NotStorable: For anything else.
    """
    return json.dumps(encode(value, name), sort_keys=True)


def from_json(text: str) -> Any:
    """The value of a text from `to_json`; arrays are NumPy's.

    Raises:
        ValueError: If the text names something that is not of this package, or no JSON.
        StoreError: If an object had other fields in the version that wrote it.
    """
    return decode(json.loads(text))


def encode(value: Any, name: str) -> Any:
    """As `to_json`, before it is written as text."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, enum.Enum):
        return {"enum": _place(type(value), name), "value": value.name}
    if type(value) in (int, float):
        return value
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        array = np.asarray(value)
        return {
            "array": base64.b64encode(np.ascontiguousarray(array).tobytes()).decode(),
            "dtype": array.dtype.str,
            "shape": list(array.shape),
        }
    if type(value) is dict:
        return {"dict": {str(key): encode(one, f"{name}[{key!r}]") for key, one in value.items()}}
    if type(value) in (list, tuple):
        items = [encode(one, f"{name}[{index}]") for index, one in enumerate(value)]
        return items if isinstance(value, list) else {"tuple": items}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in dataclasses.fields(value)]
        fields = {field: encode(getattr(value, field), f"{name}.{field}") for field in names}
        return {"class": _place(type(value), name), "fields": fields}
    if inspect.isfunction(value):
        return {"function": _place(value, name)}
    raise _refusal(value, name)


def decode(data: Any) -> Any:
    """As `from_json`, once the text is read."""
    if isinstance(data, list):
        return [decode(one) for one in data]
    if not isinstance(data, dict):
        return data
    if "array" in data:
        raw = base64.b64decode(data["array"])
        return np.frombuffer(raw, np.dtype(data["dtype"])).reshape(data["shape"]).copy()
    if "tuple" in data:
        return tuple(decode(one) for one in data["tuple"])
    if "dict" in data:
        return {key: decode(one) for key, one in data["dict"].items()}
    if "enum" in data:
        return _found(
            data["enum"], lambda found: inspect.isclass(found) and issubclass(found, enum.Enum)
        )[data["value"]]
    if "function" in data:
        return _found(data["function"], inspect.isfunction)
    if "class" in data:
        cls = _found(
            data["class"], lambda found: inspect.isclass(found) and dataclasses.is_dataclass(found)
        )
        fields = {key: decode(one) for key, one in data["fields"].items()}
        try:
            return cls(**fields)
        except TypeError as error:
            raise StoreError(
                f"store: it holds a {cls.__name__} with the fields {sorted(fields)}, which this version of "
                f"partime_mcmc cannot make ({error}); read it with the version that wrote it"
            ) from error
    raise ValueError(f"a stored value of unknown kind: {sorted(data)}")


def _place(thing: Any, name: str) -> str:
    ours = thing.__module__.split(".")[0] == _PACKAGE and "<locals>" not in thing.__qualname__
    frozen = not dataclasses.is_dataclass(thing) or thing.__dataclass_params__.frozen
    if not (ours and frozen):
        raise _refusal(thing, name)
    return f"{thing.__module__}:{thing.__qualname__}"


def _found(place: str, allowed: Any) -> Any:
    """What stands at `module:name` of this package."""
    module, _, qualname = place.partition(":")
    if module.split(".")[0] != _PACKAGE or "." in qualname:
        raise ValueError(f"a stored value names {place!r}, which is not of this package")
    found = getattr(importlib.import_module(module), qualname, None)
    if getattr(found, "__module__", None) != module or not allowed(found):
        raise ValueError(
            f"a stored value names {place!r}, which this version of the package does not have"
        )
    return found


def _refusal(value: Any, name: str) -> NotStorable:
    said = getattr(value, "__qualname__", type(value).__qualname__)
    return NotStorable(
        f"{name}: got {said}, which a store cannot hold; wanted an object of this package, "
        "because a run that is resumed has to make it again without your code"
    )
