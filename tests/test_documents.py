"""What the documents say is so: commands parse, files and keys exist, quoted errors are ours."""

import ast
import dataclasses
import re
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from documents import PAGES, ROOT, blocks, check_arguments, commands, launched
from test_house import FOLDERS

from config.files import known_configs
from config.load import parse_config
from config.model import ModelConfig
from config.objective import OBJECTIVES
from config.schema import Config
from models.summary import comparison


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


OF_EACH_PAGE = pytest.mark.parametrize("page", PAGES, ids=name)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def check_other(words: list[str]) -> bool:
    """Whether a command that is no program of ours is one that we know, with files that exist."""
    if words[0] == "bash":
        script, *flags = words[1:]
        assert (ROOT / script).is_file(), script
        if "--config" in flags:
            found = flags[flags.index("--config") + 1]
            assert found in known_configs() or (ROOT / found).is_file(), found
        return True
    if words[:2] == ["pip", "install"]:
        extras = re.findall(r"\[(\w+)\]", " ".join(words))
        assert set(extras) <= PROJECT["optional-dependencies"].keys(), words
        wheels = [word for word in words if word.endswith(".whl")]
        assert all(f"diffmoe-{PROJECT['version']}-" in wheel for wheel in wheels), words
        return True
    tools = ("pytest", "ruff", "build", "tensorboard", "mkdocs", "jupyter")
    return any(tool in words[:3] or words[0].endswith(f"/{tool}") for tool in tools)


@OF_EACH_PAGE
def test_every_command_is_read_by_its_program(page, monkeypatch):
    """Or by the test that the comment above it names, or it says what it needs that is not here."""
    monkeypatch.chdir(ROOT)
    for block in blocks(page, "bash"):
        for words in commands(block.text):
            if block.comment.startswith("run by tests/test_recipes.py, with"):
                continue  # its names exist in the tree of that test only
            program = launched(words)
            if program is not None:
                check_arguments(*program, monkeypatch)
            else:
                assert check_other(words) or block.needs(), words


@OF_EACH_PAGE
def test_blocks_for_larger_machines_say_so(page):
    for block in blocks(page, "bash"):
        programs = [found for words in commands(block.text) if (found := launched(words))]
        if any(processes > 2 for _, _, processes in programs):
            assert "GPUs" in block.needs(), block.text
        if "IMAGENET" in block.text:
            assert "ImageNet" in block.needs(), block.text


@OF_EACH_PAGE
def test_blocks_that_tests_run_are_read_by_those_tests(page):
    for file in re.findall(r"^<!-- .*?run by (tests/\S+\.py)", page.read_text(), re.M):
        assert page.name in (ROOT / file).read_text(), file


def test_runs_that_commands_take_are_those_that_commands_make():
    """A run's folder follows from its config, unless --run_dir says it; NAME and A are anyone's."""
    made = {parse_config(["--config", one], "t", None).run_dir for one in known_configs()}
    taken = set()
    for words in (w for page in PAGES for b in blocks(page, "bash") for w in commands(b.text)):
        for before, word in pairwise(words):
            if before in ("--run_dir", "--out") and word.startswith("runs/"):
                made.add(word)
        line = " ".join(words)
        taken |= set(re.findall(r"(?:--ckpt|--init_from|--to-official) (runs/\S+)", line))
        for several in re.findall(r"(?:ckpt=|--runs )(runs/.*?)(?= --|$)", line):
            taken |= set(re.split(r"[ ,]", several))
    assert len(taken) > 10
    assert {run for run in taken - made if not run.removeprefix("runs/").isupper()} == set()


@OF_EACH_PAGE
def test_named_config_keys_modules_and_links_exist(page):
    text = page.read_text()
    sections = {field.name: field for field in dataclasses.fields(Config)}
    named = re.findall(
        r"\b(data|model|objective|optim|train|parallel|sampling|evaluation)\.([a-z_.]+)\b", text
    )
    kinds = {"model": [ModelConfig], "objective": OBJECTIVES.values()}
    for section, key in named:
        if key.endswith(("py", "yaml", "md", "slurm")) or section not in sections:
            continue
        first = key.split(".")[0]
        options = kinds.get(section, [type(sections[section].default_factory())])
        known = {f.name for kind in options for f in dataclasses.fields(kind)} | {"name", "size"}
        if page.name == "own_objective.md":
            known.add("sigma_data")
        modules = {p.stem for p in (ROOT / section).glob("*")} if (ROOT / section).is_dir() else ()
        assert first in known or first in modules, f"{section}.{key}"
    for module in re.findall(r"python -m ([a-z_.]+[a-z])", text):
        ours = (ROOT / (module.replace(".", "/") + ".py")).is_file()
        assert ours or module in ("pytest", "build"), module
    for module in re.findall(r"^::: (\S+)", text, re.M):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module
    for link in re.findall(r"\]\(([^)#\s]+)(?:#\S+)?\)", text):
        assert "://" in link or (page.parent / link).is_file(), link
    for script in re.findall(r"\b(scripts/\w+\.\w+)", text):
        assert (ROOT / script).is_file(), script


def rows(text: str) -> list[list[str]]:
    """Cells of the lines of tables that begin with a name in backticks."""
    lines = re.findall(r"^\| `.*", text, re.M)
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def table_of_configs() -> list[tuple[list[str], list[str]]]:
    """Names of each row, alternatives in braces spelt out, and its other cells."""
    found = []
    for first, *cells in rows((ROOT / "docs/configs.md").read_text()):
        names = []
        for pattern in re.findall(r"`([^`]+)`", first):
            stems = [""]
            for part in re.split(r"({[^}]*})", pattern):
                options = part[1:-1].split(",") if part.startswith("{") else [part]
                stems = [stem + option for stem in stems for option in options]
            names += stems
        found.append((names, cells))
    return found


def test_the_table_of_configs_is_complete():
    named = [name for names, _ in table_of_configs() for name in names]
    assert sorted(named) == known_configs()


def test_the_figures_in_the_table_of_configs_are_those_of_the_command():
    chosen = {
        "dit/S_flow",
        "ecdit/S_E16_flow",
        "diffmoe/L_E8_ddpm",
        "dsmoe/S_E48_flow",
        "jit/B16_E16",
        "t2i/diffmoe_E16_flow",
        "promoe/B_flow",
        "ditmoe/S_E8",
        "race/B_4in32_flow",
    }
    checked = 0
    for names, (_, *cells) in table_of_configs():
        for config in chosen.intersection(names):
            row = comparison(config, parse_config(["--config", config], "t", None))
            wanted = [
                f"{row['total (M)']:.0f}",
                f"{row['activated (M)']:.0f}",
                str(row["GFLOPs per image"]),
                str(row["training state (GB)"]),
            ]
            for found, value in zip(cells, wanted, strict=True):
                assert float(found) == pytest.approx(float(value), rel=0.003, abs=0.6), config
            checked += 1
    assert checked == len(chosen)


def test_the_costs_of_table_3_are_arithmetic():
    """Training: three forwards of 256 images in 700,000 steps; an H100 at 20 % of 495 TFLOP/s."""
    text = (ROOT / "docs/how/table3.md").read_text()
    hour, total = 0.2 * 495e12 * 3600, 0.0
    costs = [row for row in rows(text) if len(row) == 7]
    assert len(costs) == 5
    for label, *cells in costs:
        config = label.strip("`")
        parsed = parse_config(["--config", config], "t", None)
        assert parsed.train.global_batch_size * parsed.train.max_steps == 256 * 700_000
        row = comparison(config, parsed)
        forward = 1e9 * float(row["GFLOPs per image"])
        training, sampling = 3 * forward * 256 * 700_000, forward * 250 * 50_000
        checkpoint = 16e-9 * 1e6 * row["total (M)"]  # weights, average, two moments
        wanted = [forward / 1e9, training, training / hour, sampling, sampling / hour, checkpoint]
        assert [float(cell) for cell in cells] == pytest.approx(wanted, rel=0.03), config
        total += training / hour
    hours = float(re.search(r"about ([\d,]+) GPU-hours", text)[1].replace(",", ""))
    assert hours == pytest.approx(total, rel=0.02)


def test_the_files_that_the_architecture_names_exist():
    text = (ROOT / "docs/architecture.md").read_text()
    named = set(re.findall(r"`([\w/]+\.py)`", text)) | set(re.findall(r"`([\w/]+/)`", text))
    assert len(named) > 30
    for path in named:
        assert (ROOT / path).exists(), path


def test_every_fault_of_the_reliability_page_has_a_test():
    """Each row's last cell names functions, or files, that are there."""
    faults = [
        line.strip("|").split("|")
        for line in (ROOT / "docs" / "reliability.md").read_text().splitlines()
        if line.startswith("| ") and not line.startswith("| fault")
    ]
    assert len(faults) > 40
    sources = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for *_, tests in faults:
        names = re.findall(r"::(test_\w+)`", tests) or re.findall(r"(test_\w+\.py)`", tests)
        assert names, tests
        for test in names:
            found = list((ROOT / "tests").rglob(test)) or f"def {test}(" in sources
            assert found, test


def texts_of_the_source() -> set[str]:
    """Every string of the source, with … for what is filled in."""
    found = set()
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    for path in [*files, *ROOT.glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = (
                    part.value if isinstance(part, ast.Constant) else "…" for part in node.values
                )
                found.add("".join(parts))
    return found


def has_in_order(text: str, parts: list[str]) -> bool:
    """Whether the parts stand in a text, one after the other."""
    at = 0
    for part in parts:
        found = text.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    return True


def test_the_errors_of_the_troubleshooting_page_are_those_of_the_source():
    """As one string, or clause by clause; what comes before the first colon is the user's flag."""
    text, source = (ROOT / "docs/troubleshooting.md").read_text(), texts_of_the_source()
    quoted = re.findall(r"^- `(.*)`$", text, re.M)
    assert len(quoted) == len(set(quoted)) + 1  # one line is in two programs
    assert len(quoted) > 60

    def is_there(words: str) -> bool:
        return any(has_in_order(one, words.split("…")) for one in source)

    def is_ours(line: str) -> bool:
        message = re.sub(r"^((--)?[\w.…-]+: )+", "", line)
        clauses = [clause for clause in re.split(r"; |, …$", message) if clause.strip("… ")]
        return is_there(message) or all(map(is_there, clauses))

    foreign = [line for line in quoted if not is_ours(line)]
    assert foreign == ["ModuleNotFoundError: No module named 'core'"]


def test_one_version_in_all_files():
    version = PROJECT["version"]
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M)[1]
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.M)
    released = [heading for heading in headings if heading != "Unreleased"]
    assert [cited, released[0]] == [version, version]
    assert released == sorted(released, reverse=True)
