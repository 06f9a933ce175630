"""
A plain PyTorch loop with the paper's schedule: p, the fraction of each mini-batch that counts, falls by epoch.

    python recipes/examples/plain_loop.py --epochs 30

The model is a small vision transformer, the data are scikit-learn's digits: less than a minute on 2 CPU cores.
"""

import argparse

from hf_trim import linear_fraction, trimmed_mean  # first: it repairs torchvision beside a CPU build of torch

import timm
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch.utils.data import DataLoader, TensorDataset


def load_splits() -> tuple[TensorDataset, TensorDataset]:
    """Images `[N, 1, 8, 8]` from -1 to 1, and classes `[N]`."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 8 - 1
    train, test = train_test_split(range(len(images)), test_size=0.2, stratify=digits.target, random_state=0)
    labels = torch.tensor(digits.target)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def make_model() -> torch.nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224",
        img_size=8,
        patch_size=2,
        in_chans=1,
        num_classes=10,
        embed_dim=64,
        depth=4,
        num_heads=4,
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    train, test = load_splits()
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    for epoch in range(epochs):
        p = linear_fraction(epoch, epochs, start=1.0, end=0.2)
        model.train()
        for images, labels in loader:
            losses = torch.nn.functional.cross_entropy(model(images), labels, reduction="none")  # [B]
            # The mean of the hardest; the backward pass costs only what they need, with the same gradients.
            trimmed_mean(losses, keep=p, backward="sparse").backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            error = (model(test.tensors[0]).argmax(1) != test.tensors[1]).float().mean()
        print(f"epoch {epoch + 1}: p {p:.2f}, test error {100 * error:.2f} %")


if __name__ == "__main__":
    main()
