"""A wrong argument is refused before anything is computed: the message names it, says what it got and what was wanted."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import (
    Target,
    Tolerance,
    certify,
    compare,
    hmc,
    mala,
    sample,
    sequential,
    to_arviz,
)
from partime_mcmc.rnn import unroll

KEY = jax.random.key(0)


def normal(x):
    return -0.5 * jnp.sum(x**2)


def sampled(target=None, key=KEY, **more):
    target = Target(normal, jnp.ones(2)) if target is None else target
    return sample(
        key, target, mala(normal, 0.1), num_samples=4, num_chains=1, progress=False, **more
    )


def certified(**wrong):
    kernel = mala(normal, 0.1)
    state = kernel.init(jnp.ones(2))
    right = {
        "kernel": kernel,
        "initial": kernel.carry(state),
        "states": jnp.ones((3, 2)),
        "drives": kernel.tape(KEY, 3, state),
    }
    return certify(**(right | wrong))


def named(name):
    values = np.random.default_rng(0).normal(size=(2, 20))
    return types.SimpleNamespace(constrained={name: values}, positions=None)


WRONG = {
    "no position": (lambda: sampled(Target(normal, {})), "initial: got .*without entries.*wanted"),
    "keys of several types": (
        lambda: sampled(Target(lambda x: normal(x["a"]), {"a": jnp.ones(2), 1: jnp.ones(1)})),
        "initial: got a dict with keys of several types; wanted",
    ),
    "half": (
        lambda: sampled(Target(normal, jnp.ones(2, jnp.float16))),
        "initial: got float16; wanted float32 or float64",
    ),
    "bfloat16": (
        lambda: sampled(Target(normal, jnp.ones(2, jnp.bfloat16))),
        "initial: got bfloat16; wanted float32 or float64",
    ),
    "complex step": (lambda: mala(normal, 1j), "step_size: got 1j, wanted one positive"),
    "text": (lambda: mala(normal, "abc"), "step_size: got 'abc', wanted one positive"),
    "text, hmc": (lambda: hmc(normal, "x", jnp.ones(2), 3), "step_size: got 'x', wanted"),
    "adaptation": (lambda: sampled(adaptation=5), "adaptation: got 5, wanted PooledAdaptation"),
    "nan": (lambda: sampled(tolerance=Tolerance(np.nan)), "tolerance: relative must be finite"),
    "negative": (lambda: sampled(tolerance=Tolerance(-1)), "tolerance: relative .* got -1"),
    "tolerance as text": (lambda: sampled(tolerance=Tolerance(0.0, "x")), "tolerance: absolute"),
    "no kernel": (lambda: certified(kernel=None), "kernel: got None, wanted a Kernel"),
    "width": (
        lambda: certified(states=jnp.ones((3, 3))),
        r"states: got the shape \(3, 3\), wanted a leading axis T and then \(2,\)",
    ),
    "list": (lambda: certified(states=[jnp.ones(2)] * 3), "states: got the structure .*wanted"),
    "compare": (lambda: compare(1, 2), "parallel: got 1, wanted the draws of a run"),
    "no cell": (
        lambda: unroll(None, None, jnp.ones(2), jnp.ones((5, 2))),
        "cell: got None, wanted a function",
    ),
    "site named chain": (lambda: to_arviz(named("chain")), "draws: got a value named 'chain'"),
    "site named draw": (lambda: to_arviz(named("draw")), "draws: got a value named 'draw'"),
    "site named as an axis": (
        lambda: to_arviz(named("n"), dims={"other": ["n"]}),
        "draws: got a value named 'n'",
    ),
    "rbg": (
        lambda: sampled(key=jax.random.key(0, impl="rbg")),
        "key: got a key of the generator .*rbg.*wanted one of threefry",
    ),
    "rbg, tape": (
        lambda: mala(normal, 0.1).tape(
            jax.random.key(0, impl="unsafe_rbg"), 3, mala(normal, 0.1).init(jnp.ones(2))
        ),
        "key: got a key of the generator .*wanted one of threefry",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_the_message_names_the_argument(name):
    call, message = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_what_is_right_passes():
    assert sampled(tolerance=Tolerance(1e-6), solver=sequential()).num_samples == 4
    assert certified().num_steps == 3
    assert "x" in to_arviz(named("x")).posterior
