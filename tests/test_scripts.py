"""The scripts that a stranger runs first."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import processes
from conftest import ROOT

pytestmark = pytest.mark.real


def test_the_model_script_is_quick_where_the_model_is_there(real_model: Path) -> None:
    script = ROOT / "scripts" / "smollm2.py"
    watch = "import sys, runpy; sys.argv = ['smollm2.py', sys.argv[1]];"
    watch += f"\ntry: runpy.run_path({str(script)!r}, run_name='__main__')\nexcept SystemExit: pass"
    watch += "\nimport json; print(json.dumps('mlx' in ' '.join(sys.modules)))"
    assert processes.python(watch, real_model) is False


def test_the_real_model_answers_sensibly(real_model: Path, tmp_path: Path) -> None:
    question = "What is the capital of France? Answer in one sentence."
    chosen = ("-m", real_model, "--cache-dir", tmp_path / "store", "--temp", "0", "-n", "20")
    ended = processes.run("generate", *chosen, "-p", question)
    assert ended.out == "The capital of France is Paris.\n"


def test_the_few_shot_script_labels_sentences_with_awkward_characters(
    real_model: Path, tmp_path: Path
) -> None:
    sentences = tmp_path / "sentences.txt"
    lines = ["The cake was delicious and everyone smiled.", '-x "quoted" \\n it is awful']
    sentences.write_text("\r\n\n".join(lines), "utf-8")
    prefix = ROOT / "examples" / "fewshot" / "prefix.txt"
    program = tmp_path / "mlx-promptcache"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m mlx_promptcache "$@"\n', "utf-8")
    program.chmod(0o755)
    settings = {"MLX_PROMPTCACHE": str(program), "MLX_PROMPTCACHE_MODEL": str(real_model)}
    environment = processes.environment(**settings, MLX_PROMPTCACHE_DIR=str(tmp_path / "store"))
    short = tmp_path / "root" / "examples" / "fewshot"
    short.mkdir(parents=True)
    head = prefix.read_text("utf-8").splitlines(keepends=True)[:41]  # twenty examples are enough
    (short / "prefix.txt").write_text("".join(head), "utf-8")
    (tmp_path / "root" / "scripts").mkdir()
    script = tmp_path / "root" / "scripts" / "fewshot.sh"
    script.write_bytes((ROOT / "scripts" / "fewshot.sh").read_bytes())
    done = subprocess.run(
        ["bash", str(script), str(sentences)], cwd="/", env=environment, check=False,
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = [line.rsplit("\t", 1) for line in done.stdout.splitlines()]
    assert [row[0] for row in rows] == lines
    assert {row[1] for row in rows} <= {"positive", "negative", "neutral"}
    assert rows[0][1] == "positive"
