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
from sampling.needs import NotingParser, refuse_typed

Combination = dict[str, str]


def run_sets(
    parser: NotingParser, argv: list[str], combinations: list[Combination], group: Processes
) -> list[Path]:
    """Sets of the flags `argv` with each combination of further ones.

    Args:
        parser: of `argv`.
        argv: command line.
        combinations: values of further flags by name.
        group: all processes, which call this together.

    Returns:
        The record of each set, in order.

    Raises:
        UserError: one of them cannot be made; all are looked at before the first is begun.
    """
    chosen = [with_flags(parser, argv, combination) for combination in combinations]
    for flags in chosen:
        checked(flags, group)
    return [sample_and_score(flags, group) for flags in chosen]


def with_flags(
    parser: NotingParser, argv: list[str], combination: Combination
) -> argparse.Namespace:
    """The flags of a command line and further ones, which must not be there before.

    Raises:
        ConfigError: a flag that the program varies was typed.
    """
    names = [name.replace("-", "_") for name in combination]
    refuse_typed(parser.parse_args(argv), names, "does nothing here; its values are varied")
    words = [f"--{name.replace('_', '-')}={value}" for name, value in combination.items()]
    return parser.parse_args([*argv, *words])


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


@command
def main() -> None:
    """Parse the command line, run the grid and print the table."""
    parser, argv = _parser(), sys.argv[1:]
    flags = parser.parse_args(argv)
    with processes(flags.device, cpu_threads=1, timeout=NO_HURRY) as group:
        paths = run_sets(parser, argv, grid_of(flags.grid), group)
        if group.is_main:
            sys.stdout.write(markdown(read_rows(paths)) + "\n")


if __name__ == "__main__":
    main()
