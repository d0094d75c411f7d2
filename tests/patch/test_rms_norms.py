"""RMS norms of other packages: what is recognized, what it then computes, and what is left alone."""

import copy

import pytest
import torch
from cases import randn
from torch import nn

import fastops
from fastops.patching.modules import attached


class LlamaRMSNorm(nn.Module):
    """As in Hugging Face's models of Llama, Mistral and Qwen."""

    def __init__(self, hidden_size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states):
        input_dtype = hidden_states.dtype
        hidden_states = hidden_states.to(torch.float32)
        variance = hidden_states.pow(2).mean(-1, keepdim=True)
        hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden_states.to(input_dtype)


class GemmaRMSNorm(nn.Module):
    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.zeros(dim))

    def _norm(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    def forward(self, x):
        output = self._norm(x.float())
        output = output * (1.0 + self.weight.float())
        return output.type_as(x)


class HalfRMSNorm(LlamaRMSNorm):
    """Of half the features only."""

    def forward(self, hidden_states):
        variance = hidden_states[..., : hidden_states.shape[-1] // 2].pow(2).mean(-1, keepdim=True)
        return self.weight * hidden_states * torch.rsqrt(variance + self.variance_epsilon)


class L1RMSNorm(LlamaRMSNorm):
    def forward(self, hidden_states):
        return self.weight * hidden_states / hidden_states.abs().mean(-1, keepdim=True)


class StopGradientRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon).detach()
        return x * r * self.weight


class FrozenRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        r = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * r * self.weight.detach()


class DropoutRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class FlagRMSNorm(LlamaRMSNorm):
    flag = False

    def forward(self, x):
        y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
        return y * 2 if self.flag else y


class ClampRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        x = x.clamp(-1000, 1000)
        return (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
        )


class ImageRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        if x.dim() == 4:
            return x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + self.variance_epsilon)
        return (
            x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon) * self.weight
        )


class ScaledRMSNorm(LlamaRMSNorm):
    def __init__(self, hidden_size):
        super().__init__(hidden_size)
        self.scale = 1.0

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * self.weight * self.scale


KNOWN = [LlamaRMSNorm, GemmaRMSNorm]


def made(cls, dtype=torch.float32):
    norm = cls(24)
    with torch.no_grad():
        norm.weight.copy_(randn(24, seed=3))
    return norm.to(dtype)


@pytest.mark.parametrize("cls", KNOWN)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(cls, dtype):
    theirs = made(cls, dtype)
    ours, exact = copy.deepcopy(theirs), copy.deepcopy(theirs).double()
    report = fastops.patch(ours)
    assert report.replaced == [("", f"{__name__}.{cls.__name__}", "fastops.functional.rms_norm")]
    x = randn(6, 5, 24).to(dtype)
    found = []
    for norm, given in ((ours, x), (theirs, x), (exact, x.double())):
        leaf = given.clone().requires_grad_()
        if norm is exact:  # the class itself computes in float32
            w = norm.weight if cls is LlamaRMSNorm else 1 + norm.weight
            y = leaf / (leaf.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w
        else:
            y = norm(leaf)
        dy = randn(6, 5, 24, seed=1).to(y.dtype)
        found.append([y, *torch.autograd.grad(y, (leaf, norm.weight), dy)])
    for mine, torchs, true in zip(*found, strict=True):
        fastops.selfcheck.compare("of the norm", mine.detach(), torchs.detach(), true.detach())


@pytest.mark.parametrize("cls", KNOWN)
def test_what_stays_as_it_was(cls):
    norm = made(cls)
    before = copy.deepcopy(norm)
    fastops.patch(norm)
    assert type(norm) is cls and norm.state_dict().keys() == before.state_dict().keys()
    integers = torch.arange(24).reshape(1, 24)
    assert torch.equal(norm(integers), before(integers))
    wide = randn(3, 24).double()
    assert norm(wide).dtype == before(wide).dtype
    narrow = randn(3, 24).bfloat16()  # beside a weight of float32
    assert norm(narrow).dtype == before(narrow).dtype
    torch.testing.assert_close(norm(narrow), before(narrow))
    fastops.unpatch(norm)
    assert attached(norm) is None and torch.equal(norm(wide), before(wide))


class TwiceRMSNorm(LlamaRMSNorm):
    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return x * self.weight * 2.0


OTHERS = [
    StopGradientRMSNorm, FrozenRMSNorm, DropoutRMSNorm, FlagRMSNorm, ClampRMSNorm, ImageRMSNorm, ScaledRMSNorm, HalfRMSNorm,
    L1RMSNorm, TwiceRMSNorm,
]  # fmt: skip


@pytest.mark.parametrize("cls", OTHERS)
@pytest.mark.parametrize("training", [True, False])
def test_another_formula_is_left_and_named(cls, training):
    """Also where it is the same for most inputs, in the other mode, or until an attribute changes."""
    norm = made(cls).train(training)
    report = fastops.patch(norm)
    assert not report.replaced and attached(norm) is None
    (left,) = report.left
    assert left[:2] == ("", cls.__name__) and "RMS norm over the last dimension" in left[2] or "fastops.functional.rms_norm" in left[2]  # fmt: skip


def test_epsilon_that_is_changed_later_counts():
    norm = made(LlamaRMSNorm)
    theirs = copy.deepcopy(norm)
    fastops.patch(norm)
    norm.variance_epsilon = theirs.variance_epsilon = 3.0
    x = randn(4, 24).float()
    torch.testing.assert_close(norm(x), theirs(x))
