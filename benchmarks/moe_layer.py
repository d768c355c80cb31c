"""python -m benchmarks.moe_layer [--device cpu|cuda] [--tokens 4096] [--num-experts 16] ...

One feed-forward layer of each kind against the dense one of the same activated width: seconds of a
training pass (forward and backward) and of inference as ratios, and memory for the backward pass.
`--family deepseek`, `promoe` and `ditmoe` take the layers of DSMoE-S, ProMoE and DiT-MoE, each
against a dense layer of its kind as wide as the experts of a token and the shared one together.
`--family race` takes those of Expert Race, whose race and two losses come on top of experts that
are together as wide as the dense layer, and expert choice with weights renormalised for each token.

Beside each stands what no layer with such experts can do without: their products and activations
alone, on rows that lie ready, as many for each expert as the layer gives it.
"""

import argparse
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.families import FAMILIES
from benchmarks.measure import (
    activation_memory,
    alternate,
    default_device,
    device_here,
    machine,
    report,
)
from core.command_line import Parser, file_to_write, positive
from core.errors import command
from core.heap import freed_memory_kept
from core.types import RouterContext, RoutingRecord
from models.moe.dispatch import SegmentedProduct, batched_product
from models.moe.experts import product_dtype
from models.moe.layer import MoEFeedForward
from models.moe.race import RaceRouter

SAMPLE = 256
"""Tokens of one sample."""


class Products(nn.Module):
    """The products and activations of a layer's experts and predictor, of all that it does.

    Args:
        layer: whose weights are used.
        x: (B, S, D), whose routing says how many rows each expert has.
        training: as the layer routes in training, or in inference.
    """

    def __init__(self, layer: MoEFeedForward, x: Tensor, training: bool):
        super().__init__()
        self.experts, self.shared = layer.experts, layer.shared
        self.predictor = getattr(layer.router, "predictor", None)
        with torch.no_grad():
            plan = layer.train(training)(x)[1].plan
        self.sizes, self.equal = plan.host_sizes(), plan.capacity is not None
        self.rows = nn.Parameter(torch.randn(len(plan.token_index), x.shape[2], device=x.device))

    def product(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Rows (N, in) of all experts to (N, out)."""
        dtype = product_dtype(rows)
        rows, weight = rows.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        if not self.equal:
            return SegmentedProduct.apply(rows, self.sizes, weight, bias)
        rows = rows.view(len(weight), -1, rows.shape[1])
        return batched_product(rows, weight, bias).flatten(0, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """Mean of all outputs; `x` (B, S, D) is what the shared layer and the predictor see."""
        experts = self.experts
        h = experts.activate(self.product(self.rows, experts.w1, experts.b1))
        mean = self.product(h, experts.w2, experts.b2).mean()
        if self.predictor is not None:
            mean = mean + self.predictor(x.flatten(0, 1)).mean()
        return mean if self.shared is None else mean + self.shared(x)[0].mean(), None


def products_of(modules: dict[str, nn.Module], x: Tensor, training: bool) -> dict[str, Products]:
    """For each layer with experts, its bare products."""
    return {
        f"products of {name}": Products(module, x, training)
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
    other = torch.randn_like(x)  # on x itself, all experts would take equally many
    for module in modules.values():
        settle(module, other)
    seconds = {}
    for what, call, while_training in (("train", training, True), ("infer", inference, False)):
        timed = modules | products_of(modules, x, while_training)
        calls = {name: call(module, x, bf16) for name, module in timed.items()}
        seconds[what] = alternate(calls, flags.repeats, device)
    train, infer = seconds["train"], seconds["infer"]
    modules = timed
    dense |= {name: dense[name.removeprefix("products of ")] for name in modules}
    memory = {n: activation_memory(forward_only(m, x, bf16), m, device) for n, m in modules.items()}
    return [
        {
            "layer": name,
            "train / dense": train[name] / train[dense[name]],
            "infer / dense": infer[name] / infer[dense[name]],
            "train / products": _over_products(train, name),
            "infer / products": _over_products(infer, name),
            "memory / dense": memory[name] / memory[dense[name]],
            "ms train": 1000 * train[name],
            "ms infer": 1000 * infer[name],
        }
        for name in modules
    ]


def _over_products(seconds: dict[str, float], name: str) -> float | str:
    """How many times the bare products of its experts a layer takes."""
    bare = seconds.get(f"products of {name.removesuffix(', loop')}")
    return "" if bare is None else seconds[name] / bare


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
