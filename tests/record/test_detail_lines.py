"""Lines of details in files: the schema, sinks, readers, and runs that were resumed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import fastfs
from fastfs._record.detail_columns import DETAIL_COLUMNS, DETAIL_FIELDS, DETAILS
from fastfs._record.record import Record, as_rows
from fastfs._record.schema import Checker
from fastfs._record.sinks.jsonl_sink import JsonlSink
from fastfs._report.page import write_page
from tests.helpers.detail_cases import mixtral, text
from tests.helpers.record_cases import head

ENTRIES: dict[str, list[Any]] = {
    "name": ["blocks.0.weight", "blocks.0.attention"],
    "quantity": ["own_motion", "attention_logit_max"],
    "index": [None, 3],
    "value": [0.5, None],
    "standard_error": [0.1, None],
    "why": [None, "not known"],
}


def line(**changes: Any) -> dict[str, Any]:
    return {"kind": DETAILS, "run": "a", "step": 1, "time": 1.0, "entries": {**ENTRIES, **changes}}


def checked(given: dict[str, Any]) -> Any:
    checker = Checker()
    checker.check(head())
    return checker.check(given)


def test_a_line_conforms() -> None:
    assert list(ENTRIES) == [field.name for field in DETAIL_FIELDS]
    assert checked(line()).kind == DETAILS
    assert checked(line(**{name: [] for name in ENTRIES})).line["entries"]["name"] == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ["a"]}, "entries: expected lists of one length"),
        ({"why": None}, "entries: expected lists of one length"),
        ({"value": [0.5, "x"]}, "value: expected a number, got 'x'"),
        ({"value": [0.5, True]}, "value: expected a number, got True"),
        ({"index": [None, -1]}, "entries: index: expected integers >= 0, got -1"),
        ({"index": [None, 1.5]}, "entries: index: expected integers >= 0, got 1.5"),
        ({"name": ["a", None]}, "name: expected a string, got None"),
        ({"quantity": ["a", 1]}, "quantity: expected a string, got 1"),
    ],
)
def test_a_line_that_does_not_conform(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checked(line(**changes))


def test_entries_are_needed_and_layers_are_none() -> None:
    with pytest.raises(ValueError, match="entries: expected lists by name, got None"):
        checked({key: value for key, value in line().items() if key != "entries"})
    with pytest.raises(ValueError, match="layers: does not belong to a line of kind details"):
        checked({**line(), "layers": {}})


def test_functions_get_the_entries_in_one_row() -> None:
    (row,) = as_rows(Record(DETAILS, 1, 1.0, {}, ENTRIES), head())
    assert row == line()


def trained(path: Path, saved: dict[str, Any] | None = None, until: int = 6, **settings: Any) -> dict[str, Any]:
    """Trains to a step; returns what another training can go on from."""
    torch.manual_seed(0)
    model: Any = mixtral()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with fastfs.Monitor(
        model, optimizer, every=2, details=True, path=path, alerts=(), verbose=False, **settings
    ) as monitor:
        if saved is not None:
            model.load_state_dict(saved["model"])
            monitor.load_state_dict(saved["monitor"])
        for step in range(monitor.step, until):
            tokens, targets = text(step, 2)
            optimizer.zero_grad()
            F.cross_entropy(model(input_ids=tokens).logits.flatten(0, -2), targets.flatten()).backward()
            optimizer.step()
        return {"model": copy.deepcopy(model.state_dict()), "monitor": monitor.state_dict()}


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_repeated_steps_of_a_resumed_run(name: str, tmp_path: Path) -> None:
    saved = trained(tmp_path / "first.jsonl", until=2)
    trained(tmp_path / "whole.jsonl")
    path = tmp_path / name
    saved = trained(path, until=2)
    trained(path, saved, until=4)  # killed after it, and started again from the same state
    trained(path, saved)
    table, whole = fastfs.monitor.load_details(path), fastfs.monitor.load_details(tmp_path / "whole.jsonl")
    assert set(table["step"]) == {0, 2, 4}
    assert table["run"].nunique() == 1
    assert list(table.columns) == ["run", "step", "time", *(field.name for field in DETAIL_FIELDS)]
    columns = ["step", "name", "quantity", "index", "why"]
    assert table[columns].equals(whole[columns])
    assert np.allclose(table["value"], whole["value"], equal_nan=True)
    assert table.dtypes.map(str).to_dict()["value"] == "float64"


def test_a_record_without_details(tmp_path: Path) -> None:
    sink = JsonlSink(tmp_path / "a.jsonl")
    sink.open(head())
    sink.close()
    table = fastfs.monitor.load_details(tmp_path / "a.jsonl")
    assert len(table) == 0
    assert list(table.columns) == ["run", "step", "time", *(field.name for field in DETAIL_FIELDS)]


def test_tables_and_pages_of_a_record_with_details(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    trained(path, quantiles=(0.5,), groups={"all": "layers"})
    kinds = [json.loads(each)["kind"] for each in path.read_text().splitlines()]
    assert kinds == ["header", "structure", "measured", "details", "measured", "details", "measured", "details"]
    table = fastfs.load(path)
    layers = table[~table["group"]]
    for column in DETAIL_COLUMNS:
        assert table[column.name].dtype == np.float64
        if "motion" not in column.name:  # the step has changed which tokens an expert has
            assert layers[column.name].notna().all()
        assert table[table["group"]][column.name].isna().all()
    details = fastfs.monitor.load_details(path)
    for name, column in (("attention_logit_max", "value"), ("expert_load_max", "value")):
        own = details[(details["quantity"] == name) & details["name"].str.startswith("model.layers.1.")]
        by_step = own.groupby("step")[column].max()
        assert by_step.tolist() == layers[layers["name"] == "model.layers.1"][name].tolist()
    page = tmp_path / "a.html"
    write_page(path, page)
    assert "Attention logit" in page.read_text()
