"""All tests: `pytest test_all.py`. No network, no GPU; those that compare with `transformers`,
`tokenizers` and `safetensors` run where these are installed. What a test expects comes from
elsewhere than the code it tests: a slow loop, float64, a worked example, or those libraries.

Most tests run commands, as a user does, with models that train within a second, and most of these
run once with each of the three scripts. `KILLS=20 pytest test_all.py -k killed` kills more runs;
`python test_all.py` puts the README's links to lines right.
"""

import ast
import base64
import collections
import dataclasses
import functools
import gzip
import http.server
import importlib
import io
import itertools
import json
import math
import multiprocessing
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
import threading
import time
import traceback
import unicodedata
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.run
import torch.nn.functional as F

import bert
import bpe
import data
import gpt
import t5

ROOT = Path(__file__).parent
INPUT = (ROOT / "input.txt").read_text(encoding="utf-8")
END = "<|endoftext|>"
SCRIPTS = dict(gpt=gpt, bert=bert, t5=t5)
PROMPTS = dict(gpt="The — sea", bert="The [MASK] — sea.", t5="The <extra_id_0> — sea.")
KILLS = int(os.environ.get("KILLS", 1))
torch.set_num_threads(1)  # models as small as these lose time with more
traceback.format_stack = list  # torch notes one at each seed, for a GPU that may be used later

# What the tests have in common --------------------------------------------------------------------


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory):
    """All tests have one cache folder, so a text is tokenized once; children find the modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)


def shorten_samples(task):
    """The sample at a run's end, 400 tokens, would take most of the time of the runs here."""
    show = task.demonstrate
    task.demonstrate = lambda self, model, length: show(self, model, min(length, 9))


for each in SCRIPTS.values():
    shorten_samples(each.Pretraining)
    shorten_samples(each.Finetuning)


@pytest.fixture(params=SCRIPTS.values(), ids=SCRIPTS)
def script(request):
    """The test runs once with each model file."""
    return request.param


SMALL = ("--n_layer 2 --n_head 2 --n_embd 32 --block_size 32 --vocab_size 400 --batch_size 4 "
         "--warmup_steps 2 --dropout 0.1 --device cpu --eval_interval 4 --log_interval 2").split()
EXACT = "--dropout 0 --dtype float32 --max_steps 6 --log_interval 1 --eval_interval 6".split()


def first_stories(n: int) -> str:
    return END.join(INPUT.split(END)[:n])


@pytest.fixture(scope="session")
def stories(tmp_path_factory) -> str:
    """The path of a text of a few stories: to evaluate on more takes most of a short run."""
    return put(tmp_path_factory.mktemp("stories") / "stories.txt", first_stories(16))


@pytest.fixture(scope="session")
def trained(stories, tmp_path_factory):
    """trained(script): the folder of a short run, made once. No test may change it."""
    @functools.cache
    def folder(script) -> Path:
        path = tmp_path_factory.mktemp("trained") / script.NAME
        run(script, "--data", stories, "--out_dir", path, "--max_steps", 8, *SMALL)
        return path
    return folder


@pytest.fixture(scope="session")
def exported(trained):
    """exported(script): that model in a folder for `transformers`."""
    @functools.cache
    def folder(script) -> Path:
        path = trained(script).with_name("exported")
        run(script, "export", "--out_dir", trained(script), "--to", path)
        return path
    return folder


def run(script, *arguments, status=0):
    """Run a command in this process; it has to end with this exit status."""
    assert script.main([str(argument) for argument in arguments]) == status


def printed(script, capsys, *arguments) -> str:
    """What a command writes to standard output."""
    capsys.readouterr()
    run(script, *arguments)
    return capsys.readouterr().out


def figures(script, capsys, *arguments) -> dict:
    """The line of JSON that `eval` and `bench` end with."""
    return json.loads(printed(script, capsys, *arguments).splitlines()[-1])


def mistake(script, capsys, *arguments) -> str:
    """The one line that a mistaken command ends with."""
    capsys.readouterr()
    run(script, *arguments, status=2)
    shown = capsys.readouterr()
    line = shown.err.splitlines()[-1]
    assert line.startswith("error: ") and shown.out == "" and "Traceback" not in shown.err
    return line


def put(name, content: str | bytes) -> str:
    """Write a file -> its name."""
    Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(name)


def files_in(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def log_of(folder) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def state_of(path) -> dict:
    """What is in a checkpoint: "model", "optimizer", "step" ..."""
    return torch.load(path, weights_only=True)


def assert_same_run(left, right):
    """Two runs ended alike: weights and optimizer to the last bit, the log but for its times."""
    tensors, logs = [], []
    for folder in left, right:
        state = state_of(f"{folder}/ckpt.pt")
        best = state_of(f"{folder}/best.pt")["model"]
        tensors.append([state["model"], state["optimizer"]["state"], best])
        logs.append([{key: value for key, value in row.items() if key not in (
            "seconds", "tokens_per_second")} for row in log_of(folder)])
    torch.testing.assert_close(*tensors, rtol=0, atol=0)
    assert logs[0] == logs[1]


CHILDREN = multiprocessing.get_context("forkserver")  # imports once what takes seconds, then forks
CHILDREN.set_forkserver_preload(["test_all", "torch._dynamo"])


def in_child(name: str, arguments: list[str], folder: str, environment: dict[str, str]):
    os.chdir(folder)
    os.environ.update(environment)
    sys.stderr = open(f"child{environment.get('RANK', '')}.err", "w")
    sys.exit(importlib.import_module(name).main(arguments))


def child_of(script, *arguments, folder=None, **environment):
    """A process of its own that will run the command."""
    return CHILDREN.Process(target=in_child, args=(
        script.NAME, list(map(str, arguments)), str(folder or os.getcwd()), environment))


@pytest.fixture(scope="session", autouse=True)
def beside(request, shared_cache, stories, tmp_path_factory):
    """beside(name): the folder of a run, when it has ended. These runs take longest, so they begin
    before all tests, if they are needed, and go on beside them."""
    chosen, runs = {item.name for item in request.session.items}, {}
    folder = tmp_path_factory.mktemp("torchrun")
    if "test_accumulation_and_two_ranks_give_the_losses_of_one_process[gpt]" in chosen:
        runs["torchrun"] = folder, CHILDREN.Process(target=torch.distributed.run.main, args=([
            "--standalone", "--nproc_per_node=2", gpt.__file__, "--data", stories, *SMALL, *EXACT,
            "--batch_size", "8", "--out_dir", str(folder)],))
    for name, flags in dict(gpt="--max_steps 250", t5="--n_embd 64 --batch_size 16 --max_steps 90",
                            bert="--n_embd 64 --batch_size 32 --max_steps 300").items():
        if f"test_it_learns[{name}]" in chosen:
            folder = tmp_path_factory.mktemp(name)
            text = put(folder / "stories.txt", first_stories(40))
            runs[name] = folder, child_of(
                SCRIPTS[name], "--data", text, "--out_dir", folder, *SMALL, "--eval_interval", 300,
                "--dropout", 0, *flags.split(), folder=folder)
    starting = threading.Thread(target=lambda: [child.start() for _, child in runs.values()])
    starting.start()  # (it waits for imports)

    def ended(name) -> Path:
        starting.join()
        folder, child = runs[name]
        child.join()
        assert child.exitcode == 0
        return folder
    return ended


@functools.cache
def byte_tokenizer(script) -> bpe.Tokenizer:
    """Every byte is a token, so ids are easily read: it has no merges."""
    return bpe.Tokenizer.train("", 256 + len(script.SPECIAL_TOKENS), script.SPECIAL_TOKENS)


def tiny_config(script, **settings):
    """A small architecture for the byte tokenizer."""
    sizes = dict(vocab_size=256 + len(script.SPECIAL_TOKENS), n_layer=2, n_head=2, n_embd=16)
    return script.Config(**sizes | ({} if script is t5 else dict(block_size=32)) | settings)


def randomised(model, std=0.3):
    """The model in float64 with all its weights random (at the start some are zero or one)."""
    for p in model.parameters():
        torch.nn.init.normal_(p, std=std)
    return model.double().eval()


def opened(task, script, source, tokenizer=None, config=None, **settings):
    """The task with the data of a source -> (task, config)."""
    tokenizer, config = tokenizer or byte_tokenizer(script), config or tiny_config(script)
    found = data.open_source(script, task, source, 0, tokenizer)
    return task, task.open(data.Run(data=source, **settings), config, tokenizer, found)


# bpe.py -------------------------------------------------------------------------------------------

BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
T5_SENTINELS = range(2, 102)
MIXED = "Don't we'll  go!\n\n\tIt's 3.14, naïve — 你好 мир १२ x² 𝔘𝔫𝔦 🙂\u3000end \x1c'S "
SCRIPTURE = (  # ordinary text in many scripts, as people type it
    "Don't you know it's 3.14, naïve café-goers? Straße, Æsir, señor, Łódź, İstanbul; ﬁne ½ ①™x². "
    "Όλοι οι άνθρωποι γεννιούνται ελεύθεροι. Все люди рождаются свободными, ё й. "
    "כל בני האדם נולדו בני חורין. يولد جميع الناس أحرارًا متساوين. सभी मनुष्यों को गौरव, १२३। "
    "มนุษย์ทั้งหลายเกิดมามีอิสระ. すべての人間は、ガｶﾞ「自由」。 모든 인간은 자유롭다. 人人生而自由，在尊严上平等。 "
    "Tất cả mọi người sinh ra đều được tự do. \t(a_b) [c]{d} $5 + 7% = ~x^2 `e` @f #g | h\\i/j «k» "
    "“l” – m… ＡＢＣ１２３ 🙂 👩‍👧 🇫🇷 e\u0301 \xa0n\u3000o\r\n\u200bp ")


@functools.cache
def alphabet() -> list[str]:
    """GPT-2's printable character for each byte, as its encoder.py says it."""
    plain = [byte for byte in range(256) if chr(byte) in map(chr, (
        *range(33, 127), *range(161, 173), *range(174, 256)))]
    moved = [byte for byte in range(256) if byte not in plain]
    return [chr(byte if byte in plain else 256 + moved.index(byte)) for byte in range(256)]


def content_of(tokenizer) -> dict:
    """What it writes to tokenizer.json."""
    tokenizer.save("saved.json")
    return json.loads(Path("saved.json").read_text(encoding="utf-8"))


def test_splitting_by_hand():
    assert bpe.split_words(MIXED) == [
        "Don", "'t", " we", "'ll", " ", " go", "!", "\n\n", "\t", "It", "'s", " 3", ".", "14", ",",
        " naïve", " —", " 你好", " мир", " १२", " x", "²", " 𝔘𝔫𝔦", " 🙂", "\u3000", "end", " \x1c'",
        "S", " "]


def slow_merges(text: str, n: int) -> list[list[str]]:
    """BPE as the paper tells it: count all pairs, merge the most frequent, begin again. Of equal
    ones the lowest ids: bytes are numbered in the order of their printable characters."""
    number = {character: i for i, character in enumerate(sorted(alphabet()))}
    words = [[alphabet()[byte] for byte in word.encode()] for word in bpe.split_words(text)]
    merges = []
    for _ in range(n):
        counts = collections.Counter(pair for word in words for pair in zip(word, word[1:]))
        if not counts:
            break
        best = min(counts, key=lambda pair: (-counts[pair], number[pair[0]], number[pair[1]]))
        merges.append(list(best))
        number.setdefault(best[0] + best[1], len(number))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i : i + 2] = [best[0] + best[1]]
                i += 1
    return merges


@pytest.mark.parametrize("text", [
    "low lower lowest newer newest wider", "aaaa aaa aa abab ababab baab", MIXED * 3])
def test_merges_and_ids_equal_the_slow_loops(text):
    tok = bpe.Tokenizer.train(text, 256 + 30)
    model = content_of(tok)["model"]
    assert model["merges"] == slow_merges(text, 30) and len(model["merges"]) >= 11
    rank = {tuple(merge): i for i, merge in enumerate(model["merges"])}
    for word in set(bpe.split_words(text + " aabb lowewest")):
        parts = [alphabet()[byte] for byte in word.encode()]
        while ranked := [(rank[pair], i) for i, pair in enumerate(zip(parts, parts[1:]))
                         if pair in rank]:
            i = min(ranked)[1]
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        assert tok.encode(word) == [model["vocab"][part] for part in parts]


def test_text_and_bytes_come_back():
    tok, draw = bpe.Tokenizer.train(MIXED * 5, 320, [END]), random.Random(1)
    for raw in (draw.randbytes(n % 16) for n in range(2000)):
        assert tok.decode_bytes(tok.encode(raw)) == raw
    text = "".join(chr(code) for code in (*range(0x3100), *range(0x3100, 0x30000, 9))
                   if not 0xD800 <= code < 0xE000)
    assert tok.decode(tok.encode(text)) == text
    assert tok.decode(tok.encode("☃")[:-1]) == "\ufffd"  # half a character
    long = "abc" * 50_000  # such a long word takes a second, not days
    assert bpe.Tokenizer.train("abcabcab " * 99, 290).encode(long)[-1] < 290
    with pytest.raises(ValueError, match="320|999"):
        tok.decode([999])


def test_special_tokens_are_plain_text_unless_asked_for():
    tok, text = bpe.Tokenizer.train("some text " * 9, 262, ["<pad>", END]), f"some{END}text"
    assert tok.special == {"<pad>": 0, END: 1} and 1 not in tok.encode(text)
    ids = tok.encode(text, allow_special=True)
    assert ids == [*tok.encode("some"), 1, *tok.encode("text")]
    assert tok.decode(tok.encode(text)) == tok.decode(ids) == text
    content, again = content_of(tok), bpe.Tokenizer.load("saved.json")
    assert again.vocab_size == tok.vocab_size == 262
    assert content_of(again) == content and again.encode(MIXED) == tok.encode(MIXED)


def test_merges_and_ids_are_those_of_the_tokenizers_library():
    hf = pytest.importorskip("tokenizers")
    draw = random.Random(2)
    letters = "".join(draw.choice("aab ") for _ in range(5_000))  # ties; tokens with two spellings
    for text, vocab_size in ((INPUT[:200_000].replace(END, ""), 1200), (SCRIPTURE * 2, 600),
                             (letters, 500)):
        tok = bpe.Tokenizer.train(text, vocab_size, ["<pad>", END])
        theirs = hf.Tokenizer(hf.models.BPE())
        theirs.pre_tokenizer = hf.pre_tokenizers.ByteLevel(add_prefix_space=False)
        theirs.train_from_iterator([text], hf.trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=["<pad>", END], show_progress=False,
            initial_alphabet=hf.pre_tokenizers.ByteLevel.alphabet()))
        learned, ours = json.loads(theirs.to_str())["model"], content_of(tok)["model"]
        assert ours["merges"] == learned["merges"] and ours["vocab"] == learned["vocab"]
        ids = theirs.encode(text).ids
        assert tok.encode(text) == hf.Tokenizer.from_file("saved.json").encode(text).ids == ids
        learned = json.loads(theirs.to_str())  # in the older layout: merges as one string
        learned["model"]["merges"] = [" ".join(pair) for pair in learned["model"]["merges"]]
        assert open_as_tokenizer(learned).encode(text) == ids


def added(i: int, content: str) -> dict:
    return dict(id=i, content=content, single_word=False, lstrip=False, rstrip=False,
                normalized=False, special=True)


def bert_file(pieces, lowercase=True) -> dict:
    """A tokenizer.json in the layout of the hub's bert-base-uncased (or -cased)."""
    return dict(
        version="1.0", truncation=None, padding=None, post_processor=None,
        added_tokens=[added(i, token) for i, token in enumerate(BERT_TOKENS)],
        normalizer=dict(type="BertNormalizer", clean_text=True, handle_chinese_chars=True,
                        strip_accents=None, lowercase=lowercase),
        pre_tokenizer=dict(type="BertPreTokenizer"),
        decoder=dict(type="WordPiece", prefix="##", cleanup=True),
        model=dict(type="WordPiece", unk_token="[UNK]", continuing_subword_prefix="##",
                   max_input_chars_per_word=100,
                   vocab={piece: i for i, piece in enumerate([*BERT_TOKENS, *pieces])}))


def charsmap(rules: dict[str, str]) -> bytes:
    """A table of strings and what becomes of them, as SentencePiece compiles it: a double array,
    then the strings that keys become."""
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


def t5_file(scores: dict[str, float], rules: dict[str, str]) -> dict:
    """A tokenizer.json in the layout of the hub's t5-small. rules: its normaliser's."""
    sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]
    names = ["<pad>", "</s>", "<unk>", *scores, *sentinels]
    space = dict(type="Metaspace", replacement="▁", add_prefix_space=True)
    table = base64.b64encode(charsmap(rules)).decode()
    return dict(
        version="1.0", truncation=None, padding=None, post_processor=None, decoder=space,
        added_tokens=[added(i, token) for i, token in enumerate(names)
                      if i < 3 or token in sentinels],
        normalizer=dict(type="Precompiled", precompiled_charsmap=table),
        pre_tokenizer=dict(type="Sequence", pretokenizers=[dict(type="WhitespaceSplit"), space]),
        model=dict(type="Unigram", unk_id=2, vocab=[[x, scores.get(x, 0.0)] for x in names]))


def open_as_tokenizer(content: dict):
    Path("tokenizer.json").write_text(json.dumps(content))
    return bpe.Tokenizer.load("tokenizer.json")


def test_wordpiece_by_hand():
    pieces = ["un", "##aff", "##able", "the", "cafe", "don", "'", "t", "!", "中", "σασ", "x" * 99]
    tok = open_as_tokenizer(bert_file(pieces))
    ids = tok.encode("The UNaffable  café, don't!中ΣΑΣ")
    assert [(BERT_TOKENS + pieces)[i] for i in ids] == [
        "the", "un", "##aff", "##able", "cafe", "[UNK]", "don", "'", "t", "!", "中", "σασ"]
    assert tok.encode("unaffably") == tok.encode("x" * 101) == [1]  # all of the word
    assert tok.encode("the[MASK]", allow_special=True) == [8, 4]
    assert 4 not in tok.encode("the[MASK]")
    assert tok.decode([8, 5, 6, 7, 13]) == "the unaffable!"
    assert (tok.vocab_size, tok.special) == (17, {token: i for i, token in enumerate(BERT_TOKENS)})
    put("tokenizer_config.json", '{"do_lower_case": false}')  # this rules, as for AutoTokenizer
    assert tok.encode("The the") == [8, 8] and open_as_tokenizer(
        bert_file(pieces)).encode("The the") == [1, 8]


def test_unigram_is_the_best_of_all_cuts():
    draw = random.Random(0)
    pieces = {letter: -draw.uniform(5, 9) for letter in "ab▁"}  # "c" is unknown
    for _ in range(25):
        pieces["".join(draw.choices("abc", k=draw.randrange(2, 5)))] = -draw.uniform(3, 20)
    tok = open_as_tokenizer(t5_file(pieces, {"Ａ": "a", "ﬁ": "b"}))
    names = ["<pad>", "</s>", "<unk>", *pieces]
    unknown = dict.fromkeys("abc▁", min(pieces.values()) - 10)  # a single letter
    for _ in range(200):
        word = "".join(draw.choices("abc", k=draw.randrange(1, 9)))
        cuts = [["▁" + word]]
        for end in range(1, len(word) + 1):  # all cuts: another one here, or none
            cuts += [[*cut[:-1], cut[-1][: end - len(word) - 1], word[end - 1 :]] for cut in cuts]
        best = max(cuts, key=lambda cut: sum(
            (unknown | pieces).get(part, -math.inf) for part in cut))
        best = [part if part in pieces else "<unk>" for part in best]
        best = [part for i, part in enumerate(best)  # neighbours that are unknown are one
                if part != "<unk>" or best[i - 1 : i] != ["<unk>"]]
        assert [names[i] for i in tok.encode(word)] == best
    assert tok.encode("Ａﬁ") == tok.encode("ab")
    assert tok.special["<extra_id_0>"] == tok.vocab_size - 1 == 102 + len(pieces)
    for typed in "a <extra_id_1>b", "</s>", "<unk>":
        assert not {0, 1, tok.vocab_size - 2} & set(tok.encode(typed))


@pytest.mark.parametrize("kind", ["uncased", "cased", "unigram"])
def test_ids_are_those_of_the_library_on_ordinary_text(kind):
    """In all scripts; and the file that we save opens there, and with us, to the same ids."""
    hf = pytest.importorskip("tokenizers")
    learn = [*INPUT[:60_000].replace("<", "").split("\n"), *SCRIPTURE.split()]
    if kind == "unigram":
        theirs = hf.Tokenizer(hf.models.Unigram())
        theirs.pre_tokenizer = hf.pre_tokenizers.Metaspace()
        theirs.train_from_iterator(learn, hf.trainers.UnigramTrainer(
            vocab_size=700, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False))
        rules = {chr(code): unicodedata.normalize("NFKC", chr(code)) for code in range(128, 0x3400)}
        content = t5_file(dict(json.loads(theirs.to_str())["model"]["vocab"][1:]), {"\n": " "} | {
            key: value for key, value in rules.items() if value not in (key, "")})
    else:
        theirs = hf.Tokenizer(hf.models.WordPiece(unk_token="[UNK]"))
        theirs.normalizer = hf.normalizers.BertNormalizer(lowercase=kind == "uncased")
        theirs.pre_tokenizer = hf.pre_tokenizers.BertPreTokenizer()
        theirs.train_from_iterator(learn, hf.trainers.WordPieceTrainer(
            vocab_size=1500, special_tokens=BERT_TOKENS, show_progress=False))
        vocab = json.loads(theirs.to_str())["model"]["vocab"]
        content = bert_file(sorted(vocab, key=vocab.get)[5:], kind == "uncased")
    tok = open_as_tokenizer(content)
    tok.save("saved.json")
    again, theirs, saved = (bpe.Tokenizer.load("saved.json"), *map(
        hf.Tokenizer.from_file, ("tokenizer.json", "saved.json")))
    special = "<extra_id_7>" if kind == "unigram" else "[MASK]"
    for text in (INPUT[60_000:90_000].replace(END, ""), SCRIPTURE, f"the {special} of", "  ", "a"):
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert tok.encode(text, allow_special=True) == again.encode(text, allow_special=True) == ids
        assert saved.encode(text, add_special_tokens=False).ids == ids
        assert tok.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


# data.py: downloads, sources, windows -------------------------------------------------------------


class Server(http.server.BaseHTTPRequestHandler):
    """Serves `files`: path -> bytes, or the number of an error, or the address it has moved to.
    Cuts a connection that has more to send after 20,000 bytes, as often as `cuts` says; notes each
    request in `seen`."""

    files, cuts, ranges, seen = {}, 0, True, []

    def do_GET(self):
        begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").rstrip("-"))
        Server.seen.append((self.path, begin))
        body, begin = Server.files.get(self.path, 404), begin if Server.ranges else 0
        moved = isinstance(body, str)
        if isinstance(body, int) or not moved and begin >= len(body):
            return self.send_error(body if isinstance(body, int) else 416)
        self.send_response(307 if moved else 206 if begin else 200)
        self.send_header(*("Location", body) if moved else ("Content-Length", len(body) - begin))
        self.end_headers()
        if moved:
            return
        cut = Server.cuts and len(body) - begin > 20_000
        self.wfile.write(body[begin : begin + 20_000] if cut else body[begin:])
        if cut:
            Server.cuts -= 1
            self.connection.close()

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    Server.files, Server.cuts, Server.ranges, Server.seen = {}, 0, True, []
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=serving.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    yield f"http://127.0.0.1:{serving.server_port}"
    serving.shutdown()
    serving.server_close()


def test_a_download_continues_where_the_connection_broke(server):
    body = random.Random(0).randbytes(100_000)
    Server.files, Server.cuts = {"/a.bin": body}, 3
    assert data.download(f"{server}/a.bin", Path("new/a.bin")).read_bytes() == body
    begins = [begin for _, begin in Server.seen]
    assert len(begins) == 4 and begins[0] == 0 and begins == sorted(set(begins))
    assert 40_000 < begins[3] <= 60_000 and os.listdir("new") == ["a.bin"]
    data.download(f"{server}/a.bin", Path("new/a.bin"))
    assert len(Server.seen) == 4  # what is there is not fetched again
    Server.cuts, Server.ranges = 1, False  # a server that cannot continue
    assert data.download(f"{server}/a.bin", Path("b.bin")).read_bytes() == body
    Server.files["/busy"] = 503
    for url, status in ("none", 404), ("busy", 503):
        with pytest.raises(OSError, match=f"{url}.*{status}"):
            data.download(f"{server}/{url}", Path(url))
        assert not Path(url).exists()


def put_archive(name: str, texts: dict[str, str]) -> str:
    with tarfile.open(name, "w:gz") as archive:
        for path, text in texts.items():
            member = tarfile.TarInfo(path)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
    return name


def corpus_of(source):
    return data.prepare(source, 300, [END], END)


def documents_of(corpus, separator=END) -> list[list[str]]:
    """The documents of both parts, taken apart again."""
    parts = [corpus.tokenizer.decode(part).split(separator)
             for part in (corpus.train, corpus.validation)]
    assert all(part[0] == part[-1] == "" for part in parts)
    return [part[1:-1] for part in parts]


def test_every_kind_of_source_gives_the_same_documents(server):
    texts = [f"Story {i}.\n\nIt has {i} words — or so." for i in range(20)]
    joined = f"\n{END}\n".join(texts)
    lines = "\n".join(json.dumps({"text": text}) for text in texts)
    Path("folder/inner").mkdir(parents=True)
    for name, content in (
        ("a.txt", joined + f"\n{END}\n"), ("b.txt.gz", gzip.compress(joined.encode())),
        ("c.jsonl", lines), ("d.jsonl.gz", gzip.compress(lines.encode())),
        *((f"folder/{'inner/' * (i > 9)}{i}.txt", text) for i, text in enumerate(texts)),
    ):
        put(name, content)
    Server.files = {"/e.txt": joined.encode()}
    for source in "a.txt", "b.txt.gz", "c.jsonl", "d.jsonl.gz", "folder", f"{server}/e.txt":
        corpus = corpus_of(source)
        train, validation = documents_of(corpus)
        found = train + validation
        assert (sorted(found) == sorted(texts) if source == "folder" else found == texts), source
        assert 1 <= len(validation) <= 3 and corpus.train.dtype == np.uint16


@pytest.mark.parametrize("kind", ["stream", "stories"])
def test_a_corpus_in_pieces_by_several_processes_is_that_of_the_whole(kind, monkeypatch):
    """Tokenizer, tokens and split are the same; and the second time all comes from the cache."""
    draw = random.Random(0)
    words = ["tree", "and", "naïve", "你好", "...", "\n", "\n\n ", "x" * 30, " ", "12"]
    documents = [" ".join(draw.choice(words) for _ in range(100)) for _ in range(40)]
    text = (f"\n{END}\n" if kind == "stories" else " ").join(documents)
    put("a.txt", text)
    monkeypatch.setenv("XDG_CACHE_HOME", "first")
    whole = corpus_of("a.txt")
    if kind == "stream":
        train, validation = documents_of(whole)
        assert "".join(train + validation) == text and len(train) == len(validation) == 1
        assert 0.89 * len(text) < len(train[0]) < 0.91 * len(text)
    monkeypatch.setenv("XDG_CACHE_HOME", "second")
    monkeypatch.setattr(data, "PIECE", 999)
    pieced = corpus_of("a.txt")
    assert np.array_equal(pieced.train, whole.train)
    assert np.array_equal(pieced.validation, whole.validation)
    assert content_of(pieced.tokenizer) == content_of(whole.tokenizer)
    monkeypatch.setattr(bpe.Tokenizer, "from_counts", None)  # to learn another one would fail
    monkeypatch.setattr(bpe.Tokenizer, "encode", None)
    assert np.array_equal(corpus_of("a.txt").train, whole.train)


def test_the_movie_reviews_by_name(server, monkeypatch):
    """With and without labels, from a server here that has a small archive of that name."""
    import requests

    def local(url, get=requests.get, **options):
        return get(f"{server}/{url.rpartition('/')[2]}", **options)

    monkeypatch.setattr(requests, "get", local)
    reviews = {"train/pos/0_9": "good", "train/neg/1_1": "bad", "train/unsup/2_0": "so",
               "test/pos/0_8": "fine", "README": "no"}
    archive = put_archive("reviews.tar.gz", {
        f"aclImdb/{name}.txt": f"{text}<br /><br />film" for name, text in reviews.items()})
    Server.files = {"/aclImdb_v1.tar.gz": Path(archive).read_bytes()}
    train, validation = documents_of(corpus_of("imdb"))
    assert sorted(train) == ["bad\n\nfilm", "good\n\nfilm", "so\n\nfilm"]
    assert validation == ["fine\n\nfilm"]
    task, config = opened(plain(bert), bert, "imdb")
    assert config.n_labels == 2 and task.rows == 2  # those that have a label


# The layers and the models ------------------------------------------------------------------------


def slow_attention(query, key, value, bias, causal):
    """One place at a time, in float64."""
    out = torch.zeros(*query.shape[:3], value.size(3), dtype=torch.float64)
    for b, h, t in itertools.product(*map(range, query.shape[:3])):
        seen = t + 1 if causal else key.size(2)
        scores = key[b, h, :seen].double() @ query[b, h, t].double() / math.sqrt(query.size(3))
        chances = (scores + (bias[b, h, t, :seen] if bias is not None else 0)).exp()
        out[b, h, t] = chances @ value[b, h, :seen].double() / chances.sum()
    return out


@pytest.mark.parametrize("T, S, causal, with_bias", [
    (5, 5, False, False), (5, 5, True, False), (3, 7, False, True), (1, 6, False, True)])
def test_attention_equals_the_slow_loop(script, T, S, causal, with_bias, monkeypatch):
    """Written out, and by the fused kernel, which takes over for long sequences."""
    query, key, value = torch.randn(2, 3, T, 8), torch.randn(2, 3, S, 8), torch.randn(2, 3, S, 5)
    bias = torch.randn(2, 3, T, S) if with_bias else None
    expected = slow_attention(query, key, value, bias, causal)
    found = script.attention(query, key, value, bias=bias, causal=causal)
    assert (found - expected).abs().max() < 1e-5
    called, fused = [], F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: called.append(1) or fused(*a, **k))
    monkeypatch.setattr(script, "LONG", 1)  # now every sequence is long
    found = script.attention(query, key, value, bias=bias, causal=causal)
    assert (found - expected).abs().max() < 1e-5 and called


TINY = dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16)
T5_TINY = dict(vocab_size=60, n_layer=2, n_head=2, n_embd=16, n_buckets=8, max_distance=20)


@pytest.mark.parametrize("variant", [
    dict(), dict(pos="sinusoidal"), dict(pos="rotary"), dict(pos="none"), dict(norm="post"),
    dict(norm="none", residual=False, n_ff=0), dict(act="relu", bias=False, tie=False),
    dict(n_layer=0, tie=False, pos="none", norm="none"),
    dict(n_head=3, head_dim=6, value_dim=4, n_ff=20),
    dict(layers={"0": {"n_ff": 0}, "1": {"n_head": 4}}),
], ids=str)
def test_each_gpt_learns_with_all_its_weights_and_sees_no_future(variant):
    model = gpt.GPT(gpt.GPTConfig(**{**TINY, **variant})).double()
    idx, targets = torch.randint(50, (2, 2, 16))
    targets[0, 3:] = -100
    logits, loss = model(idx, targets)
    assert logits.shape == (2, 16, 50) and model(idx)[1] is None
    expected = [-logits[b, t].log_softmax(0)[targets[b, t]]
                for b in range(2) for t in range(16) if b or t < 3]
    assert abs(loss - sum(expected) / 19) < 1e-6
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    changed = idx.clone()
    changed[:, 9] = (changed[:, 9] + 1) % 50
    difference = (model(changed)[0] - logits).abs().amax(dim=(0, 2))
    assert difference[:9].max() == 0 and difference[9] > 0


@pytest.mark.parametrize("own", [dict(n_head=4), dict(n_ff=20), dict(n_ff=0)], ids=str)
def test_settings_of_single_blocks(own):
    """Given to each block, they make the model that has them everywhere."""
    everywhere, each = (gpt.GPT(gpt.GPTConfig(**TINY | settings)) for settings in (
        own, dict(layers={"0": own, "1": own})))
    each.load_state_dict(everywhere.state_dict())
    idx = torch.randint(50, (2, 16))
    assert torch.equal(everywhere(idx)[0], each(idx)[0])


@pytest.mark.parametrize("variant", [
    dict(), dict(pos="rotary"), dict(pos="sinusoidal"), dict(norm="pre"), dict(nsp=False),
    dict(n_ff=20, n_segments=3)], ids=str)
def test_each_bert_learns_with_all_its_weights_and_padding_changes_nothing(variant):
    sizes = dict(vocab_size=60, block_size=20, n_layer=2, n_head=2, n_embd=16)
    model = randomised(bert.BERT(bert.BERTConfig(**sizes | variant)))
    idx, labels = torch.randint(60, (2, 4, 20))
    segments = torch.randint(model.config.n_segments, (4, 20))
    segments.flatten()[: model.config.n_segments] = torch.arange(model.config.n_segments)
    lengths = [20, 7, 3, 13]
    mask = torch.arange(20) < torch.tensor(lengths)[:, None]
    labels[(torch.rand(4, 20) > 0.3) | ~mask] = -100
    labels[:, 1] = 7
    mlm_logits, nsp_logits = model(idx, segments, mask)
    hidden = model.encode(idx, segments, mask)
    assert mlm_logits.shape == (4, 20, 60) and hidden.shape == (4, 20, 16)
    assert nsp_logits.shape == (4, 2) if model.config.nsp else nsp_logits is None
    for row, length in enumerate(lengths):
        alone = model.encode(idx[row : row + 1, :length], segments[row : row + 1, :length])
        assert (hidden[row, :length] - alone[0]).abs().max() < 1e-12
    assert (hidden[1, :7] - model.encode(idx, segments)[1, :7]).abs().max() > 1e-6
    changed = idx.clone()
    changed[0, 9] = (changed[0, 9] + 1) % 60  # it sees both sides
    difference = (model(idx, segments)[0] - model(changed, segments)[0]).abs().amax(dim=2)
    assert difference[0].min() > 0 and difference[1:].max() == 0
    # The paper's loss: mean over hidden tokens + mean over pairs.
    at, pairs = labels != -100, torch.tensor([0, 1, 1, 0])
    expected = F.cross_entropy(mlm_logits[at], labels[at])
    expected += F.cross_entropy(nsp_logits, pairs) if model.config.nsp else 0
    loss = model.loss(idx, segments, mask, labels, pairs)
    assert abs(loss - expected) < 1e-6
    late = model.losses(idx, segments, labels, mask, pairs, weights=torch.tensor([2, 2, 0, 0]))[0]
    assert len(late) == 1 or abs(late[1] - F.cross_entropy(nsp_logits[:2], pairs[:2])) < 1e-6
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def scores_of(script, monkeypatch, run_model) -> torch.Tensor:
    """What the first attention is given to compare: queries times keys (B, nh, T, S)."""
    seen, attention = [], script.attention

    def spy(query, key, *arguments, **options):
        seen.append((query @ key.mT).detach() / math.sqrt(query.size(-1)))
        return attention(query, key, *arguments, **options)

    monkeypatch.setattr(script, "attention", spy)
    run_model()
    monkeypatch.undo()
    return seen[0]


@pytest.mark.parametrize("script", [gpt, bert], ids=lambda file: file.NAME)
def test_rotary_scores_depend_on_the_distance_alone(script, monkeypatch):
    model = randomised(script.Model(script.Config(**TINY, pos="rotary")))
    same = torch.full((1, 16), 7)  # one token everywhere
    scores = scores_of(script, monkeypatch, lambda: model(same))
    assert scores.shape == (1, 2, 16, 16)
    assert (scores[..., 1:, 1:] - scores[..., :-1, :-1]).abs().max() < 1e-5
    assert scores[..., 0, :].std(dim=-1).min() > 1e-3


def test_bert_s_first_heads_begin_by_looking_at_their_neighbours(monkeypatch):
    model = bert.BERT(bert.BERTConfig(1024, 128, 2, 6, 192)).eval()
    idx = torch.randint(1024, (8, 128))
    scores = scores_of(bert, monkeypatch, lambda: model(idx)).mean(dim=0)
    weights = scores.softmax(dim=-1)
    for head, distance in enumerate((-1, 1, -2, 2, -3, 3)):
        others = {d: float(scores[head].diagonal(d).mean()) for d in range(-5, 6) if d}
        assert max(others, key=others.get) == distance  # (a token is much like itself: 0 is high)
        near = sum(weights[head].diagonal(distance + i).sum() for i in range(-2, 3)) / 128
        assert near > 0.4  # an even view gives 0.04


def random_t5(**variant):
    return randomised(t5.T5(t5.T5Config(**{**T5_TINY, **variant})), std=0.4)


@pytest.mark.parametrize("variant", [
    dict(), dict(act="gated-gelu", tie=False), dict(n_decoder_layer=1), dict(n_decoder_layer=3),
    dict(head_dim=5, n_ff=20, scale_head=False)], ids=str)
def test_each_t5_learns_with_all_its_weights_and_padding_changes_nothing(variant, monkeypatch):
    model = random_t5(**variant)
    src, tgt = torch.randint(60, (4, 18)), torch.randint(60, (4, 7))
    tgt[1, 4:] = -100
    lengths = [18, 7, 1, 13]
    mask = torch.arange(18) < torch.tensor(lengths)[:, None]
    logits, loss = model(src, tgt, mask)
    asked = [(b, t) for b in range(4) for t in range(7) if b != 1 or t < 4]
    expected = -sum(logits[b, t].log_softmax(0)[tgt[b, t]] for b, t in asked) / len(asked)
    assert logits.shape == (4, 7, 60) and abs(loss - expected) < 1e-6
    for row, length in enumerate(lengths):
        alone, _ = model(src[row : row + 1, :length], tgt[row : row + 1])
        assert (logits[row] - alone[0]).abs().max() < 1e-12
    assert (logits[1] - model(src, tgt)[0][1]).abs().max() > 1e-6
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    for j in range(7):  # the decoder sees no future
        changed = tgt.clone()
        changed[0, j] = (changed[0, j] + 1) % 60
        difference = (model(src, changed, mask)[0] - logits).abs().amax(dim=2)[0]
        assert not difference[: j + 1].any() and (difference[j + 1 :] > 0).all()
    monkeypatch.setattr(t5, "LONG", 8)  # now the encoder computes 4 rows of its scores at a time
    model(src, tgt, mask)[1].backward()
    assert all((p.grad - x).abs().max() < 1e-12 for p, x in zip(model.parameters(), gradients))


# Generation ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [
    dict(), dict(pos="rotary"), dict(pos="none", norm="post"), dict(value_dim=6),
    dict(layers={"1": {"n_head": 4}})], ids=str)
def test_greedy_is_the_same_with_and_without_the_cache(variant):
    model = gpt.GPT(gpt.GPTConfig(**TINY, **variant)).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)  # so that the likeliest token is not always the same
    for T in 1, 16, 23:
        idx = torch.randint(50, (3, T))
        fast = model.generate(idx, 22, temperature=0)
        assert torch.equal(fast, model.generate(idx, 22, temperature=0, use_cache=False))
        assert fast.shape == (3, T + 22) and torch.equal(fast[:, :T], idx)
        for t in range(T, 17):  # while nothing slides, it is the argmax of the whole sequence
            assert torch.equal(fast[:, t], model(fast[:, :t])[0][:, -1].argmax(-1))


def test_a_row_that_has_ended_is_filled_up_and_when_all_have_generation_ends():
    model, idx = gpt.GPT(gpt.GPTConfig(**TINY)), torch.randint(50, (3, 4))
    written = model.generate(idx, 400, stop=7, top_p=1.0)[:, 4:].tolist()
    ends = [row.index(7) for row in written]
    assert max(ends) == len(written[0]) - 1 < 399 and len(set(ends)) > 1
    assert all(set(row[end:]) == {7} for row, end in zip(written, ends))


@pytest.mark.parametrize("script", [gpt, t5], ids=lambda file: file.NAME)
def test_sampling_frequencies(script):
    logits = torch.tensor([2.0, 1.0, 0.5, -1.0, -3.0])  # softmax: 0.61, 0.22, ...
    two = torch.tensor([2.0, 1.0, *[-math.inf] * 3]).softmax(-1)

    def frequencies(**options):
        drawn = script.sample(logits.expand(40_000, -1), **options)
        return torch.bincount(drawn, minlength=5) / 40_000

    for options, expected in (
        ({}, logits.softmax(-1)), (dict(temperature=0.5), (logits * 2).softmax(-1)),
        (dict(top_k=2), two), (dict(top_p=0.7), two), (dict(temperature=0), torch.eye(5)[0]),
        (dict(top_p=1e-9), torch.eye(5)[0]), (dict(top_k=9, top_p=1.0), logits.softmax(-1)),
    ):  # five standard deviations at most
        assert (frequencies(**options) - expected).abs().max() < 0.012, options


def test_t5_writes_what_is_likeliest_at_each_step():
    """With its caches, and for padded sources, as the whole model says for what is written so far;
    rows that have ended are filled up."""
    model = random_t5(vocab_size=12)
    src = torch.randint(2, 12, (8, 9))
    mask = torch.arange(9) < torch.tensor([9, 5, 1, 9, 3, 9, 7, 2])[:, None]
    written = model.generate(src, 25, src_mask=mask).tolist()
    assert any(1 in row[:-1] for row in written)
    for i, row in enumerate(written):
        for t in range(row.index(1) + 1 if 1 in row else len(row)):
            asked = torch.tensor([[*row[:t], 5]])  # (what is asked is not seen)
            logits, _ = model(src[i : i + 1, : mask[i].sum()], asked)
            assert logits[0, -1].argmax() == row[t]
        assert not any(row[t + 1 :])


def test_enough_beams_find_the_best_of_all_targets():
    """The one whose tokens have the highest log-probability in the mean."""
    every = [[*middle, 1] for n in range(4) for middle in itertools.product([0, 2, 3, 4], repeat=n)]
    every += [list(full) for full in itertools.product([0, 2, 3, 4], repeat=4)]
    tgt = torch.nn.utils.rnn.pad_sequence(
        list(map(torch.tensor, every)), batch_first=True, padding_value=-100)
    better = 0
    for _ in range(8):
        model, src = random_t5(vocab_size=5, tie=False), torch.randint(2, 5, (3, 9))
        greedy, many = model.generate(src, 4), model.generate(src, 4, beams=300)
        for row in range(3):
            logits = model(src[row].expand(len(every), -1), tgt)[0]
            losses = F.cross_entropy(logits.mT, tgt, reduction="none").sum(dim=1)  # (-100: 0)
            best = every[int((losses / (tgt != -100).sum(dim=1)).argmin())]
            found = many[row].tolist()
            assert found[: len(best)] == best and not any(found[len(best) :])
            better += greedy[row].tolist()[: len(best)] != best
    assert better > 3


# What is learned from: the three objectives -------------------------------------------------------
# Each document of these texts has letters of its own, in random order: so a piece of more than a
# few tells which document it is from, and where it stood. Every byte is a token.


def strange_text(script, kind="documents") -> tuple[str, list[list[str]]]:
    """The path of a text of such documents, or of a single one; the documents of both parts."""
    lengths, draw = (90, 200, 33, 700, 5, 1, 64, 300, 150, 80, 120, 260, 77), random.Random(0)
    letters = "".join(map(chr, range(34, 125)))
    documents = ["".join(draw.choices(letters[7 * i : 7 * i + 7], k=length))
                 for i, length in enumerate(lengths if kind == "documents" else [9000])]
    path = put("strange.txt", f"\n{END}\n".join(documents))
    corpus = data.prepare(path, 0, script.SPECIAL_TOKENS, script.SEPARATOR, byte_tokenizer(script))
    return path, documents_of(corpus, script.SEPARATOR)


@pytest.mark.parametrize("stride", [32, 16, 5])
def test_gpt_reads_each_window_once_an_epoch(stride):
    """A step's batch depends on (seed, step) alone; windows begin `stride` apart."""
    path, (documents, _) = strange_text(gpt)
    task, other, again = (opened(gpt.Pretraining(stride=stride), gpt, path, batch_size=8,
                                 seed=seed)[0] for seed in (0, 1, 0))
    tokens = byte_tokenizer(gpt).encode(END + END.join(documents) + END, allow_special=True)
    steps, begins = math.ceil(task.rows / 8), []
    assert abs(task.rows - len(tokens) / stride) <= 2 + 32 / stride
    for step in range(steps):
        batch = task.batch(step)
        assert torch.equal(batch["idx"][:, 1:], batch["targets"][:, :-1])
        for row in torch.cat((batch["idx"], batch["targets"][:, -1:]), dim=1).tolist():
            begins.append(next(i for i in range(len(tokens)) if tokens[i : i + 33] == row))
    assert len(set(begins)) == task.rows and begins != sorted(begins)
    assert {(begin - begins[0]) % stride for begin in begins} == {0}
    assert max(begins) - min(begins) == (task.rows - 1) * stride
    assert torch.equal(again.batch(steps - 1)["idx"], batch["idx"])
    assert not torch.equal(other.batch(steps - 1)["idx"], batch["idx"])


def taken_apart(row: list[int], labels: list[int], tok) -> tuple[str, str]:
    """A row's segments as text, with the hidden tokens back in place."""
    row = [token if label == -100 else label for token, label in zip(row, labels)]
    text = tok.decode(row).replace("[PAD]", "")
    assert text.startswith("[CLS]") and text.endswith("[SEP]") and "[MASK]" not in text
    a, _, b = text[5:-5].partition("[SEP]")
    assert not re.search(r"\[(PAD|CLS|SEP)\]", a + b)
    return a, b


@pytest.mark.parametrize("kind, most", [("documents", 0), ("stream", 0.35)])
def test_bert_s_pairs_and_masks_are_the_paper_s(kind, most):
    """[CLS] A [SEP] B [SEP], where B continues A or is from another document. 15 % of the tokens
    are asked for, or for a time more; of these 8 in 10 are masked, 1 is replaced, 1 as it was."""
    tok, (path, (documents, _)) = byte_tokenizer(bert), strange_text(bert, kind)
    task, _ = opened(bert.Pretraining(mask_most=most, nsp_late=0.25), bert, path, batch_size=8,
                     max_steps=140, config=tiny_config(bert, block_size=64))
    seen, lengths, a_lengths, shares, fate = set(), [], [], [], collections.Counter()
    special = torch.tensor(list(tok.special.values()))
    for step in range(140):
        batch = task.batch(step)
        idx, labels = batch["idx"], batch["mlm_labels"]
        (rows, T), mask = idx.shape, batch.get("mask", torch.ones_like(idx) == 1)
        assert rows <= 8 and batch["nsp_labels"].sum() <= (rows + 1) / 2 and T <= 64
        assert set(batch["weights"].tolist()) == {1.0 if step < 84 else 0.25}  # of the pairs
        lengths.append(T)
        hidden, masked = labels != -100, idx == tok.special["[MASK]"]
        assert hidden.any(dim=1).all() and not torch.isin(labels[hidden], special).any()
        assert not masked[~hidden].any() and not torch.isin(idx[hidden & ~masked], special).any()
        kinds = dict(hidden=hidden, masked=masked, kept=idx == labels)
        fate.update({kind: int(where.sum()) for kind, where in kinds.items()})
        shares.append(float(hidden.sum() / (mask.sum() - 3 * rows)))
        for b in range(rows):
            a, second = taken_apart(idx[b].tolist(), labels[b].tolist(), tok)
            real = len(a) + len(second) + 3
            assert mask[b].tolist() == [t < real for t in range(T)]
            assert batch["segments"][b].tolist() == [int(len(a) + 2 <= t < real) for t in range(T)]
            home = [document for document in documents if a in document]
            assert home and any(second in document for document in documents)
            if second and batch["nsp_labels"][b] == 0:
                assert any(a + second in document for document in home)
            elif second:
                fate["foreign"] += 1
                assert not any(a + second in document for document in home)
                assert kind == "stream" or not set(a) & set(second)
            seen |= set(a + second)
            a_lengths += [len(a)] * (T == 64)
    assert 5 <= sum(T < 64 for T in lengths) and fate["foreign"] > 400  # some are shorter
    assert seen == set("".join(documents)) and np.std(a_lengths) > 8
    assert min(a_lengths) < 14 and max(a_lengths) > 46
    quarters = np.reshape(shares, (4, -1)).mean(axis=1)  # (at least one token in a short row)
    assert np.allclose(quarters, (0.15, 0.317, 0.25, 0.183) if most else 0.15, atol=0.02)
    assert abs(fate["masked"] / fate["hidden"] - 0.8) < 0.02
    assert abs(fate["kept"] / fate["hidden"] - 0.1) < 0.015


def test_of_bert_s_pairs_b_alone_does_not_tell_which():
    """Neither its length nor where it stands in its document: for stories, and for sentences."""
    stories = first_stories(40)
    sentences = re.sub(rf"(?<=[.!?])\s+|{re.escape(END)}", END, stories)
    for source in put("stories.txt", stories), put("sentences.txt", sentences):
        task, _ = opened(bert.Pretraining(), bert, source, batch_size=32,
                         config=tiny_config(bert, block_size=128))
        documents = f"{END}{Path(source).read_text()}{END}"
        facts = {0: [], 1: []}
        for batch in (*map(task.batch, range(40)), *task.eval_batches(32)):
            for row, labels, foreign in zip(*(batch[x].tolist() for x in (
                    "idx", "mlm_labels", "nsp_labels"))):
                b = taken_apart(row, labels, byte_tokenizer(bert))[1]
                facts[foreign].append((len(b), b + END in documents, END + b in documents))
        true, foreign = (np.array(facts[label], float) for label in (0, 1))
        assert abs(len(true) - len(foreign)) < 0.05 * len(true)
        assert np.allclose(true.mean(axis=0), foreign.mean(axis=0), rtol=0.06, atol=0.03)


def put_back(src: list[int], tgt: list[int]) -> tuple[list[int], list[list[int]]]:
    """The text again, each sentinel of the source replaced by what follows it in the target; and
    the spans. Sentinels come in order, each once on both sides, and </s> ends both."""
    src = [token for token in src if token != 0]
    tgt = [token for token in tgt if token != -100]
    assert src.pop() == tgt.pop() == 1 and 1 not in src + tgt
    sentinels = [token for token in src if token in T5_SENTINELS]
    assert sentinels == list(T5_SENTINELS)[: len(sentinels)]
    assert [token for token in tgt if token in T5_SENTINELS] == sentinels
    spans = {}
    for token in tgt:
        if token in T5_SENTINELS:
            spans[token] = []
        else:
            spans[list(spans)[-1]].append(token)
    assert all(spans.values())
    return sum((spans.get(token, [token]) for token in src), []), list(spans.values())


@pytest.mark.parametrize("corruption", ["spans", "bernoulli"])
@pytest.mark.parametrize("T, density, mean_span", [(128, 0.15, 3), (11, 0.5, 1), (30, 0.3, 7)])
def test_t5_s_spans_put_back_give_the_text(corruption, T, density, mean_span):
    """With fixed numbers of tokens and spans, those of the paper's code; or each by itself."""
    path, (documents, _) = strange_text(t5)
    task, _ = opened(t5.Pretraining(block_size=T, noise_density=density, corruption=corruption,
                                    mean_span=mean_span), t5, path, batch_size=20)
    tok, text, hidden, total, seen = byte_tokenizer(t5), "".join(documents), 0, 0, set()
    for step in range(15):
        batch = task.batch(step)
        real = batch["src"] != 0
        assert torch.equal(batch.get("src_mask", torch.ones_like(real)), real)
        for src, tgt in zip(batch["src"].tolist(), batch["tgt"].tolist()):
            window, spans = put_back(src, tgt)
            assert len(window) == T and tok.decode(window) in text
            hidden, total = hidden + sum(map(len, spans)), total + T
            seen |= set(window)
            if corruption == "spans":
                assert src[0] == window[0]  # the text begins
                noise = min(max(round(T * density), 1), T - 1)
                assert sum(map(len, spans)) == noise
                assert len(spans) == min(max(round(noise / mean_span), 1), T - noise)
    assert abs(hidden / total - density) < (0.02 if T > 11 else 0.06)
    assert seen == set(tok.encode(text)) or T == 11


@pytest.mark.parametrize("script, settings, block_size", [
    (gpt, {}, 32), (gpt, {}, 500), (bert, {}, 32), (t5, dict(block_size=32), None),
    (t5, dict(block_size=32, corruption="bernoulli"), None)], ids=str)
def test_evaluation_asks_about_the_whole_validation_part(script, settings, block_size):
    """And always in the same way, however many rows are computed at once; be it less than a row."""
    path, (_, whole) = strange_text(script)
    config = tiny_config(script, **dict(block_size=block_size) if block_size else {})
    task, _ = opened(script.Pretraining(**settings), script, path, config=config)
    tok, found = byte_tokenizer(script), []
    for rows in 3, 32:
        texts, asked = [], []
        for batch in task.eval_batches(rows):
            columns = [batch[name].tolist() for name in (
                "idx", "targets", "mlm_labels", "src", "tgt") if name in batch]
            assert len(columns[0]) <= rows
            for left, right in zip(*columns):
                asked.append([token for token in right if token != -100])
                texts.append(tok.decode(asked[-1]) if script is gpt else
                             "".join(taken_apart(left, right, tok)) if script is bert else
                             tok.decode(put_back(left, right)[0]))
        found.append((texts, asked))
    assert found[0] == found[1]
    if script is gpt:  # every token but the first is asked for once
        assert "".join(texts) == END.join(whole) + END
    else:  # BERT: once with each kind of B
        assert set("".join(texts)) == set("".join(whole))
        assert sum(map(len, texts)) >= len("".join(whole)) * (1.5 if script is bert else 1)
        assert script is bert or all(len(x) == 32 and x in "".join(whole) for x in texts)


# Training -----------------------------------------------------------------------------------------


def test_muon_is_torch_s_and_adamw_too():
    run_ = data.Run(weight_decay=0.1, lr=0.01, matrix_lr=0.02)
    ours, theirs = (gpt.GPT(gpt.GPTConfig(**TINY)) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    apart, maps = {}, 3 * ours.config.n_head  # torch's Muon takes each head's three apart
    for name, p in theirs.named_parameters():
        if "blocks." in name and p.ndim == 2:
            parts = p.detach().clone().chunk(maps if "qkv" in name else 1)
            apart[name] = list(map(torch.nn.Parameter, parts))
    others = [p for name, p in theirs.named_parameters() if name not in apart]
    optimizers = [
        gpt.Muon(ours, run_, torch.bfloat16),
        torch.optim.Muon(sum(apart.values(), []), lr=0.02, weight_decay=0.1, momentum=0.9),
        torch.optim.AdamW([dict(params=[p for p in others if p.ndim == 2], weight_decay=0.1), dict(
            params=[p for p in others if p.ndim < 2], weight_decay=0)], lr=0.01, betas=(0.5, 0.99))]
    for _ in range(4):
        for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
            for i, part in enumerate(apart.get(name, [])):
                part.grad = p.grad.chunk(len(apart[name]))[i].clone()
        for optimizer in optimizers:
            optimizer.step()
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters()):
        expected = torch.cat(apart[name]) if name in apart else q
        assert (p - expected).abs().max() < (2e-3 if name in apart else 1e-6), name  # bfloat16


def test_schedules():
    run_ = data.Run(max_steps=100, warmup_steps=10)
    line = [gpt.schedule(step, run_) for step in range(100)]
    assert line == pytest.approx([*((i + 1) / 11 for i in range(10)), *(
        1 - i / 90 for i in range(90))])
    run_.schedule = "cosine"
    assert [gpt.schedule(step, run_) for step in (10, 55, 99)] == pytest.approx(
        [1, 0.5, 0], abs=1e-3)


def test_a_run_its_files_and_its_log(script, stories, capsys):
    run(script, "--data", stories, "--out_dir", "my run", "--max_steps", 10, "--snapshot_interval",
        5, *SMALL)
    shown = capsys.readouterr()
    assert shown.out == "" and "step 10/10" in shown.err
    files = set(os.listdir("my run"))
    snapshots = {file for file in files if re.fullmatch(r"ckpt_0*(5|10)\.pt", file)}
    assert len(snapshots) == 2 and files - snapshots == {
        "ckpt.pt", "best.pt", "tokenizer.json", "run.json", "log.jsonl", "loss.svg"}
    rows = log_of("my run")
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8, 10]
    assert [row["step"] for row in rows if "val_loss" in row] == [4, 8, 10]
    measures = dict(gpt="bits_per_byte", bert="mlm_accuracy nsp_accuracy", t5="span_accuracy")
    for row in rows:
        kind = measures[script.NAME] if "val_loss" in row else "loss lr tokens_per_second"
        assert {"step", "seconds", *kind.split()} <= row.keys()
    assert rows[-1].get("mlm_loss", rows[-1]["val_loss"]) < math.log(400)
    for name in ("ckpt.pt", "best.pt", *snapshots):
        state = state_of(Path("my run", name))
        assert state["step"] == int(re.sub(r"\D", "", name) or state["step"])
        assert all(value.dtype == torch.float32 for value in state["model"].values())
    drawing = ElementTree.parse("my run/loss.svg").getroot()
    assert len(drawing.findall(".//{*}polyline")) == 2  # training, validation
    assert f"{rows[-1]['val_loss']:.3f}" in " ".join(drawing.itertext())

    for command in re.findall(rf"python {script.NAME}\.py (.*)", shown.err):  # can be copied
        words = shlex.split(command)
        more = ["--max_new_tokens", 9] if words[0] == "generate" and script is not bert else []
        run(script, *words, *more)
    Path("my run").rename("run")
    run(script, "--config", "run/run.json", "--out_dir", "again")  # the same run
    assert_same_run("run", "again")
    before = {name: raw for name, raw in files_in("again").items() if name not in snapshots}
    run(script, "--init_from", "run/best.pt", "--data", stories, "--out_dir", "again", *SMALL,
        "--max_steps", 2)  # other weights, and the earlier run is set aside
    assert state_of("again/ckpt.pt")["step"] == 2
    assert before == files_in("again/before")


def test_eval_is_what_a_slow_loop_counts(script, trained, stories, capsys):
    """One row at a time; and what the run's log says of its best."""
    arguments = ["eval", "--out_dir", trained(script), "--dtype", "float32"]
    found = figures(script, capsys, *arguments)
    best = min((row for row in log_of(trained(script)) if "val_loss" in row),
               key=lambda row: row["val_loss"])
    assert best.keys() - {"seconds"} <= found.keys() and found["step"] == best["step"]
    assert found["val_loss"] == pytest.approx(best["val_loss"], rel=0.01)  # (was it bfloat16?)
    model = script.Model.from_pretrained(trained(script))
    tok = bpe.Tokenizer.load(trained(script) / "tokenizer.json")
    task = script.Pretraining(**dict(block_size=32) if script is t5 else {})
    task, _ = opened(task, script, stories, tok, model.config)
    asked = collections.defaultdict(list)
    with torch.no_grad():
        for batch in task.eval_batches(2):
            if script is gpt:
                asked["token"].append((model(batch["idx"])[0], batch["targets"]))
            elif script is bert:
                mlm, nsp = model(batch["idx"], batch["segments"], batch.get("mask"))
                asked["token"].append((mlm, batch["mlm_labels"]))
                asked["pair"].append((nsp, batch["nsp_labels"]))
            else:
                logits, targets = model(batch["src"], batch["tgt"])[0], batch["tgt"]
                asked["token"].append((logits, targets))
                asked["span"].append((logits, torch.where(targets < 102, -100, targets)))
    loss, right = {}, {}
    for name, pairs in asked.items():
        logits = torch.cat([logits.flatten(0, -2) for logits, _ in pairs])
        targets = torch.cat([targets.flatten() for _, targets in pairs])
        loss[name] = float(F.cross_entropy(logits, targets))  # (-100: ignored)
        right[name] = float((logits.argmax(dim=-1) == targets)[targets != -100].double().mean())
    expected = dict(perplexity=math.exp(loss["token"]),
                    val_loss=loss["token"] + loss.get("pair", 0.0))
    if script is gpt:
        bits = loss["token"] / math.log(2) * int((targets != -100).sum())
        spelled = tok.decode_bytes(targets[targets > 0].tolist())  # 0 is END
        expected |= dict(bits_per_byte=bits / len(spelled))
    else:
        expected |= dict(span_accuracy=right["span"]) if script is t5 else dict(
            mlm_accuracy=right["token"], nsp_accuracy=right["pair"])
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kind", ["train", "finetune"])
def test_after_ctrl_c_a_run_goes_on_as_if_nothing_had_been(script, kind, stories, trained, capsys,
                                                            monkeypatch):
    flags = ["--data", stories, *SMALL] if kind == "train" else [
        *finetuning(script, trained(script)), "--batch_size", 4]
    flags += ["--eval_interval", 5, "--log_interval", 3, "--max_steps", 10, "--weight_decay", 1]
    run(script, *flags, "--out_dir", "whole")
    task = script.Pretraining if kind == "train" else script.Finetuning

    def batch(self, step, draw=task.batch):
        if step == 6:
            os.kill(os.getpid(), signal.SIGINT)
        return draw(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(task, "batch", batch)
        run(script, *flags, "--out_dir", "stopped", status=130)
    assert state_of("stopped/ckpt.pt")["step"] in (6, 7)
    proposed = re.search(rf"python {script.NAME}\.py (.*resume.*)", capsys.readouterr().err)[1]
    run(script, *shlex.split(proposed))
    assert_same_run("whole", "stopped")


def test_killed_anywhere_it_goes_on_to_the_same_end(script, stories, monkeypatch):
    """SIGKILL at a random moment, while tokenizing, training, evaluating, saving: the same command,
    or `--init_from resume` once there is a checkpoint, ends as if nothing had happened."""
    flags = ["--data", stories, *SMALL, "--max_steps", 20, "--eval_interval", 7, "--log_interval",
             1, "--out_dir"]
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    began = time.monotonic()
    run(script, *flags, "whole")
    seconds, draw = time.monotonic() - began, random.Random(KILLS)
    for i in range(KILLS):
        for folder in "killed", "cache":
            shutil.rmtree(folder, ignore_errors=True)
        child = child_of(script, *flags, "killed", XDG_CACHE_HOME="cache")
        child.start()
        child.join(draw.uniform(0.5 if KILLS == 1 else 0.0, 1.1) * seconds)
        child.kill()
        child.join()
        resume = Path("killed/ckpt.pt").exists()
        run(script, *(["--init_from", "resume", "--out_dir"] if resume else flags), "killed")
        assert_same_run("whole", "killed")
        assert not list(Path("killed").glob("*.tmp"))


def start_ranks(script, *arguments) -> list:
    """Two processes that train one model, as torchrun starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = [child_of(script, *arguments, RANK=str(i), LOCAL_RANK=str(i), WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=port) for i in range(2)]
    for rank in ranks:
        rank.start()
    return ranks


@pytest.mark.parametrize("script, kind", [
    (gpt, "train"), (bert, "train"), (t5, "train"), (gpt, "finetune")],
    ids=["gpt", "bert", "t5", "finetune"])
def test_accumulation_and_two_ranks_give_the_losses_of_one_process(
        script, kind, stories, trained, beside):
    """Though masked tokens, padding and ratings are spread unevenly over ranks and parts."""
    flags = ["--data", stories, *SMALL, *EXACT] if kind == "train" else [
        *finetuning(script, trained(script)), *EXACT]
    flags += ["--corruption", "bernoulli"] if script is t5 else []
    size = 8 if kind == "train" else 7  # (of seven, an odd number, parts would be of six)
    ranks = [] if (script, kind) == (gpt, "train") else start_ranks(
        script, *flags, "--batch_size", size, "--out_dir", "ranks")
    run(script, *flags, "--batch_size", size, "--out_dir", "one")
    run(script, *flags, "--batch_size", size // 2, "--grad_accum", 2, "--out_dir", "parts")
    for rank in ranks:
        rank.join(100)
    assert not any(rank.exitcode for rank in ranks), Path("child0.err").read_text()
    folders = "one", "parts", "ranks" if ranks else beside("torchrun")
    one, parts, ranks = ([{key: row[key] for key in ("step", "loss", "val_loss") if key in row}
                          for row in log_of(folder)] for folder in folders)
    assert len(one) == len(ranks) > 5
    for i, row in enumerate(one):
        assert ranks[i] == pytest.approx(row, rel=1e-5)
        assert kind == "finetune" or parts[i] == pytest.approx(row, rel=1e-5)


def test_ctrl_c_that_reaches_one_rank_stops_both(stories):
    ranks = start_ranks(gpt, "--data", stories, *SMALL, "--max_steps", 100_000, "--out_dir", "run")
    for _ in range(600):
        if Path("run/log.jsonl").exists() and len(Path("run/log.jsonl").read_text()) > 500:
            break
        time.sleep(0.05)
    os.kill(ranks[1].pid, signal.SIGINT)
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [130, 130], Path("child0.err").read_text()
    assert state_of("run/ckpt.pt")["step"] > 0

def test_dropout_zeroes_a_share_and_keeps_the_mean(script):
    """The share is p to 1/256, independent from place to place, the same for the same seed."""
    x = torch.full((1000, 999), 3.0, requires_grad=True)
    for p, share in (0.1, 26 / 256), (0.5, 0.5), (0.0, 0.0), (1.0, 1.0):
        y, again = (script.drop(x, p) for _ in map(torch.manual_seed, (1, 1)))
        zero = (y == 0).float().flatten()
        for shift in 0, 1, 8, 999:  # itself, its neighbour, the next random number, the next row
            both = (zero[shift:] * zero[: len(zero) - shift]).mean().item()
            assert both == pytest.approx(share ** (2 if shift else 1), abs=0.002)
        assert p == 1 or y.mean().item() == pytest.approx(3, rel=0.005)
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0] * 3, y) and torch.equal(y, again)


def test_float16_on_a_cpu(script, stories):
    """Much the same losses and weights as in float32; where a gradient overflows, these stay."""
    for dtype in "float16", "float32":
        run(script, "--data", stories, "--out_dir", dtype, "--max_steps", 8, *SMALL, "--dropout", 0,
            "--dtype", dtype, "--lr", 0.003, "--eval_interval", 8, *(
                ["--nsp", "false"] if script is bert else []))
    run(script, "generate", "--out_dir", "float16", "--dtype", "float16", "--prompt",
        PROMPTS[script.NAME], *([] if script is bert else ["--max_new_tokens", 9]))
    state = state_of("float16/ckpt.pt")
    assert math.log2(state["scaler"]["scale"]) in range(10, 17)
    assert all(value.dtype == torch.float32 for value in state["model"].values())
    for half, full in zip(log_of("float16"), log_of("float32")):
        name = "loss" if "loss" in full else "val_loss"
        assert half[name] == pytest.approx(full[name], rel=0.04)  # (a step may have overflowed)
    state["scaler"]["scale"] = 2.0**40  # with such large gradients, the next step is left out
    torch.save(state, "float16/ckpt.pt")
    run(script, "--init_from", "resume", "--out_dir", "float16", "--max_steps", 9)
    after = state_of("float16/ckpt.pt")
    assert after["step"] == 9 and after["scaler"]["scale"] == 2.0**39
    torch.testing.assert_close(after["model"], state["model"], rtol=0, atol=0)


def test_numbers_beyond_float16_s_range_do_not_end_a_t5():
    """As those of the published ones: 65,504 is the largest number in float16."""
    model = randomised(t5.T5(tiny_config(t5))).float()
    for block in (*model.encoder.blocks, *model.decoder.blocks):
        block.mlp.down.weight.data *= 1e5
    src, tgt = torch.randint(2, 256, (2, 3, 9))
    with torch.autocast("cpu", torch.float16):
        half = model(src, tgt)[0].float()
    assert (half - model(src, tgt)[0]).abs().max() < 0.05 * half.abs().max()
    assert len(model.half().generate(src, 5)) == 3


def test_a_resumed_run_follows_the_flags_and_may_diverge(script, trained, capsys):
    """Then it says so, and the last good checkpoint stays. On another text a new best begins."""
    shutil.copytree(trained(script), "run")
    resume = ["--init_from", "resume", "--out_dir", "run"]
    run(script, *resume)  # nothing is left to do
    put("faster.json", '{"max_steps": 12}')
    run(script, *resume, "--config", "faster.json", "--lr", 0.5)
    settings = json.loads(Path("run/run.json").read_text())
    assert settings["lr"] == 0.5 and settings["max_steps"] == 12
    rows = [row for row in log_of("run") if "lr" in row]
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert rows[4]["lr"] > 0.1 > rows[3]["lr"]
    before = files_in("run")
    line = mistake(script, capsys, *resume, "--max_steps", 30, "--lr", 1e30, "--eval_interval", 30)
    assert re.search("loss.*--lr", line)
    assert all(files_in("run")[name] == before[name] for name in ("ckpt.pt", "best.pt"))
    other = put("other.txt", f"{'?! ' * 800}{INPUT[9000:12000]}")
    run(script, *resume, "--data", other, "--max_steps", 13)
    assert "new best" in capsys.readouterr().err and state_of("run/best.pt")["step"] == 13


def test_what_is_compiled(script, stories, trained, monkeypatch):
    """Forward pass and loss of training, and no more: fine-tuning as well, but no evaluation."""
    called = collections.Counter()

    def compiled(function):
        def call(model, batch):
            called[model.training] += 1
            return function(model, batch)
        return call

    monkeypatch.setattr(torch, "compile", compiled)
    pretrain = ["--data", stories, "--out_dir", "a", *SMALL, "--max_steps", 1]
    run(script, *pretrain)
    assert not called
    run(script, *pretrain, "--compile", "true")
    run(script, *finetuning(script, "a"), "--max_steps", 2, "--out_dir", "b", "--compile", "true")
    assert called == {True: 3}


def test_it_learns(script, beside, capsys):
    """Two layers get well below what the frequencies of the tokens alone give."""
    folder = beside(script.NAME)
    tok = bpe.Tokenizer.load(folder / "tokenizer.json")
    source = str(folder / "stories.txt")
    corpus = data.prepare(source, 0, script.SPECIAL_TOKENS, script.SEPARATOR, tok)
    share = np.bincount(corpus.train, minlength=400) + 0.1
    unigram = -np.log(share / share.sum())[corpus.validation[1:]].mean()
    perplexity = figures(script, capsys, "eval", "--out_dir", folder)["perplexity"]
    assert math.log(perplexity) < 0.8 * unigram


# Fine-tuning --------------------------------------------------------------------------------------

EXAMPLES = {  # for each script, a table whose answer shows in the source
    "gpt": ("prompt,response,rating", "say {0},{0} {0},4"),
    "bert": ("text,label", "a {0} here,{0}"), "t5": ("source,target", "a {0} here,{0}"),
}


def finetuning(script, source, n=40) -> list:
    """The command that fine-tunes a model with n such examples. (T5 is to write little.)"""
    header, row = EXAMPLES[script.NAME]
    rows = [row.format(("cat", "dog")[i % 2]) for i in range(n)]
    return ["finetune", "--init_from", source, "--data", put("examples.csv", "\n".join(
        [header, *rows])), "--device", "cpu", *(["--target_length", 6] if script is t5 else [])]


def test_fine_tuning_learns_to_answer_and_eval_compares_the_answers(script, trained, capsys):
    run(script, *finetuning(script, trained(script), 60), "--out_dir", "a", "--batch_size", 16,
        "--epochs", 15, "--lr", 0.01, "--matrix_lr", 0.05, "--eval_interval", 30, "--dropout", 0,
        *(["--mask_prob", 0] if script is bert else []))
    assert re.search(r"\b54\b.* 6\b", capsys.readouterr().err)  # examples; held out
    measures = dict(gpt=set(), bert={"accuracy", "macro_f1"},
                    t5={"exact_match", "token_f1", "rouge_l"})[script.NAME]
    rows = [row for row in log_of("a") if "val_loss" in row]
    assert [row["step"] for row in rows] == [30, 60] and measures <= rows[0].keys()
    found = figures(script, capsys, "eval", "--out_dir", "a")
    assert {"step", "val_loss"} | measures <= found.keys()
    assert found["step"] == min(rows, key=lambda row: row["val_loss"])["step"]
    for word in "cat", "dog":
        prompt = EXAMPLES[script.NAME][1].format(word).split(",")[0]
        shown = printed(script, capsys, "generate", "--out_dir", "a", "--prompt", prompt, *(
            () if script is bert else ("--temperature", 0)))
        assert shown.split()[0] == word and shown.endswith("\n")
    if script is bert:  # the labels with their probabilities, the likeliest first
        shares = [float(line.split()[1]) for line in shown.splitlines()]
        assert len(shares) == 2 and shares[0] >= 50 >= shares[1]
    # Another table is evaluated whole; some of its truths are not what the model says.
    truths = dict(gpt=["cat,5"], bert=["cat", "dog", "cat", "cat", "dog"],
                  t5=["cat", "dog", "the cat", "A cat", '"cat, dog"'])[script.NAME]
    prompt = EXAMPLES[script.NAME][1].format("cat").split(",")[0]
    other = put("other.csv", "\n".join([EXAMPLES[script.NAME][0], *(
        f"{prompt},{truth}" for truth in truths)]))
    found = figures(script, capsys, "eval", "--out_dir", "a", "--data", other)
    if script is bert:  # "cat" is right in 3 of 5, and dog never said
        assert (found["accuracy"], found["macro_f1"]) == pytest.approx((0.6, (2 * 3 / 8 + 0) / 2))
    elif script is t5:  # one by one; F1 leaves out articles, ROUGE counts all words
        assert found["exact_match"] == pytest.approx((1 + 0 + 0 + 0 + 0) / 5)
        assert found["token_f1"] == pytest.approx((1 + 0 + 1 + 1 + 2 / 3) / 5)
        assert found["rouge_l"] == pytest.approx((1 + 0 + 2 / 3 + 2 / 3 + 2 / 3) / 5)


def test_what_is_frozen_stays_and_without_progress_it_stops(script, trained):
    common = [*finetuning(script, trained(script)), "--eval_interval", 2, "--out_dir"]
    run(script, *common, "a", "--freeze", 1, "--max_steps", 2)
    before, after = (state_of(path)["model"] for path in (trained(script) / "best.pt", "a/ckpt.pt"))
    frozen = re.compile(r"((en|de)coder\.)?(blocks\.0\.|\w+_embedding)")
    same = {name: torch.equal(before[name], after[name]) for name in before if name in after}
    assert all(same[name] for name in same if frozen.match(name))
    assert sum(bool(frozen.match(name)) for name in same) > 8
    assert not any(same[name] for name in same if "blocks.1." in name and "weight" in name)
    run(script, *common, "c", "--max_steps", 2)  # without --freeze
    after = state_of("c/ckpt.pt")["model"]
    assert not any(torch.equal(before[name], after[name]) for name in same if frozen.match(name))
    run(script, *common, "b", "--lr", 0, "--matrix_lr", 0, "--patience", 2)
    assert [row["step"] for row in log_of("b") if "val_loss" in row] == [2, 4, 6]
    run(script, *common, "s", "--scratch", "true", "--lr", 0, "--matrix_lr", 0, "--max_steps", 1)
    after = state_of("s/ckpt.pt")["model"]
    matrices = [name for name in same if before[name].ndim == 2]
    assert sum(torch.equal(before[name], after[name]) for name in matrices) < len(matrices) / 2


def plain(script, **options):
    """A fine-tuning task that shows all tokens: none is masked or left out by chance."""
    names = script.Finetuning.__dataclass_fields__.keys() & {"mask_prob", "drop_prob"}
    return script.Finetuning(**dict.fromkeys(names, 0.0) | options)


def one_batch(script, task, header, *rows, config=None):
    """The task of all these rows, the batch that has them all, and the text of each."""
    Path("two").mkdir(exist_ok=True)
    for part in "train", "validation":
        put(f"two/{part}.csv", "\n".join([header, *rows]))
    task, _ = opened(task, script, "two", config=config, batch_size=len(rows))
    batch = {name: tensor.double() if tensor.is_floating_point() else tensor
             for name, tensor in task.batch(0).items()}
    idx = batch["src" if script is t5 else "idx"].tolist()
    return task, batch, list(map(byte_tokenizer(script).decode, idx))


def test_gpt_learns_from_the_response_alone_and_by_its_rating():
    tok, config = byte_tokenizer(gpt), tiny_config(gpt, block_size=24)
    model, header = randomised(gpt.GPT(config)), "prompt,response,rating"
    task, batch, _ = one_batch(gpt, gpt.Finetuning(), header[:15], "abc,de", config=config)
    assert batch["idx"].tolist() == [tok.encode(f"{END}abc\nde", allow_special=True)]
    answer = tok.encode(f"de{END}", allow_special=True)
    assert batch["targets"].tolist() == [[-100] * 4 + answer]
    chances = model(batch["idx"])[0][0].log_softmax(dim=-1)  # the loss, written down
    expected = -sum(chances[4 + i, token] for i, token in enumerate(answer)) / 3
    assert abs(task.loss(model, batch)[0] - expected) < 1e-6
    # Five times the rating is five times the row.
    gradients = []
    for rows in ["abc,de,5", "a,xyz,1"], ["abc,de,1"] * 5 + ["a,xyz,1"], ["abc,de,1", "a,xyz,1"]:
        task, batch, _ = one_batch(gpt, gpt.Finetuning(), header, *rows, config=config)
        found = torch.autograd.grad(task.loss(model, batch)[0], list(model.parameters()))
        gradients.append(torch.cat([gradient.flatten() for gradient in found]))
    rated, repeated, equal = gradients
    assert (rated - repeated).abs().max() < 1e-7 and (rated - equal).abs().max() > 1e-4
    assert one_batch(gpt, gpt.Finetuning(min_rating=2.5), header, "a,b,2", "c,d,3", "e,f,5",
                     config=config)[0].rows == 2
    # Too long: the prompt's end, and as much of the response as fits beside half of the context.
    _, batch, texts = one_batch(gpt, gpt.Finetuning(), header[:15], f"{'p' * 40},{'r' * 40}",
                                config=config)
    assert batch["idx"].shape == (1, 24) and re.fullmatch(rf"({re.escape(END)})?p+\nr+", texts[0])
    assert 8 <= texts[0].count("r") <= 13


def test_bert_labels_a_padded_text_as_the_text_alone():
    config = tiny_config(bert, block_size=24)
    task, batch, texts = one_batch(bert, plain(bert), "text,label", "some words,a", "x,c", "one,b",
                                   config=config)
    assert sorted(text.replace("[PAD]", "") for text in texts) == [
        "[CLS]one[SEP]", "[CLS]some words[SEP]", "[CLS]x[SEP]"]
    model = randomised(bert.BERT(dataclasses.replace(config, n_labels=3)))
    scores = model.classify(batch["idx"], batch["segments"], batch["mask"])
    losses = []
    for row, length in enumerate(batch["mask"].sum(dim=1)):
        alone = model.classify(batch["idx"][row : row + 1, :length])
        assert (scores[row] - alone).abs().max() < 1e-12
        label = {"one": 1, "som": 0, "x[S": 2}[texts[row][5:8]]
        losses.append(-alone.log_softmax(dim=-1)[0, label].item())
    assert task.loss(model, batch)[0].item() == pytest.approx(sum(losses) / 3)
    task, batch, texts = one_batch(
        bert, plain(bert), "text,text_b,label", "one,other,x", "a,b,y",
        f"{'p' * 30},{'q' * 5},x", f"{'p' * 30},{'q' * 30},y", config=config)
    found = {text.replace("[PAD]", ""): row.tolist() for text, row in zip(texts, batch["segments"])}
    assert "[CLS]one[SEP]other[SEP]" in found and "[CLS]a[SEP]b[SEP]" in found
    assert found["[CLS]one[SEP]other[SEP]"] == [0] * 5 + [1] * 6 + [0] * (batch["idx"].size(1) - 11)
    crops = sorted((text.count("p"), text.count("q")) for text in found if "p" in text)
    assert crops in ([(10, 11), (16, 5)], [(11, 10), (16, 5)])  # the longer one gives way


def test_t5_s_padded_sources_and_targets_change_nothing():
    task = plain(t5, task_prefix="do: ", source_length=12, target_length=6)
    rows = ["abc,de", "abcdefghij,x", "z,uvwxyz"]
    task, batch, texts = one_batch(t5, task, "source,target", *rows)
    assert sorted(text.replace("<pad>", "") for text in texts) == [
        "do: abc</s>", "do: abcdefg</s>", "do: z</s>"]
    targets = [[token for token in row if token != -100] for row in batch["tgt"].tolist()]
    assert sorted(map(byte_tokenizer(t5).decode, targets)) == ["de</s>", "uvwxy</s>", "x</s>"]
    model = randomised(t5.T5(tiny_config(t5)))
    sums = 0.0
    for src, tgt, mask in zip(batch["src"], batch["tgt"], batch["src_mask"]):
        src, tgt = src[None, mask], tgt[None, tgt != -100]
        sums += model(src, tgt)[1].item() * tgt.numel()
    assert task.loss(model, batch)[0].item() == pytest.approx(sums / (3 + 2 + 6), rel=1e-6)


@pytest.mark.parametrize("name, content", [
    ("a.csv", b'\xef\xbb\xbftext,label,more\r\n"Say ""hi"", now",b,5\r\n\r\n"two\r\nlines", 10 ,1'),
    ("a.jsonl", '{"label": "b", "text": "Say \\"hi\\", now"}\n\n'
                '{"text": "two\\r\\nlines", "label": 10}'),
    ("A.CSV", 'text,label,,\n"Say ""hi"", now", "b",,\n"two\r\nlines",10.0,,\n,,,\n'),
], ids=["csv", "jsonl", "spreadsheet"])
def test_tables_as_people_save_them(name, content):
    """Byte order marks, quotes, line breaks and blanks in cells, empty lines, more columns."""
    Path("two").mkdir()
    for part in "train", "validation":
        put(f"two/{part}{Path(name).suffix}", content)
    task, config = opened(plain(bert), bert, "two", batch_size=2)
    texts = [byte_tokenizer(bert).decode(row).replace("[PAD]", "")
             for row in task.batch(0)["idx"].tolist()]
    assert config.n_labels == 2 and sorted(task.labels) == ["10", "b"]
    assert sorted(text.replace("\r", "") for text in texts) == [
        '[CLS]Say "hi", now[SEP]', "[CLS]two\nlines[SEP]"]


# Published weights --------------------------------------------------------------------------------


PUBLISHED = [  # classes of transformers, and sizes
    ("GPT2LMHeadModel", dict(n_embd=16, n_head=1, n_inner=40, activation_function="relu")),
    ("GPT2LMHeadModel", dict(n_embd=16, n_head=4, tie_word_embeddings=False)),
    ("BertForPreTraining", dict(hidden_size=24, num_attention_heads=3, intermediate_size=40)),
    ("BertForPreTraining", dict(hidden_size=16, num_attention_heads=1, type_vocab_size=3)),
    ("BertForMaskedLM", dict(hidden_size=16, num_attention_heads=2, intermediate_size=30)),
    ("BertForSequenceClassification", dict(hidden_size=16, num_attention_heads=2, num_labels=3)),
    ("T5ForConditionalGeneration", dict(d_model=24, d_kv=5, d_ff=40, num_heads=3, num_layers=2,
                                        num_decoder_layers=3)),
    ("T5ForConditionalGeneration", dict(
        d_model=16, d_kv=8, d_ff=40, num_heads=2, num_layers=3, num_decoder_layers=1,
        feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
    ("T5ForConditionalGeneration", dict(
        d_model=16, d_kv=4, d_ff=30, num_heads=4, num_layers=2, relative_attention_num_buckets=8,
        relative_attention_max_distance=20)),
]


def published_model(name: str, settings: dict):
    """A model of transformers with random weights, in float64, and our file for it."""
    transformers = pytest.importorskip("transformers")
    cls, script = getattr(transformers, name), {"G": gpt, "B": bert, "T": t5}[name[0]]
    settings = settings | dict(vocab_size=60) | {
        gpt: dict(n_positions=20, n_layer=2, bos_token_id=0, eos_token_id=0),
        bert: dict(max_position_embeddings=20, num_hidden_layers=2),
        t5: dict(decoder_start_token_id=0)}[script]
    model = cls(cls.config_class(**settings)).double().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)
    return model, script


def outputs(script, ours, theirs) -> list[tuple]:
    """Pairs of what the two say about the same input, with padding."""
    T = 40 if script is t5 else 18  # T5: beyond its max_distance
    idx, tgt = torch.randint(2, 60, (3, T)), torch.randint(2, 60, (3, 30))
    mask, segments = torch.arange(T) < torch.tensor([[T], [5], [11]]), torch.randint(2, (3, T))
    tgt[1, 12:] = -100
    with torch.no_grad():
        if script is gpt:
            return [(ours(idx)[0], theirs(idx).logits)]
        if script is t5:
            found = theirs(input_ids=idx, attention_mask=mask.long(), labels=tgt)
            return list(zip(ours(idx, tgt, mask), (found.logits, found.loss)))
        found = theirs(input_ids=idx, attention_mask=mask.long(), token_type_ids=segments)
        if ours.config.n_labels:
            return [(ours.classify(idx, segments, mask), found.logits)]
        mlm, nsp = ours(idx, segments, mask)
        if nsp is None:
            return [(mlm[mask], found.logits[mask])]
        return [(mlm[mask], found.prediction_logits[mask]), (nsp, found.seq_relationship_logits)]


@pytest.mark.parametrize("name, settings", PUBLISHED, ids=str)
def test_published_weights_give_the_published_numbers_and_go_back(name, settings):
    """Opened from a folder of transformers; written, and opened by transformers again."""
    theirs, script = published_model(name, settings)
    theirs.save_pretrained("theirs")
    ours = script.Model.from_pretrained("theirs")
    assert not ours.training and next(ours.parameters()).dtype == torch.float32
    exact = theirs.float().double()  # as the float32 that we read
    for left, right in outputs(script, ours.double(), exact):
        assert (left - right).abs().max() < 1e-6
    ours.float().save_pretrained("ours")
    again, problems = type(theirs).from_pretrained("ours", output_loading_info=True)
    assert not problems["missing_keys"] and not problems["mismatched_keys"]
    for left, right in outputs(script, ours.double(), again.double().eval()):
        assert (left - right).abs().max() < 1e-6
    idx = torch.randint(2, 60, (2, 6))
    if script is gpt:
        written = theirs.generate(idx, attention_mask=torch.ones_like(idx), do_sample=False,
                                  max_new_tokens=10, eos_token_id=None, pad_token_id=0)
        assert torch.equal(ours.generate(idx, 10, temperature=0), written)
    for beams in (1, 3) if script is t5 and "num_decoder_layers" not in settings else ():
        written = theirs.generate(idx, max_new_tokens=12, num_beams=beams, do_sample=False)
        found, width = ours.generate(idx, 12, beams=beams), written.size(1) - 1
        assert torch.equal(found[:, :width], written[:, 1:]) and not found[:, width:].any()


def write_safetensors(path, tensors: dict[str, torch.Tensor]) -> None:
    """The format by hand: the header's length, the header, the numbers; all in float32."""
    header, numbers = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.detach().float().contiguous().numpy().tobytes()
        header[name] = dict(dtype="F32", shape=list(tensor.shape),
                            data_offsets=[len(numbers), len(numbers) + len(raw)])
        numbers += raw
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + numbers)


def read_safetensors(path) -> dict[str, torch.Tensor]:
    content = bytearray(Path(path).read_bytes())
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    return {name: torch.frombuffer(content, dtype=torch.float32, count=math.prod(entry["shape"]),
                                   offset=begin + entry["data_offsets"][0]).view(entry["shape"])
            for name, entry in json.loads(content[8:begin]).items() if name != "__metadata__"}


def old_layout(script, weights: dict) -> dict:
    """As files on the hub have them, written years ago: other names, copies, what is no weight."""
    if script is gpt:
        weights = {name.removeprefix("transformer."): weight for name, weight in weights.items()
                   if name != "lm_head.weight"}
        return weights | {"h.0.attn.bias": torch.ones(1, 1, 32, 32).tril()}
    if script is bert:
        older = {name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta"): weight
                 for name, weight in weights.items() if "predictions.decoder" not in name}
        return older | {"bert.embeddings.position_ids": torch.arange(32)[None]}
    stray = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    return weights | {stray: torch.randn(32, 2)} | {
        f"{side}.embed_tokens.weight": weights["shared.weight"] for side in ("encoder", "decoder")}


@pytest.mark.parametrize("layout", ["old", "old, pickled", "shards", "bfloat16"])
def test_weight_files_in_all_layouts(script, layout, exported):
    """Names of years ago, several files, pickles, narrower numbers."""
    shutil.copytree(exported(script), "folder")
    file = Path("folder/model.safetensors")
    weights = read_safetensors(file)
    file.unlink()
    if layout == "old, pickled":
        torch.save(old_layout(script, weights), "folder/pytorch_model.bin")
    elif layout == "old":
        write_safetensors(file, old_layout(script, weights))
    elif layout == "bfloat16":
        library = pytest.importorskip("safetensors.torch")
        library.save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, file)
    else:
        index = {}
        for i in 0, 1:
            part, name = dict(list(weights.items())[i::2]), f"model-{i}-of-2.safetensors"
            write_safetensors(f"folder/{name}", part)
            index |= dict.fromkeys(part, name)
        Path(f"{file}.index.json").write_text(json.dumps({"weight_map": index}))
    found = script.Model.from_pretrained("folder").state_dict()
    for name, tensor in script.Model.from_pretrained(exported(script)).state_dict().items():
        tensor = tensor.bfloat16().float() if layout == "bfloat16" else tensor
        assert torch.equal(found[name], tensor), name


def test_a_t5_s_head_is_what_the_file_says():
    """A head in the file is taken. Where config.json promises one and the file has none, it is tied
    and not scaled, as transformers 5 has it."""
    src, tgt = torch.randint(2, 60, (2, 1, 9))
    model = t5.T5(t5.T5Config(**T5_TINY))
    model.save_pretrained("folder")
    config = json.loads(Path("folder/config.json").read_text()) | {"tie_word_embeddings": False}
    Path("folder/config.json").write_text(json.dumps(config))
    found = t5.T5.from_pretrained("folder")(src, tgt)[0]
    assert torch.allclose(found, model.eval()(src, tgt)[0] * 16**0.5, atol=1e-4)
    weights = read_safetensors("folder/model.safetensors")
    write_safetensors("folder/model.safetensors", weights | {"lm_head.weight": torch.ones(60, 16)})
    assert t5.T5.from_pretrained("folder")(src, tgt)[0].std(dim=-1).max() < 1e-5


def test_generate_writes_the_text_and_nothing_else(script, trained, capsys):
    prompt = ["generate", "--out_dir", trained(script), "--prompt", PROMPTS[script.NAME]]
    flags = ["--max_new_tokens", 9] if script is not bert else ["--top_k", 3]
    shown = printed(script, capsys, *prompt, *flags)
    assert printed(script, capsys, *prompt, *flags) == shown  # the same seed, the same text
    last = shown.splitlines()[-1] if script is not gpt else shown
    assert last.startswith("The") and " — sea" in last and shown.endswith("\n")
    assert "[MASK]" not in last and "step" not in shown
    if script is not bert:
        more = ["--num_samples", 3, "--temperature", 0.9, "--top_k", 9, "--top_p", 0.9]
        assert len(re.findall(r"^The", printed(script, capsys, *prompt, *flags, *more), re.M)) >= 3
    if script is gpt:
        assert printed(script, capsys, *prompt, *flags, "--seed", 7, "--temperature", 2) != shown


def test_an_exported_run_is_opened_by_us_and_by_transformers(script, trained, exported, stories,
                                                              capsys):
    assert set(os.listdir(exported(script))) == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    best = state_of(trained(script) / "best.pt")["model"]
    for name in exported(script), trained(script), trained(script) / "best.pt":
        model = script.Model.from_pretrained(name)
        assert not model.training
        assert all(tensor.equal(best[name]) for name, tensor in model.state_dict().items())
    if script is not t5:  # (the length of its windows is not the model's, and not exported)
        left, right = (figures(script, capsys, "eval", *source, "--data", stories) for source in (
            ["--out_dir", trained(script)], ["--init_from", exported(script)]))
        assert left | {"step": 0} == pytest.approx(right | {"step": 0})
    generate = ["generate", "--prompt", PROMPTS[script.NAME]]
    generate += [] if script is bert else ["--max_new_tokens", 5, "--temperature", 0]
    assert printed(script, capsys, *generate, "--init_from", exported(script)) == printed(
        script, capsys, *generate, "--out_dir", trained(script))

    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(exported(script))
    ours = bpe.Tokenizer.load(exported(script) / "tokenizer.json")
    text = "The old man, by the sea — naïve?"
    ids = ours.encode(text)
    assert theirs(text, add_special_tokens=False).input_ids == ids
    begin, middle, end = (ours.special.get(name) for name in ("[CLS]", "[SEP]", "</s>"))
    assert theirs(text).input_ids == dict(
        gpt=ids, bert=[begin, *ids, middle], t5=[*ids, end])[script.NAME]
    prompt = PROMPTS[script.NAME]
    task, _ = opened(script.Pretraining(), script, stories, ours, script.Model.from_pretrained(
        exported(script)).config)
    if script is not gpt:  # a gap takes the space before it
        assert theirs(prompt).input_ids == task.prompt_ids(prompt)
    if script is not t5:  # (it can read texts of any length)
        assert len(theirs(text * 20, truncation=True).input_ids) <= 32
    if script is bert:
        both = theirs(text, "So.")
        assert both.token_type_ids == [0] * (len(ids) + 2) + [1] * (len(ours.encode("So.")) + 1)
    kind = dict(gpt=transformers.AutoModelForCausalLM, bert=transformers.BertForPreTraining,
                t5=transformers.T5ForConditionalGeneration)[script.NAME]
    for left, right in outputs(script, *(cls.from_pretrained(exported(script)).double().eval()
                                         for cls in (script.Model, kind))):
        assert (left - right).abs().max() < 1e-6


def test_an_exported_fine_tuning_answers_as_the_run_does(script, trained, capsys):
    run(script, *finetuning(script, trained(script)), "--out_dir", "a", "--max_steps", 2,
        *(["--task_prefix", "ask: "] if script is t5 else []))
    run(script, "export", "--out_dir", "a", "--to", "folder")
    answer = ["generate", "--prompt", "a cat here"] + (
        [] if script is bert else ["--temperature", 0])
    assert printed(script, capsys, *answer, "--init_from", "folder") == printed(
        script, capsys, *answer, "--out_dir", "a")
    if script is bert:
        transformers = pytest.importorskip("transformers")
        theirs = transformers.BertForSequenceClassification.from_pretrained("folder").eval()
        assert theirs.config.id2label == {0: "cat", 1: "dog"}
        for left, right in outputs(bert, bert.BERT.from_pretrained("folder"), theirs):
            assert (left - right).abs().max() < 1e-5


def test_a_table_with_more_rows_than_there_are_tokens(script, stories, capsys):
    """Published tables are padded to round numbers: such ids are never drawn; all commands run."""
    text = Path(stories).read_text(encoding="utf-8")
    tok = bpe.Tokenizer.train(text, 400, script.SPECIAL_TOKENS)
    config = tiny_config(script, vocab_size=600, n_embd=512, n_layer=1)
    randomised(script.Model(config)).float().save_pretrained("folder")
    tok.save("folder/tokenizer.json")
    sizes = ["--max_steps", 2, "--eval_interval", 2, "--batch_size", 2, "--out_dir"]
    daring = [] if script is bert else ["--temperature", 2, "--max_new_tokens", 60, "--top_k", 0]
    assert printed(script, capsys, "generate", "--init_from", "folder", "--prompt",
                   PROMPTS[script.NAME], *daring)
    run(script, "--init_from", "folder", "--data", stories, *sizes, "a")
    run(script, *finetuning(script, "folder"), *sizes, "b")
    runs = [json.loads(Path(name, "run.json").read_text()) for name in "ab"]
    wide = script.FINETUNING["published"]["lr"], 0  # (the text is not read twice: no decay)
    assert [(row["lr"], row["weight_decay"]) for row in runs] == [wide, wide]


def test_a_model_from_the_hub(server, exported, stories, monkeypatch, capsys):
    """By its name; fetched once; what broke off is continued, also where it has moved to."""
    monkeypatch.setenv("HF_ENDPOINT", server)
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    elsewhere = server.replace("127.0.0.1", "localhost")
    Server.files = {f"/some/model/resolve/main/{path.name}": path.read_bytes()
                    for path in exported(gpt).iterdir()}
    weights = "/some/model/resolve/main/model.safetensors"
    Server.files["/cdn/weights"] = Server.files[weights]
    Server.files[weights], Server.cuts = f"{elsewhere}/cdn/weights", 2
    evaluate = ["eval", "--data", stories, "--init_from"]
    found = figures(gpt, capsys, *evaluate, "some/model")
    assert found == figures(gpt, capsys, *evaluate, exported(gpt)) and not Server.cuts
    Server.files, Server.seen = {}, []
    assert figures(gpt, capsys, *evaluate, "some/model") == found and not Server.seen
    Server.files["/a/private/resolve/main/config.json"] = 401
    for name, match in (("some/modle", "some/modle"), ("a/private", "its folder"), ("../a", "/a"),
                        ("a/b/c", "a/b/c"), ("a b", "a b"), ("a?b", r"a\?b")):
        assert re.search(match, mistake(gpt, capsys, *evaluate, name))


# The command line ---------------------------------------------------------------------------------


def help_of(script, capsys, command="train") -> str:
    with pytest.raises(SystemExit):
        script.main([command, "--help"])
    return capsys.readouterr().out


def test_help_shows_every_flag_with_a_sentence_and_its_default(script, capsys):
    for command, names in dict(
            train="data preset device n_layer dropout optimizer snapshot_interval", export="to",
            finetune="data freeze patience scratch epochs", bench="n_layer compile",
            generate="prompt top_k", eval="data init_from").items():
        flags = dict(re.findall(r"^  --(\w+)\s+(.*?)(?=^  -|^\S|^$|\Z)", help_of(
            script, capsys, command), re.DOTALL | re.MULTILINE))
        assert flags.keys() >= set(names.split())
        assert all(len(sentence.split()) > 1 for sentence in flags.values()), command
        if "vocab_size" in flags:
            assert str(script.PRESETS["laptop"]["vocab_size"]) in flags["vocab_size"]


def test_the_ladder(stories, capsys):
    shown = printed(gpt, capsys, "ladder", "--data", stories, "--max_steps", 2, "--batch_size", 4,
                    "--block_size", 32, "--out_dir", "l")
    rows = json.loads(Path("l/ladder.json").read_text())
    assert len(rows) == 12 and all(row.keys() == {
        "name", "parameters", "train_loss", "val_loss", "seconds", "sample"} for row in rows)
    assert rows[0]["parameters"] == 2 * 257 * 64 and 1.1e6 < rows[-1]["parameters"] < 1.3e6
    assert all(row["name"] in shown and row["val_loss"] < 9 for row in rows)
    lines = ElementTree.parse("l/ladder.svg").getroot().findall(".//{*}polyline")
    assert len(lines) == 12 and len({line.get("stroke") for line in lines}) == 12


def test_bench_ends_with_a_line_of_figures(script, capsys, monkeypatch):
    """By a clock of ours, on which each call takes 2 seconds."""
    monkeypatch.setattr(time, "perf_counter", itertools.count(0, 2).__next__)
    writes = {}
    if script is not bert:  # a tenth of the 120 tokens is written: to the clock it is the same
        write = script.Model.generate
        monkeypatch.setattr(script.Model, "generate", lambda self, idx, n, **options: write(
            self, idx, n // 10, **options))
        writes = dict(generate_tokens_per_second=60, generate_batch_tokens_per_second=32 * 60)
    small = "--n_layer 1 --n_head 2 --n_embd 16 --block_size 16 --vocab_size 400 --batch_size 2"
    row = figures(script, capsys, "bench", "--device", "cpu", *small.split())
    expected = writes | dict(first_step_ms=2000, ms_per_step=2000, matmul_gflops=1024**3 / 1e9)
    assert {name: row[name] for name in expected} == pytest.approx(expected)
    assert row.keys() - expected == {"tokens_per_second", "gflops", "share", "peak_memory_mb"}
    least, most = dict(gpt=(32, 32), bert=(8, 32), t5=(40, 40))[script.NAME]
    assert least <= row["tokens_per_second"] * 2 <= most  # BERT: padding; T5: source 16, target 4


def saved_as(content) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


class Evil:
    """A pickle with code in it."""

    def __reduce__(self):
        return os.mkdir, ("broken_in",)


@pytest.mark.parametrize("script, arguments, match", [
    *((script, f"--{name} {value}", f"{name}.*{value}") for script, name, value in (
        (bert, "n_layer", "many"), (t5, "compile", "maybe"), (gpt, "preset", "huge"),
        (gpt, "max_steps", 0), (gpt, "seed", -1), (bert, "seed", 10**20), (gpt, "stride", 0),
        (bert, "pos", "rope"), (gpt, "act", "GELU"), (bert, "mask_prob", 2),
        (t5, "n_decoder_layer", 0), (t5, "n_buckets", 7), (t5, "noise_density", 1),
        (t5, "block_size", 1))),
    (gpt, "--n_layers 3", "n_layers"), (t5, "trian", "trian"), (gpt, "texts.csv", "texts.csv"),
    (gpt, "--n_embd 30", "n_embd.*30.*4"), (bert, "--n_embd 18 --pos rotary", "rotary|even"),
    (gpt, "--vocab_size 200", "257"), (t5, "--vocab_size 200", "358"),
    (gpt, "--layers {", "layers"), (gpt, '--layers {"0":5}', "layers"),
    (gpt, '--layers {"9":{"n_ff":0}}', "layers.*9|9.*layers"),
    (gpt, '--layers {"0":{"n_feet":4}}', "n_feet"), (gpt, '--layers {"1":{"n_head":3}}', "3"),
    (gpt, "--config nowhere.json", "nowhere.json"), (gpt, "--config bad.json", "n_layer.*six"),
    (gpt, "--config other.json", "n_layers"), (gpt, "--config broken.json", "broken.json"),
    (gpt, "--init_from resume", "out/gpt"), (gpt, "--init_from nowhere.pt", "nowhere.pt"),
    (gpt, "generate", "out/gpt"), (t5, "finetune", "out/t5"),
    (bert, "eval --init_from no/where/at", "no/where/at"),
    (gpt, "generate --top_p 2", "top_p.*2"), (bert, "generate --top_k 0", "top_k.*0"),
    (t5, "generate --beams 0", "beams.*0"),
    (t5, "generate --beams 2 --temperature 1", "beams.*temperature"),
    (gpt, "generate --init_from two\nlines.pt", "two lines.pt"),
    (gpt, "--out_dir texts.csv/run --max_steps 1", "texts.csv"),
    (gpt, "--out_dir texts.csv --max_steps 1", "File exists: .texts.csv"),
], ids=lambda value: getattr(value, "NAME", value))
def test_mistaken_flags_get_one_line(script, arguments, match, stories, capsys):
    for name, content in (("bad.json", '{"n_layer": "six"}'), ("other.json", '{"n_layers": 3}'),
                          ("broken.json", "{"), ("texts.csv", "text,label")):
        put(name, content)
    data_ = ["--data", stories] if arguments.startswith("--") else []
    assert re.search(match, mistake(script, capsys, *data_, *arguments.split(" ")))


def test_folders_and_archives_are_read_as_one_would_expect():
    """Each text once, though links lead to it twice; nothing hidden, no log of a run."""
    for name in "a.txt", "b/c.txt", ".hidden.txt", ".git/d.txt", "run/log.jsonl":
        path = Path("folder", name)
        path.parent.mkdir(parents=True, exist_ok=True)
        put(path, json.dumps({"text": "log"}) if path.suffix == ".jsonl" else f"Text {name}.")
    put("folder/run/run.json", "{}")
    for link, target in ("b/loop", ".."), ("twice.txt", "a.txt"), ("broken.txt", "nowhere"):
        Path("folder", link).symlink_to(target)
    archive = put_archive("all.tar.gz", {
        name: f"\ufeffText {name.lower().removeprefix('./')}." for name in (
            "./._a.txt", "./a.TXT", "b/c.txt", "__MACOSX/a.txt", "b/.d/e.txt")})
    for source in "folder", archive:
        texts = "".join(sum(documents_of(corpus_of(source)), [])).replace(END, "").split("Text ")
        assert texts == ["", "a.txt.", "b/c.txt."], source


def test_what_a_shell_may_do(trained, monkeypatch, capsys):
    """No home, no standard input, no source text: it goes on without."""
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "")
    assert data.cache_folder().is_absolute()
    monkeypatch.setattr(sys, "stdin", None)
    monkeypatch.setattr("inspect.getfile", lambda cls: "nowhere")
    assert "--n_layer" in help_of(gpt, capsys)
    run(gpt, *finetuning(gpt, trained(gpt)), "--max_steps", 1, "--out_dir", "a")
    run(gpt, "generate", "--out_dir", "a", "--max_new_tokens", 9)


@pytest.mark.parametrize("script, name, content, match", [
    *((gpt, *source) for source in (
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", "für alle ".encode("latin-1") * 9, "latin.txt"),
        ("rows.jsonl", b'{"text": "a"}\n{"body": "b"}\n', "rows.jsonl"),
        ("cut.txt.gz", gzip.compress(b"text " * 99, mtime=0)[:-9], "cut.txt.gz"),
        ("latin.txt.gz", gzip.compress("für alle".encode("latin-1"), mtime=0), "latin.txt.gz"),
        ("bare/picture.png", b"x", "bare"), ("bare/latin.txt", b"caf\xe9", "latin.txt"),
        ("page.txt", "for all ".encode("utf-16-le") * 9, "page.txt.*UTF-16"),
        ("nowhere.txt", None, "nowhere.txt.*shakespeare"))),
    *((script, "short.txt", text, "--block_size") for script in SCRIPTS.values() for text in (
        "A", END, "A short text.", f"{END}\n{END}\n", f"One.\n{END}\n")),
    (gpt, "a.csv", "prompt,answer\na,b\nc,d\n", "a.csv.*response"),
    (gpt, "a.csv", "prompt,response\na,b\nc, \n", r"a.csv.*\b[23]\b.*response"),
    (gpt, "a.csv", "prompt,response\na,b\nc\n", r"a.csv.*\b[23]\b"),
    (gpt, "a.csv", "prompt,response\na,b,c\nd,e\n", r"a.csv.*\b[12]\b"),
    (gpt, "a.csv", 'prompt,response\na,b\n"c,d\n', r"a.csv.*\b[23]\b"),
    (gpt, "a.csv", "prompt,response,rating\na,b,5\nc,d,9\n", r"a.csv.*\b[23]\b.*rating.*9"),
    (gpt, "a.csv", b"prompt,response\na,b\n\n,\nc,\xe9\n", r"a.csv.*\b5\b.*response.*UTF-8"),
    (gpt, "a.csv", "prompt,response\n", "a.csv.*no rows"),
    (gpt, "a.csv", "prompt,response\na,b\n", r"a.csv.*\b(1|one|two)\b"),
    (gpt, "a.jsonl", '{"prompt": "a", "response": "b"}\n{"prompt": "a"}\n', "jsonl.*2.*response"),
    (gpt, "a.jsonl", '{"prompt": "a"\n', r"a.jsonl.*\b1\b"),
    (gpt, "a.txt", "prompt,response\na,b\nc,d\n", "a.txt.*csv"),
    (gpt, "a.missing.csv", None, "a.missing.csv"),
    (bert, "a.csv", "text,label\na,x\nb,x\n", "label.*x"),
    (t5, "a.csv", "source,label\na,b\nc,d\n", "a.csv.*target"),
], ids=lambda value: getattr(value, "NAME", None))
def test_texts_and_tables_that_cannot_be_used(script, name, content, match, trained, capsys):
    Path("bare").mkdir()
    if content is not None:
        put(name, content)
    command = ["finetune", "--init_from", trained(script)] if name.startswith("a.") else []
    source = "bare" if "bare" in name else name
    assert re.search(match, mistake(script, capsys, *command, "--data", source, "--out_dir", "new"))
    assert not list(Path().rglob("*.pt"))


def test_mistakes_with_a_run_leave_it_as_it_was(script, trained, stories, monkeypatch, capsys):
    shutil.copytree(trained(script), "run")
    files = files_in("run")
    with monkeypatch.context() as patch:  # a full disk: a file is replaced whole or not at all
        patch.setattr(os, "fsync", lambda file: open("nowhere"))
        assert "cannot write" in mistake(
            script, capsys, "--init_from", "resume", "--out_dir", "run", "--max_steps", 10)
    assert "n_layer" in mistake(
        script, capsys, "--init_from", "resume", "--out_dir", "run", "--n_layer", 9)
    assert "freeze" in mistake(script, capsys, *finetuning(script, "run"), "--freeze", 9)
    other = dict(gpt=bert, bert=t5, t5=gpt)[script.NAME]
    assert re.search("run.*(ckpt|best).pt", mistake(other, capsys, "eval", "--out_dir", "run"))
    prompts = dict(gpt=[], bert=["A cat.", "word " * 40 + "[MASK]"],
                   t5=["a <extra_id_1>", "<extra_id_0> <extra_id_0>"])[script.NAME]
    for prompt in prompts:  # they have no gap, are too long, or have gaps without order
        assert re.search(r"\[MASK\]|\b32\b|extra_id|numbered", mistake(
            script, capsys, "generate", "--out_dir", "run", "--prompt", prompt))
    assert files == files_in("run")
    for variant in [] if script is t5 else [["--norm", "post" if script is gpt else "pre"]]:
        run(script, "--data", stories, *SMALL, "--out_dir", "odd", "--max_steps", 1, *variant)
        assert "transformers" in mistake(script, capsys, "export", "--out_dir", "odd", "--to", "to")
        assert not Path("to").exists()


@pytest.mark.parametrize("content", [
    b"", b"PK\x03\x04 not a zip", None, saved_as(dict(weights=torch.ones(3))), saved_as([1, 2]),
    saved_as(dict(model=Evil())), pickle.dumps(Evil(), 2)],
    ids=["empty", "no zip", "cut", "other", "a list", "code", "old code"])
def test_checkpoints_that_are_something_else(content, trained, capsys):
    """They are named, no code in them is run, and they stay as they are."""
    shutil.copytree(trained(gpt), "run")
    content = Path("run/ckpt.pt").read_bytes()[:9999] if content is None else content
    Path("run/ckpt.pt").write_bytes(content)
    for arguments in ["--init_from", "resume"], ["generate", "--init_from", "run/ckpt.pt"]:
        assert "run/ckpt.pt" in mistake(gpt, capsys, *arguments, "--out_dir", "run")
    assert Path("run/ckpt.pt").read_bytes() == content and not Path("broken_in").exists()


@pytest.mark.parametrize("name, content, match", [
    ("config.json", dict(model_type="llama"), "llama"), ("config.json", dict(n_layer=3), "h.2|3"),
    ("config.json", dict(vocab_size=401), "401|wte"), ("config.json", dict(n_layer=1), "h.1|1"),
    ("config.json", dict(vocab_size=None), "folder"),
    *((f"{model}/config.json", {setting: value}, setting) for model, setting, value in (
        ("gpt", "activation_function", "swish"), ("gpt", "layer_norm_epsilon", 0.1),
        ("gpt", "scale_attn_weights", False), ("bert", "hidden_act", "relu"),
        ("bert", "problem_type", "multi_label_classification"), ("bert", "layer_norm_eps", 1e-5),
        ("bert", "problem_type", "regression"), ("t5", "dense_act_fn", "silu"),
        ("t5", "feed_forward_proj", "gated-silu"))),
    ("config.json", b"{", "config.json"), ("config.json", b"[1]", "config|folder"),
    ("model.safetensors", b"", "safetensors"),
    ("model.safetensors", lambda good: good[:-1], "safetensors"),
    ("model.safetensors", lambda good: good[:-4] + b"\xff" * 4, "NaN"),
    ("model.safetensors", lambda good: struct.pack("<Q", 10**10) + good[8:], "safetensors"),
    ("model.safetensors", struct.pack("<Q", 2) + b"[]", "safetensors"),
    ("model.safetensors", struct.pack("<Q", 80) + b'{"transformer.wte.weight": {"dtype": "F32", '
     b'"shape": [9], "data_offsets": [0, 36]}}', "safetensors"),
    ("pytorch_model.bin", b"version https://git-lfs.github.com/spec/v1", "pytorch_model.bin"),
    ("pytorch_model.bin", saved_as({"a": Evil()}), "pytorch_model.bin"),
    ("pytorch_model.bin", saved_as({"stranger": torch.ones(2)}), "stranger|missing|weights"),
    ("tokenizer.json", b"{}", "tokenizer.json")])
def test_published_folders_that_are_something_else(name, content, match, exported, capsys):
    model, _, name = name.rpartition("/")
    script = SCRIPTS[model or "gpt"]
    shutil.copytree(exported(script), "folder")
    path, weights = Path("folder", name), Path("folder/model.safetensors")
    good = weights.read_bytes()
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    if path.suffix == ".bin":
        weights.unlink()
    path.write_bytes(content(good) if callable(content) else content)
    assert re.search(match, mistake(
        script, capsys, "generate", "--init_from", "folder", "--prompt", "a"))
    assert not Path("broken_in").exists()


def test_berts_of_others_without_a_head_and_for_pairs(exported, stories, capsys):
    """A BertModel can learn but fill nothing in; a classifier may be for pairs, or for a number."""
    shutil.copytree(exported(bert), "bare")
    weights = read_safetensors("bare/model.safetensors")
    weights = {name: x for name, x in weights.items() if not name.startswith("cls.")}
    write_safetensors("bare/model.safetensors", weights)
    assert "head" in mistake(bert, capsys, "generate", "--init_from", "bare")
    run(bert, "--init_from", "bare", "--data", stories, "--max_steps", 1, "--batch_size", 2)
    shutil.copytree("bare", "labels")
    head = {"classifier.weight": torch.ones(2, 32), "classifier.bias": torch.ones(2)}
    write_safetensors("labels/model.safetensors", weights | head)
    answer = ["generate", "--init_from", "labels", "--prompt", "One."]
    for more in [], ["--prompt_b", "Two."]:
        shown = printed(bert, capsys, *answer, *more)
        assert {*shown.split()} == {"LABEL_0", "LABEL_1", "50.0", "%"}
    head = {name: x[:1] for name, x in head.items()}
    write_safetensors("labels/model.safetensors", weights | head)
    config = json.loads(Path("labels/config.json").read_text()) | dict(num_labels=1)
    put("labels/config.json", json.dumps(config))
    assert "num_labels" in mistake(bert, capsys, *answer)


# The house ----------------------------------------------------------------------------------------

MOST_LINES = dict(gpt=1000, bert=1080, t5=1180, bpe=600, data=1200, test_all=2300)


def source_of(name: str) -> str:
    return (ROOT / f"{name}.py").read_text(encoding="utf-8")


def imported(nodes) -> set[str]:
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize("name", MOST_LINES)
def test_house_rules(name):
    """Lines, columns, imports, short functions, docstrings of what is public."""
    lines, tree = source_of(name).splitlines(), ast.parse(source_of(name))
    assert len(lines) <= MOST_LINES[name]
    assert not [i + 1 for i, line in enumerate(lines) if len(line) > 100]
    nodes, others = list(ast.walk(tree)), dict(data={"bpe"}, bpe={"data"}, test_all={
        "pytest", "gpt", "bert", "t5", "bpe", "data"}).get(name, {"bpe", "data"})
    assert imported(nodes) <= {"torch", "numpy", "requests"} | sys.stdlib_module_names | others
    if name == "test_all":
        return
    assert name == "data" or not imported(tree.body) & others  # a model file imports alone
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    long = {node.name for node in functions if node.end_lineno - node.lineno >= 50}
    assert long <= {"train"}  # (that one is the whole story, of about 60)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    methods = [node for each in classes for node in each.body if node in functions]
    public = [*classes, *(node for node in tree.body if node in functions), *(
        node for node in methods if node.name[0] != "_")]
    documented = {node.name for node in public if ast.get_docstring(node)}
    inherited = {*dir(torch.nn.Module), *dir(torch.autograd.Function)}
    assert {node.name for node in public} <= documented | inherited


def test_the_project_is_eight_files():
    if not (ROOT / ".git").exists() or not shutil.which("git"):
        pytest.skip("no git here")
    listed = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True)
    top = {path for path in listed.stdout.split() if not path.startswith(".")}
    assert top == {*(f"{name}.py" for name in MOST_LINES), "input.txt", "README.md"}


@pytest.mark.parametrize("label", [
    "# 9. Training", "LONG = ", "class KVCache", *(f"def {name}(" for name in (
        "check attention sinusoids rotate sample padding_bias").split())])
def test_twins_are_the_same_text(label):
    """What stands in several files in the same words: these, and from "9. Training" to the end."""
    end = r"\Z" if label[0] == "#" else r"(?=^\S)"
    texts = [re.findall(rf"^{re.escape(label)}.*?{end}", source_of(name), re.DOTALL | re.MULTILINE)
             for name in SCRIPTS]
    texts = [found for found in texts if found]
    assert len(texts) > 1 and all(found == texts[0] for found in texts)


def test_a_file_alone_gives_its_model_and_says_what_training_lacks(script, monkeypatch, capsys):
    """Imported anew, where nothing else of the project can be."""
    for name in "gpt bert t5 bpe data".split():
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, script.NAME)
    module = importlib.import_module(script.NAME)
    model = module.Model(module.Config(**dataclasses.asdict(tiny_config(script))))
    write = getattr(model, "generate", lambda idx, n: idx)  # what is written can be learned from
    idx = write(torch.randint(2, 50, (2, 9)), 9)
    (model.loss(idx, None, None, idx) if script is bert else model(idx, idx)[1]).backward()
    assert len(model(idx)[0] if script is bert else idx) == 2
    assert module.main([]) == 2
    assert re.fullmatch(r"error: .*(bpe|data)\.py.*\n", capsys.readouterr().err)


README = (ROOT / "README.md").read_text(encoding="utf-8")
NOT_RUN = re.compile(r"\((\w+, )?(network|GPU|untried)\)")  # behind a command that takes one


def blocks(kind: str) -> list[str]:
    """The README's blocks of a kind: "sh", "python"."""
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


def in_small(script, words: list[str]) -> list[str]:
    """A command of the README with a tiny model and few steps; its other flags win."""
    name, *own = words
    small = dict(generate="" if script is bert else "--max_new_tokens 9",
                 finetune="--target_length 8" if script is t5 else "", train=(
        f"--n_layer {1 + 3 * ('--layers' in own)} --n_head 2 --n_embd 16 --vocab_size 400 "
        "--batch_size 4 --eval_interval 2 --block_size 16"))
    before = "" if "resume" in own else small.get(name, "")
    after = f"--max_steps {2 + own.count('resume')}" if name in ("train", "finetune") else ""
    return [name, *before.split(), *own, *after.split()]


def test_the_readme_s_commands_and_examples_run(capsys):
    """In the order of the page, with small models and few steps. Of those that take a network or a
    GPU, and of `bench` and `ladder`, which have tests of their own, only the flags are looked up;
    `torchrun` and the first command are run by .ci/run."""
    # All files that they name, in small.
    Path("my_folder").mkdir()
    for name in "input.txt", "my.txt", "my_folder/a.txt":
        put(name, first_stories(16))
    put("my.jsonl", "\n".join(json.dumps({"text": text}) for text in first_stories(16).split(END)))
    rows = [("The sea", "yes"), ("A hill", "no")] * 9
    for name, columns in ("pairs", "prompt,response,rating"), ("texts", "text,label,stars"):
        put(f"{name}.csv", "\n".join([columns, *(f"{left},{right},4" for left, right in rows)]))
    put("pairs.jsonl", "\n".join(json.dumps(dict(source=a, target=b)) for a, b in rows))
    run_ = collections.Counter()
    for line in itertools.chain.from_iterable(map(str.splitlines, blocks("sh"))):
        match = re.match(r"python (gpt|bert|t5)\.py *(.*)", line)
        if not match:
            assert re.match(r"torchrun |pip |pytest |diff |$", line), line
            continue
        script, words = SCRIPTS[match[1]], shlex.split(match[2], comments=True)
        if not words or words[0].startswith("-"):
            words.insert(0, "train")
        if "--help" in words:
            continue
        if NOT_RUN.search(line) or words[0] in ("bench", "ladder"):
            shown = help_of(script, capsys, words[0])
            assert all(f"{word} " in shown for word in words if word.startswith("--")), line
            assert "--preset" not in words or words[words.index("--preset") + 1] in shown, line
            continue
        run(script, *in_small(script, words))
        run_[script.NAME] += 1
        capsys.readouterr()
    assert all(run_[name] > 6 for name in SCRIPTS)
    examples = blocks("python")
    assert len(examples) > 2
    for example in examples:  # they begin with models of the commands
        exec(compile(re.sub(r"\brange\(\d+\)", "range(2)", example), "README.md", "exec"), {})


def with_right_links(page: str) -> str:
    """The README with each [`name`](file.py#L1) leading to the line where the name is defined."""
    def link(match):
        line, lines = 0, source_of(match[2][:-3]).splitlines()
        for i, part in enumerate(match[1].split(".")):  # a method is indented
            defined = re.compile(rf"{i * '    '}((def|class) {part}\b|{part}( =|: ))")
            line = next(n for n, text in enumerate(lines) if n >= line and defined.match(text))
        return f"[`{match[1]}`]({match[2]}#L{line + 1})"

    return re.sub(r"\[`([\w.]+)`\]\((\w+\.py)#L\d+\)", link, page)


def test_the_readme_s_links_lead_to_their_names():
    assert README.count(".py#L") > 20
    assert README == with_right_links(README), "python test_all.py puts them right"
    titles = re.findall(r"^## (.*)$", README, re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#(.*?)\)", README)) <= anchors


if __name__ == "__main__":
    (ROOT / "README.md").write_text(with_right_links(README), encoding="utf-8")
