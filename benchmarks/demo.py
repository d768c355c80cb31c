"""python -m benchmarks.demo [--ckpt runs/quickstart/train] [--num-images 8] [--repeats 5] ...

Steps per second of the demo: how many evaluations of the model are drawn, decoded and shown with
their maps in a second. Four ways, each of which has what the one before has: sampling alone (the
baseline), steps through the stream of `sampling.pipeline`, as pieces of the page, and through the
page's server to a client.
"""

import argparse
import socket
from collections.abc import Callable

import torch

from benchmarks.measure import alternate, machine, report
from core.command_line import Parser, file_to_write, positive
from core.errors import command
from demo.app import launch
from demo.asked import EACH, OWN, Ask, asked, samplers
from demo.work import Studio
from sampling.pipeline import Pipeline, load

Counted = Callable[[], int]
"""Draws everything, and returns how many steps came."""


def ways_of(pipe: Pipeline, settings: list, count: int, url: str) -> dict[str, Counted]:
    """Ways to draw the same images, by name."""
    from gradio_client import Client

    studio, client = Studio({pipe.name: pipe}), Client(url, verbose=False)
    ask: Ask = asked(pipe, EACH, count, settings)

    def sample() -> int:
        pipe.sample(**ask.words())
        return ask.evaluations

    def stream() -> int:
        return sum(1 for _ in pipe.stream(**ask.words())) - 1

    def pieces() -> int:
        return sum(1 for _ in studio.generate(pipe.name, EACH, count, *settings)) - 1

    def page() -> int:
        job = client.submit(pipe.name, EACH, count, *settings, api_name="/generate")
        return sum(1 for _ in job) - 1

    return {"sampling alone": sample, "stream": stream, "pieces": pieces, "page": page}


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("benchmarks.demo", __doc__)
    add = parser.add_argument
    add("--ckpt", default="runs/quickstart/train", help="a model of classes")
    add("--num-images", type=positive, default=8, help="images at once; default 8")
    add("--steps", type=positive, default=30, help="steps; default 30")
    add("--repeats", type=positive, default=5, help="generations of each way; the median counts")
    add("--out", type=file_to_write, help="JSON file to write")
    return parser.parse_args(argv)


@command
def main(argv: list[str] | None = None) -> None:
    """Serve a page, and measure all ways in turn."""
    from demo.page import build

    flags = parse_flags(argv)
    pipe = load(flags.ckpt)
    sampler = next(iter(samplers(pipe)))
    settings = [0, sampler, flags.steps, 2.0, OWN, 1.0, 0.5]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    served = build(Studio({pipe.name: pipe}), {})
    launch(served, "127.0.0.1", port, wait=False)
    counts: dict[str, int] = {}

    def counting(name: str, way: Counted) -> Callable[[], None]:
        def go() -> None:
            counts[name] = way()

        return go

    ways = ways_of(pipe, settings, flags.num_images, f"http://127.0.0.1:{port}")
    calls = {name: counting(name, way) for name, way in ways.items()}
    seconds = alternate(calls, flags.repeats, pipe.device)
    served.close(verbose=False)
    base = counts["sampling alone"] / seconds["sampling alone"]
    rows = [
        {
            "way": name,
            "speed / sampling": counts[name] / seconds[name] / base,
            "steps": counts[name],
            "steps/s": counts[name] / seconds[name],
        }
        for name in ways
    ]
    about = {key: str(value) for key, value in vars(flags).items() if key != "out"}
    title = f"{flags.ckpt}, {flags.num_images} images, {flags.steps} steps of {sampler}"
    report(title, rows, about | machine(torch.device(pipe.device)), flags.out)


if __name__ == "__main__":
    main()
