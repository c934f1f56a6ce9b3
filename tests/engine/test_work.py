"""How much work every solver does for one path: counts that no rounding changes, the same with JAX 0.10 and 0.12.

A mistake that costs a pass, counts a step twice or gives up early leaves the path as it is, and no oracle sees it. Where a change is
meant to do more or less work, the row changes with it, and the change says why.
"""

import jax
import jax.numpy as jnp
import pytest
from catalogue import DYNAMICS, SOLVERS, by_name, run

NUM_STEPS = 157
# Iterations, evaluations of f, Jacobian-vector products, and evaluations one after another: of 157 steps of the Metropolis-adjusted
# Langevin algorithm, in float64.
WORK = {
    "sequential": (0, 157, 0, 157),
    "deer": (10, 1727, 5181, 11),
    "deer, tamed, chunked scan": (23, 3768, 11304, 24),
    "deer, sliding": (29, 1200, 3600, 30),
    "quasi-deer": (36, 5809, 17427, 37),
    "quasi-deer, two probes": (44, 7065, 14130, 45),
    "quasi-deer, windows": (101, 5100, 15300, 102),
    "elk": (10, 1727, 5181, 11),
    "quasi-elk": (36, 5809, 17427, 37),
    "quasi-elk, constant damping": (38, 6123, 18369, 39),
    "picard": (136, 21509, 0, 137),
    "jacobi": (107, 16956, 0, 108),
    "shooting": (3, 608, 0, 152),
}


@pytest.mark.parametrize("row", SOLVERS, ids=lambda row: row.name)
def test_the_work_is_what_it_was(row):
    with jax.enable_x64(True):
        problem = by_name(DYNAMICS, "accept or reject").build(NUM_STEPS, jnp.float64)
        found = run(row, problem)
    stats = found.stats
    per_path = (NUM_STEPS * stats.evaluations, NUM_STEPS * stats.jvps)
    work = (int(found.iterations), *(round(float(one)) for one in per_path), int(stats.depth))
    assert work == WORK[row.name]
    assert int(found.num_exact) == NUM_STEPS
    assert int(stats.num_replaced_jacobians) == int(stats.num_replaced_updates) == 0
