"""Captions by main_cache.py: with latents or after them, killed, and by several processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from programs import Program
from tiny_encoders import write_encoder

import main_cache
from core.locks import exclusive
from data.latents import LatentCache
from data.making import ALONE
from data.text.cache import TextCache

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def inputs(image_root, tmp_path_factory):
    """The images with a metadata.jsonl, and an encoder."""
    root = tmp_path_factory.mktemp("inputs")
    images = root / "images"
    shutil.copytree(image_root, images)
    names = sorted(str(path.relative_to(images)) for path in images.rglob("*.png"))
    rows = [{"file_name": name, "text": f"a {'red ' * (n % 7)}dog"} for n, name in enumerate(names)]
    (images / "metadata.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return images, write_encoder(root / "encoder")


def words(inputs, vae_folder, out: Path, text: Path, *more) -> list[str]:
    """Flags that write both caches, 8 images a shard."""
    images, encoder = inputs
    flags = {"--data-path": images, "--cached-path": out, "--vae-path": vae_folder}
    flags |= {"--img-size": 16, "--shard-size": 8, "--num-workers": 0}
    return [*in_a_row(flags), *text_words(encoder, text, *more)]


def text_words(encoder: Path, text: Path, *more) -> list[str]:
    flags = {"--captions": "metadata", "--text-encoder": encoder, "--text-cached-path": text}
    flags |= {"--text-max-length": 12, "--text-batch-size": 3, "--device": "cpu"}
    return [*in_a_row(flags), *map(str, more)]


def in_a_row(flags: dict) -> list[str]:
    return [str(part) for pair in flags.items() for part in pair]


def run_here(monkeypatch, *argv) -> None:
    monkeypatch.setattr(sys, "argv", ["main_cache.py", *map(str, argv)])
    main_cache.main()


def refusal(monkeypatch, capsys, *argv) -> str:
    """The line that a program ends with."""
    with pytest.raises(SystemExit) as stop:
        run_here(monkeypatch, *argv)
    assert stop.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture(scope="module")
def both(inputs, vae_folder, tmp_path_factory):
    """Folders of latents and text, as one uninterrupted command writes them."""
    root = tmp_path_factory.mktemp("both")
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, *words(inputs, vae_folder, root / "latents", root / "text"))
    return root / "latents", root / "text"


def test_one_command_writes_both(both, monkeypatch):
    latents, text = both
    cache = TextCache(text)
    cache.check_images(LatentCache(latents))
    assert LatentCache(latents).views == 1  # a mirrored image would contradict "left of"
    assert (len(cache), cache.captions, cache.sources) == (23, 7, ["text"])
    assert [cache.text(caption) for caption, _ in cache.choices(3)] == ["a red red red dog"]
    run_here(monkeypatch, "--verify", "--cached-path", latents, "--text-cached-path", text)


def test_text_alone_on_latents_that_are_there(both, inputs, tmp_path, monkeypatch):
    latents, text = both
    images, encoder = inputs
    alone = ["--text-only", "--cached-path", latents, "--shard-size", "8"]
    run_here(monkeypatch, *text_words(encoder, tmp_path / "again", *alone, "--data-path", images))
    assert contents(tmp_path / "again") == contents(text)
    # Neither the images nor a VAE are needed for captions of class folders.
    flags = ["--captions", "template", "--caption-template", "the photo of {}"]
    run_here(monkeypatch, *text_words(encoder, tmp_path / "classes", *alone, *flags))
    classes = TextCache(tmp_path / "classes")
    assert [classes.text(number) for number in range(3)] == [
        *("the photo of class0", "the photo of class1", "the photo of class2")
    ]
    assert {source for image in range(23) for _, source in classes.choices(image)} == {0}


def test_captions_are_looked_at_before_the_first_image(
    inputs, vae_folder, tmp_path, monkeypatch, capsys
):
    images = tmp_path / "images"
    shutil.copytree(inputs[0], images)
    lines = (images / "metadata.jsonl").read_text().splitlines(keepends=True)
    (images / "metadata.jsonl").write_text("".join(lines[1:]))
    argv = words((images, inputs[1]), vae_folder, tmp_path / "latents", tmp_path / "text")
    line = refusal(monkeypatch, capsys, *argv)
    assert line.startswith("error: --captions: 1 of 23 images have no caption in ")
    assert line.endswith("metadata.jsonl, first class0/00.png")
    bare = write_encoder(tmp_path / "bare", "bare")
    argv = words((inputs[0], bare), vae_folder, tmp_path / "latents", tmp_path / "text")
    line = refusal(monkeypatch, capsys, *argv)
    assert "makes no token of the caption ''" in line
    assert not (tmp_path / "latents").exists()


def test_the_same_command_goes_on_after_the_latents(
    both, inputs, vae_folder, tmp_path, monkeypatch, capsys
):
    latents = tmp_path / "latents"
    shutil.copytree(both[0], latents)
    kept = contents(latents)
    argv = words(inputs, vae_folder, latents, tmp_path / "text")
    for changes, named in (
        (["--img-size", "8"], "image_size"),
        (["--dtype", "float32"], "dtype"),
        (["--views", "2"], "views"),
        (["--data-path", inputs[0] / "class0"], "data_path"),
    ):
        line = refusal(monkeypatch, capsys, *argv, *changes)
        assert f"is a finished cache with another {named}; --text-only takes it as" in line
    run_here(monkeypatch, *argv)
    assert contents(latents) == kept
    assert contents(tmp_path / "text") == contents(both[1])
    line = refusal(monkeypatch, capsys, *argv)
    assert line == (
        f"error: --text-cached-path: {tmp_path}/text is a finished cache; --overwrite replaces it"
    )


def test_a_killed_run_goes_on_and_writes_the_same_bytes(both, inputs, tmp_path, monkeypatch):
    latents, _ = both
    images, encoder = inputs
    out = tmp_path / "text"
    argv = ["--text-only", "--cached-path", latents, "--data-path", images, "--shard-size", "2"]
    argv = text_words(encoder, out, *argv)
    kill = """
before(os, "replace", lambda old, new: Path(new).name == "done-00002.json" and os.kill(
    os.getpid(), signal.SIGKILL))
"""
    code, _ = Program("main_cache", argv, tmp_path / "log", kill).end()
    assert code == -signal.SIGKILL
    assert len(list(out.glob("done-*.json"))) == 2
    assert (out / ".lock").exists()
    assert list(out.glob(".done-00002.json.*.tmp"))
    kept = (out / "tokens-00000.npy").stat().st_mtime_ns
    run_here(monkeypatch, *argv)
    assert (out / "tokens-00000.npy").stat().st_mtime_ns == kept
    whole = tmp_path / "whole"
    run_here(monkeypatch, *[str(whole) if word == str(out) else word for word in argv])
    assert contents(out) == contents(whole)
    assert len(TextCache(out).manifest.shards) == 4


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_processes(both, inputs, vae_folder, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    argv = words(inputs, vae_folder, tmp_path / "latents", tmp_path / "text", "--shard-size", "3")
    alone = words(inputs, vae_folder, tmp_path / "one", tmp_path / "one text", "--shard-size", "3")
    run = subprocess.run(
        [*launcher, "main_cache.py", *argv], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("7 of them distinct") == 1
    assert run.stderr.count("7 captions of") == 1
    with pytest.MonkeyPatch.context() as patch:
        run_here(patch, *alone)
    assert contents(tmp_path / "text") == contents(tmp_path / "one text")
    assert len(list((tmp_path / "text").glob("tokens-*.npy"))) == 3


def test_one_program_writes_a_text_cache_at_a_time(both, inputs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "text"
    argv = ["--text-only", "--cached-path", both[0], "--data-path", inputs[0]]
    with exclusive(out, "x", ALONE):
        line = refusal(monkeypatch, capsys, *text_words(inputs[1], out, *argv))
    said = f"error: --text-cached-path: {out} is in use by process {os.getpid()} on "
    assert line.startswith(said)


def test_read_only_places_are_one_line(both, inputs, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    argv = ["--text-only", "--cached-path", both[0], "--data-path", inputs[0]]
    line = refusal(monkeypatch, capsys, *text_words(inputs[1], tmp_path / "file" / "x", *argv))
    assert line.startswith(f"error: --text-cached-path: cannot make {tmp_path}/file/x: Not a dir")


def test_a_full_disk_is_one_line_and_the_run_goes_on(both, inputs, tmp_path, monkeypatch):
    from data.text import encoding

    out = tmp_path / "text"
    argv = ["--text-only", "--cached-path", both[0], "--data-path", inputs[0], "--shard-size", 8]
    argv = text_words(inputs[1], out, *argv)
    real = encoding.write_array

    def full(path, values):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(encoding, "write_array", full)
    monkeypatch.setattr(sys, "argv", ["main_cache.py", *argv])
    with pytest.raises(SystemExit):
        main_cache.main()
    monkeypatch.setattr(encoding, "write_array", real)
    assert not list(out.glob("done-*")) + list(out.glob(".*"))
    run_here(monkeypatch, *argv)
    assert contents(out) == contents(both[1])
