"""What a run needs to go on, written once, when warm-up is done and a solver is chosen: numbers, never code.

    keys of all chains · where the chains start · the tuned kernel's numbers · solver, schedule, tolerance · steps per chunk

The kernel is made again from the model and the builder that the user gives, and from these numbers. The run that writes
them goes on from what it reads back, so that a resumed run cannot differ from it.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from partime_mcmc.kernels import Evidence, Kernel, Whitening
from partime_mcmc.kernels.whiten import LowRank
from partime_mcmc.sampling.choose_coupling import takes_dice, with_dice
from partime_mcmc.sampling.draws import End
from partime_mcmc.kernels.kernel_program import Builder, KernelProgram, ParametrisedKernel, density_of, parametrised_kernel
from partime_mcmc.storage import codec
from partime_mcmc.storage.formats import pack_arrays, unpack_arrays
from partime_mcmc.storage.state import pack_leaves, as_committed_array, text_array, unpack_end, unpack_leaves
from partime_mcmc.sampling.target import Target
from partime_mcmc.warmup.tuning import unwrapped
from partime_mcmc.warmup.warmup import Warmup
from partime_mcmc.schedule import Schedule
from partime_mcmc.solution import Tolerance
from partime_mcmc.solvers import Solver
from partime_mcmc.types import Key, PyTree


@dataclasses.dataclass(frozen=True)
class Settled:
    """What was chosen once for a whole run.

    Attributes:
        solver: A recipe.
        schedule: How each chunk is cut.
        tolerance: How small residuals must be.
        chunk: Steps per chunk.
        program: Hashes of the kernel's step, `program` and `arrays`.
        settings: Of the tuned kernel, by the builder's argument names; None for a kernel that came tuned.
        dice: That pilots or the user chose; None: the builder's own.
        num_warmup: Steps of warm-up that were made.
        warmup: The warm-up's sentences; empty if there was none.
        advice: The advice behind the solver; empty if none was asked for.
        certificate: What certificates rest on.
        groups: Into how many groups chains are cut, on however many cores the run goes on.
    """

    solver: Solver
    schedule: Schedule
    tolerance: Tolerance
    chunk: int
    program: dict[str, str]
    settings: dict[str, Any] | None
    dice: Any
    num_warmup: int
    warmup: str
    advice: str
    certificate: Evidence
    groups: int = 1


def settled_for(kernel: Kernel, warmup: Warmup | None, **choices: Any) -> Settled:
    """What was chosen, with what the kernel and its warm-up say of themselves.

    Args:
        kernel: ParametrisedKernel.
        warmup: Behind it, if any.
        **choices: The other fields.
    """
    tuned = isinstance(kernel, ParametrisedKernel)
    settings = dict(kernel.numbers.settings) | dict(kernel.family.counts) if tuned else None
    dice = unwrapped(kernel.family.builder)[1].get("dice") if tuned else None
    num_warmup = warmup.num_steps if warmup else 0
    return Settled(
        settings=settings, dice=dice, num_warmup=num_warmup, warmup=str(warmup or ""), **choices
    )


def pack_start(settled: Settled, kernel: Kernel, keys: Key, end: End) -> bytes:
    """Everything that a run needs to go on.

    Args:
        settled: What was chosen.
        kernel: The tuned kernel.
        keys: One per chain, shape `(C,)`.
        end: Where the chains start.
    """
    words = {
        "settled": codec.encode(settled, "plan"),
        "num_steps": end.num_steps,
        "failed_running": end.failed_running,
        "stretch": end.stretch,
    }
    arrays = (
        pack_leaves("key", keys)
        | pack_leaves("carry", end.carries)
        | pack_leaves("discrete", end.discrete)
    )
    if isinstance(kernel, ParametrisedKernel):
        whitening = kernel.numbers.whitening
        arrays |= pack_leaves("example", whitening.example) | pack_leaves(
            "center", whitening.center
        )
        arrays |= pack_leaves("scale", whitening.scale)
    return pack_arrays(arrays | {"words": text_array(words)})


@dataclasses.dataclass(frozen=True)
class Start:
    """A start that was read.

    Attributes:
        settled: What was chosen.
        arrays: The numbers.
    """

    settled: Settled
    arrays: dict[str, np.ndarray]

    @classmethod
    def read(cls, data: bytes) -> Start:
        """From the bytes of `pack_start`."""
        arrays = unpack_arrays(data)
        return cls(codec.decode(json.loads(bytes(arrays["words"]).decode())["settled"]), arrays)

    def keys(self) -> Key:
        """One key per chain, shape `(C,)`."""
        return unpack_leaves("key", self.arrays, 0)

    def end(self, kernel: Kernel, example: PyTree) -> End:
        """Where the chains start."""
        return unpack_end(self.arrays, kernel, example)

    def kernel(self, target: Target, given: Kernel | Builder | Warmup, example: PyTree) -> Kernel:
        """The tuned kernel.

        Args:
            target: What is sampled.
            given: What the user gives as the kernel: what the run was begun with, or its builder.
            example: A position; only structure, shapes and types matter.

        Raises:
            TypeError: If a tuned kernel is needed and a builder was given, or the other way round.
        """
        if self.settled.settings is None:
            if not isinstance(given, Kernel):
                raise TypeError(
                    "kernel: got a builder, wanted the tuned Kernel that this run was begun with"
                )
            return given
        builder = builder_of(given)
        if builder is None:
            raise TypeError("kernel: got a Kernel, wanted the builder that this run was begun with")
        if self.settled.dice is not None and takes_dice(builder):
            builder = with_dice(builder, self.settled.dice)
        example = unpack_leaves("example", self.arrays, example)
        scale = [
            as_committed_array(self.arrays[name]) for name in sorted(self.arrays) if name.startswith("scale.")
        ]
        whitening = Whitening(
            example,
            as_committed_array(self.arrays["center.0"]),
            scale[0] if len(scale) == 1 else LowRank(*scale),
        )
        density, data = density_of(target.logdensity, jax.tree.map(lambda leaf: leaf, example))
        settings = {
            name: value if isinstance(value, int) else as_committed_array(value)
            for name, value in self.settled.settings.items()
        }
        return parametrised_kernel(KernelProgram(density, builder), data, whitening, settings)


def builder_of(kernel: Kernel | Builder | Warmup) -> Builder | None:
    """The builder behind a kernel; None for a kernel that came tuned from elsewhere."""
    kernel = kernel.kernel if isinstance(kernel, Warmup) else kernel
    if isinstance(kernel, ParametrisedKernel):
        return kernel.family.builder
    return None if isinstance(kernel, Kernel) else kernel
