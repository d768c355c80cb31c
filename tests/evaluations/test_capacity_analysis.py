"""Where the computation goes: the recorder around the model, and what is read from its table."""

import dataclasses
import json
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from config.load import parse_config, to_plain
from core.conditions import Condition
from core.errors import UserError
from core.types import ModelOutput, RoutingPlan, RoutingRecord
from evaluations import capacity
from evaluations.capacity import average, by_class, numbers, over_classes, read_run
from models.summary import summarize
from sampling.recorder import RoutingRecorder, RoutingTable
from sampling.sets import SetFolder

NULL = 3


def null(cond):
    return Condition(torch.full_like(cond.labels, NULL)).side(free=True)


def record_of(counts):
    """A layer's record of counts (B, E): expert e takes the first counts[b, e] of 4 tokens."""
    B, E = len(counts), len(counts[0])
    pairs = [[b * 4 + s for b in range(B) for s in range(counts[b][e])] for e in range(E)]
    index = torch.tensor([token for part in pairs for token in part])
    sizes = torch.tensor([len(part) for part in pairs])
    plan = RoutingPlan(index, torch.ones(len(index)), sizes)
    return RoutingRecord(torch.tensor(counts), 4, plan=plan)


class Scripted:
    """Routes by class: a sample of class c gives c + 1 and 1 pairs; unconditional ones 0 and 2."""

    def __call__(self, x, t, cond):
        counts = [[0, 2] if c == NULL else [c + 1, 1] for c in cond.labels.tolist()]
        return ModelOutput(x, [record_of(counts), record_of([[1, 1]] * len(counts))])


def call(recorder, labels, t, joint=False, guided=True):
    """One evaluation as `Guided` makes it."""
    cond = Condition.of_labels(labels)
    x, times = torch.zeros(len(labels), 1, 2, 2), torch.full((len(labels),), t)
    if joint:
        recorder(torch.cat([x, x]), torch.cat([times, times]), cond.cat(null(cond)))
        return
    recorder(x, times, cond)
    if guided:
        recorder(x, times, null(cond))


@pytest.mark.parametrize("joint", [False, True])
def test_counts_by_evaluation_half_layer_sample_and_expert(joint):
    recorder = RoutingRecorder(Scripted(), 3)
    for t in (0.0, 0.5, 0.5):  # a solver may look at one time twice
        call(recorder, [0, 2, 1], t, joint)
    arrays = recorder.arrays(kept=2)
    assert arrays["counts"].shape == (3, 2, 2, 2, 2)
    assert arrays["counts"][1, 0, 0].tolist() == [[1, 1], [3, 1]]
    assert arrays["counts"][1, 1, 0].tolist() == [[0, 2], [0, 2]]
    assert (arrays["counts"][:, :, 1] == 1).all()
    assert arrays["times"].tolist() == [0.0, 0.5, 0.5]
    # Layer 1 takes tokens 0 ... 2 with expert 0 and token 0 with expert 1, layer 2 token 0 twice.
    assert arrays["maps"][0, 1].tolist() == [2.0, 0.5, 0.5, 0.0]


def test_halves_that_are_not_computed_are_left_out():
    recorder = RoutingRecorder(Scripted(), 2)
    call(recorder, [0, 1], 0.0, guided=False)
    call(recorder, [0, 1], 0.5)
    arrays = recorder.arrays(2)
    assert (arrays["counts"][0, 1] == -1).all()
    table = RoutingTable.start(arrays, 3)
    table.add(arrays, np.array([0, 1]))
    assert table.samples[:, :, :2].tolist() == [[[1, 1], [0, 0]], [[1, 1], [1, 1]]]
    assert np.isnan(over_classes(table)[0, 1]).all()
    assert np.isfinite(over_classes(table)[1]).all()


def test_a_model_without_classes_is_conditional():
    recorder = RoutingRecorder(Scripted(), 2)
    for t in (0.0, 0.5, 0.5):
        call(recorder, [NULL, NULL], t, guided=False)
    assert len(recorder.arrays(2)["times"]) == 3


def table_of(*blocks):
    table = None
    for labels in blocks:
        recorder = RoutingRecorder(Scripted(), len(labels))
        for t in (0.0, 0.5):
            call(recorder, labels, t)
        arrays = recorder.arrays(len(labels))
        table = table or RoutingTable.start(arrays, 3)
        table.add(arrays, np.array(labels))
    return table


def test_numbers_of_a_table():
    table = table_of([0, 1, 1], [1, 0])
    # Pairs of 4 tokens in two layers: class c has c + 2 and 2, the unconditional half 2 and 2.
    assert by_class(table)[:2].tolist() == [(2 + 2) / 8, (3 + 2) / 8]
    assert np.isnan(by_class(table)[2])
    conditional = (2 * 4 + 3 * 5) / (5 * 8)
    assert average(table) == pytest.approx((conditional + 0.5) / 2)
    shares = over_classes(table)
    assert shares[0, 0, 0].tolist() == [(2 * 1 + 3 * 2) / 20, 5 / 20]
    assert table.capacity()[1, 0, 0, :, 1].tolist() == [2 / 4, 1 / 4]


def test_blocks_of_other_steps_are_refused():
    table = table_of([0, 1])
    recorder = RoutingRecorder(Scripted(), 2)
    call(recorder, [0, 1], 0.25)
    with pytest.raises(UserError, match="use a solver of fixed steps"):
        table.add(recorder.arrays(2), np.array([0, 1]))


HASHES = {"checkpoint_sha256": "a" * 64, "set_sha256": "b" * 64}


@pytest.fixture
def a_set(tmp_path):
    """Files of a set, as sample_ddp.py leaves them."""
    labels = [0, 1, 2, 0, 1, 2, 1, 0]
    config = parse_config(["--model.hidden_size", "48", "--model.depth", "2"], "train.py")
    record = {"config": to_plain(dataclasses.asdict(config)), "class_names": ["a", "b", "c"]}
    record |= {"run": "one", **HASHES}
    folder = SetFolder(tmp_path / "one" / "set")
    folder.path.mkdir(parents=True)
    folder.write_record(record)
    arrays = vars(table_of(labels)) | HASHES
    np.savez(folder.routing, **arrays, labels=np.array(labels))
    values = 100 + np.arange(len(labels), dtype=np.uint8)
    images = np.broadcast_to(values[:, None, None, None], (len(labels), 4, 4, 3))
    np.savez(folder.archive, arr_0=images, **HASHES)
    return folder, config


def test_the_command_prints_numbers_and_draws(a_set, tmp_path, monkeypatch, capsys):
    folder, config = a_set
    monkeypatch.setattr(sys, "argv", ["prog", str(folder.path)])
    capacity.main()
    printed = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    found = numbers(read_run(folder.path))
    summary = summarize(config.model)
    assert float(printed["C_infer (Eq. 15)"]) == pytest.approx(found["C_infer (Eq. 15)"], abs=1e-4)
    assert found["C_infer, unconditional"] == 0.5
    assert found["activated parameters, counted"] == summary.activated(found["C_infer (Eq. 15)"])
    kept = json.loads(folder.numbers.read_text())
    assert {name: kept.pop(name) for name in HASHES} == HASHES
    assert kept == pytest.approx(found)
    for name in ("steps", "experts", "maps", "classes"):
        with Image.open(folder.figure(name)) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
            assert {name: picture.text[name] for name in HASHES} == HASHES
    monkeypatch.setattr(sys, "argv", ["prog", str(folder.record), "--out", str(tmp_path / "out")])
    capacity.main()
    assert (tmp_path / "out" / "one" / "set" / "steps.png").exists()


def test_where_every_token_takes_as_many_experts_only_these_are_drawn(a_set):
    folder, _ = a_set
    with np.load(folder.routing) as file:
        arrays = dict(file)
    np.savez(folder.routing, **arrays | {"maps": np.full_like(arrays["maps"], 2)})
    drawn = capacity.draw(read_run(folder.path), folder.path)
    assert [p.name for p in drawn] == ["experts.png"]


def test_the_class_figure_shows_hardest_first_with_their_images(a_set):
    run = read_run(a_set[0].path)
    images = np.load(run.folder.archive)["arr_0"]
    names = ["a", "b", "c"]
    figure = capacity.class_figure(by_class(run.table), names, run.labels, images)
    bars, pictures = figure.axes
    assert [text.get_text() for text in bars.get_yticklabels()] == ["c", "a"]
    drawn = pictures.images[0].get_array()
    assert drawn[0, ::4, 0].tolist() == [102, 105, 255, 255, 255]  # samples 2 and 5 are of class c
    assert drawn[4, ::4, 0].tolist() == [100, 103, 107, 255, 255]


def test_no_expert_leaves_its_figure():
    shares = np.full((5, 3, 2), 0.1)
    shares[4, 1, 0] = 0.9  # in the second layer only
    for axes in capacity.expert_figure(shares).axes:
        low, high = axes.get_ylim()
        assert (low, high > 0.9) == (0.0, True)


def test_the_step_figure_has_a_line_for_each_half(a_set):
    layers = over_classes(read_run(a_set[0].path).table).sum(axis=-1)
    axes = capacity.step_figure(layers, capacity.SIDES).axes[0]
    lines = {line.get_label(): line.get_ydata() for line in axes.lines}
    np.testing.assert_allclose(lines["unconditional"], [0.5, 0.5])
    np.testing.assert_allclose(lines["conditional"], layers[:, 0].mean(axis=-1))


def refusal(monkeypatch, capsys, path):
    monkeypatch.setattr(sys, "argv", ["prog", str(path)])
    with pytest.raises(SystemExit, match="2"):
        capacity.main()
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_what_is_no_set_with_records_is_named(a_set, tmp_path, monkeypatch, capsys):
    """Each for its own reason: no set, one without records, files of another set."""
    folder, _ = a_set
    (tmp_path / "x.json").write_text("{}")
    (tmp_path / "begun" / "parts").mkdir(parents=True)
    for path, ending in (
        (tmp_path / "none", "set.json"),
        (tmp_path / "x.json", "set.json"),
        (tmp_path / "begun", "set.json; it is not finished"),
    ):
        said = refusal(monkeypatch, capsys, path)
        assert said.endswith(f"{path}: no set of samples; wanted: a folder with {ending}")
    with np.load(folder.routing) as file:
        arrays = dict(file)
    np.savez(folder.routing, **arrays | {"set_sha256": "c" * 64})
    said = refusal(monkeypatch, capsys, folder.path)
    assert "capacity.npz: belongs to another set: set_sha256 is cccc" in said
    np.savez(folder.routing, x=np.zeros(3))
    said = refusal(monkeypatch, capsys, folder.path)
    assert "belongs to another set: checkpoint_sha256 is nothing there" in said
    folder.routing.write_bytes(b"words")
    assert "capacity.npz: no readable .npz file" in refusal(monkeypatch, capsys, folder.path)
    folder.routing.unlink()
    said = refusal(monkeypatch, capsys, folder.path)
    assert said.endswith("has no capacity.npz; sample with --capacity")
    folder.record.write_text("{}")
    assert "no record of a set of samples" in refusal(monkeypatch, capsys, folder.path)
    folder.record.write_text("{")
    assert "set.json: not readable" in refusal(monkeypatch, capsys, folder.path)
