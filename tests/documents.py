"""Reading the documents: their fenced blocks, the commands in them, and what each of them needs."""

import argparse
import importlib
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import pytest

from config.load import parse_config
from core.command_line import Parser

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: file that it stands in.
        language: after the fence.
        text: its lines.
        comment: the HTML comment in the line above, such as `needs: GPUs`, or "".
    """

    page: Path
    language: str
    text: str
    comment: str

    def needs(self) -> str:
        """What a machine must have to run it, or ""."""
        return self.comment.removeprefix("needs: ") if self.comment.startswith("needs: ") else ""


def blocks(page: Path, language: str) -> list[Block]:
    """Those of one language, in their order."""
    pattern = r"(?:^ *<!-- ([^\n]*?) -->\n)?^( *)```(\w+)\n(.*?)^\2```$"
    found = re.finditer(pattern, page.read_text(), re.DOTALL | re.MULTILINE)
    return [Block(page, m[3], m[4], m[1] or "") for m in found if m[3] == language]


def commands(text: str) -> list[list[str]]:
    """The shell lines of a block as words, without comments."""
    lines = text.replace("\\\n", "").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


class CapturedError(Exception):
    """Carries the parser of a program out of it."""


def parser_of(module: str, monkeypatch: pytest.MonkeyPatch) -> Parser:
    """The parser of a program, whose `main` is begun and left."""

    def capture(self, *_):
        raise CapturedError(self)

    main = importlib.import_module(module).main
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "parse_known_args", capture)
        patch.setattr("sys.argv", [module])
        with pytest.raises(CapturedError) as caught:
            main()
    return caught.value.args[0]


def launched(words: list[str]) -> tuple[str, list[str], int] | None:
    """Module, arguments and processes of a program of ours; None for any other command."""
    launcher, rest, processes = words[0], words[1:], 1
    if launcher == "torchrun":
        flags = argparse.ArgumentParser(allow_abbrev=False)
        for name in ("nnodes", "nproc_per_node"):
            flags.add_argument(f"--{name}", type=int, default=1)
        at = next(i for i, word in enumerate(rest) if word == "-m" or word.endswith(".py"))
        known, _ = flags.parse_known_args(rest[:at])
        processes, rest = known.nnodes * known.nproc_per_node, rest[at:]
    elif Path(launcher).name != "python":
        return None
    module, argv = (rest[1], rest[2:]) if rest[0] == "-m" else (rest[0], rest[1:])
    module = module.removesuffix(".py").replace("/", ".")
    ours = (ROOT / (module.replace(".", "/") + ".py")).is_file()
    return (module, argv, processes) if ours else None


def check_arguments(module: str, argv: list[str], processes: int, monkeypatch) -> None:
    """Let a program read its command line, and stop there.

    Raises:
        UserError: it refuses it.
    """
    if module == "train":
        parse_config(argv, "train.py", processes)
    elif module == "evaluations.sweep":
        sweep = importlib.import_module(module)
        sweep.flags_of(sweep._parser(), argv, sweep._grid(argv))
    else:
        parser = parser_of(module, monkeypatch)
        flags, keys = parser.parse_known_args(argv)
        if not getattr(flags, "config", None) and not getattr(flags, "compare", None):
            parser.refuse(keys)
        for name in [getattr(flags, "config", None), *(getattr(flags, "compare", None) or [])]:
            if name is not None:
                parse_config(["--config", str(name), *keys], module, world_size=None)
