"""Any file in the format of the golden files, recomputed by this project.

`run_case(path)` returns every `out.*`, `grad.*` and `after*.*` tensor of the file under its key.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from case import Case
from ddpm_cases import Losses, Sample, Schedule
from embed_cases import Embed
from models_cases import FAMILIES, ModelCase
from more_cases import NoiseModelCase, ProMoEFlow
from transport_cases import RectifiedFlowSample, Samplers, Terms

CASES = {
    "ddpm_schedule": Schedule,
    "ddpm_losses": Losses,
    "ddpm_sample": Sample,
    "rf_sample": RectifiedFlowSample,
    "sit_transport_terms": Terms,
    "sit_transport_samplers": Samplers,
    "embed": Embed,
    "promoe_flow": ProMoEFlow,
}
"""Files without a model, by the `case` in their metadata."""


NOISE_FAMILIES = ("promoe_tc", "promoe_ec", "ditmoe")


def case_of(tensors: dict[str, Tensor], config: dict, metadata: dict[str, str]) -> Case:
    """The case of a file."""
    if metadata["case"] in CASES:
        return CASES[metadata["case"]](tensors, config, metadata)
    family = FAMILIES[metadata["source"].split(",")[0]]
    kind = NoiseModelCase if family in NOISE_FAMILIES else ModelCase
    return kind(tensors, config, metadata)


def load_case(path: str | Path) -> tuple[dict[str, Tensor], dict, dict[str, str]]:
    """Tensors, `config` and all metadata of a file."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return tensors, json.loads(file.metadata()["config"]), file.metadata()


def recorded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that are results."""
    return {k: v for k, v in tensors.items() if k.startswith(("out.", "grad.", "after"))}


def run_case(path: str | Path, device: str = "cpu") -> dict[str, Tensor]:
    """Every result of the file at `path`, computed anew on a device."""
    case = case_of(*load_case(path))
    case.device = torch.device(device)
    return case.run()
