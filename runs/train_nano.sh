#!/usr/bin/env bash
# The nano model from nothing: taught on generated conversations, packed to MXFP4, examined. About
# an hour and a quarter on two cores with nothing else running; the same seed, machine and torch
# give the same weights. SIBLING=1 goes on to a deeper one, which then learns from rewards too:
# about half an hour more.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
gptoss="$python -m gptoss"
out=${OUT:-checkpoints/nano}
threads=${THREADS:-2}
# glibc otherwise gives every large tensor back to the system and takes it again
export MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=4000000000

$python -m runs.nano.train --out "$out-run" --threads "$threads"
$gptoss train export "$out-run" "$out"
$python -m runs.nano.evaluate "$out"
[[ -n ${SIBLING:-} ]] || exit 0

$gptoss train export "$out-run" "$out-taught" --to huggingface-bf16
$python -m runs.nano.grow "$out-taught" "$out-grown" --layers 6
$python -m runs.nano.train --out "$out-sibling-run" --grown "$out-grown" --steps 500 --threads "$threads"
$gptoss train export "$out-sibling-run" "$out-sibling-taught" --to huggingface-bf16
$python -m runs.nano.prompts "$out-run" "$out-prompts.jsonl"
$gptoss train grpo "$out-sibling-taught" "$out-prompts.jsonl" --out "$out-sibling-reward" \
    --reward exact --qat least_squares --steps 24 --lr 2e-4 --warmup 3 --kl 0.01 \
    --prompts 24 --group 8 --max-tokens 320 --threads "$threads"
$gptoss train export "$out-sibling-reward" "$out-sibling"
$python -m runs.nano.evaluate "$out-sibling"
$python -m runs.nano.curves "$out.svg" --runs "$out-run" "$out-sibling-run" --reward "$out-sibling-reward"
