"""python -m evaluations.clip_score SOURCE [--model openai/clip-vit-large-patch14]

CLIP score of images and their prompts (Hessel et al. 2021) in the form that papers on text-to-image
models print: 100 times the mean of max(cosine, 0), without the factor 2.5 and without a phrase
before the prompt. SOURCE is a set of samples by prompts, a folder in GenEval's layout, or images
with metadata.jsonl.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image

from core.command_line import Parser
from core.distributed import Processes
from core.errors import UserError, command
from core.files import complete_file
from core.limits import check_memory, check_out_file
from core.logging import get_logger, progress
from core.precision import exact_float32
from core.tensors import tensors_hash
from data.hub import is_local, on_hub, quiet
from evaluations.evaluate import add_batch_flags, device_of
from evaluations.prompted import Prompted, read_prompted

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor

MODEL = "openai/clip-vit-large-patch14"
ALLOWED = f"allowed: a hub id such as {MODEL}, or a folder by save_pretrained"
FILE = "clip_score.json"
"""Beside a set."""

log = get_logger("evaluations.clip_score")


class Clip:
    """A CLIP model in float32 with what prepares its inputs.

    Args:
        path: a hub id, or a local folder made by `save_pretrained`; safetensors only.
        device: where it computes.

    Attributes:
        side: of its images.
        longest: tokens of a text, the first and the last one included.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, path: str, device: torch.device):
        model, self.processor = _load(path)
        self.path, self.device = path, device
        self.model = model.to(device).eval().requires_grad_(False)
        self.side = model.config.vision_config.image_size
        places = model.config.text_config.max_position_embeddings
        self.longest = min(places, self.processor.tokenizer.model_max_length)

    def weights_hash(self) -> str:
        """SHA-256 over names and values of all weights: the same for any file that holds them."""
        return tensors_hash(self.model.state_dict())

    def too_long(self, texts: list[str]) -> int:
        """How many texts have more tokens than the model reads."""
        with quiet():
            return sum(len(ids) > self.longest for ids in self.processor.tokenizer(texts).input_ids)

    @torch.inference_mode()
    def scores(self, images: list[np.ndarray], texts: list[str]) -> np.ndarray:
        """100 max(cosine, 0) of each image (H, W, 3) uint8 and its text, (N,) float64.

        Never with TF32; longer texts are cut.
        """
        tokens = self.processor.tokenizer(
            texts,
            padding="max_length",
            max_length=self.longest,
            truncation=True,
            return_tensors="pt",
        )
        pictures = self.processor.image_processor(
            [Image.fromarray(image) for image in images], return_tensors="pt"
        )
        with exact_float32():
            out = self.model(**(tokens | pictures).to(self.device))
        cosines = (out.image_embeds * out.text_embeds).sum(dim=1)
        return 100 * cosines.clamp(min=0).double().cpu().numpy()


def _load(path: str) -> tuple["CLIPModel", "CLIPProcessor"]:
    try:
        from transformers import AutoConfig, CLIPModel, CLIPProcessor
        from transformers.utils import logging
    except ImportError:
        raise UserError("--model: needs transformers; pip install diffmoe[t2i]") from None
    from safetensors import SafetensorError

    local = is_local(path, "--model", ALLOWED)
    options = {"local_files_only": not local and not on_hub(path, "--model", "a CLIP model")}
    try:
        with quiet(logging):
            kind = AutoConfig.from_pretrained(path, **options).model_type
            if kind != "clip":
                raise UserError(f"--model: {path} holds {kind}, not clip; {ALLOWED}")
            processor = CLIPProcessor.from_pretrained(path, **options)
            model, info = CLIPModel.from_pretrained(
                path,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
                **options,
            )
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"--model: cannot load CLIP from {path}: {error}; {ALLOWED}") from error
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise UserError(f"--model: {path} lacks {len(missing)} weights, first {missing[0]}")
    # Without files of a tokenizer the library makes up one that knows no words.
    tokens, wanted = len(processor.tokenizer), model.config.text_config.vocab_size
    if tokens != wanted:
        raise UserError(f"--model: {path} has a tokenizer of {tokens} tokens; it needs {wanted}")
    return model, processor


def score(source: Prompted, clip: Clip, batch_size: int) -> dict[str, object]:
    """CLIP score of the images of a source, and what it depends on.

    Args:
        source: images and prompts.
        clip: that compares them.
        batch_size: images at a time.
    """
    texts = [prompt["prompt"] for prompt in source.prompts]
    prompts = sorted(set(texts))
    cut = clip.too_long(prompts)
    if cut:
        log.warning(
            "%d of %d prompts have more than %d tokens and are cut", cut, len(prompts), clip.longest
        )
    alone = Processes(0, 1, clip.device)
    values = []
    with progress(None, alone, "CLIP score", "img", total=len(texts)) as bar:
        for indices, images in source.batches(batch_size):
            values.append(clip.scores(images, [texts[i] for i in indices]))
            bar.update(len(images))
    return {
        "clip_score": float(np.concatenate(values).mean()),
        "images": len(texts),
        "prompts": len(prompts),
        "prompts_cut": cut,
        "tokens": clip.longest,
        "model": clip.path,
        "model_sha256": clip.weights_hash(),
        **source.hashes,
    }


def _parse() -> argparse.Namespace:
    parser = Parser("evaluations.clip_score", __doc__)
    parser.add_argument("source", type=Path, help="folder of a set, or of images of prompts")
    parser.add_argument("--model", default=MODEL, help="hub id, or folder by save_pretrained")
    add_batch_flags(parser)
    parser.add_argument("--out", type=Path, help=f"JSON with the score; default: {FILE} in a set")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line, compare and print."""
    flags = _parse()
    device = device_of(flags)
    source = read_prompted(flags.source)
    out = source.path / FILE if flags.out is None and source.hashes else flags.out
    if out is not None:
        check_out_file("--out", out)
    clip = Clip(flags.model, device)
    count = min(flags.batch_size, len(source.prompts))
    check_memory("--batch-size", count, 4 * 3 * clip.side**2, device)
    found = score(source, clip, flags.batch_size)
    if out is not None:
        with complete_file(out) as temporary:
            temporary.write_text(json.dumps(found, indent=2) + "\n")
    sys.stdout.write(f"CLIP score: {found['clip_score']:.4f}\n")


if __name__ == "__main__":
    main()
