"""python -m evaluations.scene_finder --out finder.safetensors

Train the finder that `python -m evaluations.scene_scores` looks with for coloured digits in the
quadrants of small scenes (`python -m data.scenes`). It learns from scenes that it paints itself of
the training scans, so that it knows what stands where.

Shapes: N crops or images, S = 16 the side of a crop.
"""

import argparse
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.command_line import Parser, positive
from core.errors import UserError, command
from core.limits import check_out_file
from core.logging import get_logger, progress
from core.rng import derive_seed, generator
from data.compositions import DIGITS, PALETTE
from data.scenes import SIZE
from evaluations.scene_crops import NOTHING, QUADRANTS, SIDE, Crops, draw_crops, ink, spoil
from evaluations.scene_crops import quadrants as cut
from evaluations.weight_files import read_weights, write_weights

FORMAT = "diffmoe-scene-finder-1"
THRESHOLD = 0.5
"""Confidence below which there is no digit. GenEval's detector takes 0.3, and 0.9 for counting,
since its boxes may find one object several times; a quadrant has one finding or none."""


@dataclass(frozen=True)
class TrainSettings:
    """How a finder is trained; the defaults need less than a minute on two cores."""

    seed: int = 0
    scenes: int = 4000
    epochs: int = 10
    batch_size: int = 64
    learning_rate: float = 4e-3
    weight_decay: float = 0.01


@dataclass(frozen=True)
class Found:
    """A digit that the finder sees: class, colour, quadrant (row, column) and how sure it is."""

    digit: str
    color: str
    quadrant: tuple[int, int]
    confidence: float


class Finder(nn.Module):
    """Four convolutions and two linear layers; about 126,000 parameters."""

    widths = (24, 48, 48, 64)

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        last = 1
        for width, stride in zip(self.widths, (1, 2, 1, 2), strict=True):
            layers += [nn.Conv2d(last, width, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            last = width
        layers += [nn.Flatten(), nn.Linear(last * (SIDE // 4) ** 2, 64), nn.GELU()]
        self.body = nn.Sequential(*layers, nn.Linear(64, len(DIGITS) + 1))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (N, 11), of the digits and of nothing, of ink `x` (N, 1, S, S) in [0, 1]."""
        return self.body(x)


def train_finder(crops: Crops, settings: TrainSettings) -> Finder:
    """Train on the CPU; the weights are a function of the arguments and torch's threads.

    Raises:
        UserError: fewer digits than one batch.
    """
    # Layers draw their weights from the global generator: it is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "scene finder"))
        finder = Finder()
    x, labels = ink(torch.from_numpy(crops.images)), torch.from_numpy(crops.labels)
    digits, nothing = (torch.nonzero(side)[:, 0] for side in (labels != NOTHING, labels == NOTHING))
    # Black quadrants are easy: an eighth of a batch will do.
    size = settings.batch_size
    steps, empty = len(digits) // size, size // 8
    if steps == 0:
        raise UserError(f"--scenes: too few: {len(digits)} digits do not fill a batch of {size}")
    optimizer = torch.optim.AdamW(
        finder.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * steps
    )
    with progress(None, None, "finder", "step", total=settings.epochs * steps, leave=False) as bar:
        for epoch in range(settings.epochs):
            draw = generator(settings.seed, "scene finder", epoch)
            order = digits[torch.randperm(len(digits), generator=draw)][: steps * size]
            for batch in order.view(steps, size):
                black = nothing[torch.randint(len(nothing), (empty,), generator=draw)]
                chosen = torch.cat([batch, black])
                spoilt, wanted = spoil(x[chosen], labels[chosen], draw)
                loss = F.cross_entropy(finder(spoilt), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
    return finder.eval()


def save_finder(path: Path, finder: Finder, record: dict) -> None:
    """Write the weights, with `record` (JSON) beside them; complete or not at all.

    Raises:
        UserError: the folder of `path` does not exist.
    """
    write_weights(path, finder.state_dict(), FORMAT, record)


def load_finder(path: Path) -> Finder:
    """The finder of a file by `save_finder`, on the CPU, ready to look.

    Raises:
        UserError: no such file, or not such a file.
    """
    made_by = ("--finder", "finder of scenes", "evaluations.scene_finder")
    tensors, _ = read_weights(path, FORMAT, *made_by)
    with torch.random.fork_rng(devices=[]):
        finder = Finder()
    try:
        finder.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"--finder: weights in {path} do not fit: {error}") from error
    return finder.eval()


@torch.inference_mode()
def classify(finder: Finder, crops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Labels (N,), NOTHING below THRESHOLD, and confidences (N,) of crops (N, S, S, 3) uint8."""
    parts = [
        finder(ink(torch.from_numpy(crops[i : i + 1024]))).softmax(dim=1)[:, :NOTHING]
        for i in range(0, len(crops), 1024)
    ]
    confidence, labels = torch.cat(parts).max(dim=1)
    labels[confidence < THRESHOLD] = NOTHING
    return labels.numpy(), confidence.numpy()


def colors_of(crops: np.ndarray) -> list[str]:
    """Names in PALETTE of the colours of crops (N, S, S, 3) uint8.

    The mean over the brightest pixels, compared by direction: a darker shade is the same colour.
    """
    values = crops.astype(np.float64).reshape(len(crops), -1, 3)
    bright = values.max(axis=2)
    weights = (bright - bright.max(axis=1, keepdims=True) / 2).clip(0)
    means = (weights[..., None] * values).sum(axis=1)
    palette = np.array(list(PALETTE.values()), np.float64)
    likeness = means @ (palette / np.linalg.norm(palette, axis=1, keepdims=True)).T
    return [list(PALETTE)[i] for i in likeness.argmax(axis=1)]


def find(finder: Finder, images: np.ndarray) -> list[list[Found]]:
    """What stands in scenes, for each of them the surest finding first.

    Args:
        finder: that looks.
        images: (N, 32, 32, 3) uint8.

    Raises:
        UserError: images of another size or type.
    """
    if images.dtype != np.uint8 or images.shape[1:] != (SIZE, SIZE, 3):
        raise UserError(
            f"images: scenes are uint8 (N, {SIZE}, {SIZE}, 3), got {images.dtype} {images.shape}"
        )
    crops = cut(images)
    labels, confidence = classify(finder, crops)
    colors = colors_of(crops)
    scenes = []
    for first in range(0, len(crops), len(QUADRANTS)):
        there = [
            Found(DIGITS[labels[i]], colors[i], place, float(confidence[i]))
            for i, place in enumerate(QUADRANTS, first)
            if labels[i] != NOTHING
        ]
        scenes.append(sorted(there, key=lambda one: -one.confidence))
    return scenes


def measure(finder: Finder, crops: Crops) -> dict[str, float]:
    """Shares of crops that are found right: digits, empty quadrants, colours of digits."""
    labels, _ = classify(finder, crops.images)
    is_digit, right = crops.labels != NOTHING, labels == crops.labels
    colors = np.array(colors_of(crops.images)) == np.array(crops.colors)
    return {
        "digits": float(right[is_digit].mean()),
        "nothing": float(right[~is_digit].mean()),
        "colors": float(colors[is_digit].mean()),
    }


def _parse() -> argparse.Namespace:
    parser = Parser("evaluations.scene_finder", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="safetensors file to write")
    add("--seed", type=int, default=TrainSettings.seed, help="of scenes, weights and spoiling")
    add("--scenes", type=positive, default=TrainSettings.scenes, help="to paint and learn from")
    add("--epochs", type=positive, default=TrainSettings.epochs, help="passes over the scenes")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, train and write the finder."""
    flags = _parse()
    check_out_file("--out", flags.out)
    settings = TrainSettings(seed=flags.seed, scenes=flags.scenes, epochs=flags.epochs)
    start = time.perf_counter()
    finder = train_finder(draw_crops(settings.scenes, False, settings.seed), settings)
    seconds = time.perf_counter() - start
    shares = measure(finder, draw_crops(1000, True, settings.seed))
    save_finder(flags.out, finder, asdict(settings) | {"threshold": THRESHOLD, "heldout": shares})
    get_logger("evaluations.scene_finder").info(
        "%s: of held-out scans %.4f of the digits, %.4f of the empty quadrants and %.4f of the "
        "colours right; trained in %.0f s",
        *(flags.out, *shares.values(), seconds),
    )


if __name__ == "__main__":
    main()
