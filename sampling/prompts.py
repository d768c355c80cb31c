"""Prompts of a command line, and the text encoder that a checkpoint was trained with."""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from core.command_line import as_flags
from core.errors import ConfigError, UserError
from core.logging import get_logger
from data.text.encoder import TextEncoder
from data.text.facts import TextFacts
from models.pretrained import TEXT_FOLDER, Checkpoint

log = get_logger("sampling.prompts")

GENEVAL_KEYS = ("tag", "include")
"""What GenEval's evaluator needs of a prompt besides its text."""


@dataclass(frozen=True)
class Prompts:
    """What is asked for in words.

    Attributes:
        entries: of each prompt what its file says of it, a text or an object with a key `prompt`.
        num_per_prompt: samples of each.
        negative: what guidance leads away from instead of the empty caption.
        source: where they are from, for messages.
    """

    entries: list[str | dict[str, Any]]
    num_per_prompt: int
    negative: str | None
    source: str

    @property
    def texts(self) -> list[str]:
        """Of each."""
        return [one if isinstance(one, str) else one["prompt"] for one in self.entries]

    def check_geneval(self) -> None:
        """Refuse prompts that GenEval's evaluator cannot judge.

        Raises:
            ConfigError: naming the first.
        """
        for number, entry in enumerate(self.entries, 1):
            if isinstance(entry, str) or any(key not in entry for key in GENEVAL_KEYS):
                raise ConfigError(
                    f"--save: geneval needs prompts from a .jsonl with prompt, tag and include, as "
                    f"its evaluation_metadata.jsonl; number {number} of {self.source} is {entry!r}"
                )


def prompts_of(flags: argparse.Namespace, checkpoint: Checkpoint) -> Prompts | None:
    """The prompts that flags name; None for a checkpoint of classes.

    Raises:
        ConfigError: flags and checkpoint do not fit, or a file cannot be read as prompts.
    """
    asked = flags.prompt is not None or flags.prompts is not None
    if checkpoint.config.model.text_hidden_size is None:
        if flags.save == "geneval":
            raise ConfigError(
                f"--save: geneval needs prompts, and {checkpoint.path} was not trained on captions"
            )
        return None
    if not asked:
        raise ConfigError(
            f"--prompts: {checkpoint.path} was trained on captions; give --prompt TEXT, or "
            "--prompts FILE with one in each line"
        )
    if flags.prompt is not None and flags.prompts is not None:
        raise ConfigError("--prompt: not with --prompts, whose file says all")
    if flags.prompts is None:
        entries, source = list(flags.prompt), "--prompt"
    else:
        entries, source = _read(flags.prompts), str(flags.prompts)
    prompts = Prompts(entries, flags.num_per_prompt, flags.negative_prompt, source)
    for number, text in enumerate(prompts.texts, 1):
        check_prompt(text, f"{source}: prompt {number}")
    if prompts.negative:  # an empty one is as good as none
        check_prompt(prompts.negative, "--negative-prompt: it")
    if flags.save == "geneval":
        prompts.check_geneval()
    return prompts


def check_prompt(text: str, which: str) -> None:
    """Refuse what no tokenizer takes.

    Raises:
        ConfigError: naming `which`.
    """
    if not text.strip():
        raise ConfigError(f"{which} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{which} holds half of a character: {text!r}") from error


def _read(path: Path) -> list[str | dict[str, Any]]:
    """The prompts of a file: a text in each line, or for .jsonl an object."""
    if path.suffix not in (".txt", ".jsonl"):
        raise ConfigError(f"--prompts: {path}: wanted a .txt or .jsonl file")
    try:
        # Not splitlines, which knows more ends of lines than JSON and tables of captions do.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise ConfigError(f"--prompts: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise ConfigError(f"--prompts: {path} is no text in UTF-8: {error}") from error
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ConfigError(f"--prompts: {path} has no prompts; wanted: one in each line")
    if path.suffix == ".txt":
        return lines
    return [_entry(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def _entry(line: str, where: str) -> str | dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"--prompts: {where}: no JSON: {error}") from error
    if isinstance(found, str):
        return found
    if not isinstance(found, dict) or not isinstance(found.get("prompt"), str):
        raise ConfigError(f'--prompts: {where}: wanted an object with a text "prompt"')
    return found


def text_facts(checkpoint: Checkpoint) -> TextFacts:
    """Of the encoder that a checkpoint of a model of text was trained with.

    Raises:
        ConfigError: the checkpoint does not say.
    """
    found = (checkpoint.state["latents"] or {}).get("text")
    if found is None:
        raise ConfigError(f"{checkpoint.path}: does not say which text encoder it was trained with")
    return TextFacts.of(found)


def text_encoder_of(
    checkpoint: Checkpoint, path: str | None = None, device: str | torch.device = "cpu"
) -> TextEncoder:
    """The text encoder that a checkpoint was trained with.

    Args:
        checkpoint: of a model of text.
        path: where it is, if not where it was in training.
        device: that it computes on.

    Raises:
        UserError: it cannot be read, or it is another one.
    """
    facts = text_facts(checkpoint)
    asked = facts.max_length, facts.layer, facts.prefix, facts.dtype
    carried = checkpoint.path / TEXT_FOLDER
    path = path or (str(carried) if carried.is_dir() else facts.encoder)
    with as_flags({"data.text_encoder": "--text-encoder"}):
        encoder = TextEncoder(path, *asked, device)
    difference = facts.difference(encoder.facts())
    if difference is not None:
        raise UserError(f"--text-encoder: not the one of {checkpoint.path}: {difference}")
    return encoder


def warn_of_cuts(encoder: TextEncoder, texts: list[str]) -> int:
    """Say how many texts lose their ends, and which tokens the first one loses."""
    cuts = [(text, cut) for text in texts if (cut := encoder.cut(text))]
    if cuts:
        text, cut = cuts[0]
        log.warning(
            "%d prompt(s) are longer than %d tokens; of %r is cut: %s",
            *(len(cuts), encoder.max_length, text, " ".join(cut)),
        )
    return len(cuts)
