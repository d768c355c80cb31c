"""Rows that are announced before they are read: the same, with and without the system's help."""

import numpy as np
import pytest

from data import readahead
from data.latents import LatentCache
from data.mapped import mapped


@pytest.fixture
def rows(tmp_path):
    """(501, 3000) bytes in a mapped file: rows that begin and end within pages."""
    values = np.random.default_rng(0).integers(0, 256, (501, 3000), dtype=np.uint8)
    np.save(tmp_path / "rows.npy", values)
    return values, mapped(tmp_path / "rows.npy", values.shape, values.dtype, "x")


PLACES = np.array([500, 0, 7, 7, 300])


@pytest.mark.parametrize("way", ["whole", "one by one", "refused"])
def test_rows_are_what_they_are_whatever_the_system_takes(rows, monkeypatch, way):
    values, found = rows
    if way == "one by one":
        monkeypatch.setattr(readahead, "_all_at_once", lambda ranges: False)
    if way == "refused":
        monkeypatch.setattr(readahead, "_process", lambda pid: -1)
        assert not readahead._all_at_once(readahead._pages(np.array([found.ctypes.data]), 4096))
    readahead.scatter(found)
    readahead.announce(found, PLACES)
    readahead.announce(found, np.tile(PLACES, readahead.MOST))
    assert np.array_equal(found[PLACES], values[PLACES])


def test_pages_hold_the_rows(rows):
    _, found = rows
    starts = found.ctypes.data + PLACES * 3000
    pages = readahead._pages(starts, 3000).astype(np.int64)
    assert (pages[:, 0] % 4096 == 0).all()
    assert (pages[:, 0] <= starts).all()
    assert (pages.sum(axis=1) == starts + 3000).all()


def test_a_cache_announces_whole_batches_where_order_is_random(cache_folder, monkeypatch):
    asked = []
    monkeypatch.setattr("data.latents.announce", lambda rows, places: asked.append(len(places)))
    one, other = (LatentCache(cache_folder, scattered) for scattered in (True, False))
    indices, views = list(range(len(one)))[::-1], [i % 2 for i in range(len(one))]
    assert one.moments(indices, views).equal(other.moments(indices, views))
    assert sum(asked) == len(one)
