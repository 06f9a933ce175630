"""Models of many families, compiled: gradients on the kept rows equal the dense ones of the same graph."""

import pytest
import torch
import torch.nn.functional as F
import transformers as tf

from tests.support.compiled import check, small
from tests.support.models import TIMM_MODELS, TRANSFORMERS, build, sequence_losses


pytestmark = pytest.mark.usefixtures("fresh_compiler")


# Much like another family in what is compiled: left to `python -m pytest -m extended`.
ALIKE = {"roberta", "electra", "albert", "gpt_neox", "opt", "mistral", "qwen2", "gemma", "deit", "timm_vit",
         "deit3", "distilbert", "beit", "qwen3", "gpt2", "bert"}  # fmt: skip
FAMILIES = [pytest.param(x, marks=[pytest.mark.extended] * (x in ALIKE)) for x in (*TRANSFORMERS, *TIMM_MODELS)]


@pytest.mark.parametrize("name", FAMILIES)
def test_models(name, runs):
    check(small(name), runs)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_eager_attention(name, runs):
    check(small(name, "eager"), runs)


@pytest.mark.extended
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_causal_language_models_with_tied_embeddings(name, runs):
    check(small(name, head=tf.AutoModelForCausalLM, tie_word_embeddings=True), runs, sequence_losses)


@pytest.mark.extended
def test_autocast(runs):
    check(small("bert"), runs, autocast=torch.bfloat16, tolerance=2e-2)


@pytest.mark.extended
def test_lora(runs):
    import peft

    config = peft.LoraConfig(r=2, lora_dropout=0.1, target_modules="all-linear", init_lora_weights=False)
    model = small("llama", head=tf.AutoModelForCausalLM)
    check(peft.get_peft_model(model, config), runs, sequence_losses)


def test_frozen_layers(runs):
    model = build(TRANSFORMERS["vit"])
    for key, parameter in model.named_parameters():
        parameter.requires_grad = "embeddings" not in key and ".0." not in key
    check(model, runs)


def test_loss_in_the_graph(runs):
    """The model's own loss is computed, and goes unused: no gradient comes from it."""

    def losses(call, inputs, labels):
        return F.cross_entropy(call(**inputs, labels=labels).logits, labels, reduction="none")

    # The problem type is set, for a model that finds it out is compiled again.
    check(small("bert", problem_type="single_label_classification"), runs, losses)
