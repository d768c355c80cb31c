"""python -m demo.app [--ckpt RUN ...] [--record samples/RUN/SET ...] [--port 7860] ...

A page on which checkpoints draw: images while they are denoised, and where their computation goes.
Without --ckpt and --record it shows the quickstart.
"""

import argparse
import os
import socket
import sys
from pathlib import Path

import torch

from core.command_line import Parser
from core.errors import ConfigError, UserError, command
from demo.work import Studio
from sampling.pipeline import Pipeline, load

QUICKSTART = Path("runs/quickstart/train")


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("demo.app", __doc__)
    add = parser.add_argument
    add("--ckpt", nargs="+", metavar="RUN", help="runs or checkpoint folders, side by side")
    add("--record", nargs="+", type=Path, metavar="SET", help="folders of sample_ddp.py --capacity")
    add("--weights", default="ema", help="averaged `ema` (default), `ema_<decay>`, live `model`")
    add("--text-encoder", metavar="PATH", help="folder or hub id; default: the checkpoint's")
    add("--host", default="127.0.0.1", help="0.0.0.0 lets other machines in; default 127.0.0.1")
    add("--port", type=_port, default=7860, help="default 7860")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: a GPU if any")
    return parser.parse_args(argv)


def studio_of(flags: argparse.Namespace) -> Studio | None:
    """The checkpoints of the command line; None where only recorded sets are shown.

    Raises:
        UserError: a checkpoint is missing or damaged, or they do not go together.
    """
    paths = flags.ckpt
    if paths is None:
        if flags.record:
            return None
        if not QUICKSTART.exists():
            raise UserError(
                f"--ckpt: {QUICKSTART} is not there; `bash scripts/quickstart.sh` makes it in some "
                "minutes, or name another run"
            )
        paths = [str(QUICKSTART)]
    device = None if flags.device == "auto" else flags.device
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device: cuda is not available on this machine; allowed: cpu")
    pipes: dict[str, Pipeline] = {}
    for path in paths:
        pipe = load(path, flags.weights, device, text_encoder=flags.text_encoder)
        name = pipe.name
        while name in pipes:
            name += " again"
        pipes[name] = pipe
    _check_together(pipes)
    return Studio(pipes)


def _check_together(pipes: dict[str, Pipeline]) -> None:
    """Checkpoints side by side draw the same things."""
    (first, one), *others = pipes.items()
    for name, other in others:
        if other.num_classes != one.num_classes:
            kinds = [
                "prompts" if pipe.encoder is not None else f"{pipe.num_classes} classes"
                for pipe in (one, other)
            ]
            raise ConfigError(
                f"--ckpt: {first} draws {kinds[0]}, {name} {kinds[1]}; side by side all must draw "
                "the same"
            )


def check_port(host: str, port: int) -> None:
    """Refuse a place that nobody can listen at, before anything is loaded.

    Raises:
        ConfigError: another program listens there, or the host is not this machine's.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(found[0]) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(found[4])
    except OSError as error:
        why = error.strerror or str(error)
        raise ConfigError(f"--port: cannot listen at {host}:{port}: {why}") from error


def launch(page, host: str, port: int, wait: bool = True) -> None:
    """Serve a page: no files of this machine, nothing fetched from others, no telemetry."""
    from demo.page import STYLE, theme

    page.launch(
        server_name=host,
        server_port=port,
        theme=theme(),
        css=STYLE.read_text(),
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        allowed_paths=[],
        max_file_size=1,
        show_error=False,
        quiet=True,
        footer_links=[],
        prevent_thread_lock=not wait,
        state_session_capacity=16,
    )


@command
def main(argv: list[str] | None = None) -> None:
    """Load what is named, and serve the page until Ctrl-C."""
    flags = parse_flags(argv)
    check_port(flags.host, flags.port)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads nothing else while it loads
    try:
        from demo import page
    except ImportError as error:
        raise UserError(
            f"the demo needs the package {error.name}; install it by pip install -e '.[demo]'"
        ) from error
    from demo.recorded import read

    if torch.get_num_threads() > 1:  # one core stays for the page
        torch.set_num_threads(torch.get_num_threads() - 1)
    studio = studio_of(flags)
    records = {}
    for path in flags.record or []:
        drawn, run = read(path)
        title = drawn.title
        while title in records:
            title += " again"
        records[title] = drawn, run
    sys.stdout.write(f"http://{flags.host}:{flags.port}\n")
    sys.stdout.flush()
    launch(page.build(studio, records), flags.host, flags.port)


def _port(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; allowed: 1 ... 65535")
    return value


if __name__ == "__main__":
    main()
