"""One page of a folder of results: every table, and pictures of what tables say badly. Pictures stand in the page
itself."""

from __future__ import annotations

import base64
import html
import io
import json
import re
from pathlib import Path
from typing import Callable

_STYLE = """<style>
:root { color-scheme: light dark; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; } img { max-width: 100%; background: white; }
td, th { border-bottom: 1px solid #8884; padding: .25rem .6rem; text-align: left; white-space: nowrap; }
</style>"""


def write_page(folder: Path) -> Path:
    """Write `report.html` into a folder of results."""
    parts = [
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>partime_mcmc benchmarks</title>",
        _STYLE,
        "</head><body><h1>partime_mcmc benchmarks</h1>",
        _about(folder),
    ]
    for stored in sorted(folder.glob("*.md")):
        parts += [
            f"<h2>{html.escape(stored.stem)}</h2>",
            _picture(stored.with_suffix(".json")),
            tables(stored.read_text()),
        ]
    page = folder / "report.html"
    page.write_text("\n".join([*parts, "</body></html>"]))
    return page


def tables(text: str) -> str:
    """Pipe tables and paragraphs of Markdown as HTML."""
    found, rows = [], []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            rows.append([cell.strip() for cell in line.strip().strip("|").split("|")])
            continue
        if rows:
            head, body = (
                rows[0],
                [row for row in rows[1:] if not all(re.fullmatch(":?-+:?", cell) for cell in row)],
            )
            found.append(
                "<table>" + _row("th", head) + "".join(_row("td", row) for row in body) + "</table>"
            )
            rows = []
        if line.strip():
            found.append(f"<p>{_inline(line)}</p>")
    return "\n".join(found)


def _row(kind: str, cells: list[str]) -> str:
    return "<tr>" + "".join(f"<{kind}>{_inline(cell)}</{kind}>" for cell in cells) + "</tr>"


def _inline(text: str) -> str:
    text = re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))
    return re.sub(r"`(.+?)`", r"<code>\1</code>", text).replace("\\*", "*")


def _about(folder: Path) -> str:
    stored = folder / "suite.json"
    if not stored.exists():
        return ""
    suite = json.loads(stored.read_text())
    machine = suite["about"]
    said = [
        f"Suite <b>{html.escape(suite['suite'])}</b> at {html.escape(machine['commit'])}, {suite['seconds']:.0f} s on "
        f"{html.escape(str(machine.get('device')))} ({machine.get('cores')} host cores); "
        + html.escape(
            ", ".join(f"{name} {version}" for name, version in machine.get("versions", {}).items())
        )
    ]
    said += [
        f"{html.escape(task['name'])}: {html.escape(task['outcome'])}"
        for task in suite["tasks"]
        if task["outcome"] != "done"
    ]
    if suite["left_out"]:
        said.append("Not part of this suite: " + html.escape(", ".join(suite["left_out"])))
    return "".join(f"<p>{sentence}</p>" for sentence in said)


def _picture(stored: Path) -> str:
    draw = next((draw for start, draw in _PICTURES.items() if stored.stem.startswith(start)), None)
    if draw is None or not stored.exists():
        return ""
    drawn = _drawn(draw, json.loads(stored.read_text()))
    return f"<img alt='{html.escape(stored.stem)}' src='data:image/png;base64,{drawn}'>"


def _drawn(draw: Callable, results: dict) -> str:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    draw(figure.subplots(), results)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return base64.b64encode(stream.getvalue()).decode()


def _scans(axes, results: dict) -> None:
    for width, color in zip((1, 8, 64), ("C0", "C1", "C2")):
        for name, style in (("plain loop", "-"), ("chunked", "--"), ("associative", ":")):
            rows = [
                row for row in results["rows"] if (row["kind"], row["width"]) == ("diagonal", width)
            ]
            rows = [row for row in rows if row["dtype"] == results["rows"][0]["dtype"]]
            axes.loglog(
                [row["num_steps"] for row in rows],
                [row["scans"][name]["seconds"] for row in rows],
                style + "o",
                color=color,
                label=f"{name}, D = {width}",
            )
    axes.set(xlabel="T", ylabel="seconds", title="Prefix scans of diagonal maps")
    axes.legend(fontsize=7)


def _shooting(axes, results: dict) -> None:
    for row in results["rows"]:
        items = row["segments"]
        axes.semilogx(
            [item["segments"] for item in items],
            [item["ratio"] for item in items],
            "o-",
            base=2,
            label=f"{row['name']}, {row['dtype']}",
        )
    axes.axhline(1, color="gray", linewidth=1)
    axes.set(
        xlabel="segments",
        ylabel="loop / shooting",
        title="One chain: how many times faster than its loop",
    )
    axes.legend(fontsize=7)


def _advised(axes, results: dict) -> None:
    for name in dict.fromkeys(row["name"] for row in results["chains"]):
        rows = [row for row in results["chains"] if row["name"] == name]
        axes.semilogx(
            [row["chains"] for row in rows],
            [row["ratio"] for row in rows],
            "o-",
            base=2,
            label=name,
        )
    axes.axhline(1, color="gray", linewidth=1)
    axes.set(
        xlabel="chains side by side", ylabel="loop / rule", title="Against the loop over all chains"
    )
    axes.legend(fontsize=7)


def _chains_or_time(axes, results: dict) -> None:
    for name in dict.fromkeys(row["name"] for row in results["rows"]):
        for way, style in (("loop", ":"), ("parallel", "-")):
            rows = [row for row in results["rows"] if row["name"] == name]
            axes.loglog(
                [row["chains"] for row in rows],
                [row["ess"] / row[f"{way}_seconds"] for row in rows],
                "o" + style,
                label=f"{name}, {way}",
            )
    axes.set(
        xlabel="chains",
        ylabel="effective draws per second",
        title="A fixed budget of draws: more chains, or more time?",
    )
    axes.legend(fontsize=7)


_PICTURES = {
    "scans": _scans,
    "shooting-advised": _advised,
    "shooting": _shooting,
    "chains-or-time": _chains_or_time,
}
