#!/usr/bin/env bash
# The main job on real handwritten digits, minutes on two CPU cores: image folder -> cached
# latents -> training -> samples -> scores. Finished stages are skipped; --fresh starts over.
# Other systems: --config quickstart_dsmoe, quickstart_jitmoe (pixels), or quickstart_t2i (captions).
set -euo pipefail
cd "$(dirname "$0")/.."

usage="usage: bash scripts/quickstart.sh [--config quickstart_NAME] [--fresh]"
config=quickstart
fresh=no
while [ $# -gt 0 ]; do
    case "$1" in
        --fresh) fresh=yes ;;
        --config)
            [ $# -gt 1 ] || { echo "$usage" >&2; exit 2; }
            config="$2"
            shift ;;
        *) echo "$usage" >&2; exit 2 ;;
    esac
    shift
done

source scripts/environment.sh
extra=""
[[ "$config" = *t2i* ]] && extra=t2i
use_environment "$extra"

# What all variants share lies in $shared, what this one makes in $run.
shared=runs/quickstart
facts=$(python scripts/quickstart_facts.py "$config")
read -r train steps kind guidance <<< "$facts"
run=$(dirname "$train")
[ "$fresh" = no ] || rm -rf "$run"

cores=$(getconf _NPROCESSORS_ONLN)
gpus=$(nvidia-smi -L 2>/dev/null | wc -l || true)
processes=$((gpus > 0 ? gpus : cores))
processes=$((processes > 2 ? 2 : processes))
threads=$((cores / processes > 0 ? cores / processes : 1))
checkpoint=$(printf 'step_%07d' "$steps")
launch="env OMP_NUM_THREADS=$threads torchrun --standalone --nproc_per_node=$processes"

# stage FILE TITLE COMMAND...: run the command unless FILE (or one that fits the pattern), its last
# output, is there.
stage() {
    local output="$1" title="$2"
    shift 2
    if compgen -G "$output" > /dev/null; then
        echo "== $title: done before"
    else
        echo "== $title"
        "$@"
    fi
}

if [ "$kind" = text ]; then
    source scripts/quickstart_t2i.sh
    exit
fi

stage $shared/images "Handwritten digits as an image folder" \
    python -m data.digits --out $shared/images
if [ "$kind" = latents ]; then
    stage $shared/vae "A small VAE for them" \
        python -m data.tiny_vae --data $shared/images/train --val $shared/images/val \
        --out $shared/vae
    stage $shared/cache/manifest.json "Cache the latents" \
        $launch main_cache.py --img_size 32 --vae_path $shared/vae --batch_size 128 \
        --shard_size 256 --num_workers 0 --data_path $shared/images/train \
        --cached_path $shared/cache
fi
stage "$train/checkpoints/$checkpoint" "Train $config" \
    $launch train.py --config "$config" --resume auto
stage $shared/classifier.safetensors "A digit classifier to score with" \
    python -m evaluations.digits --data $shared/images --out $shared/classifier.safetensors
features="--features digits --classifier $shared/classifier.safetensors"
stage $shared/reference.npz "A reference: statistics of the training digits, and the held-out ones" \
    python -m evaluations.make_reference $shared/images/train $shared/reference.npz \
    --image-size 32 --pr-images $shared/images/val --num-workers 0 $features
for scale in 1 2; do
    set="$run/samples/*/$checkpoint-ema-*-cfg$scale-*"
    # A set that was stopped before its scores is scored now.
    scored=$(grep -ls '"scores"' $set/set.json || true)
    stage "${scored:-no scores}" "Sample 500 digits at guidance $scale, and score them" \
        $launch sample_ddp.py --ckpt "$train" --image-size 32 --num-fid-samples 500 \
        --per-proc-batch-size 125 --cfg-scale $scale --sample-dir "$run/samples" \
        --metrics $shared/reference.npz $features --capacity
    stage "$set/experts.png" "Where the computation goes at guidance $scale" \
        python -m evaluations.capacity $set
done
stage $shared/heldout.json "Score the held-out digits for comparison" \
    python -m evaluations.evaluate $shared/reference.npz $shared/images/val $features \
    --metrics fd --out $shared/heldout.json

python scripts/quickstart_report.py $shared "$run"
