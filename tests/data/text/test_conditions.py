"""Which caption an epoch takes, joined text caches, and what does not fit."""

import json
from collections import Counter

import pytest
import torch

from config.load import parse_config
from core.distributed import Processes
from core.errors import ConfigError, UserError
from data.conditions import Conditions
from data.latents import LatentCache
from data.sources import training_data
from data.text.cache import TextCache
from data.text.caching import TextOptions, cache_text
from data.text.captions import CaptionOptions, read_captions
from data.text.encoder import TextEncoder
from data.text.joined import joined
from data.text.online import OnlineCaptions

ALONE = Processes(0, 1, torch.device("cpu"))
ONLINE = [f"--data.{word}" for word in ("text_source=online", "captions=txt")]
ONLINE += ["--data.text_encoder=x", "--data.data_path=y"]
LABELS = torch.zeros(1, dtype=torch.int64)


@pytest.fixture(scope="module")
def texts(text_cache_folder):
    return TextCache(text_cache_folder)


def taken(conditions, texts, epochs, image=3):
    """How often each caption of an image is taken, by its text."""
    found = Counter()
    for epoch in range(epochs):
        cond = conditions.fetch([(epoch, image)], LABELS)
        row = cond.text[0][cond.mask[0]]
        for caption, _ in texts.choices(image):
            if torch.equal(texts.rows([caption])[0], row):
                found[texts.text(caption)] += 1
    return found


def test_captions_are_drawn_by_seed_epoch_and_image(texts):
    short, long = (texts.text(caption) for caption, _ in texts.choices(3))
    drawn = taken(Conditions(0, False, texts, length=12), texts, 400)
    assert set(drawn) == {short, long}
    assert abs(drawn[short] - 200) < 50
    assert drawn == taken(Conditions(0, False, texts, length=12), texts, 400)
    first = Conditions(0, False, texts, choice="first", length=12)
    assert taken(first, texts, 20) == {short: 20}
    weighted = Conditions(0, False, texts, choice={"short": 1, "long": 3}, length=12)
    found = taken(weighted, texts, 400)
    assert abs(found[long] - 300) < 50
    assert sum(found.values()) == 400
    only = Conditions(0, False, texts, choice={"short": 0.0, "long": 1.0}, length=12)
    assert taken(only, texts, 20) == {long: 20}
    shown = Conditions(5, False, texts, length=12).shown([3], LABELS)
    assert torch.equal(shown.text, first.fetch([(0, 3)], LABELS).text)


def test_weights_of_sources_that_are_not_there(texts):
    with pytest.raises(UserError, match=r"caption_choice: .* no captions of source 'llava'; it ha"):
        Conditions(0, False, texts, choice={"llava": 1.0})


def test_joined_texts_are_those_of_their_images(texts, text_cache_folder, cache_folder):
    latents = LatentCache(cache_folder)
    both = joined([TextCache(text_cache_folder) for _ in range(2)], [latents, latents])
    for image in (0, 22, 23, 45):
        mine, theirs = both.choices(image), texts.choices(image % 23)
        assert [source for _, source in mine] == [source for _, source in theirs]
        for (one, _), (other, _) in zip(mine, theirs, strict=True):
            assert torch.equal(both.rows([one])[0], texts.rows([other])[0])
    with pytest.raises(UserError, match=r"names 1 folder\(s\), but there are 2 of images"):
        joined([texts], [latents, latents])


def test_images_without_a_caption_of_any_weight_are_found_at_the_start(
    texts, cache_folder, text_encoder_folder, tmp_path
):
    names, path = LatentCache(cache_folder).names(), tmp_path / "captions.jsonl"
    rows = [{"img": name, "alt": "a dog"} for name in names]
    rows[4]["alt"] = ["a cat", "two cat"]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    captions = CaptionOptions(str(path), None, "img", ("alt",))
    folders = str(cache_folder), str(tmp_path / "texts"), str(text_encoder_folder)
    cache_text(TextOptions(captions, *folders, max_length=12), ALONE)
    both = joined([texts, TextCache(tmp_path / "texts")], [LatentCache(cache_folder)] * 2)
    message = r"caption_choice: image 23 of .* has captions of alt alone, none with a weight"
    for weights in ({"long": 1.0}, {"short": 1.0, "alt": 0.0}):
        with pytest.raises(UserError, match=message):
            Conditions(0, False, both, choice=weights)
    drawn = Conditions(0, False, both, choice={"short": 1.0, "alt": 1.0}, length=12)
    cond = drawn.fetch([(0, image) for image in range(46)], LABELS)
    assert cond.mask.sum(dim=1).min() > 2
    assert read_captions(captions, names).sources == ["alt"]
    online = OnlineCaptions("x", read_captions(captions, names), TextEncoder(folders[2], 12))
    assert online.first_without(["alt"]) is None
    assert online.first_without([]) == 0


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model.text_hidden_size", "24"], "model.text_hidden_size: 24 is configured, but .*16"),
        (["--model.text_max_length", "9"], "model.text_max_length: 9 is configured, but .* 12"),
        (["--data.text_cached_path", "absent"], "data.text_cached_path: absent"),
        (["--data.caption_choice", "{llava: 1}"], "no captions of source 'llava'"),
    ],
)
def test_texts_that_do_not_fit_the_config(tiny_t2i, flags, message):
    config = parse_config(["--config", str(tiny_t2i), *flags], "train.py")
    with pytest.raises(UserError, match=message):
        training_data(config, ALONE)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.horizontal_flip", "true"], "data.horizontal_flip: true is not allowed with t"),
        (
            ["--data.text_cached_path", "null"],
            "data.text_cached_path: model.text_hidden_size needs",
        ),
        (["--data.caption_choice", "{}"], "data.caption_choice: {} are no weights"),
        (["--data.caption_choice", "{a: -1}"], "are no weights"),
        (["--data.caption_choice", "often"], "data.caption_choice: 'often' is not allowed"),
        (["--data.captions", "txt"], "data.captions: has no effect here"),
        (["--data.text_source", "online"], "data.captions: data.text_source online needs it"),
        (
            [*ONLINE, "--data.cached_path", "[a, b]"],
            "data.cached_path: data.text_source online reads the captions of one folder",
        ),
        (["--train.val_every", "2", "--data.val_cached_path", "x"], "needs data.val_text_cached"),
        (["--model.text_hidden_size", "null"], "sampling.cfg_scale: 1.5 needs classes or text"),
        (["--model.text_refiner", "-1"], "model.text_refiner: -1"),
    ],
)
def test_keys_that_do_not_fit_each_other(tiny_t2i, flags, message):
    with pytest.raises(ConfigError, match=message):
        parse_config(["--config", str(tiny_t2i), *flags], "train.py")


def test_cached_and_online_texts_are_the_same(tiny_t2i, text_cache_folder, text_encoder_folder):
    cached = training_data(parse_config(["--config", str(tiny_t2i)], "train.py"), ALONE)
    flags = {
        "data.text_source": "online",  # the file's text_cached_path does not count then
        "data.captions": text_cache_folder.parent / "captions.jsonl",
        "data.path_key": "img",
        "data.caption_key": "short,long",
        "data.text_encoder": text_encoder_folder,
        "data.data_path": ".",
    }
    argv = ["--config", str(tiny_t2i), *(f"--{key}={value}" for key, value in flags.items())]
    online = training_data(parse_config(argv, "train.py"), ALONE)
    assert isinstance(online.conditions.captions, OnlineCaptions)
    assert online.conditions.text_facts() == cached.conditions.text_facts()
    assert torch.equal(online.conditions.null, cached.conditions.null)
    items = [(epoch, index) for epoch in (0, 1) for index in range(23)]
    one, other = (data.finish(data.__getitems__(items)) for data in (cached, online))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1].mask, other[1].mask)
    torch.testing.assert_close(one[1].text, other[1].text, atol=0.05, rtol=0)  # bf16
