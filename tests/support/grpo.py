"""
What rows without a gradient cost a step of TRL's `GRPOTrainer`: `python -m tests.support.grpo`.

It times forward and backward pass of the trainer's own loss, plain and with a hook that skips such rows, in turn. 63 %
of the answers have no advantage, as where all answers to a prompt get the same reward.
"""

# Before transformers: it repairs torchvision where torch has no CUDA.
from hf_trim import skip_zero_rows
from hf_trim.backward import fallback_report


# isort: split
import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from itertools import pairwise

import tokenizers
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer, set_seed


CHAT = (
    "{% for message in messages %}{% if message.role == 'assistant' %}{% generation %}{{ message.content }} 2"
    "{% endgeneration %}{% else %}{{ message.content }} 1 {% endif %}{% endfor %}"
)


def tokenizer():
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(n): n for n in range(20)}, unk_token="19"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="0", eos_token="2", unk_token="19", chat_template=CHAT
    )


def skip(module, args, output):
    """The example of the docs: a hook of the model's backbone."""
    output.last_hidden_state = skip_zero_rows(output.last_hidden_state)


def make_trainer(options) -> Trainer:
    """A `GRPOTrainer` of a Llama with random weights; it trains on nothing."""
    import trl  # some tests have no need for it

    set_seed(0)
    config = LlamaConfig(
        vocab_size=options.vocab_size, hidden_size=options.hidden_size, num_hidden_layers=options.layers,
        intermediate_size=4 * options.hidden_size, num_attention_heads=options.hidden_size // 64, pad_token_id=0,
    )  # fmt: skip
    return trl.GRPOTrainer(
        LlamaForCausalLM(config),
        reward_funcs=lambda completions, **kwargs: [0.0] * len(completions),
        args=trl.GRPOConfig(
            "unused", use_cpu=True, bf16=False, report_to="none", num_generations=8,
            per_device_train_batch_size=options.batch_size, gradient_checkpointing=options.gradient_checkpointing,
        ),
        train_dataset=Dataset.from_list([{"prompt": "3"}]), processing_class=tokenizer(),
    )  # fmt: skip


def make_batch(options) -> dict:
    """Prompts and answers of random tokens; some answers have an advantage."""
    shape = options.batch_size, options.seq_length // 2
    ids, mask = torch.randint(1, options.vocab_size, (2, *shape)), torch.ones(shape, dtype=torch.long)
    kept = round(options.batch_size * (1 - options.zero))
    advantages = torch.randn(options.batch_size) * (torch.randperm(options.batch_size) < kept)
    return {
        "prompt_ids": ids[0], "prompt_mask": mask, "completion_ids": ids[1], "completion_mask": mask,
        "advantages": advantages, "num_items_in_batch": mask.sum(),
    }  # fmt: skip


def time_step(trainer: Trainer, batch: dict, hook: Callable | None) -> tuple[list[float], torch.Tensor]:
    """Seconds of the forward pass, of the head's backward pass and of that of the layers; and the gradients."""
    moments = []

    def note(*_):
        moments.append(time.perf_counter())

    def backbone(module, args, output):
        output.last_hidden_state.register_hook(note)  # between the head and the layers
        if hook is not None:
            hook(module, args, output)

    trainer.model.zero_grad()
    handle = trainer.model.base_model.register_forward_hook(backbone)
    note()
    loss = trainer.compute_loss(trainer.model, batch)
    note()
    loss.backward()
    note()
    handle.remove()
    gradients = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    return [after - before for before, after in pairwise(moments)], gradients


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.support.grpo")
    sizes = {"batch_size": 32, "seq_length": 64, "hidden_size": 384, "layers": 6, "vocab_size": 4096, "repeats": 7}
    for name, value in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--zero", type=float, default=0.63, help="share of the answers without an advantage")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    trainer, batch = make_trainer(options), make_batch(options)
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1  # `train` sets it
    ways, seconds, gradients = {"plain": None, "skipping": skip}, {"plain": [], "skipping": []}, {}
    for number in range(options.repeats + 1):
        for way in list(ways)[:: 1 if number % 2 else -1]:
            passes, gradients[way] = time_step(trainer, batch, ways[way])
            seconds[way] += [passes] if number else []  # the first round warms up
    medians = {way: [statistics.median(part) for part in zip(*times, strict=True)] for way, times in seconds.items()}
    for way, parts in medians.items():
        forward, head, layers = (round(1000 * part) for part in parts)
        print(f"{way}: forward {forward} ms, backward of the head {head} ms, of the layers {layers} ms")
    ratios = [sum(plain) / sum(skipping) for plain, skipping in zip(*seconds.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    *fixed, layers = medians["plain"]
    bound = (sum(fixed) + layers) / (sum(fixed) + (1 - options.zero) * layers)
    error = (gradients["skipping"] - gradients["plain"]).norm() / gradients["plain"].norm()
    print(f"speed-up {middle:.2f}x (quartiles {low:.2f} to {high:.2f}) of {bound:.2f}x that is possible")
    print(f"relative difference of the gradients {error:.1e}; ran dense: {fallback_report()}")


if __name__ == "__main__":
    main()
