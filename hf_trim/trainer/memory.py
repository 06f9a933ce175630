"""
After step 5 of: batch → per-item losses → keep decision → trimmed backward → logs.

The memory of losses: what a training has seen of each sample, in the order of the data set. For example, sample 3 with
the losses 2.0 and 1.0 in two epochs, in the second of which it was left out: it was seen twice and kept once, its last
loss is 1.0, their mean 1.5 and their standard deviation 0.5.

It is a table of fixed size in the memory of the host: 34 bytes a sample, and 2 more for each epoch as long as these
are not more than 60 MB in all. 10 million samples then take 340 MB, with up to three epochs 400 MB.
"""

import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from hf_trim.files import replaced
from hf_trim.messages import check_choice


FILE = "trim_memory.safetensors"  # in a checkpoint
HISTORY_BYTES = 60 * 10**6  # of all losses by epoch, at most
# Mean and sum of squared distances from it are updated with each loss (Welford), so that no losses need to be kept.
COLUMNS = {
    "last_loss": np.float32, "mean_loss": np.float32, "loss_m2": np.float32, "kept": np.float32,
    "confidence": np.float32, "confidence_m2": np.float32, "label": np.int32, "prediction": np.int32,
    "seen": np.uint16,
}  # fmt: skip
UNKNOWN = {"last_loss": np.nan, "label": -1, "prediction": -1}
ORDERS = ("mean_loss", "last_loss", "kept", "label_error")


class SampleMemory:
    """
    What a training has seen of each of its samples: [`TrimmingTrainer.trim_memory`], with `trim_memory=True`.

    ```python
    table = trainer.trim_memory.to_pandas()
    table.sort_values("mean_loss").tail(10)  # the hardest ten
    ```

    The table has one row for each sample of the training data set, in its order. Its columns:

    - `index`: the sample's index, so that `train_dataset[index]` is it;
    - `seen`: how often it was seen (at most 65,535). Samples that fill up the last mini-batches of several processes
      are seen twice in an epoch. Samples with a loss that is NaN or infinite, or without a label, do not count;
    - `kept`: how often it was kept. Where items are tokens, the share of its tokens that was kept, summed up;
    - `last_loss`, `mean_loss`, `loss_std`: the last of its losses, their mean and their standard deviation. The loss
      is that of the mini-batch's forward pass, before it was trained on. Of a text it is the mean over its tokens;
      several losses of a sample are averaged as the training weighs them. Class weights are no part of it. NaN if it
      was not seen;
    - for classifiers also `label` (as it was trained on; -1 if not known), `prediction` and `is_right` (of the last
      time), and `confidence` and `confidence_std`: mean and standard deviation of the probability of the label, the
      two axes of a data map (Swayamdipta et al., arXiv 2009.10795).

    Args:
        size (`int`): Number of samples.
        num_epochs (`int`, *optional*, defaults to 0): Number of epochs whose losses are kept apart, if there is room.
    """

    def __init__(self, size: int, num_epochs: int = 0):
        self.columns = {name: np.full(size, UNKNOWN.get(name, 0), kind) for name, kind in COLUMNS.items()}
        has_room = 2 * size * num_epochs <= HISTORY_BYTES
        self.history = np.full((num_epochs if has_room else 0, size), np.nan, np.float16)  # losses by epoch

    def __len__(self) -> int:
        return len(self.columns["seen"])

    @property
    def nbytes(self) -> int:
        """Bytes of the table."""
        return sum(column.nbytes for column in (*self.columns.values(), self.history))

    @property
    def is_classification(self) -> bool:
        """Whether labels and predictions are known."""
        return bool((self.columns["label"] >= 0).any())

    def update(self, index: np.ndarray, epoch: np.ndarray, values: np.ndarray) -> None:
        """
        Add samples in the order in which they were seen.

        Args:
            index (`np.ndarray`): `[n]` indices of the samples; one may be there several times.
            epoch (`np.ndarray`): `[n]`, in which epoch each was seen.
            values (`np.ndarray`): `[5, n]`, see [`~hf_trim.trainer.sample_losses.SampleLosses.values`].
        """
        left = np.isfinite(values[0])
        while left.any():
            places = left.nonzero()[0]
            places = places[np.unique(index[places], return_index=True)[1]]  # each sample once
            self._update(index[places], epoch[places], values[:, places].astype(np.float32))
            left[places] = False

    def _update(self, index: np.ndarray, epoch: np.ndarray, values: np.ndarray) -> None:
        columns, (loss, kept, confidence, prediction, label) = self.columns, values
        seen = columns["seen"][index].astype(np.float32) + 1
        for value, mean_name, m2_name in (
            (loss, "mean_loss", "loss_m2"), (np.nan_to_num(confidence), "confidence", "confidence_m2"),
        ):  # fmt: skip
            mean = columns[mean_name][index]
            step = value - mean
            columns[mean_name][index] = new_mean = mean + step / seen
            columns[m2_name][index] += step * (value - new_mean)
        columns["last_loss"][index] = loss
        columns["kept"][index] += kept
        columns["seen"][index] = np.minimum(seen, np.iinfo(np.uint16).max)
        for name, known in (("label", label), ("prediction", prediction)):
            columns[name][index] = np.where(np.isfinite(known), known, -1)
        has_column = epoch < len(self.history)
        limit = float(np.finfo(np.float16).max)
        self.history[epoch[has_column], index[has_column]] = loss[has_column].clip(-limit, limit)

    # ---- what is read ---------------------------------------------------------------------------------------------

    def to_dict(self, indices: Any = None) -> dict[str, np.ndarray]:
        """
        The table by columns. `datasets.Dataset.from_dict(memory.to_dict())` makes a data set of it.

        Args:
            indices (`Sequence[int]`, *optional*): Only these samples, in this order.

        Returns:
            `dict[str, np.ndarray]`: The columns, named as above.
        """
        index = np.arange(len(self)) if indices is None else np.asarray(indices, dtype=np.int64)
        columns = {name: column[index] for name, column in self.columns.items()}
        seen = columns["seen"].astype(np.int64)
        unseen = seen == 0

        def mean(name: str) -> np.ndarray:
            return np.where(unseen, np.nan, columns[name]).astype(np.float32)

        def deviation(name: str) -> np.ndarray:
            return np.sqrt(mean(name).clip(min=0) / np.maximum(seen, 1)).astype(np.float32)

        table: dict[str, np.ndarray] = {
            "index": index, "seen": seen, "kept": columns["kept"], "last_loss": columns["last_loss"],
            "mean_loss": mean("mean_loss"), "loss_std": deviation("loss_m2"),
        }  # fmt: skip
        if self.is_classification:
            is_right = (columns["label"] == columns["prediction"]) & ~unseen
            table |= {
                "label": columns["label"], "prediction": columns["prediction"], "is_right": is_right,
                "confidence": mean("confidence"), "confidence_std": deviation("confidence_m2"),
            }  # fmt: skip
        return table

    def to_pandas(self) -> Any:
        """
        Returns:
            `pandas.DataFrame`: The table. Needs pandas.
        """
        import pandas

        return pandas.DataFrame(self.to_dict())

    def losses_by_epoch(self, indices: Any) -> np.ndarray:
        """
        The losses of some samples, epoch by epoch.

        Args:
            indices (`Sequence[int]`): The samples.

        Returns:
            `np.ndarray`: `[n, epochs]`, in half precision; NaN for epochs in which it was not seen. No epochs at all
                if there was no room for them.
        """
        return self.history[:, np.asarray(indices, dtype=np.int64)].T

    def hardest(self, n: int, by: str = "mean_loss") -> list[dict[str, Any]]:
        """
        The rows of the samples that stand out.

        Args:
            n (`int`): Number of samples.
            by (`str`, *optional*, defaults to `"mean_loss"`): The highest come first. `"mean_loss"` or `"last_loss"`;
                `"kept"`, how often it was kept; or `"label_error"`, the mean loss minus its standard deviation:
                samples whose loss was high whenever they were seen, of which wrong labels are a frequent reason
                (O2U-Net, Huang et al., ICCV 2019, ranks by the mean loss over a training; the samples of low
                confidence *and* low variability are the hard-to-learn ones of a data map, arXiv 2009.10795).

        Returns:
            `list[dict]`: A row for each: the columns as above, and `losses`, those of the epochs.
                `datasets.Dataset.from_list` and `pandas.DataFrame` take the list.

        Raises:
            `ValueError`: If n is not positive, or there is no such order.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"n must be a number of samples from 1 on, and is {n!r}.")
        indices = self.ranking(by)[:n]
        table = {name: column.tolist() for name, column in self.to_dict(indices).items()}
        rows: list[dict[str, Any]] = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
        for row, losses in zip(rows, self.losses_by_epoch(indices).tolist(), strict=True):
            row["losses"] = [None if math.isnan(loss) else loss for loss in losses]
        return rows

    def ranking(self, by: str = "mean_loss") -> np.ndarray:
        """
        All samples that were seen, the hardest first.

        Args:
            by (`str`, *optional*, defaults to `"mean_loss"`): As in [`hardest`].

        Returns:
            `np.ndarray`: Their indices; of equal ones those with the higher mean loss first, then the first.
        """
        check_choice("by", by, ORDERS)
        columns, seen = self.columns, self.columns["seen"]
        score = columns["mean_loss" if by == "label_error" else by]
        if by == "label_error":
            score = score - np.sqrt(columns["loss_m2"].clip(min=0) / np.maximum(seen, 1))
        # Of samples that were kept as often, the hardest first.
        ranking = np.lexsort([-columns["mean_loss"], -score])
        return ranking[seen[ranking] > 0]

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def save(self, folder: str | Path) -> None:
        """
        Write the table into a checkpoint. A reader sees a whole file or none.

        Args:
            folder (`str` or `Path`): The checkpoint's folder.
        """
        with replaced(Path(folder) / FILE) as part:
            save_file({**self.columns, "history": self.history}, part)

    def load(self, folder: str | Path) -> None:
        """
        Read the table of a checkpoint.

        Args:
            folder (`str` or `Path`): The checkpoint's folder.

        Raises:
            `ValueError`: If there is none, or that of another data set.
        """
        path = Path(folder) / FILE
        way_out = "train as it was trained, or anew."
        if not path.is_file():
            raise ValueError(f"The checkpoint {folder} was written without remembered losses (no {FILE}): {way_out}")
        try:
            saved = load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged ({error}): resume from another checkpoint, {way_out}") from None
        if len(saved["seen"]) != len(self):
            raise ValueError(
                f"The checkpoint {folder} remembers {len(saved['seen'])} samples, and the training data set has "
                f"{len(self)}: train on the same data, {way_out}"
            )
        self.columns = {name: saved[name] for name in COLUMNS}
        epochs = min(len(saved["history"]), len(self.history))  # another num_train_epochs may have been asked for
        self.history[:epochs] = saved["history"][:epochs]
