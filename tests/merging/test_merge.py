import json
import signal
import subprocess
import sys
from importlib import metadata

import pytest
import torch
from packaging.version import Version
from safetensors.torch import save_file

from harness.memory import GIVES_BACK
from harness.processes import environment
from lightning_eff.merging import Merger, open_source, write_merged
from tests.merging.plain import save_plain


def test_a_failure_in_the_middle_leaves_nothing(tmp_path):
    paths = save_plain(tmp_path, 3)
    for name in ("merged.ckpt", "merged.safetensors"):
        merger = Merger([open_source(path) for path in paths])

        def fail(amount):
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            write_merged(merger, [0.2, 0.3, 0.5], tmp_path / name, progress=fail)
    assert sorted(tmp_path.iterdir()) == paths


_SLOW = """
import sys, time
from pathlib import Path
from lightning_eff.merging import Merger, open_source, write_merged
folder = Path(sys.argv[1])
def wait(amount):
    print("merging", flush=True)
    time.sleep(60)
write_merged(Merger([open_source(folder / f"{i}.pt") for i in range(3)]), [0.2, 0.3, 0.5], folder / "m.safetensors",
             progress=wait)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_kill_in_the_middle_leaves_no_output(tmp_path, number):
    paths = save_plain(tmp_path, 3)
    process = subprocess.Popen([sys.executable, "-c", _SLOW, str(tmp_path)], stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"merging\n"
    process.send_signal(number)
    process.wait(timeout=30)
    process.stdout.close()
    assert not (tmp_path / "m.safetensors").exists()
    if number == signal.SIGTERM:
        assert process.returncode == 143
        assert sorted(tmp_path.iterdir()) == paths


# --- memory ---------------------------------------------------------------------------------------------------------

_MEASURED = """
import json, sys
from pathlib import Path
from harness.memory import peak_resident
from lightning_eff.functional.averaging import uniform_weights
from lightning_eff.merging import Merger, open_source, write_merged
folder = Path(sys.argv[1])
def peak(paths, name):
    merger = Merger([open_source(path) for path in paths])
    write_merged(merger, uniform_weights(range(len(paths))), folder / name, overwrite=True)
    return peak_resident() / 2**20
big = sorted(folder.glob("big*"))
before = max(peak(list(folder.glob("small*")), "out" + suffix) for suffix in (".ckpt", ".safetensors"))
merges = [(".ckpt", 2), (".ckpt", 6), (".safetensors", 2), (".safetensors", 6)]
print(json.dumps([peak(big[:count], "out" + suffix) - before for suffix, count in merges]))
"""


@pytest.mark.parametrize("kind", ["pt", "safetensors"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak, and the dropping of pages, are Linux's")
def test_memory_is_about_one_model_whatever_the_number_of_files(tmp_path, kind):
    layers, mib = 15, 4  # a model of 60 MiB
    save = torch.save if kind == "pt" else save_file
    save({"w": torch.ones(4)}, tmp_path / f"small.{kind}")
    for i in range(6):
        save({f"layer{j}": torch.full((mib << 18,), float(i)) for j in range(layers)}, tmp_path / f"big{i}.{kind}")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
        env=environment(**GIVES_BACK),
    )
    ckpt_2, ckpt_6, safetensors_2, safetensors_6 = json.loads(done.stdout)
    # Beside the result: the float64 sum of one tensor (twice its size), its rounded value, what is read of the file.
    assert ckpt_6 > layers * mib, done.stdout  # it is measured at all
    assert ckpt_6 < layers * mib + 6 * mib + 8, done.stdout
    models = 1 if Version(metadata.version("safetensors")) >= Version("0.8") else 2  # older ones copy what they write
    assert safetensors_6 < models * layers * mib + 6 * mib + 8, done.stdout
    assert safetensors_6 - safetensors_2 < 8, done.stdout
    assert ckpt_6 - ckpt_2 < 8, done.stdout
