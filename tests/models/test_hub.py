"""Checkpoints on the hub: what is sent, and that every command takes it from there."""

import json

import huggingface_hub
import pytest
import torch
import yaml
from local_hub import local_hub

from config.layers import DenseConfig, DiffMoEConfig
from config.load import parse_config
from core.distributed import Processes
from core.errors import UserError
from evaluations.sampled import flags_parser, sample_and_score
from models import hub
from models.card import TrainingFacts, card
from models.pretrained import find_checkpoint, load_pretrained, read_checkpoint
from models.remote import fetch
from sampling.pipeline import load
from training.trainer import train

ALONE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A hub of this machine in the place of the real one, and an empty cache of downloads."""
    with local_hub() as server:
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.address)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "downloads"))
        monkeypatch.setattr(
            huggingface_hub.constants,
            "HUGGINGFACE_CO_URL_TEMPLATE",
            server.address + "/{repo_id}/resolve/{revision}/{filename}",
        )
        monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
        yield server


def sampled(ckpt, folder, *more):
    argv = ["--ckpt", ckpt, "--device", "cpu", "--sample-dir", folder, "--num-fid-samples", 5]
    argv += ["--per-proc-batch-size", 4, "--num-sampling-steps", 2, *more]
    flags = flags_parser().parse_args([str(a) for a in argv])
    return sample_and_score(flags, ALONE).parent


def test_a_dry_run_writes_what_a_push_sends(trained, tmp_path, server):
    samples = sampled(trained, tmp_path / "samples", "--capacity")
    argv = ["push", str(trained), "--repo", "someone/tiny", "--samples", str(samples)]
    argv += ["--with-samples", "--license", "mit"]
    hub.main([*argv, "--dry-run", str(tmp_path / "dry")])
    assert server.repositories == {}
    hub.main(argv)
    ((_, sent),) = server.repositories["someone/tiny"]
    written = {
        str(path.relative_to(tmp_path / "dry")): path.read_bytes()
        for path in (tmp_path / "dry").rglob("*")
        if path.is_file()
    }
    assert sent == written
    assert {"README.md", "config.yaml", "ema.safetensors", "manifest.json"} <= sent.keys()
    assert {"state.json", "vae/config.json", "samples.png"} <= sent.keys()
    assert f"samples/{samples.name}/samples.npz" in sent
    assert not any("optimizer" in name or name == "model.safetensors" for name in sent)
    for name, content in sent.items():  # nothing of this machine's folders
        assert str(tmp_path.parents[1]).encode() not in content, name


def test_the_card_says_what_it_is_and_what_it_scored(trained, tmp_path):
    samples = sampled(trained, tmp_path / "samples", "--capacity")
    record = json.loads((samples / "set.json").read_text())
    scored = {"reference": "a/ref.npz", "features": "inception", "reference_images": 7}
    record |= {"scores": {"FID": 12.345678}, "scored": scored}
    (samples / "set.json").write_text(json.dumps(record))
    out = tmp_path / "card"
    argv = ["push", str(trained), "--repo", "someone/tiny", "--samples", str(samples)]
    hub.main([*argv, "--dry-run", str(out)])
    text = (out / "README.md").read_text()
    head = yaml.safe_load(text.split("---\n")[1])
    assert head["tags"] == ["diffusion", "mixture-of-experts", "diffmoe"]
    assert "license" not in head
    assert "Not stated" in text
    assert "12.35" in text
    assert "7 images of `ref.npz` in features `inception`" in text
    assert f"{record['capacity_infer']:.3f}" in text
    assert "--ckpt hub:someone/tiny" in text
    assert "| steps | 4 |" in text
    assert "num_experts: 4" in text
    assert "hours" in text


def test_every_command_takes_a_checkpoint_of_the_hub(trained, server, tmp_path, tiny_config):
    hub.main(["push", str(trained), "--repo", "someone/tiny"])
    ((revision, _),) = server.repositories["someone/tiny"]
    here, there = load_pretrained(trained), load_pretrained("hub:someone/tiny")
    assert there.path.is_relative_to(tmp_path / "downloads")
    for name, tensor in here.model.state_dict().items():
        assert torch.equal(there.model.state_dict()[name], tensor), name
    assert there.config.data.vae_path == str(there.path / "vae")
    samples = sampled(f"hub:someone/tiny@{revision}", tmp_path / "samples")
    assert samples.parent.name == "someone_tiny"
    own = sampled(trained, tmp_path / "own")
    one, other = (json.loads((s / "set.json").read_text()) for s in (samples, own))
    assert one["vae_sha256"] == other["vae_sha256"]
    images = load("hub:someone/tiny").sample([0, 1], num_steps=2).images
    assert torch.equal(
        torch.as_tensor(images), torch.as_tensor(load(trained).sample([0, 1], num_steps=2).images)
    )
    argv = ["--config", tiny_config, "--run_dir", tmp_path / "new", "--train.max_steps", "2"]
    argv += ["--init_from", "hub:someone/tiny"]
    train(parse_config([str(a) for a in argv], "train.py"), ALONE)
    assert find_checkpoint(tmp_path / "new").name == "step_0000002"


def test_paths_become_names_and_ids_stay():
    values = {
        "data": {"cached_path": "/scratch/alice/cache", "vae_path": "stabilityai/sd-vae-ft-mse"},
        "run_dir": "/home/alice/runs/mine",
        "latents": {"text": {"encoder": "../encoders/t5"}},
        "evaluation": {"reference": "~/refs/imagenet.npz", "features": "inception"},
        "prompts": ["either/or"],
        "class_names": ["a/b"],
    }
    assert hub.without_paths(values) == {
        "data": {"cached_path": "cache", "vae_path": "stabilityai/sd-vae-ft-mse"},
        "run_dir": "runs/mine",
        "latents": {"text": {"encoder": "t5"}},
        "evaluation": {"reference": "imagenet.npz", "features": "inception"},
        "prompts": ["either/or"],
        "class_names": ["a/b"],
    }


def test_a_model_of_text_carries_its_encoder(trained_t2i, server, tmp_path):
    hub.main(["push", str(trained_t2i), "--repo", "someone/words"])
    ((_, sent),) = server.repositories["someone/words"]
    assert {"text_encoder/config.json", "text_encoder/model.safetensors"} <= sent.keys()
    for name, content in sent.items():
        assert str(tmp_path.parents[1]).encode() not in content, name
    prompts = ["a red dog", "two green cat"]
    here, there = (
        load(ckpt).sample(prompts, num_steps=2).images
        for ckpt in (str(trained_t2i), "hub:someone/words")
    )
    assert (here == there).all()


def test_nothing_that_could_be_run_is_downloaded(trained, server):
    hub.main(["push", str(trained), "--repo", "someone/tiny"])
    ((_, files),) = server.repositories["someone/tiny"]
    bad = ("vae/x.bin", "vae/x.py", "text_encoder/modeling.py", "samples/s/set.json", "run.py")
    files |= dict.fromkeys(bad, b"pickled")
    folder = fetch("hub:someone/tiny")
    assert not [name for name in bad if (folder / name).exists()]
    assert (folder / "vae" / "config.json").exists()


def test_a_dense_model_and_a_layer_of_ones_own_have_cards(trained):
    checkpoint = read_checkpoint(trained)
    facts = TrainingFacts(None, None, None, {})
    checkpoint.config.model.feed_forward = DenseConfig()
    text = card(checkpoint, "ema", facts, [], "a/b", None, [])
    assert "**dense DiT**" in text
    assert "mixture-of-experts" not in text
    checkpoint.config.model.feed_forward = DiffMoEConfig(num_experts=4)
    with pytest.MonkeyPatch.context() as patched:  # as a layer that the project does not have
        patched.setattr("models.card.NAMES", {})
        assert "**diffmoe**" in card(checkpoint, "ema", facts, [], "a/b", None, [])


def test_a_second_push_is_a_new_revision(trained, server):
    for _ in range(2):
        hub.main(["push", str(trained), "--repo", "someone/tiny", "--weights", "model"])
    first, second = (revision for revision, _ in server.repositories["someone/tiny"])
    one, other = fetch(f"hub:someone/tiny@{first}"), fetch("hub:someone/tiny")
    assert (one.name, other.name) == (first, second)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("hub:tiny", "wanted: hub:NAME"),
        ("hub:", "wanted: hub:NAME"),
        ("hub:a/b/c", "wanted: hub:NAME"),
        ("hub:../../etc", "wanted: hub:NAME"),
        ("hub:-x/..", "hub:-x/.."),
        ("hub:nobody/nothing", "the hub has no nobody/nothing"),
        ("hub:someone/empty@no-such", "someone/empty has no such revision"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line(asked, said, server):
    server.repositories["someone/empty"] = []
    with pytest.raises(UserError) as caught:
        load_pretrained(asked)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_hub_that_cannot_be_reached_is_one_line(server, monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached"):
        load_pretrained("hub:someone/tiny")
    with pytest.raises(UserError, match=r"cannot be reached .* write the folder by --dry-run"):
        hub.upload(tmp_path, "someone/tiny", private=False)


def test_a_vae_that_cannot_be_loaded_is_not_published(trained, vae_folder, tmp_path):
    broken = tmp_path / "vae"
    broken.mkdir()
    (broken / "config.json").write_bytes((vae_folder / "config.json").read_bytes())
    (broken / "diffusion_pytorch_model.bin").write_bytes(b"pickled")
    checkpoint = read_checkpoint(trained)
    checkpoint.config.data.vae_path = str(broken)
    with pytest.raises(UserError, match="has no weights in safetensors"):
        hub.write_repository(checkpoint, "ema", [], "a/b", None, False, empty(tmp_path / "out"))
    checkpoint.config.data.vae_path = "mse"
    hub.write_repository(checkpoint, "ema", [], "a/b", None, False, empty(tmp_path / "other"))
    assert "vae_path: mse" in (tmp_path / "other" / "config.yaml").read_text()


def empty(folder):
    folder.mkdir()
    return folder


def test_a_download_that_was_changed_is_refused(trained, server):
    hub.main(["push", str(trained), "--repo", "someone/tiny"])
    folder = fetch("hub:someone/tiny")
    path = (folder / "ema.safetensors").resolve()
    path.write_bytes(path.read_bytes()[:-8] + b"12345678")
    with pytest.raises(UserError, match="changed since it was written"):
        load_pretrained("hub:someone/tiny")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--repo", "tiny"], "wanted: OWNER/NAME"),
        (["--repo", "refused/tiny"], "the hub refuses"),
        (["--repo", "a/b", "--licence", "mit: [x"], "wanted: an id of the hub"),
        (["--repo", "a/b", "--samples", "{out}"], "is no finished sample set"),
        (["--repo", "a/b", "--samples", "{other}"], "is of elsewhere, not of"),
        (["--repo", "a/b", "--weights", "ema_0.5"], "weights: unknown 'ema_0.5'"),
        (["--repo", "a/b", "--dry-run", "{out}"], "exists; remove it"),
    ],
)
def test_what_cannot_be_published_is_one_line(flags, said, trained, server, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    (out / "file").write_text("mine")
    other.mkdir()
    record = {"checkpoint_sha256": "0" * 64, "checkpoint": "elsewhere"}
    (other / "set.json").write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        hub.main(["push", str(trained), *(flag.format(out=out, other=other) for flag in flags)])
    text = capsys.readouterr().err
    assert said in text
    assert "Traceback" not in text
    assert (out / "file").read_text() == "mine"
    assert not any(files for files in server.repositories.values())
