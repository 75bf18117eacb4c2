"""A logit processor that keeps the logits a request decodes with, and forces its continuation token by token.

It is how divergence from full prefill is measured on the decode path (measure/divergence.py). Only a server started
with ``--enable-custom-logit-processor`` accepts it. Such a server runs whatever code its clients send, so it lets
nobody do what they could not do without this module; the folder that it writes to is the request's choice.
"""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sglang.srt.sampling.custom_logit_processor import CustomLogitProcessor


class Forced(CustomLogitProcessor):
    """Of a request with these ``custom_params``:

    forced_tokens: ids; the request decodes exactly these, greedily or not, and whatever comes behind them is its own.
    forced_folder: an existing folder on the server's machine. Step i, from 0 for the prefill, leaves ``i.npy`` there:
    float32 [vocab], the logits before they are forced. Each file appears at once and whole; tensor-parallel ranks write
    the same one. A file that cannot be written is left out: an error in here would end the server.

    A step is known by the decode steps that were scheduled (``Req.decode_batch_idx``): ``output_ids`` lags behind under
    overlap scheduling, and a count of calls would include the chunks of a prompt that SGLang samples behind too (their
    files are replaced by the last chunk's). So a request that is retracted starts again at step 0. Speculative
    decoding, with several rows of a request in a step, is not supported.
    """

    def __call__(self, logits: torch.Tensor, custom_param_list: list[dict[str, Any]] | None = None) -> torch.Tensor:
        """logits: [rows, vocab], changed in place."""
        for row, params in zip(logits, custom_param_list or (), strict=True):
            step, tokens = params["__req__"].decode_batch_idx, params["forced_tokens"]
            if step >= len(tokens):
                continue
            with contextlib.suppress(OSError):
                _write(Path(params["forced_folder"]) / f"{step}.npy", row.float().cpu().numpy())
            row.fill_(-math.inf)
            row[tokens[step]] = 0
        return logits


def _write(file: Path, values: np.ndarray) -> None:
    handle, partial = tempfile.mkstemp(dir=file.parent)
    with os.fdopen(handle, "wb") as opened:
        np.save(opened, values)
    Path(partial).replace(file)
