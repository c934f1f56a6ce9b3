"""What sampling will need, compiled in threads while warm-up runs.

Step sizes, numbers of leapfrog steps, metrics and weights of maps are numbers of the programs, so these can be compiled before
warm-up has found them: a kernel with any numbers of the right shapes and types leads to the same programs. The compiler
works outside Python's lock, and the second core has nothing to do meanwhile.

A program that both want is compiled once, and the one that comes later waits for it (`tracing.OnceCache`).
"""

import contextlib
from typing import Iterator

import jax
import numpy as np

from partime_mcmc.compile_cache import Timings, in_thread, num_cores
from partime_mcmc.kernels import Whitening
from partime_mcmc.kernels.kernel_program import (
    Builder,
    KernelProgram,
    ParametrisedKernel,
    density_of,
    parametrised_kernel,
)
from partime_mcmc.sampling.arguments import SampleArguments
from partime_mcmc.sampling.local import compile_first_chunk
from partime_mcmc.sampling.plan import chooses_coupling, plan_for
from partime_mcmc.sampling.randomness import begin
from partime_mcmc.warmup.metric import metric_for, unit_metric
from partime_mcmc.warmup.pooled import PooledAdaptation
from partime_mcmc.warmup.triangular_fit import first_maps
from partime_mcmc.warmup.tuning import any_settings
from partime_mcmc.warmup.warmup import blas_libraries


@contextlib.contextmanager
def compiling_first_chunk(asked: SampleArguments, builder: Builder, chunk: int) -> Iterator[None]:
    """Compile the programs of the first chunk while the body runs, which is warm-up.

    Where what warm-up finds may change the programs (the coupling, the form of the metric), where a mesh shares the work,
    or where there is one core only, nothing is compiled. If warm-up learns a triangular map of a small model, or one with many
    scales, which is seldom, what was compiled is of no use.

    Args:
        asked: What the run was asked for.
        builder: Of the kernel.
        chunk: Steps per chunk.
    """
    kernel = _untuned_kernel(asked, builder) if num_cores() > 1 and _is_known(asked) else None
    if kernel is None or not asked.num_samples or chooses_coupling(asked, kernel):
        yield
        return

    def compile_chunk():
        positions = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct((asked.num_chains, *leaf.shape), leaf.dtype),
            kernel.numbers.whitening.example,
        )
        # What fails here fails again where it is wanted.
        with contextlib.suppress(Exception):
            state = begin(kernel, positions, asked.chain_keys, Timings())
            compile_first_chunk(plan_for(asked, chunk, kernel, None, state), state)

    blas_libraries()  # now, while no thread is in the way
    in_thread(compile_chunk)
    yield


def _is_known(asked: SampleArguments) -> bool:
    adaptation = asked.adaptation or PooledAdaptation()
    return (
        asked.mesh is None
        and isinstance(adaptation, PooledAdaptation)
        and adaptation.metric is None
    )


def _untuned_kernel(asked: SampleArguments, builder: Builder) -> ParametrisedKernel | None:
    """A kernel of the program that warm-up's kernel will have, with arbitrary numbers; None if that is not known.

    Models are traced here, not in the thread: NumPyro's handlers are not made for several threads.
    """
    try:
        shapes = asked.target.example()
        dimension = sum(leaf.size for leaf in jax.tree.leaves(shapes))
        example = jax.device_put(
            jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        )
        density, data = density_of(asked.target.logdensity, example)
        metric = unit_metric(metric_for(dimension), dimension)
        maps = first_maps(density, example, asked.target.centring)
        whitening = Whitening.of_covariance(example, np.zeros(dimension), metric, maps)
        family = KernelProgram(density, builder)
        return parametrised_kernel(family, data, whitening, any_settings(builder))
    except Exception:  # the same fails in earnest, where it is reported
        return None
