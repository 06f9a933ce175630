"""What a GPU would do, on the CPU: the host does not wait, and learns late what is wrong. Results are the same."""

import subprocess
import sys
from functools import cache
from tempfile import TemporaryDirectory
from unittest import mock

import pytest
import torch
from accelerate import Accelerator, PartialState
from transformers import TrainerCallback

from hf_trim import trimmed_linear_cross_entropy, trimmed_mean
from hf_trim.backward import waiting
from hf_trim.trainer import lm_head, process_group
from hf_trim.trainer.selection import num_kept, places, top_mask, without_hardest
from tests.support.heads import HEADS, make
from tests.support.helpers import InOrder, digits, tiny_vit, train, weights
from tests.support.observe import record_graph_runs
from tests.support.waits import EXPECTED, KINDS, counted_waits, plain_kind, waits_of_kind
from tests.trainer.test_batch import poisoned


EXTENDED = {  # which have no other code than the rest, or are compiled
    "random", "the hardest left out", "samples, dense", "tokens, whole logits", "start and end of an answer",
    "tokens, chunked head, p = 1", "compiled, dense", "compiled, sparse", "compiled, one token of each text",
}  # fmt: skip


@cache
def plain_waits(kind, accumulation):
    """Those of plain Trainer."""
    with TemporaryDirectory() as folder:
        return waits_of_kind(kind, folder, accumulation, is_trimmed=False)


@pytest.fixture
def on_gpu(monkeypatch):
    """hf_trim does as on a GPU."""
    monkeypatch.setattr(waiting, "reads_freely", lambda device: False)
    monkeypatch.setattr(lm_head, "MIN_VOCABULARY", 8)


@pytest.mark.parametrize("accumulation", [pytest.param(1, marks=pytest.mark.extended), 4])
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.extended] * (kind in EXTENDED)) for kind in KINDS]
)
def test_the_host_waits_where_that_of_plain_trainer_does(kind, accumulation, tmp_path, monkeypatch):
    graph_runs = record_graph_runs(monkeypatch)
    plain, ours = plain_waits(plain_kind(kind), accumulation), waits_of_kind(kind, tmp_path, accumulation)
    assert plain.mini_batches == ours.mini_batches == {1: 2, 4: 7}[accumulation]
    assert plain.total() >= 2 * plain.mini_batches  # whether the loss is NaN, or infinite
    more = ours - plain
    assert more.total() == ours.mini_batches * EXPECTED.get(kind, 0), more
    assert not plain - ours
    assert bool(graph_runs) == ("torch_compile" in KINDS[kind][1] and KINDS[kind][1]["trim_backward"] == "sparse")


def count_in_a_process(folder):
    """What `run_forks` runs in each process."""
    kind = "among all processes"
    plain, ours = (waits_of_kind(kind, folder, 1, trims) for trims in (False, True))
    assert ours == plain, ours - plain
    with mock.patch.object(torch.distributed, "get_backend", lambda: "nccl"):  # which cannot send what the host has
        assert process_group.host_numbers(3 + PartialState().process_index, Accelerator(cpu=True)) == [3, 4]


@pytest.mark.extended
def test_several_hosts_do_not_wait_for_their_devices(tmp_path):
    # Not forked from here: other tests may have started threads of autograd, which no fork survives.
    program = f"""if True:
        import hf_trim
        from {__name__} import count_in_a_process
        from tests.support.forks import run_forks
        run_forks(count_in_a_process, {str(tmp_path)!r}, processes=2)
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


SAME = {
    "samples": ("question-answering", {"trim_backward": "sparse"}),
    "tokens": ("llama", {}),
    "tokens of texts": ("llama", {"trim_unit": "sample", "trim_backward": "sparse"}),
    "whole logits": ("token-classification", {"trim_backward": "dense"}),
    "random": ("question-answering", {"trim_select": "random"}),
    "the hardest left out": ("token-classification", {"trim_skip_hardest": 0.2}),
    "adaptive": ("llama", {"trim_schedule": "adaptive", "trim_mass": 0.7}),
    "adaptive, samples": ("question-answering", {"trim_schedule": "adaptive", "trim_mass": 0.7}),
    "most tokens": ("llama", {"trim_keep_start": 0.9, "trim_keep_end": 0.9}),
    "adaptive, most texts": ("llama", {"trim_schedule": "adaptive", "trim_mass": 0.97, "trim_unit": "sample"}),
    "replay": ("question-answering", {"trim_backward": "replay"}),
    "everything": ("llama", {"trim_keep_start": 1.0, "trim_keep_end": 0.9}),
    "everything, whole logits": (
        "token-classification",
        {"trim_keep_start": 1.0, "trim_keep_end": 0.9, "trim_backward": "dense"},
    ),
}


MARKS = dict.fromkeys(("random", "the hardest left out", "adaptive, samples", "everything"), pytest.mark.extended)


def labels_left_out(rows, *places):
    """Some samples without a label."""
    names = ("labels", "start_positions", "end_positions")
    ignored = {name: torch.full_like(torch.as_tensor(rows[0][name]), -100) for name in names if name in rows[0]}
    return [{**row, **ignored} if place in places else row for place, row in enumerate(rows)]


@pytest.mark.parametrize("case", [pytest.param(case, marks=MARKS.get(case, [])) for case in SAME])
def test_a_training_is_the_same_as_on_the_cpu(case, tmp_path, on_gpu):
    """The first mini-batch has labels everywhere, the others lack some, and one has none."""
    head, arguments = SAME[case]
    if "trim_mass" not in arguments:
        arguments = {"trim_keep_start": 0.4, "trim_keep_end": 0.4, **arguments}
    rows = labels_left_out(HEADS[head][1]()[:32], 9, 12, 13, 14, 15, *range(24, 32))

    def trained(on_gpu):
        with mock.patch.object(waiting, "reads_freely", lambda device: not on_gpu):
            return train(make(head), rows, tmp_path, trainer_cls=InOrder, **arguments)

    ours, cpus = trained(True), trained(False)
    assert ours.losses == pytest.approx(cpus.losses, rel=1e-5)
    torch.testing.assert_close(weights(ours), weights(cpus), rtol=1e-4, atol=1e-6)
    for log, expected in zip(ours.state.log_history[:-1], cpus.state.log_history[:-1], strict=True):
        assert log.keys() == expected.keys()
        names = [name for name in log if name.startswith(("full_", "kept_", "keep_", "trim_"))]
        assert [log[name] for name in names] == pytest.approx(
            [expected[name] for name in names], rel=1e-4, nan_ok=True
        )
    assert ours.state.stateful_callbacks.keys() == cpus.state.stateful_callbacks.keys()


class AllTokens(InOrder):
    """Whatever the labels are, each token is one."""

    def compute_loss(self, model, inputs, **kwargs):
        labels = inputs["input_ids"].where(inputs["attention_mask"] > 0, -100)
        return model(inputs["input_ids"], inputs["attention_mask"], labels=labels).loss


def test_labels_that_only_the_loss_has(tmp_path, on_gpu):
    """The number of labels bounds that of the tokens with one, unless the first mini-batch shows that it does not."""
    rows = HEADS["llama"][1]()[:32]
    arguments = {"trainer_cls": AllTokens, "trim_keep_start": 0.4, "trim_keep_end": 0.4, "logging_steps": 3}
    ours = train(make("llama"), labels_left_out(rows, *range(4)), tmp_path, **arguments)
    expected = train(make("llama"), rows, tmp_path, **arguments)
    torch.testing.assert_close(weights(ours), weights(expected), rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="In optimizer step 2: .* has [0-9]+ labels that its labels lack"):
        train(make("llama"), labels_left_out(rows, *range(8, 16)), tmp_path, **arguments)


@pytest.mark.parametrize(("head", "keep"), [("vit", 0.5), ("vit", 1.0), ("llama", 0.5)])
def test_a_loss_that_is_not_finite_is_told_before_anything_is_logged_or_saved(keep, head, tmp_path, on_gpu):
    """The weights are NaN from the third step on. A checkpoint comes first, or the end of the training."""

    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:
                next(model.parameters()).data.fill_(torch.nan)

    rows = digits(40) if head == "vit" else HEADS[head][1]()[:40]
    model = tiny_vit() if head == "vit" else make(head)
    for save in ({"save_strategy": "steps", "save_steps": 4}, {"save_strategy": "no"}):
        with pytest.raises(ValueError, match="In optimizer step 3: .* NaN or infinite"):
            train(model, rows, tmp_path / head, trim_keep_start=keep, trim_keep_end=0.5, num_train_epochs=3,
                  trim_schedule="epoch", logging_steps=100, callbacks=[Poison()], **save)  # fmt: skip
        model = tiny_vit() if head == "vit" else make(head)
    assert not (tmp_path / head / "checkpoint-4").exists()


def test_scores_that_are_not_finite_are_told(tmp_path, on_gpu):
    steps = []

    def score(outputs, inputs, losses):
        steps.append(None)
        return losses * (torch.nan if len(steps) == 3 else 1)

    with pytest.raises(ValueError, match="In optimizer step 3: trim_score returned 8 scores"):
        train(
            tiny_vit(),
            digits(),
            tmp_path,
            trim_keep_start=0.5,
            logging_steps=100,
            trainer_kwargs={"trim_score": score},
        )


@pytest.mark.parametrize("backward", ["dense", "sparse"])
def test_nan_is_dropped(backward, tmp_path, on_gpu):
    rows = poisoned(digits(24), 2, 5, 11)
    arguments = {"trim_keep_start": 0.5, "trim_keep_end": 0.5, "trim_nonfinite": "drop", "trim_backward": backward}
    ours = train(tiny_vit(), rows, tmp_path, **arguments)
    with mock.patch.object(waiting, "reads_freely", lambda device: True):
        cpus = train(tiny_vit(), rows, tmp_path, **arguments)
    assert ours.losses == pytest.approx(cpus.losses, rel=1e-5)
    torch.testing.assert_close(weights(ours), weights(cpus), rtol=1e-4, atol=1e-6)


def test_an_adaptive_training_goes_on_from_a_checkpoint(tmp_path, on_gpu):
    """What is on the device meanwhile is in the checkpoint."""
    arguments = {"trim_schedule": "adaptive", "trim_mass": 0.7, "save_strategy": "steps", "save_steps": 3}
    whole = train(tiny_vit(), digits(), tmp_path, **arguments)
    resumed = train(tiny_vit(), digits(), tmp_path, resume=str(tmp_path / "checkpoint-3"), **arguments)
    assert torch.equal(weights(whole), weights(resumed))
    assert resumed.state.log_history[-2]["kept_fraction"] == whole.state.log_history[-2]["kept_fraction"]


def test_the_number_of_kept_items_is_the_same_on_the_device():
    numbers = torch.arange(4097)
    for keep in [*torch.arange(1, 41).double().div(40).tolist(), 1 / 3, 0.3 + 1e-16, 0.123, 1e-4]:
        assert num_kept(keep, numbers).tolist() == [num_kept(keep, n) for n in range(4097)]


def of_both(function, *leaves):
    """Compares what a function returns, and its gradients, as on a GPU and as on the CPU; returns the waits there."""
    results = []
    for on_gpu in (True, False):
        with counted_waits() as waits, mock.patch.object(waiting, "reads_freely", lambda device: not on_gpu):  # noqa: B023
            waits.is_on = True
            torch.manual_seed(0)
            value = function()
            results.append((value, *torch.autograd.grad(value, leaves)))
        if on_gpu:
            found = waits
    for ours, cpus in zip(*results, strict=True):
        torch.testing.assert_close(ours, cpus, equal_nan=True)
    return found


@pytest.mark.parametrize("backward", ["dense", "sparse"])
@pytest.mark.parametrize("select", ["hardest", "random", "none"])
@pytest.mark.parametrize("num_valid", [None, 0, 1, 7, 12])
def test_trimmed_mean_does_not_wait(num_valid, select, backward):
    x = torch.rand(12, generator=torch.Generator().manual_seed(1)).requires_grad_()
    valid = None if num_valid is None else (torch.arange(12).flip(0) < num_valid).view(3, 4)

    def loss():
        losses = x.sin().view(3, 4)
        if num_valid:
            losses = losses.masked_fill(~valid, torch.inf)
        return trimmed_mean(losses, 0.4, valid=valid, select=select, backward=backward)

    assert not of_both(loss, x)


def test_trimmed_mean_of_losses_that_are_not_finite_is_nan(on_gpu):
    losses = torch.tensor([1.0, torch.inf, 3.0], requires_grad=True)
    for backward in ("dense", "sparse"):
        loss = trimmed_mean(losses * 1, keep=0.7, backward=backward)
        assert loss.isnan() and torch.autograd.grad(loss, losses)[0].isnan().any()
    assert trimmed_mean(losses, keep=0.5, valid=losses.detach().isfinite()) == 3
    assert trimmed_mean(losses, keep=0.5, nonfinite="drop") == 3
    hidden = torch.tensor([[1.0], [torch.inf]], requires_grad=True)
    loss = trimmed_linear_cross_entropy(hidden, torch.ones(2, 1), torch.tensor([0, 1]), keep=0.5)
    assert loss.isnan() and torch.autograd.grad(loss, hidden)[0].isnan().any()


@pytest.mark.parametrize("select", ["hardest", "random", "none"])
@pytest.mark.parametrize("num_valid", [0, 1, 7, 12])
def test_the_chunked_head_waits_for_the_number_of_targets_alone(num_valid, select):
    generator = torch.Generator().manual_seed(1)
    hidden, weight = (torch.randn(n, 4, generator=generator).requires_grad_() for n in (12, 9))
    target = torch.randint(9, (12,), generator=generator).where(torch.arange(12) < num_valid, -100)
    leaves = (hidden, weight) if num_valid else (hidden,)
    # That number is read by `Later`, and not counted.
    assert not of_both(lambda: trimmed_linear_cross_entropy(hidden, weight, target, 0.4, select=select), *leaves)


def test_the_choice_waits_for_nothing(on_gpu):
    scores, valid = torch.tensor([3.0, 9.0, 1.0, 3.0, 5.0]), torch.tensor([True, False, True, True, True])
    with counted_waits() as waits:
        waits.is_on = True
        rest = without_hardest(scores, valid, 0.25)
        chosen = top_mask(scores, num_kept(0.5, valid.sum()), rest)
        drawn = top_mask(scores, num_kept(0.5, valid.sum()), valid, select="random")
        found = places(chosen, 3)
    assert not waits
    assert rest.tolist() == [True, False, True, True, False] and chosen.tolist() == [True, False, False, True, False]
    assert drawn.sum() == 2 and not (drawn & ~valid).any()
    assert found.tolist() == [0, 1, 3]  # and one more, since three places were asked for
