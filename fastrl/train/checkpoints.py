"""Run folders and checkpoints: whole or absent, never half-written; safetensors and JSON only."""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastrl.files import write_folder, write_whole
from fastrl.train import config as cfg
from fastrl.train import parallel
from fastrl.train.optimizer import Optimizer
from fastrl.train.recipe import dump_config, load_recipe

FORMAT = "fastrl-checkpoint"
VERSION = 2
ADVICE = "delete that folder to continue from the one before"


class CheckpointError(RuntimeError):
    """A run folder or checkpoint that is missing, damaged, not fastrl's or cannot be written."""


@dataclass(frozen=True)
class Progress:
    """Where a run stands: `step` counts over all stages, `stage_step` within `stage`."""

    step: int = 0
    stage: str = ""
    stage_step: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0


def create_run(folder: Path, config: cfg.Config) -> None:
    """Make a new run folder that holds the resolved recipe.

    Raises `CheckpointError` if it exists.
    """
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise CheckpointError(
            f"run folder {str(folder)!r} already exists; choose another with --out, or "
            f"continue it with --resume"
        ) from None
    # config.yaml last: where it is, the run can be resumed.
    write_whole(folder / "inputs.json", json.dumps(_inputs(config), indent=1).encode())
    write_whole(folder / "config.yaml", dump_config(config).encode())


def _inputs(config: cfg.Config) -> dict[str, str]:
    files = (config.data.train_file, config.data.eval_file)
    return {str(path): _digest(path) for path in files if path is not None}


def open_run(folder: Path) -> cfg.Config:
    """The recipe of an existing run; raises `CheckpointError` for a folder that is not a run's."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise CheckpointError(f"{str(folder)!r} is not a fastrl run: it holds no config.yaml")
    return load_recipe(str(path))


def check_inputs(folder: Path, config: cfg.Config) -> None:
    """Raise `CheckpointError` where a data file changed since the run began, or is gone."""
    try:
        began_with = json.loads((folder / "inputs.json").read_text())
        changed = [n for n, digest in _inputs(config).items() if began_with.get(n) != digest]
    except (OSError, json.JSONDecodeError) as error:
        raise CheckpointError(f"run {str(folder)!r} cannot go on: {error}") from None
    if changed:
        raise CheckpointError(
            f"{', '.join(changed)} changed since the run began; a resumed run would be another one"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes, by name."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def save_weights(weights: dict[str, Tensor], path: Path) -> None:
    """Parameters by name as safetensors."""
    save_file({n: p.contiguous() for n, p in weights.items()}, path)


@torch.no_grad()
def load_weights(current: dict[str, Tensor], path: Path) -> None:
    """Take over what `save_weights` wrote.

    Raises `CheckpointError` where names or shapes differ.
    """
    try:
        saved = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"cannot read {str(path)!r}: {error}") from None
    if saved.keys() != current.keys() or any(saved[n].shape != p.shape for n, p in current.items()):
        raise CheckpointError(f"{str(path)!r} holds the weights of another model")
    for name, parameter in current.items():
        parameter.copy_(parallel.like(saved[name], parameter))


def save(
    folder: Path,
    progress: Progress,
    networks: dict[str, dict[str, Tensor]],
    optimizers: dict[str, Optimizer],
    keep: int,
) -> Path:
    """Write `folder/checkpoints/step-N`, then delete all but the newest `keep`.

    It holds the weights of every network and the state of every optimizer, by name, whole: a run
    may go on with another number of processes.
    """
    weights = {name: parallel.collect(tensors) for name, tensors in networks.items()}
    states = {name: parallel.collect(o.state()) for name, o in optimizers.items()}

    def fill(temporary: Path) -> None:
        for name, tensors in weights.items():
            save_weights(tensors, temporary / f"{name}.safetensors")
        for name, tensors in states.items():
            save_file(tensors, temporary / f"{name}.optimizer.safetensors")
        files = {
            p.name: {"bytes": p.stat().st_size, "sha256": _digest(p)} for p in temporary.iterdir()
        }
        state = {"format": FORMAT, "version": VERSION, "progress": asdict(progress), "files": files}
        (temporary / "state.json").write_text(json.dumps(state, indent=1))

    target = folder / "checkpoints" / f"step-{progress.step:08d}"

    def write() -> None:
        write_folder(target, fill)
        for old in _saved(folder)[:-keep]:
            shutil.rmtree(old)

    parallel.first(write)
    return target


def _saved(folder: Path) -> list[Path]:
    return sorted((folder / "checkpoints").glob("step-*"))


def latest(folder: Path) -> Path | None:
    """The newest checkpoint of a run, or None before the first."""
    saved = _saved(folder)
    return saved[-1] if saved else None


def final(run: Path, network: str) -> Path:
    """Where a run's end leaves a model: `final`, or `final-NAME` of a scoring model."""
    return run / ("final" if network == "policy" else f"final-{network}")


def step_of(checkpoint: Path) -> int:
    """The step of the run that a checkpoint was saved after, by its name."""
    return int(checkpoint.name.removeprefix("step-"))


def read_progress(checkpoint: Path) -> Progress:
    """Check a checkpoint against its list of files.

    Raises `CheckpointError` naming what is wrong with it.
    """
    path = checkpoint / "state.json"
    try:
        state = json.loads(path.read_text())
        if state["format"] != FORMAT:
            raise KeyError
        if state["version"] != VERSION:
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} has version {state['version']}, this fastrl "
                f"reads {VERSION}"
            )
        files, progress = state["files"], Progress(**state["progress"])
    except (OSError, json.JSONDecodeError, KeyError, TypeError):
        raise CheckpointError(
            f"{str(checkpoint)!r} is not a fastrl checkpoint: no readable state.json; {ADVICE}"
        ) from None
    for name, expected in files.items():
        part = checkpoint / name
        if not part.is_file() or part.stat().st_size != expected["bytes"]:
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} is truncated: {name} is not whole; {ADVICE}"
            )
        if _digest(part) != expected["sha256"]:
            raise CheckpointError(
                f"checkpoint {str(checkpoint)!r} is damaged: {name} has another checksum; {ADVICE}"
            )
    return progress


def load_optimizer(checkpoint: Path, name: str, optimizer: Optimizer) -> None:
    """Take over the optimizer state of a checkpoint.

    Raises `CheckpointError` if it is another model's.
    """
    try:
        optimizer.load(load_file(checkpoint / f"{name}.optimizer.safetensors"))
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{str(checkpoint)!r} holds another model's optimizer state: {error}"
        ) from None
