"""What cannot fit is refused from shapes alone: before warm-up, in no time, and before anything is allocated."""

import time

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest

from partime_mcmc.certify.recorded import CertifyIndependently, CertifyWhileRolling
from partime_mcmc.engine import deer, elk
from partime_mcmc.kernels import hmc
from partime_mcmc.numpyro import HMC, ParallelMCMC
from partime_mcmc.sampling import memory
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target
from partime_mcmc.storage.store import Store
from partime_mcmc.validation import TooLarge

LIMIT = 2**30
INDEPENDENT = CertifyIndependently()


class Begun(Exception):
    """The run began: its first starts were asked for."""


@pytest.fixture(autouse=True)
def too_early(monkeypatch):
    """A machine of a known size, on which nothing may begin, not even the search for starts."""

    def begin(target, keys):
        raise Begun

    monkeypatch.setattr(memory, "default_max_bytes", lambda mesh=None: LIMIT)
    monkeypatch.setattr(Target, "starts", begin)
    before = time.process_time()
    yield
    assert time.process_time() - before < 2


def target_of(dimension=3, constrain=None):
    return Target(
        lambda x: -0.5 * jnp.sum(x**2), lambda key: jax.random.normal(key, (dimension,)), constrain
    )


def test_sample_refuses_at_once(tmp_path):
    with pytest.raises(
        TooLarge, match="num_samples: got 500000000 draws.* keep the draws on disk with store="
    ):
        sample(jax.random.key(0), target_of(), hmc, num_samples=5 * 10**8)
    with pytest.raises(TooLarge, match="store.chunk: got 100000000: 99991552 steps of 4 chains"):
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
        TooLarge, match="num_samples: got 500000000 draws.* keep the draws on disk with store="
    ):
        mcmc.run(jax.random.key(0))
    with pytest.raises(TooLarge, match="store.chunk: got 100000000: 99991552 steps of 4 chains"):
        mcmc.run(jax.random.key(0), store=Store(tmp_path / "run", chunk=10**8))


def fits(target, certificate=INDEPENDENT, num_samples=10_000, solver=None):
    """Whether a run of four chains begins."""
    options = {"num_samples": num_samples, "certificate": certificate, "solver": solver}
    with pytest.raises((TooLarge, Begun)) as raised:
        sample(jax.random.key(0), target, hmc, **options)
    return raised.type is Begun


def test_what_the_model_makes_of_a_position_counts():
    def rich(x):
        return {"curve": jnp.broadcast_to(x[0], (10_000,))}

    # 10,000 draws of 4 chains: 1.6 GB of curves.
    assert (
        fits(target_of())
        and not fits(target_of(constrain=rich))
        and fits(target_of(constrain=rich), num_samples=5_000)
    )


def test_what_steps_record_counts():
    # 4 chains x 10,000 draws x 1,000 numbers in 6 copies are 960 MB; a defect of each number makes a seventh.
    assert fits(target_of(1_000)) and not fits(target_of(1_000), CertifyWhileRolling())
    # 10^7 draws of one number: 24 bytes of copies each, and 36 of what steps report.
    assert not fits(target_of(1), num_samples=5 * 10**6) and LIMIT > 5 * 10**6 * 4 * 24


def test_what_solvers_keep_of_each_step_counts():
    # 4 chains x 10,000 steps x 6 copies of a matrix of 22 x 22 are 0.5 GB, of the three that a message of the filter holds 1.4.
    assert fits(target_of(22), solver=deer()) and not fits(target_of(22), solver=elk())
