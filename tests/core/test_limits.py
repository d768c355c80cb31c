"""What a machine gives: memory that is kept or given back, memory that processes share."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import ConfigError
from core.limits import check_shared_memory

ROOT = Path(__file__).parents[2]
MEGA = 2**20

MEMORY = """
import re
from pathlib import Path

import numpy as np

from core.heap import freed_memory_kept

MEGA = 2**20

def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def after_use():
    before = resident()
    np.ones(300 * MEGA, dtype=np.uint8)
    return resident() - before

print(after_use())
with freed_memory_kept():
    print(after_use())
    print(after_use())
print(after_use())
"""
"""Megabytes that stay when 300 have come and gone, in a process of its own."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_freed_memory_is_kept_as_long_as_is_asked_for():
    done = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=ROOT
    )
    before, kept, again, after = map(float, done.stdout.split())
    assert before < 20
    assert kept > 200
    assert again < 20  # the same memory
    assert after < 20


def test_readers_whose_batches_do_not_fit_into_shared_memory_are_refused(monkeypatch, tmp_path):
    monkeypatch.setattr("core.limits.SHARED_MEMORY", tmp_path)
    docker = shutil._ntuple_diskusage(64 * MEGA, 0, 64 * MEGA)
    monkeypatch.setattr("shutil.disk_usage", lambda path: docker)
    check_shared_memory("data.num_workers", 4, 8 * MEGA)
    check_shared_memory("data.num_workers", 0, 800 * MEGA)
    with pytest.raises(ConfigError, match=r"5 reading process\(es\) need 0.0839 GB .* at most 4"):
        check_shared_memory("data.num_workers", 5, 8 * MEGA)
