"""python -m evaluations.routing_gap --ckpt RUN --classes 207,360,... [FLAGS]

Static against dynamic routing where nothing but one sample shares the pool (as Fig. 6): the same
noise and classes at batch size 1, above with every expert taking its top tokens, below with the
capacity predictor deciding. FLAGS are those of sample_ddp.py.
"""

import argparse

import torch

from core.distributed import NO_HURRY, processes
from core.errors import UserError, command
from core.logging import get_logger
from evaluations.sampled import parse_flags
from sampling.command import sample_from_checkpoint
from sampling.grid import image_grid, save_png

RULES = ("topk", "dynamic")


@command
def main() -> None:
    """Parse the command line, sample both ways and write one picture."""
    flags = parse_flags()
    if flags.classes is None:
        raise UserError("--classes: needed, the columns of the picture, such as 207,360,387")
    with processes(flags.device, cpu_threads=1, timeout=NO_HURRY) as group:
        rows = []
        for rule in RULES:
            own = {"inference": rule, "per_proc_batch_size": 1, "num_per_class": 1, "save": "none"}
            outcome = sample_from_checkpoint(argparse.Namespace(**vars(flags) | own), group)
            rows.append(None if outcome is None else outcome.result.first)
        if group.is_main:
            path = flags.sample_dir / f"{outcome.path.name}.routing_gap.png"
            save_png(image_grid(torch.cat(rows), columns=len(flags.classes)), path)
            get_logger("evaluations.routing_gap").info("%s: above %s, below %s", path, *RULES)


if __name__ == "__main__":
    main()
