"""`ParallelMCMC`: NumPyro's `MCMC` with chains solved in parallel time. One line of a script changes.

    mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=1000, num_samples=5000, num_chains=4)

NumPyro's class does everything around the chains (arguments, summaries, resuming, thinning); what is replaced is the
one method that moves them, `_single_chain_mcmc`, which here gets all chains at once whatever `chain_method` says: they
are warmed up together and solved together, so nothing is mapped over devices and no warning appears. The draws are
those of NumPyro's own loop over the same kernel with the same keys, certified; `report` says so, or why not.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Callable

import jax
import jax.numpy as jnp

from partime_mcmc.contracts import check_has
from partime_mcmc.diagnostics.checks import check_count, check_key
from partime_mcmc.kernels import Evidence, Recorded
from partime_mcmc.mcmc.arguments import chosen_progress
from partime_mcmc.mcmc.draws import Draws, End
from partime_mcmc.mcmc.numpyro.collect import collect
from partime_mcmc.mcmc.numpyro.base import ParallelKernel
from partime_mcmc.mcmc.numpyro.report import ParallelReport
from partime_mcmc.mcmc.numpyro.stored import ReadsStore, check_fields, run_on_disk
from partime_mcmc.mcmc.numpyro.warm import begin, kernel_from, keys_of, state_of
from partime_mcmc.mcmc.chains import check_fits, draw_chains, pilot_advice
from partime_mcmc.mcmc.resume import as_store
from partime_mcmc.mcmc.store.stored import StoredDraws
from partime_mcmc.mcmc.stored_run import Store
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.predict.advise import Advice
from partime_mcmc.schedule import Schedule
from partime_mcmc.solution import SolveError
from partime_mcmc.solvers import Solver
from partime_mcmc.types import PyTree


class ParallelMCMC(ReadsStore):
    """NumPyro's `MCMC` with chains solved in parallel time.

    Args:
        sampler: `CoalescingHMC(model)`, `HMC`, `NUTS`, `MALA` of this package, or `BlackJAXKernel(build, model)`.
        num_warmup: Warm-up steps per chain at most; warm-up stops when it is done. 0 adapts nothing.
        num_samples: Draws per chain.
        num_chains: Chains, all advanced together.
        thinning: Of `thinning` draws in a row the last is kept.
        postprocess_fn: As in NumPyro.
        chain_method: Accepted and ignored: chains share all lanes anyway.
        progress_bar: One line per stage on a terminal.
        progress_rate: Accepted and ignored.
        jit_model_args: Accepted and ignored: data are always arguments of what is compiled.
        solver: A recipe; None is shooting with as many segments as fill the device.
        schedule: How time is cut; None is stretches of 16,384 steps.
        certificate: What it rests on, as for `sample`: `Recorded()` or `Independent()`.

    Raises:
        TypeError: If the sampler is not one of ours, or a count has the wrong type.
        ValueError: If a count is out of range.
    """

    def __init__(
        self,
        sampler: ParallelKernel,
        *,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        thinning: int = 1,
        postprocess_fn: Callable | None = None,
        chain_method: str | Callable = "vectorized",
        progress_bar: bool = True,
        progress_rate: int | None = None,
        jit_model_args: bool = False,
        solver: Solver | None = None,
        schedule: Schedule | None = None,
        certificate: Evidence = Recorded(),
    ):
        check_has(certificate, "certificate", ("dynamics",), "Recorded() or Independent()")
        if not isinstance(sampler, ParallelKernel):
            raise TypeError(
                f"sampler: got a {type(sampler).__module__}.{type(sampler).__name__}, wanted one of CoalescingHMC, HMC, "
                "NUTS, MALA or BlackJAXKernel of partime_mcmc"
            )
        super().__init__(
            sampler,
            num_warmup=check_count(num_warmup, "num_warmup", 0),
            num_samples=check_count(num_samples, "num_samples", 1),
            num_chains=check_count(num_chains, "num_chains", 1),
            thinning=check_count(thinning, "thinning", 1),
            postprocess_fn=postprocess_fn,
            chain_method="vectorized",
            progress_bar=progress_bar,
            progress_rate=progress_rate,
            jit_model_args=jit_model_args,
        )
        self.solver, self.schedule, self.certificate = solver, schedule, certificate
        self._targets: dict[Any, Target] = {}
        self._store: Store | None = None
        self._draws: Draws | StoredDraws | None = None
        self._asked: Callable[[], Advice] | None = None
        self._warmed: Warmup | None = None

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

        Raises:
            StoreMismatch, StoreError: As `sample`.
            TypeError, ValueError: For bad keys, fields, starts, or models; see `from_numpyro`.
        """
        if isinstance(rng_key, jax.core.Tracer):
            raise TypeError(
                "rng_key: got a traced value; call run outside jit and vmap (it compiles what it needs itself)"
            )
        shape = getattr(rng_key, "shape", None)
        if self.num_chains == 1 or shape is None or shape in ((), (2,)):
            rng_key = check_key(rng_key, "rng_key")
        elif shape[0] != self.num_chains:
            raise ValueError(
                f"rng_key: got {shape[0]} keys for {self.num_chains} chains; wanted one key, or one per chain"
            )
        if isinstance(extra_fields, str):
            raise TypeError(f"extra_fields: got the string {extra_fields!r}; wanted a tuple of field names")
        self._store = None if store is None else as_store(store)
        try:
            super().run(rng_key, *args, extra_fields=tuple(extra_fields), init_params=init_params, **kwargs)
        finally:
            self._store = None

    @property
    def report(self) -> ParallelReport:
        """What is known of the last run.

        Raises:
            RuntimeError: Before the first run.
        """
        draws = self._need_draws()
        return ParallelReport(draws.report, draws.certificate, draws.warmup, draws.plan)

    @property
    def advice(self) -> Advice:
        """What pilot chains and the cost model say of this posterior; worked out when it is first asked for.

        Raises:
            RuntimeError: Before the first run.
        """
        self._need_draws()
        return self._asked()

    @property
    def draws(self) -> Draws | StoredDraws:
        """The last run as `sample` returns it, in memory unthinned: for `compare`, `to_arviz` and the like.

        Raises:
            RuntimeError: Before the first run.
        """
        return self._need_draws()

    @property
    def warmed(self) -> Warmup | None:
        """The last warm-up: what was chosen, why, and what it cost; None before there was one."""
        return self._warmed

    def _need_draws(self) -> Draws | StoredDraws:
        if self._draws is None:
            raise RuntimeError("run must be called first")
        return self._draws

    def or_raise(self) -> ParallelMCMC:
        """This object, if every chain of the last run is certified and moves.

        Raises:
            SolveError: Naming the first chain that is not.
        """
        self._need_draws().or_raise()
        return self

    # --- the method of NumPyro's that moves chains

    def _single_chain_mcmc(self, init, args, kwargs, collect_fields, remove_sites):
        rng_key, state, init_params = init
        keys, progress = keys_of(rng_key), chosen_progress(self.progress_bar)
        if init_params is not None and self.num_chains == 1:
            init_params = jax.tree.map(lambda leaf: leaf[None], init_params)
        target = self._target(args, kwargs, keys, init_params)
        params = self._collection_params
        num_steps = params["upper"] - params["lower"]
        if state is not None:
            state = (
                state._replace(rng_key=keys)
                if self.num_chains > 1
                else jax.tree.map(lambda leaf: leaf[None], state._replace(rng_key=keys[0]))
            )
        if self._store is not None:
            return self._on_disk(target, keys, state, init_params, num_steps, collect_fields, remove_sites)
        check_fits(target, num_steps, self.num_chains, solver=self.solver, schedule=self.schedule,
                   certificate=self.certificate)
        warmup = None
        if state is None:
            ready = begin(self.sampler, target, keys, self.num_warmup, init_params, progress)
            self._warmed = ready.warmup
            kernel, warmup, state = ready.kernel, ready.warmup, state_of(ready, keys)
        else:
            kernel = kernel_from(self.sampler, target, state)
        self.sampler.adopt(kernel)
        if params["phase"] == "warmup" and num_steps:
            raise ValueError(
                "collect_warmup: got True, wanted False: warm-up pools chains and keeps no draws; see report.warmup"
            )
        if not num_steps:
            # `warmup()` collects nothing.
            self._shelf = None
            return self._nothing(state)
        single = self.num_chains == 1
        pool = state.z if warmup is None else warmup.pool
        draws = draw_chains(
            target,
            kernel,
            state.z,
            keys,
            num_steps,
            warmup=warmup,
            solver=self.solver,
            schedule=self.schedule,
            end=End(state.r, state.adapt_state.discrete, int(state.i[0])),
            certificate=self.certificate,
            progress=progress,
        )
        self._draws, self._shelf = draws, None
        self._asked = functools.cache(functools.partial(pilot_advice, kernel, pool, keys, num_steps))
        fields, last = collect(draws, kernel, state, self.postprocess_fn, collect_fields, remove_sites, self.thinning)
        along = [
            jax.tree.map(lambda leaf: leaf[0] if single else jnp.swapaxes(leaf, 0, 1), value) for value in fields.values()
        ]
        return dict(zip(fields, along)), jax.tree.map(lambda leaf: leaf[0], last) if single else last

    def _on_disk(self, target, keys, state, init_params, num_steps, names, removed):
        """Sample to a store; NumPyro's own memory of the draws stays empty."""
        check_fields(names)
        self._draws, state, kernel = run_on_disk(
            self._store, self.sampler, target, keys, state, init_params, num_steps, self, chosen_progress(self.progress_bar)
        )
        self.sampler.adopt(kernel)
        self._asked = functools.cache(functools.partial(pilot_advice, kernel, state.z, keys, num_steps))
        self._shelf = (self._draws, names, removed)
        return self._nothing(state)

    def _nothing(self, state):
        """No draws, as NumPyro wants them: empty arrays."""
        single = self.num_chains == 1
        shape = (0,) if single else (0, self.num_chains)
        nothing = {"z": jax.tree.map(lambda leaf: jnp.zeros((*shape, *leaf.shape[1:]), leaf.dtype), state.z)}
        return nothing, jax.tree.map(lambda leaf: leaf[0], state) if single else state

    def _target(self, args, kwargs, keys, init_params) -> Target:
        """The target of these data; the same object for the same data, so that nothing is traced or compiled twice."""
        leaves, structure = jax.tree.flatten((args, kwargs))
        entry = (structure, tuple(map(id, leaves)), jax.config.jax_enable_x64)
        if entry not in self._targets:
            first = None if init_params is None else jax.tree.map(lambda leaf: leaf[0], init_params)
            target = self.sampler.target(args, kwargs, keys[0], first)
            # The leaves are kept, so that their ids stay theirs.
            self._targets = {entry: (target, self.sampler._posterior, leaves)}
        target, self.sampler._posterior, _ = self._targets[entry]
        return target


__all__ = ["ParallelMCMC", "ParallelReport", "SolveError"]
