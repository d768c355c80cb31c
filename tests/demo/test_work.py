"""What the buttons do, and what they refuse, without a page."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from tiny_pipelines import at_work, made

from config.layers import DenseConfig, DiffMoEConfig, TokenChoiceConfig
from config.objective import DDPMConfig
from config.race import RaceConfig
from core.errors import UserError
from demo import show, views
from demo.asked import EACH, MOST_IMAGES, MOST_STEPS, OWN, asked, rules
from demo.drawn import Drawn, draw
from demo.work import CHECKPOINTS, COMPANY, RULES, Studio
from evaluations.overlay import overlay
from sampling.pipeline import load

SETTINGS = [3, "euler", 4, 2.0, OWN, 1.0, 0.5]


@pytest.fixture(scope="module")
def studio():
    layers = {"diffmoe": DiffMoEConfig(num_experts=4), "race": RaceConfig(num_experts=4)}
    layers |= {"choice": TokenChoiceConfig(num_experts=4, top_k=2), "dense": DenseConfig()}
    return Studio({name: made(layer) for name, layer in layers.items()})


def pictures(page, kind="dm-map"):
    """Pixels of the pictures of a class in a piece of the page."""
    found = re.findall(rf'class="dm-px {kind}" src="data:image/png;base64,([^"]+)"', page)
    return np.stack([np.array(Image.open(io.BytesIO(base64.b64decode(one)))) for one in found])


def with_changes(**changes):
    names = ["seed", "sampler", "steps", "guidance", "rule", "capacity", "threshold"]
    return [changes.get(name, value) for name, value in zip(names, SETTINGS, strict=True)]


def test_pictures_and_maps_of_every_step_are_those_of_the_pipeline(studio):
    *steps, (last, curve, drawn) = studio.generate("diffmoe", 1, 2, *SETTINGS)
    *wanted, result = studio.pipes["diffmoe"].stream(
        [1, 1], seed=3, sampler="euler", num_steps=4, cfg_scale=2.0
    )
    assert len(steps) == 4
    for (page, _, none), step in zip(steps, wanted, strict=True):
        maps = step.routing.numbers()[0]
        np.testing.assert_array_equal(pictures(page, "dm-image"), step.images)
        np.testing.assert_array_equal(pictures(page), overlay(step.images, maps, drawn.top))
        assert none is None
    np.testing.assert_array_equal(pictures(last, "dm-image"), result.images)
    for layer in (0, 1, 2):
        numbers = result.routing.numbers(None if layer == 0 else layer - 1)
        page = show.pictures(drawn, 2, layer)
        np.testing.assert_array_equal(
            pictures(page), overlay(drawn.steps[1], numbers[1], drawn.top)
        )
    assert curve.count("<polyline") == 3
    assert f"{result.routing.spent().mean():.3f}" in show.facts(drawn)


def test_each_class_in_turn(studio):
    ask = asked(studio.pipe("diffmoe"), EACH, 5, SETTINGS)
    assert ask.wanted == [0, 1, 2, 0, 1]


def test_a_dense_model_is_shown_without_maps(studio):
    *_, (last, curve, drawn) = studio.generate("dense", 1, 2, *SETTINGS)
    assert "dm-map" not in last
    assert curve == ""
    assert "dense model" in show.facts(drawn)
    assert "dense model" in show.pictures(drawn, 1, 0)


def test_what_is_saved_counts_the_width_of_the_experts():
    assert show.saved(0.9, 1.0) == {"expert FLOPs saved against dense": "10.0 %"}
    ((words, value),) = show.saved(3.0, 0.5).items()
    assert value == "50.0 %"
    assert "spent" in words
    assert "0.5 of a dense layer" in words


def test_rules_that_a_visitor_may_choose(studio):
    assert rules(studio.pipe("diffmoe")) == [OWN, "topk", "dynamic", "fixed"]
    assert rules(studio.pipe("race")) == [OWN, "threshold", "topk"]
    assert rules(studio.pipe("choice")) == []
    ask = asked(studio.pipe("race"), 0, 1, with_changes(rule="topk", capacity=None))
    assert ask.routing == {"inference": "topk"}  # it has no capacity to choose


@pytest.mark.parametrize(
    ("name", "what", "count", "changes", "wanted"),
    [
        ("nobody", 0, 1, {}, "checkpoint: 'nobody' is not allowed; allowed: one of diffmoe"),
        ("../runs/x", 0, 1, {}, "checkpoint: '../runs/x'"),
        (None, 0, 1, {}, "checkpoint: None"),
        ("diffmoe", 3, 1, {}, r"class: 3 is not allowed; allowed: a whole number of 0 \.\.\. 2"),
        ("diffmoe", "../../x", 1, {}, "class: '../../x'"),
        ("diffmoe", None, 1, {}, "class: None"),
        ("diffmoe", True, 1, {}, "class: True"),
        ("diffmoe", 0, 0, {}, "images: 0 is not allowed"),
        ("diffmoe", 0, MOST_IMAGES + 1, {}, "images: 17"),
        ("diffmoe", 0, 1, {"steps": MOST_STEPS + 1}, "steps: 201"),
        ("diffmoe", 0, 1, {"steps": -1}, "steps: -1"),
        ("diffmoe", 0, 1, {"guidance": float("nan")}, "guidance: nan"),
        ("diffmoe", 0, 1, {"guidance": -0.5}, "guidance: -0.5"),
        ("diffmoe", 0, 1, {"guidance": "2"}, "guidance: '2'"),
        ("diffmoe", 0, 1, {"seed": 0.5}, "seed: 0.5"),
        ("diffmoe", 0, 1, {"sampler": "dopri5"}, "sampler: 'dopri5'"),
        ("diffmoe", 0, 1, {"sampler": "x" * 10**5}, r"sampler: 'x+\.\.\. is not allowed"),
        ("diffmoe", 0, 1, {"rule": "threshold"}, "the diffmoe layer has no 'threshold'; allowed"),
        ("race", 0, 1, {"rule": "dynamic"}, "the race layer has no 'dynamic'"),
        ("choice", 0, 1, {"rule": "topk"}, "the token_choice layer has no 'topk'"),
        ("diffmoe", 0, 1, {"rule": "fixed", "threshold": 1.1}, "threshold: 1.1"),
        ("diffmoe", 0, 1, {"rule": "topk", "capacity": 9}, "capacity: 9"),
        ("diffmoe", 0, 1, {"rule": "topk", "capacity": 0}, "capacity: 0"),
    ],
)
def test_wrong_inputs_are_refused_in_one_line(studio, name, what, count, changes, wanted):
    settings = with_changes(**changes)
    for work in (
        lambda: studio.generate(name, what, count, *settings),
        lambda: studio.compare(RULES, name, what, count, *settings, OWN, 1, 0.5),
    ):
        with pytest.raises(UserError, match=wanted) as refused:
            list(work())
        assert "\n" not in str(refused.value)
        assert len(str(refused.value)) < 300
    assert at_work() == 0


def test_pictures_that_would_fill_the_memory_are_refused(studio, monkeypatch):
    monkeypatch.setattr("demo.asked.MOST_KEPT", 3 * 4 * 4 * 10)
    with pytest.raises(UserError, match=r"12 evaluations of 1 images .* at most 10 are allowed"):
        list(studio.generate("diffmoe", 0, 1, *with_changes(steps=12)))


@pytest.mark.parametrize(
    ("look", "wanted"),
    [
        (
            lambda d: show.pictures(d, 5, 0),
            r"step: 5 is not allowed; allowed: a whole .* 1 \.\.\. 4",
        ),
        (lambda d: show.pictures(d, 0, 0), "step: 0"),
        (lambda d: show.pictures(d, 1, 3), "layer: 3"),
        (lambda d: show.pictures(d, "/etc/passwd", 0), "step: '/etc/passwd'"),
        (lambda d: show.curves(d, 9), "step: 9"),
        (lambda d: show.expert_lens(d, 0, 1), "layer: 0"),
        (lambda d: show.expert_lens(d, 1, 5), "expert: 5"),
        (lambda d: show.check_drawn(None), "nothing was generated yet"),
    ],
)
def test_looks_at_what_is_not_there(studio, look, wanted):
    *_, (_, _, drawn) = studio.generate("diffmoe", 1, 2, *SETTINGS)
    with pytest.raises(UserError, match=wanted):
        look(drawn)


def test_the_lens_lights_the_tokens_of_the_expert(studio):
    *_, (_, _, drawn) = studio.generate("diffmoe", 1, 2, *SETTINGS)
    page = show.expert_lens(drawn, 2, 3)
    shown = pictures(page, "dm-spot")  # rows of images, columns of steps
    taken = drawn.routing.experts(1)[..., 2]  # (T, N, S)
    assert len(shown) == 2 * 4
    lit = shown[..., 0].astype(int) > shown[..., 2] + 20  # the light is orange
    for place, mask in enumerate(lit):
        image, step = divmod(place, 4)
        np.testing.assert_array_equal(mask.reshape(-1), taken[step, image])
    assert f"{100 * taken.mean():.1f} % of the tokens" in page


def test_classes_from_the_hardest_to_the_easiest(studio):
    *told, (_, page) = studio.classes("diffmoe", [0, 1, 2], 2, *SETTINGS)
    assert len(told) == 2 * 4
    pipe, spent = studio.pipe("diffmoe"), []
    for turn in range(2):
        result = pipe.sample(
            [0, 1, 2], seed=3, keys=range(3 * turn, 3 * turn + 3),
            sampler="euler", num_steps=4, cfg_scale=2.0,
        )  # fmt: skip
        spent.append(result.routing.spent())
    means = sorted(np.mean(spent, axis=0), reverse=True)
    assert [float(x) for x in re.findall(r"<b>([\d.]+)</b>", page)] == [
        round(float(x), 3) for x in means
    ]
    assert page.count("dm-small") == 6


@pytest.mark.parametrize(
    ("chosen", "wanted"),
    [
        ([1], "choose 2 to 12"),
        ([], "choose 2 to 12"),
        (None, "choose 2 to 12"),
        ([1, 1], "at least 2 different"),
        ([0, 4], "class: 4"),
        (["a", "b"], "class: 'a'"),
        (list(range(100)), "choose 2 to 12"),
    ],
)
def test_classes_that_cannot_be_compared(studio, chosen, wanted):
    with pytest.raises(UserError, match=wanted):
        list(studio.classes("diffmoe", chosen, 1, *SETTINGS))


def test_a_dense_model_has_no_hard_classes(studio):
    with pytest.raises(UserError, match="a dense model spends the same"):
        list(studio.classes("dense", [0, 1], 1, *SETTINGS))


def test_the_same_noise_under_two_rules(studio):
    *_, (_, page) = studio.compare(RULES, "diffmoe", 1, 2, *SETTINGS, "topk", 2.0, 0.5)
    assert "A · routing as configured" in page
    assert "B · topk at 2: 2.000 experts per token" in page
    pipe, words = studio.pipe("diffmoe"), {"sampler": "euler", "num_steps": 4, "cfg_scale": 2.0}
    one = pipe.sample([1, 1], seed=3, **words)
    other = pipe.sample(
        [1, 1], seed=3, routing={"inference": "topk", "inference_capacity": 2.0}, **words
    )
    assert f"differ by {show.apart(one.images, other.images):.2f} of 255" in page
    found = pictures(page, "dm-image")
    np.testing.assert_array_equal(found, np.concatenate([one.images, other.images]))


def test_a_sample_alone_and_in_company(studio):
    *_, (_, page) = studio.compare(COMPANY, "diffmoe", EACH, 3, *SETTINGS, OWN, 1, 1)
    assert "choose among the tokens of the whole batch" in page
    *_, (_, page) = studio.compare(COMPANY, "race", EACH, 3, *SETTINGS, OWN, 1, 1)
    assert "no sample sees the others" in page
    assert "differs by 0.00 of 255" in page
    found = pictures(page, "dm-image")
    np.testing.assert_array_equal(found[:3], found[3:])
    *_, (_, page) = studio.compare(COMPANY, "race", 0, 2, *with_changes(rule="topk"), OWN, 1, 1)
    assert "choose among the tokens of the whole batch" in page  # by another rule


def test_all_checkpoints_side_by_side(studio):
    *_, (_, page) = studio.compare(CHECKPOINTS, "race", 0, 2, *SETTINGS, OWN, 1, 1)
    for name in studio.pipes:
        assert f" · {name}" in page
    assert studio.kinds() == [RULES, COMPANY, CHECKPOINTS]
    assert Studio({"one": studio.pipe("race")}).kinds() == [RULES, COMPANY]
    with pytest.raises(UserError, match="comparison: 'x'"):
        list(studio.compare("x", "race", 0, 2, *SETTINGS, OWN, 1, 1))


def test_a_ddpm_checkpoint_has_its_own_samplers():
    studio = Studio({"one": made(DiffMoEConfig(num_experts=4), objective=DDPMConfig())})
    *_, (_, _, drawn) = studio.generate("one", 1, 1, *with_changes(sampler="ddim"))
    assert isinstance(drawn, Drawn)
    with pytest.raises(UserError, match="sampler: 'euler' is not allowed; allowed: one of ddpm"):
        list(studio.generate("one", 1, 1, *SETTINGS))


def test_closing_a_generation_ends_its_work(studio):
    work = studio.generate("diffmoe", 1, 1, *with_changes(steps=200))
    next(work)
    assert at_work() == 1
    work.close()
    assert at_work() == 0
    work = studio.classes("diffmoe", [0, 1], 1, *with_changes(steps=200))
    next(work)
    work.close()
    assert at_work() == 0


def test_prompts(trained_t2i):
    studio = Studio({"text": load(trained_t2i)})
    words = "a red  dog <b>${x}</b>"
    *_, (page, _, drawn) = studio.generate("text", words, 1, *SETTINGS)
    assert drawn.names == ["a red dog <b>${x}</b>"]
    assert "<b>${x}" not in page
    assert "&lt;b&gt;&#36;&#123;x" in page
    *_, (_, page) = studio.classes("text", "a red dog\none cat\n", 1, *SETTINGS)
    assert page.count("dm-row") == 2
    for prompt, wanted in ((" ", "it is empty"), ("x" * 301, "301 letters"), (3, "it is empty")):
        with pytest.raises(UserError, match=wanted):
            list(studio.generate("text", prompt, 1, *SETTINGS))
    with pytest.raises(UserError, match="half of a character"):
        list(studio.generate("text", "\ud800", 1, *SETTINGS))


def test_a_curve_reaches_its_ends():
    page = views.curve({"a": np.array([0.5, 2.0])}, 2)
    assert 'points="34.0,150.9 508.0,' in page
    assert views.bar(5, 10, "x").count("width:50.0%") == 1


def test_the_generator_says_what_it_draws(studio):
    pipe = studio.pipe("choice")
    ask = asked(pipe, 0, 1, SETTINGS)
    *_, drawn = draw(pipe, ask, "title")
    assert "Every token has 2 experts" in show.pictures(drawn, 1, 0)
