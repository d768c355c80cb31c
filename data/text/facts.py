"""What the rows of an encoded caption are: the encoder and how it was asked."""

from dataclasses import asdict, dataclass
from typing import Any

DTYPES = ("bfloat16", "float32")
"""Of the encoder and of its rows. Not float16: the activations of T5 exceed its range."""

_ALLOWED: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("encoder", "encoder_hash", "tokenizer_hash", "prefix", "dtype"), (str,)),
    **dict.fromkeys(("max_length", "hidden_size"), (int,)),
    "layer": (int, type(None)),
}


@dataclass(frozen=True)
class TextFacts:
    """Two encoders with equal facts give the same rows, but for rounding.

    Attributes:
        encoder: hub id or folder.
        encoder_hash: of its weights and configuration, see `TextEncoder.facts`.
        tokenizer_hash: of what its tokenizer makes of texts, see there.
        max_length: most tokens of a caption, those of `prefix` and special ones included.
        hidden_size: E, the width of a row.
        layer: whose output the rows are, as an index of the encoder's `hidden_states`; None for
            its last hidden state.
        prefix: put before every caption.
        dtype: of the encoder and the rows, one of DTYPES.
    """

    encoder: str
    encoder_hash: str
    tokenizer_hash: str
    max_length: int
    hidden_size: int
    layer: int | None
    prefix: str
    dtype: str

    @classmethod
    def of(cls, values: Any) -> "TextFacts":
        """What stands in a manifest or a checkpoint, as `dataclasses.asdict` wrote it.

        Raises:
            ValueError: naming an entry that is not what it should be.
            TypeError: an entry is missing, or there is one too many.
        """
        facts = cls(**values)
        for name, allowed in _ALLOWED.items():
            value = getattr(facts, name)
            if type(value) not in allowed:  # a bool is an int to isinstance
                raise ValueError(f"{name} {value!r} is not {allowed[0].__name__}")
        if facts.dtype not in DTYPES:
            raise ValueError(f"dtype {facts.dtype!r} is none of {', '.join(DTYPES)}")
        if min(facts.max_length, facts.hidden_size) < 1:
            raise ValueError(f"max_length {facts.max_length} or hidden_size is not above 0")
        return facts

    def difference(self, other: "TextFacts") -> str | None:
        """The first fact that differs, with both values, as `max_length 77 and 120`; None: equal.

        Paths may differ: the hashes say whether the encoders are the same.
        """
        mine, others = asdict(self), asdict(other)
        # What was asked for before the hashes, which say less to a reader.
        asked = ("max_length", "layer", "prefix", "dtype", "hidden_size")
        for name in (*asked, "encoder_hash", "tokenizer_hash"):
            if mine[name] != others[name]:
                paths = name.endswith("_hash") and self.encoder != other.encoder
                of = f" ({self.encoder} and {other.encoder})" if paths else ""
                return f"{name} {_short(mine[name])} and {_short(others[name])}{of}"
        return None


def _short(value: Any) -> str:
    """A value as a line of an error shows it; of a hash its beginning."""
    text = "null" if value is None else repr(value) if isinstance(value, str) else str(value)
    return f"{text[1:13]}..." if len(text) == 66 else text
