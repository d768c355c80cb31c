"""python -m evaluations.scene_scores SOURCE --finder finder.safetensors [--out RESULTS.jsonl]

Whether images show the scenes of digits that their prompts ask for: what a finder (`python -m
evaluations.scene_finder`) sees in them, judged by the rules of GenEval. SOURCE is a set of samples
by prompts, a folder in GenEval's layout, or images with metadata.jsonl as `python -m data.scenes`
writes them; real ones show how far scores can go.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from core.errors import UserError, command
from core.files import complete_file, file_hash
from core.limits import check_out_file
from core.logging import get_logger, progress
from data.scenes import SIZE
from evaluations.geneval import Result, show
from evaluations.json_lines import read_lines
from evaluations.prompted import Prompt, Prompted, read_prompted
from evaluations.scene_finder import Finder, Found, find, load_finder
from evaluations.scene_rules import check_scene, faults
from sampling.needs import NotingParser, refuse_typed

BATCH = 256
"""Images at a time."""


def scenes_of(source: Prompted, prompts: Path | None) -> list[Prompt]:
    """What is asked of each image.

    Args:
        source: images and prompts.
        prompts: file by `python -m data.scenes` that knows the prompts where they are texts alone.

    Raises:
        UserError: a prompt that asks for no scene of digits.
    """
    known = {} if prompts is None else {one["prompt"]: one for one in _read_scenes(prompts)}
    scenes = [known.get(one["prompt"], one) if known else one for one in source.prompts]
    for scene in scenes:
        text = scene["prompt"]
        if known and text not in known:
            raise UserError(f"--prompts: {prompts} has no prompt {text!r}, which {source.path} has")
        try:
            check_scene(scene)
        except UserError as error:
            hint = "" if "tag" in scene else "; --prompts names the file that says"
            raise UserError(f"{source.path}: prompt {text!r}: {error}{hint}") from error
    return scenes


def _read_scenes(path: Path) -> list[Prompt]:
    def read(entry: dict) -> Prompt:
        if not isinstance(entry.get("prompt"), str):
            raise UserError("has no prompt")
        check_scene(entry)
        return entry

    return read_lines(path, "prompts", read)


def judge(source: Prompted, scenes: list[Prompt], finder: Finder) -> Iterator[dict[str, object]]:
    """A line of GenEval's result file for each image, with `unseen` where the scene says it.

    Raises:
        UserError: an image that is no scene.
    """
    with progress(None, None, "scenes", "img", total=len(scenes), leave=False) as bar:
        for indices, images in source.batches(BATCH):
            for i, image in zip(indices, images, strict=True):
                if image.shape != (SIZE, SIZE, 3):
                    shape = f"({SIZE}, {SIZE}, 3)"
                    raise UserError(f"{source.names[i]}: scenes are {shape}, this is {image.shape}")
            for i, found in zip(indices, find(finder, np.stack(images)), strict=True):
                yield _line(source.names[i], scenes[i], found)
            bar.update(len(images))


def _line(name: str, scene: Prompt, found: list[Found]) -> dict[str, object]:
    reasons = faults(found, scene)
    details: dict[str, list] = {}
    for one in found:
        place = [*one.quadrant, one.color, round(one.confidence, 4)]
        details.setdefault(one.digit, []).append(place)
    line = {
        "filename": name,
        "tag": scene["tag"],
        "prompt": scene["prompt"],
        "correct": not reasons,
        "reason": "\n".join(reasons),
        "metadata": json.dumps(scene),
        "details": json.dumps(details),
    }
    return line | ({"unseen": scene["unseen"]} if "unseen" in scene else {})


def _parse() -> argparse.Namespace:
    parser = NotingParser("evaluations.scene_scores", __doc__)
    add = parser.add_argument
    add("source", type=Path, help="folder of images of prompts")
    add("--finder", type=Path, required=True, help="file by evaluations.scene_finder")
    add("--prompts", type=Path, help="what the prompts ask for, where SOURCE has texts alone")
    add("--out", type=Path, help="result file in GenEval's format")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, judge the images and print the scores."""
    flags = _parse()
    if flags.out is not None:
        check_out_file("--out", flags.out)
    finder = load_finder(flags.finder)
    source = read_prompted(flags.source)
    if all("include" in one for one in source.prompts):
        refuse_typed(flags, ["prompts"], f"does nothing here; {source.path} says what they ask for")
    lines = list(judge(source, scenes_of(source, flags.prompts), finder))
    if flags.out is not None:
        with complete_file(flags.out) as temporary:
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    get_logger("evaluations.scene_scores").info(
        "%s: %d images, finder %.12s", source.path, len(lines), file_hash(flags.finder)
    )
    show([Result(o["tag"], o["correct"], o["metadata"], o.get("unseen")) for o in lines])


if __name__ == "__main__":
    main()
