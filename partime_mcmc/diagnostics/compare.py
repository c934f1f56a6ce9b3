"""Does a chain solved in parallel agree with a sequential one? Step by step if that can be asked, in distribution else.

With the random numbers ``u_t`` drawn the chain ``x_t = f(x_{t-1}, u_t)`` has one solution, so agreement is a matter of paths. Runs
*share their random numbers* if their plans agree on key, numbers of samples and chains (and on kernel, coupling, thinning
and warm-up as far as both have them) and their states have one dtype. The levels:

* ``FAIL``: a chain of either side is not finite or never moved, or different keys gave one and the same path.
* ``BITWISE``: every state holds the same bits.
* ``CERTIFIED_PATH``: the parallel run's certificate holds for every chain, the random numbers are shared, and the
  paths are the same: within 1e-3 posterior sd at every step, with equal accept decisions, means and sds equal to 0.1 MCSE.
  A batched and an unbatched ``f`` round differently, so in float32 a decision on a knife's edge falls the other way now
  and then; both paths then obey the recurrence, and on a forgetful chain they meet again. Such excursions are allowed,
  and counted, if (a) every one of them has re-merged by the last step, (b) there are no more of them than rounding
  explains (the 99.9% quantile of a Poisson count with 5e-4 a step in float32, none in float64), (c) the paired test of
  means and sds still holds, (d) no distributional test fails. If not, the certificate may well be right (in chaos two
  paths of exact residual differ everywhere), but no claim about *this* sequential chain is left, and:
* ``STATISTICAL``, ``INCONCLUSIVE`` or ``FAIL``: the outcome of the distributional tests, which is all there is to ask of
  runs with different random numbers. Four chains and a bulk and tail ESS of 400 a side are required first, else ``INCONCLUSIVE``.

The certificate is a claim about the parallel path alone; the sequential run is a second witness, and may refute it.
z-scores, Kolmogorov-Smirnov and joint test each err with probability ``family_alpha`` at most, and a pass is worth what
``min_detectable_shift`` states (:mod:`partime_mcmc.diagnostics.distribution` has the tests).
"""

from typing import Any

import numpy as np

from partime_mcmc.diagnostics.distribution import Distribution, compare_distributions
from partime_mcmc.diagnostics.paths import (
    PATH_TOLERANCE,
    Side,
    compare_paths,
    equal_bits,
    plan_entry,
    same_random_numbers,
)
from partime_mcmc.diagnostics.report import Level, PathComparison, Report


def compare(parallel: Any, sequential: Any, *, family_alpha: float = 1e-3) -> Report:
    """Judge how well a parallel run agrees with a sequential one; the module's docstring has the rules.

    Args:
        parallel: draws with ``constrained`` or ``positions`` (C, T, ...), and ``certificate``, ``info``, ``plan`` and
            ``report`` as far as there are any; without a certificate or a plan no path can be certified.
        sequential: likewise; its certificate is not looked at. Same random numbers or not, as many draws or not.
        family_alpha: probability with which each family of tests may fail on runs of the same law.

    Returns:
        The finding. It never raises for runs that disagree: ask ``.ok`` or ``.or_raise()``.

    Raises:
        ValueError: if ``family_alpha`` is not in (0, 1), a side holds no draws, or the sides share no coordinate.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import Target, compare, mala, sample, sequential
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> draws = sample(jax.random.key(0), target, kernel, num_samples=500)
        >>> loop = sample(jax.random.key(0), target, kernel, num_samples=500, solver=sequential())
        >>> compare(draws, loop).ok
        True
    """
    if not 0 < family_alpha < 1:
        raise ValueError(f"family_alpha must lie between 0 and 1, got {family_alpha}")
    ours, theirs = Side.of(parallel, "parallel"), Side.of(sequential, "sequential")
    names = [name for name in ours.named if name in theirs.named]
    if not names:
        raise ValueError(
            f"the runs share no coordinate: {list(ours.named)[:5]} and {list(theirs.named)[:5]}"
        )
    faults = _faults(ours) + _faults(theirs)
    distribution, path = Distribution([], [], [], {}, [], None, float("nan")), None
    if not faults:
        distribution = compare_distributions(ours, theirs, names, family_alpha)
        if same_random_numbers(ours, theirs):
            path = compare_paths(ours, theirs, distribution.table)
    level, reasons = _judge(ours, theirs, faults, path, distribution)
    notes = distribution.notes + _notes(ours, theirs, path)
    if level >= Level.CERTIFIED_PATH:
        # Equal states cannot fail a test, but what was recorded along with them can.
        notes += [f"although the paths agree: {failure}" for failure in distribution.failures]
    return _report(ours, theirs, level, reasons, notes, path, distribution)


def _faults(side: Side) -> list[str]:
    kinds = {"hold values that are not finite": side.nonfinite, "never moved": side.frozen}
    return [
        f"{side.title}: chains {np.flatnonzero(chains).tolist()} {what}"
        for what, chains in kinds.items()
        if chains.any()
    ]


def _judge(
    ours: Side,
    theirs: Side,
    faults: list[str],
    path: PathComparison | None,
    distribution: Distribution,
) -> tuple[Level, list[str]]:
    """The level and why it is not a better one."""
    if faults:
        return Level.FAIL, faults
    if equal_bits(ours, theirs).all():
        keys = plan_entry(ours, "key"), plan_entry(theirs, "key")
        if None not in keys and keys[0] != keys[1]:
            return Level.FAIL, [
                "different keys gave the same path bit for bit: the keys were not used"
            ]
        # Equal positions are to be turned into equal values, up to rounding.
        if not all(
            np.allclose(ours.named[name], b, rtol=PATH_TOLERANCE, atol=PATH_TOLERANCE * b.std())
            for name, b in theirs.named.items()
            if name in ours.named
        ):
            return Level.FAIL, [
                "the positions are equal bit for bit, but the values in the model's space are not"
            ]
        return Level.BITWISE, []
    reasons = _path_reasons(ours, path)
    if path and not reasons and (path.num_knife_edges == 0 or not distribution.failures):
        return Level.CERTIFIED_PATH, ["some steps differ in their last bits"]
    reasons += distribution.failures + distribution.gates
    if distribution.gates:
        return Level.INCONCLUSIVE, reasons
    return (Level.FAIL if distribution.failures else Level.STATISTICAL), reasons


def _path_reasons(ours: Side, path: PathComparison | None) -> list[str]:
    """Why no path is certified; none if and only if it is."""
    certificate = getattr(ours.draws, "certificate", None)
    certified = True if certificate is None else certificate.certified
    missing = np.flatnonzero(~np.asarray(certified, bool)).tolist()
    findings = [
        (certificate is None, "the parallel run has no certificate"),
        (missing, f"the certificate does not hold for chains {missing}"),
    ]
    if path is None:
        findings += [
            (True, "the runs do not share their random numbers, so there is no path to compare")
        ]
    else:
        flips, unmerged = max(sum(path.num_flips), 0), sum(path.num_unmerged)
        findings += [
            (
                path.num_knife_edges > path.max_knife_edges,
                f"{sum(path.num_excursions)} excursions and {flips} different accept decisions, where rounding explains"
                f" {path.max_knife_edges}: not the same recurrence, or a chaotic one",
            ),
            (unmerged, f"in {unmerged} chains the paths are apart at the last step"),
            (
                not path.paired_ok,
                f"means differ by {path.mean_shift:.2g} MCSE and sds by {path.sd_shift:.2g}, allowed 0.1",
            ),
        ]
    return [text for found, text in findings if found]


def _notes(ours: Side, theirs: Side, path: PathComparison | None) -> list[str]:
    notes = []
    lonely = sorted(set(ours.named) ^ set(theirs.named))
    if lonely:
        notes.append(
            f"{len(lonely)} coordinates are on one side only and were not compared: {', '.join(lonely[:5])}"
        )
    if path is not None and path.ok and sum(path.num_excursions):
        notes.append(
            f"{sum(path.num_excursions)} knife-edge decisions fell the other way by rounding; the paths met again after"
            f" at most {max(path.longest_excursion)} steps"
        )
    for name, what in (
        ("num_ambiguous", "accept decisions within rounding of their threshold"),
        ("num_nonfinite_proposals", "proposals that were not finite, and rejected"),
    ):
        total = _total(getattr(ours.draws, "certificate", None), name)
        notes += [f"{total} {what}"] if total > 0 else []
    fallbacks = getattr(getattr(ours.draws, "report", None), "fallbacks", None) or []
    return notes + [f"fallback: {entry}" for entry in fallbacks]


def _total(certificate: Any, name: str) -> int:
    """Sum over chains of a count, -1 for unknown."""
    counts = _values(certificate, name)
    return int(counts.sum()) if counts.size and (counts >= 0).all() else -1


def _values(source: Any, name: str) -> np.ndarray:
    """A numeric field as a float array with one axis, empty if there is no such thing."""
    value = getattr(source, name, None)
    return np.atleast_1d(np.asarray([] if value is None else value, np.float64))


def _verdict(level: Level, path: PathComparison | None, distribution: Distribution) -> str:
    shift = distribution.min_detectable_shift
    power = f"a shift of {shift:.2g} sd would show" if np.isfinite(shift) else "at unknown power"
    excursions = sum(path.num_excursions) if path is not None else 0
    same = (
        f"is the sequential one, {excursions} re-merged excursions apart"
        if excursions
        else "is the sequential one"
    )
    return {
        Level.BITWISE: "BITWISE: the parallel path is the sequential one, bit for bit.",
        Level.CERTIFIED_PATH: f"CERTIFIED PATH: the parallel path obeys the recurrence and {same}.",
        Level.STATISTICAL: f"STATISTICAL: the runs agree in distribution, not as paths ({power}).",
        Level.INCONCLUSIVE: "INCONCLUSIVE: too little to go by; this is not a pass.",
        Level.FAIL: "FAIL: the runs do not draw from the same law."
        if distribution.failures
        else "FAIL: one of the runs is broken.",
    }[level]


def _report(
    ours: Side,
    theirs: Side,
    level: Level,
    reasons: list[str],
    notes: list[str],
    path: PathComparison | None,
    distribution: Distribution,
) -> Report:
    certificate, run = getattr(ours.draws, "certificate", None), getattr(ours.draws, "report", None)
    residual, worst, margin = (
        _values(certificate, name) for name in ("max_residual", "worst_step", "min_margin")
    )
    chain = int(np.argmax(np.nan_to_num(residual, nan=np.inf))) if residual.size else 0
    margin = margin[np.isfinite(margin)]
    return Report(
        level=level,
        verdict=_verdict(level, path, distribution),
        reasons=reasons,
        notes=notes,
        status=[getattr(one, "name", str(one)) for one in getattr(run, "status", None) or []],
        dtype=getattr(run, "dtype", None) or str(np.result_type(*ours.leaves)),
        device=getattr(run, "device", None),
        versions=dict(getattr(run, "versions", None) or {}),
        num_samples=(ours.shape[1], theirs.shape[1]),
        num_chains=(ours.shape[0], theirs.shape[0]),
        iterations=_values(run, "iterations").astype(int).tolist(),
        max_residual=float(residual[chain]) if residual.size else float("nan"),
        worst_step=(chain, int(worst[chain])) if worst.size > chain else None,
        residual_tolerance=float(np.max(_values(certificate, "tolerance")))
        if certificate
        else float("nan"),
        num_ambiguous=_total(certificate, "num_ambiguous"),
        min_margin=float(margin.min()) if margin.size else float("nan"),
        num_nonfinite_proposals=_total(certificate, "num_nonfinite_proposals"),
        num_frozen=int(ours.frozen.sum() + theirs.frozen.sum()),
        fallbacks=[str(entry) for entry in getattr(run, "fallbacks", None) or []],
        path=path,
        tests=distribution.tests,
        table=distribution.table,
        worst=distribution.worst,
        min_detectable_shift=distribution.min_detectable_shift,
    )
