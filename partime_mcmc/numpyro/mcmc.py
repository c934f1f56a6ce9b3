"""`ParallelMCMC`: NumPyro's `MCMC` with chains solved in parallel time. One line of a script changes.

    mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=1000, num_samples=5000, num_chains=4)

NumPyro's class does everything around the chains (arguments, summaries, resuming, thinning); what is replaced is the one
method that moves them, `_single_chain_mcmc`, which here gets all chains at once whatever `chain_method` says. It maps
NumPyro's arguments and states to ours (`hmc_state`) and runs the same pipeline as `sample`. The draws are those of
NumPyro's own loop over the same kernel with the same keys, certified; `report` says so, or why not.
"""

import dataclasses
import functools
import os
from types import SimpleNamespace
from typing import Any, Callable, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from partime_mcmc.captured_data import data_read_by
from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.certify.recorded import Certification, CertifyWhileRolling
from partime_mcmc.compile_cache import keep_on_disk
from partime_mcmc.diagnostics.report import Level
from partime_mcmc.diagnostics.verdict import Verdict
from partime_mcmc.engine import Schedule
from partime_mcmc.forgetting.advise import Advice
from partime_mcmc.host_keys import first_key, split
from partime_mcmc.kernels import Kernel
from partime_mcmc.numpyro.hmc_state import (
    check_fields,
    check_keys,
    check_leading,
    collect,
    empty_collection,
    hmc_state,
    keys_of,
    last_stored_state,
    potential_gradients,
    read_fields,
    sample_arguments,
    with_chains,
)
from partime_mcmc.numpyro.kernels import from_numpyro_kernel, has_parallel_form
from partime_mcmc.numpyro.loop import LoopMCMC
from partime_mcmc.sampling.arguments import as_store, device_of, on_device
from partime_mcmc.sampling.draws import Draws, RunReport, spread_positions
from partime_mcmc.sampling.pilots import advise_plan
from partime_mcmc.sampling.plan import Plan, prepare
from partime_mcmc.sampling.progress import chosen_progress
from partime_mcmc.sampling.sample import run
from partime_mcmc.sampling.target import Target
from partime_mcmc.solvers import Solver
from partime_mcmc.storage.saved_run import chain_state_of
from partime_mcmc.storage.store import Store
from partime_mcmc.storage.stored_draws import StoredDraws
from partime_mcmc.tracing import Reading
from partime_mcmc.types import Key, PyTree, is_key, jax_config
from partime_mcmc.validation import (
    check_count,
    check_generator,
    check_has,
    check_outside_transforms,
)
from partime_mcmc.warmup.warmup import Warmup


@dataclasses.dataclass(frozen=True)
class ParallelReport:
    """What is known of a run.

    Attributes:
        run: Statuses, work and times.
        certificate: One entry per chain.
        verdict: Whether the draws can be taken for the posterior's, and why.
        warmup: What warm-up chose and why; None if there was none in this run.
        plan: Solver, schedule, counts and key.
        num_gradients: Gradients that the draws of all chains cost the kernel, however they were solved; None of draws in a
            store, which does not keep them.
        ask: Gives advice, and remembers it; None where nothing calls for advice.
    """

    run: RunReport
    certificate: Certificate
    verdict: Verdict
    warmup: Warmup | None
    plan: dict[str, Any]
    num_gradients: int | None
    ask: Callable[[], Advice] | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def level(self) -> Level:
        """CERTIFIED_PATH if every chain is the chain of its kernel and moves, otherwise FAIL."""
        certified, frozen = (
            np.asarray(self.certificate.certified),
            np.asarray(self.certificate.frozen),
        )
        return Level.CERTIFIED_PATH if (certified & ~frozen).all() else Level.FAIL

    @property
    def parallel(self) -> bool:
        """Whether the solver did it, without a sequential fallback."""
        return not self.run.fallbacks and "Sequential" not in self.plan["solver"]

    @property
    def advice(self) -> Advice | None:
        """What pilot chains say, where the default solver had to give up; None elsewhere.

        Pilots are run when this is first looked at: they may take longer than the run itself, so that a printed report only
        points here.
        """
        return None if self.ask is None else self.ask()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"warmup": without_kernel(self.warmup), "ask": None}

    def __str__(self) -> str:
        residual = float(np.max(np.asarray(self.certificate.max_residual)))
        lines = [
            str(self.verdict),
            f"{self.level.name}: largest residual {residual:.1e} noise units, {self.certificate.evidence}; {self.run}",
            *(
                [
                    "The chains were computed one step after another; solver=shooting() computes the same ones in parallel."
                ]
                if "Sequential" in self.plan["solver"]
                else []
            ),
            *self.run.fallbacks,
            *(
                []
                if self.ask is None
                else ["Pilot chains tell why, and what to do: report.advice."]
            ),
            *([str(self.warmup)] if self.warmup else []),
        ]
        return "\n".join(lines)


def without_kernel(warmup: Warmup | None) -> Warmup | None:
    """A warm-up that can be pickled: of its kernel, whose programs cannot be, only the name stays."""
    return warmup and dataclasses.replace(warmup, kernel=SimpleNamespace(name=warmup.kernel.name))


class ParallelMCMC(MCMC):
    """NumPyro's `MCMC` with chains solved in parallel time.

    `warmup(..., collect_warmup=True)` draws and keeps `num_warmup` draws per chain of the tuned kernel: while chains still adapt,
    and are pooled, they are draws of nothing.

    Of a kernel that has no form in parallel time (NumPyro's Gibbs kernels, ensembles, `SA`, `BarkerMH`, a kernel of the
    user's) a `LoopMCMC` is made instead: NumPyro's own loop, with a verdict in its report.

    Args:
        sampler: `CoalescingHMC(model)`, `HMC`, `NUTS`, `MALA` of this package, `BlackJAXKernel(build, model)`, or
            NumPyro's own `HMC` or `NUTS`, for which ours stand in (see `from_numpyro_kernel`).
        num_warmup: Warm-up steps per chain at most, but 20; warm-up stops when it is done. 0 adapts nothing.
        num_samples: Draws per chain.
        num_chains: Chains, all advanced together.
        thinning: Of `thinning` draws in a row the last is kept.
        postprocess_fn: As in NumPyro.
        chain_method: Accepted and ignored: chains share all lanes anyway. That of NumPyro's own loop is "sequential" for
            None, of ensembles "vectorized".
        progress_bar: One line per stage on a terminal.
        progress_rate: Accepted and ignored.
        jit_model_args: Accepted and ignored: data are always arguments of what is compiled.
        solver: A recipe; None is shooting with as many segments as fill the device, and on a processor the loop over all steps where
            that ends before a parallel solver would be compiled.
        schedule: How time is cut; None is windows of 16,384 steps.
        certificate: What it rests on, as for `sample`: `CertifyWhileRolling()` or `CertifyIndependently()`.

    Raises:
        TypeError: If the sampler is no kernel, or a count has the wrong type.
        ValueError: If a count is out of range, or an argument cannot work with the sampler.

    Examples:
        >>> import jax, numpyro, numpyro.distributions as dist
        >>> from partime_mcmc import CoalescingHMC, ParallelMCMC
        >>> def model():
        ...     numpyro.sample("x", dist.Normal(0, 1))
        >>> mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=100, num_samples=500, num_chains=4)
        >>> mcmc.run(jax.random.key(0))
        >>> mcmc.get_samples()["x"].shape
        (2000,)
    """

    def __new__(cls, sampler: Any = None, **options: Any) -> Self:
        """A `LoopMCMC` where the kernel has no form in parallel time."""
        if isinstance(sampler, MCMCKernel) and not has_parallel_form(sampler):
            return LoopMCMC(sampler, **options)  # pyright: ignore[reportReturnType]
        return super().__new__(cls)

    def __init__(
        self,
        sampler: MCMCKernel,
        *,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        thinning: int = 1,
        postprocess_fn: Callable | None = None,
        chain_method: str | Callable | None = None,
        progress_bar: bool = True,
        progress_rate: int | None = None,
        jit_model_args: bool = False,
        solver: Solver | None = None,
        schedule: Schedule | None = None,
        certificate: Certification = CertifyWhileRolling(),
    ):
        check_has(
            certificate,
            "certificate",
            ("dynamics",),
            "CertifyWhileRolling() or CertifyIndependently()",
        )
        super().__init__(
            from_numpyro_kernel(sampler),
            num_warmup=check_count(num_warmup, "num_warmup", 0),
            num_samples=check_count(num_samples, "num_samples", 1),
            num_chains=check_count(num_chains, "num_chains", 1),
            thinning=check_count(thinning, "thinning", 1),
            postprocess_fn=postprocess_fn,
            chain_method="vectorized",
            progress_bar=bool(progress_bar),
            progress_rate=progress_rate,
            jit_model_args=jit_model_args,
        )
        self.chain_method = chain_method or "vectorized"
        self.solver, self.schedule, self.certificate = solver, schedule, certificate
        self._known: _Known | None = None
        self._store: Store | None = None
        self._asked: tuple[str, ...] = ()
        self._draws: Draws | StoredDraws | None = None
        self._stored: tuple[StoredDraws, Any, Any, bool] | None = None
        self._plan: Plan | None = None
        self._advice: Advice | None = None
        self._warmed: Warmup | None = None
        self._warmed_on: Target | None = None
        self._pool: PyTree = None

    def run(
        self,
        rng_key: Any,
        *args: Any,
        extra_fields: tuple | list = (),
        init_params: PyTree = None,
        store: Store | str | os.PathLike | None = None,
        **kwargs: Any,
    ) -> None:
        """As NumPyro's: warm up unless `post_warmup_state` is set, then sample.

        Args:
            rng_key: One key, or one per chain.
            *args: The model's.
            extra_fields: Further fields of the state to collect.
            init_params: Unconstrained starts, leaves `(C, ...)`, or `(...)` for one chain.
            store: A folder for a run longer than memory, as for `sample`; the same call goes on with a run that was killed.
            **kwargs: The model's.

        Warns:
            NotConvergedWarning: Where the draws are not the posterior's; see `report.verdict`.

        Raises:
            StoreMismatch, StoreError: As `sample`.
            TypeError, ValueError: For bad keys, fields, starts, or models; see `from_numpyro`.
        """
        check_outside_transforms(
            "run", rng_key=rng_key, args=args, init_params=init_params, **kwargs
        )
        keep_on_disk()
        rng_key = check_keys(rng_key, self.num_chains)
        check_generator(rng_key, "rng_key")
        if self.num_chains > 1 and rng_key.ndim == 0:
            rng_key = split(
                rng_key, self.num_chains
            )  # as NumPyro would, who compiles a program for it
        check_leading(init_params, self.num_chains)
        if isinstance(extra_fields, str):
            raise TypeError(
                f"extra_fields: got the string {extra_fields!r}; wanted a tuple of field names"
            )
        self._asked = tuple(name for name in extra_fields if not name.startswith("~"))
        self._store = as_store(store)
        captured = data_read_by(self.sampler.model).arrays
        device = device_of(args, kwargs, init_params, rng_key, captured)
        if device is not None:
            rng_key, init_params = jax.device_put((rng_key, init_params), device)
        try:
            with on_device(device):
                super().run(
                    rng_key,
                    *args,
                    extra_fields=tuple(extra_fields),
                    init_params=init_params,
                    **kwargs,
                )
        finally:
            self._store = None
        if self._draws is not None:
            self._draws.verdict.warn()

    @property
    def report(self) -> ParallelReport:
        """What is known of the last run.

        Raises:
            RuntimeError: Before the first run.
        """
        draws = self.draws
        ask = self._advise if self.solver is None and draws.report.fallbacks else None
        gradients = None if self._stored else self.sampler.num_gradients(draws)
        return ParallelReport(
            draws.report,
            draws.certificate,
            draws.verdict,
            draws.warmup,
            draws.plan,
            gradients,
            ask,
        )

    @property
    def advice(self) -> Advice:
        """What pilot chains say of this posterior; worked out when it is first asked for.

        Raises:
            RuntimeError: Before the first run.
        """
        _ = self.draws  # raises before the first run
        return self._advise()

    @property
    def draws(self) -> Draws | StoredDraws:
        """The last run as `sample` returns it, in memory unthinned: for `compare`, `to_arviz` and the like.

        Raises:
            RuntimeError: Before the first run.
        """
        if self._draws is None:
            raise RuntimeError("run must be called first")
        return self._draws

    def target_and_kernel(self) -> tuple[Target, Kernel]:
        """What the last run sampled, and its tuned kernel: for `convergence` and `unbiased`.

        Raises:
            RuntimeError: Before the first run.
        """
        _ = self.draws  # raises before the first run
        plan = self._planned()
        return plan.target, plan.kernel

    @property
    def warmed(self) -> Warmup | None:
        """The last warm-up: what was chosen, why, and what it cost; None before there was one."""
        return self._warmed

    def or_raise(self) -> Self:
        """This object, if every chain of the last run is certified and moves, and the verdict is not NOT CONVERGED.

        Raises:
            SolveError: Naming the first chain that is not.
            NotConverged: With the grounds of the verdict.
        """
        self.draws.or_raise()
        return self

    def get_samples(self, group_by_chain: bool = False) -> Any:
        """As NumPyro's; draws in a store are read when they are asked for, and not kept."""
        fields = self._read_store(group_by_chain)
        return super().get_samples(group_by_chain) if fields is None else fields["z"]

    def get_extra_fields(self, group_by_chain: bool = False) -> dict[str, Any]:
        """As NumPyro's; likewise."""
        fields = self._read_store(group_by_chain)
        if fields is None:
            return super().get_extra_fields(group_by_chain)
        return {name: value for name, value in fields.items() if name != "z"}

    def _get_states_flat(self) -> Any:
        """As NumPyro's, which compiles a program for every shape."""
        if self._states_flat is None and self._states is not None:
            self._states_flat = jax.tree.map(_flat, self._states)
        return self._states_flat

    def print_summary(self, prob: float = 0.9, exclude_deterministic: bool = True) -> None:
        """The verdict, then as NumPyro's; of draws in a store, which are in memory meanwhile, too."""
        in_memory = self._states
        if self._draws is not None:
            print(self._draws.verdict)
        try:
            fields = self._read_store(True) or in_memory
            if fields and isinstance(fields["z"], dict):
                # Of no numbers there is no mean.
                sites = {
                    name: one
                    for name, one in fields["z"].items()
                    if any(np.size(leaf) for leaf in jax.tree.leaves(one))
                }
                fields = fields | {"z": sites}
            self._states, self._states_flat = fields, None
            super().print_summary(prob, exclude_deterministic)
        finally:
            self._states, self._states_flat = in_memory, None

    def __getstate__(self) -> dict[str, Any]:
        """As NumPyro's, without what is compiled or traced: the next run, or `advice`, makes it again."""
        draws = self._draws
        if isinstance(draws, Draws):
            draws = dataclasses.replace(
                draws, warmup=without_kernel(draws.warmup), ask=None, scores=None
            )
        return super().__getstate__() | {
            "_known": None,
            "_plan": None,
            "_warmed": without_kernel(self._warmed),
            "_warmed_on": None,
            "_draws": draws,
        }

    @property
    def last_state(self) -> Any:
        """As NumPyro's; `z_grad` is evaluated when this is looked at, and None in an unpickled sampler."""
        return self._with_gradient(self._last_state)

    @property
    def post_warmup_state(self) -> Any:
        """As NumPyro's, `z_grad` as in `last_state`; set it to go on from a state, of this sampler or one of the same sites."""
        return self._with_gradient(self._warmup_state)

    @post_warmup_state.setter
    def post_warmup_state(self, state: Any) -> None:
        self._warmup_state = state

    def _with_gradient(self, state: Any) -> Any:
        """A state with the gradients of the potential energy at its positions, where the target is at hand."""
        if state is None or self._known is None or getattr(state, "z_grad", ()) is not None:
            return state
        positions = with_chains(state.z, self.num_chains)
        slopes = potential_gradients(self._known.target, positions)
        own = slopes if self.num_chains > 1 else jax.tree.map(lambda leaf: leaf[0], slopes)
        full = state._replace(z_grad=own)
        for name in ("_last_state", "_warmup_state"):
            if getattr(self, name) is state:
                setattr(self, name, full)
        return full

    @property
    def chain_method(self) -> Callable:
        """How NumPyro's class sees it: a way of its own, by which all chains are run at once and come first in what is collected."""
        return lambda run_chains: run_chains

    @chain_method.setter
    def chain_method(self, chain_method: str | Callable) -> None:
        """Accepted and ignored.

        Raises:
            ValueError: For anything that is none of NumPyro's.
        """
        if chain_method not in ("parallel", "sequential", "vectorized") and not callable(
            chain_method
        ):
            raise ValueError(
                f"chain_method: got {chain_method!r}, wanted 'parallel', 'sequential', 'vectorized' or a function"
            )

    # --- the method of NumPyro's that moves chains

    def _single_chain_mcmc(self, init, args, kwargs, collect_fields, remove_sites):
        rng_key, state, init_params = init
        keys = keys_of(rng_key)
        init_params = with_chains(init_params, self.num_chains)
        target = self._target(args, kwargs, keys, init_params)
        num_steps = self._collection_params["upper"] - self._collection_params["lower"]
        if state is not None:
            own: dict[str, Any] = {"rng_key": keys if self.num_chains > 1 else keys[0]}
            if hasattr(state, "z_grad"):
                own["z_grad"] = None  # it would be that of the positions before
            state = with_chains(state._replace(**own), self.num_chains)
        if self._store is not None:
            check_fields(collect_fields, self.postprocess_fn)
        arguments = self._arguments(target, keys, num_steps, init_params, state)
        progress = chosen_progress(self.progress_bar)
        if not num_steps:
            # `warmup()` collects nothing.
            plan, chain_state = prepare(arguments, progress)
            self._stored = None
            self._adopt(plan)
            if state is None:
                state = hmc_state(plan, chain_state, self.sampler)
            return empty_collection(state, self.num_chains, ("z", *self._asked))
        plan, draws = run(arguments, progress)
        self._draws, self._stored = draws, None
        self._adopt(plan)
        assert draws.state is not None, "chains that have made steps stand somewhere"
        if isinstance(draws, StoredDraws):
            stands = chain_state_of(draws.state, plan.kernel, target.example())
            last = hmc_state(dataclasses.replace(plan, warmup=None), stands, self.sampler)
            last = last_stored_state(draws, last, stands.num_steps)
            self._stored = (draws, collect_fields, remove_sites, isinstance(last.z, dict))
            self._pool = self._pool_of(plan, jax.tree.map(lambda leaf: leaf[:, None], last.z))
            return empty_collection(last, self.num_chains)
        self._pool = self._pool_of(plan, draws.positions)
        if state is None:
            state = hmc_state(plan, draws.state, self.sampler)
        fields, last = collect(
            draws,
            state,
            self.postprocess_fn,
            collect_fields,
            remove_sites,
            self.thinning,
            functools.partial(potential_gradients, target),
        )
        if self.num_chains == 1:
            return jax.tree.map(lambda leaf: leaf[0], (fields, last))
        return fields, last

    def _arguments(self, target, keys, num_samples, init_params, state):
        return sample_arguments(
            self.sampler,
            target,
            keys,
            self.num_warmup,
            init_params,
            state,
            num_samples=num_samples,
            solver=self.solver,
            schedule=self.schedule,
            thinning=self.thinning,
            certificate=self.certificate,
            store=self._store,
        )

    def _adopt(self, plan: Plan) -> None:
        """Remember the plan, and what its warm-up chose."""
        self._plan, self._advice = plan, None
        self.sampler.adopt(plan.kernel)
        if plan.warmup is not None:
            self._warmed, self._warmed_on = plan.warmup, plan.target

    def _pool_of(self, plan: Plan, positions: PyTree) -> PyTree:
        """Far-apart positions for pilot chains, from the warm-up or from draws `(C, T, ...)`."""
        if self._warmed is not None and self._warmed_on is plan.target:
            return self._warmed.pool
        starts = plan.target.starts(jax.random.split(plan.keys[0]))
        return jax.tree.map(
            lambda a, b: np.concatenate([a, b]), starts, spread_positions(positions)
        )

    def _advise(self) -> Advice:
        if self._advice is None:
            self._advice = advise_plan(self._planned(), self._pool)
        return self._advice

    def _planned(self) -> Plan:
        """The plan of the last run; unpickled, it is made again from the last state."""
        if self._plan is None:
            state = with_chains(self._last_state, self.num_chains)
            target = self._target(self._args, self._kwargs, state.rng_key, state.z)
            arguments = self._arguments(target, state.rng_key, self.draws.num_samples, None, state)
            self._plan = prepare(arguments, chosen_progress(False))[0]
        return self._plan

    def _read_store(self, group_by_chain: bool) -> dict[str, Any] | None:
        """What the last run collected; None where it kept it in memory."""
        if self._stored is None:
            return None
        fields = read_fields(*self._stored)
        return (
            fields if group_by_chain else jax.tree.map(lambda leaf: jnp.concatenate(leaf), fields)
        )

    def _target(self, args: tuple, kwargs: dict, keys: Key, init_params: PyTree) -> Target:
        """The target of these data; the same object for the same data, so that nothing is traced or compiled twice."""
        read = _read_by(self.sampler.model, args, kwargs)
        if self._known is None or not self._known.reading.holds(read):
            start = None if init_params is None else jax.tree.map(lambda leaf: leaf[0], init_params)
            target = self.sampler.target(args, kwargs, first_key(keys), start)
            reading = Reading.around(read, _read_by(self.sampler.model, args, kwargs))
            self._known = _Known(reading, target, self.sampler._posterior)
        self.sampler._posterior = self._known.posterior
        return self._known.target


class _Known(NamedTuple):
    """The target of the last run, and what its model read, data included, when it was made."""

    reading: Reading
    target: Target
    posterior: Any


def _read_by(model: Callable | None, args: tuple, kwargs: dict) -> dict[tuple, Any]:
    """What a model reads, its arguments and the precision included, by content."""

    def bound():
        return model, args, kwargs

    # Of a very long list the reader knows which one it is, not what is in it.
    leaves = jax.tree.leaves((args, kwargs))
    numbers = tuple(leaf for leaf in leaves if isinstance(leaf, int | float))
    others = {(None, "numbers"): numbers, (None, "x64"): jax_config.jax_enable_x64}
    return data_read_by(bound).tokens | others


def _flat(leaf: Any) -> Any:
    """`(C, T, ...)` as `(C T, ...)`, where the host has the numbers without a program."""
    shape = (leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])
    in_place = jax.default_backend() == "cpu" and not getattr(leaf, "committed", False)
    if in_place and not is_key(leaf):
        return jax.device_put(np.asarray(leaf).reshape(shape))
    return jnp.reshape(leaf, shape)
