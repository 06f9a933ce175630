"""
After step 5 of: batch → per-item losses → keep decision → trimmed backward → logs.

The part of the trainer that remembers losses (`trim_memory=True`): from the data loader, which yields the indices of
the samples (`indices.py`), over what each mini-batch shows of them (`sample_losses.py`), to the table (`memory.py`).
For example, a mini-batch of the samples 7 and 2: their losses stay on the device until a log, a checkpoint or the end
of the epoch is due. Then all processes tell each other what they have seen, and each has the same table.
"""

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer

from hf_trim._compat import has_length
from hf_trim.backward._torch_internals import around
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.indices import IndexedDataset, PlainBatches, add_indices, take_indices
from hf_trim.trainer.memory import SampleMemory
from hf_trim.trainer.process_group import host_columns


if TYPE_CHECKING:
    TrainerBase = Trainer
else:
    TrainerBase = object  # the trainer is named beside the mixin, and comes after it

MOST_STEPS = 500  # of which losses wait on the device, where nothing is logged
NEEDS = "trim_memory and trim_scope='dataset' need"
LEAVE_OUT = "or train without these."
UNKNOWN_LOADER = (
    f"{NEEDS} to know which samples the data loader of {{}} yields: let get_train_dataloader return a torch "
    f"DataLoader of self.train_dataset itself, in mini-batches, {LEAVE_OUT}"
)


class RememberingMixin(TrainerBase):
    """The part of [`~hf_trim.trainer.trainer.TrimmingMixin`] that remembers the losses of each sample."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._memory: SampleMemory | None = None
        self._step_indices: list[list[int] | None] = []  # of the samples of the optimizer step's mini-batches
        self._unread: list[tuple[int, int, list[int], Tensor]] = []  # step, epoch, indices and values on the device
        self._is_loaded = self._is_loading = False  # whether the training has its data loader; is about to have it
        self._is_remembered = False  # whether the mini-batch under way was
        self._read_step = 0  # of the last look at the device
        super().__init__(*args, **kwargs)

    # ---- for the user ---------------------------------------------------------------------------------------------

    @property
    def trim_memory(self) -> SampleMemory:
        """
        With `trim_memory=True`: what the training has seen of each sample, as a table. In several processes it is up
        to date at each log, checkpoint and end of an epoch, and the same in all of them.

        Raises:
            `ValueError`: If nothing is remembered.
        """
        if self._memory is None:
            asked = TrimmingConfig.of(self.args).remembers
            raise ValueError(
                "There is no memory of losses yet: train first."
                if asked
                else "The losses of samples were not remembered: set trim_memory=True before training."
            )
        if self.accelerator.num_processes == 1:
            self._read_losses()
        return self._memory

    def hard_examples(self, n: int = 10, by: str = "mean_loss") -> list[dict[str, Any]]:
        """
        The hardest samples of the training data set, after (or during) a training with `trim_memory=True`. These are
        often the odd ones, and those with a wrong label.

        ```python
        for row in trainer.hard_examples(5):
            print(row["index"], row["mean_loss"], train_dataset[row["index"]])
        ```

        Args:
            n (`int`, *optional*, defaults to 10): Number of samples.
            by (`str`, *optional*, defaults to `"mean_loss"`): The highest come first: `"mean_loss"`, `"last_loss"`,
                `"kept"` (how often it was kept) or `"label_error"` (the mean loss minus its standard deviation: always
                hard).

        Returns:
            `list[dict]`: A row for each: `index`, `seen`, `kept`, `last_loss`, `mean_loss`, `loss_std`, `losses` (of
                each epoch), and for classifiers `label`, `prediction`, `is_right`, `confidence` and `confidence_std`
                ([`~hf_trim.trainer.memory.SampleMemory`] explains them). `datasets.Dataset.from_list` takes the list.

        Raises:
            `ValueError`: If nothing is remembered, or an argument is wrong.
        """
        return self.trim_memory.hardest(n, by)

    # ---- indices --------------------------------------------------------------------------------------------------

    def _load_with_indices(self, get_train_dataloader: Callable[[], Any]) -> Any:
        """Stands around `get_train_dataloader`: at the start of a training its loader yields indices, too."""
        if not self._loads_for_training():
            return get_train_dataloader()
        self._is_loaded = self._is_loading = True
        try:
            return self._load_for_training(get_train_dataloader)
        finally:
            self._is_loading = False

    def _inner_training_loop(self, *args: Any, **kwargs: Any) -> Any:
        self._is_loaded = False  # again with each size that `auto_find_batch_size` tries
        return super()._inner_training_loop(*args, **kwargs)  # type: ignore[misc]

    def _loads_for_training(self) -> bool:
        """Whether the loader is what is trained on, and not a look at the data, before or during a training."""
        return self.is_in_train and not self._is_loaded

    def _load_for_training(self, get_train_dataloader: Callable[[], Any]) -> Any:
        self._memory, self._unread, self._step_indices = None, [], []
        if not TrimmingConfig.of(self.args).remembers:
            return get_train_dataloader()
        dataset: Any = self.train_dataset
        size = 0 if dataset is None else _check_dataset(dataset)
        if self.accelerator.dispatch_batches:
            raise ValueError(
                f"{NEEDS} each process to load its own samples: leave dispatch_batches out of "
                f"accelerator_config, {LEAVE_OUT}"
            )
        known = [dataset]  # and the same without some columns

        def prepare(prepare: Callable[..., Any], *objects: Any, **kwargs: Any) -> Any:
            for loader in objects:
                if type(loader) is DataLoader and any(loader.dataset is x for x in known):
                    add_indices(loader)
            return prepare(*objects, **kwargs)

        def remove(remove: Callable[..., Any], dataset: Any, *args: Any, **kwargs: Any) -> Any:
            result = remove(dataset, *args, **kwargs)
            known.extend([result] if any(dataset is x for x in known) else [])
            return result

        with around(self.accelerator, "prepare", prepare), around(self, "_remove_unused_columns", remove):
            loader = get_train_dataloader()
        if type(loader) is DataLoader and any(loader.dataset is x for x in known):  # it was not prepared
            add_indices(loader)
        if not isinstance(getattr(loader, "dataset", None), IndexedDataset) or loader.batch_sampler is None:
            raise ValueError(UNKNOWN_LOADER.format(type(self).__name__))
        self._memory, self._read_step = SampleMemory(size, self._planned_epochs(loader)), self.state.global_step
        return loader

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        prepared = super()._prepare_for_training(*args, **kwargs)  # type: ignore[misc]
        if self._memory is not None:
            self.callback_handler.train_dataloader = PlainBatches(self.callback_handler.train_dataloader)
        return prepared

    def _planned_epochs(self, loader: Any) -> int:
        return int(self.set_initial_training_values(self.args, loader)[0])

    def _without_indices(self, epoch_iterator: Iterator) -> Iterator:
        """The mini-batches of an optimizer step as they were before they had indices, which are noted."""
        self._step_indices = []
        for yielded in epoch_iterator:
            batch, indices = take_indices(yielded)
            self._step_indices.append(indices)
            yield batch

    # ---- losses ---------------------------------------------------------------------------------------------------

    def _remember(self, batch: TrimmedBatch, number: int) -> None:
        """Note what a mini-batch has shown of its samples, without waiting for it."""
        if self._memory is None or batch.seen is None or self._is_remembered or not self._step_indices:
            return
        indices, values = self._step_indices[number], batch.seen.values()
        if indices is None:
            raise ValueError(UNKNOWN_LOADER.format(type(self).__name__))
        if values is None:
            return
        if values.shape[1] != len(indices):
            raise ValueError(
                f"{NEEDS} the samples of a mini-batch one by one, and the loss is over {values.shape[1]} "
                f"rows where the data loader gave {len(indices)} samples: leave out what joins, splits or drops them "
                f"(packing, padding_free, a collator or training_step of your own), {LEAVE_OUT}"
            )
        self._is_remembered = True  # a second `compute_loss` for the same mini-batch is not
        self._unread.append((self.state.global_step, int(self.state.epoch or 0), indices, values))

    def _read_losses(self) -> None:
        """Put what waits on the device into the table. In several processes all call this at the same time."""
        if self._memory is None:
            return
        unread, self._unread, self._read_step = self._unread, [], self.state.global_step
        rows = np.zeros((8, 0))
        if unread:
            sizes = [len(indices) for _, _, indices, _ in unread]
            times = np.repeat([(step, epoch) for step, epoch, _, _ in unread], sizes, 0).T
            index = np.concatenate([indices for _, _, indices, _ in unread])
            values = torch.cat([values for _, _, _, values in unread], 1).cpu().numpy()
            rows = np.concatenate([times, index[None], values])
        if self.accelerator.num_processes > 1:
            rows = host_columns(torch.from_numpy(rows), self.accelerator).numpy()
            # Step by step: then it does not matter when the processes told each other.
            rows = rows[:, np.argsort(rows[0], kind="stable")]
        step, epoch, index = rows[:3].astype(np.int64)
        self._memory.update(index, epoch, rows[3:])


def _check_dataset(dataset: Any) -> int:
    """The number of samples, if each has an index."""
    if isinstance(dataset, IterableDataset) or not has_length(dataset) or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"{NEEDS} a training data set with a length and samples by index, and {type(dataset).__name__} "
            f"has none: load it without streaming (datasets.Dataset, a list), {LEAVE_OUT}"
        )
    return len(dataset)
