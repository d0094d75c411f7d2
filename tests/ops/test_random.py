"""Dropout: the mask is a function of the seed and the element's row-major index alone; what it keeps is scaled; its
statistics; and every source of seeds that torch has."""

import itertools

import pytest
import torch
from cases import DTYPES, LAYOUTS

import fastops
from fastops._core.registry import overload

pytestmark = pytest.mark.quick

F = fastops.functional
dropout = overload("dropout")
SEED = torch.tensor(0x1234_5678_9ABC_DEF)


def philox(counter: int, seed: int) -> list[int]:
    """Philox 4x32-10 in plain integers (Salmon et al., 2011)."""
    c = [counter & 0xFFFFFFFF, counter >> 32, 0, 0]
    k = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def test_philox_known_answers():
    # Random123's kat_vectors: philox4x32 10, all zero and all one counters and keys
    assert philox(0, 0) == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


def kept(n: int, p: float, seed: int) -> torch.Tensor:
    threshold = min(round(p * 2**32), 2**32 - 1)
    words = itertools.chain.from_iterable(philox(i, seed) for i in range((n + 3) // 4))
    return torch.tensor([w >= threshold for w in words][:n])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 3, 63, 64, 65, 1000])
def test_mask_is_philox_of_the_element(dtype, n):
    x = torch.ones(n, dtype=dtype)
    y = dropout(x, 0.3, SEED)
    mask = kept(n, 0.3, SEED.item())
    assert torch.equal(y != 0, mask)
    torch.testing.assert_close(y[mask], torch.full_like(y[mask], 1 / 0.7))


def test_element_beyond_32_bits_of_counter():
    """Elements beyond 2^34, by arithmetic: the counter's high word counts. A tensor that large is never read."""
    assert philox(2**32, 5) != philox(0, 5)


@pytest.mark.parametrize("layout", [k for k in LAYOUTS if k != "empty"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mask_does_not_depend_on_layout(layout, dtype):
    x = LAYOUTS[layout]().to(dtype)
    y = dropout(x, 0.4, SEED)
    assert torch.equal(y, dropout(x.contiguous(), 0.4, SEED))
    assert y.stride() == torch.empty_like(x).stride()


def test_large_permuted_tensor():
    x = torch.randn(3, 64, 57, 41)
    y = dropout(x.to(memory_format=torch.channels_last), 0.5, SEED)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, dropout(x, 0.5, SEED))


@pytest.mark.parametrize("dims", [8, 9, 12])
@pytest.mark.parametrize("name", ["dropout", "relu_dropout"])
def test_any_number_of_permuted_dimensions(name, dims):
    """However they are permuted: of neighbors that stay together many may be, of others none need be left."""
    x = torch.randn([2] * dims)
    orders = [list(range(dims))[::-1], [*range(1, dims, 2), *range(0, dims, 2)]]
    call, single = overload(name), overload(f"{name}_")
    for order in orders:
        permuted = x.permute(order)
        y = call(permuted, 0.4, SEED)
        assert torch.equal(y, call(permuted.contiguous(), 0.4, SEED))
        assert y.stride() == torch.empty_like(permuted).stride()
        inplace = x.clone().permute(order)
        single(inplace, 0.4, SEED)
        assert torch.equal(inplace, y) and inplace.stride() == permuted.stride()
        leaf = permuted.clone().requires_grad_()
        getattr(F, name)(leaf, 0.4).sum().backward()
        assert leaf.grad.stride() == leaf.stride()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_mask_does_not_depend_on_threads(threads):
    x = torch.randn(300_001)
    expected = dropout(x, 0.5, SEED)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(dropout(x, 0.5, SEED), expected)
    finally:
        torch.set_num_threads(before)


def test_backward_makes_the_mask_again():
    x = torch.randn(1000, requires_grad=True)
    y = F.dropout(x, 0.25)
    y.backward(torch.ones_like(y))
    assert torch.equal(x.grad != 0, y != 0)
    torch.testing.assert_close(y, x * x.grad)


def test_nothing_but_the_seed_is_saved():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        F.dropout(torch.randn(10_000, requires_grad=True), 0.5)
    assert sum(t.nbytes for t in saved) <= 8


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_statistics(p):
    torch.manual_seed(11)
    n = 1 << 20
    m = (F.dropout(torch.ones(n), p) != 0).double()
    sigma = (p * (1 - p) / n) ** 0.5
    assert abs(m.mean().item() - (1 - p)) < 5 * sigma
    centred = m - (1 - p)
    for lag in (1, 2, 4, 16, 64, 1024):
        correlation = (centred[lag:] * centred[:-lag]).mean().item() / (p * (1 - p))
        assert abs(correlation) < 5 / n**0.5, lag
    chunks = m.reshape(-1, 4096).mean(1)
    assert (chunks - (1 - p)).abs().max() < 6 * (p * (1 - p) / 4096) ** 0.5


def test_edges():
    x = torch.randn(5, requires_grad=True)
    assert F.dropout(x, 0.0) is x
    assert F.dropout(x, 0.7, training=False) is x
    y = F.dropout(x, 1.0)
    assert torch.equal(y, torch.zeros(5))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.zeros(5))
    assert F.dropout(torch.empty(0, 3)).shape == (0, 3)
    assert fastops.nn.Dropout(0.5).eval()(x) is x
    tiny = dropout(torch.ones(1000), 1e-12, SEED)
    assert (tiny != 0).all()


def test_inplace():
    x = torch.randn(100)
    expected = dropout(x, 0.5, SEED)
    y = x.clone()
    overload("dropout_")(y, 0.5, SEED)
    assert torch.equal(y, expected)
    z = torch.randn(8, requires_grad=True)
    w = z * 2
    v = F.dropout(w, 0.5, inplace=True)
    assert v is w
    (g,) = torch.autograd.grad(v.sum(), z)
    assert torch.equal(g != 0, v != 0)


def test_sources_of_seeds():
    x = torch.ones(200)
    torch.manual_seed(5)
    a, b = F.dropout(x), F.dropout(x)
    assert not torch.equal(a, b)
    torch.manual_seed(5)
    assert torch.equal(F.dropout(x), a)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        F.dropout(x)
    assert torch.equal(F.dropout(x), b)
    g = torch.Generator().manual_seed(1)
    c = F.dropout(x, generator=g)
    assert torch.equal(F.dropout(x, generator=torch.Generator().manual_seed(1)), c)
    before = torch.get_rng_state()
    F.dropout(x, generator=g)
    assert torch.equal(torch.get_rng_state(), before)


EVERY = ["dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "relu_dropout", "bias_dropout_add"]  # fmt: skip


def called(name, x, p=0.5, **options):
    if name == "bias_dropout_add":
        return F.bias_dropout_add(x, torch.zeros(x.shape[-1]), x, p, **options)
    return getattr(F, name)(x, p, True, **options)


@pytest.mark.parametrize("name", EVERY)
def test_every_function_draws_as_torch_does(name):
    """One seed a call, of the default generator or of the one that is given."""
    x = (torch.rand(4, 5, 6) if name == "dropout1d" else torch.rand(4, 5, 6, 7)) + 0.5
    torch.manual_seed(5)
    a, b = called(name, x), called(name, x)
    assert not torch.equal(a, b)
    torch.manual_seed(5)
    assert torch.equal(called(name, x), a)
    with torch.random.fork_rng():
        torch.manual_seed(99)
        called(name, x)
    assert torch.equal(called(name, x), b)
    before = torch.get_rng_state()
    c, d = (called(name, x, generator=torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(c, d)
    assert torch.equal(c, a)  # a generator of the same seed is at the same place
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", EVERY)
def test_a_checkpoint_makes_the_same_mask_again(name, reentrant):
    x = torch.rand(4, 5, 6) if name == "dropout1d" else torch.rand(4, 5, 6, 7)
    x.add_(0.5).requires_grad_()

    def f(x):
        return (called(name, x.exp()) ** 2).sum()

    torch.manual_seed(3)
    (plain,) = torch.autograd.grad(f(x), x)
    torch.manual_seed(3)
    torch.utils.checkpoint.checkpoint(f, x, use_reentrant=reentrant).backward()
    torch.testing.assert_close(x.grad, plain, rtol=0, atol=0)


@pytest.mark.parametrize("name", EVERY)
def test_nothing_and_everything_is_dropped(name):
    x = torch.rand(4, 5, 6) if name == "dropout1d" else torch.rand(4, 5, 6, 7)
    kept, nothing = (2 * x, x) if name == "bias_dropout_add" else (x, torch.zeros_like(x))
    assert torch.equal(called(name, x, 0.0), kept)
    assert torch.equal(called(name, x, 1.0), nothing)
    for p in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="between 0 and 1, but got"):
            called(name, x, p)


@pytest.mark.parametrize("name", ["relu_dropout", "bias_dropout_add", "dropout1d", "alpha_dropout"])
def test_statistics_of_every_function(name):
    """Rate, lags, and rates of the chunks that threads take."""
    torch.manual_seed(1)
    p, n = 0.3, 1 << 18
    x = torch.ones(1, n, 1) if name == "dropout1d" else torch.ones(n // 1024, 1024)
    y = called(name, x, p).flatten()
    m = (y > (1 if name == "bias_dropout_add" else 0)).double()
    centred = m - (1 - p)
    assert abs(centred.mean()) < 5 * (p * (1 - p) / n) ** 0.5
    for lag in (1, 2, 3, 4, 8, 16, 64, 1023, 1024, 4096):
        assert abs((centred[lag:] * centred[:-lag]).mean()) / (p * (1 - p)) < 5 / n**0.5, lag
    chunks = m.reshape(-1, 4096).mean(1)
    assert (chunks - (1 - p)).abs().max() < 6 * (p * (1 - p) / 4096) ** 0.5
    spread = chunks.var() / (p * (1 - p) / 4096)  # chi squared of 63 degrees of freedom, over 63
    assert 0.4 < spread < 2


def test_vmap_randomness():
    x = torch.ones(6, 50)
    torch.manual_seed(0)
    different = torch.vmap(F.dropout, randomness="different")(x)
    assert len({tuple(r.tolist()) for r in different}) > 1
    same = torch.vmap(F.dropout, randomness="same")(x)
    assert len({tuple(r.tolist()) for r in same}) == 1
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(F.dropout)(x)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend):
    torch._dynamo.reset()
    f = torch.compile(lambda x: F.dropout(x * 1.0, 0.5), fullgraph=True, backend=backend)
    x = torch.randn(1000, requires_grad=True)
    y = f(x)
    (g,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(g != 0, y != 0)
    assert 300 < (y == 0).sum() < 700


def test_gradcheck():
    x = torch.randn(20, dtype=torch.float64, requires_grad=True)
    f = lambda x: dropout(x, 0.5, SEED)  # noqa: E731
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(f, x)
