"""Options of Expert Race."""

from dataclasses import dataclass
from typing import Literal

from config.layers import MoEConfig

Pool = Literal["batch", "sample", "position", "token", "expert_batch", "expert_sample"]


@dataclass
class RaceConfig(MoEConfig):
    """Expert Race (Yuan et al. 2025): all tokens and all experts compete in one top-k.

    Attributes:
        name: which feed-forward layer.
        top_k: experts of a token on average, k: the race takes k pairs for each token.
        pool: which (token, expert) pairs compete in one top-k (Table 6): those of the whole
            `batch` (the race), of one `sample` (LE), of one `position` in the image over the
            batch (BE), of one `token` (token choice), or of one expert, with the tokens of the
            batch (`expert_batch`, BL) or of a sample (`expert_sample`, expert choice).
        gate: what a logit becomes, for the race and as the weight of the expert: itself
            (`identity`), its `sigmoid`, or the `softmax` over the experts.
        inference: in evaluation take all pairs that reach the learned `threshold`, or the `topk`
            of the pool, as in training.
        threshold_decay: weight of the old threshold in one step.
        similarity_loss_weight: weight of the router similarity loss of each layer; 0 turns it
            off. Ours: the paper's is not known.
        plr_loss_weight: weight of the per-layer regularisation, with which a second head of the
            router predicts the training target; 0 leaves the head out. Ours likewise.
    """

    name: Literal["race"] = "race"
    top_k: int = 2
    pool: Pool = "batch"
    gate: Literal["identity", "sigmoid", "softmax"] = "identity"
    inference: Literal["threshold", "topk"] = "threshold"
    threshold_decay: float = 0.95
    similarity_loss_weight: float = 1e-4
    plr_loss_weight: float = 1e-2

    def experts_per_token(self) -> float:
        """K."""
        return float(self.top_k)

    def gate_sum(self) -> str:
        """Of the softmax over all experts, if a token takes all."""
        everywhere = self.gate == "softmax" and self.top_k == self.num_experts
        return "one" if everywhere else "the scores of those that it wins"

    def pools_batch(self) -> bool:
        """Where pairs of several samples compete in training."""
        return self.pool in ("batch", "position", "expert_batch")

    def sampling_sees_batch(self) -> bool:
        """Not by thresholds."""
        return self.inference == "topk" and self.pools_batch()
