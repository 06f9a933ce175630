"""Images: decoded once or each time, and augmented."""

import torch
from datasets import Image

import hf_trim.data.images
from hf_trim.data import DataArguments, DeviceImages, load_data
from hf_trim.data.augment import shift_images
from tests.support.data import first_batch, tiny_digits


def test_images_are_the_same_in_memory_or_decoded_when_drawn(tmp_path, monkeypatch):
    tiny_digits(30).save_to_disk(tmp_path)
    args = DataArguments(str(tmp_path), image_size=16, test_fraction=0.5)
    once = load_data(args)
    monkeypatch.setattr(hf_trim.data.images, "IN_MEMORY_BYTES", 0)
    each_time = load_data(args)
    assert isinstance(once.train_dataset, DeviceImages) and each_time.train_dataset.features["pixel_values"] == Image()
    assert once.test_dataset[3]["pixel_values"].equal(each_time.test_dataset[3]["pixel_values"])
    assert once.test_dataset[3]["labels"] == each_time.test_dataset[3]["labels"]
    for split in ("train", "test"):
        assert torch.equal(
            first_batch(once, 8, split)["pixel_values"], first_batch(each_time, 8, split)["pixel_values"]
        )


def test_random_shift_draws_for_each_image():
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    torch.manual_seed(0)
    shifted = shift_images(images, 1, flip=True)
    padded = torch.nn.functional.pad(images[0, 0], [1] * 4)
    crops = {(y, x): padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)}
    possible = [crop.tolist() for crop in crops.values()] + [crop.flip(1).tolist() for crop in crops.values()]
    seen = [possible.index(image[0].tolist()) for image in shifted]
    assert set(seen) == set(range(18))
    assert (shifted[:, 0] == shifted[:, 1]).all()


def test_only_training_images_are_augmented(monkeypatch):
    for in_memory in (True, False):
        data = load_data(DataArguments("digits", augment="crop"))
        plain = load_data(DataArguments("digits"))
        assert not torch.equal(first_batch(data, 64)["pixel_values"], first_batch(plain, 64)["pixel_values"])
        assert torch.equal(
            first_batch(data, 64, "test")["pixel_values"], first_batch(plain, 64, "test")["pixel_values"]
        )
        monkeypatch.setattr(hf_trim.data.images, "IN_MEMORY_BYTES", 0)
        assert isinstance(data.train_dataset, DeviceImages) == in_memory


def test_images_in_memory_are_augmented_by_seed_and_place():
    images = load_data(DataArguments("digits", augment="crop")).train_dataset

    def draw(seed, indices):
        torch.manual_seed(seed)
        torch.rand(seed)  # what else was drawn does not matter
        (batch,) = images.__getitems__(indices)
        return batch["pixel_values"]

    indices, swapped = [3, 1, 4, 1], [1, 3, 4, 1]
    assert torch.equal(draw(5, indices), draw(5, indices))
    assert not torch.equal(draw(5, indices), draw(6, indices))
    assert not torch.equal(draw(5, indices)[[1, 0, 2, 3]], draw(5, swapped))
