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

    python t5.py                                    train on input.txt: a few minutes on a laptop
    python t5.py generate --prompt "The cat sat on the <extra_id_0>."         fill the gaps
    python t5.py eval                               the loss, and how many tokens of spans are right
    python t5.py finetune                           learn to restore capitals and punctuation
    python t5.py finetune --data topics             or to tell what a story is about
    python t5.py generate --init_from t5-small      the published weights (or those in a folder)
    python t5.py --help                             every command and flag

The lesson of this file is how source and target find each other: see `T5.init_attention`. It reads
from top to bottom: 1 this page, 2 the configuration, 3 layers, 4 the model, 5 pretraining,
6 fine-tuning, 7 published weights, 9 training (8 is GPT's alone). Copied alone, it gives `T5` and
`T5Config`; its commands need bpe.py and data.py beside it. To learn, change: `--mean_span 1` (is
that easier?), `--act gated-gelu --tie false` (version 1.1); leave half of `init_attention` out.

Papers: Raffel et al. 2020, https://arxiv.org/abs/1910.10683; Vaswani et al. 2017 (attention);
Shazeer 2020, https://arxiv.org/abs/2002.05202 (gated feed-forwards).
"""

import functools
import math
import os
import re
import sys
import textwrap
from dataclasses import dataclass, fields
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
class T5Config:
    """The architecture. Defaults are T5's, but for dropout (there 0.1); version 1.1 has
    act="gated-gelu", tie=False. A text may have any length. ValueError where sizes do not fit."""

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
        ids = (0, self.vocab_size - 1)
        check(self, vocab_size=1, n_layer=1, n_head=1, n_embd=1, n_ff=1, head_dim=1, dropout=(0, 1),
              n_decoder_layer=1, pad_id=ids, eos_id=ids)
        if self.head_dim is None and self.n_embd % self.n_head:
            raise ValueError(f"change n_embd {self.n_embd}: no multiple of n_head {self.n_head}")
        if self.n_buckets < 4 or self.n_buckets % 2 or self.max_distance <= self.n_buckets // 2:
            raise ValueError(f"n_buckets {self.n_buckets}: even, 4 or more, below 2 * max_distance")


Config, NAME = T5Config, "t5"  # so named, what the files have in common is the same text

PRESETS = {  # sizes, and what goes with them in training; the first is the default
    "laptop": dict(vocab_size=1024, n_layer=2, n_decoder_layer=3, n_head=4, n_embd=128,
                   max_steps=2250, batch_size=32, lr=0.005, log_interval=50, eval_interval=750),
    "t4": dict(vocab_size=8192, n_layer=6, n_head=8, n_embd=512,  # for the GPU of that name
               block_size=256, max_steps=10000, batch_size=64, log_interval=50, eval_interval=500),
    "t5-small": dict(vocab_size=32128, n_layer=6, n_head=8, n_embd=512, block_size=512),
    "t5-base": dict(vocab_size=32128, n_layer=12, n_head=12, n_embd=768, block_size=512),
    "t5-large": dict(vocab_size=32128, n_layer=24, n_head=16, n_embd=1024, block_size=512),
    "t5-v1_1-small": dict(vocab_size=32128, n_layer=8, n_head=6, n_embd=512, n_ff=1024, head_dim=64,
                          act="gated-gelu", tie=False, block_size=512),
    "t5-v1_1-base": dict(vocab_size=32128, n_layer=12, n_head=12, n_embd=768, n_ff=2048,
                         act="gated-gelu", tie=False, block_size=512),
}
ADAMW = dict(lr=0.001, warmup_steps=100)  # what --optimizer adamw takes, for all weights
FINETUNING = {
    "laptop": dict(epochs=6.0, batch_size=16, optimizer="adamw", lr=0.002),
    "published": dict(epochs=3.0, batch_size=8, optimizer="adamw", lr=1e-4, warmup_steps=50,
                      weight_decay=0.01),  # for models 512 wide and more
    "": dict(epochs=1.0, source_length=64, target_length=64, eval_interval=400),
    "topics": dict(epochs=12.0, drop_prob=0.3, source_length=128, target_length=4, patience=4),
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


def padding_bias(mask):
    """mask (B, S) bool, True for a real token -> (B, 1, 1, S), to be added to scores: 0 or -inf."""
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask.bool(), -math.inf)
    return bias[:, None, None, :]


def distance_buckets(distance, both_sides: bool, n_buckets: int, max_distance: int):
    """The kind of each distance key - query, any shape, int64: 0 to n_buckets - 1 (Raffel, 2.1).

    With both_sides the first half of the kinds is for keys up to the query, the second for those
    after it: n = n_buckets / 2 each. Without, all n are for keys up to it. A distance d below e =
    n / 2 is a kind by itself; from e on the kind is e + (n - e) * log(d / e) / log(max_distance /
    e), rounded down, at most n - 1: ranges that grow like powers."""
    if both_sides:
        n_buckets //= 2
        side, distance = (distance > 0) * n_buckets, distance.abs()  # side: 0, or the second half
    else:
        side, distance = 0, (-distance).clamp(min=0)  # how far back the key is
    exact = n_buckets // 2
    power = torch.log(distance.clamp(min=1).float() / exact) / math.log(max_distance / exact)
    far = exact + (power * (n_buckets - exact)).long()  # from `exact` to n_buckets, and beyond
    return side + torch.where(distance < exact, distance, far.clamp(max=n_buckets - 1))


class Attention(nn.Module):
    """Multi-head attention (Vaswani, 3.2.2): states ask, and the same states (self-attention) or
    the encoder's (cross-attention) answer. Scores are not divided by sqrt(hd). Instead the first
    weights for queries are smaller by that factor, and so has to be their learning rate."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        hd = config.head_dim or config.n_embd // config.n_head
        self.query = nn.Linear(config.n_embd, config.n_head * hd, bias=False)
        self.query.weight.lr_factor = hd**-0.5  # of its learning rate (9)
        self.kv = nn.Linear(config.n_embd, 2 * config.n_head * hd, bias=False)  # two maps in one
        self.kv.weight.maps = 2  # Muon (9) takes them as 2 matrices
        self.proj = nn.Linear(config.n_head * hd, config.n_embd, bias=False)

    def heads(self, x):
        """(B, T, nh * hd) -> (B, nh, T, hd)"""
        return x.unflatten(-1, (self.n_head, -1)).transpose(1, 2)

    def keys_values(self, x):
        """The keys and values of x (B, S, C): (B, nh, S, hd) each."""
        return [self.heads(part) for part in self.kv(x).chunk(2, dim=-1)]

    def forward(self, x, key, value, bias=None, causal=False):
        """x (B, T, C) asks key, value (B, nh, S, hd) -> (B, T, C). bias: see `attention`, or a
        function that gives it for queries begin to end: then only a part of the scores is kept."""
        query, p = self.heads(self.query(x)).to(key.dtype), self.dropout * self.training
        if callable(bias):  # the scores are computed in parts, and again for the gradient
            def part(query, begin):
                rows = bias(begin, begin + query.size(2)).to(key.dtype)
                return attention(query, key, value, rows, False, 1.0, p)
            mixed = torch.cat([torch.utils.checkpoint.checkpoint(
                part, q, i * LONG // 2, use_reentrant=False)
                for i, q in enumerate(query.split(LONG // 2, dim=2))], dim=2)
        else:
            bias = None if bias is None else bias.to(key.dtype)
            mixed = attention(query, key, value, bias, causal, 1.0, p)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2).to(x.dtype))  # (B, T, C)
        return drop(mixed, p)


class FeedForward(nn.Module):
    """Two linear layers and a non-linearity, the same everywhere: C -> n_ff -> C (Vaswani, 3.3).
    Gated (Shazeer 2020): what goes up is multiplied, number by number, with gelu(gate(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.act, self.dropout, width = config.act, config.dropout, config.n_ff or 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, width, bias=False)
        if config.act == "gated-gelu":
            self.gate = nn.Linear(config.n_embd, width, bias=False)
        self.down = nn.Linear(width, config.n_embd, bias=False)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        inner, p = self.up(x), self.dropout * self.training  # (B, T, n_ff)
        inner = drop(F.relu(inner, inplace=True) if self.act == "relu" else
                     F.gelu(self.gate(x), approximate="tanh") * inner, p)
        if inner.dtype != torch.float16:
            return drop(self.down(inner), p)  # (B, T, C)
        # (It ends at 65,504, which published models exceed here.)
        with torch.autocast(inner.device.type, enabled=False):
            return drop(F.linear(inner.float(), self.down.weight.float()), p)


class Normalize(torch.autograd.Function):
    """For speed alone, an eighth of a step on a CPU: x (..., C), scale (C,) -> r x * scale with
    r = 1 / sqrt(mean(x^2) + eps), the mean taken in float32 as published.

    With g the gradient times scale, dx = r (g - r x mean(g r x)). LayerNorm's fused kernel also
    subtracts r mean(g): to add it again is twice as fast as PyTorch's RMSNorm. Under autocast, the
    result comes in the type that the products after it take."""

    @staticmethod
    def forward(ctx, x, scale, eps: float):
        r = (x.float().square().mean(dim=-1, keepdim=True) + eps).rsqrt().to(x.dtype)  # (..., 1)
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
    """x / sqrt(mean(x^2) + eps) * scale: a mean square of 1, then a learned scale; no mean is
    subtracted, nothing is added (Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467)."""

    def forward(self, x):
        """x (..., C) -> (..., C)."""
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return Normalize.apply(x, self.weight, self.eps)
        weight = self.weight  # (of a model in float16, x is wider: see FeedForward)
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), self.eps).to(weight.dtype)


def make_norm(config: Config):
    """The norm before each sublayer, and after the last block."""
    return RMSNorm(config.n_embd, eps=1e-6)


class Block(nn.Module):
    """Attention, cross-attention (decoder), feed-forward, each added: x + sublayer(norm(x))."""

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
        x = x + self.attn(h, key, value, bias, causal=self.decoder and x.size(1) > 1)  # (B, T, C)
        if self.decoder:
            x = x + self.cross(self.cross_norm(x), *source, source_bias)  # all see all the source
        return x + self.mlp(self.mlp_norm(x))


class Stack(nn.Module):
    """The encoder or the decoder: blocks that share their biases of distances, and a last norm."""

    def __init__(self, config: Config, n_layer: int, decoder: bool):
        super().__init__()
        self.config, self.decoder = config, decoder
        self.distance_embedding = nn.Embedding(config.n_buckets, config.n_head)
        self.blocks = nn.ModuleList(Block(config, decoder) for _ in range(n_layer))
        self.norm = make_norm(config)

    def distance_bias(self, begin: int, end: int, S: int, mask=None):
        """What scores get for the distance of positions begin to end to all S, with `padding_bias`
        of mask (B, S): (B or 1, nh, n, S)."""
        config, table = self.config, self.distance_embedding
        distance = torch.arange(S - 1 - begin, -end, -1, device=table.weight.device)
        bucket = distance_buckets(distance, not self.decoder, config.n_buckets, config.max_distance)
        # Backwards: the first query has the first S of these distances, the next begins one later.
        bias = table(bucket).T.contiguous().unfold(1, S, 1).flip(2)[None]
        return bias if mask is None else bias + padding_bias(mask)

    def forward(self, x, bias, sources=None, source_bias=None, caches=None):
        """x (B, T, C), bias (B or 1, nh, T, S) -> (B, T, C). sources, caches: one per block."""
        x, none = drop(x, self.config.dropout * self.training), [None] * len(self.blocks)
        for block, source, cache in zip(self.blocks, sources or none, caches or none):
            x = block(x, bias, source, source_bias, cache)
        return drop(self.norm(x), self.config.dropout * self.training)


# 4. The model -------------------------------------------------------------------------------------


class T5(nn.Module):
    """Token embedding for both sides, encoder, decoder, and a head that scores the next token."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.token_embedding.weight.lr_factor = 10.0  # of its learning rate: see `init_weights`
        self.encoder = Stack(config, config.n_layer, decoder=False)
        self.decoder = Stack(config, config.n_decoder_layer or config.n_layer, decoder=True)
        self.head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.register_buffer("never", torch.zeros(0, dtype=torch.long), persistent=False)  # Writer
        self.apply(self.init_weights)
        self.init_attention()
        if config.tie:
            self.head.weight = self.token_embedding.weight

    @staticmethod
    def init_weights(module):
        """T5's normal distributions: embeddings with variance 1; matrices so that what goes in with
        variance 1 comes out with it, but here with half of that std, which learns faster.

        Embeddings are 20 to 50 times as large as other models', but AdamW's steps are no larger: so
        their rate is ten times as high. (Adafactor, the paper's, steps in proportion.)"""
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.5 * module.in_features**-0.5)

    @torch.no_grad()
    def init_attention(self):
        """Begin with a path from the text around a gap to the tokens that fill it.

        What belongs in a gap shows in the tokens beside it. To get there takes two steps: in the
        encoder the sentinel has to look at its neighbours, and in the decoder the same sentinel at
        the encoder's. Neither gains anything before the other is there: for hundreds of steps the
        decoder learns which tokens are frequent, and little more.

        Neighbours: the encoder's biases of distances begin high at -1, 1, -2, 2, ... tokens, one
        for each head. The same sentinel: in the decoder's first cross-attention, the map for keys
        begins as that for queries: like fits like. A score of 7 outweighs a thousand of 0."""
        config = self.config
        for stack in self.encoder, self.decoder:
            nn.init.normal_(stack.distance_embedding.weight, std=0.1)
        head = torch.arange(config.n_head)
        distance = (head // 2 + 1) * (2 * (head % 2) - 1)  # -1, 1, -2, 2, ...
        bucket = distance_buckets(distance, True, config.n_buckets, config.max_distance)
        self.encoder.distance_embedding.weight[bucket, head] += 7.0
        first = self.decoder.blocks[0].cross
        key, _ = first.kv.weight.chunk(2)  # (nh * hd, C)
        hd = len(key) // config.n_head
        # A score sums C * hd products, times hd^-0.5 from below: about 7 where like meets like.
        nn.init.normal_(key, std=(7 / config.n_embd / hd**0.5) ** 0.5)
        first.query.weight.copy_(key)
        for module in self.modules():
            if isinstance(module, Attention):  # in place of the division by sqrt(hd): see there
                module.query.weight *= hd**-0.5

    def encode(self, src, src_mask=None):
        """src (B, S) int64 -> memory (B, S, C). src_mask (B, S) bool: True for a real token, False
        for padding, which no token attends to."""
        bias = functools.partial(self.encoder.distance_bias, S=src.size(1), mask=src_mask)
        in_parts = src.size(1) >= LONG and src.device.type == "cpu"  # (no kernel learns a bias)
        return self.encoder(self.token_embedding(src), bias if in_parts else bias(0, src.size(1)))

    def decode(self, tokens, bias, sources, source_bias=None, caches=None):
        """tokens (B, T) int64 of the target so far, with caches the new ones -> logits (B, T, V) of
        those that follow. bias: `distance_bias`; sources: each block's keys and values."""
        hidden = self.decoder(self.token_embedding(tokens), bias, sources, source_bias, caches)
        if self.config.tie and self.config.scale_head:
            hidden = hidden * self.config.n_embd**-0.5  # (or scores would have variance C)
        return self.head(hidden)

    def forward(self, src, tgt, src_mask=None):
        """src (B, S) int64, tgt (B, T) int64: the source, and the target with its </s> at the end
        -> logits (B, T, V) for each of the target's tokens, given those before it; the mean loss.

        Where tgt is -100 nothing is asked. The decoder reads the true tokens, one behind, not what
        it would have written (teacher forcing). src_mask (B, S) bool: see `encode`."""
        shown = tgt.masked_fill(tgt < 0, self.config.pad_id)  # (B, T); -100 is no token
        before = F.pad(shown, (1, -1), value=self.config.pad_id)  # what stands before each token
        memory, T = self.encode(src, src_mask), tgt.size(1)  # (B, S, C)
        sources = [block.cross.keys_values(memory) for block in self.decoder.blocks]
        source_bias = None if src_mask is None else padding_bias(src_mask)
        logits = self.decode(before, self.decoder.distance_bias(0, T, T), sources, source_bias)
        return logits, F.cross_entropy(logits.flatten(0, 1).float(), tgt.flatten())

    @torch.no_grad()
    def generate(self, src, max_new_tokens, temperature=0.0, top_k=None, top_p=None, beams=1,
                 src_mask=None):
        """Write a target for each source, src (B, S) int64 -> (B, n) int64, n <= max_new_tokens.

        Each ends with </s>, unless it got too long, and is filled up with <pad>. temperature,
        top_k, top_p: see `sample`; beams > 1: see `beam_search`, which does without these three.
        Raises ValueError for other shapes. The model is left in evaluation mode."""
        if src.ndim != 2 or not src.numel() or max_new_tokens < 1:
            raise ValueError(f"src {tuple(src.shape)} is no (B, S), or max_new_tokens below 1")
        self.eval()  # no dropout
        if beams > 1:
            return beam_search(self, src, max_new_tokens, beams, src_mask)
        writer = Writer(self, src, src_mask, max_new_tokens)
        column = src.new_full((len(src),), self.config.pad_id)  # (B,): before the target
        done, columns = torch.zeros_like(column, dtype=torch.bool), []
        while len(columns) < max_new_tokens and not done.all():
            column = sample(writer.step(column), temperature, top_k, top_p)
            column = column.masked_fill(done, self.config.pad_id)  # behind </s> comes nothing
            done |= column == self.config.eos_id
            columns.append(column)
        return torch.stack(columns, dim=1)


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


class Writer:
    """The decoder, token by token. What stays is computed once: the keys and values that it has of
    the source, and those of the tokens that it wrote before."""

    def __init__(self, model: T5, src, src_mask, length: int, copies: int = 1):
        """length: of the longest target. copies: how many targets to write for each source."""
        self.model = model
        memory = model.encode(src, src_mask).repeat_interleave(copies, dim=0)
        cross = [block.cross.keys_values(memory) for block in model.decoder.blocks]
        cross = [KVCache(src.size(1)).append(*pair) for pair in cross]  # (float32 on a CPU)
        bias = None if src_mask is None else padding_bias(src_mask)
        self.source = cross, bias if bias is None else bias.repeat_interleave(copies, dim=0)
        self.caches = [KVCache(length) for _ in cross]
        self.bias = model.decoder.distance_bias(length - 1, length, length)  # length - 1, ..., 0

    @torch.inference_mode()  # a twentieth faster
    def step(self, last):
        """last (B,) int64, the tokens written last -> scores of the next, (B, V)."""
        bias = self.bias[..., -1 - self.caches[0].length :].contiguous()  # (aligned for kernels)
        torch.backends.mkldnn.enabled = len(last) > 1  # slow for one bfloat16 vector
        try:
            logits = self.model.decode(last[:, None], bias, *self.source, self.caches)
        finally:
            torch.backends.mkldnn.enabled = True
        return logits[:, 0].index_fill(1, self.model.never, -math.inf)  # ids without a spelling

    def follow(self, rows):
        """Go on with these of the targets, (B,) int64. Copies have the same source."""
        for cache in self.caches:
            cache.keys, cache.values = cache.keys[rows], cache.values[rows]


def beam_search(model: T5, src, max_new_tokens: int, beams: int, src_mask=None):
    """Of the targets found, those with the highest mean log-probability: src (B, S) -> (B, n).

    At each step every beginning (hypothesis) is continued by every token, and the likeliest `beams`
    that do not end are kept: the likeliest token each time may miss a target that begins with the
    second likeliest. The mean over its tokens, </s> counted, decides between targets that have
    ended: with the sum, short ones would win too often. A source is done when none of its
    beginnings has a better mean than the worst of `beams` that have ended (a rule of thumb)."""
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
        parent, token = index // log_p.size(2), index % log_p.size(2)  # of beams, of V
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
        column = tokens[:, :, n - 1].flatten()  # (B * beams,)
        writer.follow((first[:, None] + parent.gather(1, going)).flatten())
    return ended[:, 0, :n]


Model = T5

# 5. Pretraining: say what was cut out -------------------------------------------------------------

SENTINELS = [f"<extra_id_{i}>" for i in range(100)]
SPECIAL_TOKENS = ["<pad>", "</s>", *SENTINELS]
SEPARATOR = "</s>"  # before the first document, between documents and after the last


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
        check(self, max_new_tokens=1, temperature=0, top_k=0, top_p=(0.001, 1), beams=1,
              num_samples=1)
        if self.temperature and self.beams > 1:
            raise ValueError("beams look for the likeliest text: set either beams or temperature")
        if self.num_samples > 1 and not self.temperature:
            raise ValueError("without a --temperature all samples are the same: set one")


def write(model: Model, ids: list[int], options: GenerateConfig) -> list[list[int]]:
    """The targets, num_samples of them, that the model writes for a source."""
    src = torch.tensor([ids] * options.num_samples, device=model.head.weight.device)
    return model.generate(src, options.max_new_tokens, options.temperature, options.top_k or None,
                          options.top_p, options.beams).tolist()


def plain_text(target: list[int], tokenizer, config: Config) -> str:
    """The text of a target, without </s> and <pad>."""
    return tokenizer.decode([x for x in target if x not in (config.pad_id, config.eos_id)]).strip()


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


@dataclass
class Pretraining:
    """What to learn from: windows with spans cut out. (Section 9 says what it asks of a class.)"""

    block_size: int = 128  # tokens of a text before anything is cut out
    noise_density: float = 0.15  # share of the tokens that is cut out
    corruption: Literal["spans", "bernoulli"] = "spans"  # bernoulli: each token independently
    mean_span: float = 3.0  # tokens in a span, on average (bernoulli: no effect, neighbours merge)

    def __post_init__(self):
        check(self, block_size=2, noise_density=(0.001, 0.999), mean_span=1)
        spans = self.counts(self.block_size)[1]
        if spans > len(SENTINELS):
            raise ValueError(f"{spans} spans are over 100: less --block_size or more --mean_span")

    def open(self, run, config: Config, tokenizer, corpus=None) -> Config:
        """Remember what prompts depend on; to train or evaluate, take a text, see data.Corpus
        -> the architecture for it. Raises ValueError where it does not fill a window."""
        from data import Batches

        self.run, self.config, self.tokenizer = run, config, tokenizer
        self.sentinels = [tokenizer.special[name] for name in SENTINELS]
        if corpus is None:
            return config
        self.corpus, self.description, self.before, self.length = corpus, str(corpus), {}, {}
        for part in "train", "validation":
            edges = corpus.edges(part)
            self.before[part] = edges - np.arange(len(edges))  # tokens of text before each </s>
            self.length[part] = len(getattr(corpus, part)) - len(edges)
            if self.length[part] < self.block_size:
                raise ValueError(f"{corpus}: too short; give more text or a smaller --block_size")
        # Windows of an epoch: one less than fit, so that there is room for a random offset.
        self.rows = max(self.length["train"] // self.block_size - 1, 1)
        self.order = Batches(np.ones(self.rows))  # all of one length
        return config

    def counts(self, length: int) -> tuple[int, int]:
        """(tokens to cut out, spans) of `length` tokens, rounded as in the paper's code."""
        noise = min(max(round(length * self.noise_density), 1), length - 1)
        if self.corruption == "bernoulli":
            return noise, max(round(noise * (1 - self.noise_density)), 1)  # those that begin one
        return noise, min(max(round(noise / self.mean_span), 1), noise, length - noise)

    def draw_noise(self, length: int, draw):
        """Which tokens of a text are cut out: (length,) bool.

        "bernoulli" (Raffel, 3.1.4): each token by itself. "spans" (3.3.4, `random_spans_noise_mask`
        in its code): so many tokens in so many spans, text and spans in turn, text first: all rows
        have the same lengths, and nothing needs padding."""
        if self.corruption == "bernoulli":
            noise = draw.random(length) < self.noise_density
            starts = noise & ~np.concatenate(([False], noise[:-1]))
            return noise & (starts.cumsum() <= len(SENTINELS))  # (the rest stays)
        noise, spans = self.counts(length)

        def parts(n: int):  # n as a sum of `spans` numbers of at least 1, all ways equally likely
            cuts = np.sort(draw.permutation(n - 1)[: spans - 1]) + 1  # between two of n tokens
            return np.diff(cuts, prepend=0, append=n)

        lengths = np.stack((parts(length - noise), parts(noise)), axis=1).flatten()
        return np.repeat(np.arange(2 * spans) % 2 == 1, lengths)

    def corrupt(self, tokens, noise) -> tuple:
        """Cut the noise out of tokens, both (length,) -> src: the text with a sentinel for each
        span; tgt: each sentinel and the tokens it stands for. Both end in </s>."""
        begins = noise & ~np.concatenate(([False], noise[:-1]))  # the first token of each span
        marks = self.sentinels[: begins.sum()]
        src, tgt = tokens.copy(), tokens[noise]
        src[begins] = marks
        tgt = np.insert(tgt, np.flatnonzero(begins[noise]), marks)  # each before its span
        end = self.config.eos_id
        return np.append(src[begins | ~noise], end), np.append(tgt, end)

    def make(self, part: str, begins, draw) -> dict:
        """A batch, see `pad_sources`, of the windows of a part that begin at these tokens of text.
        Separators are left out: a window may run on into the next document, as in the paper's."""
        from data import pad

        place = begins[:, None] + np.arange(self.block_size)  # (n, block_size), of text alone
        place = place + np.searchsorted(self.before[part], place, side="right")  # with separators
        rows = [self.corrupt(window, self.draw_noise(len(window), draw))
                for window in getattr(self.corpus, part)[place].astype(np.int64)]
        return pad_sources([row[0] for row in rows], [row[1] for row in rows], pad)

    def batch(self, step: int) -> dict:
        """A step's batch (see `make`), which depends on (seed, step) alone. An epoch lays windows
        end to end from a random offset and takes all of them, in random order."""
        row, shift = self.order.chosen(self.run, step)
        begins = int(shift * (self.length["train"] - self.rows * self.block_size + 1))
        begins = begins + row * self.block_size
        return self.make("train", begins, np.random.default_rng((self.run.seed, step)))

    def eval_batches(self, rows: int, most: int | None = None):
        """Yield the validation part in windows; the last ends where the text ends. The noise is
        always the same. most: of a large part, about so many tokens, evenly spread over it."""
        from data import spread

        T, length, draw = self.block_size, self.length["validation"], np.random.default_rng(0)
        for chosen in spread(-(-length // T), rows, most and most // T):
            batch = self.make("validation", np.minimum(chosen * T, length - T), draw)
            mark = np.isin(batch["tgt"], [self.config.eos_id, -100, *self.sentinels])
            yield batch | {"in_span": torch.from_numpy(~mark)}

    def asked(self, batch: dict) -> torch.Tensor:
        """How many answers a batch asks for: its mean loss is a mean over so many."""
        return (batch["tgt"] != -100).sum().float()

    def loss(self, model: Model, batch: dict):
        """The mean loss, and in evaluation measures, each a pair of sums: span_accuracy counts the
        tokens that were cut out, but no sentinels and no </s>."""
        logits, loss = model(batch["src"], batch["tgt"], batch.get("src_mask"))
        if "in_span" not in batch:  # (in training)
            return loss, {}
        right = (logits.argmax(dim=-1) == batch["tgt"]) & batch["in_span"]  # (B, T)
        return loss, dict(span_accuracy=(right.sum(), batch["in_span"].sum()))

    def prompt_ids(self, prompt: str) -> list[int]:
        """The prompt and </s>. (Tokens begin with the space before a word, so a space in front of a
        sentinel is missing, too.) Raises ValueError for gaps with other numbers."""
        parts = re.split(r" ?(<extra_id_\d+>)", prompt)  # text, name, text, name, ..., text
        names = parts[1::2]
        if sorted(names) != sorted(SENTINELS[: len(names)]):
            raise ValueError("a prompt's gaps have to be numbered from 0 on, each number once: "
                             '"The <extra_id_0> sat on the <extra_id_1>."')
        ids = [[self.tokenizer.special[part]] if part in names else self.tokenizer.encode(part)
               for part in parts]
        return [*sum(ids, []), self.config.eos_id]

    def answer(self, model: Model, options: GenerateConfig):
        """Yield the prompt with its gaps filled; to one without gaps, the target as it stands."""
        ids = self.prompt_ids(options.prompt or "The cat sat on the <extra_id_0>.")
        texts, gaps = [], not set(self.sentinels).isdisjoint(ids)
        for target in write(model, ids, options):
            contents = gap_contents(target, self.sentinels, self.config.eos_id)
            filled = sum((contents.get(token, [token]) for token in ids[:-1]), [])
            texts.append(self.tokenizer.decode(filled) if gaps
                         else plain_text(target, self.tokenizer, self.config))
        yield "\n\n".join(texts)

    def demonstrate(self, model: Model, length: int) -> str:
        """A sample for the log: a text with gaps, and how the model fills them."""
        tokens = self.corpus.validation[: 2 * self.block_size].astype(np.int64)
        tokens = tokens[tokens != self.config.eos_id][: min(length, self.block_size)]
        src, tgt = self.corrupt(tokens, self.draw_noise(len(tokens), np.random.default_rng(0)))
        options = GenerateConfig(self.tokenizer.decode(src[:-1]), max_new_tokens=2 * len(tgt))
        return f"{options.prompt}\n-> {''.join(self.answer(model, options))}"


def pad_sources(sources: list, targets: list, pad) -> dict:
    """Rows of different lengths -> a batch: src (n, S), tgt (n, T) int64, and where sources differ
    in length src_mask (n, S) bool."""
    batch = dict(src=pad(sources, 0), tgt=pad(targets, -100))
    real = pad([[1] * len(source) for source in sources], 0) == 1
    return batch if real.all() else batch | {"src_mask": real}


# 6. Fine-tuning: turn a source into a target ------------------------------------------------------


@dataclass
class Finetuning:
    """Turn a source into a target; a prefix such as "summarize: " tells which task it is (Raffel,
    2.4). (Methods without a text are those of Pretraining.)"""

    task_prefix: str = ""  # what stands before each source
    source_length: int = 512  # tokens of a source that are kept, </s> included
    drop_prob: float = 0.0  # share of a source's tokens that are left out in training, by chance
    target_length: int = 128  # tokens of a target that are kept, and written at most
    beams: int = 1  # how many beginnings are followed at once where targets are written to compare

    columns, optional = ("source", "target"), ()
    demonstrations = ("", "topics")  # what --data can be beside a table: see `from_story`

    def __post_init__(self):
        check(self, source_length=2, drop_prob=(0, 1), target_length=2, beams=1)

    @staticmethod
    def from_story(story: dict, source: str) -> list[dict]:
        """A sentence without capitals and punctuation -> the sentence; or a story -> its topic."""
        if source == "topics":
            return [dict(source=f"topic: {story['text']}", target=story["topic"])]
        sentences = re.split(r'(?<=[.!?"])\s+(?=["A-Z])', story["text"])
        return [dict(source="restore: " + re.sub("[^a-z' ]", "", sentence.lower()), target=sentence)
                for sentence in sentences if 20 <= len(sentence) <= 150 and "\n" not in sentence]

    def open(self, run, config: Config, tokenizer, parts=None) -> Config:
        """parts: the rows (dicts of columns) to learn from, and those held out -> config."""
        from data import Examples

        self.run, self.config, self.tokenizer = run, config, tokenizer
        if parts is None:
            return config
        self.train, self.held_out = (Examples(part, self.encode) for part in parts)
        self.rows, self.description = len(self.train.rows), self.train.describe(self.held_out)
        return config

    def source_ids(self, source: str) -> list[int]:
        """The prefix, the source, as far as it fits, and </s>."""
        ids = self.tokenizer.encode(self.task_prefix + source)
        return [*ids[: self.source_length - 1], self.config.eos_id]

    def encode(self, row: dict) -> dict:
        """A row as src and tgt. What does not fit is cropped at its end."""
        src, tgt = self.source_ids(row["source"]), self.tokenizer.encode(row["target"])
        tgt = [*tgt[: self.target_length - 1], self.config.eos_id]
        return dict(src=src, tgt=tgt, length=len(src), target=row["target"])

    def collate(self, examples: list[dict], draw=None) -> dict:
        """-> a batch, see `pad_sources`. In training, with a generator, drop_prob of each source's
        tokens are left out, but not </s>: none is learned by heart."""
        from data import pad

        sources = [np.array(example["src"]) for example in examples]
        if draw and self.drop_prob:
            sources = [source[np.append(draw.random(len(source) - 1) >= self.drop_prob, True)]
                       for source in sources]
        return pad_sources(sources, [example["tgt"] for example in examples], pad)

    def batch(self, step: int) -> dict:
        draw = np.random.default_rng((self.run.seed, step))
        return self.collate(self.train.batch(self.run, step), draw)

    def eval_batches(self, rows: int, most: int | None = None):
        return map(self.collate, self.held_out.in_order(rows))  # (all, however many)

    asked = Pretraining.asked

    def loss(self, model: Model, batch: dict):
        """The mean loss, and in evaluation how far what the model writes is the target: exact
        matches, and means over examples of token_f1 and rouge_l."""
        from data import word_overlap

        loss = model(batch["src"], batch["tgt"], batch.get("src_mask"))[1]
        if model.training:
            return loss, {}
        targets = model.generate(batch["src"], self.target_length, beams=self.beams,
                                 src_mask=batch.get("src_mask"))
        written, truth = ([plain_text(row, self.tokenizer, self.config) for row in rows.tolist()]
                          for rows in (targets, batch["tgt"].clamp(min=self.config.pad_id)))
        found = [dict(exact_match=a == b) | word_overlap(a, b) for a, b in zip(written, truth)]
        return loss, {name: (sum(float(x[name]) for x in found), len(found)) for name in found[0]}

    def answer(self, model: Model, options: GenerateConfig):
        """Yield the target for a source."""
        targets = write(model, self.source_ids(options.prompt), options)
        yield "\n\n".join(plain_text(x, self.tokenizer, self.config) for x in targets)

    def demonstrate(self, model: Model, length: int) -> str:
        """Some held-out sources, what the model writes, and what was asked."""
        lines = []
        for row in self.held_out.rows[:3]:
            options = GenerateConfig(prompt=row["source"], max_new_tokens=self.target_length)
            written = "".join(self.answer(model, options))
            text = textwrap.shorten(row["source"], length, placeholder=" ...")
            lines.append(f"{text}\n    -> {written:.200}   (it is: {row['target']:.200})")
        return "\n".join(lines)


# 7. Published weights: T5's names for ours --------------------------------------------------------

FIXED = dict(model_type="t5", layer_norm_epsilon=1e-6, is_encoder_decoder=True)  # of `config.json`
# Old files hold distance biases of the cross-attention, which uses none.
NO_WEIGHTS = r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
ROLES = dict(pad_token="<pad>", eos_token="</s>")  # of special tokens
NEVER, HEAD = (), "$^"  # special tokens that are never drawn; weights that may be missing
TEMPLATE = ["A", "</s>", "B", "</s>"]  # what stands around a text A, or a pair A, B

NAMES = [  # what our names have (a regular expression) -> what T5's have there
    ("^token_embedding", "shared"), ("^head", "lm_head"), (r"r\.norm", "r.final_layer_norm"),
    ("distance_embedding", "block.0.layer.0.SelfAttention.relative_attention_bias"),
    (r"blocks\.(\d+)", r"block.\1.layer"), ("attn_norm", "0.layer_norm"),
    ("attn", "0.SelfAttention"), ("cross_norm", "1.layer_norm"), ("cross", "1.EncDecAttention"),
    ("query", "q"), ("proj", "o"), ("^(encoder.*)mlp", r"\g<1>1.mlp"), ("layer.mlp", "layer.2.mlp"),
    ("mlp_norm", "layer_norm"), ("mlp.gate", "DenseReluDense.wi_0"),
    ("mlp.up", "DenseReluDense.wi"), ("mlp.down", "DenseReluDense.wo"),
]


def as_published(model: Model, name: str, weight) -> dict:
    """A weight by its published name; key and value are apart there."""
    if "kv" in name:
        return {name.replace("kv", part): view for part, view in zip("kv", weight.chunk(2))}
    gated = model.config.act == "gated-gelu"
    return {name.replace("wi.", "wi_1.") if gated else name: weight}


def published_name(name: str) -> str:
    """The name of a tensor in a file of weights, old ones included -> its published name."""
    return re.sub(r"^(en|de)coder\.embed_tokens", "shared", name)


def to_published(config: Config) -> dict:
    """Our settings as `config.json` has them. (`transformers` takes from tie_word_embeddings
    whether scores are scaled; the head is tied where the file of weights has no lm_head.)"""
    return dict(
        architectures=["T5ForConditionalGeneration"], vocab_size=config.vocab_size,
        d_model=config.n_embd, d_kv=config.head_dim or config.n_embd // config.n_head,
        d_ff=config.n_ff or 4 * config.n_embd, num_layers=config.n_layer,
        num_decoder_layers=config.n_decoder_layer or config.n_layer, num_heads=config.n_head,
        relative_attention_num_buckets=config.n_buckets,
        relative_attention_max_distance=config.max_distance, dropout_rate=config.dropout,
        feed_forward_proj=config.act, tie_word_embeddings=config.tie and config.scale_head,
        pad_token_id=config.pad_id, eos_token_id=config.eos_id,
        decoder_start_token_id=config.pad_id,
    )


def from_published(found: dict, names) -> Config:
    """What `config.json` says, and the names of the weights -> our settings. A file with its own
    head is not tied, unless an older `transformers` says that it is only a copy."""
    said, newer = found.get("tie_word_embeddings", True), "scale_decoder_outputs" in found
    pad_id = found.get("pad_token_id", 0)
    if found.get("decoder_start_token_id", pad_id) != pad_id:
        raise ValueError("decoder_start_token_id is not pad_token_id")
    act, acts = found.get("feed_forward_proj", "relu"), {"relu": "relu", "gated-gelu": "gelu_new"}
    if act not in acts or found.get("dense_act_fn", acts[act]) != acts[act]:
        raise ValueError(f"feed_forward_proj {act}, with its dense_act_fn, is none of {[*acts]}")
    return Config(
        found["vocab_size"], found["num_layers"], found["num_heads"], found["d_model"],
        n_ff=found["d_ff"], head_dim=found["d_kv"], dropout=found.get("dropout_rate", 0.1),
        act=act, tie="lm_head.weight" not in names or (said and not newer),
        scale_head=found["scale_decoder_outputs"] if newer else said, pad_id=pad_id,
        n_buckets=found["relative_attention_num_buckets"],
        max_distance=found.get("relative_attention_max_distance", 128),
        n_decoder_layer=found.get("num_decoder_layers"), eos_id=found.get("eos_token_id", 1),
    )

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
