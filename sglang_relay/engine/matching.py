"""Match at admission: which runs of a request's uncached prompt donors hold, and are reused."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from sglang_relay.config import RelayConfig
from sglang_relay.engine.donors import EXACT_PREFIX, Donors, tokens_of
from sglang_relay.engine.namespaces import Namespaces
from sglang_relay.index import DepthMap
from sglang_relay.plan import Candidate, cover
from sglang_relay.policies import Policy

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req

    from sglang_relay.engine.costing import Costs
    from sglang_relay.engine.requests import RelayRequest


class Matcher:
    """costs: None relays whatever is found. chunk: most rows of a prefill forward, None without a limit."""

    def __init__(
        self,
        config: RelayConfig,
        donors: Donors,
        depths: DepthMap,
        namespaces: Namespaces,
        costs: Costs | None,
        chunk: int | None,
    ) -> None:
        self._config = config
        self._donors = donors
        self._depths = depths
        self._namespaces = namespaces
        self._costs = costs
        self._chunk = chunk

    def pieces(self, req: Req, state: RelayRequest, policy: Policy) -> list[Candidate]:
        """Disjoint pieces of ``req``'s prompt behind its cached prefix, sorted: first what another namespace adds to
        that prefix exactly, then donors' runs, best first; none if the donors' share is below ``min_relayed``, no more
        than one pass can repair, and neither if prefill is predicted to be faster."""
        tokens = tokens_of(req)
        start, stop = req.prefix_len, len(tokens) - 1
        if req.return_logprob and 0 <= req.logprob_start_len < len(req.origin_input_ids):
            # Prompt logprobs need the hidden state of every row from there on.
            stop = min(stop, max(start, req.logprob_start_len - 1))
        begin = self._exact_prefix(req, state, tokens, start, stop)
        pieces = [Candidate(start, begin, EXACT_PREFIX, start, 0)] if begin > start else []
        found = self._cover(self._donors.candidates(state.tenant, tokens, begin), begin, stop)
        state.shortfall = self._shortfall(found, len(tokens), policy)
        if state.shortfall is None:
            pieces += self._repairable(found, state, policy, len(tokens))
        return pieces if self._costs is None else self._worthwhile(req, state, pieces, policy, self._costs)

    def _worthwhile(
        self, req: Req, state: RelayRequest, pieces: list[Candidate], policy: Policy, costs: Costs
    ) -> list[Candidate]:
        budget, stop = state.controls.budget, len(req.full_untruncated_fill_ids)
        kept, predicted = costs.choose(req.rid, req.prefix_len, stop, pieces, policy, budget)
        state.report.pop("predicted_ms", None)
        if predicted is not None:
            state.shortfall = "predicted_slower"
            state.report["predicted_ms"] = predicted
        return kept

    def _shortfall(self, found: list[Candidate], prompt: int, policy: Policy) -> str | None:
        """Why donors' runs are not used after all, or None."""
        reused = sum(p.stop - p.start for p in found)
        if not found:
            return "nothing_to_reuse"
        if reused < self._config.min_relayed:
            return "below_min_relayed"
        if policy.probes and prompt - found[-1].stop >= self._config.route_above * reused:
            return "long_suffix"
        return None

    def _repairable(self, found: list[Candidate], state: RelayRequest, policy: Policy, prompt: int) -> list[Candidate]:
        """``found``, or the last of it, where a pass over all of it would be wider than the server's chunks."""
        if not policy.probes or self._chunk is None:
            return found
        budget, reused = state.controls.budget or policy.default_budget, sum(p.stop - p.start for p in found)
        share = 1.0 if budget is None else budget.limit(reused, len(found)) / reused
        kept = repairable(found, prompt, share, self._chunk, self._config.min_segment)
        if sum(p.stop - p.start for p in kept) >= self._config.min_relayed:
            return kept
        state.shortfall = "repair_exceeds_chunk"
        return []

    def _exact_prefix(self, req: Req, state: RelayRequest, tokens: np.ndarray, start: int, stop: int) -> int:
        """How far another namespace of the tenant continues the request's prefix with exact KV."""
        best = start + self._config.min_segment - 1
        for key in self._namespaces.siblings(state.tenant, state.controls.tier):
            reached = self._donors.prefix_held(req, (key, state.tenant.salt), stop)
            # Only relay namespaces have depths; a path that is approximate anywhere is no exact prefix.
            if reached > best and self._depths.depth(key, tokens, reached) == 0:
                best = reached
                state.prefix_key = (key, state.tenant.salt)
        return best if best - start >= self._config.min_segment else start

    def _cover(self, candidates: list[Candidate], start: int, stop: int) -> list[Candidate]:
        """Disjoint pieces, best candidates first, as long as their donors' KV is in the tree. Bounded look-ups."""
        allowed = [c for c in candidates[: 2 * self._config.max_segments] if c.depth < self._config.max_depth]
        lengths = zip(allowed, self._donors.available(allowed), strict=True)
        held = [c._replace(stop=c.start + length) for c, length in lengths if length >= self._config.min_segment]
        return cover(held, start, stop, self._config.min_segment, self._config.max_segments)


def repairable(pieces: list[Candidate], stop: int, share: float, chunk: int, shortest: int) -> list[Candidate]:
    """What of ``pieces``, from the last one backwards, one pass over at most ``chunk`` rows can repair.

    A probe repairs a prompt ``[.., stop)`` of several chunks in its last one. There run, for the second time, the fresh
    tokens behind the first reused one, and ``share`` (above 0) of the reused ones. shortest: least tokens of a piece.
    """
    kept: list[Candidate] = []
    reused = 0
    for piece in reversed(pieces):
        # A repair from ``low`` in this piece on takes stop - low - (1 - share) * (reused + piece.stop - low) rows.
        low = max(piece.start, math.ceil((stop - (1 - share) * (reused + piece.stop) - chunk) / share))
        if piece.stop - low < shortest:
            break
        kept.append(piece.clip(low, piece.stop))
        reused += piece.stop - low
        if low > piece.start:
            break
    return kept[::-1]
