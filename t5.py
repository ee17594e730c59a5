"""T5: an encoder that reads a text with gaps, and a decoder that writes what belongs in them.

A GPT only continues, a BERT only understands. T5 does both, text in and text out, and every task
can be said in that form. To learn from plain text, spans of it are cut out (15 % of the tokens,
three at a time on average). A sentinel marks each gap, and the target is the gaps' contents:

    text      The old man sat by the sea and counted the waves .
    source    The old <extra_id_0> the sea and counted <extra_id_1> </s>
    decoder   <pad> <extra_id_0> man sat by <extra_id_1> the waves .     (the target, one behind)
    target    <extra_id_0> man sat by <extra_id_1> the waves . </s>

The encoder reads the source, every position all others, as in BERT. The decoder writes the target
from left to right, as in GPT, and each of its blocks also looks at what the encoder made of the
source (cross-attention). Nothing marks positions; instead, the scores of self-attention get a
learned bias for how far apart two tokens are (those of cross-attention get none). Norms only scale,
and no layer has a bias of its own.

    python t5.py                                    train on input.txt: 4 to 5 minutes on a laptop
    python t5.py generate --prompt "The cat sat on the <extra_id_0>."         fill the gaps
    python t5.py eval                               the loss, and how many tokens of spans are right
    python t5.py finetune                           learn to give a story a title
    python t5.py finetune --data texts.csv          or your sources and targets
    python t5.py bench                              how fast this machine is at it
    python t5.py generate --init_from t5-small      the published weights (or those in a folder)
    python t5.py export --to FOLDER                 what was trained, for transformers
    python t5.py --help                             every flag

The lesson of this file is how source and target find each other: see `T5.init_attention`. It reads
from top to bottom: 1 this page, 2 the configuration, 3 layers, 4 the model, 5 the objective,
6 generation, 7 published weights, 8 fine-tuning, 9 training, 10 the command line. Copied alone into
a project, this file still gives `from t5 import T5, T5Config`; its commands need bpe.py (the
tokenizer) and data.py (files, downloads, the log) beside it. To learn, change things:
`--mean_span 1` (is that easier?), `--corruption bernoulli`, `--n_decoder_layer 1`,
`--act gated-gelu --tie false` (version 1.1); leave one half of `init_attention` out, then both.

Papers: Raffel et al. 2020, https://arxiv.org/abs/1910.10683 (T5); Shazeer 2020,
https://arxiv.org/abs/2002.05202 (gated feed-forwards); Vaswani et al. 2017,
https://arxiv.org/abs/1706.03762 (attention).
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the packages load leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import contextlib
import functools
import itertools
import json
import math
import re
import sys
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
class T5Config:
    """The architecture. Defaults are T5's, but for dropout (there 0.1); the rest is variants.

    Version 1.1 is act="gated-gelu", tie=False. It has no block_size: a distance can be any, so a
    text may have any length. Raises ValueError for sizes that do not fit.
    """

    vocab_size: int  # token types: special tokens + 256 bytes + merges
    n_layer: int  # blocks of the encoder
    n_head: int  # attention heads in a block
    n_embd: int  # width of the residual stream
    n_ff: int | None = None  # width inside a feed-forward (default 4 * n_embd)
    head_dim: int | None = None  # width of a head (default n_embd / n_head)
    dropout: float = 0.0  # share of activations zeroed in training
    act: Literal["relu", "gated-gelu"] = "relu"  # non-linearity of the feed-forward
    tie: bool = True  # the head uses the token embedding's weights
    scale_head: bool = True  # a tied head's scores are divided by sqrt(n_embd)
    n_buckets: int = 32  # kinds of distances that attention tells apart
    max_distance: int = 128  # from here on all distances are alike
    n_decoder_layer: int | None = None  # blocks of the decoder (default n_layer)
    pad_id: int = 0  # the token that fills up, and that every target begins with
    eos_id: int = 1  # the token that ends a text

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "vocab_size", "n_layer", "n_decoder_layer", "n_head", "n_embd", "n_ff",
                 "head_dim")
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                "change one of them or set head_dim"
            )
        if self.n_buckets < 4 or self.n_buckets % 2 or self.max_distance <= self.n_buckets // 2:
            raise ValueError(
                f"n_buckets has to be even and at least 4, max_distance more than half of it: "
                f"{self.n_buckets} and {self.max_distance} are not"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not between 0 and 1")
        if not all(0 <= i < self.vocab_size for i in (self.pad_id, self.eos_id)):
            raise ValueError("pad_id and eos_id have to be below vocab_size")

    @property
    def key_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.n_embd // self.n_head if self.head_dim is None else self.head_dim

    @property
    def ff_width(self) -> int:
        """Width inside a feed-forward."""
        return 4 * self.n_embd if self.n_ff is None else self.n_ff

    @property
    def decoder_layers(self) -> int:
        """Blocks of the decoder."""
        return self.n_layer if self.n_decoder_layer is None else self.n_decoder_layer


Config, NAME = T5Config, "t5"  # so named, what the files have in common is the same text

PRESETS = {  # 60 M, 220 M and 770 M parameters; those of version 1.1: 77 M and 250 M
    "laptop": dict(vocab_size=1024, n_layer=2, n_decoder_layer=3, n_head=4, n_embd=128),
    "t4": dict(vocab_size=8192, n_layer=6, n_head=8, n_embd=512),  # for the GPU of that name
    "t5-small": dict(vocab_size=32128, n_layer=6, n_head=8, n_embd=512),
    "t5-base": dict(vocab_size=32128, n_layer=12, n_head=12, n_embd=768),
    "t5-large": dict(vocab_size=32128, n_layer=24, n_head=16, n_embd=1024),
    "t5-v1_1-small": dict(
        vocab_size=32128, n_layer=8, n_head=6, n_embd=512, n_ff=1024, head_dim=64,
        act="gated-gelu", tie=False,
    ),
    "t5-v1_1-base": dict(
        vocab_size=32128, n_layer=12, n_head=12, n_embd=768, n_ff=2048,
        act="gated-gelu", tie=False,
    ),
}
RECIPES = {  # training settings that go with a preset (matrix_lr: Muon's, see 9); else laptop's
    "laptop": dict(
        block_size=128, max_steps=2250, batch_size=32, lr=0.005, matrix_lr=0.015, log_interval=50,
        eval_interval=750,
    ),
    "t4": dict(
        block_size=256, max_steps=10000, batch_size=64, log_interval=50, eval_interval=500),
    "t5-small": dict(block_size=512),
    "t5-base": dict(block_size=512),
    "t5-large": dict(block_size=512),
    "t5-v1_1-small": dict(block_size=512),
    "t5-v1_1-base": dict(block_size=512),
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


def padding_bias(mask):
    """mask (B, S) bool, True for a real token -> (B, 1, 1, S), to be added to scores: 0 or -inf."""
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask.bool(), -math.inf)
    return bias[:, None, None, :]


def distance_buckets(distance, both_sides: bool, n_buckets: int, max_distance: int):
    """The kind of each distance key - query, any shape, int64: 0 to n_buckets - 1 (Raffel, 2.1).

    With both_sides the first half of the kinds is for keys up to the query, the second for those
    after it: n = n_buckets / 2 each. Without, all n = n_buckets are for keys up to it; later ones
    are never seen, and count as distance 0. A distance d below e = n / 2 is a kind by itself; from
    e on the kind is e + (n - e) * log(d / e) / log(max_distance / e), rounded down, at most n - 1:
    ranges that grow like powers.
    """
    if both_sides:
        n_buckets //= 2
        side, distance = (distance > 0) * n_buckets, distance.abs()
    else:
        side, distance = 0, (-distance).clamp(min=0)
    exact = n_buckets // 2
    power = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (power * (n_buckets - exact)).long()  # from `exact` to n_buckets, and beyond
    return side + torch.where(distance < exact, distance, far.clamp(max=n_buckets - 1))


class Attention(nn.Module):
    """Multi-head attention (Vaswani, 3.2.2): states ask, and the same states (self-attention) or
    the encoder's (cross-attention) answer.

    T5 does not divide scores by sqrt(hd). Instead its first weights for queries are smaller by that
    factor (see `T5.init_attention`), and so has to be their learning rate.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        width = config.n_head * config.key_width
        self.query = nn.Linear(config.n_embd, width, bias=False)
        self.query.weight.lr_factor = config.key_width**-0.5  # of its learning rate (9)
        self.kv = nn.Linear(config.n_embd, 2 * width, bias=False)  # two maps in one
        self.kv.weight.maps = 2  # for Muon they are two
        self.proj = nn.Linear(width, config.n_embd, bias=False)

    def heads(self, x):
        """(B, T, nh * hd) -> (B, nh, T, hd)"""
        return x.view(*x.shape[:2], self.n_head, -1).transpose(1, 2)

    def keys_values(self, x):
        """The keys and values of x (B, S, C): (B, nh, S, hd) each."""
        return [self.heads(part) for part in self.kv(x).chunk(2, dim=-1)]

    def forward(self, x, key, value, bias=None, causal=False):
        """x (B, T, C) asks key, value (B, nh, S, hd) -> (B, T, C). bias (1 or B, 1 or nh, 1 or T,
        S) is added to the scores."""
        query = self.heads(self.query(x)).to(key.dtype)
        bias = None if bias is None else bias.to(key.dtype)
        mixed = attention(
            query, key, value, bias, causal, scale=1.0, dropout=self.dropout * self.training)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2).to(x.dtype))  # (B, T, C)
        return F.dropout(mixed, self.dropout, self.training)


class FeedForward(nn.Module):
    """Two linear layers and a non-linearity, the same everywhere: C -> n_ff -> C (Vaswani, 3.3).
    Gated (Shazeer 2020): what goes up is multiplied, number by number, with gelu(gate(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.act, self.dropout = config.act, config.dropout
        self.up = nn.Linear(config.n_embd, config.ff_width, bias=False)
        if config.act == "gated-gelu":
            self.gate = nn.Linear(config.n_embd, config.ff_width, bias=False)
        self.down = nn.Linear(config.ff_width, config.n_embd, bias=False)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        inner = self.up(x)  # (B, T, n_ff)
        if self.act == "relu":
            inner = F.relu(inner, inplace=True)
        else:
            inner = F.gelu(self.gate(x), approximate="tanh") * inner
        inner = F.dropout(inner, self.dropout, self.training)
        return F.dropout(self.down(inner), self.dropout, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention, cross-attention (decoder only) and feed-forward, each added to the residual
    stream: x + sublayer(norm(x))."""

    def __init__(self, config: Config, decoder: bool):
        super().__init__()
        self.decoder = decoder
        self.attn, self.attn_norm = Attention(config), make_norm(config)
        if decoder:
            self.cross, self.cross_norm = Attention(config), make_norm(config)
        self.mlp, self.mlp_norm = FeedForward(config), make_norm(config)

    def forward(self, x, bias, source=None, source_bias=None, cache: KVCache | None = None):
        """x (B, T, C), bias (B or 1, nh, T, S) -> (B, T, C). A decoder's block also gets keys and
        values of the source, (B, nh, S, hd), and the bias (B, 1, 1, S) that hides its padding."""
        h = self.attn_norm(x)
        key, value = self.attn.keys_values(h)
        if cache is not None:
            key, value = cache.append(key, value)
        x = x + self.attn(h, key, value, bias, causal=self.decoder and x.size(1) > 1)
        if self.decoder:
            x = x + self.cross(self.cross_norm(x), *source, source_bias)
        return x + self.mlp(self.mlp_norm(x))


def inverse_rms(x, eps: float):
    """1 / sqrt(mean of x^2 + eps), the mean taken in float32 as published: (..., C) -> (..., 1)."""
    return (x.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt().to(x.dtype)


class Normalize(torch.autograd.Function):
    """For speed alone: RMSNorm by hand for a CPU, x (..., C), scale (C,) -> r x * scale with
    r = inverse_rms(x).

    With g the gradient times scale, dx = r (g - r x mean(g r x)). LayerNorm's has another term, r
    mean(g), which its fused kernel subtracts: adding it again is twice as fast as PyTorch's
    RMSNorm, which has a kernel of its own on a GPU alone. Under autocast, the result comes in the
    type that the products after it take, so that it is converted once, not before each.
    """

    @staticmethod
    def forward(ctx, x, scale, eps: float):
        r = inverse_rms(x, eps)
        ctx.save_for_backward(x, r, scale)
        autocast = torch.is_autocast_enabled("cpu")
        return (x * r).mul_(scale).to(torch.get_autocast_dtype("cpu") if autocast else x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, r, scale = ctx.saved_tensors
        grad = grad.to(x.dtype)
        dx, dscale, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, scale.shape, torch.zeros_like(r), r, scale, None, (True, True, False))
        mean = torch.mv(grad.flatten(0, -2), scale).view_as(r) / len(scale)
        return dx.addcmul_(r, mean), dscale, None


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * scale: a position's C numbers get a mean square of 1, then a
    learned scale; no mean is subtracted, nothing is added (Zhang & Sennrich 2019,
    https://arxiv.org/abs/1910.07467)."""

    def forward(self, x):
        if x.device.type != "cpu":
            return super().forward(x)
        if torch.is_grad_enabled():
            return Normalize.apply(x, self.weight, self.eps)
        return x * inverse_rms(x, self.eps) * self.weight


def make_norm(config: Config):
    """The norm before each sublayer, and after the last block."""
    return RMSNorm(config.n_embd, eps=1e-6)


class Stack(nn.Module):
    """The encoder or the decoder: blocks that share their biases of distances, and a last norm."""

    def __init__(self, config: Config, n_layer: int, decoder: bool):
        super().__init__()
        self.config, self.decoder = config, decoder
        self.distance_embedding = nn.Embedding(config.n_buckets, config.n_head)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(n_layer))
        self.norm = make_norm(config)

    def distance_bias(self, T: int, S: int):
        """What scores get for the distance of the last T of S positions to all S: (1, nh, T, S)."""
        place = torch.arange(S, device=self.distance_embedding.weight.device)
        bucket = distance_buckets(
            place - place[S - T :, None], not self.decoder,
            self.config.n_buckets, self.config.max_distance,
        )
        return self.distance_embedding(bucket).permute(2, 0, 1)[None]

    def forward(self, x, bias, sources=None, source_bias=None, caches=None):
        """x (B, T, C), bias (B or 1, nh, T, S) -> (B, T, C). sources, caches: one per block."""
        x = self.drop(x)
        for i, block in enumerate(self.blocks):
            x = block(
                x, bias, sources[i] if sources else None, source_bias,
                caches[i] if caches else None,
            )
        return self.drop(self.norm(x))


# --------------------------------------------------------------------------------------------------
# 4. The model
# --------------------------------------------------------------------------------------------------


class T5(nn.Module):
    """An embedding of tokens for both sides, the encoder, the decoder, and a head that scores every
    token as the target's next one."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.token_embedding.weight.lr_factor = 10.0  # of its learning rate: see `init_weights`
        self.encoder = Stack(config, config.n_layer, decoder=False)
        self.decoder = Stack(config, config.decoder_layers, decoder=True)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.apply(self.init_weights)
        self.init_attention()
        if config.tie:
            self.head.weight = self.token_embedding.weight

    @staticmethod
    def init_weights(module):
        """T5's normal distributions: embeddings with variance 1; matrices so that what goes in with
        variance 1 comes out with it, but here with half of that std, which learns faster.

        AdamW's steps do not depend on how large a weight is, and the embeddings are 20 to 50 times
        as large as other models', so they change too slowly. The paper's Adafactor makes steps in
        proportion (3.1.2); here the embeddings' learning rate is ten times as high. That is one of
        two reasons why "T5 does not converge with AdamW"; the other: `init_attention`.
        """
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)

    @torch.no_grad()
    def init_attention(self):
        """Begin with a path from the text around a gap to the tokens that fill it.

        What belongs in a gap shows in the tokens beside it. To get there from them takes two
        steps: in the encoder the sentinel has to look at its neighbours, and in the decoder the
        same sentinel has to look at the encoder's. Neither gains anything before the other is
        there. So for hundreds of steps the decoder learns which tokens are frequent, and little
        more (9 % of the span tokens right after 300 steps; with both from the start, 14 %).

        Neighbours: in the encoder, the biases of distances begin high at -1, 1, -2, 2, ... tokens,
        one for each head. The same sentinel: in the decoder's first cross-attention, the map for
        keys begins as the map for queries, so that like fits like. A score of 7 outweighs a
        thousand of 0.
        """
        config = self.config
        for stack in self.encoder, self.decoder:
            nn.init.normal_(stack.distance_embedding.weight, std=0.1)
        head = torch.arange(config.n_head)
        distance = (head // 2 + 1) * (2 * (head % 2) - 1)  # -1, 1, -2, 2, ...
        bucket = distance_buckets(distance, True, config.n_buckets, config.max_distance)
        self.encoder.distance_embedding.weight[bucket, head] += 7.0
        first = self.decoder.blocks[0].cross
        key, _ = first.kv.weight.chunk(2)  # (nh * hd, C)
        # A score sums C * hd products, times 1 / sqrt(hd) from below: about 7 where like meets
        # like.
        nn.init.normal_(key, std=(7 / config.n_embd / config.key_width**0.5) ** 0.5)
        first.query.weight.copy_(key)
        for module in self.modules():
            if isinstance(module, Attention):  # in place of the division by sqrt(hd): see there
                module.query.weight *= config.key_width**-0.5

    def encode(self, src, src_mask=None):
        """src (B, S) int64 -> memory (B, S, C). src_mask (B, S) bool: True for a real token, False
        for padding, which no token attends to."""
        bias = self.encoder.distance_bias(src.size(1), src.size(1))
        if src_mask is not None:
            bias = bias + padding_bias(src_mask)
        return self.encoder(self.token_embedding(src), bias)

    def keys_values(self, memory):
        """The keys and values that the decoder's blocks have of the memory (B, S, C): for each
        block two of (B, nh, S, hd)."""
        return [block.cross.keys_values(memory) for block in self.decoder.blocks]

    def decode(self, tokens, bias, sources, source_bias=None, caches=None):
        """tokens (B, T) int64 of the target so far, with caches the new ones -> logits (B, T, V)
        of the tokens that follow each. bias: the decoder's `distance_bias`."""
        hidden = self.decoder(self.token_embedding(tokens), bias, sources, source_bias, caches)
        if self.config.tie and self.config.scale_head:
            # Or else, since the embeddings have variance 1, scores would have variance C.
            hidden = hidden * self.config.n_embd**-0.5
        return self.head(hidden)

    def forward(self, src, tgt, src_mask=None, with_loss: bool = True):
        """src (B, S) int64, tgt (B, T) int64: the source, and the target with its </s> at the end
        -> logits (B, T, V) for each of the target's tokens, given those before it; the mean loss,
        or None if with_loss=False (the training below computes its own, see `loss_sum`).

        Where tgt is -100 nothing is asked. src_mask (B, S) bool: see `encode`. The decoder reads
        the true tokens, one behind, not what it would have written (teacher forcing).
        """
        shown = tgt.masked_fill(tgt < 0, self.config.pad_id)
        before = F.pad(shown, (1, -1), value=self.config.pad_id)  # what stands before each token
        logits = self.decode(
            before, self.decoder.distance_bias(tgt.size(1), tgt.size(1)),
            self.keys_values(self.encode(src, src_mask)),
            None if src_mask is None else padding_bias(src_mask),
        )
        if not with_loss:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), tgt.flatten(), ignore_index=-100)


Model = T5

# --------------------------------------------------------------------------------------------------
# 5. The objective: say what was cut out
# --------------------------------------------------------------------------------------------------
# A corpus (data.Corpus) has train and validation, arrays of token ids. `luck` is always random
# numbers from [0, 1).

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
SPECIAL_TOKENS = ["<pad>", "</s>", *SENTINELS]
SEPARATOR = "</s>"  # before the first document, between documents and after the last
TOKEN_LOSS = "val_loss"  # what perplexity is computed from


@dataclass
class ObjectiveConfig:
    """How much is cut out, and in what pieces. Raises ValueError where sentinels do not suffice."""

    block_size: int = 128  # tokens of a text before anything is cut out
    noise_density: float = 0.15  # share of the tokens that is cut out
    corruption: Literal["spans", "bernoulli"] = "spans"  # bernoulli: each token independently
    mean_span: float = 3.0  # tokens in a span, on average (bernoulli: no effect, neighbours merge)

    def __post_init__(self):
        at_least(self, 2, "block_size")
        if not 0 < self.noise_density < 1:
            raise ValueError(f"noise_density {self.noise_density} is not between 0 and 1")
        at_least(self, 1, "mean_span")
        _, spans = noise_counts(self.block_size, self)
        if spans > len(SENTINELS):
            raise ValueError(
                f"{self.block_size} tokens have {spans} spans, and there are {len(SENTINELS)} "
                "sentinels: take a smaller --block_size or a larger --mean_span"
            )


def noise_counts(length: int, objective: ObjectiveConfig) -> tuple[int, int]:
    """(tokens to cut out, spans) of a text of `length` tokens, by the rounding of the paper's code.
    With independent tokens: the expected numbers."""
    noise = min(max(round(length * objective.noise_density), 1), length - 1)
    if objective.corruption == "bernoulli":
        return noise, max(round(noise * (1 - objective.noise_density)), 1)  # those that begin one
    return noise, min(max(round(noise / objective.mean_span), 1), noise, length - noise)


def random_lengths(luck, parts: int):
    """Cut n + 1 things into `parts` pieces of at least one, all ways equally likely. luck (rows, n)
    has a random number for each place between two things; the cuts fall on the parts - 1 smallest
    -> the pieces' lengths (rows, parts) int64."""
    cuts = luck.argsort(axis=1)[:, : parts - 1] + 1
    return np.diff(np.sort(cuts, axis=1), axis=1, prepend=0, append=luck.shape[1] + 1)


def draw_noise(rows: int, length: int, objective: ObjectiveConfig, generator):
    """Which tokens are cut out: (rows, length) bool.

    "bernoulli" (Raffel, 3.1.4): each token by itself. "spans" (3.3.4; `random_spans_noise_mask` in
    its code): a fixed number of tokens in a fixed number of spans, text and spans in turn, with
    text first. So all rows have the same lengths, and nothing needs padding.
    """
    noise, spans = noise_counts(length, objective)
    if objective.corruption == "bernoulli":
        mask = generator.random((rows, length)) < objective.noise_density
        return mask & (starts_of(mask).cumsum(axis=1) <= len(SENTINELS))  # the rest stays
    # Places to cut: length - noise - 1 between the text's tokens, noise - 1 between the noise's.
    of_text, of_noise = np.split(generator.random((rows, length - 2)), [length - noise - 1], axis=1)
    lengths = np.stack(
        (random_lengths(of_text, spans), random_lengths(of_noise, spans)), axis=2
    ).reshape(rows, 2 * spans)
    borders = np.zeros((rows, length), np.int64)  # 1 where text and noise change
    np.put_along_axis(borders, lengths.cumsum(axis=1)[:, :-1], 1, axis=1)
    return borders.cumsum(axis=1) % 2 == 1


def starts_of(noise):
    """Where spans begin: (rows, length) bool -> the same shape."""
    return noise & ~np.pad(noise, ((0, 0), (1, 0)))[:, :-1]


def pack(tokens, keep, eos_id: int, fill: int):
    """tokens (rows, n) int64, keep (rows, n) bool -> each row's kept tokens side by side, eos_id,
    and `fill` up to the longest row: (rows, longest + 1) int64."""
    lengths = keep.sum(axis=1)
    packed = np.full((len(keep), lengths.max() + 1), fill)
    packed[np.nonzero(keep)[0], (keep.cumsum(axis=1) - 1)[keep]] = tokens[keep]
    packed[np.arange(len(keep)), lengths] = eos_id
    return packed


def corrupt(tokens, noise, sentinels, config: Config) -> dict:
    """Cut the noise out of tokens, both (rows, length), as numpy arrays.

    -> a batch: src (rows, S): the text with a sentinel for each span; tgt (rows, T): each sentinel
    and the tokens it stands for; both end in </s>. Where rows differ in length: src_mask (rows, S).
    """
    starts = starts_of(noise)
    marks = sentinels[starts.cumsum(axis=1) - 1]  # of the span that is here or was last
    src = pack(np.where(starts, marks, tokens), starts | ~noise, config.eos_id, config.pad_id)
    both = np.stack((marks, tokens), axis=2).reshape(len(tokens), -1)  # mark, token, mark, token...
    kept = np.stack((starts, noise), axis=2).reshape(len(tokens), -1)
    batch = dict(src=src, tgt=pack(both, kept, config.eos_id, -100))
    real = np.arange(src.shape[1]) <= (starts | ~noise).sum(axis=1)[:, None]
    batch |= {} if real.all() else {"src_mask": real}
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def sentinel_ids(tokenizer):
    """The ids of the sentinels, in order, (n,) int64."""
    return np.array([tokenizer.special[name] for name in SENTINELS])


@functools.lru_cache(4)
def tokens_before(corpus, part: str):
    """How many tokens of text come before each separator of a part, (n,) int64."""
    edges = corpus.edges(part)
    return edges - np.arange(len(edges))


def windows(corpus, part: str, begin, length: int):
    """Windows of a part's text, from token number begin (n,) on -> (n, length) int64. Separators
    are left out, so a window may run on into the next document, as in the paper's code
    (`reduce_concat_tokens`)."""
    place = begin[:, None] + np.arange(length)
    place = place + np.searchsorted(tokens_before(corpus, part), place, side="right")
    return getattr(corpus, part)[place].astype(np.int64)


def text_length(corpus, part: str) -> int:
    """How many tokens the part has without separators."""
    return len(getattr(corpus, part)) - len(tokens_before(corpus, part))


def rows_per_epoch(corpus, config: Config, objective: ObjectiveConfig) -> int:
    """How many windows the training part fills. Raises ValueError where it is too short."""
    T = objective.block_size
    texts = [text_length(corpus, part) for part in ("train", "validation")]
    if min(texts) < T:
        raise ValueError(
            f"the text is too short: {texts[0]} tokens to train on and {texts[1]} to validate do "
            f"not fill windows of {T}; give more text or a smaller --block_size"
        )
    return max(texts[0] // T - 1, 1)  # one less: the offset is free


def train_batch(
    corpus, config: Config, objective: ObjectiveConfig, run: "TrainConfig", step: int
) -> dict:
    """A step's batch (see `corrupt`), which depends on (seed, step) alone.

    An epoch lays windows end to end from a random offset and takes each once, in random order.
    """
    from data import shuffled_rows

    T, n = objective.block_size, rows_per_epoch(corpus, config, objective)
    row, luck = shuffled_rows(n, run.seed, step * run.rows, run.rows)
    offset = (luck * (text_length(corpus, "train") - n * T + 1)).astype(np.int64)
    tokens = windows(corpus, "train", offset + row * T, T)
    noise = draw_noise(run.rows, T, objective, np.random.default_rng((run.seed, step)))
    return corrupt(tokens, noise, sentinel_ids(corpus.tokenizer), config)


def eval_batches(corpus, config: Config, objective: ObjectiveConfig, rows: int):
    """The whole validation part, in windows that do not overlap, but for the last, which ends where
    the text ends. The noise is always the same, whatever the seed and the number of rows.
    """
    T, length = objective.block_size, text_length(corpus, "validation")
    generator = np.random.default_rng(0)
    begin = np.minimum(np.arange(-(-length // T)) * T, length - T)
    sentinels = sentinel_ids(corpus.tokenizer)
    for i in range(0, len(begin), rows):
        tokens = windows(corpus, "validation", begin[i : i + rows], T)
        noise = draw_noise(len(tokens), T, objective, generator)
        batch = corrupt(tokens, noise, sentinels, config)
        mark = np.isin(batch["tgt"], [config.eos_id, -100, *sentinels])
        yield batch | {"in_span": torch.from_numpy(~mark)}


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
    """(sum of the target's losses, how many tokens it has, metrics).

    Sums, so that parts of a batch can be added up. A metric is a pair of sums, a numerator and a
    denominator: span_accuracy counts the tokens that were cut out, but no sentinels and no </s>.
    """
    logits, _ = model(batch["src"], batch["tgt"], batch.get("src_mask"), with_loss=False)
    logits = logits.flatten(0, 1)  # (B * T, V)
    target = batch["tgt"].flatten()
    loss = CrossEntropy.apply(logits, target, target != -100)
    metrics = {}
    if "in_span" in batch:
        asked = batch["in_span"].flatten()
        right = (logits.argmax(dim=-1) == target) & asked
        metrics["span_accuracy"] = right.sum(), asked.sum()
    return loss, (target != -100).sum(), metrics


def count_tokens(batch: dict) -> int:
    """How many tokens the model reads in a batch, source and target, padding left out."""
    source = batch["src_mask"].sum() if "src_mask" in batch else batch["src"].numel()
    return int(source + (batch["tgt"] != -100).sum())


def count_flops(model: Model, batch: dict) -> float:
    """Floating-point operations of a step: 6 for each multiplication of the forward pass, by a
    weight or in attention's two products: 2 forward (with its addition), 4 backward."""
    config, (B, S), T = model.config, batch["src"].shape, batch["tgt"].size(1)
    width = config.n_head * config.key_width
    weights = {"source": 0, "target": config.n_embd * config.vocab_size}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "head":
            from_source = name.startswith("encoder") or name.endswith("cross.kv")
            weights["source" if from_source else "target"] += module.weight.numel()
    products = weights["source"] * S + weights["target"] * T
    scores = 2 * width * (config.n_layer * S * S + config.decoder_layers * T * (T + S))
    return 6 * B * (products + scores)


# --------------------------------------------------------------------------------------------------
# 6. Generation: write what belongs in the gaps
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


class Writer:
    """The decoder, token by token. What stays is computed once: the keys and values that it has of
    the source, and those of the tokens that it wrote before."""

    def __init__(self, model: Model, src, src_mask, length: int, copies: int = 1):
        """length: of the longest target. copies: how many targets to write for each source."""
        self.model = model
        memory = model.encode(src, src_mask).repeat_interleave(copies, dim=0)
        sources = model.keys_values(memory)  # (through a KVCache for its type: float32 on a CPU)
        self.sources = [KVCache(src.size(1)).append(*pair) for pair in sources]
        self.source_bias = None
        if src_mask is not None:
            self.source_bias = padding_bias(src_mask).repeat_interleave(copies, dim=0)
        self.caches = [KVCache(length) for _ in sources]
        self.bias = model.decoder.distance_bias(1, length)  # distances length - 1, ..., 1, 0
        self.bias = self.bias.to(self.sources[0][0].dtype)

    def step(self, column):
        """column (B,) int64: the tokens written last -> scores of the next ones, (B, V)."""
        bias = self.bias[..., -1 - self.caches[0].length :]
        with fast_product(column):
            logits = self.model.decode(
                column[:, None], bias, self.sources, self.source_bias, self.caches)
        return logits[:, 0]

    def follow(self, rows):
        """Go on with these of the targets, (B,) int64. All copies have the same source, so only
        what was written moves."""
        for cache in self.caches:
            for kept in cache.keys, cache.values:
                kept[:, :, : cache.length] = kept[rows, :, : cache.length]


@torch.no_grad()
def generate(
    model, src, max_new_tokens, temperature=0.0, top_k=None, top_p=None, beams=1, src_mask=None
):
    """Write a target for each source, src (B, S) int64 -> (B, n) int64, n <= max_new_tokens.

    Each ends with </s>, unless it got too long, and is filled up with <pad>. temperature, top_k,
    top_p: see `sample`; temperature 0 takes the likeliest token every time. beams > 1: see
    `beam_search`, which does without these three. src_mask (B, S) bool: see `T5.encode`. Raises
    ValueError for other shapes. The model is left in evaluation mode.
    """
    if src.ndim != 2 or not src.numel() or max_new_tokens < 1:
        raise ValueError(
            f"src has to be (B, S), not {tuple(src.shape)}, and max_new_tokens at least 1")
    if beams > 1:
        return beam_search(model, src, max_new_tokens, beams, src_mask)
    model.eval()  # no dropout
    writer = Writer(model, src, src_mask, max_new_tokens)
    column = src.new_full((len(src),), model.config.pad_id)
    done, columns = src.new_zeros(len(src), dtype=torch.bool), []
    while len(columns) < max_new_tokens and not done.all():
        column = sample(writer.step(column), temperature, top_k, top_p)
        column = column.masked_fill(done, model.config.pad_id)
        done |= column == model.config.eos_id
        columns.append(column)
    return torch.stack(columns, dim=1)


@torch.no_grad()
def beam_search(model, src, max_new_tokens, beams, src_mask=None):
    """Of the targets found, those with the highest mean log-probability: src (B, S) -> (B, n).

    At each step every beginning (hypothesis) is continued by every token, and the likeliest `beams`
    that do not end are kept. Taking the likeliest token each time (1 beam) may miss a target whose
    first token is only the second likeliest. The mean over its tokens, </s> counted, decides
    between targets that have ended: with the sum, short ones would win too often. A source is done
    when none of its beginnings has a better mean by now than the worst of `beams` that have ended
    (a rule of thumb: a mean may still rise).
    """
    model.eval()
    B, pad_id, eos_id = len(src), model.config.pad_id, model.config.eos_id
    writer = Writer(model, src, src_mask, max_new_tokens, beams)
    tokens = src.new_full((B, beams, max_new_tokens), pad_id)  # the beginnings
    total = torch.full((B, beams), -math.inf, device=src.device)  # their log-probabilities
    total[:, 0] = 0.0  # as long as all are empty, one is enough
    ended, best = tokens.clone(), torch.full_like(total, -math.inf)  # best: their means
    done = src.new_zeros(B, dtype=torch.bool)
    column, first = src.new_full((B * beams,), pad_id), torch.arange(B, device=src.device) * beams
    for n in range(1, max_new_tokens + 1):
        # Grow: of all beginnings with one token more, 2 * beams, of which at most `beams` end.
        log_p = F.log_softmax(writer.step(column).float(), dim=-1).view(B, beams, -1)
        grown, index = (total[:, :, None] + log_p).flatten(1).topk(2 * beams)  # (B, 2 * beams)
        parent, token = index // log_p.size(2), index % log_p.size(2)
        longer = torch.take_along_dim(tokens, parent[:, :, None], dim=1)
        longer[:, :, n - 1] = token
        # End: those that do are compared with those that did.
        ends = (token == eos_id) | (n == max_new_tokens)
        mean = (grown / n).masked_fill(~ends | done[:, None], -math.inf)
        mean[:, beams:] = -math.inf  # it ends only if it is among the likeliest
        best, kept = torch.cat((best, mean), dim=1).topk(beams)
        ended = torch.take_along_dim(torch.cat((ended, longer), dim=1), kept[:, :, None], dim=1)
        # Go on with the likeliest of the others.
        total, going = grown.masked_fill(ends, -math.inf).topk(beams)
        done |= total[:, 0] / n <= best[:, -1]
        if done.all():
            break
        tokens = torch.take_along_dim(longer, going[:, :, None], dim=1)
        column = tokens[:, :, n - 1].flatten()
        writer.follow((first[:, None] + parent.gather(1, going)).flatten())
    return ended[:, 0, :n]


T5.generate = generate  # a method, written here beside `sample`


@dataclass
class GenerateConfig:
    """What to fill, and how freely."""

    prompt: str = ""  # a text whose gaps are numbered from 0 on; of a fine-tuned model, a source
    max_new_tokens: int = 64  # how many tokens at most, for all gaps together
    temperature: float = 0.0  # 0 always the likeliest token; up to 1 and beyond more daring
    top_k: int = 0  # choose among the k likeliest tokens (0: among all)
    top_p: float = 1.0  # choose among the likeliest tokens that together have this probability
    beams: int = 1  # how many beginnings are followed at once, for the likeliest text as a whole
    num_samples: int = 1  # how many texts

    def __post_init__(self):
        at_least(self, 1, "max_new_tokens", "num_samples", "beams")
        at_least(self, 0, "temperature", "top_k")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p {self.top_p} is not between 0 and 1")
        if self.temperature and self.beams > 1:
            raise ValueError("beams look for the likeliest text: set either beams or temperature")
        if self.num_samples > 1 and not self.temperature:
            raise ValueError("without a --temperature all samples are the same: set one")


def encode_prompt(prompt: str, tokenizer) -> list[int]:
    """The prompt and </s> as ids. Tokens begin with the space before a word, so a space in front of
    a sentinel belongs to what is missing. Raises ValueError for gaps with other numbers."""
    parts = re.split(r" ?(<extra_id_\d+>)", prompt)
    names = parts[1::2]
    if sorted(names) != sorted(SENTINELS[: len(names)]):
        raise ValueError(
            "a prompt's gaps have to be numbered from 0 on, each number once: "
            '"The <extra_id_0> sat on the <extra_id_1>."'
        )
    ids = []
    for part in parts:
        ids += [tokenizer.special[part]] if part in names else tokenizer.encode(part)
    return [*ids, tokenizer.special["</s>"]]


def gap_contents(target: list[int], sentinels, eos_id: int) -> dict[int, list[int]]:
    """Take a target apart: the tokens after each sentinel, up to the next one or </s>."""
    contents, current = {}, []
    for token in target:
        if token == eos_id:
            break
        if token in sentinels:  # what comes before the first, or repeats one, is left out
            current = [] if token in contents else contents.setdefault(token, [])
        else:
            current.append(token)
    return contents


def plain_text(target: list[int], tokenizer, config: Config) -> str:
    """The text of a target, without </s> and <pad>."""
    ends = config.pad_id, config.eos_id
    return tokenizer.decode([token for token in target if token not in ends]).strip()


def write_samples(model: Model, checkpoint: dict, options: GenerateConfig) -> None:
    """What `generate` prints on standard output: the prompt with its gaps filled, or to a prompt
    without gaps (for models that were trained to answer) the target as it stands; of a fine-tuned
    model, the target for the prompt, or for each source that is typed."""
    from data import build, prompts, say

    tokenizer = checkpoint["tokenizer"]

    def write(ids: list[int]) -> list[list[int]]:
        src = torch.tensor([ids] * options.num_samples, device=next(model.parameters()).device)
        return model.generate(
            src, options.max_new_tokens, options.temperature, options.top_k or None, options.top_p,
            options.beams,
        ).tolist()

    if checkpoint["task"]:
        task = build(Task, checkpoint["task"])
        for prompt in prompts(options.prompt):
            ids, cropped = task.encode_source(prompt, tokenizer)
            if cropped:
                say(f"the prompt is long: its first {len(ids)} tokens are read")
            print("\n\n".join(plain_text(x, tokenizer, model.config) for x in write(ids)))
        return
    ids = encode_prompt(options.prompt or "The cat sat on the <extra_id_0>.", tokenizer)
    sentinels, texts = set(sentinel_ids(tokenizer).tolist()), []
    if sentinels.isdisjoint(ids):
        say("the prompt has no gap like <extra_id_0>: this is the model's answer to it")
    for target in write(ids):
        contents = gap_contents(target, sentinels, model.config.eos_id)
        filled = sum((contents.get(token, [token]) for token in ids[:-1]), [])
        texts.append(plain_text(target, tokenizer, model.config) if sentinels.isdisjoint(ids)
                     else tokenizer.decode(filled))
    print("\n\n".join(texts))


def demonstrate(model: Model, corpus, length: int) -> str:
    """A sample for the log: the beginning of the validation part with some spans cut out, and what
    the model writes there in brackets: [right], or [wrong/what stood there]."""
    tokenizer, config, sentinels = corpus.tokenizer, model.config, sentinel_ids(corpus.tokenizer)
    objective = ObjectiveConfig()
    length = min(length, objective.block_size, text_length(corpus, "validation"))
    tokens = windows(corpus, "validation", np.array([0]), length)
    noise = draw_noise(1, length, objective, np.random.default_rng(0))
    batch = corrupt(tokens, noise, sentinels, config)
    src, truth = batch["src"].to(next(model.parameters()).device), batch["tgt"][0].tolist()
    target = model.generate(src, 2 * len(truth))[0].tolist()
    guesses, truths = (gap_contents(x, sentinels, config.eos_id) for x in (target, truth))
    text = b""
    for token in src[0, :-1].tolist():
        if token not in truths:
            text += tokenizer.decode_bytes([token])
            continue
        right, guess = (
            tokenizer.decode_bytes(contents.get(token, [])) for contents in (truths, guesses))
        text += right[: len(right) - len(right.lstrip())]  # the space before the bracket
        text += b"[" + (b"" if guess == right else guess.strip() + b"/") + right.strip() + b"]"
    return text.decode("utf-8", "replace")


def write_random(model: Model, rows: int, length: int):
    """What `bench` times: targets of `length` tokens for `rows` sources of 116 random ones."""
    device = next(model.parameters()).device
    model.config.eos_id = -1  # none ends before
    return model.generate(
        torch.randint(model.config.vocab_size, (rows, 116), device=device), length)


# --------------------------------------------------------------------------------------------------
# 7. Published weights: T5's names for ours
# --------------------------------------------------------------------------------------------------

# Old files hold distance biases of the cross-attention, which uses none.
PASSED_OVER = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
ROLES = dict(pad_token="<pad>", eos_token="</s>")  # of special tokens
TEMPLATE = ["A", "</s>"]  # what stands around a text


def published_name(name: str) -> str:
    """The name of a tensor in a file of weights -> the one that `published_weights` has for it."""
    return name


def published_weights(model: Model) -> dict:
    """Published name -> our weight, in the published shape; key and value are apart there."""
    embedding = model.token_embedding.weight
    named = {
        "shared.weight": embedding, "encoder.embed_tokens.weight": embedding,
        "decoder.embed_tokens.weight": embedding, "lm_head.weight": model.head.weight,
    }

    def attention_weights(name, layer):
        key, value = layer.kv.weight.chunk(2)
        parts = dict(q=layer.query.weight, k=key, v=value, o=layer.proj.weight)
        return {f"{name}.{part}.weight": weight for part, weight in parts.items()}

    for side, stack in ("encoder", model.encoder), ("decoder", model.decoder):
        named[f"{side}.final_layer_norm.weight"] = stack.norm.weight
        named[f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"] = (
            stack.distance_embedding.weight)
        for i, block in enumerate(stack.blocks):
            at = f"{side}.block.{i}.layer"
            named |= attention_weights(f"{at}.0.SelfAttention", block.attn)
            named[f"{at}.0.layer_norm.weight"] = block.attn_norm.weight
            if block.decoder:
                named |= attention_weights(f"{at}.1.EncDecAttention", block.cross)
                named[f"{at}.1.layer_norm.weight"] = block.cross_norm.weight
            last, gated = f"{at}.{1 + block.decoder}", block.mlp.act == "gated-gelu"
            up = dict(wi_0=block.mlp.gate, wi_1=block.mlp.up) if gated else dict(wi=block.mlp.up)
            for name, layer in (up | dict(wo=block.mlp.down)).items():
                named[f"{last}.DenseReluDense.{name}.weight"] = layer.weight
            named[f"{last}.layer_norm.weight"] = block.mlp_norm.weight
    return named


def to_published(config: Config) -> dict:
    """Our settings as `config.json` has them. (`transformers` takes from tie_word_embeddings
    whether scores are scaled; the head is tied where the file of weights has no lm_head.)"""
    return dict(
        architectures=["T5ForConditionalGeneration"], model_type="t5",
        vocab_size=config.vocab_size, d_model=config.n_embd, d_kv=config.key_width,
        d_ff=config.ff_width, num_layers=config.n_layer, num_decoder_layers=config.decoder_layers,
        num_heads=config.n_head, relative_attention_num_buckets=config.n_buckets,
        relative_attention_max_distance=config.max_distance, dropout_rate=config.dropout,
        feed_forward_proj=config.act, layer_norm_epsilon=1e-6, is_encoder_decoder=True,
        tie_word_embeddings=config.tie and config.scale_head,
        pad_token_id=config.pad_id, eos_token_id=config.eos_id,
        decoder_start_token_id=config.pad_id,
    )


def from_published(found: dict, names: set[str]) -> Config:
    """What `config.json` says, and the names of the weights -> our settings.

    Whether the head is tied, the file tells: one with a head of its own is not, unless the settings
    of an older version of `transformers` say that it is only a copy.
    """
    act = found.get("feed_forward_proj", "relu")
    if act not in ("relu", "gated-gelu"):
        raise ValueError(f"feed_forward_proj {act} instead of relu or gated-gelu")
    said, newer = found.get("tie_word_embeddings", True), "scale_decoder_outputs" in found
    return Config(
        found["vocab_size"], found["num_layers"], found["num_heads"], found["d_model"],
        n_ff=found["d_ff"], head_dim=found["d_kv"], dropout=found.get("dropout_rate", 0.1), act=act,
        tie="lm_head.weight" not in names or (said and not newer),
        scale_head=found["scale_decoder_outputs"] if newer else said,
        n_buckets=found["relative_attention_num_buckets"],
        max_distance=found.get("relative_attention_max_distance", 128),
        n_decoder_layer=found.get("num_decoder_layers"),
        pad_id=found.get("pad_token_id", 0), eos_id=found.get("eos_token_id", 1),
    )


# --------------------------------------------------------------------------------------------------
# 8. Fine-tuning: turn a source into a target
# --------------------------------------------------------------------------------------------------

FINETUNING = {  # settings that go with a model's size: "published" for those 512 wide and more
    "laptop": dict(
        epochs=6.0, batch_size=16, optimizer="adamw", lr=0.002, matrix_lr=0.006, weight_decay=0.0,
        eval_interval=0,
    ),
    "published": dict(
        epochs=3.0, batch_size=8, optimizer="adamw", lr=1e-4, warmup_steps=50, weight_decay=0.01,
        eval_interval=0, drop_prob=0.0,
    ),
}


@dataclass
class Task:
    """Turn a source into a target: text to text, whatever the task (Raffel, 2.4). A prefix such as
    "summarize: " tells a model that knows several tasks which one is meant."""

    task_prefix: str = ""  # what stands before each source
    source_length: int = 512  # tokens of a source that are kept, </s> included
    drop_prob: float = 0.5  # share of a source's tokens that are left out in training, by chance
    target_length: int = 128  # tokens of a target that are kept, and written at most
    beams: int = 1  # how many beginnings are followed at once where targets are written to compare

    columns, optional = ("source", "target"), ()

    def __post_init__(self):
        if not (2 <= self.source_length <= 1 << 16 and 2 <= self.target_length <= 1 << 16
                and 1 <= self.beams <= 1 << 10):
            raise ValueError("source_length and target_length have to be between 2 and 65,536, "
                             "beams between 1 and 1,024")

    @staticmethod
    def demonstration(story: dict) -> dict:
        """A story -> its title."""
        return dict(source=story["text"], target=story["title"])

    def fit(self, config: Config, parts: dict) -> Config:
        """The architecture for the task. (BERT gets a head with the labels.)"""
        return config

    def encode(self, row: dict, tokenizer, config: Config) -> dict:
        """A row as src and tgt. What does not fit is cropped at its end."""
        src, cropped = self.encode_source(row["source"], tokenizer)
        tgt = tokenizer.encode(row["target"])
        cropped |= len(tgt) >= self.target_length
        tgt = [*tgt[: self.target_length - 1], config.eos_id]
        return dict(src=src, tgt=tgt, length=len(src), cropped=cropped)

    def encode_source(self, source: str, tokenizer) -> tuple[list[int], bool]:
        """-> (the prefix, the source and </s> as tokens, whether it was cropped)"""
        src = tokenizer.encode(self.task_prefix + source)
        kept = [*src[: self.source_length - 1], tokenizer.special["</s>"]]
        return kept, len(kept) <= len(src)

    def collate(self, examples: list[dict], tokenizer, generator=None) -> dict:
        """-> a batch: src (B, S), tgt (B, T) int64, and src_mask (B, S) bool if sources differ in
        length."""
        from data import pad

        sources, targets = ([example[name] for example in examples] for name in ("src", "tgt"))
        if generator and self.drop_prob:
            sources = [self.thin_out(source, generator) for source in sources]
        batch = dict(src=pad(sources, 0), tgt=pad(targets, -100))
        real = pad([[1] * len(source) for source in sources], 0) == 1
        batch |= {} if real.all() else {"src_mask": real}
        return {name: torch.from_numpy(array) for name, array in batch.items()}

    def thin_out(self, source: list[int], generator) -> list[int]:
        """Leave tokens out, but not </s>: no source comes twice, so none is learned by heart."""
        kept = generator.random(len(source)) >= self.drop_prob
        kept[-1] = True
        return np.array(source)[kept].tolist()

    def write(self, model: Model, tokenizer, batch: dict, **options) -> list[str]:
        """The targets that the model writes for the sources of a batch."""
        device = next(model.parameters()).device
        mask = batch["src_mask"].to(device) if "src_mask" in batch else None
        targets = model.generate(
            batch["src"].to(device), self.target_length, src_mask=mask, **options)
        return [plain_text(target, tokenizer, model.config) for target in targets.tolist()]

    def score(self, model: Model, examples, groups) -> tuple[dict, str]:
        """exact_match, token_f1 and rouge_l of what the model writes, means over all examples; a
        table of these beside two answers that need no understanding."""
        from data import mean_scores, simple_answers

        written, truth = [], []
        for group in groups:
            written += self.write(
                model, examples.tokenizer, examples.batch(group), beams=self.beams)
            truth += [examples.rows[i]["target"] for i in group]
        found = mean_scores(written, truth)
        order = np.concatenate(groups)
        sources = [examples.rows[i]["source"] for i in order]
        lines = [f"{'':<34}{'exact match':>12}{'token F1':>10}{'ROUGE-L':>10}"]
        simple = simple_answers(sources, examples.learned)
        for name, answers in {"the model": written, **simple}.items():
            exact, f1, rouge = mean_scores(answers, truth).values()
            lines.append(f"{name:<34}{exact:>12.1%}{f1:>10.3f}{rouge:>10.3f}")
        return found, "\n".join(lines)

    def prepare(self, model: Model, n: int) -> list[nn.Module]:
        """What --freeze n keeps as it is: the embeddings and the lowest n blocks of both stacks."""
        stacks = model.encoder, model.decoder
        depth = max(len(stack.blocks) for stack in stacks)
        if n > depth:
            raise ValueError(f"--freeze {n}: the model has {depth} layers")
        blocks = [block for stack in stacks for block in stack.blocks[:n]]
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        return [*embeddings, *blocks] if n else []

    def demonstrate(self, model: Model, examples, length: int) -> str:
        """Some held-out sources, what the model writes, and what was asked."""
        lines = []
        for i, row in enumerate(examples.rows[:3]):
            written = self.write(model, examples.tokenizer, examples.batch([i]))[0]
            text = " ".join(row["source"].split())
            text = text if len(text) < length else text[:length].rpartition(" ")[0] + " ..."
            lines.append(f"{text}\n    -> {written:.200}   (it is: {row['target']:.200})")
        return "\n".join(lines)


OWN_COMMANDS = {}  # that the other two do not have

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
