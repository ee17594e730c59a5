"""GPT: a decoder that reads text from left to right and predicts the next token at every position.

That is the whole objective. T + 1 tokens give T exercises at once, since a causal mask lets each
position see only itself and what came before:

    input    Once   upon   a      time   there
    target   upon   a      time   there  was

The architecture is GPT-2's. Each position holds a vector, the residual stream; it begins as the sum
of a token's and a position's embedding. Each block adds to it what attention brings (positions
exchange information) and then what a feed-forward network makes of it (each position by itself).
In the end a linear head turns it into a score for every token of the vocabulary, its logits.

    python gpt.py                                  train on input.txt: a few minutes on a laptop
    python gpt.py generate --prompt "Title: The"   write with what was trained
    python gpt.py eval                             loss and bits per byte on all validation text
    python gpt.py finetune                         learn to answer requests for a story
    python gpt.py ladder                           from a bigram to a GPT, in twelve steps
    python gpt.py generate --init_from gpt2        the published weights (or those in a folder)
    python gpt.py --help                           every command and flag

It reads from top to bottom: 1 this page, 2 the configuration, 3 layers, 4 the model, 5 pretraining,
6 fine-tuning, 7 published weights, 8 the ladder, 9 training. Copied alone, it gives `GPT` and
`GPTConfig`; its commands need bpe.py and data.py beside it. To learn, change things: `--pos none`
(what does it cost?), `--n_head 1`; `causal=False` in Attention.forward (the loss falls to 0: why?).

Papers: Radford et al. 2018 (GPT), 2019, "Language Models are Unsupervised Multitask Learners"
(GPT-2); Vaswani et al. 2017, https://arxiv.org/abs/1706.03762 (attention).
"""

import codecs
import json
import math
import os
import re
import sys
import textwrap
import time
from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

# Threads wait for each other by spinning. Beside another program, which has the core of the one
# they wait for, a step took 20 times as long. So they soon sleep. (It is read with `import torch`.)
os.environ.setdefault("GOMP_SPINCOUNT", "16000")

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

# 2. The configuration -----------------------------------------------------------------------------


def check(config, **bounds):
    """Raises ValueError where a field of the dataclass is of another type than declared, none of
    its choices, or out of its bounds: least, or (least, most)."""
    for option in fields(config):
        value, kinds = getattr(config, option.name), get_args(option.type) or (option.type,)
        whole = type(value) is int and float in kinds  # 1 does for 1.0
        if not whole and type(value) not in kinds and value not in kinds:  # types, or choices
            names = ", ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
            raise ValueError(f"{option.name} cannot be {value!r}: it is one of {names}")
        bound = bounds.get(option.name, -math.inf)
        least, most = bound if type(bound) is tuple else (bound, math.inf)
        if type(value) in (int, float) and not least <= value <= most:
            limit = f"at least {least}" if most == math.inf else f"between {least} and {most}"
            raise ValueError(f"{option.name} has to be {limit}, not {value}")


@dataclass
class GPTConfig:
    """The architecture. Defaults are GPT-2's, but for dropout (there 0.1); the rest is variants.

    Raises ValueError for sizes that do not fit together.
    """

    vocab_size: int  # token types: special tokens + 256 bytes + merges
    block_size: int  # longest context, in tokens
    n_layer: int  # blocks
    n_head: int  # attention heads in a block
    n_embd: int  # width of the residual stream
    n_ff: int | None = None  # width inside a feed-forward (default 4 * n_embd; 0: no feed-forward)
    head_dim: int | None = None  # width of a head's queries and keys (default n_embd / n_head)
    value_dim: int | None = None  # width of a head's values (default head_dim)
    dropout: float = 0.0  # share of activations zeroed in training
    bias: bool = True  # biases in linear layers and norms
    pos: Literal["learned", "sinusoidal", "rotary", "none"] = "learned"  # how positions are marked
    norm: Literal["pre", "post", "none"] = "pre"  # LayerNorm before or after each sublayer
    act: Literal["gelu", "relu"] = "gelu"  # non-linearity of the feed-forward
    residual: bool = True  # add each sublayer's output to its input
    tie: bool = True  # the head uses the token embedding's weights
    layers: dict | None = None  # blocks that differ, {"0": {"n_ff": 0}, "3": {"n_head": 8}}

    def __post_init__(self):
        check(self, vocab_size=1, block_size=1, n_layer=0, n_head=1, n_embd=1, n_ff=0, head_dim=1,
              value_dim=1, dropout=(0, 1))
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"change n_embd {self.n_embd}: no multiple of n_head {self.n_head}")
        width = self.head_dim or self.n_embd // self.n_head
        if self.pos == "rotary" and width % 2:
            raise ValueError(f"rotary positions turn pairs: head_dim, here {width}, has to be even")
        free = set("n_head n_ff head_dim value_dim dropout bias norm act residual".split())
        for i, own in (self.layers or {}).items():
            known = isinstance(own, dict) and free.issuperset(own)
            if not known or i not in map(str, range(self.n_layer)):
                raise ValueError(f"layers: {i}: {own} is not a block and some of {sorted(free)}")
            self.block(int(i))

    def block(self, i: int) -> "GPTConfig":
        """The settings of block i: these, but for what `layers` says about it."""
        return replace(self, layers=None, **(self.layers or {}).get(str(i), {}))


Config, NAME = GPTConfig, "gpt"  # by these names, what all three files have is the same text

PRESETS = {  # sizes, and what goes with them in training; the first is the default
    "laptop": dict(vocab_size=4096, block_size=128, n_layer=4, n_head=4, n_embd=256,
                   max_steps=500, batch_size=16, lr=0.01, matrix_lr=0.03, weight_decay=0.3),
    "shakespeare": dict(data="shakespeare", vocab_size=1536, block_size=128, n_layer=4, n_head=4,
                        n_embd=256, dropout=0.1, max_steps=1600, batch_size=16, lr=0.006,
                        matrix_lr=0.02, weight_decay=0.3, eval_interval=80),  # nanoGPT's exercise
    "t4": dict(vocab_size=8192, block_size=512, n_layer=8, n_head=8, n_embd=512,  # for that GPU
               max_steps=3000, batch_size=32, lr=0.005, matrix_lr=0.02, eval_interval=250),
    "gpt2": dict(vocab_size=50304, block_size=1024, n_layer=12, n_head=12, n_embd=768),  # 124 M
    "gpt2-medium": dict(vocab_size=50304, block_size=1024, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(vocab_size=50304, block_size=1024, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(vocab_size=50304, block_size=1024, n_layer=48, n_head=25, n_embd=1600),
}
ADAMW = dict(lr=0.002, warmup_steps=100)  # what --optimizer adamw takes, for all weights
FINETUNING = {  # section 9's data.Run explains the fields
    "laptop": dict(epochs=4.0, batch_size=16, optimizer="adamw", lr=0.003),
    "published": dict(epochs=3.0, batch_size=8, optimizer="adamw", lr=3e-5, warmup_steps=50,
                      weight_decay=0.01),  # for models 512 wide and more
    # Without --data: the held-out loss rises from the second epoch on; yet only then does the model
    # do what the prompt says (Ouyang et al. 2022, 3.5, saw the same). So the last one is the best.
    "": dict(eval_interval=1000),
}

# 3. Layers, from the bottom up --------------------------------------------------------------------
# Shapes: B texts of T tokens, S tokens that they look at; C = n_embd numbers for each token; nh
# heads, each with hd numbers for a query or a key, and vd for a value; V = vocab_size.

LONG = 1024  # number of queries from which the fused attention is faster on a CPU, too


def drop(x, p: float):
    """Dropout: zero a share p of the numbers, and scale the others so that the mean stays. (A byte
    decides: to draw a number for each is slow on a CPU. So p is rounded to a multiple of 1/256.)"""
    zeroed = round(256 * p)  # of the 256 values of a byte
    if zeroed in (0, 256) or x.device.type != "cpu":
        return F.dropout(x, p) if p else x
    random = torch.empty(x.numel() // 8 + 1, dtype=torch.int64).random_(-(2**63), None)
    kept = random.view(torch.int8)[: x.numel()].view_as(x).ge_(zeroed - 128)  # 1 or 0
    return x * kept.to(x.dtype).mul_(256 / (256 - zeroed))


def attention(query, key, value, bias=None, causal=False, scale=None, dropout=0.0):
    """softmax(Q K^T * scale + bias) V: per query a weighted mean of the values (Vaswani, 3.2.1).

    A query says what a position looks for, a key what one offers, a value what it passes on.
    query (B, nh, T, hd), key (B, nh, S, hd), value (B, nh, S, vd) -> (B, nh, T, vd). bias (BERT and
    T5 have one) is added to the scores and broadcasts to (B, nh, T, S). causal: the last query sees
    all S keys, the one before it S - 1, and so on. scale: 1 / sqrt(hd) unless given, so that the
    scores of a wider head are no larger.

    The formula is the last three lines. In bfloat16 on a CPU it is 2.5 (T = 128) to 1.4 times (512)
    as fast as PyTorch's fused kernel: that is taken on a GPU, for LONG texts, for one query."""
    T, S, device = query.size(-2), key.size(-2), query.device.type
    scale = query.size(-1) ** -0.5 if scale is None else scale
    fused = device == "cuda" or device == "cpu" and (T >= LONG or T == 1)
    if causal and (T != S or bias is not None or not fused):  # the kernel's own mask: T = S
        # -inf, a weight of 0, right of the diagonal that ends in the last key: [0 0 -inf, 0 0 0]
        future = query.new_full((T, S), -math.inf).triu(1 + S - T)  # (T, S)
        bias, causal = future if bias is None else bias + future, False
    if fused:
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, causal, scale=scale)
    scores = (query * scale) @ key.mT  # (B, nh, T, S)
    weights = F.softmax(scores if bias is None else scores + bias, dim=-1)
    return drop(weights, dropout) @ value  # (B, nh, T, vd); (dropout is 0 outside training)


def sinusoids(length: int, width: int, base: float = 10000) -> torch.Tensor:
    """(length, width): row t has sin, cos of t / base^(2i / width), i = 0, 1, ... (Vaswani 3.5)."""
    frequency = base ** (-torch.arange(0, width, 2) / width)  # (width / 2,)
    angle = torch.arange(length)[:, None] * frequency  # (length, width / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


def rotate(x, turns):
    """Rotary positions: turn pair i of the numbers at position t by the angle t / 10000^(2i / hd),
    so that the product of a query and a key depends on how far apart they are, and not on where
    they are (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    x (B, nh, T, hd), turns (T, hd) the `sinusoids` of their positions -> (B, nh, T, hd)."""
    sin, cos = turns[:, ::2].to(x.dtype), turns[:, 1::2].to(x.dtype)  # (T, hd / 2)
    left, right = x.chunk(2, dim=-1)  # number i makes a pair with number i + hd / 2
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


class KVCache:
    """One attention layer's keys and values of all tokens so far: none is computed twice."""

    def __init__(self, size: int):
        self.size, self.length = size, 0  # tokens that it can hold, that it holds

    def append(self, key, value):
        """key (B, nh, T, hd), value (B, nh, T, vd) of T new tokens -> those of all so far."""
        if self.length == 0:
            B, nh, _, hd = key.shape
            dtype = torch.float32 if key.device.type == "cpu" else key.dtype  # fastest for 1 query
            self.keys = key.new_empty(B, nh, self.size, hd, dtype=dtype)
            self.values = key.new_empty(B, nh, self.size, value.size(-1), dtype=dtype)
        end = self.length + key.size(2)
        self.keys[:, :, self.length : end], self.values[:, :, self.length : end] = key, value
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]


class Attention(nn.Module):
    """Causal self-attention: nh attentions side by side, each with queries, keys and values of its
    own (Vaswani, 3.2.2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        hd = config.head_dim or config.n_embd // config.n_head
        keys, values = config.n_head * hd, config.n_head * (config.value_dim or hd)
        self.widths = [keys, keys, values]  # of all heads' queries, keys, values
        self.qkv = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)  # three maps in one
        self.qkv.weight.maps = 3 * self.n_head if keys == values else 1  # matrices for Muon (9)
        self.proj = nn.Linear(values, config.n_embd, bias=config.bias)
        turns = sinusoids(config.block_size, hd) if config.pos == "rotary" else None
        self.register_buffer("turns", turns, persistent=False)  # (block_size, hd)

    def forward(self, x, cache: KVCache | None = None):
        """x (B, T, C): with a cache, of the tokens that it does not hold yet -> (B, T, C)."""
        T, start = x.size(1), cache.length if cache else 0
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, nh, T, hd or vd)
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        if self.turns is not None:
            turns = self.turns[start : start + T]
            query, key = rotate(query, turns), rotate(key, turns)
        if cache:
            key, value = cache.append(key, value)
        mixed = attention(query.to(key.dtype), key, value, causal=T > 1,  # (one sees all there is)
                          dropout=self.dropout * self.training)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2).to(query.dtype))  # (B, T, C)
        return drop(mixed, self.dropout * self.training)


class FeedForward(nn.Module):
    """Two linear layers and a non-linearity, the same everywhere: C -> n_ff -> C (Vaswani, 3.3)."""

    def __init__(self, config: Config):
        super().__init__()
        self.act, self.dropout = config.act, config.dropout
        width = config.n_ff or 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, width, bias=config.bias)
        self.down = nn.Linear(width, config.n_embd, bias=config.bias)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        inner = self.up(x)  # (B, T, n_ff); gelu: approximated as in GPT-2 (BERT's is exact)
        inner = F.gelu(inner, approximate="tanh") if self.act == "gelu" else F.relu(inner)
        return drop(self.down(inner), self.dropout * self.training)  # (B, T, C)


def make_norm(config: Config):
    """LayerNorm: a position's C numbers get mean 0, variance 1, then a learned scale and shift."""
    return nn.LayerNorm(config.n_embd, bias=config.bias) if config.norm != "none" else nn.Identity()


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream x: x + sublayer(norm(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.attn, self.attn_norm = Attention(config), make_norm(config)
        if config.n_ff != 0:
            self.mlp, self.mlp_norm = FeedForward(config), make_norm(config)

    def add(self, x, sublayer, norm):
        """GPT-2's pre-norm x + sublayer(norm(x)), or post-norm norm(x + sublayer(x));
        residual=False leaves out x +."""
        y = sublayer(norm(x) if self.config.norm == "pre" else x)
        y = x + y if self.config.residual else y
        return norm(y) if self.config.norm == "post" else y

    def forward(self, x, cache: KVCache | None = None):
        """x (B, T, C) -> (B, T, C)."""
        x = self.add(x, lambda h: self.attn(h, cache), self.attn_norm)
        return self.add(x, self.mlp, self.mlp_norm) if self.config.n_ff != 0 else x


# 4. The model -------------------------------------------------------------------------------------


class GPT(nn.Module):
    """Embeddings, blocks, a last norm, and the head that scores every token as the next one."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        elif config.pos == "sinusoidal":
            table = sinusoids(config.block_size, config.n_embd)
            self.register_buffer("positions", table, persistent=False)
        self.blocks = nn.ModuleList(Block(config.block(i)) for i in range(config.n_layer))
        # Pre-norm leaves the stream itself as it is, so the head gets it normalized.
        self.norm = make_norm(config) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        # Ids that `stream` must not draw; data.py fills it, where the tokenizer cannot spell some.
        self.register_buffer("never", torch.zeros(0, dtype=torch.long), persistent=False)
        self.apply(self.init_weights)
        for name, weight in self.named_parameters():
            if name.endswith(("proj.weight", "down.weight")):
                # 2 * n_layer of them add up in the stream: it is to grow no larger (GPT-2, 2.3).
                nn.init.normal_(weight, std=0.02 / math.sqrt(2 * config.n_layer))
        if config.tie:
            self.head.weight = self.token_embedding.weight

    @staticmethod
    def init_weights(module):
        """Normal with std 0.02, as GPT-2; but 0.05 for embeddings (and a tied head), so that tokens
        differ from the first step on. Biases are 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05 if isinstance(module, nn.Embedding) else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def hidden(self, idx, caches: list[KVCache] | None = None):
        """idx (B, T) int64; with caches, one for each block, only the tokens that are not in them
        yet -> (B, T, C) after the last norm. Raises ValueError beyond block_size."""
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens are more than block_size {self.config.block_size}")
        x = self.token_embedding(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.position_embedding.weight[start:end]  # + (T, C)
        elif self.config.pos == "sinusoidal":
            x = x + self.positions[start:end]
        x = drop(x, self.config.dropout * self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, caches[i] if caches else None)
        return self.norm(x)

    def forward(self, idx, targets=None, weights=None):
        """idx (B, T) int64 -> logits (B, T, V), and the mean loss, or None without targets (B, T).

        targets[b, t] is the token that follows idx[b, t]; where it is -100 nothing is asked.
        weights (B,): how much each row counts (6). Raises ValueError beyond block_size.
        """
        logits = self.head(self.hidden(idx))
        if targets is None:
            return logits, None
        loss = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        counts = (targets != -100) * (1.0 if weights is None else weights[:, None])  # (B, T)
        return logits, (loss * counts.flatten()).sum() / counts.sum().clamp(min=1)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=None,
               use_cache=True):
        """Continue each row of idx (B, T) int64, T >= 1: yield the rows' next token, (B,) int64,
        max_new_tokens times, or until each row has had the token `stop`; after it a row gets no
        other. temperature, top_k, top_p: see `sample`. use_cache=False: slow, the same result.

        When the context is full, its older half is dropped and the rest computed again, since
        learned positions belong to places in the window. Raises ValueError for other shapes.
        """
        if idx.ndim != 2 or not idx.numel():
            raise ValueError(f"idx has to be (B, T) with T at least 1, not {tuple(idx.shape)}")
        self.eval()  # no dropout
        size, caches, done = self.config.block_size, [], torch.zeros_like(idx[:, 0], dtype=bool)
        idx = idx[:, -size:]  # the window
        for _ in range(max_new_tokens):
            if idx.size(1) > size:
                idx, caches = idx[:, -max(size // 2, 1) :], []
            new = idx[:, -1:] if caches else idx
            if use_cache and not caches:
                caches = [KVCache(size) for _ in self.blocks]
            torch.backends.mkldnn.enabled = new.numel() > 1  # slow for one bfloat16 vector
            try:
                with torch.inference_mode():  # a twentieth faster
                    logits = self.head(self.hidden(new, caches)[:, -1])  # (B, V)
            finally:
                torch.backends.mkldnn.enabled = True
            token = sample(logits.index_fill(1, self.never, -math.inf), temperature, top_k, top_p)
            if stop is not None:
                token = token.masked_fill(done, stop)
                done |= token == stop
            yield token
            if stop is not None and done.all():
                return
            idx = torch.cat((idx, token[:, None]), dim=1)

    def generate(self, idx, max_new_tokens, *how, **options):
        """idx (B, T) int64 and n <= max_new_tokens more, (B, T + n). Arguments: see `stream`."""
        columns = self.stream(idx, max_new_tokens, *how, **options)
        return torch.cat((idx, *(column[:, None] for column in columns)), dim=1)


def sample(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    """Draw a token from each row of logits (B, V) -> (B,) int64. temperature 0 takes the likeliest.

    top_k: only among the k likeliest; top_p: only among the likeliest that together have
    probability p (nucleus sampling, Holtzman et al. 2019, https://arxiv.org/abs/1904.09751)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    likeliest, token = logits.float().topk(k)  # (B, k), in descending order
    probability = F.softmax(likeliest / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        before = probability.cumsum(dim=-1) - probability  # of all likelier ones; 0 for the first
        probability = probability.masked_fill(before >= top_p, 0.0)
    # As torch.multinomial, but faster: argmax(p / e), e exponential, is i with probability p[i].
    drawn = (probability / torch.empty_like(probability).exponential_()).argmax(-1, keepdim=True)
    return token.gather(-1, drawn)[:, 0]  # (B,)


Model = GPT

# 5. Pretraining: predict the next token -----------------------------------------------------------

SPECIAL_TOKENS = ["<|endoftext|>"]
SEPARATOR = "<|endoftext|>"  # before the first document, between documents and after the last


@dataclass
class GenerateConfig:
    """What to write, and how freely."""

    prompt: str = ""  # the text to continue, or to answer; without it, a new document
    max_new_tokens: int = 500  # how many tokens at most
    temperature: float | None = None  # 0 always the likeliest, 1 daring (default 0.8; answers 0.3)
    top_k: int = 50  # choose among the k likeliest tokens (0: among all)
    top_p: float = 1.0  # choose among the likeliest tokens that together have this probability
    num_samples: int = 1  # how many texts

    def __post_init__(self):
        check(self, max_new_tokens=1, temperature=0, top_k=0, top_p=(0.001, 1), num_samples=1)


def continuations(model: Model, tokenizer, prompt: str, ids: list[int], options: GenerateConfig):
    """Yield the prompt and what follows its tokens `ids`, up to the end of the document: part by
    part; of several texts, all at once, with an empty line between them."""
    end, temperature = tokenizer.special[SEPARATOR], options.temperature
    idx = torch.tensor([ids] * options.num_samples, device=model.head.weight.device)
    columns = model.stream(idx, options.max_new_tokens, 0.8 if temperature is None else temperature,
                           options.top_k or None, options.top_p, stop=end)
    if options.num_samples > 1:
        rows = torch.stack(list(columns), dim=1).tolist()
        yield "\n\n".join(prompt + tokenizer.decode([x for x in row if x != end]) for row in rows)
        return
    yield prompt
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character
    for token in (column.tolist() for column in columns):  # (waits for the device, once)
        yield decoder.decode(tokenizer.decode_bytes([] if token == [end] else token))
    yield decoder.decode(b"", final=True)


@dataclass
class Pretraining:
    """What to learn from: windows of a text. (Section 9 says what it asks of such a class.)"""

    stride: int | None = None  # windows begin so many tokens apart (default block_size)

    def __post_init__(self):
        check(self, stride=1)

    def open(self, run, config: Config, tokenizer, corpus=None) -> Config:
        """Remember what prompts depend on; to train or evaluate, take a text, see data.Corpus
        -> the architecture for it. Raises ValueError where it does not fill a window."""
        from data import Batches

        self.run, self.T, self.tokenizer = run, config.block_size, tokenizer
        if corpus is None:
            return config
        self.corpus, self.description = corpus, str(corpus)
        if len(corpus.train) <= self.T or len(corpus.validation) < 2:
            raise ValueError(f"{corpus}: too short for windows of {self.T}; give more text, or a "
                             "smaller --block_size")
        # How many bytes each token spells, (V,); special tokens spell none.
        sizes = [len(tokenizer.spelling.get(i, "")) for i in range(tokenizer.vocab_size)]
        self.spelled = np.array(sizes)
        # An epoch's windows are one less than fit, so that there is room for a random offset.
        self.rows = max((len(corpus.train) - 1 - self.T) // (self.stride or self.T), 1)
        self.order = Batches(np.ones(self.rows))  # all of one length
        return config

    def batch(self, step: int) -> dict:
        """A step's batch: idx and targets, (rows, T) int64. It depends on (seed, step) alone. An
        epoch lays windows one after the other, from a random offset, and takes all of them."""
        row, shift = self.order.chosen(self.run, step)  # (rows,); shift from [0, 1)
        stride, tokens = self.stride or self.T, self.corpus.train
        room = len(tokens) - (self.rows - 1) * stride - self.T
        begin = int(shift * room) + row * stride
        window = tokens[begin[:, None] + np.arange(self.T + 1)].astype(np.int64)  # (rows, T + 1)
        return dict(idx=torch.from_numpy(window[:, :-1]), targets=torch.from_numpy(window[:, 1:]))

    def eval_batches(self, rows: int, most: int | None = None):
        """Yield the validation part in windows: each token but the first is a target once. most:
        of a large part, about so many tokens, evenly spread. bytes (rows, T): of each target."""
        from data import sliding_windows, spread

        tokens, T = self.corpus.validation, self.T
        for begin in spread(math.ceil((len(tokens) - 1) / T), rows, most and most // T):  # (rows,)
            windows = [sliding_windows(tokens[i * T : (i + 1) * T + 1], T, T, 0) for i in begin]
            idx, targets = (np.concatenate(parts) for parts in zip(*windows))
            spelled = np.where(targets >= 0, self.spelled[targets], 0)
            arrays = dict(idx=idx, targets=targets, bytes=spelled)
            yield {name: torch.from_numpy(array) for name, array in arrays.items()}

    def asked(self, batch: dict) -> torch.Tensor:
        """How many answers a batch asks for: its mean loss is a mean over so many."""
        return (batch["targets"] != -100).sum().float()

    def loss(self, model: Model, batch: dict):
        """The mean loss, and measures, each a pair of sums: -log2 p per byte of text."""
        loss = model(batch["idx"], batch["targets"])[1]
        if "bytes" not in batch:  # (in training)
            return loss, {}
        bits = loss * self.asked(batch) / math.log(2)
        return loss, dict(bits_per_byte=(bits, batch["bytes"].sum()))

    def answer(self, model: Model, options: GenerateConfig):
        """Yield the prompt and what the model writes behind it, part by part; without one, a new
        document. Raises ValueError for a prompt that is longer than the context."""
        ids = self.tokenizer.encode(options.prompt) or [self.tokenizer.special[SEPARATOR]]
        if len(ids) > self.T:
            raise ValueError(f"the prompt has {len(ids)} tokens, the context {self.T}: shorten it")
        yield from continuations(model, self.tokenizer, options.prompt, ids, options)

    def demonstrate(self, model: Model, length: int) -> str:
        """A sample for the log."""
        return "".join(self.answer(model, GenerateConfig(max_new_tokens=length)))


# 6. Fine-tuning: answer a prompt ------------------------------------------------------------------


@dataclass
class Finetuning:
    """Answer a prompt: <|endoftext|> prompt, line break, response <|endoftext|>. The loss is on the
    response and the <|endoftext|> behind it alone: so the model learns to answer, and to end, but
    not to ask. Where responses are rated, from 1 to 5, each token's loss weighs as much.
    (Methods without a text are those of Pretraining.)"""

    min_rating: float = 0.0  # leave out responses with a lower rating

    columns, optional = ("prompt", "response"), ("rating",)
    demonstrations = ("",)  # what --data can be beside a table

    @staticmethod
    def from_story(story: dict, source: str) -> list[dict]:
        """The demonstration: a request for a story -> its first paragraph."""
        prompt = f"Tell me a story about the {story['topic']}: {story['title']}"
        return [dict(prompt=prompt, response=story["text"].partition("\n\n")[0])]

    def open(self, run, config: Config, tokenizer, parts=None) -> Config:
        """parts: the rows (dicts of columns) to learn from, and those held out -> config."""
        from data import Examples

        self.run, self.T, self.tokenizer = run, config.block_size, tokenizer
        if parts is None:
            return config
        self.train, self.held_out = (
            Examples([row for row in part if self.rating(row) >= self.min_rating], self.encode)
            for part in parts
        )
        self.rows, self.description = len(self.train.rows), self.train.describe(self.held_out)
        return config

    @staticmethod
    def rating(row: dict) -> float:
        """Raises ValueError for none from 1 to 5. (Where no row has one, all count alike.)"""
        rating = row.get("rating", "5")
        if not re.fullmatch(r"[1-4](\.\d*)?|5(\.0*)?", rating):
            raise ValueError(f"{row['place']}: rating {rating!r} is no number from 1 to 5")
        return float(rating)

    def prompt_ids(self, prompt: str) -> list[int]:
        """What stands before a response; of a long prompt the end, up to half of the context."""
        ids = self.tokenizer.encode(prompt) + self.tokenizer.encode("\n")
        return [self.tokenizer.special[SEPARATOR], *ids[-max(self.T // 2 - 1, 1) :]]

    def encode(self, row: dict) -> dict:
        """A row as idx and targets (T,). What does not fit is cropped at its end."""
        prompt = self.prompt_ids(row["prompt"])
        response = [*self.tokenizer.encode(row["response"]), self.tokenizer.special[SEPARATOR]]
        response = response[: self.T + 1 - len(prompt)]
        return dict(idx=(prompt + response)[:-1], targets=[-100] * (len(prompt) - 1) + response,
                    weight=self.rating(row), length=len(prompt) + len(response))

    def collate(self, examples: list[dict]) -> dict:
        """-> a batch: idx, targets (B, T) int64, weights (B,). Padding is on the right, where the
        causal mask hides it from every token that is asked for."""
        from data import pad

        return dict(idx=pad([example["idx"] for example in examples], 0),
                    targets=pad([example["targets"] for example in examples], -100),
                    weights=torch.tensor([example["weight"] for example in examples]))

    def batch(self, step: int) -> dict:
        return self.collate(self.train.batch(self.run, step))

    def eval_batches(self, rows: int, most: int | None = None):
        return map(self.collate, self.held_out.in_order(rows))  # (all, however many)

    def asked(self, batch: dict) -> torch.Tensor:
        return ((batch["targets"] != -100) * batch["weights"][:, None]).sum()

    def loss(self, model: Model, batch: dict):
        return model(batch["idx"], batch["targets"], batch["weights"])[1], {}

    def answer(self, model: Model, options: GenerateConfig):
        """Yield what the model answers, until it ends, or the context does."""
        ids = self.prompt_ids(options.prompt)
        room, temperature = self.T + 1 - len(ids), options.temperature
        options = replace(options, max_new_tokens=min(options.max_new_tokens, room),
                          temperature=0.3 if temperature is None else temperature)
        yield from continuations(model, self.tokenizer, "", ids, options)

    def demonstrate(self, model: Model, length: int) -> str:
        """The answer to a held-out prompt."""
        prompt = self.held_out.rows[0]["prompt"]
        options = GenerateConfig(prompt=prompt, max_new_tokens=length)
        return f"{prompt}\n{''.join(self.answer(model, options))}"


# 7. Published weights: GPT-2's names for ours -----------------------------------------------------

FIXED = dict(  # settings of `config.json` that have one value here
    model_type="gpt2", layer_norm_epsilon=1e-5, scale_attn_weights=True,
    scale_attn_by_inverse_layer_idx=False, add_cross_attention=False,
)
NO_WEIGHTS, HEAD = r".*\.attn\.(masked_)?bias", "$^"  # masks in old files; what may be missing
ROLES = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")  # of special tokens
NEVER, TEMPLATE = (), ["A", "B"]  # special tokens that are never drawn; around texts is nothing

NAMES = [  # what our names have (a regular expression) -> what GPT-2's have there
    ("^token_embedding", "transformer.wte"), ("^position_embedding", "transformer.wpe"),
    ("^blocks", "transformer.h"), ("attn_norm", "ln_1"), ("qkv", "c_attn"),
    ("attn.proj", "attn.c_proj"), ("mlp_norm", "ln_2"), ("mlp.up", "mlp.c_fc"),
    ("mlp.down", "mlp.c_proj"), ("^norm", "transformer.ln_f"), ("^head", "lm_head"),
]


def as_published(model: Model, name: str, weight) -> dict:
    """A weight by its published name, in the published shape. (GPT-2's matrices are (in, out), as
    in its code's Conv1D; those of nn.Linear are (out, in). To load, data.py copies into these.)"""
    return {name: weight.T if weight.ndim == 2 and ".h." in name else weight}


def published_name(name: str) -> str:
    """The name of a tensor in a file of weights, old ones included -> its published name."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def to_published(config: Config) -> dict:
    """Our settings as `config.json` has them. Raises ValueError where GPT-2 has no such variant."""
    gpt2 = replace(config, bias=True, pos="learned", norm="pre", residual=True, layers=None)
    widths = {None, config.n_embd // config.n_head, config.head_dim, config.value_dim}
    if config != gpt2 or config.n_ff == 0 or len(widths) > 2:  # (None: the usual width)
        raise ValueError("transformers has no class for this variant: GPT-2 has learned positions, "
                         "pre-norm, residuals, biases, heads as wide as n_embd / n_head")
    return dict(
        architectures=["GPT2LMHeadModel"], vocab_size=config.vocab_size,
        n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=config.n_ff,
        activation_function="gelu_new" if config.act == "gelu" else "relu",
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        tie_word_embeddings=config.tie, bos_token_id=0, eos_token_id=0,
    )


def from_published(found: dict, names) -> Config:
    """What `config.json` says, and the names of the weights -> our settings."""
    acts = dict(gelu_new="gelu", gelu_pytorch_tanh="gelu", relu="relu")
    if (act := found.get("activation_function", "gelu_new")) not in acts:
        raise ValueError(f"activation_function is {act}, none of {', '.join(acts)}")
    return Config(
        found["vocab_size"], found.get("n_positions", found.get("n_ctx", 1024)), found["n_layer"],
        found["n_head"], found["n_embd"], n_ff=found.get("n_inner"),
        dropout=found.get("resid_pdrop", 0.1), act=acts[act],
        tie=found.get("tie_word_embeddings", True),
    )


# 8. The ladder: from a bigram to a GPT in twelve steps --------------------------------------------

FIRST_STEP = dict(  # two tables: what a token is, and what follows such a token
    n_layer=0, n_head=1, n_embd=64, n_ff=0, pos="none", norm="none", residual=False, tie=False,
)
LADDER = [  # name, what changes (the last one: several things), and what to see
    ("bigram", {},
     "Guesses from the last token alone: the best that can be done without looking further back."),
    ("one attention head", dict(n_layer=1, pos="learned"),
     "Now a position can fetch something from those before it. But what it fetches takes the place "
     "of the token itself, so hardly anything is gained."),
    ("several heads", dict(n_head=4),
     "Four narrower heads look at four places at once, for the same number of weights."),
    ("+ feed-forward", dict(n_ff=64),
     "Each position can now compute something that is not linear. But the result takes the place "
     "of what was fetched: there is hardly a gain, and in a short run a loss."),
    ("three blocks", dict(n_layer=3),
     "Deeper should be better, and is much worse: each block passes on nothing but its own output. "
     "What the first one saw has to survive two more, and the gradient the same way back."),
    ("+ residuals", dict(residual=True),
     "Each sublayer adds to a stream: tokens and gradients have a direct way, and depth pays."),
    ("wider feed-forward", dict(n_ff=256),
     "Four times as wide, as in GPT-2 and BERT. Most of a transformer's weights are here."),
    ("post-LN", dict(norm="post"),
     "LayerNorm after each sublayer, as in the first transformer and in BERT: numbers stay in "
     "range, so steps can be long; but the direct way is bent at each of them."),
    ("pre-LN", dict(norm="pre"),
     "LayerNorm before each sublayer, as in GPT-2, and the stream itself is left alone. With three "
     "blocks that is much the same; with thirty only this one trains without special care."),
    ("dropout", dict(dropout=0.1),
     "A tenth of the activations is zeroed, against learning by heart; a short run learns none."),
    ("deeper", dict(n_layer=6),
     "Twice the blocks, for twice the time. What that can do shows in longer runs."),
    ("the full model", dict(n_embd=128, n_ff=512, dropout=0.0, pos="rotary", tie=True),
     "Twice as wide; rotary positions, by which a head sees distances; one table of embeddings."),
]
LADDER_RUN = dict(out_dir=f"out/{NAME}-ladder", data="input.txt", vocab_size=257, block_size=64,
                  max_steps=300, batch_size=32, lr=0.02, matrix_lr=0.03)  # 257: bytes


def climb(config: Config, task: Pretraining, run, device, dtype, autocast, scaler):
    """One step of the ladder -> (its row of ladder.json, its curve [(step, loss), ...])."""
    start = time.perf_counter()
    torch.manual_seed(run.seed)
    model = GPT(config).to(device)
    optimizer, losses = Muon(model, run, dtype), []
    for step in range(run.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * schedule(step, run)
        losses.append(update(model, task, task.batch(step), optimizer, scaler, autocast, run))
    losses, seconds = torch.stack(losses).tolist(), time.perf_counter() - start
    n = max(run.max_steps // 20, 1)
    curve = [(i + n, sum(losses[i : i + n]) / n) for i in range(0, len(losses) - n + 1, n)]
    with autocast:
        sample = task.demonstrate(model, 100)[:100]
    found = evaluate(model, task, 8 * run.batch_size, autocast)["val_loss"]
    return dict(parameters=sum(p.numel() for p in model.parameters()), train_loss=curve[-1][1],
                val_loss=found, seconds=round(seconds, 2), sample=sample), curve


def ladder_command(module, settings: dict, given: dict) -> int:
    """From a bigram to a GPT: twelve models, each a small change of the one before."""
    from data import Run, build, line_chart, machine, prepare, replacing

    run, task = build(Run, settings), Pretraining()
    corpus = prepare(run.data, settings["vocab_size"], SPECIAL_TOKENS, SEPARATOR)
    config = GPTConfig(corpus.tokenizer.vocab_size, settings["block_size"], **FIRST_STEP)
    task.open(run, config, corpus.tokenizer, corpus)
    rows, curves = [], {}
    print(f"{'':<22}{'parameters':>10}{'training':>10}{'validation':>12}{'seconds':>9}")
    for i, (name, change, why) in enumerate(LADDER, 1):
        config = replace(config, **change)
        row, curves[f"{i} {name}"] = climb(config, task, run, *machine(run))
        rows.append(dict(name=name) | row)
        print(f"{i:>2} {name:<19}{row['parameters']:>10,}{row['train_loss']:>10.3f}"
              f"{row['val_loss']:>12.3f}{row['seconds']:>9.1f}")
        sample = " / ".join(line for line in row["sample"].splitlines() if line.strip())
        for text in why, f"| {sample}":
            print(textwrap.fill(text, 90, initial_indent=" " * 5, subsequent_indent=" " * 5))
        with replacing(f"{run.out_dir}/ladder.json", "w") as file:
            json.dump(rows, file, indent=1)
        with replacing(f"{run.out_dir}/ladder.svg", "w") as file:
            file.write(line_chart(curves, f"The ladder: {run.data}"))
    return 0


# 9. Training: from here on the three model files are the same, letter by letter -------------------
# `train` is the whole story: set the rates, draw the batch, update, report, evaluate, save.
#   run   its settings, a data.Run; its fields are flags: max_steps, batch_size, lr, matrix_lr, ...
#   task  what to learn from: Pretraining (5), Finetuning (6), or a class of yours, with
#         batch(step), eval_batches(rows, most): dicts of tensors with a row for each sequence;
#         asked(batch): how many answers a mean loss is a mean of; loss(model, batch): that loss,
#         and to evaluate, measures, name -> (sum, how many); demonstrate(model, length): a sample;
#         description: a text for the log; rows: how many an epoch has
# Another optimizer than Muon takes (model, run, dtype), and gives its groups a `highest_lr`.


def orthogonalize(matrices, dtype=torch.float32, steps: int = 5):
    """Newton-Schulz iteration: the nearest matrices whose singular values are all about 1.

    matrices (n, rows, cols); dtype: the one that multiplies fastest. X <- aX + b(XX^T)X +
    c(XX^T)^2 X moves each singular value s to as + bs^3 + cs^5; these a, b, c bring all from 0.003
    to 1 to 0.7 to 1.2 in five rounds (Jordan 2024, https://kellerjordan.github.io/posts/muon)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.size(-2) <= matrices.size(-1)
    X = matrices if wide else matrices.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-12)  # now no singular value is above 1
    X = X.to(dtype)  # (only now: small gradients are 0 in float16)
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # aX + (bA + cAA)X
    return X if wide else X.mT


class Muon(torch.optim.AdamW):
    """Muon for inner matrices, AdamW for all else, in one: an overflow in float16 skips both.

    AdamW steps by a fixed size in each *number*; Muon, in each *direction* of a matrix: it takes
    a running mean of the gradients and makes all its singular values 1, so that rare directions are
    learned as fast as common ones. Matrices of equal shape are stacked, for one product."""

    def __init__(self, model: nn.Module, run, dtype=torch.float32):
        """dtype: of the products in `orthogonalize`."""
        self.dtype, groups = dtype, {}  # (Muon's matrix shape, factor, decays?) -> a group
        for name, p in model.named_parameters():
            inner = p.ndim == 2 and not ("embedding" in name or "head" in name)
            muon = inner and run.optimizer == "muon"
            shape = (len(p) // getattr(p, "maps", 1), p.size(1)) if muon else None
            factor, decays = getattr(p, "lr_factor", 1.0), p.ndim >= 2  # biases and norms do not
            lr, decay = (run.matrix_lr if muon else run.lr) * factor, run.weight_decay * decays
            if p.requires_grad:
                group = dict(params=[], shape=shape, lr=lr, highest_lr=lr, weight_decay=decay)
                groups.setdefault((shape, factor, decays), group)["params"].append(p)
        # Beside Muon it learns faster from means of 2 gradients and of 100 squares, about.
        betas = (0.5, 0.99) if run.optimizer == "muon" else (0.9, 0.95)
        super().__init__(list(groups.values()), betas=betas, fused=True)
        self._step_supports_amp_scaling = False  # GradScaler is to skip `step` as a whole

    @torch.no_grad()
    def step(self, closure=None, momentum: float = 0.9):
        """p -= lr * longer * orthogonalize(0.9 m + 0.1 g), m a running mean of the gradients g,
        for a stack of matrices of equal shape; then AdamW's step for all other parameters."""
        for group in [x for x in self.param_groups if x["shape"]]:
            params, lr, (rows, cols) = group["params"], group["lr"], group["shape"]
            gradient = torch.cat([p.grad.view(-1, rows, cols) for p in params])  # (n, rows, cols)
            state = self.state[params[0]]  # of the whole stack
            if not state:  # (AdamW asks for a "step" when it loads a state)
                state.update(step=torch.zeros(()), mean=torch.zeros_like(gradient))
            mean = state["mean"].lerp_(gradient, 1 - momentum)  # m <- 0.9 m + 0.1 g
            ahead = gradient.lerp(mean, momentum)  # 0.9 m + 0.1 g
            directions = orthogonalize(ahead, self.dtype).to(gradient.dtype)  # (n, rows, cols)
            longer = max(1, rows / cols) ** 0.5  # steps for tall ones (Jordan 2024)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            for p, direction in zip(params, directions.split([len(p) // rows for p in params])):
                p.sub_(direction.reshape(p.shape), alpha=lr * longer)
                p.grad = None  # AdamW passes over what has no gradient
        super().step()


def schedule(step: int, run) -> float:
    """The share of the highest learning rate at a step (from 0): up in a line, down to zero."""
    if step < run.warmup_steps:
        return (step + 1) / (run.warmup_steps + 1)
    left = (run.max_steps - step) / max(run.max_steps - run.warmup_steps, 1)  # from 1 down to 0
    return left if run.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def update(model, task, batch: dict, optimizer, scaler, autocast, run) -> torch.Tensor:
    """One optimizer step, in run.grad_accum parts, by all ranks (processes) -> the mean loss.

    A batch says beforehand how many answers it asks for, so each part's mean loss is weighted by
    its share of them before the backward pass; then gradients just add up. autocast: products in a
    narrower dtype. scaler: multiplies the loss in float16, where small gradients would be 0."""
    from data import add_up, ranks

    model.train()
    device, (rank, count), asked = next(model.parameters()).device, ranks(), task.asked(batch)
    n = count * math.ceil(run.grad_accum / count)  # parts: of four, the first of two ranks has 0, 2
    total = torch.zeros((), device=device)
    for i in range(rank, n, count):
        part = {name: tensor.tensor_split(n)[i] for name, tensor in batch.items()}
        if len(next(iter(part.values()))):  # (there may be fewer rows than parts)
            share = (task.asked(part) / asked).to(device, non_blocking=True)
            part = {name: x.to(device, non_blocking=True) for name, x in part.items()}
            with autocast:
                loss = (task.loss(model, part)[0] * share).sum()  # (BERT's loss has two means)
            scaler.scale(loss).backward()
            total += loss.detach()
    params = [p for p in model.parameters() if p.requires_grad]
    for p in params:  # no loss reaches those of a head that is not asked, nor a rank without rows
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    add_up([total, *(p.grad for p in params)])
    scaler.unscale_(optimizer)
    if run.grad_clip:
        torch.nn.utils.clip_grad_norm_(params, run.grad_clip)
    scaler.step(optimizer)  # in float16: unless a gradient overflowed
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return total


@torch.no_grad()
def evaluate(model, task, rows: int, autocast, most: int | None = None) -> dict[str, float]:
    """val_loss and the task's measures on what is held out, `rows` sequences at once; most: of a
    large part, on about so many tokens. Each figure is a quotient of two sums."""
    model.eval()
    device, sums = next(model.parameters()).device, {}
    for batch in task.eval_batches(rows, most):
        asked = task.asked(batch).to(device)
        with autocast:
            loss, measures = task.loss(model, {name: x.to(device) for name, x in batch.items()})
        for name, pair in ({"val_loss": (loss * asked, asked)} | measures).items():
            pair = torch.stack([torch.as_tensor(x).cpu().double() for x in pair])
            sums[name] = sums.get(name, 0) + pair
    figures = {name: over / under for name, (over, under) in sums.items()}
    # BERT's loss has parts, which add up; its macro F1, a value for each label: their mean.
    return {name: float(figure.sum() if name == "val_loss" else figure.nanmean())
            for name, figure in figures.items()}


def train(run, task, model: Model, state: dict | None = None) -> bool:
    """Train to max_steps, or until `patience` ends; False if Ctrl-C came first.

    Step n's batch and dropout are drawn from (seed, n), so a run that goes on from a checkpoint,
    state, ends as if it had never been stopped. Of several ranks (processes, by `torchrun`) each
    draws the whole batch and computes its share."""
    from data import Log, asked_to_stop, machine, ranks, save

    _, dtype, autocast, scaler = machine(run)
    optimizer, log = Muon(model, run, dtype), Log(run, task, model, state)
    step, best, worse = 0, math.inf, 0  # best: the lowest val_loss; worse: evaluations since

    def checkpoint(name: str) -> None:
        save(run, name, task, model, step=step, best=best, worse=worse, pending=log.checked(),
             optimizer=optimizer.state_dict(), scaler=scaler.state_dict())

    if state:
        step, best, worse = state["step"], state["best"], state["worse"]
        groups = optimizer.state_dict()["param_groups"]  # with the learning rates of now
        optimizer.load_state_dict(state["optimizer"] | {"param_groups": groups})
        scaler.load_state_dict(state["scaler"] or scaler.state_dict())  # ({}: it was not float16)
    else:
        checkpoint("ckpt.pt")  # a run that is killed before its first evaluation can go on, too
    with asked_to_stop() as stopping:
        while step < run.max_steps and not 0 < run.patience <= worse:
            if stopping():  # Ctrl-C: in whichever process, all stop at the same step
                checkpoint("ckpt.pt")
                return False
            for group in optimizer.param_groups:
                group["lr"] = group["highest_lr"] * schedule(step, run)
            batch = task.batch(step)
            torch.manual_seed((run.seed * 1_000_003 + step) * ranks()[1] + ranks()[0])  # dropout's
            log.add(update(model, task, batch, optimizer, scaler, autocast, run), batch)
            step += 1
            evaluating = step % run.eval_interval == 0 or step == run.max_steps  # (0: an epoch's)
            if evaluating or step % run.log_interval == 0:
                log.report(step, schedule(step - 1, run))
            if evaluating:
                found = evaluate(model, task, run.batch_size, autocast, most=1 << 20)
                worse = 0 if found["val_loss"] < best else worse + 1
                best = min(best, found["val_loss"])
                with autocast:
                    sample = task.demonstrate(model, 400 if step == run.max_steps else 40)
                log.evaluated(step, found, sample, worse)
                if worse == 0:
                    checkpoint("best.pt")
                checkpoint("ckpt.pt")
            if run.snapshot_interval and step % run.snapshot_interval == 0:
                checkpoint(f"ckpt_{step:06d}.pt")
    return True


def from_pretrained(name_or_folder) -> Model:
    """A model that was trained here, by its run's folder or a checkpoint's path; or published, by
    its folder or name. In evaluation mode, float32. Raises ValueError or OSError."""
    from data import open_model

    return open_model(sys.modules[__name__], name_or_folder)[0].eval()


def save_pretrained(model, folder, task=None) -> None:
    """Write config.json and model.safetensors, which `transformers` opens with the same results.
    task: what it learned from. Raises ValueError for a variant that has no class there."""
    from data import save_published

    save_published(sys.modules[__name__], folder, model, task)


Model.from_pretrained, Model.save_pretrained = staticmethod(from_pretrained), save_pretrained


def main(arguments: list[str] | None = None) -> int:
    """Run a command (they are in data.py). Returns the exit status, see `run_command` there."""
    try:
        from data import run_command
    except ImportError as error:
        if error.name not in ("bpe", "data"):
            raise
        print(f"error: {error.name}.py is missing: put it beside {NAME}.py", file=sys.stderr)
        return 2
    return run_command(sys.modules[__name__], sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
