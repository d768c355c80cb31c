"""What the kinds of golden cases share: inputs by name, results under the file's keys."""

import json

import torch
from torch import Tensor

from core.conditions import Condition
from core.types import ModelOutput

Tensors = dict[str, Tensor]


class Case:
    """One file: tensors, `config` and `info` of its metadata, and the results found so far.

    Attributes:
        device: where everything is computed; results are brought back.
    """

    device = torch.device("cpu")

    def __init__(self, tensors: Tensors, config: dict, metadata: dict[str, str]):
        self.tensors, self.config = tensors, config
        self.info: dict = json.loads(metadata.get("info", "{}"))
        self.results: Tensors = {}

    def inputs(self, *names: str) -> list[Tensor]:
        """The tensors `in.<name>`."""
        return [self.tensors[f"in.{name}"].to(self.device) for name in names]

    def put(self, key: str, value: Tensor) -> None:
        """Keep a result where the file has one of that name, in its dtype."""
        if key in self.tensors:
            self.results[key] = value.detach().clone().to("cpu", self.tensors[key].dtype)

    def wants(self, prefix: str) -> bool:
        """Whether the file has a key that begins so."""
        return any(key.startswith(prefix) for key in self.tensors)

    def keys(self, prefix: str) -> list[list[str]]:
        """The parts of every key after `prefix`."""
        found = [key.removeprefix(prefix) for key in self.tensors if key.startswith(prefix)]
        return [key.split(".") for key in found]


class LinearModel:
    """y = (weight + t slope) x + offset t + table[cond], per pixel; notes the times it is given.

    Args:
        weight: (C_out, C).
        offset: (C_out,).
        table: (num_classes, C_out).
        slope: (C_out, C), by default 0.
        time_scale: t counts as time_scale * t.
        outputs: keep the first so many channels; by default all.
    """

    def __init__(
        self,
        weight: Tensor,
        offset: Tensor,
        table: Tensor,
        slope: Tensor | None = None,
        time_scale: float = 1.0,
        outputs: int | None = None,
    ):
        self.weight = weight.clone().requires_grad_()
        self.offset, self.table, self.slope = offset, table, slope
        self.time_scale, self.outputs = time_scale, outputs
        self.times: list[Tensor] = []

    def __call__(self, x: Tensor, t: Tensor, cond: Condition | Tensor) -> ModelOutput:
        self.times.append(t)
        t = (t * self.time_scale).to(x.dtype)
        weight = self.weight.expand(len(x), -1, -1)
        if self.slope is not None:
            weight = weight + t.view(-1, 1, 1) * self.slope
        y = torch.einsum("boc,bchw->bohw", weight, x)
        y = y + (t[:, None] * self.offset + self.table[Condition.of(cond).labels])[:, :, None, None]
        return ModelOutput(y[:, : self.outputs])
