"""An independent fp64 decoder that says which logits a relayed prefill must produce.

Written from the model definition (Llama family: RMSNorm, rotary embedding, grouped-query attention, SwiGLU) and from
the policies' published definitions. It shares no code with the package or with SGLang, keeps one row per prompt
position and leaves out everything that makes a server fast: no slots, no stages, no kernels. What differs between
policies is only the set of rows that each layer computes.
"""

import json
import math
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

Mutation = Literal["rotation_off_by_one", "row_mask", "swapped_slots", "stale_stage", "missing_last_layer"]


class Segment(NamedTuple):
    """Prompt positions [start, stop) whose K and V come from a donor that held them at `source_start` onwards.

    k, v: [layers, stop - start, kv_heads, head_dim] as the server caches them; keys carry the donor's positions.
    """

    start: int
    stop: int
    source_start: int
    k: Tensor
    v: Tensor


class Rotate(NamedTuple):
    """Fresh tokens run through all layers; reused ones keep re-rotated donor KV."""


class Full(NamedTuple):
    """Every token runs through all layers."""


class Relay(NamedTuple):
    """The paper's policy, entered from embeddings.

    All tokens run through layers 0..det, fresh and selected ones through det+1..end, fresh ones through the rest.
    Selected are the tokens of a segment whose value deviation at layer `det` is at least `tau_dev` times the segment's
    mean, and the segment's last `suffix` tokens.
    """

    det: int
    end: int
    tau_dev: float
    suffix: int


Policy = Rotate | Full | Relay


class Result(NamedTuple):
    """logits: [vocab] at the last position. k, v: [layers, n, kv_heads, head_dim] as cached after the prefill.

    selected: bool [n], reused rows that `Relay` kept after layer `det`. deviation: [n], NaN where it was not measured.
    """

    logits: Tensor
    k: Tensor
    v: Tensor
    selected: Tensor
    deviation: Tensor


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
        return self.run(tokens, [], Full())

    @torch.no_grad()
    def run(self, tokens: list[int], segments: list[Segment], policy: Policy, mutate: Mutation | None = None) -> Result:
        """Prefill `tokens` with `segments` taken from donors, no prefix cached.

        Args:
            tokens: the prompt. Its last token must be fresh.
            segments: disjoint.
            mutate: a deliberate error, to show that a comparison would notice it:
                rotation_off_by_one: donor keys are turned to one position too far;
                row_mask: causality by row number among the rows computed, bottom-right aligned, instead of by position;
                swapped_slots: the first tokens of the first and the last segment receive each other's donor KV. (Within
                one segment an exchange is no error: a key carries its position, and attention ignores the order.)
                stale_stage: rows leave a stage one layer late;
                missing_last_layer: the last layer is not run.
        """
        n = len(tokens)
        reused = torch.zeros(n, dtype=torch.bool)
        for s in segments:
            assert not reused[s.start : s.stop].any() and s.stop < n, "segments overlap or cover the last token"
            reused[s.start : s.stop] = True
        late = int(mutate == "stale_stage")
        k, v = self._place(n, segments, mutate)
        selected = torch.zeros(n, dtype=torch.bool)
        deviation = torch.full((n,), math.nan, dtype=torch.float64)
        positions = torch.arange(n)
        x = self.weights["model.embed_tokens.weight"][tokens].double()
        for layer in range(self.layers - (mutate == "missing_last_layer")):
            rows = positions[~reused | _recomputed(policy, layer - late, selected)]
            h = self._norm(x[rows], f"model.layers.{layer}.input_layernorm.weight")
            q = self._turn(self._heads(h, layer, "q"), rows)
            fresh_k, fresh_v = self._turn(self._heads(h, layer, "k"), rows), self._heads(h, layer, "v")
            if isinstance(policy, Relay) and layer == policy.det:
                for s in segments:
                    span = slice(s.start, s.stop)
                    deviation[span] = 1 - torch.cosine_similarity(v[layer, span], fresh_v[span], dim=-1).mean(-1)
                    selected[span] = deviation[span] >= policy.tau_dev * deviation[span].mean()
                    selected[max(s.start, s.stop - policy.suffix) : s.stop] = True
            k[layer, rows], v[layer, rows] = fresh_k, fresh_v
            sees = torch.arange(len(rows)) + n - len(rows) if mutate == "row_mask" else rows
            x[rows] += self._attend(q, k[layer], v[layer], positions <= sees[:, None], layer)
            h = self._norm(x[rows], f"model.layers.{layer}.post_attention_layernorm.weight")
            gate = torch.nn.functional.silu(self._linear(h, f"model.layers.{layer}.mlp.gate_proj"))
            up = self._linear(h, f"model.layers.{layer}.mlp.up_proj")
            x[rows] += self._linear(gate * up, f"model.layers.{layer}.mlp.down_proj")
        head = "model.embed_tokens" if "lm_head.weight" not in self.weights else "lm_head"
        logits = self._linear(self._norm(x[-1], "model.norm.weight"), head)
        return Result(logits, k, v, selected, deviation)

    def _place(self, n: int, segments: list[Segment], mutate: Mutation | None) -> tuple[Tensor, Tensor]:
        """K and V before anything is computed: donors' at their new positions, NaN where nothing may be read yet."""
        k = torch.full((self.layers, n, self.kv_heads, self.head_dim), math.nan, dtype=torch.float64)
        v = k.clone()
        donors = [(s.k.double().clone(), s.v.double().clone()) for s in segments]
        if mutate == "swapped_slots":
            assert len({s.start - s.source_start for s in (segments[0], segments[-1])}) == 2, "needs two distances"
            for first, last in zip(donors[0], donors[-1], strict=True):
                first[:, 0], last[:, 0] = last[:, 0].clone(), first[:, 0].clone()
        for s, (donor_k, donor_v) in zip(segments, donors, strict=True):
            offset = torch.arange(s.stop - s.start)
            target = s.start + offset + (mutate == "rotation_off_by_one")
            k[:, s.start : s.stop] = self._turn(donor_k, target, s.source_start + offset)
            v[:, s.start : s.stop] = donor_v
        return k, v

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, layer: int) -> Tensor:
        """Rows' attention over all positions that `mask` [rows, n] lets them see, through the output projection."""
        out = []
        for head in range(self.heads):
            kv = head // (self.heads // self.kv_heads)
            score = (q[:, head] @ k[:, kv].T / math.sqrt(self.head_dim)).masked_fill(~mask, -math.inf)
            seen = mask.any(0)
            out.append(score[:, seen].softmax(-1) @ v[seen, kv])
        return self._linear(torch.cat(out, -1), f"model.layers.{layer}.self_attn.o_proj")

    def _heads(self, h: Tensor, layer: int, which: str) -> Tensor:
        return self._linear(h, f"model.layers.{layer}.self_attn.{which}_proj").unflatten(-1, (-1, self.head_dim))

    def _turn(self, x: Tensor, target: Tensor, source: Tensor | None = None) -> Tensor:
        """[..., n, heads, head_dim] turned from `source` (none: unrotated) to `target` positions, NeoX pairing."""
        angle = self._angle(target) - (self._angle(source) if source is not None else 0)
        pair = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angle), angle)[:, None]
        return torch.cat((pair.real, pair.imag), -1)

    def _angle(self, position: Tensor) -> Tensor:
        """[n, head_dim / 2]. In fp32 like every implementation of the model: it is part of the definition."""
        return torch.outer(position.float() / self.stretch, self.frequency).double()

    def _norm(self, x: Tensor, weight: str) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"])
        return x * scale * self.weights[weight].double()

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self.weights.get(f"{name}.bias")
        return torch.nn.functional.linear(
            x, self.weights[f"{name}.weight"].double(), None if bias is None else bias.double()
        )


def _recomputed(policy: Policy, layer: int, selected: Tensor) -> Tensor:
    """bool [n]: the rows that `layer` computes besides the fresh ones."""
    if isinstance(policy, Full) or (isinstance(policy, Relay) and layer <= policy.det):
        return torch.ones_like(selected)
    if isinstance(policy, Relay) and layer <= policy.end:
        return selected
    return torch.zeros_like(selected)


def _rotary(config: dict[str, Any], head_dim: int) -> tuple[Tensor, float]:
    """(fp32 frequency per pair, divisor of positions) of default, linear and llama3 rotary embeddings."""
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = rope.get("rope_theta") or config.get("rope_theta", 10000.0)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    frequency = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if kind == "default":
        return frequency, 1.0
    if kind == "linear":
        return frequency, float(rope["factor"])
    if kind != "llama3":
        raise NotImplementedError(f"rope type {kind}")
    context, low, high = (rope[x] for x in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"))
    wavelength = 2 * math.pi / frequency
    share = ((context / wavelength - low) / (high - low)).clamp(0, 1)
    return share * frequency + (1 - share) * frequency / rope["factor"], 1.0
