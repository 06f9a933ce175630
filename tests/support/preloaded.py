"""Imports what a run needs, for the processes of `tests.support.forked`."""

import contextlib
import gc
import importlib


# `hf_trim` first, since it repairs torchvision. Not `hf_trim.run.__main__`, which each process runs anew.
MODULES = (
    "hf_trim", "hf_trim.run.compare", "tests.support.forked", "deepspeed", "matplotlib.backends.backend_agg",
    "sklearn.datasets", "transformers.models.vit.modeling_vit",
)  # fmt: skip
for name in MODULES:
    with contextlib.suppress(ImportError):
        importlib.import_module(name)
importlib.import_module("PIL.Image").init()
# Imports the configurations of all its models, as a recipe with a model type does.
list(importlib.import_module("transformers").MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING)
gc.freeze()  # as in conftest.py
