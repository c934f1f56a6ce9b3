"""What passes from chunk to chunk, and is stored with each: where the chains stand, and what is known of all draws so far.

Arrays go as they are, to the last bit, in one block of bytes; verdicts and reports as JSON (`codec`).
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.kernels import Certificate, Kernel
from partime_mcmc.sampling.draws import Draws, End, RunReport
from partime_mcmc.sampling.merge import join_certificates, join_reports, without_steps
from partime_mcmc.storage import codec
from partime_mcmc.storage.formats import pack_arrays, unpack_arrays
from partime_mcmc.types import PyTree


@dataclasses.dataclass(frozen=True)
class Totals:
    """What is known of all draws of a run so far, kept and thinned out ones.

    Attributes:
        num_steps: Per chain.
        certificate: Without what it says of single steps.
        report: How the run went.
        acceptance: Sum of acceptance probabilities, or of acceptances, of each chain, shape `(C,)`.
        divergences: Of each chain, shape `(C,)`.
    """

    num_steps: int
    certificate: Certificate
    report: RunReport
    acceptance: np.ndarray
    divergences: np.ndarray

    @classmethod
    def of(cls, draws: Draws) -> Totals:
        """Of some draws."""
        info, steps = draws.info, np.shape(draws.certificate.residual)[1]
        accepted = np.asarray(info.get("acceptance_rate", draws.certificate.accepted), float).sum(
            axis=1
        )
        diverging = (
            np.asarray(info["diverging"]).sum(axis=1)
            if "diverging" in info
            else np.zeros(len(accepted), int)
        )
        return cls(steps, without_steps(draws.certificate), draws.report, accepted, diverging)

    def after(self, earlier: Totals | None) -> Totals:
        """Of these draws and the earlier ones."""
        if earlier is None:
            return self
        certificate = join_certificates(earlier.certificate, self.certificate)
        return Totals(
            earlier.num_steps + self.num_steps,
            certificate,
            join_reports(
                earlier.report, self.report, (earlier.num_steps, self.num_steps), certificate
            ),
            earlier.acceptance + self.acceptance,
            earlier.divergences + self.divergences,
        )


def pack_state(end: End, totals: Totals, running: dict[str, np.ndarray]) -> bytes:
    """The state after a chunk.

    Args:
        end: Where the chains stand.
        totals: What is known of all draws.
        running: Running statistics as arrays; may be empty.
    """
    words = {
        "num_steps": end.num_steps,
        "failed_running": end.failed_running,
        "stretch": end.stretch,
        "totals": codec.encode(totals, "totals"),
    }
    arrays = pack_leaves("carry", end.carries) | pack_leaves("discrete", end.discrete)
    arrays |= {f"running.{name}": value for name, value in running.items()}
    return pack_arrays(arrays | {"words": text_array(words)})


def unpack_end(arrays: dict[str, np.ndarray], kernel: Kernel, example: PyTree) -> End:
    """Where the chains stand, for the kernel that moves them.

    Args:
        arrays: From `unpack_state`, or of a start.
        kernel: The kernel.
        example: A position; only structure, shapes and types matter.
    """
    words = json.loads(bytes(arrays["words"]).decode())
    carry, discrete = jax.eval_shape(lambda position: _parts(kernel, position), example)
    return End(
        unpack_leaves("carry", arrays, carry),
        unpack_leaves("discrete", arrays, discrete),
        words["num_steps"],
        words["failed_running"],
        words["stretch"],
    )


def unpack_state(data: bytes) -> tuple[dict[str, np.ndarray], Totals, dict[str, np.ndarray]]:
    """All arrays of a state, what is known of all draws, and the running statistics."""
    arrays = unpack_arrays(data)
    totals = codec.decode(json.loads(bytes(arrays["words"]).decode())["totals"])
    prefix = "running."
    return (
        arrays,
        totals,
        {
            name.removeprefix(prefix): value
            for name, value in arrays.items()
            if name.startswith(prefix)
        },
    )


def pack_leaves(name: str, tree: PyTree) -> dict[str, np.ndarray]:
    """The leaves of a pytree as named arrays; keys become numbers under a name that says which kind they are of."""
    arrays = {}
    for index, leaf in enumerate(jax.tree.leaves(tree)):
        if is_key(leaf):
            arrays[f"{name}.{index}.{jax.random.key_impl(leaf)}"] = np.asarray(
                jax.random.key_data(leaf)
            )
        else:
            arrays[f"{name}.{index}"] = np.asarray(leaf)
    return arrays


def unpack_leaves(name: str, arrays: dict[str, np.ndarray], template: PyTree) -> PyTree:
    """A pytree like the template from the arrays of `pack_leaves`.

    Raises:
        ValueError: If the template has other leaves.
    """
    found: dict[int, Any] = {}
    for full, value in arrays.items():
        parts = full.split(".", 2)
        if parts[0] == name and len(parts) > 1:
            found[int(parts[1])] = (
                jax.random.wrap_key_data(value, impl=parts[2]) if len(parts) == 3 else as_committed_array(value)
            )
    leaves, tree = jax.tree.flatten(template)
    if sorted(found) != list(range(len(leaves))):
        raise ValueError(
            f"store: {len(found)} arrays for {name}, wanted {len(leaves)}: another kernel or model"
        )
    return jax.tree.unflatten(tree, [found[index] for index in range(len(leaves))])


def as_committed_array(value: Any) -> jax.Array:
    """A JAX array that remembers nothing but its numbers: restored ones and computed ones run the same programs."""
    return value if is_key(value) else jax.device_put(np.asarray(value))


def is_key(value: Any) -> bool:
    """Whether an array holds keys."""
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def text_array(words: dict[str, Any]) -> np.ndarray:
    """Plain values as an array of bytes."""
    return np.frombuffer(json.dumps(words, sort_keys=True).encode(), np.uint8)


def _parts(kernel: Kernel, position: PyTree):
    state = kernel.init(position, jax.random.key(0))
    return kernel.carry(state), kernel.discrete(state)
