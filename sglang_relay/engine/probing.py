"""The probe pass of a batch: which rows run in it, what they may see, and who asks about which tokens."""

from __future__ import annotations

import numpy as np

from sglang_relay.engine.layout import Layout, Span
from sglang_relay.ops import ProbeQueries


class ProbePass:
    """Of each prompt that ends in this chunk: the fresh tokens before its first segment, which are final, and its last
    fresh ones, at most ``queries``, which look at the segments. What lies between is not computed yet, and not seen;
    fresh tokens that an earlier chunk computed are.

    rows: int64, ascending rows that run. head: those that are final. missing: bool [rows of the layout], rows without K
    and V. asked: per prompt that ends here, the index of its plan and its queries. repeated: per plan, fresh tokens of
    earlier chunks, which run once more in the pass behind this one.
    """

    def __init__(self, layout: Layout, queries: int) -> None:
        self.asked: list[tuple[int, ProbeQueries]] = []
        self.repeated = [0] * len(layout.plans)
        heads, asking = [np.empty(0, dtype=np.int64)], []
        for number, plan in enumerate(layout.plans):
            spans = layout.approximate(number)
            if not plan.last or not spans:
                continue
            low, high = int(layout.starts[plan.row]), int(layout.starts[plan.row + 1])
            fresh = low + np.flatnonzero(layout.fresh[low:high])
            last = fresh[fresh >= spans[-1].stop][-queries:]
            heads.append(fresh[fresh < spans[0].row])
            asking.append((number, last, spans))
            self.repeated[number] = int(np.count_nonzero(layout.positions[fresh] < plan.prefix))
        self.head = np.concatenate(heads)
        self.rows = np.sort(np.concatenate([self.head, *(last for _, last, _ in asking)]))
        self.missing = layout.fresh & (layout.positions >= layout.prefixes[layout.owner])
        self.missing[self.rows] = False
        self.asked = [(number, self._rows(layout, last, spans)) for number, last, spans in asking]

    def _rows(self, layout: Layout, last: np.ndarray, spans: list[Span]) -> ProbeQueries:
        request, positions = int(layout.owner[last[0]]), layout.positions[last]
        keys = layout.keys(request, int(positions[-1]) + 1, self.missing)
        slots = layout.slots[request][layout.tensor(keys)]
        wanted = np.concatenate([s.positions for s in spans])
        return ProbeQueries(np.searchsorted(self.rows, last), positions, keys, slots, wanted)
