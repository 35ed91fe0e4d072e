"""The trainings on which calibrated learning rates are compared with a grid: eight small models, three optimizers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from fastfs._reproduce.data import digits, minibatches, stdlib_text, windows
from fastfs.models import MLP, ResNet, Transformer

ADAMW = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
SGD = (1e-3, 1e-2, 1e-1, 3e-1, 1.0)
MUON = ADAMW


@dataclass(frozen=True)
class Task:
    """A training: ``model(width, depth)`` multiplies the base size; ``batches(seed)`` are a stream."""

    name: str
    grid: tuple[float, ...]
    model: Callable[[int, int], nn.Module]
    batches: Callable[[int], Iterator[Any]]
    loss: Callable[[Any, Any], Tensor]
    optimizers: Callable[[nn.Module, float], list[Optimizer]]


def adamw(model: nn.Module, lr: float) -> list[Optimizer]:
    return [torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.01)]


def sgd(model: nn.Module, lr: float) -> list[Optimizer]:
    return [torch.optim.SGD(model.parameters(), lr=lr, momentum=0.0)]


def muon(model: nn.Module, lr: float) -> list[Optimizer]:
    """Muon for the matrices of the blocks and AdamW for the rest, at the same rate, as their users do."""
    inside = {id(p) for name, p in model.named_parameters() if p.dim() == 2 and _in_blocks(name)}
    matrices = [p for p in model.parameters() if id(p) in inside]
    others = [p for p in model.parameters() if id(p) not in inside]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, weight_decay=0.01),
    ]


def _in_blocks(name: str) -> bool:
    return "blocks." in name or "layers." in name or ".layer." in name or ".h." in name


def _logits(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def _own(model: Any, batch: Any) -> Tensor:
    loss: Tensor = model(**batch).loss
    return loss


def copies(vocabulary: int, length: int, rows: int) -> Callable[[int], Iterator[Any]]:
    """Random tokens, repeated three times: predicting the repetitions requires attention to the first."""

    def stream(seed: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            once = torch.randint(0, vocabulary, (rows, length), generator=generator)
            tokens = torch.cat([once, once, once], 1)
            yield {"input_ids": tokens, "labels": tokens}

    return stream


def text(rows: int, length: int) -> Callable[[int], Iterator[Any]]:
    return lambda seed: windows(stdlib_text(400_000), rows, length, seed)


def text_of_dicts(rows: int, length: int, most: int) -> Callable[[int], Iterator[Any]]:
    def stream(seed: int) -> Iterator[Any]:
        for inputs, _ in windows(stdlib_text(400_000), rows, length, seed):
            tokens = inputs % most
            yield {"input_ids": tokens, "labels": tokens}

    return stream


def images(rows: int, square: bool = False) -> Callable[[int], Iterator[Any]]:
    def stream(seed: int) -> Iterator[Any]:
        inputs, labels = digits()
        for x, y in minibatches(inputs, labels, rows, seed):
            yield {"pixel_values": x.view(-1, 1, 8, 8), "labels": y} if square else (x, y)

    return stream


def llama(width: int, depth: int) -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=32 * width,
            num_hidden_layers=depth,
            num_attention_heads=2 * width,
            num_key_value_heads=2 * width,
            intermediate_size=64 * width,
            max_position_embeddings=64,
        )
    )


def gpt2(width: int, depth: int) -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=32,
            n_embd=32 * width,
            n_layer=depth,
            n_head=2 * width,
            n_positions=64,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def mixtral(width: int, depth: int) -> nn.Module:
    import transformers

    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            vocab_size=128,
            hidden_size=32 * width,
            num_hidden_layers=depth,
            num_attention_heads=2 * width,
            num_key_value_heads=1 * width,
            intermediate_size=48 * width,
            num_local_experts=4,
            max_position_embeddings=64,
        )
    )


def vit(width: int, depth: int) -> nn.Module:
    import transformers

    config = transformers.ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=32 * width,
        num_hidden_layers=depth,
        num_attention_heads=2 * width,
        intermediate_size=64 * width,
    )
    config.num_labels = 10
    return transformers.ViTForImageClassification(config)


def lora(width: int, depth: int) -> nn.Module:
    """LoRA on a base that is trained a little on bytes first, at a usual rate, and then frozen."""
    import peft

    base = Transformer(128, 32 * width, depth, 2 * width, 32)
    optimizer = torch.optim.AdamW(base.parameters(), lr=2e-3)
    stream = windows(stdlib_text(400_000), 8, 32, 77)
    for _ in range(60):
        inputs, targets = next(stream)
        optimizer.zero_grad()
        _logits(base, (inputs % 128, targets % 128)).backward()
        optimizer.step()
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=r".*\.(qkv|attention\.out|mlp_in|mlp_out)")
    return peft.get_peft_model(base, config)


def reversed_text(rows: int, length: int) -> Callable[[int], Iterator[Any]]:
    """Text backwards: what the base of LoRA has to be adapted to."""

    def stream(seed: int) -> Iterator[Any]:
        for inputs, _ in windows(stdlib_text(400_000), rows, length + 1, seed):
            tokens = (inputs % 128).flip(1)
            yield tokens[:, :-1], tokens[:, 1:]

    return stream


TASKS = {
    task.name: task
    for task in (
        Task(
            "transformer",
            ADAMW,
            lambda w, d: Transformer(256, 32 * w, d, 2 * w, 32, dropout=0.1),
            text(8, 32),
            _logits,
            adamw,
        ),
        Task("resnet", SGD, lambda w, d: ResNet(64, 32 * w, 6 * d, 10), images(128), _logits, sgd),
        Task("llama", ADAMW, llama, copies(32, 8, 16), _own, adamw),
        Task("gpt2", ADAMW, gpt2, copies(32, 8, 16), _own, adamw),
        Task("vit", MUON, vit, images(32, True), _own, muon),
        Task("mlp", SGD, lambda w, d: MLP(64, 32 * w, 6 * d, 10), images(128), _logits, sgd),
        Task("lora", ADAMW, lora, reversed_text(8, 32), _logits, adamw),
        Task("mixtral", MUON, mixtral, text_of_dicts(8, 32, 128), _own, muon),
    )
}
