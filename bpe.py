"""Byte-level byte-pair encoding (BPE): the tokenizer of GPT-2, in one file of plain Python;
and readers for the tokenizers of the published BERT (WordPiece) and T5 (Unigram).

A language model reads numbers, so text has to become numbers and come back unchanged. The two
obvious ways are both wasteful: one number per byte makes long sequences, one per word needs a
number for every word there is. BPE lies between. It starts from the 256 bytes, looks for the pair
of neighbours that occurs most often in a text, makes that pair a token of its own, and repeats:
"h"+"e", " "+"t", " t"+"he", ... After a few thousand merges common words are one token, rare ones
a few, and any byte string at all, emoji or damaged file, can still be spelled.

    counts = count_words(text)            1  split the text by GPT-2's pattern, count the words
    merges = learn_merges(counts, ...)    2  merge the most frequent pair, again and again
    tok.encode(text)                      4  apply the same merges, in the order they were learned

    >>> tok = Tokenizer.train(open("input.txt").read(), 1024, special_tokens=["<|endoftext|>"])
    >>> tok.decode(tok.encode("Once upon a time"))
    'Once upon a time'

(Section 3 is about files and special tokens: leave it out at first.) Ids: special tokens first,
then the 256 bytes, in the order of `byte_alphabet`, then the merges as they were learned. `save`
writes the `tokenizer.json` of the `tokenizers` library, which learns the same merges and gives the
same ids.

A published model has to be fed the ids that it was trained on. Three classes of one interface
(`encode`, `decode`, `special`, `save`, ...) give them, and `Tokenizer.from_pretrained` chooses:

    Tokenizer    GPT-2   sections 1-4   merges, in the order they were learned
    WordPiece    BERT    section 5      of each word the longest piece, then of the rest, ...
    Unigram      T5      section 6      the likeliest of all ways to cut a word into pieces

BPE: Sennrich et al. 2016, https://arxiv.org/abs/1508.07909; bytes: Radford et al. 2019, section 2.2
WordPiece: Devlin et al. 2019, https://arxiv.org/abs/1810.04805, section 3
Unigram: Kudo 2018, https://arxiv.org/abs/1804.10959; SentencePiece: Kudo and Richardson 2018,
https://arxiv.org/abs/1808.06226
"""

import base64
import functools
import heapq
import json
import math
import operator
import os
import re
import struct
import sys
import unicodedata
from array import array
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path
from typing import NamedTuple

# --------------------------------------------------------------------------------------------------
# 1. Splitting: merges never cross the border between two words
# --------------------------------------------------------------------------------------------------

SPACE = "\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"  # White_Space


def code_ranges(listed: str) -> list[tuple[int, int]]:
    """The (first, last) of each range in a list of hex numbers, "9ffd-9fff c5d"."""
    spans = (span.partition("-") for span in listed.split())
    return [(int(first, 16), int(last or first, 16)) for first, _, last in spans]


def is_in(code: int, ranges: list[tuple[int, int]]) -> bool:
    """Whether a code point is in one of the ranges."""
    return any(first <= code <= last for first, last in ranges)


def character_class(ranges) -> str:
    """The ranges, as they are written inside [] of a regular expression."""
    return "".join(rf"\U{first:08x}-\U{last:08x}" for first, last in ranges)


@functools.cache
def word_pattern(limit: int) -> re.Pattern:
    r"""GPT-2's splitting pattern, for text whose characters are all below `limit`:

    `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`

    In words: an English contraction's ending; a run of letters, of numbers, or of anything else,
    each with the one space before it; white space, of which the last space is left to the word that
    follows. `re` has no `\p{L}` (letters) and `\p{N}` (numbers), and its `\w` and `\d` are other
    sets, so both are spelled out.
    """
    # A letter for each code point, "L" for letters, "N" for numbers: a regex finds the runs.
    kinds = bytearray(ord(unicodedata.category(chr(code))[0]) for code in range(limit))
    for kind, spans in (b"L", NEW_LETTERS), (b"N", NEW_NUMBERS):
        for first, last in code_ranges(spans):
            if last < limit:
                kinds[first : last + 1] = kind * (last + 1 - first)

    def characters(kind: bytes) -> str:
        runs = re.finditer(kind + b"+", kinds)
        return character_class((run.start(), run.end() - 1) for run in runs)

    letter, number = characters(b"L"), characters(b"N")
    return re.compile(
        rf" ?[{letter}]+|'(?:[sdmt]|re|ve|ll)| ?[{number}]+| ?[^{SPACE}{letter}{number}]+"
        rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+"
    )


def split_words(text: str) -> list[str]:
    """The words of a text, in order; joined they are the text.

    `re` looks up characters up to U+FFFF in a table, but tries the ranges above one by one, which
    takes three times as long: a text with none above is spared that. No letter is above U+3FFFF.
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
# is a str of length two, merging it is `word.replace(pair, new)` (`merge_pair` does that in parts,
# to see the pairs beside it), and all of that runs at the speed of C.


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
    counts, and puts them right when they come up; that is enough: once its pair has been pushed, a
    count can only fall.
    """
    words = [as_tokens(word, byte_ids) for word in counts]
    frequency = list(counts.values())
    pair_count = defaultdict(int)
    where = defaultdict(lambda: array("I"))  # pair -> the numbers of words that hold it
    for i, word in enumerate(words):
        for pair in neighbours(word):
            pair_count[pair] += frequency[i]
            where[pair].append(i)
    heap = [(-count, pair) for pair, count in pair_count.items()]  # of equals, the lowest ids first
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

        new_where = defaultdict(lambda: array("I"))
        for i in dict.fromkeys(where.pop(pair)):  # each word once
            words[i], gone, born = merge_pair(words[i], pair, merged)
            for lost in gone:
                pair_count[lost] -= frequency[i]
            for made in born:
                pair_count[made] += frequency[i]
                new_where[made].append(i)
        pair_count[pair] = 0
        for made, places in new_where.items():  # from here on their counts only fall
            where[made] += places
            heapq.heappush(heap, (-pair_count[made], made))
    return merges


# --------------------------------------------------------------------------------------------------
# 3. What the three kinds share: special tokens, files, the cache of words
# --------------------------------------------------------------------------------------------------


class AddedToken(NamedTuple):
    """A token that is looked for in the text before it is split; as `tokenizer.json` has it.

    single_word: not inside a word. lstrip, rstrip: the white space beside it is part of it.
    normalized: looked for in the normalised text. special: only where `allow_special=True`.
    """

    id: int
    content: str
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = False
    special: bool = True


class _Finder:
    """Cuts added tokens out of a text. tokens: how each is spelled there -> AddedToken."""

    def __init__(self, tokens: dict[str, AddedToken]):
        self.tokens = tokens = {text: token for text, token in tokens.items() if text}
        self.any_ordinary = not all(token.special for token in tokens.values())
        longest_first = sorted(tokens, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, longest_first)))

    def cut(self, text: str, allow_special: bool) -> list[str | int]:
        """The text in order: the id of each added token, and what stands between them as str."""
        if not self.tokens or not (allow_special or self.any_ordinary):
            return [text]
        parts, done = [], 0
        for match in self.pattern.finditer(text):
            token, (start, end) = self.tokens[match[0]], match.span()
            if token.special and not allow_special:
                continue
            around = text[max(start - 1, 0) : start] + text[end : end + 1]
            if token.single_word and any(map(is_word, around)):
                continue
            while token.lstrip and start > done and IS_SPACE.match(text, start - 1):
                start -= 1
            while token.rstrip and IS_SPACE.match(text, end):
                end += 1
            parts += [text[done:start], token.id]
            done = end
        return [part for part in [*parts, text[done:]] if part != ""]


IS_SPACE = re.compile(f"[{SPACE}]")
CIRCLED_LETTERS = code_ranges("24b6-24e9 1f130-1f149 1f150-1f169 1f170-1f189")


def is_word(character: str) -> bool:
    r"""Whether it is `\w` for `tokenizers`: letters, marks, digits, "_" and its like, joiners."""
    category = unicodedata.category(character)
    return (category[0] in "LM" or category in ("Nd", "Nl", "Pc")
            or character in "\u200c\u200d" or is_in(ord(character), CIRCLED_LETTERS))


class _Cache(dict):
    """key -> function(key). Words repeat, so most of a text is encoded by looking up.

    As a table for `str.translate` the keys are code points.
    """

    def __init__(self, function, most: int = 1 << 20):
        self.function, self.most = function, most

    def __missing__(self, key):
        if len(self) >= self.most:
            self.clear()
        value = self[key] = self.function(key)
        return value


class BaseTokenizer:
    """The interface. Each kind adds `encode_text`, which encodes a text without special tokens,
    and `decode`.

    `special` maps special tokens ("<|endoftext|>") to ids. In a text they are plain text, unless
    `encode` is told `allow_special=True`: what a user types must not end a document. `spelling`
    maps all other ids to the bytes of text that they stand for. Ids are below `vocab_size`; the
    table of embeddings of a published model may have more rows than that.
    """

    def __init__(self, added: list[AddedToken], spelling: dict[int, bytes]):
        self.added = added
        self.special = {token.content: token.id for token in added if token.special}
        hidden = set(self.special.values())
        self.spelling = {token: text for token, text in spelling.items() if token not in hidden}
        self.vocab_size = max(*self.spelling, *(token.id for token in added), 0) + 1
        self.find_raw = _Finder({token.content: token for token in added if not token.normalized})
        spelled = {self.normalize(token.content): token for token in added if token.normalized}
        self.find_normalized = _Finder(spelled)

    def normalize(self, text: str) -> str:
        """What is done to the text before it is split."""
        return text

    def encode(self, text_or_bytes: str | bytes, allow_special: bool = False) -> list[int]:
        """Token ids of a text, or of bytes, UTF-8 or not. Nothing is put before or after them."""
        text, ids = to_text(text_or_bytes), []
        for i, part in enumerate(self.find_raw.cut(text, allow_special)):
            if isinstance(part, int):
                ids.append(part)
                continue
            part = self.normalize(part)
            for j, piece in enumerate(self.find_normalized.cut(part, allow_special)):
                first = i == j == 0  # nothing stands before it
                ids += [piece] if isinstance(piece, int) else self.encode_text(piece, first)
        return ids

    def decode_bytes(self, ids) -> bytes:
        """The bytes that the ids spell, special tokens as text. Raises ValueError for other ids."""
        return self.decode(ids).encode()

    def look_up(self, ids, table: dict) -> list:
        """table[id] of each id; ValueError for an id that is not in it."""
        try:
            return [table[int(token)] for token in ids]
        except KeyError as error:
            raise ValueError(f"id {error} is not in this vocabulary of {self.vocab_size}") from None

    @classmethod
    def from_json(cls, content: dict) -> "BaseTokenizer":
        """From the content of a `tokenizer.json`; what `load` calls. It may raise KeyError,
        TypeError and others, where `load` raises ValueError."""
        return cls(content)

    def to_json(self) -> dict:
        """The content of `tokenizer.json`: as it was read, but without truncation and padding."""
        return {"version": "1.0", **self.content, "truncation": None, "padding": None}

    def save(self, path) -> None:
        """Write the `tokenizer.json` that `tokenizers` and `transformers` open."""
        temporary = f"{path}.{os.getpid()}.tmp"
        try:
            with open(temporary, "w", encoding="utf-8") as file:
                json.dump(self.to_json(), file, ensure_ascii=False, indent=1)
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)

    @staticmethod
    def load(path) -> "BaseTokenizer":
        """Read a `tokenizer.json`, or SentencePiece's `spiece.model`: a tokenizer of its kind.

        Raises ValueError where it is another file, or of a kind that is not one of the three.
        """
        binary = str(path).endswith(".model")
        try:
            data = Path(path).read_bytes()
            content = sentencepiece_json(data) if binary else json.loads(data)
            if rb"\ud" in data.lower():
                json.dumps(content, ensure_ascii=False).encode()  # half a character: ValueError
            model = content["model"]
            kind = model.get("type") or (  # older files do not say
                "BPE" if "merges" in model else "WordPiece" if "unk_token" in model else "Unigram")
            return {"BPE": Tokenizer, "WordPiece": WordPiece, "Unigram": Unigram}[kind].from_json(
                content)
        except (LookupError, TypeError, AttributeError, ArithmeticError, RecursionError,
                ValueError, struct.error) as error:
            reason = f"{type(error).__name__}: {error}"
            name = "spiece.model of T5" if binary else "tokenizer.json of a byte-level BPE (GPT-2)"
            name += "" if binary else ", WordPiece (BERT) or Unigram (T5)"
            raise ValueError(f"{path} is not the {name} ({reason})") from None

    @classmethod
    def from_pretrained(cls, name_or_folder) -> "BaseTokenizer":
        """The tokenizer of a folder (tokenizer.json, else spiece.model) or of a model's name."""
        folder = Path(name_or_folder)
        if not folder.is_dir():
            from data import pretrained_folder  # it downloads; a folder is read without it

            folder = Path(pretrained_folder(name_or_folder))
        for name in ("tokenizer.json", "spiece.model"):
            if (folder / name).exists():
                return cls.load(folder / name)
        raise ValueError(f"{folder} has no tokenizer.json and no spiece.model")


def added_tokens(content: dict, vocab: dict[str, int]) -> list[AddedToken]:
    """The added tokens of a `tokenizer.json`. Raises ValueError unless they and the vocabulary
    (token -> id) have the ids 0, 1, 2, ... together, each once."""
    added = [AddedToken(**token) for token in content.get("added_tokens") or []]
    ids = list((vocab | {token.content: token.id for token in added}).values())
    if any(vocab.get(token.content, token.id) != token.id for token in added):
        raise ValueError("an added token has two ids")
    if not all(type(i) is int for i in ids) or sorted(ids) != list(range(len(ids))):
        raise ValueError("its ids are not 0, 1, 2, ..., each once")
    return added


# --------------------------------------------------------------------------------------------------
# 4. GPT-2's tokenizer
# --------------------------------------------------------------------------------------------------


class Tokenizer(BaseTokenizer):
    """Byte-level BPE. Text or bytes to token ids and back; every byte string comes back as it was.

    `Tokenizer.load` and `Tokenizer.from_pretrained` open the files of the other kinds, too.
    """

    def __init__(self, byte_ids: list[int], merges: list[tuple[str, str]], added: list[AddedToken],
                 spelling: dict[int, bytes] | None = None):
        """byte_ids: the id of each byte; merges: see `learn_merges`; spelling: of all tokens of a
        file, even those that no merge makes."""
        self.byte_ids = byte_ids
        self.merges: dict[str, tuple[int, str]] = {}  # pair -> (rank, merged)
        spelling = (spelling or {}) | {byte_ids[byte]: bytes([byte]) for byte in range(256)}
        for rank, (pair, merged) in enumerate(merges):
            self.merges[pair] = (rank, merged)
            spelling[ord(merged)] = spelling[ord(pair[0])] + spelling[ord(pair[1])]
        self.shown = spelling | {token.id: token.content.encode() for token in added}  # special too
        self.words = _Cache(self.encode_word)
        super().__init__(added, self.shown)

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
        special = [AddedToken(i, token) for i, token in enumerate(dict.fromkeys(special_tokens))]
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

    def encode_text(self, text: str, first: bool) -> list[int]:
        """Ids of a text without special tokens."""
        return list(chain.from_iterable(map(self.words.__getitem__, split_words(text))))

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word: while it has pairs that were learned, merge the one learned first,
        wherever it stands.

        The heap holds each pair once, so no round looks at all of them again: a "word" of a million
        letters takes seconds, not days.
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
        return b"".join(self.look_up(ids, self.shown))

    def decode(self, ids) -> str:
        """The text that the ids spell; bytes that are no UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def to_json(self) -> dict:
        """The content of `tokenizer.json`."""
        alphabet = byte_alphabet()
        shown = {i: "".join(alphabet[byte] for byte in spelled)
                 for i, spelled in self.spelling.items()}
        shown |= {token.id: token.content for token in self.added}
        byte_level = dict(
            type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [token._asdict() for token in self.added],
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

    @classmethod
    def from_json(cls, content: dict) -> "Tokenizer":
        """From the content of a `tokenizer.json` that splits and merges as GPT-2 does."""
        model, splitter = content["model"], content["pre_tokenizer"]
        if splitter["type"] != "ByteLevel" or content.get("normalizer"):
            raise ValueError(f"its splitter is {splitter['type']}")
        if splitter.get("add_prefix_space") or not splitter.get("use_regex", True):
            raise ValueError("it splits in another way than GPT-2")
        for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout",
                       "byte_fallback", "ignore_merges"):
            if model.get(option):
                raise ValueError(f"its merges have the option {option}")
        vocab = model["vocab"]
        added = added_tokens(content, vocab)
        if len(vocab) + len(added) > sys.maxunicode:  # an id is a character in `merges`
            raise ValueError("it has over a million tokens")
        merges = []
        for merge in model["merges"]:  # ["a", "b"], or "a b" in older files
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            merges.append((chr(vocab[left]) + chr(vocab[right]), chr(vocab[left + right])))
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        names = {token.content for token in added}
        spelling = {i: bytes(byte_of[character] for character in token)
                    for token, i in vocab.items() if token not in names}
        return cls([vocab[character] for character in byte_of], merges, added, spelling)


# --------------------------------------------------------------------------------------------------
# 5. BERT's tokenizer
# --------------------------------------------------------------------------------------------------
# BERT's text is cleaned, in the uncased models also lower-cased and freed of accents, and cut at
# white space and punctuation: the way back gives "don ' t" for "Don't". Which characters are marks,
# punctuation or controls `tokenizers` knows from Unicode 8, how they decompose from Unicode 9. What
# came later is an ordinary character to it (the ranges may also span characters of no such kind):

NEW_MARKS = code_ranges("""5c8-5c9 7fd 897-8e1 9fe afa-aff b53-b55 c04-c3c d00 d3b-d3c d81 eba ece
180f-1886 1abf-1af0 1df6-1dfb a82c a8c5 a8ff a9bd 10d24-10f85 11070-11074 110c2 111c9 111cf
1123e-11241 1133b 113bb-1145e 1182f-1612f 16f4f 16fe4 1cf00-1d128 1d25b-1d25c 1e000-1e6f5
1e944-1e94a""")
NEW_PUNCTUATION = code_ranges("""61d 9fd-a76 c77-c84 1b4e-1b4f 1b7d-1b7f 2e43-2e63 10d6e-10f89
113d4-1145d 11660-116b9 1183b-11fff 12ff1-12ff2 16d6d-16fe2 1e5ff-1e95f""")
NEW_CONTROLS = code_ranges("890-891 8e2 110cd 13430-1343f")
NEW_DECOMPOSITIONS = code_ranges("""558 58b-58c 5c8-5c9 7fd 897-8d3 9fe c3c d3b-d3c eba 1715
1abf-1af0 1df6-1dfa 209d-209f 32ff a7f1-a7f4 a82c ab69 105c9-107bf 10d24-10f85 11070 1133b
11383-113d0 1145e 11839-11a99 11d42-1612f 16d67-1b126 1ccd6-1d128 1d250-1d281 1d6a6 1df95-1dfff
1e030-1e6f5 1f16c 1fbf0-1fbf9""")
# Capitals that Unicode gained from version 14 to 17, and the small letters of the first of each.
NEW_CAPITALS = """1c89:1c8a 2c2f:2c5f a7c0:a7c1 a7cb:264 a7cc:a7cd a7ce:a7cf a7d0:a7d1 a7d2:a7d3
a7d4:a7d5 a7d6:a7d7 a7d8:a7d9 a7da:a7db a7dc:19b 10570-1057a:10597 1057c-1058a:105a3
1058c-10592:105b3 10594-10595:105bb 10d50-10d65:10d70 16ea0-16eb8:16ebb"""

CHINESE = code_ranges(
    "3400-4dbf 4e00-9fff f900-faff 20000-2a6df 2a700-2b73f 2b740-2b81f 2b920-2ceaf 2f800-2fa1f")

OLD_TEXT = re.compile(f"[^{character_class(NEW_DECOMPOSITIONS)}]+")
SMALL_LETTERS = {
    code: int(small, 16) + code - first
    for capitals, small in (pair.split(":") for pair in NEW_CAPITALS.split())
    for first, last in code_ranges(capitals) for code in range(first, last + 1)
}


def unicode_form(form: str, text: str) -> str:
    """unicodedata.normalize; new characters stay as they are, and nothing moves past them."""
    if text.isascii():
        return text
    return OLD_TEXT.sub(lambda old: unicodedata.normalize(form, old[0]), text)


def lower_case(text: str) -> str:
    """Each character by itself: `str.lower` would give the last capital sigma of a word a form of
    its own."""
    return text.replace("Σ", "σ").translate(SMALL_LETTERS).lower()


# Four tables for str.translate: what becomes of a character is found out when it first occurs.


@_Cache
def without_controls(code: int) -> str | None:
    """Control characters are dropped; white space that is none of them becomes a space."""
    character = chr(code)
    if character in "\t\n\r":
        return " "
    is_control = unicodedata.category(character) in ("Cc", "Cf", "Co")
    if code == 0xFFFD or is_control and not is_in(code, NEW_CONTROLS):
        return None
    return " " if IS_SPACE.match(character) else character


@_Cache
def chinese_apart(code: int) -> str:
    """Spaces around each Chinese character: it is a word."""
    return f" {chr(code)} " if is_in(code, CHINESE) else chr(code)


@_Cache
def without_marks(code: int) -> str | None:
    """Accents are dropped, if they stand by themselves: after NFD."""
    is_mark = unicodedata.category(chr(code)) == "Mn" or code in (0x1734, 0x1171E)  # Mc by now
    return None if is_mark and not is_in(code, NEW_MARKS) else chr(code)


@_Cache
def punctuation_apart(code: int) -> str:
    """Spaces around each punctuation mark; of ASCII, all that is no letter, digit or control."""
    category = unicodedata.category(chr(code))
    is_punctuation = category[0] == "P" or code < 128 and category[0] == "S"
    is_punctuation &= not is_in(code, NEW_PUNCTUATION)
    return f" {chr(code)} " if is_punctuation or code in (0x166D, 0x111C9) else chr(code)


def valid_text(text: str) -> str:
    """The text without surrogates: a byte that is not UTF-8 becomes U+FFFD."""
    return to_bytes(text).decode("utf-8", "replace")


class WordPiece(BaseTokenizer):
    """BERT's tokenizer. It is not reversible: white space, and in the uncased models capitals and
    accents, are lost, and a word with a character that the vocabulary lacks becomes [UNK]."""

    def __init__(self, content: dict):
        """content: of a `tokenizer.json`."""
        self.content, model = content, content["model"]
        steps = content.get("normalizer") or dict.fromkeys(
            ("clean_text", "handle_chinese_chars", "strip_accents", "lowercase"), False)
        if content["pre_tokenizer"]["type"] != "BertPreTokenizer":
            raise ValueError(f"its splitter is {content['pre_tokenizer']['type']}")
        if steps.get("type", "BertNormalizer") != "BertNormalizer":
            raise ValueError(f"its normalizer is {steps['type']}")
        self.clean, self.chinese = steps["clean_text"], steps["handle_chinese_chars"]
        self.lower, self.strip = steps["lowercase"], steps.get("strip_accents")
        self.strip = self.lower if self.strip is None else self.strip
        decoder = content.get("decoder") or dict(type="WordPiece", prefix="##", cleanup=True)
        if decoder["type"] != "WordPiece":
            raise ValueError(f"its decoder is {decoder['type']}")
        self.shown_prefix, self.cleanup = str(decoder["prefix"]), decoder["cleanup"]

        vocab, added = model["vocab"], added_tokens(content, model["vocab"])
        self.unk_id = vocab[model["unk_token"]]
        self.prefix = model.get("continuing_subword_prefix", "##")
        self.most = int(model.get("max_input_chars_per_word", 100))
        self.longest = max(map(len, vocab))
        special = {token.content for token in added if token.special}
        self.pieces = {piece: i for piece, i in vocab.items() if piece not in special}
        self.words = _Cache(self.encode_word)
        self.tokens = {i: piece for piece, i in vocab.items()}
        self.tokens |= {token.id: token.content for token in added}
        super().__init__(added, {i: token.removeprefix(self.prefix).encode()
                                 for i, token in self.tokens.items()})

    def normalize(self, text: str) -> str:
        """Cleaned, and for the uncased models without accents and capitals."""
        text = valid_text(text)
        if self.clean:
            text = text.translate(without_controls)
        if self.chinese:
            text = text.translate(chinese_apart)
        if self.strip:
            text = unicode_form("NFD", text).translate(without_marks)
        return lower_case(text) if self.lower else text

    def encode_text(self, text: str, first: bool) -> list[int]:
        """Ids of a normalised text without special tokens."""
        return list(chain.from_iterable(map(self.words.__getitem__, SPACES.split(text))))

    def encode_word(self, word: str) -> list[int]:
        """Ids of what stands between two spaces, cut at punctuation first."""
        parts = word.translate(punctuation_apart).split(" ")
        return list(chain.from_iterable(map(self.cut_word, parts)))

    def cut_word(self, word: str) -> list[int]:
        """The longest piece that the word begins with, then that of the rest, and so on.

        "unaffable" -> "un", "##aff", "##able"; [UNK] for the whole word where a rest has none.
        """
        ids, start = [], 0
        if len(word) > self.most:
            return [self.unk_id]
        while start < len(word):
            prefix = self.prefix if start else ""
            for end in range(min(len(word), start + self.longest), start, -1):
                if prefix + word[start:end] in self.pieces:
                    break
            else:
                return [self.unk_id]
            ids.append(self.pieces[prefix + word[start:end]])
            start = end
        return ids

    def decode(self, ids) -> str:
        """The words, with spaces between them but before most punctuation."""
        text = []
        for token in self.look_up(ids, self.tokens):
            if text:
                goes_on = token.startswith(self.shown_prefix)
                token = token.removeprefix(self.shown_prefix) if goes_on else " " + token
            for spaced, joined in JOINED if self.cleanup else ():
                token = token.replace(spaced, joined)
            text.append(token)
        return "".join(text)


SPACES = re.compile(f"[{SPACE}]+")
JOINED = [(" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"),
          (" 'm", "'m"), (" do not", " don't"), (" 's", "'s"), (" 've", "'ve"), (" 're", "'re")]


# --------------------------------------------------------------------------------------------------
# 6. T5's tokenizer
# --------------------------------------------------------------------------------------------------
# Each piece has a score, the logarithm of its probability. Of all the ways to cut a word into
# pieces the one with the highest sum is taken. A space is written as "▁" and belongs to the word
# that follows, so text comes back, but for what the normaliser has changed.

UNKNOWN_PENALTY = 10.0  # an unknown character is that much worse than the worst piece


class Unigram(BaseTokenizer):
    """T5's tokenizer: "▁Hello", "▁world". Characters that no piece has become <unk>.

    T5 lists its special tokens among the pieces, with scores. They are left out of the search here,
    or a typed "</s>" would end a text, as it does in the library.
    """

    def __init__(self, content: dict):
        """content: of a `tokenizer.json`."""
        self.content, model = content, content["model"]
        if model.get("byte_fallback"):
            raise ValueError("it spells unknown characters as bytes")
        self.normalizer = normalizer_of(content.get("normalizer"))
        self.by_space, self.space, self.scheme, self.split = metaspace_of(content["pre_tokenizer"])
        _, self.shown_space, self.shown_scheme, _ = metaspace_of(content["decoder"])
        strips = self.by_space or self.normalizer(" a") == self.normalizer("a")
        if self.scheme == "first" and strips:  # then the library marks some first words, not all
            raise ValueError("it strips a text and marks its first word alone")

        scores = [float(score) for _, score in model["vocab"]]
        if not all(map(math.isfinite, scores)):
            raise ValueError("a score is not a number")
        vocab = {piece: i for i, (piece, _) in enumerate(model["vocab"])}
        if len(vocab) < len(scores):
            raise ValueError("a piece is there twice")
        added = added_tokens(content, vocab)
        unknown = model["vocab"][model["unk_id"]][0]
        self.unk_id = vocab[unknown]
        self.unk_score = min(scores) - UNKNOWN_PENALTY
        hidden = {"", unknown, *(token.content for token in added if token.special)}
        self.pieces = {piece: (i, score) for (piece, i), score in zip(vocab.items(), scores)
                       if piece not in hidden}
        self.lengths = sorted(set(map(len, self.pieces)))
        self.cut_words = re.compile(f"{self.space}[^{self.space}]*|[^{self.space}]+").findall
        self.words = _Cache(self.encode_word)
        self.tokens = {i: piece for piece, i in vocab.items()}
        self.tokens |= {token.id: token.content for token in added}
        super().__init__(added, {i: token.replace(self.space, " ").encode()
                                 for i, token in self.tokens.items()})

    def normalize(self, text: str) -> str:
        """What the file's normaliser makes of a text."""
        return self.normalizer(valid_text(text))

    def encode_text(self, text: str, first: bool) -> list[int]:
        """Ids of a normalised text without special tokens. first: nothing stands before it."""
        ids = []
        prepend = self.scheme == "always" or self.scheme == "first" and first
        for part in SPACES.split(text) if self.by_space else [text]:
            part = part.replace(" ", self.space)
            if part and prepend and not part.startswith(self.space):
                part = self.space + part
            if self.split:
                ids += chain.from_iterable(map(self.words.__getitem__, self.cut_words(part)))
            else:  # a piece may go across words, and unknown characters are neighbours across them
                ids += self.encode_word(part)
        return ids

    def encode_word(self, word: str) -> list[int]:
        """Ids of the best cut (Viterbi): the best way to reach a place in the word is the best way
        to reach the beginning of the last piece, and that piece.

        Neighbouring unknown characters are one <unk>.
        """
        best = [0.0] + [-math.inf] * len(word)  # the sum of the scores up to each place
        begin = [0] * len(best)  # where the last piece of the best way there begins
        for start in range(len(word)):
            for length in self.lengths:
                end = start + length
                if end > len(word):
                    break
                piece = self.pieces.get(word[start:end])
                if piece and best[start] + piece[1] > best[end]:
                    best[end], begin[end] = best[start] + piece[1], start
            unknown = word[start] not in self.pieces
            if unknown and best[start] + self.unk_score > best[start + 1]:
                best[start + 1], begin[start + 1] = best[start] + self.unk_score, start

        ids, end = [], len(word)
        while end:
            known = self.pieces.get(word[begin[end] : end])
            if known or not ids or ids[-1] != self.unk_id:
                ids.append(known[0] if known else self.unk_id)
            end = begin[end]
        return ids[::-1]

    def decode(self, ids) -> str:
        """The text that the ids spell, without the space before its first word."""
        tokens = self.look_up(ids, self.tokens)
        if tokens and self.shown_scheme != "never":
            tokens[0] = tokens[0].replace(self.shown_space, "")
        return "".join(tokens).replace(self.shown_space, " ")


def metaspace_of(spec: dict) -> tuple[bool, str, str, bool]:
    """How a file marks spaces: (is the text cut at white space first?, what a space becomes, where
    one is put before the text: "always", "first" or "never", is the text cut before each?)."""
    *before, metaspace = spec["pretokenizers"] if spec["type"] == "Sequence" else [spec]
    kinds = [step["type"] for step in (*before, metaspace)]
    if kinds not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"]):
        raise ValueError(f"its splitter or decoder is {', '.join(kinds)}")
    older = "never" if metaspace.get("add_prefix_space") is False else "always"
    scheme, space = metaspace.get("prepend_scheme", older), metaspace["replacement"]
    if scheme not in ("always", "first", "never") or not re.fullmatch(r"[^\\\]^-]", space):
        raise ValueError(f"it marks spaces by {space!r}, {scheme}")
    return bool(before), space, scheme, metaspace.get("split") is not False


def normalizer_of(spec: dict | None):
    """The function str -> str that the "normalizer" of a file describes. Raises ValueError where it
    is none of T5's, KeyError and others where the file is damaged."""
    kind = spec["type"] if spec else None
    if kind == "Sequence":
        steps = [normalizer_of(step) for step in spec["normalizers"]]
        return lambda text: functools.reduce(lambda done, step: step(done), steps, text)
    if kind == "Precompiled":
        return by_rules(read_charsmap(base64.b64decode(spec["precompiled_charsmap"])))
    if kind == "Replace":
        (how, pattern), = spec["pattern"].items()
        if how == "Regex" and not re.fullmatch(r" (\{\d,\}|\+)?", pattern) or not pattern:
            raise ValueError(f"its normalizer replaces {pattern!r}")
        found, new = re.compile(pattern if how == "Regex" else re.escape(pattern)), spec["content"]
        if type(new) is not str:
            raise ValueError("its normalizer replaces by no text")
        return lambda text: found.sub(lambda match: new, text)
    if kind == "Strip":
        left, right = (SPACE_LIST if spec[side] else "" for side in ("strip_left", "strip_right"))
        return lambda text: text.lstrip(left).rstrip(right)
    if kind == "NFKC":
        return lambda text: unicode_form("NFKC", text)
    if kind is not None:
        raise ValueError(f"its normalizer is {kind}")
    return str


SPACE_LIST = "".join(filter(IS_SPACE.match, map(chr, range(0x3001))))


# SentencePiece compiles its normaliser into a map from strings to strings: a "double array" (a tree
# in one list of numbers) that leads from the bytes of a key to a place in a text, where what it
# becomes stands, up to a zero byte.


def read_charsmap(data: bytes) -> dict[str, str]:
    """The map as key -> what it becomes. Raises ValueError (or struct.error) where it is damaged.

    A key that begins with another key is left out, since the shorter one is found first; so are
    keys above 5 bytes, which `by_rules` does not look for.
    """
    size, = struct.unpack_from("<I", data)
    units = struct.unpack_from(f"<{size // 4}I", data, 4)
    text = data[4 + size // 4 * 4 :]
    children = defaultdict(list)  # a node's base -> (byte, place) of each node below it
    for place, unit in enumerate(units):
        if not unit >> 31 and unit & 0xFF:
            children[place ^ unit & 0xFF].append((unit & 0xFF, place))

    def base(place: int) -> int:
        found = place ^ (units[place] >> 10 << (units[place] >> 6 & 8))
        if found >= len(units):
            raise ValueError("a place in its charsmap is out of range")
        return found

    rules, nodes = {}, [(b"", base(0))]
    for key, at in nodes:  # the list grows while we go through it
        for byte, place in children[at] if len(key) < 5 else ():
            longer = key + bytes([byte])
            if units[place] >> 8 & 1:  # a key ends here
                start = units[base(place)] & 0x7FFFFFFF
                if start >= len(text):
                    raise ValueError("a place in its charsmap is out of range")
                rules[longer.decode()] = text[start:].partition(b"\0")[0].decode()
            else:
                nodes.append((longer, base(place)))
        if len(nodes) + len(rules) > len(units):
            raise ValueError("its charsmap is no tree")
    return rules


# The map is applied to what a reader sees as one character: a letter with its accents, say
# (Unicode's "grapheme clusters"). What joins the character before it are marks (category M)
# without APART, and JOINED_TOO, in which are the marks of Unicode 14 to 16.
APART = code_ranges("""5c8-5c9 b53-b54 102b-102c 1038 1062-106d 1083 1087-108c 108f-109c 1a61
1a63-1a64 1ade-1adf 1aec-1af0 aa7b aa7d 10ecb-10ef9 11720-11721 11df0 1d127-1d128 1d250-1d281""")
JOINED_TOO = code_ranges("""897-89f 8ca-8d2 c3c cf3 e33 eb3 ece 1715 1734 180f 1ac1-1add 1ae0-1aeb
1dfa 200c-200d ff9e-ff9f 10d69-10d6d 10efa-10eff 10f82-10f85 11070 11073-11074 110c2 11241
113b8-113d0 113d2 113e1-113e2 11b60-11b67 11f00-11f01 11f03 11f34-11f42 11f5a 13440 13447-13455
1611e-1612f 1cf00-1cf46 1e08f 1e2ae 1e4ec-1e4ef 1e5ee-1e5ef 1e6e3 1e6e6 1e6ee-1e6ef 1e6f5
1f3fb-1f3ff e0020-e007f""")
JOINING_NEXT = code_ranges("""600-605 6dd 70f 890-891 8e2 d4e 110bd 110cd 111c2-111c3 113d1 1193f
11941 11a84-11a89 11d46 11f02""")
ALONE = code_ranges("""0-1f 7f-9f ad 61c 180e 200b 200e-200f 2028-202e 2060-206f feff fff0-fffb
13430-1343f 1bca0-1bca3 1d173-1d17a e0000-e001f e0080-e00ff e01f0-e0fff""")


@functools.cache
def cluster_pattern() -> re.Pattern:
    """Finds the grapheme clusters of a text (Unicode 16). Those above 5 bytes may come in parts."""
    marks = bytearray(0xE0200)
    for code in chain(range(0x300, 0x1F000), range(0xE0100, 0xE01F0)):
        marks[code] = unicodedata.category(chr(code))[0] == "M"
    for joins, ranges in (b"\0", APART), (b"\1", JOINED_TOO):
        for first, last in ranges:
            marks[first : last + 1] = joins * (last + 1 - first)
    joining = character_class([(run.start(), run.end() - 1) for run in re.finditer(b"\1+", marks)])
    before, alone = character_class(JOINING_NEXT), character_class(ALONE)
    return re.compile(
        rf"\r\n|[\0-\x7f](?![^\0-\x7f])|[{before}]*[^{alone}][{joining}]*|.", re.DOTALL)


def by_rules(rules: dict[str, str]):
    """The normaliser str -> str of a charsmap, with a trait of the library: where a cluster of up
    to 5 bytes *begins* with a key, the whole cluster becomes what the key becomes."""

    def replace(cluster: str) -> str:
        if len(cluster.encode()) < 6:
            for end in range(1, len(cluster) + 1):
                if cluster[:end] in rules:
                    return rules[cluster[:end]]
        return "".join(rules.get(character, character) for character in cluster)

    replaced = _Cache(replace)
    return lambda text: "".join(map(replaced.__getitem__, cluster_pattern().findall(text)))


# --------------------------------------------------------------------------------------------------
# 7. spiece.model
# --------------------------------------------------------------------------------------------------


def protobuf_fields(data: bytes) -> dict[int, list]:
    """The fields of a protobuf message: number -> values in order, int, float or bytes."""
    fields, at = defaultdict(list), 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while shift < 64:
            byte, at = data[at], at + 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value
        raise ValueError("a number in it has no end")

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            value = varint()
        elif wire == 2:
            size = varint()
            value, at = data[at : at + size], at + size
        elif wire == 5:
            (value,), at = struct.unpack_from("<f", data, at), at + 4
        elif wire == 1:
            (value,), at = struct.unpack_from("<d", data, at), at + 8
        else:
            raise ValueError(f"wire type {wire}")
        if at > len(data):
            raise ValueError("it ends in the middle of a field")
        fields[number].append(value)
    return fields


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # types of pieces


def sentencepiece_json(data: bytes, n_sentinels: int = 100) -> dict:
    """The content of SentencePiece's model file as that of a `tokenizer.json`.

    T5's sentinels are not in it: <extra_id_0> is the last id, <extra_id_99> follows the pieces.
    """
    message = protobuf_fields(data)
    trainer = protobuf_fields(b"".join(message[2]))  # a message in parts is one message
    normalizer = protobuf_fields(b"".join(message[3]))
    if trainer[3][-1:] not in ([], [1]) or trainer[24][-1:] not in ([], [0]):
        raise ValueError("it is no Unigram model, or puts spaces after the word")
    pieces = [protobuf_fields(piece) for piece in message[1]]
    vocab = [[piece[1][-1].decode(), float((piece[2] or [0])[-1])] for piece in pieces]
    kinds = [(piece[3] or [NORMAL])[-1] for piece in pieces]
    if kinds.count(UNKNOWN) != 1 or UNUSED in kinds or BYTE in kinds:
        raise ValueError("it has not one unknown piece, or unused ones, or spells bytes")
    if not any(name == "<extra_id_0>" for name, _ in vocab):
        vocab += [[f"<extra_id_{i}>", 0.0] for i in reversed(range(n_sentinels))]
        kinds += [CONTROL] * n_sentinels
    added = [AddedToken(i, name, special=kind != USER_DEFINED)._asdict()
             for i, ((name, _), kind) in enumerate(zip(vocab, kinds))
             if kind in (UNKNOWN, CONTROL, USER_DEFINED)]

    charsmap = b"".join(normalizer[2][-1:])
    metaspace = dict(type="Metaspace", replacement="▁", split=True,
                     prepend_scheme="always" if normalizer[3][-1:] != [0] else "never")
    splitters = [dict(type="WhitespaceSplit")] if normalizer[4][-1:] != [0] else []
    return dict(
        added_tokens=added,
        normalizer=charsmap and dict(
            type="Precompiled", precompiled_charsmap=base64.b64encode(charsmap).decode()) or None,
        pre_tokenizer=dict(type="Sequence", pretokenizers=[*splitters, metaspace]),
        post_processor=None,
        decoder=metaspace,
        model=dict(type="Unigram", unk_id=kinds.index(UNKNOWN), vocab=vocab, byte_fallback=False),
    )


# --------------------------------------------------------------------------------------------------
# 8. Later characters, for `word_pattern`
# --------------------------------------------------------------------------------------------------

# Letters and numbers that Unicode gained from version 13 (Python 3.10) to 16, as hex ranges: with
# them Python 3.10 to 3.14 split alike.
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
