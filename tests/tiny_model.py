"""A random Llama checkpoint with a real tokenizer, small enough to be made and served within a test.

The weights are random but not featureless: attention scores have a standard deviation above one, so that a wrong key or
a wrong position changes the output, and greedy continuations vary instead of repeating one token.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS, TURN = "<|begin|>", "<|end|>", "<|turn|>"
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|turn|>' + message['role'] + '\\n' + message['content'] + eos_token + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\\n' }}{% endif %}"
)
_CONSONANTS, _VOWELS = "bcdfghjklmnprstvwz", "aeiou"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_tiny_llama(
    path: str | Path,
    *,
    dtype: str = "float32",
    layers: int = 6,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    vocab: int = 1024,
    rope_scaling: dict[str, Any] | None = None,
    max_position: int = 8192,
    seed: int = 0,
) -> Path:
    """Write a Hugging Face checkpoint directory and return its path; same arguments, same bytes.

    Args:
        path: directory, made if missing.
        dtype: of the weights: float32, bfloat16 or float16.
        hidden: width; ``hidden / heads`` is the head dimension (32 by default).
        vocab: at least 320: 3 special tokens, 256 bytes, then merges.
        rope_scaling: as in ``config.json``, e.g. ``{"rope_type": "linear", "factor": 2.0}``.
        max_position: context length.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = _train_tokenizer(vocab, seed)
    head_dim = hidden // heads
    intermediate = 2 * hidden
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "vocab_size": vocab,
        "max_position_embeddings": max_position,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": rope_scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "torch_dtype": dtype,
    }
    _write_json(path / "config.json", config)
    _write_json(path / "generation_config.json", {k: config[k] for k in ("bos_token_id", "eos_token_id")})
    _write_json(
        path / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "model_max_length": max_position,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    tokenizer.save(str(path / "tokenizer.json"))
    save_file(
        _random_weights(layers, hidden, head_dim, heads, kv_heads, intermediate, vocab, _DTYPES[dtype], seed),
        str(path / "model.safetensors"),
        metadata={"format": "pt"},
    )
    return path


def random_text(words: int, seed: int) -> str:
    """Lower-case pseudo-words of the language that the tokenizer was trained on."""
    rng = random.Random(seed)
    lexicon = [
        "".join(rng.choice(_CONSONANTS) + rng.choice(_VOWELS) for _ in range(rng.randint(1, 3))) for _ in range(400)
    ]
    return " ".join(rng.choice(lexicon) for _ in range(words))


def _train_tokenizer(vocab: int, seed: int) -> Tokenizer:
    """Byte-level BPE of exactly `vocab` tokens, so that every id the model can emit decodes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[BOS, EOS, TURN],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([random_text(4000, seed + i) for i in range(4)], trainer)
    assert tokenizer.get_vocab_size() == vocab, f"the text yields {tokenizer.get_vocab_size()} tokens, not {vocab}"
    return tokenizer


def _random_weights(
    layers: int,
    hidden: int,
    head_dim: int,
    heads: int,
    kv_heads: int,
    intermediate: int,
    vocab: int,
    dtype: torch.dtype,
    seed: int,
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(rows: int, cols: int, gain: float) -> torch.Tensor:
        """Maps inputs of unit RMS to outputs of RMS `gain`."""
        return (torch.randn(rows, cols, generator=generator) * (gain / cols**0.5)).to(dtype)

    def norm() -> torch.Tensor:
        return (1.0 + 0.1 * torch.randn(hidden, generator=generator)).to(dtype)

    weights = {
        "model.embed_tokens.weight": torch.randn(vocab, hidden, generator=generator).to(dtype),
        "model.norm.weight": norm(),
        # Logits of standard deviation 3: a clear but not degenerate favourite among `vocab` tokens.
        "lm_head.weight": normal(vocab, hidden, 3.0),
    }
    for i in range(layers):
        p = f"model.layers.{i}."
        weights |= {
            # q.k / sqrt(head_dim) then has standard deviation 1.5 ** 2: attention picks tokens, it does not average.
            p + "self_attn.q_proj.weight": normal(heads * head_dim, hidden, 1.5),
            p + "self_attn.k_proj.weight": normal(kv_heads * head_dim, hidden, 1.5),
            p + "self_attn.v_proj.weight": normal(kv_heads * head_dim, hidden, 1.0),
            p + "self_attn.o_proj.weight": normal(hidden, heads * head_dim, 1.0),
            p + "mlp.gate_proj.weight": normal(intermediate, hidden, 1.0),
            p + "mlp.up_proj.weight": normal(intermediate, hidden, 1.0),
            p + "mlp.down_proj.weight": normal(hidden, intermediate, 1.0),
            p + "input_layernorm.weight": norm(),
            p + "post_attention_layernorm.weight": norm(),
        }
    return weights


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
