"""Functions that capture arrays, made explicit.

XLA folds captured constants for tens of seconds, recompiles for every new data set, and no derivative reaches what a
`custom_jvp` captured. `explicit` traces a function once and returns it with the captured arrays, concrete or traced, as
part of its first argument. `jax.closure_convert` does this for tracers only, and arrays captured by a `jit` *inside* the
function stay hidden from it; here those inner calls are inlined first.

Results are cached by function and shapes, so the same function gives the same object and nothing is compiled twice. Unlike
`jax.jit`, a function that now reads other data is traced again: a global that was rebound, an array that was changed in place
(`captured_data` says what is looked at). New arrays of the same shapes go into the program that there is.
"""

import collections
import functools
import math
import re
import threading
import weakref
from collections.abc import Iterator
from typing import Any, Callable, NamedTuple

import jax
import jax.core
import jax.extend.core
import jax.numpy as jnp
import numpy as np

from partime_mcmc.captured_data import data_read_by, has_version, is_library
from partime_mcmc.types import PyTree, Tracer, settings

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")
# Their texts do not say what they call.
_CALLBACKS = {
    "pure_callback",
    "io_callback",
    "debug_callback",
    "ordered_effect",
    "call_hi_primitive",
}
# Where JAX wraps functions of the user's (`custom_gradient`, `custom_root`), whose own files are then not known.
_WRAPPERS = ("custom_derivatives.py", "solves.py")


class HashableFunction:
    """A function object that equals others of its class with equal parts, so that equal functions are compiled once."""

    def __init__(self, *parts: Any):
        self.parts = parts
        # Programs are called by it in profiles and in JAX's logs.
        self.__name__ = type(self).__name__.strip("_")

    def __eq__(self, other: Any) -> bool:
        return type(self) is type(other) and self.parts == other.parts

    def __hash__(self) -> int:
        return hash((type(self), self.parts))


class WithoutParams(HashableFunction):
    """A function without parameters as one with parameters, which come first and are ignored."""

    def __call__(self, params: Any, *args: Any) -> Any:
        return self.parts[0](*args)


class Explicit:
    """A traced function with its captured arrays as the first part of its first argument."""

    def __init__(self, jaxpr, structure, name):
        self.jaxpr, self.structure, self.__name__ = jaxpr, structure, name

    def __call__(self, captured_and_params, *rest):
        captured, params = captured_and_params
        leaves = jax.tree.leaves((params, *rest))
        return jax.tree.unflatten(
            self.structure, jax.core.eval_jaxpr(self.jaxpr, captured, *leaves)
        )

    def is_like(self, other: "Explicit") -> bool:
        """Whether another one computes the same of other captured arrays."""
        return (
            self.structure == other.structure
            and [one.aval for one in self.jaxpr.constvars]
            == [one.aval for one in other.jaxpr.constvars]
            and self.text is not None
            and self.text == other.text
        )

    @functools.cached_property
    def text(self) -> str | None:
        """All that it computes, but for the types of captured arrays; None where a text does not say that."""
        if (
            inner_arrays(self.jaxpr)
            or primitives_of(self.jaxpr) & _CALLBACKS
            or not all(map(is_library, self._places_of_rules))
        ):
            return None
        return _ADDRESS.sub("", str(self.jaxpr))

    @property
    def has_known_rules(self) -> bool:
        """Whether derivatives of their own come from packages whose versions tell them."""
        return all(map(has_version, self._places_of_rules))

    @functools.cached_property
    def _places_of_rules(self) -> frozenset[str]:
        return frozenset(_places_of_rules(self.jaxpr))

    @property
    def result(self) -> PyTree:
        """Structure, shapes and types of what it returns."""
        types = [
            jax.ShapeDtypeStruct(one.aval.shape, one.aval.dtype, weak_type=one.aval.weak_type)
            for one in self.jaxpr.outvars
        ]
        return jax.tree.unflatten(self.structure, types)


class Reading(NamedTuple):
    """What a function read when it was traced.

    Attributes:
        read: By variable, as `data_read_by` has it.
        volatile: Variables that tracing itself changes, such as a list in which calls are counted.
    """

    read: dict[tuple, Any]
    volatile: frozenset

    @classmethod
    def around(cls, before: dict[tuple, Any], after: dict[tuple, Any]) -> "Reading":
        """From what the function read before and after it was traced."""
        names = after.keys() | before.keys()
        return cls(after, frozenset(name for name in names if after.get(name) != before.get(name)))

    def holds(self, read: dict[tuple, Any]) -> bool:
        """Whether the function still reads the same."""
        kept = read.keys() | self.read.keys()
        return all(
            self.read.get(name) == read.get(name) for name in kept if name not in self.volatile
        )


class _Traced(NamedTuple):
    """A cached trace.

    Attributes:
        function: Without captured arrays.
        captured: The captured arrays.
        reading: What the original function read.
    """

    function: Explicit
    captured: list
    reading: Reading


class OnceCache:
    """Values by key, each made once, also where several threads want it at the same time.

    Args:
        size: How many are kept; those that were not wanted for longest are forgotten.
    """

    def __init__(self, size: int):
        self._size, self._lock = size, threading.Lock()
        self._values: collections.OrderedDict = collections.OrderedDict()
        self._being_made: dict[Any, threading.RLock] = {}

    def kept(self) -> list:
        """Keys whose values are kept, the one wanted last at the end."""
        return list(self._values)

    def get(
        self,
        key: Any,
        make: Callable[[Any], Any],
        keep: Callable[[Any], bool] = lambda value: True,
        holds: Callable[[Any], bool] = lambda value: True,
    ) -> Any:
        """The value of a key.

        Args:
            key: Hashable.
            make: From the value that no longer holds, None where there is none, to a new one.
            keep: Whether a value may be handed out again.
            holds: Whether a value that was kept still holds.
        """
        found = self._kept(key)
        if found is not None and holds(found):
            return found
        with self._lock:
            making = self._being_made.setdefault(key, threading.RLock())
        with making:
            found = self._kept(key)
            if found is not None and holds(found):
                return found
            try:
                value = make(found)
                if keep(value):
                    with self._lock:
                        self._values[key] = value
                        while len(self._values) > self._size:
                            self._values.popitem(last=False)
                return value
            finally:
                with self._lock:
                    self._being_made.pop(key, None)

    def _kept(self, key: Any) -> Any:
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
            return self._values.get(key)


_TRACES = OnceCache(256)
# By origin and shapes, the first trace of functions that share one.
_SHARED = OnceCache(256)


def origin_of(function: Callable) -> Any:
    """What a function was made from, besides arrays; None if it does not say.

    Functions of one origin, their attribute `origin`, differ in the arrays they capture alone: the densities of one model and of
    several data sets. Where their traces are alike they are one function, so that nothing is compiled again for other data.
    """
    own = getattr(function, "origin", None)
    if own is not None or not isinstance(function, HashableFunction):
        return own
    parts = [(origin_of(part), part) for part in function.parts]
    if all(origin is None for origin, _ in parts):
        return None
    return type(function), *(part if origin is None else origin for origin, part in parts)


def explicit(function: Callable, params: PyTree, *rest: PyTree) -> tuple[Explicit, tuple]:
    """A function without captured arrays, and the arrays it captured.

    Args:
        function: `(params, *rest) -> anything`, pure.
        params: Example of the first argument.
        *rest: Examples of the others; only structure, shapes and types matter.

    Returns:
        `(explicit_function, first_argument)`: `explicit_function(first_argument, *rest)` is `function(params, *rest)`,
        and `first_argument` holds the captured arrays and `params`.
    """
    if isinstance(function, Explicit):
        return function, params
    leaves, tree = jax.tree.flatten((params, *rest))
    shapes = tuple(
        (np.shape(leaf), jnp.result_type(leaf) if not hasattr(leaf, "dtype") else leaf.dtype)
        for leaf in leaves
    )
    # A trace depends on these settings, and inside `jax.shard_map` on the mesh.
    entry = (
        function,
        tree,
        shapes,
        settings(),
        jax.sharding.get_abstract_mesh(),
    )
    read, jitted, _ = data_read_by(function)

    def trace(old: _Traced | None) -> _Traced:
        for one in jitted:
            _forget_old_data(one)
        abstract = jax.tree.unflatten(tree, [jax.ShapeDtypeStruct(*shape) for shape in shapes])
        step, captured = _trace(function, abstract)
        reading = Reading.around(read, data_read_by(function).tokens)
        if old is not None:
            reading = reading._replace(volatile=reading.volatile | old.reading.volatile)
            if old.function.is_like(step):
                step = old.function
        origin = origin_of(function)
        if _has_hash(origin):
            first = _SHARED.get((origin, *entry[1:]), lambda _: step)
            step = first if first.is_like(step) else step
        return _Traced(step, captured, reading)

    found = _TRACES.get(
        entry,
        trace,
        # Traced inside another trace it may hold that one's values.
        keep=lambda new: not any(isinstance(one, Tracer) for one in new.captured),
        holds=lambda old: old.reading.holds(read),
    )
    return found.function, (found.captured, params)


# What functions of the user's that are compiled by `jax.jit` read when they were last traced inside another function.
_READ_BY_JITTED: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def _forget_old_data(jitted: Any) -> None:
    """Have a function that is compiled by `jax.jit` traced again, unless it reads what it read when this was last asked: JAX keeps its
    traces whatever happens to the data that it reads."""
    read = data_read_by(jitted).tokens
    if _READ_BY_JITTED.get(jitted) != read:
        jitted.clear_cache()
        _READ_BY_JITTED[jitted] = read


def _trace(function, abstract) -> tuple[Explicit, list]:
    """A function without captured arrays, and these."""
    # JAX keeps traces by function, too: a new one for each trace finds none.
    closed, result = jax.make_jaxpr(lambda *args: function(*args), return_shape=True)(*abstract)
    if _hides_arrays(closed.jaxpr):
        inlined = lambda *args: evaluate(closed.jaxpr, closed.consts, *jax.tree.leaves(args))
        closed = jax.make_jaxpr(inlined)(*abstract)
    jaxpr, consts = _needed(closed.jaxpr, closed.consts)
    step = Explicit(jaxpr, jax.tree.structure(result), _name_of(function))
    return step, [_as_array(one) for one in consts]


def _places_of_rules(jaxpr: Any) -> Iterator[str]:
    """Files of what has a derivative of its own and of the rules for it, which may capture arrays that no text shows; empty where
    that is not known."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        # The parts of a `custom_linear_solve` are in the text.
        if name.startswith("custom_") and name != "custom_linear_solve":
            functions = map(equation.params.get, ("call_jaxpr", "fun_jaxpr", "call"))
            primal = _place_of(next(filter(None, functions), None))
            yield primal
            for part in ("jvp_jaxpr_fun", "fwd_jaxpr_thunk", "bwd"):
                if part in equation.params:
                    rule = _place_of(equation.params[part])
                    # What `defjvps` makes of one rule per argument, which are written where the function is.
                    yield rule or (primal if part == "jvp_jaxpr_fun" else "")
        for inner in _inner_jaxprs(equation):
            yield from _places_of_rules(inner)


def _place_of(function: Any) -> str:
    """The file in which a function of an operation was written; empty where that is not known."""
    written = getattr(getattr(function, "jaxpr", function), "debug_info", None)
    _, _, place = getattr(written, "func_src_info", "").rpartition(" at ")
    file = place.rpartition(":")[0]
    return "" if file.endswith(_WRAPPERS) else file


def _has_hash(origin: Any) -> bool:
    try:
        hash(origin)
    except TypeError:
        return False
    return origin is not None


def _name_of(function: Callable) -> str:
    return getattr(function, "__name__", type(function).__name__)


def _needed(jaxpr, consts) -> tuple[Any, list]:
    """A jaxpr without what its results do not depend on, such as a model's predictions in its density, and its constants.

    The compiler would leave it out as well, but only after every derivative of it was traced.
    """
    wanted = {atom for atom in jaxpr.outvars if not isinstance(atom, jax.extend.core.Literal)}
    equations = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or wanted.intersection(equation.outvars):
            equations.append(equation)
            wanted.update(
                atom for atom in equation.invars if not isinstance(atom, jax.extend.core.Literal)
            )
    kept = [(name, const) for name, const in zip(jaxpr.constvars, consts) if name in wanted]
    names = [name for name, _ in kept]
    return jaxpr.replace(eqns=equations[::-1], constvars=names), [const for _, const in kept]


def inner_arrays(jaxpr: Any) -> list:
    """Arrays that are written into a jaxpr somewhere inside: captured by a `jit` within a loop, a branch, a checkpoint.

    Args:
        jaxpr: What to look through, jaxprs inside jaxprs included.
    """
    found = []
    for equation in jaxpr.eqns:
        found += [
            _as_array(atom.val)
            for atom in equation.invars
            if isinstance(atom, jax.extend.core.Literal) and np.shape(atom.val)
        ]
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(inner, (jax.extend.core.ClosedJaxpr, jax.extend.core.Jaxpr)):
                    found += [*map(_as_array, getattr(inner, "consts", ())), *inner_arrays(inner)]
    return found


def primitives_of(jaxpr: Any) -> set[str]:
    """Names of the operations in a jaxpr, those inside loops, branches and nested functions included."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    for equation in jaxpr.eqns:
        names = names.union(*map(primitives_of, _inner_jaxprs(equation)))
    return names


def num_computed(jaxpr: Any) -> float:
    """How many numbers the operations of a jaxpr compute in all; infinite with a loop whose length is not known.

    Args:
        jaxpr: What to look through, jaxprs inside jaxprs included; of the branches of a condition the largest.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        inner = [num_computed(one) for one in _inner_jaxprs(equation)]
        if equation.primitive.name == "while":
            return math.inf
        if inner:
            total += equation.params.get("length", 1) * max(inner)
        else:
            total += sum(one.aval.size for one in equation.outvars)
    return total


def _inner_jaxprs(equation: Any) -> list:
    """The jaxprs that an operation holds: bodies of loops, branches, nested functions."""
    leaves = jax.tree.leaves(tuple(equation.params.values()), is_leaf=is_jaxpr)
    return [getattr(one, "jaxpr", one) for one in leaves if is_jaxpr(one)]


def is_jaxpr(value: Any) -> bool:
    """Whether a parameter of an operation is a function of its own, closed or not."""
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def _as_array(const):
    # A copy: an array that shares memory with one of NumPy's would change with it, in the middle of a run. Made by NumPy, since
    # JAX would compile a program for every shape.
    return const if isinstance(const, (jax.Array, Tracer)) else jax.device_put(np.array(const))


def _inner_jit(equation):
    """The jaxpr of a nested `jit`, or None."""
    return equation.params.get("jaxpr") if equation.primitive.name in ("jit", "pjit") else None


def _hides_arrays(jaxpr) -> bool:
    """Whether a `jit` inside captured arrays that are not among the outer captured arrays."""
    inner = [found for found in map(_inner_jit, jaxpr.eqns) if found is not None]
    return any(map(_captures, inner))


def _captures(inner) -> bool:
    return bool(inner.consts) or _hides_arrays(inner.jaxpr)


def evaluate(jaxpr, consts, *args, opens: Callable = _captures) -> list:
    """Evaluate a jaxpr with some of the nested `jit`s inlined, so that a new trace sees what is inside.

    Args:
        jaxpr: What to evaluate.
        consts: Values of its constants.
        *args: Values of its arguments.
        opens: Which nested `jit`s to inline, by their closed jaxprs; by default those that capture arrays.
    """
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *args)))

    def read(atom):
        return atom.val if isinstance(atom, jax.extend.core.Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        inner = _inner_jit(equation)
        if inner is not None and opens(inner):
            outputs = evaluate(
                inner.jaxpr, [_as_array(const) for const in inner.consts], *inputs, opens=opens
            )
        else:
            outputs = _evaluate_one(jaxpr, equation, inputs)
        values.update(zip(equation.outvars, outputs))
    return [read(atom) for atom in jaxpr.outvars]


def _evaluate_one(jaxpr, equation, inputs) -> list:
    """Evaluate one equation: a jaxpr of its own, because the way to bind a primitive differs between JAX versions."""
    inputs_of = {
        atom: value
        for atom, value in zip(equation.invars, inputs)
        if not isinstance(atom, jax.extend.core.Literal)
    }
    dropped = [isinstance(atom, jax.extend.core.DropVar) for atom in equation.outvars]
    kept = [atom for atom, drop in zip(equation.outvars, dropped) if not drop]
    single = jaxpr.replace(constvars=[], invars=list(inputs_of), outvars=kept, eqns=[equation])
    results = iter(jax.core.eval_jaxpr(single, [], *inputs_of.values()))
    return [None if drop else next(results) for drop in dropped]
