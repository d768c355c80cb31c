"""Loading text encoders of the transformers library: safetensors alone, and no code of others.

`transformers` belongs to the extra `t2i` and is imported where an encoder is loaded.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from core.errors import UserError
from core.files import file_hash
from data.hub import is_local, on_hub, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FIELD = "data.text_encoder"
ALLOWED = "allowed: a hub id such as google/flan-t5-xl, or a folder by save_pretrained"

INDEX = "model.safetensors.index.json"
VOCABULARIES = (
    *("tokenizer.json", "spiece.model", "sentencepiece.bpe.model", "tokenizer.model"),
    *("vocab.json", "vocab.txt", "spm.model", "bpe.codes"),
)
"""Files of which a tokenizer needs one; without any, the library makes up an empty one."""

DOWNLOADED = (
    *("config.json", "model.safetensors", "model-*.safetensors", INDEX, *VOCABULARIES),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "merges.txt"),
)

PROBES = (
    *("", "a", "A photo of two Dogs, one cat & a bird.", "  spaces   between\tand\naround "),
    *(
        "naïve café, Straße, ĳsselmeer",
        "一只红色的猫 в саду",
        "🙂 x²+y²=42 #tag_name",
        "don't re-do",
    ),
)
"""Texts whose tokens tell tokenizers of the same vocabulary apart."""

_CHANGING = ("transformers_version", "_name_or_path", "torch_dtype", "dtype", "architectures")
"""Entries of a configuration that say nothing about what a model computes."""

_FAILURES = (OSError, ValueError, RuntimeError, TypeError, KeyError, ImportError, AttributeError)
"""What the library raises for files that are damaged or of another kind."""


def need_transformers() -> None:
    """Raises UserError where the library is not installed."""
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise UserError(
            f"{FIELD}: needs the transformers library; pip install diffmoe[t2i]"
        ) from None


def model_folder(path: str) -> Path:
    """The folder of an encoder; a hub id is downloaded first, no more of it than is needed.

    Raises:
        UserError: there is none, or it has no configuration, safetensors or tokenizer.
    """
    folder = Path(path) if is_local(path, FIELD, ALLOWED) else _download(path)
    if not (folder / "config.json").is_file():
        raise UserError(f"{FIELD}: {path} holds no model (config.json is missing); {ALLOWED}")
    if not weight_files(folder):
        pickled = sorted(file.name for file in folder.glob("*.bin"))
        found = f", only {pickled[0]}, which is never unpickled" if pickled else ""
        raise UserError(
            f"{FIELD}: {path} has no safetensors{found}; a model saved again by save_pretrained has"
        )
    if not any((folder / name).is_file() for name in VOCABULARIES):
        raise UserError(
            f"{FIELD}: {path} has no tokenizer (none of {', '.join(VOCABULARIES)}); copy the "
            "tokenizer's files into the folder"
        )
    return folder


def _download(path: str) -> Path:
    offline = not on_hub(path, FIELD, "a text encoder")
    from huggingface_hub import snapshot_download

    try:
        with quiet():
            found = snapshot_download(
                path, allow_patterns=list(DOWNLOADED), local_files_only=offline
            )
    except _FAILURES as error:
        raise UserError(f"{FIELD}: cannot download {path}: {error}; {ALLOWED}") from error
    return Path(found)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model, sorted by name; none where some are missing."""
    one = folder / "model.safetensors"
    if one.is_file():
        return [one]
    try:
        parts = set(json.loads((folder / INDEX).read_text())["weight_map"].values())
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return []
    files = sorted(folder / Path(name).name for name in parts)
    return files if all(file.is_file() for file in files) else []


def weights_hash(folder: Path) -> str:
    """SHA-256 over the weight files' hashes and the configuration; reads every file once.

    Of the configuration what the model computes with; versions and paths in it stay out.
    """
    digest = hashlib.sha256()
    for file in weight_files(folder):
        digest.update(file_hash(file).encode())
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {name: value for name, value in config.items() if name not in _CHANGING}
    digest.update(json.dumps(kept, sort_keys=True).encode())
    return digest.hexdigest()


def vocabulary_hash(tokenizer: "PreTrainedTokenizerBase") -> str:
    """SHA-256 over the vocabulary and the tokens of PROBES.

    Not over files: the same tokenizer is saved as several sets of them.
    """
    vocabulary = sorted(tokenizer.get_vocab().items())
    probes = [tokenizer(text).input_ids for text in PROBES]
    return hashlib.sha256(json.dumps([vocabulary, probes]).encode()).hexdigest()


def load_tokenizer(folder: Path, path: str) -> "PreTrainedTokenizerBase":
    """The tokenizer of a `model_folder`; `path` is what the user calls that.

    Raises:
        UserError: it cannot be loaded.
    """
    from transformers import AutoTokenizer
    from transformers.utils import logging

    try:
        with quiet(logging):
            tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
    # Its backend's errors have no base of their own.
    except Exception as error:
        raise UserError(f"{FIELD}: cannot load the tokenizer of {path}: {error}") from error
    tokenizer.truncation_side = "right"
    return tokenizer


def load_encoder(folder: Path, path: str, dtype: torch.dtype) -> "PreTrainedModel":
    """The encoder of a `model_folder` on the CPU; of models with a decoder the encoder alone.

    Raises:
        UserError: the folder holds something else, or weights are missing.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding
    from transformers.models.auto.modeling_auto import MODEL_FOR_TEXT_ENCODING_MAPPING as KNOWN
    from transformers.utils import logging

    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        with quiet(logging):
            config = AutoConfig.from_pretrained(folder, **options)
            if type(config) not in KNOWN:  # the text side of CLIP and its like
                config = config.get_text_config()
            kind = AutoModelForTextEncoding if type(config) in KNOWN else AutoModel
            if kind is AutoModelForTextEncoding:
                config.is_encoder_decoder = False  # T5Gemma asks for this
            model, info = kind.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                torch_dtype=dtype,
                output_loading_info=True,
                **options,
            )
    except (*_FAILURES, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{FIELD}: cannot load a text encoder from {path}: {reason}; {ALLOWED}"
        ) from error
    # What pools the rows is of no use here, and often not saved.
    missing = sorted(name for name in info["missing_keys"] if "pool" not in name)
    if missing:
        raise UserError(f"{FIELD}: {path} lacks {len(missing)} weights, first {missing[0]}")
    if config.is_encoder_decoder and type(config) not in KNOWN:
        model = model.get_encoder()
    return model


def sizes(model: "PreTrainedModel", path: str) -> tuple[int, int]:
    """Width of a row, and how many layers there are.

    Raises:
        UserError: the configuration does not say.
    """
    config = model.config
    if not hasattr(config, "hidden_size"):  # T5Gemma's is in that of its encoder
        config = getattr(config, "encoder", config)
    try:
        return int(config.hidden_size), int(config.num_hidden_layers)
    except (AttributeError, TypeError) as error:
        raise UserError(f"{FIELD}: {path} is no text encoder of a known form: {error}") from error


def positions(model: nn.Module) -> int | None:
    """Most tokens that a model has positions for; None where they are relative."""
    for name, module in model.named_modules():
        if name.endswith(("position_embedding", "position_embeddings", "embed_positions")):
            rows = getattr(module, "num_embeddings", None)
            if rows is not None:  # RoBERTa's begin after the padding token's
                padding = getattr(module, "padding_idx", None)
                return rows - (0 if padding is None else padding + 1)
    return getattr(model.config, "max_position_embeddings", None)
