"""python -m benchmarks.checkpoint --config diffmoe/S_E16_flow

How long a checkpoint stops training: written first and hashed by reading it back, hashed while it
is written, and written beside training (`train.async_checkpoint`), of which only the copy of the
state is waited for. All three write the same bytes, which is checked.
"""

import copy
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from benchmarks.measure import machine, report
from config.files import find_config
from config.load import load_config
from core.command_line import Parser, file_to_write, positive
from core.distributed import Processes
from core.errors import UserError, command
from core.files import file_hash, to_disk
from models.build import build_model
from training.checkpoint import TrainingState, save_checkpoint, saved_tensors
from training.ema import EMA
from training.optim import build_optimizer
from training.saving import CheckpointWriter

LATENTS = {
    "vae_path": "",
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
    "latent_channels": 4,
    "class_names": [],
}
WAYS = ("hashed by reading back", "hashed while written", "beside training")


def state_of(name: str, device: torch.device) -> TrainingState:
    """Model, average and moments of a config, as after a first step."""
    torch.manual_seed(0)
    config = load_config(find_config(name))
    model = build_model(config.model).to(device)
    ema = EMA(copy.deepcopy(model), config.optim.ema_decay, warmup=False)
    optimizer = build_optimizer(model, config.optim)
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return TrainingState(config, model, {"ema": ema}, optimizer, LATENTS)


def reading_back(state: TrainingState, folder: Path) -> None:
    """Write everything, then hash the files."""
    folder.mkdir(parents=True)
    for name, values in saved_tensors(state).items():
        path = folder / f"{name}.safetensors"
        save_file({key: value.detach().contiguous() for key, value in values.items()}, path)
        to_disk(path)
        file_hash(path)


def ways(state: TrainingState, out: Path) -> dict[str, Callable[[int], Callable[[], None]]]:
    """Calls that save under a number, and give a call that waits for what is left to do."""
    made = {}
    for way in WAYS[1:]:
        train = dataclasses.replace(state.config.train, async_checkpoint=way == WAYS[2])
        config = dataclasses.replace(state.config, run_dir=str(out / way), train=train)
        made[way] = dataclasses.replace(state, config=config)
    alone = Processes(0, 1, next(state.model.parameters()).device)
    writers = {way: CheckpointWriter(own.config, alone) for way, own in made.items()}
    for writer in writers.values():
        writer.reserve(saved_tensors(state))

    def first(number: int) -> Callable[[], None]:
        reading_back(state, out / WAYS[0] / "checkpoints" / f"step_{number:07d}")
        return lambda: None

    def save(way: str) -> Callable[[int], Callable[[], None]]:
        def call(number: int) -> Callable[[], None]:
            made[way].step = number
            save_checkpoint(made[way], writers[way])
            return writers[way].finish

        return call

    return {WAYS[0]: first} | {way: save(way) for way in WAYS[1:]}


def check_same(out: Path, number: int) -> None:
    """Compare the files of all ways, and let them go."""
    folders = [out / way / "checkpoints" / f"step_{number:07d}" for way in WAYS]
    for path in sorted(folders[0].glob("*.safetensors")):
        if len({file_hash(folder / path.name) for folder in folders}) > 1:
            raise UserError(f"checkpoint: {path.name} is not the same in all ways")
    for path in (file for folder in folders for file in folder.iterdir()):
        path.unlink()


@command
def main() -> None:
    """Parse the command line, measure and print."""
    parser = Parser("benchmarks.checkpoint", __doc__)
    parser.add_argument("--config", default="diffmoe/S_E16_flow", help="name or file")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="of the state")
    parser.add_argument("--repeats", type=positive, default=5, help="rounds; medians are shown")
    parser.add_argument("--folder", type=Path, help="where to write; default: a temporary one")
    parser.add_argument("--out", type=file_to_write, help="JSON file to write")
    flags = parser.parse_args()
    state = state_of(flags.config, torch.device(flags.device))
    stopped: dict[str, list[float]] = {way: [] for way in WAYS}
    done: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        calls = ways(state, Path(folder))
        for number in range(flags.repeats + 1):
            turn = number % len(WAYS)  # what was written before slows a disk down
            for way in (*WAYS[turn:], *WAYS[:turn]):
                began = time.perf_counter()
                wait = calls[way](number)
                stop = time.perf_counter() - began
                wait()
                if number > 0:  # the first one waits for memory and finds an idle disk
                    stopped[way].append(stop)
                    done[way].append(time.perf_counter() - began)
            check_same(Path(folder), number)
    base = statistics.median(stopped[WAYS[0]])
    rows = [
        {
            "way": way,
            "training stops": statistics.median(stopped[way]) / base,
            "on the disk after": statistics.median(done[way]) / base,
        }
        for way in WAYS
    ]
    size = sum(t.nbytes for m in state.modules().values() for t in m.state_dict().values())
    settings = machine(torch.device(flags.device)) | {"config": flags.config, "bytes": 2 * size}
    report(f"{flags.config}: a checkpoint, as shares of the first row", rows, settings, flags.out)


if __name__ == "__main__":
    main()
