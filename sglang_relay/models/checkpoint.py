"""From an open GGUF file of the Llama architecture to the weights and configuration of a Hugging Face checkpoint."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import GenerationConfig, LlamaConfig

from sglang_relay.models.sources import ModelError
from sglang_relay.models.unpack import unpack

if TYPE_CHECKING:
    from gguf import GGUFReader

WEIGHTS = "model.safetensors"

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def open_gguf(file: Path) -> "GGUFReader":
    """Open a GGUF file with gguf-py.

    Raises
    ------
    ModelError
        If gguf-py is not installed; it comes with the extra ``models``.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError("gguf is not installed: pip install 'sglang-relay[models]'") from error
    return GGUFReader(file)


def read_metadata(reader: "GGUFReader") -> dict[str, Any]:
    """Every key of the file's header, arrays as lists."""
    return {key: field.contents() for key, field in reader.fields.items()}


def build_config(metadata: dict[str, Any], tensor_names: set[str], dtype: str) -> LlamaConfig:
    """The model's configuration, from the file's header.

    Raises
    ------
    ModelError
        If the file holds another architecture, or scales its rotary embedding.
    """
    if metadata["general.architecture"] != "llama":
        raise ModelError(f"architecture {metadata['general.architecture']!r} is not implemented, only llama")
    if scaled := sorted(key for key in metadata if key.startswith("llama.rope.scaling")):
        raise ModelError(f"rotary scaling is not implemented: {', '.join(scaled)}")
    hidden, heads = metadata["llama.embedding_length"], metadata["llama.attention.head_count"]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(metadata["tokenizer.ggml.tokens"]),
        hidden_size=hidden,
        intermediate_size=metadata["llama.feed_forward_length"],
        num_hidden_layers=metadata["llama.block_count"],
        num_attention_heads=heads,
        num_key_value_heads=metadata["llama.attention.head_count_kv"],
        head_dim=metadata.get("llama.attention.key_length", hidden // heads),
        max_position_embeddings=metadata["llama.context_length"],
        # The header holds float32; its shortest decimal is the value that was meant.
        rms_norm_eps=float(str(np.float32(metadata["llama.attention.layer_norm_rms_epsilon"]))),
        rope_parameters={"rope_type": "default", "rope_theta": float(metadata["llama.rope.freq_base"])},
        tie_word_embeddings="output.weight" not in tensor_names,
        dtype=dtype,
        bos_token_id=special_id(metadata, "bos"),
        eos_token_id=special_id(metadata, "eos"),
        pad_token_id=special_id(metadata, "padding"),
    )


def build_generation_config(metadata: dict[str, Any]) -> GenerationConfig:
    """Greedy by default, ending at the model's own end-of-turn token."""
    return GenerationConfig(
        do_sample=False,
        bos_token_id=special_id(metadata, "bos"),
        eos_token_id=special_id(metadata, "eos"),
        pad_token_id=special_id(metadata, "padding"),
    )


def special_id(metadata: dict[str, Any], name: str) -> int:
    """The id of a special token: ``bos``, ``eos``, ``padding`` or ``unknown``."""
    return metadata[f"tokenizer.ggml.{name}_token_id"]


def hf_name(gguf_name: str) -> str:
    """The Hugging Face name of a GGUF tensor; an unknown one is an error, never dropped."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", gguf_name)
    if layer and layer[2] in _LAYER:
        return f"model.layers.{layer[1]}.{_LAYER[layer[2]]}.weight"
    stem = gguf_name.removesuffix(".weight")
    if stem != gguf_name and stem in _TOP:
        return f"{_TOP[stem]}.weight"
    raise ModelError(f"the GGUF file holds a tensor that this converter does not know: {gguf_name}")


def _rotary_heads(gguf_name: str, metadata: dict[str, Any]) -> int | None:
    """Heads of a matrix whose rows llama.cpp reorders, ``None`` for all others.

    Hugging Face rotates dimension i of a head with i + d/2, llama.cpp 2i with 2i + 1, so the rows of the query and key
    matrices are interleaved in a GGUF file.
    """
    if gguf_name.endswith(".attn_q.weight"):
        return metadata["llama.attention.head_count"]
    if gguf_name.endswith(".attn_k.weight"):
        return metadata["llama.attention.head_count_kv"]
    return None


def _split_halves(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head from (pair, half) order to (half, pair) order."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _interleave_halves(matrix: torch.Tensor, heads: int) -> torch.Tensor:
    """The inverse of `_split_halves`."""
    rows, columns = matrix.shape
    return matrix.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def write_weights(
    reader: "GGUFReader", metadata: dict[str, Any], dtype: str, folder: Path, advance: Callable[[], object]
) -> None:
    """Unpack every tensor to float32, round once to ``dtype``, and write ``model.safetensors``."""
    torch_dtype = getattr(torch, dtype)
    state: dict[str, torch.Tensor] = {}
    for tensor in reader.tensors:
        values = unpack(tensor.tensor_type.name, tensor.data)
        heads = _rotary_heads(tensor.name, metadata)
        if heads is not None:
            values = _split_halves(values, heads)
        state[hf_name(tensor.name)] = torch.from_numpy(values).to(torch_dtype).contiguous()
        advance()
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})


def verify(
    reader: "GGUFReader", metadata: dict[str, Any], dtype: str, folder: Path, advance: Callable[[], object]
) -> int:
    """Compare what was written with gguf-py's own unpacking of the same file, bit for bit.

    Returns the number of tensors, all of them equal.

    Raises
    ------
    ModelError
        For the first tensor that differs, is missing or is too many.
    """
    torch_dtype = getattr(torch, dtype)
    with safe_open(folder / WEIGHTS, "pt") as saved:
        unseen = set(saved.keys())
        for name, values in _gguf_unpacked(reader):
            key = hf_name(name)
            ours, theirs = saved.get_tensor(key), torch.from_numpy(values).to(torch_dtype)
            heads = _rotary_heads(name, metadata)
            if heads is not None:
                ours = _interleave_halves(ours, heads)
            if ours.dtype != torch_dtype or not torch.equal(ours, theirs):
                raise ModelError(f"conversion failed: {key} differs from gguf-py's unpacking of {name}")
            unseen.remove(key)
            advance()
    if unseen:
        raise ModelError(f"conversion failed: tensors that the GGUF file does not hold: {', '.join(sorted(unseen))}")
    return len(reader.tensors)


def _gguf_unpacked(reader: "GGUFReader") -> Iterator[tuple[str, np.ndarray]]:
    from gguf import dequantize

    for tensor in reader.tensors:
        yield tensor.name, np.array(dequantize(tensor.data, tensor.tensor_type))
