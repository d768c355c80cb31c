"""From a config to the data that it names, checked against the model that it names."""

from collections.abc import Sequence
from pathlib import Path

from config.model import ModelConfig
from config.schema import Config, DataConfig
from core.command_line import as_flags
from core.distributed import Processes
from core.errors import UserError
from data.conditions import Conditions
from data.dataset import EncodedDataset, ImageDataset, LatentDataset, TrainingData
from data.latents import JoinedCaches, LatentCache, Moments
from data.online import Images
from data.published import PublishedCache
from data.sampler import check_enough
from data.text.cache import TextCache
from data.text.facts import TextFacts
from data.text.joined import as_list, joined
from data.text.online import online_captions
from data.vae import KNOWN_NAMES, VAE, open_vae


def training_data(config: Config, processes: Processes) -> TrainingData:
    """The data set that `config.data` describes.

    Raises:
        UserError: when it cannot be read, or does not fit the config.
    """
    data = config.data
    if data.source == "images":
        images = _image_data(config, data.data_path, processes)
        check_enough(len(images), config.train.global_batch_size)
        return images
    if data.source == "npz":
        with processes.main_first():
            vae = VAE(data.vae_path)
        parts = [
            PublishedCache(path, data.npz_contents, vae, processes)
            for path in as_list(data.cached_path)
        ]
    else:
        scattered = data.order == "random"
        parts = [LatentCache(Path(path), scattered) for path in as_list(data.cached_path)]
    source = parts[0] if len(parts) == 1 else JoinedCaches(parts)
    check_fits(source, data, config.model)
    if data.horizontal_flip and source.views == 1:
        raise UserError(
            f"data.horizontal_flip: {source.path} has no mirrored images; set it to false, or make "
            "the cache again with --views 2"
        )
    check_enough(len(source), config.train.global_batch_size)
    check_vae(source, data, processes)
    conditions = _conditions(config, parts, _texts(data), processes)
    return LatentDataset(source, config.seed, data.horizontal_flip, conditions)


def _texts(data: DataConfig) -> str | list[str] | None:
    """Where the texts trained on are cached; None where they are encoded while training."""
    return data.text_cached_path if data.text_source == "cached" else None


def _image_data(
    config: Config, path: str, processes: Processes, held_out: bool = False
) -> ImageDataset:
    """Images below `path`: encoded, or as they are in pixel space; held-out ones unmirrored."""
    data = config.data
    with processes.main_first():
        vae = open_vae(data.vae_path, processes.device)
    source = Images(path, data.image_size, vae, processes)
    check_fits(source, data, config.model)
    kind = ImageDataset if data.vae_path is None else EncodedDataset
    flip, texts = data.horizontal_flip, _texts(data)
    if held_out:
        flip, texts = False, data.val_text_cached_path
    return kind(source, config.seed, flip, _conditions(config, [source], texts, processes))


def _conditions(
    config: Config,
    parts: Sequence[Moments | Images],
    paths: str | list[str] | None,
    processes: Processes,
) -> Conditions:
    """What the samples of `parts` are conditioned on: their labels, or texts.

    Texts are cached at `paths`, or encoded where there are none.

    Raises:
        UserError: texts of other images, of another width or length, or none.
    """
    model, labels = config.model, config.model.num_classes > 0
    if model.text_hidden_size is None:
        return Conditions(config.seed, labels)
    online = paths is None
    if online:
        (part,) = parts
        captions = online_captions(config, part, processes)
    else:
        captions = joined([TextCache(path) for path in as_list(paths)], parts)
    facts = captions.facts
    for name, wanted, found in (
        ("text_hidden_size", model.text_hidden_size, facts.hidden_size),
        ("text_max_length", model.text_max_length, facts.max_length),
    ):
        if wanted != found:
            raise UserError(
                f"model.{name}: {wanted} is configured, but {captions.path} has {found}; change "
                "the config or the text cache"
            )
    choice, length = config.data.caption_choice, model.text_max_length
    return Conditions(config.seed, labels, captions, choice, length, encoding=online)


def validation_data(
    config: Config, processes: Processes, texts: TextFacts | None = None
) -> TrainingData:
    """Held-out latents or images, never mirrored.

    Args:
        config: names them.
        processes: all of which call this function.
        texts: of the encoder that the model is of, if it takes text.

    Raises:
        UserError: when they cannot be read, or do not fit the config or the encoder.
    """
    if texts is not None and config.data.val_text_cached_path is None:
        raise UserError(
            "data.val_text_cached_path: a model of text needs the cached texts of held-out images"
        )
    data = _held_out(config, processes)
    if texts is not None:
        with as_flags({"data.text_cached_path": "data.val_text_cached_path"}):
            data.conditions.captions.check_encoder(texts, "the captions trained on")
    return data


def _held_out(config: Config, processes: Processes) -> TrainingData:
    if config.data.val_cached_path is None:
        names = {"data_path": "val_data_path", "text_cached_path": "val_text_cached_path"}
        with as_flags({f"data.{key}": f"data.{own}" for key, own in names.items()}):
            return _image_data(config, config.data.val_data_path, processes, held_out=True)
    with as_flags({"data.cached_path": "data.val_cached_path"}):
        cache = LatentCache(Path(config.data.val_cached_path))
    check_fits(cache, config.data, config.model)
    check_vae(cache, config.data, processes)
    with as_flags({"data.text_cached_path": "data.val_text_cached_path"}):
        texts = config.data.val_text_cached_path
        conditions = _conditions(config, [cache], texts, processes)
    return LatentDataset(cache, config.seed, horizontal_flip=False, conditions=conditions)


def check_fits(source: Moments | Images, data: DataConfig, model: ModelConfig) -> None:
    """Refuse data that is not what this run is configured for.

    Raises:
        UserError: image size, latent shape or number of classes differ.
    """
    wanted = (model.in_channels, model.input_size, model.input_size)
    pairs = [("model.in_channels and input_size", wanted, source.latent_shape)]
    if source.image_size is not None:
        pairs.append(("data.image_size", data.image_size, source.image_size))
    if model.num_classes > 0:
        pairs.append(("model.num_classes", model.num_classes, len(source.class_names)))
    for name, configured, found in pairs:
        if configured != found:
            raise UserError(
                f"{name}: {configured} is configured, but {source.path} has {found}; "
                "change the config or the data"
            )


def check_vae(source: Moments, data: DataConfig, processes: Processes) -> None:
    """Refuse latents of another VAE than the one that will decode the samples.

    A hub id is taken at its word. Folders are compared by the hash of their weights, and so are
    different names, since a hub's VAE may have been copied to a folder.

    Raises:
        UserError: naming both sides.
    """
    configured = KNOWN_NAMES.get(data.vae_path, data.vae_path)
    same_name = configured == source.vae_path
    if source.vae_hash is None or (same_name and not Path(configured).is_dir()):
        return
    refusal = None
    if processes.is_main:
        made = f"the latents in {source.path} were made by {source.vae_path}"
        try:
            if VAE(configured).weights_hash() != source.vae_hash:
                refusal = (
                    f"data.vae_path: {data.vae_path} is configured, {made} with other weights; "
                    "change the config or make the cache again"
                )
        except UserError as error:
            refusal = f"{error}; {made}"
    refusal = processes.from_main(refusal)
    if refusal is not None:
        raise UserError(refusal)
