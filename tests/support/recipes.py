"""Tiny recipes that the tests of the command line share."""

TINY = {
    "model": {
        "model_type": "vit",
        "config_overrides": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "patch_size": 4,
        },
    },
    "data": {"dataset": "digits", "image_channels": 1, "max_train_samples": 64, "max_test_samples": 60},
    "training": {
        "num_train_epochs": 3, "per_device_train_batch_size": 16, "learning_rate": 0.01, "eval_strategy": "epoch",
        "save_strategy": "epoch", "logging_strategy": "epoch", "save_total_limit": 2, "use_cpu": True,
        "dataloader_num_workers": 0,
    },
}  # fmt: skip
# In colour, which the pipelines of transformers expect.
IMAGE = {**TINY, "data": {**TINY["data"], "image_channels": 3}}
TEXT = {
    "model": {
        "model_type": "bert", "tokenizer_name": "minilm",
        "config_overrides": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
                             "intermediate_size": 32},
    },
    "data": {"dataset": "bbc-news", "max_seq_length": 16, "max_train_samples": 64, "max_test_samples": 20},
    "training": {**TINY["training"], "num_train_epochs": 2},
}  # fmt: skip
TIMM = {
    "model": {"timm_model": "test_resnet"},
    "data": {**IMAGE["data"], "image_size": 32},
    "training": {**TINY["training"], "num_train_epochs": 1},
}
