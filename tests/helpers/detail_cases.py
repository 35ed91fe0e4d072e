"""Models for `Monitor(details=True)`, and the numbers of their weight matrices by hand: hooks, clones, float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastfs.models import Transformer

Calls = dict[str, list[tuple[Tensor, Tensor]]]  # by parameter: the matrix (out, in) and the rows (N, in) of each call


class ConvNet(nn.Module):
    """Convolutions with stride, dilation and padding by name, one of several groups, and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 8, 3, padding="same")])
        self.dilated = nn.Conv2d(8, 8, 3, dilation=2, padding=(1, 2))
        self.grouped = nn.Conv2d(8, 8, 3, groups=4)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.relu(block(x))
        return self.head(self.grouped(torch.tanh(self.dilated(x))).mean(dim=(2, 3)))


class Attending(nn.Module):
    """Layers of torch's own transformer, one of them with cross-attention, whose projection is used in parts."""

    def __init__(self, need_weights: bool = False) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 32, dropout=0.1, batch_first=True) for _ in range(2)
        )
        for block in self.blocks:
            block.self_attn.dropout = 0.0  # the input of the output projection is computed by hand
        self.cross = nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = nn.Linear(16, 3)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        y, memory = x, x[:, :5]
        for block in self.blocks:
            y = block(y)
        return self.head(self.cross(y, memory, memory, need_weights=self.need_weights)[0])


class Shared(nn.Module):
    """One matrix in three calls, and products that are written as operators, with the matrix left and right."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(8, 8)
        self.right = nn.Parameter(torch.randn(8, 12) / 3)
        self.left = nn.Parameter(torch.randn(3, 12) / 3)
        self.bias = nn.Parameter(torch.zeros(12))

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.again(x))
        x = torch.addmm(self.bias, x, self.right)
        return (self.left @ x.t()).t()


def shared_calls(model: Shared, x: Tensor) -> Calls:
    found: Calls = {"again.weight": [], "right": [], "left": []}
    for _ in range(3):
        found["again.weight"].append((model.again.weight.detach(), x))
        x = torch.tanh(model.again(x))
    found["right"].append((model.right.detach().t(), x))
    found["left"].append((model.left.detach(), torch.addmm(model.bias, x, model.right)))
    return found


class Watch:
    """Takes the inputs of all matrices in a forward, by hooks on the modules that have them."""

    def __init__(self, model: nn.Module) -> None:
        self.calls: Calls = {}
        first = {id(p): name for name, p in reversed(list(model.named_parameters(remove_duplicate=False)))}
        self.names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
        self.handles = []
        for name, module in model.named_modules():
            taker = _TAKERS.get(type(module).__name__)
            if taker is not None:
                hook = lambda m, args, kwargs, n=name, t=taker: self._take(n, t(m, *args, **kwargs))  # noqa: E731
                self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _take(self, name: str, found: dict[str, list[tuple[Tensor, Tensor]]]) -> None:
        for parameter, calls in found.items():
            own = self.calls.setdefault(f"{name}.{parameter}".removeprefix("."), [])
            own += [(w.detach().double().clone(), x.detach().double().clone()) for w, x in calls]

    def remove(self) -> Calls:
        for handle in self.handles:
            handle.remove()
        return {self.names.get(name, name): calls for name, calls in self.calls.items()}


def _linear(m: nn.Linear, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    return {"weight": [(m.weight, x.reshape(-1, x.shape[-1]))]}


def _conv1d(m: Any, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    return {"weight": [(m.weight.t(), x.reshape(-1, x.shape[-1]))]}


def _conv2d(m: nn.Conv2d, x: Tensor) -> dict[str, list[tuple[Tensor, Tensor]]]:
    if m.groups > 1:
        return {}
    # Patches that the kernel is applied to, one after the other: y = W x with a matrix (out, in kh kw).
    padding = m.padding if not isinstance(m.padding, str) else tuple(k // 2 for k in m.kernel_size)
    patches = F.unfold(x.double(), m.kernel_size, m.dilation, padding, m.stride)
    return {"weight": [(m.weight.flatten(1), patches.transpose(1, 2).flatten(0, 1))]}


def _attention(m: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Calls:
    assert m.batch_first
    assert k is v
    e, heads = m.embed_dim, m.num_heads
    w, b = m.in_proj_weight.double(), m.in_proj_bias.double()
    q, k = q.double(), k.double()
    parts = [(x @ w[i * e : (i + 1) * e].t() + b[i * e : (i + 1) * e]) for i, x in enumerate((q, k, k))]
    qh, kh, vh = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in parts)
    out = ((qh @ kh.transpose(-1, -2) / math.sqrt(e // heads)).softmax(-1) @ vh).transpose(1, 2).flatten(-2)
    flat = lambda x: x.reshape(-1, e)  # noqa: E731
    same = q.shape == k.shape and torch.equal(q, k)
    own = [(w, flat(q))] if same else [(w[:e], flat(q)), (w[e:], flat(k))]
    return {"in_proj_weight": own, "out_proj.weight": [(m.out_proj.weight, flat(out))]}


def _experts(m: Any, x: Tensor, chosen: Tensor, _weights: Tensor) -> Calls:
    found: Calls = {"gate_up_proj": [], "down_proj": []}
    for expert in range(m.num_experts):
        rows = x[(chosen == expert).any(dim=1)].double()
        if len(rows):
            w = m.gate_up_proj[expert].double()
            gate, up = (rows @ w.t()).chunk(2, dim=1)
            found["gate_up_proj"].append((w, rows))
            found["down_proj"].append((m.down_proj[expert], F.silu(gate) * up))
    return found


_TAKERS: dict[str, Callable[..., Any]] = {
    "Linear": _linear,
    "Conv1D": _conv1d,
    "Conv2d": _conv2d,
    "MultiheadAttention": _attention,
    "MixtralTopKRouter": _linear,
    "MixtralExperts": _experts,
}


def quantities(before: Calls, after: Calls) -> dict[str, dict[str, float]]:
    """The quantities of every matrix from all rows of its calls before and after a step."""
    return {name: _of(calls, after[name]) for name, calls in before.items()}


def _of(before: list[tuple[Tensor, Tensor]], after: list[tuple[Tensor, Tensor]]) -> dict[str, float]:
    sums = dict.fromkeys(("y", "wx", "u", "ux", "own", "inherited", "cross"), 0.0)
    same = all(x.shape == x2.shape for (_, x), (_, x2) in zip(before, after, strict=True))
    for (w, x), (w2, x2) in zip(before, after, strict=True):
        w, x, w2, x2 = w.double(), x.double(), w2.double(), (x2 if same else x).double()
        dw, dx = w2 - w, x2 - x
        own, inherited = x2 @ dw.t(), dx @ w.t()
        sums["y"] += float((x @ w.t()).square().sum())
        sums["wx"] += float(w.square().sum() * x.square().sum())
        sums["u"] += float((x @ dw.t()).square().sum())
        sums["ux"] += float(dw.square().sum() * x.square().sum())
        sums["own"] += float(own.square().sum())
        sums["inherited"] += float(inherited.square().sum())
        sums["cross"] += float((own * inherited).sum())
    fan_in = before[0][0].shape[1]
    result = {
        "weight_alignment": math.sqrt(sums["y"] / sums["wx"]),
        "update_alignment": math.sqrt(sums["u"] / sums["ux"]),
    }
    if same:
        result["own_motion"] = math.sqrt(sums["own"] / sums["y"])
        result["inherited_motion"] = math.sqrt(sums["inherited"] / sums["y"])
    if same and sums["inherited"] > 0:
        result["motion_cosine"] = sums["cross"] / math.sqrt(sums["own"] * sums["inherited"])
    for kind in ("weight", "update"):
        # The norms as root mean squares of entries, whose ratio is between n^(1/2) and n.
        result[f"{kind}_exponent"] = math.log(fan_in * result[f"{kind}_alignment"], fan_in)
    return result


@dataclass(frozen=True)
class DetailCase:
    """A model with its optimizers and batches."""

    name: str
    model: Callable[[], nn.Module]
    optimizers: Callable[[nn.Module], list[torch.optim.Optimizer]]
    batch: Callable[[int], tuple[Any, ...]]
    loss: Callable[[nn.Module, Any], Tensor]
    micro_batches: int = 1
    layers: Any = "auto"
    autocast: bool = False

    def value(self, model: nn.Module, batch: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.loss(model, batch)


def _sgd(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)]


def _adamw(model: nn.Module) -> list[torch.optim.Optimizer]:
    return [torch.optim.AdamW(model.parameters(), lr=1e-2)]


def _muon(model: nn.Module) -> list[torch.optim.Optimizer]:
    matrices = [p for p in model.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW([p for p in model.parameters() if p.dim() != 2])]


def _vectors(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(48, 8, generator=generator), torch.randint(3, (48,), generator=generator)


def _images(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(60, 3, 12, 12, generator=generator), torch.randint(3, (60,), generator=generator)


def _sequences(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4, 12, 8, generator=generator), torch.randint(3, (4, 12), generator=generator)


def text(step: int, size: int = 4) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(64, (size, 17), generator=torch.Generator().manual_seed(step))
    return tokens[:, :-1], tokens[:, 1:]


def _cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    output = model(batch[0])
    return F.cross_entropy(output.flatten(0, -2), batch[1].flatten())


def _language(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(input_ids=batch[0]).logits.flatten(0, -2), batch[1].flatten())


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 3))


def transformer() -> nn.Module:
    return Transformer(64, 16, 2, 4, 16, dropout=0.1)


def llama() -> Any:
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=32, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    import transformers

    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, use_cache=False, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def mixtral(experts_implementation: str = "eager") -> Any:
    import transformers

    config = transformers.MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=32,
        use_cache=False,
    )  # fmt: skip
    return transformers.MixtralForCausalLM._from_config(config, experts_implementation=experts_implementation)


CASES = [
    DetailCase("mlp", mlp, _sgd, _vectors, _cross_entropy),
    DetailCase("accumulation", mlp, _adamw, _vectors, _cross_entropy, micro_batches=3),
    DetailCase("shared", Shared, _adamw, _vectors, _cross_entropy, layers=[""]),
    DetailCase("convnet", ConvNet, _sgd, _images, _cross_entropy),
    DetailCase("attending", Attending, _adamw, _sequences, _cross_entropy),
    DetailCase("transformer", transformer, _muon, text, _cross_entropy),
    DetailCase("llama", llama, _muon, text, _language),
    DetailCase("gpt2", gpt2, _adamw, text, _language, micro_batches=2),
    DetailCase("mixtral", mixtral, _adamw, text, _language),
]
