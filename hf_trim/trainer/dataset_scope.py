"""
Step 1 (batch) of: batch → per-item losses → keep decision → trimmed backward → logs.

`trim_scope="dataset"`: in each epoch only the hardest fraction p of the data set is trained on, by the losses that are
remembered of each sample (`remembering.py`). The rest is not loaded, so that forward and backward pass cost p, in
models with batch normalization too. For example, 1,000 samples in mini-batches of 32, p = 0.6: the 608 hardest, in 19
mini-batches.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate
from math import ceil
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors.numpy import load_file, save_file
from torch.utils.data import RandomSampler, Sampler

from hf_trim.files import replaced
from hf_trim.trainer.arguments import TrimmingConfig
from hf_trim.trainer.remembering import RememberingMixin
from hf_trim.trainer.schedule import linear_fraction


FILE = "trim_scope.safetensors"  # in a checkpoint
OTHER_SAMPLER = (
    "trim_scope='dataset' chooses the samples of an epoch itself, and {} would do so too: leave "
    "train_sampling_strategy and a sampler or data loader of your own out, or use trim_scope='local'."
)
WHOLE_LAST = 0.2  # share of the epochs, at the end, in which all samples are trained on


def dataset_fractions(start: float, end: float, num_epochs: int) -> list[float]:
    """
    The fraction p of the data set in each epoch. The first epoch is whole, since no losses are known before, and so is
    the last fifth of the epochs, as at the end of InfoBatch (Qin et al., arXiv 2303.04947). It is one epoch at least,
    in which the easy samples come once more.

    Args:
        start (`float`): `trim_keep_start`.
        end (`float`): `trim_keep_end`.
        num_epochs (`int`): Number of epochs, from 3 on.

    Returns:
        `list[float]`: p of each epoch, falling linearly in between. e.g. from 1.0 to 0.2 in 5 epochs: 1, 0.73, 0.47,
            0.2, 1.
    """
    num_whole = max(1, int(WHOLE_LAST * num_epochs))
    falling = [linear_fraction(epoch, num_epochs - num_whole, start, end) for epoch in range(num_epochs - num_whole)]
    return [1.0, *falling[1:], *[1.0] * num_whole]


def count_samples(fraction: float, size: int, batch_size: int) -> int:
    """
    How many samples an epoch has: full mini-batches, unless it is whole. One of a few samples would be noise for batch
    normalization.

    Args:
        fraction (`float`): p of the epoch.
        size (`int`): Number of samples of the data set.
        batch_size (`int`): Size of a mini-batch, of all processes together.

    Returns:
        `int`: Their number, at least that of one mini-batch.
    """
    if fraction == 1:
        return size
    return min(size, max(1, round(fraction * size / batch_size)) * batch_size)


def choose_hardest(count: int, losses: np.ndarray, last_seen: np.ndarray, epoch: int, refresh: int) -> np.ndarray:
    """
    Choose the samples of an epoch: the hardest, and those that were not seen for some epochs, whose losses may have
    changed. The latter are at most half of them, those that were not seen for longest first.

    Args:
        count (`int`): How many to choose.
        losses (`np.ndarray`): `[n]`, the last loss of each sample; NaN where it is not known, which counts as hardest.
        last_seen (`np.ndarray`): `[n]`, the epoch of that loss.
        epoch (`int`): The epoch, from 0.
        refresh (`int`): After so many epochs in which it was not seen, a sample comes back.

    Returns:
        `np.ndarray`: Their indices, in rising order.
    """
    hardest = np.argsort(-np.nan_to_num(losses, nan=np.inf), kind="stable")
    longest = hardest[np.argsort(last_seen[hardest], kind="stable")]
    back = longest[epoch - last_seen[longest] > refresh][: count // 2]
    others = hardest[~np.isin(hardest, back)]
    return np.sort(np.concatenate([back, others[: count - len(back)]]))


class EpochSampler(Sampler):
    """
    The samples of an epoch in random order, the same in all processes.

    Args:
        size (`int`): Number of samples of the data set.
        seed (`int`): Sets the order, together with the epoch.
    """

    def __init__(self, size: int, seed: int):
        self.size, self.seed = size, seed
        self.chosen = np.arange(size)
        self.epoch = -1

    def __len__(self) -> int:
        return len(self.chosen)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.chosen), generator=generator).numpy()
        return iter(self.chosen[order].tolist())


class DatasetScope:
    """
    The plan of a training: how many samples each epoch has, and which ones the epoch under way.

    Args:
        trim ([`~hf_trim.trainer.arguments.TrimmingConfig`]): Gives p, how samples are chosen, and when they come back.
        sampler ([`EpochSampler`]): Gives the samples of the epoch under way.
        batch_size (`int`): Size of a mini-batch, of all processes together.
        num_whole_batches (`int`): Mini-batches of each process in a whole epoch.
        accumulation (`int`): Mini-batches of an optimizer step.
        num_epochs (`int`): Number of epochs.
    """

    def __init__(
        self,
        trim: TrimmingConfig,
        sampler: EpochSampler,
        batch_size: int,
        num_whole_batches: int,
        accumulation: int,
        num_epochs: int,
    ):
        self.trim, self.batch_size, self.accumulation = trim, batch_size, accumulation
        size = sampler.size
        self.fractions = dataset_fractions(trim.trim_keep_start, trim.trim_keep_end, num_epochs)
        self.counts = [count_samples(fraction, size, batch_size) for fraction in self.fractions]
        self.last_seen = np.zeros(size, np.int32)
        self.sampler, self.num_whole_batches = sampler, num_whole_batches
        if all(count == size for count in self.counts):
            raise ValueError(
                f"trim_scope='dataset' leaves out whole mini-batches, and with {size} samples in mini-batches of "
                f"{batch_size} each epoch would have all samples: take smaller mini-batches or a lower trim_keep_end, "
                "or use trim_scope='local'."
            )

    def num_batches(self, epoch: int) -> int:
        """Mini-batches of each process in an epoch."""
        count = self.counts[epoch]
        return self.num_whole_batches if count == self.sampler.size else count // self.batch_size

    def num_steps(self, epoch: int) -> int:
        """Optimizer steps of an epoch."""
        return max(1, ceil(self.num_batches(epoch) / self.accumulation))

    def ends(self) -> list[int]:
        """Optimizer steps at the end of each epoch, from the start of the training."""
        return list(accumulate(map(self.num_steps, range(len(self.counts)))))

    def begin_epoch(self, epoch: int, losses: np.ndarray) -> None:
        """
        Choose the samples of an epoch, unless a checkpoint says them.

        Args:
            epoch (`int`): The epoch, from 0.
            losses (`np.ndarray`): `[n]`, the last loss of each sample.
        """
        sampler = self.sampler
        if sampler.epoch == epoch:
            return
        if sampler.epoch >= 0:
            self.last_seen[sampler.chosen] = sampler.epoch
        count = self.counts[epoch]
        if count == sampler.size:
            sampler.chosen = np.arange(sampler.size)
        elif self.trim.trim_select == "random":
            drawn = np.random.default_rng((sampler.seed, epoch)).permutation(sampler.size)[:count]
            sampler.chosen = np.sort(drawn)
        else:
            sampler.chosen = choose_hardest(count, losses, self.last_seen, epoch, self.trim.trim_refresh)
        sampler.epoch = epoch

    def save(self, folder: str | Path) -> None:
        """Write what a resumed training needs into a checkpoint."""
        state: dict[str, np.ndarray] = {"last_seen": self.last_seen, "chosen": self.sampler.chosen,
                                        "epoch": np.array([self.sampler.epoch]),
                                        "counts": np.array(self.counts)}  # fmt: skip
        with replaced(Path(folder) / FILE) as part:
            save_file(state, part)

    def load(self, folder: str | Path) -> None:
        """
        Read it from a checkpoint.

        Raises:
            `ValueError`: If it is not there, or is of a training with other epochs.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            raise ValueError(
                f"The checkpoint {folder} was written without trim_scope='dataset' (no {FILE}): train as it was "
                "trained, or train anew."
            )
        saved = load_file(path)
        if saved["counts"].tolist() != self.counts:
            raise ValueError(
                f"The checkpoint {folder} is of a training whose epochs have {saved['counts'].tolist()} samples, and "
                f"they would have {self.counts} now: resume with the same num_train_epochs, trim_keep_start, "
                "trim_keep_end and size of mini-batches (of all processes together), or train anew."
            )
        self.last_seen, self.sampler.chosen = saved["last_seen"], saved["chosen"]
        self.sampler.epoch = int(saved["epoch"][0])


def _batches(loader: Any) -> Any:
    """The batch sampler of a data loader, from before the processes shared its mini-batches."""
    return getattr(loader.batch_sampler, "batch_sampler", loader.batch_sampler)


class DatasetScopeMixin(RememberingMixin):
    """The part of [`~hf_trim.trainer.trainer.TrimmingMixin`] that trains on a part of the data set in each epoch."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._scope: DatasetScope | None = None
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not self._is_loading or not TrimmingConfig.of(self.args).trims_dataset:
            return sampler
        if type(sampler) is not RandomSampler:
            raise ValueError(OTHER_SAMPLER.format(type(sampler).__name__))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return EpochSampler(len(cast(Any, self.train_dataset)), seed)

    def _load_with_indices(self, get_train_dataloader: Callable[[], Any]) -> Any:
        if not self._loads_for_training():
            return super()._load_with_indices(get_train_dataloader)
        self._scope = None
        loader = super()._load_with_indices(get_train_dataloader)
        if TrimmingConfig.of(self.args).trims_dataset:
            sampler = _batches(loader).sampler
            if not isinstance(sampler, EpochSampler):
                raise ValueError(OTHER_SAMPLER.format(type(sampler).__name__))
            self._scope = self.plan_epochs(loader, sampler)
        return loader

    def plan_epochs(self, loader: Any, sampler: EpochSampler | None = None) -> DatasetScope:
        """
        Plan a training with `trim_scope="dataset"`.

        Args:
            loader (`torch.utils.data.DataLoader`): What `get_train_dataloader` gives.
            sampler ([`EpochSampler`], *optional*): That of the loader, in a training.

        Returns:
            [`DatasetScope`]: How many samples and steps each of its epochs has.

        Raises:
            `ValueError`: If each epoch would be whole.
        """
        args: Any = self.args
        # With `split_batches` the processes share a mini-batch of the loader.
        shares = 1 if self.accelerator.split_batches else args.world_size
        return DatasetScope(
            TrimmingConfig.of(args),
            EpochSampler(len(cast(Any, self.train_dataset)), 0) if sampler is None else sampler,
            _batches(loader).batch_size * shares,
            len(loader),
            args.gradient_accumulation_steps,
            int(args.num_train_epochs),
        )

    def count_samples(self) -> int:
        """
        Count the samples that the last training has seen, those that came several times as often.

        Returns:
            `int`: Their number, of all processes together.
        """
        epochs = self.state.epoch or 0.0
        if self._scope is None:
            return round(epochs * len(cast(Any, self.train_dataset)))
        counts = self._scope.counts
        return sum(counts[: int(epochs)]) + round(epochs % 1 * [*counts, 0][int(epochs)])

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        values = super().set_initial_training_values(args, dataloader)
        if self._scope is None or not self.is_in_train:
            return values
        num_epochs, steps_per_epoch, num_examples, _, total_batch_size, steps_in_epoch = values[:6]
        num_samples = sum(self._scope.counts)
        max_steps = self._scope.ends()[-1]
        return num_epochs, steps_per_epoch, num_examples, num_samples, total_batch_size, steps_in_epoch, max_steps

    def _init_training_state(self, *args: Any, **kwargs: Any) -> Any:
        epochs_trained, steps_trained = super()._init_training_state(*args, **kwargs)
        if self._scope is None:
            return epochs_trained, steps_trained
        done, ends = self.state.global_step, [0, *self._scope.ends()]
        epochs_trained = max(epoch for epoch, end in enumerate(ends) if end <= done)
        if self.args.ignore_data_skip:
            return epochs_trained, 0
        return epochs_trained, (done - ends[epochs_trained]) * self.args.gradient_accumulation_steps

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self._scope is not None:
            epoch = kwargs["epoch"]
            self._scope.begin_epoch(epoch, self.trim_memory.columns["last_loss"])
            kwargs["steps_in_epoch"] = self._scope.num_batches(epoch)
            kwargs["num_update_steps_per_epoch"] = self._scope.num_steps(epoch)
        super()._run_epoch(*args, **kwargs)

    def _dataset_fractions(self) -> dict[str, float]:
        """For the logs: p of the epoch, as asked for and as it was."""
        if self._scope is None:
            return {"keep_fraction": 1.0, "kept_fraction": 1.0}
        sampler = self._scope.sampler
        keep = self._scope.fractions[max(sampler.epoch, 0)]
        return {"keep_fraction": keep, "kept_fraction": len(sampler) / sampler.size}
