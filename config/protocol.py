"""Named evaluation protocols: how a published number was sampled, in `config/protocols/`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from config.load import typed_file
from config.objective import SAMPLERS, SamplingConfig
from core.errors import ConfigError, unknown_name

FOLDER = Path(__file__).parent / "protocols"


@dataclass
class Protocol:
    """Everything about a set of samples but the checkpoint and the seed.

    Attributes:
        objective_name: of the checkpoints that it is for.
        vae: decoder, `mse`, `ema`, a hub id or a folder; by default the checkpoint's own.
        num_fid_samples: images.
        per_proc_batch_size: images in a block; routing over the batch depends on it.
        labels: `random` classes, or `balanced` ones in shuffled order.
        pixels: rule from [-1, 1] to uint8, see `data.vae.to_uint8`.
        precision: of the model's matrix products: `fp32`, on GPUs `tf32` (on CPUs the same), or
            `bf16` by autocast. Routers, the condition, the sampler's sums and the decoder stay
            float32, the decoder in TF32 unless it is fp32.
        sampling: sampler, steps, guidance.
    """

    objective_name: Literal["flow", "ddpm"] = "flow"
    vae: str | None = None
    num_fid_samples: int = 50_000
    per_proc_batch_size: int = 32
    labels: Literal["random", "balanced"] = "random"
    pixels: Literal["adm", "dit", "jit"] = "dit"
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    sampling: SamplingConfig = field(default_factory=SamplingConfig)


def known_protocols() -> list[str]:
    """Names that `load_protocol` takes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def load_protocol(name: str) -> Protocol:
    """A protocol by its name.

    Raises:
        ConfigError: for an unknown name, or a file that does not fit the schema.
    """
    if name not in known_protocols():
        raise unknown_name("--protocol", name, known_protocols(), ConfigError)
    protocol = typed_file(FOLDER / f"{name}.yaml", Protocol)
    known = SAMPLERS[protocol.objective_name]
    if protocol.sampling.sampler not in known:
        raise unknown_name(
            f"{name}: sampling.sampler", protocol.sampling.sampler, known, ConfigError
        )
    return protocol
