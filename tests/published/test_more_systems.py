"""ProMoE and DiT-MoE: our configs against the published ones, counts, first weights, refusals."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from config.layers import DiffMoEConfig, ExpertChoiceConfig, TokenChoiceConfig
from config.load import load_config
from config.model import ModelConfig
from config.protocol import load_protocol
from config.sizes import SIZES
from core.errors import UserError
from models.build import build_model
from models.pretrained import load_pretrained
from models.summary import summarize
from published.configs import official_config
from published.convert_weights import export_official, import_official
from published.export import check_exportable
from published.weights import to_official

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests/golden"
COUNTS = json.loads((GOLDEN / "counts_more_systems.json").read_text())
PUBLISHED = json.loads((GOLDEN / "published_more_systems.json").read_text())
PROMOE, DITMOE = PUBLISHED["promoe"], PUBLISHED["dit_moe"]


def ours(name):
    return load_config(ROOT / f"config/{name}.yaml")


# ProMoE

RUNS = {
    "promoe/S_flow": "004_ProMoE_S",
    "promoe/B_flow": "004_ProMoE_B",
    "promoe/L_flow": "004_ProMoE_L",
    "promoe/XL_flow": "004_ProMoE_XL",
    "promoe/L_EC_flow": "004_ProMoE_L_EC",
}


@pytest.mark.parametrize("name", RUNS)
def test_our_promoe_configs_are_the_published_ones(name):
    file = PROMOE["files"][f"{RUNS[name]}.yaml"]
    section = PROMOE["model_names"][file["model_name"]]
    family = "promoe_ec" if "EC" in file["model_name"] else "promoe_tc"
    found, training = ours(name), PROMOE["training"]
    assert official_config(family, PROMOE["base_configs"][section] | file[section]) == found.model
    flow, optim = found.objective, found.optim
    assert (flow.time_distribution, flow.time_mean, flow.time_std) == ("logit_normal", 0.0, 1.0)
    assert (flow.time_shift, flow.prediction) == (1.0, "velocity")
    assert (optim.lr, optim.weight_decay) == (file["lr"], file["weight_decay"])
    assert (list(optim.betas), optim.grad_clip) == (training["betas"], training["max_grad_norm"])
    assert optim.ema_decay == training["ema_decay"]
    assert found.train.global_batch_size == file["total_train_batch_size"]
    assert found.train.max_steps == training["evaluated_at_step"]
    assert (found.train.precision, found.data.horizontal_flip) == ("bf16", True)


@pytest.mark.parametrize("size", ["S", "B", "L", "XL"])
def test_promoe_under_ddpm_is_the_same_model_by_expert_choice(size):
    flow, ddpm = ours(f"promoe/{size}_flow"), ours(f"promoe/{size}_ddpm")
    assert (ddpm.objective.name, ddpm.model.feed_forward.choice) == ("ddpm", "expert")
    assert (ddpm.model.time_scale, ddpm.model.time_reversed) == (1.0, False)
    assert summarize(flow.model) == summarize(ddpm.model)
    assert (ddpm.optim, ddpm.train) == (flow.optim, flow.train)


@pytest.mark.parametrize("scale", PROMOE["sampling"]["cfg"])
def test_promoe_is_sampled_as_published(scale):
    found, said = load_protocol(f"promoe_euler250_cfg{scale}"), PROMOE["sampling"]
    assert (found.sampling.sampler, found.sampling.num_steps) == ("euler", said["steps"])
    assert (found.sampling.cfg_scale, found.sampling.time_shift) == (scale, said["shift"])
    assert (found.sampling.cfg_channels, found.sampling.cfg_pooling) == ("all", "separate")
    assert (found.num_fid_samples, found.per_proc_batch_size) == (said["images"], said["batch"])
    assert (found.vae, found.labels, found.pixels, found.precision) == (
        *("mse", "random", "dit"),
        "fp32",
    )


# DiT-MoE

RELEASED = {
    "ditmoe/S_E8": ("DiT-S/2", 8, False),
    "ditmoe/S_E16": ("DiT-S/2", 16, False),
    "ditmoe/B_E8": ("DiT-B/2", 8, False),
    "ditmoe/XL_E8": ("DiT-XL/2", 8, True),
    "ditmoe/G_E16": ("DiT-G/2", 16, True),
}


@pytest.mark.parametrize("name", RELEASED)
def test_our_ditmoe_configs_are_the_released_models(name):
    size, experts, flow = RELEASED[name]
    released = DITMOE["released"][f"{size.replace('DiT', 'DiT-MoE')}-{experts}E2A"]
    assert released == ("RF" if flow else "DDIM")
    family = "ditmoe" if flow else "ditmoe_ddpm"
    ctor = DITMOE["models"][size] | {"num_experts": experts, "use_flash_attn": flow}
    found = ours(name)
    assert official_config(family, ctor) == found.model
    training = DITMOE["train_py"]
    assert (found.optim.lr, found.optim.weight_decay) == (training["lr"], training["weight_decay"])
    assert (list(found.optim.betas), found.optim.grad_clip) == (training["betas"], None)
    assert found.objective.name == ("flow" if flow else "ddpm")
    batch = training["global_batch_in_readme"].get(size.removeprefix("DiT-"), 256)
    assert found.train.global_batch_size == batch
    if flow:
        assert found.objective.time_distribution == "logit_normal"
        assert (found.objective.time_mean, found.objective.time_std) == (0.0, 1.0)


# Parameters

OF_CONFIGS = {
    **{f"promoe/{size}_flow": f"ProMoE-TC-{size} 256px" for size in ("S", "B", "L", "XL")},
    "promoe/L_EC_flow": "ProMoE-EC-L 256px",
    "ditmoe/S_E8": "DiT-MoE-S/2-8E2A 256px",
    "ditmoe/S_E16": "DiT-MoE-S/2-16E2A 256px",
    "ditmoe/B_E8": "DiT-MoE-B/2-8E2A 256px",
    "ditmoe/XL_E8": "DiT-MoE-XL/2-8E2A 256px",
    "ditmoe/G_E16": "DiT-MoE-G/2-16E2A 256px",
}
E8 = {"TCDiT": TokenChoiceConfig, "ECDiT": ExpertChoiceConfig, "DiffMoE": DiffMoEConfig}


def config_of(entry):
    """Models that have no config of their own."""
    if entry.startswith("ProMoE repo"):
        family, size = entry.split()[2].split("-")[:2]
        model = ours(f"dit/{size}_flow").model
        model.learn_sigma = True
        if family in E8:
            model.feed_forward = E8[family](num_experts=8)
        return model
    if "qk_norm" in entry:
        model = ours("promoe/L_flow").model
        model.qk_norm = "layernorm"
        return model
    size, experts = re.match(r"DiT-MoE-(\w+)/2-(\d+)E2A", entry).groups()
    return official_config("ditmoe", SIZES[size] | {"num_experts": int(experts)})


@pytest.mark.parametrize("entry", [key for key in COUNTS if not key.startswith("_")])
def test_counts_of_the_published_classes(entry):
    named = {theirs: name for name, theirs in OF_CONFIGS.items()}
    model = ours(named[entry]).model if entry in named else config_of(entry)
    wanted, found = COUNTS[entry], summarize(model)
    assert (found.total, found.trainable) == (wanted["total"], wanted["trainable"])
    assert {k: v for k, v in found.by_name.items() if v} == {
        k: v for k, v in wanted["groups"].items() if v
    }
    assert found.routed_experts == wanted["experts_all"]
    assert found.roles.get("shared experts", 0) == wanted["shared_experts"]
    for key in ("active", "active_unconditional"):
        if key in wanted:
            assert found.activated(found.capacity) == wanted[key]


# First weights

SMALL = {"input_size": 8, "hidden_size": 96, "depth": 2, "num_heads": 4}
LAYER = {
    **{"num_routed_experts": 24, "moe_intermediate_size": 144, "use_shared_expert": True},
    **{"shared_expert_intermediate_size": 144, "load_balance_loss_coef": 0, "interleave": True},
    **{"top_k": 1, "router_weight_mode": "identity", "routing_contrastive_lam": 1},
    **{"use_top_k_for_routing_contrastive": True, "routing_contrastive_temperature": 0.07},
}
FRESH = {
    "promoe_tc": SMALL | {"qk_norm": True, "MoE_config": LAYER},
    "promoe_ec": SMALL | {"MoE_config": LAYER},
    "ditmoe": SMALL | {"num_experts": 24, "use_flash_attn": True},
    "ditmoe_ddpm": SMALL | {"num_experts": 24},
}


def wanted_start(name, shape):
    """Spread of a normal, bound of a uniform, or a constant, by official name."""
    if name.endswith("cluster_centers") or "y_embedder" in name or "t_embedder" in name:
        return ("constant", 0.0) if name.endswith("bias") else ("normal", 0.02)
    if "_norm.weight" in name:
        return "constant", 1.0
    if name.endswith("bias") or "adaLN" in name or "final_layer" in name:
        return "constant", 0.0
    if name.endswith("gate.weight"):
        return "uniform", shape[1] ** -0.5
    return "uniform", math.sqrt(6 / (shape[0] + math.prod(shape[1:])))


@pytest.mark.parametrize("family", FRESH)
def test_every_kind_of_parameter_starts_as_published(family):
    torch.manual_seed(0)
    model = build_model(official_config(family, FRESH[family]))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    kinds = set()
    for name, tensor in to_official(model, parameters).items():
        kind, size = wanted_start(name, tensor.shape)
        kinds.add(kind)
        values = tensor.double().flatten()
        n = len(values)
        if kind == "constant":
            assert (values == size).all(), name
            continue
        spread = size if kind == "normal" else size / 3**0.5
        assert abs(values.mean()) <= 5 * spread / n**0.5, name
        assert abs(values.std() / spread - 1) <= 5 / (2 * n) ** 0.5, name
        if kind == "uniform":
            assert size * (1 - 12 / n) <= values.abs().max() <= size * (1 + 1e-6), name
        else:
            assert values.abs().max() > 2.5 * spread, name
    assert kinds == {"constant", "normal", "uniform"}


# Checkpoints


def promoe(**changes):
    return SMALL | {"MoE_config": LAYER | changes}


@pytest.mark.parametrize(
    ("family", "ctor", "wanted"),
    [
        ("promoe_tc", promoe() | {"num_classes": 7}, r"num_classes: 7: .* label 1000 for no class"),
        ("promoe_tc", promoe(router_weight_mode="tanh"), "router_weight_mode: unknown 'tanh'"),
        ("promoe_ec", promoe(top_k=25), r"top_k: 25 is not in 1 \.\.\. num_experts \(24\)"),
        ("promoe_tc", promoe(widht=3), "unknown 'widht'"),
        ("ditmoe", SMALL | {"mlp_ratio": 2.5}, r"mlp_ratio: 2\.5 fails in the published code"),
        ("ditmoe", SMALL | {"pretraining_tp": 5}, r"pretraining_tp: 5 does not divide .* 384 and"),
        ("ditmoe", SMALL | {"qk_norm": True}, "unknown 'qk_norm'"),
    ],
)
def test_what_the_published_code_cannot_mean_is_refused(family, ctor, wanted):
    with pytest.raises(UserError, match=wanted):
        official_config(family, ctor)


def test_without_the_expert_for_no_class_there_may_be_any_number_of_classes():
    ctor = promoe(use_uncond_expert=False) | {"num_classes": 7}
    assert official_config("promoe_tc", ctor).feed_forward.all_experts() == 24


@pytest.mark.parametrize("name", [*RUNS, *RELEASED])
def test_our_configs_may_go_to_the_published_code(name):
    config = ours(name)
    check_exportable(config.model, config.objective.name)


@pytest.mark.parametrize(
    ("name", "key", "value", "wanted"),
    [
        ("promoe/S_flow", "time_reversed", False, r"time_reversed: False .* of ProMoE; there: Tr"),
        ("promoe/S_flow", "num_classes", 10, r"num_classes: 10 has no counterpart .*: 1000"),
        ("promoe/S_flow", "qk_norm", "rmsnorm", r"'rmsnorm' .*: 'none' or 'layernorm'"),
        ("ditmoe/S_E8", "time_reversed", True, r"time_reversed: True .* of DiT-MoE; there: False"),
        ("ditmoe/XL_E8", "qk_norm_eps", 1e-5, r"qk_norm_eps: 1e-05 .*; there: 1e-06"),
        ("ditmoe/S_E8", "mlp_ratio", 1.5, r"mlp_ratio: 1\.5 has no counterpart"),
        ("dit/S_flow", "time_scale", 2.0, r"time_scale: 2\.0 has no counterpart"),
    ],
)
def test_models_of_other_keys_may_not(name, key, value, wanted):
    config = ours(name)
    setattr(config.model, key, value)
    with pytest.raises(UserError, match=wanted):
        check_exportable(config.model, config.objective.name)


@pytest.mark.parametrize("family", ["promoe_ec", "ditmoe"])
def test_a_checkpoint_file_in_and_out(family, tmp_path):
    """The sign of a flow is turned on the way in and back on the way out."""
    torch.manual_seed(0)
    model = build_model(official_config(family, FRESH[family]))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    state = to_official(model)
    assert torch.equal(state["final_layer.linear.bias"], -model.final.linear.bias)
    torch.save({"model": state, "ema": state}, tmp_path / "official.pt")
    config = ours("promoe/S_flow")
    config.model = model.config
    import_official(tmp_path / "official.pt", config, tmp_path / "ours")
    assert load_pretrained(tmp_path / "ours").config.model == model.config
    export_official(tmp_path / "ours", tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)["ema"]
    assert back.keys() == state.keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize(
    ("name", "key", "value", "wanted"),
    [
        ("promoe/S_flow", "num_classes", 7, r"num_classes: 7 has no counterpart .*; there: 1000"),
        ("promoe/S_flow", "time_reversed", False, "time_reversed: False has no counterpart"),
        ("promoe/S_ddpm", "qk_norm", "none", "time_scale: 1.0 has no counterpart"),
        ("ditmoe/XL_E8", "time_reversed", False, "time_reversed: False has no counterpart"),
        ("ditmoe/S_E8", "time_reversed", True, "time_reversed: True has no counterpart"),
    ],
)
def test_weights_do_not_come_in_under_keys_that_turn_their_meaning(
    name, key, value, wanted, tmp_path
):
    """Shapes fit whatever the times are, and a table of labels fits its own number of classes."""
    config = ours(name)
    setattr(config.model, key, value)
    with pytest.raises(UserError, match=wanted):
        import_official(tmp_path / "official.pt", config, tmp_path / "ours")


def test_the_dense_layers_of_promoe_have_either_name():
    config = official_config("promoe_tc", FRESH["promoe_tc"] | {"use_swiglu": True})
    assert config == official_config("promoe_tc", FRESH["promoe_tc"])
    assert isinstance(config, ModelConfig)
