"""Tiny models with random weights, made in memory from mlx-lm's own architectures.

The same kind has the same weights in every process: each array has a key of its own, made of its
name. Nothing here reads or sets MLX's global random state.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import zlib
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import falcon_h1, lfm2, llama, llama4, mamba2, qwen2

from families import CHATML, Family, write_tokenizer
from mlx_promptcache.arrays import to_array
from mlx_promptcache.state import State

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

VOCAB = 256
WINDOW = 32
CHUNK = 48

LLAMA = {
    "model_type": "llama",
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCAB,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}


def uneven(model: Any, *, step: float = 2.0**-23) -> Any:
    """Let the bits of all that a model computes depend on the width of its passes.

    On a GPU, and with a fast BLAS, they do. Where they do not, a test that compares bits could not
    tell rows of one pass from those of another. Models that round what they compute, or that soon
    forget it, need a larger step than others.
    """
    for module in model.modules():
        if hasattr(module, "as_linear"):  # an embedding
            kind: Any = type(module)
            object.__setattr__(module, "__class__", _uneven(kind, step))
    return model


@functools.cache
def _uneven(embedding: Any, step: float) -> Any:
    """A class of embeddings whose rows depend on how many tokens go through it at once. Every other
    item does: what all have in common a normalisation takes out again.
    """

    def call(self: Any, x: mx.array) -> mx.array:
        rows: mx.array = embedding.__call__(self, x)
        touched = mx.arange(rows.shape[-1]) % 2
        return rows * (1 + touched * (x.shape[-1] % 251 * step))

    return type(f"Uneven{embedding.__name__}", (embedding,), {"__call__": call})


def with_weights(model: Any) -> Any:
    """Give every matrix of a model random weights; scales and biases stay as they are made."""
    weights = []
    parameters: list[Any] = list(tree_flatten(model.parameters()))
    for name, array in parameters:
        if array.ndim > 1:
            key = mx.random.key(zlib.crc32(name.encode()))
            fan_in = array.size // array.shape[0]
            array = mx.random.normal(array.shape, key=key) * (1.5 / fan_in**0.5)
        weights.append((name, array))
    model.update(tree_unflatten(weights))
    mx.eval(model.parameters())
    return model


def without_biases(model: Any) -> Any:
    """Set all biases to 0: those of a linear layer are made from MLX's global random state."""
    parameters: list[Any] = list(tree_flatten(model.parameters()))
    biases = [(name, mx.zeros_like(a)) for name, a in parameters if name.endswith(".bias")]
    model.update(tree_unflatten(biases))
    return model


def plain() -> Any:
    """A llama: every layer a `KVCache`."""
    return uneven(with_weights(llama.Model(llama.ModelArgs.from_dict(LLAMA))))


def bare() -> Any:
    """A qwen2, which leaves its caches to mlx-lm: with a `max_size` each is a `RotatingKVCache`.

    Models that make their own, as llamas do, pass that setting over.
    """
    return uneven(without_biases(with_weights(qwen2.Model(qwen2.ModelArgs.from_dict(LLAMA)))))


def smallest() -> Any:
    """A llama of one narrow layer, whose files have few bytes."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 16}
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4}
    return uneven(with_weights(llama.Model(llama.ModelArgs.from_dict({**LLAMA, **sizes, **heads}))))


def rotating() -> Any:
    """A llama of windows of 32 tokens (`RotatingKVCache`) around a full layer."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = {**LLAMA, "num_hidden_layers": 3, "layer_types": kinds, "sliding_window": WINDOW}
    return uneven(with_weights(llama.Model(llama.ModelArgs.from_dict(config))))


def recurrent() -> Any:
    """A mamba2: every layer an `ArraysCache`, no rows at all."""
    args = mamba2.ModelArgs(
        model_type="mamba2", num_heads=4, head_dim=16, vocab_size=VOCAB, hidden_size=32,
        intermediate_size=64, state_size=8, num_hidden_layers=2, layer_norm_epsilon=1e-5,
        conv_kernel=4, n_groups=1, use_bias=False, use_conv_bias=True, tie_word_embeddings=False,
        time_step_limit=(0.0, 100.0), time_step_rank="auto",
    )  # fmt: skip
    return uneven(with_weights(mamba2.Model(args)))


HYBRID: dict[str, Any] = {
    "model_type": "lfm2", "hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "max_position_embeddings": 4096, "norm_eps": 1e-5,
    "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_multiple_of": 8,
    "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "block_ff_dim": 96,
    "layer_types": ["conv", "full_attention", "conv"],
}  # fmt: skip


def hybrid() -> Any:
    """An lfm2: convolutions (`ArraysCache`) around attention (`KVCache`)."""
    args = lfm2.ModelArgs(**HYBRID, vocab_size=VOCAB)
    return uneven(with_weights(lfm2.Model(args)))


def nested() -> Any:
    """A falcon_h1: every layer a `CacheList` of an `ArraysCache` and a `KVCache`."""
    args = falcon_h1.ModelArgs(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, head_dim=8, mamba_d_head=8,
        mamba_d_ssm=32, mamba_d_state=8, mamba_n_heads=4, num_attention_heads=4,
        num_hidden_layers=2, num_key_value_heads=2, lm_head_multiplier=1.0,
    )  # fmt: skip
    return uneven(with_weights(falcon_h1.Model(args)))


def chunked() -> Any:
    """A llama4: chunks of 48 tokens (`ChunkedKVCache`), and a full layer at the end."""
    text = {
        "attention_bias": False,
        "attention_chunk_size": CHUNK,
        "head_dim": 16,
        "hidden_size": 32,
        "interleave_moe_layer_step": 8,
        "intermediate_size": 32,
        "intermediate_size_mlp": 64,
        "max_position_embeddings": 4096,
        "model_type": "llama4_text",
        "num_attention_heads": 2,
        "num_experts_per_tok": 1,
        "num_hidden_layers": 4,
        "num_key_value_heads": 1,
        "num_local_experts": 2,
        "rms_norm_eps": 1e-5,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "use_qk_norm": False,
        "vocab_size": VOCAB,
    }
    args = llama4.ModelArgs(text_config=text, model_type="llama4")
    return uneven(with_weights(llama4.Model(args)))


KINDS: dict[str, Callable[[], Any]] = {
    "plain": plain,
    "rotating": rotating,
    "recurrent": recurrent,
    "hybrid": hybrid,
    "nested": nested,
    "chunked": chunked,
}


def random_tokens(n: int, seed: int, vocab: int = VOCAB) -> list[int]:
    """Tokens that look like nothing else; the same for the same seed."""
    draw = random.Random(seed)
    return [draw.randrange(vocab) for _ in range(n)]


# To compare


def bits(array: mx.array) -> tuple[str, tuple[int, ...], bytes]:
    """All that an array is: equal only to the same dtype, shape and bits."""
    copied = to_array(array)
    return copied.dtype, copied.shape, bytes(copied.data)


def digest(*values: Any) -> str:
    """A hash of arrays, states and whatever has a `repr`: equal only for the same bits."""
    text = hashlib.sha256()
    for value in values:
        if isinstance(value, mx.array):
            text.update(repr(bits(value)).encode())
        elif isinstance(value, State):
            text.update(digest(*_parts(value)).encode())
        else:
            text.update(repr(value).encode())
    return text.hexdigest()


def _parts(state: State) -> list[Any]:
    parts: list[Any] = [state.tokens, state.logits, state.embedding, state.rng, state.sampling]
    for layer in state.contents:
        arrays = {**layer.rows, **layer.arrays}
        # In order: releases of mlx-lm set the same attributes one after the other, or otherwise.
        attributes = sorted((layer.attributes or {}).items())
        parts += [layer.path, attributes, *sorted(arrays), *map(arrays.get, sorted(arrays))]
    return parts


# On disk


def on_disk(directory: Path, kind: str = "plain", family: Family = CHATML) -> Path:
    """Write the directory of a tiny model that `mlx_lm.load` accepts: a llama (`plain` or
    `rotating`), the qwen2 (`bare`), or the lfm2 (`hybrid`).
    """
    directory.mkdir(parents=True, exist_ok=True)
    vocabulary, end = write_tokenizer(directory, family)
    config: dict[str, Any] = {
        **LLAMA,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocabulary,
        "max_position_embeddings": 2048,
    }
    if kind == "rotating":
        config["layer_types"] = ["sliding_attention", "full_attention"]
        config["sliding_window"] = WINDOW
    elif kind == "bare":
        config["model_type"] = "qwen2"
    elif kind == "hybrid":
        config |= HYBRID
    elif kind != "plain":
        raise ValueError(f"a {kind!r} is not written")
    modules: dict[str, Any] = {"bare": qwen2, "hybrid": lfm2}
    module = modules.get(kind, llama)
    model = without_biases(with_weights(module.Model(module.ModelArgs.from_dict(config))))
    config["eos_token_id"] = end
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(directory / "model.safetensors"), weights, {"format": "mlx"})
    return directory
