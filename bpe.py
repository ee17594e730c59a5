"""Byte-level byte-pair encoding (BPE): the tokenizer of GPT-2, in one file of plain Python.

A language model reads numbers, so text has to become numbers and come back unchanged. The two
obvious ways are both wasteful: one number per byte makes long sequences, one per word needs a
number for every word there is. BPE lies between. It starts from the 256 bytes, looks for the pair
of neighbours that occurs most often in a text, makes that pair a token of its own, and repeats:
"t"+"h", "th"+"e", " "+"the", ... After a few thousand merges common words are one token, rare ones
a few, and any byte string at all, emoji or damaged file, can still be spelled.

    counts = count_words(text)            1. split the text by GPT-2's pattern, count the words
    merges = learn_merges(counts, ...)    2. merge the most frequent pair, again and again
    tok.encode(text)                      3. apply the same merges, in the order they were learned

    >>> tok = Tokenizer.train(open("input.txt").read(), 1024, special_tokens=["<|endoftext|>"])
    >>> tok.decode(tok.encode("Once upon a time"))
    'Once upon a time'

Ids: special tokens first, then the 256 bytes, then the merges in order. The file is the
`tokenizer.json` of the `tokenizers` library, which learns the same merges and gives the same ids.

BPE: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; bytes: Radford et al. 2019, section 2.2
"""

import functools
import heapq
import json
import operator
import os
import re
import sys
import unicodedata
from collections import Counter, defaultdict
from itertools import chain

# --------------------------------------------------------------------------------------------------
# 1. Splitting: merges never cross the border between two words
# --------------------------------------------------------------------------------------------------

# Letters and numbers that Unicode gained from version 13 (Python 3.10) to 16, as hex ranges:
# with them every Python splits alike. A character that a version has never changes its class.
NEW_LETTERS = """
870-887 889-88e 8b5 8c8-8c9 c5d cdd 170d 171f 1b4c 1c89-1c8a 2c2f 2c5f 9ffd-9fff a7c0-a7c1 a7cb-a7cd
a7d0-a7d1 a7d3 a7d5-a7dc a7f2-a7f4 10570-1057a 1057c-1058a 1058c-10592 10594-10595 10597-105a1
105a3-105b1 105b3-105b9 105bb-105bc 105c0-105f3 10780-10785 10787-107b0 107b2-107ba 10d4a-10d65
10d6f-10d85 10ec2-10ec4 10f70-10f81 11071-11072 11075 1123f-11240 11380-11389 1138b 1138e
11390-113b5 113b7 113d1 113d3 11740-11746 11ab0-11abf 11bc0-11be0 11f02 11f04-11f10 11f12-11f33
12f90-12ff0 1342f 13441-13446 13460-143fa 16100-1611d 16a70-16abe 16d40-16d6c 18cff 1aff0-1aff3
1aff5-1affb 1affd-1affe 1b11f-1b122 1b132 1b155 1df00-1df1e 1df25-1df2a 1e030-1e06d 1e290-1e2ad
1e4d0-1e4eb 1e5d0-1e5ed 1e5f0 1e7e0-1e7e6 1e7e8-1e7eb 1e7ed-1e7ee 1e7f0-1e7fe 2a6de-2a6df
2b735-2b739 2ebf0-2ee5d 31350-323af"""
NEW_NUMBERS = """10d40-10d49 116d0-116e3 11bf0-11bf9 11f50-11f59 16130-16139 16ac0-16ac9 16d70-16d79
1ccf0-1ccf9 1d2c0-1d2d3 1e4f0-1e4f9 1e5f1-1e5fa"""


@functools.cache
def word_pattern(limit: int) -> re.Pattern:
    r"""GPT-2's splitting pattern, for text whose characters are all below `limit`:

    `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`

    In words: an English contraction's ending; a run of letters, of numbers, or of anything else,
    each with the one space before it; white space, of which the last space is left to the word that
    follows. `re` has no `\p{L}` (letters) and `\p{N}` (numbers), and its `\w` and `\d` are other
    sets, so both are spelled out.
    """
    kinds = bytearray(ord(unicodedata.category(chr(code))[0]) for code in range(limit))
    for kind, spans in (b"L", NEW_LETTERS), (b"N", NEW_NUMBERS):
        for span in spans.split():
            first, _, last = span.partition("-")
            first, last = int(first, 16), int(last or first, 16)
            if last < limit:
                kinds[first : last + 1] = kind * (last + 1 - first)

    def characters(kind: bytes) -> str:
        runs = re.finditer(kind + b"+", kinds)
        return "".join(rf"\U{run.start():08x}-\U{run.end() - 1:08x}" for run in runs)

    letter, number = characters(b"L"), characters(b"N")
    space = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space
    return re.compile(
        rf" ?[{letter}]+|'(?:[sdmt]|re|ve|ll)| ?[{number}]+| ?[^{space}{letter}{number}]+"
        rf"|[{space}]+(?![^{space}])|[{space}]+"
    )


def split_words(text: str) -> list[str]:
    """The words of a text, in order; joined they are the text.

    `re` looks up characters up to U+FFFF in a table, but tries the ranges above one by one, which
    takes three times as long: a text without any is spared that. No letter lies above U+3FFFF.
    """
    return word_pattern(0x40000 if BEYOND_TABLE.search(text) else 0x10000).findall(text)


BEYOND_TABLE = re.compile("[\U00010000-\U0010ffff]")


def to_text(text_or_bytes: str | bytes) -> str:
    """Bytes as a str that `to_bytes` turns back; a byte that is not UTF-8 becomes U+DC80-DCFF."""
    if isinstance(text_or_bytes, str):
        return text_or_bytes
    return bytes(text_or_bytes).decode("utf-8", "surrogateescape")


def to_bytes(word: str) -> bytes:
    """UTF-8. Lone surrogates (no characters) become `?` unless `to_text` made them out of bytes."""
    try:
        return word.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return word.encode("utf-8", "replace")


def count_words(text_or_bytes: str | bytes) -> Counter:
    """How often each word of the text occurs: word (str, with the space before it) -> count."""
    return Counter(split_words(to_text(text_or_bytes)))


# --------------------------------------------------------------------------------------------------
# 2. Learning the merges
# --------------------------------------------------------------------------------------------------
# While we merge, a word is a str whose characters are token ids: chr(id). Then a pair of neighbours
# is a str of length two, merging it is `word.replace(pair, new)`, and all of that runs at the speed
# of C.


def byte_alphabet() -> list[str]:
    """256 printable characters, one per byte, in which `tokenizer.json` spells its tokens.

    As in GPT-2's `encoder.py` printable bytes stand for themselves; the other 68 are moved up to
    U+0100 and on: space is "Ġ".
    """
    printable = [*range(ord("!"), ord("~") + 1),
                 *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def as_tokens(word: str, byte_ids: list[int]) -> str:
    """The word's UTF-8 bytes, each as the character of its id; nothing is merged yet."""
    return to_bytes(word).decode("latin-1").translate(byte_ids)


def neighbours(word: str):
    """The pairs of a word: "abcd" -> "ab", "bc", "cd"."""
    return map(operator.add, word, word[1:])


def merge_pair(word: str, pair: str, merged: str) -> tuple[str, list[str], list[str]]:
    """The word with every `pair` merged, from left to right; the pairs it destroys; those it makes.

    >>> merge_pair("xabyab", "ab", "C")       # the two occurrences of "ab" itself are not listed
    ('xCyC', ['xa', 'by', 'ya'], ['xC', 'Cy', 'yC'])
    """
    parts = word.split(pair)
    gone, born = [], []
    for i in range(1, len(parts)):  # an occurrence stands between two parts
        left, right = parts[i - 1], parts[i]
        if left:
            gone.append(left[-1] + pair[0])
            born.append(left[-1] + merged)
        elif i > 1:  # two occurrences touch
            gone.append(pair[1] + pair[0])
            born.append(merged + merged)
        if right:
            gone.append(pair[1] + right[0])
            born.append(merged + right[0])
    return merged.join(parts), gone, born


def learn_merges(
    counts: dict[str, int], byte_ids: list[int], vocab_size: int
) -> list[tuple[str, str]]:
    """The merges, in order, as (pair, merged): `merged` is chr(id of the new token).

    Each step takes the pair with the highest count, of several the one with the lowest ids, and
    changes the words that hold it, and no others: `where` knows them. The heap keeps outdated
    counts, and puts them right when they come up; that is enough, since a count only falls after
    its pair has been pushed.
    """
    words = [as_tokens(word, byte_ids) for word in counts]
    frequency = list(counts.values())
    pair_count, where = defaultdict(int), defaultdict(list)
    for i, word in enumerate(words):
        for pair in neighbours(word):
            pair_count[pair] += frequency[i]
            where[pair].append(i)
    heap = [(-count, pair) for pair, count in pair_count.items()]
    heapq.heapify(heap)

    merges, next_id = [], max(byte_ids) + 1
    spelling = {chr(token): bytes([byte]) for byte, token in enumerate(byte_ids)}
    token_of = {spelled: token for token, spelled in spelling.items()}
    while heap and next_id < vocab_size:
        count, pair = heapq.heappop(heap)
        if pair_count[pair] != -count:  # outdated
            if pair_count[pair] > 0:
                heapq.heappush(heap, (-pair_count[pair], pair))
            continue
        spelled = spelling[pair[0]] + spelling[pair[1]]
        merged = token_of.setdefault(spelled, chr(next_id))  # "ab"+"c" and "a"+"bc" are one token
        spelling[merged] = spelled
        next_id = max(next_id, ord(merged) + 1)
        merges.append((pair, merged))

        new_where = defaultdict(list)
        for i in dict.fromkeys(where.pop(pair)):  # each word once
            words[i], gone, born = merge_pair(words[i], pair, merged)
            for lost in gone:
                pair_count[lost] -= frequency[i]
            for made in born:
                pair_count[made] += frequency[i]
                new_where[made].append(i)
        pair_count[pair] = 0
        for made, places in new_where.items():
            where[made] += places
            heapq.heappush(heap, (-pair_count[made], made))
    return merges


# --------------------------------------------------------------------------------------------------
# 3. The tokenizer
# --------------------------------------------------------------------------------------------------


class Tokenizer:
    """Text or bytes to token ids and back; every byte string comes back as it was.

    `special` maps special tokens ("<|endoftext|>") to ids. In a text they are plain text, unless
    `encode` is told `allow_special=True`: what a user types must not end a document.
    """

    def __init__(self, byte_ids: list[int], merges: list[tuple[str, str]], special: dict[str, int]):
        """byte_ids: the id of each byte; merges: see `learn_merges`; special: token -> id."""
        self.byte_ids, self.special = byte_ids, special
        self.merges: dict[str, tuple[int, str]] = {}  # pair -> (rank, merged)
        self.spelling = {byte_ids[byte]: bytes([byte]) for byte in range(256)}  # id -> bytes
        for rank, (pair, merged) in enumerate(merges):
            self.merges[pair] = (rank, merged)
            self.spelling[ord(merged)] = self.spelling[ord(pair[0])] + self.spelling[ord(pair[1])]
        self.shown = self.spelling | {token: text.encode() for text, token in special.items()}
        self.vocab_size = max(*self.spelling, *special.values(), 0) + 1
        self.words = _WordCache(self.encode_word)
        longest_first = sorted(special, key=len, reverse=True)
        self.special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    @classmethod
    def train(cls, text_or_iterable, vocab_size: int, special_tokens=()) -> "Tokenizer":
        """Learn merges from a text (str or bytes) or an iterable of texts, which are not joined.

        vocab_size counts special tokens, bytes and merges. A short text may not have enough pairs
        to merge; then `tok.vocab_size` is smaller. Raises ValueError where not even the bytes fit.
        """
        single = isinstance(text_or_iterable, (str, bytes))
        counts = Counter()
        for text in [text_or_iterable] if single else text_or_iterable:
            counts.update(count_words(text))
        return cls.from_counts(counts, vocab_size, special_tokens)

    @classmethod
    def from_counts(cls, counts: dict[str, int], vocab_size: int, special_tokens=()) -> "Tokenizer":
        """Like `train`, from word counts made elsewhere (by several processes, say)."""
        special = {token: i for i, token in enumerate(dict.fromkeys(special_tokens))}
        least = 256 + len(special)
        if vocab_size < least:
            raise ValueError(
                f"a vocabulary of {vocab_size} is too small: the 256 bytes and {len(special)} "
                f"special tokens take {least}; set --vocab_size {least} or more"
            )
        alphabet = byte_alphabet()
        byte_ids = [0] * 256
        for rank, byte in enumerate(sorted(range(256), key=alphabet.__getitem__)):
            byte_ids[byte] = len(special) + rank  # the order of `tokenizers`, which decides ties
        return cls(byte_ids, learn_merges(counts, byte_ids, vocab_size), special)

    def encode(self, text_or_bytes: str | bytes, allow_special: bool = False) -> list[int]:
        """Token ids of a text, or of bytes, UTF-8 or not."""
        text = to_text(text_or_bytes)
        if not (allow_special and self.special):
            return list(chain.from_iterable(map(self.words.__getitem__, split_words(text))))
        ids = []
        for part in self.special_pattern.split(text):
            ids += [self.special[part]] if part in self.special else self.encode(part)
        return ids

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word: of its pairs merge that learned first, everywhere, until none is left.

        The heap holds each pair's rank once: a "word" of a million letters takes seconds, not days.
        """
        word = as_tokens(word, self.byte_ids)
        heap = [(self.merges[pair], pair) for pair in set(neighbours(word)) if pair in self.merges]
        heapq.heapify(heap)
        while heap:
            (_, merged), pair = heapq.heappop(heap)
            if pair not in word:  # an earlier merge consumed it
                continue
            word, _, born = merge_pair(word, pair, merged)
            for made in set(born):
                if made in self.merges:
                    heapq.heappush(heap, (self.merges[made], made))
        return list(map(ord, word))

    def decode_bytes(self, ids) -> bytes:
        """The bytes that the ids spell, special tokens as text. Raises ValueError for other ids."""
        try:
            return b"".join([self.shown[int(token)] for token in ids])
        except KeyError as error:
            raise ValueError(f"id {error} is not in this vocabulary of {self.vocab_size}") from None

    def decode(self, ids) -> str:
        """The text that the ids spell; bytes that are no UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> dict:
        """The content of `tokenizer.json`."""
        alphabet = byte_alphabet()
        shown = {i: "".join(alphabet[byte] for byte in spelled)
                 for i, spelled in self.spelling.items()}
        shown |= {i: token for token, i in self.special.items()}
        flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        byte_level = dict(
            type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [dict(id=i, content=token, **flags)
                             for token, i in self.special.items()],
            "normalizer": None,
            "pre_tokenizer": byte_level,
            "post_processor": None,
            "decoder": byte_level,
            "model": {
                "type": "BPE",
                "vocab": {shown[i]: i for i in sorted(shown)},
                "merges": [[shown[ord(left)], shown[ord(right)]] for left, right in self.merges],
            },
        }

    def save(self, path) -> None:
        """Write the `tokenizer.json` that `tokenizers` and `transformers` open."""
        temporary = f"{path}.{os.getpid()}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(self.to_json(), file, ensure_ascii=False, indent=1)
        os.replace(temporary, path)

    @classmethod
    def load(cls, path) -> "Tokenizer":
        """Read a `tokenizer.json` of byte-level BPE (GPT-2's kind), else raise ValueError."""
        try:
            with open(path, encoding="utf-8") as file:
                return cls._from_json(json.load(file))
        except (KeyError, TypeError, IndexError,
                AttributeError, RecursionError, ValueError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{path} is not the tokenizer.json of a byte-level BPE ({reason})") from None

    @classmethod
    def _from_json(cls, content: dict) -> "Tokenizer":
        model, splitter = content["model"], content["pre_tokenizer"]
        if model["type"] != "BPE" or splitter["type"] != "ByteLevel" or content.get("normalizer"):
            raise ValueError(f"its model is {model['type']}, its splitter {splitter['type']}")
        if splitter.get("add_prefix_space") or not splitter.get("use_regex", True):
            raise ValueError("it splits in another way than GPT-2")
        vocab = model["vocab"]
        special = {token["content"]: token["id"] for token in content.get("added_tokens", [])}
        ids = [*vocab.values(), *special.values()]
        if not all(isinstance(i, int) and 0 <= i <= sys.maxunicode for i in ids):
            raise ValueError("an id is not a number from 0 on")
        merges = []
        for merge in model["merges"]:  # ["a", "b"], or "a b" in older files
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            merges.append((chr(vocab[left]) + chr(vocab[right]), chr(vocab[left + right])))
        return cls([vocab[character] for character in byte_alphabet()], merges, special)


class _WordCache(dict):
    """word -> ids. Words repeat, so most of a text is encoded by looking up."""

    def __init__(self, encode_word, most: int = 1 << 20):
        self.encode_word, self.most = encode_word, most

    def __missing__(self, word: str) -> list[int]:
        if len(self) >= self.most:
            self.clear()
        ids = self[word] = self.encode_word(word)
        return ids
