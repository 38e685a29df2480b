"""What pyproject.toml cannot say: a folder per op family, a build_ext that only calls CMake, and a
version that tells which CUDA a wheel is built for."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.egg_info import egg_info

ROOT = Path(__file__).resolve().parent
# One by one: mapping the whole folder would put a top-level package `kernels` on users' machines,
# a name that belongs to Hugging Face.
FAMILIES = sorted(p.parent.name for p in ROOT.glob("kernels/*/__init__.py"))

# To everyone who installs it editable setuptools says, in a box, that a folder named like a package
# goes before it on sys.path. Here that folder is the package.
warnings.filterwarnings("ignore", message="Editable installation")


def choice(variable: str) -> str:
    """The value of an auto|on|off environment variable, auto by default."""
    value = os.environ.get(variable, "auto")
    if value not in ("auto", "on", "off"):
        raise SystemExit(f"{variable}={value!r} is not one of auto, on, off")
    return value


def compiler() -> str | None:
    """The C++ compiler that CMake will find, or None."""
    named = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, [*named[:1], "c++", "g++", "clang++"])), None)


def tool(name: str) -> str | None:
    """A build tool from PATH, or from this environment where it is not activated."""
    return shutil.which(name) or shutil.which(name, path=sysconfig.get_path("scripts"))


def nvcc() -> str | None:
    """The CUDA compiler to build with, or None where no CUDA kernels are built."""
    if choice("FASTRL_CUDA") == "off" or choice("FASTRL_NATIVE") == "off" or compiler() is None:
        return None
    named = shutil.which(os.environ.get("CUDACXX", ""))
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    found = (shutil.which("nvcc", path=f"{home}/bin") for home in homes if home)
    return named or next(filter(None, found), None) or shutil.which("nvcc")


class CudaVersion(egg_info):
    """Appends the CUDA major of the build to the version, as in 0.1.0+cu13; an sdist has none."""

    def finalize_options(self) -> None:
        self.tag_build = ""
        if "sdist" not in sys.argv and (path := nvcc()) is not None:
            done = subprocess.run([path, "--version"], capture_output=True, text=True, check=True)
            release = re.search(r"release (\d+)\.", done.stdout)
            if release is None:
                raise SystemExit(f"{path} --version names no release: {done.stdout!r}")
            self.tag_build = f"+cu{release[1]}"
        super().finalize_options()


class CMakeBuild(build_ext):
    """Builds fastrl._C with the CMakeLists.txt beside this file, which is the single truth."""

    def run(self) -> None:
        native = choice("FASTRL_NATIVE")
        if native == "auto" and compiler() is None:
            native = "off"
            warnings.warn(  # which pip 26 shows; older ones show nothing of a build but with -v
                "no C++ compiler found: fastrl installs without its native kernels and "
                "runs on the slower reference and Triton paths. Install g++ and reinstall with "
                "--no-cache-dir, or set FASTRL_NATIVE=off to silence this.",
                stacklevel=1,
            )
        if native == "off":
            self._forget()
            self.extensions = []
        elif compiler() is None:
            raise SystemExit("FASTRL_NATIVE=on, but no C++ compiler was found; install g++")
        super().run()

    def _forget(self) -> None:
        """Removes what an earlier build left: it would be packed, or imported, all the same."""
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))
            for stale in (built, Path(self.get_ext_fullpath(ext.name))):
                stale.unlink(missing_ok=True)

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = tool("cmake")
        if cmake is None:
            raise SystemExit("cmake was not found; pip install cmake")
        ninja = tool("ninja")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        # One folder for whatever is installed from here, of which only the bindings know Python:
        # what has been compiled is so once.
        build = ROOT / "build" / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # A CMake from a build environment that is gone by now cannot be reused.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            cmake,
            *("-S", str(ROOT), "-B", str(build), "-DCMAKE_BUILD_TYPE=Release"),
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DFASTRL_MODULE_FILE={target.name}",
            f"-DFASTRL_CUDA={choice('FASTRL_CUDA')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
        ]
        if (cuda := nvcc()) is not None:
            configure.append(f"-DFASTRL_NVCC={cuda}")
        if ninja is not None:
            configure += ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)


setup(
    packages=[
        *find_packages(include=["fastrl", "fastrl.*"]),
        *(f"fastrl.kernels.{family}" for family in FAMILIES),
        "fastrl.bench",
    ],
    package_dir={
        **{f"fastrl.kernels.{family}": f"kernels/{family}" for family in FAMILIES},
        "fastrl.bench": "bench",
    },
    package_data={"fastrl": ["py.typed", "recipes/*.yaml"]},
    include_package_data=False,
    ext_modules=[Extension("fastrl._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "egg_info": CudaVersion},
)
