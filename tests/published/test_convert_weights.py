"""Official checkpoint files in and out, and what is refused in them."""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from config.layers import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
)
from config.load import load_config, to_plain
from config.model import ModelConfig
from core.errors import UserError
from models.build import build_model
from models.pretrained import load_pretrained
from published.convert_weights import export_official, import_official, read_official
from published.export import check_exportable
from published.weights import from_official, load_official, to_official

GOLDEN = Path(__file__).parents[1] / "golden"
sys.path.insert(0, str(GOLDEN))
from adapter import load_case  # noqa: E402


@pytest.fixture(scope="module")
def official():
    """State and constructor keywords of a recorded DiffMoE."""
    tensors, config, _ = load_case(GOLDEN / "diffmoe_train.safetensors")
    state = {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}
    return state, config["ctor"]


@pytest.fixture
def config_path(official, tmp_path):
    state, ctor = official
    model = dataclasses.asdict(from_official("diffmoe", ctor, state).config)
    path = tmp_path / "model.yaml"
    path.write_text(yaml.safe_dump({"model": to_plain(model)}))
    return path


def averaged(state):
    return {k: v if k == "pos_embed" or "ema_decay" in k else v + 1 for k, v in state.items()}


def test_a_training_checkpoint_in_and_out(official, config_path, tmp_path):
    state, _ = official
    file, folder = tmp_path / "official.pt", tmp_path / "ours"
    args = argparse.Namespace(model="x", seed=1)
    torch.save({"model": state, "ema": averaged(state), "opt": {"lr": 1}, "args": args}, file)
    import_official(file, load_config(config_path), folder)
    live, ema = (to_official(load_pretrained(folder, w).model) for w in ("model", "ema"))
    for name, tensor in state.items():
        assert torch.equal(live[name], tensor), name
        assert torch.equal(ema[name], averaged(state)[name]), name
    export_official(folder, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(back["ema"][name], ema[name]) for name in state)
    assert json.loads((folder / "state.json").read_text()) == {"step": 0, "latents": None}


def test_a_flat_file_gives_both_weights(official, config_path, tmp_path):
    state, _ = official
    torch.save(state, tmp_path / "flat.pt")
    import_official(tmp_path / "flat.pt", load_config(config_path), tmp_path / "ours")
    for weights in ("model", "ema"):
        model = load_pretrained(tmp_path / "ours", weights).model
        assert torch.equal(
            to_official(model)["x_embedder.proj.bias"], state["x_embedder.proj.bias"]
        )


def test_averaged_constants_are_taken_for_what_they_are(official):
    """An average of a constant drifts in float32, and the model has the constant all the same."""
    state, ctor = official
    drifted = dict(state)
    for name in [n for n in state if n == "pos_embed" or n.endswith("ema_decay")]:
        average = state[name].clone()
        for _ in range(3000):
            average.mul_(0.9999).add_(state[name], alpha=1 - 0.9999)
        drifted[name] = average
    assert (drifted["pos_embed"] - state["pos_embed"]).abs().max() > 1e-5
    back = to_official(from_official("diffmoe", ctor, drifted))
    assert all(torch.equal(back[name], tensor) for name, tensor in state.items())


class Evil:
    def __reduce__(self):
        return os.getcwd, ()


def test_other_globals_are_named_and_refused(official, tmp_path):
    torch.save({"model": official[0], "args": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match=r"evil\.pt: it holds the global \S*getcwd, which is refus"):
        read_official(tmp_path / "evil.pt")


@pytest.mark.parametrize("content", [b"", b"nonsense" * 100])
def test_damaged_files_are_named(tmp_path, content):
    (tmp_path / "bad.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"bad\.pt: (not readable|not a weights file)"):
        read_official(tmp_path / "bad.pt")


def test_a_file_without_weights_is_refused(tmp_path):
    torch.save({"args": 3}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        read_official(tmp_path / "a.pt")


def test_missing_and_left_over_names_are_said(official):
    state, ctor = official
    short = {k: v for k, v in state.items() if k != "final_layer.linear.bias"} | {
        "x": state["pos_embed"]
    }
    with pytest.raises(
        UserError,
        match=r"1 tensor\(s\) missing \['final_layer\.linear\.bias'\], 1 left over \['x'\]",
    ):
        from_official("diffmoe", ctor, short)


def test_other_positions_and_shapes_are_refused(official):
    state, ctor = official
    with pytest.raises(UserError, match="pos_embed is not the fixed value"):
        from_official("diffmoe", ctor, state | {"pos_embed": state["pos_embed"] + 1})
    table = torch.zeros(9, 32)
    with pytest.raises(UserError, match=r"label_embed\.table\.weight is \(9, 32\)"):
        from_official("diffmoe", ctor, state | {"y_embedder.embedding_table.weight": table})


@pytest.mark.parametrize(
    ("family", "change", "wanted"),
    [
        ("vit", {}, "family: unknown 'vit'; known: diffmoe, diffmoe_dense"),
        ("diffmoe", {"widht": 3}, "official constructor: unknown 'widht'"),
        ("diffmoe", {"MoE_config": {"experts": 3}}, "MoE_config: unknown 'experts'"),
        ("diffmoe", {"class_dropout_prob": 0.0}, "class_dropout_prob: 0 has no null class"),
        ("dit", {}, "a dense family has none"),
    ],
)
def test_other_constructors_are_refused(family, change, wanted, official):
    state, ctor = official
    with pytest.raises(UserError, match=wanted):
        from_official(family, ctor | change, state)


@pytest.fixture(scope="module")
def jit():
    """State and config of a recorded JiTMoE, with the second average of its published runs."""
    from models_cases import ModelCase

    case = ModelCase(*load_case(GOLDEN / "jitmoe.safetensors"))
    return case.state, case.model(training=False).config


@pytest.fixture
def jit_config(jit, tmp_path):
    path = tmp_path / "jit.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "model": to_plain(dataclasses.asdict(jit[1])),
                "data": {
                    "source": "images",
                    "data_path": "x",
                    "vae_path": None,
                    "image_size": 32,
                },
                "optim": {"extra_ema_decays": [0.9996]},
            }
        )
    )
    return path


def test_a_denoisers_checkpoint_with_two_averages_in_and_out(jit, jit_config, tmp_path):
    state, _ = jit
    shift = {"model": 0, "model_ema1": 1, "model_ema2": 2}
    fixed = {"pos_embed"}

    def shifted(by):
        return {f"net.{k}": v if k in fixed else v + by for k, v in state.items()}

    file, folder = tmp_path / "official.pth", tmp_path / "ours"
    torch.save({n: shifted(by) for n, by in shift.items()} | {"epoch": 3}, file)
    import_official(file, load_config(jit_config), folder)
    names = {"model": "model", "ema": "model_ema1", "ema_0.9996": "model_ema2"}
    for ours, theirs in names.items():
        found = to_official(load_pretrained(folder, ours).model)
        wanted = shifted(shift[theirs])
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], wanted[f"net.{name}"]) for name in found)
    export_official(folder, tmp_path / "back.pt")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert back.keys() == shift.keys()
    for name, by in shift.items():
        assert all(torch.equal(back[name][key], value) for key, value in shifted(by).items())


def test_a_safetensors_file_is_read(jit, jit_config, tmp_path):
    save_file(jit[0], tmp_path / "weights.safetensors")
    import_official(tmp_path / "weights.safetensors", load_config(jit_config), tmp_path / "ours")
    found = to_official(load_pretrained(tmp_path / "ours").model)
    assert all(torch.equal(found[name], tensor) for name, tensor in jit[0].items())


def test_weights_of_another_width_are_refused_by_name(jit):
    state, config = jit
    wrong = state | {"blocks.0.attn.qkv.weight": torch.zeros(90, 32)}
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.qkv\.weight does not fit"):
        load_official(build_model(config), config, wrong)


def test_a_second_average_without_a_name_is_left_out_aloud(jit, jit_config, tmp_path, caplog):
    config = yaml.safe_load(jit_config.read_text())
    config["optim"] = {}
    jit_config.write_text(yaml.safe_dump(config))
    parts = ("model", "model_ema1", "model_ema2")
    torch.save(dict.fromkeys(parts, jit[0]), tmp_path / "official.pth")
    with caplog.at_level("WARNING", logger="diffmoe"):
        import_official(tmp_path / "official.pth", load_config(jit_config), tmp_path / "ours")
    assert "its second average is left out; optim.extra_ema_decays names none" in caplog.text


SIZE = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"rope": "2d"}, r"model\.rope: '2d' has no counterpart in the code of DiT and DiffMoE"),
        ({"qk_norm": True}, r"model\.qk_norm: 'rmsnorm' has no counterpart"),
        ({"mlp": "silu"}, r"model\.mlp: 'silu' has no counterpart .*: 'gelu' or 'swiglu'"),
        ({"moe_every": 3, "depth": 3}, r"model\.moe_every: 3 has no counterpart .*: 1 or 2"),
        (
            {"feed_forward": DiffMoEConfig(shared_mlp="gelu", shared_intermediate_size=5)},
            r"shared_intermediate_size: 5 has no counterpart .*: 128",
        ),
        (
            {"feed_forward": ExpertChoiceConfig(shared_mlp="identity")},
            r"shared_mlp: 'identity' has no counterpart .*: 'none' or 'swiglu'",
        ),
        ({"feed_forward": ExpertChoiceConfig(pool="batch")}, r"pool: 'batch' .*there: 'sample'"),
        ({"feed_forward": DiffMoEConfig(expert_mlp="swiglu")}, r"expert_mlp: 'swiglu' has no"),
        (
            {"feed_forward": DeepSeekConfig(), "mlp": "silu"},
            r"shared_mlp: 'none' has no counterpart in the code of DSMoE; there: 'swiglu' or 'id",
        ),
        (
            {
                "feed_forward": DeepSeekConfig(shared_mlp="identity", num_groups=2),
                "mlp": "silu",
            },
            r"zero_masked_groups: False has no counterpart",
        ),
        ({"bottleneck_size": 4}, r"model\.rope: 'none' has no counterpart in the code of JiT"),
        ({"text_hidden_size": 8}, r"model\.text_hidden_size: 8 has no counterpart: no code of a"),
    ],
)
def test_models_that_the_official_code_cannot_compute_are_not_exported(changes, wanted):
    with pytest.raises(UserError, match=wanted):
        check_exportable(ModelConfig(**SIZE | {"feed_forward": DenseConfig()} | changes))


@pytest.mark.parametrize("path", sorted((GOLDEN).glob("*.safetensors")), ids=lambda p: p.stem)
def test_every_recorded_model_may_go_back(path):
    from models_cases import FAMILIES, ModelCase

    tensors, config, metadata = load_case(path)
    if metadata["source"].split(",")[0] in FAMILIES and any("state." in key for key in tensors):
        check_exportable(ModelCase(tensors, config, metadata).model(training=False).config)


def test_no_tensor_is_dropped_on_the_way_out():
    """Expert choice with a predictor, a row of Table 8, has five tensors more than without."""
    layer = ExpertChoiceConfig(num_experts=4, capacity_predictor=True, inference="dynamic")
    shape = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = build_model(ModelConfig(**shape, feed_forward=layer))
    official = to_official(model)
    predictor = [name for name in official if "capacity_predictor" in name or "threshold" in name]
    assert len(predictor) == 5
    fresh = build_model(model.config)
    load_official(fresh, model.config, official)
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name


def test_a_tensor_without_an_official_name_is_refused():
    shape = {"input_size": 4, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = build_model(ModelConfig(**shape, feed_forward=DenseConfig()))
    model.blocks[1].extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"none for 2 tensor\(s\), first blocks\.1\.extra\.bias"):
        to_official(model)


def test_weights_with_twice_the_outputs_say_which_key_they_want(official):
    state, ctor = official
    model = build_model(dataclasses.replace(from_official("diffmoe", ctor, state).config))
    other = dataclasses.replace(model.config, learn_sigma=not model.config.learn_sigma)
    with pytest.raises(
        UserError, match=r"final\.linear\.weight .*they fit with model\.learn_sigma true"
    ):
        load_official(build_model(other), other, state)


def test_the_command_takes_keys_of_the_config(official, config_path, tmp_path):
    state, _ = official
    torch.save(state, tmp_path / "official.pt")
    values = yaml.safe_load(config_path.read_text())
    values["model"]["learn_sigma"] = False
    config_path.write_text(yaml.safe_dump(values))
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "published.convert_weights",
                "--official",
                tmp_path / "official.pt",
            ),
            *("--config", config_path, "--out", tmp_path / "ours", "--model.learn_sigma", "true"),
        ],
        cwd=GOLDEN.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert load_pretrained(tmp_path / "ours").config.model.learn_sigma is True
