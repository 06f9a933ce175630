"""No test touches the network: models are built from configs, data ships in packages or is written by the test."""

import os


os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TRANSFORMERS_OFFLINE"] = "1"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# After the variables, and before any test imports transformers: it repairs torchvision where torch has no CUDA.
import hf_trim  # noqa: E402, F401
