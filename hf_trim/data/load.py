"""
A recipe's data, from its arguments to what `Trainer` takes.

source → splits → columns → class numbers → split by class → subsets → label noise → images or tokens ([`Data`])
"""

from typing import Any

import torch

from hf_trim.data.arguments import DataArguments
from hf_trim.data.columns import find_columns
from hf_trim.data.images import prepare_images
from hf_trim.data.labels import add_label_noise, encode_labels
from hf_trim.data.language import prepare_language
from hf_trim.data.prepared import Data
from hf_trim.data.sources import load_splits
from hf_trim.data.splits import pick_splits, split_by_class, take_subset
from hf_trim.data.texts import prepare_texts


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
        [`Data`]: Both splits and what belongs to them.

    Raises:
        `ValueError`: If the data cannot be found or cannot be used; the message names the argument to change.
    """
    splits = load_splits(args.dataset, args.dataset_config_name, args.train_split)
    train, test = pick_splits(args, splits)
    columns = find_columns(args, train, test)
    if args.task == "causal-lm":
        return prepare_language(args, train, test, columns.inputs, processing_class)
    assert columns.label is not None  # classes have a column
    train, test = encode_labels(columns.label, train, test)
    if test is None:
        train, test = split_by_class(args, train)
    train = take_subset(train, args.max_train_samples, args.split_seed)
    test = take_subset(test, args.max_test_samples, args.split_seed)
    train = add_label_noise(train, args.label_noise, args.split_seed)  # test labels stay right
    if columns.kind == "image":
        return prepare_images(args, train, test, columns.inputs, processing_class, device)
    return prepare_texts(args, train, test, columns.inputs, processing_class)
