"""What decides about the bits of a run besides its plan: the device and the versions of libraries."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

import jax


@functools.cache
def device() -> str:
    """The default device, in words."""
    first = jax.devices()[0]
    return f"{first.platform}: {first.device_kind}"


def versions() -> dict[str, str]:
    """Versions of what decides about bits, by package."""
    return dict(_versions())


@functools.cache
def _versions() -> tuple[tuple[str, str], ...]:
    found = {}
    for package in ("partime_mcmc", "jax", "jaxlib", "blackjax", "numpyro", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return tuple(found.items())
