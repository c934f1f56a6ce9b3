"""What hosts exchange around the compiled programs: that they were asked for the same, numbers, and draws.

    check_same_arguments    every host gives 32 bits per argument; if they differ, all of them end
    broadcast_from_host0    the first host's numbers, on all of them
    broadcast_bytes         the plan of a stored run likewise, and where its chains stand
    allgather_to_hosts      arrays of all devices on every host, such as the draws of a window, which all hosts return
    gather_to_host0         the same on the first host alone: what a store is written from. Every device sends its shard
                            once, to one of the first host's, which receives one shard at a time: no device and no other
                            host holds the whole

Left out: a host that never calls `sample` at all is not noticed here; the others wait for it.
"""

import re
import zlib
from typing import Callable

import jax
import numpy as np
from jax import lax
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partime_mcmc.distributed.mesh import OnDevices
from partime_mcmc.distributed.sharded_solve import time_axis
from partime_mcmc.sampling.arguments import SampleArguments
from partime_mcmc.storage.saved_run import fingerprint_of, name_of
from partime_mcmc.types import PyTree, jax_config

_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def check_mesh(mesh: Mesh, num_chains: int) -> None:
    """Refuse a mesh that chains cannot be laid on.

    Raises:
        ValueError: If an axis is missing, or does not divide the number of chains, or would only repeat work, or a host has
            no device in it.
    """
    time_axis(mesh)
    if "chains" not in mesh.shape or num_chains % mesh.shape["chains"]:
        raise ValueError(
            f"num_chains: got {num_chains} on a mesh of {dict(mesh.shape)}, wanted a multiple of its axis 'chains'"
        )
    idle = [
        name for name, size in mesh.shape.items() if name not in ("chains", "time") and size > 1
    ]
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


def check_same_arguments(asked: SampleArguments) -> None:
    """Refuse to begin where hosts were asked for different things: they would wait for each other for ever.

    Raises:
        ValueError: On all hosts, naming the arguments that differ.
    """
    if jax.process_count() == 1:
        return
    mesh, store = asked.mesh, asked.store
    assert mesh is not None, "only runs over a mesh have several hosts"
    values = {
        "key": asked.key_words,
        "kernel": name_of(asked.kernel),
        "store": None if store is None else ("a folder", store.chunk, sorted(store.folds or {})),
        "mesh": (dict(mesh.shape), [device.id for device in mesh.devices.flat]),
        "jax_enable_x64": bool(jax_config.jax_enable_x64),
    }
    names = "num_samples num_chains num_warmup adaptation coupling solver schedule tolerance max_iterations thinning certificate"
    values |= {name: getattr(asked, name) for name in names.split()}
    fingerprint = fingerprint_of(asked.target, asked.target.example())
    values |= {f"the target's {part}": text for part, text in fingerprint.items()}
    # Below 2^31, or they would wrap in 32 bits.
    mine = [
        zlib.crc32(_ADDRESS.sub("", repr(value)).encode()) & 0x7FFFFFFF for value in values.values()
    ]
    everybody = np.asarray(multihost_utils.process_allgather(np.array(mine, np.int32)))
    different = [
        f"{name} (here {str(values[name])[:80]})"
        for name, column in zip(values, everybody.T)
        if (column != column[0]).any()
    ]
    if different:
        raise ValueError(
            f"hosts ask for different things: {', '.join(different)}, wanted the same call, with the same data, on all of "
            f"{jax.process_count()} hosts"
        )


def broadcast_from_host0(tree: PyTree) -> PyTree:
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
            "hosts disagree about the kernel's numbers: run the same script, with the same data and key, on all of them"
        )
    return multihost_utils.broadcast_one_to_all(tree)


def broadcast_bytes(data: bytes) -> bytes:
    """The first host's bytes, on all hosts; what the others give is not looked at."""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    mine = np.zeros(size, np.uint8)
    mine[: min(size, len(data))] = np.frombuffer(data[:size], np.uint8)
    return np.asarray(multihost_utils.broadcast_one_to_all(mine), np.uint8).tobytes()


def wait_for_hosts() -> None:
    """Wait until all hosts are here."""
    multihost_utils.sync_global_devices("partime_mcmc: stored run")


def place(mesh: Mesh, spec: PartitionSpec, tree: PyTree) -> PyTree:
    """Arrays that every host holds in full, each device its own shard."""

    def one(leaf):
        leaf = np.asarray(leaf)
        return jax.make_array_from_callback(
            leaf.shape, NamedSharding(mesh, spec), lambda index: leaf[index]
        )

    return jax.tree.map(one, tree)


def allgather_to_hosts(tree: PyTree) -> PyTree:
    """Arrays of all devices on every host, as NumPy arrays."""

    def one(leaf):
        if isinstance(leaf, np.ndarray) or leaf.is_fully_addressable:
            return np.asarray(leaf)
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))

    return jax.tree.map(one, tree)


def gather_to_host0(
    tree: tuple, mesh: Mesh, spec: PartitionSpec, run: Callable[..., PyTree]
) -> tuple | None:
    """Arrays of all devices on the first host, as NumPy arrays; None on the others.

    Args:
        tree: Leaves `(C, n, ...)`.
        mesh: The devices.
        spec: How all leaves lie on it.
        run: Runs a program.
    """
    leaves, structure = jax.tree.flatten(tree)
    devices, first = list(mesh.devices.flat), jax.process_index() == 0
    where = [NamedSharding(mesh, spec).devices_indices_map(leaf.shape) for leaf in leaves]
    found = [np.empty(leaf.shape, leaf.dtype) for leaf in leaves] if first else []
    for whole, leaf in zip(found, leaves):
        for shard in leaf.addressable_shards:
            whole[shard.index] = np.asarray(shard.data)
    for pairs in _rounds(devices):
        # All devices take part, because a program is one for all; only those of the first host receive something.
        sent = run(OnDevices(_send, mesh, spec, spec, mesh.axis_names, pairs), leaves)
        for whole, leaf, indices in zip(found, sent, where):
            here = {shard.device: shard.data for shard in leaf.addressable_shards}
            for source, to in pairs:
                whole[indices[devices[source]]] = np.asarray(here[devices[to]])
    return jax.tree.unflatten(structure, found) if first else None


def _send(axes: tuple[str, ...], pairs: tuple[tuple[int, int], ...], leaves: list) -> list:
    """Shards of arrays from some devices to others, by places in the mesh, and zeros everywhere else."""
    return [lax.ppermute(leaf, axes, pairs) for leaf in leaves]


def _rounds(devices: list) -> list[tuple[tuple[int, int], ...]]:
    """Who sends to whom, round by round, until the first host has all shards: it has only so many devices."""
    receive = [place for place, device in enumerate(devices) if device.process_index == 0]
    send = [place for place, device in enumerate(devices) if device.process_index != 0]
    return [
        tuple(zip(send[first : first + len(receive)], receive))
        for first in range(0, len(send), len(receive))
    ]
