"""The functions that are made of others: against torch, and what they promise beyond it."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastops.functional as ours
import fastops.nn

pytestmark = pytest.mark.quick


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


FEATURES = [
    ("dropout1d", "Dropout1d", (64, 50, 7)),
    ("dropout1d", "Dropout1d", (50, 7)),
    ("dropout2d", "Dropout2d", (64, 50, 3, 5)),
    ("dropout2d", "Dropout2d", (64, 50, 5)),
    ("dropout3d", "Dropout3d", (64, 50, 2, 3, 2)),
    ("dropout3d", "Dropout3d", (50, 2, 3, 2)),
]


@pytest.mark.parametrize(("name", "module", "shape"), FEATURES, ids=str)
def test_whole_channels_are_dropped(name, module, shape):
    function, spatial = getattr(ours, name), len(shape) - 2
    if name != "dropout2d" and len(shape) == {"dropout1d": 2, "dropout3d": 4}[name]:
        spatial = len(shape) - 1
    torch.manual_seed(3)
    y = function(torch.ones(shape, requires_grad=True), 0.3)
    channels = y.detach().flatten(len(shape) - spatial)
    assert (channels == channels[..., :1]).all()
    assert set(channels.unique().tolist()) == {0.0, torch.tensor(1 / 0.7).item()}
    torch.manual_seed(3)
    assert torch.equal(getattr(fastops.nn, module)(0.3)(torch.ones(shape)), y.detach())
    x = torch.ones(shape)
    torch.manual_seed(3)
    assert function(x, 0.3, inplace=True).data_ptr() == x.data_ptr()
    assert torch.equal(x, y.detach())
    assert function(x, 0.3, training=False) is x
    assert not function(torch.ones(shape), 1.0).any()
    leaf = torch.ones(shape, requires_grad=True)
    torch.manual_seed(3)
    function(leaf, 0.3).sum().backward()
    assert torch.equal(leaf.grad, y.detach())


def test_rate_of_dropped_channels():
    torch.manual_seed(0)
    dropped = (ours.dropout2d(torch.ones(200, 200, 2, 2), 0.3)[:, :, 0, 0] == 0).double().mean()
    assert abs(dropped - 0.3) < 5 * (0.3 * 0.7 / 40000) ** 0.5


@pytest.mark.parametrize("name", ["dropout1d", "dropout2d", "dropout3d", "alpha_dropout"])
def test_bad_arguments_of_dropouts(name):
    function = getattr(ours, name)
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match="between 0 and 1, but got"):
            function(torch.ones(4, 4, 4, *[2] * (name == "dropout3d")), p, True)
    if name != "alpha_dropout":
        short = torch.ones([2] * {"dropout1d": 1, "dropout2d": 1, "dropout3d": 0}[name])
        with pytest.raises(RuntimeError, match="1D input|at least 2 dimensions in the input, got"):
            function(short, 0.5)


@pytest.mark.parametrize(
    ("name", "shape"), [("dropout2d", (200, 30)), ("dropout3d", (200, 30)), ("dropout3d", (20, 5, 4))],
    ids=str,
)  # fmt: skip
def test_dimensions_that_torch_warns_of(name, shape):
    """A model that trains with torch's does not stop with ours: the same entries go together, with the same warning."""
    torch.manual_seed(0)
    x = torch.ones(shape)
    with pytest.warns(UserWarning, match="deprecated and will result in an error"):
        ours_ = getattr(ours, name)(x, 0.5)
    with pytest.warns(UserWarning, match="deprecated and will result in an error"):
        theirs = getattr(torch.nn.functional, name)(x, 0.5)
    together = [y.flatten(1) if name == "dropout3d" else y for y in (ours_, theirs)]
    for y in together:
        assert set(y.unique().tolist()) == {0.0, 2.0}
        uniform = (y == y[:, :1]).all(1).double().mean().item()
        assert uniform == (1.0 if name == "dropout3d" else 0.0)


def test_alpha_dropout_keeps_mean_and_variance():
    torch.manual_seed(0)
    x = randn(1000, 1000)
    y = ours.alpha_dropout(x, 0.2, training=True)
    assert abs(y.mean()) < 0.01 and abs(y.var() - 1) < 0.01
    zeros = [
        f(torch.zeros(1000), 0.2, training=True).unique()
        for f in (ours.alpha_dropout, F.alpha_dropout)
    ]
    torch.testing.assert_close(*zeros)  # the two values of what was dropped and what was kept
    assert ours.alpha_dropout(x, 0.2) is x
    z = x.clone()
    torch.manual_seed(7)
    ours.alpha_dropout(z, 0.2, True, inplace=True)
    torch.manual_seed(7)
    torch.testing.assert_close(z, ours.alpha_dropout(x, 0.2, True))
    torch.manual_seed(7)
    assert torch.equal(nn.Sequential(fastops.nn.AlphaDropout(0.2))(x), z)


def test_nll_loss():
    x, t = randn(6, 5).log_softmax(1), torch.tensor([0, 4, 2, 1, 3, 3])
    torch.testing.assert_close(ours.nll_loss(x, t), F.nll_loss(x, t))
    weight = randn(5, seed=1).abs()
    module = fastops.nn.NLLLoss(weight, ignore_index=3, reduction="sum")
    torch.testing.assert_close(
        module(x, t), F.nll_loss(x, t, weight, ignore_index=3, reduction="sum")
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_mixup_is_cross_entropy_of_the_mixed_one_hot(reduction, smoothing):
    x = randn(6, 5).double().requires_grad_()
    a, b = torch.tensor([0, 4, 2, 1, 3, 3]), torch.tensor([3, 3, 0, 1, 2, 4])
    q = 0.7 * F.one_hot(a, 5) + 0.3 * F.one_hot(b, 5).double()
    options = {"reduction": reduction, "label_smoothing": smoothing}
    loss, expected = (
        ours.mixup_cross_entropy(x, a, b, 0.7, **options),
        F.cross_entropy(x, q, **options),
    )
    torch.testing.assert_close(loss, expected)
    (g,), (h,) = (torch.autograd.grad(v.sum(), x) for v in (loss, expected))
    torch.testing.assert_close(g, h)


def test_mixup_with_a_lam_for_each_example():
    x, a, b = randn(3, 5), torch.tensor([0, 4, 2]), torch.tensor([1, 1, 1])
    lam = torch.tensor([0.0, 0.5, 1.0])
    loss = ours.mixup_cross_entropy(x, a, b, lam, reduction="none")
    each = [F.cross_entropy(x, t, reduction="none") for t in (a, b)]
    torch.testing.assert_close(loss, lam * each[0] + (1 - lam) * each[1])
    with pytest.raises(ValueError, match='needs reduction="none"'):
        ours.mixup_cross_entropy(x, a, b, lam)
    for bad in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="lam has to be between 0 and 1"):
            ours.mixup_cross_entropy(x, a, b, bad)


LOSSES = ["l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss"]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.filterwarnings("ignore:Using a target size")
def test_losses_broadcast_and_take_weights(name, reduction):
    mine, theirs = getattr(ours, name), getattr(F, name)
    x, t, w = randn(4, 3), randn(3, seed=1), randn(4, 3, seed=2).abs()
    torch.testing.assert_close(mine(x, t, reduction=reduction), theirs(x, t, reduction=reduction))
    if name != "smooth_l1_loss":
        t = t.expand(4, 3)
        torch.testing.assert_close(
            mine(x, t, reduction=reduction, weight=w), theirs(x, t, reduction=reduction, weight=w)
        )
        with pytest.raises(ValueError, match="Weights and input must have the same size"):
            mine(x, t, weight=w[0])
    integers = torch.arange(4), torch.tensor([3, 1, 4, 1])
    try:
        expected = theirs(*integers, reduction="sum")
    except RuntimeError as error:
        with pytest.raises(type(error)):
            mine(*integers, reduction="sum")
    else:
        assert torch.equal(mine(*integers, reduction="sum"), expected)


def test_losses_warn_of_broadcasting():
    for name in LOSSES:
        with pytest.warns(UserWarning, match="Using a target size"):
            getattr(ours, name)(torch.ones(3, 2), torch.ones(2))


@pytest.mark.parametrize("name", ["binary_cross_entropy", "binary_cross_entropy_with_logits"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_binary_losses_take_weights(name, reduction):
    mine, theirs = getattr(ours, name), getattr(F, name)
    x, t = randn(4, 3).sigmoid(), randn(4, 3, seed=1).sigmoid()
    options = [{"weight": randn(3, seed=2).abs()}, {"weight": randn(4, 3, seed=2).abs()}]
    if "logits" in name:
        options += [{"pos_weight": randn(3, seed=3).abs()}]
        options += [{**options[0], **options[2]}]
    for kwargs in options:
        torch.testing.assert_close(
            mine(x, t, reduction=reduction, **kwargs), theirs(x, t, reduction=reduction, **kwargs)
        )
    with pytest.raises(ValueError):
        mine(x, t[0])


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("bad", [-0.1, 1.5, float("nan"), float("inf")])
def test_binary_cross_entropy_of_what_is_no_probability(bad, reduction):
    x = torch.full((40,), 0.5)
    x[17] = bad
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
        ours.binary_cross_entropy(x, torch.ones(40), reduction=reduction)
    with pytest.raises(RuntimeError, match="all elements of input should be between 0 and 1"):
        F.binary_cross_entropy(x, torch.ones(40), reduction=reduction)
    for function in (
        ours.binary_cross_entropy,
        F.binary_cross_entropy,
        torch.nn.BCELoss(reduction=reduction),
    ):
        if isinstance(function, torch.nn.Module):
            fastops.patch(function)
        else:
            function = functools.partial(function, reduction=reduction)
        with pytest.raises(RuntimeError, match="all elements of target should be between 0 and 1"):
            function(torch.full((40,), 0.5), x)


@pytest.mark.parametrize("bounds", [(torch.nan, 1.0), (-1.0, torch.nan), (torch.nan, torch.nan)])
def test_hardtanh_within_nan(bounds):
    x = torch.linspace(-2, 2, 40)
    torch.testing.assert_close(ours.hardtanh(x, *bounds), F.hardtanh(x, *bounds), equal_nan=True)


def test_binary_cross_entropy_under_autocast_is_torchs():
    x, t = torch.full((4,), 0.3), torch.ones(4)
    with torch.autocast("cpu", torch.bfloat16):
        loss, expected = (f(x, t) for f in (ours.binary_cross_entropy, F.binary_cross_entropy))
    assert loss.dtype == expected.dtype
    assert torch.equal(loss, expected)


@pytest.mark.parametrize("bad", [0, -1.0])
def test_bad_beta_and_delta(bad):
    x = torch.ones(2)
    with pytest.raises(RuntimeError, match="non-positive values for delta"):
        ours.huber_loss(x, x, delta=bad)
    if bad < 0:
        with pytest.raises(RuntimeError, match="negative values for beta"):
            ours.smooth_l1_loss(x, x, beta=bad)
