"""From NumPyro's arguments and states to ours, and back: keys and starts, checked by name before anything is compiled,
tuned kernels, `HMCState`s, and collected fields.

Both ways to run a kernel of ours go through here: `ParallelMCMC`, and NumPyro's own `MCMC` (`kernels`). Of its random numbers
chain c has `rng_key` c for its steps; warm-up and starts have streams of their own, folded into the first chain's key.
Collected fields are those of `HMCState`, for every kept draw; of draws in a store those that it has are read when they are
asked for.
"""

import dataclasses
import functools
import operator
import warnings
from typing import Any, Callable, Mapping, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree
from numpyro.infer.hmc import HMCState

from partime_mcmc.compile_cache import Timings, compiler_options, run_program
from partime_mcmc.diagnostics.arviz import by_own_names
from partime_mcmc.diagnostics.checks import check_precision, check_starts
from partime_mcmc.host_keys import first_key, fold_in, split
from partime_mcmc.kernels import Whitening
from partime_mcmc.kernels.coordinates import learned_maps, weights_of
from partime_mcmc.kernels.kernel_program import (
    KernelProgram,
    ParametrisedKernel,
    density_of,
    parametrised_kernel,
    program_and_params,
)
from partime_mcmc.kernels.metric_root import is_diagonal, metric_of
from partime_mcmc.numpyro.metric_blocks import (
    each_block,
    mass_sqrt,
    mass_sqrt_inv,
    root_by_block,
    whole_root,
)
from partime_mcmc.sampling.arguments import SampleArguments, key_words
from partime_mcmc.sampling.chunk import ChainState
from partime_mcmc.sampling.draws import Draws
from partime_mcmc.sampling.plan import Plan
from partime_mcmc.sampling.target import Target
from partime_mcmc.storage.saved_run import digest_arrays
from partime_mcmc.storage.stored_draws import StoredDraws
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import Key, PyTree, is_key
from partime_mcmc.validation import check_dtypes, check_key
from partime_mcmc.warmup.hmc_batch import SeedTree
from partime_mcmc.warmup.tuning import any_settings, path_rule_of, target_of

# One of `numpyro.kernels`, which import this module.
ParallelKernel = Any


_WARMUP_STREAM, _START_STREAM = 2**31 - 1, 2**31 - 2  # steps use the numbers from 0 on
_UNTUNED_STEP_SIZE = 0.1


class AdaptState(NamedTuple):
    """What warm-up chose, the same for every chain. NumPyro's three matrices are worked out when they are asked for.

    Attributes:
        step_size: Of the builder's main step.
        center: Of the whitened coordinates, `(D,)`.
        scale: The metric's root by block of sites (`metric_blocks`).
        weights: Of each learned map of coordinates; empty where there is none.
        settings: All settings by the builder's argument names.
        discrete: Counters that the kernel carries, by name.
    """

    step_size: Any
    center: Any
    scale: Any
    weights: tuple
    settings: dict
    discrete: dict

    @property
    def inverse_mass_matrix(self) -> Any:
        """The metric, `(d, d)` or `(d,)` by tuple of site names, as NumPyro has it."""
        return each_block(metric_of, self.scale, np.ndim(self.step_size))

    @property
    def mass_matrix_sqrt(self) -> Any:
        """The lower triangular root of its inverse, likewise."""
        return each_block(mass_sqrt, self.scale, np.ndim(self.step_size))

    @property
    def mass_matrix_sqrt_inv(self) -> Any:
        """The inverse of that root, likewise."""
        return each_block(mass_sqrt_inv, self.scale, np.ndim(self.step_size))


def check_keys(rng_key: Any, num_chains: int) -> Any:
    """One typed key, or a batch of keys as it came.

    Args:
        rng_key: One key, or one per chain, typed `()` and `(C,)`, or legacy `(2,)` and `(C, 2)`.
        num_chains: C.

    Raises:
        TypeError: For anything that is no key.
        ValueError: For another number of keys.
    """
    is_array = hasattr(rng_key, "dtype") and hasattr(rng_key, "ndim")
    # A legacy key is two numbers: shape (2,) is one of these, or two typed keys.
    own_axes = 0 if is_array and is_key(rng_key) else 1
    if num_chains == 1 or not is_array or rng_key.ndim <= own_axes:
        return check_key(rng_key, "rng_key")
    if rng_key.ndim > own_axes + 1 or rng_key.shape[0] != num_chains:
        raise ValueError(
            f"rng_key: got {' x '.join(map(str, rng_key.shape[: rng_key.ndim - own_axes]))} keys for {num_chains} chains; "
            "wanted one key, or one per chain"
        )
    check_key(rng_key[0], "rng_key")
    return rng_key


def check_leading(init_params: PyTree, num_chains: int) -> None:
    """Starts have the chains first, in every leaf.

    Raises:
        ValueError: Naming the first leaf that has not.
    """
    if init_params is None or num_chains == 1:
        return
    leaves = jax.tree_util.tree_leaves_with_path(init_params)
    if not leaves:
        raise ValueError(
            f"init_params: got {init_params!r}, wanted starts with leaves ({num_chains}, ...), or None"
        )
    for path, leaf in leaves:
        if jnp.shape(leaf)[:1] != (num_chains,):
            raise ValueError(
                f"init_params{jax.tree_util.keystr(path)}: got shape {jnp.shape(leaf)}, wanted ({num_chains}, ...): one start per chain"
            )


def check_sites(given: PyTree, shapes: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Starts are those of a model.

    Args:
        given: Starts, leaves `(C, ...)`.
        shapes: Of one start, by site.

    Raises:
        ValueError: Naming the sites, or the first whose shape is another.
    """
    if not isinstance(given, dict) or set(given) != set(shapes):
        got = f"sites {sorted(given)}" if isinstance(given, dict) else f"a {type(given).__name__}"
        raise ValueError(
            f"init_params: got {got}, wanted an unconstrained value for each of {sorted(shapes)}"
        )
    have = jax.tree.leaves(given)[0].shape[:1]
    for name, leaf in given.items():
        wanted = (*have, *shapes[name].shape)
        if jnp.shape(leaf) != wanted:
            raise ValueError(
                f"init_params[{name!r}]: got shape {jnp.shape(leaf)}, wanted {wanted}: one unconstrained value per chain"
            )


def keys_of(rng_key: Any) -> Key:
    """One typed key per chain, shape `(C,)`, from one key or a batch, typed or legacy."""
    keys = rng_key if is_key(rng_key) else jax.random.wrap_key_data(jnp.asarray(rng_key))
    return keys.reshape(-1)


def sample_arguments(
    sampler: ParallelKernel,
    target: Target,
    keys: Key,
    num_warmup: int,
    init_params: PyTree = None,
    state: HMCState | None = None,
    **options: Any,
) -> SampleArguments:
    """What a NumPyro run asks for.

    Args:
        sampler: A kernel of ours.
        target: What is sampled.
        keys: One key per chain, shape `(C,)`.
        num_warmup: Warm-up steps per chain at most; 0 adapts nothing.
        init_params: One start per chain, leaves `(C, ...)`, or None.
        state: Where chains go on from, leaves `(C, ...)`; None warms up.
        **options: Further fields of `SampleArguments`.

    Raises:
        TypeError: For a state of NumPyro's own kernels.
    """
    resumable = {"init_params": init_params, "post_warmup_state": state}
    starts = functools.partial(_checked_starts, sampler, target, first_key(keys), init_params)
    kernel, chain_state = sampler.tuned_builder, None
    if state is not None:
        if not isinstance(state.adapt_state, AdaptState):
            raise TypeError(
                f"post_warmup_state: got a state of another kernel (adapt_state is a {type(state.adapt_state).__name__}), wanted "
                "one of ParallelMCMC: its last_state, or what warmup() leaves"
            )
        kernel = kernel_from(sampler, target, state)
        chain_state = ChainState(state.r, state.adapt_state.discrete, int(np.asarray(state.i)[0]))
    elif not num_warmup:
        # Every chain has its start, and all of them the kernel made at the first.
        starts = functools.cache(starts)
        kernel = _untuned(sampler, target, starts(keys.shape[0]))
    return SampleArguments(
        front="ParallelMCMC.run",
        target=target,
        kernel=kernel,
        starts=starts,
        warmup_key=fold_in(first_key(keys), _WARMUP_STREAM),
        chain_keys=keys,
        key_words=key_words(keys),
        key_impl=str(jax.random.key_impl(keys)),
        num_warmup=num_warmup,
        adaptation=sampler.adaptation_for(target.example),
        state=chain_state,
        extra={}
        if options.get("store") is None
        else {name: _digest(tree) for name, tree in resumable.items()},
        **options,
    )


def hmc_state(plan: Plan, state: ChainState, sampler: ParallelKernel) -> HMCState:
    """NumPyro's state of every chain, leaves `(C, ...)`, as if it had just been warmed up.

    Args:
        plan: Of the run: its kernel belongs to a program.
        state: Where the chains stand.
        sampler: The kernel, which may have a fixed step size.
    """
    kernel, num_chains = plan.kernel, plan.num_chains
    params = program_and_params(kernel)[1]
    whitening = params.whitening
    dtype = whitening.center.dtype

    def each(value, dtype=dtype):
        return np.broadcast_to(np.asarray(value, dtype), (num_chains, *np.shape(value)))

    settings = {name: np.asarray(value) for name, value in params.settings.items()}
    fixed = jnp.nan if sampler._step_size is None else sampler._step_size
    step, root = settings.get("step_size", fixed), jax.tree.map(np.asarray, whitening.scale)
    if sampler._asked_dense and is_diagonal(root):
        root = np.diag(root)  # NumPyro's states have a matrix then
    adapted = AdaptState(
        each(step),
        each(whitening.center),
        jax.tree.map(each, root_by_block(root, sampler._blocks, params.whitening.example)),
        jax.tree.map(
            lambda leaf: each(leaf, np.int32 if jnp.issubdtype(leaf.dtype, jnp.integer) else dtype),
            weights_of(whitening.maps),
        ),
        {name: each(value, value.dtype) for name, value in settings.items()},
        state.discrete,
    )
    if plan.warmup is None:
        positions = jax.vmap(kernel.position)(state.carries)
        values = log_densities(plan.target, positions)[0]
    else:
        positions, values = plan.warmup.positions, plan.warmup.logdensity
    potential, zero, integer = -np.asarray(values, dtype), each(0.0), each(0, np.int32)
    return jax.device_put(
        HMCState(
            i=integer,
            z=positions,
            z_grad=None,
            potential_energy=potential,
            energy=potential,
            r=state.carries,
            trajectory_length=each(settings.get("num_integration_steps", 1) * np.asarray(step)),
            num_steps=integer,
            accept_prob=zero,
            mean_accept_prob=zero,
            diverging=each(False, bool),
            adapt_state=adapted,
            rng_key=plan.keys,
        )
    )


def kernel_from(sampler: ParallelKernel, target: Target, state: HMCState) -> ParametrisedKernel:
    """The tuned kernel that a batch of states belongs to."""
    # On the host: every small operation on arrays of a device is a program of its own.
    one = jax.device_put(_first(state._replace(rng_key=None, r=None)))
    density, data = density_of(target.logdensity, one.z)
    adapted = one.adapt_state
    maps = learned_maps(target.centring, one.z, adapted.weights)
    return parametrised_kernel(
        KernelProgram(density, sampler.tuned_builder),
        data,
        Whitening(one.z, adapted.center, whole_root(adapted.scale, one.z), maps),
        adapted.settings,
    )


# As NumPyro's.
_MOST_TRIES = 100


def log_densities(target: Target, positions: PyTree) -> tuple[np.ndarray, np.ndarray]:
    """Log densities at positions `(N, ...)`, and whether they and their gradients are finite, each `(N,)`."""
    values, gradients = _evaluated(target, positions, compiler_options(0))
    good = [np.isfinite(leaf).reshape(len(leaf), -1).all(axis=1) for leaf in gradients]
    return values, np.all([np.isfinite(values), *good], axis=0)


def potential_gradients(target: Target, positions: PyTree) -> PyTree:
    """Gradients of minus the log density at positions `(N, ...)`, as NumPyro's states have them."""
    slopes = [jnp.negative(leaf) for leaf in _evaluated(target, positions)[1]]
    return jax.tree.unflatten(jax.tree.structure(positions), slopes)


def _evaluated(
    target: Target, positions: PyTree, options: dict[str, Any] | None = None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Log densities at positions `(N, ...)`, and the leaves of their gradients, `(N, ...)`."""
    density, data = density_of(target.logdensity, _first(positions))
    values, gradients = run_program(
        _Evaluate(density), data, positions, timings=Timings(), options=options
    )
    return np.asarray(values), list(map(np.asarray, jax.tree.leaves(gradients)))


class _Evaluate(HashableFunction):
    """Log densities and their gradients; the part is the density."""

    def __call__(self, data, positions):
        return jax.vmap(jax.value_and_grad(self.parts[0], argnums=1), (None, 0))(data, positions)


def _checked_starts(
    sampler: ParallelKernel, target: Target, key: Key, init_params: PyTree, count: int
) -> PyTree:
    """So many starts: those given first, then the model's own, or the given ones again.

    Raises:
        InvalidStart: If no chain could move from one of them.
        ValueError: If `init_params` are those of another model.
    """
    starts = _starts(sampler, target, fold_in(key, _START_STREAM), init_params, count)
    try:
        values, good = log_densities(target, starts)
    except TypeError:
        # This says what is wrong with a density that has no gradient.
        check_starts(target.logdensity, starts, "init_params")
        raise
    first = _first(starts)
    if not good.all():
        if init_params is None and sampler._posterior is not None:
            sampler._posterior.check_found(good)
        check_starts(target.logdensity, starts, "init_params")
    check_precision(target.logdensity, first, values[0])
    return starts


def _starts(
    sampler: ParallelKernel, target: Target, key: Key, init_params: PyTree, count: int
) -> PyTree:
    if init_params is None:
        return _models_starts(sampler, target, key, count)
    given = check_dtypes(init_params, "init_params")
    if sampler._posterior is not None:
        check_sites(given, sampler._posterior.shapes)
    have = jax.tree.leaves(given)[0].shape[0]
    if have >= count:
        return given
    if sampler.model is None:
        return jax.tree.map(lambda leaf: leaf[jnp.arange(count) % have], given)
    more = _models_starts(sampler, target, key, count - have)
    return jax.tree.map(lambda a, b: jnp.concatenate([a.astype(b.dtype), b]), given, more)


def _models_starts(sampler: ParallelKernel, target: Target, key: Key, count: int) -> PyTree:
    """So many starts by the model's strategy.

    Under NumPyro's default they are drawn on the host, with as many tries as NumPyro makes: its own search is one more
    program to compile, larger than the density's gradient, which is needed in any case.
    """
    posterior = sampler._posterior
    if posterior is None or posterior.radius is None:
        return target.starts(split(key, count))
    generator, radius = SeedTree.of(key).generator, posterior.radius

    def drawn():
        return {
            name: generator.uniform(-radius, radius, (count, *one.shape)).astype(one.dtype)
            for name, one in posterior.shapes.items()
        }

    starts = drawn()
    for _ in range(_MOST_TRIES):
        try:
            _, good = log_densities(target, jax.device_put(starts))
        except TypeError:  # no gradient: the caller says what is wrong
            break
        if good.all():
            break
        again = drawn()
        starts = {
            name: np.where(good.reshape(-1, *(1,) * (one.ndim - 1)), one, again[name])
            for name, one in starts.items()
        }
    return jax.device_put(starts)


def _untuned(sampler: ParallelKernel, target: Target, starts: PyTree) -> ParametrisedKernel:
    """The kernel as it is without warm-up: the metric given, or none, and the step size given, or a cautious one."""
    first = _first(starts)
    density, data = density_of(target.logdensity, first)
    builder = sampler.tuned_builder
    adaptation = sampler.adaptation_for(lambda: first)
    flat, guess = ravel_pytree(first)[0], getattr(adaptation, "guess", None)
    step = sampler._step_size
    if guess is None and step is None:
        warnings.warn(
            "num_warmup: got 0, so nothing is adapted; step size and metric are those given, or "
            f"{_UNTUNED_STEP_SIZE} and the identity",
            stacklevel=4,
        )
    settings: dict[str, Any] = {"step_size": _UNTUNED_STEP_SIZE if step is None else step}
    rule = path_rule_of(builder, target_of(builder), adaptation.path_length)
    if "num_integration_steps" in any_settings(builder):
        path = dataclasses.replace(rule, step_size=settings["step_size"]).candidates()[0]
        settings = path.settings
    return parametrised_kernel(
        KernelProgram(density, builder),
        data,
        Whitening.of_covariance(
            first, jnp.zeros_like(flat), jnp.ones_like(flat) if guess is None else guess
        ),
        {name: value for name, value in settings.items() if name not in sampler._fixed},
    )


def _first(tree: PyTree) -> PyTree:
    """What belongs to the first chain of leaves `(C, ...)`, on the host."""
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0], tree)


def _digest(tree: PyTree) -> str | None:
    leaves = (
        leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf) for leaf in jax.tree.leaves(tree)
    )
    return None if tree is None else digest_arrays(leaves)


def collect(
    draws: Draws,
    state: HMCState,
    postprocess: Callable | None,
    names: tuple[str, ...],
    removed: tuple[str, ...],
    thinning: int,
    gradients: Callable[[PyTree], PyTree],
) -> tuple[dict[str, PyTree], HMCState]:
    """Collected fields and the last state.

    Args:
        draws: Of all chains, `(C, T, ...)`; T may be 0.
        state: Before the first draw.
        postprocess: The user's own map of one unconstrained draw; None is the model's.
        names: Fields to collect, the draws' own field `z` first.
        removed: Sites to leave out of `z`.
        thinning: Of so many draws the last is kept.
        gradients: From positions `(N, ...)` to the potential's gradients there, called where they are asked for.

    Returns:
        Fields with leaves `(C, T', ...)`, and the state of every chain after its last step.

    Raises:
        ValueError: For a field that there is not, naming those that there are.
    """
    everything, positions = _fields(draws, state), draws.positions
    sites = positions if isinstance(positions, dict) else {}
    known = everything | {f"z.{site}": value for site, value in sites.items()}
    if "z_grad" in names:
        rows = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), positions)
        known["z_grad"] = jax.tree.map(
            lambda slope, leaf: slope.reshape(leaf.shape), gradients(rows), positions
        )
    if postprocess is None:
        known["z"] = _sites(draws.constrained, removed, isinstance(positions, dict))
    else:
        value = jax.vmap(jax.vmap(postprocess))(positions)
        known["z"] = _sites(value, removed, True) if removed else value
    unknown = [name for name in names if name not in known and name not in _CONSTANT]
    if unknown:
        raise ValueError(
            f"extra_fields: got {unknown[0]!r}; wanted some of {sorted([*everything, *_CONSTANT, 'z_grad'])}, or z.<site>"
        )
    steps = draws.num_samples
    fields = {name: known[name] for name in names if name in known}
    if thinning > 1:
        kept = np.arange(steps % thinning + thinning - 1, steps, thinning)
        fields = jax.tree.map(lambda leaf: leaf[:, kept], fields)
    for name in names:
        if name in _CONSTANT:
            fields[name] = _every_step(state, name, steps // thinning)
    return jax.device_put(fields), _last(draws, state, everything)


def empty_collection(
    state: HMCState, num_chains: int, names: tuple[str, ...] = ("z",)
) -> tuple[dict[str, PyTree], HMCState]:
    """No draws, as NumPyro wants them, empty arrays, and the state, without its axis of chains if there is one chain.

    Args:
        state: Leaves `(C, ...)`.
        num_chains: C.
        names: The fields that would have been collected.

    Raises:
        ValueError: For a field that there is not.
    """
    shape = (0,) if num_chains == 1 else (num_chains, 0)

    def empty(name):
        if name in _OWN_FIELDS:
            return jnp.zeros(shape)
        try:
            like = state.z if name == "z_grad" else _field_of(state, name)
        except (AttributeError, KeyError):
            raise ValueError(
                f"extra_fields: got {name!r}; wanted a field of the state, or z.<site>"
            ) from None
        return jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape[1:]), leaf.dtype), like)

    none = {name: empty(name) for name in names}
    return none, jax.tree.map(lambda leaf: leaf[0], state) if num_chains == 1 else state


# Fields that a state of NumPyro's does not have.
_OWN_FIELDS = ("residual", "accepted")


def _field_of(state: HMCState, name: str) -> PyTree:
    return state.z[name[2:]] if name.startswith("z.") else operator.attrgetter(name)(state)


def with_chains(tree: PyTree, num_chains: int) -> PyTree:
    """A state or starts of NumPyro's with the axis of chains, which a single chain lacks."""
    return jax.tree.map(lambda leaf: leaf[None], tree) if num_chains == 1 else tree


# Fields of `HMCState` and of certificates that are reported of every step, by our names.
_REPORTED = {
    "potential_energy": "logdensity",
    "energy": "energy",
    "num_steps": "num_steps",
    "accept_prob": "acceptance_rate",
    "diverging": "diverging",
    "residual": "residual",
    "accepted": "accepted",
}
# What stands for something that the kernel does not report.
_UNREPORTED = {"potential_energy": np.nan, "num_steps": np.int32(1), "diverging": False}


def _reported(name: str, info: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """One of these fields, `(C, T)`, or what stands for it."""
    if name == "energy" and name not in info:
        name = "potential_energy"
    found = info.get(_REPORTED[name])
    if found is None:
        found = np.full(shape, _UNREPORTED.get(name, 1.0))
    return -np.asarray(found) if name == "potential_energy" else np.asarray(found)


def _sites(values: Mapping[str, Any], removed: tuple[str, ...], is_dict: bool) -> PyTree:
    """Values by site without those removed; the one value `x` of positions that are not named."""
    sites = {site: one for site, one in values.items() if site not in removed}
    return sites if is_dict or set(sites) != {"x"} else sites["x"]


def _fields(draws: Draws, state: HMCState) -> dict[str, Any]:
    """All fields, `(C, T, ...)`, on the host: what is the same in all steps (metrics) is not written out."""
    certificate = draws.certificate
    _, num_steps = shape = certificate.residual.shape
    info = {**draws.info, "residual": certificate.residual, "accepted": certificate.accepted}
    found = {name: _reported(name, info, shape) for name in _REPORTED}
    accept, before = found["accept_prob"], np.asarray(state.i)[:, None]
    mean = np.asarray(state.mean_accept_prob)[:, None] * before + np.cumsum(accept, axis=1)
    index = before + np.arange(1, num_steps + 1)
    return {
        **found,
        "i": index.astype(np.int32),
        "mean_accept_prob": (mean / np.maximum(index, 1)).astype(accept.dtype),
    }


# Fields that are the same after every step.
_CONSTANT = (
    "trajectory_length",
    "rng_key",
    "adapt_state.step_size",
    "adapt_state.inverse_mass_matrix",
    "adapt_state.mass_matrix_sqrt",
    "adapt_state.mass_matrix_sqrt_inv",
)


def _every_step(state: HMCState, name: str, num_steps: int) -> PyTree:
    """A field that no step changes, as that of every step: leaves `(C, T, ...)` from leaves `(C, ...)`."""

    def repeated(leaf):
        shape = (leaf.shape[0], num_steps, *leaf.shape[1:])
        # NumPy knows no keys.
        return (jnp if is_key(leaf) else np).broadcast_to(leaf[:, None], shape)

    return jax.tree.map(repeated, operator.attrgetter(name)(state))


def _last(draws: Draws, state: HMCState, everything: dict[str, Any]) -> HMCState:
    if not draws.num_samples or draws.state is None:
        return state
    own = {
        name: everything[name][:, -1].astype(getattr(state, name).dtype)
        for name in (*_REPORTED, "i", "mean_accept_prob")
        if hasattr(state, name)
    }
    z = jax.tree.map(lambda leaf: np.asarray(leaf)[:, -1], draws.positions)
    return state._replace(
        r=draws.state.carries,
        **jax.device_put({"z": z} | own),
        adapt_state=state.adapt_state._replace(discrete=draws.state.discrete),
    )


# --- of draws in a store ---------------------------------------------------------------------------------------------


def read_fields(
    draws: StoredDraws, names: tuple[str, ...], removed: tuple[str, ...], is_dict: bool
) -> dict[str, Any]:
    """Collected fields of the kept draws, in memory, leaves `(C, T', ...)`.

    Args:
        draws: Stored.
        names: Fields, the draws' own field `z` first.
        removed: Sites to leave out of `z`.
        is_dict: Whether positions are named.

    Raises:
        ValueError: For a field that a store does not have.
    """
    stats = by_own_names(draws.sample_stats)
    found = {
        name: _sites(draws.posterior.data_vars, removed, is_dict)
        if name == "z"
        else _reported(name, stats, stats["residual"].shape)
        for name in names
    }
    return jax.tree.map(lambda one: jnp.asarray(np.asarray(one)), found)


def check_fields(names: tuple[str, ...], postprocess: Callable | None) -> None:
    """Refuse what a store does not have.

    Raises:
        ValueError: For an unknown field, naming those that there are, or a `postprocess_fn` of the user's.
    """
    if postprocess is not None:
        raise ValueError(
            "postprocess_fn: got a function with a store, wanted None: a store holds the model's own values"
        )
    for name in names:
        if name not in ("z", *_REPORTED):
            raise ValueError(
                f"extra_fields: got {name!r} with a store; wanted some of {sorted(_REPORTED)}"
            )


def last_stored_state(draws: StoredDraws, state: HMCState, num_steps: int) -> HMCState:
    """NumPyro's state after the last draw in a store.

    Args:
        draws: Stored.
        state: Where its chains stand, without what the last step reported.
        num_steps: Steps that they have behind them.
    """
    reported = {"mean_accept_prob": draws.mean_acceptance} if draws.num_samples else {}
    if draws.finished and draws.posterior.sizes.get("draw"):
        # The last draw of a finished run is always kept.
        stats = by_own_names(draws.sample_stats)
        reported |= {
            name: stats[stored][:, -1].values
            for name, stored in _REPORTED.items()
            if stored in stats and hasattr(state, name) and name != "potential_energy"
        }
    return state._replace(
        i=jnp.full(state.i.shape, num_steps, jnp.int32),
        **{
            name: jnp.asarray(value, getattr(state, name).dtype) for name, value in reported.items()
        },
    )
