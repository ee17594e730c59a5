"""Byte-level byte-pair encoding (BPE): the tokenizer of GPT-2, in one file of plain Python;
and readers for the tokenizers of the published BERT (WordPiece) and T5 (Unigram).

A language model reads numbers, so text has to become numbers and come back unchanged. The two
obvious ways are both wasteful: one number per byte makes long sequences, one per word needs a
number for every word there is. BPE lies between. It starts from the 256 bytes, looks for the pair
of neighbours that occurs most often in a text, makes that pair a token of its own, and repeats:
"h"+"e", " "+"t", " t"+"he", ... After a few thousand merges common words are one token and rare
ones a few, and any bytes at all can still be spelled.

    counts = count_words(text)            1  split the text by GPT-2's pattern, count the words
    merges = learn_merges(counts, ...)    2  merge the most frequent pair, again and again
    tok.encode(text)                      3  apply the same merges, in the order they were learned

    >>> tok = Tokenizer.train(open("input.txt").read(), 1024, special_tokens=["<|endoftext|>"])
    >>> tok.decode(tok.encode("Once upon a time"))
    'Once upon a time'

Ids: special tokens first, then the 256 bytes in the order of `byte_alphabet`, then the merges as
they were learned. The `tokenizers` library learns the same merges and gives the same ids; `save`
writes its `tokenizer.json`. A published model has to be fed the ids that it was trained on:

    Tokenizer  GPT-2  sections 1-3  merges, in the order they were learned: arxiv.org/abs/1508.07909
    WordPiece  BERT   section 4     of each word the longest piece, then of the rest: .../1810.04805
    Unigram    T5     section 5     the likeliest of all ways to cut a word: .../1804.10959
"""

import base64
import functools
import heapq
import json
import operator
import re
import sys
import unicodedata
from array import array
from collections import Counter, defaultdict
from itertools import chain
from pathlib import Path

# 1. Splitting: merges never cross the border between two words ------------------------------------

SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B)))
SPACE += "\u2028\u2029\u202f\u205f\u3000"  # Python's \s also has the controls U+001C to U+001F


@functools.cache
def characters(kinds: str | tuple, limit: int) -> str:
    """The characters below `limit` whose Unicode category begins with `kinds`, as in [] of `re`."""
    # characters("L", 128) is r"\U00000041-\U0000005a\U00000061-\U0000007a", which is A-Za-z.
    names = list(map(unicodedata.category, map(chr, range(limit))))  # of Python's own tables
    inside = {name: "x" if name.startswith(kinds) else "." for name in set(names)}
    runs = re.finditer("x+", "".join(map(inside.get, names)))
    return "".join(rf"\U{run.start():08x}-\U{run.end() - 1:08x}" for run in runs)


@functools.cache
def word_pattern(limit: int) -> re.Pattern:
    r"""GPT-2's splitting pattern, for text whose characters are all below `limit`:

    `'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+`

    An English contraction's ending; a run of letters (\p{L}), numbers (\p{N}) or anything else with
    the one space before it; white space, whose last space is left to the word that follows.
    """
    letter, number = characters("L", limit), characters("N", limit)  # `re` has no \p{...}
    return re.compile(
        rf" ?[{letter}]+|'(?:[sdmt]|re|ve|ll)| ?[{number}]+| ?[^{SPACE}{letter}{number}]+"
        rf"|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")


def split_words(text: str) -> list[str]:
    """The words of a text, in order; joined they are the text.

    >>> split_words("Don't we go,  2 of us?")
    ['Don', "'t", ' we', ' go', ',', ' ', ' 2', ' of', ' us', '?']
    """
    # For characters up to U+FFFF `re` makes a table: 10 ms, which text in ASCII is spared. It tries
    # the ranges above one by one, three times as slowly. (No letter is above U+3FFFF.)
    limit = 128 if text.isascii() else 0x40000 if re.search("[^\0-\uffff]", text) else 0x10000
    return word_pattern(limit).findall(text)


def to_text(text: str | bytes) -> str:
    """Bytes as a str that `to_bytes` turns back; a byte that is not UTF-8 becomes U+DC80-DCFF."""
    return text if isinstance(text, str) else bytes(text).decode("utf-8", "surrogateescape")


def to_bytes(text: str) -> bytes:
    """UTF-8. Lone surrogates (no characters) become `?` unless `to_text` made them out of bytes."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def count_words(text_or_bytes: str | bytes) -> Counter:
    """How often each word of the text occurs: word (str, with the space before it) -> count."""
    return Counter(split_words(to_text(text_or_bytes)))


# 2. Learning the merges ---------------------------------------------------------------------------
# While we merge, a word is a str whose characters are token ids: chr(id). Then a pair of neighbours
# is a str of length two, merging it is `word.replace(pair, new)` (`merge_pair` does that in parts,
# to see the pairs beside it), and all of that runs at the speed of C.


def byte_alphabet() -> list[str]:
    """256 printable characters, one per byte, in which `tokenizer.json` spells its tokens."""
    # As in GPT-2's `encoder.py` printable bytes stand for themselves; the other 68 are moved up to
    # U+0100 and on: space is "Ġ".
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}  # ! to ~, ¡ to ¬, ® to ÿ
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


def as_tokens(word: str, byte_ids: list[int]) -> str:
    """The word's UTF-8 bytes, each as the character of its id; nothing is merged yet."""
    return to_bytes(word).decode("latin-1").translate(byte_ids)  # latin-1: byte 65 is chr(65)


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


def learn_merges(counts: dict, byte_ids: list[int], vocab_size: int) -> list[tuple[str, str]]:
    """The merges, in order, as (pair, merged): `merged` is chr(id of the new token).

    counts: word -> how often it occurs; byte_ids: the id of each byte. Each step takes the pair
    with the highest count, of several the one with the lowest ids.
    """
    words = [as_tokens(word, byte_ids) for word in counts]
    frequency = list(counts.values())
    pair_count, where = defaultdict(int), defaultdict(lambda: array("I"))  # where: numbers of words
    for i, word in enumerate(words):
        for pair in neighbours(word):
            pair_count[pair] += frequency[i]
            where[pair].append(i)
    # The heap keeps outdated counts, and puts them right when they come up. That is enough: once
    # its pair has been pushed, a count can only fall.
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


# 3. GPT-2's tokenizer, and the files of all three -------------------------------------------------


class Cache(dict):
    """key -> function(key). Words repeat, so most of a text is encoded by looking up."""

    def __init__(self, function):
        self.function = function

    def __missing__(self, key):
        if len(self) >= 1 << 20:  # a large corpus must not fill the memory
            self.clear()
        value = self[key] = self.function(key)
        return value


class Tokenizer:
    """Text or bytes to token ids and back. This class is byte-level BPE: every byte string comes
    back as it was. WordPiece and Unigram change `read`, `split`, `encode_word` and `join`.

    special: special token ("<|endoftext|>") -> id. In a text they are plain text, unless `encode`
    is told `allow_special=True`: what a user types must not end a document.
    spelling: all other ids -> the bytes of text that they stand for. vocab_size: ids are below it.
    """

    def __init__(self, content: dict):
        """content: of a `tokenizer.json`. Where it is not of this kind, `read` raises an error."""
        self.content = dict(version="1.0", normalizer=None, post_processor=None) | content
        # Added tokens, special or not, are cut out of a text first. The longest is tried first.
        added = sorted(content.get("added_tokens") or [], key=lambda token: -len(token["content"]))
        self.special = {token["content"]: token["id"] for token in added if token["special"]}
        vocab, spell = self.read(content, content["model"], content["pre_tokenizer"])
        self.added = {token["content"]: token["id"] for token in added}
        self.tokens = {i: token for token, i in (vocab | self.added).items()}
        self.vocab_size = len(vocab | self.added)
        if sorted(self.tokens) != list(range(self.vocab_size)):
            raise ValueError("its ids are not 0, 1, 2, ..., each once")
        if any(t["single_word"] or t["normalized"] and content.get("normalizer") for t in added):
            raise ValueError("it looks for added tokens in another way")
        self.spelling = {i: token.encode() if token in self.added else spell(token)
                         for i, token in self.tokens.items() if token not in self.special}
        self.words = Cache(self.encode_word)
        self.finders, spaces = [], f"[{SPACE}]*"  # lstrip, rstrip: with the white space beside it
        for wanted in ([t for t in added if not t["special"]], added):
            patterns = [spaces * t["lstrip"] + re.escape(t["content"]) + spaces * t["rstrip"]
                        for t in wanted]
            self.finders.append(re.compile(f"({'|'.join(patterns)})") if patterns else None)

    def read(self, content: dict, model: dict, splitter: dict) -> tuple:
        """Takes what is needed from a file; gives token -> id, and the function token -> bytes."""
        if (splitter["type"] != "ByteLevel" or splitter.get("add_prefix_space")
                or not splitter.get("use_regex", True) or content.get("normalizer")
                or any(map(model.get, ("end_of_word_suffix", "dropout", "ignore_merges")))):
            raise ValueError("it splits or merges in another way than GPT-2")
        vocab = model["vocab"]
        byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
        self.byte_ids = [vocab[character] for character in byte_of]
        self.merges: dict[str, tuple[int, str]] = {}  # pair -> (rank, merged)
        for rank, merge in enumerate(model["merges"]):  # ["a", "b"], or "a b" in older files
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            self.merges[chr(vocab[left]) + chr(vocab[right])] = (rank, chr(vocab[left + right]))
        return vocab, lambda token: bytes(byte_of[character] for character in token)

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
        special, alphabet = list(dict.fromkeys(special_tokens)), byte_alphabet()
        if vocab_size < (least := 256 + len(special)):
            raise ValueError(f"a vocabulary of {vocab_size} is too small: bytes and special tokens "
                             f"take {least}; set --vocab_size {least} or more")
        order = sorted(alphabet)  # as in `tokenizers`: of equal counts the lower ids come first
        byte_ids = [len(special) + order.index(character) for character in alphabet]
        tokens, merges = [*special, *order], []  # a token's place in the list is its id
        for pair, merged in learn_merges(counts, byte_ids, vocab_size):
            left, right = (tokens[ord(character)] for character in pair)
            merges.append([left, right])
            if ord(merged) == len(tokens):  # not a second way to make an old token
                tokens.append(left + right)
        model = dict(type="BPE", vocab={token: i for i, token in enumerate(tokens)}, merges=merges)
        added = [dict(id=i, content=name, **SPECIAL) for i, name in enumerate(special)]
        return cls(dict(AS_GPT2, added_tokens=added, model=model))

    def encode(self, text_or_bytes: str | bytes, allow_special: bool = False) -> list[int]:
        """Token ids of a text, or of bytes, UTF-8 or not. Nothing is put before or after them."""
        text, finder, ids = to_text(text_or_bytes), self.finders[allow_special], []
        parts = finder.split(text) if finder else [text]  # text, token, text, token, ..., text
        for i, part in enumerate(parts):
            if i % 2:
                ids.append(self.added[part if part in self.added else part.strip(SPACE)])
            else:
                ids += chain.from_iterable(map(self.words.__getitem__, self.split(part, not ids)))
        return ids

    def split(self, text: str, first: bool) -> list[str]:
        """The words of a text without added tokens. first: no token stands before it."""
        return split_words(text)

    def encode_word(self, word: str) -> list[int]:
        """Ids of one word: of its pairs merge the one that was learned first, and so on."""
        word = as_tokens(word, self.byte_ids)
        # The heap holds each pair once: a "word" of a million letters takes seconds, not days.
        heap = [(self.merges[pair], pair) for pair in set(neighbours(word)) if pair in self.merges]
        heapq.heapify(heap)
        while heap:
            (_, merged), pair = heapq.heappop(heap)
            if pair in word:  # no earlier merge consumed it
                word, _, born = merge_pair(word, pair, merged)
                for made in set(born) & self.merges.keys():
                    heapq.heappush(heap, (self.merges[made], made))
        return list(map(ord, word))

    def decode(self, ids) -> str:
        """The text that the ids spell; bytes that are no UTF-8 (half a character) become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids) -> bytes:
        """The bytes that the ids spell, special tokens as text. Raises ValueError for other ids."""
        try:
            return self.join([int(i) for i in ids])
        except KeyError as error:
            raise ValueError(f"id {error} is not in this vocabulary of {self.vocab_size}") from None

    def join(self, ids: list[int]) -> bytes:
        """The bytes of the tokens, one after the other."""
        return b"".join(self.spelling.get(i) or self.tokens[i].encode() for i in ids)

    def to_json(self) -> dict:
        """The content of `tokenizer.json`: as it was read, but without truncation and padding."""
        return self.content | dict(truncation=None, padding=None)

    def save(self, path) -> None:
        """Write the `tokenizer.json` that `tokenizers` and `transformers` open."""
        beside = Path(f"{path}.tmp")  # a process that is stopped leaves no half file
        try:
            beside.write_text(json.dumps(self.to_json(), ensure_ascii=False, indent=1), "utf-8")
            beside.replace(path)
        except OSError as error:
            raise OSError(f"cannot write {path}: {error}; is there space?") from None
        finally:
            beside.unlink(missing_ok=True)

    @staticmethod
    def load(path) -> "Tokenizer":
        """Read a `tokenizer.json`, or the `merges.txt` or `vocab.txt` of older models. Gives a
        tokenizer of the file's kind. Raises ValueError where it is none of the three."""
        data = Path(path).read_bytes()
        try:
            content = read_content(Path(path), data)
            model = content["model"]
            kind = model.get("type") or (  # the oldest files do not say
                "BPE" if "merges" in model else "WordPiece" if "unk_token" in model else "Unigram")
            return {"BPE": Tokenizer, "WordPiece": WordPiece, "Unigram": Unigram}[kind](content)
        except Exception as error:  # whatever a damaged file leads to
            raise ValueError(f"{path} is not the tokenizer.json of a GPT-2, BERT or T5: "
                             f"{type(error).__name__}: {error}") from None

    @staticmethod
    def from_pretrained(name_or_folder) -> "Tokenizer":
        """The tokenizer of a folder or of a published model's name. ValueError if it has none."""
        folder = Path(name_or_folder)
        if not folder.is_dir():
            from data import pretrained_folder  # it downloads; folders are read without data.py
            folder = Path(pretrained_folder(name_or_folder))
        for name in ("tokenizer.json", "merges.txt", "vocab.txt"):
            if (folder / name).exists():
                return Tokenizer.load(folder / name)
        spiece = folder / "spiece.model"
        if not spiece.exists() or spiece.stat().st_size > 1 << 20:  # mT5's, another one, has 4 MB
            raise ValueError(f"{folder} has no tokenizer.json, no merges.txt and no vocab.txt")
        print(f"{folder} has no tokenizer.json: taking t5-small's, the same one", file=sys.stderr)
        from data import pretrained_folder
        return Tokenizer.load(Path(pretrained_folder("t5-small")) / "tokenizer.json")


# What a `tokenizer.json` says of a special token, and of splitting as GPT-2 does.
SPECIAL = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
BYTE_LEVEL = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=True)
AS_GPT2 = dict(pre_tokenizer=BYTE_LEVEL, decoder=BYTE_LEVEL)


def read_content(path: Path, data: bytes) -> dict:
    """What a `tokenizer.json` holds; what older files hold, as a `tokenizer.json` would have it."""
    config = path.with_name("tokenizer_config.json")
    config = json.loads(config.read_bytes()) if config.exists() else {}
    if path.name not in ("merges.txt", "vocab.txt"):
        content = json.loads(data)
        if str(config.get("tokenizer_class", "Bert"))[:4] == "Bert" and "do_lower_case" in config:
            (content.get("normalizer") or {})["lowercase"] = config["do_lower_case"]  # this rules
        return content
    lines = data.decode().replace("\r\n", "\n").removesuffix("\n").split("\n")
    if config.get("add_prefix_space") or path.with_name("added_tokens.json").exists():
        raise ValueError("beside it, add_prefix_space is set, or there is added_tokens.json")
    if path.name == "merges.txt":  # GPT-2's: "a b" a line; the ids are in vocab.json beside it
        vocab = json.loads(path.with_name("vocab.json").read_bytes())
        merges = [line for line in lines if not line.startswith("#version")]
        special, parts = ["<|endoftext|>"], AS_GPT2
        model = dict(type="BPE", vocab=vocab, merges=merges)
    else:  # BERT's: a piece a line
        vocab = {piece: i for i, piece in enumerate(lines)}
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        steps = dict(type="BertNormalizer", lowercase=config.get("do_lower_case", True),
                     handle_chinese_chars=config.get("tokenize_chinese_chars", True),
                     strip_accents=config.get("strip_accents"), clean_text=True)
        parts = dict(normalizer=steps, pre_tokenizer=dict(type="BertPreTokenizer"),
                     decoder=dict(type="WordPiece", prefix="##", cleanup=True))
        model = dict(type="WordPiece", vocab=vocab, unk_token="[UNK]", max_input_chars_per_word=100,
                     continuing_subword_prefix="##")
    added = [dict(id=vocab[name], content=name, **SPECIAL) for name in special if name in vocab]
    return dict(parts, added_tokens=added, model=model)


# 4. BERT's tokenizer ------------------------------------------------------------------------------
# Text is cleaned, in the uncased models also lower-cased and freed of accents, and cut at white
# space and punctuation. (To the library the few signs younger than Unicode 8 are ordinary letters.)

CHINESE = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df"
                     "\U0002a700-\U0002b81f\U0002b920-\U0002ceaf\U0002f800-\U0002fa1f]")
NO_SPACE_BEFORE = (".", "?", "!", ",", "n't", "'m", "'s", "'ve", "'re")  # in decoded text


class WordPiece(Tokenizer):
    """BERT's tokenizer. It is not reversible: white space, and in the uncased models capitals and
    accents, are lost, and a word with a character that the vocabulary lacks becomes [UNK]."""

    def read(self, content: dict, model: dict, splitter: dict) -> tuple:
        """See `Tokenizer.read`."""
        steps, vocab = content["normalizer"], model["vocab"]
        if ((steps["type"], splitter["type"]) != ("BertNormalizer", "BertPreTokenizer")
                or model.get("continuing_subword_prefix", "##") != "##"):
            raise ValueError("it splits in another way than BERT")
        self.clean, self.chinese = steps["clean_text"], steps["handle_chinese_chars"]
        self.lower, strip = steps["lowercase"], steps.get("strip_accents")
        self.strip = self.lower if strip is None else strip
        self.cleanup = (content.get("decoder") or {}).get("cleanup", True)
        self.unk_id, self.most = vocab[model["unk_token"]], model["max_input_chars_per_word"]
        self.pieces = {piece: i for piece, i in vocab.items() if piece not in self.special}
        self.longest = max(map(len, vocab))
        self.cleaned = functools.lru_cache(1 << 20)(self.clean_character)
        return vocab, lambda token: token.removeprefix("##").encode()

    def clean_character(self, character: str) -> str:
        """What becomes of a character in a text."""
        category = unicodedata.category(character)
        control = category in ("Cc", "Cf", "Co") and character not in "\t\n\r"
        if self.clean and (control or character == "\ufffd") or self.strip and category == "Mn":
            return ""  # Mn: an accent by itself
        character = " " if character in SPACE else character
        apart = category[0] == "P" or category[0] == "S" and character.isascii()  # also "$", "+"
        apart = apart or self.chinese and CHINESE.match(character)
        character = character.lower() if self.lower else character  # alone, so no "Σ" becomes "ς"
        return f" {character} " if apart else character  # a word of its own

    def split(self, text: str, first: bool) -> list[str]:
        """The words of a text, cleaned."""
        text = to_bytes(text).decode("utf-8", "replace")  # surrogates become U+FFFD
        text = unicodedata.normalize("NFD", text) if self.strip else text  # "é" as "e" and accent
        return "".join(map(self.cleaned, text)).split(" ")

    def encode_word(self, word: str) -> list[int]:
        """Ids of the longest piece that the word begins with, then of the rest's; or of [UNK]."""
        ids, start = [], 0  # "unaffable" -> "un", "##aff", "##able"
        while start < len(word):
            prefix = "##" if start else ""
            ends = range(min(len(word), start + self.longest), start, -1)  # the longest first
            end = next((end for end in ends if prefix + word[start:end] in self.pieces), None)
            if end is None or len(word) > self.most:
                return [self.unk_id]
            ids.append(self.pieces[prefix + word[start:end]])
            start = end
        return ids

    def join(self, ids: list[int]) -> bytes:
        """The words, with spaces between them but before most punctuation."""
        text = ""  # in the end "don ' t" for "Don't"
        for token in map(self.tokens.__getitem__, ids):
            if text and not token.startswith("##"):
                text += "" if self.cleanup and token.startswith(NO_SPACE_BEFORE) else " "
            text += token.removeprefix("##") if text else token
        return text.encode()


# 5. T5's tokenizer --------------------------------------------------------------------------------
# Each piece has a score, the logarithm of its probability. Of all the ways to cut a word into
# pieces the one with the highest sum is taken. A space is written as "▁" and belongs to the word
# that follows, so text comes back, but for what the normaliser has changed.


class Unigram(Tokenizer):
    """T5's tokenizer: "▁Hello", "▁world". Characters that no piece has become <unk>."""

    def read(self, content: dict, model: dict, splitter: dict) -> tuple:
        """See `Tokenizer.read`."""
        normalizer = content.get("normalizer") or dict(normalizers=[])
        self.steps = list(map(normalizing_step, normalizer.get("normalizers", [normalizer])))
        *before, space = splitter.get("pretokenizers", [splitter])  # a Sequence, or one step
        kinds = [step["type"] for step in (*before, space)]
        self.by_space, self.cut_words = bool(before), space.get("split") is not False
        older = "never" if space.get("add_prefix_space") is False else "always"
        self.scheme = space.get("prepend_scheme", older)  # where a "▁" is put before a text
        if (kinds not in (["Metaspace"], ["WhitespaceSplit", "Metaspace"])
                or space["replacement"] != "▁" or self.scheme == "first" and self.by_space
                or model.get("byte_fallback")):
            raise ValueError("it splits in another way than T5")
        pieces, self.unk_id = model["vocab"], model["unk_id"]
        self.unknown = (self.unk_id, min(score for _, score in pieces) - 10.0)  # worse than all
        # Special tokens are among T5's pieces. If found there, a typed "</s>" would end a text.
        hidden = {"", pieces[self.unk_id][0], *self.special}
        self.pieces = {piece: (i, float(score)) for i, (piece, score) in enumerate(pieces)
                       if piece not in hidden}
        self.lengths = sorted({1, *map(len, self.pieces)})
        vocab = {piece: i for i, (piece, _) in enumerate(pieces)}
        return vocab, lambda token: token.replace("▁", " ").encode()

    def split(self, text: str, first: bool) -> list[str]:
        """The words of a text, normalised, each with "▁" for the space before it."""
        text = to_bytes(text).decode("utf-8", "replace")  # surrogates become U+FFFD
        for step in self.steps:
            text = step(text)
        words, prepend = [], self.scheme == "always" or self.scheme == "first" and first
        for part in re.split(f"[{SPACE}]+", text) if self.by_space else [text]:
            part = part.replace(" ", "▁")
            part = "▁" + part if part and prepend and part[0] != "▁" else part
            words += re.findall("▁[^▁]*|[^▁]+", part) if self.cut_words else [part]
        return words

    def encode_word(self, word: str) -> list[int]:
        """Ids of the cut with the highest sum of scores (Viterbi's algorithm)."""
        # The best way to a place is the best way to where its last piece begins, and that piece:
        # best[end] = max over start of best[start] + score(word[start:end]), with best[0] = 0.
        best = [0.0] + [-float("inf")] * len(word)  # the sum of the scores up to each place
        last = [(0, 0)] * len(best)  # the last piece on the best way there: its begin, its id
        for start in range(len(word)):
            for length in self.lengths:
                end = start + length
                if end > len(word):
                    break
                piece = self.pieces.get(word[start:end]) or (self.unknown if length == 1 else None)
                if piece and best[start] + piece[1] > best[end]:
                    best[end], last[end] = best[start] + piece[1], (start, piece[0])
        ids, end = [], len(word)
        while end:  # from the end back to the beginning
            end, token = last[end]
            if token != self.unk_id or ids[-1:] != [token]:  # unknown neighbours are one <unk>
                ids.append(token)
        return ids[::-1]

    def join(self, ids: list[int]) -> bytes:
        """The text, without the space before its first word."""
        text = "".join(self.tokens[i] for i in ids)
        text = text if self.scheme == "never" else text.removeprefix("▁")
        return text.replace("▁", " ").encode()


def normalizing_step(spec: dict):
    """The function str -> str of a step of T5's normaliser. Raises ValueError for other steps."""
    if spec["type"] == "Precompiled":
        return charsmap(base64.b64decode(spec["precompiled_charsmap"]))
    if spec == dict(type="Strip", strip_left=False, strip_right=True):
        return lambda text: text.rstrip(SPACE)
    if spec == dict(type="Replace", pattern=dict(Regex=" {2,}"), content="▁"):
        return lambda text: re.sub(" {2,}", "▁", text)
    raise ValueError(f"its normalizer is {spec['type']}")


def charsmap(data: bytes):
    """The function str -> str of a compiled normaliser: a map from keys to texts. T5's is NFKC
    ("ﬁ" -> "fi"), with rules for control characters and spaces."""
    size = int.from_bytes(data[:4], "little")  # of a tree of the keys; behind it are the texts
    units, texts = memoryview(data[4 : 4 + size]).cast("I"), data[4 + size :]
    # In the tree, a "double array", the child for a byte of the node at `place` is at
    # place ^ offsets[place] ^ byte, and the unit there repeats the byte.
    offsets = [unit >> 10 << (unit >> 6 & 8) for unit in units]

    @functools.lru_cache(1 << 20)
    def replace(cluster: str) -> str:
        # As in the library, a cluster of up to 5 bytes becomes the text of the shortest key that it
        # begins with. Without one, and if it is longer, each character becomes what it would alone.
        key, place = cluster.encode(), 0
        for byte in key if len(key) < 6 else b"":
            place ^= offsets[place] ^ byte
            if not byte or units[place] & 0x800000FF != byte:
                break
            if units[place] >> 8 & 1:  # a key ends here, and this is where its text begins:
                start = units[place ^ offsets[place]] & 0x7FFFFFFF
                return texts[start : texts.index(0, start)].decode()
        return "".join(map(replace, cluster)) if len(cluster) > 1 else cluster

    # A cluster is what a reader sees as one character: a letter with its accents, say.
    control, mark = characters(("Cc", "Cf", "Zl", "Zp"), 0x10000), characters("M", 0x10000)
    clusters = re.compile(rf"(?s)\r\n|[^{control}][{mark}\u0e33\u0eb3\u200c\u200d\uff9e\uff9f]*|.")
    replace("a")  # a damaged file shows here
    return lambda text: "".join(map(replace, clusters.findall(text)))
