"""The page of TensorBoard that has a chart for each quantity, read by its own plugin."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext

from fastfs.monitor import TensorBoardSink
from tests.helpers.record_cases import LAYERS, head, measured


@pytest.mark.parametrize("groups", [{}, {"a.b": LAYERS, "c|d": LAYERS}])
def test_tensorboard_has_a_chart_of_all_layers_for_each_quantity(tmp_path: Path, groups: Any) -> None:
    for name, steps in (("run", 3), ("none", 1)):
        sink = TensorBoardSink(tmp_path / name, layout=name == "run")
        sink.open(head(groups=groups))
        sink.write([measured(step, groups=len(groups)) for step in range(steps)])
        sink.close()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a package in TensorBoard
        from tensorboard.plugins.custom_scalar.custom_scalars_plugin import CustomScalarsPlugin
        from tensorboard.plugins.scalar.scalars_plugin import ScalarsPlugin
    multiplexer = EventMultiplexer(tensor_size_guidance={"custom_scalars": 0})
    multiplexer.AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(tmp_path))
    plugins: dict[str, Any] = {}
    context = TBContext(logdir=str(tmp_path), data_provider=provider, plugin_name_to_instance=plugins)
    plugins["scalars"] = ScalarsPlugin(context)
    plugin = CustomScalarsPlugin(context)
    layout = json.loads(plugin.layout_impl(RequestContext(), ""))
    categories = {each["title"]: each["chart"] for each in layout["category"]}
    assert list(categories) == ["fastfs: layers", *(["fastfs: groups"] if groups else [])]
    titles = [chart["title"] for chart in categories["fastfs: layers"]]
    assert titles[:3] == ["Angle", "Speed", "Relative update"]
    for title, names in (("fastfs: layers", LAYERS), *([("fastfs: groups", list(groups))] if groups else [])):
        (pattern,) = categories[title][0]["multiline"]["tag"]
        found = plugin.scalars_impl(RequestContext(), "run", pattern, "")
        assert found["regex_valid"]
        assert sorted(found["tag_to_events"]) == sorted(f"fastfs/angle/{name}" for name in names)
        assert all(len(events) == 3 for events in found["tag_to_events"].values())
