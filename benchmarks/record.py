"""What every benchmark shares: how it times, and what a record holds beside its numbers.

A stored record is JSON with `about` (device, versions, commit, memory of the process) and the benchmark's own rows,
with a Markdown table of the same name beside it. Rows have compile seconds and, where a compiled program is at hand,
the bytes of temporary memory that the compiler gives it.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any, Callable

# Where a run goes by default: never where the tables are that the documentation quotes.
OUT = Path("benchmark-results")
# Seconds that short programs are repeated for, and how often at most.
_SECONDS, _MOST_REPEATS = 1.0, 200


def module_at(path: Path, name: str) -> ModuleType:
    """The module in a file that is in no package, under the given name."""
    spec = importlib.util.spec_from_file_location(name, path)
    # Dataclasses look their module up by name.
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def about() -> dict[str, Any]:
    """Device, versions, commit and memory of this process."""
    import jax

    from partime_mcmc.compile_cache import versions

    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": versions(),
        "commit": commit(),
        "peak_resident_bytes": peak_resident(),
        "peak_device_bytes": peak_device(),
    }


def commit() -> str:
    """The commit that is measured, marked where files differ from it; "unknown" without git or outside a checkout."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except FileNotFoundError:
        return "unknown"
    return found.stdout.strip() or "unknown"


def peak_resident() -> int:
    """The largest resident memory of this process so far, bytes."""
    # Kilobytes on Linux, bytes on a Mac.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def peak_device() -> int | None:
    """The most memory in use on the default device so far, bytes; None where the platform does not count (CPUs)."""
    import jax

    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def temporary_bytes(compiled: Any) -> int | None:
    """Temporary memory of a compiled program, by the compiler's own account; None where it keeps none."""
    found = compiled.memory_analysis()
    return None if found is None else int(found.temp_size_in_bytes)


def keep(stored: Path, record: dict[str, Any], text: str) -> None:
    """Write a record as JSON and its table as Markdown of the same name."""
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(json.dumps({"about": about(), **record}, indent=1))
    stored.with_suffix(".md").write_text(text)


def prepared(runs: dict[Any, tuple[Callable, tuple]]) -> dict[Any, dict]:
    """Compile each function for its arguments and run it once, apart from all times.

    Args:
        runs: A jitted function and its arguments by name.

    Returns:
        By name: `function` compiled, its `arguments`, `compile` seconds, `temp_bytes`, `times` so far none, and the `value`.
    """
    import jax

    found = {}
    for name, (function, arguments) in runs.items():
        begin = time.perf_counter()
        compiled = function.lower(*arguments).compile()
        found[name] = {
            "compile": time.perf_counter() - begin,
            "times": [],
            "function": compiled,
            "arguments": arguments,
            "temp_bytes": temporary_bytes(compiled),
            "value": jax.block_until_ready(compiled(*arguments)),
        }
    return found


def in_turn(found: dict[Any, dict], repeats: int) -> None:
    """Run all of them one after another, `repeats` times over; `times` grow and `seconds` is their median."""
    import jax

    for _ in range(repeats):
        for one in found.values():
            begin = time.perf_counter()
            jax.block_until_ready(one["function"](*one["arguments"]))
            one["times"].append(time.perf_counter() - begin)
    for one in found.values():
        one["seconds"] = statistics.median(one["times"])


def timed(runs: dict[Any, tuple[Callable, tuple]], repeats: int) -> dict[Any, dict]:
    """Compile each, then run them in turn; medians. `settled` gives how many repeats make these trustworthy."""
    found = prepared(runs)
    in_turn(found, repeats)
    return found


def settled(repeats: int, seconds: float) -> int:
    """Rounds so that short programs are repeated for a second in all, at least `repeats` and at most 200 times."""
    return max(repeats, min(_MOST_REPEATS, int(_SECONDS / max(seconds, 1e-9))))


def in_a_process(module: str, arguments: list[Any], limit: float) -> dict[str, Any]:
    """What `python -m MODULE --one ARGUMENTS` prints in its last line, JSON, or `{"failed": why}`.

    Args:
        module: A benchmark.
        arguments: As JSON.
        limit: Seconds after which the process is stopped.
    """
    command = [sys.executable, "-m", module, "--one", json.dumps(arguments)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"failed": f"stopped after {limit:.0f} s"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return {"failed": last[:300]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def rows_so_far(path: Path, *names: str) -> dict[tuple, dict[str, Any]]:
    """Rows of a file, one a line, by what they have under some names; none if there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {tuple(row[name] for name in names): row for row in map(json.loads, lines)}


def figures(rows: list[dict[str, Any]], name: str, form: str) -> str:
    """A figure of each row with slashes between them; a dash stands for what is not known."""
    return " / ".join("–" if row.get(name) is None else format(row[name], form) for row in rows)


def put_between(file: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a file.

    Raises:
        ValueError: If the file lacks one of the marks.
    """
    whole = file.read_text(encoding="utf-8")
    head, found, rest = whole.partition(begin)
    _, closed, tail = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{file}: wanted the marks {begin!r} and {end!r}, one is missing")
    file.write_text(f"{head}{begin}\n\n{text.strip()}\n\n{end}{tail}", encoding="utf-8")
