"""A training whose backward passes run from tapes ends with the weights of one without, bit for bit."""

import pytest
import torch

from hf_trim.backward.eager import sparse
from hf_trim.backward.tape.extension import EXTENSION
from hf_trim.backward.tape.tapes import Tapes
from tests.support import heads
from tests.support.helpers import digit_texts, digits, tiny_bert, tiny_vit, train, weights


KEEP = {"trim_keep_start": 0.5, "trim_keep_end": 0.5}
FALLING = {"trim_schedule": "step", "trim_keep_start": 0.75, "trim_keep_end": 0.25, "max_steps": 16}  # k from 6 to 2


@pytest.mark.parametrize(
    "model, rows, arguments, recorded",
    [
        (tiny_vit, digits, KEEP, 1),
        (tiny_bert, digit_texts, {**KEEP, "gradient_accumulation_steps": 2}, 1),  # with dropout
        (tiny_vit, digits, {**KEEP, "bf16": True}, 1),
        (tiny_vit, digits, FALLING, 2),
        (lambda: heads.make("question-answering"), lambda _: heads.HEADS["question-answering"][1](), KEEP, 1),
    ],
    ids=["images", "accumulated", "bfloat16", "falling", "two losses"],
)
def test_training(model, rows, arguments, recorded, tmp_path, monkeypatch):
    if EXTENSION.get(wait=True) is None:
        pytest.skip("needs a C++ compiler")
    monkeypatch.setattr(sparse, "TAPES", Tapes())

    def trained():
        options = {"max_steps": 8, "trim_backward": "sparse", "trim_strict": True, **arguments}
        return weights(train(model(), rows(64), tmp_path, **options))

    with_tapes = trained()
    assert sparse.TAPES.counts["ran"] >= 4 and sparse.TAPES.counts["recorded"] == recorded
    monkeypatch.setattr(EXTENSION, "get", lambda: None)
    assert torch.equal(with_tapes, trained())
