"""mlx-lm's server, checked: what is relied on of it is there.

Its names are no interface that mlx-lm promises. Another release may lack them; then there is no
server, and one sentence says so, before anything is loaded.
"""

from __future__ import annotations

import inspect
from typing import Any

from mlx_promptcache.engine import cache as mlx_cache
from mlx_promptcache.engine import version
from mlx_promptcache.errors import ServingError

TRIED = "0.31.3 to 0.32.2"
NAMES = (
    "argparse", "main", "run", "scan_cache_dir", "APIHandler.do_POST",
    "APIHandler._set_completion_headers", "ResponseGenerator.generate",
    "ResponseGenerator.stop_and_join",
)  # fmt: skip
PARAMETERS = {
    "APIHandler.handle_chat_completions": {"self"},
    "APIHandler.handle_text_completions": {"self"},
    "APIHandler.handle_completion": {"self", "request", "stop_words"},
    "ModelProvider.load_default": {"self"},
    "ModelProvider._load": {"self", "model_path", "adapter_path", "draft_model_path"},
    "ResponseGenerator": {"model_provider", "prompt_cache"},
    "ResponseGenerator._next_request": {"self", "timeout"},
    "ResponseGenerator._tokenize": {"self", "tokenizer", "request", "args"},
    "_run_http_server": {"host", "port", "response_generator", "server_class", "handler_class"},
    "run": {"host", "port", "model_provider"},
    "LRUPromptCache": {"max_size"},
    "LRUPromptCache.fetch_nearest_cache": {"self", "model", "tokens"},
    "LRUPromptCache.insert_cache": {"self", "model", "tokens", "prompt_cache", "cache_type"},
}


def server() -> Any:
    """`mlx_lm.server`.

    Raises:
        ServingError: it cannot be imported, or is not as it is relied on.
    """
    try:
        from mlx_lm import server as module
    except Exception as exc:
        raise ServingError(f"the server of mlx-lm {version()} cannot be imported: {exc}") from exc
    lacking = missing(module)
    if lacking:
        raise ServingError(
            f"mlx-lm {version()} has another server than `serve` is made for ({lacking[0]} is not "
            f"as it was): use mlx-lm {TRIED}"
        )
    return module


def missing(module: Any) -> list[str]:
    """The names that are not there, or do not take what they are given."""
    return [name for name in NAMES if _found(module, name) is None] + [
        name for name, wanted in PARAMETERS.items() if not wanted <= _parameters(module, name)
    ]


def _found(module: Any, name: str) -> Any:
    found = mlx_cache if name.startswith("LRUPromptCache") else module
    for part in name.split("."):
        found = getattr(found, part, None)
    return found


def _parameters(module: Any, name: str) -> set[str]:
    try:
        return set(inspect.signature(_found(module, name)).parameters)
    except (TypeError, ValueError):
        return set()
