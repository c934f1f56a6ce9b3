"""Other codes for the same methods, on the same steps and keys: `python -m benchmarks.peers --elk DIR --deer DIR --parallel-mcmc DIR`.

Each option names a checkout: lindermanlab/elk, machine-discovery/deer, lindermanlab/parallel-mcmc; those that are not given are
left out. Two recurrences, float32: a GRU on noise, and MALA on four normals in the plane with BlackJAX's keys. Every code gets
the same function, the same first guess and at most 200 iterations, and is compared with `lax.scan` over that function, in turn
in one process. Beside every time stands the residual of the path that was returned, measured here, and whether it is within
the tolerance of `solve`: these codes stop by the size of the last update, and two of them turn NaN into zeros on the way.
Two were written for a JAX whose `clip` had other names for its bounds, under which it serves them here; a code that cannot be
traced by this JAX for another reason is listed with the reason.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
import unittest.mock
from pathlib import Path
from typing import Any, Callable

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.record import OUT, keep, module_at, settled, timed
from partime_mcmc import Dynamics, deer, mala, quasi_deer, residual, rollout, shooting, solve
from partime_mcmc.kernels import Tape
from partime_mcmc.rnn import gru, gru_params

# A file that shows that a folder is the checkout that it should be.
WANTED = {
    "elk": "elk/algs/deer.py",
    "deer": "deer/fseq1d.py",
    "parallel_mcmc": "src/qdeer.py",
}
REPOSITORIES = {
    "elk": "lindermanlab/elk",
    "deer": "machine-discovery/deer",
    "parallel_mcmc": "lindermanlab/parallel-mcmc",
}

_ITERATIONS = 200


def peers(folders: dict[str, Path | None]) -> dict[str, Callable]:
    """The peers' solvers by name, `(step, params, initial, drives, guess) -> (states, iterations or None)`.

    Raises:
        FileNotFoundError: If a folder is not the checkout that it should be.
        ImportError: If a checkout needs a package that is missing, naming both.
    """
    found: dict[str, Callable] = {}
    for name, folder in folders.items():
        if folder is None:
            continue
        if not (folder / WANTED[name]).is_file():
            raise FileNotFoundError(
                f"--{name.replace('_', '-')}: {folder} has no {WANTED[name]}, wanted a checkout of {REPOSITORIES[name]}"
            )
        try:
            found |= {"elk": _elk, "deer": _deer, "parallel_mcmc": _parallel_mcmc}[name](folder)
        except ImportError as error:
            raise ImportError(
                f"--{name.replace('_', '-')}: {REPOSITORIES[name]} needs a package that is not installed: {error}"
            ) from error
    return found


def _elk(folder: Path) -> dict[str, Callable]:
    seq1d = module_at(folder / WANTED["elk"], "peer_elk_deer").seq1d

    def by(step, params, initial, drives, guess, **options):
        return seq1d(
            step, initial, drives, params, yinit_guess=guess, max_iter=_ITERATIONS, **options
        )

    return {"elk: DEER": by, "elk: quasi-DEER": functools.partial(by, quasi=True)}


def _deer(folder: Path) -> dict[str, Callable]:
    sys.path.insert(0, str(folder))
    try:
        sequence = importlib.import_module("deer.fseq1d")
    finally:
        sys.path.remove(str(folder))

    def by(step, params, initial, drives, guess):
        method = sequence.DEER(yinit_guess=guess, max_iter=_ITERATIONS)
        return sequence.seq1d(step, initial, drives, params, method=method).value, None

    return {"deer: DEER": by}


def _parallel_mcmc(folder: Path) -> dict[str, Callable]:
    seq1d = module_at(folder / WANTED["parallel_mcmc"], "peer_parallel_mcmc_qdeer").seq1d

    def by(step, params, initial, drives, guess):
        given = {"step": params, "key": jax.random.key(0)}
        return seq1d(
            lambda y, x, given: step(y, x, given["step"]),
            initial,
            drives,
            given,
            yinit_guess=guess,
            max_iter=_ITERATIONS,
            clip_val=1.0,
        )

    return {"parallel-mcmc: stochastic quasi-DEER": by}


def problems(num_steps: int) -> dict[str, tuple]:
    """Recurrences by name: the step as the peers take it, `(state, drive, params)`, its parameters, start, drives."""
    params = gru_params(jax.random.key(0), 8, 8)
    inputs = jax.random.normal(jax.random.key(1), (num_steps, 8), jnp.float32)
    modes = 2.0 * jnp.asarray([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], jnp.float32)
    kernel = mala(lambda x: jax.nn.logsumexp(-0.5 * jnp.sum((x - modes) ** 2, axis=1)), 0.5)
    chain = kernel.dynamics()
    return {
        "GRU, D = 8": (
            lambda state, drive, params: gru(params, state, drive)[0],
            params,
            jnp.zeros(8, jnp.float32),
            inputs,
        ),
        "MALA, four normals": (
            lambda state, key, _: chain(state, Tape(key, {})),
            None,
            modes[0],
            jax.random.split(jax.random.key(2), num_steps),
        ),
    }


def clip(values, min=None, max=None, *, a_min=None, a_max=None):
    """`jax.numpy.clip`, with the names of its bounds in earlier JAX as well."""
    return _CLIP(values, min if a_min is None else a_min, max if a_max is None else a_max)


_CLIP = jnp.clip


def measure(name: str, problem: tuple, others: dict[str, Callable], repeats: int) -> list[dict]:
    """One row per code and method."""
    step, params, initial, drives = problem
    num_steps = drives.shape[0]
    guess = jnp.broadcast_to(initial, (num_steps, initial.size))
    dynamics = Dynamics(lambda params, state, drive: step(state, drive, params), params)
    ours = {
        "ours: DEER": deer(),
        "ours: quasi-DEER": quasi_deer(),
        "ours: quasi-DEER, 1 probe": quasi_deer(num_probes=1),
        "ours: shooting": shooting(64),
    }
    runs: dict[Any, tuple[Any, tuple]] = {None: (jax.jit(rollout), (dynamics, initial, drives))}
    for method, solver in ours.items():
        run = functools.partial(solve, solver=solver, max_iterations=_ITERATIONS)
        runs[method] = (jax.jit(run), (dynamics, initial, drives))
    failed = []
    with unittest.mock.patch.object(jnp, "clip", clip):
        for method, other in others.items():
            run, given = jax.jit(functools.partial(other, step)), (params, initial, drives, guess)
            try:
                run.lower(*given)
            except Exception as error:
                reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
                failed.append({"problem": name, "method": method, "failed": reason})
            else:
                runs[method] = run, given
        found = timed(runs, settled(repeats, 1.0))
    rows = []
    for method in (one for one in runs if one is not None):
        value = found[method]["value"]
        states, iterations = (
            (value.states, value.iterations) if method in ours else (value[0], value[1])
        )
        gaps = np.asarray(jax.jit(residual)(dynamics, initial, states, drives))
        # The tolerance of `solve` in float32, for states of the size of this path.
        bound = 256 * np.finfo(np.float32).eps * float(np.abs(np.asarray(states)).max())
        rows.append(
            {
                "problem": name,
                "method": method,
                "T": num_steps,
                "iterations": None if iterations is None else int(iterations),
                "residual": float(gaps.max()),
                "exact": bool((gaps <= bound).all()),
                "difference": float(np.abs(states - found[None]["value"]).max()),
                "seconds": found[method]["seconds"],
                "loop_seconds": found[None]["seconds"],
                "ratio": found[None]["seconds"] / found[method]["seconds"],
                "compile": found[method]["compile"],
            }
        )
    return rows + failed


def table(rows: list[dict]) -> str:
    """The Markdown table."""
    lines = [
        "| recurrence | T | code: method | iterations | residual | exact | differs from the loop | ms | loop, ms | ratio |",
        "|" + "---|" * 10,
    ]
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['problem']} | | {row['method']} | {row['failed']} |" + " |" * 6)
            continue
        lines.append(
            f"| {row['problem']} | {row['T']:,} | {row['method']} | "
            f"{'not told' if row['iterations'] is None else row['iterations']} | {row['residual']:.0e} | "
            f"{'yes' if row['exact'] else '**no**'} | {row['difference']:.0e} | {1e3 * row['seconds']:.2f} | "
            f"{1e3 * row['loop_seconds']:.2f} | {row['ratio']:.2f}× |"
        )
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> list[dict]:
    """Measure and write `peers-<platform>.json` and `.md`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    for name, repository in REPOSITORIES.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=Path, help=f"a checkout of {repository}"
        )
    parser.add_argument("--num-steps", type=int, default=16_384)
    parser.add_argument("--repeats", type=int, default=5)
    flags = parser.parse_args(argv)
    folders = {name: getattr(flags, name) for name in REPOSITORIES}
    if not any(folders.values()):
        parser.error(
            "no checkout given: wanted at least one of "
            + ", ".join(f"--{name.replace('_', '-')} DIR" for name in REPOSITORIES)
        )
    try:
        others = peers(folders)
    except (FileNotFoundError, ImportError) as error:
        parser.error(str(error))
    rows = []
    for name, problem in problems(flags.num_steps).items():
        rows += measure(name, problem, others, flags.repeats)
        print(table(rows), flush=True)
    stored = flags.out / f"peers-{jax.default_backend()}.json"
    keep(stored, {"repeats": flags.repeats, "rows": rows}, table(rows))
    return rows


if __name__ == "__main__":
    main()
