"""CLIP score by a tiny random model, against cosines computed one by one."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from data.scenes import METADATA
from evaluations import clip_score
from evaluations.clip_score import Clip

LONGEST = 12
WORDS = ["a red cube", "two cats", "three zebras on a lawn beside a lake in the rain"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip") / "model"
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [*letters, *(f"{one}</w>" for one in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    layers = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    text = layers | {
        "vocab_size": len(pieces),
        "max_position_embeddings": LONGEST,
        "eos_token_id": len(pieces) - 1,
        "bos_token_id": len(pieces) - 2,
        "pad_token_id": len(pieces) - 1,
    }
    vision = layers | {"image_size": 16, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=4))
        for parameter in clip.parameters():  # far enough from zero to tell inputs apart
            parameter.data += 0.3 * torch.randn_like(parameter)
    clip.save_pretrained(folder)
    size = {"height": 16, "width": 16}
    pictures = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=size)
    tokenizer = CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (6, 1, 1, 3)) * np.ones((1, 24, 24, 1))
    return (base + rng.normal(0, 60, base.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture
def folder(images, tmp_path):
    """A set of three prompts with two images each."""
    hashes = {"checkpoint_sha256": "c" * 64, "set_sha256": "5" * 64}
    record = hashes | {"config": {}, "prompts": WORDS, "num_per_prompt": 2}
    path = tmp_path / "set"
    path.mkdir()
    np.savez(path / "samples.npz", arr_0=images, **{k: np.array(v) for k, v in hashes.items()})
    (path / "set.json").write_text(json.dumps(record))
    return path


def cosines(model, images, texts):
    """Of each image and its text, alone and without padding."""
    from transformers import CLIPModel, CLIPProcessor

    clip, processor = CLIPModel.from_pretrained(model).eval(), CLIPProcessor.from_pretrained(model)
    found = []
    for image, text in zip(images, texts, strict=True):
        ids = processor.tokenizer(text).input_ids
        ids = ids if len(ids) <= LONGEST else [*ids[: LONGEST - 1], ids[-1]]
        pixels = processor.image_processor(Image.fromarray(image), return_tensors="pt").pixel_values
        with torch.no_grad():
            one = clip.get_text_features(input_ids=torch.tensor([ids])).pooler_output
            other = clip.get_image_features(pixel_values=pixels).pooler_output
        found.append(torch.nn.functional.cosine_similarity(one, other).item())
    return np.array(found)


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["clip_score.py", *map(str, arguments)])
    clip_score.main()


def test_score_of_a_set(model, images, folder, monkeypatch, capsys, caplog):
    run(monkeypatch, folder, "--model", model, "--batch-size", 4, "--device", "cpu")
    expected = cosines(model, images, np.repeat(WORDS, 2))
    assert expected.min() < -0.02  # some count as nothing
    assert expected.max() > 0.02
    wanted = 100 * np.maximum(expected, 0).mean()
    found = json.loads((folder / "clip_score.json").read_text())
    assert found["clip_score"] == pytest.approx(wanted, rel=1e-4)
    assert capsys.readouterr().out == f"CLIP score: {found['clip_score']:.4f}\n"
    assert (found["images"], found["prompts"], found["prompts_cut"]) == (6, 3, 1)
    assert "1 of 3 prompts have more than 12 tokens and are cut" in caplog.text
    assert (found["set_sha256"], found["checkpoint_sha256"]) == ("5" * 64, "c" * 64)
    assert (found["model"], len(found["model_sha256"])) == (str(model), 64)


def test_batches_do_not_change_the_score(model, folder, tmp_path, monkeypatch):
    found = []
    for size in (1, 5, 64):
        out = tmp_path / f"{size}.json"
        run(monkeypatch, folder, "--model", model, "--batch-size", size, "--out", out)
        found.append(json.loads(out.read_text())["clip_score"])
    assert found == pytest.approx([found[0]] * 3, rel=1e-5)
    assert not (folder / "clip_score.json").exists()


def test_images_with_captions_have_no_file_of_their_own(
    model, images, tmp_path, monkeypatch, capsys
):
    lines = []
    for i, text in enumerate(WORDS):
        Image.fromarray(images[2 * i]).save(tmp_path / f"{i}.png")
        lines.append(json.dumps({"file_name": f"{i}.png", "text": text}) + "\n")
    (tmp_path / METADATA).write_text("".join(lines))
    before = sorted(tmp_path.iterdir())
    run(monkeypatch, tmp_path, "--model", model)
    wanted = 100 * np.maximum(cosines(model, images[::2], WORDS), 0).mean()
    assert float(capsys.readouterr().out.split()[-1]) == pytest.approx(wanted, abs=0.01)
    assert sorted(tmp_path.iterdir()) == before


def test_the_hash_is_of_the_weights(model, tmp_path):
    from transformers import CLIPModel, CLIPProcessor

    clip = CLIPModel.from_pretrained(model)
    CLIPProcessor.from_pretrained(model).save_pretrained(tmp_path)
    clip.save_pretrained(tmp_path, max_shard_size="10KB")
    device = torch.device("cpu")
    assert Clip(str(tmp_path), device).weights_hash() == Clip(str(model), device).weights_hash()
    clip.logit_scale.data += 1
    clip.save_pretrained(tmp_path, max_shard_size="10KB")
    assert Clip(str(tmp_path), device).weights_hash() != Clip(str(model), device).weights_hash()


def test_models_that_are_refused(model, folder, tmp_path, monkeypatch, capsys):
    def refused(path):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, folder, "--model", path)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    assert "--model: 'nothing' is not a folder; allowed: a hub id" in refused("nothing")
    (tmp_path / "empty").mkdir()
    assert f"cannot load CLIP from {tmp_path / 'empty'}" in refused(tmp_path / "empty")
    pickled = tmp_path / "pickled"
    shutil.copytree(model, pickled)
    (pickled / "model.safetensors").unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    assert "no file named model.safetensors found" in refused(pickled)
    other = tmp_path / "other"
    shutil.copytree(model, other)
    (other / "config.json").write_text('{"model_type": "bert"}')
    assert f"{other} holds bert, not clip" in refused(other)
    speechless = tmp_path / "speechless"
    shutil.copytree(model, speechless)
    (speechless / "tokenizer.json").unlink()
    assert "has a tokenizer of " in refused(speechless)
    assert not (folder / "clip_score.json").exists()
