"""The files for Slurm and Kubernetes: their syntax, and every option in them against what takes it."""

import re
import shlex
import subprocess
import sys

import pytest
import yaml
from torch.distributed.run import get_args_parser

from harness import REPOSITORY
from lightning_eff.cli import lighthouse, main
from lightning_eff.cli.launch import run as launch

CLUSTERS = REPOSITORY / "examples" / "clusters"
SLURM = sorted(CLUSTERS.glob("*.sbatch"))

# Of `man sbatch`: what these files may ask for.
SBATCH = {
    "job-name": r"[\w-]+",
    "nodes": r"\d+",
    "ntasks-per-node": r"\d+",
    "gpus-per-node": r"\d+",
    "cpus-per-task": r"\d+",
    "time": r"\d+:\d\d:\d\d",
    "signal": r"SIG\w+@\d+",
    "requeue": None,
    "no-kill": None,
    "open-mode": "append",
    "output": r"\S+",
}


def commands(text: str, first: str) -> list[list[str]]:
    """The lines that begin with a word, put together and cut into words."""
    joined = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(rf"^\s*(?:srun |exec )?({re.escape(first)} .*?)(?: &)?$", joined, re.MULTILINE)
    return [shlex.split(line) for line in found]


def parses(words: list[str], monkeypatch, capsys) -> dict:
    """The config that `lightning-eff fit` would run with."""
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["lightning-eff", *words, "--print_config"])
    with pytest.raises(SystemExit) as exit:
        main()
    captured = capsys.readouterr()
    assert exit.value.code == 0, captured.err
    return yaml.safe_load(captured.out)


def names_of(config: dict) -> list[str]:
    return [each["class_path"].rpartition(".")[2] for each in config["trainer"]["callbacks"]]


@pytest.mark.parametrize("path", SLURM, ids=lambda path: path.stem)
def test_bash_and_sbatch_read_it(path):
    assert subprocess.run(["bash", "-n", str(path)], capture_output=True).stderr == b""
    lines = path.read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    options = [line.removeprefix("#SBATCH --") for line in lines if line.startswith("#SBATCH")]
    assert len(options) >= 6
    for option in options:
        name, _, value = option.partition("=")
        assert re.fullmatch(SBATCH[name] or "", value), option
    # Slurm reads no option behind the first command.
    last = max(i for i, line in enumerate(lines) if line.startswith("#SBATCH"))
    assert all(line.startswith("#") or not line for line in lines[:last])


@pytest.mark.needs("jsonargparse")
def test_slurm_s_fit_has_the_callbacks_once_and_the_signal_that_is_sent(monkeypatch, capsys):
    text = (CLUSTERS / "slurm.sbatch").read_text()
    values = {"SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "HOME": "/home/me", "SLURM_JOB_ID": "7"}
    for name, value in values.items():
        text = text.replace(f"${name}", value)
    ((_, *words),) = commands(text, "lightning-eff fit")
    config = parses(words, monkeypatch, capsys)
    names = names_of(config)
    assert len(set(names)) == len(names)
    assert {"ExactResume", "AsyncCheckpoint", "Preemption"} <= set(names)
    (preemption,) = [each for each in config["trainer"]["callbacks"] if each["class_path"].endswith("Preemption")]
    (sent,) = re.findall(r"--signal=(\w+)@", text)
    assert sent in preemption["init_args"]["signals"]
    assert (config["trainer"]["num_nodes"], str(config["trainer"]["devices"])) == (2, "4")


def test_the_fault_tolerant_job_s_commands_are_commands():
    text = (CLUSTERS / "slurm_fault_tolerant.sbatch").read_text()
    for name, value in {
        "$ADDRESS": "10.0.0.1",
        "$((4 * SLURM_NODEID))": "4",
        "$TOTAL": "16",
        "$HERE": "10.0.0.2",
    }.items():
        text = text.replace(name, value)
    ((_, _, *words),) = commands(text, "lightning-eff lighthouse")
    assert lighthouse.make_parser().parse_args(words).min_replicas == 2
    ((_, _, *words),) = commands(text, "lightning-eff launch")
    args = launch.make_parser().parse_args(words)
    assert (args.replicas, args.first_replica, args.total_replicas) == (4, 4, 16)
    assert (args.lighthouse, args.host) == ("10.0.0.1:29510", "10.0.0.2")


@pytest.mark.needs("jsonargparse")
def test_kubernetes_reads_it(monkeypatch, capsys):
    service, job = yaml.safe_load_all((CLUSTERS / "kubernetes.yaml").read_text())
    assert (service["apiVersion"], service["kind"], service["spec"]["clusterIP"]) == ("v1", "Service", "None")
    assert (job["apiVersion"], job["kind"]) == ("batch/v1", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    assert pod["restartPolicy"] in ("OnFailure", "Never")  # a Job takes no other
    assert pod["subdomain"] == service["metadata"]["name"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}
    (container,) = pod["containers"]
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}

    assert container["command"] == ["torchrun"]
    words = [word.replace("$(JOB_COMPLETION_INDEX)", "1") for word in container["args"]]
    args = get_args_parser().parse_args(words)
    assert int(args.nnodes) == spec["completions"] == spec["parallelism"]
    assert args.master_addr == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert args.shutdown_timeout < pod["terminationGracePeriodSeconds"]
    assert int(args.nproc_per_node) == container["resources"]["limits"]["nvidia.com/gpu"]
    assert (args.module, args.training_script) == (True, "lightning_eff")

    config = parses(args.training_script_args, monkeypatch, capsys)
    names = names_of(config)
    assert len(set(names)) == len(names)
    assert {"ExactResume", "AsyncCheckpoint", "Preemption"} <= set(names)
    assert config["trainer"]["num_nodes"] == int(args.nnodes)
    assert str(config["trainer"]["devices"]) == args.nproc_per_node
    assert config["ckpt_path"] == "last"
    assert config["trainer"]["logger"]["init_args"]["version"] == "gpt"
