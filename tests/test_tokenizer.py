"""The kept tokenizer against transformers: text to tokens and back, chats to text, and all else."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from collections import OrderedDict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx_lm
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.tokenizer_utils import TokenizerWrapper

import tiny
from families import CORPUS, FAMILIES, write_tokenizer
from mlx_promptcache import Runner, checkpoint, excerpts
from mlx_promptcache.budget import Budget
from mlx_promptcache.excerpts import Excerpts
from mlx_promptcache.quarantine import Quarantine
from mlx_promptcache.store import Store
from mlx_promptcache.tokenizer import ASKED, BPE, NAIVE, SPM, SPM_NO_SPACE, Tokenizer, wrapped
from mlx_promptcache.tokenizer_store import TokenizerStore

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Chat = Sequence[dict[str, Any]]

FIXED = settings(derandomize=True, deadline=None, max_examples=60)


# Tokenizers of other kinds than the families'


SPECIALS = ["<unk>", "<s>", "</s>", "<think>", "</think>"]
METASPACE = "\u2581"


def spm(*, trims: bool) -> tokenizers.Tokenizer:
    """As llama 2 has it: spaces are letters, and bytes stand in for what has no token."""
    from tokenizers import decoders, models, normalizers, processors

    vocabulary = {token: i for i, token in enumerate(SPECIALS)}
    for piece in [*(f"<0x{i:02X}>" for i in range(256)), METASPACE]:
        vocabulary[piece] = len(vocabulary)
    for letter in sorted(set("".join(CORPUS))):
        vocabulary.setdefault(letter, len(vocabulary))
    merges = [("t", "h"), ("th", "e"), (METASPACE, "the"), ("a", "t"), (METASPACE, METASPACE)]
    for left, right in merges:
        vocabulary.setdefault(left + right, len(vocabulary))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    made = tokenizers.Tokenizer(model)
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend(METASPACE), normalizers.Replace(" ", METASPACE)]
    )
    parts = [decoders.Replace(METASPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    made.decoder = decoders.Sequence([*parts, *([decoders.Strip(" ", 1, 0)] if trims else [])])
    made.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    made.add_special_tokens(SPECIALS)
    return made


def unigram() -> tokenizers.Tokenizer:
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    letters = sorted(set("".join(CORPUS)) - {" "})
    pieces = [*SPECIALS, METASPACE, *letters, METASPACE + "the", "at", "qu"]
    made = tokenizers.Tokenizer(
        models.Unigram([(piece, -0.1 * i) for i, piece in enumerate(pieces)], unk_id=0)
    )
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(SPECIALS)
    return made


def word_piece() -> tokenizers.Tokenizer:
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    letters = sorted(set("".join(CORPUS).lower()) - {" "})
    pieces = [*SPECIALS, *letters, *(f"##{letter}" for letter in letters), "the", "##at", "n't"]
    made = tokenizers.Tokenizer(
        models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="<unk>")
    )
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(cleanup=False)
    made.add_special_tokens(SPECIALS)
    return made


def byte_level() -> tokenizers.Tokenizer:
    """With added tokens that take in the spaces around them, and a token of two words."""
    from tokenizers import decoders, models, pre_tokenizers, processors, trainers

    made = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel()]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=330, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.add_tokens(
        [
            tokenizers.AddedToken("<tool>", lstrip=True, rstrip=True),
            tokenizers.AddedToken("two words", single_word=True, normalized=False),
        ]
    )
    return made


@dataclass(frozen=True)
class Kind:
    make: Callable[[], tokenizers.Tokenizer]
    detokenizer: str
    config: dict[str, Any]


KINDS = {
    "byte level": Kind(byte_level, BPE, {}),
    "splits specials": Kind(byte_level, BPE, {"split_special_tokens": True}),
    "spm": Kind(lambda: spm(trims=True), SPM, {}),
    "spm, no space": Kind(lambda: spm(trims=False), SPM_NO_SPACE, {}),
    "unigram": Kind(unigram, NAIVE, {}),
    "unigram, cleaned": Kind(unigram, NAIVE, {"clean_up_tokenization_spaces": True}),
    "word piece": Kind(word_piece, NAIVE, {}),
    "word piece, cleaned": Kind(word_piece, NAIVE, {"clean_up_tokenization_spaces": True}),
}
REAL = "the real one"
ALONE = ", by excerpts alone"
WHOLE = [name for name in KINDS if name.startswith(("unigram", "word piece"))]
EVERY = [
    *FAMILIES, *KINDS, REAL,
    *(name + ALONE for name in ("chatml", "llama3", "byte level", "splits specials", REAL)),
]  # fmt: skip


@dataclass
class Pair:
    """A tokenizer as mlx-lm loads it, and as it is kept; and how often the kept one loaded it."""

    whole: Any
    kept: Any
    loads: list[Any]


def write_kind(directory: Path, kind: Kind) -> None:
    kind.make().save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": "{% for m in messages %}{{ m['content'] }} {% endfor %}",
        **kind.config,
    }  # fmt: skip
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def pair_of(model: Path, store: Path) -> Pair:
    """Keep a tokenizer, and load it again."""
    loads: list[Any] = []

    def whole() -> Any:
        loads.append(checkpoint.load_tokenizer(model, {"eos_token_id": [2, 3]}))
        return loads[-1]

    kept_in = Store(store)
    tokenizer_store = TokenizerStore(kept_in, Quarantine(kept_in, read_only=False), Budget())
    first = tokenizer_store.tokenizer(model, whole, keeps=True)
    kept = tokenizer_store.tokenizer(model, whole, keeps=True)
    assert [loads.pop()] == [first]
    assert kept is not first
    return Pair(first, kept, loads)


def never(_: Any) -> Any:
    raise AssertionError("the whole Rust tokenizer was made")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Pair]:
    pairs: dict[str, Pair] = {}
    directory = tmp_path_factory.mktemp("tokenizers")

    def of(name: str, real: Path | None = None) -> Pair:
        if name not in pairs:
            model = real or directory / str(len(pairs))
            kind = name.removesuffix(ALONE)
            if real is None:
                model.mkdir()
                (model / "config.json").write_text('{"model_type": "llama"}')
                write_kind(model, KINDS[kind]) if kind in KINDS else write_tokenizer(
                    model, FAMILIES[kind]
                )
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(excerpts, "MOST", 1 << 30)
                if kind != name:
                    patch.setattr(excerpts, "MOST_STRINGS", 1 << 30)
                    patch.setattr(Excerpts, "whole", never)
                pairs[name] = pair_of(model, directory / f"store {len(pairs)}")
            assert isinstance(pairs[name].kept._tokenizer._rust, Excerpts) == (kind not in WHOLE)
        return pairs[name]

    return of


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, made: Callable[..., Pair]) -> Pair:
    name = request.param
    return made(name, request.getfixturevalue("real_model") if name.startswith(REAL) else None)


every = pytest.mark.parametrize(
    "pair",
    [pytest.param(n, marks=pytest.mark.real) if n.startswith(REAL) else n for n in EVERY],
    indirect=True,
)


# Text to tokens and back


SAMPLES = """The quick brown fox jumps over the lazy dog.|isn't, I'm, we've, they're, ' quoted '
naïve café Ünïcödé|Größe Straße ẞ|Ελληνικά κείμενο|русский текст|українська|עברית|العربية|فارسی
हिन्दी पाठ|বাংলা|தமிழ்|ไทยไม่มีวรรค|日本語の文、句読点。|中文文本|繁體中文|한국어 텍스트|Tiếng Việt
ქართული|Հայերեն|አማርኛ|ᏣᎳᎩ|👩‍👩‍👧‍👦|🇺🇳🇩🇪|👍🏽|☕️|e\u0301 é|\u0130\u0131i|\uff21\uff42\u210c
ﬁ ﬂ ½ ²|z͑ͫ̓͛a̴l̷g̸o|x = [i ** 2 for i in range(10)]
if (a && b) { return *p; }|<html><body class="x">&amp;</body>
{"a": [1, 2.5e-3, null]}|SELECT * FROM t WHERE a='b';|\\n \\t \\u0041|C:\\dir\\file|/usr/bin/env
0 1 12 123 1234 12345678901234567890|1,000,000.00|3.14159|-1e10|0x1F|10%|$5|€7|١٢٣|Ⅷ
https://example.org/a?b=c#d|user@example.org|#tag @name|…—\u2013\u2018\u2019“”„«»
a.b,c!d?e;f:g|... !!! ???
two words|two wordsx|<tool>|a <tool> b|\u2581the|##at|<0x41>|<0xE2>|Ġthe|Ċ|<unk>|[UNK]
[INST]x[/INST]|a . b , c ! d ? e n't 'm 's 've 're ' f""".replace("\n", "|").split("|")
CONTROLS = [chr(i) for i in (*range(32), *range(127, 161), 0xAD, 0xFFFD, 0xFFFF, 0x10FFFF)]
INVISIBLE = list("\u200b\u200c\u200d\u200e\u2028\u2029\u2060\u3000\ufeff\ufe0f")
SPACES = ["", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\t", " \n ", "\n \n\n  ", "\t\t x", " a  b "]


def corpus(tokenizer: Any) -> list[str]:
    """Strings of many kinds, and all special tokens wherever they may stand."""
    texts = [*SAMPLES, *CONTROLS, *INVISIBLE, *SPACES, *(f"a{c}b" for c in (*CONTROLS, *INVISIBLE))]
    texts += [f" {text}\n{text[::-1]}" for text in SAMPLES]
    added = set(tokenizer.added_tokens_decoder.values())
    for special in sorted({str(token) for token in added} | {"<s>", "<think>", "<|im_end|>"}):
        texts += [special, special * 2, f"a{special}b", f"word {special} word", f"\n{special}\n"]
    return [*texts, "".join(texts), " ".join(SAMPLES) * 3]


def segments(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """What is said token by token; the same detokenizer as another begins."""
    detokenizer = tokenizer.detokenizer
    said = []
    for token in ids:
        detokenizer.add_token(token)
        said.append(detokenizer.last_segment)
    detokenizer.finalize()
    return [*said, detokenizer.last_segment, detokenizer.text]


def assert_same_text(pair: Pair, text: str) -> None:
    for special in (True, False):
        ids = pair.whole.encode(text, add_special_tokens=special)
        assert pair.kept.encode(text, add_special_tokens=special) == ids
        for skipping in (True, False):
            decoded = pair.whole.decode(ids, skip_special_tokens=skipping)
            assert pair.kept.decode(ids, skip_special_tokens=skipping) == decoded
    if len(ids) < 400:  # the naive one takes the square of it
        assert segments(pair.kept, ids) == segments(pair.whole, ids)


@every
def test_every_text_gives_the_same_tokens_and_comes_back_the_same(pair: Pair) -> None:
    texts = corpus(pair.whole)
    assert len(texts) > 300
    for text in texts:
        assert_same_text(pair, text)
    assert pair.loads == []


@every
@FIXED
@given(st.text())
def test_whatever_the_text_is(pair: Pair, text: str) -> None:
    assert_same_text(pair, text)


@every
@FIXED
@given(st.data())
def test_whatever_the_tokens_are_they_are_said_the_same(pair: Pair, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(0, len(pair.whole) - 1), max_size=12))
    assert pair.kept.decode(ids) == pair.whole.decode(ids)
    assert segments(pair.kept, ids) == segments(pair.whole, ids)


@every
def test_what_is_known_of_a_tokenizer_is_the_same(pair: Pair) -> None:
    kept, whole = pair.kept, pair.whole
    assert kept.eos_token_ids == whole.eos_token_ids >= {2, 3}
    assert kept.has_chat_template == whole.has_chat_template
    assert kept.chat_template == whole.chat_template
    assert kept.special_tokens_map == whole.special_tokens_map
    assert (kept.eos_token, kept.bos_token) == (whole.eos_token, whole.bos_token)
    assert kept.eos_token_id == whole.eos_token_id
    assert (kept.has_thinking, kept.think_start_tokens, kept.think_end) == (
        whole.has_thinking, whole.think_start_tokens, whole.think_end,
    )  # fmt: skip
    assert len(kept) == len(whole)
    assert kept.get_vocab() == whole.get_vocab()
    ids = list(range(0, len(whole), max(1, len(whole) // 300)))
    tokens = whole.convert_ids_to_tokens(ids)
    assert kept.convert_ids_to_tokens(ids) == tokens
    assert [kept.convert_tokens_to_ids(token) for token in tokens] == ids
    assert pair.loads == []


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_has_the_detokenizer_that_its_decoder_calls_for(
    name: str, made: Callable[[str], Pair]
) -> None:
    facts = made(name).kept._tokenizer._facts
    assert facts.detokenizer == KINDS[name].detokenizer
    assert facts.splits_special_tokens == (name == "splits specials")
    assert facts.cleans_up == ("cleaned" in name)


def test_text_that_is_no_unicode_is_refused_by_both(made: Callable[[str], Pair]) -> None:
    pair = made("chatml")
    for tokenizer in (pair.kept, pair.whole):
        with pytest.raises(TypeError):
            tokenizer.encode("\ud800")


# Chats to text


USER = {"role": "user", "content": " What is 1 + 1?\n"}
SYSTEM = {"role": "system", "content": "Be <brief> & 'kind'."}
ANSWER = {"role": "assistant", "content": "It is 2. \n"}
THOUGHT = {"role": "assistant", "content": "<think>\nhm\n</think>\n\n4"}
PART = {"type": "text", "text": "First, "}
CHATS: dict[str, Chat] = {
    "a question": [USER],
    "a system message": [SYSTEM, USER],
    "an answer": [USER, ANSWER],
    "turns": [SYSTEM, USER, ANSWER, USER],
    "turns with an answer": [SYSTEM, USER, ANSWER, USER, THOUGHT],
    "parts": [{"role": "user", "content": [PART, {"type": "image"}, PART]}],
    "an answer in parts": [USER, {"role": "assistant", "content": [PART, {"type": "image"}]}],
    "an image": [USER, {"role": "assistant", "content": [{"type": "image"}]}],
    "a tuple": [USER, {"role": "assistant", "content": (PART, PART)}],
    "no content": [USER, {"role": "assistant", "content": None, "tool_calls": None}],
    "a call": [USER, {"role": "assistant", "content": "", "tool_calls": [{"name": "f", "n": 1.5}]}],
    "reasoning": [USER, {**ANSWER, "reasoning": "hm"}],
    "thinking": [USER, {**ANSWER, "thinking": "hm"}, USER],
    "reasoning content": [USER, {**ANSWER, "reasoning_content": "so", "thinking": "hm"}],
    "no role": [{"content": "a"}],
    "two questions": [USER, USER],
    "an answer alone": [ANSWER],
    "unicode": [{"role": "user", "content": "naïve 🐈 \u2028 </s><|im_end|>"}],
    "a number": [{"role": "user", "content": 5}, {"role": "assistant", "content": 7}],
    "nothing": [],
    "an empty answer": [USER, {"role": "assistant", "content": "  "}],
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {**going, **thinking}
    for going in (
        {"add_generation_prompt": True}, {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": True},
    )
    for thinking in ({}, {"enable_thinking": True}, {"enable_thinking": False})
]  # fmt: skip
EACH = "{% for m in messages %}"
SHAPES = {
    "json": EACH + "{{ m | tojson }}|{{ m | tojson(indent=2) }}|{{ '<é&>' | tojson }}"
    "{{ m | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}{% endfor %}",
    "loop controls": EACH + "{% if loop.index > 3 %}{% break %}{% endif %}"
    "{% if m.role == 'system' %}{% continue %}{% endif %}{{ loop.index0 }}{{ m.content }}"
    "{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, last='') %}" + EACH
    + "{% set ns.n = ns.n + 1 %}{% set ns.last = m.content %}{% endfor %}{{ ns.n }}{{ ns.last }}",
    "macros": "{% macro turn(role, text='-') %}[{{ role }}: {{ text }}]{{ caller() if caller }}"
    "{% endmacro %}" + EACH + "{{ turn(m.role, m.content) }}{% call turn(m['role']) %}c"
    "{% endcall %}{% endfor %}",
    "the day": "{{ strftime_now('%Y-%m') }} " + EACH + "{{ m.content }}{% endfor %}",
    "refusals": EACH + "{% if m.role not in ['user', 'assistant'] %}"
    "{{ raise_exception('no ' + m.role) }}{% endif %}{{ m.content }}{% endfor %}",
    "generation": EACH + "{% if m.role == 'assistant' %}{% generation %}{% set x = 'in' %}"
    "{{ m.content }}{{ x }}{{ loop.index }}{% endgeneration %}{{ x }}{% else %}{{ m.content }}"
    "{% endif %}{% endfor %}",
    "trimmed blocks": "\n  {% for m in messages %}\n    {% if true %}  \n{{ m.content }}\n"
    "    {%- endif -%}\n  {#- a comment -#}  {% endfor %}\n\n",
    "content in parts": EACH + "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text | trim }}{% elif 'type' in p %}"
    "<{{ p.type }}>{% endif %}{% endfor %}{% endif %}{% endfor %}",
    "reasoning": EACH + "{{ m.reasoning_content | default('none') }}/{{ m.thinking }}/"
    "{{ m.reasoning is defined }}/{{ m.content }}{% endfor %}",
    "absent": "{{ tools is none }}{{ documents is none }}{{ tools is defined }}{{ xml is defined }}"
    "{% if tools %}tools{% endif %}{{ date_string | default('today') }}" + EACH
    + "{{ m.content }}{{ 'tool_calls' in m }}{{ m.tool_calls }}{% endfor %}",
    "variables": "{{ enable_thinking }}{{ add_generation_prompt }}{{ bos_token }}{{ eos_token }}"
    "{{ pad_token }}{{ sep_token is defined }}{{ continue_final_message is defined }}" + EACH
    + "{{ m.content }}{% endfor %}",
    "dicts": "{% set d = dict(a=1, **{'b': 2}) %}{{ d }}{{ dict.fromkeys(['x'], 1) }}{{ d.items() |"
    " list }}" + EACH + "{{ dict(m, role='x') }}{% endfor %}",
    "slices": "{{ messages[1:] | length }}{{ messages[::-1] | map(attribute='role') | join }}"
    "{{ messages[-1]['content'][:4] }}{{ (messages | last).content.split() | first }}",
    "filters": EACH + "{{ m.content | trim | upper | replace('A', 'b') | indent(2) }}{{ m | items |"
    " list | length }}{{ m.content.strip('\\n').startswith(' ') }}{{ m.content | e }}"
    "{% endfor %}",
    "escapes": EACH + "{{ '\\n' }}{{ \"\\u00e9\" }}{% raw %}{{ x }}{% endraw %}{{ m.content }}"
    "{% endfor %}",
    "no content": EACH + "{{ m['con' ~ 'tent'] }}{% endfor %}",
    "takes the end": EACH + "{{ m.content[:5] }}{% endfor %}",
    "says it twice": EACH + "{{ m.content }}|{{ m.content | trim }}{% endfor %}",
    "nothing at all": "",
    "unknown names": "{{ nothing.of.this }}",
    "no template": "{% for %}{{",
    "unknown tags": "{% include 'x' %}{% import 'y' as z %}",
}  # fmt: skip
TALKING = {**{n: f.template for n, f in FAMILIES.items() if f.template}, **SHAPES}


def with_template(pair: Pair, source: str) -> Any:
    """The kept tokenizer with another template, and nothing to fall back on."""
    inner = pair.kept._tokenizer
    facts = inner._facts._replace(chat_template=source, outlines=[])

    def nobody() -> Any:
        raise AssertionError("the whole tokenizer was asked")

    return wrapped(Tokenizer(inner._rust, facts, nobody), facts)


def outcome(tokenizer: Any, chat: Any, **options: Any) -> tuple[str, Any]:
    """What is made of a chat: a text, or that it is refused."""
    try:
        return "made", tokenizer.apply_chat_template(chat, tokenize=False, **options)
    except AssertionError:
        raise
    except Exception:  # noqa: BLE001 - templates raise what they like
        return "refused", None


@pytest.mark.parametrize("shape", TALKING)
def test_every_chat_is_rendered_the_same_or_refused_by_both(
    shape: str, made: Callable[[str], Pair]
) -> None:
    pair = made(shape if shape in FAMILIES else "llama3")
    source = TALKING[shape]
    assert source is not None
    kept = with_template(pair, source)
    for name, chat in CHATS.items():
        before = copy.deepcopy(chat)
        for options in OPTIONS:
            expected = outcome(pair.whole, chat, chat_template=source, **options)
            assert outcome(kept, chat, **options) == expected, (name, options)
        assert chat == before


def test_both_rendered_and_refused_chats_were_compared(made: Callable[[str], Pair]) -> None:
    pair = made("llama3")
    outcomes = {
        outcome(pair.whole, chat, chat_template=source, **options)
        for source in SHAPES.values() for chat in CHATS.values() for options in OPTIONS[::3]
    }  # fmt: skip
    assert ("refused", None) in outcomes
    assert len(outcomes) > 150


@pytest.mark.parametrize("name", [name for name in FAMILIES if FAMILIES[name].template])
def test_a_chat_gives_the_same_ids(name: str, made: Callable[[str], Pair]) -> None:
    pair = made(name)
    ids = pair.whole.apply_chat_template([USER], add_generation_prompt=True)
    assert pair.kept.apply_chat_template([USER], add_generation_prompt=True) == ids
    assert pair.kept.apply_chat_template(conversation=[USER], add_generation_prompt=True) == ids


ESCAPES = [
    "{{ dict.get(messages[0], 'role') }}", "{{ dict.update(messages[0], role='x') }}",
    "{{ ''.__class__.__mro__ }}", "{{ ''['__class__']['__mro__'] }}", "{{ messages.__class__ }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ namespace(_x=1) }}",
    "{{ namespace({'_x': 1}) }}", "{% set ns = namespace() %}{% set ns._x = 1 %}{{ ns._x }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "{{ dict.__init__ }}",
    "{{ dict.__init__.__globals__ }}", "{{ dict.__call__.__globals__ }}",
    "{{ dict.fromkeys.__globals__ }}", "{{ dict.fromkeys.__func__ }}", "{{ dict.mro() }}",
    "{{ namespace.__init__.__globals__ }}", "{{ namespace.mro() }}", "{{ range(10 ** 12) }}",
    "{% for i in range(10 ** 9) %}{% endfor %}", "{{ range(100001) | list | length }}",
    "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__ }}",
    "{{ cycler.__init__.__globals__.os }}", "{{ lipsum.__globals__ }}",
    "{{ joiner.__init__.__globals__ }}", "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__.__mro__}' | format(1) }}", "{{ ('%s' | attr('format')).__self__ }}",
    "{{ messages | map(attribute='__class__') | list }}", "{{ messages | attr('__class__') }}",
    "{{ messages.append(1) }}{{ messages | length }}", "{{ messages[0].update(role='x') }}",
    "{{ messages.clear() }}", "{{ messages[0].pop('role') }}", "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context }}", "{{ tojson.__globals__ }}", "{{ caller }}",
    "{% generation %}{{ caller.__globals__ }}{% endgeneration %}",
    "{{ messages[0].content.__class__.__base__ }}", "{{ (1).__class__ }}",
    "{{ '{a.__class__}'.format_map({'a': 1}) }}", "{{ [].__class__.__base__ }}",
]  # fmt: skip


@pytest.mark.parametrize("source", ESCAPES)
def test_no_template_gets_out_of_its_box(source: str, made: Callable[[str], Pair]) -> None:
    pair = made("llama3")
    ended, text = outcome(with_template(pair, source), [USER])
    assert (ended, text) == outcome(pair.whole, [USER], chat_template=source)
    for word in ("<class", "<module", "builtin", "<function", "globals"):
        assert word not in (text or "")


# What is asked beyond


WIDER: dict[str, Callable[[Any], Any]] = {
    "a template": lambda t: t.apply_chat_template([USER], chat_template="x", tokenize=False),
    "tools": lambda t: t.apply_chat_template([USER], tools=[], tokenize=False),
    "no tools": lambda t: t.apply_chat_template([USER], tools=None, tokenize=False),
    "a second argument": lambda t: t.apply_chat_template([USER], None, tokenize=False),
    "padding": lambda t: t.apply_chat_template([USER], padding="max_length", max_length=90),
    "truncation": lambda t: t.apply_chat_template([USER], truncation=True, max_length=3),
    "sanitized": lambda t: t.apply_chat_template([USER], sanitize_control_tokens=True),
    "another field": lambda t: t.apply_chat_template(
        [{**USER, "thinking": "a"}], chat_template="{{ messages[0].thinking }}.", tokenize=False,
        continue_final_message="thinking",
    ),
    "chats": lambda t: t.apply_chat_template([[USER], [USER, ANSWER]], tokenize=False),
    "rich messages": lambda t: t.apply_chat_template([OrderedDict(USER)], tokenize=False),
    "rich parts": lambda t: t.apply_chat_template(
        [{"role": "user", "content": "a", "more": [OrderedDict(PART)]}], tokenize=False
    ),
    "rich values": lambda t: t.apply_chat_template(
        [{"role": "user", "content": type("Text", (str,), {})("a")}], tokenize=False
    ),
    "rich variables": lambda t: t.apply_chat_template([USER], tokenize=False, x={"a": [1]}),
    "a pair": lambda t: t.encode("a", "b"),
    "pieces": lambda t: t.encode(["a", "b"], is_split_into_words=True),
    "short": lambda t: t.encode("a b c d e f", truncation=True, max_length=2),
    "texts of lists": lambda t: t.decode([[40, 41], [42]]),
    "uncleaned": lambda t: t.decode([40, 41], clean_up_tokenization_spaces=False),
    "many": lambda t: t.batch_decode([[40], [41]]),
    "no specials": lambda t: t.convert_ids_to_tokens([0, 40], skip_special_tokens=True),
    "several tokens": lambda t: t.convert_tokens_to_ids(["a", "b", "nothing of the kind"]),
    "an unknown token": lambda t: t.convert_tokens_to_ids("nothing of the kind"),
    "a size": lambda t: t.vocab_size,
    "an id": lambda t: (t.bos_token_id, t.pad_token, t.unk_token),
    "a longest": lambda t: t.model_max_length,
    "tools called": lambda t: (t.has_tool_calling, t.tool_call_start, t.tool_call_end_tokens),
    "a parser": lambda t: getattr(t.tool_parser, "__module__", None),
    "nothing": lambda t: hasattr(t, "nothing_of_the_kind"),
}  # fmt: skip


@pytest.fixture
def calling(tmp_path: Path) -> Pair:
    """A pair whose template calls tools."""
    family = replace(
        FAMILIES["chatml"],
        template=(FAMILIES["chatml"].template or "") + "{# <tool_call> tool_call.name #}",
    )
    write_tokenizer(tmp_path, family)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    return pair_of(tmp_path, tmp_path / "store")


def test_what_is_asked_beyond_is_answered_by_the_whole_one_loaded_once(calling: Pair) -> None:
    assert calling.whole.has_tool_calling
    for name, ask in WIDER.items():
        assert ask(calling.kept) == ask(calling.whole), name
        assert len(calling.loads) == 1, name


@pytest.mark.parametrize("name", WIDER)
def test_it_is_loaded_for_that_alone(name: str, calling: Pair) -> None:
    WIDER[name](calling.kept)
    assert len(calling.loads) == 1


def test_every_argument_that_transformers_has_is_its_own() -> None:
    import inspect

    from transformers.tokenization_utils_base import PreTrainedTokenizerBase as Base
    from transformers.utils.chat_template_utils import render_jinja_template as render

    ours = {*inspect.signature(Tokenizer.apply_chat_template).parameters, *ASKED}
    for function in (Base.apply_chat_template, render):
        named = set(inspect.signature(function).parameters)
        assert named - {"kwargs", "self"} <= ours


def test_many_threads_load_the_whole_one_once(calling: Pair) -> None:
    together = threading.Barrier(6)

    def ask() -> None:
        together.wait()
        assert calling.kept.vocab_size > 0

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calling.loads) == 1


def test_what_is_set_on_it_counts(calling: Pair) -> None:
    before = outcome(calling.kept, [USER])
    calling.kept.chat_template = "{{ messages[0].content }}!"
    assert outcome(calling.kept, [USER]) == ("made", f"{USER['content']}!") != before
    calling.kept.pad_token = "a"
    assert (calling.kept.pad_token, calling.kept.pad_token_id) == (
        "a",
        calling.whole.encode("a")[0],
    )
    calling.kept.eos_token_ids = [7]
    assert calling.kept.eos_token_ids == {7}
    assert len(calling.loads) == 1


def test_more_ends_can_be_told_without_the_whole_one(calling: Pair) -> None:
    calling.kept.add_eos_token("9")
    assert calling.kept.eos_token_ids == calling.whole.eos_token_ids | {9}
    assert calling.loads == []


def test_private_names_and_copies_ask_for_no_end(calling: Pair) -> None:
    for name in ("_private", "__deepcopy__", "__array__"):
        assert not hasattr(calling.kept, name)
        assert not hasattr(calling.kept._tokenizer, name)
    assert not hasattr(Tokenizer.__new__(Tokenizer), "_facts")
    assert calling.loads == []
    calling.kept.add_eos_token("9")
    for copied in (
        copy.copy(calling.kept), copy.deepcopy(calling.kept),
        pickle.loads(pickle.dumps(calling.kept)),
    ):  # fmt: skip
        assert type(copied) is TokenizerWrapper
        assert copied.encode("Hello") == calling.whole.encode("Hello")
        assert copied.eos_token_ids == calling.whole.eos_token_ids | {9}


def test_a_whole_one_that_cannot_be_loaded_any_more_is_said_every_time(calling: Pair) -> None:
    inner = calling.kept._tokenizer

    def gone() -> Any:
        raise OSError("gone")

    kept = wrapped(Tokenizer(inner._rust, inner._facts, gone), inner._facts)
    for _ in range(2):
        with pytest.raises(OSError, match="gone"):
            kept.vocab_size  # noqa: B018
    assert kept.encode("Hello") == calling.whole.encode("Hello")


# For mlx-lm


def test_mlx_lm_takes_it_for_its_own_and_says_the_same_with_it(tmp_path: Path) -> None:
    model = tiny.on_disk(tmp_path / "model")
    Runner.load(str(model))
    runner = Runner.load(str(model))
    assert type(runner.tokenizer).__module__ == "mlx_promptcache.tokenizer"
    assert isinstance(runner.tokenizer, TokenizerWrapper)
    theirs, own = mlx_lm.load(str(model))[:2]
    for prompt in ("The cat sat", [1, 2, 3], " naïve 🐈"):
        said = [
            [(r.text, r.token, r.finish_reason) for r in mlx_lm.stream_generate(m, t, prompt, 12)]
            for m, t in ((runner.model, runner.tokenizer), (theirs, own))
        ]
        assert said[0] == said[1]
