"""A cache for each test, and the tokenizer that several tests need."""

import datasets
import pytest

from hf_trim.run.models import ModelArguments, load_processing_class


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture(scope="session")
def minilm_tokenizer():
    return load_processing_class(ModelArguments(model_name_or_path="minilm"))
