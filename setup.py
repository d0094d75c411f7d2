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
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
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


def small():
    """A fifth of the size, for what is installed; in place, where a formula may be edited next, it would take longer than
    it saves. Drivers can read it since CUDA 12.4; only those of CUDA 13 and later are sure to be that new."""
    if "--inplace" in sys.argv or int(torch.version.cuda.partition(".")[0]) < 13:
        return []
    return ["--compress-mode=size"]


def processors():
    asked = os.environ.get("MAX_JOBS", "")
    if asked.isdecimal() and int(asked):
        return int(asked)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


class Build(BuildExtension):
    """Compiles csrc/cpu once per instruction set beside the rest, all files at once: torch's own way is a run of ninja
    for each set of flags, and after a formula was edited each would compile one file and leave the other processors idle.
    """

    def build_extension(self, ext):
        compiled = self.compiler.compile  # by ninja, which skips what is up to date

        def compile_all(sources, output_dir, **options):
            jobs = [(source, output_dir, options) for source in sources]
            for isa, flags in ISA.items():
                own = options | {
                    "macros": [("CPU_CAPABILITY", isa), (f"CPU_CAPABILITY_{isa}", None)],
                    # The loops that any processor runs are not unrolled: that alone takes half their time to compile.
                    "extra_postargs": [*CXX, "-O3" if flags else "-O2", *flags],
                }
                jobs += [(source, f"{output_dir}/{isa}", own) for source in glob("csrc/cpu/*.cpp")]
            # what takes longest first: CUDA, the loops, torch's headers
            jobs.sort(key=lambda job: (not job[0].endswith(".cu"), "csrc/torch" in job[0], job[0]))
            with ThreadPoolExecutor(processors() if self.use_ninja else 1) as pool:
                # each in a folder of its own, where ninja keeps its notes: csrc/cuda and csrc/torch have a map each
                runs = [
                    pool.submit(
                        compiled, [source], f"{folder}/{source.replace('/', '-')}", **options
                    )
                    for source, folder, options in jobs
                ]
                try:
                    wait(runs, return_when=FIRST_EXCEPTION)
                finally:
                    pool.shutdown(cancel_futures=True)
                failed = [run for run in runs if not run.cancelled() and run.exception()]
                return [each for run in failed or runs for each in run.result()]

        self.compiler.compile = compile_all
        ext.depends = [path for path in glob("csrc/**/*", recursive=True) if os.path.isfile(path)]
        super().build_extension(ext)
        self.compiler.compile = compiled


macros = [(f"FASTOPS_{isa}", None) for isa in ISA]
macros.append(("FASTOPS_TORCH_VERSION", f'"{torch.__version__}"'))
sources = sorted(glob("csrc/torch/**/*.cpp", recursive=True))
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
                "-O1",  # of the host's part: the device's is at 3 by itself
                "-std=c++20",
                "-Xcompiler",
                "-fvisibility=hidden",
                "--threads=2",  # ptxas for two GPUs at a time, where one file alone is compiled
                *GPUS,
                *small(),
                *(["-Werror", "all-warnings"] if flag("FASTOPS_WERROR") else []),
            ],
        },
        extra_link_args=link,
    )


def urls():
    """Where the project lives, as the CI that builds a release says; a build elsewhere names no place."""
    server, repository = (os.environ.get(f"GITHUB_{name}") for name in ("SERVER_URL", "REPOSITORY"))
    if not server or not repository:
        return {}
    home = f"{server}/{repository}"
    pages = {"Source": "", "Issues": "/issues", "Changelog": "/blob/main/CHANGELOG.md"}
    return {name: home + path for name, path in pages.items()}


setup(ext_modules=[extension], cmdclass={"build_ext": Build}, project_urls=urls())
