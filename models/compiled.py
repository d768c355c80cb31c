"""Compilation of a model's blocks, for training and sampling."""

from torch import nn

from models.dit import DiT


def compile_blocks(model: DiT, varying: bool, **options: object) -> None:
    """Compile every block in place.

    Shapes stay fixed where they can: the blocks of JiT have two lengths of the sequence, and a
    second one would make it a symbol in every graph.

    Args:
        model: whose blocks are compiled.
        varying: the number of pairs of a layer changes from call to call.
        options: of `torch.compile`.
    """
    for block in model.blocks:
        compile_block(block, dynamic=None if varying else False, **options)


def compile_block(block: nn.Module, dynamic: bool | None = False, **options: object) -> None:
    """Compile a block in place."""
    block.compile(dynamic=dynamic, **options)
