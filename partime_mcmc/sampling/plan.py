"""Every choice of a run, made once before its first step: starts, warm-up, coupling, solver, windows, chunks.

    plan, state = prepare(arguments, progress)

A `Plan` is frozen and is all that executors and sinks look at; with a store it is written down, and a resumed run goes on
from what it reads back. `SampleArguments` are what a front (`sample`, `ParallelMCMC.run`) was asked for.
"""

import contextlib
import dataclasses
import math
from typing import Any, Callable, ContextManager

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.certify.recorded import Certification
from partime_mcmc.compile_cache import Timings, compiler_options
from partime_mcmc.diagnostics.checks import looks_improper
from partime_mcmc.engine import Dynamics, Schedule, Tolerance, Windows, sequential, shooting
from partime_mcmc.kernels import Kernel
from partime_mcmc.kernels.kernel_program import Builder, ParametrisedKernel, coupling_of
from partime_mcmc.sampling.arguments import SampleArguments
from partime_mcmc.sampling.chain_groups import num_groups
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.sampling.memory import DEFAULT_WINDOW, chunk_steps, mesh_shape
from partime_mcmc.sampling.progress import Progress
from partime_mcmc.sampling.randomness import begin, recurrence
from partime_mcmc.sampling.target import Target
from partime_mcmc.solvers import Solver
from partime_mcmc.solvers.segments import segment_length
from partime_mcmc.types import Key
from partime_mcmc.warmup.pooled import PooledAdaptation
from partime_mcmc.warmup.warmup import Warmup, warm_up

# Fewer steps teach nothing.
FEWEST_WARMUP = 20
# Runs too short to be worth pilot chains.
SHORT_RUN = 1024
# Lanes that fill one core. From 32 to 128 times differ by a tenth, and the fewer, the less is evaluated twice.
_CORE_LANES = 64
# A parallel solver takes 0.6 to 1.7 s longer to compile than the loop, and on two cores gains a third of the time of a loop over
# four chains at most (JAX 0.10.1).
_SHORT_LOOP = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """Everything that is decided before the first step of a run.

    Attributes:
        target: What is sampled.
        kernel: The tuned kernel.
        recurrence: Of the kernel, without captured arrays.
        keys: One per chain, shape `(C,)`.
        first_step: Steps that the chains had taken before this run, from which random numbers are counted.
        num_samples: T, steps of the run per chain.
        solver: What solves a window.
        schedule: How a chunk is cut into windows.
        tolerance: How small residuals must be.
        max_iterations: Iterations per window before a chain is finished sequentially; None is the solver's default.
        certificate: What certificates rest on.
        chunk: Steps per chunk.
        num_groups: Into how many groups chains are divided, each with a core of its own (`chain_groups`).
        thinning: In a store the last of so many draws is kept.
        key_words: The numbers of the user's key or keys.
        num_warmup: Steps of warm-up that were made.
        warmup: The warm-up; None if the kernel came tuned, or the plan was read from a store.
        warmup_notes: What the warm-up says of itself; empty if there was none.
        compiler_options: How hard the compiler tries; None is the usual.
        pass_options: Likewise for what passes over all draws once.
    """

    target: Target
    kernel: Kernel
    recurrence: Dynamics
    keys: Key
    first_step: int
    num_samples: int
    solver: Solver
    schedule: Schedule
    tolerance: Tolerance
    max_iterations: int | None
    certificate: Certification
    chunk: int
    num_groups: int
    thinning: int
    key_words: list[int]
    num_warmup: int = 0
    warmup: Warmup | None = None
    warmup_notes: str = ""
    compiler_options: dict[str, Any] | None = None
    pass_options: dict[str, Any] | None = None

    @property
    def num_chains(self) -> int:
        """C."""
        return self.keys.shape[0]

    @property
    def last_step(self) -> int:
        """Steps that the chains have behind them when the run ends."""
        return self.first_step + self.num_samples

    def describe(self) -> dict[str, Any]:
        """The plan in plain values: with the same target and versions they give the same draws again."""
        return {
            "kernel": self.kernel.name,
            "coupling": coupling_of(self.kernel),
            "solver": repr(self.solver),
            "schedule": repr(self.schedule),
            "num_samples": self.num_samples,
            "num_chains": self.num_chains,
            "num_warmup": self.num_warmup,
            "thinning": self.thinning,
            "key": self.key_words,
        }


# (what is asked for, the kernel's builder, steps per chunk) -> what goes on beside warm-up
Ahead = Callable[[SampleArguments, Builder, int], ContextManager]


def prepare(
    arguments: SampleArguments,
    progress: Progress,
    ahead: Ahead = lambda asked, builder, chunk: contextlib.nullcontext(),
) -> tuple[Plan, ChainState]:
    """Make every choice of a run.

    Args:
        arguments: What it was asked for.
        progress: Shown while warm-up runs.
        ahead: What goes on beside warm-up.

    Returns:
        The plan, and where the chains stand before the first step.

    Raises:
        TooLarge: If the run cannot fit into memory; before anything is computed.
        ValueError: If starts are bad, or a warm-up has another number of chains.
    """
    chunk, kernel, warmup = chunk_steps(arguments), arguments.kernel, None
    num_chains, state = arguments.num_chains, arguments.state
    if not isinstance(kernel, Kernel):
        if isinstance(kernel, Warmup):
            warmup = kernel
        else:
            warmup = _warmed_up(arguments, kernel, chunk, progress, ahead)
        have = jax.tree.leaves(warmup.positions)[0].shape[0]
        if have != num_chains:
            raise ValueError(
                f"num_chains: got {num_chains}, but the warm-up given as `kernel` has {have} chains"
            )
        kernel, state = warmup.kernel, None
    if state is None:
        positions = warmup.positions if warmup else arguments.starts(num_chains)
        state = begin(kernel, positions, arguments.chain_keys, Timings())
    return plan_for(arguments, chunk, kernel, warmup, state), state


def plan_for(
    asked: SampleArguments, chunk: int, kernel: Kernel, warmup: Warmup | None, state: ChainState
) -> Plan:
    """The plan of a tuned kernel.

    Args:
        asked: What the run was asked for.
        chunk: Steps per chunk.
        kernel: The kernel.
        warmup: Of the kernel; None if it came tuned.
        state: Where the chains stand, or shapes and types of that.
    """
    keys, dtype = asked.chain_keys, jax.tree.leaves(state.carries)[0].dtype
    num_drawn = min(chunk, asked.num_samples) or 1
    dynamics = recurrence(kernel, keys, state, Timings(), asked.certificate, num_drawn)
    rows, parts = mesh_shape(asked.mesh)
    # On a mesh chains are spread over devices instead of cores: one group.
    groups, steps = 1, asked.num_samples
    if asked.mesh is None:
        groups, steps = num_groups(asked.num_chains, dynamics), chunk
    return Plan(
        target=asked.target,
        kernel=kernel,
        recurrence=dynamics,
        keys=keys,
        first_step=state.num_steps,
        num_samples=asked.num_samples,
        solver=asked.solver
        or default_solver(
            asked.num_chains // (rows * groups),
            -(-steps // parts),
            groups,
            _loop_seconds(asked, kernel),
        ),
        schedule=asked.schedule or Windows(DEFAULT_WINDOW * parts),
        tolerance=asked.tolerance or default_tolerance(kernel, dtype),
        max_iterations=asked.max_iterations,
        certificate=asked.certificate,
        chunk=chunk,
        num_groups=groups,
        compiler_options=_compiler_options(asked, kernel, ParametrisedKernel.unoptimised_seconds),
        pass_options=_compiler_options(asked, kernel, ParametrisedKernel.own_seconds),
        thinning=asked.thinning,
        key_words=asked.key_words,
        num_warmup=warmup.num_steps if warmup else 0,
        warmup=warmup,
        warmup_notes=str(warmup or ""),
    )


def chooses_coupling(asked: SampleArguments, kernel: Kernel) -> bool:
    """Whether pilots choose the coupling: where the user does not, for chains that a solver has to see forgetting."""
    return bool(asked.choose_coupling) and not is_short(_loop_seconds(asked, kernel))


def _loop_seconds(asked: SampleArguments, kernel: Kernel) -> float:
    """What the loop over all steps takes; infinite where that is not known, where a mesh shares the run or a store keeps it, which is a
    long one then, and where the user says how a parallel solver should go about it."""
    said = asked.mesh, asked.store, asked.schedule, asked.tolerance, asked.max_iterations
    if any(one is not None for one in said) or not isinstance(kernel, ParametrisedKernel):
        return math.inf
    return kernel.loop_seconds(asked.num_samples, asked.num_chains)


def is_short(loop_seconds: float) -> bool:
    """Whether a loop that takes so long ends before a parallel solver would be compiled."""
    return loop_seconds < _SHORT_LOOP and jax.default_backend() == "cpu"


def default_solver(
    num_chains: int = 1,
    num_samples: int = DEFAULT_WINDOW,
    groups: int = 1,
    loop_seconds: float = math.inf,
) -> Solver:
    """Shooting, the lanes of the device shared by all chains: near one evaluation per draw where chains forget.

    On a processor it is the loop over all steps where that ends before a parallel solver would be compiled.

    Args:
        num_chains: Chains that share them.
        num_samples: T.
        groups: How many groups of so many chains there are, each with a core of its own.
        loop_seconds: What the loop takes; infinite where that is not known.
    """
    if is_short(loop_seconds):
        return sequential()
    lanes = None if groups == 1 else _CORE_LANES
    return shooting(steps=segment_length(min(num_samples, DEFAULT_WINDOW), num_chains, lanes=lanes))


def default_tolerance(kernel: Kernel, dtype: Any) -> Tolerance:
    """A tenth (float32) to a thousandth (float64) of what the certificate allows, in the units of the kernel's noise.

    What is left to the certificate's bound is for conditioning: an error of one step reaches the next ones. The unit is 1 in the
    whitened coordinates that warm-up found; other kernels that do not know their noise are judged by the sizes of their states.
    """
    size = 1e-11 if jnp.dtype(dtype) == jnp.float64 else 1e-5
    noise = kernel.noise_scale
    if noise is None and not isinstance(kernel, ParametrisedKernel):
        return Tolerance(relative=0.25 * size)
    unit = np.minimum(1.0, np.min(np.asarray(1.0 if noise is None else noise)))
    return Tolerance(relative=0.25 * size, absolute=np.asarray(size * unit, dtype))


def _compiler_options(
    asked: SampleArguments, kernel: Kernel, seconds: Callable[[ParametrisedKernel, float], float]
) -> dict[str, Any] | None:
    """The usual ones in a store, where all parts of a long run need the same bits; otherwise what pays for programs that take so many
    seconds for the draws asked for."""
    if asked.store is not None or not isinstance(kernel, ParametrisedKernel):
        return compiler_options()
    return compiler_options(seconds(kernel, asked.num_samples * asked.num_chains))


def _warmed_up(
    asked: SampleArguments, builder: Builder, chunk: int, progress: Progress, ahead: Ahead
) -> Warmup:
    """The warm-up of a builder, with positions for the chains that are asked for."""
    adaptation = asked.adaptation or PooledAdaptation()
    starts = asked.starts(max(asked.num_chains, adaptation.num_chains))
    num_steps = max(asked.num_warmup, FEWEST_WARMUP)
    with ahead(asked, builder, chunk), progress.stage("warm-up", num_steps) as advance:
        warmup = warm_up(
            asked.warmup_key,
            asked.target.logdensity,
            builder,
            starts,
            num_steps,
            adaptation,
            advance,
            asked.target.centring,
        )
    if num_steps > asked.num_warmup:
        note = f"num_warmup was {asked.num_warmup}, too few to learn anything: {num_steps} steps were allowed."
        warmup = dataclasses.replace(warmup, notes=(*warmup.notes, note))
    suspicion = looks_improper(starts, warmup.positions, warmup.settings.get("step_size", 1.0))
    if suspicion:
        progress.warn(suspicion)
    # Cut with NumPy: JAX would compile a small program for each operation.
    first = jax.tree.map(lambda leaf: np.asarray(leaf)[: asked.num_chains], warmup.positions)
    warmup = dataclasses.replace(
        warmup, positions=jax.device_put(first), logdensity=warmup.logdensity[: asked.num_chains]
    )
    if asked.choose_coupling and chooses_coupling(asked, warmup.kernel):
        warmup = asked.choose_coupling(warmup)
    progress.note(str(warmup))
    return warmup
