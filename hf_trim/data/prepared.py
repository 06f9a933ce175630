"""What comes out: the splits, and what `Trainer`, the model and the saved folder need to know of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from datasets import Dataset

from hf_trim.data.device_images import DeviceImages


@dataclass
class Data:
    """
    What [`~hf_trim.data.load_data`] returns: all that [`~hf_trim.run.models.build_model`] and `Trainer` need.

    Args:
        kind (`str`):
            `"image"` or `"text"` to classify, or `"language"` to model.
        train_dataset (`datasets.Dataset` or [`~hf_trim.data.DeviceImages`]):
            Columns `labels` (int) and `pixel_values` (float `[C, H, W]`), or what the tokenizer returns; for a
            language model `labels` are the `input_ids`.
        test_dataset (`datasets.Dataset` or [`~hf_trim.data.DeviceImages`]):
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
        validation_dataset (`datasets.Dataset` or [`~hf_trim.data.DeviceImages`], *optional*):
            What to test on during training; without it that is the test split.
        summary (`str`, *optional*):
            A few lines: the columns, and how many rows and classes there are.
        examples (`list[tuple[str, str]]`, *optional*):
            The first rows of the training split, as they are shown to a reader: input and class.
        inputs (`datasets.Dataset`, *optional*):
            The training split's texts or pictures as they were read, in its one column; `None` for a language model.
        rows (`list[int]`, *optional*):
            For each sample of the training split its row in the split as it was read, from 0 on; `None` for a language
            model.
    """

    kind: str
    train_dataset: Dataset | DeviceImages
    test_dataset: Dataset | DeviceImages
    label_names: list[str]
    data_collator: Callable[[list], dict[str, Any]]
    processing_class: Any
    image_size: int | None = None
    num_channels: int | None = None
    max_seq_length: int | None = None
    validation_dataset: Dataset | DeviceImages | None = None
    summary: str = ""
    examples: list[tuple[str, str]] = field(default_factory=list)
    inputs: Dataset | None = None
    rows: Sequence[int] | None = None

    def show(self, index: int) -> Any:
        """
        Args:
            index (`int`): A sample of the training split.

        Returns:
            `str` or `PIL.Image.Image`: Its text or its picture, as it was read.
        """
        if self.inputs is None:  # a block of tokens
            return self.processing_class.decode(self.train_dataset[index]["input_ids"])
        (value,) = self.inputs[index].values()
        return value

    @property
    def eval_dataset(self) -> Dataset | DeviceImages:
        """What to test on during training: the validation split if there is one, else the test split."""
        return self.test_dataset if self.validation_dataset is None else self.validation_dataset
