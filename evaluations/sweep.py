"""torchrun -m evaluations.sweep --ckpt RUN --metrics REF.npz --grid cfg_scale=1,1.5 ... [FLAGS]

Sample and score one set for each combination of flags of sample_ddp.py, such as guidance, batch
size and sampler (Tables 13 to 15), and print them as a table. Finished sets are not made again.
"""

import itertools
import json
import sys
from pathlib import Path

from core.command_line import Parser
from core.distributed import NO_HURRY, Processes, processes
from core.errors import UserError, command
from core.files import complete_file
from evaluations.compare import markdown, read_rows
from evaluations.sampled import parse_flags, sample_and_score

Combination = dict[str, str]

OTHERS = "All other flags are those of sample_ddp.py: see its --help."


def run_sets(
    argv: list[str], combinations: list[Combination], group: Processes, record: Path
) -> list[Path]:
    """Sets of the flags `argv` with each combination of further ones.

    Args:
        argv: flags of sample_ddp.py.
        combinations: values of further flags by name.
        group: all processes, which call this together.
        record: JSON that remembers what is finished.

    Returns:
        The JSON of each set, in order.
    """
    paths = []
    for combination in combinations:
        words = [w for k, v in combination.items() for w in (f"--{k.replace('_', '-')}", v)]
        flags = parse_flags([*argv, *words])
        key = json.dumps([argv, combination])
        known = _finished(record) if group.is_main else {}
        path = group.from_main(known.get(key))
        if path is None or not Path(path).exists():
            path = group.from_main(str(sample_and_score(flags, group)))
            if group.is_main:
                with complete_file(record) as temporary:
                    temporary.write_text(json.dumps(known | {key: path}, indent=2))
        paths.append(Path(path))
    return paths


def _finished(record: Path) -> dict[str, str]:
    try:
        return json.loads(record.read_text())
    except (OSError, ValueError):
        return {}


def grid_of(words: list[str]) -> list[Combination]:
    """All combinations of `key=value,value` words.

    Raises:
        UserError: for a word of another form.
    """
    axes = []
    for word in words:
        key, equals, values = word.partition("=")
        if not (key and equals and values):
            raise UserError(f"--grid: {word!r} is not KEY=VALUE,VALUE")
        axes.append([(key, value) for value in values.split(",")])
    return [dict(choice) for choice in itertools.product(*axes)]


@command
def main() -> None:
    """Parse the command line, run the grid and print the table."""
    parser = Parser(
        "evaluations.sweep",
        __doc__,
        epilog=OTHERS,
    )
    parser.add_argument(
        "--grid", nargs="+", required=True, metavar="FLAG=VALUE,VALUE", help="what is varied"
    )
    own, argv = parser.parse_known_args()
    flags = parse_flags(argv)
    with processes(flags.device, cpu_threads=1, timeout=NO_HURRY) as group:
        paths = run_sets(argv, grid_of(own.grid), group, flags.sample_dir / "sweep.json")
        if group.is_main:
            sys.stdout.write(markdown(read_rows(paths)) + "\n")


if __name__ == "__main__":
    main()
