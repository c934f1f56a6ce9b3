"""Machines: the constants that make seconds of kernels and work.

    c(L) = o · kernels + w · L · work / threads(L)        seconds for one step of L lanes
    threads(L) = 1 + e · (max(1, min(cores, L / 32, L · work / (grain · kernels))) − 1)

Each kernel costs `o` to start however few lanes there are, each unit of work `w`. There is a default per backend, and
`calibrate` measures one that somebody keeps. Groups of chains that run side by side on the cores of a processor have a share
of it each.
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Machine:
    """The constants of the cost model.

    Attributes:
        name: For reports.
        seconds_per_kernel: o, one kernel's start, however small.
        seconds_per_work: w, one unit of work on one core.
        num_cores: Cores that share the lanes of one step.
        efficiency: e, what each further core adds, between 0 and 1.
        grain: Units of work per kernel and core below which another core is not worth waking. A few lanes have one core:
            their kernels are small, and products of a matrix with one vector are not shared.
        wide: Cost of a kernel's start in a loop over many lanes, relative to `seconds_per_kernel`.
        random_kernels: Kernels that one drawing of random numbers starts.
        inlined: Cost of a kernel inside a loop so small that the compiler makes one kernel of it, relative to
            `seconds_per_kernel`.
        max_lanes: Lanes beyond which nothing is gained.
        max_bytes: Memory that a path may take.
    """

    name: str
    seconds_per_kernel: float
    seconds_per_work: float
    num_cores: int
    efficiency: float
    grain: float
    wide: float
    random_kernels: float
    inlined: float
    max_lanes: int
    max_bytes: float

    def shared(self, groups: int) -> Machine:
        """What each of several groups of chains has of the machine, when they run side by side."""
        if groups == 1:
            return self
        name = f"{self.name}, of which {groups} such groups of chains have a share each"
        cores = max(1, self.num_cores // groups)
        return dataclasses.replace(
            self, name=name, num_cores=cores, max_bytes=self.max_bytes / groups
        )

    def seconds(self, kernels: float, work: float, lanes: int) -> float:
        """c(L): one step of `lanes` lanes with so many kernels, and so much work per lane."""
        total = work * lanes
        shares = min(
            self.num_cores, lanes / _LANES_PER_CORE, total / (self.grain * max(kernels, 1.0))
        )
        threads = 1 + self.efficiency * (max(shares, 1.0) - 1)
        return self.seconds_per_kernel * kernels + self.seconds_per_work * total / threads


# Lanes below which a core shares its kernels with no other. With 8, a regression of 944 rows got 16 lanes, fastest were 128.
_LANES_PER_CORE = 32
# Two cores of a server (AMD EPYC, AVX-512), otherwise idle, JAX 0.10.1: the sequential loop, the dice in one batch, and the
# vmapped rest of a step in 16, 64 and 256 lanes, for MALA (float32 and float64), HMC (4 and 8 leapfrogs) and NUTS on eight
# schools, HMC on a banana and on a logistic regression with 944 rows, MALA on a mixture; medians of 7. Chosen by hand so
# that most times are met within a factor of 2, which moves the best number of segments by half a power of two.
CPU = Machine("2 CPU cores", 2e-8, 1.1e-10, 2, 0.8, 1e3, 2.5, 94, 0.4, 2048, 2.0**30)
# A guess, measured nowhere: 4 µs to start a kernel, 10^12 operations per second once thousands of lanes fill it.
GPU = Machine("a GPU (guessed)", 4e-6, 1e-12, 1, 1.0, 1e3, 1.0, 2, 1.0, 16384, 2.0**32)


def default_machine(backend: str) -> Machine:
    """The machine assumed for a JAX backend: `CPU` for "cpu", `GPU` for any other."""
    return CPU if backend == "cpu" else GPU
