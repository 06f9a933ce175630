"""
Every private name of torch that `_torch_internals.py` reaches has the shape that hf_trim relies on. A test that fails
here says what a new version of torch lacks; the same version may fail elsewhere for the same reason, less clearly.
"""

import weakref
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_trim.backward import _torch_internals as internals


aten = torch.ops.aten


@contextmanager
def needed(name: str, use: str):
    """Whatever fails in this context does so with the name that torch lacks, and what hf_trim needs it for."""
    try:
        yield
    except Exception as error:
        pytest.fail(
            f"torch {torch.__version__} has no {name}, or it has another shape: {use} needs it "
            f"({type(error).__name__}: {error})",
            pytrace=False,
        )


# Name → what hf_trim does with it. Of these it is enough to be there.
NAMES = {
    "torch._assert_async": "refusing rows that are named twice",
    "torch._neg_view": "taking rows of a lazy negative",
    "torch._C._functorch.is_batchedtensor": "telling batched gradients",
    "torch._C._functorch.is_legacy_batchedtensor": "telling batched gradients",
    "torch._C._get_obj_in_tls": "settings in autograd's threads",
    "torch._C._is_key_in_tls": "settings in autograd's threads",
    "torch._C._current_autograd_node": "recording a tape",
    "torch._C._current_graph_task_id": "telling backward passes apart",
    "torch._C._disabled_torch_function_impl": "RowTensor",
    "torch._C._dispatch_has_kernel_for_dispatch_key": "taking composite ops apart",
    "torch._C._dispatch_tls_local_exclude_set": "recomputing all rows of a checkpoint",
    "torch._C._dispatch_tls_local_include_set": "recomputing all rows of a checkpoint",
    "torch._C._functorch.peek_interpreter_stack": "telling torch.func's transforms",
    "torch._C._ForceDispatchKeyGuard": "recomputing all rows of a checkpoint",
    "torch._C.DispatchKey.AutogradFunctionality": "recomputing all rows of a checkpoint",
    "torch._C.DispatchKey.ADInplaceOrView": "recomputing all rows of a checkpoint",
    "torch._ops.OpOverload.decompose": "taking composite ops apart",
    "torch.Tensor._make_wrapper_subclass": "RowTensor",
    "torch.multiprocessing.reductions.StorageWeakRef": "sharing slices of one tensor",
    "torch.nn.modules._functions.BackwardHookFunction": "hooks of modules",
    "torch.nn.modules.batchnorm._BatchNorm": "finding modules that mix samples",
    "torch.utils._python_dispatch.TorchDispatchMode": "recording a tape",
    "torch.utils._python_dispatch._get_current_dispatch_mode": "leaving the ops to who watches them",
    "torch.utils._pytree.tree_iter": "finding tensors among an op's arguments",
    "torch.utils._pytree.tree_map_only": "making an op's arguments dense",
    "torch.utils.checkpoint._CheckpointFrame": "recomputation of kept rows",
    "torch.utils.checkpoint._StopRecomputationError": "recomputation of kept rows",
    "torch.utils.checkpoint.CheckpointFunction": "reentrant checkpoints",
}


@pytest.mark.parametrize("name", NAMES)
def test_name(name):
    with needed(name, NAMES[name]):
        obj = torch
        for part in name.split(".")[1:]:
            obj = getattr(obj, part)


# ---- ops ----------------------------------------------------------------------------------------------------------


def test_what_is_read_of_ops():
    with needed("torch._ops.OpOverload.overloadpacket.__name__", "the tables of rules"):
        assert internals.op_name(aten.sum.dim_IntList) == "sum"
    with needed("torch._ops.OpOverload._schema", "the default rules"):
        assert internals.is_mutable(aten.add_.Tensor) and not internals.is_mutable(aten.add.Tensor)
        assert internals.op_arguments(aten.mul_.Tensor) == [("self", True), ("other", False)]
        assert internals.return_types(aten.mm.default) == ["Tensor"]
        assert internals.return_types(aten.native_layer_norm.default) == ["Tensor"] * 3
    with needed("Argument.alias_info of torch._ops.OpOverload._schema", "in-place ops"):
        x, y = torch.zeros(2), torch.ones(2)
        assert internals.written_arguments(aten.add_.Tensor, (x, y), {}) == [x]
        assert internals.written_arguments(aten.add.out, (x, x), {"out": y}) == [y]
        assert internals.written_arguments(aten._foreach_mul_.Scalar, ([x], 2), {}) == [[x]]
        assert internals.written_arguments(aten.add.Tensor, (x, y), {}) == []
    with needed("torch._ops.OpOverload._overloadname", "in-place ops"):
        assert internals.functional_form(aten.add_.Tensor) is aten.add.Tensor
        assert internals.functional_form(aten.add.Tensor) is None
    with needed("torch._ops.OpOverload.tags", "the default rules"):
        assert torch.Tag.pointwise in aten.sin.default.tags
        assert torch.Tag.nondeterministic_seeded in aten.bernoulli_.float.tags
    with needed("torch._ops.OpOverload.is_view", "views without a rule"):
        assert aten.select.int.is_view and not aten.mm.default.is_view


def test_composite_ops():
    with needed("torch._C._dispatch_has_kernel_for_dispatch_key", "taking composite ops apart"):
        assert internals.is_composite(aten.reshape.default) and not internals.is_composite(aten.view.default)
    with needed("torch._ops.OpOverload.decompose", "taking composite ops apart"):
        assert internals.decompose(aten.reshape.default, torch.zeros(4), [2, 2]).shape == (2, 2)


# ---- tensors and autograd's graph ---------------------------------------------------------------------------------


def test_wrapper_subclass():
    class Wrapper(torch.Tensor):
        __torch_function__ = internals.disabled_torch_function

        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            assert func is aten.detach.default
            return args[0]

    with needed("torch.Tensor._make_wrapper_subclass", "RowTensor"):
        x = internals.make_wrapper_subclass(
            Wrapper, (4, 3), strides=(1, 4), dtype=torch.half, device=torch.device("cpu")
        )
        assert x.shape == (4, 3) and x.stride() == (1, 4) and x.dtype == torch.half
        assert x.detach() is x


def test_pytree():
    with needed("torch.utils._pytree", "finding tensors among an op's arguments"):
        assert list(internals.tree_iter(([1, 2], {"a": (3, None)}))) == [1, 2, 3, None]
        assert internals.tree_map_only(int, lambda x: x + 1, ([1, "b"], {"a": 3})) == ([2, "b"], {"a": 4})


def test_version_of_a_tensor():
    x = torch.zeros(3)
    with needed("torch.Tensor._version", "noticing tensors that were changed in place"):
        before = internals.version_of(x)
        x.add_(1)
        assert internals.version_of(x) == before + 1


def test_tensors_that_share_memory():
    x = torch.zeros(3)
    with needed("torch._C._storage_Use_Count", "writing to a tensor of kept rows"):
        assert internals.tensors_sharing_memory(x) == 1
        view = x[1:]
        assert internals.tensors_sharing_memory(x) == internals.tensors_sharing_memory(view) == 2
        assert internals.shares_memory(x, view) and not internals.shares_memory(x, torch.zeros(3))
        del view
        assert internals.tensors_sharing_memory(x) == 1


def test_view_of_another_base():
    x = torch.zeros(2, 3, 4)
    with needed("torch.Tensor._base and _view_func_unsafe", "writing to a view of kept rows"):
        view = x.transpose(0, 1)[1].unsqueeze(0)
        assert internals.base_of(view) is x and internals.base_of(x) is None
        y = torch.ones(2, 3, 4)
        internals.same_view(view, y).zero_()
        assert y[:, 1].sum() == 0 and y.sum() == 16


def test_weak_reference_to_a_storage():
    x = torch.zeros(3)
    with needed("torch.multiprocessing.reductions.StorageWeakRef", "sharing slices of one tensor"):
        storage = internals.StorageWeakRef(x.untyped_storage())
        assert storage.cdata == internals.StorageWeakRef(x[1:].untyped_storage()).cdata and not storage.expired()
        del x
        assert storage.expired()


def test_number_of_the_backward_pass():
    seen = []
    x = torch.zeros(3, requires_grad=True)
    y = x.sin()
    y.register_hook(lambda grad: seen.append(internals.current_backward_pass()))
    with needed("torch._C._current_graph_task_id", "telling backward passes apart"):
        assert internals.current_backward_pass() == -1
        for _ in range(2):
            y.sum().backward(retain_graph=True)
        assert seen[0] != seen[1] and min(seen) >= 0


class Double(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


class Triple(Double):
    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def test_function_of_a_node():
    x = torch.ones(3, requires_grad=True)
    y = Double.apply(x)
    with needed("_forward_cls of an autograd node", "Functions written in Python"):
        assert internals.function_of(y.grad_fn) is Double and internals.function_of(x.sin().grad_fn) is None
        internals.replace_function(y.grad_fn, Triple)
        y.sum().backward()
        assert x.grad.tolist() == [3, 3, 3]


def test_types_of_nodes():
    x = torch.ones(3, requires_grad=True)
    with needed("AccumulateGrad, or nodes named as SinBackward0", "telling ATen's nodes from others"):
        assert type(x.sin().grad_fn).__name__ == "SinBackward0" and type(x.sin().grad_fn).__module__ == "builtins"
        leaf = x.sin().grad_fn.next_functions[0][0]
        assert type(leaf).__name__ == "AccumulateGrad" and leaf.variable is x
    with needed("metadata, register_prehook and name() of an autograd node", "preparing a graph"):
        node = x.sin().grad_fn
        node.metadata["key"] = True
        assert node.name() == "SinBackward0"
        node.register_prehook(lambda grads: (grads[0] * 5,))
        assert node(torch.ones(3)) is not None and "key" in node.metadata


def test_saved_tensors():
    x = torch.ones(3, requires_grad=True)
    node = (x**3).grad_fn
    with needed("_raw_saved_self of PowBackward0", "formulas that compute with saved tensors"):
        saved = dict(internals.saved_tensors(node))
        assert list(saved) == ["_raw_saved_self"]
        assert torch.equal(internals.saved_value(node, "_raw_saved_self"), x)
    with needed("unpack_hook of a SavedTensor", "telling checkpointed tensors"):
        assert internals.has_no_hooks(saved["_raw_saved_self"])
        saved["_raw_saved_self"].register_hooks(lambda x: x, lambda x: x * 2)
        assert not internals.has_no_hooks(dict(internals.saved_tensors(node))["_raw_saved_self"])
        assert internals.saved_value(node, "_raw_saved_self").tolist() == [2, 2, 2]
    with needed("_raw_saved_tensors of CatBackward0, a tuple", "finding checkpoints"):
        index = torch.zeros(3, dtype=torch.long)
        (indices,) = (saved for name, saved in internals.saved_tensors(x[index].grad_fn) if "indices" in name)
        assert isinstance(indices, tuple)


def test_autograd_below_dispatch():
    records = []

    class Mode(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            x = torch.ones(3, requires_grad=True)
            with torch.enable_grad():
                records.append(x.sin().grad_fn)
                with internals.autograd_below_dispatch():
                    records.append(x.sin().grad_fn)
                records.append(x.sin().grad_fn)
            return x.detach()

    with needed("torch._C._ForceDispatchKeyGuard", "recomputing all rows of a checkpoint"):
        torch.ones(3).as_subclass(Mode).sin()
        assert [record is not None for record in records] == [False, True, False]


# ---- gradient checkpointing ---------------------------------------------------------------------------------------


def test_frame_of_a_checkpoint():
    x = torch.ones(3, requires_grad=True)
    calls = []

    def function(x):
        calls.append(torch.is_grad_enabled())
        return x.sin().cos()

    out = checkpoint(function, x, use_reentrant=False)
    (saved,) = (saved for _, saved in internals.saved_tensors(out.grad_fn))
    with needed("torch.utils.checkpoint._CheckpointFrame in the hook of a saved tensor", "recomputation of kept rows"):
        frame = internals.checkpoint_frame(saved)
        assert isinstance(frame, internals.CheckpointFrame)
        assert weakref.ref(frame)() is frame
        assert internals.checkpoint_frame(dict(internals.saved_tensors(x.sin().grad_fn))["_raw_saved_self"]) is None
    seen = {}
    with needed("recompute_fn of a _CheckpointFrame", "recomputation of kept rows"):
        recompute = internals.recompute_function(frame)

        def replacement(*args):
            number = internals.current_backward_pass()
            seen["args"] = args
            with pytest.raises(internals.StopRecomputationError):
                recompute(*args)
            seen["tensors"] = internals.recomputed_tensors(frame, number)
            internals.check_recomputed(frame, number)
            internals.forget_recomputed(frame, number)
            assert not frame.recomputed and not frame.recomp_counter
            with pytest.raises(RuntimeError, match="another number of tensors"):
                internals.check_recomputed(frame, number)
            recompute(*args)

        internals.replace_recompute_function(frame, replacement)
    names = "weak_holders, recomputed, recomp_counter, x_metadatas and metadata_fn of a _CheckpointFrame"
    with needed(names, "recomputation of kept rows"):
        out.sum().backward()
        assert seen["args"][-1] is not None and len(seen["tensors"]) == 2 and len(calls) == 3
        close = torch.testing.assert_close
        close(seen["tensors"], [torch.ones(3), torch.ones(3).sin()])
        close(x.grad, -torch.ones(3).sin().sin() * torch.ones(3).cos())


def test_shared_recomputation():
    with needed("torch.utils.checkpoint.GraphExecGroup", "backward passes that share what is recomputed"):
        assert not internals.is_recomputation_shared()
        group = getattr(torch.utils.checkpoint, "GraphExecGroup", None)
        if group is not None:  # not in every version
            with group():
                assert internals.is_recomputation_shared()


def test_function_of_a_reentrant_checkpoint():
    x = torch.ones(3, requires_grad=True)
    out = checkpoint(torch.sin, x, use_reentrant=True)
    with needed("run_function of a CheckpointFunction's context", "reentrant checkpoints"):
        assert internals.function_of(out.grad_fn) is internals.CheckpointFunction
        with internals.wrapped_checkpoint_function(out.grad_fn, lambda function, x: 2 * function(x)):
            out.sum().backward()
        assert out.grad_fn.run_function is torch.sin
        torch.testing.assert_close(x.grad, 2 * torch.ones(3).cos())


# ---- modules ------------------------------------------------------------------------------------------------------


def test_batch_norm():
    with needed("torch.nn.modules.batchnorm._BatchNorm", "finding modules that mix samples"):
        assert all(
            issubclass(kind, internals.BatchNorm) for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
        )


# ---- the messages of this file ------------------------------------------------------------------------------------


def test_a_missing_name_is_said_clearly():
    with pytest.raises(
        pytest.fail.Exception, match="has no torch._C._gone, or it has another shape: the test needs it"
    ):
        with needed("torch._C._gone", "the test"):
            torch._C._gone()
