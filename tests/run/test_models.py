"""Models: each recipe's on tiny data of the same schema, saved and loaded back, and what is refused."""

import datasets
import pytest
import torch
from datasets import DatasetDict
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    EvalPrediction,
    pipeline,
    set_seed,
)

from hf_trim.data import DataArguments, load_data
from hf_trim.run.metrics import compute_metrics
from hf_trim.run.models import ModelArguments, build_model, load_processing_class
from hf_trim.run.recipe import parse, recipe_names
from tests.support.data import tiny_digits


TINY_VIT = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
HUNDRED = [f"class {number}" for number in range(100)]
# Columns as on the Hub.
HUB_SETS = {
    "ufldl-stanford/svhn": {},
    "uoft-cs/cifar10": {"image": "img"},
    "uoft-cs/cifar100": {"image": "img", "label": "fine_label", "names": HUNDRED, "coarse_label": [0, 1] * 10},
}


def save_like_the_hub(dataset, folder):
    """Writes 20 digits for training and testing to disk, under the columns of a set on the Hub."""
    columns = HUB_SETS[dataset]
    DatasetDict(train=tiny_digits(20, **columns), test=tiny_digits(20, **columns)).save_to_disk(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Many small layers: threads that wait for a core which others use would take most of the time."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def digits():
    return load_data(DataArguments("digits", max_train_samples=50))


@pytest.fixture(scope="module")
def bbc():
    tokenizer = load_processing_class(ModelArguments(model_name_or_path="minilm"))
    return load_data(DataArguments("bbc-news", max_seq_length=16, max_train_samples=50), tokenizer)


def batch(data, size=4):
    return next(iter(DataLoader(data.train_dataset, batch_size=size, collate_fn=data.data_collator)))


def check_saved(model, data, folder):
    """One forward with a loss; saved and loaded back, all weights and buffers are the same bit for bit."""
    inputs = batch(data)
    loss = model(**inputs).loss
    assert loss.dim() == 0 and loss.isfinite()
    model.save_pretrained(folder)
    data.processing_class.save_pretrained(folder)
    auto = AutoModelForImageClassification if data.kind == "image" else AutoModelForSequenceClassification
    loaded = auto.from_pretrained(folder)
    assert list(loaded.config.id2label.values()) == data.label_names
    with torch.no_grad():
        first, second = model.eval()(**inputs).logits, loaded.eval()(**inputs).logits
    state, loaded_state = model.state_dict(), loaded.state_dict()
    assert state.keys() == loaded_state.keys()
    assert all(torch.equal(value, loaded_state[name]) for name, value in state.items())
    assert first.shape == (4, len(data.label_names))
    # Not bit for bit: with the same weights elsewhere in memory, a CPU kernel may add in another order.
    assert torch.allclose(first, second, rtol=1e-4, atol=1e-6)


# Of the paper's, which differ in their data, one with each model.
IMAGES = [recipe for recipe in recipe_names() if recipe.startswith(("cifar", "digits", "svhn"))]
LIKE_OTHERS = ("cifar10-densenet121", "cifar10-resnet34", "svhn-densenet121", "cifar100-resnet34")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.extended) if name in LIKE_OTHERS else name for name in IMAGES],
)
def test_recipes_of_images(name, tmp_path):
    job = parse(name, [])
    model_args, data_args = job.model, job.data
    assert (data_args.dataset in HUB_SETS) == (data_args.dataset != "digits")
    if data_args.dataset in HUB_SETS:
        save_like_the_hub(data_args.dataset, tmp_path / "data")
        data_args = parse(name, ["--dataset", str(tmp_path / "data")]).data
    data = load_data(data_args, load_processing_class(model_args))
    assert data.image_size == (8 if name == "digits-vit" else 32)
    assert len(data.label_names) == (100 if name.startswith("cifar100-") else 10)
    check_saved(build_model(model_args, data), data, tmp_path / "model")


def test_minilm(bbc, tmp_path):
    model = build_model(ModelArguments(model_name_or_path="minilm"), bbc)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    check_saved(model, bbc, tmp_path)
    answer = pipeline("text-classification", model=str(tmp_path))("The match ended in a draw.")
    assert answer[0]["label"] in bbc.label_names


@pytest.mark.parametrize("source", [{"timm_model": "resnet10t"}, {"model_type": "vit", "config_overrides": TINY_VIT}])
def test_pipelines_prepare_images_as_training_did(source, tmp_path):
    splits = DatasetDict(train=tiny_digits(20), test=tiny_digits(20))
    splits.save_to_disk(tmp_path / "data")
    data = load_data(DataArguments(str(tmp_path / "data"), image_size=16))
    model = build_model(ModelArguments(**source), data).eval()
    model.save_pretrained(tmp_path / "model")
    data.processing_class.save_pretrained(tmp_path / "model")
    answer = pipeline("image-classification", model=str(tmp_path / "model"))(splits["train"][0]["image"], top_k=10)
    with torch.no_grad():
        scores = model(pixel_values=batch(data)["pixel_values"]).logits[0].softmax(-1)
    assert {guess["label"]: guess["score"] for guess in answer} == pytest.approx(
        {name: float(score) for name, score in zip(data.label_names, scores, strict=True)}, rel=1e-4
    )


def test_pretrained_image_models_get_a_new_head_and_keep_their_settings(tmp_path):
    arguments = {"image_size": 16, "image_mean": [0.4, 0.5, 0.6]}
    data = load_data(DataArguments("digits", **arguments))
    model = build_model(ModelArguments(model_type="vit", config_overrides=TINY_VIT), data)
    model.save_pretrained(tmp_path / "model")
    data.processing_class.save_pretrained(tmp_path / "model")

    tiny_digits(20, names=["even", "odd"] + [str(number) for number in range(10)]).save_to_disk(tmp_path / "data")
    args = ModelArguments(model_name_or_path=str(tmp_path / "model"))
    other = load_data(DataArguments(str(tmp_path / "data"), test_fraction=0.5), load_processing_class(args))
    assert (other.image_size, list(other.processing_class.image_mean)) == (16, [0.4, 0.5, 0.6])
    tuned = build_model(args, other)
    assert tuned.classifier.weight.shape == (12, 16)
    weights = zip(model.vit.parameters(), tuned.vit.parameters(), strict=True)
    assert all(torch.equal(first, second) for first, second in weights)


def test_weights_from_scratch_follow_the_seed(digits):
    def weights(seed):
        set_seed(seed)
        model = build_model(ModelArguments(timm_model="resnet10t"), digits)
        return torch.cat([parameter.flatten() for parameter in model.parameters()])

    assert torch.equal(weights(0), weights(0)) and not torch.equal(weights(0), weights(1))


def test_shapes_of_the_data_reach_the_model(digits, bbc):
    vit = build_model(ModelArguments(timm_model="vit_tiny_patch16_224", config_overrides={"patch_size": 4}), digits)
    assert vit.timm_model.patch_embed.img_size == (8, 8)
    grey = load_data(DataArguments("digits", image_channels=1))
    assert build_model(ModelArguments(timm_model="resnet10t"), grey).config.model_args == {"in_chans": 1}
    bert = build_model(ModelArguments(model_type="bert", config_overrides=TINY_VIT), bbc)
    assert bert.config.vocab_size == len(bbc.processing_class) and bert.config.num_labels == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "No model is given: give exactly one of"),
        ({"model_type": "vit", "timm_model": "resnet34"}, "model_type 'vit' and timm_model 'resnet34' exclude"),
        ({"model_type": "vitt"}, "model_type 'vitt' .* Did you mean 'vit'"),
        ({"model_type": "gpt2"}, "not one for which transformers has a image classifier"),
        ({"timm_model": "resnet43"}, "timm_model 'resnet43' is not a model of timm .* Did you mean 'resnet"),
        ({"timm_model": "resnet10t", "config_overrides": {"widht": 3}}, "cannot be built with .*widht"),
        ({"model_type": "vit", "config_overrides": {"hiden_size": 3}}, "named 'hiden_size'. .* 'hidden_size'"),
        ({"model_type": "vit", "config_overrides": {"hidden_size": "big"}}, "'hidden_size' cannot be 'big'"),
        ({"model_type": "vit", "config_overrides": "{hidden_size: 3}"}, "config_overrides must be JSON"),
        ({"model_type": "vit", "config_overrides": "[3]"}, "config_overrides must map names to values"),
        ({"model_type": "vit", "config_overrides": {"image_size": 224}}, "takes image_size 224, and the data have 8"),
        ({"model_name_or_path": "./nowhere"}, "model_name_or_path './nowhere' looks like a local path"),
        ({"model_name_or_path": "minilmm"}, "could not be loaded.* Did you mean 'minilm'"),
        ({"model_name_or_path": "minilm"}, "no image classifier, and that is what task and dataset ask for"),
    ],
)
def test_wrong_arguments_for_images(arguments, message, digits):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        build_model(ModelArguments(**arguments), digits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"timm_model": "resnet34"}, "takes images, and dataset holds texts"),
        ({"model_type": "vit"}, "no"),
        ({"model_type": "bert", "config_overrides": {"max_position_embeddings": 8}}, "takes 8 tokens.* set it to 8"),
    ],
)
def test_wrong_arguments_for_texts(arguments, message, bbc):
    with pytest.raises(ValueError, match=message):
        build_model(ModelArguments(**arguments), bbc)


def test_weights_in_pickles_are_refused(digits, tmp_path):
    build_model(ModelArguments(model_type="vit", config_overrides=TINY_VIT), digits).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="weights of model_name_or_path"):
        build_model(ModelArguments(model_name_or_path=str(tmp_path)), digits)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    build_model(ModelArguments(model_name_or_path=str(tmp_path)), digits)


def test_a_missing_tokenizer_is_named():
    with pytest.raises(ValueError, match="tokenizer of './nowhere' could not be loaded"):
        load_processing_class(ModelArguments(model_name_or_path="minilm", tokenizer_name="./nowhere"))


def test_metrics():
    logits = torch.eye(4).numpy()
    assert compute_metrics(EvalPrediction(logits, torch.tensor([0, 1, 2, 0]).numpy())) == {
        "accuracy": 0.75, "error": 25.0, "macro_f1": pytest.approx(8 / 9),
    }  # fmt: skip
    assert compute_metrics(EvalPrediction((logits, logits), torch.arange(4).numpy()))["error"] == 0
