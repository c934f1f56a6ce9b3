"""Our kernels as NumPyro's `MCMCKernel`: the same arguments, the same state fields, two ways to run.

In `ParallelMCMC` a kernel only says what is to be tuned and how; chains are warmed up together and solved in parallel time. In
NumPyro's own `MCMC` the same kernel moves one step per call with the very same random numbers, step t of a chain with
`jax.random.fold_in(rng_key, t)`, which is `jax.random.split(rng_key, T)[t]`: that is the sequential reference.

States are NumPyro's `HMCState`. Its `adapt_state` holds what warm-up chose, `r` what a kernel carries from step to step; `i`
counts steps since warm-up, so that the last state of a run goes on with the next random numbers. Step sizes are in whitened
coordinates, as NumPyro's are with an adapted mass matrix.

NumPyro's own `HMC` and `NUTS` become kernels of ours, so that a script changes the name of one class. What was left at
NumPyro's default is left to our warm-up: a step size of 1 is where NumPyro's adaptation starts, and a path of 2π, in
coordinates as well whitened as ours, ends where it began. What was set is kept. Other kernels of NumPyro's, and other
kinetic energies than the Euclidean one, are left to NumPyro's own loop (`loop`).
"""

import dataclasses
import functools
import inspect
import math
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import HMC as TheirHMC
from numpyro.infer import NUTS as TheirNUTS
from numpyro.infer.hmc import HMCState
from numpyro.infer.hmc_util import euclidean_kinetic_energy
from numpyro.infer.mcmc import MCMCKernel

from partime_mcmc.kernels import (
    Kernel,
    MultishiftCoupling,
    Tape,
    Whitening,
    coalescing_hmc,
    hmc,
    mala,
    nuts,
)
from partime_mcmc.kernels.coordinates import reweighted
from partime_mcmc.kernels.kernel_program import KernelParams, program_and_params
from partime_mcmc.numpyro.hmc_state import hmc_state, keys_of, sample_arguments
from partime_mcmc.numpyro.metric_blocks import (
    blocks_of,
    coordinates_of,
    dimension_of,
    metric_of_blocks,
    site_names,
    whole_root,
)
from partime_mcmc.numpyro.model import Posterior, forward_only
from partime_mcmc.sampling.plan import prepare
from partime_mcmc.sampling.progress import quiet
from partime_mcmc.sampling.target import Target
from partime_mcmc.tracing import HashableFunction
from partime_mcmc.types import ArrayLike, Key, PyTree, Tracer, is_key
from partime_mcmc.validation import check_count
from partime_mcmc.warmup.metric import BlockMetric, DiagonalMetric, FrozenMetric
from partime_mcmc.warmup.pooled import PooledAdaptation, learn_coordinates

# What NumPyro's kernels move by unless they are told otherwise.
_NUMPYROS_STEP_SIZE = 1.0


class ParallelKernel(MCMCKernel):
    """What all our kernels share.

    Args:
        model: A NumPyro model.
        potential_fn: Instead of a model: minus the log density of a position; give `init_params` to `run` then.
        kinetic_fn: None, or NumPyro's Euclidean kinetic energy: there is no other here.
        step_size: Where warm-up's search begins, as in NumPyro; the step size itself with `adapt_step_size=False` or
            without warm-up. None begins where warm-up is used to.
        inverse_mass_matrix: A first metric for warm-up, `(D, D)` or `(D,)`, in the order of flattened positions, or
            such blocks by tuples of site names.
        adapt_step_size: False keeps `step_size`, or 1.
        adapt_mass_matrix: False keeps `inverse_mass_matrix`.
        dense_mass: False or an empty list takes a diagonal metric, None or True a dense one (low-rank beyond 300
            dimensions), a list of tuples of site names one that is dense within each tuple.
        target_accept_prob: Mean acceptance in trials; None is what suits the kernel.
        max_tree_depth: A bound on the trees of `NUTS`; paths of other kernels have 48 leapfrog steps at most.
        init_strategy: As in NumPyro; None is `init_to_uniform`.
        find_heuristic_step_size, regularize_mass_matrix: Accepted, without effect: step sizes are found by trials and metrics
            shrunk in any case.
        forward_mode_differentiation: True takes gradients in forward mode, for models with loops that know no other.
        adaptation: A whole warm-up strategy, instead of `inverse_mass_matrix`, `adapt_mass_matrix`, `dense_mass`,
            `target_accept_prob` and `trajectory_length`.

    Raises:
        TypeError: For an argument that the kernel does not have.
        ValueError: If not exactly one of `model` and `potential_fn` is given, or an argument cannot work, alone or with
            another.
    """

    builder: Callable[..., Kernel]
    _trajectory_length: float | None = None

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        kinetic_fn: Callable | None = None,
        step_size: ArrayLike | None = None,
        inverse_mass_matrix: Any = None,
        adapt_step_size: bool = True,
        adapt_mass_matrix: bool = True,
        dense_mass: bool | list | None = None,
        target_accept_prob: float | None = None,
        max_tree_depth: int | tuple[int, int] = 10,
        init_strategy: Callable | None = None,
        find_heuristic_step_size: bool = False,
        forward_mode_differentiation: bool = False,
        regularize_mass_matrix: bool = True,
        adaptation: Any = None,
        **unknown: Any,
    ):
        if unknown:
            raise TypeError(
                f"{type(self).__name__}: got {', '.join(sorted(unknown))}, which it does not take; wanted arguments of NumPyro's "
                "kernel of that name"
            )
        if (model is None) == (potential_fn is None):
            raise ValueError("model and potential_fn: wanted exactly one of them")
        if not is_euclidean(kinetic_fn):
            raise ValueError(
                f"kinetic_fn: got {kinetic_fn!r}, wanted NumPyro's Euclidean kinetic energy"
            )
        if target_accept_prob is not None and not 0 < target_accept_prob < 1:
            raise ValueError(
                f"target_accept_prob: got {target_accept_prob!r}, wanted a number between 0 and 1"
            )
        deepest = max_tree_depth[-1] if isinstance(max_tree_depth, tuple) else max_tree_depth
        self._max_tree_depth = check_count(deepest, "max_tree_depth", 1)
        choices = {
            "inverse_mass_matrix": inverse_mass_matrix,
            "adapt_mass_matrix": None if adapt_mass_matrix else False,
            "dense_mass": dense_mass,
            "target_accept_prob": target_accept_prob,
            "trajectory_length": self._trajectory_length,
        }
        chosen = [name for name, value in choices.items() if value is not None]
        if adaptation is not None and chosen:
            raise ValueError(
                f"adaptation: got a {type(adaptation).__name__} together with {', '.join(chosen)}, wanted one or the other: an "
                "adaptation has its own acceptance, path and metric"
            )
        self._model, self._potential_fn, self._init_strategy = model, potential_fn, init_strategy
        self._step_size = check_positive(step_size, "step_size")
        if not adapt_step_size and self._step_size is None:
            self._step_size = _NUMPYROS_STEP_SIZE
        self._fixed: dict[str, Any] = {} if adapt_step_size else {"step_size": self._step_size}
        self._posterior: Posterior | None = None
        self._forward_mode_differentiation = forward_mode_differentiation
        rule = DiagonalMetric() if dense_mass is False or dense_mass == [] else None
        given = None if inverse_mass_matrix is None else checked_metric(inverse_mass_matrix)
        if dense_mass is True and not adapt_mass_matrix:
            # NumPyro's states then hold matrices, whatever was given.
            given = jax.tree.map(lambda one: np.diag(one) if np.ndim(one) == 1 else one, given)
        self._blocks, self._given_blocks = blocks_of(dense_mass, given), None
        self._asked_dense = dense_mass is True
        if isinstance(given, dict):
            self._given_blocks, given = given, None
        self.adaptation = adaptation or PooledAdaptation(
            target_acceptance=None if target_accept_prob is None else float(target_accept_prob),
            path_length=self._trajectory_length,
            # A metric that is kept is one of the model's own coordinates.
            coordinates=learn_coordinates if adapt_mass_matrix else None,
            metric=rule if adapt_mass_matrix else FrozenMetric(),
            guess=given,
            first_step=self._step_size or PooledAdaptation.first_step,
        )
        self._adopted: Any = None
        self._sample_fn = None

    @property
    def sample_field(self) -> str:
        """Where the state has its draw."""
        return "z"

    @property
    def default_fields(self) -> tuple[str, ...]:
        """What a run collects unasked."""
        return ("z", "diverging")

    def adaptation_for(self, position: Callable[[], PyTree]) -> Any:
        """The warm-up of positions of this shape: what was given by sites becomes what is given by coordinates.

        Args:
            position: Makes a position, or its shapes.

        Raises:
            ValueError: If a metric has another dimension, or a block names a site that there is not or has another shape.
        """
        # A low-rank root, which only an adaptation of the user's may have, has no shape.
        shape = getattr(getattr(self.adaptation, "guess", None), "shape", None)
        if shape is not None and shape[0] != dimension_of(position()):
            size = dimension_of(position())
            raise ValueError(
                f"inverse_mass_matrix: shape {shape}, wanted ({size},) or ({size}, {size})"
            )
        if not self._blocks:
            return self.adaptation
        example, changes = position(), {}
        if self._given_blocks is not None:
            changes["guess"] = metric_of_blocks(self._given_blocks, example)
        dense = [names for names, is_dense in self._blocks.items() if is_dense]
        if not isinstance(self.adaptation.metric, FrozenMetric):
            where = [coordinates_of(names, example) for names in dense]
            changes["metric"] = BlockMetric(where) if dense else DiagonalMetric()
        return dataclasses.replace(self.adaptation, **changes)

    @functools.cached_property
    def tuned_builder(self) -> Callable[..., Kernel]:
        """What warm-up tunes, as `sample` takes it."""
        # Made once: a partial equals only itself, and what is compiled is found again by its builder.
        return functools.partial(self.builder, **self._fixed) if self._fixed else self.builder

    @property
    def model(self) -> Callable | None:
        """The model, None for a potential."""
        return self._model

    def get_diagnostics_str(self, state: HMCState) -> str:
        """One line for a progress bar."""
        steps, size, rate = (
            np.mean(np.asarray(one))  # over chains, if the state is that of several
            for one in (state.num_steps, state.adapt_state.step_size, state.mean_accept_prob)
        )
        return f"{steps:g} steps of size {size:.2e}. acc. prob={rate:.2f}"

    def num_gradients(self, draws: Any) -> int:
        """Gradients that these draws cost, over all chains: leapfrog steps, or one per draw.

        Args:
            draws: In memory.
        """
        steps = draws.info.get("num_steps")
        return draws.num_chains * draws.num_samples if steps is None else int(np.sum(steps))

    def target(
        self, model_args: tuple, model_kwargs: dict | None, key: Key, init_params: PyTree = None
    ) -> Target:
        """What is sampled, with NumPyro's starts.

        Raises:
            ValueError: If a potential comes without `init_params`, and as `from_numpyro`.
        """
        if self._potential_fn is not None:
            if init_params is None:
                raise ValueError(
                    "init_params: got None, wanted starts: a potential_fn does not say what its positions look like"
                )
            potential_fn = self._potential_fn

            def minus(position: PyTree):
                return -potential_fn(position)

            return Target(
                forward_only(minus) if self._forward_mode_differentiation else minus, init_params
            )
        self._posterior = Posterior(
            self._model,  # pyright: ignore[reportArgumentType]  one of both is given
            tuple(model_args),
            dict(model_kwargs or {}),
            key,
            self._init_strategy,
            self._forward_mode_differentiation,
        )
        return self._posterior.target

    def postprocess_fn(
        self, model_args: tuple, model_kwargs: dict | None
    ) -> Callable[[PyTree], PyTree]:
        """From one unconstrained draw to named values in the model's space."""
        constrain = None if self._posterior is None else self._posterior.target.constrain
        return constrain or (lambda position: position)

    def __getstate__(self) -> dict[str, Any]:
        """As NumPyro's kernels: without what is compiled or traced, which the next run makes again."""
        return self.__dict__ | {"_posterior": None, "_adopted": None, "_sample_fn": None}

    # --- one step at a time, in NumPyro's own MCMC

    def init(
        self,
        rng_key: Key,
        num_warmup: int,
        init_params: PyTree,
        model_args: tuple,
        model_kwargs: dict | None,
    ) -> HMCState:
        """A warmed-up state per key, for NumPyro's own `MCMC`.

        Raises:
            TypeError: Under `pmap` or `vmap`: warm-up looks at numbers. Take chain_method "vectorized" or "sequential".
        """
        if isinstance(rng_key, Tracer):
            raise TypeError(
                "chain_method: got one that traces `init`; wanted 'vectorized' or 'sequential', or ParallelMCMC"
            )
        keys = keys_of(rng_key)
        is_single = jnp.ndim(rng_key) == (0 if is_key(rng_key) else 1)
        if is_single and init_params is not None:
            init_params = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], init_params)
        target = self.target(model_args, model_kwargs, keys[0], init_params)
        arguments = sample_arguments(self, target, keys, num_warmup, init_params, num_samples=0)
        plan, chain_state = prepare(arguments, quiet)
        self.adopt(plan.kernel)
        state = hmc_state(plan, chain_state, self)
        return jax.tree.map(lambda leaf: leaf[0], state) if is_single else state

    def adopt(self, kernel: Kernel) -> None:
        """Take over what a warm-up chose: its states can then be moved, here or in NumPyro's own `MCMC`."""
        self._adopted = program_and_params(kernel)
        self._sample_fn = self.sample

    def sample(self, state: HMCState, model_args: tuple, model_kwargs: dict | None) -> HMCState:
        """One transition of one chain, or of a batch of them."""
        return jax.vmap(self._one)(state) if jnp.ndim(state.i) else self._one(state)

    def _one(self, state: HMCState) -> HMCState:
        adapted, (program, params) = state.adapt_state, self._adopted
        whitening = Whitening(
            state.z,
            adapted.center,
            whole_root(adapted.scale, state.z),
            reweighted(params.whitening.maps, adapted.weights),
        )
        kernel = program.kernel(KernelParams(params.data, whitening, adapted.settings))
        key = jax.random.fold_in(state.rng_key, state.i)
        full = kernel.state(state.r, adapted.discrete)
        randomness = jax.tree.map(lambda leaf: leaf[0], kernel.tape_of(key[None], full).randomness)
        carry, full, info = kernel.transition(state.r, Tape(randomness, adapted.discrete))
        potential = -getattr(full, "logdensity", jnp.nan)
        reported = {
            "accept_prob": getattr(info, "acceptance_rate", 1.0),
            "potential_energy": potential,
            "energy": getattr(info, "energy", potential),
            "num_steps": getattr(info, "num_integration_steps", 1),
            "diverging": getattr(info, "is_divergent", False),
        }
        reported = {
            name: jnp.asarray(value, getattr(state, name).dtype) for name, value in reported.items()
        }
        count = state.i + 1
        return state._replace(
            i=count,
            z=kernel.position(carry),
            r=carry,
            **reported,
            mean_accept_prob=state.mean_accept_prob
            + (reported["accept_prob"] - state.mean_accept_prob) / count,
            adapt_state=adapted._replace(discrete=kernel.discrete(full)),
        )


class HMC(ParallelKernel):
    """BlackJAX's HMC, by default with paths of a quarter period.

    Args:
        model, potential_fn, step_size, ...: As for every kernel here.
        num_steps: Fixed number of leapfrog steps per trajectory; None lets warm-up choose.
        trajectory_length: Path length in whitened units; None is a quarter period of a standard normal.
    """

    builder = staticmethod(hmc)

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        num_steps: int | None = None,
        trajectory_length: ArrayLike | None = None,
        **options: Any,
    ):
        self._trajectory_length = check_positive(trajectory_length, "trajectory_length")
        super().__init__(model, potential_fn, **options)
        if num_steps is not None:
            self._fixed["num_integration_steps"] = check_count(num_steps, "num_steps", 1)


class CoalescingHMC(HMC):
    """Quarter-period HMC with a coalescing Langevin step after every `every`-th trajectory: the kernel to take unless
    you know better.

    Args:
        model, potential_fn, step_size, num_steps, trajectory_length, ...: As for `HMC`.
        every: Trajectories per Langevin step.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from partime_mcmc import CoalescingHMC, ParallelMCMC
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0, 1))
        >>> kernel = CoalescingHMC(model, target_accept_prob=0.9)
        >>> mcmc = ParallelMCMC(kernel, num_warmup=1000, num_samples=2000, num_chains=4)
    """

    builder = staticmethod(coalescing_hmc)

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        every: int = 4,
        **options: Any,
    ):
        self._every = check_count(every, "every", 1)
        super().__init__(model, potential_fn, **options)
        self._fixed |= {} if every == 4 else {"every": every}

    def num_gradients(self, draws: Any) -> int:
        """With those of the Langevin steps."""
        return super().num_gradients(draws) + draws.num_chains * draws.num_samples // self._every


class MALA(ParallelKernel):
    """The Metropolis-adjusted Langevin algorithm with coalescing noise; step sizes are BlackJAX's ε."""

    builder = staticmethod(functools.partial(mala, coupling=MultishiftCoupling()))


class NUTS(ParallelKernel):
    """BlackJAX's No-U-Turn sampler.

    Args:
        model, potential_fn, step_size, ...: As for every kernel here.
        max_tree_depth: Doublings at most; of a pair the second counts, as after NumPyro's warm-up.
        trajectory_length: Accepted, without effect, as in NumPyro: trees find their own length.
    """

    builder = staticmethod(nuts)

    def __init__(
        self,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        *,
        trajectory_length: ArrayLike | None = None,
        **options: Any,
    ):
        super().__init__(model, potential_fn, **options)
        depth = self._max_tree_depth
        self._fixed |= {} if depth == 10 else {"max_num_doublings": depth}


class BlackJAXKernel(ParallelKernel):
    """Any BlackJAX algorithm, in whitened coordinates.

    Args:
        build: `(logdensity, step_size) -> blackjax.SamplingAlgorithm`; positions are vectors `(D,)` there. The step
            size is tuned by trials of the algorithm itself unless given.
        model, potential_fn, ...: As for every kernel here.
    """

    def __init__(
        self,
        build: Callable,
        model: Callable | None = None,
        potential_fn: Callable | None = None,
        **options: Any,
    ):
        if not callable(build):
            raise TypeError(
                f"build: got {build!r}, wanted a function (logdensity, step_size) -> SamplingAlgorithm"
            )
        self.builder = _Whitened(build)
        super().__init__(model, potential_fn, **options)


class _Whitened(HashableFunction):
    """A builder in our shape of one in BlackJAX's, which is the part."""

    def __call__(self, logdensity: Callable, step_size: float, metric: Whitening) -> Kernel:
        algorithm = self.parts[0](metric.density(logdensity), step_size)
        return Kernel(algorithm, metric.enter, metric.leave, None, "blackjax")


# --- what is checked before anything is compiled


def check_positive(value: Any, name: str) -> float | None:
    """The number as a Python float, or None.

    Raises:
        TypeError: For a traced value.
        ValueError: Unless it is None or a finite number above 0, of any kind, with or without a shape.
    """
    if value is None:
        return None
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name}: got a traced value; make the kernel outside of jit, vmap and grad"
        )
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"{name}: got {value!r}, wanted a finite number above 0")
    return number


def is_euclidean(kinetic_fn: Any) -> bool:
    """Whether a kinetic energy is NumPyro's usual one, which None is, too."""
    return kinetic_fn in (None, euclidean_kinetic_energy)


def checked_metric(
    inverse_mass_matrix: Any, name: str = "inverse_mass_matrix"
) -> np.ndarray | dict[tuple[str, ...], np.ndarray]:
    """A metric given by the user, or its blocks by tuples of site names.

    Raises:
        ValueError: If it, or a block, is no vector of positive numbers and no symmetric positive definite matrix.
    """
    wanted = "wanted positive variances (D,) or a symmetric positive definite matrix (D, D)"
    if isinstance(inverse_mass_matrix, dict):
        return {
            site_names(names): np.asarray(checked_metric(block, f"{name}[{names!r}]"))
            for names, block in inverse_mass_matrix.items()
        }
    metric = np.asarray(inverse_mass_matrix, float)
    if metric.ndim not in (1, 2) or (metric.ndim == 2 and metric.shape[0] != metric.shape[1]):
        raise ValueError(f"{name}: shape {metric.shape}, {wanted}")
    usable = np.isfinite(metric).all() and (
        (metric > 0).all()
        if metric.ndim == 1
        else np.allclose(metric, metric.T, rtol=1e-3) and np.linalg.eigvalsh(metric).min() > 0
    )
    if not usable:
        raise ValueError(f"{name}: got {metric!r}, {wanted}")
    return metric


# --- NumPyro's own kernels

_OURS = {TheirHMC: HMC, TheirNUTS: NUTS}
# NumPyro keeps every argument under its name with an underscore; a test holds it to that.
_CARRIED = (
    "model",
    "potential_fn",
    "step_size",
    "adapt_step_size",
    "inverse_mass_matrix",
    "dense_mass",
    "target_accept_prob",
    "init_strategy",
    "adapt_mass_matrix",
    "find_heuristic_step_size",
    "forward_mode_differentiation",
    "regularize_mass_matrix",
)
_OWN = {TheirHMC: ("num_steps", "trajectory_length"), TheirNUTS: ("max_tree_depth",)}


def has_parallel_form(sampler: MCMCKernel) -> bool:
    """Whether a kernel is one of ours, or has one of ours to stand in for it."""
    if isinstance(sampler, ParallelKernel):
        return True
    return type(sampler) in _OURS and is_euclidean(_stored(sampler, "kinetic_fn"))


def from_numpyro_kernel(sampler: MCMCKernel) -> ParallelKernel:
    """A kernel of ours for one of ours, or for NumPyro's `HMC` or `NUTS`.

    Args:
        sampler: The kernel.

    Raises:
        TypeError: For anything else; see `has_parallel_form`.
    """
    if isinstance(sampler, ParallelKernel):
        return sampler
    kind = type(sampler)
    if kind not in _OURS:
        raise TypeError(
            f"sampler: got a {kind.__module__}.{kind.__name__}, wanted one of CoalescingHMC, HMC, NUTS, MALA or "
            "BlackJAXKernel of partime_mcmc, or NumPyro's own HMC or NUTS"
        )
    parameters = inspect.signature(kind.__init__).parameters
    options = {}
    for name in (*_CARRIED, *_OWN[kind]):
        value, default = _stored(sampler, name), parameters[name].default
        if value is not default and not (
            isinstance(value, (bool, int, float)) and value == default
        ):
            options[name] = value
    return _OURS[kind](**options)


def _stored(sampler: MCMCKernel, name: str) -> Any:
    try:
        return getattr(sampler, f"_{name}")
    except AttributeError:
        raise TypeError(
            f"sampler: this version of NumPyro does not say its kernel's {name}; wanted a kernel of partime_mcmc"
        ) from None
