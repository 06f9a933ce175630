"""The chunked head of language models against whole logits."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, set_seed

from hf_trim import TrimmingConfig, trimmed_linear_cross_entropy, trimmed_mean
from hf_trim.backward.settings import fallback_report, reset_fallbacks
from hf_trim.trainer import lm_head
from hf_trim.trainer.batch import TrimmedBatch
from hf_trim.trainer.kept import Kept
from hf_trim.trainer.lm_head import LazyLogits, LMHead, find_lm_head
from hf_trim.trainer.losses import LossCalls
from tests.support.heads import HEADS, LLAMA, make
from tests.support.helpers import relative_difference, train, weights


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(lm_head, "MIN_VOCABULARY", 8)
    monkeypatch.setattr(lm_head, "CHUNK_ELEMENTS", 7 * 20)


def gemma():
    """Logits that are capped softly: divided, tanh, multiplied."""
    config = Gemma2Config(**LLAMA, head_dim=8, final_logit_softcapping=3.0, attn_implementation="eager")
    return Gemma2ForCausalLM(config)


def llama_with_bias():
    model = make("llama")
    model.lm_head.bias = nn.Parameter(torch.randn(20))
    return model


MODELS = {
    **{head: (lambda head=head: make(head)) for head in ("llama", "gpt2", "mixtral", "masked-lm", "bart", "t5")},
    "masked-lm-sparse": lambda: make("masked-lm-sparse"),
    "shift-labels": lambda: make("shift-labels"),
    "softcapped": gemma,
    "with-bias": llama_with_bias,
}


@pytest.mark.parametrize(
    "keep, unit",
    [(0.9, "token"), (0.9, "sample"), (1.0, "token"), pytest.param(1.0, "sample", marks=pytest.mark.extended)],
)
@pytest.mark.parametrize("name", MODELS)
def test_chunked_head_trains_as_whole_logits(name, keep, unit, tmp_path, monkeypatch):
    if (name, unit) == ("masked-lm-sparse", "sample"):  # it has losses for the masked tokens only
        unit = "token"
    rows = HEADS[name if name in HEADS else "llama"][1]()
    computed, compute = [], LazyLogits._compute
    monkeypatch.setattr(LazyLogits, "_compute", lambda *a, **k: computed.append(a) or compute(*a, **k))
    monkeypatch.setattr(LazyLogits, "materialize", None)

    def trained(backward):
        set_seed(0)
        return train(
            MODELS[name](), rows, tmp_path, num_train_epochs=1, gradient_accumulation_steps=2, trim_unit=unit,
            trim_backward=backward, trim_keep_start=keep, trim_keep_end=0.3, max_steps=1 if keep == 1 else 3,
        )  # fmt: skip

    dense = trained("dense")
    assert not computed
    chunked = trained("auto")
    assert len(computed) >= (2 if keep == 1 else 10)
    assert chunked.losses == pytest.approx(dense.losses, rel=1e-5)
    set_seed(0)
    start = weights(MODELS[name]())
    assert relative_difference(weights(chunked) - start, weights(dense) - start) < 1e-5
    logs = zip(chunked.state.log_history[:-1], dense.state.log_history[:-1], strict=True)
    for ours, reference in logs:
        assert "full_loss" in ours and ("trim_threshold" in ours) == (keep < 1)
        for key in {"kept_fraction", "trim_threshold", "full_loss"} & ours.keys():
            assert ours[key] == pytest.approx(reference[key], rel=1e-4)


def test_a_sample_whose_losses_are_not_known_is_refused(tmp_path):
    with pytest.raises(ValueError, match="which belong to which is not known: use trim_unit='token'"):
        train(make("masked-lm-sparse"), HEADS["masked-lm-sparse"][1](), tmp_path, trim_unit="sample")


def batch_of(size):
    return TrimmedBatch(TrimmingConfig(), 0.5, size, sparse=False)


def lazy_and_whole(hidden=None):
    """The logits of a layer, lazily and as ever."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 20)
    hidden = torch.randn(4, 5, 6, requires_grad=True) if hidden is None else hidden
    with LossCalls(batch_of(4), LMHead(layer.weight, keep=0.5)):
        lazy = layer(hidden)
    assert isinstance(lazy, LazyLogits)
    return layer, hidden, lazy, layer(hidden)


REMEMBERED = {
    "shift": lambda x: x[..., :-1, :].contiguous().view(-1, 20),
    "slice": lambda x: x[:, 1:].reshape(-1, x.size(-1)),
    "select": lambda x: x[:, 2],
    "cast": lambda x: x.to(torch.float64).view(-1, 20),
    "float": lambda x: x.float().flatten(0, -2) if x.dim() == 3 else x,
    "cap": lambda x: (torch.tanh(x / 5.0) * 5.0).view(20, -1),
    "scale": lambda x: (x * 0.5 + 1.0 - torch.ones(1, 1, 20)).view(-1, 20),
    "reversed": lambda x: (2.0 * x).reshape(4, 5, -1).view((20, 20)),
}
RUN = {
    "transpose": lambda x: x.transpose(1, 2),
    "vocabulary": lambda x: x[..., :7],
    "softmax": lambda x: x.softmax(-1),
    "argmax": lambda x: x.argmax(-1),
    "learned": lambda x: x * torch.nn.Parameter(torch.tensor(2.0)),
    "rows": lambda x: x[x.sum(-1) > 0],
    "mixed": lambda x: x.view(2, -1),
    "in-place": lambda x: x.clone().mul_(2),
    "sum": lambda x: torch.sum(x),
    "numpy": lambda x: torch.as_tensor(x.detach().numpy()),
    "stack": lambda x: torch.stack([x, x]),
    "two": lambda x: x - x.mean(-1, keepdim=True),
}


@pytest.mark.parametrize("name", REMEMBERED)
def test_operations_that_are_remembered(name):
    layer, hidden, lazy, whole = lazy_and_whole()
    lazy, whole = REMEMBERED[name](lazy), REMEMBERED[name](whole)
    assert isinstance(lazy, LazyLogits) and lazy.computed is None
    assert (lazy.shape, lazy.dtype, lazy.ndim) == (whole.shape, whole.dtype, whole.ndim)
    assert torch.equal(lazy.materialize(), whole)
    assert "LazyLogits(shape=" in repr(lazy)


@pytest.mark.parametrize("name", RUN)
def test_other_operations_find_the_ordinary_logits(name):
    layer, hidden, lazy, whole = lazy_and_whole()
    ours, expected = RUN[name](lazy), RUN[name](whole)
    assert type(ours) is torch.Tensor and torch.equal(ours, expected)
    if expected.requires_grad:
        ours.sum().backward()
        grad, hidden.grad = hidden.grad, None
        expected.sum().backward()
        assert torch.allclose(grad, hidden.grad)


def test_logits_of_one_token_times_themselves():
    layer, hidden, lazy, whole = lazy_and_whole(torch.randn(1, 6, requires_grad=True))
    ours, expected = ((x * x).sum() for x in (lazy, whole))
    assert relative_difference(*(torch.autograd.grad(x, hidden)[0] for x in (ours, expected))) < 1e-6


def test_an_operation_in_place_reaches_the_logits():
    layer, hidden, lazy, whole = lazy_and_whole()
    lazy.mul_(2.0)
    assert torch.equal(lazy + 0, whole * 2)


FEW, MANY = [0, 2, 3, 7, 19], [*range(8), *range(9, 20)]


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"weight": torch.linspace(0.5, 2.0, 20)}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "expected_keep, kept, num_computed",
    [(0.5, FEW, [18, 4]), (0.9, MANY, [18, 1]), (0.9, FEW, [18, 4]), (1.0, range(20), [18])],
)
def test_losses_and_gradients(expected_keep, kept, num_computed, options, dtype, monkeypatch):
    layer, hidden, lazy, whole = lazy_and_whole()
    target = torch.randint(0, 20, (20,))
    target[3] = target[11] = -100
    kept, computed, compute = torch.tensor(kept), [], LazyLogits._compute
    monkeypatch.setattr(LazyLogits, "_compute", lambda *a, **k: computed.append(len(a[1])) or compute(*a, **k))
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        batch = batch_of(4)
        with LossCalls(batch, LMHead(layer.weight, expected_keep)):
            F.cross_entropy(layer(hidden).view(-1, 20), target, **options)
        (call,) = batch.calls
        expected = F.cross_entropy(layer(hidden).view(-1, 20), target, reduction="none", **options)
    tolerance = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(call.losses.flatten(), expected.float(), **tolerance)
    leaves = (hidden, layer.weight, layer.bias)
    value = call.logits.attach(torch.zeros(()), lambda grad: Kept(kept, grad))
    ours = torch.autograd.grad(3 * value, leaves)
    reference = torch.autograd.grad(3 * expected[kept].sum(), leaves)
    for a, b in zip(ours, reference, strict=True):
        assert relative_difference(a, b) < (1e-6 if dtype == torch.float32 else 2e-2)
    assert computed == num_computed


def test_what_is_left_out_may_be_infinite():
    layer, hidden, *_ = lazy_and_whole()
    target, kept = torch.arange(20), torch.tensor(MANY)
    spoilt = hidden.detach().view(20, 6).index_fill(0, torch.tensor(8), torch.inf).requires_grad_()
    logits = LazyLogits(spoilt, layer.weight, layer.bias, head=LMHead(layer.weight, 0.9))
    assert not logits.score(target)[8].isfinite()
    value = logits.attach(torch.zeros(()), lambda grad: Kept(kept, grad))
    expected = F.cross_entropy(layer(hidden).view(20, 20)[kept], target[kept], reduction="sum")
    ours, reference = (torch.autograd.grad(x, layer.weight)[0] for x in (value, expected))
    assert relative_difference(ours, reference) < 1e-6


def test_gradients_are_computed_with_the_scores_as_long_as_adaptive_keeps_most(tmp_path, monkeypatch):
    with_gradients, compute = [], LazyLogits._compute
    monkeypatch.setattr(LazyLogits, "_compute", lambda *a, **k: with_gradients.append(a[2]) or compute(*a, **k))
    for skip, expected in ((0.0, [True] * 3), (0.5, [True, True, False, True, False, True])):
        train(
            make("llama"), HEADS["llama"][1](), tmp_path / str(skip), trim_schedule="adaptive", trim_mass=0.99,
            trim_skip_hardest=skip, trim_unit="token", max_steps=3,
        )  # fmt: skip
        assert with_gradients == expected
        with_gradients.clear()


def test_what_is_in_front_gets_row_sparse_gradients_where_samples_are_trimmed(tmp_path):
    set_seed(0)
    reset_fallbacks()
    arguments = {"trim_unit": "sample", "trim_backward": "sparse", "trim_strict": True, "max_steps": 2}
    rows = HEADS["llama"][1]()
    sparse = train(make("llama"), rows, tmp_path, trim_keep_start=0.25, trim_keep_end=0.25, **arguments)
    assert fallback_report() == {}
    dense = train(make("llama"), rows, tmp_path, trim_keep_start=0.25, trim_keep_end=0.25, trim_unit="sample",
                  max_steps=2, trim_backward="dense")  # fmt: skip
    start = weights(make("llama"))
    assert relative_difference(weights(sparse) - start, weights(dense) - start) < 1e-5


def test_which_layer_is_a_chunked_head(monkeypatch):
    assert find_lm_head(make("llama")).out_features == 20
    assert find_lm_head(make("masked-lm")).out_features == 20
    assert find_lm_head(make("token-classification")) is None
    assert find_lm_head(nn.Linear(2, 30)) is None
    monkeypatch.setattr(lm_head, "MIN_VOCABULARY", 21)
    assert find_lm_head(make("llama")) is None


@pytest.mark.parametrize("keep", [0.3, 0.9, 1.0])
def test_a_second_backward_pass(keep):
    torch.manual_seed(0)
    layer, hidden = nn.Linear(6, 20), torch.randn(9, 6)
    loss = trimmed_linear_cross_entropy(hidden, layer.weight, torch.arange(9), keep, bias=layer.bias)
    first = torch.autograd.grad(loss, layer.weight, retain_graph=True)[0]
    assert relative_difference(torch.autograd.grad(loss, layer.weight)[0], first) < 1e-6


@pytest.mark.parametrize("keep", [0.3, 0.9, 1.0])
def test_trimmed_linear_cross_entropy(keep):
    torch.manual_seed(0)
    layer, hidden = nn.Linear(6, 20), torch.randn(4, 5, 6, requires_grad=True)
    target = torch.randint(0, 20, (4, 5))
    target[:, 0] = -100
    leaves = (hidden, layer.weight, layer.bias)
    loss = trimmed_linear_cross_entropy(hidden, layer.weight, target, keep, bias=layer.bias, label_smoothing=0.1)
    losses = F.cross_entropy(layer(hidden).transpose(1, 2), target, reduction="none", label_smoothing=0.1)
    expected = trimmed_mean(losses, keep, valid=target != -100)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for ours, reference in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(expected, leaves), strict=True):
        assert relative_difference(ours, reference) < 1e-6
    nothing = trimmed_linear_cross_entropy(hidden, layer.weight, torch.full_like(target, -100), keep)
    assert nothing == 0 and torch.autograd.grad(nothing, hidden)[0].count_nonzero() == 0
    for arguments, match in (
        ({"keep": 0.0}, "keep must be a fraction"),
        ({"target": target[:, 1:]}, "Expected hidden"),
        ({"select": "hard"}, "select must be one of"),
        ({"hidden": hidden * torch.inf}, "losses are NaN or infinite"),
    ):
        arguments = {"hidden": hidden, "weight": layer.weight, "target": target, "keep": 0.5, **arguments}
        with pytest.raises(ValueError, match=match):
            trimmed_linear_cross_entropy(**arguments)
