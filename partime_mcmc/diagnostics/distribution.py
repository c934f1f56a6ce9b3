"""Two runs by distribution: gates, z-scores, R-hat, Kolmogorov-Smirnov, a joint test, and the power of it all.

For an estimate e with Monte Carlo standard error (MCSE) on either side, z = (e_a - e_b) / hypot(MCSE_a, MCSE_b), near
standard normal for runs of one law; m of them are held to the normal quantile at 1 - alpha / 2m. R-hat over both
sides' chains may be max(1.01, 1 + 2.6 / ESS per chain), its 99.9% quantile under the null. The joint test asks for the
energy distance 2 E|X - Y| - E|X - X'| - E|Y - Y'| of draws thinned to independence, by permutation (Székely and Rizzo
2013, J. Stat. Plan. Inference 143). A shift of (quantile + 2.33) sqrt(1 / ESS_a + 1 / ESS_b) sd is found with chance
0.99: a pass means no more than that. R-hat says little and KS is conservative; the z-scores carry the weight.

Left out: tests of joint structure finer than pairwise distances, and quantiles beyond 5% and 95%.
"""

import dataclasses
from typing import Any

import numpy as np
from scipy import special
from scipy.spatial.distance import cdist

from partime_mcmc.diagnostics import arviz
from partime_mcmc.diagnostics import values as by_name
from partime_mcmc.diagnostics.paths import Side

MIN_CHAINS, MIN_ESS = 4, 400
POWER = 0.99
_MAX_THINNED = 400


@dataclasses.dataclass(frozen=True)
class Distribution:
    """Outcome of the distributional tests: reasons to fail, reasons to judge nothing, and the numbers."""

    failures: list[str]
    gates: list[str]
    notes: list[str]
    tests: dict[str, Any]
    table: list[dict[str, Any]]
    worst: dict[str, Any] | None
    min_detectable_shift: float


def compare_distributions(ours: Side, theirs: Side, names: list[str], alpha: float) -> Distribution:
    """Run every test on the coordinates ``names``; each family of tests errs with probability ``alpha`` at most."""
    rows, failures, gates, notes = _rows(ours, theirs, names)
    run = _run_statistics(ours, theirs, names)
    scores = [
        {"name": row["name"], "quantity": quantity, "z": z}
        for row in [*rows, {"name": "run", "z": run}]
        for quantity, z in row["z"].items()
        if not np.isnan(z)
    ]
    max_z = float(-special.ndtri(alpha / (2 * max(len(scores), 1))))
    scores.sort(key=lambda score: -abs(score["z"]))
    failures += [
        f"{score['name']}, {score['quantity']}: z = {score['z']:.1f}, allowed {max_z:.2f}"
        for score in scores
        if abs(score["z"]) > max_z
    ]
    gates += _gates(ours, theirs, rows)
    joint_p = _joint_test(ours, theirs, rows, alpha)
    if joint_p < alpha:
        failures.append(
            f"joint test (energy distance): p = {joint_p:.3g}, at least {alpha:g} wanted"
        )
    for row in rows:
        if row["ks_p"] < alpha / len(rows):
            failures.append(
                f"{row['name']}: Kolmogorov-Smirnov distance {row['ks']:.3f}, p = {row['ks_p']:.2g}"
            )
        if row["r_hat"] > row["max_r_hat"]:
            text = f"{row['name']}: R-hat over both sides {row['r_hat']:.3f}, allowed {row['max_r_hat']:.3f}"
            # Chains of one side that disagree among themselves are no evidence against the other side.
            if max(row["r_hat_parallel"], row["r_hat_sequential"]) > row["max_r_hat"]:
                gates.append(f"{text}, and above it within a side")
            else:
                failures.append(text)
    least = [
        min((row[f"ess_bulk_{side.title}"] for row in rows), default=np.nan)
        for side in (ours, theirs)
    ]
    tests = {
        "family_alpha": alpha,
        "num_z": len(scores),
        "max_z": max_z,
        "run": run,
        "joint_p": joint_p,
        "ks_p": float(np.min([row["ks_p"] for row in rows], initial=1.0)),
        "r_hat": float(np.max([row["r_hat"] for row in rows], initial=1.0)),
        "failures": failures,
        "gates": gates,
    }
    shift = float((max_z + special.ndtri(POWER)) * np.sqrt(1 / least[0] + 1 / least[1]))
    return Distribution(failures, gates, notes, tests, rows, scores[0] if scores else None, shift)


def _rows(
    ours: Side, theirs: Side, names: list[str]
) -> tuple[list[dict[str, Any]], list[str], list[str], list[str]]:
    """Table rows of the coordinates that vary, and what is wrong (failures, gates, notes) with those that do not."""
    rows, failures, gates, notes = [], [], [], []
    for name in names:
        a, b = ours.named[name], theirs.named[name]
        constant = [by_name.is_constant(x) for x in (a, b)]
        if all(constant) and a.size > 1 and np.isclose(a[0, 0], b[0, 0]):
            notes.append(f"{name} is constant, equal on both sides, and left out of the tests")
        elif min(a.shape[1], b.shape[1]) >= by_name.MIN_DRAWS_TO_FREEZE and any(constant):
            failures.append(f"{name} is constant on one side only, or at different values")
        else:
            if by_name.partly_constant(a) or by_name.partly_constant(b):
                gates.append(f"{name} is constant in some chains although the positions move")
            rows.append(_row(name, a, b))
    if not rows:
        gates.append("no coordinate varies, so there is nothing to test")
    return rows, failures, gates, notes


def _estimates(x: np.ndarray) -> dict[str, tuple[float, float]]:
    """Quantity -> (estimate, MCSE) for ``x`` (C, T)."""
    sd = x.std(ddof=1) if x.size > 1 else np.nan
    with np.errstate(all="ignore"):
        return {
            "mean": (x.mean(), arviz.mcse_mean(x)),
            "log sd": (np.log(sd), arviz.mcse_sd(x) / sd),
            "q05": (np.quantile(x, 0.05), arviz.mcse_quantile(x, 0.05)),
            "q50": (np.quantile(x, 0.5), arviz.mcse_quantile(x, 0.5)),
            "q95": (np.quantile(x, 0.95), arviz.mcse_quantile(x, 0.95)),
            "square": ((x**2).mean(), arviz.mcse_mean(x**2)),
        }


def _score(a: tuple[float, float], b: tuple[float, float]) -> float:
    """z of two estimates with MCSEs; NaN where neither has an error to measure by."""
    error = np.hypot(a[1], b[1])
    return float((a[0] - b[0]) / error) if error > 0 else float("nan")


def _row(name: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Everything about one coordinate of the two sides, (C, T) each."""
    row: dict[str, Any] = {"name": name}
    estimates = [_estimates(a), _estimates(b)]
    for side, x, estimate in zip(("parallel", "sequential"), (a, b), estimates, strict=True):
        row |= {
            f"mean_{side}": float(estimate["mean"][0]),
            f"mcse_mean_{side}": float(estimate["mean"][1]),
            f"sd_{side}": float(x.std(ddof=1)) if x.size > 1 else float("nan"),
            f"mcse_sd_{side}": arviz.mcse_sd(x),
            f"ess_bulk_{side}": arviz.ess_bulk(x),
            f"ess_tail_{side}": arviz.ess_tail(x),
            f"r_hat_{side}": arviz.rhat(x),
        }
    scores = {what: _score(pair, estimates[1][what]) for what, pair in estimates[0].items()}
    length = min(a.shape[1], b.shape[1])
    ess = row["ess_bulk_parallel"], row["ess_bulk_sequential"]
    grid = np.concatenate([a.ravel(), b.ravel()])
    below = [np.searchsorted(np.sort(x, axis=None), grid, side="right") / x.size for x in (a, b)]
    ks = float(np.abs(below[0] - below[1]).max())
    return row | {
        "z": scores,
        "worst_z": float(
            np.max(np.abs([z for z in scores.values() if np.isfinite(z)]), initial=0.0)
        ),
        "r_hat": arviz.rhat(np.concatenate([a[:, :length], b[:, :length]])),
        "max_r_hat": float(max(1.01, 1 + 2.6 * (len(a) + len(b)) / sum(ess))),
        "ks": ks,
        "ks_p": float(special.kolmogorov(ks * np.sqrt(ess[0] * ess[1] / sum(ess)))),
    }


def _run_statistics(ours: Side, theirs: Side, names: list[str]) -> dict[str, float]:
    """z-scores of what broken accept logic spoils first: acceptance rate, squared jump, energy and its changes."""
    sides = ours, theirs
    series = {
        name.replace("_", " "): [side.info(name) for side in sides]
        for name in ("acceptance_rate", "accepted", "energy")
    }
    series["squared energy change"] = [
        None if energy is None else np.diff(energy.astype(np.float64), axis=1) ** 2
        for energy in series["energy"]
    ]
    states = [side.states for side in sides]
    if ours.on_positions != theirs.on_positions or states[0].shape[-1] != states[1].shape[-1]:
        states = [np.stack([side.named[name] for name in names], axis=-1) for side in sides]
    sd = states[1].std(axis=(0, 1))
    unit = np.where(sd > 0, sd, 1.0)
    series["squared jump"] = [(np.diff(x / unit, axis=1) ** 2).sum(axis=-1) for x in states]
    scores = {}
    for name, pair in series.items():
        if any(
            x is None or x.shape[1] == 0 or not np.isfinite(x.astype(np.float64)).all()
            for x in pair
        ):
            continue
        values = [np.asarray(x, np.float64) for x in pair]
        scores[name] = _score(
            *((x.mean(), 0.0 if (x == x[0, 0]).all() else arviz.mcse_mean(x)) for x in values)
        )
        if np.isnan(scores[name]) and values[0].flat[0] != values[1].flat[0]:
            scores[name] = float(
                "inf"
            )  # constant on both sides (every proposal accepted, say), but not the same
    return scores


def _gates(ours: Side, theirs: Side, rows: list[dict[str, Any]]) -> list[str]:
    gates = []
    for side in (ours, theirs):
        if side.shape[0] < MIN_CHAINS:
            gates.append(f"{side.title}: {side.shape[0]} chains, at least {MIN_CHAINS} wanted")
        for kind in ("bulk", "tail"):
            key = f"ess_{kind}_{side.title}"
            short = [row for row in rows if not row[key] >= MIN_ESS]
            if short:
                least = min(short, key=lambda row: np.nan_to_num(row[key]))
                gates.append(
                    f"{side.title}: {kind} ESS below {MIN_ESS} in {len(short)} of {len(rows)} coordinates "
                    f"({least['name']}: {least[key]:.0f})"
                )
    return gates


def _joint_test(ours: Side, theirs: Side, rows: list[dict[str, Any]], alpha: float) -> float:
    """p of the energy distance between thinned draws under permutation; NaN where ESS is unknown."""
    clouds = []
    for side in (ours, theirs):
        ess = min((row[f"ess_bulk_{side.title}"] for row in rows), default=np.nan)
        if not np.isfinite(ess):
            return float("nan")
        points = np.stack([side.named[row["name"]] for row in rows], axis=-1)
        stride = max(1, int(np.ceil(points.shape[0] * points.shape[1] / ess)))
        points = points[:, ::stride].reshape(-1, len(rows))
        keep = np.linspace(0, len(points) - 1, min(len(points), _MAX_THINNED)).round().astype(int)
        clouds.append(points[keep])
    sizes, points = [len(cloud) for cloud in clouds], np.concatenate(clouds)
    sd = points.std(axis=0)
    points = points / np.where(sd > 0, sd, 1.0)
    distance = cdist(points, points)
    # With weights w = 1/n on one side and -1/m on the other the energy distance is -w' D w.
    weights, rng = np.repeat([1 / sizes[0], -1 / sizes[1]], sizes), np.random.default_rng(0)
    observed, above = -weights @ distance @ weights, 0
    num_permutations = int(np.clip(np.ceil(1 / alpha), 1_000, 100_000))
    for start in range(0, num_permutations, 1_000):
        shuffled = rng.permuted(np.tile(weights, (min(1_000, num_permutations - start), 1)), axis=1)
        above += int(
            (-((shuffled @ distance) * shuffled).sum(axis=1) >= observed * (1 - 1e-12)).sum()
        )
    return (1 + above) / (1 + num_permutations)
