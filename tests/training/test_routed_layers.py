"""Runs of each further kind of layer: they resume to the bit and log what their routers do."""

import json

import pytest
from tiny_runs import final, run, same

pytestmark = pytest.mark.usefixtures("one_thread")

RACE = {
    "model__feed_forward__name": "race",
    "model__feed_forward__hidden_split": 2,
    "model__moe_every": 1,
}
NUCLEUS = {
    "model__feed_forward__name": "expert_choice",
    "model__feed_forward__renormalise": "token",
    "model__feed_forward__rounding": "up",
    "model__feed_forward__route_scale": 2.5,
    "model__feed_forward__router_input": "decoupled",
    "model__feed_forward__shared_mlp": "gelu",
    "model__feed_forward__shared_intermediate_size": 16,
}


def entries(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [
        {k: v for k, v in e.items() if not k.startswith(("images", "mfu", "memory", "seconds"))}
        for e in lines
    ]


@pytest.mark.parametrize("layer", [RACE, NUCLEUS], ids=["race", "nucleus"])
def test_a_run_in_two_parts_is_the_run_in_one(layer, flags, tmp_path):
    more = layer | {"train__activation_checkpointing": True}
    run(flags("whole", **more))
    run(flags("parts", **more, train__max_steps=4))
    run(flags("parts", **more))
    same(tmp_path / "whole", tmp_path / "parts")
    assert entries(tmp_path / "whole") == entries(tmp_path / "parts")


def test_a_race_logs_its_losses_loads_and_thresholds(flags, tmp_path):
    run(flags(**RACE, optim__lr=1e-2))
    *rest, last = [e for e in entries(tmp_path / "run") if "loss/loss" in e]
    for layer in (0, 1):
        assert last[f"capacity/moe_layer_{layer}"] == pytest.approx(2)
        assert last[f"max_load/moe_layer_{layer}"] >= 1
    thresholds = final(tmp_path / "run")["blocks.1.feed_forward.router.thresholds"]
    assert last["mean_threshold/moe_layer_1"] == pytest.approx(thresholds.mean().item())
    assert thresholds.unique().numel() == 1
    # At first the second heads know nothing, and err by no less than their target's variance.
    assert 2 * 0.01 * 2 < rest[0]["loss/plr"] < 2 * 0.01 * 6
    assert last["loss/plr"] < rest[0]["loss/plr"]
    assert 0 < last["loss/similarity"] < 2 * 1e-4 * 4


def test_a_dense_run_goes_on_as_a_race(flags, tmp_path):
    argv = flags("dense", model__feed_forward__name="dense", train__max_steps=2)
    run([flag for flag in argv if "num_experts" not in flag])
    run(flags("race", **RACE, init_from=tmp_path / "dense", init_upcycle=True, train__max_steps=2))
    assert "blocks.0.feed_forward.experts.w1" in final(tmp_path / "race")
