"""Small networks for the demo, the experiments and the tests.

Every network is a chain of blocks in an ``nn.ModuleList`` called ``blocks``. The output of ``blocks.l`` is the feature
vector f at that depth. The whole signal passes through it, so it is a *cut* and the feature speed formula holds there.
All matrices are initialized with independent Gaussian entries, whose standard deviations the docstrings state. As in
the theory, no matrix of :class:`MLP` and :class:`ResNet` has a bias.

Source: "The Feature Speed Formula" (arXiv 2311.18718) for :class:`MLP` and :class:`ResNet`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["MLP", "ResNet", "Transformer"]


def __dir__() -> list[str]:
    return __all__


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _gaussian_linear(in_features: int, out_features: int, std: float, generator: torch.Generator | None) -> nn.Linear:
    """Create a linear map without bias whose entries are independent N(0, std^2)."""
    linear: nn.Linear = nn.utils.skip_init(nn.Linear, in_features, out_features, bias=False)
    nn.init.normal_(linear.weight, std=std, generator=generator)
    return linear


class _ReluLinear(nn.Module):
    """``f -> V relu(f)``."""

    def __init__(self, width: int, std: float, generator: torch.Generator | None) -> None:
        super().__init__()
        self.linear = _gaussian_linear(width, width, std, generator)

    def forward(self, features: Tensor) -> Tensor:
        output: Tensor = self.linear(F.relu(features))
        return output


class _ReluBranch(_ReluLinear):
    """``f -> sqrt(1 - beta^2) f + beta V relu(f)``."""

    def __init__(self, width: int, std: float, branch_scale: float, generator: torch.Generator | None) -> None:
        super().__init__(width, std, generator)
        self.branch_scale = branch_scale

    def forward(self, features: Tensor) -> Tensor:
        skip = math.sqrt(1.0 - self.branch_scale**2)
        return skip * features + self.branch_scale * super().forward(features)

    def extra_repr(self) -> str:
        return f"branch_scale={self.branch_scale:.4g}"


class MLP(nn.Module):
    """A ReLU multi-layer perceptron: ``f_1 = U x``, ``f_l = V_l relu(f_{l-1})``, output ``W relu(f_{L-1})``.

    ``blocks.0`` holds U and ``blocks.l`` holds V_{l+1}; ``head`` holds W. The features are pre-activations.

    Args:
        in_features: size d of the input, of shape (rows, d).
        width: size m of the hidden features.
        depth: number L of weight matrices, at least 2 (input, L - 2 hidden, output).
        out_features: size of the output, of shape (rows, out_features).
        input_std: std of U; None means 1/sqrt(d), for inputs with entries of order 1.
        hidden_std: std of V; None means sqrt(2/m), which keeps rms(f) constant over depth.
        output_std: std of W; None means 1/m (mean-field).
        generator: source of random numbers for the initialization; None uses the global generator.

    Raises:
        ValueError: a size is below 1 or the depth below 2.

    Source: the ReLU MLP of "The Feature Speed Formula" (arXiv 2311.18718).
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int = 1,
        *,
        input_std: float | None = None,
        hidden_std: float | None = None,
        output_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        _require(min(in_features, width, out_features) >= 1, "MLP: in_features, width and out_features must be >= 1")
        _require(depth >= 2, f"MLP: depth counts all weight matrices and must be >= 2, got {depth}")
        input_std = 1.0 / math.sqrt(in_features) if input_std is None else input_std
        hidden_std = math.sqrt(2.0 / width) if hidden_std is None else hidden_std
        output_std = 1.0 / width if output_std is None else output_std
        self.blocks = nn.ModuleList([_gaussian_linear(in_features, width, input_std, generator)])
        self.blocks.extend(_ReluLinear(width, hidden_std, generator) for _ in range(depth - 2))
        self.head = _gaussian_linear(width, out_features, output_std, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to outputs.

        Args:
            inputs: Shape (rows, in_features).

        Returns:
            Shape (rows, out_features).
        """
        features = inputs
        for block in self.blocks:
            features = block(features)
        output: Tensor = self.head(F.relu(features))
        return output


class ResNet(nn.Module):
    """A ReLU ResNet with a branch scale: ``f_l = sqrt(1 - beta^2) f_{l-1} + beta V_l relu(f_{l-1})``, l = 1..L.

    ``stem`` holds U of ``f_0 = U x``, ``blocks.{l-1}`` holds V_l, and ``head`` holds W of the output ``W f_L``. With
    beta = c/sqrt(L), the backward-feature angle at the last block tends with depth to a limit that depends only on c.
    For beta = 1, the ReLU MLP, the angle degenerates; beta of order 1/L gives angles near 0.

    Args:
        in_features: size d of the input, of shape (rows, d).
        width: size m of the features.
        depth: number L of residual blocks, at least 1.
        out_features: size of the output, of shape (rows, out_features).
        branch_scale: beta in [0, 1]; None means 1/sqrt(L).
        input_std: std of U; None means 1/sqrt(d).
        hidden_std: std of V; None means sqrt(2/m), which keeps rms(f) constant over depth.
        output_std: std of W; None means 1/m (mean-field).
        generator: source of random numbers for the initialization; None uses the global generator.

    Raises:
        ValueError: a size is below 1 or the branch scale is outside [0, 1].

    Source: the ReLU ResNet of "The Feature Speed Formula" (arXiv 2311.18718).
    """

    def __init__(
        self,
        in_features: int,
        width: int,
        depth: int,
        out_features: int = 1,
        *,
        branch_scale: float | None = None,
        input_std: float | None = None,
        hidden_std: float | None = None,
        output_std: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = (in_features, width, depth, out_features)
        _require(min(sizes) >= 1, "ResNet: in_features, width, depth and out_features must be >= 1")
        branch_scale = 1.0 / math.sqrt(depth) if branch_scale is None else branch_scale
        _require(0.0 <= branch_scale <= 1.0, f"ResNet: branch_scale must be in [0, 1], got {branch_scale}")
        input_std = 1.0 / math.sqrt(in_features) if input_std is None else input_std
        hidden_std = math.sqrt(2.0 / width) if hidden_std is None else hidden_std
        output_std = 1.0 / width if output_std is None else output_std
        self.stem = _gaussian_linear(in_features, width, input_std, generator)
        self.blocks = nn.ModuleList(_ReluBranch(width, hidden_std, branch_scale, generator) for _ in range(depth))
        self.head = _gaussian_linear(width, out_features, output_std, generator)

    def forward(self, inputs: Tensor) -> Tensor:
        """Map inputs to outputs.

        Args:
            inputs: Shape (rows, in_features).

        Returns:
            Shape (rows, out_features).
        """
        features = self.stem(inputs)
        for block in self.blocks:
            features = block(features)
        output: Tensor = self.head(features)
        return output


class _Attention(nn.Module):
    """Causal multi-head self-attention, (batch, time, width) -> (batch, time, width)."""

    def __init__(
        self, width: int, heads: int, dropout: float, output_std: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.qkv = _gaussian_linear(width, 3 * width, 1.0 / math.sqrt(width), generator)
        self.out = _gaussian_linear(width, width, output_std, generator)

    def forward(self, features: Tensor) -> Tensor:
        batch, time, width = features.shape
        heads = self.qkv(features).view(batch, time, 3, self.heads, width // self.heads)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True)
        output: Tensor = self.out(mixed.transpose(1, 2).reshape(batch, time, width))
        return output


class _TransformerBlock(nn.Module):
    """A pre-norm block whose output is the residual stream: ``h = f + attn(norm(f))``, ``f' = h + mlp(norm(h))``."""

    def __init__(
        self, width: int, heads: int, dropout: float, branch_gain: float, generator: torch.Generator | None
    ) -> None:
        super().__init__()
        hidden = 4 * width
        self.norm_attention = nn.LayerNorm(width)
        self.attention = _Attention(width, heads, dropout, branch_gain / math.sqrt(width), generator)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp_in = _gaussian_linear(width, hidden, 1.0 / math.sqrt(width), generator)
        self.mlp_out = _gaussian_linear(hidden, width, branch_gain / math.sqrt(hidden), generator)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.dropout(self.attention(self.norm_attention(features)))
        hidden = F.gelu(self.mlp_in(self.norm_mlp(features)))
        output: Tensor = features + self.dropout(self.mlp_out(hidden))
        return output


class Transformer(nn.Module):
    """A small decoder-only transformer: int64 tokens (batch, time) -> logits (batch, time, vocabulary).

    Pre-norm blocks surround a residual stream, which ``blocks.l`` outputs. Initial standard deviations: token and
    position embeddings 0.5 each (so the stream starts at rms 0.7), matrices 1/sqrt(fan_in), the two matrices that
    write into the stream additionally ``residual_scale``, an untied head 1/width, normalization weights 1 and biases 0.
    With ``tied=True``, the head reuses the token embedding and divides its logits by ``width * 0.5``, so that they
    start as small as untied ones. A tied embedding acts before and after every block, where the sum over parameters in
    the feature speed formula is then ambiguous (angles and speeds are still well defined).

    Args:
        vocabulary: number of tokens; 256 for bytes.
        width: size of the residual stream, a multiple of ``heads``.
        depth: number of blocks.
        heads: number of attention heads.
        context: longest sequence.
        dropout: dropout probability of the embedding, the attention weights and both branches.
        tied: whether the head shares the token embedding.
        residual_scale: initial scale of the 2 depth residual branches; None means 1/sqrt(2 depth).
        generator: source of random numbers for the initialization; None uses the global generator.

    Raises:
        ValueError: a size is below 1, ``heads`` does not divide ``width``, the dropout is outside [0, 1), the residual
            scale is not positive, or (from ``forward``) a sequence is longer than ``context``.
    """

    def __init__(
        self,
        vocabulary: int = 256,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        context: int = 128,
        *,
        dropout: float = 0.0,
        tied: bool = False,
        residual_scale: float | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        sizes = (vocabulary, width, depth, heads, context)
        _require(min(sizes) >= 1, "Transformer: vocabulary, width, depth, heads and context must be >= 1")
        _require(width % heads == 0, f"Transformer: width must be a multiple of heads, got {width} and {heads}")
        _require(0.0 <= dropout < 1.0, f"Transformer: dropout must be in [0, 1), got {dropout}")
        self.context = context
        self.tied = tied
        self.token = nn.utils.skip_init(nn.Embedding, vocabulary, width)
        self.position = nn.utils.skip_init(nn.Embedding, context, width)
        self.dropout = nn.Dropout(dropout)
        branch_gain = 1.0 / math.sqrt(2.0 * depth) if residual_scale is None else residual_scale
        _require(branch_gain > 0.0, f"Transformer: residual_scale must be positive, got {residual_scale}")
        self.blocks = nn.ModuleList(
            _TransformerBlock(width, heads, dropout, branch_gain, generator) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        nn.init.normal_(self.token.weight, std=0.5, generator=generator)
        nn.init.normal_(self.position.weight, std=0.5, generator=generator)
        self.head = None if tied else _gaussian_linear(width, vocabulary, 1.0 / width, generator)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens to logits.

        Args:
            tokens: int64 (batch, time).

        Returns:
            Logits, shape (batch, time, vocabulary).

        Raises:
            ValueError: If the sequences are longer than the context.
        """
        time = tokens.shape[-1]
        if time > self.context:
            raise ValueError(f"Transformer: sequence of {time} tokens is longer than the context of {self.context}")
        positions = torch.arange(time, device=tokens.device)
        features = self.dropout(self.token(tokens) + self.position(positions))
        for block in self.blocks:
            features = block(features)
        features = self.norm(features)
        logits: Tensor
        if self.head is None:
            logits = F.linear(features, self.token.weight) / (0.5 * features.shape[-1])
        else:
            logits = self.head(features)
        return logits
