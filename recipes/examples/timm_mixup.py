"""
A training as timm's scripts have it: mixup and CutMix, label smoothing, its optimizers and schedules, and EMA weights.

    python recipes/examples/timm_mixup.py --epochs 30

After mixup each sample has two classes, and a loss all the same: that is what ranks it. The model is a small vision
transformer, the data are scikit-learn's digits.
"""

import argparse

from hf_trim import linear_fraction, trimmed_mean  # first: it repairs torchvision beside a CPU build of torch

import torch
from plain_loop import load_splits, make_model
from timm.data import Mixup
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch.utils.data import DataLoader


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=30)
    epochs = parser.parse_args().epochs
    torch.manual_seed(0)
    train, test = load_splits()
    loader = DataLoader(train, batch_size=64, shuffle=True, drop_last=True)
    model = make_model()
    ema = ModelEmaV3(model, decay=0.99)
    mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
    optimizer = create_optimizer_v2(model, opt="adamw", lr=2e-3, weight_decay=0.05)
    scheduler = CosineLRScheduler(optimizer, t_initial=epochs, warmup_t=min(3, epochs - 1), warmup_lr_init=1e-4)
    for epoch in range(epochs):
        p = linear_fraction(epoch, epochs, start=1.0, end=0.2)
        scheduler.step(epoch)
        model.train()
        for images, labels in loader:
            images, targets = mixup(images, labels)  # targets: [B, 10], a share for each class
            # In the place of timm's SoftTargetCrossEntropy, which takes the mean itself.
            losses = torch.nn.functional.cross_entropy(model(images), targets, reduction="none")  # [B]
            trimmed_mean(losses, keep=p, backward="sparse").backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
        with torch.no_grad():
            error = (ema.module.eval()(test.tensors[0]).argmax(1) != test.tensors[1]).float().mean()
        print(f"epoch {epoch + 1}: p {p:.2f}, test error {100 * error:.2f} % (EMA weights)")


if __name__ == "__main__":
    main()
