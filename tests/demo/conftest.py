"""A page of tiny models, served by this process."""

import json
import socket
import urllib.request
from dataclasses import dataclass

import pytest
from tiny_pipelines import made

from config.layers import DiffMoEConfig
from config.race import RaceConfig
from demo.app import launch
from demo.work import Studio
from sampling.pipeline import Pipeline


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Server:
    """A page, and its pipelines."""

    url: str
    pipes: dict[str, Pipeline]

    def post(self, name: str, *data: object) -> tuple[str, object]:
        """What a hand-made request gets: the name of the last event, and what came with it."""
        body = json.dumps({"data": list(data)}).encode()
        kind = {"Content-Type": "application/json"}
        call = f"{self.url}/gradio_api/call/{name}"
        with urllib.request.urlopen(urllib.request.Request(call, body, kind), timeout=30) as reply:
            event = json.load(reply)["event_id"]
        found = "", None
        with urllib.request.urlopen(f"{call}/{event}", timeout=60) as stream:
            for line in stream.read().decode().splitlines():
                if line.startswith("event: ") and line != "event: heartbeat":
                    found = line.removeprefix("event: "), None
                elif line.startswith("data: ") and found[1] is None:
                    found = found[0], json.loads(line.removeprefix("data: "))
        return found


@pytest.fixture(scope="session")
def server():
    from demo.page import build

    pipes = {pipe.name: pipe for pipe in (
        made(DiffMoEConfig(num_experts=4), "first"), made(RaceConfig(num_experts=4), "second")
    )}  # fmt: skip
    page, port = build(Studio(pipes), {}), free_port()
    launch(page, "127.0.0.1", port, wait=False)
    yield Server(f"http://127.0.0.1:{port}", pipes)
    page.close(verbose=False)
