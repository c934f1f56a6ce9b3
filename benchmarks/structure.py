"""How large and how deep the package is: `python -m benchmarks.structure [--json FILE]`.

    source     files, lines, statements (`ast.stmt`), public names
    imports    per folder, with modules and subfolders as nodes: floors, the longest chain of imports
               (a circle is one floor), and circles; imports inside functions count, too
    calls      files and functions of the package that one run enters, and its deepest stack in any thread

Functions are distinct code objects; lambdas and comprehensions (from Python 3.12 on only generator
expressions) are counted apart.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import json
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpyro
import numpyro.distributions as dist

import partime_mcmc
from partime_mcmc import CoalescingHMC, ParallelMCMC, Target, mala, sample

ROOT = Path(partime_mcmc.__file__).parent


def source() -> dict[str, int]:
    """Sizes of all files together."""
    texts = [path.read_text() for path in ROOT.rglob("*.py")]
    nodes = [node for text in texts for node in ast.walk(ast.parse(text))]
    return {
        "files": len(texts),
        "lines": sum(len(text.splitlines()) for text in texts),
        "statements": sum(isinstance(node, ast.stmt) for node in nodes),
        "public names": len(partime_mcmc.__all__),
    }


def imported(path: Path) -> Iterator[Path]:
    """The files and folders of the package that a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            for alias in node.names:
                found = ROOT.parent.joinpath(*f"{module}{alias.name}".split("."))
                # The last part may be a name inside a module.
                known = found.is_dir() or found.with_suffix(".py").exists()
                yield found if known else found.parent


def imports(folder: Path) -> dict[str, Any]:
    """Floors and circles of a folder."""
    reached: dict[str, set[str]] = {}
    for path in folder.rglob("*.py"):
        node, *_ = path.relative_to(folder).with_suffix("").parts
        others = [one.relative_to(folder) for one in imported(path) if folder in one.parents]
        if path != folder / "__init__.py":
            reached.setdefault(node, set()).update({one.parts[0] for one in others} - {node})
    for middle, beyond in reached.items():
        for found in reached.values():
            found |= beyond if middle in found else set()

    @functools.cache
    def floors(name: str) -> int:
        lower = [one for one in reached[name] if name not in reached[one]]
        return 1 + max(map(floors, lower), default=0)

    circles = {frozenset(n for n in found if one in reached[n]) for one, found in reached.items()}
    highest, circles = max(map(floors, reached), default=0), circles - {frozenset()}
    return {"modules": len(reached), "floors": highest, "circles": [*map(sorted, circles)]}


def calls(run: Callable[[], Any]) -> dict[str, int]:
    """What one run enters of the package."""
    entered, depth, deepest = set(), threading.local(), [0]

    def watch(frame, event, argument):
        code = frame.f_code
        # Bodies of modules and classes are no functions.
        ours = code.co_filename.startswith(f"{ROOT}/") and code.co_flags & inspect.CO_OPTIMIZED
        if ours and event in ("call", "return"):
            entered.add(code)
            depth.now = getattr(depth, "now", 0) + (1 if event == "call" else -1)
            deepest[0] = max(deepest[0], depth.now)

    threading.setprofile(watch)
    sys.setprofile(watch)
    run()
    sys.setprofile(None)
    threading.setprofile(None)
    nameless = sum(code.co_name.startswith("<") for code in entered)
    return {
        "files": len({code.co_filename for code in entered}),
        "functions": len(entered) - nameless,
        "lambdas and comprehensions": nameless,
        "deepest stack": deepest[0],
    }


def model():
    """A NumPyro model."""
    numpyro.sample("x", dist.Normal(0, 1).expand([3]).to_event(1))


def command_line(argv: list[str] | None = None) -> None:
    """Print the figures, and write them as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="a file to write the figures to")
    given = parser.parse_args(argv)
    folders = [path.parent for path in sorted(ROOT.rglob("__init__.py"))]
    key, target = jax.random.key(0), Target(lambda x: -0.5 * x @ x, jax.numpy.zeros(3))
    mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=200, num_samples=1000, num_chains=4)
    figures = {
        "source": source(),
        "imports": {str(one.relative_to(ROOT.parent)): imports(one) for one in folders},
        "sample": calls(lambda: sample(key, target, mala, num_samples=1000)),
        "ParallelMCMC.run": calls(lambda: mcmc.run(key)),
    }
    for part, rows in figures.items():
        print("\n".join(f"{part}: {name}: {values}" for name, values in rows.items()))
    if given.json:
        given.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    command_line()
