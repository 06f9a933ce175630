"""The `trim_*` fields."""

import pytest
from transformers import (
    TrainingArguments,
)

from hf_trim import TrimmingArguments, TrimmingTrainer
from tests.support.helpers import (
    digits,
    tiny_vit,
)


def test_plain_training_arguments_have_the_default_schedule(tmp_path):
    args = TrainingArguments(str(tmp_path), num_train_epochs=3, use_cpu=True, disable_tqdm=True, report_to="none")
    trainer = TrimmingTrainer(tiny_vit(), args, train_dataset=digits())
    trainer.train()
    assert trainer.keep_fraction == pytest.approx(0.2)


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"trim_keep_end": 0.0}, r"trim_keep_end must be a fraction in \(0, 1\], and is 0.0"),
        ({"trim_keep_start": 1.5}, "trim_keep_start must be a fraction"),
        ({"trim_keep_start": "1"}, "trim_keep_start must be a fraction"),
        (
            {"trim_keep_start": 0.3, "trim_keep_end": 0.5},
            "trim_keep_end .0.5. must not be above trim_keep_start .0.3.",
        ),
        ({"trim_schedule": "epochs"}, "Did you mean 'epoch'"),
        ({"trim_select": "hard"}, "trim_select must be one of.*and is 'hard'"),
        ({"trim_unit": "tokens"}, "Did you mean 'token'"),
        ({"trim_backward": "dens"}, "Did you mean 'dense'"),
        ({"trim_nonfinite": "skip"}, "trim_nonfinite must be one of"),
        ({"trim_scope": "node"}, "trim_scope must be one of"),
    ],
)
def test_wrong_arguments_are_refused(arguments, match, tmp_path):
    with pytest.raises(ValueError, match=match):
        TrimmingArguments(str(tmp_path), **arguments)
