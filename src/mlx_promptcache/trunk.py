"""The trunk of a model: all of it but the head that makes logits of hidden states.

Two things are wanted of a forward call that mlx-lm's models do not offer: the hidden state of the
last token, and logits of the last token alone (a head over a whole chunk of a prompt costs as much
as some layers). Every architecture calls its trunk and then its head, and some add a scale or a cap
after it. So the trunk is watched: while a call lasts its `__call__` is one that keeps the last
hidden state, and hands only that on. Whatever stands after it stays the model's own.

Where no such module is found, `hidden` stays None and logits are computed for all tokens.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import mlx.core as mx
from mlx.nn.layers.base import Module

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Forward = Callable[[], mx.array]

PROBE_TOKENS = 2
DEPTH = 3  # a wrapper of a language model of a trunk


class Trunk:
    """The trunk of one model, watched while `watched` lasts."""

    def __init__(self, module: Module | None) -> None:
        self._module = module
        self._calls = 0
        self._every = False
        self.hidden: mx.array | None = None
        """`[batch, 1 or tokens, hidden]` of the last call, or None."""
        if module is not None:
            self._class = type(module)
            self._watching = self._subclass(type(module))

    @classmethod
    def of(cls, model: Module, forward: Forward, shape: tuple[int, ...]) -> Trunk:
        """Find the trunk of a model by trying: `forward` calls the model with two tokens, which
        gives logits of this shape if nobody watches.

        Nothing is evaluated: shapes tell.
        """
        for module in _candidates(model, DEPTH):
            trunk = cls(module)
            if trunk._serves(forward, shape):
                return trunk
        return cls(None)

    @property
    def found(self) -> bool:
        """Whether there is one: else no hidden state can be read."""
        return self._module is not None

    def _serves(self, forward: Forward, shape: tuple[int, ...]) -> bool:
        try:
            with self.watched():
                logits = forward()
        except Exception:  # noqa: BLE001 - whatever a model does with a shorter hidden state
            return False
        return (
            self._calls == 1
            and self.hidden is not None
            and self.hidden.shape[-1] != shape[-1]
            and logits.shape == (shape[0], 1, shape[2])
        )

    @contextlib.contextmanager
    def watched(self, *, every: bool = False) -> Iterator[None]:
        """While this lasts, calls of the model set `hidden` and give logits: the last token's, or
        those of every token.
        """
        self._calls, self.hidden, self._every = 0, None, every
        if self._module is None:
            yield
            return
        object.__setattr__(self._module, "__class__", self._watching)
        try:
            yield
        finally:
            object.__setattr__(self._module, "__class__", self._class)

    def _subclass(self, module_class: type) -> type:
        def call(module: Any, *args: Any, **kwargs: Any) -> Any:
            out = module_class.__call__(module, *args, **kwargs)
            self._calls += 1
            if isinstance(out, mx.array) and out.ndim == 3:
                out = out if self._every else out[:, -1:]
                self.hidden = out
            return out

        return type(module_class.__name__, (module_class,), {"__call__": call})


def _candidates(model: Module, depth: int) -> Iterator[Module]:
    """Modules that may be the trunk: children that have children, the outer ones first."""
    children = [child for child in model.children().values() if isinstance(child, Module)]
    inner = [child for child in children if child.children()]
    yield from inner
    if depth > 1:
        for child in inner:
            yield from _candidates(child, depth - 1)
