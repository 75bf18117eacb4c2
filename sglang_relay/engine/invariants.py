"""What SGLang's scheduler takes for granted, as far as this extension could break it.

A batch that breaks one of these is not run as a relay: it is declined by name, and counted as a failure of ours.

- One prompt is unfinished at a time, and the scheduler knows which (``Scheduler.chunked_req``, asserted where
  ``new_chunked_req`` is taken over). It takes any other prompt of the batch for computed: it samples its answer, and
  files the answer's KV under the prompt's tokens.
- A prefill has at most ``chunked_prefill_size`` rows. The pool leaves room for their activations; kernels, expert
  parallelism and captured routing have buffers of this size.
- What has been sampled follows a computed prompt (``answered_too_early``): else the tree gets KV of other tokens.
- Tree locks are those of running requests when a step ends: admission, retraction and eviction count the rest as free.
  Donor locks are dropped when ``run_batch`` returns (hooks.py).
- Every last row of a chunk is computed by the batch itself, as the logits processor reads it (``RelayPlan``).
- Ranks of one tensor-parallel group call the tree, and reach collectives, in the same order (consensus.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang.srt.managers.schedule_batch import Req, ScheduleBatch

    from sglang_relay.engine.requests import RelayRequest


def broken_invariant(batch: ScheduleBatch, chunk: int | None) -> str | None:
    """Which invariant ``batch``, an admitted prefill, breaks, or None. chunk: most rows of a prefill, None for any."""
    unfinished = [r for r in batch.reqs if r.extend_end is not None and r.extend_end < len(r.full_untruncated_fill_ids)]
    if any(req is not batch.chunked_req for req in unfinished):
        return "host_invariant:unfinished_prompts"
    if chunk is not None and sum(r.extend_len for r in batch.reqs) > chunk:
        return "host_invariant:chunk_rows"
    return None


def answered_too_early(req: Req, state: RelayRequest, up_to: int) -> bool:
    """Whether ``req``, of which ``up_to`` tokens are to be published, has an output before its prompt was computed:
    behind ``state.reached`` its KV is of other tokens than its path says.

    A retracted request keeps its output while its prompt is computed again, in chunks: each publishes no more than is
    computed."""
    return bool(req.output_ids) and 0 <= state.reached < min(up_to, len(req.origin_input_ids))
