"""The callback for the Trainer of transformers: one line, the numbers by hand, the same training bit by bit."""

from __future__ import annotations

import contextlib
import copy
import gc
import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from tests.helpers.monitor_by_hand import HandWatch
from tests.helpers.processes import run_ranks

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

# Of peft 0.21, with transformers 5.24.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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
    [
        *(("llama", each) for each in OPTIONS if each != "compiled"),
        pytest.param("llama", "compiled", marks=pytest.mark.slow),
        ("gpt2", "accumulate"), ("vit", "accumulate"),
    ],
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


@pytest.mark.parametrize("name", MODELS)
def test_training_is_the_same_and_rows_are_valid(tmp_path: Path, name: str) -> None:
    """With evaluations between the steps, and the callback given as a class would be: the record is in the folder."""
    options = {"eval_strategy": "steps", "eval_steps": 1, "gradient_accumulation_steps": 2}
    plain = trainer(make(name), tmp_path / "off", [], **options)
    plain.train()
    watched = trainer(make(name), tmp_path / "on", [FastfsCallback(every=1, aligned_every=1)], **options)
    watched.train()
    assert_same(plain, watched)
    seen = measured(tmp_path / "on")
    blocks = {"t5": ["encoder.block.0", "encoder.block.1", "decoder.block.0", "decoder.block.1"]}.get(name)
    names = seen[seen["step"] == 0]["name"].tolist()
    assert names == blocks or (blocks is None and len(names) == 2)
    assert sorted(set(seen["step"])) == list(range(STEPS))
    # A LoRA adapter begins as zero: the gradients of one of its factors are zero, too.
    assert seen["valid"].all(), seen[~seen["valid"].astype(bool)][["step", "name", "why"]]
    assert seen["loss"].notna().all()


def test_a_class_without_arguments(tmp_path: Path) -> None:
    done = trainer(make("llama"), tmp_path, [FastfsCallback])
    done.train()
    assert sorted(set(measured(tmp_path)["step"])) == [0]
    assert "training_step" not in vars(done)


def test_options_are_checked_at_once() -> None:
    with pytest.raises(TypeError, match=r"FastfsCallback: expected arguments of fastfs.Monitor \(layers, .*'evry'"):
        FastfsCallback(evry=3)
    with pytest.raises(TypeError, match="got 'model'"):
        FastfsCallback(model=nn.Linear(1, 1))
    with pytest.raises(RuntimeError, match=r"expected to be called by a transformers.Trainer"):
        FastfsCallback().on_train_begin(None, None, None)


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


class Failing(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Raises once, at an event of a step."""

    def __init__(self, event: str, step: int, error: BaseException) -> None:
        self.step, self.error = step, error
        setattr(self, event, self.fail)

    def fail(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.step = -1
            raise self.error


class FailingLoss(Trainer):  # type: ignore[misc, unused-ignore]
    fails_at = 2

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if self.state.global_step == self.fails_at:
            self.fails_at = -1
            raise KeyboardInterrupt
        return loss


def test_a_training_that_raises_leaves_no_hook(tmp_path: Path) -> None:
    failing = trainer(make("llama"), tmp_path, [FastfsCallback(every=1)], kind=FailingLoss)
    with pytest.raises(KeyboardInterrupt):
        failing.train()
    assert hooks(failing.model) == 0
    assert "training_step" not in vars(failing)
    first = measured(tmp_path)
    assert sorted(set(first["step"])) == [0, 1]
    failing.train()
    table = measured(tmp_path)
    assert sorted(set(table[table["run"] != first["run"].iloc[0]]["step"])) == list(range(STEPS))
    assert table["run"].nunique() == 2


@pytest.mark.parametrize("event", ["on_step_begin", "on_pre_optimizer_step", "on_optimizer_step", "on_step_end"])
def test_an_interrupt_outside_of_a_training_step(tmp_path: Path, event: str) -> None:
    """The next training closes what the interrupted one has left open, and trains as one that was not watched."""
    trained = []
    for folder, callbacks in (("off", []), ("on", [FastfsCallback(every=1)])):
        failing = trainer(make("llama"), tmp_path / folder, [*callbacks, Failing(event, 2, KeyboardInterrupt())])
        with pytest.raises(KeyboardInterrupt):
            failing.train()
        failing.train()
        trained.append(failing)
    assert_same(*trained)
    assert hooks(trained[1].model) == 0
    table = measured(tmp_path / "on")
    assert [len(set(part["step"])) for _, part in table.groupby("run", sort=False)][1:] == [STEPS]


def test_a_trainer_that_has_failed_and_is_dropped(tmp_path: Path) -> None:
    model = make("llama")
    failing = trainer(model, tmp_path, [FastfsCallback(every=1), Failing("on_step_end", 2, ValueError("x"))])
    with pytest.raises(ValueError, match="x"):
        failing.train()
    del failing
    gc.collect()
    assert hooks(model) == 0
    assert sorted(set(measured(tmp_path)["step"])) == [0, 1]


def test_a_model_per_trial(tmp_path: Path) -> None:
    rows: list[Any] = []
    search = trainer(None, tmp_path, [FastfsCallback(every=2, sinks=[rows.extend])], model_init=lambda: make("llama"))
    for _ in range(2):
        search.train()
    runs = [{(r["run"], r["step"], r["loss"]) for r in rows if r["kind"] == "measured"}]
    assert len({run for run, _, _ in runs[0]}) == 2
    assert len(runs[0]) == 4
    assert len({(step, loss) for _, step, loss in runs[0]}) == 2  # the trials are equal


SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"save_only_model": True},
        {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True},
        {"restore_callback_states_from_checkpoint": True},
    ],
    ids=["all", "model-only", "best", "restored"],
)
def test_a_resumed_training_continues_the_record(tmp_path: Path, options: dict[str, Any]) -> None:
    """Numbers and steps are those of a training without an interruption; the checkpoint has moved."""
    watch: dict[str, Any] = {"every": 3, "aligned_every": 1}
    whole = trainer(make("llama"), tmp_path / "whole", [FastfsCallback(**watch)], **SAVING, **options)
    whole.train()
    path = tmp_path / "part" / "record.jsonl"
    stopping = Failing("on_step_begin", 3, KeyboardInterrupt())
    part = trainer(make("llama"), tmp_path / "part", [FastfsCallback(**watch, path=path), stopping], **SAVING, **options)
    with pytest.raises(KeyboardInterrupt):
        part.train()
    moved = tmp_path / "moved"
    (tmp_path / "part" / "checkpoint-2").rename(moved)
    del part
    gc.collect()
    resumed = trainer(make("llama"), tmp_path / "part", [FastfsCallback(**watch, path=path)], **SAVING, **options)
    resumed.train(resume_from_checkpoint=str(moved))
    table, expected = fastfs.load(tmp_path / "part"), fastfs.load(tmp_path / "whole")
    assert table["run"].nunique() == 1
    assert table[["step", "kind", "name"]].values.tolist() == expected[["step", "kind", "name"]].values.tolist()
    headers = table.attrs["headers"]
    assert [each.get("resumed_at") for each in headers if each["run"] == table["run"].iloc[0]] == [None, 2]
    if "save_only_model" not in options:  # otherwise the optimizer begins anew
        assert losses(resumed)[-2:] == losses(whole)[-2:]
        for column in ("loss", "aligned_decrease", "update_rms", "angle"):
            assert table[column].equals(expected[column]), column


def test_a_checkpoint_without_the_callback_or_of_other_layers(tmp_path: Path) -> None:
    trainer(make("llama"), tmp_path / "bare", [], max_steps=2, save_strategy="steps", save_steps=1).train()
    resumed = trainer(make("llama"), tmp_path / "bare", [FastfsCallback(every=1)])
    resumed.train(resume_from_checkpoint=True)
    assert sorted(set(measured(tmp_path / "bare")["step"])) == [0, 1]

    options: dict[str, Any] = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer(make("llama"), tmp_path / "all", [FastfsCallback(every=1)], **options).train()
    resumed = trainer(make("llama"), tmp_path / "all", [FastfsCallback(every=1, layers=r"mlp$")])
    with pytest.warns(RuntimeWarning, match=r"FastfsCallback: the checkpoint's record cannot be continued, a new run"):
        resumed.train(resume_from_checkpoint=True)
    assert measured(tmp_path / "all")["run"].nunique() == 2


def test_two_callbacks_continue_their_own_runs(tmp_path: Path) -> None:
    watch = [
        {"every": 1, "layers": r"mlp$", "path": str(tmp_path / "mlp.jsonl")},
        {"every": 1, "layers": r"layers\.\d$", "path": str(tmp_path / "blocks.jsonl")},
    ]
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    trainer(make("llama"), tmp_path, [FastfsCallback(**each) for each in watch], max_steps=2, **options).train()
    resumed = trainer(make("llama"), tmp_path, [FastfsCallback(**each) for each in reversed(watch)], **options)
    resumed.train(resume_from_checkpoint=True)
    for name in ("mlp", "blocks"):
        table = measured(tmp_path / f"{name}.jsonl")
        assert table["run"].nunique() == 1
        assert sorted(set(table["step"])) == list(range(STEPS))


def test_callbacks_made_from_json_keep_their_options(tmp_path: Path) -> None:
    assert FastfsCallback(every=3, path=tmp_path).state() == {
        "args": {"every": 3, "path": str(tmp_path)},
        "attributes": {},
    }
    json.dumps(FastfsCallback(sinks=[print]).state())
    with pytest.raises(ValueError, match=r"restore_callback_states_from_checkpoint=True .* cannot hold sinks"):
        trainer(
            make("llama"), tmp_path, [FastfsCallback(sinks=[print])], restore_callback_states_from_checkpoint=True
        )


# Two ranks


def on_a_rank(folder: str, resume: bool, watch: bool) -> Any:
    """Trains on this rank; returns losses and parameters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Accelerate and gloo
        warnings.filterwarnings("error", "fastfs")
        callbacks = [FastfsCallback(every=1, rows=None)] if watch else []
        options: dict[str, Any] = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
        saving = {} if resume else {"save_strategy": "steps", "save_steps": 1}
        done = trainer(make("llama"), Path(folder), callbacks, ddp_backend="gloo", **options, **saving)
        if resume:
            last = sorted(Path(folder).glob("checkpoint-*"))[1]
            done.train(resume_from_checkpoint=str(last))
        else:
            done.train()
    return losses(done), [p.detach().clone() for p in done.model.parameters()]


@pytest.mark.slow
def test_two_ranks(tmp_path: Path) -> None:
    """Losses are scaled by the number of labels on all ranks; the record is that of one process, and is continued."""
    plain = run_ranks(on_a_rank, 2, folder=str(tmp_path / "off"), resume=False, watch=False)
    watched = run_ranks(on_a_rank, 2, folder=str(tmp_path / "on"), resume=False, watch=True)
    for one, other in zip(plain, watched, strict=True):
        assert one[0] == other[0]
        assert all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))
    single = trainer(
        make("llama"), tmp_path / "one", [FastfsCallback(every=1, rows=None)], gradient_accumulation_steps=2
    )
    single.train()
    many, one = measured(tmp_path / "on"), measured(tmp_path / "one")
    assert (many["ranks"] == 2).all()
    assert many["valid"].all()
    for column in ("angle", "update_rms", "feature_rms", "backward_rms", "aligned_decrease", "loss"):
        assert many[column].tolist() == pytest.approx(one[column].tolist(), rel=1e-4), column
    run_ranks(on_a_rank, 2, folder=str(tmp_path / "on"), resume=True, watch=True)
    again = measured(tmp_path / "on")
    assert again["run"].nunique() == 1
    for column in ("step", "name", "angle", "loss"):
        assert again[column].tolist() == many[column].tolist(), column
