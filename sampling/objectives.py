"""The objective of a config."""

from config.objective import ObjectiveConfig
from core.types import Objective
from diffusion.objective import DDPM
from transport.objective import Flow


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that a config section names."""
    return OBJECTIVES[config.name](config)


OBJECTIVES = {"flow": Flow, "ddpm": DDPM}
"""One line for each objective; its options are the dataclass of that name in
`config.schema.OBJECTIVES`."""
