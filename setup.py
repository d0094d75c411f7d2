"""Builds the one extension, fastops._C. Everything else about the distribution is in pyproject.toml.

FASTOPS_CPU_ONLY=1   leave the CUDA kernels out
FORCE_CUDA=1         fail where they cannot be built, instead of leaving them out
FASTOPS_WERROR=1     fail on any warning of nvcc's
TORCH_CUDA_ARCH_LIST the GPUs to compile for (default "8.0;9.0;10.0;12.0", and PTX for those to come)
"""

import os
import platform
import shutil
import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import setup


def find_cuda_home():
    """A toolkit with both nvcc and headers, or None. The nvcc on PATH may be a wrapper script: ask nvcc itself."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    if nvcc := shutil.which("nvcc"):
        dry = subprocess.run(
            [nvcc, "-dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True
        )
        candidates += [
            os.path.realpath(line.split("=", 1)[1].strip())
            for line in dry.stderr.splitlines()
            if line.startswith("#$ TOP=")
        ]
    for home in filter(None, candidates):
        if Path(home, "bin/nvcc").exists() and Path(home, "include/cuda_runtime.h").exists():
            return home
    return None


def flag(name):
    return os.environ.get(name, "0") not in ("", "0")


cuda_home = None if flag("FASTOPS_CPU_ONLY") else find_cuda_home()
if cuda_home:
    os.environ["CUDA_HOME"] = cuda_home  # cpp_extension reads it when it is imported

import torch  # noqa: E402
from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

if flag("FASTOPS_CPU_ONLY"):
    missing = "FASTOPS_CPU_ONLY is set"
elif torch.version.cuda is None:
    missing = "this torch is a CPU build"
elif cuda_home is None:
    missing = "no CUDA toolkit found (bin/nvcc and include/cuda_runtime.h under CUDA_HOME)"
else:
    missing = None
if missing and flag("FORCE_CUDA"):
    sys.exit(f"fastops: FORCE_CUDA=1, but {missing}")
print(f"fastops: building {'without CUDA: ' + missing if missing else 'with CUDA: ' + cuda_home}")

CXX = [
    "-g0",
    "-std=c++20",
    "-fvisibility=hidden",
    "-Wno-unknown-pragmas",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",
]
GLUE = [
    *CXX,
    "-O1",
    "-fopenmp",
]  # csrc/torch: nothing in it is hot but calls, and it is what takes long to compile
# The loops in csrc/cpu are compiled once per instruction set and chosen at run time (csrc/cpu/README.md).
ISA = {"DEFAULT": []}
if platform.machine() in ("x86_64", "AMD64"):
    ISA["AVX2"] = ["-mavx2", "-mfma", "-mf16c"]
    ISA["AVX512"] = [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx2", "-mfma", "-mf16c",
    ]  # fmt: skip


# The kernels use nothing that GPUs before 8.0 lack or later ones add: one pass of the compiler serves all, and its PTX
# later ones. torch adds flags of its own only where TORCH_CUDA_ARCH_LIST asks for them.
ALL_GPUS = "-gencode=arch=compute_80,code=[sm_80,sm_90,sm_100,sm_120,compute_80]"
GPUS = [] if os.environ.get("TORCH_CUDA_ARCH_LIST") else [ALL_GPUS]


class Build(BuildExtension):
    """Compiles csrc/cpu once per instruction set before the rest is compiled and linked."""

    def build_extension(self, ext):
        for isa, flags in ISA.items():
            ext.extra_objects += self.compiler.compile(
                sorted(glob("csrc/cpu/*.cpp")),
                f"{self.build_temp}/{isa}",
                macros=[("CPU_CAPABILITY", isa), (f"CPU_CAPABILITY_{isa}", None)],
                include_dirs=ext.include_dirs,
                # The loops that any processor runs are not unrolled: that alone takes half their time to compile.
                extra_postargs=[*CXX, "-O3" if flags else "-O2", *flags],
                depends=sorted(glob("csrc/**/*.h", recursive=True)),
            )
        super().build_extension(ext)


macros = [(f"FASTOPS_{isa}", None) for isa in ISA]
macros.append(("FASTOPS_TORCH_VERSION", f'"{torch.__version__}"'))
sources = sorted(glob("csrc/torch/*.cpp"))
link = ["-s"] if sys.platform == "linux" else []
if missing:
    extension = CppExtension(
        "fastops._C",
        sources,
        define_macros=macros,
        extra_compile_args={"cxx": GLUE},
        extra_link_args=link,
    )
else:
    extension = CUDAExtension(
        "fastops._C",
        sources + sorted(glob("csrc/cuda/*.cu")),
        define_macros=macros + [("FASTOPS_CUDA", None)],
        extra_compile_args={
            "cxx": GLUE,
            "nvcc": [
                "-O3",
                "-std=c++20",
                "-Xcompiler",
                "-fvisibility=hidden",
                "-lineinfo",
                *GPUS,
                *(["-Werror", "all-warnings"] if flag("FASTOPS_WERROR") else []),
            ],
        },
        extra_link_args=link,
    )

setup(ext_modules=[extension], cmdclass={"build_ext": Build})
