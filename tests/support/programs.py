"""
Random small programs, which keep rows apart or mix them in many ways, and their gradients on the kept rows beside the
dense ones: `python -m tests.support.programs --count 20000`, or `--compiled --count 400`, or `--taped --count 2000`.

e.g. `difference([F.linear, ROW_BY_ROW["softmax"]], HEADS["mean"], seed=0)`: x is [B, T, WIDTH], then two ops, the mean
over T, and losses [B], of which a random part is kept.
"""

import argparse
import logging
import random
from collections import Counter
from functools import partial
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import nn

from hf_trim.backward.compiled.backend import keep_backward_graphs
from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import checked, fallback_report, refused_graphs, reset_fallbacks, taped
from hf_trim.backward.tape.tapes import Tapes
from tests.support.compiled import DECOMPOSED


WIDTH = 4


def attention(query, key, value):
    return (query @ key.transpose(1, 2)).softmax(-1) @ value


def order(x, dim):
    return x.detach().argsort(dim)


def along(dim, function):
    """`function` on the first dimension of what `dim` is brought to the front of."""
    return lambda x, w: function(x.transpose(0, dim)).transpose(0, dim)


def tokens_first(x, w, op):
    return op(x.transpose(0, 1).contiguous(), w).transpose(0, 1)


def rows_last(x, w, op):
    return op(x.transpose(0, 2).contiguous(), w[0, 0]).transpose(0, 2)


def rotor(x):
    return torch.complex(x.cos(), x.sin())


# Each op maps x, [batch, tokens, WIDTH], and a weight w, [WIDTH, WIDTH], to the shape of x.
ROW_BY_ROW = {
    "linear": F.linear,
    "merged": lambda x, w: F.linear(x.reshape(-1, WIDTH), w).reshape(x.shape),
    "tokens first": lambda x, w: (
        F.linear(x.transpose(0, 1).flatten(0, 1), w).view(x.shape[1], -1, WIDTH).transpose(0, 1)
    ),
    "gelu": lambda x, w: F.gelu(x),
    "exp": lambda x, w: (-x * x).exp(),
    "layer norm": lambda x, w: F.layer_norm(x, (WIDTH,), w[0]),
    "layer norm of tokens": lambda x, w: F.layer_norm(x.transpose(1, 2), (x.shape[1],)).transpose(1, 2),
    "group norm": lambda x, w: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "softmax": lambda x, w: x.softmax(-1),
    "attention": lambda x, w: attention(x @ w, x, x),
    "sdpa": lambda x, w: F.scaled_dot_product_attention(x[:, None], (x @ w)[:, None], x[:, None])[:, 0],
    "einsum": lambda x, w: torch.einsum("btc,bsc->bts", x, x)[:, :, :1] * x,
    "mean": lambda x, w: x - x.mean(1, keepdim=True),
    "standard deviation": lambda x, w: x / (x.std(1, keepdim=True) + 1),
    "norm": lambda x, w: x / (x.flatten(1).norm(dim=1)[:, None, None] + 1),
    "cumsum": lambda x, w: x.cumsum(1),
    "product": lambda x, w: x * x.tanh().prod(-1, keepdim=True),
    "amax": lambda x, w: x + x.amax(1, keepdim=True),
    "max": lambda x, w: x + x.max(1, keepdim=True).values,
    "logsumexp": lambda x, w: x + x.logsumexp(1, keepdim=True),
    "sort": lambda x, w: x.sort(1).values,
    "flip": lambda x, w: x.flip(1),
    "roll": lambda x, w: x.roll(1, 1),
    "first token": lambda x, w: x + x[:, :1],
    "pad": lambda x, w: F.pad(x, (0, 0, 1, 0))[:, :-1] * w[0],
    "cat": lambda x, w: torch.cat([x, x * 2], 1)[:, ::2][:, : x.shape[1]],
    "copies in front": lambda x, w: (torch.stack([x, x.sin()]).flatten(0, 1) @ w).unflatten(0, (2, -1)).sum(0),
    "copies behind": lambda x, w: (torch.stack([x, x.sin()], 1).flatten(0, 1) @ w).unflatten(0, (-1, 2)).sum(1),
    "stack": lambda x, w: torch.stack([x_i * i for i, x_i in enumerate(x.unbind(2))], 2),
    "positions": lambda x, w: x + torch.arange(x.shape[1])[None, :, None] * w[0],
    "a token each": lambda x, w: x * x[torch.arange(x.shape[0]), order(x.sum(-1), 1)[:, 0]][:, None],
    "gather": lambda x, w: x + x.gather(1, order(x, 1)),
    "scatter": lambda x, w: torch.zeros_like(x).scatter_add(1, order(x, 1), x),
    "select scatter": lambda x, w: x.select_scatter(x[:, 1] * 2, 1, 0),
    "slice scatter": lambda x, w: x.slice_scatter(x[:, :2] * 2, 1, 0, 2),
    "index add": lambda x, w: x.index_add(1, torch.tensor([0, 1]), x[:, :2]),
    "table": lambda x, w: x + w[x.detach().argmax(-1)],
    "embedding": lambda x, w: x + F.embedding(x.detach().argmax(-1), w),
    "where": lambda x, w: torch.where(x > 0, x @ w, 0.1 * x),
    "tril": lambda x, w: (x @ x.transpose(1, 2)).tril() @ x,
    "convolution": lambda x, w: F.conv1d(x.transpose(1, 2), torch.stack([w] * 3, -1), padding=1).transpose(1, 2),
    "pooling": lambda x, w: x + F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "expand": lambda x, w: x + x[:, :, :1].expand(-1, -1, WIDTH) * w[0],
    "glu": lambda x, w: F.glu(torch.cat([x, x @ w], -1)),
    "dropout": lambda x, w: F.dropout(x, 0.3),
    "silu": lambda x, w: F.silu(x) * F.softplus(x),
    "rms norm": lambda x, w: F.rms_norm(x, (WIDTH,), w[0]),
    "cosine": lambda x, w: x * F.cosine_similarity(x, x[:, :1], dim=-1)[..., None],
    "l1": lambda x, w: x + F.smooth_l1_loss(x, x.roll(1, 1), reduction="none").mean(1, keepdim=True),
    "image convolution": lambda x, w: x + F.conv2d(x[:, None], w[:2, None, :3, None], padding=(1, 0)).mean(1),
    "depthwise convolution": lambda x, w: F.conv1d(x.mT, w[:, None, :3], padding=1, groups=WIDTH).mT,
    "max pooling": lambda x, w: x + F.max_pool2d(x[:, None], (3, 1), 1, (1, 0))[:, 0],
    "adaptive pooling": lambda x, w: x + F.adaptive_avg_pool2d(x[:, None], (2, WIDTH))[:, 0].mean(1, keepdim=True),
    "upsampling": lambda x, w: F.interpolate(x.mT, scale_factor=2)[:, :, ::2].mT * w[0],
    "unfold": lambda x, w: x + x.unfold(1, 2, 2).sum(-1).mean(1, keepdim=True),
    "norm of channels": lambda x, w: F.normalize(x, dim=-1),
    "complex": lambda x, w: torch.view_as_real(
        torch.view_as_complex(x.contiguous().unflatten(-1, (2, 2))) ** 2
    ).flatten(-2),
    "complex product": lambda x, w: (x.to(torch.cdouble) @ torch.complex(w, w.mT)).abs(),
    "conjugate": lambda x, w: (torch.complex(x, x @ w).conj() @ torch.complex(w, w.mT)).imag,
    "conjugates": lambda x, w: (rotor(x).mH @ rotor(x @ w)).real.mean(1, keepdim=True) * rotor(x).conj().imag,
    "spectrum": lambda x, w: torch.fft.irfft(torch.fft.rfft(x, dim=1) * w[0], n=x.shape[1], dim=1),
    "polar": lambda x, w: (torch.polar(x.cos(), x).conj() * torch.complex(w[0], w[1])).real,
    "rotated": lambda x, w: x * w[0] + torch.cat([-x[..., 2:], x[..., :2]], -1) * w[1],
}


# Those that write into a part of a tensor, or index it.
def assigned(index, value):
    """Writes `value(x)` to a part of `x * 1`."""

    def op(x, w):
        out = x * 1
        out[index(x)] = value(x) if callable(value) else value
        return out

    return op


def row_numbers(x):
    return torch.arange(x.shape[0])[:, None].expand(-1, x.shape[1])


def channels_apart(x, w):
    """Reads and writes at indices with a slice between them, which brings what is indexed to the front."""
    tokens, heads = torch.tensor([0, 2, 2]), torch.tensor([1, 0, 1])
    out = x.unflatten(2, (2, 2)).transpose(2, 3) * 1
    read = out[:, tokens, :, heads]
    out[:, tokens[:2], :, heads[:2]] = read[:2].sin()
    return out.flatten(2) + read.mean(0).repeat(1, 2)[:, None]


def experts(x, w):
    """Each token goes to one of two experts."""
    tokens, out = x.flatten(0, 1), torch.zeros_like(x).flatten(0, 1)
    chosen = tokens.detach().sum(-1) > 0
    for mask, weight in ((chosen, w), (~chosen, w.t())):
        (place,) = torch.where(mask)
        out.index_add_(0, place, tokens[place].tanh() @ weight)
    return out.view_as(x) + x


def loop_over_tokens(x, w):
    """A recurrence whose states are written into a buffer."""
    out, state = torch.zeros_like(x), torch.zeros_like(x[:, 0])
    for t in range(x.shape[1]):
        state = (state @ w + x[:, t]).tanh()
        out[:, t] = state
    return out


ROW_BY_ROW |= {
    "windows": lambda x, w: (
        F.scaled_dot_product_attention(
            *[(y.unflatten(2, (2, 2)).movedim(2, 1).flatten(0, 1)[:, None]) for y in (x, x @ w, x)]
        )[:, 0]
        .unflatten(0, (-1, 2))
        .movedim(1, 2)
        .flatten(2)
    ),
    "experts": experts,
    "loop over tokens": loop_over_tokens,
    "assigned mask": assigned(lambda x: order(x.sum(-1), 1) > 2, 0.5),
    "scattered mask": lambda x, w: (x * w[0]).masked_scatter(
        (torch.arange(x.shape[1]) < 2)[:, None], x[:, 2:4].flatten(0, 1).sin()
    ),
    "assigned": assigned(lambda x: (slice(None), torch.tensor([2, 0])), lambda x: x[:, :2].sin()),
    "assigned number": assigned(lambda x: (slice(None), torch.tensor([2, 0])), 0.5),
    "assigned token each": assigned(
        lambda x: (torch.arange(x.shape[0]), order(x.sum(-1), 1)[:, 0]), lambda x: x[:, 1].sin()
    ),
    "a masked token each": lambda x, w: x + x[order(x.sum(-1), 1) == 0][:, None] @ w,
    "masked columns": lambda x, w: x + x[:, torch.arange(x.shape[1]) % 2 == 0].mean(1, keepdim=True),
}
# The same where the rows are in the second dimension, or in the last.
CHANNELS = ("linear", "layer norm", "rms norm", "norm of channels", "softmax", "einsum", "table", "embedding", "glu")
POINTWISE = ("gelu", "exp", "dropout", "silu")
COMPLEX = ("complex", "complex product", "conjugate", "polar")
for name in (*CHANNELS, *POINTWISE, *COMPLEX, "where", "expand", "rotated"):
    ROW_BY_ROW[f"{name}, tokens first"] = partial(tokens_first, op=ROW_BY_ROW[name])
for name in POINTWISE:
    ROW_BY_ROW[f"{name}, rows last"] = partial(rows_last, op=ROW_BY_ROW[name])
# Those that mix rows, and some that have no rule.
MIXING = {
    "wrongly split": lambda x, w: F.linear(x.transpose(0, 1).flatten(0, 1), w).reshape(x.shape),
    "transposed": lambda x, w: x + x.reshape(-1, WIDTH).t().reshape(x.shape),
    "softmax": lambda x, w: x.softmax(0),
    "attention": along(1, lambda x: attention(x, x, x)),
    "einsum": lambda x, w: torch.einsum("btc,sc->bts", x, x[:, 0])[:, :, :1] * x,
    "gram": lambda x, w: x + torch.einsum("btc,btd->cd", x, x)[0],
    "tril": along(1, lambda x: (x @ x.transpose(1, 2)).tril() @ x),
    "mean": lambda x, w: x - x.mean(0, keepdim=True),
    "standard deviation": lambda x, w: x / (x.std(0, keepdim=True) + 1),
    "norm": lambda x, w: x / (x.norm() + 1),
    "sum": lambda x, w: x + x.sum(0),
    "cumsum": lambda x, w: x.cumsum(0),
    "amax": lambda x, w: x * x.amax(0),
    "batch norm": lambda x, w: F.batch_norm(x.transpose(1, 2), None, None, training=True).transpose(1, 2),
    "sort": lambda x, w: x.sort(0).values,
    "flip": lambda x, w: x.flip(0),
    "flip of all": lambda x, w: x.flip(0, 1),
    "roll": lambda x, w: x.roll(1, 0) + x,
    "roll of all": lambda x, w: x.roll(1),
    "neighbour": lambda x, w: torch.cat([x[1:], x[:1]]),
    "first row": lambda x, w: x + x[0],
    "last row": lambda x, w: x * x[-1].sin(),
    "row numbers": lambda x, w: x * torch.arange(x.shape[0])[:, None, None],
    "batch size": lambda x, w: x / x.shape[0],
    "a token of another": lambda x, w: x * x[torch.arange(x.shape[0]).flip(0), order(x.sum(-1), 1)[:, 0]][:, None],
    "shuffled": lambda x, w: x + x[order(x.sum((1, 2)), 0)],
    "gather": lambda x, w: x + x.gather(0, order(x, 0)),
    "scatter": lambda x, w: torch.zeros_like(x).scatter_add(0, order(x, 0), x),
    "slice scatter": lambda x, w: x.slice_scatter(x[:2] * 2, 0, 0, 2),
    "convolution": lambda x, w: F.conv1d(x.permute(1, 2, 0), torch.stack([w] * 3, -1), padding=1).permute(2, 0, 1),
    "joined": lambda x, w: (torch.cat([x, x.sin()]) @ w).chunk(2)[1],
    "bilinear": lambda x, w: F.bilinear(x, x, w[:, None] * w),
    "cross product": lambda x, w: torch.cross(x[..., :3], x[..., 1:], dim=-1) @ w[:3] + x,
    "repeated": lambda x, w: (x.repeat_interleave(2, 0) @ w)[::2],
    "row numbers looked up": lambda x, w: x * row_numbers(x)[:, torch.arange(x.shape[1]).flip(0), None],
    "rolled by the batch size": lambda x, w: x * x.roll(x.shape[0], 1),
    "gram of complex numbers": lambda x, w: x + torch.einsum("btc,btd->cd", rotor(x).conj(), rotor(x)).imag[0],
    "spectrum of rows": lambda x, w: x + torch.fft.fft(x, dim=0).conj().imag,
    "indices apart": channels_apart,
    "loop": lambda x, w: torch.stack([sample @ w for sample in x]),
    "loop of numbers": lambda x, w: x * torch.stack([sample.square().sum() for sample in x]).view(-1)[:, None, None],
    "empty pieces": lambda x, w: torch.cat([part.sin() for part in x.split([2, 0, x.shape[0] - 2])]),
    "joined with nothing": lambda x, w: torch.cat([x[:0], x @ w, x[x.shape[0] :]]),
    "masked tokens": lambda x, w: x.masked_scatter(x > 0, x[x > 0].sin()),
    "assigned rows": assigned(lambda x: torch.tensor([1, 0]), lambda x: x[:2].sin()),
    "assigned slice": assigned(lambda x: (slice(1, 3), 0), lambda x: x[:2, 1].sin()),
}
HEADS = {
    "mean": lambda x, labels: x.mean(1),
    "first token": lambda x, labels: x[:, 0],
    "a token each": lambda x, labels: x[torch.arange(x.shape[0]), labels],
    "amax": lambda x, labels: x.amax(1),
    "flat": lambda x, labels: x.flatten(1)[:, :WIDTH],
}
SIZES = ((6, 5), (8, 8), (9, 4), (5, 6))  # of batch and tokens
OPS = [*ROW_BY_ROW.values(), *MIXING.values()]


class Program(nn.Module):
    """A chain of ops, in double precision so that rounding explains nothing."""

    def __init__(self, ops: list, head):
        super().__init__()
        self.ops, self.head = ops, head
        weights = torch.randn(len(ops) + 2, WIDTH, WIDTH, dtype=torch.double) / 2
        self.weights = nn.ParameterList(nn.Parameter(weight) for weight in weights)

    def forward(self, x, labels):
        x = x @ self.weights[-1]
        for op, weight in zip(self.ops, self.weights[:-2], strict=True):
            x = op(x, weight)
        return F.cross_entropy(self.head(x, labels) @ self.weights[-2], labels, reduction="none")


def difference(ops: list, head, seed: int, compiled: bool = False) -> float:
    """The largest difference to the dense gradients, relative to them (to 0.001 if they are smaller)."""
    reset_fallbacks()
    if compiled:
        torch._dynamo.reset()  # it compiles the same code a limited number of times
    torch.manual_seed(seed)
    draw = random.Random(seed)
    batch, tokens = draw.choice(SIZES)
    program = Program(ops, head)
    x, labels = torch.randn(batch, tokens, WIDTH, dtype=torch.double), torch.randint(WIDTH, (batch,))

    def gradients(call, take):
        inputs = x.clone().requires_grad_()
        program.zero_grad()
        torch.manual_seed(seed)
        take(call(inputs, labels)).mean().backward()
        grads = [p.grad for p in (inputs, *program.parameters()) if p.grad is not None]
        return torch.cat([grad.flatten() for grad in grads])

    differences = []
    # The proof alone must know; and the tensors are small.
    with keep_backward_graphs(), checked(False), patch("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0):
        call = torch.compile(program, backend=DECOMPOSED, dynamic=True) if compiled else program
        for _ in range(2):
            kept = torch.tensor(sorted(draw.sample(range(batch), draw.randint(1, batch - 1))))
            dense = gradients(call, partial(torch.index_select, dim=0, index=kept))
            sparse = gradients(call, partial(take_rows_sparse, kept=kept, dense_above=1.0))
            differences.append(float((sparse - dense).norm() / dense.norm().clamp(min=1e-3)))
    return max(differences)


def taped_difference(ops: list, head, seed: int) -> float:
    """The same over eight steps with a tape. Each has other numbers, other kept rows and another number of them."""
    torch.manual_seed(seed)
    draw = random.Random(seed)
    batch, tokens = draw.choice(SIZES)
    program, differences = Program(ops, head), []
    with patch("hf_trim.backward.eager.saved.MIN_ELEMENTS", 0), taped():
        for step in range(8):
            torch.manual_seed(1000 * seed + step)
            x, labels = torch.randn(batch, tokens, WIDTH, dtype=torch.double), torch.randint(WIDTH, (batch,))
            kept = torch.randperm(batch)[: draw.randint(1, batch - 1)]
            grads = []
            for take in (lambda losses, kept: losses[kept], partial(take_rows_sparse, dense_above=1.0)):
                torch.manual_seed(step)
                losses = program(x.requires_grad_(), labels)
                x.grad = None
                program.zero_grad()
                take(losses, kept).mean().backward()
                grads.append([p.grad for p in (x, *program.parameters())])
            assert [a is None for a in grads[0]] == [b is None for b in grads[1]]
            dense, sparse = (torch.cat([x.flatten() for x in way if x is not None]) for way in grads)
            differences.append(float((sparse - dense).norm() / dense.norm().clamp(min=1e-3)))
    return max(differences)


def draw_program(seed: int) -> tuple:
    """One to three ops and a head."""
    draw = random.Random(seed)
    return [draw.choice(OPS) for _ in range(draw.choice((1, 2, 3)))], draw.choice([*HEADS.values()])


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--taped", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # reasons are counted
    on_rows, reasons = 0, Counter()
    for seed in range(args.seed, args.seed + args.count):
        program = draw_program(seed)
        with patch("hf_trim.backward.eager.sparse.TAPES", Tapes()) as tapes:
            error = taped_difference(*program, seed) if args.taped else difference(*program, seed, args.compiled)
        assert error < 1e-10, (seed, error)
        on_rows += not fallback_report()
        reasons.update(refused_graphs())
        reasons.update(tapes.counts)
    print(f"{args.count} programs as dense, {on_rows} of them on the kept rows alone")
    for reason, count in reasons.most_common():
        print(f"{count} {'tapes' if args.taped else 'graphs refused'}: {reason}")
