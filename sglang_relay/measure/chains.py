"""Tasks become chains on a model: producers decode, and the consumer's prompt holds what they wrote, token for token.

Producers decode under exact prefill. Their outputs are kept as token ids in the user's cache, so that a later run
replays them by prefill instead of decoding them again (`Chain.donate`).
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sglang_relay.identity import user_cache, weight_digest, write_atomically
from sglang_relay.measure.server import Server
from sglang_relay.measure.tasks import Task

logger = logging.getLogger(__name__)

FORCED = 32
"""Most tokens of the exact greedy continuation that a chain carries."""

_MARK = "\ue000{}\ue001"
"""Stands for an agent's text while the chat template is applied; private-use characters are in no template."""


@dataclass(frozen=True, slots=True)
class Decoding:
    """How producers decode: ``min_tokens`` to ``max_tokens`` tokens; ``temperature`` 0 is greedy.

    seed: of the server (``--random-seed``); a request's own seed needs SGLang's deterministic inference.
    """

    min_tokens: int = 384
    max_tokens: int = 512
    temperature: float = 0.7
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Producer:
    """An agent that has written: the token ids of its prompt and of its output, without a stop token."""

    prompt: list[int]
    output: list[int]


@dataclass(frozen=True, slots=True)
class Chain:
    """One task on one model. All lists hold token ids.

    prompt: the consumer's; ``segments`` are the ranges ``[start, stop)`` of it that producers decoded, in order.
    forced: greedy continuation of the prompt under full prefill, at most `FORCED` tokens, ending with a stop token if
    there is one before.
    """

    task: Task
    producers: tuple[Producer, ...]
    prompt: list[int]
    segments: tuple[tuple[int, int], ...]
    forced: list[int]

    @property
    def reused(self) -> int:
        """Tokens of the prompt that producers decoded."""
        return sum(stop - start for start, stop in self.segments)

    @property
    def suffix(self) -> int:
        """Fresh tokens behind the last segment."""
        return len(self.prompt) - self.segments[-1][1]

    def donate(self, server: Server, salt: str) -> None:
        """Make ``server`` hold the producers' outputs as donors of the tenant ``salt``, by prefill.

        Prompt + output is prefilled, the output as a transcript, which is donated. So the index holds what it holds
        after decoding, and its KV equals decoded KV up to rounding: with SmolLM2-135M-Instruct in bfloat16, ``rotate``
        on replayed donors is a KL divergence of 4e-4 away from ``rotate`` on the donors that were decoded (6
        development chains, 32 positions; prompt and output prefilled one after the other), as far as full prefill in
        two chunks is from full prefill in one; from full prefill it is 6.3e-2 (decoded) and 6.2e-2 (replayed) away.
        """
        for p in self.producers:
            params = {"relay": "exact", "relay_donate": "output", "relay_generated_from": len(p.prompt)}
            server.generate(p.prompt + p.output, fields={"cache_salt": salt}, max_new_tokens=1, custom_params=params)


class Template:
    """A model's tokenizer and chat template. Agents' texts go into a prompt as the token ids that were decoded."""

    def __init__(self, model: str | Path) -> None:
        from transformers import AutoTokenizer

        self.tokenizer: Any = AutoTokenizer.from_pretrained(str(model))

    def prompt(self, role: str, parts: Sequence[str | list[int]]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
        """Token ids of a prompt with a system and a user message, and the ranges of the ``parts`` that are ids."""
        ids = [part for part in parts if not isinstance(part, str)]
        names = iter(_MARK.format(i) for i in range(len(ids)))
        message = "".join(part if isinstance(part, str) else next(names) for part in parts)
        rest = self._render(role, message)
        tokens: list[int] = []
        segments: list[tuple[int, int]] = []
        for i, piece in enumerate(ids):
            before, found, rest = rest.partition(_MARK.format(i))
            if not found:
                raise ValueError("the chat template does not show the user's message")
            tokens += self._encode(before)
            segments.append((len(tokens), len(tokens) + len(piece)))
            tokens += piece
        return tokens + self._encode(rest), tuple(segments)

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _render(self, role: str, message: str) -> str:
        from jinja2 import TemplateError

        def apply(messages: list[dict[str, str]]) -> str:
            return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

        if self.tokenizer.chat_template is None:
            return f"{self.tokenizer.bos_token or ''}{role}\n\n{message}\n\n"
        try:
            text = apply([{"role": "system", "content": role}, {"role": "user", "content": message}])
        except TemplateError:  # some templates refuse a system message, others leave it out
            text = ""
        return text if role in text else apply([{"role": "user", "content": f"{role}\n\n{message}"}])


def build_chains(
    server: Server,
    model: str | Path,
    tasks: Sequence[Task],
    decoding: Decoding,
    *,
    dtype: str,
    progress: Callable[[str], object] = logger.info,
) -> list[Chain]:
    """The chains of ``tasks``, in order. What no earlier run has decoded is decoded now, several requests at a time.

    server: runs ``model``, a checkpoint folder, computing in ``dtype``; requests here neither reuse nor donate.
    """
    writer = _Writer(server, Template(model), decoding, f"{weight_digest(Path(model))} {dtype}", progress)
    outputs: list[list[list[int]]] = [[] for _ in tasks]
    for level in range(max((len(task.agents) for task in tasks), default=0)):
        rows = [i for i, task in enumerate(tasks) if level < len(task.agents)]
        prompts = [writer.producer(tasks[i], level, outputs[i]) for i in rows]
        for i, output in zip(rows, writer.write(prompts), strict=True):
            outputs[i].append(output)
    consumers = [writer.consumer(task, texts) for task, texts in zip(tasks, outputs, strict=True)]
    forced = writer.continuations([prompt for prompt, _ in consumers])
    return [
        Chain(
            task,
            tuple(Producer(writer.producer(task, i, texts[:i]), text) for i, text in enumerate(texts)),
            prompt,
            segments,
            continuation,
        )
        for task, texts, (prompt, segments), continuation in zip(tasks, outputs, consumers, forced, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class _Writer:
    server: Server
    template: Template
    decoding: Decoding
    identity: str
    progress: Callable[[str], object]

    def producer(self, task: Task, agent: int, texts: Sequence[list[int]]) -> list[int]:
        """The prompt of producer ``agent``, which may read the ``texts`` written before."""
        reads = [(task.agents[i].name, texts[i]) for i in task.reads(agent)]
        this = task.agents[agent]
        return self.template.prompt(this.role, _message(task.topic, reads, this.prompt))[0]

    def consumer(self, task: Task, texts: Sequence[list[int]]) -> tuple[list[int], tuple[tuple[int, int], ...]]:
        reads = [(agent.name, text) for agent, text in zip(task.agents, texts, strict=True)]
        return self.template.prompt(task.role, _message(task.topic, reads, task.suffix))

    def write(self, prompts: list[list[int]]) -> list[list[int]]:
        """What producers write to these prompts, without stop tokens."""
        d = self.decoding
        sampling = {"temperature": d.temperature, "min_new_tokens": d.min_tokens, "max_new_tokens": d.max_tokens}
        return self._cached("written", prompts, sampling, asdict(d), keep_stop=False)

    def continuations(self, prompts: list[list[int]]) -> list[list[int]]:
        return self._cached("forced", prompts, {"max_new_tokens": FORCED}, {}, keep_stop=True)

    def _cached(
        self, kind: str, prompts: list[list[int]], sampling: dict[str, Any], key: dict[str, Any], *, keep_stop: bool
    ) -> list[list[int]]:
        files = [self._file(kind, prompt, sampling | key) for prompt in prompts]
        missing = [i for i, file in enumerate(files) if not file.is_file()]
        for done, batch in _batches(missing):
            self.progress(f"decoding {kind} texts: {done} of {len(missing)}")
            sampled = {"temperature": 0, "custom_params": {"relay": "off"}, **sampling}
            request = {"input_ids": [prompts[i] for i in batch], "sampling_params": sampled}
            answers = self.server.post("/generate", request)
            for i, answer in zip(batch, answers, strict=True):
                write_atomically(files[i], json.dumps(_output(answer, keep_stop)))
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]

    def _file(self, kind: str, prompt: list[int], settings: dict[str, Any]) -> Path:
        key = json.dumps([self.identity, kind, prompt, settings], sort_keys=True)
        return user_cache("transcripts") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _message(topic: str, reads: Sequence[tuple[str, list[int]]], request: str) -> list[str | list[int]]:
    """A user message; each text that is read stands on lines of its own."""
    parts: list[str | list[int]] = [f"The task:\n{topic}\n\n"]
    for name, text in reads:
        parts += [f"The {name} wrote:\n", text, "\n\n"]
    return [*parts, request]


def _output(answer: dict[str, Any], keep_stop: bool) -> list[int]:
    tokens, reason = answer["output_ids"], answer["meta_info"]["finish_reason"]
    stopped = reason["type"] == "stop" and tokens and tokens[-1] == reason.get("matched")
    return tokens[:-1] if stopped and not keep_stop else tokens


def _batches(items: list[int], size: int = 8) -> Iterator[tuple[int, list[int]]]:
    for start in range(0, len(items), size):
        yield start, items[start : start + size]
