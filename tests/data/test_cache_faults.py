"""What goes wrong in hours of caching: a second process, lost readers, full and read-only disks."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main_cache
from core.errors import ConfigError, UserError
from core.locks import exclusive
from data.digits import write_digits
from data.making import ALONE, made_alone
from data.tiny_vae import TinyVAEOptions, make_tiny_vae

ROOT = Path(__file__).parents[2]


@pytest.fixture
def stuck(image_root, tmp_path) -> Path:
    """A copy of the images in which reading one does not end: it is a pipe that nobody fills."""
    root = tmp_path / "images"
    shutil.copytree(image_root, root)
    (root / "class1" / "13.png").unlink()
    os.mkfifo(root / "class1" / "13.png")
    return root


def arguments(images, vae_folder, out, *more) -> list[str]:
    sizes = {"--img-size": 16, "--batch-size": 4, "--shard-size": 4, "--num-workers": 1}
    paths = {"--data-path": images, "--vae-path": vae_folder, "--cached-path": out}
    pairs = (sizes | paths | {"--device": "cpu"}).items()
    return [*(str(word) for pair in pairs for word in pair), *more]


def run_here(monkeypatch, *words: str) -> None:
    """The program without another start of Python."""
    monkeypatch.setattr(sys, "argv", ["main_cache.py", *words])
    main_cache.main()


def start(*words: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "main_cache.py", *words], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition, process, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found]


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.slow
def test_the_second_of_two_gets_one_line_and_the_first_finishes(stuck, vae_folder, tmp_path):
    out = tmp_path / "cache"
    words = arguments(stuck, vae_folder, out, "--on-error", "skip")
    both = [start(*words), start(*words)]
    while all(process.poll() is None for process in both):
        time.sleep(0.01)
    first, second = sorted(both, key=lambda process: process.poll() is not None)
    line = second.communicate()[1]
    assert second.returncode == 2, line
    assert line.count("\n") == 1
    assert line.startswith(f"error: --cached-path: {out} is in use by process {first.pid} on ")
    wait_for(lambda: list(out.glob("done-*.json")), first)
    with (stuck / "class1" / "13.png").open("wb"):  # no image: it is passed over
        pass
    assert first.wait(60) == 0, first.stderr.read()
    assert json.loads((out / "manifest.json").read_text())["count"] == 22
    assert not [file for file in out.iterdir() if file.name.startswith((".", "done-"))]


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["hangs", "is killed"])
def test_a_lost_reader_is_one_line_and_finished_shards_stay(
    fault, stuck, image_root, vae_folder, tmp_path, monkeypatch
):
    out = tmp_path / "cache"
    timeout = "2" if fault == "hangs" else "600"
    words = arguments(stuck, vae_folder, out, "--timeout", timeout)
    process = start(*words)
    wait_for(lambda: len(list(out.glob("done-*.json"))) >= 2, process)
    if fault == "is killed":
        os.kill(children(process.pid)[-1], signal.SIGKILL)
    errors = process.communicate(timeout=60)[1].replace("\r", "\n").splitlines()
    assert process.returncode == 2
    assert errors[-1].startswith("error: --num-workers: a reading process died or does not answer")
    said = {
        "hangs": r"timed out after 2 seconds",
        "is killed": r"exited unexp|signal: Killed|Connection reset",
    }
    assert re.search(said[fault], errors[-1]), errors[-1]
    assert "class1/13.png ... 22.png" in errors[-1]  # the batch that is missing
    assert "finished shards stay" in errors[-1]
    assert "Traceback" not in "".join(errors)
    kept = {path: path.stat().st_mtime_ns for path in out.glob("moments-*.npy")}
    assert len(kept) >= 2
    (stuck / "class1" / "13.png").unlink()
    shutil.copy(image_root / "class1" / "13.png", stuck / "class1")
    run_here(monkeypatch, *words)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    run_here(monkeypatch, *arguments(stuck, vae_folder, tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.slow
def test_ctrl_c_is_one_line_and_finished_shards_stay(stuck, vae_folder, tmp_path):
    """As a terminal sends it: to every process of the group."""
    out = tmp_path / "cache"
    command = [sys.executable, "main_cache.py", *arguments(stuck, vae_folder, out)]
    process = subprocess.Popen(
        command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    wait_for(lambda: len(list(out.glob("done-*.json"))) >= 2, process)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=60)[1].replace("\r", "\n").splitlines()
    assert process.returncode == 130
    assert errors[-1] == "interrupted"
    assert "Traceback" not in "".join(errors)
    assert len(list(out.glob("done-*.json"))) >= 2
    assert not (out / ".lock").exists()


IN_A_SMALL_DISK = """
import json, subprocess, sys
import main_cache

disk, arguments = sys.argv[1], sys.argv[2:]

def mount(options):
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", disk], check=True)

def run(*more):
    sys.argv = ["main_cache.py", *arguments, *more]
    try:
        main_cache.main()
    except SystemExit as stop:
        return stop.code
    return 0

mount("size=100k")
codes = [run()]
kept = len(list(__import__("pathlib").Path(disk).glob("cache/done-*.json")))
mount("remount,size=4m")
codes.append(run())
mount("remount,ro")
codes.append(run("--overwrite"))
print(json.dumps({"codes": codes, "kept": kept}))
subprocess.run(["cp", "-r", f"{disk}/cache", f"{disk}-copy"], check=True)
"""


@pytest.mark.slow
def test_full_and_read_only_disks(image_root, vae_folder, tmp_path, monkeypatch):
    """A real small disk: it fills up, gets more room, and is then mounted for reading alone."""
    own = ["unshare", "--map-root-user", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*own, "true"]).returncode:
        pytest.skip("no mounts of one's own on this machine")
    disk = tmp_path / "disk"
    disk.mkdir()
    words = arguments(image_root, vae_folder, disk / "cache")
    command = [*own, sys.executable, "-c", IN_A_SMALL_DISK, str(disk), *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["codes"] == [2, 0, 2], done.stderr
    assert 1 <= result["kept"] < 6
    full, read_only = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    where = f"error: --cached-path: cannot write to {disk}/cache: "
    assert full.startswith(f"{where}No space left on device; finished shards stay, and the same")
    assert read_only == f"{where}Read-only file system"
    run_here(monkeypatch, *arguments(image_root, vae_folder, tmp_path / "whole"))
    assert contents(tmp_path / "disk-copy") == contents(tmp_path / "whole")


def test_digits_and_vae_are_made_by_one_process_at_a_time(image_root, tmp_path):
    digits, vae = tmp_path / "digits", tmp_path / "vae"
    left = tmp_path / ".digits.1.tmp"
    left.mkdir()
    with made_alone(digits), pytest.raises(ConfigError, match=r"--out: .*digits.* is in use by"):
        write_digits(digits)
    assert not left.exists()
    options = TinyVAEOptions(steps=1, batch_size=1, lr=1e-3, kl_weight=0.0, seed=0)
    with (
        exclusive(tmp_path / ".vae.lock", "--out", ALONE),
        pytest.raises(ConfigError, match=r"--out: .*vae.* is in use by process"),
    ):
        make_tiny_vae(str(image_root), str(image_root), str(vae), options, ALONE)


def test_a_full_disk_is_one_line_for_folders_that_are_made_at_once(tmp_path):
    with (
        pytest.raises(UserError, match=r"--out: cannot write to .*: No space left on device"),
        made_alone(tmp_path / "out"),
    ):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_finished_cache_that_appears_meanwhile_is_kept(make_cache, tmp_path, monkeypatch):
    out = make_cache(tmp_path / "cache")
    before = contents(out)
    answers = iter([False])
    real = Path.exists
    monkeypatch.setattr(
        Path, "exists", lambda p: next(answers, True) if p == out / "manifest.json" else real(p)
    )
    with pytest.raises(ConfigError, match="is a finished cache; --overwrite replaces it"):
        make_cache(out)
    monkeypatch.undo()
    assert contents(out) == before
