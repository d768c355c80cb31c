"""What is left behind when training stops at numbers that are not finite."""

import json
import shutil
from pathlib import Path

from core.distributed import Processes
from core.errors import UserError
from core.files import begin_folder, finish_folder
from training.checkpoint import TrainingState
from training.parallel import local
from training.parts import write_now
from training.step import StepResult

MOST = 99
"""Dumps of one step that are kept: a run may come back to it."""


def dump_nonfinite(state: TrainingState, result: StepResult, processes: Processes) -> str:
    """Write weights and facts to <run_dir>/nonfinite_step_<step>; all processes call this.

    Returns:
        Where they are, or why they are nowhere: the cause is said with it and must not be hidden.
    """
    bad = processes.gather(_bad_parameters(state))
    temporary, reason = None, ""
    folder = _free_name(Path(state.config.run_dir) / f"nonfinite_step_{state.step:07d}")
    if processes.is_main:
        try:
            temporary = begin_folder(folder)
        except (OSError, UserError) as error:
            reason = str(error)
    temporary = processes.from_main(temporary)
    if temporary is not None:
        reason = _fill(temporary, folder, state, result, sorted(set().union(*bad)), processes)
    return f"no weights could be kept: {reason}" if reason else f"weights and facts are in {folder}"


def _fill(
    temporary: Path,
    folder: Path,
    state: TrainingState,
    result: StepResult,
    bad: list[str],
    processes: Processes,
) -> str:
    """Why the folder could not be filled; nothing if it was."""
    reason = ""
    facts = {
        "step": state.step,
        "losses": {n: str(v.item()) for n, v in result.losses.items()},
        "grad_norm": str(result.grad_norm.item()),
        "parameters_with_nonfinite_gradient": bad,
    }
    try:
        write_now(state.model, temporary, "model", processes)
    except OSError as error:
        reason = error.strerror or str(error)
    reason = "; ".join(filter(None, processes.gather(reason)))
    if processes.is_main:
        try:
            if not reason:
                (temporary / "facts.json").write_text(json.dumps(facts, indent=2))
                finish_folder(temporary, folder)
        except OSError as error:
            reason = error.strerror or str(error)
        shutil.rmtree(temporary, ignore_errors=True)
    return processes.from_main(reason)


def _bad_parameters(state: TrainingState) -> list[str]:
    """Parameters whose gradient, or this process's part of it, is not finite."""
    named = [(name, p.grad) for name, p in state.model.named_parameters() if p.grad is not None]
    grads = local(grad for _, grad in named)
    return [name for (name, _), g in zip(named, grads, strict=True) if not g.isfinite().all()]


def _free_name(folder: Path) -> Path:
    """The folder, or its first number that is free."""
    numbered = (folder.with_name(f"{folder.name}.{n}") for n in range(2, MOST + 1))
    return next((path for path in (folder, *numbered) if not path.exists()), folder)
