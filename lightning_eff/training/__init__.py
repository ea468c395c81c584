"""What two or more methods share around Lightning's Trainer; and here, what the author of a callback needs of it."""

from lightning_eff.training.hooks import (
    CompressesGradients,
    CountsSpikes,
    EqualReplicas,
    FollowsTrainable,
    HasCharts,
    HasRunState,
    HearsAlarms,
    HearsOfTheEnd,
    Order,
    ReadsWeights,
    all_with,
    tell,
)
from lightning_eff.training.rank_state import RankState
from lightning_eff.training.trainable import TrainableChange, check_trainable_support, set_trainable

__all__ = [
    "CompressesGradients",
    "CountsSpikes",
    "EqualReplicas",
    "FollowsTrainable",
    "HasCharts",
    "HasRunState",
    "HearsAlarms",
    "HearsOfTheEnd",
    "Order",
    "RankState",
    "ReadsWeights",
    "TrainableChange",
    "all_with",
    "check_trainable_support",
    "set_trainable",
    "tell",
]
