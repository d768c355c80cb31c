"""Tiny text encoders with random weights and word-level tokenizers, in folders as the hub has them.

Every weight is drawn anew, so that layers differ and differences are seen.
"""

from pathlib import Path

import torch

WORDS = [
    *("a", "an", "the", "photo", "of", "red", "green", "dog", "cat", "two", "three"),
    *("left", "right", "and", "one"),
]
WIDTH = 16


def write_tokenizer(folder: Path, kind: str = "bert", words: list[str] = WORDS) -> dict[str, int]:
    """A tokenizer whose special tokens are those of a kind; its vocabulary is returned.

    Kinds: `bert` ([CLS] ... [SEP], padded on the right), `t5` (... </s>, padded on the left here),
    `clip` (<start> ... <end>, padded with <end>), `bare` (no special token at all).
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = {
        "bert": ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"),
        "t5": ("<pad>", "</s>", "<unk>"),
        "clip": ("<start>", "<end>", "<unk>"),
        "bare": ("<unk>", "<pad>"),
    }[kind]
    template = {"bert": "[CLS] $A [SEP]", "t5": "$A </s>", "clip": "<start> $A <end>"}.get(kind)
    vocabulary = {word: number for number, word in enumerate((*special, *words))}
    unknown = next(word for word in special if "unk" in word.lower())
    padding = "<end>" if kind == "clip" else next(word for word in special if "pad" in word.lower())
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if template is not None:
        used = [(word, vocabulary[word]) for word in special if word in template]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=used
        )
    names = {"unk_token": unknown, "pad_token": padding}
    if kind == "t5":
        names |= {"eos_token": "</s>", "padding_side": "left"}
    if kind == "clip":
        names |= {"bos_token": "<start>", "eos_token": "<end>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return vocabulary


def write_encoder(folder: Path, kind: str = "bert", width: int = WIDTH, seed: int = 0) -> Path:
    """A model with its tokenizer: `bert`, `t5` (with its decoder), `clip` (both sides), `bare`."""
    import transformers as hf

    vocabulary = write_tokenizer(folder, kind)
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "vocab_size": len(vocabulary)}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind in ("bert", "bare"):
            config = hf.BertConfig(**sizes, max_position_embeddings=12)
            model = hf.BertModel(config, add_pooling_layer=False)
        elif kind == "t5":
            model = hf.T5ForConditionalGeneration(
                hf.T5Config(
                    vocab_size=len(vocabulary) + 3,
                    d_model=width,
                    d_kv=8,
                    d_ff=24,
                    num_layers=2,
                    num_heads=2,
                    feed_forward_proj="gated-gelu",
                )
            )
        else:
            ends = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
            seen = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
            seen |= {"num_attention_heads": 1, "image_size": 4, "patch_size": 4}
            config = hf.CLIPConfig(
                text_config={**sizes, **ends, "max_position_embeddings": 12}, vision_config=seen
            )
            model = hf.CLIPModel(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return folder
