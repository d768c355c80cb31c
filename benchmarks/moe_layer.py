"""python -m benchmarks.moe_layer [--device cpu|cuda] [--tokens 4096] [--num-experts 16] ...

One feed-forward layer of each kind against the dense one of the same activated width: seconds of a
training pass (forward and backward) and of inference as ratios, and memory for the backward pass.
`--family deepseek`, `promoe` and `ditmoe` take the layers of DSMoE-S, ProMoE and DiT-MoE, each
against a dense layer of its kind as wide as the experts of a token and the shared one together.
`--family race` takes those of Expert Race, whose race and two losses come on top of experts that
are together as wide as the dense layer, and expert choice with weights renormalised for each token.

Beside each stands what no layer with such experts can do without: their products and activations
alone, on rows that lie ready, as many for each expert.
"""

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.measure import (
    activation_memory,
    alternate,
    default_device,
    device_here,
    machine,
    report,
)
from benchmarks.pseudo_code import Algorithm3
from config.layers import (
    DeepSeekConfig,
    DenseConfig,
    DiffMoEConfig,
    ExpertChoiceConfig,
    MoEConfig,
    TokenChoiceConfig,
)
from config.model import FeedForwardConfig, ModelConfig
from config.promoe import ProMoEConfig
from config.race import RaceConfig
from core.command_line import Parser, file_to_write, positive
from core.errors import command
from core.heap import freed_memory_kept
from core.types import RouterContext, RoutingRecord
from models.build import FEED_FORWARDS
from models.moe.dispatch import batched_product
from models.moe.layer import MoEFeedForward
from models.moe.race import RaceRouter

SAMPLE = 256
"""Tokens of one sample."""


def layers(experts: int) -> dict[str, FeedForwardConfig]:
    """The layers that are compared, by name."""
    return {
        "dense": DenseConfig(),
        "token_choice": TokenChoiceConfig(num_experts=experts),
        "expert_choice": ExpertChoiceConfig(num_experts=experts),
        "diffmoe": DiffMoEConfig(num_experts=experts),
    }


DEEPSEEK = {"deepseek E16-k2": (16, 2, 2.0), "deepseek E48-k5": (48, 5, 1 / 3)}
"""Experts, top-k, and width of an expert in units of D, of DSMoE-S."""

KINDS = {"gelu": "GELU", "swiglu": "SwiGLU"}


def _sizes(kind: str, width: int, shared: int) -> dict[str, object]:
    return {
        **{"expert_mlp": kind, "intermediate_size": width},
        **{"shared_mlp": kind, "shared_intermediate_size": shared},
    }


def deepseek_layers(hidden_size: int) -> dict[str, MoEConfig]:
    """Those of DSMoE-S."""
    found = {}
    for name, (experts, top_k, ratio) in DEEPSEEK.items():
        width = round(ratio * hidden_size)
        sizes = _sizes("swiglu", width, width)
        found[name] = DeepSeekConfig(num_experts=experts, top_k=top_k, **sizes)
    return found


def promoe_layers(hidden_size: int) -> dict[str, MoEConfig]:
    """Those of ProMoE, where all samples have a class."""
    sizes = _sizes("gelu", 2 * hidden_size, 2 * hidden_size)
    return {
        f"promoe E12 by {choice}": ProMoEConfig(num_experts=12, choice=choice, **sizes)
        for choice in ("token", "expert")
    }


def ditmoe_layers(hidden_size: int) -> dict[str, MoEConfig]:
    """That of DiT-MoE with 8 experts."""
    sizes = _sizes("swiglu", 4 * hidden_size, 2 * hidden_size)
    return {"ditmoe E8-k2": TokenChoiceConfig(num_experts=8, top_k=2, **sizes)}


def build(
    layer: FeedForwardConfig, hidden_size: int, backend: str, device: torch.device, **model: object
) -> nn.Module:
    """A layer alone, with thresholds that give C of about 1 in dynamic inference."""
    torch.manual_seed(0)
    config = ModelConfig(
        hidden_size=hidden_size, feed_forward=layer, expert_backend=backend, **model
    )
    return FEED_FORWARDS[layer.name](config).to(device)


def diffmoe_modules(flags: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The layers of the DiffMoE paper, and for each the name of its dense counterpart."""
    device, D = torch.device(flags.device), flags.hidden_size
    kinds = layers(flags.num_experts)
    modules = {name: build(layer, D, "auto", device) for name, layer in kinds.items()}
    if flags.compile:
        for module in modules.values():
            module.compile()
    for name in kinds.keys() - {"dense"}:
        modules[f"{name}, loop"] = build(kinds[name], D, "loop", device)
    modules["Algorithm 3 as printed"] = Algorithm3(D, flags.num_experts, 4 * D).to(device)
    return modules, dict.fromkeys(modules, "dense")


def published_modules(
    layers: Callable[[int], dict[str, MoEConfig]], flags: argparse.Namespace
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers of a paper, and for each the name of its dense counterpart."""
    device, D = torch.device(flags.device), flags.hidden_size
    modules, baselines = {}, {}
    for name, layer in layers(D).items():
        routed = layer.experts_per_token() * layer.intermediate_size
        width, kind = round(routed) + layer.shared_intermediate_size, layer.expert_mlp
        dense = f"dense {KINDS[kind]} of {width}"
        if dense not in modules:
            same = {"mlp": kind, "intermediate_size": width}
            modules[dense] = build(DenseConfig(), D, "auto", device, **same)
        modules[name] = build(layer, D, "auto", device)
        modules[f"{name}, loop"] = build(layer, D, "loop", device)
        baselines |= dict.fromkeys((dense, name, f"{name}, loop"), dense)
    if flags.compile:
        for name in modules:
            if not name.endswith(", loop"):
                modules[name].compile()
    return modules, baselines


RACES: dict[str, FeedForwardConfig] = {
    "race 1-in-8": RaceConfig(num_experts=8, top_k=1),
    "race 2-in-8": RaceConfig(num_experts=8, top_k=2, hidden_split=2),
    "race 4-in-16": RaceConfig(num_experts=16, top_k=4, hidden_split=4),
    "race 4-in-32": RaceConfig(num_experts=32, top_k=4, hidden_split=4),
    "expert_choice, renormalised": ExpertChoiceConfig(
        num_experts=16, renormalise="token", rounding="up"
    ),
}


def race_modules(flags: argparse.Namespace) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers of Expert Race and of Nucleus-Image's kind, all activated as wide as the dense one."""
    device, D = torch.device(flags.device), flags.hidden_size
    kinds = {"dense": DenseConfig(), **RACES}
    modules = {name: build(layer, D, "auto", device) for name, layer in kinds.items()}
    if flags.compile:
        for module in modules.values():
            module.compile()
    return modules, dict.fromkeys(modules, "dense")


FAMILIES = {
    "diffmoe": diffmoe_modules,
    "deepseek": partial(published_modules, deepseek_layers),
    "promoe": partial(published_modules, promoe_layers),
    "ditmoe": partial(published_modules, ditmoe_layers),
    "race": race_modules,
}


class Products(nn.Module):
    """The products and activations of a layer's experts, of all that it does.

    Args:
        layer: whose weights are used.
        tokens: that its experts share, T.
    """

    def __init__(self, layer: MoEFeedForward, tokens: int):
        super().__init__()
        self.experts, self.shared = layer.experts, layer.shared
        E, D, _ = self.experts.w1.shape
        count = round(layer.experts_per_token * tokens / E)
        self.rows = nn.Parameter(torch.randn(E, count, D, device=self.experts.w1.device))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """(1,) mean of all outputs; `x` (B, S, D) is for the shared layer."""
        experts = self.experts
        h = experts.activate(batched_product(self.rows, experts.w1, experts.b1))
        mean = batched_product(h, experts.w2, experts.b2).mean()
        return mean if self.shared is None else mean + self.shared(x)[0].mean(), None


def products_of(modules: dict[str, nn.Module], x: Tensor) -> dict[str, Products]:
    """For each layer with experts, its bare products."""
    tokens = x.shape[0] * x.shape[1]
    return {
        f"products of {name}": Products(module, tokens)
        for name, module in modules.items()
        if isinstance(module, MoEFeedForward) and not name.endswith(", loop")
    }


def settle(module: nn.Module, x: Tensor) -> None:
    """Put the thresholds where inference on `x` takes as many pairs as the config says."""
    router = getattr(module, "router", None)
    if isinstance(router, RaceRouter):
        with torch.no_grad():
            router.thresholds.copy_(router.row(router(x, RouterContext())[1]))
    predictor = getattr(router, "predictor", None)
    if predictor is not None:
        with torch.no_grad():
            scores = predictor(x.flatten(0, 1)).sigmoid()
            k = len(scores) // scores.shape[1]
            predictor.thresholds.copy_(scores.topk(k + 1, dim=0).values[-1])


def training(module: nn.Module, x: Tensor, bf16: bool) -> Callable[[], object]:
    """A forward and backward pass, auxiliary losses included."""

    def call() -> None:
        module.train()
        module.zero_grad(set_to_none=True)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            y, record = module(x)
        (y.float().mean() + auxiliary(record)).backward()

    return call


def auxiliary(record: Tensor | RoutingRecord | None) -> Tensor | float:
    """The losses of a layer, a second head's against zeros; the pseudo-code returns its own."""
    if not isinstance(record, RoutingRecord):
        return 0.0 if record is None else record
    losses = [*record.losses.values()]
    if record.prediction is not None:
        losses.append(record.plr_loss(torch.zeros_like(record.prediction)))
    return sum(losses)


def inference(module: nn.Module, x: Tensor, bf16: bool) -> Callable[[], object]:
    """A forward pass in evaluation mode."""

    @torch.no_grad()
    def call() -> None:
        module.eval()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            module(x)

    return call


def forward_only(module: nn.Module, x: Tensor, bf16: bool) -> Callable[[], object]:
    """What `activation_memory` looks at: the training pass without its backward half."""

    def call() -> object:
        module.train()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
            return module(x)

    return call


def compare(flags: argparse.Namespace) -> list[dict]:
    """A row for each layer: ratios to its dense counterpart."""
    device = torch.device(flags.device)
    bf16 = flags.precision == "bf16"
    shape = (flags.tokens // SAMPLE, SAMPLE, flags.hidden_size)
    x = torch.randn(shape, device=device, requires_grad=True)
    modules, dense = FAMILIES[flags.family](flags)
    for module in modules.values():
        settle(module, x)
    bare = products_of(modules, x)
    dense |= {name: dense[name.removeprefix("products of ")] for name in bare}
    modules |= bare
    train = alternate({n: training(m, x, bf16) for n, m in modules.items()}, flags.repeats, device)
    infer = alternate({n: inference(m, x, bf16) for n, m in modules.items()}, flags.repeats, device)
    memory = {n: activation_memory(forward_only(m, x, bf16), m, device) for n, m in modules.items()}
    return [
        {
            "layer": name,
            "train / dense": train[name] / train[dense[name]],
            "infer / dense": infer[name] / infer[dense[name]],
            "memory / dense": memory[name] / memory[dense[name]],
            "ms train": 1000 * train[name],
            "ms infer": 1000 * infer[name],
        }
        for name in modules
    ]


def _tokens(text: str) -> int:
    """A multiple of the tokens of one sample."""
    count = positive(text)
    if count % SAMPLE:
        near = max(1, round(count / SAMPLE)) * SAMPLE
        raise argparse.ArgumentTypeError(f"{count} is not a multiple of {SAMPLE}; near it: {near}")
    return count


def parse_flags(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = Parser("benchmarks.moe_layer", __doc__)
    add = parser.add_argument
    add("--device", type=device_here, default=default_device(), help="where: cpu or cuda")
    add("--precision", choices=["fp32", "bf16"], default="fp32", help="bf16: autocast")
    add("--compile", action="store_true", help="compile our layers (not the baselines)")
    add("--family", choices=FAMILIES, default="diffmoe", help="whose layers")
    add("--hidden-size", type=positive, default=384, help="D")
    add(
        "--num-experts",
        type=positive,
        nargs="+",
        default=[16],
        help="E of diffmoe, one table for each",
    )
    add("--tokens", type=_tokens, default=4096, help="in the batch, a multiple of 256")
    add("--repeats", type=positive, default=15, help="rounds through all layers")
    add("--out", type=file_to_write, help="JSON file; a number of experts is put into its name")
    return parser.parse_args(argv)


@command
@freed_memory_kept()
def main(argv: list[str] | None = None) -> None:
    """Measure and report, for each number of experts."""
    flags = parse_flags(argv)
    counts = flags.num_experts if flags.family == "diffmoe" else [0]
    for flags.num_experts in counts:
        settings = {k: str(v) for k, v in vars(flags).items()} | machine(torch.device(flags.device))
        out = flags.out
        if out is not None and len(counts) > 1:
            out = out.with_stem(f"{out.stem}_E{flags.num_experts}")
        kind = f"{flags.num_experts} experts" if flags.family == "diffmoe" else flags.family
        title = f"{kind}, {flags.tokens} tokens, D = {flags.hidden_size}"
        report(title, compare(flags), settings, out)


if __name__ == "__main__":
    main()
