"""What a step costs when L lanes take it together, from the compiled program alone and never from a clock.

    c(L) = o · ops + a · L · work / min(cores, ops_parallel)        seconds

`ops` are the kernels that the compiled loop starts per step (loops with a known trip count unrolled in thought), each of
which costs `o` however few lanes there are; `work` is the arithmetic of one lane in units of one fused multiply-add, counted
in the jaxpr. A plan must be the same in every run with the same seeds, so both are static facts, and the constants come
with a `Machine`: a default per backend, or one measured by `calibrate` and kept by whoever wants it.

Loops whose trip count the program does not know (NUTS trees) are counted as `UNKNOWN_TRIPS` rounds; that factor hits the
sequential loop and the parallel one alike. Left out: caches, memory bandwidth, what else runs on the machine.
"""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from typing import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from partime_mcmc.dynamics import Dynamics, Memo
from partime_mcmc.types import PyTree

UNKNOWN_TRIPS = 4

# Work per output element, in fused multiply-adds of a well vectorised loop.
_FREE = {"reshape", "broadcast_in_dim", "squeeze", "convert_element_type", "stop_gradient", "copy", "iota", "random_wrap",
         "random_unwrap", "transpose", "bitcast_convert_type", "slice"}
_HEAVY = {"exp": 8, "exp2": 8, "log": 8, "log1p": 10, "expm1": 10, "tanh": 10, "logistic": 10, "erf": 10, "erf_inv": 20,
          "sin": 15, "cos": 15, "tan": 20, "pow": 20, "div": 3, "sqrt": 3, "rsqrt": 3, "lgamma": 40, "digamma": 40,
          "random_bits": 60, "random_split": 60, "random_fold_in": 60, "random_seed": 60, "threefry2x32": 60}
_REDUCTIONS = {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "argmax", "argmin",
               "cumsum", "cumprod", "cumlogsumexp", "cummax", "sort"}


def lane_work(function: Callable, *args: PyTree) -> float:
    """The arithmetic of one call, in fused multiply-adds.

    Args:
        function: Pure.
        *args: Arrays, or their shapes and types.
    """
    return _work(jax.make_jaxpr(function)(*args).jaxpr)


def _work(jaxpr) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "scan":
            total += params["length"] * _work(params["jaxpr"].jaxpr)
        elif name == "while":
            total += UNKNOWN_TRIPS * (_work(params["body_jaxpr"].jaxpr) + _work(params["cond_jaxpr"].jaxpr))
        elif name == "cond":
            # Under vmap every branch is taken.
            total += sum(_work(branch.jaxpr) for branch in params["branches"])
        elif inner := [value for value in params.values() if hasattr(value, "eqns") or hasattr(value, "jaxpr")]:
            total += sum(_work(getattr(value, "jaxpr", value)) for value in inner)
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = equation.invars[0].aval.shape
            total += _size(equation.outvars) * float(np.prod([shape[axis] for axis in contracted], dtype=float))
        elif name in ("cholesky", "triangular_solve", "lu", "eigh", "qr", "svd"):
            shape = equation.invars[0].aval.shape
            total += _size(equation.invars) * shape[-1] / 3
        elif name not in _FREE:
            operands = equation.invars if name in _REDUCTIONS else equation.outvars
            total += _size(operands) * _HEAVY.get(name, 1)
    return total


def _size(variables) -> float:
    return float(sum(np.prod(variable.aval.shape, dtype=float) for variable in variables))


def kernels_per_step(text: str, num_steps: int) -> float:
    """Kernels that a compiled loop starts per step, from its optimised HLO.

    Args:
        text: `compiled.as_text()` of a loop over `num_steps` steps.
        num_steps: Trips of the outer loop.
    """
    computations = _computations(text)
    entry = next((name for name, lines in computations.items() if lines and lines[0] == "ENTRY"), None)
    return 0.0 if entry is None else _kernels(computations, entry, 0) / num_steps


_NAME = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s*\(")
_OPCODE = re.compile(r"\s([a-z][a-z0-9\-]*)\(")
_NO_KERNEL = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "iota", "after-all", "partition-id"}


def _computations(text: str) -> dict[str, list[str]]:
    """Instructions by computation; the entry's list begins with `ENTRY`."""
    found: dict[str, list[str]] = {}
    lines = None
    for line in text.splitlines():
        if line[:1] not in ("", " ", "}") and line.rstrip().endswith("{") and (head := _NAME.match(line)):
            lines = found.setdefault(head.group(2), ["ENTRY"] if head.group(1) else [])
        elif lines is not None and " = " in line:
            lines.append(line)
    return found


def _kernels(computations, name, depth) -> float:
    total = 0.0
    for line in computations.get(name, ()):
        body = line.split(" = ", 1)[-1]
        opcode = _OPCODE.search(" " + re.sub(r"/\*.*?\*/", "", body))
        if opcode is None or opcode.group(1) in _NO_KERNEL or depth > 50:
            continue
        if opcode.group(1) == "while":
            trips = re.search(r'known_trip_count"?:\{"n":"(\d+)"', line)
            inner = sum(_kernels(computations, part, depth + 1) for part in re.findall(r"(?:body|condition)=%?([\w.\-]+)", line))
            total += (int(trips.group(1)) if trips else UNKNOWN_TRIPS) * inner
        elif opcode.group(1) == "conditional":
            total += sum(_kernels(computations, part, depth + 1) for part in re.findall(
                r"%([\w.\-]+)", line.split("branch_computations", 1)[-1]) if part in computations)
        elif opcode.group(1) == "call" and "xla_cpu_small_call" not in line:
            total += sum(_kernels(computations, part, depth + 1) for part in re.findall(r"to_apply=%?([\w.\-]+)", line))
        else:
            total += 1
    return total
