"""A GGUF file's byte-pair tokenizer as a Hugging Face tokenizer.

Three things a generic loader gets wrong are done here: SmolLM's merges were learned on text whose digits stand alone
(``tokenizer.ggml.pre = smollm``), the file says whether a beginning-of-sequence token is put in front (it is not), and
the chat template is the file's own.
"""

from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sglang_relay.models.checkpoint import special_id
from sglang_relay.models.sources import ModelError

_CONTROL = 3
"""ggml's token type of special tokens."""


def build_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer that a GGUF header describes.

    Raises
    ------
    ModelError
        If the header describes a tokenizer of another kind.
    """
    kind = (metadata["tokenizer.ggml.model"], metadata.get("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm") or metadata.get("tokenizer.ggml.add_bos_token", False):
        raise ModelError(f"tokenizer {'/'.join(map(str, kind))} (or one that adds a bos token) is not implemented")
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(t, normalized=False, special=True)
            for t, kind in zip(tokens, types, strict=True)
            if kind == _CONTROL
        ]
    )

    def token(name: str) -> str:
        return tokens[special_id(metadata, name)]

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=token("bos"),
        eos_token=token("eos"),
        unk_token=token("unknown"),
        pad_token=token("padding"),
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
        model_max_length=metadata["llama.context_length"],
    )
