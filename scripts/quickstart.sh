#!/usr/bin/env bash
# The main job on real handwritten digits, minutes on two CPU cores: image folder -> cached
# latents -> training -> samples -> scores. Finished stages are skipped; --fresh starts over.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
    "") ;;
    --fresh) rm -rf runs/quickstart ;;
    *) echo "usage: bash scripts/quickstart.sh [--fresh]" >&2; exit 2 ;;
esac

source scripts/environment.sh
use_environment ""

run=runs/quickstart
cores=$(getconf _NPROCESSORS_ONLN)
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
processes=$((gpus > 0 ? gpus : cores))
processes=$((processes > 2 ? 2 : processes))
threads=$((cores / processes > 0 ? cores / processes : 1))
steps=$(sed -n 's/^  max_steps: //p' config/quickstart.yaml)
sampler_steps=$(sed -n 's/^  num_steps: //p' config/quickstart.yaml)
checkpoint=$(printf 'step_%07d' "$steps")
launch="env OMP_NUM_THREADS=$threads torchrun --standalone --nproc_per_node=$processes"

# stage FILE TITLE COMMAND...: run the command unless FILE, its last output, is there.
stage() {
    local output="$1" title="$2"
    shift 2
    if [ -e "$output" ]; then
        echo "== $title: done before"
    else
        echo "== $title"
        "$@"
    fi
}

stage $run/images "Handwritten digits as an image folder" \
    python -m data.digits --out $run/images
stage $run/vae "A small VAE for them" \
    python -m data.tiny_vae --data $run/images/train --val $run/images/val --out $run/vae
stage $run/cache/manifest.json "Cache the latents" \
    $launch main_cache.py --img_size 32 --vae_path $run/vae --batch_size 128 --shard_size 256 \
    --num_workers 0 --data_path $run/images/train --cached_path $run/cache
stage $run/train/checkpoints/$checkpoint "Train DiffMoE" \
    $launch train.py --config config/quickstart.yaml --resume auto
stage $run/classifier.safetensors "A digit classifier to score with" \
    python -m evaluations.digits --data $run/images --out $run/classifier.safetensors
features="--features digits --classifier $run/classifier.safetensors"
stage $run/reference.npz "A reference: statistics of the training digits, and the held-out ones" \
    python -m evaluations.make_reference $run/images/train $run/reference.npz --image-size 32 \
    --pr-images $run/images/val --num-workers 0 $features
for scale in 1 2; do
    name=$checkpoint-ema-euler$sampler_steps-cfg$scale-b125-seed0-n500
    stage $run/samples/$name.json \
        "Sample 500 digits at guidance $scale, and score them" \
        $launch sample_ddp.py --ckpt $run/train --image-size 32 --num-fid-samples 500 \
        --per-proc-batch-size 125 --cfg-scale $scale --num-sampling-steps "$sampler_steps" \
        --sample-dir $run/samples --metrics $run/reference.npz $features --capacity
    stage $run/samples/$name.steps.png "Where the computation goes at guidance $scale" \
        python -m evaluations.capacity $run/samples/$name.json
done
stage $run/heldout.json "Score the held-out digits for comparison" \
    python -m evaluations.evaluate $run/reference.npz $run/images/val $features \
    --metrics fd --out $run/heldout.json

python scripts/quickstart_report.py $run
