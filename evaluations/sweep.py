"""torchrun -m evaluations.sweep --ckpt RUN --grid cfg_scale=1,1.5 ... [--metrics REF.npz] [FLAGS]

Sample and score one set for each combination of flags of sample_ddp.py, such as guidance, batch
size, sampler and checkpoint (Tables 13 to 15), and print them as a table. Finished sets are not
made again.
"""

import argparse
import itertools
import sys
from pathlib import Path

from core.distributed import NO_HURRY, Processes, processes
from core.errors import ConfigError, command
from evaluations.compare import markdown, read_rows
from evaluations.sampled import checked, flags_parser, sample_and_score
from sampling.needs import NotingParser

Combination = dict[str, str]


def flags_of(
    parser: NotingParser, argv: list[str], combinations: list[Combination]
) -> list[argparse.Namespace]:
    """The flags of a command line with those of each combination.

    Args:
        parser: of all flags.
        argv: command line.
        combinations: values of further flags by name.

    Raises:
        ConfigError: a flag is wrong, or both varied and typed.
    """
    for combination in combinations:
        for name in parser.typed_in(argv).intersection(n.replace("-", "_") for n in combination):
            raise ConfigError(f"--{name.replace('_', '-')}: does nothing here; it is varied")
    words = [
        [f"--{name.replace('_', '-')}={value}" for name, value in combination.items()]
        for combination in combinations
    ]
    return [parser.parse_args([*argv, *further]) for further in words]


def run_sets(chosen: list[argparse.Namespace], group: Processes) -> list[Path]:
    """A set for each of several command lines; one that is finished is not made again.

    Args:
        chosen: flags of sample_ddp.py.
        group: all processes, which call this together.

    Returns:
        The record of each set, in order.

    Raises:
        UserError: one of them cannot be made; all are looked at before the first is begun.
    """
    for flags in chosen:
        checked(flags, group)
    return [sample_and_score(flags, group) for flags in chosen]


def grid_of(words: list[str]) -> list[Combination]:
    """All combinations of `key=value,value` words.

    Raises:
        ConfigError: for a word of another form.
    """
    axes = []
    for word in words:
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            raise ConfigError(f"--grid: {word!r} is not KEY=VALUE,VALUE")
        axes.append([(key, value) for value in values.split(",")])
    return [dict(choice) for choice in itertools.product(*axes)]


def _parser() -> NotingParser:
    parser = flags_parser("evaluations.sweep", __doc__)
    parser.add_argument(
        "--grid", nargs="+", metavar="FLAG=VALUE,VALUE", help="flags, and their values in turn"
    )
    parser.require("ckpt", "grid")
    return parser


def _grid(argv: list[str]) -> list[Combination]:
    """What is varied; it is read first, since required flags may be among it."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--grid", nargs="+", default=[])
    return grid_of(first.parse_known_args(argv)[0].grid)


@command
def main() -> None:
    """Parse the command line, run the grid and print the table."""
    argv = sys.argv[1:]
    chosen = flags_of(_parser(), argv, _grid(argv))
    with processes(chosen[0].device, cpu_threads=1, timeout=NO_HURRY) as group:
        paths = run_sets(chosen, group)
        if group.is_main:
            sys.stdout.write(markdown(read_rows(paths)) + "\n")


if __name__ == "__main__":
    main()
