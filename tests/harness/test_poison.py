import pytest
import torch

from harness.poison import PoisonedEmpty

MAKERS = {
    "empty": lambda like: torch.empty(2, 3, dtype=like.dtype),
    "empty_like": torch.empty_like,
    "empty_strided": lambda like: torch.empty_strided((2, 3), (3, 1), dtype=like.dtype),
    "empty_permuted": lambda like: torch.empty_permuted((2, 3), (1, 0), dtype=like.dtype),
    "new_empty": lambda like: like.new_empty(2, 3),
    "new_empty_strided": lambda like: like.new_empty_strided((2, 3), (3, 1)),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.bool]


def _is_poisoned(tensor):
    if tensor.is_floating_point():
        return tensor.isnan().all().item()
    return (tensor == (True if tensor.dtype == torch.bool else torch.iinfo(tensor.dtype).max)).all().item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("maker", MAKERS)
def test_uninitialised_memory_is_poisoned(maker, dtype, poisoned_empty):
    assert _is_poisoned(MAKERS[maker](torch.zeros(2, 3, dtype=dtype)))


def test_a_sum_over_memory_that_was_never_written_shows():
    def careless(values):
        total = torch.empty(())  # forgot to start at zero
        return total + values.sum()

    with PoisonedEmpty():
        assert careless(torch.ones(3)).isnan()
        assert torch.zeros(3).sum() == 0
        torch.nn.TransformerEncoderLayer(8, 2)(torch.ones(1, 2, 8)).isfinite().all()
    assert not _is_poisoned(torch.empty_like(torch.ones(3)).zero_())
