"""Where an interrupted training goes on."""

import json
import logging
from pathlib import Path

from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR


logger = logging.getLogger(__name__)


def last_complete_checkpoint(output_dir: str | Path) -> str | None:
    """
    The newest checkpoint that was written to its end. `Trainer` writes the trainer state last, so that a checkpoint
    that was cut off, e.g. by a kill, has none or a torn one; it is passed over and the log says so.

    Args:
        output_dir (`str` or `Path`): The folder of the checkpoints.

    Returns:
        `str` or `None`: The checkpoint's folder; `None` if there is none.
    """
    found = Path(output_dir).glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    steps = {int(path.name.rsplit("-", 1)[1]): path for path in found if path.name.rsplit("-", 1)[1].isdigit()}
    for step in sorted(steps, reverse=True):
        try:
            if TrainerState.load_from_json(str(steps[step] / "trainer_state.json")).global_step == step:
                return str(steps[step])
        except (OSError, TypeError, json.JSONDecodeError, UnicodeDecodeError):
            pass
        logger.warning("%s is not complete: the checkpoint before it is used.", steps[step])
    return None


def load_converted_weights(model: nn.Module, folder: str | Path) -> None:
    """
    Load weights that `save_pretrained` renamed. It writes some models, ViT among them, in the layout of their first
    release; `Trainer` loads a checkpoint without translating it back, warns of missing keys and goes on with fresh
    weights in their place (huggingface/transformers#48805). Does nothing where the names fit.

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
