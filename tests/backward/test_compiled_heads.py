"""Models whose loss function is inside a compiled graph."""

import pytest
import torch
import torch.nn.functional as F

from hf_trim import TrimmingTrainer
from tests.support.heads import HEADS, make
from tests.support.helpers import digit_texts, digits, relative_difference, tiny_bert, train, weights


@pytest.mark.extended
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
    "head",
    ["llama", *(pytest.param(x, marks=pytest.mark.extended) for x in ("gpt2", "masked-lm")), "question-answering"],
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


class WeightedTrainer(TrimmingTrainer):
    """A loss in the trainer, of the logits that the compiled model returns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = F.cross_entropy(outputs.logits, labels, weight=torch.linspace(0.5, 2.0, 10))
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("backward", ["auto", pytest.param("replay", marks=pytest.mark.extended)])
@pytest.mark.parametrize("kind", ["tuples", "loss in the trainer"])
@pytest.mark.extended
def test_tuples_and_losses_outside_of_a_compiled_model(kind, backward, tmp_path):
    changes = {"return_dict": False} if kind == "tuples" else {}
    trainer_cls = TrimmingTrainer if kind == "tuples" else WeightedTrainer
    arguments = {"trim_keep_start": 0.5, "trim_keep_end": 0.5, "max_steps": 2, "trim_backward": backward}

    def trained(**more):
        model = tiny_bert(dropout=0.0, problem_type="single_label_classification", **changes)
        return train(model, digit_texts(), tmp_path, trainer_cls=trainer_cls, **arguments, **more)

    eager = trained()
    compiled = trained(torch_compile=True, torch_compile_backend="aot_eager")
    assert compiled.losses == pytest.approx(eager.losses, rel=1e-5)
    assert relative_difference(weights(compiled), weights(eager)) < 1e-6


def test_a_loss_inside_of_a_compiled_graph_that_cannot_be_computed_again_is_refused(tmp_path):
    class Squares(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(64, 1)

        def forward(self, pixel_values, labels=None):
            logits = self.layer(pixel_values.flatten(1))
            return {"loss": F.mse_loss(logits[:, 0], labels), "logits": logits}

    with pytest.raises(ValueError, match="The loss of Squares is inside its compiled graph"):
        train(Squares(), digits(task="regression"), tmp_path, torch_compile=True, torch_compile_backend="eager")
    train(Squares(), digits(task="regression"), tmp_path, torch_compile=True, torch_compile_backend="eager",
          trim_select="none")  # fmt: skip
