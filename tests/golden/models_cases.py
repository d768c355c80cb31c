"""Golden cases of whole models: official weights through the importer, outputs under their keys."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from case import Case, Tensors
from torch import Tensor
from torch.nn import Module

from config.objective import FlowConfig, SamplingConfig
from core.conditions import Condition
from core.distributed import Processes
from core.types import LossTerms, ModelOutput, RoutingRecord
from models.dit import DiT
from published.weights import from_official, to_official
from sampling.guidance import Guided
from training import router_state
from training.step import auxiliary_losses
from transport.objective import Flow

CHOOSING = ("dsmoe", "jit")
"""Families with DeepSeek-style routers."""

FAMILIES = {
    "facebookresearch/DiT:models.py": "dit",
    "willisma/SiT:models.py": "sit",
    "KwaiVGI/DiffMoE:models/models_DiT.py": "diffmoe_dense",
    "KwaiVGI/DiffMoE:models/models_TCDiT.py": "diffmoe_tc",
    "KwaiVGI/DiffMoE:models/models_ECDiT.py": "diffmoe_ec",
    "KwaiVGI/DiffMoE:models/models_DiffMoE.py": "diffmoe",
    "yhlleo/EfficientMoE:DSMoE/models/models_DSMoE.py": "dsmoe",
    "yhlleo/EfficientMoE:JiTMoE/model_jit.py": "jit",
    "ali-vilab/ProMoE:models/models_ProMoE_TC.py": "promoe_tc",
    "ali-vilab/ProMoE:models/models_ProMoE_EC.py": "promoe_ec",
    "feizc/DiT-MoE:models.py": "ditmoe",
}


class ModelCase(Case):
    """One file: its inputs, its model, and the results by key."""

    def __init__(self, tensors: Tensors, config: dict, metadata: dict[str, str]):
        super().__init__(tensors, config, metadata)
        self.family = FAMILIES[metadata["source"].split(",")[0]]
        self.state = {k[6:]: v for k, v in tensors.items() if k.startswith("state.")}
        self.ctor = config.get("ctor")
        if self.family == "jit":
            shape = {"input_size": config["arch_input_size"], "num_classes": config["num_classes"]}
            self.ctor = config["arch"] | shape

    @property
    def alone(self) -> Processes:
        """One process."""
        return Processes(0, 1, self.device)

    def model(self, training: bool) -> DiT:
        """A fresh copy with the recorded weights."""
        return from_official(self.family, self.ctor, self.state).train(training).to(self.device)

    def cut(self, prediction: Tensor) -> Tensor:
        """SiT's model gives the first C channels only."""
        return prediction[:, : prediction.shape[1] // 2] if self.is_cut_sit else prediction

    @property
    def is_cut_sit(self) -> bool:
        return self.family == "sit" and self.ctor.get("learn_sigma", True)

    def run(self) -> Tensors:
        """All results."""
        if self.family == "jit":
            self.denoiser()
        elif "training_iters" in self.config:
            self.capacity_schedule()
        elif "world_size" in self.config:
            self.two_ranks()
        elif "in.x2" in self.tensors:
            self.diffmoe_training()
        else:
            self.evaluation()
            if "out.train" in self.tensors:
                self.training()
            elif self.family == "dsmoe":
                self.gradients("grad.", self.flow_loss)
        return self.results

    # Evaluation mode

    def evaluation(self) -> None:
        """out.eval*, out.cfg*."""
        model = self.model(training=False)
        x, t, y = self.inputs("x", "t", "y")
        with torch.no_grad():
            for key, rows in (("eval", len(x)), ("eval_b4", len(x)), ("eval_b1", 1)):
                if f"out.{key}" in self.tensors:
                    self.forward(key, model, x[:rows], t[:rows], y[:rows])
            if "out.eval.first" in self.tensors:
                self.put("out.eval.first", self.cut(model(x[:1], t[:1], y[:1]).prediction))
            self.guidance(model)

    def forward(self, key: str, model: DiT, x: Tensor, t: Tensor, y: Tensor) -> None:
        with self.router_logits(f"out.{key}", model):
            output = model(x, t, y)
        self.put(f"out.{key}", self.cut(output.prediction))
        self.routing(key, output.routing, len(x))

    @contextmanager
    def router_logits(self, key: str, model: DiT) -> Iterator[None]:
        """Note what the sigmoids of DeepSeek-style routers are taken of."""
        hooks = []
        for block in model.config.moe_blocks() if self.family in CHOOSING else []:

            def note(router: Module, args: tuple[Tensor], block: int = block) -> None:
                logits = torch.nn.functional.linear(args[0].flatten(0, 1), router.weight)
                self.put(f"{key}.router_logits.{block}", logits)

            router = model.blocks[block].feed_forward.router
            hooks.append(router.register_forward_pre_hook(note))
        yield
        for hook in hooks:
            hook.remove()

    def routing(self, key: str, records: list[RoutingRecord], batch: int) -> None:
        """Counts, masks and choices of each MoE layer."""
        if not records:
            return
        if self.family in CHOOSING:
            for block, record in self.by_block(records):
                self.choices(f"out.{key}", block, record)
                self.put(f"out.{key}.expert_count.{block}", record.plan.tokens_per_expert)
            return
        counts = torch.stack([record.plan.tokens_per_expert for record in records])
        self.put(f"out.{key}.k", counts)
        for block, record in self.by_block(records):
            mask = record.token_mask()  # (B * S, E)
            if self.family == "diffmoe_ec":
                per_sample = mask.view(batch, record.num_tokens, -1).transpose(1, 2)
                self.put(f"out.{key}.dispatch.{block}", per_sample)
                self.put(f"out.{key}.k.{block}", record.counts[0, 0])
            else:
                self.put(f"out.{key}.dispatch.{block}", mask)
            if self.family == "diffmoe_tc":
                self.choices(f"out.{key}", block, record)

    def choices(self, key: str, block: int, record: RoutingRecord) -> None:
        """Experts of each token in ascending order, and their weights."""
        tokens = len(record.counts) * record.num_tokens
        chosen = record.token_mask().nonzero()[:, 1].view(tokens, -1)
        gates = record.plan.table(record.plan.gate, tokens)
        self.put(f"{key}.topk_idx.{block}", chosen)
        self.put(f"{key}.topk_weight.{block}", gates.gather(1, chosen))

    def by_block(self, records: list[RoutingRecord]) -> list[tuple[int, RoutingRecord]]:
        blocks = self.model(training=False).config.moe_blocks()
        return list(zip(blocks, records, strict=True))

    def guidance(self, model: DiT) -> None:
        """out.cfg: the official doubled batch; out.cfg_two_calls: all channels, separate calls."""
        if not self.wants("out.cfg"):
            return
        x, t, y = self.inputs("cfg_x", "cfg_t", "cfg_y")
        half = len(x) // 2
        x, t, cond, null = x[:half], t[:half], y[:half], y[half:]
        scale = self.config["cfg_scale"]
        both: list[ModelOutput] = []

        def cut_model(*inputs: Tensor) -> ModelOutput:
            output = model(*inputs)
            both.append(output)
            return ModelOutput(self.cut(output.prediction), output.routing)

        joint = SamplingConfig(cfg_scale=scale, cfg_channels="first3", cfg_pooling="joint")
        guided = Guided(cut_model, lambda _: Condition(null), joint)(x, t, cond)
        self.routing("cfg", guided.routing, 2 * half)
        free = self.cut(both[0].prediction)[half:, 3:]  # the other half keeps its own channels
        second = torch.cat([guided.prediction[:, :3], free], dim=1)
        self.put("out.cfg", torch.cat([guided.prediction, second]))
        two = Guided(model, lambda _: Condition(null), SamplingConfig(cfg_scale=scale))(x, t, cond)
        self.put("out.cfg_two_calls", two.prediction[:, : x.shape[1]])

    # Training mode

    def training(self) -> None:
        """out.train, out.loss, out.rf.*, grad.* of the dense, token- and expert-choice models."""
        x, t, y = self.inputs("x", "t", "y")

        def weighted(model: DiT) -> tuple[Tensor, list[RoutingRecord]]:
            output = model(x, t, y)
            prediction = self.cut(output.prediction)
            loss = (prediction * self.inputs("loss_w")[0]).mean()
            self.put("out.train", prediction)
            self.put("out.loss", loss)
            for block, record in self.by_block(output.routing) if output.routing else []:
                self.put(f"out.expert_count.{block}", record.plan.tokens_per_expert)
                if "balance" in record.losses:
                    self.put(f"out.aux_loss.{block}", record.losses["balance"])
            return loss, output.routing

        self.gradients("grad.", weighted)
        if self.wants("grad.no_aux."):
            self.gradients("grad.no_aux.", weighted, auxiliary=False)
            self.gradients("grad.loss_x1000.", weighted, scale=1000.0)
        if "out.rf.loss" in self.tensors:
            self.gradients("grad.rf.", self.flow_loss)

    def flow_loss(self, model: DiT) -> tuple[Tensor, list[RoutingRecord]]:
        x, t, y, noise = self.inputs("x", "t", "y", "noise")
        terms = Flow().losses_at(model, x, y, t, noise)
        self.put("out.rf.mse", terms.per_sample)
        self.put("out.rf.loss", terms.per_sample.mean())
        return terms.per_sample.mean(), terms.routing

    def gradients(
        self,
        prefix: str,
        loss_of: Callable[[DiT], tuple[Tensor, list[RoutingRecord]]],
        auxiliary: bool = True,
        scale: float = 1.0,
    ) -> None:
        """Gradients of scale * loss (+ auxiliary losses) under official names."""
        model = self.model(training=True)
        loss, routing = loss_of(model)
        total = scale * loss + (sum(auxiliary_losses(routing).values()) if auxiliary else 0)
        total.backward()
        self.put_gradients(prefix, model)

    def put_gradients(self, prefix: str, model: DiT) -> None:
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        for name, gradient in to_official(model, grads).items():
            self.put(f"{prefix}{name}", gradient)

    # DiffMoE's training mode

    def diffmoe_training(self) -> None:
        """Two steps without optimizer: losses, gradients, thresholds, then an evaluation."""
        model = self.model(training=True)
        terms = self.diffmoe_step(model, "after.", "x", "t", "y", "noise")
        records = terms.routing
        capacity = auxiliary_losses(records)["capacity"]
        loss = terms.per_sample.mean() + capacity
        loss.backward()
        self.put("out.mse", terms.per_sample)
        self.put("out.cp_loss", capacity)
        self.put("out.loss", loss)
        self.put_gradients("grad.", model)
        batch, weight = len(terms.per_sample), model.config.feed_forward.capacity_loss_weight
        for block, record in self.by_block(records):
            shape = (batch, record.num_tokens, -1)
            self.put(f"out.ones.{block}", record.capacity_targets.view(shape))
            self.put(f"out.capacity_pred.{block}", record.capacity_logits.view(shape))
            self.put(f"out.capacity_pred_loss.{block}", record.losses["capacity"] / weight)
        with torch.no_grad():
            self.diffmoe_step(model, "after2.", "x2", "t2", "y2", "noise2")
            self.put("out.eval_after2", model.eval()(*self.inputs("x", "t", "y")).prediction)

    def diffmoe_step(self, model: DiT, prefix: str, *names: str) -> LossTerms:
        x, t, y, noise = self.inputs(*names)

        def noted(*inputs: Tensor) -> ModelOutput:
            output = model(*inputs)
            self.put("out.model", output.prediction) if prefix == "after." else None
            return output

        terms = Flow().losses_at(noted, x, y, t, noise)
        router_state.update(model, [terms.routing], self.alone)
        self.put_state(prefix, model)
        return terms

    def put_state(self, prefix: str, model: DiT) -> None:
        for name, value in to_official(model).items():
            self.put(f"{prefix}{name}", value)

    def capacity_schedule(self) -> None:
        """The model at several training steps, each from the recorded thresholds."""
        x, t, y = self.inputs("x", "t", "y")
        for step in self.config["training_iters"]:
            model = self.model(training=True)
            with torch.no_grad():
                output = model(x, t, y, step=step)
            capacity = model.config.feed_forward.capacity_at(step)
            self.put(f"out.capacity.it{step}", torch.tensor(capacity))
            self.put(f"out.k.it{step}", output.routing[0].plan.tokens_per_expert)
            self.put(f"out.model.it{step}", output.prediction)
            router_state.update(model, [output.routing], self.alone)
            self.put_state(f"after.it{step}.", model)

    def two_ranks(self) -> None:
        """The pools of both ranks, one after the other; thresholds from their mean quantiles."""
        model = self.model(training=True)
        x, t, y = self.inputs("x", "t", "y")
        outputs = []
        with torch.no_grad():
            for part in torch.arange(len(x)).chunk(self.config["world_size"]):
                outputs.append(model(x[part], t[part], y[part]))
        self.put("out.model", torch.cat([output.prediction for output in outputs]))
        router_state.update(model, [output.routing for output in outputs], self.alone)
        self.put_state("after.", model)
        for i, block in enumerate(model.config.moe_blocks()):
            parts = [output.routing[i] for output in outputs]
            masks = [r.capacity_targets.view(-1, r.num_tokens, r.counts.shape[1]) for r in parts]
            self.put(f"out.ones.{block}", torch.cat(masks))

    # JiT's denoiser

    def flow(self) -> Flow:
        """The objective of a denoiser's arguments."""
        given = self.config["denoiser"]
        return Flow(
            FlowConfig(
                prediction="x",
                loss_weighting="velocity",
                t_eps=given["t_eps"],
                time_distribution="logit_normal",
                time_mean=given["P_mean"],
                time_std=given["P_std"],
                noise_scale=given["noise_scale"],
            )
        )

    def denoiser(self) -> None:
        """out.net*, out.x_pred, out.loss, out.t_from_normal, out.generate*, grad.*."""
        x, y, t, noise, normal = self.inputs("x", "y", "t", "noise", "sample_t_normal")
        flow, kept = self.flow(), []
        uniform = torch.special.ndtr(normal.double())
        self.put("out.t_from_normal", flow.time_of(uniform))

        def loss(model: DiT) -> tuple[Tensor, list[RoutingRecord]]:
            def noted(*inputs: Tensor) -> ModelOutput:
                kept.append(model(*inputs))
                return kept[-1]

            terms = flow.losses_at(noted, x, y, t, noise)
            self.put("out.loss", terms.per_sample.mean())
            return terms.per_sample.mean(), terms.routing

        self.gradients("grad.", loss)
        self.put("out.x_pred", kept[0].prediction)  # of the noisy images
        with torch.no_grad():
            self.forward("net", self.model(training=False), x, t, y)  # of the clean ones
        self.generation(flow)

    def generation(self, flow: Flow) -> None:
        """Samples from given noise; scale and interval of the full one are in the README."""
        given = self.config["denoiser"]
        model = self.model(training=False)
        z, y = self.inputs("z", "z_y")
        own = given["cfg"], (given["interval_min"], given["interval_max"])
        for name, *method in self.keys("out.generate"):
            scale, interval = (2.5, (0.0, 1.0)) if name == "_full_interval" else own
            settings = SamplingConfig(
                sampler="heun_euler" if method == ["heun"] else "euler",
                num_steps=given["num_sampling_steps"],
                cfg_scale=scale,
                cfg_interval=interval,
            )
            guided = Guided(model, model.null_condition, settings)
            with torch.no_grad():
                found = flow.sample(guided, z, y, settings, None)
            self.put(f"out.generate{name}.{method[0]}", found)
