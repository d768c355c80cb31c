"""Scores whose value is known without a reference: closed forms and hand-made points."""

import numpy as np
import pytest
import torch

from core.errors import UserError
from evaluations.metrics import (
    frechet_distance,
    inception_score,
    manifold_radii,
    memberships,
    precision_recall,
    statistics,
)


def rotation(width: int, seed: int = 0) -> np.ndarray:
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(width, width)))[0]


def test_frechet_distance_of_commuting_gaussians_in_any_frame():
    mu1, mu2 = np.array([0.0, 1.0, -2.0]), np.array([3.0, 1.0, 2.0])
    std1, std2 = np.array([1.0, 2.0, 0.5]), np.array([4.0, 2.0, 0.0])
    expected = ((mu1 - mu2) ** 2).sum() + ((std1 - std2) ** 2).sum()
    for turn in (np.eye(3), rotation(3)):
        got = frechet_distance(
            *(turn @ mu1, turn @ np.diag(std1**2) @ turn.T),
            *(turn @ mu2, turn @ np.diag(std2**2) @ turn.T),
        )
        assert got == pytest.approx(expected, rel=1e-12)
        assert isinstance(got, float)


def test_frechet_distance_of_covariances_that_do_not_commute():
    # 2 x 2: tr((AB)^(1/2)) = sqrt(tr(AB) + 2 sqrt(det(AB))).
    a, b = np.array([[2.0, 0.5], [0.5, 1.0]]), np.array([[1.0, -0.8], [-0.8, 3.0]])
    root = np.sqrt(np.trace(a @ b) + 2 * np.sqrt(np.linalg.det(a @ b)))
    got = frechet_distance(np.zeros(2), a, np.zeros(2), b)
    assert got == pytest.approx(np.trace(a) + np.trace(b) - 2 * root, rel=1e-12)


def test_frechet_distance_of_lines():
    # Rank one each: the root's trace is |<u, v>|, for orthogonal u and v nothing is shared.
    u, v = 3.0 * rotation(50)[:, 0], 2.0 * rotation(50)[:, 1]
    zero = np.zeros(50)
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)) == pytest.approx(13.0)
    w = u + v
    expected = 9.0 + 13.0 - 2 * 9.0
    assert frechet_distance(zero, np.outer(u, u), zero, np.outer(w, w)) == pytest.approx(expected)


def test_frechet_distance_to_a_point():
    zeros = np.zeros((4, 4))
    assert frechet_distance(np.zeros(4), np.eye(4), np.ones(4), zeros) == pytest.approx(8.0)
    assert frechet_distance(np.zeros(4), zeros, np.zeros(4), zeros) == 0.0


@pytest.mark.parametrize("rows", [500, 20])
def test_frechet_distance_of_equal_sets_is_zero(rows):
    x = np.random.default_rng(1).normal(size=(rows, 64)).astype(np.float32)
    distance = frechet_distance(*statistics(x), *statistics(torch.from_numpy(x[::-1].copy())))
    assert 0.0 <= distance < 1e-10


def test_statistics_survive_a_large_offset():
    x = np.random.default_rng(2).normal(size=(300, 5)).astype(np.float32) + np.float32(1e4)
    mu, sigma = statistics(x, block=7)
    np.testing.assert_allclose(mu, x.astype(np.float64).mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(sigma, np.cov(x.astype(np.float64), rowvar=False), rtol=1e-10)


def test_inception_score_closed_forms():
    assert inception_score(np.full((10, 7), 1 / 7)) == pytest.approx(1.0)
    one_hot = np.eye(8)[np.arange(80) % 8]
    assert inception_score(one_hot) == pytest.approx(8.0, rel=1e-12)
    # Each split of 80 sorted rows has two of eight classes.
    assert inception_score(np.sort(one_hot.argmax(1))[:, None] == np.arange(8), 20) == (
        pytest.approx(2.0, rel=1e-12)
    )


def test_inception_score_weighs_a_short_split_like_a_full_one():
    one_hot = np.eye(4)[[0, 1, 2, 3, 0]]
    assert inception_score(one_hot, split_size=4) == pytest.approx((4.0 + 1.0) / 2)


def test_inception_score_with_zero_probabilities():
    probs = torch.tensor([[0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    # p(y) = (1/2, 1/4, 1/4): each row diverges by log(2) / 2.
    assert inception_score(probs) == pytest.approx(np.sqrt(2.0), rel=1e-12)


def test_precision_recall_on_a_line():
    reference = np.arange(5.0)[:, None]
    np.testing.assert_array_equal(manifold_radii(reference, 1), np.ones(5))
    np.testing.assert_array_equal(manifold_radii(reference, 3), [9, 4, 4, 4, 9])
    samples = np.array([[0.5], [5.0], [5.5], [100.0]])
    radii = manifold_radii(reference, 1), manifold_radii(samples, 1)
    covered, inside = memberships(reference, samples, *radii)
    assert inside.tolist() == [True, True, False, False]
    assert covered.tolist() == [True] * 5
    # Radii of the samples, squared: 20.25, 0.25, 0.25, 94.5^2; the last reaches no further than
    # 5.5 and the first as far as 5: all of the reference is covered.
    assert precision_recall(reference, samples, k=1) == (0.5, 1.0)


def test_precision_and_recall_are_not_the_same():
    cluster = np.random.default_rng(0).normal(size=(50, 3))
    both = np.concatenate([cluster, cluster + 100])
    assert precision_recall(both, cluster) == (1.0, 0.5)
    assert precision_recall(cluster, both) == (0.5, 1.0)


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_copies_make_radii_of_zero_in_which_they_lie(offset):
    rng = np.random.default_rng(3)
    points = rng.normal(size=(20, 40)).astype(np.float32) + np.float32(offset)
    copies = points.repeat(5, axis=0)
    for block in (7, 2048):
        assert float(manifold_radii(copies, 3, block).max()) == 0.0
        assert precision_recall(points, copies, 3, block) == (1.0, 1.0)


def test_every_block_size_gives_the_same():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(123, 16)), rng.normal(size=(97, 16)) + 0.3
    radii = [manifold_radii(x, 3, block) for block in (1, 2, 50, 123, 5000)]
    for other in radii[1:]:
        torch.testing.assert_close(radii[0], other, rtol=1e-6, atol=0)
    assert len({precision_recall(x, y, 3, block) for block in (1, 2, 50, 123, 5000)}) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: statistics(np.zeros(3)), "features: must be a matrix"),
        (lambda: statistics(np.zeros((1, 3))), "features: needs at least 2 rows, got 1"),
        (lambda: statistics(np.full((2, 3), np.nan)), "features: some values are not finite"),
        (lambda: precision_recall(np.zeros((9, 2)), np.zeros((3, 2))), "samples: needs at least 4"),
        (lambda: precision_recall(np.zeros((9, 2)), np.zeros((9, 3))), "do not fit"),
        (lambda: manifold_radii(np.zeros((9, 2)), k=0), "k: must be at least 1"),
        (lambda: manifold_radii(np.zeros((9, 2)), block=0), "block: must be at least 1"),
        (lambda: inception_score(np.array([[2.0, -1.0]])), "probs: rows must be probabilities"),
        (lambda: inception_score(np.eye(2), 0), "split_size: must be at least 1"),
        (
            lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)),
            r"need \(D,\), \(D, D\)",
        ),
        (
            lambda: frechet_distance(np.zeros(2), np.eye(2), np.zeros(2), np.full((2, 2), np.inf)),
            "not finite",
        ),
    ],
)
def test_errors(call, message):
    with pytest.raises(UserError, match=message):
        call()
