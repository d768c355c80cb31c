"""Scenes of coloured digits with captions."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data.compositions import (
    DIGITS,
    PALETTE,
    RELATIONS,
    TAGS,
    Draw,
    arrange,
    is_seen,
    relations,
    scene,
    unseen_color,
    unseen_relation,
)
from data.scenes import METADATA, PROMPTS, scans_of, write_scenes


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "out"
    assert write_scenes(out, train=60, val=24, prompts=3) == Counter(train=60, val=24, prompts=18)
    return out


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_task_is_there_equally_often_in_genevals_schema(scenes):
    for name, each in (("train", 10), ("val", 4)):
        found = entries(scenes / name / METADATA)
        assert Counter(e["tag"] for e in found) == dict.fromkeys(TAGS, each)
        for entry in found:
            image = Image.open(scenes / name / entry["file_name"])
            assert (image.size, image.mode) == ((32, 32), "RGB")
            assert all(item["class"] in DIGITS for item in entry["include"])
    assert Counter(e["tag"] for e in entries(scenes / PROMPTS)) == dict.fromkeys(TAGS, 3)
    counting = [e for e in entries(scenes / "train" / METADATA) if e["tag"] == "counting"]
    for entry in counting:
        (item,), (less,) = entry["include"], entry["exclude"]
        assert less == {"class": item["class"], "count": item["count"] + 1}
        assert entry["text"].split()[0] == ("", "", "two", "three", "four")[item["count"]]


def test_pictures_show_what_captions_say(scenes):
    """Colours in the quadrants: as many coloured quadrants as digits, in the colours asked for."""
    for entry in entries(scenes / "train" / METADATA):
        pixels = np.asarray(Image.open(scenes / "train" / entry["file_name"])).astype(float)
        bright = []
        for row in (0, 16):
            for column in (0, 16):
                part = pixels[row : row + 16, column : column + 16].reshape(-1, 3)
                if part.max() > 0:
                    bright.append(part[part.sum(axis=1).argmax()])
        assert len(bright) == sum(item["count"] for item in entry["include"])
        names = list(PALETTE)
        values = np.array([PALETTE[name] for name in names], float)
        seen = [names[np.linalg.norm(values - b, axis=1).argmin()] for b in bright]
        for item in entry["include"]:
            assert item.get("color", seen[0]) in seen, entry


@pytest.mark.parametrize("relation", RELATIONS)
def test_the_first_digit_stands_where_the_caption_says(relation):
    found = 0
    for index in range(4, 4 + 6 * 60, 6):
        asked = scene(1, "test", index, seen_only=False)
        if f" {relation} " not in asked.prompt:
            continue
        found += 1
        second, first = arrange(asked, Draw(1, "places", index), seen_only=False)
        assert asked.prompt.split()[1] == first.digit
        assert relations(first.quadrant, second.quadrant) == {relation}
    assert found > 5


def test_training_never_has_the_combinations_that_are_kept_back():
    """Neither in captions nor by chance in pictures."""
    for index in range(300):
        asked = scene(0, "train", index, seen_only=True)
        assert not asked.unseen
        placed = arrange(asked, Draw(0, "picture train", index), seen_only=True)
        assert is_seen(placed)
        assert not any(unseen_color(one.digit, one.color) for one in placed)
    for digit in DIGITS:
        assert sum(unseen_color(digit, color) for color in PALETTE) == 1
    relations_kept = {(d, r) for d in DIGITS for r in RELATIONS if unseen_relation(d, r)}
    assert relations_kept == set(zip(DIGITS[:4], RELATIONS, strict=True))
    held = [scene(0, "prompts", index, seen_only=False) for index in range(600)]
    share = Counter(one.tag for one in held if one.unseen)
    assert set(share) == {"colors", "position", "color_attr"}
    assert all(5 <= count <= 60 for count in share.values())


def test_training_and_held_out_scans_are_different_ones():
    train, val = scans_of(val=False), scans_of(val=True)
    assert sum(map(len, train.values())) == 1438
    assert sum(map(len, val.values())) == 359
    known = {scan.tobytes() for scans in train.values() for scan in scans}
    assert sum(scan.tobytes() in known for scans in val.values() for scan in scans) == 0


def test_scenes_are_functions_of_the_seed(scenes, tmp_path):
    write_scenes(tmp_path / "again", train=12, val=6, prompts=1)
    write_scenes(tmp_path / "other", train=12, val=6, prompts=1, seed=1)
    name = "000007.png"
    wanted = (scenes / "train" / name).read_bytes()
    assert (tmp_path / "again" / "train" / name).read_bytes() == wanted
    assert (tmp_path / "other" / "train" / name).read_bytes() != wanted
    with pytest.raises(UserError, match=r"again exists and holds something else"):
        write_scenes(tmp_path / "again", train=1, val=1, prompts=1)


def test_articles_are_those_of_the_spoken_words():
    prompts = {scene(0, "prompts", index, seen_only=False).prompt for index in range(600)}
    words = {tuple(text.split()[:2]) for text in prompts if text.startswith("a")}
    assert {("a", "one"), ("an", "eight"), ("an", "orange"), ("a", "two")} <= words
    assert not {("an", "one"), ("a", "eight"), ("a", "orange")} & words
