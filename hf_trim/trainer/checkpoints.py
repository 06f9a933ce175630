"""
Before step 1 of: batch → per-item losses → keep decision → trimmed backward → logs.

The checkpoint from which an interrupted training goes on: which one can be read, and how its weights are loaded.
"""

import json
import logging
import pickle
import zipfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel, TrainerState

from hf_trim._compat import PREFIX_CHECKPOINT_DIR, safe_globals


logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest complete checkpoint. One that was cut off, by a kill or a full disk, or whose files are damaged, is
    passed over, and the log says so.

    Args:
        output_dir (`str` or `Path`): The folder of the checkpoints.

    Returns:
        `str` or `None`: The checkpoint's folder; `None` if there is none.
    """
    steps = {}
    for folder in Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        number = folder.name.rsplit("-", 1)[1]
        if number.isdigit():
            steps[int(number)] = folder
    for step, folder in sorted(steps.items(), reverse=True):
        defect = _find_defect(folder, step)
        if defect is None:
            return str(folder)
        logger.warning("%s is not complete (%s): the checkpoint before it is used.", folder, defect)
    return None


def check_checkpoint(folder: str | Path) -> None:
    """
    Args:
        folder (`str` or `Path`): A checkpoint's folder.

    Raises:
        `ValueError`: If there is no complete checkpoint in it.
    """
    number = Path(folder).name.rsplit("-", 1)[-1]
    if not Path(folder).is_dir():
        others = [path.name for path in sorted(Path(folder).parent.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))]
        hint = f" Beside it are {', '.join(others)}." if others else ""
        raise ValueError(f"resume_from_checkpoint: there is no folder {folder}.{hint}")
    defect = _find_defect(Path(folder), int(number) if number.isdigit() else None)
    if defect is not None:
        raise ValueError(f"resume_from_checkpoint: {folder} is no complete checkpoint ({defect}): choose another.")


def _find_defect(folder: Path, step: int | None) -> str | None:
    """What is wrong with a checkpoint. Only what torch knows to be plain data is unpickled."""
    try:
        # `Trainer` writes it last.
        saved = TrainerState.load_from_json(str(folder / "trainer_state.json")).global_step
        if step is not None and saved != step:
            return "trainer_state.json is of another step"
    except (OSError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
        return "trainer_state.json is missing or torn"
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):  # compares the size of the file with that of its tensors
                pass
        except (OSError, SafetensorError) as error:
            return f"{path.name}: {error}"
    for path in sorted([*folder.glob("optimizer.pt"), *folder.glob("scheduler.pt"), *folder.glob("rng_state*.pth")]):
        try:
            with zipfile.ZipFile(path) as archive:
                damaged_file = archive.testzip()
            if damaged_file:
                return f"{path.name}: {damaged_file} is damaged"
            with safe_globals():
                torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (OSError, zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError) as error:
            return f"{path.name}: {str(error).splitlines()[0]}"
    return None


def load_converted_weights(model: nn.Module, folder: str | Path) -> None:
    """
    Load weights that `save_pretrained` has renamed. It writes some models, ViT among them, with the names of their
    first release. `Trainer` does not translate these names back when it loads a checkpoint: it warns of missing keys
    and goes on with fresh weights in their place (huggingface/transformers#48805). Does nothing where the names fit.

    Args:
        model (`torch.nn.Module`): The model whose checkpoint `Trainer` has just loaded.
        folder (`str` or `Path`): The checkpoint's folder.
    """
    if not isinstance(model, PreTrainedModel):
        return
    saved = set()
    for file in Path(folder).glob("model*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            saved.update(tensors.keys())
    if not saved <= model.state_dict().keys():
        loaded = type(model).from_pretrained(folder, config=model.config, dtype=model.dtype)
        model.load_state_dict(loaded.state_dict())
