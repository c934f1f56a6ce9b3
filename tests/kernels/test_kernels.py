"""Every kernel of the catalogue: its parallel path is BlackJAX's own loop with the same keys; and what builders refuse."""

import dataclasses
import functools
import re
from types import SimpleNamespace
from typing import NamedTuple

import blackjax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from blackjax.util import run_inference_algorithm
from catalogue import QUICK
from jax.flatten_util import ravel_pytree
from kernel_catalogue import DIMENSION, KERNELS, logdensity_of, start_of

from partime_mcmc.certify.independent import certify_with_records
from partime_mcmc.engine.dynamics import rollout
from partime_mcmc.engine.recipes import deer, jacobi
from partime_mcmc.engine.solution import Status
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.windows import Windows
from partime_mcmc.kernels import (
    Carry,
    Kernel,
    MultishiftCoupling,
    Whitening,
    blackjax_loop,
    coalescing_hmc,
    from_blackjax,
    hmc,
    mala,
    nuts,
    random_walk,
)
from partime_mcmc.kernels.explicit_randomness import ExplicitRandomnessKernel
from partime_mcmc.kernels.metric_root import LowRank

T = 96
every_kernel = pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)


def users_loop(algorithm, position, init_key, keys):
    """A BlackJAX user's own loop: full states and infos of every step, nothing of this package."""

    def advance(state, key):
        state, info = algorithm.step(key, state)
        return state, (state, info)

    return jax.lax.scan(advance, algorithm.init(position, init_key), keys)[1]


@functools.cache
def everything(row):
    """BlackJAX's loop, the kernel's rollout, its parallel path and certificate in float64, from one program."""
    with jax.enable_x64(True):
        algorithm = row.algorithm(logdensity_of(jnp.float64), DIMENSION, jnp.float64)
        kernel = from_blackjax(algorithm)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def program(position, init_key, key):
            states, infos = users_loop(algorithm, position, init_key, jax.random.split(key, T))
            state = kernel.init(position, init_key)
            initial, tape = kernel.carry(state), kernel.tape(key, T, state)
            solution = solve(
                kernel.dynamics(), initial, tape, solver=row.solver, schedule=Windows(24)
            )
            certificate, records = certify_with_records(kernel, initial, solution.states, tape)
            return SimpleNamespace(
                states=states,
                infos=infos,
                rolled=rollout(kernel.dynamics(), initial, tape),
                solution=solution,
                certificate=certificate,
                records=records,
                tape=tape,
            ).__dict__

        found = program(start_of(jnp.float64), jax.random.key(5), jax.random.key(2))
        return SimpleNamespace(kernel=kernel, **found)


def flat(path):
    """A path of positions or states as `(T, D)`."""
    return np.concatenate(
        [np.asarray(leaf).reshape(T, -1) for leaf in jax.tree.leaves(path)], axis=1
    )


def fields_of(carries):
    """A path of carries as a dict of what it holds."""
    return (
        {"position": carries.position, **carries.others}
        if isinstance(carries, Carry)
        else {"position": carries}
    )


@every_kernel
def test_paths_are_blackjaxs_own_loop(row):
    found = everything(row)
    assert Status(int(found.solution.status)) is Status.CONVERGED
    for path in (found.rolled, found.solution.states):
        held = fields_of(path)
        assert set(held) == {"position", *row.others}
        for name, values in held.items():
            np.testing.assert_allclose(
                flat(values), flat(getattr(found.states, name)), rtol=0, atol=1e-8, err_msg=name
            )


@every_kernel
def test_certificate_and_decisions_agree_with_blackjax(row):
    found = everything(row)
    certificate, infos = found.certificate, found.infos
    assert bool(certificate.certified) and bool(certificate.finite) and not bool(certificate.frozen)
    assert int(certificate.num_steps) == T and int(certificate.num_nonfinite_proposals) == 0
    if hasattr(infos, "is_accepted"):
        accepted = np.asarray(infos.is_accepted)
        np.testing.assert_array_equal(certificate.accepted, accepted)
        np.testing.assert_array_equal(found.records.accepted, accepted)
        assert int(certificate.num_rejected) == (~accepted).sum()
        assert not row.decides or 5 < (~accepted).sum() < T - 5, (
            "the rejections this test is about did not occur"
        )
    else:
        assert int(certificate.num_rejected) == -1 and not row.decides
    assert (int(certificate.num_ambiguous) == -1) == (not row.margins)
    for name, source in (
        ("acceptance_rate", "acceptance_rate"),
        ("diverging", "is_divergent"),
        ("energy", "energy"),
        ("num_steps", "num_integration_steps"),
    ):
        recorded, wanted = getattr(found.records, name), getattr(infos, source, None)
        assert (recorded is None) == (wanted is None), name
        if wanted is not None:
            np.testing.assert_allclose(
                recorded, np.broadcast_to(wanted, np.shape(recorded)), rtol=1e-8, atol=1e-8
            )
    if hasattr(found.states, "logdensity"):
        np.testing.assert_allclose(
            found.records.logdensity, found.states.logdensity, rtol=1e-8, atol=1e-8
        )


@every_kernel
def test_tape_holds_the_keys_and_the_discrete_leaves(row):
    found = everything(row)
    if not isinstance(found.kernel.algorithm, ExplicitRandomnessKernel):
        np.testing.assert_array_equal(
            jax.random.key_data(found.tape.randomness),
            jax.random.key_data(jax.random.split(jax.random.key(2), T)),
        )
    assert set(found.tape.discrete) == set(row.discrete)
    for name in row.discrete:  # before each step: the start's, then what every step left
        taped, left = found.tape.discrete[name], getattr(found.states, name)
        first, distinct = jnp.int32(0), 3
        if jnp.issubdtype(taped.dtype, jax.dtypes.prng_key):
            taped, left, first, distinct = (
                *map(jax.random.key_data, (taped, left, jax.random.key(5))),
                T,
            )
        np.testing.assert_array_equal(taped[0], first)
        np.testing.assert_array_equal(taped[1:], left[:-1])
        assert len(np.unique(taped, axis=0)) == distinct
    assert bool(found.certificate.discrete_consistent)


@pytest.mark.parametrize("row", [row for row in KERNELS if row.float32], ids=lambda row: row.name)
def test_float32_path_is_certified_and_stays_float32(row):
    with jax.enable_x64(False):
        kernel = row.build(logdensity_of(jnp.float32), DIMENSION, jnp.float32)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def program(position, key):
            state = kernel.init(position, key)
            initial, tape = kernel.carry(state), kernel.tape(key, 40, state)
            solution = solve(kernel.dynamics(), initial, tape, solver=jacobi())
            return solution, certify_with_records(kernel, initial, solution.states, tape)[0]

        solution, certificate = program(start_of(jnp.float32), jax.random.key(3))
        assert Status(int(solution.status)) is Status.CONVERGED and bool(certificate.certified)
        assert {leaf.dtype for leaf in jax.tree.leaves(solution.states)} == {jnp.dtype("float32")}
        assert (
            float(certificate.tolerance) == pytest.approx(1e-4)
            and certificate.residual.dtype == jnp.float32
        )


# --- the random numbers


def test_split_keys_are_prefix_stable(precision):
    keys = jax.random.key_data(jax.random.split(jax.random.key(9), 1000))
    for num_steps in (1, 2, 17, 999):
        np.testing.assert_array_equal(
            jax.random.key_data(jax.random.split(jax.random.key(9), num_steps)), keys[:num_steps]
        )


def test_a_longer_chain_begins_like_a_shorter_one(precision):
    row = next(row for row in KERNELS if row.discrete)
    kernel = row.build(logdensity_of(precision), DIMENSION, precision)
    state = kernel.init(start_of(precision), jax.random.key(1))
    short, long = (kernel.tape(jax.random.key(4), num_steps, state) for num_steps in (5, 12))
    for first, second in zip(jax.tree.leaves(short), jax.tree.leaves(long), strict=True):
        np.testing.assert_array_equal(jax.random.key_data(first), jax.random.key_data(second)[:5])


def test_legacy_keys_give_the_same_chain():
    kernel = from_blackjax(blackjax.mala(logdensity_of(jnp.float32), 0.3))
    state = kernel.init(start_of(jnp.float32))
    paths = [
        rollout(kernel.dynamics(), kernel.carry(state), kernel.tape(key, 6, state))
        for key in (jax.random.key(3), jax.random.PRNGKey(3))
    ]
    jax.tree.map(np.testing.assert_array_equal, *paths)


# --- a kernel is a BlackJAX algorithm


def test_kernel_runs_in_blackjaxs_own_helper():
    """In whitened coordinates too, where states hold `z` and `kernel.position` speaks the user's positions."""
    with jax.enable_x64(True):
        metric = Whitening.of_covariance(
            start_of(jnp.float64), jnp.ones(3), jnp.asarray(np.diag([1.0, 4.0, 0.25]))
        )
        kernel = hmc(logdensity_of(jnp.float64), 0.7, metric, 2)
        key, state = jax.random.key(6), kernel.init(start_of(jnp.float64))
        _, history = run_inference_algorithm(
            key,
            kernel,
            20,
            initial_state=state,
            transform=lambda state, info: (state, info.is_accepted),
        )
        carries, infos = jax.jit(functools.partial(blackjax_loop, kernel))(
            state, jax.random.split(key, 20)
        )
        np.testing.assert_allclose(history[0].position, carries, rtol=1e-12)
        np.testing.assert_array_equal(history[1], infos.is_accepted)
        there = jax.vmap(kernel.position)(carries)
        assert set(there) == {"position", "slope"}
        np.testing.assert_allclose(there["slope"], 1 + 0.5 * np.asarray(carries)[:, 2], rtol=1e-12)


class _Phase(NamedTuple):
    position: jax.Array
    count: jax.Array
    angle: jax.Array


def test_own_algorithm_with_counter_and_extra_float():
    """Your own named tuple: the counter goes on the tape, the angle into the carry."""

    def step(key, state):
        angle = 0.7 * state.angle + jax.random.normal(key)
        position = 0.5 * state.position + jnp.sin(angle) * (1 + state.count % 3)
        return _Phase(position, state.count + 1, angle), ()

    def init(position, rng_key=None):
        return _Phase(position, jnp.zeros((), jnp.int32), jnp.zeros((), position.dtype))

    kernel = Kernel(SimpleNamespace(init=init, step=step))
    state, keys = kernel.init(jnp.ones(2)), jax.random.split(jax.random.key(0), 30)
    _, (want, _) = jax.lax.scan(
        lambda s, k: (lambda new: (new[0], (new[0], ())))(step(k, s)), state, keys
    )
    tape = kernel.tape(jax.random.key(0), 30, state)
    np.testing.assert_array_equal(tape.discrete["count"], np.arange(30))
    solution = solve(kernel.dynamics(), kernel.carry(state), tape, solver=deer())
    np.testing.assert_allclose(
        solution.or_raise().states.position, want.position, rtol=1e-5, atol=1e-5
    )
    np.testing.assert_allclose(solution.states.others["angle"], want.angle, rtol=1e-5, atol=1e-5)


def test_algorithm_whose_state_is_the_position_itself():
    kernel = from_blackjax(
        SimpleNamespace(
            init=lambda position: position,
            step=lambda key, x: (0.5 * x + jax.random.normal(key, x.shape), ()),
        )
    )
    tape = kernel.tape(jax.random.key(0), 10, kernel.init(jnp.ones(2)))
    path = rollout(kernel.dynamics(), jnp.ones(2), tape)
    noise = np.asarray(jax.vmap(lambda key: jax.random.normal(key, (2,)))(tape.randomness))
    x = np.ones(2)
    for t in range(10):
        x = 0.5 * x + noise[t]
        np.testing.assert_allclose(path[t], x, rtol=1e-5)


# --- whitened coordinates


def covariance_of(shape):
    root = np.random.default_rng(3).normal(size=(3, 3))
    dense = root @ root.T + np.diag([0.5, 3.0, 40.0])
    return dense if shape == "dense" else np.diag(dense)


@pytest.mark.parametrize("shape", ["dense", "diagonal"])
def test_whitening_enter_and_leave_are_inverse_and_white(shape):
    with jax.enable_x64(True):
        example, covariance = start_of(jnp.float64), covariance_of(shape)
        metric = Whitening.of_covariance(example, jnp.arange(3.0), covariance)
        for seed in range(3):
            z = jax.random.normal(jax.random.key(seed), (3,))
            there = metric.leave(z)
            assert jax.tree.structure(there) == jax.tree.structure(example)
            np.testing.assert_allclose(metric.enter(there), z, rtol=1e-12, atol=1e-12)
        root = np.stack(
            [ravel_pytree(metric.leave(unit))[0] - np.arange(3.0) for unit in np.eye(3)], axis=1
        )
        np.testing.assert_allclose(
            root @ root.T, covariance if shape == "dense" else np.diag(covariance), rtol=1e-12
        )
        np.testing.assert_allclose(metric.enter(metric.leave(jnp.zeros(3))), 0, atol=1e-12)


def test_low_rank_whitening_is_the_dense_one_of_its_covariance():
    with jax.enable_x64(True):
        rng = np.random.default_rng(4)
        # The last column stands for a direction that is not used.
        directions = np.linalg.qr(rng.normal(size=(3, 3)))[0] * [1.0, 1.0, 0.0]
        root = LowRank(np.array([0.5, 2.0, 1.0]), directions, np.array([3.0, 0.3, 1.0]))
        low = Whitening.of_covariance(start_of(jnp.float64), jnp.arange(3.0), root)
        stretched = np.eye(3) + directions @ np.diag([8.0, -0.91, 0.0]) @ directions.T
        columns = [ravel_pytree(low.leave(unit))[0] - np.arange(3.0) for unit in np.eye(3)]
        np.testing.assert_allclose(
            np.stack(columns, axis=1) @ np.stack(columns),
            np.diag(root.sigma) @ stretched @ np.diag(root.sigma),
            rtol=1e-12,
            atol=1e-14,
        )
        z = jnp.array([0.3, -2.0, 1.0])
        np.testing.assert_allclose(low.enter(low.leave(z)), z, rtol=1e-12)


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"directions": 1.1 * np.eye(3, 2)},
            "covariance.directions: columns are orthonormal only to",
        ),
        ({"directions": np.eye(2)}, r"covariance.directions: shape \(2, 2\), wanted \(3, 2\)"),
        (
            {"directions": np.zeros((3, 2))},
            "covariance.directions: columns are orthonormal only to",
        ),
        (
            {"directions": np.diag([1.0, 0.0, 0.0])[:, :2]},
            "covariance.directions: columns are orthonormal only to 0",
        ),
        ({"factors": np.array([9.0, -1.0])}, "covariance.factors: smallest entry -1"),
        ({"sigma": np.array([1.0, 0.0, 1.0])}, "covariance.sigma: smallest entry 0"),
        # A direction that is not used has the factor 1.
        (
            {"directions": np.zeros((3, 2)), "factors": np.array([1.0, 2.0])},
            "covariance.directions: columns",
        ),
    ],
)
def test_low_rank_roots_that_are_none_are_refused(changes, message):
    root = LowRank(np.ones(3), np.eye(3, 2), np.array([2.0, 0.5]))
    with pytest.raises(ValueError, match=message):
        Whitening.of_covariance(
            start_of(jnp.float32), jnp.zeros(3), dataclasses.replace(root, **changes)
        )


@pytest.mark.parametrize("shape", ["dense", "diagonal"])
def test_whitened_hmc_is_blackjaxs_hmc_with_that_metric(shape):
    """BlackJAX draws p = L⁻ᵀ n with n normal; in whitened coordinates p_z = Lᵀ p = n: the very same path."""
    with jax.enable_x64(True):
        covariance, density = jnp.asarray(covariance_of(shape)), logdensity_of(jnp.float64)
        whitened = hmc(
            density,
            0.25,
            Whitening.of_covariance(start_of(jnp.float64), jnp.arange(3.0), covariance),
            3,
        )
        plain = hmc(density, 0.25, covariance, 3)
        keys, position = jax.random.split(jax.random.key(8), 60), start_of(jnp.float64)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def run():
            paths = [
                blackjax_loop(kernel, kernel.init(position), keys) for kernel in (whitened, plain)
            ]
            return [
                (jax.vmap(kernel.position)(path), info.is_accepted)
                for kernel, (path, info) in zip((whitened, plain), paths)
            ]

        (ours, our_decisions), (theirs, their_decisions) = run()
        np.testing.assert_array_equal(our_decisions, their_decisions)
        assert 3 < (~np.asarray(our_decisions)).sum() < 57
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8), ours, theirs
        )


def test_builders_are_blackjaxs_algorithms():
    """Without a metric, `mala` and `random_walk` are BlackJAX's; in unit coordinates `nuts` is with unit mass."""
    with jax.enable_x64(True):

        def density(x):
            return -0.5 * jnp.sum(x**2) - 0.1 * jnp.sum(x**4)

        keys, start, unit = (
            jax.random.split(jax.random.key(1), 25),
            jnp.array([0.4, -1.0]),
            jnp.ones(2),
        )
        white = Whitening.of_covariance(start, jnp.zeros(2), unit)
        pairs = [
            (mala(density, 0.4), blackjax.mala(density, 0.4)),
            (mala(density, 0.4, white), blackjax.mala(density, 0.4)),
            (nuts(density, 0.6, white, 3), blackjax.nuts(density, 0.6, unit, max_num_doublings=3)),
            (
                random_walk(density, 0.8),
                blackjax.additive_step_random_walk(
                    density, blackjax.mcmc.random_walk.normal(0.8 * unit)
                ),
            ),
        ]

        @functools.partial(jax.jit, compiler_options=QUICK)
        def run():
            return [
                (
                    blackjax_loop(kernel, kernel.init(start), keys)[0],
                    users_loop(algorithm, start, jax.random.key(0), keys)[0].position,
                )
                for kernel, algorithm in pairs
            ]

        for ours, theirs in run():
            np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-9)
            assert len(np.unique(np.asarray(ours)[:, 0])) > 5


@pytest.mark.parametrize(
    "num_steps, step_size",
    [(1, 0.4), (3, 0.25), (11, 0.15)],
    ids=["one step", "written out", "a loop"],
)
def test_trajectories_without_the_densitys_value_are_blackjaxs(num_steps, step_size):
    with jax.enable_x64(True):
        density, mass = logdensity_of(jnp.float64), jnp.asarray(covariance_of("dense"))
        ours, theirs = (build(density, step_size, mass, num_steps) for build in (hmc, blackjax.hmc))
        keys, start = jax.random.split(jax.random.key(3), 40), start_of(jnp.float64)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def run():
            states, infos = users_loop(theirs, start, None, keys)
            path, info = blackjax_loop(ours, ours.init(start), keys)
            return (jax.vmap(ours.position)(path), info), (states.position, infos)

        (path, info), (wanted, infos) = run()
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-9), path, wanted
        )
        np.testing.assert_array_equal(info.is_accepted, infos.is_accepted)
        np.testing.assert_allclose(info.energy, infos.energy, rtol=1e-9)
        np.testing.assert_array_equal(info.num_integration_steps, num_steps)
        assert 0 < np.sum(~np.asarray(info.is_accepted)) < 40


def test_the_densitys_value_is_not_computed_on_the_way():
    """The compiled step has log(1 + x²) of the density after the loop of the leapfrogs, BlackJAX's has it inside."""

    def density(x):
        return -jnp.sum(jnp.log1p(x**2))

    def places(algorithm):
        """For every such logarithm, whether it is in the body of a loop."""
        step = jax.jit(lambda state: algorithm.step(jax.random.key(0), state)[0])
        blocks = {}
        for line in step.lower(algorithm.init(jnp.ones(7))).compile().as_text().splitlines():
            if line.endswith("{") and " = " not in line:
                inside = blocks.setdefault(line.removeprefix("ENTRY ").split()[0].lstrip("%"), [])
            elif " = " in line:
                inside.append(line)
        looped = set(re.findall(r"body=%?([\w.\-]+)", "\n".join(sum(blocks.values(), []))))
        while (
            called := {
                name
                for block in looped
                for line in blocks[block]
                for name in re.findall(r"(?:calls|to_apply)=%?([\w.\-]+)", line)
            }
            - looped
        ):
            looped |= called
        return [
            block in looped
            for block, lines in blocks.items()
            for line in lines
            if " log-plus-one(" in line and 'log1p"' in line
        ]

    assert places(blackjax.hmc(density, 0.1, jnp.ones(7), 11)) == [True]
    assert places(hmc(density, 0.1, jnp.ones(7), 11)) == [False]


def test_noise_scale_is_the_proposals():
    density = logdensity_of(jnp.float32)
    assert float(mala(density, 0.18).noise_scale) == pytest.approx(0.6)
    assert float(random_walk(density, 0.7).noise_scale) == pytest.approx(0.7)
    assert hmc(density, 0.3, jnp.ones(3), 2).noise_scale is None


def test_hmc_takes_a_quarter_period_by_default():
    """`L` leapfrogs with `h = 2 sin(π / 4L)` turn a standard normal by exactly a quarter: z(L) does not hold z(0)."""
    for leapfrogs in (1, 2, 3, 8, 20):
        step = 2 * np.sin(np.pi / (4 * leapfrogs))
        kernel = hmc(lambda x: -0.5 * jnp.sum(x**2), float(step), jnp.ones(1))
        ends = [
            kernel.step(jax.random.key(0), kernel.init(jnp.array([start])))[1].proposal.position[0]
            for start in (0.3, 1.7)
        ]
        np.testing.assert_allclose(ends[0], ends[1], atol=1e-4)


# --- what is refused, and in which words

BAD_STEPS = [
    0,
    0.0,
    -0.1,
    float("nan"),
    float("inf"),
    -float("inf"),
    np.float32(0),
    jnp.float32(jnp.nan),
    [0.1, 0.2],
    None,
]


@pytest.mark.parametrize("step_size", BAD_STEPS, ids=str)
@pytest.mark.parametrize(
    "builder", [mala, hmc, nuts, random_walk], ids=lambda builder: builder.__name__
)
def test_bad_step_size(builder, step_size):
    arguments = (jnp.ones(3),) if builder in (hmc, nuts) else ()
    with pytest.raises(ValueError, match=r"step_size: got .*, wanted one positive finite number"):
        builder(logdensity_of(jnp.float32), step_size, *arguments)


@pytest.mark.parametrize(
    "step_size", [1, np.int64(1), jnp.bfloat16(1.0), np.float32(1.0)], ids=repr
)
def test_step_sizes_of_every_kind_of_number(step_size):
    kernel, other = (mala(logdensity_of(jnp.float32), one) for one in (step_size, 1.0))
    start = start_of(jnp.float32)
    ends = [one.step(jax.random.key(1), one.init(start))[0] for one in (kernel, other)]
    jax.tree.map(np.testing.assert_array_equal, *(end.position for end in ends))


BAD_METRICS = {
    "scalar": (1.0, "shape"),
    "not square": (np.ones((3, 2)), "shape"),
    "three axes": (np.ones((3, 3, 3)), "shape"),
    "zero variance": ([1.0, 0.0, 1.0], "smallest variance 0"),
    "negative variance": ([1.0, -2.0, 1.0], "variance -2"),
    "NaN": ([1.0, np.nan, 1.0], "not finite"),
    "infinite": (np.diag([1.0, np.inf, 1.0]), "not finite"),
    "asymmetric": ([[1.0, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], "not symmetric"),
    "indefinite": ([[1.0, 2.0, 0.0], [2.0, 1.0, 0.0], [0.0, 0.0, 1.0]], "not positive definite"),
    "singular": (np.diag([1.0, 0.0, 1.0]), "not positive definite"),
}


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_matrices_are_symmetric_in_units_of_their_own(scale):
    start = start_of(jnp.float32)
    matrix = scale * (np.eye(3) + 1e-5 * np.eye(3, k=1))
    Whitening.of_covariance(start, jnp.zeros(3), matrix)
    with pytest.raises(ValueError, match="not symmetric"):
        Whitening.of_covariance(start, jnp.zeros(3), scale * (np.eye(3) + 1e-2 * np.eye(3, k=1)))


@pytest.mark.parametrize("case", BAD_METRICS)
def test_bad_metric(case, precision):
    value, message = BAD_METRICS[case]
    example = start_of(precision)
    for builder in (hmc, nuts):
        with pytest.raises(ValueError, match=f"metric: .*{message}"):
            builder(logdensity_of(precision), 0.1, np.array(value, precision))
    with pytest.raises(ValueError, match=f"covariance: .*{message}"):
        Whitening.of_covariance(example, jnp.zeros(3, precision), np.array(value, precision))


def test_whitening_of_another_dimension():
    with pytest.raises(ValueError, match=r"center: shape \(2,\), wanted \(3,\)"):
        Whitening.of_covariance(start_of(jnp.float32), jnp.zeros(2), jnp.ones(3))
    with pytest.raises(ValueError, match=r"covariance: shape \(4,\), wanted \(3,\) or \(3, 3\)"):
        Whitening.of_covariance(start_of(jnp.float32), jnp.zeros(3), jnp.ones(4))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_metric_of_another_dimension_than_the_position(size):
    """Not even a metric of one number, which would be broadcast in silence."""
    with pytest.raises(ValueError, match="metric"):
        hmc(logdensity_of(jnp.float32), 0.1, jnp.ones(size), 2).init(start_of(jnp.float32))


@pytest.mark.parametrize("num_integration_steps", [0, -3, 2.5])
def test_bad_number_of_leapfrogs(num_integration_steps):
    with pytest.raises((ValueError, TypeError), match="num_integration_steps"):
        hmc(logdensity_of(jnp.float32), 0.1, jnp.ones(3), num_integration_steps)


def test_bad_counts_of_other_builders():
    logdensity = logdensity_of(jnp.float32)
    whitening = Whitening.of_covariance(start_of(jnp.float32), jnp.zeros(3), jnp.eye(3))
    with pytest.raises(ValueError, match="max_num_doublings: got 0"):
        nuts(logdensity, 0.1, jnp.ones(3), max_num_doublings=0)
    with pytest.raises(ValueError, match="every: got 0"):
        coalescing_hmc(logdensity, 0.1, whitening, every=0)
    with pytest.raises(ValueError, match="block: got 0"):
        random_walk(logdensity, 0.1, coupling=MultishiftCoupling(), block=0)


@pytest.mark.parametrize("builder", [mala, random_walk], ids=lambda builder: builder.__name__)
def test_metric_of_another_kind(builder):
    with pytest.raises(TypeError, match="metric: got .*, wanted a Whitening or None"):
        builder(logdensity_of(jnp.float32), 0.1, jnp.ones(3))


@pytest.mark.parametrize("missing", ["init", "step"])
def test_algorithm_without_a_function(missing):
    parts = {"init": lambda position: position, "step": lambda key, state: (state, ())}
    with pytest.raises(
        TypeError, match=f"algorithm: got SimpleNamespace without a function `{missing}`"
    ):
        from_blackjax(
            SimpleNamespace(**{name: part for name, part in parts.items() if name != missing})
        )
    with pytest.raises(TypeError, match="algorithm"):
        from_blackjax(None)


def test_kernels_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        mala(logdensity_of(jnp.float32), 0.1).name = "other"


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: row.name)
def test_no_steps_have_an_empty_tape(row):
    kernel = row.build(logdensity_of(jnp.float32), DIMENSION, jnp.float32)
    tape = kernel.tape(jax.random.key(0), 0, kernel.init(start_of(jnp.float32)))
    assert {leaf.shape[0] for leaf in jax.tree.leaves(tape)} == {0}
