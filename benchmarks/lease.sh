#!/usr/bin/env bash
# Check and time the CUDA path in two calls, from a bare checkout:
#
#   bash benchmarks/lease.sh check     at most 240 s: every kernel against fp64, tests, ceilings
#   bash benchmarks/lease.sh time      at most 480 s: kernels, ops, decoding, training
#
# Both leave one archive in $OUT (default: gpu-results). `check` ends with a table and with the
# switches that `time` should run with; on the same machine `time` finds them by itself.
# --dry-run goes through the same code on a CPU: kernels are compiled for sm_90 and not run.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
exec "${PYTHON:-python3}" -m benchmarks.lease "$@"
