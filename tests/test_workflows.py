"""The workflows of CI: their syntax, and everything in them that the repository can check without running them."""

import re

import pytest
import yaml

from harness import REPOSITORY

WORKFLOWS = sorted((REPOSITORY / ".github" / "workflows").glob("*.yml"))
MAKEFILE = (REPOSITORY / "Makefile").read_text()


def read(path):
    found = yaml.safe_load(path.read_text())
    found["on"] = found.pop(True)  # YAML 1.1 reads the key `on` so
    return found


def steps_of(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_it_is_a_workflow(path):
    workflow = read(path)
    assert set(workflow) <= {"name", "on", "permissions", "concurrency", "env", "jobs"}
    assert workflow["permissions"] == {"contents": "read"}  # and a job asks for what it needs besides
    known = {"runs-on", "timeout-minutes", "strategy", "steps", "needs", "environment", "permissions"}
    for name, job in workflow["jobs"].items():
        assert set(job) <= known, name
        assert {"runs-on", "timeout-minutes", "steps"} <= set(job), name
        assert job.get("needs", name) in workflow["jobs"]
        for step in job["steps"]:
            assert ("uses" in step) != ("run" in step)
            assert set(step) <= {"uses", "run", "with", "env"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_and_commands_are_targets(path):
    workflow = read(path)
    for step in steps_of(workflow):
        if "uses" in step:
            assert re.fullmatch(r"[\w-]+/[\w-]+@(v\d+\.\d+\.\d+|[0-9a-f]{40})", step["uses"])
        for target in re.findall(r"\bmake ([\w-]+)", step.get("run", "")):
            assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE), target
    text = path.read_text()
    for variable in re.findall(r"\bmatrix\.(\w+)", text):
        assert any(variable in str(job.get("strategy")) for job in workflow["jobs"].values())
    for variable in re.findall(r"(\w+)=", " ".join(re.findall(r"run: make (.*)", text))):
        assert f"$({variable})" in MAKEFILE


def test_ci_has_its_jobs_for_every_python_that_is_claimed():
    jobs = read(REPOSITORY / ".github" / "workflows" / "ci.yml")["jobs"]
    assert set(jobs) == {"lint", "test", "tutorials", "docs", "package"}
    project = (REPOSITORY / "pyproject.toml").read_text()
    claimed = re.findall(r"Python :: (3\.\d+)", project)
    tested = jobs["test"]["strategy"]["matrix"]["include"]
    assert [each["python"] for each in tested] == jobs["package"]["strategy"]["matrix"]["python"] == claimed
    assert f'requires-python = ">={claimed[0]}"' in project
    for target in {each["target"] for each in tested}:
        assert re.search(rf"^{target}:", MAKEFILE, re.MULTILINE)


def test_a_release_is_built_with_its_address():
    (step,) = [step for step in steps_of(read(REPOSITORY / ".github" / "workflows" / "release.yml")) if "env" in step]
    assert step["run"].startswith("make test-package")
    assert step["env"] == {"PROJECT_URL": "${{ github.server_url }}/${{ github.repository }}"}
    assert "PROJECT_URL" in (REPOSITORY / "hatch_build.py").read_text()


def test_only_uploads_can_prove_who_they_are_and_people_stand_before_them():
    jobs = read(REPOSITORY / ".github" / "workflows" / "release.yml")["jobs"]
    trusted = {name for name, job in jobs.items() if "permissions" in job}
    assert trusted == {name for name, job in jobs.items() if "environment" in job} == {"rehearsal", "upload"}
    for name in trusted:
        assert jobs[name]["permissions"] == {"id-token": "write"}
        assert not any("run" in step for step in jobs[name]["steps"])  # nothing is built where it may be uploaded
