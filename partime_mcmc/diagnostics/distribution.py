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

from partime_mcmc.diagnostics import arviz
from partime_mcmc.diagnostics import values as by_name
from partime_mcmc.diagnostics.paths import Side

MIN_CHAINS, MIN_ESS = 4, 400
POWER = 0.99
_QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95}
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
    scores = [(row["name"], quantity, z) for row in rows for quantity, z in row["z"].items()]
    scores = [
        score
        for score in [*scores, *(("run", name, z) for name, z in run.items())]
        if not np.isnan(score[2])
    ]
    max_z = float(-special.ndtri(alpha / (2 * max(len(scores), 1))))
    worst = max(scores, key=lambda score: abs(score[2]), default=None)
    beyond = sorted(
        (score for score in scores if abs(score[2]) > max_z), key=lambda score: -abs(score[2])
    )
    failures += [
        f"{name}, {quantity}: z = {z:.1f}, allowed {max_z:.2f}" for name, quantity, z in beyond
    ]
    gates += _gates(ours, theirs, rows)
    joint_p = _joint_test(ours, theirs, rows, alpha)
    if joint_p < alpha:
        failures.append(
            f"joint test (energy distance): p = {joint_p:.3g}, at least {alpha:g} wanted"
        )
    _judge_rows(rows, alpha, failures, gates)
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
    worst = worst and {"name": worst[0], "quantity": worst[1], "z": float(worst[2])}
    return Distribution(failures, gates, notes, tests, rows, worst, shift)


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
            continue
        if min(a.shape[1], b.shape[1]) >= by_name.MIN_DRAWS_TO_FREEZE and any(constant):
            failures.append(f"{name} is constant on one side only, or at different values")
            continue
        if by_name.partly_constant(a) or by_name.partly_constant(b):
            gates.append(f"{name} is constant in some chains although the positions move")
        rows.append(_row(name, a, b))
    if not rows:
        gates.append("no coordinate varies, so there is nothing to test")
    return rows, failures, gates, notes


def _judge_rows(
    rows: list[dict[str, Any]], alpha: float, failures: list[str], gates: list[str]
) -> None:
    """Add what Kolmogorov-Smirnov and R-hat find."""
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


def _estimates(x: np.ndarray) -> dict[str, tuple[float, float]]:
    """Quantity -> (estimate, MCSE) for ``x`` (C, T)."""
    sd = x.std(ddof=1) if x.size > 1 else np.nan
    with np.errstate(all="ignore"):
        found = {
            "mean": (x.mean(), arviz.mcse_mean(x)),
            "log sd": (np.log(sd), arviz.mcse_sd(x) / sd),
        }
    found |= {
        name: (np.quantile(x, q), arviz.mcse_quantile(x, q)) for name, q in _QUANTILES.items()
    }
    return found | {"square": ((x**2).mean(), arviz.mcse_mean(x**2))}


def _score(a: tuple[float, float], b: tuple[float, float]) -> float:
    """z of two estimates with MCSEs; NaN where neither has an error to measure by."""
    error = np.hypot(a[1], b[1])
    return float((a[0] - b[0]) / error) if error > 0 else float("nan")


def _row(name: str, a: np.ndarray, b: np.ndarray) -> dict[str, Any]:
    """Everything about one coordinate of the two sides, (C, T) each."""
    row: dict[str, Any] = {"name": name}
    estimates = []
    for side, x in (("parallel", a), ("sequential", b)):
        estimates.append(_estimates(x))
        row[f"mean_{side}"], row[f"mcse_mean_{side}"] = map(float, estimates[-1]["mean"])
        row[f"sd_{side}"] = float(x.std(ddof=1)) if x.size > 1 else float("nan")
        row[f"mcse_sd_{side}"] = arviz.mcse_sd(x)
        row[f"ess_bulk_{side}"], row[f"ess_tail_{side}"] = arviz.ess_bulk(x), arviz.ess_tail(x)
        row[f"r_hat_{side}"] = arviz.rhat(x)
    row["z"] = {
        quantity: _score(estimate, estimates[1][quantity])
        for quantity, estimate in estimates[0].items()
    }
    row["worst_z"] = float(
        np.max(np.abs([z for z in row["z"].values() if np.isfinite(z)]), initial=0.0)
    )
    length = min(a.shape[1], b.shape[1])
    ess = row["ess_bulk_parallel"], row["ess_bulk_sequential"]
    row["r_hat"] = arviz.rhat(np.concatenate([a[:, :length], b[:, :length]]))
    row["max_r_hat"] = float(max(1.01, 1 + 2.6 * (len(a) + len(b)) / sum(ess)))
    row["ks"] = _ks_distance(a.ravel(), b.ravel())
    row["ks_p"] = float(special.kolmogorov(row["ks"] * np.sqrt(ess[0] * ess[1] / sum(ess))))
    return row


def _ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    a, b, grid = np.sort(a), np.sort(b), np.concatenate([a, b])
    shares = [np.searchsorted(x, grid, side="right") / x.size for x in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def _run_statistics(ours: Side, theirs: Side, names: list[str]) -> dict[str, float]:
    """z-scores of what broken accept logic spoils first: acceptance rate, squared jump, energy and its changes."""
    sides, series = (ours, theirs), {}
    for name in ("acceptance_rate", "accepted"):
        series[name.replace("_", " ")] = [side.info(name) for side in sides]
    energies = [side.info("energy") for side in sides]
    series["energy"] = energies
    known = [energy.astype(np.float64) for energy in energies if energy is not None]
    if len(known) == len(energies):
        series["squared energy change"] = [np.diff(energy, axis=1) ** 2 for energy in known]
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
            short = [row for row in rows if not row[f"ess_{kind}_{side.title}"] >= MIN_ESS]
            if short:
                key = f"ess_{kind}_{side.title}"
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
    square = (points**2).sum(axis=1)
    distance = np.sqrt(np.maximum(square[:, None] + square - 2 * points @ points.T, 0.0))
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
