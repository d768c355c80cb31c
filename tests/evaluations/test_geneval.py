"""GenEval's scores from result files."""

import json
import sys

import pytest

from data.compositions import TAGS
from evaluations import geneval
from evaluations.geneval import Result, overall, read_results, summary, table


def line(tag="colors", correct=True, prompt="a red one", **more):
    metadata = {"tag": tag, "prompt": prompt} | more.pop("about", {})
    about = {"filename": "x.png", "tag": tag, "prompt": prompt, "correct": correct, "reason": ""}
    return about | {"metadata": json.dumps(metadata), "details": "{}"} | more


def write(path, lines):
    path.write_text("".join(f"{json.dumps(one)}\n" for one in lines))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["geneval.py", *map(str, arguments)])
    geneval.main()


SHARES = dict(zip(TAGS, (1.0, 0.75, 0.5, 0.5, 0.25, 0.0), strict=True))


@pytest.fixture
def results(tmp_path):
    """Of each task 2 prompts with 2 images, and 2 more of the first: tasks count equally."""
    lines = [
        line(tag, i < 4 * share, f"{tag} {i // 2}")
        for tag, share in SHARES.items()
        for i in range(4)
    ]
    lines += [line(TAGS[0], True, "more") for _ in range(2)]
    return write(tmp_path / "results.jsonl", lines)


def test_scores_of_tasks_and_their_mean(results, tmp_path, monkeypatch, capsys):
    run(monkeypatch, results, "--out", tmp_path / "scores.json")
    header, _, values, images, prompts = capsys.readouterr().out.splitlines()
    names = "|  | Single | Two | Counting | Colors | Position | ColorAttr | Overall |"
    assert header == names
    assert values == "| all | 1.000 | 0.750 | 0.500 | 0.500 | 0.250 | 0.000 | 0.500 |"
    assert images == f"correct images: {14 / 26:.3f} of 26"
    assert prompts == f"correct prompts: {8 / 13:.3f} of 13"  # with one correct image at least
    found = json.loads((tmp_path / "scores.json").read_text())
    assert found["scores"] == SHARES | {"overall": 0.5}
    assert (found["images"], found["prompts"]) == (26, 13)
    assert len(found["results_sha256"]) == 64
    assert "seen" not in found


def test_an_incomplete_file_has_no_overall_score(tmp_path, monkeypatch, capsys, caplog):
    path = write(tmp_path / "r.jsonl", [line("colors"), line("position", False)])
    run(monkeypatch, path)
    out = capsys.readouterr().out
    assert "| all | - | - | - | 1.000 | 0.000 | - | - |" in out
    wanted = "no overall score: there are no images of single_object, two_object, counting, color_a"
    assert wanted in caplog.text
    assert overall({"colors": 1.0}) is None


def test_seen_and_unseen_stand_apart(tmp_path):
    lines = [line(tag, True, about={"unseen": False}) for tag in TAGS]
    lines += [line("colors", False, unseen=True), line("position", False, about={"unseen": True})]
    found = summary(read_results(write(tmp_path / "r.jsonl", lines)))
    assert found["seen"] == dict.fromkeys((*TAGS, "overall"), 1.0)
    assert found["unseen"] == {"colors": 0.0, "position": 0.0, "overall": None}
    assert found["scores"]["overall"] == pytest.approx((4 + 0.5 + 0.5) / 6)
    rows = table(found).splitlines()
    assert rows[3] == "| seen | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |"
    assert rows[4] == "| unseen | - | - | - | 0.000 | 0.000 | - | - |"


def test_results_of_the_evaluator_have_no_unseen():
    found = summary([Result("colors", True, "{}")])
    assert "seen" not in found
    assert "unseen" not in found


WITHOUT_TAG = {key: value for key, value in line().items() if key != "tag"}


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("", "no results in it; wanted: a JSON object in each line"),
        ("\n\n", "no results in it"),
        ("{", "line 1: is no JSON"),
        (json.dumps(line()) + "\n\n[1]\n", "line 3: is no JSON object but list"),
        (json.dumps(WITHOUT_TAG), "line 1: has no tag"),
        (json.dumps(line("colours")), "line 1: tag: unknown 'colours'; known: color_attr, colors"),
        (json.dumps(line(correct=1)), "line 1: correct: 1 is not allowed; wanted: true, false"),
        (json.dumps(line(metadata="{")), "line 1: metadata: is no JSON"),
        (json.dumps(line(unseen="no")), 'line 1: unseen: "no" is not allowed'),
    ],
)
def test_bad_results_are_named(content, wanted, tmp_path, monkeypatch, capsys):
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, path)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {path}: {wanted}")
    assert error.count("\n") == 1


def test_only_newlines_end_a_line(tmp_path):
    """U+2028 may stand in a JSON text as it is; evaluators that do not escape it write it so."""
    path = tmp_path / "results.jsonl"
    entry = json.dumps(line(prompt="a red\u2028one"), ensure_ascii=False)
    path.write_text(f"{entry}\r\n{entry}\n", encoding="utf-8", newline="")
    assert len(read_results(path)) == 2
