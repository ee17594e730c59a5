"""What the three models read from a disk or the net, what a run writes, and the commands.

    corpus = prepare("input.txt", 1024, ["<|endoftext|>"], separator="<|endoftext|>")
    corpus.tokenizer, corpus.train, corpus.validation        # the tokens are memory-mapped arrays

From a source (a name, a file, a folder, a URL) to tokens it goes in four steps, and each leaves a
file in the cache folder, so the second run starts at once:

    1. download     streamed, resumed where the connection broke, checked
    2. one text     the source becomes one UTF-8 file; <|endoftext|> separates its documents
    3. split        what the source brings for validation, else the last tenth
    4. tokens       a tokenizer is trained on the training part; both parts are encoded, in pieces

Memory stays bounded: a text is only ever read in pieces of a few megabytes, by all cores.

    folder = pretrained_folder("gpt2")                       # or a folder of yours
    load_weights(folder, {"wte.weight": model.embedding.weight, ...})

Published weights are read straight into the parameters, and no code in them is ever run.

    run_command(gpt, ["--n_layer", "6"])                     # what `python gpt.py --n_layer 6` does

Nothing here is needed to understand the models; it makes them a tool. In order: 1 downloads,
2 sources, 3 the split, 4 tokens, 5 tables of examples, 6 weight files, 7 log and chart, 8 flags,
9 the machine (devices, ranks, signals), 10 the commands. torch is imported only where it is used:
the processes that tokenize a large text do without it.
"""

import argparse
import contextlib
import csv
import ctypes
import dataclasses
import difflib
import errno
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
import pickle
import platform
import re
import shutil
import signal
import statistics
import sys
import tarfile
import threading
import time
import typing
import zipfile
import zlib
from collections import Counter
from multiprocessing import resource_tracker
from pathlib import Path

import numpy as np

from bpe import Tokenizer, split_words

SEPARATOR = "<|endoftext|>"
PIECE = 4 << 20  # bytes of text that are handled at a time
LONGEST = 1 << 24  # bytes of a table's cell, a line of JSON, or a review: no more is taken for one


def say(*lines: str) -> None:
    """Print to standard error, if this is the first rank; standard output is for results."""
    if ranks()[0] == 0:
        show("\n".join(lines) + "\n")


def show(text: str) -> None:
    """Write to standard error. Where nobody reads that any more (`2>&1 | tee log` and Ctrl-C, which
    ends tee first; a terminal that was closed), no run is lost for it: it goes on in silence."""
    try:
        print(text, end="", file=sys.stderr, flush=True)
    except OSError:
        silence(sys.stderr)


def silence(stream) -> None:
    """What is written to the stream is lost from here on, what still waits in it included."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/gpt-bert-t5, or ~/.cache/gpt-bert-t5."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gpt-bert-t5"


@contextlib.contextmanager
def one_process(path, wait: bool = False):
    """Within it no other process is within it for the same lock file, `path`, gone at the end.

    Where one is, wait for it to leave; or without `wait` raise ValueError. A process that is killed
    leaves, too: the system lets go of what it held. (No effect on Windows.)
    """
    path = Path(path)
    if path.parent.is_file():
        raise ValueError(f"{path.parent} is a file: name a folder")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    try:
        import fcntl
    except ImportError:
        yield
        return
    while True:
        with naming(path):
            file = open(path, "a+b", buffering=0)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read(200).decode("utf-8", "replace") or "another process"
            if not wait:
                raise ValueError(
                    f"{holder} is at work in {path.parent}: wait for it, or set another --out_dir"
                ) from None
            say(f"waiting for {holder}, which makes the same: {path.parent.name}/{path.stem}")
            fcntl.flock(file, fcntl.LOCK_EX)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                break
        file.close()  # it was the lock of one that has left meanwhile
    with file:
        try:
            with naming(path):
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}".encode())
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path):
    """A failure to write within it becomes an OSError that names `path` and says what to check."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and error.__context__:
            error = error.__context__  # torch.save makes one of a full disk, and of Ctrl-C
        if isinstance(error, KeyboardInterrupt):
            raise error from None
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


RUN_FILES = ("ckpt.pt", "best.pt", "tokenizer.json", "run.json", "log.jsonl", "loss.svg")


def set_aside(folder) -> None:
    """Move the files of an earlier run into FOLDER/before: a run from scratch that was started by
    mistake costs nothing. What is there already gives way to a run that was evaluated, and not to
    one that was stopped earlier; nothing is moved of one that has not logged a step."""
    folder = Path(folder)
    aside, log = folder / "before", folder / "log.jsonl"
    older, logged = aside.exists(), log.exists() and log.stat().st_size > 0
    if ranks()[0] > 0 or not logged or (older and not (folder / "best.pt").exists()):
        return
    with naming(aside):
        aside.mkdir(exist_ok=True)
        for name in RUN_FILES:
            (aside / name).unlink(missing_ok=True)
            if (folder / name).exists():
                os.replace(folder / name, aside / name)
    say(f"the run that {folder} held is in {aside} now" + (", in place of an older one" * older))


def made(path, make) -> Path:
    """`path`, which make(path) makes where it is missing, in one process at a time."""
    path = Path(path)
    if not path.exists():
        with one_process(path.with_name(path.name + ".lock"), wait=True):
            for left in path.parent.glob(f"{glob.escape(path.name)}.*.tmp"):  # by a killed process
                left.unlink()
            if not path.exists():
                make(path)
    return path


# --------------------------------------------------------------------------------------------------
# 1. Downloads
# --------------------------------------------------------------------------------------------------


class Refused(OSError):
    """A server's answer that trying again does not change; `status` is its number, say 404."""

    def __init__(self, url: str, status: int, reason: str):
        super().__init__(f"{url} answered {status} {reason}: check the address")
        self.status = status


def download(
    url: str, path, size: int | None = None, digest: str | None = None, tries: int = 5,
    token: str = "", page: bool = True,
) -> Path:
    """Fetch `url` to `path` unless it is there. What arrives stays in PATH.part and is continued.

    digest: "sha256:..." or "md5:..." of the whole file. token: shown to the host of `url` alone.
    page: whether a web page may be what is wanted. Raises Refused when the server refuses, OSError
    when the connection broke `tries` times without a byte of progress, or when what arrived is not
    as expected.
    """
    return made(path, functools.partial(_download, url, size, digest, tries, token, page))


def _download(url: str, size, digest, tries: int, token: str, page: bool, path: Path) -> None:
    import requests  # takes a fifth of a second, so only where it is needed

    part = path.with_name(path.name + ".part")
    failures, reason = 0, ""
    while failures < tries:
        have = part.stat().st_size if part.exists() else 0
        try:
            complete = _fetch(requests, url, part, have, token)
        except requests.HTTPError as error:
            status = error.response.status_code
            if status < 500 and status != 429:  # (429: too many requests)
                raise Refused(url, status, error.response.reason) from None
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
    _check_download(part, url, size, digest, page)
    os.replace(part, path)


def _fetch(requests, url: str, part: Path, have: int, token: str) -> bool:
    """One request for what comes after the first `have` bytes. True when the file is complete."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    if token:  # requests takes it off where it is redirected to another host
        headers["Authorization"] = f"Bearer {token}"
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
        show(f"\r{url.rpartition('/')[2]}: {have / 1e6:.1f}{share} MB")


def _check_download(
    part: Path, url: str, size: int | None, digest: str | None, page: bool
) -> None:
    """Remove the file and raise OSError where it is not what was expected."""
    problem = ""
    if size is not None and part.stat().st_size != size:
        problem = f"has {part.stat().st_size:,} bytes instead of {size:,}"
    elif not page and disguise(part):
        problem = f"is {disguise(part)}"
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


def disguise(path) -> str:
    """What stands here in place of a model's file, where the first bytes betray it; else ""."""
    with open(path, "rb") as file:
        begin = file.read(200).lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if begin.startswith((b"<!doctype html", b"<html")):
        return "a web page instead of the file"
    if begin.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer instead of the file (git lfs pull fetches that)"
    return ""


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
        files = named_files(name)
        if "archive" in files:
            return {part: one_text([files["archive"]], part) for part in ("train", "validation")}
        return files
    if re.match(r"https?://", name):
        return {"train": one_text([download_address(name)])}
    path = Path(name)
    if not path.exists() and not path.is_absolute():
        path = Path(__file__).parent / name  # input.txt, from another working folder
    if path.is_dir():
        files = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in READABLE and file.is_file())
        if not files:
            raise ValueError(f"the folder {name} holds no {', '.join(READABLE)} file")
        return {"train": one_text(files)}
    if not path.is_file():
        raise ValueError(
            f"no data at {name}: give a file, a folder, a URL or one of {', '.join(NAMED)}")
    return {"train": one_text([path])}


def download_address(url: str, name: str = "text", page: bool = True) -> Path:
    """The file of any URL in the cache, under its own name, or `name` where the URL has none."""
    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    own = re.sub(r"[^\w.-]", "_", url.partition("?")[0].rpartition("/")[2])[-80:]
    return download(url, cache_folder() / key / (own or name), page=page)


def named_files(name: str) -> dict[str, Path]:
    """The files of a source of NAMED, downloaded where they are not in the cache."""
    return {
        part: download(url, cache_folder() / name / url.rpartition("/")[2], size, digest)
        for part, url, size, digest in NAMED[name]
    }


def one_text(files: list[Path], part: str = "train") -> Path:
    """The one UTF-8 file of these: itself if it is one plain file, else made in the cache."""
    if len(files) == 1 and files[0].suffix.lower() not in (".gz", ".jsonl"):
        if files[0].suffix == ".csv":
            say(f"{files[0]} is taken as plain text; a table of examples is for `finetune`")
        return files[0]

    def write(path):
        documents = itertools.chain.from_iterable(read_documents(file, part) for file in files)
        with replacing(path) as out:
            for i, document in enumerate(documents):
                out.write(b"\n" + SEPARATOR.encode() + b"\n" if i else b"")
                for block in document:
                    out.write(block)

    return made(cache_folder() / "texts" / f"{fingerprint(files, part)}.txt", write)


def read_documents(path: Path, part: str):
    """Yield a file's documents (JSON lines, members of an archive), each an iterable of bytes."""
    if path.name.endswith(".tar.gz"):
        yield from ([text] for _, text in archive_texts(path, part))
        return
    with gzip.open(path) if path.suffix.lower() == ".gz" else open(path, "rb") as file:

        def blocks(read, size):
            try:
                yield from iter(functools.partial(read, size), b"")
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise ValueError(f"{path} is no whole .gz file: {error}") from None

        if not path.name.lower().removesuffix(".gz").endswith(".jsonl"):
            yield blocks(file.read, PIECE)
            return
        for number, line in enumerate(blocks(file.readline, LONGEST), 1):
            if line.strip():
                try:
                    yield [json.loads(line)["text"].encode("utf-8", "replace")]
                except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                    raise ValueError(
                        f'{path}, line {number}: not a JSON object with a "text"; a table of '
                        "examples is for `finetune`") from None


class Member(tarfile.TarInfo):
    """A member of an archive. A small archive can hold gigabytes of zeros, or claim to: so much is
    neither read nor skipped."""

    @classmethod
    def frombuf(cls, *arguments):
        """From the header. What is no file but belongs to the next one's header is read whole."""
        member = super().frombuf(*arguments)
        member.check(1 << 30 if member.isreg() else LONGEST)
        return member

    def check(self, most: int) -> None:
        """Raises tarfile.ReadError for more than `most` bytes."""
        if self.size > most:
            raise tarfile.ReadError(f"{self.name!r:.99} has {self.size:,} bytes")


def archive_texts(path: Path, part: str):
    """Yield (name, bytes) of the reviews in an archive of IMDb's layout; other members are passed
    over. Nothing is unpacked to the disk, so no member can be written anywhere."""
    folders = "train/(pos|neg|unsup)" if part == "train" else "test/(pos|neg)"
    wanted = re.compile(rf"aclImdb/{folders}/\d+_\d+\.txt")
    try:
        with tarfile.open(path, "r|gz", tarinfo=Member) as archive:
            for member in archive:
                member.check(1 << 30)  # (a second header can change the size)
                if member.isfile() and wanted.fullmatch(member.name):
                    member.check(LONGEST)
                    text = archive.extractfile(member).read()
                    yield member.name, text.replace(b"<br /><br />", b"\n\n")
    except OSError:
        raise
    except Exception as error:  # a foreign file can fail in any way
        raise ValueError(f"{path} is no whole archive: {error}") from None


def fingerprint(files: list[Path], *extra) -> str:
    """Names a cache entry: changes with a file's path, size or time of change, and with `extra`."""
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps([stats, extra]).encode()).hexdigest()[:20]


# --------------------------------------------------------------------------------------------------
# 3. The split, and pieces that can be handled apart
# --------------------------------------------------------------------------------------------------


def split_point(path: Path) -> int:
    """The byte where the last tenth begins: of ten documents or more, else of the bytes."""
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty: there is nothing to learn from")
    separator = re.compile(re.escape(SEPARATOR).encode() + b"\n?")
    ends = np.fromiter((
        piece[1] + found.end()
        for piece in pieces(path, 0, size) for found in separator.finditer(read_bytes(*piece))
    ), np.int64)
    rest = pieces(path, int(ends[-1]), size) if len(ends) else []  # behind the last separator
    documents = len(ends) + any(read_bytes(*piece).strip() for piece in rest)
    if documents >= 10:
        return int(ends[int(documents * 0.9) - 1])
    point = size * 9 // 10
    around = read_bytes(path, point, point + 4)
    return point + sum(1 for _ in itertools.takewhile(inside_a_character, around))


def inside_a_character(byte: int) -> bool:
    """Whether it is one of the later bytes of a UTF-8 character."""
    return byte & 0xC0 == 0x80


def pieces(path: Path, start: int, stop: int) -> list[tuple[Path, int, int]]:
    """Cut bytes start..stop into pieces of at most PIECE bytes that can be tokenized apart.

    A cut is made behind a separator, else where a printable ASCII character is followed by a line
    break or a space: there the splitting pattern of BPE always begins a new word. (A text of 4 MB
    without any such place is cut between two characters, which may cost a token.)
    """
    cuts = [start]
    while stop - cuts[-1] > PIECE:
        block = read_bytes(path, cuts[-1], cuts[-1] + PIECE + 1)  # (one more: what follows)
        cut = block.rfind(SEPARATOR.encode(), 0, PIECE)
        if cut >= 0:
            cut += len(SEPARATOR)
            cut += block[cut : cut + 1] == b"\n"  # it belongs to the separator
        else:
            late = PIECE - (PIECE >> 4)
            words = (list(re.finditer(rb"[!-~](?=\n)", block[late:]))
                     or list(re.finditer(rb"[!-~](?= )", block[late:])))
            cut = late + words[-1].end() if words else PIECE
            while inside_a_character(block[cut]) and cut > late:  # (all of it: no UTF-8)
                cut -= 1
        cuts.append(cuts[-1] + cut)
    return [(path, first, last) for first, last in itertools.pairwise([*cuts, stop])]


def read_bytes(path: Path, start: int, stop: int) -> bytes:
    """Read, not mapped into memory: mapped pages would count as this process's own."""
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(stop - start)


def read_piece(piece: tuple[Path, int, int]) -> list[str]:
    """The documents (or parts of them) in a piece. Raises ValueError where it is not UTF-8."""
    path, start, _ = piece
    raw = read_bytes(*piece)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text: byte 0x{raw[error.start]:02x} at offset "
            f"{start + error.start:,}; {conversion(path)}, "
            f"or drop such bytes (iconv -c -f utf-8 -t utf-8)"
        ) from None
    text = text.removeprefix("\ufeff") if start == 0 else text
    return re.split(rf"\n?{re.escape(SEPARATOR)}\n?", text)


def conversion(path) -> str:
    """How a file that is no UTF-8 can be converted."""
    wide = read_bytes(path, 0, 2) in (b"\xff\xfe", b"\xfe\xff")  # as Windows' editors begin one
    return f"convert it (iconv -f {'utf-16' if wide else 'latin1'} -t utf-8)"


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
    _hold_interrupts(True)  # the processes inherit it: Ctrl-C is for this one alone
    try:
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count(), len(jobs))) as pool:
            _hold_interrupts(False)
            yield from pool.imap(function, jobs)
    finally:
        _hold_interrupts(False)


def _hold_interrupts(on: bool) -> None:
    """While on, Ctrl-C waits. (Windows has nothing like it.)"""
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # (its start would let them through)
        how = signal.SIG_BLOCK if on else signal.SIG_UNBLOCK
        signal.pthread_sigmask(how, {signal.SIGINT})


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
        name = fingerprint(texts, vocab_size, list(special_tokens))
        tokenizer = Tokenizer.load(made(
            cache_folder() / "tokenizers" / f"{name}.json",
            lambda path: train_tokenizer(plan(files)["train"], vocab_size, special_tokens, path)))
    folder = made(
        cache_folder() / "tokens" / fingerprint(texts, tokenizer.to_json(), separator),
        lambda path: encode_corpus(plan(files), path, tokenizer, separator))
    facts = json.loads((folder / "corpus.json").read_text("utf-8"))
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


def train_tokenizer(cut: list, vocab_size: int, special_tokens, path: Path) -> None:
    """Learn a tokenizer from the pieces of a text, and save it."""
    counts = Counter()
    for counted in parallel(count_piece, cut):
        counts.update(counted)
    with replacing(path, "w") as file:
        json.dump(Tokenizer.from_counts(counts, vocab_size, special_tokens).to_json(), file)


def encode_corpus(
    parts: dict[str, list], path: Path, tokenizer: Tokenizer, separator: str
) -> None:
    """Make the folder `path` with train.bin, validation.bin and corpus.json.

    A part is: separator document separator ... separator. A text of one stream is one document.
    """
    folder = path.with_name(path.name + ".making")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
    try:
        write_tokens(parts, folder, tokenizer, separator)
        os.replace(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_tokens(
    parts: dict[str, list], folder: Path, tokenizer: Tokenizer, separator: str
) -> None:
    """Fill the new folder: tokenizer.json, the parts' tokens, and corpus.json with their type and
    the number of documents."""
    with naming(folder):
        folder.mkdir()
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
        facts = json.dumps(dict(dtype=dtype, documents=documents))
        (folder / "corpus.json").write_text(facts, "utf-8")


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
# 5. Examples: tables of texts to fine-tune on, and measures of what was answered
# --------------------------------------------------------------------------------------------------


def stories(source: str = "input.txt") -> dict[str, list[dict]]:
    """The stories of `input.txt`: {"train": rows, "validation": rows} with title, topic and text.

    The split is that of pretraining, so a model has seen no story of the validation part.
    """
    path = find_source(source)["train"]
    with open(path, "rb") as file:
        both = file.read()
    point, parts = split_point(path), {}
    for part, raw in ("train", both[:point]), ("validation", both[point:]):
        found = re.findall(
            rf"Title: ([^\n]+)\nTopic: ([^\n]+)\n\n(.*?)\n?(?:{re.escape(SEPARATOR)}|\Z)",
            raw.decode("utf-8").replace("\r\n", "\n"), re.DOTALL | re.ASCII)
        parts[part] = [dict(title=title, topic=topic, text=text) for title, topic, text in found]
    if not all(parts.values()):
        raise ValueError(
            f"{path} has no stories with Title: and Topic: to demonstrate with; "
            "give examples of yours with --data")
    return parts


def read_examples(source: str, columns, optional=()) -> dict[str, list[dict]]:
    """{"train": rows, "validation": rows} of a .csv or .jsonl file, a folder of two, or `imdb`.

    A row is a dict column -> text, and `place`, which names it. A folder brings train.csv and
    validation.csv (or test.csv; .jsonl likewise). Of one file, a tenth is drawn to be held out, by
    chance, since tables are often sorted: the same rows every time. See `read_table` for columns.
    Raises ValueError or OSError for what cannot be used.
    """
    if source == "imdb":
        archive = named_files(source)["archive"]
        parts = {part: list(read_reviews(archive, part)) for part in ("train", "validation")}
        return {part: check_rows(rows, archive, columns, optional) for part, rows in parts.items()}
    path = Path(source)
    if re.match(r"https?://", source):
        path = download_address(source, "table.csv", page=False)
    if path.is_dir():
        files = {}
        for part, names in ("train", ["train"]), ("validation", ["validation", "valid", "test"]):
            found = [path / f"{name}{end}" for name in names for end in TABLES]
            files[part] = next((file for file in found if file.exists()), None)
            if files[part] is None:
                raise ValueError(f"{path} has no {part}.csv or {part}.jsonl")
        return {part: read_table(file, columns, optional) for part, file in files.items()}
    rows = read_table(path, columns, optional)
    if len(rows) < 2:
        raise ValueError(
            f"{path} has {len(rows)} row{'s' * (len(rows) != 1)}: it takes two at least, "
            "one to learn from and one to hold out")
    order = np.random.default_rng(0).permutation(len(rows))
    held_out, rest = np.split(order, [math.ceil(len(rows) / 10)])
    return {part: [rows[i] for i in sorted(chosen)]
            for part, chosen in (("train", rest), ("validation", held_out))}


TABLES = (".csv", ".jsonl")


def read_table(path, columns, optional=()) -> list[dict]:
    """The rows of a .csv file (with a header) or a .jsonl file: column -> text, `place` -> its row.

    columns have to be there and filled in every row, optional ones in every row or in none; others
    are passed over. White space around a text is cut off. Raises ValueError that names the file,
    the row and the column.
    """
    path = Path(path)
    if path.suffix not in TABLES:
        raise ValueError(f"{path} is no {' or '.join(TABLES)} file: examples come in a table "
                         f"with the columns {', '.join(columns)}")
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    try:
        rows = list((csv_rows if path.suffix == ".csv" else jsonl_rows)(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text; {conversion(path)}") from None
    return check_rows(rows, path, columns, optional)


def csv_rows(path: Path):
    """Yield a dict for each row of a CSV file. Rows are counted as a spreadsheet does: from the
    header, row 1, on; a cell may hold commas, quotes and line breaks."""
    csv.field_size_limit(LONGEST)
    with open(path, encoding="utf-8-sig", newline="") as file:  # (-sig: without a byte order mark)
        reader = csv.reader(file, strict=True)
        try:
            header = [name.strip() for name in next(reader, [])]
            twice = [name for name, n in Counter(header).items() if n > 1]
            if twice:
                raise ValueError(f"{path} has the column {twice[0]!r} twice")
            for number, cells in enumerate((cells for cells in reader if cells), 2):
                if len(cells) > len(header):
                    raise ValueError(
                        f"{path}, row {number}: {len(cells)} cells under {len(header)} columns; "
                        "a text with commas has to stand in quotes")
                row = dict(itertools.zip_longest(header, cells, fillvalue=""))
                yield row | {"place": f"row {number}"}
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def jsonl_rows(path: Path):
    """Yield a dict for each line that is not empty. Numbers, true and false become texts."""
    with open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: not a JSON object")
            for name, value in row.items():
                if isinstance(value, (bool, int, float)):
                    row[name] = json.dumps(value)
            yield row | {"place": f"line {number}"}


def check_rows(rows: list[dict], path, columns, optional) -> list[dict]:
    """The rows with these columns alone. Raises ValueError where one is missing or empty."""
    there = dict.fromkeys(name for row in rows for name in row if name != "place")
    missing = [name for name in columns if name not in there]
    if missing and rows:
        raise ValueError(f"{path} has no column {missing[0]!r}: it takes {', '.join(columns)}, "
                         f"and has {', '.join(map(repr, there))}"
                         + (" (a .csv begins with a line of names, with commas between them)"
                            if Path(path).suffix == ".csv" else ""))
    if not rows:
        raise ValueError(f"{path} has no rows; it takes the columns {', '.join(columns)}")
    used = [name for name in (*columns, *optional) if name in there]
    checked = []
    for row in rows:
        for name in used:
            value = row.get(name)
            if value is None or value == "" or isinstance(value, str) and not value.strip():
                raise ValueError(f"{path}, {row['place']}: the column {name!r} is empty")
            if not isinstance(value, str):
                raise ValueError(f"{path}, {row['place']}: {name!r} is no text")
        checked.append({name: row[name].strip() for name in used}
                       | {"place": f"{path}, {row['place']}"})
    passed_over = [name for name in there if name not in used]
    if passed_over:
        say(f"{path}: passed over the column{'s' * (len(passed_over) > 1)} "
            f"{', '.join(passed_over)}")
    return checked


def read_reviews(archive: Path, part: str):
    """Yield IMDb's labelled reviews: text and label, `pos` or `neg`."""
    for name, text in archive_texts(archive, part):
        label = name.split("/")[-2]
        if label != "unsup":
            yield dict(text=text.decode("utf-8", "replace"), label=label, place=name)


def task_rows(task, source: str) -> dict[str, list[dict]]:
    """{"train": rows, "validation": rows} of a source; of "", the task's demonstration."""
    if source:
        return read_examples(source, task.columns, task.optional)
    return {
        part: [task.demonstration(story) | {"place": story["title"]} for story in found]
        for part, found in stories().items()
    }


class Examples:
    """Rows of a task's data, encoded; those that the task leaves out are left out."""

    def __init__(self, task, rows: list[dict], tokenizer, config, learned: list[dict]):
        """learned: the rows that were learned from, to compare with."""
        self.task, self.tokenizer, self.learned = task, tokenizer, learned
        found = [(row, task.encode(row, tokenizer, config)) for row in rows]
        self.rows = [row for row, example in found if example]
        self.encoded = [example for _, example in found if example]
        self.cropped = sum(example["cropped"] for example in self.encoded)
        self.left_out = len(rows) - len(self.rows)
        self.lengths = [example["length"] for example in self.encoded]

    def batch(self, numbers, generator=None) -> dict:
        """The examples of these numbers as tensors, padded to the longest of them. With a generator
        as they are to be trained on."""
        return self.task.collate([self.encoded[i] for i in numbers], self.tokenizer, generator)


class Batches:
    """Which rows a step takes: batches[step] -> row numbers, (at most `size`,) int64.

    An epoch takes each row once. Rows of about the same length go together, so that little has to
    be padded: shuffled rows are sorted by length within pools of 32 batches, cut into batches, and
    these are shuffled. Every step is a function of (seed, step).
    """

    def __init__(self, lengths, size: int, seed: int):
        self.lengths, self.size, self.seed = np.asarray(lengths), size, seed
        self.epoch, self.cut = -1, []

    def __len__(self) -> int:
        return math.ceil(len(self.lengths) / self.size)

    def __getitem__(self, step: int) -> np.ndarray:
        epoch, place = divmod(step, len(self))
        if epoch != self.epoch:
            generator = np.random.default_rng((self.seed, epoch))
            order = generator.permutation(len(self.lengths))
            pool = 32 * self.size
            order = np.concatenate([
                rows[np.argsort(self.lengths[rows], kind="stable")]
                for rows in (order[i : i + pool] for i in range(0, len(order), pool))])
            cut = [order[i : i + self.size] for i in range(0, len(order), self.size)]
            self.epoch, self.cut = epoch, [cut[i] for i in generator.permutation(len(cut))]
        return self.cut[place]


def in_order_of_length(lengths, size: int) -> list[np.ndarray]:
    """All rows, in batches of at most `size`, the shortest first."""
    order = np.argsort(lengths, kind="stable")
    return [order[i : i + size] for i in range(0, len(order), size)]


def pad(rows: list, fill: int) -> np.ndarray:
    """Rows of different lengths side by side: (n, the longest) int64, filled up with `fill`."""
    padded = np.full((len(rows), max(map(len, rows))), fill, np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return padded


def words_of(text: str) -> list[str]:
    """The words of a text as they are compared: in lower case, without punctuation."""
    return re.findall(r"\w+", text.lower())


def f1(common: int, written: int, truth: int) -> float:
    """F1 of `common` words out of so many written and so many true: 2 p r / (p + r)."""
    return 2 * common / (written + truth) if written + truth else 1.0


def token_f1(written: str, truth: str) -> float:
    """How far the words are the same, in any order (Rajpurkar et al. 2016, 6.1)."""
    ours, theirs = Counter(words_of(written)), Counter(words_of(truth))
    return f1((ours & theirs).total(), ours.total(), theirs.total())


def rouge_l(written: str, truth: str) -> float:
    """How far the words are the same, in order: by the longest series of words that both have, with
    gaps allowed (Lin 2004, 3.1; F1 as in its usual implementation)."""
    ours, theirs = words_of(written), words_of(truth)
    longest = [0] * (len(theirs) + 1)  # of what was read of `ours` and theirs[:j]
    for word in ours:
        before = longest
        longest = [0]
        for j, other in enumerate(theirs):
            longest.append(
                before[j] + 1 if word == other else max(before[j + 1], longest[j]))
    return f1(longest[-1], len(ours), len(theirs))


def mean_scores(written: list[str], truth: list[str]) -> dict[str, float]:
    """Means of the three measures, each from 0 to 1."""
    pairs, n = list(zip(written, truth)), len(truth)
    return dict(
        exact_match=sum(ours == theirs for ours, theirs in pairs) / n,
        token_f1=sum(token_f1(*pair) for pair in pairs) / n,
        rouge_l=sum(rouge_l(*pair) for pair in pairs) / n,
    )


def simple_answers(sources: list[str], learned: list[dict]) -> dict[str, list[str]]:
    """What any model has to beat: always the word that most targets begin with, and that word with
    the source's rarest word. Counts are those of the rows that were learned from."""
    begins = Counter(row["target"].split()[0] for row in learned)
    first = begins.most_common(1)[0][0]
    seen_in = Counter(word for row in learned for word in set(words_of(row["source"])))
    rarest = [min(words_of(source) or [""], key=lambda word: seen_in[word]) for source in sources]
    return {
        f'always "{first}"': [first] * len(sources),
        f'"{first}" + the source\'s rarest word': [f"{first} {word}" for word in rarest],
    }


# --------------------------------------------------------------------------------------------------
# 6. Weight files: published models come in, ours go out
# --------------------------------------------------------------------------------------------------

VOCABULARIES = ("spiece.model", "vocab.json", "merges.txt", "vocab.txt")  # until tokenizer.json
DTYPES = {  # what safetensors calls them: what torch calls them
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}


def pretrained_folder(name_or_folder) -> Path:
    """The folder of a published model: an existing one, or in the cache what the hub has of a name.

    A name (`gpt2`, `google/t5-v1_1-small`) is fetched once from $HF_ENDPOINT, huggingface.co
    without it; $HF_TOKEN opens what is private. What has arrived stays: the same command continues
    a download that broke off, and asks nobody for what is complete. Raises ValueError where it is
    neither a folder nor a name, OSError where the hub does not give the model.
    """
    name = str(name_or_folder)
    if Path(name).is_dir():
        if not (Path(name) / "config.json").exists():
            raise ValueError(f"{name} holds no run (ckpt.pt) and no published model (config.json)")
        return Path(name)
    if Path(name).parent != Path() and Path(name).parent.is_dir():  # not what is meant to be a name
        raise ValueError(f"{name} is neither a folder nor a model's name: {Path(name).parent} has "
                         "nothing of that name")
    if not re.fullmatch(r"(\w[\w.-]*/)?\w[\w.-]*", name, re.ASCII) or re.search(r"\.\.|--", name):
        raise ValueError(
            f"{name} is neither a folder nor a model's name, like gpt2 or google/t5-v1_1-small")
    folder = cache_folder() / "hub" / name.replace("/", "--")
    note = folder / "absent.txt"  # the files that the hub does not have
    known = set(note.read_text("utf-8").split()) if note.exists() else set()
    absent = set(known)
    get = functools.partial(hub_file, name, folder, absent)
    if not (folder / "config.json").exists():
        say(f"there is no folder {name} here: looking for it on the hub")
    if not get("config.json"):
        raise OSError(f"there is no model {name} with a config.json, here or on the hub: "
                      f"check the spelling")
    get("tokenizer_config.json")
    if not get("tokenizer.json"):
        for file in VOCABULARIES:
            get(file)
    if not weight_files(get):
        raise OSError(f"the hub has no model.safetensors or pytorch_model.bin of {name}")
    if absent != known:  # only now: what was missing from half a model may still be uploaded
        with replacing(note, "w") as file:
            file.write("\n".join(sorted(absent)))
    return folder


def hub_file(name: str, folder: Path, absent: set[str], file: str) -> Path | None:
    """The path in `folder` of a file of a model on the hub, fetched where it is not there.

    None where the hub does not have it; then it is added to `absent`, and not asked for again.
    """
    if file in absent:
        return None
    hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN", "").strip()
    try:
        return download(
            f"{hub}/{name}/resolve/main/{file}", folder / file, token=token, page=False)
    except Refused as error:
        if error.status == 404:
            absent.add(file)
            return None
        if error.status in (401, 403):  # 401 is also how the hub hides that there is no such model
            raise OSError(
                f"{name} is no folder here, and the hub answered {error.status}: check the "
                f"spelling; if it is private or gated, set HF_TOKEN to a token that may read it"
            ) from None
        raise


def weight_files(get) -> list[Path]:
    """The files with a model's weights: one, or its shards; [] without any.

    get(file name) -> path, or None where the model has no such file.
    """
    for file in ("model.safetensors", "pytorch_model.bin"):
        whole = get(file)
        if whole:
            return [whole]
        index = get(f"{file}.index.json")
        if index:
            return shards_of(index, get)
    return []


def shards_of(index: Path, get) -> list[Path]:
    """The files that an index names. Raises ValueError for all but names of files beside it."""
    kind = index.name.split(".")[1]  # safetensors or bin
    listed = read_object(index).get("weight_map")  # name of a tensor -> file
    names = sorted({*map(str, listed.values())}) if isinstance(listed, dict) else []
    bad = [name for name in names if not re.fullmatch(rf"\w[\w.-]*\.{kind}", name, re.ASCII)]
    bad = bad or [name for name in names if not get(name)]
    if bad or not names:
        raise ValueError(f"{index} names {(bad or ['nothing'])[0]!r}, no .{kind} file beside it")
    return [get(name) for name in names]


def read_object(path) -> dict:
    """The JSON object in a file. Raises ValueError where it cannot be read or is something else."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {disguise(path) or error}") from None
    if not isinstance(content, dict):
        raise ValueError(f'{path} is not a JSON object like {{"n_layer": 6}}')
    return content


def read_config(folder) -> dict:
    """config.json of a published model's folder. Raises ValueError where it is not there, too."""
    return read_object(Path(folder) / "config.json")


class Stored(typing.NamedTuple):
    """A tensor in a weight file, not read yet."""

    dtype: typing.Any  # a torch.dtype
    shape: tuple[int, ...]
    fill: typing.Callable  # fill(target) writes it into a tensor of this shape


def stored_weights(folder):
    """Yield (file, name in it, Stored) for each tensor of the weight files in a folder."""
    folder = Path(folder)
    files = weight_files(lambda file: folder / file if (folder / file).is_file() else None)
    if not files:
        raise OSError(
            f"there are no weights in {folder}: no model.safetensors, no pytorch_model.bin")
    for path in files:
        try:
            tensors = (read_header if path.suffix == ".safetensors" else read_pickle)(path)
        except OSError:
            raise
        except Exception as error:  # a foreign file can fail in any way
            reason = disguise(path) or (
                str(error).partition("\n")[0][:200] if isinstance(error, (ValueError, RuntimeError))
                else "it is something else, or holds code")
            raise ValueError(f"{path} is no whole file of weights: {reason}") from None
        for name, stored in tensors.items():
            yield path, name, stored


def read_header(path: Path) -> dict[str, Stored]:
    """The tensors of a safetensors file: 8 bytes (the header's length), a header in JSON, numbers.

    The header says of each tensor its dtype, its shape, and where its bytes begin and end behind
    the header. There they stand one behind the other, without gaps. Nothing that it says is
    believed unchecked; where it is wrong, this raises ValueError, TypeError, or what else comes.
    """
    import torch

    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > min(size - 8, 100_000_000):
            raise ValueError(f"a header of {length:,} bytes in a file of {size:,}")
        header = json.loads(file.read(length).decode(), object_pairs_hook=without_repetition)
    header.pop("__metadata__", None)
    tensors, at = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape = tuple(entry["shape"])
        if entry["dtype"] not in DTYPES or len(shape) > 32 or not all(
            type(n) is int and n >= 0 for n in shape
        ):
            raise ValueError(f"{name!r} cannot be of dtype {entry['dtype']!r} and shape {shape}")
        dtype = getattr(torch, DTYPES[entry["dtype"]])
        end = at + math.prod(shape) * dtype.itemsize
        if entry["data_offsets"] != [at, end]:
            raise ValueError(f"{name!r} has bytes {entry['data_offsets']} instead of {[at, end]}")
        fill = functools.partial(read_tensor, path, 8 + length + at, dtype)
        tensors[name], at = Stored(dtype, shape, fill), end
    if 8 + length + at != size:
        raise ValueError(f"it has {size:,} bytes instead of {8 + length + at:,}")
    return tensors


def without_repetition(pairs: list[tuple]) -> dict:
    """A JSON object's pairs as a dictionary."""
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is given twice in its header")
    return dict(pairs)


def read_tensor(path: Path, start: int, dtype, target) -> None:
    """Fill `target` with the numbers of `dtype` that begin at byte `start`.

    They are read straight into its memory where it holds the same, else by way of one temporary
    tensor. (The file is not memory-mapped: its pages would count as this process's memory.)
    """
    import torch

    same = target.dtype == dtype and target.is_contiguous() and target.device.type == "cpu"
    tensor = target if same else torch.empty(target.shape, dtype=dtype)
    with open(path, "rb") as file:
        file.seek(start)
        file.readinto(as_bytes(tensor))
    if not same:
        target.copy_(tensor)


def as_bytes(tensor) -> np.ndarray:
    """The memory of a contiguous tensor on the CPU, (bytes,) uint8."""
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy()


def read_pickle(path: Path) -> dict[str, Stored]:
    """The tensors of a pytorch_model.bin. Raises pickle.UnpicklingError where it holds code."""
    import torch

    content = unpickle(path, mmap=True)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__} instead of tensors and their names")
    tensors = {}
    for name, tensor in content.items():
        if type(name) is not str or not isinstance(tensor, torch.Tensor) or (
            (tensor.layout, tensor.device.type) != (torch.strided, "cpu")
        ):
            raise ValueError(f"{name!r} in it is no plain tensor")
        tensors[name] = Stored(
            tensor.dtype, tuple(tensor.shape), lambda target, source=tensor: target.copy_(source))
    return tensors


def unpickle(path: Path, mmap: bool = False):
    """What `torch.save` wrote: tensors and plain types, or pickle.UnpicklingError for code."""
    import torch

    zipped = zipfile.is_zipfile(path)  # (files from before PyTorch 1.6 are no archives)
    if zipped:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:
                raise ValueError("it is compressed: torch.save never does that")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and zipped)


def weight_names(folder) -> set[str]:
    """The names in a folder's weight files, as they stand there: no tensor is read for them.

    Raises what `load_weights` raises for files that cannot be read.
    """
    return {name for _, name, _ in stored_weights(folder)}


def place(tensor) -> tuple:
    """Equal for two tensors that are the same view of the same memory."""
    return tensor.data_ptr() or id(tensor), tensor.shape, tensor.stride()  # (0: it is empty)


def load_weights(folder, targets: dict, rename=lambda name: name, passed_over: str = "") -> None:
    """Fill every target with its tensor from the weight files in `folder`.

    targets: published name -> tensor of the published shape to be filled, which may be a view with
        any strides. Names may share a tensor (tied weights): one of them has to be in the files;
        where more are, they have to agree.
    rename: name in a file -> published name.
    passed_over: a regular expression of published names that are known not to be weights.

    Takes the memory of one tensor at a time (of all of a pytorch_model.bin). Raises ValueError,
    before anything is filled, where a tensor is missing, unknown, there twice, or of another shape
    or kind of number; OSError where there are no weights.
    """
    found = {}  # published name -> (file, tensor in it)
    for path, name, stored in stored_weights(folder):
        name = rename(name)
        if name in found:
            raise ValueError(f"{path}: {name!r} is there for the second time")
        if name in targets or not re.fullmatch(passed_over, name):
            found[name] = path, stored
    _check_fit(folder, found, targets)
    filled = {}  # place in memory -> the first name it was filled with
    for name, (path, stored) in found.items():
        target = targets[name].detach()
        first = filled.setdefault(place(targets[name]), name)
        if first == name:
            stored.fill(target)
            continue
        again = target.clone()
        stored.fill(again)
        if not again.equal(target):
            raise ValueError(f"{path}: {name!r} differs from {first!r}; this model ties them")


def _check_fit(folder, found: dict, targets: dict) -> None:
    reached = {place(targets[name]) for name in found if name in targets}
    problems = [f"{folder}: {name!r} is missing" for name, target in targets.items()
                if place(target) not in reached]
    for name, (path, stored) in found.items():
        target = targets.get(name)
        if target is None:
            problems.append(f"{path}: {name!r} is not a weight of this model")
        elif (stored.shape, stored.dtype.is_floating_point) != (
            tuple(target.shape), target.dtype.is_floating_point
        ):
            problems.append(f"{path}: {name!r} is {stored.dtype} {stored.shape} instead of "
                            f"{target.dtype} {tuple(target.shape)}")
    if problems:
        more = f" ({len(problems) - 1} more do not fit)" if problems[1:] else ""
        raise ValueError(problems[0] + more)


def model_that_fits(model_class, config, size: int, tensors: int):
    """model_class(config). Raises ValueError, before any memory is taken for it, where the files it
    is to be read from, `tensors` of them in `size` bytes, cannot hold so many weights."""
    import torch

    class Counted(torch.overrides.TorchFunctionMode):
        left = size

        def __torch_function__(self, function, types, arguments=(), options=None):
            made = function(*arguments, **(options or {}))
            if function.__name__ == "empty":  # weights: nothing has been written to them yet
                self.left -= made.numel()
                if self.left < 0:
                    raise ValueError(f"its settings are of a larger model than {size:,} bytes hold")
            return made

    layers = max(config.n_layer, getattr(config, "n_decoder_layer", 0) or 0)
    if layers > tensors:
        raise ValueError(f"its settings are of a larger model: {layers} layers")
    with Counted():
        return model_class(config)


def unfilled():
    """A context in which new weights get no random numbers: those read from a file follow.

    It saves the time, and memory: pages that nobody has written to take none.
    """
    import torch

    class Unfilled(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, arguments=(), options=None):
            options = options or {}
            if function.__name__ in ("normal_", "uniform_", "kaiming_uniform_"):
                return options["tensor"] if "tensor" in options else arguments[0]
            return function(*arguments, **options)

    return Unfilled()


def save_weights(folder, tensors: dict) -> None:
    """Write FOLDER/model.safetensors, which `safetensors` and `transformers` open.

    tensors: published name -> tensor, as for `load_weights`; of names that share one (tied
    weights) only the first is written. Takes the memory of one tensor at a time.
    """
    own = {}  # place in memory -> (name, tensor)
    for name, tensor in tensors.items():
        own.setdefault(place(tensor), (name, tensor))
    # The wider numbers come first, so that each tensor begins at a multiple of its numbers' size.
    ordered = sorted(own.values(), key=lambda item: -item[1].element_size())
    names, at = {f"torch.{dtype}": name for name, dtype in DTYPES.items()}, 0
    header = {"__metadata__": {"format": "pt"}}
    for name, tensor in ordered:
        end = at + tensor.numel() * tensor.element_size()
        header[name] = dict(
            dtype=names[str(tensor.dtype)], shape=list(tensor.shape), data_offsets=[at, end])
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with replacing(Path(folder) / "model.safetensors") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in ordered:
            file.write(as_bytes(tensor.detach().cpu().contiguous()))


def save_tokenizer(tokenizer, folder, roles: dict[str, str], template: list[str]) -> None:
    """Write what AutoTokenizer opens: FOLDER/tokenizer.json and tokenizer_config.json.

    roles: what special tokens are for, as {"eos_token": "</s>"}. template: what stands around a
    text A, or a pair A, B, as ["[CLS]", "A", "[SEP]", "B", "[SEP]"], unless the tokenizer has one.
    """
    content = tokenizer.to_json()

    def parts(names: list[str]) -> list[dict]:
        """The first segment has type 0; the second, with what follows it, type 1."""
        second = names.index("B") if "B" in names else len(names)
        return [
            {"Sequence" if name in ("A", "B") else "SpecialToken": {
                "id": name, "type_id": int(i >= second)}}
            for i, name in enumerate(names)
        ]

    if template and not content["post_processor"]:
        single = template[: template.index("B")] if "B" in template else template
        pair = template if "B" in template else single + ["B", *single[1:]]
        content["post_processor"] = dict(
            type="TemplateProcessing", single=parts(single), pair=parts(pair),
            special_tokens={
                name: dict(id=name, ids=[tokenizer.special[name]], tokens=[name])
                for name in template if name not in ("A", "B")
            },
        )
    config = dict(tokenizer_class="PreTrainedTokenizerFast", **roles)
    for name, value in ("tokenizer.json", content), ("tokenizer_config.json", config):
        with replacing(Path(folder) / name, "w") as file:
            json.dump(value, file, ensure_ascii=False, indent=1)


# --------------------------------------------------------------------------------------------------
# 7. What a run writes: its log and the chart of it
# --------------------------------------------------------------------------------------------------


class RunLog:
    """log.jsonl, a line of JSON per event; loss.svg, drawn from it; progress on the terminal. Of
    several ranks the first writes; the others only remember."""

    def __init__(self, folder, resumed_at: int | None = None):
        """resumed_at: the step the run continues from; what was logged after it is dropped."""
        self.folder, self.rows = Path(folder), []
        path = self.folder / "log.jsonl"
        if resumed_at is not None and path.exists():
            for line in path.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    numbers = [row["step"], row["seconds"], *row.values()]
                    whole = all(abs(number) < 1e15 for number in numbers)
                except (ValueError, KeyError, TypeError, RecursionError):
                    whole = False
                if not whole:  # cut short by a crash
                    break
                if row["step"] <= resumed_at:
                    self.rows.append(row)
        self.writing = ranks()[0] == 0
        if self.writing:
            with replacing(path, "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in self.rows)
        self.started = time.monotonic() - (self.rows[-1]["seconds"] if self.rows else 0)
        self.renewing = False
        self.start_clock()

    def start_clock(self) -> None:
        """The time until the next report counts from here."""
        self.since = time.perf_counter()

    def write(self, **row) -> dict:
        """Append a row; its `seconds` since the run's start are added. Returns it."""
        row["seconds"] = round(time.monotonic() - self.started, 2)
        self.rows.append(row)
        path = self.folder / "log.jsonl"
        if self.writing:
            with naming(path), open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        return row

    def report(
        self, step: int, run, losses: list[float], tokens: int, lr: float, guess: float
    ) -> None:
        """Write the mean of the losses of the steps since the last report, and show it with the
        speed (tokens: how many were read in these steps) and the time left. guess: the loss of a
        blind guess. Raises ValueError if the run has diverged."""
        seconds = time.perf_counter() - self.since
        self.start_clock()
        for at, loss in enumerate(losses, step - len(losses) + 1):
            self.check(loss, at)
        loss, speed = sum(losses) / len(losses), tokens / seconds
        self.write(step=step, loss=loss, lr=lr, tokens_per_second=round(speed))
        self.check_progress(step, run.warmup_steps, guess)
        left = (run.max_steps - step) * seconds / len(losses)
        self.progress(f"step {step}/{run.max_steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  "
                      f"{left // 60:.0f}:{left % 60:02.0f} left")

    def check(self, loss: float, step: int) -> None:
        """Raises ValueError for a loss that is no number any more."""
        if not math.isfinite(loss):
            self.diverged(f"the loss became {loss} at step {step}")

    def check_progress(self, step: int, warmup_steps: int, guess: float, last: int = 30) -> None:
        """Raises ValueError where all of the last steps were worse than a blind guess by more than
        1 (for a poor start, and BERT's pairs)."""
        recent = [row["loss"] for row in self.rows if "loss" in row and row["step"] > step - last]
        if step >= warmup_steps + last and min(recent) > guess + 1:
            self.diverged(f"the loss was {min(recent):.1f} or more from step {step - last + 1} to "
                          f"{step} (a blind guess: {guess:.1f})")

    def diverged(self, what: str):
        """Raises ValueError: what was seen, what is left, and what to try."""
        raise ValueError(
            f"{what}; the last good checkpoint is kept in {self.folder}. Try half the --lr and "
            "--matrix_lr, a longer --warmup_steps, or --dtype float32")

    def progress(self, text: str) -> None:
        """Show a line: on a terminal in place of the last one, else below it."""
        if not (sys.stderr.isatty() and self.writing) or os.environ.get("TERM") == "dumb":
            return say(text)
        width = shutil.get_terminal_size().columns - 1
        show("\r\033[K" + text[:width])
        self.renewing = True

    def say(self, *lines: str) -> None:
        """Print lines that stay, below the progress line."""
        if self.renewing:
            show("\r\033[K")
            self.renewing = False
        say(*lines)

    def draw(self, title: str) -> None:
        """Redraw loss.svg."""
        if not self.writing:
            return
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
    beside = len(curves) > 3  # many curves: the legend goes beside them
    width, height, left, top, bottom = 720 + 210 * beside, 420, 60, 44, 48
    right = 20 + 210 * beside
    legend = width - (210 if beside else 190)
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
        parts.append(f'<path d="M{legend} {y}h22" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{legend + 30}" y="{y + 4}">'
                     f'{html.escape(name)}: {points[-1][1]:.3f}</text>')
    return "\n".join([*parts, "</svg>\n"])


# --------------------------------------------------------------------------------------------------
# 8. The command line: flags out of dataclasses
# --------------------------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """argparse, with one line for a mistake instead of a page of usage."""

    def error(self, message: str):
        unknown = re.match(r"unrecognized arguments: ([^ =]+)", message)
        if unknown:
            flags = self._option_string_actions
            near = difflib.get_close_matches(unknown[1].replace("-", "_"), flags, 1)
            near += ["--data " + unknown[1]] if Path(unknown[1]).exists() else []
            message = (f"there is no flag {unknown[1]}"
                       + (f"; did you mean {near[0]}?" if near else ""))
            if "--prompt" in flags and not unknown[1].startswith("-"):
                message += '; a text goes in quotes behind --prompt: --prompt "Once upon a time"'
        raise ValueError(f"{message} ({self.prog} --help lists the flags)")


def boolean(text: str) -> bool:
    """true or false, as a flag's value."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")
    return text.lower() in ("true", "1", "yes")


source_of = functools.lru_cache(None)(inspect.getsource)  # it parses the whole file each time


def comments(cls) -> dict[str, str]:
    """field -> the comment behind it in the source: what the reader reads is what --help says."""
    sources = [source_of(base)
               for base in reversed(cls.__mro__) if dataclasses.is_dataclass(base)]
    return dict(re.findall(r"^    (\w+):.*?  # (.*)$", "\n".join(sources), re.MULTILINE))


def add_flags(parser: argparse.ArgumentParser, cls, defaults: dict) -> None:
    """A flag for each field of the dataclass. What is not given stays out of the namespace."""
    group, hints, helps = (
        parser.add_argument_group(cls.__name__), typing.get_type_hints(cls), comments(cls))
    for field in dataclasses.fields(cls):
        if not field.metadata.get("flag", True):
            continue
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
            if default != "":
                notes.append(f"default {json.dumps(default).strip(chr(34))}")
            elif "(default" not in helps[field.name]:
                notes.append("default: none")
        options["help"] = (
            helps[field.name] + (f" ({'; '.join(notes)})" if notes else "")).replace("%", "%%")
        group.add_argument(f"--{field.name}", default=argparse.SUPPRESS, **options)


def can_be(hint, value) -> bool:
    """Whether a value is of a field's type, a number finite. (A whole number may be a float.)"""
    kinds = typing.get_args(hint) or (hint,)
    if type(value) is int:
        return (int in kinds or float in kinds) and abs(value) < 1 << 63
    if type(value) is float:
        return float in kinds and math.isfinite(value)
    return type(value) in kinds or type(value) is str and value in kinds


def fields_of(cls, settings: dict) -> dict:
    """Those of the settings that are fields of the dataclass. Raises ValueError where one is of
    another type."""
    hints = typing.get_type_hints(cls)
    own = {field.name: settings[field.name]
           for field in dataclasses.fields(cls) if field.name in settings}
    for name, value in own.items():
        if not can_be(hints[name], value):
            shown = value if type(value) in (int, float, str) else type(value).__name__
            raise ValueError(f"{name} cannot be {shown!r:.40}")
    return own


def build(cls, settings: dict):
    """An instance of the dataclass from those of the settings that are its fields."""
    return cls(**fields_of(cls, settings))


def defaults_of(classes) -> dict:
    """The dataclasses' defaults, name -> value."""
    fields = itertools.chain.from_iterable(map(dataclasses.fields, classes))
    return {field.name: field.default
            for field in fields if field.default is not dataclasses.MISSING}


def read_settings(path: str, classes) -> dict:
    """A file of settings (run.json, or yours). Raises ValueError if not all are fields of these."""
    settings = read_object(path)
    hints = {name: hint for cls in classes for name, hint in typing.get_type_hints(cls).items()}
    for name, value in settings.items():
        if name not in hints:
            raise ValueError(f"{path}: there is no setting {name}")
        if not can_be(hints[name], value):
            raise ValueError(f"{path}: {name} cannot be {json.dumps(value)}")
    return settings


def parse_command(paradigm, arguments: list[str]):
    """(the command's function, all its settings, those given).

    Precedence of settings: defaults < --preset < --config < flags. The first command is the
    default, and so is the first preset. Raises ValueError for what cannot be understood.
    """
    commands, presets = commands_of(paradigm), presets_of(paradigm)
    chosen = (arguments[0] if arguments and not arguments[0].startswith("-")
              else next(iter(commands)))
    if chosen not in commands:
        near = difflib.get_close_matches(chosen, commands, 1)
        near = ["--data " + chosen] if Path(chosen).exists() else near
        raise ValueError(f"there is no command {chosen}: the commands are {', '.join(commands)}"
                         + (f"; did you mean {near[0]}?" if near else ""))
    if ranks()[1] > 1 and chosen not in ("train", "finetune"):
        raise ValueError(f"{chosen} is for one process: start it without torchrun")
    command, classes = commands[chosen]
    parser = Parser(
        prog=f"python {paradigm.NAME}.py {chosen}",
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
    if "n_layer" in given and "n_decoder_layer" in settings:
        settings["n_decoder_layer"] = None  # the default preset's goes with its own n_layer alone
    return command, settings | given, given


def open_streams() -> None:
    """A standard stream that is closed (`2>&-`) becomes an empty one; what the terminal's encoding
    has no sign for is shown as "?"."""
    for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))
        elif stream.errors == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def run_command(paradigm, arguments: list[str]) -> int:
    """Run a command, see `parse_command`. Returns the exit status: 0 done, 2 the user's mistake or
    the machine's failure (a line says which), 130 Ctrl-C, 141 nobody reads on (`... | head`)."""
    open_streams()
    try:
        with on_signals(signal.default_int_handler, signal.SIGINT):
            try:
                command, settings, given = parse_command(paradigm, arguments)
                return command(paradigm, settings, given)
            finally:
                sys.stdout.flush()
    except KeyboardInterrupt:
        say("", "interrupted")
        return 130
    except BrokenPipeError:
        silence(sys.stdout)
        return 141
    except (ValueError, OSError) as error:
        if getattr(error, "errno", 0) in (errno.ENOSPC, errno.EFBIG) and not error.filename:
            silence(sys.stdout)
            error = f"cannot write standard output: {error.strerror}; is there space left?"
        show(f"error: {' '.join(str(error).splitlines())}\n")  # (whichever rank it is)
        return 2


# --------------------------------------------------------------------------------------------------
# 9. The machine
# --------------------------------------------------------------------------------------------------


def ranks() -> tuple[int, int]:
    """(number of this process, how many there are): of those that train one model together, each on
    a device of its own, as `torchrun` starts them. (0, 1) without it."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet(device) -> None:
    """Wait for the other ranks; from then on they can be talked to."""
    import torch.distributed as dist

    if ranks()[1] > 1 and not dist.is_initialized():
        with talking():
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")


@contextlib.contextmanager
def talking():
    """A failure within it means that another rank is gone: a ConnectionError that says so."""
    try:
        yield
    except RuntimeError as error:
        reason = re.sub(r"^\[.*?\] ", "", str(error).partition("\n")[0])[:80]
        raise ConnectionError(
            f"rank {ranks()[0]} cannot reach another rank, which has ended or failed "
            f"({reason}); once that is mended, go on with --init_from resume") from None


def from_all(thing) -> list:
    """What all ranks have, in their order: anything that can be pickled."""
    found = [thing] * ranks()[1]
    if len(found) > 1:
        import torch.distributed as dist

        with talking():
            dist.all_gather_object(found, thing)
    return found


def add_up(tensors: list) -> None:
    """Replace each tensor by its sum over all ranks: all of them in one message."""
    import torch
    import torch.distributed as dist

    if ranks()[1] > 1:
        message = torch.cat([tensor.flatten() for tensor in tensors])
        with talking():
            dist.all_reduce(message)
        parts = message.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts):
            tensor.copy_(part.view_as(tensor))


def choose_device(name: str):
    """--device as a torch.device, of several ranks on one machine each its own. Raises ValueError
    for one that is not there."""
    import torch

    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise ValueError(
            f"this PyTorch sees no {name} device; use --device cpu, or install PyTorch with {name}")
    if name == "cuda" and ranks()[1] > 1:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def choose_dtype(name: str, device):
    """--dtype as a torch.dtype: products are computed in it; the weights are float32 anyway.

    "auto" asks what the device can do, not how fast it is right now: the same machine always gives
    the same numbers.
    """
    import torch

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # a T4 (7.5) has no bfloat16
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    able = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


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
    """Within it Ctrl-C, or SIGTERM (a manager of jobs wants it to end), only makes the yielded list
    true: no step is cut short. Ctrl-C twice stops at once."""
    pressed = []

    def note(number, frame):
        if pressed and number == signal.SIGINT:
            raise KeyboardInterrupt
        pressed.append(number)
        with contextlib.suppress(RuntimeError):  # it came in the middle of another print
            say("", "stopping after this step; Ctrl-C once more stops at once, and saves nothing")

    with on_signals(note, signal.SIGINT, signal.SIGTERM):
        yield pressed


@contextlib.contextmanager
def on_signals(handler, *numbers):
    """Within it these signals call `handler`: in the main thread, the only one that gets any."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --------------------------------------------------------------------------------------------------
# 10. The commands. `paradigm` is the module gpt, bert or t5: the file that was started
# --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class EvalConfig:
    """What to evaluate on."""

    data: str = ""  # as in training; without it, what the model was trained on
    batch_size: int = 32  # sequences that are computed at once


@dataclasses.dataclass
class ExportConfig:
    """Where to."""

    to: str = ""  # the folder to write


def commands_of(paradigm) -> dict[str, tuple]:
    """name -> (function, dataclasses whose fields are its flags)."""
    sizes = paradigm.Config, paradigm.ObjectiveConfig, paradigm.TrainConfig
    return {
        "train": (train_command, sizes),
        "finetune": (finetune_command, (paradigm.FinetuneConfig, paradigm.Task)),
        "generate": (generate_command, (paradigm.GenerateConfig, paradigm.RunConfig)),
        "eval": (eval_command, (EvalConfig, paradigm.RunConfig)),
        "export": (export_command, (ExportConfig, paradigm.RunConfig)),
        "bench": (bench_command, sizes),
    } | paradigm.OWN_COMMANDS


def presets_of(paradigm) -> dict[str, dict]:
    """name -> the settings of a named size, with those that train it well."""
    return {name: size | paradigm.RECIPES.get(name, {}) for name, size in paradigm.PRESETS.items()}


def last_checkpoint(folder: str) -> Path:
    """Where a run that is to go on has its state. Raises ValueError where there is none."""
    path = Path(folder) / "ckpt.pt"
    if not path.exists():
        raise ValueError(
            f"nothing to resume in {folder}: no ckpt.pt; leave --init_from out, or set --out_dir")
    return path


def train_command(paradigm, settings: dict, given: dict) -> int:
    """Train, from scratch, from a checkpoint's weights, or where a run was stopped."""
    init_from, checkpoint, folder = settings["init_from"], None, settings["out_dir"]
    if init_from != "scratch":
        checkpoint, _ = open_model(
            paradigm, last_checkpoint(folder) if init_from == "resume" else init_from)
        if init_from == "resume" and checkpoint["task"]:
            raise ValueError(f"{folder} holds a fine-tuning: go on with `finetune`")
        for name, value in checkpoint["config"].items():
            if name in given and given[name] != value and name != "dropout":
                raise ValueError(f"--{name} {given[name]} does not fit the checkpoint, "
                                 f"which has {value}: leave it out")
        settings |= checkpoint["config"] | {k: v for k, v in given.items() if k == "dropout"}
        if init_from == "resume":
            learned = checkpoint["run"].get("optimizer")
            if given.get("optimizer", learned) != learned:
                raise ValueError(f"--optimizer {given['optimizer']} does not fit the checkpoint, "
                                 f"which has the state of {learned}: leave it out")
            source = checkpoint["run"].get("data")
            if given.get("data", source) != source:
                say(f"the data is another than before ({source}): losses do not compare")
            settings |= checkpoint["objective"] | checkpoint["run"] | given
            settings["out_dir"] = folder  # also when it has been moved since
    config, objective, run = (
        build(cls, settings)
        for cls in (paradigm.Config, paradigm.ObjectiveConfig, paradigm.TrainConfig))
    return finish(paradigm, paradigm.Trainer(run, config, objective, checkpoint), "")


def finetune_command(paradigm, settings: dict, given: dict) -> int:
    """Teach a trained or a published model a task, by examples. (The defaults are for small models;
    those 512 wide and more get AdamW's usual ones, FINETUNING["published"] in the source.)"""
    init_from, folder = settings["init_from"], settings["out_dir"]
    resuming, origin = init_from == "resume", Path(init_from)
    if init_from == "scratch":
        raise ValueError("--scratch true forgets the weights; --init_from names the model whose "
                         "sizes and tokenizer are kept")
    if "init_from" not in given and not origin.exists():
        raise ValueError(
            f"nothing to start from: there is no {init_from} yet. First `python {paradigm.NAME}.py`"
            ", or name a run, a checkpoint or a published model with --init_from")
    if not resuming and Path(folder).resolve() in (origin.resolve(), origin.resolve().parent):
        raise ValueError(f"{folder} holds the model to start from: set another --out_dir")
    checkpoint, model = open_model(paradigm, last_checkpoint(folder) if resuming else init_from)
    if resuming and not checkpoint["task"]:
        raise ValueError(f"{folder} holds a pretraining: go on with `train`")
    if checkpoint["config"]["n_embd"] >= 512:
        settings |= paradigm.FINETUNING["published"]
    if resuming:
        settings |= checkpoint["task"] | checkpoint["run"] | {"out_dir": folder}
    settings |= given | {"init_from": init_from}
    if "max_steps" in given and "epochs" not in given:
        settings["epochs"] = 0.0
    run, task = (build(cls, settings) for cls in (paradigm.FinetuneConfig, paradigm.Task))
    objective = build(paradigm.ObjectiveConfig, checkpoint["objective"])
    trainer = paradigm.FineTuner(run, model.config, objective, checkpoint, task)
    return finish(paradigm, trainer, "finetune ")


def finish(paradigm, trainer, command: str) -> int:
    """Train to the end, or to Ctrl-C, and say what can be done next."""
    run, start = trainer.run, f"python {paradigm.NAME}.py"
    again = "" if run.out_dir == f"out/{paradigm.NAME}" else f" --out_dir {run.out_dir}"
    if trainer.step >= run.max_steps:
        say(f"nothing is left to do: {run.out_dir} is at step {trainer.step} already")
    if not trainer.train():
        trainer.log.say(f"stopped at step {trainer.step}. "
                        f"To go on: {start} {command}--init_from resume{again}")
        return 130
    table = [*trainer.table.splitlines(), ""] if trainer.table else []
    if trainer.stops_early:
        trainer.log.say("the held-out loss no longer falls: stopped; best.pt has the best of it")
    trainer.log.say(
        *("", trainer.show(400).strip(), "", *table),
        f"Done: {run.out_dir} holds the checkpoints, log.jsonl and loss.svg. Try next:",
        f"  {start} generate{again}",
        f"  {start} eval{again}",
        f"  {start} {command}--init_from resume --max_steps {2 * run.max_steps}{again}",
    )
    return 0


def load_checkpoint(paradigm, path):
    """(checkpoint, model): what this model file saved at `path`, checkpoint["tokenizer"] beside it.

    No code in the file is run, and nothing in it is believed unchecked but what a resumed run
    takes. Raises ValueError where it is something else than a whole checkpoint of this model file.
    """
    path, name = Path(path), paradigm.NAME
    parts = dict(config=paradigm.Config, objective=paradigm.ObjectiveConfig,
                 run=paradigm.FinetuneConfig, task=paradigm.Task)
    if not path.is_file():
        command = f"{name}.py finetune" if path.parent.name.endswith("finetuned") else f"{name}.py"
        raise ValueError(
            f"there is no checkpoint {path}: first `python {command}`, or name one by --init_from")
    if not path.with_name("tokenizer.json").exists():
        raise ValueError(f"{path.parent} has no tokenizer.json, which belongs to {path.name}")
    try:
        checkpoint = {"task": None, **unpickle(path)}
        for key, kind in dict(name=str, step=int, documents=int, best_loss=float).items():
            if type(checkpoint[key]) is not kind:
                raise ValueError(f"its {key} is no {kind.__name__}")
        if checkpoint["name"] != name:
            raise ValueError(f"{checkpoint['name']}.py wrote it, and opens it")
        made = {}
        for part, cls in parts.items():
            if part == "task" and checkpoint[part] is None:
                continue
            if type(checkpoint[part]) is not dict:
                raise ValueError(f"its {part} is no dict")
            checkpoint[part] = fields_of(cls, checkpoint[part])
            made[part] = cls(**checkpoint[part])
        config, weights = made["config"], checkpoint["model"]
        if hasattr(config, "n_labels") and "task" in made:
            if not len(made["task"].labels) == config.n_labels > 0:
                raise ValueError("its labels are not those of its head")
        model = model_that_fits(paradigm.Model, config, path.stat().st_size, len(weights))
        model.load_state_dict(weights)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} is no whole checkpoint of {name}.py: it is something else, or holds code"
        ) from None
    except Exception as error:  # a foreign file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"{path} is no whole checkpoint of {name}.py: {reason}") from None
    return checkpoint | {"tokenizer": Tokenizer.load(path.with_name("tokenizer.json"))}, model


def resume(checkpoint: dict, optimizer, scaler, device) -> list[tuple]:
    """Put optimizer and scaler into the checkpoint's state, with learning rates as the flags say
    now. Returns (loss, tokens) of the steps since its last line in the log. Raises ValueError where
    it is of another model."""
    import torch

    groups = optimizer.state_dict()["param_groups"]
    try:
        optimizer.load_state_dict(checkpoint["optimizer"] | {"param_groups": groups})
        check_state(optimizer)
        scaler.load_state_dict(checkpoint["scaler"])
        return [(torch.tensor(float(loss), device=device), int(n))
                for loss, n in checkpoint["pending"]]
    except Exception as error:  # a foreign file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(f"the run cannot go on: {reason}") from None


def check_state(optimizer) -> None:
    """Raises ValueError where a model file's optimizer holds what does not fit its weights."""
    for group in optimizer.param_groups:
        shape, whole = group["shape"], sum(p.numel() for p in group["params"])
        for p in group["params"]:
            shapes = dict(count=(), mean=p.shape, square=p.shape)
            if group["kind"] == "muon":
                shapes = dict(momentum=(whole // math.prod(shape), *shape))
            state = optimizer.state.get(p, {})
            found = {name: tuple(value.shape) for name, value in state.items()}
            # (Stride 0: a single number that poses as a whole tensor, and cannot be updated.)
            if state and (found != shapes or any(0 in v.stride() for v in state.values())):
                raise ValueError("its optimizer is of another model")


def check_tokenizer(path, tokenizer, special_tokens, vocab_size: int) -> None:
    """Raises ValueError where the tokenizer at `path` is of another model: it lacks special tokens,
    or has ids beyond the model's vocabulary."""
    missing = [token for token in special_tokens if token not in tokenizer.special]
    if missing:
        raise ValueError(f"{path}: its tokenizer has no special token {missing[0]}")
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(f"{path}: its tokenizer has {tokenizer.vocab_size:,} tokens, the model "
                         f"{vocab_size:,}")


def open_published(paradigm, name_or_folder):
    """A published model by its name or of a folder: see `from_pretrained` in the model files."""
    folder = pretrained_folder(name_or_folder)
    found = read_config(folder)
    other = dict(gpt2="gpt", bert="bert", t5="t5").get(str(found.get("model_type")), paradigm.NAME)
    if other != paradigm.NAME:
        raise ValueError(f"{folder} holds a {found['model_type']}: that is for {other}.py")
    names = {paradigm.published_name(name) for name in weight_names(folder)}
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    try:
        config = build(paradigm.Config, vars(paradigm.from_published(found, names)))
        with unfilled():
            model = model_that_fits(paradigm.Model, config, size, len(names))
    except (LookupError, TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        kind = str(found.get("model_type", "unknown"))[:40]
        raise ValueError(f"{folder}: not a model that {paradigm.NAME}.py can be (its type is "
                         f"{kind}): {str(error).partition(chr(10))[0]}") from None
    targets = paradigm.published_weights(model)
    load_weights(folder, targets, paradigm.published_name, paradigm.PASSED_OVER)
    return model.eval()


def save_published(folder, config: dict, weights: dict, task: dict | None) -> None:
    """Write config.json and model.safetensors. task: what the model was fine-tuned for, which stays
    readable for us as "task", and for `transformers` as names of labels."""
    if Path(folder).is_file():
        raise ValueError(f"{folder} is a file: name a folder")
    if task:
        labels = task.get("labels", [])
        config |= dict(task=task) | (dict(
            id2label=dict(enumerate(labels)), label2id={label: i for i, label in enumerate(labels)}
        ) if labels else {})
    save_weights(folder, weights)
    with replacing(Path(folder) / "config.json", "w") as file:
        json.dump(config, file, indent=1)


def checkpoint_at(path) -> Path | None:
    """The checkpoint in a run's folder, or the path itself if it is one; None for other things."""
    runs = [Path(path) / name for name in ("best.pt", "ckpt.pt")]
    file = next((run for run in runs if run.exists()), Path(path))
    return file if file.is_file() or file.suffix == ".pt" else None


def open_weights(paradigm, path):
    """The model of a checkpoint, of a run's folder, or a published one, without its tokenizer."""
    file = checkpoint_at(path)
    return load_checkpoint(paradigm, file)[1].eval() if file else open_published(paradigm, path)


def published_task(paradigm, config, found: dict) -> dict | None:
    """What a published model was fine-tuned for, as config.json says; None if it was not. Raises
    ValueError where its labels are not those of its head."""
    task = found.get("task") if type(found.get("task")) is dict else None  # (exported here)
    labels = getattr(config, "n_labels", 0)
    if labels:  # a BERT, fine-tuned here or elsewhere: {"0": name, "1": name, ...}
        names = found["id2label"] if type(found["id2label"]) is dict else {}
        if {*names} != {*map(str, range(labels))}:
            raise ValueError(f"the labels in its config.json are not 0 to {labels - 1}")
        task = (task or {}) | {"labels": [str(names[str(i)]) for i in range(labels)]}
    return task and vars(build(paradigm.Task, task))


def open_model(paradigm, path):
    """(checkpoint, model): of a checkpoint, of the run in a folder, or of a published model."""
    file = checkpoint_at(path)
    if file:
        checkpoint, model = load_checkpoint(paradigm, file)
        say(f"{file}: step {checkpoint['step']}")
    else:
        model = open_published(paradigm, path)
        objective, run = paradigm.ObjectiveConfig(), paradigm.TrainConfig()
        task = published_task(paradigm, model.config, read_config(pretrained_folder(path)))
        run.data = "" if task else run.data
        checkpoint = dict(
            step=0, config=vars(model.config), objective=vars(objective), run=vars(run), task=task,
            documents=1, model=model.state_dict(), tokenizer=Tokenizer.from_pretrained(path),
        )
    check_tokenizer(path, checkpoint["tokenizer"], paradigm.SPECIAL_TOKENS, model.config.vocab_size)
    return checkpoint, model


def load_model(paradigm, load):
    """(model, checkpoint, device, dtype): the weights that --init_from or --out_dir name."""
    paths = [Path(load.out_dir) / name for name in ("best.pt", "ckpt.pt")]
    trained = next((path for path in paths if path.exists()), paths[-1])
    checkpoint, model = open_model(paradigm, load.init_from or trained)
    device = choose_device(load.device)
    return model.to(device).eval(), checkpoint, device, choose_dtype(load.dtype, device)


def eval_command(paradigm, settings: dict, given: dict) -> int:
    """Print the validation loss and metrics of a model as a line of JSON."""
    options = build(EvalConfig, settings)
    model, checkpoint, device, dtype = load_model(paradigm, build(paradigm.RunConfig, settings))
    learned, tokenizer = checkpoint["run"].get("data", ""), checkpoint["tokenizer"]
    source, autocast = options.data or learned, autocast_to(dtype, device)
    config, row = model.config, {"step": checkpoint["step"]}
    if checkpoint["task"]:
        task = build(paradigm.Task, checkpoint["task"])
        parts = task_rows(task, source)
        if Path(source).is_file() and Path(source).resolve() != Path(learned).resolve():  # all new
            parts["validation"] += parts["train"]
        examples = Examples(task, parts["validation"], tokenizer, config, parts["train"])
        found, table = paradigm.evaluate_task(task, model, examples, autocast, options.batch_size)
        if table:
            say(table)
        print(json.dumps(row | found))
        return 0
    objective = build(paradigm.ObjectiveConfig, checkpoint["objective"])
    corpus = prepare(
        source, config.vocab_size, paradigm.SPECIAL_TOKENS, paradigm.SEPARATOR, tokenizer)
    say(f"{source}: {len(corpus.validation):,} tokens, its validation part")
    batches = paradigm.eval_batches(corpus, config, objective, options.batch_size)
    row |= paradigm.evaluate(model, batches, autocast)
    print(json.dumps(row | {"perplexity": math.exp(min(row[paradigm.TOKEN_LOSS], 700))}))
    return 0


def generate_command(paradigm, settings: dict, given: dict) -> int:
    """Let a model write."""
    import torch

    options = build(paradigm.GenerateConfig, settings)
    model, checkpoint, _, dtype = load_model(paradigm, build(paradigm.RunConfig, settings))
    torch.manual_seed(settings["seed"])
    paradigm.write_samples(model.to(dtype), checkpoint, options)
    return 0


def prompts(given: str):
    """Yield the prompt that was given; without one, each line that is typed, until Ctrl-D."""
    if given:
        yield given
        return
    if not sys.stdin.isatty():
        raise ValueError("this model was fine-tuned to answer: say what, with --prompt")
    say("Type something and press Enter; Ctrl-D ends.")
    while True:
        show("> ")
        line = sys.stdin.readline()
        if not line:
            say("")
            return
        if line.strip():
            yield line.strip()


def export_command(paradigm, settings: dict, given: dict) -> int:
    """Write a folder that transformers opens: settings, weights, tokenizer."""
    to = build(ExportConfig, settings).to
    if not to:
        raise ValueError("say which folder to write, with --to")
    model, checkpoint, _, _ = load_model(paradigm, build(paradigm.RunConfig, settings))
    model.save_pretrained(to, task=checkpoint["task"])
    save_tokenizer(checkpoint["tokenizer"], to, paradigm.ROLES, paradigm.TEMPLATE)
    say(f"{to} holds config.json, model.safetensors and tokenizer.json")
    return 0


def bench_command(paradigm, settings: dict, given: dict) -> int:
    """Measure training and generation with random weights and tokens; print a line of JSON."""
    import torch

    config, objective, run = (
        build(cls, settings)
        for cls in (paradigm.Config, paradigm.ObjectiveConfig, paradigm.TrainConfig))
    device = choose_device(run.device)
    dtype = choose_dtype(run.dtype, device)
    if device.type == "cpu":
        keep_freed_memory()
    model = paradigm.Model(config).to(device)
    optimizer, autocast = paradigm.Muon(model, run, dtype), autocast_to(dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    compiled = torch.compile(model) if run.compile else model
    corpus = random_corpus(config.vocab_size, paradigm.SPECIAL_TOKENS)
    times = []
    while len(times) < 5 or (sum(times) < 8 and len(times) < 100):
        start = time.perf_counter()
        batch = paradigm.train_batch(corpus, config, objective, run, run.max_steps + len(times))
        paradigm.update(compiled, batch, optimizer, scaler, autocast, run).item()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[2:])  # the first ones warm up
    gflops = paradigm.count_flops(model, batch) / seconds / 1e9
    peak = matmul_gflops(device, dtype, 1024 if device.type == "cpu" else 8192, seconds=0.5)
    row = dict(
        ms_per_step=seconds * 1e3, tokens_per_second=paradigm.count_tokens(batch) / seconds,
        gflops=gflops, matmul_gflops=peak, share=gflops / peak,
        peak_memory_mb=peak_memory_mb(device),
    )
    if hasattr(model, "generate"):
        row |= generation_speeds(paradigm, model.eval().to(dtype))
    print(json.dumps(row))
    return 0


def generation_speeds(paradigm, model) -> dict[str, float]:
    """Tokens per second of one sequence, and of 32 together, each 120 tokens long."""
    speeds = {}
    for key, rows in ("generate_tokens_per_second", 1), ("generate_batch_tokens_per_second", 32):
        times = []
        for _ in range(4):
            start = time.perf_counter()
            paradigm.write_random(model, rows, 120).sum().item()  # (waits for the device)
            times.append(time.perf_counter() - start)
        speeds[key] = rows * 120 / statistics.median(times[1:])
    return speeds
