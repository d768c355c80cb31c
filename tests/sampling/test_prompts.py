"""Sets of images by prompts: noise, blocks, records, layouts, negative prompts, refusals."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from programs import Program, pair
from tiny_encoders import write_encoder

from core.conditions import Condition
from core.distributed import Processes
from core.errors import ConfigError, UserError
from data.vae import VAE, to_uint8
from evaluations import routing_gap
from evaluations.digit_classifier import DigitClassifier, save_classifier
from evaluations.sampled import flags_parser, sample_and_score
from models.pretrained import load_pretrained
from sampling.captioned import captioned_grid
from sampling.generate import Sampler
from sampling.prompts import text_encoder_of
from sampling.sets import read_set
from sampling.wanted import ByPrompt

ALONE = Processes(0, 1, torch.device("cpu"))
KILL = """
import sampling.blocks
def kill(plan, block):
    if block.first == 4:
        os.kill(os.getpid(), signal.SIGKILL)
before(sampling.blocks, "_write_block", kill)
"""
PROMPTS = ["a red dog", "two green cat", "one cat and a dog"]


@pytest.fixture
def sample(trained_t2i, tmp_path):
    """A call that samples by flags; the set's folder."""

    def call(*more, ckpt=trained_t2i, folder="samples"):
        common = ["--ckpt", ckpt, "--device", "cpu", "--sample-dir", tmp_path / folder]
        argv = [str(a) for a in (*common, "--per-proc-batch-size", 4, *more)]
        return sample_and_score(flags_parser().parse_args(argv), ALONE).parent

    return call


def prompts_file(folder, lines=PROMPTS, name="prompts.txt"):
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def images_of(folder):
    with np.load(folder / "samples.npz") as archive:
        return archive["arr_0"], archive["labels"]


def test_noise_is_of_prompt_and_number_and_text_that_of_the_prompt(sample, trained_t2i, tmp_path):
    folder = sample("--prompts", prompts_file(tmp_path), "--num-per-prompt", 2, "--capacity")
    images, groups = images_of(folder)
    assert groups.tolist() == [0, 0, 1, 1, 2, 2]
    _, record = read_set(folder)
    assert record["prompts"] == PROMPTS
    assert record["num_per_prompt"] == 2
    assert record["text"]["max_length"] == 12
    assert len(record["text"]["encoder_hash"]) == 64
    loaded = load_pretrained(trained_t2i)
    encoder = text_encoder_of(loaded)
    keys = [(0, 0), (0, 1), (1, 0), (1, 1)]  # the first block, of four
    rows = encoder.encode(PROMPTS[:2])
    cond = Condition.of_rows([rows[prompt] for prompt, _ in keys], 12)
    latents, _ = Sampler.of(loaded, seed=0).latents(keys, cond)
    wanted = to_uint8(VAE(loaded.config.data.vae_path).decode(latents)).numpy()
    assert abs(images[:4].astype(int) - wanted).max() <= 1  # threads of the two may differ
    with np.load(folder / "capacity.npz") as recorded:
        assert recorded["samples"].shape[-1] == 3
        assert (recorded["samples"][:, 0] == 2).all()


def test_one_prompt_after_the_other_is_as_in_a_file(sample, tmp_path):
    flags = [part for prompt in PROMPTS for part in ("--prompt", prompt)]
    one = images_of(sample(*flags, "--num-per-prompt", 2, folder="one"))[0]
    listed = "--prompts", prompts_file(tmp_path), "--num-per-prompt", 2
    assert np.array_equal(one, images_of(sample(*listed))[0])
    more = images_of(sample(*listed, "--global-seed", 1, folder="seed"))[0]
    assert not np.array_equal(one, more)


def test_a_negative_prompt_takes_the_place_of_the_empty_one(sample, trained_t2i):
    asked = "--prompt", PROMPTS[0], "--num-per-prompt", 4
    plain = sample(*asked)
    negative = sample(*asked, "--negative-prompt", "two green cat")
    assert negative != plain
    assert read_set(negative)[1]["negative_prompt"] == "two green cat"
    loaded = load_pretrained(trained_t2i)
    for parameter in loaded.model.parameters():  # so few steps of training leave no text in it
        torch.nn.init.normal_(parameter, std=0.2)
    encoder, keys = text_encoder_of(loaded), [(0, i) for i in range(4)]
    sampler = Sampler.of(loaded)
    cond = Condition.of_rows(encoder.encode([PROMPTS[0]] * 4), 12)
    null = Condition.of_rows([loaded.model.null_text[loaded.model.null_mask]], 12)
    without = sampler.latents(keys, cond)[0]
    sampler.negative = null
    torch.testing.assert_close(sampler.latents(keys, cond)[0], without)
    sampler.negative = Condition.of_rows(encoder.encode(["two green cat"]), 12)
    assert (sampler.latents(keys, cond)[0] - without).abs().max() > 1e-3


def test_geneval_layout(sample, tmp_path):
    entries = [
        {"tag": "single_object", "include": [{"class": "dog", "count": 1}], "prompt": prompt}
        for prompt in PROMPTS
    ]
    path = prompts_file(tmp_path, map(json.dumps, entries), "evaluation_metadata.jsonl")
    folder = sample("--prompts", path, "--save", "geneval")  # four of each
    wanted = images_of(sample("--prompts", path, folder="npz"))[0]
    for number, entry in enumerate(entries):
        place = folder / "geneval" / f"{number:05d}"
        assert json.loads((place / "metadata.jsonl").read_text()) == entry
        names = sorted(file.name for file in (place / "samples").iterdir())
        assert names == [f"{i:05d}.png" for i in range(4)]
        for i, name in enumerate(names):
            found = np.asarray(Image.open(place / "samples" / name))
            assert np.array_equal(found, wanted[4 * number + i])
    assert not (folder / "samples.npz").exists()


def test_the_grid_has_a_line_under_each_group():
    images = torch.zeros(5, 32, 32, 3, dtype=torch.uint8)
    grid = captioned_grid(images, ["first", "second", "third"], each=2, columns=3)
    dark = (grid == 0).all(dim=-1)
    assert dark[: 12 + 96, 12 : 12 + 96].sum() == 96 * 96  # shown three times as large
    under = dark[12 + 96 + 4 :]
    assert under.any()
    widths = grid.shape[1]
    thirds = [under[:, i * widths // 3 : (i + 1) * widths // 3].any() for i in range(3)]
    assert all(thirds)


def test_the_grid_shows_every_image_over_its_own_prompt(sample, monkeypatch):
    seen = []

    def noted(images, texts, each):
        seen.append((images.shape[0], texts, each))
        return captioned_grid(images, texts, each)

    monkeypatch.setattr("sampling.command.captioned_grid", noted)
    monkeypatch.setattr("sampling.blocks.GRID_IMAGES", 5)
    sample("--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--num-per-prompt", 4)
    assert seen == [(5, PROMPTS[:2], 4)]
    shades = torch.tensor([50] * 4 + [200]).byte().view(5, 1, 1, 1).expand(5, 96, 96, 3)
    grid = captioned_grid(shades, PROMPTS[:2], 4, columns=2)
    left, right = grid.split([grid.shape[1] // 2, grid.shape[1] - grid.shape[1] // 2], dim=1)
    assert (left == 50).any()
    assert not (left == 200).all(dim=-1)[: 12 + 96].any()
    assert (right == 200).all(dim=-1)[: 12 + 96].any()
    assert not (right == 50).all(dim=-1)[: 12 + 96].any()


def test_lines_end_where_tables_of_captions_end_them(sample, tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red dog\u2028and a cat\r\ntwo green cat\n".encode())
    folder = sample("--prompts", path, "--num-per-prompt", 1)
    assert read_set(folder)[1]["prompts"] == ["a red dog\u2028and a cat", "two green cat"]
    path = prompts_file(tmp_path, ['{"prompt": "a red\u2028dog"}'], "prompts.jsonl")
    folder = sample("--prompts", path, "--num-per-prompt", 1)
    assert read_set(folder)[1]["prompts"] == [{"prompt": "a red\u2028dog"}]


def test_a_folder_is_named_by_any_file(sample, tmp_path):
    for name in ("犬" * 80 + ".txt", "my prompts = 1.txt"):
        folder = sample("--prompts", prompts_file(tmp_path, PROMPTS[:1], name))
        assert read_set(folder)[1]["prompts"] == PROMPTS[:1]
        assert len(os.fsencode(folder.name)) <= 200


def test_what_a_kill_left_of_an_image_is_removed(sample, tmp_path):
    entry = {"tag": "", "include": [], "prompt": "a red dog"}
    path = prompts_file(tmp_path, [json.dumps(entry)], "metadata.jsonl")
    asked = "--prompts", path, "--save", "geneval"
    folder = sample(*asked)
    for place in ("geneval/00000", "geneval/00000/samples"):
        (folder / place / ".00000.png.1.tmp").touch()
    assert sample(*asked) == folder
    assert not list(folder.rglob("*.tmp"))


def test_prompts_beyond_the_last_begin_again():
    calls = []

    def encode(texts):
        calls.append(texts)
        return [torch.full((1, 2), float(len(text))) for text in texts]

    wanted = ByPrompt(["a", "bb"], 2, encode, 3)
    cond = wanted.condition(range(2, 6))
    assert cond.text[:, 0, 0].tolist() == [2, 2, 1, 1]
    assert calls == [["bb", "a"]]
    assert [wanted.key(i) for i in range(6)] == [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (0, 1)]


def test_a_long_prompt_names_what_is_cut(sample, caplog):
    sample("--prompt", "a red dog and " * 3 + "a cat", "--num-per-prompt", 1)
    assert "longer than 12 tokens" in caplog.text
    assert caplog.text.split("is cut: ")[1].splitlines()[0] == "dog and a cat"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--prompts: .* was trained on captions; give --prompt TEXT"),
        (["--classes", "0", "--prompt", "a"], "--classes: does nothing here; it needs a model of"),
        (["--labels", "random", "--prompt", "a"], "--labels: does nothing here"),
        (["--num-fid-samples", "3", "--prompt", "a"], "--num-fid-samples: does nothing here"),
        (["--prompt", "a", "--prompts", "x.txt"], "--prompt: not with --prompts"),
        (["--prompt", "  "], "--prompt: prompt 1 is empty"),
        (["--prompts", "absent.txt"], "cannot read absent.txt: No such file"),
        (["--prompts", "a.csv"], r"a\.csv: wanted a \.txt or \.jsonl file"),
        (["--prompt", "a", "--save", "geneval"], "geneval needs prompts from a .jsonl"),
        (
            ["--prompt", "a", "--negative-prompt", "b", "--cfg-scale", "1"],
            "--negative-prompt: does nothing here; it needs guidance",
        ),
        (["--prompt", "a", "--text-encoder", "absent"], "--text-encoder: 'absent' is not a"),
        (["--prompt", "a \udc80"], "--prompt: prompt 1 holds half of a character"),
        (
            ["--prompt", "a", "--negative-prompt", "\udc80"],
            "--negative-prompt: it holds half of a character",
        ),
    ],
)
def test_refusals(sample, flags, message, tmp_path):
    with pytest.raises(UserError, match=message):
        sample(*flags)
    assert not (tmp_path / "samples").exists()


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("empty.txt", [], "has no prompts"),
        ("gap.txt", ["a", "", "b"], "prompt 2 is empty"),
        ("broken.jsonl", ['{"prompt": "a"}', "{"], "line 2: no JSON"),
        ("other.jsonl", ['{"text": "a"}'], 'line 1: wanted an object with a text "prompt"'),
    ],
)
def test_files_that_hold_no_prompts(sample, tmp_path, name, lines, message):
    with pytest.raises(ConfigError, match=message):
        sample("--prompts", prompts_file(tmp_path, lines, name))


def test_prompts_for_a_checkpoint_of_classes(sample, trained):
    with pytest.raises(ConfigError, match="--prompt: does nothing here; it needs a checkpoint tr"):
        sample("--prompt", "a", ckpt=trained)


def test_the_layout_of_geneval_for_a_checkpoint_of_classes(sample, trained, tmp_path):
    with pytest.raises(ConfigError, match=r"geneval needs prompts, and .* not trained on"):
        sample("--save", "geneval", "--classes", 0, ckpt=trained)
    assert not (tmp_path / "samples").exists()


def test_another_encoder_is_refused_and_the_same_one_elsewhere_is_not(
    sample, text_encoder_folder, tmp_path
):
    other = write_encoder(tmp_path / "other", seed=1)
    asked = "--prompt", "a dog", "--num-per-prompt", 1
    with pytest.raises(UserError, match=r"--text-encoder: not the one of .*encoder_hash"):
        sample(*asked, "--text-encoder", other)
    shutil.copytree(text_encoder_folder, tmp_path / "moved")
    sample(*asked, "--text-encoder", tmp_path / "moved")


@pytest.mark.slow
def test_two_processes_and_a_kill_change_no_image(sample, trained_t2i, tmp_path):
    path = prompts_file(tmp_path)
    argv = ["--ckpt", trained_t2i, "--device", "cpu", "--prompts", path]
    argv += ["--per-proc-batch-size", 4]
    wanted = images_of(sample("--prompts", path))[0]  # three blocks
    for process in pair(tmp_path, [*argv, "--sample-dir", tmp_path / "two"], module="sample_ddp"):
        assert process.end()[0] == 0
    (two,) = (tmp_path / "two").glob("*/*")
    assert read_set(two)[1]["world_size"] == 2
    assert np.array_equal(images_of(two)[0], wanted)
    argv += ["--sample-dir", tmp_path / "killed"]
    program = Program("sample_ddp", argv, tmp_path / "log", KILL)
    assert program.end()[0] == -signal.SIGKILL
    assert len(list((tmp_path / "killed").glob("*/*/parts/0*.npz"))) == 1
    program = Program("sample_ddp", argv, tmp_path / "log")
    assert program.end()[0] == 0
    (killed,) = (tmp_path / "killed").glob("*/*")
    assert np.array_equal(images_of(killed)[0], wanted)


def test_scores_of_classes_are_refused_and_fid_is_not(sample, scoring, tmp_path):
    asked = "--prompt", "a dog", "--num-per-prompt", 8
    classifier = tmp_path / "classifier.safetensors"
    save_classifier(classifier, DigitClassifier(("0", "1")), {"heldout_accuracy": 0.98})
    digits = "--metrics", scoring[1], "--features", "digits", "--classifier", classifier
    with pytest.raises(ConfigError, match=r"--features: .* tells classes apart, which prompts are"):
        sample(*asked, *digits)
    scores = read_set(sample(*asked, *scoring))[1]["scores"]
    assert scores["FID"] > 0


def test_both_routing_rules_of_a_prompt(trained_t2i, tmp_path, monkeypatch):
    argv = ["--ckpt", trained_t2i, "--sample-dir", tmp_path, "--device", "cpu"]
    argv += ["--prompt", "a red dog", "--prompt", "one cat"]
    monkeypatch.setattr("sys.argv", ["prog", *map(str, argv)])
    routing_gap.main()
    picture = np.asarray(Image.open(next(tmp_path.glob("*/routing_gap-*n2.png"))))
    assert picture.shape == (2 * 16 + 2, 2 * 16 + 2, 3)
