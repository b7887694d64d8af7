#!/bin/bash
# All of a GPU's figures in RESULTS.md, in bfloat16, in about ten minutes on one H100 or H200: what has targets first, what compiles
# longest last. Each command writes a file of its own, so that one that fails, or a limit on time, takes no other with it.
# From a bare checkout, without an installation: PYTHONPATH is set here. OUT is where the files go; then
# `python benchmarks/report.py` shows them. Delete results/notes_cuda.md with the files that it is about.
set -uo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
OUT=${OUT:-benchmarks/results}
mkdir -p "$OUT"

failed=0
step_cost() { # name of the file, options
    local name=$1
    shift
    echo "== $name, after $SECONDS s"
    python benchmarks/step_cost.py --device cuda --dtypes bfloat16 --methods rero --out "$OUT/step_cost_cuda$name.json" "$@" || failed=1
}

step_cost "" --sizes S B L --phases fine-tuning --batch-sizes 16
step_cost _pretraining --sizes S B L --phases pre-training --batch-sizes 32
step_cost _64_clips --phases fine-tuning --batch-sizes 64
step_cost _inference --phases inference --batch-sizes 32 --keep-ratios 0.6 0.5 0.3 0.2
step_cost _frames --phases fine-tuning --frames 64 --keep-ratios 0.15 --batch-sizes 4 # 940 of 6,272 tokens
python benchmarks/selection_cost.py --device cuda --dtypes bfloat16 --batch-sizes 32 --out "$OUT/selection_cost_cuda.json" || failed=1
python benchmarks/camera_motion.py --parts cost --device cuda --dtype bfloat16 --batch-size 32 --out "$OUT/camera_motion_cuda.json" || failed=1
python benchmarks/packing.py --device cuda --dtype bfloat16 --batch-size 32 --repeats 20 --out "$OUT/packing_cuda.json" || failed=1
python -m pytest -q -o addopts= tests/integration/test_cuda_graphs.py tests/hosts/test_transformers_videomae.py tests/examples/test_augmentation.py \
    -k "gpu or ReduceOverhead" || failed=1
step_cost _compile --phases fine-tuning --batch-sizes 16 --modes compile reduce-overhead --repeats 5
step_cost _compile_pretraining --phases pre-training --batch-sizes 32 --modes compile reduce-overhead --repeats 5
step_cost _compile_inference --phases inference --batch-sizes 32 --keep-ratios 0.6 0.5 0.3 0.2 --modes compile reduce-overhead
echo "== done after $SECONDS s"
exit $failed
