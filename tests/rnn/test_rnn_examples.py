"""The examples of recurrent networks show what they promise, in small, and Newton's methods need as few passes as published."""

import importlib
import importlib.util
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def run(name, *flags):
    """What `main` of an example returns, given flags."""
    spec = importlib.util.spec_from_file_location(f"examples_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main([str(flag) for flag in flags])


def test_evaluate_finds_one_path_in_few_passes(capsys):
    rows = {
        row["method"]: row
        for row in run(
            "gru_evaluate",
            "--num-units",
            8,
            "--num-inputs",
            8,
            "--num-steps",
            4096,
            "--repeats",
            1,
            "--only",
            "chosen",
            "quasi-DEER",
        )
    }
    printed = capsys.readouterr().out
    for name, row in rows.items():
        assert row["status"] == "CONVERGED" and row["parallel"] and row["difference"] < 1e-5, name
        assert name in printed
    assert rows["quasi-DEER"]["iterations"] <= 35
    assert (
        rows["chosen"]["evaluations"] <= 1.5
    )  # segments are short here; the bound of 1.1 is for 65,536 steps


@pytest.mark.slow
def test_passes_over_a_long_path():
    rows = {
        row["method"]: row
        for row in run(
            "gru_evaluate",
            "--num-units",
            32,
            "--num-inputs",
            32,
            "--num-steps",
            65_536,
            "--repeats",
            1,
            "--only",
            "chosen",
            "shooting",
            "quasi-DEER",
            "DEER",
        )
    }
    assert all(row["status"] == "CONVERGED" and row["difference"] < 1e-5 for row in rows.values())
    assert rows["DEER"]["iterations"] <= 8 and rows["quasi-DEER"]["iterations"] <= 35
    assert rows["shooting"]["evaluations"] <= 1.1 and rows["chosen"]["evaluations"] <= 1.1


def test_training_follows_the_same_curve(capsys):
    pytest.importorskip("sklearn")
    pytest.importorskip("optax")
    found = run(
        "gru_train", "--num-units", 8, "--num-digits", 512, "--num-updates", 8, "--rate", 0.03
    )
    assert found["parallel"]  # 4,096 steps are enough for segments
    assert found["difference"] < 1e-5 and found["states"] < 1e-5 and found["gradients"] < 1e-4
    assert found["unroll"]["losses"][-1] < 0.97 * found["unroll"]["losses"][0]
    assert "times as fast" in capsys.readouterr().out


@pytest.mark.slow
def test_a_trust_region_tames_a_network_that_feeds_on_itself(tmp_path):
    pytest.importorskip("optax")
    main = importlib.import_module("benchmarks.gru_autoregressive").main
    constants = [f"ELK, damping {value:g}" for value in (1e-8, 1e-6, 1e-4, 1e-2)]
    rows = {
        row["solver"]: row
        for row in main(
            [
                "--out",
                str(tmp_path),
                "--only",
                "Newton",
                *constants,
                "ELK, relaxing from 0.0001, fast",
            ]
        )
        if row["noise"] == 0.5
    }
    assert rows["Newton"]["largest_residual"] > 1e30 and rows["Newton"]["overflowed"] > 0
    tame = rows["ELK, relaxing from 0.0001, fast"]
    assert tame["status"] == "CONVERGED" and tame["overflowed"] == 0 and tame["difference"] < 1e-4
    passes = [
        rows[name]["iterations"] if rows[name]["status"] == "CONVERGED" else np.inf
        for name in constants
    ]
    assert tame["iterations"] < min(passes) and tame["iterations"] < rows["Newton"]["iterations"]
