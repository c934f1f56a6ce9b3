#!/usr/bin/env bash
# The GPU's tests and the `gpu` suite, from a plain checkout: bash benchmarks/gpu.sh OUT
# Leaves JSON, Markdown tables, their targets and the tests' output in OUT; under nine minutes on one datacentre GPU.
# The papers' experiments at the papers' sizes: bash benchmarks/gpu.sh papers [OUT [NAME...]]
# Leaves JSON, Markdown tables and figures in OUT (benchmark-results/papers), one experiment after another.
set -uo pipefail
papers=no
if [ "${1:-}" = papers ]; then
  papers=yes
  shift
  set -- "${1:-benchmark-results/papers}" "${@:2}"
fi
if [ $# -lt 1 ] || { [ $papers = no ] && [ $# -ne 1 ]; }; then
  echo "usage: bash benchmarks/gpu.sh OUT, or bash benchmarks/gpu.sh papers [OUT [NAME...]]" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
shift
cd "$(dirname "$0")/.."
export PYTHONPATH=".:${PYTHONPATH:-}" XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}"
python3 - <<'PREFLIGHT' || exit 3
import importlib.util
import sys

wanted = ("jax", "jaxlib", "blackjax", "numpyro", "arviz", "xarray", "numpy", "h5netcdf", "h5py", "tqdm", "matplotlib", "scipy",
          "pytest", "hypothesis")
missing = [name for name in wanted if importlib.util.find_spec(name) is None]
if missing:
    sys.exit(f"gpu.sh: missing packages: {' '.join(missing)} (pip install {' '.join(missing)})")
import jax

print(f"Python {sys.version.split()[0]}, JAX {jax.__version__}, {jax.default_backend()}: {jax.devices()}")
if jax.default_backend() == "cpu":
    sys.exit("gpu.sh: JAX sees no GPU: install jax[cuda12] or jax[cuda13], or look at the driver")
PREFLIGHT
if [ $papers = yes ]; then
  failed=0
  for name in "${@:-all}"; do
    python3 -m benchmarks.papers "$name" --size paper --out "$out" || failed=1
  done
  exit $failed
fi
XLA_FLAGS="${XLA_FLAGS:-}" timeout 150 python3 -m pytest -o addopts="" -p no:xdist -q -m gpu tests/distributed/test_gpu.py 2>&1 | tee "$out/tests.txt"
tests=${PIPESTATUS[0]}
timeout 360 python3 -m benchmarks run --suite gpu --out "$out"
suite=$?
python3 -m benchmarks report "$out"
report=$?
exit $((tests || suite || report))
