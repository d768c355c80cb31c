"""Writing a cache: refusals, what is left behind, and bytes for any number of processes."""

import collections
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from core.errors import UserError
from data.caching import verify_cache
from data.images import ImageFolder, load_image, to_float
from data.latents import JoinedCaches, LatentCache
from data.manifest import KINDS, MANIFEST
from data.vae import VAE

ROOT = Path(__file__).parents[2]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def run_script(*arguments: str, processes: int = 0) -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run(
        [sys.executable, *(launcher if processes else []), "main_cache.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_float32_and_worker_processes(make_cache, cache_folder, tmp_path):
    exact = LatentCache(make_cache(tmp_path / "exact", dtype="float32", num_workers=2))
    half = LatentCache(cache_folder)
    indices, views = list(range(23)), [0, 1] * 11 + [0]
    assert np.load(tmp_path / "exact" / "moments-00000.npy").dtype == np.float32
    assert np.load(cache_folder / "moments-00000.npy").dtype == np.float16
    rounded = exact.moments(indices, views).half()
    assert torch.equal(rounded, half.moments(indices, views))


def test_finished_cache_is_kept_unless_overwritten(make_cache, tmp_path):
    out = make_cache(tmp_path / "cache", shard_size=5)
    assert sorted(contents(out))[-1] == "names-00004.txt"
    with pytest.raises(UserError, match="is a finished cache; --overwrite"):
        make_cache(out)
    make_cache(out, overwrite=True)
    names = [f"{kind}-0000{n}.{end}" for kind, end in KINDS.items() for n in range(3)]
    assert sorted(contents(out)) == sorted([*names, MANIFEST])
    assert len(LatentCache(out)) == 23


def test_interrupted_run_leaves_no_cache_and_can_be_repeated(
    make_cache, cache_folder, tmp_path, monkeypatch
):
    out = tmp_path / "cache"

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.caching._finish", stop)
    with pytest.raises(KeyboardInterrupt):
        make_cache(out)
    monkeypatch.undo()
    with pytest.raises(UserError, match="not a finished cache"):
        LatentCache(out)
    (out / ".moments-00001.npy.tmp").write_bytes(b"left by a killed process")
    (out / "done-00001.json").unlink()
    make_cache(out)
    assert contents(out) == contents(cache_folder)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_image_is_one_line(make_cache, image_root, tmp_path, num_workers):
    bad = tmp_path / "images" / "class0" / "bad.png"
    bad.parent.mkdir(parents=True)
    content = (image_root / "class0" / "00.png").read_bytes()
    bad.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"bad\.png") as caught:
        make_cache(tmp_path / "out", data_path=str(bad.parents[1]), num_workers=num_workers)
    assert "Traceback" not in str(caught.value)


def test_size_must_fit_the_vae_and_nothing_is_touched(make_cache, tmp_path):
    out = make_cache(tmp_path / "cache")
    before = contents(out)
    with pytest.raises(UserError, match=r"data\.image_size: 15 is not a multiple of the VAE's 2"):
        make_cache(out, image_size=15, overwrite=True)
    with pytest.raises(UserError, match="vae_path"):
        make_cache(out, vae_path="/no/vae", overwrite=True)
    assert contents(out) == before


def test_values_beyond_float16_are_refused(make_cache, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "data.vae.VAE.encode_moments", lambda self, x: torch.full((len(x), 6, 8, 8), 1e6)
    )
    with pytest.raises(UserError, match="try --dtype float32"):
        make_cache(tmp_path / "cache")


def test_unwritable_place(make_cache, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot make .*: Not a directory"):
        make_cache(tmp_path / "file" / "cache")


@pytest.mark.slow
def test_bytes_do_not_depend_on_the_number_of_processes(image_root, vae_folder, tmp_path):
    for count in (1, 2):
        flags = f"--img_size 16 --vae-path {vae_folder} --data_path {image_root} --batch-size 3"
        flags += (
            f" --shard_size 5 --num_workers 0 --device cpu --cached_path {tmp_path / str(count)}"
        )
        result = run_script(*flags.split(), processes=count if count > 1 else 0)
        assert result.returncode == 0, result.stderr
        assert result.stderr.count("23 images of 3 classes in 5 shards") == 1
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert len(contents(tmp_path / "2")) == 5 * len(KINDS) + 1


def command_line(data_path, vae_folder, out, *more) -> list[str]:
    flags = "--img_size 16 --batch_size 2 --shard_size 4 --num_workers 1 --device cpu --data_path"
    paths = [str(data_path), "--vae_path", str(vae_folder), "--cached_path", str(out)]
    return [*flags.split(), *paths, *more]


@pytest.mark.slow
def test_killed_run_goes_on_with_another_number_of_processes(vae_folder, tmp_path):
    images = tmp_path / "images"
    draws = np.random.default_rng(1)
    for number in range(400):
        folder = images / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.png")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run_script(*command_line(images, vae_folder, whole)).returncode == 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    process = subprocess.Popen(
        [*launcher, "main_cache.py", *command_line(images, vae_folder, killed)],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(lambda: len(list(killed.glob("done-*.json"))) >= 10)
    finally:
        ranks = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, ranks)):
            os.kill(pid, signal.SIGKILL)
        process.wait()
    finished = len(list(killed.glob("done-*.json")))
    assert 10 <= finished < 100
    with pytest.raises(UserError, match="not a finished cache"):
        LatentCache(killed)
    (killed / ".moments-00099.npy.1.tmp").write_bytes(b"left by a killed process")
    result = run_script(*command_line(images, vae_folder, killed))
    assert result.returncode == 0, result.stderr
    assert f" {4 * finished}/400 " in result.stderr.replace("\r", "\n")
    assert f"{killed}: the lock of process " in result.stderr
    assert contents(killed) == contents(whole)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.005)


def test_finished_shards_are_not_made_again_unless_damaged(make_cache, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    monkeypatch.setattr("data.caching._finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_cache(out, shard_size=5)
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in out.glob("moments-*.npy")}
    damaged, lost = out / "moments-00003.npy", out / "labels-00001.npy"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    lost.unlink()
    make_cache(out, shard_size=5)
    again = {path.name for path, when in kept.items() if path.stat().st_mtime_ns != when}
    assert again == {"moments-00003.npy", "moments-00001.npy"}
    assert contents(out) == contents(make_cache(tmp_path / "whole", shard_size=5))


def test_unfinished_cache_of_something_else_is_not_gone_on_with(make_cache, tmp_path, monkeypatch):
    out = tmp_path / "cache"
    monkeypatch.setattr("data.caching._finish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_cache(out)
    monkeypatch.undo()
    with pytest.raises(UserError, match="unfinished cache with another dtype, shard_size; --over"):
        make_cache(out, dtype="float32", shard_size=7)
    make_cache(out, dtype="float32", shard_size=7, overwrite=True)
    assert LatentCache(out).manifest.dtype == "float32"


@pytest.fixture
def odd_images(tmp_path) -> Path:
    """Images of every kind that a crawl finds, and some that are none."""
    root = tmp_path / "odd images"
    (root / "ämne ü 猫").mkdir(parents=True)
    draws = np.random.default_rng(2)
    rgb = Image.fromarray(draws.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    deep = draws.integers(0, 2**16, (20, 20), dtype=np.uint16)
    kinds = {
        "grey.png": rgb.convert("L"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "palette.png": rgb.convert("P"),
        "sixteen bit.png": Image.fromarray(deep),
        "smaller than the crop.png": rgb.crop((0, 0, 5, 7)),
        "name with spaces é 漢.webp": rgb,
    }
    for name, image in kinds.items():
        image.save(root / "ämne ü 猫" / name)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by 90 degrees
    rgb.save(root / "ämne ü 猫" / "rotated.jpg", exif=exif)
    return root


def test_odd_images_and_names(make_cache, odd_images, vae_folder, tmp_path):
    out = make_cache(tmp_path / "out", data_path=str(odd_images), dtype="float32", num_workers=1)
    cache, folder, vae = LatentCache(out), ImageFolder(odd_images), VAE(str(vae_folder))
    assert cache.class_names == ["ämne ü 猫"]
    names = (out / "names-00000.txt").read_text(encoding="utf-8").splitlines()
    assert names == [str(Path(path).relative_to(odd_images)) for path in folder.paths]
    assert len(names) == 7
    for index, path in enumerate(folder.paths):
        image = to_float(load_image(path, 16))[None]
        for view, pixels in enumerate((image, image.flip(-1))):
            stored = cache.moments([index], [view])
            torch.testing.assert_close(stored, vae.encode_moments(pixels), atol=1e-5, rtol=1e-5)


def test_unreadable_images_are_passed_over_and_listed(make_cache, odd_images, tmp_path):
    folder = odd_images / "ämne ü 猫"
    whole = (folder / "grey.png").read_bytes()
    (folder / "0 empty.png").write_bytes(b"")
    (folder / "1 cut.png").write_bytes(whole[: len(whole) // 2])
    (folder / "z no image.jpg").write_text("words")
    options = {"data_path": str(odd_images), "shard_size": 2}
    with pytest.raises(UserError, match=r"cannot read .*0 empty\.png"):
        make_cache(tmp_path / "out", **options)
    out = make_cache(tmp_path / "out", **options, on_error="skip")
    report = (out / "unreadable.txt").read_text(encoding="utf-8").splitlines()
    assert [re.search(r"[0-9z] [a-z ]*\.", line)[0] for line in report] == [
        *("0 empty.", "1 cut.", "z no image.")
    ]
    cache = LatentCache(out)
    assert len(cache) == 7
    assert [shard.number for shard in cache.manifest.shards] == [1, 2, 3, 4]  # none is left of 0
    cache.verify()
    indices = list(range(7))
    plain = [path for path in ImageFolder(odd_images).paths if Path(path).name[1] != " "]
    names = "".join(file.read_text() for file in sorted(out.glob("names-*.txt"))).splitlines()
    assert names == [str(Path(path).relative_to(odd_images)) for path in plain]
    assert torch.isfinite(cache.moments(indices, [1] * 7)).all()


def test_nothing_readable_is_refused(make_cache, tmp_path):
    (tmp_path / "images" / "a").mkdir(parents=True)
    (tmp_path / "images" / "a" / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="none of the images is readable"):
        make_cache(tmp_path / "out", data_path=str(tmp_path / "images"), on_error="skip")


def test_full_disk_is_refused_before_anything_is_written(make_cache, tmp_path, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 7000, 7000))
    # 23 images x 2 views x 6 channels x 8 x 8 x 2 bytes are 35,328.
    with pytest.raises(UserError, match=r"needs 0\.00 GiB more, its disk has 0\.00 GiB left"):
        make_cache(tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*.npy"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 0, 40_000))
    make_cache(tmp_path / "cache")


@pytest.mark.slow
def test_disk_that_fills_up_is_one_line_and_the_run_goes_on_later(image_root, vae_folder, tmp_path):
    out = tmp_path / "cache"
    whole = command_line(image_root, vae_folder, tmp_path / "whole", "--shard-size", "10")
    arguments = command_line(image_root, vae_folder, out, "--shard-size", "10")

    def quota():
        """No file beyond 10 kB: what a write meets on a full disk."""
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    result = subprocess.run(
        [sys.executable, "main_cache.py", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        preexec_fn=quota,
    )
    assert result.returncode == 2
    last = result.stderr.strip().splitlines()[-1]
    assert re.fullmatch(rf"error: --cached-path: cannot write to {out}: .*", last)
    assert not list(out.glob(".*"))
    assert run_script(*arguments).returncode == run_script(*whole).returncode == 0
    assert contents(out) == contents(tmp_path / "whole")


def test_bfloat16_cache(make_cache, cache_folder, tmp_path):
    cache = LatentCache(make_cache(tmp_path / "bf16", dtype="bfloat16"))
    exact = LatentCache(make_cache(tmp_path / "exact", dtype="float32"))
    indices, views = list(range(23)), [1, 0] * 11 + [1]
    moments = cache.moments(indices, views)
    assert moments.dtype == torch.bfloat16
    assert torch.equal(moments, exact.moments(indices, views).bfloat16())


def test_one_view_is_the_image_as_it_is(make_cache, cache_folder, tmp_path):
    out = make_cache(tmp_path / "one", views=1)
    one, two = LatentCache(out), LatentCache(cache_folder)
    assert (one.views, two.views) == (1, 2)
    indices = [*range(23), 3]
    assert torch.equal(one.moments(indices, [0] * 24), two.moments(indices, [0] * 24))
    assert 2 * one.manifest.bytes_of(23) == two.manifest.bytes_of(23)
    with pytest.raises(UserError, match=f"{out} holds no mirrored images; set data.horizontal_fl"):
        one.moments([1, 2], [0, 1])
    one.verify()
    flipped = out / "moments-00001.npy"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match=r"moments-00001\.npy changed .*, at image 9 of it"):
        LatentCache(out).moments([19], [0])
    assert JoinedCaches([two, one]).views == 1
    manifest = json.loads((out / MANIFEST).read_text())
    (out / MANIFEST).write_text(json.dumps(manifest | {"views": 3}))
    with pytest.raises(UserError, match="is damaged: views 3 is neither 1 nor 2"):
        LatentCache(out)


def test_manifests_from_before_views_have_two(cache_folder, tmp_path):
    shutil.copytree(cache_folder, tmp_path / "old")
    manifest = json.loads((cache_folder / MANIFEST).read_text())
    del manifest["views"]
    (tmp_path / "old" / MANIFEST).write_text(json.dumps(manifest))
    old, new = LatentCache(tmp_path / "old"), LatentCache(cache_folder)
    assert old.manifest == new.manifest
    assert torch.equal(old.moments([4, 5], [0, 1]), new.moments([4, 5], [0, 1]))


def test_encoder_in_bfloat16_says_how_far_it_is(make_cache, tmp_path, caplog):
    caplog.set_level("INFO", logger="diffmoe")
    out = make_cache(tmp_path / "fast", dtype="float32", vae_dtype="bfloat16")
    said = re.search(r"are (\S+) \(RMS\) from float32", caplog.text)
    exact = LatentCache(make_cache(tmp_path / "exact", dtype="float32"))
    away = LatentCache(out).moments([0, 1, 2, 3], [0] * 4) - exact.moments([0, 1, 2, 3], [0] * 4)
    assert float(said[1]) == pytest.approx(away.square().mean().sqrt().item(), rel=0.06)
    assert 1e-4 < float(said[1]) < 1e-1
    assert caplog.text.count("from float32") == 1


def test_size_is_stated_and_verify_reads_everything(make_cache, tmp_path, caplog):
    caplog.set_level("INFO", logger="diffmoe")
    out = make_cache(tmp_path / "cache")
    assert "23 images, 0.00 GiB" in caplog.text
    verify_cache(str(out))
    assert "every checksum holds" in caplog.text
    for kind, suffix in KINDS.items():
        file = out / f"{kind}-00001.{suffix}"
        whole = file.read_bytes()
        file.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:])
        with pytest.raises(UserError, match=f"{file.name} changed"):
            verify_cache(str(out))
        file.write_bytes(whole)


@pytest.mark.slow
def test_verify_from_the_command_line(make_cache, tmp_path):
    out = make_cache(tmp_path / "cache")
    assert run_script("--verify", "--cached_path", str(out)).returncode == 0
    file = out / "moments-00002.npy"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    result = run_script("--verify", "--cached-path", str(out))
    assert result.returncode == 2
    assert "moments-00002.npy changed since it was written" in result.stderr


@pytest.mark.slow
def test_script_ends_with_one_line_and_code_two(tmp_path):
    result = run_script("--data-path", str(tmp_path / "x"), "--cached-path", str(tmp_path / "y"))
    assert result.returncode == 2
    assert result.stderr == f"error: image folder: {tmp_path / 'x'} is not a folder\n"
