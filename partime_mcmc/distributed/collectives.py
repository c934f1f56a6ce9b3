"""What hosts exchange around the compiled programs: that they were asked for the same, numbers, and draws.

    check_same    every host says in 32 bits per argument what it was asked for; if they differ, all of them end
    agreed        the first host's numbers, on all of them
    fetch         arrays of all devices on every host: what all of them return
    ToFirst       the same on the first host alone: what a store is written from. Every device sends its part once, to one
                  of the first host's, which receives one part at a time: no device and no other host holds the whole
    gather        bytes of every host on all of them

Left out: a host that never calls `sample` at all is not noticed here; the others wait for it.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from typing import Any, Callable

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partime_mcmc.closures import Named
from partime_mcmc.distributed.sharded_solve import time_axis
from partime_mcmc.storage.fingerprint import example_of, fingerprint_of, name_of
from partime_mcmc.schedule import Stretches
from partime_mcmc.types import PyTree

# What is known of single steps, of parts, what the kernel says, and positions, leaves `(C, n, ...)` that all lie as a spec
# says; how many steps of each chain are finite `(C,)`; the mesh; the spec; how programs are run
# -> what this host keeps of it, as NumPy arrays; None where that is nothing.
Collect = Callable[[tuple, np.ndarray, Mesh, PartitionSpec, Callable[..., PyTree]], Any]
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def check_mesh(mesh: Mesh, num_chains: int, schedule: Any) -> None:
    """Refuse a mesh that chains cannot be laid on, or a schedule that cannot be spread.

    Raises:
        ValueError: If an axis is missing, or does not divide the number of chains, or would only repeat work, or a host has
            no device in it, or the schedule has a moving window.
    """
    if schedule is not None and not isinstance(schedule, Stretches):
        raise ValueError(f"schedule: got {schedule!r} with a mesh, wanted Stretches(size) or None")
    time_axis(mesh)
    if "chains" not in mesh.shape or num_chains % mesh.shape["chains"]:
        raise ValueError(
            f"num_chains: got {num_chains} on a mesh of {dict(mesh.shape)}, wanted a multiple of its axis "
            "'chains'"
        )
    idle = {
        name: size
        for name, size in mesh.shape.items()
        if name not in ("chains", "time") and size > 1
    }
    if idle:
        raise ValueError(
            f"mesh: got the axes {dict(mesh.shape)}, wanted chains and time only: along {', '.join(idle)} all "
            "devices would do the same work; data spread over devices are for sharded_solve(params_spec=...)"
        )
    present = {device.process_index for device in mesh.devices.flat}
    missing = sorted(set(range(jax.process_count())) - present)
    if missing:
        raise ValueError(
            f"mesh: got devices of the hosts {sorted(present)}, wanted some of each of {jax.process_count()}: "
            f"host {missing[0]} would have nothing to do and could not follow; time_mesh() takes all"
        )


def check_same(request: Any, mesh: Mesh, store: Any) -> None:
    """Refuse to begin where hosts were asked for different things: they would wait for each other for ever.

    Args:
        request: A `Request`.
        mesh: The devices.
        store: A `Store`, where draws are kept, or None.

    Raises:
        ValueError: On all hosts, naming the arguments that differ.
    """
    if jax.process_count() == 1:
        return
    asked = {
        "num_samples": request.num_samples,
        "num_chains": request.num_chains,
        "num_warmup": request.num_warmup,
        "key": np.asarray(jax.random.key_data(request.key)).tolist(),
        "kernel": name_of(request.kernel),
        "adaptation": request.adaptation,
        "dice": request.dice,
        "solver": request.solver,
        "schedule": request.schedule,
        "tolerance": request.tolerance,
        "max_iterations": request.max_iterations,
        "thinning": request.thinning,
        "certificate": request.certificate,
        "store": "none" if store is None else "a folder",
        **(
            {}
            if store is None
            else {
                "writers": store.writers,
                "format": store.format,
                "folds": sorted(store.folds or {}),
            }
        ),
        "mesh": [dict(mesh.shape), [device.id for device in mesh.devices.flat]],
        "jax_enable_x64": bool(jax.config.jax_enable_x64),
        **{
            f"the target's {part}": text
            for part, text in fingerprint_of(request.target, example_of(request.target)).items()
        },
    }
    # Below 2^31, or they would wrap in 32 bits.
    mine = [
        zlib.crc32(_ADDRESS.sub("", repr(value)).encode()) & 0x7FFFFFFF for value in asked.values()
    ]
    everybody = np.asarray(multihost_utils.process_allgather(np.array(mine, np.int32)))
    different = [name for name, column in zip(asked, everybody.T) if (column != column[0]).any()]
    if different:
        said = ", ".join(f"{name} (here {str(asked[name])[:80]})" for name in different)
        raise ValueError(
            f"hosts ask for different things: {said}, wanted the same call, with the same data, on all of "
            f"{jax.process_count()} hosts"
        )


def agreed(tree: PyTree) -> PyTree:
    """What the first host holds, on all of them: hosts of other makes may have tuned other last digits.

    Raises:
        ValueError: On all hosts, if structures or shapes differ.
    """
    if jax.process_count() == 1:
        return tree
    # Structures first: a host with other shapes would wait for ever.
    shapes = repr([(np.shape(leaf), str(leaf.dtype)) for leaf in jax.tree.leaves(tree)]).encode()
    summary = np.array([len(shapes), zlib.crc32(shapes) & 0x7FFFFFFF], np.int32)
    everybody = np.asarray(multihost_utils.process_allgather(summary))
    if (everybody != everybody[0]).any():
        raise ValueError(
            "hosts disagree about the kernel's numbers: run the same script, with the same data and key, on "
            "all of them"
        )
    return multihost_utils.broadcast_one_to_all(tree)


def gather(data: bytes) -> list[bytes]:
    """What every host says, on all of them, in their order; nobody goes on before all have spoken."""
    sizes = np.asarray(multihost_utils.process_allgather(np.int32(len(data)))).reshape(-1)
    # A power of two, so that few programs are compiled for lengths that change a little.
    mine = np.zeros(1 << max(int(sizes.max()) - 1, 0).bit_length(), np.uint8)
    mine[: len(data)] = np.frombuffer(data, np.uint8)
    everybody = np.asarray(multihost_utils.process_allgather(mine)).reshape(sizes.size, -1)
    return [row[:size].tobytes() for row, size in zip(everybody, sizes)]


def place(mesh: Mesh, spec: PartitionSpec, tree: PyTree) -> PyTree:
    """Arrays that every host holds in full, each device its own part."""

    def one(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(
            leaf.shape, NamedSharding(mesh, spec), lambda index: leaf[index]
        )

    return jax.tree.map(one, tree)


def fetch(tree: PyTree) -> PyTree:
    """Arrays of all devices on this host, as NumPy arrays."""

    def one(leaf):
        return np.asarray(
            leaf
            if leaf.is_fully_addressable
            else multihost_utils.process_allgather(leaf, tiled=True)
        )

    return jax.tree.map(one, tree)


def everywhere(
    tree: tuple, finite: np.ndarray, mesh: Mesh, spec: PartitionSpec, run: Callable[..., PyTree]
) -> tuple:
    """Draws on every host."""
    return without_lost(fetch(tree), finite)


def without_lost(kept: tuple, finite: np.ndarray) -> tuple:
    """What is not finite is not a draw: positions, which come last, are NaN from there on.

    Args:
        kept: As for `Collect`.
        finite: How many steps of each chain are finite, `(C,)`; below 0 is none.
    """
    *others, places = kept

    def masked(leaf):
        keep = np.arange(leaf.shape[1]) < finite[:, None]
        return np.where(keep.reshape(*keep.shape, *(1,) * (leaf.ndim - 2)), leaf, np.nan).astype(
            leaf.dtype
        )

    return (*others, jax.tree.map(masked, places))


@dataclasses.dataclass(frozen=True)
class ToFirst:
    """Draws on the first host, None on the others."""

    def __call__(
        self,
        tree: tuple,
        finite: np.ndarray,
        mesh: Mesh,
        spec: PartitionSpec,
        run: Callable[..., PyTree],
    ) -> tuple | None:
        leaves, structure = jax.tree.flatten(tree)
        devices, first = list(mesh.devices.flat), jax.process_index() == 0
        where = [NamedSharding(mesh, spec).devices_indices_map(leaf.shape) for leaf in leaves]
        found = [np.empty(leaf.shape, leaf.dtype) for leaf in leaves] if first else []
        for whole, leaf in zip(found, leaves):
            for shard in leaf.addressable_shards:
                whole[shard.index] = np.asarray(shard.data)
        for pairs in _rounds(devices):
            # All devices take part, because a program is one for all; only those of the first host receive something.
            sent = run(_Send(mesh, spec, pairs), leaves)
            for whole, leaf, indices in zip(found, sent, where):
                here = {shard.device: shard.data for shard in leaf.addressable_shards}
                for source, to in pairs:
                    whole[indices[devices[source]]] = np.asarray(here[devices[to]])
        return without_lost(jax.tree.unflatten(structure, found), finite) if first else None


class _Send(Named):
    """Parts of arrays from some devices to others, zeros everywhere else; the parts are the mesh, how the arrays lie, and
    pairs of places in the mesh."""

    def __call__(self, leaves):
        mesh, spec, pairs = self.parts

        def here(leaves):
            return [lax.ppermute(leaf, mesh.axis_names, pairs) for leaf in leaves]

        return jax.shard_map(here, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)(
            leaves
        )


def _rounds(devices: list) -> list[tuple[tuple[int, int], ...]]:
    """Who sends to whom, round by round, until the first host has heard all others: it has only so many devices."""
    receive = [place for place, device in enumerate(devices) if device.process_index == 0]
    send = [place for place, device in enumerate(devices) if device.process_index != 0]
    return [
        tuple(zip(send[first : first + len(receive)], receive))
        for first in range(0, len(send), len(receive))
    ]
