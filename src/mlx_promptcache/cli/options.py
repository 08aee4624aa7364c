"""Options that several commands share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mlx_promptcache import cli
from mlx_promptcache.budget import MAX_SIZE, parse_size
from mlx_promptcache.cli import output
from mlx_promptcache.cli.names import complete_directories, complete_files
from mlx_promptcache.headers import MOST_DRAFT_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    Command = Callable[..., Any]

OWN_FORMAT, MLX_LM = "own", "mlx-lm"
FILE_FORMATS = (OWN_FORMAT, MLX_LM)
NO_URL = "the URL is empty: give one, as s3://team/caches"


def _options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def examples(*lines: str) -> str:
    """The end of a command's help: lines that anybody can type."""
    return "\n".join(["\b", "Examples:", *(f"  {cli.PROGRAM} {line}" for line in lines)])


def _notices(ctx: click.Context, param: click.Parameter, quiet: bool) -> bool:  # noqa: ARG001
    output.set_up_notices(quiet=quiet)
    return quiet


output_options = _options(
    click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead."),
    click.option("--quiet", is_flag=True, callback=_notices, is_eager=True, help="No notices."),
)

only_model_option = _options(
    click.option(
        "-m", "--model", envvar="MLX_PROMPTCACHE_MODEL", metavar="PATH_OR_REPO",
        shell_complete=complete_directories,
        help="A directory with an MLX model, or a Hugging Face repo; the demo model by default.",
    ),
)  # fmt: skip

shard_option = click.option(
    "--shard", type=click.Choice(["tensor", "pipeline"]),
    help="Split the model among the processes that mlx.launch has started.",
)  # fmt: skip

model_options = _options(
    only_model_option,
    click.option(
        "--adapter-path", metavar="DIR", shell_complete=complete_directories,
        help="A LoRA or DoRA adapter of mlx-lm's.",
    ),
    click.option(
        "--cache-dir", envvar="MLX_PROMPTCACHE_DIR", metavar="DIR",
        shell_complete=complete_directories,
        help="The store; prompt_cache in the model's directory by default.",
    ),
    click.option(
        "--allow-foreign-store", is_flag=True, envvar="MLX_PROMPTCACHE_ALLOW_FOREIGN_STORE",
        help="Use a store that belongs to another user, whom you trust.",
    ),
    click.option("--kv-bits", type=int, help="Quantise the KV cache to so many bits."),
    click.option(
        "--kv-group-size", type=int, default=64, show_default=True,
        help="How many numbers share a scale, with --kv-bits.",
    ),
    click.option(
        "--quantized-kv-start", type=int, default=5000, show_default=True,
        help="From which token on to quantise, with --kv-bits.",
    ),
    click.option("--max-kv-size", type=int, help="Keep only so many tokens of K/V."),
    click.option(
        "--draft-model", metavar="PATH_OR_REPO", shell_complete=complete_directories,
        help="A smaller model that proposes tokens (speculative decoding).",
    ),
    click.option(
        "--num-draft-tokens", type=click.IntRange(1, MOST_DRAFT_TOKENS), default=3,
        show_default=True, help="How many tokens the draft model proposes at a time.",
    ),
    click.option("--salt", default="", help="A private namespace inside the store."),
)  # fmt: skip


def _no_more(ctx: click.Context, param: click.Parameter, words: tuple[str, ...]) -> None:  # noqa: ARG001
    """Click would repeat the words, which are a prompt without quotes, and end up in logs."""
    if words:
        raise click.UsageError("give the prompt with -p, in quotes, or with --prompt-file")


def size_of(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """The bytes of an option that is a size; a callback of Click's."""
    try:
        return None if value is None else parse_size(value)
    except ValueError as exc:
        raise click.BadParameter(str(exc), ctx, param) from exc


max_size_option = click.option(
    "--max-size", envvar=MAX_SIZE, callback=size_of, metavar="20GB",
    help="What the store may take on disk; 20 GB, or a tenth of what is free, by default.",
)  # fmt: skip


def _a_url(_ctx: click.Context, _param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise click.BadParameter(NO_URL)
    return value


url_argument = click.argument("url", callback=_a_url)

sign_option = click.option(
    "--sign", envvar="MLX_PROMPTCACHE_SIGN", metavar="KEYFILE",
    help="Sign what is sent with this Ed25519 key, as ssh-keygen makes it.",
)  # fmt: skip

remote_options = _options(
    click.option(
        "--remote", envvar="MLX_PROMPTCACHE_REMOTE", metavar="URL", callback=_a_url,
        help="Ask there for what is not stored here, and send what is kept there.",
    ),
    click.option(
        "--remote-seconds", type=click.FloatRange(0.0, 3600.0), default=5.0, show_default=True,
        help="How long to wait for it at the most.",
    ),
    sign_option,
)  # fmt: skip

file_format_option = click.option(
    "--format", "file_format", type=click.Choice(FILE_FORMATS), default=OWN_FORMAT,
    show_default=True, help="Whose format the file has.",
)  # fmt: skip

prompt_options = _options(
    click.argument("words", nargs=-1, metavar="", expose_value=False, callback=_no_more),
    click.option("-p", "--prompt", help="The prompt; - reads standard input."),
    click.option(
        "--prompt-file",
        metavar="FILE",
        shell_complete=complete_files,
        help="The prompt, from a file.",
    ),
    click.option("--system-prompt", help="The system message of a chat."),
    click.option(
        "--messages",
        metavar="FILE.json",
        shell_complete=complete_files,
        help="A chat: a JSON list of messages.",
    ),
    click.option("--ignore-chat-template", is_flag=True, help="Take the prompt as plain text."),
    click.option("--prefix", help="Text before the prompt, worth keeping by itself."),
    click.option(
        "--prefix-file",
        metavar="FILE",
        shell_complete=complete_files,
        help="The same, from a file.",
    ),
)


def _biases(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[int, float] | None:
    biases: dict[int, float] = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError as exc:
            sentence = f"{value!r} is not a token id and a bias, such as 198=-100"
            raise click.BadParameter(sentence, ctx, param) from exc
    return biases or None


sampling_options = _options(
    click.option(
        "-n", "--max-tokens", type=int,
        help="How many tokens to generate at the most: 100, chat 256, load none if you do not say.",
    ),
    click.option("--temp", type=float, help="Temperature; 0 takes the likeliest token."),
    click.option("--top-p", type=float, help="Nucleus sampling."),
    click.option("--top-k", type=int, help="Draw from so many of the likeliest tokens."),
    click.option("--min-p", type=float, help="Leave out what is so much less likely than the top."),
    click.option("--min-tokens-to-keep", type=int, help="How many tokens --min-p leaves anyway."),
    click.option(
        "--xtc-probability", type=float,
        help="How often to leave out all likely tokens but the least likely of them.",
    ),
    click.option("--xtc-threshold", type=float, help="From which probability XTC calls it likely."),
    click.option(
        "--seed",
        type=click.IntRange(0, 2**64 - 1),
        help="Where the draws begin; afresh by default.",
    ),
    click.option("--repetition-penalty", type=float, help="Divides the logits of last tokens."),
    click.option("--repetition-context-size", type=int, help="How many last tokens it looks at."),
    click.option("--presence-penalty", type=float, help="Taken off the logits of last tokens."),
    click.option("--presence-context-size", type=int, help="How many last tokens it looks at."),
    click.option("--frequency-penalty", type=float, help="Taken off for every time one occurs."),
    click.option("--frequency-context-size", type=int, help="How many last tokens it looks at."),
    click.option(
        "--logit-bias", multiple=True, callback=_biases, metavar="TOKEN=BIAS",
        help="Add this to the logit of a token id; repeatable.",
    ),
    click.option("--stop", multiple=True, metavar="TEXT", help="End before this text; repeatable."),
)  # fmt: skip
