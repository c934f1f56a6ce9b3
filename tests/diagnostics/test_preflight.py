"""What cannot fit is refused from shapes alone: before warm-up, in no time, and before anything is allocated."""

import importlib
import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from partime_mcmc.sampling.chains import check_fits

from partime_mcmc import ParallelMCMC, Store, Target, hmc, sample
from partime_mcmc.certify.recorded import CertifyIndependently, CertifyWhileRolling
from partime_mcmc.numpyro import HMC, stored
from partime_mcmc.numpyro import mcmc as parallel
from partime_mcmc.sampling import chains
from partime_mcmc.sampling import memory as arguments
from partime_mcmc.validation import TooLarge

# Modules whose names their functions hide.
sampling, resume = (
    importlib.import_module(f"partime_mcmc.sampling.{name}") for name in ("sample", "resume")
)
LIMIT = 2**30


@pytest.fixture(autouse=True)
def too_early(monkeypatch):
    """A machine of a known size, on which nothing may begin, not even warm-up."""
    for module in (arguments, chains):
        monkeypatch.setattr(module, "default_max_bytes", lambda mesh=None: LIMIT)
    for module, name in (
        (sampling, "make_ready"),
        (resume, "make_ready"),
        (parallel, "begin"),
        (stored, "begin"),
    ):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("the run had begun"))
    begin = time.process_time()
    yield
    assert time.process_time() - begin < 2


def target_of(dimension=3, constrain=None):
    return Target(
        lambda x: -0.5 * jnp.sum(x**2), lambda key: jax.random.normal(key, (dimension,)), constrain
    )


def test_sample_refuses_at_once(tmp_path):
    with pytest.raises(
        TooLarge, match="num_samples: got 500000000 steps.* keep the draws on disk with store="
    ):
        sample(jax.random.key(0), target_of(), hmc, num_samples=5 * 10**8)
    with pytest.raises(TooLarge, match="store.chunk: 100000000 steps of 4 chains"):
        sample(
            jax.random.key(0),
            target_of(),
            hmc,
            num_samples=5 * 10**8,
            store=Store(tmp_path / "run", chunk=10**8),
        )


def test_numpyros_front_refuses_at_once(tmp_path):
    def model():
        numpyro.sample("x", dist.Normal(0, 1))

    mcmc = ParallelMCMC(HMC(model), num_warmup=1000, num_samples=5 * 10**8, num_chains=4)
    with pytest.raises(
        TooLarge, match="num_samples: got 500000000 steps.* keep the draws on disk with store="
    ):
        mcmc.run(jax.random.key(0))
    with pytest.raises(TooLarge, match="store.chunk: 99991552 steps of 4 chains"):
        mcmc.run(jax.random.key(0), store=Store(tmp_path / "run", chunk=10**8))


def fits(target, certificate=CertifyIndependently(), num_samples=10_000):
    try:
        check_fits(target, num_samples, 4, solver=None, schedule=None, certificate=certificate)
    except TooLarge:
        return False
    return True


def test_what_the_model_makes_of_a_position_counts():
    def rich(x):
        return {"curve": jnp.broadcast_to(x[0], (10_000,))}

    # 10,000 draws of 4 chains: 1.6 GB of curves.
    assert (
        fits(target_of())
        and not fits(target_of(constrain=rich))
        and fits(target_of(constrain=rich), num_samples=5_000)
    )


def test_what_steps_say_of_themselves_counts():
    # 4 chains x 10,000 draws x 1,000 numbers in 6 copies are 960 MB; a defect of each number makes a seventh.
    assert fits(target_of(1_000)) and not fits(target_of(1_000), CertifyWhileRolling())
    # 10^7 draws of one number: 24 bytes of copies each, and 36 of what is said.
    assert not fits(target_of(1), num_samples=5 * 10**6) and 5 * 10**6 * 4 * 24 < LIMIT
