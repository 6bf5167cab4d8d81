"""The installed C++ package, used by a program outside the tree."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from onerec import OneRec, OneRecConfig, Recommender, __version__
from onerec.inference import Mixture
from onerec.inference.exported import export
from onerec.model.counting import (
    CountPart,
    CountRanker,
    co_consumption,
    personal_frequency,
    popularity,
    transition,
)
from onerec.tokenizer import Catalog

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path) -> str:
    """Standard output and error of a command that must succeed."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    return result.stdout


@pytest.fixture(scope="module")
def cmake() -> str:
    """CMake: the one beside this interpreter, else the system's; skips without either."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("cmake", path=path)
    if found is None:
        pytest.skip("no cmake")
    return found


@pytest.fixture(scope="module")
def prefix(cmake: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The C++ package, installed from the folder of the Python build or from a build of its own."""
    build = ROOT / "build" / str(sysconfig.get_config_var("SOABI"))
    if not (build / "cmake_install.cmake").exists():
        build = tmp_path_factory.mktemp("build")
        run(cmake, "-S", ROOT, "-B", build, "-DONEREC_CUDA=OFF")
        run(cmake, "--build", build, "--parallel", "2")
    prefix = tmp_path_factory.mktemp("prefix")
    run(cmake, "--install", build, "--component", "cpp", "--prefix", prefix)
    return prefix


def test_installs_headers_library_and_config_only(prefix: Path) -> None:
    headers = {p.name for p in (ROOT / "csrc/include/onerec").glob("*.h")}
    assert {p.name for p in (prefix / "include/onerec").iterdir()} == headers
    assert list(prefix.glob("lib*/libonerec_core.so"))
    assert list(prefix.glob("lib*/cmake/onerec/onerecConfig.cmake"))
    assert not list(prefix.rglob("_C*"))
    (license,) = prefix.rglob("LICENSE")
    assert license.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_public_headers_stand_alone_and_are_cpp17(prefix: Path, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++")
    for header in sorted((prefix / "include/onerec").glob("*.h")):
        source = tmp_path / f"{header.stem}.cc"
        source.write_text(f"#include <onerec/{header.name}>\n")
        flags = ["-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
        run(compiler, *flags, f"-I{prefix}/include", source)


def test_consumer_outside_the_tree_builds_and_runs(
    cmake: str, prefix: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(ROOT / "csrc/tests/consumer", tmp_path / "source")
    build = tmp_path / "build"
    run(cmake, "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(cmake, "--build", build)
    output = run(build / "consumer")  # ends with 1 if a result is wrong
    isas = "baseline|avx2|avx512|avx512_bf16"
    assert re.search(rf"^onerec {re.escape(__version__)} on ({isas})$", output, re.M)
    assert len(re.findall(r"^session \d+ \d+: -\d+\.\d{3}$", output, re.M)) == 5


def test_readme_example_compiles_and_searches(prefix: Path, tmp_path: Path) -> None:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no c++")
    (code,) = re.findall(r"```cpp\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    (tmp_path / "main.cc").write_text(code)
    (library,) = prefix.glob("lib*/libonerec_core.so")
    flags = ["-std=c++17", f"-I{prefix}/include", f"-L{library.parent}", "-lonerec_core"]
    program = tmp_path / "main"
    run(compiler, tmp_path / "main.cc", *flags, f"-Wl,-rpath,{library.parent}", "-o", program)
    # Equal logits: six codes at -log 16 each, and the first two ids.
    assert run(program) == f"0 1: {-6 * math.log(16):.3f}\n"


def test_pkg_config_finds_the_package_wherever_it_lies(prefix: Path, tmp_path: Path) -> None:
    compiler, tool = shutil.which("c++"), shutil.which("pkg-config")
    if compiler is None or tool is None:
        pytest.skip("no c++ or no pkg-config")
    moved = Path(shutil.copytree(prefix, tmp_path / "moved", symlinks=True))
    (file,) = moved.rglob("onerec.pc")
    found = subprocess.run(
        [tool, "--cflags", "--libs", "onerec"],
        env={**os.environ, "PKG_CONFIG_PATH": str(file.parent)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    assert "-lonerec_core" in found
    version = subprocess.run(
        [tool, "--modversion", str(file)], capture_output=True, text=True, check=True
    )
    assert version.stdout.strip() == __version__
    source = tmp_path / "main.cc"
    source.write_text(
        "#include <onerec/runtime.h>\n#include <iostream>\n"
        "int main() { std::cout << onerec::Version(); }\n"
    )
    (library,) = moved.rglob("libonerec_core.so")
    program = tmp_path / "main"
    run(compiler, source, *found, f"-Wl,-rpath,{library.parent}", "-o", program)
    assert run(program) == __version__


@pytest.fixture(scope="module")
def examples(cmake: str, prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the built programs of examples/cpp."""
    build = tmp_path_factory.mktemp("examples")
    source = ROOT / "examples/cpp"
    run(cmake, "-S", source, "-B", build, f"-DCMAKE_PREFIX_PATH={prefix}")
    run(cmake, "--build", build)
    return build


KNOWS: dict[str, Any] = {"encoder": "causal", "n_items": 200, "item_loss": 1.0}
NODES: dict[str, Any] = {"legal_softmax": True, "node_outputs": True, "decoder_start": "state"}


@pytest.mark.parametrize(
    ("text", "fields"),
    [(True, {}), (False, {**KNOWS, "legal_softmax": True}), (False, {**KNOWS, **NODES})],
    ids=["text", "integers", "nodes"],
)
def test_examples_recommend_the_items_of_python(
    examples: Path, text: bool, fields: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = OneRecConfig.preset(
        "paper-tiny", codebook_size=24, session_length=3, init_std=0.3, **fields
    )
    sids = np.random.default_rng(0).integers(0, 24, (200, 3))
    sids[51:54] = sids[50]  # items that share a semantic id
    ids = [f"vidéo {i}" for i in range(200)] if text else [7 * i - 500 for i in range(200)]
    catalog = Catalog.build(ids, sids, 24)
    folder = tmp_path / "exported"
    model = OneRec(config).eval()
    if not text:
        model.set_catalog(sids)
    export(model, catalog, folder)
    recommender = Recommender(model, catalog, backend="torch")
    for places in ([], [3], [50, 52, 1, 199, 0]):
        history = [ids[i] for i in places]
        (wanted,) = recommender.recommend([history], beam_width=32, num_sessions=3)
        # An id that nobody has is left out.
        given = [str(item) for item in history] + ["12345678"]
        for name in ("recommend", "recommend_c"):
            lines = run(examples / name, folder, *given).splitlines()
            assert [line.split(" ", 1)[1] for line in lines] == [
                " ".join(map(str, session)) for session in wanted.item_ids
            ]
            scores = [float(line.split(" ", 1)[0]) for line in lines]
            np.testing.assert_allclose(scores, wanted.scores, atol=2e-3)
    for name in ("recommend", "recommend_c"):
        (folder / "catalog.bin").write_bytes(b"ONERCATL" + bytes(300))
        refused = subprocess.run([examples / name, folder], capture_output=True, text=True)
        assert refused.returncode == 1
        assert "not a valid catalog.bin" in refused.stderr
        (folder / "catalog.bin").unlink(missing_ok=True)
        refused = subprocess.run([examples / name, folder], capture_output=True, text=True)
        assert refused.returncode == 1
        assert "catalog.bin: No such file" in refused.stderr


RANK = """
#include <onerec/recommender.h>
#include <cstdio>
#include <cstdlib>
int main(int, char** argv) {  // FOLDER K BEAM_WIDTH DENSE_WEIGHT ALLOW_TAGS EXCLUDE_HISTORY
  const auto recommender = onerec::Recommender::Load(argv[1]);
  onerec::RankOptions options;
  options.k = std::atoi(argv[2]);
  options.beam_width = std::atoi(argv[3]);
  if (std::atof(argv[4]) >= 0) options.dense_weight = std::atof(argv[4]);
  options.exclude_history = std::atoi(argv[6]) != 0;
  options.allow_tags = std::strtoull(argv[5], nullptr, 10);
  for (int64_t item : recommender->Rank({51, 1, 199, 0}, {9}, options)) {
    std::printf("%ld ", static_cast<long>(recommender->IntId(item)));
  }
}
"""

RANK_C = """
#include <onerec/engine_c.h>
#include <stdio.h>
#include <stdlib.h>
int main(int argc, char** argv) {  /* as above */
  const int64_t history[] = {51, 1, 199, 0}, exclude[] = {9};
  char error[200];
  onerec_recommender* recommender = NULL;
  onerec_rank_options options = onerec_default_rank_options();
  options.k = atoi(argv[2]);
  options.beam_width = atoi(argv[3]);
  options.dense_weight = atof(argv[4]);
  options.exclude_history = atoi(argv[6]);
  options.allow_tags = strtoull(argv[5], NULL, 10);
  int64_t* items = malloc(options.k * sizeof *items);
  int64_t found = 0;
  if (argc != 7 || onerec_create(argv[1], &recommender, error, sizeof error) != ONEREC_OK) return 1;
  if (onerec_rank(recommender, history, 4, exclude, 1, &options, items, &found, error,
                  sizeof error) != ONEREC_OK) {
    return 1;
  }
  for (int64_t i = 0; i < found; ++i) printf("%ld ", (long)onerec_int_id(recommender, items[i]));
  onerec_destroy(recommender);
  free(items);
  return 0;
}
"""


@pytest.mark.parametrize("nodes", [{}, NODES], ids=["codes", "nodes"])
@pytest.mark.parametrize(("suffix", "code"), [("cc", RANK), ("c", RANK_C)], ids=["c++", "c"])
def test_rankings_are_those_of_python(
    prefix: Path, tmp_path: Path, suffix: str, code: str, nodes: dict[str, Any]
) -> None:
    compiler = shutil.which("c++" if suffix == "cc" else "cc")
    if compiler is None:
        pytest.skip("no compiler")
    torch.manual_seed(0)
    config = OneRecConfig.preset("paper-tiny", codebook_size=24, init_std=0.3, **KNOWS, **nodes)
    sids = np.random.default_rng(0).integers(0, 24, (200, 3))
    sids[51:54] = sids[50]  # items that share a semantic id
    ids = np.arange(200) * 7 - 500
    catalog = Catalog.build(ids, sids, 24).with_tags(np.arange(200) % 4 + 1)
    model = OneRec(config).eval()
    model.set_catalog(sids)
    rng = np.random.default_rng(1)
    walks, offsets = np.minimum(rng.geometric(0.02, 1200), 200) - 1, np.arange(0, 1201, 8)
    seen = np.bincount(walks, minlength=200)
    together = co_consumption(walks, offsets, 200, neighbors=9)
    counts = CountRanker(
        [
            together,
            CountPart(together.lists, np.ones(2)),
            transition(walks, offsets, 200),
            popularity(seen, neighbors=20),
            personal_frequency(200),
        ],
        seen,
    )
    mixture = Mixture(counts, *rng.uniform(-0.1, 1.0, (2, 7)))
    export(model, catalog, tmp_path / "exported", mixture=mixture)
    main = tmp_path / f"main.{suffix}"
    main.write_text(code)
    (library,) = prefix.glob("lib*/libonerec_core.so")
    flags = [f"-I{prefix}/include", f"-L{library.parent}", "-lonerec_core"]
    standard = "-std=c++17" if suffix == "cc" else "-std=c99"
    program = tmp_path / "main"
    run(compiler, standard, main, *flags, f"-Wl,-rpath,{library.parent}", "-o", program)
    recommender = Recommender(model, catalog, backend="torch", mixture=mixture)
    history, exclude = [ids[[51, 1, 199, 0]].tolist()], [[int(ids[9])]]
    for k, width, weight, tags, masked in (
        (20, 16, 0.0, None, True),
        (20, 16, 0.4, None, True),
        (90, 8, 1.0, None, False),
        (30, 16, 0.5, 4, True),
        (300, 0, 0.7, None, True),
        (20, 16, None, None, True),
        (20, 16, None, None, False),
        (10, 4, None, 4, True),
        (300, 0, None, None, False),
    ):
        (wanted,) = recommender.rank(
            history,
            k,
            beam_width=width or None,
            dense_weight=weight,
            exclude=exclude,
            exclude_history=masked,
            allow_tags=None if tags is None else [[tags.bit_length() - 1]],
        )
        numbers = [k, width, -1 if weight is None else weight, tags or 2**64 - 1, int(masked)]
        found = run(program, tmp_path / "exported", *map(str, numbers))
        assert [int(item) for item in found.split()] == wanted, (k, width, weight, tags, masked)
    (tmp_path / "exported" / "mixture.bin").write_bytes(b"ONERMIXT" + bytes(300))
    refused = subprocess.run(
        [program, tmp_path / "exported", *["5", "5", "0", "1", "1"]], capture_output=True, text=True
    )
    assert refused.returncode != 0


def test_another_minor_version_is_refused(cmake: str, prefix: Path, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.24)\nproject(p LANGUAGES CXX)\n"
        "find_package(onerec 0.99 REQUIRED)\n"
    )
    result = subprocess.run(
        [cmake, "-S", tmp_path, "-B", tmp_path / "b", f"-DCMAKE_PREFIX_PATH={prefix}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert 'compatible with requested version "0.99"' in " ".join(result.stderr.split())
