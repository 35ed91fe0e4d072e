"""Architectures in the styles of public scripts: transformers, sequences and wrappers around models."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.auto_layers.parts import (
    TOKENS,
    VOCABULARY,
    WIDTH,
    Attention,
    Block,
    FeedForward,
    PreNorm,
)


class NanoGPT(nn.Module):
    """Parts in one ModuleDict; ``h`` is a list of blocks in it."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(VOCABULARY, WIDTH),
                "wpe": nn.Embedding(TOKENS, WIDTH),
                "drop": nn.Dropout(0.1),
                "h": nn.ModuleList([Block() for _ in range(depth)]),
                "ln_f": nn.LayerNorm(WIDTH),
            }
        )
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.transformer["wte"].weight = self.lm_head.weight

    def forward(self, ids: Tensor) -> Tensor:
        parts: Any = self.transformer
        x = parts["drop"](parts["wte"](ids) + parts["wpe"](torch.arange(ids.shape[1])))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


class MinGPTBlock(nn.Module):
    """The feed-forward part is a ModuleDict, called through a function."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH)
        self.mlp = nn.ModuleDict(
            {"c_fc": nn.Linear(WIDTH, 2 * WIDTH), "c_proj": nn.Linear(2 * WIDTH, WIDTH), "act": nn.GELU()}
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp["c_proj"](self.mlp["act"](self.mlp["c_fc"](self.ln_2(x))))


class MinGPT(NanoGPT):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.transformer["h"] = nn.ModuleList([MinGPTBlock() for _ in range(depth)])


class Head(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, size, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


class Heads(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList([Head(WIDTH // count) for _ in range(count)])
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([head(x) for head in self.heads], dim=-1))


class LectureBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sa, self.ffwd = Heads(4), FeedForward()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.sa(self.ln1(x))
        return x + self.ffwd(self.ln2(x))


class LectureGPT(nn.Module):
    """Attention heads in a list, blocks and the last norm in a Sequential."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.token_embedding_table = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.Sequential(*[LectureBlock() for _ in range(depth)], nn.LayerNorm(WIDTH))
        self.lm_head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        return self.lm_head(self.blocks(self.token_embedding_table(ids)))


class PairTransformer(nn.Module):
    """Lists of [attention, feed-forward] in a list, each added to the stream."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.ModuleList([PreNorm(Attention()), PreNorm(FeedForward())]) for _ in range(depth)]
        )

    def forward(self, x: Tensor) -> Tensor:
        pairs: Any = self.layers
        for attention, feed_forward in pairs:
            x = x + attention(x)
            x = x + feed_forward(x)
        return x


class PairViT(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.to_patch_embedding = nn.Sequential(nn.LayerNorm(12), nn.Linear(12, WIDTH), nn.LayerNorm(WIDTH))
        self.pos_embedding = nn.Parameter(torch.randn(1, TOKENS, WIDTH))
        self.transformer = PairTransformer(depth)
        self.mlp_head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.transformer(self.to_patch_embedding(x) + self.pos_embedding)
        return self.mlp_head(x.mean(dim=1))


def mixer(depth: int = 3) -> nn.Module:
    """Sequences of residual modules in a sequence."""

    def part() -> nn.Module:
        return PreNorm(nn.Sequential(nn.Linear(WIDTH, 32), nn.GELU(), nn.Linear(32, WIDTH)), residual=True)

    return nn.Sequential(
        nn.Flatten(2),
        nn.Linear(12, WIDTH),
        *[nn.Sequential(part(), part()) for _ in range(depth)],
        nn.LayerNorm(WIDTH),
        nn.Linear(WIDTH, 3),
    )


def clones(module: nn.Module, count: int) -> nn.ModuleList:
    return nn.ModuleList([copy.deepcopy(module) for _ in range(count)])


class MultiHeaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linears = clones(nn.Linear(WIDTH, WIDTH), 4)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (linear(x) for linear, x in zip(self.linears, (q, k, v), strict=False))
        return self.linears[-1](F.scaled_dot_product_attention(q, k, v))


class Sublayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), nn.Dropout(0.0)

    def forward(self, x: Tensor, sublayer: Any) -> Tensor:
        return x + self.dropout(sublayer(self.norm(x)))


class AnnotatedLayer(nn.Module):
    def __init__(self, decoder: bool) -> None:
        super().__init__()
        self.self_attn, self.feed_forward = MultiHeaded(), FeedForward()
        if decoder:
            self.src_attn = MultiHeaded()
        self.sublayer = clones(Sublayer(), 3 if decoder else 2)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.sublayer[0](x, lambda y: self.self_attn(y, y, y))
        if memory is not None:
            x = self.sublayer[1](x, lambda y: self.src_attn(y, memory, memory))
        return self.sublayer[-1](x, self.feed_forward)


class Stack(nn.Module):
    def __init__(self, layer: nn.Module, depth: int) -> None:
        super().__init__()
        self.layers, self.norm = clones(layer, depth), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, *memory: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x, *memory)
        return self.norm(x)


class Annotated(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.encoder, self.decoder = Stack(AnnotatedLayer(False), depth), Stack(AnnotatedLayer(True), depth)
        self.src_embed, self.tgt_embed = (nn.Sequential(nn.Embedding(VOCABULARY, WIDTH)) for _ in range(2))
        self.generator = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.generator(self.decoder(self.tgt_embed(target), self.encoder(self.src_embed(source))))


class DiTBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = self.norm2 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attn, self.mlp = Attention(), FeedForward()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 2 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, gate = self.adaLN_modulation(c).unsqueeze(1).chunk(2, dim=-1)
        x = x + gate * self.attn(self.norm1(x) + shift)
        return x + gate * self.mlp(self.norm2(x))


class DiT(nn.Module):
    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(12, WIDTH)
        self.t_embedder = nn.Sequential(nn.Linear(4, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList([DiTBlock() for _ in range(depth)])
        self.final_layer = nn.Linear(WIDTH, 12)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        x, c = self.x_embedder(x), self.t_embedder(t)
        for block in self.blocks:
            x = block(x, c)
        return self.final_layer(x)


class MoE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList([FeedForward() for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        weights = self.gate(x).softmax(dim=-1)
        return sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))


class MoEBlock(Block):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = MoE()  # type: ignore[assignment]


class MoEOnly(nn.Module):
    """Only lists of experts behind gates."""

    def __init__(self, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([MoE() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Stream(nn.Module):
    """Embedding, a list of blocks, a head."""

    def __init__(self, blocks: list[nn.Module], repeats: int = 1) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.blocks = nn.ModuleList(blocks)
        self.repeats = repeats

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(self.repeats):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


class Tower(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.embed, self.proj = nn.Linear(12, WIDTH), nn.Linear(WIDTH, 4)
        self.resblocks = nn.Sequential(*[Block() for _ in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.resblocks(self.embed(x)).mean(dim=1))


class Towers(nn.Module):
    """Two towers of one class."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.text = Tower(3), Tower(2)

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        return self.visual(images) @ self.text(texts).T
