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
from hf_trim.data.splits import take_subset
from hf_trim.data.texts import check_texts


def prepare_language(args: DataArguments, train: Dataset, test: Dataset | None, column: str, tokenizer: Any) -> Data:
    """
    Args:
        args ([`~hf_trim.data.DataArguments`]): Length and number of the blocks, size of the test split.
        train (`datasets.Dataset`): The training split.
        test (`datasets.Dataset`, *optional*): The test split; by default some texts of the training split.
        column (`str`): The column with the texts.
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.

    Returns:
        [`~hf_trim.data.Data`]: The prepared data.

    Raises:
        `ValueError`: If there is no tokenizer, a text is missing, or a split has no tokens for one block.
    """
    if test is None:
        parts = train.train_test_split(args.test_fraction, seed=args.split_seed)
        train, test = parts["train"], parts["test"]
    length = check_texts(args, train, test, column, tokenizer)
    prepared = []
    for split, name, size in ((train, "training", args.max_train_samples), (test, "test", args.max_test_samples)):
        blocks = split.map(
            partial(_cut_blocks, column=column, tokenizer=tokenizer, length=length),
            batched=True,
            batch_size=None,  # else the end of each batch of texts would be lost
            remove_columns=split.column_names,
            desc="Tokenizing",
        )
        if not len(blocks):
            raise ValueError(
                f"The texts of the {name} split have fewer than max_seq_length = {length} tokens together: lower it."
            )
        prepared.append(take_subset(blocks, size, args.split_seed))
    return Data(
        kind="language",
        train_dataset=prepared[0],
        test_dataset=prepared[1],
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
