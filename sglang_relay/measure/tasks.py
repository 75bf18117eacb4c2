"""The agent-chain tasks of ``tasks.json``: short texts written for this project, in splits that share no topic.

``calibration`` is for profiles, ``development`` for every choice one makes, ``heldout`` for results and certificates.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

SPLITS = ("calibration", "development", "heldout")

KINDS = ("single", "several", "dependent", "judge")
"""single: the consumer reads one text. several: two or three that know nothing of each other. dependent: the second
agent has read the first one's text, the consumer reads both. judge: two answers to the same task are compared."""


@dataclass(frozen=True, slots=True)
class Agent:
    """A producer: its name, its role prompt, and what it is asked to write."""

    name: str
    role: str
    prompt: str


@dataclass(frozen=True, slots=True)
class Task:
    """One chain. ``agents`` write about ``topic``; the consumer reads all of them and is asked ``question``.

    rubric: instructions behind the question that make the fresh text after the segments long (150-300 tokens with the
    question), or None for the question alone (16-40 tokens).
    """

    id: str
    split: str
    domain: str
    kind: str
    topic: str
    agents: tuple[Agent, ...]
    role: str
    question: str
    rubric: str | None

    def reads(self, agent: int) -> range:
        """Agents whose text the producer ``agent`` finds in its prompt."""
        return range(agent if self.kind == "dependent" else 0)

    @property
    def suffix(self) -> str:
        """What the consumer finds behind the agents' texts."""
        return self.question if self.rubric is None else f"{self.question}\n\n{self.rubric}"

    @property
    def long(self) -> bool:
        return self.rubric is not None

    @property
    def digest(self) -> str:
        """Changes with any word of the task."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:16]


def load_tasks(split: str) -> list[Task]:
    """The tasks of a split, in order. ValueError for an unknown split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}")
    content = _content()["splits"][split]
    return [_task(split, entry, content["rubrics"]) for entry in content["tasks"]]


@cache
def _content() -> dict[str, Any]:
    return json.loads((files("sglang_relay.measure") / "tasks.json").read_text(encoding="utf-8"))


def _task(split: str, entry: dict[str, Any], rubrics: dict[str, str]) -> Task:
    consumer = entry["consumer"]
    return Task(
        id=entry["id"],
        split=split,
        domain=entry["domain"],
        kind=entry["kind"],
        topic=entry["topic"],
        agents=tuple(Agent(**agent) for agent in entry["agents"]),
        role=consumer["role"],
        question=consumer["question"],
        rubric=None if consumer["rubric"] is None else rubrics[consumer["rubric"]],
    )
