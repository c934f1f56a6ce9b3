"""The report page stands alone, hides nothing and takes no orders from what it shows."""

import html.parser
import sys

import numpy as np
import pytest

from partime_mcmc.diagnostics import canvas, page, plots, run_plots
from partime_mcmc.diagnostics.compare import compare
from tests import fakes

X = fakes.chains(0, dim=3, num_samples=400)
NASTY = "<script>alert('$x_1')</script>"


class Reader(html.parser.HTMLParser):
    """Tags, what is loaded from elsewhere, and text; says whether every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.text, self.crossed = [], [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loads += [
            value
            for name, value in attrs
            if name.split(":")[-1] in ("src", "href", "action", "srcset")
        ]
        if tag not in ("meta", "link", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.crossed.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def run(**info):
    draws = fakes.draws(X, logdensity=-(X**2).sum(axis=2), **info)
    draws.plan["note"] = NASTY
    draws.report.fallbacks = [f"chain 0: {NASTY}"]
    return draws


def test_a_page_stands_alone_and_escapes_what_it_shows(tmp_path):
    draws, other = run(), fakes.draws(X + 1e-13)
    draws.constrained[NASTY] = draws.constrained.pop("mu")
    draws.constrained["theta"][0, 7, 0] = np.nan  # pictures must live with it
    report = compare(draws, other)
    text = page.page(
        draws,
        title=NASTY,
        sequential=draws,
        comparison=report,
        distances=np.geomspace(1, 1e-12, 40)[None],
        passes=np.geomspace(1, 1e-12, 60).reshape(3, 20),
    )
    seen = Reader(text)
    assert not seen.open and not seen.crossed
    # Links are to parts of the page itself, and there is neither script nor anything else that fetches.
    assert all(link.startswith(("#", "data:image/png;base64,")) for link in seen.loads)
    assert "url(http" not in text and "@import" not in text
    assert (
        not {"script", "link", "iframe", "img", "object"} & set(seen.tags)
        and seen.tags.count("svg") == 7
    )
    assert NASTY not in text and NASTY in "".join(seen.text)
    assert (
        "prefers-color-scheme: dark" in text
        and "currentColor" in text
        and "default-src 'none'" in text
    )
    # Inner names of different pictures do not meet.
    names = [part.split('"')[0] for part in text.split(' id="')[1:]]
    assert len(names) == len(set(names)) > 0
    written = page.write(text, tmp_path / "page.html")
    assert written.read_text(encoding="utf-8") == text and list(tmp_path.iterdir()) == [written]


def test_what_failed_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # the words alone
    draws = fakes.draws(X, certified=[True, False, True, True])
    draws.positions["mu"][2], draws.constrained["mu"][2] = 1.5, 1.5
    draws.constrained["theta"][0, 7, 0] = np.nan
    text = page.page(draws, title="bad")
    assert (
        "3 of 4 chains certified" in text
        and 'class="verdict bad"' in text
        and "<tr class=bad><th>mu" in text
    )
    assert "undefined)" in text and "<th>theta[0]</th><td>-</td>" in text
    draws.certificate = None
    assert "no certificate" in page.page(draws, title="none")


def test_without_matplotlib_there_is_a_page_without_pictures(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    text = page.page(run(), title="bare")
    assert (
        "<svg" not in text
        and "partime_mcmc[plots]" in text
        and "all but" not in text
        and "<h2>Posterior</h2>" in text
    )
    with pytest.raises(ImportError, match=r"partime_mcmc\[plots\]"):
        plots.residual_by_iteration(np.ones((1, 3)))


def test_residuals_by_step_show_peaks_and_what_is_not_finite():
    draws = run()
    draws.certificate.residual[2, 333] = np.nan
    axis = run_plots.convergence(draws).axes[1]
    assert np.nanmax(axis.lines[2].get_ydata()) == 3e-10  # of chain 1, at step 5
    marks = [line for line in axis.lines if line.get_marker() == "x"]
    assert [len(line.get_xdata()) for line in marks] == [0, 0, 1, 0] and marks[2].get_xdata()[
        0
    ] == 334


def test_coalescence_counts_pairs_that_have_not_met_for_good():
    distances = np.array([[1.0, 1e-9, 0.5, 1e-9, 1e-9], [1.0, 1.0, np.nan, 0.0, 0.0]])
    share = run_plots.coalescence(distances).axes[1].lines[0].get_ydata()
    np.testing.assert_array_equal(share, [1, 1, 1, 0, 0])
    with pytest.raises(ValueError, match="num_pairs, num_steps"):
        run_plots.coalescence(np.zeros(3))


def test_the_certificate_has_a_row_per_chain():
    draws = run()
    rows = run_plots.certificate_rows(draws.certificate)
    assert [row["chain"] for row in rows] == ["0", "1", "2", "3"] and rows[1][
        "largest residual"
    ] == "3.0e-10"
    figure = run_plots.certificate_figure(draws)
    assert len(figure.axes) == 4 and figure.axes[3].tables
    assert canvas.svg(figure, "one").startswith("<svg ")
