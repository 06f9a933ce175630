"""
Models with random weights, and random batches for them.

[`~hf_trim.bench.arguments.BenchArguments`] → model; its configuration → `input_ids` `[B, T]` or `pixel_values`
`[B, C, H, W]`, and `labels` `[B]`.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ConvNextV2Config,
    ConvNextV2ForImageClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
    SwinConfig,
    SwinForImageClassification,
    T5Config,
    T5ForSequenceClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_trim.bench.arguments import HEAD_SIZE, BenchArguments


NUM_LABELS = 10
LABELS: dict = {"num_labels": NUM_LABELS}  # unpacked: the types of configurations know their own fields alone
# The sizes of Llama 3.2 1B.
LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
}


def _sizes(args: BenchArguments) -> dict:
    return {
        "hidden_size": args.hidden_size,
        "num_hidden_layers": args.layers,
        "num_attention_heads": args.hidden_size // HEAD_SIZE,
        "intermediate_size": 4 * args.hidden_size,
    }


def _vocabulary(args: BenchArguments) -> dict:
    return {} if args.vocab_size is None else {"vocab_size": args.vocab_size}


def _dropout(args: BenchArguments, *names: str) -> dict:
    return {} if args.dropout is None else dict.fromkeys(names, args.dropout)


def _bert(args: BenchArguments, **sizes) -> PreTrainedModel:
    config = BertConfig(
        **sizes,
        **_dropout(args, "hidden_dropout_prob", "attention_probs_dropout_prob"),
        **LABELS,
        max_position_embeddings=max(512, args.seq_length),
    )
    return BertForSequenceClassification._from_config(config, attn_implementation="sdpa")


def _gpt2(args: BenchArguments, model_class=GPT2ForSequenceClassification) -> PreTrainedModel:
    config = GPT2Config(
        n_embd=args.hidden_size,
        n_layer=args.layers,
        n_head=args.hidden_size // HEAD_SIZE,
        n_positions=max(1024, args.seq_length),
        pad_token_id=0,
        use_cache=False,
        **LABELS,
        **_vocabulary(args),
        **_dropout(args, "resid_pdrop", "embd_pdrop", "attn_pdrop"),
    )
    return model_class._from_config(config, attn_implementation="sdpa")


def _llama(args: BenchArguments, **sizes) -> PreTrainedModel:
    dropout = _dropout(args, "attention_dropout")
    config = LlamaConfig(**sizes, **dropout, **LABELS, pad_token_id=0, use_cache=False)
    return LlamaForSequenceClassification._from_config(config, attn_implementation="sdpa")


def _vit(args: BenchArguments, **sizes) -> PreTrainedModel:
    config = ViTConfig(
        **sizes,
        **_dropout(args, "hidden_dropout_prob", "attention_probs_dropout_prob"),
        **LABELS,
    )
    return ViTForImageClassification._from_config(config, attn_implementation="sdpa")


def _stages(args: BenchArguments) -> dict:
    # Each stage has half the height and width of the one before, and twice its channels; the last `hidden_size`.
    depths = [1, 1, max(1, args.layers - 3), 1]
    return {"image_size": 64, "patch_size": 2, "depths": depths, **_dropout(args, "drop_path_rate"), **LABELS}


def _convnext(
    args: BenchArguments, config_class=ConvNextConfig, model_class=ConvNextForImageClassification
) -> PreTrainedModel:
    return model_class(config_class(hidden_sizes=[args.hidden_size // 8 * i for i in (1, 2, 4, 8)], **_stages(args)))


def _swin(args: BenchArguments) -> PreTrainedModel:
    heads = [max(1, args.hidden_size // HEAD_SIZE // i) for i in (8, 4, 2, 1)]
    config = SwinConfig(
        embed_dim=args.hidden_size // 8,
        num_heads=heads,
        window_size=4,  # the height and width of the last stage
        **_stages(args),
        **_dropout(args, "hidden_dropout_prob", "attention_probs_dropout_prob"),
    )
    return SwinForImageClassification(config)


def _t5(args: BenchArguments) -> PreTrainedModel:
    config = T5Config(
        d_model=args.hidden_size,
        d_ff=4 * args.hidden_size,
        num_heads=args.hidden_size // HEAD_SIZE,
        num_layers=max(1, args.layers // 2),  # of the encoder, and as many of the decoder
        **LABELS,
        **_vocabulary(args),
        **_dropout(args, "dropout_rate", "classifier_dropout"),
    )
    config.decoder_start_token_id = 0
    return T5ForSequenceClassification(config)


class LMHeadOnly(nn.Module):
    """
    The last layer of a language model with Llama's vocabulary. Its inputs `[B·T, H]` are a parameter, so that they get
    a gradient as they would from the layers below.
    """

    def __init__(self, args: BenchArguments):
        super().__init__()
        self.config = None  # there is no model of transformers
        self.tokens = nn.Parameter(torch.randn(args.batch_size * args.seq_length, args.hidden_size))
        self.head = nn.Linear(args.hidden_size, args.vocab_size or LLAMA_1B["vocab_size"], bias=False)


MODELS: dict[str, Callable[[BenchArguments], PreTrainedModel | LMHeadOnly]] = {
    "bert": lambda args: _bert(args, **_sizes(args), **_vocabulary(args)),
    "gpt2": _gpt2,
    # Llama's MLP has three matrices instead of two: 8/3 of the width make as many weights as 4 times do elsewhere.
    "llama": lambda args: _llama(
        args, **{**_sizes(args), "intermediate_size": args.hidden_size * 8 // 3}, **_vocabulary(args)
    ),
    "vit": lambda args: _vit(args, **_sizes(args), image_size=32, patch_size=4),
    "convnext": _convnext,
    "convnextv2": lambda args: _convnext(args, ConvNextV2Config, ConvNextV2ForImageClassification),
    "swin": _swin,
    "t5": _t5,
    "bert-base": _bert,
    "vit-base": _vit,
    "llama-1b": lambda args: _llama(args, **LLAMA_1B),
    "lm-head": LMHeadOnly,
    "gpt2-lm": lambda args: _gpt2(args, GPT2LMHeadModel),
}


def build_model(name: str, args: BenchArguments) -> PreTrainedModel | LMHeadOnly:
    """
    Build a model in training mode, with random weights.

    Args:
        name (`str`): One of `MODEL_CHOICES`.
        args ([`~hf_trim.bench.arguments.BenchArguments`]): Sizes, dropout, device.

    Returns:
        `PreTrainedModel` or [`LMHeadOnly`]: A classifier of texts or images, a language model, or the last layer of
        one.
    """
    torch.manual_seed(0)
    with torch.device(args.device):  # random weights of a billion parameters take a CPU half a minute
        model = cast(Any, MODELS[name](args)).to(args.device).train()  # the type of transformers' `to` is wrong
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def make_batch(config: PreTrainedConfig | None, args: BenchArguments) -> dict[str, Tensor]:
    """
    Make a random batch without padding.

    Args:
        config (`PreTrainedConfig`, *optional*): The model's configuration; `None` for [`LMHeadOnly`].
        args ([`~hf_trim.bench.arguments.BenchArguments`]): Sizes, device.

    Returns:
        `dict[str, torch.Tensor]`: `labels` `[B]`, and `input_ids` `[B, T]` or `pixel_values` `[B, C, H, W]`; for
        [`LMHeadOnly`] `labels` `[B·T]` alone.
    """
    generator = torch.Generator().manual_seed(1)
    shape: tuple[int, ...]
    if config is None:
        shape = (args.batch_size * args.seq_length,)
        vocabulary = args.vocab_size or LLAMA_1B["vocab_size"]
        return {"labels": torch.randint(vocabulary, shape, generator=generator).to(args.device)}
    if hasattr(config, "image_size"):
        shape = (args.batch_size, config.num_channels, config.image_size, config.image_size)
        batch = {"pixel_values": torch.randn(shape, generator=generator)}
    else:  # from 1: token 0 is padding
        shape = (args.batch_size, args.seq_length)
        batch = {"input_ids": torch.randint(1, config.vocab_size, shape, generator=generator)}
        if config.is_encoder_decoder:  # each text has one end
            batch["input_ids"].clamp_(min=config.eos_token_id + 1)[:, -1] = config.eos_token_id
    batch["labels"] = torch.randint(NUM_LABELS, (args.batch_size,), generator=generator)
    return {name: value.to(args.device) for name, value in batch.items()}
