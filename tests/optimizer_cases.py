"""The optimizers' options to test, and parameters and gradients to step on. All are made in float64 from fixed seeds."""

import pytest
import torch
from torch import nn

import fastops.optim

NAMES = ["Adam", "AdamW", "SGD", "RMSprop"]
PAIRS = [(getattr(torch.optim, name), getattr(fastops.optim, name)) for name in NAMES]
ADAM_OPTIONS = [
    {},
    {"lr": 0.03, "betas": (0.8, 0.95), "eps": 1e-6},
    {"betas": (0.0, 0.3)},
    {"weight_decay": 0.1},
    {"amsgrad": True, "weight_decay": 0.01},
    {"maximize": True},
    {"amsgrad": True, "maximize": True, "eps": 1e-3},
]
SGD_OPTIONS = [
    {},
    {"lr": 0.1, "weight_decay": 0.1, "maximize": True},
    {"lr": 0.03, "momentum": 0.9},
    {"lr": 0.03, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01},
    {"lr": 0.03, "momentum": 0.8, "dampening": 0.5, "maximize": True},
]
RMSPROP_OPTIONS = [
    {},
    {"lr": 0.03, "alpha": 0.9, "eps": 1e-6, "weight_decay": 0.1},
    {"momentum": 0.9, "maximize": True},
    {"centered": True, "eps": 1e-3},
    {"centered": True, "momentum": 0.9, "eps": 1e-3, "weight_decay": 0.01},
]
OPTIONS = {
    "Adam": ADAM_OPTIONS,
    "AdamW": ADAM_OPTIONS,
    "SGD": SGD_OPTIONS,
    "RMSprop": RMSPROP_OPTIONS,
}
EVERY = [
    pytest.param(pair, options, id=f"{name}-{options}")
    for name, pair in zip(NAMES, PAIRS, strict=True)
    for options in OPTIONS[name]
]
CONFIGURATIONS = {
    "Adam": {},
    "AdamW": {"weight_decay": 0.1},
    "SGD": {"lr": 0.05},
    "SGD momentum": {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    "RMSprop": {},
    "RMSprop centered": {"centered": True, "momentum": 0.5, "eps": 1e-3},
    "Adagrad": {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.1},
    "Adadelta": {"lr": 0.5},
    "Adamax": {"weight_decay": 0.1},
    "NAdam": {},
    "NAdam decoupled": {"weight_decay": 0.1, "decoupled_weight_decay": True},
    "RAdam": {"betas": (0.9, 0.9)},
    "Rprop": {"lr": 0.02},
    "ASGD": {"lr": 0.05, "t0": 2, "weight_decay": 0.1},
}


def rand(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameters(*shapes, dtype=torch.float64):
    shapes = shapes or ((), (1,), (5,), (3, 4), (0, 3), (37, 29))
    return [nn.Parameter(rand(*s, dtype=dtype, seed=i)) for i, s in enumerate(shapes)]


def gradient(p, step, k=0):
    return (
        torch.cos(p.detach().double() * (1 + k)) + 0.3 * rand(*p.shape, seed=1000 * step + k)
    ).to(p.dtype)


def few_parameters():
    return parameters((5,), (3, 4), (37, 29))


def set_gradients(params, step):
    for k, p in enumerate(params):
        p.grad = torch.cos(p.detach()) + rand(*p.shape, seed=100 * step + k)
