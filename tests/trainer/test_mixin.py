"""Trimming composed with another trainer and with PEFT."""

from dataclasses import dataclass

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from hf_trim import TrimmingConfig, TrimmingMixin
from tests.support.heads import HEADS, make, reference_loop
from tests.support.helpers import relative_difference, train, weights


class TrimmingSeq2SeqTrainer(TrimmingMixin, Seq2SeqTrainer):
    pass


@dataclass
class TrimmingSeq2SeqArguments(TrimmingConfig, Seq2SeqTrainingArguments):
    pass


def test_with_seq2seq_trainer(tmp_path):
    rows = HEADS["bart"][1]()
    ours = train(
        make("bart"), rows, tmp_path, trainer_cls=TrimmingSeq2SeqTrainer, args_cls=TrimmingSeq2SeqArguments,
        trim_keep_start=0.3, trim_keep_end=0.3, num_train_epochs=1, predict_with_generate=True,
    )  # fmt: skip
    reference, logged = reference_loop("bart", ours.batches, 1, 0.3)
    assert ours.losses == pytest.approx(logged, rel=1e-4)
    assert relative_difference(weights(ours), weights(reference)) < 1e-5
    predictions = ours.predict(rows[:4]).predictions  # of token ids, as that trainer generates them
    assert len(predictions) == 4 and predictions.dtype.kind == "i"


def test_adapters_of_a_language_model_train_and_load_back(tmp_path):
    peft = pytest.importorskip("peft")
    rows = HEADS["llama"][1]()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])

    def adapted():
        base = make("llama")
        set_seed(1)
        return peft.get_peft_model(base, config)

    arguments = {"trim_keep_start": 0.3, "trim_keep_end": 0.3, "num_train_epochs": 1}
    ours = train(adapted(), rows, tmp_path, **arguments)
    dense = train(adapted(), rows, tmp_path, trim_backward="dense", **arguments)
    assert ours.losses == pytest.approx(dense.losses, rel=1e-5)
    base = make("llama")
    before = {name: value.clone() for name, value in base.state_dict().items()}
    trained = {name: value for name, value in ours.model.get_base_model().state_dict().items() if "lora" not in name}
    assert all(torch.equal(before[name.replace(".base_layer", "")], value) for name, value in trained.items())
    ours.save_model(str(tmp_path / "adapter"))
    again = peft.PeftModel.from_pretrained(make("llama"), tmp_path / "adapter")
    batch = {name: value for name, value in ours.batches[0].items()}
    ours.model.eval()
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, ours.model(**batch).logits)
        assert not torch.equal(again(**batch).logits, make("llama").eval()(**batch).logits)
