"""The second process and the second run: locks, restarts, changed settings, what is recorded."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from programs import pair, wait_for
from tiny_runs import HANG, ROOT, contents, run, same, slowly

import core.locks
from core.errors import UserError
from core.locks import Lock
from models.pretrained import find_checkpoint, read_tensors
from models.sealed import checkpoints
from training.verify_resume import write_cache

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
def test_a_restart_by_torchrun_does_not_train_over_another_jobs_run(flags, tmp_path):
    argv = flags(resume="never")
    run(argv)
    there = contents(tmp_path / "run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    done = subprocess.run(
        [*launcher, "train.py", *argv, "--train.max_steps=12"],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    refusal = f"error: run_dir: {tmp_path / 'run'} has checkpoints; give --resume auto"
    lines = done.stderr.splitlines()
    assert sum(line.startswith(refusal) for line in lines) == 2  # both attempts
    last = [line.strip() for line in lines if line.strip(" =-")][-1]
    assert last.startswith(f"traceback : {refusal}")  # torchrun's own report ends with it
    assert contents(tmp_path / "run") == there


def test_who_started_a_run_and_with_what_is_kept(flags, tmp_path):
    run(flags(train__max_steps=4))
    first = (tmp_path / "run" / "config.yaml").read_text()
    run(flags(optim__lr=0.5))
    attempts = tmp_path / "run" / "attempts"
    assert (attempts / "0001.yaml").read_text() == first
    assert yaml.safe_load((attempts / "0002.yaml").read_text())["optim"]["lr"] == 0.5
    one, two = (json.loads((attempts / f"000{n}.json").read_text()) for n in (1, 2))
    assert [one["step"], two["step"]] == [0, 4]
    assert one["run_id"] == two["run_id"]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    assert one["commit"] == (commit.stdout.strip() if commit.returncode == 0 else None)
    assert one["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert one["devices"][0].startswith("cpu")
    assert len(one["hosts"]) == len(one["launchers"]) == 1
    assert one["command"] == sys.argv


def test_every_changed_setting_is_named_once(flags, tmp_path, caplog):
    run(flags(train__max_steps=4))
    with caplog.at_level(logging.WARNING):
        run(flags(seed=1, optim__betas="[0.8, 0.99]", optim__ema_decay=0.5, data__order="shards"))
    (line,) = [r.getMessage() for r in caplog.records if "other settings" in r.getMessage()]
    assert line == (
        "going on with other settings: data.order was random, is shards now; optim.betas was "
        "(0.9, 0.999), is (0.8, 0.99) now; optim.ema_decay was 0.9999, is 0.5 now; seed was 0, "
        "is 1 now; train.max_steps was 4, is 8 now"
    )


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("scaling_factor", 0.5, "scaling_factor is 1.0 there, 0.5 in this run's data"),
        ("vae_hash", "another", "vae_hash is never computed there, another in"),
        ("class_names", ["0", "b", "2"], r"class_names\[1\] is '1' there, 'b' in"),
    ],
)
def test_other_latents_are_refused(key, value, told, flags, tmp_path):
    other = write_cache(tmp_path / "other")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps(manifest | {key: value}))
    run(flags(train__max_steps=2))
    with pytest.raises(UserError, match=told):
        run(flags(data__cached_path=other))
    assert find_checkpoint(tmp_path / "run").name == "step_0000002"


def test_another_batch_goes_on_at_the_same_image(flags, tmp_path, monkeypatch):
    """After 2 steps of 8 images the third step takes images 16 ... 20 of the order."""
    items = []
    from data.dataset import LatentDataset

    fetch = LatentDataset.__getitems__

    def noted(self, wanted):
        items.extend(wanted)
        return fetch(self, wanted)

    monkeypatch.setattr(LatentDataset, "__getitems__", noted)
    run(flags("whole", train__max_steps=5))
    whole, items[:] = list(items), []
    run(flags(train__max_steps=2))
    run(flags(train__max_steps=8, train__global_batch_size=4))
    assert items == whole  # 16 images by eights, 24 by fours
    state = json.loads((find_checkpoint(tmp_path / "run") / "state.json").read_text())
    assert state["position"] == {"epoch": 0, "taken": 40}


def test_two_trainings_of_one_run(flags, tmp_path, start):
    run(flags("alone"))
    argv = flags()
    first = start(argv, slowly(0.2))
    wait_for((tmp_path / "run" / "metrics.jsonl").exists)
    code, errors = start(argv).end()
    assert code == 2
    assert len(errors.splitlines()) == 1
    assert f"error: run_dir: {tmp_path / 'run'} is in use by process {first.pid} on " in errors
    assert first.end()[0] == 0
    same(tmp_path / "alone", tmp_path / "run")
    entries = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in entries] == [2, 4, 6, 8]
    assert not (tmp_path / "run" / ".lock").exists()


def test_what_a_killed_run_left_is_swept_and_its_lock_taken_over(flags, tmp_path, start):
    program = start(flags(), HANG)
    folder = tmp_path / "run" / "checkpoints"
    wait_for(lambda: list(folder.glob(".step_*.tmp")))
    program.signal(signal.SIGKILL)
    program.end()
    assert (tmp_path / "run" / ".lock").exists()
    (folder / ".step_0000000.old.tmp").mkdir()
    (tmp_path / "run" / ".config.yaml.1.tmp").write_text("cut short")
    code, errors = start(flags()).end()
    assert code == 0, errors
    assert f"the lock of process {program.pid} on " in errors
    hidden = [p for p in (tmp_path / "run").rglob("*") if p.name.startswith(".")]
    assert hidden == []


def test_a_lock_of_another_host_is_kept_while_it_beats(tmp_path, monkeypatch):
    """Ages are differences of the file system's times; a stale one is taken over by one alone."""
    lock = tmp_path / ".lock"
    about = {"host": "elsewhere", "pid": 1, "since": "noon", "command": "train.py", "token": "t"}
    lock.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"in use by process 1 on elsewhere since noon \(train.py"):
        Lock(tmp_path, "run_dir").take()
    old = time.time() - core.locks.STALE - 5
    os.utime(lock, (old, old))
    mine = Lock(tmp_path, "run_dir")
    mine.take()
    assert json.loads(lock.read_text())["pid"] == os.getpid()
    with pytest.raises(UserError, match=f"in use by process {os.getpid()} "):
        Lock(tmp_path, "run_dir").take()
    mine.release()
    assert list(tmp_path.iterdir()) == []


def test_an_owner_notices_that_its_lock_is_anothers(flags, tmp_path, monkeypatch):
    """A process that slept on another host while its lock was taken over writes nothing more."""
    monkeypatch.setattr(core.locks, "BEAT", 0.02)
    lock = Lock(tmp_path, "run_dir")
    lock.take()
    lock.check()
    other = json.loads((tmp_path / ".lock").read_text()) | {"token": "another"}
    (tmp_path / ".lock").write_text(json.dumps(other))
    wait_for(lambda: lock.lost, seconds=10)
    with pytest.raises(UserError, match=r"run_dir: .* was taken over by another process"):
        lock.check()
    os.utime(tmp_path / ".lock", (1, 1))
    time.sleep(0.1)
    assert (tmp_path / ".lock").stat().st_mtime == 1
    lock.release()
    assert (tmp_path / ".lock").exists()


def test_a_dead_process_that_nobody_has_noticed_owns_nothing(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    wait_for(lambda: " Z " in Path(f"/proc/{dead.pid}/stat").read_text())
    mine = Lock(tmp_path, "run_dir")
    mine.take()
    about = json.loads((tmp_path / ".lock").read_text())
    mine.release()
    started = Path(f"/proc/{dead.pid}/stat").read_text().rpartition(")")[2].split()[19]
    about |= {"pid": dead.pid, "started": started}
    (tmp_path / ".lock").write_text(json.dumps(about))
    mine = Lock(tmp_path, "run_dir")
    mine.take()
    mine.release()
    dead.wait()


def test_a_resume_does_not_need_what_the_run_began_with(flags, tmp_path):
    run(flags("first", train__max_steps=2))
    argv = flags(init_from=tmp_path / "first")
    run([*argv, "--train.max_steps=4"])
    (tmp_path / "first").rename(tmp_path / "gone")
    run(argv)
    assert find_checkpoint(tmp_path / "run").name == "step_0000008"


def test_the_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(core.locks, "BEAT", 0.05)
    lock = Lock(tmp_path, "run_dir")
    lock.take()
    os.utime(tmp_path / ".lock", (1, 1))
    wait_for(lambda: (tmp_path / ".lock").stat().st_mtime > 1, seconds=10)
    lock.release()


def test_a_killed_loader_worker_is_one_line(flags, tmp_path, start):
    program = start(flags(data__num_workers=1, train__max_steps=500), slowly(0.05))
    wait_for(lambda: checkpoints(tmp_path / "run"))
    children = Path(f"/proc/{program.pid}/task/{program.pid}/children").read_text().split()
    workers = [int(c) for c in children if "python" in Path(f"/proc/{c}/cmdline").read_text()]
    os.kill(workers[-1], signal.SIGKILL)
    code, errors = program.end()
    assert code == 2
    assert errors.splitlines()[-1].startswith("error: a data worker or another process died")
    assert "Traceback" not in errors
    assert checkpoints(tmp_path / "run")


SPOIL = """
def spoil(self, norm, loss, records):
    self.bare.final.linear.bias.grad.mul_(float("nan"))
    norm.fill_(float("nan"))
before(TrainStep, "_step", spoil)
"""


def test_sharded_averages_can_be_looked_at_in_between(flags, tmp_path, cache):
    """Grids and validations, also when one of two processes is stopped in one, change nothing."""
    looks = {"train__val_every": 2, "train__num_val_samples": 8, "data__val_cached_path": cache}
    looks |= {"train__sample_every": 4, "sampling__num_steps": 3}
    argv = flags("whole", parallel__strategy="fsdp", **looks)
    assert [program.end()[0] for program in pair(tmp_path, argv, ("without_vae()",) * 2)] == [0, 0]
    stop = """
without_vae()
before(Looks, "_grid_latents", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
"""
    argv = flags(parallel__strategy="fsdp", **looks)
    programs = pair(tmp_path, argv, ("without_vae()", stop))
    assert [program.end()[0] for program in programs] == [0, 0]
    assert find_checkpoint(tmp_path / "run").name == "step_0000004"
    assert [program.end()[0] for program in pair(tmp_path, argv, ("without_vae()",) * 2)] == [0, 0]
    same(tmp_path / "whole", tmp_path / "run")
    for name in ("step_0000004.png", "step_0000008.png"):
        one, other = (tmp_path / r / "samples" / name for r in ("whole", "run"))
        assert one.read_bytes() == other.read_bytes()


def test_sharded_weights_are_dumped_too(flags, tmp_path):
    argv = flags(
        parallel__strategy="fsdp",
        train__log_every=3,
        train__ckpt_every=100,
        train__max_nonfinite_steps=3,
    )
    programs = pair(tmp_path, argv, (SPOIL, SPOIL))
    (code, errors), _ = (program.end() for program in programs)
    folder = tmp_path / "run" / "nonfinite_step_0000003"
    assert code == 2
    assert errors.splitlines()[-1].endswith(f"weights and facts are in {folder}")
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["parameters_with_nonfinite_gradient"] == ["final.linear.bias"]
    assert len(list((folder / "model").iterdir())) == 2
    whole = read_tensors(folder / "model")
    assert whole["final.linear.weight"].shape == (4, 16)
    assert all(tensor.isfinite().all() for tensor in whole.values())


def test_a_disk_that_one_process_cannot_write_to(flags, tmp_path):
    """The others' parts make no checkpoint; the main process says whose part is missing."""
    full = """
def refuse(*arguments):
    raise OSError(28, "No space left on device")
training.saving.write_tensors = refuse
"""
    argv = flags(parallel__strategy="fsdp", train__ckpt_every=100, train__timeout=8)
    programs = pair(tmp_path, argv, ("", full))
    (code, errors), _ = (program.end() for program in programs)
    assert code == 2
    assert "could not be written: process 1: No space left on device; older" in errors
    assert checkpoints(tmp_path / "run") == []
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_process_that_dies_or_hangs_ends_the_other_with_one_line(number, flags, tmp_path):
    argv = flags(train__max_steps=500, train__timeout=3)
    main, other = pair(tmp_path, argv, (slowly(0.05), ""))
    wait_for(lambda: checkpoints(tmp_path / "run"))
    other.signal(number)
    code, errors = main.end()
    other.process.kill()
    assert code == 2
    assert "Traceback" not in errors
    last = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(last) == 1
    assert last[0].startswith("error: a data worker or another process died or does not answer")
    assert checkpoints(tmp_path / "run")
