"""One run of llama.cpp, for scripts/bench: the first tokens after a prompt, computed or restored.

    llama_child.py keep GGUF SESSION HEAD_FILE          computes the head, and saves its session
    llama_child.py cold GGUF SESSION HEAD_FILE TAIL     computes head and tail
    llama_child.py warm GGUF SESSION HEAD_FILE TAIL     restores the session, and computes the tail

Runs in an environment of its own, which has llama-cpp-python and nothing of this project. It calls
llama.cpp's own functions: the Python class above them makes buffers that such a run does not need.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path

import llama_cpp as c

BATCH = 512
TOKENS = 8
ROOM = 256  # tokens of the context for the tail and the answer; llama.cpp wants multiples of 256


class Child:
    """A model and one context with room for the head, a tail and an answer."""

    def __init__(self, gguf: str, length: int) -> None:
        c.llama_backend_init()
        model_options = c.llama_model_default_params()
        self.model = c.llama_model_load_from_file(gguf.encode(), model_options)
        if not self.model:
            sys.exit(f"llama.cpp cannot load {gguf}")
        self.vocabulary = c.llama_model_get_vocab(self.model)
        options = c.llama_context_default_params()
        options.n_ctx = (length // ROOM + 2) * ROOM
        options.n_batch = options.n_ubatch = BATCH
        options.n_threads = options.n_threads_batch = os.cpu_count() or 1
        self.context = c.llama_init_from_model(self.model, options)

    def tokens_of(self, text: str, *, begins: bool) -> list[int]:
        """The tokens of a text; special ones where it names them."""
        raw = text.encode()
        room = (c.llama_token * (len(raw) + 8))()
        count = c.llama_tokenize(self.vocabulary, raw, len(raw), room, len(room), begins, True)
        return list(room[:count])

    def feed(self, tokens: list[int]) -> None:
        """Compute these tokens after those that are held."""
        for start in range(0, len(tokens), BATCH):
            piece = tokens[start : start + BATCH]
            array = (c.llama_token * len(piece))(*piece)
            if c.llama_decode(self.context, c.llama_batch_get_one(array, len(piece))):
                sys.exit("llama.cpp could not compute the prompt")

    def save(self, session: str, tokens: list[int]) -> None:
        """Save all that is held."""
        array = (c.llama_token * len(tokens))(*tokens)
        if not c.llama_state_save_file(self.context, session.encode(), array, len(tokens)):
            sys.exit(f"llama.cpp could not save {session}")

    def restore(self, session: str) -> None:
        """Go on from what was saved."""
        length = c.llama_n_ctx(self.context)
        array, count = (c.llama_token * length)(), ctypes.c_size_t()
        loaded = c.llama_state_load_file(
            self.context, session.encode(), array, length, ctypes.byref(count)
        )
        if not loaded:
            sys.exit(f"llama.cpp could not restore {session}")

    def generate(self) -> None:
        """Print the likeliest tokens, each as it comes."""
        sampler, piece = c.llama_sampler_init_greedy(), ctypes.create_string_buffer(256)
        for _ in range(TOKENS):
            token = c.llama_sampler_sample(sampler, self.context, -1)
            if c.llama_vocab_is_eog(self.vocabulary, token):
                return
            size = c.llama_token_to_piece(self.vocabulary, token, piece, len(piece), 0, False)
            os.write(1, piece.raw[:size])
            self.feed([token])


@c.llama_log_callback  # type: ignore[untyped-decorator]
def silent(level: int, text: bytes, data: object) -> None:
    """What llama.cpp has to say takes time, and nobody reads it."""


def main() -> None:
    """Do as the command line says."""
    way, gguf, session, head_file, *rest = sys.argv[1:]
    head = Path(head_file).read_text("utf-8")
    c.llama_log_set(silent, ctypes.c_void_p(0))
    # No text has more tokens than bytes; what is restored was measured when it was made.
    size_file = Path(session + ".tokens")
    length = int(size_file.read_text()) if size_file.exists() else len(head.encode()) // 2
    child = Child(gguf, length)
    if way == "warm":
        child.restore(session)
        child.feed(child.tokens_of(rest[0], begins=False))
    elif way == "cold":
        child.feed(child.tokens_of(head + rest[0], begins=True))
    else:
        tokens = child.tokens_of(head, begins=True)
        child.feed(tokens)
        child.save(session, tokens)
        size_file.write_text(str(len(tokens)))
        print(f"{len(tokens)} tokens kept")
        return
    child.generate()


if __name__ == "__main__":
    main()
