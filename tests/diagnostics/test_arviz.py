"""Draws as ArviZ objects and files, and what its diagnostics are not allowed to hide."""

import json
import subprocess
import sys
import types

import numpy as np
import pytest

from partime_mcmc.diagnostics import arviz, values
from tests import fakes


@pytest.fixture
def run():
    return fakes.draws(fakes.chains(0), energy=np.ones((4, 1000)), num_steps=np.full((4, 1000), 8))


def test_groups_and_names(run):
    run.info["logdensity"] = np.full((4, 1000), -3.0)
    run.info["diverging"] = np.zeros((4, 1000), bool)
    tree = arviz.to_arviz(run)
    assert set(tree["posterior"].data_vars) == {"mu", "theta"}
    assert tree["posterior"]["theta"].dims[:2] == ("chain", "draw")
    np.testing.assert_array_equal(tree["posterior"]["theta"].values, run.constrained["theta"])
    wanted = {"acceptance_rate", "accepted", "diverging", "energy", "n_steps", "lp", "residual"}
    assert set(tree["sample_stats"].data_vars) == wanted
    assert tree["sample_stats"]["n_steps"].values.max() == 8
    np.testing.assert_array_equal(tree["sample_stats"]["residual"].values, run.certificate.residual)


def test_values_are_plain_numpy():
    jnp = pytest.importorskip("jax.numpy")
    run = types.SimpleNamespace(
        positions={"a": {"b": jnp.zeros((2, 5))}}, info={"accepted": jnp.ones((2, 5), bool)}
    )
    tree = arviz.to_arviz(run)
    assert type(tree["posterior"]["a.b"].data) is np.ndarray
    assert type(tree["sample_stats"]["accepted"].data) is np.ndarray


def test_a_bare_array_has_a_name():
    assert list(values.named_draws(types.SimpleNamespace(positions=np.zeros((2, 5, 3))))) == [
        "position"
    ]


def test_dims_and_coords_are_handed_on(run):
    tree = arviz.to_arviz(run, dims={"theta": ["school"]}, coords={"school": ["Choate"]})
    assert tree["posterior"]["theta"].dims == ("chain", "draw", "school")
    assert tree["posterior"]["school"].values.tolist() == ["Choate"]


def test_attributes_carry_certificate_version_and_plan(run):
    attrs = arviz.to_arviz(run).attrs
    assert (
        attrs["inference_library"] == "partime_mcmc"
        and attrs["inference_library_version"] == "0.1.0"
    )
    assert json.loads(attrs["plan"])["key"] == [0, 7]
    assert attrs["certified"] == 1 and attrs["frozen"] == 0 and attrs["max_residual"] == 3e-10
    assert json.loads(attrs["certificate"])["worst_step"] == [0, 5, 0, 0]
    run.certificate.certified = np.array([True, False, True, True])
    assert arviz.to_arviz(run).attrs["certified"] == 0
    assert all(isinstance(value, (str, int, float)) for value in attrs.values())


def test_a_frozen_chain_is_flagged(run):
    run.positions["mu"][2] = run.positions["mu"][2, 0]
    run.constrained["mu"][2] = run.constrained["mu"][2, 0]
    attrs = arviz.to_arviz(run).attrs
    assert attrs["frozen"] == 1 and json.loads(attrs["frozen_chains"]) == [2]
    frozen = {row["name"]: row["frozen"] for row in arviz.summary_table(run)}
    assert frozen == {"mu": True, "theta[0]": False}


def test_a_run_frozen_at_one_common_start_is_flagged(run):
    run.positions["mu"][:], run.constrained["mu"][:] = 1.5, 1.5
    row = arviz.summary_table(run)[0]
    assert row["frozen"] and np.isnan(row["ess_bulk"]) and np.isnan(row["r_hat"])
    assert values.frozen_chains(run).all()


def test_the_certificate_alone_can_call_a_chain_frozen(run):
    run.certificate.frozen = np.array([False, False, False, True])
    assert values.frozen_chains(run).tolist() == [False, False, False, True]


def test_a_constant_of_the_model_is_not_frozen(run):
    run.constrained["corr"] = np.ones((4, 1000))
    row = {row["name"]: row for row in arviz.summary_table(run)}["corr"]
    assert not row["frozen"] and np.isnan(row["ess_bulk"]) and row["sd"] == 0
    assert not values.frozen_chains(run).any()


def test_few_draws_are_not_called_frozen():
    run = types.SimpleNamespace(positions=np.ones((2, 5)), certificate=fakes.certificate(2, 5))
    run.certificate.frozen = np.ones(2, bool)
    assert not values.frozen_chains(run).any()


def test_summary_of_a_known_law(run):
    mu, theta = arviz.summary_table(run)
    assert mu["name"] == "mu" and theta["name"] == "theta[0]"
    assert (
        abs(mu["mean"]) < 4 * mu["mcse_mean"]
        and abs(mu["sd"] - 1) < 0.1
        and abs(theta["q50"] - 1) < 0.15
    )
    assert abs(mu["q05"] + 1.645) < 0.2 and abs(mu["q95"] - 1.645) < 0.2
    # 4,000 draws of an autoregression with memory 0.3 are worth 4,000 * 0.7 / 1.3 independent ones.
    assert 1500 < mu["ess_bulk"] < 2900 and mu["ess_tail"] > 1500 and mu["r_hat"] < 1.01
    assert all(type(value) in (str, float, bool) for value in mu.values())


@pytest.mark.parametrize(
    "x", [np.ones((4, 100)), np.full((4, 100), np.nan), np.zeros((4, 3)), np.zeros((4, 0))]
)
def test_undefined_statistics_are_nan_and_silent(x, caplog):
    for statistic in (arviz.ess_bulk, arviz.ess_tail, arviz.rhat, arviz.mcse_mean, arviz.mcse_sd):
        assert np.isnan(statistic(x))
    assert np.isnan(arviz.mcse_quantile(x, 0.05))
    assert not caplog.records


def test_rhat_sees_a_displaced_chain_and_wants_two():
    x = fakes.chains(1)[..., 0]
    assert arviz.rhat(x) < 1.01 and np.isnan(arviz.rhat(x[:1]))
    x[0] += 2
    assert arviz.rhat(x) > 1.1


def test_quantile_errors_grow_into_the_tails():
    x = fakes.chains(2)[..., 0]
    assert arviz.mcse_quantile(x, 0.01) > 1.5 * arviz.mcse_quantile(x, 0.5) > 0


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match="num_chains, num_draws"):
        arviz.ess_bulk(np.zeros(10))
    with pytest.raises(ValueError, match="'b' has shape"):
        values.named_draws(
            types.SimpleNamespace(constrained={"a": np.zeros((2, 5)), "b": np.zeros((2, 6))})
        )
    with pytest.raises(ValueError, match="neither"):
        arviz.to_arviz(types.SimpleNamespace(positions=None))


def test_netcdf_round_trip(run, tmp_path):
    path = arviz.save_netcdf(run, tmp_path / "draws.nc")
    tree = arviz.read_netcdf(path)
    np.testing.assert_array_equal(tree["posterior"]["theta"].values, run.constrained["theta"])
    np.testing.assert_array_equal(tree["sample_stats"]["accepted"].values, run.info["accepted"])
    assert tree["sample_stats"]["accepted"].dtype == bool
    assert tree.attrs["inference_library"] == "partime_mcmc" and int(tree.attrs["certified"]) == 1
    assert json.loads(tree["posterior"].attrs["plan"])["num_samples"] == 1000
    path.unlink()  # nothing holds the file, and the values are in memory
    assert float(tree["posterior"]["mu"].mean()) == run.constrained["mu"].mean()


NAMES = ("a/b", "a%2Fb", "50%", "", "..", "µ θ", "theta_dim_0")


def test_every_name_comes_back_from_a_file(run, tmp_path):
    run.constrained |= {name: fakes.chains(k) for k, name in enumerate(NAMES)}
    run.constrained["pair"] = (run.constrained["mu"], {"half": run.constrained["mu"] / 2})
    path = arviz.save_netcdf(run, tmp_path / "draws.nc")
    back = arviz.read_draws(path).constrained
    assert set(back) == {"mu", "theta", "pair.0", "pair.1.half", *NAMES}
    for name in ("theta", *NAMES):
        np.testing.assert_array_equal(back[name], run.constrained[name], err_msg=name)
    np.testing.assert_array_equal(back["pair.1.half"], run.constrained["mu"] / 2)
    assert len(arviz.to_arviz(run)["posterior"].data_vars) == len(back)
    assert len(arviz.read_netcdf(path)["posterior"].data_vars) == len(back)


def test_a_name_of_an_axis_means_one_thing():
    """A plate may be called as a site or as the axis of chains is, or be used again with another length."""
    shapes = {"x": (3,), "y": (5,), "z": (3, 3), "n": (4, 2), "w": (4,)}
    dims = {"x": ["k"], "y": ["k"], "z": ["m", "m"], "n": ["draw", "q"], "w": ["n"]}
    assert arviz.axis_names(shapes, dims) == {
        "x": ("x_dim_0",),
        "y": ("y_dim_0",),
        "z": ("z_dim_0", "z_dim_1"),
        "n": ("n_dim_0", "q"),
        "w": ("w_dim_0",),
    }
    values = {name: np.zeros((2, 6, *shape)) for name, shape in shapes.items()}
    assert arviz.draws_dataset(values, dims).sizes["q"] == 2
    with pytest.raises(ValueError, match="dims: got an axis of 'n' named 'draw'"):
        arviz.to_arviz(types.SimpleNamespace(constrained=values), dims={"n": ["draw"]})
    with pytest.raises(ValueError, match="two values named 'a.b'"):
        arviz.draws_dataset({"a.b": np.zeros((2, 6)), "a": {"b": np.zeros((2, 6))}})


def test_a_failed_save_leaves_the_old_file(run, tmp_path, monkeypatch):
    path = arviz.save_netcdf(run, tmp_path / "draws.nc")
    before = path.read_bytes()

    def disk_full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(arviz.os, "replace", disk_full)
    with pytest.raises(OSError, match="no space"):
        arviz.save_netcdf(run, path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.nc"):
        arviz.read_netcdf(tmp_path / "nothing.nc")


def test_importing_is_light_and_using_is_silent():
    script = (
        "import sys, partime_mcmc.diagnostics.arviz as a, numpy as np\n"
        "assert not {'arviz', 'arviz_base', 'arviz_stats', 'xarray', 'matplotlib'} & set(sys.modules)\n"
        "assert a.ess_bulk(np.random.default_rng(0).normal(size=(4, 100))) > 100\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
