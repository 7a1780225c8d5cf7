"""Version, changelog, classifiers, URLs and workflows agree with each other."""

from __future__ import annotations

import re
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from edgelm import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

REPO = Path(__file__).parents[2]
PROJECT = tomllib.loads((REPO / "pyproject.toml").read_text("utf-8"))["project"]
PYTHONS = ["3.10", "3.11", "3.12", "3.13"]


def workflow(name: str) -> Any:
    yaml = pytest.importorskip("yaml", reason="needs PyYAML")
    return yaml.safe_load((REPO / ".github/workflows" / name).read_text("utf-8"))


def steps(job: dict[str, Any]) -> str:
    """Return the commands and actions of a job, one per line."""
    return "\n".join(step.get("run") or step["uses"] for step in job["steps"])


def test_the_changelog_ends_with_this_version_or_with_unreleased_changes() -> None:
    headings = re.findall(r"^## \[(.+?)\](?: - (\S+))?$", (REPO / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings
    for name, day in headings[headings[0][0] == "Unreleased" :]:
        assert re.fullmatch(r"\d+\.\d+\.\d+\S*", name)
        date.fromisoformat(day)
    assert headings[0] in [("Unreleased", ""), (__version__, headings[0][1])]


def test_the_pythons_are_those_of_the_workflow() -> None:
    prefix = "Programming Language :: Python :: "
    classifiers = [each.removeprefix(prefix) for each in PROJECT["classifiers"] if each.startswith(prefix + "3.")]
    assert classifiers == PYTHONS == workflow("ci.yml")["jobs"]["test"]["strategy"]["matrix"]["python"]
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_the_urls_are_those_of_one_repository() -> None:
    urls = PROJECT["urls"]
    assert {"Homepage", "Documentation", "Changelog", "Issues"} == set(urls)
    assert all(url == urls["Homepage"] or url.startswith(urls["Homepage"] + "/") for url in urls.values())
    for url in urls.values():
        path = url.partition("/blob/main/")[2]
        assert not path or (REPO / path).is_file()


def test_ci_does_what_the_script_of_ci_does() -> None:
    script = (REPO / ".ci/run").read_text("utf-8")
    jobs = workflow("ci.yml")["jobs"]
    assert ".ci/run" in steps(jobs["debian"])
    for target in re.findall(r"^make (\w+)$", script, re.MULTILINE):
        assert f"make {target} " in steps(jobs["test"])
    installed = set(steps(jobs["test"]).split())
    packages = set(re.findall(r"[a-z][\w-]+", script.rpartition("--no-install-recommends")[2].partition("\n\n")[0]))
    assert packages - installed <= {"git", "make", "python3", "python3-pip", "python3-venv"}


def test_a_release_is_tested_built_and_published_without_a_password() -> None:
    release = workflow("release.yml")
    jobs = release["jobs"]
    assert release[True] == {"push": {"tags": ["v*"]}}  # YAML 1.1 reads the key `on` as true
    assert jobs["test"]["uses"] == "./.github/workflows/ci.yml"
    assert "workflow_call" in workflow("ci.yml")[True]
    assert [jobs[name]["needs"] for name in ("build", "publish")] == ["test", "build"]
    assert "make dist docs sbom" in steps(jobs["build"])
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert "pypa/gh-action-pypi-publish@" in steps(jobs["publish"])
    assert "secrets" not in str(jobs)
    assert release["permissions"] == {"contents": "read"}
