"""What goes wrong in weeks of training: kills, damage, preemption, bad numbers, lost processes."""

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from tiny_runs import ALONE, ROOT, final, poisoned, run

from config.load import parse_config
from core.distributed import losses_named
from core.errors import UserError
from data.dataset import LatentDataset
from models.pretrained import find_checkpoint, read_tensors
from training.step import TrainStep
from training.trainer import Trainer
from training.verify_resume import cases


def truncate(folder):
    path = folder / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_bit(folder):
    path = folder / "ema.safetensors"
    content = bytearray(path.read_bytes())
    content[-100] ^= 4
    path.write_bytes(content)


def lose_a_file(folder):
    (folder / "state.json").unlink()


def spoil_the_manifest(folder):
    (folder / "manifest.json").write_text("{")


@pytest.mark.parametrize("damage", [truncate, flip_a_bit, lose_a_file, spoil_the_manifest])
def test_training_goes_on_from_the_checkpoint_before_a_damaged_one(damage, flags, tmp_path, caplog):
    run(flags("whole"))
    run(flags(train__max_steps=6))
    damage(tmp_path / "run" / "checkpoints" / "step_0000006")
    with caplog.at_level(logging.WARNING):
        run(flags())
    assert "damaged checkpoint, taking the one before: " in caplog.text
    assert "step_0000006/" in caplog.text
    for name, tensor in final(tmp_path / "whole").items():
        assert torch.equal(final(tmp_path / "run")[name], tensor), name
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert {"step_0000006", "step_0000006.damaged", "step_0000008", "latest"} <= kept


def test_nothing_but_damaged_checkpoints_is_refused(flags, tmp_path):
    run(flags(train__max_steps=2))
    truncate(tmp_path / "run" / "checkpoints" / "step_0000002")
    with pytest.raises(UserError, match=r"every checkpoint of .* is damaged"):
        run(flags())


def test_which_checkpoints_are_kept(flags, tmp_path):
    run(flags(train__ckpt_every=1, train__keep_last=2, train__keep_every=3))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.glob("step_*")) == [
        f"step_{step:07d}" for step in (3, 6, 7, 8)
    ]
    assert (folder / "latest").resolve().name == "step_0000008"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_workers_change_nothing_and_an_extra_average_is_its_own(flags, tmp_path):
    run(flags("none", optim__extra_ema_decays="[0.5]"))
    run(flags("two", data__num_workers=2))
    for name, tensor in final(tmp_path / "none").items():
        assert torch.equal(final(tmp_path / "two")[name], tensor), name
    live, slow, fast = (final(tmp_path / "none", n) for n in ("model", "ema", "ema_0.5"))
    far = sum((slow[n] - live[n]).abs().sum() for n in live)
    near = sum((fast[n] - live[n]).abs().sum() for n in live)
    assert 0 < near < far


def test_another_pool_works_and_warns(flags, tmp_path, caplog):
    run(flags(train__max_steps=4))
    with caplog.at_level(logging.WARNING):
        run(flags(train__micro_batch_size=2))
    assert (
        "micro_batch_size was 4, is 2 now: other noise and times, and another pool of tokens"
        in caplog.text
    )
    assert find_checkpoint(tmp_path / "run").name == "step_0000008"


def test_a_metrics_line_that_a_kill_cut_short_is_dropped(flags, tmp_path):
    run(flags(train__max_steps=4))
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 5, "loss')
    run(flags())
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == [2, 4, 6, 8]


def test_sigterm_saves_and_a_new_start_goes_on(flags, tmp_path, monkeypatch):
    run(flags("whole"))
    take = TrainStep.__call__

    def interrupted(self, batches, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return take(self, batches, step)

    monkeypatch.setattr(TrainStep, "__call__", interrupted)
    run(flags(train__ckpt_every=100))
    assert find_checkpoint(tmp_path / "run").name == "step_0000005"
    monkeypatch.undo()
    run(flags(train__ckpt_every=100))
    for name in ("model", "ema", "optimizer"):
        for key, tensor in final(tmp_path / "whole", name).items():
            assert torch.equal(final(tmp_path / "run", name)[key], tensor), key
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_step_with_nan_reaches_nothing(flags, tmp_path, monkeypatch):
    """The state after a skipped step is the one before it, and the log counts it."""
    poisoned(monkeypatch, {3})
    run(flags(train__ckpt_every=1, train__max_steps=4, optim__extra_ema_decays="[0.5]"))
    before, after = (tmp_path / "run" / "checkpoints" / f"step_{step:07d}" for step in (3, 4))
    for name in ("model", "ema", "ema_0.5", "optimizer"):
        one, other = (read_tensors(folder / f"{name}.safetensors") for folder in (before, after))
        for key, tensor in one.items():
            assert torch.equal(other[key], tensor), f"{name}: {key}"
    entries = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [entry["skipped_steps"] for entry in entries] == [0, 1]
    assert entries[1]["loss/loss"] > 0
    assert entries[1]["grad_norm"] > 0


def test_too_many_nan_steps_in_a_row_stop_with_a_dump(flags, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(2, 100)))
    with pytest.raises(UserError, match=r"3 steps in a row .*max_nonfinite_steps 3.* are in"):
        run(flags(train__max_steps=20, train__log_every=5, train__max_nonfinite_steps=3))
    folder = tmp_path / "run" / "nonfinite_step_0000005"
    facts = json.loads((folder / "facts.json").read_text())
    assert facts["parameters_with_nonfinite_gradient"] == ["final.linear.bias"]
    weights = read_tensors(folder / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_single_bad_steps_do_not_stop(flags, tmp_path, monkeypatch):
    poisoned(monkeypatch, {1, 3, 5, 7})
    run(flags(train__max_nonfinite_steps=2))
    assert find_checkpoint(tmp_path / "run").name == "step_0000008"


def test_clipping_bounds_the_gradient(flags, monkeypatch):
    norms = []
    step = TrainStep._step

    def noted(self, norm, loss, records):
        squares = [p.grad.square().sum() for p in self.bare.parameters() if p.grad is not None]
        norms.append((norm.item(), torch.stack(squares).sum().sqrt().item()))
        return step(self, norm, loss, records)

    monkeypatch.setattr(TrainStep, "_step", noted)
    run(flags(optim__grad_clip=0.01, train__max_steps=2))
    for reported, left in norms:
        assert reported > 0.01
        assert left == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo] Connection closed by peer [127.0.0.1]"),
        RuntimeError("[/pytorch/third_party/gloo] Timed out waiting 600000ms for recv operation"),
        RuntimeError(
            "NCCL error in: /pytorch/ProcessGroupNCCL.cpp:2, remote process exited or there was a "
            "network error, NCCL version 2.28.3\nncclRemoteError: A call failed possibly due to a "
            "network error or a remote process exiting prematurely."
        ),
        RuntimeError("DataLoader worker (pid 71) is killed by signal: Killed. "),
        ConnectionResetError(104, "Connection reset by peer"),
        EOFError(),
    ],
)
def test_losing_a_worker_or_a_process_is_one_clear_line(error):
    lost = r"a data worker or another process died or does not answer: \S"
    with pytest.raises(UserError, match=lost) as caught, losses_named():
        raise error
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("error", [ZeroDivisionError(), RuntimeError("shapes do not fit")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as caught, losses_named():
        raise error
    assert caught.value is error


class Hanging(LatentDataset):
    """A data set whose workers never answer."""

    def __getitems__(self, items):
        time.sleep(3600)


def test_a_hung_worker_ends_the_run(flags, monkeypatch):
    monkeypatch.setattr("data.sources.LatentDataset", Hanging)
    with pytest.raises(UserError, match=r"does not answer: .*timed out"):
        run(flags(data__num_workers=1, train__timeout=1))


@pytest.mark.slow
def test_disturbed_runs_end_bitwise_equal():
    """`python -m training.verify_resume` with two processes and one random moment."""
    command = [sys.executable, "-m", "training.verify_resume", "--kills", "1", "--processes", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "all bitwise equal"
    assert sum(line.endswith("bitwise equal |") for line in lines) == len(cases(1)) + 1


def test_verification_notices_a_difference(flags, tmp_path):
    from training.verify_resume import _compare, _outcome

    run(flags("one"))
    run(flags("other", seed=1))
    found = _compare(_outcome(tmp_path / "one"), _outcome(tmp_path / "other"))
    assert any(line.startswith("model: ") for line in found)
    assert any(line.startswith("log, step 2: loss/loss") for line in found)
    shutil.rmtree(tmp_path / "other")


def test_a_trainer_can_be_built_without_training(flags):
    state = Trainer(parse_config(flags(), "train.py"), ALONE).state
    assert state.step == 0
    assert set(state.modules()) == {"model", "ema"}
