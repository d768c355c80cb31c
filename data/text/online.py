"""Captions that are encoded while a model trains on them."""

from collections.abc import Collection, Sequence

from torch import Tensor

from config.schema import Config
from core.distributed import Processes
from data.conditions import Choice
from data.latents import LatentCache
from data.online import Images
from data.text.captions import CaptionOptions, Captions, first_without, read_captions
from data.text.encoder import TextEncoder


class OnlineCaptions:
    """Captions, and the encoder that makes their rows; see `data.conditions.Captions`.

    Copies that travel to other processes are without the encoder.

    Args:
        path: of the images, for messages.
        captions: of these.
        encoder: on the device of the process that trains.
    """

    def __init__(self, path: str, captions: Captions, encoder: TextEncoder):
        self.path, self.captions, self.encoder = path, captions, encoder
        self.facts, self.sources = encoder.facts(), captions.sources
        self.null = encoder.encode([""])[0]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"encoder": None}

    def choices(self, image: int) -> list[Choice]:
        """The captions of an image."""
        first, last = self.captions.offsets[image : image + 2]
        numbers = self.captions.numbers[first:last].tolist()
        return list(zip(numbers, self.captions.source_numbers[first:last].tolist(), strict=True))

    def rows(self, captions: Sequence[int]) -> list[Tensor]:
        """(L_i, E) of each caption."""
        return self.encoder.encode([self.captions.texts[number] for number in captions])

    def first_without(self, sources: Collection[str]) -> int | None:
        """The first image that has no caption of these sources; None if all have."""
        numbers = [self.sources.index(name) for name in sources]
        return first_without(self.captions.offsets, self.captions.source_numbers, numbers)


def online_captions(
    config: Config, source: LatentCache | Images, processes: Processes
) -> OnlineCaptions:
    """The captions of `source`, as `config.data` names them and their encoder.

    Raises:
        UserError: they cannot be read, or the encoder cannot.
    """
    data = config.data
    options = CaptionOptions(
        data.captions,
        data.data_path,
        data.path_key,
        tuple(data.caption_key.split(",")) if data.caption_key else (),
        data.caption_template,
    )
    with processes.main_first():
        encoder = TextEncoder(
            data.text_encoder,
            config.model.text_max_length,
            data.text_layer,
            data.text_prefix,
            data.text_dtype,
            processes.device,
        )
    return OnlineCaptions(source.path, read_captions(options, source.names()), encoder)
