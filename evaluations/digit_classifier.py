"""A small classifier of 32 x 32 digits: its images, training, file and features.

Shapes: N images, K classes, F features.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.errors import UserError
from core.rng import derive_seed, generator
from data.images import ImageFolder, load_image
from evaluations.weight_files import read_weights, write_weights

SIZE = 32
FORMAT = "diffmoe-digit-classifier-1"


@dataclass(frozen=True)
class TrainSettings:
    """How a classifier is trained; the defaults need a few seconds on two cores."""

    seed: int = 0
    epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 4e-3
    weight_decay: float = 0.01
    label_smoothing: float = 0.05


@dataclass(frozen=True)
class DigitSet:
    """Images (N, 32, 32, 3) uint8, labels (N,) int64, and the name of each label."""

    images: np.ndarray
    labels: np.ndarray
    class_names: tuple[str, ...]


class DigitClassifier(nn.Module):
    """Four convolutions, a feature layer and a linear head; about 47,000 parameters.

    Attributes:
        class_names: name of each label, as the folders it was trained on.
    """

    widths = (16, 32, 32, 24)
    feature_width = 64

    def __init__(self, class_names: tuple[str, ...]):
        super().__init__()
        self.class_names = tuple(class_names)
        layers: list[nn.Module] = []
        last = 3
        for width, stride in zip(self.widths, (1, 2, 2, 2), strict=True):
            layers += [nn.Conv2d(last, width, 3, stride, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(width), nn.ReLU()]
            last = width
        # GELU has no dead units, so that the covariance of the features keeps its full rank.
        layers += [nn.Flatten(), nn.Linear(last * (SIZE // 8) ** 2, self.feature_width), nn.GELU()]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.feature_width, len(self.class_names))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Features (N, F) and logits (N, K) of images `x` (N, 3, 32, 32) in [0, 1]."""
        features = self.body(x)
        return features, self.head(features)


def load_digits(data: str | Path, part: str) -> DigitSet:
    """The images of the folder `data`/`part`, `part` being `train` or `val`.

    Raises:
        UserError: no such folder, or what `data.images` refuses in it.
    """
    root = Path(data) / part
    if not root.is_dir():
        raise UserError(
            f"data: no folder {root}; write it with `python -m data.digits --out {data}`"
        )
    folder = ImageFolder(root)
    images = torch.stack([load_image(path, SIZE) for path in folder.paths])
    return DigitSet(images.permute(0, 2, 3, 1).numpy(), folder.labels, tuple(folder.class_names))


def augment(x: Tensor, draw: torch.Generator) -> Tensor:
    """`x` (N, C, H, W) in [0, 1], each image turned, resized, shifted a little and made noisy.

    Up to 12 degrees, 10 %, 1/16 of the width; normal noise of standard deviation up to 0.1.
    """
    n = len(x)
    turn, size, right, down = torch.rand(4, n, generator=draw) * 2 - 1
    angle, scale = turn * math.radians(12), 1 + 0.1 * size
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # affine_grid's unit is half the image: 0.125 is 1/16 of the width.
    rows = [torch.stack([cos, -sin, 0.125 * right]), torch.stack([sin, cos, 0.125 * down])]
    grid = F.affine_grid(torch.stack(rows).permute(2, 0, 1), x.shape, align_corners=False)
    moved = F.grid_sample(x, grid, align_corners=False)
    strength = 0.1 * torch.rand(n, 1, 1, 1, generator=draw)
    return (moved + strength * torch.randn(x.shape, generator=draw)).clamp(0, 1)


def train_classifier(train: DigitSet, settings: TrainSettings | None = None) -> DigitClassifier:
    """Train on the CPU; the weights are a function of the data, the settings and torch's threads.

    Raises:
        UserError: a setting out of range, or fewer images than one batch.
    """
    settings = settings or TrainSettings()
    steps = len(train.images) // max(1, settings.batch_size)
    if settings.epochs < 1 or settings.batch_size < 2 or steps < 1:
        raise UserError(
            f"epochs {settings.epochs}, batch_size {settings.batch_size}: need at least 1 epoch "
            f"and batches of 2 ... {len(train.images)} (the number of training images)"
        )
    # Layers draw their weights from the global generator: it is left as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(settings.seed, "digit classifier"))
        classifier = DigitClassifier(train.class_names)
    optimizer = torch.optim.AdamW(
        classifier.parameters(), settings.learning_rate, weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.epochs * steps
    )
    x, labels = to_float(torch.from_numpy(train.images)), torch.from_numpy(train.labels)
    for epoch in range(settings.epochs):
        draw = generator(settings.seed, "digit classifier", epoch)
        order = torch.randperm(len(x), generator=draw)[: steps * settings.batch_size]
        for batch in order.view(steps, settings.batch_size):
            _, logits = classifier(augment(x[batch], draw))
            loss = F.cross_entropy(logits, labels[batch], label_smoothing=settings.label_smoothing)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval()


def save_classifier(
    path: str | Path, classifier: DigitClassifier, record: dict | None = None
) -> None:
    """Write the weights with class names and `record` (JSON) as metadata; complete or not at all.

    Raises:
        UserError: the folder of `path` does not exist.
    """
    about = {"class_names": classifier.class_names, "record": record or {}}
    write_weights(Path(path), classifier.state_dict(), FORMAT, about)


def load_classifier(path: str | Path) -> DigitClassifier:
    """The classifier of a file by `save_classifier`, on the CPU, ready to evaluate.

    Raises:
        UserError: no such file, or not such a file.
    """
    made_by = ("classifier", "digit classifier", "evaluations.digits")
    tensors, about = read_weights(Path(path), FORMAT, *made_by)
    with torch.random.fork_rng(devices=[]):
        classifier = DigitClassifier(tuple(about["class_names"]))
    try:
        classifier.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(f"classifier: weights in {path} do not fit: {error}") from error
    return classifier.eval()


def to_float(images: Tensor) -> Tensor:
    """uint8 (N, H, W, 1 or 3) as float32 (N, 3, H, W) in [0, 1]; grey is repeated."""
    x = images.permute(0, 3, 1, 2).float() / 255
    return x.expand(-1, 3, -1, -1).contiguous()


def check_images(name: str, images: np.ndarray) -> None:
    """Raise UserError unless `images` is uint8 (N, 32, 32, 1 or 3) with N at least 1."""
    shape = images.shape
    fits = len(shape) == 4 and shape[0] > 0 and shape[1:3] == (SIZE, SIZE) and shape[3] in (1, 3)
    if images.dtype != np.uint8 or not fits:
        raise UserError(
            f"{name}: need uint8 (N, {SIZE}, {SIZE}, 1 or 3), got {images.dtype} {shape}"
        )


def accuracy(logits: np.ndarray, labels: np.ndarray) -> float:
    """Share of rows of `logits` (N, K) that are largest at their label (N,)."""
    return float((logits.argmax(axis=1) == labels).mean())


@torch.inference_mode()
def features_and_logits(
    classifier: DigitClassifier, images: np.ndarray, batch_size: int = 256
) -> tuple[np.ndarray, np.ndarray]:
    """Features (N, 64) and logits (N, K), float32, of `images` uint8 (N, 32, 32, 1 or 3).

    Raises:
        UserError: images of another type or shape.
    """
    check_images("images", images)
    classifier.eval()
    parts = [
        classifier(to_float(torch.from_numpy(images[i : i + batch_size])))
        for i in range(0, len(images), batch_size)
    ]
    features, logits = (torch.cat(part).numpy() for part in zip(*parts, strict=True))
    return features, logits
