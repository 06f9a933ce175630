"""
Images as a model wants them: shifted and mirrored at random while it trains, and normalized.

Bytes `[B, C, H, W]` from 0 to 255 → floats `[B, C, H, W]` with a mean of about 0 and a deviation of about 1.
"""

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F


def normalize_images(images: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """
    Args:
        images (`torch.Tensor`): `[B, C, H, W]`, bytes.
        mean (`list[float]`): Mean of each channel, for pixels from 0 to 1.
        std (`list[float]`): Standard deviation of each channel.

    Returns:
        `torch.Tensor`: `[B, C, H, W]`, floats.
    """
    return F.normalize(F.to_dtype(images, torch.float32, scale=True), mean, std)


def augment_images(images: Tensor, augment: str, generator: torch.Generator | None = None) -> Tensor:
    """
    Args:
        images (`torch.Tensor`): `[B, C, H, W]`.
        augment (`str`): `"none"`; `"crop"`, which shifts each image by up to an eighth of its size; or `"crop-flip"`,
            which mirrors half of them too.
        generator (`torch.Generator`, *optional*): A generator on the CPU; torch's global one by default.

    Returns:
        `torch.Tensor`: `[B, C, H, W]`.
    """
    if augment == "none":
        return images
    return shift_images(images, images.shape[-1] // 8, flip=augment == "crop-flip", generator=generator)


def shift_images(images: Tensor, padding: int, flip: bool, generator: torch.Generator | None = None) -> Tensor:
    """
    Crop the zero-padded images at random places, and mirror some of them. Both are drawn for each image:
    torchvision's transforms draw once for a whole batch.

    Args:
        images (`torch.Tensor`): `[B, C, H, W]`.
        padding (`int`): The farthest shift, in pixels.
        flip (`bool`): Whether to mirror each image with a chance of one half.
        generator (`torch.Generator`, *optional*): A generator on the CPU, so that every device gives the same images;
            torch's global one by default.

    Returns:
        `torch.Tensor`: `[B, C, H, W]`.
    """
    batch, channels, height, width = images.shape
    top, left = torch.randint(0, 2 * padding + 1, (2, batch, 1), generator=generator)
    rows, columns = top + torch.arange(height), left + torch.arange(width)  # [B, H] and [B, W]
    if flip:
        columns = torch.where(torch.rand(batch, 1, generator=generator) < 0.5, columns.flip(1), columns)
    rows, columns = rows.to(images.device, non_blocking=True), columns.to(images.device, non_blocking=True)
    # One gather for the batch; the four indices broadcast to [B, C, H, W].
    image = torch.arange(batch, device=images.device).view(-1, 1, 1, 1)
    channel = torch.arange(channels, device=images.device).view(1, -1, 1, 1)
    return F.pad(images, [padding])[image, channel, rows[:, None, :, None], columns[:, None, None, :]]
