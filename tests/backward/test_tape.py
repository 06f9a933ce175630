"""
A recorded backward pass has the gradients of the dense one, step for step, whatever changes between steps.

Each test runs more steps than a tape needs to be recorded (step 2), compared (step 3) and used, with other numbers and
other kept rows in each.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hf_trim.backward import take_rows_sparse, taped, waiting
from hf_trim.backward.tape import tapes
from tests.support import models
from tests.support.programs import HEADS, OPS, draw_program, taped_difference
from tests.support.taped import STEPS, B, C, Net, T, inputs, kept_in, run


pytestmark = pytest.mark.usefixtures("counts")


# ---- models -------------------------------------------------------------------------------------------------------


def check_model(model, counts, losses_of=models.classification_losses, autocast=None, tolerance=1e-5, ks=(2,)):
    parameters = [p for p in model.parameters() if p.requires_grad]
    fixed, labels = models.batch(model)

    def losses(step):
        generator = torch.Generator().manual_seed(step)
        batch = dict(fixed)
        if "input_ids" in batch:
            ids = torch.randint(3, models.VOCAB, batch["input_ids"].shape, generator=generator)
            batch["input_ids"] = ids * batch["attention_mask"]
        else:
            batch = {name: torch.randn(x.shape, generator=generator) for name, x in batch.items()}
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            return losses_of(model, batch, labels.roll(step))

    num_recorded = min(len(ks), 2)
    run(losses, parameters, steps=3 + num_recorded, tolerance=tolerance, ks=ks)
    assert counts == {"recorded": num_recorded, "compared": 1, "ran": 1}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_models(name, counts):
    check_model(models.build(models.TRANSFORMERS[name]), counts, ks=(2, 3, 4))


def test_convolutions(counts):
    check_model(models.build(models.TIMM_MODELS["convnext"]), counts, ks=(2, 3, 4))


def test_t5(counts):
    from transformers import T5Config, T5ForSequenceClassification

    config = T5Config(
        vocab_size=models.VOCAB, d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, num_labels=3, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    model = T5ForSequenceClassification(config).train()

    def losses_of(model, batch, labels):
        ids = batch["input_ids"].clone()
        ids[:, -1] = 1
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return F.cross_entropy(logits, labels, reduction="none")

    check_model(model, counts, losses_of)


def test_pooling(counts):
    """Of texts as of images with channels last, it sets strides."""
    net, norm = Net(), nn.LayerNorm(C)

    def losses(step):
        pooled = F.adaptive_avg_pool1d(norm(net.hidden(inputs(step))).transpose(1, 2), 1)
        return net.second(pooled.flatten(1)).pow(2).mean(1)

    run(losses, [*net.parameters(), *norm.parameters()], ks=(2, 3, 4))
    assert counts["ran"] == 2


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_autocast(name, counts):
    check_model(models.build(models.TRANSFORMERS[name]), counts, autocast=torch.bfloat16, tolerance=5e-3)


def test_lora(counts):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    check_model(get_peft_model(models.build(models.TRANSFORMERS["llama"]), config), counts)


def test_experts_get_other_tokens_in_each_step(counts):
    """The numbers of their tokens are read: the tape holds for these alone, and the engine runs."""
    model = models.build(models.FAMILIES["mixtral"])
    fixed, labels = models.batch(model)

    def losses(step):
        ids = torch.randint(3, models.VOCAB, fixed["input_ids"].shape, generator=torch.Generator().manual_seed(step))
        return models.classification_losses(model, {"input_ids": ids}, labels)

    run(losses, model.parameters(), steps=9, tolerance=1e-5)
    assert counts["other numbers"] == tapes.MOST_MISSES and not counts["ran"]


def test_random_programs(counts):
    for seed in range(15):
        assert taped_difference(*draw_program(seed), seed) < 1e-10, seed


@pytest.mark.extended
@pytest.mark.parametrize("place", range(len(OPS)))
def test_each_op(place):
    for name in HEADS:
        assert taped_difference([OPS[place]], HEADS[name], seed=0) < 1e-10, name


# ---- what changes between steps -----------------------------------------------------------------------------------


CHANGING = {
    "a factor": lambda h, t: h * t,
    "a summand": lambda h, t: torch.add(h, h.sin(), alpha=t),
    "an exponent": lambda h, t: h.abs().add(1) ** t,
    "a base": lambda h, t: t**h,
    "a bound": lambda h, t: h.clamp(-t, t),
    "a divisor": lambda h, t: h / t,
    "a slope": lambda h, t: F.leaky_relu(h, t),
    "an epsilon": lambda h, t: F.layer_norm(h, (C,), eps=t),
    "a temperature": lambda h, t: F.softmax(h / t, -1),
    "a rate of dropout": lambda h, t: F.dropout(h, t / 2),
    "an integer": lambda h, t: h * int(8 * t),
    "a number in a tensor": lambda h, t: h * torch.tensor(t),
    "a shift": lambda h, t: h.roll(int(8 * t), 2),
    "a slice": lambda h, t: F.pad(h[..., int(4 * t) :], (0, int(4 * t))),
    "a mask": lambda h, t: h.masked_fill(torch.arange(C) > 8 * t, 0.0),
    "a filling": lambda h, t: h.masked_fill(h > 0, t) + h,
    "what is looked up": lambda h, t: h[:, :, (torch.arange(C) * int(8 * t)) % C],
    "a place in each row": lambda h, t: h[torch.arange(B), (torch.arange(B) * int(8 * t)) % T][:, None].expand(
        B, T, C
    ),
    "a weight": lambda h, t: torch.lerp(h, h.sin(), t),
    "an interpolation": lambda h, t: h + torch.rand(B, 1, 1, generator=torch.Generator().manual_seed(int(64 * t))) * h,
}


@pytest.mark.parametrize("name", CHANGING)
@pytest.mark.parametrize("from_step", [0, 4])
def test_a_number_changes(name, from_step, counts):
    """In each step, or only when the tape is in use."""
    net = Net()

    def losses(step):
        t = 0.25 + 0.125 * max(0, step - from_step)
        return net(CHANGING[name](net.hidden(inputs(step)), t))

    run(losses, net.parameters(), steps=8)


def test_layers_are_left_out(counts):
    layers = nn.ModuleList(Net() for _ in range(3))

    def losses(step):
        x = inputs(step)
        for i, layer in enumerate(layers):
            if (step // 2 + i) % 3:  # each choice comes again
                x = layer.hidden(x)
        return layers[0](x)

    run(losses, layers.parameters(), steps=24)
    assert counts["recorded"] == 2  # whether the last layer is there twice; the others are alike
    assert counts["ran"] == 18


def test_weights_change_places(counts):
    """The graph is the same, with another weight."""
    nets = nn.ModuleList([Net(), Net()])
    run(lambda step: nets[step % 2](nets[(step + 1) % 2].hidden(inputs(step))), nets.parameters(), steps=9)
    assert counts["ran"] == 6


def test_masks_that_were_the_same_tensor(counts):
    net = Net()

    def losses(step):
        first = (torch.rand(B, T, C) > 0.5).float()
        second = first if step < 4 else (torch.rand(B, T, C) > 0.5).float()
        return net(net.hidden(inputs(step)) * first + net.hidden(inputs(step)) * second)

    run(losses, net.parameters(), steps=9)
    assert counts["recorded"] == 2  # one for each pattern


def test_layers_are_frozen_and_unfrozen(counts):
    net = Net()

    def losses(step):
        net.first.requires_grad_(step // 4 % 2 == 0)
        return net(inputs(step))

    run(losses, net.parameters(), steps=16)
    assert counts["recorded"] == 2 and counts["ran"] > 8


def test_input_with_a_gradient(counts):
    net, x = Net(), inputs(0, requires_grad=True)
    run(lambda step: net(x * 2), [x, *net.parameters()])
    assert counts["ran"] == STEPS - 3


def test_autocast_of_the_backward_pass(counts):
    net = Net()

    def backward(loss):
        with torch.autocast("cpu", torch.bfloat16):
            loss.backward()

    run(lambda step: net(inputs(step)), net.parameters(), backward=backward)
    assert counts["ran"] == STEPS - 3


# ---- parameters ---------------------------------------------------------------------------------------------------


SHARED = {
    "two leaves get one gradient": lambda h, a, b: h + a + b,
    "one of them as a view": lambda h, a, b: h + a.view(1, C) + b,
    "twice": lambda h, a, b: h * a + a * h.sin(),
    "a square": lambda h, a, b: h + a * a * b,
    "a view": lambda h, a, b: h * a[: C // 2].repeat(2) + b,
    "slices of a whole": lambda h, a, b: h + torch.cat([a, b])[C // 2 : -C // 2],
    "changed in place": lambda h, a, b: (h + a).add_(b).relu_(),
    "through a view in place": lambda h, a, b: _in_place(h + a) * b,
    "without the input": lambda h, a, b: h + (a * b).sum(),
}


def _in_place(x):
    x = x.clone()
    x[..., 0] *= 2
    return x


@pytest.mark.parametrize("name", SHARED)
def test_shared_memory(name, counts):
    """Gradients of leaves are changed by their owners: no two share memory, nor with a graph."""
    net, a, b = Net(), nn.Parameter(torch.randn(C)), nn.Parameter(torch.randn(C))

    def backward(loss):
        loss.backward()
        for p in (a, b, *net.parameters()):
            if p.grad is not None:
                p.grad.add_(1)

    run(lambda step: net(SHARED[name](net.hidden(inputs(step)), a, b)), [a, b, *net.parameters()], backward=backward)


def test_gradients_are_accumulated(counts):
    net = Net()
    run(lambda step: net(inputs(step)), net.parameters(), zero=False)
    assert counts["ran"] > STEPS


def test_gradients_are_not_copied(counts):
    """As in plain autograd, what a leaf gets becomes its `grad`."""
    net = Net()
    sizes = []
    for step in range(5):
        with taped():
            loss = take_rows_sparse(net(inputs(step)), kept_in(step)).sum()
        net.zero_grad(set_to_none=True)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            loss.backward()
        sizes.append(sum(event.count for event in profiler.key_averages() if event.key == "aten::clone"))
    assert counts["ran"] == 2 and sizes[-1] <= sizes[0]


# ---- what only looks the same -------------------------------------------------------------------------------------

MANY = 8  # steps; from step 4 on something is another one


@pytest.mark.parametrize("names", [("sin_", "cos_"), ("exp_", "sigmoid_"), ("relu_", "abs_")], ids=" → ".join)
def test_another_op_writes_to_a_view(names, counts):
    net = Net()

    def losses(step):
        hidden = net.hidden(inputs(step)).clone()
        getattr(hidden[..., 0], names[step >= 4])()
        return net.second(hidden).pow(2).mean((1, 2))

    run(losses, net.parameters(), MANY)
    assert counts["recorded"] == 2


def test_a_function_in_python_writes_to_a_view(counts):
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, factor):
            ctx.factor = factor
            ctx.mark_dirty(x)
            return x.mul_(factor)

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factor, None

    net = Net()

    def losses(step):
        hidden = net.hidden(inputs(step)).clone()
        Double.apply(hidden[..., :2], 2.0 if step < 4 else 5.0)
        return net.second(hidden).pow(2).mean((1, 2))

    run(losses, net.parameters(), MANY)
    assert not counts["recorded"]


def test_two_storages_of_one_memory(counts):
    net = Net()

    def losses(step):
        a, b = (torch.randn(B, T, C, generator=torch.Generator().manual_seed(seed)) for seed in (step, step + 100))
        x, y = a, torch.from_numpy((a if step < 4 else b).numpy())
        return net(net.hidden(inputs(step)) * x + net.first(inputs(step)) * y)

    run(losses, net.parameters(), MANY)


@pytest.mark.parametrize("kind", ["transposed", "expanded"])
def test_views_of_one_memory(kind, counts):
    """The engine takes the kept rows of a large tensor once for all its views."""
    weight = nn.Parameter(torch.ones(256, 64))

    def losses(step):
        x, other = (
            torch.randn(B, 256, 64, generator=torch.Generator().manual_seed(seed)) for seed in (step, 99 + step)
        )
        y = x if step < 4 else other
        if kind == "transposed":
            return (x * weight).mean((1, 2)) + (y.transpose(1, 2) * weight.T).mean((1, 2))
        x, y = x.flatten(1)[..., None], y.flatten(1)[..., None]
        weights = weight.flatten()[:, None]
        return (x.expand(-1, -1, 2) * weights).mean((1, 2)) + (y.expand(-1, -1, 3) * weights).mean((1, 2))

    run(losses, [weight], MANY)


def test_kept_rows_that_the_forward_pass_has_used(counts):
    net, table = Net(), nn.Embedding(10, C)
    kept = [kept_in(step) for step in range(MANY)]

    for step in range(MANY):
        grads = []
        for take in (torch.Tensor.__getitem__, take_rows_sparse):
            net.zero_grad()
            table.zero_grad()
            torch.manual_seed(step)
            words = kept[step] if step < 4 else torch.tensor([7, 8])
            with taped():
                take(net(net.hidden(inputs(step)) + table(words).sum(0)), kept[step]).sum().backward()
            grads.append([p.grad for p in (*net.parameters(), *table.parameters())])
        torch.testing.assert_close(*grads)
    assert counts["ran"]


def test_a_gradient_that_the_forward_pass_has_used(counts):
    net = Net()
    for step in range(MANY):
        grads = []
        for take in (torch.Tensor.__getitem__, take_rows_sparse):
            net.zero_grad()
            torch.manual_seed(step)
            weights = torch.tensor([1.5, 2.5 + step])
            scale = weights if step < 4 else torch.tensor([0.3, 0.7])
            hidden = net.hidden(inputs(step))
            hidden = torch.cat([hidden[..., :2] * scale, hidden[..., 2:]], -1)
            with taped():
                take(net.second(hidden).pow(2).mean((1, 2)), kept_in(step)).backward(weights)
            grads.append([p.grad for p in net.parameters()])
        torch.testing.assert_close(*grads)
    assert counts["ran"]


def test_an_index_that_was_known_to_be_a_range(counts):
    net = Net()

    def losses(step):
        rows = waiting.mark_range((B,), {}) if step < 4 else torch.arange(B).roll(1)
        return net.second(net.hidden(inputs(step))[rows, torch.full((B,), step % T)]).pow(2).mean(1)

    run(losses, net.parameters(), MANY)


def test_a_parameter_that_becomes_another_dtype_after_the_forward_pass(counts):
    net = Net()

    def backward(loss):
        net.second.bias.data = net.second.bias.data.double()  # the backward pass does not read it
        loss.backward()
        net.second.bias.data = net.second.bias.data.float()

    run(lambda step: net(inputs(step)), net.parameters(), MANY, backward)


def test_a_backward_pass_that_fails_is_run_again(counts):
    """What a tape has put on the graph counts for its own backward pass alone."""

    class FailsOnce:
        has_failed = False

        def __call__(self, grad):
            if not self.has_failed:
                self.has_failed = True
                raise KeyError("once")

    for step in range(MANY):
        a, b = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.ones(C))
        losses = (inputs(step) + a).sum((1, 2)) + 0  # nothing is saved: the graph can be used again
        other = (b * 1).view(-1)
        if step >= 4:
            other.register_hook(FailsOnce())  # after the tape was attached, before it has run
        with taped():
            loss = take_rows_sparse(losses, kept_in(step)).sum() + other.sum()
            if step >= 4:
                with pytest.raises(KeyError):
                    loss.backward()
            loss.backward()
        torch.testing.assert_close(a.grad, torch.full((C,), 2.0 * T))
    assert counts["ran"]


def test_a_tape_is_compared_again(counts):
    net = Net()
    run(lambda step: net(inputs(step)), net.parameters(), steps=40)
    assert counts["compared"] == 3 and counts["ran"] == 35  # in step 3, and after 16 and 32 runs


def test_more_graphs_in_turn_than_tapes(counts, monkeypatch):
    monkeypatch.setattr(tapes, "MOST_TAPES", 2)
    net = Net()
    run(lambda step: net(inputs(step)[:, : 1 + step % 4]), net.parameters(), steps=40)
    assert counts["recorded"] < 6 < counts["ran"]  # two of four have one, and it is seldom another two
