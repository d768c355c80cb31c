"""Files, bases, flags and names make one config; everything else is refused in one line."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from config.files import known_configs
from config.layers import DenseConfig, DiffMoEConfig, TokenChoiceConfig
from config.load import dump_config, load_config, parse_config
from core.errors import ConfigError

ROOT = Path(__file__).parents[2]


def parse(*argv, world_size=1):
    return parse_config([str(a) for a in argv], "train.py", world_size)


def write(path, text):
    path.write_text(text)
    return path


def test_defaults_are_the_papers_training_setup():
    config = parse()
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (
        1e-4,
        (0.9, 0.999),
        0,
    )
    assert (config.optim.ema_decay, config.train.global_batch_size) == (0.9999, 256)
    assert config.train.micro_batch_size == 64
    assert config.model.label_dropout == 0.1


@pytest.mark.parametrize("name", known_configs())
def test_every_shipped_config_is_valid_and_survives_its_own_dump(name, tmp_path):
    config = parse("--config", name)
    again = load_config(write(tmp_path / "config.yaml", dump_config(config)))
    assert again == config


def test_base_holds_what_the_file_leaves_out(tmp_path):
    write(tmp_path / "base.yaml", "optim: {lr: 0.5, weight_decay: 0.25}\nseed: 3\n")
    path = write(tmp_path / "run.yaml", "base: base.yaml\noptim: {lr: 1e-4}\n")
    config = parse("--config", path, "--optim.ema_decay", "0.5")
    assert (config.optim.lr, config.optim.weight_decay, config.seed) == (1e-4, 0.25, 3)
    assert config.optim.ema_decay == 0.5
    assert config.run_dir == "runs/run"


def test_flags_win_over_files(tmp_path):
    path = write(tmp_path / "run.yaml", "optim: {lr: 1.0e-3, betas: [0.8, 0.9]}\n")
    config = parse("--config", path, "--optim.lr=2e-4", "--data.horizontal_flip", "false")
    assert (config.optim.lr, config.optim.betas) == (2e-4, (0.8, 0.9))
    assert config.data.horizontal_flip is False


def test_hyphens_do_for_underscores():
    flags = ["--init-from", "runs/old-run", "--optim.weight-decay=0.1", "--run-dir=runs/a-b"]
    config = parse_config(flags, "train.py")
    assert (config.init_from, config.run_dir) == ("runs/old-run", "runs/a-b")
    assert config.optim.weight_decay == 0.1


def test_a_name_picks_the_dataclass_of_its_section(tmp_path):
    path = write(tmp_path / "run.yaml", "model: {feed_forward: {name: token_choice, top_k: 2}}\n")
    assert parse("--config", path).model.feed_forward == TokenChoiceConfig(top_k=2)


def test_changing_a_name_drops_the_keys_of_the_old_one(tmp_path):
    path = write(
        tmp_path / "run.yaml",
        "model: {feed_forward: {name: diffmoe, num_experts: 8, capacity: 2.0}}\n",
    )
    for_flags = ["--config", path, "--model.feed_forward.name"]
    assert parse(*for_flags, "dense").model.feed_forward == DenseConfig()
    kept = parse(*for_flags, "token_choice").model.feed_forward
    assert kept == TokenChoiceConfig(num_experts=8)
    assert parse("--config", path).model.feed_forward == DiffMoEConfig(num_experts=8, capacity=2.0)


def test_objective_decides_output_channels_and_sampler_unless_set():
    flow, ddpm = parse(), parse("--objective.name", "ddpm")
    assert (flow.model.learn_sigma, flow.sampling.sampler) == (False, "euler")
    assert (ddpm.model.learn_sigma, ddpm.sampling.sampler) == (True, "ddpm")
    fixed = parse("--objective.name", "ddpm", "--model.learn_sigma", "false")
    assert fixed.model.learn_sigma is False


def test_size_stands_for_three_keys(tmp_path):
    path = write(tmp_path / "run.yaml", "model: {size: XL, num_heads: 8}\n")
    model = parse("--config", path).model
    assert (model.hidden_size, model.depth, model.num_heads) == (1152, 28, 8)
    model = parse("--config", path, "--model.size", "B").model
    assert (model.hidden_size, model.depth, model.num_heads) == (768, 12, 12)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("optim: {lrr: 1}", r"optim\.lrr: unknown key; did you mean optim\.lr\?$"),
        ("nonsense: 1", r"nonsense: unknown key"),
        ("optim: {lr: fast}", r"optim\.lr: 'fast' is not allowed; wanted: float, null$"),
        ("train: {max_steps: 1.5}", r"train\.max_steps: .*1\.5.* wanted: int"),
        (
            "train: {max_steps: null}",
            r"run\.yaml: train\.max_steps: null is not allowed; wanted: int",
        ),
        ("objective: flow", r"objective: a section of keys is wanted here, not 'flow'"),
        ("data: null", r"data: a section of keys is wanted here, not None"),
        ("model: {size: [L]}", r"model\.size: unknown \['L'\]"),
        ("model: 3", r"model: a section of keys is wanted"),
        ("model: {size: huge}", r"model\.size: unknown 'huge'; known: B, G, L, M, S"),
        ("objective: {name: vdm}", r"objective\.name: unknown 'vdm'; known: ddpm, flow"),
        (
            "model: {feed_forward: {name: [diffmoe]}}",
            r"model\.feed_forward\.name: unknown \['diffmoe'\]",
        ),
        ("model: {feed_forward: {class_path: os.system}}", r"class_path: unknown key"),
        ("class_path: os.system", r"class_path: unknown key"),
        ("model: {feed_forward: {name: diffmoe, init_args: {}}}", r"init_args: unknown key"),
        ("- 1", r"a config is a mapping of keys, not list"),
        ("a: [", r"not a readable YAML file"),
        ("seed: !!python/object/apply:os.getcwd []", r"not a readable YAML file"),
        ("base: [a.yaml]", r"base: must be one file or name"),
        ("base: run.yaml", r"base: files form a circle"),
        ("base: missing.yaml", r"no file .*missing\.yaml"),
    ],
)
def test_bad_files_are_refused(tmp_path, text, wanted):
    path = write(tmp_path / "run.yaml", text)
    with pytest.raises(ConfigError, match=wanted):
        parse("--config", path)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--optim.l", "1"], r"^--optim\.l: unknown key; did you mean --optim\.lr\?$"),
        (
            ["--model", "{hidden_size: 4}"],
            r"^--model: is a section; give its keys, such as --model\.input_size",
        ),
        (["--model.feed_forward.class_path", "os.system"], r"unknown key"),
        (
            ["--model.feed_forward.name", "moe"],
            r"unknown 'moe'; known: deepseek, dense, diff",
        ),
        (["--model.size", "huge"], r"--model\.size: unknown 'huge'; known: B, G, L, M, S, T2I, XL"),
        (["--optim.lr", "fast"], r"optim\.lr: 'fast' is not allowed"),
        (["--config", "nowhere.yaml"], r"no file .*nowhere\.yaml"),
        (["--model.feed_forward.pool", "world"], r"pool: 'world' is not allowed; .*'sample', 'ba"),
    ],
)
def test_bad_flags_are_refused(argv, wanted):
    with pytest.raises(ConfigError, match=wanted):
        parse(*argv)


@pytest.mark.parametrize("name", ["diffmoe/L_E16_flow", "diffmoe/L_E16_flow.yaml"])
def test_configs_have_names_whatever_the_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = parse("--config", name)
    assert config.run_dir == "runs/diffmoe_L_E16_flow"
    assert (config.model.hidden_size, config.model.feed_forward.num_experts) == (1024, 16)


def test_a_config_of_ones_own_stands_on_a_name(tmp_path):
    path = write(tmp_path / "mine.yaml", "base: dit/S_flow\nmodel: {depth: 3}")
    config = parse("--config", path)
    assert (config.model.depth, config.run_dir) == (3, "runs/mine")
    assert config.model.feed_forward.name == "dense"


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("diffmoe/L_E16", "diffmoe/L_E16_flow"),
        ("difmoe/XL_E16_flow", "diffmoe/XL_E16_flow"),
    ],
)
def test_an_unknown_name_lists_near_ones(name, near):
    with pytest.raises(ConfigError, match=rf"--config: no file .*{name}.*near it: .*\b{near}\b"):
        parse("--config", name)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("config/dit_S_flow.yaml", "no file config/dit_S_flow.yaml, .*; it is now dit/S_flow$"),
        ("dit_S_ddpm", "it is now dit/S_flow with --objective.name ddpm$"),
        ("jitmoe_B16_E16", "it is now jit/B16_E16$"),
        ("imagenet256_jit", "it is now jit/imagenet256$"),
        ("imagenet256", "near it: dit/imagenet256, .*, jit/imagenet256, promoe/imagenet256$"),
        ("S_E16_flow", "near it: diffmoe/S_E16_flow, dsmoe/S_E16_flow, ecdit/S_E16_flow, tcdit/"),
        ("dit", r"dit is a folder, not a file; configs in it: dit/B_flow, .*, \.\.\.$"),
        ("nowhere", r"there are such as 000_DiffMoE_S_E16_Flow, .*, \.\.\.$"),
        ("", "no file '', and no config"),
    ],
)
def test_names_that_are_none_are_one_short_line(name, wanted):
    with pytest.raises(ConfigError, match=wanted) as caught:
        parse("--config", name)
    assert len(str(caught.value)) < 200


def test_a_folder_is_no_config(tmp_path):
    with pytest.raises(ConfigError, match=f"--config: {tmp_path} is a folder, not a file$"):
        parse("--config", tmp_path)


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--lr", "1"], r"--lr: unknown key; did you mean --optim\.lr\?$"),
        (["--modell.depth", "1"], r"--modell: unknown key; did you mean --model\?$"),
        (
            ["--model.feed_forward.top_k", "1"],
            r"feed_forward\.name deepseek or promoe or race or token_choice has it, not diffmoe$",
        ),
        (["--objective.loss", "kl"], r"--objective\.name ddpm has it, not flow$"),
        (["--nothing", "1"], r"--nothing: unknown key; --help lists the keys$"),
    ],
)
def test_unknown_keys_name_the_nearest_and_who_has_them(argv, wanted):
    with pytest.raises(ConfigError, match=wanted):
        parse(*argv)


def test_a_key_that_stands_twice_is_refused(tmp_path):
    path = write(tmp_path / "run.yaml", "seed: 1\noptim:\n  lr: 1.0\n  betas: [0, 0]\n  lr: 2.0\n")
    wanted = rf"{path}: not a readable YAML file: line 5: lr: stands twice, first in line 3"
    with pytest.raises(ConfigError, match=wanted):
        parse("--config", path)
    path.write_bytes(b"seed: 1 # caf\xe9\n")
    with pytest.raises(ConfigError, match=r"byte 13 is no UTF-8"):
        parse("--config", path)


def test_common_ground_and_protocols_are_no_runs():
    known = known_configs()
    assert "quickstart" in known
    assert not [name for name in known if "imagenet256" in name or "protocols" in name]


def test_print_config_prints_what_it_would_run(capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        parse("--optim.lr", "0.5", "--print_config")
    assert stop.value.code == 0
    printed = write(tmp_path / "config.yaml", capsys.readouterr().out)
    expected = dataclasses.replace(parse("--optim.lr", "0.5"), run_dir="runs/default")
    assert load_config(printed) == expected


def test_help_names_every_key_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as stop:
        parse("--model.feed_forward.name", "token_choice", "--help")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "--model.feed_forward.top_k" in text
    assert "experts per token, K" in text
    assert "--model.feed_forward.pool" not in text
    assert "--optim.lr" in text


def test_the_command_ends_with_one_line_and_code_2():
    run = subprocess.run(
        [sys.executable, "train.py", "--model.hidden_size", "100"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "model.hidden_size: 100 is not divisible by model.num_heads 6" in run.stderr
