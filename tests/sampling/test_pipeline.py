"""Drawing from Python: images, steps on the way, routing of every token, rules changed live."""

import dataclasses
import time

import numpy as np
import pytest
import torch
from tiny_pipelines import at_work, made

from config.layers import DenseConfig, DiffMoEConfig, ExpertChoiceConfig, TokenChoiceConfig
from config.objective import DDPMConfig, SamplingConfig
from config.race import RaceConfig
from core.conditions import Condition
from core.errors import UserError
from data.vae import to_uint8
from models.build import build_model
from models.pretrained import load_pretrained
from sampling.generate import Sampler
from sampling.pipeline import Result, Step, load
from sampling.stream import streamed

PREDICTED = {"capacity_predictor": True}
RULED = {
    "diffmoe": DiffMoEConfig(num_experts=4),
    "expert_choice": ExpertChoiceConfig(num_experts=4, **PREDICTED),
    "race": RaceConfig(num_experts=4),
}


def same(one, other):
    np.testing.assert_array_equal(one.images, other.images)
    np.testing.assert_array_equal(one.routing.capacity, other.routing.capacity)


@pytest.mark.parametrize("sampler", ["euler", "heun", "euler_maruyama"])
def test_watching_changes_nothing_and_sees_every_evaluation(sampler):
    pipe = made(DiffMoEConfig(num_experts=4))
    settings = SamplingConfig(sampler=sampler, num_steps=3, cfg_scale=2.0, last_step="mean")
    drawer = Sampler.of(pipe.pretrained, settings, seed=5)
    labels, seen = Condition.of_labels([0, 1, 2, 2]), []
    plain, cost = drawer.latents(range(4), labels)
    drawer.record = "detailed"
    watched, _ = drawer.latents(range(4), labels, seen.append)
    assert torch.equal(plain, watched)
    assert [one.number for one in seen] == list(range(cost.calls // 2))
    assert all(one.data.shape == plain.shape for one in seen)
    if sampler == "euler":  # its last step goes all the way along the velocity
        torch.testing.assert_close(seen[-1].data, plain)


def test_watching_works_for_ddpm_and_its_last_data_are_the_sample():
    pipe = made(DiffMoEConfig(num_experts=4), objective=DDPMConfig())
    drawer = Sampler.of(pipe.pretrained, SamplingConfig(sampler="ddim", num_steps=4, cfg_scale=2))
    seen, labels = [], Condition.of_labels([0, 1])
    plain, _ = drawer.latents(range(2), labels)
    watched, _ = drawer.latents(range(2), labels, seen.append)
    assert torch.equal(plain, watched)
    assert [one.time for one in seen] == sorted((one.time for one in seen), reverse=True)
    torch.testing.assert_close(seen[-1].data, plain)


@pytest.mark.parametrize("layer", [*RULED.values(), TokenChoiceConfig(num_experts=9, top_k=2)])
def test_the_detail_holds_the_experts_of_every_token(layer):
    """Held against the plans themselves, of the conditional half."""
    pipe, plans = made(layer), []
    for block in pipe.pretrained.model.blocks:
        block.feed_forward.register_forward_hook(lambda m, a, out: plans.append(out[1]))
    result = pipe.sample([0, 1, 2], seed=1)
    routing, E = result.routing, layer.num_experts
    together = pipe.pretrained.config.model.feed_forward.sampling_sees_batch()
    assert routing.times.tolist() == pytest.approx([0, 1 / 3, 2 / 3])
    for step in range(3):
        for number in range(2):
            record = plans[step * (4 if together else 2) + number]
            taken = record.token_mask().view(-1, 16, E)[:3].bool().numpy()
            np.testing.assert_array_equal(routing.experts(number)[step], taken)
            np.testing.assert_array_equal(routing.numbers(number)[step], taken.sum(-1))
            np.testing.assert_allclose(
                routing.capacity[step, 0, number], taken.sum(-1).mean(-1), rtol=1e-12
            )
    np.testing.assert_allclose(
        routing.numbers(), (routing.numbers(0) + routing.numbers(1)) / 2, rtol=1e-6
    )
    _, meter = Sampler.of(pipe.pretrained, seed=1).latents(range(3), Condition.of_labels([0, 1, 2]))
    np.testing.assert_allclose(routing.spent(), meter.capacity(), rtol=1e-6)


def test_layers_without_a_plan_and_dense_models_have_no_maps():
    assert made(DenseConfig()).sample([0, 1]).routing is None
    steps = list(made(DenseConfig()).stream([0, 1]))
    assert [step.routing for step in steps] == [None] * 4
    pipe = made(TokenChoiceConfig(num_experts=4))
    first = pipe.pretrained.model.blocks[0].feed_forward
    forward = first.forward

    def without_plan(*args):
        y, record = forward(*args)
        return y, dataclasses.replace(record, plan=None)

    first.forward = without_plan
    routing = pipe.sample([0, 1]).routing
    assert routing.experts(0) is None
    assert routing.numbers(0) is None
    assert routing.numbers().shape == routing.numbers(1).shape == (3, 2, 16)


def test_without_guidance_the_other_half_is_not_there():
    routing = made(DiffMoEConfig(num_experts=4)).sample([0, 1], cfg_scale=1).routing
    assert np.isnan(routing.capacity[:, 1]).all()
    assert np.isfinite(routing.spent()).all()


@pytest.mark.parametrize("rule", [
    {"inference": "topk", "inference_capacity": 2.0},
    {"inference": "topk"},
    {"inference": "fixed", "fixed_threshold": 0.7},
    {"inference": "dynamic"},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("name", ["diffmoe", "expert_choice"])
def test_another_rule_is_as_if_loaded_with_it_and_leaves_the_first_alone(name, rule):
    pipe = made(RULED[name])
    before = pipe.sample([0, 1, 2], seed=3)
    other = pipe.routed(rule)
    fresh = build_model(
        dataclasses.replace(
            pipe.pretrained.config.model,
            feed_forward=dataclasses.replace(RULED[name], **rule),
        )
    ).eval()
    fresh.load_state_dict(pipe.pretrained.model.state_dict())
    loaded = dataclasses.replace(
        other, pretrained=dataclasses.replace(other.pretrained, model=fresh)
    )
    same(other.sample([0, 1, 2], seed=3), loaded.sample([0, 1, 2], seed=3))
    same(pipe.sample([0, 1, 2], seed=3, routing=rule), other.sample([0, 1, 2], seed=3))
    same(pipe.sample([0, 1, 2], seed=3), before)
    theirs, ours = other.pretrained.model.state_dict(), pipe.pretrained.model.state_dict()
    assert all(theirs[key].data_ptr() == ours[key].data_ptr() for key in ours)


def test_the_capacity_asked_for_is_spent():
    pipe = made(DiffMoEConfig(num_experts=4))
    for capacity in (0.5, 2.0):
        rule = {"inference": "topk", "inference_capacity": capacity}
        assert pipe.sample([0, 1], routing=rule).routing.spent().mean() == pytest.approx(capacity)


def test_a_checkpoints_own_capacity_does_not_stand_in_the_way_of_other_rules():
    pipe = made(DiffMoEConfig(num_experts=4, inference="topk", inference_capacity=2.0))
    assert pipe.routing_rules == ("topk", "dynamic", "fixed")
    assert pipe.sample([0], routing={"inference": "dynamic"}).routing is not None


def test_rules_by_layer():
    assert made(RULED["race"]).routing_rules == ("threshold", "topk")
    assert made(ExpertChoiceConfig(num_experts=4)).routing_rules == ("topk",)
    assert made(TokenChoiceConfig(num_experts=4)).routing_rules == ()
    assert made(RULED["race"]).sees_batch() is False
    assert made(RULED["race"]).routed({"inference": "topk"}).sees_batch() is True


@pytest.mark.parametrize(
    ("layer", "asked", "wanted"),
    [
        ("diffmoe", {"routing": {"inference": "treshold"}}, "inference of model.*'treshold'"),
        ("diffmoe", {"routing": {"num_experts": 2}}, "routing: unknown 'num_experts'"),
        ("diffmoe", {"routing": {"fixed_threshold": 2.0}}, "fixed_threshold: 2.0 is not in"),
        ("race", {"routing": {"inference": "dynamic"}}, "'dynamic' is not allowed"),
        ("race", {"routing": {"fixed_threshold": 0.5}}, "race has no such key"),
        ("diffmoe", {"wanted": [3]}, r"class: 3 is not allowed; allowed: 0 \.\.\. 2"),
        ("diffmoe", {"wanted": [True]}, "class: True"),
        ("diffmoe", {"wanted": ["cat"]}, "class: 'cat'"),
        ("diffmoe", {"wanted": []}, "wanted: nothing"),
        ("diffmoe", {"seed": -1}, "seed: -1"),
        ("diffmoe", {"seed": 1.5}, "seed: 1.5"),
        ("diffmoe", {"keys": [1, 2]}, "keys: 2 for 1 images"),
        ("diffmoe", {"cfg_scale": float("nan")}, "cfg_scale: nan is not a finite number"),
        ("diffmoe", {"cfg_scale": -1.0}, "cfg_scale: -1.0 is too small"),
        ("diffmoe", {"num_steps": 0}, "num_steps: 0 is too small"),
        ("diffmoe", {"steps": 5}, "sampling: unknown 'steps'"),
        ("diffmoe", {"sampler": "ddim"}, "'ddim' does not belong"),
        ("diffmoe", {"num_steps": "many"}, "num_steps: 'many' is not allowed"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_before_anything_starts(layer, asked, wanted):
    asked = {"wanted": [0]} | asked
    for call in (made(RULED[layer]).sample, made(RULED[layer]).stream):
        with pytest.raises(UserError, match=wanted) as caught:
            call(asked["wanted"], **{k: v for k, v in asked.items() if k != "wanted"})
        assert "\n" not in str(caught.value)
    assert at_work() == 0


def test_a_stream_has_every_step_and_ends_with_the_result():
    pipe = made(DiffMoEConfig(num_experts=4))
    whole = pipe.sample([0, 1, 2], seed=2, sampler="heun")
    *steps, result = pipe.stream([0, 1, 2], seed=2, sampler="heun")
    assert all(isinstance(step, Step) for step in steps)
    assert isinstance(result, Result)
    same(result, whole)
    assert [step.number for step in steps] == list(range(6))
    for number, step in enumerate(steps):
        np.testing.assert_array_equal(step.routing.numbers()[0], whole.routing.numbers()[number])
        np.testing.assert_array_equal(step.routing.capacity[0], whole.routing.capacity[number])
        assert step.images.shape == (3, 4, 4, 3)


def test_a_sample_keeps_its_noise_in_any_company():
    pipe = made(RULED["race"])  # by thresholds: no sample sees another
    together = pipe.sample([0, 1, 2], seed=4)
    for number in range(3):
        alone = pipe.sample([number], seed=4, keys=[number])
        np.testing.assert_array_equal(alone.images[0], together.images[number])


def test_two_streams_at_once_do_not_mix():
    pipe = made(DiffMoEConfig(num_experts=4))
    rule = {"inference": "topk", "inference_capacity": 2.0}
    one, other = pipe.sample([0, 1], seed=1), pipe.sample([2, 0], seed=9, routing=rule)
    streams = pipe.stream([0, 1], seed=1), pipe.stream([2, 0], seed=9, routing=rule)
    pairs = list(zip(*streams, strict=True))
    same(pairs[-1][0], one)
    same(pairs[-1][1], other)


def calls_of(pipe):
    calls = []
    pipe.pretrained.model.register_forward_hook(lambda *_: calls.append(time.monotonic()))
    return calls


def test_closing_a_stream_ends_the_work_at_the_next_evaluation():
    pipe = made(DiffMoEConfig(num_experts=4))
    calls = calls_of(pipe)
    stream = pipe.stream([0], num_steps=500)
    next(stream)
    stream.close()
    assert at_work() == 0
    seen = len(calls)
    assert seen <= 2 * 5  # the one looked at, those that waited, and one on its way
    assert len(calls) == seen


def test_a_stream_that_is_forgotten_or_never_begun_leaves_no_thread():
    pipe = made(DiffMoEConfig(num_experts=4))
    stream = pipe.stream([0], num_steps=500)
    assert at_work() == 0
    next(stream)
    del stream
    assert at_work() == 0


def test_errors_of_the_work_reach_whoever_looks():
    def work(tell):
        tell(1)
        raise UserError("no more")

    stream = streamed(work)
    assert next(stream) == 1
    with pytest.raises(UserError, match="no more"):
        next(stream)
    pipe = made(DiffMoEConfig(num_experts=4))
    pipe.pretrained.model.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(pipe.stream([0]))


def test_a_trained_run_is_loaded_with_its_vae_and_drawn_like_by_the_sampler(trained):
    pipe = load(trained)
    assert pipe.class_names == ["class0", "class1", "class2"]
    assert pipe.name.endswith("step 4")
    assert pipe.cost() == 1.0
    result = pipe.sample([0, 2], seed=3)
    latents, meter = Sampler.of(load_pretrained(trained), seed=3).latents(
        range(2), Condition.of_labels([0, 2])
    )
    np.testing.assert_array_equal(result.images, to_uint8(pipe.vae.decode(latents)).numpy())
    np.testing.assert_allclose(result.routing.spent(), meter.capacity(), rtol=1e-6)
    assert (result.images.shape, result.nfe) == ((2, 16, 16, 3), 6)


def test_prompts(trained_t2i):
    pipe = load(trained_t2i)
    assert pipe.num_classes == 0
    result = pipe.sample(["a red dog", "one cat", "a red dog"], keys=[0, 1, 0])
    np.testing.assert_array_equal(result.routing.experts(0)[0, 0].any(), True)
    assert result.images.shape == (3, 16, 16, 3)
    for wanted, message in (([" "], "prompt 1 is empty"), ([3], "3 is no text")):
        with pytest.raises(UserError, match=message):
            pipe.sample(wanted)


def test_nothing_to_load(tmp_path):
    with pytest.raises(UserError, match="no checkpoint here"):
        load(tmp_path)
