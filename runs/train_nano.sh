#!/usr/bin/env bash
# The nano model from nothing: generate data, train, pack to MXFP4, examine. About an hour and a
# quarter on two cores with nothing else running; the same seed, machine and torch give the same
# weights.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-checkpoints/nano}
# glibc otherwise gives every large tensor back to the system and takes it again
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000
$python -m runs.nano.train --out "$out-run"
$python -m runs.nano.pack "$out-run" "$out"
$python -m runs.nano.evaluate "$out"
