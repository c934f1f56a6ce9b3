"""How many steps a chunk has, from shapes alone: what cannot fit is refused before anything is computed.

In memory a run is one chunk, and all of its draws must fit. In a store a chunk is what fits, is worth its overhead, and
divides the run evenly where it can. Either way the solver's linear maps of one window must fit beside the draws.
"""

import functools
import os

import jax
from jax.sharding import Mesh

from partime_mcmc.certify.recorded import CertifyWhileRolling
from partime_mcmc.engine import Windows, sequential
from partime_mcmc.sampling.arguments import SampleArguments
from partime_mcmc.validation import TooLarge, check_bytes, check_count

# Steps of a window, if the user does not say.
DEFAULT_WINDOW = 16384
# Of the memory of the device; the rest is for the compiler, the host and everybody else.
_SHARE = 0.6
# Steps and bytes of a chunk of a stored run, when nothing else limits it.
_CHUNK, _CHUNK_BYTES = 65536, 2**29
# Bytes of its draws, where many devices share a chunk and one host writes it.
_WRITTEN_BYTES = 2**31
# Numbers that a kernel reports of a step: decision, probability, energy, margins and the like.
_NUM_INFO = 9
# No limit of bytes.
_ANY = 2**63


def chunk_steps(asked: SampleArguments) -> int:
    """Steps of a chunk.

    Args:
        asked: What the run was asked for.

    Raises:
        TooLarge: Naming the setting to change.
    """
    example, constrain = asked.target.example(), asked.target.constrain
    sizes = [(leaf.size, leaf.dtype.itemsize) for leaf in jax.tree.leaves(example)]
    dimension, itemsize = sum(size for size, _ in sizes), sizes[0][1] if sizes else 4
    limit = default_max_bytes(asked.mesh) if asked.max_bytes is None else asked.max_bytes
    # Bytes per draw of what is kept besides positions: values in the model's space, and what a step reports.
    recorded = isinstance(asked.certificate, CertifyWhileRolling) and asked.mesh is None
    values = () if constrain is None else jax.tree.leaves(jax.eval_shape(constrain, example))
    more = (_NUM_INFO + (dimension if recorded else 0)) * itemsize
    more += sum(leaf.size * leaf.dtype.itemsize for leaf in values)
    rows, parts = mesh_shape(asked.mesh)
    num_chains = asked.num_chains // rows
    per_step = (asked.solver or sequential()).map_size(dimension)
    bytes_of = functools.partial(
        check_bytes, dimension=dimension, itemsize=itemsize, num_chains=num_chains
    )
    if asked.store is None:
        steps = -(-asked.num_samples // parts)
        window = getattr(asked.schedule or Windows(DEFAULT_WINDOW), "size", steps)
        bytes_of(min(window, steps), max_bytes=limit, per_step=per_step)
        total = bytes_of(steps, max_bytes=_ANY, per_step=0, more=more)
        if total > limit:
            # However it is cut, what is returned would not fit.
            raise TooLarge(
                f"num_samples: got {asked.num_samples} draws of dimension {dimension} in {asked.num_chains} chain(s), about "
                f"{total:.3g} bytes; wanted at most max_bytes={limit}: keep the draws on disk with store= (and thinning=), "
                "or raise max_bytes"
            )
        return max(asked.num_samples, 1)
    one = bytes_of(1, max_bytes=_ANY, per_step=per_step) + num_chains * more
    written = asked.num_chains * (dimension * itemsize + more)
    return _stored_chunk(asked, asked.store.chunk, limit, one, written)


def _stored_chunk(
    asked: SampleArguments, wanted: int | None, limit: int, one: int, written: int
) -> int:
    """Steps of a chunk in a store, of which `wanted` is asked for, with so many bytes in the memory of a device and on disk for
    each step of all chains."""
    mesh, num_samples = asked.mesh, asked.num_samples
    schedule = asked.schedule or (Windows(DEFAULT_WINDOW) if mesh is None else None)
    unit = schedule.size if isinstance(schedule, Windows) else 1
    # A chunk wants as much again for its random numbers and for what is reported of its draws.
    parts = mesh_shape(mesh)[1]
    fits, steps = parts * (limit // (2 * one)), wanted
    if wanted is not None:
        # Shorter than a window, it makes windows shorter.
        unit = min(unit, check_count(wanted, "store.chunk", 1))
        steps = wanted // unit * unit
    if (steps or unit) > fits:
        name = "schedule" if unit > 1 else "num_chains"
        if wanted is not None:
            name = f"store.chunk: got {wanted}"
        instead = f"at most {fits} steps" if fits else "fewer chains"
        raise TooLarge(
            f"{name}: {steps or unit} steps of {asked.num_chains} chains at once take about "
            f"{2 * one * (steps or unit):.3g} bytes; wanted at most max_bytes={limit}: take {instead}, or raise "
            "max_bytes"
        )
    if steps is None:
        steps = min(parts * _CHUNK, fits, parts * (_CHUNK_BYTES // one))
        if mesh is not None:
            steps = min(steps, _WRITTEN_BYTES // written)
        steps = max(unit, steps // unit * unit)
    if steps >= num_samples:
        return max(num_samples, 1)
    # The last chunk is then no shorter than the others, and nothing is compiled for it alone.
    even = (size for size in range(steps, steps // 2, -unit) if num_samples % size == 0)
    return steps if wanted is not None else next(even, steps)


def mesh_shape(mesh: Mesh | None) -> tuple[int, int]:
    """Devices along chains and along time."""
    return (1, 1) if mesh is None else (mesh.shape["chains"], mesh.shape["time"])


def default_max_bytes(mesh: Mesh | None = None) -> int:
    """Most of the memory of the default device, or of each device of a mesh."""
    stats = jax.devices()[0].memory_stats() if jax.default_backend() != "cpu" else None
    if stats and "bytes_limit" in stats:
        return int(_SHARE * stats["bytes_limit"])
    # Devices that are made of processors share the memory of their host.
    sharing = 1 if mesh is None else max(1, len(mesh.local_devices))
    return int(_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")) // sharing
