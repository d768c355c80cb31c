"""torchrun --nproc_per_node=8 main_cache.py --data_path DIR --cached_path OUT

Encode a folder of images into the cache of latents that train.py reads. Runs under torchrun or
plain python, on GPUs or the CPU; the result does not depend on the number of processes. A run that
was interrupted goes on where it stopped when it is started again. On the CPU each process encodes
on one thread, so start as many as there are cores.

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
from data.manifest import DTYPES

FLAGS = {
    "data.cached_path": "--cached-path",
    "data.data_path": "--data-path",
    "data.image_size": "--img-size",
    "data.vae_path": "--vae-path",
    "dtype": "--dtype",
}
"""Keys of a config that have a flag here."""


def parse() -> argparse.Namespace:
    """The command line."""
    example = "ImageNet at 256 x 256 on 8 GPUs: " + __doc__.split("\n\n")[2].strip()
    parser = Parser("main_cache.py", __doc__, epilog=example)
    add = parser.add_argument
    add("--data-path", default=argparse.SUPPRESS, help="image folder: DATA_PATH/<class>/<images>")
    add("--cached-path", required=True, default=argparse.SUPPRESS, help="folder to write")
    add("--img-size", type=positive, default=256, help="side of the cropped images, in pixels")
    add(
        "--vae-path",
        default="stabilityai/sd-vae-ft-mse",
        help="VAE: a hub id, a local folder made by save_pretrained, mse or ema",
    )
    add("--batch-size", type=positive, default=128, help="images per forward pass")
    workers = min(4, os.cpu_count() or 1)
    add("--num-workers", type=natural, default=workers, help="reading processes of each process")
    add("--timeout", type=positive, default=600, help="seconds to wait for one of them")
    add("--shard-size", type=positive, default=4096, help="images per file")
    add("--dtype", choices=DTYPES, default="float16", help="of stored moments")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: GPUs if any")
    add("--on-error", choices=("stop", "skip"), default="stop", help="at an unreadable image")
    add(
        "--vae-dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the encoder; the difference that bfloat16 makes is printed",
    )
    add("--overwrite", action="store_true", help="start anew, whatever is there")
    add("--verify", action="store_true", help="re-read a cache's checksums only")
    return parser.parse_args()


@command
def main() -> None:
    """Parse the command line and write the cache."""
    arguments = vars(parse())
    device = arguments.pop("device")
    if arguments.pop("verify"):
        with as_flags(FLAGS):
            verify_cache(arguments["cached_path"])
        return
    if "data_path" not in arguments:
        raise ConfigError("--data-path: needed to write a cache, an image folder")
    options = CacheOptions(image_size=arguments.pop("img_size"), **arguments)
    with as_flags(FLAGS), processes(device, cpu_threads=1, timeout=NO_HURRY) as group:
        quiet_other_processes(group)
        cache_latents(options, group)


if __name__ == "__main__":
    main()
