"""What one host has of a chunk, where every host keeps its own: blocks of draws as its devices made them, never the whole.

    stretch     device (i, j) of the mesh makes chains i and part j of the steps: a block of the host that it belongs to
    tile        the blocks of one host in a chunk that lie at the same steps, put together: some chains times some steps
    share       the tiles of this host in the model's own space; and, known to all hosts, the certificate, the report, where
                the chains stand, and which host has which steps

What several devices hold alike belongs to the first of them in the order of the mesh, so that hosts agree about it without
asking. Certificates of parts, a few numbers for each device and stretch, are all that travels.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Callable, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from partime_mcmc.kernels import Certificate
from partime_mcmc.sampling.draws import End, RunReport
from partime_mcmc.distributed.collectives import fetch, without_lost
from partime_mcmc.sampling.finish import constrained_values
from partime_mcmc.sampling.merge import combined
from partime_mcmc.compile_cache import Timings
from partime_mcmc.distributed.spread import Run, Spread
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.warmup import Warmup
from partime_mcmc.types import PyTree


class Place(NamedTuple):
    """Which host has some chains at some steps, both from the first to the one after the last."""

    host: int
    chains: tuple[int, int]
    steps: tuple[int, int]


class Portion(NamedTuple):
    """What this host has of a stretch.

    Attributes:
        parts: Certificates of all parts, `(C, Q)`, on every host.
        places: Of the blocks of all hosts.
        blocks: The draws of this host's: what is known of steps, what the kernel says, and positions, leaves `(c, n, ...)`.
    """

    parts: PyTree
    places: list[Place]
    blocks: list[tuple]


class Tile(NamedTuple):
    """Draws of some chains at some steps.

    Attributes:
        chains: Their numbers, ascending, shape `(c,)`.
        steps: Of the chunk, ascending, from 0, shape `(n,)`.
        constrained: In the model's space, by name, `(c, n, ...)`.
        info: What is known of each step, by name, `(c, n)`.
    """

    chains: np.ndarray
    steps: np.ndarray
    constrained: dict[str, np.ndarray]
    info: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Share:
    """What this host has of a chunk, and what all know of it.

    Attributes:
        tiles: This host's draws.
        places: Which host has what, steps counted from the chunk's first.
        num_steps: Of the chunk.
        certificate: Of all draws, without what it says of single steps.
        report: How the run went.
        end: Where the chains stand.
    """

    tiles: tuple[Tile, ...]
    places: tuple[Place, ...]
    num_steps: int
    certificate: Certificate
    report: RunReport
    end: End

    @property
    def info(self) -> dict[str, np.ndarray]:
        """What is known of each step of this host's, by name, one after the other."""
        names = self.tiles[0].info if self.tiles else ()
        return {
            name: np.concatenate([tile.info[name].ravel() for tile in self.tiles]) for name in names
        }


@dataclasses.dataclass(frozen=True)
class Own:
    """A `Collect`: on every host the blocks of its own devices."""

    def __call__(
        self,
        tree: tuple,
        finite: np.ndarray,
        mesh: Mesh,
        spec: PartitionSpec,
        run: Callable[..., PyTree],
    ) -> Portion:
        steps, parts, said, positions = tree
        leaves, structure = jax.tree.flatten((steps, said, positions))
        here = [{shard.device: shard.data for shard in leaf.addressable_shards} for leaf in leaves]
        places, blocks = [], []
        for device, chains, times in _owners(mesh, spec, leaves[0].shape):
            places.append(Place(device.process_index, chains, times))
            if device.process_index == jax.process_index():
                block = jax.tree.unflatten(
                    structure, [np.asarray(by_device[device]) for by_device in here]
                )
                blocks.append(without_lost(block, finite[slice(*chains)] - times[0]))
        return Portion(fetch(parts), places, blocks)


def _owners(
    mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...]
) -> list[tuple[Any, tuple[int, int], tuple[int, int]]]:
    """Devices, chains and steps: every chain at every step once."""
    where, found = NamedSharding(mesh, spec).devices_indices_map(shape), {}
    for device in mesh.devices.flat:
        chains, times = (one.indices(size)[:2] for one, size in zip(where[device], shape))
        found.setdefault((chains, times), device)
    return [(device, *place) for place, device in found.items()]


def share_across(
    spread: Spread,
    target: Target,
    num_samples: int,
    *,
    end: End,
    total: int,
    warmup: Warmup | None,
    plan: dict[str, Any],
    advance: Callable[..., None],
) -> Share:
    """As `draw_across`, on a host that keeps its own draws; arguments as there."""
    run = Run.of(spread, num_samples, end, total, advance)
    portions, before = (
        [piece.draws for piece in run.pieces],
        np.cumsum([0, *(piece.length for piece in run.pieces)]),
    )
    places, blocks = [], []
    for first, portion in zip(before.tolist(), portions):
        moved = [
            place._replace(steps=(first + place.steps[0], first + place.steps[1]))
            for place in portion.places
        ]
        mine = [place for place in moved if place.host == jax.process_index()]
        places, blocks = places + moved, blocks + list(zip(mine, portion.blocks))
    parts = jax.tree.map(
        lambda *leaves: np.concatenate(leaves, axis=1), *[portion.parts for portion in portions]
    )
    nothing = np.zeros((len(parts["certified"]), 0))
    steps = {
        "accepted": nothing.astype(bool),
        "residual": nothing.astype(parts["max_residual"].dtype),
    }
    certificate = combined(steps, parts, run.done)
    dtype = jax.tree.leaves(end.carries)[0].dtype
    tiles = tuple(_tile(target, run.clock, chains, some) for chains, some in _side_by_side(blocks))
    return Share(
        tiles, tuple(places), run.done, certificate, run.report(certificate, dtype), run.end()
    )


def _side_by_side(
    blocks: list[tuple[Place, tuple]],
) -> list[tuple[list[tuple[int, int]], list[list]]]:
    """Blocks as rows of equal steps: runs of chains, and for each of them its blocks in the order of time."""
    rows: dict[tuple[int, int], list] = {}
    for place, block in blocks:
        rows.setdefault(place.chains, []).append((place.steps, block))
    tiles: dict[tuple, list] = {}
    for chains, row in sorted(rows.items(), key=lambda item: item[0]):
        row.sort(key=lambda one: one[0])
        tiles.setdefault(tuple(steps for steps, _ in row), []).append((chains, row))
    return [
        ([chains for chains, _ in found], [row for _, row in found]) for found in tiles.values()
    ]


def _tile(target: Target, timings: Timings, chains: list[tuple[int, int]], rows: list[list]) -> Tile:
    def joined(axis, trees):
        return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=axis), *trees)

    known, said, positions = joined(0, [joined(1, [block for _, block in row]) for row in rows])
    numbers = [
        np.concatenate([np.arange(*run) for run in runs])
        for runs in (chains, [steps for steps, _ in rows[0]])
    ]
    constrained = constrained_values(target, positions, clock)
    return Tile(
        *numbers, {name: np.asarray(value) for name, value in constrained.items()}, known | said
    )
