"""Who writes a stored run that several hosts make together.

    FirstHost()     all draws of a chunk travel to the first host, which puts them into the model's own space and writes
                    one file. Draws, with two to five numbers of each step, cross one network and lie in one memory; on
                    the other hosts nothing is kept but where the chains stand.
    EveryHost()     every host puts the draws of its own devices into the model's own space and writes them; the first
                    one adds a small file that makes them count (`part_keeper`). No host holds all draws of a chunk, and
                    hosts write and sum up beside each other. The folder must be one that all of them share and may write
                    to, which is looked at before anything is computed.

`EveryHost()` is what a `Store` takes if nothing is said: it asks for nothing that the other one does not, as all hosts read
the finished store from the same folder anyway, and is bound by no single host. `FirstHost()` is for folders that the others
may only read, and for folds over chains that are spread over hosts. Draws are the same, and so is what reads them; one host
alone writes whole chunks either way, and any number of hosts goes on with any store.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
import time
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from partime_mcmc.sampling.draws import End
from partime_mcmc.distributed.collectives import ToFirst, gather
from partime_mcmc.distributed.followers import say
from partime_mcmc.storage.keeper import Keeper, Shelf, Standing
from partime_mcmc.storage.own import Own, share_across
from partime_mcmc.storage.part_keeper import PartKeeper, tell_standing
from partime_mcmc.storage.streaming_statistics import StreamingStatistics
from partime_mcmc.distributed.spread import follow_across
from partime_mcmc.storage.chunks import StoreError
from partime_mcmc.sampling.executor import Course, Tell, stream

_PAUSE_SECONDS = 0.05


class Writers(Protocol):
    """Who writes."""

    def among(self, mesh: Mesh | None) -> Writers:
        """Who writes on the hosts that there are."""
        ...

    def check(self, store: Any, mesh: Mesh | None) -> None:
        """Refuse a `Store` that cannot be written so; all hosts together, once the first has made the folder."""
        ...

    def sample(
        self, shelf: Shelf, standing: Standing, course: Course, end: End, last: int, tell: Tell
    ) -> None:
        """What the first host does.

        Args:
            shelf: Where draws go.
            standing: How far the store has come.
            course: What is to be run.
            end: Where the chains stand.
            last: The step to stop at.
            tell: Told of steps and certified draws.
        """
        ...

    def follow(self, shelf: Shelf, course: Course, end: End, last: int) -> None:
        """What the other hosts do meanwhile; arguments as for `sample`."""
        ...


@dataclasses.dataclass(frozen=True)
class FirstHost:
    """The first host receives all draws, and writes whole chunks."""

    def among(self, mesh: Mesh | None) -> Writers:
        """As `Writers.among`."""
        return self

    def check(self, store: Any, mesh: Mesh | None) -> None:
        """As `Writers.check`: nothing is asked for."""

    def sample(
        self, shelf: Shelf, standing: Standing, course: Course, end: End, last: int, tell: Tell
    ) -> None:
        """As `Writers.sample`."""
        course = dataclasses.replace(course, collect=ToFirst())
        with Keeper(shelf, standing) as keeper:
            for draws in stream(course, None, shelf.settled.chunk, tell, end, last):
                if draws.report.interrupted:
                    # Half a chunk is none: a resumed run draws it again, in one piece.
                    break
                keeper.keep(draws)

    def follow(self, shelf: Shelf, course: Course, end: End, last: int) -> None:
        """As `Writers.follow`."""
        settled = shelf.settled
        spread = dataclasses.replace(course, collect=ToFirst()).spread(
            settled.solver, settled.schedule
        )
        while end.num_steps < last:
            # As `stream` cuts it on the first host.
            steps = min(settled.chunk, last - end.num_steps, end.stretch or last)
            after = follow_across(spread, steps, end=end, total=last)
            end = dataclasses.replace(after, stretch=end.stretch)


@dataclasses.dataclass(frozen=True)
class EveryHost:
    """Every host writes the draws of its own devices, into a folder that all of them share.

    Attributes:
        seconds: How long a file may take from one host to another before the folder counts as not shared; network file
            systems may show new files only after half a minute.
    """

    seconds: float = 60.0

    def among(self, mesh: Mesh | None) -> Writers:
        """As `Writers.among`: one host alone has all draws, and writes whole chunks."""
        return FirstHost() if mesh is None or jax.process_count() == 1 else self

    def check(self, store: Any, mesh: Mesh | None) -> None:
        """As `Writers.check`.

        Raises:
            StoreError: On all hosts, if one of them does not see what another writes into the folder, or cannot write there.
            ValueError: If there are folds, and chains are spread over hosts.
        """
        columns = np.moveaxis(mesh.devices, mesh.axis_names.index("time"), 0)
        apart = any(len({device.process_index for device in column.flat}) > 1 for column in columns)
        if store.folds and apart:
            raise ValueError(
                f"store.folds: got {sorted(store.folds)} with writers=EveryHost() and chains spread over "
                "hosts, wanted writers=FirstHost(), or a mesh with all chains of a time on one host: a fold "
                "sees all chains together"
            )
        host, token = jax.process_index(), say(secrets.token_hex(8).encode()).decode()
        signs = [Path(store.path) / f".shared-{token}-{one}" for one in range(jax.process_count())]
        try:
            trouble = _write_sign(signs[0]) if host == 0 else ""
            _refuse(gather(trouble.encode()), store.path)
            trouble = (
                (self._unseen(store.path, signs[:1]) or _write_sign(signs[host])) if host else ""
            )
            _refuse(gather(trouble.encode()), store.path)
            trouble = "" if host else self._unseen(store.path, signs[1:])
            _refuse(gather(trouble.encode()), store.path)
        finally:
            try:
                signs[host].unlink(missing_ok=True)
            except OSError:
                pass  # what could not be written need not be removed

    def _unseen(self, folder: Any, signs: list[Path]) -> str:
        """What is not seen in a folder of other hosts in time, in words; empty if all is."""
        begin = time.monotonic()
        while True:
            try:
                # A folder that is listed is looked at again; a name that was asked for may be remembered as not there.
                present = set(os.listdir(folder))
            except OSError:
                present = set()
            missing = [sign.name for sign in signs if sign.name not in present]
            if not missing:
                return ""
            if time.monotonic() - begin > self.seconds:
                return f"does not see there within {self.seconds:g} s what host {missing[0].rsplit('-', 1)[1]} wrote"
            time.sleep(_PAUSE_SECONDS)

    def sample(
        self, shelf: Shelf, standing: Standing, course: Course, end: End, last: int, tell: Tell
    ) -> None:
        """As `Writers.sample`."""
        _share(shelf, tell_standing(standing), course, end, last, tell)

    def follow(self, shelf: Shelf, course: Course, end: End, last: int) -> None:
        """As `Writers.follow`."""
        standing = tell_standing(Standing(0, 0, None, StreamingStatistics.start(shelf.folds)))
        _share(
            shelf,
            standing,
            course,
            end,
            last,
            Tell(lambda steps, **shown: None, course.keys.shape[0]),
        )


def _share(
    shelf: Shelf, standing: Standing, course: Course, end: End, last: int, tell: Tell
) -> None:
    course = dataclasses.replace(course, collect=Own(), across=share_across)
    with PartKeeper(shelf, standing) as keeper:
        for share in stream(course, None, shelf.settled.chunk, tell, end, last):
            keeper.keep(share)


def _write_sign(path: Path) -> str:
    """Write a file that others are to see; in words why that cannot be."""
    try:
        with open(path, "wb") as handle:
            os.fsync(handle.fileno())
    except OSError as error:
        return f"cannot write there ({error.strerror or error})"
    return ""


def _refuse(said: list[bytes], path: Any) -> None:
    troubles = [f"host {host} {words.decode()}" for host, words in enumerate(said) if words]
    if troubles:
        raise StoreError(
            f"store.path: got {path} with writers=EveryHost(), wanted a folder on a file system that all of "
            f"{len(said)} hosts share and may write to: {'; '.join(troubles)}"
        )
