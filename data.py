"""What the three models read from a disk or the net, what a run writes, flags and commands.

    corpus = prepare("input.txt", 1024, ["<|endoftext|>"], separator="<|endoftext|>")
    corpus.tokenizer, corpus.train, corpus.validation        # the tokens are memory-mapped arrays
    run_command(gpt, ["--n_layer", "6"])                     # what `python gpt.py --n_layer 6` does

None of it is needed to understand the models. 1 files and downloads, 2 text to tokens, 3 what a
task learns from, 4 weight files, 5 what a run writes, 6 the machine, 7 flags, 8 the commands."""

import argparse
import contextlib
import csv
import ctypes
import functools
import glob
import gzip
import hashlib
import html
import inspect
import itertools
import json
import math
import multiprocessing
import os
import re
import shlex
import signal
import sys
import tarfile
import tempfile
import time
import warnings
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from dataclasses import MISSING, asdict, dataclass, fields, replace
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bpe import Tokenizer, split_words

SEPARATOR = "<|endoftext|>"  # between the documents of a text
PIECE = 1 << 20  # characters of text that are handled at a time


def say(*lines: str, end: str = "\n") -> None:
    """Print to standard error, if this is the first rank; standard output is for results."""
    if ranks()[0] == 0:
        with contextlib.suppress(OSError):  # a terminal that was closed ends no run
            print(*lines, sep="\n", end=end, file=sys.stderr, flush=True)


# 1. Files and downloads ---------------------------------------------------------------------------


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/gpt-bert-t5, or ~/.cache/gpt-bert-t5; where nobody is at home, in /tmp."""
    base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    return Path(tempfile.gettempdir() if base.startswith("~") else base) / "gpt-bert-t5"


@contextlib.contextmanager
def replacing(path, mode: str = "wb"):
    """Open a file that takes the place of `path` only once it is whole, on the disk. OSError."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")  # if we are killed, the next write replaces it
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else the new name can reach the disk before the content
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        raise OSError(f"cannot write {path}: {str(error)[:99]}; is there space?") from None
    finally:
        temporary.unlink(missing_ok=True)


def download(url: str, path) -> Path:
    """Fetch `url` to `path` unless it is there. What has arrived stays in PATH.part, where the next
    try goes on. Raises OSError (FileNotFoundError: refused)."""
    import requests  # takes a fifth of a second, so only where it is needed
    path, failures = Path(path), 0
    part = path.with_name(path.name + ".part")  # what has arrived so far
    path.parent.mkdir(parents=True, exist_ok=True)
    while not path.exists():
        have, status = part.stat().st_size if part.exists() else 0, "unknown"
        headers = {"Accept-Encoding": "identity", "Range": f"bytes={have}-"}  # not compressed
        with contextlib.suppress(requests.RequestException):
            with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
                status, left = answer.status_code, int(answer.headers.get("Content-Length", 0))
                if status == 416:  # nothing comes behind it: we begin again
                    part.unlink(missing_ok=True)
                elif 400 <= status < 500 and status != 429:  # 429: too many requests
                    raise FileNotFoundError(f"{url} answered {status}: check the address")
                answer.raise_for_status()  # of the server: tried again
                with open(part, "ab" if status == 206 else "wb") as file:
                    for block in answer.iter_content(1 << 14):
                        left -= file.write(block)
                        if sys.stderr.isatty():
                            say(f"\r{path.name}: {left / 1e6:.1f} MB left ", end="")
                if left <= 0:
                    return part.replace(path)  # only a whole file has this name
        failures = 0 if part.exists() and part.stat().st_size > have else failures + 1
        if failures == 5:
            raise OSError(f"cannot download {url}: nothing comes, 5 times (status {status})")
        time.sleep(failures)  # seconds
    return path


# 2. Text to tokens --------------------------------------------------------------------------------
# A source is a stream of pieces of text. From the training part a tokenizer is learned, then all is
# encoded, by all cores; no more than a few pieces are in memory. The result stays in the cache.

HUB = "https://huggingface.co"
STORIES = f"{HUB}/datasets/roneneldan/TinyStories/resolve/main/TinyStories"  # 2 GB (Eldan, Li 2023)
CHARACTERS = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data"
NAMED = {  # name -> where its training part is, and its validation part if it brings one
    "shakespeare": [f"{CHARACTERS}/tinyshakespeare/input.txt"],
    "tinystories": [f"{STORIES}-train.txt", f"{STORIES}-valid.txt"],
    "imdb": ["https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz"] * 2,
}
REVIEW = r"aclImdb/{}/(pos|neg|unsup)/\d+_\d+\.txt"  # in its archive, in folders train and test
PARTS, READABLE, TABLES = ("train", "validation"), (".txt", ".gz", ".jsonl"), (".csv", ".jsonl")
DOCUMENT_END = re.compile(rf"{re.escape(SEPARATOR)}(?:\r?\n)?")
BETWEEN_DOCUMENTS = re.compile(rf"(?:\r?\n)?{DOCUMENT_END.pattern}")
load_tokenizer = functools.lru_cache(1)(Tokenizer.load)  # each process loads it once


def find_source(name: str) -> list[Path]:
    """The training part, and if it has one the validation part, of a key of NAMED, a URL, a file or
    a folder. Raises OSError or ValueError if there is none."""
    if name in NAMED or re.match(r"https?://", name):
        return [download(url, cache_folder() / hashlib.sha256(url.encode()).hexdigest()[:16]
                         / (url.partition("?")[0].rpartition("/")[2] or "text"))
                for url in NAMED.get(name, [name])]
    for path in Path(name), Path(__file__).parent / name:  # input.txt, from another folder
        if path.exists():
            return [path]
    raise ValueError(f"no data at {name}: give a file, a folder, a URL or one of {[*NAMED]}")


def read_documents(path: Path, members: str):
    """Yield the text of a file in blocks, with SEPARATOR between documents: the "text" of the lines
    of a .jsonl, the `members` (a pattern) of a .tar.gz. Raises ValueError with file and line."""
    name, place = path.name.lower(), path
    unpack = gzip.open if name.endswith(".gz") else open  # as a stream
    try:
        if name.endswith(".tar.gz"):
            yield from (text + SEPARATOR for _, text in archive_texts(path, members))
            return
        with unpack(path, "rt", encoding="utf-8-sig", newline="") as file:  # no byte order mark
            for number, line in enumerate(file if ".jsonl" in name else [], 1):
                place = f"{path}, line {number}"
                yield json.loads(line)["text"] + SEPARATOR if line.strip() else ""
            for block in iter(lambda: file.read(PIECE), ""):
                if "\0" in block:  # no text has it
                    raise ValueError("it is binary, or UTF-16")
                yield block
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f'{place} is no UTF-8 text, {{"text": ...}}, or .gz: {error}') from None


def archive_texts(path: Path, members: str):
    """Yield (name, text) of the members of a .tar.gz; nothing is unpacked to the disk."""
    with tarfile.open(path, "r|gz") as archive:
        for member in archive:
            if member.isfile() and re.fullmatch(members, member.name):
                text = archive.extractfile(member).read().decode("utf-8-sig")
                yield member.name, text.replace("<br /><br />", "\n\n")


def files_of(path: Path) -> list[Path]:
    """The files of text in a folder: each once, no hidden ones, no logs of runs. Or the file."""
    if not path.is_dir():
        return [path]
    found = (path / name for name in glob.glob("**/*", root_dir=path, recursive=True))
    found = {x.resolve(): x for x in sorted(found) if x.name.lower().endswith(READABLE)}
    return [x for x in found.values()
            if x.is_file() and not (x.name == "log.jsonl" and x.with_name("run.json").exists())]


def pieces(path: Path, members: str = r"(?i)(?!(.*/)?(\.[^/]|__MACOSX)).*\.txt"):  # no hidden ones
    """Yield the text of a file, or of those in a folder, in pieces of about PIECE characters that
    can be tokenized apart: cut behind a separator, else where white space follows a word."""
    rest, word = "", re.compile(r".*[!-~](?=\s)", re.DOTALL)
    for i, file in enumerate(files_of(path)):
        rest += SEPARATOR * (i > 0)
        for block in read_documents(file, members):
            rest += block
            if len(rest) > PIECE:
                cut = rest.rfind(SEPARATOR, 0, -2)  # a line break that may follow belongs to it
                found = DOCUMENT_END.match(rest, cut) if cut >= 0 else word.match(rest, PIECE // 2)
                cut = found.end() if found else len(rest)  # (a word of half a million characters)
                yield rest[:cut]
                rest = rest[cut:]
    yield rest


def parts(source: str):
    """Yield (part, piece of text) of all there is: "train", then "validation": what the source
    brings, else the last tenth: of the documents where there are ten, or of the characters."""
    train, *validation = find_source(source)
    if validation:
        for part, path, folder in zip(PARTS, (train, *validation), ("train", "test")):
            members = [REVIEW.format(folder)] if source == "imdb" else []
            yield from ((part, piece) for piece in pieces(path, *members))
        return
    sizes = [(len(piece), piece.count(SEPARATOR)) for piece in pieces(train)]
    characters, documents = map(sum, zip(*sizes))
    if not characters:
        raise ValueError(f"{train} is empty, or has no {', '.join(READABLE)} file")
    total = documents if documents >= 10 else characters  # what is counted
    left = total - total // 10  # of the training part
    for piece in pieces(train):
        found = DOCUMENT_END.finditer(piece)  # where it can be cut
        ends = [x.end() for x in found] if documents >= 10 else range(1, len(piece) + 1)
        end = ends[left - 1] if 0 < left <= len(ends) else len(piece) * (left > 0)
        left -= min(left, len(ends))
        yield from ((part, text) for part, text in zip(PARTS, (piece[:end], piece[end:])) if text)


def count_piece(piece: str) -> Counter:
    """How often each word occurs in a piece."""
    return Counter(word for text in BETWEEN_DOCUMENTS.split(piece) for word in split_words(text))


def encode_piece(path: str, separator: str, piece: str) -> np.ndarray:
    """The tokens of a piece, by the tokenizer in a file."""
    tokenizer, ids = load_tokenizer(path), []
    for i, text in enumerate(BETWEEN_DOCUMENTS.split(piece)):
        ids += [tokenizer.special[separator]] * (i > 0) + tokenizer.encode(text)
    return np.array(ids, np.uint32)


def begin_worker() -> None:
    """Ctrl-C is for the process that waits for this one; when that one ends, so does this."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":  # even if that one is killed (PR_SET_PDEATHSIG)
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


def parallel(function, jobs):
    """Yield (part, function(piece)) of all jobs (part, piece) in order, computed by all cores."""
    # Forked, a process has bpe.py already, and does not run the user's script again.
    how = multiprocessing.get_context("fork" if hasattr(os, "fork") else None)
    with ProcessPoolExecutor(None, how, begin_worker) as pool:
        while some := [*itertools.islice(jobs, 4 * os.cpu_count())]:  # no more are in memory
            names, texts = zip(*some)
            yield from zip(names, pool.map(function, texts))


@dataclass(eq=False)
class Corpus:
    """A source as tokens: memory-mapped arrays of uint16, or uint32 above 65,536 token types. A
    part is: separator document separator ... separator."""

    tokenizer: Tokenizer
    train: np.ndarray  # (n,)
    validation: np.ndarray  # (m,)
    separator: int  # the token before, between and after documents

    def __str__(self) -> str:
        edges = sum(len(self.edges(part)) for part in PARTS)  # n documents have n + 1, in each part
        documents = edges - 2 if edges > 4 else 1  # a stream is one
        return (f"documents: {documents:,}; {len(self.train):,} tokens to train on, "
                f"{len(self.validation):,} to validate; vocabulary: {self.tokenizer.vocab_size:,}")

    def edges(self, part: str) -> np.ndarray:
        """Where the separators stand in "train" or "validation", (n,) int64."""
        tokens = getattr(self, part)  # (n,)
        return np.concatenate([i + np.flatnonzero(tokens[i : i + PIECE] == self.separator)
                               for i in range(0, len(tokens), PIECE)])


def prepare(source: str, vocab_size: int, special_tokens, separator: str, tokenizer=None) -> Corpus:
    """The corpus of a source; without a tokenizer one of `vocab_size` types is trained on it. (Then
    both are in the cache.) Raises ValueError or OSError where the source cannot be used."""
    local = int(os.environ.get("LOCAL_RANK", 0))
    if local > 0:  # the first rank of a machine makes what the others then find
        torch.distributed.barrier()
    files = itertools.chain(*map(files_of, find_source(source)))
    stats = [(str(x.resolve()), x.stat().st_size, x.stat().st_mtime_ns) for x in files]
    kind = tokenizer.to_json() if tokenizer else [vocab_size, list(special_tokens)]
    key = hashlib.sha256(json.dumps([stats, source, kind, separator]).encode()).hexdigest()
    folder = cache_folder() / "tokens" / key[:20]
    if not folder.exists():
        make_corpus(source, folder, vocab_size, special_tokens, separator, tokenizer)
    if local == 0 and ranks()[1] > 1:
        torch.distributed.barrier()
    train, validation = (np.asarray(np.memmap(path, path.suffix[1:], "r"))  # (asarray: faster)
                         for path in sorted(folder.glob("*.uint*")))
    tokenizer = tokenizer or Tokenizer.load(folder / "tokenizer.json")
    return Corpus(tokenizer, train, validation, tokenizer.special[separator])


def make_corpus(source, folder: Path, vocab_size, special_tokens, separator, tokenizer) -> None:
    """Make the folder with tokenizer.json, and the tokens as train.uint16, validation.uint16."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as making:
        if tokenizer is None:
            counts = Counter()
            for _, counted in parallel(count_piece, (x for x in parts(source) if x[0] == "train")):
                counts.update(counted)
            tokenizer = Tokenizer.from_counts(counts, vocab_size, special_tokens)
        tokenizer.save(f"{making}/tokenizer.json")
        dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
        encode = functools.partial(encode_piece, f"{making}/tokenizer.json", separator)
        edge = np.array([tokenizer.special[separator]])
        ends, last = [(part, edge) for part in PARTS], {}
        for part, ids in itertools.chain(ends, parallel(encode, parts(source)), ends):
            before = np.concatenate((last.get(part, ~edge), ids))[:-1]  # the token before each
            ids = ids[(ids != edge) | (before != edge)]  # no two separators in a row
            last[part] = ids[-1:] if len(ids) else last[part]
            with open(f"{making}/{part}.{dtype}", "ab") as file:
                file.write(ids.astype(dtype).tobytes())
        with contextlib.suppress(OSError):  # (it exists: another run was faster)
            os.replace(making, folder)  # only a whole corpus has this name


def sliding_windows(tokens, block_size: int, stride: int, pad_id: int):
    """Cut a stream into (inputs, targets), both (n, block_size) int64: a target is the next token.
    Windows begin every `stride` tokens (1 to block_size). The last is filled up with `pad_id`, its
    targets with -100: [5, 6, 7, 8] gives [[5, 6], [7, 0]] and [[6, 7], [8, -100]]."""
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride {stride} is not between 1 and block_size {block_size}")
    tokens = np.asarray(tokens, np.int64)
    n = 1 + max(math.ceil((len(tokens) - 1 - block_size) / stride), 0)  # windows
    missing = (n - 1) * stride + block_size + 1 - len(tokens)  # behind the last token
    at = np.arange(n)[:, None] * stride + np.arange(block_size)  # (n, block_size)
    inputs = np.pad(tokens, (0, missing), constant_values=pad_id)[at]
    return inputs, np.pad(tokens, (0, missing), constant_values=-100)[at + 1]


@dataclass(eq=False)
class Batches:
    """Rows of some lengths in batches of one size, random, the same for the same (seed, step). An
    epoch has each row; rows of about the same length go together, so that little is padded."""

    lengths: np.ndarray  # (n,)

    def chosen(self, run, step: int) -> tuple[np.ndarray, float]:
        """The rows of a step, (rows,) int64, and a random number from [0, 1) of its epoch."""
        size = min(run.batch_size * run.grad_accum, len(self.lengths))
        epoch, number = divmod(step, math.ceil(len(self.lengths) / size))  # number: of the batch
        batches, shift = self.epoch(size, run.seed, epoch)
        return batches[number], shift

    @functools.lru_cache(2)
    def epoch(self, size: int, seed: int, epoch: int) -> tuple[np.ndarray, float]:
        """All rows in random batches, (batches, size), and a random number."""
        generator, n = np.random.default_rng((seed, epoch)), len(self.lengths)
        order = np.argsort(self.lengths * generator.uniform(0.9, 1.1, n))  # about by length
        order = np.append(order, generator.permutation(n)[: -n % size])  # the last one is filled up
        return generator.permutation(order.reshape(-1, size)), generator.random()


def spread(n: int, size: int, most: int | None = None):
    """Yield the numbers 0 to n - 1, or `most` of them at even distances, in arrays of `size`."""
    chosen = np.arange(n) if most is None or n <= most else np.arange(most) * n // most
    yield from (chosen[i : i + size] for i in range(0, len(chosen), size))


# 3. What a task learns from: a text, or tables of examples ----------------------------------------


def open_source(module, task, source: str, vocab_size: int, tokenizer, new: bool = False):
    """What a task learns from: a Corpus; to fine-tune, rows to learn from and those held out, of a
    table (.csv, .jsonl, or its URL), a folder of two, `imdb`, or "": the stories of input.txt. A
    random tenth of one table is held out, always the same; new: all is. ValueError or OSError."""
    if type(task) is module.Pretraining:
        return prepare(source, vocab_size, module.SPECIAL_TOKENS, module.SEPARATOR, tokenizer)
    if source in task.demonstrations:  # held out are those that no model has seen in pretraining
        story = re.compile(r"Title: (?P<title>.+)\nTopic: (?P<topic>.+)\n\n(?P<text>(?s:.+))")
        found = [(part, it) for part, piece in parts("input.txt") for it in
                 map(story.match, BETWEEN_DOCUMENTS.split(piece.replace("\r\n", "\n"))) if it]
        return [[row | {"place": it["title"]} for name, it in found if name == part
                 for row in task.from_story(it.groupdict(), source)] for part in PARTS]
    path = find_source(source)[0]
    if source == "imdb" and "label" in task.columns:
        rated = [REVIEW.replace("|unsup", "").format(folder) for folder in ("train", "test")]
        return [[dict(text=text, label=name.split("/")[2], place=name)
                 for name, text in archive_texts(path, members)] for members in rated]
    if path.is_dir():
        tables = {x.stem.lower(): x for x in path.iterdir() if x.suffix.lower() in TABLES}
        held_out = next(filter(tables.get, ("valid", "validation", "test")), "validation")
        return [read_table(tables.get(name, path / f"{name}.csv"), task)
                for name in (held_out if new else "train", held_out)]
    rows = read_table(path, task)
    if new:
        return [rows, rows]
    if len(rows) < 2:
        raise ValueError(f"{path} has 1 row: it takes two, one to learn from and one to hold out")
    order = np.random.default_rng(0).permutation(len(rows))  # the same every time
    held_out, rest = np.split(order, [math.ceil(len(rows) / 10)])  # a tenth, rounded up
    return [[rows[i] for i in sorted(part)] for part in (rest, held_out)]


def read_table(path: Path, task) -> list[dict]:
    """The rows of a .csv file, whose header is row 1, or a .jsonl file: the task's columns as texts
    (optional ones in every row or in none), and `place`, the row's name. Raises ValueError."""
    rows, number, is_csv = [], 1, path.suffix.lower() == ".csv"
    try:  # bytes that are no UTF-8 become surrogates, which are found below; no byte order mark
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            csv.field_size_limit(1 << 24)  # characters in a cell
            table = csv.reader(file, strict=True, skipinitialspace=True) if is_csv else file
            header = [name.strip() for name in next(table)] if is_csv else []
            if twice := [name for name in header if name and header.count(name) > 1]:
                raise ValueError(f"there are two columns {twice[0]}")
            for number, row in enumerate(table, 1 + is_csv):
                if not "".join(row).strip():  # a blank row
                    continue
                if any(row[len(header) :]) and header:
                    raise ValueError("more cells than columns: put texts with commas in quotes")
                row = dict(zip(header, row)) if header else json.loads(row)
                rows.append(row | {"place": f"{path}, row {number}"})
    except Exception as error:  # a damaged file can fail in any way
        raise ValueError(f"{path}, row {number} or behind (.csv or .jsonl?): {error}") from None
    there = [*dict.fromkeys(name for row in rows for name in row if name != "place")]
    if not {*task.columns} <= {*there}:
        raise ValueError(f"{path} has no rows with {', '.join(task.columns)}, but with {there}")
    used = [name for name in (*task.columns, *task.optional) if name in there]  # others are ignored
    for row, name in itertools.product(rows, used):
        value = row.get(name)
        if isinstance(value, (int, float)) and value == value:  # NaN, which is not, says nothing
            value = json.dumps(value)
        if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
            raise ValueError(f"{row['place']}: the column {name!r} is empty, or no UTF-8 text")
        value = value.strip()
        row[name] = re.sub(r"^(-?\d+)\.0+$", r"\1", value) if name == "label" else value  # 1.0: 1
    return [{name: row[name] for name in (*used, "place")} for row in rows]


class Examples(Batches):
    """Rows and their encoded form, encode(row) -> a dict with its `length`; and batches of them."""

    def __init__(self, rows: list[dict], encode):
        if not rows:
            raise ValueError("no examples are left to learn from, or to hold out")
        self.rows, self.encoded = rows, [encode(row) for row in rows]
        super().__init__(np.array([example["length"] for example in self.encoded]))

    def describe(self, held_out: "Examples") -> str:
        """What there is to learn from, for the first line of the log."""
        return (f"{len(self.rows):,} examples of at most {self.lengths.max():,} tokens to learn "
                f"from, {len(held_out.rows):,} held out")

    def batch(self, run, step: int) -> list[dict]:
        """The examples of a step."""
        return [self.encoded[i] for i in self.chosen(run, step)[0]]

    def in_order(self, size: int):
        """Yield all examples in lists of at most `size`, the shortest first."""
        order = np.argsort(self.lengths, kind="stable")  # so that little is padded
        yield from ([self.encoded[j] for j in order[i]] for i in spread(len(order), size))


def pad(rows: list, fill: int) -> torch.Tensor:
    """Rows of different lengths side by side: (n, the longest) int64, filled up with `fill`."""
    return torch.nn.utils.rnn.pad_sequence([*map(torch.as_tensor, rows)], True, padding_value=fill)


def word_overlap(written: str, truth: str) -> dict[str, float]:
    """How far the words are the same, as F1 = 2 common / (written + true). token_f1: in any order,
    without articles (Rajpurkar et al. 2016, 6.1); rouge_l: in order, the longest series of words
    that both have, gaps allowed (Lin 2004, 3.1). Case and punctuation do not count."""
    ours, theirs = (re.findall(r"\w+", text.lower()) for text in (written, truth))  # lists of words
    longest = [0] * (len(theirs) + 1)  # common to what was read of `ours`, and theirs[:j]
    for word in ours:
        before, longest = longest, [0]
        for j, other in enumerate(theirs):
            longest.append(before[j] + 1 if word == other else max(before[j + 1], longest[j]))
    a, b = (Counter(x for x in words if x not in {"a", "an", "the"}) for words in (ours, theirs))
    common = dict(token_f1=((a & b).total(), a.total() + b.total()),  # & keeps the smaller counts
                  rouge_l=(longest[-1], len(ours) + len(theirs)))
    return {name: 2 * n / words if words else 1.0 for name, (n, words) in common.items()}


# 4. Weight files: published models come in, ours go out -------------------------------------------

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
          "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
VOCABULARIES = (["tokenizer.json"], ["spiece.model"], ["merges.txt", "vocab.json"], ["vocab.txt"])


def pretrained_folder(name_or_folder) -> Path:
    """The folder of a published model: an existing one, or in the cache what the hub ($HF_ENDPOINT)
    has of a name like gpt2. Raises ValueError or OSError."""
    name, folder = str(name_or_folder), Path(name_or_folder)
    if (folder / "config.json").exists():  # a folder of somebody's
        return folder
    ours = folder.is_dir() or folder.suffix == ".pt" or folder.parts[0] in ("out", "scratch")
    near = folder.parent != Path() and folder.parent.is_dir()  # then it is not the hub's
    if ours or near or not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII):
        raise ValueError("no run is there (train first), and no published model of this name")
    folder = cache_folder() / "hub" / name.replace("/", "--")
    hub = f"{(os.environ.get('HF_ENDPOINT') or HUB).rstrip('/')}/{name}/resolve/main"

    def get(file: str) -> Path | None:
        with contextlib.suppress(FileNotFoundError):  # there is no such file
            return download(f"{hub}/{file}", folder / file)

    if not (folder / "complete").exists():  # else no network is needed
        if not get("config.json") or not (get("model.safetensors") or get("pytorch_model.bin")):
            raise OSError(f"the hub shows no model {name}: check the name; or give its folder")
        get("tokenizer_config.json")  # if there is one
        any(all(map(get, files)) for files in VOCABULARIES)  # the first that it has
        (folder / "complete").touch()
    return folder


def read_object(path) -> dict:
    """The JSON object in a file. Raises OSError, or ValueError where it is something else."""
    try:
        return dict(json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'{path} is not JSON, an object like {{"n_layer": 6}}: {error}') from None


def stored_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors in a folder's weight files; nothing in them is run. A .safetensors is 8 bytes
    (the header's length), a header in JSON with each tensor's dtype, shape and where its bytes are,
    then those bytes, which stay on the disk until used. Raises ValueError with the file's name."""
    tensors = {}  # published name -> tensor
    for path in [*folder.glob("model*.safetensors")] or folder.glob("pytorch_model*.bin"):
        try:
            if path.suffix == ".bin":
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
                continue
            content = np.memmap(path, np.uint8, "c")
            start = 8 + int.from_bytes(content[:8].tobytes(), "little")  # where the tensors begin
            header = json.loads(content[8:start].tobytes())
            for name in header.keys() - {"__metadata__"}:
                begin, end = header[name]["data_offsets"]
                raw = torch.from_numpy(content[start + begin : start + end])  # (bytes,) uint8
                tensors[name] = raw.view(DTYPES[header[name]["dtype"]]).view(header[name]["shape"])
        except Exception as error:  # a damaged file can fail in any way
            raise ValueError(f"{path}: {str(error)[:99]}") from None
    return tensors


def load_weights(tensors: dict, targets: dict, missing: str = "$^") -> None:
    """Copy each tensor, by its published name, into the target of that name, which may be a view.
    Names may share a target (tied weights): one of them has to be there, and all have to agree.
    missing: a pattern of names that may be. ValueError: one is missing, unknown, odd, or NaN."""
    filled = {targets[name].data_ptr() for name in tensors.keys() & targets.keys()}
    for name in targets.keys() - tensors.keys():
        if targets[name].data_ptr() not in filled and not re.match(missing, name):
            raise ValueError(f"{name!r} is missing")
    for name, tensor in tensors.items():
        have, need = tensor.shape, targets[name].shape if name in targets else "unknown here"
        if have != need or not tensor.is_floating_point():
            raise ValueError(f"{name!r} is {tensor.dtype} {[*have]}, not {need}")
        targets[name].data.copy_(tensor)  # in our dtype
    for name, tensor in tensors.items():
        if not torch.equal(targets[name], tensor.to(targets[name].dtype)):
            raise ValueError(f"{name!r} has NaN, or is not what this model ties to it")


def published_weights(module, model) -> dict[str, torch.Tensor]:
    """Published name -> our weight, or a view of it in the published shape."""
    named = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        for ours, theirs in module.NAMES:
            name = re.sub(ours, theirs, name)
        named |= module.as_published(model, name, weight)
    return named


def save_published(module, folder, model, task) -> None:
    """Write config.json, with the task for us and labels for `transformers`, and model.safetensors,
    see `stored_weights`; of names that share a tensor (tied weights) it has only one."""
    config = module.to_published(model.config) | module.FIXED
    if task:
        config["task"] = asdict(task) | {"kind": type(task).__name__}
    if labels := getattr(task, "labels", None):
        config["id2label"] = dict(enumerate(labels))
        config["label2id"] = {label: i for i, label in enumerate(labels)}
    weights = published_weights(module, model)
    own = {(x.data_ptr(), x.shape): name for name, x in reversed(weights.items())}  # the first
    tensors = {name: weights[name].detach().cpu().contiguous() for name in own.values()}
    dtypes, end = {dtype: name for name, dtype in DTYPES.items()}, 0  # end: of the bytes so far
    header = {"__metadata__": {"format": "pt"}}  # (transformers asks for it)
    for name, x in tensors.items():
        begin, end = end, end + x.nbytes
        header[name] = dict(dtype=dtypes[x.dtype], shape=[*x.shape], data_offsets=[begin, end])
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers begin at a multiple of 8
    with replacing(Path(folder) / "model.safetensors") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(tensor.view(-1).view(torch.uint8).numpy())
    with replacing(Path(folder) / "config.json", "w") as file:
        json.dump(config, file, indent=1)


def save_tokenizer(tokenizer, folder, template: list[str], **config) -> None:
    """Write the files of AutoTokenizer, in a folder. template: what stands around texts A and B, as
    ["[CLS]", "A", "[SEP]", "B", "[SEP]"], if the tokenizer's own file does not say."""
    content = tokenizer.to_json()  # what goes into tokenizer.json
    if not content["post_processor"]:
        for token in content["added_tokens"]:  # as in our prompts, a gap takes the space before it
            token["lstrip"] = bool(re.fullmatch(r"\[MASK\]|<extra_id_\d+>", token["content"]))
        n = template.index("B")  # B and what follows: segment 1
        steps = [{"Sequence" if x in "AB" else "SpecialToken": dict(id=x, type_id=int(i >= n))}
                 for i, x in enumerate(template)]
        special = {name: dict(id=name, ids=[tokenizer.special[name]], tokens=[name])
                   for name in template if name not in "AB"}
        content["post_processor"] = dict(type="TemplateProcessing", single=steps[:n], pair=steps,
                                         special_tokens=special)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    for name, value in ("tokenizer.json", content), ("tokenizer_config.json", config):
        with replacing(Path(folder) / name, "w") as file:
            json.dump(value, file, ensure_ascii=False, indent=1)


# 5. What a run writes: its log, the chart of it, checkpoints --------------------------------------


class Log:
    """log.jsonl, a line of JSON per event; loss.svg, drawn from it; progress on standard error."""

    def __init__(self, run, task, model, state: dict | None):
        """state: the checkpoint that the run goes on from; what was logged behind it is dropped."""
        self.run, self.path, self.rows = run, Path(run.out_dir) / "log.jsonl", []
        self.step, self.pending = (state["step"], state["pending"]) if state else (0, [])
        if self.step and self.path.exists():  # (a line that a crash cut short is none)
            lines = re.findall(r'(?m)^\{.*"step": .*\}$', self.path.read_text("utf-8", "replace"))
            self.rows = [row for row in map(json.loads, lines) if row["step"] <= self.step]
        if ranks()[0] == 0:
            with replacing(self.path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
        (device, dtype, *_), weights = machine(run), sum(p.numel() for p in model.parameters())
        say(f"data: {run.data or 'the stories of input.txt'}, {task.description}",
            f"model: {weights / 1e6:.2f} million parameters, on {device} in {str(dtype)[6:]}",
            f"steps {self.step} to {run.max_steps}, of {run.batch_size * run.grad_accum} sequences")
        self.since, self.tokens = time.monotonic(), 0  # the last line; tokens read since
        self.started = self.since - (self.rows[-1]["seconds"] if self.rows else 0)

    def write(self, **row) -> None:
        """Append a row, with its `seconds` since the run's start."""
        self.rows.append(row | dict(seconds=round(time.monotonic() - self.started, 2)))
        if ranks()[0] == 0:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")

    def add(self, loss: torch.Tensor, batch: dict) -> None:
        """Remember a step's loss, without waiting for it, and how many tokens it read."""
        self.pending.append(loss)  # it stays on the device
        self.tokens += sum(batch[name].numel() for name in batch.keys() & {"idx", "src", "tgt"})

    def checked(self, *more) -> list[float]:
        """The losses of the steps since the last line. Raises ValueError if one diverged."""
        losses = [float(loss) for loss in (*self.pending, *more)]
        if not math.isfinite(sum(losses)):
            raise ValueError(f"the loss is {losses[-1]} at step {self.step + len(losses)}: halve "
                             "--lr and --matrix_lr, or take float32; the last checkpoint stays")
        return losses

    def report(self, step: int, rate: float) -> None:
        """Write and show the mean loss since the last line. rate: the share of the highest --lr."""
        losses, seconds = self.checked(), time.monotonic() - self.since
        speed, left = self.tokens / seconds, (self.run.max_steps - step) * seconds / len(losses)
        self.step, self.pending, self.tokens, self.since = step, [], 0, time.monotonic()
        loss = sum(losses) / len(losses)
        self.write(step=step, loss=loss, lr=rate * self.run.lr, tokens_per_second=round(speed))
        say(f"step {step}/{self.run.max_steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  "
            f"{timedelta(seconds=round(left))} left", end=" \r" if sys.stderr.isatty() else "\n")

    def evaluated(self, step: int, found: dict, sample: str, worse: int) -> None:
        """Write and show what an evaluation found, and a sample; redraw the chart."""
        self.checked(found["val_loss"])  # no best.pt of a lost run
        self.write(step=step, **found)
        figures = "  ".join(f"{name} {value:.4f}" for name, value in found.items())
        say(f"step {step}  {figures:<60}", *(f"    {line}" for line in sample.splitlines() if line))
        curves = {name: [(row["step"], row[key]) for row in self.rows if key in row]
                  for name, key in (("training (means)", "loss"), ("validation", "val_loss"))}
        if ranks()[0] == 0:
            with replacing(self.path.with_name("loss.svg"), "w") as file:
                file.write(line_chart(curves, f"{self.run.out_dir}: loss (nats per answer)"))
        if 0 < self.run.patience <= worse:
            say(f"no lower val_loss in {worse} evaluations: stopped; best.pt has the lowest")
        self.since = time.monotonic()


def line_chart(curves: dict[str, list[tuple[float, float]]], title: str) -> str:
    """An SVG of the curves, name -> [(step, loss), ...], with a legend of their last values."""
    xs, ys = zip(*itertools.chain.from_iterable(curves.values()))
    low, high, last = min(ys), max(max(ys), min(ys) + 1e-6), max(xs)  # (a flat line has a height)
    svg = ['<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 930 420" font-size="12" '
           'font-family="sans-serif"><rect width="930" height="420" fill="#fff"/>'
           f'<text x="60" y="24" font-size="15">{html.escape(title)}</text>'
           '<text x="720" y="390">step</text>']
    for i in range(6):  # lines across, and numbers at both axes
        x, y, loss = 60 + 128 * i, 372 - 65.6 * i, low + (high - low) * i / 5
        svg.append(f'<path d="M60 {y:.1f}h640" stroke="#e6e6e6"/><text x="15" y="{y + 4:.1f}">'
                   f'{loss:.2f}</text><text x="{x}" y="390" text-anchor="middle">'
                   f'{last * i / 5:.0f}</text>')
    for i, (name, points) in enumerate(curves.items()):
        y, colour = 56 + 18 * i, f"hsl({210 + 150 * i}, 60%, {60 - 3 * i}%)"
        line = [f"{60 + 640 * step / last:.1f},{372 - 328 * (loss - low) / (high - low):.1f}"
                for step, loss in points]
        svg.append(f'<polyline points="{" ".join(line)}" fill="none" stroke="{colour}" '
                   f'stroke-width="2"/><text x="715" y="{y}" fill="{colour}">'
                   f'{html.escape(name)}: {points[-1][1]:.3f}</text>')
    return "\n".join([*svg, "</svg>\n"])


def save(run, name: str, task, model, **state) -> None:
    """Write a checkpoint: tensors and plain types only. The old one stays until it is whole."""
    if ranks()[0] == 0:
        state |= dict(kind=type(task).__name__, task=asdict(task), config=asdict(model.config),
                      run=asdict(run), about=task.description, model=model.state_dict())
        with replacing(Path(run.out_dir) / name) as file:
            torch.save(state, file)


# 6. The machine -----------------------------------------------------------------------------------


def ranks() -> tuple[int, int]:
    """(number of this process, how many there are) of those that train together (`torchrun`)."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def add_up(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all ranks; all of them are on their way at once."""
    if ranks()[1] > 1:
        for sent in [torch.distributed.all_reduce(tensor, async_op=True) for tensor in tensors]:
            sent.wait()


def choose_device(name: str) -> torch.device:
    """The device of this name; "auto": the best there is. Raises ValueError where it is missing."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    name = next(kind for kind in there if there[kind]) if name == "auto" else name
    if not there[name]:
        raise ValueError(f"this PyTorch sees no {name} device: use --device cpu")
    return torch.device(name)


def machine(run):
    """(device, dtype, autocast to it, scaler for float16), see --device and --dtype. "auto" asks
    what a device can do, not how fast it is right now: a machine always gives the same numbers."""
    name = (device := choose_device(run.device)).type
    if ranks()[1] > 1 and not torch.distributed.is_initialized():
        if name == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # of several GPUs, its own
        backend, wait = "cpu:gloo,cuda:nccl" if name == "cuda" else "gloo", timedelta(minutes=30)
        torch.distributed.init_process_group(backend, timeout=wait)  # (a corpus is made meanwhile)
    able = torch.cpu.get_capabilities() if name == "cpu" else {}
    fastest = "bfloat16" if able.get("avx512_bf16") or able.get("amx_bf16") else "float32"
    if name == "cuda":  # a T4 (7.5) has no bfloat16
        fastest = "bfloat16" if torch.cuda.get_device_capability()[0] >= 8 else "float16"
        torch.backends.cuda.enable_cudnn_sdp(False)  # it makes a plan for each new length
        torch.set_float32_matmul_precision("high")  # TF32 for products of float32
    # As it comes, glibc hands each large tensor that is freed back to the system, which clears its
    # pages anew: a fifth of a step on a CPU. So it is told to keep them (trim, top pad, no mmaps).
    with contextlib.suppress(OSError, AttributeError):
        for option, value in (-1, 2**31 - 1), (-2, 64 << 20), (-4, 0):
            ctypes.CDLL("libc.so.6").mallopt(option, value)
    dtype = getattr(torch, fastest if run.dtype == "auto" else run.dtype)
    return (device, dtype, torch.autocast(name, dtype, enabled=dtype != torch.float32),
            torch.amp.GradScaler(name, 2.0**13, enabled=dtype == torch.float16))


def compile_loss(task, run, device) -> None:
    """Compile a task's loss in training: by --compile, or on CUDA where it pays: it takes half a
    minute, and saves some milliseconds a step."""
    long = run.max_steps >= 3000 and device.type == "cuda"
    if run.compile or run.compile is None and long and find_spec("triton"):
        say("compiling: the first steps take a minute; --compile false begins at once")
        warnings.filterwarnings("ignore", module=r"torch\._inductor")  # meant for its authors
        torch._dynamo.config.suppress_errors = run.compile is None  # what fails runs as it is
        plain, fast = task.loss, torch.compile(task.loss)
        task.loss = lambda model, batch: (fast if model.training else plain)(model, batch)


@contextlib.contextmanager
def asked_to_stop():
    """Within it Ctrl-C, or SIGTERM, in any rank makes the yielded function true, in all of them."""
    pressed = []

    def note(number, frame):
        signal.signal(number, signal.default_int_handler)  # the second stops at once
        pressed.append(number)
        os.write(2, b"\nstopping after this step; Ctrl-C once more saves nothing\n")  # (no print)

    def anywhere() -> bool:
        add_up([total := torch.tensor(float(len(pressed)))])  # () float32
        return bool(total)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield anywhere
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# 7. Flags out of dataclasses ----------------------------------------------------------------------


@dataclass
class Run:
    """From what, to where, on which machine, for how long, and how fast."""

    out_dir: str = ""  # folder of the run: checkpoints, log and chart
    init_from: str = "scratch"  # scratch, resume; a run, a checkpoint, a published model's name
    data: str = "input.txt"  # a file, folder or URL, or shakespeare, tinystories, imdb
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the fastest there is
    seed: int = 0  # of all random draws: the same seed, the same result
    max_steps: int = 1000  # optimizer steps
    epochs: float = 0.0  # passes over the training part; if given, max_steps follows from it
    batch_size: int = 32  # sequences that are computed at once
    grad_accum: int = 1  # such batches per step; their gradients are added
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for matrices, with AdamW for all else
    lr: float = 0.003  # AdamW's highest learning rate
    matrix_lr: float = 0.015  # Muon's highest learning rate
    weight_decay: float = 0.0  # matrices shrink by this times the rate (not in less than 2 passes)
    warmup_steps: int = 20  # steps in which the learning rate rises
    schedule: Literal["linear", "cosine"] = "linear"  # how it falls to zero afterwards
    grad_clip: float = 1.0  # largest norm of the gradient; longer ones are scaled down (0: never)
    log_interval: int = 10  # steps between two lines of the log
    eval_interval: int = 100  # steps between two evaluations, each with a checkpoint (0: an epoch)
    snapshot_interval: int = 0  # steps between two checkpoints that are kept for good (0: none)
    patience: int = 0  # stop after so many evaluations without a lower held-out loss (0: never)
    compile: bool | None = None  # torch.compile (default: on CUDA, to pretrain 3000 steps or more)
    freeze: int = 0  # so many of the lowest layers, and the embeddings, stay as they are
    scratch: bool = False  # forget the weights: what is learned without pretraining?
    to: str = "exported"  # the folder that export writes


def boolean(text: str) -> bool:
    """true or false, as a flag's value. Raises ValueError for others."""
    return bool(("false", "true").index(text.lower()))


def add_flags(parser, cls, names, defaults: dict) -> None:
    """A flag for each field (in `names`) of a dataclass. Its help is the comment behind it."""
    group, helps = parser.add_argument_group(cls.__name__), {}  # helps: field -> its comment
    with contextlib.suppress(OSError):  # the source was not shipped
        helps |= re.findall(r"(?m)^    (\w+):.*?  # (.*)$", inspect.getsource(cls))
    for option in fields(cls):
        name, kinds = option.name, get_args(option.type) or (option.type,)  # types, or choices
        if option.metadata.get("flag", True) and name in (names or [name]):
            choices = kinds if isinstance(kinds[0], str) else ()  # (`check` sees to them)
            kind = str if choices else {bool: boolean, dict: json.loads}.get(kinds[0], kinds[0])
            note = f"; default {defaults[name]}" if defaults.get(name) else ""
            text = (helps.get(name, "") + note).replace("%", "%%")
            group.add_argument(f"--{name}", metavar="|".join(choices), type=kind, help=text)


def build(cls, settings: dict):
    """An instance of the dataclass from those of the settings that are its fields."""
    return cls(**{x.name: settings[x.name] for x in fields(cls) if x.name in settings})


def parse_command(module, arguments: list[str]):
    """(the command's function, its settings, those given). Defaults < --preset < --config < flags.
    Raises ValueError or argparse.ArgumentError for what cannot be understood."""
    commands, presets = commands_of(module), module.PRESETS
    named = bool(arguments) and not arguments[0].startswith("-")
    command, *flags = arguments if named else ["train", *arguments]
    if command not in commands:
        raise ValueError(f"there is no command {command}: {', '.join(commands)} (or --data FILE?)")
    function, classes, defaults = commands[command]
    options = {option.name: option.default for cls, _ in classes for option in fields(cls)}
    defaults = {name: value for name, value in options.items() if value is not MISSING} | defaults
    parser = argparse.ArgumentParser(
        f"python {module.NAME}.py {command}", "%(prog)s [flags]", function.__doc__,
        f"Commands: {', '.join(commands)}. Without one: train.", allow_abbrev=False,
        exit_on_error=False, argument_default=argparse.SUPPRESS)  # not given: not there
    if classes[0] == (module.Config, None):
        sizes = f"a named size: {', '.join(presets)} (default {next(iter(presets))})"
        parser.add_argument("--preset", metavar="", choices=presets, help=sizes)
        parser.add_argument("--config", metavar="", help="a .json of settings, such as run.json")
    for cls, names in classes:
        add_flags(parser, cls, names, defaults)
    given, others = parser.parse_known_args(flags)
    if others:
        raise ValueError(f"there is no flag {others[0].partition('=')[0]}; --help lists them")
    preset, config = (vars(given).pop(name, None) for name in ("preset", "config"))
    read = read_object(config) if config else {}  # names are checked here, values by the classes
    if odd := read.keys() - options.keys():
        raise ValueError(f"{config}: there is no setting {min(odd)}")
    given, sizes = read | vars(given), presets.get(preset, {})
    rates = module.ADAMW if given.get("optimizer") == "adamw" else {}  # AdamW alone wants others
    return function, defaults | sizes | rates | given, sizes | given  # the later wins


# 8. The commands. `module` is gpt, bert or t5: the file that was started --------------------------

WHICH = "out_dir init_from device dtype seed".split()  # the fields of Run that all commands have
TRAIN = [option.name for option in fields(Run) if option.name != "to"]
LEAST = {option.name: 0 for option in fields(Run) if option.type in (int, float)}
LEAST |= dict(max_steps=1, batch_size=1, grad_accum=1, log_interval=1, seed=(0, 2**31))


def commands_of(module) -> dict[str, tuple]:
    """name -> (function, [(dataclass, its fields that are flags, or None: all)], defaults)."""
    first, own = next(iter(module.PRESETS.values())), f"out/{module.NAME}"
    sizes = [(module.Config, None), (module.Pretraining, None), (Run, TRAIN)]
    learns = [(module.Finetuning, None), (Run, TRAIN), (module.Config, ["dropout"])]
    which = dict(out_dir=own, init_from="", data="")  # "": as the run has it
    tuned = dict(kind=module.Finetuning, out_dir=f"{own}-finetuned", init_from=own, data="",
                 log_interval=20, eval_interval=0, patience=3, dropout=None,
                 compile=False, **module.FINETUNING["laptop"])  # (it would be, for each length)
    commands = dict(
        train=(train_command, sizes, first | dict(out_dir=own, kind=module.Pretraining)),
        finetune=(train_command, learns, tuned),
        generate=(generate_command, [(module.GenerateConfig, None), (Run, WHICH)], which),
        eval=(eval_command, [(Run, [*WHICH, "data", "batch_size"])], which),
        export=(export_command, [(Run, [*WHICH, "to"])], which),
        bench=(bench_command, sizes, first))
    if hasattr(module, "LADDER"):
        flags = [*module.LADDER_RUN, "device", "dtype", "seed"]
        both = [(module.Config, flags), (Run, flags)]
        commands["ladder"] = (module.ladder_command, both, module.LADDER_RUN)
    return commands


ADVICE = {  # what an error of the machine looks like -> what to do
    r"^torch\._(dynamo|inductor)": "leave out --compile, or install a compiler",
    "MemoryError|allocat|of memory|abruptly": "no memory: take a smaller --batch_size or model",
    "(?i)connection|peer|nccl": "another rank has ended; go on with --init_from resume",
}


def run_command(module, arguments: list[str]) -> int:
    """Run a command. Returns the exit status: 0 done, 2 a mistake, or no memory or compiler (a line
    says which), 130 Ctrl-C. Other errors are the code's, and are raised."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # (None: it was closed)
        stream.reconfigure(errors="replace")  # where the terminal has no such character
    try:
        function, settings, given = parse_command(module, arguments)
        module.check(build(Run, settings), **LEAST)  # (other classes check their fields)
        status = function(module, settings, given)
        sys.stdout.flush()  # may fail, too
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # nobody reads on: `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (ValueError, OSError, argparse.ArgumentError) as error:
        message = str(error)
    except (RuntimeError, MemoryError) as error:
        message = f"{type(error).__module__} {error!r}"[:200]
        advice = [advice for sign, advice in ADVICE.items() if re.search(sign, message)]
        if not advice:
            raise
        message = f"{advice[0]}: {message}"
    print("error:", *message.split(), file=sys.stderr)  # whichever rank it is
    return 2


def open_model(module, name, ready: bool = False) -> tuple:
    """(model, state) of a run's folder (its best), a checkpoint, or a published model, whose
    tokenizer may be None unless it has to be `ready`. Raises ValueError. Nothing in it is run."""
    runs = [Path(name) / file for file in ("best.pt", "ckpt.pt")]  # of a folder, in this order
    path = next((run for run in runs if run.exists()), Path(name))
    try:
        if path.is_file():
            state = torch.load(path, map_location="cpu", weights_only=True)  # runs no code
            state["task"] = build(getattr(module, state["kind"]), state["task"])
            state["tokenizer"] = Tokenizer.load(path.with_name("tokenizer.json"))
            model = module.Model(module.Config(**state["config"]))
            model.load_state_dict(state["model"])
        else:
            model, state = load_published(module, pretrained_folder(name))
        if state["tokenizer"] or ready:
            never_write(module, model, state["tokenizer"])
    except Exception as error:  # a foreign file can fail in any way
        reason = str(error).partition(". ")[0][:300]  # (PyTorch's next: "set weights_only=False")
        raise ValueError(f"{module.NAME}.py cannot open {path}: {reason}") from None
    return model, state


def load_published(module, folder: Path) -> tuple:
    """(model, state) of a published model."""
    found = read_object(folder / "config.json")
    for key, value in module.FIXED.items():
        if found.get(key) not in (None, value):
            raise ValueError(f"{key} is {found[key]} instead of {value}")
    weights = {module.published_name(name): x for name, x in stored_weights(folder).items()}
    model = module.Model(module.from_published(found, weights))
    targets = published_weights(module, model)
    weights = {name: x for name, x in weights.items()
               if name in targets or not re.fullmatch(module.NO_WEIGHTS, name)}
    missing = "$^" if any(re.match(module.HEAD, x) for x in weights) else module.HEAD  # no head
    load_weights(weights, targets, missing)
    task = {"kind": "Pretraining"} | found.get("task", {})
    if labels := getattr(model.config, "n_labels", 0):  # a BERT, fine-tuned here or elsewhere
        names = [found.get("id2label", {}).get(str(i), f"LABEL_{i}") for i in range(labels)]
        task = dict(pairs=None) | task | dict(kind="Finetuning", labels=names)
    readable = any((folder / files[0]).exists() for files in VOCABULARIES)
    tokenizer = Tokenizer.from_pretrained(folder) if readable else None
    return model, dict(step=0, run={}, task=build(getattr(module, task["kind"]), task),
                       headless=missing != "$^" and task["kind"] == "Pretraining",
                       tokenizer=tokenizer)


def never_write(module, model, tokenizer) -> None:
    """Tell the model which ids it must not write: those that spell nothing (tables of embeddings
    often have more rows than there are tokens), and special tokens that no text has."""
    size, special = model.config.vocab_size, module.SPECIAL_TOKENS
    if not tokenizer or tokenizer.vocab_size > size or {*special} - tokenizer.special.keys():
        raise ValueError(f"it has no tokenizer of at most {size} tokens, {special} among them")
    known = {*tokenizer.spelling, *tokenizer.special.values()}  # ids that spell something
    known -= {tokenizer.special.get(token) for token in module.NEVER}  # [MASK] and the like
    model.never = torch.tensor([i for i in range(size) if i not in known], dtype=torch.long)


def load(module, settings: dict) -> tuple:
    """(model, task, state, run): what --init_from or --out_dir names, ready to be used."""
    run = build(Run, settings)
    model, state = open_model(module, run.init_from or run.out_dir, ready=True)
    if state.get("headless"):
        raise ValueError(f"{run.init_from} has no head for tokens: finetune it, or train it on")
    state["task"].open(run, model.config, state["tokenizer"])
    torch.manual_seed(run.seed)  # of first weights, of what is drawn
    return model.to(machine(run)[0]).eval(), state["task"], state, run


def train_command(module, settings: dict, given: dict) -> int:
    """Train, from scratch, from a model's weights, or where a run was stopped; `finetune`: by
    examples. (Defaults are for small models; one 512 wide or more goes on with smaller rates.)"""
    folder, origin, state = Path(settings["out_dir"]), settings["init_from"], None
    kind, resuming = settings["kind"], origin == "resume"  # kind: of task
    tuning = kind is module.Finetuning
    if tuning or origin != "scratch":
        model, state = open_model(module, folder / "ckpt.pt" if resuming else origin, ready=True)
        settings = take_over(module, kind, model, state, settings, given)
    if "max_steps" in given and "epochs" not in given:
        settings["epochs"] = 0.0  # steps were asked for, not passes
    task, run, config = (build(cls, settings) for cls in (kind, Run, module.Config))
    module.check(run, freeze=(0, config.n_layer))
    device, *_ = machine(run)
    source = open_source(module, task, run.data, config.vocab_size, state and state["tokenizer"])
    tokenizer = state["tokenizer"] if state else source.tokenizer
    if not state:
        config = replace(config, vocab_size=tokenizer.vocab_size)  # a short text has fewer
    config = task.open(run, config, tokenizer, source)
    if resuming and (state["about"], state["task"]) != (task.description, task):
        say("the data, or what is asked about it, is not as before: a new best begins")
        state["best"], state["worse"] = math.inf, 0  # losses on other data do not compare
    epoch = math.ceil(task.rows / (run.batch_size * run.grad_accum))  # in steps
    run.max_steps = max(math.ceil(run.epochs * epoch), 1) if run.epochs else run.max_steps
    run.eval_interval, run.epochs = run.eval_interval or epoch, 0.0
    if run.max_steps < 2 * epoch and "weight_decay" not in given and not resuming:
        run.weight_decay = 0.0  # it is against learning by heart, which takes several passes
    run.warmup_steps = min(run.warmup_steps, run.max_steps // 5)  # of few steps not all are warm-up
    torch.manual_seed(run.seed)  # of the first weights
    learner = module.Model(config)
    if state and (resuming or not run.scratch):  # go on from these weights
        new = learner.state_dict()  # a head for labels is not in the model
        old = {name: x for name, x in model.state_dict().items()
               if name in new and x.shape == new[name].shape}
        learner.load_state_dict(new | old)  # (what is new stays as drawn)
    low = "|".join(["embedding", *(rf"blocks\.{i}\." for i in range(run.freeze))])
    for name, p in learner.named_parameters():
        p.requires_grad_(not (run.freeze and re.search(low, name)))
    never_write(module, learner, task.tokenizer)
    if ranks()[0] == 0:
        write_settings(folder, config, task, run, new=not resuming)
    compile_loss(task, run, device)
    finished = module.train(run, task, learner.to(device), state if resuming else None)
    again = ["generate", "eval"] if finished else ["finetune " * tuning + "--init_from resume"]
    say("", f"{folder} has the checkpoints, log.jsonl and loss.svg. Go on with:", *(
        f"  python {module.NAME}.py {it} --out_dir {shlex.quote(str(folder))}" for it in again))
    return 0 if finished else 130


def take_over(module, kind, model, state: dict, settings: dict, given: dict) -> dict:
    """The settings of a run that begins with a model (its sizes), or goes on (all)."""
    fixed, run = asdict(model.config), {}  # what cannot change; what was set before
    run |= module.FINETUNING["published"] if model.config.n_embd >= 512 else {}
    if kind is module.Finetuning:
        run |= module.FINETUNING.get(settings["data"], {})  # of a demonstration
    if settings["init_from"] == "resume":
        if type(state["task"]) is not kind:
            raise ValueError(f"{settings['out_dir']} is of another command, {state['kind']}")
        run = asdict(state["task"]) | state["run"]
        fixed |= {name: run[name] for name in ("optimizer", "freeze")}  # their state is kept
    for name in given.keys() & fixed.keys() - {"dropout"}:  # dropout is no weight
        if given[name] != fixed[name]:
            raise ValueError(f"leave out --{name} {given[name]}: the checkpoint has {fixed[name]}")
    return settings | fixed | run | given | {"out_dir": settings["out_dir"]}


def write_settings(folder: Path, config, task, run, new: bool) -> None:
    """Write run.json and tokenizer.json. An earlier run that was evaluated moves to `before`."""
    if new and (folder / "best.pt").exists():
        (folder / "before").mkdir(exist_ok=True)
        for name in "ckpt.pt", "best.pt", "tokenizer.json", "run.json", "log.jsonl", "loss.svg":
            if (folder / name).exists():
                os.replace(folder / name, folder / "before" / name)
        say(f"the run that {folder} held is in {folder / 'before'} now")
    with replacing(folder / "run.json", "w") as file:
        json.dump(asdict(config) | asdict(task) | asdict(run), file, indent=1)
    task.tokenizer.save(folder / "tokenizer.json")


def generate_command(module, settings: dict, given: dict) -> int:
    """Let a model write; a fine-tuned one answers --prompt, or else each line that is typed."""
    options = build(module.GenerateConfig, settings)  # what the model is to do
    model, task, _, run = load(module, settings)
    _, dtype, autocast, _ = machine(run)
    model.to(dtype if dtype == torch.bfloat16 and hasattr(model, "generate") else torch.float32)
    asked = [options.prompt]
    if type(task) is module.Finetuning and not options.prompt:
        say("Type something and press Enter; Ctrl-D ends.")
        asked = filter(None, map(str.strip, sys.stdin or []))
    for prompt in asked:
        with autocast if dtype == torch.float16 else contextlib.nullcontext():
            for part in task.answer(model, replace(options, prompt=prompt)):
                print(part, end="", flush=True)
        print()
    return 0


def eval_command(module, settings: dict, given: dict) -> int:
    """Print the validation loss and the measures of a model as a line of JSON."""
    model, task, state, run = load(module, settings)
    learned = state["run"].get("data", "" if type(task) is module.Finetuning else "input.txt")
    run.data = run.data or learned
    new = Path(run.data).resolve() != Path(learned).resolve()
    source = open_source(module, task, run.data, 0, state["tokenizer"], new)  # (0: has a tokenizer)
    task.open(run, model.config, state["tokenizer"], source)
    say(f"{run.data or 'the stories of input.txt'}, {task.description}")
    found = module.evaluate(model, task, run.batch_size, machine(run)[2])  # all of the part
    if type(task) is module.Pretraining:
        found["perplexity"] = math.exp(min(found.get("mlm_loss", found["val_loss"]), 700))
    print(json.dumps(dict(step=state["step"]) | found))
    return 0


def export_command(module, settings: dict, given: dict) -> int:
    """Write a folder that transformers opens: settings, weights, tokenizer."""
    model, task, state, run = load(module, settings)
    model.save_pretrained(run.to, task)
    roles = dict(module.ROLES, model_max_length=getattr(model.config, "block_size", 512))
    save_tokenizer(state["tokenizer"], run.to, module.TEMPLATE, **roles)
    say(f"{run.to} holds config.json, model.safetensors and tokenizer.json")
    return 0


def bench_command(module, settings: dict, given: dict) -> int:
    """Measure training and generation with random weights and tokens; print a line of JSON."""

    def timed(call, enough: float) -> tuple[float, float]:
        times = []  # `enough` seconds of calls: the first, and the median; the first 2 warm up
        while len(times) < 5 or sum(times) < enough and len(times) < 100:
            begun = time.perf_counter()
            call()
            times.append(time.perf_counter() - begun)
        return times[0], float(np.median(times[2:]))

    run, config, task = (build(cls, settings) for cls in (Run, module.Config, module.Pretraining))
    device, dtype, autocast, scaler = machine(run)
    special = module.SPECIAL_TOKENS
    tokens = np.random.default_rng(0).integers(len(special), config.vocab_size, 1 << 20)
    tokens[[0, -1]] = 0  # the separators around it
    tokenizer = Tokenizer.from_counts({}, 256 + len(special), special)  # of bytes alone
    task.open(run, config, tokenizer, Corpus(tokenizer, tokens, tokens, separator=0))
    model = module.Model(config).to(device)
    optimizer, loss, batch = module.Muon(model, run, dtype), task.loss, task.batch(0)
    compile_loss(task, run, device)
    how, batches = (optimizer, scaler, autocast, run), map(task.batch, itertools.count())
    first, seconds = timed(lambda: module.update(model, task, next(batches), *how).item(), 8)
    matrix = torch.randn([1024 if device.type == "cpu" else 8192] * 2, device=device).to(dtype)
    peak = 2 * len(matrix) ** 3 / timed(lambda: (matrix @ matrix)[0, 0].item(), 0.5)[1] / 1e9
    with FlopCounterMode(display=False) as counter:  # (counts no fused attention on a CPU)
        loss(model, {name: x.to(device) for name, x in batch.items()})[0].sum().backward()
    gflops = counter.get_total_flops() / seconds / 1e9  # the optimizer's are left out
    read = sum(batch[name].numel() for name in batch.keys() & {"idx", "src", "tgt"})
    row = dict(first_step_ms=first * 1e3, ms_per_step=seconds * 1e3, gflops=gflops,
               tokens_per_second=read / seconds, matmul_gflops=peak, share=gflops / peak)
    with contextlib.suppress(ImportError):  # Windows has no `resource`
        from resource import RUSAGE_SELF, getrusage
        unit = 1 if sys.platform == "darwin" else 1024
        row["peak_memory_mb"] = getrusage(RUSAGE_SELF).ru_maxrss * unit / 1e6
    if device.type == "cuda":
        row["peak_memory_mb"] = torch.cuda.max_memory_allocated() / 1e6
    model.to(dtype).never = torch.tensor([1], device=device)  # T5's </s>: no text ends before
    for key, n in ("generate_tokens_per_second", 1), ("generate_batch_tokens_per_second", 32):
        if hasattr(model, "generate"):
            size = [n, 116 if module.NAME == "t5" else 8]
            x = torch.randint(2, config.vocab_size, size).to(device)
            row[key] = n * 120 / timed(lambda: model.generate(x, 120, top_k=50).sum().item(), 0)[1]
    print(json.dumps(row))
    return 0
