#!/usr/bin/env bash
# bash benchmarks/gpu.sh [OUT]: every GPU table, in under ten minutes on one Hopper-class GPU.
# Tables go to the terminal and to OUT/gpu_tables.txt, figures to OUT/*.json.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
mkdir -p "$out"

{
    echo "== Correctness: recorded numbers, order of sums, backends, bf16, resumes"
    python -m pytest -m gpu -q
    echo "== One layer, bf16, compiled: D = 1024, 65,536 tokens"
    python -m benchmarks.moe_layer --device cuda --precision bf16 --compile --hidden-size 1024 \
        --tokens 65536 --num-experts 4 16 64 --repeats 15 --out "$out/gpu_layer.json"
    echo "== One layer, float32: D = 384, 16,384 tokens"
    python -m benchmarks.moe_layer --device cuda --hidden-size 384 --tokens 16384 \
        --repeats 15 --out "$out/gpu_layer_fp32.json"
    echo "== DeepSeek-style layers, bf16, compiled: D = 1024, 65,536 tokens"
    python -m benchmarks.moe_layer --device cuda --precision bf16 --compile --hidden-size 1024 \
        --tokens 65536 --family deepseek --repeats 15 --out "$out/gpu_layer_deepseek.json"
    echo "== Expert Race, bf16, compiled: D = 1024, 65,536 tokens"
    python -m benchmarks.moe_layer --device cuda --precision bf16 --compile --hidden-size 1024 \
        --tokens 65536 --family race --repeats 15 --out "$out/gpu_layer_race.json"
    echo "== The whole step, bf16, compiled, batch 256 in forward passes of 64"
    python -m benchmarks.train_step --device cuda --precision bf16 --compile --batch-size 256 \
        --micro-batch-size 64 --repeats 5 --out "$out/gpu_step_L.json" \
        --config dit/L_flow diffmoe/L_E16_flow \
        ecdit/L_E16_flow tcdit/L_E16_flow
    echo "== The whole step, bf16, not compiled"
    python -m benchmarks.train_step --device cuda --precision bf16 --batch-size 256 \
        --micro-batch-size 64 --repeats 5 --out "$out/gpu_step_L_eager.json" \
        --config dit/L_flow diffmoe/L_E16_flow
} | tee "$out/gpu_tables.txt"
