"""Training is bitwise the same with `Monitor(details=True)`, and what it is refused for or leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastfs
from fastfs._monitor.measure.layer_calls import LayerCalls
from tests.helpers import monitor_loops as loops
from tests.helpers.detail_cases import CASES as MODELS
from tests.helpers.detail_cases import DetailCase, mlp, transformer
from tests.helpers.monitor_cases import CASES, assert_same, rows

DYNAMO = pytest.mark.filterwarnings(loops.DYNAMO)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_training_is_bitwise_the_same(case: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"

    def attach(model: Any, optimizer: torch.optim.Optimizer) -> Any:
        return fastfs.Monitor(
            model, optimizer, layers=r"blocks\.\d+$", every=2, details=True, path=path, alerts=(), verbose=False
        )

    assert_same(case.run(6, None), case.run(6, attach))
    table = fastfs.monitor.load_details(path)
    assert set(table["step"]) == {0, 2, 4}
    assert table["value"].notna().any()


def final_state(case: DetailCase, path: Path | None) -> list[Tensor]:
    torch.manual_seed(3)
    model = case.model()
    optimizers = case.optimizers(model)
    monitor = None
    if path is not None:
        monitor = fastfs.Monitor(
            model, optimizers, every=1, details=True, layers=case.layers, path=path, alerts=(), verbose=False
        )
    for step in range(3):
        model.zero_grad()
        for part in range(case.micro_batches):
            case.value(model, case.batch(step * case.micro_batches + part)).backward()
        for optimizer in optimizers:
            optimizer.step()
    if monitor is not None:
        monitor.close()
    return [p.detach().clone() for p in model.parameters()] + [torch.get_rng_state()]


@pytest.mark.parametrize("case", MODELS, ids=lambda case: case.name)
def test_parameters_are_bitwise_the_same(case: DetailCase, tmp_path: Path) -> None:
    alone, watched = final_state(case, None), final_state(case, tmp_path / "a.jsonl")
    assert all(map(torch.equal, alone, watched))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, tmp_path: Path) -> None:
    found = {}
    for kind in (None, reentrant):
        for details in (True, False):
            torch.manual_seed(0)
            model = loops.Net(reentrant=kind, drop=0.2)
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
            path = tmp_path / f"{kind}{details}.jsonl"
            with fastfs.Monitor(
                model, optimizer, layers=loops.BLOCKS, every=1, details=details, path=path, alerts=(), verbose=False
            ):
                for step in range(3):
                    x, y = rows(step)
                    optimizer.zero_grad()
                    F.cross_entropy(model(x), y).backward()
                    optimizer.step()
            found[kind, details] = path, [*model.parameters(), *model.buffers()]
    for details in (True, False):
        assert all(map(torch.equal, found[None, True][1], found[reentrant, details][1]))
    tables = [fastfs.monitor.load_details(found[kind, True][0]) for kind in (None, reentrant)]
    assert len(tables[0]) == len(tables[1]) > 0
    assert np.allclose(tables[0]["value"], tables[1]["value"], rtol=1e-12, equal_nan=True)
    assert tables[0]["value"].notna().mean() > 0.9


@DYNAMO
@pytest.mark.graphs
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_models(backend: str, tmp_path: Path) -> None:
    """Eager forwards in place of compiled graphs are looked into: the same numbers up to rounding."""
    torch._dynamo.reset()
    tables, ends = [], []
    for compiled, details in ((False, True), (True, True), (True, False)):
        torch.manual_seed(0)
        model = transformer().eval()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        called: Any = torch.compile(model, backend=backend) if compiled else model
        path = tmp_path / f"{compiled}{details}.jsonl"
        with fastfs.Monitor(called, optimizer, every=1, details=details, path=path, alerts=(), verbose=False):
            for step in range(2):
                generator = torch.Generator().manual_seed(step)
                tokens = torch.randint(64, (4, 17), generator=generator)
                optimizer.zero_grad()
                F.cross_entropy(called(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
                optimizer.step()
        tables.append(fastfs.monitor.load_details(path))
        ends.append([p.detach().clone() for p in model.parameters()])
    torch._dynamo.reset()
    assert all(map(torch.equal, ends[1], ends[2]))
    assert len(tables[2]) == 0
    first = [table[table["step"] == 0] for table in tables]
    assert first[1]["why"].equals(first[0]["why"])
    assert np.allclose(first[1]["value"], first[0]["value"], rtol=1e-2, atol=1e-4, equal_nan=True)


REFUSED: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"details": 1}, TypeError, "details: expected True or False, got 1"),
    ({"amplify": True}, ValueError, r'details: is for mode="batch" without amplify and samples, got amplify=True'),
    ({"mode": "jvp"}, ValueError, r"got mode='jvp'"),
    ({"samples": 4}, ValueError, r"got samples=4"),
]


@pytest.mark.parametrize(("settings", "error", "message"), REFUSED)
def test_refused_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    model = mlp()
    with pytest.raises(error, match=message):
        fastfs.Monitor(model, torch.optim.SGD(model.parameters(), lr=0.1), **{"details": True, **settings})


def trained(model: nn.Module, x: Tensor, path: Path, **settings: Any) -> Any:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastfs.Monitor(
        model, optimizer, every=1, details=True, path=path, alerts=(), verbose=False, **settings
    ) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        description = monitor.description
    return fastfs.monitor.load_details(path), description


def test_the_budget_bounds_the_inputs_that_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(256, 64)
    sizes = []
    for memory in (10**6, 2 * 10**5, 8 * 10**4):
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        table, description = trained(model, x, tmp_path / f"{memory}.jsonl", memory=memory)
        sizes.append(table)
        assert "0.0 MiB for parameters before the step" in description
    assert sizes[0]["standard_error"].isna().all()
    assert sizes[1]["standard_error"].notna().any()
    assert set(sizes[2]["why"].dropna()) >= {"memory= leaves no room for two rows of its input"}


class Reads(nn.Module):
    """Uses matrices in ways that are not read."""

    def __init__(self) -> None:
        super().__init__()
        self.computed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
        self.summed = nn.Parameter(torch.randn(4, 4))
        self.stack = nn.Parameter(torch.randn(3, 4, 4))
        self.cast = nn.Linear(4, 4)
        self.still = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.still(self.computed(x))
        x = torch.einsum("bi,ij->bj", x, self.summed)
        x = torch.bmm(x.expand(3, -1, -1), self.stack).sum(dim=0)
        return F.linear(x.double(), self.cast.weight.double())


def test_matrices_that_are_not_read(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Reads()
    table, _ = trained(model, torch.randn(8, 4), tmp_path / "a.jsonl", layers=[""])
    frozen = table["name"] == "still.weight"
    known = table[frozen].groupby("quantity")["value"].min()
    assert known["weight_alignment"] > 0
    assert known["own_motion"] == 0
    assert np.isnan(known["update_alignment"])
    table = table[~frozen]
    assert table["value"].isna().all()
    why = table.groupby("name")["why"].unique().map(list).to_dict()
    unseen = ["no product with it was seen in the forward"]
    assert why == {
        "computed.parametrizations.weight.original0": unseen,
        "computed.parametrizations.weight.original1": unseen,
        "summed": ["it is used in torch.einsum, which is not read"],
        "stack": ["it is used in torch.bmm, which is not read"],
        "cast.weight": unseen,
        "unused.weight": unseen,
    }


class Mapped(nn.Module):
    """Calls its products and functions inside of vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        def each(row: Tensor) -> Tensor:
            y = torch.relu(F.linear(row, self.inner.weight))
            return F.scaled_dot_product_attention(y, y, y).softmax(dim=-1)

        return self.outer(torch.func.vmap(each)(x.view(2, 4, 4)).flatten(0, 1))


def test_calls_inside_of_vmap(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table, _ = trained(Mapped(), torch.randn(8, 4), tmp_path / "a.jsonl", layers=["outer"])
    assert table[table["name"] == "outer.weight"]["value"].notna().all()
    (why,) = set(table[table["name"] == "inner.weight"]["why"])
    assert why == "its input is no ordinary tensor: in a torch.func transform, or sharded"


class Sorting(nn.Module):
    """Applies a matrix to tokens in the order of a learned score, to the chosen ones, and to all in their own order."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.score = nn.Linear(4, 1)
        self.moved = nn.Linear(4, 4)
        self.still = nn.Linear(4, 4)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        score = self.score(x).squeeze(1)
        if self.how == "sorted":
            order = score.argsort()
            return self.still(self.moved(x[order])[order.argsort()])
        if self.how == "masked":
            mask = score > score.median()
            return self.still(torch.zeros_like(x).masked_scatter(mask[:, None], self.moved(x[mask])))
        chosen = score.topk(8).indices
        return self.still(torch.zeros_like(x).index_copy(0, chosen, self.moved(x.index_select(0, chosen))))


@pytest.mark.parametrize("how", ["sorted", "masked", "top-k"])
@pytest.mark.parametrize("lr", [0.0, 10.0])
def test_rows_in_another_order_are_not_compared(how: str, lr: float, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Sorting(how))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(16, 4)
    path = tmp_path / "a.jsonl"
    with fastfs.Monitor(
        model, optimizer, layers=["0"], every=1, details=True, rows=None, path=path, alerts=(), verbose=False
    ):
        model(x).square().mean().backward()
        with torch.no_grad():
            model[0].score.weight.grad = torch.full((1, 4), lr) * torch.tensor([1.0, -2.0, 3.0, -4.0])
        optimizer.step()
    table = fastfs.monitor.load_details(path)
    motions = table[table["quantity"].isin(["own_motion", "inherited_motion"])].set_index("name")
    changed = {"the step has changed which rows the matrix is applied to"}
    assert set(motions.loc["0.moved.weight", "why"]) == (changed if lr else {None})
    assert set(motions.loc["0.still.weight", "why"]) == (changed if lr else {None})
    assert motions.loc["0.score.weight", "why"].isna().all()
    assert table[table["quantity"] == "weight_alignment"]["value"].notna().all()


def test_steps_in_the_backward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = mlp()
    own = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def step_now(p: Any) -> None:
        own[p].step()
        own[p].zero_grad()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step_now)
    before = [p.detach().clone() for p in model.parameters()]
    x, y = rows(0)
    path = tmp_path / "a.jsonl"
    with fastfs.Monitor(
        model, list(own.values()), every=1, details=True, rows=None, path=path, alerts=(), verbose=False
    ):
        F.cross_entropy(model(x), y).backward()
    table = fastfs.monitor.load_details(path)
    found = table[table["name"] == "0.weight"].set_index("quantity")["value"]
    if found.notna().any():  # else there is a reason
        w, dw = before[0].double(), (model[0].weight.detach() - before[0]).double()
        want = (x.double() @ dw.t()).norm() / (x.double() @ w.t()).norm()
        assert found["own_motion"] == pytest.approx(want.item(), rel=1e-5)
    assert (table["value"].notna() | table["why"].notna()).all()


def test_a_failure_costs_the_details_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("made up")

    monkeypatch.setattr(LayerCalls, "activation", fail)
    with pytest.warns(RuntimeWarning, match=r"has no details: .*ZeroDivisionError: made up"):
        table, _ = trained(mlp(), torch.randn(16, 8), tmp_path / "a.jsonl")
    assert table["why"].str.contains("ZeroDivisionError: made up").all()
    assert table["step"].tolist() == [0, 1]
    assert set(table["name"]) == {""}
    rows_of_layers = fastfs.load(tmp_path / "a.jsonl")
    assert rows_of_layers["valid"].all()
    assert len(rows_of_layers) == 2 * 3
