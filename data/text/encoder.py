"""A frozen text encoder behind a small interface.

Shapes: L tokens of a caption, B captions, T tokens of the longest of them, E width of a row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import UserError
from core.precision import exact_float32
from data.text import loading
from data.text.facts import DTYPES, TextFacts


class TextEncoder:
    """Captions to rows of tokens, one row (E,) for each token.

    Args:
        path: hub id, or a local folder by `save_pretrained` that holds model and tokenizer: T5 and
            its kin (of which only the encoder is loaded), CLIP's text side, BERT and its kin, or
            any other model whose last hidden state has a row for each token.
        max_length: most tokens of a caption; those beyond it are cut off, see `cut`.
        layer: the output of which layer the rows are, as an index of the model's `hidden_states`
            (0: the embeddings, -1: the last layer's output, which some models still normalise);
            None: the last hidden state as the model gives it.
        prefix: text put before every caption, such as an instruction. Its tokens have rows like
            all others, and count.
        dtype: of weights, computation and rows, one of DTYPES.
        device: where it computes.

    Attributes:
        hidden_size: E.

    Raises:
        UserError: the encoder cannot be loaded, or cannot do what is asked for.
    """

    def __init__(
        self,
        path: str,
        max_length: int,
        layer: int | None = None,
        prefix: str = "",
        dtype: str = "bfloat16",
        device: str | torch.device = "cpu",
    ):
        if dtype not in DTYPES:
            why = "; activations of T5 exceed the range of float16" if dtype == "float16" else ""
            raise UserError(
                f"data.text_dtype: {dtype!r} is not allowed{why}; allowed: {', '.join(DTYPES)}"
            )
        loading.need_transformers()
        self.path, self.max_length, self.layer = path, max_length, layer
        self.prefix, self.dtype, self.device = prefix, dtype, torch.device(device)
        self.folder = loading.model_folder(path)
        self.tokenizer = loading.load_tokenizer(self.folder, path)
        model = loading.load_encoder(self.folder, path, getattr(torch, dtype))
        self.hidden_size, layers = loading.sizes(model, path)
        self._check_length(loading.positions(model))
        self._check_layer(layers)
        self.model = model.to(self.device).eval().requires_grad_(False)
        self._facts: TextFacts | None = None

    def _check_length(self, positions: int | None) -> None:
        field, special = "data.text_max_length", self.tokenizer.num_special_tokens_to_add()
        if positions is not None and self.max_length > positions:
            raise UserError(
                f"{field}: {self.max_length} is more than the {positions} positions of {self.path}"
            )
        if self.max_length <= special:
            raise UserError(
                f"{field}: {self.max_length} leaves no room beside the {special} special tokens of "
                f"{self.path}; at least {special + 1} is allowed"
            )

    def _check_layer(self, layers: int) -> None:
        if self.layer is not None and not -layers - 1 <= self.layer <= layers:
            raise UserError(
                f"data.text_layer: {self.layer} is no layer of {self.path}, which has {layers}; "
                f"allowed: {-layers - 1} to {layers}, or null for its last hidden state"
            )

    def facts(self) -> TextFacts:
        """What the rows are; the weight files are read once for their hash."""
        if self._facts is None:
            self._facts = TextFacts(
                encoder=self.path,
                encoder_hash=loading.weights_hash(self.folder),
                tokenizer_hash=loading.vocabulary_hash(self.tokenizer),
                max_length=self.max_length,
                hidden_size=self.hidden_size,
                layer=self.layer,
                prefix=self.prefix,
                dtype=self.dtype,
            )
        return self._facts

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Numbers of the tokens of each caption, special ones included, cut at `max_length`.

        Raises:
            UserError: a caption has none.
        """
        return self._tokenised(captions, truncation=True, max_length=self.max_length)

    def lengths(self, captions: Sequence[str]) -> list[int]:
        """How many tokens each caption has before it is cut.

        Raises:
            UserError: a caption has none.
        """
        return [len(numbers) for numbers in self._tokenised(captions, truncation=False)]

    def _tokenised(self, captions: Sequence[str], **options: object) -> list[list[int]]:
        if not captions:
            return []
        texts = [self.prefix + caption for caption in captions]
        found = self.tokenizer(texts, verbose=False, **options).input_ids
        for caption, numbers in zip(captions, found, strict=True):
            if not numbers:
                raise UserError(
                    f"data.text_encoder: the tokenizer of {self.path} makes no token of the "
                    f"caption {caption!r}, so that there is nothing to attend to; choose an "
                    "encoder whose tokenizer adds special tokens"
                )
        return found

    def cut(self, caption: str) -> list[str]:
        """The tokens at the end of a caption that `max_length` cuts off; mostly none."""
        text = self.prefix + caption
        whole = self.tokenizer(text, truncation=False, verbose=False)
        lost = len(whole.input_ids) - self.max_length
        if lost <= 0:
            return []
        content = self.tokenizer(text, truncation=False, add_special_tokens=False, verbose=False)
        return [self.tokenizer.decode([number]).strip() for number in content.input_ids[-lost:]]

    def encode(self, captions: Sequence[str]) -> list[Tensor]:
        """Rows (L, E) of each caption in `dtype`, on the CPU; one forward pass for all.

        Captions are padded on the right whatever the tokenizer does, so that positions begin at
        the first token; what is padded is masked, and taken off again.

        Raises:
            UserError: a caption has no tokens, or its rows are not finite.
        """
        numbers = self.tokens(captions)
        if not numbers:
            return []
        lengths = [len(row) for row in numbers]
        self._check_vocabulary(captions, numbers)
        ids = torch.zeros(len(numbers), max(lengths), dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, kept, found in zip(ids, mask, numbers, strict=True):
            row[: len(found)] = torch.tensor(found)
            kept[: len(found)] = 1
        rows = self._forward(ids.to(self.device), mask.to(self.device)).cpu()
        encoded = [row[:length].clone() for row, length in zip(rows, lengths, strict=True)]
        for caption, row in zip(captions, encoded, strict=True):
            if not torch.isfinite(row).all():
                raise UserError(
                    f"data.text_encoder: {self.path} in {self.dtype} gives values that are not "
                    f"finite for the caption {caption!r}"
                )
        return encoded

    def _check_vocabulary(self, captions: Sequence[str], numbers: list[list[int]]) -> None:
        """Refuse tokens that the model does not know: a tokenizer of another model."""
        known = self.model.get_input_embeddings().num_embeddings
        for caption, row in zip(captions, numbers, strict=True):
            if max(row) >= known:
                raise UserError(
                    f"data.text_encoder: the tokenizer of {self.path} makes token {max(row)} of "
                    f"the caption {caption!r}, the model knows {known}; they do not belong together"
                )

    @torch.no_grad()
    def _forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Rows (B, T, E) of tokens (B, T), of which `mask` (B, T) is 1 for those that count."""
        with exact_float32():
            output = self.model(
                input_ids=ids, attention_mask=mask, output_hidden_states=self.layer is not None
            )
        last = self.layer is None
        rows = output.last_hidden_state if last else output.hidden_states[self.layer]
        return rows.to(getattr(torch, self.dtype))
