"""
How much work a backward pass is for the host: models of full depth and tiny width, so that the arithmetic vanishes.

`python -m tests.support.host_time [bert] [vit] [llama]` times the dense backward pass, the row-sparse engine and the
tape in turn, on one thread. e.g. 12 layers of BERT: dense 10 ms, the engine in Python 57 ms, and the tape 11 ms. All
that belongs to a backward pass is in it: preparing the graph, the key, the run, and the gradients in `grad`.
"""

import argparse
import statistics
import time
from unittest.mock import patch

import torch
import torch.nn.functional as F

from hf_trim.backward import take_kept
from hf_trim.backward.eager import rows, saved
from hf_trim.backward.settings import taped
from hf_trim.backward.tape.extension import EXTENSION


BATCH, LENGTH, KEPT = 10, 4, torch.tensor([1, 4])
WAYS = ("dense", "engine", "tape")


def build(name: str) -> tuple[torch.nn.Module, dict]:
    """A model of full depth and its inputs. Attention is one op, as on a GPU."""
    from transformers import (
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForSequenceClassification,
        ViTConfig,
        ViTForImageClassification,
    )

    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 12, "num_attention_heads": 12}
    tokens = {"input_ids": torch.randint(1, 50, (BATCH, LENGTH))}
    if name == "bert":
        config = BertConfig(vocab_size=50, attention_probs_dropout_prob=0.0, **sizes)
        return BertForSequenceClassification(config).train(), tokens
    if name == "vit":
        config = ViTConfig(image_size=4, patch_size=2, **sizes)
        return ViTForImageClassification(config).train(), {"pixel_values": torch.randn(BATCH, 3, 4, 4)}
    sizes |= {"hidden_size": 32, "num_hidden_layers": 16, "num_attention_heads": 8, "num_key_value_heads": 8}
    return LlamaForSequenceClassification(LlamaConfig(vocab_size=50, pad_token_id=0, **sizes)).train(), tokens


def dropout(x, p=0.5, training=True, inplace=False):
    """As on a GPU: one op."""
    return torch.ops.aten.native_dropout(x, p, True)[0] if training and p > 0 else x


class Backward:
    """Times backward passes of a model, each of a forward pass of its own."""

    def __init__(self, name: str):
        self.model, self.inputs = build(name)
        self.labels = torch.randint(0, 2, (BATCH,))

    def seconds(self, way: str) -> float:
        """
        Args:
            way (`str`): One of `WAYS`.

        Returns:
            `float`: Seconds of this thread.
        """
        losses = F.cross_entropy(self.model(**self.inputs).logits.float(), self.labels, reduction="none")
        self.model.zero_grad(set_to_none=True)
        start = time.thread_time()
        with taped(way == "tape"):
            take_kept(losses, KEPT, "dense" if way == "dense" else "sparse").sum().backward()
        return time.thread_time() - start


def measure(name: str, repeats: int) -> dict[str, list[float]]:
    """
    Args:
        name (`str`): The model.
        repeats (`int`): How often each way is timed, in turn.

    Returns:
        `dict[str, list[float]]`: Way → milliseconds.
    """
    # Thresholds as at real sizes, where it pays to slice a saved tensor before a formula uses it.
    with patch.object(saved, "MIN_ELEMENTS", 0), patch.object(rows, "_REMEMBER_FROM", 0):
        with patch.object(F, "dropout", dropout):
            backward = Backward(name)
            for way in WAYS * 5:  # the tape is recorded and compared
                backward.seconds(way)
            times: dict[str, list[float]] = {way: [] for way in WAYS}
            for _ in range(repeats):
                for way in WAYS:
                    times[way].append(1000 * backward.seconds(way))
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["bert", "vit", "llama"])
    parser.add_argument("--repeats", type=int, default=40)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if EXTENSION.get(wait=True) is None:
        parser.error("the tape needs a C++ compiler")
    print("| milliseconds: least, median | dense | engine | tape | tape / dense |\n|---|---|---|---|---|")
    for name in args.models:
        times = measure(name, args.repeats)
        cells = [f"{min(x):.2f}, {statistics.median(x):.2f}" for x in times.values()]
        ratios = [f"{f(times['tape']) / f(times['dense']):.2f}×" for f in (min, statistics.median)]
        print(f"| {name} | {' | '.join(cells)} | {', '.join(ratios)} |", flush=True)


if __name__ == "__main__":
    main()
