"""The vector words of csrc/cpu/vec_math.h against float64: within 2 ulp in every binade, at every special value, for every
instruction set that this machine has."""

import ctypes
import functools
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).parents[2] / "csrc"
TORCH = Path(torch.__file__).parent
CAPABILITIES = {
    "DEFAULT": ([], lambda: True),
    "AVX2": (["-mavx2", "-mfma", "-mf16c"], torch.cpu._is_avx2_supported),
    "AVX512": (
        ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c"],
        torch.cpu._is_avx512_supported,
    ),
}
WORDS = {
    "exp": torch.exp,
    "log": torch.log,
    "tanh": torch.tanh,
    "erf": torch.erf,
    "expm1": torch.expm1,
    "log1p": torch.log1p,
    "log1p_unit": torch.log1p,
}
DOMAIN = {"log1p_unit": (0.0, 1.0)}
LARGEST_ULP = 2.0

# math.h may or may not have included vec_math.h already.
PROBE = """
#include "math.h"
namespace fastops {
inline namespace CPU_CAPABILITY {
#include "cpu/vec_math.h"
}
}
#define PROBE(word, type)                                                                  \\
  extern "C" void word##_##type(const type* x, type* y, long n) {                          \\
    using V = fastops::Vec<type>;                                                          \\
    for (long i = 0; i < n; i += V::size()) fastops::word(V::loadu(x + i)).store(y + i);   \\
  }
#define PROBES(word) PROBE(word, float) PROBE(word, double)
PROBES(exp) PROBES(log) PROBES(tanh) PROBES(erf) PROBES(expm1) PROBES(log1p) PROBES(log1p_unit)
namespace fastops {
template <class T> FASTOPS_FN T logs_of(T x) { return logs(x).of; }
template <class T> FASTOPS_FN T logs_of_rest(T x) { return logs(x).of_rest; }
template <class T> FASTOPS_FN T cdf(T x) { return normal(x).cdf; }
template <class T> FASTOPS_FN T pdf(T x) { return normal(x).pdf; }
template <class T> FASTOPS_FN T cdf_slope(T x) { return normal(Dual<T>(x, T(Real<T>(1)))).cdf.d; }
template <class T> FASTOPS_FN T pdf_slope(T x) { return normal(Dual<T>(x, T(Real<T>(1)))).pdf.d; }
}
PROBES(logs_of) PROBES(logs_of_rest) PROBES(cdf) PROBES(pdf) PROBES(cdf_slope) PROBES(pdf_slope)
"""


@pytest.fixture(scope="module", params=CAPABILITIES)
def probe(request, tmp_path_factory):
    """The words compiled for one instruction set: probe(word, x), probe.object the object file."""
    flags, is_supported = CAPABILITIES[request.param]
    if not is_supported():
        pytest.skip(f"this CPU has no {request.param}")
    if not (compiler := shutil.which("g++")):
        pytest.skip("there is no g++")
    folder = tmp_path_factory.mktemp(request.param)
    source, compiled, library = (folder / f"probe.{suffix}" for suffix in ("cpp", "o", "so"))
    source.write_text(PROBE)
    subprocess.run(
        [compiler, "-std=c++20", "-O3", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
        + [f"-DCPU_CAPABILITY={request.param}", f"-DCPU_CAPABILITY_{request.param}", *flags]
        + [f"-I{CSRC}", f"-isystem{TORCH}/include", "-c", source, "-o", compiled],
        check=True,
    )
    # at::vec's words of double are Sleef's, which libtorch_cpu exports.
    subprocess.run(
        [compiler, "-shared", compiled, "-o", library]
        + [f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{TORCH}/lib"],
        check=True,
    )
    words = ctypes.CDLL(library)

    def run(word, x):
        whole = -(-len(x) // 16) * 16
        x = torch.nn.functional.pad(x, (0, whole - len(x)), value=1.0)
        y = torch.empty_like(x)
        function = getattr(words, f"{word}_{'double' if x.dtype == torch.float64 else 'float'}")
        function(
            ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), ctypes.c_long(len(y))
        )
        return y

    run.object = compiled
    return run


def floats(first, last, stride):
    """Every stride-th float of both signs from the bits `first` up to the bits `last`."""
    bits = torch.arange(first, last, stride, dtype=torch.int32)
    x = bits.view(torch.float32)
    return torch.cat([x, -x])


@functools.cache
def grid():
    """All binades, the NaNs and both zeros among them, and those where the words bend more densely."""
    edges = torch.tensor([0x0, 0x1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000])
    edges = edges.to(torch.int32).view(torch.float32)
    everything = floats(0, 0x7FFFFFFF, 2999)
    dense = floats(0x3C800000, 0x42D00000, 263)  # 2^-6 to 104
    x = torch.cat([everything, dense, edges, -edges])
    return torch.nn.functional.pad(x, (0, -len(x) % 16), value=1.0)


def domain(word):
    """Those of the grid that the word takes."""
    x = grid()
    low, high = DOMAIN.get(word, (-math.inf, math.inf))
    x = x[~((x < low) | (x > high))]
    return torch.nn.functional.pad(x, (0, -len(x) % 16), value=1.0)


@functools.lru_cache(maxsize=1)
def reference(word):
    """The word of its domain in float64, and the distance of the two floats around it."""
    y = WORDS[word](domain(word).double())
    ulp = torch.ldexp(torch.ones_like(y), (torch.frexp(y).exponent - 24).clamp(min=-149))
    return y, ulp


# The word is the outer loop, so that each reference is computed once for all instruction sets.
def pytest_generate_tests(metafunc):
    if "word" in metafunc.fixturenames:
        metafunc.parametrize("word", WORDS)


def test_error(probe, word):
    x = domain(word)
    assert len(x) >= (500_000 if word in DOMAIN else 2_000_000)
    expected, ulp = reference(word)
    got = probe(word, x)
    rounded = expected.float()
    exact = ~rounded.isfinite()
    assert torch.equal(got[exact].nan_to_num(nan=0.5), rounded[exact].nan_to_num(nan=0.5))
    assert torch.equal(got[exact].isnan(), rounded[exact].isnan())
    zero = got == 0
    assert torch.equal(got[zero].signbit(), expected[zero].signbit())
    if word in ("tanh", "erf"):
        assert got.nan_to_num(nan=0.0).abs().max() == 1
    error = torch.where(exact, 0.0, (got.double() - expected).abs() / ulp)
    worst = error.argmax()
    assert error[worst] <= LARGEST_ULP, f"{error[worst]:.3f} ulp at {x[worst].item().hex()}"


INF, NAN, LARGEST, DENORMAL = math.inf, math.nan, torch.finfo(torch.float32).max, 2.0**-149
SPECIAL = {
    "exp": {
        -INF: 0.0, INF: INF, LARGEST: INF, -LARGEST: 0.0, 0.0: 1.0, DENORMAL: 1.0, NAN: NAN,
        88.75: INF, -87.5: math.exp(-87.5), -103.2: DENORMAL, -104.5: 0.0,
    },
    "log": {0.0: -INF, INF: INF, 1.0: 0.0, -1.0: NAN, -INF: NAN, -DENORMAL: NAN, NAN: NAN},
    "tanh": {INF: 1.0, -INF: -1.0, LARGEST: 1.0, -9.5: -1.0, DENORMAL: DENORMAL, NAN: NAN},
    "erf": {INF: 1.0, -INF: -1.0, LARGEST: 1.0, -4.0: -1.0, NAN: NAN},
    "expm1": {
        -INF: -1.0, INF: INF, -LARGEST: -1.0, LARGEST: INF, 88.75: INF, DENORMAL: DENORMAL, NAN: NAN,
    },
    "log1p": {
        -1.0: -INF, INF: INF, -INF: NAN, -1.5: NAN, -LARGEST: NAN, -DENORMAL: -DENORMAL, NAN: NAN,
    },
    "log1p_unit": {0.0: 0.0, 1.0: math.log(2), DENORMAL: DENORMAL, NAN: NAN},
}  # fmt: skip


def test_special_values(probe, word):
    arguments = torch.tensor([*SPECIAL[word]], dtype=torch.float32)
    values = torch.tensor([*SPECIAL[word].values()], dtype=torch.float32)
    got = probe(word, arguments)[: len(values)]
    torch.testing.assert_close(got, values, rtol=1e-6, atol=0.0, equal_nan=True)
    exact = ~values.isfinite() | (values.abs() == 1) | (values == 0)
    torch.testing.assert_close(got[exact], values[exact], rtol=0.0, atol=0.0, equal_nan=True)


def test_sign_of_zero(probe, word):
    got = probe(word, torch.tensor([0.0, -0.0]))[:2]
    if word in ("tanh", "erf", "expm1", "log1p", "log1p_unit"):
        assert got.tolist() == [0.0, 0.0] and got.signbit().tolist() == [False, True]
    else:
        assert got.tolist() == ([1.0, 1.0] if word == "exp" else [-INF, -INF])


def test_logs_are_both_logarithms(probe):
    x = grid()
    assert torch.equal(probe("logs_of", x).view(torch.int32), probe("log", x).view(torch.int32))
    rest, each = probe("logs_of_rest", x), probe("log1p", -x)
    assert torch.equal(rest.isnan(), each.isnan())
    assert torch.equal(rest.nan_to_num(nan=0.0), each.nan_to_num(nan=0.0))


def test_double(probe, word):
    x = torch.linspace(0.01, 5.0, 1024, dtype=torch.float64)
    torch.testing.assert_close(probe(word, x), WORDS[word](x), rtol=1e-15, atol=0.0)


def cdf(x):
    return torch.special.erfc(x * -math.sqrt(0.5)) / 2


def pdf(x):
    return torch.exp(x * x / -2) / math.sqrt(2 * math.pi)


NORMAL = {"cdf": cdf, "pdf": pdf, "cdf_slope": pdf, "pdf_slope": lambda x: -x * pdf(x)}


@pytest.mark.parametrize("function", NORMAL)
def test_the_normal_distribution(probe, function):
    x = grid()
    x = x[x.isfinite()]
    exact = NORMAL[function](x.double())
    error = (probe(function, x)[: len(x)].double() - exact).abs()
    assert error.max() < 1.2e-7
    if "AVX512" not in str(probe.object) and function in ("cdf", "pdf"):
        normal = exact > 2.0**-126
        ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact).exponent - 24)
        bound = 4.5 + 1.5 * x.double() ** 2 if function == "cdf" else 2 + x.double() ** 2
        worst = torch.where(normal, error / ulp / bound, 0.0).argmax()
        assert error[worst] <= ulp[worst] * bound[worst], f"at {x[worst].item().hex()}"
    far = torch.tensor([-INF, INF, -LARGEST, LARGEST, -20.0, 20.0, NAN, 0.0, -0.0])
    got = probe(function, far)[: len(far)]
    if function == "cdf":
        assert got[:6].tolist() == [0, 1, 0, 1, 0, 1] and got[6].isnan()
        assert got[7:].tolist() == [0.5, 0.5]
    elif function == "pdf":
        assert got[:6].tolist() == [0.0] * 6
    wide = torch.linspace(-8.0, 8.0, 1024, dtype=torch.float64)
    torch.testing.assert_close(
        probe(function, wide), NORMAL[function](wide), rtol=1e-14, atol=1e-16
    )


def test_no_weak_symbols(probe):
    """A weak symbol could be the copy that another instruction set's object runs."""
    symbols = subprocess.run(["nm", probe.object], check=True, capture_output=True, text=True)
    kinds = {line.split()[-1]: line.split()[-2] for line in symbols.stdout.splitlines()}
    assert [name for name, kind in kinds.items() if kind in "VvWw"] == []
