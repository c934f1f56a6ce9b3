"""What can be chosen by name on the command line."""

from partime_mcmc import kernels, recipes

KERNELS = {
    "coalescing_hmc": kernels.coalescing_hmc,
    "hmc": kernels.hmc,
    "mala": kernels.mala,
    "nuts": kernels.nuts,
    "random_walk": kernels.random_walk,
}
"""Builders of kernels, which warm-up tunes."""

SOLVERS = {
    "default": lambda: None,
    "sequential": recipes.sequential,
    "shooting": recipes.shooting,
    "deer": recipes.deer,
    "quasi_deer": recipes.quasi_deer,
    "elk": recipes.elk,
    "quasi_elk": recipes.quasi_elk,
    "picard": recipes.picard,
    "jacobi": recipes.jacobi,
}
"""What makes a solver; the default is the library's own choice."""
