"""SIGTERM and Ctrl-C: nothing is lost, nobody waits for what can be done later."""

import json
import signal
import time

import pytest
from programs import wait_for
from tiny_runs import HANG, ROOT, run, same, slowly

from models.pretrained import find_checkpoint
from models.sealed import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_same_command_goes_on(number, flags, tmp_path, start):
    run(flags("whole"))
    argv = flags(train__ckpt_every=100)
    program = start(argv, slowly(0.1))
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    program.signal(number)
    code, errors = program.end()
    assert code == 0
    assert "Traceback" not in errors
    assert f"{number.name}: stopping after this step, with a checkpoint" in errors
    step = int(find_checkpoint(tmp_path / "run").name[5:])
    assert f"stopped at step {step}; --resume auto goes on" in errors
    assert 2 <= step < 8
    run(argv)
    same(tmp_path / "whole", tmp_path / "run")


def test_a_second_ctrl_c_ends_at_once(flags, tmp_path, start):
    program = start(flags(train__ckpt_every=100), HANG + slowly(0.05))
    wait_for(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    program.signal(signal.SIGINT)
    wait_for(lambda: list((tmp_path / "run" / "checkpoints").glob(".step_*.tmp")))
    program.signal(signal.SIGINT)  # the terminal's and torchrun's own come within a second
    time.sleep(1.2)
    assert program.process.is_alive()
    program.signal(signal.SIGINT)
    code, errors = program.end(timeout=20)
    assert code == 130
    assert errors.rstrip().endswith("interrupted")
    assert "Traceback" not in errors
    assert checkpoints(tmp_path / "run") == []


@pytest.mark.parametrize("look", ["validation", "grid"])
def test_a_stop_does_not_wait_for_looks_which_are_taken_later(
    look, flags, tmp_path, cache, start, monkeypatch
):
    """A validation of hours, or a grid, is broken off, and made when the run goes on."""
    changes = {
        "validation": {"train__val_every": 4, "data__val_cached_path": cache},
        "grid": {"train__sample_every": 4, "sampling__num_steps": 4},
    }[look]
    argv = flags(**changes)
    method = {"validation": "_validate", "grid": "_sample_grid"}[look]
    program = start(
        argv,
        f"""
without_vae()
def hours(self, step, model, *_):
    model.register_forward_pre_hook(lambda *_: time.sleep(2.5))
    Path("{tmp_path}/looking").touch()
before(Looks, "{method}", hours)
""",
    )
    wait_for((tmp_path / "looking").exists)
    began = time.monotonic()
    program.signal(signal.SIGTERM)
    code, errors = program.end()
    assert code == 0, errors
    assert time.monotonic() - began < 8  # not the 10 or 16 evaluations of 2.5 s
    assert find_checkpoint(tmp_path / "run").name == "step_0000004"
    monkeypatch.setattr("training.looks.open_vae", lambda path, device: decoder())
    run(argv)
    steps = [json.loads(x) for x in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    if look == "validation":
        assert [e["step"] for e in steps if "val/loss" in e] == [4, 8]
    else:
        found = sorted(path.name for path in (tmp_path / "run" / "samples").iterdir())
        assert found == ["step_0000004.png", "step_0000008.png"]


def decoder():
    from training.faults import Decoder

    return Decoder()


def test_launchers_are_given_time_to_save():
    for name in ("scripts/train.slurm", "docs/how/cluster.md", "docs/training.md"):
        text = (ROOT / name).read_text()
        launches = text.count("--max_restarts") + text.count("--max-restarts=")
        assert text.count("--shutdown-timeout") >= launches, name
