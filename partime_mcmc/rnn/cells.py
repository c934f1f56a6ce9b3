"""Recurrent cells as pure functions, with the part of their Jacobian that a quasi-Newton solver wants in closed form.

    elman   h' = tanh(p)                          p = x W + b + h U
    gru     h' = n + z (h − n)                    r, z = σ(p_r), σ(p_z),   n = tanh(x W_n + b_n + r (h U_n + c))
    lstm    c' = f c + i g,  h' = o tanh(c')      i, f, o = σ(p_i), σ(p_f), σ(p_o),   g = tanh(p_g)

with row vectors `x` of shape `(I,)` and `h` of shape `(D,)`. A cell is `(params, carry, x) -> (carry, y)`; the GRU's update
gate keeps the old state, as in PyTorch, Flax and Equinox. Unit j reaches itself through U_jj only, so the diagonal of ∂h'/∂h
costs D numbers of each U, where D Jacobian products would cost a step each:

    elman   (1 − h'²) U_jj
    gru     z + (h − n) z(1−z) U_z,jj + (1 − z)(1 − n²)(r U_n,jj + (h U_n + c) r(1−r) U_r,jj)

An LSTM's unit has two numbers, (c_j, h_j), and the diagonal of its Jacobian forgets that c' moves h': what pays is the 2×2
block per unit (`ParaRNN`, arXiv:2510.21450, trains networks whose Jacobians have no more than that).
"""

from __future__ import annotations

from typing import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from partime_mcmc.engine import Dynamics
from partime_mcmc.linearize.modify import scaled
from partime_mcmc.rnn.unroll import Packed
from partime_mcmc.scan.affine import AffineMap, Diagonal, Pairs
from partime_mcmc.types import Array, Key, PyTree, pytree


@pytree(static=("linear_part", "numbers_per_state"))
class ClosedForm:
    """The linear part that a cell states itself, for `unroll` only: no Jacobian product is taken.

    Attributes:
        linear_part: `(params, carry, x) -> AffineMap` with shift 0, such as `gru_diagonal` or `lstm_pairs`.
        carry: An example carry, for its structure.
        numbers_per_state: Numbers that the linear part keeps per number of the state: 1 for a diagonal, 2 for `Pairs`.
    """

    linear_part: Callable
    carry: PyTree
    numbers_per_state: int = 1

    def __call__(
        self, dynamics: Dynamics, previous: Array, drives: PyTree, key: Key
    ) -> tuple[Array, AffineMap]:
        values = jax.vmap(dynamics)(previous, drives)
        _, (_, params) = (
            dynamics.params
        )  # what the step captures, what the cell captures, the cell's own
        _, unravel = ravel_pytree(self.carry)
        x, counts = drives if isinstance(drives, Packed) else (drives, None)
        maps = jax.vmap(lambda state, x: self.linear_part(params, unravel(state), x))(previous, x)
        if counts is not None:
            maps = jax.vmap(lambda step, counted: scaled(step, counted.astype(values.dtype)))(
                maps, counts
            )
        return values, maps.with_shift(jnp.zeros_like(values))

    def jvps(self, dimension: int) -> int:
        return 0

    def map_size(self, dimension: int) -> int:
        return self.numbers_per_state * dimension


def elman_params(key: Key, num_inputs: int, num_units: int, dtype=jnp.float32) -> dict[str, Array]:
    """Random weights of an Elman network: `input` `(I, D)`, `hidden` `(D, D)`, `bias` `(D,)`."""
    return _params(key, num_inputs, num_units, 1, dtype)


def gru_params(key: Key, num_inputs: int, num_units: int, dtype=jnp.float32) -> dict[str, Array]:
    """Random weights of a GRU: `input` `(I, 3 D)`, `hidden` `(D, 3 D)`, `bias` `(3 D,)` in the order r, z, n, and
    `candidate_bias` `(D,)`, the c above."""
    return _params(key, num_inputs, num_units, 3, dtype) | {
        "candidate_bias": jnp.zeros(num_units, dtype)
    }


def lstm_params(key: Key, num_inputs: int, num_units: int, dtype=jnp.float32) -> dict[str, Array]:
    """Random weights of an LSTM: `input` `(I, 4 D)`, `hidden` `(D, 4 D)`, `bias` `(4 D,)` in the order i, f, g, o."""
    return _params(key, num_inputs, num_units, 4, dtype)


def _params(key, num_inputs, num_units, num_gates, dtype):
    """Uniform on ±1/√D, as PyTorch has it."""
    shapes = {
        "input": (num_inputs, num_gates * num_units),
        "hidden": (num_units, num_gates * num_units),
        "bias": (num_gates * num_units,),
    }
    keys, bound = jax.random.split(key, 3), num_units**-0.5
    return {
        name: jax.random.uniform(one, shape, dtype, -bound, bound)
        for one, (name, shape) in zip(keys, shapes.items())
    }


def elman(params: PyTree, carry: Array, x: Array) -> tuple[Array, Array]:
    """One step of an Elman network: `carry` `(D,)`, `x` `(I,)`."""
    new = jnp.tanh(x @ params["input"] + params["bias"] + carry @ params["hidden"])
    return new, new


def elman_diagonal(params: PyTree, carry: Array, x: Array) -> Diagonal:
    """The diagonal of ∂h'/∂h, shift 0."""
    new = elman(params, carry, x)[0]
    return Diagonal((1 - new**2) * jnp.diagonal(params["hidden"]), jnp.zeros_like(new))


def gru(params: PyTree, carry: Array, x: Array) -> tuple[Array, Array]:
    """One step of a GRU: `carry` `(D,)`, `x` `(I,)`."""
    _, z, n, _ = _gru_gates(params, carry, x)
    # Not (1 − z) n + z h, which XLA compiles into loops without vectors: lanes of 8 units took three times as long on a CPU.
    new = n + z * (carry - n)
    return new, new


def gru_diagonal(params: PyTree, carry: Array, x: Array) -> Diagonal:
    """The diagonal of ∂h'/∂h, shift 0."""
    r, z, n, recalled = _gru_gates(params, carry, x)
    u_r, u_z, u_n = (jnp.diagonal(block) for block in jnp.split(params["hidden"], 3, axis=-1))
    of_n = (1 - n**2) * (r * u_n + recalled * r * (1 - r) * u_r)
    return Diagonal(z + (carry - n) * z * (1 - z) * u_z + (1 - z) * of_n, jnp.zeros_like(n))


def _gru_gates(params, carry, x):
    """r, z, n and h U_n + c."""
    x_r, x_z, x_n = jnp.split(x @ params["input"] + params["bias"], 3, axis=-1)
    h_r, h_z, h_n = jnp.split(carry @ params["hidden"], 3, axis=-1)
    recalled = h_n + params["candidate_bias"]
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    return r, z, jnp.tanh(x_n + r * recalled), recalled


def lstm(params: PyTree, carry: tuple[Array, Array], x: Array) -> tuple[tuple[Array, Array], Array]:
    """One step of an LSTM: `carry` is `(c, h)` as in Flax, `(D,)` each; `x` `(I,)`; the output is h."""
    c, _ = carry
    i, f, g, o = _lstm_gates(params, carry, x)
    c = f * c + i * g
    h = o * jnp.tanh(c)
    return (c, h), h


def lstm_pairs(params: PyTree, carry: tuple[Array, Array], x: Array) -> Pairs:
    """The 2×2 block of ∂(c', h')/∂(c, h) of every unit, shift 0."""
    c, h = carry
    i, f, g, o = _lstm_gates(params, carry, x)
    u_i, u_f, u_g, u_o = (jnp.diagonal(block) for block in jnp.split(params["hidden"], 4, axis=-1))
    squashed = jnp.tanh(f * c + i * g)
    through = o * (1 - squashed**2)
    c_by_h = c * f * (1 - f) * u_f + g * i * (1 - i) * u_i + i * (1 - g**2) * u_g
    h_by_h = o * (1 - o) * u_o * squashed + through * c_by_h
    return Pairs(
        jnp.stack([jnp.stack([f, c_by_h]), jnp.stack([through * f, h_by_h])]),
        jnp.zeros(2 * h.size, h.dtype),
    )


def _lstm_gates(params, carry, x):
    i, f, g, o = jnp.split(
        x @ params["input"] + params["bias"] + carry[1] @ params["hidden"], 4, axis=-1
    )
    return jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
