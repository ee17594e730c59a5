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
position by itself), and normalize after each. On top stand small heads: for tokens, pairs, labels.

    python bert.py                                  train on input.txt: a few minutes on a laptop
    python bert.py generate --prompt "The cat sat on the [MASK]."     fill what is hidden
    python bert.py eval                             how many hidden tokens and pairs it gets right
    python bert.py finetune                         learn to tell what a story is about
    python bert.py generate --init_from bert-base-uncased    the published weights (or a folder)
    python bert.py --help                           every command and flag

The lesson of this file is how to leave the plateau, where the loss of a BERT may stay for
thousands of steps: see `BERT.init_attention`. It reads from top to bottom: 1 this page, 2 the
configuration, 3 layers, 4 the model, 5 pretraining, 6 fine-tuning, 7 published weights, 9 training
(8 is GPT's alone). Copied alone, it gives `BERT` and `BERTConfig`; its commands need bpe.py and
data.py beside it. To learn, change: `--pos rotary`, `--nsp false`; skip `init_attention`.

Papers: Devlin et al. 2019, https://arxiv.org/abs/1810.04805; Vaswani et al. 2017 (attention).
"""

import json
import math
import os
import re
import sys
import textwrap
from dataclasses import dataclass, field, fields, replace
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
class BERTConfig:
    """The architecture. Defaults are BERT's, but for dropout (there 0.1); the rest is variants.
    Raises ValueError for sizes that do not fit together."""

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
        check(self, vocab_size=1, block_size=8, n_layer=1, n_head=1, n_embd=1, n_ff=1,
              dropout=(0, 1), n_segments=1, n_labels=0)
        if self.n_embd % self.n_head:
            raise ValueError(f"change n_embd {self.n_embd}: no multiple of n_head {self.n_head}")
        width = self.n_embd // self.n_head
        if self.pos == "rotary" and width % 2:
            raise ValueError(f"rotary positions turn pairs: n_embd / n_head, here {width}, is odd")
        if self.nsp and self.n_segments < 2:
            raise ValueError("next-sentence prediction takes n_segments 2, or set --nsp false")


Config, NAME = BERTConfig, "bert"  # so named, what the files have in common is the same text

PRESETS = {  # sizes, and what goes with them in training; the first is the default
    "laptop": dict(vocab_size=1024, block_size=128, n_layer=2, n_head=6, n_embd=192,
                   max_steps=1900, batch_size=32, log_interval=50, eval_interval=475,
                   weight_decay=0.02, mask_most=0.5, nsp_late=0.2),
    "t4": dict(vocab_size=8192, block_size=256, n_layer=8, n_head=8, n_embd=512,  # for that GPU
               max_steps=10000, batch_size=64, log_interval=50, eval_interval=500),
    "bert-base": dict(vocab_size=30528, block_size=512, n_layer=12, n_head=12, n_embd=768),
    "bert-large": dict(vocab_size=30528, block_size=512, n_layer=24, n_head=16, n_embd=1024),
}
ADAMW = dict(lr=0.001, warmup_steps=100)  # what --optimizer adamw takes, for all weights
FINETUNING = {
    "laptop": dict(epochs=30.0, batch_size=32, matrix_lr=0.01, weight_decay=0.1),
    "published": dict(epochs=3.0, batch_size=16, optimizer="adamw", lr=3e-5, warmup_steps=50,
                      weight_decay=0.01),  # for models 512 wide and more
    "": dict(mask_prob=0.1, label_smoothing=0.1, eval_interval=150),  # without --data
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
        self.qkv.weight.maps = 3  # Muon (9) takes them as 3 matrices
        self.proj = nn.Linear(config.n_embd, config.n_embd)
        hd = config.n_embd // config.n_head
        turns = sinusoids(config.block_size, hd) if config.pos == "rotary" else None
        self.register_buffer("turns", turns, persistent=False)  # (block_size, hd)

    def forward(self, x, bias=None):
        """x (B, T, C), bias (B, 1, 1, T) -> (B, T, C)."""
        query, key, value = (
            part.unflatten(-1, (self.n_head, -1)).transpose(1, 2)  # (B, nh, T, hd)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        if self.turns is not None:
            turns = self.turns[: x.size(1)]
            query, key = rotate(query, turns), rotate(key, turns)  # (B, nh, T, hd)
        bias = None if bias is None else bias.to(query.dtype)
        mixed = attention(query, key, value, bias, dropout=self.dropout * self.training)  # no mask
        mixed = self.proj(mixed.transpose(1, 2).flatten(2))  # (B, T, C)
        return drop(mixed, self.dropout * self.training)


class FeedForward(nn.Module):
    """Two linear layers and a non-linearity, the same everywhere: C -> n_ff -> C (Vaswani, 3.3)."""

    def __init__(self, config: Config):
        super().__init__()
        self.dropout, width = config.dropout, config.n_ff or 4 * config.n_embd
        self.up = nn.Linear(config.n_embd, width)
        self.down = nn.Linear(width, config.n_embd)

    def forward(self, x):
        """x (B, T, C) -> (B, T, C)."""
        inner = F.gelu(self.up(x))  # (B, T, n_ff); exact, by erf (GPT-2's is approximated)
        return drop(self.down(inner), self.dropout * self.training)  # (B, T, C)


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

    def forward(self, x, bias=None, at=None):
        """x (B, T, C) -> (B, T, C), or with `at` (N,), places b * T + t, the results there (N, C):
        the feed-forward looks at each position alone, so it can leave out those not asked for."""
        x = self.add(x, lambda h: self.attn(h, bias), self.attn_norm)
        x = x if at is None else x.flatten(0, 1).index_select(0, at)
        return self.add(x, self.mlp, self.mlp_norm)


# 4. The model -------------------------------------------------------------------------------------


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
        # Post-norm normalizes the sum of the embeddings, pre-norm what comes out of the last block.
        self.embedding_norm = make_norm(config) if config.norm == "post" else nn.Identity()
        self.norm = make_norm(config) if config.norm == "pre" else nn.Identity()
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        # For hidden tokens: head(norm(gelu(transform(x)))), as in BERT's code.
        self.transform = nn.Linear(config.n_embd, config.n_embd)
        self.transform_norm = make_norm(config)
        self.head = nn.Linear(config.n_embd, config.vocab_size)
        self.register_buffer("never", torch.zeros(0, dtype=torch.long), persistent=False)  # `guess`
        if config.nsp or config.n_labels:
            self.pooler = nn.Linear(config.n_embd, config.n_embd)  # for the whole text
        if config.nsp:
            self.pair_head = nn.Linear(config.n_embd, 2)
        if config.n_labels:
            self.label_head = nn.Linear(config.n_embd, config.n_labels)
        self.apply(self.init_weights)
        self.init_attention()
        self.head.weight = self.token_embedding.weight
        for name, layer in self.named_children() if config.n_embd < 512 else ():
            # A head near zero asks a small model's [CLS] for nothing, for thousands of steps: these
            # scores have to be put right by the layers below. Till these can, it must not shrink.
            if name in ("pooler", "pair_head", "label_head"):
                nn.init.normal_(layer.weight, std=config.n_embd**-0.5 if name == "pooler" else 0.1)
                layer.weight.lr_factor = 1.0 if config.n_labels else 0.1  # of its learning rate

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
        steps further means that pair i of the numbers turns by the angle d / base^(2i / C)
        (Vaswani, 3.5). So a head's map for queries W_q, its pairs of columns turned by the same
        angles, is a map for keys W_k with W_k p(t + d) = W_q p(t): the query at t fits the key at
        t + d. In the first block, the heads begin with d = -1, 1, -2, 2, ...; deeper blocks with an
        even view. Sublayers begin with an output of zero, so that positions reach each block."""
        C, base = self.config.n_embd, self.config.block_size
        hd = C // self.config.n_head
        for block in self.blocks:
            nn.init.zeros_(block.attn.proj.weight)
            nn.init.zeros_(block.mlp.down.weight)
        if self.config.pos == "learned":
            self.position_embedding.weight.copy_(self.first_positions())
        query, key, _ = self.blocks[0].attn.qkv.weight.chunk(3)  # (C, C) each
        # A score sums C * hd products, and is divided by sqrt(hd): about 7 where query and key fit
        # (5 or 6 with tokens mixed in: half of the weight lies within two tokens of t + d).
        nn.init.normal_(query, std=(7 / C / hd**0.5) ** 0.5)
        head = torch.arange(self.config.n_head).repeat_interleave(hd)  # (C,)
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

        segments (B, T) int64: 0 in segment A, 1 in B; without it all are 0. mask (B, T) bool: False
        for padding, which no token attends to. Raises ValueError where T exceeds block_size."""
        config, T = self.config, idx.size(1)
        if T > config.block_size:
            raise ValueError(f"{T} tokens are more than block_size {config.block_size}")
        x = self.token_embedding(idx)  # (B, T, C)
        if config.pos == "learned":
            x = x + self.position_embedding.weight[:T]  # + (T, C)
        elif config.pos == "sinusoidal":
            x = x + self.positions[:T]
        x = x + self.segment_embedding(torch.zeros_like(idx) if segments is None else segments)
        x = drop(self.embedding_norm(x), config.dropout * self.training)
        bias = None if mask is None else padding_bias(mask)  # (B, 1, 1, T), hides the padding
        for block in self.blocks[:-1]:
            x = block(x, bias)
        return self.norm(self.blocks[-1](x, bias, at))

    def forward(self, idx, segments=None, mask=None, at=None):
        """idx (B, T) int64 -> mlm_logits (B, T, V), nsp_logits (B, 2), or None without that head.

        at (N,) int64: the places b * T + t whose logits are asked for; mlm_logits are (N, V) then.
        nsp_logits: "B continues A", "B is from elsewhere". segments, mask: see `encode`."""
        first = torch.arange(len(idx), device=idx.device) * idx.size(1)  # (B,): [CLS]'s places
        if at is None:
            hidden = self.encode(idx, segments, mask)  # (B, T, C)
            whole = hidden.flatten(0, 1)[first]  # (B, C): the state of [CLS]
        else:
            hidden = self.encode(idx, segments, mask, torch.cat((at, first)))
            hidden, whole = hidden.split((len(at), len(first)))  # (N, C), (B, C)
        mlm_logits = self.head(self.transform_norm(F.gelu(self.transform(hidden))))
        if not self.config.nsp:
            return mlm_logits, None
        return mlm_logits, self.pair_head(torch.tanh(self.pooler(whole)))

    def classify(self, idx, segments=None, mask=None):
        """idx (B, T) int64, each row [CLS] text [SEP] -> scores of the labels (B, n_labels).
        Arguments: see `encode`. Raises ValueError for a model without such a head."""
        if not self.config.n_labels:
            raise ValueError("this model has no head for labels: set n_labels")
        first = torch.arange(len(idx), device=idx.device) * idx.size(1)  # (B,): [CLS]'s places
        whole = torch.tanh(self.pooler(self.encode(idx, segments, mask, first)))  # (B, C)
        return self.label_head(drop(whole, self.config.dropout * self.training))

    def loss(self, idx, segments, mask, mlm_labels, nsp_labels=None):
        """The paper's loss (A.2), mean over hidden tokens + mean over pairs. mlm_labels (B, T): the
        token that was there, -100 where nothing is asked. nsp_labels (B,): 0 if B continues A."""
        return self.losses(idx, segments, mlm_labels, mask, nsp_labels)[0].sum()

    def losses(self, idx, segments, mlm_labels, mask=None, nsp_labels=None, places=None, weights=1):
        """-> the two means of `loss` (2,), or the first (1,); mlm_logits (N, V), targets (N,),
        nsp_logits (B, 2). The head is computed for the N tokens that are asked for alone: at their
        places (B, M) in each row, where unused 0, which is [CLS]. weights (B,): of the pairs."""
        if places is None:
            at = (mlm_labels.flatten() != -100).nonzero()[:, 0]  # (N,)
        else:
            begin = torch.arange(len(idx), device=idx.device)[:, None] * idx.size(1)
            at = (begin + places).flatten()
        mlm_logits, nsp_logits = self(idx, segments, mask, at)
        targets = mlm_labels.flatten()[at]  # (N,)
        means = [F.cross_entropy(mlm_logits.float(), targets)]
        if nsp_labels is not None and nsp_logits is not None:
            per_pair = F.cross_entropy(nsp_logits.float(), nsp_labels, reduction="none")  # (B,)
            means.append((weights * per_pair).mean())
        return torch.stack(means), mlm_logits, targets, nsp_logits

    @torch.no_grad()
    def guess(self, idx, mask_id: int):
        """idx (T,) int64 -> the places of its masks (M,), probabilities of the tokens there (M, V):
        0 for ids in `never`, which are no text."""
        at = (idx == mask_id).nonzero()[:, 0]  # (M,)
        logits = self(idx[None], at=at)[0].float().index_fill(1, self.never, -math.inf)
        return at, F.softmax(logits, dim=-1)

    def fill(self, idx, mask_id: int):
        """Fill all masks of idx (T,), the surest first: each guess knows of those before it."""
        idx = idx.clone()
        for _ in range(int((idx == mask_id).sum())):
            at, probability = self.guess(idx, mask_id)
            best, token = probability.max(dim=-1)  # (M,)
            idx[at[best.argmax()]] = token[best.argmax()]  # the surest one
        return idx


Model = BERT

# 5. Pretraining: say which tokens were hidden, and whether B continues A --------------------------

SPECIAL_TOKENS = ["[PAD]", "[CLS]", "[SEP]", "[MASK]"]
SEPARATOR = "[SEP]"  # before the first document, between documents and after the last


@dataclass
class GenerateConfig:
    """What to fill."""

    prompt: str = ""  # a text with [MASK] for hidden tokens; of a fine-tuned model, one to label
    prompt_b: str = ""  # the second text, for a model that was fine-tuned on pairs
    top_k: int = 5  # how many candidates, or labels, to show

    def __post_init__(self):
        check(self, top_k=1)


@dataclass
class Pretraining:
    """What to learn from: pairs of segments with hidden tokens. (Section 9 says what it needs.)
    More hidden tokens help (Wettig et al. 2023, https://arxiv.org/abs/2202.08005), once pairs are
    learned, for they hide what A and B share. Later the pairs' gradient is mostly noise."""

    mask_prob: float = 0.15  # share of a sequence's tokens that are asked for
    mask_most: float = 0.0  # the same at a quarter of the steps, if it is more; then it falls
    short_prob: float = 0.1  # share of batches that have a random, shorter length
    nsp_late: float = 1.0  # weight of the pairs' loss in the last two fifths of the steps

    def __post_init__(self):
        check(self, mask_prob=(0.001, 0.999), mask_most=(0, 0.999), short_prob=(0, 1), nsp_late=0)

    def open(self, run, config: Config, tokenizer, corpus=None) -> Config:
        """Remember what prompts depend on; to train or evaluate, take a text, see data.Corpus
        -> the architecture for it. Raises ValueError where it does not fill a sequence.

        documents[part] (n, 2): where each begins and ends in the part. A single one is cut into
        several: a foreign B has to come from another. windows[part] (n,): the windows that they
        have, at most `room` tokens each, up to the end of each document."""
        from data import Batches

        self.run, self.T, self.nsp, self.tokenizer = run, config.block_size, config.nsp, tokenizer
        self.special, self.ordinary = tokenizer.special, np.array(sorted(tokenizer.spelling))
        if corpus is None:
            return config
        self.corpus, self.description, self.documents, self.windows = corpus, str(corpus), {}, {}
        self.room = self.T - 2 - self.nsp  # beside [CLS] and each [SEP]
        for part in "train", "validation":
            edges = corpus.edges(part)
            spans = np.stack((edges[:-1] + 1, edges[1:]), axis=1)
            spans = spans[spans[:, 0] < spans[:, 1]]
            if len(spans) == 1:
                n = max((spans[0, 1] - spans[0, 0]) // (8 * self.T), 2)
                cuts = np.linspace(*spans[0], n + 1).astype(np.int64)
                spans = np.stack((cuts[:-1], cuts[1:]), axis=1)
            self.documents[part], sizes = spans, np.diff(spans)[:, 0]
            self.windows[part] = (-(-sizes // self.room)).cumsum()  # rounded up
            if sizes.sum() < self.T:
                raise ValueError(f"{corpus}: too short; give more text or a smaller --block_size")
        document = self.document("train", np.arange(self.windows["train"][-1]))
        self.order = Batches(np.diff(self.documents["train"])[document, 0].clip(max=self.room))
        self.rows = len(document)
        return config

    def document(self, part: str, number):
        """The numbers of windows -> the numbers of their documents."""
        return np.searchsorted(self.windows[part], number, side="right")

    def window(self, part: str, number: int, room: int, draw=None):
        """At most `room` tokens, (n,) int64. A document's windows are evenly spread over it: or
        with a generator `draw` each has a share of it, and a random place there."""
        document = self.document(part, number)
        begin, end = self.documents[part][document]
        count, n = -(-(end - begin) // self.room), min(room, end - begin)
        i = count - (self.windows[part][document] - number)  # its number in the document
        share = (i + draw.random()) / count if draw else i / max(count - 1, 1)
        begin += int(share * (end - begin - n + (draw is not None)))
        return getattr(self.corpus, part)[begin : begin + n].astype(np.int64)

    def pair(self, first, second, draw) -> tuple:
        """[CLS] A [SEP] B [SEP] as ids and segments. A is the first fifth to four fifths of a
        window, B the rest of it, or of a second: cut with the same share, so that B alone, its
        length or its place in a document, does not tell which (in the paper: whole sentences)."""
        cls, sep = [self.special["[CLS]"]], [self.special["[SEP]"]]
        if not self.nsp:
            return np.concatenate((cls, first, sep)), np.zeros(len(first) + 2, np.int64)
        share = draw.uniform(0.2, 0.8)
        n, m = (max(min(round(share * len(x)), len(x) - 1), 1) for x in (first, second))
        a, b = first[:n], second[m:][: self.room - n]
        segments = np.repeat((0, 1), (n + 2, len(b) + 1))
        return np.concatenate((cls, a, sep, b, sep)), segments

    @staticmethod
    def foreign(document, i: int, begin: int) -> int:
        """Of rows with these documents, (n,), the first behind row i + begin, around the end, that
        is of another document than row i; or i."""
        behind = ((i + begin + j) % len(document) for j in range(len(document)))
        return next((j for j in behind if document[j] != document[i]), i)

    def hide(self, ids, share: float, draw) -> tuple:
        """Choose tokens to ask for: a share of a row's length, rounded, at least one. 8 in 10 of
        them become [MASK], 1 in 10 a random one, 1 in 10 stays (A.1): a text in use has no [MASK]
        (3.1). ids (n, T) int64 -> (what the model gets to see, targets), (n, T), places (n, M)."""
        which, fate, new = np.moveaxis(draw.random((len(ids), self.T, 3))[:, : ids.shape[1]], 2, 0)
        own = ~np.isin(ids, [*self.special.values()])
        count = np.maximum(np.rint(share * (ids != self.special["[PAD]"]).sum(axis=1)), 1)
        order = np.where(own, which, 2.0).argsort(axis=1)[:, : int(count.max())]  # its own first
        places = np.where(np.arange(order.shape[1]) < count[:, None], order, 0)  # (n, M)
        chosen = np.zeros_like(own)
        np.put_along_axis(chosen, places, True, axis=1)
        chosen &= own  # (not the unused places)
        random = self.ordinary[(new * len(self.ordinary)).astype(np.int64)]
        seen = np.where(fate < 0.8, self.special["[MASK]"], np.where(fate < 0.9, ids, random))
        return np.where(chosen, seen, ids), np.where(chosen, ids, -100), places

    def make(self, pairs: list[tuple], foreign, share: float, draw, weight: float = 1.0) -> dict:
        """A batch: idx, segments, mlm_labels (n, T) int64, places (n, M); with pairs nsp_labels and
        weights (n,) int64, float32; where something is padded, mask (n, T) bool."""
        from data import pad

        ids, segments = (pad(rows, fill).numpy() for rows, fill in zip(
            zip(*pairs), (self.special["[PAD]"], 0)))
        (seen, targets, places), real = self.hide(ids, share, draw), ids != self.special["[PAD]"]
        arrays = dict(idx=seen, segments=segments, mlm_labels=targets, places=places)
        if self.nsp:
            arrays |= dict(nsp_labels=np.int64(foreign), weights=np.float32([weight] * len(ids)))
        arrays |= {} if real.all() else {"mask": real}
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def batch(self, step: int) -> dict:
        """A step's batch (see `make`), which depends on (seed, step) alone. An epoch takes each
        window once. Every second row gets the B of the next such row of another document."""
        draw = np.random.default_rng((self.run.seed, step))
        short = draw.random() < self.short_prob
        room = int(draw.integers(8 - 2 - self.nsp, self.room + 1)) if short else self.room
        numbers, _ = self.order.chosen(self.run, step)
        windows = [self.window("train", number, room, draw) for number in numbers]
        own, document = np.arange(len(numbers)), self.document("train", numbers)
        partner, second = own.copy(), own[(step * len(own) + own) % 2 == 1]
        for i, row in enumerate(second):
            partner[row] = second[self.foreign(document[second], i, 1)]
        pairs = [self.pair(windows[i], windows[j], draw) for i, j in zip(own, partner)]
        done, low = step / self.run.max_steps, self.mask_prob
        share = np.interp(done, (0.25, 1), (max(self.mask_most, low), low)) if done >= 0.25 else low
        return self.make(pairs, partner != own, share, draw, self.nsp_late if done >= 0.6 else 1.0)

    def eval_batches(self, rows: int, most: int | None = None):
        """Yield the validation part in windows, and with pairs each window twice, cut anew: with
        its own B, and with that of the window half of the part further on; masks and pairs are
        always the same. most: of a large part, about so many tokens, evenly spread over it."""
        from data import spread

        n, copies = int(self.windows["validation"][-1]), 1 + self.nsp
        document = self.document("validation", np.arange(n))
        order = np.diff(self.documents["validation"])[document, 0].argsort(kind="stable")
        cuts, masks = np.random.default_rng(0), np.random.default_rng(1)
        for chosen in spread(n, max(rows // copies, 1), most and most // self.T):
            both = [(i, j) for i in order[chosen]  # the short ones together: little is padded
                    for j in (i, self.foreign(document, i, n // 2))[:copies]]
            pairs = [self.pair(*(self.window("validation", x, self.room) for x in numbers), cuts)
                     for numbers in both]
            yield self.make(pairs, [i != j for i, j in both], self.mask_prob, masks)

    def asked(self, batch: dict) -> torch.Tensor:
        """How many tokens, and how many pairs, a batch asks for: its losses are means over them."""
        counts = [(batch["mlm_labels"] != -100).sum()]
        counts += [torch.tensor(len(batch["idx"]))] if self.nsp else []
        return torch.stack(counts).float()

    def loss(self, model: Model, batch: dict):
        """The losses (2,), and in evaluation measures, each a pair of sums."""
        losses, mlm_logits, targets, nsp_logits = model.losses(**batch)
        if model.training:
            return losses, {}
        right, n = mlm_logits.argmax(dim=-1) == targets, (targets != -100).sum()
        measures = dict(mlm_loss=(losses[0] * n, n), mlm_accuracy=(right.sum(), n))
        if nsp_logits is not None:
            right = nsp_logits.argmax(dim=-1) == batch["nsp_labels"]
            measures["nsp_accuracy"] = right.sum(), len(right)
        return losses, measures

    def prompt_ids(self, prompt: str) -> list[int]:
        """[CLS] prompt [SEP]. Tokens begin with the space before a word, so a space in front of
        [MASK] belongs to what is hidden. Raises ValueError without a [MASK], or beyond T."""
        parts = prompt.replace(" [MASK]", "[MASK]").split("[MASK]")
        if len(parts) == 1:
            raise ValueError('the prompt has no [MASK]: write "The cat sat on the [MASK]."')
        ids = [self.special["[CLS]"], *self.tokenizer.encode(parts[0])]
        for part in parts[1:]:
            ids += [self.special["[MASK]"], *self.tokenizer.encode(part)]
        if len(ids) >= self.T:
            raise ValueError(f"the prompt has {len(ids) + 1} tokens, the context only {self.T}")
        return [*ids, self.special["[SEP]"]]

    def answer(self, model: Model, options: GenerateConfig):
        """Yield the likeliest tokens for each [MASK], a line each, then the text filled."""
        if options.prompt_b:
            raise ValueError("--prompt_b is for a model that was fine-tuned on pairs of texts")
        ids = self.prompt_ids(options.prompt or "The cat sat on the [MASK].")
        idx, mask_id = torch.tensor(ids, device=model.head.weight.device), self.special["[MASK]"]
        _, probability = model.guess(idx, mask_id)
        best, tokens = probability.topk(min(options.top_k, len(self.ordinary)))  # (M, k)
        for i, (row, shares) in enumerate(zip(tokens.tolist(), best.tolist()), 1):
            words = [json.dumps(self.tokenizer.decode([x]), ensure_ascii=False) for x in row]
            found = ", ".join(f"{word} {share:.1%}" for word, share in zip(words, shares))
            yield f"[MASK] {i}: {found}\n"
        yield "\n" + self.tokenizer.decode(model.fill(idx, mask_id)[1:-1].tolist())

    def demonstrate(self, model: Model, length: int) -> str:
        """A sample for the log: a text with masks, and as the model fills it."""
        text, mask_id = self.window("validation", 0, min(length, self.room)), self.special["[MASK]"]
        idx = torch.tensor([self.special["[CLS]"], *text, self.special["[SEP]"]])
        idx[torch.randperm(len(text))[: max(round(0.15 * len(text)), 1)] + 1] = mask_id
        filled = model.fill(idx.to(model.head.weight.device), mask_id)
        shown, filled = (self.tokenizer.decode(ids[1:-1].tolist()) for ids in (idx, filled))
        return f"{shown}\n-> {filled}"


# 6. Fine-tuning: label a text ---------------------------------------------------------------------


@dataclass
class Finetuning:
    """Label a text, or a pair: what [CLS] has gathered goes to a new head, with a score for each
    label (Devlin, 4.1). (Methods without a text are those of Pretraining.)"""

    mask_prob: float = 0.0  # share of a text's tokens that become [MASK] in training
    label_smoothing: float = 0.0  # share of each answer that all labels get alike in training
    labels: list = field(default_factory=list, metadata=dict(flag=False))  # those of the examples
    pairs: bool | None = field(default=False, metadata=dict(flag=False))  # two texts a row? or any

    columns, optional = ("text", "label"), ("text_b",)
    demonstrations = ("",)  # what --data can be beside a table

    def __post_init__(self):
        check(self, mask_prob=(0, 1), label_smoothing=(0, 1))

    @staticmethod
    def from_story(story: dict, source: str) -> list[dict]:
        """The demonstration: a story without its header -> its topic, one of eight."""
        return [dict(text=story["text"], label=story["topic"])]

    def open(self, run, config: Config, tokenizer, parts=None) -> Config:
        """parts: the rows (dicts of columns) to learn from, and those held out -> the architecture
        with a head for their labels. Raises ValueError where there are none to tell apart."""
        from data import Examples, say

        self.run, self.T, self.tokenizer = run, config.block_size, tokenizer
        self.special = tokenizer.special
        if parts is None:
            return config
        learned, asked = ({row["label"] for row in part} for part in parts)
        if not self.labels:
            known = learned | asked
            numbers = all(re.fullmatch(r"-?\d+(\.\d+)?", label, re.ASCII) for label in known)
            self.labels = sorted(known, key=float if numbers else str)
            self.pairs = "text_b" in parts[0][0]
        if len(self.labels) < 2:
            raise ValueError(f"all examples have the label {self.labels[0]!r}: it takes two")
        if asked - learned:
            say(f"only in the held-out examples, so none can be learned: {asked - learned}")
        if config.n_segments < 2 and self.pairs:
            raise ValueError("pairs of texts take a model with n_segments 2")
        self.train, self.held_out = (Examples(part, self.encode) for part in parts)
        self.rows, self.description = len(self.train.rows), self.train.describe(self.held_out)
        return replace(config, n_labels=len(self.labels))

    def encode(self, row: dict) -> dict:
        """A row as the tokens of its texts (one or two lists), how many of each are taken, and the
        number of its label. Raises ValueError for a label that is not known."""
        if row["label"] not in self.labels:
            raise ValueError(f"{row['place']}: label {row['label']!r} is none of {self.labels}")
        if self.pairs is not None and ("text_b" in row) != self.pairs:
            problem = "pairs: give" if self.pairs else "single texts: leave out"
            raise ValueError(f"this model labels {problem} --prompt_b or text_b")
        texts = [self.tokenizer.encode(row[name]) for name in ("text", "text_b") if name in row]
        room = self.T - 1 - len(texts)  # beside [CLS] and a [SEP] behind each
        lengths = [min(len(text), room) for text in texts]
        while sum(lengths) > room:  # of two texts the longer gives way
            lengths[lengths.index(max(lengths))] -= 1
        return dict(texts=texts, rooms=lengths, label=self.labels.index(row["label"]),
                    length=1 + sum(lengths) + len(texts))

    def collate(self, examples: list[dict], draw=None) -> dict:
        """-> a batch: idx, segments (B, T), labels (B,) int64, and mask (B, T) bool if rows differ.
        A text that does not fit is cropped: to its beginning, or for training, with a generator, to
        a window at random. Then mask_prob of its tokens become [MASK]."""
        from data import pad

        rows, segments = [], []
        for example in examples:
            row, segment = [self.special["[CLS]"]], [0]
            for i, (text, room) in enumerate(zip(example["texts"], example["rooms"])):
                begin = draw.integers(len(text) - room + 1) if draw else 0
                window = np.array(text[begin : begin + room], np.int64)
                if draw:
                    window[draw.random(room) < self.mask_prob] = self.special["[MASK]"]
                row += [*window.tolist(), self.special["[SEP]"]]
                segment += [i] * (room + 1)
            rows.append(row)
            segments.append(segment)
        real = pad([[1] * len(row) for row in rows], 0) == 1
        batch = dict(idx=pad(rows, self.special["[PAD]"]), segments=pad(segments, 0),
                     labels=torch.tensor([example["label"] for example in examples]))
        return batch if real.all() else batch | dict(mask=real)

    def batch(self, step: int) -> dict:
        draw = np.random.default_rng((self.run.seed, step))
        return self.collate(self.train.batch(self.run, step), draw)

    def eval_batches(self, rows: int, most: int | None = None):
        return map(self.collate, self.held_out.in_order(rows))  # (all, however many)

    def asked(self, batch: dict) -> torch.Tensor:
        return torch.tensor(float(len(batch["labels"])))

    def loss(self, model: Model, batch: dict):
        """The mean loss, and in evaluation accuracy, and the labels' F1, whose mean (macro F1) lets
        rare labels count as much as frequent ones: 2 right / (times it is true + it is guessed).
        Smoothing: few examples are to make no model too sure (Szegedy et al. 2016, 7)."""
        scores = model.classify(batch["idx"], batch["segments"], batch.get("mask")).float()
        truth, guess, n = batch["labels"], scores.argmax(dim=-1), len(self.labels)
        loss = F.cross_entropy(scores, truth, label_smoothing=self.label_smoothing * model.training)
        right = guess == truth
        either = truth.bincount(minlength=n) + guess.bincount(minlength=n)  # (n_labels,)
        return loss, {} if model.training else dict(
            accuracy=(right.sum(), len(truth)),
            macro_f1=(2 * truth[right].bincount(minlength=n), either))

    @torch.no_grad()
    def label(self, model: Model, text: str, text_b: str = "") -> list[tuple[str, float]]:
        """The labels with their probabilities, the likeliest first."""
        row = dict(text=text, label=self.labels[0]) | ({"text_b": text_b} if text_b else {})
        batch = self.collate([self.encode(row)])  # (with any label)
        idx, segments = (batch[name].to(model.head.weight.device) for name in ("idx", "segments"))
        probability = F.softmax(model.classify(idx, segments).float(), dim=-1)[0].tolist()
        return sorted(zip(self.labels, probability), key=lambda pair: -pair[1])

    def answer(self, model: Model, options: GenerateConfig):
        """Yield the likeliest labels, a line each."""
        found = self.label(model, options.prompt, options.prompt_b)[: options.top_k]
        width = max(len(label) for label, _ in found)
        yield "\n".join(f"{label:<{width}} {100 * share:5.1f} %" for label, share in found)

    def demonstrate(self, model: Model, length: int) -> str:
        """Some held-out texts, what the model takes them for, and what they are."""
        lines = []
        for row in self.held_out.rows[:3]:
            best, share = self.label(model, row["text"], row.get("text_b", ""))[0]
            text = textwrap.shorten(row["text"], length, placeholder=" ...")
            truth = "right" if best == row["label"] else f"it is {row['label']}"
            lines.append(f"{text}\n    -> {best} ({share:.0%}; {truth})")
        return "\n".join(lines)


# 7. Published weights: BERT's names for ours ------------------------------------------------------

FIXED = dict(  # settings of `config.json` that have one value here
    model_type="bert", hidden_act="gelu", layer_norm_eps=1e-12, is_decoder=False,
    add_cross_attention=False, position_embedding_type="absolute", tie_word_embeddings=True,
    problem_type="single_label_classification")
# No weights; and one of pooler and pair head where the file lacks the other.
NO_WEIGHTS = r"bert\.embeddings\.position_ids|(bert\.pooler|cls\.seq_relationship)\..*"
HEAD = r"cls\.predictions\."  # what may be missing: a model for labels does without
ROLES = dict(pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
             model_input_names=["input_ids", "token_type_ids", "attention_mask"])
NEVER = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")  # special tokens that no text is to get
TEMPLATE = ["[CLS]", "A", "[SEP]", "B", "[SEP]"]  # what stands around a text A, or a pair A, B

NAMES = [  # what our names have (a regular expression) -> what BERT's have there
    ("^token_embedding", "bert.embeddings.word_embeddings"),
    ("^position_embedding", "bert.embeddings.position_embeddings"),
    ("^segment_embedding", "bert.embeddings.token_type_embeddings"),
    ("^embedding_norm", "bert.embeddings.LayerNorm"), ("^blocks", "bert.encoder.layer"),
    ("attn.qkv", "attention.self.qkv"), ("attn.proj", "attention.output.dense"),
    ("attn_norm", "attention.output.LayerNorm"), ("mlp.up", "intermediate.dense"),
    ("mlp.down", "output.dense"), ("mlp_norm", "output.LayerNorm"),
    ("^transform_norm", "cls.predictions.transform.LayerNorm"),
    ("^transform", "cls.predictions.transform.dense"), ("^head.bias", "cls.predictions.bias"),
    ("^head", "cls.predictions.decoder"), ("^pooler", "bert.pooler.dense"),
    ("^pair_head", "cls.seq_relationship"), ("^label_head", "classifier"),
]


def as_published(model: Model, name: str, weight) -> dict:
    """A weight by its published name; query, key and value are apart there."""
    if "qkv" not in name:
        return {name: weight}
    parts = zip(("query", "key", "value"), weight.chunk(3))
    return {name.replace("qkv", part): view for part, view in parts}


def published_name(name: str) -> str:
    """The name of a tensor in a file of weights, old ones included -> its published name."""
    name = name.replace("Norm.gamma", "Norm.weight").replace("Norm.beta", "Norm.bias")
    name = name.replace("cls.predictions.decoder.bias", "cls.predictions.bias")  # (the same)
    return name if name.startswith(("bert.", "cls.", "classifier.")) else f"bert.{name}"


def to_published(config: Config) -> dict:
    """Our settings as `config.json` has them. Raises ValueError where BERT has no such variant."""
    if (config.pos, config.norm) != ("learned", "post"):
        raise ValueError("transformers has no BERT without learned positions and post-norm")
    kind = "PreTraining" if config.nsp else "MaskedLM"
    return dict(
        architectures=[f"BertFor{'SequenceClassification' if config.n_labels else kind}"],
        vocab_size=config.vocab_size, hidden_size=config.n_embd, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, intermediate_size=config.n_ff or 4 * config.n_embd,
        hidden_dropout_prob=config.dropout, attention_probs_dropout_prob=config.dropout,
        max_position_embeddings=config.block_size, type_vocab_size=config.n_segments,
        pad_token_id=0, num_labels=config.n_labels or 2,
    )


def from_published(found: dict, names) -> Config:
    """What `config.json` says, and the names of the weights -> our settings."""
    labels = len(found.get("id2label") or range(found.get("num_labels", 2)))
    if labels == 1 and "classifier.weight" in names:
        raise ValueError("num_labels is 1: it says how much, not which label")
    return Config(
        found["vocab_size"], found["max_position_embeddings"], found["num_hidden_layers"],
        found["num_attention_heads"], found["hidden_size"], n_ff=found["intermediate_size"],
        dropout=found.get("hidden_dropout_prob", 0.1), n_segments=found.get("type_vocab_size", 2),
        nsp="cls.seq_relationship.weight" in names and "bert.pooler.dense.weight" in names,
        n_labels=labels if "classifier.weight" in names else 0,
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
