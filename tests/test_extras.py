"""Base dependencies suffice for the solvers, and what needs an extra says which one."""

import subprocess
import sys

import pytest

import partime_mcmc

# An import of these fails as it does where they are not installed.
BLOCK = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
"""
EXTRAS = [
    "arviz",
    "arviz_base",
    "blackjax",
    "equinox",
    "flax",
    "funsor",
    "h5netcdf",
    "h5py",
    "matplotlib",
    "numpyro",
    "optax",
    "pandas",
    "sklearn",
    "tqdm",
    "xarray",
    "zarr",
]


def run_without(names, code):
    """What a Python without some packages prints."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCK.format(names=set(names)) + code],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


SOLVERS = """
import jax.numpy as jnp
import partime_mcmc as pm
from partime_mcmc import distributed, engine, forgetting, linearize, rnn, scan, solvers
from partime_mcmc.engine.solve import solve

assert pm.solve is solve and callable(pm.certify) and callable(pm.hosts)
dynamics = pm.Dynamics(lambda params, x, u: 0.5 * jnp.tanh(x) + u)
drives = jnp.linspace(0.0, 1.0, 64)[:, None]
expected = pm.solve(dynamics, jnp.zeros(1), drives, solver=pm.sequential()).states
for solver in (pm.deer(), pm.quasi_deer(), pm.elk(), pm.quasi_elk(), pm.picard(), pm.jacobi(), pm.shooting()):
    found = pm.solve(dynamics, jnp.zeros(1), drives, solver=solver).or_raise()
    assert jnp.allclose(found.states, expected, atol=1e-4)
mesh = pm.time_mesh(1)
pm.sharded_solve(dynamics, jnp.zeros(1), drives, mesh=mesh).or_raise()
print("solved")
"""


def test_jax_and_numpy_suffice_for_the_solvers():
    assert run_without(EXTRAS, SOLVERS) == "solved\n"


REPORT = """
import partime_mcmc
try:
    partime_mcmc.{name}
except ImportError as error:
    print(error)
"""


@pytest.mark.parametrize(
    "missing, name, extra",
    [
        ("blackjax", "mala", "mcmc"),
        ("tqdm", "sample", "mcmc"),
        ("numpyro", "ParallelMCMC", "numpyro"),
        ("numpyro", "numpyro", "numpyro"),
        ("blackjax", "from_numpyro", "numpyro"),
    ],
)
def test_a_missing_extra_is_named(missing, name, extra):
    said = run_without([missing], REPORT.format(name=name))
    assert said == f"partime_mcmc.{name} needs {missing}; install partime_mcmc[{extra}]\n"


def test_importing_leaves_the_backend_asleep():
    """What sets up devices may come after the import."""
    code = """
from partime_mcmc import ParallelMCMC, coalescing_hmc
import jax, numpyro
numpyro.set_host_device_count(3)
print(jax.local_device_count())
"""
    assert run_without((), code).strip() == "3"


def test_importing_does_not_import_extras():
    code = f"import partime_mcmc, sys; print(sorted(set({EXTRAS!r}) & set(sys.modules)))"
    assert run_without([], code) == "[]\n"


def test_every_public_name_is_there_and_listed():
    assert set(partime_mcmc.__all__) <= set(dir(partime_mcmc))
    for name in partime_mcmc.__all__:
        assert getattr(partime_mcmc, name).__name__ == name


def test_a_name_that_never_was_is_no_attribute():
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = partime_mcmc.no_such_name


@pytest.mark.parametrize("old", sorted(partime_mcmc._MOVED))
def test_old_names_work_with_a_warning(old):
    with pytest.warns(DeprecationWarning, match=f"partime_mcmc.{old} is now"):
        assert getattr(partime_mcmc, old) is not None
