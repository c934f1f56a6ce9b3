"""Runs and comparisons as HTML: one file that needs nothing else, and takes no orders from what it shows."""

import base64
import html.parser
import sys

import numpy as np
import pytest

from partime_mcmc.diagnostics import describe as pages
from partime_mcmc.diagnostics import plots
from partime_mcmc.diagnostics.compare import compare
from tests import fakes

X = fakes.chains(0, dim=3, num_samples=400)
NASTY = "<script>alert('$x_1')</script>"


class Reader(html.parser.HTMLParser):
    """Tags, what is loaded from elsewhere, and text; and which tags are left open."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.text, self.crossed = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href", "action")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def run(**info):
    draws = fakes.draws(X.copy(), logdensity=-(X**2).sum(axis=2), **info)
    draws.plan["kernel"] = NASTY
    draws.report.fallbacks = [f"chain 0: {NASTY}"]
    draws.constrained[NASTY] = draws.constrained.pop("mu")
    return draws


def test_a_page_stands_alone_and_escapes_what_it_shows(tmp_path):
    draws = run()
    draws.constrained["theta"][0, 7, 0] = np.nan  # figures must live with it
    distances, passes = np.geomspace(1, 1e-12, 40)[None], np.geomspace(1, 1e-12, 60).reshape(3, 20)
    path = tmp_path / "run.html"
    written = pages.save_page(path, draws, NASTY, distances=distances, passes=passes)
    text = path.read_text(encoding="utf-8")
    seen = Reader(text)
    assert written == path and not seen.open and not seen.crossed
    assert len(seen.loads) == 4 and all(one.startswith("data:image/png;") for one in seen.loads)
    assert all(base64.b64decode(one.split(",")[1]).startswith(b"\x89PNG") for one in seen.loads)
    assert not {"script", "link", "iframe", "object", "style"} & set(seen.tags)
    # In the title, the plan, a fallback, and the table.
    assert NASTY not in text and "".join(seen.text).count(NASTY) >= 4


def test_a_run_shows_what_failed():
    draws = fakes.draws(X.copy(), certified=[True, False, True, True])
    draws.positions["mu"][2], draws.constrained["mu"][2] = 1.5, 1.5
    draws.constrained["theta"][0, 7, 0] = np.nan
    text = pages.draws_html(draws)
    assert "3 of 4 chains certified" in text and "<td>frozen</td>" in text
    assert "<td>theta[0]</td><td>-</td>" in text
    draws.certificate = None
    assert "<b>certificate</b> there is none" in pages.draws_html(draws)


def test_a_comparison_shows_its_verdict_its_reasons_and_its_table(tmp_path):
    report = compare(run(), fakes.draws(X + 1e-13))
    text = report._repr_html_()
    seen = Reader(text)
    assert not seen.open and not seen.crossed and report.verdict in "".join(seen.text)
    assert all(reason in "".join(seen.text) for reason in report.reasons + report.notes)
    assert "<td>theta[1]</td>" in text and NASTY not in text
    assert text in report.save(tmp_path / "comparison.html").read_text(encoding="utf-8")


def test_tables_are_escaped_and_bounded():
    assert pages.table_html([]) == ""
    rows = [{"a<b": float("nan"), "name": f"<{number}>"} for number in range(600)]
    text = pages.table_html(rows, "x & y")
    assert "<caption>x &amp; y</caption>" in text and "<td>a&lt;b</td>" in text
    assert "<td>-</td><td>&lt;499&gt;</td>" in text and "&lt;500&gt;" not in text
    assert "and 100 more rows" in text


def test_without_matplotlib_there_is_a_page_without_figures(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = pages.save_page(tmp_path / "run.html", run()).read_text(encoding="utf-8")
    assert "<img" not in text and "chains certified" in text
    with pytest.raises(ImportError, match=r"partime_mcmc\[plots\]"):
        plots.residual_map(np.ones((1, 3)))
