"""Golden tables of positions and times, and rotated queries."""

import torch
from case import Case, Tensors

from models.embeddings import timestep_features
from models.positions import (
    after_context,
    rotary_1d,
    rotary_2d,
    rotate,
    rotation_of,
    sincos_2d,
)
from published.entries import halves_of_neighbours


class Embed(Case):
    """out.pos_embed*, out.timestep_embedding.*, out.rope*, out.jit_rope.*."""

    def run(self) -> Tensors:
        for width, grid in self.config["tables"]:
            self.put(f"out.pos_embed.{width}.{grid}", sincos_2d(width, grid))
            self.put(f"out.pos_embed64.{width}.{grid}", sincos_2d(width, grid, torch.float64))
        for width in self.config["temb_dims"]:
            (t,) = self.inputs("t")
            self.put(f"out.timestep_embedding.{width}", timestep_features(t, width))
        for head_dim, tokens in self.config["rope"]:
            self.rope(head_dim, tokens)
        for half, grid, context in self.config["jit_rope"]:
            self.jit_rope(half, grid, context)
        return self.results

    def rope(self, head_dim: int, tokens: int) -> None:
        q = self.inputs("rope_q")[0][:, :, :tokens, :head_dim]
        angles = rotary_1d(head_dim, tokens)
        self.put(f"out.rope1d.{head_dim}.{tokens}.q", rotate(q, rotation_of(angles)))
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.put(f"out.rope1d.{head_dim}.{tokens}.{name}", table.repeat(1, 1, 2)[:, 0])
        angles = rotary_2d(head_dim, round(tokens**0.5))
        self.put(f"out.rope2d.{head_dim}.{tokens}.q", rotate(q, rotation_of(angles)))
        for axis, row_or_column in (("y", 0), ("x", 1)):
            for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
                both = table[:, row_or_column].repeat(1, 2)
                self.put(f"out.rope2d.{head_dim}.{tokens}.{name}_{axis}", both)

    def jit_rope(self, half: int, grid: int, context: int) -> None:
        angles = after_context(rotary_2d(2 * half, grid), context)
        tokens = len(angles)
        q = self.inputs("rope_q")[0].flatten()[: 4 * tokens * half].view(1, 2, tokens, 2 * half)
        key = f"out.jit_rope.{half}.{grid}.{context}"
        # There neighbouring channels are a pair: the same rotation of channels in another order.
        order = halves_of_neighbours(2 * half)
        turned = torch.empty_like(q)
        turned[..., order] = rotate(q[..., order], rotation_of(angles))
        self.put(f"{key}.q", turned)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            self.put(f"{key}.{name}", table.repeat_interleave(2, dim=2).flatten(1))
