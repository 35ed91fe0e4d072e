"""Small models, data and trainers of transformers for the tests of its callback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from tests.helpers.trainer_cases import assert_same_state

VOCABULARY, TOKENS, STEPS = 64, 12, 4
SIZES: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
HEADS: dict[str, Any] = {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}


def llama(**options: Any) -> Any:
    return LlamaForCausalLM(LlamaConfig(**SIZES, **HEADS, max_position_embeddings=32, **options))


def gpt2() -> Any:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32))


def mixtral() -> Any:
    options = {"num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **HEADS, max_position_embeddings=32, **options))


def t5() -> Any:
    sizes: dict[str, Any] = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    sizes["decoder_start_token_id"] = 0
    return T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes))


def vit() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5}
    return ViTForImageClassification(ViTConfig(**sizes, intermediate_size=32, image_size=8, patch_size=4))


def bert() -> Any:
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_labels": 5}
    off: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, **sizes, **off, intermediate_size=32))


def lora() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": llama,
    "gpt2": gpt2,
    "mixtral": mixtral,
    "t5": t5,
    "vit": vit,
    "bert": bert,
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
    if name == "bert":
        tokens = torch.randint(0, VOCABULARY, (64, TOKENS), generator=draw)
        return [{"input_ids": each, "labels": i % 5} for i, each in enumerate(tokens)]
    found = []
    for _ in range(64):
        tokens = torch.randint(0, VOCABULARY, (TOKENS,), generator=draw)
        found.append(
            {"input_ids": tokens, "labels": tokens.masked_fill(torch.rand(TOKENS, generator=draw) < 0.4, -100)}
        )
    return found


def trainer(
    model: Any, folder: Path, callbacks: list[Any], *, kind: type[Trainer] = Trainer, **options: Any
) -> Trainer:
    kinds = {ViTForImageClassification: "vit", BertForSequenceClassification: "bert"}
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
    data = samples(kinds.get(type(model), "text"))
    return kind(model, arguments, train_dataset=data, eval_dataset=data[:8], callbacks=callbacks, **extra)


def losses(done: Trainer) -> list[float]:
    return [row["loss"] for row in done.state.log_history if "loss" in row]


def assert_same(one: Trainer, other: Trainer) -> None:
    """Asserts that two trainings have the same parameters and losses, bit by bit."""
    assert losses(one) == losses(other)
    assert_same_state(one.model, other.model)
