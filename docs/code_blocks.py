"""The code of the documentation, run as it is written: `python docs/code_blocks.py PAGE ...` writes what it prints.

A page is a script: its blocks that open with "```python" are run one after another, in one namespace, in an empty folder. A
block that opens with "```text title="Output"" and follows one of these is what it prints. SVG files that a page's code
writes are its figures, and lie beside it.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PAGES = [
    ROOT / "README.md",
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent != ROOT / "docs" / "api"),
]
_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(?:\n```text title=\"Output\"\n(?P<output>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)
# The coordinate at which a verdict's figure is worst changes with the last bits of the figures.
_WORST = re.compile(r"(R-hat\s+\S+ at|effective draws of|Stein's identity at) .*?(?= \(wanted)")
_NUMBER = re.compile(r"[-+]?\b\d[\d,]*(?:\.\d*)?(?:e[-+]?\d+)?\b|\bnan\b|\binf\b")


class Block(NamedTuple):
    """A block of code, and what the page says that it prints; None if it says nothing."""

    code: str
    output: str | None


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page, in their order."""
    return [Block(found["code"], found["output"]) for found in _BLOCK.finditer(text)]


class Run(NamedTuple):
    """What each block of a page printed, and the names that all of them defined."""

    printed: list[str]
    names: dict[str, Any]


def run(page: Path, folder: Path) -> Run:
    """Run the blocks of a page.

    Args:
        page: The page.
        folder: Where its code runs.
    """
    # Dataclasses look their module up by name.
    module = sys.modules[f"page_{page.stem}"] = ModuleType(f"page_{page.stem}")
    printed = []
    with contextlib.chdir(folder):
        for number, block in enumerate(blocks_of(page.read_text(encoding="utf-8")), 1):
            code = compile(block.code, f"{page.name}, block {number}", "exec")
            with contextlib.redirect_stdout(io.StringIO()) as output:
                exec(code, module.__dict__)
            printed.append(output.getvalue())
    return Run(printed, module.__dict__)


def run_apart(page: Path, folder: Path) -> list[str]:
    """What each block of a page prints in a process of its own: a page may set how JAX starts, or change its settings.

    Args:
        page: The page.
        folder: Where its code runs.

    Raises:
        RuntimeError: If the code fails, with the end of what it says.
    """
    command = [sys.executable, __file__, "--print", page]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{page}: {done.stderr[-3000:]}")
    return json.loads(done.stdout)


def without_numbers(text: str) -> str:
    """The words of an output: numbers depend on the machine and on versions.

    So do the space around them, and the names of the coordinates that a verdict found worst.
    """
    return " ".join(_NUMBER.sub("#", _WORST.sub(r"\1 NAME", text)).split())


def with_outputs(text: str, outputs: list[str]) -> str:
    """A page with the outputs of its blocks in place of those that it has."""
    remaining = iter(outputs)

    def renewed(found: re.Match) -> str:
        output = next(remaining)
        if found["output"] is None:
            return found[0]
        lines = "\n".join(line.rstrip() for line in output.strip("\n").splitlines())
        return f'```python\n{found["code"]}```\n\n```text title="Output"\n{lines}\n```\n'

    return _BLOCK.sub(renewed, text)


def write(page: Path, show: Callable[[str], None] = print) -> None:
    """Run a page and write its outputs and figures."""
    text = page.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        outputs = run_apart(page, Path(folder))
        for figure in Path(folder).glob("*.svg"):
            shutil.copy(figure, page.parent)
    page.write_text(with_outputs(text, outputs), encoding="utf-8")
    show(f"{page}: {len(outputs)} blocks run")


def main(argv: list[str] | None = None) -> None:
    """Renew the outputs of some pages, or of all."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, metavar="PAGE")
    parser.add_argument(
        "--print", action="store_true", help="print what the blocks of one page print, as JSON"
    )
    arguments = parser.parse_args(argv)
    # As in the tests: the checkout, and the catalogues that pages add rows to.
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if arguments.print:
        (page,) = arguments.pages
        print(json.dumps(run(page, Path.cwd()).printed))
        return
    for page in arguments.pages or PAGES:
        write(page.resolve())


if __name__ == "__main__":
    main()
