"""Every benchmark starts: its imports are there, its options explain themselves; suites run and are reported."""

import importlib
import json
from pathlib import Path

import pytest

from benchmarks import record, suite, targets, verdict
from benchmarks.posteriors import covered
from benchmarks.suite import BOUNDS, LEFT_OUT, QUOTED, SUITES, Task, main

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
NAMES = sorted(
    path.stem
    for path in (Path(__file__).parent.parent / "benchmarks").glob("[a-z]*.py")
    if "def main(" in path.read_text()
)


@pytest.mark.parametrize("name", NAMES)
def test_benchmark_explains_itself(name, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main(["--help"])
    assert ended.value.code == 0
    assert "--out" in capsys.readouterr().out


@pytest.mark.parametrize("name", SUITES)
def test_a_suite_ends_in_time(name):
    assert sum(task.limit for task in SUITES[name]) <= BOUNDS[name]
    assert all(task.estimate < task.limit and task.module in NAMES for task in SUITES[name])
    assert name in LEFT_OUT


def test_a_run_goes_nowhere_near_the_committed_tables():
    assert (ROOT / record.OUT).resolve() != RESULTS.resolve()


@pytest.mark.skipif(not (ROOT / ".gitignore").exists(), reason="a source archive, not a checkout")
def test_what_a_run_writes_is_not_committed():
    assert record.OUT.name in (ROOT / ".gitignore").read_text()


@pytest.mark.slow
def test_a_suite_runs_and_is_reported(tmp_path, monkeypatch, capsys):
    tiny = Task("scans", ("--longest", "1000", "--widths", "2", "--repeats", "1"), 5, 200)
    broken, impossible = (
        Task("scans", ("--no-such-option",), 1, 100),
        Task("scans", (), 1, 9, "NO_SUCH_VAR"),
    )
    monkeypatch.setitem(SUITES, "smoke", (tiny, broken, impossible))
    assert main(["run", "--suite", "smoke", "--out", str(tmp_path)]) == 1
    stored = json.loads((tmp_path / "suite.json").read_text())
    assert [task["outcome"][:6] for task in stored["tasks"]] == ["done", "failed"]
    assert "NO_SUCH_VAR is not set" in stored["left_out"][-1]
    about = json.loads((tmp_path / "scans-cpu.json").read_text())["about"]
    assert (
        {"device", "versions", "commit", "peak_resident_bytes"}
        <= set(about)
        == set(stored["about"])
    )
    assert main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "scan in use / fastest, worst size | ≤ 1.05" in printed and "not measured" in printed
    assert "worst size" in (tmp_path / "targets.md").read_text()


@pytest.mark.slow
def test_verdicts_are_right_on_one_posterior(tmp_path):
    assert verdict.main(["--small", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "verdict-cpu.json").read_text())["rows"]
    assert rows[0]["right"] and rows[0]["converged"] == rows[0]["runs"] == verdict.SMALL_SEEDS
    assert {one["run"] for one in rows} >= set(verdict.WRONG_KERNELS)


def test_committed_verdicts_are_right():
    rows = json.loads((RESULTS / "verdict-cpu.json").read_text())["rows"]
    assert {one["posterior"] for one in rows} <= set(verdict.NAMES)
    right = [one for one in rows if one["right"]]
    assert len(right) >= 20
    runs = sum(one["runs"] for one in right)
    assert sum(one["not_converged"] for one in right) <= 0.01 * runs
    assert sum(one["converged"] for one in right) >= 0.95 * runs
    wrong = [one for one in rows if not one["right"]]
    assert {one["run"] for one in wrong} >= {*verdict.WRONG_KERNELS, *verdict.HOPELESS}
    assert not any(one["converged"] for one in wrong)


def test_report_refuses_what_is_no_folder(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nothing")]) == 2
    assert "not a folder" in capsys.readouterr().err


def test_a_checkout_without_git_is_an_unknown_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert record.commit() == "unknown"


def test_the_scan_in_use_is_not_timed_twice():
    from benchmarks.scans import measure

    row = measure("diagonal", 50, 2, "float32", 1, 10**9)
    assert row["in_use"] in row["scans"] and "in use" not in row["scans"]
    assert targets.TARGETS["cpu"][7].read({"rows": [row]}) >= 1


def test_overlapping_compilations_count_once():
    # Nested, overlapping, before and after.
    assert covered([(0, 1), (2, 6), (3, 4), (5, 8), (9.5, 12)], 0.5, 10) == 0.5 + 6 + 0.5
    assert covered([(0, 100)] * 3, 10, 11) == 1


def test_targets_are_met_or_not(tmp_path):
    target = targets.Target("a", "b", lambda found: found["x"], targets.AT_LEAST, 2)
    assert "not measured" in target.line(tmp_path)
    for value, told in ((1.9, "| **not met** |"), (2, "| met |"), (None, "not measured")):
        (tmp_path / "b.json").write_text(json.dumps({} if value is None else {"x": value}))
        assert told in target.line(tmp_path)


@pytest.mark.parametrize("target", targets.TARGETS["cpu"], ids=lambda target: target.name)
def test_targets_find_their_rows_in_the_committed_results(target):
    record = json.loads((RESULTS / f"{target.file}.json").read_text())
    if target.file == "scans-cpu" and "in_use" not in record["rows"][0]:
        pytest.skip("the committed scans are of before the one in use was named")
    if target.read is targets._loss and "loss" not in record["chains"][0]:
        pytest.skip("the committed record is of before segments were chosen by a rule")
    assert target.found(RESULTS) > 0


@pytest.fixture
def pages(tmp_path):
    """A folder with the pages that quote tables."""
    for one in QUOTED:
        copy = tmp_path / one.page
        copy.parent.mkdir(exist_ok=True)
        copy.write_text((ROOT / one.page).read_text(encoding="utf-8"), encoding="utf-8")
    return tmp_path


def test_tables_of_readme_and_documentation_are_written_from_the_results(pages):
    assert len(suite.quote(RESULTS, pages)) == len(QUOTED)
    for one in QUOTED:
        assert (pages / one.page).read_text(encoding="utf-8") == (ROOT / one.page).read_text(
            encoding="utf-8"
        ), f"{one.page}: run `python -m benchmarks quote benchmarks/results`"


def test_a_table_without_its_place_is_missed(pages):
    page = pages / "README.md"
    page.write_text(page.read_text(encoding="utf-8").replace("<!-- end of posteriors-cpu -->", ""))
    with pytest.raises(ValueError, match="end of posteriors-cpu.*missing"):
        suite.quote(RESULTS, pages)
