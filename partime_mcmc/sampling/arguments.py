"""What a run was asked for: the arguments of `sample` and of `ParallelMCMC.run`, checked."""

import contextlib
import dataclasses
import os
from typing import Any, Callable, ContextManager

import jax
import numpy as np
from jax.sharding import Mesh

from partime_mcmc.certify.recorded import Certification, CertifyWhileRolling
from partime_mcmc.engine import Schedule, Tolerance
from partime_mcmc.kernels import Kernel
from partime_mcmc.kernels.coupling import Coupling
from partime_mcmc.kernels.kernel_program import Builder
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.sampling.target import Target
from partime_mcmc.solvers import Solver
from partime_mcmc.storage.store import Store
from partime_mcmc.types import Key, PyTree, is_key, jax_config
from partime_mcmc.validation import check_count, check_has, describe
from partime_mcmc.warmup.warmup import Adaptation, Warmup


@dataclasses.dataclass(frozen=True, eq=False)
class SampleArguments:
    """What a run was asked for, checked.

    Attributes:
        front: What the user called.
        target: What to sample.
        kernel: A tuned `Kernel`, a builder that warm-up tunes, or the warm-up of another run.
        starts: Makes so many checked starts, leaves `(n, ...)`.
        warmup_key: One key.
        chain_keys: One key per chain, shape `(C,)`.
        key_words: The numbers of the user's key or keys.
        key_impl: The generator that they belong to.
        num_samples: T, draws per chain.
        num_warmup: Warm-up steps per chain at most.
        adaptation: How a builder's chains find the typical set and a metric; None is `PooledAdaptation()`.
        coupling: The coupling that the user fixed, None otherwise.
        choose_coupling: From a warm-up to the same with a coupling chosen for its kernel; None leaves the kernel's own.
        solver: A recipe; None is the default.
        schedule: How a chunk is cut into windows; None is the default.
        tolerance: How small residuals must be; None is the default.
        max_iterations: Iterations per window; None is the solver's default.
        max_bytes: Memory that the run may take on each device; None is most of the device's.
        thinning: In a store the last of so many draws is kept.
        certificate: What certificates rest on.
        mesh: Devices to spread the run over; None is the default device alone.
        store: Where draws are kept on disk; None is in memory.
        state: Where the chains of a tuned kernel go on from; None is at starts.
        extra: Further plain values that distinguish the run, by name.
    """

    front: str
    target: Target
    kernel: Kernel | Builder | Warmup
    starts: Callable[[int], PyTree]
    warmup_key: Key
    chain_keys: Key
    key_words: list[int]
    key_impl: str
    num_samples: int
    num_warmup: int = 0
    adaptation: Adaptation | None = None
    coupling: Coupling | None = None
    choose_coupling: Callable[[Warmup], Warmup] | None = None
    solver: Solver | None = None
    schedule: Schedule | None = None
    tolerance: Tolerance | None = None
    max_iterations: int | None = None
    max_bytes: int | None = None
    thinning: int = 1
    certificate: Certification = CertifyWhileRolling()
    mesh: Mesh | None = None
    store: Store | None = None
    state: ChainState | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def num_chains(self) -> int:
        """C."""
        return self.chain_keys.shape[0]


def check_strategies(
    target: Any,
    kernel: Any,
    solver: Any = None,
    schedule: Any = None,
    tolerance: Any = None,
    max_iterations: Any = None,
    certificate: Any = CertifyWhileRolling(),
    adaptation: Any = None,
) -> None:
    """Refuse arguments of the wrong kind.

    Raises:
        TypeError: Naming the argument.
        ValueError: If `max_iterations` is not a positive integer.
    """
    if not isinstance(target, Target):
        raise TypeError(
            f"target: got {describe(target)}, wanted a Target, e.g. from_numpyro(model, ..., key=key) or "
            "Target(logdensity, initial)"
        )
    if not callable(kernel) and not isinstance(kernel, (Kernel, Warmup)):
        raise TypeError(
            f"kernel: got {describe(kernel)}, wanted a Kernel (from_blackjax(...)), a builder such as hmc, or the "
            "warm-up of another run"
        )
    recipes = "a recipe such as shooting() or quasi_deer(), or None"
    schedules = "AllAtOnce(), Windows(size), SlidingWindow(size), or None"
    adaptations = "PooledAdaptation(...), WindowAdaptation(...), or None"
    for name, value, methods, wanted in (
        ("solver", solver, ("init", "step", "map_size"), recipes),
        ("schedule", schedule, ("window", "advance"), schedules),
        ("adaptation", adaptation, ("__call__",), adaptations),
    ):
        if value is not None:
            check_has(value, name, methods, wanted)
    if tolerance is not None and not isinstance(tolerance, Tolerance):
        raise TypeError(
            f"tolerance: got {describe(tolerance)}, wanted Tolerance(relative, absolute) or None"
        )
    if tolerance is not None:
        tolerance.check_values()
    if max_iterations is not None:
        check_count(max_iterations, "max_iterations", 1)
    check_has(
        certificate, "certificate", ("dynamics",), "CertifyWhileRolling() or CertifyIndependently()"
    )


def device_of(*values: PyTree) -> Any:
    """The one device on which the first of these that was put on a device lies; None if none was.

    Args:
        *values: Data, starts, keys.
    """
    for leaf in jax.tree.leaves(values):
        # A key is no array of its own: what it holds is.
        held = jax.random.key_data(leaf) if is_key(leaf) else leaf
        if isinstance(held, jax.Array) and held.committed and len(held.devices()) == 1:
            return next(iter(held.devices()))
    return None


def on_device(device: Any) -> ContextManager:
    """Where the body runs on this device; unchanged for None, and for the device on which it runs anyway."""
    default = jax_config.jax_default_device or jax.local_devices()[0]
    return contextlib.nullcontext() if device in (None, default) else jax.default_device(device)


def key_words(key: Key) -> list[int]:
    """The numbers of a key, or of several."""
    return [int(word) for word in np.ravel(jax.random.key_data(key))]


def as_store(store: Store | str | os.PathLike | None) -> Store | None:
    """A store from the argument `store`.

    Raises:
        TypeError: If it is neither None, nor a path, nor a `Store`.
    """
    if store is None or isinstance(store, Store):
        return store
    if not isinstance(store, (str, os.PathLike)):
        raise TypeError(
            f"store: got {describe(store)}, wanted a folder's path or a Store(path, ...)"
        )
    return Store(store)
