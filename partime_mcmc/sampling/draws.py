"""What sampling returns: draws, their certificate, and how they came about.

Arrays have chains first and time second, `(C, T, ...)`, as ArviZ wants them. Draws on disk (`storage.stored_draws`) have
the same attributes.
"""

import dataclasses
import functools
import os
from typing import Any, Callable, Mapping, Self, Sequence

import jax
import numpy as np

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.diagnostics.arviz import draws_dataset, stats_dataset, to_arviz
from partime_mcmc.diagnostics.verdict import Verdict, verdict_of
from partime_mcmc.engine import SolveError, Status
from partime_mcmc.forgetting.advise import Advice
from partime_mcmc.sampling.chunk import ChainState, RunReport
from partime_mcmc.types import AnyArray, PyTree
from partime_mcmc.warmup.warmup import Warmup

_HARDLY_ACCEPTS, _ENOUGH_STEPS = 0.98, 50


@dataclasses.dataclass(frozen=True, repr=False)
class Draws:
    """The draws of some chains, in memory.

    Attributes:
        positions: Unconstrained, leaves `(C, T, ...)`.
        constrained: Named values in the model's space, `(C, T, ...)`.
        info: What the kernel reports of each step, `(C, T)`: of `accepted`, `acceptance_rate`, `diverging`, `energy`,
            `num_steps`, `logdensity`, `residual` those that there are.
        certificate: One entry per chain.
        report: How the run went.
        plan: Plain values that, with the same target and versions, give the same draws again.
        warmup: The warm-up, None if the kernel came tuned.
        dims: Axis names of constrained values.
        names: The constrained values worth showing; None: all.
        state: Where the chains stand after the last draw.
        ask: Works out the advice; see `advice`.
        scores: From positions, leaves `(N, ...)`, to these as rows and the gradients of the log density there, `(N, D)` each:
            the verdict looks at some. None where the density is not at hand.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target, mala, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> draws = sample(jax.random.key(0), target, kernel, num_samples=500)
        >>> bool(draws.certificate.certified.all()), draws.posterior["x"].shape
        (True, (4, 500))
    """

    positions: PyTree
    constrained: Mapping[str, AnyArray]
    info: Mapping[str, AnyArray]
    certificate: Certificate
    report: RunReport
    plan: dict[str, Any]
    warmup: Warmup | None = None
    dims: Mapping[str, Sequence[str]] | None = None
    names: tuple[str, ...] | None = None
    state: ChainState | None = None
    ask: Callable[[], Advice] | None = dataclasses.field(default=None, compare=False)
    scores: Callable[[PyTree], tuple[np.ndarray, np.ndarray]] | None = dataclasses.field(
        default=None, compare=False
    )

    @property
    def num_samples(self) -> int:
        """T."""
        return self.certificate.residual.shape[1]

    @property
    def num_chains(self) -> int:
        """C."""
        return self.certificate.residual.shape[0]

    @property
    def finished(self) -> bool:
        """Whether all draws that were asked for are there."""
        return not self.report.interrupted

    @property
    def status(self) -> tuple[Status, ...]:
        """One verdict per chain."""
        return self.report.status

    @property
    def warmup_notes(self) -> str:
        """What the warm-up says of itself; empty if there was none."""
        return str(self.warmup or "")

    @functools.cached_property
    def verdict(self) -> Verdict:
        """Whether these draws can be taken for the posterior's, and why."""
        return verdict_of(self)

    @functools.cached_property
    def posterior(self) -> Any:
        """Named values in the model's space, an `xarray.Dataset` with the dimensions `chain` and `draw` first."""
        return draws_dataset(self.constrained, self.dims)

    @functools.cached_property
    def sample_stats(self) -> Any:
        """What the kernel reports of each step, likewise, by ArviZ's names."""
        return stats_dataset(self.info)

    @property
    def advice(self) -> Advice | None:
        """Whether chains like these forget, and what solver suits them: pilot chains are run when this is looked at.

        None for draws that do not know their kernel any more.
        """
        return None if self.ask is None else self.ask()

    def to_arviz(self) -> Any:
        """The draws as ArviZ knows them: `InferenceData` with ArviZ 0.23, `xarray.DataTree` with ArviZ 1.x."""
        return to_arviz(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one HTML file with the report, a summary and figures.

        Args:
            path: Of the file, such as `run.html`.
        """
        from partime_mcmc.diagnostics.describe import save_page

        save_page(path, self)

    def or_raise(self) -> Self:
        """These draws, if every chain is certified, finite and moving, and the verdict is not NOT CONVERGED.

        Raises:
            SolveError: Naming the first chain that is not, and why.
            NotConverged: With the grounds of the verdict.
        """
        raise_unless_good(self.report.status, self.certificate)
        self.verdict.or_raise()
        return self

    def __repr__(self) -> str:
        names = list(self.constrained)
        some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"Draws({self.verdict.outcome.value}; {self.num_chains} chains x {self.num_samples:,} draws of {some}; {self})"

    def __str__(self) -> str:
        before = f"interrupted after {self.num_samples:,} draws per chain; "
        return ("" if self.finished else before) + certified_sentence(self.certificate, self.report)

    def _repr_html_(self) -> str:
        from partime_mcmc.diagnostics.describe import draws_html

        return draws_html(self)


def certified_sentence(certificate: Certificate, report: RunReport) -> str:
    """What was certified, in one sentence.

    Args:
        certificate: One entry per chain.
        report: How the run went.
    """
    certified = np.asarray(certificate.certified)
    what = (
        "all chains certified"
        if certified.all()
        else f"{int(certified.sum())} of {certified.size} chains certified"
    )
    residual = float(np.max(np.asarray(certificate.max_residual), initial=0))
    return (
        f"{what}: largest residual {residual:.1e} noise units, {report.evaluations_per_sample:.1f} evaluations per draw, "
        f"{len(report.fallbacks)} sequential fallbacks"
    )


def raise_unless_good(status: tuple[Status, ...], certificate: Certificate) -> None:
    """Refuse chains that are not certified, finite and moving.

    Args:
        status: One verdict per chain.
        certificate: One entry per chain.

    Raises:
        SolveError: Naming the first bad chain, and why.
    """
    for chain, verdict in enumerate(status):
        if verdict != Status.CONVERGED:
            raise SolveError(f"{verdict.name}: chain {chain}: {verdict.message}")
        if not bool(np.asarray(certificate.certified)[chain]):
            step = int(np.asarray(certificate.worst_step)[chain])
            if np.asarray(certificate.max_residual)[chain] == np.inf:
                raise SolveError(
                    f"NOT CERTIFIED: chain {chain}: step {step}, evaluated once more, gave something else: is the log "
                    "density random away from the start? Take random numbers and subsampling out of it"
                )
            raise SolveError(
                f"NOT CERTIFIED: chain {chain}: the largest residual is "
                f"{float(np.asarray(certificate.max_residual)[chain]):.3g} noise units at step {step}, wanted at most "
                f"{float(np.asarray(certificate.tolerance)[chain]):.1g}; use float64 or a smaller tolerance"
            )


def hardly_moves(certificate: Certificate, num_samples: int) -> str | None:
    """A warning about chains that accept next to nothing: they are exact, and useless.

    Args:
        certificate: One entry per chain.
        num_samples: Draws per chain.
    """
    rejected = np.asarray(certificate.num_rejected)
    few = (rejected >= 0) & (rejected > _HARDLY_ACCEPTS * num_samples)
    if num_samples < _ENOUGH_STEPS or not few.any():
        return None
    return (
        f"chains {np.flatnonzero(few).tolist()} accepted less than 2% of their proposals "
        f"({int(np.asarray(certificate.num_nonfinite_proposals)[few].sum())} of which were out of range): the "
        "draws are exact and say little; look for an improper posterior, a bad start or a step size that is too large"
    )


_NUM_POOL = 32


def spread_positions(positions: PyTree) -> PyTree:
    """Some draws, leaves `(K, ...)`, far apart: neighbours come from different chains, and different times of one.

    Args:
        positions: Leaves `(C, T, ...)`, T at least 1.
    """
    num_chains, num_steps = jax.tree.leaves(positions)[0].shape[:2]
    count = max(2, min(_NUM_POOL, num_chains * num_steps))
    chains, steps = np.arange(count) % num_chains, np.linspace(num_steps - 1, 0, count).astype(int)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[chains, steps], positions)
