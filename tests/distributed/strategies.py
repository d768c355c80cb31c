"""torchrun --nproc_per_node=2 tests/distributed/strategies.py OUT CACHE VAL_CACHE VAE

Train the same tiny model under each strategy, one run after the other.
"""

import sys
from pathlib import Path

from config.load import parse_config
from core.distributed import processes
from training.trainer import train

STEPS = 6


def flags(out: Path, cache: str, val_cache: str, vae: str, **changes: object) -> list[str]:
    values = {
        "run_dir": out,
        "device": "cpu",
        "data.cached_path": cache,
        "data.val_cached_path": val_cache,
        "data.vae_path": vae,
        "data.image_size": 16,
        "data.num_workers": 0,
        "model.input_size": 8,
        "model.in_channels": 3,
        "model.patch_size": 2,
        "model.hidden_size": 16,
        "model.num_heads": 2,
        "model.depth": 2,
        "model.num_classes": 3,
        "model.feed_forward.num_experts": 3,  # does not fall into two parts
        "optim.lr": 1e-2,
        "optim.grad_clip": 1.0,
        "optim.extra_ema_decays": "[0.5]",
        "train.max_steps": STEPS,
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "train.log_every": 1,
        "train.ckpt_every": 2,
        "train.sample_every": 0,
        "train.val_every": 100 * STEPS,
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in values.items()]


JITMOE = {
    "model__feed_forward__name": "deepseek",
    "model__feed_forward__top_k": 2,
    "model__feed_forward__bias_update_rate": 0.01,
    "model__feed_forward__shared_mlp": "swiglu",
    "model__feed_forward__shared_intermediate_size": 8,
    "model__rope": "2d",
    "model__norm": "rmsnorm",
    "model__qk_norm": True,
    "model__num_kv_heads": 1,
    "model__bottleneck_size": 6,
    "model__context_tokens": 3,
    "model__context_start": 1,
    "model__depth": 4,
    "model__dropout": 0.2,
}
"""Balanced experts, and what JiT adds to the backbone."""

RACE = {
    "model__feed_forward__name": "race",
    "model__feed_forward__hidden_split": 2,
    "model__moe_every": 1,
}

NUCLEUS = {
    "model__feed_forward__name": "expert_choice",
    "model__feed_forward__renormalise": "token",
    "model__feed_forward__route_scale": 2.5,
    "model__feed_forward__rounding": "up",
    "model__feed_forward__router_input": "decoupled",
    "model__moe_every": 1,
}


PROMOE = {
    "model__feed_forward__name": "promoe",
    "model__feed_forward__top_k": 2,
    "model__feed_forward__balance_loss_weight": 0.1,
    "model__feed_forward__router_input": "decoupled",
    "model__qk_norm": "layernorm",
    "model__time_scale": 1000,
    "model__time_reversed": True,
    "model__label_dropout": 0.4,
}
"""Prototypes, samples without a class, and what ProMoE adds to the backbone."""


SPREAD = {
    "deepseek": {
        "model__feed_forward__name": "deepseek",
        "model__feed_forward__num_experts": 4,
        "model__feed_forward__top_k": 2,
        "model__feed_forward__bias_update_rate": 0.01,
        "model__feed_forward__shared_mlp": "swiglu",
        "model__feed_forward__shared_intermediate_size": 8,
        "model__moe_every": 1,
    },
    "token_choice": {
        "model__feed_forward__name": "token_choice",
        "model__feed_forward__num_experts": 4,
    },
    "diffmoe": {"model__feed_forward__num_experts": 4},
}
"""Layers whose experts are spread over the processes."""


def main(out: Path, *data: str) -> None:
    fsdp = {"parallel__strategy": "fsdp"}
    again = {"train__activation_checkpointing": True}
    with processes("cpu", cpu_threads=1) as group:

        def run(name: str, **changes: object) -> None:
            argv = flags(out / name, *data, resume="auto", **changes)
            train(parse_config(argv, "train.py", group.world_size), group)

        run("ddp")
        grids = {"train__sample_every": 6, "train__num_grid_samples": 3, "sampling__num_steps": 2}
        run("fsdp", **fsdp, train__val_every=6, **grids)
        run("ddp_logging", train__val_every=3)
        run("hybrid", **fsdp, parallel__shard_size=1)
        zero1 = {"parallel__strategy": "zero1"}
        run("zero1", **zero1, train__val_every=3, **grids)
        run("zero1_recomputing", **zero1, **again)
        run("ddp_recomputing", **again)
        run("fsdp_recomputing", **fsdp, **again)
        for steps, strategy in (
            (2, "ddp"),
            (3, "zero1"),
            (4, "fsdp"),
            (5, "zero1"),
            (STEPS, "ddp"),
        ):
            run("changing", parallel__strategy=strategy, train__max_steps=steps)
        bf16 = {"train__precision": "bf16"}
        run("bf16", **bf16)
        run("fsdp_bf16", **bf16, **fsdp)
        for name, way in (("fsdp", fsdp), ("zero1", zero1)):
            run(f"{name}_bf16_gathered", **bf16, **way, parallel__param_dtype="bf16")
        run("fsdp_prefetched", **fsdp, parallel__prefetch=2, **again)
        whole = {"train__micro_batch_size": 4}  # a step in one forward pass
        run("ddp_whole", **whole)
        run("fsdp_reduced", **fsdp, **whole, parallel__reduce_dtype="bf16")
        run("ddp_reduced", parallel__reduce_dtype="bf16")
        run("jitmoe", **JITMOE)
        run("jitmoe_fsdp", **JITMOE, **fsdp)
        run("jitmoe_fsdp_recomputing", **JITMOE, **fsdp, **again)
        run("promoe_recomputing", **PROMOE, **again)
        run("promoe_fsdp", **PROMOE, **fsdp)
        run("promoe_fsdp_recomputing", **PROMOE, **fsdp, **again)
        spread = {"parallel__expert_parallel": True}
        for name, layer in SPREAD.items():
            run(f"{name}_spread", **layer, **fsdp, **spread, train__val_every=3, **grids)
        run("deepseek_spread_zero1", **SPREAD["deepseek"], **zero1, **spread, **again)
        way = {"parallel__strategy": "ddp"}
        for steps, more in ((2, way), (4, fsdp | spread), (STEPS, zero1)):
            run("deepseek_changing", **SPREAD["deepseek"], **more, train__max_steps=steps)
        for name, layer in (("race", RACE), ("nucleus", NUCLEUS)):
            run(name, **layer)
            run(f"{name}_fsdp_recomputing", **layer, **fsdp, **again)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
