"""partime_mcmc: Markov chain Monte Carlo and recurrent systems, parallel over time.

engine        Dynamics, solve, iterates, rollout, residual; Solution, Status, Tolerance
recipes       sequential, deer, quasi_deer, elk, quasi_elk, picard, jacobi, shooting
windows       AllAtOnce, Windows, SlidingWindow
kernels       from_blackjax, coalescing_hmc, hmc, mala, nuts, random_walk, gibbs, Kernel
coupling      CommonRandomNumbers, MultishiftCoupling
sampling      Target, from_numpyro, sample, resume, Draws, PooledAdaptation, WindowAdaptation
long runs     Store, open_draws, StoredDraws
NumPyro       ParallelMCMC, CoalescingHMC; HMC, NUTS, MALA, BlackJAXKernel in `partime_mcmc.numpyro`
networks      unroll; cells and adapters in `partime_mcmc.rnn`
devices       time_mesh, sharded_solve, hosts; more in `partime_mcmc.distributed`
certificates  certify, Certificate, CertifyWhileRolling, CertifyIndependently
judging       compare, convergence, unbiased, to_arviz

Linearizers are in `partime_mcmc.linearize`, solvers and damping in `partime_mcmc.solvers`, derivatives in
`partime_mcmc.engine`, statistics of long runs in `partime_mcmc.storage`, tables and files in `partime_mcmc.diagnostics`.
"""

import warnings as _warnings
from typing import TYPE_CHECKING
from typing import Any as _Any

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.certify.independent import certify
from partime_mcmc.certify.recorded import CertifyIndependently, CertifyWhileRolling
from partime_mcmc.distributed import hosts, sharded_solve, time_mesh
from partime_mcmc.engine import (
    AllAtOnce,
    Dynamics,
    SlidingWindow,
    Solution,
    Status,
    Tolerance,
    Windows,
    deer,
    elk,
    jacobi,
    picard,
    quasi_deer,
    quasi_elk,
    residual,
    rollout,
    sequential,
    shooting,
)
from partime_mcmc.engine.iterates import iterates
from partime_mcmc.engine.solve import solve
from partime_mcmc.extras import import_name as _import_name
from partime_mcmc.rnn.unroll import unroll

# What needs more than JAX and NumPy is imported when it is first used: the same names once for type checkers here, once
# for Python in `_LAZY`.
if TYPE_CHECKING:
    from partime_mcmc.diagnostics.arviz import to_arviz
    from partime_mcmc.diagnostics.compare import compare
    from partime_mcmc.kernels.blackjax import from_blackjax
    from partime_mcmc.kernels.builders import coalescing_hmc, hmc, mala, nuts, random_walk
    from partime_mcmc.kernels.coupling import CommonRandomNumbers, MultishiftCoupling
    from partime_mcmc.kernels.gibbs import gibbs
    from partime_mcmc.kernels.kernel import Kernel
    from partime_mcmc.numpyro.kernels import CoalescingHMC
    from partime_mcmc.numpyro.mcmc import ParallelMCMC
    from partime_mcmc.numpyro.model import from_numpyro
    from partime_mcmc.sampling.draws import Draws
    from partime_mcmc.sampling.lag_coupling import Convergence, convergence
    from partime_mcmc.sampling.sample import resume, sample
    from partime_mcmc.sampling.target import Target
    from partime_mcmc.sampling.unbiased import Unbiased, unbiased
    from partime_mcmc.storage.store import Store
    from partime_mcmc.storage.stored_draws import StoredDraws, open_draws
    from partime_mcmc.warmup.pooled import PooledAdaptation
    from partime_mcmc.warmup.warmup import WindowAdaptation

__version__ = "0.3.0"

__all__ = [
    "AllAtOnce",
    "Certificate",
    "CertifyIndependently",
    "CertifyWhileRolling",
    "CoalescingHMC",
    "CommonRandomNumbers",
    "Convergence",
    "Draws",
    "Dynamics",
    "Kernel",
    "MultishiftCoupling",
    "ParallelMCMC",
    "PooledAdaptation",
    "SlidingWindow",
    "Solution",
    "Status",
    "Store",
    "StoredDraws",
    "Target",
    "Tolerance",
    "Unbiased",
    "WindowAdaptation",
    "Windows",
    "certify",
    "coalescing_hmc",
    "compare",
    "convergence",
    "deer",
    "elk",
    "from_blackjax",
    "from_numpyro",
    "gibbs",
    "hmc",
    "hosts",
    "iterates",
    "jacobi",
    "mala",
    "nuts",
    "open_draws",
    "picard",
    "quasi_deer",
    "quasi_elk",
    "random_walk",
    "residual",
    "resume",
    "rollout",
    "sample",
    "sequential",
    "sharded_solve",
    "shooting",
    "solve",
    "time_mesh",
    "to_arviz",
    "unbiased",
    "unroll",
]

_LAZY = {
    name: module
    for module, names in {
        "diagnostics.arviz": "to_arviz",
        "diagnostics.compare": "compare",
        "kernels.blackjax": "from_blackjax",
        "kernels.builders": "coalescing_hmc hmc mala nuts random_walk",
        "kernels.coupling": "CommonRandomNumbers MultishiftCoupling",
        "kernels.gibbs": "gibbs",
        "kernels.kernel": "Kernel",
        "numpyro.kernels": "CoalescingHMC",
        "numpyro.mcmc": "ParallelMCMC",
        "numpyro.model": "from_numpyro",
        "sampling.draws": "Draws",
        "sampling.lag_coupling": "Convergence convergence",
        "sampling.sample": "resume sample",
        "sampling.target": "Target",
        "sampling.unbiased": "Unbiased unbiased",
        "storage.store": "Store",
        "storage.stored_draws": "StoredDraws open_draws",
        "warmup.pooled": "PooledAdaptation",
        "warmup.warmup": "WindowAdaptation",
    }.items()
    for name in names.split()
}
_PACKAGES = ("diagnostics", "kernels", "models", "numpyro", "sampling", "storage", "warmup")

# Where names of version 0.1 are now, as module and name; they work here for one more release.
_MOVED = {
    "Sliding": "engine.windows.SlidingWindow",
    "Stretches": "engine.windows.Windows",
    "Whole": "engine.windows.AllAtOnce",
    "CoalescingDice": "kernels.coupling.MultishiftCoupling",
    "PlainDice": "kernels.coupling.CommonRandomNumbers",
    "Independent": "certify.recorded.CertifyIndependently",
    "Recorded": "certify.recorded.CertifyWhileRolling",
    "ImplicitRelay": "engine.adjoint.ImplicitSegmented",
    "loop": "kernels.kernel.blackjax_loop",
    "Running": "storage.streaming_statistics.StreamingStatistics",
} | {
    name: f"{module}.{name}"
    for module, names in {
        "diagnostics.arviz": "read_netcdf save_netcdf summary_table",
        "distributed": "sharded_chains",
        "engine.adjoint": "Implicit",
        "engine.solution": "SolveError Stats",
        "kernels.whitening": "Whitening",
        "linearize": "Clipped Damped DenseJacobian DiagonalJacobian HutchinsonDiagonal IdentityJacobian ZeroJacobian",
        "numpyro": "BlackJAXKernel HMC MALA NUTS",
        "sampling.progress": "progress_line quiet",
        "solvers": "ConstantDamping Kalman Newton RelaxingDamping",
        "storage.files": "StoreError",
        "storage.saved_run": "StoreMismatch",
        "storage.streaming_statistics": "Fold",
    }.items()
    for name in names.split()
}


def __getattr__(name: str) -> _Any:
    """A name that is imported when it is first used, a sub-package, or what a name of version 0.1 stands for now.

    Raises:
        AttributeError: If there is no such name, old or new.
        ImportError: If it needs a package that is not installed, naming the extra that brings it.
    """
    asked = f"{__name__}.{name}"
    if name in _PACKAGES:
        return _import_name(asked, name)
    if name in _LAZY:
        globals()[name] = found = _import_name(asked, _LAZY[name], name)
        return found
    if name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    _warnings.warn(
        f"{asked} is now {__name__}.{_MOVED[name]}; the old name goes with the next release",
        DeprecationWarning,
        stacklevel=2,
    )
    module, _, new = _MOVED[name].rpartition(".")
    return _import_name(asked, module, new)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})
