"""Generators, files, archives, and how a command reports an error."""

import numpy as np
import pytest
import torch

from core.errors import ConfigError, UserError, command
from core.files import complete_file, complete_folder
from core.npz import NpzWriter
from core.rng import SampleNoise, derive_seed, generator


def test_seeds_are_functions_of_all_their_parts():
    seeds = {
        derive_seed(0, "a"),
        derive_seed(1, "a"),
        derive_seed(0, "b"),
        derive_seed(0, "a", 0),
        derive_seed(0, "a", 1),
        derive_seed(0, "a", 0, 1),
        derive_seed(0, "a", 1, 0),
    }
    assert len(seeds) == 7
    assert derive_seed(0, "a") == 1519237806467013821  # a change would change every run
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_a_samples_noise_does_not_depend_on_its_batch():
    def noise(indices):
        draw = SampleNoise([generator(0, "n", i) for i in indices], (2, 3))
        return torch.stack([draw(), draw()], dim=1)

    together = noise(range(4))
    assert torch.equal(torch.cat([noise([0]), noise([1, 2]), noise([3])]), together)
    assert not torch.equal(together[:, 0], together[:, 1])


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "deep" / "file"

    def fail(temporary):
        temporary.write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), complete_file(path) as temporary:
        fail(temporary)
    assert list(path.parent.iterdir()) == []
    with complete_file(path) as temporary:
        temporary.write_text("one")
    with complete_file(path) as temporary:
        temporary.write_text("two")
        assert path.read_text() == "one"
    assert path.read_text() == "two"


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "folder"

    def fail(temporary):
        (temporary / "file").write_text("half")
        raise RuntimeError

    with pytest.raises(RuntimeError), complete_folder(path) as temporary:
        fail(temporary)
    assert list(tmp_path.iterdir()) == []
    with complete_folder(path) as temporary:
        (temporary / "file").write_text("one")
    with pytest.raises(UserError, match="exists"), complete_folder(path):
        pass
    assert (path / "file").read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_npz_in_pieces_is_what_numpy_reads(tmp_path):
    rows = np.arange(60, dtype=np.uint8).reshape(5, 2, 6)
    with NpzWriter(tmp_path / "a.npz") as archive:
        archive.begin("arr_0", rows.dtype, rows.shape)
        archive.append(rows[:2])
        archive.append(rows[2:, ::-1])
        archive.begin("labels", np.dtype(np.int64), (3,))
        archive.append(np.array([3, 1, 2]))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as loaded:
        assert loaded.files == ["arr_0", "labels"]
        np.testing.assert_array_equal(loaded["arr_0"][:2], rows[:2])
        np.testing.assert_array_equal(loaded["arr_0"][2:], rows[2:, ::-1])
        assert loaded["labels"].tolist() == [3, 1, 2]


@pytest.mark.parametrize(
    ("error", "rank", "printed"),
    [
        (UserError("a:\n  b"), "0", "error: a: b\n"),
        (UserError("a"), "1", "error: a\n"),
        (ConfigError("a"), "0", "error: a\n"),
        (ConfigError("a"), "1", ""),
    ],
)
def test_a_user_error_is_one_line_and_code_2(error, rank, printed, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)

    @command
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == printed


def test_other_errors_keep_their_traceback():
    @command
    def main():
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        main()
