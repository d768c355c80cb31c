"""The live demo: a page around `sampling.pipeline`, without model code of its own."""
