"""Builds the native core with CMake; everything else is declared in pyproject.toml.

Environment: ONEREC_CUDA=AUTO|ON|OFF (default AUTO), CMAKE_ARGS (extra configure arguments),
CMAKE_BUILD_PARALLEL_LEVEL (build jobs, default: the number of cores).
"""

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CleanBuild(build):
    """Empties the staging folder first: a module that was removed stays out of the next wheel."""

    def run(self) -> None:
        shutil.rmtree(self.build_lib, ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Builds in the fixed folder `build/<soabi>`, so that a second build compiles only changes."""

    def run(self) -> None:
        import pybind11  # here, so that metadata and an sdist need setuptools alone

        folder = ROOT / "build" / str(sysconfig.get_config_var("SOABI"))
        # The tools that were installed beside this interpreter come before the system's.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=path) or "cmake"
        ninja = shutil.which("ninja", path=path)
        generator = "Ninja" if ninja else "Unix Makefiles"
        cache = folder / "CMakeCache.txt"
        # CMake refuses a folder that was made with another generator or for another source tree.
        if cache.exists() and not {
            f"CMAKE_GENERATOR:INTERNAL={generator}",
            f"CMAKE_HOME_DIRECTORY:INTERNAL={ROOT}",
        } <= set(cache.read_text().splitlines()):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        destination = (
            ROOT / "onerec"
            if self.editable_mode or self.inplace
            else Path(self.build_lib) / "onerec"
        )
        # Build isolation installs pybind11 in a new temporary folder each time; a copy at a fixed
        # path keeps the compile commands, and so the objects, valid.
        headers = folder / f"pybind11-{pybind11.__version__}"
        if not headers.exists():
            shutil.copytree(Path(pybind11.__file__).parent, headers)
        configure = [
            cmake,
            "-G",
            generator,
            "-S",
            str(ROOT),
            "-B",
            str(folder),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DONEREC_PYTHON=ON",
            f"-DONEREC_CUDA={os.environ.get('ONEREC_CUDA', 'AUTO')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={headers / 'share/cmake/pybind11'}",
            *([f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(folder), "--parallel", jobs], check=True)
        subprocess.run(
            [
                cmake,
                "--install",
                str(folder),
                "--component",
                "python",
                "--prefix",
                str(destination),
            ],
            check=True,
        )

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "onerec").glob("*.so*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("onerec._C", sources=[])],
    cmdclass={"build": CleanBuild, "build_ext": CMakeBuild},
    packages=[
        *find_packages(include=["onerec", "onerec.*"]),
        *(f"onerec.{name}" for name in find_packages(include=["kernels", "kernels.*"])),
    ],
    package_dir={"onerec.kernels": "kernels"},
    package_data={
        "onerec": ["py.typed", "*.pyi"],
        "onerec.report": ["templates/*"],
        "onerec.serving": ["*.html"],
    },
)
