"""`ParallelMCMC`: NumPyro's `MCMC` with chains solved in parallel time. One line of a script changes.

    mcmc = ParallelMCMC(CoalescingHMC(model), num_warmup=1000, num_samples=5000, num_chains=4)

NumPyro's class does everything around the chains (arguments, summaries, resuming, thinning); what is replaced is the
one method that moves them, `_single_chain_mcmc`, which here gets all chains at once whatever `chain_method` says: they
are warmed up together and solved together, so nothing is mapped over devices and no warning appears. The draws are
those of NumPyro's own loop over the same kernel with the same keys, certified; `report` says so, or why not.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.infer.mcmc import MCMCKernel

from partime_mcmc.contracts import check_has
from partime_mcmc.diagnostics.checks import check_count
from partime_mcmc.forgetting.advise import Advice
from partime_mcmc.kernels import Evidence, Recorded
from partime_mcmc.mcmc.arguments import chosen_progress
from partime_mcmc.mcmc.chains import check_fits, draw_chains, pilot_advice
from partime_mcmc.mcmc.draws import Draws, End
from partime_mcmc.mcmc.numpyro.arguments import check_keys, check_leading
from partime_mcmc.mcmc.numpyro.collect import collect, far_apart, nothing, with_chains
from partime_mcmc.mcmc.numpyro.data import Data
from partime_mcmc.mcmc.numpyro.report import ParallelReport, without_kernel
from partime_mcmc.mcmc.numpyro.stored import ReadsStore, check_fields, run_on_disk
from partime_mcmc.mcmc.numpyro.theirs import ours
from partime_mcmc.mcmc.numpyro.warm import begin, kernel_from, keys_of, state_of
from partime_mcmc.mcmc.resume import as_store
from partime_mcmc.mcmc.store.stored import StoredDraws
from partime_mcmc.mcmc.stored_run import Store
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.schedule import Schedule
from partime_mcmc.solution import SolveError
from partime_mcmc.solvers import Solver
from partime_mcmc.types import PyTree


class ParallelMCMC(ReadsStore):
    """NumPyro's `MCMC` with chains solved in parallel time.

    Args:
        sampler: `CoalescingHMC(model)`, `HMC`, `NUTS`, `MALA` of this package, `BlackJAXKernel(build, model)`, or
            NumPyro's own `HMC` or `NUTS`, for which ours stand in (see `theirs`).
        num_warmup: Warm-up steps per chain at most, but 20; warm-up stops when it is done. 0 adapts nothing.
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
        TypeError: If the sampler is none of these, or a count has the wrong type.
        ValueError: If a count is out of range, or a kernel of NumPyro's has a setting that ours lack.
    """

    def __init__(
        self,
        sampler: MCMCKernel,
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
        super().__init__(
            ours(sampler),
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
        self._known: tuple[Data, Target, Any] | None = None
        self._store: Store | None = None
        self._draws: Draws | StoredDraws | None = None
        self._asked: Callable[[], Advice] | None = None
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

        Raises:
            StoreMismatch, StoreError: As `sample`.
            TypeError, ValueError: For bad keys, fields, starts, or models; see `from_numpyro`.
        """
        rng_key = check_keys(rng_key, self.num_chains)
        check_leading(init_params, self.num_chains)
        if isinstance(extra_fields, str):
            raise TypeError(
                f"extra_fields: got the string {extra_fields!r}; wanted a tuple of field names"
            )
        self._store = None if store is None else as_store(store)
        try:
            super().run(
                rng_key, *args, extra_fields=tuple(extra_fields), init_params=init_params, **kwargs
            )
        finally:
            self._store = None

    @property
    def report(self) -> ParallelReport:
        """What is known of the last run.

        Raises:
            RuntimeError: Before the first run.
        """
        draws = self._need_draws()
        needed = self.solver is None and draws.report.fallbacks
        return ParallelReport(
            draws.report,
            draws.certificate,
            draws.warmup,
            draws.plan,
            self._advise() if needed else None,
        )

    @property
    def advice(self) -> Advice:
        """What pilot chains and the cost model say of this posterior; worked out when it is first asked for.

        Raises:
            RuntimeError: Before the first run.
        """
        self._need_draws()
        return self._advise()()

    def _advise(self) -> Callable[[], Advice]:
        if self._asked is None:
            # Unpickled: the kernel is made again from the last state.
            state = with_chains(self.last_state, self.num_chains)
            target = self._target(self._args, self._kwargs, state.rng_key, state.z)
            kernel = kernel_from(self.sampler, target, state)
            self._ask_later(kernel, self._pool, state.rng_key, self._draws.plan["num_samples"])
        return self._asked

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

    def __getstate__(self) -> dict[str, Any]:
        """As NumPyro's, without what is compiled or traced: the next run, or `advice`, makes it again."""
        dropped = {
            "_known": None,
            "_asked": None,
            "_warmed": without_kernel(self._warmed),
            "_warmed_on": None,
        }
        draws = self._draws
        if isinstance(draws, Draws):
            draws = dataclasses.replace(draws, warmup=without_kernel(draws.warmup))
        return super().__getstate__() | dropped | {"_draws": draws}

    # --- the method of NumPyro's that moves chains

    def _single_chain_mcmc(self, init, args, kwargs, collect_fields, remove_sites):
        rng_key, state, init_params = init
        keys, progress = keys_of(rng_key), chosen_progress(self.progress_bar)
        init_params = with_chains(init_params, self.num_chains)
        target = self._target(args, kwargs, keys, init_params)
        params = self._collection_params
        num_steps = params["upper"] - params["lower"]
        if state is not None:
            state = with_chains(
                state._replace(rng_key=keys if self.num_chains > 1 else keys[0]), self.num_chains
            )
        if self._store is not None:
            return self._on_disk(
                target, keys, state, init_params, num_steps, collect_fields, remove_sites
            )
        check_fits(
            target,
            num_steps,
            self.num_chains,
            solver=self.solver,
            schedule=self.schedule,
            certificate=self.certificate,
        )
        warmup = None
        if state is None:
            ready = begin(self.sampler, target, keys, self.num_warmup, init_params, progress)
            kernel, warmup, state = ready.kernel, ready.warmup, state_of(ready, keys)
            self._warmed, self._warmed_on = warmup, target
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
            return nothing(state, self.num_chains)
        end = End(state.r, state.adapt_state.discrete, int(np.asarray(state.i)[0]))
        # Without a solver the default one runs at once, unlike in `sample`: pilots are compiled for seconds, which would be
        # most of a short run. Where it had to give up, `report` asks for the advice afterwards.
        draws = draw_chains(
            target,
            kernel,
            state.z,
            keys,
            num_steps,
            warmup=warmup,
            solver=self.solver,
            schedule=self.schedule,
            end=end,
            certificate=self.certificate,
            progress=progress,
        )
        self._draws, self._shelf = draws, None
        known = self._warmed if self._warmed_on is target else None
        self._ask_later(
            kernel,
            far_apart(state.z, draws.positions) if known is None else known.pool,
            keys,
            num_steps,
        )
        fields, last = collect(
            draws, kernel, state, self.postprocess_fn, collect_fields, remove_sites, self.thinning
        )
        if self.num_chains == 1:
            return jax.tree.map(lambda leaf: leaf[0], (fields, last))
        return _swapped(fields), last

    def _on_disk(self, target, keys, state, init_params, num_steps, names, removed):
        """Sample to a store; NumPyro's own memory of the draws stays empty."""
        check_fields(names)
        self._draws, state, kernel, pool = run_on_disk(
            self._store,
            self.sampler,
            target,
            keys,
            state,
            init_params,
            num_steps,
            self,
            chosen_progress(self.progress_bar),
        )
        self.sampler.adopt(kernel)
        self._ask_later(kernel, pool, keys, num_steps)
        self._shelf = (self._draws, names, removed)
        return nothing(state, self.num_chains)

    def _ask_later(self, kernel, pool, keys, num_steps):
        self._pool = pool
        self._asked = functools.cache(
            functools.partial(pilot_advice, kernel, pool, keys, num_steps)
        )

    def _target(self, args, kwargs, keys, init_params) -> Target:
        """The target of these data; the same object for the same data, so that nothing is traced or compiled twice."""
        if self._known is None or not self._known[0].are(args, kwargs):
            first = None if init_params is None else jax.tree.map(lambda leaf: leaf[0], init_params)
            target = self.sampler.target(args, kwargs, keys[0], first)
            self._known = (Data.of(args, kwargs), target, self.sampler._posterior)
        _, target, self.sampler._posterior = self._known
        return target


@jax.jit
def _swapped(fields: PyTree) -> PyTree:
    """Leaves `(C, T, ...)` as `(T, C, ...)`, as NumPyro collects them."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), fields)


__all__ = ["ParallelMCMC", "ParallelReport", "SolveError"]
