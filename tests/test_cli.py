"""The command line as a new user meets it: what works, what is refused, and with which exit code."""

import dataclasses
import json
import pickle
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import partime_mcmc
from partime_mcmc import cli
from partime_mcmc.cli import main
from partime_mcmc.diagnostics.arviz import read_netcdf
from partime_mcmc.engine.solution import Status

MODEL = """
import jax, jax.numpy as jnp, numpyro, numpyro.distributions as dist
from partime_mcmc import Target

def model(y, sigma, scale=10.0):
    mu = numpyro.sample("mu", dist.Normal(0, scale))
    with numpyro.plate("row", len(y)):
        numpyro.sample("y", dist.Normal(mu, sigma), obs=y)

def target(scale):
    return Target(lambda x: -0.5 * jnp.sum((x / scale)**2), jnp.zeros(2))

def pair():
    return lambda x: -0.5 * jnp.sum(x**2), jnp.ones(3)

ready = target(2.0)

def nothing():
    return 3

def breaks(y):
    mu = numpyro.sample("mu", dist.Normal(0, 1))
    raise RuntimeError("out of cheese")

def apart():
    modes = lambda x: jnp.logaddexp(-0.5 * jnp.sum((x - 20)**2), -0.5 * jnp.sum((x + 20)**2))
    return modes, lambda key: 20.0 * jax.random.rademacher(key, (2,), float)

def quits():
    raise SystemExit(0)

def quits_later():
    return lambda x: exit("enough"), jnp.ones(3)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "model.py").write_text(MODEL)
    (folder / "wrong.py").write_text("import numpy as np\n\nx = undefined_name\n")
    (folder / "data.json").write_text(json.dumps({"y": [1.0, 2.0, 3.0, 4.0], "sigma": 2}))
    np.savez(folder / "data.npz", y=np.array([1.0, 2.0, 3.0, 4.0]), sigma=np.float64(2.0))
    (folder / "list.json").write_text("[1, 2]")
    (folder / "broken.npz").write_bytes(b"no archive")
    (folder / "typo.json").write_text('{"y": [1.0], "sigma": 2, "scal": 3}')
    return folder


OPTIONS = ["--kernel", "mala", "--num-samples", "400", "--num-warmup", "100", "--quiet"]


@pytest.fixture(scope="module")
def sampled(folder):
    """One small run with everything that can be written, and its exit code; later runs find its programs compiled."""
    seen, sample = [], partime_mcmc.sample
    load, files = cli._load_model, ["--out", f"{folder}/one.nc", "--report", f"{folder}/page.html"]
    loaded = {}

    def load_once(source):
        return loaded[source] if source in loaded else loaded.setdefault(source, load(source))

    def sample_seen(*given, **options):
        seen.append(sample(*given, **options))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(partime_mcmc, "sample", sample_seen)
        patched.setattr(cli, "_load_model", load_once)
        code = main(["sample", f"{folder}/model.py:ready", *OPTIONS, "--compare", *files])
        patched.setattr(partime_mcmc, "sample", sample)
        yield code, folder / "one.nc", folder / "page.html", seen[0]


def test_sample_writes_its_files(sampled):
    code, draws, page, _ = sampled
    assert code == 0
    posterior = read_netcdf(draws)["posterior"]["x"]
    assert posterior.shape == (4, 400, 2)
    assert abs(float(posterior.mean())) < 0.4 and abs(float(posterior.std()) - 2) < 0.3
    text = page.read_text()
    assert "4 of 4 chains certified" in text and "model.py:ready" in text
    # Traces, ranks, coupled pairs, and a solve by pass.
    assert text.count("data:image/png;base64,") == 4


def test_a_store_is_filled_read_and_gone_on_with(sampled, folder, capsys):
    model = f"{folder}/model.py:ready"
    command = ["sample", model, *OPTIONS, "--store", f"{folder}/run", "--thinning", "4"]
    assert main([*command, "--report", f"{folder}/stored.html", "--out", f"{folder}/kept.nc"]) == 0
    assert "400 draws of 4 chains, every 4th kept" in capsys.readouterr().out
    assert "every 4th" in (folder / "stored.html").read_text()
    stored, whole = (
        read_netcdf(folder / name)["posterior"]["x"].values for name in ("kept.nc", "one.nc")
    )
    np.testing.assert_allclose(stored, whole[:, 3::4], rtol=1e-4, atol=1e-4)
    assert main(["summary", f"{folder}/run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    # Of all draws, not only of those that were kept.
    assert found["finished"] and found["totals"]["num_draws"] == 400
    assert found["summary"][1]["mean"] == pytest.approx(whole[..., 1].mean(), abs=1e-4)
    assert main(["compare", f"{folder}/run", f"{folder}/kept.nc"]) == 0
    capsys.readouterr()
    assert main(command) == 2
    assert "holds a run; `resume` goes on with it" in capsys.readouterr().err
    assert main(["resume", f"{folder}/run", model, "--kernel", "mala"]) == 0
    assert "400 draws of 4 chains, every 4th kept" in capsys.readouterr().out
    assert main(["resume", f"{folder}/run", model, "--kernel", "hmc"]) == 2
    assert "kernel" in capsys.readouterr().err.splitlines()[-1]


def test_summary_and_compare_of_a_file(sampled, capsys):
    draws = sampled[1]
    assert main(["summary", str(draws), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (
        found["certified"]
        and found["summary"][0]["name"] == "x[0]"
        and found["plan"]["num_samples"] == 400
    )
    assert main(["summary", str(draws)]) == 0
    assert "4 of 4 chains certified" in capsys.readouterr().out
    assert main(["compare", str(draws), str(draws)]) == 0
    assert capsys.readouterr().out.startswith("BITWISE")


def test_compare_fails_by_its_exit_code(sampled, tmp_path, monkeypatch, capsys):
    tree = read_netcdf(sampled[1])
    tree["posterior"]["x"].values[:] += 1.0
    tree.to_netcdf(str(tmp_path / "shifted.nc"), engine="h5netcdf")
    assert main(["compare", str(sampled[1]), str(tmp_path / "shifted.nc"), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["level"] in ("FAIL", "INCONCLUSIVE")
    tree.attrs["certificate"] = tree.attrs["certificate"].replace(
        '"certified": [true', '"certified": [false'
    )
    tree["posterior"].attrs.clear()
    tree.to_netcdf(str(tmp_path / "uncertified.nc"), engine="h5netcdf")
    assert main(["summary", str(tmp_path / "uncertified.nc")]) == 1


@pytest.mark.parametrize(
    "command, message",
    [
        ("sample {f}/model.py:modle", "has no model 'modle'; it has Target, model,"),
        ("sample {f}/model.py", "wanted FILE.py:MODEL"),
        ("sample {f}/missing.py:model", "No such file"),
        ("sample {f}/wrong.py:x", "NameError: name 'undefined_name' is not defined (line 3)"),
        (
            "sample {f}/model.py:model",
            "model(y, sigma, scale=10.0): missing a required argument: 'y'",
        ),
        ("sample {f}/model.py:model --data {f}/missing.json", "No such file"),
        ("sample {f}/model.py:model --data {f}/list.json", "an object of values by name"),
        ("sample {f}/model.py:model --data {f}/broken.npz", "cannot be read"),
        ("sample {f}/model.py:model --data {f}/model.py", "wanted .npz, or .json"),
        (
            "sample {f}/model.py:model --data {f}/typo.json",
            "model(y, sigma, scale=10.0): got an unexpected keyword argument 'scal'",
        ),
        ("sample {f}/model.py:ready --data {f}/data.json", "takes no data"),
        ("sample {f}/model.py:quits", "model: it ends the program (SystemExit(0))"),
        ("sample {f}/mo\0del.py:ready", "wanted FILE.py:MODEL"),
        ("sample {f}/model.py:nothing", "which returns a int; wanted a NumPyro model"),
        ("sample {f}/model.py:MODEL", "has no model 'MODEL'"),
        ("sample banana --num-samples 0", "--num-samples: got 0"),
        ("convergence banana --num-pairs 1", "--num-pairs: got 1"),
        ("sample banana --store {f}/new --compare", "--compare: got --store with it"),
        ("resume {f}/missing banana", "missing"),
        ("sample banana --out {f}/draws.txt", "--out: got"),
        ("sample banana --report {f}/no/page.html", "in a folder that exists"),
        ("summary {f}/missing --report {f}/page.txt", "--report: got"),
        ("summary {f}/missing", "neither a store nor a file"),
        ("summary {f}/data.json", "holds no draws"),
        ("compare {f}/missing {f}/missing", "neither a store nor a file"),
        ("sample {f}/model.py:breaks --data {f}/data.json", "breaks(y): got an unexpected keyword"),
    ],
)
def test_what_is_wrong_is_one_sentence(folder, capsys, command, message):
    assert main(command.format(f=folder).split()) == 2
    out, err = capsys.readouterr()
    assert (
        message in err and err.startswith("partime_mcmc: ") and err.count("\n") == 1 and out == ""
    )


def test_errors_of_a_model_are_one_sentence_and_traced_on_demand(folder, capsys, tmp_path):
    (tmp_path / "y.json").write_text('{"y": [1.0]}')
    command = ["sample", f"{folder}/model.py:breaks", "--data", f"{tmp_path}/y.json"]
    assert main(command) == 2
    assert (
        capsys.readouterr().err
        == "partime_mcmc: RuntimeError: out of cheese. The NumPyro model failed after site 'mu'\n"
    )
    with pytest.raises(RuntimeError, match="cheese"):
        main([*command, "--traceback"])
    assert main(["sample", f"{folder}/model.py:quits_later", *OPTIONS]) == 2
    assert "model: it ends the program (SystemExit('enough'))" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("ragged.json", b'{"y": [[1, 2], [3]]}', "'y' is no array of numbers"),
        ("text.json", b'{"y": ["one", "two"]}', "'y' is no array of numbers"),
        ("gaps.json", b'{"y": [1, null]}', "'y' is no array of numbers"),
        ("huge.json", b'{"y": [1, 1' + b"0" * 30 + b"]}", "'y' is no array of numbers"),
        ("twice.json", b'{"y": [1], "sigma": 2, "y": [2]}', "two values are named 'y'"),
        ("number.json", b"3", "it holds a int"),
        ("zero.json", b'{"y": [1\0]}', "cannot be read"),
        ("fake.npz", b"PK but no archive", "it is no archive of NumPy's"),
        ("pickle.npz", pickle.dumps({"y": 1}), "it is no archive of NumPy's"),
    ],
)
def test_data_that_are_none_are_refused_by_name(tmp_path, folder, capsys, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert main(["sample", f"{folder}/model.py:model", "--data", f"{tmp_path / name}"]) == 2
    err = capsys.readouterr().err
    assert message in err and "pickle=" not in err and err.count("\n") == 1


def test_pickled_data_are_not_loaded_and_nobody_is_told_how(tmp_path, folder, capsys):
    np.savez(tmp_path / "objects.npz", y=np.array([{}, None], dtype=object))
    assert main(["sample", f"{folder}/model.py:model", "--data", f"{tmp_path}/objects.npz"]) == 2
    err = capsys.readouterr().err
    assert "'y' is no array of numbers" in err and "allow_pickle" not in err


@pytest.mark.parametrize(
    "option, value, wanted",
    [
        *(("--seed", text, "from 0 to 4294967295") for text in ("-1", "4294967296", "9" * 40, "x")),
        *((name, "", "wanted a path") for name in ("--store", "--out", "--report", "--data")),
        ("--store", "a\0b", "wanted a path"),
    ],
)
def test_values_that_mean_another_thing_are_refused(
    option, value, wanted, capsys, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["sample", "banana", f"{option}={value}"])
    assert stopped.value.code == 2 and f"argument {option}: got" in (err := capsys.readouterr().err)
    assert wanted in err and not list(tmp_path.iterdir())


def test_notes_of_jax_on_its_traceback_are_left_out():
    def traced(x):
        raise ValueError("no such thing")

    with pytest.raises(ValueError) as caught:
        jax.jit(traced)(1.0)
    assert any("JAX has removed" in note for note in caught.value.__notes__), (
        "there is nothing to leave out"
    )
    caught.value.add_note("after site 'mu'")
    assert cli._sentence(caught.value) == "no such thing. after site 'mu'"


@pytest.mark.parametrize(
    "command",
    [
        "compare {f}/run {f}/run",
        "compare {f}/one.nc {f}/run",
    ],
)
def test_draws_that_do_not_fit_are_not_read(sampled, folder, capsys, command, monkeypatch):
    if not (folder / "run").exists():
        assert (
            main(
                [
                    "sample",
                    f"{folder}/model.py:ready",
                    *OPTIONS,
                    "--store",
                    f"{folder}/run",
                    "--thinning",
                    "4",
                ]
            )
            == 0
        )
    monkeypatch.setattr(cli, "default_max_bytes", lambda: 10_000)
    capsys.readouterr()
    assert main(command.format(f=folder).split()) == 2
    assert "keep fewer with a larger thinning" in capsys.readouterr().err
    assert main(["summary", f"{folder}/run"]) == 0


@pytest.mark.parametrize(
    "model, code, words",
    [("ready", 0, "all 8 pairs of chains met"), ("apart", 3, "OF 8 PAIRS OF CHAINS DID NOT MEET")],
)
def test_distance_from_the_posterior_is_bounded_where_pairs_meet(
    folder, capsys, model, code, words
):
    options = ["--num-warmup", "100", "--num-pairs", "8", "--quiet"]
    assert main(["convergence", f"{folder}/model.py:{model}", *options]) == code
    assert words in capsys.readouterr().out


def test_without_a_command_the_help_is_shown(capsys):
    assert main([]) == 2
    err = capsys.readouterr().err
    assert "Exit codes:" in err and all(
        name in err for name in ("demo", "sample", "resume", "summary", "compare", "convergence")
    )
    with pytest.raises(SystemExit) as stopped:
        main(["sample"])
    assert stopped.value.code == 2


def test_interruption_has_its_own_code(monkeypatch, folder, capsys, sampled):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(partime_mcmc, "sample", interrupted)
    assert main(["sample", f"{folder}/model.py:ready"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    # What was certified before is printed and written all the same.
    report = dataclasses.replace(
        sampled[3].report, status=(Status.INTERRUPTED,) * 4, interrupted=True
    )
    monkeypatch.setattr(
        partime_mcmc, "sample", lambda *_, **__: dataclasses.replace(sampled[3], report=report)
    )
    assert main(["sample", f"{folder}/model.py:ready", "--out", f"{folder}/part.nc"]) == 130
    assert "x[0]" in capsys.readouterr().out and (folder / "part.nc").exists()


@pytest.mark.parametrize(
    "name, data, dimension",
    [
        ("ready", "", 2),
        ("pair", "", 3),
        ("target", "--data {f}/scale.json", 2),
        ("model", "--data {f}/data.json", 1),
    ],
)
def test_models_targets_and_pairs_are_taken(monkeypatch, folder, name, data, dimension):
    seen = []

    def only_look(key, target, *rest, **options):
        seen.append(target)
        raise KeyboardInterrupt

    monkeypatch.setattr(partime_mcmc, "sample", only_look)
    (folder / "scale.json").write_text('{"scale": 2.0}')
    assert main(["sample", f"{folder}/model.py:{name}", *data.format(f=folder).split()]) == 130
    position = seen[0].start(jax.random.key(0))
    assert sum(leaf.size for leaf in jax.tree.leaves(position)) == dimension
    assert np.isfinite(seen[0].logdensity(position))


def test_npz_and_json_are_the_same_data(folder):
    one, two = cli._load_data(folder / "data.json"), cli._load_data(folder / "data.npz")
    np.testing.assert_array_equal(one["y"], two["y"])
    assert one["sigma"] == two["sigma"] and not isinstance(two["sigma"], np.ndarray)


def test_the_demo_shows_that_both_ways_are_one(tmp_path, capsys):
    counts = ["--num-samples", "400", "--num-chains", "2", "--num-warmup", "100"]
    assert main(["demo", "--model", "banana", *counts, "--out", str(tmp_path)]) == 0
    assert "the parallel path" in capsys.readouterr().out
    assert json.loads((tmp_path / "report.json").read_text())["ok"]
    assert {path.name for path in tmp_path.iterdir()} == {"draws.nc", "report.json", "demo.png"}


def test_the_command_is_installed_under_its_name():
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"partime-mcmc": f"{main.__module__}:{main.__name__}"}
