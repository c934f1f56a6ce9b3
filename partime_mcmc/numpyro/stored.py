"""Runs of `ParallelMCMC` that go to disk: begun, gone on with, and read again as NumPyro's users read a run.

What `sample(..., store=...)` writes is written here, from NumPyro's own starts and with NumPyro's keys; what is kept in
the object is where to find it. Fields that only the unconstrained draws could give are not in a store.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC
from numpyro.infer.hmc import HMCState

from partime_mcmc.kernels import Kernel
from partime_mcmc.sampling.draws import End
from partime_mcmc.kernels.kernel_program import density_of
from partime_mcmc.numpyro.base import ParallelKernel
from partime_mcmc.numpyro.warm import Beginning, begin, kernel_from, state_of
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.plan import Ready, Request
from partime_mcmc.sampling.resume import chunk_of, described, key_words, start_of
from partime_mcmc.storage import codec
from partime_mcmc.storage.fingerprint import digest_arrays, example_of
from partime_mcmc.storage.plan import Start
from partime_mcmc.storage.state import unpack_end
from partime_mcmc.storage.stored_draws import StoredDraws, read_state
from partime_mcmc.storage.stored_run import Store, run_stored
from partime_mcmc.sampling.target import Target
from partime_mcmc.types import Key, PyTree

_FIELDS = {
    "diverging": "diverging",
    "energy": "energy",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
    "residual": "residual",
    "accepted": "accepted",
}


def run_on_disk(
    store: Store,
    sampler: ParallelKernel,
    target: Target,
    keys: Key,
    state: HMCState | None,
    init_params: PyTree,
    num_samples: int,
    settings: Any,
    progress: Progress,
) -> tuple[StoredDraws, HMCState, Kernel, PyTree]:
    """Begin or go on with a run of NumPyro's on disk.

    Args:
        store: Where.
        sampler: The kernel.
        target: What is sampled.
        keys: One per chain, shape `(C,)`.
        state: Where chains go on from, leaves `(C, ...)`; None warms up.
        init_params: Starts, leaves `(C, ...)`, or None.
        num_samples: T.
        settings: A `ParallelMCMC`, for `num_warmup`, `thinning`, `solver`, `schedule` and `certificate`.
        progress: What to tell.

    Returns:
        The draws, the state after the last of them, leaves `(C, ...)`, the tuned kernel, and where the chains began and are
        now, leaves `(2 C, ...)`.
    """
    builder, num_warmup, thinning = sampler.tuned_builder(), settings.num_warmup, settings.thinning
    solver, schedule = settings.solver, settings.schedule
    if settings.postprocess_fn is not None:
        raise ValueError(
            "postprocess_fn: got a function with a store, wanted None: a store holds the model's own values"
        )
    run = {
        "front": "ParallelMCMC.run",
        **described(store, target, builder),
        "key": key_words(keys),
        "key_impl": str(jax.random.key_impl(keys)),
        "num_samples": num_samples,
        "num_chains": keys.shape[0],
        "num_warmup": num_warmup,
        "thinning": thinning,
        "max_iterations": None,
        "solver": codec.encode(solver, "solver"),
        "schedule": codec.encode(schedule, "schedule"),
        "adaptation": codec.encode(sampler.adaptation, "adaptation"),
        "init_params": _digest(init_params),
        "post_warmup_state": _digest(state),
        "certificate": codec.encode(settings.certificate, "certificate"),
    }

    def make_start(example: PyTree) -> bytes:
        request = Request(
            None,
            target,
            builder,
            num_samples,
            keys.shape[0],
            num_warmup,
            None,
            None,
            solver,
            schedule,
            None,
            None,
            None,
            thinning,
            settings.certificate,
        )
        # Before warm-up: what cannot fit is refused at once.
        chunk_of(store, request, example, False, None)
        warmup, first = None, state
        if first is None:
            ready = begin(sampler, target, keys, num_warmup, init_params, progress)
            kernel, warmup, first = ready.kernel, ready.warmup, state_of(ready, keys)
        else:
            kernel = kernel_from(sampler, target, first)
        end = End(first.r, first.adapt_state.discrete, int(first.i[0]))
        return start_of(store, Ready(kernel, warmup, first.z, keys), request, None, progress, end)

    draws = run_stored(store, run, target, builder, None, make_start, progress)
    start, example = Start.read(draws.folder.read_start()), example_of(target)
    kernel = start.kernel(target, builder, example)
    arrays = read_state(draws.chunks[-1])[0] if draws.chunks else start.arrays
    last = _state_after(draws, kernel, target, keys, unpack_end(arrays, kernel, example))
    began = jax.vmap(kernel.position)(start.end(kernel, example).carries)
    pool = jax.tree.map(lambda first, now: jnp.concatenate([first, now]), began, last.z)
    return draws, last, kernel, pool


def _state_after(
    draws: StoredDraws, kernel: Kernel, target: Target, keys: Key, end: End
) -> HMCState:
    """NumPyro's state where the chains stand."""
    positions = jax.vmap(kernel.position)(end.carries)
    density, data = density_of(target.logdensity, jax.tree.map(lambda leaf: leaf[0], positions))
    values = jax.vmap(functools.partial(density, data))(positions)
    state = state_of(Beginning(kernel, positions, np.asarray(values), None, np.nan), keys)
    index = np.broadcast_to(np.int32(end.num_steps), keys.shape)
    said = {}
    if draws.num_samples:
        said["mean_accept_prob"] = draws.totals.acceptance / draws.num_samples
    if draws.finished and draws.posterior.sizes.get("draw"):
        # The last draw of a finished run is always kept.
        last = draws.sample_stats.isel(draw=-1)
        said |= {
            name: last[theirs].values
            for name, theirs in _FIELDS.items()
            if theirs in last and hasattr(state, name)
        }
    said = {name: jnp.asarray(value, getattr(state, name).dtype) for name, value in said.items()}
    return state._replace(
        i=jnp.asarray(index),
        r=end.carries,
        **said,
        adapt_state=state.adapt_state._replace(discrete=end.discrete),
    )


def read_fields(
    draws: StoredDraws, names: tuple[str, ...], removed: tuple[str, ...], is_dict: bool
) -> dict[str, Any]:
    """Collected fields of the kept draws, in memory, leaves `(C, T', ...)`.

    Args:
        draws: Stored.
        names: Fields, the draws' own field `z` first.
        removed: Sites to leave out of `z`.
        is_dict: Whether positions are named.

    Raises:
        ValueError: For a field that a store does not have.
    """
    found, stats = {}, draws.sample_stats
    potential = (
        -jnp.asarray(stats["lp"].values)
        if "lp" in stats
        else jnp.full(stats["residual"].shape, jnp.nan)
    )
    for name in names:
        if name == "z":
            sites = {
                site: jnp.asarray(one.values)
                for site, one in draws.posterior.data_vars.items()
                if site not in removed
            }
            found[name] = sites if is_dict or set(sites) != {"x"} else sites["x"]
        elif name == "potential_energy":
            found[name] = potential
        elif _FIELDS[name] in stats:
            found[name] = jnp.asarray(stats[_FIELDS[name]].values)
        else:
            # As in memory: what the kernel does not say.
            found[name] = {
                "diverging": jnp.zeros(potential.shape, bool),
                "energy": potential,
                "num_steps": jnp.ones(potential.shape, jnp.int32),
            }.get(name, jnp.ones(potential.shape))
    return found


def check_fields(names: tuple[str, ...]) -> None:
    """Refuse fields that a store does not have.

    Raises:
        ValueError: Naming those that there are.
    """
    for name in names:
        if name not in ("z", "potential_energy", *_FIELDS):
            known = sorted(["potential_energy", *_FIELDS])
            raise ValueError(f"extra_fields: got {name!r} with a store; wanted some of {known}")


class ReadsStore(MCMC):
    """NumPyro's `MCMC` whose draws may lie on a disk: they are read when they are asked for, and not kept."""

    _shelf: tuple[StoredDraws, tuple[str, ...], tuple[str, ...]] | None = None

    def get_samples(self, group_by_chain: bool = False) -> Any:
        """As NumPyro's."""
        return (
            super().get_samples(group_by_chain)
            if self._shelf is None
            else self._read(group_by_chain)["z"]
        )

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Any]:
        """As NumPyro's."""
        if self._shelf is None:
            return super().get_extra_fields(group_by_chain)
        return {name: value for name, value in self._read(group_by_chain).items() if name != "z"}

    def print_summary(self, prob: float = 0.9, exclude_deterministic: bool = True) -> None:
        """As NumPyro's; of kept draws, which are in memory meanwhile."""
        empty = self._states
        try:
            self._states = empty if self._shelf is None else self._read(True)
            super().print_summary(prob, exclude_deterministic)
        finally:
            self._states = empty

    def _read(self, group_by_chain: bool) -> dict[str, Any]:
        draws, names, removed = self._shelf
        fields = read_fields(draws, names, removed, isinstance(self.last_state.z, dict))
        return (
            fields
            if group_by_chain
            else jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), fields)
        )


def _digest(tree: PyTree) -> str | None:
    return (
        None
        if tree is None
        else digest_arrays(
            jnp.asarray(leaf) if not hasattr(leaf, "dtype") else leaf
            for leaf in jax.tree.leaves(tree)
        )
    )
