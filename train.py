"""Train a model on cached latents.

torchrun --nproc_per_node=4 train.py --config config/000_DiffMoE_S_E16_Flow.yaml
python train.py --config config/quickstart.yaml --optim.lr 1e-3 --resume auto
"""

import sys

from config.load import parse_config
from config.validate import check_memory
from core.distributed import processes, world_size
from core.errors import command
from training.trainer import train


@command
def main() -> None:
    """Parse the command line and train."""
    config = parse_config(sys.argv[1:], "train.py", world_size())
    check_memory(config, world_size())
    with processes(config.device, timeout=config.train.timeout) as all_processes:
        train(config, all_processes)


if __name__ == "__main__":
    main()
