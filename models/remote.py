"""Checkpoints on the hub: `hub:NAME[@revision]` wherever a checkpoint is asked for."""

from pathlib import Path

from core.errors import UserError
from data.hub import quiet

PREFIX = "hub:"
FILES = ["*.safetensors", "*.json", "*.yaml", "README.md", "vae/*", "text_encoder/*"]
"""What is downloaded: no sample sets, and nothing that would be run."""


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
    from huggingface_hub.errors import (
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        with quiet():
            return Path(
                HfApi().snapshot_download(name, revision=revision or None, allow_patterns=FILES)
            )
    except RevisionNotFoundError as error:
        raise UserError(f"{path}: {name} has no revision {revision!r}") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{path}: the hub has no {name} that may be read") from error
    except HFValidationError as error:
        raise UserError(f"{path}: {' '.join(str(error).split())[:150]}") from error
    except LocalEntryNotFoundError as error:
        raise UserError(
            f"{path}: the hub cannot be reached, and nothing was downloaded before; copy the "
            f"folder from where there is a network (hf download {name})"
        ) from error
