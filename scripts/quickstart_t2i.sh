# Sourced by quickstart.sh: text-to-image on scenes of coloured digits, from captions to scores.
shared=runs/quickstart_t2i

stage $shared/scenes "Scenes of handwritten digits with captions" \
    python -m data.scenes --out $shared/scenes
stage $shared/vae "A small VAE for them" \
    python -m data.tiny_vae --data $shared/scenes/train --val $shared/scenes/val --steps 1000 \
    --out $shared/vae
stage $shared/encoder "A small text encoder for their captions" \
    python -m data.tiny_text --captions $shared/scenes/train/metadata.jsonl --steps 400 \
    --out $shared/encoder
stage $shared/texts/manifest.json "Cache latents and encoded captions" \
    $launch main_cache.py --img_size 32 --vae_path $shared/vae --num_workers 0 --shard_size 1024 \
    --data_path $shared/scenes/train --cached_path $shared/cache --captions metadata \
    --text_encoder $shared/encoder --text_max_length 12 --text_cached_path $shared/texts
stage "$train/checkpoints/$checkpoint" "Train $config" \
    $launch train.py --config "$config" --resume auto
stage $shared/finder.safetensors "A finder of digits to score with" \
    python -m evaluations.scene_finder --out $shared/finder.safetensors
stage $shared/heldout.jsonl "Score real held-out scenes: the ceiling" \
    python -m evaluations.scene_scores $shared/scenes/val --finder $shared/finder.safetensors \
    --out $shared/heldout.jsonl
for scale in 1 "$guidance"; do
    set="$run/samples/*/$checkpoint-ema-*-cfg$scale-*prompts=prompts.*"
    stage "$set/set.json" "Sample 300 prompts at guidance $scale, two images of each" \
        $launch sample_ddp.py --ckpt "$train" --prompts $shared/scenes/prompts.jsonl \
        --num-per-prompt 2 --cfg-scale $scale --per-proc-batch-size 100 --sample-dir "$run/samples" --capacity
    stage "$run/results_cfg$scale.jsonl" "Score them by GenEval's rules" \
        python -m evaluations.scene_scores $set --finder $shared/finder.safetensors \
        --out "$run/results_cfg$scale.jsonl"
done
stage "$set/experts.png" "Where the computation goes" python -m evaluations.capacity $set

python scripts/quickstart_t2i_report.py $shared "$run"
