"""Checkpoints on the hub: `hub:NAME[@revision]` wherever a checkpoint is asked for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from core.errors import UserError
from data.hub import quiet
from data.text.loading import DOWNLOADED

PREFIX = "hub:"
VAE_FILES = ("config.json", "diffusion_pytorch_model*.safetensors", "*.safetensors.index.json")
TEXT_FILES = DOWNLOADED
"""Of a VAE and of a text encoder that travel with a checkpoint: no pickles, no code."""
FILES = [
    *("config.yaml", "state.json", "manifest.json", "README.md"),
    *("model.safetensors", "ema.safetensors", "ema_*.safetensors"),
    *(f"vae/{name}" for name in VAE_FILES),
    *(f"text_encoder/{name}" for name in TEXT_FILES),
]
"""What is downloaded."""


def is_remote(path: str | Path) -> bool:
    """Whether a checkpoint lies on the hub."""
    return str(path).startswith(PREFIX)


def fetch(path: str | Path) -> Path:
    """The folder of a checkpoint `hub:NAME[@revision]`, downloaded if it is not there already.

    Raises:
        UserError: no such name, revision or network, or a repository of something else.
    """
    name, _, revision = str(path).removeprefix(PREFIX).partition("@")
    if name.count("/") != 1 or "" in name.split("/"):
        raise UserError(f"{path}: wanted: hub:NAME[@revision] with a NAME such as someone/diffmoe")
    from huggingface_hub import HfApi

    with in_one_line(str(path), name, f"copy the folder from elsewhere (hf download {name})"):
        return Path(
            HfApi().snapshot_download(name, revision=revision or None, allow_patterns=FILES)
        )


@contextmanager
def in_one_line(asked: str, name: str, instead: str) -> Iterator[None]:
    """What the hub's client raises, as one line.

    Args:
        asked: what the user wrote.
        name: of the repository.
        instead: what to do where the hub cannot be reached.

    Raises:
        UserError: in the place of every other error.
    """
    from huggingface_hub.errors import (
        HfHubHTTPError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with quiet():
            yield
    except UserError:
        raise
    except RevisionNotFoundError as error:
        raise UserError(f"{asked}: {name} has no such revision") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{asked}: the hub has no {name} that may be read") from error
    # Its HTTP library's errors of every kind have no base of their own.
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, HfHubHTTPError) else error
        reason = " ".join(str(cause).split()).rstrip(".")[:150] or type(cause).__name__
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            raise UserError(
                f"{asked}: the hub refuses ({reason}); log in by `hf auth login` with a token "
                "that may do this"
            ) from error
        if status is not None or isinstance(error, ValueError):
            raise UserError(f"{asked}: {reason}") from error
        raise UserError(f"{asked}: the hub cannot be reached ({reason}); {instead}") from error
