"""What a machine gives: memory that is kept or given back, memory that processes share."""

import shutil
import sys
from pathlib import Path

import pytest
import torch

from core.conditions import Condition
from core.errors import ConfigError
from core.heap import freed_memory_kept
from core.limits import check_shared_memory
from data.loader import bytes_of

MEGA = 2**20


def resident() -> int:
    """Bytes of this process that are in memory."""
    line = next(
        x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS")
    )
    return 1024 * int(line.split()[1])


def after_use(size: int) -> int:
    """Bytes that stay when a tensor of `size` bytes has come and gone."""
    before = resident()
    torch.ones(size, dtype=torch.uint8)
    return resident() - before


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_as_long_as_is_asked_for():
    assert after_use(300 * MEGA) < 20 * MEGA
    with freed_memory_kept():
        kept = after_use(300 * MEGA)
        again = after_use(300 * MEGA)
    assert kept > 200 * MEGA
    assert again < 20 * MEGA  # the same memory
    assert after_use(300 * MEGA) < 20 * MEGA


def test_readers_whose_batches_do_not_fit_into_shared_memory_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("core.limits.SHARED_MEMORY", tmp_path)
    docker = shutil._ntuple_diskusage(64 * MEGA, 0, 64 * MEGA)
    monkeypatch.setattr("shutil.disk_usage", lambda path: docker)
    check_shared_memory("data.num_workers", 4, 8 * MEGA)
    check_shared_memory("data.num_workers", 0, 800 * MEGA)
    with pytest.raises(ConfigError, match=r"5 reading process\(es\) need 0.0839 GB .* at most 4"):
        check_shared_memory("data.num_workers", 5, 8 * MEGA)


def test_bytes_of_a_batch_are_those_of_all_its_tensors():
    cond = Condition(torch.zeros(3, dtype=torch.int64), torch.zeros(3, 2, 5, dtype=torch.bfloat16))
    assert bytes_of((torch.zeros(3, 4), cond, [1, 2])) == 3 * 4 * 4 + 3 * 8 + 3 * 2 * 5 * 2
