"""The run that tests of stores look at; also a program that begins or goes on with it, to be killed.

python store_case.py FOLDER NUM_SAMPLES
"""

import contextlib
import functools
import os
import signal
import sys

import blackjax
import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc import compile_cache
from partime_mcmc.engine.recipes import jacobi
from partime_mcmc.engine.windows import Windows
from partime_mcmc.kernels import from_blackjax
from partime_mcmc.sampling.progress import quiet
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target
from partime_mcmc.storage.store import Store

STEP, CHAINS, CHUNK = 0.35, 2, 24
DATA = np.array([0.5, -1.0, 2.0])


def target_of(data=DATA, power=2):
    """A dict of a vector and a number; the data are captured."""

    def logdensity(position):
        return (
            -0.5 * jnp.sum(jnp.abs(position["place"] - data) ** power)
            - 0.5 * (position["level"] - 1) ** 2
        )

    return Target(
        logdensity, {"place": np.zeros(3), "level": np.float64(0.3)}, dims={"place": ("site",)}
    )


@functools.cache
def target():
    return target_of()


def kernel_of(target, step=STEP):
    """MALA on a target."""
    return from_blackjax(blackjax.mala(target.logdensity, step), noise_scale=np.sqrt(2 * step))


@functools.cache
def kernel(step=STEP):
    return kernel_of(target(), step)


def run(store=None, num_samples=120, key=0, **changes):
    """The run, in memory or in a folder."""
    arguments = {
        "num_samples": num_samples,
        "num_chains": CHAINS,
        "solver": jacobi(),
        "schedule": Windows(CHUNK),
        "progress": False,
    } | changes
    store = store if store is None or isinstance(store, Store) else Store(store, chunk=CHUNK)
    what = arguments.pop("target", target()), arguments.pop("kernel", kernel())
    return sample(jax.random.key(key), *what, store=store, **arguments)


class PrintsDraws(type(quiet)):
    """A progress that writes a line on standard output when draws were made."""

    @contextlib.contextmanager
    def stage(self, name, total):
        yield lambda steps, **shown: print("draws", flush=True) if steps and shown else None


if __name__ == "__main__":
    if "xla_backend_optimization_level" in os.environ.get("XLA_FLAGS", ""):
        compile_cache.CPU_OPTIONS.clear()  # as in conftest.py: bits depend on how hard the compiler tries
    jax.config.update("jax_enable_x64", True)
    # A parent that ignores Ctrl-C, as workers of a parallel test run do, would have its children ignore it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    print("begin", flush=True)
    print(run(sys.argv[1], int(sys.argv[2]), progress=PrintsDraws()).status, flush=True)
