"""A chunk that every host writes its own part of: what each does, and the order that makes it whole or not there.

    each host     writes its tiles as part files, flushed to the disk, and sums up its draws (in a thread, while the next
                  chunk is computed)
    together      every host says which parts it has written, and its sums: once all have spoken, all parts are durable
    folds         carries of the user's own functions go from host to host in the order of time
    first host    puts the sums together and writes the chunk file, which lists the parts

If a host is lost before the chunk file is there, the chunk is not, and whoever goes on removes its parts. Between hosts
travel, for every chunk, sums (on every host those of all, each about as large as the state in a chunk file), and with folds
their carries once for every run of steps of one host. Draws do not travel. Summing up is shared by the hosts, folds are not:
one host after another updates them, and the devices wait meanwhile.

All that hosts do together is done by the main thread, between chunks, in the same order on all of them.
"""

from __future__ import annotations

import json
from typing import Any, Iterable

import jax
import numpy as np

from partime_mcmc.distributed.collectives import gather
from partime_mcmc.distributed.followers import say
from partime_mcmc.sampling.merge import without_steps
from partime_mcmc.storage.keeper import Desk, Shelf, Standing, state_group
from partime_mcmc.storage.own import Place, Share
from partime_mcmc.storage.streaming_statistics import StreamingStatistics
from partime_mcmc.storage.scattered import Sums, batch_size, bins_for, put_together, spread_of
from partime_mcmc.storage.chunks import Part, parts_variable
from partime_mcmc.storage.formats import pack_arrays, unpack_arrays
from partime_mcmc.storage.state import Totals
from partime_mcmc.types import PyTree


class PartKeeper:
    """Writes this host's parts of certified chunks, and on the first host what makes them count.

    Args:
        shelf: Where.
        standing: How far the store has come; `totals` are the first host's alone.
    """

    def __init__(self, shelf: Shelf, standing: Standing):
        self._shelf, self._desk = shelf, Desk(shelf.folder)
        # What all hosts know is of the chunk that is being written; `_written` is of the first host, after the last one.
        self._index, self._step, self._open = standing.index, standing.step, None
        self._safe = standing.step
        self._bins, self._carries, self._written = (
            standing.running.histogram,
            dict(standing.running.carries),
            standing,
        )

    def keep(self, share: Share) -> None:
        """Write parts of a chunk, once the one before is written; all hosts together."""
        self._settle()
        if self._bins is None:
            mine = {str(k): spread_of(tile.constrained) for k, tile in enumerate(share.tiles)}
            self._bins = bins_for(
                [one for said in gather(pack_arrays(mine)) for one in unpack_arrays(said).values()]
            )
        self._open = share
        self._desk.do(self._write, share, self._index, self._step)

    def __enter__(self) -> PartKeeper:
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        try:
            # After an error nothing is done together: other hosts may be elsewhere, or gone.
            if kind is None:
                self._settle()
                self._wait()
        finally:
            self._desk.close()

    def _wait(self) -> list[Any]:
        return self._desk.wait(
            lambda: self._written.step if jax.process_index() == 0 else self._safe
        )

    def _settle(self) -> None:
        """Have the chunk count whose parts are being written."""
        done, share = self._wait(), self._open
        if share is None:
            return
        said = gather(done[-1])
        self._carries = self._folded(share)
        if jax.process_index() == 0:
            self._desk.do(self._commit, share, said, self._index, self._carries)
        # The first host had the chunk before this one on the disk when it spoke.
        self._safe, self._step = self._step, self._step + share.num_steps
        self._open, self._index = None, self._index + 1

    def _write(self, share: Share, index: int, step: int) -> bytes:
        """Write parts; what there is to say of them."""
        shelf, stop, parts, said = self._shelf, step + share.num_steps, [], {}
        kept = shelf.kept(step, stop)
        for number, tile in enumerate(share.tiles):
            steps = step + tile.steps
            _, which, at = np.intersect1d(kept, steps, assume_unique=True, return_indices=True)
            groups = shelf.groups(tile.chains, kept[which], at, tile.constrained, tile.info)
            if groups:
                host = jax.process_index()
                data = shelf.format.pack(
                    groups, shelf.attributes(index, step, stop) | {"host": host}
                )
                written = shelf.folder.write_part(index, host, number, shelf.format.suffix, data)
                parts.append(Part(*written, tile.chains, which).to_plain())
            sums = Sums.of(
                tile.constrained, tile.info, tile.chains, steps, batch_size(stop), self._bins
            )
            said |= {f"{number:02d}.{name}": array for name, array in sums.to_arrays().items()}
        return pack_arrays(said | {"parts": np.frombuffer(json.dumps(parts).encode(), np.uint8)})

    def _commit(
        self, share: Share, said: list[bytes], index: int, carries: dict[str, PyTree]
    ) -> None:
        """Write the chunk file."""
        shelf, before = self._shelf, self._written
        parts, sums = _heard(said)
        num_chains, stop = shelf.run["num_chains"], before.step + share.num_steps
        running = put_together(before.running, sums, num_chains, stop, self._bins, carries)
        acceptance, divergences = (
            _summed(sums, name, num_chains)
            for name in (
                "acceptance_rate" if "acceptance_rate" in sums[0].names else "accepted",
                "diverging",
            )
        )
        totals = Totals(
            share.num_steps,
            without_steps(share.certificate),
            share.report,
            acceptance,
            divergences.astype(int),
        ).after(before.totals)
        groups = {
            "state": state_group(share.end, totals, running) | {"parts": parts_variable(parts)}
        }
        data = shelf.format.pack(groups, shelf.attributes(index, before.step, stop))
        shelf.folder.write_chunk(index, stop, shelf.format.suffix, data)
        self._written = Standing(index + 1, stop, totals, running)

    def _folded(self, share: Share) -> dict[str, PyTree]:
        """Where folds stand after a chunk, on all hosts."""
        carries, folds = self._carries, self._shelf.folds or {}
        for host, start, stop in turns(share.places) if folds else ():
            if host == jax.process_index():
                # Of chains that lie together every host has one tile.
                (tile,) = share.tiles
                mine = slice(*np.searchsorted(tile.steps, [start, stop]))
                values, info = (
                    {name: one[:, mine] for name, one in of.items()}
                    for of in (tile.constrained, tile.info)
                )
                carries = {
                    name: jax.tree.map(np.array, fold.update(carries[name], values, info))
                    for name, fold in folds.items()
                }
            leaves, structure = jax.tree.flatten(carries)
            heard = unpack_arrays(
                say(pack_arrays({str(k): np.asarray(leaf) for k, leaf in enumerate(leaves)}), host)
            )
            carries = jax.tree.unflatten(structure, [heard[str(k)] for k in range(len(leaves))])
        return carries


def turns(places: Iterable[Place]) -> list[tuple[int, int, int]]:
    """Host, first step and the one after the last of every run of steps, in the order of time."""
    found: list[tuple[int, int, int]] = []
    for (start, stop), host in sorted({(place.steps, place.host) for place in places}):
        if found and found[-1][0] == host and found[-1][2] == start:
            start = found.pop()[1]
        found.append((host, start, stop))
    return found


def _heard(said: list[bytes]) -> tuple[list[dict], list[Sums]]:
    """Parts and sums of all hosts, in their order."""
    parts, sums = [], []
    for data in said:
        arrays = unpack_arrays(data)
        parts += json.loads(arrays.pop("parts").tobytes())
        for number in sorted({name.split(".")[0] for name in arrays}):
            prefix = f"{number}."
            sums.append(
                Sums.from_arrays(
                    {
                        name.removeprefix(prefix): array
                        for name, array in arrays.items()
                        if name.startswith(prefix)
                    }
                )
            )
    return parts, sums


def _summed(sums: list[Sums], name: str, num_chains: int) -> np.ndarray:
    """The sum of what the kernel says, by chain; 0 where it does not say it."""
    found = np.zeros(num_chains)
    for some in sums:
        if name in some.names:
            found[some.chains] += some.totals[some.names.index(name)][0]
    return found


def tell_standing(standing: Standing) -> Standing:
    """How far the store has come, on all hosts, as the first one knows it; its totals stay there."""
    words = {"place": np.array([standing.index, standing.step])}
    heard = unpack_arrays(say(pack_arrays(standing.running.to_arrays() | words)))
    index, step = heard.pop("place").tolist()
    return Standing(
        index, step, standing.totals, StreamingStatistics.from_arrays(heard, standing.running.folds)
    )
