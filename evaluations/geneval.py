"""python -m evaluations.geneval RESULTS.jsonl [--out FILE.json]

Scores of GenEval (Ghosh et al. 2023) from the result file of its evaluator, or of `python -m
evaluations.scene_scores`, as a Markdown table.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from core.command_line import Parser
from core.errors import UserError, command, unknown_name
from core.files import complete_file, file_hash
from core.limits import check_out_file
from core.logging import get_logger
from data.compositions import TAGS
from evaluations.json_lines import read_lines

COLUMNS = dict(
    zip(TAGS, ("Single", "Two", "Counting", "Colors", "Position", "ColorAttr"), strict=True)
)
"""Names of the tasks in tables of papers."""

ROWS = ("scores", "seen", "unseen")
"""Of the table, by their names in a summary."""

log = get_logger("evaluations.geneval")


@dataclass(frozen=True)
class Result:
    """What the evaluator says of an image.

    Attributes:
        tag: task of its prompt, one of TAGS.
        correct: whether it shows what the prompt asks for.
        metadata: the prompt's line, which tells prompts apart.
        unseen: whether training has no such combination; None where nobody says so.
    """

    tag: str
    correct: bool
    metadata: str
    unseen: bool | None = None


def read_results(path: Path) -> list[Result]:
    """The results of a file, a line for each image.

    Raises:
        UserError: naming file, line and what is wrong.
    """
    return read_lines(path, "results", _result)


def _result(found: dict) -> Result:
    missing = [name for name in ("tag", "correct", "metadata") if name not in found]
    if missing:
        raise UserError(f"has no {missing[0]}")
    tag, correct, metadata = found["tag"], found["correct"], found["metadata"]
    if tag not in TAGS:
        raise unknown_name("tag", tag, TAGS)
    if not isinstance(correct, bool):
        raise UserError(f"correct: {json.dumps(correct)} is not allowed; wanted: true, false")
    unseen = found.get("unseen", _unseen(metadata))
    if not isinstance(unseen, bool | None):
        raise UserError(f"unseen: {json.dumps(unseen)} is not allowed; wanted: true, false")
    return Result(tag, correct, str(metadata), unseen)


def _unseen(metadata: object) -> object:
    """What the prompt's own line says."""
    try:
        about = json.loads(metadata) if isinstance(metadata, str) else metadata
    except ValueError as error:
        raise UserError(f"metadata: is no JSON: {error}") from error
    return about.get("unseen") if isinstance(about, dict) else None


def task_scores(results: list[Result]) -> dict[str, float]:
    """Share of correct images of each task that has any, in the order of TAGS."""
    correct = {tag: [one.correct for one in results if one.tag == tag] for tag in TAGS}
    return {tag: float(np.mean(values)) for tag, values in correct.items() if values}


def overall(scores: dict[str, float]) -> float | None:
    """The unweighted mean of the six tasks; None where one is missing."""
    return float(np.mean([scores[tag] for tag in TAGS])) if len(scores) == len(TAGS) else None


def summary(results: list[Result]) -> dict[str, object]:
    """Scores, and the shares of images and of prompts that are correct.

    A prompt counts as correct when one of its images is. Where results say what training had, the
    scores of `seen` and `unseen` combinations stand apart as well.
    """
    prompts: dict[str, bool] = {}
    for one in results:
        prompts[one.metadata] = prompts.get(one.metadata, False) or one.correct
    parts = {"seen": False, "unseen": True}
    apart = {n: [one for one in results if one.unseen is kind] for n, kind in parts.items()}
    return {
        "images": len(results),
        "correct_images": float(np.mean([one.correct for one in results])),
        "prompts": len(prompts),
        "correct_prompts": float(np.mean(list(prompts.values()))),
        "scores": _scores(results),
    } | {name: _scores(part) for name, part in apart.items() if part}


def _scores(results: list[Result]) -> dict[str, float | None]:
    scores = task_scores(results)
    return scores | {"overall": overall(scores)}


def table(found: dict[str, object]) -> str:
    """Scores of a `summary` under the names that papers give them."""
    rows = {"all" if name == "scores" else name: found.get(name) for name in ROWS}
    lines = [["", *COLUMNS.values(), "Overall"], ["---"] * (len(COLUMNS) + 2)]
    for name, scores in rows.items():
        if scores is not None:
            values = (scores.get(tag) for tag in (*TAGS, "overall"))
            lines.append([name, *("-" if v is None else f"{v:.3f}" for v in values)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def show(results: list[Result]) -> dict[str, object]:
    """Print the table of some results, and name the tasks that are missing.

    Returns:
        Their summary.
    """
    found = summary(results)
    sys.stdout.write(f"{table(found)}\n")
    for thing in ("images", "prompts"):
        sys.stdout.write(f"correct {thing}: {found[f'correct_{thing}']:.3f} of {found[thing]}\n")
    missing = [tag for tag in TAGS if tag not in found["scores"]]
    if missing:
        log.warning("no overall score: there are no images of %s", ", ".join(missing))
    return found


def _parse() -> argparse.Namespace:
    parser = Parser("evaluations.geneval", __doc__)
    parser.add_argument("results", type=Path, help="file of GenEval's evaluator")
    parser.add_argument("--out", type=Path, help="JSON with the scores")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line and print the scores."""
    flags = _parse()
    if flags.out is not None:
        check_out_file("--out", flags.out)
    found = show(read_results(flags.results))
    if flags.out is not None:
        about = {"results": str(flags.results), "results_sha256": file_hash(flags.results)}
        with complete_file(flags.out) as temporary:
            temporary.write_text(json.dumps(found | about, indent=2) + "\n")


if __name__ == "__main__":
    main()
