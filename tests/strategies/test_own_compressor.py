"""The compressor that the card shows, run as it stands there."""

from __future__ import annotations

import re

import torch

from harness import REPOSITORY
from lightning_eff.compression.in_process import InProcessRanks
from lightning_eff.strategies import ArcTopK, CompressedDDPStrategy

CARD = REPOSITORY / "docs" / "methods" / "compressed_allreduce.md"


def test_the_card_s_compressor():
    section = CARD.read_text().split("## A compressor of your own")[1]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert len(blocks) == 2
    names = {"CompressedDDPStrategy": CompressedDDPStrategy, "__name__": "card"}
    for block in blocks:
        exec(block, names)
    assert isinstance(names["strategy"], CompressedDDPStrategy)

    # All that was sent and the mean of what is kept is all that there was.
    ranks = InProcessRanks(names["EveryNth"](n=4), world_size=2)
    generator = torch.Generator().manual_seed(0)
    rest = torch.zeros(100, 100)
    for _ in range(8):
        own = [{"weight": torch.randn(100, 100, generator=generator)} for _ in range(2)]
        averages = ranks.average(own)
        assert torch.equal(averages[0]["weight"], averages[1]["weight"])
        assert averages[0]["weight"].count_nonzero() == 2500
        rest += (own[0]["weight"] + own[1]["weight"]) / 2 - averages[0]["weight"]
    kept = (ranks.memories[0]["weight"]["error"] + ranks.memories[1]["weight"]["error"]) / 2
    torch.testing.assert_close(kept, rest, rtol=1e-4, atol=1e-4)

    # An infinity in a row that is not sent is noticed all the same.
    before = ranks.memories[0]["weight"]["error"].clone()
    own[0]["weight"][1, 0] = torch.inf
    assert not ranks.average(own)[1]["weight"].isfinite().any()
    assert torch.equal(ranks.memories[0]["weight"]["error"], before)


def test_the_card_s_table_of_bytes():
    """Bytes for 1000 x 1000 on two ranks, as the card rounds them."""
    from lightning_eff.compression import all_compressors

    text = CARD.read_text()
    for name, compressor in all_compressors().items():
        (line,) = [line for line in text.splitlines() if line.startswith("|") and f"`ddp_{name}`" in line]
        sent = compressor.bytes_sent(rows=1000, columns=1000, itemsize=4, world_size=2) / 1e6
        assert f"| {sent:.2f} MB |" in line, line
    assert ArcTopK().ratio == 0.2
