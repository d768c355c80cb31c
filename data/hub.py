"""Asking the hub for models, and keeping its libraries quiet."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from core.errors import UserError

HUB_PATIENCE = 10.0
"""Seconds to wait for the hub's first answer."""


def is_local(path: str, field: str, allowed: str) -> bool:
    """Whether `path` is a folder, and not a hub id.

    Raises:
        UserError: it can be neither.
    """
    local = Path(path).is_dir()
    if not local and (path[:1] in ("", "/", ".", "~") or path.count("/") != 1):
        raise UserError(f"{field}: {path!r} is not a folder; {allowed}")
    return local


def on_hub(path: str, field: str, wanted: str) -> bool:
    """Whether the hub answers for an id; False where a copy of an earlier download has to do.

    Asked once before the libraries are, which try for half a minute on a lost network and then say
    that a file is missing.

    Args:
        path: hub id.
        field: what it is to the user.
        wanted: what it should be, such as `a VAE`.

    Raises:
        UserError: the hub does not have it, or does not answer, and there is no copy.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError

    try:
        with quiet():
            get_hf_file_metadata(hf_hub_url(path, "config.json"), timeout=HUB_PATIENCE)
    except RepositoryNotFoundError as error:
        raise UserError(
            f"{field}: {path} is neither a local folder nor {wanted} on the hub that may be read"
        ) from error
    except HfHubHTTPError:  # it answers; the libraries try again, or say what is missing
        return True
    # Its HTTP library's errors of every kind, which have no base of their own.
    except Exception as error:
        if isinstance(try_to_load_from_cache(path, "config.json"), str):
            return False
        reason = " ".join(str(error).split()).rstrip(".")[:100]
        raise UserError(
            f"{field}: {path} is not a local folder, and the hub cannot be reached "
            f"({reason}); give a folder by save_pretrained, or download it where there is a "
            f"network (hf download {path}) and copy the folder here"
        ) from error
    return True


@contextmanager
def quiet(library: ModuleType | None = None) -> Iterator[None]:
    """Let errors speak, not warnings about optional packages, retries and requests.

    Args:
        library: `diffusers.utils.logging` or that of transformers, whose bars are hidden.
    """
    names = ("diffusers", "transformers", "huggingface_hub", "httpx")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    bars = library is not None and library.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        if bars:
            library.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            library.enable_progress_bar()
