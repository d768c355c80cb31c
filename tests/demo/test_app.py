"""The command: what it loads, what it refuses before it serves anything, recorded sets."""

import json
import shutil
import socket

import numpy as np
import pytest

from core.distributed import Processes
from core.errors import UserError
from demo import app, show
from demo.recorded import classes, read
from evaluations.overlay import overlay
from evaluations.sampled import parse_flags, sample_and_score


def studio(*argv):
    return app.studio_of(app.parse_flags([str(word) for word in argv]))


def test_several_checkpoints_have_names_of_their_own(trained):
    found = studio("--ckpt", trained, trained)
    first, second = found.pipes
    assert second == f"{first} again"
    assert found.pipe(first).class_names == ["class0", "class1", "class2"]


@pytest.mark.parametrize(
    ("argv", "wanted"),
    [
        (["--ckpt", "/nowhere"], "/nowhere: no checkpoint here"),
        (["--ckpt", "{run}", "--weights", "best"], "weights: unknown 'best'"),
        (["--ckpt", "{run}", "{t2i}"], "draws 3 classes, .* prompts; side by side"),
        (["--ckpt", "{broken}"], "model.safetensors|ema.safetensors"),
        (["--port", "0"], "'0' is no port"),
        (["--port", "web"], "'web' is no port"),
        (["--cpkt", "x"], "did you mean --ckpt"),
        (["--device", "tpu"], "tpu"),
    ],
    ids=str,
)
def test_what_cannot_be_shown(argv, wanted, trained, trained_t2i, tmp_path, monkeypatch):
    monkeypatch.setattr("models.sealed.PAUSES", ())
    broken = tmp_path / "broken"
    shutil.copytree(trained / "checkpoints" / "step_0000004", broken)
    weights = broken / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    paths = {"run": trained, "t2i": trained_t2i, "broken": broken}
    with pytest.raises(UserError, match=wanted) as refused:
        studio(*(word.format(**paths) for word in argv))
    assert "\n" not in str(refused.value)


def test_without_the_quickstart_a_line_says_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"runs/quickstart/train .* `bash scripts/quickstart.sh`"):
        studio()


def test_a_port_in_use_is_refused_before_anything_is_loaded(capsys, monkeypatch):
    monkeypatch.setattr(app, "studio_of", lambda flags: pytest.fail("loaded"))
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(SystemExit) as end:
            app.main(["--port", str(port)])
    assert end.value.code == 2
    assert capsys.readouterr().err == (
        f"error: --port: cannot listen at 127.0.0.1:{port}: Address already in use\n"
    )
    with pytest.raises(UserError, match=r"cannot listen at nowhere\.invalid"):
        app.check_port("nowhere.invalid", 7860)


@pytest.fixture(scope="module")
def record(trained, tmp_path_factory):
    """The folder of a recorded set."""
    argv = ["--ckpt", trained, "--sample-dir", tmp_path_factory.mktemp("samples"), "--capacity"]
    argv += ["--num-fid-samples", 6, "--per-proc-batch-size", 6, "--labels", "balanced"]
    flags = parse_flags([str(word) for word in argv])
    return sample_and_score(flags, Processes(0, 1, app.torch.device("cpu"))).parent


def test_a_recorded_set_is_shown_without_a_model(record):
    assert app.studio_of(app.parse_flags(["--record", str(record)])) is None
    drawn, run = read(record)
    with np.load(record / "samples.npz") as file:
        images = file["arr_0"]
    np.testing.assert_array_equal(drawn.images, images)
    assert drawn.evaluations == 3
    page = show.pictures(drawn, 2, 0)
    assert page.count("dm-map") == 6
    from test_work import pictures

    maps = run.table.maps[1].astype(np.float32)
    np.testing.assert_array_equal(pictures(page), overlay(images, maps, drawn.top))
    names, spent, shown = classes(run)
    assert names == ["class0", "class1", "class2"]
    assert [len(one) for one in shown] == [2, 2, 2]
    assert show.ranked(names, spent, shown).count("dm-row") == 3
    with pytest.raises(UserError, match="step: 4"):
        show.pictures(drawn, 4, 0)


def test_the_page_of_a_recorded_set_alone(record):
    from demo.page import build

    page = build(None, {"set": read(record)})
    assert [fn.api_name for fn in page.fns.values()] == ["recorded_0"]


def damage(folder, kind):
    if kind == "half a file":
        whole = (folder / "capacity.npz").read_bytes()
        (folder / "capacity.npz").write_bytes(whole[: len(whole) // 2])
    if kind == "no routing":
        (folder / "capacity.npz").unlink()
    if kind == "half a record":
        (folder / "set.json").write_text((folder / "set.json").read_text()[:50])
    if kind == "another record":
        settings = json.loads((folder / "set.json").read_text())
        (folder / "set.json").write_text(json.dumps(settings | {"set_sha256": "0" * 64}))
    if kind == "no arrays":
        with np.load(folder / "capacity.npz") as file:
            arrays = dict(file)
        del arrays["maps"]
        np.savez(folder / "capacity.npz", **arrays)


@pytest.mark.parametrize(
    "kind", ["half a file", "no routing", "half a record", "another record", "no arrays", "nothing"]
)
def test_a_damaged_record_is_one_line(kind, record, tmp_path):
    folder = tmp_path / "set"
    if kind != "nothing":
        shutil.copytree(record, folder)
        damage(folder, kind)
    with pytest.raises(UserError) as refused:
        read(folder)
    assert "\n" not in str(refused.value)
    assert str(folder) in str(refused.value)
