"""Tokenizers with chat templates in the shapes of real families, small enough to train in a moment.

What is alike is what matters to a cache: where a beginning-of-sequence token comes from, what a
template refuses, moves, trims or takes back. The words are ours, the shapes are theirs.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

CORPUS = [
    "The cat sat on the mat, and the dog sat on the cat.",
    "Question: what is two plus two? Answer: four.",
    "system user assistant You are a helpful assistant. Hello, world!",
]

ALTERNATES = (
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('the roles must alternate: user, assistant, user, ...') }}{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """A shape: its template, its special tokens, and what the tokenizer itself puts before text.

    `system` and `alternates` say what the template takes, and what it insists on.
    """

    template: str | None
    end: str
    bos: str | None = None
    specials: tuple[str, ...] = ()
    adds_bos: bool = False
    system: bool = True
    alternates: bool = False

    @property
    def begins(self) -> bool:
        """Whether a prompt begins with the beginning of a sequence."""
        return self.adds_bos if self.template is None else "bos_token" in self.template


CHATML = Family(
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% if not (loop.last and continue_final_message) %}{{ '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    end="<|im_end|>",
    specials=("<|im_start|>",),
)

LLAMA3 = Family(  # BOS in the template, and from the tokenizer as well; a system turn in any case
    "{{- bos_token }}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] | trim %}"
    "{%- set messages = messages[1:] %}{%- else %}{%- set system = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: 1 May\n\n' + system }}"
    "{{- '<|eot_id|>' }}"
    "{%- for m in messages %}{{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' +"
    " m['content'] | trim + '<|eot_id|>' }}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}",
    end="<|eot_id|>",
    bos="<|begin_of_text|>",
    specials=("<|start_header_id|>", "<|end_header_id|>"),
    adds_bos=True,
)

ZEPHYR = Family(  # BOS from the tokenizer, and so none in a chat
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    end="</s>",
    bos="<s>",
    adds_bos=True,
)

GEMMA_TURNS = (
    "{% for m in messages %}" + ALTERNATES + "{{ '<start_of_turn>' +"
    " ('model' if m['role'] == 'assistant' else m['role']) + '\n' + (first if loop.first else '') +"
    " m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA2 = Family(  # refuses a system turn
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('there is no system role') }}{% endif %}{% set first = '' %}" + GEMMA_TURNS,
    end="<end_of_turn>",
    bos="<bos>",
    specials=("<start_of_turn>",),
    adds_bos=True,
    system=False,
    alternates=True,
)
GEMMA3 = Family(  # folds the system turn into the first one
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set first = '' %}{% endif %}" + GEMMA_TURNS,
    end="<end_of_turn>",
    bos="<bos>",
    specials=("<start_of_turn>",),
    adds_bos=True,
    alternates=True,
)

MISTRAL = Family(  # folds the system turn into the last one, and so out of all others
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] + '\n\n' %}{% set messages = messages[1:] %}"
    "{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}" + ALTERNATES + "{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + (system if loop.last else '') + m['content'] + '[/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + eos_token }}{% endif %}{% endfor %}",
    end="</s>",
    bos="<s>",
    specials=("[INST]", "[/INST]"),
    adds_bos=True,
    alternates=True,
)

QWEN3_TURNS = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] != 'assistant' %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% else %}"
    "{% set said = m['content'] %}{% set thought = '' %}{% if '</think>' in said %}"
    "{% set thought = said.split('</think>')[0].split('<think>')[-1].strip('\n') %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<think>\n' + thought + '\n</think>\n\n' + said.lstrip('\n') }}"
    "{% else %}{{ said }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
QWEN3 = Family(  # takes back what was thought in earlier turns
    QWEN3_TURNS,
    end="<|im_end|>",
    specials=("<|im_start|>", "<think>", "</think>"),
)
QWEN3_SILENT = Family(  # mlx-lm lets none think whose vocabulary has no word for it
    QWEN3_TURNS,
    end="<|im_end|>",
    specials=("<|im_start|>",),
)

PLAIN = Family(None, end="</s>", bos="<s>", adds_bos=True)  # no template, BOS from the tokenizer

FAMILIES = {
    "chatml": CHATML,
    "llama3": LLAMA3,
    "zephyr": ZEPHYR,
    "gemma2": GEMMA2,
    "gemma3": GEMMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "qwen3, silent": QWEN3_SILENT,
    "plain": PLAIN,
}


def write_tokenizer(directory: Path, family: Family) -> tuple[int, int]:
    """Write the files of a byte-level tokenizer; return how many tokens it has, and the last one's
    id in a turn.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [s for s in (family.bos, *family.specials, family.end) if s is not None]
    trainer = trainers.BpeTrainer(
        vocab_size=318 + len(specials),
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    if family.adds_bos:
        first = (specials[0], 0)
        tokenizer.post_processor = processors.TemplateProcessing(f"{first[0]} $A", None, [first])
    tokenizer.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos,
        "eos_token": family.end,
        "pad_token": family.end,
        "additional_special_tokens": specials,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
    }
    if family.template is not None:
        config["chat_template"] = family.template
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2))
    return tokenizer.get_vocab_size(), specials.index(family.end)
