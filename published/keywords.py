"""Keywords of the published constructors, with what they mean when left out, and the keys of their
MoE_config, with whether the constructor fails without them."""

DIT = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "learn_sigma": True,
    "head_dim": None,
    "use_swiglu": False,
    "CapacityPred_loss_weight": 0.01,
    "MoE_config": None,
}

DSMOE = DIT | {
    "rope_type": "none",
    "norm_type": "layernorm",
    "enable_gqa": False,
    "use_sinks": False,
    "sliding_window": 0,
    "use_kda": False,
    "kda_kwargs": None,
}

JIT = {
    "input_size": 256,
    "patch_size": 16,
    "in_channels": 3,
    "hidden_size": 1024,
    "depth": 24,
    "num_heads": 16,
    "mlp_ratio": 4.0,
    "num_classes": 1000,
    "bottleneck_dim": 128,
    "in_context_len": 32,
    "in_context_start": 8,
    "attn_drop": 0.0,
    "proj_drop": 0.0,
    "moe_config": None,
}

MOE_KEYS = {
    "n_shared_experts": False,
    "num_experts": True,
    "capacity": True,
    "init_MoeMLP": False,
    "interleave": False,
    "capacity_schedule": False,
}

DEEPSEEK_KEYS = {
    "num_experts": True,
    "hidden_size": False,
    "moe_intermediate_size": True,
    "n_group": True,
    "topk_group": True,
    "num_experts_per_tok": True,
    "routed_scaling_factor": True,
    "interleave": True,
    "use_shared_expert": True,
}

DSMOE_KEYS = DEEPSEEK_KEYS | {
    "skip_first2": True,
    "skip_last2": False,
    "capacity": False,
    "init_MoeMLP": False,
    "use_type": False,
    "group_bins": False,
    "local_top_p": False,
}

PROMOE = {k: v for k, v in DIT.items() if k != "CapacityPred_loss_weight"} | {"qk_norm": False}

PROMOE_KEYS = {
    "num_routed_experts": True,
    "moe_intermediate_size": True,
    "shared_expert_intermediate_size": False,
    "load_balance_loss_coef": True,
    "norm_topk_prob": False,
    "seq_aux": False,
    "use_shared_expert": True,
    "use_uncond_expert": False,
    "interleave": True,
    "init_MoeMLP": False,
    "top_k": True,
    "router_weight_mode": True,
    "routing_contrastive_lam": True,
    "use_top_k_for_routing_contrastive": True,
    "routing_contrastive_temperature": True,
}

DITMOE = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "mlp_ratio": 4,
    "class_dropout_prob": 0.1,
    "num_classes": 1000,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "pretraining_tp": 2,
    "learn_sigma": True,
    "use_flash_attn": False,
    "MoE_config": None,
}

JIT_KEYS = DEEPSEEK_KEYS | {"proj_drop": False}
