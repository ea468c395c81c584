import json
import shutil
import sys
from importlib import metadata

import pytest
import sklearn  # noqa: F401  (sets environment variables when it is imported, which would pass for a leak of a test)
import torch

from lightning_eff import __version__, kernels
from lightning_eff.cli import environment, main


@pytest.fixture
def doctor(capsys, monkeypatch):
    """Run `lightning-eff doctor` in this process: its exit status and what it printed."""
    monkeypatch.setenv("COLUMNS", "80")

    def doctor(*args):
        status = main(["doctor", *args])
        return status, capsys.readouterr().out

    return doctor


@pytest.fixture
def versions(monkeypatch):
    """Pretend that packages have other versions, or (None) are not installed."""
    real = metadata.version

    def set_versions(**fake):
        def version(name):
            if name in fake and fake[name] is None:
                raise metadata.PackageNotFoundError(name)
            return fake.get(name) or real(name)

        monkeypatch.setattr(metadata, "version", version)

    return set_versions


def by_name(report):
    return {package["name"]: package for package in report["packages"]}


@pytest.mark.needs("rich")
def test_report_of_this_environment(doctor):
    status, out = doctor()
    assert status == 0
    assert out.startswith(f"lightning-eff {__version__} on ")
    assert out.endswith("Everything that is required is there.\n")
    assert metadata.version("torch") in out
    assert "gloo      yes" in out
    assert "grad_norm" in out
    # The commands alone may be longer: they stay in one piece.
    assert max(len(line) for line in out.splitlines() if "pip install" not in line) <= 80


def test_json_holds_the_same(doctor):
    status, out = doctor("--json")
    report = json.loads(out)
    assert status == 0
    assert report["ok"] is True
    assert report["problems"] == []
    packages = by_name(report)
    assert next(iter(packages)) == "python"
    required = {name for name, package in packages.items() if package["extra"] is None}
    assert {"python", "lightning", "torch", "torchmetrics"} <= required
    assert {"triton", "tensorboard", "jsonargparse", "rich", "torchft"} <= set(packages)
    assert packages["lightning"]["supported"] == ">=2.6,<3"
    assert packages["torch"] == {
        "name": "torch",
        "state": "ok",
        "installed": metadata.version("torch"),
        "supported": packages["torch"]["supported"],
        "extra": None,
        "detail": "",
        "command": None,
    }
    assert packages["tensorboard"]["extra"] == "tensorboard"  # and not the extra `examples`, which repeats it
    assert report["devices"][-1]["device"] == "cpu"
    assert report["distributed"]["gloo"] is True
    on_cpu = [row for row in report["kernels"] if row["device"] == "cpu"]
    assert [row["op"] for row in on_cpu] == [row.op for row in kernels.status("cpu")]


def test_a_missing_extra_is_no_failure_and_its_command_is_given(doctor, versions):
    versions(tensorboard=None, torchft=None)
    status, out = doctor()
    assert status == 0
    assert "To get tensorboard: pip install 'lightning-eff[tensorboard]'\n" in out
    assert "To get torchft: pip install 'lightning-eff[ft]'\n" in out


def test_a_required_package_out_of_range_fails(doctor, versions):
    versions(torchmetrics="0.1.0")
    status, out = doctor()
    assert status == 1
    assert "Problem: torchmetrics 0.1.0 is outside of the supported range >=1.4\n" in out
    assert "To get torchmetrics: pip install 'torchmetrics>=1.4'\n" in out
    assert "Everything" not in out


def test_a_missing_required_package_fails(doctor, versions):
    versions(torchmetrics=None)
    status, out = doctor("--json")
    report = json.loads(out)
    assert status == 1
    assert report["problems"] == ["torchmetrics is not installed"]
    assert by_name(report)["torchmetrics"]["command"] == "pip install 'torchmetrics>=1.4'"


def test_a_package_that_cannot_be_imported_is_broken(doctor, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    status, out = doctor()
    assert status == 1
    assert f"Problem: torchmetrics {metadata.version('torchmetrics')} cannot be imported: ModuleNotFoundError" in out
    assert "pip install --force-reinstall 'torchmetrics>=1.4'" in out


def test_what_is_wrong_with_an_extra_is_a_note(doctor, versions):
    versions(tensorboard="1.15.0")
    status, out = doctor()
    assert status == 0
    assert "Note: tensorboard 1.15.0 is outside of the supported range >=2.14\n" in out
    assert "To get tensorboard: pip install 'tensorboard>=2.14'\n" in out


def test_run_from_sources_that_are_not_installed(doctor, versions, monkeypatch):
    def not_installed(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "metadata", not_installed)
    status, out = doctor()
    assert status == 1
    assert "lightning-eff is not installed" in out


def test_a_pre_release_and_a_local_version_are_in_range(versions):
    versions(torch="2.99.0.dev20260101+cu130")
    assert {package.name: package.state for package in environment.packages()}["torch"] == "ok"


def test_a_package_of_another_platform_is_not_asked_for(monkeypatch, versions):
    versions(torchft=None)
    requires = ['torchft>=0.2.0; (platform_system == "Nowhere") and extra == "ft"']
    monkeypatch.setattr(metadata, "requires", lambda name: requires)
    (package,) = environment.packages()
    assert package.state == "not for this platform"
    assert package.command is None


def test_an_old_python_is_reported(monkeypatch):
    monkeypatch.setattr(environment.platform, "python_version", lambda: "3.9.1")
    assert environment.python().state == "unsupported"


def test_a_gpu_that_this_torch_cannot_use_is_reported(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(shutil, "which", lambda tool: "/usr/bin/nvidia-smi" if tool == "nvidia-smi" else None)
    gpu = environment.devices()[0]
    assert (gpu.device, gpu.name) == ("gpu", "not usable")
    assert "built without GPU support" in gpu.detail


def test_a_driver_that_does_not_work_is_reported_in_torchs_words(monkeypatch):
    def is_available():
        import warnings

        warnings.warn("The NVIDIA driver on your system is too old.\nUpdate it.", stacklevel=2)
        return False

    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    detail = environment.devices()[0].detail
    assert detail == "torch is built for CUDA 12.8, but The NVIDIA driver on your system is too old."


def test_kernels_are_listed_for_both_devices_of_a_gpu_machine(doctor, monkeypatch):
    row = kernels.OpStatus("an_op", "triton", "for a test")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(kernels, "status", lambda device: [row])
    _, out = doctor("--json")
    assert [kernel["device"] for kernel in json.loads(out)["kernels"]] == ["cuda", "cpu"]


def test_a_wrong_environment_variable_is_a_problem(doctor, monkeypatch):
    monkeypatch.setenv("LIGHTNING_EFF_KERNELS", "fast")
    status, out = doctor()
    assert status == 1
    assert "Problem: kernels: LIGHTNING_EFF_KERNELS='fast' is not allowed" in out


def test_compile_shows_what_the_kernels_take(doctor, monkeypatch):
    # The compilation itself has tests beside the kernels.
    row = kernels.CompiledKernel(
        op="grad_norm",
        kernel="sum_of_squares",
        target="cuda:90",
        num_warps=4,
        registers=32,
        shared=16,
        spills=None,
        wide_loads=1,
        wide_loads_expected=1,
    )
    monkeypatch.setattr(kernels, "compile_report", lambda target: [row] if target == "cuda:90" else [])
    status, out = doctor("--compile", "cuda:90")
    assert status == 0
    assert "Kernels compiled for cuda:90" in out
    (line,) = [line for line in out.splitlines() if "sum_of_squares" in line]
    assert line.split() == ["grad_norm", "sum_of_squares", "4", "32", "16", "-"]
    _, out = doctor("--compile=cuda:90", "--json")
    assert json.loads(out)["compiled"] == [row._asdict()]


def test_kernels_that_do_not_compile_are_a_problem_of_one_line(doctor, monkeypatch, tmp_path):
    # What the compiler's process cannot import, as on a machine without Triton.
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['triton'] = None\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, out = doctor("--compile", "cuda:90", "--json")
    (problem,) = json.loads(out)["problems"]
    assert status == 1
    assert problem.startswith("kernels: compiling the kernels for cuda:90 failed: ")
    assert problem.count("\n") == 0
    assert "triton" in problem
    assert "Traceback" not in problem


def test_a_target_that_does_not_exist_is_refused_with_those_that_do(doctor, capsys):
    with pytest.raises(SystemExit, match="2"):
        doctor("--compile", "cuda:99")
    assert "cuda:99 is no target. Did you mean `cuda:90`? There are cuda:75, cuda:80" in capsys.readouterr().err
