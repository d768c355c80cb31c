"""torchrun --nproc_per_node=2 tests/golden/two_ranks.py CASE.safetensors OUT

Each rank routes its half of the recorded batch; thresholds are reduced over both.
"""

import sys
from pathlib import Path

import torch
from adapter import load_case
from models_cases import ModelCase
from safetensors.torch import save_file

from core.distributed import processes
from published.weights import to_official
from training import router_state

if __name__ == "__main__":
    tensors, config, metadata = load_case(sys.argv[1])
    model = ModelCase(tensors, config, metadata).model(training=True)
    with processes("cpu") as group, torch.no_grad():
        mine = torch.arange(len(tensors["in.x"])).chunk(group.world_size)[group.rank]
        output = model(*(tensors[f"in.{name}"][mine] for name in ("x", "t", "y")))
        router_state.update(model, [output.routing], group)
        result = to_official(model) | {"out.model": output.prediction}
        save_file(result, Path(sys.argv[2]) / f"rank{group.rank}.safetensors")
