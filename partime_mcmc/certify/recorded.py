"""Certificates recorded while a path is rolled, and the choice between these and an independent pass.

A solver that rolls computes every step of the path that it returns from the very state before it, so

    x_t = f(x_{t-1}, k_t)      holds to the last bit inside a segment, as the program that rolled it evaluates f;
    x_t = f(x_{t-1}, k_t) − r_t  where a rolled path met a stored one, or a segment its successor, with |r_t| known
                                 (of two meetings in one segment the larger |r| stands at the place of the later one),

and the kernel's decision, energy and margins of each step are those of the transition that is in the path. Nothing needs to
be evaluated again: the certificate costs the memory of a few numbers per step. An independent pass costs one more evaluation
of every step and shares nothing with the solver but the kernel. It serves users who doubt the recording, solvers that do
not go step by step, and chains that are no longer finite.

A recording agrees with itself even where f is no function. Steps that call Python or a library, whose answers might be random,
are sampled and evaluated twice (`certificate`).
"""

import functools

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from partime_mcmc.certify.certificate import (
    Certificate,
    judged,
    may_be_random,
    refuse_random_steps,
)
from partime_mcmc.certify.independent import Observe
from partime_mcmc.certify.step_record import Records, unpacked
from partime_mcmc.engine import Dynamics
from partime_mcmc.kernels.kernel import Kernel, Tape
from partime_mcmc.types import Array, PyTree, pytree


@pytree()
class CertifyWhileRolling:
    """Record while rolling, where the solver goes step by step; an independent pass elsewhere, and after a fallback.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import CertifyWhileRolling, Target, mala, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> rests_on = CertifyWhileRolling()  # as is the default
        >>> draws = sample(jax.random.key(0), target, kernel, num_samples=500, certificate=rests_on)
        >>> draws.certificate.evidence
        'recorded while the chains were rolled'
    """

    def dynamics(self, kernel: Kernel) -> Dynamics:
        """The recurrence to solve."""
        return kernel.recording()


@pytree()
class CertifyIndependently:
    """Evaluate every step of the finished path once more.

    Examples:
        >>> import jax, jax.numpy as jnp
        >>> from partime_mcmc import CertifyIndependently, Target, mala, sample
        >>> target = Target(jax.scipy.stats.norm.logpdf, initial=jnp.zeros(()))
        >>> kernel = mala(target.logdensity, 0.5)
        >>> rests_on = CertifyIndependently()
        >>> draws = sample(jax.random.key(0), target, kernel, num_samples=500, certificate=rests_on)
        >>> draws.certificate.evidence
        'by an independent pass'
    """

    def dynamics(self, kernel: Kernel) -> Dynamics:
        """The recurrence to solve."""
        return kernel.dynamics()


Certification = CertifyWhileRolling | CertifyIndependently


def certify_recorded(
    kernel: Kernel, initial: PyTree, states: PyTree, drives: Tape, notes: Array, defects: Array
) -> tuple[Certificate, Records]:
    """The certificate of a path that was recorded while it was rolled.

    Args:
        kernel: Whose `recording()` was solved.
        initial: The carry before the first step.
        states: The path, leading axis `T`, at least one step.
        drives: The tape.
        notes: Of the `Solution`, shape `(T, R)`.
        defects: Of the `Solution`, shape `(T, D)`.

    Returns:
        The certificate, not `independent`, and the record of each step.
    """
    drive = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), drives)
    traced, example = jax.make_jaxpr(kernel.step_record, return_shape=True)(initial, drive)
    steps = unpacked(notes, example)
    _, unravel = ravel_pytree(initial)
    values = jax.tree.map(jnp.add, states, jax.vmap(unravel)(defects))
    certificate, records = judged(
        values,
        steps.consistent.all(),
        steps.records,
        steps.uniform,
        initial,
        states,
        kernel.noise_scale,
        independent=False,
    )
    if may_be_random(traced.jaxpr):
        evaluate = functools.partial(Observe(kernel), None)
        certificate = refuse_random_steps(certificate, evaluate, initial, states, drives)
    return certificate, records
