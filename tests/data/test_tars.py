"""Images in tar files: read as those of a folder, by several processes, and every refusal."""

import io
import json
import tarfile
from pathlib import Path

import pytest
import torch

from core.errors import ConfigError, UserError
from data.images import ImageFolder
from data.latents import LatentCache
from data.tars import TarImages, open_images
from data.text.captions import CaptionOptions, read_captions


def write_tar(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))
    return path


def sample(image: bytes, number: int) -> dict[str, bytes]:
    """An image and its captions, as WebDataset has them."""
    about = {"text": f"json {number}", "width": 17}
    return {
        f"{number:04d}.png": image,
        f"{number:04d}.txt": f"text {number}\nagain".encode(),
        f"{number:04d}.json": json.dumps(about).encode(),
    }


@pytest.fixture(scope="module")
def shards(image_root, tmp_path_factory) -> Path:
    """The 23 images of `image_root`, in its order, in three tar files."""
    root = tmp_path_factory.mktemp("tars")
    images = [Path(path).read_bytes() for path in ImageFolder(image_root).paths]
    for shard in range(3):
        files = {"./": b"", ".hidden.png": b""}
        for number in range(10 * shard, min(10 * shard + 10, 23)):
            files |= sample(images[number], number)
        write_tar(root / f"{shard:02d}.tar", {k: v for k, v in files.items() if k != "./"})
    (root / "notes.txt").write_text("")
    return root


def test_images_are_those_of_the_files(shards, image_root):
    images, files = open_images(shards), ImageFolder(image_root)
    assert isinstance(images, TarImages)
    assert (len(images), images.class_names, set(images.labels.tolist())) == (23, ["all"], {0})
    assert images.name(11) == "01.tar/0011.png"
    assert images.paths[11] == f"{shards}/01.tar/0011.png"
    assert all(torch.equal(images.load(n, 16), files.load(n, 16)) for n in range(23))
    one = open_images(shards / "01.tar")
    assert (len(one), one.name(1)) == (10, "01.tar/0011.png")
    assert torch.equal(one.load(1, 16), images.load(11, 16))
    assert isinstance(open_images(image_root), ImageFolder)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_latents_are_those_of_the_files(shards, make_cache, cache_folder, tmp_path, num_workers):
    out = make_cache(tmp_path / "cache", data_path=str(shards), num_workers=num_workers)
    cache, wanted = LatentCache(out), LatentCache(cache_folder)
    places = list(range(23)), [0, 1] * 11 + [0]
    assert torch.equal(cache.moments(*places), wanted.moments(*places))
    assert cache.names() == [f"0{n // 10}.tar/{n:04d}.png" for n in range(23)]


def test_captions_lie_beside_the_images(shards):
    names = [open_images(shards).name(n) for n in (3, 20)]
    text = read_captions(CaptionOptions("txt", str(shards)), names)
    assert [text.of(n) for n in range(2)] == [
        [("text 3", "txt"), ("again", "txt")],
        [("text 20", "txt"), ("again", "txt")],
    ]
    found = read_captions(CaptionOptions("json", str(shards / "02.tar")), names[1:])
    assert found.of(0) == [("json 20", "text")]
    rows = [{"file_name": name, "text": f"of {name}"} for name in names]
    (shards / "table.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for where in (shards, shards / "00.tar"):
        options = CaptionOptions(str(shards / "table.jsonl"), str(where))
        assert read_captions(options, names).of(1) == [(f"of {names[1]}", "text")]


def test_captions_that_are_missing_or_damaged_are_named(shards, tmp_path):
    image = (open_images(shards).files.read("00.tar/0000.png"), b"{")
    path = write_tar(tmp_path / "a.tar", {"x.png": image[0], "y.png": image[0], "y.json": image[1]})
    for name, said in (
        ("x", f"a.tar/x.png has no captions, {tmp_path}/a.tar/x.json is missing"),
        ("y", f"data.captions: {tmp_path}/a.tar/y.json: no JSON: "),
    ):
        with pytest.raises(ConfigError) as caught:
            read_captions(CaptionOptions("json", str(path)), [f"a.tar/{name}.png"])
        assert said in str(caught.value)
    with pytest.raises(ConfigError, match=r"a\.tar/x\.png lies in no class folder"):
        read_captions(CaptionOptions("template", str(path)), ["a.tar/x.png"])


def test_bad_tar_files_are_one_line(shards, tmp_path):
    whole = (shards / "00.tar").read_bytes()
    blocks = whole.rstrip(b"\0")
    blocks += bytes(-len(blocks) % 512)  # every file is whole, what ends a tar file is not there
    for content, said in (
        (b"", "cannot read {path}: empty file"),
        (b"no tar" * 200, "cannot read {path}: "),
        (whole[:700], "{path}"),
        (whole[:1024], "{path}"),
        (whole[:1600], "{path}"),
        (blocks, "{path} is cut off; its end is missing"),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_images(tmp_path)
        assert str(caught.value).startswith("image folder: ")
        assert said.format(path=tmp_path / "a.tar") in str(caught.value)
    write_tar(tmp_path / "a.tar", {"x.txt": b"words"})
    with pytest.raises(UserError, match=r"image folder: .* has no images \("):
        open_images(tmp_path)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in ("x.png", "./x.png"):
            tar.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"a\.tar holds \./x\.png twice"):
        open_images(tmp_path)


def test_unreadable_images_are_named(shards, tmp_path, make_cache):
    good = open_images(shards).files.read("00.tar/0000.png")
    write_tar(tmp_path / "a.tar", {"x.png": good, "y.png": good[: len(good) // 2]})
    images = open_images(tmp_path)
    with pytest.raises(UserError, match=rf"image: cannot read {tmp_path}/a\.tar/y\.png: "):
        images.load(1, 16)
    options = {"data_path": str(tmp_path / "a.tar"), "on_error": "skip"}
    assert LatentCache(make_cache(tmp_path / "cache", **options)).names() == ["a.tar/x.png"]
    (tmp_path / "a.tar").write_bytes(b"")
    with pytest.raises(UserError, match=rf"image: cannot read {tmp_path}/a\.tar/x\.png: cut off"):
        images.load(0, 16)
