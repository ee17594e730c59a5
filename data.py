"""What the three models read from a disk or the net, and what a run writes beside its weights.

    corpus = prepare("input.txt", 1024, ["<|endoftext|>"], separator="<|endoftext|>")
    corpus.tokenizer, corpus.train, corpus.validation        # the tokens are memory-mapped arrays

From a source (a name, a file, a folder, a URL) to tokens it goes in four steps, and each leaves a
file in the cache folder, so the second run starts at once:

    1. download     streamed, resumed where the connection broke, checked
    2. one text     the source becomes one UTF-8 file; <|endoftext|> separates its documents
    3. split        what the source brings for validation, else the last tenth
    4. tokens       a tokenizer is trained on the training part; both parts are encoded, in pieces

Memory stays bounded: a text is only ever read in pieces of a few megabytes, by all cores.
"""

import argparse
import contextlib
import ctypes
import dataclasses
import difflib
import functools
import gzip
import hashlib
import html
import inspect
import itertools
import json
import math
import mmap
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
import typing
from collections import Counter
from pathlib import Path

import numpy as np

from bpe import Tokenizer, split_words

SEPARATOR = "<|endoftext|>"
PIECE = 4 << 20  # bytes of text that are handled at a time


def say(*lines: str) -> None:
    """Print to standard error; standard output is for results."""
    print(*lines, sep="\n", file=sys.stderr, flush=True)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/gpt-bert-t5, or ~/.cache/gpt-bert-t5."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-bert-t5"


@contextlib.contextmanager
def naming(path):
    """A failure to write within it becomes an OSError that names `path` and says what to check."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a full disk
        reason = getattr(error, "strerror", None) or str(error).partition("\n")[0]
        raise OSError(
            f"cannot write {path}: {reason}; is there space left, and permission?") from None


@contextlib.contextmanager
def replacing(path, mode: str = "wb"):
    """Open a temporary file beside `path` that takes its place once it is whole and on the disk.

    Whatever happens meanwhile, `path` holds either all of the old content or all of the new.
    Raises OSError, naming `path`, where it cannot be written (no space, no permission).
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


# --------------------------------------------------------------------------------------------------
# 1. Downloads
# --------------------------------------------------------------------------------------------------


def download(
    url: str, path, size: int | None = None, digest: str | None = None, tries: int = 5
) -> Path:
    """Fetch `url` to `path` unless it is there. What arrives stays in PATH.part and is continued.

    digest: "sha256:..." or "md5:..." of the whole file. Raises OSError when the server refuses,
    when the connection broke `tries` times without a byte of progress, or when size or digest are
    not as expected.
    """
    import requests  # takes a fifth of a second, so only where it is needed

    path = Path(path)
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    failures, reason = 0, ""
    while failures < tries:
        have = part.stat().st_size if part.exists() else 0
        try:
            complete = _fetch(requests, url, part, have)
        except requests.HTTPError as error:
            status = error.response.status_code
            if status < 500 and status != 429:  # (429: too many requests)
                raise OSError(
                    f"{url} answered {status} {error.response.reason}: check the address") from None
            reason = f"it answered {status}"
        except (requests.RequestException, ConnectionError) as error:
            reason = type(error).__name__
        else:
            if complete:
                break
            reason = "the connection was cut"
        progressed = part.exists() and part.stat().st_size > have
        failures = 0 if progressed else failures + 1
        time.sleep(0 if progressed else min(2**failures / 4, 8))
    else:
        raise OSError(
            f"cannot download {url}: {reason}, {tries} times; the same command continues it later")
    _check_download(part, url, size, digest)
    os.replace(part, path)
    return path


def _fetch(requests, url: str, part: Path, have: int) -> bool:
    """One request for what comes after the first `have` bytes. True when the file is complete."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    headers["Accept-Encoding"] = "identity"  # so that sizes are those of the file
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        if answer.status_code == 416:  # nothing comes after: we have it all, or a stale part
            total = answer.headers.get("Content-Range", "").rpartition("/")[2]
            if total == str(have):
                return True
            part.unlink()
            return False
        answer.raise_for_status()
        if have and answer.status_code != 206:  # the server cannot continue: begin anew
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with open(part, "ab" if have else "wb") as file:
            for block in answer.iter_content(1 << 14):  # of a block cut off, nothing arrives
                with naming(part):
                    file.write(block)
                have += len(block)
                _show_download(url, have, total)
    if sys.stderr.isatty():
        say("")
    return total is None or have == total


def _show_download(url: str, have: int, total: int | None) -> None:
    if sys.stderr.isatty():
        share = f" of {total / 1e6:.1f} ({have / total:.0%})" if total else ""
        print(f"\r{url.rpartition('/')[2]}: {have / 1e6:.1f}{share} MB",
              end="", file=sys.stderr, flush=True)


def _check_download(part: Path, url: str, size: int | None, digest: str | None) -> None:
    """Remove the file and raise OSError where it is not what was expected."""
    problem = ""
    if size is not None and part.stat().st_size != size:
        problem = f"has {part.stat().st_size:,} bytes instead of {size:,}"
    elif digest is not None:
        algorithm, _, expected = digest.partition(":")
        found = hashlib.new(algorithm)
        with open(part, "rb") as file:
            for block in iter(functools.partial(file.read, PIECE), b""):
                found.update(block)
        if found.hexdigest() != expected:
            problem = f"does not have the {algorithm} sum {expected}"
    if problem:
        part.unlink()
        raise OSError(f"what came from {url} {problem}: it was removed; try again later")


# --------------------------------------------------------------------------------------------------
# 2. Sources: whatever it is becomes one text file
# --------------------------------------------------------------------------------------------------

HUB = "https://huggingface.co/datasets/roneneldan/TinyStories/resolve/main"
NAMED = {  # name -> what to download: (part, url, size, digest)
    "shakespeare": [(
        "train",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        1_115_394, "sha256:86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )],
    "tinystories": [
        ("train", f"{HUB}/TinyStories-train.txt", None, None),
        ("validation", f"{HUB}/TinyStories-valid.txt", None, None),
    ],
    "imdb": [(
        "archive",
        "https://ai.stanford.edu/~amaas/data/sentiment/aclImdb_v1.tar.gz",
        84_125_825, "md5:7c2ac02c03563afcf9b574c7e56c153a",
    )],
}
READABLE = (".txt", ".gz", ".jsonl")


def find_source(name: str) -> dict[str, Path]:
    """The text files of a source: {"train": path} and, where the source brings it, "validation".

    name: a key of NAMED, a URL, a file (.jsonl, .gz of any of these, anything else is plain text),
    or a folder of .txt, .jsonl and .gz files. Raises OSError or ValueError if there is nothing.
    """
    if name in NAMED:
        folder = cache_folder() / name
        files = {
            part: download(url, folder / url.rpartition("/")[2], size, digest)
            for part, url, size, digest in NAMED[name]
        }
        if "archive" in files:
            return {part: one_text([files["archive"]], part) for part in ("train", "validation")}
        return files
    if re.match(r"https?://", name):
        key = hashlib.sha256(name.encode()).hexdigest()[:16]
        file_name = (
            re.sub(r"[^\w.-]", "_", name.partition("?")[0].rpartition("/")[2])[-80:] or "text")
        return {"train": one_text([download(name, cache_folder() / key / file_name)])}
    path = Path(name)
    if not path.exists() and not path.is_absolute():
        path = Path(__file__).parent / name  # input.txt, from another working folder
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix in READABLE and file.is_file())
        if not files:
            raise ValueError(f"the folder {name} holds no {', '.join(READABLE)} file")
        return {"train": one_text(files)}
    if not path.is_file():
        raise ValueError(
            f"no data at {name}: give a file, a folder, a URL or one of {', '.join(NAMED)}")
    return {"train": one_text([path])}


def one_text(files: list[Path], part: str = "train") -> Path:
    """The one UTF-8 file of these: itself if it is one plain file, else made in the cache."""
    if len(files) == 1 and files[0].suffix not in (".gz", ".jsonl"):
        return files[0]
    path = cache_folder() / "texts" / f"{fingerprint(files, part)}.txt"
    if not path.exists():
        with replacing(path) as out:
            for i, document in enumerate(
                itertools.chain.from_iterable(read_documents(f, part) for f in files)
            ):
                out.write(b"\n" + SEPARATOR.encode() + b"\n" if i else b"")
                for block in document:
                    out.write(block)
    return path


def read_documents(path: Path, part: str):
    """Yield a file's documents (JSON lines, members of an archive), each an iterable of bytes."""
    if path.name.endswith(".tar.gz"):
        # IMDb's layout. Nothing is unpacked to the disk, so no member can be written anywhere.
        folders = "train/(pos|neg|unsup)" if part == "train" else "test/(pos|neg)"
        with tarfile.open(path, "r|gz") as archive:
            for member in archive:
                if member.isfile() and re.fullmatch(
                    rf"aclImdb/{folders}/\d+_\d+\.txt", member.name
                ):
                    yield [archive.extractfile(member).read().replace(b"<br /><br />", b"\n\n")]
        return
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
        if not path.name.removesuffix(".gz").endswith(".jsonl"):
            yield iter(functools.partial(file.read, PIECE), b"")
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield [json.loads(line)["text"].encode("utf-8", "replace")]
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise ValueError(
                        f'{path}, line {number}: not a JSON object with a "text"') from None


def fingerprint(files: list[Path], *extra) -> str:
    """Names a cache entry: changes with a file's path, size or time of change, and with `extra`."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([stats, extra]).encode()).hexdigest()[:20]


# --------------------------------------------------------------------------------------------------
# 3. The split, and pieces that can be handled apart
# --------------------------------------------------------------------------------------------------


def split_point(path: Path) -> int:
    """The byte where the last tenth begins: of the documents, or of a text that is one stream."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: there is nothing to learn from")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        found = re.finditer(re.escape(SEPARATOR).encode() + b"\n?", text)
        ends = np.fromiter((match.end() for match in found), np.int64)
        documents = len(ends) and len(ends) + bool(text[ends[-1] :].strip())  # one more behind them
        if documents > 1:
            return int(ends[max(int(documents * 0.9), 1) - 1])
        point = size * 9 // 10
        while point < size and text[point] & 0xC0 == 0x80:  # inside a character
            point += 1
        return point


def pieces(path: Path, start: int, stop: int) -> list[tuple[Path, int, int]]:
    """Cut bytes start..stop into pieces of about PIECE bytes that can be tokenized each by itself.

    A cut is made behind a separator, else where a printable ASCII character is followed by a line
    break or a space: there the splitting pattern of BPE always begins a new word. (A text of 4 MB
    without any such place is cut between two characters, which may cost a token.)
    """
    cuts = [start]
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        while stop - cuts[-1] > PIECE:
            begin, end = cuts[-1], cuts[-1] + PIECE
            found = text.rfind(SEPARATOR.encode(), begin, end)
            cut = found + len(SEPARATOR)
            cut += text[cut : cut + 1] == b"\n"  # it belongs to the separator
            if found < 0:
                tail = text[end - (PIECE >> 4) : end]
                words = (list(re.finditer(rb"[!-~](?=\n)", tail))
                         or list(re.finditer(rb"[!-~](?= )", tail)))
                cut = end - len(tail) + words[-1].end() if words else end
                while text[cut] & 0xC0 == 0x80:
                    cut -= 1
            cuts.append(cut)
    return [(path, first, last) for first, last in itertools.pairwise([*cuts, stop])]


def read_piece(piece: tuple[Path, int, int]) -> list[str]:
    """The documents (or parts of them) in a piece. Raises ValueError where it is not UTF-8."""
    path, start, stop = piece
    with open(path, "rb") as file:
        file.seek(start)
        raw = file.read(stop - start)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset "
            f"{start + error.start:,}; convert it (iconv -f latin1 -t utf-8), "
            f"or drop such bytes (iconv -c -f utf-8 -t utf-8)"
        ) from None
    text = text.removeprefix("\ufeff") if start == 0 else text
    return re.split(rf"\n?{re.escape(SEPARATOR)}\n?", text)


def count_piece(piece: tuple[Path, int, int]) -> Counter:
    """How often each word occurs in a piece."""
    counts = Counter()
    for document in read_piece(piece):
        counts.update(split_words(document))
    return counts


load_tokenizer = functools.lru_cache(1)(Tokenizer.load)  # each process loads it once


def encode_piece(job: tuple[tuple, Path, int, str]) -> np.ndarray:
    """Ids of a (piece, tokenizer's path, separator, dtype), each SEPARATOR as token `separator`."""
    piece, tokenizer_path, separator, dtype = job
    tokenizer = load_tokenizer(tokenizer_path)
    ids = []
    for i, document in enumerate(read_piece(piece)):
        ids += [tokenizer.special[separator]] if i else []
        ids += tokenizer.encode(document)
    return np.array(ids, dtype)


def parallel(function, jobs: list):
    """map(function, jobs) in order, by all cores where there is enough to do."""
    if len(jobs) < 8:
        yield from map(function, jobs)
        return
    with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), len(jobs))) as pool:
        yield from pool.imap(function, jobs)


# --------------------------------------------------------------------------------------------------
# 4. Tokens
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(eq=False)
class Corpus:
    """A source as tokens: memory-mapped arrays of uint16, or uint32 above 65,536 token types."""

    tokenizer: Tokenizer
    train: np.ndarray  # (n,)
    validation: np.ndarray  # (m,)
    documents: int  # in both parts together; 1 for a text that is one stream
    separator: int  # the token before, between and after documents

    def edges(self, part: str) -> np.ndarray:
        """Where the separators stand in "train" or "validation", (n,) int64."""
        tokens = getattr(self, part)
        return np.concatenate([
            start + np.flatnonzero(tokens[start : start + PIECE] == self.separator)
            for start in range(0, len(tokens), PIECE)
        ])

    @functools.cached_property
    def token_bytes(self) -> np.ndarray:
        """How many bytes each token spells, (vocab_size,) int64; special tokens spell none."""
        lengths = np.zeros(self.tokenizer.vocab_size, np.int64)
        for token, spelled in self.tokenizer.spelling.items():
            lengths[token] = len(spelled)
        return lengths


def prepare(source: str, vocab_size: int, special_tokens, separator: str, tokenizer=None) -> Corpus:
    """The corpus of a source, from the cache where it is there.

    tokenizer: use this one; without it, one of `vocab_size` types is trained on the training part.
    separator: the special token that stands before, between and after documents.
    Raises ValueError or OSError when the source cannot be used.
    """
    files = find_source(source)
    texts = list(files.values())
    if tokenizer is None:
        path = cache_folder() / "tokenizers" / (
            f"{fingerprint(texts, vocab_size, list(special_tokens))}.json")
        if not path.exists():
            counts = Counter()
            for counted in parallel(count_piece, plan(files)["train"]):
                counts.update(counted)
            with replacing(path, "w") as file:
                json.dump(Tokenizer.from_counts(counts, vocab_size, special_tokens).to_json(), file)
        tokenizer = Tokenizer.load(path)
    folder = cache_folder() / "tokens" / fingerprint(texts, tokenizer.to_json(), separator)
    if not (folder / "corpus.json").exists():
        with naming(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            making = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", dir=folder.parent))
        try:
            encode_corpus(plan(files), making, tokenizer, separator)
            with contextlib.suppress(OSError):  # another process was faster
                os.replace(making, folder)
        finally:
            shutil.rmtree(making, ignore_errors=True)
    facts = json.loads((folder / "corpus.json").read_text())
    parts = {part: np.memmap(folder / f"{part}.bin", facts["dtype"], "r")
             for part in ("train", "validation")}
    return Corpus(tokenizer, parts["train"], parts["validation"], facts["documents"],
                  tokenizer.special[separator])


def plan(files: dict[str, Path]) -> dict[str, list]:
    """The pieces of the training and of the validation part."""
    end = files["train"].stat().st_size
    if "validation" in files:
        other = files["validation"]
        return {"train": pieces(files["train"], 0, end),
                "validation": pieces(other, 0, other.stat().st_size)}
    split = split_point(files["train"])
    return {"train": pieces(files["train"], 0, split),
            "validation": pieces(files["train"], split, end)}


def encode_corpus(
    parts: dict[str, list], folder: Path, tokenizer: Tokenizer, separator: str
) -> None:
    """Write train.bin, validation.bin and corpus.json into `folder`.

    A part is: separator document separator ... separator. A text of one stream is one document.
    """
    with naming(folder):
        tokenizer.save(folder / "tokenizer.json")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    edge, documents = np.array([tokenizer.special[separator]], dtype), 0
    for part, cut in parts.items():
        jobs = [(piece, folder / "tokenizer.json", separator, dtype) for piece in cut]
        with open(folder / f"{part}.bin", "wb") as file:
            last = None
            for ids in itertools.chain([edge], parallel(encode_piece, jobs), [edge]):
                if len(ids) and ids[0] == edge[0] == last:  # the text begins or ends with one, too
                    ids = ids[1:]
                documents += int((ids == edge).sum())
                last = ids[-1] if len(ids) else last
                with naming(folder):
                    file.write(ids.tobytes())
        documents -= 1  # n documents have n + 1 separators around them
    documents = documents if documents > len(parts) else 1  # one text, cut in two
    with naming(folder):
        (folder / "corpus.json").write_text(json.dumps(dict(dtype=dtype, documents=documents)))


def random_corpus(vocab_size: int, special_tokens, length: int = 1 << 20) -> Corpus:
    """Random tokens, to measure with."""
    tokens = np.random.default_rng(0).integers(len(special_tokens), vocab_size, length)
    tokens[[0, -1]] = 0  # the separators around it
    return Corpus(
        Tokenizer.from_counts({}, 256 + len(special_tokens), special_tokens), tokens, tokens, 1,
        separator=0)


def sliding_windows(
    tokens, block_size: int, stride: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cut a stream into (inputs, targets), both (n, block_size) int64: a target is the next token.

    Windows begin every `stride` tokens (1 to block_size) and every token but the first is a target
    at least once. The last window is filled up with `pad_id`; there the targets are -100, which the
    loss ignores.

    >>> sliding_windows([5, 6, 7, 8], block_size=2, stride=2, pad_id=0)
    (array([[5, 6],
           [7, 0]]), array([[   6,    7],
           [   8, -100]]))
    """
    if not 1 <= stride <= block_size:
        raise ValueError(f"stride {stride} is not between 1 and block_size {block_size}")
    tokens = np.asarray(tokens, np.int64)
    n = 1 + max(math.ceil((len(tokens) - 1 - block_size) / stride), 0)
    missing = (n - 1) * stride + block_size + 1 - len(tokens)
    at = np.arange(n)[:, None] * stride + np.arange(block_size)  # (n, block_size)
    inputs = np.pad(tokens, (0, missing), constant_values=pad_id)[at]
    targets = np.pad(tokens, (0, missing), constant_values=-100)[at + 1]
    return inputs, targets


@functools.lru_cache(4)
def epoch_order(n: int, seed: int, epoch: int) -> tuple[np.ndarray, float]:
    """A random order of n rows and a random number from [0, 1), the same for the same arguments."""
    generator = np.random.default_rng((seed, epoch))
    return generator.permutation(n), generator.random()


def shuffled_rows(n: int, seed: int, first: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers first..first + count of endless epochs, each with all n rows in an order of its own.

    Returns the rows, (count,) int64, and for each its epoch's random number from [0, 1), (count,).
    """
    drawn = []
    for number in range(first, first + count):
        order, luck = epoch_order(n, seed, number // n)
        drawn.append((order[number % n], luck))
    rows, lucks = zip(*drawn)
    return np.array(rows), np.array(lucks)


# --------------------------------------------------------------------------------------------------
# 5. What a run writes: its log and the chart of it
# --------------------------------------------------------------------------------------------------


class RunLog:
    """log.jsonl, a line of JSON per event; loss.svg, drawn from it; progress on the terminal."""

    def __init__(self, folder, resumed_at: int | None = None):
        """resumed_at: the step the run continues from; what was logged after it is dropped."""
        self.folder, self.rows = Path(folder), []
        path = self.folder / "log.jsonl"
        if resumed_at is not None and path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except ValueError:  # cut short by a crash
                    break
                if row["step"] <= resumed_at:
                    self.rows.append(row)
        with replacing(path, "w") as file:
            file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.file = open(path, "a")
        self.started = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0)
        self.renewing = False

    def write(self, **row) -> dict:
        """Append a row; its `seconds` since the run's start are added. Returns it."""
        row["seconds"] = round(time.monotonic() - self.started, 2)
        self.rows.append(row)
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        return row

    def progress(self, text: str) -> None:
        """Show a line: on a terminal in place of the last one, else below it."""
        if not sys.stderr.isatty():
            return say(text)
        width = shutil.get_terminal_size().columns - 1
        print("\r\033[K" + text[:width], end="", file=sys.stderr, flush=True)
        self.renewing = True

    def say(self, *lines: str) -> None:
        """Print lines that stay, below the progress line."""
        if self.renewing:
            print("\r\033[K", end="", file=sys.stderr)
            self.renewing = False
        say(*lines)

    def draw(self, title: str) -> None:
        """Redraw loss.svg."""
        curves = {
            name: [(row["step"], row[key]) for row in self.rows if key in row]
            for name, key in (("training", "loss"), ("validation", "val_loss"))
        }
        with replacing(self.folder / "loss.svg", "w") as file:
            file.write(line_chart(curves, title, "step", "loss"))


COLOURS = ("#9db8d9 #c8401f #2e7d32 #7b4fa3 #b8860b #00838f "
           "#ad1457 #5d4037 #455a64 #9e9d24 #1565c0 #ef6c00").split()


def ticks(low: float, high: float, about: int = 6) -> list[float]:
    """Round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    rough = max((high - low) / about, 1e-9)
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step + 1e-9) + 1)]


def line_chart(
    curves: dict[str, list[tuple[float, float]]], title: str, x_label: str, y_label: str
) -> str:
    """An SVG of the curves, name -> [(x, y), ...], with axes and a legend of their last values."""
    curves = {name: points for name, points in curves.items() if points}
    width, height, left, right, top, bottom = 720, 420, 60, 20, 44, 48
    xs = [x for points in curves.values() for x, _ in points] or [0]
    ys = sorted(y for points in curves.values() for _, y in points) or [0, 1]
    x_low, x_high = 0, max(max(xs), 1)
    y_low, y_high = ys[0], ys[-1]
    margin = 0.05 * (y_high - y_low) or 0.5
    y_low, y_high = y_low - margin, y_high + margin

    def across(x):
        return left + (x - x_low) / (x_high - x_low) * (width - left - right)

    def down(y):
        return height - bottom - (y - y_low) / (y_high - y_low) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="system-ui, sans-serif" font-size="12" fill="#444">',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="24" font-size="15" fill="#111">{html.escape(title)}</text>',
    ]
    for y in ticks(y_low, y_high):
        parts.append(f'<path d="M{left} {down(y):.1f}H{width - right}" stroke="#e6e6e6"/>')
        parts.append(f'<text x="{left - 8}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks(x_low, x_high):
        parts.append(f'<text x="{across(x):.1f}" y="{height - bottom + 18}" '
                     f'text-anchor="middle">{x:g}</text>')
    parts.append(f'<path d="M{left} {height - bottom}H{width - right}" stroke="#888"/>')
    parts.append(f'<text x="{(left + width - right) / 2}" y="{height - 10}" '
                 f'text-anchor="middle">{x_label}</text>')
    parts.append(f'<text transform="translate(16 {height / 2})rotate(-90)" '
                 f'text-anchor="middle">{y_label}</text>')
    for i, (name, points) in enumerate(curves.items()):
        colour = COLOURS[i % len(COLOURS)]
        line = " ".join(f"{across(x):.1f},{down(y):.1f}" for x, y in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(points) <= 30:
            parts += [f'<circle cx="{across(x):.1f}" cy="{down(y):.1f}" r="3" fill="{colour}"/>'
                      for x, y in points]
        y = top + 8 + 18 * i
        parts.append(f'<path d="M{width - 190} {y}h22" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{width - 160}" y="{y + 4}">'
                     f'{html.escape(name)}: {points[-1][1]:.3f}</text>')
    return "\n".join([*parts, "</svg>\n"])


# --------------------------------------------------------------------------------------------------
# 6. The command line: flags out of dataclasses
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake instead of a page of usage."""

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        if unknown:
            near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1)
            message = (f"there is no flag {unknown[1]}"
                       + (f"; did you mean {near[0]}?" if near else ""))
        raise ValueError(f"{message} ({self.prog} --help lists the flags)")


def boolean(text: str) -> bool:
    """true or false, as a flag's value."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


def comments(cls) -> dict[str, str]:
    """field -> the comment behind it in the source: what the reader reads is what --help says."""
    sources = [inspect.getsource(base)
               for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", "\n".join(sources), re.MULTILINE))


def add_flags(parser: argparse.ArgumentParser, cls, defaults: dict) -> None:
    """A flag for each field of the dataclass. What is not given stays out of the namespace."""
    group, hints, helps = (
        parser.add_argument_group(cls.__name__), typing.get_type_hints(cls), comments(cls))
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        options, notes = dict(metavar=""), []
        if typing.get_origin(hint) is typing.Literal:
            options["choices"] = typing.get_args(hint)
            notes.append(", ".join(options["choices"]))
        else:
            kind = next((kind for kind in (bool, int, float)
                         if kind in (hint, *typing.get_args(hint))), str)
            options["type"] = boolean if kind is bool else kind
        default = defaults.get(field.name, field.default)
        if default not in (None, dataclasses.MISSING):
            notes.append(f"default {json.dumps(default).strip(chr(34))}"
                         if default != "" else "default: none")
        options["help"] = (
            helps[field.name] + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)


def build(cls, settings: dict):
    """An instance of the dataclass from those of the settings that are its fields."""
    return cls(**{field.name: settings[field.name]
                  for field in dataclasses.fields(cls) if field.name in settings})


def defaults_of(classes) -> dict:
    """The dataclasses' defaults, name -> value."""
    fields = itertools.chain.from_iterable(map(dataclasses.fields, classes))
    return {field.name: field.default
            for field in fields if field.default is not dataclasses.MISSING}


def read_settings(path: str, classes) -> dict:
    """A file of settings (run.json, or yours). Raises ValueError if not all are fields of these."""
    try:
        settings = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f'{path} is not a JSON object like {{"n_layer": 6}}')
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    for name, value in settings.items():
        if name not in hints:
            raise ValueError(f"{path}: there is no setting {name}")
        kinds = typing.get_args(hints[name]) or (hints[name],)
        whole = float in kinds and type(value) is int
        if not (value in kinds or type(value) in kinds or whole):
            raise ValueError(f"{path}: {name} cannot be {json.dumps(value)}")
    return settings


def parse_command(name: str, commands: dict, presets: dict, arguments: list[str]):
    """(the command's function, all its settings, those given).

    Precedence of settings: defaults < --preset < --config < flags. commands: name -> (function,
    dataclasses whose fields are its flags); the first one is the default, and so is the first
    preset, a dict of settings. Raises ValueError for what cannot be understood.
    """
    chosen = (arguments[0] if arguments and not arguments[0].startswith("-")
              else next(iter(commands)))
    if chosen not in commands:
        raise ValueError(f"there is no command {chosen}: the commands are {', '.join(commands)}")
    command, classes = commands[chosen]
    parser = Parser(
        prog=f"python {name}.py {chosen}",
        usage="%(prog)s [flags]",
        description=command.__doc__,
        epilog=f"Commands: {', '.join(commands)}; without one, {next(iter(commands))}. "
               f"Each has its own --help.",
        allow_abbrev=False,
    )
    settings = defaults_of(classes)
    sized = ({field for cls in classes for field in cls.__dataclass_fields__}
             >= set(next(iter(presets.values()))))
    if sized:
        first = next(iter(presets))
        settings |= presets[first]
        parser.add_argument("--preset", metavar="",
                            help=f"a named size ({', '.join(presets)}; default {first})")
        parser.add_argument("--config", metavar="",
                            help="a JSON file of settings, as run.json is; flags win over it")
    for cls in classes:
        add_flags(parser, cls, settings)
    given = vars(parser.parse_args(arguments[1:] if arguments[:1] == [chosen] else arguments))
    preset, config = given.pop("preset", None), given.pop("config", None)
    if preset and preset not in presets:
        raise ValueError(f"there is no preset {preset}: the presets are {', '.join(presets)}")
    given = ((presets[preset] if preset else {})
             | (read_settings(config, classes) if config else {}) | given)
    return command, settings | given, given


# --------------------------------------------------------------------------------------------------
# 7. The machine
# --------------------------------------------------------------------------------------------------


def choose_device(name: str):
    """--device as a torch.device. Raises ValueError for one that is not there."""
    import torch

    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise ValueError(
            f"this PyTorch sees no {name} device; use --device cpu, or install PyTorch with {name}")
    return torch.device(name)


def choose_dtype(name: str, device):
    """--dtype as a torch.dtype: products are computed in it; the weights are float32 anyway."""
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # a T4 (7.5) has no bfloat16
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    if device.type == "cpu" and (
        matmul_gflops("cpu", torch.bfloat16) > 1.2 * matmul_gflops("cpu", torch.float32)
    ):
        return torch.bfloat16  # a processor with bfloat16 instructions
    return torch.float32


def autocast_to(dtype, device):
    """A context in which matrix products are computed in `dtype`; weights and sums stay float32."""
    import torch

    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def matmul_gflops(device, dtype, size: int = 512, seconds: float = 0.02) -> float:
    """How many 10^9 floating-point operations a second matrix products of `dtype` reach here."""
    import torch

    def synchronize():
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize()

    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    left @ right
    best, until = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < until:
        synchronize()
        start = time.perf_counter()
        left @ right
        synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def keep_freed_memory() -> None:
    """Tell the C library to keep the memory that is freed, for the next step to use it again.

    As it comes, glibc hands every large tensor back to the system and asks for it anew, and the
    system clears each page again: a fifth of a training step on a CPU. No effect without glibc.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        trim_threshold, top_pad, mmap_max = -1, -2, -4  # from malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 << 20)
        mallopt(mmap_max, 0)


def load_checkpoint(path, name: str, build_model):
    """(checkpoint, model): what `name`.py saved at `path`, checkpoint["tokenizer"] beside it.

    build_model(config dict) -> the module that takes the weights. No code in the file is run.
    Raises ValueError where it is something else than a whole checkpoint of that name.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        raise ValueError(
            f"there is no checkpoint {path}: train one, or name another with --init_from")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["name"] != name:
            raise ValueError(f"{checkpoint['name']}.py wrote it")
        model = build_model(checkpoint["config"])
        model.load_state_dict(checkpoint["model"])
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is no whole checkpoint of {name}.py: it is something else, or holds code"
        ) from None
    except Exception as error:  # a foreign file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} is no whole checkpoint of {name}.py: {reason}") from None
    return checkpoint | {"tokenizer": Tokenizer.load(path.with_name("tokenizer.json"))}, model


def peak_memory_mb(device) -> float:
    """The most memory this process (CPU) or its tensors (CUDA) have taken so far, in 10^6 bytes."""
    import torch

    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e6
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


@contextlib.contextmanager
def interrupts():
    """Within it Ctrl-C only makes the yielded list true: no step is cut short. Twice, it stops."""
    pressed = []

    def note(signal_number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signal_number)
        say("", "stopping after this step; Ctrl-C once more stops at once")

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)
