"""The page: controls, tabs, and which button does what. Needs Gradio."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import gradio as gr

from demo import show, views
from demo.asked import rules
from demo.controls import QUICK, Inputs, controls, rule
from demo.drawn import Drawn
from demo.recorded import classes as recorded_classes
from demo.told import told, told_on_the_way
from demo.work import COMPANY, RULES, Studio, class_choices
from evaluations.capacity import CapacityRun, numbers

STYLE = Path(__file__).with_name("style.css")
MOST_WAITING = 8
"""Generations that wait for the model; more are refused."""
KEPT_SECONDS = 3600
"""How long what a visitor generated is kept after the last look at it."""
MODEL = {"concurrency_id": "model", "concurrency_limit": 1, "preprocess": False}
"""One generation at a time. Inputs come as they were sent: `demo.work` checks them."""

HEAD = """<div class="dm-head"><h1>DiffMoE: watch where a picture costs computation</h1><p>Every
token of every step goes to as many experts as it needs. <b>Left of each pair the image as the model
sees it behind the noise, right of it the experts at work for each token</b>; a dense model would be
the same colour everywhere.</p></div>"""

Recorded = tuple[Drawn, CapacityRun]


def theme() -> gr.themes.Base:
    """Fonts of the visitor's system: nothing is fetched from anywhere."""
    return gr.themes.Base(
        primary_hue="orange",
        neutral_hue="slate",
        font=["system-ui", "Segoe UI", "Helvetica Neue", "Arial", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
        radius_size="lg",
    )


def build(studio: Studio | None, records: dict[str, Recorded]) -> gr.Blocks:
    """The page of checkpoints, of recorded sets, or of both.

    Args:
        studio: None for a machine that runs no model.
        records: sets by the names of their tabs.
    """
    with gr.Blocks(analytics_enabled=False, title="DiffMoE", fill_width=False) as page:
        gr.HTML(HEAD)
        if studio is not None:
            _generating(studio)
        for number, (name, recorded) in enumerate(records.items()):
            _recorded(name, recorded, number)
    page.queue(max_size=MOST_WAITING, default_concurrency_limit=4)
    return page


def _generating(studio: Studio) -> None:
    drawn = gr.State(None, time_to_live=KEPT_SECONDS)
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=290):
            inputs = controls(studio)
        with gr.Column(scale=3, min_width=320), gr.Tabs():
            with gr.Tab("Watch", id="watch"):
                lens = _watch(studio, inputs, drawn)
            with gr.Tab("Expert lens", id="lens"):
                _lens(drawn, lens)
            with gr.Tab("Hard and easy", id="classes"):
                _classes(studio, inputs)
            with gr.Tab("Same noise", id="compare"):
                _compare(studio, inputs)


def _watch(studio: Studio, inputs: Inputs, drawn: gr.State) -> Inputs:
    with gr.Row():
        go = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", elem_id="stop")
    figures = gr.HTML(elem_id="figures")
    with gr.Row(visible=False) as looks:
        step = gr.Slider(1, 2, 1, step=1, label="Step (evaluation of the model)", elem_id="step")
        layer = gr.Slider(0, 1, 0, step=1, label="Layer (0: mean over layers)", elem_id="layer")
    pictures = gr.HTML(
        views.words("Press Generate: images appear as they are denoised, their cost beside them."),
        elem_id="pictures",
    )
    curve = gr.HTML(elem_id="curve")
    lens = [
        gr.Slider(1, 2, 1, step=1, label=label, elem_id=name, render=False)
        for label, name in (("MoE layer", "lens-layer"), ("Expert", "lens-expert"))
    ]

    @told_on_the_way
    def generate(*words: object) -> Iterator[tuple]:
        same = [gr.skip()] * 6
        with closing(studio.generate(*words)) as parts:
            for shown, line, found in parts:
                if found is None:  # sliders come back with the end
                    yield shown, line, *same, gr.update(visible=False)
                else:
                    yield shown, line, show.facts(found), found, *_ranges(found)

    outputs = [pictures, curve, figures, drawn, step, layer, *lens, looks]
    run = go.click(
        generate, inputs, outputs, api_name="generate", show_progress="minimal",
        show_progress_on=[figures], **MODEL,
    )  # fmt: skip
    stop.click(None, cancels=[run], api_visibility="private")

    @told
    def look(found: Drawn | None, at: object, which: object) -> tuple[str, str]:
        found = show.check_drawn(found)
        return show.pictures(found, at, which), show.curves(found, at)

    for slider in (step, layer):
        slider.change(look, [drawn, step, layer], [pictures, curve], api_name=False, **QUICK)

    return lens


def _ranges(found: Drawn) -> list[dict]:
    """Sliders of step, layer, and the lens's layer and expert, and that they are there."""
    T, L = found.evaluations, found.layers
    E = found.routing.num_experts if found.routing is not None else 1
    return [
        gr.update(maximum=max(T, 2), value=T, interactive=T > 1),
        gr.update(maximum=max(L, 1), value=0, interactive=L > 0),
        gr.update(maximum=max(L, 2), interactive=L > 1),
        gr.update(maximum=max(E, 2), interactive=E > 1),
        gr.update(visible=True),
    ]


def _lens(drawn: gr.State, sliders: Inputs) -> None:
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


def _classes(studio: Studio, inputs: Inputs) -> None:
    first = next(iter(studio.pipes.values()))
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
        told_on_the_way(studio.classes), [inputs[0], chosen, count, *inputs[3:]], [bar, out],
        api_name="classes", show_progress="minimal", show_progress_on=[bar], **MODEL,
    )  # fmt: skip


def _compare(studio: Studio, inputs: Inputs) -> None:
    chooses = any(rules(pipe) for pipe in studio.pipes.values())
    kinds = [kind for kind in studio.kinds() if kind != RULES or chooses]
    start = RULES if chooses else COMPANY
    kind = gr.Radio(kinds, value=start, label="What differs", elem_id="kind")
    with gr.Group(visible=start == RULES) as other:
        second = rule(studio, inputs[0], " of the second")
    go = gr.Button("Compare", variant="primary", elem_id="compare")
    bar, out = gr.HTML(), gr.HTML(elem_id="compared")
    kind.change(
        lambda chosen: gr.update(visible=chosen == RULES), kind, other, api_visibility="private",
        **QUICK,
    )  # fmt: skip
    go.click(
        told_on_the_way(studio.compare), [kind, *inputs, *second], [bar, out],
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
