import pytest

from lightning_eff.structure.select import select

NAMES = ["embed.weight", "h.0.attn", "h.0.mlp", "h.1.attn"]


def test_the_candidates_order_counts_and_none_comes_twice():
    assert select(NAMES, ["*attn", "h.0.*"], "include") == ["h.0.attn", "h.0.mlp", "h.1.attn"]
    assert select(NAMES, "h.*", "include") == NAMES[1:]


def test_a_candidate_may_be_called_by_other_names():
    assert select({"base.weight": ("lora_A", "lora_B"), "head": ()}, ["lora_*"], "include") == ["base.weight"]


def test_each_pattern_has_to_match():
    message = r"include='h\.0\.atn' matches no matrix\. Did you mean: .*h\.0\.attn.*\? There are: embed\.weight, h"
    with pytest.raises(ValueError, match=message):
        select(NAMES, ["*attn", "h.0.atn"], "include", "matrix")


def test_case_counts():
    with pytest.raises(ValueError, match="matches no name"):
        select(NAMES, ["H.*"], "include")
