#!/usr/bin/env bash
# Check and time the CUDA path in two calls, from a checkout with nothing installed:
#
#   bash benchmarks/lease.sh check     at most 240 s: every kernel against fp64, tests, ceilings
#   bash benchmarks/lease.sh time      at most 480 s: kernels, ops, decoding, training
#
# Each call writes one archive to $OUT (default: gpu-results). `check` ends with a table and with the
# switches that `time` should run with. On the same machine, `time` reads them itself. --dry-run runs
# the same code on a CPU: kernels are compiled for sm_90, but not run.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.lease "$@"
