"""Trimming composed with other trainers and with PEFT."""

from dataclasses import dataclass

import pytest
import tokenizers
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed

from hf_trim import TrimmingConfig, TrimmingMixin
from tests.support.heads import HEADS, make, reference_loop
from tests.support.helpers import descend, relative_difference, train, weights


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


def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(n): n for n in range(20)}, unk_token="19"))
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="2", unk_token="19")


@pytest.mark.parametrize("unit", ["token", "sample"])
def test_with_trl(unit, tmp_path):
    trl = pytest.importorskip("trl")
    collator = trl.trainer.sft_trainer.DataCollatorForLanguageModeling(pad_token_id=0)

    class TrimmingSFTTrainer(TrimmingMixin, trl.SFTTrainer):
        pass

    @dataclass
    class TrimmingSFTConfig(TrimmingConfig, trl.SFTConfig):
        pass

    rows = HEADS["llama"][1]()
    dataset = Dataset.from_list([{"input_ids": row["input_ids"][row["attention_mask"] > 0].tolist()} for row in rows])

    def trained(trainer_cls=TrimmingSFTTrainer, args_cls=TrimmingSFTConfig, **args):
        return train(
            make("llama"), dataset, tmp_path, trainer_cls=trainer_cls, args_cls=args_cls, collator=collator,
            num_train_epochs=1, bf16=False, gradient_checkpointing=False,
            trainer_kwargs={"processing_class": tokenizer()}, **args,
        )  # fmt: skip

    plain = trained(trl.SFTTrainer, trl.SFTConfig, gradient_accumulation_steps=2)
    untrimmed = trained(trim_keep_start=1.0, trim_keep_end=1.0, gradient_accumulation_steps=2)
    assert untrimmed.losses == plain.losses
    first = trained(gradient_accumulation_steps=2, trim_unit=unit, max_steps=1)  # p = 1 through the trimming code
    assert first.losses == pytest.approx(plain.losses[:1], rel=1e-5)

    ours = trained(trim_keep_start=0.3, trim_keep_end=0.3, trim_unit=unit)
    model = make("llama")

    def loss_of(batch):
        labels = batch["labels"][:, 1:]
        logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, :-1]
        losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        if unit == "token":
            valid = losses[labels != -100]
            return valid.topk(round(0.3 * len(valid))).values.mean()
        tokens = (labels != -100).sum(1)
        kept = (losses.sum(1) / tokens).topk(max(1, round(0.3 * len(losses)))).indices
        return losses[kept].sum() / tokens[kept].sum()

    logged = descend(model, ours.batches, loss_of)
    assert ours.losses == pytest.approx(logged, rel=1e-4)
    assert relative_difference(weights(ours) - weights(make("llama")), weights(model) - weights(make("llama"))) < 1e-4
    assert ours.state.log_history[0]["kept_fraction"] == pytest.approx(0.3, abs=0.05)
    assert "entropy" in ours.state.log_history[0]
