"""Captions of every kind, and every bad input with its file and line."""

import csv
import json
from pathlib import Path

import pytest

from core.errors import ConfigError
from data.text.captions import CaptionOptions, read_captions

NAMES = ["golden_retriever/1.png", "golden_retriever/2.jpg", "tree/deep/3.webp"]


def texts(root: Path, contents: dict[str, str]) -> Path:
    for name, content in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode("utf-8", "surrogateescape"))
    return root


def table(path: Path, rows: list) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    else:
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def read(kind: str, root: Path | None = None, names=NAMES, **options):
    root = None if root is None else str(root)
    return read_captions(CaptionOptions(kind, root, **options), names)


def all_of(captions) -> list[list[tuple[str, str]]]:
    return [captions.of(image) for image in range(len(captions))]


def entry(name: str, text, **more) -> dict:
    return {"file_name": name, "text": text, **more}


def test_class_folders_through_a_template():
    captions = read("template", template="a photo of a {}, outdoors")
    assert all_of(captions) == [
        [("a photo of a golden retriever, outdoors", "template")],
        [("a photo of a golden retriever, outdoors", "template")],
        [("a photo of a tree, outdoors", "template")],
    ]
    assert len(captions.texts) == 2  # each text once
    assert captions.numbers.tolist() == [0, 0, 1]


def test_text_files_beside_the_images_have_a_caption_on_each_line(tmp_path):
    root = texts(
        tmp_path,
        {
            "golden_retriever/1.txt": "a dog\n a good dog \n",
            "golden_retriever/2.txt": "a dög",
            "tree/deep/3.txt": "a dog\r\n\n",
        },
    )
    captions = read("txt", root)
    assert all_of(captions) == [
        [("a dog", "txt"), ("a good dog", "txt")],
        [("a dög", "txt")],
        [("a dog", "txt")],
    ]
    assert captions.texts == ["a dog", "a good dog", "a dög"]
    assert captions.sources == ["txt"]


def test_metadata_of_an_image_folder(tmp_path):
    table(tmp_path / "metadata.jsonl", [entry(name, f"of {name}") for name in NAMES])
    assert all_of(read("metadata", tmp_path)) == [[(f"of {name}", "text")] for name in NAMES]


def test_metadata_lies_in_folders_of_classes_too_and_may_be_csv(tmp_path):
    dogs = [["file_name", "caption"], ["2.jpg", "two,\nthe dog"], ["1.png", "one"]]
    table(tmp_path / "golden_retriever" / "metadata.csv", dogs)
    table(tmp_path / "tree" / "metadata.jsonl", [entry("deep/3.webp", ["a tree", "leaves"])])
    assert all_of(read("metadata", tmp_path)) == [
        [("one", "caption")],
        [("two,\nthe dog", "caption")],
        [("a tree", "text"), ("leaves", "text")],
    ]


def test_any_table_by_its_keys(tmp_path, caplog):
    caplog.set_level("INFO", logger="diffmoe")
    rows = [
        {"img_path": f"./{name}", "prompt": f"p {name}", "Task2": {"Caption": ["c", "d"]}}
        for name in [*reversed(NAMES), "gone/4.png", "gone/5.png"]
    ]
    path = table(tmp_path / "elsewhere" / "train.jsonl", rows)
    keys = {"path_key": "img_path", "caption_keys": ("prompt", "Task2.Caption")}
    captions = read(path, tmp_path / "images", **keys)
    task = [("c", "Task2.Caption"), ("d", "Task2.Caption")]
    assert all_of(captions) == [[(f"p {name}", "prompt"), *task] for name in NAMES]
    assert captions.sources == ["prompt", "Task2.Caption"]
    said = "2 entries are of images that are not there, first ./gone/4.png"
    assert said in caplog.text
    # Without an image folder, names are those of the cache.
    assert all_of(read(path, **keys)) == all_of(captions)


def test_several_entries_of_an_image_add_up_and_absolute_paths_are_found(tmp_path):
    rows = [entry(str(tmp_path / name), f"{n} {name}") for n in range(2) for name in NAMES]
    path = table(tmp_path / "all.jsonl", rows)
    wanted = [[(f"0 {name}", "text"), (f"1 {name}", "text")] for name in NAMES]
    assert all_of(read(path, tmp_path)) == wanted


def test_metadata_of_another_folder_is_not_taken_for_that_of_the_images(tmp_path):
    rows = [entry(name, "x") for name in NAMES]
    for name in ("val/metadata.jsonl", "val/other.jsonl"):
        table(tmp_path / name, rows)
    (tmp_path / "train").mkdir()
    assert len(read(str(tmp_path / "val" / "other.jsonl"), tmp_path / "train")) == 3
    with pytest.raises(ConfigError, match="3 of 3 images have no caption"):
        read(str(tmp_path / "val" / "metadata.jsonl"), tmp_path / "train")


ONE = ["a/1.png"]


def test_marks_of_byte_order_are_no_part_of_captions_and_keys(tmp_path):
    mark = "\ufeff"
    texts(tmp_path, {"a/1.txt": f"{mark}one", "a/1.json": f'{mark}{{"text": "one"}}'})
    texts(tmp_path, {"a/x.csv": f"{mark}file_name,text\na/1.png,one\n"})
    texts(tmp_path, {"metadata.jsonl": f'{mark}{{"file_name": "a/1.png", "text": "one"}}\n'})
    (tmp_path / "a/x.csv").rename(tmp_path / "x.csv")
    for kind in ("txt", "json", "metadata", str(tmp_path / "x.csv")):
        assert read(kind, tmp_path, ONE).texts == ["one"]


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({}, "data.captions: a/1.png has no captions, {root}/a/1.txt is missing"),
        ({"a/1.txt": ""}, "data.captions: {root}/a/1.txt line 1: an empty caption"),
        ({"a/1.txt": "one\n  \ntwo"}, "{root}/a/1.txt line 2: an empty caption"),
        ({"a/1.txt": "one\ntw\udcff"}, "{root}/a/1.txt line 2: not UTF-8"),
    ],
)
def test_bad_text_files(tmp_path, contents, said):
    with pytest.raises(ConfigError) as caught:
        read("txt", texts(tmp_path, contents), ONE)
    assert said.format(root=tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"file_name": "a/1.png", "text": "x"}\n{', "line 2: no JSON: "),
        ('{"file_name": "a/1.png", "text": "x"}\n\n', "line 2: empty; wanted: an entry in JSON"),
        ("[1]", "line 1: no mapping of keys: [1]"),
        ('{"name": "x"}', "line 1: no 'file_name', which should name the image; its keys: name; -"),
        ('{"file_name": 3}', "line 1: 'file_name' is no path: 3"),
        ('{"file_name": "a/1.png", "words": ""}', "line 1: neither text nor caption; its keys: fi"),
        ('{"file_name": "a/1.png", "text": " "}', "line 1: 'text' is an empty caption"),
        ('{"file_name": "a/1.png", "text": []}', "line 1: 'text' is an empty list"),
        ('{"file_name": "a/1.png", "text": 3}', "line 1: 'text' is no text: 3"),
        ('{"file_name": "a/1.png", "text": ["x", ""]}', "line 1: 'text' is an empty caption"),
        ('{"file_name": "a/1.png", "text": null, "caption": "x"}', "no caption at 'text'; its key"),
        ('{"file_name": "a/1.png", "text": "\\ud800"}', "line 1: 'text' holds half of a character"),
        ('{"file_name": "a/1.png", "text": "\udcff"}', "line 1: not UTF-8"),
        ('{"file_name": "b", "text": "x"}', "1 of 1 images have no caption in {path}, first a/1.p"),
    ],
)
def test_bad_lines_of_json(tmp_path, content, said):
    texts(tmp_path, {"images/metadata.jsonl": content})
    path = tmp_path / "images" / "metadata.jsonl"
    for kind in ("metadata", str(path)):
        with pytest.raises(ConfigError) as caught:
            read(kind, tmp_path / "images", ONE)
        assert str(caught.value).startswith("data.captions: ")
        assert str(path) in str(caught.value)
        assert said.format(path=path) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("file_name,text\na/1.png,one,more\n", "line 2: not the 2 columns of the first line"),
        ("file_name,text\na/1.png\n", "line 2: not the 2 columns of the first line"),
        ("file_name,text\na/1.png,\n", "line 2: 'text' is an empty caption"),
        ('file_name,text\na/1.png,"one\n', "line 2: unexpected end of data"),
        ("", "1 of 1 images have no caption in"),
    ],
)
def test_bad_lines_of_csv(tmp_path, content, said):
    texts(tmp_path, {"metadata.csv": content})
    with pytest.raises(ConfigError) as caught:
        read("metadata", tmp_path, ONE)
    assert said in str(caught.value)


def test_what_cannot_be_asked_for(tmp_path):
    for kind, options, said in (
        ("words", {}, "data.captions: unknown 'words'; allowed: txt, json, metadata, template, or"),
        ("txt", {}, "data.data_path: captions 'txt' lie in the image folder, which is to be named"),
        ("template", {"template": "a dog"}, "data.captions_template: 'a dog' needs one {} where"),
        ("template", {"template": "{} {}"}, "'{} {}' needs one {} where the name"),
        (str(tmp_path / "none.jsonl"), {}, f"data.captions: cannot read {tmp_path}/none.jsonl: No"),
    ):
        with pytest.raises(ConfigError) as caught:
            read(kind, **options)
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match=r"1\.png lies in no class folder, whose name a template"):
        read("template", names=["1.png"])
    with pytest.raises(ConfigError, match=r"has neither metadata\.jsonl nor metadata\.csv"):
        read("metadata", tmp_path)
    texts(tmp_path, {"metadata.csv": "", "metadata.jsonl": ""})
    with pytest.raises(ConfigError, match=r"metadata\.csv lie in the same folder"):
        read("metadata", tmp_path)
