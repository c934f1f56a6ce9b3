"""Programs for a GPU, made where there is none: JAX lowers them for CUDA.

That is most of what can go wrong before a number is computed: operations and types that a platform lacks. What the
numbers are, only `test_gpu` can show.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh

from partime_mcmc import (
    coalescing_hmc,
    deer,
    elk,
    hmc,
    mala,
    nuts,
    quasi_deer,
    quasi_elk,
    sequential,
    shooting,
    solve,
)
from partime_mcmc.engine.time_axis import LocalTime
from partime_mcmc.kernels import MultishiftCoupling, Whitening
from partime_mcmc.scan import Dense, Diagonal

GPU = AbstractMesh(
    (1,),
    ("device",),
    axis_types=(AxisType.Auto,),
    abstract_device=AbstractDevice(
        device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu"
    ),
)
# A length of no other test: what JAX traces for a processor is of other shapes, and neither is taken for the other.
T, D = 4099, 5


@pytest.fixture
def on_a_gpu(monkeypatch):
    """The choices that a GPU's user gets: lanes, scans, options of the compiler."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


def lowered(function, *args) -> str:
    """The program for CUDA, as text."""
    with use_abstract_mesh(GPU):
        made = export.export(jax.jit(function), platforms=["cuda"])
        return made(*args).mlir_module()


@pytest.mark.smoke
@pytest.mark.parametrize("way", ["prefix", "suffix"])
@pytest.mark.parametrize(
    "kind, num_steps, width, dtype",
    [
        (Diagonal, T, 8, "float32"),
        (Diagonal, T, 1, "bfloat16"),
        (Diagonal, T, 3, "float64"),
        (Diagonal, T, 600, "float32"),
        (Dense, T, 4, "float32"),
        (Dense, T, 8, "bfloat16"),
        (Dense, T, 5, "float64"),
    ],
)
def test_scans(kind, num_steps, width, dtype, way, on_a_gpu):
    with jax.enable_x64(dtype == "float64"):
        shape = (num_steps, width) if kind is Diagonal else (num_steps, width, width)
        maps = kind(
            jax.ShapeDtypeStruct(shape, dtype), jax.ShapeDtypeStruct((num_steps, width), dtype)
        )
        text = lowered(getattr(LocalTime(), way), maps, jax.ShapeDtypeStruct((width,), dtype))
    # A tree of compositions, not a loop.
    assert "stablehlo.while" not in text


def funnel(x):
    return -0.5 * x[0] ** 2 - 0.5 * jnp.sum(x[1:] ** 2) * jnp.exp(-x[0]) - 0.5 * (D - 1) * x[0]


KERNELS = {
    "MALA": lambda density, unit: mala(density, 0.3, unit),
    "MALA, coalescing": lambda density, unit: mala(
        density, 0.3, unit, coupling=MultishiftCoupling()
    ),
    "HMC": lambda density, unit: hmc(density, 0.3, unit, 4),
    "HMC, coalescing": lambda density, unit: coalescing_hmc(density, 0.3, unit, 4),
    "NUTS": lambda density, unit: nuts(density, 0.3, unit),
}
SOLVERS = {
    "shooting": shooting,
    "DEER": deer,
    "quasi-DEER": quasi_deer,
    "ELK": elk,
    "quasi-ELK": quasi_elk,
    "sequential": sequential,
}
# Newton's solvers need a derivative of the step, which NUTS has not.
PAIRS = [(kernel, "shooting") for kernel in KERNELS] + [
    ("HMC", solver) for solver in SOLVERS if solver != "shooting"
]


@pytest.mark.parametrize("kernel, solver", PAIRS)
def test_chains_of_every_kind(kernel, solver, on_a_gpu):
    made = KERNELS[kernel](funnel, Whitening.of_covariance(jnp.zeros(D), jnp.zeros(D), jnp.eye(D)))

    def prepared(start, key):
        state = made.init(start)
        return made.carry(state), made.tape(key, T, state)

    def run(carry, tape):
        found = solve(made.dynamics(), carry, tape, solver=SOLVERS[solver]())
        return found.states, found.residual

    text = lowered(run, *jax.eval_shape(prepared, jnp.zeros(D), jax.random.key(1)))
    assert "stablehlo.while" in text and "lapack" not in text


def test_what_a_gpu_lacks_shows(on_a_gpu):
    """The test above would be no use if lowering took whatever it is given."""
    with pytest.raises(NotImplementedError, match="not found for platform cuda"):
        lowered(lambda x: jax.lax.linalg.schur(x)[0], jnp.eye(3))
