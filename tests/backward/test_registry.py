"""The tables of rules, and the decorator that fills them."""

from contextlib import contextmanager

import pytest
import torch

from hf_trim.backward import implements, registry
from hf_trim.backward._torch_internals import is_composite
from hf_trim.backward.eager.activation import ActivationRows
from hf_trim.backward.eager.rows import Rows
from hf_trim.backward.eager.tensor import RowSparseTensor
from hf_trim.backward.registry import ACTIVATIONS, GRADIENTS, PROOF, RuleTable, overloads
from hf_trim.backward.settings import fallback_report, reset_fallbacks
from tests.support.rule_cases import KEPT, close


@contextmanager
def no_rule_of(op):
    """Takes the rule of an op out of the table of gradients, and puts back what was there."""
    rule, was_registered = GRADIENTS.pop(op, None), op in GRADIENTS.registered
    GRADIENTS.registered.discard(op)
    try:
        yield
    finally:
        GRADIENTS.pop(op, None)
        GRADIENTS.registered.discard(op)
        if rule is not None:
            GRADIENTS[op] = rule
        if was_registered:
            GRADIENTS.registered.add(op)


def test_own_rule():
    op = torch.ops.aten.frac.default
    with no_rule_of(op):

        @implements(op)
        def frac(func, x):
            return x.like(func(x.payload) * 1)

        grad = RowSparseTensor(torch.randn(2, 3), Rows(KEPT, 6))
        close(grad.frac(), grad.densify().frac())
        assert GRADIENTS[op] is frac


def test_the_example_in_the_docstring():
    names = {}
    with no_rule_of(torch.ops.aten.soft_margin_loss_backward.default):
        exec(registry.__doc__.split("```python")[1].split("```")[0], names)
        names["test_soft_margin_loss"]()
        assert GRADIENTS[torch.ops.aten.soft_margin_loss_backward.default] is names["soft_margin_loss_backward"]


def test_a_second_rule_is_refused():
    table = RuleTable("tests")

    @implements("mm", table=table)
    def first(func, a, b): ...

    with pytest.raises(ValueError, match="aten.mm.default has a rule in the table of tests already: .*first"):

        @implements("bmm", "mm", table=table)
        def second(func, a, b): ...

    names = RuleTable("names", by_name=True)
    implements("mm", table=names)(first)
    with pytest.raises(ValueError, match="mm has a rule in the table of names already: .*first"):
        implements("mm", table=names)(first)


def test_a_rule_takes_the_place_of_a_default():
    table = RuleTable("tests")
    op = torch.ops.aten.mm.default
    assert table[op] is None  # the default, and remembered

    @implements("mm", table=table)
    def rule(func, a, b): ...

    assert table[op] is rule


def test_a_rule_for_several_tables():
    tables = RuleTable("one"), RuleTable("two")

    @implements("mm", "add.Tensor", table=tables)
    def rule(func, a, b): ...

    for table in tables:
        assert table.registered == {torch.ops.aten.mm.default, torch.ops.aten.add.Tensor}


def test_ops_that_this_torch_lacks_are_left_out():
    assert overloads("mm", "no_such_op", "mm.no_such_overload") == [torch.ops.aten.mm.default]


@pytest.mark.parametrize("table", [GRADIENTS, ACTIVATIONS], ids=lambda table: table.name)
def test_no_rule_is_for_an_op_that_autograd_takes_apart(table):
    # Made of others on a CPU; a GPU has a kernel of its own for it.
    composite = {str(op) for op in table.registered if is_composite(op)} - {"aten._fused_rms_norm.default"}
    assert not composite, f"no tensor of kept rows ever meets {composite}: remove the rules"


@pytest.mark.parametrize("kind", [RowSparseTensor, ActivationRows])
def test_composite_ops_below_autograd_are_taken_apart(kind):
    """Inference mode skips autograd, which takes them apart elsewhere."""
    calls = [
        lambda x: x.reshape(6, 2, 2),
        lambda x: x.mT,
        lambda x: x.T,
        lambda x: x.swapaxes(0, 1),
        lambda x: x.tensor_split(2, 1)[0],
        lambda x: x.unsafe_chunk(2, 1)[1],
        lambda x: x.square().flatten(0),
        lambda x: x.unflatten(1, (2, 2)).matmul(torch.ones(2, 3)),
    ]
    reset_fallbacks()
    with torch.inference_mode():
        payload = torch.randn(2, 4)
        dense = torch.zeros(6, 4).index_copy(0, KEPT, payload)
        for call in calls:
            out, expected = call(kind(payload, Rows(KEPT, 6))), call(dense)
            assert type(out) is kind and out.shape == expected.shape
            close(out.payload, out.kept_rows(expected))
    assert not fallback_report()


def test_names_of_the_proof_are_of_ops():
    assert all(isinstance(name, str) for name in PROOF.registered)
