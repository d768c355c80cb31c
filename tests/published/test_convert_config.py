"""Official YAML files become ours; what is left out is said."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from config.load import load_config, parse_config
from core.errors import UserError
from published.configs import official_config
from published.convert_config import convert

PUBLISHED = {
    "basic": {
        "exp_name": "000_DiffMoE_S_E16_Flow",
        "results_dir": "exps/",
        "data_path": "imagenet/train",
        "global_seed": 1234,
        "epochs": 1000,
        "log_every": 100,
        "ckpt_every": 50000,
        "rf": True,
        "rf_ori": False,
        "accum_iter": 1,
        "clip_grad_norm": None,
        "image_size": 128,
        "global_batch_size": 512,
        "num_workers": 16,
        "timestep_start": 0,
        "timestep_end": 1000,
        "vae_path": "stabilityai/sd-vae-ft-mse",
        "dataset_config": {
            "target": "dataset.dataset_cache.CachedFolder",
            "params": {"root": "cache/"},
        },
    },
    "model": {
        "ckpt": None,
        "target": "models.models_DiffMoE.DiT",
        "params": {
            "input_size": 16,
            "num_classes": 1000,
            "patch_size": 2,
            "depth": 12,
            "hidden_size": 384,
            "num_heads": 16,
            "mlp_ratio": 4,
            "use_swiglu": False,
            "MoE_config": {
                "n_shared_experts": 0,
                "num_experts": 16,
                "capacity": 1,
                "init_MoeMLP": False,
                "interleave": True,
            },
            "CapacityPred_loss_weight": 1,
        },
    },
    "optim": {"base_learning_rate": 0.0001, "weight_decay": 0, "betas": [0.9, 0.999]},
    "lr_sheduler": {"warmup": None, "train_epoch": None},
}


def changed(**sections):
    old = json.loads(json.dumps(PUBLISHED))
    for section, keys in sections.items():
        old[section] |= keys
    return old


def test_the_published_file_becomes_a_valid_config(tmp_path):
    new, reports = convert(PUBLISHED)
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump(new))
    config = parse_config(["--config", str(path)], "train.py")
    model = config.model
    assert (model.input_size, model.num_heads, model.hidden_size) == (16, 16, 384)
    assert (model.feed_forward.name, model.feed_forward.num_experts) == ("diffmoe", 16)
    assert model.feed_forward.capacity_loss_weight == 1
    assert (config.objective.name, config.seed) == ("flow", 1234)
    assert (config.train.global_batch_size, config.data.image_size) == (512, 128)
    assert config.run_dir == "runs/000_DiffMoE_S_E16_Flow"
    assert [line.split(":")[0] for line in reports] == [
        "basic.data_path",
        "basic.epochs",
        "basic.dataset_config.params.root",
    ]


def test_ddpm_and_dense():
    old = changed(basic={"rf": False}, model={"target": "models.models_DiT.DiT"})
    del old["model"]["params"]["MoE_config"]
    new, _ = convert(old)
    assert new["objective"] == {"name": "ddpm"}
    assert new["model"]["feed_forward"] == {"name": "dense"}


@pytest.mark.parametrize(
    ("sections", "wanted"),
    [
        ({"basic": {"clip_grad_norm": 1.0}}, "basic.clip_grad_norm: 1.0 has no counterpart"),
        ({"basic": {"accum_iter": 2}}, "basic.accum_iter: 2 accumulation follows from"),
        ({"basic": {"rf_ori": True}}, "basic.rf_ori: True has no counterpart"),
        ({"lr_sheduler": {"warmup": 5}}, "lr_sheduler.warmup: 5 has no counterpart"),
        ({"basic": {"my_key": 3}}, "basic.my_key: 3 has no counterpart"),
        ({"model": {"ckpt": "a.pt"}}, "model.ckpt: 'a.pt' has no counterpart"),
    ],
)
def test_what_is_left_out_is_reported(sections, wanted):
    assert any(line.startswith(wanted) for line in convert(changed(**sections))[1])


@pytest.mark.parametrize(
    ("old", "wanted"),
    [
        ({"seed": 1}, "not an official config"),
        (changed(model={"target": "os.system"}), "model.target: unknown 'os.system'; known"),
        (changed(model={"params": {"widht": 3}}), "official constructor: unknown 'widht'"),
    ],
)
def test_other_files_are_refused(old, wanted):
    with pytest.raises(UserError, match=wanted):
        convert(old)


ROOT = Path(__file__).parents[2]
DSMOE = json.loads((ROOT / "tests/golden/published_dsmoe.json").read_text())
JIT = json.loads((ROOT / "tests/golden/published_jit.json").read_text())
SHIPPED = {
    "S_E16_Flow_half_misx2_s1a2_rope2d_l10": "dsmoe/S_E16_flow",
    "S_E48_Flow_half_misx0.3_s1a5_rope2d_l12": "dsmoe/S_E48_flow",
    "B_E16_Flow_half_misx2_s1a2_rope2d_l10": "dsmoe/B_E16_flow",
    "B_E48_Flow_half_misx0.3_s1a5_rope2d_l12": "dsmoe/B_E48_flow",
    "L_E16_Flow_half_misx2_s1a2_rope2d_l20": "dsmoe/L_E16_flow",
    "L_E48_Flow_half_misx0.4_s1a5_rope2d_l24": "dsmoe/L_E48_flow",
    "3B_E16_Flow_half_misx2.5_s1a2_rope2d_l30": "dsmoe/3B_E16_flow",
}
"""Published files of DSMoE, and ours of the same run."""


def as_imported(model):
    """With the arithmetic of published checkpoints."""
    layer = dataclasses.replace(model.feed_forward, zero_masked_groups=True)
    return dataclasses.replace(model, feed_forward=layer)


@pytest.mark.parametrize("name", SHIPPED)
def test_our_dsmoe_configs_are_the_published_ones(name, tmp_path):
    new, reports = convert(DSMOE[f"DSMoE/000_DSMoE_{name}.yaml"])
    path = tmp_path / "new.yaml"
    path.write_text(yaml.safe_dump(new))
    found, ours = load_config(path), load_config(ROOT / f"config/{SHIPPED[name]}.yaml")
    assert found.model == as_imported(ours.model)
    assert (found.objective, found.optim) == (ours.objective, ours.optim)
    assert (found.seed, found.train.global_batch_size) == (1234, ours.train.global_batch_size)
    assert [line.split(":")[0] for line in reports] == ["basic.data_path", "basic.epochs"]


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("B_E16_Flow", "MoE_config.use_shared_expert: missing; the official code fails without"),
        ("L_E16_Flow", "MoE_config.use_shared_expert: missing; the official code fails without"),
        ("B_E16_Flow_half_misx2_s1a2_rope2d_l10_kda", "use_kda: True has no counterpart; allowed"),
    ],
)
def test_published_files_that_say_too_little_or_too_much_are_refused(name, wanted):
    with pytest.raises(UserError, match=wanted):
        convert(DSMOE[f"DSMoE/000_DSMoE_{name}.yaml"])


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"use_sinks": True}, "use_sinks: True has no counterpart"),
        ({"sliding_window": 3}, "sliding_window: 3 has no counterpart"),
        ({"rope": "2d"}, "official constructor: unknown 'rope'"),
        ({"rope_type": "2D"}, "rope_type: unknown '2D'; known: 1d, 2d, none"),
        ({"rope_type": None}, "rope_type: unknown None; known: 1d, 2d, none"),
        ({"norm_type": "RMSNorm"}, "norm_type: unknown 'RMSNorm'; known: layernorm, rmsnorm"),
        (
            {"enable_gqa": True, "num_heads": 5, "hidden_size": 400},
            "num_kv_heads: 2 does not divide",
        ),
    ],
)
def test_attention_that_we_do_not_have_is_refused(change, wanted):
    name = "DSMoE/000_DSMoE_S_E16_Flow_half_misx2_s1a2_rope2d_l10.yaml"
    params = DSMOE[name]["model"]["params"]
    with pytest.raises(UserError, match=wanted):
        official_config("dsmoe", params | change)


def test_dropout_of_jit_is_that_of_its_blocks():
    arch = JIT["architectures"]["JiT-B/16-E16"]

    def dropout(rest, experts, interleave=True):
        moe = arch["moe_config"] | {"proj_drop": experts, "interleave": interleave}
        return official_config("jit", arch | {"moe_config": moe, "proj_drop": rest}).dropout

    assert dropout(0.0, 0.2) == dropout(0.2, 0.2) == 0.2
    assert dropout(0.2, 0.0, interleave=False) == 0.2
    assert dropout(0.0, 0.3, interleave=False) == 0.0
    with pytest.raises(UserError, match=r"proj_drop: 0.2 and moe_config.proj_drop 0.1"):
        dropout(0.2, 0.1)


@pytest.mark.parametrize("family", ["diffmoe_tc", "diffmoe_ec", "diffmoe"])
@pytest.mark.parametrize("missing", ["num_experts", "capacity", "MoE_config"])
def test_missing_keys_of_an_official_constructor_are_named(family, missing):
    moe = {"num_experts": 4, "capacity": 1, "n_shared_experts": 0, "interleave": True}
    ctor = {"MoE_config": {key: value for key, value in moe.items() if key != missing}}
    if missing == "MoE_config":
        ctor, missing = {}, "num_experts"
    with pytest.raises(UserError, match=rf"MoE_config\.{missing}: missing"):
        official_config(family, ctor)


def test_a_capacity_schedule_without_its_steps_is_named():
    schedule = {"capacity_schedule_stage_I_iters": 5}
    moe = {"num_experts": 4, "capacity": 1, "interleave": True, "capacity_schedule": schedule}
    with pytest.raises(UserError, match=r"capacity_schedule\.capacity_schedule_stage_II_iters: m"):
        official_config("diffmoe", {"MoE_config": moe})


def test_skipped_blocks_of_dsmoe():
    name = "DSMoE/000_DSMoE_S_E16_Flow_half_misx2_s1a2_rope2d_l10.yaml"
    params = DSMOE[name]["model"]["params"]
    for given, wanted in ((False, 0), (True, 2), (3, 3)):
        moe = params["MoE_config"] | {"skip_first2": given}
        assert official_config("dsmoe", params | {"MoE_config": moe}).leading_dense == wanted


@pytest.mark.parametrize(
    ("name", "ours"),
    [
        ("JiT-B/16", "jit/B16"),
        ("JiT-L/16", "jit/L16"),
        ("JiT-H/16", "jit/H16"),
        ("JiT-B/16-E16", "jit/B16_E16"),
        ("JiT-L/16-E16", "jit/L16_E16"),
        ("JiT-H/16-E16", "jit/H16_E16"),
    ],
)
def test_our_jit_configs_are_the_published_ones(name, ours):
    ctor = JIT["architectures"][name] | {"input_size": 256, "num_classes": 1000}
    wanted = load_config(ROOT / f"config/{ours}.yaml")
    if "moe_config" in ctor:
        wanted.model = as_imported(wanted.model)
    else:  # the dropout of JiT-H is an argument of the training script, not of the architecture
        ctor["proj_drop"] = wanted.model.dropout
    found = dataclasses.replace(official_config("jit", ctor), moe_every=wanted.model.moe_every)
    assert found == wanted.model
    if "moe_config" in ctor:
        assert official_config("jit", ctor).moe_every == 2
    flow, training = wanted.objective, JIT["training"]
    assert (flow.time_mean, flow.time_std) == (training["P_mean"], training["P_std"])
    assert (flow.noise_scale, flow.t_eps) == (training["noise_scale"], training["t_eps"])
    optim = wanted.optim
    assert (optim.base_lr, list(optim.betas)) == (training["base_lr"], training["betas"])
    assert [optim.ema_decay, *optim.extra_ema_decays] == training["ema_decays"]
    assert wanted.train.global_batch_size == training["global_batch_size"]
    assert optim.lr == training["base_lr"] * 4
    sampling = JIT["sampling"]
    assert (wanted.sampling.num_steps, wanted.sampling.cfg_scale) == (
        sampling["steps"],
        sampling["cfg_scale"],
    )
    assert list(wanted.sampling.cfg_interval) == sampling["interval"]


def test_experts_of_jit_without_interleaving_are_none():
    arch = JIT["architectures"]["JiT-B/16-E16"]
    moe = arch["moe_config"] | {"interleave": False}
    assert official_config("jit", arch | {"moe_config": moe}).feed_forward.name == "dense"
