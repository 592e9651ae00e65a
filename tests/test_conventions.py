"""What people expect of a repository is there and fits: metadata, workflows, citation, changelog, contributing."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import pytest

from disttempnet import __version__
from disttempnet.cli.main import build_parser

ROOT = Path(__file__).parents[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ISSUES = ROOT / ".github" / "ISSUE_TEMPLATE"
yaml = pytest.importorskip("yaml")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z][\w-]*):", read("Makefile"), re.MULTILINE))


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_commands_that_exist(path: Path) -> None:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert workflow["jobs"]
    for job in workflow["jobs"].values():
        assert job["timeout-minutes"]
        commands = [step["run"] for step in job["steps"] if "run" in step]
        assert commands
        for line in "\n".join(commands).splitlines():
            program, *words = shlex.split(line)
            if program == "make":
                assert set(words) <= make_targets(), line
            else:
                assert os.access(ROOT / program, os.X_OK), line


def test_all_supported_pythons_are_tested_and_declared() -> None:
    project = tomllib.loads(read("pyproject.toml"))["project"]
    declared = {one.rpartition(" ")[2] for one in project["classifiers"] if re.search(r":: 3\.\d+$", one)}
    assert declared == {"3.11", "3.12", "3.13", "3.14"}
    jobs = yaml.safe_load(read(".github/workflows/tests.yml"))["jobs"]
    first = {
        step["with"]["python-version"]
        for step in jobs["constraints"]["steps"]
        if "setup-python" in step.get("uses", "")
    }
    assert first | set(jobs["python"]["strategy"]["matrix"]["python"]) == declared
    assert project["requires-python"] == ">=3.11"
    assert len(project["keywords"]) >= 5


def test_the_wheels_check_uses_what_is_shipped() -> None:
    script = read("tools/check_wheel.sh")
    subprocess.run(["bash", "-n", str(ROOT / "tools" / "check_wheel.sh")], check=True)
    assert "demo --help" in script
    parser = build_parser()
    calls = re.findall(r'^"\$program" (.+?)(?: >.*)?$', script, re.MULTILINE)
    assert len(calls) >= 6
    for call in calls:
        if "--help" not in call:
            parser.parse_known_args(shlex.split(call))
    shipped = {path.stem for path in (ROOT / "src/disttempnet/configs").glob("*.toml")}
    assert {"debug", "cc12m_vitb32_v1_corrected", "compare"} <= shipped


def test_the_citation_parses_and_has_the_papers() -> None:
    citation = yaml.safe_load(read("CITATION.cff"))
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == __version__
    assert {"title", "message", "authors", "license"} <= citation.keys()
    papers = [citation["preferred-citation"], *citation["references"]]
    numbers = {one["identifiers"][0]["value"].removeprefix("arXiv:") for one in papers}
    assert numbers == {"2404.04575", "2407.01445", "2305.11965", "2202.12387"}
    for paper in papers:
        assert {"type", "title", "authors", "year"} <= paper.keys()
        assert all({"given-names", "family-names"} == author.keys() for author in paper["authors"])


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog 1.1: a section a version, in it the kinds of changes, in each a list."""
    text = read("CHANGELOG.md")
    assert "keepachangelog.com" in text
    versions = re.findall(r"^## (.+)$", text, re.MULTILINE)
    assert versions[0] == "[Unreleased]"
    for version in versions[1:]:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d{2}-\d{2}", version), version
    kinds = re.findall(r"^### (.+)$", text, re.MULTILINE)
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert len(kinds) == len(set(kinds)) or len(versions) > 1, "a kind of change stands once in a version"


def test_contributing_names_commands_and_files_that_exist() -> None:
    text = read("CONTRIBUTING.md")
    assert len(text.splitlines()) < 90, "one page"
    for target in re.findall(r"\bmake\s+([a-z][\w-]*)", text):
        assert target in make_targets(), target
    for path in re.findall(r"\]\(([^)]+)\)|`((?:tools|docs|tests)/[\w/.-]+)`", text):
        assert (ROOT / (path[0] or path[1])).exists(), path
    for path in ("losses/registry.py", "evaluation/tasks.toml"):
        assert path in text
        assert (ROOT / "src" / "disttempnet" / path).is_file()


def test_security_says_what_the_code_does() -> None:
    text = read("SECURITY.md")
    for word in ("weights_only=True", "auto_map", "pipe:", "XDG_CACHE_HOME"):
        assert word in text
    assert (ROOT / "tests" / "fuzz").is_dir()
    oldest = tomllib.loads(read("pyproject.toml"))["project"]["dependencies"]
    for package, version in re.findall(r"\b(torch|timm) ([\d.]+\d)", text):
        assert f"{package}>={version}" in oldest


def test_issue_forms_parse_and_ask_for_env() -> None:
    forms = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in ISSUES.glob("*.yml")}
    labels = [part["attributes"]["label"] for part in forms["fault"]["body"]]
    assert "Output of `disttempnet env`" in labels
    required = {part["id"] for part in forms["fault"]["body"] if part.get("validations", {}).get("required")}
    assert {"what", "command", "env"} <= required
    for name, form in forms.items():
        assert name == "config" or {"name", "description", "body"} <= form.keys()


def test_pre_commit_calls_tools_that_are_there() -> None:
    (repository,) = yaml.safe_load(read(".pre-commit-config.yaml"))["repos"]
    for hook in repository["hooks"]:
        assert hook["language"] == "system"
        program, *words = shlex.split(hook["entry"])
        assert program.startswith(".venv/bin/")
        assert all((ROOT / word).is_file() for word in words if word.startswith("tools/"))
