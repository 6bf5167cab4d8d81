"""The installed package: metadata, native core, kernels, and what happens without them."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onerec
import onerec.kernels
from onerec import _native

ROOT = Path(__file__).resolve().parents[1]


def python(
    code: str, *options: str, cwd: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs `code` in a new interpreter that sees `cwd` first."""
    return subprocess.run(
        [sys.executable, *options, "-c", code],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_version_is_the_same_everywhere() -> None:
    assert importlib.metadata.version("onerec") == onerec.__version__
    assert _native.core().version() == onerec.__version__


def test_the_command_is_installed_and_loads() -> None:
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="onerec")
    assert callable(command.load())


def test_every_public_name_loads() -> None:
    for name in onerec.__all__:
        assert getattr(onerec, name) is not None, name


def test_kernels_are_importable_under_the_package() -> None:
    assert onerec.kernels.__name__ == "onerec.kernels"
    assert Path(onerec.kernels.__file__ or "").name == "__init__.py"


def test_importing_the_package_leaves_the_application_libraries_alone() -> None:
    heavy = ("ibis", "duckdb", "pyarrow", "matplotlib", "jinja2", "rich", "transformers", "triton")
    result = python(f"import sys, onerec; print([m for m in {heavy!r} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_the_stub_names_what_the_native_module_has() -> None:
    tree = ast.parse((ROOT / "onerec" / "_C.pyi").read_text())
    typed_dicts = {"TypedDict"}
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            bases = {base.id for base in node.bases if isinstance(base, ast.Name)}
            if bases & typed_dicts:
                typed_dicts.add(node.name)
    named = {n.name for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
    assert named - typed_dicts == {n for n in dir(_native.core()) if not n.startswith("_")}


def test_a_missing_core_is_told_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "onerec").mkdir()
    for module in (ROOT / "onerec").glob("*.py"):
        shutil.copy(module, tmp_path / "onerec")
    code = "from onerec import _native; print(_native.available()); _native.core()"
    result = python(code, "-S", cwd=tmp_path)  # without the installed package
    assert result.returncode == 1
    assert result.stdout.strip() == "False"
    assert "RuntimeError: the native core onerec._C could not be loaded: ImportError:" in (
        result.stderr
    )


def test_a_broken_core_is_told_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "onerec").mkdir()
    for module in (ROOT / "onerec").glob("*.py"):
        shutil.copy(module, tmp_path / "onerec")
    name = Path(_native.core().__file__ or "").name
    (tmp_path / "onerec" / name).write_bytes(b"not a library")
    result = python("from onerec import _native; _native.core()", cwd=tmp_path)
    assert result.returncode == 1
    assert f"could not be loaded: ImportError: {tmp_path}/onerec/{name}" in result.stderr


def test_the_environment_chooses_the_instruction_set() -> None:
    code = "from onerec import _native; print(_native.core().isa())"
    for isa in _native.core().isas():
        assert python(code, ONEREC_ISA=isa).stdout.strip() == isa
    result = python(code, ONEREC_ISA="sse9")
    assert result.returncode == 1
    wanted = "ONEREC_ISA: wanted baseline, avx2, avx512 or avx512_bf16, got sse9"
    assert f"ValueError: {wanted}" in result.stderr


def test_an_unavailable_instruction_set_is_refused() -> None:
    code = "from onerec import _native; print(_native.core().isa())"
    for isa in {"avx2", "avx512", "avx512_bf16"} - set(_native.core().isas()):
        result = python(code, ONEREC_ISA=isa)
        assert result.returncode == 1
        assert f"ValueError: ONEREC_ISA={isa}: not available here" in result.stderr


def test_cuda_tells_whether_it_was_built_and_why_it_cannot_run() -> None:
    info = _native.core().cuda_info()
    assert (info["devices"] > 0) == (info["problem"] == "")
    assert info["built"] or "built without CUDA" in info["problem"]
