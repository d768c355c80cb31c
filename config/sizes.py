"""The named sizes of the backbone: DiT's, and those of Table 1, which use the same widths."""

SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "M": {"hidden_size": 960, "depth": 16, "num_heads": 16},  # Expert Race's
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
    # The paper prints only the parameter counts of these two (951M, 1353M); shapes inferred.
    "XXL": {"hidden_size": 1280, "depth": 32, "num_heads": 16},
    "XXXL": {"hidden_size": 1440, "depth": 36, "num_heads": 16},
    "G": {"hidden_size": 1408, "depth": 40, "num_heads": 16},  # of DiT-MoE
    # Of the text-to-image models only 1.2B activated of 4.6B are printed. This shape gives 1.25B of
    # 4.60B with cross-attention (q, k, v and output, D to D) in every block and two MLPs from
    # 4096 to D to D; it is inferred, and not the only one that does.
    "T2I": {"hidden_size": 1408, "depth": 28, "num_heads": 22},
}
"""`model.size: L` in a config stands for these keys; keys given beside it win."""
