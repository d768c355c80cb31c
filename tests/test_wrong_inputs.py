"""Wrong and odd inputs to every program: one line that names what is wrong, and nothing written."""

import importlib
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny_encoders import write_encoder

from evaluations.scene_finder import Finder, save_finder

TRAIN = """
--config nowhere.yaml | --config: no file nowhere.yaml, and no config of that name; there are such
--config '' | --config: no file ''
--config {empty} | is a folder, not a file
--config dit | dit is a folder, not a file; configs in it: dit/B_flow
--config imagenet256 | near it: dit/imagenet256, ditmoe/imagenet256, dsmoe/imagenet256
--config dit_S_ddpm | it is now dit/S_flow with --objective.name ddpm
--config difmoe/L_E16_flow | near it: diffmoe/L_E16_flow
--config {text} | a config is a mapping of keys, not str
--config {latin} | byte 13 is no UTF-8
--config {twice} | line 3: seed: stands twice, first in line 1
--config {unclosed} | not a readable YAML file: line
--config {list} | a config is a mapping of keys, not list
--config {code} | not a readable YAML file: line 1: could not determine a constructor
--config {circle} | base: files form a circle
--config {homeless} | base: no file missing
--config {idle} | train.num_val_samples: has no effect here; it needs train.val_every above 0
--config {typo} | optim.lrr: unknown key; did you mean optim.lr?
--config {image} | not a readable YAML file
--config | --config: a value is missing
--seed | --seed: a value is missing
train | train: unknown; a value follows its flag
--seeed 1 | --seeed: unknown key; did you mean --seed?
--confg x | --confg: unknown key; did you mean --config?
--lr 1e-4 | --lr: unknown key; did you mean --optim.lr?
--hidden_size 8 | did you mean --model.hidden_size?
--nothing-of-the-kind 1 | --nothing_of_the_kind: unknown key; --help lists the keys
--model 3 | --model: is a section; give its keys
--model.feed_forward.top_k 2 | deepseek or promoe or race or token_choice has it
--objective.noise_schedule linear | --objective.name ddpm has it, not flow
--model.feed_forward.name moe | model.feed_forward.name: unknown 'moe'; known: deepseek, dense
--objective.name vdm | objective.name: unknown 'vdm'; known: ddpm, flow
--model.size XS | --model.size: unknown 'XS'; known: B, G, L, M, S
--seed x | seed: 'x' is not allowed; wanted: int
--seed 1.5 | seed: '1.5' is not allowed; wanted: int
--seed null | seed: null is not allowed; wanted: int
--device tpu | device: 'tpu' is not allowed; wanted: 'auto', 'cpu', 'cuda'
--resume yes | resume: 'yes' is not allowed; wanted: 'auto', 'never'
--model.qk_norm maybe | model.qk_norm: 'maybe' is not allowed; wanted: 'none', 'rmsnorm'
--optim.betas [0.9] | optim.betas: '[0.9]' is not allowed; wanted: [float, float]
--optim.betas 0.9 | optim.betas: '0.9' is not allowed
--optim.betas [0.9,1.0] | optim.betas: 1.0 is not in [0, 1)
--optim.lr -1 | optim.lr: -1.0 is too small
--optim.lr nan | optim.lr: nan
--optim.lr fast | optim.lr: 'fast' is not allowed; wanted: float, null
--optim.grad_clip 0 | optim.grad_clip: 0.0 must be above 0
--optim.ema_decay 1 | optim.ema_decay: 1.0 is not in [0, 1)
--optim.warmup_steps -1 | optim.warmup_steps: -1 is too small
--optim.extra_ema_decays [0.5,0.5] | has the same decay twice
--optim.lr 1e-4 --optim.base_lr 1e-3 | optim.lr: 0.0001 is not optim.base_lr
--train.max_steps 0 | train.max_steps: 0 is too small; at least 1 is allowed
--train.max_steps 1e6 | train.max_steps: '1e6' is not allowed; wanted: int
--train.log_every 0 | train.log_every: 0 is too small
--train.timeout 0 | train.timeout: 0 is too small
--train.global_batch_size 0 | train.global_batch_size: 0 is too small
--train.global_batch_size 100 | --train.micro_batch_size
--train.precision fp16 | train.precision: 'fp16' is not allowed; wanted: 'fp32', 'bf16'
--train.val_every 5 | train.val_every: 5 needs data.val_cached_path
--evaluation.every 5 | evaluation.every: 5 needs evaluation.reference
--evaluation.num_samples 8 | --evaluation.num_samples: has no effect here; it needs evaluation.every
--model.hidden_size 10000000 --model.num_heads 8 | more than 7.2e+15 parameters; at most 1e+12
--model.depth 1000000000 | model.depth 1000000000 makes more than
--model.hidden_size 0 | model.hidden_size: 0 is too small
--model.hidden_size 100 | model.hidden_size: 100 is not divisible by model.num_heads 6
--model.num_heads 5 | is not divisible by model.num_heads 5
--model.patch_size 3 | model.patch_size: 3 does not divide model.input_size 32
--model.rope 3d | model.rope: '3d' is not allowed
--model.positions none | leaves the tokens without a place
--model.label_dropout 1 | model.label_dropout: 1.0 is not in [0, 1)
--model.moe_every 13 | model.moe_every: 13 is larger than model.depth 12
--model.leading_dense 12 | model.leading_dense: 12 leaves no block
--model.feed_forward.num_experts 0 | num_experts: 0
--model.feed_forward.capacity 17 | capacity: 17.0 is not in (0, num_experts
--model.feed_forward.capacity_schedule [5,2] | is not two rising steps
--model.feed_forward.inference_capacity 2 | it belongs to inference 'topk'
--model.feed_forward.name token_choice --model.feed_forward.top_k 17 | top_k: 17 is not in 1
--model.feed_forward.name deepseek --model.feed_forward.num_groups 3 | num_groups: 3 does not divide
--model.num_classes 0 --sampling.cfg_scale 2 | sampling.cfg_scale: 2.0 needs classes
--objective.loss_weighting velocity | means nothing for a predicted velocity
--objective.time_mean 0 | it needs objective.time_distribution logit_normal
--sampling.sampler ddim | sampling.sampler: 'ddim' does not belong to objective.name flow
--sampling.atol 1e-3 | it needs a sampler with tolerances
--sampling.sampler dopri5 --sampling.num_steps 5 | it needs a sampler with fixed steps
--sampling.cfg_scale 2 --sampling.cfg_interval [1,0] | is empty; the first time must be below
--parallel.shard_size 2 | --parallel.shard_size: has no effect here; it needs parallel.strategy fsdp
--parallel.strategy zero | parallel.strategy: 'zero' is not allowed; wanted: 'ddp', 'fsdp', 'zero1'
--parallel.expert_parallel true | has no effect here; it needs parallel.strategy fsdp or zero1
--parallel.strategy fsdp --parallel.expert_parallel true --train.compile true | go with train.comp
--parallel.strategy zero1 --parallel.expert_parallel true --parallel.shard_size 1 | spreads experts
--optim.ema_every 0 | optim.ema_every: 0 is too small
--init_fresh labels | --init_fresh: has no effect here; it needs init_from
--data.source npz | data.npz_contents: source npz needs it
--data.source images | data.data_path: source images needs it
--data.cached_path [] | data.cached_path: names no folder
--data.vae_path null | data.vae_path: null is for pixels
"""

RUN = """
--data.cached_path {nowhere} | data.cached_path: {nowhere} is not a finished cache
--data.cached_path {text} | data.cached_path: cannot read {text}/manifest.json: Not a directory
--data.cached_path {empty} | data.cached_path: {empty} is not a finished cache
--data.cached_path {wrong_count} | is damaged: count '23' is not int
--data.cached_path {wrong_number} | is damaged: a shard's number '0' is not a whole number
--data.cached_path {no_json} | data.cached_path: cannot read
--data.cached_path {other_version} | has version 1, this code reads 2
--data.cached_path {lost_shard} | moments-00001.npy is missing
--data.cached_path {cut_shard} | moments-00001.npy has
--data.val_cached_path {nowhere} --train.val_every 2 | data.val_cached_path: {nowhere} is not a fin
--data.vae_path {nowhere} | data.vae_path: '{nowhere}' is not a folder
--data.vae_path {empty} | data.vae_path: cannot load a VAE from {empty}
--data.source images --data.data_path {nowhere} | image folder: {nowhere} is not a folder
--data.source images --data.data_path {empty} | has no class folders
--data.source npz --data.npz_contents latent --data.cached_path {images} | image folder: class folde
--data.image_size 24 | data.image_size: 24 is configured, but
--model.num_classes 10 | model.num_classes: 10 is configured, but
--model.in_channels 4 | model.in_channels and input_size: (4, 8, 8) is configured
--train.global_batch_size 24 | 24 is more than the 23 training images
"""

CACHE = """
 | --cached-path (main_cache.py --help lists the flags)
--cached-path out | --data-path: needed to write a cache, an image folder
--chached-path out | --chached-path: unknown; did you mean --cached-path?
--cached-path out --data-path {images} extra | extra: unknown
--cached-path out --data-path {nowhere} | image folder: {nowhere} is not a folder
--cached-path out --data-path {text} | image folder: {text} is not a folder
--cached-path out --data-path {empty} | image folder: {empty} has no class folders
--cached-path out --data-path {hollow} | image folder: class folder {hollow}/a has no images
--cached-path out --data-path {images} --vae-path {nowhere} | --vae-path: '{nowhere}' is not a folde
--cached-path out --data-path {images} --vae-path nothing | --vae-path: 'nothing' is not a folder
--cached-path out --data-path {images} --vae-path {empty} | --vae-path: cannot load a VAE
--cached-path out --data-path {images} --vae-path {unet} | holds UNet2DModel, not AutoencoderKL
--cached-path out --data-path {images} --vae-path {vae} --img-size 15 | --img-size: 15 is not a mul
--cached-path out --data-path {images} --img-size 0 | --img-size: 0 is too small; at least 1
--cached-path out --data-path {images} --img-size big | --img-size: 'big' is not a whole number
--cached-path out --data-path {images} --batch-size -1 | --batch-size: -1 is too small
--cached-path out --data-path {images} --num-workers -1 | --num-workers: -1 is too small
--cached-path out --data-path {images} --timeout 0 | --timeout: 0 is too small
--cached-path out --data-path {images} --shard-size x | --shard-size: 'x' is not a whole number
--cached-path out --data-path {images} --dtype int8 | --dtype: invalid choice: 'int8'
--cached-path out --data-path {images} --views 3 | --views: invalid choice: 3
--cached-path out --data-path {images} --on-error ignore | --on-error: invalid choice: 'ignore'
--cached-path out --data-path {images} --device tpu | --device: invalid choice: 'tpu'
--cached-path {cache} --data-path {images} --vae-path {vae} | --cached-path: {cache} is a finished c
--cached-path {text} --data-path {images} --vae-path {vae} --img-size 16 --device cpu | --cached-pat
--cached-path {nowhere} --verify | --cached-path: {nowhere} is not a finished cache
--cached-path {wrong_count} --verify | --cached-path: {wrong_count}/manifest.json is damaged
--cached-path {cut_shard} --verify | --cached-path: {cut_shard}/moments-00001.npy has
--cached-path {cache} --verify --text-cached-path {nowhere} | --text-cached-path: {nowhere} is not a
--cached-path {cache} --verify --text-cached-path {cache} | is a cache of latents, not of captions
--cached-path out --data-path {images} --text-encoder {text_encoder} | --text-encoder: has no effect
--cached-path {cache} --text-only | --text-only: has no effect here; it needs --captions
--cached-path out --data-path {images} --caption-key text | --caption-key: has no effect here; it n
--cached-path out --captions txt --text-cached-path t | --text-encoder: needed to cache captions
--cached-path out --captions txt --text-encoder {text_encoder} | --text-cached-path: needed to cache
--cached-path out --captions txt --text-encoder x --text-cached-path out | is --cached-path; a
--cached-path out --captions txt --text-encoder x --text-cached-path t | --data-path: needed to wr
{text_only} --img-size 16 | --img-size: has no effect with --text-only
{text_only} --views 2 | --views: has no effect with --text-only
{text_only} --captions words | --captions: unknown 'words'; allowed: txt, json, metadata,
{text_only} --captions {nowhere}.jsonl | --captions: cannot read {nowhere}.jsonl: No such file
{text_only} --captions {code} | allowed: txt, json, metadata, template, or the path of a .jso
{text_only} --captions txt | --data-path: captions 'txt' lie in the image folder, which is to be nam
{text_only} --captions txt --data-path {images} | has no captions, {images}/class0/00.txt is missing
{text_only} --captions metadata --data-path {images} | {images} has neither metadata.jsonl nor
{text_only} --captions {captions}/cut.jsonl | {captions}/cut.jsonl line 2: no JSON
{text_only} --captions {captions}/cut.jsonl --path-key img | no 'img', which should name the image
{text_only} --captions {captions}/few.jsonl | 22 of 23 images have no caption in
{text_only} --captions {captions}/few.jsonl --caption-key words | no caption at 'words'; its keys:
{text_only} --captions {captions}/empty.jsonl | line 1: 'text' is an empty caption
{text_only} --caption-template dog | --caption-template: 'dog' needs one {{}} where the name of the
{text_only} --text-encoder {nowhere} | --text-encoder: '{nowhere}' is not a folder
{text_only} --text-encoder {empty} | --text-encoder: {empty} holds no model
{text_only} --text-encoder {pickled} | has no safetensors, only pytorch_model.bin, which is never
{text_only} --text-encoder {vae} | --text-encoder: {vae} has no safetensors
{text_only} --text-encoder {wordless} | --text-encoder: {wordless} has no tokenizer
{text_only} --text-dtype float16 | --text-dtype: invalid choice: 'float16'
{text_only} --text-max-length 0 | --text-max-length: 0 is too small
{text_only} --text-max-length 13 | --text-max-length: 13 is more than the 12 positions of
{text_only} --text-max-length 2 | --text-max-length: 2 leaves no room beside the 2 special tokens
{text_only} --text-layer 3 | --text-layer: 3 is no layer of {text_encoder}, which has 2
{text_only} --text-layer last | --text-layer: invalid int value: 'last'
{text_only} --text-batch-size 0 | --text-batch-size: 0 is too small
{text_only} --text-cached-path {cache} | --text-cached-path: is --cached-path
{text_only} --cached-path {nowhere} | --cached-path: {nowhere} is not a finished cache
{text_only} --text-cached-path {text}/x | --text-cached-path: cannot make {text}/x: Not a directory
"""

SAMPLE = """
 | --ckpt (sample_ddp.py --help lists the flags)
--chpt {run} | --chpt: unknown; did you mean --ckpt?
--ckpt {nowhere} | {nowhere}: no checkpoint here
--ckpt {text} | {text}: no checkpoint here
--ckpt {empty} | {empty}: no checkpoint here
--ckpt {run} --weights ema_0.5 | unknown 'ema_0.5'; known: ema, model
--ckpt {run} --protocol dit | --protocol: unknown 'dit'; known:
--ckpt {run} --num-fid-samples 0 | --num-fid-samples: 0 is too small
--ckpt {run} --num-fid-samples many | --num-fid-samples: 'many' is not a whole number
--ckpt {run} --per-proc-batch-size 0 | --per-proc-batch-size: 0 is too small
--ckpt {run} --device tpu | --device: invalid choice: 'tpu'
--ckpt {run} --labels odd | --labels: invalid choice: 'odd'
--ckpt {run} --save jpg | --save: invalid choice: 'jpg'
--ckpt {run} --cfg-scale big | --cfg-scale:
--ckpt {run} --cfg-interval 0.5 | --cfg-interval: expected 2 arguments
--ckpt {run} --global-seed x | --global-seed:
--ckpt {run} --image-size 32 --num-fid-samples 2 | 32
--ckpt {run} --num-classes 10 --num-fid-samples 2 | 10
--ckpt {run} --vae {nowhere} --num-fid-samples 2 | '{nowhere}' is not a folder
--ckpt {run} --sampler ddim --num-fid-samples 2 | ddim
--ckpt {run} --classes 7 --num-fid-samples 2 | 7
--ckpt {run} --clases 1 | --clases: unknown; did you mean --classes?
"""

EVALUATIONS = """
evaluations.evaluate | required: reference
evaluations.evaluate {nowhere} {set} {inception} | {nowhere}
evaluations.evaluate {text} {set} {inception} | {text}
evaluations.evaluate {empty} {set} {inception} | {empty}
evaluations.evaluate {set} {set} --batch-size 0 | --batch-size: 0 is too small
evaluations.evaluate {set} {set} --inception-weights {nowhere} | {nowhere}
evaluations.evaluate {set} {set} --features digits | classifier
evaluations.evaluate {set} {set} --features vgg | --features: invalid choice: 'vgg'
evaluations.make_reference | required: images, out, --image-size
evaluations.make_reference {nowhere} out.npz --image-size 16 | {nowhere}
evaluations.make_reference {empty} out.npz --image-size 16 | {empty}
evaluations.make_reference {images} out.npz --image-size 0 | --image-size: 0 is too small
evaluations.make_reference {images} out.npz --image-size 16 --num-workers -1 | --num-workers: -1
evaluations.digits --data {nowhere} --out out.safetensors | {nowhere}
evaluations.digits --data {images} --out out.safetensors | {images}
evaluations.digits --dta x --out y | --dta: unknown; did you mean --data?
evaluations.digits --data {images} --out x --epochs 0 | --epochs: 0 is too small
evaluations.capacity | required: set
evaluations.capacity {nowhere} | {nowhere}
evaluations.capacity {text} | {text}
evaluations.compare {nowhere} | {nowhere}
evaluations.compare {text} | {text}
evaluations.likelihood | required: --ckpt
evaluations.likelihood --ckpt {nowhere} | {nowhere}: no checkpoint here
evaluations.likelihood --ckpt {run} --num-samples 0 | --num-samples: 0 is too small
evaluations.likelihood --ckpt {run} --val-cached-path {nowhere} | {nowhere}
evaluations.threshold_search --ckpt {nowhere} | required: --metrics
evaluations.sweep | required
evaluations.routing_gap --ckpt {nowhere} --classes 0,1 | {nowhere}
evaluations.geneval | required: results
evaluations.geneval {nowhere} | {nowhere}: no results: No such file or directory
evaluations.geneval {empty} | {empty}: no results: Is a directory
evaluations.geneval {text} | {text}: line 1: is no JSON
evaluations.geneval {latin} | {latin}: no results: byte 13 is no UTF-8
evaluations.geneval {no_results} | {no_results}: no results in it; wanted: a JSON object in
evaluations.geneval {no_task} | {no_task}: line 1: tag: unknown 'colour'; known: color_attr, colors
evaluations.geneval {no_task} --out {empty} | --out: {empty} is a folder; name a file
evaluations.clip_score | required: source
evaluations.clip_score {nowhere} | {nowhere}: no set of samples; wanted: a folder with set.json
evaluations.clip_score {empty} | {empty}: holds no images of prompts; wanted: a set of samples
evaluations.clip_score {by_classes} | set.json: has no prompts, but classes; a set by prompts
evaluations.clip_score {captioned} --model nothing | --model: 'nothing' is not a folder; allowed: a
evaluations.clip_score {captioned} --model {empty} | --model: cannot load CLIP from {empty}
evaluations.clip_score {captioned} --model {vae} | --model: cannot load CLIP from {vae}
evaluations.clip_score {captioned} --modle {vae} | --modle: unknown; did you mean --model?
evaluations.clip_score {captioned} --batch-size 0 | --batch-size: 0 is too small
evaluations.clip_score {captioned} --out {empty} | --out: {empty} is a folder; name a file
evaluations.scene_finder | required: --out
evaluations.scene_finder --out {empty} | --out: {empty} is a folder; name a file
evaluations.scene_finder --out {nowhere}/f | --out: no folder {nowhere} to write f to
evaluations.scene_finder --out f --scenes 2 | --scenes: too few: 3 digits do not fill a batch of 64
evaluations.scene_finder --out f --epochs 0 | --epochs: 0 is too small
evaluations.scene_scores {images} | required: --finder
evaluations.scene_scores {images} --finder {nowhere} | --finder: no file {nowhere}; make it with
evaluations.scene_scores {images} --finder {text} | --finder: cannot read {text}
evaluations.scene_scores {images} --finder {foreign} | --finder: {foreign} is no finder of scenes
evaluations.scene_scores {nowhere} --finder {finder} | {nowhere}: no set of samples; wanted: a
evaluations.scene_scores {images} --finder {finder} | {images}: holds no images of prompts; wanted
evaluations.scene_scores {by_classes} --finder {finder} | has no prompts, but classes; a set by
evaluations.scene_scores {captioned} --finder {finder} | 'a one': tag: unknown None; known:
evaluations.scene_scores {captioned} --finder {finder} --prompts {nowhere} | {nowhere}: no prompts
evaluations.scene_scores {captioned} --finder {finder} --out {empty} | --out: {empty} is a folder
"""

MODELS = """
models.summary | one of the arguments --config --compare is required
models.summary --confg dit/S_flow | --confg: unknown; did you mean --config?
models.summary --config nowhere | --config: no file nowhere
models.summary --config dit/S_flow --compare dit/B_flow | not allowed with argument
models.summary --compare dit/S_flow nowhere | --config: no file nowhere
models.summary --config dit/S_flow --model.depht 3 | --model.depht: unknown key; did you mean --mode
models.summary --config dit/S_flow --model.depth 0 | model.depth: 0 is too small
models.summary --config dit/S_flow --model.hidden_size 10000000 --model.num_heads 8 | parameters
published.convert_config | required: old
published.convert_config {nowhere} | {nowhere}: not a readable YAML file: No such file
published.convert_config {latin} | {latin}: not a readable YAML file: byte 13 is no UTF-8
published.convert_config {unclosed} | {unclosed}: not a readable YAML file: line
published.convert_config {twice} | line 3: seed: stands twice
published.convert_config {list} | {list}: not an official config
published.convert_config {empty} | {empty}: not a readable YAML file: Is a directory
published.convert_config {official} --out {text} | --out: {text} exists; remove it
published.convert_config {official} --out {empty} | --out: {empty} is a folder; a file is wanted
published.convert_config {official} --out {text}/new.yaml | --out: {text}/new.yaml cannot be written
published.convert_config {official} | model.target: unknown 'models.None'
published.convert_weights --out out | one of the arguments --official --to-official --gather is req
published.convert_weights --official {nowhere} --config dit/S_flow | required: --out
published.convert_weights --official {nowhere} --out out | --config: needed with --official
published.convert_weights --official {nowhere} --out out --config nowhere | --config: no file nowher
published.convert_weights --official {nowhere} --out out --config dit/S_flow | {nowhere}: not readab
published.convert_weights --official {text} --out out --config dit/S_flow | {text}:
published.convert_weights --official {pickle} --out out --config dit/S_flow | which is refused
published.convert_weights --official {set} --out out --config dit/S_flow | {set}:
published.convert_weights --official {weights} --out out --config dit/S_flow | weights
published.convert_weights --official {weights} --out {hollow} --config dit/S_flow | --out: {hollow}
published.convert_weights --to-official {run} --out {text} | --out: {text} exists; remove it
published.convert_weights --to-official {nowhere} --out out.pt | {nowhere}: no checkpoint here
published.convert_weights --to-official {run} --out out.pt --config dit/S_flow | --config: goes with
published.convert_weights --to-official {run} --out out.pt --weight 3 | --weight: unknown
published.convert_weights --gather {nowhere} --out out | {nowhere}: no checkpoint here
published.convert_weights --gather {run} --out {hollow} | --out: {hollow} exists
"""

DATA = """
data.digits | required: --out
data.digits --ot x | --ot: unknown; did you mean --out?
data.digits --out {hollow} | --out: {hollow} exists and is not the complete digits
data.digits --out {text} | --out: {text} exists and is not the complete digits
data.tiny_vae --data {images} --val {images} | required: --out
data.tiny_vae --data {images} --val {images} --out out --steps 0 | --steps: 0 is too small
data.tiny_vae --data {images} --val {images} --out out --steps x | --steps: 'x' is not a whole numbe
data.tiny_vae --data {images} --val {images} --out out --batch-size 0 | --batch-size: 0 is too small
data.tiny_vae --data {images} --val {images} --out out --lr 0 | --lr: 0 is too small; above 0
data.tiny_vae --data {images} --val {images} --out out --lr nan | --lr: 'nan' is not a finite number
data.tiny_vae --data {images} --val {images} --out out --kl-weight -1 | --kl-weight: -1 is too small
data.tiny_vae --data {images} --val {images} --out out --device tpu | --device: invalid choice
data.tiny_vae --data {nowhere} --val {images} --out out | image folder: {nowhere} is not a folder
data.tiny_vae --data {images} --val {empty} --out out | image folder: {empty} has no class folders
data.tiny_vae --data {broken} --val {images} --out out | image: cannot read {broken}/a/x.png
data.tiny_vae --data {images} --val {images} --out {hollow} | --out: {hollow} exists and holds no VA
data.tiny_text --captions {captions}/few.jsonl | required: --out
data.tiny_text --captions {captions}/few.jsonl --out out --steps 0 | --steps: 0 is too small
data.tiny_text --captions {captions}/few.jsonl --out out --lr 0 | --lr: 0 is too small; above 0
data.tiny_text --captions {nowhere}.jsonl --out out | --captions: cannot read {nowhere}.jsonl: No
data.tiny_text --captions {text} --out out | --captions: {text} is no .jsonl or .csv file
data.tiny_text --captions {captions}/cut.jsonl --out out | --captions: {captions}/cut.jsonl line 2
data.tiny_text --captions {captions}/few.jsonl --out {hollow} | exists and holds no text encoder
data.convert_cache --out out | required: --from, --contents, --img-size
data.convert_cache --from {images} --out out --contents pixels --img-size 16 | --contents: invalid c
data.convert_cache --from {nowhere} {to} | image folder: {nowhere} is not a folder
data.convert_cache --from {images} {to} | image folder: class folder
data.convert_cache --from {broken_npz} {to} | --from: cannot read {broken_npz}/a/x.npz
data.convert_cache --from {npz} {to} --vae-path {nowhere} | --vae-path: '{nowhere}' is not a folder
data.convert_cache --from {npz} {to} --img-size 15 | --img-size: latents of (3, 8, 8) come from
data.convert_cache --from {npz} {to} --out {hollow} | --out: {hollow} exists and is not empty
data.convert_cache --from {npz} {to} --timeout 0 | --timeout: 0 is too small
data.convert_cache --from {npz} {to} --contents posterior | --contents: posterior has 6 channels
"""

OTHERS = """
training.verify_resume --steps 0 | --steps: 0 is too small
training.verify_resume --kills -1 | --kills: -1 is too small
training.verify_resume --seed x | --seed:
training.verify_resume --stps 3 | --stps: unknown; did you mean --steps?
benchmarks.moe_layer --tokens 100 | --tokens: 100 is not a multiple of 256; near it: 256
benchmarks.moe_layer --tokens 0 | --tokens: 0 is too small
benchmarks.moe_layer --device tpu | --device: 'tpu' is not available on this machine; allowed: cpu
benchmarks.moe_layer --num-experts 0 | --num-experts: 0 is too small
benchmarks.moe_layer --family dense | --family: invalid choice: 'dense'
benchmarks.moe_layer --out {empty} | --out: {empty} is a folder; a file is wanted
benchmarks.sampling --ckpt {list} | no checkpoint
benchmarks.sampling | --ckpt --config is required
benchmarks.moe_layer --precision fp8 | --precision: invalid choice: 'fp8'
benchmarks.train_step | required: --config
benchmarks.train_step --config nowhere | --config: no file nowhere
benchmarks.train_step --config dit/S_flow --device tpu | --device: 'tpu' is not available
benchmarks.train_step --config dit/S_flow --batch-size 0 | --batch-size: 0 is too small
benchmarks.train_step --config dit/S_flow --out {text}/x.json | cannot be written: {text} is no fold
benchmarks.metrics --samples 0 | --samples: 0 is too small
benchmarks.metrics --sample 3 | --sample: unknown; did you mean --samples?
benchmarks.metrics --out {empty} | --out: {empty} is a folder; a file is wanted
benchmarks.latent_loader --images 0 | --images: 0 is too small
benchmarks.latent_loader --dir {nowhere} | --dir: {nowhere} is no folder
"""


def rows(table: str, program: str | None = None) -> list[tuple[str, str, str]]:
    """(program, arguments, wanted) of the lines of a table; its lines name programs or none."""
    found = []
    for line in table.strip("\n").splitlines():
        words, _, wanted = line.partition("|")
        name, words = (program, words) if program else f"{words} ".split(" ", 1)
        found.append((name, words.strip(), wanted.strip()))
    return found


CASES = [
    *rows(TRAIN, "train"),
    *((name, f"{{small}} {words}", wanted) for name, words, wanted in rows(RUN, "train")),
    *rows(CACHE, "main_cache"),
    *rows(SAMPLE, "sample_ddp"),
    *rows(EVALUATIONS),
    *rows(MODELS),
    *rows(DATA),
    *rows(OTHERS),
]


def test_there_are_enough():
    assert len(set(CASES)) == len(CASES) >= 200


FILES = {
    "text.txt": b"words",
    "latin.yaml": b"seed: 1 # caf\xe9\n",
    "twice.yaml": b"seed: 1\ndevice: cpu\nseed: 2\n",
    "unclosed.yaml": b"a: [\n",
    "list.yaml": b"- 1\n",
    "code.yaml": b"seed: !!python/object/apply:os.getcwd []\n",
    "circle.yaml": b"base: circle.yaml\n",
    "homeless.yaml": b"base: missing\n",
    "idle.yaml": b"train: {num_val_samples: 8}\n",
    "typo.yaml": b"optim: {lrr: 1}\n",
    "official.yaml": b"basic: {}\nmodel: {target: models.None}\n",
    "broken/a/x.png": b"no image",
    "broken_npz/a/x.npz": b"no archive",
    "unet/config.json": b'{"_class_name": "UNet2DModel"}',
    "hollow/a/notes.txt": b"",
    "no_results.jsonl": b"\n",
    "no_task.jsonl": b'{"tag": "colour", "correct": true, "metadata": "{}"}\n',
    "by_classes/set.json": b'{"checkpoint_sha256": "", "set_sha256": "", "config": {}}',
    "captioned/metadata.jsonl": b'{"file_name": "metadata.jsonl", "text": "a one"}',
    "captions/cut.jsonl": b'{"file_name": "class0/00.png", "text": "a dog"}\n{"file',
    "captions/few.jsonl": b'{"file_name": "class0/00.png", "text": "a dog"}\n',
    "captions/empty.jsonl": b'{"file_name": "class0/00.png", "text": " "}\n',
    "pickled/config.json": b'{"model_type": "bert"}',
    "pickled/pytorch_model.bin": b"",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, cache_folder, vae_folder, image_root, tiny_config, trained, scoring):
    """Names in the tables, and the folder that holds what belongs to these tests alone."""
    root = tmp_path_factory.mktemp("inputs")
    for name, content in FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    names = {Path(name).parts[0].split(".")[0]: root / Path(name).parts[0] for name in FILES}
    (root / "empty").mkdir()
    (root / "npz" / "a").mkdir(parents=True)
    view = np.zeros((3, 8, 8), np.float32)
    np.savez(root / "npz" / "a" / "x.npz", moments=view, moments_flip=view)
    np.savez(root / "set.npz", arr_0=np.zeros((4, 16, 16, 3), np.uint8))
    save_finder(root / "finder.safetensors", Finder(), {})
    save_file({"weights": torch.zeros(3)}, root / "foreign.safetensors")
    torch.save({"model": Path("x")}, root / "pickle.pt")
    torch.save({"model": {"weights": torch.zeros(3)}}, root / "weights.pt")
    manifest = json.loads((cache_folder / "manifest.json").read_text())
    wrong = {"wrong_count": {"count": "23"}, "other_version": {"version": 1}}
    shards = [manifest["shards"][0] | {"number": "0"}, *manifest["shards"][1:]]
    wrong |= {"wrong_number": {"shards": shards}, "lost_shard": {}, "cut_shard": {}, "no_json": {}}
    for name, changes in wrong.items():
        shutil.copytree(cache_folder, root / name)
        (root / name / "manifest.json").write_text(json.dumps(manifest | changes))
    (root / "no_json" / "manifest.json").write_text("{")
    (root / "lost_shard" / "moments-00001.npy").unlink()
    (root / "cut_shard" / "moments-00001.npy").write_bytes(b"x")
    made = ("empty", "npz", *wrong)
    names |= {name: root / name for name in made} | {"set": root / "set.npz"}
    names |= {"pickle": root / "pickle.pt", "weights": root / "weights.pt"}
    names |= {name: root / f"{name}.safetensors" for name in ("finder", "foreign")}
    names |= {"cache": cache_folder, "vae": vae_folder, "images": image_root, "run": trained}
    names |= {"image": image_root / "class0" / "00.png"}
    names["small"] = f"--config {tiny_config} --device cpu"
    names["inception"] = " ".join(map(str, scoring[2:]))
    names["nowhere"] = root / "nowhere"
    names |= {"text_encoder": write_encoder(root / "encoder"), "wordless": root / "wordless"}
    shutil.copytree(root / "encoder", root / "wordless")
    (root / "wordless" / "tokenizer.json").unlink()
    flags = {"--cached-path": cache_folder, "--text-encoder": root / "encoder", "--device": "cpu"}
    flags |= {"--captions": "template", "--text-cached-path": "t", "--text-max-length": 12}
    words = (f"{flag} {value}" for flag, value in flags.items())
    names["text_only"] = " ".join(["--text-only", *words])
    names["to"] = f"--contents latent --img-size 16 --out out --vae-path {vae_folder}"
    return names, root


def listing(*folders: Path) -> list[tuple[str, int, int]]:
    """Every file and folder below, with size and time of the last change."""
    found = []
    for folder in folders:
        for parent, below, files in os.walk(folder):
            for name in (*below, *files):
                about = os.lstat(os.path.join(parent, name))
                changed = 0 if name in below else about.st_mtime_ns
                found.append((os.path.join(parent, name), about.st_size, changed))
    return sorted(found)


@pytest.mark.parametrize(("program", "words", "wanted"), CASES)
def test_one_line_and_nothing_written(
    program, words, wanted, inputs, tmp_path, monkeypatch, capfd, caplog
):
    names, root = inputs
    kept = (root, tmp_path, *(names[name] for name in ("cache", "vae", "images", "run")))
    monkeypatch.chdir(tmp_path)
    before = listing(*kept)
    argv = shlex.split(words.format(**names))
    monkeypatch.setattr(sys, "argv", [f"{program}.py", *argv])
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main()
    out, err = capfd.readouterr()
    assert stop.value.code not in (0, None)
    assert err.startswith("error: "), err
    assert err.count("\n") == 1, err
    assert wanted.format(**names) in err
    assert (out, [record.getMessage() for record in caplog.records]) == ("", [])
    assert listing(*kept) == before
