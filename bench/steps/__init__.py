"""Whole training steps of known models: `python -m bench steps`."""
