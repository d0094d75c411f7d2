"""The fixtures of every test of fine-tuning."""

from finetuning import one_thread, small_test  # noqa: F401
