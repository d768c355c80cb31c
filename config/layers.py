"""What a run can choose about its feed-forward layers: what all share, and the two papers'."""

from dataclasses import dataclass
from typing import Literal

MLP = Literal["gelu", "silu", "swiglu", "swiglu_bias"]
"""Two layers with biases and tanh-GELU or SiLU between them, or a SwiGLU without or with biases."""


@dataclass
class DenseConfig:
    """The plain MLP of DiT in every block.

    Attributes:
        name: which feed-forward layer.
    """

    name: Literal["dense"] = "dense"

    def pools_batch(self) -> bool:
        """Whether what a sample gets depends on the others of its micro-batch."""
        return False

    def sampling_sees_batch(self) -> bool:
        """The same of evaluation."""
        return False

    def capacity_at(self, step: int) -> float | None:
        """C that a schedule asks for at optimizer step `step` (from 0); None without a schedule."""
        return None


@dataclass
class MoEConfig:
    """What all mixture-of-experts layers have.

    Attributes:
        name: which feed-forward layer.
        num_experts: experts in each MoE layer, N of the paper.
        expert_mlp: kind of the experts; by default model.mlp.
        intermediate_size: hidden width of an expert; by default that of the dense layers.
        hidden_split: into so many parts that width falls by default: as many narrow experts of a
            token cost what one wide one does.
        shared_mlp: a dense MLP that every token goes through besides, or `none`, or `identity`,
            which adds the layer's input.
        shared_intermediate_size: hidden width of the shared MLP.
        router_init: first weights of the router: as the `published` code draws them, or
            Xavier-uniform.
        router_input: what the router reads: the `modulated` tokens, as the experts do, or,
            `decoupled` from the condition, the embedding of the time and the normalised tokens
            before they are modulated (Nucleus-Image), twice as wide. The class and the text
            reach a decoupled router through the tokens only.
    """

    name: str = ""
    num_experts: int = 16
    expert_mlp: MLP | None = None
    intermediate_size: int | None = None
    hidden_split: int = 1
    shared_mlp: Literal["none", "identity"] | MLP = "none"
    shared_intermediate_size: int = 0
    router_init: Literal["published", "xavier"] = "published"
    router_input: Literal["modulated", "decoupled"] = "modulated"

    def experts_per_token(self) -> float:
        """Experts that compute a token in training, on average: C of Eq. 8.

        Every layer says it for itself; parameters at work and FLOPs follow from it.
        """
        raise NotImplementedError(f"{type(self).__name__}.experts_per_token: not said")

    def gate_sum(self) -> str:
        """What the weights of a token's experts sum to in the first step, in words.

        `one` if that is so for every token.
        """
        return "what its router says"

    def all_experts(self) -> int:
        """Experts that a layer has, those that no router chooses included."""
        return self.num_experts

    def pools_batch(self) -> bool:
        """Whether what a sample gets depends on the others of its micro-batch.

        If so, the micro-batch is a part of the experiment, and never changed silently.
        """
        return False

    def sampling_sees_batch(self) -> bool:
        """The same of evaluation, where thresholds may have taken the place of the pool."""
        return self.pools_batch()

    def capacity_at(self, step: int) -> float | None:
        """C that a schedule asks for at optimizer step `step` (from 0); None without a schedule."""
        return None


@dataclass
class TokenChoiceConfig(MoEConfig):
    """Token choice (TC-DiT, Eq. 2-3, Algorithm 2): every token takes its top-k experts.

    Attributes:
        name: which feed-forward layer.
        top_k: experts per token, K.
        balance_loss_weight: weight of the load-balancing loss of each layer; 0 turns it off.
    """

    name: Literal["token_choice"] = "token_choice"
    top_k: int = 1
    balance_loss_weight: float = 0.01

    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def gate_sum(self) -> str:
        """Affinities are shares of one over all experts."""
        return "one" if self.top_k == self.num_experts else "their affinities, below one"


@dataclass
class DeepSeekConfig(MoEConfig):
    """DeepSeek-style experts (DSMoE): sigmoid affinities, groups, balance by a bias.

    Attributes:
        name: which feed-forward layer.
        expert_mlp: kind of the experts; null: model.mlp.
        top_k: experts per token.
        num_groups: groups of equally many neighbouring experts; divides num_experts.
        top_k_groups: groups that a token chooses its experts from: those with the largest sum of
            their two best scores.
        routed_scaling_factor: factor of the weights, which sum to 1 before (for top_k above 1).
        bias_update_rate: step of the correction bias, which is added to the scores for the choice
            alone, against the sign of each expert's load error, once per optimizer step (Wang et
            al. 2024, Algorithm 1). 0 holds the bias fixed, as the published training did.
        zero_masked_groups: experts of other groups score 0 instead of being left out, so that
            they win against negative scores, as in the published code.
    """

    name: Literal["deepseek"] = "deepseek"
    expert_mlp: MLP | None = "swiglu"
    top_k: int = 2
    num_groups: int = 1
    top_k_groups: int = 1
    routed_scaling_factor: float = 1.0
    bias_update_rate: float = 0.001
    zero_masked_groups: bool = False

    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def gate_sum(self) -> str:
        """They are normalised where there are several."""
        if self.top_k == 1:
            return f"{self.routed_scaling_factor:g} times its affinity"
        scale = self.routed_scaling_factor
        return "one" if scale == 1 else f"{scale:g}"


@dataclass
class ExpertChoiceConfig(MoEConfig):
    """Expert choice (EC-DiT, Algorithm 1): every expert takes its top tokens of the pool.

    Attributes:
        name: which feed-forward layer.
        capacity: C of Eq. 8 in training and top-k inference; 1 costs what a dense layer costs.
        pool: an expert chooses among the tokens of one `sample` or of the whole `batch`.
        capacity_predictor: train a predictor of the choice (Eq. 10-13), with its thresholds.
        capacity_loss_weight: weight of the predictor's binary cross-entropy, summed over layers.
        threshold_decay: alpha of Eq. 17.
        inference: in evaluation take the top `capacity`, or as many tokens as the predictor
            puts above the `dynamic` thresholds (Eq. 14, Algorithm 4), or above the `fixed`
            threshold of all experts (Eq. 16, Table 10).
        inference_capacity: C of top-k inference where it differs from training (Table 4).
        fixed_threshold: gamma of `fixed` inference.
        capacity_schedule: steps (I, II): capacity is num_experts up to step I, falls linearly to
            `capacity` at step II and stays there. None: constant.
        rounding: of T * C / E, the tokens of an expert: `down`, or `up` as Nucleus-Image has it.
        round_share_first: tokens per expert int((T / E) * C) as in Algorithm 3, which loses a
            token for some E (7, 11, 13 ...), instead of int(T * C / E).
        scores: of the affinities, `softmax` over the experts or `sigmoid`.
        renormalise: `token` divides the weights of a token's experts by their sum, so that all
            tokens that any expert takes get as much (Nucleus-Image).
        route_scale: factor of the weights.
    """

    name: Literal["expert_choice"] = "expert_choice"
    capacity: float = 1.0
    pool: Literal["sample", "batch"] = "sample"
    capacity_predictor: bool = False
    capacity_loss_weight: float = 1.0
    threshold_decay: float = 0.95
    inference: Literal["topk", "dynamic", "fixed"] = "topk"
    inference_capacity: float | None = None
    fixed_threshold: float = 0.5
    capacity_schedule: tuple[int, int] | None = None
    rounding: Literal["down", "up"] = "down"
    round_share_first: bool = False
    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalise: Literal["none", "token"] = "none"
    route_scale: float = 1.0

    def experts_per_token(self) -> float:
        """C."""
        return self.capacity

    def gate_sum(self) -> str:
        """Where some token may have no expert, one is not reached."""
        everywhere = (self.capacity_at(0) or self.capacity) == self.num_experts
        if self.renormalise == "token":
            total = "one" if self.route_scale == 1 else f"{self.route_scale:g}"
            return total if everywhere else f"{total}, or to none where no expert takes it"
        shares = everywhere and self.scores == "softmax" and self.route_scale == 1
        return "one" if shares else "the affinities of those that take it"

    def pools_batch(self) -> bool:
        """Where the pool is the batch."""
        return self.pool == "batch"

    def capacity_at(self, step: int) -> float | None:
        """All experts at first, then down to `capacity`."""
        if self.capacity_schedule is None:
            return None
        first, second = self.capacity_schedule
        rest = min(1.0, max(0.0, (second - step) / (second - first)))
        return self.capacity + (self.num_experts - self.capacity) * rest


@dataclass
class DiffMoEConfig(ExpertChoiceConfig):
    """DiffMoE (Algorithms 3-4): expert choice over the batch, with capacity predictor.

    Attributes:
        name: which feed-forward layer.
    """

    name: Literal["diffmoe"] = "diffmoe"
    pool: Literal["sample", "batch"] = "batch"
    capacity_predictor: bool = True
    inference: Literal["topk", "dynamic", "fixed"] = "dynamic"
