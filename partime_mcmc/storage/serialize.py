"""Values of this package as bytes and back: strategies, verdicts and reports as JSON, arrays as an .npz file.

A frozen dataclass is its name and its fields, an enumeration's member its name, a function of a module where it is
found, an array its bytes, a key those of its numbers and the name of its generator; plain values are themselves. Only names of this package are ever looked up, and no code comes
out of a file: what is read is built by the constructors that a user would call. Objects of other packages are refused
when they are written.
"""

import base64
import dataclasses
import enum
import hashlib
import importlib
import inspect
import io
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.storage.files import Damaged, StoreError, digest_of
from partime_mcmc.types import is_key

_PACKAGE = "partime_mcmc"
_DIGEST_LENGTH = len(digest_of(b""))


class NotStorable(TypeError):
    """A value that a store cannot hold, because it is not of this package."""


def encode(value: Any, name: str) -> Any:
    """A value as what JSON knows.

    Args:
        value: Plain values, arrays, and frozen dataclasses, enumerations and functions of this package.
        name: What the value is, for the message.

    Raises:
        NotStorable: For anything else.
    """
    match value:
        case None | bool() | str():
            return value
        case enum.Enum():
            return {"enum": _place(type(value), name), "value": value.name}
        case int() | float() if type(value) in (int, float):
            return value
        case jax.Array() if is_key(value):
            numbers = encode(np.asarray(jax.random.key_data(value)), name)
            return {"key": numbers, "impl": str(jax.random.key_impl(value))}
        case np.ndarray() | np.generic() | jax.Array():
            array = np.asarray(value)
            data = base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
            return {"array": data, "dtype": array.dtype.str, "shape": list(array.shape)}
        case dict() if type(value) is dict:
            return {
                "dict": {str(key): encode(one, f"{name}[{key!r}]") for key, one in value.items()}
            }
        case list() | tuple() if type(value) in (list, tuple):
            items = [encode(one, f"{name}[{index}]") for index, one in enumerate(value)]
            return items if isinstance(value, list) else {"tuple": items}
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                field.name: encode(getattr(value, field.name), f"{name}.{field.name}")
                for field in dataclasses.fields(value)
            }
            return {"class": _place(type(value), name), "fields": fields}
        case _ if inspect.isfunction(value):
            return {"function": _place(value, name)}
        case _:
            raise _refusal(value, name)


def decode(data: Any) -> Any:
    """The value that gave what `encode` returned; arrays other than keys are NumPy's.

    Raises:
        ValueError: If something is named that is not of this package.
        StoreError: If an object had other fields in the version that wrote it.
    """
    match data:
        case list():
            return [decode(one) for one in data]
        case {"array": text, "dtype": dtype, "shape": shape}:
            return np.frombuffer(base64.b64decode(text), np.dtype(dtype)).reshape(shape).copy()
        case {"key": numbers, "impl": kind}:
            return jax.random.wrap_key_data(jnp.asarray(decode(numbers)), impl=kind)
        case {"tuple": items}:
            return tuple(decode(one) for one in items)
        case {"dict": found}:
            return {key: decode(one) for key, one in found.items()}
        case {"enum": place, "value": member}:
            return _found(place, lambda one: inspect.isclass(one) and issubclass(one, enum.Enum))[
                member
            ]
        case {"function": place}:
            return _found(place, inspect.isfunction)
        case {"class": place, "fields": encoded}:
            cls = _found(place, lambda one: inspect.isclass(one) and dataclasses.is_dataclass(one))
            fields = {key: decode(one) for key, one in encoded.items()}
            try:
                return cls(**fields)
            except TypeError as error:
                raise StoreError(
                    f"store: it holds a {cls.__name__} with the fields {sorted(fields)}, which this version of "
                    f"partime_mcmc cannot make ({error}); read it with the version that wrote it"
                ) from error
        case dict():
            raise ValueError(f"a stored value of unknown kind: {sorted(data)}")
    return data


def _place(thing: Any, name: str) -> str:
    ours = thing.__module__.split(".")[0] == _PACKAGE and "<locals>" not in thing.__qualname__
    params = getattr(thing, "__dataclass_params__", None)
    if not (ours and (params is None or params.frozen)):
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
    what = getattr(value, "__qualname__", type(value).__qualname__)
    return NotStorable(
        f"{name}: got {what}, which a store cannot hold; wanted an object of this package, "
        "because a run that is resumed has to make it again without your code"
    )


def digest_arrays(arrays: Iterable[Any]) -> str:
    """A hash of the bytes, shapes and types of some arrays."""
    found = hashlib.sha256()
    for array in arrays:
        array = np.ascontiguousarray(jax.random.key_data(array) if is_key(array) else array)
        found.update(f"{array.dtype.str}{array.shape}".encode())
        found.update(array.tobytes())
    return found.hexdigest()


def json_bytes(value: Any) -> np.ndarray:
    """Plain values as an array of the bytes of their JSON."""
    return np.frombuffer(json.dumps(value, sort_keys=True).encode(), np.uint8)


def part_of(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with a prefix, without it."""
    return {
        name.removeprefix(prefix): array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def pack_arrays(arrays: dict[str, np.ndarray], words: dict[str, Any]) -> tuple[bytes, str]:
    """Named arrays and plain values as the bytes of an .npz file, and their digest, which is the archive's comment."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict[str, Any](arrays), words=json_bytes(words))
    data = buffer.getvalue()
    digest = digest_of(data)
    # An archive ends with the length of its comment.
    return data[:-2] + len(digest).to_bytes(2, "little") + digest.encode(), digest


def unpack_arrays(data: bytes, where: str) -> tuple[dict[str, np.ndarray], dict[str, Any], str]:
    """What `pack_arrays` was given, and its digest; nothing in it is ever executed.

    Args:
        data: The bytes.
        where: The file, for the message.

    Raises:
        Damaged: If the bytes are not those that were written.
    """
    digest = data[-_DIGEST_LENGTH:].decode(errors="replace")
    if digest_of(data[: -_DIGEST_LENGTH - 2] + b"\0\0") != digest:
        raise Damaged(f"store: {where} is damaged (its digest is not the one in it)")
    with np.load(io.BytesIO(data), allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    return arrays, json.loads(arrays.pop("words").tobytes()), digest


def read_words(path: Path) -> tuple[dict[str, Any], str]:
    """The plain values in a file of `pack_arrays`, and its digest, which is not checked.

    Raises:
        Damaged: If they cannot be found in it.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            return json.loads(file["words"].tobytes()), file.zip.comment.decode()
    except Exception as error:  # whatever the readers of archives make of a damaged one
        raise Damaged(f"store: {path} is damaged: {error}") from error
