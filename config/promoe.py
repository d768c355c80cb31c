"""Options of ProMoE."""

from dataclasses import dataclass
from typing import Literal

from config.layers import MoEConfig


@dataclass
class ProMoEConfig(MoEConfig):
    """Prototypes (ProMoE): experts by cosine, and one for samples without a condition.

    Attributes:
        name: which feed-forward layer.
        choice: every `token` takes its top experts, or every `expert` its top tokens of a sample.
        top_k: experts per token; on average, where experts choose.
        score: weight of an expert: the cosine itself (`identity`), its sigmoid, or a softmax over
            the experts (where experts choose: over the tokens of the sample).
        unconditional_expert: one expert more, to which samples without class and caption go whole.
        contrastive_loss_weight: weight of the loss that draws each prototype to the mean of its
            expert's tokens and away from those of the others; 0 turns it off.
        contrastive_temperature: that the cosines of this loss are divided by.
        contrastive_top_k: a token belongs to all experts that it takes there, else to its first.
        balance_loss_weight: weight of a load-balancing loss of token choice; 0 turns it off.
        balance_per_sample: balance the load within each sample.
    """

    name: Literal["promoe"] = "promoe"
    choice: Literal["token", "expert"] = "token"
    top_k: int = 1
    score: Literal["identity", "sigmoid", "softmax"] = "identity"
    unconditional_expert: bool = True
    contrastive_loss_weight: float = 1.0
    contrastive_temperature: float = 0.07
    contrastive_top_k: bool = True
    balance_loss_weight: float = 0.0
    balance_per_sample: bool = False

    def experts_per_token(self) -> float:
        """K; the tokens of samples without a condition have one expert."""
        return float(self.top_k)

    def gate_sum(self) -> str:
        """Of the softmax over all experts, if a token takes all; an expert alone weighs one."""
        everywhere = self.choice == "token" and self.top_k == self.num_experts
        return "one" if everywhere and self.score == "softmax" else "the scores of its experts"

    def all_experts(self) -> int:
        """With that of samples without a condition."""
        return self.num_experts + self.unconditional_expert
