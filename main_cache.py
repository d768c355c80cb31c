"""torchrun --nproc_per_node=8 main_cache.py --data_path DIR --cached_path OUT

Encode a folder of images into the cache of latents that train.py reads, and their captions into a
text cache beside it. Runs under torchrun or plain python, on GPUs or the CPU; the result does not
depend on the number of processes. A run that was interrupted goes on where it stopped when it is
started again. On the CPU each process encodes on one thread, so start as many as there are cores.

torchrun --nproc_per_node=8 main_cache.py --data_path IMAGENET/train --cached_path cache/imagenet256
(42 GB in float16).
"""

import argparse
import os

from core.command_line import Parser, as_flags, natural, positive
from core.distributed import NO_HURRY, processes
from core.errors import ConfigError, command
from core.logging import quiet_other_processes
from data.caching import CacheOptions, cache_latents, verify_cache
from data.manifest import DTYPES, VIEWS
from data.text.caching import TextOptions, cache_text, verify_text
from data.text.captions import CaptionOptions
from data.text.facts import DTYPES as TEXT_DTYPES
from data.text.together import cache_latents_and_text

FLAGS = {
    "data.cached_path": "--cached-path",
    "data.data_path": "--data-path",
    "data.image_size": "--img-size",
    "data.vae_path": "--vae-path",
    "dtype": "--dtype",
    "data.captions": "--captions",
    "data.captions_template": "--caption-template",
    "data.text_cached_path": "--text-cached-path",
    "data.text_encoder": "--text-encoder",
    "data.text_max_length": "--text-max-length",
    "data.text_layer": "--text-layer",
    "data.text_dtype": "--text-dtype",
}
"""Keys of a config that have a flag here."""


def build_parser() -> Parser:
    """The flags, those of latents and of captions."""
    example = "ImageNet at 256 x 256 on 8 GPUs: " + __doc__.split("\n\n")[2].strip()
    parser = Parser("main_cache.py", __doc__, epilog=example)
    add = parser.add_argument
    add(
        "--data-path",
        default=argparse.SUPPRESS,
        help="image folder: DATA_PATH/<class>/<images>; or tar files",
    )
    add("--cached-path", required=True, default=argparse.SUPPRESS, help="folder to write")
    add("--batch-size", type=positive, default=128, help="images per forward pass")
    add("--shard-size", type=positive, default=4096, help="images, or captions, per file")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if any")
    add("--overwrite", action="store_true", help="start anew, whatever is there")
    add("--verify", action="store_true", help="re-read checksums only, of each cache that is named")
    return parser


def add_latents(parser: Parser) -> list[str]:
    """Add what only latents need; its flags."""
    add = parser.add_argument_group("latents").add_argument
    workers = min(4, os.cpu_count() or 1)
    added = [
        add("--img-size", type=positive, default=256, help="side of cropped images, in pixels"),
        add(
            "--vae-path",
            default="stabilityai/sd-vae-ft-mse",
            help="VAE: a hub id, a local folder made by save_pretrained, mse or ema",
        ),
        add("--num-workers", type=natural, default=workers, help="readers of each process"),
        add("--timeout", type=positive, default=600, help="seconds to wait for one of them"),
        add("--dtype", choices=DTYPES, default="float16", help="of stored moments"),
        add("--views", type=int, choices=(1, 2), help="2: mirrored too; with captions 1"),
        add("--on-error", choices=("stop", "skip"), default="stop", help="at an unreadable image"),
        add(
            "--vae-dtype",
            choices=("float32", "bfloat16"),
            default="float32",
            help="of the encoder; the difference that bfloat16 makes is printed",
        ),
    ]
    return [action.option_strings[0] for action in added]


def add_captions(parser: Parser) -> list[str]:
    """Add what only captions need; its flags."""
    add = parser.add_argument_group("captions").add_argument
    added = [
        add(
            "--captions",
            help="where they are: txt or json (files beside the images), metadata (metadata.jsonl "
            "or .csv in their folders), template (of the classes' names), or a .jsonl or .csv file",
        ),
        add("--text-cached-path", help="folder to write encoded captions to"),
        add("--text-encoder", help="a hub id, or a local folder made by save_pretrained"),
        add("--text-only", action="store_true", help="the latents are cached already"),
        add("--text-max-length", type=positive, default=120, help="tokens; the rest is cut off"),
        add("--text-layer", type=int, help="whose output is taken, such as -2"),
        add("--text-prefix", help="text before every caption, such as an instruction"),
        add("--text-dtype", choices=TEXT_DTYPES, default="bfloat16", help="of encoder and rows"),
        add("--text-batch-size", type=positive, default=64, help="captions per forward pass"),
        add("--path-key", default="file_name", help="key of the image in a .jsonl or .csv"),
        add("--caption-key", help="keys of captions, with commas; text or caption if there"),
        add("--caption-template", default="a photo of a {}", help="for --captions template"),
    ]
    return [action.option_strings[0] for action in added]


def _refuse(given: list[str], idle: list[str], why: str) -> None:
    for flag in given:
        if flag in idle:
            raise ConfigError(f"{flag}: {why}")


def parse() -> dict:
    """The command line."""
    parser = build_parser()
    of_latents, of_captions = add_latents(parser), add_captions(parser)
    flags = vars(parser.parse_args())
    given = [word.partition("=")[0] for word in parser.words]
    if flags["verify"]:
        return flags
    if flags["captions"] is None:
        _refuse(given, of_captions, "has no effect here; it needs --captions")
        if "data_path" not in flags:
            raise ConfigError("--data-path: needed to write a cache, an image folder")
        return flags
    for name in ("text_encoder", "text_cached_path"):
        if flags[name] is None:
            raise ConfigError(f"--{name.replace('_', '-')}: needed to cache captions")
    if os.path.realpath(flags["text_cached_path"]) == os.path.realpath(flags["cached_path"]):
        raise ConfigError("--text-cached-path: is --cached-path; a folder of its own is needed")
    if flags["text_only"]:
        _refuse(given, of_latents, "has no effect with --text-only")
    elif "data_path" not in flags:
        raise ConfigError("--data-path: needed to write a cache, an image folder; or --text-only")
    return flags


def latent_options(flags: dict) -> CacheOptions:
    """What the flags say about latents."""
    names = (
        *("data_path", "cached_path", "vae_path", "batch_size", "num_workers", "dtype"),
        *("shard_size", "overwrite", "on_error", "vae_dtype", "timeout"),
    )
    return CacheOptions(
        image_size=flags["img_size"],
        # A mirrored image contradicts a caption that says left or right.
        views=flags["views"] or (VIEWS if flags["captions"] is None else 1),
        **{name: flags[name] for name in names},
    )


def text_options(flags: dict) -> TextOptions:
    """What the flags say about captions."""
    keys = [key.strip() for key in (flags["caption_key"] or "").split(",")]
    captions = CaptionOptions(
        captions=flags["captions"],
        data_path=flags.get("data_path"),
        path_key=flags["path_key"],
        caption_keys=tuple(filter(None, keys)),
        template=flags["caption_template"],
    )
    names = ("cached_path", "text_cached_path", "text_encoder", "shard_size", "overwrite")
    return TextOptions(
        captions=captions,
        max_length=flags["text_max_length"],
        layer=flags["text_layer"],
        prefix=flags["text_prefix"] or "",
        dtype=flags["text_dtype"],
        batch_size=flags["text_batch_size"],
        **{name: flags[name] for name in names},
    )


def verify(cached_path: str, text_cached_path: str | None) -> None:
    """Read the caches that are named again."""
    if text_cached_path is not None:
        verify_text(text_cached_path, cached_path)
    verify_cache(cached_path)


@command
def main() -> None:
    """Parse the command line and write the caches."""
    flags = parse()
    if flags["verify"]:
        with as_flags(FLAGS):
            verify(flags["cached_path"], flags["text_cached_path"])
        return
    device = flags["device"]
    with as_flags(FLAGS), processes(device, cpu_threads=1, timeout=NO_HURRY) as group:
        quiet_other_processes(group)
        if flags["captions"] is None:
            cache_latents(latent_options(flags), group)
        elif flags["text_only"]:
            cache_text(text_options(flags), group)
        else:
            cache_latents_and_text(latent_options(flags), text_options(flags), group)


if __name__ == "__main__":
    main()
