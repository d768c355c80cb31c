"""Reading processes outlive signals to the whole job, and end with their own parent."""

import dataclasses
import multiprocessing
import os
import subprocess
import sys
import time

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from config.load import parse_config
from core.distributed import Processes
from core.errors import UserError
from data.sources import training_data
from data.workers import next_of, steady


class Numbers(Dataset):
    def __len__(self):
        return 40

    def __getitem__(self, index):
        return os.getpid()


def send(name: str, pid: int) -> None:
    """From another process, as a scheduler or a terminal does."""
    code = f"import os, signal; os.kill({pid}, signal.{name})"
    subprocess.run([sys.executable, "-S", "-c", code], check=True)


def test_a_reader_survives_signals_to_the_whole_job():
    loader = DataLoader(Numbers(), batch_size=None, num_workers=1, worker_init_fn=steady)
    arriving = iter(loader)
    pid = next(arriving)
    for name in ("SIGTERM", "SIGINT", "SIGTERM"):
        send(name, pid)
    assert list(arriving) == [pid] * 39
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)  # it ended with its loader


def _idle(started) -> None:
    steady(0)
    started.set()
    time.sleep(600)


def test_a_reader_ends_when_its_parent_says_so():
    started = multiprocessing.Event()
    reader = multiprocessing.Process(target=_idle, args=(started,), daemon=True)
    reader.start()
    assert started.wait(30)
    send("SIGTERM", reader.pid)
    reader.join(0.2)
    assert reader.is_alive()
    reader.terminate()
    reader.join(30)
    assert reader.exitcode == 0


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
        ConnectionResetError(104, "Connection reset by peer"),
        FileNotFoundError(2, "No such file or directory"),
        EOFError(),
    ],
)
def test_a_lost_reader_is_one_line(error):
    def lost():
        raise error
        yield

    with pytest.raises(UserError, match=r"--num-workers: .* at a \.\.\. b: .*; it stays; --timeo"):
        next_of(lost(), "a ... b", "it stays")


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not fit"), OSError("Caught OSError in DataLoader worker")]
)
def test_what_the_reading_code_does_wrong_is_not_hidden(error):
    def wrong():
        raise error
        yield

    with pytest.raises(type(error), match=str(error)):
        next_of(wrong(), "a", "b")


def bytes_of(fetched):
    """Of all tensors in what a data set fetched."""
    if isinstance(fetched, torch.Tensor):
        return fetched.nbytes
    if dataclasses.is_dataclass(fetched):
        return sum(bytes_of(getattr(fetched, field.name)) for field in dataclasses.fields(fetched))
    return sum(map(bytes_of, fetched)) if isinstance(fetched, tuple) else 0


@pytest.mark.parametrize("config", ["tiny_config", "tiny_t2i", "pixels", "online"])
def test_what_travels_is_known_without_reading(config, request, image_root, tmp_path):
    pixels = "--data.vae_path null --model.in_channels 3 --model.input_size 16"
    argv = {"pixels": pixels.split(), "online": []}.get(config)
    name = config if argv is None else "tiny_config"
    argv = ["--config", str(request.getfixturevalue(name)), *(argv or [])]
    if name != config:
        argv += ["--data.source", "images", "--data.data_path", str(image_root)]
    run = parse_config([*argv, "--run_dir", str(tmp_path)], "train.py")
    data = training_data(run, Processes(0, 1, torch.device("cpu")))
    fetched = data.__getitems__([(0, 0), (0, 1)])
    assert 2 * data.fetched_bytes() == pytest.approx(bytes_of(fetched), abs=16)
