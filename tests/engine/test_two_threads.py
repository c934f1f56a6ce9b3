"""Two threads of the user's that solve at once: programs that call a library never run side by side, and both paths are right."""

import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from partime_mcmc import Dynamics, rollout, sequential, shooting, solve
from partime_mcmc.rnn import unroll

T, D = 24, 3
EVENTS: list[tuple[float, bool]] = []
# What a step reads must stay as it is, or it is traced anew: it sees the method, not the list.
NOTE = EVENTS.append


def on_host(who, x):
    """Notes for whom Python is asked, and when it is done."""
    NOTE((float(who), True))
    time.sleep(0.002)
    NOTE((float(who), False))
    return np.asarray(x)


def most_at_once():
    """For how many Python was asked at the same time."""
    inside, most = set(), 0
    for who, begins in EVENTS:
        inside = inside | {who} if begins else inside - {who}
        most = max(most, len(inside))
    return most


def step(who, x, drive):
    """Calls LAPACK twice and Python once."""
    factor = jnp.linalg.cholesky(jnp.eye(D) * (2 + who) + jnp.outer(x, x))
    x = 0.5 * jax.scipy.linalg.solve_triangular(factor, x, lower=True) + drive
    return jax.pure_callback(on_host, jax.ShapeDtypeStruct((D,), x.dtype), who, x, vmap_method="sequential")  # fmt: skip


def cell(who, x, drive):
    x = step(who, x, drive)
    return x, x


SOLVES = {
    "one after another": lambda who, drives: solve(
        Dynamics(step, who), jnp.zeros(D), drives, solver=sequential()
    ).or_raise(),
    "segments": lambda who, drives: solve(
        Dynamics(step, who), jnp.zeros(D), drives, solver=shooting(4)
    ).or_raise(),
    "unroll": lambda who, drives: unroll(cell, who, jnp.zeros(D), drives),
}


def path_of(found):
    return np.asarray(getattr(found, "states", found[1] if isinstance(found, tuple) else None))


@pytest.mark.parametrize("name", SOLVES)
def test_two_threads_find_their_paths_and_wait_for_each_other(name):
    drives = jax.random.normal(jax.random.key(0), (T, D))
    whose = [jnp.asarray(1.0), jnp.asarray(2.0)]
    truth = [np.asarray(rollout(Dynamics(step, who), jnp.zeros(D), drives)) for who in whose]
    SOLVES[name](whose[0], drives)
    found, begin = [[], []], threading.Barrier(2, timeout=60)

    def ask(place):
        begin.wait()
        for _ in range(3):
            found[place].append(path_of(SOLVES[name](whose[place], drives)))

    EVENTS.clear()
    threads = [threading.Thread(target=ask, args=(place,), daemon=True) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "the programs wait for each other"
    assert len(EVENTS) >= 2 * 2 * 3 * T and most_at_once() == 1
    for paths, right in zip(found, truth):
        assert len(paths) == 3
        for path in paths:
            np.testing.assert_allclose(path, right, rtol=0, atol=1e-5)
