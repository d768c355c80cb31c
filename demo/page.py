"""The page: controls, tabs, and which button does what. Needs Gradio."""

import functools
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import gradio as gr

from core.errors import one_line
from core.logging import get_logger
from demo import show, views
from demo.asked import (
    LONGEST_PROMPT,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_STEPS,
    OWN,
    defaults,
    rules,
    samplers,
)
from demo.drawn import Drawn
from demo.recorded import classes as recorded_classes
from demo.work import COMPANY, RULES, Studio, class_choices
from evaluations.capacity import CapacityRun, numbers

STYLE = Path(__file__).with_name("style.css")
MOST_WAITING = 8
"""Generations that wait for the model; more are refused."""
KEPT_SECONDS = 3600
"""How long what a visitor generated is kept after the last look at it."""
MODEL = {"concurrency_id": "model", "concurrency_limit": 1}
"""One generation at a time: the others wait."""
QUICK = {"show_progress": "hidden", "concurrency_limit": None, "trigger_mode": "always_last"}

HEAD = """<div class="dm-head"><h1>DiffMoE: watch where a picture costs computation</h1><p>Every
token of every step goes to as many experts as it needs. <b>Left of each pair the image as the model
sees it behind the noise, right of it the experts at work for each token</b>; a dense model would be
the same colour everywhere.</p></div>"""

Recorded = tuple[Drawn, CapacityRun]

log = get_logger("demo")


def theme() -> gr.themes.Base:
    """Fonts of the visitor's system: nothing is fetched from anywhere."""
    return gr.themes.Base(
        primary_hue="orange",
        neutral_hue="slate",
        font=["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
        radius_size="lg",
    )


def told(function: Callable) -> Callable:
    """A function whose refusals become one line in the page; others are logged, not shown."""

    @functools.wraps(function)
    def call(*args: object) -> object:
        try:
            return function(*args)
        except Exception as error:
            raise _refusal(error) from None

    return call


def told_on_the_way(function: Callable) -> Callable:
    """The same of a generator."""

    @functools.wraps(function)
    def go(*args: object) -> Iterator[object]:
        try:
            with closing(function(*args)) as parts:
                yield from parts
        except Exception as error:
            raise _refusal(error) from None

    return go


def _refusal(error: Exception) -> gr.Error:
    if isinstance(error, gr.Error):
        return error
    line = one_line(error)
    if line is None:
        log.error("a request failed: %s: %s", type(error).__name__, error)
        line = "something went wrong on the server, which has written what into its log"
    return gr.Error(line, duration=8, print_exception=False, title="Not possible")


def build(studio: Studio | None, records: dict[str, Recorded]) -> gr.Blocks:
    """The page of checkpoints, of recorded sets, or of both.

    Args:
        studio: None for a machine that runs no model.
        records: sets by the names of their tabs.
    """
    with gr.Blocks(analytics_enabled=False, title="DiffMoE", fill_width=False) as page:
        gr.HTML(HEAD)
        if studio is not None:
            _generating(studio, page)
        for number, (name, recorded) in enumerate(records.items()):
            _recorded(name, recorded, number)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=4)
    return page


def _generating(studio: Studio, page: gr.Blocks) -> None:
    first = next(iter(studio.pipes.values()))
    drawn = gr.State(None, time_to_live=KEPT_SECONDS)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=290):
            controls = _controls(studio, first)
        with gr.Column(scale=3, min_width=320), gr.Tabs():
            with gr.Tab("Watch", id="watch"):
                lens = _watch(studio, controls, drawn)
            with gr.Tab("Expert lens", id="lens"):
                _lens(drawn, lens)
            with gr.Tab("Hard and easy", id="classes"):
                _classes(studio, first, controls)
            with gr.Tab("Same noise", id="compare"):
                _compare(studio, first, controls)


def _controls(studio: Studio, first) -> list[gr.components.Component]:
    """Checkpoint, class or prompt, number, and `demo.work.Settings`, in this order."""
    own, names = defaults(first), list(studio.pipes)
    name = gr.Dropdown(
        names, value=names[0], label="Checkpoint", visible=len(names) > 1, elem_id="ckpt"
    )
    if first.encoder is None:
        what = gr.Dropdown(
            class_choices(first), value=min(3, first.num_classes - 1), label="Class", elem_id="what"
        )
    else:
        what = gr.Textbox(
            value="", label="Prompt", lines=2, max_length=LONGEST_PROMPT, elem_id="what",
            placeholder="what to draw",
        )  # fmt: skip
    count = gr.Slider(1, MOST_IMAGES, 8, step=1, label="Images", elem_id="count")
    known = list(samplers(first))
    with gr.Row():
        seed = gr.Number(0, precision=0, label="Seed", minimum=0, elem_id="seed", min_width=100)
        sampler = gr.Dropdown(
            known, value=own.sampler if own.sampler in known else known[0], label="Sampler",
            elem_id="sampler", min_width=100,
        )  # fmt: skip
    most = min(own.num_steps, MOST_STEPS)
    steps = gr.Slider(1, MOST_STEPS, most, step=1, label="Steps", elem_id="steps")
    scale = min(own.cfg_scale, MOST_GUIDANCE)
    guidance = gr.Slider(0, 10, scale, step=0.1, label="Guidance (1: none)", elem_id="guidance")
    rule = _rule(studio, first, "")
    return [name, what, count, seed, sampler, steps, guidance, *rule]


def _rule(studio: Studio, first, which: str) -> list[gr.components.Component]:
    """Rule of routing, capacity and threshold; hidden where the layers leave no choice."""
    known = rules(first)
    experts = getattr(first.pretrained.config.model.feed_forward, "num_experts", 1)
    start = known[1] if which and len(known) > 1 else OWN
    rule = gr.Radio(
        known or [OWN], value=start, label=f"Routing rule{which}", visible=bool(known),
        elem_id=f"rule{which.strip()}",
    )  # fmt: skip
    capacity = gr.Slider(
        0.25, min(experts, 4), 2.0 if which else 1.0, step=0.25, label="Experts per token",
        visible=start == "topk", elem_id=f"capacity{which.strip()}",
    )  # fmt: skip
    threshold = gr.Slider(
        0, 1, 0.5, step=0.01, label="Threshold of every expert", visible=start == "fixed",
        elem_id=f"threshold{which.strip()}",
    )  # fmt: skip

    def shown(chosen: object) -> tuple[dict, dict]:
        takes = "inference_capacity" in first.routing_keys
        return gr.update(visible=chosen == "topk" and takes), gr.update(visible=chosen == "fixed")

    rule.change(shown, rule, [capacity, threshold], api_visibility="private", **QUICK)
    if not known:
        name = first.pretrained.config.model.feed_forward.name
        gr.HTML(views.words(f"The {name} layer has one rule of routing: there is none to choose."))
    return [rule, capacity, threshold]


def _watch(studio: Studio, controls: list, drawn: gr.State) -> list[gr.components.Component]:
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", elem_id="stop")
    figures = gr.HTML(elem_id="figures")
    with gr.Row(visible=False) as looks:
        step = gr.Slider(1, 2, 1, step=1, label="Step (evaluation of the model)", elem_id="step")
        layer = gr.Slider(0, 1, 0, step=1, label="Layer (0: mean over layers)", elem_id="layer")
    pictures = gr.HTML(
        views.words("Choose a class and press Generate: images appear while they are denoised."),
        elem_id="pictures",
    )
    curve = gr.HTML(elem_id="curve")
    lens_layer = gr.Slider(1, 2, 1, step=1, label="MoE layer", elem_id="lens-layer", render=False)
    lens_expert = gr.Slider(1, 2, 1, step=1, label="Expert", elem_id="lens-expert", render=False)

    @told_on_the_way
    def generate(*inputs: object) -> Iterator[tuple]:
        rest = [gr.skip()] * 6
        yield gr.skip(), gr.skip(), *rest[:-1], gr.update(visible=False)
        with closing(studio.generate(*inputs)) as parts:
            for shown, line, found in parts:
                if found is None:
                    yield shown, line, *rest
                    continue
                T, L = found.evaluations, found.layers
                E = found.routing.num_experts if found.routing is not None else 1
                yield (
                    shown, line, show.facts(found), found,
                    gr.update(maximum=max(T, 2), value=T),
                    gr.update(maximum=max(L, 1), value=0, interactive=L > 0),
                    (max(L, 2), max(E, 2)),
                    gr.update(visible=True),
                )  # fmt: skip

    sizes = gr.State((2, 2))
    outputs = [pictures, curve, figures, drawn, step, layer, sizes, looks]
    run = go.click(
        generate, controls, outputs, api_name="generate", show_progress="minimal",
        show_progress_on=[figures], **MODEL,
    )  # fmt: skip
    stop.click(None, cancels=[run], api_visibility="private")

    @told
    def look(found: Drawn | None, at: object, which: object) -> tuple[str, str]:
        found = show.check_drawn(found)
        return show.pictures(found, at, which), show.curves(found, at)

    for slider in (step, layer):
        slider.change(look, [drawn, step, layer], [pictures, curve], api_name=False, **QUICK)

    def stretch(found: tuple[int, int]) -> tuple[dict, dict]:
        return gr.update(maximum=found[0]), gr.update(maximum=found[1])

    sizes.change(stretch, sizes, [lens_layer, lens_expert], api_visibility="private", **QUICK)
    return [lens_layer, lens_expert]


def _lens(drawn: gr.State, sliders: list[gr.components.Component]) -> None:
    gr.HTML(views.words("The tokens that one expert takes, over images and steps."))
    with gr.Row():
        for slider in sliders:
            slider.render()
    out = gr.HTML(elem_id="lens")

    @told
    def look(found: Drawn | None, layer: object, expert: object) -> str:
        return show.expert_lens(show.check_drawn(found), layer, expert)

    @told
    def renew(found: Drawn | None, layer: object, expert: object) -> str:
        if found is None or found.routing is None:
            return views.words("A dense model has no experts to look at.")
        layer, expert = min(layer, found.layers), min(expert, found.routing.num_experts)
        return show.expert_lens(found, layer, expert)

    for slider in sliders:
        slider.change(look, [drawn, *sliders], out, api_name=False, **QUICK)
    drawn.change(renew, [drawn, *sliders], out, api_visibility="private", **QUICK)


def _classes(studio: Studio, first, controls: list) -> None:
    if first.encoder is None:
        choices = class_choices(first)
        start = [label for _, label in choices[:10]]
        chosen = gr.Dropdown(
            choices, value=start, multiselect=True, label="Classes", elem_id="classes",
            max_choices=12,
        )  # fmt: skip
    else:
        chosen = gr.Textbox(
            label="Prompts, one a line", lines=4, elem_id="classes", max_length=3600
        )
    with gr.Row():
        count = gr.Slider(1, 4, 2, step=1, label="Samples of each", elem_id="each")
        go = gr.Button("Measure", variant="primary", elem_id="measure")
    bar, out = gr.HTML(), gr.HTML(elem_id="ranking")
    go.click(
        told_on_the_way(studio.classes), [controls[0], chosen, count, *controls[3:]], [bar, out],
        api_name="classes", show_progress="minimal", show_progress_on=[bar], **MODEL,
    )  # fmt: skip


def _compare(studio: Studio, first, controls: list) -> None:
    kinds = studio.kinds()
    start = RULES if rules(first) else COMPANY
    kind = gr.Radio(
        [one for one in kinds if one != RULES or rules(first)], value=start, label="What differs",
        elem_id="kind",
    )  # fmt: skip
    with gr.Group(visible=start == RULES) as other:
        second = _rule(studio, first, " of the second")
    go = gr.Button("Compare", variant="primary", elem_id="compare")
    bar, out = gr.HTML(), gr.HTML(elem_id="compared")
    kind.change(
        lambda chosen: gr.update(visible=chosen == RULES), kind, other, api_visibility="private",
        **QUICK,
    )  # fmt: skip
    go.click(
        told_on_the_way(studio.compare), [kind, *controls, *second], [bar, out],
        api_name="compare", show_progress="minimal", show_progress_on=[bar], **MODEL,
    )  # fmt: skip


def _recorded(name: str, recorded: Recorded, number: int) -> None:
    """A set that was recorded before: no model is needed."""
    drawn, run = recorded
    found = {key: f"{value:.3f}" for key, value in numbers(run).items() if "C_infer" in key}
    gr.HTML(views.words(f"Recorded: {name}", "dm-section"))
    gr.HTML(views.tiles(found))
    T = drawn.evaluations
    step = gr.Slider(
        1, max(T, 2), T, step=1, label="Step (evaluation of the model)", elem_id=f"step-{number}"
    )
    pictures = gr.HTML(show.pictures(drawn, T, 0), elem_id=f"pictures-{number}")
    curve = gr.HTML(show.curves(drawn, T))

    @told
    def look(at: object) -> tuple[str, str]:
        return show.pictures(drawn, at, 0), show.curves(drawn, at)

    step.change(look, step, [pictures, curve], api_name=f"recorded_{number}", **QUICK)
    classes = recorded_classes(run)
    if len(classes[0]) > 1:
        gr.HTML(views.words("Hard and easy classes", "dm-section"))
        gr.HTML(show.ranked(*classes), elem_id=f"ranking-{number}")
