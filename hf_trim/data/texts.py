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
from hf_trim.data.splits import TITLES


def prepare_texts(args: DataArguments, splits: dict[str, Dataset], column: str, tokenizer: Any) -> Data:
    """
    Args:
        args ([`~hf_trim.data.DataArguments`]): The number of tokens.
        splits (`dict[str, datasets.Dataset]`): `train`, `test` and perhaps `validation`, with `labels`.
        column (`str`): The column with the texts.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Returns:
        [`~hf_trim.data.Data`]: The prepared data.

    Raises:
        `ValueError`: If there is no tokenizer, or a text is missing.
    """
    max_length = check_texts(args, splits, column, tokenizer)
    tokenize = partial(_tokenize, column=column, tokenizer=tokenizer, max_length=max_length)
    prepared = {
        use: split.map(
            tokenize,
            batched=True,
            remove_columns=[name for name in split.column_names if name != "labels"],
            desc="Tokenizing",
        )
        for use, split in splits.items()
    }
    return Data(
        kind="text",
        train_dataset=prepared["train"],
        test_dataset=prepared["test"],
        validation_dataset=prepared.get("validation"),
        label_names=splits["train"].features["labels"].names,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        max_seq_length=max_length,
    )


def check_texts(args: DataArguments, splits: dict[str, Dataset], column: str, tokenizer: Any) -> int:
    """
    Refuse what cannot be tokenized, and give the tokenizer a padding token if it has none.

    Args:
        args ([`~hf_trim.data.DataArguments`]): The number of tokens.
        splits (`dict[str, datasets.Dataset]`): The splits by their use.
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
    for use, split in splits.items():
        empty = [row for row, text in enumerate(split[column][:], start=1) if text is None]
        if empty:
            raise ValueError(
                f"Row {empty[0]} of the {TITLES[use]} split has no text: text_column '{column}' is empty in "
                f"{len(empty)} of its {len(split)} rows. Drop these rows."
            )
    # Some tokenizers have no limit, and say so with a huge number.
    return args.max_seq_length or min(tokenizer.model_max_length, 512)


def _tokenize(batch: dict[str, list], column: str, tokenizer: Any, max_length: int) -> dict[str, list]:
    return dict(tokenizer(batch[column], truncation=True, max_length=max_length))
