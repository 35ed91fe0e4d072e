"""The callback for the Trainer of transformers: one line, the numbers by hand, the same training bit by bit."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_by_hand import HandWatch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from fastfs.integrations import FastfsCallback  # noqa: E402

VOCABULARY, TOKENS, STEPS = 64, 12, 4
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),  # of DataLoaders without an accelerator
]


def llama(**options: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, max_position_embeddings=32, **options))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def mixtral() -> Any:
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, max_position_embeddings=32, **options))


def t5() -> Any:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0
    )
    return T5ForConditionalGeneration(config)


def vit() -> Any:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    return ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=5))


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "t5": t5,
    "vit": vit,
    "lora": lora,
}


def make(name: str) -> Any:
    torch.manual_seed(0)
    return MODELS[name]()


def samples(name: str) -> list[dict[str, Any]]:
    """Returns a data set. Its samples do not have the same number of labels that count."""
    draw = torch.Generator().manual_seed(1)
    if name == "vit":
        return [{"pixel_values": torch.randn(3, 8, 8, generator=draw), "labels": i % 5} for i in range(64)]
    found = []
    for _ in range(64):
        tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
        found.append({"input_ids": tokens, "labels": tokens.masked_fill(torch.rand(TOKENS, generator=draw) < 0.4, -100)})
    return found


def trainer(model: Any, folder: Path, callbacks: list[Any], *, kind: type[Trainer] = Trainer, **options: Any) -> Trainer:
    name = "vit" if isinstance(model, ViTForImageClassification) else "text"
    defaults = {
        "use_cpu": True,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    extra = {} if "model_init" not in options else {"model_init": options.pop("model_init")}
    arguments = TrainingArguments(str(folder), **defaults | options)
    data = samples(name)
    return kind(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks, **extra)


def losses(done: Trainer) -> list[float]:
    return [row["loss"] for row in done.state.log_history if "loss" in row]


def assert_same(one: Trainer, other: Trainer) -> None:
    """Asserts that two trainings have the same parameters and losses, bit by bit."""
    assert losses(one) == losses(other)
    mine, theirs = (each.model.state_dict() for each in (one, other))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def measured(folder: Path) -> Any:
    table = fastfs.load(folder)
    return table[table["kind"] == "measured"]


class ByHand(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Takes the numbers of one step by clones and a second forward, and the loss from the logits."""

    def __init__(self, step: int, layers: list[str], stem: tuple[str, ...], loss: Callable[..., Tensor]) -> None:
        self.at, self.layers, self.stem, self.loss_of = step, layers, stem, loss
        self.found: dict[str, list[float]] = {}
        self.loss = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step == self.at:
            self.watch = HandWatch(model, self.layers, self.stem)
            self.outputs: list[tuple[Any, Any]] = []
            self.handle = model.register_forward_hook(self.keep, with_kwargs=True)

    def keep(self, _model: Any, _args: Any, kwargs: Any, output: Any) -> None:
        self.outputs.append((kwargs, output))

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.at:
            self.handle.remove()
            count = args.gradient_accumulation_steps
            self.loss = float(sum(self.loss_of(kwargs, output, count) for kwargs, output in self.outputs))
            self.found = self.watch.finish(contextlib.nullcontext())


def causal_loss(kwargs: Any, output: Any, _count: int) -> Tensor:
    """The sum over labels divided by the number of those of all micro-batches."""
    logits, labels = output.logits[:, :-1].detach().double(), kwargs["labels"][:, 1:]
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / int(kwargs["num_items_in_batch"])


def image_loss(kwargs: Any, output: Any, count: int) -> Tensor:
    return F.cross_entropy(output.logits.detach().double(), kwargs["labels"]) / count


DETAILS: dict[str, tuple[list[str], tuple[str, ...], Callable[..., Tensor]]] = {
    "llama": (["model.layers.0", "model.layers.1"], ("model.embed_tokens.",), causal_loss),
    "gpt2": (["transformer.h.0", "transformer.h.1"], ("transformer.wte.", "transformer.wpe."), causal_loss),
    "vit": (["vit.layers.0", "vit.layers.1"], ("vit.embeddings.",), image_loss),
}

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulate": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 0.05, "gradient_accumulation_steps": 2},
    "bf16": {"bf16": True},
    "checkpointing": {"activation_checkpointing": True, "gradient_accumulation_steps": 2},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("llama", each) for each in OPTIONS), ("gpt2", "accumulate"), ("vit", "accumulate"), ("vit", "compiled")],
)
def test_numbers_are_those_by_hand(tmp_path: Path, name: str, options: str) -> None:
    layers, stem, loss = DETAILS[name]
    plain = trainer(make(name), tmp_path / "off", [], **OPTIONS[options])
    plain.train()
    watched = trainer(make(name), tmp_path / "on", [FastfsCallback(every=2, rows=None)], **OPTIONS[options])
    watched.train()
    assert_same(plain, watched)
    seen = measured(tmp_path / "on")
    assert seen["step"].tolist() == [0, 0, 2, 2]
    assert seen["name"].tolist() == layers * 2
    hidden = options in ("checkpointing", "compiled")  # by hand, of the same training in plain sight
    for step in (0, 2):
        hand = ByHand(step, layers, stem, loss)
        seen_by_hand = {k: v for k, v in OPTIONS[options].items() if not hidden or k.startswith("gradient_acc")}
        trainer(make(name), tmp_path / "hand", [hand], **seen_by_hand).train()
        for number, (_, row) in enumerate(seen[seen["step"] == step].iterrows()):
            assert row["loss"] == pytest.approx(hand.loss, rel=1e-2 if options == "bf16" else 1e-6)
            assert row["micro_batches"] == OPTIONS[options].get("gradient_accumulation_steps", 1)
            assert options == "bf16" or row["valid"], row["why"]
            for column in ("cos_angle", "update_rms", "feature_rms", "backward_rms"):
                assert row[column] == pytest.approx(hand.found[column][number], rel=1e-5), column
            if name != "gpt2":  # whose embedding is tied to the head
                assert row["aligned_decrease"] == pytest.approx(hand.found["aligned_decrease"][number], rel=1e-3)
