"""python scripts/quickstart_facts.py config/quickstart.yaml

What the quickstart needs to know of a config: folder of the run, steps, and `latents` or `pixels`.
"""

import sys
from pathlib import Path

from config.load import load_config
from core.errors import command


@command
def main() -> None:
    """Print the facts of the config that the command line names."""
    config = load_config(Path(sys.argv[1]))
    space = "pixels" if config.data.vae_path is None else "latents"
    sys.stdout.write(f"{config.run_dir} {config.train.max_steps} {space}\n")


if __name__ == "__main__":
    main()
