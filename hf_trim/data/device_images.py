"""
A small set of images as one tensor on the training's device, so that no input pipeline holds a GPU up.

Bytes `[N, C, H, W]` → a mini-batch of floats `[B, C, H, W]`, made on the device.
"""

import random

import torch
from torch import Tensor
from torch.utils.data import Dataset

from hf_trim.data.augment import augment_images, normalize_images


class DeviceImages(Dataset):
    """
    Images and their classes in memory. A mini-batch is taken, augmented and normalized at once, on the device.

    The augmentation is a function of torch's seed and of the indices of the mini-batch. So a run that resumes in the
    middle of an epoch sees the same images as a run without a break, whatever was fetched in advance.

    Args:
        images (`torch.Tensor`): `[N, C, H, W]`, bytes.
        labels (`torch.Tensor`): `[N]`, class numbers.
        mean (`list[float]`): Mean of each channel, for pixels from 0 to 1.
        std (`list[float]`): Standard deviation of each channel.
        augment (`str`, *optional*, defaults to `"none"`): `"crop"` or `"crop-flip"`, see
            [`~hf_trim.data.augment.augment_images`].
        device (`torch.device`, *optional*, defaults to the CPU): Where all of them are kept.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: list[float],
        std: list[float],
        augment: str = "none",
        device: torch.device | str = "cpu",
    ):
        self.images, self.labels = images.to(device), labels.to(device)
        self.mean, self.std, self.augment = mean, std, augment

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        (batch,) = self.__getitems__([index])
        return {name: values[0] for name, values in batch.items()}

    def __getitems__(self, indices: list[int]) -> list[dict[str, Tensor]]:
        """What torch's `DataLoader` calls: a list of one element, the mini-batch. See [`unwrap_batch`]."""
        rows = torch.tensor(indices).to(self.images.device, non_blocking=True)
        # Drawn from a generator of its own: what else torch draws in the meantime changes nothing.
        seed = random.Random(str((torch.initial_seed(), indices))).getrandbits(63)
        images = augment_images(self.images[rows], self.augment, torch.Generator().manual_seed(seed))
        images = normalize_images(images, self.mean, self.std)
        return [{"pixel_values": images, "labels": self.labels[rows]}]


def unwrap_batch(batches: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """
    The collator for [`DeviceImages`], which hands out mini-batches and no samples.

    Args:
        batches (`list[dict[str, torch.Tensor]]`): One mini-batch.

    Returns:
        `dict[str, torch.Tensor]`: `pixel_values` `[B, C, H, W]` and `labels` `[B]`.
    """
    (batch,) = batches
    return batch
