"""Hoisting: what a step computes from its drive alone is computed for all steps at once.

A step f(θ, x, u) often begins with work that does not need x: a kernel splits its key and draws its noise, a recurrent cell
multiplies its input with a matrix. Inside a loop over time that work is done step by step, and again whenever a segment is
rolled again. Here the traced step is cut in two,

    a = ahead(θ, u)      every equation that depends on the drive and not on the state: batched over all of time
    x' = rest(θ, x, a)   every equation that depends on the state

with the same equations on the same numbers, so random numbers are the step's own. (This is partial evaluation by binding
times; Jones, Gomard & Sestoft 1993.) Not hoisted is work inside a loop or a branch that needs the state (the directions of a
NUTS tree), nor anything from a step that would have to keep much more than a state: a minibatch is better gathered when it
is needed.
"""

from typing import Callable

import jax
import jax.core
import jax.extend.core
import numpy as np

from partime_mcmc.tracing import evaluate
from partime_mcmc.types import PyTree, is_key

# Numbers of 4 bytes that may be kept per step: so many times the memory of a step, and so many for any step.
_STATES, _IN_ANY_CASE = 4, 16
# Without any of these operations hoisting gains nothing.
_COSTLY = {
    "random_bits",
    "random_split",
    "random_fold_in",
    "threefry2x32",
    "dot_general",
    "erf_inv",
    "exp",
    "log",
    "scan",
    "while",
    "cholesky",
    "triangular_solve",
}


def hoist_drive_only(
    function: Callable, params: PyTree, memory: PyTree, drive: PyTree
) -> tuple[Callable, Callable]:
    """Cut a step into what needs its drive alone and what needs its memory too.

    Args:
        function: `(params, memory, drive) -> memory`, pure.
        params: Its parameters.
        memory: An example; only shapes and types matter.
        drive: An example of one step's drive.

    Returns:
        `ahead(params, drive) -> a`, to be batched over steps, and `rest(params, memory, a) -> memory`. Where cutting
        would gain nothing `a` is the drive itself.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(params, memory, drive)
    flat = lambda *args: evaluate(
        closed.jaxpr, closed.consts, *jax.tree.leaves(args), opens=lambda inner: True
    )
    closed = jax.make_jaxpr(flat)(params, memory, drive)
    sizes = [len(jax.tree.leaves(part)) for part in (params, memory, drive)]
    inputs = [closed.jaxpr.invars[sum(sizes[:k]) : sum(sizes[: k + 1])] for k in range(3)]
    early, late, kept = _cut(closed.jaxpr, *inputs)
    allowed = max(_STATES * _bytes(inputs[1]), 4 * _IN_ANY_CASE)
    if (
        closed.consts
        or not any(equation.primitive.name in _COSTLY for equation in early)
        or _bytes(kept) > allowed + _bytes(inputs[2])
    ):
        return (lambda params, drive: drive), function
    first = closed.jaxpr.replace(invars=[*inputs[0], *inputs[2]], outvars=kept, eqns=early)
    second = closed.jaxpr.replace(invars=[*inputs[0], *inputs[1], *kept], eqns=late)
    structure = jax.tree.structure(result)

    def ahead(params, drive):
        return jax.core.eval_jaxpr(first, [], *jax.tree.leaves((params, drive)))

    def rest(params, memory, values):
        return jax.tree.unflatten(
            structure, jax.core.eval_jaxpr(second, [], *jax.tree.leaves((params, memory)), *values)
        )

    return ahead, rest


def _cut(jaxpr, params, memory, drive):
    """Early and late equations, and the variables that pass from the first to the second."""
    needs_memory, needs_drive = set(memory), set(drive)
    early, late = [], []
    for equation in jaxpr.eqns:
        inputs = {atom for atom in equation.invars if not isinstance(atom, jax.extend.core.Literal)}
        if inputs & needs_memory or equation.effects:
            needs_memory.update(equation.outvars)
            late.append(equation)
        elif inputs & needs_drive:
            needs_drive.update(equation.outvars)
            early.append(equation)
        else:
            # Parameters alone: cheap where it is needed, and the compiler moves it out of loops.
            early.append(equation)
            late.append(equation)
    wanted = [atom for equation in late for atom in equation.invars] + list(jaxpr.outvars)
    used = (
        atom
        for atom in wanted
        if not isinstance(atom, jax.extend.core.Literal) and atom in needs_drive
    )
    return early, late, list(dict.fromkeys(used))


def _bytes(variables) -> int:
    def one(aval):
        # Typed keys have no itemsize of their own.
        return aval.size * (8 if is_key(aval) else np.dtype(aval.dtype).itemsize)

    return sum(one(variable.aval) for variable in variables)
