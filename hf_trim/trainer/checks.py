"""
Step 1 (batch) of: batch → per-item losses → keep decision → trimmed backward → logs.

What `TrimmingTrainer` refuses before training starts: settings with which the wrong items would be kept, or none could
be ranked. Each message says what to set instead.
"""

from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_trim.backward.compiled.backend import CUDA_GRAPHS, uses_cuda_graphs
from hf_trim.trainer.arguments import TrimmingConfig


def check_liger_kernel(args: TrainingArguments, trim: TrimmingConfig) -> None:
    """
    Refuse Liger's fused losses. They are put into the model when `Trainer` is made, so this comes before.

    Args:
        args ([`~transformers.TrainingArguments`]): The training arguments.
        trim ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed, and how.

    Raises:
        `ValueError`: If the loss would be replaced by a fused one.
    """
    if not (args.use_liger_kernel and (trim.trims or trim.remembers)):
        return
    config = args.liger_kernel_config or {}
    if any(config.get(name, True) for name in ("fused_linear_cross_entropy", "cross_entropy")):
        raise ValueError(
            "use_liger_kernel=True replaces the loss by a fused one that has no losses per item to rank. Leave it "
            "out (trimming computes large language-model heads in chunks, too), or keep Liger's other kernels: "
            "liger_kernel_config={'fused_linear_cross_entropy': False, 'cross_entropy': False}."
        )


def check_settings(args: TrainingArguments, trim: TrimmingConfig, devices_per_sample: int, model: nn.Module) -> None:
    """
    Check the settings, and refuse what would trim wrongly. Nothing is refused where nothing is trimmed or remembered.

    Args:
        args ([`~transformers.TrainingArguments`]): The training arguments.
        trim ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed, and how.
        devices_per_sample (`int`): Number of devices over which a sample is split.
        model (`torch.nn.Module`): The model.

    Raises:
        `ValueError`: If a field has a wrong value, or does not go with the others.
    """
    trim.check()
    if not (trim.trims or trim.remembers):
        return
    check_parallelism(args, trim, devices_per_sample)
    if trim.trims_dataset:
        check_epochs(args)
    if trim.trims:
        check_cuda_graphs(args, trim, model)
    config: Any = getattr(model, "config", None)
    is_regression = getattr(config, "problem_type", None) == "regression" or getattr(config, "num_labels", 2) == 1
    if args.label_smoothing_factor and is_regression:
        raise ValueError(
            f"label_smoothing_factor={args.label_smoothing_factor} has no meaning for regression: set it to 0, or "
            "give the model more than one label."
        )


def check_parallelism(args: TrainingArguments, trim: TrimmingConfig, devices_per_sample: int) -> None:
    """
    Refuse ways of parallel training in which the wrong items would be kept.

    Args:
        args ([`~transformers.TrainingArguments`]): The training arguments.
        trim ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed, and how.
        devices_per_sample (`int`): Number of devices over which a sample is split.

    Raises:
        `ValueError`: With `DataParallel`, with context or sequence parallelism, or if a global choice could not be
            averaged over the devices.
    """
    if args.n_gpu > 1:
        raise ValueError(
            f"torch.nn.DataParallel over {args.n_gpu} GPUs would trim each replica and average wrongly. Start one "
            "process per GPU (`accelerate launch` or `torchrun`), or set CUDA_VISIBLE_DEVICES to one GPU."
        )
    if devices_per_sample > 1:
        raise ValueError(
            "Context or sequence parallelism splits a sample over devices, and its loss cannot be ranked there: "
            "set cp_size and sp_size to 1."
        )
    if trim.trim_scope == "global" and not args.average_tokens_across_devices:
        raise ValueError(
            "trim_scope='global' is a mean over the items of all devices: leave average_tokens_across_devices at "
            "True, or use trim_scope='local'."
        )


def check_epochs(args: TrainingArguments) -> None:
    """
    Refuse trainings that do not go by whole epochs, with `trim_scope="dataset"`.

    Args:
        args ([`~transformers.TrainingArguments`]): The training arguments.

    Raises:
        `ValueError`: If no epoch could be shorter, or their number is not known.
    """
    if args.max_steps > 0:
        raise ValueError(
            f"trim_scope='dataset' plans the steps of each epoch, and max_steps is {args.max_steps}: give "
            "num_train_epochs in its place. (Streamed data, which need max_steps, cannot be chosen from.)"
        )
    if args.num_train_epochs != int(args.num_train_epochs) or args.num_train_epochs < 3:
        raise ValueError(
            f"trim_scope='dataset' needs a whole number of epochs from 3 on, since the first and the last have all "
            f"samples, and num_train_epochs is {args.num_train_epochs}."
        )


def check_cuda_graphs(args: TrainingArguments, trim: TrimmingConfig, model: nn.Module) -> None:
    """
    Refuse CUDA graphs with `trim_backward="sparse"`: their shapes are fixed, and the number of kept rows changes.

    Args:
        args ([`~transformers.TrainingArguments`]): The training arguments.
        trim ([`~hf_trim.trainer.arguments.TrimmingConfig`]): What is trimmed, and how.
        model (`torch.nn.Module`): The model, which may have been compiled with CUDA graphs.

    Raises:
        `ValueError`: If the two do not go together.
    """
    asks_for_cuda_graphs = args.torch_compile_mode in ("reduce-overhead", "max-autotune")
    if trim.trim_backward == "sparse" and (asks_for_cuda_graphs or uses_cuda_graphs(model)):
        raise ValueError(
            f"trim_backward='sparse' cannot go with CUDA graphs: {CUDA_GRAPHS}. Compile in another mode, or set "
            "trim_backward='auto'."
        )
