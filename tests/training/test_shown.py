"""What a run shows and leaves: loggers, traces, progress, dumps."""

import gzip
import json
import shutil
import sys

import pytest
from tiny_runs import poisoned, run

from config.load import parse_config
from core.errors import UserError
from models.pretrained import find_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_second_dump_does_not_hide_the_cause(flags, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(2, 100)))
    argv = flags(
        train__max_steps=20,
        train__log_every=5,
        train__ckpt_every=100,
        train__max_nonfinite_steps=3,
    )
    for name in ("nonfinite_step_0000005", "nonfinite_step_0000005.2"):
        folder = tmp_path / "run" / name
        cause = r"3 steps in a row had a non-finite loss .*; weights and facts are in "
        with pytest.raises(UserError, match=f"{cause}{folder}$"):
            run(argv)
        assert find_checkpoint(tmp_path / "run").name == "step_0000005"  # skipped steps are sound
        shutil.rmtree(tmp_path / "run" / "checkpoints")
        facts = json.loads((folder / "facts.json").read_text())
        assert facts["parameters_with_nonfinite_gradient"] == ["final.linear.bias"]


def test_a_dump_without_room_still_names_the_cause(flags, tmp_path, monkeypatch):
    poisoned(monkeypatch, set(range(2, 100)))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("training.dump.write_now", full)
    argv = flags(train__max_steps=20, train__log_every=5, train__max_nonfinite_steps=3)
    cause = "had a non-finite loss .*; no weights could be kept: No space left on device"
    with pytest.raises(UserError, match=cause):
        run(argv)
    assert not list((tmp_path / "run").glob("*nonfinite*"))


def test_a_trace_of_the_steps_that_were_asked_for(flags, tmp_path):
    run(flags(train__profile_steps="[2, 3]", train__max_steps=5))
    (trace,) = (tmp_path / "run" / "profile").iterdir()
    assert trace.name == "trace_step_0000002.json.gz"
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    steps = [e for e in events if e.get("name", "").startswith("Optimizer.step")]
    assert len(steps) == 2


@pytest.mark.parametrize("steps", ["[3, 2]", "[0, 8]", "[-1, 2]"])
def test_steps_that_cannot_be_traced_are_refused(steps, flags):
    with pytest.raises(UserError, match=r"train.profile_steps: .* are no first and last step of"):
        parse_config(flags(train__profile_steps=steps), "train.py")


def test_both_loggers_get_the_numbers(flags, tmp_path, monkeypatch):
    """Offline, wandb writes its own file; the run keeps its name when it goes on."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    pytest.importorskip("wandb")
    run(flags(train__logger="both", train__max_steps=2))
    run(flags(train__logger="both", train__max_steps=4))
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))
    written = list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    names = {path.name for path in written}
    run_id = json.loads((tmp_path / "run" / "attempts" / "0001.json").read_text())["run_id"]
    assert names == {f"run-{run_id}.wandb"}
    assert any(b"loss/loss" in path.read_bytes() for path in written)


def test_a_logger_that_is_not_installed_is_one_line(flags, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"train.logger: wandb needs the package wandb"):
        run(flags(train__logger="wandb"))


def test_progress_in_a_file_is_lines_and_errors_stand_alone(flags, tmp_path, start):
    fault = """
from core.errors import UserError
from models.pretrained import find_checkpoint
def refuse(self, batches, step):
    if step == 5:
        raise UserError("the reason")
before(TrainStep, "__call__", refuse)
"""
    code, errors = start(flags(), fault).end()
    assert code == 2
    assert "\r" not in errors
    assert errors.splitlines()[-1] == "error: the reason"
    assert any(line.startswith("training: ") and "5/8" in line for line in errors.splitlines())
