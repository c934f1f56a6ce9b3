"""Kalman messages, as a monoid: one step of a filter, ready for a parallel scan.

The filter for `x_t = A x_{t-1} + b + N(0, Q)` with an observation of `x_t` itself, `y = x_t + N(0, R)`, is a chain of
conditional Gaussians. One message holds (Särkkä & García-Fernández 2021, IEEE TAC 66(1), Lemma 7; their letters)

    p(x_t | y_t, x_{t-1}) = N(x_t; A x_{t-1} + b, C)      p(y_t | x_{t-1}) ∝ exp(ηᵀ x_{t-1} − ½ x_{t-1}ᵀ J x_{t-1}),

messages compose associatively (their Lemma 8), and a message acts on a Gaussian belief by conditioning on its second
factor and pushing the result through its first. The trust region of ELK is this filter with the present guess as the
observation: in the coordinates of the correction δ, `b` is the residual, `y = 0`, `Q = I` and `R = I/λ`.

Left out: observation matrices, likelihoods, square-root forms (all covariances here are between 0 and I/λ, so the plain
form is stable enough; float32 runs are tested).
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.scipy.linalg import solve

from partime_mcmc.scan.affine import Dense, Diagonal
from partime_mcmc.types import Array, pytree


@pytree()
class _Message:
    """The numbers of a Kalman message; their shapes are those of the class."""

    A: Array
    b: Array
    C: Array
    eta: Array
    J: Array


@pytree()
class DenseBelief:
    """A Gaussian belief with `mean` of shape `(D,)` and `covariance` of shape `(D, D)`."""

    mean: Array
    covariance: Array


@pytree()
class DenseMessage(_Message):
    """A Kalman message: `A`, `C`, `J` of shape `(D, D)`, `b` and `eta` of shape `(D,)`."""

    @classmethod
    def trust_region(cls, step: Dense, damping: Array) -> DenseMessage:
        """The message of `δ = step(δ') + N(0, I)` seen as 0 with variance `1/damping` (`damping ≥ 0`, a scalar)."""
        # With Q = I and R = I/λ the gain is 1/(1 + λ): everything about the observation is a scalar.
        keep = 1.0 / (1.0 + damping)
        pull = damping * keep
        A = step.matrix
        return cls(
            keep * A,
            keep * step.shift,
            keep * jnp.eye(A.shape[-1], dtype=A.dtype),
            -pull * (A.T @ step.shift),
            pull * (A.T @ A),
        )

    def __call__(self, belief: DenseBelief) -> DenseBelief:
        """The belief after this step, given the belief before it."""
        P = belief.covariance
        gain = solve(
            jnp.eye(P.shape[-1], dtype=P.dtype) + P @ self.J,
            jnp.concatenate([(belief.mean + P @ self.eta)[:, None], P], axis=1),
        )
        mean, covariance = gain[:, 0], gain[:, 1:]
        return DenseBelief(
            self.A @ mean + self.b, _symmetric(self.A @ covariance @ self.A.T + self.C)
        )

    def after(self, earlier: DenseMessage) -> DenseMessage:
        """`self ∘ earlier`."""
        identity = jnp.eye(self.A.shape[-1], dtype=self.A.dtype)
        # M = (I + C₁ J₂)⁻¹ and its transpose serve every field.
        M = solve(identity + earlier.C @ self.J, identity)
        AM = self.A @ M
        back = earlier.A.T @ M.T
        return DenseMessage(
            AM @ earlier.A,
            AM @ (earlier.b + earlier.C @ self.eta) + self.b,
            _symmetric(AM @ earlier.C @ self.A.T + self.C),
            back @ (self.eta - self.J @ earlier.b) + earlier.eta,
            _symmetric(back @ self.J @ earlier.A + earlier.J),
        )

    @staticmethod
    def certain(mean: Array) -> DenseBelief:
        """The belief that the state is `mean`, shape `(D,)`, exactly."""
        return DenseBelief(mean, jnp.zeros((*mean.shape, mean.shape[-1]), mean.dtype))

    @staticmethod
    def smoother(belief: DenseBelief, following: Dense) -> Dense:
        """The map from the smoothed mean at t+1 to that at t, `following` being the step t → t+1 with noise I."""
        P, A = belief.covariance, following.matrix
        gain = solve(A @ P @ A.T + jnp.eye(A.shape[-1], dtype=A.dtype), A @ P).T
        return Dense(gain, belief.mean - gain @ following(belief.mean))


@pytree()
class DiagonalBelief:
    """Independent Gaussian beliefs, `mean` and `variance` of shape `(D,)`."""

    mean: Array
    variance: Array


@pytree()
class DiagonalMessage(_Message):
    """D independent scalar Kalman messages: every field of shape `(D,)`."""

    @classmethod
    def trust_region(cls, step: Diagonal, damping: Array) -> DiagonalMessage:
        """As `DenseMessage.trust_region`, for a diagonal step."""
        keep = 1.0 / (1.0 + damping)
        pull = damping * keep
        a = step.diagonal
        return cls(
            keep * a,
            keep * step.shift,
            keep * jnp.ones_like(a),
            -pull * a * step.shift,
            pull * a * a,
        )

    def __call__(self, belief: DiagonalBelief) -> DiagonalBelief:
        """The belief after this step, given the belief before it."""
        shrink = 1.0 / (1.0 + belief.variance * self.J)
        mean = shrink * (belief.mean + belief.variance * self.eta)
        return DiagonalBelief(
            self.A * mean + self.b, self.A * self.A * shrink * belief.variance + self.C
        )

    def after(self, earlier: DiagonalMessage) -> DiagonalMessage:
        """`self ∘ earlier`."""
        m = 1.0 / (1.0 + earlier.C * self.J)
        forward, back = self.A * m, earlier.A * m
        return DiagonalMessage(
            forward * earlier.A,
            forward * (earlier.b + earlier.C * self.eta) + self.b,
            forward * earlier.C * self.A + self.C,
            back * (self.eta - self.J * earlier.b) + earlier.eta,
            back * self.J * earlier.A + earlier.J,
        )

    @staticmethod
    def certain(mean: Array) -> DiagonalBelief:
        """The belief that the state is `mean`, shape `(D,)`, exactly."""
        return DiagonalBelief(mean, jnp.zeros_like(mean))

    @staticmethod
    def smoother(belief: DiagonalBelief, following: Diagonal) -> Diagonal:
        """The map from the smoothed mean at t+1 to that at t, `following` being the step t → t+1 with noise I."""
        a = following.diagonal
        gain = a * belief.variance / (a * a * belief.variance + 1.0)
        return Diagonal(gain, belief.mean - gain * following(belief.mean))


def _symmetric(matrix: Array) -> Array:
    # Rounding makes covariances drift from symmetry over long compositions.
    return 0.5 * (matrix + matrix.T)
