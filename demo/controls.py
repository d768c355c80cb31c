"""Inputs of the page that all of its tabs share. Needs Gradio."""

import gradio as gr

from demo import views
from demo.asked import (
    EACH,
    LONGEST_PROMPT,
    MOST_GUIDANCE,
    MOST_IMAGES,
    MOST_STEPS,
    OWN,
    defaults,
    rules,
    samplers,
)
from demo.told import told
from demo.work import Studio, class_choices
from sampling.pipeline import Pipeline

QUICK = {
    "show_progress": "hidden",
    "concurrency_limit": None,
    "trigger_mode": "always_last",
    "preprocess": False,
}
"""How a look at what is there already is run: at once, and the last one counts."""
IMAGES = 8
Inputs = list[gr.components.Component]


def controls(studio: Studio) -> Inputs:
    """Checkpoint, class or prompt, number of images, and `demo.asked.Settings`, in this order."""
    names = list(studio.pipes)
    first = studio.pipes[names[0]]
    own = defaults(first)
    name = gr.Dropdown(
        names, value=names[0], label="Checkpoint", visible=len(names) > 1, elem_id="ckpt"
    )
    what = _what(first)
    count = gr.Slider(1, MOST_IMAGES, IMAGES, step=1, label="Images", elem_id="count")
    with gr.Row():
        seed = gr.Number(0, precision=0, label="Seed", minimum=0, elem_id="seed", min_width=100)
        sampler = gr.Dropdown(
            **_samplers(first), label="Sampler", elem_id="sampler", min_width=100
        )  # its choices follow the checkpoint
    most = min(own.num_steps, MOST_STEPS)
    steps = gr.Slider(1, MOST_STEPS, most, step=1, label="Steps", elem_id="steps")
    scale = min(own.cfg_scale, MOST_GUIDANCE)
    guidance = gr.Slider(0, 10, scale, step=0.1, label="Guidance (1: none)", elem_id="guidance")
    chosen = rule(studio, name, "")
    if len(names) > 1:
        name.change(
            told(lambda one: gr.update(**_samplers(studio.pipe(one)))),
            name, sampler, api_visibility="private", **QUICK,
        )  # fmt: skip
    return [name, what, count, seed, sampler, steps, guidance, *chosen]


def rule(studio: Studio, name: gr.Dropdown, which: str) -> Inputs:
    """Rule of routing, capacity and threshold, as far as the layers of a checkpoint have them.

    Args:
        studio: the checkpoints.
        name: says which one.
        which: words behind the label.
    """
    first = studio.pipe(name.value)
    ending, second = which.replace(" ", "-"), bool(which)
    chosen = gr.Radio(
        **_rules(first, second), label=f"Routing rule{which}", elem_id=f"rule{ending}"
    )
    experts = max(_experts(pipe) for pipe in studio.pipes.values())
    start = chosen.value
    capacity = gr.Slider(
        0.25, min(experts, 8), 2.0 if second else 1.0, step=0.25, label="Experts per token",
        visible=_takes_capacity(first, start), elem_id=f"capacity{ending}",
    )  # fmt: skip
    threshold = gr.Slider(
        0, 1, 0.5, step=0.01, label="Threshold of every expert", visible=start == "fixed",
        elem_id=f"threshold{ending}",
    )  # fmt: skip
    none = gr.HTML(visible=not rules(first), value=_no_choice(first))

    @told
    def shown(one: object, selected: object) -> tuple[dict, dict]:
        takes = _takes_capacity(studio.pipe(one), selected)
        return gr.update(visible=takes), gr.update(visible=selected == "fixed")

    @told
    def renewed(one: object) -> tuple[dict, dict]:
        pipe = studio.pipe(one)
        without = gr.update(visible=not rules(pipe), value=_no_choice(pipe))
        return gr.update(**_rules(pipe, second)), without

    chosen.change(shown, [name, chosen], [capacity, threshold], api_visibility="private", **QUICK)
    if len(studio.pipes) > 1:
        name.change(renewed, name, [chosen, none], api_visibility="private", **QUICK)
    return [chosen, capacity, threshold]


def _what(pipe: Pipeline) -> gr.components.Component:
    if pipe.encoder is None:
        known = [*([(EACH, EACH)] if pipe.num_classes > 1 else []), *class_choices(pipe)]
        return gr.Dropdown(known, value=known[0][1], label="Class", elem_id="what")
    return gr.Textbox(
        label="Prompt", lines=2, max_length=LONGEST_PROMPT, elem_id="what",
        placeholder="what to draw",
    )  # fmt: skip


def _samplers(pipe: Pipeline) -> dict:
    known, own = list(samplers(pipe)), defaults(pipe).sampler
    return {"choices": known, "value": own if own in known else known[0]}


def _rules(pipe: Pipeline, second: bool) -> dict:
    known = rules(pipe)
    value = known[1] if second and len(known) > 1 else OWN
    return {"choices": known or [OWN], "value": value, "visible": bool(known)}


def _no_choice(pipe: Pipeline) -> str:
    name = pipe.pretrained.config.model.feed_forward.name
    return views.words(f"The {name} layer has one way of routing: there is no rule to choose.")


def _takes_capacity(pipe: Pipeline, chosen: object) -> bool:
    return chosen == "topk" and "inference_capacity" in pipe.routing_keys


def _experts(pipe: Pipeline) -> int:
    return getattr(pipe.pretrained.config.model.feed_forward, "num_experts", 1)
