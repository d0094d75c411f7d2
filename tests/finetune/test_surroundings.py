"""What a caller has set for computations of his own changes nothing in a run."""

import contextlib

import pytest
import torch
from finetuning import quick

from fastops.finetune import finetune, load_classifier
from fastops.finetune.fashion_mnist import read_sheet


@contextlib.contextmanager
def default_dtype(dtype):
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "around",
    [
        lambda: default_dtype(torch.float64),
        lambda: default_dtype(torch.bfloat16),
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["float64", "bfloat16", "no_grad", "inference_mode", "autocast", "device"],
)
def test_a_run_is_the_same_in_any_surroundings(tmp_path, small_test, around):
    options = {"modes": ("features", "full"), "ema": 0.9}
    plain = finetune(quick(tmp_path, **options))
    picture = read_sheet("test").images[:3]
    with around():
        other = finetune(quick(tmp_path / "run", **options))
        classifier = load_classifier(other.folder)
        answers = classifier.probabilities(picture)
        state = (
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        )
    with around():
        assert state == (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        )  # fmt: skip
    assert [run.losses for run in plain.runs] == [run.losses for run in other.runs]
    assert [run.accuracy for run in plain.runs] == [run.accuracy for run in other.runs]
    assert torch.equal(load_classifier(plain.folder).probabilities(picture), answers)
