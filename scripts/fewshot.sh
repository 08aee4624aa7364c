#!/usr/bin/env bash
# Classifies every sentence of a file as positive, negative or neutral, after one cached prompt.
#
#     scripts/fewshot.sh [FILE]          FILE: a sentence a line; some examples by default
#
# The prompt is an instruction and some ninety examples, nearly 2,000 tokens. It is computed once;
# every sentence then starts, in a process of its own, where the prompt has ended. Prints
# "sentence<TAB>label". Two variables of the environment choose what runs:
#
#     MLX_PROMPTCACHE        the command, mlx-promptcache by default
#     MLX_PROMPTCACHE_MODEL  the model, a directory or a repo; the command itself reads this one

# Stop at the first command that fails, at a variable that is not set, at a broken pipe.
set -euo pipefail

# The repository is the directory above this script's own, wherever we were called from.
root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
prefix=$root/examples/fewshot/prefix.txt
sentences=${1:-$root/examples/fewshot/sentences.txt}

# The command is what the environment says, or what is on the PATH, or the one in our own .venv.
promptcache=${MLX_PROMPTCACHE:-mlx-promptcache}
if ! type -P "$promptcache" >/dev/null; then
    if [ -n "${MLX_PROMPTCACHE:-}" ] || [ ! -x "$root/.venv/bin/mlx-promptcache" ]; then
        echo "fewshot.sh: there is no command $promptcache: run scripts/env to install it" >&2
        exit 1
    fi
    promptcache=$root/.venv/bin/mlx-promptcache
fi

# Open the sentences as descriptor 3, before the long work, so that a wrong path is known at once.
# Not as standard input: that one is left to the commands inside the loop.
exec 3<"$sentences"

# Compute the prompt and save it as "sentiment", unless that is done already. "show" needs no model
# and answers at once: it fails if there is no such name, and its text differs if the examples have
# been edited since, which is what --force is for. The chat template is ignored because examples
# and sentence are one plain text, which the model continues.
if ! saved=$("$promptcache" show sentiment --text 2>/dev/null) || [ "$saved" != "$(<"$prefix")" ]; then
    "$promptcache" save sentiment --force --quiet --ignore-chat-template --prompt-file "$prefix" >&2
fi

# Read line by line. "IFS=" keeps blanks at the ends and "-r" keeps backslashes; the test after
# "||" takes a last line that has no newline.
while IFS= read -r sentence <&3 || [ -n "$sentence" ]; do
    # Drop the carriage return of a file from Windows, and skip lines without a word.
    sentence=${sentence%$'\r'}
    if [ -z "${sentence//[[:space:]]/}" ]; then continue; fi

    # The prompt ends where the label belongs. The sentence stands inside one quoted argument that
    # begins with a word of ours, so that quotes, backslashes and leading dashes are only text.
    prompt="Sentence: $sentence"$'\n'"Sentiment:"

    # Continue the saved prompt with this one. A label is one token: three are plenty, and the end
    # of the line stops it. Temperature 0 takes the likeliest token, so the answer is always the
    # same.
    label=$("$promptcache" generate --quiet --prompt-cache sentiment --ignore-chat-template \
        -n 3 --temp 0 --stop $'\n' -p "$prompt")

    # The token of the label begins with a space: take the blanks off, and print the pair.
    printf '%s\t%s\n' "$sentence" "${label//[[:space:]]/}"
done
