"""Training on captions: resuming, starting from a model of classes, looks, other encoders."""

import contextlib
import json

import pytest
import torch
from tiny_encoders import write_encoder
from tiny_runs import ALONE, final, run, same

from config.load import parse_config
from core.conditions import Condition
from core.errors import ConfigError, UserError
from data.text.cache import TextCache
from data.text.caching import TextOptions, cache_text
from data.text.captions import CaptionOptions
from evaluations import likelihood
from models.build import build_model
from models.pretrained import find_checkpoint, load_pretrained, read_state
from training.checkpoint import initialise


@pytest.fixture
def flags(tiny_t2i, tmp_path):
    """A call that gives the flags of a tiny run of captions, changed as asked."""

    def make(name="run", **changes):
        values = {"run_dir": tmp_path / name, "resume": "auto", "device": "cpu"}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        return ["--config", str(tiny_t2i), *(f"--{key}={value}" for key, value in values.items())]

    return make


def test_a_run_in_two_parts_is_the_same(flags, tmp_path):
    run(flags("whole"))
    run(flags("parts", train__max_steps=2))
    run(flags("parts"))
    same(tmp_path / "whole", tmp_path / "parts")


def test_the_checkpoint_keeps_the_null_text_and_says_which_encoder(trained_t2i, text_cache_folder):
    texts = TextCache(text_cache_folder)
    for name in ("model", "ema"):
        tensors = final(trained_t2i, name)
        length = int(tensors["null_mask"].sum())
        assert torch.equal(tensors["null_text"][:length], texts.null.float())
        assert not tensors["null_text"][length:].any()
    facts = read_state(find_checkpoint(trained_t2i))["latents"]["text"]
    assert facts["encoder_hash"] == texts.facts.encoder_hash
    assert (trained_t2i / "samples/step_0000004.png").is_file()


def test_validation_losses_of_captions(flags, tmp_path, cache_folder, text_cache_folder):
    run(
        flags(
            train__val_every=2,
            data__val_cached_path=cache_folder,
            data__val_text_cached_path=text_cache_folder,
        )
    )
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line) for line in lines]
    assert sum("val/loss" in entry for entry in losses) == 2


def other_texts(cache_folder, text_cache_folder, tmp_path):
    """The same captions by another encoder."""
    captions = CaptionOptions(
        str(text_cache_folder.parent / "captions.jsonl"), None, "img", ("short", "long")
    )
    encoder = write_encoder(tmp_path / "other", seed=1)
    paths = str(cache_folder), str(tmp_path / "texts"), str(encoder)
    cache_text(TextOptions(captions, *paths, max_length=12), ALONE)
    return tmp_path / "texts"


def test_held_out_captions_are_by_the_encoder_of_those_trained_on(
    flags, cache_folder, text_cache_folder, tmp_path
):
    texts = other_texts(cache_folder, text_cache_folder, tmp_path)
    held_out = {"data__val_cached_path": cache_folder, "data__val_text_cached_path": texts}
    message = "data.val_text_cached_path: .* have different text encoders: encoder_hash"
    with pytest.raises(UserError, match=message):
        run(flags(train__val_every=2, **held_out))


def test_likelihood_of_captioned_images(
    trained_t2i, cache_folder, text_cache_folder, tmp_path, monkeypatch, capsys
):
    argv = ["likelihood", "--ckpt", trained_t2i, "--num-samples", 2, "--device", "cpu"]
    argv += ["--val-cached-path", cache_folder]
    monkeypatch.setattr("sys.argv", list(map(str, argv)))
    with pytest.raises(SystemExit):
        likelihood.main()
    assert "error: --val-text-cached-path: a model of text needs" in capsys.readouterr().err
    texts = other_texts(cache_folder, text_cache_folder, tmp_path)
    for path, expected in ((texts, "error: --val-text"), (text_cache_folder, "bits per")):
        monkeypatch.setattr("sys.argv", [*map(str, argv), "--val-text-cached-path", str(path)])
        with contextlib.suppress(SystemExit):
            likelihood.main()
        assert expected in "".join(capsys.readouterr())


def test_a_run_does_not_go_on_with_another_encoder(
    flags, cache_folder, text_cache_folder, tmp_path
):
    run(flags(train__max_steps=2))
    texts = other_texts(cache_folder, text_cache_folder, tmp_path)
    with pytest.raises(ConfigError, match="was trained on other texts: encoder_hash"):
        run(flags(data__text_cached_path=texts))
    with pytest.raises(UserError, match=r"init_from: .*other texts: encoder_hash"):
        run(flags("next", data__text_cached_path=texts, init_from=tmp_path / "run"))
    run(flags("fresh", data__text_cached_path=texts, init_from=tmp_path / "run", init_fresh="text"))


@pytest.mark.parametrize("classes", [0, 3])
def test_a_start_from_a_model_of_classes_begins_as_that_model(flags, trained, classes):
    argv = flags(init_from=trained, init_fresh="text", model__num_classes=classes)
    config = parse_config(argv, "train.py")
    before, model = load_pretrained(trained), build_model(config.model).eval()
    initialise(config, model, None)
    x = torch.randn(2, 3, 8, 8)
    t = torch.tensor([0.2, 0.7])
    text = Condition.of_rows([torch.randn(4, 16), torch.randn(2, 16)], 12)
    labels = torch.tensor([1, 2]) if classes else None
    found = model(x, t, Condition(labels, text.text, text.mask)).prediction
    wanted = before.model(x, t, torch.tensor([3, 3]) if labels is None else labels).prediction
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_fine_tuning_takes_everything(flags, trained_t2i, tmp_path, caplog):
    with caplog.at_level("INFO"):
        run(flags(init_from=trained_t2i, train__max_steps=1, optim__lr=1e-30))
    assert f'next: torchrun sample_ddp.py --ckpt {tmp_path / "run"} --prompt "TEXT"' in caplog.text
    before, after = final(trained_t2i, "ema"), final(tmp_path / "run", "model")
    for name, value in before.items():
        if "threshold" not in name:
            torch.testing.assert_close(after[name], value)
