"""Match at admission: which runs of a request's uncached prompt donors hold, and what computing remains."""

from __future__ import annotations

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
    """costs: None relays whatever is found."""

    def __init__(
        self,
        config: RelayConfig,
        donors: Donors,
        depths: DepthMap,
        namespaces: Namespaces,
        costs: Costs | None,
    ) -> None:
        self._config = config
        self._donors = donors
        self._depths = depths
        self._namespaces = namespaces
        self._costs = costs

    def pieces(self, req: Req, state: RelayRequest, policy: Policy) -> list[Candidate]:
        """Disjoint pieces of ``req``'s prompt behind its cached prefix, sorted: first what another namespace adds to
        that prefix exactly, then donors' runs, best first; none if the donors' share is below ``min_relayed``, and
        neither if prefill is predicted to be faster."""
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
            pieces += found
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
        held: list[Candidate] = []
        for candidate in candidates[: 2 * self._config.max_segments]:
            if candidate.depth >= self._config.max_depth:
                continue
            available = self._donors.available(candidate)
            if available >= self._config.min_segment:
                held.append(candidate._replace(stop=candidate.start + available))
        return cover(held, start, stop, self._config.min_segment, self._config.max_segments)


def computed_tokens(pieces: list[Candidate], share: float, start: int, stop: int) -> int:
    """Tokens' worth of computing that extending ``[start, stop)`` costs: fresh tokens and the expected repair.

    ``share``: the policy's expected recomputed share of a reused token.
    """
    copied = 0.0
    for piece in pieces:
        part = piece.clip(start, stop - 1)
        if part.stop > part.start:
            copied += (part.stop - part.start) * (1.0 if piece.donor == EXACT_PREFIX else 1.0 - share)
    return stop - start - int(copied)


def reachable(pieces: list[Candidate], share: float, start: int, stop: int, budget: int) -> int:
    """Largest end in ``[start, stop]`` up to which extending costs at most ``budget`` tokens of computing."""
    low, high = start, stop
    while low < high:
        middle = (low + high + 1) // 2
        if computed_tokens(pieces, share, start, middle) <= budget:
            low = middle
        else:
            high = middle - 1
    return low
