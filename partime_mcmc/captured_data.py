"""What a function reads besides its arguments: closures, globals, defaults, attributes of objects, by content.

A traced function keeps the values that it read. If a notebook cell rebinds a global array, or writes into one, the function
is the same object and computes something else. `data_read_by` names every such variable with a token,

    token(array) = its type, shape and the digest of its bytes,      token(number or text) = itself,
    token(immutable or unknown object) = the object itself, compared by identity,

so that two equal fingerprints mean that nothing was rebound and no array changed in place. Code of libraries is followed into
its closures and arguments, where functions of the user are found, but not into its globals.

Left out: what a function reads from files, from modules of libraries, or from attributes that are computed.
"""

import functools
import hashlib
import os
import pickle
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Callable, NamedTuple

import jax
import numpy as np

_LIBRARY_FOLDERS = ("site-packages", "dist-packages")
_OWN_FOLDER = str(Path(__file__).parent) + os.sep
_STANDARD_FOLDER = str(Path(types.__file__).parent) + os.sep
# Deeper than data are nested, and short of what would take long to look through.
_MOST_LEVELS, _MOST_ITEMS = 8, 10_000


class _Same:
    """An object compared by identity, and kept alive, so that no other one gets its address."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


class _Reader:
    """Walks through functions and objects; fills `tokens`, `jitted` and `arrays`, those of JAX.

    Owners of variables are known by the way to them: wrappers are made anew for each run, and what they wrap is the same.
    """

    def __init__(self):
        self.tokens: dict[tuple, Any] = {}
        self.jitted: list[Any] = []
        self.arrays: list[jax.Array] = []
        self._seen: dict[int, tuple[tuple, Any]] = {}

    def token(self, value: Any, way: tuple = ()) -> Any:
        """What stands for a value; functions inside are walked through."""
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes, np.generic)):
            # NaN is not itself, and 1, 1.0 and True are equal.
            return type(value).__name__, repr(value)
        if isinstance(value, np.ndarray):
            return _of_array(value)
        if isinstance(value, jax.Array):
            self.arrays.append(value)
            return _Same(value)
        if isinstance(value, types.ModuleType) or len(way) > _MOST_LEVELS:
            return _Same(value)
        if isinstance(value, (list, tuple, set, frozenset)):
            if len(value) > _MOST_ITEMS:
                return _Same(value), len(value)
            items = enumerate(value)
            return type(value).__name__, *(self.token(one, (*way, place)) for place, one in items)
        if isinstance(value, Mapping):
            if len(value) > _MOST_ITEMS:
                return _Same(value), len(value)
            items = ((repr(key), one) for key, one in value.items())
            return "mapping", *((key, self.token(one, (*way, key))) for key, one in items)
        if isinstance(value, types.BuiltinFunctionType):
            return _Same(value)
        if isinstance(value, type):
            if is_library(getattr(sys.modules.get(value.__module__), "__file__", None)):
                return _Same(value)
        elif hasattr(value, "__array__"):
            try:
                return _of_array(value)
            except TypeError:  # keys are no numbers
                return _Same(value)
        elif _is_jaxs_own(value):
            return _Same(value)
        parts = self._parts(value)
        if id(value) not in self._seen:
            self._seen[id(value)] = way, value
            for name, part in parts.items():
                self.tokens[way, name] = self.token(part, (*way, name))
        return self._seen[id(value)][0], _Same(getattr(value, "__code__", type(value)))

    def _parts(self, value: Any) -> dict[str, Any]:
        """What a function reads, or an object holds, by name."""
        if isinstance(value, functools.partial):
            return {"func": value.func, "args": value.args, "keywords": value.keywords}
        if isinstance(value, types.MethodType):
            return {"self": value.__self__, "function": value.__func__}
        if isinstance(value, type):
            return _of_class(value)
        wrapped = getattr(value, "__wrapped__", None)
        parts = {} if wrapped is None else {"wrapped": wrapped}
        if isinstance(value, types.FunctionType):
            return parts | _variables(value)
        if wrapped is not None and hasattr(value, "clear_cache"):
            self.jitted.append(value)
            return parts
        parts |= getattr(value, "__dict__", None) or {}
        for name in getattr(type(value), "__slots__", ()) or ():
            if isinstance(name, str) and hasattr(value, name):
                parts[name] = getattr(value, name)
        call = next(
            (vars(one)["__call__"] for one in type(value).__mro__ if "__call__" in vars(one)), None
        )
        parts["class"] = type(value)
        return parts | ({"call": call} if isinstance(call, types.FunctionType) else {})


def _of_class(value: type) -> dict[str, Any]:
    """What a class of the user's holds: attributes, what its methods read, and classes that it is made from."""
    parts: dict[str, Any] = {"bases": value.__bases__}
    for name, part in vars(value).items():
        part = part.fget if isinstance(part, property) else part
        part = part.func if isinstance(part, functools.cached_property) else part
        part = part.__func__ if isinstance(part, (staticmethod, classmethod)) else part
        is_function = isinstance(part, types.FunctionType)
        if is_function or not (name.startswith(("__", "_abc_")) or hasattr(part, "__get__")):
            parts[name] = part
    return parts


def _is_jaxs_own(value: Any) -> bool:
    """Whether it is an object that JAX made, such as a trace: these do not change, and are large. Not what wraps a function of the
    user's, with `jit` or a derivative of its own."""
    made_by = type(value).__module__.partition(".")[0]
    is_wrapper = hasattr(value, "__wrapped__") or isinstance(value, functools.partial)
    return made_by in ("jax", "jaxlib") and not is_wrapper and not hasattr(value, "clear_cache")


def _of_array(value: Any) -> Any:
    array = np.asarray(value)
    if array.dtype.hasobject:
        try:
            return "objects", hashlib.sha256(pickle.dumps(value)).digest()
        except Exception:  # whatever an object raises that cannot be pickled
            return _Same(value)
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return "array", array.dtype.str, array.shape, hashlib.sha256(data.data).digest()


def _variables(function: types.FunctionType) -> dict[str, Any]:
    """What a Python function reads, by name."""
    code, found = function.__code__, {}
    for name, cell in zip(code.co_freevars, function.__closure__ or ()):
        try:
            found[f"closure {name}"] = cell.cell_contents
        except ValueError:  # not bound yet
            found[f"closure {name}"] = None
    defaults = {"defaults": function.__defaults__, "keywords": function.__kwdefaults__}
    found |= {name: value for name, value in defaults.items() if value}
    if not is_library(code.co_filename):
        for name in sorted(_names(code)):
            if name in function.__globals__:
                value = function.__globals__[name]
                found[f"global {name}"] = value
                if _is_users_module(value):
                    found[f"module {name}"] = _attributes(value, _names(code))
    return found


def _is_users_module(value: Any) -> bool:
    return isinstance(value, types.ModuleType) and not is_library(getattr(value, "__file__", None))


def _attributes(module: types.ModuleType, names: set[str], level: int = 0) -> dict[str, Any]:
    """Attributes of a module, and of modules in it, that have one of these names."""
    found = {name: vars(module)[name] for name in names if name in vars(module)}
    return {
        name: _attributes(one, names, level + 1)
        if _is_users_module(one) and level < _MOST_LEVELS
        else one
        for name, one in found.items()
    }


def _names(code: types.CodeType) -> set[str]:
    """Names of globals and attributes in a function and in the functions written inside it."""
    inner = [_names(one) for one in code.co_consts if isinstance(one, types.CodeType)]
    return set(code.co_names).union(*inner)


@functools.lru_cache(maxsize=4096)
def is_library(file: str | None) -> bool:
    """Whether a file is not the user's own: of a library, of Python, or of this package; None is."""
    if file is None:
        return True
    return (
        any(folder in file for folder in _LIBRARY_FOLDERS)
        or file.startswith((_OWN_FOLDER, _STANDARD_FOLDER, f"{sys.prefix}/lib/python"))
        or file.startswith("<frozen")
    )


# Packages by whose versions programs on disk are known.
VERSIONED = ("partime_mcmc", "jax", "jaxlib", "numpyro", "blackjax", "numpy")


def has_version(file: str) -> bool:
    """Whether a file is this package's, or that of an installed package in `VERSIONED`."""
    folder, _, package = file.rpartition("-packages/")
    return file.startswith(_OWN_FOLDER) or bool(folder) and package.split("/")[0] in VERSIONED


class Read(NamedTuple):
    """What a function reads besides its arguments.

    Attributes:
        tokens: By owner and name of each variable.
        jitted: The functions compiled by `jax.jit` among what was walked through.
        arrays: The arrays of JAX among it.
    """

    tokens: dict[tuple, Any]
    jitted: list[Any]
    arrays: list[jax.Array]


def data_read_by(function: Callable) -> Read:
    """What a function, any callable, reads besides its arguments."""
    reader = _Reader()
    reader.tokens[None, "function"] = reader.token(function)
    return Read(reader.tokens, reader.jitted, reader.arrays)
