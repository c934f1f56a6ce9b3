"""What a step costs when L lanes take it together: from the compiled program and never from a clock.

`kernels` are the kernels that the compiled loop starts per step, `work` is the arithmetic of one lane, counted in the jaxpr
in units of one vectorised operation; what they take in seconds is up to a `Machine`. A plan must be the same in every run
with the same seeds on as many cores, so both are static facts.

Shooting computes whatever depends on the drives alone (dice) once, for all steps in one batch; its loop starts only the
kernels of the rest, and does only the work of the rest.

Loops whose trip count the program does not know (NUTS trees) count as `UNKNOWN_TRIPS` rounds; side by side all lanes
wait for the longest, which a factor 1 + 0.1 log₂ L stands for. Left out: caches, memory bandwidth, other programs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from typing import Callable

import jax
import numpy as np

from partime_mcmc.closures import is_jaxpr, primitives_of
from partime_mcmc.dynamics import Dynamics, rollout
from partime_mcmc.predict.machine import Machine
from partime_mcmc.solvers.ahead import split
from partime_mcmc.solvers.rollout import memo_of
from partime_mcmc.types import Array, PyTree

UNKNOWN_TRIPS = 4

# Work per output element, in units of one operation of a vectorised loop; a product's multiply-adds come cheaper, and
# counter-based random numbers are far dearer.
_PRODUCT = 0.5
_FREE = {
    "reshape",
    "broadcast_in_dim",
    "squeeze",
    "convert_element_type",
    "stop_gradient",
    "copy",
    "iota",
    "random_wrap",
    "random_unwrap",
    "transpose",
    "bitcast_convert_type",
    "slice",
}
_HEAVY = {
    "exp": 8,
    "exp2": 8,
    "log": 8,
    "log1p": 10,
    "expm1": 10,
    "tanh": 10,
    "logistic": 10,
    "erf": 10,
    "erf_inv": 20,
    "sin": 15,
    "cos": 15,
    "tan": 20,
    "pow": 20,
    "div": 3,
    "sqrt": 3,
    "rsqrt": 3,
    "lgamma": 40,
    "digamma": 40,
    "random_bits": 300,
    "random_split": 300,
    "random_fold_in": 300,
    "random_seed": 300,
    "threefry2x32": 300,
}
_REDUCTIONS = {
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "reduce_and",
    "reduce_or",
    "argmax",
    "argmin",
    "cumsum",
    "cumprod",
    "cumlogsumexp",
    "cummax",
    "sort",
}


def lane_work(function: Callable, *args: PyTree) -> float:
    """The arithmetic of one call on arrays, or on their shapes and types, in units of one vectorised operation."""
    return _work(jax.make_jaxpr(function)(*args).jaxpr)


def _work(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            total += params["length"] * _work(params["jaxpr"].jaxpr)
        elif name == "while":
            total += UNKNOWN_TRIPS * (
                _work(params["body_jaxpr"].jaxpr) + _work(params["cond_jaxpr"].jaxpr)
            )
        elif name == "cond":
            # Under vmap every branch is taken.
            total += sum(_work(branch.jaxpr) for branch in params["branches"])
        elif inner := [value for value in params.values() if is_jaxpr(value)]:
            total += sum(_work(getattr(value, "jaxpr", value)) for value in inner)
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += (
                _PRODUCT * _size(equation.outvars) * math.prod(shape[axis] for axis in contracted)
            )
        elif name in ("cholesky", "triangular_solve", "lu", "eigh", "qr", "svd"):
            shape = equation.invars[0].aval.shape
            total += _size(equation.invars) * shape[-1] / 3
        elif name not in _FREE:
            operands = equation.invars if name in _REDUCTIONS else equation.outvars
            total += _size(operands) * _HEAVY.get(name, 1)
    return total


def _size(variables) -> float:
    return float(sum(np.prod(variable.aval.shape, dtype=float) for variable in variables))


def kernels_per_step(text: str, num_steps: int, inlined: float = 1.0) -> float:
    """Kernels that a compiled loop starts per step, from its optimised HLO.

    Args:
        text: `compiled.as_text()` of a loop over `num_steps` steps; the count is 0 if it is not understood.
        num_steps: Trips of the outer loop.
        inlined: What a kernel counts inside a loop that the compiler has made one kernel of.
    """
    computations = _computations(text)
    entry = next(
        (name for name, lines in computations.items() if lines and lines[0] == "ENTRY"), None
    )
    return 0.0 if entry is None else _kernels(computations, entry, inlined, ()) / num_steps


_NAME = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_NO_KERNEL = {
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "iota",
    "after-all",
    "partition-id",
}


def _computations(text: str) -> dict[str, list[str]]:
    """Instructions by computation; the entry's list begins with `ENTRY`."""
    found: dict[str, list[str]] = {}
    lines = None
    for line in text.splitlines():
        if (
            line[:1] not in ("", " ", "}")
            and line.rstrip().endswith("{")
            and (head := _NAME.match(line))
        ):
            lines = found.setdefault(head.group(2), ["ENTRY"] if head.group(1) else [])
        elif lines is not None and " = " in line:
            lines.append(line)
    return found


def _kernels(computations, name, inlined, path) -> float:
    """Kernels started by one run of a computation; `path` are its callers."""
    if name in path:
        return 0.0
    total, inner = (
        0.0,
        functools.partial(_kernels, computations, inlined=inlined, path=(*path, name)),
    )
    for line in computations.get(name, ()):
        # Comments inside long shapes would hide the opcode.
        opcode = _OPCODE.search(" " + re.sub(r"/\*.*?\*/", "", line.split(" = ", 1)[-1]))
        opcode = opcode and opcode.group(1)
        if opcode is None or opcode in _NO_KERNEL:
            continue
        if opcode == "while":
            trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
            parts = re.findall(r"(?:body|condition)=%?([\w.\-]+)", line)
            total += (int(trips.group(1)) if trips else UNKNOWN_TRIPS) * sum(
                inner(part) for part in parts
            )
        elif opcode == "conditional":
            parts = re.findall(
                r"%([\w.\-]+)", re.sub(r"^.*?(?:branch_computations|true_computation)", "", line)
            )
            total += sum(inner(part) for part in parts if part in computations)
        elif opcode == "call":
            share = inlined if "xla_cpu_small_call" in line else 1.0
            total += share * sum(inner(part) for part in re.findall(r"to_apply=%?([\w.\-]+)", line))
        else:
            total += 1
    return total


@dataclasses.dataclass(frozen=True)
class StepCost:
    """What is known of a step without running it.

    Attributes:
        kernels: Kernels per step of the sequential loop, tiny loops made one kernel.
        kernels_wide: The same with no such favour: what many lanes pay.
        work: Arithmetic of one lane, in single-precision units.
        ahead: How much of that depends on the drive alone.
        num_random: How many drawings of random numbers depend on the drive alone.
        dimension: D.
        waits: Whether the step has a loop of unknown length, for whose end all lanes wait.
    """

    kernels: float
    kernels_wide: float
    work: float
    ahead: float
    num_random: int
    dimension: int
    waits: bool

    def loop(self, machine: Machine, lanes: int) -> float:
        """Seconds per step of the vmapped sequential loop."""
        kernels = self.kernels if lanes < _FEW_LANES else self.kernels_wide
        return self._longest(lanes) * machine.seconds(
            kernels, self.work + 2 * self.dimension, lanes
        )

    def batched(self, machine: Machine, steps: int) -> float:
        """Seconds for what so many steps compute from their drives alone, in one batch."""
        return machine.seconds(0, self.ahead, steps)

    def rolled(self, machine: Machine, lanes: int) -> float:
        """Seconds per step of shooting's loop."""
        per_lane, per_number = _SHOOTING_WORK
        kernels = max(
            self.kernels_wide - machine.random_kernels * self.num_random, 0.05 * self.kernels_wide
        )
        # Small kernels inside loops of unknown length stay small: the compiler makes calls of them at any width.
        wide = 1.0 if self.waits else machine.wide
        own = machine.seconds(wide * kernels, self.work - self.ahead, lanes) * self._longest(lanes)
        return own + machine.seconds(
            _SHOOTING_KERNELS, per_lane + per_number * self.dimension, lanes
        )

    def _longest(self, lanes: int) -> float:
        """The longest of the lanes' inner loops, relative to one of them."""
        return 1 + _WAITING * math.log2(lanes) if self.waits else 1.0


# Up to here the compiler makes one kernel of small loops.
_FEW_LANES = 16
# What shooting does besides the step, per lane and per number of its state: compare, select, write, and carry paths and
# drives between chains and lanes before and after. Measured on networks of 8 units, whose step costs next to nothing.
_SHOOTING_KERNELS = 20
_SHOOTING_WORK = 100, 60
# NUTS on eight schools took 55 µs a step alone, 107 in 16 lanes, 286 in 64: the counts cover most of the waiting.
_WAITING = 0.1


def step_cost(
    dynamics: Dynamics,
    initial: PyTree,
    drives: PyTree,
    num_steps: int,
    num_chains: int,
    machine: Machine,
) -> StepCost:
    """Compile the sequential loop of `num_chains` chains and read its cost; nothing is run.

    Args:
        dynamics: The recurrence on flat states, without captured arrays.
        initial: `x_0`, shape `(D,)`.
        drives: Shapes and types of one step's drives.
        num_steps: T.
        num_chains: C.
        machine: For `inlined`.
    """
    lanes = min(num_chains, _FEW_LANES - 1)

    def widened(leaf, *axes):
        return jax.ShapeDtypeStruct((*axes, *leaf.shape), leaf.dtype)

    many = jax.tree.map(lambda leaf: widened(leaf, lanes, num_steps), drives)
    text = sequential_loop.lower(dynamics, widened(initial, lanes), many).compile().as_text()
    memo = memo_of(dynamics)
    memory = jax.eval_shape(memo.enter, memo.params[0], initial, drives)
    step = jax.make_jaxpr(memo.advance)(memo.params[1], memory, drives).jaxpr
    first = jax.make_jaxpr(split(memo.advance, memo.params[1], memory, drives)[0])(
        memo.params[1], drives
    ).jaxpr
    # The unit of work is single precision: wider numbers fill vectors and memory sooner.
    width = max(1.0, initial.dtype.itemsize / 4)
    num_random = sum(
        equation.primitive.name.startswith(("random_", "threefry"))
        and equation.primitive.name not in _FREE
        for equation in first.eqns
    )
    return StepCost(
        kernels_per_step(text, num_steps, machine.inlined),
        kernels_per_step(text, num_steps),
        _work(step) * width,
        _work(first) * width,
        num_random,
        initial.shape[0],
        "while" in primitives_of(step),
    )


@jax.jit
def sequential_loop(dynamics: Dynamics, initial: Array, drives: PyTree) -> Array:
    """One step after another in L lanes: `initial` `(L, D)`, `drives` `(L, T, ...)`, result `(T, L, D)`."""
    return jax.vmap(functools.partial(rollout, dynamics), out_axes=1)(initial, drives)
