"""In place on a view: `linear` of three dimensions returns one, so that a ReLU(inplace=True) after it is one of these."""

import torch
from torch import nn

import fastops


def test_relu_in_place_after_a_linear_layer():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(3, 5), nn.ReLU(inplace=True), nn.Linear(5, 2))
    x = torch.randn(2, 7, 3)
    plain(x).sum().backward()
    expected = [p.grad.clone() for p in plain.parameters()]
    plain.zero_grad()
    fastops.patch(plain)
    plain(x).sum().backward()
    for p, e in zip(plain.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)
