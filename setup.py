"""Builds the native part with CMake and Ninja; everything else is in pyproject.toml.

Rebuild after a change of C++: ``python setup.py build_ext --inplace`` (incremental).
Options go through the environment: ``PYLLMLITE_CUDA`` (auto, on, off),
``PYLLMLITE_SANITIZE`` (address,undefined), ``PYLLMLITE_CMAKE_ARGS``,
``CMAKE_BUILD_PARALLEL_LEVEL``.
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent


def find_tool(name: str) -> str:
    """The tool from the environment that runs this file, else from PATH."""
    beside = Path(sys.executable).parent / name
    if beside.exists():
        return str(beside)
    found = shutil.which(name)
    if not found:
        raise SystemExit(f"{name} was not found: pip install {name}")
    return found


def num_jobs() -> int:
    asked = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL")
    if asked:
        return int(asked)
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class CMakeBuild(build_ext):
    """One CMake build, installed beside the extension: into the source tree for in-place and
    editable builds, into the wheel otherwise."""

    def run(self) -> None:
        # setuptools clears the flag while it builds, and would copy the extension alone.
        self.into_source = bool(self.inplace)
        super().run()

    def copy_extensions_to_source(self) -> None:
        pass

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake = find_tool("cmake")
        package = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        if self.into_source:
            package = ROOT / "pyllmlite"
        # A directory of its own, not setuptools' temporary one, so that builds are incremental.
        build = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        build.mkdir(parents=True, exist_ok=True)
        settings = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_MAKE_PROGRAM": find_tool("ninja"),
            "PYLLMLITE_PYTHON": "ON",
            "PYLLMLITE_CUDA": os.environ.get("PYLLMLITE_CUDA", "auto"),
            "PYLLMLITE_SANITIZE": os.environ.get("PYLLMLITE_SANITIZE", ""),
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja"]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        configure += shlex.split(os.environ.get("PYLLMLITE_CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "-j", str(num_jobs())], check=True)
        subprocess.run([cmake, "--install", str(build), "--prefix", str(package)], check=True)


class CleanBuildPy(build_py):
    """build_py keeps files of earlier builds, and they would end up in the wheel."""

    def run(self) -> None:
        if not self.editable_mode:
            for name in ("pyllmlite", "pyllmlite_plugins"):
                shutil.rmtree(Path(self.build_lib) / name, ignore_errors=True)
        super().run()


plugins = ["pyllmlite_plugins"]
plugins += [f"pyllmlite_plugins.{name}" for name in find_packages(str(ROOT / "plugins"))]

setup(
    packages=find_packages(include=["pyllmlite", "pyllmlite.*"]) + plugins,
    package_dir={"pyllmlite": "pyllmlite", "pyllmlite_plugins": "plugins"},
    package_data={"pyllmlite": ["py.typed", "*.pyi", "serve/*.html"]},
    ext_modules=[Extension("pyllmlite._native", sources=[])],
    cmdclass={"build_ext": CMakeBuild, "build_py": CleanBuildPy},
)
