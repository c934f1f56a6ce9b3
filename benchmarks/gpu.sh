#!/usr/bin/env bash
# The GPU's tests and the `gpu` suite, from a plain checkout: bash benchmarks/gpu.sh OUT
# Leaves JSON, Markdown tables, a report page and the tests' output in OUT; under nine minutes on one datacentre GPU.
set -uo pipefail
if [ $# -ne 1 ]; then
  echo "usage: bash benchmarks/gpu.sh OUT" >&2
  exit 2
fi
mkdir -p "$1"
out=$(cd "$1" && pwd)
cd "$(dirname "$0")/.."
export PYTHONPATH=".:${PYTHONPATH:-}" XLA_PYTHON_CLIENT_PREALLOCATE=false TF_CPP_MIN_LOG_LEVEL=2
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$(mktemp -d)}"
XLA_FLAGS="${XLA_FLAGS:-}" timeout 180 python3 -m pytest -o addopts="" -p no:xdist -q -m gpu tests/test_gpu.py 2>&1 | tee "$out/tests.txt"
tests=${PIPESTATUS[0]}
timeout 360 python3 -m benchmarks run --suite gpu --out "$out"
suite=$?
python3 -m benchmarks report "$out"
page=$?
exit $((tests || suite || page))
