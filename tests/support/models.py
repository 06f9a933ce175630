"""
Tiny models of many families, and their gradients with a part of the samples kept.

e.g. `gradients(model, lambda losses: losses[kept])`: one step on BATCH samples of LENGTH tokens, with fixed dropout
masks. It returns the gradients of all n parameters one after the other, `[n]`.
"""

import timm
import torch
import torch.nn.functional as F
import transformers as tf


BATCH, LENGTH, VOCAB = 6, 7, 31
KEPT = (1, 2, 5)
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 24, "num_labels": 3}
DROPOUT = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
DECODER = {**SIZES, "vocab_size": VOCAB, "pad_token_id": 0, "attention_dropout": 0.1}
GQA = {**DECODER, "num_key_value_heads": 2, "head_dim": 8}
IMAGE = {**SIZES, **DROPOUT, "image_size": 8, "patch_size": 4}
TEXT = {**SIZES, **DROPOUT, "vocab_size": VOCAB}

ENCODERS = {
    "bert": lambda: tf.BertConfig(**TEXT),
    "roberta": lambda: tf.RobertaConfig(**TEXT, max_position_embeddings=32),
    "distilbert": lambda: tf.DistilBertConfig(
        vocab_size=VOCAB, dim=16, n_layers=2, n_heads=4, hidden_dim=24, attention_dropout=0.1, num_labels=3
    ),
    "electra": lambda: tf.ElectraConfig(**TEXT, embedding_size=8),
    "albert": lambda: tf.AlbertConfig(**TEXT, embedding_size=8, classifier_dropout_prob=0.1),
}
DECODERS = {
    "gpt2": lambda: tf.GPT2Config(
        vocab_size=VOCAB, n_embd=16, n_layer=2, n_head=4, n_positions=32, num_labels=3, pad_token_id=0
    ),
    "gpt_neox": lambda: tf.GPTNeoXConfig(**DECODER, hidden_dropout=0.1),
    "opt": lambda: tf.OPTConfig(**DECODER, ffn_dim=24, max_position_embeddings=32, word_embed_proj_dim=16),
    "llama": lambda: tf.LlamaConfig(**GQA),
    "mistral": lambda: tf.MistralConfig(**GQA, sliding_window=4),
    "qwen2": lambda: tf.Qwen2Config(**GQA),
    "qwen3": lambda: tf.Qwen3Config(**GQA),
    "gemma": lambda: tf.GemmaConfig(**GQA),
}
# Each has something of its own: experts, a loop that writes into a buffer, formulas written in Python.
FAMILIES = {
    "mixtral": lambda: tf.MixtralConfig(**GQA, num_local_experts=4),
    "mixtral, experts in a loop": lambda: tf.MixtralConfig(**GQA, num_local_experts=4, experts_implementation="eager"),
    "rwkv": lambda: tf.RwkvConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, context_length=LENGTH),
    "bloom": lambda: tf.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=2, n_head=4),
}
IMAGE_MODELS = {
    "vit": lambda: tf.ViTConfig(**IMAGE),
    "deit": lambda: tf.DeiTConfig(**IMAGE, architectures=["DeiTForImageClassification"]),
    "beit": lambda: tf.BeitConfig(**IMAGE, use_relative_position_bias=True, drop_path_rate=0.2),
}
TIMM_MODELS = {
    "timm_vit": lambda: timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=3, num_classes=3,
        drop_rate=0.1, attn_drop_rate=0.1, proj_drop_rate=0.1, drop_path_rate=0.2,
    ),
    "deit3": lambda: timm.create_model(
        "deit3_small_patch16_224", img_size=16, patch_size=4, depth=2, embed_dim=24, num_heads=3, num_classes=3,
        init_values=0.1, drop_path_rate=0.2,
    ),
    "mixer": lambda: timm.models.MlpMixer(
        img_size=16, patch_size=4, num_blocks=2, embed_dim=24, num_classes=3, drop_rate=0.1, proj_drop_rate=0.1
    ),
    "convnext": lambda: timm.create_model(
        "convnext_atto", depths=(1, 1, 2, 1), dims=(8, 8, 16, 16), num_classes=3, drop_path_rate=0.2
    ),
}  # fmt: skip
TRANSFORMERS = {**ENCODERS, **DECODERS, **IMAGE_MODELS}


def build(config, attention="sdpa", head=None):
    torch.manual_seed(0)
    config = config()
    if isinstance(config, torch.nn.Module):
        return config.train()
    config._attn_implementation = attention
    auto = head or (
        tf.AutoModelForImageClassification if hasattr(config, "image_size") else tf.AutoModelForSequenceClassification
    )
    return auto.from_config(config, attn_implementation=attention).train()


def batch(model):
    """Inputs and labels, on the model's device."""
    inputs, labels = host_batch(model)
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in inputs.items()}, labels.to(device)


def host_batch(model):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, 3, (BATCH,), generator=generator)
    config = getattr(model, "config", None)
    if config is None:  # a timm model
        size = 32 if isinstance(model, timm.models.ConvNeXt) else 16
        return {"x": torch.randn(BATCH, 3, size, size, generator=generator)}, labels
    if hasattr(config, "image_size"):
        return {"pixel_values": torch.randn(BATCH, 3, 8, 8, generator=generator)}, labels
    mask = torch.ones(BATCH, LENGTH, dtype=torch.long)
    mask[1, 4:] = 0
    mask[4, 2:] = 0
    ids = torch.randint(3, VOCAB, (BATCH, LENGTH), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}, labels


def classification_losses(model, inputs, labels):
    out = model(**inputs)
    return F.cross_entropy((out if isinstance(out, torch.Tensor) else out.logits).float(), labels, reduction="none")


def sequence_losses(model, inputs, labels):
    """Mean next-token loss of each sample."""
    logits = model(**inputs).logits[:, :-1]
    targets = inputs["input_ids"][:, 1:].masked_fill(inputs["attention_mask"][:, 1:] == 0, -100)
    losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view(targets.shape)
    return losses.sum(1) / (targets != -100).sum(1)


def gradients(model, take, losses_of=classification_losses, autocast=None):
    """The gradients of one step with fixed dropout masks."""
    inputs, labels = batch(model)
    model.zero_grad()
    torch.manual_seed(2)
    with torch.autocast(labels.device.type, autocast, enabled=autocast is not None):
        losses = losses_of(model, inputs, labels)
    take(losses).mean().backward()
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert all(type(p.grad) is torch.Tensor for p in parameters if p.grad is not None)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten().double() for p in parameters])


def difference(a, b):
    """Relative norm over all parameters."""
    assert b.norm() > 0
    return ((a - b).norm() / b.norm()).item()
