"""
Images → `pixel_values`: decoded, resized, normalized.

PIL images of any size and mode → bytes `[B, C, H, W]` → floats `[B, C, H, W]`. A small data set is decoded once and
kept on the device, a large one is decoded each time that a batch is drawn.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from transformers import DefaultDataCollator, PreTrainedTokenizerBase, ViTImageProcessor

from hf_trim.data.arguments import DataArguments
from hf_trim.data.augment import augment_images, normalize_images
from hf_trim.data.columns import with_pictures
from hf_trim.data.device_images import DeviceImages, unwrap_batch
from hf_trim.data.prepared import Data


# All splits together, as bytes, at most: then they are kept on the device.
IN_MEMORY_BYTES = 2**30


def prepare_images(
    args: DataArguments, splits: dict[str, Dataset], column: str, processor: Any, device: torch.device | str
) -> Data:
    """
    Args:
        args ([`~hf_trim.data.DataArguments`]): Size, channels, mean, deviation, augmentation.
        splits (`dict[str, datasets.Dataset]`): `train`, `test` and perhaps `validation`, with `labels`.
        column (`str`): The column with the images.
        processor (image processor, *optional*): The pretrained model's, for the defaults.
        device (`torch.device`): Where a small data set is kept.

    Returns:
        [`~hf_trim.data.Data`]: The prepared data.

    Raises:
        `ValueError`: If the model is one for text, or no size can be told.
    """
    if isinstance(processor, PreTrainedTokenizerBase):
        raise ValueError(f"dataset '{args.dataset}' holds images, and the model is one for text: choose another.")
    label_names = splits["train"].features["labels"].names
    splits = {use: _select_columns(split, column) for use, split in splits.items()}
    size, mean, std = _image_settings(args, splits["train"], processor)
    decode = partial(_decode, size=size, channels=args.image_channels)
    collator: Callable[[list], dict[str, Any]]
    if sum(map(len, splits.values())) * args.image_channels * size**2 <= IN_MEMORY_BYTES:
        prepare, collator = partial(_decode_once, decode=decode, mean=mean, std=std, device=device), unwrap_batch
    else:
        prepare, collator = partial(_decode_when_drawn, decode=decode, mean=mean, std=std), DefaultDataCollator()
    prepared = {
        use: prepare(split, augment=args.augment if use == "train" else "none") for use, split in splits.items()
    }
    return Data(
        kind="image",
        train_dataset=prepared["train"],
        test_dataset=prepared["test"],
        validation_dataset=prepared.get("validation"),
        label_names=label_names,
        data_collator=collator,
        processing_class=ViTImageProcessor(size={"height": size, "width": size}, image_mean=mean, image_std=std),
        image_size=size,
        num_channels=args.image_channels,
    )


def _select_columns(split: Dataset, column: str) -> Dataset:
    """The images as `pixel_values`, and `labels`; nothing else."""
    split = with_pictures(split, column)
    split = split.select_columns([column, "labels"])
    return split.rename_column(column, "pixel_values") if column != "pixel_values" else split


def _image_settings(args: DataArguments, train: Dataset, processor: Any) -> tuple[int, list[float], list[float]]:
    """Size, mean and standard deviation: the arguments', else the pretrained model's, else defaults."""
    timm_config = getattr(processor, "data_config", None)  # only timm's processors have one
    if timm_config:
        size, mean, std = timm_config["input_size"][-1], timm_config["mean"], timm_config["std"]
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
    # A colour model's mean of 3 channels says nothing about grey images.
    default = [0.5] * args.image_channels
    mean = args.image_mean or (mean if mean is not None and len(mean) == args.image_channels else default)
    std = args.image_std or (std if std is not None and len(std) == args.image_channels else default)
    return size, list(mean), list(std)


def _decode(images: list, size: int, channels: int) -> Tensor:
    """PIL images to `[B, C, H, W]`, bytes; resized as image processors do."""
    mode = "RGB" if channels == 3 else "L"
    tensors = [F.pil_to_tensor(image if image.mode == mode else image.convert(mode)) for image in images]
    return torch.stack(
        [x if x.shape[1:] == (size, size) else F.resize(x, [size, size], antialias=True) for x in tensors]
    )


def _decode_once(split: Dataset, decode: Any, device: torch.device | str, **settings) -> DeviceImages:
    images = [decode(batch["pixel_values"]) for batch in split.iter(1000)]
    return DeviceImages(torch.cat(images), torch.tensor(split["labels"][:]), device=device, **settings)


def _decode_when_drawn(split: Dataset, **settings) -> Dataset:
    return split.with_transform(partial(_transform, **settings))


def _transform(
    batch: dict[str, list], decode: Any, mean: list[float], std: list[float], augment: str
) -> dict[str, Any]:
    images = normalize_images(augment_images(decode(batch["pixel_values"]), augment), mean, std)
    return {"pixel_values": images, "labels": batch["labels"]}
