"""Trimming composed with TRL's trainers: against those trainers (p = 1) and a loop in plain PyTorch (p < 1)."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainerCallback,
    set_seed,
)

from hf_trim import TrimmingConfig, TrimmingMixin
from tests.support.grpo import skip, tokenizer
from tests.support.heads import LLAMA, make
from tests.support.helpers import digit_texts, grouped, relative_difference, train, weights


trl = pytest.importorskip("trl")

BY_HAND_WARNING = "is no weighted sum of what torch's loss functions returned"
FALLING = {"trim_keep_start": 1.0, "trim_keep_end": 0.3}  # in two epochs: p = 1, then 0.3


class TrimmingSFTTrainer(TrimmingMixin, trl.SFTTrainer):
    pass


@dataclass
class TrimmingSFTConfig(TrimmingConfig, trl.SFTConfig):
    pass


def token_rows(n=35):
    return [row["input_ids"][row["attention_mask"] > 0].tolist() for row in digit_texts(n)]


def texts():
    return [{"input_ids": ids} for ids in token_rows()]


def halves():
    """A prompt of some words and the rest of the text."""
    for ids in token_rows():
        words, start = [str(number) for number in ids], 1 + ids[0] % 3
        yield " ".join(words[:start]), " " + " ".join(words[start:])


def completions():
    return [{"prompt": prompt, "completion": completion} for prompt, completion in halves()]


def chats():
    return [
        {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}
        for prompt, answer in halves()
    ]


def nll(logits, labels):
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")


def dft(logits, labels):
    losses = nll(logits, labels)
    return losses * torch.exp(-losses).detach()


def smoothed(logits, labels):
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction="none", label_smoothing=0.1)


def user_loss(outputs, labels, num_items_in_batch=None):
    logits, labels = outputs.logits[:, :-1], labels[:, 1:]
    reduction = "mean" if num_items_in_batch is None else "sum"
    return F.cross_entropy(logits.transpose(1, 2), labels, reduction=reduction) / (num_items_in_batch or 1)


def lora():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"], lora_alpha=64)
    base = make("llama")
    set_seed(1)
    return peft.get_peft_model(base, config)


@dataclass
class Case:
    """
    A way of training with `SFTTrainer`: its arguments, and the losses of tokens that it is made of.
    """

    arguments: dict = field(default_factory=dict)
    losses: Callable = nll
    rows: Callable = texts
    model: Callable = lambda: make("llama")
    trainer_kwargs: dict = field(default_factory=dict)
    aux: float = 0.0

    def train(self, tmp_path, plain=False, unit="auto", rows=35, **arguments):
        trim = {} if plain else {"trim_unit": unit, **FALLING}
        ways = Snapshots()
        trainer = train(
            self.model(), Dataset.from_list(list(self.rows())[:rows]), tmp_path,
            trainer_cls=trl.SFTTrainer if plain else TrimmingSFTTrainer,
            args_cls=trl.SFTConfig if plain else TrimmingSFTConfig,
            collator=None, callbacks=[ways],
            trainer_kwargs={"processing_class": tokenizer(), **self.trainer_kwargs},
            **{"bf16": False, "gradient_checkpointing": False, **trim, **self.arguments, **arguments},
        )  # fmt: skip
        trainer.ways = ways.weights
        return trainer


class Snapshots(TrainerCallback):
    """The weights after each epoch."""

    def __init__(self):
        self.weights = []

    def on_epoch_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(parameters(model))


def parameters(model):
    return torch.cat([x.detach().flatten().clone() for x in model.parameters() if x.requires_grad])


PACKED = {"packing": True, "max_length": 24, "per_device_train_batch_size": 2}
CASES = {
    "nll": Case(),
    "dft": Case({"loss_type": "dft"}, dft),
    "smoothed": Case({"label_smoothing_factor": 0.1}, smoothed),
    "user-loss": Case(trainer_kwargs={"compute_loss_func": user_loss}),
    "packed": Case(PACKED),
    "packed-dft": Case({**PACKED, "loss_type": "dft"}, dft),
    "packed-cut": Case({**PACKED, "packing_strategy": "wrapped", "max_length": 12, "per_device_train_batch_size": 4}),
    "padding-free": Case({"padding_free": True, "max_length": None}),
    "completions": Case(rows=completions),
    "completions-padding-free": Case({"padding_free": True, "max_length": None}, rows=completions),
    "answers": Case({"assistant_only_loss": True}, rows=chats),
    "checkpointed": Case({"gradient_checkpointing": True}),
    "mixture": Case(model=lambda: make("mixtral"), aux=0.1),
    "lora": Case(model=lora),
}  # fmt: skip
ONE_ITEM = {"packed", "packed-dft", "padding-free", "completions-padding-free"}


def kept_mean(losses, valid, unit, fraction):
    """The mean over the hardest tokens, or over all tokens of the hardest samples; and the lowest loss kept."""
    if unit == "sample":
        means = (losses * valid).sum(1) / valid.sum(1)
        means, samples = means.topk(max(1, round(fraction * len(losses))))
        return losses[samples][valid[samples]].mean(), means[-1]
    kept = losses[valid].topk(max(1, round(fraction * int(valid.sum())))).values
    return kept.mean(), kept[-1]


def kept_parts(passes, unit, fraction):
    """Each micro-batch's part of the loss of a step, and the lowest loss that it keeps."""
    total = sum(valid.sum() for _, valid in passes)
    if unit != "batch":
        kept = [kept_mean(losses, valid, unit, fraction) for losses, valid in passes]
        return [(mean * valid.sum() / total, lowest) for (mean, lowest), (_, valid) in zip(kept, passes, strict=True)]
    means = torch.stack([losses[valid].mean() for losses, valid in passes])
    lowest = means.topk(max(1, round(fraction * len(means)))).values[-1]
    total = sum(valid.sum() for mean, (_, valid) in zip(means, passes, strict=True) if mean >= lowest)
    return [
        ((losses[valid].sum() / total if mean >= lowest else mean * 0), lowest)
        for mean, (losses, valid) in zip(means, passes, strict=True)
    ]


def run_loop(case, batches, unit, accumulate):
    """Each optimizer step's logs, as training in plain PyTorch has them; and the model."""
    model = case.model().train()
    optimizer, logs = torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.1), []
    for fraction, steps in zip((1.0, 0.3), grouped(batches, 2, accumulate), strict=True):
        for step in steps:
            entry = dict.fromkeys(("loss", "full_loss", "trim_threshold", "entropy", "mean_token_accuracy"), 0.0)
            passes, aux_loss = [], 0.0
            for batch in step:
                inputs = {x: batch[x] for x in ("input_ids", "attention_mask", "position_ids") if x in batch}
                outputs = model(**inputs, use_cache=False)  # a cache would take packed texts for one
                logits, labels = outputs.logits[:, :-1], batch["labels"][:, 1:]
                valid = labels != -100
                passes.append((case.losses(logits, labels), valid))
                aux_loss = aux_loss + (case.aux * outputs.aux_loss / len(step) if case.aux else 0)
                log_probs = logits[valid].log_softmax(-1)
                entry["entropy"] -= (log_probs.exp() * log_probs).sum(-1).mean().item() / len(step)
                is_right = log_probs.argmax(-1) == labels[valid]
                entry["mean_token_accuracy"] += is_right.float().mean().item() / len(step)
            parts = kept_parts(passes, unit, fraction)
            loss = sum(part for part, _ in parts) + aux_loss
            full_loss = torch.cat([losses[valid] for losses, valid in passes]).mean() + aux_loss
            entry["loss"], entry["full_loss"] = loss.item(), full_loss.item()
            entry["trim_threshold"] = sum(lowest.item() for _, lowest in parts) / len(parts)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step(), optimizer.zero_grad()
            logs.append(entry)
    return logs, model


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "loss" in entry]


def assert_follows_plain_and_the_loop(case, plain, ours, unit, accumulate):
    """In its first epoch it trains as the plain trainer does, bit for bit, and then as a loop does."""
    half = len(plain.losses) // 2
    assert half > 1 and ours.losses[:half] == plain.losses[:half]
    assert torch.equal(ours.ways[0], plain.ways[0])
    assert not torch.equal(ours.ways[1], plain.ways[1])
    for entry, expected in zip(logged(ours)[:half], logged(plain)[:half], strict=True):
        assert entry["keep_fraction"] == entry["kept_fraction"] == 1 and "trim_threshold" not in entry
        assert entry["full_loss"] == pytest.approx(entry["loss"], rel=1e-6)
        assert {x: entry[x] for x in expected if x != "epoch"} == {x: expected[x] for x in expected if x != "epoch"}
    assert [entry["num_tokens"] for entry in logged(ours)] == [entry["num_tokens"] for entry in logged(plain)]
    logs, model = run_loop(case, ours.batches, unit, accumulate)
    assert ours.losses == pytest.approx([entry["loss"] for entry in logs], rel=1e-5)
    assert relative_difference(parameters(ours.model), parameters(model)) < 1e-5
    start = parameters(case.model())
    assert relative_difference(parameters(ours.model) - start, parameters(model) - start) < 1e-4
    for name in ("full_loss", "entropy", "mean_token_accuracy"):
        assert [entry[name] for entry in logged(ours)] == pytest.approx([entry[name] for entry in logs], rel=1e-5)
    thresholds = [entry["trim_threshold"] for entry in logged(ours)[half:]]
    assert thresholds == pytest.approx([entry["trim_threshold"] for entry in logs[half:]], rel=1e-5)
    assert all(entry["keep_fraction"] == pytest.approx(0.3) for entry in logged(ours)[half:])


def steps_of(accumulate):
    """Micro-batches of 8, 8 and 3 samples; or two steps an epoch, of 8 + 8 + 8 and of 8 + 3."""
    return {"gradient_accumulation_steps": accumulate, "rows": 19 if accumulate == 1 else 35}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Trains with TRL's own trainer."""
    return cache(
        lambda name, accumulate: CASES[name].train(
            tmp_path_factory.mktemp("plain"), plain=True, **steps_of(accumulate)
        )
    )


@pytest.mark.parametrize("accumulate", [pytest.param(1, marks=pytest.mark.extended), 3])
@pytest.mark.parametrize("name", CASES)
def test_sft(name, accumulate, plain, tmp_path, caplog):
    case = CASES[name]
    for unit in ("token", "sample") if accumulate == 3 and name not in ONE_ITEM else ("token",):
        ours = case.train(tmp_path, unit=unit, **steps_of(accumulate))
        assert_follows_plain_and_the_loop(case, plain(name, accumulate), ours, unit, accumulate)
    assert (BY_HAND_WARNING in caplog.text) == bool(case.aux)


@pytest.mark.parametrize("backward", ["sparse", "replay"])
@pytest.mark.parametrize("name", ["nll", "dft", "smoothed", "user-loss", "packed-cut", "completions", "lora"])
def test_sft_with_every_backward_pass(name, backward, plain, tmp_path):
    ours = CASES[name].train(tmp_path, unit="sample", trim_backward=backward, **steps_of(3))
    assert_follows_plain_and_the_loop(CASES[name], plain(name, 3), ours, "sample", 3)


def test_chunked_nll_is_nll(tmp_path):
    with pytest.warns(FutureWarning, match="chunked_nll"):
        ours = Case({"loss_type": "chunked_nll"}).train(tmp_path)
    expected = CASES["nll"].train(tmp_path, unit="token")
    assert ours.losses == expected.losses and torch.equal(weights(ours), weights(expected))


@pytest.mark.parametrize("name", ["packed", "padding-free"])
def test_flattened_samples_are_one_item(name, plain, tmp_path, caplog):
    ours, expected = CASES[name].train(tmp_path, unit="sample", **steps_of(3)), plain(name, 3)
    assert ours.losses == pytest.approx(expected.losses, rel=1e-6)
    assert relative_difference(weights(ours), weights(expected)) < 1e-6
    assert caplog.text.count("single item to choose from") == 1
    assert all(entry["kept_fraction"] == 1 for entry in logged(ours))


@pytest.mark.parametrize("name", ["packed", "packed-dft", "padding-free"])
def test_a_replay_chooses_among_flattened_batches(name, plain, tmp_path):
    ours = CASES[name].train(tmp_path, unit="sample", trim_backward="replay", **steps_of(3))
    assert_follows_plain_and_the_loop(CASES[name], plain(name, 3), ours, "batch", 3)


@pytest.mark.parametrize("name", ["nll", "dft", "smoothed", "user-loss", "padding-free"])
def test_sft_evaluation_is_never_trimmed(name, tmp_path):
    case, arguments = CASES[name], {"max_steps": 1}
    plain, ours = case.train(tmp_path, plain=True, **arguments), case.train(tmp_path, trim_keep_start=0.3, **arguments)
    ours.model.load_state_dict(plain.model.state_dict())
    rows = Dataset.from_list(list(case.rows())[:11])
    expected, metrics = plain.evaluate(rows), ours.evaluate(rows)
    for name in ("eval_loss", "eval_entropy", "eval_mean_token_accuracy"):
        assert metrics[name] == expected[name]


def test_sft_with_its_defaults(tmp_path):
    """bfloat16, with gradient checkpointing."""
    arguments = {"bf16": True, "gradient_checkpointing": True}
    case = Case(arguments)
    plain, ours = case.train(tmp_path, plain=True), case.train(tmp_path, unit="sample")
    half = len(plain.losses) // 2
    assert ours.losses[:half] == plain.losses[:half] and torch.equal(ours.ways[0], plain.ways[0])
    logs, _ = run_loop(case, ours.batches, "sample", 1)
    assert ours.losses == pytest.approx([entry["loss"] for entry in logs], rel=1e-2)


def test_prompt_tuning(tmp_path):
    """Virtual tokens come before each text, so that its first word is predicted, too."""
    peft = pytest.importorskip("peft")

    def tuned():
        set_seed(1)
        base = make("llama")
        return peft.get_peft_model(base, peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))

    case = Case(model=tuned)
    plain = case.train(tmp_path, plain=True)
    ours = case.train(tmp_path, unit="sample")
    half = len(plain.losses) // 2
    assert ours.losses[:half] == plain.losses[:half] and torch.equal(ours.ways[0], plain.ways[0])
    one = case.train(tmp_path, unit="sample", trim_keep_start=0.3, max_steps=1)
    model, batch = case.model(), one.batches[0]
    logits = model(batch["input_ids"], batch["attention_mask"]).logits[:, 1:-1]
    losses, valid = nll(logits, batch["labels"]), batch["labels"] != -100
    means = (losses * valid).sum(1) / valid.sum(1)
    kept = means.topk(round(0.3 * 8)).indices
    share = valid.sum() / (batch["labels"][:, 1:] != -100).sum()  # TRL counts the labels of the text alone
    assert one.losses[0] == pytest.approx((losses[kept][valid[kept]].mean() * share).item(), rel=1e-5)
    assert logged(one)[0]["trim_threshold"] == pytest.approx(means.topk(round(0.3 * 8)).values[-1].item(), rel=1e-5)


# ---- trainers whose losses are made by hand ------------------------------------------------------------------------


def preferences():
    prompts = [" ".join(map(str, ids[:3])) for ids in token_rows(19)]
    return [
        {"prompt": prompt, "chosen": f" {n % 9 + 3} 5 6", "rejected": f" 7 {n % 5 + 3}"}
        for n, prompt in enumerate(prompts)
    ]


def judged():
    return [
        {"prompt": row["prompt"], "completion": row["chosen"], "label": n % 2 == 0}
        for n, row in enumerate(preferences())
    ]


def prompts():
    return [{"prompt": row["prompt"]} for row in preferences()]


def judge():
    set_seed(0)
    return LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=1))


def reward(completions, **kwargs):
    return [float(len(completion) % 3) for completion in completions]


def llama():
    return make("llama")


BY_HAND = {
    "Reward": (judge, preferences, {}, {}),
    "DPO": (llama, preferences, {}, {"ref_model": llama()}),
    "KTO": (llama, judged, {}, {"ref_model": llama()}),
    "GRPO": (llama, prompts, {"num_generations": 2, "max_completion_length": 4}, {"reward_funcs": reward}),
    "RLOO": (
        llama,
        prompts,
        {"num_generations": 2, "max_completion_length": 4, "beta": 0.0},
        {"reward_funcs": reward},
    ),
}


def train_by_hand(name, tmp_path, plain=False, module=trl, **trim):
    model, rows, arguments, trainer_kwargs = BY_HAND.get(name, (llama, preferences, {}, {}))
    base, config = getattr(module, f"{name}Trainer"), getattr(module, f"{name}Config")
    if not plain:
        base = type(f"Trimming{name}Trainer", (TrimmingMixin, base), {})
        config = dataclass(type(f"Trimming{name}Config", (TrimmingConfig, config), {}))
    return train(
        model(), Dataset.from_list(rows()), tmp_path, trainer_cls=base, args_cls=config, collator=None, max_steps=1,
        trainer_kwargs={"processing_class": tokenizer(), **trainer_kwargs}, bf16=False, gradient_checkpointing=False,
        **arguments, **trim,
    )  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_losses_by_hand_are_refused(name, tmp_path):
    for start in (1.0, 0.3):
        with pytest.raises(ValueError, match=f"Trimming{name}Trainer found nothing to rank"):
            train_by_hand(name, tmp_path, trim_keep_start=start, trim_keep_end=0.3)
    plain = train_by_hand(name, tmp_path, plain=True)
    untrimmed = train_by_hand(name, tmp_path, trim_select="none")
    assert untrimmed.losses == plain.losses and torch.equal(weights(untrimmed), weights(plain))


@pytest.mark.parametrize("name", ["ORPO", "CPO"])
def test_a_part_by_hand_is_not_trimmed_in_silence(name, tmp_path, caplog):
    """Their loss is a cross entropy, which is trimmed, and a loss of pairs, which is not."""
    module = pytest.importorskip(f"trl.experimental.{name.lower()}")
    for start in (1.0, 0.3):
        caplog.clear()
        train_by_hand(name, tmp_path, module=module, trim_keep_start=start, trim_keep_end=0.3)
        assert caplog.text.count(BY_HAND_WARNING) == 1


# ---- a loss by hand that leaves samples out ----------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
def test_grpo_skips_answers_without_an_advantage(checkpointing, tmp_path):
    skipped, expected, trained = [], [], []

    def reward(prompts, completions, **kwargs):
        """Two of three prompts are too hard: all answers to them get the same."""
        hard = [sum(map(int, prompt.split())) % 3 > 0 for prompt in prompts]
        rewards = torch.tensor([0.0 if x else len(y) % 3 for x, y in zip(hard, completions, strict=True)])
        expected.append(int((rewards.view(4, 4) == rewards.view(4, 4).mean(1, keepdim=True)).sum()))
        return rewards.tolist()

    def note(module, args, output):
        if output.requires_grad:
            output.register_hook(lambda grad: skipped.append(grad.rows.batch - grad.rows.count))

    start = parameters(llama().double())
    for skips in (False, True):
        model = llama().double()
        if skips:
            model.base_model.norm.register_forward_hook(note)
            model.base_model.register_forward_hook(skip)
        train(
            model, Dataset.from_list(prompts()), tmp_path, trainer_cls=trl.GRPOTrainer, args_cls=trl.GRPOConfig,
            collator=None, max_steps=4, per_device_train_batch_size=16, num_generations=4, max_completion_length=4,
            trainer_kwargs={"processing_class": tokenizer(), "reward_funcs": reward}, bf16=False,
            gradient_checkpointing=checkpointing,
        )  # fmt: skip
        trained.append(parameters(model) - start)
    assert expected == skipped * 2 and min(skipped) > 3
    assert relative_difference(*trained) < 1e-10
