"""Who holds up a run: from where each rank stands to the one that all others wait for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Standing:
    """Where a rank stands.

    Attributes:
        rank: whose.
        name: its host and process.
        step: the ``global_step``.
        phase: one of the clock's, or a callback's name.
        stalled: seconds without a sign of life of its main thread.
        groups: name of each process group that it belongs to -> how many collectives it has entered there.
        collective: what it stands in, as far as Python knows.
        stack: the innermost lines of its main thread's stack.
        silent: why it cannot answer, in words; None if it has.
        passed: how many of the clock's marks the main thread has passed in its step: all ranks pass the same ones.
    """

    rank: int
    name: str
    step: int
    phase: str
    stalled: float
    groups: dict[str, int] = field(default_factory=dict)
    collective: str | None = None
    stack: Sequence[str] = ()
    silent: str | None = None
    passed: int = 0


@dataclass(frozen=True)
class Verdict:
    """Who holds up the run.

    Attributes:
        ranks: they; empty if all stand in the same place.
        phases: where each of them stands.
        text: all of it, for people.
    """

    ranks: tuple[int, ...]
    phases: tuple[str, ...]
    text: str


def judge(standings: Sequence[Standing], limit: float) -> Verdict:
    """The ranks that do not answer; or else those that have not entered a collective in which others wait.

    Where a rank has left one collective out and stands in another, each lacks somewhere: then it counts which of the
    two comes first in the program, as those who wait there have not come to the other yet. At the same place it counts
    who has waited longest.
    """
    silent = [one for one in standings if one.silent is not None]
    group, behind = _missing([one for one in standings if one.silent is None])
    if silent:
        culprits = silent
    elif behind:
        culprits = behind
    elif len(standings) == 1:
        culprits = list(standings)
    else:
        culprits = []
    waiting = [one for one in standings if one not in culprits]
    longest = max((one.stalled for one in standings), default=0.0)
    lines = [f"RunHealth: no sign of life for {longest:.1f} s (limit {limit:.1f} s)."]
    for one in culprits:
        what = one.silent or _what_it_lacks(group, one, waiting)
        lines.append(
            f"  rank {one.rank} ({one.name}) {what}; it stands in step {one.step}, phase {one.phase!r}"
            + ("" if one.silent else f", since {one.stalled:.1f} s")
        )
        lines += [f"    {line}" for line in one.stack]
    if not culprits:
        lines.append("  all ranks stand in the same collective: the network between them, or one that cannot match")
    for one in waiting:
        held = f" in {one.collective}" if one.collective else ""
        lines.append(f"  rank {one.rank} waits{held}: step {one.step}, phase {one.phase!r}, since {one.stalled:.1f} s")
        if not culprits:
            lines += [f"    {line}" for line in one.stack]
    ranks = tuple(one.rank for one in culprits)
    return Verdict(ranks, tuple(one.phase for one in culprits), "\n".join(lines))


def _what_it_lacks(group: str | None, one: Standing, waiting: Sequence[Standing]) -> str:
    if group is None:
        return "does not go on"
    number = one.groups[group] + 1
    where = next((each.collective for each in waiting if each.groups.get(group) == number), None)
    of = "" if group == "0" else f" of process group {group!r}"
    return f"has not entered collective {number}{of}{f' ({where})' if where else ''}"


def _missing(standings: Sequence[Standing]) -> tuple[str | None, list[Standing]]:
    """The process group whose collective is held up, and who has not entered it."""
    found: list[tuple[tuple[int, int], float, str, list[Standing]]] = []
    for group in {name for one in standings for name in one.groups}:
        members = [one for one in standings if group in one.groups]
        last, furthest = (extreme(one.groups[group] for one in members) for extreme in (min, max))
        if last < furthest:  # a broadcast lets some go on: only the last of all holds up the others
            waiting = [one for one in members if one.groups[group] > last]
            place = min((one.step, one.passed) for one in waiting)
            waited = max(one.stalled for one in waiting)
            found.append((place, -waited, group, [one for one in members if one.groups[group] == last]))
    if not found:
        return None, []
    *_, group, behind = min(found, key=lambda each: (*each[:2], each[2] != "0"))
    return group, behind
