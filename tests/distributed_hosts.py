"""One of several hosts: `python tests/distributed_hosts.py HOST_ID NUM_HOSTS PORT WHAT`.

WHAT is `agree` (solve over all hosts and compare this host's parts with the path of one device), `everything` (more
solvers, and whole chains), `wait` (agree, say so, and go on until something happens), `differ` (ask for another number of
draws on every host), or a folder: a stored run in it. One host alone goes on with it, and compares the draws with those of
BlackJAX's loop.
"""

import contextlib
import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from catalogue import DYNAMICS, SOLVERS, by_name  # noqa: E402

from partime_mcmc import Stretches, Whole, deer, mala, rollout, sample, shooting  # noqa: E402
from partime_mcmc.distributed import hosts, sharded_solve, time_mesh  # noqa: E402
from partime_mcmc.mcmc import programs  # noqa: E402
from partime_mcmc.mcmc.stored_run import Store  # noqa: E402

# As in `conftest.py`: what is compiled here runs once.
programs.CPU_OPTIONS.clear()


def agrees(mesh, name, solver, num_steps=64):
    """This host's parts of a path are those of one device, which every host computes for itself."""
    problem = by_name(DYNAMICS, name).build(num_steps, np.float64)
    given = problem.dynamics, problem.initial, problem.drives
    # Every host gives the same arrays in full; a local array would belong to one host only.
    given = jax.tree.map(np.asarray, given)
    found = sharded_solve(*given, mesh=mesh, solver=solver)
    found.or_raise()
    wanted = rollout(*given)
    for got, path in zip(jax.tree.leaves(found.states), jax.tree.leaves(wanted), strict=True):
        for part in got.addressable_shards:
            np.testing.assert_allclose(part.data, np.asarray(path)[part.index], rtol=0, atol=1e-10)


def slope(path, problem):
    """A derivative with respect to the parameters, the same on every host."""
    given = jax.tree.map(np.asarray, (problem.dynamics, problem.initial, problem.drives))
    return jax.jit(jax.grad(lambda dynamics: jax.numpy.cos(path(dynamics, *given[1:])).sum()))(given[0])


def everything(mesh):
    for row in SOLVERS:
        if row.schedule == Whole():
            agrees(mesh, "accept or reject", row.solver)
    problem = by_name(DYNAMICS, "tanh network").build(21, np.float64)
    got = slope(lambda *given: sharded_solve(*given, mesh=mesh, solver=deer()).states, problem)
    np.testing.assert_allclose(got.params, slope(rollout, problem).params, rtol=0, atol=1e-10)
    from distributed_checks import TARGET, CoalescingDice, chains

    kernel = mala(TARGET.logdensity, 0.4, dice=CoalescingDice())
    draws = sample(jax.random.key(0), TARGET, kernel, num_samples=515, num_chains=2, mesh=mesh, progress=False).or_raise()
    np.testing.assert_array_equal(draws.positions, chains(kernel, 515, 2))
    draws = sample(jax.random.key(0), TARGET, mala, num_samples=256, num_chains=2, num_warmup=60, mesh=mesh, progress=False)
    draws.or_raise()
    assert draws.positions.shape == (2, 256, 2)


def stored(folder, mesh):
    """A run that takes long enough to be killed, and what came of it."""
    from distributed_checks import TARGET, chains

    kernel = mala(TARGET.logdensity, 0.4)
    draws = sample(jax.random.key(0), TARGET, kernel, num_samples=4096, num_chains=2, mesh=mesh, solver=shooting(steps=16),
                   schedule=Stretches(128), store=Store(folder, chunk=128), progress=False)
    wanted = chains(kernel, 4096, 2)
    np.testing.assert_allclose(np.asarray(draws.posterior["x"]), wanted, rtol=0, atol=1e-9)
    moved = np.diff(wanted, axis=1).any(axis=2)
    np.testing.assert_array_equal(np.asarray(draws.sample_stats["accepted"])[:, 1:], moved)


def differ(mesh):
    """What one host cannot know of another is refused by all of them."""
    from distributed_checks import TARGET

    mine = time_mesh(devices=jax.local_devices())
    try:
        sample(jax.random.key(0), TARGET, mala, num_samples=64, mesh=mine, progress=False)
    except ValueError as error:
        assert "mesh: got devices of the hosts" in str(error), error
    else:
        raise AssertionError
    sample(jax.random.key(0), TARGET, mala, num_samples=64 * (1 + jax.process_index()), solver=shooting(steps=8), mesh=mesh,
           progress=False)


def main(host_id, num_hosts, port, what):
    given = f"127.0.0.1:{port}", int(num_hosts), int(host_id)
    together = hosts(*given, heartbeat_seconds=5, start_seconds=120) if int(num_hosts) > 1 else contextlib.nullcontext()
    with together, jax.enable_x64(True):
        mesh = time_mesh()
        if os.path.isabs(what):
            stored(what, mesh if int(num_hosts) > 1 else None)
            return
        assert mesh.shape["time"] == int(num_hosts)
        if what == "differ":
            differ(mesh)
            return
        agrees(mesh, "pytree", shooting(steps=8))
        if what == "everything":
            everything(mesh)
        print("agreed", flush=True)
        while what == "wait":
            agrees(mesh, "pytree", shooting(steps=8))


if __name__ == "__main__":
    main(*sys.argv[1:])
