"""Checkpoints whose average can be told without a computer."""

import torch


def save_plain(folder, count=3, **more):
    """Small state dicts whose weights are 0, 1, 2, ..."""
    paths = []
    for i in range(count):
        paths.append(folder / f"{i}.pt")
        torch.save({"w": torch.full((4,), float(i)), "n": torch.tensor(i), **more}, paths[-1])
    return paths
