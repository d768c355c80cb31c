"""Rows of captions against the models themselves, cut tokens, facts, and every refusal."""

import dataclasses
import json
import shutil
import sys

import pytest
import torch
from tiny_encoders import WIDTH, write_encoder, write_tokenizer

from core.errors import UserError
from data.text.encoder import TextEncoder
from data.text.facts import TextFacts
from data.text.loading import positions

CAPTIONS = ["a red dog", "", "the photo of two cats and one green dog", "a"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    return {kind: write_encoder(root / kind, kind) for kind in ("bert", "t5", "clip", "bare")}


def plain(folder, kind: str, caption: str, layer: int | None = None) -> torch.Tensor:
    """One caption alone through the model's own class, in float32: (L, E)."""
    import transformers as hf

    names = {"bert": "BertModel", "t5": "T5EncoderModel", "clip": "CLIPTextModel"}
    config = hf.AutoConfig.from_pretrained(folder).get_text_config()
    model = getattr(hf, names[kind]).from_pretrained(folder, config=config).eval()
    ids = hf.AutoTokenizer.from_pretrained(folder)(caption, return_tensors="pt").input_ids
    with torch.no_grad():
        output = model(input_ids=ids, output_hidden_states=True)
    return (output.last_hidden_state if layer is None else output.hidden_states[layer])[0]


@pytest.mark.parametrize("kind", ["bert", "t5", "clip"])
def test_rows_are_those_of_each_caption_alone(folders, kind):
    encoder = TextEncoder(str(folders[kind]), 12, dtype="float32")
    assert encoder.hidden_size == WIDTH
    rows = encoder.encode(CAPTIONS)
    for caption, found in zip(CAPTIONS, rows, strict=True):
        wanted = plain(folders[kind], kind, caption)
        assert found.shape == wanted.shape
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    assert len(rows[1]) == {"bert": 2, "t5": 1, "clip": 2}[kind]  # the empty caption's own rows
    assert encoder.encode([]) == []


@pytest.mark.parametrize("kind", ["T5Gemma", "Gemma2", "Roberta", "Bart"])
def test_other_kinds_of_models_are_taken_too(tmp_path, kind):
    import transformers as hf

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 40}
    gemma = sizes | {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    if kind == "T5Gemma":
        half = hf.T5GemmaModuleConfig(**gemma)
        model = hf.T5GemmaForConditionalGeneration(
            hf.T5GemmaConfig(encoder=half, decoder=half, vocab_size=40)
        )
    elif kind == "Gemma2":
        model = hf.Gemma2ForCausalLM(hf.Gemma2Config(**gemma))
    elif kind == "Roberta":
        config = hf.RobertaConfig(**sizes, num_attention_heads=2, max_position_embeddings=40)
        model = hf.RobertaForMaskedLM(config)
    else:
        sides = {"layers": 2, "attention_heads": 2, "ffn_dim": 24}
        sides = {f"{side}_{k}": v for side in ("encoder", "decoder") for k, v in sides.items()}
        model = hf.BartForConditionalGeneration(
            hf.BartConfig(d_model=16, vocab_size=40, max_position_embeddings=40, **sides)
        )
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path, "bert")
    encoder = TextEncoder(str(tmp_path), 12, dtype="float32")
    assert encoder.hidden_size == 16
    assert not [name for name, _ in encoder.model.named_parameters() if "decoder" in name]
    for caption, found in zip(CAPTIONS, encoder.encode(CAPTIONS), strict=True):
        alone = encoder.encode([caption])[0]
        assert found.shape == alone.shape
        torch.testing.assert_close(found, alone, atol=2e-6, rtol=1e-5)


def test_bfloat16_is_near_float32_and_the_default(folders):
    encoder = TextEncoder(str(folders["bert"]), 12)
    assert encoder.model.dtype == torch.bfloat16
    rows = encoder.encode(CAPTIONS)
    assert {row.dtype for row in rows} == {torch.bfloat16}
    for caption, found in zip(CAPTIONS, rows, strict=True):
        away = (found.float() - plain(folders["bert"], "bert", caption)).abs().max()
        assert 0 < away < 0.1


def test_only_the_encoder_half_of_t5_and_the_text_side_of_clip_are_loaded(folders):
    t5 = TextEncoder(str(folders["t5"]), 20)
    assert not [name for name, _ in t5.model.named_parameters() if "decoder" in name]
    clip = TextEncoder(str(folders["clip"]), 12)
    assert not [name for name, _ in clip.model.named_parameters() if "vision" in name]
    assert not any(p.requires_grad for p in (*t5.model.parameters(), *clip.model.parameters()))


@pytest.mark.parametrize("layer", [0, 1, -1, -2])
def test_layers_are_those_of_hidden_states(folders, layer):
    for kind in ("t5", "clip"):
        rows = TextEncoder(str(folders[kind]), 12, layer=layer, dtype="float32").encode(["a dog"])
        wanted = plain(folders[kind], kind, "a dog", layer)
        torch.testing.assert_close(rows[0], wanted, atol=2e-6, rtol=1e-5)
    last = plain(folders["clip"], "clip", "a dog")  # normalised, the last layer's output is not
    assert not torch.allclose(plain(folders["clip"], "clip", "a dog", -1), last)


def test_prefix_stands_before_every_caption_and_keeps_its_rows(folders):
    encoder = TextEncoder(str(folders["bert"]), 12, prefix="the photo of ", dtype="float32")
    for caption, found in zip(["a dog", ""], encoder.encode(["a dog", ""]), strict=True):
        wanted = plain(folders["bert"], "bert", f"the photo of {caption}")
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)
    assert encoder.cut("a red dog and two cats") == []
    assert encoder.cut("a red dog and two cats and one cat") == ["one", "cat"]


def test_long_captions_are_cut_and_say_what_is_lost(folders):
    for kind, special in (("bert", 2), ("t5", 1), ("clip", 2)):
        encoder = TextEncoder(str(folders[kind]), 5, dtype="float32")
        kept = 5 - special
        words = ["a", "red", "dog", "and", "two", "green"]
        rows = encoder.encode([" ".join(words), "a"])
        assert [len(row) for row in rows] == [5, 1 + special]
        assert encoder.cut(" ".join(words)) == words[kept:]
        assert encoder.cut(" ".join(words[:kept])) == []
        wanted = plain(folders[kind], kind, " ".join(words[:kept]))  # the end token is kept
        torch.testing.assert_close(rows[0], wanted, atol=2e-6, rtol=1e-5)


def test_facts_are_of_contents_and_name_the_first_difference(folders, tmp_path):
    facts = TextEncoder(str(folders["t5"]), 9).facts()
    assert facts.encoder == str(folders["t5"])
    assert (facts.max_length, facts.hidden_size, facts.layer) == (9, WIDTH, None)
    assert (facts.prefix, facts.dtype, len(facts.encoder_hash)) == ("", "bfloat16", 64)
    assert TextFacts.of(json.loads(json.dumps(dataclasses.asdict(facts)))) == facts
    moved = tmp_path / "moved"
    shutil.copytree(folders["t5"], moved)
    config = json.loads((moved / "config.json").read_text()) | {"transformers_version": "9.9"}
    (moved / "config.json").write_text(json.dumps(config))
    same = TextEncoder(str(moved), 9).facts()
    assert (same.encoder != facts.encoder, facts.difference(same)) == (True, None)
    others = TextEncoder(str(moved), 8, layer=1, prefix="x", dtype="float32").facts()
    assert facts.difference(others) == "max_length 9 and 8"
    for name, value, said in (
        ("layer", 1, "layer null and 1"),
        ("prefix", "a ", "prefix '' and 'a '"),
        ("dtype", "float32", "dtype 'bfloat16' and 'float32'"),
        ("hidden_size", 8, "hidden_size 16 and 8"),
    ):
        assert facts.difference(dataclasses.replace(facts, **{name: value})) == said
    write_encoder(moved, "t5", seed=1)
    other = TextEncoder(str(moved), 9).facts()
    assert facts.difference(other).startswith(f"encoder_hash {facts.encoder_hash[:12]}... and ")
    assert facts.difference(other).endswith(f"({facts.encoder} and {moved})")
    assert other.tokenizer_hash == facts.tokenizer_hash
    shutil.copytree(folders["t5"], moved, dirs_exist_ok=True)
    write_tokenizer(moved, "t5", ["another", "vocabulary"])
    assert facts.difference(TextEncoder(str(moved), 9).facts()).startswith("tokenizer_hash ")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dtype": "float16"}, "data.text_dtype: 'float16' is not allowed; activations of T5"),
        ({"dtype": "int8"}, "data.text_dtype: 'int8' is not allowed; allowed: bfloat16, float32"),
        ({"max_length": 13}, "data.text_max_length: 13 is more than the 12 positions of "),
        ({"max_length": 2}, "data.text_max_length: 2 leaves no room beside the 2 special tokens"),
        ({"layer": 3}, "data.text_layer: 3 is no layer of "),
        ({"layer": -4}, "allowed: -3 to 2, or null for its last hidden state"),
        ({"path": "/nowhere"}, "data.text_encoder: '/nowhere' is not a folder; allowed: a hub id"),
        ({"path": "nothing"}, "data.text_encoder: 'nothing' is not a folder; allowed: a hub id"),
    ],
)
def test_what_an_encoder_cannot_do_is_one_line(folders, change, said):
    options = {"path": str(folders["bert"]), "max_length": 12} | change
    with pytest.raises(UserError) as caught:
        TextEncoder(**options)
    assert said in str(caught.value)


def test_t5_has_no_last_position(folders):
    assert TextEncoder(str(folders["t5"]), 40).encode(["dog " * 60])[0].shape == (40, WIDTH)


def test_positions_of_roberta_begin_after_the_padding():
    from transformers import RobertaConfig, RobertaModel

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 9}
    config = RobertaConfig(**sizes, num_attention_heads=1, max_position_embeddings=14)
    assert positions(RobertaModel(config)) == 12


def broken(folder, name: str) -> None:
    """Make one thing wrong with an encoder's folder."""
    if name == "no model":
        (folder / "config.json").unlink()
    elif name == "pickled":
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    elif name == "no weights":
        (folder / "model.safetensors").unlink()
    elif name == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif name == "damaged tokenizer":
        (folder / "tokenizer.json").write_text("{")
    elif name == "another kind":
        (folder / "config.json").write_text('{"model_type": "no such model"}')
    elif name == "cut weights":
        whole = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    elif name == "other weights":
        from safetensors.torch import save_file

        save_file({"x": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("no model", "holds no model (config.json is missing)"),
        ("pickled", "has no safetensors, only pytorch_model.bin, which is never unpickled"),
        ("no weights", "has no safetensors; a model saved again by save_pretrained has"),
        ("no tokenizer", "has no tokenizer (none of tokenizer.json, spiece.model"),
        ("damaged tokenizer", "cannot load the tokenizer of"),
        ("another kind", "cannot load a text encoder from"),
        ("cut weights", "cannot load a text encoder from"),
        ("other weights", "weights, first "),
    ],
)
def test_folders_that_are_no_encoder_are_one_line(folders, tmp_path, fault, said):
    folder = tmp_path / "encoder"
    shutil.copytree(folders["bert"], folder)
    broken(folder, fault)
    with pytest.raises(UserError) as caught:
        TextEncoder(str(folder), 12)
    assert str(caught.value).startswith("data.text_encoder: ")
    assert str(folder) in str(caught.value)
    assert said in str(caught.value)


def test_without_the_library_the_extra_is_named(folders, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r"pip install diffmoe\[t2i\]"):
        TextEncoder(str(folders["bert"]), 12)


def test_a_caption_without_tokens_is_refused(folders):
    encoder = TextEncoder(str(folders["bare"]), 12)
    assert len(encoder.encode(["a dog"])[0]) == 2
    with pytest.raises(UserError, match=r"makes no token of the caption '', so that there is"):
        encoder.encode(["a dog", ""])


def test_a_tokenizer_of_another_model_is_refused(folders, tmp_path):
    shutil.copytree(folders["bert"], tmp_path / "mixed")
    write_tokenizer(tmp_path / "mixed", "bert", [f"word{n}" for n in range(99)])
    encoder = TextEncoder(str(tmp_path / "mixed"), 12)
    with pytest.raises(UserError, match=r"makes token 55 of the caption 'word50', the model knows"):
        encoder.encode(["word50"])


def test_values_that_are_not_finite_name_the_caption(folders):
    encoder = TextEncoder(str(folders["bert"]), 12)
    with torch.no_grad():
        word = encoder.tokenizer.get_vocab()["green"]
        encoder.model.embeddings.word_embeddings.weight[word] = float("inf")
    assert len(encoder.encode(["a red dog"])) == 1
    with pytest.raises(UserError, match="not finite for the caption 'a green dog'"):
        encoder.encode(["a red dog", "a green dog"])
