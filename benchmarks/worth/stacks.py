"""Small models trained side by side: one tensor holds a parameter of all of them, so that a step is a step of all.

On a CPU a step of a tiny model is mostly the time of calls; here there is one call for all models of a stack. They
share nothing else: each has its own seed, its own batches and its own way to clip.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.worth.clips import Clip
from benchmarks.worth.workloads import BATCH, LATENT, Gan, Workload

BAD = 0.01  # of the batches


class Batches:
    """The batches of one seed, each a function of its step, of which one in a hundred is bad where there is a fault."""

    def __init__(self, workload: Workload, data: list[Tensor], seed: int, fault: str = "", steps: int = 0) -> None:
        self.workload, self.data, self.seed, self.fault = workload, data, seed, fault
        places = torch.randperm(steps - steps // 4, generator=self._generator(-1)) + steps // 8  # not at either end
        self.bad = set(places[: round(BAD * steps)].tolist()) if fault in workload.faults else set()

    def _generator(self, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 1_000_003 + step + 1)

    def __call__(self, step: int) -> list[Tensor]:
        generator = self._generator(step)
        chosen = torch.randint(len(self.data[0]), (BATCH,), generator=generator)
        batch = [each[chosen] for each in self.data]
        if step in self.bad:
            batch = self.workload.corrupt(self.fault, batch, generator)
        if len(self.workload.players) > 1:
            batch.append(torch.randn(BATCH, LATENT, generator=generator))
        return batch


class Stack:
    """Models of one workload.

    Args:
        workload: what is trained.
        seeds: of each model.
        clips: of each model, made anew for each optimizer.
        rate: of all.
    """

    def __init__(
        self, workload: Workload, seeds: Sequence[int], clips: Sequence[Callable[[], Clip]], rate: float
    ) -> None:
        self.workload, self.seeds = workload, list(seeds)
        modules = []
        for seed in seeds:
            torch.manual_seed(seed)
            modules.append(workload.module())
        self.module = modules[0]
        stacked, _ = stack_module_state(modules)
        self.parameters = {name: nn.Parameter(value.detach()) for name, value in stacked.items()}
        self.own = {
            player: {name: p for name, p in self.parameters.items() if name.startswith(player)}
            for player in workload.players
        }
        self.optimizers = {player: workload.optimizer(list(own.values()), lr=rate) for player, own in self.own.items()}
        self.clips = {player: [clip() for clip in clips] for player in workload.players}
        self.norms: list[Tensor] = []
        self.train_data, self.held_out = workload.data()
        self.streams: dict[int, Batches] = {}
        self.begin()

    def begin(self, fault: str = "", steps: int = 0) -> None:
        """With a fault in so many steps."""
        made = [Batches(self.workload, self.train_data, seed, fault, steps) for seed in sorted(set(self.seeds))]
        self.streams = {each.seed: each for each in made}

    def train(self, steps: int, fault: str = "") -> tuple[list[float], list[float]]:
        """Of each model: the score before the first step, and the mean score over the last fifth of the steps."""
        start, scores = self.score(), []
        self.begin(fault, steps)
        for step in range(steps):
            self.step(step)
            if step >= 0.8 * steps and (step + 1) % (steps // 20) == 0:
                scores.append(self.score())
        return start.tolist(), torch.stack(scores).mean(0).tolist()

    def step(self, step: int) -> None:
        """The update after ``step`` of them."""
        drawn = {seed: stream(step) for seed, stream in self.streams.items()}
        batch = [torch.stack(each) for each in zip(*(drawn[seed] for seed in self.seeds), strict=True)]
        for player in self.workload.players:
            self._step(player, batch)

    def _step(self, player: str, batch: list[Tensor]) -> None:
        own = self.own[player]
        loss = self._each(self.parameters, player, batch, 0).sum()
        found = torch.autograd.grad(loss, list(own.values()))
        gradients = {name: each.contiguous() for name, each in zip(own, found, strict=True)}  # a clip may write into it
        norms = torch.stack([each.flatten(1).square().sum(1) for each in gradients.values()]).sum(0).sqrt()
        self.norms.append(norms)
        coefficients = torch.ones(len(self.seeds))
        for place, clip in enumerate(self.clips[player]):
            mine = ({name: each[place] for name, each in tensors.items()} for tensors in (own, gradients))
            with torch.no_grad():
                coefficients[place] = clip(norms[place], *mine)
        for name, parameter in own.items():
            factor = coefficients.view(-1, *[1] * (parameter.ndim - 1))
            # A step that is dropped is dropped whole: 0 times infinity is no 0.
            parameter.grad = torch.where(factor == 0, 0.0, gradients[name] * factor)
        self.optimizers[player].step()

    def _each(self, of: Mapping[str, Tensor], player: str, batch: list[Tensor], dim: int | None) -> Tensor:
        def loss(parameters: dict[str, Tensor], batch: list[Tensor]) -> Tensor:
            return functional_call(self.module, parameters, (player, *batch))  # type: ignore[no-any-return]

        with sdpa_kernel(SDPBackend.MATH):  # the one that runs for many models at once
            return torch.vmap(loss, in_dims=(0, dim))(dict(of), batch)

    @torch.no_grad()
    def score(self, of: Mapping[str, Tensor] | None = None) -> Tensor:
        """Of each model, or of other weights: the loss on the held-out data, and of a GAN its distance to them."""
        of = of or self.parameters
        if not isinstance(self.module, Gan):
            return self._each(of, "", self.held_out, None)
        found = []
        for place in range(len(self.seeds)):
            self.module.load_state_dict({name: value[place] for name, value in of.items()})
            finite = all(value[place].isfinite().all() for value in of.values())
            found.append(self.module.distance(*self.held_out) if finite else torch.tensor(torch.nan))
        return torch.stack(found)
