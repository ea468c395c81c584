import json
import os
import re
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.demos.boring_classes import BoringModel
from safetensors.torch import save_file
from torch.nn.parallel import DistributedDataParallel

from examples.gpt.model import GPT, GPTConfig
from harness import REPOSITORY
from lightning_eff.cli import main
from lightning_eff.compression import all_compressors
from tests.cli import run_without

GPT_CLASS = "examples.gpt.module.GPTModule"
SMALL = ["--model.config.n_embd=64", "--model.config.n_layer=2"]


@pytest.fixture
def advise(capsys, monkeypatch):
    """Run `lightning-eff advise link` in this process: its exit status, and what it printed."""
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", list(sys.path))

    def advise(*args):
        status = main(["advise", "link", *args])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return advise


@pytest.mark.needs("jsonargparse")
def test_a_slow_link_that_is_not_here(advise):
    status, out, err = advise("--link=50", "--compute=0.5", f"--model={GPT_CLASS}", *SMALL)

    assert status == 0
    assert err.startswith("compressing random gradients of the model's shapes with each compressor ...\n  ddp\n  ddp_")
    assert "Link: 2 ranks, 50 Mbit/s out of each rank, 0.5 ms a collective (as given, not measured)" in out
    assert "Model: 0.1317 M parameters, 14 matrices, 10 vectors (GPTModule)" in out
    assert "All-reduce, as measured" not in out
    for name in all_compressors():
        assert f"\nddp_{name} " in out


@pytest.mark.needs("jsonargparse")
@pytest.mark.parametrize(
    ("mbit", "compute", "advice"), [(1e7, 0.5, 'stay with strategy="ddp"'), (50, 0.1, "strategy=")]
)
def test_the_advice_follows_the_link(advise, mbit, compute, advice):
    model = [f"--model={GPT_CLASS}", "--model.config.n_embd=256"]
    status, out, _ = advise(f"--link={mbit}", "--latency=0.01", f"--compute={compute}", *model)

    assert status == 0
    assert f"Advice: {advice}" in out
    changed = "It changes the gradients" in out
    assert changed == (mbit == 50)
    assert "Without --compute" not in out


@pytest.mark.needs("jsonargparse")
def test_without_a_time_of_the_computation_it_is_about_communication(advise):
    status, out, _ = advise("--link=50", f"--model={GPT_CLASS}", *SMALL)

    assert status == 0
    assert "communication, s" in out
    assert "Without --compute this is about the communication alone" in out


@pytest.mark.needs("jsonargparse")
def test_json_holds_the_same(advise):
    status, out, _ = advise("--link=200", "--ranks=4", "--latency=2", "--json", f"--model={GPT_CLASS}", *SMALL)
    report = json.loads(out)

    assert status == 0
    assert report["link"] == {"world_size": 4, "bandwidth": 25e6, "latency": 0.002}
    assert report["parameters"] == 131_712
    assert [each["strategy"] for each in report["forecasts"]] == ["ddp", *(f"ddp_{n}" for n in all_compressors())]
    assert report["forecasts"][0]["bytes_sent"] == 1.5 * 4 * 131_712
    assert report["advice"] in [each["strategy"] for each in report["forecasts"]]


@pytest.mark.needs("jsonargparse")
def test_a_config_and_its_class(advise, tmp_path, capsys):
    (tmp_path / "run.yaml").write_text(f"""
trainer: {{max_steps: 3}}
model:
  class_path: {GPT_CLASS}
  init_args:
    config: {{n_embd: 64, n_layer: 2}}
data: examples.gpt.data.TextDataModule
""")
    (tmp_path / "arguments.yaml").write_text("model: {config: {n_embd: 64, n_layer: 2}}\n")
    for arguments in (
        [f"--config={tmp_path}/run.yaml"],
        [f"--config={tmp_path}/arguments.yaml", f"--model={GPT_CLASS}"],
        [f"--config={tmp_path}/arguments.yaml", f"--model={GPT_CLASS}", "--model.lr=3"],
    ):
        status, out, _ = advise("--link=50", *arguments)
        assert status == 0
        assert "Model: 0.1317 M parameters" in out

    with pytest.raises(SystemExit, match="2"):
        advise("--link=50", f"--config={tmp_path}/arguments.yaml")
    assert (
        f"{tmp_path}/arguments.yaml does not say the class of the model: name it with --model."
        in capsys.readouterr().err
    )


@pytest.mark.parametrize("kind", ["ckpt", "safetensors"])
def test_a_checkpoint(advise, tmp_path, kind):
    state = GPT(GPTConfig(n_embd=64, n_layer=2)).state_dict()
    if kind == "ckpt":
        torch.save({"state_dict": state | {"count": torch.tensor(3)}, "global_step": 5}, tmp_path / "last.ckpt")
    else:
        save_file(state, tmp_path / "last.safetensors")

    status, out, _ = advise("--link=50", f"--checkpoint={tmp_path}/last.{kind}")

    assert status == 0
    assert f"Model: 0.1317 M parameters, 14 matrices, 10 vectors ({tmp_path}/last.{kind}, all of its" in out


class Frozen(BoringModel):
    def __init__(self):
        super().__init__()
        self.requires_grad_(False)


class ReadsItsWeights(BoringModel):
    """Cannot be built on the meta device."""

    def __init__(self):
        super().__init__()
        self.largest = self.layer.weight.max().item()


@pytest.mark.needs("jsonargparse")
def test_arguments_that_a_model_must_have(advise):
    status, out, _ = advise("--link=50", f"--model={Chain.__module__}.Chain", "--model.width=8", "--model.layers", "2")

    assert status == 0
    assert "2 matrices, 0 vectors (Chain)" in out


@pytest.mark.needs("jsonargparse")
def test_a_model_that_must_have_its_weights(advise):
    status, out, _ = advise("--link=50", f"--model={ReadsItsWeights.__module__}.ReadsItsWeights")

    assert status == 0
    assert "1 matrices, 1 vectors (ReadsItsWeights)" in out


@pytest.mark.needs("jsonargparse")
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([f"--model={Frozen.__module__}.Frozen"], "the model has no trainable parameters"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
        (["--checkpoint=nowhere.ckpt"], "nowhere.ckpt: no such file or folder"),
    ],
)
def test_what_cannot_be_read_is_said_before_anything_is_measured(advise, args, message):
    status, out, err = advise("--link=50", *args)

    assert (status, out) == (1, "")
    assert err.startswith("lightning-eff advise link: ")
    assert re.search(message, err)
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--bad", "3"], "unrecognized arguments: --bad 3"),
        (["--model.lr=3"], "unrecognized arguments: --model.lr=3"),
        (["--model=x.Y", "--lr", "3"], "unrecognized arguments: --lr"),
        (["--model=x.Y", "--checkpoint=z"], "--checkpoint excludes --model and --config"),
        (["--latency=3"], "--latency has an effect only with --link"),
        (["--link=50", "--compute=0"], "--compute=0.0 is not allowed"),
        (["--link=50", "--ranks=1"], "--ranks=1 is not allowed: a link has at least 2 ranks"),
        pytest.param(
            ["--link=50", "--model=nonsense.Foo"],
            "the model cannot be built: No module named 'nonsense'",
            marks=pytest.mark.needs("jsonargparse"),
        ),
        pytest.param(
            ["--link=50", f"--model={GPT_CLASS}", "--model.config.n_embd=255"],
            "n_embd (255) must be a multiple of",
            marks=pytest.mark.needs("jsonargparse"),
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(advise, capsys, args, message):
    with pytest.raises(SystemExit) as exit:
        advise(*args)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
def test_it_measures_between_processes_of_its_own(tmp_path):
    command = [
        sys.executable,
        "-m",
        "lightning_eff",
        "advise",
        "link",
        "--ranks=2",
        "--budget=1",
        "--json",
        "--backend=gloo",
    ]
    command += [f"--model={GPT_CLASS}", *SMALL]
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True, env=environment)
    report = json.loads(done.stdout)

    assert report["link"]["world_size"] == 2
    assert report["link"]["bandwidth"] > 1e6
    assert [sample["payload"] for sample in report["samples"]][:3] == [4, 32, 256]


def _advise_under_torchrun():
    """As torchrun runs it: every rank the same command line, in a process without a group."""
    import contextlib
    import io

    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        status = main(["advise", "link", "--budget=1", "--backend=gloo", f"--model={GPT_CLASS}", *SMALL])
    return status, printed.getvalue()


@pytest.mark.needs("jsonargparse")
def test_torchruns_ranks_measure_together_and_the_first_one_prints(pool):
    (status0, out0), (status1, out1) = pool.using(process_group=False).run(_advise_under_torchrun)

    assert (status0, status1, out1) == (0, 0, "")
    assert "(measured between torchrun's ranks, gloo)" in out0
    assert "All-reduce, as measured" in out0
    assert "Advice: " in out0


@pytest.mark.needs("jsonargparse")
def test_without_the_cli_extra_a_model_class_names_it(tmp_path):
    code = "from lightning_eff.cli import main; sys.exit(main(['advise', 'link', '--link=50', '--model=x.Y']))"
    status, out, err = run_without(["jsonargparse"], code, tmp_path)

    assert (status, out) == (1, "")
    assert "lightning-eff advise --model: jsonargparse cannot be found" in err


# --- a prediction, and what then happens ------------------------------------------------------------------------------

TOLERANCE = 0.25


def _measured_steps(width, layers, names):
    """Seconds of DDP's fastest step with each compressor, on a model whose computation is next to nothing."""
    from lightning_eff.compression.comm_hook import CompressedReduction, hook
    from lightning_eff.compression.plan import bucket_cap_mb

    seconds = {}
    for name in names:
        torch.manual_seed(0)
        net = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))
        cap = 25 if name == "ddp" else bucket_cap_mb(4 * layers * width**2)
        model = DistributedDataParallel(net, bucket_cap_mb=cap)
        if name != "ddp":
            compressor = all_compressors()[name.removeprefix("ddp_")]
            reduction = CompressedReduction(compressor, dict(net.named_parameters()), lambda: 1)
            model.register_comm_hook(reduction, hook)
        times = []
        for _ in range(7):
            dist.barrier()
            start = time.perf_counter()
            model(torch.randn(1, width)).sum().backward()
            times.append(time.perf_counter() - start)
        seconds[name] = min(times[2:])
    return seconds


class Chain(BoringModel):
    def __init__(self, width: int, layers: int):
        super().__init__()
        self.layer = torch.nn.Sequential(*(torch.nn.Linear(width, width, bias=False) for _ in range(layers)))


@pytest.mark.slow
@pytest.mark.timeout(400)
@pytest.mark.skipif(os.getloadavg()[0] > 1 + (os.cpu_count() or 1), reason="other work on this machine: no timings")
@pytest.mark.parametrize("mbit", [50, 200])
def test_the_prediction_is_within_a_quarter_of_what_is_then_measured(network, mbit):
    net = network(2, mbit)
    arguments = [f"--model={Chain.__module__}.Chain", "--model.width=512", "--model.layers=4"]

    command = [sys.executable, "-m", "lightning_eff", "advise", "link", "--budget=5", "--json", *arguments]
    ranks = [net.popen(rank, command, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY) for rank in range(2)]
    outs = [rank.communicate(timeout=120)[0] for rank in ranks]
    report = json.loads(outs[0])
    predicted = {each["strategy"]: each["step"] for each in report["forecasts"]}
    measured = net.run(_measured_steps, 512, 4, ["ddp", "ddp_bf16", "ddp_int8", "ddp_arc_topk"])[0]

    assert ([rank.returncode for rank in ranks], outs[1]) == ([0, 0], "")
    assert report["link"]["bandwidth"] * 8e-6 == pytest.approx(mbit, rel=0.12)
    for name, seconds in measured.items():
        assert predicted[name] == pytest.approx(seconds, rel=TOLERANCE), name
