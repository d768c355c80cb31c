"""Captions: read from datasets, encoded by a frozen text encoder, cached beside the latents."""
