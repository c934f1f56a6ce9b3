"""Fixtures and options shared by all tests.

Nothing global is set but how hard the compiler tries: 64-bit floats are switched on inside a fixture and off again, and no
compilation cache is kept between runs (a stale one would hide what a compiler does today).

Most of the suite's time is compilation, so machine code is generated without optimisation unless `XLA_FLAGS` says otherwise;
fusion and everything above it are as ever, though JAX 0.10 makes kernels of fusions in its older way. `.ci/run` runs the smoke part, and tests about single bits run themselves, with the
compiler's own settings.
"""

import itertools
import os
from importlib.metadata import version
from pathlib import Path

# Before JAX starts its backend. The older way to make kernels, where there is a choice, compiles twice as fast.
QUICKLY = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    QUICKLY += " --xla_cpu_use_fusion_emitters=false"
os.environ.setdefault("XLA_FLAGS", QUICKLY)
os.environ.setdefault("PARTIME_CACHE", "0")

import hypothesis  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pytest  # noqa: E402

from partime_mcmc import compile_cache as programs  # noqa: E402
from partime_mcmc.sampling import plan  # noqa: E402

if "xla_backend_optimization_level" in os.environ["XLA_FLAGS"]:
    programs.CPU_OPTIONS.clear()

hypothesis.settings.register_profile(
    # The same examples in every run, and no clock: the first example of a shape compiles.
    "partime",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=25,
    suppress_health_check=[
        hypothesis.HealthCheck.function_scoped_fixture,
        hypothesis.HealthCheck.too_slow,
    ],
)
hypothesis.settings.load_profile("partime")


# For `jax.jit(..., compiler_options=...)`: the code that users get.
OPTIMISED = {"xla_backend_optimization_level": 3}

# What depends on the generation of Python, JAX and ArviZ: run on a second one, too.
SMOKE = {
    "test_architecture",
    "test_arviz",
    "test_certify",
    "test_derivatives",
    "test_model",
    "test_selftest",
    "test_shooting",
    "test_theorem",
}


# Folders of the tests that are run while one works on the solvers and the kernels, in under five minutes on two cores; without
# those that take longest among them, by file and by name.
FAST = {"engine", "scan", "solvers", "kernels", "linearize", "certify"}
NOT_FAST = {
    "test_any_length_and_any_cut_give_the_path",
    "test_a_longer_path_takes_what_is_stated",
    "test_chains_of_every_kind",
    "test_corrections_make_slow_systems_converge",
    "test_coupling",
    "test_a_density_that_is_random_away_from_the_start_is_not_certified",
    "test_chains_that_fell_back_are_certified_by_what_was_recorded",
    "test_equals_the_sequential_path",
    "test_every_scan_is_the_loop",
    "test_first_derivatives_in_everything",
    "test_float32_path_is_certified_and_stays_float32",
    "test_messages_are_the_textbook_filter",
    "test_nan_at_step_500_is_found_there",
    "test_one_step_with_the_jacobian_is_deer",
    "test_overflow_of_the_system_itself",
    "test_paths_are_blackjaxs_own_loop",
    "test_honest_code_is_certified",
    "test_rejected_steps_stand_still_to_the_last_bit",
    "test_the_draws_do_not_depend_on_the_certification",
    "test_sampling_falls_back_where_chains_do_not_forget_and_the_advice_is_why",
    "test_the_trust_region_step_is_damped_least_squares",
    "test_two_byte_floats_are_added_up_in_four",
    "test_windows_shorter_than_a_burst_of_rejections",
}


def is_fast(item):
    """Whether a test is one of those that are run while one works."""
    name = getattr(item, "originalname", item.name)
    return (
        item.path.stem == "test_architecture"
        or item.path.parent.name in FAST
        and not {item.path.stem, name} & NOT_FAST
        and "slow" not in item.keywords
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.stem in SMOKE:
            item.add_marker(pytest.mark.smoke)
        if is_fast(item):
            item.add_marker(pytest.mark.fast)


def pytest_addoption(parser):
    parser.addoption(
        "--full-catalogue",
        action="store_true",
        help="every solver x dynamics x floating-point type x length, not a covering choice of them",
    )


# Every compiled program holds some mappings of memory, of which Linux grants a process 65,530; beyond these the compiler
# crashes. A thousand tests in one process come near that.
_MOST_MAPPINGS = 15_000
_tests_done = itertools.count(1)


@pytest.fixture(autouse=True)
def code_forgotten():
    """What tests have compiled is dropped when it becomes too much."""
    yield
    mappings = Path("/proc/self/maps")
    if (
        next(_tests_done) % 10 == 0
        and mappings.exists()
        and mappings.read_text().count("\n") > _MOST_MAPPINGS
    ):
        jax.clear_caches()


@pytest.fixture(autouse=True)
def solved_in_parallel(request, monkeypatch):
    """Short runs are solved in parallel, as long ones are, but in tests marked `short_runs`: those see what users of these see."""
    if request.node.get_closest_marker("short_runs") is None:
        monkeypatch.setattr(plan, "_SHORT_LOOP", 0.0)


@pytest.fixture(params=["float32", "float64"])
def precision(request):
    """The floating-point type of a test, which runs once in each."""
    with jax.enable_x64(request.param == "float64"):
        yield jnp.dtype(request.param)


@pytest.fixture
def double():
    """A test in float64."""
    with jax.enable_x64(True):
        yield jnp.dtype("float64")
