"""GPT: a decoder that reads text from left to right and predicts, at every position, the next token.

That is the whole objective. A text of T tokens gives T exercises at once, since a causal mask lets each
position see only itself and what came before:

    input    Once  upon   a     time  there
    target   upon   a    time  there   was

The architecture is GPT-2's: token and position embeddings, a stack of blocks that each add the output of
attention (positions exchange information) and of a feed-forward network (each position thinks alone) to a
residual stream, and a linear head that turns the stream into a score for every token of the vocabulary.

    python gpt.py                                  train on input.txt: two to three minutes on a laptop
    python gpt.py generate --prompt "Title: The"   write with what was trained
    python gpt.py eval                             loss and bits per byte on the whole validation part
    python gpt.py bench                            how fast this machine is at it
    python gpt.py --help                           every flag

Read on in this order: 1 configuration, 2 layers, 3 the model, 4 the objective, 5 generation, 6 training,
7 the command line. Copied alone into a project, this file still gives `from gpt import GPT, GPTConfig`;
to train it wants bpe.py (the tokenizer) and data.py (files, downloads, the log) beside it.

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2);
Vaswani et al. 2017, https://arxiv.org/abs/1706.03762 (attention); Radford et al. 2018 (GPT).
"""

import codecs
import contextlib
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

# ---------------------------------------------------------------------------------------------------
# 2. The configuration
# ---------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    """The architecture. Defaults are GPT-2's; every other value is a variant that people have tried.

    Raises ValueError for sizes that do not fit together.
    """

    vocab_size: int  # token types: special tokens + 256 bytes + merges
    block_size: int  # longest context, in tokens
    n_layer: int  # blocks
    n_head: int  # attention heads in a block
    n_embd: int  # width of the residual stream
    n_ff: int | None = None  # width inside the feed-forward (default 4 * n_embd; 0: no feed-forward)
    head_dim: int | None = None  # width of a head's queries and keys (default n_embd / n_head)
    value_dim: int | None = None  # width of a head's values (default head_dim)
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # biases in linear layers and norms
    pos: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"  # how positions are marked
    norm: Literal["pre", "post", "none"] = "pre"  # LayerNorm before or after each sublayer
    act: Literal["gelu", "relu"] = "gelu"  # non-linearity of the feed-forward
    residual: bool = True  # add each sublayer's output to its input
    tie: bool = True  # the head uses the token embedding's weights

    def __post_init__(self):
        if min(self.vocab_size, self.block_size, self.n_head, self.n_embd) < 1 or self.n_layer < 0:
            raise ValueError("vocab_size, block_size, n_head and n_embd have to be at least 1, n_layer at least 0")
        if self.head_dim is None:
            if self.n_embd % self.n_head:
                raise ValueError(
                    f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: change one of them or set head_dim"
                )
            self.head_dim = self.n_embd // self.n_head
        if self.pos == "rotary" and self.head_dim % 2:
            raise ValueError(f"rotary positions turn pairs of numbers: head_dim {self.head_dim} has to be even")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not between 0 and 1")
        self.value_dim = self.head_dim if self.value_dim is None else self.value_dim
        self.n_ff = 4 * self.n_embd if self.n_ff is None else self.n_ff


PRESETS = {
    "laptop": dict(vocab_size=2048, block_size=128, n_layer=4, n_head=4, n_embd=256),
    "t4": dict(vocab_size=8192, block_size=512, n_layer=8, n_head=8, n_embd=512),
    "gpt2": dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),  # 124 M parameters
    "gpt2-medium": dict(vocab_size=50257, block_size=1024, n_layer=24, n_head=16, n_embd=1024),  # 355 M
    "gpt2-large": dict(vocab_size=50257, block_size=1024, n_layer=36, n_head=20, n_embd=1280),  # 774 M
    "gpt2-xl": dict(vocab_size=50257, block_size=1024, n_layer=48, n_head=25, n_embd=1600),  # 1.56 B
}
RECIPE = dict(max_steps=300, batch_size=32, lr=0.01, matrix_lr=0.03)  # what suits "laptop" and input.txt

# ---------------------------------------------------------------------------------------------------
# 3. Layers, from the bottom up
# ---------------------------------------------------------------------------------------------------


LONG = 1024  # keys from which on the fused attention is the faster one on a CPU, too


def attention(query, key, value, bias=None, causal=False, scale=None, dropout=0.0):
    """softmax(Q K^T * scale + bias) V: each query takes a weighted mean of the values (Vaswani, 3.2.1).

    query (B, nh, T, hd), key (B, nh, S, hd), value (B, nh, S, vd) -> (B, nh, T, vd). bias is added to the
    scores and broadcasts to (B, nh, T, S). causal: the last query sees all S keys, the one before S - 1, ...
    scale: 1 / sqrt(hd) unless given. On a CPU and for short sequences the formula as written is two to
    three times as fast as the fused kernel; elsewhere the fused one is, and it never stores the T x S scores.
    """
    T, S = query.size(-2), key.size(-2)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    if causal and (T != S or bias is not None or query.device.type == "cpu"):
        future = torch.full((T, S), float("-inf"), dtype=query.dtype, device=query.device).triu(1 + S - T)
        bias, causal = future if bias is None else bias + future, False
    if query.device.type != "cpu" or S >= LONG or T == 1:
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, causal, scale=scale)
    scores = (query * scale) @ key.transpose(-2, -1)  # (B, nh, T, S)
    weights = F.softmax(scores if bias is None else scores + bias, dim=-1)
    return F.dropout(weights, dropout) @ value  # (B, nh, T, vd)


def sinusoids(length: int, width: int) -> torch.Tensor:
    """(length, width): sin and cos of the position at wavelengths from 2 pi to 20,000 pi (Vaswani, 3.5)."""
    frequency = 10000 ** (-torch.arange(0, width, 2) / width)  # (width / 2,)
    angle = torch.arange(length)[:, None] * frequency  # (length, width / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


def rotate(x, turn):
    """Rotary positions: turn each pair of numbers by an angle that grows with the position, so that a product
    of query and key depends on their distance alone (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    x (B, nh, T, hd); turn: cos and sin of the angles, (2, T, hd / 2) -> (B, nh, T, hd).
    """
    cos, sin = turn.to(x.dtype)
    left, right = x.chunk(2, dim=-1)  # number i makes a pair with number i + hd / 2
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


class KVCache:
    """The keys and values of all tokens so far, of one attention layer, so that none is computed twice."""

    def __init__(self, block_size: int):
        self.block_size, self.length = block_size, 0

    def append(self, key, value):
        """key, value (B, nh, T, hd) of T new tokens -> those of all tokens so far."""
        if self.length == 0:
            B, nh, _, hd = key.shape
            dtype = torch.float32 if key.device.type == "cpu" else key.dtype  # where attention is fastest
            self.keys = key.new_empty(B, nh, self.block_size, hd, dtype=dtype)
            self.values = key.new_empty(B, nh, self.block_size, value.size(-1), dtype=dtype)
        end = self.length + key.size(2)
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = key, value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Multi-head causal self-attention: each head compares positions in its own way (Vaswani, 3.2.2)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.widths = [config.n_head * width for width in (config.head_dim, config.head_dim, config.value_dim)]
        self.qkv = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)  # three maps in one product
        self.qkv.weight.maps = 3 if config.value_dim == config.head_dim else 1  # Muon takes each by itself
        self.proj = nn.Linear(self.widths[2], config.n_embd, bias=config.bias)

    def forward(self, x, turn=None, cache: KVCache | None = None):
        B, T, C = x.shape
        query, key, value = (
            part.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hd)
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        if cache is not None:
            key, value = cache.append(key, value)
            query = query.to(key.dtype)
        mixed = attention(query, key, value, causal=T > 1, dropout=self.dropout * self.training)
        mixed = self.proj(mixed.transpose(1, 2).reshape(B, T, -1).to(x.dtype))  # (B, T, C)
        return F.dropout(mixed, self.dropout, self.training)


class FeedForward(nn.Module):
    """Two linear layers and a non-linearity, the same at every position: C -> n_ff -> C (Vaswani, 3.3)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.act, self.dropout = config.act, config.dropout
        self.up = nn.Linear(config.n_embd, config.n_ff, bias=config.bias)
        self.down = nn.Linear(config.n_ff, config.n_embd, bias=config.bias)

    def forward(self, x):
        inner = self.up(x)  # (B, T, n_ff)
        inner = F.gelu(inner, approximate="tanh") if self.act == "gelu" else F.relu(inner)
        return F.dropout(self.down(inner), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream x: x + sublayer(norm(x))."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.place, self.residual = config.norm, config.residual
        self.attn, self.attn_norm = Attention(config), make_norm(config)
        self.mlp, self.mlp_norm = (FeedForward(config), make_norm(config)) if config.n_ff else (None, None)

    def add(self, x, sublayer, norm):
        """x + sublayer(norm(x)), GPT-2's pre-norm; or post-norm, norm(x + sublayer(x)); or without the x +."""
        y = sublayer(norm(x) if self.place == "pre" else x)
        y = x + y if self.residual else y
        return norm(y) if self.place == "post" else y

    def forward(self, x, turn=None, cache: KVCache | None = None):
        x = self.add(x, lambda h: self.attn(h, turn, cache), self.attn_norm)
        return self.add(x, self.mlp, self.mlp_norm) if self.mlp is not None else x  # (B, T, C)


def make_norm(config: GPTConfig):
    """LayerNorm: at each position mean 0 and variance 1 over the C numbers, then a learned scale and shift."""
    return nn.LayerNorm(config.n_embd, bias=config.bias) if config.norm != "none" else nn.Identity()


# ---------------------------------------------------------------------------------------------------
# 4. The model
# ---------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """Embeddings, blocks, a last norm, and the head that scores every token as the next one."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        elif config.pos == "sinusoidal":
            self.register_buffer("positions", sinusoids(config.block_size, config.n_embd), persistent=False)
        elif config.pos == "rotary":
            table = sinusoids(config.block_size, config.head_dim)  # sin, cos, sin, cos, ...
            self.register_buffer("turns", torch.stack((table[:, 1::2], table[:, ::2])), persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = make_norm(config) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self.init_weights)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):  # these add to the residual stream, 2 per block
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer))  # (GPT-2, 2.3)
        if config.tie:
            self.head.weight = self.token_embedding.weight

    @staticmethod
    def init_weights(module):
        """GPT-2's N(0, 0.02), but embeddings of 0.05: the first steps then have something to tell apart."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05 if isinstance(module, nn.Embedding) else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx, cache: list[KVCache] | None = None):
        """idx (B, T) int64 -> (B, T, C), the stream after the last norm. With a cache, idx are the new tokens."""
        start = cache[0].length if cache else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size {self.config.block_size}")
        x = self.token_embedding(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.position_embedding.weight[start:end]
        elif self.config.pos == "sinusoidal":
            x = x + self.positions[start:end]
        turn = self.turns[:, start:end] if self.config.pos == "rotary" else None  # (2, T, hd / 2)
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, cache[i] if cache else None)
        return self.norm(x)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, V), and the mean loss when targets (B, T) are given, else None.

        targets[b, t] is the token that follows idx[b, t]; where it is -100 nothing is asked.
        Raises ValueError where T exceeds block_size.
        """
        logits = self.head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)

    def flops_per_token(self) -> float:
        """Floating-point operations of a training step per token: 2 forward and 4 backward per weight of a
        matrix product, and the same for the scores and the mix of attention (Kaplan et al. 2020, 2.1)."""
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        width = self.config.n_head * (self.config.head_dim + self.config.value_dim)
        return 6 * (weights + self.config.n_layer * self.config.block_size * width)


Model, Config, NAME = GPT, GPTConfig, "gpt"  # under these names the rooms below are the same in all three files

# ---------------------------------------------------------------------------------------------------
# 5. The objective: predict the next token
# ---------------------------------------------------------------------------------------------------

SPECIAL_TOKENS = ["<|endoftext|>"]
SEPARATOR = "<|endoftext|>"  # stands before the first document, between documents and after the last


@dataclass
class ObjectiveConfig:
    """Next-token prediction has nothing to set. (BERT's masking and T5's spans do.)"""


def check_corpus(corpus, config: Config, objective: ObjectiveConfig) -> None:
    """Raises ValueError where the corpus cannot fill one batch row."""
    if len(corpus.train) <= config.block_size or len(corpus.validation) < 2:
        raise ValueError(
            f"the text is too short: {len(corpus.train)} training and {len(corpus.validation)} validation tokens "
            f"for windows of {config.block_size}; give more text or a smaller --block_size"
        )


def rows_per_epoch(corpus, config: Config, objective: ObjectiveConfig) -> int:
    """How many windows the training part has."""
    return max((len(corpus.train) - 1) // config.block_size - 1, 1)


def train_batch(corpus, config: Config, objective: ObjectiveConfig, seed: int, step: int, rows: int) -> dict:
    """The batch of a step: idx and targets, (rows, block_size) int64. It depends on (seed, step) alone.

    An epoch lays windows end to end from a random offset and takes each once, in random order.
    """
    from data import shuffled_rows

    T, n = config.block_size, rows_per_epoch(corpus, config, objective)
    row, luck = shuffled_rows(n, seed, step * rows, rows)
    offset = (luck * (len(corpus.train) - n * T)).astype(np.int64)
    at = (offset + row * T)[:, None] + np.arange(T + 1)  # (rows, T + 1)
    window = torch.from_numpy(corpus.train[at].astype(np.int64))
    return dict(idx=window[:, :-1], targets=window[:, 1:])


def eval_batches(corpus, config: Config, objective: ObjectiveConfig, rows: int):
    """The whole validation part, in windows that do not overlap; each token is a target once.

    Yields idx and targets (rows, block_size), and `bytes` (rows,): how much text the row's targets spell.
    """
    from data import sliding_windows

    T = config.block_size
    idx, targets = sliding_windows(corpus.validation, T, T, pad_id=0)
    spelled = np.where(targets >= 0, corpus.token_bytes[targets], 0).sum(axis=1)
    for i in range(0, len(idx), rows):
        arrays = dict(idx=idx[i : i + rows], targets=targets[i : i + rows], bytes=spelled[i : i + rows])
        yield {name: torch.from_numpy(array) for name, array in arrays.items()}


def loss_sum(model: GPT, batch: dict):
    """(sum of the tokens' losses, number of tokens, metrics).

    Sums, so that pieces of a batch can be added up. A metric is a pair of sums, a numerator and a
    denominator: bits per byte = loss / ln 2 over bytes, which can be compared across tokenizers.
    """
    logits = model(batch["idx"])[0].flatten(0, 1)  # (B * T, V)
    loss = F.cross_entropy(logits, batch["targets"].flatten(), ignore_index=-100, reduction="sum")
    count = (batch["targets"] != -100).sum()
    metrics = {"bits_per_byte": (loss.detach() / math.log(2), batch["bytes"].sum())} if "bytes" in batch else {}
    return loss, count, metrics


# ---------------------------------------------------------------------------------------------------
# 6. Generation
# ---------------------------------------------------------------------------------------------------


def sample(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    """Draw a token from each row of logits (B, V) -> (B,) int64. temperature 0 takes the likeliest.

    top_k: only among the k likeliest; top_p: only among the likeliest that together have probability p
    (nucleus sampling, Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    likeliest, token = logits.float().topk(k)  # (B, k), in descending order
    probability = F.softmax(likeliest / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        before = probability.cumsum(dim=-1) - probability  # of all likelier ones; 0 for the first, which stays
        probability = probability.masked_fill(before >= top_p, 0.0)
    # Of exponential waiting times at these rates, each token's is the shortest with its probability.
    drawn = (probability / torch.empty_like(probability).exponential_()).argmax(dim=-1, keepdim=True)
    return token.gather(-1, drawn)[:, 0]


@torch.no_grad()
def generate(
    model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None, use_cache=True, on_token=None
):
    """Continue each row of idx (B, T) int64, T >= 1, by max_new_tokens -> (B, T + n).

    temperature, top_k, top_p: see `sample`. stop: a token id; a row that has produced it is filled up with
    it, and when all rows have, generation ends (n < max_new_tokens). on_token(column (B,)) is called with
    each new token. use_cache=False computes everything anew at each token: slow, and the same result.

    When the context is full, its older half is dropped and the rest computed again: learned positions
    belong to places in the window, so the cached keys would be wrong once the window moves.
    """
    (B, T), block_size = idx.shape, model.config.block_size
    tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)
    start = max(0, T - block_size)  # the window is tokens[:, start:end]
    cache, done = [], idx.new_zeros(B, dtype=torch.bool)
    for end in range(T, T + max_new_tokens):
        if end - start > block_size:
            start, cache = end - max(block_size // 2, 1), []
        if not cache:
            new = tokens[:, start:end]
            cache = [KVCache(block_size) for _ in model.blocks] if use_cache else []
        else:
            new = tokens[:, end - 1 : end]
        logits = model.head(model.hidden(new, cache)[:, -1])  # (B, V)
        column = sample(logits, temperature, top_k, top_p)
        if stop is not None:
            column = column.masked_fill(done, stop)
            done |= column == stop
        tokens[:, end] = column
        if on_token is not None:
            on_token(column)
        if stop is not None and done.all():
            return tokens[:, : end + 1]
    return tokens


GPT.generate = generate


@dataclass
class GenerateConfig:
    """What to write, and how freely."""

    prompt: str = ""  # the text to continue; without it, a new document
    max_new_tokens: int = 300  # how many tokens at most
    temperature: float = 0.8  # above 1 more daring, below 1 safer, 0 always the likeliest
    top_k: int = 50  # choose among the k likeliest tokens (0: among all)
    top_p: float = 1.0  # choose among the likeliest tokens that together have this probability
    num_samples: int = 1  # how many texts

    def __post_init__(self):
        if self.max_new_tokens < 1 or self.num_samples < 1 or self.temperature < 0 or self.top_k < 0:
            raise ValueError("max_new_tokens and num_samples have to be at least 1, temperature and top_k at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not between 0 and 1")


def continuations(model: GPT, tokenizer, documents: int, options: GenerateConfig, on_text=None) -> list[str]:
    """The texts that follow the prompt, each up to the end of its document.

    documents: of the corpus trained on; with more than one, a prompt is the beginning of a document.
    on_text(part) is called with the first text's parts as they come.
    """
    end = tokenizer.special[SEPARATOR]
    ids = ([end] if documents > 1 else []) + tokenizer.encode(options.prompt) or tokenizer.encode("\n")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character

    def show(column):
        if on_text is not None and column[0] != end:
            on_text(decoder.decode(tokenizer.decode_bytes([column[0]])))

    idx = torch.tensor([ids] * options.num_samples, device=next(model.parameters()).device)
    tokens = model.generate(
        idx, options.max_new_tokens, options.temperature, options.top_k or None, options.top_p, stop=end, on_token=show
    )
    rows = tokens[:, len(ids) :].tolist()
    return [tokenizer.decode(row[: row.index(end)] if end in row else row) for row in rows]


def demonstrate(model: GPT, corpus, length: int) -> str:
    """A sample for the log."""
    return continuations(model, corpus.tokenizer, corpus.documents, GenerateConfig(max_new_tokens=length))[0]


def write_samples(model: GPT, checkpoint: dict, options: GenerateConfig) -> None:
    """`generate`: the prompt and what follows it, on standard output; one text as it comes, several at the end."""

    def write(text):
        print(text, end="", flush=True)

    if options.num_samples == 1:
        write(options.prompt)
    arguments = model, checkpoint["tokenizer"], checkpoint["documents"], options
    texts = continuations(*arguments, on_text=write if options.num_samples == 1 else None)
    print("" if options.num_samples == 1 else "\n\n".join(options.prompt + text for text in texts))


def generate_speeds(model: GPT) -> dict[str, float]:
    """Tokens per second: one sequence, and 32 together; 8 tokens are continued by 120."""
    speeds = {}
    for key, rows in ("generate_tokens_per_second", 1), ("generate_batch_tokens_per_second", 32):
        idx = torch.randint(model.config.vocab_size, (rows, 8), device=next(model.parameters()).device)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            model.generate(idx, 120, top_k=50).sum().item()  # (waits for the device)
            times.append(time.perf_counter() - start)
        speeds[key] = rows * 120 / sorted(times[1:])[1]
    return speeds

# ---------------------------------------------------------------------------------------------------
# 7. Training: from here on the three model files are the same, letter by letter
# ---------------------------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """One run: what to learn from, for how long, how fast, and on which machine."""

    data: str = "input.txt"  # a file, folder or URL, or shakespeare, tinystories, imdb
    out_dir: str = f"out/{NAME}"  # folder for checkpoints, log and chart
    init_from: str = "scratch"  # scratch, resume (what out_dir holds), or a checkpoint file
    max_steps: int = RECIPE["max_steps"]  # optimizer steps
    epochs: float = 0.0  # passes over the training part; if given, max_steps follows from it
    batch_size: int = RECIPE["batch_size"]  # sequences that are computed at once
    grad_accum: int = 1  # such batches per step; their gradients are added
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for matrices, with AdamW for all else
    lr: float = RECIPE["lr"]  # AdamW's highest learning rate
    matrix_lr: float = RECIPE["matrix_lr"]  # Muon's highest learning rate
    weight_decay: float = 0.0  # share of lr by which matrices shrink at each step
    warmup_steps: int = 20  # steps in which the learning rate rises
    schedule: Literal["linear", "cosine"] = "linear"  # how it falls to zero afterwards
    grad_clip: float = 1.0  # longest gradient; longer ones are shortened (0: none is)
    log_interval: int = 10  # steps between two lines of the log
    eval_interval: int = 100  # steps between two evaluations, each with a checkpoint
    snapshot_interval: int = 0  # steps between two checkpoints that are kept for good (0: none)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the fastest there is
    seed: int = 0  # a step's batch and dropout depend on this and the step's number alone
    compile: bool = False  # torch.compile: pays on a GPU, in long runs

    def __post_init__(self):
        for name in ("max_steps", "batch_size", "grad_accum", "log_interval", "eval_interval"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} has to be at least 1")
        for name in ("epochs", "lr", "matrix_lr", "weight_decay", "warmup_steps", "grad_clip", "snapshot_interval"):
            if getattr(self, name) < 0:
                raise ValueError(f"--{name} cannot be negative")


def orthogonalize(matrices, steps: int = 5):
    """Newton-Schulz iteration: the nearest matrices whose singular values are all about 1.

    matrices (n, rows, cols), in the dtype that multiplies fastest. X <- aX + b(XX^T)X + c(XX^T)^2 X moves
    each singular value s to as + bs^3 + cs^5, and these a, b, c bring all of (0, 1] near 1 in five rounds
    (Jordan 2024, https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.size(-2) <= matrices.size(-1)
    X = matrices if wide else matrices.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X if wide else X.mT


class Muon(torch.optim.Optimizer):
    """Muon for the matrices inside the blocks, AdamW for all else: one optimizer, so that one overflow skips both.

    AdamW steps by a fixed size in each *number*; Muon, in each *direction* of a matrix: it takes the momentum
    of the gradient and makes all its singular values 1, so that rare directions are learned as fast as common
    ones. Matrices of equal shape are stacked and handled in one product.
    """

    def __init__(self, model: nn.Module, run: TrainConfig, dtype: torch.dtype):
        self.dtype = dtype  # of the Newton-Schulz products
        kinds = {}  # (kind, shape) -> parameters
        for name, p in model.named_parameters():
            if run.optimizer == "muon" and p.ndim == 2 and "blocks." in name:
                kinds.setdefault(("muon", (len(p) // getattr(p, "maps", 1), p.size(1))), []).append(p)
            else:
                kinds.setdefault(("adamw", p.ndim >= 2), []).append(p)
        groups = []
        for (kind, detail), params in kinds.items():
            lr = run.matrix_lr if kind == "muon" else run.lr
            decay = run.weight_decay if kind == "muon" or detail else 0.0  # biases and norms do not decay
            groups.append(dict(params=params, kind=kind, shape=detail, lr=lr, highest_lr=lr, weight_decay=decay))
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            (self.step_muon if group["kind"] == "muon" else self.step_adamw)(group)

    def step_muon(self, group, momentum: float = 0.95):
        params, lr, (rows, cols) = group["params"], group["lr"], group["shape"]
        gradient = torch.cat([p.grad.view(-1, rows, cols) for p in params])  # (n, rows, cols)
        state = self.state[params[0]]  # of the whole stack
        average = state.setdefault("momentum", torch.zeros_like(gradient)).lerp_(gradient, 1 - momentum)
        update = orthogonalize(gradient.lerp(average, momentum).to(self.dtype)).to(gradient.dtype)  # (Nesterov)
        lr_of_shape = lr * max(1, rows / cols) ** 0.5
        for p, direction in zip(params, update.split([len(p) // rows for p in params])):
            p.mul_(1 - lr * group["weight_decay"]).sub_(direction.view_as(p), alpha=lr_of_shape)

    def step_adamw(self, group, betas=(0.9, 0.95), eps: float = 1e-8):
        """p -= lr * (mean of g) / (root of the mean of g^2), means over the last steps (Kingma & Ba 2015)."""
        params, states = group["params"], [self.state[p] for p in group["params"]]
        for p, state in zip(params, states):
            if not state:
                state.update(step=torch.zeros((), device=p.device), mean=torch.zeros_like(p), square=torch.zeros_like(p))
        adamw(
            params,
            [p.grad for p in params],
            [state["mean"] for state in states],
            [state["square"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,  # all in one kernel
            amsgrad=False,
            maximize=False,
            beta1=betas[0],
            beta2=betas[1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=eps,
        )


def schedule(step: int, run: TrainConfig) -> float:
    """The share of the highest learning rate at a step (from 0): up in a line, then down to zero."""
    if step < run.warmup_steps:
        return (step + 1) / (run.warmup_steps + 1)
    left = (run.max_steps - step) / max(run.max_steps - run.warmup_steps, 1)  # from 1 down to 0
    return left if run.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def choose_device(name: str) -> torch.device:
    """--device as a torch.device. Raises ValueError for one that is not there."""
    there = dict(cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind, available in there.items() if available)
    if not there[name]:
        raise ValueError(f"this PyTorch sees no {name} device; use --device cpu, or install PyTorch with {name}")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """--dtype as a torch.dtype. The weights are float32 anyway; this is what products are computed in."""
    from data import matmul_gflops

    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":  # a T4 (7.5) has no bfloat16
        return torch.bfloat16 if torch.cuda.get_device_capability()[0] >= 8 else torch.float16
    if device.type == "cpu" and matmul_gflops("cpu", torch.bfloat16) > 1.2 * matmul_gflops("cpu", torch.float32):
        return torch.bfloat16  # a processor with bfloat16 instructions
    return torch.float32


def autocast_to(dtype: torch.dtype, device: torch.device):
    """A context in which matrix products are computed in `dtype`; weights and sums stay float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def update(model, batch: dict, optimizer, scaler, autocast, run: TrainConfig) -> torch.Tensor:
    """One optimizer step; the batch is computed in parts of run.batch_size rows. Returns the loss per token."""
    model.train()
    rows = len(next(iter(batch.values())))
    device = next(model.parameters()).device
    loss, weight = 0.0, 0.0
    for i in range(0, rows, run.batch_size):
        part = {name: tensor[i : i + run.batch_size].to(device) for name, tensor in batch.items()}
        with autocast:
            part_loss, part_weight, _ = loss_sum(model, part)
        scaler.scale(part_loss / rows).backward()
        loss, weight = loss + part_loss.detach(), weight + part_weight
    scaler.unscale_(optimizer)
    # Only now the weight of the whole batch is known: from the sum per row to the mean per token; then clip.
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    factor = rows / weight
    if run.grad_clip:
        length = torch.nn.utils.get_total_norm(gradients) * factor
        factor = factor * (run.grad_clip / (length + 1e-6)).clamp(max=1)
    for gradient in gradients:
        gradient.mul_(factor)
    scaler.step(optimizer)  # in float16: unless a gradient overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return loss / weight


@torch.no_grad()
def evaluate(model, batches, autocast) -> dict[str, float]:
    """val_loss and the objective's metrics over all batches: each a quotient of two sums."""
    model.eval()
    device = next(model.parameters()).device
    sums = {}
    for batch in batches:
        with autocast:
            loss, weight, metrics = loss_sum(model, {name: tensor.to(device) for name, tensor in batch.items()})
        for name, (over, under) in {"val_loss": (loss, weight), **metrics}.items():
            total = sums.setdefault(name, [0.0, 0.0])
            total[0] += float(over)
            total[1] += float(under)
    return {name: over / under for name, (over, under) in sums.items()}


def load_checkpoint(path) -> dict:
    """A checkpoint of this model and, under "tokenizer", the tokenizer beside it. Runs no code from the file.

    Raises ValueError where it is something else, OSError where it cannot be read.
    """
    from bpe import Tokenizer

    path = Path(path)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        if checkpoint["name"] != NAME:
            raise ValueError(f"it was written by {checkpoint['name']}.py")
        Model(Config(**checkpoint["config"])).load_state_dict(checkpoint["model"])
    except FileNotFoundError:
        raise ValueError(f"there is no checkpoint {path}: train one, or name another with --init_from") from None
    except OSError:
        raise
    except Exception as error:  # a foreign file can fail in as many ways as there are
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise ValueError(f"{path} is no whole checkpoint of {NAME}.py: {reason}") from None
    return checkpoint | {"tokenizer": Tokenizer.load(path.with_name("tokenizer.json"))}


@contextlib.contextmanager
def interrupts():
    """Within it Ctrl-C only makes the yielded list true, so that no step is left half done; twice, it stops."""
    pressed = []

    def note(signal_number, frame):
        if pressed:
            raise KeyboardInterrupt
        pressed.append(signal_number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed
    finally:
        signal.signal(signal.SIGINT, before)


class Trainer:
    """A run: the corpus, the model and its optimizer, and where it stands.

    Step n's batch and dropout are drawn from (seed, n), so a resumed run goes on exactly as if it had never
    been stopped, and a checkpoint has to hold no generator's state.
    """

    def __init__(self, run: TrainConfig, config: Config, objective: ObjectiveConfig, checkpoint: dict | None = None):
        """checkpoint: what `load_checkpoint` returned for --init_from; its step is 0 unless it is a resumed run."""
        import data

        self.out_dir = Path(run.out_dir)
        self.device = choose_device(run.device)
        self.dtype = choose_dtype(run.dtype, self.device)
        if self.device.type == "cpu":
            data.keep_freed_memory()
        tokenizer = checkpoint["tokenizer"] if checkpoint else None
        self.corpus = data.prepare(run.data, config.vocab_size, SPECIAL_TOKENS, SEPARATOR, tokenizer)
        self.config, self.objective = replace(config, vocab_size=self.corpus.tokenizer.vocab_size), objective
        check_corpus(self.corpus, self.config, objective)
        rows = run.batch_size * run.grad_accum
        if run.epochs:
            steps = math.ceil(run.epochs * rows_per_epoch(self.corpus, self.config, objective) / rows)
            run = replace(run, max_steps=max(steps, 1))
        self.run, self.rows = replace(run, dtype=str(self.dtype).removeprefix("torch.")), rows

        torch.manual_seed(run.seed)
        self.model = Model(self.config).to(self.device)
        self.optimizer = Muon(self.model, run, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.autocast = autocast_to(self.dtype, self.device)
        self.step, self.best = 0, math.inf
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
            if run.init_from == "resume":
                self.step, self.best = checkpoint["step"], checkpoint["best_loss"]
                self.optimizer.load_state_dict(checkpoint["optimizer"])
                self.scaler.load_state_dict(checkpoint["scaler"])
        self.compiled = torch.compile(self.model) if run.compile else self.model
        self.log = data.RunLog(self.out_dir, self.step if run.init_from == "resume" else None)

    def train(self) -> bool:
        """Train until max_steps; False if Ctrl-C stopped it before. Either way ckpt.pt holds the last state."""
        run, since = self.run, time.perf_counter()
        self.begin()
        with interrupts() as pressed:
            losses = []
            while self.step < run.max_steps and not pressed:
                if self.step % run.eval_interval == 0 and self.step > 0:
                    self.evaluate_and_save()
                    since = time.perf_counter()
                losses.append(self.train_step())
                self.step += 1
                if self.step % run.log_interval == 0 or self.step == run.max_steps:
                    self.report(losses, time.perf_counter() - since)
                    losses, since = [], time.perf_counter()
                if run.snapshot_interval and self.step % run.snapshot_interval == 0:
                    self.save(f"ckpt_{self.step:06d}.pt")
            if self.step < run.max_steps:
                self.save("ckpt.pt")
                return False
            self.evaluate_and_save()
        return True

    def train_step(self) -> torch.Tensor:
        """One optimizer step on this step's batch; returns its loss per token."""
        run = self.run
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest_lr"] * schedule(self.step, run)
        torch.manual_seed(hash((run.seed, self.step)))  # for dropout
        batch = train_batch(self.corpus, self.config, self.objective, run.seed, self.step, self.rows)
        return update(self.compiled, batch, self.optimizer, self.scaler, self.autocast, run)

    def evaluate_and_save(self) -> None:
        """Evaluate, log, show a sample; keep the weights if they are the best so far; save the state."""
        batches = eval_batches(self.corpus, self.config, self.objective, self.run.batch_size)
        row = self.log.write(step=self.step, **evaluate(self.model, batches, self.autocast))
        self.log.say("  ".join([f"step {self.step}"] + [f"{k} {v:.4f}" for k, v in row.items() if k not in ("step", "seconds")]))
        if self.step < self.run.max_steps:
            self.log.say(*("    " + line for line in self.show(40).splitlines() if line))
        if row["val_loss"] < self.best:
            self.best = row["val_loss"]
            self.save("best.pt", weights_only=True)
        self.save("ckpt.pt")
        self.log.draw(f"{NAME}: loss per token, {self.step} of {self.run.max_steps} steps")

    def show(self, length: int) -> str:
        """A sample of what the model can do by now."""
        torch.manual_seed(self.run.seed)
        self.model.eval()
        with self.autocast:
            return demonstrate(self.model, self.corpus, length)

    def report(self, losses: list, seconds: float) -> None:
        """Log the mean loss since the last report. Raises ValueError when the run has come apart."""
        values = torch.stack(losses).tolist()
        broken = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if broken is not None:
            raise ValueError(
                f"the loss became {values[broken]} at step {self.step - len(values) + broken + 1}; the last good checkpoint "
                f"is kept in {self.out_dir}. Try half the --lr and --matrix_lr, a longer --warmup_steps, or --dtype float32"
            )
        loss, lr = sum(values) / len(values), schedule(self.step - 1, self.run) * self.run.lr
        speed = len(values) * self.rows * self.config.block_size / seconds
        self.log.write(step=self.step, loss=loss, lr=lr, tokens_per_second=round(speed))
        left = (self.run.max_steps - self.step) * seconds / len(values)
        self.log.progress(
            f"step {self.step}/{self.run.max_steps}  loss {loss:.3f}  {speed:,.0f} tokens/s  "
            f"{left // 60:.0f}:{left % 60:02.0f} left"
        )

    def begin(self) -> None:
        """Say what is about to happen; write run.json, tokenizer.json and, for a new run, the first ckpt.pt."""
        from data import replacing

        corpus, config, run = self.corpus, self.config, self.run
        with replacing(self.out_dir / "run.json", "w") as file:
            json.dump(asdict(config) | asdict(self.objective) | asdict(run), file, indent=1)
        corpus.tokenizer.save(self.out_dir / "tokenizer.json")
        weights = sum(p.numel() for p in self.model.parameters())
        self.log.say(
            f"data: {run.data}, {corpus.documents:,} document{'s' * (corpus.documents != 1)}; {len(corpus.train):,} tokens "
            f"to train on, {len(corpus.validation):,} to validate; vocabulary of {config.vocab_size:,}",
            f"model: {weights / 1e6:.2f} million parameters, on {self.device.type} in {run.dtype}; "
            f"{run.max_steps:,} steps of {self.rows} x {config.block_size} tokens",
        )
        if self.step:
            self.log.say(f"resumed at step {self.step}")
        else:
            self.save("ckpt.pt")

    def save(self, name: str, weights_only: bool = False) -> None:
        """Write a checkpoint into out_dir: tensors and plain types only. The old one stays until it is whole."""
        from data import replacing

        state = dict(
            name=NAME,
            step=self.step,
            best_loss=self.best,
            config=asdict(self.config),
            objective=asdict(self.objective),
            run=asdict(self.run),
            documents=self.corpus.documents,
            model=self.model.state_dict(),
        )
        if not weights_only:
            state |= dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
        with replacing(self.out_dir / name) as file:
            torch.save(state, file)


# ---------------------------------------------------------------------------------------------------
# 8. The command line
# ---------------------------------------------------------------------------------------------------


@dataclass
class LoadConfig:
    """Which weights, on which machine."""

    out_dir: str = f"out/{NAME}"  # a run's folder: its best.pt is taken, or else its ckpt.pt
    init_from: str = ""  # a checkpoint file, instead of those in out_dir
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the fastest there is
    seed: int = 0  # of random draws; another seed, another text


@dataclass
class EvalConfig:
    """What to evaluate on."""

    data: str = ""  # as in training; without it, what the model was trained on
    batch_size: int = 32  # sequences that are computed at once


def train_command(settings: dict, given: dict) -> int:
    """Train, from scratch, from a checkpoint's weights, or where a run was stopped."""
    init_from = settings["init_from"]
    checkpoint = None
    if init_from != "scratch":
        folder = Path(settings["out_dir"])
        if init_from == "resume" and not (folder / "ckpt.pt").exists():
            raise ValueError(f"nothing to resume in {folder}: no ckpt.pt; train with --init_from scratch, or set --out_dir")
        checkpoint = load_checkpoint(folder / "ckpt.pt" if init_from == "resume" else init_from)
        for name, value in checkpoint["config"].items():
            if name in given and given[name] != value and name != "dropout":
                raise ValueError(f"--{name} {given[name]} does not fit the checkpoint, which has {value}: leave it out")
        settings |= checkpoint["config"] | {k: v for k, v in given.items() if k == "dropout"}
        if init_from == "resume":
            settings |= checkpoint["objective"] | checkpoint["run"] | given
    from data import build

    config, objective, run = build(Config, settings), build(ObjectiveConfig, settings), build(TrainConfig, settings)
    trainer = Trainer(run, config, objective, checkpoint)
    again = "" if run.out_dir == f"out/{NAME}" else f" --out_dir {run.out_dir}"
    if not trainer.train():
        trainer.log.say(f"stopped at step {trainer.step}. To go on: python {NAME}.py --init_from resume{again}")
        return 130
    trainer.log.say(
        *("", trainer.show(300).strip(), ""),
        f"Done: {run.out_dir} holds the checkpoints, log.jsonl and loss.svg. Try next:",
        f"  python {NAME}.py generate{again}",
        f"  python {NAME}.py eval{again}",
        f"  python {NAME}.py --init_from resume --max_steps {2 * trainer.run.max_steps}{again}",
    )
    return 0


def load_model(load: LoadConfig):
    """(model, checkpoint, device, dtype): the weights that --init_from or --out_dir name."""
    from data import say

    paths = [load.init_from] if load.init_from else [Path(load.out_dir) / name for name in ("best.pt", "ckpt.pt")]
    path = next((path for path in paths if Path(path).exists()), paths[-1])
    checkpoint = load_checkpoint(path)
    say(f"{path}: step {checkpoint['step']}")
    device = choose_device(load.device)
    model = Model(Config(**checkpoint["config"])).to(device)
    model.load_state_dict(checkpoint["model"])
    return model.eval(), checkpoint, device, choose_dtype(load.dtype, device)


def eval_command(settings: dict, given: dict) -> int:
    """Print the validation loss and metrics of a model as a line of JSON."""
    from data import build, prepare

    load, options = build(LoadConfig, settings), build(EvalConfig, settings)
    model, checkpoint, device, dtype = load_model(load)
    source = options.data or checkpoint["run"]["data"]
    config, objective = Config(**checkpoint["config"]), build(ObjectiveConfig, checkpoint["objective"])
    corpus = prepare(source, config.vocab_size, SPECIAL_TOKENS, SEPARATOR, checkpoint["tokenizer"])
    batches = eval_batches(corpus, config, objective, options.batch_size)
    row = {"step": checkpoint["step"], **evaluate(model, batches, autocast_to(dtype, device))}
    print(json.dumps(row | {"perplexity": math.exp(min(row["val_loss"], 700))}))
    return 0


def generate_command(settings: dict, given: dict) -> int:
    """Let a model write."""
    from data import build

    model, checkpoint, _, dtype = load_model(build(LoadConfig, settings))
    torch.manual_seed(settings["seed"])
    write_samples(model.to(dtype), checkpoint, build(GenerateConfig, settings))
    return 0


def bench_command(settings: dict, given: dict) -> int:
    """Measure training and generation with random weights on random tokens; print a line of JSON."""
    import data

    config, objective, run = (data.build(cls, settings) for cls in (Config, ObjectiveConfig, TrainConfig))
    device = choose_device(run.device)
    dtype = choose_dtype(run.dtype, device)
    if device.type == "cpu":
        data.keep_freed_memory()
    model = Model(config).to(device)
    optimizer, autocast = Muon(model, run, dtype), autocast_to(dtype, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    compiled = torch.compile(model) if run.compile else model
    rows = run.batch_size * run.grad_accum
    corpus = data.random_corpus(config.vocab_size, (rows + 2) * (config.block_size + 1), SPECIAL_TOKENS)
    times = []
    while len(times) < 5 or (sum(times) < 8 and len(times) < 100):
        start = time.perf_counter()
        batch = train_batch(corpus, config, objective, run.seed, len(times), rows)
        update(compiled, batch, optimizer, scaler, autocast, run).item()
        times.append(time.perf_counter() - start)
    seconds = sorted(times[2:])[len(times[2:]) // 2]
    tokens = rows * config.block_size
    gflops = model.flops_per_token() * tokens / seconds / 1e9
    peak = data.matmul_gflops(device, dtype, 1024 if device.type == "cpu" else 8192, seconds=0.5)
    row = dict(ms_per_step=seconds * 1e3, tokens_per_second=tokens / seconds, gflops=gflops, matmul_gflops=peak)
    row |= dict(share=gflops / peak, peak_memory_mb=data.peak_memory_mb(device))
    print(json.dumps(row | generate_speeds(model.eval().to(dtype))))
    return 0


COMMANDS = {
    "train": (train_command, (Config, ObjectiveConfig, TrainConfig)),
    "generate": (generate_command, (GenerateConfig, LoadConfig)),
    "eval": (eval_command, (EvalConfig, LoadConfig)),
    "bench": (bench_command, (Config, ObjectiveConfig, TrainConfig)),
}


def run_command(arguments: list[str]) -> int:
    """Parse the command line and do what it says: defaults < --preset < --config < flags."""
    from data import Parser, add_flags, defaults_of, read_settings

    name = arguments[0] if arguments and not arguments[0].startswith("-") else "train"
    if name not in COMMANDS:
        raise ValueError(f"there is no command {name}: the commands are {', '.join(COMMANDS)}")
    command, classes = COMMANDS[name]
    parser = Parser(prog=f"{NAME}.py {name}", description=command.__doc__, allow_abbrev=False)
    parser.epilog = f"commands: {', '.join(COMMANDS)}; without one, train. python {NAME}.py COMMAND --help shows its flags."
    if Config in classes:
        parser.add_argument("--preset", default="laptop", help=f"a named size: {', '.join(PRESETS)} (default laptop)", metavar="")
        parser.add_argument("--config", help="a JSON file of settings, as run.json is; flags win over it", metavar="")
    for cls in classes:
        add_flags(parser, cls, PRESETS["laptop"])
    given = vars(parser.parse_args(arguments[1:] if arguments[:1] == [name] else arguments))
    settings = {}
    if Config in classes:
        preset, path = given.pop("preset"), given.pop("config")
        if preset not in PRESETS:
            raise ValueError(f"there is no preset {preset}: the presets are {', '.join(PRESETS)}")
        settings |= PRESETS[preset] | (read_settings(path, classes) if path else {})
    return command(defaults_of(classes) | settings | given, given)


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit status: 0 done, 2 the user's mistake (one line says which), 130 Ctrl-C."""
    try:
        return run_command(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        if error.name not in ("bpe", "data"):
            raise
        print(f"error: {error.name}.py is missing: put bpe.py and data.py beside {NAME}.py", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
