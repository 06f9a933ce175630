"""A small set of images as one tensor on the training's device, so that no input pipeline holds a GPU up."""

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F


class DeviceImages(Dataset):
    """
    Images and their classes in memory. A mini-batch is taken, augmented and normalized as a whole, on the device. How
    it is augmented follows from torch's seed and from which images it has, in which order: so a training that goes on
    in the middle of an epoch sees what it would have seen, whatever was fetched in advance.

    Args:
        images (`torch.Tensor`): `[N, C, H, W]`, bytes.
        labels (`torch.Tensor`): `[N]`, class numbers.
        mean (`list[float]`): Mean of each channel, for pixels from 0 to 1.
        std (`list[float]`): Standard deviation of each channel.
        augment (`str`, *optional*, defaults to `"none"`): `"crop"` or `"crop-flip"`, see [`augmented`].
        device (`torch.device`, *optional*, defaults to the CPU): Where all of them are kept.
    """

    def __init__(self, images: Tensor, labels: Tensor, mean, std, augment: str = "none", device="cpu"):
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std, self.augment = mean, std, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (batch,) = self.__getitems__([index])
        return {name: values[0] for name, values in batch.items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """What torch's `DataLoader` asks for: here a list of one element, the whole mini-batch ([`only_batch`])."""
        which = torch.tensor(indices).to(self.images.device, non_blocking=True)
        seed = random.Random(str((torch.initial_seed(), indices))).getrandbits(63)
        images = augmented(self.images[which], self.augment, torch.Generator().manual_seed(seed))
        images = normalized(images, self.mean, self.std)
        return [{"pixel_values": images, "labels": self.labels[which]}]


def only_batch(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """
    The collator of [`DeviceImages`].

    Args:
        batches (`list[dict[str, torch.Tensor]]`): One mini-batch.

    Returns:
        `dict[str, torch.Tensor]`: `pixel_values` `[B, C, H, W]` and `labels` `[B]`.
    """
    (batch,) = batches
    return batch


def normalized(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """
    Args:
        images (`torch.Tensor`): `[B, C, H, W]`, bytes.
        mean (`list[float]`): Mean of each channel, for pixels from 0 to 1.
        std (`list[float]`): Standard deviation of each channel.

    Returns:
        `torch.Tensor`: `[B, C, H, W]`, floats.
    """
    return F.normalize(F.to_dtype(images, torch.float32, scale=True), mean, std)


def augmented(images: Tensor, augment: str, generator: torch.Generator | None = None) -> Tensor:
    """
    Args:
        images (`torch.Tensor`): `[B, C, H, W]`.
        augment (`str`): `"none"`; `"crop"`, which shifts each image by up to an eighth of its size; or `"crop-flip"`,
            which mirrors half of them too.
        generator (`torch.Generator`, *optional*): Of the CPU; torch's global one by default.

    Returns:
        `torch.Tensor`: `[B, C, H, W]`.
    """
    if augment == "none":
        return images
    return random_shift(images, images.shape[-1] // 8, flip=augment == "crop-flip", generator=generator)


def random_shift(images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """
    Random crop of the zero-padded images, and random mirroring, drawn for each image. (torchvision's transforms draw
    once for a whole batch.)

    Args:
        images (`torch.Tensor`): `[B, C, H, W]`.
        padding (`int`): The farthest shift, in pixels.
        flip (`bool`): Whether to mirror each image with a chance of one half.
        generator (`torch.Generator`, *optional*): Of the CPU, so that every device gives the same; torch's global one
            by default.

    Returns:
        `torch.Tensor`: `[B, C, H, W]`.
    """
    batch, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)
    if flip:
        columns = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, columns.flip(1), columns)
    rows, columns = (each.to(images.device, non_blocking=True) for each in (rows, columns))
    each = torch.arange(batch, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return F.pad(images, [padding])[each, channel, rows[:, None, :, None], columns[:, None, None, :]]
