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

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds in the fixed folder `build/<soabi>`, so that a second build compiles only changes."""

    def run(self) -> None:
        build = ROOT / "build" / str(sysconfig.get_config_var("SOABI"))
        build.mkdir(parents=True, exist_ok=True)
        destination = (
            ROOT / "onerec"
            if self.editable_mode or self.inplace
            else Path(self.build_lib) / "onerec"
        )
        # Build isolation installs pybind11 in a new temporary folder each time; a copy at a fixed
        # path keeps the compile commands, and so the objects, valid.
        headers = build / f"pybind11-{pybind11.__version__}"
        if not headers.exists():
            shutil.copytree(Path(pybind11.__file__).parent, headers)
        # The tools that were installed beside this interpreter come before the system's.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
        cmake = shutil.which("cmake", path=path) or "cmake"
        ninja = shutil.which("ninja", path=path)
        configure = [
            cmake,
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-DCMAKE_BUILD_TYPE=Release",
            "-DONEREC_PYTHON=ON",
            f"-DONEREC_CUDA={os.environ.get('ONEREC_CUDA', 'AUTO')}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={headers / 'share/cmake/pybind11'}",
            *(["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else []),
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build), "--parallel", jobs], check=True)
        subprocess.run(
            [cmake, "--install", str(build), "--component", "python", "--prefix", str(destination)],
            check=True,
        )

    def get_outputs(self) -> list[str]:
        return [str(p) for p in (Path(self.build_lib) / "onerec").glob("*.so*")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("onerec._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
    packages=[
        "onerec",
        *(
            "onerec." + ".".join(p.parent.relative_to(ROOT / "onerec").parts)
            for p in sorted((ROOT / "onerec").rglob("__init__.py"))
            if p.parent != ROOT / "onerec"
        ),
        "onerec.kernels",
    ],
    package_dir={"onerec.kernels": "kernels"},
    package_data={"onerec": ["py.typed", "*.pyi"], "onerec.evaluation": ["templates/*"]},
)
