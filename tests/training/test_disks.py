"""Checkpoints beside training, and disks that are slow, full, read-only or away."""

import json
import logging
import os
import stat
import time
from pathlib import Path

import pytest
import torch
from programs import can_mount
from tiny_runs import contents, run

import models.sealed
import training.saving
from core.errors import UserError
from core.tensors import DTYPES, write_tensors
from models.pretrained import find_checkpoint
from models.sealed import checkpoints
from training.faults import before
from training.step import TrainStep

pytestmark = pytest.mark.usefixtures("one_thread")
own_mounts = pytest.mark.skipif(not can_mount(), reason="no mounts of one's own here")


def test_training_goes_on_while_a_checkpoint_is_written(flags, tmp_path, monkeypatch):
    """Steps are taken during a slow write, and what is written is the state of its step."""
    run(flags("waiting", train__async_checkpoint="false"))
    seen, take = [], TrainStep.__call__

    def step(self, batches, number):
        unfinished = (tmp_path / "run" / "checkpoints").glob(".step_*.tmp")
        seen.append([path.name.split(".")[1] for path in unfinished])
        return take(self, batches, number)

    monkeypatch.setattr(TrainStep, "__call__", step)
    before(training.saving, "write_tensors", lambda *_: time.sleep(0.2))
    monkeypatch.setattr(training.saving, "write_tensors", training.saving.write_tensors)
    run(flags())
    assert ["step_0000002"] in seen[2:4]
    for number in (2, 4, 6, 8):
        names = "checkpoints", f"step_{number:07d}"
        one, other = (contents(tmp_path.joinpath(r, *names)) for r in ("waiting", "run"))
        for name in ("model.safetensors", "ema.safetensors", "optimizer.safetensors"):
            assert one[Path(name)] == other[Path(name)], (number, name)


def test_files_are_those_of_safetensors_with_the_hash_of_what_was_written(tmp_path):
    from safetensors.torch import save_file

    from core.files import file_hash

    draws = torch.rand(3, 5) * 2
    tensors = {f"{name} {i} é": draws.to(d).clone() for i, d in enumerate(DTYPES) for name in "ba"}
    tensors |= {"scalar": torch.tensor(3.0), "empty": torch.empty(0, 4), "t": draws.t()}
    for metadata in (None, {"format": "pt"}):
        save_file({n: t.contiguous() for n, t in tensors.items()}, tmp_path / "one", metadata)
        written = write_tensors(tmp_path / "other", tensors, metadata)
        assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
        assert written.sha256 == file_hash(tmp_path / "other")
        assert written.bytes == (tmp_path / "other").stat().st_size


def test_weights_can_be_read_by_the_group(flags, tmp_path):
    mask = os.umask(0o027)
    try:
        run(flags(train__max_steps=2))
    finally:
        os.umask(mask)
    for path in find_checkpoint(tmp_path / "run").iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o640, path


def unreadable(monkeypatch, times):
    """Let checksums fail so many times."""
    left, read = [times], models.sealed.file_hash

    def refuse(path):
        if left[0] > 0:
            left[0] -= 1
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    monkeypatch.setattr(models.sealed, "file_hash", refuse)


def test_a_moment_without_the_disk_costs_nothing(flags, tmp_path, monkeypatch, caplog):
    run(flags(train__max_steps=4))
    unreadable(monkeypatch, 2)
    with caplog.at_level(logging.INFO):
        run(flags())
    assert "Input/output error; trying again in 0.01 s" in caplog.text
    assert "step_0000004: going on from there" in caplog.text


def test_a_checkpoint_that_cannot_be_read_is_not_set_aside(flags, tmp_path, monkeypatch):
    run(flags(train__max_steps=4))
    there = contents(tmp_path / "run" / "checkpoints")
    unreadable(monkeypatch, 1000)
    with pytest.raises(UserError, match=r"cannot be read: Input/output error; nothing was changed"):
        run(flags())
    assert contents(tmp_path / "run" / "checkpoints") == there


@own_mounts
def test_a_full_disk_at_a_checkpoint(flags, tmp_path, start):
    """Half of a checkpoint's space is left: training goes on, the first one stays whole."""
    disk = tmp_path / "disk"
    disk.mkdir()
    argv = flags("disk/run", train__timeout=2, train__log_every=100)
    code, errors = start(argv, f'mount("-t", "tmpfs", "-o", "size=700k", "none", "{disk}")').end()
    assert code == 2
    lines = errors.splitlines()
    assert lines[-1].startswith(f"error: {disk}/run/checkpoints/step_0000008: could not be written")
    assert lines[-1].endswith("No space left on device; older checkpoints are whole")
    assert any("trying again for 1 s" in line for line in lines)
    assert "8/8" in errors
    assert "Traceback" not in errors


def test_a_disk_that_is_full_for_a_while_loses_nothing(flags, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(training.saving, "AGAIN", 0.05)
    refusals, write = [3], write_tensors

    def full(*arguments):
        if refusals[0] > 0:
            refusals[0] -= 1
            raise OSError(28, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(training.saving, "write_tensors", full)
    run(flags(train__ckpt_every=8))
    assert "No space left on device; trying again for" in caplog.text
    assert find_checkpoint(tmp_path / "run").name == "step_0000008"


def test_a_full_disk_does_not_end_training_at_its_log(flags, tmp_path, monkeypatch, caplog):
    """Entries wait in memory; TensorBoard's file is begun anew."""
    left, opened = [2], Path.open
    from torch.utils.tensorboard import SummaryWriter

    def full(path, *arguments, **options):
        if path.name == "metrics.jsonl" and left[0] > 0 and "a" in arguments:
            left[0] -= 1
            raise OSError(28, "No space left on device", str(path))
        return opened(path, *arguments, **options)

    def refuse(*_, **__):
        if left[0] > 0:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "open", full)
    monkeypatch.setattr(SummaryWriter, "add_scalar", refuse)
    run(flags())
    assert "metrics.jsonl: No space left on device; 1 entries wait in memory" in caplog.text
    assert "tensorboard: numbers up to step 2 are missing: No space left on device" in caplog.text
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4, 6, 8]


def test_an_old_checkpoint_that_cannot_be_removed_is_not_the_new_ones_fault(
    flags, tmp_path, monkeypatch, caplog
):
    import shutil

    remove = shutil.rmtree

    def busy(path, ignore_errors=False, **options):
        if str(path).endswith(".old.tmp") and not ignore_errors:
            raise OSError(39, "Directory not empty", str(path))
        return remove(path, ignore_errors=ignore_errors, **options)

    monkeypatch.setattr(training.saving.shutil, "rmtree", busy)
    run(flags(train__keep_last=1))
    assert "step_0000002: not removed: Directory not empty" in caplog.text
    assert "could not be written" not in caplog.text
    assert find_checkpoint(tmp_path / "run").name == "step_0000008"


def test_a_disk_that_is_too_slow_skips_a_checkpoint(flags, tmp_path, monkeypatch, caplog):
    """Nobody waits longer than half of the timeout; the last one is waited for."""
    monkeypatch.setattr(training.saving, "write_tensors", training.saving.write_tensors)
    before(training.saving, "write_tensors", lambda *_: time.sleep(0.7))
    run(flags(train__timeout=2, train__max_steps=6))
    assert "step_0000004 is skipped: the disk still writes the checkpoint before" in caplog.text
    names = [path.name for path in checkpoints(tmp_path / "run")]
    assert names == ["step_0000006", "step_0000002"]


@own_mounts
def test_a_read_only_run_folder_is_one_line(flags, tmp_path, start):
    run(flags(train__max_steps=2))
    folder = tmp_path / "run"
    there = contents(folder)
    code, errors = start(flags(), f'mount("-o", "bind,ro", "{folder}", "{folder}")').end()
    assert code == 2
    assert errors == f"error: run_dir: cannot write to {folder}: Read-only file system\n"
    assert contents(folder) == there


def test_latest_as_a_folder_is_left_alone(flags, tmp_path, caplog):
    latest = tmp_path / "run" / "checkpoints" / "latest"
    latest.mkdir(parents=True)
    (latest / "mine.txt").write_text("precious")
    run(flags())
    assert "latest: stays as it is: Is a directory; " in caplog.text
    assert (latest / "mine.txt").read_text() == "precious"
    assert find_checkpoint(tmp_path / "run").name == "step_0000008"
