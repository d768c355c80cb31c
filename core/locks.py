"""One owner at a time for a folder: a run, a cache, a set of samples.

The owner writes `.lock` into the folder, with host, process and command, and touches it every few
seconds. A lock is stale when its process is gone from this host, or when another host has not
touched it for STALE seconds; it is then taken over. Ages are differences between times of the same
file system, so that the clocks of hosts need not agree.
"""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from core.distributed import Processes, restarts
from core.errors import ConfigError, UserError
from core.logging import get_logger

NAME = ".lock"
BEAT = 5.0
"""Seconds between two touches."""
STALE = 60.0
"""Seconds without a touch after which another host's lock is worth nothing."""

log = get_logger("locks")


class Lock:
    """The lock of a folder, for one process.

    Args:
        folder: existing.
        purpose: what it is to the user, such as `run_dir`, for messages.

    Attributes:
        lost: whether somebody has taken it over, while this process or its network slept.
    """

    def __init__(self, folder: Path, purpose: str):
        self.path, self.purpose = folder / NAME, purpose
        self.token = uuid.uuid4().hex
        self.private = folder / f"{NAME}.{self.token}"
        self.lost = False
        self.ended = threading.Event()
        self.beating: threading.Thread | None = None

    def take(self, patience: float = 0.0) -> None:
        """Become the owner, and stay it until `release`.

        Args:
            patience: seconds to wait for another owner to end or to become stale.

        Raises:
            UserError: somebody else is the owner, or the folder cannot be written to.
        """
        until = time.monotonic() + patience
        while not self._created():
            owner = self._owner()
            if owner is None:
                continue  # it went in between
            if self._is_stale(owner):
                self._take_over(owner)
            elif time.monotonic() < until:
                time.sleep(min(1.0, BEAT))
            else:
                raise UserError(
                    f"{self.purpose}: {self.path.parent} is in use by process {owner['pid']} on "
                    f"{owner['host']} since {owner['since']} ({owner['command']}); wait for it, "
                    "stop it, or choose another folder"
                )
        self.beating = threading.Thread(target=self._beat, daemon=True)
        self.beating.start()

    def release(self) -> None:
        """Stop being the owner; without effect for one who is not."""
        if self.beating is None:
            return
        self.ended.set()
        self.beating.join()
        self.beating = None
        owner = self._owner()
        if owner is not None and owner["token"] == self.token:
            self.path.unlink(missing_ok=True)

    def _created(self) -> bool:
        """Whether the lock was free and is ours now."""
        about = {
            "token": self.token,
            "host": socket.gethostname(),
            "space": _process_space(),
            "pid": os.getpid(),
            "started": _start_of(os.getpid()),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "command": " ".join(Path(word).name for word in sys.argv[:1]),
        }
        try:
            self.private.write_text(json.dumps(about))
            return _linked(self.private, self.path)
        except OSError as error:
            raise UserError(
                f"{self.purpose}: cannot write to {self.path.parent}: {error.strerror}"
            ) from error
        finally:
            with suppress(OSError):
                self.private.unlink()

    def _owner(self) -> dict | None:
        """Who wrote the lock; None if there is none."""
        nobody = {"token": "", "host": "?", "space": "", "pid": 0, "since": "?", "command": "?"}
        try:
            return nobody | {"started": None} | json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError):  # cut short by a full disk
            return nobody | {"started": None}

    def _is_stale(self, owner: dict) -> bool:
        here = owner["host"] == socket.gethostname() and owner["space"] == _process_space()
        if here:
            return _start_of(owner["pid"]) != owner["started"]
        try:
            self.private.touch()
            return self.private.stat().st_mtime - self.path.stat().st_mtime > STALE
        except OSError:
            return False
        finally:
            self.private.unlink(missing_ok=True)

    def _take_over(self, owner: dict) -> None:
        """Move a stale lock away; whoever took it over first keeps it."""
        aside = self.private
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return
        try:
            moved = json.loads(aside.read_text()).get("token", "")
        except (OSError, ValueError, AttributeError):
            moved = ""
        if moved != owner["token"]:  # another's, and fresh
            _linked(aside, self.path)
            aside.unlink()
            return
        aside.unlink()
        log.warning(
            "%s: the lock of process %s on %s was left behind; taken over",
            *(self.path.parent, owner["pid"], owner["host"]),
        )

    def _beat(self) -> None:
        foreign = 0
        while not self.ended.wait(BEAT):
            owner = self._owner()
            if owner is not None and owner["token"] == self.token:
                foreign = 0
                with suppress(OSError):  # the next one may reach the disk
                    os.utime(self.path)
                continue
            foreign += 1
            if foreign == 2:  # once may be the file server's moment
                self.lost = True
                return

    def check(self) -> None:
        """See that this process still is the owner.

        Raises:
            UserError: it is not.
        """
        if self.lost:
            raise UserError(
                f"{self.purpose}: {self.path.parent} was taken over by another process, while this "
                "one or its disk did not answer; nothing more is written"
            )


@contextmanager
def exclusive(folder: Path, purpose: str, processes: Processes) -> Iterator[Lock]:
    """Hold the lock of a folder for the length of a block.

    The folder is made where it is not there, and goes again if nothing came into it. Processes that
    torchrun started anew wait for the lock of those before them.

    Args:
        folder: of a run, a cache, a set.
        purpose: see `Lock`.
        processes: all of which enter together; the main one holds the lock.

    Raises:
        ConfigError: somebody else holds it, or the folder cannot be made or written to.
    """
    lock, refusal = Lock(folder, purpose), None
    made: list[Path] = []
    if processes.is_main:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock.take(patience=2 * STALE if restarts() else 0.0)
        except OSError as error:
            refusal = f"{purpose}: cannot make {folder}: {error.strerror}"
        except UserError as error:
            refusal = str(error)
    refusal = processes.from_main(refusal)
    if refusal is not None:
        raise ConfigError(refusal)
    try:
        yield lock
    finally:
        lock.release()
        with suppress(OSError):  # the first one that is not empty ends it
            for path in made:
                path.rmdir()


def _linked(private: Path, public: Path) -> bool:
    """Whether a file got its public name, whole at once; not if that is taken."""
    try:
        os.link(private, public)
    except FileExistsError:
        return False
    except OSError:  # a file system without links
        try:
            with public.open("x") as file:
                file.write(private.read_text())
        except FileExistsError:
            return False
    return True


def _process_space() -> str:
    """Within which a process number means something: containers share a host's name at times."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _start_of(pid: int) -> str | None:
    """When a process of this host started, which tells it from a later one of the same number."""
    try:
        about = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        pass
    else:
        fields = about.rpartition(")")[2].split()
        return None if fields[0] in "ZX" else fields[19]  # dead, though nobody has noticed
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        return "running"
    return "running"
