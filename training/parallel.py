"""How a model is spread over processes and made to compute: DDP, FSDP2, compilation."""

import dataclasses
import inspect
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.parallel import DistributedDataParallel

from config.schema import Config
from config.validate import fitting_micro_batch
from core.distributed import Processes
from core.logging import get_logger
from core.types import ModelOutput, RoutingPlan, RoutingRecord
from models.build import build_model
from models.compiled import compile_blocks
from models.dit import DiT
from models.moe.exchange import Exchange
from models.moe.experts import Experts
from models.moe.layer import MoEFeedForward

log: logging.Logger = get_logger("train")


def shared_evenly(config: Config, processes: Processes) -> Config:
    """The config with a micro-batch that this number of processes shares a step by.

    A smaller one is the same training with other draws, since `validate` lets it through only
    where routing does not see the batch.
    """
    fitting = fitting_micro_batch(config, processes.world_size)
    if fitting == config.train.micro_batch_size:
        return config
    of_batch = ("balance_loss_weight", "contrastive_loss_weight", "similarity_loss_weight")
    routed = any(getattr(config.model.feed_forward, key, 0) > 0 for key in of_batch)
    log.info(
        "train.micro_batch_size: %d instead of %d, so that %d processes share %d images%s",
        *(fitting, config.train.micro_batch_size),
        *(processes.world_size, config.train.global_batch_size),
        "; the losses of routing are those of the smaller ones" if routed else "",
    )
    return dataclasses.replace(
        config, train=dataclasses.replace(config.train, micro_batch_size=fitting)
    )


def is_sharded(config: Config, processes: Processes) -> bool:
    """Whether the weights lie in parts on several processes."""
    return config.parallel.strategy != "ddp" and processes.world_size > 1


def build_sharded(config: Config, processes: Processes, whole: dict[str, Tensor]) -> DiT:
    """A model spread over the processes, of which none but the main one ever holds all of it.

    Args:
        config: of the run.
        processes: all of which call this function.
        whole: state of the model on the main process; not looked at elsewhere.
    """
    with torch.device("meta"):
        model = build_model(config.model)
    shard(model, config, processes)
    model.to_empty(device=processes.device)
    model.fill_tables()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, dict(whole), options=options)
    return model


def shard(model: DiT, config: Config, processes: Processes) -> None:
    """Spread the parameters over the processes in place, block by block (FSDP2).

    With `zero1` a gathered block stays so to the end of the step (ZeRO, stage 1, by which
    optimizer and averages alone are shared out): see `last_micro_batch`.
    """
    _register_outputs()
    # A prediction may be a view of a fresh tensor; nothing here changes it in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    size = config.parallel.shard_size or processes.world_size
    kind = processes.device.type
    if size == processes.world_size:
        mesh = init_device_mesh(kind, (size,), mesh_dim_names=("shard",))
    else:
        shape = (processes.world_size // size, size)
        mesh = init_device_mesh(kind, shape, mesh_dim_names=("replicate", "shard"))
    # A root is needed again at once, in the backward pass, which None knows.
    freed = False if config.parallel.strategy == "zero1" else None
    apart = _spread_experts(model, mesh) if config.parallel.expert_parallel else set()
    how = {
        "mesh": mesh,
        "shard_placement_fn": _placement(mesh),
        "reshard_after_forward": freed,
        "ignored_params": apart,
    }
    groups = []
    for block in model.blocks:
        parts = products(block) if config.parallel.param_dtype == "bf16" else []
        if parts:
            fully_shard(parts, mp_policy=_policy(config, torch.bfloat16), **how)
        fully_shard(block, mp_policy=_policy(config), **how)
        groups.append([block, *parts[:1]])
    fully_shard(model, mp_policy=_policy(config), **how)
    _prefetch(groups, config.parallel.prefetch)


def products(block: nn.Module) -> list[nn.Module]:
    """The parts of a block whose weights meet only matrix products, in bf16 under autocast."""
    aside = (block.modulation, getattr(block.feed_forward, "router", None))
    exact = {part for one in aside if one is not None for part in one.modules()}
    return [m for m in block.modules() if isinstance(m, nn.Linear | Experts) and m not in exact]


def _policy(config: Config, gathered: torch.dtype | None = None) -> MixedPrecisionPolicy:
    """In what weights and gradients travel; what modules are called with stays as it is."""
    reduced = torch.bfloat16 if config.parallel.reduce_dtype == "bf16" else torch.float32
    return MixedPrecisionPolicy(gathered, reduced, cast_forward_inputs=False)


def _prefetch(groups: list[list[nn.Module]], ahead: int) -> None:
    """Let each of the blocks, given with their parts, fetch the weights of some that follow."""
    for i, (block, *_) in enumerate(groups if ahead else []):
        later, earlier = groups[i + 1 : i + 1 + ahead], groups[max(i - ahead, 0) : i][::-1]
        block.set_modules_to_forward_prefetch([part for group in later for part in group])
        block.set_modules_to_backward_prefetch([part for group in earlier for part in group])


def _spread_experts(model: DiT, mesh: DeviceMesh) -> set[nn.Parameter]:
    """Leave each process its share of every layer's experts; returns their parameters."""
    found = set()
    for layer in model.modules():
        if not isinstance(layer, MoEFeedForward):
            continue
        layer.exchange = Exchange(mesh.get_group())
        for name, weight in list(layer.experts.named_parameters()):
            part = weight.detach().chunk(mesh.size())[mesh.get_local_rank()]
            spread = DTensor.from_local(part, mesh, [Shard(0)], run_check=False)
            setattr(layer.experts, name, nn.Parameter(spread, weight.requires_grad))
            found.add(getattr(layer.experts, name))
    return found


def _placement(mesh: DeviceMesh) -> Callable[[nn.Parameter], Shard | None]:
    parts = mesh["shard"].size()

    def placement(parameter: nn.Parameter) -> Shard | None:
        """The first dimension that falls into equal parts: of 8 experts on 16 GPUs the width."""
        for dim, length in enumerate(parameter.shape):
            if length % parts == 0:
                return Shard(dim)
        return None

    return placement


def _register_outputs() -> None:
    """Let FSDP find the tensors in what blocks and models return.

    It hooks them to fetch weights for the backward pass; losses inside a routing record need
    theirs before the block's output does.
    """
    for kind in (RoutingPlan, RoutingRecord, ModelOutput):
        if kind not in torch.utils._pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(kind)


def prepare(model: DiT, config: Config, processes: Processes) -> nn.Module:
    """The model as training calls it; `model` itself keeps the names of its parameters."""
    if config.train.activation_checkpointing:
        model.enable_gradient_checkpointing()
    if config.train.compile:
        # The steps of a capacity schedule differ in their number of pairs.
        compile_blocks(model, varying=config.model.feed_forward.capacity_at(0) is not None)
    if processes.world_size == 1 or isinstance(model, FSDPModule):
        return model
    cuda = processes.device.type == "cuda"
    # Buffers are the same everywhere. The switch has a new name since torch 2.15.
    known = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    wrapped = DistributedDataParallel(
        model,
        device_ids=[processes.device] if cuda else None,
        gradient_as_bucket_view=True,
        **{sync: False},
    )
    if config.parallel.reduce_dtype == "bf16":
        wrapped.register_comm_hook(None, bf16_compress_hook)
    return wrapped


@contextmanager
def last_micro_batch(model: nn.Module, last: bool, strategy: str) -> Iterator[None]:
    """Gradients are reduced over the processes in the last micro-batch of a step only.

    With `zero1`, weights are given up only then, so that a step gathers them once.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or strategy != "zero1")
        yield
    elif isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
    else:
        yield


def give_up(model: nn.Module) -> None:
    """Free the weights that a forward pass gathered where no backward pass does."""
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of each tensor that lies on this process."""
    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]
