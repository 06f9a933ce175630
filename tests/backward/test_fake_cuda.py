"""What the row-sparse backward pass would do on a GPU, seen on fake CUDA tensors."""

import subprocess

import pytest

from tests.support.fake_cuda import BATCH, KEPT, build_library, run_cases
from tests.support.models import DECODERS, ENCODERS, IMAGE_MODELS


CASES = (
    "bert-flash-dropout",
    "bert-efficient-dropout-mask-checkpointing",
    "bert-cudnn-mask-autocast",
    "bert-efficient-mask-devices",
    "llama-efficient-mask-checkpointing",
    "vit-cudnn",
    "bert-efficient-dropout-mask-compiled",
)
WIDE_MASK = {**ENCODERS, **DECODERS}.keys() - {"opt"}  # models that take a mask of [B, 1, T, T]
MORE_CASES = [
    case
    for name in [*ENCODERS, *DECODERS, *IMAGE_MODELS, "timm_vit", "deit3"]
    for case in (
        f"{name}-flash-dropout",
        f"{name}-efficient-mask" if name in WIDE_MASK else f"{name}-efficient",
        f"{name}-cudnn-autocast",
    )
] + [
    "bert-flash-dropout-checkpointing-single",
    "bert-flash-dropout-single-compiled",
    "bert-cudnn-dropout-mask-autocast-compiled",
    "vit-flash-compiled",
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    try:
        return build_library(tmp_path_factory.mktemp("fake_cuda"))
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"the library cannot be built: {getattr(error, 'stderr', error)}")


def check(results):
    assert not {case: result["error"] for case, result in results.items() if "error" in result}
    for case, result in results.items():
        assert (result["fallbacks"], result["waits"], result["refused"]) == ({}, {}, []), case
        # With dropout inside, kernels run on the whole batch; else on the kept rows.
        count = BATCH if "dropout" in case else KEPT
        assert result["attention"] and set(result["attention"]) == {count}, case
        checkpoints = 2 if "checkpointing" in case else 0
        # A guess at the memory of one row might have other dropout masks: then everything is recomputed.
        single = "single" in case and checkpoints > 0
        assert result["recomputed"] == {"kept": 0 if single else checkpoints, "all": int(single)}, case


def test_backward_pass(library):
    check(run_cases(library, CASES))


@pytest.mark.extended
def test_more_models(library):
    check(run_cases(library, MORE_CASES))
