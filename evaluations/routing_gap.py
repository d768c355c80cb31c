"""python -m evaluations.routing_gap --ckpt RUN --classes 207,360 [FLAGS]

Static against dynamic routing where nothing but one sample shares the pool (as Fig. 6): the same
noise and classes at batch size 1, above with every expert taking its top tokens, below with the
capacity predictor deciding. The picture lies in the folder of the run. FLAGS are those of
sample_ddp.py, but for what this decides.
"""

import argparse

import torch
from torch import Tensor

from core.distributed import NO_HURRY, Processes, processes
from core.errors import ConfigError, command
from core.logging import get_logger
from evaluations.features import open_npz
from evaluations.sampled import SCORING, flags_parser
from sampling.command import sample_set
from sampling.grid import image_grid, save_png
from sampling.marks import check_file
from sampling.needs import refuse_typed
from sampling.request import Request, request_of
from sampling.sets import SetFolder, read_set, shared_name

RULES = ("topk", "dynamic")
DECIDED = {
    **{"per_proc_batch_size": 1, "num_per_class": 1, "num_per_prompt": 1},
    **{"save": "npz", "capacity": False},
}
OTHERS = ("inference", "fixed_threshold", "num_fid_samples", "labels", "metrics", *SCORING)
"""Flags that are of no use, beside those of DECIDED."""


def _parse() -> argparse.Namespace:
    parser = flags_parser("evaluations.routing_gap", __doc__)
    parser.hide(*DECIDED, *OTHERS)
    parser.require("ckpt")
    flags = parser.parse_args()
    if (flags.classes, flags.prompt, flags.prompts) == (None, None, None):
        raise ConfigError("--classes: needed, such as 207,360; of a model of text --prompt TEXT")
    refuse_typed(flags, (*DECIDED, *OTHERS), "does nothing here; the program decides it")
    return flags


def _requests(flags: argparse.Namespace, group: Processes) -> list[Request]:
    """The set of each rule; --inference-capacity is for top-k alone."""
    found = []
    for rule in RULES:
        own = DECIDED | {"inference": rule}
        if rule != "topk":
            own |= {"inference_capacity": None, "typed": flags.typed - {"inference_capacity"}}
        found.append(request_of(argparse.Namespace(**vars(flags) | own), group.device))
    return found


def _images(folder: SetFolder) -> Tensor:
    """(N, H, W, 3) uint8 of a finished set."""
    check_file(folder.archive, read_set(folder.path)[1])
    with open_npz(folder.archive) as file:
        return torch.from_numpy(file.read("arr_0"))


@command
def main() -> None:
    """Parse the command line, sample both ways and write one picture."""
    flags = _parse()
    with processes(flags.device, cpu_threads=1, timeout=NO_HURRY) as group:
        requests = _requests(flags, group)
        folders = [sample_set(request, group) for request in requests]
        if group.is_main:
            name = shared_name([folder.path.name for folder in folders])
            path = folders[0].path.parent / f"routing_gap-{name}.png"
            rows = [_images(folder) for folder in folders]
            save_png(image_grid(torch.cat(rows), columns=len(rows[0])), path)
            get_logger("evaluations.routing_gap").info("%s: above %s, below %s", path, *RULES)


if __name__ == "__main__":
    main()
