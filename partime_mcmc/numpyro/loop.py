"""NumPyro's other kernels: its own loop over them, or their chains solved in parallel time, judged as every run here.

A chain can be solved for as a whole where each step is a function of the state and of random numbers fixed beforehand, and
where chains forget their past under shared random numbers. `DiscreteHMCGibbs`, `HMCGibbs` and `MixedHMC` do (`benchmarks.numpyro_kernels`);
`SA`, `BarkerMH` and ensembles do not. Without a `solver` all are stepped through by NumPyro itself, draw for draw as its `MCMC` has
them: on a processor with few cores nothing else is as fast. With a solver, warm-up is NumPyro's, and the chain after it is solved for
(`transition`); where it cannot be, NumPyro's loop runs it after all and the report says why. What is added is the verdict on
the posterior, from R-hat, effective sample sizes, divergences and energies.
"""

import dataclasses
from typing import Any, Callable, Self

import jax
import numpy as np
from numpyro.infer import MCMC, NUTS
from numpyro.infer.mcmc import MCMCKernel, _collect_and_postprocess

from partime_mcmc.diagnostics.values import flat
from partime_mcmc.diagnostics.verdict import Verdict, judge_values
from partime_mcmc.numpyro.transition import NoParallelForm, Solved, Transition
from partime_mcmc.sampling.target import Target
from partime_mcmc.solvers import Solver
from partime_mcmc.types import Key, PyTree, is_key
from partime_mcmc.validation import check_count, check_outside_transforms

# What is asked of kernels of this package alone.
_OF_OWN_KERNELS = ("schedule", "certificate")


@dataclasses.dataclass(frozen=True)
class LoopReport:
    """What is known of a run of NumPyro's own loop.

    Attributes:
        kernel: The name of the kernel's class.
        verdict: Whether the draws can be taken for the posterior's, and why.
        num_gradients: Leapfrog steps of all kept draws, if `num_steps` was collected; None otherwise.
        solved: Of each chain that was solved in parallel time, what that took.
        notes: Why chains were not, where a solver was given.
    """

    kernel: str
    verdict: Verdict
    num_gradients: int | None
    solved: tuple[Solved, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def parallel(self) -> bool:
        """Whether all chains were solved in parallel time."""
        return bool(self.solved) and not self.notes

    def __str__(self) -> str:
        lines = [str(self.verdict)]
        if self.solved:
            passes = max(one.passes for one in self.solved)
            work = np.mean([one.evaluations_per_draw for one in self.solved])
            residual = max(one.residual for one in self.solved)
            lines.append(
                f"{len(self.solved)} chains of {self.kernel} solved in parallel time: {passes} passes at most, {work:.1f} evaluations "
                f"per draw, largest residual {residual:.1e}."
            )
        lines += self.notes
        if not self.solved and not self.notes:
            lines.append(
                f"NumPyro's own loop over {self.kernel}, one step after another; there was nothing to solve, and there is no "
                "certificate. solver=shooting() asks for parallel time."
            )
        return "\n".join(lines)


class LoopMCMC(MCMC):
    """NumPyro's `MCMC` with a report: what `ParallelMCMC` gives for kernels that have no form in parallel time.

    Args:
        sampler: A kernel of NumPyro's, or of the user's own.
        num_warmup: As in NumPyro.
        num_samples: As in NumPyro.
        num_chains: As in NumPyro.
        chain_method: As in NumPyro; None is "vectorized" for ensembles of chains and "sequential" for others. Chains that are solved
            are so one after another.
        solver: How chains are solved in parallel time after NumPyro's warm-up, `shooting()` for one; None steps through them.
        **options: NumPyro's further arguments.

    Raises:
        TypeError: If a count has the wrong type, or the sampler is no kernel.
        ValueError: If a count is out of range, or an argument belongs to solving in parallel time.
    """

    def __init__(
        self,
        sampler: MCMCKernel,
        *,
        num_warmup: int,
        num_samples: int,
        num_chains: int = 1,
        chain_method: str | Callable | None = None,
        solver: Solver | None = None,
        **options: Any,
    ):
        for name in _OF_OWN_KERNELS:
            if options.pop(name, None) is not None:
                raise ValueError(
                    f"{name}: got one with {type(sampler).__name__}, wanted none: NumPyro's own loop runs this kernel, and "
                    "nothing is solved in parallel time"
                )
        if solver is not None and sampler.is_ensemble_kernel:
            raise ValueError(
                f"solver: got one with {type(sampler).__name__}, wanted none: its chains move together, as one ensemble"
            )
        if chain_method is None or solver is not None:
            chain_method = "vectorized" if sampler.is_ensemble_kernel else "sequential"
        super().__init__(
            sampler,
            num_warmup=check_count(num_warmup, "num_warmup", 0),
            num_samples=check_count(num_samples, "num_samples", 1),
            num_chains=check_count(num_chains, "num_chains", 1),
            chain_method=chain_method,  # pyright: ignore[reportArgumentType]  NumPyro takes functions, too
            **options,
        )
        self._report: LoopReport | None = None
        self._solver, self._solved, self._notes = solver, [], []
        self._transition: Transition | None = None

    def _single_chain_mcmc(self, init, args, kwargs, collect_fields, remove_sites):
        """As NumPyro's, which runs one chain; after its warm-up the chain is solved for if a solver was given."""
        if self._solver is None or self._collection_params["phase"] == "warmup":
            return super()._single_chain_mcmc(init, args, kwargs, collect_fields, remove_sites)
        warm = self._after_warmup(init, args, kwargs)
        num_steps = self._collection_params["upper"] - self._collection_params["lower"]
        try:
            if self._transition is None:
                self._transition = Transition(
                    lambda state: self.sampler.sample(state, args, kwargs), warm, self._sample_field
                )
            path, solved = self._transition.solved(warm, num_steps, self._solver)
        except NoParallelForm as error:
            self._notes.append(
                f"NumPyro's own loop ran a chain of {type(self.sampler).__name__}: {error}."
            )
            return super()._single_chain_mcmc(init, args, kwargs, collect_fields, remove_sites)
        self._solved.append(solved)
        first = num_steps % self.thinning + self.thinning - 1
        kept = jax.tree.map(lambda leaf: leaf[first :: self.thinning], path)
        postprocess = self._get_cached_fns()[1]
        fields = jax.vmap(_collect_and_postprocess(postprocess, collect_fields, remove_sites))(
            (kept,)
        )
        fields = fields if len(collect_fields) > 1 else (fields,)
        return dict(zip(collect_fields, fields)), jax.tree.map(lambda leaf: leaf[-1], path)

    def _after_warmup(self, init, args, kwargs) -> PyTree:
        """The state of one chain after warm-up: the one that was given, or where NumPyro's warm-up ends."""
        if init[1] is not None:
            return init[1]
        asked = dict(self._collection_params)
        self._set_collection_params(self.num_warmup, self.num_warmup, self.num_samples, "warmup")
        try:
            return super()._single_chain_mcmc(init, args, kwargs, (self._sample_field,), ())[1]
        finally:
            self._collection_params.update(asked)

    def run(
        self,
        rng_key: Any,
        *args: Any,
        extra_fields: tuple | list = (),
        init_params: PyTree = None,
        store: None = None,
        **kwargs: Any,
    ) -> None:
        """As NumPyro's.

        Warns:
            NotConvergedWarning: Where the draws are not the posterior's; see `report.verdict`.

        Raises:
            ValueError: For a store.
        """
        check_outside_transforms(
            "run", rng_key=rng_key, args=args, init_params=init_params, **kwargs
        )
        if store is not None:
            raise ValueError(
                f"store: got one with {type(self.sampler).__name__}, wanted None: NumPyro's own loop runs this kernel and "
                "keeps its draws in memory"
            )
        self._solved, self._notes, self._transition = [], [], None
        if self._solver is not None and not is_key(rng_key):
            # By their type keys are told from counters; the random numbers are the same.
            rng_key = jax.random.wrap_key_data(jax.numpy.asarray(rng_key))
        super().run(rng_key, *args, extra_fields=extra_fields, init_params=init_params, **kwargs)
        self._report = None
        if self._collection_params["phase"] != "warmup":
            self.report.verdict.warn()

    @property
    def report(self) -> LoopReport:
        """What is known of the last run.

        Raises:
            RuntimeError: Before the first run.
        """
        if self._states is None:
            raise RuntimeError("run must be called first")
        if self._report is None:
            info = {
                name.rpartition(".")[2]: np.asarray(value)
                for name, value in self.get_extra_fields(group_by_chain=True).items()
            }
            values = flat(self.get_samples(group_by_chain=True))
            values = {name or "x": value for name, value in values.items() if value.size}
            steps = info.get("num_steps")
            self._report = LoopReport(
                type(self.sampler).__name__,
                judge_values(values, info),
                None if steps is None else int(steps.sum()),
                tuple(self._solved),
                tuple(dict.fromkeys(self._notes)),
            )
        return self._report

    def or_raise(self) -> Self:
        """This object, if the verdict on the last run is not NOT CONVERGED.

        Raises:
            NotConverged: With the grounds of the verdict.
        """
        self.report.verdict.or_raise()
        return self

    def print_summary(self, prob: float = 0.9, exclude_deterministic: bool = True) -> None:
        """The verdict, then as NumPyro's."""
        if self._states is not None:
            print(self.report.verdict)
        super().print_summary(prob, exclude_deterministic)

    @property
    def draws(self) -> Any:
        """Draws as `sample` returns them: there are none of NumPyro's own loop.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(
            f"draws: NumPyro's own loop ran {type(self.sampler).__name__}; its draws are had by get_samples()"
        )


def nuts_positions(
    target: Target, key: Key, num_warmup: int, num_samples: int, num_chains: int
) -> PyTree:
    """Draws of NumPyro's NUTS with default settings, chains vectorized: what a run is compared with.

    Args:
        target: What to sample.
        key: PRNG key, shape ().
        num_warmup: Steps of warm-up per chain.
        num_samples: T.
        num_chains: C.

    Returns:
        Unconstrained positions, leaves `(C, T, ...)`, ready.
    """
    starts = target.starts(jax.random.split(key, num_chains))
    if num_chains == 1:
        starts = jax.tree.map(lambda leaf: leaf[0], starts)
    mcmc = MCMC(
        NUTS(potential_fn=lambda position: -target.logdensity(position)),
        num_warmup=num_warmup,
        num_samples=num_samples,
        num_chains=num_chains,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.run(key, init_params=starts)
    return jax.block_until_ready(mcmc.get_samples(group_by_chain=True))
