"""Optimizers: torch.optim's classes with a step of their own. Names only."""

from .adam import Adam, AdamW

__all__ = ["Adam", "AdamW"]
