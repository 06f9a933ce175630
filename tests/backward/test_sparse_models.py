"""Tiny models of many families: row-sparse gradients equal dense ones of the same forward pass; no op falls back."""

import pytest
import torch
import transformers as tf

from hf_trim.backward.eager.sparse import take_rows_sparse
from hf_trim.backward.settings import fallback_report, reset_fallbacks
from tests.support.models import (
    DECODERS,
    ENCODERS,
    FAMILIES,
    KEPT,
    TIMM_MODELS,
    TRANSFORMERS,
    build,
    classification_losses,
    difference,
    gradients,
    sequence_losses,
)


def check(model, losses_of=classification_losses, kept=KEPT, autocast=None, tolerance=1e-5, **options):
    """Both backward passes have the same gradients, and no op falls back; returns these gradients."""
    kept = torch.tensor(kept)
    dense = gradients(model, lambda losses: losses[kept], losses_of, autocast)
    reset_fallbacks()
    sparse = gradients(model, lambda losses: take_rows_sparse(losses, kept, **options), losses_of, autocast)
    assert not fallback_report()
    assert difference(sparse, dense) <= tolerance
    return dense, sparse


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers_models(name, attention):
    check(build(TRANSFORMERS[name], attention))


@pytest.mark.parametrize("kept", [(3,), (0, 1), (0, 2, 3, 4, 5)])
def test_kept_rows(kept):
    check(build(ENCODERS["bert"]), kept=kept, dense_above=1.0)


@pytest.mark.parametrize("name", TIMM_MODELS)
def test_timm_models(name):
    model = build(TIMM_MODELS[name])
    check(model)
    if name == "convnext":
        check(model.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", DECODERS)
def test_causal_language_models(name, attention):
    check(build(DECODERS[name], attention, tf.AutoModelForCausalLM), sequence_losses)


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name):
    check(build(FAMILIES[name], "eager", tf.AutoModelForCausalLM), sequence_losses)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", [name for name in TRANSFORMERS if name != "albert"])  # which has none
def test_gradient_checkpointing(name, reentrant, recomputed):
    model = build(TRANSFORMERS[name])
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    check(model)
    # With dropout too, each of the two layers recomputes the kept rows only.
    assert recomputed == {"kept": 0 if reentrant else 2, "all": 0}


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit"])
def test_autocast(name):
    # The dense reference rounds at the same places, but sums bfloat16 products in another order.
    check(build(TRANSFORMERS[name]), autocast=torch.bfloat16, tolerance=2e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "vit", "convnext"])
def test_autocast_errs_no_more_than_dense_does(name, dtype):
    model = build({**TRANSFORMERS, **TIMM_MODELS}[name]).eval()  # float32 would draw other dropout masks
    exact = gradients(model, lambda losses: losses[torch.tensor(KEPT)])
    dense, sparse = check(model, autocast=dtype, tolerance=2e-2)
    assert difference(sparse, dense) <= difference(dense, exact)
    assert difference(sparse, exact) <= 1.5 * difference(dense, exact)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "qwen3"])
def test_tied_embeddings(name):
    def config():
        config = DECODERS[name]()
        config.tie_word_embeddings = True
        return config

    check(build(config, head=tf.AutoModelForCausalLM), sequence_losses)


@pytest.mark.parametrize(
    "name, targets", [("bert", ["query", "value"]), ("llama", "all-linear"), ("gpt2", ["c_attn"])]
)
def test_lora(name, targets):
    import peft

    head = None if name == "bert" else tf.AutoModelForCausalLM
    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules=targets, init_lora_weights=False)
    model = peft.get_peft_model(build(TRANSFORMERS[name], head=head), config)
    check(model, sequence_losses if head else classification_losses)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_frozen_layers(name):
    model = build(TRANSFORMERS[name])
    for key, parameter in model.named_parameters():
        parameter.requires_grad = "embeddings" not in key and ".0." not in key
    check(model)
