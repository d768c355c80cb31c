"""Latents and captions of the same images, one after the other in one command."""

import dataclasses
from pathlib import Path

from core.distributed import Processes
from core.errors import ConfigError, UserError
from core.logging import get_logger
from data.caching import cache_latents, is_finished
from data.encoding import CacheOptions
from data.latents import LatentCache
from data.tars import open_images
from data.text.caching import TextOptions, cache_text, check_unfinished, open_encoder
from data.text.captions import read_captions
from data.vae import KNOWN_NAMES

log = get_logger("data.text.together")


def cache_latents_and_text(latents: CacheOptions, text: TextOptions, processes: Processes) -> None:
    """Write the latent cache, then the text cache of its images; every process calls this.

    What is wrong with captions or encoder is found before the first image is encoded. The same
    command goes on after an interruption in either part.

    Raises:
        UserError: as `cache_latents` and `cache_text`.
    """
    check_unfinished(Path(text.text_cached_path), text.overwrite)
    images = open_images(latents.data_path, processes)
    names = [images.name(index) for index in range(len(images))]
    if is_finished(latents):
        _check_same(latents, names)
        log.info("%s: the latents are finished, the captions are next", latents.cached_path)
    else:
        read_captions(text.captions, names)
        _try_encoder(text, processes)
        cache_latents(latents, processes, images)
    cache_text(text, processes)


def _try_encoder(text: TextOptions, processes: Processes) -> None:
    """See that the encoder can be loaded and used, on one process and beside no VAE's memory."""
    refusal = None
    if processes.is_main:
        try:
            open_encoder(text, "cpu").tokens([""])
        except UserError as error:
            refusal = str(error)
    refusal = processes.from_main(refusal)
    if refusal is not None:
        raise ConfigError(refusal)


def _check_same(options: CacheOptions, names: list[str]) -> None:
    """Refuse a finished cache of other images, or of other latents of them, than asked for."""
    cache = LatentCache(options.cached_path)
    path = KNOWN_NAMES.get(options.vae_path, options.vae_path)
    wanted = {"vae_path": path, "image_size": options.image_size, "dtype": options.dtype}
    found = dataclasses.asdict(cache.manifest)
    others = [name for name, value in wanted.items() if found[name] != value]
    if cache.views < options.views:
        others.append("views")
    if not set(cache.names()) <= set(names):
        others.append("data_path")
    if others:
        raise ConfigError(
            f"data.cached_path: {options.cached_path} is a finished cache with another "
            f"{', '.join(others)}; --text-only takes it as it is, --overwrite replaces it"
        )
