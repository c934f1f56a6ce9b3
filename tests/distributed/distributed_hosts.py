"""One of several hosts: `python tests/distributed/distributed_hosts.py HOST_ID NUM_HOSTS PORT WHAT`.

WHAT is `agree` (solve over all hosts and compare this host's shards with the path of one device), `everything` (more
solvers, and whole chains), `wait` (agree, print that, and go on until something happens), `differ` (ask for another number
of draws on every host), `together:FOLDER` (a stored run that is compared with that of one host), or a folder: a stored run
in it. One host alone goes on with it, and compares the draws with those of BlackJAX's loop.
"""

import contextlib
import dataclasses
import os
import sys

os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax  # noqa: E402
import numpy as np  # noqa: E402
from catalogue import DYNAMICS, SOLVERS, by_name  # noqa: E402
from fakes import exact_path

from partime_mcmc import (  # noqa: E402
    AllAtOnce,
    Store,
    Windows,
    deer,
    hosts,
    mala,
    rollout,
    sample,
    sharded_solve,
    shooting,
    time_mesh,
)
from partime_mcmc import compile_cache as programs  # noqa: E402
from partime_mcmc.storage.streaming_statistics import Fold  # noqa: E402

# As in `conftest.py`: what is compiled here runs once.
programs.CPU_OPTIONS.clear()


def agrees(mesh, name, solver, num_steps=64):
    """This host's shards of a path are those of one device, which every host computes for itself."""
    problem = by_name(DYNAMICS, name).build(num_steps, np.float64)
    given = problem.dynamics, problem.initial, problem.drives
    # Every host gives the same arrays in full; a local array would belong to one host only.
    given = jax.tree.map(np.asarray, given)
    found = sharded_solve(*given, mesh=mesh, solver=solver)
    found.or_raise()
    wanted = rollout(*given)
    for got, path in zip(jax.tree.leaves(found.states), jax.tree.leaves(wanted), strict=True):
        for shard in got.addressable_shards:
            np.testing.assert_allclose(
                shard.data, np.asarray(path)[shard.index], rtol=0, atol=1e-10
            )


def slope(path, problem):
    """A derivative with respect to the parameters, the same on every host."""
    given = jax.tree.map(np.asarray, (problem.dynamics, problem.initial, problem.drives))
    return jax.jit(jax.grad(lambda dynamics: jax.numpy.cos(path(dynamics, *given[1:])).sum()))(
        given[0]
    )


def everything(mesh):
    for row in SOLVERS:
        if row.schedule == AllAtOnce():
            agrees(mesh, "accept or reject", row.solver)
    problem = by_name(DYNAMICS, "tanh network").build(21, np.float64)
    got = slope(lambda *given: sharded_solve(*given, mesh=mesh, solver=deer()).states, problem)
    np.testing.assert_allclose(got.params, slope(rollout, problem).params, rtol=0, atol=1e-10)
    from distributed_checks import TARGET, MultishiftCoupling, chains

    kernel = mala(TARGET.logdensity, 0.4, coupling=MultishiftCoupling())
    draws = sample(
        jax.random.key(0), TARGET, kernel, num_samples=515, num_chains=2, mesh=mesh, progress=False
    ).or_raise()
    np.testing.assert_array_equal(draws.positions, chains(kernel, 515, 2))
    draws = sample(
        jax.random.key(0),
        TARGET,
        mala,
        num_samples=256,
        num_chains=2,
        num_warmup=60,
        mesh=mesh,
        progress=False,
    )
    exact_path(draws)
    assert draws.positions.shape == (2, 256, 2)


def stored(folder, mesh):
    """A run that takes long enough to be killed, and what came of it."""
    from distributed_checks import TARGET, chains

    kernel = mala(TARGET.logdensity, 0.4)
    draws = sample(
        jax.random.key(0),
        TARGET,
        kernel,
        num_samples=4096,
        num_chains=2,
        mesh=mesh,
        solver=shooting(steps=16),
        schedule=Windows(128),
        store=Store(folder, chunk=128),
        progress=False,
    )
    wanted = chains(kernel, 4096, 2)
    np.testing.assert_allclose(np.asarray(draws.posterior["x"]), wanted, rtol=0, atol=1e-9)
    moved = np.diff(wanted, axis=1).any(axis=2)
    np.testing.assert_array_equal(np.asarray(draws.sample_stats["accepted"])[:, 1:], moved)


def summed_up(carry, values, info):
    return {"sum": carry["sum"] + values["size"].sum(axis=1), "last": values["place"][:, -1]}


FOLDS = {"ours": Fold({"sum": np.zeros(2), "last": np.zeros((2, 2))}, summed_up)}


def together(folder, mesh):
    """What the first host writes of a run of several hosts is what one host writes alone, whatever the mesh."""
    from distributed_checks import TARGET

    num_hosts, chunk = jax.process_count(), 128
    target = dataclasses.replace(
        TARGET, constrain=lambda x: {"place": jax.numpy.exp(x), "size": x @ x}
    )
    kernel = mala(target.logdensity, 0.4)

    def run(store, **options):
        return sample(
            jax.random.key(0),
            target,
            kernel,
            num_samples=301,
            num_chains=2,
            solver=shooting(steps=8),
            schedule=Windows(64),
            thinning=2,
            progress=False,
            store=store,
            **options,
        )

    draws = run(Store(folder, chunk=chunk, folds=FOLDS), mesh=mesh)
    exact_path(draws)
    if jax.process_index() == 0:
        same(draws, run(Store(f"{folder}-alone", chunk=chunk, folds=FOLDS)))
    if num_hosts > 2:
        # Chains apart, too: two hosts share each of them.
        grid = time_mesh(num_hosts // 2, 2)
        same(run(Store(f"{folder}-apart", chunk=chunk, folds=FOLDS), mesh=grid), draws)


def same(draws, wanted):
    """Draws of one store are those of another, and so is what is known of them."""
    for name in ("posterior", "sample_stats"):
        ours, theirs = getattr(draws, name), getattr(wanted, name)
        assert set(ours) == set(theirs) and ours.sizes == theirs.sizes
        np.testing.assert_array_equal(ours["draw"], theirs["draw"])
        for value in theirs.data_vars:
            np.testing.assert_allclose(
                ours[value].values, theirs[value].values, rtol=0, atol=1e-9, err_msg=value
            )
    ours, theirs = draws.statistics.to_arrays(), wanted.statistics.to_arrays()
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        # A draw within rounding of a bin's edge may be in either; residuals are nothing but rounding.
        if name.startswith(("histogram_counts", "histogram_first", "info_")):
            continue
        np.testing.assert_allclose(ours[name], value, rtol=1e-8, atol=1e-8, err_msg=name)
    assert draws.statistics.histogram.counts.sum() == wanted.statistics.histogram.counts.sum()
    for name in ("accepted", "acceptance_rate"):
        np.testing.assert_allclose(
            draws.statistics.info[name], wanted.statistics.info[name], rtol=1e-9
        )
    np.testing.assert_allclose(draws.mean_acceptance, wanted.mean_acceptance, rtol=1e-9)
    for name in ("certified", "num_steps", "num_rejected", "longest_rejection", "frozen"):
        np.testing.assert_array_equal(
            getattr(draws.certificate, name), getattr(wanted.certificate, name), err_msg=name
        )


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
    sample(
        jax.random.key(0),
        TARGET,
        mala,
        num_samples=64 * (1 + jax.process_index()),
        solver=shooting(steps=8),
        mesh=mesh,
        progress=False,
    )


def main(host_id, num_hosts, port, what):
    given = f"127.0.0.1:{port}", int(num_hosts), int(host_id)
    joined = (
        hosts(*given, heartbeat_seconds=5, start_seconds=120)
        if int(num_hosts) > 1
        else contextlib.nullcontext()
    )
    with joined, jax.enable_x64(True):
        mesh = time_mesh()
        _, _, folder = what.partition(":")
        if folder:
            together(folder, mesh)
            print("agreed", flush=True)
            return
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
