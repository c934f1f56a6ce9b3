"""Values as people and files read them: cells and tables in plain text, and Python's own types for JSON."""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WIDTH = 100


def text_table(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Lines of a table within 100 columns: the first column left-aligned, numbers in four digits, right-aligned.

    Args:
        rows: Dicts with the same keys, which become the titles.
    """
    if not rows:
        return []
    cells = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    widths[0] = max(10, min(widths[0], WIDTH - sum(widths[1:]) - 2 * len(widths[1:])))
    lines = []
    for first, *rest in cells:
        first = first if len(first) <= widths[0] else first[: widths[0] - 1] + "…"
        numbers = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *numbers]).rstrip())
    return lines


def cell(value: Any) -> str:
    """A value in a table: text as it is, yes and no, numbers in four digits, `-` for NaN."""
    if isinstance(value, str):
        return value
    if isinstance(value, bool):
        return "yes" if value else "no"
    value = float(value)
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if value == round(value) and abs(value) < 1e6:
        return str(round(value))
    return f"{value:.0f}" if 1e3 <= abs(value) < 1e7 else f"{value:#.4g}"


def plain(value: Any) -> Any:
    """`value` in Python's own types, fit for strict JSON: dicts by string, lists, NaN as "nan", enums by name."""
    if isinstance(value, enum.Enum):
        return value.name
    if value is None or isinstance(value, str | bool):
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(vars(value))
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(entry) for entry in value]
    if isinstance(value, int | float) or hasattr(value, "__array__"):
        value = np.asarray(value).tolist()
        if isinstance(value, list):
            return plain(value)
        return str(value) if isinstance(value, float) and not math.isfinite(value) else value
    return str(value)
