"""
Texts for a causal language model → blocks of tokens of the same length.

All texts of a split → one long list of token ids → N blocks `[T]`, so batches `[B, T]` have no padding.
"""

from functools import partial
from typing import Any

from datasets import Dataset
from transformers import DefaultDataCollator

from hf_trim.data.arguments import DataArguments
from hf_trim.data.prepared import Data
from hf_trim.data.splits import TITLES, take_subset
from hf_trim.data.texts import check_texts


def prepare_language(args: DataArguments, splits: dict[str, Dataset], column: str, tokenizer: Any) -> Data:
    """
    Args:
        args ([`~hf_trim.data.DataArguments`]): Length and number of the blocks.
        splits (`dict[str, datasets.Dataset]`): `train`, `test` and perhaps `validation`.
        column (`str`): The column with the texts.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Returns:
        [`~hf_trim.data.Data`]: The prepared data.

    Raises:
        `ValueError`: If there is no tokenizer, a text is missing, or a split has no tokens for one block.
    """
    length = check_texts(args, splits, column, tokenizer)
    sizes = {"train": args.max_train_samples, "test": args.max_test_samples}
    prepared = {}
    for use, split in splits.items():
        blocks = split.map(
            partial(_cut_blocks, column=column, tokenizer=tokenizer, length=length),
            batched=True,
            batch_size=None,  # else the end of each batch of texts would be lost
            remove_columns=split.column_names,
            desc="Tokenizing",
        )
        if not len(blocks):
            raise ValueError(
                f"The texts of the {TITLES[use]} split have fewer than max_seq_length = {length} tokens together: "
                "lower it."
            )
        prepared[use] = take_subset(blocks, sizes.get(use), args.split_seed)
    return Data(
        kind="language",
        train_dataset=prepared["train"],
        test_dataset=prepared["test"],
        validation_dataset=prepared.get("validation"),
        label_names=[],
        data_collator=DefaultDataCollator(),
        processing_class=tokenizer,
        max_seq_length=length,
    )


def _cut_blocks(batch: dict[str, list], column: str, tokenizer: Any, length: int) -> dict[str, list]:
    """The texts one after the other, in blocks; the last tokens, too few for a block, are left out."""
    # verbose=False: no warning about texts longer than the model's limit, for they are cut.
    tokens = [token for text in tokenizer(batch[column], verbose=False)["input_ids"] for token in text]
    blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    # The model shifts the labels itself.
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}
