"""The setuptools commands: build_ext writes a build.ninja and runs it; build_py starts from an empty folder."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

from .settings import BuildError, read_settings
from .toolchain import (
    IS_X86_64,
    Nvcc,
    find_cxx,
    find_ninja,
    find_nvcc,
    mirror_headers,
    python_include,
    write_if_changed,
)

CXX_FLAGS = (
    "-std=c++17 -DNDEBUG -fPIC -fopenmp -fvisibility=hidden -ffp-contract=off -Wall -Wextra -Wno-unknown-pragmas"
).split()
# By the stem of the file, instead of -O3: it halves the time of these files. The bindings are as fast within 2 %. On
# x86-64 the generic loops are for processors before AVX2; they are as fast, except that casts to bfloat16 take half as
# long again.
OPTIMISATION = {"module": "-O1", **({"loops_generic": "-O1 -ftree-vectorize"} if IS_X86_64 else {})}
# Contraction is off on both sides: what is fused is written as a fused multiply-add.
# So the results are the same everywhere.
NVCC_FLAGS = "-std=c++17 -O3 -DNDEBUG --fmad=false -Xcompiler=-fPIC,-fvisibility=hidden,-ffp-contract=off".split()
LINK_FLAGS = "-shared -fopenmp -s -Wl,--exclude-libs,ALL -Wl,-O1 -Wl,--as-needed".split()
# The sources that see Python.h. The objects of all others serve every version of Python.
BINDINGS = "csrc/binding/"
# By the end of the file name. Left out on other machines than x86-64.
INSTRUCTION_SETS = {
    "_avx2": "-mavx2 -mfma -mf16c".split(),
    "_avx512": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx2 -mfma -mf16c".split(),
}


class BuildPy(build_py):
    """build_py without the leftovers of modules that are gone: setuptools would pack them into the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "fastfs", ignore_errors=True)
        super().run()


class BuildNative(build_ext):
    """build_ext on ninja: parallel, and incremental across isolated builds and editable installs."""

    def build_extension(self, ext: Extension) -> None:
        settings = read_settings()
        # Not build_temp: an editable install gets a fresh one each time.
        home = Path("build") / f"native-{sysconfig.get_platform()}-{'cpu' if settings.cuda == '0' else 'cuda'}"
        own = home / f"{sys.implementation.cache_tag}{sysconfig.get_config_var('abiflags') or ''}"
        cxx = find_cxx(own)
        nvcc = find_nvcc(settings)
        with one_build_at_a_time(home):
            mirror_headers(home / "include")
            write_if_changed(home / "include" / "fastfs_config.h", self._config(nvcc).encode())
            write_if_changed(own / "build.ninja", ninja_file(ext.sources, home, own, cxx, nvcc).encode())
            self._run_ninja(own / "build.ninja")
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            # A new file, not new content: a process that has the old one mapped keeps it.
            fresh = target.with_name(target.name + ".new")
            shutil.copyfile(own / "_C.so", fresh)
            fresh.replace(target)

    def _config(self, nvcc: Nvcc | None) -> str:
        lines = [
            "// Included in front of every source. A file, because nvcc splits -D at commas.",
            "#pragma once",
            f'#define FASTFS_VERSION "{self.distribution.get_version()}"',
        ]
        if IS_X86_64:
            lines.append("#define FASTFS_X86 1")
        if nvcc is not None:
            lines += ["#define FASTFS_WITH_CUDA 1", f'#define FASTFS_ARCHITECTURES "{nvcc.described}"']
        return "\n".join(lines) + "\n"

    def _run_ninja(self, file: Path) -> None:
        jobs = os.environ.get("MAX_JOBS", "").strip()
        if jobs and not jobs.isdigit():
            raise BuildError(f"MAX_JOBS must be a number of compilers to run at once, not {jobs!r}.")
        command = [find_ninja(), "-f", str(file), *(["-j", jobs] if jobs else [])]
        sys.stdout.flush()
        if subprocess.run(command, check=False).returncode:
            raise BuildError("compiling the native core failed; the compiler's messages are above.")


@contextmanager
def one_build_at_a_time(home: Path) -> Iterator[None]:
    """Waits for other builds, also for other versions of Python: they write the same objects below `home`."""
    import fcntl  # not on Windows, where nothing is compiled

    home.mkdir(parents=True, exist_ok=True)
    with (home / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def native_sources(root: Path) -> list[str]:
    """All sources of the core, relative to `root`; which of them are compiled is decided by ninja_file."""
    patterns = ("csrc/*/*.cpp", "csrc/*/*.cu")
    return [path.relative_to(root).as_posix() for pattern in patterns for path in sorted(root.glob(pattern))]


def ninja_file(sources: list[str], home: Path, own: Path, cxx: list[str], nvcc: Nvcc | None) -> str:
    """The text of build.ninja. Its paths are relative to the project: no machine's paths end up in the core.

    `home` has the objects that every version of Python shares, `own` those of one version and its library.
    """
    from ninja.ninja_syntax import Writer

    out = StringIO()
    ninja = Writer(out, width=120)  # type: ignore[arg-type]  # the stub says str
    include = ["-Icsrc", "-isystem", str(home / "include")]
    include += ["-include", str(home / "include" / "fastfs_config.h")]
    env = {name: shlex.split(os.environ.get(name, "")) for name in ("CPPFLAGS", "CXXFLAGS", "LDFLAGS")}
    ninja.variable("ninja_required_version", "1.5")
    ninja.variable("builddir", str(home))
    ninja.variable("cxx", _quote(cxx))
    ninja.variable("cxxflags", _quote([*CXX_FLAGS, *include, *env["CPPFLAGS"], *env["CXXFLAGS"]]))
    ninja.variable("level", "-O3")
    compile_cxx = "$cxx $level $cxxflags $special -MMD -MF $out.d -c $in -o $out"
    ninja.rule("cxx", compile_cxx, "c++ $in", depfile="$out.d", deps="gcc")
    libraries: list[str] = []
    if nvcc is not None:
        host = ["-ccbin", nvcc.host_compiler] if nvcc.host_compiler else []
        ninja.comment(f"nvcc {nvcc.version}")  # a new toolkit at the same path changes this file
        ninja.variable("nvcc", _quote([nvcc.path]))
        # Six times smaller; toolkits before 13 have another way, or drivers that cannot read it.
        compress = ["--compress-mode=size"] if nvcc.release >= (13, 0) else []
        ninja.variable("nvccflags", _quote([*NVCC_FLAGS, *compress, *host, *include, *_gencode(nvcc)]))
        ninja.rule("nvcc", "$nvcc $nvccflags -MMD -MF $out.d -c $in -o $out", "nvcc $in", depfile="$out.d", deps="gcc")
        libraries = [f"-L{nvcc.library_dir}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    ninja.variable("ldflags", _quote([*LINK_FLAGS, *env["LDFLAGS"]]))
    ninja.variable("libs", _quote(libraries))
    ninja.rule("link", "$cxx $ldflags $in $libs -o $out", "link $out")

    objects = []
    for source in sources:
        of_one_python = source.startswith(BINDINGS)
        target = str((own if of_one_python else home) / f"{source}.o")
        stem = Path(source).stem
        isa = next((suffix for suffix in INSTRUCTION_SETS if stem.endswith(suffix)), None)
        if source.endswith(".cu"):
            if nvcc is None:
                continue
            ninja.build([target], "nvcc", [source])
        elif isa is None or IS_X86_64:
            variables = {"level": OPTIMISATION[stem]} if stem in OPTIMISATION else {}
            special = ["-isystem", python_include()] if of_one_python else INSTRUCTION_SETS.get(isa or "", [])
            if special:
                variables["special"] = _quote(special)
            ninja.build([target], "cxx", [source], variables=variables)
        else:
            continue
        objects.append(target)
    library = str(own / "_C.so")
    ninja.build([library], "link", objects)
    ninja.default(library)
    return out.getvalue()


def _gencode(nvcc: Nvcc) -> list[str]:
    """-gencode flags: one virtual architecture, compiled once and assembled for each GPU.

    A name with suffix (90a) is for that GPU alone and has its own. A virtual architecture per generation would cost
    another run of the optimiser for each file, a fifth of the build: the kernels use nothing that compute_80 lacks.
    """
    virtual: dict[str, list[str]] = {}
    for name in nvcc.architectures:
        virtual.setdefault(virtual_architecture(name, nvcc.architectures), []).append(f"sm_{name}")
    if nvcc.ptx:
        last = virtual_architecture(nvcc.architectures[-1], nvcc.architectures)
        virtual[last].append(f"compute_{last}")
    return [f"-gencode=arch=compute_{name},code=[{','.join(codes)}]" for name, codes in virtual.items()]


def virtual_architecture(name: str, architectures: tuple[str, ...]) -> str:
    """The architecture whose PTX `name` is assembled from: the oldest one."""
    if not name.isdigit():
        return name
    return str(min(int(a) for a in architectures if a.isdigit()))


def _quote(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")
