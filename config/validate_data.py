"""Data that a run cannot be trained on, found before any is read."""

from config.schema import Config
from config.validate_model import require


def check_data(config: Config) -> None:
    """Check the section `data`, and that the model gets what it is conditioned on."""
    data = config.data
    require(data.cached_path != [], "data.cached_path: names no folder")
    require(
        data.source != "npz" or data.npz_contents is not None,
        "data.npz_contents: source npz needs it, since the files do not say what they hold: "
        "posterior, scaled_posterior, latent or scaled_latent",
    )
    require(
        data.source != "images" or data.data_path is not None,
        "data.data_path: source images needs it, a folder DATA_PATH/<class>/<images>",
    )
    require(
        data.source != "images" or data.order == "random",
        "data.order: shards is for cached latents; source images has random only",
    )
    require(
        data.vae_path is not None or (data.source == "images" and data.val_cached_path is None),
        "data.vae_path: null is for pixels, which come from data.source images and, held out, from "
        "data.val_data_path",
    )
    shape = config.model.in_channels, config.model.input_size
    require(
        data.vae_path is not None or shape == (3, data.image_size),
        f"model.in_channels and model.input_size: {shape[0]} and {shape[1]} are not those of "
        f"pixels (data.vae_path null): 3 and data.image_size {data.image_size}",
    )
    plain = config.model.num_classes == 0 and config.model.text_hidden_size is None
    require(
        not plain or config.sampling.cfg_scale == 1,
        f"sampling.cfg_scale: {config.sampling.cfg_scale} needs classes or text; with "
        "model.num_classes 0 and model.text_hidden_size null only 1 is allowed",
    )
    if config.model.text_hidden_size is not None:
        _check_text(config)


def _check_text(config: Config) -> None:
    """Whether a model of text gets some."""
    data = config.data
    require(
        not data.horizontal_flip,
        'data.horizontal_flip: true is not allowed with text: "left of" would no longer be so; '
        "set it to false",
    )
    require(
        data.source != "npz",
        "data.source: npz does not say the names of its images, which texts are found by; allowed: "
        "latents, images",
    )
    if data.text_source == "cached":
        require(
            data.text_cached_path not in (None, []),
            "data.text_cached_path: model.text_hidden_size needs it, a folder made by "
            "main_cache.py --captions, or data.text_source online",
        )
    else:
        for key in ("captions", "text_encoder", "data_path"):
            require(getattr(data, key) is not None, f"data.{key}: data.text_source online needs it")
        require(
            data.source == "images" or isinstance(data.cached_path, str),
            "data.cached_path: data.text_source online reads the captions of one folder of images; "
            "allowed: one path",
        )
    require(
        not config.train.val_every or data.val_text_cached_path is not None,
        f"train.val_every: {config.train.val_every} needs data.val_text_cached_path, the texts of "
        "the held-out images",
    )
    choice = data.caption_choice
    require(
        isinstance(choice, str)
        or (bool(choice) and min(choice.values()) >= 0 and sum(choice.values()) > 0),
        f"data.caption_choice: {choice} are no weights; wanted: {{source: weight, ...}}, one of "
        "them above 0",
    )
