"""Read files of one mlx-lm release under another, both ways; called by scripts/releases.

Makes an environment for the newest release and one for the newest of the minor series before it,
each with the MLX that pip resolves and with this package, installed from this checkout. One side
fills a store, the other reads it, goes on and saves, and the first reads that; then they change
sides. `handover.py` says what is compared. Exit code 1 if a file is refused or read wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_promptcache import places

ROOT = Path(__file__).parent.parent
HANDOVER = Path(__file__).parent / "handover.py"
ROUNDING = 1e-3  # if log-probabilities are further apart, a release computes something else
LINUX = sys.platform.startswith("linux")

Json = dict[str, Any]


# Releases


def releases() -> list[str]:
    """The releases of mlx-lm in the package index, newest first."""
    command = [sys.executable, "-m", "pip", "index", "versions", "mlx-lm"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    found = re.search(r"^Available versions: (.*)$", done.stdout, re.MULTILINE)
    if found is None:
        sys.exit(
            "scripts/releases: the package index tells no releases of mlx-lm: give --new, --old"
        )
    return found[1].split(", ")


def series(version: str) -> list[str]:
    """The minor series of a release: `["0", "31"]`."""
    return version.split(".")[:2]


def before(version: str, newest_first: list[str]) -> str:
    """The newest release of the minor series before that of `version`."""
    older = newest_first[newest_first.index(version) :]
    return next(other for other in older if series(other) != series(version))


# Environments


@dataclass(frozen=True)
class Environment:
    """A virtual environment with one release of mlx-lm, and one of MLX if that is chosen, too."""

    version: str
    mlx: str | None
    above: Path

    @property
    def directory(self) -> Path:
        """Where it is."""
        return self.above.absolute() / "-".join(["mlx-lm", self.version, *filter(None, [self.mlx])])

    def program(self, name: str) -> str:
        """One of its programs."""
        return str(self.directory / "bin" / name)

    def make(self) -> None:
        """Make it, or bring it up to date, with this package as it is in this checkout."""
        if not Path(self.program("python")).exists():
            self.above.mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, "-m", "venv", "--clear", self.directory], check=True)
        ours = f"{ROOT}[cpu]" if LINUX else str(ROOT)
        mlx = f"mlx=={self.mlx}" if self.mlx else "mlx"
        command = [self.program("python"), "-m", "pip", "install", "--quiet", "--upgrade"]
        done = subprocess.run(
            [*command, "--disable-pip-version-check", ours, mlx, f"mlx-lm=={self.version}"],
            stderr=subprocess.PIPE, text=True, cwd=self.directory,
        )  # fmt: skip
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            sys.exit(f"scripts/releases: {said[-1] if said else done.stderr}")

    def hand_over(self, part: str, directory: Path, *options: str | Path) -> Json:
        """Let this side do its part, and return what it tells."""
        answer = directory / "answer.json"
        command = [self.program("python"), HANDOVER, part, directory, "--answer", answer, *options]
        subprocess.run(command, check=True, cwd=directory, env=_surroundings())
        told: Json = json.loads(answer.read_text("utf-8")) if answer.exists() else {}
        return told

    def commands_find_it_sound(self, directory: Path) -> bool:
        """Whether `verify` and `list` of this side find the store as it should be."""
        program, where = self.program("mlx-promptcache"), ("--cache-dir", str(directory / "store"))
        verified = subprocess.run([program, "verify", "--json", *where], stdout=subprocess.PIPE)
        command = [program, "list", "--json", *where]
        listed = subprocess.run(command, stdout=subprocess.PIPE, check=True)
        return not verified.returncode and all(
            entry["status"] == "ok" for entry in json.loads(listed.stdout)["entries"]
        )


def _surroundings() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return {**kept, "HF_HUB_OFFLINE": "1"}


# There and back


def one_way(
    writer: Environment, reader: Environment, directory: Path, options: list[str]
) -> list[Json]:
    """The writer fills a store, the reader reads it and goes on, and the writer reads that.

    Returns the answers of all three.
    """
    directory.mkdir()
    answers = [writer.hand_over("fill", directory, *options)]
    for side in (reader, writer):
        told = directory / "told.json"
        told.write_text(json.dumps(answers[-1]), "utf-8")
        answers.append(side.hand_over("read", directory, "--told", told, *options))
        answers[-1]["sound"] = side.commands_find_it_sound(directory)
    return answers


def verdict(case: Json) -> str:
    """What is to be said of one case that was read, in few words."""
    if "no cache" in case:
        return "no cache"
    if case["wrong"]:
        return "REFUSED" if case["wrong"][0].startswith("refused") else "WRONG"
    if case["difference"] > ROUNDING:
        return f"read, another model: {case['difference']:.1g}"
    if case["bits"]:
        return "ok, same bits"
    tokens = "same tokens" if case["equal tokens"] else "other tokens"
    return f"ok, {tokens}, {case['difference']:.0e}" if case["difference"] else f"ok, {tokens}"


def report(answers: list[Json]) -> list[str]:
    """Print the table of one way, and return what is wrong."""
    filled, there, back = answers
    print(f"\nwritten by {_names(filled)}")
    heads = ["case", f"read by {_names(there)}", f"and back by {_names(back)}"]
    pairs = list(zip(there["cases"], back["cases"], strict=True))
    rows = [[one["case"], verdict(one), verdict(other)] for one, other in pairs]
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    for row in (heads, *rows):
        print("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip())
    for case in there["cases"]:
        if "no cache" in case:
            print(f"{case['case']}: {case['no cache']}")
    if filled["draws"] != there["draws"]:
        print("one key and one distribution draw other tokens: sampled cases go on with others")
    wrong = [
        f"{case['case']}, read by {_names(side)}: {', '.join(case['wrong'])}"
        for side in (there, back)
        for case in side["cases"]
        if case.get("wrong")
    ]
    unsound = [side for side in (there, back) if not side["sound"]]
    return wrong + [f"{_names(side)} finds the store damaged or stale" for side in unsound]


def _names(answer: Json) -> str:
    versions = answer["versions"]
    return f"mlx-lm {versions['mlx-lm']} on mlx {versions['mlx']}"


def main() -> int:
    """Make the environments, hand states over, print the tables, and judge."""
    parser = argparse.ArgumentParser(prog="scripts/releases", description=__doc__)
    parser.add_argument("--new", metavar="VERSION", help="a release of mlx-lm; the newest")
    parser.add_argument("--old", metavar="VERSION", help="the newest of the minor series before")
    parser.add_argument("--new-mlx", metavar="VERSION", help="a release of mlx; what pip resolves")
    parser.add_argument("--old-mlx", metavar="VERSION", help="the same")
    parser.add_argument("--directory", type=Path, default=places.user_cache() / "releases")
    parser.add_argument("--architectures", action="store_true", help="a tiny model of each, too")
    parser.add_argument("--json", type=Path, help="write all answers to this file")
    options = parser.parse_args()
    known = releases() if options.new is None or options.old is None else []
    new = options.new or known[0]
    old = options.old or before(new, known)
    sides = [
        Environment(old, options.old_mlx, options.directory),
        Environment(new, options.new_mlx, options.directory),
    ]
    for side in sides:
        print(f"- environment: {side.directory}", file=sys.stderr)
        side.make()
    more = ["--architectures"] if options.architectures else []
    with tempfile.TemporaryDirectory() as scratch:
        sides[1].hand_over("model", Path(scratch))
        ways = []
        for writer, reader in (sides, sides[::-1]):
            print(f"- {writer.version} writes, {reader.version} reads", file=sys.stderr)
            directory = Path(scratch) / f"{writer.version}-to-{reader.version}"
            ways.append(one_way(writer, reader, directory, more))
    if options.json:
        options.json.write_text(json.dumps(ways, indent=1) + "\n", "utf-8")
    wrong = [sentence for answers in ways for sentence in report(answers)]
    for sentence in wrong:
        print(f"scripts/releases: {sentence}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
