"""GPT: a decoder that reads text from left to right and predicts the next token at every position.

That is the whole objective. T + 1 tokens give T exercises at once, since a causal mask lets each
position see only itself and what came before:

    input    Once   upon   a      time   there
    target   upon   a      time   there  was

The architecture is GPT-2's. Each position holds a vector, the residual stream; it begins as the sum
of a token's and a position's embedding. Each block adds to it what attention brings (positions
exchange information) and then what a feed-forward network makes of it (each position thinks alone).
In the end a linear head turns it into a score for every token of the vocabulary.

    python gpt.py                                  train on input.txt: 2 to 3 minutes on a laptop
    python gpt.py generate --prompt "Title: The"   write with what was trained
    python gpt.py eval                             loss and bits per byte on all validation text
    python gpt.py finetune                         learn to answer requests for a story
    python gpt.py finetune --data pairs.csv        or your prompts and responses
    python gpt.py ladder                           from a bigram to a GPT, in twelve steps
    python gpt.py bench                            how fast this machine is at it
    python gpt.py generate --init_from gpt2        the published weights (or those in a folder)
    python gpt.py export --to FOLDER               what was trained, for transformers
    python gpt.py --help                           every flag

It reads from top to bottom: 1 this page, 2 the configuration, 3 layers, 4 the model, 5 the
objective, 6 generation, 7 published weights, 8 fine-tuning and the ladder, 9 training, 10 the
command line. Copied alone into a project, this file still gives `from gpt import GPT, GPTConfig`;
its commands need bpe.py (the tokenizer) and data.py (files, downloads, the log) beside it. To
learn, change things: `--pos none` (what does it cost?), `--norm none`, `--n_head 1`; `causal=False`
in Attention.forward (the loss falls towards 0, and what it writes is nonsense: why?).

Papers: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners" (GPT-2);
Vaswani et al. 2017, https://arxiv.org/abs/1706.03762 (attention); Radford et al. 2018 (GPT).
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the packages load leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import codecs
import contextlib
import itertools
import json
import math
import sys
import textwrap
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.adamw import adamw

# --------------------------------------------------------------------------------------------------
# 2. The configuration
# --------------------------------------------------------------------------------------------------


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

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "vocab_size", "block_size", "n_head", "n_embd", "head_dim", "value_dim")
        at_least(self, 0, "n_layer", "n_ff")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                "change one of them or set head_dim"
            )
        if self.pos == "rotary" and self.key_width % 2:
            raise ValueError(
                f"rotary positions turn pairs of numbers: head_dim {self.key_width} has to be even"
            )
        if self.block_size * max(self.n_embd, self.n_head * self.key_width) > 1 << 28:
            raise ValueError(f"block_size {self.block_size} takes a table of over 1 GiB")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not between 0 and 1")

    @property
    def key_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def value_width(self) -> int:
        """Width of a head's values."""
        return self.key_width if self.value_dim is None else self.value_dim

    @property
    def ff_width(self) -> int:
        """Width inside a feed-forward."""
        return 4 * self.n_embd if self.n_ff is None else self.n_ff


Config, NAME = GPTConfig, "gpt"  # so named, what the files have in common is the same text

PRESETS = {  # GPT-2's four sizes have 124 M, 355 M, 774 M and 1.56 B parameters
    "laptop": dict(vocab_size=2048, block_size=128, n_layer=4, n_head=4, n_embd=256),
    "t4": dict(vocab_size=8192, block_size=512, n_layer=8, n_head=8, n_embd=512),  # for that GPU
    "gpt2": dict(vocab_size=50257, block_size=1024, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": dict(vocab_size=50257, block_size=1024, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dict(vocab_size=50257, block_size=1024, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dict(vocab_size=50257, block_size=1024, n_layer=48, n_head=25, n_embd=1600),
}
RECIPES = {  # training settings that go with a preset (matrix_lr: Muon's, see 9); else laptop's
    "laptop": dict(max_steps=500, batch_size=16, lr=0.01, matrix_lr=0.03),
    "t4": dict(max_steps=3000, batch_size=32, lr=0.005, matrix_lr=0.02, eval_interval=250),
}


def at_least(config, least: int, *names: str) -> None:
    """Raises ValueError where one of these fields is smaller (None stands for a default)."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not value >= least:
            raise ValueError(f"{name} has to be at least {least}, not {value}")


def check_choices(config) -> None:
    """Raises ValueError where a field that has a list of values, a Literal, has none of these."""
    for option in fields(config):
        value, values = getattr(config, option.name), get_args(option.type)
        if get_origin(option.type) is Literal and value not in values:
            raise ValueError(f"{option.name} {value!r} is none of {', '.join(values)}")


# --------------------------------------------------------------------------------------------------
# 3. Layers, from the bottom up
# --------------------------------------------------------------------------------------------------
# Shapes: B texts of T tokens, S tokens that they look at; C = n_embd numbers for each token; nh
# heads, each with hd numbers for a query or a key, and vd for a value; V = vocab_size.

LONG = 1024  # number of keys from which the fused attention is faster on a CPU, too


def attention(query, key, value, bias=None, causal=False, scale=None, dropout=0.0):
    """softmax(Q K^T * scale + bias) V: per query a weighted mean of the values (Vaswani, 3.2.1).

    A query says what a position looks for, a key what one offers, a value what it passes on.
    query (B, nh, T, hd), key (B, nh, S, hd), value (B, nh, S, vd) -> (B, nh, T, vd). bias (BERT and
    T5 have one) is added to the scores and broadcasts to (B, nh, T, S). causal: the last query sees
    all S keys, the one before it S - 1, and so on. scale: 1 / sqrt(hd) unless given, so that the
    scores of a wider head are no larger.

    The formula is the last three lines. In bfloat16 on a CPU it is 2.5 (T = 128) to 1.4 times (512)
    as fast as PyTorch's fused kernel (all in one pass), which is taken on a GPU, from LONG keys on,
    and for a single query.
    """
    T, S = query.size(-2), key.size(-2)
    scale = query.size(-1) ** -0.5 if scale is None else scale
    fused = query.device.type != "cpu" or S >= LONG or T == 1
    if causal and (T != S or bias is not None or not fused):  # the kernel's own mask: T = S
        future = query.new_full((T, S), -math.inf).triu(1 + S - T)  # -inf: a weight of 0
        bias, causal = future if bias is None else bias + future, False
    if fused:
        return F.scaled_dot_product_attention(query, key, value, bias, dropout, causal, scale=scale)
    scores = (query * scale) @ key.transpose(-2, -1)  # (B, nh, T, S)
    weights = F.softmax(scores if bias is None else scores + bias, dim=-1)
    return F.dropout(weights, dropout) @ value  # (B, nh, T, vd); (dropout is 0 outside training)


def sinusoids(length: int, width: int, base: float = 10000) -> torch.Tensor:
    """(length, width): row t has sin, cos of t / base^(2i / width), i = 0, 1, ... (Vaswani 3.5)."""
    frequency = base ** (-torch.arange(0, width, 2) / width)  # (width / 2,)
    angle = torch.arange(length)[:, None] * frequency  # (length, width / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(1)[:, :width]


def rotate(x, turn):
    """Rotary positions: turn pair i of the numbers at position t by the angle t / 10000^(2i / hd),
    so that the product of a query and a key depends on how far apart they are, and not on where
    they are (Su et al. 2021, https://arxiv.org/abs/2104.09864).

    x (B, nh, T, hd); turn (2, T, hd / 2): the angles' cosines and sines -> (B, nh, T, hd).
    """
    cos, sin = turn.to(x.dtype)
    left, right = x.chunk(2, dim=-1)  # number i makes a pair with number i + hd / 2
    return torch.cat((left * cos - right * sin, left * sin + right * cos), dim=-1)


class KVCache:
    """One attention layer's keys and values of all tokens so far: none is computed twice."""

    def __init__(self, block_size: int):
        self.block_size, self.length = block_size, 0

    def append(self, key, value):
        """key (B, nh, T, hd), value (B, nh, T, vd) of T new tokens -> those of all so far."""
        if self.length == 0:
            B, nh, _, hd = key.shape
            dtype = torch.float32 if key.device.type == "cpu" else key.dtype  # fastest for 1 query
            self.keys = key.new_empty(B, nh, self.block_size, hd, dtype=dtype)
            self.values = key.new_empty(B, nh, self.block_size, value.size(-1), dtype=dtype)
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
        keys, values = config.n_head * config.key_width, config.n_head * config.value_width
        self.widths = [keys, keys, values]  # of queries, keys, values
        self.qkv = nn.Linear(config.n_embd, sum(self.widths), bias=config.bias)  # three maps in one
        # For Muon (9) they are three matrices.
        self.qkv.weight.maps = 3 if config.value_width == config.key_width else 1
        self.proj = nn.Linear(self.widths[2], config.n_embd, bias=config.bias)

    def forward(self, x, turn=None, cache: KVCache | None = None):
        """x (B, T, C), turn (2, T, hd / 2), see `rotate` -> (B, T, C)."""
        B, T, C = x.shape
        query, key, value = (
            part.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hd or vd)
            for part in self.qkv(x).split(self.widths, dim=-1)
        )
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        if cache is not None:
            key, value = cache.append(key, value)
            query = query.to(key.dtype)
        causal = T > 1  # a single new token sees all there is
        mixed = attention(query, key, value, causal=causal, dropout=self.dropout * self.training)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2).to(x.dtype))  # (B, T, C)
        return F.dropout(mixed, self.dropout, self.training)


class FeedForward(nn.Module):
    """Two linear layers and a non-linearity, the same everywhere: C -> n_ff -> C (Vaswani, 3.3)."""

    def __init__(self, config: Config):
        super().__init__()
        self.act, self.dropout = config.act, config.dropout
        self.up = nn.Linear(config.n_embd, config.ff_width, bias=config.bias)
        self.down = nn.Linear(config.ff_width, config.n_embd, bias=config.bias)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        inner = self.up(x)  # (B, T, n_ff)
        # (Approximated as in GPT-2; BERT's is exact.)
        inner = F.gelu(inner, approximate="tanh") if self.act == "gelu" else F.relu(inner)
        return F.dropout(self.down(inner), self.dropout, self.training)  # (B, T, C)


def make_norm(config: Config):
    """LayerNorm: a position's C numbers get mean 0, variance 1, then a learned scale and shift."""
    return nn.LayerNorm(config.n_embd, bias=config.bias) if config.norm != "none" else nn.Identity()


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream x: x + sublayer(norm(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.attn, self.attn_norm = Attention(config), make_norm(config)
        self.mlp = FeedForward(config) if config.ff_width else None
        self.mlp_norm = make_norm(config) if config.ff_width else None

    def add(self, x, sublayer, norm):
        """GPT-2's pre-norm x + sublayer(norm(x)), or post-norm norm(x + sublayer(x));
        residual=False leaves out x +."""
        y = sublayer(norm(x) if self.config.norm == "pre" else x)
        y = x + y if self.config.residual else y
        return norm(y) if self.config.norm == "post" else y

    def forward(self, x, turn=None, cache: KVCache | None = None):
        """x (B, T, C) -> (B, T, C)."""
        x = self.add(x, lambda h: self.attn(h, turn, cache), self.attn_norm)
        return x if self.mlp is None else self.add(x, self.mlp, self.mlp_norm)  # (B, T, C)


# --------------------------------------------------------------------------------------------------
# 4. The model
# --------------------------------------------------------------------------------------------------


class GPT(nn.Module):
    """Embeddings, blocks, a last norm, and the head that scores every token as the next one."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        if config.pos == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        elif config.pos == "sinusoidal":
            self.register_buffer(
                "positions", sinusoids(config.block_size, config.n_embd), persistent=False
            )
        elif config.pos == "rotary":
            table = sinusoids(config.block_size, config.key_width)  # sin, cos, sin, cos, ...
            self.register_buffer(
                "turns", torch.stack((table[:, 1::2], table[:, ::2])), persistent=False
            )
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # Pre-norm leaves the stream itself as it is, so the head gets it normalized.
        self.norm = make_norm(config) if config.norm == "pre" else nn.Identity()
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
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
        turn = self.turns[:, start:end] if self.config.pos == "rotary" else None  # (2, T, hd / 2)
        x = F.dropout(x, self.config.dropout, self.training)
        for i, block in enumerate(self.blocks):
            x = block(x, turn, caches[i] if caches else None)
        return self.norm(x)

    def forward(self, idx, targets=None):
        """idx (B, T) int64 -> logits (B, T, V), and the mean loss, or None without targets (B, T).

        targets[b, t] is the token that follows idx[b, t]; where it is -100 nothing is asked. (The
        training below computes its own, see `loss_sum`.) Raises ValueError beyond block_size.
        """
        logits = self.head(self.hidden(idx))
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


Model = GPT

# --------------------------------------------------------------------------------------------------
# 5. The objective: predict the next token
# --------------------------------------------------------------------------------------------------

# A corpus (data.Corpus) has train and validation, arrays of token ids, and token_bytes, how many
# bytes each token spells.

SPECIAL_TOKENS = ["<|endoftext|>"]
SEPARATOR = "<|endoftext|>"  # before the first document, between documents and after the last
TOKEN_LOSS = "val_loss"  # what perplexity is computed from


@dataclass
class ObjectiveConfig:
    """Next-token prediction has nothing to set. (BERT's masking and T5's spans do.)"""


def rows_per_epoch(corpus, config: Config, objective: ObjectiveConfig) -> int:
    """How many windows the training part has. Raises ValueError where it is too short for one."""
    if len(corpus.train) <= config.block_size or len(corpus.validation) < 2:
        raise ValueError(
            f"the text is too short: {len(corpus.train)} tokens to train on and "
            f"{len(corpus.validation)} to validate do not fill windows of {config.block_size}; "
            f"give more text or a smaller --block_size"
        )
    # One less than fit, so that there is room for a random offset.
    return max((len(corpus.train) - 1) // config.block_size - 1, 1)


def train_batch(
    corpus, config: Config, objective: ObjectiveConfig, run: "TrainConfig", step: int
) -> dict:
    """A step's batch: idx and targets, (rows, block_size) int64. It depends on (seed, step) alone.

    An epoch lays windows end to end from a random offset and takes each once, in random order.
    """
    from data import shuffled_rows

    T, n = config.block_size, rows_per_epoch(corpus, config, objective)
    row, luck = shuffled_rows(n, run.seed, step * run.rows, run.rows)  # (rows,); luck from [0, 1)
    offset = (luck * (len(corpus.train) - n * T)).astype(np.int64)
    at = (offset + row * T)[:, None] + np.arange(T + 1)  # (rows, T + 1)
    window = torch.from_numpy(corpus.train[at].astype(np.int64))
    return dict(idx=window[:, :-1], targets=window[:, 1:])


def eval_batches(corpus, config: Config, objective: ObjectiveConfig, rows: int):
    """The whole validation part, in windows that do not overlap: each token but the first is a
    target once.

    Yields idx and targets (rows, block_size), and the `bytes` (rows,) that the row's targets spell.
    """
    from data import sliding_windows

    T = config.block_size
    for start in range(0, len(corpus.validation) - 1, rows * T):
        part = corpus.validation[start : start + rows * T + 1]  # the last token is a target only
        idx, targets = sliding_windows(part, T, T, pad_id=0)
        spelled = np.where(targets >= 0, corpus.token_bytes[targets], 0).sum(axis=1)
        yield {
            k: torch.from_numpy(v) for k, v in dict(idx=idx, targets=targets, bytes=spelled).items()
        }


class CrossEntropy(torch.autograd.Function):
    """The sum of weight * -log softmax(logits)[target]: logits (N, V), targets (N,) int64, weights
    (N,), 0 where nothing is asked -> a number.

    Its gradient is weight * (softmax(logits) - onehot(target)): `forward` computes that in place of
    the probabilities, and keeps it in the logits' own type. `F.cross_entropy` computes the same (a
    test compares them), but passes over N x V float32 numbers three more times.
    """

    @staticmethod
    def forward(ctx, logits, targets, weights):
        target, weight = targets.clamp(min=0).unsqueeze(1), weights.unsqueeze(1)  # (N, 1) each
        wide = torch.promote_types(logits.dtype, torch.float32)
        p = F.softmax(logits, dim=-1, dtype=wide)  # (N, V)
        chosen = p.gather(1, target).clamp(min=torch.finfo(p.dtype).tiny)  # log 0 would be -inf
        p.scatter_add_(1, target, -torch.ones_like(chosen))  # from here on p - onehot
        if not (weight == 1).all():
            p.mul_(weight)
        ctx.save_for_backward(p.to(logits.dtype))
        return -(chosen.log() * weight).sum()

    @staticmethod
    def backward(ctx, scale):
        return ctx.saved_tensors[0] * scale.to(ctx.saved_tensors[0].dtype), None, None


def loss_sum(model: Model, batch: dict):
    """(sum of the losses, number of tokens that are asked for, metrics).

    Sums, so that parts of a batch can be added up. A metric is a pair of sums, a numerator and a
    denominator: bits per byte = loss / ln 2 over bytes, which can be compared across tokenizers.
    In fine-tuning `weights` (B,) multiplies both the losses of a row's tokens and their number.
    """
    logits = model(batch["idx"])[0].flatten(0, 1)  # (B * T, V)
    weights = batch["targets"] != -100  # (B, T)
    if "weights" in batch:
        weights = weights * batch["weights"][:, None]
    loss = CrossEntropy.apply(logits, batch["targets"].flatten(), weights.flatten())
    metrics = {}
    if "bytes" in batch:
        metrics["bits_per_byte"] = loss.detach() / math.log(2), batch["bytes"].sum()
    return loss, weights.sum(), metrics


def count_tokens(batch: dict) -> int:
    """How many tokens the model reads in a batch."""
    return batch["idx"].numel()


def count_flops(model: Model, batch: dict) -> float:
    """Floating-point operations of a step: 6 * tokens * (weights + n_layer * T * nh * (hd + vd)),
    so 6 for each multiplication of the forward pass, by a weight or in attention's two products: 2
    forward (with its addition), 4 backward (Kaplan et al. 2020, 2.1)."""
    weights = sum(
        module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear)
    )
    width = model.config.n_head * (model.config.key_width + model.config.value_width)
    return 6 * count_tokens(batch) * (weights + model.config.n_layer * batch["idx"].size(1) * width)


# --------------------------------------------------------------------------------------------------
# 6. Generation
# --------------------------------------------------------------------------------------------------


def sample(logits, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None):
    """Draw a token from each row of logits (B, V) -> (B,) int64. temperature 0 takes the likeliest.

    top_k: only among the k likeliest; top_p: only among the likeliest that together have
    probability p (nucleus sampling, Holtzman et al. 2019, https://arxiv.org/abs/1904.09751).
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    k = min(top_k or logits.size(-1), logits.size(-1))
    likeliest, token = logits.float().topk(k)  # (B, k), in descending order
    probability = F.softmax(likeliest / temperature, dim=-1)
    if top_p is not None and top_p < 1:
        before = probability.cumsum(dim=-1) - probability  # of all likelier ones; 0 for the first
        probability = probability.masked_fill(before >= top_p, 0.0)
    # argmax(p / e), e from the exponential distribution, is token i with probability p_i: of clocks
    # that run at random, each at its own rate, the first to tick. (torch.multinomial is slower.)
    drawn = (
        probability / torch.empty_like(probability).exponential_()
    ).argmax(dim=-1, keepdim=True)
    return token.gather(-1, drawn)[:, 0]


@contextlib.contextmanager
def fast_product(idx):
    """For speed alone: within it, oneDNN, PyTorch's kernels for a CPU, is off if idx (B, T) is a
    single token. It repacks a bfloat16 matrix first: for one vector that triples the time."""
    before = torch.backends.mkldnn.enabled
    torch.backends.mkldnn.enabled = before and idx.numel() > 1
    try:
        yield
    finally:
        torch.backends.mkldnn.enabled = before


@torch.no_grad()
def generate(
    model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None,
    stop=None, use_cache=True, on_token=None,
):
    """Continue each row of idx (B, T) int64, T >= 1, by max_new_tokens -> (B, T + n).

    temperature, top_k, top_p: see `sample`. stop: a token id; a row that has produced it is filled
    up with it, and when all rows have, generation ends (n < max_new_tokens). on_token(column (B,))
    is called with each new token. use_cache=False computes all anew each time: slow, same result.

    When the context is full, its older half is dropped and the rest computed again: learned
    positions belong to places in the window, so cached keys are wrong once the window moves.
    Raises ValueError for other shapes. The model is left in evaluation mode.
    """
    if idx.ndim != 2 or not idx.numel():
        raise ValueError(f"idx has to be (B, T) with T at least 1, not {tuple(idx.shape)}")
    model.eval()  # no dropout
    (B, T), block_size = idx.shape, model.config.block_size
    tokens = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)
    start = max(0, T - block_size)  # the window is tokens[:, start:end]
    caches, done = [], idx.new_zeros(B, dtype=torch.bool)
    for end in range(T, T + max_new_tokens):
        if end - start > block_size:
            start, caches = end - max(block_size // 2, 1), []
        if not caches:
            new = tokens[:, start:end]
            caches = [KVCache(block_size) for _ in model.blocks] if use_cache else []
        else:
            new = tokens[:, end - 1 : end]
        with fast_product(new):
            logits = model.head(model.hidden(new, caches)[:, -1])  # (B, V)
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


GPT.generate = generate  # a method, written here beside `sample`


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
        at_least(self, 1, "max_new_tokens", "num_samples")
        at_least(self, 0, "temperature", "top_k")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not between 0 and 1")


def encode_prompt(prompt: str, tokenizer, documents: int, block_size: int) -> list[int]:
    """The prompt as tokens; where the corpus had several documents, it begins one.

    Raises ValueError for a prompt beyond the context.
    """
    ids = ([tokenizer.special[SEPARATOR]] if documents > 1 else []) + tokenizer.encode(prompt)
    if len(ids) > block_size:
        raise ValueError(
            f"the prompt has {len(ids)} tokens, the context {block_size}: shorten it"
        )
    return ids or tokenizer.encode("\n")


def continuations(
    model: Model, tokenizer, ids: list[int], options: GenerateConfig, on_text=None
) -> list[str]:
    """What follows the tokens `ids`, num_samples times, each up to the end of the document.

    on_text(part) is called with the first text's parts as they come.
    """
    end = tokenizer.special[SEPARATOR]
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may end inside a character

    def show(column):
        if on_text is not None and column[0] != end:
            on_text(decoder.decode(tokenizer.decode_bytes([column[0]])))

    idx = torch.tensor([ids] * options.num_samples, device=next(model.parameters()).device)
    temperature = 0.8 if options.temperature is None else options.temperature
    tokens = model.generate(
        idx, options.max_new_tokens, temperature, options.top_k or None, options.top_p,
        stop=end, on_token=show,
    )
    if on_text is not None:
        on_text(decoder.decode(b"", final=True))
    rows = tokens[:, len(ids) :].tolist()
    ended = [row[: row.index(end)] if end in row else row for row in rows]
    return [tokenizer.decode(row) for row in ended]


def demonstrate(model: Model, corpus, length: int) -> str:
    """A sample for the log."""
    ids = encode_prompt("", corpus.tokenizer, corpus.documents, model.config.block_size)
    return continuations(model, corpus.tokenizer, ids, GenerateConfig(max_new_tokens=length))[0]


def write_samples(model: Model, checkpoint: dict, options: GenerateConfig) -> None:
    """What `generate` prints on standard output: one text as it comes, several when done; of a
    fine-tuned model, the answer to the prompt, or to each that is typed."""
    from data import build, prompts

    tokenizer = checkpoint["tokenizer"]

    def print_part(part):
        print(part, end="", flush=True)

    on_text = print_part if options.num_samples == 1 else None
    if checkpoint["task"]:
        task = build(Task, checkpoint["task"])
        for prompt in prompts(options.prompt):
            texts = task.answers(model, tokenizer, prompt, options, on_text)
            print("" if on_text else "\n\n".join(texts))
        return
    prompt = options.prompt
    ids = encode_prompt(prompt, tokenizer, checkpoint["documents"], model.config.block_size)
    if on_text:
        on_text(prompt)
    texts = continuations(model, tokenizer, ids, options, on_text)
    print("" if on_text else "\n\n".join(prompt + text for text in texts))


def write_random(model: Model, rows: int, length: int):
    """What `bench` times: `rows` sequences of 8 random tokens, continued by `length` more."""
    device = next(model.parameters()).device
    idx = torch.randint(model.config.vocab_size, (rows, 8), device=device)
    return model.generate(idx, length, top_k=50)


# --------------------------------------------------------------------------------------------------
# 7. Published weights: GPT-2's names for ours
# --------------------------------------------------------------------------------------------------

PASSED_OVER = r".*\.attn\.(masked_)?bias"  # masks that old files hold, no weights
ROLES = dict(bos_token="<|endoftext|>", eos_token="<|endoftext|>")  # of special tokens
TEMPLATE = []  # what stands around a text: nothing


def published_name(name: str) -> str:
    """The name of a tensor in a file of weights -> the one that `published_weights` has for it."""
    return name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"


def published_weights(model: Model) -> dict:
    """Published name -> our weight, in the published shape: GPT-2 stores matrices as (in, out)."""
    named = {
        "transformer.wte.weight": model.token_embedding.weight,
        "transformer.wpe.weight": model.position_embedding.weight,
        "transformer.ln_f.weight": model.norm.weight,
        "transformer.ln_f.bias": model.norm.bias,
        "lm_head.weight": model.head.weight,
    }
    for i, block in enumerate(model.blocks):
        for name, layer in (
            ("ln_1", block.attn_norm), ("attn.c_attn", block.attn.qkv),
            ("attn.c_proj", block.attn.proj), ("ln_2", block.mlp_norm),
            ("mlp.c_fc", block.mlp.up), ("mlp.c_proj", block.mlp.down),
        ):
            name, weight = f"transformer.h.{i}.{name}", layer.weight
            named[f"{name}.weight"] = weight.T if weight.ndim == 2 else weight
            named[f"{name}.bias"] = layer.bias
    return named


def to_published(config: Config) -> dict:
    """Our settings as `config.json` has them. Raises ValueError where GPT-2 has no such variant."""
    gpt2 = replace(config, bias=True, pos="learned", norm="pre", residual=True)
    narrow = config.key_width == config.value_width == config.n_embd / config.n_head
    if config != gpt2 or not narrow or not config.ff_width:
        raise ValueError(
            "GPT-2 has learned positions, pre-norm, residuals, biases, feed-forwards and heads as "
            "wide as n_embd / n_head: transformers has no class for this variant"
        )
    return dict(
        architectures=["GPT2LMHeadModel"], model_type="gpt2", vocab_size=config.vocab_size,
        n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
        n_head=config.n_head, n_inner=config.ff_width,
        activation_function="gelu_new" if config.act == "gelu" else "relu",
        resid_pdrop=config.dropout, embd_pdrop=config.dropout, attn_pdrop=config.dropout,
        layer_norm_epsilon=1e-5, tie_word_embeddings=config.tie, bos_token_id=0, eos_token_id=0,
    )


def from_published(found: dict, names: set[str]) -> Config:
    """What `config.json` says, and the names of the weights -> our settings."""
    acts = dict(gelu_new="gelu", gelu_pytorch_tanh="gelu", relu="relu")
    return Config(
        found["vocab_size"], found.get("n_positions", found.get("n_ctx", 1024)), found["n_layer"],
        found["n_head"], found["n_embd"], n_ff=found.get("n_inner"),
        dropout=found.get("resid_pdrop", 0.1),
        act=acts[found.get("activation_function", "gelu_new")],
        tie=found.get("tie_word_embeddings", True),
    )


# --------------------------------------------------------------------------------------------------
# 8. Fine-tuning: answer a prompt
# --------------------------------------------------------------------------------------------------

# A small model soon knows its examples by heart, so that the held-out loss rises from the second
# epoch on; yet only then does it do what the prompt says. (Also seen with large ones: Ouyang et al.
# 2022, 3.5.) So laptop's run is evaluated at its end alone.
FINETUNING = {  # settings that go with a model's size: "published" for those 512 wide and more
    "laptop": dict(
        epochs=4.0, batch_size=16, optimizer="adamw", lr=0.003, matrix_lr=0.01, weight_decay=0.0,
        eval_interval=1000,
    ),
    "published": dict(
        epochs=3.0, batch_size=8, optimizer="adamw", lr=3e-5, warmup_steps=50, weight_decay=0.01,
        eval_interval=0,
    ),
}


@dataclass
class Task:
    """Answer a prompt: <|endoftext|> prompt, line break, response <|endoftext|>.

    The loss is on the response and the <|endoftext|> behind it alone: so the model learns to
    answer, and to end, but not to ask. Where responses are rated, from 1 to 5, each token's loss
    weighs as much as the rating.
    """

    min_rating: float = 0.0  # leave out responses with a lower rating

    columns, optional = ("prompt", "response"), ("rating",)

    @staticmethod
    def demonstration(story: dict) -> dict:
        """A request for a story -> its first paragraph."""
        prompt = f"Tell me a story about the {story['topic']}: {story['title']}"
        return dict(prompt=prompt, response=story["text"].partition("\n\n")[0])

    def fit(self, config: Config, parts: dict) -> Config:
        """The architecture for the task. (BERT gets a head with the labels.)"""
        return config

    def encode(self, row: dict, tokenizer, config: Config) -> dict | None:
        """A row as idx, targets and weight; None if it is left out. What does not fit is cropped:
        first the prompt's beginning, down to half of the context, then the response's end."""
        weight = self.read_rating(row) if "rating" in row else 1.0
        if "rating" in row and weight < self.min_rating:
            return None
        end, room = tokenizer.special[SEPARATOR], config.block_size + 1
        prompt = self.encode_prompt(row["prompt"], tokenizer)
        response = [*tokenizer.encode(row["response"]), end]
        cropped = len(prompt) + len(response) > room
        prompt = prompt[-max(room - len(response), room // 2) :]
        response = response[: room - len(prompt)]
        ids = prompt + response
        targets = [-100] * (len(prompt) - 1) + response
        return dict(
            idx=ids[:-1], targets=targets, weight=weight, length=len(targets), cropped=cropped)

    @staticmethod
    def read_rating(row: dict) -> float:
        """Raises ValueError for what is no number from 1 to 5."""
        with contextlib.suppress(ValueError):
            if 1 <= float(row["rating"]) <= 5:
                return float(row["rating"])
        raise ValueError(f"{row['place']}: rating {row['rating']!r} is no number from 1 to 5")

    @staticmethod
    def encode_prompt(prompt: str, tokenizer) -> list[int]:
        """What stands before a response."""
        return [tokenizer.special[SEPARATOR], *tokenizer.encode(prompt), *tokenizer.encode("\n")]

    def collate(self, examples: list[dict], tokenizer, generator=None) -> dict:
        """-> a batch: idx, targets (B, T) int64, weights (B,). Padding is on the right, where the
        causal mask hides it from every token that is asked for."""
        from data import pad

        idx, targets = (
            torch.from_numpy(pad([example[name] for example in examples], fill))
            for name, fill in (("idx", 0), ("targets", -100))
        )
        weights = torch.tensor([example["weight"] for example in examples])
        return dict(idx=idx, targets=targets, weights=weights)

    def score(self, model: Model, examples, groups) -> tuple[dict, str]:
        """What else can be measured, and a table: of free text, nothing."""
        return {}, ""

    def prepare(self, model: Model, n: int) -> list[nn.Module]:
        """What --freeze n keeps as it is: the embeddings and the lowest n blocks."""
        if n > len(model.blocks):
            raise ValueError(f"--freeze {n}: the model has {len(model.blocks)} layers")
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        return [*embeddings, *model.blocks[:n]] if n else []

    def demonstrate(self, model: Model, examples, length: int) -> str:
        """The answer to a held-out prompt."""
        prompt, options = examples.rows[0]["prompt"], GenerateConfig(max_new_tokens=length)
        return f"{prompt}\n{self.answers(model, examples.tokenizer, prompt, options)[0]}"

    def answers(
        self, model: Model, tokenizer, prompt: str, options: GenerateConfig, on_text=None
    ) -> list[str]:
        """What the model answers: until it ends, or the context does."""
        from data import say

        ids = self.encode_prompt(prompt, tokenizer)
        if len(ids) > model.config.block_size // 2:
            ids = ids[-(model.config.block_size // 2) :]
            say(f"the prompt is long: only its last {len(ids)} tokens are read")
        room = model.config.block_size + 1 - len(ids)
        options = replace(
            options, max_new_tokens=min(options.max_new_tokens, room),
            temperature=0.3 if options.temperature is None else options.temperature,
        )
        return continuations(model, tokenizer, ids, options, on_text)


# --------------------------------------------------------------------------------------------------
# 8b. The ladder: from a bigram to a GPT in twelve steps
# --------------------------------------------------------------------------------------------------

FIRST_STEP = dict(  # two tables: what a token is, and what follows such a token
    n_layer=0, n_head=1, n_embd=64, n_ff=0, pos="none", norm="none", residual=False, tie=False,
)
LADDER = [  # name, what changes (the last one: several things), and what to see
    ("bigram", {},
     "Guesses the next token from the last one alone: the best that can be done without looking "
     "further back."),
    ("one attention head", dict(n_layer=1, pos="learned"),
     "Now a position can fetch something from the ones before it. But what the head fetches takes "
     "the place of the token itself, so hardly anything is gained."),
    ("several heads", dict(n_head=4),
     "Four narrower heads look at four places at once, say the last letter and the one before it, "
     "for the same number of weights."),
    ("+ feed-forward", dict(n_ff=64),
     "After the positions have exchanged what they know, each can think about it: something that "
     "is not linear. But the result takes the place of what was fetched: there is hardly a gain, "
     "and in a short run a loss."),
    ("three blocks", dict(n_layer=3),
     "Deeper should be better, and is much worse: each block passes on nothing but its own output. "
     "What the first one saw has to survive two more, and the gradient the same way back."),
    ("+ residuals", dict(residual=True),
     "Each sublayer adds to a stream instead of replacing it. Tokens and gradients now have a "
     "direct way through: the same depth pays at last."),
    ("wider feed-forward", dict(n_ff=256),
     "Four times as wide, as in GPT-2 and BERT. Most of a transformer's weights, and of what "
     "it knows by heart, are here."),
    ("post-LN", dict(norm="post"),
     "LayerNorm after each sublayer, as in the first transformer and in BERT: numbers stay in "
     "range, so steps can be long; but the direct way is bent at each of them."),
    ("pre-LN", dict(norm="pre"),
     "LayerNorm before each sublayer, as in GPT-2: sublayers get numbers in range, and the stream "
     "itself is left alone. With three blocks that is much the same; with thirty only this one "
     "trains without special care."),
    ("dropout", dict(dropout=0.1),
     "A tenth of the activations is zeroed, against learning by heart. In a run as short as this "
     "one nothing is learned by heart yet, so it only costs."),
    ("deeper", dict(n_layer=6),
     "Twice the blocks, each a further round of looking back and thinking. What it can do shows "
     "in longer runs; here it pays a little, for twice the time."),
    ("the full model", dict(n_embd=128, n_ff=512, dropout=0.0, pos="rotary", tie=True),
     "Twice as wide, without dropout; with rotary positions, by which a head sees distances, and "
     "one table for reading and writing tokens."),
]


@dataclass
class LadderConfig:
    """The same for all twelve steps."""

    out_dir: str = f"out/{NAME}-ladder"  # folder for ladder.json and ladder.svg
    data: str = "input.txt"  # a file, folder or URL, or shakespeare, tinystories, imdb
    vocab_size: int = 257  # token types (257: bytes)
    block_size: int = 64  # context, in tokens
    max_steps: int = 300  # optimizer steps
    batch_size: int = 32  # windows in a step
    lr: float = 0.02  # AdamW's highest learning rate
    matrix_lr: float = 0.03  # Muon's highest learning rate
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the fastest there is
    seed: int = 0  # of all random draws: the same seed, the same result


def climb(config: Config, corpus, run: "TrainConfig", device, dtype):
    """One step of the ladder -> (its row of ladder.json, its curve [(step, loss), ...]). The whole
    of training in a dozen lines; `Muon`, `schedule` and `update` are explained in section 9."""
    import data

    start = time.perf_counter()
    torch.manual_seed(run.seed)
    model, autocast = GPT(config).to(device), data.autocast_to(dtype, device)
    optimizer = Muon(model, run, dtype)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    losses = []
    for step in range(run.max_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["highest_lr"] * schedule(step, run)
        batch = train_batch(corpus, config, ObjectiveConfig(), run, step)
        losses.append(update(model, batch, optimizer, scaler, autocast, run))
    losses = torch.stack(losses).tolist()
    seconds = time.perf_counter() - start
    batches = eval_batches(corpus, config, ObjectiveConfig(), 8 * run.batch_size)
    with autocast:
        text = demonstrate(model, corpus, 100)[:100]
    n = max(run.max_steps // 20, 1)
    curve = [(i + n, sum(losses[i : i + n]) / n) for i in range(0, len(losses) - n + 1, n)]
    return dict(
        parameters=sum(p.numel() for p in model.parameters()), train_loss=curve[-1][1],
        val_loss=evaluate(model, batches, autocast)["val_loss"], seconds=round(seconds, 2),
        sample=text,
    ), curve


def ladder_command(paradigm, settings: dict, given: dict) -> int:
    """From a bigram to a GPT: twelve models, each a small change of the one before."""
    import data

    options = data.build(LadderConfig, settings)
    device = data.choose_device(options.device)
    dtype = data.choose_dtype(options.dtype, device)
    if device.type == "cpu":
        data.keep_freed_memory()
    run = data.build(TrainConfig, settings)
    corpus = data.prepare(options.data, options.vocab_size, SPECIAL_TOKENS, SEPARATOR)
    config = GPTConfig(corpus.tokenizer.vocab_size, options.block_size, **FIRST_STEP)
    rows_per_epoch(corpus, config, ObjectiveConfig())  # is there enough text?
    folder, rows, curves = Path(options.out_dir), [], {}
    print(f"{'':<22}{'parameters':>10}{'training':>10}{'validation':>12}{'seconds':>9}")
    for i, (name, change, why) in enumerate(LADDER, 1):
        config = replace(config, **change)
        row, curves[f"{i} {name}"] = climb(config, corpus, run, device, dtype)
        rows.append(dict(name=name) | row)
        print(f"{i:>2} {name:<19}{row['parameters']:>10,}{row['train_loss']:>10.3f}"
              f"{row['val_loss']:>12.3f}{row['seconds']:>9.1f}")
        print(textwrap.indent(textwrap.fill(why, 90), "     "))
        sample = " / ".join(line for line in row["sample"].splitlines() if line.strip())
        print(textwrap.indent(textwrap.fill(sample, 88), "     | "), flush=True)
        with data.replacing(folder / "ladder.json", "w") as file:
            json.dump(rows, file, indent=1)
        with data.replacing(folder / "ladder.svg", "w") as file:
            title = f"The ladder: {Path(options.data).name}"
            file.write(data.line_chart(curves, title, "step", "loss"))
    print(f"{folder} holds ladder.json and ladder.svg")
    return 0


OWN_COMMANDS = {"ladder": (ladder_command, (LadderConfig,))}  # that the other two do not have

# --------------------------------------------------------------------------------------------------
# 9. Training: from here on the three model files are the same, letter by letter
# --------------------------------------------------------------------------------------------------
# To change something: the optimizer is `Muon`, made in Trainer.__init__; the learning rate's course
# is `schedule`; a batch comes from `train_batch` (5); a metric is a line in `loss_sum` (5); the log
# is written by Trainer.report and evaluate_and_save. To train on something else, replace methods of
# Trainer, as FineTuner does. data.py is imported where it is used: the models can do without it.


@dataclass
class RunConfig:
    """Which weights, on which machine."""

    out_dir: str = f"out/{NAME}"  # folder of a run: checkpoints, log and chart
    init_from: str = ""  # a checkpoint, a folder, a published model (default: what out_dir holds)
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: the best there is
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: the fastest there is
    seed: int = 0  # of all random draws: the same seed, the same result


@dataclass
class TrainConfig(RunConfig):
    """What to learn from, for how long, and how fast."""

    init_from: str = "scratch"  # scratch, resume, a checkpoint, a folder, a published model
    data: str = "input.txt"  # a file, folder or URL, or shakespeare, tinystories, imdb
    max_steps: int = RECIPES["laptop"]["max_steps"]  # optimizer steps
    epochs: float = 0.0  # passes over the training part; if given, max_steps follows from it
    batch_size: int = RECIPES["laptop"]["batch_size"]  # sequences that are computed at once
    grad_accum: int = 1  # such batches per step; their gradients are added
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: for matrices, with AdamW for all else
    lr: float = RECIPES["laptop"]["lr"]  # AdamW's highest learning rate
    matrix_lr: float = RECIPES["laptop"]["matrix_lr"]  # Muon's highest learning rate
    weight_decay: float = 0.0  # matrices shrink by this times the learning rate at each step
    warmup_steps: int = 20  # steps in which the learning rate rises
    schedule: Literal["linear", "cosine"] = "linear"  # how it falls to zero afterwards
    grad_clip: float = 1.0  # largest norm of the gradient; longer ones are scaled down (0: never)
    log_interval: int = 10  # steps between two lines of the log
    eval_interval: int = 100  # steps between two evaluations, each with a checkpoint (0: epoch)
    snapshot_interval: int = 0  # steps between two checkpoints that are kept for good (0: none)
    compile: bool = False  # torch.compile: pays on a GPU, in long runs

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "max_steps", "batch_size", "grad_accum", "log_interval")
        at_least(self, 0, "seed", "epochs", "lr", "matrix_lr", "weight_decay", "warmup_steps",
                 "grad_clip", "eval_interval", "snapshot_interval")

    @property
    def rows(self) -> int:
        """How many sequences a step learns from."""
        return self.batch_size * self.grad_accum


@dataclass
class FinetuneConfig(TrainConfig):
    """Which model learns from which examples, and how much of it may change."""

    out_dir: str = f"out/{NAME}-finetuned"  # folder of this run
    init_from: str = f"out/{NAME}"  # a run, a checkpoint, a folder, a published model, or resume
    data: str = ""  # a .csv or .jsonl file, or a folder of two (default: out of input.txt)
    epochs: float = FINETUNING["laptop"]["epochs"]  # passes, unless max_steps is given
    batch_size: int = FINETUNING["laptop"]["batch_size"]  # examples that are computed at once
    optimizer: Literal["muon", "adamw"] = FINETUNING["laptop"]["optimizer"]  # as in training
    lr: float = FINETUNING["laptop"]["lr"]  # AdamW's highest learning rate
    matrix_lr: float = FINETUNING["laptop"]["matrix_lr"]  # Muon's highest learning rate
    weight_decay: float = FINETUNING["laptop"]["weight_decay"]  # as in training
    warmup_steps: int = 20  # steps in which the learning rate rises (at most a fifth of all)
    log_interval: int = 20  # steps between two lines of the log
    eval_interval: int = FINETUNING["laptop"]["eval_interval"]  # as in training (0: an epoch)
    freeze: int = 0  # so many of the lowest layers, and the embeddings, stay as they are
    patience: int = 3  # stop after so many evaluations without a lower held-out loss (0: never)
    dropout: float | None = None  # share of activations zeroed in training (default: the model's)
    scratch: bool = False  # forget the weights: what is learned without pretraining?

    def __post_init__(self):
        super().__post_init__()
        at_least(self, 0, "freeze", "patience")


def orthogonalize(matrices, steps: int = 5):
    """Newton-Schulz iteration: the nearest matrices whose singular values are all about 1.

    matrices (n, rows, cols), in the dtype that multiplies fastest. X <- aX + b(XX^T)X + c(XX^T)^2 X
    moves each singular value s to as + bs^3 + cs^5, and these a, b, c bring all from 0.003 to 1 to
    0.7 to 1.2 in five rounds (Jordan 2024, https://kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrices.size(-2) <= matrices.size(-1)
    X = matrices if wide else matrices.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is above 1
    for _ in range(steps):
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)  # aX + (bA + cAA)X
    return X if wide else X.mT


class Muon(torch.optim.Optimizer):
    """Muon for inner matrices, AdamW for all else: one optimizer, so that an overflow in float16
    skips both.

    AdamW steps by a fixed size in each *number*; Muon, in each *direction* of a matrix: it takes
    a running mean of the gradients and makes all its singular values 1, so that rare directions are
    learned as fast as common ones. Matrices of equal shape are stacked, for one product.
    """

    def __init__(self, model: nn.Module, run: TrainConfig, dtype: torch.dtype):
        self.dtype = dtype  # of the Newton-Schulz products
        self.learning = [p for p in model.parameters() if p.requires_grad]  # the others: frozen
        kinds = {}  # (kind, matrix shape, does it decay?, factor of the rate) -> parameters
        for name, p in model.named_parameters():
            if not p.requires_grad:
                continue
            inner = p.ndim == 2 and not ("embedding" in name or "head" in name)
            if run.optimizer == "muon" and inner:
                kind, shape = "muon", (len(p) // getattr(p, "maps", 1), p.size(1))
            else:
                kind, shape = "adamw", None
            decays = p.ndim >= 2  # biases and norms do not
            key = kind, shape, decays, getattr(p, "lr_factor", 1.0)
            kinds.setdefault(key, []).append(p)
        groups = []
        for (kind, shape, decays, lr_factor), params in kinds.items():
            highest = lr_factor * (run.matrix_lr if kind == "muon" else run.lr)
            groups.append(dict(
                params=params, kind=kind, shape=shape, lr=highest, highest_lr=highest,
                weight_decay=run.weight_decay if decays else 0.0,
            ))
        super().__init__(groups, {})

    def gradients(self) -> list[torch.Tensor]:
        """Those of all weights that learn; zeros where no loss reached one."""
        for p in self.learning:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        return [p.grad for p in self.learning]

    @torch.no_grad()
    def step(self, closure=None):
        """Change all weights by their gradients."""
        self.gradients()
        for group in self.param_groups:
            (self.step_muon if group["kind"] == "muon" else self.step_adamw)(group)

    def step_muon(self, group, momentum: float = 0.95):
        """m <- 0.95 m + 0.05 g; p -= lr_of_shape * orthogonalize(0.95 m + 0.05 g), for a stack of
        matrices (Jordan 2024)."""
        params, lr, (rows, cols) = group["params"], group["lr"], group["shape"]
        gradient = torch.cat([p.grad.view(-1, rows, cols) for p in params])  # (n, rows, cols)
        state = self.state[params[0]]  # of the whole stack
        if not state:
            state["momentum"] = torch.zeros_like(gradient)
        average = state["momentum"].lerp_(gradient, 1 - momentum)
        ahead = gradient.lerp(average, momentum)
        directions = orthogonalize(ahead.to(self.dtype)).to(gradient.dtype)  # (n, rows, cols)
        lr_of_shape = lr * max(1, rows / cols) ** 0.5  # tall ones take longer steps (Jordan 2024)
        for p, direction in zip(params, directions.split([len(p) // rows for p in params])):
            p.mul_(1 - lr * group["weight_decay"]).sub_(
                direction.reshape(p.shape), alpha=lr_of_shape
            )

    def step_adamw(self, group, betas=(0.9, 0.95), eps: float = 1e-8):
        """p -= lr * (mean of g) / (root of mean g^2), means of recent steps (Kingma & Ba 2015), and
        lr * weight_decay * p (Loshchilov & Hutter 2019)."""
        params, states = group["params"], [self.state[p] for p in group["params"]]
        for p, state in zip(params, states):
            if not state:
                state.update(
                    count=torch.zeros((), device=p.device),
                    mean=torch.zeros_like(p), square=torch.zeros_like(p),
                )
        adamw(  # fused: all in one kernel; the empty list is for AMSGrad's maxima
            params, [p.grad for p in params], [state["mean"] for state in states],
            [state["square"] for state in states], [], [state["count"] for state in states],
            fused=True, amsgrad=False, maximize=False, beta1=betas[0], beta2=betas[1],
            lr=group["lr"], weight_decay=group["weight_decay"], eps=eps,
        )


def schedule(step: int, run: TrainConfig) -> float:
    """The share of the highest learning rate at a step (from 0): up in a line, down to zero."""
    if step < run.warmup_steps:
        return (step + 1) / (run.warmup_steps + 1)
    left = (run.max_steps - step) / max(run.max_steps - run.warmup_steps, 1)  # from 1 down to 0
    return left if run.schedule == "linear" else 0.5 - 0.5 * math.cos(math.pi * left)


def update(model, batch: dict, optimizer, scaler, autocast, run: TrainConfig) -> torch.Tensor:
    """One optimizer step, in run.grad_accum parts, by all ranks (processes) -> the mean loss.

    autocast: matrix products in a narrower dtype. scaler: multiplies the loss in float16, where
    small gradients would be 0 otherwise, and divides them again.
    """
    from data import add_up, ranks

    model.train()
    rows, (rank, count) = len(next(iter(batch.values()))), ranks()
    mine = range(rows * rank // count, rows * (rank + 1) // count)  # each rank has its share
    size, device = math.ceil(rows / run.grad_accum), next(model.parameters()).device
    total = torch.zeros(2, device=device)  # loss, weight
    for i in mine[::size]:
        taken = slice(i, min(i + size, mine.stop))
        part = {name: tensor[taken].to(device) for name, tensor in batch.items()}
        with autocast:
            loss, weight, _ = loss_sum(model, part)
        scaler.scale(loss / rows).backward()  # (/ rows: within the range of float16)
        total += torch.stack([loss.detach(), torch.as_tensor(weight, device=device)])
    gradients = optimizer.gradients()
    add_up([*gradients, total])  # over all ranks
    scaler.unscale_(optimizer)
    # Only now is the weight of all parts known: undo / rows, divide by it, then clip.
    loss, weight = total
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
    from data import from_all, ranks

    model.eval()
    device, sums = next(model.parameters()).device, {}  # name -> its two sums
    for batch in itertools.islice(batches, ranks()[0], None, ranks()[1]):  # each rank has its share
        with autocast:
            loss, weight, metrics = loss_sum(
                model, {name: tensor.to(device) for name, tensor in batch.items()}
            )
        for name, (over, under) in {"val_loss": (loss, weight), **metrics}.items():
            sums[name] = sums.get(name, 0) + np.array([float(over), float(under)])
    found = from_all(sums)
    totals = {name: sum(part[name] for part in found if name in part) for name in found[0]}
    return {name: float(over / under) for name, (over, under) in totals.items()}


def evaluate_task(task: Task, model, examples, autocast, size: int) -> tuple[dict, str]:
    """(val_loss and the task's own measures over all examples, `size` at once; a table of them)."""
    from data import in_order_of_length

    groups = in_order_of_length(examples.lengths, size)
    found = evaluate(model, map(examples.batch, groups), autocast)
    with autocast:
        measures, table = task.score(model, examples, groups)
    return found | measures, table


class Trainer:
    """A run: its corpus, model and optimizer, and how far it is.

    Step n's batch and dropout are drawn from (seed, n), so a resumed run goes on exactly as if it
    had never been stopped, and a checkpoint has to hold no generator's state. With several ranks
    (`torchrun --nproc_per_node=2 ...`) each draws the whole batch and computes its share of it, so
    the same flags give the same losses; the first alone writes files.
    """

    unit = "loss per token"  # of the chart
    task, stops_early, table = None, False, ""  # see FineTuner

    def __init__(
        self, run: TrainConfig, config: Config, objective: ObjectiveConfig,
        checkpoint: dict | None = None,
    ):
        """checkpoint: what `data.load_checkpoint` read. With --init_from resume the run goes on
        from its step; otherwise only its weights and tokenizer are taken."""
        import data

        self.out_dir = Path(run.out_dir)
        self.device = data.choose_device(run.device)
        data.meet(self.device)
        self.dtype = data.from_all(data.choose_dtype(run.dtype, self.device))[0]
        if self.device.type == "cpu":
            data.keep_freed_memory()
        self.config, self.objective = config, objective
        epoch = self.open_data(run, checkpoint)
        steps = max(math.ceil(run.epochs * epoch / run.rows), 1) if run.epochs else run.max_steps
        self.run = run = replace(
            run, max_steps=steps, epochs=0.0, dtype=str(self.dtype).removeprefix("torch."),
            eval_interval=run.eval_interval or math.ceil(epoch / run.rows),
            # Few examples make few steps; not all of them are to be warm-up.
            warmup_steps=min(run.warmup_steps, steps // 5) if self.task else run.warmup_steps,
        )

        torch.manual_seed(run.seed)
        self.model = Model(self.config).to(self.device)
        if checkpoint:
            self.take_weights(run, checkpoint)
        self.optimizer = Muon(self.model, run, self.dtype)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.autocast = data.autocast_to(self.dtype, self.device)
        self.step, self.best = 0, math.inf
        self.pending = []  # loss and number of tokens of the steps since the last report
        if run.init_from == "resume":
            self.step, self.best = checkpoint["step"], checkpoint["best_loss"]
            self.pending = data.resume(checkpoint, self.optimizer, self.scaler, self.device)
        self.compiled = torch.compile(self.model) if run.compile else self.model

    def open_data(self, run: TrainConfig, checkpoint: dict | None) -> int:
        """Get what there is to learn from, and the tokenizer. Returns the rows of an epoch."""
        import data

        tokenizer = checkpoint["tokenizer"] if checkpoint else None
        self.corpus = data.prepare(
            run.data, self.config.vocab_size, SPECIAL_TOKENS, SEPARATOR, tokenizer
        )
        self.tokenizer = self.corpus.tokenizer
        if not checkpoint:
            self.config = replace(self.config, vocab_size=self.tokenizer.vocab_size)
        return rows_per_epoch(self.corpus, self.config, self.objective)

    def take_weights(self, run: TrainConfig, checkpoint: dict) -> None:
        """Begin with the checkpoint's weights."""
        self.model.load_state_dict(checkpoint["model"])

    def train(self) -> bool:
        """Train to max_steps; False if Ctrl-C came first. Either way ckpt.pt is up to date."""
        from data import from_all, interrupts, one_process, ranks

        run, lock = self.run, self.out_dir / f"rank{ranks()[0]}.lock"
        with one_process(lock), interrupts() as pressed:
            self.begin()
            while self.step < run.max_steps and not self.stops_early:
                try:
                    if any(from_all(bool(pressed))):  # Ctrl-C, in whichever process
                        break
                    self.pending.append(self.train_step())
                except ConnectionError:  # another rank is gone
                    self.save("ckpt.pt")
                    raise
                self.step += 1
                evaluating = self.step % run.eval_interval == 0 or self.step == run.max_steps
                keeping = run.snapshot_interval and self.step % run.snapshot_interval == 0
                if keeping or pressed:  # nothing is saved of a run that has diverged
                    self.log.check(float(self.pending[-1][0]), self.step)
                if evaluating or self.step % run.log_interval == 0:
                    self.report()
                if evaluating:
                    self.evaluate_and_save()
                if keeping:
                    self.save(f"ckpt_{self.step:06d}.pt")
            finished = self.step >= run.max_steps or self.stops_early
            if not finished:
                self.save("ckpt.pt")
        return finished

    def train_step(self) -> tuple[torch.Tensor, int]:
        """One step on its batch; returns the loss per token and how many tokens it read."""
        from data import ranks

        run = self.run
        for group in self.optimizer.param_groups:
            group["lr"] = group["highest_lr"] * schedule(self.step, run)
        torch.manual_seed(hash((run.seed, self.step)) + ranks()[0])  # for dropout
        batch = self.draw_batch()
        return (
            update(self.compiled, batch, self.optimizer, self.scaler, self.autocast, run),
            count_tokens(batch),
        )

    def draw_batch(self) -> dict:
        """The batch of this step."""
        return train_batch(self.corpus, self.config, self.objective, self.run, self.step)

    def evaluate(self) -> dict[str, float]:
        """val_loss and what else is measured on what is held out."""
        batches = eval_batches(self.corpus, self.config, self.objective, self.run.batch_size)
        return evaluate(self.model, batches, self.autocast)

    def evaluate_and_save(self) -> None:
        """Evaluate, log, show a sample; keep the weights if the best so far; save the state."""
        found = self.evaluate()
        self.log.check(found["val_loss"], self.step)
        self.log.write(step=self.step, **found)
        self.log.say("  ".join(
            [f"step {self.step}", *(f"{name} {value:.4f}" for name, value in found.items())]
        ))
        if self.step < self.run.max_steps:
            self.log.say(*("    " + line for line in self.show(40).splitlines() if line))
        if found["val_loss"] < self.best:
            self.best = found["val_loss"]
            self.save("best.pt", weights_only=True)
        self.save("ckpt.pt")
        self.log.draw(f"{NAME}: {self.unit}, {self.step} of {self.run.max_steps} steps")
        self.log.start_clock()

    def show(self, length: int) -> str:
        """A sample of what the model can do by now."""
        torch.manual_seed(self.run.seed)
        self.model.eval()
        with self.autocast:
            return self.demonstrate(length)

    def demonstrate(self, length: int) -> str:
        """A sample of about `length` tokens."""
        return demonstrate(self.model, self.corpus, length)

    def describe_data(self) -> str:
        """What there is to learn from, for the first line."""
        corpus = self.corpus
        return (
            f"{self.run.data}, {corpus.documents:,} document{'s' * (corpus.documents != 1)}; "
            f"{len(corpus.train):,} tokens to train on, {len(corpus.validation):,} to validate; "
            f"vocabulary of {self.config.vocab_size:,}"
        )

    def report(self) -> None:
        """Log the mean loss since the last report. Raises ValueError if the run has diverged."""
        losses = torch.stack([loss for loss, _ in self.pending]).tolist()  # (waits for the device)
        tokens, self.pending = sum(tokens for _, tokens in self.pending), []
        lr = schedule(self.step - 1, self.run) * self.run.lr
        guess = math.log(self.config.vocab_size)
        self.log.report(self.step, self.run, losses, tokens, lr, guess)

    def begin(self) -> None:
        """Say what comes; write run.json, tokenizer.json and, for a new run, the first ckpt.pt."""
        from data import RunLog, naming, ranks, replacing, set_aside

        run, parts = self.run, [self.config, self.objective, self.run]
        if run.init_from != "resume":
            set_aside(self.out_dir)
        self.log = RunLog(self.out_dir, self.step if run.init_from == "resume" else None)
        if ranks()[0] > 0:
            return
        for left in self.out_dir.glob("*.tmp"):  # of a run that was killed while it wrote
            left.unlink()
        settings = {name: value for part in parts for name, value in asdict(part).items()}
        with replacing(self.out_dir / "run.json", "w") as file:
            json.dump(settings | ({"task": asdict(self.task)} if self.task else {}), file, indent=1)
        with naming(self.out_dir / "tokenizer.json"):
            self.tokenizer.save(self.out_dir / "tokenizer.json")
        weights = sum(p.numel() for p in self.model.parameters())
        self.log.say(
            f"data: {self.describe_data()}",
            f"model: {weights / 1e6:.2f} million parameters, on {self.device.type} in {run.dtype}; "
            f"{run.max_steps:,} steps of {run.rows} sequences",
        )
        if self.step:
            self.log.say(f"resumed at step {self.step}")
        else:
            self.save("ckpt.pt")

    def save(self, name: str, weights_only: bool = False) -> None:
        """Write a checkpoint: tensors and plain types only. The old one stays until it is whole."""
        from data import ranks, replacing

        if ranks()[0] > 0:
            return
        state = dict(
            name=NAME, step=self.step, best_loss=self.best,
            config=asdict(self.config), objective=asdict(self.objective), run=asdict(self.run),
            task=asdict(self.task) if self.task else None,
            documents=self.corpus.documents if self.corpus else 0, model=self.model.state_dict(),
            pending=[(float(loss), tokens) for loss, tokens in self.pending],
        )
        if not weights_only:
            state |= dict(optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
        with replacing(self.out_dir / name) as file:
            torch.save(state, file)


class FineTuner(Trainer):
    """A run that learns a task from examples, and stops when it only learns them by heart."""

    unit, corpus = "loss on the examples", None

    def __init__(self, run: FinetuneConfig, config, objective, checkpoint: dict, task: Task):
        self.task = task
        super().__init__(run, config, objective, checkpoint)

    def open_data(self, run: FinetuneConfig, checkpoint: dict) -> int:
        from data import Batches, Examples, task_rows

        self.tokenizer, parts = checkpoint["tokenizer"], task_rows(self.task, run.data)
        self.config = self.task.fit(self.config, parts)
        if run.dropout is not None:
            self.config = replace(self.config, dropout=run.dropout)
        self.examples, self.held_out = (
            Examples(self.task, parts[part], self.tokenizer, self.config, parts["train"])
            for part in ("train", "validation")
        )
        if not self.examples.rows or not self.held_out.rows:
            raise ValueError(f"{run.data}: no examples are left to learn from, or to hold out")
        self.batches = Batches(self.examples.lengths, run.rows, run.seed)
        return len(self.examples.rows)

    def take_weights(self, run: FinetuneConfig, checkpoint: dict) -> None:
        """The checkpoint's, but for those of another task; freeze what is not to change."""
        weights, frozen = checkpoint["model"], self.task.prepare(self.model, run.freeze)
        if run.init_from != "resume":
            shapes = {name: tensor.shape for name, tensor in self.model.state_dict().items()}
            weights = {
                name: tensor for name, tensor in weights.items()
                if not run.scratch and tensor.shape == shapes.get(name)
            }
        self.model.load_state_dict(weights, strict=run.init_from == "resume")
        for module in frozen:
            module.requires_grad_(False)

    def draw_batch(self) -> dict:
        generator = np.random.default_rng((self.run.seed, self.step))
        return self.examples.batch(self.batches[self.step], generator)

    def evaluate(self) -> dict[str, float]:
        found, self.table = evaluate_task(
            self.task, self.model, self.held_out, self.autocast, self.run.batch_size)
        return found

    @property
    def stops_early(self) -> bool:
        """Whether the last `patience` evaluations found no lower loss."""
        losses = [row["val_loss"] for row in self.log.rows if "val_loss" in row]
        patience = self.run.patience
        return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])

    def demonstrate(self, length: int) -> str:
        return self.task.demonstrate(self.model, self.held_out, length)

    def describe_data(self) -> str:
        learn, held_out = self.examples, self.held_out
        notes = {"cropped": learn.cropped + held_out.cropped,
                 "left out": learn.left_out + held_out.left_out}
        return "; ".join([
            f"{self.run.data or 'the stories of input.txt'}, {len(learn.rows):,} examples to learn "
            f"from, {len(held_out.rows):,} held out",
            *(f"{n:,} {what}" for what, n in notes.items() if n),
        ])


# --------------------------------------------------------------------------------------------------
# 10. The command line
# --------------------------------------------------------------------------------------------------


def from_pretrained(name_or_folder) -> Model:
    """A model that was trained here, by its run's folder or a checkpoint's path; or a published
    one, by its name on the Hugging Face hub or of its folder. In evaluation mode, float32.

    Raises ValueError or OSError where it is none, or not of this file's architecture.
    """
    from data import open_weights

    return open_weights(sys.modules[__name__], name_or_folder)


def save_pretrained(model, folder, task: dict | None = None) -> None:
    """Write config.json and model.safetensors, which `transformers` opens with the same results.

    task: of a fine-tuned model, the fields of `Task`. Raises ValueError for a variant that
    `transformers` has no class for, OSError where nothing can be written.
    """
    from data import save_published

    save_published(folder, to_published(model.config), published_weights(model), task)


Model.from_pretrained, Model.save_pretrained = staticmethod(from_pretrained), save_pretrained


def main(arguments: list[str] | None = None) -> int:
    """Run a command; exit status: 0 done, 2 the user's mistake (a line says which), 130 Ctrl-C.

    The commands are in data.py: they read flags and files, and call what stands above.
    """
    try:
        from data import run_command
    except ImportError as error:
        if error.name not in ("bpe", "data"):
            raise
        hidden = not isinstance(error, ModuleNotFoundError)
        print(f"error: {error.name}.py is {'hidden by a namesake' if hidden else 'missing'}: put "
              f"bpe.py and data.py beside {NAME}.py", file=sys.stderr)
        return 2
    return run_command(sys.modules[__name__], sys.argv[1:] if arguments is None else arguments)


if __name__ == "__main__":
    sys.exit(main())
