"""Every algorithm of BlackJAX for chains is a recurrence, or the table says why not."""

import jax
import pytest

from benchmarks.blackjax_kernels import KERNELS, LEFT_OUT, algorithms, measure, table


@pytest.fixture(autouse=True)
def in_float64():
    with jax.enable_x64(True):
        yield


def test_none_is_forgotten():
    assert set(algorithms()) == set(KERNELS) | set(LEFT_OUT)
    assert not set(KERNELS) & set(LEFT_OUT)


def check(name):
    row = measure(name, num_steps=256, repeats=1)
    assert row["certified"] and row["difference"] < 1e-8, row
    assert row["rejected"] is None or row["rejected"] < 0.9
    assert row["met"] <= 1 and name in table([row])
    return row


@pytest.mark.parametrize("name", ["irmh", "mgrad_gaussian"])
def test_the_chain_is_that_of_blackjaxs_loop(name):
    row = check(name)
    # Whoever proposes from a fixed law forgets at the first proposal that all accept.
    assert name != "irmh" or (row["met"] == 1 and row["rejected"] > 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(KERNELS) - {"irmh", "mgrad_gaussian"}))
def test_and_so_is_that_of_the_others(name):
    check(name)
