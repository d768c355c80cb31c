"""Reading processes outlive signals to the whole job, and end with their own parent."""

import multiprocessing
import os
import subprocess
import sys
import time

import pytest
from torch.utils.data import DataLoader, Dataset

from core.errors import UserError
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
