"""Data: the embedded sets, the Hub's schemas in small, local formats, and what is refused."""

import gzip
import struct

import datasets
import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Image, Value
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

import hf_trim.data.arguments
from hf_trim.data.arguments import DataArguments, load_data
from hf_trim.data.device_images import DeviceImages, random_shift
from hf_trim.run.models import ModelArguments, load_processing_class


NAMES = [str(digit) for digit in range(10)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="module")
def minilm_tokenizer():
    return load_processing_class(ModelArguments(model_name_or_path="minilm"))


def tiny(n=20, size=32, image="image", label="label", names=NAMES, **columns):
    """Digits in colour at the Hub sets' size, under the Hub sets' column names; `columns` come in addition."""
    digits = load_digits()
    pixels = np.rint(digits.images[:n] * 255 / 16).astype(np.uint8).repeat(size // 8, 1).repeat(size // 8, 2)
    features = {image: Image(), label: ClassLabel(names=names)}
    features.update({name: ClassLabel(names=NAMES) for name in columns})
    data = {image: list(np.stack([pixels] * 3, -1)), label: digits.target[:n].tolist(), **columns}
    return Dataset.from_dict(data, features=datasets.Features(features))


def labels(split):
    return split.labels.tolist() if isinstance(split, DeviceImages) else split.with_format(None)["labels"][:]


def batch(data, size=4, split="train"):
    return next(iter(DataLoader(getattr(data, f"{split}_dataset"), batch_size=size, collate_fn=data.data_collator)))


# Embedded sets


def test_digits():
    data = load_data(DataArguments("digits", image_channels=1))
    assert (data.kind, data.image_size, data.num_channels, data.label_names) == ("image", 8, 1, NAMES)
    assert (len(data.train_dataset), len(data.test_dataset)) == (1437, 360)
    total = np.bincount(load_digits().target)
    assert np.abs(np.bincount(labels(data.test_dataset)) - total * 0.2).max() <= 1  # stratified
    images = batch(data, 1437)["pixel_values"]
    assert images.shape == (1437, 1, 8, 8) and images.dtype == torch.float32
    assert (images.min(), images.max()) == (-1, 1)
    # Every image is one of scikit-learn's, with its label, and the splits share no row of it.
    known = {each.tobytes(): label for each, label in zip(load_digits().images, load_digits().target, strict=True)}
    grey = ((images + 1) * 8).round().double().numpy()
    assert [known[each.tobytes()] for each in grey] == labels(data.train_dataset)


def test_bbc_news(minilm_tokenizer):
    raw = hf_trim.data.arguments._load_bbc_news()["train"]
    assert len(raw) == len(set(raw["text"])) == 2127
    assert raw.features["label"].names == ["business", "entertainment", "politics", "sports", "tech"]
    data = load_data(DataArguments("bbc-news", max_seq_length=32, max_train_samples=64), minilm_tokenizer)
    assert (data.kind, len(data.train_dataset), len(data.test_dataset)) == ("text", 64, 426)
    share = np.bincount(raw["label"]) / len(raw)
    assert np.abs(np.bincount(labels(data.test_dataset)) / 426 - share).max() < 0.003
    inputs = batch(data)
    assert inputs["input_ids"].shape == inputs["attention_mask"].shape == (4, 32)
    assert inputs["labels"].dtype == torch.int64


def test_blocks_of_a_language_model(minilm_tokenizer):
    args = DataArguments("bbc-news", task="causal-lm", max_seq_length=64, max_train_samples=50, max_test_samples=5)
    data = load_data(args, minilm_tokenizer)
    assert (data.kind, data.label_names, data.max_seq_length) == ("language", [], 64)
    assert (len(data.train_dataset), len(data.test_dataset)) == (50, 5)
    inputs = batch(data)
    assert inputs["input_ids"].shape == (4, 64) and torch.equal(inputs["input_ids"], inputs["labels"])
    whole = load_data(DataArguments("bbc-news", task="causal-lm", max_seq_length=512), minilm_tokenizer)
    texts = hf_trim.data.arguments._load_bbc_news()["train"]["text"][:]
    ids = minilm_tokenizer(texts, verbose=False)["input_ids"]
    blocks = torch.tensor(whole.train_dataset["input_ids"][:] + whole.test_dataset["input_ids"][:])
    assert 0 <= sum(map(len, ids)) - blocks.numel() < 2 * 512  # nothing is lost but the two ends
    assert (blocks == minilm_tokenizer.sep_token_id).sum() >= len(texts) - 4  # where a text ends
    for arguments, match in (
        ({"dataset": "digits"}, "task 'causal-lm' needs texts, and dataset 'digits' holds images"),
        ({"dataset": "bbc-news", "max_seq_length": 10**7}, "fewer than max_seq_length = 10000000 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            load_data(DataArguments(task="causal-lm", **arguments), minilm_tokenizer)
    with pytest.raises(ValueError, match="task must be one of.*Did you mean 'causal-lm'"):
        DataArguments("bbc-news", task="causal-ml")


def test_label_noise():
    def train_labels(noise, **arguments):
        data = load_data(DataArguments("digits", label_noise=noise, **arguments))
        return np.array(labels(data.train_dataset)), labels(data.test_dataset)

    right, test = train_labels(0.0)
    noisy, noisy_test = train_labels(0.2)
    assert (right != noisy).sum() == round(0.2 * len(right)) and noisy_test == test
    assert (np.bincount(noisy[right != noisy], minlength=10) > 0).all()
    assert (train_labels(0.2)[0] == noisy).all() and (train_labels(0.2, split_seed=1)[0] != noisy).any()
    for noise, match in ((1.0, "label_noise must lie in"), ("a", "label_noise must lie in")):
        with pytest.raises(ValueError, match=match):
            DataArguments("digits", label_noise=noise)
    with pytest.raises(ValueError, match="label_noise is for classes"):
        DataArguments("bbc-news", task="causal-lm", label_noise=0.1)


def write_idx(path, array):
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes()))


def test_fashion_mnist(tmp_path, monkeypatch):
    monkeypatch.setattr(hf_trim.data.arguments, "FASHION_MNIST_FOLDER", tmp_path)
    with pytest.raises(ValueError, match="apt-get install dataset-fashion-mnist"):
        load_data(DataArguments("fashion-mnist"))
    images = np.arange(30 * 28 * 28, dtype=np.uint8).reshape(30, 28, 28)
    for prefix, n in (("train", 30), ("t10k", 20)):
        write_idx(tmp_path / f"{prefix}-images-idx3-ubyte.gz", images[:n])
        write_idx(tmp_path / f"{prefix}-labels-idx1-ubyte.gz", np.arange(n, dtype=np.uint8) % 10)
    data = load_data(DataArguments("fashion-mnist", image_channels=1))
    assert (len(data.train_dataset), len(data.test_dataset), data.label_names[9]) == (30, 20, "Ankle boot")
    pixels = (batch(data, 30)["pixel_values"][:, 0] * 0.5 + 0.5) * 255
    assert np.array_equal(pixels.round().byte().numpy(), images)
    write_idx(tmp_path / "t10k-images-idx3-ubyte.gz", images[0])
    with pytest.raises(ValueError, match="not an idx file with 3 dimensions"):
        load_data(DataArguments("fashion-mnist"))


def test_splits_depend_on_their_seed_alone():
    def split(**arguments):
        torch.manual_seed(len(arguments))
        data = load_data(DataArguments("digits", **arguments))
        return labels(data.train_dataset), labels(data.test_dataset)

    assert split() == split()
    assert split() != split(split_seed=1)
    train, test = split(max_train_samples=50, max_test_samples=20)
    assert (len(train), len(test)) == (50, 20) and len(set(train)) == 10


# Local formats, and the Hub's schemas


@pytest.mark.parametrize("form", ["save_to_disk", "imagefolder", "parquet", "csv"])
def test_local_formats(form, tmp_path, minilm_tokenizer):
    folder = tmp_path / "data"
    splits = {"train": tiny(30), "test": tiny(20)}
    processing_class = None
    if form == "save_to_disk":
        DatasetDict(splits).save_to_disk(folder)
    for name, split in splits.items():
        if form == "parquet":
            folder.mkdir(exist_ok=True)
            split.to_parquet(folder / f"{name}.parquet")
        elif form == "imagefolder":
            for number, row in enumerate(split):
                (folder / name / str(row["label"])).mkdir(parents=True, exist_ok=True)
                row["image"].save(folder / name / str(row["label"]) / f"{number}.png")
        elif form == "csv":
            folder.mkdir(exist_ok=True)
            rows = [f"a text about {label},class {label}" for label in split["label"]]
            (folder / f"{name}.csv").write_text("\n".join(["text,label", *rows]))
            processing_class = minilm_tokenizer
    data = load_data(DataArguments(str(folder)), processing_class)
    assert (len(data.train_dataset), len(data.test_dataset)) == (30, 20)
    assert data.label_names == ([f"class {name}" for name in NAMES] if form == "csv" else NAMES)
    assert sorted(labels(data.test_dataset)) == sorted(load_digits().target[:20])
    inputs = batch(data, 20, "test")
    if form == "csv":
        assert inputs["input_ids"].shape[0] == 20
        return
    assert inputs["pixel_values"].shape == (20, 3, 32, 32)
    expected = load_data(DataArguments(str(folder))).processing_class(splits["test"][0]["image"], return_tensors="pt")
    if form != "imagefolder":  # which is sorted by class
        assert torch.allclose(inputs["pixel_values"][:1], expected["pixel_values"], atol=1e-6)


def test_one_csv_file_is_split_by_class(tmp_path, minilm_tokenizer):
    rows = ["text,label,number"] + [f"row {number},{'ab'[number % 2]},1" for number in range(20)]
    (tmp_path / "all.csv").write_text("\n".join(rows))
    data = load_data(DataArguments(str(tmp_path / "all.csv"), test_fraction=0.3), minilm_tokenizer)
    assert np.bincount(labels(data.test_dataset)).tolist() == [3, 3]


def test_two_label_columns_as_in_cifar100(tmp_path):
    split = tiny(20, image="img", label="fine_label", coarse_label=[0, 1] * 10)
    DatasetDict(train=split, test=split).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match="several could be it: fine_label, coarse_label"):
        load_data(DataArguments(str(tmp_path)))
    data = load_data(DataArguments(str(tmp_path), label_column="coarse_label"))
    assert labels(data.train_dataset) == [0, 1] * 10


def test_a_folder_without_data_does_not_hide_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert len(load_data(DataArguments("digits")).train_dataset) == 1437
    assert hf_trim.data.arguments._local_path("owner/name") is None
    tiny().to_parquet(tmp_path / "owner" / "name" / "train.parquet")
    assert hf_trim.data.arguments._local_path("owner/name") == tmp_path / "owner" / "name"


# Images and texts


def test_images_are_the_same_in_memory_or_decoded_when_drawn(tmp_path, monkeypatch):
    tiny(30).save_to_disk(tmp_path)
    args = DataArguments(str(tmp_path), image_size=16, test_fraction=0.5)
    once = load_data(args)
    monkeypatch.setattr(hf_trim.data.arguments, "IN_MEMORY_BYTES", 0)
    each_time = load_data(args)
    assert isinstance(once.train_dataset, DeviceImages) and each_time.train_dataset.features["pixel_values"] == Image()
    assert once.test_dataset[3]["pixel_values"].equal(each_time.test_dataset[3]["pixel_values"])
    assert once.test_dataset[3]["labels"] == each_time.test_dataset[3]["labels"]
    for split in ("train", "test"):
        assert torch.equal(batch(once, 8, split)["pixel_values"], batch(each_time, 8, split)["pixel_values"])


def test_random_shift_draws_for_each_image():
    images = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(200, 3, 8, 8)
    torch.manual_seed(0)
    shifted = random_shift(images, 1, flip=True)
    padded = torch.nn.functional.pad(images[0, 0], [1] * 4)
    crops = {(y, x): padded[y : y + 8, x : x + 8] for y in range(3) for x in range(3)}
    possible = [crop.tolist() for crop in crops.values()] + [crop.flip(1).tolist() for crop in crops.values()]
    seen = [possible.index(each[0].tolist()) for each in shifted]
    assert set(seen) == set(range(18))
    assert (shifted[:, 0] == shifted[:, 1]).all()


def test_only_training_images_are_augmented(monkeypatch):
    for in_memory in (True, False):
        data = load_data(DataArguments("digits", augment="crop"))
        plain = load_data(DataArguments("digits"))
        assert not torch.equal(batch(data, 64)["pixel_values"], batch(plain, 64)["pixel_values"])
        assert torch.equal(batch(data, 64, "test")["pixel_values"], batch(plain, 64, "test")["pixel_values"])
        monkeypatch.setattr(hf_trim.data.arguments, "IN_MEMORY_BYTES", 0)
        assert isinstance(data.train_dataset, DeviceImages) == in_memory


def test_images_in_memory_are_augmented_by_seed_and_place():
    images = load_data(DataArguments("digits", augment="crop")).train_dataset

    def draw(seed, indices):
        torch.manual_seed(seed)
        torch.rand(seed)  # what else was drawn does not matter
        (found,) = images.__getitems__(indices)
        return found["pixel_values"]

    some, others = [3, 1, 4, 1], [1, 3, 4, 1]
    assert torch.equal(draw(5, some), draw(5, some)) and not torch.equal(draw(5, some), draw(6, some))
    assert not torch.equal(draw(5, some)[[1, 0, 2, 3]], draw(5, others))


def test_texts_are_padded_to_the_longest_of_the_batch(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1, "word": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]")
    rows = {"text": ["word " * length for length in (1, 2, 5, 9)] * 2, "label": ["a", "b"] * 4}
    DatasetDict(train=Dataset.from_dict(rows), test=Dataset.from_dict(rows)).save_to_disk(tmp_path)
    data = load_data(DataArguments(str(tmp_path), max_seq_length=6), tokenizer)
    assert batch(data, 2)["input_ids"].tolist() == [[2, 0], [2, 2]]
    assert batch(data, 4)["attention_mask"].sum(1).tolist() == [1, 2, 5, 6]


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"augment": "crop_flip"}, "augment must be .* Did you mean 'crop-flip'"),
        ({"image_channels": 4}, "image_channels must be 1 .* is 4"),
        ({"image_size": 0}, "image_size must be a whole number from 1, and is 0"),
        ({"max_train_samples": -1}, "max_train_samples must be a whole number"),
        ({"test_fraction": 20}, "test_fraction must lie between 0 and 1, and is 20"),
        ({"split_seed": -1}, "split_seed must be"),
        ({"image_mean": [0.5]}, "image_mean must be a list of 3 numbers"),
        ({"image_std": [0.0, 1.0, 1.0]}, "image_std must be above 0"),
        ({"dataset": ""}, "dataset must be"),
        ({"train_split": "trian"}, "train_split 'trian' is not in .* which has train. Did you mean 'train'"),
        ({"test_split": "validation"}, "test_split 'validation' is not in"),
        ({"test_split": "train"}, "test_split must differ from train_split"),
        ({"label_column": "lable"}, "label_column 'lable' is not a column .* has image, label. Did you mean 'label'"),
        ({"label_column": "image"}, "image"),
        ({"image_column": "image", "text_column": "label"}, "exclude each other"),
        ({"text_column": "image"}, "text_column 'image' must hold strings"),
        ({"test_fraction": 0.001}, "no room for 10 classes"),
        ({"dataset": "./nowhere"}, "looks like a local path"),
        ({"dataset": "digit"}, "could not be loaded from the Hub.* Did you mean 'digits'"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments(**{"dataset": "digits", **arguments}))


def table(values, **features):
    columns = {"text": [f"row {number}" for number in range(len(values))], "label": values}
    return Dataset.from_dict(columns, features=datasets.Features({"text": Value("string"), **features}))


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (table([], label=Value("int64")), None, "is empty: choose another"),
        (table([1] * 8, label=Value("int64")), None, "label_column 'label' has one class only"),
        (table([0.5, 1.5] * 4, label=Value("float64")), None, "one class per sample"),
        (table([0, None] * 4, label=Value("int64")), None, "is empty in 4 of 8 rows of the training split"),
        (table([0, 1, 1, 1, 1], label=Value("int64")), None, "the class '0' has one sample"),
        (table([0, 1], label=Value("int64")), table([0, 7], label=Value("int64")), "none of the 2 classes: 7"),
        (
            table([0, 1], label=ClassLabel(names=["a", "b"])),
            table([-1, -1], label=ClassLabel(names=["a", "b"])),
            "labels are held back",
        ),
        (
            table([0, 1], label=ClassLabel(names=["a", "b"])),
            table([0, 1], label=ClassLabel(names=["b", "a"])),
            "same classes",
        ),
        (table([0, 1] * 4, label=Value("int64")).remove_columns("label"), None, "label_column must be given"),
        (table([0, 1] * 4, label=Value("int64")).remove_columns("text"), None, "text_column .* must be given"),
        (
            table([0, 1], label=Value("int64")),
            table([0, 1], label=Value("int64")).remove_columns("text"),
            "test split lacks the column text",
        ),
    ],
)
def test_wrong_data(train, test, message, tmp_path, minilm_tokenizer):
    DatasetDict({"train": train} | ({"test": test} if test else {})).save_to_disk(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_data(DataArguments(str(tmp_path)), minilm_tokenizer)


def test_texts_need_a_tokenizer_and_images_none(minilm_tokenizer):
    with pytest.raises(ValueError, match="holds texts, and there is no tokenizer"):
        load_data(DataArguments("bbc-news"))
    with pytest.raises(ValueError, match="holds images, and the model is one for text"):
        load_data(DataArguments("digits"), minilm_tokenizer)


def test_a_missing_package_is_named_with_its_command():
    with pytest.raises(ValueError, match="run `pip install no-such`"):
        hf_trim.data.arguments.package_folder("no_such", "data", "no-such")
