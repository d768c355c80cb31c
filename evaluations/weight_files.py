"""Small networks in safetensors files that say what they are."""

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from core.errors import UserError
from core.files import complete_file


def write_weights(path: Path, tensors: dict[str, Tensor], form: str, about: dict) -> None:
    """Write tensors with metadata, complete or not at all.

    Args:
        path: in a folder that exists.
        tensors: by name.
        form: names the kind of network and the version of its file.
        about: what else is to be known, JSON.

    Raises:
        UserError: the folder of `path` does not exist.
    """
    if not path.absolute().parent.is_dir():
        raise UserError(f"out: no folder {path.parent} to write {path.name} to")
    # One key: safetensors writes several in an arbitrary order, and equal files are easy to tell.
    content = save(tensors, {form: json.dumps(about)})
    with complete_file(path) as temporary:
        temporary.write_bytes(content)


def read_weights(
    path: Path, form: str, field: str, kind: str, program: str
) -> tuple[dict[str, Tensor], dict]:
    """Tensors and metadata of a file by `write_weights`.

    Args:
        path: of the file.
        form: that it must have.
        field: what it is to the user.
        kind: of network, in words.
        program: that makes such files.

    Raises:
        UserError: no such file, or not such a file.
    """
    if not path.is_file():
        raise UserError(f"{field}: no file {path}; make it with `python -m {program}`")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{field}: cannot read {path}: {error}") from error
    if form not in metadata:
        raise UserError(f"{field}: {path} is no {kind}: its metadata lack {form!r}")
    return tensors, json.loads(metadata[form])
