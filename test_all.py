"""All tests: `pytest test_all.py`. No network, no GPU; those that compare with `transformers` and
`tokenizers` run where these are installed. What a test expects comes from elsewhere than the code
it tests: a slow loop, float64, a worked example, or those two libraries."""

import ast
import base64
import collections
import contextlib
import dataclasses
import functools
import gzip
import hashlib
import http.server
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import types
import unicodedata
import zipfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import bert
import bpe
import data
import gpt
import t5

ROOT = Path(__file__).parent
END = "<|endoftext|>"
TINY = dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Every test has its own cache folder and an empty working folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path


@pytest.fixture(autouse=True)
def own_seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """The sample at a run's end, 400 tokens, would take most of the time of the runs here."""
    for script in gpt, bert, t5:
        show = script.Trainer.show

        @functools.wraps(show)
        def short(self, length, show=show):
            return show(self, min(length, 40))

        monkeypatch.setattr(script.Trainer, "show", short)


# --------------------------------------------------------------------------------------------------
# bpe.py
# --------------------------------------------------------------------------------------------------

MIXED = "Don't we'll  go!\n\n\tIt's 3.14, naïve — 你好 мир १२ x² 𝔘𝔫𝔦 🙂\u3000end \x1c'S "


def test_splitting_by_hand():
    assert bpe.split_words(MIXED) == [
        *("Don", "'t", " we", "'ll", " ", " go", "!", "\n\n", "\t",
          "It", "'s", " 3", ".", "14", ",", " naïve"),
        *(" —", " 你好", " мир", " १२", " x", "²", " 𝔘𝔫𝔦", " 🙂", "\u3000", "end", " \x1c'", "S", " "),
    ]


def slow_merges(text: str, n: int) -> list[tuple[bytes, bytes]]:
    """BPE as the paper tells it: count all pairs, merge the most frequent, begin again."""
    rank = {byte: i
            for i, byte in enumerate(sorted(range(256), key=bpe.byte_alphabet().__getitem__))}
    number = {bytes([byte]): i for byte, i in rank.items()}
    words = [[bytes([byte]) for byte in word.encode()] for word in bpe.split_words(text)]
    merges = []
    for _ in range(n):
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], number[pair[0]], number[pair[1]]))
        merges.append(best)
        number.setdefault(best[0] + best[1], len(number))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@pytest.mark.parametrize(
    "text", ["low lower lowest newer newest wider", "aaaa aaa aa abab ababab baab", MIXED * 3])
def test_merges_equal_the_slow_loop(text):
    tok = bpe.Tokenizer.train(text, 256 + 30)
    learned = [(tok.spelling[ord(pair[0])], tok.spelling[ord(pair[1])]) for pair in tok.merges]
    assert learned == slow_merges(text, len(learned))
    assert len(learned) >= 11


def test_encoding_equals_merging_one_pair_at_a_time():
    draw = random.Random(0)
    text = " ".join("".join(draw.choice("aab") for _ in range(draw.randrange(1, 12)))
                    for _ in range(400))
    tok = bpe.Tokenizer.train(text, 256 + 60)
    for word in set(bpe.split_words(text)):
        parts = [chr(tok.byte_ids[byte]) for byte in word.encode()]
        while True:
            ranked = [(tok.merges[a + b][0], i)
                      for i, (a, b) in enumerate(zip(parts, parts[1:])) if a + b in tok.merges]
            if not ranked:
                break
            i = min(ranked)[1]
            parts[i : i + 2] = [tok.merges[parts[i] + parts[i + 1]][1]]
        assert tok.encode(word) == [ord(part) for part in parts]


def test_round_trip_of_bytes_and_code_points():
    tok = bpe.Tokenizer.train(MIXED * 5, 320, [END])
    draw = random.Random(1)
    for _ in range(5000):
        raw = draw.randbytes(draw.randrange(16))
        assert tok.decode_bytes(tok.encode(raw)) == raw
    every = [chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000]
    for start in range(0, len(every), 997):
        text = "".join(every[start : start + 997])
        assert tok.decode(tok.encode(text)) == text
    assert tok.decode_bytes(tok.encode("\udcff")) == b"\xff"  # how Python gives a broken argument
    assert tok.decode(tok.encode("\ud800")) == "?"


def test_special_tokens_are_plain_text_unless_asked_for(tmp_path):
    tok = bpe.Tokenizer.train("some text " * 9, 262, ["<pad>", END])
    text = f"some{END}text"
    assert tok.special == {"<pad>": 0, END: 1}
    assert 1 not in tok.encode(text)
    assert tok.encode(text, allow_special=True) == [*tok.encode("some"), 1, *tok.encode("text")]
    assert tok.decode(tok.encode(text)) == tok.decode(tok.encode(text, allow_special=True)) == text
    tok.save(tmp_path / "tokenizer.json")
    again = bpe.Tokenizer.load(tmp_path / "tokenizer.json")
    assert again.to_json() == tok.to_json() and again.encode(MIXED) == tok.encode(MIXED)
    assert again.vocab_size == tok.vocab_size == 262


def test_tokenizer_mistakes(tmp_path):
    with pytest.raises(ValueError, match="take 258; set --vocab_size 258"):
        bpe.Tokenizer.train("x", 257, ["a", "b"])
    with pytest.raises(ValueError, match="not in this vocabulary"):
        bpe.Tokenizer.train("x", 256).decode([256])
    good = bpe.Tokenizer.train("some text " * 9, 262, [END]).to_json()
    for breakage in (
        lambda t: t["model"].update(type="WordPiece"),
        lambda t: t["model"]["vocab"].pop("!"),
        lambda t: t["model"]["vocab"].update({"!": -1}),
        lambda t: t["model"]["vocab"].update({"!": 1 << 40}),
        lambda t: t["model"]["merges"].append(["nowhere", "x"]),
        lambda t: t["pre_tokenizer"].update(add_prefix_space=True),
        lambda t: t.pop("model"),
    ):
        broken = json.loads(json.dumps(good))
        breakage(broken)
        (tmp_path / "t.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="t.json is not the tokenizer.json"):
            bpe.Tokenizer.load(tmp_path / "t.json")


def test_a_word_of_a_million_letters_is_no_trap():
    tok = bpe.Tokenizer.train("abcabcab " * 99, 290)
    ids = tok.encode("abc" * 300_000)
    assert tok.decode(ids) == "abc" * 300_000


def test_same_merges_and_ids_as_the_tokenizers_library(tmp_path):
    hf = pytest.importorskip("tokenizers")
    draw = random.Random(2)
    every = [chr(code) for code in range(0x110000)
             if unicodedata.category(chr(code)) not in ("Cn", "Cs")]
    draw.shuffle(every)
    strange = "".join(draw.choice(["", "", " ", "'", "\n"]) + c for c in every[:30_000])
    letters = "".join(draw.choice("aab ") for _ in range(5_000))  # ties; tokens with two spellings
    stories = (ROOT / "input.txt").read_text(encoding="utf-8")[:300_000].replace(END, "")
    for text, vocab_size in ((stories, 1500), (strange, 900), (letters, 500)):
        tok = bpe.Tokenizer.train(text, vocab_size, ["<pad>", END])
        tok.save(tmp_path / "ours.json")
        theirs = hf.Tokenizer(hf.models.BPE())
        theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = hf.pre_tokenizers.ByteLevel.alphabet()
        trainer = hf.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<pad>", END],
            initial_alphabet=alphabet, show_progress=False)
        theirs.train_from_iterator([text], trainer)
        learned = json.loads(theirs.to_str())["model"]
        assert tok.to_json()["model"]["merges"] == learned["merges"]
        assert tok.to_json()["model"]["vocab"] == learned["vocab"]
        ids = theirs.encode(text).ids
        assert tok.encode(text) == ids
        assert hf.Tokenizer.from_file(str(tmp_path / "ours.json")).encode(text).ids == ids
        theirs.save(str(tmp_path / "theirs.json"))
        assert bpe.Tokenizer.load(tmp_path / "theirs.json").encode(text) == ids


# The tokenizers of the published models: small files in the layouts of the hub's bert-base-uncased,
# t5-small, gpt2 and google/t5-v1_1-small.


def open_as(name: str, content) -> bpe.BaseTokenizer:
    """The tokenizer of a file with this content (a dict, or bytes)."""
    data_ = content if isinstance(content, bytes) else json.dumps(content).encode()
    Path(name).write_bytes(data_)
    return bpe.Tokenizer.load(name)


def added(i: int, content: str, **flags) -> dict:
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return dict(id=i, content=content, **(plain | flags))


BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def bert_file(pieces, lowercase=True, **steps) -> dict:
    vocab = {piece: i for i, piece in enumerate([*BERT_TOKENS, *pieces])}
    return dict(
        version="1.0", truncation=dict(direction="Right", max_length=4, strategy="LongestFirst",
                                       stride=0), padding=None,
        added_tokens=[added(i, token) for i, token in enumerate(BERT_TOKENS)],
        normalizer=dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True,
                        strip_accents=None, lowercase=lowercase) | steps,
        pre_tokenizer=dict(type="BertPreTokenizer"),
        post_processor=None,
        decoder=dict(type="WordPiece", prefix="##", cleanup=True),
        model=dict(type="WordPiece", unk_token="[UNK]", continuing_subword_prefix="##",
                   max_input_chars_per_word=100, vocab=vocab),
    )


def t5_file(scores: dict[str, float], normalizer=None, scheme=None, **options) -> dict:
    """scheme None: the older layout, as in t5-small."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    names = ["<pad>", "</s>", "<unk>", *scores, *sentinels]
    space = dict(type="Metaspace", replacement="▁")
    space |= dict(prepend_scheme=scheme, split=True) if scheme else dict(add_prefix_space=True)
    split = dict(type="WhitespaceSplit")
    return dict(
        version="1.0", truncation=None, padding=None,
        added_tokens=[added(i, token) for i, token in enumerate(names)
                      if i < 3 or token in sentinels],
        normalizer=normalizer,
        pre_tokenizer=space | options if scheme else dict(
            type="Sequence", pretokenizers=[split, space]),
        post_processor=None,
        decoder=space,
        model=dict(type="Unigram", unk_id=2, vocab=[[name, scores.get(name, 0.0)]
                                                    for name in names]),
    )


def charsmap_bytes(rules: dict[str, str]) -> bytes:
    """A charsmap written as SentencePiece writes it: a double array, then what keys become."""
    tree, text = {}, b""
    for key, new in rules.items():
        node = tree
        for byte in key.encode():
            node = node.setdefault(byte, {})
        node[0] = len(text)  # the end of a key: where what it becomes stands
        text += new.encode() + b"\0"
    units, todo, base = {0: 0}, [(0, tree)], 0
    while todo:
        place, node = todo.pop()
        base += 1  # the first that is free for all children
        while any(base ^ byte in units for byte in node):
            base += 1
        units[place] |= (place ^ base) << 10 | (0 in node) << 8
        for byte, child in node.items():
            units[base ^ byte] = byte or child | 1 << 31
            todo += [(base ^ byte, child)] if byte else []
    array = np.zeros((max(units) | 255) + 1, "<u4")
    array[list(units)] = list(units.values())
    return np.uint32(array.nbytes).tobytes() + array.tobytes() + text


RULES = {"\n": " ", "\r": "", "ﬁ": "fi", "e\u0301": "é", "A": "a", "Ａ": "a", "½": "1/2", "𝔾": "G"}


def precompiled(rules=RULES) -> dict:
    return dict(type="Precompiled",
                precompiled_charsmap=base64.b64encode(charsmap_bytes(rules)).decode())


def protobuf(*fields) -> bytes:
    """A message of (number, value): int as varint, float in 4 bytes, str or bytes with length."""
    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)

    message = b""
    for number, value in fields:
        if isinstance(value, int):
            message += varint(number << 3) + varint(value)
        elif isinstance(value, float):
            message += varint(number << 3 | 5) + np.float32(value).tobytes()
        else:
            value = value.encode() if isinstance(value, str) else value
            message += varint(number << 3 | 2) + varint(len(value)) + value
    return message


SCORES = {"▁": -2.0, "▁the": -1.0, "▁house": -3.5, "s": -2.5, "he": -3.0, "fi": -3.0, "▁t": -4.0,
          "é": -5.0, ",": -2.25, "▁is": -2.75}


def spiece_file(*settings) -> bytes:
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}
    pieces = [protobuf((1, name), (2, SCORES.get(name, 0.0)), (3, kinds.get(name, 1)))
              for name in [*kinds, *SCORES]]
    return protobuf(*((1, piece) for piece in pieces), (2, protobuf((3, 1), (4, 13))),
                    (3, protobuf((1, "nmt_nfkc"), (2, charsmap_bytes(RULES)), *settings)))


def test_wordpiece_by_hand(tmp_path):
    tok = open_as("tokenizer.json", bert_file(
        ["un", "##aff", "##able", "the", "cafe", "don", "'", "t", "!", "中", "σασ", "x" * 99]))
    text = "The\u200b UNaffable  café, don't!中ΣΑΣ"
    ids = tok.encode(text)
    assert [tok.tokens[i] for i in ids] == [
        "the", "un", "##aff", "##able", "cafe", "[UNK]", "don", "'", "t", "!", "中", "σασ"]
    assert tok.decode(ids) == "the unaffable cafe [UNK] don ' t! 中 σασ"
    assert tok.decode_bytes(ids) == tok.decode(ids).encode()
    assert tok.encode("unaffably") == tok.encode("x" * 101) == [1]  # all of the word
    assert tok.encode(b"\xff the") == tok.encode("\ufffdthe\0") == [8]
    assert tok.encode("the[MASK]", allow_special=True) == [8, 4]
    assert not {4} & set(tok.encode("the[MASK]"))
    assert tok.spelling[6] == b"aff" and 1 not in tok.spelling
    assert (tok.vocab_size, tok.special) == (17, {token: i for i, token in enumerate(BERT_TOKENS)})
    cased = open_as("cased.json", bert_file(["the", "cafe", "café", "The"], lowercase=False))
    assert cased.encode("The the café") == [8, 5, 7]


def test_unigram_is_the_best_of_all_cuts():
    draw = random.Random(0)
    letters = "ab\u2581c"
    pieces = {letter: -draw.uniform(5, 9) for letter in letters[:3]}  # "c" is unknown
    for _ in range(25):
        piece = "".join(draw.choice(letters) for _ in range(draw.randrange(2, 5)))
        pieces[piece] = -draw.uniform(3, 20)
    tok = open_as("tokenizer.json", t5_file(pieces, scheme="never", split=False))
    unknown = min(pieces.values()) - 10

    def all_cuts(word: str):
        for end in range(1, len(word) + 1):
            if end == 1 or word[:end] in pieces:
                yield from ([word[:end], *rest] for rest in all_cuts(word[end:]))
        if not word:
            yield []

    def order(cut: list[str]):  # of equal scores (a + aa, aa + a): the longer last piece
        score = sum(pieces.get(part, unknown) for part in cut)
        return round(score, 9), [len(part) for part in reversed(cut)]

    for _ in range(300):
        word = "".join(draw.choice(letters) for _ in range(draw.randrange(1, 10)))
        best = max(all_cuts(word), key=order)
        names = [part if part in pieces else "<unk>" for part in best]
        names = [name for i, name in enumerate(names) if [name] != names[i - 1 : i]
                 or name != "<unk>"]
        assert [tok.tokens[i] for i in tok.encode(word)] == names


def test_a_charsmap_by_hand():
    rules = bpe.read_charsmap(charsmap_bytes(RULES | {"ﬁn": "never: ﬁ is found first"}))
    assert rules == RULES
    normalize = bpe.by_rules(rules)
    assert normalize("BAR ½\nﬁn e\u0301 𝔾") == "BaR 1/2 fin é G"
    assert normalize("\r\n") == ""  # one cluster, and it begins with a key
    assert normalize("ﬁ\u0301 ﬁ\u0301\u0302") == "fi fi\u0301\u0302"  # up to 5 bytes; above


def test_t5_s_files_by_hand(monkeypatch):
    for name, content in (("tokenizer.json", t5_file(SCORES, precompiled())),
                          ("spiece.model", spiece_file())):
        Path("t5").mkdir(exist_ok=True)
        tok = open_as(f"t5/{name}", content)
        text = "The the\n ﬁ  houses"
        ids = tok.encode(text)
        assert [tok.tokens[i] for i in ids] == ["▁", "<unk>", "he", "▁the", "▁", "fi", "▁house",
                                                "s"]
        assert tok.decode(ids) == "<unk>he the fi houses"
        assert tok.vocab_size == 113 and tok.special["<extra_id_0>"] == 112
        assert tok.special["<extra_id_99>"] == 13 and tok.special["</s>"] == 1
        assert tok.spelling[4] == b" the" and not {0, 1, 2, 112} & set(tok.spelling)
        assert tok.encode("the <extra_id_1>s", allow_special=True) == [4, 111, 3, 6]
        for typed in ("the <extra_id_1>s", "</s>", "<unk>"):
            assert not {0, 1, 111} & set(tok.encode(typed))
        assert tok.decode([4, 111, 4]) == "the<extra_id_1> the"
        tok.save("t5/saved.json")
        again = bpe.Tokenizer.load("t5/saved.json")
        assert again.encode(text) == ids and again.to_json() == tok.to_json()
        assert bpe.Tokenizer.from_pretrained("t5").encode(text) == ids
        monkeypatch.setattr(data, "pretrained_folder", lambda name: Path("t5"), raising=False)
        assert bpe.Tokenizer.from_pretrained("google/t5-v1_1-small").encode(text) == ids
        Path("t5", name).unlink()
    with pytest.raises(ValueError, match="has no tokenizer.json and no spiece.model"):
        bpe.Tokenizer.from_pretrained("t5")
    kept = open_as("kept.model", spiece_file((3, 0), (4, 0)))  # no space put before, none removed
    assert [kept.tokens[i] for i in kept.encode("he  is")] == ["he", "▁", "▁is"]


def test_damaged_files_of_the_published_models():
    bert_, t5 = bert_file(["the"]), t5_file(SCORES, precompiled(), "first")
    whole = base64.b64decode(t5["normalizer"]["precompiled_charsmap"])

    def charsmap(cut: bytes):
        encoded = base64.b64encode(cut).decode()
        return lambda t: t["normalizer"].update(precompiled_charsmap=encoded)

    root = np.frombuffer(whole[4:8], "<u4")[0]
    far = (root | np.uint32(1 << 9 | 0x3FFFFF << 10)).tobytes()
    for good, breakages in (bert_, [
        lambda t: t["model"].update(unk_token="<unk>"),
        lambda t: t["model"].update(vocab=["the"]),
        lambda t: t["model"]["vocab"].update(the=7),  # a hole
        lambda t: t["model"]["vocab"].update(the=1 << 40),
        lambda t: t["model"]["vocab"].update({"\ud800": 6}),
        lambda t: t["added_tokens"].append(added(5, "[NEW]")),  # an id twice
        lambda t: t["added_tokens"].append(dict(id=6)),
        lambda t: t["normalizer"].update(type="NFC"),
        lambda t: t["normalizer"].pop("lowercase"),
        lambda t: t["model"]["vocab"].update({"[UNK]": math.nan}),
        lambda t: t.update(version="\ud800"),
        lambda t: t.update(pre_tokenizer=None),
        lambda t: t["decoder"].update(type="BPEDecoder"),
    ]), (t5, [
        lambda t: t["model"].update(unk_id=None),
        lambda t: t["model"].update(unk_id=1 << 40),
        lambda t: t["model"].update(byte_fallback=True),
        lambda t: t["model"]["vocab"].append(["▁the", -1.0]),
        lambda t: t["model"]["vocab"].append(["new"]),
        lambda t: t["model"]["vocab"][5].__setitem__(1, math.nan),
        lambda t: t["model"]["vocab"][5].__setitem__(1, 10**400),
        lambda t: t["pre_tokenizer"].update(replacement="__"),
        lambda t: t["pre_tokenizer"].update(type="Whitespace"),
        lambda t: t.update(normalizer=dict(type="Strip", strip_left=True, strip_right=True)),
        lambda t: t.update(normalizer=dict(type="Replace", pattern=dict(Regex="(a+)+$"),
                                           content="")),
        lambda t: t.update(normalizer=dict(type="Replace", pattern=dict(String="a"), content=5)),
        lambda t: t.update(normalizer=dict(type="Replace", pattern=dict(String="a"))),
        lambda t: t.update(decoder=None),
        charsmap(b""),
        charsmap(whole[:3]),
        charsmap(whole[:500]),
        charsmap(b"\xff" * 8 + whole[8:]),
        charsmap(whole[:4] + far + whole[8:]),
        charsmap(whole[: 4 + int.from_bytes(whole[:4], "little")]),  # without the text
        charsmap(whole + b"\xff") if whole.endswith(b"\xff") else charsmap(whole[:-9] + b"\xff"),
    ]):
        open_as("t.json", good)
        for breakage in breakages:
            broken = json.loads(json.dumps(good))
            breakage(broken)
            with pytest.raises(ValueError, match="^t.json is not the tokenizer.json"):
                open_as("t.json", broken)
    for broken in (b"", b"\xff" * 50, b"{", b"[" * 100_000, b"[]", b'{"model": []}'):
        with pytest.raises(ValueError, match="^t.json is not the tokenizer.json"):
            open_as("t.json", broken)


def test_a_charsmap_that_leads_in_circles_is_no_trap():
    units = np.full(65536, 1, "<u4")  # every node the parent of many
    units[:] = np.arange(65536) & 255 | np.arange(65536) << 10 & 0xFF << 10
    with pytest.raises((ValueError, LookupError)):
        bpe.read_charsmap(np.uint32(units.nbytes).tobytes() + units.tobytes() + b"x\0")


def test_damaged_spiece_models():
    whole, draw = spiece_file(), random.Random(0)
    damaged = [whole[: draw.randrange(len(whole))] for _ in range(60)]
    for _ in range(120):
        flipped = bytearray(whole)
        flipped[draw.randrange(250)] ^= 1 << draw.randrange(8)  # among the pieces
        damaged.append(bytes(flipped))
    refused = 0
    for content in damaged:
        try:
            open_as("spiece.model", content).encode("the houses")
        except ValueError as error:
            refused += 1
            assert str(error).startswith("spiece.model is not the spiece.model of T5")
    assert refused > 70


def test_a_long_word_is_no_trap_for_the_others():
    word = "hesfi" * 100_000
    unigram, bert_ = open_as("a.json", t5_file(SCORES)), open_as("b.json", bert_file(["the"]))
    assert unigram.decode(unigram.encode(word)) == word
    assert bert_.encode(word) == [1] and len(bert_.encode("!" * 300_000)) == 300_000
    assert len(unigram.encode("<" * 300_000)) == 2  # "▁", and one <unk>


STRANGE = "\t\n\r\x0b\x0c\x85\xa0\u3000\u200b\u200d\u1734  ▁ΣİǅſKｱﾞ½ﬁÅé'!."


def strange_texts(number: int, special=()) -> list[str]:
    """Code points of all kinds in shuffled order, among letters, spaces, marks and special tokens.
    """
    draw = random.Random(3)
    every = [chr(code) for code in range(0x110000)
             if unicodedata.category(chr(code)) not in ("Cn", "Cs", "Co")]
    draw.shuffle(every)
    between = ["", "", " ", "a", "e", " the", "  ", "\u0301", "\u0e33", "Σ", *STRANGE, *special]
    texts = ["".join(draw.choice(between) + character for character in every[start : start + 25])
             for start in range(0, 25 * number, 25)]
    return [*texts, *(f"{a}{b} {a}" for a in STRANGE for b in ("\u0301", "x", "\n", "é"))]


def assert_same_ids(content: dict, special, texts, reference=None):
    """Our ids, and those of the file we save, are the library's. reference: a file to ask instead,
    where special tokens are to be plain text."""
    hf = pytest.importorskip("tokenizers")
    tok = open_as("t.json", content)
    tok.save("saved.json")
    again = bpe.Tokenizer.load("saved.json")
    theirs = hf.Tokenizer.from_file("t.json")
    theirs.no_truncation()
    saved = hf.Tokenizer.from_file("saved.json")
    plain = hf.Tokenizer.from_str(json.dumps(reference or content))
    plain.no_truncation()
    plain.encode_special_tokens = True
    for text in texts:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text, allow_special=True) == ids, text
        assert saved.encode(text, add_special_tokens=False).ids == ids, text
        assert again.encode(text, allow_special=True) == ids, text
        assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=False), text
        assert tok.encode(text) == plain.encode(text, add_special_tokens=False).ids, text


STORIES = (ROOT / "input.txt").read_text(encoding="utf-8")[:100_000]


@pytest.mark.parametrize("steps", [
    {}, dict(lowercase=False), dict(strip_accents=False), dict(lowercase=False, strip_accents=True),
    dict(clean_text=False, handle_chinese_chars=False)])
def test_same_ids_as_the_library_s_wordpiece(steps):
    hf = pytest.importorskip("tokenizers")
    special = [*BERT_TOKENS, "[mask]", " [X] ", "a[W]", "[W]", "Éa", "b-r", "b-rk"]
    texts = strange_texts(250, special)
    theirs = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
    theirs.normalizer = hf.normalizers.BertNormalizer(**steps)
    theirs.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
    theirs.train_from_iterator([STORIES, *texts], hf.trainers.WordPieceTrainer(
        vocab_size=3000, special_tokens=BERT_TOKENS, show_progress=False))
    vocab = json.loads(theirs.to_str())["model"]["vocab"]
    pieces = sorted(vocab, key=vocab.__getitem__)[5:]
    content = bert_file(pieces, **steps)
    n = len(vocab)
    content["added_tokens"] += [
        added(n, "[X]", lstrip=True, rstrip=True), added(n + 1, "[W]", single_word=True),
        added(n + 2, "b-r", special=False, single_word=True)]
    assert_same_ids(content, special, [STORIES, *texts])


@functools.cache
def learned_scores() -> dict[str, float]:
    """Piece -> score, as the library learns them."""
    hf = pytest.importorskip("tokenizers")
    theirs = hf.Tokenizer(hf.models.Unigram())
    theirs.pre_tokenizer = hf.pre_tokenizers.Metaspace()
    training = [line for line in [*STORIES.split("\n"), *strange_texts(20)] if "<" not in line]
    theirs.train_from_iterator(training, hf.trainers.UnigramTrainer(
        vocab_size=900, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False))
    return dict(json.loads(theirs.to_str())["model"]["vocab"][1:])


@pytest.mark.parametrize("normalizer, scheme, options", [
    ("charsmap", None, {}), ("hub", "always", {}), ("nfkc", "always", {}), (None, "first", {}),
    (None, "never", dict(split=False))])
def test_same_ids_as_the_library_s_unigram(normalizer, scheme, options):
    special = ["<extra_id_0>", " <extra_id_99> ", "</s>", "<unk>", "<extra_id_"]
    texts = strange_texts(250, special)
    strip = dict(type="Strip", strip_left=False, strip_right=True)
    spaces = dict(type="Replace", pattern=dict(Regex=" {2,}"), content="▁")
    compatible = {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in range(128, 0x3400)
                  if unicodedata.normalize("NFKC", chr(code)) not in (chr(code), "")}
    normalizer = {
        None: None, "nfkc": dict(type="NFKC"), "charsmap": precompiled(RULES | compatible),
        "hub": dict(type="Sequence", normalizers=[precompiled(), strip, spaces])}[normalizer]
    content = t5_file(learned_scores(), normalizer, scheme, **options)
    hidden = json.loads(json.dumps(content))  # the library would find "</s>" among the pieces
    for token in hidden.pop("added_tokens"):
        hidden["model"]["vocab"][token["id"]][0] = f"\U0010ffff{token['id']}"
    assert_same_ids(content, special, [STORIES, *texts], hidden)


def test_same_ids_as_the_library_for_gpt2_s_file():
    tok = bpe.Tokenizer.train(STORIES, 700)
    content = tok.to_json()
    model = content["model"]
    model["vocab"][END] = 700
    model["merges"] = [" ".join(merge) for merge in model["merges"]]
    del model["type"], content["pre_tokenizer"]["use_regex"]
    content |= dict(added_tokens=[added(700, END, normalized=True), added(701, "<m>", lstrip=True)],
                    post_processor=content["pre_tokenizer"])
    hub = open_as("t.json", content)
    assert hub.special == {END: 700, "<m>": 701} and hub.vocab_size == 702
    assert hub.encode("a" + END) == tok.encode("a" + END)
    assert_same_ids(content, [END], [STORIES, *strange_texts(100, [END, " <m>"])])
    del content["added_tokens"]  # then it is a token like others, that no merge makes
    open_as("t.json", content).save("saved.json")
    assert bpe.Tokenizer.load("saved.json").decode([700]) == END


# --------------------------------------------------------------------------------------------------
# data.py
# --------------------------------------------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`: path -> bytes, or the number of an error, or the address it has moved to.
    Cuts a connection that has more to send after `cut` bytes, as often as `cuts` says; notes each
    request, and the tokens that each host has seen."""

    files, cuts, cut, ranges, seen, tokens = {}, 0, 20_000, True, [], set()

    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        Server.seen.append((self.path, start))
        Server.tokens.add(
            (self.headers["Host"].partition(":")[0], self.headers.get("Authorization")))
        body = self.files.get(self.path)
        if isinstance(body, str):
            self.send_response(307)
            self.send_header("Location", body)
            return self.end_headers()
        if isinstance(body, int) or body is None:
            return self.send_error(body or 404)
        if not self.ranges:
            start = 0
        if start >= len(body):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        if Server.cuts > 0 and len(body) - start > self.cut:
            Server.cuts -= 1
            self.wfile.write(body[start : start + self.cut])
            self.wfile.flush()
            self.connection.close()
            return
        self.wfile.write(body[start:])

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    Server.files, Server.cuts, Server.cut, Server.ranges = {}, 0, 20_000, True
    Server.seen, Server.tokens = [], set()
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_download_continues_where_the_connection_broke(server, tmp_path):
    body = random.Random(0).randbytes(100_000)
    Server.files, Server.cuts = {"/a.bin": body}, 3
    digest = "sha256:" + hashlib.sha256(body).hexdigest()
    path = data.download(f"{server}/a.bin", tmp_path / "a.bin", len(body), digest)
    assert path.read_bytes() == body
    assert [start for _, start in Server.seen] == [0, 1 << 14, 2 << 14, 3 << 14]
    data.download(f"{server}/a.bin", path)
    assert len(Server.seen) == 4  # what is there is not fetched again


def test_download_where_the_server_cannot_continue(server, tmp_path):
    Server.files, Server.cuts, Server.ranges = {"/a.bin": b"xy" * 25_000}, 1, False
    assert data.download(f"{server}/a.bin", tmp_path / "a.bin").read_bytes() == b"xy" * 25_000
    assert [start for _, start in Server.seen] == [0, 1 << 14]


def test_download_whose_part_was_complete(server, tmp_path):
    Server.files = {"/a.bin": b"x" * 5000}
    (tmp_path / "a.bin.part").write_bytes(b"x" * 5000)
    assert data.download(f"{server}/a.bin", tmp_path / "a.bin").read_bytes() == b"x" * 5000


def test_download_mistakes(server, tmp_path):
    Server.files = {"/a.bin": b"x" * 5000, "/busy": 503}
    for url, match in (("none", "answered 404"), ("busy", "answered 503, 5 times")):
        with pytest.raises(OSError, match=match):
            data.download(f"{server}/{url}", tmp_path / url)
        assert not (tmp_path / url).exists()
    with pytest.raises(OSError, match="has 5,000 bytes instead of 6,000"):
        data.download(f"{server}/a.bin", tmp_path / "a.bin", size=6000)
    with pytest.raises(OSError, match="does not have the md5 sum"):
        data.download(f"{server}/a.bin", tmp_path / "a.bin", digest="md5:0")
    assert list(tmp_path.glob("a.bin*")) == []


def corpus_of(source, vocab_size=300):
    return data.prepare(str(source), vocab_size, [END], END)


def documents_of(corpus):
    """The documents, taken apart again."""
    parts = [corpus.tokenizer.decode(part).split(END) for part in (corpus.train, corpus.validation)]
    assert all(part[0] == part[-1] == "" for part in parts)
    return [part[1:-1] for part in parts]


def test_every_kind_of_source_gives_the_same_documents(server, tmp_path):
    texts = [f"Story {i}.\n\nIt has {i} words — or so." for i in range(20)]
    joined = f"\n{END}\n".join(texts)
    (tmp_path / "a.txt").write_text(joined + f"\n{END}\n", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(joined.encode()))
    (tmp_path / "c.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (tmp_path / "folder").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "folder" / f"{i:02}.txt").write_text(text, encoding="utf-8")
    Server.files = {"/d.txt": joined.encode()}
    for source in ("a.txt", "b.txt.gz", "c.jsonl", "folder", f"{server}/d.txt"):
        corpus = corpus_of(source if "://" in source else tmp_path / source)
        assert documents_of(corpus) == [texts[:18], texts[18:]], source
        assert corpus.documents == 20
        assert corpus.train.dtype == np.uint16


def test_one_stream_is_split_by_bytes_and_the_cache_is_used(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("äbc " * 100, encoding="utf-8")
    corpus = corpus_of(tmp_path / "a.txt")
    train, validation = documents_of(corpus)
    assert ("".join(train + validation) == "äbc " * 100
            and len(train) == len(validation) == corpus.documents == 1)
    assert 449 <= corpus.token_bytes[corpus.train].sum() <= 451
    monkeypatch.setattr(bpe.Tokenizer, "from_counts", None)  # a second training would fail
    again = corpus_of(tmp_path / "a.txt")
    assert (np.array_equal(again.train, corpus.train)
            and again.tokenizer.to_json() == corpus.tokenizer.to_json())
    monkeypatch.undo()


CORPUS_MB = int(os.environ.get("CORPUS_MB", 0))
PREPARE = """
import json, resource, sys, time
sys.path.insert(0, sys.argv[1])
import data
from data import SEPARATOR

def timed(name):
    def call(*arguments, work=getattr(data, name)):
        start = time.perf_counter()
        work(*arguments)
        seconds[name] = time.perf_counter() - start
    seconds[name] = 0
    setattr(data, name, call)

seconds = {}
timed("train_tokenizer")
timed("encode_corpus")
corpus = data.prepare(sys.argv[2], 8192, [SEPARATOR], SEPARATOR)
peaks = [resource.getrusage(who).ru_maxrss * 1024 // 10**6
         for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
print(json.dumps([*seconds.values(), *peaks, len(corpus.train) + len(corpus.validation)]))
"""
BESIDE = """
import sys, time, tokenizers
sys.path.insert(0, sys.argv[1])
import data
theirs = tokenizers.ByteLevelBPETokenizer()
start = time.perf_counter()
theirs.train([sys.argv[2]], vocab_size=8192, special_tokens=[data.SEPARATOR], show_progress=False)
trained, tokens = time.perf_counter(), 0
path = data.Path(sys.argv[2])
for piece in data.pieces(path, 0, path.stat().st_size):
    tokens += sum(len(each.ids) for each in theirs.encode_batch(data.read_piece(piece)))
print(trained - start, time.perf_counter() - trained, tokens)
"""


def write_large_corpus(path, megabytes: int) -> int:
    """Stories again and again in random order, with invented words and names strewn in: so many
    different ones, 10^6 in a GB, are returned."""
    documents = (ROOT / "input.txt").read_text(encoding="utf-8").split(END + "\n")[:-1]
    draw, invented = random.Random(0), set()
    syllables = [a + b for a in "b d f g k l m n p r s t v ch sh br st".split()
                 for b in "a e i o u ai ou ar en il".split()]
    with open(path, "w", encoding="utf-8") as file:
        while file.tell() < megabytes * 10**6:
            for text in draw.sample(documents, len(documents)):
                for _ in range(draw.choice((1, 1, 2))):
                    word = "".join(draw.choices(syllables, k=draw.randint(3, 5)))
                    word = word.capitalize() if draw.random() < 0.5 else word
                    place = text.find(" ", draw.randrange(len(text) // 2))
                    text = f"{text[:place]} {word}{text[place:]}"
                    invented.add(word)
                file.write(f"{text}{END}\n")
    return len(invented)


@pytest.mark.skipif(not CORPUS_MB, reason="minutes: CORPUS_MB=2000 pytest -s -k large_corpus")
def test_a_large_corpus_in_bounded_memory(own_cache):
    """Prints how long it takes to learn a tokenizer and to encode, ours and the library's, and when
    training on it has begun. Memory: of this process, and of the largest of the others."""
    path = own_cache / "large.txt"
    invented = write_large_corpus(path, CORPUS_MB)
    print(f"\n{path.stat().st_size / 1e6:,.0f} MB with {invented:,} invented words")

    def run(code):
        done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(path)],
                              capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    learned, encoded, own, other, tokens = json.loads(run(PREPARE))
    print(f"here: learned in {learned:.1f} s, encoded in {encoded:.1f} s; {tokens:,} tokens; "
          f"at most {own} MB, and {other} MB in a process for pieces")
    assert own < 1000 and other < 1000
    began = time.monotonic()
    training = subprocess.Popen(
        [sys.executable, gpt.__file__, "--data", str(path), "--vocab_size", "8192", "--max_steps",
         "9", "--eval_interval", "9", "--log_interval", "1"], stderr=subprocess.PIPE, text=True)
    for line in training.stderr:
        if line.startswith(("model", "step 1/")):
            print(f"{time.monotonic() - began:.1f} s after the start: {line.strip()}")
        if line.startswith("step 1/"):
            break
    training.kill()
    training.wait()
    if CORPUS_MB <= 500:
        learned, encoded, tokens = map(float, run(BESIDE).split())
        print(f"tokenizers: learned in {learned:.1f} s, encoded in {encoded:.1f} s; {tokens:,.0f}")


def test_pieces_give_the_tokens_of_the_whole(tmp_path, monkeypatch):
    draw = random.Random(0)
    words = ["tree", "and", "naïve", "你好", "...", "\n", "\n\n ", "x" * 30, " ", "12"]
    stream = " ".join(draw.choice(words) for _ in range(4000))
    stories = f"\n{END}\n".join(" ".join(draw.choice(words) for _ in range(99)) for _ in range(40))
    for text in (stream, stories):
        path = tmp_path / f"{len(text)}.txt"
        path.write_text(text, encoding="utf-8")
        whole = corpus_of(path)
        with monkeypatch.context() as small:
            small.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
            small.setattr(data, "PIECE", 999)
            small.setattr(data, "parallel", map)
            cut = data.pieces(path, 0, path.stat().st_size)
            assert len(cut) > 10
            assert b"".join(path.read_bytes()[a:b] for _, a, b in cut) == path.read_bytes()
            pieced = data.prepare(str(path), 0, [END], END, tokenizer=whole.tokenizer)
        assert np.array_equal(pieced.train, whole.train)
        assert np.array_equal(pieced.validation, whole.validation)


def process_number(job):
    return os.getpid()


def test_several_processes_give_the_same(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    here, others = os.getpid(), set(data.parallel(process_number, list(range(20))))
    assert others and here not in others
    assert list(data.parallel(str, list(range(20)))) == [str(i) for i in range(20)]


def test_the_movie_reviews_archive(server, tmp_path, monkeypatch):
    names = {
        "train/pos/0_9.txt": "good",
        "train/neg/1_1.txt": "bad",
        "train/unsup/2_0.txt": "so",
        "test/pos/0_8.txt": "fine",
    }
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as archive:
        for name, text in {**names, "../train/pos/7_7.txt": "evil",
                           "train/pos/list.txt": "none"}.items():
            member = tarfile.TarInfo("aclImdb/" + name)
            raw = f"{text} film<br /><br />indeed".encode()
            member.size = len(raw)
            archive.addfile(member, io.BytesIO(raw))
        link = tarfile.TarInfo("aclImdb/train/pos/8_8.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    Server.files = {"/imdb.tar.gz": (tmp_path / "a.tar.gz").read_bytes()}
    monkeypatch.setitem(data.NAMED, "imdb", [("archive", f"{server}/imdb.tar.gz", None, None)])
    train, validation = documents_of(corpus_of("imdb"))
    assert train == [f"{word} film\n\nindeed" for word in ("good", "bad", "so")]
    assert validation == ["fine film\n\nindeed"]
    rows = data.read_examples("imdb", ("text", "label"))  # those that have a label
    assert [[(row["text"].split()[0], row["label"]) for row in rows[part]] for part in rows] == [
        [("good", "pos"), ("bad", "neg")], [("fine", "pos")]]
    with pytest.raises(ValueError, match="no column 'prompt'"):
        data.read_examples("imdb", PAIRS)
    raw = (tmp_path / "a.tar.gz").read_bytes()
    for broken in raw[:200], b"no archive" * 100, b"\x1f\x8b\x08\x04" + bytes(6):
        (tmp_path / "broken.tar.gz").write_bytes(broken)
        with pytest.raises(ValueError, match="is no whole archive"):
            list(data.archive_texts(tmp_path / "broken.tar.gz", "train"))


def test_sources_that_cannot_be_used(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "latin.txt").write_bytes("für alle".encode("latin-1") * 9)
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"body": "b"}\n')
    (tmp_path / "bare").mkdir()
    for name, match in (
        ("empty.txt", "is empty"),
        ("latin.txt", r"not UTF-8 text: byte 0xfc at offset 1; convert it"),
        ("rows.jsonl", 'line 2: not a JSON object with a "text"'),
        ("bare", "holds no .txt, .gz, .jsonl file"),
        ("nowhere.txt", "no data at .*: give a file, a folder, a URL or one of shakespeare"),
    ):
        with pytest.raises(ValueError, match=match):
            corpus_of(tmp_path / name)
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []  # nothing half-made


def test_a_file_that_is_no_text_is_cut_and_named(tmp_path, monkeypatch):
    """Nothing but the later bytes of characters: there is no place to cut at."""
    monkeypatch.setattr(data, "PIECE", 999)
    (tmp_path / "a.txt").write_bytes(b"\x80" * 5000)
    with pytest.raises(ValueError, match="a.txt is not UTF-8 text: byte 0x80 at offset 0"):
        data.prepare(str(tmp_path / "a.txt"), 300, [END], END)


def test_archives_that_claim_or_hold_too_much(tmp_path, monkeypatch):
    """A few kilobytes may be gigabytes of zeros, or say that they are."""
    monkeypatch.setattr(data, "LONGEST", 1 << 20)

    def header(size, name="aclImdb/train/pos/0_9.txt", kind=tarfile.REGTYPE, second={}):
        member = tarfile.TarInfo(name)
        member.size, member.type, member.pax_headers = size, kind, second
        return member.tobuf(tarfile.PAX_FORMAT if second else tarfile.GNU_FORMAT)

    zeros, long_name = bytes(3 << 20), header(1, kind=tarfile.GNUTYPE_LONGNAME) + b"a" + bytes(511)
    for content in (
        header(3 << 20) + zeros,
        header(3 << 20, kind=tarfile.GNUTYPE_LONGNAME) + zeros,
        header(1 << 60, "aclImdb/README"),
        header(0, second=dict(size=str(1 << 60))),
        long_name * 2000,  # one inside the other
    ):
        (tmp_path / "a.tar.gz").write_bytes(gzip.compress(content + bytes(1024), 1))
        with pytest.raises(ValueError, match="no whole archive: .*(has .* bytes|recurs)"):
            list(data.archive_texts(tmp_path / "a.tar.gz", "train"))
    for name, content, problem in (
        ("a.jsonl.gz", gzip.compress(b'{"text": "' + zeros + b'"}', 1), "line 1: not a JSON"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: not a JSON object"),
        ("a.txt.gz", gzip.compress(bytes(99))[:-9], "a.txt.gz is no whole .gz file: Compressed"),
        ("a.txt.gz", gzip.compress(bytes(99))[:10] + b"\xff" * 20, "no whole .gz file: Error -3"),
        ("a.txt.gz", b"no gzip", "no whole .gz file: Not a gzipped file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=problem):
            data.find_source(str(tmp_path / name))
    assert [p for p in (tmp_path / "cache").rglob("*") if p.is_file()] == []


@pytest.mark.parametrize("n, block_size, stride", [
    (1, 4, 4), (2, 4, 4), (5, 4, 4), (6, 4, 4), (23, 4, 3), (40, 8, 1)])
def test_sliding_windows_lose_nothing(n, block_size, stride):
    tokens = np.arange(100, 100 + n)
    inputs, targets = data.sliding_windows(tokens, block_size, stride, pad_id=7)
    assert inputs.shape == targets.shape == (len(inputs), block_size)
    seen = set()
    for row in range(len(inputs)):
        for column in range(block_size):
            i = row * stride + column
            assert inputs[row, column] == (tokens[i] if i < n else 7)
            assert targets[row, column] == (tokens[i + 1] if i + 1 < n else -100)
            seen.add(targets[row, column])
    assert seen - {-100} == set(tokens[1:])


def test_shuffled_rows_are_whole_epochs():
    rows, _ = data.shuffled_rows(10, seed=3, first=0, count=30)
    assert all(sorted(rows[i : i + 10]) == list(range(10)) for i in (0, 10, 20))
    assert list(rows[:10]) != list(rows[10:20])
    late, luck = data.shuffled_rows(10, seed=3, first=17, count=5)
    assert list(late) == list(rows[17:22]) and luck[0] != luck[-1]


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a"
    path.write_text("old")
    with pytest.raises(KeyError), data.replacing(path, "w") as file:
        file.write("half")
        raise KeyError
    assert path.read_text() == "old" and list(tmp_path.glob("a*")) == [path]


def safetensors_file(tensors, header=None) -> bytes:
    """A file made by hand: name -> (dtype, shape, bytes); `header` in place of the right one."""
    entries, numbers = {}, b""
    for name, (dtype, shape, content) in tensors.items():
        entries[name] = dict(
            dtype=dtype, shape=shape, data_offsets=[len(numbers), len(numbers) + len(content)])
        numbers += content
    text = header if header is not None else json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + numbers


def folder_of(**files) -> Path:
    """A new folder with these files: config__json=b"{}" becomes config.json."""
    folder = Path(tempfile.mkdtemp(dir="."))
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


ONES = ("F32", [2], struct.pack("<2f", 1, 1))
SIX = ("F32", [2, 3], struct.pack("<6f", 1, 2, 3, 4, 5, 6))


def saved(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def compressed(archive: bytes) -> bytes:
    """What `torch.save` wrote, packed: `torch.load` would take it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(archive)) as old, zipfile.ZipFile(
            buffer, "w", zipfile.ZIP_DEFLATED) as new:
        for entry in old.infolist():
            new.writestr(entry.filename, old.read(entry))
    return buffer.getvalue()


def test_weights_are_read_into_views_of_any_kind():
    folder = folder_of(model__safetensors=safetensors_file({
        "transformer.wte.gamma": SIX,
        "half": ("BF16", [2], bytes.fromhex("803f20c0")),
        "one": ("F64", [], struct.pack("<d", 0.5)),
        "h.0.attn.bias": ("U8", [2], b"ab"),
    }))
    assert data.weight_names(folder) == {"transformer.wte.gamma", "half", "one", "h.0.attn.bias"}
    turned, fused, one = torch.zeros(3, 2, requires_grad=True), torch.zeros(4), torch.zeros(())
    targets = {"wte.weight": turned.T, "half": fused[1:3], "one": one, "lm_head": turned.T}
    data.load_weights(
        folder, targets, passed_over=r"h\.\d+\.attn\.bias",
        rename=lambda name: name.removeprefix("transformer.").replace("gamma", "weight"))
    assert turned.tolist() == [[1, 4], [2, 5], [3, 6]] and one.item() == 0.5
    assert fused.tolist() == [0, 1, -2.5, 0]


@pytest.mark.parametrize("kind", ["safetensors", "bin", "bin of before PyTorch 1.6"])
def test_weights_in_shards(kind):
    folder = folder_of()
    whole = "model.safetensors" if kind == "safetensors" else "pytorch_model.bin"
    for name, stored in (("a", ONES), ("b", SIX)):
        values = torch.tensor(np.frombuffer(stored[2], "<f4")).reshape(stored[1])
        (folder / f"{name}.{whole}").write_bytes(safetensors_file({name: stored}))
        if kind != "safetensors":
            torch.save({name: values}, folder / f"{name}.{whole}",
                       _use_new_zipfile_serialization="before" not in kind)
    index = folder / f"{whole}.index.json"
    index.write_text(json.dumps({"weight_map": {"a": f"a.{whole}", "b": f"b.{whole}"}}))
    targets = dict(a=torch.zeros(2), b=torch.zeros(2, 3))
    data.load_weights(folder, targets)
    assert targets["a"].tolist() == [1, 1] and targets["b"].flatten().tolist() == [*range(1, 7)]
    (folder / f"c.{whole}").write_bytes((folder / f"a.{whole}").read_bytes())
    for wrong, problem in (("../../x.bin", "'../../x.bin', no .* file beside it"),
                           ("/etc/passwd", "'/etc/passwd'"), (f"..\\{whole}", "beside it"),
                           (f"{whole}\n", "beside it"), (["x"], "beside it"),
                           ("config.json", "'config.json'"), (f"d.{whole}", f"names 'd.{whole}'"),
                           (f"c.{whole}", f"c.{whole}: 'a' is there for the second time")):
        index.write_text(json.dumps({"weight_map": {"a": f"a.{whole}", "b": wrong}}))
        with pytest.raises(ValueError, match=problem):
            data.load_weights(folder, targets)
    for wrong in ("{}", '{"weight_map": ["a"]}', "<html>"):
        index.write_text(wrong)
        with pytest.raises(ValueError, match="names 'nothing'|is not JSON: a web page"):
            data.load_weights(folder, targets)


def test_weights_that_do_not_fit_leave_the_model_as_it_is():
    w = torch.zeros(2)
    for tensors, targets, problem in (
        (dict(a=ONES), dict(a=w, b=torch.zeros(3), c=torch.zeros(1)),
         r"'b' is missing \(1 more do not fit\)$"),
        (dict(a=ONES, b=ONES, c=ONES), dict(a=w),
         r"model.safetensors: 'b' is not a weight of this model \(1 more do not fit\)$"),
        (dict(a=SIX), dict(a=torch.zeros(3, 2)),
         r"model.safetensors: 'a' is torch.float32 \(2, 3\) instead of torch.float32 \(3, 2\)$"),
        (dict(a=("I32", [2], bytes(8))), dict(a=w), "'a' is torch.int32"),
        (dict(a=ONES), dict(a=w.long()), "instead of torch.int64"),
        ({"a": ONES, "x.a": ONES}, dict(a=w), "'a' is there for the second time"),
        ({}, dict(a=w), "'a' is missing$"),
    ):
        folder = folder_of(model__safetensors=safetensors_file(tensors))
        with pytest.raises(ValueError, match=problem):
            data.load_weights(folder, targets, rename=lambda name: name.removeprefix("x."))
        assert not any(target.any() for target in targets.values())
    folder = folder_of(model__safetensors=safetensors_file(dict(a=ONES, b=("F32", [2], bytes(8)))))
    with pytest.raises(ValueError, match="'b' differs from 'a'; this model ties them"):
        data.load_weights(folder, dict(a=w, b=w))
    with pytest.raises(OSError, match="there are no weights in .*: no model.safetensors"):
        data.load_weights(folder_of(), {})


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> str:
    return json.dumps(dict(dtype=dtype, shape=shape, data_offsets=offsets))


def test_wrong_safetensors_headers():
    for header, problem in (
        (f'{{"a": {entry(offsets=(-8, 0))}}}', "'a' has bytes [-8, 0] instead of [0, 8]"),
        (f'{{"a": {entry(offsets=(0, 80), shape=[20])}}}', "it has 79 bytes instead of 151"),
        (f'{{"a": {entry(shape=[1])}}}', "instead of [0, 4]"),
        (f'{{"a": {entry()}, "b": {entry(offsets=(4, 12))}}}', "'b' has bytes [4, 12]"),
        (f'{{"a": {entry(shape=[1], offsets=(4, 8))}}}', "'a' has bytes [4, 8] instead of [0, 4]"),
        (f'{{"a": {entry(shape=[1], offsets=(0, 4))}}}', "bytes instead of"),
        (f'{{"a": {entry()}, "a": {entry()}}}', "a name is given twice"),
        (f'{{"a": {entry(dtype="C64")}}}', "'a' cannot be of dtype 'C64'"),
        (f'{{"a": {entry(shape=[-2])}}}', "'a' cannot be of dtype 'F32' and shape (-2,)"),
        (f'{{"a": {entry(shape=[2.0])}}}', "'a' cannot be"),
        (f'{{"a": {entry(shape=[1] * 100)}}}', "'a' cannot be"),
        (f'{{"a": {entry(shape=[2**64, 2**64])}}}', "'a' has bytes"),
        ('{"a": {"dtype": "F32"}}', "it is something else"),
        ('{"a": 5}', "it is something else"),
        ("[]", "it is something else"),
        ("[" * 100_000, "maximum recursion depth"),
        ("{", "Expecting property name"),
        ("{} trailing", "Extra data"),
        ("\xff", "codec can't decode"),
    ):
        content = safetensors_file(dict(a=ONES), header.encode("latin-1"))
        with pytest.raises(ValueError) as caught:
            data.load_weights(folder_of(model__safetensors=content), dict(a=torch.zeros(2)))
        assert problem in str(caught.value) and len(str(caught.value).splitlines()) == 1
        assert "model.safetensors is no whole file of weights: " in str(caught.value)


def test_files_that_hold_no_weights(own_cache):
    class Evil:
        def __reduce__(self):
            return os.mkdir, ("broken_in",)

    good = safetensors_file(dict(a=ONES))
    for name, contents in (
        ("model__safetensors", (b"", b"\0" * 7, good[:20], good[:-1], good + b"\0",
                               struct.pack("<Q", 10**10) + good[8:], saved({"a": torch.ones(2)}))),
        ("pytorch_model__bin", (b"", b"PK\x03\x04", saved({"a": torch.ones(2)})[:400], good,
                               saved({"a": Evil()}), saved({"a": 5}), saved([torch.ones(2)]),
                               saved({5: torch.ones(2)}),
                               compressed(saved({"a": torch.ones(9999)})),
                               saved({"a": torch.ones(2, device="meta")}),
                               saved({"a": torch.ones(2).to_sparse()}), pickle.dumps(Evil(), 2))),
    ):
        for content in contents:
            with pytest.raises(ValueError, match="no whole file of weights: ") as caught:
                data.load_weights(folder_of(**{name: content}), dict(a=torch.zeros(2)))
            assert len(str(caught.value).splitlines()) == 1
        for content, nature in ((b"\n<!DOCTYPE html><html>", "a web page"),
                                (b"version https://git-lfs.github.com/spec/v1", "git lfs pull")):
            with pytest.raises(ValueError, match=f"no whole file of weights: .*{nature}"):
                data.load_weights(folder_of(**{name: content}), dict(a=torch.zeros(2)))
    assert not Path("broken_in").exists()


@contextlib.contextmanager
def little_memory(more=1 << 29):
    """Within it the process gets no more than `more` further bytes (where the system counts)."""
    try:
        import resource

        now = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except (ImportError, OSError):
        yield
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def test_corrupted_safetensors_give_an_error_or_the_right_shapes():
    good = safetensors_file(dict(a=ONES, b=SIX, c=("I64", [1, 2], bytes(16)), d=("F16", [0], b"")))
    folder, draw, outcomes = folder_of(), random.Random(0), collections.Counter()
    digits = [i for i in range(8, good.rindex(b"}")) if good[i : i + 1].isdigit()]
    with open(folder / "model.safetensors", "wb", buffering=0) as file, little_memory():
        for _ in range(2000):
            bad = bytearray(good)
            for _ in range(draw.choice((1, 1, 2, 5))):
                at = draw.choice([draw.randrange(len(bad)), draw.randrange(8), draw.choice(digits)])
                new = draw.choice(
                    [draw.randbytes(1), b"%d" % draw.randrange(10**9), b"", b"-9", b"["])
                bad[at : at + draw.randrange(3)] = new
            bad = bad[: draw.choice([len(bad)] * 9 + [draw.randrange(len(bad))])]
            file.seek(0)
            file.truncate(file.write(bad))
            targets = dict(a=torch.zeros(2), b=torch.zeros(3, 2).T,
                           c=torch.zeros(1, 2).long(), d=torch.zeros(0))
            try:
                data.load_weights(folder, targets)
                outcomes["loaded"] += 1
            except ValueError as error:
                outcomes["refused"] += 1
                assert len(str(error).splitlines()) == 1
    assert outcomes["loaded"] > 20 and outcomes["refused"] > 1500, outcomes


def test_every_dtype_to_and_from_the_safetensors_library():
    library = pytest.importorskip("safetensors.torch")
    tensors = {name: torch.arange(-3, 9).reshape(3, 4).to(getattr(torch, dtype))
               for name, dtype in data.DTYPES.items()}
    assert len(tensors) == 10
    tensors |= {"odd": torch.ones(3, dtype=torch.uint8), "none": torch.zeros(0, 3),
                "nothing": torch.zeros(0, 3), "one": torch.tensor(2.5), "été\n": torch.ones(2)}
    turned = torch.nn.Parameter(torch.randn(2, 3))
    data.save_weights("ours", tensors | {"turned": turned.T, "tied": turned.T})
    theirs = library.load_file("ours/model.safetensors")
    assert set(theirs) == {*tensors, "turned"} and torch.equal(theirs["turned"], turned.T)
    Path("theirs").mkdir()
    library.save_file(tensors, "theirs/model.safetensors", metadata={"format": "pt"})
    for name, tensor in tensors.items():
        assert theirs[name].dtype == tensor.dtype and torch.equal(theirs[name], tensor)
    for folder in ("ours", "theirs"):
        read = {name: torch.empty_like(tensor) for name, tensor in tensors.items()}
        data.load_weights(folder, read, passed_over="turned")
        assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_folders_to_and_from_transformers():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=60, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    theirs = transformers.GPT2LMHeadModel(config)
    state = theirs.state_dict()
    theirs.save_pretrained("theirs", max_shard_size="40KB")
    assert len(list(Path("theirs").glob("model-*.safetensors"))) > 1
    assert data.read_config("theirs")["n_embd"] == 32
    head = torch.zeros(60, 32)
    targets = {name: torch.zeros_like(value) for name, value in state.items()}
    targets |= {"transformer.wte.weight": head, "lm_head.weight": head}
    data.load_weights("theirs", targets)
    assert all(torch.equal(targets[name], state[name]) for name in state)
    assert "lm_head.weight" not in data.weight_names("theirs")
    data.save_weights("ours", targets)
    config.save_pretrained("ours")
    again, problems = transformers.GPT2LMHeadModel.from_pretrained(
        "ours", output_loading_info=True)
    assert not any(problems.values()), problems
    assert all(torch.equal(value, state[name]) for name, value in again.state_dict().items())


def test_configs_that_cannot_be_read():
    for content, problem in (
        (b"{", "is not JSON"), (b"\xff", "is not JSON"), (b"[" * 100_000, "is not JSON"),
        (b"<html>", "is not JSON: a web page"), (b"[1]", "is not a JSON object"),
    ):
        with pytest.raises(ValueError, match=f"config.json.* {problem}"):
            data.read_config(folder_of(config__json=content))
    with pytest.raises(ValueError, match="cannot read nowhere/config.json: No such file"):
        data.read_config("nowhere")


@pytest.fixture
def hub(server, monkeypatch):
    """hub(name, config__json=b"{}") gives the server this file of the model of that name."""
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return lambda name, **files: Server.files.update({
        f"/{name}/resolve/main/" + file.replace("__", "."): body for file, body in files.items()})


def cached(own_cache) -> list[str]:
    return sorted(path.name for path in (own_cache / "cache").rglob("*") if path.is_file())


def test_a_model_from_the_hub(hub, own_cache):
    weights = random.Random(0).randbytes(100_000)
    hub("openai/gpt2", config__json=b'{"n_layer": 1}', tokenizer__json=b"{}",
        model__safetensors=weights)
    Server.files |= {path.replace("openai/", ""): path for path in Server.files}  # the old name
    Server.cuts = 2
    folder = data.pretrained_folder("gpt2")
    assert (folder / "model.safetensors").read_bytes() == weights and not Server.cuts
    assert [start for path, start in Server.seen if path.startswith("/openai")
            and path.endswith("model.safetensors")] == [0, 1 << 14, 2 << 14]
    assert cached(own_cache) == ["absent.txt", "config.json", "model.safetensors", "tokenizer.json"]
    Server.files.clear()
    Server.seen.clear()
    assert data.pretrained_folder("gpt2") == folder and not Server.seen
    assert data.pretrained_folder(str(folder)) == data.pretrained_folder(folder) == folder
    assert data.read_config(folder) == {"n_layer": 1}


def interrupted(seconds):
    raise KeyboardInterrupt


def test_a_model_s_download_goes_on_where_it_was(hub, own_cache):
    first, second = "pytorch_model-1-of-2.bin", "pytorch_model-2-of-2.bin"
    index = json.dumps({"weight_map": {"w1": first, "w2": second, "w3": second}}).encode()
    whole = saved({"w2": torch.ones(9000), "w3": torch.ones(1)})
    hub("a/b_c-1.0", config__json=b"{}", spiece__model=b"\n", vocab__txt=b"[PAD]",
        pytorch_model__bin__index__json=index,
        **{first: saved({"w1": torch.ones(9000)}), second: 500})
    with pytest.raises(OSError, match=f"{second}: it answered 500, 5 times; the same command"):
        data.pretrained_folder("a/b_c-1.0")
    place = "/a/b_c-1.0/resolve/main/"
    Server.files[place + second], Server.cut, Server.cuts = whole, 0, 5
    with pytest.raises(OSError, match="5 times; the same command continues it later"):
        data.pretrained_folder("a/b_c-1.0")
    Server.cut, Server.cuts = 20_000, 1
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "sleep", interrupted)
        data.pretrained_folder("a/b_c-1.0")
    assert first in cached(own_cache) and second not in cached(own_cache)
    Server.seen = []
    folder = data.pretrained_folder("a/b_c-1.0")
    targets = dict(w1=torch.zeros(9000), w2=torch.zeros(9000), w3=torch.zeros(1))
    data.load_weights(folder, targets)
    assert all(target.all() for target in targets.values())
    assert Server.seen[-1] == (place + second, 1 << 14)  # where it was
    assert not {place + file for file in ("config.json", "vocab.txt", first)} & {
        path for path, _ in Server.seen}
    Server.seen = []
    assert data.pretrained_folder("a/b_c-1.0") == folder and Server.seen == []


def test_the_token_is_shown_to_the_hub_alone(hub, server, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", " secret\n")
    elsewhere = server.replace("127.0.0.1", "localhost")
    hub("a/b", config__json="/a/c/resolve/main/config.json", tokenizer__json=b"{}",
        model__safetensors=f"{elsewhere}/cdn/weights?sign=1")
    hub("a/c", config__json=b"{}")
    Server.files["/cdn/weights?sign=1"] = b"x" * 50_000
    Server.cuts = 2
    folder = data.pretrained_folder("a/b")
    assert (folder / "model.safetensors").stat().st_size == 50_000
    assert Server.tokens == {("127.0.0.1", "Bearer secret"), ("localhost", None)}


def test_what_was_trained_here_opens_in_python(script, stories):
    """from_pretrained takes a run's folder and a checkpoint, of any variant."""
    more = [] if script is t5 else ["--pos", "rotary"]
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 2, *SMALL, *more)
    expected = torch.load("run/best.pt", weights_only=True)["model"]
    for path in "run", "run/best.pt":
        model = script.Model.from_pretrained(path)
        assert not model.training
        assert all(value.equal(expected[name]) for name, value in model.state_dict().items())


def test_a_run_from_scratch_sets_the_earlier_one_aside(stories, capsys, script=gpt):
    common = ["--data", stories, "--out_dir", "run", *SMALL, "--max_steps"]
    command(script, *common, 4)
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    capsys.readouterr()
    command(script, *common, 2, "--seed", 1)
    assert "the run that run held is in run/before now" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in Path("run/before").iterdir()} == before
    assert torch.load("run/ckpt.pt", weights_only=True)["step"] == 2
    command(script, "--init_from", "resume", "--out_dir", "run/before", "--max_steps", 6)
    best = weights_of("run/best.pt")
    command(script, "--init_from", "run", *common, 1)  # from its own weights, which stay, too
    assert all(value.equal(best[name]) for name, value in weights_of("run/before/best.pt").items())
    assert "in place of an older one" in capsys.readouterr().err
    command(script, "--init_from", "resume", "--out_dir", "run", "--max_steps", 1)
    assert "nothing is left to do: run is at step 1 already" in capsys.readouterr().err
    # One that was stopped before it was evaluated is moved as well, but in place of no other.
    Path("run/best.pt").unlink()
    command(script, *common, 1)
    assert all(value.equal(best[name]) for name, value in weights_of("run/before/best.pt").items())
    shutil.rmtree("run/before")
    Path("run/best.pt").unlink()
    stopped = Path("run/ckpt.pt").read_bytes()
    command(script, *common, 1)
    assert Path("run/before/ckpt.pt").read_bytes() == stopped


@pytest.mark.parametrize("field, value", [("pos", "rope"), ("norm", "prenorm"), ("act", "GELU")])
def test_a_choice_that_there_is_not(script, field, value):
    if field not in script.Config.__dataclass_fields__:
        pytest.skip(f"{script.NAME} has no {field}")
    sizes = dict(vocab_size=20, **SIZES) | ({} if script is t5 else dict(block_size=8))
    with pytest.raises(ValueError, match=f"{field} '{value}' is none of "):
        script.Config(**sizes, **{field: value})


def test_shapes_that_generation_cannot_take():
    model = gpt.GPT(gpt.GPTConfig(**TINY))
    for idx in torch.zeros(3), torch.zeros(1, 0):
        with pytest.raises(ValueError, match="idx has to be"):
            model.generate(idx.long(), 2)
    with pytest.raises(ValueError, match="set n_labels"):
        bert.BERT(bert.BERTConfig(vocab_size=20, block_size=8, **SIZES)).classify(idx)


def test_slips_of_the_hand(stories, capsys):
    """A flag with hyphens, a command misspelt, a file without --data, a folder that is missing."""
    Path("texts.csv").write_text("text,label")
    Path("out").mkdir()
    for arguments, hint in (
        (["--n-layer", "3"], "no flag --n-layer; did you mean --n_layer?"),
        (["generat"], "did you mean generate?"),
        (["texts.csv"], "did you mean --data texts.csv?"),
        (["train", "texts.csv"], "did you mean --data texts.csv?"),
        (["generate", "--init_from", "out/mien"], "out has nothing of that name"),
        (["generate", "--init_from", "out"], "out holds no run (ckpt.pt) and no published model"),
        (["--out_dir", "texts.csv", "--data", stories, *SMALL], "is a file: name a folder"),
    ):
        assert hint in mistake(gpt, capsys, *arguments), arguments


def test_models_that_cannot_be_had(hub, own_cache):
    page = b"\n<!doctype HTML><html>Please log in</html>"
    index = b'{"weight_map": {"w": "../../../x.safetensors"}}'
    config = dict(config__json=b"{}", tokenizer__json=b"{}")
    for name, files, problem, left in (
        ("a/none", {}, "there is no model a/none with a config.json, here or on the hub", []),
        ("a/private", dict(config__json=401), "answered 401: check the spelling; .* HF_TOKEN", []),
        ("a/gated", config | dict(model__safetensors=403), "answered 403: .* HF_TOKEN", [*config]),
        ("a/broken", dict(config__json=500), "it answered 500, 5 times", []),
        ("a/odd", dict(config__json=418), "answered 418", []),
        ("a/empty", config, "no model.safetensors or pytorch_model.bin of a/empty", [*config]),
        ("a/page", dict(config__json=page), "is a web page instead of the file: it was rem", []),
        ("a/pages", config | dict(pytorch_model__bin=page), "is a web page instead", [*config]),
        ("a/escape", config | dict(model__safetensors__index__json=index),
         "names '../../../x.safetensors'", [*config, "model__safetensors__index__json"]),
    ):
        hub(name, **files)
        Server.files |= {"/x.safetensors": b"x", "/a/x.safetensors": b"x"}
        with pytest.raises((OSError, ValueError), match=problem) as caught:
            data.pretrained_folder(name)
        assert len(str(caught.value).splitlines()) == 1
        assert cached(own_cache) == sorted(file.replace("__", ".") for file in left)
        shutil.rmtree(own_cache / "cache")
    Server.seen = []
    for name in ("a/b/c", "/a", "a/", "../a", "a/..", "-a", "a--b", "a b", "a?b", "a\n", "é",
                 "./a", "~/a", "C:\\a", "https://x"):
        with pytest.raises(ValueError, match="is neither a folder nor a model's name"):
            data.pretrained_folder(name)
    assert Server.seen == []


def test_a_log_that_is_none():
    good = '{"step": 1, "seconds": 2.5, "loss": 3.0}'
    for bad in ("5", "[]", '{"step": 1}', '{"step": 1, "seconds": NaN}', "[" * 100_000,
                '{"step": 2, "seconds": 1, "val_loss": "low"}', '{"step": 1e999, "seconds": 1}'):
        Path("log.jsonl").write_text(f"{good}\n{bad}\n{good}\n")
        log = data.RunLog(".", resumed_at=9)
        assert log.rows == [json.loads(good)]
        log.draw("a run")


def test_the_log_of_a_resumed_run_and_its_chart(tmp_path):
    log = data.RunLog(tmp_path)
    for step in range(0, 60, 10):
        log.write(step=step, loss=5 - step / 20)
    log.write(step=50, val_loss=2.5)
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 60, "lo')  # cut off by a crash
    log = data.RunLog(tmp_path, resumed_at=50)
    log.write(step=50, val_loss=2.75)
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert ([row["step"] for row in rows] == [0, 10, 20, 30, 40, 50, 50, 50]
            and rows[-1]["val_loss"] == 2.75)
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(rows, rows[1:]))
    log.draw("a <title> & more")
    drawing = ElementTree.parse(tmp_path / "loss.svg").getroot()
    shown = " ".join(drawing.itertext())
    assert ("a <title> & more" in shown
            and "training: 2.500" in shown and "validation: 2.750" in shown)
    points = [float(y) for pair in drawing.find("{*}polyline").get("points").split()
              for y in pair.split(",")[1:]]
    assert points == sorted(points) and len(points) == 6  # the loss falls, so y, downwards, grows


# --------------------------------------------------------------------------------------------------
# The layers and the model
# --------------------------------------------------------------------------------------------------


def slow_attention(query, key, value, bias, causal):
    """One number at a time, in float64."""
    B, H, T, D = query.shape
    S = key.size(2)
    out = torch.zeros(B, H, T, value.size(3), dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(T):
                seen = range(S - T + t + 1 if causal else S)
                scores = [float(query[b, h, t].double() @ key[b, h, s].double()) / math.sqrt(D)
                          for s in seen]
                scores = [score + (float(bias[b, h, t, s]) if bias is not None else 0)
                          for s, score in zip(seen, scores)]
                total = sum(math.exp(score) for score in scores)
                for s, score in zip(seen, scores):
                    out[b, h, t] += math.exp(score) / total * value[b, h, s].double()
    return out


@pytest.mark.parametrize("T, S", [(5, 5), (3, 7), (1, 6)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("model_file", [gpt, bert, t5], ids=lambda file: file.NAME)
def test_attention_equals_the_slow_loop(model_file, T, S, causal, with_bias, monkeypatch):
    query, key, value = torch.randn(2, 3, T, 8), torch.randn(2, 3, S, 8), torch.randn(2, 3, S, 5)
    bias = torch.randn(2, 3, T, S) if with_bias else None
    expected = slow_attention(query, key, value, bias, causal)
    arguments = dict(bias=bias, causal=causal)
    assert (model_file.attention(query, key, value, **arguments) - expected).abs().max() < 1e-5
    called = []
    fused = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or fused(*a, **k))
    monkeypatch.setattr(model_file, "LONG", 1)  # now every sequence is long, and goes the fused way
    assert (model_file.attention(query, key, value, **arguments) - expected).abs().max() < 1e-5
    assert called


VARIANTS = [
    dict(),
    dict(pos="sinusoidal"),
    dict(pos="rotary"),
    dict(pos="none"),
    dict(norm="post"),
    dict(norm="none", residual=False, n_ff=0),
    dict(act="relu", bias=False, tie=False),
    dict(n_layer=0, tie=False, pos="none", norm="none"),
    dict(n_head=3, head_dim=6, value_dim=4, n_ff=20),
]


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_each_variant_learns_and_sees_no_future(variant):
    model = gpt.GPT(gpt.GPTConfig(**{**TINY, **variant})).double()
    idx = torch.randint(50, (2, 16))
    logits, loss = model(idx, idx)
    assert logits.shape == (2, 16, 50)
    assert abs(loss - F.cross_entropy(logits.flatten(0, 1), idx.flatten())) < 1e-12
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    difference = (model(changed)[0] - logits).abs().amax(dim=(0, 2))
    assert difference[:9].max() == 0 and difference[9] > 0


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_the_loss_and_its_gradient_are_those_of_torch(dtype, bound, weighted):
    logits = torch.randn(40, 30, dtype=torch.float64) * 3
    targets = torch.randint(30, (40,))
    targets[::5] = -100
    ours, theirs = logits.clone().to(dtype).requires_grad_(), logits.clone().requires_grad_()
    weights = torch.rand(40) * 3 if weighted else torch.ones(40)
    loss = gpt.CrossEntropy.apply(ours, targets, weights * (targets != -100))
    expected = (F.cross_entropy(theirs, targets, reduction="none") * weights).sum()
    (loss * 0.5).backward()
    (expected * 0.5).backward()
    assert abs(loss - expected) < bound * expected
    assert (ours.grad - theirs.grad).abs().max() < bound
    assert not ours.grad[::5].any() and ours.grad.dtype == dtype


def test_ignored_targets_do_not_count():
    model = gpt.GPT(gpt.GPTConfig(**TINY))
    idx, targets = torch.randint(50, (2, 2, 16))
    targets[0, 3:] = -100
    logits, loss = model(idx, targets)
    expected = [-torch.log_softmax(logits[b, t], 0)[targets[b, t]]
                for b in range(2) for t in range(16) if b or t < 3]
    assert abs(loss - sum(expected) / 19) < 1e-5
    total, count, _ = gpt.loss_sum(model, dict(idx=idx, targets=targets))
    assert count == 19 and abs(total - sum(expected)) < 1e-4


def test_rotary_scores_depend_on_the_distance_alone():
    turns = gpt.GPT(gpt.GPTConfig(**TINY, pos="rotary")).turns.double()  # (2, T, hd / 2)
    query, key = torch.randn(2, 8, dtype=torch.float64)
    turned = [[gpt.rotate(x.view(1, 1, 1, 8), turns[:, t : t + 1]).flatten() for t in range(16)]
              for x in (query, key)]
    for t in range(4, 16):
        assert abs(turned[0][t] @ turned[1][t - 3] - turned[0][3] @ turned[1][0]) < 1e-6
    assert abs(turned[0][0] @ turned[1][0] - query @ key) < 1e-6
    assert abs(turned[0][5] @ turned[1][0] - query @ key) > 1e-3


def test_logits_equal_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=60, n_positions=20, n_embd=24, n_layer=3, n_head=4, initializer_range=0.3
    )).double()
    ours = gpt.GPT(gpt.GPTConfig(60, 20, 3, 4, 24)).double()
    names = {
        "token_embedding": "wte",
        "position_embedding": "wpe",
        "norm.": "ln_f.",
        "blocks": "h",
        "attn_norm": "ln_1",
    }
    names |= {"mlp_norm": "ln_2", "attn.qkv": "attn.c_attn",
              "attn.proj": "attn.c_proj", "mlp.up": "mlp.c_fc"}
    names |= {"mlp.down": "mlp.c_proj"}
    weights = theirs.transformer.state_dict()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            for old, new in names.items():
                name = name.replace(old, new) if not (old == "norm." and "_norm" in name) else name
            value = weights[name]
            p.copy_(value.T if name.endswith(("attn.weight", "proj.weight", "fc.weight"))
                    else value)
    idx = torch.randint(60, (3, 20))
    theirs.eval()
    assert (ours(idx)[0] - theirs(idx).logits).abs().max() < 1e-9


# --------------------------------------------------------------------------------------------------
# BERT
# --------------------------------------------------------------------------------------------------

BERT_TINY = dict(vocab_size=60, block_size=20, n_layer=2, n_head=2, n_embd=16)


def randomised(model, std: float):
    """The model in float64 with all its weights random (as they start, blocks of a BERT pass on
    what they get, and the weights of a norm are one)."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.double().eval()


def random_bert(**variant):
    return randomised(bert.BERT(bert.BERTConfig(**{**BERT_TINY, **variant})), std=0.3)


@pytest.mark.parametrize("variant", [
    dict(), dict(pos="rotary"), dict(pos="sinusoidal"), dict(norm="pre"), dict(nsp=False),
    dict(n_ff=20, n_segments=3),
], ids=str)
def test_each_bert_learns_with_all_its_weights(variant):
    model = random_bert(**variant)
    idx, labels = torch.randint(60, (2, 4, 20))
    segments = torch.randint(model.config.n_segments, (4, 20))
    labels[torch.rand(4, 20) > 0.2] = -100
    mlm_logits, nsp_logits = model(idx, segments)
    assert mlm_logits.shape == (4, 20, 60)
    assert nsp_logits.shape == (4, 2) if model.config.nsp else nsp_logits is None
    segments.flatten()[: model.config.n_segments] = torch.arange(model.config.n_segments)
    model.loss(idx, segments, None, labels, torch.tensor([0, 1, 0, 1])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("pos", ["learned", "rotary", "sinusoidal"])
@pytest.mark.parametrize("norm", ["post", "pre"])
def test_padding_changes_nothing(pos, norm):
    model = random_bert(pos=pos, norm=norm)
    lengths = [20, 7, 1, 13]
    idx, mask = torch.randint(60, (4, 20)), torch.arange(20) < torch.tensor(lengths)[:, None]
    segments = torch.randint(2, (4, 20))
    padded = model.encode(idx, segments, mask)
    for row, length in enumerate(lengths):
        alone = model.encode(idx[row : row + 1, :length], segments[row : row + 1, :length])
        assert (padded[row, :length] - alone[0]).abs().max() < 1e-12
    assert (padded[1, :7] - model.encode(idx, segments)[1, :7]).abs().max() > 1e-6


def test_bert_sees_both_sides():
    model = random_bert()
    idx = torch.randint(60, (1, 20))
    changed = idx.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 60
    difference = (model(idx)[0] - model(changed)[0]).abs().amax(dim=(0, 2))
    assert difference.min() > 0


def test_bert_s_first_heads_begin_by_looking_at_their_neighbours():
    model = bert.BERT(bert.BERTConfig(1024, 128, 2, 6, 192)).double()
    scores = torch.zeros(6, 9, dtype=torch.float64)  # by head and distance, -4 to 4
    with torch.no_grad():
        x = model.norm(model.position_embedding.weight)
        query, key, _ = model.blocks[0].attn.qkv(x).view(128, 3, 6, 32).unbind(1)
    for t in range(4, 124):
        for i, distance in enumerate(range(-4, 5)):
            scores[:, i] += (query[t] * key[t + distance]).sum(dim=-1) / 120 / math.sqrt(32)
    assert (scores.argmax(dim=1) - 4).tolist() == [-1, 1, -2, 2, -3, 3]
    assert 5 < scores.max() < 9
    idx = torch.randint(1024, (2, 128))
    states = model.norm(model.token_embedding(idx) + model.position_embedding.weight
                        + model.segment_embedding.weight[0])
    assert (model.encode(idx) - states).abs().max() < 1e-4  # blocks that pass on what they get


def bert_batch(rows=6, T=20, vocab_size=60):
    """A batch with padding, and rows with unequal numbers of hidden tokens."""
    mask = torch.arange(T) < torch.randint(T // 2, T + 1, (rows, 1))
    labels = torch.randint(vocab_size, (rows, T))
    labels[(torch.rand(rows, T) > 0.3) | ~mask] = -100
    labels[:, 1] = 7
    return dict(
        idx=torch.randint(vocab_size, (rows, T)), segments=torch.randint(2, (rows, T)), mask=mask,
        mlm_labels=labels, nsp_labels=torch.arange(rows) % 2)


def test_bert_equals_that_of_transformers():
    """Logits and loss, with padding."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.BertForPreTraining(transformers.BertConfig(
        vocab_size=60, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=50, max_position_embeddings=20, initializer_range=0.3,
        hidden_dropout_prob=0, attention_probs_dropout_prob=0,
    )).double()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)  # biases, too
    ours = bert.BERT(bert.BERTConfig(**BERT_TINY, n_ff=50)).double()
    names = [
        ("token_embedding", "bert.embeddings.word_embeddings"),
        ("position_embedding", "bert.embeddings.position_embeddings"),
        ("segment_embedding", "bert.embeddings.token_type_embeddings"),
        ("transform_norm", "cls.predictions.transform.LayerNorm"),
        ("transform", "cls.predictions.transform.dense"), ("head", "cls.predictions.decoder"),
        ("pooler", "bert.pooler.dense"), ("pair_head", "cls.seq_relationship"),
        ("blocks", "bert.encoder.layer"), ("attn_norm", "attention.output.LayerNorm"),
        ("mlp_norm", "output.LayerNorm"), ("norm", "bert.embeddings.LayerNorm"),
        ("attn.proj", "attention.output.dense"), ("mlp.up", "intermediate.dense"),
        ("mlp.down", "output.dense"),
    ]
    weights = theirs.state_dict()
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "qkv" in name:
                parts = [name.replace("blocks", "bert.encoder.layer").replace(
                    "attn.qkv", f"attention.self.{part}") for part in ("query", "key", "value")]
                p.copy_(torch.cat([weights[part] for part in parts]))
                continue
            for old, new in names:
                name = re.sub(rf"(?<![\w.]){old}\b|(?<=\d\.){old}\b", new, name)
            p.copy_(weights[name])
    batch = bert_batch()
    found = theirs.eval()(
        input_ids=batch["idx"], token_type_ids=batch["segments"],
        attention_mask=batch["mask"].long(), labels=batch["mlm_labels"],
        next_sentence_label=batch["nsp_labels"])
    mlm_logits, nsp_logits = ours(batch["idx"], batch["segments"], batch["mask"])
    real = batch["mask"]
    assert (mlm_logits - found.prediction_logits)[real].abs().max() < 1e-9
    assert (nsp_logits - found.seq_relationship_logits).abs().max() < 1e-9
    assert abs(ours.loss(**batch) - found.loss) < 1e-9


def test_bert_s_sums_are_its_loss():
    """Rows with equally many hidden tokens: the paper's loss; the accuracies by counting."""
    model = random_bert()
    batch = bert_batch()
    batch["mlm_labels"] = torch.where(torch.arange(20) < 3, torch.randint(60, (6, 20)), -100)
    total, weight, metrics = bert.loss_sum(model, batch)
    assert weight == 18 and abs(total / weight - model.loss(**batch)) < 1e-6
    mlm_logits, nsp_logits = model(batch["idx"], batch["segments"], batch["mask"])
    right = sum(int(mlm_logits[b, t].argmax() == batch["mlm_labels"][b, t])
                for b in range(6) for t in range(3))
    assert [int(x) for x in metrics["mlm_accuracy"]] == [right, 18]
    right = sum(int(nsp_logits[b].argmax() == b % 2) for b in range(6))
    assert [int(x) for x in metrics["nsp_accuracy"]] == [right, 6]
    alone = random_bert(nsp=False)
    total, weight, metrics = bert.loss_sum(alone, batch)
    assert abs(total / weight - alone.loss(**batch)) < 1e-9 and "nsp_accuracy" not in metrics


# --------------------------------------------------------------------------------------------------
# BERT's objective
# --------------------------------------------------------------------------------------------------

BERT_SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
PAD, CLS, SEP, MASK = range(4)


def numbered_corpus(lengths, separators=True):
    """A corpus of documents whose every token occurs once, so that it tells where it comes from."""
    first = 260
    parts = []
    for _ in range(2):
        tokens = []
        for length in lengths:
            tokens += [SEP] * separators + list(range(first, first + length))
            first += length
        parts.append(np.array(([] if separators else [SEP]) + tokens + [SEP]))
    tokenizer = bpe.Tokenizer.from_counts({}, 260, BERT_SPECIAL)
    return data.Corpus(tokenizer, *parts, documents=len(lengths) * 2, separator=SEP)


def taken_apart(row, labels):
    """A row's segments with the hidden tokens back in place: lists of tokens."""
    row = [token if label == -100 else label for token, label in zip(row, labels)]
    while row[-1] == PAD:
        row.pop()
    assert row[0] == CLS and row[-1] == SEP and PAD not in row
    text = row[1:-1]
    return (text[: text.index(SEP)], text[text.index(SEP) + 1 :]) if SEP in text else (text, None)


@pytest.mark.parametrize("lengths, separators", [
    ([90, 200, 33, 700, 5, 1, 64] * 9, True), ([9000], False)], ids=["documents", "one stream"])
def test_pairs_are_neighbours_or_from_different_documents(lengths, separators):
    corpus = numbered_corpus(lengths, separators)
    config = bert.BERTConfig(**{**BERT_TINY, "vocab_size": 99_999, "block_size": 64})
    run = bert.TrainConfig(batch_size=24, max_steps=40)
    objective = bert.ObjectiveConfig()
    documents = bert.documents_of(corpus, "train", 64)
    bounds = list(zip(documents.starts.tolist(), documents.ends.tolist()))
    place = {token: i for i, token in enumerate(corpus.train.tolist()) if token != SEP}
    home = {token: n for n, (start, end) in enumerate(bounds)
            for token in corpus.train[start:end].tolist()}
    assert len(home) >= sum(lengths) - 1
    seen, a_lengths, lengths_seen = collections.Counter(), [], []
    for step in range(40):
        batch = bert.train_batch(corpus, config, objective, run, step)
        rows, T = batch["idx"].shape
        assert rows == 24 and batch["nsp_labels"].sum() * 2 == rows
        lengths_seen.append(T)
        mask = batch.get("mask", torch.ones(rows, T, dtype=torch.bool))
        assert "mask" not in batch or not mask.all()
        for b in range(rows):
            row, labels = batch["idx"][b].tolist(), batch["mlm_labels"][b].tolist()
            a, second = taken_apart(row, labels)
            real = len(a) + len(second) + 3
            assert mask[b].tolist() == [t < real for t in range(T)]
            assert batch["segments"][b].tolist() == [
                int(len(a) + 2 <= t < real) for t in range(T)]
            for part in (a, second):
                places = [place[token] for token in part]
                assert places == list(range(places[0], places[0] + len(places))) if part else True
                assert len({home[token] for token in part}) <= 1
            if second and batch["nsp_labels"][b] == 0:
                assert place[second[0]] == place[a[-1]] + 1
            elif second:
                assert home[second[0]] != home[a[0]]
            seen.update(a + second)
            a_lengths += [len(a)] * (T == 64)
    assert 1 <= sum(T < 64 for T in lengths_seen) <= 10
    assert len(seen) > 0.95 * len(home)  # of all tokens
    assert min(a_lengths) < 14 and max(a_lengths) > 46 and np.std(a_lengths) > 8


def test_masking_is_the_paper_s():
    """On a million tokens: 15 % of each row, rounded, at least one; 80/10/10; never specials."""
    draw = np.random.default_rng(0)
    tokens = np.concatenate([
        np.append(SEP, draw.integers(4, 300, draw.integers(3, 900))) for _ in range(600)] + [[SEP]])
    tokenizer = bpe.Tokenizer.train((ROOT / "input.txt").read_text()[:40_000], 300, BERT_SPECIAL)
    corpus = data.Corpus(tokenizer, tokens, tokens, documents=600, separator=SEP)
    config = bert.BERTConfig(**{**BERT_TINY, "vocab_size": 300, "block_size": 128})
    run, fate, read = bert.TrainConfig(batch_size=256, max_steps=45), collections.Counter(), 0
    for step in range(45):
        batch = {name: tensor.numpy() for name, tensor in bert.train_batch(
            corpus, config, bert.ObjectiveConfig(), run, step).items()}
        idx, labels = batch["idx"], batch["mlm_labels"]
        real = (idx != PAD).sum(axis=1)
        read += real.sum()
        asked = labels != -100
        assert [int(n) for n in asked.sum(axis=1)] == [max(round(0.15 * int(n)), 1) for n in real]
        assert (labels[asked] >= 4).all() and (idx[asked] != PAD).all()
        assert not asked[:, 0].any() and (idx[:, 0] == CLS).all()
        assert (idx[~asked] != MASK).all()
        fate.update(np.where(idx[asked] == MASK, "mask", np.where(
            idx[asked] == labels[asked], "same", "other")).tolist())
        assert (idx[asked & (idx != MASK)] >= 4).all()
    assert read > 1_000_000
    share = {name: count / sum(fate.values()) for name, count in fate.items()}
    assert abs(share["mask"] - 0.8) < 0.005
    assert abs(share["other"] - 0.1) < 0.005 and abs(share["same"] - 0.1) < 0.005


@pytest.mark.parametrize("nsp", [True, False])
def test_bert_s_evaluation_asks_about_the_whole_validation_part(nsp):
    corpus = numbered_corpus([90, 200, 33, 700, 5, 1, 64])
    config = bert.BERTConfig(**{**BERT_TINY, "vocab_size": 9999, "block_size": 64, "nsp": nsp})
    objective = bert.ObjectiveConfig()
    batches = list(bert.eval_batches(corpus, config, objective, 5))
    rows, whole, labels = [], set(), []
    for batch in batches:
        for row, hidden in zip(batch["idx"].tolist(), batch["mlm_labels"].tolist()):
            a, second = taken_apart(row, hidden)
            rows.append((row, hidden))
            whole |= {*a, *(second or [])}
        labels += batch["nsp_labels"].tolist() if nsp else []
    assert whole == set(corpus.validation.tolist()) - {SEP}
    assert sum(labels) * 2 == (len(rows) if nsp else 0)
    again = [(row, hidden) for batch in bert.eval_batches(corpus, config, objective, 32)
             for row, hidden in zip(batch["idx"].tolist(), batch["mlm_labels"].tolist())]
    assert again == rows  # whatever the number of rows that are computed at once


# --------------------------------------------------------------------------------------------------
# BERT fills blanks
# --------------------------------------------------------------------------------------------------


def test_blanks_are_filled_one_by_one_the_surest_first():
    model = random_bert()
    idx = torch.randint(4, 60, (20,))
    idx[[3, 4, 11]] = MASK
    expected = idx.clone()
    with torch.no_grad():
        while MASK in expected:
            likely = model(expected[None])[0][0].softmax(-1)
            places = [t for t in range(20) if expected[t] == MASK]
            t = max(places, key=lambda place: float(likely[place].max()))
            expected[t] = likely[t].argmax()
    assert torch.equal(bert.fill(model, idx, MASK), expected)
    at, probability = bert.guess(model, idx, MASK)
    assert at.tolist() == [3, 4, 11] and probability.shape == (3, 60)
    assert probability.sum(dim=1).tolist() == pytest.approx([1, 1, 1])


def test_the_space_before_a_mask_is_hidden_with_it():
    tok = bpe.Tokenizer.train("the cat sat on the mat " * 9, 300, BERT_SPECIAL)
    ids = bert.encode_prompt("the cat [MASK] on [MASK].", tok, 99)
    assert ids == [CLS, *tok.encode("the cat"), MASK, *tok.encode(" on"), MASK,
                   *tok.encode("."), SEP]
    assert bert.encode_prompt("[MASK][SEP]", tok, 99) == [CLS, MASK, *tok.encode("[SEP]"), SEP]
    with pytest.raises(ValueError, match="has no"):
        bert.encode_prompt("the cat", tok, 99)
    with pytest.raises(ValueError, match="at most 9 fit"):
        bert.encode_prompt("cat " * 20 + "[MASK]", tok, 9)


# --------------------------------------------------------------------------------------------------
# T5
# --------------------------------------------------------------------------------------------------

T5_TINY = dict(vocab_size=60, n_layer=2, n_head=2, n_embd=16, n_buckets=8, max_distance=20)


def random_t5(**variant):
    return randomised(t5.T5(t5.T5Config(**{**T5_TINY, **variant})), std=0.4)


@pytest.mark.parametrize("variant", [
    dict(), dict(act="gated-gelu", tie=False), dict(n_decoder_layer=1), dict(n_decoder_layer=3),
    dict(head_dim=5, n_ff=20, scale_head=False),
], ids=str)
def test_each_t5_learns_with_all_its_weights(variant):
    model = random_t5(**variant)
    src, tgt = torch.randint(60, (3, 18)), torch.randint(60, (3, 7))
    tgt[1, 4:] = -100
    logits, loss = model(src, tgt)
    assert logits.shape == (3, 7, 60)
    asked = [(b, t) for b in range(3) for t in range(7) if b != 1 or t < 4]
    expected = -sum(logits[b, t].log_softmax(0)[tgt[b, t]] for b, t in asked) / len(asked)
    assert abs(loss - expected) < 1e-12
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    total, weight, metrics = t5.loss_sum(model, dict(
        src=src, tgt=tgt, in_span=(tgt > 20)))
    assert weight == len(asked) and abs(total / weight - loss) < 1e-9
    spans = [(b, t) for b, t in asked if tgt[b, t] > 20]
    right = sum(int(logits[b, t].argmax() == tgt[b, t]) for b, t in spans)
    assert [int(x) for x in metrics["span_accuracy"]] == [right, len(spans)]


def test_a_padded_source_changes_nothing():
    model = random_t5()
    lengths = [18, 7, 1, 13]
    src, tgt = torch.randint(60, (4, 18)), torch.randint(60, (4, 6))
    mask = torch.arange(18) < torch.tensor(lengths)[:, None]
    padded, _ = model(src, tgt, mask)
    for row, length in enumerate(lengths):
        alone, _ = model(src[row : row + 1, :length], tgt[row : row + 1])
        assert (padded[row] - alone[0]).abs().max() < 1e-12
    assert (padded[1] - model(src, tgt)[0][1]).abs().max() > 1e-6


def test_the_decoder_sees_no_future_and_all_of_the_source():
    model = random_t5()
    src, tgt = torch.randint(60, (1, 18)), torch.randint(60, (1, 7))
    logits, _ = model(src, tgt)
    for j in range(7):
        changed = tgt.clone()
        changed[0, j] = (changed[0, j] + 1) % 60
        difference = (model(src, changed)[0] - logits).abs().amax(dim=2)[0]
        assert torch.equal(difference[: j + 1], torch.zeros(j + 1).double())  # to the last bit
        assert (difference[j + 1 :] > 0).all()
    for j in (0, 17):
        changed = src.clone()
        changed[0, j] = (changed[0, j] + 1) % 60
        assert ((model(changed, tgt)[0] - logits).abs().amax(dim=2) > 0).all()


def exact_bucket(distance: int, both_sides: bool, n_buckets: int, max_distance: int) -> int:
    """The published formula in whole numbers: exact + m log(n / exact) / log(max / exact), rounded
    down, is the last k with n^m >= exact^(m - k) max^k."""
    side = 0
    if both_sides:
        n_buckets //= 2
        side, n = n_buckets * (distance > 0), abs(distance)
    else:
        n = max(-distance, 0)
    exact = n_buckets // 2
    if n < exact:
        return side + n
    m = n_buckets - exact
    k = max(k for k in range(m + 1) if n**m >= exact ** (m - k) * max_distance**k)
    return side + min(exact + k, n_buckets - 1)


@pytest.mark.parametrize("both_sides", [True, False])
@pytest.mark.parametrize("n_buckets, max_distance", [(32, 128), (8, 20), (64, 300)])
def test_distances_fall_into_the_published_buckets(both_sides, n_buckets, max_distance):
    distances = torch.arange(-1000, 1001)
    found = t5.distance_buckets(distances, both_sides, n_buckets, max_distance).tolist()
    assert found == [
        exact_bucket(d, both_sides, n_buckets, max_distance) for d in distances.tolist()]
    with contextlib.suppress(ImportError):
        modeling = importlib.import_module("transformers.models.t5.modeling_t5")
        published = modeling.T5Attention._relative_position_bucket(
            distances, both_sides, n_buckets, max_distance)
        assert found == published.tolist()


def test_t5_s_norm_equals_that_of_torch():
    x = torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True)
    norm, reference = t5.RMSNorm(16, eps=1e-6).double(), torch.nn.RMSNorm(16, eps=1e-6).double()
    torch.nn.init.normal_(norm.weight)
    reference.load_state_dict(norm.state_dict())
    found = []
    for each in (norm, reference):
        x.grad, weights = None, torch.linspace(-1, 1, 240, dtype=torch.float64).view(3, 5, 16)
        y = each(x)
        (y * weights).sum().backward()
        found.append((y, x.grad, each.weight.grad))
    for ours, theirs in zip(*found):
        assert (ours - theirs).abs().max() < 2e-6  # ours, as published, takes the mean in float32


def t5_beside_transformers(variant: dict):
    """(ours, theirs), in float64 and with the same random weights."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=60, d_model=16, d_kv=6, d_ff=50, num_layers=2, num_heads=2, dropout_rate=0,
        relative_attention_num_buckets=8, relative_attention_max_distance=20,
        feed_forward_proj=variant.get("act", "relu"), tie_word_embeddings=variant.get("tie", True),
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=1,
    )).double().eval()
    for p in theirs.parameters():
        torch.nn.init.normal_(p, std=0.3)
    ours = t5.T5(t5.T5Config(**T5_TINY, head_dim=6, n_ff=50, **variant)).double().eval()
    weights = theirs.state_dict()

    def published(name):
        """Our name of a weight -> theirs."""
        layer = 2 if name.startswith("decoder") else 1  # of the feed-forward
        for old, new in [
            ("token_embedding", "shared"), (r"^head", "lm_head"), ("blocks", "block"),
            ("distance_embedding", "block.0.layer.0.SelfAttention.relative_attention_bias"),
            ("coder.norm", "coder.final_layer_norm"),
            (r"attn_norm", "layer.0.layer_norm"), (r"cross_norm", "layer.1.layer_norm"),
            (r"mlp_norm", f"layer.{layer}.layer_norm"), (r"attn", "layer.0.SelfAttention"),
            (r"cross", "layer.1.EncDecAttention"), (r"mlp", f"layer.{layer}.DenseReluDense"),
            ("proj", "o"), ("query", "q"), ("down", "wo"), ("gate", "wi_0"),
            (r"\bup", "wi_1" if "act" in variant else "wi"),
        ]:
            name = re.sub(old, new, name)
        return name

    with torch.no_grad():
        for name, p in ours.named_parameters():
            name, parts = published(name), re.search("qkv|kv", name)
            names = [name.replace(parts[0], part) for part in parts[0]] if parts else [name]
            p.copy_(torch.cat([weights[name] for name in names]))
    return ours, theirs


@pytest.mark.parametrize("variant", [dict(), dict(act="gated-gelu", tie=False)], ids=str)
def test_t5_equals_that_of_transformers(variant):
    """Logits and loss with padding; what is written greedily and by beam search."""
    ours, theirs = t5_beside_transformers(variant)
    src, tgt = torch.randint(2, 60, (4, 30)), torch.randint(2, 60, (4, 12))
    tgt[1, 8:] = -100
    mask = torch.arange(30) < torch.tensor([[30], [7], [22], [13]])
    expected = theirs(input_ids=src, attention_mask=mask.long(), labels=tgt)
    logits, loss = ours(src, tgt, mask)
    assert (logits - expected.logits).abs().max() < 1e-6  # its norm is computed in float32
    assert abs(loss - expected.loss) < 1e-6
    for beams in (1, 3):
        written = theirs.generate(
            input_ids=src, attention_mask=mask.long(), max_new_tokens=20, num_beams=beams,
            do_sample=False)[:, 1:]  # it begins with the token that every target begins with
        found = ours.generate(src, 20, beams=beams, src_mask=mask)
        width = written.size(1)
        assert torch.equal(found[:, :width], written) and not found[:, width:].any()


# --------------------------------------------------------------------------------------------------
# T5's objective
# --------------------------------------------------------------------------------------------------

T5_SPECIAL = ["<pad>", "</s>", *(f"<extra_id_{i}>" for i in range(100))]
T5_CONFIG = dict(vocab_size=99_999, n_layer=1, n_head=1, n_embd=8)


def t5_corpus(lengths, validation=None):
    """Documents whose every token occurs once."""
    first, parts = 400, []
    for part in (lengths, validation or lengths):
        tokens = [1]
        for length in part:
            tokens += [*range(first, first + length), 1]
            first += length
        parts.append(np.array(tokens))
    tokenizer = bpe.Tokenizer.from_counts({}, 358, T5_SPECIAL)
    return data.Corpus(tokenizer, *parts, documents=2 * len(lengths), separator=1)


def put_back(src, tgt):
    """The text again: each sentinel of the source replaced by what follows it in the target. Along
    the way: sentinels come in order, each once on both sides, and </s> ends both."""
    src = [token for token in src if token != 0]
    tgt = [token for token in tgt if token != -100]
    assert src.pop() == tgt.pop() == 1 and 1 not in src + tgt
    sentinels = [token for token in src if 2 <= token < 102]
    assert sentinels == list(range(2, 2 + len(sentinels)))
    assert [token for token in tgt if 2 <= token < 102] == sentinels
    contents, text = {}, []
    for token in tgt:
        if token in sentinels:
            contents[token] = []
        else:
            contents[list(contents)[-1]].append(token)
    assert all(contents.values())
    for token in src:
        text += contents.get(token, [token])
    return text, contents


@pytest.mark.parametrize("corruption", ["spans", "bernoulli"])
@pytest.mark.parametrize("T, density, mean_span", [(128, 0.15, 3), (11, 0.5, 1), (30, 0.3, 7)])
def test_the_spans_put_back_give_the_text(corruption, T, density, mean_span):
    corpus = t5_corpus([90, 200, 33, 700, 5, 1, 64] * 3)
    config = t5.T5Config(**T5_CONFIG)
    objective = t5.ObjectiveConfig(T, density, corruption, mean_span)
    run = t5.TrainConfig(batch_size=20, max_steps=15)
    text = [token for token in corpus.train.tolist() if token != 1]
    place = {token: i for i, token in enumerate(text)}
    hidden, seen = 0, set()
    for step in range(15):
        batch = t5.train_batch(corpus, config, objective, run, step)
        real = (batch["src"] != 0)
        assert torch.equal(batch.get("src_mask", torch.ones_like(real)), real)
        assert ("src_mask" in batch) == (corruption == "bernoulli")
        for src, tgt in zip(batch["src"].tolist(), batch["tgt"].tolist()):
            window, contents = put_back(src, tgt)
            begin = place[window[0]]
            assert window == text[begin : begin + T]
            hidden += sum(map(len, contents.values()))
            seen |= set(window)
            if corruption == "spans":
                assert src[0] == window[0]  # the text begins
                noise = min(max(round(T * density), 1), T - 1)
                assert sum(map(len, contents.values())) == noise
                assert len(contents) == min(max(round(noise / mean_span), 1), T - noise)
    share = hidden / (15 * 20 * T)
    assert abs(share - density) < (0.02 if T > 11 else 0.06)
    assert len(seen) > 0.8 * len(text)


def test_numbers_of_noise_tokens_and_spans_are_the_paper_s():
    for length in range(8, 1025):
        objective = t5.ObjectiveConfig(block_size=min(length, 512))
        noise = round(length * 0.15)
        spans = max(round(noise / 3), 1)
        mask = t5.draw_noise(3, length, objective, np.random.default_rng(length))
        assert mask.shape == (3, length) and (mask.sum(axis=1) == max(noise, 1)).all()
        starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
        assert (starts.sum(axis=1) == spans).all()
        assert not mask[:, 0].any() and mask[:, -1].all()
        assert t5.noise_counts(length, objective) == (max(noise, 1), spans)


def published_noise(length: int, noise: int, spans: int, draw: random.Random) -> tuple:
    """The published procedure, step by step: who begins a segment is shuffled; text and noise
    segments take turns."""
    def segments(items):
        begins = [1] * (spans - 1) + [0] * (items - spans)
        draw.shuffle(begins)
        lengths = [1]
        for begin in begins:
            if begin:
                lengths.append(1)
            else:
                lengths[-1] += 1
        return lengths

    mask = []
    for text, hidden in zip(segments(length - noise), segments(noise)):
        mask += [False] * text + [True] * hidden
    return tuple(mask)


def test_spans_lie_where_the_published_procedure_puts_them():
    """Chi-square on 100,000 draws each, over all masks there are: ours, and the slow procedure's.
    For 12 tokens, 4 of them noise in 2 spans, there are 3 * 7 = 21; 20 degrees of freedom."""
    objective, draw = t5.ObjectiveConfig(12, 0.33, "spans", 2), random.Random(0)
    assert t5.noise_counts(12, objective) == (4, 2)
    ours = collections.Counter(map(tuple, t5.draw_noise(
        100_000, 12, objective, np.random.default_rng(0)).tolist()))
    slow = collections.Counter(published_noise(12, 4, 2, draw) for _ in range(100_000))
    assert ours.keys() == slow.keys() and len(slow) == 21
    even = sum((count - 100_000 / 21) ** 2 / (100_000 / 21) for count in ours.values())
    assert even < 52  # one in ten thousand
    assert sum((ours[m] - slow[m]) ** 2 / (ours[m] + slow[m]) for m in slow) < 52
    # and at the paper's settings, how often each of 128 places is noise: 127 degrees of freedom
    objective = t5.ObjectiveConfig()
    rows = t5.draw_noise(100_000, 128, objective, np.random.default_rng(1)).sum(axis=0)
    slow = np.sum([published_noise(128, 19, 6, draw) for _ in range(5_000)], axis=0)
    share = (rows + slow) / 105_000
    expected = np.stack((share * 100_000, share * 5_000))
    variance = expected * (1 - share) + 1e-9
    assert ((np.stack((rows, slow)) - expected) ** 2 / variance).sum() < 250


def test_independent_tokens_never_need_more_sentinels_than_there_are():
    objective = t5.ObjectiveConfig(block_size=500, corruption="bernoulli", noise_density=0.25)
    mask = t5.draw_noise(500, 500, objective, np.random.default_rng(0))
    spans = (mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]).sum(axis=1)
    assert spans.max() == 100 and (spans < 100).any()


@pytest.mark.parametrize("corruption", ["spans", "bernoulli"])
def test_t5_s_evaluation_asks_about_the_whole_validation_part(corruption):
    corpus = t5_corpus([300], [90, 200, 33, 5, 1, 64])
    config, objective = t5.T5Config(**T5_CONFIG), t5.ObjectiveConfig(64, corruption=corruption)
    found = []
    for rows in (4, 32):
        texts = []
        for batch in t5.eval_batches(corpus, config, objective, rows):
            assert len(batch["src"]) <= rows
            for src, tgt, own in zip(*(batch[k].tolist() for k in ("src", "tgt", "in_span"))):
                text, contents = put_back(src, tgt)
                texts.append((text, contents))
                assert [t for t, mine in zip(tgt, own) if mine] == sum(contents.values(), [])
        found.append(texts)
    assert found[0] == found[1]  # whatever the number of rows that are computed at once
    text = [token for token in corpus.validation.tolist() if token != 1]
    windows = [window for window, _ in found[0]]
    assert windows == [text[i : i + 64] for i in (0, 64, 128, 192, 256, 320, 393 - 64)]


# --------------------------------------------------------------------------------------------------
# T5 writes
# --------------------------------------------------------------------------------------------------


def test_t5_writes_what_is_likeliest_at_each_step():
    """With its caches, and for padded sources, as the whole model says for what is written so far;
    rows that have ended are filled up."""
    model = random_t5(vocab_size=12)
    src = torch.randint(2, 12, (8, 9))
    mask = torch.arange(9) < torch.tensor([9, 5, 1, 9, 3, 9, 7, 2])[:, None]
    written = model.generate(src, 25, src_mask=mask)
    ended = 0
    for row in range(8):
        so_far = torch.zeros(1, 0, dtype=torch.int64)
        for t in range(written.size(1)):
            asked = torch.cat((so_far, torch.tensor([[5]])), dim=1)  # (what is asked is not seen)
            logits, _ = model(src[row : row + 1, : mask[row].sum()], asked)
            token = int(logits[0, -1].argmax())
            assert token == written[row, t]
            so_far = torch.cat((so_far, torch.tensor([[token]])), dim=1)
            if token == 1:
                ended += 1
                assert (written[row, t + 1 :] == 0).all()
                break
    assert 0 < ended


def mean_chances(model, src, targets):
    """The mean log-probability of each target's tokens, for one source."""
    width = max(map(len, targets))
    tgt = torch.tensor([target + [-100] * (width - len(target)) for target in targets])
    with torch.no_grad():
        chance = model(src.expand(len(tgt), -1), tgt)[0].log_softmax(dim=-1)
    chosen = chance.gather(2, tgt.clamp(min=0)[:, :, None])[:, :, 0] * (tgt >= 0)
    return (chosen.sum(dim=1) / (tgt >= 0).sum(dim=1)).tolist()


def test_one_beam_is_greedy_and_enough_beams_find_the_best():
    every = [[*middle, 1] for n in range(4) for middle in itertools.product([0, 2, 3, 4], repeat=n)]
    every += [list(full) for full in itertools.product([0, 2, 3, 4], repeat=4)]
    better = 0
    for _ in range(12):
        model, src = random_t5(vocab_size=5, tie=False), torch.randint(2, 5, (3, 9))
        greedy = model.generate(src, 4)
        assert torch.equal(t5.beam_search(model, src, 4, beams=1), greedy)
        many = model.generate(src, 4, beams=300)  # more than there are beginnings
        for row in range(3):
            chances = mean_chances(model, src[row : row + 1], every)
            best, found = every[int(np.argmax(chances))], many[row].tolist()
            assert found[: len(best)] == best and not any(found[len(best) :])
            better += greedy[row].tolist()[: len(best)] != best
    assert better > 3


def test_sources_do_not_disturb_each_other_in_a_beam_search():
    model = random_t5(vocab_size=12)
    src = torch.randint(2, 12, (5, 9))
    mask = torch.arange(9) < torch.tensor([9, 5, 1, 7, 3])[:, None]
    together = model.generate(src, 15, beams=3, src_mask=mask)
    for row in range(5):
        alone = model.generate(src[row : row + 1, : mask[row].sum()], 15, beams=3)[0].tolist()
        assert together[row].tolist()[: len(alone)] == alone


def test_a_prompt_with_gaps_and_what_is_put_into_them():
    tok = bpe.Tokenizer.train("the cat sat on the mat " * 9, 400, T5_SPECIAL)
    ids = t5.encode_prompt("the cat <extra_id_0> on<extra_id_1>.", tok)
    assert ids == [*tok.encode("the cat"), 2, *tok.encode(" on"), 3, *tok.encode("."), 1]
    assert t5.encode_prompt("<extra_id_0></s>", tok) == [2, *tok.encode("</s>"), 1]
    assert t5.encode_prompt("the cat", tok) == [*tok.encode("the cat"), 1]
    for prompt in ("a <extra_id_1>", "<extra_id_0> <extra_id_0>", "a <extra_id_100>"):
        with pytest.raises(ValueError, match="gaps have to be numbered from 0 on"):
            t5.encode_prompt(prompt, tok)
    sentinels = t5.sentinel_ids(tok)
    assert t5.gap_contents([209, 2, 207, 208, 3, 205, 2, 206, 4, 1, 3, 207], sentinels, 1) == {
        2: [207, 208], 3: [205], 4: []}


# --------------------------------------------------------------------------------------------------
# Generation
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [
    dict(), dict(pos="rotary"), dict(pos="none", norm="post"), dict(value_dim=6)], ids=str)
def test_greedy_is_the_same_with_and_without_the_cache(variant):
    model = gpt.GPT(gpt.GPTConfig(**TINY, **variant)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # so that the likeliest token is not always the same
    for T in (1, 5, 16, 23):
        idx = torch.randint(50, (3, T))
        fast = model.generate(idx, 40, temperature=0)
        assert torch.equal(fast, model.generate(idx, 40, temperature=0, use_cache=False))
        assert fast.shape == (3, T + 40) and torch.equal(fast[:, :T], idx)
        if T <= 16:  # while nothing slides, it is the argmax of the whole sequence
            for t in range(T, 17):
                assert torch.equal(fast[:, t], model(fast[:, :t])[0][:, -1].argmax(-1))


def test_a_row_that_is_done_is_filled_up():
    model = gpt.GPT(gpt.GPTConfig(**TINY)).eval()
    columns = []
    out = model.generate(torch.randint(50, (8, 2)), 400, temperature=2.0, stop=7,
                         on_token=lambda c: columns.append(c.clone()))
    assert out.size(1) < 402 and torch.equal(torch.stack(columns, 1), out[:, 2:])
    for row in out[:, 2:].tolist():
        assert set(row[row.index(7) :]) == {7}


def test_sampling_frequencies():
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])  # softmax: 0.61, 0.22, ...
    many = logits.expand(40_000, -1)

    def frequencies(**options):
        return torch.bincount(gpt.sample(many, **options), minlength=5) / 40_000

    def close(found, expected):
        return (found - expected).abs().max() < 0.012  # five standard deviations at most

    assert close(frequencies(), F.softmax(logits, -1))
    assert close(frequencies(temperature=0.5), F.softmax(logits * 2, -1))
    assert close(frequencies(top_k=2), F.softmax(torch.tensor([2.0, 1.0, *[-math.inf] * 3]), -1))
    assert close(frequencies(top_p=0.7), F.softmax(torch.tensor([2.0, 1.0, *[-math.inf] * 3]), -1))
    assert close(frequencies(top_p=1e-9), torch.tensor([1.0, 0, 0, 0, 0]))
    assert frequencies(temperature=0)[0] == 1


# --------------------------------------------------------------------------------------------------
# Published weights
# --------------------------------------------------------------------------------------------------


def published_model(kind: str, **settings):
    """A model of transformers with random weights, in float64."""
    transformers = pytest.importorskip("transformers")
    none = dict(hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    model = {
        "gpt": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config(
            vocab_size=60, n_positions=20, n_layer=2, bos_token_id=0, eos_token_id=0, **settings)),
        "bert": lambda: transformers.BertForPreTraining(transformers.BertConfig(
            vocab_size=60, max_position_embeddings=20, num_hidden_layers=2, **none, **settings)),
        "mlm": lambda: transformers.BertForMaskedLM(transformers.BertConfig(
            vocab_size=60, max_position_embeddings=20, num_hidden_layers=2, **none, **settings)),
        "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(
            vocab_size=60, dropout_rate=0, decoder_start_token_id=0, **settings)),
    }[kind]().double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model


PUBLISHED = [
    ("gpt", dict(n_embd=24, n_head=3)),
    ("gpt", dict(n_embd=16, n_head=1, n_inner=40, activation_function="relu")),
    ("gpt", dict(n_embd=16, n_head=4, tie_word_embeddings=False)),
    ("bert", dict(hidden_size=24, num_attention_heads=3, intermediate_size=40)),
    ("bert", dict(hidden_size=16, num_attention_heads=1, intermediate_size=64, type_vocab_size=3)),
    ("mlm", dict(hidden_size=16, num_attention_heads=2, intermediate_size=30)),
    ("t5", dict(d_model=24, d_kv=5, d_ff=40, num_heads=3, num_layers=2, num_decoder_layers=3)),
    ("t5", dict(d_model=16, d_kv=8, d_ff=40, num_heads=2, num_layers=3, num_decoder_layers=1,
                feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    ("t5", dict(d_model=16, d_kv=4, d_ff=30, num_heads=4, num_layers=2,
                relative_attention_num_buckets=8, relative_attention_max_distance=20)),
]


def outputs(kind: str, ours, theirs) -> list[tuple]:
    """Pairs of what the two say about the same input."""
    idx, tgt = torch.randint(2, 60, (3, 18)), torch.randint(2, 60, (3, 7))
    mask = torch.arange(18) < torch.tensor([[18], [5], [11]])
    with torch.no_grad():
        if kind == "gpt":
            return [(ours(idx)[0], theirs(idx).logits)]
        if kind == "t5":
            found = theirs(input_ids=idx, attention_mask=mask.long(), labels=tgt)
            return [(ours(idx, tgt, mask)[0], found.logits)]
        segments = torch.randint(2, (3, 18))
        found = theirs(input_ids=idx, attention_mask=mask.long(), token_type_ids=segments,
                       output_hidden_states=True)
        mlm_logits, nsp_logits = ours(idx, segments, mask)
        hidden = ours.encode(idx, segments, mask)
        mlm = found.prediction_logits if kind == "bert" else found.logits
        pairs = [(mlm_logits[mask], mlm[mask]), (hidden[mask], found.hidden_states[-1][mask])]
        return pairs + ([(nsp_logits, found.seq_relationship_logits)] if kind == "bert" else [])


@pytest.mark.parametrize("kind, settings", PUBLISHED, ids=str)
def test_published_weights_give_the_published_numbers_and_go_back(kind, settings, tmp_path):
    """Opened from a folder of transformers; exported, and opened by transformers again."""
    theirs = published_model(kind, **settings)
    theirs.save_pretrained(tmp_path / "theirs")
    script = {"gpt": gpt, "bert": bert, "mlm": bert, "t5": t5}[kind]
    ours = script.Model.from_pretrained(tmp_path / "theirs")
    assert not ours.training and next(ours.parameters()).dtype == torch.float32
    exact = theirs.float().double()  # as the float32 that we read
    ours = ours.double()
    for left, right in outputs(kind, ours, exact):
        assert (left - right).abs().max() < 1e-9
    ours.float().save_pretrained(tmp_path / "ours")
    again = type(theirs).from_pretrained(tmp_path / "ours").double().eval()
    for left, right in outputs(kind, ours.double(), again):
        assert (left - right).abs().max() < 1e-9
    equal = settings.get("num_decoder_layers") in (None, settings.get("num_layers"))
    if kind in ("gpt", "t5") and equal:  # (theirs cannot write where the depths differ)
        idx = torch.randint(2, 60, (2, 6))
        written = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False,
                                  max_new_tokens=10, eos_token_id=None, pad_token_id=0)
        if kind == "gpt":
            assert torch.equal(ours.generate(idx, 10, temperature=0), written)
        else:
            ours.config.eos_id = -1
            assert torch.equal(ours.generate(idx, 10), written[:, 1:])


def in_old_layout(kind: str, weights: dict) -> dict:
    """As the files on the hub have them, written years ago: other names, copies, no weights."""
    if kind == "gpt":
        weights = {name.removeprefix("transformer."): weight
                   for name, weight in weights.items() if name != "lm_head.weight"}
        return weights | {f"h.{i}.attn.bias": torch.ones(1, 1, 20, 20).tril() for i in range(2)}
    if kind == "bert":
        weights = {
            name.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
                "LayerNorm.bias", "LayerNorm.beta"): weight
            for name, weight in weights.items() if "predictions.decoder" not in name}
        return weights | {"bert.embeddings.position_ids": torch.arange(20)[None]}
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return weights | {stray: torch.randn(32, 2)} | {
        f"{side}.embed_tokens.weight": weights["shared.weight"].clone()
        for side in ("encoder", "decoder")}


@pytest.mark.parametrize("kind, settings, said", [
    ("gpt", dict(n_embd=16, n_head=2), {}),
    ("bert", dict(hidden_size=16, num_attention_heads=2, intermediate_size=64), {}),
    ("t5", dict(d_model=16, d_kv=8, d_ff=40, num_heads=2, num_layers=2), {}),
    ("t5", dict(d_model=16, d_kv=8, d_ff=40, num_heads=2, num_layers=2, tie_word_embeddings=False),
     {"tie_word_embeddings": False}),
], ids=str)
@pytest.mark.parametrize("pickled", [False, True])
def test_files_in_the_hub_s_older_layouts(kind, settings, said, pickled, tmp_path):
    theirs = published_model(kind, **settings).float()
    config = theirs.config.to_dict() | {"tie_word_embeddings": True} | said
    config.pop("scale_decoder_outputs", None)  # of the newest transformers alone
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = {name: weight.clone() for name, weight in theirs.state_dict().items()}
    weights = in_old_layout(kind, weights)
    if said:  # a head of its own, and not a copy of the embeddings
        weights["lm_head.weight"] = torch.randn(60, 16)
    if pickled:
        torch.save(weights, tmp_path / "pytorch_model.bin")
    else:
        data.save_weights(tmp_path, weights)
    script = {"gpt": gpt, "bert": bert, "t5": t5}[kind]
    ours = script.Model.from_pretrained(tmp_path).double()
    theirs = theirs.double()
    if said:
        theirs.lm_head.weight = torch.nn.Parameter(weights["lm_head.weight"].double())
    for left, right in outputs(kind, ours, theirs):
        assert (left - right).abs().max() < 1e-9


@pytest.mark.parametrize("script, config, expected", [
    (gpt, gpt.GPTConfig(40, 8, 2, 2, 8), [0.793536, 0.271159, -0.372945, -0.849646, -0.944959]),
    (bert, bert.BERTConfig(40, 8, 2, 2, 8), [-0.042106, 0.252337, 0.427674, 0.412251, 0.219713]),
    (t5, t5.T5Config(40, 2, 2, 8, n_buckets=8, max_distance=20),
     [-0.02193, -0.054246, -0.062231, -0.042253, -0.003326]),
], ids=["gpt", "bert", "t5"])
def test_logits_that_were_written_down_from_transformers(script, config, expected):
    """Weights by a formula: sines, in the order of our names; exported, opened by transformers 5.23
    in float64, and asked for the first five logits at the end of the second text."""
    model, n = script.Model(config), 0
    with torch.no_grad():
        for _, p in sorted(model.named_parameters()):
            p.copy_(0.5 * torch.sin(0.7 * torch.arange(n, n + p.numel())).view(p.shape))
            n += p.numel()
        idx = torch.arange(12).view(2, 6) * 5 % 30 + 2
        model = model.double().eval()
        logits = model(idx, idx)[0] if script is t5 else model(idx)[0]
    assert logits[1, -1, :5].tolist() == pytest.approx(expected, abs=1e-6)


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------


def test_muon_equals_that_of_torch_and_adamw_too():
    config = gpt.GPTConfig(**TINY)
    run = gpt.TrainConfig(weight_decay=0.1, lr=0.01, matrix_lr=0.02)
    ours, theirs = gpt.GPT(config), gpt.GPT(config)
    theirs.load_state_dict(ours.state_dict())
    optimizer = gpt.Muon(ours, run, torch.bfloat16)
    muon, decayed, plain = [], [], []
    for name, p in theirs.named_parameters():
        (muon if "blocks." in name and p.ndim == 2 else decayed if p.ndim == 2 else plain).append(
            (name, p))
    # torch's Muon takes whole matrices: give it query, key and value apart
    apart = {name: [torch.nn.Parameter(x.detach().clone())
                    for x in p.chunk(3 if "qkv" in name else 1)] for name, p in muon}
    reference = [
        torch.optim.Muon(sum(apart.values(), []), lr=0.02, weight_decay=0.1, momentum=0.95),
        torch.optim.AdamW([p for _, p in decayed], lr=0.01, weight_decay=0.1, betas=(0.9, 0.95)),
        torch.optim.AdamW([p for _, p in plain], lr=0.01, weight_decay=0, betas=(0.9, 0.95)),
    ]
    for _ in range(4):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            for x, gradient in zip(apart.get(name, []),
                                   p.grad.chunk(len(apart.get(name, [])) or 1)):
                x.grad = gradient.clone()
        optimizer.step()
        for each in reference:
            each.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        expected = torch.cat(list(apart[name])) if name in apart else q
        assert (p - expected).abs().max() < (2e-3 if name in apart else 1e-6), name  # both bfloat16


def test_wide_heads_train_with_muon_too():
    model = gpt.GPT(gpt.GPTConfig(**TINY, head_dim=32))  # query, key and value are taller than wide
    optimizer = gpt.Muon(model, gpt.TrainConfig(), torch.float32)
    before = [p.clone() for p in model.parameters()]
    model(*torch.randint(50, (2, 2, 16)))[1].backward()
    optimizer.step()
    assert all(not torch.equal(p, old) for p, old in zip(model.parameters(), before))


def test_orthogonalize_brings_singular_values_near_one():
    for shape in ((3, 8, 20), (2, 20, 8), (1, 16, 16)):
        values = torch.linalg.svdvals(gpt.orthogonalize(torch.randn(shape)))
        assert 0.6 < values.min() and values.max() < 1.3


def test_schedules():
    run = gpt.TrainConfig(max_steps=100, warmup_steps=10)
    line = [gpt.schedule(step, run) for step in range(100)]
    assert line[:11] == pytest.approx([(i + 1) / 11 for i in range(10)] + [1])
    assert line[10:] == pytest.approx([1 - i / 90 for i in range(90)])
    run.schedule = "cosine"
    assert [gpt.schedule(step, run) for step in (10, 55, 99)] == pytest.approx([1, .5, 0], abs=1e-3)


SMALL = ("--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --vocab_size 400 --batch_size 4 "
         "--warmup_steps 2 --dropout 0.1")
SMALL = f"{SMALL} --device cpu --eval_interval 4 --log_interval 2".split()


@pytest.fixture
def stories(own_cache):
    """A file of forty stories."""
    text = (ROOT / "input.txt").read_text(encoding="utf-8")
    path = own_cache / "stories.txt"
    path.write_text(END.join(text.split(END)[:40]), encoding="utf-8")
    return str(path)


@pytest.fixture(params=[gpt, bert, t5], ids=lambda file: file.NAME)
def script(request):
    """The test runs once with each model file."""
    return request.param


def command(script, *arguments, status=0):
    assert script.main([str(argument) for argument in arguments]) == status


def weights_of(path):
    checkpoint = torch.load(path, weights_only=True)
    found = {f"model.{name}": value for name, value in checkpoint["model"].items()}
    for i, state in checkpoint.get("optimizer", {"state": {}})["state"].items():
        found |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
    return found


def assert_same_run(left, right):
    for name in ("ckpt.pt", "best.pt"):
        a, b = weights_of(Path(left) / name), weights_of(Path(right) / name)
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a), name
    logs = []
    for folder in (left, right):
        rows = [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]
        logs.append([{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_second")}
                     for row in rows])
    assert logs[0] == logs[1]


def test_a_run_its_files_and_its_commands(script, stories, capsys):
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 10,
            "--snapshot_interval", 5, *SMALL)
    printed = capsys.readouterr()
    assert (printed.out == "" and "step 10/10" in printed.err
            and f"python {script.NAME}.py generate --out_dir run" in printed.err)
    files = {path.name for path in Path("run").iterdir()}
    assert files == {
        *(
            "ckpt.pt",
            "best.pt",
            "tokenizer.json",
            "run.json",
            "log.jsonl",
            "loss.svg",
            "ckpt_000005.pt",
            "ckpt_000010.pt",
        )
    }
    rows = [json.loads(line) for line in Path("run/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 4, 6, 8, 8, 10, 10]
    assert {"step", "seconds", "loss", "lr", "tokens_per_second"} == rows[0].keys()
    metrics = {"gpt": {"bits_per_byte"}, "bert": {"mlm_loss", "mlm_accuracy", "nsp_accuracy"},
               "t5": {"span_accuracy"}}
    assert {"step", "seconds", "val_loss", *metrics[script.NAME]} == rows[-1].keys()
    assert rows[-1][script.TOKEN_LOSS] < math.log(400)

    command(script, "eval", "--out_dir", "run")
    first = json.loads(capsys.readouterr().out.splitlines()[-1])
    command(script, "eval", "--out_dir", "run")
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == first
    assert first["val_loss"] == pytest.approx(min(row.get("val_loss", 9) for row in rows), rel=1e-3)
    assert first["perplexity"] == pytest.approx(math.exp(first[script.TOKEN_LOSS]))

    command(script, "--config", "run/run.json", "--out_dir", "again", "--snapshot_interval", 0)
    assert_same_run("run", "again")
    command(script, "--init_from", "run/best.pt", "--data", stories, "--out_dir", "more",
            *SMALL, "--max_steps", 2)
    assert torch.load("more/ckpt.pt", weights_only=True)["step"] == 2


def test_gpt_generates_on_standard_output(stories, capsys):
    command(gpt, "--data", stories, "--out_dir", "run", "--max_steps", 2, *SMALL)
    capsys.readouterr()
    command(gpt, "generate", "--out_dir", "run", "--prompt", "The — sea", "--max_new_tokens", 9)
    one = capsys.readouterr()
    assert one.out.startswith("The — sea") and "best.pt" in one.err and "best.pt" not in one.out
    command(gpt, "generate", "--init_from", "run/ckpt.pt", "--num_samples", 3,
            "--max_new_tokens", 9, "--prompt", "So")
    assert len(re.findall("^So", capsys.readouterr().out, re.MULTILINE)) >= 3


def test_bert_fills_on_standard_output(stories, capsys):
    command(bert, "--data", stories, "--out_dir", "run", "--max_steps", 2, *SMALL)
    capsys.readouterr()
    command(bert, "generate", "--out_dir", "run", "--top_k", 4,
            "--prompt", "The [MASK] — [MASK] sea.")
    printed = capsys.readouterr()
    table, _, text = printed.out.removesuffix("\n").partition("\n\n")
    heading, *rows = table.splitlines()
    assert heading.split() == ["[MASK]", "1", "[MASK]", "2"] and len(rows) == 4
    shares = [[float(share) for share in re.findall(r"([\d.]+) %", row)] for row in rows]
    assert all(len(pair) == 2 for pair in shares) and np.array(shares).sum(axis=0).max() <= 100.4
    for column in zip(*shares):
        assert list(column) == sorted(column, reverse=True)
    assert text.startswith("The") and text.endswith(" sea.") and "[MASK]" not in text
    assert "best.pt" in printed.err


def test_t5_fills_on_standard_output(stories, capsys):
    command(t5, "--data", stories, "--out_dir", "run", "--max_steps", 2, *SMALL)
    capsys.readouterr()
    prompt = ["--prompt", "The <extra_id_0> — sea <extra_id_1>."]
    for flags, texts in (([], 1), (["--beams", 3], 1),
                         (["--temperature", 0.9, "--num_samples", 3, "--top_k", 9], 3)):
        command(t5, "generate", "--out_dir", "run", "--max_new_tokens", 9, *prompt, *flags)
        printed = capsys.readouterr()
        assert len(re.findall(r"^The", printed.out, re.MULTILINE)) >= texts, flags
        assert len(re.findall(r" — sea", printed.out)) >= texts and "best.pt" in printed.err


def test_eval_counts_every_token_once_and_no_special_bytes(stories):
    corpus = data.prepare(stories, 300, [END], END)
    config = gpt.GPTConfig(**{**TINY, "vocab_size": corpus.tokenizer.vocab_size})
    model = gpt.GPT(config)
    row = gpt.evaluate(model, gpt.eval_batches(corpus, config, None, 3),
                       torch.autocast("cpu", enabled=False))
    tokens = torch.from_numpy(corpus.validation.astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, 16):  # one window at a time
            window = tokens[start : start + 17]
            total += float(
                F.cross_entropy(model(window[None, :-1])[0][0], window[1:], reduction="sum"))
    text = corpus.tokenizer.decode(tokens).replace(END, "")
    assert row["val_loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-5)
    assert row["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize("script", [bert, t5], ids=lambda file: file.NAME)
def test_a_run_goes_on_from_a_checkpoint_as_if_nothing_had_happened(script, stories):
    common = ["--data", stories, "--max_steps", "18", *SMALL, "--eval_interval", "9"]
    command(script, *common, "--out_dir", "whole", "--snapshot_interval", 9)
    shutil.copytree("whole", "again")
    Path("again/ckpt_000009.pt").rename("again/ckpt.pt")
    command(script, "--init_from", "resume", "--out_dir", "again")
    assert_same_run("whole", "again")


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(stories, script=gpt):
    """Killed at once (SIGKILL), and asked to stop (Ctrl-C): both end bit for bit like the
    uninterrupted run."""
    common = ["--data", stories, "--max_steps", "36", "--dtype", "float32", *SMALL,
              "--eval_interval", "9"]
    command(script, *common, "--out_dir", "whole")
    for how, status, after in (signal.SIGKILL, -9, 9), (signal.SIGINT, 130, 15):
        folder = how.name
        started = subprocess.Popen([sys.executable, script.__file__, *common, "--out_dir", folder],
                                   stderr=subprocess.PIPE, text=True)
        for line in started.stderr:
            if re.match(rf"step {after + 1}/", line):
                started.send_signal(how)
                break
        rest = started.stderr.read()
        assert started.wait() == status
        if how == signal.SIGINT:
            assert f"python {script.NAME}.py --init_from resume --out_dir {folder}" in rest
        assert torch.load(f"{folder}/ckpt.pt", weights_only=True)["step"] < 36
        command(script, "--init_from", "resume", "--out_dir", folder)
        assert_same_run("whole", folder)


KILLS = int(os.environ.get("KILLS", 0))


class SlowServer(Server):
    def do_GET(self):
        self.wfile, out = io.BytesIO(), self.wfile
        super().do_GET()
        answer = self.wfile.getvalue()
        with contextlib.suppress(OSError):  # the one who asked is gone
            for start in range(0, len(answer), 1 << 14):
                out.write(answer[start : start + (1 << 14)])
                threading.Event().wait(0.05)
        self.wfile = out


@pytest.mark.skipif(not KILLS, reason="takes minutes: KILLS=50 pytest -s -k killed_anywhere")
def test_killed_anywhere_it_goes_on_to_the_same_end(stories, own_cache, monkeypatch):
    """SIGKILL at a random moment: while downloading, tokenizing, training, saving. The same
    command, or --init_from resume once there is a checkpoint, ends as if nothing had happened."""
    text = (ROOT / "input.txt").read_bytes()
    Server.files = {"/stories.txt": text[: text.index(END.encode(), 150_000) + len(END) + 1]}
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), SlowServer)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    common = [*SMALL[:-8], "--data", f"http://127.0.0.1:{serving.server_port}/stories.txt",
              "--device", "cpu", "--max_steps", "100", "--eval_interval", "20", "--out_dir"]
    draw, phases = random.Random(KILLS), collections.Counter()

    def start(script, folder, *flags):
        return subprocess.Popen([sys.executable, script.__file__, *(flags or common), folder],
                                stderr=open(f"{folder}.err", "a"))

    for script in (gpt, bert, t5):
        monkeypatch.setenv("XDG_CACHE_HOME", f"cache-{script.NAME}")
        began = time.monotonic()
        assert start(script, f"whole-{script.NAME}").wait() == 0
        whole = time.monotonic() - began
        for i in range([gpt, bert, t5].index(script), KILLS, 3):
            folder = f"{script.NAME}-{i}"
            monkeypatch.setenv("XDG_CACHE_HOME", f"cache-{folder}")
            status = 0
            while status == 0:  # (one that has ended before is not counted)
                for root in (folder, f"cache-{folder}"):
                    shutil.rmtree(root, ignore_errors=True)
                run = start(script, folder)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(draw.uniform(0.1, whole))
                run.kill()
                status = run.wait()
            assert status == -signal.SIGKILL
            left = {path.name.partition(".")[2] for root in (folder, f"cache-{folder}")
                    for path in Path(root).rglob("*") if path.is_file()}
            saved = Path(folder, "ckpt.pt").exists()
            step = saved and torch.load(f"{folder}/ckpt.pt", weights_only=True)["step"]
            phase = (f"step {step // 50 * 50}+" if saved else
                     "in a download" if "txt.part" in left else
                     "in the cache" if Path(f"cache-{folder}").exists() else "at the start")
            phases[phase] += 1
            phases["in a save"] += any(name.endswith("tmp") for name in left)
            flags = ["--init_from", "resume", "--out_dir"] if saved else []
            assert start(script, folder, *flags).wait() == 0, Path(f"{folder}.err").read_text()
            assert_same_run(f"whole-{script.NAME}", folder)
            assert not list(Path(folder).glob("*.tmp")) + list(Path(folder).glob("*.lock"))
            for root in (folder, f"cache-{folder}"):
                shutil.rmtree(root)
    serving.shutdown()
    print(f"\n{KILLS} kills:", ", ".join(f"{n} {phase}" for phase, n in sorted(phases.items())))


@contextlib.contextmanager
def full_beyond(size: int):
    """Files cannot grow beyond `size` bytes: what a full disk looks like to one who writes."""
    resource = pytest.importorskip("resource")  # (not on Windows)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


def test_a_disk_that_is_full_before_training_begins(stories, server, own_cache, capsys):
    Server.files = {"/a.bin": b"x" * 100_000}
    with full_beyond(40_000), pytest.raises(OSError, match="cannot write new/a.bin.part: File too"):
        data.download(f"{server}/a.bin", "new/a.bin")
    assert os.listdir("new") == ["a.bin.part"]  # to go on with
    assert data.download(f"{server}/a.bin", "new/a.bin").stat().st_size == 100_000
    assert Server.seen[-1][1] > 0 and os.listdir("new") == ["a.bin"]
    train = ["--data", stories, *SMALL, "--max_steps", 1]
    cache = data.cache_folder()
    for size, unwritten in (0, "tokenizers"), (100, "tokenizers"), (30_000, "tokens"):
        with full_beyond(size):
            assert f"cannot write {cache / unwritten}" in mistake(gpt, capsys, *train)
        assert os.listdir(cache / unwritten) == []
    command(gpt, *train)


RANK = """
import importlib, json, os, sys
sys.path.insert(0, sys.argv[1])
for name, *arguments in json.loads(sys.argv[2]):
    script = importlib.import_module(name)
    assert script.main(arguments) == 0

def train_step(self, step=script.Trainer.train_step):
    if self.step == 3 and os.environ["RANK"] == "1":
        os._exit(7)
    return step(self)

script.Trainer.train_step = train_step
sys.exit(script.main([*arguments, "--out_dir", "dying"]))
"""


def run_ranks(count: int, commands: list[list[str]]) -> list[tuple[int, str]]:
    """Run the commands as `torchrun` would, then the last one again, where rank 1 dies at step 3.
    Returns each rank's exit status and what it printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
                   "WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    ranks = [subprocess.Popen(
        [sys.executable, "-c", RANK, str(ROOT), json.dumps(commands)], text=True,
        stderr=subprocess.PIPE, env={**environment, "RANK": str(i), "LOCAL_RANK": str(i)},
    ) for i in range(count)]
    printed = [rank.communicate()[1] for rank in ranks]
    return [(rank.returncode, text) for rank, text in zip(ranks, printed)]


def test_two_ranks_train_as_one_process_does(stories):
    """The same flags, the same losses, though masked tokens and padding are spread unevenly over
    ranks and over the parts of a step; and when a rank dies, the run can go on where it was."""
    common = [*SMALL, "--data", stories, "--dtype", "float32", "--dropout", "0", "--batch_size",
              "4", "--grad_accum", "2", "--max_steps", "6", "--log_interval", "1",
              "--eval_interval", "6", "--out_dir"]
    pairs = [*SMALL[-6:], "--init_from", "gpt", "--data", str(examples_for(gpt)), "--dropout", "0",
             "--dtype", "float32", "--batch_size", "5", "--max_steps", "6", "--log_interval", "1",
             "--out_dir"]  # five rows: an odd number
    jobs = [("gpt", [*common, "gpt"]), ("gpt", ["finetune", *pairs, "pairs"]),
            ("bert", [*common, "bert"]),
            ("t5", ["--corruption", "bernoulli", *common, "t5"])]
    (status, printed), other = run_ranks(2, [[name, *arguments] for name, arguments in jobs])
    assert other == (7, "") and status == 2, printed  # the first rank speaks for all
    assert "rank 0 cannot reach another rank" in printed.splitlines()[-1]
    for name, arguments in jobs:
        whole = [] if "finetune" in arguments else ["--batch_size", 8, "--grad_accum", 1]
        command(importlib.import_module(name), *arguments[:-1], "alone", *whole)
        logs = [[json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]
                for folder in ("alone", arguments[-1])]
        assert len(logs[0]) == len(logs[1]) >= 7
        for one, several in zip(*logs):
            assert one.keys() == several.keys() and one["step"] == several["step"]
            loss = "loss" if "loss" in one else "val_loss"
            assert several[loss] == pytest.approx(one[loss], rel=1e-5)
        shutil.rmtree("alone")
    assert torch.load("dying/ckpt.pt", weights_only=True)["step"] == 3
    command(t5, "--init_from", "resume", "--out_dir", "dying")


def test_two_at_once(stories, server, capsys):
    """One process downloads and the other waits for it; a run's folder has one run at a time; the
    lock of a process that was killed is no lock."""
    Server.files = {"/a.bin": b"x" * 100_000}
    paths = []
    threads = [threading.Thread(target=lambda: paths.append(
        data.download(f"{server}/a.bin", "new/a.bin"))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(Server.seen) == 1 and os.listdir("new") == ["a.bin"]
    Path("run").mkdir()
    Path("run/rank0.lock").write_text("process 1 on a machine that lost its power")
    Path("run/ckpt.pt.1.tmp").write_text("a half")
    train = ["--data", stories, *SMALL, "--max_steps", 1, "--out_dir", "run"]
    command(gpt, *train)
    assert not {"rank0.lock", "ckpt.pt.1.tmp"} & set(os.listdir("run"))
    capsys.readouterr()
    with data.one_process("run/rank0.lock"):
        assert f"process {os.getpid()} on" in mistake(gpt, capsys, *train)


def test_a_resumed_run_follows_the_flags_as_they_are_now(script, stories, capsys):
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 4,
            "--epochs", 0.01, *SMALL)
    Path("faster.json").write_text('{"max_steps": 12}')
    command(script, "--init_from", "resume", "--out_dir", "run", "--config", "faster.json",
            "--lr", 0.5, "--matrix_lr", 0)
    checkpoint = torch.load("run/ckpt.pt", weights_only=True)
    assert checkpoint["step"] == 12
    rates = {group["highest_lr"] for group in checkpoint["optimizer"]["param_groups"]}
    assert rates == ({0.5, 0, 5.0} if script is t5 else {0.5, 0})  # its embeddings ask for more
    settings = json.loads(Path("run/run.json").read_text())
    assert settings["lr"] == 0.5 and settings["n_ff"] is None


def test_accumulated_gradients_are_those_of_the_whole_batch():
    config = gpt.GPTConfig(**TINY)
    batch = dict(idx=torch.randint(50, (6, 16)), targets=torch.randint(50, (6, 16)))
    batch["targets"][0, 2:] = batch["targets"][4, :9] = -100  # parts of unequal weight
    ended = []
    for size in (6, 2, 1):
        torch.manual_seed(0)
        model = gpt.GPT(config)
        run = gpt.TrainConfig(grad_accum=6 // size, optimizer="adamw")
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        loss = gpt.update(model, batch, gpt.Muon(model, run, torch.float32), scaler,
                          torch.autocast("cpu", enabled=False), run)
        ended.append((float(loss), torch.cat([p.detach().flatten() for p in model.parameters()])))
    torch.manual_seed(0)
    expected = gpt.GPT(config)(batch["idx"], batch["targets"])[1].item()
    for loss, weights in ended:
        assert loss == pytest.approx(expected, rel=1e-5)
        assert (weights - ended[0][1]).abs().max() < 1e-4


def test_float16_on_a_cpu(script, stories, capsys):
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 6, *SMALL,
            "--dtype", "float16")
    checkpoint = torch.load("run/ckpt.pt", weights_only=True)
    assert checkpoint["run"]["dtype"] == "float16" and checkpoint["scaler"]["scale"] > 0
    assert all(value.dtype == torch.float32 for value in checkpoint["model"].values())


def test_float16_leaves_the_weights_where_a_gradient_overflows():
    model = gpt.GPT(gpt.GPTConfig(**TINY))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    run = gpt.TrainConfig()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    arguments = (gpt.Muon(model, run, torch.float32), scaler,
                 torch.autocast("cpu", torch.float16), run)
    gpt.update(model, dict(idx=torch.randint(50, (2, 16)), targets=torch.randint(50, (2, 16))),
               *arguments)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("rate, problem", [
    (1e30, r"the loss became (nan|inf) at step \d+"),
    (30, r"the loss was \d+\.\d or more from step \d+ to \d+ \(a blind guess: 6\.0\)"),
])
def test_a_run_that_comes_apart_is_stopped(rate, problem, stories, capsys, script=gpt):
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 60, *SMALL,
            "--eval_interval", 60, "--lr", rate, "--matrix_lr", min(rate, 10), status=2)
    lines = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {problem}; the last good checkpoint is kept in run. Try half the --lr",
                    lines[-1])
    assert all(value.isfinite().all() for value in weights_of("run/ckpt.pt").values())


def test_a_weight_that_is_no_number_stops_the_run(script, stories, capsys):
    train = ["--data", stories, "--out_dir", "run", *SMALL]
    command(script, *train, "--max_steps", 4)
    checkpoint = torch.load("run/ckpt.pt", weights_only=True)
    next(iter(checkpoint["model"].values()))[7] = math.nan
    torch.save(checkpoint, "run/ckpt.pt")
    before = {path.name: path.read_bytes() for path in Path("run").glob("*.pt")}
    line = mistake(script, capsys, "--init_from", "resume", "--out_dir", "run", "--max_steps", 8)
    assert re.match(r"error: the loss became nan at step [56]; ", line)
    assert {path.name: path.read_bytes() for path in Path("run").glob("*.pt")} == before


@pytest.mark.parametrize("script, flags", [
    (gpt, ["--max_steps", 250]),
    (bert, ["--n_embd", 64, "--batch_size", 32, "--max_steps", 300]),
    (t5, ["--n_embd", 64, "--batch_size", 16, "--max_steps", 90]),
], ids=["gpt", "bert", "t5"])
def test_it_learns(script, flags, stories, capsys):
    """Two layers get well below what the frequencies of the tokens alone would give."""
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 150, *SMALL,
            "--eval_interval", 300, "--dropout", 0, *flags)
    special = script.SPECIAL_TOKENS
    corpus = data.prepare(stories, 400, special, script.SEPARATOR)
    share = np.bincount(corpus.train, minlength=400) + 0.1
    unigram = -np.log(share / share.sum())[corpus.validation[1:]].mean()
    last = json.loads(Path("run/log.jsonl").read_text().splitlines()[-1])
    assert last[script.TOKEN_LOSS] < 0.8 * unigram


# --------------------------------------------------------------------------------------------------
# Published weights on the command line
# --------------------------------------------------------------------------------------------------


def test_an_exported_run_is_opened_by_transformers_and_by_us(script, stories, capsys):
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 3, *SMALL)
    command(script, "export", "--out_dir", "run", "--to", "exported")
    assert "exported holds config.json" in capsys.readouterr().err
    assert {path.name for path in Path("exported").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    command(script, "eval", "--out_dir", "run")
    expected = json.loads(capsys.readouterr().out.splitlines()[-1])
    command(script, "eval", "--init_from", "exported", "--data", stories)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found.keys() == expected.keys()
    if script is not t5:  # (the length of its windows is not the model's, and not exported)
        assert found | {"step": 3} == pytest.approx(expected | {"step": 3})
    prompt = {"gpt": "The sea", "bert": "The [MASK] sea.", "t5": "The <extra_id_0> sea."}
    command(script, "generate", "--init_from", "exported", "--prompt", prompt[script.NAME])
    assert "The" in capsys.readouterr().out
    command(script, "--init_from", "exported", "--data", stories, "--out_dir", "more",
            "--max_steps", 2, "--eval_interval", 2, "--device", "cpu", "--batch_size", 2)
    assert torch.load("more/ckpt.pt", weights_only=True)["step"] == 2

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained("exported")
    ours = bpe.Tokenizer.load("exported/tokenizer.json")
    text = "The old man, by the sea — naïve?"
    assert theirs(text, add_special_tokens=False).input_ids == ours.encode(text)
    first = {"gpt": [], "bert": [ours.special["[CLS]"]] if script is bert else [], "t5": []}
    last = {"gpt": [], "bert": [2], "t5": [1]}[script.NAME]
    assert theirs(text).input_ids == first[script.NAME] + ours.encode(text) + last
    kind = {"gpt": transformers.AutoModelForCausalLM, "bert": transformers.BertForPreTraining,
            "t5": transformers.T5ForConditionalGeneration}[script.NAME]
    model = kind.from_pretrained("exported").double().eval()
    again = script.Model.from_pretrained("exported").double()
    idx = torch.randint(102, 400, (2, 9))
    with torch.no_grad():
        if script is t5:
            pair = model(input_ids=idx, labels=idx).logits, again(idx, idx)[0]
        else:
            pair = model(idx)[0], again(idx)[0]
    assert (pair[0] - pair[1]).abs().max() < 1e-9


def test_a_model_is_fetched_by_its_name(server, stories, monkeypatch, capsys, script=gpt):
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 1, *SMALL)
    command(script, "export", "--out_dir", "run", "--to", "exported")
    Server.files = {f"/some/model/resolve/main/{path.name}": path.read_bytes()
                    for path in Path("exported").iterdir()}
    monkeypatch.setenv("HF_ENDPOINT", server)
    capsys.readouterr()
    command(script, "eval", "--init_from", "some/model", "--data", stories)
    fetched = json.loads(capsys.readouterr().out.splitlines()[-1])
    command(script, "eval", "--init_from", "exported", "--data", stories)
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == fetched
    assert "check the spelling" in mistake(script, capsys, "eval", "--init_from", "some/modle")


def test_models_and_folders_that_are_something_else(script, stories, capsys):
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 1, *SMALL)
    command(script, "export", "--out_dir", "run", "--to", "exported")
    capsys.readouterr()
    config = json.loads(Path("exported/config.json").read_text())
    for settings, problem in (
        ({"model_type": "llama"}, f"not a model that {script.NAME}.py can be"),
        (config | {"vocab_size": 401}, "instead of"),
        (config | {"vocab_size": None}, f"not a model that {script.NAME}.py can be"),
    ):
        Path("exported/config.json").write_text(json.dumps(settings))
        assert problem in mistake(script, capsys, "eval", "--init_from", "exported")
    assert "with --to" in mistake(script, capsys, "export", "--out_dir", "run")
    variant = {"gpt": ["--pos", "rotary"], "bert": ["--norm", "pre"]}.get(script.NAME)
    if variant:
        command(script, "--data", stories, "--out_dir", "odd", "--max_steps", 1, *SMALL, *variant)
        assert "transformers has no class for this variant" in mistake(
            script, capsys, "export", "--out_dir", "odd", "--to", "nowhere")
        assert not Path("nowhere").exists()


# --------------------------------------------------------------------------------------------------
# Fine-tuning: tables, tasks, runs
# --------------------------------------------------------------------------------------------------


def table(name: str, content) -> Path:
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return Path(name)


PAIRS = ("prompt", "response")


def test_tables_as_people_save_them(capsys):
    path = table("a.csv", b'\xef\xbb\xbfprompt,response,rating\r\n"Say ""hi"", now",hi,5\r\n\r\n'
                          b'"two\r\nlines", spaces \t,1\r\n')
    rows = data.read_table(path, PAIRS, ("rating",))
    assert rows == [
        dict(prompt='Say "hi", now', response="hi", rating="5", place="a.csv, row 2"),
        dict(prompt="two\r\nlines", response="spaces", rating="1", place="a.csv, row 3")]
    assert capsys.readouterr().err == ""
    assert data.read_table(path, PAIRS)[0].keys() == {"prompt", "response", "place"}
    assert "passed over the column rating" in capsys.readouterr().err
    path = table("b.jsonl", '{"text": "é\\n", "label": 1}\n\n{"label": "two", "text": "b"}\n')
    assert data.read_table(path, ("text", "label")) == [
        dict(text="é", label="1", place="b.jsonl, line 1"),
        dict(text="b", label="two", place="b.jsonl, line 3")]


@pytest.mark.parametrize("name, content, problem", [
    ("a.csv", "prompt,answer\na,b\n", "a.csv has no column 'response': .* 'prompt', 'answer'"),
    ("a.csv", "prompt;response\na;b\n", "has no column 'prompt': .*'prompt;response'"),
    ("a.csv", "prompt,response\na,b\nc, \n", "a.csv, row 3: the column 'response' is empty"),
    ("a.csv", "prompt,response\na\n", "row 2: the column 'response' is empty"),
    ("a.csv", "prompt,response\na,b,c\n", "row 2: 3 cells under 2 columns"),
    ("a.csv", "prompt,prompt\na,b\n", "the column 'prompt' twice"),
    ("a.csv", 'prompt,response\n"a,b\n', "a.csv, line 2: unexpected end of data"),
    ("a.csv", "prompt,response,rating\na,b,5\na,b,\n", "row 3: the column 'rating' is empty"),
    ("a.csv", b"prompt,response\na,\xe9\n", "a.csv is not UTF-8 text"),
    ("a.csv", "prompt,response\n", "a.csv has no rows"),
    ("a.csv", "", "a.csv has no rows"),
    ("a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n',
     "a.jsonl, line 2: the column 'response' is empty"),
    ("a.jsonl", '{"prompt": "a", "response": ["b"]}\n', "a.jsonl, line 1: 'response' is no text"),
    ("a.jsonl", '{"prompt": "a"\n', "a.jsonl, line 1: not a JSON object"),
    ("a.txt", "prompt,response\n", "a.txt is no .csv or .jsonl file"),
])
def test_tables_that_cannot_be_used(name, content, problem):
    with pytest.raises(ValueError, match=problem) as caught:
        data.read_table(table(name, content), PAIRS, ("rating",))
    assert len(str(caught.value).splitlines()) == 1


def test_where_examples_are_held_out():
    rows = [f"q{i},a{i}" for i in range(25)]
    path = table("a.csv", "\n".join(["prompt,response", *rows]))
    first, again = (data.read_examples(str(path), PAIRS) for _ in range(2))
    assert first == again and [len(first[part]) for part in ("train", "validation")] == [22, 3]
    both = first["train"] + first["validation"]
    assert sorted(row["prompt"] for row in both) == sorted(f"q{i}" for i in range(25))
    with pytest.raises(ValueError, match="a.csv has 1 row: it takes two"):
        data.read_examples(str(table("a.csv", "prompt,response\na,b\n")), PAIRS)
    Path("folder").mkdir()
    table("folder/train.csv", "prompt,response\na,b\n")
    with pytest.raises(ValueError, match="has no validation.csv"):
        data.read_examples("folder", PAIRS)
    table("folder/test.jsonl", '{"prompt": "c", "response": "d"}')
    found = data.read_examples("folder", PAIRS)
    assert [found[part][0]["prompt"] for part in ("train", "validation")] == ["a", "c"]


def test_the_demonstration_holds_out_what_pretraining_held_out():
    found, text = data.stories(), (ROOT / "input.txt").read_bytes()
    assert [len(found[part]) for part in ("train", "validation")] == [936, 104]
    held_out = text[data.split_point(ROOT / "input.txt"):].decode()
    for part, inside in ("train", False), ("validation", True):
        for story in found[part]:
            header = f"Title: {story['title']}\nTopic: {story['topic']}\n\n{story['text']}\n{END}"
            assert (header in held_out) == inside and "Title:" not in story["text"]


def test_batches_take_each_row_once_an_epoch_and_pad_little():
    lengths = np.random.default_rng(0).integers(1, 200, 1000)
    batches = data.Batches(lengths, 16, seed=3)
    assert len(batches) == 63
    epochs = [[batches[63 * epoch + i].tolist() for i in range(63)] for epoch in range(2)]
    for epoch in epochs:
        assert sorted(sum(epoch, [])) == list(range(1000)) and max(map(len, epoch)) == 16
        padded = sum(len(rows) * lengths[rows].max() for rows in epoch)
        assert padded < 1.1 * lengths.sum()  # in order of arrival it is almost twice as much
    assert epochs[0] != epochs[1]
    assert data.Batches(lengths, 16, seed=3)[70].tolist() == epochs[1][7]  # from anywhere
    assert data.pad([[1, 2], [], [3]], -1).tolist() == [[1, 2], [-1, -1], [3, -1]]


def gradient_of(model, script, batch) -> list:
    model.zero_grad()
    loss, weight, _ = script.loss_sum(model, batch)
    (loss / weight).backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def byte_tokenizer(script) -> bpe.Tokenizer:
    return bpe.Tokenizer.train("", 256 + len(script.SPECIAL_TOKENS), script.SPECIAL_TOKENS)


def test_gpt_learns_from_the_response_alone_and_by_its_rating():
    tokenizer, config = byte_tokenizer(gpt), gpt.GPTConfig(257, 24, 1, 2, 16)
    model, task = gpt.GPT(config).double(), gpt.Task()

    def batch(*rows):
        names = "prompt", "response", "rating"
        encoded = [task.encode(dict(zip(names, row)), tokenizer, config) for row in rows]
        found = task.collate(encoded, tokenizer)
        return found | {"weights": found["weights"].double()}

    one = batch(("abc", "de"))
    end = tokenizer.special[END]
    assert one["idx"].tolist() == [[end, *tokenizer.encode("abc\nde")]]
    assert one["targets"].tolist() == [[-100] * 4 + [*tokenizer.encode("de"), end]]
    # The loss is that of the response, written down: - sum of log p.
    chances = F.log_softmax(model(one["idx"])[0], dim=-1)[0]
    expected = -sum(chances[4 + i, token] for i, token in enumerate([*tokenizer.encode("de"), end]))
    loss, weight, _ = gpt.loss_sum(model, one)
    assert abs(loss - expected) < 1e-9 and weight == 3
    # What stands in the padding has no effect, and neither has what the prompt's targets would be.
    both = batch(("abc", "de"), ("a", "x" * 12))
    whole = gradient_of(model, gpt, both)
    both["idx"][0, 7:] = 99
    assert all(torch.equal(a, b) for a, b in zip(gradient_of(model, gpt, both), whole))
    # Five times the rating is five times the row.
    rated = gradient_of(model, gpt, batch(("abc", "de", "5"), ("a", "xyz", "1")))
    repeated = gradient_of(model, gpt, batch(*[("abc", "de")] * 5, ("a", "xyz")))
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(rated, repeated))
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(
        rated, gradient_of(model, gpt, batch(("abc", "de"), ("a", "xyz")))))
    row = dict(prompt="a", response="b", rating="2", place="x.csv, row 7")
    assert gpt.Task(min_rating=2.5).encode(row, tokenizer, config) is None
    for rating in "9", "good", "nan", "0.5":
        with pytest.raises(ValueError, match=f"x.csv, row 7: rating '{rating}' is no number"):
            task.encode(row | {"rating": rating}, tokenizer, config)
    # Too long: the prompt's end and as much of the response as fits beside half of the context.
    long = batch(("p" * 40 + "q", "r" * 5), ("p" * 40, "r" * 40))
    assert long["idx"].shape == (2, 24)
    assert tokenizer.decode(long["idx"][0].tolist()) == "p" * 17 + "q\n" + "r" * 5
    assert (long["targets"] != -100).sum(dim=1).tolist() == [6, 13]


def test_bert_labels_a_padded_text_as_the_text_alone():
    tokenizer = byte_tokenizer(bert)
    config = bert.BERTConfig(260, 24, 2, 2, 16, n_labels=3)
    model, task = randomised(bert.BERT(config), 0.3).double().eval(), bert.Task(labels=list("abc"))
    rows = [dict(text="some words", label="a"), dict(text="x", label="c"),
            dict(text="one", text_b="other", label="b")]
    encoded = [task.encode(row, tokenizer, config) for row in rows]
    batch = task.collate(encoded, tokenizer)
    scores = model.classify(batch["idx"], batch["segments"], batch["mask"])
    losses = 0
    for i, (row, example) in enumerate(zip(rows, encoded)):
        alone = task.collate([example], tokenizer)
        assert "mask" not in alone
        hidden = model.encode(alone["idx"], alone["segments"])[:, 0]
        expected = model.label_head(torch.tanh(model.pooler(hidden)))
        assert (scores[i] - expected).abs().max() < 1e-12
        losses = losses - F.log_softmax(expected, dim=-1)[0, "abc".index(row["label"])]
    loss, weight, _ = bert.loss_sum(model, batch)
    assert abs(loss - losses) < 1e-9 and weight == 3
    start, stop = (tokenizer.special[name] for name in ("[CLS]", "[SEP]"))
    pair = [start, *tokenizer.encode("one"), stop, *tokenizer.encode("other"), stop]
    assert batch["idx"][2, : len(pair)].tolist() == pair
    assert batch["segments"][2].tolist() == [0] * 5 + [1] * 6 + [0]


def test_bert_s_crops():
    lists = [[1] * n for n in range(40)]
    for a in range(1, 40):
        assert bert.Task.rooms([lists[a]], 24) == [min(a, 22)]
        for b in range(1, 40):
            first, second = bert.Task.rooms([lists[a], lists[b]], 24)
            assert first + second == min(a + b, 21) and 1 <= first <= a and 1 <= second <= b
            assert first == a or first >= second - 1  # the longer one gives way
            assert second == b or second >= first - 1
    tokenizer, config = byte_tokenizer(bert), bert.BERTConfig(260, 12, 1, 1, 8, n_labels=2)
    task = bert.Task(labels=["x", "y"], mask_prob=0.2)
    example = task.encode(dict(text="abcdefghijklmnopqrstuvwxyz", label="y"), tokenizer, config)
    assert example["cropped"] and example["length"] == 12
    kept = tokenizer.decode(task.collate([example], tokenizer)["idx"][0].tolist())
    assert kept == "[CLS]abcdefghij[SEP]"
    hidden = tokenizer.special["[MASK]"]
    rows = task.collate([example] * 500, tokenizer, np.random.default_rng(0))["idx"]
    share = (rows == hidden).sum().item() / (500 * 10)
    assert abs(share - 0.2) < 0.03
    begins = collections.Counter(
        tokenizer.decode([token])
        for token in rows[:, 1].tolist() if token != hidden)
    assert set(begins) == set("abcdefghijklmnopq")  # windows begin everywhere they can


def test_macro_f1_by_hand():
    confusion = np.array([[8, 2, 0, 0], [1, 3, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0]])
    found = bert.Task.measures(confusion)  # c is never guessed, d neither true nor guessed
    precision, recall = [8 / 9, 3 / 6], [8 / 10, 3 / 4]
    f1 = [2 * p * r / (p + r) for p, r in zip(precision, recall)]
    assert found["accuracy"] == pytest.approx(11 / 15)
    assert found["macro_f1"] == pytest.approx((f1[0] + f1[1] + 0) / 3)
    lines = bert.Task(labels=["a", "b", "c", "d"]).table(confusion).splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["guessed:", "a", "b", "c", "d"], ["a", "8", "2", ".", "."], ["b", "1", "3", ".", "."]]


def test_t5_s_padded_targets_and_sources_change_nothing():
    tokenizer = byte_tokenizer(t5)
    config = t5.T5Config(358, 1, 2, 16, n_decoder_layer=2)
    model, task = randomised(t5.T5(config), 0.3).double(), t5.Task("do: ", 12, target_length=6)
    rows = [dict(source="abc", target="de"), dict(source="abcdefghij", target="x"),
            dict(source="z", target="uvwxyz")]
    encoded = [task.encode(row, tokenizer, config) for row in rows]
    assert [example["cropped"] for example in encoded] == [False, True, True]
    assert tokenizer.decode(encoded[1]["src"][:-1]) == "do: abcdefg"
    assert encoded[2]["tgt"] == [*tokenizer.encode("uvwxy"), 1]
    batch = task.collate(encoded, tokenizer)
    together = gradient_of(model, t5, batch)
    loss, weight, _ = t5.loss_sum(model, batch)
    parts = [t5.loss_sum(model, task.collate([example], tokenizer)) for example in encoded]
    assert abs(loss - sum(part[0] for part in parts)) < 1e-9 and weight == 3 + 2 + 6
    batch["src"][0, len(encoded[0]["src"]) :] = 77
    assert all(torch.equal(a, b) for a, b in zip(gradient_of(model, t5, batch), together))


def test_rouge_l_is_the_longest_common_series_of_words():
    """Beside all series of words of the shorter text, tried one by one."""
    draw = random.Random(0)
    for _ in range(200):
        ours, theirs = (draw.choices("abcd", k=draw.randrange(1, 8)) for _ in range(2))
        longest = max(
            n for n in range(len(ours) + 1) for series in itertools.combinations(ours, n)
            if any(series == other for other in itertools.combinations(theirs, n)))
        precision, recall = longest / len(ours), longest / len(theirs)
        f1 = 2 * precision * recall / (precision + recall) if longest else 0
        assert data.rouge_l(" ".join(ours), " ".join(theirs)) == pytest.approx(f1)
        common = sum(min(ours.count(word), theirs.count(word)) for word in "abcd")
        expected = 2 * common / (len(ours) + len(theirs))
        assert data.token_f1(" ".join(ours), " ".join(theirs)) == pytest.approx(expected)
    assert data.rouge_l("The Lost Boat!", "the boat, lost") == pytest.approx(2 / 3)
    assert data.token_f1("The Lost Boat!", "the boat, lost") == 1
    assert data.mean_scores(["a b", "c"], ["a b", "d"]) == dict(
        exact_match=0.5, token_f1=0.5, rouge_l=0.5)
    learned = [dict(source=source, target=target) for source, target in (
        ("a cat a", "The x"), ("a dog", "A y"), ("A cat", "The z"))]
    answers = data.simple_answers(["a cat", "a cat, dog", "a cat"], learned)
    assert list(answers.values()) == [["The"] * 3, ["The cat", "The dog", "The cat"]]


EXAMPLES = {  # for each script, a table whose answer shows in the source
    "gpt": ("prompt,response", "say {0},{0} {0}"),
    "bert": ("text,label", "a {0} here,{0}"),
    "t5": ("source,target", "a {0} here,{0}"),
}


def examples_for(script, n=40) -> Path:
    header, row = EXAMPLES[script.NAME]
    lines = [row.format(("cat", "dog")[i % 2]) for i in range(n)]
    return table("examples.csv", "\n".join([header, *lines]))


@pytest.fixture
def pretrained(script, stories):
    """The folder of a short run."""
    command(script, "--data", stories, *SMALL, "--max_steps", 2, "--out_dir", "before")
    return "before"


def test_a_fine_tuning_its_files_and_its_commands(script, pretrained, capsys):
    examples = examples_for(script)
    flags = ["finetune", "--init_from", pretrained, "--data", examples, "--batch_size", 8,
             "--eval_interval", 0, *(("--target_length", 4) if script is t5 else ())]
    command(script, *flags, "--out_dir", "a", "--epochs", 2)
    shown = capsys.readouterr()
    assert shown.out == "" and "36 examples to learn from, 4 held out" in shown.err
    rows = [json.loads(line) for line in Path("a/log.jsonl").read_text().splitlines()]
    measures = dict(gpt=set(), bert={"accuracy", "macro_f1"},
                    t5={"exact_match", "token_f1", "rouge_l"})[script.NAME]
    evaluations = [row for row in rows if "val_loss" in row]
    assert [row["step"] for row in evaluations] == [5, 9]  # each epoch, and the end
    assert all(set(row) == {"step", "seconds", "val_loss"} | measures for row in evaluations)
    assert json.loads(Path("a/run.json").read_text())["task"] == dataclasses.asdict(
        script.Task(**torch.load("a/ckpt.pt", weights_only=True)["task"]))
    command(script, "eval", "--out_dir", "a")
    row = json.loads(capsys.readouterr().out)
    assert set(row) == {"step", "val_loss"} | measures
    best = min(evaluations, key=lambda row: row["val_loss"])
    assert row["step"] == best["step"] and row["val_loss"] == pytest.approx(best["val_loss"])
    command(script, "generate", "--out_dir", "a", "--prompt", "a cat here")
    shown = capsys.readouterr().out
    assert shown.endswith("\n")
    if script is bert:  # both labels, the likelier first
        labels, shares = zip(*(line.split()[:2] for line in shown.splitlines()))
        assert set(labels) == {"cat", "dog"} and float(shares[0]) >= 50 >= float(shares[1])
    # Stopped and resumed, it goes on as if nothing had happened.
    short = [*flags, "--out_dir", "b", "--max_steps", 9]
    command(script, *short[:-2], "--max_steps", 9, "--snapshot_interval", 4)
    shutil.copy("b/ckpt_000004.pt", "b/ckpt.pt")
    command(script, "finetune", "--init_from", "resume", "--out_dir", "b")
    assert_same_run("a", "b")
    assert "holds a fine-tuning" in mistake(script, capsys, "--init_from", "resume",
                                            "--out_dir", "b")
    assert "holds a pretraining" in mistake(
        script, capsys, "finetune", "--init_from", "resume", "--out_dir", pretrained)
    assert "set another --out_dir" in mistake(
        script, capsys, *flags, "--out_dir", pretrained)


def test_fine_tuning_learns(script, pretrained, capsys):
    command(script, "finetune", "--init_from", pretrained, "--data", examples_for(script, 60),
            "--out_dir", "a", "--batch_size", 16, "--epochs", 30, "--lr", 0.01, "--matrix_lr", 0.05,
            "--eval_interval", 50, "--dropout", 0, *(("--mask_prob", 0) if script is bert else ()))
    for word in "cat", "dog":
        prompt = EXAMPLES[script.NAME][1].format(word).rpartition(",")[0]
        greedy = () if script is bert else ("--temperature", 0)
        command(script, "generate", "--out_dir", "a", "--prompt", prompt, *greedy)
        assert capsys.readouterr().out.split()[0] == word


def test_what_is_frozen_stays_and_without_progress_it_stops(script, pretrained):
    before = weights_of(Path(pretrained) / "best.pt")
    common = ["finetune", "--init_from", pretrained, "--data", examples_for(script),
              "--eval_interval", 2, *(("--target_length", 4) if script is t5 else ())]
    command(script, *common, "--out_dir", "a", "--freeze", 1, "--max_steps", 2)
    after = weights_of("a/ckpt.pt")
    frozen = re.compile(
        r"model\.((en|de)coder\.)?blocks\.0\.|model\.((en|de)coder\.)?\w+_embedding")
    same = {name: torch.equal(before[name], after[name]) for name in before
            if name in after and name.startswith("model.")}
    assert all(same[name] for name in same if frozen.match(name))
    assert sum(bool(frozen.match(name)) for name in same) > 8
    assert not any(same[name] for name in same if "blocks.1." in name and "weight" in name)
    command(script, *common, "--out_dir", "c", "--max_steps", 2)
    after = weights_of("c/ckpt.pt")  # without --freeze: all but the heads that nothing asks
    still = {name for name in same if torch.equal(before[name], after[name])}
    heads = r"model\.(transform|pair_head|head\.bias)" if script is bert else "-"
    assert all(re.match(heads, name) for name in still), still
    command(script, *common, "--out_dir", "b", "--lr", 0, "--matrix_lr", 0, "--patience", 2)
    rows = [json.loads(line) for line in Path("b/log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "val_loss" in row] == [2, 4, 6]


def test_fine_tuning_s_mistakes(script, pretrained, capsys):
    columns, row = EXAMPLES[script.NAME]
    flags = ["finetune", "--init_from", pretrained, "--out_dir", "a"]
    for content, problem in (
        (f"{columns}\n{row.format('cat')}\n", "has 1 row: it takes two"),
        ("a,b\nc,d\n", f"has no column '{columns.split(',')[0]}'"),
    ):
        assert problem in mistake(
            script, capsys, *flags, "--data", table("x.csv", content))
    assert "there is no file nothing.csv" in mistake(
        script, capsys, *flags, "--data", "nothing.csv")
    assert f"there is no out/{script.NAME} yet" in mistake(script, capsys, "finetune")
    assert "--scratch true" in mistake(script, capsys, "finetune", "--init_from", "scratch")
    examples = examples_for(script)
    assert "--freeze 9" in mistake(script, capsys, *flags, "--data", examples, "--freeze", 9)
    assert not Path("a/ckpt.pt").exists()


def test_an_exported_classifier_is_opened_by_transformers_and_by_us(stories, capsys):
    transformers = pytest.importorskip("transformers")
    command(bert, "--data", stories, *SMALL, "--max_steps", 2, "--out_dir", "before")
    command(bert, "finetune", "--init_from", "before", "--data", examples_for(bert), "--out_dir",
            "a", "--max_steps", 2)
    command(bert, "export", "--out_dir", "a", "--to", "folder")
    capsys.readouterr()
    theirs = transformers.BertForSequenceClassification.from_pretrained("folder").eval()
    assert theirs.config.id2label == {0: "cat", 1: "dog"}
    idx = torch.randint(4, 400, (3, 20))
    mask = torch.arange(20) < torch.tensor([[20], [7], [12]])
    expected = theirs(idx, attention_mask=mask.long()).logits
    _, trained = data.open_model(bert, "a")
    for ours in trained, bert.BERT.from_pretrained("folder"):
        assert (ours.eval().classify(idx, mask=mask) - expected).abs().max() < 1e-5
    command(bert, "generate", "--init_from", "folder", "--prompt", "The sea")
    shown = capsys.readouterr().out.splitlines()
    assert sorted(line.split()[0] for line in shown) == ["cat", "dog"]
    config = json.loads(Path("folder/config.json").read_text())
    for names in ["cat", "dog"], [1, 2], {"0": "cat", "x": "dog"}:
        Path("folder/config.json").write_text(json.dumps(config | dict(id2label=names)))
        assert "labels in its config.json are not 0 to 1" in mistake(
            bert, capsys, "generate", "--init_from", "folder", "--prompt", "The sea")
    # Pretraining can go on from there: the head that nothing asks stays as it is.
    command(bert, "--init_from", "a", "--data", stories, "--max_steps", 1, "--out_dir", "more")
    heads = [weights_of(f"{folder}/best.pt")["model.label_head.weight"] for folder in ("a", "more")]
    assert torch.equal(*heads)


def test_an_exported_fine_tuning_answers_as_the_run_does(stories, capsys):
    for script in gpt, t5:
        command(script, "--data", stories, *SMALL, "--max_steps", 2, "--out_dir", script.NAME)
        more = ["--task_prefix", "ask: "] if script is t5 else []
        command(script, "finetune", "--init_from", script.NAME, "--data", examples_for(script),
                "--out_dir", f"{script.NAME}-a", "--max_steps", 2, *more)
        command(script, "export", "--out_dir", f"{script.NAME}-a", "--to", f"{script.NAME}-f")
        opened = [data.open_model(script, f"{script.NAME}-{end}")[0]["task"] for end in "af"]
        assert opened[0] == opened[1] is not None


def test_labels_that_are_only_held_out_or_all_the_same():
    config = bert.BERTConfig(**TINY)
    parts = dict(train=[dict(label="b"), dict(label="a")], validation=[dict(label="c")])
    task = bert.Task()
    assert task.fit(config, parts).n_labels == 3 and task.labels == ["a", "b", "c"]
    with pytest.raises(ValueError, match="all examples have the label 'a'"):
        bert.Task().fit(config, dict(train=[dict(label="a")], validation=[dict(label="a")]))
    with pytest.raises(ValueError, match="x.csv, row 3: the label 'd' is none of a, b, c"):
        task.encode(dict(text="t", label="d", place="x.csv, row 3"), byte_tokenizer(bert), config)


def test_a_conversation(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    assert list(data.prompts("given")) == ["given"]
    monkeypatch.setattr(sys, "stdin", Terminal("first\n\n second \n"))
    assert list(data.prompts("")) == ["first", "second"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("first\n"))
    with pytest.raises(ValueError, match="say what, with --prompt"):
        next(data.prompts(""))


def test_the_ladder(stories, capsys):
    command(gpt, "ladder", "--data", stories, "--max_steps", 4, "--batch_size", 4,
            "--block_size", 32, "--out_dir", "l")
    rows = json.loads(Path("l/ladder.json").read_text())
    assert len(rows) == 12 and all(set(row) == {
        "name", "parameters", "train_loss", "val_loss", "seconds", "sample"} for row in rows)
    assert rows[0]["parameters"] == 2 * 257 * 64 and 1.1e6 < rows[-1]["parameters"] < 1.3e6
    shown = capsys.readouterr().out
    assert all(row["name"] in shown for row in rows)
    tree = ElementTree.parse("l/ladder.svg")
    lines = [node for node in tree.iter() if node.tag.endswith("polyline")]
    assert len(lines) == 12 and len({line.get("stroke") for line in lines}) == 12
    # From the third on every step changes one thing, but for the last, which brings all together.
    # (The second brings attention, and the positions without which it cannot tell neighbours.)
    assert [len(change) for _, change, _ in gpt.LADDER[2:-1]] == [1] * 9


# --------------------------------------------------------------------------------------------------
# The command line
# --------------------------------------------------------------------------------------------------


def mistake(script, capsys, *arguments):
    """The one line that a mistaken command prints."""
    command(script, *arguments, status=2)
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[-1].startswith("error: ") and printed.out == "" and "Traceback" not in printed.err
    return lines[-1]


@pytest.mark.parametrize("able, dtype", [
    (dict(avx512_bf16=True), torch.bfloat16), (dict(amx_bf16=True), torch.bfloat16),
    (dict(avx512_bf16=False, avx512_f=True), torch.float32), ({}, torch.float32),
])
def test_auto_asks_the_processor_not_the_clock(monkeypatch, able, dtype):
    """A measurement would make two runs on one machine differ, when it is busy during one."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    monkeypatch.setattr(time, "perf_counter", lambda: pytest.fail("it looked at the clock"))
    assert data.choose_dtype("auto", torch.device("cpu")) == dtype
    assert data.choose_dtype("float16", torch.device("cpu")) == torch.float16


def test_mistakes_get_one_line(stories, capsys, own_cache, script=gpt):
    assert "did you mean --n_layer?" in mistake(script, capsys, "--n_layers", 3)
    assert "there is no command trian" in mistake(script, capsys, "trian")
    assert "there is no preset huge" in mistake(script, capsys, "--preset", "huge")
    assert "n_embd 30 is not divisible by n_head 4" in mistake(script, capsys, "--n_embd", 30)
    assert "invalid int value: 'many'" in mistake(script, capsys, "--n_layer", "many")
    assert "neither true nor false" in mistake(script, capsys, "--compile", "maybe")
    assert "invalid choice: 'up'" in mistake(script, capsys, "--schedule", "up")
    assert "max_steps has to be at least 1, not 0" in mistake(script, capsys, "--max_steps", 0)
    least = 256 + len(script.SPECIAL_TOKENS)
    assert f"set --vocab_size {least} or more" in mistake(
        script, capsys, "--data", stories, "--vocab_size", 200)
    assert "no data at nowhere.txt" in mistake(script, capsys, "--data", "nowhere.txt")
    shorts = ["A", END, "A short text.", f"{END}\n{END}\n", f"One.\n{END}\n"]
    for short in shorts if script is gpt else shorts[:2]:
        Path("short.txt").write_text(short)
        assert "give more text or a smaller --block_size" in mistake(
            script, capsys, "--data", "short.txt")
    assert f"nothing to resume in out/{script.NAME}" in mistake(
        script, capsys, "--init_from", "resume")
    assert "there is no checkpoint" in mistake(script, capsys, "generate")
    command(script, "--data", stories, "--max_steps", 1, *SMALL)
    if script is not t5:  # (its prompts can have any length)
        assert "the prompt has" in mistake(
            script, capsys, "generate", "--prompt", "word " * 40 + "[MASK]")
    if not torch.cuda.is_available():
        assert "sees no cuda device" in mistake(
            script, capsys, "--device", "cuda", "--data", stories)
    Path("settings.json").write_text('{"n_layers": 3}')
    assert "n_layers" in mistake(script, capsys, "--config", "settings.json")
    assert "cannot read nowhere.json: No such file" in mistake(
        script, capsys, "--config", "nowhere.json")
    assert "seed has to be at least 0, not -1" in mistake(script, capsys, "--seed", -1)
    Path("settings.json").write_text('{"n_layer": "six"}')
    assert 'n_layer cannot be "six"' in mistake(script, capsys, "--config", "settings.json")
    Path("settings.json").write_text('{"schedule": "up"}')
    assert 'schedule cannot be "up"' in mistake(script, capsys, "--config", "settings.json")
    Path("settings.json").write_text("{")
    assert "settings.json is not JSON" in mistake(script, capsys, "--config", "settings.json")
    Path("file").write_text("")
    assert "cannot write" in mistake(
        script, capsys, "--data", stories, "--out_dir", "file/run", *SMALL)


def test_a_preset_s_decoder_is_as_deep_as_published():
    """The default preset has a deeper decoder; that goes with its own n_layer, and no other."""
    def model(*arguments):
        _, settings, _ = data.parse_command(t5, list(arguments))
        with torch.device("meta"):
            return t5.T5(data.build(t5.T5Config, settings))

    def depths(*arguments):
        made = model(*arguments)
        return len(made.encoder.blocks), len(made.decoder.blocks)

    assert depths() == depths("--vocab_size", "2048") == (2, 3)
    assert depths("bench", "--n_layer", "4") == (4, 4)
    assert depths("--n_layer", "4", "--n_decoder_layer", "1") == (4, 1)
    assert depths("--n_decoder_layer", "1") == (2, 1)
    for name, millions in (("t5-small", 60.5), ("t5-base", 222.9), ("t5-large", 737.7),
                           ("t5-v1_1-small", 77.0), ("t5-v1_1-base", 247.6)):
        weights = sum(p.numel() for p in model("--preset", name).parameters())
        assert weights / 1e6 == pytest.approx(millions, abs=0.06), name


def test_mistakes_of_one_model(stories, capsys):
    assert "head_dim has to be at least 1, not 0" in mistake(gpt, capsys, "--head_dim", 0)
    assert "n_ff has to be at least 0, not -1" in mistake(gpt, capsys, "--n_ff", -1)
    for flags, problem in (
        (["--n_ff", 0], "n_ff has to be at least 1, not 0"),
        (["--block_size", 7], "block_size has to be at least 8, not 7"),
        (["--n_segments", 1], "n_segments 2, or set --nsp false"),
        (["--n_embd", 12, "--pos", "rotary"], "here 3, has to be even"),
        (["--mask_prob", 0], "mask_prob 0.0 is not between 0 and 1"),
        (["--short_prob", 2], "short_prob 2.0 is not between 0 and 1"),
        (["generate", "--top_k", 0], "top_k has to be at least 1"),
    ):
        assert problem in mistake(bert, capsys, *flags), flags
    for flags, problem in (
        (["--n_decoder_layer", 0], "n_decoder_layer has to be at least 1, not 0"),
        (["--head_dim", 0], "head_dim has to be at least 1"),
        (["--n_buckets", 7], "n_buckets has to be even and at least 4"),
        (["--max_distance", 16], "max_distance more than half of it: 32 and 16 are not"),
        (["--block_size", 1], "block_size has to be at least 2"),
        (["--block_size", 2048], "2048 tokens have 102 spans, and there are 100 sentinels: take a"),
        (["--corruption", "bernoulli", "--block_size", 999], "999 tokens have 128 spans"),
        (["--noise_density", 1], "noise_density 1.0 is not between 0 and 1"),
        (["--mean_span", 0.5], "mean_span has to be at least 1, not 0.5"),
        (["generate", "--beams", 0], "beams has to be at least 1, not 0"),
        (["generate", "--beams", 2, "--temperature", 1], "set either beams or temperature"),
        (["generate", "--num_samples", 2], "without a --temperature all samples are the same"),
    ):
        assert problem in mistake(t5, capsys, *flags), flags
    command(bert, "--data", stories, "--max_steps", 1, *SMALL)
    assert "the prompt has no [MASK]" in mistake(bert, capsys, "generate", "--prompt", "A cat.")


def test_foreign_and_truncated_checkpoints(stories, capsys, script=gpt):
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 2, *SMALL)
    good = Path("run/ckpt.pt").read_bytes()
    capsys.readouterr()

    class Evil:
        def __reduce__(self):
            return os.mkdir, ("broken_in",)

    buffer = io.BytesIO()
    torch.save(dict(name=script.NAME, model=Evil()), buffer)
    foreign = io.BytesIO()
    torch.save(dict(weights=torch.ones(3)), foreign)
    for content in (b"", b"PK\x03\x04 not a zip", good[: len(good) // 2],
                    buffer.getvalue(), foreign.getvalue()):
        Path("run/ckpt.pt").write_bytes(content)
        for arguments in (("--init_from", "resume"), ("generate", "--init_from", "run/ckpt.pt")):
            assert f"run/ckpt.pt is no whole checkpoint of {script.NAME}.py" in mistake(
                script, capsys, *arguments, "--out_dir", "run")
        assert Path("run/ckpt.pt").read_bytes() == content
    assert not Path("broken_in").exists()
    Path("run/ckpt.pt").write_bytes(good)
    assert "does not fit the checkpoint" in mistake(
        script, capsys, "--init_from", "resume", "--out_dir", "run", "--n_layer", 9)


SIZES = dict(n_layer=1, n_head=2, n_embd=8)


def small_checkpoint(script, tokenizer) -> dict:
    """What a run saves before its first step."""
    more = {} if script is t5 else dict(block_size=8)
    config = script.Config(vocab_size=tokenizer.vocab_size, **SIZES, **more)
    run = script.TrainConfig()
    model = script.Model(config)
    return dict(
        name=script.NAME, step=0, best_loss=math.inf, config=dataclasses.asdict(config),
        objective=dataclasses.asdict(script.ObjectiveConfig()), run=dataclasses.asdict(run),
        task=None, documents=1, model=model.state_dict(), pending=[], scaler={},
        optimizer=script.Muon(model, run, torch.float32).state_dict(),
    )


def test_checkpoints_with_absurd_values(script):
    tokenizer = byte_tokenizer(script)
    tokenizer.save("tokenizer.json")
    good = small_checkpoint(script, tokenizer)
    nested = functools.reduce(lambda inner, _: [inner] * 2, range(60), 0)  # 2^60, written out
    breakages = [
        (["config", "n_layer"], 10**9, "a larger model"),
        (["config", "n_embd"], 1 << 40, ""),
        (["config", "n_head"], 2.0, "n_head cannot be 2.0"),
        (["config", "vocab_size"], 10**400, "vocab_size cannot be"),
        (["config", "dropout"], math.nan, "dropout cannot be nan"),
        (["config", "n_ff"], nested, "n_ff cannot be 'list'"),
        (["config"], [], "its config is no dict"), (["run"], None, "its run is no dict"),
        (["name"], nested, "its name is no str"),
        (["run", "data"], 5.0, "data cannot be 5.0"), (["run", "lr"], "a", "lr cannot be 'a'"),
        (["run", "batch_size"], 0, "batch_size has to be at least 1"),
        (["run", "optimizer"], "sgd", "optimizer cannot be 'sgd'"), (["objective"], 3, "no dict"),
        (["task"], "answer", "its task is no dict"), (["step"], "1", "its step is no int"),
        (["documents"], torch.ones(2), "its documents is no int"), (["model"], {}, "larger model"),
    ] + dict(
        gpt=[(["config", "pos"], "up", "pos cannot be 'up'"),
             (["task"], dict(min_rating=None), "min_rating cannot be"),
             (["config", "block_size"], 1 << 40, "takes a table of over 1 GiB")],
        bert=[(["task"], dict(labels=["a"]), "its labels are not those of its head"),
              (["task"], dict(labels=[5]), "labels have to be texts")],
        t5=[(["config", "pad_id"], 1 << 40, "pad_id and eos_id have to be below vocab_size"),
            (["config", "act"], "gelu", "act cannot be 'gelu'"),
            (["task"], dict(target_length=1 << 40), "source_length and target_length have to be")],
    )[script.NAME]
    torch.save(good, "a.pt")
    data.open_model(script, "a.pt")
    for (*path, last), value, problem in breakages:
        broken = {name: dict(part) if isinstance(part, dict) else part
                  for name, part in good.items()}
        functools.reduce(dict.get, path, broken)[last] = value
        torch.save(broken, "a.pt")
        with pytest.raises(ValueError, match="a.pt is no whole checkpoint of ") as caught:
            data.open_model(script, "a.pt")
        assert problem in str(caught.value) and len(str(caught.value).splitlines()) == 1
    Path("a.pt").write_bytes(compressed(saved(good)))
    with pytest.raises(ValueError, match="it is compressed"):
        data.open_model(script, "a.pt")
    torch.save(good, "a.pt")
    for special, vocab_size, problem in (
        (["<nothing>"], 300, "its tokenizer has no special token"),
        (script.SPECIAL_TOKENS, 300 + len(script.SPECIAL_TOKENS), "tokens, the model"),
    ):
        bpe.Tokenizer.train("abcdefgh" * 9 + "badcfehg" * 9, vocab_size, special).save(
            "tokenizer.json")
        with pytest.raises(ValueError, match=problem):
            data.open_model(script, "a.pt")


def test_the_state_of_another_run_s_optimizer(script=gpt):
    model = script.Model(script.Config(vocab_size=20, block_size=8, **SIZES))
    optimizer = script.Muon(model, script.TrainConfig(), torch.float32)
    model(torch.zeros(1, 8).long(), torch.zeros(1, 8).long())[1].backward()
    optimizer.step()
    good = optimizer.state_dict()

    def load(state):
        optimizer.load_state_dict(state)
        data.check_state(optimizer)

    load(good)
    load(good | {"state": {}})  # as before the first step
    for i, state in good["state"].items():
        for name, value in state.items():
            for wrong in (torch.ones(7), torch.ones(1).expand(2, 3), value[..., None], None):
                with pytest.raises((ValueError, AttributeError, TypeError)):
                    load(good | {"state": {i: state | {name: wrong}}})


def test_published_settings_that_the_weights_do_not_bear_out(script):
    more = {} if script is t5 else dict(block_size=8)
    script.Model(script.Config(vocab_size=20, **SIZES, **more)).save_pretrained("model")
    config = json.loads(Path("model/config.json").read_text())
    sizes = dict(gpt=("n_layer", "n_positions"), t5=("num_decoder_layers", "d_ff"),
                 bert=("num_hidden_layers", "max_position_embeddings"))[script.NAME]
    script.from_pretrained("model")
    for value in (10**9, 1 << 40, 10**400, 8.0, "8", [8], None, math.nan):
        for name in ("vocab_size", *sizes):
            if value is None and name in ("d_ff", "num_decoder_layers"):  # there are defaults
                continue
            Path("model/config.json").write_text(json.dumps(config | {name: value}))
            with pytest.raises(ValueError, match="^model: not a model that .* can be ") as caught:
                script.from_pretrained("model")
            assert len(str(caught.value).splitlines()) == 1


def test_an_error_is_one_line_whatever_is_in_it(capsys, script=gpt):
    assert mistake(script, capsys, "generate", "--init_from", "two\nlines.pt").startswith(
        "error: there is no checkpoint two lines.pt")


def test_a_full_disk_leaves_the_old_checkpoint(stories, capsys, script=gpt):
    """A limit on the size of files stands for the disk that is full."""
    command(script, "--data", stories, "--out_dir", "run", "--max_steps", 2, *SMALL)
    before = {path.name: path.read_bytes() for path in Path("run").iterdir()}
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000));"
        f"sys.path.insert(0, {str(ROOT)!r});"
        f"import {script.NAME}; sys.exit({script.NAME}.main(sys.argv[1:]))"
    )
    arguments = ["--init_from", "resume", "--out_dir", "run", "--max_steps", "6"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert re.match(r"error: cannot write run/(best|ckpt)\.pt: .*", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr
    for name in ("ckpt.pt", "best.pt", "tokenizer.json"):
        assert Path("run", name).read_bytes() == before[name]
    assert not list(Path("run").glob("*.tmp"))
    command(script, "--init_from", "resume", "--out_dir", "run", "--max_steps", 6)


ALONE = """
import importlib, os, sys, torch
idx = torch.randint(50, (2, 9))
os.chdir("gpt"); sys.path[0] = ""
import gpt
from gpt import GPT, GPTConfig
model = GPT(GPTConfig(50, 16, 2, 2, 16))
model(idx, idx)[1].backward(); print(tuple(model.generate(idx, 20).shape))
statuses = gpt.main([]),
os.mkdir("data"); importlib.invalidate_caches()  # a folder that many projects have
print(*statuses, gpt.main([]))
os.chdir("../bert")
from bert import BERT, BERTConfig
model = BERT(BERTConfig(50, 16, 2, 2, 16))
model.loss(idx, None, None, idx).backward(); print(tuple(model(idx)[0].shape))
os.chdir("../t5")
from t5 import T5, T5Config
model = T5(T5Config(50, 2, 2, 16))
model(idx, idx)[1].backward(); print(tuple(model.generate(idx, 1).shape))
"""


def test_a_file_alone(own_cache):
    """Alone in a folder each gives its model; training says which files are missing or hidden."""
    for script in gpt, bert, t5:
        Path(script.NAME).mkdir()
        shutil.copy(script.__file__, script.NAME)
    done = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": ""})
    assert done.stdout == "(2, 29)\n2 2\n(2, 9, 50)\n(2, 1)\n", done.stderr
    assert re.fullmatch(r"error: (bpe|data)\.py is missing: put .*\n"
                        r"error: data\.py is hidden .*: put .*\n", done.stderr)


def test_help_shows_every_flag_with_a_sentence_and_its_default(script, capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for cls in (script.Config, script.ObjectiveConfig, script.TrainConfig):
        for name in cls.__dataclass_fields__:
            assert re.search(rf"--{name} [A-Za-z]\w*[^-]*\w+", shown), name
    assert f"(default {script.PRESETS['laptop']['vocab_size']})" in shown
    assert "choices" not in shown and "auto, cpu, cuda, mps" in shown


def test_bench_ends_with_a_line_of_figures(script, capsys, monkeypatch):
    small = ("--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 "
             "--vocab_size 400 --batch_size 2").split()
    if script is not bert:  # (how fast it writes takes eight texts of 120 tokens: shorter ones do)
        write = script.write_random
        monkeypatch.setattr(script, "write_random", lambda model, rows, _: write(model, rows, 4))
    command(script, "bench", "--device", "cpu", *small)
    row = json.loads(capsys.readouterr().out.splitlines()[-1])
    generates = ("generate_tokens_per_second", "generate_batch_tokens_per_second")
    assert row.keys() == {
        *("ms_per_step", "tokens_per_second", "gflops", "matmul_gflops", "share", "peak_memory_mb"),
        *(generates if script is not bert else ()),
    }
    tokens = row["tokens_per_second"] * row["ms_per_step"] / 1000
    least, most = {"gpt": (32, 32), "bert": (8, 32), "t5": (40, 40)}[script.NAME]
    assert least - 0.1 < tokens < most + 0.1  # BERT: some are padding; T5: source 16, target 4
    assert row["share"] == pytest.approx(row["gflops"] / row["matmul_gflops"])


BESIDE_SIZES = dict(vocab_size=4096, n_layer=4, n_head=4, n_embd=256)


def median_seconds(function, times: int = 5) -> float:
    """The median time of a call, after three that warm up."""
    seconds = []
    for _ in range(times + 3):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds[3:])[times // 2]


def speeds_of_transformers(script, model, batch: dict):
    """Yield (what was measured, the name that `bench` has for it, tokens per second) of a model of
    theirs."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    tokens = batch["input_ids"].numel() + (batch["labels"].numel() if script is t5 else 0)

    def step(bfloat16: bool):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    def write(rows: int):
        sampling = dict(do_sample=True, top_k=50) if script is gpt else dict(do_sample=False)
        ids = torch.randint(3, 4096, (rows, 8 if script is gpt else 116))
        model.generate(input_ids=ids, max_new_tokens=120, min_new_tokens=120, **sampling,
                       pad_token_id=0)

    model.train()
    for name, bfloat16 in ("as it ships", False), ("bfloat16 autocast", True):
        speed = tokens / median_seconds(lambda: step(bfloat16))
        yield f"training, {name}", "tokens_per_second", speed
    model.eval()
    if script is not bert:
        for rows, kind in (1, "generate"), (32, "generate_batch"):
            key = f"{kind}_tokens_per_second"
            yield f"generation, {rows}", key, rows * 120 / median_seconds(lambda: write(rows), 3)


@pytest.mark.skipif("BESIDE" not in os.environ, reason="minutes: BESIDE=1 pytest -s -k beside")
def test_speed_beside_transformers(script):
    """Prints how many times as fast as `transformers` we train (AdamW on both sides) and generate:
    the medians of three rounds in which the two take turns. Both have the same weights."""
    transformers = pytest.importorskip("transformers")
    length = {} if script is t5 else dict(block_size=128)
    ours = script.Model(script.Config(**BESIDE_SIZES, **length)).eval()
    ours.save_pretrained("model")
    theirs = dict(gpt=transformers.GPT2LMHeadModel, bert=transformers.BertForPreTraining,
                  t5=transformers.T5ForConditionalGeneration)[script.NAME].from_pretrained("model")
    source, target = (116, 26) if script is t5 else (128, 128)  # (what `bench` has)
    idx, labels = torch.randint(3, 4096, (16, source)), torch.randint(3, 4096, (16, target))
    batch = dict(input_ids=idx, labels=labels)
    if script is bert:
        labels[torch.rand(16, 128) > 0.15] = -100
        batch["next_sentence_label"] = torch.randint(2, (16,))
    with torch.no_grad():
        logits = ours(idx, labels)[0] if script is t5 else ours(idx)[0]
        again = theirs.eval()(**batch)
        again = again.prediction_logits if script is bert else again.logits
    assert torch.allclose(logits, again, atol=1e-3)
    flags = [f"--{name}={value}" for name, value in (BESIDE_SIZES | length).items()]
    ratios = collections.defaultdict(list)
    for _ in range(3):
        done = subprocess.run(
            [sys.executable, script.__file__, "bench", "--optimizer=adamw", "--batch_size=16",
             "--device=cpu", *flags], capture_output=True, text=True, check=True)
        bench = json.loads(done.stdout.splitlines()[-1])
        for name, key, speed in speeds_of_transformers(script, theirs, batch):
            ratios[name].append(bench[key] / speed)
    print(f"\n{script.NAME}.py: {bench['tokens_per_second']:,.0f} tokens per second of training")
    for name, values in ratios.items():
        print(f"  {name:<28} {sorted(values)[1]:.2f} x")


# --------------------------------------------------------------------------------------------------
# The terminal
# --------------------------------------------------------------------------------------------------


class Failing(io.TextIOWrapper):
    """A text stream whose writes fail, as those to a pipe that nobody reads."""

    def __init__(self, error):
        super().__init__(io.BytesIO(), encoding="utf-8")
        self.error = error

    def write(self, text):
        raise self.error

    def fileno(self):
        return self.file.fileno()


def test_what_is_said_to_nobody_does_not_end_a_run(monkeypatch, own_cache):
    with open(own_cache / "stderr", "w") as file:
        stream = Failing(BrokenPipeError())
        stream.file = file
        monkeypatch.setattr(sys, "stderr", stream)
        data.say("a")  # no exception, and what follows goes to /dev/null
        assert os.path.samestat(os.fstat(file.fileno()), os.stat(os.devnull))
        stream.error = RuntimeError("reentrant call")
        with data.interrupts() as pressed:
            os.kill(os.getpid(), signal.SIGINT)
        assert pressed == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


@pytest.mark.parametrize("error, reason", [
    (OSError(28, "No space left on device"), OSError), (KeyboardInterrupt(), KeyboardInterrupt)])
def test_a_save_says_what_befell_it(error, reason):
    class Full(io.BytesIO):
        def write(self, block):
            if self.tell() > 50_000:
                raise error
            return super().write(block)

    with pytest.raises(reason) as raised, data.naming("a.pt"):
        torch.save([torch.zeros(9999) for _ in range(9)], Full())
    assert str(raised.value) in ("", "cannot write a.pt: No space left on device; "
                                     "is there space left, and permission?")


def test_a_tokenizer_that_does_not_fit_leaves_nothing(own_cache, monkeypatch):
    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(json, "dump", full)
    with pytest.raises(OSError):
        bpe.Tokenizer.train("a b", 258).save(own_cache / "tokenizer.json")
    assert not list(own_cache.glob("tokenizer*"))


def test_closed_and_full_streams(own_cache):
    """One process that has no streams, one whose standard output is a full disk, one whose reader
    has left; whatever happens, there is no traceback."""
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import data;"
            "show = lambda *_: data.say('said') or print('a \\ufffd') or 0;"
            "data.commands_of = lambda it: {'show': (show, ())};"
            "data.presets_of = lambda it: {'p': {'q': 1}};"
            "sys.exit(data.run_command(type('X', (), {'NAME': 'x'}), []))")
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    environment.pop("PYTHONUNBUFFERED", None)
    for redirection, status, out, err in (
        ("", 0, "a ?\n", "said\n"), ("<&- >&- 2>&-", 0, "", ""), ("2>&-", 0, "a ?\n", ""),
        ("2>/dev/full", 0, "a ?\n", ""), ("| true", 0, "", "said\n"),
        (">/dev/full", 2, "", "said\nerror: cannot write standard output: No space left on device; "
                              "is there space left?\n"),
    ):
        if "full" in redirection and not os.path.exists("/dev/full"):
            continue
        done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {redirection}', sys.executable, code],
                              capture_output=True, text=True, env=environment)
        assert (done.returncode, done.stdout, done.stderr) == (status, out, err), redirection


def test_ctrl_c_does_not_reach_the_processes_of_the_pool(own_cache):
    """They start with it held back, so only the one that started them reacts."""
    held = functools.partial(signal.pthread_sigmask, signal.SIG_BLOCK)  # returns what was held
    assert all(signal.SIGINT in signals for signals in data.parallel(held, [[]] * 8))
    assert signal.SIGINT not in held([])


def test_ctrl_c_while_the_packages_load(own_cache):
    """torch.py here stands for PyTorch, in the middle of its seconds of loading."""
    (own_cache / "torch.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True: pass\n")
    for script in gpt, bert, t5:
        shutil.copy(script.__file__, own_cache)
        done = subprocess.run([sys.executable, own_cache / f"{script.NAME}.py"],
                              capture_output=True, text=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


# --------------------------------------------------------------------------------------------------
# The house
# --------------------------------------------------------------------------------------------------


def test_imports_are_the_standard_library_and_three_packages():
    ours = {"gpt", "bert", "t5", "bpe", "data"}
    for path in ROOT.glob("*.py"):
        allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "requests"} | ours
        allowed |= {"pytest"} if path.name == "test_all.py" else set()
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, path.name
        top = {alias.name for node in tree.body if isinstance(node, ast.Import)
               for alias in node.names}
        top |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
        if path.stem in ("gpt", "bert", "t5"):
            assert not top & ours, f"{path.name} must import alone"


def test_functions_are_short_and_what_is_public_is_documented():
    """A method that replaces one of its class's bases has its docstring there."""
    for module in gpt, bert, t5, bpe, data:
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{module.__name__}.{node.name} is long"
        things = [thing for name, thing in vars(module).items() if not name.startswith("_")
                  and getattr(thing, "__module__", "") == module.__name__]
        for thing in things:
            if not isinstance(thing, (type, types.FunctionType)):
                continue
            assert thing.__doc__, f"{module.__name__}.{thing.__name__} is not documented"
            for name, method in vars(thing).items() if isinstance(thing, type) else ():
                bases = [base for base in thing.__mro__[1:] if hasattr(base, name)]
                if isinstance(method, (types.FunctionType, property)) and not name.startswith("_"):
                    assert method.__doc__ or bases, f"{thing.__name__}.{name} is not documented"


MODEL_FILES = ("gpt.py", "bert.py", "t5.py")
TWINS = {label: MODEL_FILES for label in (
    "at_least", "check_choices", "LONG", "attention", "CrossEntropy")}
TWINS |= {label: ("gpt.py", "bert.py") for label in ("sinusoids", "rotate")}
TWINS |= {label: ("gpt.py", "t5.py") for label in ("KVCache", "sample", "fast_product")}
TWINS["padding_bias"] = ("bert.py", "t5.py")
# and all of the last rooms


@functools.lru_cache(8)
def twin_texts(name: str, source: str) -> dict[str, str]:
    """label -> text of each twin in a model file, with the comments and decorators before it."""
    lines = source.splitlines(keepends=True)
    rooms = re.search(r"^# -+\n# 9\. Training.*?(?=^@)", source, re.MULTILINE | re.DOTALL)
    texts = {"the heading of the training room": rooms[0]}
    end = beyond = source[: rooms.end()].count("\n")
    for node in ast.parse(source).body:
        label = getattr(node, "name", "") or ast.unparse(getattr(node, "targets", [node])[0])
        if node.lineno > beyond:
            texts[label] = "".join(lines[end : node.end_lineno])
            end = node.end_lineno
        elif name in TWINS.get(label, ()):
            texts[label] = "".join(lines[node.lineno - 1 : node.end_lineno])
    return texts


def drifted(sources: dict[str, str]) -> list[str]:
    """The twins that are not the same text in all of these files."""
    texts = {name: twin_texts(name, source) for name, source in sources.items()}
    every = {label: None for found in texts.values() for label in found}
    return [
        label for label in every
        if len({texts[name].get(label) for name in TWINS.get(label, MODEL_FILES)}) > 1
    ]


def test_twins_are_the_same_text():
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in MODEL_FILES}
    assert drifted(sources) == []


def test_a_change_in_one_copy_is_a_drift():
    """Whichever twin is changed by one character, in whichever file: its name is reported."""
    sources = {name: (ROOT / name).read_text(encoding="utf-8") for name in MODEL_FILES}
    for name, source in sources.items():
        begin = source.index("# 9. Training")
        starts = r"^(?:(?:def|class) {0}\b|{0} = )"
        places = {label: re.search(starts.format(label), source, re.MULTILINE).end()
                  for label in (*TWINS, "update", "Muon") if name in TWINS.get(label, MODEL_FILES)}
        places |= {f"a draw from the last rooms {i}": at for i, at in enumerate(
            random.Random(0).sample(range(begin, len(source.rstrip())), 5))
            if source[at] in "0123456789abcdefghijklmnopqrstuvwxyz"}
        assert len(places) > 6
        for label, at in places.items():
            other = "x" if source[at] != "x" else "y"
            changed = source[:at] + other + source[at + 1 :]
            with contextlib.suppress(SyntaxError):  # (that would be noticed anyway)
                assert drifted(sources | {name: changed}) != [], label
    shared = sources["bert.py"].replace("momentum: float = 0.95", "momentum: float = 0.96")
    assert drifted(sources | {"bert.py": shared}) == ["Muon"]


README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = re.compile(r"\((\w+, )?(network|GPU|untried)\)")  # behind a command that takes one


def blocks(kind: str) -> list[str]:
    """The README's blocks of a kind: "sh", "python"."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def in_small(script, words: list[str]) -> list[str]:
    """The arguments of a command of the README with a model and steps that take no time: its own
    flags win, but for --max_steps."""
    name = "train" if not words or words[0].startswith("-") else words[0]
    own = words if words[:1] != [name] else words[1:]
    sizes = ("--n_layer 1 --n_head 2 --n_embd 16 --vocab_size 400 --batch_size 4 --eval_interval 2 "
             "--block_size 16")
    small = dict(train=sizes, generate="" if script is bert else "--max_new_tokens 9")
    before = "" if "resume" in own else small.get(name, "")
    after = f"--max_steps {2 + own.count('resume')}" if name in ("train", "finetune") else ""
    return [name, *before.split(), *own, *after.split()]


@pytest.fixture
def what_the_readme_names(stories):
    """All files that the README's commands and examples name, in small, in the working folder."""
    text = Path(stories).read_text(encoding="utf-8")
    Path("my_folder").mkdir()
    for name in "input.txt", "my.txt", "my_folder/a.txt":
        Path(name).write_text(text, encoding="utf-8")
    Path("my.jsonl").write_text(
        "".join(json.dumps({"text": story}) + "\n" for story in text.split(END)))
    rows = [("The sea", "yes"), ("A hill", "no")] * 9
    for name, header in ("pairs", "prompt,response,rating"), ("texts", "text,label,stars"):
        Path(f"{name}.csv").write_text(
            "\n".join([header, *(f"{left},{right},4" for left, right in rows)]))
    Path("pairs.jsonl").write_text(
        "".join(json.dumps(dict(source=left, target=right)) + "\n" for left, right in rows))


def test_the_readme_s_commands_run(what_the_readme_names, capsys):
    """In the order of the page, with small models and few steps. Those that take a network or a GPU
    are only parsed, and so are `bench` and `ladder`, which have tests of their own; `torchrun` and
    the first command are run by .ci/run."""
    run = []
    for line in itertools.chain.from_iterable(map(str.splitlines, blocks("sh"))):
        match = re.match(r"python (gpt|bert|t5)\.py *(.*)", line)
        if not match:
            assert re.match("torchrun |pip |pytest |diff |(BESIDE|KILLS|CORPUS_MB)=", line), line
            continue
        script = dict(gpt=gpt, bert=bert, t5=t5)[match[1]]
        words = shlex.split(match[2], comments=True)
        if "--help" in words:
            continue
        if NOT_RUN.search(line) or words[:1] in (["bench"], ["ladder"]):
            data.parse_command(script, words)
            continue
        command(script, *in_small(script, words))
        run.append(script.NAME)
        capsys.readouterr()
    assert all(run.count(name) > 6 for name in ("gpt", "bert", "t5"))


def test_the_readme_s_examples_run(what_the_readme_names):
    command(gpt, *in_small(gpt, []))
    examples = blocks("python")
    assert len(examples) > 4
    for example in examples:
        code = compile(example.replace("range(500)", "range(2)"), "README.md", "exec")
        exec(code, {})


@functools.cache
def definitions(file: str) -> dict[str, int]:
    """Dotted name -> line of each class, function and global variable of a file."""
    found = {}

    def note(body, prefix):
        for node in body:
            name = getattr(node, "name", "") or ast.unparse(getattr(node, "targets", [node])[0])
            found.setdefault(prefix + name, node.lineno)
            note(node.body if isinstance(node, ast.ClassDef) else [], f"{name}.")

    note(ast.parse((ROOT / file).read_text(encoding="utf-8")).body, "")
    return found


def with_right_links(page: str) -> str:
    """The README with each [`name`](file.py#L1) leading to the line where the name is defined."""
    def link(match):
        return f"[`{match[1]}`]({match[2]}#L{definitions(match[2])[match[1]]})"

    return re.sub(r"\[`([\w.]+)`\]\((\w+\.py)#L\d+\)", link, page)


def test_the_readme_s_links_lead_to_their_names():
    assert README.count(".py#L") > 30
    assert README == with_right_links(README), "python test_all.py puts them right"
    titles = re.findall(r"^## (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= anchors


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_right_links(README), encoding="utf-8")
