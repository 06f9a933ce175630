"""Texts: padded for a classifier, in blocks for a language model."""

import pytest
import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hf_trim.data import DataArguments, load_data
from hf_trim.data.embedded import load_bbc_news
from tests.support.data import first_batch


def test_texts_are_padded_to_the_longest_of_the_batch(tmp_path):
    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    rows = {"text": ["word " * length for length in (1, 2, 5, 9)] * 2, "label": ["a", "b"] * 4}
    DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows)).save_to_disk(tmp_path)
    data = load_data(DataArguments(str(tmp_path), max_seq_length=6), tokenizer)
    assert first_batch(data, 2)["input_ids"].tolist() == [[2, 0], [2, 2]]
    assert first_batch(data, 4)["attention_mask"].sum(1).tolist() == [1, 2, 5, 6]


def test_blocks_of_a_language_model(minilm_tokenizer, tmp_path):
    articles = load_bbc_news()["train"].shuffle(seed=0).select(range(100))
    articles.save_to_disk(tmp_path)

    def load(**arguments):
        return load_data(DataArguments(str(tmp_path), task="causal-lm", **arguments), minilm_tokenizer)

    data = load(max_seq_length=64, max_train_samples=50, max_test_samples=5)
    assert (data.kind, data.label_names, data.max_seq_length) == ("language", [], 64)
    assert (len(data.train_dataset), len(data.test_dataset)) == (50, 5)
    inputs = first_batch(data)
    assert inputs["input_ids"].shape == (4, 64) and torch.equal(inputs["input_ids"], inputs["labels"])
    data = load(max_seq_length=512)
    texts = articles["text"][:]
    ids = minilm_tokenizer(texts, verbose=False)["input_ids"]
    blocks = torch.tensor(data.train_dataset["input_ids"][:] + data.test_dataset["input_ids"][:])
    assert 0 <= sum(map(len, ids)) - blocks.numel() < 2 * 512  # nothing is lost but the two ends
    assert (blocks == minilm_tokenizer.sep_token_id).sum() >= len(texts) - 4  # where a text ends
    with pytest.raises(ValueError, match="fewer than max_seq_length = 10000000 tokens"):
        load(max_seq_length=10**7)
    with pytest.raises(ValueError, match="task 'causal-lm' needs texts, and dataset 'digits' holds images"):
        load_data(DataArguments("digits", task="causal-lm"), minilm_tokenizer)
    with pytest.raises(ValueError, match="task must be one of.*Did you mean 'causal-lm'"):
        DataArguments("bbc-news", task="causal-ml")


def test_texts_need_a_tokenizer_and_images_none(minilm_tokenizer):
    with pytest.raises(ValueError, match="holds texts, and there is no tokenizer"):
        load_data(DataArguments("bbc-news"))
    with pytest.raises(ValueError, match="holds images, and the model is one for text"):
        load_data(DataArguments("digits"), minilm_tokenizer)
