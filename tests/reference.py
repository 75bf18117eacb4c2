"""An independent fp64 decoder that says which logits a relayed prefill must produce.

Written from the model definition (Llama family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU) and from
the policies' published definitions. It shares no code with the package or with SGLang, keeps one row per prompt
position and leaves out everything that makes a server fast. Policies differ only in the rows that each layer computes.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

Mutation = Literal[
    "rotation_off_by_one",
    "row_mask",
    "swapped_slots",
    "stale_stage",
    "missing_last_layer",
    "flat_depth",
    "sees_all",
    "turned_changes",
]


class Segment(NamedTuple):
    """Prompt positions [start, stop) whose K and V come from `donor` (a number), which held them at `source` onwards.

    k, v: [layers, stop - start, kv_heads, head_dim] as the server caches them; keys carry the donor's positions.
    influence: [stop - start], what the tokens received while they were decoded, if that is known.
    hidden: [stop - start, width], the donor's hidden states entering the layer where the policy starts.
    """

    start: int
    stop: int
    donor: int
    source: int
    k: Tensor
    v: Tensor
    influence: Tensor | None = None
    hidden: Tensor | None = None


class LegoLink(NamedTuple):
    """EPIC: the first `first` tokens of a donor's text run through all layers like fresh ones, others keep donor KV."""

    first: int = 16


ROTATE = LegoLink(0)
FULL = LegoLink(10**9)


class Relay(NamedTuple):
    """All tokens run through layers 0..det, fresh and selected ones through det+1..end, fresh ones through the rest.
    With `start` reused tokens first run in this layer, with their donors' hidden states.

    Selected are the tokens of a segment whose value deviation at layer `det` is at least `tau_dev` times the segment's
    mean, those whose influence is at least `tau_inf` times its mean, and the segment's last `suffix` tokens.
    (RelayCaching.)
    """

    det: int
    end: int
    tau_dev: float
    suffix: int
    tau_inf: float = math.inf
    start: int | None = None


class CacheBlend(NamedTuple):
    """All tokens run through layers 0..det, fresh and selected ones through the rest.

    Selected is the `share` of all reused tokens with the largest value deviation at layer `det`.
    """

    share: float = 0.15
    det: int = 1


class Probe(NamedTuple):
    """What some fresh tokens look at runs through all layers like fresh tokens.

    First pass: the fresh tokens before the first segment, and the last `queries` behind the last one, over donor KV and
    each other. A reused token's score is the attention it gets there times the norm of its value, summed over rows,
    heads and layers l with weight (l + 1) / layers, times (index + 4) ** -.35; where it `interpolates`, the square root
    of the sum. Selected is the `share` of all reused
    tokens with the highest scores or, with `coverage`, as many as hold this part of the sum of all scores without root.
    Second pass, from embeddings: the selected tokens, and the fresh ones behind the start of the first segment. With
    `interpolates` each layer but the first, before it attends, adds to the other reused tokens a ridge regression (0.2)
    on what changed at selected ones of the same piece, values and unturned keys, with the kernel
    exp(4 (cos - 1) - |log((i + 4) / (j + 4))|), where cos is the mean of the donors' cosines of keys and of values in
    the layers at one, two and three quarters of the depth.
    A piece is a run of reused tokens of one segment, or one of the fewest equal parts of it of at most 512 tokens.

    `chunks`: ends of all chunks but the last. Their fresh tokens, and the last token of each, first run over unrepaired
    donor KV; the last chunk's probe sees them, and its second pass repeats them.
    """

    share: float = 0.2
    coverage: float | None = None
    queries: int = 8
    chunks: tuple[int, ...] = ()
    interpolates: bool = True


Policy = LegoLink | Relay | CacheBlend | Probe
SPOILS: dict[str, Any] = {"stale_stage": Relay | CacheBlend} | dict.fromkeys(
    ("flat_depth", "sees_all", "turned_changes"), Probe
)
"""The policies that have what a mutation spoils; those not named spoil all."""


class Result(NamedTuple):
    """logits: [vocab] at the last position. k, v: [layers, n, kv_heads, head_dim] as cached after the prefill.

    selected: bool [n], reused rows chosen for recomputation. measured: [n], what ranks them, deviation or score, NaN
    elsewhere. mass: [n], a probe's score without the root. hidden: [n, width], what enters the layer `Relay.start`.
    """

    logits: Tensor
    k: Tensor
    v: Tensor
    selected: Tensor
    measured: Tensor
    mass: Tensor | None = None
    hidden: Tensor | None = None


class _Prompt(NamedTuple):
    """A prefill's input, its KV as it fills, and `_reused`."""

    tokens: list[int]
    segments: list[Segment]
    mutate: Mutation | None
    k: Tensor
    v: Tensor
    reused: Tensor
    index: Tensor


class Reference:
    """A checkpoint folder (config.json and safetensors) as an fp64 decoder."""

    def __init__(self, path: str | Path):
        self.config: dict[str, Any] = json.loads((Path(path) / "config.json").read_text())
        c = self.config
        self.layers: int = c["num_hidden_layers"]
        self.heads: int = c["num_attention_heads"]
        self.kv_heads: int = c.get("num_key_value_heads") or self.heads
        self.head_dim: int = c.get("head_dim") or c["hidden_size"] // self.heads
        self.weights: dict[str, Tensor] = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            with safe_open(file, "pt") as f:
                self.weights |= {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 (no mapping)
        self.frequency, self.stretch = _rotary(c, self.head_dim)

    def prefill(self, tokens: list[int]) -> Result:
        """The prompt computed as a whole: what exact serving produces."""
        return self.run(tokens, [], FULL)

    @torch.no_grad()
    def run(self, tokens: list[int], segments: list[Segment], policy: Policy, mutate: Mutation | None = None) -> Result:
        """Prefill `tokens`, the last one fresh, with disjoint `segments` in the prompt's order, no prefix cached.

        mutate: a deliberate error, to show that a comparison would notice it:
            rotation_off_by_one: donor keys are turned to one position too far;
            row_mask: causality by row number among the rows computed, bottom-right aligned, instead of by position;
            swapped_slots: the middle tokens of first and last segment exchange donor KV (within one it is no error);
            missing_last_layer: the last layer is not run;
            stale_stage: rows leave a stage one layer late; flat_depth: all layers have the same weight in the score;
            turned_changes: the changes of keys are interpolated as they are cached, with their positions;
            sees_all: the first pass of a probe sees fresh tokens that nobody has computed, as slots full of zeros.
        """
        n = len(tokens)
        prompt = _Prompt(tokens, segments, mutate, *self._place(n, segments, mutate), *_reused(n, segments))
        passes: tuple[Any, ...] = (
            self._probe(prompt, policy) if isinstance(policy, Probe) else self._staged(prompt, policy)
        )
        return Result(self._head(passes[0][-1]), prompt.k, prompt.v, *passes[1:])

    @torch.no_grad()
    def influence(self, tokens: list[int], start: int, layers: Sequence[int]) -> Tensor:
        """[n - start]: the attention that each token from `start` on gets from those behind it, summed over them, over
        heads and over `layers`. Prefill as a whole, as decoding sees the same keys."""
        n, got = len(tokens), torch.zeros(len(tokens), dtype=torch.float64)

        def add(layer: int, weight: Tensor) -> None:
            if layer in layers:
                got.add_(weight[:, start:].tril(start - 1).sum((0, 1)))

        prompt = _Prompt(tokens, [], None, *self._place(n, [], None), *_reused(n, []))
        self._pass(prompt, lambda _: torch.ones_like(prompt.reused), watch=add)
        return got[start:]

    @torch.no_grad()
    def hidden(self, tokens: list[int], layer: int) -> Tensor:
        """[n, width]: what enters `layer` in a prefill as a whole."""
        kept: list[Tensor] = []
        n = len(tokens)
        prompt = _Prompt(tokens, [], None, *self._place(n, [], None), *_reused(n, []))
        self._pass(
            prompt,
            lambda _: torch.ones_like(prompt.reused),
            enter=lambda at, x: kept.append(x.clone()) if at == layer else None,
        )
        return kept[0]

    @torch.no_grad()
    def decode(
        self, tokens: list[int], after: Result, answer: list[int], before: Sequence[Sequence[int]] = ()
    ) -> Tensor:
        """[len(answer), vocab]: logits in front of each token of `answer`, which continues `tokens` over the K and V
        that `after` left. `before[i]`: positions that run once more, from embeddings, in front of step i."""
        blank = torch.full((self.layers, len(answer), *after.k.shape[2:]), math.nan, dtype=torch.float64)
        k, v = (torch.cat((old, blank), 1) for old in (after.k, after.v))
        path = [*tokens, *answer]
        prompt, position = _Prompt(path, [], None, k, v, *_reused(len(path), [])), torch.arange(len(path))
        logits = [after.logits]
        for step in range(1, len(answer)):
            at = len(tokens) + step - 1
            for rows in ([*before[step]] if before else [], [at]):
                x, _ = self._pass(
                    prompt, lambda _, rows=rows: torch.isin(position, torch.tensor(rows, dtype=torch.int64))
                )
            logits.append(self._head(x[at]))
        return torch.stack(logits)

    def _staged(self, prompt: _Prompt, policy: Policy) -> tuple[Tensor, Tensor, Tensor, None, Tensor | None]:
        """A single pass, whose rows depend on the layer: hidden states at its end, `selected`, `measured`, no mass, and
        `hidden`."""
        reused, v, late = prompt.reused, prompt.v, prompt.mutate == "stale_stage"
        donor, deviation = v.clone(), torch.full((len(reused),), math.nan, dtype=torch.float64)
        selected = reused & (prompt.index < (policy.first if isinstance(policy, LegoLink) else 0))

        start, kept = policy.start if isinstance(policy, Relay) else None, []

        def rows(layer: int) -> Tensor:
            if start is not None and layer - late < start:
                return ~reused
            if isinstance(policy, Relay | CacheBlend) and layer == policy.det + 1:
                change = 1 - torch.cosine_similarity(donor[policy.det, reused], v[policy.det, reused], dim=-1).mean(-1)
                selected[:] = _deviating(deviation.masked_scatter_(reused, change), prompt.segments, policy)
            if isinstance(policy, Relay | CacheBlend) and layer - late <= policy.det:
                return torch.ones_like(reused)
            return ~reused if isinstance(policy, Relay) and layer - late > policy.end else ~reused | selected

        def enter(layer: int, x: Tensor) -> None:
            if layer == start:
                for s in prompt.segments:
                    assert s.hidden is not None
                    x[s.start : s.stop] = s.hidden
                kept.append(x.clone())

        return self._pass(prompt, rows, enter=enter)[0], selected, deviation, None, kept[0] if kept else None

    def _probe(self, prompt: _Prompt, policy: Probe) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `_staged`: a pass for each earlier chunk, one that looks, one that recomputes."""
        reused, position = prompt.reused, torch.arange(len(prompt.tokens))
        reused[[stop - 1 for stop in policy.chunks]] = False
        known = reused.clone()
        for rows in (~known & (position < stop) for stop in policy.chunks):
            self._pass(prompt, lambda _, rows=rows: rows)
            known |= rows
        head, tail = position < prompt.segments[0].start, position >= prompt.segments[-1].stop
        assert not (known & tail).any(), "no definition tells what a probe asks with when chunks split its suffix"
        rows = ~known & head | tail & (position >= len(position) - policy.queries)
        if prompt.mutate == "sees_all":
            _ = prompt.k.nan_to_num_(0), prompt.v.nan_to_num_(0), known.fill_(True)
        _, influence = self._pass(prompt, lambda _: rows, known | rows)
        mass = torch.where(reused, influence * (prompt.index + 4.0) ** -0.35, math.nan)
        score = mass / influence.sqrt() if policy.interpolates else mass
        selected = _largest(score, policy.share)
        if policy.coverage is not None:
            order = score.nan_to_num(-math.inf).argsort(descending=True, stable=True)[: int(reused.sum())]
            limit = int((mass[order].cumsum(0) - mass[order] < policy.coverage * mass[order].sum()).sum())
            selected = torch.zeros_like(reused).index_fill(0, order[:limit], True)
        pieces = _pieces(reused, prompt.segments) if policy.interpolates else []
        hidden, _ = self._pass(
            prompt, lambda _: ~head & (~reused | selected), pieces=[(p, selected[p]) for p in pieces]
        )
        return hidden, selected, score, mass

    def _pass(
        self,
        prompt: _Prompt,
        at: Callable[[int], Tensor],
        seen: Tensor | bool = True,
        pieces: Sequence[tuple[Tensor, Tensor]] = (),
        watch: Callable[[int, Tensor], None] = lambda *_: None,
        enter: Callable[[int, Tensor], None] = lambda *_: None,
    ) -> tuple[Tensor, Tensor]:
        """Run the rows that `at` names for each layer, from embeddings, and cache their K and V.

        They attend to what is `seen` (bool [n]) up to their own position, `pieces` interpolated. Returns hidden states
        and influence, [n]: the attention that a position gets times the norm of the value there, summed over rows,
        heads and weighted layers. `watch` gets each layer's weights, [heads, rows, n]; `enter` what is about to enter a
        layer, [n, width], to read or replace.
        """
        n, k, v = len(prompt.tokens), prompt.k, prompt.v
        x = self.weights["model.embed_tokens.weight"][prompt.tokens].double()
        influence, donor = x.new_zeros(n), (k.clone(), v.clone())
        for layer in range(self.layers - (prompt.mutate == "missing_last_layer")):
            enter(layer, x)
            rows, name = at(layer).nonzero()[:, 0], f"model.layers.{layer}"
            h = self._norm(x[rows], f"{name}.input_layernorm.weight")
            heads = (self._linear(h, f"{name}.self_attn.{i}_proj").unflatten(-1, (-1, self.head_dim)) for i in "qkv")
            q, fresh_k, fresh_v = heads
            q, k[layer, rows], v[layer, rows] = self._turn(q, rows), self._turn(fresh_k, rows), fresh_v
            for piece, recomputed in pieces if layer else ():
                self._interpolate(prompt, layer, donor, piece, recomputed)
            until = torch.arange(len(rows)) + n - len(rows) if prompt.mutate == "row_mask" else rows
            mask = (torch.arange(n) <= until[:, None]) & seen
            all_k, all_v = (i[layer].repeat_interleave(self.heads // self.kv_heads, 1) for i in (k, v))
            score = torch.einsum("qhd,khd->hqk", q, all_k) / math.sqrt(self.head_dim)
            weight = score.masked_fill(~mask, -math.inf).softmax(-1)
            watch(layer, weight)
            all_v = all_v.where(mask.any(0)[:, None, None], 0)  # a weight of zero would not silence a NaN
            out = torch.einsum("hqk,khd->qhd", weight, all_v).flatten(1)
            depth = 1 if prompt.mutate == "flat_depth" else (layer + 1) / self.layers
            influence += depth * torch.einsum("hqk,kh->k", weight, all_v.norm(dim=-1))
            x[rows] += self._linear(out, f"{name}.self_attn.o_proj")
            h = self._norm(x[rows], f"{name}.post_attention_layernorm.weight")
            gate, up = (self._linear(h, f"{name}.mlp.{i}_proj") for i in ("gate", "up"))
            x[rows] += self._linear(torch.nn.functional.silu(gate) * up, f"{name}.mlp.down_proj")
        return x, influence

    def _interpolate(
        self, prompt: _Prompt, layer: int, donor: tuple[Tensor, Tensor], piece: Tensor, recomputed: Tensor
    ) -> None:
        """piece: positions; recomputed: bool, those that hold fresh K and V in this layer; the others are changed."""
        if not recomputed.any():
            return
        at, turned = torch.zeros_like(piece), prompt.mutate == "turned_changes"
        old_k, new_k = (self._turn(k[piece], at, piece) for k in (donor[0][layer], prompt.k[layer]))
        likeness = torch.zeros(len(piece), len(piece), dtype=torch.float64)
        for deep in (self.layers * quarter // 4 for quarter in (1, 2, 3)):
            for flat in (self._turn(donor[0][deep, piece], at, piece).flatten(1), donor[1][deep, piece].flatten(1)):
                likeness += torch.cosine_similarity(flat[:, None], flat[None], dim=-1) / 6
        place = (prompt.index[piece] + 4.0).log()
        kernel = torch.exp(4 * (likeness - 1) - (place[:, None] - place).abs())
        s, u = recomputed, ~recomputed
        weight = torch.linalg.inv(kernel[s][:, s] + 0.2 * torch.eye(int(s.sum()))) @ kernel[s][:, u]
        change_k = prompt.k[layer, piece] - donor[0][layer, piece] if turned else new_k - old_k
        change_v = prompt.v[layer, piece] - donor[1][layer, piece]
        add_k, add_v = (torch.einsum("su,shd->uhd", weight, change[s]) for change in (change_k, change_v))
        prompt.v[layer, piece[u]] += add_v
        prompt.k[layer, piece[u]] += add_k if turned else self._turn(add_k, piece[u])

    def _place(self, n: int, segments: list[Segment], mutate: Mutation | None) -> tuple[Tensor, Tensor]:
        """K and V before anything is computed: donors' at their new positions, NaN where nothing may be read yet."""
        k = torch.full((self.layers, n, self.kv_heads, self.head_dim), math.nan, dtype=torch.float64)
        v = k.clone()
        donors = [(s.k.double().clone(), s.v.double().clone()) for s in segments]
        if mutate == "swapped_slots":
            assert len({s.start - s.source for s in (segments[0], segments[-1])}) == 2, "needs two distances"
            for a, b in zip(donors[0], donors[-1], strict=True):
                i, j = a.shape[1] // 2, b.shape[1] // 2
                a[:, i], b[:, j] = b[:, j].clone(), a[:, i].clone()
        for s, (donor_k, donor_v) in zip(segments, donors, strict=True):
            offset = torch.arange(s.stop - s.start)
            target = s.start + offset + (mutate == "rotation_off_by_one")
            k[:, s.start : s.stop] = self._turn(donor_k, target, s.source + offset)
            v[:, s.start : s.stop] = donor_v
        return k, v

    def _turn(self, x: Tensor, target: Tensor, source: Tensor | None = None) -> Tensor:
        """[..., n, heads, head_dim] turned from `source` (none: unrotated) to `target` positions, NeoX pairing."""
        angle = torch.outer(target.float() / self.stretch, self.frequency).double()  # fp32 is part of the definition
        if source is not None:
            angle -= torch.outer(source.float() / self.stretch, self.frequency).double()
        pair = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((pair.real, pair.imag), -1)

    def _head(self, x: Tensor) -> Tensor:
        name = "model.embed_tokens" if "lm_head.weight" not in self.weights else "lm_head"
        return self._linear(self._norm(x, "model.norm.weight"), name)

    def _norm(self, x: Tensor, weight: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[weight].double()

    def _linear(self, x: Tensor, name: str) -> Tensor:
        weight, bias = self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias")
        return torch.nn.functional.linear(x, weight.double(), None if bias is None else bias.double())


def _reused(n: int, segments: list[Segment]) -> tuple[Tensor, Tensor]:
    """bool [n], whether a segment's token; int64 [n], how many tokens of its donor's text are before it."""
    reused, index, first = torch.zeros(n, dtype=torch.bool), torch.zeros(n, dtype=torch.int64), {}
    for s in segments:
        assert not reused[s.start :].any() and s.stop < n, "segments out of order, or over the last token"
        first[s.donor] = min(s.source, first.get(s.donor, s.source))
        reused[s.start : s.stop] = True
        index[s.start : s.stop] = torch.arange(s.stop - s.start) + s.source - first[s.donor]
    return reused, index


def _pieces(reused: Tensor, segments: list[Segment]) -> list[Tensor]:
    """Positions of reused tokens that are related to each other, see `Probe`."""
    found = []
    for s in segments:
        at = (reused.nonzero()[:, 0])[torch.isin(reused.nonzero()[:, 0], torch.arange(s.start, s.stop))]
        runs = torch.tensor_split(at, [i for i in range(1, len(at)) if at[i] != at[i - 1] + 1])
        found += [part for run in runs for part in torch.tensor_split(run, math.ceil(len(run) / 512))]
    return found


def _largest(value: Tensor, share: float) -> Tensor:
    """bool [n]: the largest among those not NaN, equal ones in order of position."""
    order = value.nan_to_num(-math.inf).argsort(descending=True, stable=True)[: int((~value.isnan()).sum())]
    return torch.zeros_like(value, dtype=torch.bool).index_fill(
        0, order[: max(1, math.floor(share * len(order)))], True
    )


def _deviating(deviation: Tensor, segments: list[Segment], policy: Relay | CacheBlend) -> Tensor:
    """bool [n]: what the policy selects."""
    if isinstance(policy, CacheBlend):
        return _largest(deviation, policy.share)
    selected = torch.zeros_like(deviation, dtype=torch.bool)
    for s in segments:
        span = slice(s.start, s.stop)
        selected[span] = deviation[span] >= policy.tau_dev * deviation[span].mean()
        if s.influence is not None:
            selected[span] |= s.influence >= policy.tau_inf * s.influence.mean()
        selected[max(span.start, span.stop - policy.suffix) : span.stop] = True
    return selected


def _rotary(config: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """(fp32 frequency per pair, divisor of positions) of default, linear and llama3 rotary embeddings."""
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind in ("default", "linear"):
        return frequency, float(rope.get("factor", 1.0))
    if kind != "llama3":
        raise NotImplementedError(f"rope type {kind}")
    context, low, high = (rope[x] for x in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    wavelength = 2 * math.pi / frequency
    share = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return share * frequency + (1 - share) * frequency / rope["factor"], 1.0
