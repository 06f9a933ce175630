"""Models whose loss function is inside a compiled graph."""

import pytest

from tests.support.heads import HEADS, make
from tests.support.helpers import digit_texts, relative_difference, tiny_bert, train, weights


def test_a_compiled_model_is_trimmed_by_its_logits(tmp_path):
    """Loss functions inside a compiled graph cannot be met; the model's own is called on its logits."""
    arguments = {"trim_keep_start": 0.75, "trim_keep_end": 0.75, "max_steps": 2, "trim_backward": "dense"}
    eager = train(tiny_bert(dropout=0.0), digit_texts(), tmp_path, **arguments)
    compiled = train(
        tiny_bert(dropout=0.0),
        digit_texts(),
        tmp_path,
        torch_compile=True,
        torch_compile_backend="aot_eager",
        **arguments,
    )
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert relative_difference(weights(compiled), weights(eager)) < 1e-6


@pytest.mark.parametrize(
    "head", ["llama", pytest.param("gpt2", marks=pytest.mark.extended), "masked-lm", "question-answering"]
)
def test_compiled_heads(head, tmp_path):
    rows = HEADS[head][1]()
    arguments = {"trim_keep_start": 0.3, "trim_keep_end": 0.3, "max_steps": 2, "gradient_accumulation_steps": 2}
    eager = train(make(head), rows, tmp_path, **arguments)
    compiled = train(make(head), rows, tmp_path, torch_compile=True, torch_compile_backend="aot_eager", **arguments)
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert relative_difference(weights(compiled), weights(eager)) < 1e-5


def test_a_compiled_loss_that_is_not_of_the_logits_alone_is_refused(tmp_path):
    """Mixtral's has a part for the load balance of its experts."""
    with pytest.raises(ValueError, match="The compiled MixtralForCausalLM returned the loss"):
        # Dynamo alone puts the loss into a graph; what compiles the graph does not matter.
        train(make("mixtral"), HEADS["mixtral"][1](), tmp_path, torch_compile=True, torch_compile_backend="eager",
              trim_keep_start=0.3, trim_keep_end=0.3, max_steps=1)  # fmt: skip
