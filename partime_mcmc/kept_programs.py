"""Programs that outlive their process: found again before they are traced.

JAX's own cache on disk knows a program by its lowered text, so that every process traces and lowers it once more, which takes
longer than to load it. Here a program is known by what it is made from:

    the function      its class and parts: numbers, functions and classes of libraries by name, and traced functions
                      (`tracing.Explicit`), densities among them, by their text
    its arguments     structure, shapes and types
    everything else   this package's source, versions of libraries, JAX's settings, the compiler's options, the processor

What has a part that none of this describes is not kept: a function of the user's that was not traced, or one whose text and
versions do not say all that it computes (`tracing.Explicit`).
"""

import contextlib
import dataclasses
import enum
import functools
import hashlib
import os
import pathlib
import pickle
import platform
import re
import tempfile
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import serialize_executable

from partime_mcmc.captured_data import VERSIONED
from partime_mcmc.tracing import Explicit, HashableFunction
from partime_mcmc.types import PyTree, jax_config, settings

# Of programs on disk, JAX's own among them; those that were not wanted for longest make room.
_MOST_BYTES = 2**30
_SUFFIX = ".program"
_DIGEST = 20
_IMPORTED = time.time()
_PLAIN = (type(None), bool, int, float, complex, str, bytes, np.dtype, np.generic)


class _Unknown(Exception):
    """Something has no description that another process would understand."""


def name_of(*parts: Any) -> str | None:
    """What a program is known by in every process; None where there is no such name.

    Args:
        *parts: What it belongs to: its function, the structure of its arguments, their shapes and types, options.
    """
    try:
        words = _described((*parts, _process(), _of_jax()))
        return _digest("".join(words).encode()).hex()
    except _Unknown:
        return None


def path_of(folder: pathlib.Path, *parts: Any) -> pathlib.Path | None:
    """Where a program lies in a folder; None where it has no name (`name_of`)."""
    name = name_of(*parts)
    return None if name is None else folder / f"{name}{_SUFFIX}"


def load(path: pathlib.Path, args: PyTree) -> jax.stages.Compiled | None:
    """A program from disk; None if it is not there, or not in a state to be used.

    Args:
        path: From `path_of`.
        args: Of the program.
    """
    try:
        kept = path.read_bytes()
    except OSError:
        return None
    with contextlib.suppress(OSError):  # it may be somebody else's
        os.utime(path)
    digest, data = kept[:_DIGEST], kept[_DIGEST:]
    if digest != _digest(data):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
        return None
    try:
        program, result = pickle.loads(data)
        return serialize_executable.deserialize_and_load(
            program,
            jax.tree.structure((args, {})),
            jax.tree.structure(result),
            execution_devices=jax.local_devices()[:1],
        )
    except Exception:  # whatever keeps it from being loaded here: it is made again
        return None


# In this thread, how many programs JAX took from its own cache.
_TAKEN = threading.local()


def _count_taken(event: str, **_: Any) -> None:
    if event == "/jax/compilation_cache/cache_hits":
        _TAKEN.count = getattr(_TAKEN, "count", 0) + 1


@functools.cache
def _listen() -> None:
    jax.monitoring.register_event_listener(_count_taken)


def compiled_anew(lowered: jax.stages.Lowered, options: Any) -> tuple[jax.stages.Compiled, bool]:
    """A compiled program, and whether the compiler made it: XLA for CPUs cannot write one that it has read (JAX 0.10 to 0.12,
    what is written lacks the machine code of fusions)."""
    _listen()
    before = getattr(_TAKEN, "count", 0)
    return lowered.compile(options), getattr(_TAKEN, "count", 0) == before


def save(path: pathlib.Path, program: jax.stages.Compiled) -> None:
    """Keep a program on disk, if it can be; a full disk or a structure that cannot be written is no error.

    Args:
        path: From `path_of`.
        program: Compiled for one device.
    """
    with contextlib.suppress(Exception):
        written, _, structure = serialize_executable.serialize(program)
        data = pickle.dumps((written, jax.tree.unflatten(structure, range(structure.num_leaves))))
        if jax.tree.structure(pickle.loads(data)[1]) == structure:
            # Several processes may write it at a time.
            with tempfile.TemporaryDirectory(dir=path.parent) as own:
                whole = pathlib.Path(own, path.name)
                whole.write_bytes(_digest(data) + data)
                whole.replace(path)


def _digest(data: bytes) -> bytes:
    return hashlib.blake2b(data, digest_size=_DIGEST).digest()


# This package's programs, and JAX's with what it wrote beside them while it counted their bytes itself; nothing else is touched.
_PROGRAM = re.compile(
    rf"[0-9a-f]{{{2 * _DIGEST}}}{re.escape(_SUFFIX)}|.+-[0-9a-f]{{64}}-(cache|atime)"
)


def make_room(folder: pathlib.Path) -> None:
    """Delete the programs that were not wanted for longest, this package's and JAX's, until the others fit in 1 GiB.

    Meant for the end of a process: to look at all files of a folder takes a tenth of a second where there are many.
    """
    files = []
    # Other processes may delete files meanwhile.
    with contextlib.suppress(OSError):
        for one in os.scandir(folder):
            with contextlib.suppress(OSError):
                if _PROGRAM.fullmatch(one.name) and one.is_file(follow_symlinks=False):
                    about = one.stat()
                    files.append((max(about.st_atime, about.st_mtime), about.st_size, one.path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= _MOST_BYTES:
            break
        with contextlib.suppress(OSError):
            os.unlink(path)
        total -= size


def _described(value: Any) -> Iterator[str]:
    """Words that say what a value is, the same in every process and other ones for every other value.

    Raises:
        _Unknown: If that cannot be said.
    """
    if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)):
        yield f"({_place(value)})"
        return
    yield f"({_place(type(value))} "
    if isinstance(value, enum.Enum):
        yield value.name
    elif isinstance(value, _PLAIN):
        yield repr(value)
    else:
        for part in _parts(value):
            yield from _described(part)
    yield ")"


def _parts(value: Any) -> tuple:
    """What describes a value that is made from others."""
    if isinstance(value, jax.tree_util.PyTreeDef):
        return jax.tree_util.treedef_is_leaf(value), value.node_data(), *value.children()
    if isinstance(value, Explicit):
        if value.text is None or not value.has_known_rules:
            raise _Unknown
        return value.text, value.structure
    if isinstance(value, HashableFunction):
        return value.parts
    if isinstance(value, functools.partial):
        return value.func, value.args, value.keywords
    if isinstance(value, (tuple, list)):
        return tuple(value)
    if isinstance(value, dict):
        return tuple(value.items())
    if isinstance(value, (frozenset, set)):
        return tuple(sorted("".join(_described(one)) for one in value))
    if dataclasses.is_dataclass(value):
        return tuple(getattr(value, field.name) for field in dataclasses.fields(value))
    raise _Unknown


def _place(value: Any) -> str:
    """Where a class or function is found: those of other libraries than these have no version here, and local ones no name."""
    module, name = getattr(value, "__module__", None) or "", value.__qualname__
    if module.split(".")[0] not in (*VERSIONED, "builtins", "collections", "functools"):
        raise _Unknown
    if "<" in name:
        raise _Unknown
    return f"{module}.{name}"


def _of_jax() -> tuple:
    """JAX's settings, as they are here and now."""
    of_process = {
        name: repr(value) for name, value in jax_config.values.items() if "cache" not in name
    }
    return tuple(sorted(of_process.items())), tuple(map(repr, settings()))


@functools.cache
def _process() -> tuple:
    """What decides about programs in this process as a whole."""
    # In one piece: while it digests, Python gives up its lock, and other threads that compile are slow to give it back.
    files = sorted(pathlib.Path(__file__).parent.rglob("*.py"))
    if max((path.stat().st_mtime for path in files), default=0) > _IMPORTED:
        # What runs here need not be what is written there now.
        raise _Unknown
    source = _digest(b"".join(path.read_bytes() for path in files))
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        processor = [line for line in lines if line.startswith(("model name", "flags", "Features"))]
    except OSError:
        processor = [platform.processor()]
    devices = [
        f"{one.platform} {one.device_kind} {one.client.platform_version}" for one in jax.devices()
    ]
    return (
        source.hex(),
        platform.python_version(),
        platform.machine(),
        tuple(processor),
        tuple(devices),
    )
