"""From a config to the data that it names, checked against the model that it names."""

from pathlib import Path

from config.schema import Config, DataConfig, ModelConfig
from core.command_line import as_flags
from core.distributed import Processes
from core.errors import UserError
from data.dataset import EncodedDataset, ImageDataset, LatentDataset, TrainingData
from data.latents import JoinedCaches, LatentCache, Moments
from data.online import Images
from data.published import PublishedCache
from data.sampler import check_enough
from data.vae import KNOWN_NAMES, VAE, open_vae


def training_data(config: Config, processes: Processes) -> TrainingData:
    """The data set that `config.data` describes.

    Raises:
        UserError: when it cannot be read, or does not fit the config.
    """
    data = config.data
    options = (config.seed, data.horizontal_flip, config.model.num_classes > 0)
    if data.source == "images":
        images = _image_data(config, data.data_path, processes, data.horizontal_flip)
        check_enough(len(images), config.train.global_batch_size)
        return images
    if data.source == "npz":
        with processes.main_first():
            vae = VAE(data.vae_path)
        parts = [PublishedCache(path, data.npz_contents, vae, processes) for path in _paths(data)]
    else:
        parts = [LatentCache(Path(path)) for path in _paths(data)]
    source = parts[0] if len(parts) == 1 else JoinedCaches(parts)
    check_fits(source, data, config.model)
    check_enough(len(source), config.train.global_batch_size)
    check_vae(source, data, processes)
    return LatentDataset(source, *options)


def _image_data(config: Config, path: str, processes: Processes, flip: bool) -> ImageDataset:
    """Images below `path`: encoded, or as they are in pixel space."""
    data = config.data
    with processes.main_first():
        vae = open_vae(data.vae_path, processes.device)
    source = Images(path, data.image_size, vae, processes)
    check_fits(source, data, config.model)
    kind = ImageDataset if data.vae_path is None else EncodedDataset
    return kind(source, config.seed, flip, config.model.num_classes > 0)


def validation_data(config: Config, processes: Processes) -> TrainingData:
    """Held-out latents or images, never mirrored.

    Raises:
        UserError: when they cannot be read, or do not fit the config.
    """
    if config.data.val_cached_path is None:
        with as_flags({"data.data_path": "data.val_data_path"}):
            return _image_data(config, config.data.val_data_path, processes, flip=False)
    with as_flags({"data.cached_path": "data.val_cached_path"}):
        cache = LatentCache(Path(config.data.val_cached_path))
    check_fits(cache, config.data, config.model)
    check_vae(cache, config.data, processes)
    conditional = config.model.num_classes > 0
    return LatentDataset(cache, config.seed, horizontal_flip=False, conditional=conditional)


def _paths(data: DataConfig) -> list[str]:
    return [data.cached_path] if isinstance(data.cached_path, str) else data.cached_path


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
