"""Golden cases of ProMoE and DiT-MoE, which count the times of a flow from the data.

Their networks predict noise - data, and the importer turns the output layer round: a prediction of
ours is theirs with the other sign. Times of the files are what their embedding gets.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from case import Case, LinearModel, Tensors
from models_cases import ModelCase
from torch import Tensor
from torch.nn import Module

from config.objective import FlowConfig, SamplingConfig
from core.conditions import Condition
from core.types import ModelOutput, RoutingRecord
from models.dit import DiT
from sampling.guidance import Guided
from transport.objective import Flow, time_grid


class NoiseModelCase(ModelCase):
    """One file of a model of either repository."""

    def __init__(self, tensors: Tensors, config: dict, metadata: dict[str, str]):
        super().__init__(tensors, config, metadata)
        if config.get("ddpm"):
            self.family = "ditmoe_ddpm"

    @property
    def is_flow(self) -> bool:
        return self.family != "ditmoe_ddpm"

    @property
    def is_promoe(self) -> bool:
        return self.family.startswith("promoe")

    def times(self, t: Tensor) -> Tensor:
        """Times of ours for those that the network's embedding gets."""
        scale = 1000.0 if self.is_promoe else 1.0
        return 1 - t / scale if self.is_flow else t

    def theirs(self, prediction: Tensor) -> Tensor:
        """Their output for a prediction of ours."""
        return -prediction if self.is_flow else prediction

    def run(self) -> Tensors:
        with torch.no_grad():
            self.in_evaluation(self.model(training=False))
        self.in_training()
        return self.results

    def in_evaluation(self, model: DiT) -> None:
        """out.eval*, out.cfg*, out.sample*."""
        x, t, y = self.inputs("x", "t", "y")
        with self.first_layer(model):
            self.forward("eval", model, x, t, y)
        self.put("out.eval.first", self.theirs(model(x[:1], self.times(t[:1]), y[:1]).prediction))
        for side in ("null", "cond"):
            if f"in.{side}_y" in self.tensors:
                self.forward(f"eval_{side}", model, x, t, *self.inputs(f"{side}_y"))
        self.guided(model)
        if "out.sample" in self.tensors:
            self.sample(model)
        if "in.sample_t_normal" in self.tensors:
            flow = Flow(FlowConfig(time_distribution="logit_normal", time_mean=0.0, time_std=1.0))
            uniform = torch.special.ndtr(-self.inputs("sample_t_normal")[0].double())
            self.put("out.t_from_normal", 1 - flow.time_of(uniform))

    @contextmanager
    def first_layer(self, model: DiT) -> Iterator[None]:
        """Note what goes into the first layer with experts and what comes out."""
        block = model.config.moe_blocks()[0]

        def note(layer: Module, args: tuple, output: tuple) -> None:
            self.put(f"out.eval.moe_in.{block}", args[0])
            self.put(f"out.eval.moe_out.{block}", output[0])

        hook = model.blocks[block].feed_forward.register_forward_hook(note)
        yield
        hook.remove()

    def forward(self, key: str, model: DiT, x: Tensor, t: Tensor, y: Tensor) -> None:
        output = model(x, self.times(t), y)
        self.put(f"out.{key}", self.theirs(output.prediction))
        for block, record in self.by_block(output.routing):
            self.put(f"out.{key}.expert_count.{block}", record.counts.sum(dim=0))
            layer = model.config.feed_forward
            if self.family == "promoe_ec":
                self.by_expert(f"out.{key}", block, record, layer.num_experts)
            else:
                self.by_token(f"out.{key}", block, record, layer.num_experts, layer.top_k)

    def by_token(self, key: str, block: int, record: RoutingRecord, E: int, K: int) -> None:
        """Choices in ascending order; a token without class has expert E, listed K times."""
        mask = record.token_mask()
        gates = record.plan.table(record.plan.gate, len(mask))
        chosen = torch.full((len(mask), K), E)
        weights = torch.zeros(len(mask), K)
        weights[:, 0] = 1
        routed = mask[:, :E].sum(dim=1) > 0
        chosen[routed] = mask[routed].nonzero()[:, 1].view(-1, K)
        weights[routed] = gates[routed].gather(1, chosen[routed])
        self.put(f"{key}.dispatch.{block}", mask)
        self.put(f"{key}.topk_idx.{block}", chosen)
        self.put(f"{key}.topk_weight.{block}", weights)

    def by_expert(self, key: str, block: int, record: RoutingRecord, E: int) -> None:
        """Masks and weights (B, E, N) of the routed experts, and how many tokens each takes."""
        mask = record.token_mask()
        shape = (len(record.counts), record.num_tokens, -1)
        gates = record.plan.table(record.plan.gate, len(mask))
        for name, values in (("dispatch", mask), ("gate", gates)):
            self.put(f"{key}.{name}.{block}", values.view(shape).transpose(1, 2)[:, :E])
        self.put(f"{key}.k.{block}", record.counts[0, 0])

    def guided(self, model: DiT) -> None:
        """out.cfg*: three channels as forward_with_cfg means it, all in two calls."""
        x, t, y = self.inputs("cfg_x", "cfg_t", "cfg_y")
        half, scale = len(x) // 2, self.config["cfg_scale"]
        x, t, cond, null = x[:half], self.times(t[:half]), y[:half], y[half:]
        both = [self.theirs(model(x, t, labels).prediction) for labels in (cond, null)]
        settings = SamplingConfig(cfg_scale=scale, cfg_channels="first3", cfg_pooling="joint")
        guided = self.theirs(
            Guided(model, lambda _: Condition(null), settings)(x, t, cond).prediction
        )
        second = torch.cat([guided[:, :3], both[1][:, 3:]], dim=1)
        self.put("out.cfg", torch.cat([guided, second]))
        two = Guided(model, lambda _: Condition(null), SamplingConfig(cfg_scale=scale))(x, t, cond)
        self.put("out.cfg_two_calls", self.theirs(two.prediction)[:, : x.shape[1]])
        # Theirs takes the first sample for the batch, its channels for samples, its rows for
        # channels.
        part, rest = both[0][0][:, :3], both[0][0][:, 3:]
        one, other = part.chunk(2)
        mixed = other + scale * (one - other)
        self.put("out.cfg.official_faulty", torch.cat([torch.cat([mixed, mixed]), rest], dim=1))

    def sample(self, model: DiT) -> None:
        """RectifiedFlow.sample from the noise of the file."""
        noise, y = self.inputs("noise", "y")
        steps, classes = self.config["sample_steps"], self.ctor["num_classes"]
        scale = self.config["cfg_scale"]
        settings = SamplingConfig(sampler="euler", num_steps=steps, cfg_scale=scale)
        guided, y = Guided(model, model.null_condition, settings), y % classes
        self.put("out.sample", Flow().sample(guided, noise, y, settings, None))
        first = guided(noise, torch.zeros(len(noise)), y).prediction[:, : noise.shape[1]]
        self.put("out.sample.first_step", noise + first / steps)
        self.put("out.sample_xps.first", noise + first)

    def in_training(self) -> None:
        """out.train, out.loss, out.rf.*, losses of the routers, grad.*."""
        x, t, y = self.inputs("x", "t", "y")

        def weighted(model: DiT) -> tuple[Tensor, list[RoutingRecord]]:
            output = model(x, self.times(t), y)
            prediction = self.theirs(output.prediction)
            loss = (prediction * self.inputs("loss_w")[0]).mean()
            self.put("out.train", prediction)
            self.put("out.loss", loss)
            for block, record in self.by_block(output.routing):
                self.losses(model, block, record)
            return loss, output.routing

        self.gradients("grad.", weighted)
        for prefix, options in (
            ("no_aux", {"auxiliary": False}),
            ("loss_x1000", {"scale": 1000.0}),
        ):
            if self.wants(f"grad.{prefix}."):
                self.gradients(f"grad.{prefix}.", weighted, **options)
        if "out.rf.loss" in self.tensors:
            self.gradients("grad.rf.", self.rectified_flow)

    def losses(self, model: DiT, block: int, record: RoutingRecord) -> None:
        self.put(f"out.expert_count.{block}", record.counts.sum(dim=0))
        self.put(f"out.aux_loss.{block}", sum(record.losses.values(), torch.zeros(())))
        if "balance" in record.losses:
            self.put(f"out.balance_loss.{block}", record.losses["balance"])
        if "contrastive" in record.losses:
            weight = model.config.feed_forward.contrastive_loss_weight
            self.put(f"out.contrastive_loss.{block}", record.losses["contrastive"] / weight)

    def rectified_flow(self, model: DiT) -> tuple[Tensor, list[RoutingRecord]]:
        x, t, y, noise = self.inputs("x", "flow_t", "y", "noise")

        def noted(*inputs: Tensor) -> ModelOutput:
            output = model(*inputs)
            self.put("out.rf.model", self.theirs(output.prediction))
            return output

        terms = Flow().losses_at(noted, x, y, t, noise)
        self.put("out.rf.mse", terms.per_sample)
        self.put("out.rf.loss", terms.per_sample.mean())
        return terms.per_sample.mean(), terms.routing


class ProMoEFlow(Case):
    """Training times, loss and Euler samples of ProMoE's scripts on a linear model."""

    def run(self) -> Tensors:
        """All results."""
        self.training_times()
        self.loss()
        for steps, scale, shift in self.config["sampling"]:
            self.sampling(steps, scale, shift)
        return self.results

    def training_times(self) -> None:
        normal, uniform = self.inputs("normal", "uniform")
        for mean, std, shift in self.config["logit_normal"]:
            settings = {"time_mean": -mean, "time_std": std, "time_shift": shift}
            flow = Flow(FlowConfig(time_distribution="logit_normal", **settings))
            sigma = 1 - flow.time_of(torch.special.ndtr(-normal.double()))
            self.put(f"out.sigma.logit_normal.{mean:g}_{std:g}_{shift:g}", sigma)
            if (mean, std, shift) == (0, 1, 1):
                self.put("out.t.logit_normal", 1000 * sigma)
        mode = Flow(FlowConfig(time_distribution="mode"))
        self.put("out.u.mode", 1 - mode.time_of(uniform))

    def model(self) -> LinearModel:
        """Ours: the other sign, and times from noise to data."""
        return _Reversed(*(self.tensors[f"state.{name}"] for name in "Abc"))

    def loss(self) -> None:
        x, noise, sigma, y = self.inputs("x", "noise", "sigma", "z_y")
        flow, t = Flow(), 1 - sigma
        self.put("out.z_t", flow.path.interpolate(x, noise, t))
        self.put("out.target", -flow.path.velocity(x, noise, t))
        terms = flow.losses_at(self.model(), x, y, t, noise)
        self.put("out.rf.mse", terms.per_sample)
        self.put("out.rf.loss", terms.per_sample.mean())

    def sampling(self, steps: int, scale: float, shift: float) -> None:
        z, y = self.inputs("z", "z_y")
        name = f"{steps}_{scale:g}_{shift:g}"
        sigmas = 1 - time_grid(0.0, 1.0, steps, z, shift)
        self.put(f"out.sigmas.{name}", sigmas)
        self.put(f"out.timesteps.{name}", 1000 * sigmas[:-1])
        settings = SamplingConfig(
            sampler="euler", num_steps=steps, cfg_scale=scale, time_shift=shift
        )
        null = torch.full_like(y, len(self.tensors["state.c"]) - 1)
        guided = Guided(self.model(), lambda _: null, settings)
        with torch.no_grad():
            self.put(f"out.sample.{name}", Flow().sample(guided, z, y, settings, None))


class _Reversed(LinearModel):
    def __call__(self, x: Tensor, t: Tensor, cond: Condition | Tensor) -> ModelOutput:
        return ModelOutput(-super().__call__(x, 1 - t, cond).prediction)
