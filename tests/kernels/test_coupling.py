"""Couplings: the law of multishift noise, exact meetings, paths equal to the last bit, and what is refused.

Sizes of the gates: with n = 10^6 draws a Kolmogorov-Smirnov distance has band sqrt(log(2/1e-6)/2n) = 0.0027 at a chance of
1e-6 (Massart), and means of anything with unit variance err by more than 5/sqrt(n) in 6e-7 of all seeds.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import OPTIMISED
from scipy import stats

from partime_mcmc.certify.independent import certify
from partime_mcmc.engine.dynamics import rollout
from partime_mcmc.engine.recipes import jacobi, sequential, shooting
from partime_mcmc.engine.solution import Status, Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.forgetting.coalescence import meeting_times
from partime_mcmc.kernels import (
    CommonRandomNumbers,
    MultishiftCoupling,
    Whitening,
    coalescing_hmc,
    hmc,
    mala,
    nuts,
    random_walk,
)
from partime_mcmc.kernels.coupling import MultishiftNoise, draw_multishift_noise, multishift
from partime_mcmc.sampling.sample import sample
from partime_mcmc.sampling.target import Target

NUM_DRAWS = 1_000_000
BAND = np.sqrt(np.log(2 / 1e-6) / (2 * NUM_DRAWS))
EXACT = Tolerance(0.0, 0.0)


def noise_of(key, dtype, shape=(1000, 1000)):
    return jax.jit(jax.vmap(lambda one: draw_multishift_noise(one, shape[1], dtype)[0]))(
        jax.random.split(key, shape[0])
    )


def distance_to_normal(values):
    """Kolmogorov-Smirnov distance to the standard normal."""
    cumulative, grid = stats.norm.cdf(np.sort(values)), np.arange(len(values) + 1) / len(values)
    return max(np.max(cumulative - grid[:-1]), np.max(grid[1:] - cumulative))


# --- the law

PLACES = [("float64", place) for place in (0.0, 1e-3, 0.7, 1e3, 1e6)] + [
    ("float32", place) for place in (1e-3, 0.7, 1e4)
]


@pytest.mark.parametrize("dtype, place", PLACES)
def test_noise_is_normal_whatever_the_centre(dtype, place):
    scale = 0.37
    with jax.enable_x64(dtype == "float64"):
        center = jnp.asarray(place * scale, dtype)
        drawn = multishift(center, scale, noise_of(jax.random.key(1), dtype))
        noise = np.ravel((np.asarray(drawn.value, float) - float(center)) / scale)
    assert np.isfinite(noise).all()
    assert distance_to_normal(noise) < BAND
    for power, mean, spread in (
        (1, 0, 1),
        (2, 1, np.sqrt(2)),
        (3, 0, np.sqrt(15)),
        (4, 3, np.sqrt(96)),
    ):
        assert abs((noise**power).mean() - mean) < 5 * spread / np.sqrt(NUM_DRAWS)


def test_float32_beyond_its_precision_rounds_and_loses_nothing_else():
    """At |c| = 1e6 σ an ulp of c is 0.06 σ: y is a multiple of it, and of the right spread, as c + σ n would be."""
    center = jnp.float32(1e6)
    value = np.asarray(multishift(center, 1.0, noise_of(jax.random.key(1), jnp.float32)).value)
    assert value.dtype == np.float32 and np.isfinite(value).all()
    noise = np.ravel(value.astype(float) - 1e6)
    assert (noise % 0.0625 == 0).all()
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_a_layer_of_two_degrees_of_freedom_would_be_caught():
    layers = noise_of(jax.random.key(1), jnp.float32)
    heights = jax.random.uniform(jax.random.key(2), layers.radius.shape)
    wrong = MultishiftNoise(jnp.sqrt(-2 * jnp.log1p(-heights)), layers.offset)
    assert (
        distance_to_normal(
            np.ravel(multishift(jnp.float32(0.7), 1.0, wrong).value) - np.float32(0.7)
        )
        > 10 * BAND
    )


def correlations(layers):
    """The largest correlation between two coordinates of noise around one centre: of values, and of squares."""
    center = jnp.full(layers.radius.shape[1], 0.4)
    noise = np.asarray(multishift(center, 1.0, layers).value - center, float)
    off = ~np.eye(noise.shape[1], dtype=bool)
    return [np.abs(np.corrcoef(values, rowvar=False)[off]).max() for values in (noise, noise**2)]


def test_coordinates_are_independent_and_so_are_their_squares():
    num_draws = 200_000
    layers = noise_of(jax.random.key(3), jnp.float32, (num_draws, 5))
    bound = 5 / np.sqrt(num_draws)
    assert max(correlations(layers)) < bound
    # Power: tied layers leave correlations at zero, and are caught by the squares.
    tied = MultishiftNoise(jnp.repeat(layers.radius[:, :1], 5, axis=1), layers.offset)
    plain, squares = correlations(tied)
    assert plain < bound < 0.1 < squares


def test_the_noise_is_independent_of_the_decision():
    layers, uniform = jax.jit(jax.vmap(lambda key: draw_multishift_noise(key, 1, jnp.float32)))(
        jax.random.split(jax.random.key(4), 200_000)
    )
    noise = np.asarray(multishift(jnp.zeros(1), 1.0, layers).value[:, 0], float)
    for values in (
        noise,
        noise**2,
        np.asarray(layers.radius)[:, 0],
        np.asarray(layers.offset)[:, 0],
    ):
        assert abs(np.corrcoef(values, uniform)[0, 1]) < 5 / np.sqrt(len(noise))


# --- the map


def test_the_map_is_a_staircase_with_the_margin_it_states():
    with jax.enable_x64(True):
        layers = noise_of(jax.random.key(5), jnp.float64, (500, 1))
        center = jax.random.normal(jax.random.key(6), (500, 1)) * 3
        draw = jax.vmap(lambda c, one: multishift(c, 0.5, one))
        value, margin = draw(center, layers)
        for sign in (1, -1):
            within = draw(center + sign * 0.999 * 0.5 * margin[:, None], layers).value
            np.testing.assert_array_equal(within, value)
        beyond = [
            draw(center + sign * 1.001 * 0.5 * margin[:, None], layers).value for sign in (1, -1)
        ]
        assert ((beyond[0] != value) | (beyond[1] != value)).all()
        slope = jax.vmap(jax.grad(lambda c, one: multishift(c, 0.5, one).value.sum()))(
            center, layers
        )
        np.testing.assert_array_equal(slope, 0)
        assert (np.abs(value - center) <= 0.5 * layers.radius * (1 + 1e-12)).all()
        # Of several coordinates it is the nearest edge that counts.
        columns = center[:3, 0], jax.tree.map(lambda leaf: leaf[:3, 0], layers)
        assert multishift(columns[0], 0.5, columns[1]).margin == margin[:3].min() < margin[:3].max()


# --- meeting

DIMENSION = 5


def bowl(x):
    """Nearly standard normal, with a quartic wall."""
    return -0.5 * jnp.sum(x**2) - 0.02 * jnp.sum(x**4)


@functools.cache
def unit():
    return Whitening.of_covariance(jnp.zeros(DIMENSION), jnp.zeros(DIMENSION), jnp.ones(DIMENSION))


def meetings(kernel, num_steps=400, num_pairs=256):
    """Steps until exact equality of pairs from independent starts under the same random numbers, as (median, worst, all met)."""
    starts = jax.random.normal(jax.random.key(7), (2, num_pairs, DIMENSION))
    state = kernel.init(jnp.zeros(DIMENSION))
    tapes = jax.vmap(lambda key: kernel.tape(key, num_steps, state))(
        jax.random.split(jax.random.key(8), num_pairs)
    )
    found = meeting_times(kernel.dynamics(), starts[0], starts[1], tapes, tolerance=EXACT)
    steps = np.asarray(found.steps)
    return np.median(steps), steps.max(), bool(np.all(found.met))


MEETINGS = {  # kernel, the median that is promised
    "mala": (lambda: mala(bowl, 0.5, unit(), coupling=MultishiftCoupling()), 12),
    "random walk": (lambda: random_walk(bowl, 1.0, unit(), coupling=MultishiftCoupling()), 25),
    "random walk in blocks": (
        lambda: random_walk(bowl, 1.5, unit(), coupling=MultishiftCoupling(), block=2),
        25,
    ),
    "coalescing hmc": (lambda: coalescing_hmc(bowl, 0.75, unit(), 2), 10),
}


@pytest.mark.parametrize("name", MEETINGS)
def test_chains_meet_exactly(name):
    build, promised = MEETINGS[name]
    median, worst, all_met = meetings(build())
    assert all_met and median <= promised and worst < 400


def test_common_random_numbers_do_not_meet_where_the_multishift_coupling_does():
    assert not meetings(random_walk(bowl, 1.0, unit()))[2]


# --- paths


@pytest.mark.parametrize(
    "build", [MEETINGS["mala"][0], MEETINGS["random walk"][0]], ids=["mala", "random walk"]
)
def test_shooting_is_the_sequential_path_to_the_last_bit(build):
    """In float32, whatever the number of segments, with rejections, and with no tolerance to hide behind."""
    with jax.enable_x64(False):
        kernel, num_steps = build(), 4096
        state = kernel.init(jnp.ones(DIMENSION, jnp.float32))
        tape, initial, dynamics = (
            kernel.tape(jax.random.key(9), num_steps, state),
            kernel.carry(state),
            kernel.dynamics(),
        )
        path = jax.jit(rollout, compiler_options=OPTIMISED)(dynamics, initial, tape)
        assert 100 < (np.asarray(path[1:]) == np.asarray(path[:-1])).all(axis=1).sum() < 3996
        for num_segments in (8, 64, 256):
            found = jax.jit(
                functools.partial(solve, solver=shooting(num_segments), tolerance=EXACT),
                compiler_options=OPTIMISED,
            )(dynamics, initial, tape)
            assert Status(int(found.status)) is Status.CONVERGED and float(found.residual) == 0
            np.testing.assert_array_equal(found.states, path)
        certificate = certify(kernel, initial, found.states, tape)
        assert bool(certificate.certified) and float(certificate.min_lattice_margin) > 0


def test_jacobi_alone_finds_the_path():
    with jax.enable_x64(True):
        kernel = MEETINGS["mala"][0]()
        state = kernel.init(jnp.ones(DIMENSION))
        tape = kernel.tape(jax.random.key(10), 2048, state)
        found = solve(
            kernel.dynamics(), kernel.carry(state), tape, solver=jacobi(), max_iterations=150
        )
        assert Status(int(found.status)) is Status.CONVERGED and int(found.iterations) < 100
        path = rollout(kernel.dynamics(), kernel.carry(state), tape)
        np.testing.assert_allclose(found.states, path, rtol=0, atol=1e-12)


# --- what is refused


def test_bad_couplings_and_blocks():
    for builder in (mala, hmc, random_walk):
        with pytest.raises(
            TypeError,
            match=r"coupling: got 'coalescing', wanted CommonRandomNumbers\(\) or MultishiftCoupling\(\)",
        ):
            builder(bowl, 0.5, unit(), coupling="coalescing")
    with pytest.raises(TypeError, match="metric: got .*, wanted a Whitening for hmc"):
        hmc(bowl, 0.5, jnp.ones(DIMENSION), 2, coupling=MultishiftCoupling())
    with pytest.raises(
        TypeError, match="metric: got ndarray, wanted a Whitening for coalescing_hmc"
    ):
        coalescing_hmc(bowl, 0.5, np.ones(DIMENSION))
    with pytest.raises(ValueError, match="block: got 2 with CommonRandomNumbers"):
        random_walk(bowl, 0.5, coupling=CommonRandomNumbers(), block=2)
    with pytest.raises(ValueError, match="every: got 0; wanted an int of at least 1"):
        coalescing_hmc(bowl, 0.5, unit(), every=0)
    with pytest.raises(ValueError, match="step_size: got nan"):
        coalescing_hmc(bowl, 0.5, unit(), mala_step_size=float("nan"))


# --- sampling


def test_sample_takes_the_coupling_with_which_chains_meet_sooner_and_notes_it():
    with jax.enable_x64(True):
        target = Target(bowl, lambda key: jax.random.normal(key, (DIMENSION,)))
        draws = sample(
            jax.random.key(3), target, mala, num_samples=1024, num_chains=2, num_warmup=64
        ).or_raise()
        assert draws.plan["coupling"] == "MultishiftCoupling()"
        assert "Multishift coupling: pilot pairs met after" in draws.warmup.notes[-1]
        assert (np.asarray(draws.certificate.num_rejected) > 10).all()
        assert np.isfinite(np.asarray(draws.certificate.min_lattice_margin)).all()
        # The warm-up keeps the choice: the same chains again, one step after another.
        again = sample(
            jax.random.key(3),
            target,
            draws.warmup,
            num_samples=1024,
            num_chains=2,
            solver=sequential(),
        )
        np.testing.assert_array_equal(again.info["accepted"], draws.info["accepted"])
        np.testing.assert_allclose(again.positions, draws.positions, rtol=0, atol=1e-9)


def test_a_coupling_is_refused_where_there_is_no_choice():
    target = Target(bowl, jnp.zeros(DIMENSION))
    with pytest.raises(
        TypeError,
        match=r"coupling: got MultishiftCoupling\(\) with .*, wanted a builder that takes a coupling",
    ):
        sample(jax.random.key(0), target, nuts, num_samples=4, coupling=MultishiftCoupling())
    with pytest.raises(
        TypeError,
        match=r"coupling: got CommonRandomNumbers\(\) with .*, wanted a builder that takes a coupling",
    ):
        sample(
            jax.random.key(0),
            target,
            mala(bowl, 0.1),
            num_samples=4,
            coupling=CommonRandomNumbers(),
        )
    with pytest.raises(TypeError, match="coupling: got 1, wanted"):
        sample(jax.random.key(0), target, mala, num_samples=4, coupling=1)


def test_the_decisions_of_a_cycle_do_not_depend_on_its_momenta():
    """Nor do momenta on each other: 10,000 transitions, gates of five standard errors."""
    kernel, num_steps = coalescing_hmc(bowl, 0.5, unit(), 2), 10_000
    tape = kernel.tape(jax.random.key(8), num_steps, kernel.init(jnp.zeros(DIMENSION)))
    numbers = tape.randomness
    scores = np.column_stack([stats.norm.ppf(numbers.uniform), numbers.momentum])
    correlations = np.corrcoef(scores, rowvar=False) - np.eye(1 + DIMENSION)
    assert np.abs(correlations).max() < 5 / np.sqrt(num_steps)
    # Nor does the Langevin step of every fourth transition.
    landing = numbers.langevin
    others = np.column_stack([landing.uniform, landing.layers.offset, landing.layers.radius])
    both = np.corrcoef(scores[3::4], others[3::4], rowvar=False)[1 + DIMENSION :, : 1 + DIMENSION]
    assert both.shape == (1 + 2 * DIMENSION, 1 + DIMENSION)
    assert np.abs(both).max() < 5 / np.sqrt(num_steps / 4)
