"""Text caches: what is read back, what is refused, and bytes that depend on nothing else."""

import collections
import dataclasses
import json
import logging
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from tiny_encoders import WIDTH, write_encoder

from core.distributed import Processes
from core.errors import UserError
from data.latents import LatentCache
from data.text.cache import TextCache
from data.text.caching import TextOptions, cache_text, verify_text
from data.text.captions import CaptionOptions, read_captions
from data.text.encoder import TextEncoder
from data.text.manifest import KINDS, WHOLE

SINGLE = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("encoder") / "bert")


@pytest.fixture(scope="module")
def table(cache_folder, tmp_path_factory):
    """Two captions of each of the 23 images, most of them of several images."""
    path = tmp_path_factory.mktemp("captions") / "captions.jsonl"
    rows = []
    for number, name in enumerate(LatentCache(cache_folder).names()):
        short = ["a dog", "a red dog", "one cat", "two green cat"][number % 4]
        long = "the photo of " + "a red cat and " * (number % 3) + "one dog" * (number != 5)
        rows.append({"img": name, "short": short, "long": [long, f"dog {number}"]})
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def make(table, encoder_folder, cache_folder):
    """A call that writes a text cache into a folder."""

    def write(out, keys=("short", "long"), **changes):
        captions = CaptionOptions(str(table), None, "img", keys)
        options = {"cached_path": str(cache_folder), "text_cached_path": str(out)}
        options |= {"text_encoder": str(encoder_folder), "max_length": 12, "batch_size": 4}
        cache_text(TextOptions(captions, **(options | {"shard_size": 8} | changes)), SINGLE)
        return out

    return write


@pytest.fixture(scope="module")
def text_folder(make, tmp_path_factory):
    return make(tmp_path_factory.mktemp("text") / "cache")


def contents(folder) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def flip(path, place: int = -1) -> None:
    whole = bytearray(path.read_bytes())
    whole[place] ^= 1
    path.write_bytes(whole)


def test_captions_and_rows_are_read_back(text_folder, table, encoder_folder, cache_folder):
    cache = TextCache(text_folder)
    options = CaptionOptions(str(table), None, "img", ("short", "long"))
    captions = read_captions(options, LatentCache(cache_folder).names())
    assert (len(cache), cache.sources) == (23, ["short", "long"])
    assert cache.captions == len(captions.texts) == len(set(captions.texts)) == 23 + 4 + 4
    for image in range(23):
        found = [(cache.text(c), cache.sources[s]) for c, s in cache.choices(image)]
        assert found == captions.of(image)
        assert len(found) == 3
    encoder = TextEncoder(str(encoder_folder), 12)
    everything = list(range(cache.captions))
    for number, rows in zip(everything, cache.rows(everything), strict=True):
        alone = encoder.encode([cache.text(number)])[0]
        assert rows.dtype == torch.bfloat16
        assert rows.shape == alone.shape
        assert torch.allclose(rows.float(), alone.float(), atol=0.05)
    assert len({len(rows) for rows in cache.rows(everything)}) > 3
    assert torch.equal(cache.null, encoder.encode([""])[0])
    assert cache.facts == encoder.facts()
    repeated = cache.rows([5, 0, 5])
    assert torch.equal(repeated[0], repeated[2])
    assert not torch.equal(repeated[0], repeated[1])
    cache.verify()
    cache.check_images(LatentCache(cache_folder))
    with pytest.raises(IndexError):
        cache.choices(23)
    with pytest.raises(IndexError):
        cache.rows([-1])


def test_files_are_plain_arrays_without_padding(text_folder):
    names = [f"{kind}-0000{n}.{end}" for kind, end in KINDS.items() for n in range(4)]
    assert sorted(contents(text_folder)) == sorted([*names, *WHOLE, "manifest.json"])
    tokens = np.load(text_folder / "tokens-00001.npy")
    offsets = np.load(text_folder / "offsets-00001.npy")
    assert (tokens.dtype, offsets[0], offsets[-1]) == (np.uint16, 0, len(tokens))
    assert (len(offsets) - 1, tokens.shape[1]) == (8, WIDTH)
    assert not (tokens == 0).all(axis=1).any()


def test_float32_and_what_is_stated(make, tmp_path, caplog):
    caplog.set_level("INFO", logger="diffmoe")
    exact = TextCache(make(tmp_path / "exact", dtype="float32", max_length=9))
    numbers = list(range(exact.captions))
    rows = exact.rows(numbers)
    assert {row.dtype for row in rows} == {exact.null.dtype} == {torch.float32}
    total = sum(len(row) for row in rows)
    stated = re.search(
        r"(\d+) images, (\d+) captions, (\d+) of them distinct, (\S+) t", caplog.text
    )
    assert stated.groups() == ("23", "69", "31", f"{total / 31:.1f}")
    assert (
        f"{total * WIDTH * 4 / 1e9:.3g} GB ({31 * 9 * WIDTH * 4 / 1e9:.3g} GB if padd"
        in caplog.text
    )
    assert (
        "3 captions are cut at 9 tokens, the longest has 15; first 'the photo of a" in caplog.text
    )


def test_copies_for_other_processes_map_for_themselves(text_folder):
    cache = TextCache(text_folder)
    wanted = cache.rows([3, 9])
    copy = pickle.loads(pickle.dumps(cache))
    assert len(pickle.dumps(cache)) < 50_000
    assert all(torch.equal(a, b) for a, b in zip(copy.rows([3, 9]), wanted, strict=True))
    assert (copy.choices(4), copy.text(9)) == (cache.choices(4), cache.text(9))


def test_bytes_do_not_depend_on_interruptions(make, text_folder, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    monkeypatch.setattr("data.text.caching._finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(out)
    monkeypatch.undo()
    with pytest.raises(UserError, match="is not a finished text cache"):
        TextCache(out)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("tokens-*.npy")}
    (out / ".tokens-00001.npy.1.tmp").write_bytes(b"left by a killed process")
    (out / "done-00000.json").unlink()
    (out / "offsets-00002.npy").write_bytes(b"cut")
    make(out)
    again = {path.name for path, when in kept.items() if path.stat().st_mtime_ns != when}
    assert again == {"tokens-00000.npy", "tokens-00002.npy"}
    assert contents(out) == contents(text_folder)


def test_a_finished_cache_is_kept_and_another_plan_is_refused(make, tmp_path, monkeypatch):
    out = make(tmp_path / "done")
    with pytest.raises(UserError, match=r"data\.text_cached_path: .* is a finished cache; --overw"):
        make(out)
    make(out, overwrite=True, shard_size=30)
    assert len(TextCache(out).manifest.shards) == 2
    part = tmp_path / "part"
    monkeypatch.setattr("data.text.caching._finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make(part)
    monkeypatch.undo()
    other = write_encoder(tmp_path / "other", seed=1)
    for changes, named in (
        ({"text_encoder": str(other)}, "encoder_hash"),
        ({"max_length": 10, "layer": 1}, "max_length, layer"),
        ({"dtype": "float32", "batch_size": 3}, "dtype, batch_size"),
        ({"keys": ("long",)}, "captions"),
    ):
        with pytest.raises(UserError, match=f"holds an unfinished cache with another {named}; --o"):
            make(part, **changes)
    shutil.copytree(TextCache(out).facts.encoder, tmp_path / "moved")
    make(part, text_encoder=str(tmp_path / "moved"))
    assert TextCache(part).facts.difference(TextCache(out).facts) is None


def test_a_disk_without_room_is_refused_before_anything_is_written(make, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 3000, 3000))
    with pytest.raises(UserError, match=r"needs 4\.86e-06 GB more, its disk has 3e-06 GB left"):
        make(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))


def test_an_encoder_without_rows_for_the_empty_caption_is_refused(make, tmp_path):
    bare = write_encoder(tmp_path / "bare", "bare")
    with pytest.raises(UserError, match="makes no token of the caption ''"):
        make(tmp_path / "cache", text_encoder=str(bare))


def test_captions_of_other_images_are_refused(text_folder, make_cache, tmp_path, image_root):
    cache = TextCache(text_folder)
    shutil.copytree(image_root, tmp_path / "images")
    (tmp_path / "images" / "class1" / "01.png").rename(tmp_path / "images" / "class1" / "001.png")
    options = {"data_path": str(tmp_path / "images"), "shard_size": 23}
    renamed = make_cache(tmp_path / "renamed", **options)
    with pytest.raises(UserError) as caught:
        cache.check_images(LatentCache(renamed))
    assert str(caught.value) == (
        f"data.text_cached_path: {text_folder} is not of the images of {renamed} (23 images each, "
        "of other names); make the text cache again with main_cache.py --text-only"
    )
    (tmp_path / "images" / "class1" / "001.png").unlink()
    fewer = make_cache(tmp_path / "fewer", **options)
    with pytest.raises(UserError, match=rf"images of {fewer} \(23 images and 22\); make"):
        cache.check_images(LatentCache(fewer))
    with pytest.raises(UserError, match=r"\(23 images and 22\)"):
        verify_text(str(text_folder), str(fewer))


def test_latents_in_other_shards_are_of_the_same_images(text_folder, make_cache, tmp_path):
    TextCache(text_folder).check_images(LatentCache(make_cache(tmp_path / "one", shard_size=23)))


def test_another_encoder_is_named(text_folder):
    cache = TextCache(text_folder)
    cache.check_encoder(cache.facts, "x.pt")
    with pytest.raises(UserError) as caught:
        cache.check_encoder(dataclasses.replace(cache.facts, max_length=9), "x.pt")
    assert str(caught.value) == (
        f"data.text_cached_path: {text_folder} and x.pt have different text encoders: max_length "
        "12 and 9"
    )


def read_everything(folder) -> None:
    cache = TextCache(folder)
    cache.rows(range(8, 16))
    cache.choices(0)
    cache.text(9)


@pytest.mark.parametrize("name", [*(f"{kind}-00001.{end}" for kind, end in KINDS.items()), *WHOLE])
def test_lost_cut_and_changed_files_are_named(text_folder, tmp_path, name):
    folder = tmp_path / "cache"
    shutil.copytree(text_folder, folder)
    flip(folder / name)
    with pytest.raises(UserError) as caught:
        verify_text(str(folder))
    said = f"data.text_cached_path: {folder / name} changed since it was written"
    assert str(caught.value).startswith(said)
    with pytest.raises(UserError) as caught:
        read_everything(folder)
    assert str(caught.value).startswith(said)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{name} has {len(whole) - 1} bytes, the manifest says "):
        TextCache(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        TextCache(folder)


def test_a_flipped_byte_is_found_in_its_caption_alone(text_folder, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(text_folder, folder)
    flip(folder / "tokens-00001.npy")
    cache = TextCache(folder)
    assert len(cache.rows(range(15))) == 15
    with pytest.raises(UserError, match=r"tokens-00001\.npy changed .*, at caption 7 of it; make"):
        cache.rows([15])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "has version 2, this code reads 1"),
        ({"captions": 30}, "is damaged: captions 30 is not that of the shards, 31"),
        ({"images": "23"}, "is damaged: images '23' is not a whole number"),
        ({"sources": [1]}, "is damaged: sources [1] is not a list of str"),
        ({"files": {}}, "is damaged: files are not null.npy, "),
        (
            {"facts": {"hidden_size": 15}},
            "null.npy has 192 bytes, 2 rows of 15 in bfloat16 need 188",
        ),
        ({"facts": {"dtype": "float16"}}, "is damaged: dtype 'float16' is none of bfloat16, fl"),
        ({"facts": {"layer": "1"}}, "is damaged: layer '1' is not int"),
        ({"facts": {"more": 1}}, "is damaged: "),
        ({"shards": []}, "is damaged: captions 31 is not that of the shards, 0"),
        ({"latent_shape": [4, 8, 8]}, "is a cache of latents, not of captions"),
    ],
)
def test_damaged_manifests_are_one_line(text_folder, tmp_path, changes, said):
    values = json.loads((text_folder / "manifest.json").read_text())
    facts = values["facts"] | changes.get("facts", {})
    (tmp_path / "manifest.json").write_text(json.dumps(values | changes | {"facts": facts}))
    with pytest.raises(UserError) as caught:
        TextCache(tmp_path)
    assert str(caught.value).startswith("data.text_cached_path: ")
    assert said in str(caught.value)


def test_other_folders_are_no_text_cache(cache_folder, tmp_path):
    with pytest.raises(UserError, match="is a cache of latents, not of captions"):
        TextCache(cache_folder)
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*manifest\.json: Expecting property name"):
        TextCache(tmp_path)


def test_nothing_is_logged_by_reading(text_folder, caplog):
    caplog.set_level(logging.INFO)
    TextCache(text_folder).rows([0])
    assert caplog.text == ""
