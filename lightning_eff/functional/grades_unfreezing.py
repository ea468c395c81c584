"""GradES: which frozen units are to be unfrozen, since what speaks against them has grown; beside `functional.grades`.

All is taken and decided on the device: nothing here waits for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_eff.functional.grades import MEMORY, GradESState


def grades_signal(signal: Tensor, state: GradESState) -> None:
    """Take what speaks for unfreezing units: anything that grows when they were frozen too soon.

    Args:
        signal: of shape (units,) or 0-d; what is not finite or not above 0 is no observation.
        state: changed in place.

    Example:
        >>> from lightning_eff.functional.grades import GradESConfig
        >>> state = GradESState(2, GradESConfig(tau=0.5, patience=1, unfreeze_factor=2.0))
        >>> grades_signal(torch.tensor([1.0, 1.0]), state)
        >>> state.mark(frozen=[0, 1])
        >>> for _ in range(20):
        ...     grades_signal(torch.tensor([1.0, 9.0]), state)
        >>> units_to_unfreeze(state)
        tensor([False,  True])
    """
    factor = state.config.unfreeze_factor
    assert factor is not None, "unfreeze_factor"
    state.to(signal.device)
    signal = signal.to(state.values.dtype).expand(state.units)
    seen = signal.isfinite() & (signal > 0)
    old = state["signal"]
    keep = torch.where(old > 0, 1 - 1 / MEMORY, 0.0)
    state["signal"].copy_(torch.where(seen, keep * old + (1 - keep) * torch.where(seen, signal, 0.0), old))
    frozen, baseline = state["frozen"] != 0, state["baseline"]
    baseline.copy_(torch.where(frozen & (baseline == 0), state["signal"], baseline))
    rising = frozen & (baseline > 0) & (state["signal"] > factor * baseline)
    state["rise"].copy_(torch.where(seen, torch.where(rising, state["rise"] + 1, 0.0), state["rise"]))


def units_to_unfreeze(state: GradESState) -> Tensor:
    """Whether each unit is to be unfrozen now; bool of shape (units,).

    Args:
        state: not changed; :meth:`GradESState.mark` notes what was done.

    Example:
        >>> from lightning_eff.functional.grades import GradESConfig
        >>> units_to_unfreeze(GradESState(2, GradESConfig(tau=0.5, unfreeze_factor=2.0)))  # none is frozen
        tensor([False, False])
    """
    return (state["rise"] >= state.config.patience) & (state["frozen"] != 0)


def neighbour_signal(state: GradESState, ratio: Tensor, groups: Tensor) -> Tensor:
    """For each unit the mean metric over level of the units beside it that have been observed now.

    Args:
        state: the levels.
        ratio: what ``grades_update`` has just returned; NaN where nothing was observed.
        groups: int64 of shape (units,): units of one number are neighbours. A group without any observation takes the
            mean of all.

    Returns:
        Of shape (units,); NaN where nothing at all was observed.

    Example:
        >>> from lightning_eff.functional.grades import GradESConfig, grades_update
        >>> state = GradESState(3, GradESConfig(tau=0.5, tau_mode="absolute"))
        >>> for _ in range(2):
        ...     ratio = grades_update(torch.tensor([1.0, 1.0, torch.nan]), state, armed=False)
        >>> neighbour_signal(state, ratio, groups=torch.tensor([0, 0, 1]))  # the third takes the mean of all
        tensor([1., 1., 1.], dtype=torch.float64)
    """
    seen = ratio.isfinite()
    value = torch.where(seen, state["metric"] / state["level"], 0.0)
    sums, counts = (torch.zeros_like(value).index_add_(0, groups, each.to(value.dtype)) for each in (value, seen))
    total = value.sum() / seen.sum()
    return torch.where(counts > 0, sums / counts, total)[groups]
