"""
Texts to classify → token ids, cut after `max_seq_length` tokens.

A list of B strings → `input_ids` and `attention_mask`, padded by the collator to `[B, T]`, the longest in the batch.
"""

from functools import partial
from typing import Any

from datasets import Dataset
from transformers import DataCollatorWithPadding, PreTrainedTokenizerBase

from hf_trim.data.arguments import DataArguments
from hf_trim.data.prepared import Data


def prepare_texts(args: DataArguments, train: Dataset, test: Dataset, column: str, tokenizer: Any) -> Data:
    """
    Args:
        args ([`~hf_trim.data.DataArguments`]): The number of tokens.
        train (`datasets.Dataset`): The training split, with `labels`.
        test (`datasets.Dataset`): The test split, with `labels`.
        column (`str`): The column with the texts.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Returns:
        [`~hf_trim.data.Data`]: The prepared data.

    Raises:
        `ValueError`: If there is no tokenizer, or a text is missing.
    """
    max_length = check_texts(args, train, test, column, tokenizer)
    tokenize = partial(_tokenize, column=column, tokenizer=tokenizer, max_length=max_length)
    train_dataset, test_dataset = (
        split.map(
            tokenize,
            batched=True,
            remove_columns=[name for name in split.column_names if name != "labels"],
            desc="Tokenizing",
        )
        for split in (train, test)
    )
    return Data(
        kind="text",
        train_dataset=train_dataset,
        test_dataset=test_dataset,
        label_names=train.features["labels"].names,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        max_seq_length=max_length,
    )


def check_texts(args: DataArguments, train: Dataset, test: Dataset, column: str, tokenizer: Any) -> int:
    """
    Refuse what cannot be tokenized, and give the tokenizer a padding token if it has none.

    Args:
        args ([`~hf_trim.data.DataArguments`]): The number of tokens.
        train (`datasets.Dataset`): The training split.
        test (`datasets.Dataset`): The test split.
        column (`str`): The column with the texts.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Returns:
        `int`: The number of tokens after which texts are cut.

    Raises:
        `ValueError`: If there is no tokenizer, or a text is missing.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"dataset '{args.dataset}' holds texts, and there is no tokenizer: give model_name_or_path of a text "
            "model, or tokenizer_name."
        )
    if tokenizer.pad_token is None:  # GPT-2, for example
        tokenizer.pad_token = tokenizer.eos_token
    for split, name in ((train, "training"), (test, "test")):
        if any(text is None for text in split[column][:]):
            raise ValueError(f"text_column '{column}' is empty in some rows of the {name} split: drop these rows.")
    # Some tokenizers have no limit, and say so with a huge number.
    return args.max_seq_length or min(tokenizer.model_max_length, 512)


def _tokenize(batch: dict[str, list], column: str, tokenizer: Any, max_length: int) -> dict[str, list]:
    return dict(tokenizer(batch[column], truncation=True, max_length=max_length))
