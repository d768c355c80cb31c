"""The folder of a set: its name, whose it is, what may be replaced; flags that do nothing."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from config.layers import DenseConfig
from config.objective import SAMPLERS, DDPMConfig, SamplingConfig
from config.schema import Config
from core.errors import ConfigError, UserError
from core.limits import check_disk, check_memory, check_new_folder, check_out_file, check_out_folder
from core.npz import NpzWriter
from sampling.flags import resolve, sampling_parser
from sampling.marks import check_file, mark, marks
from sampling.needs import NEEDS
from sampling.sets import (
    SetFolder,
    differences,
    hashes_of,
    read_set,
    run_name,
    set_hash,
    shared_name,
)

STEP = "checkpoints/step_0000100"


@pytest.mark.parametrize(
    ("checkpoint", "name"),
    [
        (f"runs/quickstart/train/{STEP}", "quickstart_train"),
        (f"/data/runs/old/runs/a/{STEP}", "a"),
        (f"/data/experiments/mine/{STEP}", "mine"),
        (f"/data/runs/{STEP}", "runs"),
        ("/data/runs/dit_xl", "dit_xl"),
    ],
)
def test_the_name_of_a_run(checkpoint, name):
    assert run_name(Path(checkpoint)) == name


def test_a_link_to_a_checkpoint_is_of_the_same_run(tmp_path):
    folder = tmp_path / "runs" / "a" / STEP
    folder.mkdir(parents=True)
    (tmp_path / "best").symlink_to(folder)
    assert run_name(tmp_path / "best") == "a"


SETTINGS = {"checkpoint_sha256": "a" * 64, "cfg_scale": 1.5, "config": {"model": {"depth": 2}}}
NOTHING = {"features": None}


def begun(tmp_path, **blocks):
    folder = SetFolder(tmp_path / "run" / "set")
    folder.begin(SETTINGS, NOTHING | blocks)
    folder.part(0).write_bytes(b"a block")
    return folder


def finished(tmp_path):
    folder = begun(tmp_path)
    folder.write_record(SETTINGS | {"set_sha256": set_hash(SETTINGS), "nfe": 3})
    return folder


def test_blocks_of_the_same_settings_are_gone_on_with(tmp_path):
    folder = begun(tmp_path)
    assert not folder.is_finished(SETTINGS, NOTHING, overwrite=False)
    for _ in range(2):  # --overwrite does not take its own blocks for another's
        folder.begin(SETTINGS, NOTHING)
        assert folder.part(0).exists()


@pytest.mark.parametrize("make", [begun, finished])
def test_other_settings_are_refused_until_they_may_be_replaced(tmp_path, make):
    folder = make(tmp_path)
    other = SETTINGS | {"checkpoint_sha256": "b" * 64, "cfg_scale": 2.0}
    wanted = r"checkpoint_sha256 is a{12}\.\.\. there, b{12}\.\.\. here; cfg_scale is 1.5 there, "
    with pytest.raises(ConfigError, match=wanted + r"2.0 here; --overwrite replaces it"):
        folder.is_finished(other, NOTHING, overwrite=False)
    assert folder.part(0).exists()
    assert not folder.is_finished(other, NOTHING, overwrite=True)
    assert folder.part(0).exists()  # nothing goes before sampling begins
    folder.begin(other, NOTHING)
    assert not folder.record.exists()
    assert not folder.part(0).exists()
    assert json.loads(folder.plan.read_text()) == other | NOTHING


def test_blocks_with_other_features_are_refused(tmp_path):
    folder = begun(tmp_path, features="inception")
    with pytest.raises(ConfigError, match="features is inception there, nothing here"):
        folder.is_finished(SETTINGS, NOTHING, overwrite=False)


def test_a_finished_set_is_finished_whatever_else_it_records(tmp_path):
    folder = finished(tmp_path)
    assert folder.is_finished(SETTINGS, {"features": "inception"}, overwrite=False)
    (folder.path / ".grid.png.1.tmp").touch()
    folder.tidy()  # what a kill between the record and the end left
    assert [path.name for path in folder.path.iterdir()] == ["set.json"]
    assert read_set(folder.path)[1]["nfe"] == 3


def test_a_record_that_cannot_be_read_is_nobodys(tmp_path):
    folder = finished(tmp_path)
    folder.record.write_text("{")
    with pytest.raises(UserError, match=r"set.json: not readable"):
        folder.is_finished(SETTINGS, NOTHING, overwrite=False)
    assert not folder.is_finished(SETTINGS, NOTHING, overwrite=True)


def test_differences_name_keys_at_any_depth():
    here = {"config": {"model": {"depth": 3}}, "a": None, "b": 1, "c": 2}
    found = differences(SETTINGS, here)
    assert found[0] == "config.model.depth is 2 there, 3 here"
    assert found[1:] == ["b is nothing there, 1 here", "and 1 more"]
    assert differences(SETTINGS, SETTINGS) == []


def test_a_hash_is_that_of_the_settings_whatever_their_order():
    turned = dict(reversed(SETTINGS.items()))
    assert set_hash(turned) == set_hash(SETTINGS)
    assert set_hash(SETTINGS | {"cfg_scale": 1.25}) != set_hash(SETTINGS)


def test_an_archive_says_whose_it_is_and_is_refused_elsewhere(tmp_path):
    record = SETTINGS | {"set_sha256": set_hash(SETTINGS)}
    with NpzWriter(tmp_path / "a.npz") as archive:
        archive.begin("arr_0", np.dtype(np.uint8), (2,))
        archive.append(np.array([1, 2], np.uint8))
        mark(archive, hashes_of(record))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file["arr_0"].tolist() == [1, 2]
    assert marks(tmp_path / "a.npz") == hashes_of(record)
    check_file(tmp_path / "a.npz", record)
    with pytest.raises(UserError, match=r"a.npz: belongs to another set: set_sha256 is"):
        check_file(tmp_path / "a.npz", record | {"set_sha256": "c" * 64})


def test_the_name_of_what_is_made_of_several_sets():
    names = ["step_1-ema-euler3-inference=topk-seed0", "step_1-ema-euler3-inference=dynamic-seed0"]
    assert shared_name(names) == "step_1-ema-euler3-seed0"


def checkpoint(**changes):
    config = Config(sampling=SamplingConfig(sampler="euler", num_steps=7, cfg_scale=1.0))
    for key, value in changes.items():
        section, _, name = key.partition("__")
        setattr(getattr(config, section) if name else config, name or section, value)
    return SimpleNamespace(config=config, path="CKPT")


def resolved(*flags, **changes):
    return resolve(sampling_parser().parse_args(["--ckpt", "C", *flags]), checkpoint(**changes))


DDPM = {"objective": DDPMConfig(), "sampling": SamplingConfig("ddpm", 9)}
SDE = ["--sampler", "euler_maruyama"]


@pytest.mark.parametrize(
    ("flags", "wanted", "changes"),
    [
        (["--fixed-threshold", "0.4"], "--inference fixed", {}),
        (["--inference-capacity", "2"], "--inference topk", {}),
        (["--num-per-class", "8"], "--classes", {}),
        (["--classes", "1", "--num-fid-samples", "50000"], "no --classes", {}),
        (["--classes", "1", "--labels", "random"], "a model with classes, and no --classes", {}),
        (["--labels", "balanced"], "a model with classes", {"model__num_classes": 0}),
        (["--sampler", "dopri5", "--num-sampling-steps", "9"], "a sampler of fixed steps", {}),
        (["--protocol", "sit_dopri5_cfg1.0", "--num-sampling-steps", "9"], "fixed steps", {}),
        (["--cfg-interval", "0.1", "1"], "guidance, a --cfg-scale other than 1", {}),
        (["--cfg-channels", "all"], "guidance", {}),
        (["--cfg-pooling", "joint"], "guidance", {}),
        (["--atol", "1e-6"], "a sampler with tolerances: dopri5", {}),
        (["--sampler", "explicit_adams", "--rtol", "1e-3"], "a sampler with tolerances", {}),
        (["--no-overshoot"], "an adaptive sampler: dopri5", {}),
        (["--ddim-eta", "0"], "--sampler ddim", {}),
        (["--ddim-eta", "0"], "--sampler ddim", DDPM),
        (["--clip-denoised"], "a checkpoint of objective ddpm", {}),
        (["--diffusion-form", "sbdm"], "a stochastic sampler: euler_maruyama", {}),
        (["--diffusion-norm", "1"], "a stochastic sampler", {}),
        (["--last-step", "mean"], "a stochastic sampler", {}),
        (["--last-step-size", "0.04"], "a stochastic sampler", DDPM),
        ([*SDE, "--last-step", "none", "--last-step-size", "0.1"], "a --last-step other", {}),
    ],
)
def test_a_flag_that_does_nothing_is_refused(flags, wanted, changes):
    flag = [word for word in flags if word.startswith("--")][-1].replace("--no-", "--")
    with pytest.raises(ConfigError, match=f"^{flag}: does nothing here; it needs .*{wanted}"):
        resolved(*flags, **changes)


@pytest.mark.parametrize(
    ("flags", "changes"),
    [
        (["--inference", "fixed", "--fixed-threshold", "0.4"], {}),
        (["--fixed_threshold=0.4"], {"routing": "fixed"}),
        (["--inference", "topk", "--inference-capacity", "2"], {}),
        (["--classes", "1", "--num-per-class", "8"], {}),
        (["--protocol", "sit_dopri5_cfg1.0"], {}),  # its guided channels are not typed
        (["--protocol", "sit_heun125_cfg1.0", "--cfg-scale", "2", "--cfg-pooling", "joint"], {}),
        (["--sampler", "dopri5", "--atol", "1e-6", "--rtol", "1e-3", "--overshoot"], {}),
        (["--sampler", "implicit_adams", "--atol", "1e-6"], {}),
        (["--sampler", "ddim", "--ddim-eta", "0", "--no-clip-denoised"], DDPM),
        ([*SDE, "--diffusion-form", "sbdm", "--last-step-size", "0.1"], {}),
    ],
)
def test_a_flag_that_does_something_is_taken(flags, changes):
    found = checkpoint(**{k: v for k, v in changes.items() if k != "routing"})
    parsed = sampling_parser().parse_args(["--ckpt", "C", *flags])
    rule = parsed.inference or changes.get("routing")
    if rule:
        found.config.model.feed_forward.inference = rule
    resolve(parsed, found)


def test_every_flag_of_the_settings_is_in_the_table_or_always_of_use():
    parser = sampling_parser()
    always = {"sampler", "cfg_scale"}
    flags = {a.dest for group in parser._action_groups[2:] for a in group._group_actions}
    needed = {name for need in NEEDS for name in need.flags}
    assert flags - always <= needed
    assert needed <= {action.dest for action in parser._actions}


@pytest.mark.parametrize(
    ("flags", "changes", "wanted"),
    [
        (["--classes", "1000"], {}, "1000 is not allowed; CKPT has 1000; allowed: 0 ... 999"),
        (["--classes", "1"], {"classes": 0}, "CKPT has no classes; allowed: 0 alone"),
        (["--num-classes", "10"], {"classes": 0}, "10 is not allowed; CKPT has no classes"),
    ],
)
def test_classes_that_are_not_there(flags, changes, wanted):
    classes = changes.get("classes", 1000)
    with pytest.raises(ConfigError, match=f"{flags[0]}: .*{wanted}"):
        resolved(*flags, model__num_classes=classes)


def test_a_list_of_classes_that_is_none():
    with pytest.raises(ConfigError, match="--classes: 'a,b' is no list such as 207,360"):
        sampling_parser().parse_args(["--ckpt", "C", "--classes", "a,b"])


def test_a_dense_checkpoint_has_no_rule_of_routing():
    found = checkpoint()
    found.config.model.feed_forward = DenseConfig()
    with pytest.raises(ConfigError, match="--fixed-threshold: does nothing"):
        resolve(sampling_parser().parse_args(["--ckpt", "C", "--fixed-threshold", "0.4"]), found)


def test_a_sampler_whose_memory_is_a_blocks_square_is_not_offered():
    assert "scipy_solver" not in SAMPLERS["flow"]
    with pytest.raises(ConfigError, match=r"'scipy_solver' does not belong to objective.name flow"):
        resolved("--sampler", "scipy_solver")


def test_what_a_machine_cannot_do(tmp_path):
    cpu = torch.device("cpu")
    check_memory("--n", 10, 1000, cpu)
    with pytest.raises(ConfigError, match=r"--n: 10+ need at least 1e\+06 GB of memory, the"):
        check_memory("--n", 10**12, 1000, cpu)
    check_disk("--n", 1, 1, tmp_path / "new")
    with pytest.raises(ConfigError, match=r"--n: 10+ need at least 1e\+09 GB on the disk of"):
        check_disk("--n", 10**18, 1, tmp_path)
    (tmp_path / "file").touch()
    check_out_folder("--o", tmp_path / "a" / "b")
    for path in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(ConfigError, match=r"--o: .*file is a file, not a folder"):
            check_out_folder("--o", path)
    check_out_file("--o", tmp_path / "a.json")
    with pytest.raises(ConfigError, match="is a folder; name a file"):
        check_out_file("--o", tmp_path)
    with pytest.raises(ConfigError, match=r"--o: no folder .*none to write a.json to"):
        check_out_file("--o", tmp_path / "none" / "a.json")
    check_new_folder("--o", tmp_path / "new")
    with pytest.raises(ConfigError, match="exists; remove it or choose another folder"):
        check_new_folder("--o", tmp_path)
