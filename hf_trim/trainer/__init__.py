"""
The trainer: batch → per-item losses → keep decision → trimmed backward → logs.

- The whole way: `trainer.py`, for one mini-batch `trimmed_loss.py`; `functional.py` for a training loop of your own.
- 1. batch: `arguments.py` (settings), `checks.py` (what is refused), `checkpoints.py` (resuming); `dataset_scope.py`
  (epochs that have a part of the data set).
- 2. per-item losses: `loss_pass.py` (through `compute_loss` and the model), `losses.py` (where they are caught),
  `loss_functions.py` (losses outside of the model), `lm_head.py`.
- 3. keep decision: `schedule.py` (how many: p), `ranking.py` (by what), `selection.py` (which), `batch.py` (of all
  calls of a mini-batch), `step_choice.py` (mini-batches of one sample), `process_group.py` (several processes).
- 4. trimmed backward: `hf_trim/backward`.
- 5. logs: `logs.py`.
- After it, with `trim_memory`: `indices.py` (which samples a mini-batch has), `sample_losses.py` (what it shows of
  them), `memory.py` (the table), `remembering.py` (the trainer's part).
"""

from hf_trim.trainer.arguments import TrimmingArguments, TrimmingConfig
from hf_trim.trainer.functional import trimmed_linear_cross_entropy, trimmed_mean
from hf_trim.trainer.losses import mark_losses
from hf_trim.trainer.memory import SampleMemory
from hf_trim.trainer.schedule import linear_fraction
from hf_trim.trainer.selection import select_items
from hf_trim.trainer.trainer import TrimmingMixin, TrimmingTrainer


__all__ = [
    "SampleMemory",
    "TrimmingArguments",
    "TrimmingConfig",
    "TrimmingMixin",
    "TrimmingTrainer",
    "linear_fraction",
    "mark_losses",
    "select_items",
    "trimmed_linear_cross_entropy",
    "trimmed_mean",
]
