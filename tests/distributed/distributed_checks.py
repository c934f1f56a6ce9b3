"""What holds across devices, to be run in a process of its own: `python tests/distributed/distributed_checks.py [--all | NAME ...]`.

The number of devices is fixed before JAX starts, and all checks share one process, because most of the time is
compilation. A check is a function that raises; `test_distributed.py` shows what was raised. `--all` adds the checks
that take longer.
"""

import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"

import contextlib  # noqa: E402
import dataclasses  # noqa: E402
import functools  # noqa: E402
import tempfile  # noqa: E402
import traceback  # noqa: E402
from types import SimpleNamespace  # noqa: E402

import blackjax  # noqa: E402
import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from catalogue import (
    DYNAMICS,
    SOLVERS,
    Problem,
    by_name,
    measured_residual,  # noqa: E402
    sequential_path,
)
from fakes import exact_path
from jax.sharding import PartitionSpec  # noqa: E402

from benchmarks.devices import collectives  # noqa: E402
from partime_mcmc import (
    AllAtOnce,
    Dynamics,
    Kernel,
    MultishiftCoupling,
    Status,
    Store,
    Target,
    Tolerance,
    Windows,
    deer,
    from_blackjax,
    jacobi,
    mala,
    quasi_deer,
    resume,
    rollout,
    sample,
    shooting,
    solve,
)
from partime_mcmc import compile_cache as programs  # noqa: E402
from partime_mcmc.distributed import ShardedTime, sharded_chains, sharded_solve, summed, time_mesh  # noqa: E402
from partime_mcmc.distributed import collectives as exchange
from partime_mcmc.engine import recipes
from partime_mcmc.engine.adjoint import Implicit, ImplicitSegmented
from partime_mcmc.engine.time_axis import LocalTime
from partime_mcmc.kernels import blackjax_loop
from partime_mcmc.linearize import Clipped, DenseJacobian  # noqa: E402
from partime_mcmc.sampling.arguments import SampleArguments  # noqa: E402
from partime_mcmc.sampling.memory import chunk_steps  # noqa: E402
from partime_mcmc.scan import Dense, DenseMessage, Diagonal
from partime_mcmc.solvers import Shooting  # noqa: E402

# As in `conftest.py`: what is compiled here runs once.
programs.CPU_OPTIONS.clear()
CHECKS, SLOW = [], []


def close(got, wanted, bound=1e-10):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=bound)


def checked(row, problem, num_steps, mesh):
    """Solve over a mesh; the path must be the sequential one, and evaluations must add up."""
    found = sharded_solve(
        problem.dynamics, problem.initial, problem.drives, mesh=mesh, solver=row.solver
    )
    assert found.verdict == Status.CONVERGED, (row.name, found.verdict)
    wanted = sequential_path(problem)
    close(found.states, wanted, 1e-10)
    assert int(found.num_exact) == num_steps
    by_device = np.asarray(found.stats.evaluations_by_part)
    assert by_device.shape == (mesh.shape["time"],)
    np.testing.assert_allclose(by_device.sum(), float(found.stats.evaluations), rtol=1e-5)
    return found


@CHECKS.append
def every_operation_along_time_has_the_result_of_one_device():
    rng, mesh, axis = np.random.default_rng(0), time_mesh(), ShardedTime(8)
    matrices, shifts = (
        jnp.asarray(rng.normal(size=(24, 3, 3)) / 3),
        jnp.asarray(rng.normal(size=(24, 3))),
    )
    states, first = jnp.asarray(rng.normal(size=(24, 3))), jnp.asarray(rng.normal(size=3))
    holes = jnp.asarray(rng.uniform(size=24)).at[13].set(jnp.nan)
    flags = [jnp.arange(24) < n for n in (0, 3, 7, 24)] + [jnp.arange(24) != 11]

    def answers(axis, matrices, shifts, states, first, holes, flags):
        half = lambda matrix: matrix @ jnp.swapaxes(matrix, 1, 2)
        messages = DenseMessage(matrices, shifts, half(matrices), shifts, half(matrices))
        along = (
            axis.previous(first, states),
            axis.following(states, first),
            axis.prefix(Dense(matrices, shifts), first),
            axis.suffix(Dense(matrices, shifts), first),
            axis.suffix(Diagonal(shifts, states), first),
            axis.prefix(messages, DenseMessage.certain(first)),
            axis.index(states.shape[0]),
            axis.in_turn(
                lambda x: rollout(Dynamics(lambda p, x, u: jnp.tanh(x + u)), x, shifts), first
            ),
        )
        same = (
            axis.total(states),
            axis.maximum(jnp.abs(states)),
            axis.maximum(holes),
            [axis.length_of_true(flag) for flag in flags],
            axis.last(states),
            axis.repeat(lambda n: n < 5, lambda n: n + 1, jnp.zeros((), jnp.int32)),
        )
        return along, same

    along, same = PartitionSpec("time"), PartitionSpec()
    args = matrices, shifts, states, first, holes, flags
    spread = jax.shard_map(
        functools.partial(answers, axis),
        mesh=mesh,
        in_specs=(along, along, along, same, along, along),
        out_specs=(along, same),
        check_vma=False,
    )
    got = jax.jit(spread)(*args)
    wanted = jax.jit(functools.partial(answers, LocalTime()))(*args)
    close(got, wanted, 1e-13)
    assert np.isnan(got[1][2]) and axis.length(3) == 24


@CHECKS.append
def recipes_find_the_path_of_one_device_where_devices_share_evenly():
    mesh, problem = time_mesh(), by_name(DYNAMICS, "accept or reject").build(64, jnp.float64)
    for name in ("sequential", "deer", "jacobi"):
        checked(by_name(SOLVERS, name), problem, 64, mesh)


@CHECKS.append
def and_where_they_do_not():
    mesh, problem = time_mesh(), by_name(DYNAMICS, "pytree").build(77, jnp.float64)
    for name in ("quasi-elk", "shooting"):
        found = checked(by_name(SOLVERS, name), problem, 77, mesh)
    # The first segment is rolled once; what others rolled again is theirs alone.
    assert float(found.stats.evaluations_by_part[0]) <= float(found.stats.evaluations_by_part[1])


@SLOW.append
def every_solver_on_every_kind_of_recurrence():
    for row in SOLVERS:
        if row.schedule != AllAtOnce():
            continue
        for name in ("tanh network", "linear", "pytree", "accept or reject", "GRU", "AR(1)"):
            for num_steps in (5, 77):
                checked(
                    row,
                    by_name(DYNAMICS, name).build(num_steps, jnp.float64),
                    num_steps,
                    time_mesh(),
                )


def contracting(params, state, drive):
    return params * jnp.sin(state) + drive


@CHECKS.append
def interfaces_of_segments_can_be_corrected_across_devices():
    drives = jnp.asarray(np.random.default_rng(1).normal(size=(64, 2)))
    problem = Problem(Dynamics(contracting, jnp.asarray(0.97)), jnp.ones(2), drives)
    solver = shooting(steps=4, correction=Clipped(DenseJacobian(), 1.0))
    one = solve(problem.dynamics, problem.initial, problem.drives, solver=solver)
    many = sharded_solve(
        problem.dynamics, problem.initial, problem.drives, mesh=time_mesh(), solver=solver
    )
    close(many.states, one.states)
    assert many.verdict == one.verdict == Status.CONVERGED and int(many.iterations) == int(
        one.iterations
    )


@CHECKS.append
def what_does_not_forget_has_the_verdict_of_one_device():
    problem = by_name(DYNAMICS, "logistic map").build(64, jnp.float64)
    given = problem.dynamics, problem.initial, problem.drives
    solver = Shooting(steps=4, max_evaluations=1)
    one, many = solve(*given, solver=solver), sharded_solve(*given, mesh=time_mesh(), solver=solver)
    assert one.verdict == many.verdict == Status.OUT_OF_ITERATIONS
    assert int(one.num_exact) == int(many.num_exact) < 64 and float(one.residual) > 1e-3
    # A chaotic path agrees where it is exact; its first wrong step is at the same interface.
    close(many.states[: int(one.num_exact)], one.states[: int(one.num_exact)], 1e-3)
    measured = np.abs(measured_residual(problem, np.asarray(many.states))).max()
    np.testing.assert_allclose(measured, float(many.residual), rtol=1e-6)


def gradient(path, *given):
    def loss(*given):
        values = path(*given)
        return jnp.sum(
            jnp.cos(jnp.arange(values.size)) * values.ravel() + 0.1 * values.ravel() ** 2
        )

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*given)


def derivatives_of(solver):
    problem = by_name(DYNAMICS, "GRU").build(13, jnp.float64)
    given = problem.dynamics, problem.initial, problem.drives
    got = gradient(
        lambda *given: sharded_solve(*given, mesh=time_mesh(), solver=solver).states, *given
    )
    close(got, gradient(rollout, *given))


@CHECKS.append
def derivatives_are_those_of_one_device():
    derivatives_of(deer())


@SLOW.append
def whatever_solved_the_path():
    for solver in (shooting(steps=1), quasi_deer()):
        derivatives_of(solver)


@CHECKS.append
def chains_have_guesses_and_derivatives_of_their_own():
    problem, mesh = by_name(DYNAMICS, "tanh network").build(16, jnp.float64), time_mesh(4, 2)
    initial = jnp.stack([problem.initial, -2.0 * problem.initial])
    drives = jax.tree.map(lambda leaf: jnp.stack([leaf, -leaf]), problem.drives)
    paths = jax.vmap(functools.partial(rollout, problem.dynamics))
    # The right path as the guess leaves nothing to do; the other chain's would leave everything.
    guess = paths(initial, drives)

    def spread(dynamics, initial, drives):
        return sharded_chains(
            dynamics,
            initial,
            drives,
            mesh=mesh,
            solver=jacobi(),
            guess=jax.lax.stop_gradient(guess),
        )

    found = jax.jit(spread)(problem.dynamics, initial, drives)
    close(found.states, guess)
    assert (np.asarray(found.iterations) <= 1).all(), found.iterations
    given = problem.dynamics, initial, drives
    close(
        gradient(lambda *given: spread(*given).states, *given),
        gradient(
            lambda dynamics, initial, drives: jax.vmap(functools.partial(rollout, dynamics))(
                initial, drives
            ),
            *given,
        ),
    )


@CHECKS.append
def chains_that_need_different_numbers_of_passes_do_not_wait_for_each_other():
    problem, mesh = by_name(DYNAMICS, "accept or reject").build(32, jnp.float64), time_mesh(4, 2)
    initial = jnp.stack([problem.initial * k for k in (0, 1, 5, 9)])
    drives = jax.tree.map(
        lambda leaf: jnp.stack([jnp.roll(leaf, k, 0) for k in range(4)]), problem.drives
    )
    wanted = jax.vmap(lambda first, tape: rollout(problem.dynamics, first, tape))(initial, drives)
    alone = jax.vmap(
        lambda first, tape: solve(problem.dynamics, first, tape, solver=deer()).iterations
    )(initial, drives)
    found = sharded_chains(problem.dynamics, initial, drives, mesh=mesh, solver=deer())
    close(found.states, wanted)
    assert (np.asarray(found.status) == Status.CONVERGED).all()
    # A chain that has finished is left as it is while others go on.
    assert len(set(np.asarray(alone).tolist())) > 1
    np.testing.assert_array_equal(found.iterations, alone)
    np.testing.assert_allclose(found.stats.evaluations, np.asarray(alone) + 1, rtol=1e-5)


def langevin(rows, state, drive):
    """A MALA step on a logistic regression whose rows are spread over devices."""
    x, y = rows
    noise, uniform = drive
    loglik = (
        summed(lambda beta, x, y: -jnp.logaddexp(0, -y * (x @ beta)).sum())
        if x.shape[0] < 40
        else (lambda beta, x, y: -jnp.logaddexp(0, -y * (x @ beta)).sum())
    )
    value = jax.value_and_grad(lambda beta: loglik(beta, x, y) - 0.5 * beta @ beta)
    here, slope = value(state)
    proposal = state + 0.02 * slope + 0.2 * noise
    there, back = value(proposal)
    ratio = (
        there
        - here
        + ((proposal - state - 0.02 * slope) ** 2 - (state - proposal - 0.02 * back) ** 2).sum()
        / 0.08
    )
    return jnp.where(jnp.log(uniform) < ratio, proposal, state)


@CHECKS.append
def data_spread_over_devices_beside_time():
    rng, mesh = np.random.default_rng(2), time_mesh(4, 1, 2)
    x, y = rng.normal(size=(40, 3)), rng.choice([-1.0, 1.0], size=40)
    rows = jax.tree.map(
        lambda leaf: jax.device_put(leaf, jax.NamedSharding(mesh, PartitionSpec("data"))), (x, y)
    )
    drives = jnp.asarray(rng.normal(size=(64, 3))), jnp.asarray(rng.uniform(size=64))
    wanted = rollout(Dynamics(langevin, (jnp.asarray(x), jnp.asarray(y))), jnp.zeros(3), drives)
    found = sharded_solve(
        Dynamics(langevin, rows),
        jnp.zeros(3),
        drives,
        mesh=mesh,
        solver=shooting(steps=8),
        params_spec=PartitionSpec("data"),
    )
    close(found.states, wanted)
    assert found.verdict == Status.CONVERGED
    assert found.stats.evaluations_by_part.shape == (4,)


TARGET = Target(
    lambda x: -0.5 * x @ jnp.asarray([[1.5, 0.6], [0.6, 1.0]]) @ x,
    lambda key: jax.random.normal(key, (2,)),
)


def chains(kernel: Kernel, num_samples: int, num_chains: int) -> np.ndarray:
    """The chains of `sample(key(0), ...)` by BlackJAX's own loop."""
    start, _, keys = jax.random.split(jax.random.key(0), 3)

    @jax.jit
    @jax.vmap
    def one(position, key):
        return blackjax_loop(kernel, kernel.init(position), jax.random.split(key, num_samples))[0]

    return np.asarray(
        one(TARGET.starts(jax.random.split(start, num_chains)), jax.random.split(keys, num_chains))
    )


@CHECKS.append
def draws_of_coalescing_chains_are_the_same_bits_on_any_number_of_devices():
    kernel = mala(TARGET.logdensity, 0.4, coupling=MultishiftCoupling())
    draws = sample(
        jax.random.key(0),
        TARGET,
        kernel,
        num_samples=515,
        num_chains=2,
        mesh=time_mesh(4, 2),
        progress=False,
    )
    exact_path(draws)
    np.testing.assert_array_equal(draws.positions, chains(kernel, 515, 2))
    certificate = draws.certificate
    assert certificate.residual.shape == (2, 515) and (certificate.num_steps == 515).all()
    accepted = np.asarray(certificate.accepted)
    assert (certificate.num_rejected == (~accepted).sum(axis=1)).all() and (
        certificate.num_rejected > 20
    ).all()
    for chain in range(2):
        runs = "".join("1" if flag else "0" for flag in accepted[chain]).split("1")
        assert certificate.longest_rejection[chain] == max(map(len, runs))
    np.testing.assert_array_equal(draws.state.carries, draws.positions[:, -1])
    assert len(draws.report.evaluations_by_part) == 4
    np.testing.assert_allclose(
        sum(draws.report.evaluations_by_part), draws.report.evaluations_per_sample, rtol=0.5
    )
    assert draws.plan["num_chains"] == 2 and draws.plan["num_samples"] == 515


def travelling(solver, num_steps, dimension=4, tolerance=Tolerance()):
    """Collectives of a solve on eight devices, from the compiled program."""
    problem = by_name(DYNAMICS, "tanh network").build(num_steps, jnp.float64)
    assert problem.initial.shape == (dimension,)
    program = jax.jit(
        lambda first, drives: (
            sharded_solve(
                problem.dynamics,
                first,
                drives,
                mesh=time_mesh(),
                solver=solver,
                tolerance=tolerance,
            ).states
        )
    )
    return collectives(program.lower(problem.initial, problem.drives).compile().as_text())


@CHECKS.append
def what_travels_in_a_pass_is_one_state_to_the_neighbour_and_scalars():
    """For DEER a composed map from every device, too; sizes of 15 states where a path is judged in units of its own."""
    state, scalars = 4 * 8, 80
    for tolerance, more, sizes in ((Tolerance(1e-10, 1e-10), 0, 0), (Tolerance(), 1, 15)):
        for solver, sent, judged, gathered in (
            (shooting(steps=32), 1 + more, 0, 0),
            (deer(), 2 + more, max(sizes - 1, 0), 8 * (4 * 4 + 4) * 8),
        ):
            found = travelling(solver, 1024, tolerance=tolerance)
            counts = found["per pass"]
            assert counts.pop("collective-permute") == (sent, (sent + judged) * state), found
            assert counts.pop("all-gather", (0, 0))[1] == gathered, found
            assert counts.pop("all-reduce")[1] <= scalars and not counts, found
            most = (4 + sizes) * state + scalars
            assert all(size <= most for _, size in found["once"].values()), found


@SLOW.append
def what_travels_does_not_grow_with_time_whatever_solves():
    # Of a path of D = 4 one device holds 64 states, 2,048 bytes; of a map on D and a message on D every device gives one.
    maps, messages = 8 * (4 * 4 + 4) * 8, 8 * (3 * 4 * 4 + 2 * 4) * 8
    most = {
        "shooting": 0,
        "sequential": 0,
        "jacobi": 0,
        "picard": 8 * (4 + 4) * 8,
        "quasi_deer": 8 * (4 + 4) * 8,
        "deer": maps,
        "quasi_elk": messages,
        "elk": messages + maps,
    }
    for name, bound in most.items():
        solver = getattr(recipes, name)(**({"steps": 32} if name == "shooting" else {}))
        found, shorter = travelling(solver, 512), travelling(solver, 256)
        assert found == shorter, (name, found, shorter)
        for kinds in found.values():
            assert set(kinds) <= {"all-gather", "all-reduce", "collective-permute"}, (name, found)
            assert kinds.get("all-gather", (0, 0))[1] <= bound, (name, found)


class Interrupting:
    """A progress that stops a run after so many windows."""

    def __init__(self, after):
        self.left = after

    @contextlib.contextmanager
    def stage(self, name, total):
        def advance(steps, **shown):
            # An advance of no steps shows something only.
            self.left -= steps > 0
            if steps > 0 and not self.left:
                raise KeyboardInterrupt

        yield advance

    def note(self, sentence):
        pass

    warn = note


@CHECKS.append
def an_interrupt_keeps_the_windows_that_are_done():
    kernel = mala(TARGET.logdensity, 0.4, coupling=MultishiftCoupling())
    begin = functools.partial(
        sample,
        jax.random.key(0),
        TARGET,
        kernel,
        num_samples=512,
        num_chains=2,
        mesh=time_mesh(4, 2),
        schedule=Windows(128),
    )
    draws = begin(progress=Interrupting(2))
    assert draws.report.interrupted and set(draws.report.status) == {Status.INTERRUPTED}
    assert draws.plan["num_samples"] == 256 and draws.state.num_steps == 256
    np.testing.assert_array_equal(draws.positions, chains(kernel, 512, 2)[:, :256])
    np.testing.assert_array_equal(draws.state.carries, draws.positions[:, -1])
    assert (draws.certificate.num_steps == 256).all() and draws.certificate.certified.all()


@CHECKS.append
def a_stored_run_goes_on_over_a_mesh():
    """Begun on one device with no cuts in time, and gone on with on eight."""
    kernel = mala(TARGET.logdensity, 0.4, coupling=MultishiftCoupling())
    with tempfile.TemporaryDirectory() as folder:
        store = Store(f"{folder}/run", chunk=128)
        begin = functools.partial(
            sample,
            jax.random.key(0),
            TARGET,
            kernel,
            num_samples=384,
            num_chains=2,
            schedule=AllAtOnce(),
            solver=shooting(steps=8),
            store=store,
        )
        begun = begin(progress=Interrupting(2))
        kept = begun.num_samples
        assert 0 < kept < 384
        draws = resume(store.path, TARGET, kernel, mesh=time_mesh(4, 2), progress=False)
        np.testing.assert_array_equal(np.asarray(draws.posterior["x"]), chains(kernel, 384, 2))
        assert draws.certificate.certified.all()


def asked_for(mesh, num_chains, bytes_per_draw, max_bytes):
    """A stored run of many draws, of a target whose draws take so many bytes more."""
    numbers = bytes_per_draw // 8
    target = dataclasses.replace(TARGET, constrain=lambda x: {"x": jnp.zeros(numbers)})
    keys = jax.random.split(jax.random.key(0), num_chains)
    return SampleArguments(
        front="sample",
        target=target,
        kernel=mala,
        starts=TARGET.starts,
        warmup_key=jax.random.key(1),
        chain_keys=keys,
        key_words=[0, 0],
        key_impl="threefry2x32",
        num_samples=10**9,
        max_bytes=max_bytes,
        solver=shooting(),
        mesh=mesh,
        store=Store("nowhere"),
    )


@CHECKS.append
def chunks_grow_with_the_devices_that_share_them():
    def steps(mesh, bytes_per_draw=80, max_bytes=2**24):
        return chunk_steps(asked_for(mesh, 4, bytes_per_draw, max_bytes))

    alone = dataclasses.replace(asked_for(None, 4, 80, 2**24), schedule=Windows(16))
    assert chunk_steps(alone) > 100
    for num_time, num_chains in ((8, 1), (4, 2)):
        # Evenness may take some steps away.
        assert 4 < steps(time_mesh(num_time, num_chains)) / chunk_steps(alone) < 16
    assert steps(time_mesh(8), 8000, 2**40) * 4 * 8000 <= 2**31
    assert len(rounds(2, 8)) == 3 and len(rounds(4, 4)) == 0


def rounds(first, num_devices):
    """Who sends to whom where the first host has so many of all devices; everybody else is heard once."""
    devices = [SimpleNamespace(process_index=int(place >= first)) for place in range(num_devices)]
    found = exchange._rounds(devices)
    assert sorted(source for pairs in found for source, _ in pairs) == list(
        range(first, num_devices)
    )
    assert all(len({to for _, to in pairs}) == len(pairs) for pairs in found)
    return found


@SLOW.append
def derivatives_through_the_step_reach_data_on_other_devices():
    """Newton's method differentiates the gradient of a log density that is summed over devices."""
    rng, mesh = np.random.default_rng(2), time_mesh(4, 1, 2)
    x, y = jnp.asarray(rng.normal(size=(40, 3))), jnp.asarray(rng.choice([-1.0, 1.0], size=40))
    drives = jnp.asarray(rng.normal(size=(64, 3))), jnp.asarray(rng.uniform(size=64))
    found = sharded_solve(
        Dynamics(langevin, (x, y)),
        jnp.zeros(3),
        drives,
        mesh=mesh,
        params_spec=PartitionSpec("data"),
    )
    alone = solve(Dynamics(langevin, (x, y)), jnp.zeros(3), drives)
    close(found.states, alone.states)
    assert int(found.iterations) == int(alone.iterations)


@SLOW.append
def chains_that_do_not_converge_are_rolled_by_one_device_after_another():
    # A tiny step forgets nothing in 64 steps.
    kernel = mala(TARGET.logdensity, 1e-4)
    draws = sample(
        jax.random.key(0),
        TARGET,
        kernel,
        num_samples=768,
        num_chains=2,
        mesh=time_mesh(8),
        solver=jacobi(),
        max_iterations=3,
        schedule=Windows(256),
        progress=False,
    )
    exact_path(draws)
    np.testing.assert_allclose(draws.positions, chains(kernel, 768, 2), rtol=0, atol=1e-10)
    assert (
        "finished sequentially" in draws.report.fallbacks[0]
        and "all chains ran" in draws.report.fallbacks[-1]
    )
    assert (draws.report.num_sequential >= 700).all()


@SLOW.append
def what_is_not_finite_is_no_draw_on_any_device():
    # Leaves the finite numbers where it starts above 0, and stays at 0 otherwise.
    algorithm = blackjax.SamplingAlgorithm(
        lambda position, rng_key=None: position, lambda key, x: (1e10 * jnp.maximum(x, 0), None)
    )
    target = Target(lambda x: -0.5 * x @ x, lambda key: jnp.sign(jax.random.normal(key, (1,))))
    draws = sample(
        jax.random.key(2),
        target,
        from_blackjax(algorithm, noise_scale=1.0),
        num_samples=64,
        num_chains=4,
        mesh=time_mesh(4, 2),
        progress=False,
    )
    starts = np.asarray(
        target.starts(jax.random.split(jax.random.split(jax.random.key(2), 3)[0], 4))
    )[:, 0]
    lost = np.array([status == Status.NONFINITE for status in draws.report.status])
    assert lost.any() and not lost.all() and (lost == (starts > 0)).all()
    assert (np.isnan(draws.positions[:, :, 0]).sum(axis=1) == np.where(lost, 64 - 30, 0)).all()
    assert (np.asarray(draws.certificate.certified) == ~lost).all()


@CHECKS.append
def mistakes_are_named():
    problem, mesh = by_name(DYNAMICS, "linear").build(32, jnp.float64), time_mesh(4, 2)
    given = problem.dynamics, problem.initial, problem.drives

    def inside(**options):
        along, same = PartitionSpec("time"), PartitionSpec()
        options = {"axis": ShardedTime(8), **options}
        return jax.shard_map(
            lambda first, drives: solve(problem.dynamics, first, drives, **options).states,
            mesh=time_mesh(),
            in_specs=(same, along),
            out_specs=along,
            check_vma=False,
        )(*given[1:])

    for wanted, attempt in [
        ("num_time", lambda: time_mesh(9)),
        ("num_chains", lambda: time_mesh(None, 3)),
        ("num_time", lambda: time_mesh(0)),
        ("mesh: got", lambda: sharded_solve(*given, mesh=jax.make_mesh((8,), ("x",)))),
        (
            "ImplicitSegmented",
            lambda: sharded_solve(*given, mesh=mesh, adjoint=ImplicitSegmented()),
        ),
        (
            "initial: 3 chains",
            lambda: sharded_chains(
                problem.dynamics, jnp.zeros((3, 3)), jnp.zeros((3, 32, 3)), mesh=mesh
            ),
        ),
        (
            "num_chains: got 3",
            lambda: sample(
                jax.random.key(0), TARGET, mala, num_samples=10, num_chains=3, mesh=mesh
            ),
        ),
        (
            "schedule: got AllAtOnce",
            lambda: sample(
                jax.random.key(0), TARGET, mala, num_samples=10, mesh=mesh, schedule=AllAtOnce()
            ),
        ),
        (
            "mesh: got the axes",
            lambda: sample(
                jax.random.key(0), TARGET, mala, num_samples=10, mesh=time_mesh(2, 2, 2)
            ),
        ),
        (
            "params_spec: got P",
            lambda: sharded_solve(*given, mesh=mesh, params_spec=PartitionSpec("rows")),
        ),
        (
            "params_spec: got P",
            lambda: sharded_solve(*given, mesh=mesh, params_spec=PartitionSpec(("data", "time"))),
        ),
        ("params_spec: got 'data'", lambda: sharded_solve(*given, mesh=mesh, params_spec="data")),
        (
            "adjoint: got Implicit",
            lambda: sharded_solve(
                *given, mesh=mesh, params_spec=PartitionSpec("data"), adjoint=Implicit()
            ),
        ),
        (
            "params_spec: got a derivative",
            lambda: jax.grad(
                lambda first: sharded_solve(
                    given[0], first, given[2], mesh=mesh, params_spec=PartitionSpec()
                ).states.sum()
            )(given[1]),
        ),
        (
            "params_spec: got a derivative",
            lambda: jax.grad(
                lambda params: sharded_solve(
                    dataclasses.replace(given[0], params=params),
                    *given[1:],
                    mesh=mesh,
                    params_spec=PartitionSpec(),
                ).states.sum()
            )(given[0].params),
        ),
        (
            "guess: got leaves",
            lambda: sharded_chains(
                problem.dynamics,
                jnp.zeros((4, 3)),
                jnp.zeros((4, 32, 3)),
                mesh=mesh,
                guess=jnp.zeros((32, 3)),
            ),
        ),
        ("steps: segments of 3", lambda: inside(solver=shooting(steps=3))),
        ("schedule: got Windows", lambda: inside(schedule=Windows(1))),
    ]:
        try:
            attempt()
        except (ValueError, TypeError) as error:
            assert wanted in str(error), (wanted, error)
        else:
            raise AssertionError(f"nothing was refused: {wanted}")


def main():
    import time

    failed = 0
    with jax.enable_x64(True):
        names = [name for name in sys.argv[1:] if name != "--all"]
        chosen = [check for check in [*CHECKS, *SLOW] if check.__name__ in names]
        for check in chosen or [*CHECKS, *(SLOW if "--all" in sys.argv else [])]:
            begin = time.process_time()
            try:
                check()
            except Exception:  # noqa: BLE001
                failed += 1
                print(f"FAILED: {check.__name__}\n{traceback.format_exc()}", flush=True)
            else:
                print(f"passed: {check.__name__} ({time.process_time() - begin:.1f} s)", flush=True)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
