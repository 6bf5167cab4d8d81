"""The files of examples/deploy name what there is: flags, routes, verbs, files, extras."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from onerec.cli.command import parse_command
from onerec.cli.main import VERBS
from onerec.pipeline.settings import SECTIONS
from onerec.serving.config import ServeConfig

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "examples" / "deploy"
MANIFEST = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")))
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
FLAGS = {field.name for field in dataclasses.fields(ServeConfig)}


def of_kind(kind: str) -> dict[str, Any]:
    (found,) = [one for one in MANIFEST if one["kind"] == kind]
    return dict(found)


def check_serve_flags(arguments: list[str]) -> None:
    given = dict(zip(arguments[::2], arguments[1::2], strict=True))
    assert {name.removeprefix("--") for name in given} <= FLAGS
    values = {name.removeprefix("--"): yaml.safe_load(value) for name, value in given.items()}
    ServeConfig(**values)


def test_the_manifest_fits_the_server() -> None:
    pod = of_kind("Deployment")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    check_serve_flags(container["args"])
    paths = {container[f"{probe}Probe"]["httpGet"]["path"] for probe in ("startup", "liveness")}
    app = (ROOT / "onerec" / "serving" / "app.py").read_text(encoding="utf-8")
    for path in (*paths, container["readinessProbe"]["httpGet"]["path"], "/metrics"):
        assert f'@app.get("{path}"' in app
    tokens = {variable["name"] for variable in container["env"]}
    assert tokens == {"ONEREC_TOKEN", "ONEREC_ADMIN_TOKEN"}
    drain = int(container["args"][container["args"].index("--drain_seconds") + 1])
    wait = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > drain + wait
    labels = of_kind("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert of_kind("Service")["spec"]["selector"] == labels
    assert of_kind("PodDisruptionBudget")["spec"]["selector"]["matchLabels"] == labels
    assert {one["name"] for one in container["volumeMounts"]} == {v["name"] for v in pod["volumes"]}


def test_the_manifest_is_valid_kubernetes() -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    for one in MANIFEST:
        validate.validate(one, "1.37", strict=True)


def test_compose_names_images_and_commands_that_there_are() -> None:
    services = COMPOSE["services"]
    for service in services.values():
        build = service.get("build")
        if build is not None:
            assert (DEPLOY / build["context"]).resolve() == ROOT
            assert (ROOT / build["dockerfile"]).is_file()
    check_serve_flags(services["serve"]["command"])
    verb, *arguments = services["train"]["command"]
    command = parse_command(verb, "", arguments, list(SECTIONS), data=True, stored=False)
    assert command.out == Path("/runs/mine")
    assert services["export"]["command"] == ["export", "/runs/mine"]
    assert services["serve"]["volumes"] == ["../../runs/mine/export:/export:ro"]


@pytest.mark.parametrize("name", ["Dockerfile.serve", "Dockerfile.train"])
def test_a_dockerfile_names_what_there_is(name: str) -> None:
    text = (DEPLOY / name).read_text(encoding="utf-8")
    steps = re.sub(r"\\\n", " ", text)
    for source in re.findall(r"^COPY --from=build /src/(\S+)", steps, re.M):
        assert (ROOT / source).exists()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (extras,) = re.findall(r"\.whl\)\[([\w,]+)\]", steps)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    entry = json.loads(re.findall(r"^ENTRYPOINT (.*)$", steps, re.M)[0])
    command = [json.loads(one) for one in re.findall(r"^CMD (\[.*\])$", steps, re.M)]
    program, verb, *arguments = [*entry, *(command[0] if command else [])]
    assert program == "onerec"
    assert verb in VERBS
    if verb == "serve":
        check_serve_flags(arguments[1:])
    else:
        parse_command(verb, "", arguments, list(SECTIONS), data=True, stored=False)
    assert "USER onerec" in steps
    assert shlex.split(text.splitlines()[0].partition(": ")[2])[:3] == [
        "docker",
        "build",
        "-f",
    ]
