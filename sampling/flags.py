"""The flags of sample_ddp.py, and the protocol that they, a named one and a checkpoint make."""

import argparse
import dataclasses
from pathlib import Path
from typing import Any, get_args, get_type_hints

from config.objective import SAMPLERS, SamplingConfig
from config.protocol import Protocol, known_protocols, load_protocol
from config.validate import validate
from core.command_line import positive
from core.errors import ConfigError
from models.pretrained import INFERENCE_KEYS, Checkpoint
from sampling.blocks import SAVE
from sampling.needs import Choice, NotingParser, check_needs
from sampling.prompts import Prompts

RENAMED = {"num_sampling_steps": "num_steps"}
"""Published flags of sampling settings that have another name in a config."""


RULES = ("topk", "dynamic", "fixed", "threshold")
"""Of `model.feed_forward.inference`; which of them there are depends on the layer."""

ABOUT = "Flags override the --protocol, which overrides the checkpoint's config."


def sampling_parser(program: str = "sample_ddp.py", doc: str = ABOUT) -> NotingParser:
    """The flags of sampling; those left out come from the protocol or the checkpoint.

    Args:
        program: that takes them.
        doc: of the program.
    """
    parser = NotingParser(program, doc)
    add = parser.add_argument
    add("--ckpt", type=Path, required=True, help="checkpoint folder, or a run: its newest")
    add("--protocol", help=f"settings of a published evaluation: {', '.join(known_protocols())}")
    add("--weights", default="ema", help="averaged `ema` (default), `ema_<decay>`, live `model`")
    add("--image-size", type=int, help="checked against the checkpoint where given")
    add("--num-classes", type=int, help="checked against the checkpoint where given")
    add("--num-fid-samples", type=positive, help="images to make; default 50000")
    add(
        "--per-proc-batch-size",
        type=positive,
        help="images in a block, default 32; for DiffMoE, whose routing depends on it, a part of "
        "the result",
    )
    add("--labels", choices=["random", "balanced"], help="classes of the samples; default random")
    add("--pixels", choices=["adm", "dit", "jit"], help="rule of rounding to uint8; default dit")
    add("--global-seed", type=int, default=0, help="of noise and labels; default 0")
    add("--vae", help="mse, ema, a hub id or a local folder; default: the checkpoint's")
    add(
        "--sample-dir",
        type=Path,
        default=Path("samples"),
        help="folder of the sets, each in <run>/<set> there; default samples",
    )
    add("--overwrite", action="store_true", help="replace a finished set, or one of other settings")
    precision = parser.add_mutually_exclusive_group()
    precision.add_argument(
        "--precision",
        choices=["fp32", "tf32", "bf16"],
        help="of matrix products; default tf32 on GPUs, as published samplers have it",
    )
    for name, value in (("--tf32", "tf32"), ("--no-tf32", "fp32")):
        word = f"--precision {value}, as published samplers spell it"
        precision.add_argument(name, dest="precision", action="store_const", const=value, help=word)
    add("--compile", action="store_true", help="compile the model's blocks: pays in large sets")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: GPUs if any")
    add(
        "--save",
        choices=SAVE,
        default="npz",
        help="images: one PNG each; geneval: PNGs as its evaluator reads them; default npz",
    )
    add("--inference", choices=RULES, help="routing; default: config's")
    add("--inference-capacity", type=float, help="C of --inference topk")
    add("--fixed-threshold", type=float, help="gamma of --inference fixed, 0 ... 1")
    add("--capacity", action="store_true", help="record where the computation goes")
    add("--classes", type=_classes, help="only these, such as 207,360, for a look")
    add("--num-per-class", type=positive, default=8, help="with --classes; default 8")
    _add_prompts(parser.add_argument_group("prompts (checkpoints trained on captions)"))
    _add_sampling(parser.add_argument_group("sampling (default: the checkpoint's config)"))
    return parser


def _add_prompts(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--prompt", action="append", metavar="TEXT", help="what to draw; can be repeated")
    add("--prompts", type=Path, metavar="FILE", help=".txt, or .jsonl with prompt; one a line")
    add("--num-per-prompt", type=positive, default=4, help="samples of each; default 4")
    add("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    add("--text-encoder", metavar="PATH", help="folder or hub id; default: the checkpoint's")


def _add_sampling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--sampler", "--sampling-method", type=str.lower, help=_known_samplers())
    add("--num-sampling-steps", type=positive, help="adaptive solvers choose their own")
    add("--time-shift", type=float, help="flow: longer steps near the data above 1, default 1")
    add("--cfg-scale", type=float, help="guidance scale, 1 for none")
    add("--cfg-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guide at these times")
    add("--cfg-channels", choices=["all", "first3"], help="guided channels of the latent")
    add("--cfg-pooling", choices=["separate", "joint"], help="both halves in one batch, or not")
    add("--atol", type=float, help="absolute tolerance of adaptive solvers")
    add("--rtol", type=float, help="relative tolerance of adaptive solvers")
    add("--ddim-eta", type=float, help="noise of ddim, 0 for none")
    add(
        "--clip-denoised",
        action=argparse.BooleanOptionalAction,
        help="ddpm, ddim: implied data within [-1, 1]",
    )
    add(
        "--overshoot",
        action=argparse.BooleanOptionalAction,
        help="adaptive solvers step past the end, as published",
    )
    add("--diffusion-form", type=str.lower, choices=_choices("diffusion_form"), help="of the SDE")
    add("--diffusion-norm", type=float, help="factor of the SDE's diffusion")
    add("--last-step", type=str.lower, choices=_choices("last_step"), help="of the SDE")
    add("--last-step-size", type=float, help="of the SDE, in time")


def routing_of(flags: argparse.Namespace) -> dict[str, Any]:
    """Keys of `model.feed_forward` that flags change for sampling."""
    return {key: getattr(flags, key) for key in INFERENCE_KEYS if getattr(flags, key) is not None}


def resolve(
    flags: argparse.Namespace, checkpoint: Checkpoint, prompts: Prompts | None = None
) -> Protocol:
    """Everything that decides the images of a checkpoint, checked.

    Args:
        flags: of the command line.
        checkpoint: that samples.
        prompts: of the flags.

    Raises:
        ConfigError: when checkpoint, protocol and flags do not fit each other, or a flag would do
            nothing.
    """
    config = checkpoint.config
    _check_facts(flags, checkpoint)
    name = config.objective.name
    protocol = Protocol(objective_name=name, sampling=config.sampling)
    if flags.protocol is not None:
        protocol = load_protocol(flags.protocol)
        if protocol.objective_name != name:
            raise ConfigError(
                f"--protocol: {flags.protocol} is for objective {protocol.objective_name}, "
                f"{checkpoint.path} was trained with {name}"
            )
    given = _given(flags, SamplingConfig)
    changes = _given(flags, Protocol) | {
        "sampling": dataclasses.replace(protocol.sampling, **given)
    }
    if flags.classes is not None:
        changes["num_fid_samples"] = len(flags.classes) * flags.num_per_class
    if prompts is not None:
        changes["num_fid_samples"] = len(prompts.entries) * prompts.num_per_prompt
    protocol = dataclasses.replace(protocol, **changes)
    validate(dataclasses.replace(config, sampling=protocol.sampling), world_size=None)
    check_needs(Choice(flags, config, protocol.sampling))
    if config.data.vae_path is None and protocol.vae is not None:
        source = "--vae" if flags.vae is not None else f"--protocol {flags.protocol}: vae"
        raise ConfigError(
            f"{source}: {protocol.vae}, but {checkpoint.path} makes pixels; it has none"
        )
    return dataclasses.replace(protocol, vae=protocol.vae or config.data.vae_path)


def _check_facts(flags: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """What the flags say of the checkpoint must be so."""
    size, classes = checkpoint.config.data.image_size, checkpoint.config.model.num_classes
    has = f"{checkpoint.path} has {classes}" if classes else f"{checkpoint.path} has no classes"
    if flags.image_size not in (None, size):
        raise ConfigError(
            f"--image-size: {flags.image_size} is not allowed; {checkpoint.path} has {size}"
        )
    if flags.num_classes not in (None, classes):
        raise ConfigError(f"--num-classes: {flags.num_classes} is not allowed; {has}")
    for label in flags.classes or []:
        if not 0 <= label < max(classes, 1):
            allowed = f"0 ... {classes - 1}" if classes else "0 alone"
            raise ConfigError(f"--classes: {label} is not allowed; {has}; allowed: {allowed}")


def _given(flags: argparse.Namespace, kind: type) -> dict[str, Any]:
    """Fields of the dataclass `kind` that have a flag, and the flag a value."""
    values = {RENAMED.get(name, name): value for name, value in vars(flags).items()}
    names = {field.name for field in dataclasses.fields(kind)}
    given = {name: values[name] for name in names & values.keys() if values[name] is not None}
    return {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}


def _choices(field: str) -> tuple[str, ...]:
    return get_args(get_type_hints(SamplingConfig)[field])


def _classes(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 207,360") from None


def _known_samplers() -> str:
    return "; ".join(f"{name}: {', '.join(known)}" for name, known in SAMPLERS.items())
