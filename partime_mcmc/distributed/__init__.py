"""One chain over many devices and hosts: the mesh, time spread along it, and the solve."""

from partime_mcmc.distributed.mesh import hosts, summed, time_mesh
from partime_mcmc.distributed.sharded_solve import sharded_chains, sharded_solve
from partime_mcmc.distributed.sharded_time import ShardedTime, TimeOnMesh

__all__ = [
    "ShardedTime",
    "TimeOnMesh",
    "hosts",
    "sharded_chains",
    "sharded_solve",
    "summed",
    "time_mesh",
]
