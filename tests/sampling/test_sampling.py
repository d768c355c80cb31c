"""Guidance, capacity, seeded samples in blocks, labels, grids."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from config.layers import DiffMoEConfig
from config.model import ModelConfig
from config.objective import SamplingConfig
from core.conditions import Condition
from core.distributed import Processes
from core.types import ModelOutput, RoutingRecord
from data.vae import to_uint8
from models.build import build_model
from sampling import blocks
from sampling.blocks import SetPlan, generate_set
from sampling.generate import Sampler
from sampling.grid import image_grid, save_png
from sampling.guidance import CapacityMeter, Guided
from sampling.labels import balanced_labels, chosen_labels, random_labels
from sampling.sets import SetFolder
from sampling.wanted import ByClass
from transport.objective import Flow

ALONE = Processes(0, 1, torch.device("cpu"))


def record(*counts, tokens=4):
    return RoutingRecord(torch.tensor(counts), tokens)


class Conditioned:
    """Predicts its condition; the second half of the channels is a variance."""

    def __init__(self):
        self.calls = []

    def __call__(self, x, t, cond):
        cond = Condition.of(cond).labels
        self.calls.append(cond.tolist())
        y = cond.float()[:, None, None, None].expand(-1, 2, 1, 1)
        return ModelOutput(y, [record([1, 2], [3, 4]), record([2, 2], [2, 2])])


def null(cond):
    return Condition(torch.full_like(cond.labels, 9)).side(free=True)


def test_guidance_moves_away_from_the_unconditional_side():
    model, cond = Conditioned(), torch.tensor([1, 2])
    x, t = torch.zeros(2, 1, 1, 1), torch.zeros(2)
    output = Guided(model, null, SamplingConfig(cfg_scale=1.5))(x, t, cond)
    assert output.prediction[:, 0].flatten().tolist() == [9 + 1.5 * (1 - 9), 9 + 1.5 * (2 - 9)]
    assert output.prediction[:, 1].flatten().tolist() == [1, 2]
    assert model.calls == [[1, 2], [9, 9]]
    assert len(output.routing) == 4


def test_no_guidance_is_one_call():
    model, cond = Conditioned(), torch.tensor([1, 2])
    output = Guided(model, null, SamplingConfig(cfg_scale=1))(
        torch.zeros(2, 1, 1, 1), torch.zeros(2), cond
    )
    assert output.prediction[:, 0].flatten().tolist() == [1, 2]
    assert model.calls == [[1, 2]]


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0.1, 1.0), [False, False, True, True, False]),  # the step at 0.1 is not above 0.1
        ((0.0, 1.0), [True, True, True, True, False]),  # a low of 0 is no bound
        ((0.2, 0.6), [False, False, False, True, False]),
    ],
)
def test_guidance_within_an_interval(interval, guided):
    times = torch.linspace(0, 1, 51)[[0, 5, 6, 25, 50]]
    settings = SamplingConfig(cfg_scale=2.0, cfg_interval=interval)
    found = []
    for t in times:
        model = Conditioned()
        Guided(model, null, settings)(torch.zeros(2, 1, 1, 1), t.expand(2), torch.tensor([1, 2]))
        found.append(len(model.calls) == 2)
    assert found == guided


def test_capacity_is_the_mean_over_layers_and_calls():
    """Eq. 9 and 15 with E = 2, S = 4: pairs per token."""
    meter = CapacityMeter(Conditioned(), 2)
    x, t, cond = torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.tensor([1, 2])
    meter(x, t, cond)
    expected = [(3 / 4 + 4 / 4) / 2, (7 / 4 + 4 / 4) / 2]
    assert meter.capacity().tolist() == expected
    meter(x, t, cond)
    assert meter.capacity().tolist() == expected


def test_a_dense_model_has_no_capacity():
    meter = CapacityMeter(lambda x, t, cond: ModelOutput(x), 1)
    meter(torch.zeros(1), torch.zeros(1), torch.zeros(1))
    assert meter.capacity() is None


LABEL = random_labels(3, 7)


def decode(latents):
    """Stands for a VAE: the first three channels are the image."""
    return to_uint8(latents[:, :3])


@pytest.fixture(scope="module")
def sampler():
    torch.manual_seed(0)
    layer = DiffMoEConfig(num_experts=4)
    shape = {"input_size": 4, "patch_size": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    model = build_model(ModelConfig(**shape, num_classes=3, feed_forward=layer)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.blocks[1].feed_forward.router.predictor.thresholds.fill_(0.5)
    settings = SamplingConfig(sampler="euler", num_steps=3, cfg_scale=2.0)
    return Sampler(model, Flow(), settings, (4, 4, 4), 7, torch.device("cpu"))


def measure(images):
    """Stands for a network: mean and largest value of each image."""
    x = images.float().flatten(1)
    return {"pool": torch.stack([x.mean(1), x.amax(1)], dim=1)}


HASHES = {"checkpoint_sha256": "a" * 64, "set_sha256": "b" * 64}


def run(sampler, path, processes=ALONE, num_samples=10, measure=None, save="npz"):
    plan = SetPlan(ByClass(LABEL, 3), num_samples, 4, SetFolder(path), save, HASHES)
    return generate_set(sampler, decode, measure, plan, processes)


def test_a_set_has_its_images_labels_and_capacity(sampler, tmp_path):
    result = run(sampler, tmp_path / "a")
    with np.load(tmp_path / "a" / "samples.npz", allow_pickle=False) as archive:
        images, labels = archive["arr_0"], archive["labels"]
        assert {name: str(archive[name]) for name in HASHES} == HASHES
    assert (images.shape, images.dtype) == ((10, 4, 4, 3), np.uint8)
    assert labels.tolist() == [LABEL(i) for i in range(10)] == result.labels.tolist()
    np.testing.assert_array_equal(result.first.numpy(), images)
    latents, _ = sampler.latents(range(4), ByClass(LABEL, 3).condition(range(4)))
    pixels = (127.5 * latents[:, :3] + 128).clamp(0, 255).to(torch.uint8)
    np.testing.assert_array_equal(images[:4], pixels.permute(0, 2, 3, 1).numpy())
    kept = [
        sampler.latents(range(j, j + 4), ByClass(LABEL, 3).condition(range(j, j + 4)))[1].capacity()
        for j in (0, 4, 8)
    ]
    assert result.capacity == pytest.approx(torch.cat(kept)[:10].mean().item(), rel=1e-6)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["parts", "samples.npz"]


def test_a_longer_set_begins_with_the_shorter_one(sampler, tmp_path):
    """The last block is computed full, although routing looks at the whole batch."""
    short, long = run(sampler, tmp_path / "a"), run(sampler, tmp_path / "b", ALONE, 16)
    assert torch.equal(short.first, long.first[:10])


def test_more_processes_than_blocks_leave_some_idle(sampler, tmp_path):
    class Silent(Processes):
        def barrier(self):
            pass

        def from_main(self, value):
            return [] if value is None else value

    whole = run(sampler, tmp_path / "whole", num_samples=3)
    main = Silent(0, 2, torch.device("cpu"))
    result = run(sampler, tmp_path / "a", main, num_samples=3)
    assert run(sampler, tmp_path / "a", Silent(1, 2, torch.device("cpu")), num_samples=3) is None
    assert torch.equal(result.first, whole.first)


def archive_of(path):
    return (path / "samples.npz").read_bytes()


class KilledError(Exception):
    pass


def run_until(sampler, blocks, path):
    """A run that dies after so many blocks."""
    made = []

    def dying(latents):
        if len(made) == blocks:
            raise KilledError
        made.append(None)
        return decode(latents)

    plan = SetPlan(ByClass(LABEL, 3), 10, 4, SetFolder(path), "npz", HASHES)
    with pytest.raises(KilledError):
        generate_set(sampler, dying, measure, plan, ALONE)


def test_an_interrupted_set_goes_on_and_is_the_same(sampler, tmp_path):
    whole = run(sampler, tmp_path / "whole", measure=measure)
    run_until(sampler, 2, tmp_path / "a")
    result = run(sampler, tmp_path / "a", measure=measure)
    assert (whole.made, result.made) == (10, 2)
    assert archive_of(tmp_path / "a") == archive_of(tmp_path / "whole")
    np.testing.assert_array_equal(result.features["pool"], whole.features["pool"])
    assert (result.capacity, result.nfe) == (whole.capacity, whole.nfe)
    images = np.load(tmp_path / "a" / "samples.npz")["arr_0"].reshape(10, -1)
    np.testing.assert_allclose(result.features["pool"][:, 0], images.mean(1), rtol=1e-6)


@pytest.mark.parametrize("failing", [0, 4, 8])  # files are written while the next block is drawn
def test_a_disk_that_fails_ends_a_set_whose_finished_blocks_stay(
    failing, sampler, tmp_path, monkeypatch
):
    write = blocks._write_block

    def full(plan, block):
        if block.first == failing:
            raise OSError(28, "No space left on device", str(tmp_path))
        write(plan, block)

    monkeypatch.setattr(blocks, "_write_block", full)
    with pytest.raises(OSError, match="No space"):
        run(sampler, tmp_path / "a")
    monkeypatch.setattr(blocks, "_write_block", write)
    again = run(sampler, tmp_path / "a")
    assert again.made == 10 - failing
    run(sampler, tmp_path / "whole")
    assert archive_of(tmp_path / "a") == archive_of(tmp_path / "whole")


@pytest.mark.parametrize("save", ["images", "none"])
def test_images_as_files_or_not_at_all(sampler, tmp_path, save):
    whole = run(sampler, tmp_path / "whole", measure=measure)
    result = run(sampler, tmp_path / "a", measure=measure, save=save)
    np.testing.assert_array_equal(result.features["pool"], whole.features["pool"])
    assert torch.equal(result.first, whole.first)
    assert not (tmp_path / "a" / "samples.npz").exists()
    if save == "images":
        files = sorted((tmp_path / "a" / "images").iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(10)]
        images = np.load(tmp_path / "whole" / "samples.npz")["arr_0"]
        for file, image in zip(files, images, strict=True):
            np.testing.assert_array_equal(np.asarray(Image.open(file)), image)


def test_recorded_pairs_add_up_to_the_measured_capacity(sampler, tmp_path):
    plain = run(sampler, tmp_path / "plain")
    recording = dataclasses.replace(sampler, record=True)
    result = run(recording, tmp_path / "a")
    assert plain.routing is None
    assert archive_of(tmp_path / "a") == archive_of(tmp_path / "plain")
    table = result.routing
    T, halves, L, E, K = table.pairs.shape
    assert (T, halves, L, E, K) == (3, 2, 1, 4, 3)  # every second block is MoE
    assert table.samples[0].sum(axis=-1).tolist() == [10, 10]
    assert table.samples[0, 0].tolist() == np.bincount(result.labels, minlength=3).tolist()
    total = table.pairs.sum() / (T * halves * 10 * table.tokens.sum())
    assert total == pytest.approx(result.capacity, rel=1e-6)
    np.testing.assert_allclose(table.times, [0, 1 / 3, 2 / 3], rtol=1e-6)
    assert table.maps.shape == (3, 4, 16)


def test_chosen_labels():
    label = chosen_labels([207, 5], 3)
    assert [label(i) for i in range(8)] == [207, 207, 207, 5, 5, 5, 207, 207]


def test_random_labels_are_uniform_and_seeded():
    labels = [LABEL(i) for i in range(3000)]
    assert np.bincount(labels).min() > 900
    assert max(labels) == 2
    assert [random_labels(3, 8)(i) for i in range(50)] != labels[:50]


def test_balanced_labels_count_equally_in_shuffled_order():
    label = balanced_labels(3, 7, 300)
    labels = [label(i) for i in range(300)]
    assert np.bincount(labels).tolist() == [100, 100, 100]
    assert labels != sorted(labels)
    assert max(np.bincount(labels[:150])) < 75
    assert [label(i) for i in (300, 301)] == [LABEL(300), LABEL(301)]


@pytest.mark.parametrize(("method", "nfe"), [("euler", 6), ("heun", 12), ("rk4", 24)])
def test_model_evaluations_are_counted(sampler, tmp_path, method, nfe):
    """Three steps, each with the conditional and the unconditional call."""
    settings = dataclasses.replace(sampler.settings, sampler=method)
    result = run(dataclasses.replace(sampler, settings=settings), tmp_path / "a")
    assert result.nfe == nfe
    free = dataclasses.replace(settings, cfg_scale=1.0)
    assert run(dataclasses.replace(sampler, settings=free), tmp_path / "b").nfe == nfe / 2
    joint = dataclasses.replace(settings, cfg_pooling="joint")
    assert run(dataclasses.replace(sampler, settings=joint), tmp_path / "c").nfe == nfe


def test_grid(tmp_path):
    images = torch.arange(5)[:, None, None, None].expand(5, 2, 2, 3).to(torch.uint8)
    grid = image_grid(images, gap=1)
    assert grid.shape == (5, 8, 3)
    assert grid[0, 0].tolist() == [0, 0, 0]
    assert grid[3, 3].tolist() == [4, 4, 4]
    assert grid[2].unique().tolist() == [255]
    assert grid[3, 6].tolist() == [255, 255, 255]
    save_png(grid, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
