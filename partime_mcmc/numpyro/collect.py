"""What NumPyro collects from a run: fields of `HMCState` by name, for every kept draw, and the state after the last one.

Also here: the shapes that NumPyro wants where there is nothing to collect, and far-apart draws for pilot chains.
"""

from __future__ import annotations

from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.hmc import HMCState

from partime_mcmc.sampling.draws import Draws
from partime_mcmc.kernels.kernel_program import ParametrisedKernel
from partime_mcmc.types import PyTree

_NUM_POOL = 32


def collect(
    draws: Draws,
    kernel: ParametrisedKernel,
    state: HMCState,
    postprocess: Callable | None,
    names: tuple[str, ...],
    removed: tuple[str, ...],
    thinning: int,
) -> tuple[dict[str, PyTree], HMCState]:
    """Collected fields and the last state.

    Args:
        draws: Of all chains, `(C, T, ...)`; T may be 0.
        kernel: The kernel.
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
    everything = _fields(draws, kernel, state)
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


def nothing(state: HMCState, num_chains: int) -> tuple[dict[str, PyTree], HMCState]:
    """No draws, as NumPyro wants them, empty arrays, and the state, without its axis of chains if there is one chain."""
    shape = (0,) if num_chains == 1 else (0, num_chains)
    none = {
        "z": jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape[1:]), leaf.dtype), state.z)
    }
    return none, jax.tree.map(lambda leaf: leaf[0], state) if num_chains == 1 else state


def with_chains(tree: PyTree, num_chains: int) -> PyTree:
    """A state or starts of NumPyro's with the axis of chains, which a single chain lacks."""
    return jax.tree.map(lambda leaf: leaf[None], tree) if num_chains == 1 else tree


def far_apart(starts: PyTree, positions: PyTree) -> PyTree:
    """Where chains came from and some of their draws, at least two: far-apart starts for pilot chains.

    Args:
        starts: Leaves `(C, ...)`.
        positions: Leaves `(C, T, ...)`, T at least 1.

    Returns:
        Leaves `(K, ...)`.
    """
    num_chains, num_steps = jax.tree.leaves(positions)[0].shape[:2]
    count = min(_NUM_POOL, num_chains * num_steps)
    # Neighbours are paired, so that they come from different chains, and from different times of one.
    chains, steps = np.arange(count) % num_chains, np.linspace(num_steps - 1, 0, count).astype(int)
    return jax.tree.map(
        lambda first, leaf: jnp.concatenate([first, leaf[chains, steps]]), starts, positions
    )


def _kept(draws: Draws, thinning: int) -> np.ndarray | None:
    """Which draws are kept; None for all."""
    if thinning == 1:
        return None
    num_steps = draws.plan["num_samples"]
    return np.arange(num_steps % thinning + thinning - 1, num_steps, thinning)


def _fields(draws: Draws, kernel: ParametrisedKernel, state: HMCState) -> dict[str, Any]:
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
    if not draws.plan["num_samples"]:
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
        r=draws.end.carries,
        **jax.device_put({"z": z} | own),
        adapt_state=state.adapt_state._replace(discrete=draws.end.discrete),
    )
