"""python -m data.tiny_text --captions FILE.jsonl --out FOLDER

Train a small text encoder on captions, a minute at most on two CPU cores for those of
`data.scenes`: a real BERT, by masked words, for the default that needs no download. Its tokenizer
knows the captions' words; any other is [UNK]. Saved by `save_pretrained`, it serves as
`--text-encoder`.
"""

import argparse
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from core.command_line import Parser, above_zero, as_flags, positive
from core.distributed import Processes, processes
from core.errors import UserError, command
from core.logging import get_logger, progress
from core.rng import derive_seed, generator
from data.hub import quiet
from data.making import made_alone, refuse_taken, warm_cosine
from data.text.loading import need_transformers
from data.text.tables import SUFFIXES, captions_of, entries

if TYPE_CHECKING:
    from transformers import BertForMaskedLM, PreTrainedTokenizerFast

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
MASK = SPECIAL.index("[MASK]")
POSITIONS = 128
WIDTH, LAYERS, HEADS = 128, 2, 4
IGNORED = -100
"""Target of a token that is not to be guessed."""
MASKED = 0.3
"""Share of the words that are to be guessed; captions are short."""

KEYS = ("text", "caption", "prompt")
"""Keys of a caption, the first that an entry has."""


@dataclass(frozen=True)
class TinyTextOptions:
    """How the encoder is trained.

    Attributes:
        steps: optimizer steps.
        batch_size: captions per step.
        lr: Adam's highest learning rate; it warms up for a twentieth of the steps and then falls
            to zero along a cosine.
        seed: of weights, order and masks.
    """

    steps: int
    batch_size: int
    lr: float
    seed: int


def read_texts(path: Path) -> list[str]:
    """The captions of a .jsonl or .csv file.

    Raises:
        UserError: naming file and line.
    """
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"--captions: {path} is no {' or '.join(SUFFIXES)} file")
    found = []
    for place, entry in entries(path):
        key = next((key for key in KEYS if key in entry), KEYS[0])
        found += [text for text, _ in captions_of(entry, (key,), place)]
    if not found:
        raise UserError(f"--captions: {path} holds no captions")
    return found


def build_tokenizer(texts: Iterable[str]) -> "PreTrainedTokenizerFast":
    """[CLS] words [SEP]: lower-case words and punctuation marks, the most frequent ones first."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer = normalizers.BertNormalizer(lowercase=True)
    splitter = pre_tokenizers.BertPreTokenizer()
    counts = Counter(
        word
        for text in texts
        for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(text))
    )
    words = sorted(counts, key=lambda word: (-counts[word], word))
    vocabulary = {word: number for number, word in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizer, splitter
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(word, vocabulary[word]) for word in ("[CLS]", "[SEP]")],
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=POSITIONS,
        **dict(zip(names, SPECIAL, strict=True)),
    )


def build(vocabulary: int, seed: int) -> "BertForMaskedLM":
    """The untrained model, about 0.4M parameters, with weights drawn from `seed`."""
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=4 * WIDTH,
        max_position_embeddings=POSITIONS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "tiny text weights"))
        return BertForMaskedLM(config)


def tokenise(tokenizer: "PreTrainedTokenizerFast", texts: list[str]) -> Tensor:
    """Tokens (N, L) of captions, padded with 0 to the longest."""
    options = {"truncation": True, "max_length": POSITIONS, "padding": True}
    return tokenizer(texts, return_tensors="pt", **options).input_ids


def masked(tokens: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens (B, L) with some words as [MASK], and targets (B, L), IGNORED where none is.

    At least one word of each caption is masked.
    """
    words = tokens >= len(SPECIAL)
    chance = torch.rand(tokens.shape, generator=draws).masked_fill(~words, 1.0)
    chosen = (chance < MASKED) | (chance == chance.min(dim=1, keepdim=True).values)
    chosen &= words
    return tokens.masked_fill(chosen, MASK), tokens.masked_fill(~chosen, IGNORED)


def train(
    model: "BertForMaskedLM", tokens: Tensor, options: TinyTextOptions, group: Processes
) -> float:
    """Minimise the cross-entropy of masked words, in place; its mean over the last 50 steps.

    Args:
        model: on `group.device`.
        tokens: (N, L), padded with 0.
        options: see there.
        group: for the device and the progress bar.
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    schedule = warm_cosine(optimizer, options.steps)
    draws = generator(options.seed, "tiny text training")
    losses: list[float] = []
    bar = progress(range(options.steps), group, "tiny text", "step")
    for _ in bar:
        batch = tokens[torch.randint(len(tokens), (options.batch_size,), generator=draws)]
        batch = batch[:, : int((batch != 0).sum(dim=1).max())]
        seen, targets = (part.to(group.device) for part in masked(batch, draws))
        logits = model(input_ids=seen, attention_mask=(seen != 0).long()).logits
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        bar.set_postfix(loss=f"{losses[-1]:.4f}", refresh=False)
    return sum(losses[-50:]) / len(losses[-50:])


def make_tiny_text(
    captions: str, out: str, options: TinyTextOptions, group: Processes
) -> float | None:
    """Train on the captions of a file, save to `out` unless an encoder is there already.

    Returns:
        The last steps' loss, or None where `out` was left as it is.

    Raises:
        UserError: a bad file; `out` holds something else, is being made, or cannot be written;
            transformers is not installed.
    """
    log = get_logger("data.tiny_text")
    folder = Path(out)
    if (folder / "config.json").is_file():
        log.info("%s holds an encoder already; left as it is (remove it to train again)", out)
        return None
    refuse_taken(folder, "holds no text encoder")
    need_transformers()
    texts = sorted(set(read_texts(Path(captions))))
    with made_alone(folder) as temporary:
        tokenizer = build_tokenizer(texts)
        model = build(len(tokenizer), options.seed).to(group.device)
        start = time.perf_counter()
        loss = train(model.train(), tokenise(tokenizer, texts), options, group)
        seconds = time.perf_counter() - start
        _save(model, tokenizer, temporary, folder)
    log.info(
        "%s: %d captions of %d words, %d steps, %.0f s; loss of masked words %.3f",
        *(out, len(texts), len(tokenizer) - len(SPECIAL), options.steps, seconds, loss),
    )
    return loss


def _save(
    model: "BertForMaskedLM",
    tokenizer: "PreTrainedTokenizerFast",
    temporary: Path,
    folder: Path,
) -> None:
    """The encoder alone: what guesses words has done its work."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    try:
        with quiet(logging):
            model.bert.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except SafetensorError as error:  # what safetensors makes of a full disk
        raise UserError(f"--out: cannot write to {folder}: {error}") from error


@command
def main() -> None:
    """Parse the command line and train."""
    parser = Parser("data.tiny_text", __doc__)
    required = {"required": True, "default": argparse.SUPPRESS}
    parser.add_argument("--captions", **required, help=".jsonl or .csv file")
    parser.add_argument("--out", **required, help="folder to write")
    parser.add_argument("--steps", type=positive, default=1000, help="optimizer steps")
    parser.add_argument("--batch-size", type=positive, default=64, help="captions per step")
    parser.add_argument("--lr", type=above_zero, default=2e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=0, help="of every draw")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to train")
    arguments = vars(parser.parse_args())
    paths = {name: arguments.pop(name) for name in ("captions", "out")}
    with as_flags({"data.captions": "--captions"}), processes(arguments.pop("device")) as group:
        make_tiny_text(**paths, options=TinyTextOptions(**arguments), group=group)


if __name__ == "__main__":
    main()
