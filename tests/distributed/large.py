"""torchrun --nproc_per_node=2 tests/distributed/large.py OUT CACHE VAE TEXTS

The 3B model in shards without memory, and models of its pattern and of that of text-to-image, of
little width, trained.
"""

import json
import sys
from pathlib import Path

import torch

from config.load import parse_config
from core.distributed import processes
from models.build import build_model
from training.parallel import local, shard
from training.trainer import train

CONFIG = "dsmoe/3B_E16_flow"
TEXT_CONFIG = "t2i/diffmoe_E16_flow"


def narrow(out: Path, cache: str, vae: str) -> list[str]:
    """Flags that shrink the run but for its depth, pattern and routing."""
    values = {
        "run_dir": out,
        "device": "cpu",
        "data.cached_path": cache,
        "data.vae_path": vae,
        "data.image_size": 16,
        "data.num_workers": 0,
        "model.input_size": 8,
        "model.in_channels": 3,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.depth": 6,
        "model.num_classes": 3,
        "model.feed_forward.intermediate_size": 40,
        "model.feed_forward.shared_intermediate_size": 40,
        "model.feed_forward.bias_update_rate": 0.01,
        "train.max_steps": 3,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 2,
        "train.log_every": 1,
        "train.sample_every": 0,
        "parallel.strategy": "fsdp",
    }
    return ["--config", CONFIG, *(f"--{key}={value}" for key, value in values.items())]


def narrow_text(out: Path, cache: str, vae: str, texts: str) -> list[str]:
    """The same of the text-to-image model."""
    values = dict(flag[2:].split("=", 1) for flag in narrow(out, cache, vae)[2:])
    for key in ("intermediate_size", "shared_intermediate_size", "bias_update_rate"):
        values.pop(f"model.feed_forward.{key}")
    values |= {
        "data.text_cached_path": texts,
        "model.num_classes": 0,
        "model.text_hidden_size": 16,
        "model.text_max_length": 12,
        "model.feed_forward.num_experts": 4,
        "optim.lr": 1e-2,
        "optim.warmup_steps": 0,
        "train.precision": "fp32",
        "sampling.num_steps": 2,
    }
    return ["--config", TEXT_CONFIG, *(f"--{key}={value}" for key, value in values.items())]


def main(out: Path, cache: str, vae: str, texts: str) -> None:
    with processes("cpu", cpu_threads=1) as group:
        config = parse_config(["--config", CONFIG], "train.py")
        with torch.device("meta"):
            model = build_model(config.model)
        shard(model, config, group)
        parts = local(model.parameters())
        facts = {
            "elements": sum(part.numel() for part in parts),
            "meta": all(part.is_meta for part in parts),
            "largest": max(part.numel() for part in parts),
        }
        (out / f"rank{group.rank}.json").write_text(json.dumps(facts))
        for argv in (narrow(out / "run", cache, vae), narrow_text(out / "text", cache, vae, texts)):
            train(parse_config(argv, "train.py", group.world_size), group)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
