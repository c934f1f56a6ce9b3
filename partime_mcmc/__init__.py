"""partime_mcmc: Markov chain Monte Carlo and recurrent systems, parallel over time.

engine        Dynamics, solve, rollout, residual; Solution, Status, Tolerance, Stats
derivatives   Implicit, ImplicitSegmented
recipes       sequential, deer, quasi_deer, elk, quasi_elk, picard, jacobi, shooting
schedules     Whole, Stretches, Sliding
linearizers   DenseJacobian, DiagonalJacobian, HutchinsonDiagonal, IdentityJacobian, ZeroJacobian, Clipped, Damped
kernels       from_blackjax, coalescing_hmc, hmc, mala, nuts, random_walk, CommonRandomNumbers, MultishiftCoupling, Kernel, Whitening,
              certify
sampling      Target, from_numpyro, sample, Draws, PooledAdaptation, WindowAdaptation
long runs     Store, NetCDF, Zarr, resume, open_draws, StoredDraws, StoreError, StoreMismatch, StreamingStatistics, Fold
NumPyro       ParallelMCMC, CoalescingHMC, HMC, NUTS, MALA, BlackJAXKernel
networks      unroll; cells, adapters and statuses in `partime_mcmc.rnn`
devices       time_mesh, sharded_solve, sharded_chains, hosts; more in `partime_mcmc.distributed`
judging       Certificate, Recorded, Independent, compare, to_arviz
"""

from partime_mcmc.certify.certificate import Certificate
from partime_mcmc.certify.independent import certify
from partime_mcmc.certify.recorded import CertifyIndependently, CertifyWhileRolling
from partime_mcmc.diagnostics.arviz import read_netcdf, save_netcdf, summary_table, to_arviz
from partime_mcmc.diagnostics.compare import compare
from partime_mcmc.distributed import hosts, sharded_chains, sharded_solve, time_mesh
from partime_mcmc.engine.adjoint import Implicit, ImplicitSegmented
from partime_mcmc.engine.dynamics import Dynamics, residual, rollout
from partime_mcmc.engine.recipes import (
    deer,
    elk,
    jacobi,
    picard,
    quasi_deer,
    quasi_elk,
    sequential,
    shooting,
)
from partime_mcmc.engine.solution import Solution, SolveError, Stats, Status, Tolerance
from partime_mcmc.engine.solve import solve
from partime_mcmc.engine.windows import AllAtOnce, SlidingWindow, Windows
from partime_mcmc.kernels import (
    CommonRandomNumbers,
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
from partime_mcmc.linearize import (
    Clipped,
    Damped,
    DenseJacobian,
    DiagonalJacobian,
    HutchinsonDiagonal,
    IdentityJacobian,
    ZeroJacobian,
)
from partime_mcmc.numpyro import (
    HMC,
    MALA,
    NUTS,
    BlackJAXKernel,
    CoalescingHMC,
    ParallelMCMC,
    from_numpyro,
)
from partime_mcmc.rnn.unroll import unroll
from partime_mcmc.sampling.draws import Draws
from partime_mcmc.sampling.progress import progress_line, quiet
from partime_mcmc.sampling.sample import resume, sample
from partime_mcmc.sampling.target import Target
from partime_mcmc.solvers import ConstantDamping, Kalman, Newton, RelaxingDamping
from partime_mcmc.storage.fingerprint import StoreMismatch
from partime_mcmc.storage.store import Store
from partime_mcmc.storage.stored_draws import StoredDraws, open_draws
from partime_mcmc.storage.streaming_statistics import Fold, StreamingStatistics
from partime_mcmc.warmup.pooled import PooledAdaptation
from partime_mcmc.warmup.warmup import WindowAdaptation

__version__ = "0.1.0"

__all__ = [
    "BlackJAXKernel",
    "Certificate",
    "Clipped",
    "MultishiftCoupling",
    "CoalescingHMC",
    "ConstantDamping",
    "Damped",
    "DenseJacobian",
    "DiagonalJacobian",
    "Draws",
    "Dynamics",
    "Fold",
    "HMC",
    "HutchinsonDiagonal",
    "IdentityJacobian",
    "Implicit",
    "ImplicitSegmented",
    "CertifyIndependently",
    "Kalman",
    "Kernel",
    "MALA",
    "NUTS",
    "Newton",
    "ParallelMCMC",
    "CommonRandomNumbers",
    "PooledAdaptation",
    "CertifyWhileRolling",
    "RelaxingDamping",
    "StreamingStatistics",
    "SlidingWindow",
    "Solution",
    "SolveError",
    "Stats",
    "Status",
    "Store",
    "StoreMismatch",
    "StoredDraws",
    "Windows",
    "Target",
    "Tolerance",
    "Whitening",
    "AllAtOnce",
    "WindowAdaptation",
    "ZeroJacobian",
    "certify",
    "coalescing_hmc",
    "compare",
    "deer",
    "elk",
    "from_blackjax",
    "from_numpyro",
    "hmc",
    "hosts",
    "jacobi",
    "blackjax_loop",
    "mala",
    "nuts",
    "open_draws",
    "picard",
    "progress_line",
    "quasi_deer",
    "quasi_elk",
    "quiet",
    "random_walk",
    "read_netcdf",
    "residual",
    "resume",
    "rollout",
    "sample",
    "save_netcdf",
    "sequential",
    "sharded_chains",
    "sharded_solve",
    "shooting",
    "solve",
    "summary_table",
    "time_mesh",
    "to_arviz",
    "unroll",
]
