"""A training whose backward passes run from tapes ends with the weights of one without, bit for bit."""

import pytest
import torch

from hf_trim.backward.eager import sparse
from hf_trim.backward.tape.extension import EXTENSION
from hf_trim.backward.tape.tapes import Tapes
from tests.support.helpers import digit_texts, digits, tiny_bert, tiny_vit, train, weights


KEEP = {"trim_keep_start": 0.5, "trim_keep_end": 0.5, "trim_backward": "sparse", "trim_strict": True}


@pytest.mark.parametrize(
    "model, rows, arguments",
    [
        (tiny_vit, digits, {}),
        (tiny_bert, digit_texts, {"gradient_accumulation_steps": 2}),  # with dropout
        (tiny_vit, digits, {"bf16": True}),
    ],
    ids=["images", "accumulated", "bfloat16"],
)
def test_training(model, rows, arguments, tmp_path, monkeypatch):
    if EXTENSION.get(wait=True) is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(sparse, "TAPES", Tapes())

    def trained():
        return weights(train(model(), rows(64), tmp_path, max_steps=8, **KEEP, **arguments))

    with_tapes = trained()
    assert sparse.TAPES.counts["ran"] >= 5 and sparse.TAPES.counts["recorded"] == 1
    monkeypatch.setattr(EXTENSION, "get", lambda: None)
    assert torch.equal(with_tapes, trained())
