"""Every program: one form of names, flags with help in one spelling, errors in one line."""

import argparse

import pytest
from documents import parser_of

from config.load import parse_config
from core.command_line import Parser, natural, positive
from core.errors import ConfigError

PROGRAMS = [
    "main_cache",
    "sample_ddp",
    "data.convert_cache",
    "data.digits",
    "data.tiny_vae",
    "evaluations.capacity",
    "evaluations.compare",
    "evaluations.digits",
    "evaluations.evaluate",
    "evaluations.likelihood",
    "evaluations.make_reference",
    "evaluations.sweep",
    "evaluations.threshold_search",
    "models.hub",
    "models.summary",
    "published.convert_config",
    "published.convert_weights",
    "training.verify_resume",
    "benchmarks.latent_loader",
    "benchmarks.metrics",
    "benchmarks.moe_layer",
    "benchmarks.train_step",
]


@pytest.mark.parametrize("module", PROGRAMS)
def test_names_flags_and_help(module, monkeypatch):
    parser = parser_of(module, monkeypatch)
    script = module in ("main_cache", "sample_ddp")
    assert parser.prog == (f"{module}.py" if script else f"python -m {module}")
    assert len(parser.description) > 20
    for action in parser._actions:
        assert action.help, action.option_strings
        for flag in action.option_strings:
            assert "_" not in flag, flag
    # Help is formatted, and no line says the same default twice.
    for line in parser.format_help().splitlines():
        assert line.count("default") <= 1, line


@pytest.mark.parametrize("module", PROGRAMS)
def test_an_unknown_flag_is_one_line(module, monkeypatch):
    parser = parser_of(module, monkeypatch)
    optional = [a for a in parser._actions if a.option_strings and a.dest != "help"]
    for action in parser._actions:
        action.required = False
        if not action.option_strings:
            action.nargs = "?"
    for group in parser._mutually_exclusive_groups:
        group.required = False
    flag = optional[0].option_strings[0]
    with pytest.raises(ConfigError, match=rf"{flag}x: unknown; did you mean --\S+\? .*--help"):
        parser.parse_args([f"{flag}x"])


def example() -> Parser:
    parser = Parser("tools.example", "An example.")
    parser.add_argument("--batch-size", type=positive, default=3, help="images")
    parser.add_argument("--num-workers", type=natural, help="processes")
    parser.add_argument("--name", choices=["a_b"], help="of it")
    return parser


@pytest.mark.parametrize("flag", ["--batch-size", "--batch_size"])
def test_hyphens_and_underscores_are_the_same(flag):
    assert example().parse_args([flag, "7"]).batch_size == 7
    assert example().parse_args([f"{flag}=7", "--name", "a_b"]) == argparse.Namespace(
        batch_size=7, num_workers=None, name="a_b"
    )


def test_keys_of_a_config_keep_their_underscores():
    flags, keys = example().parse_known_args(["--model.num_classes", "3", "--batch_size", "2"])
    assert (flags.batch_size, keys) == (2, ["--model.num_classes", "3"])


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (["--batch-size", "0"], "--batch-size: 0 is too small; at least 1 is allowed"),
        (["--num-workers", "-1"], "--num-workers: -1 is too small; at least 0 is allowed"),
        (["--batch-size", "x"], "--batch-size: 'x' is not a whole number"),
        (["--name", "c"], "--name: invalid choice: 'c'"),
        (["--batch-sise", "1"], "--batch-sise: unknown; did you mean --batch-size"),
    ],
)
def test_errors_name_flag_value_and_what_is_allowed(words, wanted):
    with pytest.raises(ConfigError) as refused:
        example().parse_args(words)
    assert str(refused.value).startswith(wanted)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("flag", ["--init-from", "--init_from"])
def test_keys_of_the_trainer_are_taken_in_both_spellings(flag):
    assert parse_config([flag, "run"], "train.py").init_from == "run"


def test_every_key_of_the_trainer_has_help(capsys):
    with pytest.raises(SystemExit):
        parse_config(["--help"], "train.py")
    text = capsys.readouterr().out
    assert "usage: train.py --config NAME" in text
    flags = [line for line in text.splitlines() if line.strip().startswith("--")]
    assert len(flags) > 100
