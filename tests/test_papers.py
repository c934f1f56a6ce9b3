"""The papers' experiments: one runs at a tiny size, all are well formed, and the committed page is made from the records."""

import importlib
import inspect
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import peers
from benchmarks.papers import __main__ as program
from benchmarks.papers.experiment import NAMES, Claim, judged, report, run_experiment

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "papers"
PAGE = ROOT / "benchmarks" / "papers" / "README.md"


def test_the_quickest_experiment_runs_and_is_kept(tmp_path, capsys):
    found = run_experiment("fixed_points", "small", tmp_path, num_steps=24, dimension=2, repeats=1)
    record = json.loads((tmp_path / "fixed_points-small-cpu.json").read_text())
    assert len(record["claims"]) == len(found.claims) >= 8
    assert record["settings"]["num_steps"] == 24 and record["about"]["platform"] == "cpu"
    rows = {(row["problem"], row["method"]): row for row in record["rows"]}
    assert len(rows) == 20 and all(row["status"] == "CONVERGED" for row in rows.values())
    assert all(row["iterations"] <= 24 and row["residual"] < 1e-12 for row in rows.values())
    assert rows["permutations", "Newton"]["iterations"] == 1
    assert rows["permutations", "Jacobi"]["iterations"] == 24
    assert all(row["loop_seconds"] > 0 and row["difference"] < 1e-11 for row in rows.values())
    assert (tmp_path / "fixed_points-small-cpu.svg").read_text().count("<path") > 20
    assert "| source | the paper says |" in capsys.readouterr().out


@pytest.mark.parametrize("name", NAMES)
def test_sizes_fit_their_experiment(name):
    module = importlib.import_module(f"benchmarks.papers.{name}")
    wanted = set(inspect.signature(module.run).parameters)
    assert set(module.SMALL) == set(module.PAPER) == wanted
    assert module.__doc__.splitlines()[0].endswith(").")


@pytest.mark.parametrize(
    "path", sorted(RESULTS.glob("*-small-cpu.json")), ids=lambda path: path.stem
)
def test_committed_records_are_whole(path):
    record = json.loads(path.read_text())
    assert record["size"] == "small" and record["claims"]
    for claim in record["claims"]:
        Claim(**claim)
    for row in record["rows"]:
        assert "seconds" not in row or {"residual", "loop_seconds"} <= set(row)
    assert path.with_suffix(".svg").stat().st_size < 200_000
    assert path.stem.removesuffix("-small-cpu") == record["experiment"] in NAMES


def test_the_page_is_made_from_the_records():
    text = PAGE.read_text(encoding="utf-8")
    between = text.split(program.BEGIN)[1].split(program.END)[0].strip()
    assert between == report(RESULTS).strip()
    assert int(between.split()[0]) >= 25


def test_a_claim_that_fails_says_why():
    with pytest.raises(ValueError, match="why"):
        Claim("arXiv:0000.00000", "it is fast", "it is slow", False)
    assert judged("the method", "a", "b", True, "c").why == ""
    assert judged("the method", "a", "b", False, "c").why == "c"


def test_the_command_line_lists_and_refuses(capsys):
    assert program.main(["--list"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in NAMES)
    with pytest.raises(SystemExit):
        program.main([])
    assert "wanted one of deer" in capsys.readouterr().err


def test_peers_want_checkouts(tmp_path, capsys):
    for given, words in (
        ([], "no checkout given"),
        (
            ["--elk", str(tmp_path)],
            "has no elk/algs/deer.py, wanted a checkout of lindermanlab/elk",
        ),
    ):
        with pytest.raises(SystemExit):
            peers.main(given)
        assert words in capsys.readouterr().err
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "qdeer.py").write_text("import no_such_package_anywhere")
    with pytest.raises(ImportError, match="lindermanlab/parallel-mcmc needs a package"):
        peers.peers({"parallel_mcmc": tmp_path})


def test_a_peer_is_called_as_its_checkout_defines(tmp_path):
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "qdeer.py").write_text(
        "import jax\n"
        "def seq1d(func, y0, xinp, params, yinit_guess=None, max_iter=1, clip_val=1e8):\n"
        "    assert params['key'] is not None and yinit_guess.shape == (3, y0.size) and max_iter == 200\n"
        "    move = lambda y, x: (func(y, x, params),) * 2\n"
        "    return jax.lax.scan(move, y0, xinp)[1], 7\n"
    )
    ((name, peer),) = peers.peers({"parallel_mcmc": tmp_path, "elk": None}).items()
    states, iterations = peer(
        lambda state, drive, params: params * state + drive,
        0.5,
        jnp.ones(1),
        jnp.zeros((3, 1)),
        jnp.ones((3, 1)),
    )
    assert iterations == 7 and name.startswith("parallel-mcmc")
    np.testing.assert_array_equal(states[:, 0], [0.5, 0.25, 0.125])
