"""The callback for the Trainer of transformers: one line, the numbers by hand, the same training bit by bit."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.helpers.monitor_by_hand import HandWatch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import TrainerCallback

from fastfs.integrations import FastfsCallback
from tests.helpers.huggingface_cases import MODELS, STEPS, assert_same, make, trainer
from tests.helpers.trainer_cases import measured

# Of peft 0.21, with transformers 5.24.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


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
        ("gpt2", "accumulate"),
        ("vit", "accumulate"),
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


@pytest.mark.graphs
@pytest.mark.parametrize("compiled_before", [False, True])
def test_a_compiled_model_that_writes_to_its_configuration(tmp_path: Path, compiled_before: bool) -> None:
    """In its first forward, behind the watched layers: Dynamo must not lose what it writes (the kind of its loss)."""
    torch._dynamo.reset()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=True):  # as in a new process
        trained = []
        for folder, callbacks in (("off", []), ("on", [FastfsCallback(every=2, rows=None)])):
            if not compiled_before:
                torch._dynamo.reset()
            options = {"torch_compile": True, "torch_compile_backend": "aot_eager", "max_steps": 3}
            trained.append(trainer(make("bert"), tmp_path / folder, callbacks, **options))
            trained[-1].train()
    torch._dynamo.reset()
    assert_same(*trained)
    seen = measured(tmp_path / "on")
    assert seen["step"].tolist() == [0, 0, 2, 2]
    assert seen["valid"].all()
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
