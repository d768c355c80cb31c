"""python scripts/quickstart_facts.py quickstart

What the quickstart needs to know of a config: folder of the run, steps, `latents`, `pixels` or
`text`, and guidance.
"""

import sys

from config.files import find_config
from config.load import load_config
from core.errors import UserError, command


@command
def main() -> None:
    """Print the facts of the config that the command line names."""
    if len(sys.argv) != 2:
        raise UserError("quickstart_facts: wanted: one config, such as quickstart")
    path = find_config(sys.argv[1])
    config = load_config(path)
    wanted = f"runs/{path.stem}/train"
    if not path.stem.startswith("quickstart") or config.run_dir != wanted:
        raise UserError(
            f"--config: {path}: run_dir is {config.run_dir}, the quickstart wants {wanted}, and a "
            "file named quickstart_NAME.yaml"
        )
    kind = "pixels" if config.data.vae_path is None else "latents"
    kind = kind if config.model.text_hidden_size is None else "text"
    facts = config.run_dir, config.train.max_steps, kind, f"{config.sampling.cfg_scale:g}"
    sys.stdout.write(" ".join(map(str, facts)) + "\n")


if __name__ == "__main__":
    main()
