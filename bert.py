"""BERT: an encoder that reads a whole text at once and says which tokens were hidden from it.

A GPT sees only what came before. BERT sees both sides, so predicting the next token would be no
exercise; instead 15 % of the tokens are chosen, most of them masked, and asked for (masked language
modelling). A second, easier question trains the token [CLS], which stands for the whole text: does
segment B continue segment A, or does it come from another document (next-sentence prediction)?

    input     [CLS] The old [MASK] sat by the [SEP] sea and counted [MASK] waves . [SEP] [PAD]
    segment     0    0   0    0     0  0   0    0    1   1     1      1      1   1   1     0
    target                   man                                    the
    answer    the second segment continues the first

The architecture is that of the Transformer's encoder. Each position holds a vector, the residual
stream: the sum of a token's, a position's and a segment's embedding. Blocks add to it what
attention brings (every position looks at every other) and what a feed-forward makes of it (each
thinks alone), and normalize after each. On top stand three small heads: for hidden tokens, for the
pair, and after fine-tuning for labels. No text is generated; BERT is for understanding it.

    python bert.py                                  train on input.txt: 4 to 5 minutes on a laptop
    python bert.py generate --prompt "The cat sat on the [MASK]."     fill what is hidden
    python bert.py eval                             how many hidden tokens and pairs it gets right
    python bert.py finetune                         learn to tell what a story is about
    python bert.py finetune --data texts.csv        or your texts and labels; --data imdb
    python bert.py bench                            how fast this machine is at it
    python bert.py generate --init_from bert-base-uncased    the published weights (or a folder)
    python bert.py export --to FOLDER               what was trained, for transformers
    python bert.py --help                           every flag

The lesson of this file is how to leave the plateau, on which the loss of a BERT that is trained
from scratch may stay for hours: see `BERT.init_attention`. It reads from top to bottom: 1 this
page, 2 the configuration, 3 layers, 4 the model, 5 the objective, 6 generation, 7 published
weights, 8 fine-tuning, 9 training, 10 the command line. Copied alone into a project, this file
still gives `from bert import BERT, BERTConfig`; its commands need bpe.py (the tokenizer) and
data.py (files, downloads, the log) beside it. To learn, change things: `--pos rotary` (which loss
falls faster?), `--nsp false`, `--mask_prob 0.5`; leave `init_attention` out (when does mlm_loss
leave 5.4?); `causal=True` in Attention (why are half of the pairs wrong then?).

Papers: Devlin et al. 2019, https://arxiv.org/abs/1810.04805 (BERT); Vaswani et al. 2017,
https://arxiv.org/abs/1706.03762 (attention).
"""

import os
import signal

if __name__ == "__main__":  # Ctrl-C while the packages load leaves no traceback
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import functools
import itertools
import json
import math
import sys
from dataclasses import asdict, dataclass, field, fields, replace
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
class BERTConfig:
    """The architecture. Defaults are BERT's, but for dropout (there 0.1); the rest is variants.

    Raises ValueError for sizes that do not fit together.
    """

    vocab_size: int  # token types: special tokens + 256 bytes + merges
    block_size: int  # longest sequence, in tokens
    n_layer: int  # blocks
    n_head: int  # attention heads in a block
    n_embd: int  # width of the residual stream
    n_ff: int | None = None  # width inside a feed-forward (default 4 * n_embd)
    dropout: float = 0.0  # share of activations zeroed in training
    pos: Literal["learned", "sinusoidal", "rotary"] = "learned"  # how positions are marked
    norm: Literal["post", "pre"] = "post"  # LayerNorm after or before each sublayer
    n_segments: int = 2  # kinds of segments: A and B
    nsp: bool = True  # train next-sentence prediction beside masked language modelling
    n_labels: int = 0  # classes that `classify` tells apart (0: it has no such head)

    def __post_init__(self):
        check_choices(self)
        at_least(self, 1, "vocab_size", "n_layer", "n_head", "n_embd", "n_ff", "n_segments")
        at_least(self, 8, "block_size")  # for a pair
        at_least(self, 0, "n_labels")
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd {self.n_embd} is not divisible by n_head {self.n_head}: "
                "change one of them"
            )
        if self.pos == "rotary" and self.key_width % 2:
            raise ValueError(
                f"rotary positions turn pairs of numbers: n_embd / n_head, here {self.key_width}, "
                "has to be even"
            )
        if self.nsp and self.n_segments < 2:
            raise ValueError("next-sentence prediction takes n_segments 2, or set --nsp false")
        if self.block_size * max(self.n_embd, self.n_head * self.key_width) > 1 << 28:
            raise ValueError(f"block_size {self.block_size} takes a table of over 1 GiB")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout {self.dropout} is not between 0 and 1")

    @property
    def key_width(self) -> int:
        """Width of a head's queries and keys."""
        return self.n_embd // self.n_head

    @property
    def ff_width(self) -> int:
        """Width inside a feed-forward."""
        return 4 * self.n_embd if self.n_ff is None else self.n_ff


Config, NAME = BERTConfig, "bert"  # so named, what the files have in common is the same text

PRESETS = {  # BERT's two sizes have 110 M and 340 M parameters
    "laptop": dict(vocab_size=1024, block_size=128, n_layer=3, n_head=4, n_embd=128),
    "t4": dict(vocab_size=8192, block_size=256, n_layer=8, n_head=8, n_embd=512),  # for that GPU
    "bert-base": dict(vocab_size=30522, block_size=512, n_layer=12, n_head=12, n_embd=768),
    "bert-large": dict(vocab_size=30522, block_size=512, n_layer=24, n_head=16, n_embd=1024),
}
RECIPES = {  # training settings that go with a preset (matrix_lr: Muon's, see 9); else laptop's
    "laptop": dict(
        max_steps=2200, batch_size=32, lr=0.003, matrix_lr=0.015, log_interval=50, eval_interval=550
    ),
    "t4": dict(max_steps=10000, batch_size=64, log_interval=50, eval_interval=500),
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


def padding_bias(mask):
    """mask (B, S) bool, True for a real token -> (B, 1, 1, S), to be added to scores: 0 or -inf."""
    bias = torch.zeros(mask.shape, device=mask.device).masked_fill(~mask.bool(), -math.inf)
    return bias[:, None, None, :]


class Attention(nn.Module):
    """Self-attention: nh attentions side by side, each with queries, keys and values of its own
    (Vaswani, 3.2.2)."""

    def __init__(self, config: Config):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.qkv = nn.Linear(config.n_embd, 3 * config.n_embd)  # three maps in one
        # For Muon (9) they are three matrices.
        self.qkv.weight.maps = 3
        self.proj = nn.Linear(config.n_embd, config.n_embd)

    def forward(self, x, bias=None, turn=None):
        """x (B, T, C), bias (B, 1, 1, T), turn (2, T, hd / 2), see `rotate` -> (B, T, C)."""
        B, T, C = x.shape
        query, key, value = (
            part.view(B, T, self.n_head, -1).transpose(1, 2)  # (B, nh, T, hd)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        bias = None if bias is None else bias.to(query.dtype)
        mixed = attention(query, key, value, bias, dropout=self.dropout * self.training)
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        return F.dropout(mixed, self.dropout, self.training)


class FeedForward(nn.Module):
    """Two linear layers and a non-linearity, the same everywhere: C -> n_ff -> C (Vaswani, 3.3)."""

    def __init__(self, config: Config):
        super().__init__()
        self.dropout = config.dropout
        self.up = nn.Linear(config.n_embd, config.ff_width)
        self.down = nn.Linear(config.ff_width, config.n_embd)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        inner = F.gelu(self.up(x))  # (B, T, n_ff)
        return F.dropout(self.down(inner), self.dropout, self.training)  # (B, T, C)


def make_norm(config: Config):
    """LayerNorm: a position's C numbers get mean 0, variance 1, then a learned scale and shift."""
    return nn.LayerNorm(config.n_embd, eps=1e-12)


class Block(nn.Module):
    """Attention, then feed-forward, each added to the residual stream x: norm(x + sublayer(x))."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.attn, self.attn_norm = Attention(config), make_norm(config)
        self.mlp, self.mlp_norm = FeedForward(config), make_norm(config)

    def add(self, x, sublayer, norm):
        """BERT's post-norm norm(x + sublayer(x)), or pre-norm x + sublayer(norm(x))."""
        y = x + sublayer(norm(x) if self.config.norm == "pre" else x)
        return norm(y) if self.config.norm == "post" else y

    def forward(self, x, bias=None, turn=None, at=None):
        """x (B, T, C) -> (B, T, C), or with `at` (N,), places b * T + t, the results there (N, C):
        the feed-forward looks at each position alone, so it can leave out those not asked for."""
        x = self.add(x, lambda h: self.attn(h, bias, turn), self.attn_norm)
        x = x if at is None else x.flatten(0, 1).index_select(0, at)
        return self.add(x, self.mlp, self.mlp_norm)


# --------------------------------------------------------------------------------------------------
# 4. The model
# --------------------------------------------------------------------------------------------------


class BERT(nn.Module):
    """Embeddings, blocks, and the heads on top: for hidden tokens, for the pair, for labels."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.segment_embedding = nn.Embedding(config.n_segments, config.n_embd)
        if config.pos == "learned":
            self.position_embedding = nn.Embedding(config.block_size, config.n_embd)
        elif config.pos == "sinusoidal":
            self.register_buffer("positions", self.first_positions(), persistent=False)
        elif config.pos == "rotary":
            table = sinusoids(config.block_size, config.key_width)  # sin, cos, sin, cos, ...
            self.register_buffer(
                "turns", torch.stack((table[:, 1::2], table[:, ::2])), persistent=False
            )
        self.norm = make_norm(config)  # post-norm: of the embeddings; pre-norm: after the blocks
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # For hidden tokens: head(norm(gelu(transform(x)))), as in BERT's code.
        self.transform = nn.Linear(config.n_embd, config.n_embd)
        self.transform_norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        if config.nsp or config.n_labels:
            self.pooler = nn.Linear(config.n_embd, config.n_embd)  # for the whole text
        if config.nsp:
            self.pair_head = nn.Linear(config.n_embd, 2)
        if config.n_labels:
            self.label_head = nn.Linear(config.n_embd, config.n_labels)
        self.apply(self.init_weights)
        self.init_attention()
        self.head.weight = self.token_embedding.weight

    @staticmethod
    def init_weights(module):
        """Normal with std 0.02, as BERT; but 0.05 for embeddings (and a tied head), so that tokens
        differ from the first step on. Biases are 0."""
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=0.05 if isinstance(module, nn.Embedding) else 0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def first_positions(self):
        """(block_size, C): sinusoids of amplitude 0.2, four times the token embeddings' std. With
        block_size as their base, even the slowest pair of them moves within a sequence."""
        return 0.2 * sinusoids(self.config.block_size, self.config.n_embd, self.config.block_size)

    @torch.no_grad()
    def init_attention(self):
        """Begin as a reader of neighbours: that is what leaves the plateau.

        With positions drawn at random, attention begins even over the whole sequence. A neighbour
        is then a 128th of what a token gets to see, and of what the gradient says: the model learns
        how often tokens occur (a loss of 5.4 at 1,024 types), and for thousands of steps no more.
        The cure changes neither a shape nor a formula. Positions start as sinusoids p(t): there, d
        steps further means that pair i of the numbers turns by the angle d / base^(2i / C), which
        is why Vaswani et al. chose them (3.5). So a head's map for queries W_q, its pairs of
        columns turned by the same angles, is a map for keys W_k with W_k p(t + d) = W_q p(t): the
        query at t fits the key at t + d. In the first block, the heads begin with d = -1, 1, -2, 2,
        ...; deeper blocks with an even view of everything. All sublayers begin with an output of
        zero, so that positions reach each block unharmed; their last maps get a gradient all the
        same, and what is below these from the second step on.
        """
        C, base = self.config.n_embd, self.config.block_size
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.down.weight)
        if self.config.pos == "learned":
            self.position_embedding.weight.copy_(self.first_positions())
        query, key, _ = self.blocks[0].attn.qkv.weight.chunk(3)  # (C, C) each
        # A score sums C * hd products, and is divided by sqrt(hd): about 7 where query and key fit
        # (5 or 6 with tokens mixed in: half of the weight lies within two tokens of t + d).
        nn.init.normal_(query, std=(7 / C / self.config.key_width**0.5) ** 0.5)
        head = torch.arange(self.config.n_head).repeat_interleave(self.config.key_width)  # (C,)
        distance = (head // 2 + 1) * (2 * (head % 2) - 1)  # -1, 1, -2, 2, ...: one for each head
        if self.config.pos == "rotary":
            distance = 0 * distance  # no positions in x: there a query looks for its like
        angle = distance[:, None] * base ** (-torch.arange(0, C - 1, 2) / C)  # (C, C / 2)
        key.copy_(query)
        sine, cosine = query[:, 0 : C - 1 : 2], query[:, 1::2]
        key[:, 0 : C - 1 : 2] = sine * angle.cos() + cosine * angle.sin()
        key[:, 1::2] = cosine * angle.cos() - sine * angle.sin()

    def encode(self, idx, segments=None, mask=None, at=None):
        """idx (B, T) int64 -> hidden (B, T, C), or with `at` (N,), places b * T + t, only (N, C).

        segments (B, T) int64: 0 in segment A, 1 in B; without it all are 0. mask (B, T) bool: True
        for a real token, False for padding, which no token attends to. Raises ValueError where T
        exceeds block_size.
        """
        T = idx.size(1)
        if T > self.config.block_size:
            raise ValueError(f"{T} tokens are more than block_size {self.config.block_size}")
        x = self.token_embedding(idx)  # (B, T, C)
        if self.config.pos == "learned":
            x = x + self.position_embedding.weight[:T]  # + (T, C)
        elif self.config.pos == "sinusoidal":
            x = x + self.positions[:T]
        turn = self.turns[:, :T] if self.config.pos == "rotary" else None  # (2, T, hd / 2)
        x = x + (
            self.segment_embedding.weight[0] if segments is None
            else self.segment_embedding(segments)
        )
        x = x if self.config.norm == "pre" else self.norm(x)
        x = F.dropout(x, self.config.dropout, self.training)
        bias = None if mask is None else padding_bias(mask)  # (B, 1, 1, T), hides the padding
        for block in self.blocks[:-1]:
            x = block(x, bias, turn)
        x = self.blocks[-1](x, bias, turn, at)
        return self.norm(x) if self.config.norm == "pre" else x

    def forward(self, idx, segments=None, mask=None, at=None):
        """idx (B, T) int64 -> mlm_logits (B, T, V), nsp_logits (B, 2), or None without that head.

        at (N,) int64: the places b * T + t whose logits are asked for; mlm_logits are (N, V) then.
        nsp_logits: "B continues A", "B is from elsewhere". segments, mask: see `encode`.
        """
        if at is None:
            hidden = self.encode(idx, segments, mask)  # (B, T, C)
            whole = hidden[:, 0]  # (B, C): the state of [CLS]
        else:
            first = torch.arange(len(idx), device=idx.device) * idx.size(1)  # (B,): [CLS]'s places
            hidden = self.encode(idx, segments, mask, torch.cat((at, first)))
            hidden, whole = hidden.split((len(at), len(first)))  # (N, C), (B, C)
        mlm_logits = self.head(self.transform_norm(F.gelu(self.transform(hidden))))
        return mlm_logits, self.pair_head(self.pool(whole)) if self.config.nsp else None

    def pool(self, whole):
        """The last state of [CLS] (B, C) -> (B, C): what it has gathered about the whole text."""
        return torch.tanh(self.pooler(whole))

    def classify(self, idx, segments=None, mask=None):
        """idx (B, T) int64, each row [CLS] text [SEP] -> scores of the labels (B, n_labels).
        Arguments: see `encode`. Raises ValueError for a model without such a head."""
        if not self.config.n_labels:
            raise ValueError("this model has no head for labels: set n_labels")
        first = torch.arange(len(idx), device=idx.device) * idx.size(1)  # (B,): [CLS]'s places
        whole = self.pool(self.encode(idx, segments, mask, first))  # (B, C)
        return self.label_head(F.dropout(whole, self.config.dropout, self.training))

    def loss(self, idx, segments, mask, mlm_labels, nsp_labels=None):
        """The paper's loss (A.2), mean over hidden tokens + mean over pairs. (The training below
        computes its own, see `loss_sum`.)

        mlm_labels (B, T) int64: the token that was there, -100 where nothing is asked; the head is
        computed for the others alone. nsp_labels (B,) int64: 0 if B continues A, else 1.
        """
        at = (mlm_labels.flatten() != -100).nonzero()[:, 0]  # (N,)
        mlm_logits, nsp_logits = self(idx, segments, mask, at)
        loss = F.cross_entropy(mlm_logits, mlm_labels.flatten()[at])
        if nsp_labels is not None and nsp_logits is not None:
            loss = loss + F.cross_entropy(nsp_logits, nsp_labels)
        return loss


Model = BERT

# --------------------------------------------------------------------------------------------------
# 5. The objective: say which tokens were hidden, and whether B continues A
# --------------------------------------------------------------------------------------------------

# A corpus (data.Corpus) has train and validation, arrays of token ids, and token_bytes, how many
# bytes each token spells. `luck` is always a random number from [0, 1).

SPECIAL_TOKENS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
SEPARATOR = "[SEP]"  # before the first document, between documents and after the last
TOKEN_LOSS = "mlm_loss"  # what perplexity is computed from


@dataclass
class ObjectiveConfig:
    """What is hidden, and how long the sequences are."""

    mask_prob: float = 0.15  # share of a sequence's tokens that are asked for
    short_prob: float = 0.1  # share of batches that have a random, shorter length

    def __post_init__(self):
        if not 0 < self.mask_prob < 1:
            raise ValueError(f"mask_prob {self.mask_prob} is not between 0 and 1")
        if not 0 <= self.short_prob <= 1:
            raise ValueError(f"short_prob {self.short_prob} is not between 0 and 1")


class Documents:
    """Where the documents of a stream of tokens lie; a single one is cut into several, since a
    segment B from elsewhere has to come from another one.

    starts, ends, sizes, total (n,) int64: document i is tokens[starts[i] : ends[i]], and total[i]
    is how many tokens documents 0 to i have together.
    """

    def __init__(self, edges, length: int):
        """edges (n + 1,): where the separators stand; length: of the pieces of a single one."""
        starts, ends = edges[:-1] + 1, edges[1:]
        starts, ends = starts[starts < ends], ends[starts < ends]  # none that is empty
        if len(starts) == 1:
            n = max((ends[0] - starts[0]) // length, 2)
            cuts = np.linspace(starts[0], ends[0], n + 1).astype(np.int64)
            starts, ends = cuts[:-1], cuts[1:]
        self.starts, self.ends, self.sizes = starts, ends, ends - starts
        self.total = np.cumsum(self.sizes)

    def locate(self, number):
        """number (n,) int64, of a token, separators not counted -> (document, place in stream)."""
        document = np.searchsorted(self.total, number, side="right")
        return document, self.ends[document] - (self.total[document] - number)

    def elsewhere(self, document, luck):
        """A token outside the document, all equally likely -> (its document, its place)."""
        size = self.sizes[document]
        number = (luck * (self.total[-1] - size)).astype(np.int64)
        return self.locate(np.where(number < self.total[document] - size, number, number + size))

    def around(self, document, token, length, luck):
        """Where a window of at most `length` around the token begins -> (begin, length)."""
        length = np.minimum(length, self.sizes[document])
        begin = token - (luck * length).astype(np.int64)
        return np.clip(begin, self.starts[document], self.ends[document] - length), length


@functools.lru_cache(4)
def documents_of(corpus, part: str, block_size: int) -> Documents:
    """The documents of corpus.train or corpus.validation."""
    return Documents(corpus.edges(part), 8 * block_size)


def rows_per_epoch(corpus, config: Config, objective: ObjectiveConfig) -> int:
    """How many sequences the training part fills. Raises ValueError where it is too short."""
    T = config.block_size
    texts = [int(documents_of(corpus, part, T).sizes.sum()) for part in ("train", "validation")]
    if min(texts) < T:
        raise ValueError(
            f"the text is too short: {texts[0]} tokens to train on and {texts[1]} to validate do "
            f"not fill sequences of {T}; give more text or a smaller --block_size"
        )
    return texts[0] // T


def text_room(config: Config, T: int) -> int:
    """How many of T tokens are text: all but [CLS] and the [SEP] behind each segment."""
    return T - (3 if config.nsp else 2)


def draw_segments(config: Config, documents, document, begin, length, foreign, generator):
    """Cut windows into A and B, each at least a fifth; where foreign (n,) is 1, B becomes a piece
    of another document. (The paper cuts between sentences, of which 128 tokens have about five.)

    -> where the segments begin in the stream, and their lengths: a, a_length, b, b_length (n,)
    int64. Without pairs the window is A, and b_length is -1.
    """
    if not config.nsp:
        return begin, length, begin, np.full(len(begin), -1)
    luck = generator.random((len(begin), 3))
    a_length = np.maximum(np.rint((0.2 + 0.6 * luck[:, 0]) * length), 1).astype(np.int64)
    b, b_length = begin + a_length, length - a_length
    elsewhere, token = documents.elsewhere(document, luck[:, 1])
    other, other_length = documents.around(elsewhere, token, b_length, luck[:, 2])
    return begin, a_length, np.where(foreign, other, b), np.where(foreign, other_length, b_length)


def lay_out(tokens, a, a_length, b, b_length, T: int, special: dict[str, int]):
    """Rows [CLS] A [SEP] B [SEP], then [PAD] up to T; b_length -1 lays the second [SEP] onto the
    first, and there is no B. tokens (N,), a, a_length, b, b_length (n,) int64

    -> idx, segments (n, T) int64, and (n, T) bool: where the text's own tokens are.
    """
    column = np.arange(T)  # (T,)
    a, a_length, b, b_length = (x[:, None] for x in (a, a_length, b, b_length))  # (n, 1)
    end_a = 1 + a_length  # where the first [SEP] stands
    end_b = end_a + 1 + b_length  # and the second
    in_a = (column > 0) & (column < end_a)
    in_b = (column > end_a) & (column < end_b)
    place = np.where(in_a, a + column - 1, b + column - end_a - 1)
    own = in_a | in_b
    idx = tokens[np.where(own, place, 0)].astype(np.int64)
    idx = np.where(own, idx, np.where(column > end_b, special["[PAD]"], special["[SEP]"]))
    idx[:, 0] = special["[CLS]"]
    return idx, ((column > end_a) & (column <= end_b)).astype(np.int64), own


def hide_tokens(idx, own, real, mask_prob: float, ordinary, mask_id: int, generator):
    """Choose tokens to ask for: mask_prob of a row's length, rounded, at least one.

    8 in 10 of them become [MASK], 1 in 10 a random one of `ordinary` (k,), 1 in 10 stays (A.1): a
    text in use has no [MASK] (3.1), and since any token may be asked for, the model keeps a guess
    for each.
    idx (n, T); own (n, T) bool: which may be chosen; real (n, T) bool: all but padding
    -> (what the model gets to see, targets), (n, T).
    """
    luck = generator.random((*idx.shape, 3))
    count = np.maximum(np.rint(mask_prob * real.sum(axis=1)), 1)  # (n,)
    order = np.where(own, luck[:, :, 0], 2.0).argsort(axis=1)  # the text's own tokens come first
    rank = order.argsort(axis=1)  # of each place in that order
    chosen = (rank < count[:, None]) & own
    fate = luck[:, :, 1]
    seen = np.where(fate < 0.8, mask_id, idx)
    replaced = ordinary[(luck[:, :, 2] * len(ordinary)).astype(np.int64)]
    seen = np.where(fate >= 0.9, replaced, seen)
    return np.where(chosen, seen, idx), np.where(chosen, idx, -100)


def make_batch(corpus, config, objective, tokens, cuts, foreign, T, generator) -> dict:
    """A batch, of cuts that `draw_segments` made: idx, segments, mlm_labels (n, T), with pairs
    nsp_labels (n,), and where something is padded, mask (n, T)."""
    special = corpus.tokenizer.special
    idx, segments, own = lay_out(tokens, *cuts, T, special)
    real = idx != special["[PAD]"]
    ordinary = np.flatnonzero(corpus.token_bytes)  # tokens that spell something
    seen, targets = hide_tokens(
        idx, own, real, objective.mask_prob, ordinary, special["[MASK]"], generator)
    arrays = dict(idx=seen, segments=segments, mlm_labels=targets)
    arrays |= {"nsp_labels": foreign} if config.nsp else {}
    arrays |= {} if real.all() else {"mask": real}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def train_batch(
    corpus, config: Config, objective: ObjectiveConfig, run: "TrainConfig", step: int
) -> dict:
    """A step's batch (see `make_batch`), which depends on (seed, step) alone.

    An epoch picks places block_size tokens apart, from a random offset and in random order, and
    lays a sequence around each, inside its document. Half of the pairs of a batch are neighbours.
    One batch in ten is of a random, shorter length, the same for all its rows, so nothing has to be
    padded but what a short document leaves empty. (The paper's code draws it for each example,
    `short_seq_prob`.)
    """
    from data import shuffled_rows

    rows, T, generator = run.rows, config.block_size, np.random.default_rng((run.seed, step))
    if generator.random() < objective.short_prob:
        T = int(generator.integers(8, T + 1))
    documents = documents_of(corpus, "train", config.block_size)
    n = rows_per_epoch(corpus, config, objective)
    row, luck = shuffled_rows(n, run.seed, step * rows, rows)
    document, token = documents.locate(((row + luck) / n * documents.total[-1]).astype(np.int64))
    begin, length = documents.around(document, token, text_room(config, T), generator.random(rows))
    foreign = (step * rows + np.arange(rows)) % 2
    cuts = draw_segments(config, documents, document, begin, length, foreign, generator)
    return make_batch(corpus, config, objective, corpus.train, cuts, foreign, T, generator)


def eval_batches(corpus, config: Config, objective: ObjectiveConfig, rows: int):
    """The whole validation part in windows, and with pairs each window twice, cut anew: with its
    own B, and with another. Masks and pairs are always the same, whatever the seed and the number
    of rows.
    """
    T = config.block_size
    documents, room = documents_of(corpus, "validation", T), text_room(config, T)
    windows = -(-documents.sizes // room)  # of each document, rounded up
    document = np.repeat(np.arange(len(windows)), windows)
    within = np.arange(len(document)) - (np.cumsum(windows) - windows)[document]
    length = np.minimum(documents.sizes[document], room)
    begin = np.minimum(  # a document's last window ends where the document ends
        documents.starts[document] + within * room, documents.ends[document] - length)
    if config.nsp:
        document, begin, length = (np.repeat(x, 2) for x in (document, begin, length))
    foreign = np.arange(len(begin)) % 2
    generator = np.random.default_rng(0)
    cuts = draw_segments(config, documents, document, begin, length, foreign, generator)
    for i in range(0, len(begin), rows):
        yield make_batch(
            corpus, config, objective, corpus.validation, [x[i : i + rows] for x in cuts],
            foreign[i : i + rows], T, generator,
        )


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
    """(sum of the losses, number of hidden tokens, metrics).

    Sums, so that parts of a batch can be added up. The caller divides by the number of hidden
    tokens, so each pair's loss is multiplied by its row's: where all rows have as many, that is the
    paper's mean over tokens + mean over pairs (`BERT.loss`), else nearly so. A metric is a pair of
    sums, a numerator and a denominator. In fine-tuning `labels` (B,) are asked for: their losses,
    the number of texts. There the truth is smoothed in training: 0.9 for the label and the rest for
    all alike, so that few examples make no model too sure of itself (Szegedy et al. 2016,
    https://arxiv.org/abs/1512.00567, 7).
    """
    if "labels" in batch:
        scores = model.classify(batch["idx"], batch["segments"], batch.get("mask"))
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        smoothing = 0.1 if model.training else 0.0
        loss = F.cross_entropy(
            scores, batch["labels"], reduction="sum", label_smoothing=smoothing)
        return loss, len(scores), {}
    targets = batch["mlm_labels"].flatten()  # (B * T,)
    at = (targets != -100).nonzero()[:, 0]  # (N,): the places that are asked for
    targets, number, metrics = targets[at], len(at), {}
    mlm_logits, nsp_logits = model(batch["idx"], batch["segments"], batch.get("mask"), at)
    loss = CrossEntropy.apply(mlm_logits, targets, torch.ones_like(targets))
    if not model.training:
        metrics["mlm_loss"] = loss, number
        metrics["mlm_accuracy"] = (mlm_logits.argmax(dim=-1) == targets).sum(), number
    if nsp_logits is not None:
        pair = F.cross_entropy(nsp_logits.float(), batch["nsp_labels"], reduction="none")  # (B,)
        loss = loss + (pair * (batch["mlm_labels"] != -100).sum(dim=1)).sum()
        right = nsp_logits.argmax(dim=-1) == batch["nsp_labels"]
        metrics["nsp_accuracy"] = right.sum(), len(right)
    return loss, number, metrics


def count_tokens(batch: dict) -> int:
    """How many tokens the model reads in a batch, padding left out."""
    return int(batch["mask"].sum()) if "mask" in batch else batch["idx"].numel()


def count_flops(model: Model, batch: dict) -> float:
    """Floating-point operations of a step: 6 for each multiplication of the forward pass, by a
    weight or in attention's two products: 2 forward (with its addition), 4 backward."""
    config, (B, T) = model.config, batch["idx"].shape
    C, asked = config.n_embd, int((batch["mlm_labels"] != -100).sum())
    attending = B * T * config.n_layer * (4 * C * C + 2 * T * C)
    feed_forward = (B * T * (config.n_layer - 1) + asked + B) * 2 * C * config.ff_width
    heads = asked * (C * C + C * config.vocab_size) + B * (C * C + 2 * C) * config.nsp
    return 6 * (attending + feed_forward + heads)


# --------------------------------------------------------------------------------------------------
# 6. Generation: fill what is hidden
# --------------------------------------------------------------------------------------------------


@dataclass
class GenerateConfig:
    """What to fill."""

    prompt: str = ""  # a text with [MASK] for hidden tokens; of a fine-tuned model, one to label
    prompt_b: str = ""  # the second text, for a model that was fine-tuned on pairs
    top_k: int = 5  # how many candidates, or labels, to show

    def __post_init__(self):
        at_least(self, 1, "top_k")


@torch.no_grad()
def guess(model: Model, idx, mask_id: int):
    """idx (T,) int64 -> the places of its masks (M,), probabilities of the tokens there (M, V)."""
    at = (idx == mask_id).nonzero()[:, 0]
    mlm_logits, _ = model(idx[None], at=at)
    return at, F.softmax(mlm_logits.float(), dim=-1)


def fill(model: Model, idx, mask_id: int):
    """Fill all masks of idx (T,), the surest first, so that each guess knows of those before it."""
    idx = idx.clone()
    while (idx == mask_id).any():
        at, probability = guess(model, idx, mask_id)
        best, token = probability.max(dim=-1)  # (M,)
        surest = best.argmax()
        idx[at[surest]] = token[surest]
    return idx


def encode_prompt(prompt: str, tokenizer, block_size: int) -> list[int]:
    """[CLS] prompt [SEP] as ids. Tokens begin with the space before a word, so a space in front of
    [MASK] belongs to what is hidden. Raises ValueError without a [MASK], or beyond block_size."""
    special = tokenizer.special
    parts = prompt.replace(" [MASK]", "[MASK]").split("[MASK]")
    if len(parts) == 1:
        raise ValueError('the prompt has no [MASK]: write one, as in "The cat sat on the [MASK]."')
    ids = [special["[CLS]"], *tokenizer.encode(parts[0])]
    for part in parts[1:]:
        ids += [special["[MASK]"], *tokenizer.encode(part)]
    ids.append(special["[SEP]"])
    if len(ids) > block_size:
        raise ValueError(f"the prompt has {len(ids)} tokens, at most {block_size} fit: shorten it")
    return ids


def write_samples(model: Model, checkpoint: dict, options: GenerateConfig) -> None:
    """What `generate` prints on standard output: a table of candidates, then the text filled; of a
    fine-tuned model, the likeliest labels of the prompt, or of each text that is typed."""
    from data import build, prompts

    tokenizer = checkpoint["tokenizer"]
    if checkpoint["task"]:
        task = build(Task, checkpoint["task"])
        for prompt in prompts(options.prompt):
            found = task.label(model, tokenizer, prompt, options.prompt_b)[: options.top_k]
            width = max(len(label) for label, _ in found)
            print("\n".join(f"{label:<{width}} {100 * share:5.1f} %" for label, share in found))
        return
    if options.prompt_b:
        raise ValueError("--prompt_b is for a model that was fine-tuned on pairs of texts")
    prompt = options.prompt or "The cat sat on the [MASK]."
    ids = encode_prompt(prompt, tokenizer, model.config.block_size)
    idx = torch.tensor(ids, device=next(model.parameters()).device)
    mask_id = tokenizer.special["[MASK]"]
    _, probability = guess(model, idx, mask_id)
    best, tokens = probability.topk(min(options.top_k, probability.size(1)))  # (M, k)
    columns = []  # one per mask: its heading, then words and probabilities
    for i, (row, share) in enumerate(zip(tokens.tolist(), best.tolist()), 1):
        words = [tokenizer.decode([token]) for token in row]
        words = [
            word.strip() if word.strip() and word.isprintable() else json.dumps(word)
            for word in words
        ]
        width = max(map(len, words))
        cells = [f"{word:<{width}} {100 * p:5.1f} %" for word, p in zip(words, share)]
        width = max(map(len, cells))
        columns.append([f"{f'[MASK] {i}' if len(best) > 1 else '[MASK]':<{width}}", *cells])
    print(*("   ".join(line).rstrip() for line in zip(*columns)), "", sep="\n")
    print(tokenizer.decode(fill(model, idx, mask_id)[1:-1].tolist()))


def demonstrate(model: Model, corpus, length: int) -> str:
    """A sample for the log: a text of the validation part in which some tokens were hidden, with
    the guesses in brackets: [right], or [wrong/what stood there]."""
    tokenizer, documents = corpus.tokenizer, documents_of(
        corpus, "validation", model.config.block_size)
    begin, special = documents.starts[0], tokenizer.special
    length = min(length, model.config.block_size - 2, int(documents.sizes[0]))
    text = corpus.validation[begin : begin + length].tolist()
    idx = torch.tensor([special["[CLS]"], *text, special["[SEP]"]])
    idx[torch.randperm(length)[: max(round(0.15 * length), 1)] + 1] = special["[MASK]"]
    at, probability = guess(model, idx.to(next(model.parameters()).device), special["[MASK]"])
    spelled = [tokenizer.decode_bytes([token]) for token in text]
    for place, token in zip((at - 1).tolist(), probability.argmax(dim=-1).tolist()):
        truth, guessed = spelled[place], tokenizer.decode_bytes([token])
        space = truth[: len(truth) - len(truth.lstrip())]
        wrong = b"" if guessed == truth else guessed.strip() + b"/"
        spelled[place] = space + b"[" + wrong + truth.strip() + b"]"
    return b"".join(spelled).decode("utf-8", "replace")


# --------------------------------------------------------------------------------------------------
# 7. Published weights: BERT's names for ours
# --------------------------------------------------------------------------------------------------

# No weights; and one of pooler and pair head where the file lacks the other.
PASSED_OVER = r"bert\.embeddings\.position_ids|(bert\.pooler|cls\.seq_relationship)\..*"
ROLES = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]")
TEMPLATE = ["[CLS]", "A", "[SEP]", "B", "[SEP]"]  # what stands around a text, or a pair


def published_name(name: str) -> str:
    """The name of a tensor in a file of weights -> the one that `published_weights` has for it."""
    name = name.replace("LayerNorm.gamma", "LayerNorm.weight")  # TensorFlow's names, in old files
    name = name.replace("LayerNorm.beta", "LayerNorm.bias")
    return name if name.startswith(("bert.", "cls.", "classifier.")) else f"bert.{name}"


def published_weights(model: Model) -> dict:
    """Published name -> our weight, in the published shape: query, key, value are apart there."""
    layers = {
        "bert.embeddings.LayerNorm": model.norm,
        "cls.predictions.transform.dense": model.transform,
        "cls.predictions.transform.LayerNorm": model.transform_norm,
        "cls.predictions.decoder": model.head,
    }
    layers |= {"bert.pooler.dense": model.pooler} if hasattr(model, "pooler") else {}
    layers |= {"cls.seq_relationship": model.pair_head} if model.config.nsp else {}
    layers |= {"classifier": model.label_head} if model.config.n_labels else {}
    named = {
        "bert.embeddings.word_embeddings.weight": model.token_embedding.weight,
        "bert.embeddings.position_embeddings.weight": model.position_embedding.weight,
        "bert.embeddings.token_type_embeddings.weight": model.segment_embedding.weight,
        "cls.predictions.bias": model.head.bias,
    }
    for i, block in enumerate(model.blocks):
        at = f"bert.encoder.layer.{i}."
        layers |= {
            at + "attention.output.dense": block.attn.proj,
            at + "attention.output.LayerNorm": block.attn_norm,
            at + "intermediate.dense": block.mlp.up, at + "output.dense": block.mlp.down,
            at + "output.LayerNorm": block.mlp_norm,
        }
        for kind in "weight", "bias":
            parts = getattr(block.attn.qkv, kind).chunk(3)
            for name, part in zip(("query", "key", "value"), parts):
                named[f"{at}attention.self.{name}.{kind}"] = part
    for name, layer in layers.items():
        named |= {f"{name}.weight": layer.weight, f"{name}.bias": layer.bias}
    return named


def to_published(config: Config) -> dict:
    """Our settings as `config.json` has them. Raises ValueError where BERT has no such variant."""
    if (config.pos, config.norm) != ("learned", "post"):
        raise ValueError(
            "BERT has learned positions and post-norm: transformers has no class for this variant")
    kind = "PreTraining" if config.nsp else "MaskedLM"
    return dict(
        architectures=[f"BertFor{'SequenceClassification' if config.n_labels else kind}"],
        model_type="bert", vocab_size=config.vocab_size, hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer, num_attention_heads=config.n_head,
        intermediate_size=config.ff_width, hidden_act="gelu",
        hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=config.block_size, type_vocab_size=config.n_segments,
        layer_norm_eps=1e-12, pad_token_id=0, tie_word_embeddings=True,
    )


def from_published(found: dict, names: set[str]) -> Config:
    """What `config.json` says, and the names of the weights -> our settings."""
    if found.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {found['hidden_act']} instead of gelu")
    return Config(
        found["vocab_size"], found["max_position_embeddings"], found["num_hidden_layers"],
        found["num_attention_heads"], found["hidden_size"], n_ff=found["intermediate_size"],
        dropout=found.get("hidden_dropout_prob", 0.1), n_segments=found.get("type_vocab_size", 2),
        nsp="cls.seq_relationship.weight" in names and "bert.pooler.dense.weight" in names,
        n_labels=len(found.get("id2label", "")) if "classifier.weight" in names else 0,
    )


# --------------------------------------------------------------------------------------------------
# 8. Fine-tuning: label a text
# --------------------------------------------------------------------------------------------------

FINETUNING = {  # settings that go with a model's size: "published" for those 512 wide and more
    "laptop": dict(
        epochs=30.0, batch_size=32, optimizer="muon", lr=0.003, matrix_lr=0.01, weight_decay=0.1,
        eval_interval=150,
    ),
    "published": dict(
        epochs=3.0, batch_size=16, optimizer="adamw", lr=3e-5, warmup_steps=50, weight_decay=0.01,
        eval_interval=0, mask_prob=0.0, head_std=0.02,
    ),
}


@dataclass
class Task:
    """Label a text, or a pair of texts: what [CLS] has gathered goes to a new head, which has a
    score for each label (Devlin, 4.1). All weights learn, not the head's alone."""

    mask_prob: float = 0.1  # share of a text's tokens that become [MASK] in training
    head_std: float = 1.0  # std of the new head's first weights: see `prepare`
    labels: list = field(default_factory=list, metadata=dict(flag=False))  # of the examples

    columns, optional = ("text", "label"), ("text_b",)

    def __post_init__(self):
        at_least(self, 0, "mask_prob", "head_std")
        if self.mask_prob > 1:
            raise ValueError(f"mask_prob {self.mask_prob} is not between 0 and 1")
        if not all(type(label) is str for label in self.labels):
            raise ValueError("labels have to be texts")

    @staticmethod
    def demonstration(story: dict) -> dict:
        """A story without its header -> its topic, one of eight."""
        return dict(text=story["text"], label=story["topic"])

    def fit(self, config: Config, parts: dict) -> Config:
        """The architecture with a head for the labels, which are those that the examples have."""
        from data import say

        learned, asked = ({row["label"] for row in parts[part]} for part in ("train", "validation"))
        self.labels = self.labels or sorted(learned | asked)
        if len(self.labels) < 2:
            raise ValueError(f"all examples have the label {self.labels[0]!r}: it takes two")
        if asked - learned:
            say(f"only in the held-out examples, so nobody can learn it: {sorted(asked - learned)}")
        if config.n_segments < 2 and "text_b" in parts["train"][0]:
            raise ValueError("pairs of texts take a model with n_segments 2")
        return replace(config, n_labels=len(self.labels))

    def encode(self, row: dict, tokenizer, config: Config) -> dict:
        """A row as the tokens of its texts (one or two lists) and the number of its label."""
        if row["label"] not in self.labels:
            raise ValueError(f"{row['place']}: the label {row['label']!r} is none of "
                             f"{', '.join(self.labels)}")
        texts = [tokenizer.encode(row[name]) for name in ("text", "text_b") if name in row]
        rooms = self.rooms(texts, config.block_size)
        return dict(
            texts=texts, rooms=rooms, label=self.labels.index(row["label"]),
            length=1 + sum(rooms) + len(rooms), cropped=rooms != list(map(len, texts)))

    @staticmethod
    def rooms(texts: list[list[int]], block_size: int) -> list[int]:
        """How many tokens of each text are taken: all, or as many as fit beside [CLS] and a [SEP]
        behind each. Of two texts the longer gives way."""
        room = block_size - 1 - len(texts)
        lengths = [min(len(text), room) for text in texts]
        if sum(lengths) > room:
            short = min(*lengths, room // 2)
            lengths = [short, room - short] if lengths[0] < lengths[1] else [room - short, short]
        return lengths

    def collate(self, examples: list[dict], tokenizer, generator=None) -> dict:
        """-> a batch: idx, segments (B, T), labels (B,) int64, and mask (B, T) bool if rows differ.

        A text that does not fit is cropped: to its beginning, or for training, with a generator, to
        a window at random, so that in time all of it is learned from. Then mask_prob of its tokens
        become [MASK], too: no single word can be relied on.
        """
        from data import pad

        start, stop, mask_id, padding = (
            tokenizer.special[name] for name in ("[CLS]", "[SEP]", "[MASK]", "[PAD]"))
        idx, segments = [], []
        for example in examples:
            row = [start]
            for text, room in zip(example["texts"], example["rooms"]):
                begin = generator.integers(len(text) - room + 1) if generator else 0
                window = np.array(text[begin : begin + room], np.int64)
                if generator:
                    window[generator.random(room) < self.mask_prob] = mask_id
                row += [*window.tolist(), stop]
            idx.append(row)
            segments.append([0] * (example["rooms"][0] + 2) + [1] * (
                len(row) - example["rooms"][0] - 2))
        real = pad([[1] * len(row) for row in idx], 0) == 1
        arrays = dict(idx=pad(idx, padding), segments=pad(segments, 0))
        arrays["labels"] = np.array([example["label"] for example in examples])
        arrays |= {} if real.all() else {"mask": real}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def score(self, model: Model, examples, groups) -> tuple[dict, str]:
        """Accuracy, and the mean of the labels' F1 (macro F1), so that rare labels count as much as
        frequent ones; the confusion matrix as a table."""
        n, device = len(self.labels), next(model.parameters()).device
        confusion = np.zeros((n, n), np.int64)  # [truth, guess]
        for group in groups:
            batch = {k: v.to(device) for k, v in examples.batch(group).items()}
            with torch.no_grad():
                scores = model.classify(batch["idx"], batch["segments"], batch.get("mask"))
            truth, guess = batch["labels"].tolist(), scores.argmax(dim=-1).tolist()
            np.add.at(confusion, (truth, guess), 1)
        return self.measures(confusion), self.table(confusion)

    @staticmethod
    def measures(confusion) -> dict[str, float]:
        """accuracy and macro_f1 from counts [truth, guess], (n, n) int64. A label's F1 is the
        harmonic mean of precision and recall, 2 right / (times it is true + times it is guessed);
        one that is neither has none."""
        right, either = confusion.diagonal(), confusion.sum(axis=0) + confusion.sum(axis=1)
        f1 = 2 * right[either > 0] / either[either > 0]
        return dict(accuracy=right.sum() / confusion.sum(), macro_f1=f1.mean())

    def table(self, confusion) -> str:
        """A line for each label that texts have, a column for each that was guessed."""
        width = max(map(len, (*self.labels, "guessed:", str(confusion.max())))) + 1
        rows = [["guessed:", *self.labels], *([label, *counts] for label, counts in zip(
            self.labels, confusion.tolist()))]
        return "\n".join("".join(f"{cell or '.':>{width}}" for cell in row) for row in rows)

    def prepare(self, model: Model, n: int) -> list:
        """Begin the new head; returns what is not to change: with --freeze n the embeddings and the
        lowest n blocks, and always the heads of pretraining, which nothing asks any more.

        A small model's [CLS] knows little of what a text is about, and a head that begins near zero
        asks it for nothing: it takes 300 steps before anything is learned. Scores that are large
        from the start, if at random, have to be put right by the layers below, at once.
        """
        nn.init.normal_(model.label_head.weight, std=self.head_std)
        if n > len(model.blocks):
            raise ValueError(f"--freeze {n}: the model has {len(model.blocks)} layers")
        idle = [model.transform, model.transform_norm, model.head.bias]
        idle += [model.pair_head] if model.config.nsp else []
        embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
        return idle + ([*embeddings, *model.blocks[:n]] if n else [])

    def label(self, model: Model, tokenizer, text: str, text_b="") -> list[tuple[str, float]]:
        """The labels with their probabilities, the likeliest first."""
        # (Any label: `encode` asks for one.)
        row = dict(text=text, label=self.labels[0]) | ({"text_b": text_b} if text_b else {})
        from data import say

        example = self.encode(row, tokenizer, model.config)
        if example["cropped"]:
            say(f"the text is long: its first {example['length']} tokens are read")
        batch = self.collate([example], tokenizer)
        idx, segments = (batch[name].to(next(model.parameters()).device) for name in (
            "idx", "segments"))
        with torch.no_grad():
            probability = F.softmax(model.classify(idx, segments).float(), dim=-1)[0].tolist()
        return sorted(zip(self.labels, probability), key=lambda pair: -pair[1])

    def demonstrate(self, model: Model, examples, length: int) -> str:
        """Some held-out texts, what the model takes them for, and what they are."""
        lines = []
        for row in examples.rows[:3]:
            best, share = self.label(
                model, examples.tokenizer, row["text"], row.get("text_b", ""))[0]
            text = " ".join(row["text"].split())
            text = text if len(text) < length else text[:length].rpartition(" ")[0] + " ..."
            truth = "right" if best == row["label"] else f"it is {row['label']}"
            lines.append(f"{text}\n    -> {best} ({share:.0%}; {truth})")
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
