"""Cells of Flax and Equinox as `(cell, params)` for `unroll`, and a layer in place of `flax.nnx.RNN`.

    unroll(*from_flax_nnx(cell), carry, inputs)        carry as the cell has it: an LSTM's is (c, h)
    unroll(*from_equinox(cell), carry, inputs)         carry as the cell has it: an LSTM's is (h, c)
    RNN(cell, return_carry=True)(inputs)               where `flax.nnx.RNN(cell, return_carry=True)` stood

An adapter holds no arrays of the cell: they are `params`, and gradients with respect to them have their structure. Equal
cells give equal adapters, so that nothing is compiled twice. Flax and Equinox are imported when they are asked for.
"""

import functools
from typing import Any, Callable

import jax
import jax.numpy as jnp

from partime_mcmc.rnn.unroll import unroll
from partime_mcmc.solvers import Solver
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import PyTree


def from_flax_nnx(cell: Any) -> tuple[Callable, PyTree]:
    """A `flax.nnx` cell: `(cell, params)` with the cell's `nnx.Param` state as parameters.

    Put trained parameters back with `nnx.update(cell, params)`. What a cell changes in itself during a step (counters of
    random streams, batch statistics) is not kept.
    """
    from flax import nnx

    graph, params, rest = nnx.split(cell, nnx.Param, ...)
    return _NNXCell(graph, rest), params


class _NNXCell(HashableFunction):
    def __init__(self, graph, rest):
        # Arrays that are no parameters are kept, and compared by identity.
        super().__init__(graph, tuple(map(id, jax.tree.leaves(rest))))
        self.rest = rest

    def __call__(self, params, carry, x):
        from flax import nnx

        return nnx.merge(self.parts[0], params, self.rest)(carry, x)


def from_flax_linen(cell: Any, variables: PyTree) -> tuple[Callable, PyTree]:
    """A `flax.linen` cell and its variables, as `cell.init(key, carry, x)` returned them."""
    return _LinenCell(cell), variables


class _LinenCell(HashableFunction):
    def __call__(self, params, carry, x):
        return self.parts[0].apply(params, carry, x)


def from_equinox(cell: Any) -> tuple[Callable, PyTree]:
    """An `equinox` cell, called `cell(x, carry) -> carry`; the output is the carry, or `h` of an LSTM's `(h, c)`.

    All its arrays are parameters. Where some are integers or Booleans, differentiate with `equinox.filter_grad`, or with
    `jax.grad(..., allow_int=True)`, as for the cell itself.
    """
    import equinox

    params, static = equinox.partition(cell, equinox.is_array)
    return _EquinoxCell(static), params


class _EquinoxCell(HashableFunction):
    def __call__(self, params, carry, x):
        import equinox

        new = equinox.combine(params, self.parts[0])(x, carry)
        return new, new[0] if isinstance(new, tuple) else new


def RNN(cell: Any, *, solver: Solver | None = None, **keywords) -> Any:
    """`flax.nnx.RNN(cell, **keywords)`, evaluated by `unroll`.

    Args:
        cell: A `flax.nnx` cell.
        solver: As in `unroll`.
        **keywords: As `flax.nnx.RNN` takes them: `time_major`, `return_carry`, `reverse`, `keep_order`. Its `unroll`,
            `state_axes` and `broadcast_rngs` speak of `lax.scan` and change nothing here, but for cells that change
            themselves in a step (dropout, statistics): these are run by `flax.nnx.RNN` itself, and so are empty batches.

    Returns:
        An `nnx.Module`, an instance of a subclass of `nnx.RNN` with the same arguments when called.
    """
    layer = _rnn_class()(cell, **keywords)
    layer.solver = solver
    return layer


@functools.cache
def _rnn_class():
    from flax import nnx

    class ParallelRNN(nnx.RNN):
        """`flax.nnx.RNN` by `unroll`."""

        solver: Solver | None

        def __call__(
            self,
            inputs,
            *,
            initial_carry=None,
            seq_lengths=None,
            return_carry=None,
            time_major=None,
            reverse=None,
            keep_order=None,
            rngs=None,
        ):
            given = {
                "time_major": time_major,
                "reverse": reverse,
                "keep_order": keep_order,
                "return_carry": return_carry,
            }
            by_flax = functools.partial(
                super().__call__,
                inputs,
                initial_carry=initial_carry,
                seq_lengths=seq_lengths,
                rngs=rngs,
                **given,
            )
            if not inputs.size:
                return by_flax()
            time_major, reverse, keep_order, return_carry = (
                getattr(self, name) if value is None else value for name, value in given.items()
            )
            if time_major:
                inputs = jnp.moveaxis(inputs, 0, -1 - self.cell.num_feature_axes)
            split = inputs.ndim - self.cell.num_feature_axes
            batch, features = inputs.shape[: split - 1], inputs.shape[split:]
            first = inputs[(0,) * split]
            if _changes_itself(self.cell, first):
                return by_flax()
            if initial_carry is None:
                rngs = (
                    self.rngs
                    if rngs is None
                    else rngs.carry.fork()
                    if isinstance(rngs, nnx.Rngs)
                    else rngs
                )
                initial_carry = self.cell.initialize_carry((*batch, *features), rngs)
            if reverse:
                inputs = _flipped(inputs, seq_lengths, len(batch))
            cell, params = from_flax_nnx(self.cell)
            final, (carries, ys) = unroll(
                _EveryCarry(cell),
                params,
                initial_carry,
                inputs,
                solver=self.solver,
                batch_axes=len(batch),
            )
            if seq_lengths is not None and return_carry:
                final = jax.tree.map(
                    lambda leaf: _at(leaf, jnp.asarray(seq_lengths) - 1, len(batch)), carries
                )
            if reverse and keep_order:
                ys = jax.tree.map(lambda leaf: _flipped(leaf, seq_lengths, len(batch)), ys)
            if time_major:
                ys = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, len(batch), 0), ys)
            return (final, ys) if return_carry else ys

    return ParallelRNN


def _changes_itself(cell, x) -> bool:
    """Whether a step changes more of the cell than its carry: counters of random streams, as of dropout, or statistics.

    Args:
        cell: A `flax.nnx` cell.
        x: One input.
    """
    from flax import nnx

    graph, params, rest = nnx.split(cell, nnx.Param, ...)
    if not jax.tree.leaves(rest):
        return False
    changed = []

    def step(params, rest, x):
        again = nnx.merge(graph, params, rest)
        before = [variable.get_value() for variable in _variables(again)]
        again(again.initialize_carry(x.shape, nnx.Rngs(0)), x)
        after = [variable.get_value() for variable in _variables(again)]
        changed.extend(a is not b for a, b in zip(before, after))

    def _variables(module):
        return jax.tree.leaves(
            nnx.state(module, nnx.Not(nnx.Param)), is_leaf=lambda one: isinstance(one, nnx.Variable)
        )

    jax.eval_shape(step, params, rest, x)
    return any(changed)


class _EveryCarry(HashableFunction):
    """A cell, the part, that also returns its carry; it costs nothing, because the path of the carry is known."""

    def __call__(self, params, carry, x):
        carry, y = self.parts[0](params, carry, x)
        return carry, (carry, y)


def _at(leaf, index, num_batch_axes):
    """Each sequence's entry at its own step."""
    index = index.reshape(*index.shape, *(1,) * (leaf.ndim - num_batch_axes))
    return jnp.take_along_axis(leaf, index, num_batch_axes).squeeze(num_batch_axes)


def _flipped(leaf, lengths, num_batch_axes):
    """Time turned round, within each sequence's length; padding stays behind, as in Flax."""
    num_steps = leaf.shape[num_batch_axes]
    steps = jnp.arange(num_steps)
    if lengths is None:
        return jnp.flip(leaf, num_batch_axes)
    index = (jnp.asarray(lengths)[..., None] - 1 - steps) % num_steps
    return jnp.take_along_axis(
        leaf, index.reshape(*index.shape, *(1,) * (leaf.ndim - num_batch_axes - 1)), num_batch_axes
    )
