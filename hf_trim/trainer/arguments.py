"""The `trim_*` fields: what is trimmed, how far, and how the backward pass is run."""

from dataclasses import dataclass, field, fields
from typing import Any

from transformers import TrainingArguments

from hf_trim.backward import BACKWARD_CHOICES
from hf_trim.messages import check_choice
from hf_trim.trainer.selection import NONFINITE_CHOICES, SELECT_CHOICES


SCHEDULE_CHOICES = ("epoch", "step", "adaptive")
UNIT_CHOICES = ("auto", "sample", "token")
SCOPE_CHOICES = ("local", "global", "dataset")


@dataclass
class TrimmingConfig:
    """
    What is trimmed, how far, and how the backward pass is run; checked when it is made.

    Args:
        trim_keep_start (`float`, *optional*, defaults to 1.0):
            Fraction p of each mini-batch to keep in the first epoch (or step). The logs have p as `keep_fraction`, and
            the fraction that was really kept, after rounding to a number of items, as `kept_fraction`.
        trim_keep_end (`float`, *optional*, defaults to 0.2):
            Fraction p to keep in the last epoch (or step); p falls linearly in between.
        trim_schedule (`str`, *optional*, defaults to `"epoch"`):
            Whether p falls by `"epoch"`, as in the paper, or by optimizer `"step"`; with one epoch, or if `max_steps`
            is set, it falls by step. `"adaptive"` takes p from the losses: the fewest hardest items are kept, such
            that those left out have at most the share 1 − `trim_mass` of the gradient mass; and the sum of the kept
            losses is divided by the number of all items. The update then is nearly that of plain training.
        trim_mass (`float`, *optional*, defaults to 0.95):
            With `trim_schedule="adaptive"`: what is left out has at most the share 1 − m of the mini-batch's gradient
            mass, or of that of an average mini-batch of the training so far, if it is more. The mass of an item is 1 −
            its probability for cross entropy, exp(−loss); for other losses it is the norm of the gradient of its loss
            for the input of the loss function (Katharopoulos & Fleuret, arXiv 1803.00942).
        trim_skip_hardest (`float`, *optional*, defaults to 0.0):
            Share of the hardest items of each mini-batch that is left out as suspect, where labels may be wrong; with
            every schedule. The kept items then are the next ones. (DORO, Zhai et al., arXiv 2106.06142; adaptive-k,
            arXiv 2203.14165.) Only for long trainings: as long as a model has learnt little, the hardest items are not
            the mislabelled ones but what is to be learnt.
        trim_select (`str`, *optional*, defaults to `"hardest"`):
            `"hardest"` keeps the highest losses, `"random"` a random subset of the same size (a control), `"none"`
            trains without trimming, with the same logs.
        trim_unit (`str`, *optional*, defaults to `"auto"`):
            What an item is: a `"token"` (or pixel), if there is a loss per token; or a `"sample"`, which is ranked by
            the mean over its tokens. `"auto"` is what the loss is over.
        trim_backward (`str`, *optional*, defaults to `"auto"`):
            How the backward pass is run: `"dense"` is ordinary autograd; `"sparse"` costs only what is kept, with the
            same gradients; `"replay"` scores without gradients and runs forward and backward again on the kept
            samples (least memory; draws dropout masks anew; calls `compute_loss` twice; with one sample a mini-batch,
            chooses among the accumulated ones); `"auto"` is the fastest that suits the model: the first trimmed steps
            time `"dense"` and `"sparse"` in turn, unless `full_determinism` asks for trainings without a clock.
        trim_strict (`bool`, *optional*, defaults to `False`): With `trim_backward="sparse"`: raise an error where an
            operation has no row-sparse rule, or a compiled graph cannot run on the kept rows. Without it, they run
            dense.
        trim_check (`bool`, *optional*, defaults to `True`):
            In compiled models: compare the first gradients on the kept rows with the dense ones. If they differ, the
            backward pass stays dense.
        trim_nonfinite (`str`, *optional*, defaults to `"error"`):
            What to do with losses that are NaN or infinite: end with an `"error"`, or `"drop"` their samples. Dropped
            samples are no items; in models whose operations all have row-sparse rules they have no gradient either.
            With `fp16=True`, `"error"` is a warning: the gradient scaler skips the step, as in plain `Trainer`.
        trim_scope (`str`, *optional*, defaults to `"local"`):
            Among which items the hardest are chosen: those of each device's micro-batch (`"local"`), or those of the
            micro-batches of all devices together (`"global"`), as one device with the whole mini-batch would choose.
            `"dataset"`: in each epoch only the hardest fraction p of the data set is trained on, by the last loss of
            each sample; the rest is not loaded. The forward pass then costs p as well, in models with batch
            normalization too. The first epoch is whole, and so is the last fifth of them, or at least the last one;
            mini-batches are not trimmed.
        trim_refresh (`int`, *optional*, defaults to 3):
            With `trim_scope="dataset"`: a sample that was not seen for more than so many epochs comes back, since its
            loss may have changed. At most half of an epoch's samples are such.
        trim_memory (`bool`, *optional*, defaults to `False`):
            Whether to remember the losses of each training sample, and how often it was kept: `trainer.trim_memory` is
            the table, `trainer.hard_examples(10)` the hardest samples. It takes 34 to 40 bytes a sample of the host's
            memory (in each process), is part of the checkpoints, and changes nothing in the training; plain training
            can be remembered, too (`trim_select="none"`). Counts from the start of the next training.
    """

    trim_keep_start: float = field(
        default=1.0, metadata={"help": "Fraction p of each mini-batch to keep in the first epoch (or step)."}
    )
    trim_keep_end: float = field(
        default=0.2, metadata={"help": "Fraction p to keep in the last epoch (or step); linear in between."}
    )
    trim_schedule: str = field(
        default="epoch",
        metadata={
            "help": "Whether p falls by epoch or by optimizer step (with one epoch: always by step), or follows the "
            "losses (adaptive).",
            "choices": SCHEDULE_CHOICES,
        },
    )
    trim_mass: float = field(
        default=0.95,
        metadata={"help": "With trim_schedule=adaptive: the share of the gradient mass to keep."},
    )
    trim_skip_hardest: float = field(
        default=0.0,
        metadata={"help": "Share of the hardest items to leave out as suspect, where labels may be wrong."},
    )
    trim_select: str = field(
        default="hardest",
        metadata={
            "help": "Keep the hardest items, a random subset of the same size (control), or everything (none).",
            "choices": SELECT_CHOICES,
        },
    )
    trim_unit: str = field(
        default="auto",
        metadata={
            "help": "What an item is: a sample, or a token where there is a loss per token (auto: as in the loss).",
            "choices": UNIT_CHOICES,
        },
    )
    trim_backward: str = field(
        default="auto",
        metadata={
            "help": "How the backward pass is run: dense, sparse, replay, or the fastest that suits the model (auto).",
            "choices": BACKWARD_CHOICES,
        },
    )
    trim_strict: bool = field(
        default=False,
        metadata={"help": "With trim_backward=sparse: raise where an operation has no row-sparse rule (else dense)."},
    )
    trim_check: bool = field(
        default=True,
        metadata={"help": "In compiled models: compare the first gradients on the kept rows with the dense ones."},
    )
    trim_nonfinite: str = field(
        default="error",
        metadata={
            "help": "What to do with losses that are NaN or infinite: end with an error, or drop their samples.",
            "choices": NONFINITE_CHOICES,
        },
    )
    trim_scope: str = field(
        default="local",
        metadata={
            "help": "Among which items the hardest are chosen: those of each device's micro-batch (local), of all "
            "devices' together (global), or of the data set in each epoch (dataset).",
            "choices": SCOPE_CHOICES,
        },
    )
    trim_refresh: int = field(
        default=3,
        metadata={"help": "With trim_scope=dataset: after so many epochs without it, a sample comes back."},
    )
    trim_memory: bool = field(
        default=False,
        metadata={"help": "Remember the losses of each training sample, and how often it was kept."},
    )

    def __post_init__(self) -> None:
        self.check()
        following: Any = super()  # the training arguments, where a class inherits from both
        if hasattr(following, "__post_init__"):
            following.__post_init__()

    @classmethod
    def of(cls, args: TrainingArguments) -> "TrimmingConfig":
        """
        The `trim_*` fields of any training arguments.

        Args:
            args ([`~transformers.TrainingArguments`]): The arguments; fields that they lack have their defaults.

        Returns:
            [`TrimmingConfig`]: The arguments themselves if they are one.

        Raises:
            `ValueError`: If a field has a wrong value.
        """
        if isinstance(args, TrimmingConfig):
            return args
        return cls(**{x.name: getattr(args, x.name) for x in fields(cls) if hasattr(args, x.name)})

    def values(self) -> tuple:
        """The values of the `trim_*` fields."""
        return tuple(getattr(self, x.name) for x in fields(TrimmingConfig))

    def check(self) -> None:
        """
        Raises:
            `ValueError`: If a field has a wrong value.
        """
        for name in ("trim_keep_start", "trim_keep_end", "trim_mass"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                example = "0.95 keeps 95 % of the mass" if name == "trim_mass" else "0.2 keeps a fifth"
                raise ValueError(f"{name} must be a fraction in (0, 1], and is {value!r}: {example}.")
        skip = self.trim_skip_hardest
        if isinstance(skip, bool) or not isinstance(skip, (int, float)) or not 0 <= skip < 1:
            raise ValueError(f"trim_skip_hardest must be a share in [0, 1), and is {skip!r}: 0.1 skips a tenth.")
        if self.trim_keep_end > self.trim_keep_start:
            raise ValueError(
                f"trim_keep_end ({self.trim_keep_end}) must not be above trim_keep_start ({self.trim_keep_start}): "
                "the kept fraction falls during training. Swap the two, or set both to the same value for a "
                "constant fraction."
            )
        check_choice("trim_schedule", self.trim_schedule, SCHEDULE_CHOICES)
        self._check_schedule()
        check_choice("trim_select", self.trim_select, SELECT_CHOICES)
        check_choice("trim_unit", self.trim_unit, UNIT_CHOICES)
        check_choice("trim_backward", self.trim_backward, BACKWARD_CHOICES)
        if self.trim_strict and self.trim_backward != "sparse":
            raise ValueError(
                f"trim_strict needs trim_backward='sparse', and that is '{self.trim_backward}': set that, or "
                "leave trim_strict out."
            )
        check_choice("trim_nonfinite", self.trim_nonfinite, NONFINITE_CHOICES)
        check_choice("trim_scope", self.trim_scope, SCOPE_CHOICES)
        self._check_scope()

    def _check_scope(self) -> None:
        """Refuse settings that the scope does not look at."""
        refresh = self.trim_refresh
        if isinstance(refresh, bool) or not isinstance(refresh, int) or refresh < 1:
            raise ValueError(f"trim_refresh must be a number of epochs from 1 on, and is {refresh!r}.")
        defaults = {x.name: x.default for x in fields(TrimmingConfig)}
        if self.trim_scope != "dataset":
            if refresh != defaults["trim_refresh"]:
                raise ValueError(
                    f"trim_refresh={refresh} has no effect with trim_scope='{self.trim_scope}': leave it out, or set "
                    "trim_scope='dataset'."
                )
            return
        for name in ("trim_schedule", "trim_skip_hardest", "trim_unit", "trim_backward", "trim_nonfinite"):
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect with trim_scope='dataset', where p falls by epoch "
                    "and mini-batches are not trimmed: leave it out, or set trim_scope to 'local' or 'global'."
                )

    def _check_schedule(self) -> None:
        """Refuse settings that the schedule does not look at."""
        unused = ("trim_keep_start", "trim_keep_end") if self.is_adaptive else ("trim_mass",)
        defaults = {x.name: x.default for x in fields(TrimmingConfig)}
        for name in unused:
            if getattr(self, name) != defaults[name]:
                other = "'epoch' or 'step'" if self.is_adaptive else "'adaptive'"
                raise ValueError(
                    f"{name}={getattr(self, name)} has no effect with trim_schedule='{self.trim_schedule}': leave it "
                    f"out, or set trim_schedule to {other}."
                )

    @property
    def trims(self) -> bool:
        """Whether anything is ever left out of a mini-batch."""
        if self.trim_select == "none" or self.trim_scope == "dataset":
            return False
        if self.trim_skip_hardest > 0:
            return True
        return self.trim_mass < 1 if self.is_adaptive else self.trim_keep_start < 1 or self.trim_keep_end < 1

    @property
    def trims_dataset(self) -> bool:
        """Whether epochs have a part of the data set only."""
        lowest = min(self.trim_keep_start, self.trim_keep_end)
        return self.trim_scope == "dataset" and self.trim_select != "none" and lowest < 1

    @property
    def remembers(self) -> bool:
        """Whether the losses of each sample are needed."""
        return self.trim_memory or self.trims_dataset

    @property
    def is_adaptive(self) -> bool:
        """Whether p follows the losses."""
        return self.trim_schedule == "adaptive"


@dataclass
class TrimmingArguments(TrimmingConfig, TrainingArguments):
    """
    [`~transformers.TrainingArguments`] with the fields of [`TrimmingConfig`].

    ```python
    args = TrimmingArguments("out", num_train_epochs=10, trim_keep_end=0.2)
    ```
    """
