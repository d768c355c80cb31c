"""Small random models that draw, for tests of what is built on them."""

import dataclasses
import threading
from pathlib import Path

import torch

from config.model import ModelConfig
from config.objective import SamplingConfig
from config.schema import Config, DataConfig
from data.vae import PixelSpace
from models.build import build_model
from models.pretrained import Pretrained
from sampling.pipeline import Pipeline


def made(layer, name="random", **config):
    """A pipeline of pixels around a random model, whose experts take very different tokens."""
    torch.manual_seed(0)
    shape = {"input_size": 4, "patch_size": 1, "hidden_size": 16, "depth": 2, "num_heads": 2}
    options = ModelConfig(**shape, moe_every=1, in_channels=3, num_classes=3, feed_forward=layer)
    options = dataclasses.replace(options, learn_sigma=bool(config))
    model = build_model(options).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for key, buffer in model.named_buffers():
        if key.endswith("thresholds"):
            buffer.fill_(0.4)
    settings = SamplingConfig(sampler=None if config else "euler", num_steps=3, cfg_scale=2.0)
    data = DataConfig(vae_path=None, image_size=4, source="images", data_path="there")
    whole = Config(data=data, model=options, sampling=settings, **config)
    state = {"step": 7, "latents": None}
    pretrained = Pretrained(whole, state, Path("runs") / name, model)
    return Pipeline(pretrained, PixelSpace(), None, torch.device("cpu"))


def at_work() -> int:
    """Threads that sample for a stream."""
    return sum(thread.name == "sampling" for thread in threading.enumerate())
