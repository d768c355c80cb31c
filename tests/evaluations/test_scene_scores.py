"""The finder of scenes, GenEval's rules over what it finds, and the scores of images."""

import json
import shutil
import sys

import numpy as np
import pytest
from PIL import Image

from core.errors import UserError
from data.compositions import PALETTE, TAGS, Draw, Placed
from data.scenes import METADATA, PROMPTS, SIZE, paint, scans_of, write_scenes
from evaluations import scene_finder, scene_scores
from evaluations.digit_classifier import DigitClassifier, save_classifier
from evaluations.prompted import read_prompted
from evaluations.scene_crops import NOTHING, draw_crops, quadrants
from evaluations.scene_finder import (
    Found,
    TrainSettings,
    classify,
    colors_of,
    find,
    load_finder,
    measure,
    save_finder,
    train_finder,
)
from evaluations.scene_rules import check_scene, faults

FEW = TrainSettings(scenes=2500, epochs=5)


@pytest.fixture(scope="module")
def finder():
    return train_finder(draw_crops(FEW.scenes, False, FEW.seed), FEW)


@pytest.fixture(scope="module")
def finder_file(finder, tmp_path_factory):
    path = tmp_path_factory.mktemp("finder") / "finder.safetensors"
    save_finder(path, finder, {"seed": 0})
    return path


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    out = tmp_path_factory.mktemp("scenes") / "out"
    write_scenes(out, train=6, val=420, prompts=2)
    return out


def run(monkeypatch, module, *arguments):
    monkeypatch.setattr(sys, "argv", ["prog.py", *map(str, arguments)])
    module.main()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def scores(path):
    lines = lines_of(path)
    return {tag: np.mean([one["correct"] for one in lines if one["tag"] == tag]) for tag in TAGS}


# The rules


def seen(*words):
    """Findings from `red seven 00`, the surest first."""
    found = [word.split() for word in words]
    return [
        Found(digit, color, (int(place[0]), int(place[1])), 1 - i / 10)
        for i, (color, digit, place) in enumerate(found)
    ]


def item(digit, count=1, **more):
    return {"class": digit, "count": count} | more


SEVEN = [item("seven")]
RED_SEVEN = [item("seven", color="red")]
THREE_LEFT = [item("six"), item("three", position=["left of", 0])]
BOTH = [item("two", color="red"), item("four", color="blue")]
TWO_ONES = {"include": [item("one", 2)], "exclude": [item("one", 3)]}
ONE = "red one 00"


@pytest.mark.parametrize(
    ("found", "asked", "reasons"),
    [
        ([], SEVEN, ["expected seven>=1, found 0"]),
        (["red seven 00"], SEVEN, []),
        (["red seven 00", "blue two 01", "red two 11"], SEVEN, []),
        (["red two 00"], SEVEN, ["expected seven>=1, found 0"]),
        (["red seven 00"], RED_SEVEN, []),
        (["cyan seven 00"], RED_SEVEN, ["expected red seven>=1, found cyan"]),
        (["red two 00"], RED_SEVEN, ["expected seven>=1, found 0"]),
        # The surest of the class is judged.
        (["red seven 01", "cyan seven 00"], RED_SEVEN, []),
        (["cyan seven 00", "red seven 01"], RED_SEVEN, ["expected red seven>=1, found cyan"]),
        (["red two 00", "blue four 11"], BOTH, []),
        (
            ["blue two 00", "red four 11"],
            BOTH,
            ["expected red two>=1, found blue", "expected blue four>=1, found red"],
        ),
        (["red three 00", "red six 01"], THREE_LEFT, []),
        (["red three 10", "red six 01"], THREE_LEFT, []),  # below as well
        (
            ["red three 01", "red six 00"],
            THREE_LEFT,
            ["expected three left of target, found r"],
        ),
        (
            ["red three 00", "red six 10"],
            THREE_LEFT,
            ["expected three left of target, found a"],
        ),
        (
            ["red three 00"],
            THREE_LEFT,
            ["expected six>=1, found 0", "no target for three to be left of"],
        ),
        ([ONE, "blue one 11"], TWO_ONES, []),
        ([ONE, "red two 01"], TWO_ONES, ["expected one>=2, found 1"]),
        ([ONE, "red one 01", "red one 10"], TWO_ONES, ["expected one<3, found 3"]),
        ([ONE, "red one 01", "red two 10"], TWO_ONES, []),
    ],
)
def test_each_rule(found, asked, reasons):
    scene = asked if isinstance(asked, dict) else {"include": asked}
    got = faults(seen(*found), scene)
    assert len(got) == len(reasons)
    assert all(one.startswith(wanted) for one, wanted in zip(got, reasons, strict=True))


GOOD = {"tag": "colors", "include": [item("one")]}


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"tag": "colour"}, "tag: unknown 'colour'; known: color_attr"),
        ({"include": []}, "include: no list of objects"),
        ({"include": [item("bench")]}, r"include\[0\].class: unknown 'bench'; known: eight"),
        ({"include": [item("one", 0)]}, r"include\[0\].count: 0 is no whole number above 0"),
        ({"exclude": [item("one", "3")]}, r"exclude\[0\].count: '3' is no whole number"),
        ({"include": [item("one", color="pink")]}, r"include\[0\].color: unknown 'pink'"),
        ({"include": [item("one", position=["above", 0])]}, "the number of an earlier entry"),
        ({"unseen": 1}, "unseen: 1 is not allowed"),
    ],
)
def test_what_is_no_scene_is_refused(change, wanted):
    check_scene(GOOD)
    with pytest.raises(UserError, match=wanted):
        check_scene(GOOD | change)


# The finder


def test_held_out_digits_are_found(finder):
    shares = measure(finder, draw_crops(500, True, 1))
    assert shares["digits"] > 0.98
    assert shares["nothing"] == 1
    assert shares["colors"] == 1


def test_quadrants_and_labels_belong_together():
    crops = draw_crops(40, False, 0)
    assert crops.images.shape == (160, 16, 16, 3)
    empty = crops.images.reshape(160, -1).max(axis=1) == 0
    np.testing.assert_array_equal(empty, crops.labels == NOTHING)
    assert [color == "" for color in crops.colors] == empty.tolist()
    image = np.arange(SIZE * SIZE * 3).reshape(1, SIZE, SIZE, 3)
    np.testing.assert_array_equal(quadrants(image)[1], image[0, :16, 16:])
    np.testing.assert_array_equal(quadrants(image)[2], image[0, 16:, :16])


def test_findings_say_what_where_and_the_surest_first(finder):
    placed = [Placed("zero", "cyan", (0, 1)), Placed("six", "orange", (1, 0))]
    image = np.asarray(paint(placed, scans_of(True), Draw(0, "test", 0)))
    (found,) = find(finder, image[None])
    assert {(one.digit, one.color, one.quadrant) for one in found} == {
        (one.digit, one.color, one.quadrant) for one in placed
    }
    assert found[0].confidence >= found[1].confidence > scene_finder.THRESHOLD


@pytest.mark.parametrize("strength", [0.25, 1.0])
@pytest.mark.parametrize("ground", [0, 20])
def test_colors_do_not_depend_on_brightness_or_a_pale_ground(strength, ground):
    ink = np.zeros((16, 16, 1))
    ink[4:12, 6:9] = 1
    ink[4:12, 9:11] = 0.4
    for name, rgb in PALETTE.items():
        crop = (ground * strength + ink * strength * (np.array(rgb) - ground)).round()
        assert colors_of(crop.astype(np.uint8)[None]) == [name]


def test_the_finder_sees_through_small_faults_and_is_not_fooled(finder):
    crops = draw_crops(150, True, 2)
    is_digit = crops.labels != NOTHING
    digits, labels = crops.images[is_digit].astype(float), crops.labels[is_digit]
    rng = np.random.default_rng(0)
    noisy = digits + rng.normal(0, 15, digits.shape)
    faint, hazy = 0.6 * digits, 0.9 * digits + 25
    blurred = digits.copy()
    for axis in (1, 2):
        blurred = blurred / 2 + (np.roll(blurred, 1, axis) + np.roll(blurred, -1, axis)) / 4
    for spoilt in (noisy, faint, hazy, blurred):
        found, _ = classify(finder, spoilt.clip(0, 255).round().astype(np.uint8))
        assert (found == labels).mean() > 0.93
    others = np.roll(digits, 1, axis=0)[labels != np.roll(labels, 1)]
    half = (digits[labels != np.roll(labels, 1)] + others) / 2
    moved = np.concatenate([0 * digits[:, 8:], digits[:, :8]], axis=1)
    noise = rng.integers(0, 256, digits.shape)
    for nothing, most in ((half, 0.5), (moved, 0.1), (noise, 0.0)):
        found, _ = classify(finder, nothing.clip(0, 255).round().astype(np.uint8))
        assert (found != NOTHING).mean() <= most


def test_the_file_of_a_finder(finder, finder_file, tmp_path):
    crops = draw_crops(20, True, 3).images
    loaded = load_finder(finder_file)
    np.testing.assert_array_equal(classify(loaded, crops)[1], classify(finder, crops)[1])
    with pytest.raises(UserError, match=r"--finder: no file .*; make it with `python -m eval"):
        load_finder(tmp_path / "none")
    save_classifier(tmp_path / "c.safetensors", DigitClassifier(tuple("0123456789")))
    with pytest.raises(UserError, match=r"c.safetensors is no finder of scenes"):
        load_finder(tmp_path / "c.safetensors")
    (tmp_path / "t").write_text("words")
    with pytest.raises(UserError, match=r"--finder: cannot read"):
        load_finder(tmp_path / "t")


def test_the_program_trains_and_reports(tmp_path, monkeypatch, caplog, capsys):
    caplog.set_level("INFO")
    few = ["--out", tmp_path / "f.safetensors", "--epochs", 1, "--scenes"]
    run(monkeypatch, scene_finder, *few, 60)
    assert "of held-out scans" in caplog.text
    load_finder(tmp_path / "f.safetensors")
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, scene_finder, *few, 6)
    assert "--scenes: too few: 12 digits do not fill a batch of 64" in capsys.readouterr().err


# Scores


def test_real_held_out_scenes_are_the_ceiling(scenes, finder_file, tmp_path, monkeypatch, capsys):
    out = tmp_path / "results.jsonl"
    run(monkeypatch, scene_scores, scenes / "val", "--finder", finder_file, "--out", out)
    assert all(share >= 0.97 for share in scores(out).values()), scores(out)
    lines = lines_of(out)
    assert len(lines) == 420
    about = lines_of(scenes / "val" / METADATA)[4]
    line = lines[4]
    assert line["filename"] == str(scenes / "val" / about["file_name"])
    assert (line["tag"], line["prompt"]) == ("position", about["text"])
    assert json.loads(line["metadata"])["include"] == about["include"]
    assert set(json.loads(line["details"])) == {one["class"] for one in about["include"]}
    assert [one["unseen"] for one in lines] == [
        e["unseen"] for e in lines_of(scenes / "val" / METADATA)
    ]
    table = capsys.readouterr().out
    assert all(f"\n| {row} |" in table for row in ("all", "seen", "unseen"))


def picture_set(folder, asked, images, each=1, **changes):
    """A set of samples by prompts, with its images in an archive."""
    hashes = {"checkpoint_sha256": "c" * 64, "set_sha256": "5" * 64}
    record = hashes | {"config": {}, "prompts": asked, "num_per_prompt": each} | changes
    folder.mkdir(parents=True)
    texts = {name: np.array(value) for name, value in hashes.items()}
    np.savez(folder / "samples.npz", arr_0=images, **texts)
    (folder / "set.json").write_text(json.dumps({k: v for k, v in record.items() if v is not None}))
    return folder


@pytest.fixture
def asked(scenes):
    return lines_of(scenes / PROMPTS)


def pictures(scenes_folder, count):
    """Real scenes in place of samples."""
    files = sorted(scenes_folder.glob("*.png"))[:count]
    return np.stack([np.asarray(Image.open(file)) for file in files])


@pytest.mark.parametrize("kind", ["black", "noise", "clouds"])
def test_what_shows_nothing_scores_nothing(kind, asked, finder_file, tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    shape = (20 * len(asked), SIZE, SIZE, 3)
    images = np.zeros(shape, np.uint8)
    if kind == "noise":
        images = rng.integers(0, 256, shape, dtype=np.uint8)
    elif kind == "clouds":
        small = rng.integers(0, 256, (shape[0], 8, 8, 3), dtype=np.uint8)
        images = small.repeat(4, axis=1).repeat(4, axis=2)
    folder = picture_set(tmp_path / "set", asked, images, each=20)
    out = tmp_path / "r.jsonl"
    run(monkeypatch, scene_scores, folder, "--finder", finder_file, "--out", out)
    assert max(scores(out).values()) <= 0.03


def test_all_kinds_of_sources_score_the_same(scenes, finder_file, tmp_path, monkeypatch):
    """Two images of a prompt: its own scene and another one."""
    entries = lines_of(scenes / "val" / METADATA)[:12]
    asked = [
        {"prompt": e["text"]} | {k: e[k] for k in ("tag", "include", "exclude", "unseen")}
        for e in entries
    ]
    own = pictures(scenes / "val", 12)
    images = np.stack([own, np.roll(own, 1, axis=0)], axis=1).reshape(24, SIZE, SIZE, 3)
    archive = picture_set(tmp_path / "archive", asked, images, each=2)
    files = picture_set(tmp_path / "files", asked, images, each=2)
    texts = picture_set(tmp_path / "texts", [e["text"] for e in entries], images, each=2)
    layout = tmp_path / "layout"
    (files / "images").mkdir()
    for i, image in enumerate(images):
        picture = Image.fromarray(image)
        picture.save(files / "images" / f"{i:06d}.png")
        place = layout / f"{i // 2:05d}"
        (place / "samples").mkdir(parents=True, exist_ok=True)
        picture.save(place / "samples" / f"{i % 2:05d}.png")
        (place / METADATA).write_text(json.dumps(asked[i // 2]) + "\n")
    (files / "samples.npz").unlink()
    inside = picture_set(tmp_path / "inside", asked, images, each=2)
    (inside / "samples.npz").unlink()
    shutil.copytree(layout, inside / "geneval")
    (tmp_path / "p.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in asked))
    found = []
    for source in (archive, files, layout, inside, texts):
        out = tmp_path / f"{source.name}.jsonl"
        more = ["--prompts", tmp_path / "p.jsonl"] if source == texts else []
        run(monkeypatch, scene_scores, source, "--finder", finder_file, "--out", out, *more)
        found.append([(o["prompt"], o["correct"], o["unseen"]) for o in lines_of(out)])
        names = [o["filename"] for o in lines_of(out)]
        assert len(set(names)) == 24
    assert all(one == found[0] for one in found)
    right = [correct for _, correct, _ in found[0]]
    assert sum(right[0::2]) >= 11
    assert sum(right[1::2]) <= 3
    for folder in (archive, inside):
        source = read_prompted(folder)
        hashes = {"checkpoint_sha256": "c" * 64, "set_sha256": "5" * 64}
        assert (source.path, source.hashes) == (folder, hashes)
    assert read_prompted(layout).hashes == {}


BLACK = np.zeros((2, SIZE, SIZE, 3), np.uint8)
ASKED = [{"prompt": "a one", **GOOD}, {"prompt": "a two", **GOOD}]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"prompts": None}, "set.json: has no prompts, but classes; a set by prompts is wanted"),
        ({"prompts": []}, "prompts: no list of prompts"),
        ({"prompts": [{"text": "a one"}, "x"]}, "prompts: number 0 has no text as `prompt`"),
        ({"num_per_prompt": None}, "num_per_prompt: None is no whole number above 0"),
        ({"num_per_prompt": 2}, "has 2 images, its record 2 prompts with 2 each"),
        ({"set_sha256": "6" * 64}, "samples.npz: belongs to another set"),
        ({"prompts": ["a one", "a two"]}, "'a one': tag: unknown None; known: color_attr"),
        ({"prompts": ["a one", "a two"]}, "--prompts names the file that says"),
    ],
)
def test_sets_that_cannot_be_judged(changes, wanted, finder_file, tmp_path, monkeypatch, capsys):
    folder = picture_set(tmp_path / "set", ASKED, BLACK, **changes)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, scene_scores, folder, "--finder", finder_file)
    error = capsys.readouterr().err
    assert wanted in error
    assert error.count("\n") == 1


def test_sources_that_cannot_be_judged(finder_file, scenes, tmp_path, monkeypatch, capsys):
    def refused(*arguments):
        with pytest.raises(SystemExit, match="2"):
            run(monkeypatch, scene_scores, *arguments, "--finder", finder_file)
        return capsys.readouterr().err

    small = picture_set(tmp_path / "small", ASKED, BLACK[:, :16, :16])
    assert "scenes are (32, 32, 3), this is (16, 16, 3)" in refused(small)
    texts = picture_set(tmp_path / "texts", ["a one", "no such"], BLACK)
    (tmp_path / "p.jsonl").write_text(json.dumps(ASKED[0]))
    assert "has no prompt 'no such', which" in refused(texts, "--prompts", tmp_path / "p.jsonl")
    known = refused(scenes / "val", "--prompts", tmp_path / "p.jsonl")
    assert "--prompts: does nothing here" in known
    (tmp_path / "bad.jsonl").write_text(json.dumps(ASKED[0] | {"include": [item("bench")]}))
    wrong = refused(texts, "--prompts", tmp_path / "bad.jsonl")
    assert "bad.jsonl: line 1: include[0].class: unknown 'bench'" in wrong
    (tmp_path / "layout" / "00000").mkdir(parents=True)
    assert "00000/metadata.jsonl: no prompt: No such file" in refused(tmp_path / "layout")
    (tmp_path / "layout" / "00000" / METADATA).write_text(json.dumps(ASKED[0]))
    assert "00000/samples: no images in it" in refused(tmp_path / "layout")
    (tmp_path / "captions").mkdir()
    entry = {"file_name": "x.png", "text": "a one"}
    (tmp_path / "captions" / METADATA).write_text(json.dumps(entry))
    assert "line 1: file_name: no file" in refused(tmp_path / "captions")
    assert "holds no images of prompts" in refused(tmp_path)
