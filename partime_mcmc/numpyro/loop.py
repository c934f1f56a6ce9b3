"""NumPyro's kernels that have no form in parallel time: its own loop over them, judged as every run here.

A chain can be solved for as a whole where each step is a function of the state and of random numbers fixed beforehand, and
where chains forget their past under shared random numbers. Gibbs moves on discrete sites, ensembles, and kernels that go on
adapting while they sample split their keys from state to state and do not meet; solving for their chains would take more
work than stepping through them. They are stepped through, by NumPyro itself, draw for draw as its `MCMC` has them; what is
added is the verdict on the posterior, from R-hat, effective sample sizes, divergences and energies.
"""

import dataclasses
from typing import Any, Callable, Self

import numpy as np
from numpyro.infer import MCMC
from numpyro.infer.mcmc import MCMCKernel

from partime_mcmc.diagnostics.values import flat
from partime_mcmc.diagnostics.verdict import Verdict, judge_values
from partime_mcmc.types import PyTree
from partime_mcmc.validation import check_count, check_outside_transforms

# What is asked of a solve, and what a solve leaves behind.
_OF_A_SOLVE = ("solver", "schedule", "certificate")


@dataclasses.dataclass(frozen=True)
class LoopReport:
    """What is known of a run of NumPyro's own loop.

    Attributes:
        kernel: The name of the kernel's class.
        verdict: Whether the draws can be taken for the posterior's, and why.
        num_gradients: Leapfrog steps of all kept draws, if `num_steps` was collected; None otherwise.
    """

    kernel: str
    verdict: Verdict
    num_gradients: int | None

    @property
    def parallel(self) -> bool:
        """Whether the chains were solved in parallel time: they were not."""
        return False

    def __str__(self) -> str:
        return (
            f"{self.verdict}\nNumPyro's own loop over {self.kernel}, one step after another: this kernel has no form in "
            "parallel time here, so there was nothing to solve and there is no certificate."
        )


class LoopMCMC(MCMC):
    """NumPyro's `MCMC` with a report: what `ParallelMCMC` gives for kernels that have no form in parallel time.

    Args:
        sampler: A kernel of NumPyro's, or of the user's own.
        num_warmup: As in NumPyro.
        num_samples: As in NumPyro.
        num_chains: As in NumPyro.
        chain_method: As in NumPyro; None is "vectorized" for ensembles of chains and "sequential" for others.
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
        **options: Any,
    ):
        for name in _OF_A_SOLVE:
            if options.pop(name, None) is not None:
                raise ValueError(
                    f"{name}: got one with {type(sampler).__name__}, wanted none: NumPyro's own loop runs this kernel, and "
                    "nothing is solved in parallel time"
                )
        if chain_method is None:
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
