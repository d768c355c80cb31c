"""Against numbers recorded from ADM's evaluator and from exact float64 forms of the same scores.

The arrays in tests/golden/metrics_*.npz are synthetic; `pool` has the width of Inception's pool_3
and fewer rows than columns, `over` holds values whose squares leave float16.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.special import softmax

from evaluations.adm import adm_memberships, adm_precision_recall
from evaluations.inception import probabilities, resize, spatial_features
from evaluations.metrics import (
    frechet_distance,
    inception_score,
    manifold_radii,
    memberships,
    precision_recall,
    statistics,
)

GOLDEN = Path(__file__).parents[1] / "golden"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"metrics_{name}.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module", params=["small", "mid", "wide", "pool", "over"])
def case(request) -> dict[str, np.ndarray]:
    return load(request.param)


def test_frechet_distance(case):
    distance = frechet_distance(*statistics(case["ref"]), *statistics(case["smp"]))
    assert distance == pytest.approx(float(case["fid_exact"]), rel=1e-6)
    assert distance == pytest.approx(float(case["fid_adm"]), rel=1e-5)


@pytest.mark.parametrize("name", ["small", "over"])
def test_statistics(name):
    case = load(name)
    mu, sigma = statistics(case["smp"], block=33)
    np.testing.assert_allclose(mu, case["smp_mu"], rtol=1e-5)
    np.testing.assert_allclose(sigma, case["smp_sigma"], rtol=1e-5, atol=1e-6 * sigma.max())


@pytest.mark.parametrize("block", [None, 37, 4096])
def test_precision_recall_booleans(case, block):
    block = block or int(case["batch"])
    ref, smp = case["ref"], torch.from_numpy(case["smp"])
    ref_radii, smp_radii = manifold_radii(ref, 3, block), manifold_radii(smp, 3, block)
    np.testing.assert_allclose(ref_radii, case["pr_f32_ref_radii"], rtol=1e-5)
    np.testing.assert_allclose(smp_radii, case["pr_f32_smp_radii"], rtol=1e-5)
    ref_in, smp_in = memberships(ref, smp, ref_radii, smp_radii, block)
    np.testing.assert_array_equal(smp_in, case["pr_f32_smp_in"])
    np.testing.assert_array_equal(ref_in, case["pr_f32_ref_in"])
    assert precision_recall(ref, smp, 3, block) == pytest.approx(tuple(case["pr_f32"]), abs=1e-12)


def test_inception_score():
    case = load("inception_score")
    probs = softmax(case["acts"].astype(np.float64) @ case["weight"], axis=1)
    assert inception_score(probs) == pytest.approx(float(case["adm_5000"]), rel=1e-5)
    assert inception_score(probs) == pytest.approx(float(case["tf_5000"]), rel=1e-5)
    small = inception_score(probs.astype(np.float32), int(case["split_small"]))
    assert small == pytest.approx(float(case["adm_small"]), rel=1e-5)


def test_adm_rounding_of_precision_and_recall(case):
    block = int(case["batch"])
    ref_in, smp_in = (x.numpy() for x in adm_memberships(case["ref"], case["smp"], 3, block))
    for rule in ("adm16", "tfcpu"):
        off = (ref_in != case[f"pr_{rule}_ref_in"]).sum() + (
            smp_in != case[f"pr_{rule}_smp_in"]
        ).sum()
        assert off <= 2, rule
    found = adm_precision_recall(case["ref"], case["smp"], 3, block)
    assert found == (smp_in.mean(), ref_in.mean())


def test_inception_score_of_logits_by_the_evaluator():
    case = load("inception_score")
    probs = probabilities(case["acts"] @ case["weight"])
    assert inception_score(probs) == pytest.approx(float(case["adm_5000"]), rel=1e-5)
    assert inception_score(case["probs"], int(case["probs_split"])) == pytest.approx(
        float(case["probs_adm"]), rel=1e-5
    )
    spoilt = case["probs"][:40].copy()
    spoilt[3, 5] = 0.0
    assert np.isnan(case["zero_probs_adm"])  # ADM's logarithm of zero
    assert np.isfinite(inception_score(spoilt))


@pytest.mark.parametrize("shape", ["32x32", "64x64", "256x256", "299x299", "512x40"])
def test_resize_bit_for_bit(shape):
    case = load("resize")
    image = torch.from_numpy(case[f"{shape}_in"]).permute(0, 3, 1, 2).float()
    found = (resize(image) - 128) * 0.0078125
    rows = torch.from_numpy(case["rows"])
    np.testing.assert_array_equal(found[:, :, rows].permute(0, 2, 3, 1), case[f"{shape}_out"])


def test_spatial_layout():
    case = load("spatial")
    np.testing.assert_array_equal(spatial_features(torch.from_numpy(case["nchw"])), case["flat"])
