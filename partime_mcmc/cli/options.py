"""Options that commands share: a model and its data, the kernel, the counts, the precision."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import jax

from partime_mcmc.cli.choices import KERNELS
from partime_mcmc.cli.loading import load_data, load_model, make_target
from partime_mcmc.diagnostics.checks import check_count
from partime_mcmc.sampling.target import Target
from partime_mcmc.models import MODELS
from partime_mcmc.types import Key


def add_model(command: argparse.ArgumentParser) -> None:
    """Options that say what to sample, and how."""
    command.add_argument(
        "model",
        metavar="FILE.py:MODEL",
        help="a NumPyro model, a Target, or a function that returns a "
        f"Target or (logdensity, initial); or a built-in model: {', '.join(MODELS)}",
    )
    command.add_argument(
        "--data",
        type=Path,
        metavar="FILE",
        help=".npz or .json: the model's keyword arguments by name",
    )
    command.add_argument(
        "--kernel", choices=sorted(KERNELS), default="coalescing_hmc", help="default: %(default)s"
    )
    command.add_argument(
        "--num-samples",
        type=int,
        default=4096,
        metavar="N",
        help="draws per chain; default: %(default)s",
    )
    command.add_argument(
        "--num-chains", type=int, default=4, metavar="C", help="default: %(default)s"
    )
    command.add_argument(
        "--num-warmup",
        type=int,
        default=1000,
        metavar="W",
        help="warm-up steps per chain at most; default: %(default)s",
    )
    command.add_argument("--seed", type=int, default=0, help="the dice; default: %(default)s")
    command.add_argument("--float64", action="store_true", help="sample in double precision")


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is to be sampled.

    Attributes:
        key: The dice.
        target: The target.
        title: For reports.
    """

    key: Key
    target: Target
    title: str


def problem(arguments: argparse.Namespace) -> Problem:
    """What the options of `add_model` mean; counts are looked at first, then files, then the model runs.

    Raises:
        ValueError, TypeError, OSError: As `load_model`, `load_data`, `make_target` and `check_count`.
    """
    for name, least in (("num_samples", 1), ("num_chains", 1), ("num_warmup", 20)):
        check_count(getattr(arguments, name), "--" + name.replace("_", "-"), least)
    data = load_data(arguments.data)
    if arguments.float64:
        jax.config.update("jax_enable_x64", True)
    model = load_model(arguments.model)
    if getattr(model, "needs_float64", False):
        jax.config.update("jax_enable_x64", True)
    key = jax.random.key(arguments.seed)
    # Stream 0 is for the model: starts, warm-up and chains split the key.
    target = make_target(model, data, jax.random.fold_in(key, 0))
    return Problem(key, target, arguments.model)


def check_file(option: str, path: Path | None, suffix: str) -> None:
    """Refuse a file to be written that has another suffix, or no folder to be in; None is no file.

    Raises:
        ValueError: Naming the option.
    """
    if path is not None and (path.suffix != suffix or not path.parent.is_dir()):
        raise ValueError(
            f"{option}: got {path}, wanted a file that ends in {suffix}, in a folder that exists"
        )


def precision() -> Any:
    """The floating-point type that chains will have."""
    return jax.dtypes.canonicalize_dtype(float)
