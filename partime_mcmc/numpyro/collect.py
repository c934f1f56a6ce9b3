"""What NumPyro collects from a run: fields of `HMCState` by name, for every kept draw, and the state after the last one.

Of draws in a store the fields that it has are read when they are asked for.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.hmc import HMCState

from partime_mcmc.sampling.draws import Draws
from partime_mcmc.storage.stored_draws import StoredDraws
from partime_mcmc.types import PyTree


def collect(
    draws: Draws,
    state: HMCState,
    postprocess: Callable | None,
    names: tuple[str, ...],
    removed: tuple[str, ...],
    thinning: int,
) -> tuple[dict[str, PyTree], HMCState]:
    """Collected fields and the last state.

    Args:
        draws: Of all chains, `(C, T, ...)`; T may be 0.
        state: Before the first draw.
        postprocess: The user's own map of one unconstrained draw; None is the model's.
        names: Fields to collect, the draws' own field `z` first.
        removed: Sites to leave out of `z`.
        thinning: Of so many draws the last is kept.

    Returns:
        Fields with leaves `(C, T', ...)`, and the state of every chain after its last step.

    Raises:
        ValueError: For a field that there is not, naming those that there are.
    """
    everything = _fields(draws, state)
    kept = _kept(draws, thinning)
    fields = {}
    for name in names:
        if name == "z":
            value = (
                draws.constrained
                if postprocess is None
                else jax.vmap(jax.vmap(postprocess))(draws.positions)
            )
            if (
                not isinstance(draws.positions, dict)
                and postprocess is None
                and set(value) == {"x"}
            ):
                value = draws.positions
            if removed:
                value = {site: one for site, one in value.items() if site not in removed}
        elif (
            name.startswith("z.")
            and isinstance(draws.positions, dict)
            and name[2:] in draws.positions
        ):
            value = draws.positions[name[2:]]
        elif name in everything:
            value = everything[name]
        else:
            raise ValueError(
                f"extra_fields: got {name!r}; wanted some of {sorted(everything)}, or z.<site>"
            )
        fields[name] = value if kept is None else jax.tree.map(lambda leaf: leaf[:, kept], value)
    return jax.device_put(fields), _last(draws, state, everything)


def empty_collection(state: HMCState, num_chains: int) -> tuple[dict[str, PyTree], HMCState]:
    """No draws, as NumPyro wants them, empty arrays, and the state, without its axis of chains if there is one chain."""
    shape = (0,) if num_chains == 1 else (0, num_chains)
    none = {
        "z": jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape[1:]), leaf.dtype), state.z)
    }
    return none, jax.tree.map(lambda leaf: leaf[0], state) if num_chains == 1 else state


def with_chains(tree: PyTree, num_chains: int) -> PyTree:
    """A state or starts of NumPyro's with the axis of chains, which a single chain lacks."""
    return jax.tree.map(lambda leaf: leaf[None], tree) if num_chains == 1 else tree


def _kept(draws: Draws, thinning: int) -> np.ndarray | None:
    """Which draws are kept; None for all."""
    if thinning == 1:
        return None
    num_steps = draws.num_samples
    return np.arange(num_steps % thinning + thinning - 1, num_steps, thinning)


def _fields(draws: Draws, state: HMCState) -> dict[str, Any]:
    """All fields, `(C, T, ...)`, on the host: what is the same in all steps (metrics) is not written out."""
    info = draws.info
    shape = draws.certificate.residual.shape
    num_chains, num_steps = shape
    ones = np.ones(shape)
    accept = np.asarray(info.get("acceptance_rate", ones))
    potential = -np.asarray(info.get("logdensity", np.nan * ones))
    before = np.asarray(state.i)[:, None]
    mean = np.asarray(state.mean_accept_prob)[:, None] * before + np.cumsum(accept, axis=1)
    index = before + np.arange(1, num_steps + 1)

    def each(value):
        value = np.asarray(value)
        return np.broadcast_to(value[:, None], (num_chains, num_steps, *value.shape[1:]))

    found = {
        "i": index.astype(np.int32),
        "potential_energy": potential,
        "energy": info.get("energy", potential),
        "num_steps": info.get("num_steps", np.ones(shape, np.int32)),
        "accept_prob": accept,
        "mean_accept_prob": (mean / np.maximum(index, 1)).astype(accept.dtype),
        "diverging": info.get("diverging", np.zeros(shape, bool)),
        "trajectory_length": each(state.trajectory_length),
        "residual": draws.certificate.residual,
        "accepted": draws.certificate.accepted,
    }
    for name in ("step_size", "inverse_mass_matrix"):
        found[f"adapt_state.{name}"] = each(getattr(state.adapt_state, name))
    return {name: np.asarray(value) for name, value in found.items()}


def _last(draws: Draws, state: HMCState, everything: dict[str, Any]) -> HMCState:
    if not draws.num_samples:
        return state
    own = {
        name: everything[name][:, -1].astype(getattr(state, name).dtype)
        for name in (
            "i",
            "potential_energy",
            "energy",
            "num_steps",
            "accept_prob",
            "mean_accept_prob",
            "diverging",
        )
    }
    z = jax.tree.map(lambda leaf: np.asarray(leaf)[:, -1], draws.positions)
    return state._replace(
        r=draws.state.carries,
        **jax.device_put({"z": z} | own),
        adapt_state=state.adapt_state._replace(discrete=draws.state.discrete),
    )


# --- of draws in a store ---------------------------------------------------------------------------------------------

_FIELDS = {
    "diverging": "diverging",
    "energy": "energy",
    "num_steps": "n_steps",
    "accept_prob": "acceptance_rate",
    "residual": "residual",
    "accepted": "accepted",
}


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


def check_fields(names: tuple[str, ...], postprocess: Callable | None) -> None:
    """Refuse what a store does not have.

    Raises:
        ValueError: For an unknown field, naming those that there are, or a `postprocess_fn` of the user's.
    """
    if postprocess is not None:
        raise ValueError(
            "postprocess_fn: got a function with a store, wanted None: a store holds the model's own values"
        )
    for name in names:
        if name not in ("z", "potential_energy", *_FIELDS):
            known = sorted(["potential_energy", *_FIELDS])
            raise ValueError(f"extra_fields: got {name!r} with a store; wanted some of {known}")


def last_stored_state(draws: StoredDraws, state: HMCState) -> HMCState:
    """NumPyro's state after the last draw in a store.

    Args:
        draws: Stored.
        state: Where its chains stand, without what the last step reported.
    """
    reported = {}
    if draws.num_samples:
        reported["mean_accept_prob"] = draws.mean_acceptance
    if draws.finished and draws.posterior.sizes.get("draw"):
        # The last draw of a finished run is always kept.
        last = draws.sample_stats.isel(draw=-1)
        reported |= {
            name: last[stored].values
            for name, stored in _FIELDS.items()
            if stored in last and hasattr(state, name)
        }
    return state._replace(
        i=jnp.full(state.i.shape, draws.state.num_steps, jnp.int32),
        **{
            name: jnp.asarray(value, getattr(state, name).dtype) for name, value in reported.items()
        },
    )
