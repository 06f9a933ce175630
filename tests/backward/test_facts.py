"""The table of facts, beside the schemas of the ops that it is about. Whether it is true: `test_rules.py`, OpInfo."""

from types import SimpleNamespace

import pytest

from hf_trim.backward import NotRowwiseError
from hf_trim.backward.facts import FACTS
from hf_trim.backward.registry import overloads


# Of other namespaces, or not in all versions of PyTorch. Families are written down as a whole.
ELSEWHERE = {
    "rev",
    "_low_memory_max_pool_offsets_to_indices",
    "_safe_softmax",
    "_fused_rms_norm",
    "_fused_rms_norm_backward",
}


def test_each_line_is_about_an_op():
    missing = {name for name in FACTS if not overloads(name) and "pool" not in name and "upsample" not in name}
    assert missing <= ELSEWHERE


@pytest.mark.parametrize("name", [name for name in FACTS if overloads(name)])
def test_operands_are_where_the_schema_has_them(name):
    (op,), fact = overloads(name), FACTS[name]
    types = [str(argument.type) for argument in op._schema.arguments if not argument.kwarg_only]
    assert all("Tensor" in types[i] for i in {*fact.rows, *fact.shared} - set(fact.grads[1:]))
    assert all("Tensor" in types[i] or types[i] == "number" for i in fact.grads)  # a number may be zero, too
    assert all("int" in types[i] for i in fact.sizes)


X = SimpleNamespace(shape=(6, 4, 5), ndim=3, row_dim=0)  # rows in front


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "expected"),
    [
        ("select.int", (X, 1, 0), {}, 0),
        ("select.int", (X, 0, 0), {}, NotRowwiseError),
        ("permute", (X, [2, 0, -2]), {}, 1),
        ("squeeze", (SimpleNamespace(shape=(1, 1, 6), ndim=3, row_dim=2),), {}, 0),
        ("slice.Tensor", (X, 0, 0, 2**63 - 1), {}, 0),
        ("slice.Tensor", (X, 0, 0, 6), {}, 0),
        ("slice.Tensor", (X, 0, 0, 5), {}, NotRowwiseError),
        ("slice.Tensor", (X, -1, 0, 1), {}, 0),
        ("sum.dim_IntList", (X, [1]), {}, 0),
        ("sum.dim_IntList", (X, [-3, 1]), {}, None),
        ("mean.dim", (X, []), {}, NotRowwiseError),
        ("sort", (X,), {"stable": True, "dim": 0}, NotRowwiseError),  # another overload, in a compiled graph
        ("constant_pad_nd", (X, [1, 1, 0, 0, 0, 0]), {}, 0),
        ("constant_pad_nd", (X, [0, 0, 0, 0, 1, 0]), {}, NotRowwiseError),
        ("native_layer_norm_backward", (X, X, [4, 5]), {}, (0, None, None)),
        ("native_layer_norm_backward", (X, X, [6, 4, 5]), {}, NotRowwiseError),
    ],
)
def test_where_rows_are(name, args, kwargs, expected):
    if expected is NotRowwiseError:
        with pytest.raises(NotRowwiseError):
            FACTS[name].place(*args, **kwargs)
    else:
        assert FACTS[name].place(*args, **kwargs) == expected
