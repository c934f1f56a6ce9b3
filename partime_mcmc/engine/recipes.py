"""The published methods by their names, as products of a solver and a linearizer.

| recipe         | linear part `A_t`                    | solver            | source                                    |
|----------------|--------------------------------------|-------------------|-------------------------------------------|
| `sequential`   | none                                 | one after another | the definition                            |
| `deer`         | Jacobian                             | Newton            | Lim et al. 2024, arXiv:2309.12252         |
| `quasi_deer`   | its diagonal, exact or estimated     | Newton            | arXiv:2407.19115, arXiv:2508.18413        |
| `elk`          | Jacobian                             | Kalman smoother   | arXiv:2407.19115                          |
| `quasi_elk`    | its diagonal                         | Kalman smoother   | arXiv:2407.19115                          |
| `picard`       | identity                             | Newton            | Gonzalez et al. 2025, arXiv:2509.21716    |
| `jacobi`       | zero                                 | Newton            | same                                      |
| `shooting`     | none                                 | segments          | this package; Bellen & Zennaro 1989       |

Every recipe makes at most `DEFAULT_MAX_ITERATIONS` passes unless `max_iterations` is given; the verdict is
OUT_OF_ITERATIONS where that was not enough.
"""

from partime_mcmc.linearize import (
    Clipped,
    Damped,
    DenseJacobian,
    DiagonalJacobian,
    HutchinsonDiagonal,
    IdentityJacobian,
    Linearizer,
    ZeroJacobian,
)
from partime_mcmc.solvers import (
    DampingPolicy,
    Kalman,
    Newton,
    RelaxingDamping,
    Sequential,
    Shooting,
)

# A bound that does not grow with T: a method that needs more passes than this is slower than the sequential loop.
DEFAULT_MAX_ITERATIONS = 200


def sequential() -> Sequential:
    """One step after another.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, sequential, solve
        >>> wave = Dynamics(lambda rate, x, u: jnp.cos(rate * x) + u, 0.5)
        >>> found = solve(wave, jnp.zeros(2), jnp.zeros((50, 2)), solver=sequential())
        >>> found.verdict.name, int(found.num_exact)
        ('CONVERGED', 50)
    """
    return Sequential()


def deer(*, damping: float = 0.0, clip: float | None = None) -> Newton:
    """Newton's method with the exact Jacobian; memory `O(T D²)`.

    Args:
        damping: Linear parts are multiplied by `1 − damping`.
        clip: Largest spectral norm of a linear part; None leaves them, as the paper does.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, deer, solve
        >>> wave = Dynamics(lambda rate, x, u: jnp.cos(rate * x) + u, 0.5)
        >>> found = solve(wave, jnp.zeros(2), jnp.zeros((50, 2)), solver=deer())
        >>> found.verdict.name, int(found.num_exact)
        ('CONVERGED', 50)
    """
    return Newton(_tamed(DenseJacobian(), damping, clip))


def quasi_deer(
    *, num_probes: int | None = None, damping: float = 0.0, clip: float | None = 1.0
) -> Newton:
    """Newton's method with the Jacobian's diagonal; memory `O(T D)`.

    Args:
        num_probes: Products per step for Hutchinson's estimate; None takes the exact diagonal, D products.
        damping: Linear parts are multiplied by `1 − damping`.
        clip: Largest entry of a linear part; 1 makes overflow impossible, None is the paper's own method.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, quasi_deer, solve
        >>> wave = Dynamics(lambda rate, x, u: jnp.cos(rate * x) + u, 0.5)
        >>> found = solve(wave, jnp.zeros(2), jnp.zeros((50, 2)), solver=quasi_deer())
        >>> found.verdict.name, int(found.num_exact)
        ('CONVERGED', 50)
    """
    return Newton(_tamed(_diagonal(num_probes), damping, clip))


def elk(*, policy: DampingPolicy = RelaxingDamping(), clip: float | None = None) -> Kalman:
    """Levenberg–Marquardt with the exact Jacobian; memory `O(T D²)`.

    Args:
        policy: How the damping λ follows the residual.
        clip: Largest spectral norm of a linear part.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, elk, solve
        >>> wave = Dynamics(lambda rate, x, u: jnp.cos(rate * x) + u, 0.5)
        >>> found = solve(wave, jnp.zeros(2), jnp.zeros((50, 2)), solver=elk())
        >>> found.verdict.name, int(found.num_exact)
        ('CONVERGED', 50)
    """
    return Kalman(_tamed(DenseJacobian(), 0.0, clip), policy)


def quasi_elk(
    *,
    num_probes: int | None = None,
    policy: DampingPolicy = RelaxingDamping(),
    clip: float | None = None,
) -> Kalman:
    """Levenberg–Marquardt with the Jacobian's diagonal; memory `O(T D)`.

    Args:
        num_probes: As in `quasi_deer`.
        policy: How the damping λ follows the residual.
        clip: Largest entry of a linear part.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, quasi_elk, solve
        >>> wave = Dynamics(lambda rate, x, u: jnp.cos(rate * x) + u, 0.5)
        >>> found = solve(wave, jnp.zeros(2), jnp.zeros((50, 2)), solver=quasi_elk())
        >>> found.verdict.name, int(found.num_exact)
        ('CONVERGED', 50)
    """
    return Kalman(_tamed(_diagonal(num_probes), 0.0, clip), policy)


def shooting(
    num_segments: int | None = None,
    steps: int | None = None,
    correction: Linearizer = ZeroJacobian(),
) -> Shooting:
    """Segments rolled side by side until they coalesce; about one evaluation per step on a system that forgets.

    Args:
        num_segments: C; None chooses by device and path. One segment is the sequential chain.
        steps: Steps per segment, instead of `num_segments`; one step with `DenseJacobian()` as the correction is DEER.
        correction: What stands for the Jacobian of a whole segment; clip it where forgetting is slow.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, shooting, solve
        >>> wave = Dynamics(lambda rate, x, u: jnp.cos(rate * x) + u, 0.5)
        >>> found = solve(wave, jnp.zeros(2), jnp.zeros((50, 2)), solver=shooting(num_segments=5))
        >>> found.verdict.name, int(found.num_exact)
        ('CONVERGED', 50)
    """
    return Shooting(num_segments, steps, correction)


def picard() -> Newton:
    """Picard's iteration: cumulative sums of the increments.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, picard, solve
        >>> wave = Dynamics(lambda rate, x, u: jnp.cos(rate * x) + u, 0.5)
        >>> found = solve(wave, jnp.zeros(2), jnp.zeros((50, 2)), solver=picard())
        >>> found.verdict.name, int(found.num_exact)
        ('CONVERGED', 50)
    """
    return Newton(IdentityJacobian())


def jacobi() -> Newton:
    """Jacobi's iteration: every step from the last guess of the step before it.

    Examples:
        >>> import jax.numpy as jnp
        >>> from partime_mcmc import Dynamics, jacobi, solve
        >>> wave = Dynamics(lambda rate, x, u: jnp.cos(rate * x) + u, 0.5)
        >>> found = solve(wave, jnp.zeros(2), jnp.zeros((50, 2)), solver=jacobi())
        >>> found.verdict.name, int(found.num_exact)
        ('CONVERGED', 50)
    """
    return Newton(ZeroJacobian())


def _diagonal(num_probes: int | None) -> Linearizer:
    return DiagonalJacobian() if num_probes is None else HutchinsonDiagonal(num_probes)


def _tamed(linearizer: Linearizer, damping: float, clip: float | None) -> Linearizer:
    if not 0.0 <= damping <= 1.0:
        raise ValueError(f"damping must be between 0 and 1, got {damping!r}")
    if clip is not None and not clip > 0.0:
        raise ValueError(f"clip must be positive or None, got {clip!r}")
    if clip is not None:
        linearizer = Clipped(linearizer, clip)
    return Damped(linearizer, damping) if damping else linearizer
