"""From solved chains to draws: the certificate, what the kernel says of each step, and the model's own space.

The certificate is one independent pass over the whole path; the same pass records acceptance probabilities, energies
and the like. A solver stops within a tolerance, so steps on which the kernel stands still are made to stand still to
the last bit, and what is returned is what was certified.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from partime_mcmc.kernels import Kernel, certify_with_records, hold
from partime_mcmc.mcmc.draws import Draws, End, RunReport
from partime_mcmc.mcmc.family import family_of
from partime_mcmc.mcmc.programs import Named, run_explicit
from partime_mcmc.mcmc.run import Chains
from partime_mcmc.mcmc.target import Target
from partime_mcmc.mcmc.warmup import Warmup
from partime_mcmc.solution import Status
from partime_mcmc.types import PyTree


def finish(target: Target, kernel: Kernel, chains: Chains, warmup: Warmup | None, plan: dict[str, Any]) -> Draws:
    """Certify and describe chains.

    Args:
        target: For the model's own space.
        kernel: Whose chains they are.
        chains: As solved.
        warmup: The warm-up before them, if any.
        plan: What gives these draws again.
    """
    clock = chains.clock
    family, numbers = family_of(kernel)
    judge = _Judge(family)
    certificate, records, carries, positions, still = run_explicit(
        judge, numbers, chains.initial, chains.carries, chains.tape, clock=clock, what="certify")
    if not bool(still):
        # Standing still to the last bit changes what the next steps start from: certify what is returned.
        certificate, records, _, _, _ = run_explicit(judge, numbers, chains.initial, carries, chains.tape, clock=clock,
                                                     what="certify")
    constrained = _constrained(target, positions, clock)
    shape = certificate.residual.shape
    named = {"accepted": records.accepted, "acceptance_rate": records.acceptance_rate, "diverging": records.diverging,
             "energy": records.energy, "num_steps": records.num_steps, "logdensity": records.logdensity,
             "residual": certificate.residual}
    info = {name: value if value.shape == shape else jnp.broadcast_to(value, shape)
            for name, value in named.items() if value is not None}
    # A path that is not certified is not known to stand still: its own verdict comes first.
    frozen = np.asarray(certificate.frozen) & np.asarray(certificate.certified)
    status = tuple(Status.FROZEN if frozen[c] and one == Status.CONVERGED else one for c, one in enumerate(chains.status))
    seconds = clock.seconds
    report = RunReport(
        status, chains.iterations, chains.evaluations_per_sample, chains.jvps_per_sample, chains.depth,
        tuple(chains.fallbacks), chains.num_sequential, chains.residual_history, seconds["advise"], seconds["compile"],
        seconds["run"], seconds["certify"], str(jax.tree.leaves(chains.carries)[0].dtype), _device(), versions())
    return Draws(positions, constrained, info, certificate, report, plan, warmup,
                 dict(target.dims) if target.dims else None, tuple(target.names) if target.names else None,
                 chains.advice, _end(chains, carries))


def _end(chains: Chains, carries: PyTree) -> End:
    last = jax.tree.map(lambda leaf, first: leaf[:, -1] if leaf.shape[1] else first, carries, chains.initial)
    return End(last, chains.discrete)


class _Judge(Named):
    """Certificate, records, the path standing still where its kernel does, and positions; the part is the family."""

    def __call__(self, numbers, initial, carries, tape):
        kernel = self.parts[0].kernel(numbers)

        def one(first, path, dice):
            certificate, records = certify_with_records(kernel, first, path, dice)
            return certificate, records, hold(first, path, records.held)

        certificate, records, still = jax.vmap(one)(initial, carries, tape)
        same = [jnp.all((a == b) | ~jnp.isfinite(b)) for a, b in zip(jax.tree.leaves(still), jax.tree.leaves(carries))]
        return certificate, records, still, jax.vmap(jax.vmap(kernel.position))(still), jnp.stack(same).all()


class _Constrain(Named):
    """Named values in the model's space of all draws; the part is the target's function."""

    def __call__(self, params, positions):
        del params
        return jax.vmap(jax.vmap(self.parts[0]))(positions)


def _constrained(target: Target, positions: PyTree, clock) -> dict:
    if target.constrain is not None:
        return dict(run_explicit(_Constrain(target.constrain), None, positions, clock=clock, what="certify"))
    if isinstance(positions, dict):
        return dict(positions)
    leaves = jax.tree_util.tree_leaves_with_path(positions)
    return {jax.tree_util.keystr(path) or "x": leaf for path, leaf in leaves}


def _device() -> str:
    device = jax.devices()[0]
    return f"{device.platform}: {device.device_kind}"


def versions() -> dict[str, str]:
    """Versions of what decides about bits."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("partime_mcmc", "jax", "jaxlib", "blackjax", "numpyro", "numpy"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found
