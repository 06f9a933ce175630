"""
A recipe's data, from its arguments to what `Trainer` takes.

source → splits → columns → class numbers → parts held out → subsets → label noise → images or tokens ([`Data`])
"""

from typing import Any, NamedTuple

import torch
from datasets import Dataset

from hf_trim.data.arguments import DataArguments
from hf_trim.data.columns import Columns, find_columns, with_pictures
from hf_trim.data.images import prepare_images
from hf_trim.data.labels import add_label_noise, encode_labels
from hf_trim.data.language import prepare_language
from hf_trim.data.prepared import Data
from hf_trim.data.sources import load_splits
from hf_trim.data.splits import fractions_to_hold_out, hold_out, pick_splits, take_subset
from hf_trim.data.summary import first_rows, summarize
from hf_trim.data.texts import prepare_texts


ROW = "hf_trim_row"  # a column of the training split: the number of its row as it was read


class RawData(NamedTuple):
    """
    Data as they were read: images and texts, not tensors.

    Args:
        splits (`dict[str, datasets.Dataset]`): `train`, `test` and perhaps `validation`; with the column `labels` if
            there are classes.
        columns ([`~hf_trim.data.columns.Columns`]): Where images or texts, and classes, were found.
        held_out (`list[str]`): Which of the splits were taken out of the training split.
    """

    splits: dict[str, Dataset]
    columns: Columns
    held_out: list[str]


def read_data(args: DataArguments) -> RawData:
    """
    Load a data set, find its columns, and split it.

    Args:
        args ([`DataArguments`]): Which data.

    Returns:
        [`RawData`]: The splits.

    Raises:
        `ValueError`: If the data cannot be found or cannot be used; the message names the argument to change.
    """
    splits = pick_splits(args, load_splits(args.dataset, args.dataset_config_name, args.train_split))
    columns = find_columns(args, splits)
    if args.task != "causal-lm":
        assert columns.label is not None  # classes have a column
        splits = encode_labels(columns.label, splits)
    # Samples are drawn and held out: these numbers tell where each comes from.
    splits["train"] = splits["train"].add_column(ROW, range(len(splits["train"])))
    held_out = list(fractions_to_hold_out(args, splits))
    return RawData(hold_out(args, splits), columns, held_out)


def load_data(args: DataArguments, processing_class: Any = None, device: torch.device | str = "cpu") -> Data:
    """
    Load, check, split and prepare a data set.

    Args:
        args ([`DataArguments`]): Which data, and how.
        processing_class (tokenizer or image processor, *optional*):
            The model's, as [`~hf_trim.run.models.load_processing_class`] returns it. Texts need a tokenizer; for
            images it gives the defaults of size, mean and standard deviation.
        device (`torch.device`, *optional*, defaults to the CPU):
            Where the images of a small set are kept.

    Returns:
        [`Data`]: The splits and what belongs to them.

    Raises:
        `ValueError`: If the data cannot be found or cannot be used; the message names the argument to change.
    """
    splits, columns, held_out = read_data(args)
    if args.task == "causal-lm":
        data = prepare_language(args, splits, columns.inputs, processing_class)
    else:
        for use, size in (("train", args.max_train_samples), ("test", args.max_test_samples)):
            splits[use] = take_subset(splits[use], size, args.split_seed)
        # Labels to test on stay right.
        splits["train"] = add_label_noise(splits["train"], args.label_noise, args.split_seed)
        if columns.kind == "image":
            data = prepare_images(args, splits, columns.inputs, processing_class, device)
        else:
            data = prepare_texts(args, splits, columns.inputs, processing_class)
        data.inputs, data.rows = _shown_inputs(splits["train"], columns), splits["train"][ROW]
    data.summary = summarize(args.dataset, splits, columns, held_out, data)
    data.examples = first_rows(splits["train"], columns)
    return data


def _shown_inputs(train: Dataset, columns: Columns) -> Dataset:
    """Texts or pictures alone."""
    inputs = train.select_columns(columns.inputs)
    return with_pictures(inputs, columns.inputs) if columns.kind == "image" else inputs
