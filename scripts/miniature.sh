#!/usr/bin/env bash
# The paper's text-to-image comparison in miniature: a dense model against DiffMoE of equal activated
# size on the scenes of the quickstart (which is to be run first), three seeds, fewer steps.
# Finished runs are skipped. Draws docs/miniature.png and prints a table.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
use_environment t2i

data=runs/quickstart_t2i out=runs/miniature steps=${1:-1500}
launch="env OMP_NUM_THREADS=1 torchrun --standalone --nproc_per_node=2"
for seed in 0 1 2; do
    for layer in dense diffmoe; do
        run=$out/${layer}_$seed
        [ -f "$run/results.jsonl" ] && continue
        $launch train.py --config quickstart_t2i --resume auto --run_dir "$run" --seed $seed \
            --model.feed_forward.name $layer --train.max_steps "$steps" --train.sample_every 0
        $launch sample_ddp.py --ckpt "$run" --prompts $data/scenes/prompts.jsonl \
            --num-per-prompt 2 --per-proc-batch-size 100 --sample-dir "$run/samples"
        python -m evaluations.scene_scores "$run"/samples/*/* --finder $data/finder.safetensors \
            --out "$run/results.jsonl"
    done
done
python scripts/miniature_report.py $out docs/miniature.png
