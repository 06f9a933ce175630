"""Which samples are in which split."""

import numpy as np
import torch

from hf_trim.data import DataArguments, load_data
from tests.support.data import labels_of, tiny_digits


def test_splits_depend_on_their_seed_alone(tmp_path):
    tiny_digits(400, size=8).save_to_disk(tmp_path)

    def split(**arguments):
        torch.manual_seed(len(arguments))
        data = load_data(DataArguments(str(tmp_path), **arguments))
        return labels_of(data.train_dataset), labels_of(data.test_dataset)

    assert split() == split()
    assert split() != split(split_seed=1)
    train, test = split(max_train_samples=50, max_test_samples=20)
    assert (len(train), len(test)) == (50, 20) and len(set(train)) == 10


def test_one_csv_file_is_split_by_class(tmp_path, minilm_tokenizer):
    rows = ["text,label,number"] + [f"row {number},{'ab'[number % 2]},1" for number in range(20)]
    (tmp_path / "all.csv").write_text("\n".join(rows))
    data = load_data(DataArguments(str(tmp_path / "all.csv"), test_fraction=0.3), minilm_tokenizer)
    assert np.bincount(labels_of(data.test_dataset)).tolist() == [3, 3]
