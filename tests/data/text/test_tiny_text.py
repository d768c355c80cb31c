"""A few steps of the tiny text encoder's training: deterministic, readable by TextEncoder."""

import json

import pytest
import torch

from core.distributed import Processes
from core.errors import UserError
from core.rng import generator
from data.scenes import write_scenes
from data.text.encoder import TextEncoder
from data.tiny_text import (
    IGNORED,
    MASK,
    POSITIONS,
    SPECIAL,
    WIDTH,
    TinyTextOptions,
    build,
    build_tokenizer,
    make_tiny_text,
    masked,
    read_texts,
    tokenise,
    train,
)

OPTIONS = TinyTextOptions(steps=30, batch_size=16, lr=2e-3, seed=3)
GROUP = Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def captions(tmp_path_factory):
    """What data.scenes writes about 60 scenes."""
    root = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(root, train=60, val=1, prompts=1)
    return root / "train" / "metadata.jsonl"


def test_saved_encoder_gives_rows_to_known_unknown_and_no_words(captions, tmp_path):
    out = tmp_path / "text"
    loss = make_tiny_text(str(captions), str(out), OPTIONS, GROUP)
    assert loss < 3.5  # below that of a guess among all words
    encoder = TextEncoder(str(out), 32, dtype="float32")
    assert encoder.hidden_size == WIDTH
    assert sum(p.numel() for p in encoder.model.parameters()) < 0.6e6
    texts = read_texts(captions)
    unknown = SPECIAL.index("[UNK]")
    assert all(unknown not in tokens for tokens in encoder.tokens(texts))
    capitals, plain, strange = encoder.encode(["A Two", "a two", "a zebra"])
    assert torch.equal(capitals, plain)
    assert encoder.tokens(["a zebra"])[0].count(unknown) == 1
    assert not torch.allclose(plain[2], strange[2], atol=0.1)
    assert encoder.encode([""])[0].shape == (2, WIDTH)
    with pytest.raises(UserError, match=f"{POSITIONS + 1} is more than the {POSITIONS} positions"):
        TextEncoder(str(out), POSITIONS + 1)
    assert make_tiny_text(str(captions), str(out), OPTIONS, GROUP) is None
    again = tmp_path / "again"
    make_tiny_text(str(captions), str(again), OPTIONS, GROUP)
    files = ("model.safetensors", "tokenizer.json")
    assert all((out / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_training_is_a_function_of_the_seed(captions):
    texts = read_texts(captions)
    tokenizer = build_tokenizer(texts)
    tokens = tokenise(tokenizer, texts)

    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(int(torch.randint(1000, ())))
        model = build(len(tokenizer), seed)
        train(model, tokens, TinyTextOptions(2, 4, 3e-3, seed), GROUP)
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    first = weights(0)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_some_words_of_each_caption_are_masked_and_nothing_else():
    tokens = torch.tensor([[2, 7, 8, 9, 10, 3], [2, 6, 3, 0, 0, 0]]).repeat(500, 1)
    seen, targets = masked(tokens, generator(0, "test"))
    chosen = targets != IGNORED
    assert torch.equal(chosen, seen == MASK)
    assert torch.equal(torch.where(chosen, targets, seen), tokens)
    assert (tokens[chosen] >= len(SPECIAL)).all()
    assert chosen.any(dim=1).all()
    assert 0.3 < chosen[::2, 1:5].float().mean() < 0.45


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "holds no captions"),
        ('{"words": 1}', "line 1: no caption at 'text'; its keys: words"),
        ('{"text": "a"}\n{', "line 2: no JSON"),
    ],
)
def test_bad_files_are_one_line(tmp_path, content, said):
    (tmp_path / "x.jsonl").write_text(content)
    with pytest.raises(UserError, match=said):
        make_tiny_text(str(tmp_path / "x.jsonl"), str(tmp_path / "out"), OPTIONS, GROUP)
    assert not (tmp_path / "out").exists()


def test_what_is_there_is_not_replaced(captions, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match="exists and holds no text encoder; remove it"):
        make_tiny_text(str(captions), str(tmp_path), OPTIONS, GROUP)
    with pytest.raises(UserError, match=r"--captions: .*notes\.txt is no \.jsonl or \.csv file"):
        make_tiny_text(str(tmp_path / "notes.txt"), str(tmp_path / "out"), OPTIONS, GROUP)


def test_captions_of_every_usual_key(tmp_path):
    rows = [{"text": "a"}, {"caption": ["b", "c"]}, {"prompt": "d", "tag": "x"}]
    path = tmp_path / "x.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert read_texts(path) == ["a", "b", "c", "d"]
