"""Writing a cache: refusals, what is left behind, and bytes for any number of processes."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from core.errors import UserError
from data.latents import LatentCache
from data.manifest import KINDS, MANIFEST

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
    with pytest.raises(UserError, match="img_size: 15 is not a multiple of the VAE's 2"):
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
    with pytest.raises(UserError, match="cannot write"):
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


@pytest.mark.slow
def test_script_ends_with_one_line_and_code_two(tmp_path):
    result = run_script("--data-path", str(tmp_path / "x"), "--cached-path", str(tmp_path / "y"))
    assert result.returncode == 2
    assert result.stderr == f"error: image folder: {tmp_path / 'x'} is not a folder\n"
