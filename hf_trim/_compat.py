"""
Every private or unstable name of transformers, accelerate and huggingface_hub that hf_trim uses, in one place.

What can be imported is imported here, and other modules import it from here. Methods that are overridden or called
cannot be imported. The table `NEEDED` lists both, with the parameters that hf_trim relies on and the purpose;
`tests/trainer/test_compat.py` tells which of them the installed versions lack or have with other parameters.
"""

from importlib.metadata import version
from typing import NamedTuple, cast


try:
    from accelerate.utils import gather
    from huggingface_hub.errors import HfHubHTTPError
    from transformers.modelcard import TASK_MAPPING, extract_hyperparameters_from_trainer
    from transformers.trainer_pt_utils import find_batch_size, safe_globals
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, has_length, unwrap_peft_model
except ImportError as error:
    packages = ", ".join(f"{name} {version(name)}" for name in ("transformers", "accelerate", "huggingface_hub"))
    raise ImportError(f"This version of hf_trim does not work with {packages}: {error}.") from error

__all__ = [
    "PREFIX_CHECKPOINT_DIR",
    "TASK_MAPPING",
    "extract_hyperparameters_from_trainer",
    "find_batch_size",
    "gather",
    "has_length",
    "safe_globals",
    "unwrap_peft_model",
]

# The Hub's client raises it when there is no answer at all. It comes from the HTTP library below the client (requests,
# httpx, ...), which has changed between versions; an error for an answer is always derived from it.
HubConnectionError = cast(type[Exception], HfHubHTTPError.__bases__[0])


class Need(NamedTuple):
    """
    A name of another package that hf_trim relies on.

    Args:
        owner (`str`): The module, or the class as `"module.Class"`, that must have it.
        name (`str`): The name.
        parameters (`tuple[str, ...]`, *optional*): Parameters that we pass, or that an overriding method takes; `None`
            for what is no function.
        purpose (`str`): What hf_trim needs it for.
    """

    owner: str
    name: str
    parameters: tuple[str, ...] | None
    purpose: str


TRAINER = "transformers.Trainer"
NEEDED = (
    # Imported above.
    Need("accelerate.utils", "gather", ("tensor",), "timing trim_scope='global'"),
    Need("huggingface_hub.errors", "HfHubHTTPError", None, "telling that the Hub cannot be reached"),
    Need("transformers.modelcard", "TASK_MAPPING", None, "the model card"),
    Need("transformers.modelcard", "extract_hyperparameters_from_trainer", ("trainer",), "the model card"),
    Need("transformers.trainer_pt_utils", "find_batch_size", ("tensors",), "counting the samples of a batch"),
    Need("transformers.trainer_pt_utils", "safe_globals", (), "checking a checkpoint before it is loaded"),
    Need("transformers.trainer_utils", "PREFIX_CHECKPOINT_DIR", None, "finding the newest checkpoint"),
    Need("transformers.trainer_utils", "has_length", ("dataset",), "trim_memory"),
    Need("transformers.trainer_utils", "unwrap_peft_model", ("model",), "finding a model's head"),
    # Overridden by TrimmingMixin.
    Need(TRAINER, "train", (), "knowing methods that were replaced since the trainer was made"),
    Need(TRAINER, "training_step", ("model", "inputs", "num_items_in_batch"), "trim_strict, trim_check and the logs"),
    Need(
        TRAINER, "get_batch_samples", ("epoch_iterator", "num_batches", "device"), "knowing the mini-batches of a step"
    ),
    Need(TRAINER, "log", ("logs", "start_time"), "logging keep_fraction and what goes with it"),
    Need(TRAINER, "save_model", ("output_dir", "_internal_call"), "saving nothing of a training that is broken"),
    Need(TRAINER, "_save_checkpoint", ("model", "trial"), "saving what later steps depend on"),
    Need(TRAINER, "_load_from_checkpoint", ("resume_from_checkpoint", "model"), "loading converted weights"),
    Need(TRAINER, "_load_best_model", (), "loading converted weights"),
    Need(TRAINER, "_load_optimizer_and_scheduler", ("checkpoint",), "trim_memory: reading it from a checkpoint"),
    Need(TRAINER, "_run_epoch", (), "trim_memory: reading losses at the end of an epoch"),
    Need(TRAINER, "_prepare_for_training", (), "trim_memory: the data loader as callbacks see it"),
    Need(TRAINER, "_get_train_sampler", (), "trim_scope='dataset': the samples of an epoch"),
    Need(TRAINER, "_inner_training_loop", (), "trim_memory: the data loader of a training"),
    Need(TRAINER, "_init_training_state", (), "trim_scope='dataset': the epoch in which a training is resumed"),
    Need(TRAINER, "get_train_dataloader", (), "trim_memory: knowing the indices of samples"),
    Need(TRAINER, "_load_callback_state", (), "keeping what later steps depend on"),
    Need(TRAINER, "_set_signature_columns_if_needed", (), "keeping the column reference_loss for trim_score"),
    # Overridden by RecipeTrainer.
    Need(TRAINER, "_run_epoch", ("epoch",), "training no epoch after early stopping and a kill"),
    # Overridden by PushMixin.
    Need(TRAINER, "_save", ("output_dir", "state_dict"), "saving timm's own names of weights"),
    Need(TRAINER, "init_hf_repo", ("token", "private"), "explaining refusals"),
    Need(
        TRAINER, "push_to_hub", ("commit_message", "blocking", "token", "revision"), "explaining what the Hub refuses"
    ),
    Need(TRAINER, "create_model_card", ("model_name",), "the model card"),
    Need(TRAINER, "_push_from_checkpoint", ("checkpoint_folder",), "reporting pushes that failed"),
    Need(TRAINER, "_finish_current_push", (), "reporting pushes that failed"),
    # Called.
    Need(TRAINER, "save_model", ("_internal_call",), "saving a model before it is pushed"),
    Need(TRAINER, "_remove_unused_columns", ("dataset",), "trim_memory: knowing the data set of a data loader"),
    Need(TRAINER, "set_initial_training_values", ("args", "dataloader"), "trim_memory: the number of epochs"),
    Need(TRAINER, "get_cp_size", (), "refusing context parallelism"),
    Need(TRAINER, "get_sp_size", (), "refusing sequence parallelism"),
    Need("transformers.PreTrainedModel", "_from_config", ("config",), "the benchmark's models"),
    # Set, on the object.
    Need(TRAINER, "compute_loss", ("model", "inputs", "return_outputs", "num_items_in_batch"), "trimming the loss"),
)
# Fields that a trainer has once it is made → what hf_trim needs them for.
TRAINER_FIELDS = {
    "callback_handler": "testing before trackers end their run",
    "compute_loss_func": "trimming the losses of the user's function",
    "label_smoother": "trimming smoothed losses",
    "label_names": "counting the samples of a batch",
    "is_in_train": "telling training from other uses of compute_loss",
    "is_fsdp_enabled": "loading converted weights, and choosing the chunked head",
    "is_deepspeed_enabled": "loading converted weights",
    "hub_model_id": "the model card",
}
