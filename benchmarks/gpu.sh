#!/usr/bin/env bash
# bash benchmarks/gpu.sh [OUT]: every GPU table, in under ten minutes on one Hopper-class GPU.
# The most important first; tables go to the terminal and to OUT/gpu_tables.txt as they are made,
# figures to OUT/*.json, the trace of one step to OUT/gpu_trace.json.
set -uo pipefail
cd "$(dirname "$0")/.."
out="${1:-benchmarks/results}"
mkdir -p "$out"

table() {
    echo "== $1"
    shift
    "$@" || echo "FAILED: $*"
}

layers() {
    python -m benchmarks.moe_layer --device cuda --repeats 15 "$@"
}

big="--precision bf16 --compile --hidden-size 1024 --tokens 65536"
steps="--device cuda --batch-size 256 --micro-batch-size 64 --repeats 5 --precision bf16"
of_L="--config dit/L_flow diffmoe/L_E16_flow"

{
    nvidia-smi --query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.sm \
        --format=csv
    table "Correctness: recorded numbers, order of sums, backends, bf16, resumes" \
        python -m pytest -m gpu -q
    table "One layer, bf16, compiled" layers $big --num-experts 4 16 --out "$out/gpu_layer.json"
    table "The whole step, L, bf16, compiled, batch 256 in forward passes of 64" \
        python -m benchmarks.train_step $steps --compile $of_L ecdit/L_E16_flow tcdit/L_E16_flow \
        --out "$out/gpu_step_L.json"
    table "The whole step, L, bf16, not compiled, and a trace" \
        python -m benchmarks.train_step $steps $of_L \
        --out "$out/gpu_step_L_eager.json" --trace "$out/gpu_trace.json"
    table "Sampling, L, 50 steps, guidance 1.5" \
        python -m benchmarks.sampling --device cuda --config diffmoe/L_E16_flow --num-steps 50 \
        --cfg-scale 1.5 --num-images 125 --batch-size 125 --repeats 3 \
        --out "$out/gpu_sampling_L.json"
    table "The whole step, S and B, bf16, compiled" \
        python -m benchmarks.train_step $steps --compile --config dit/S_flow diffmoe/S_E16_flow \
        dit/B_flow diffmoe/B_E16_flow --out "$out/gpu_step_SB.json"
    table "One layer, float32" layers --tokens 16384 --out "$out/gpu_layer_fp32.json"
    table "DeepSeek-style layers, bf16, compiled" \
        layers $big --family deepseek --out "$out/gpu_layer_deepseek.json"
    table "Expert Race, bf16, compiled" layers $big --family race --out "$out/gpu_layer_race.json"
    table "Latents from files to the GPU" \
        python -m benchmarks.latent_loader --device cuda --repeats 3 \
        --out "$out/gpu_latent_loader.json"
} 2>&1 | tee "$out/gpu_tables.txt"
! grep -q "^FAILED" "$out/gpu_tables.txt"
