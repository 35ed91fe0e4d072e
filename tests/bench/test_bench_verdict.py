"""The words of `fastfs bench` on invented results: numbers, troubles with their causes, and the conclusion."""

from __future__ import annotations

from typing import Any

from fastfs._bench import ceilings, quick
from fastfs._bench.comparison import COMPILE, EAGER, HAND, NORMS, OURS
from fastfs._bench.verdict import conclusion, troubles, verdict


def invented(*, ours: float = 0.96, no_core: str | None = None, **environment: Any) -> dict[str, Any]:
    """Return a result with a streaming read of 100 GB/s."""
    rows = [{"implementation": ceilings.READ, "GB/s": 100.0, "of ceiling": 1.0, "fastfs is faster by": ours}]
    rates = {OURS: (100 * ours, 1.0), EAGER: (2.0, 48.0), HAND: (5.0, 19.2), COMPILE: (60.0, 1.6), NORMS: (80.0, 1.2)}
    if no_core:
        del rates[OURS]
    for name, (rate, faster) in rates.items():
        rows.append(
            {
                "implementation": name,
                "GB/s": rate,
                "of ceiling": rate / 100,
                "fastfs is faster by": None if no_core else faster,
            }
        )
    cases: list[dict[str, Any]] = [
        {"kind": kind, "dtype": dtype, "rows": rows, "left out": {}}
        for kind in quick.KINDS
        for dtype in ("float32", "bfloat16")
    ]
    core = {
        "instruction_set": "avx2",
        "instruction_sets": ["generic", "avx2"],
        "compiler": "12.2",
        "openmp": True,
        "cuda": None,
    }
    return {
        "environment": {"core": None if no_core else core, "threads": 2, "cores": 2, **environment},
        "load": 0.1,
        "no core": no_core,
        "overhead": {} if no_core else {"1": 6.0, "100": 39.66},
        "results": cases,
    }


def test_the_verdict_tells_the_numbers() -> None:
    result = invented()
    text = " ".join(verdict(result))
    assert "reads at 0.96 (float32, 96 GB/s) and 0.96 (bfloat16, 96 GB/s) of what this memory allows" in text
    assert "Many small layers: 0.96" in text
    assert "Sums per row: 0.96" in text
    assert "Against the eager reference: 48.0x as fast." in text
    assert "Against torch.compile: 1.6x as fast." in text
    assert "A call costs 6.0 us, and 0.34 us for each further layer." in text
    assert "avx2 loops, compiler 12.2." in text
    assert troubles(result) == []


def test_a_range_is_told_where_there_is_one() -> None:
    result = invented()
    result["results"][0] = {
        **result["results"][0],
        "rows": [{**row, "fastfs is faster by": 3.0} for row in result["results"][0]["rows"]],
    }
    assert "Against torch.compile: 1.6x to 3.0x as fast." in verdict(result)


def test_troubles_have_their_cause() -> None:
    result = invented(ours=0.5)
    (text,) = troubles(result)
    assert text.startswith("Less than 0.85 of what the memory allows (one layer, float32: 0.50;")
    assert "busy" not in text
    assert "the machine was busy (load 3.0 on 2 cores" in troubles({**result, "load": 3.0})[0]
    assert "8 threads on 2 cores" in troubles(invented(ours=0.5, threads=8))[0]
    core = {**result["environment"]["core"], "openmp": False, "instruction_set": "generic"}
    found = troubles(invented(core=core))
    assert any("without OpenMP" in text for text in found)
    assert any("generic loops" in text for text in found)
    assert troubles(invented(core=core, device="a GPU")) == []


def with_speedup(result: dict[str, Any], name: str, value: float) -> dict[str, Any]:
    """Return the result with another speedup of fastfs over an implementation in its last case."""
    last = result["results"][-1]
    rows = [{**row, "fastfs is faster by": value} if row["implementation"] == name else row for row in last["rows"]]
    return {**result, "results": [*result["results"][:-1], {**last, "rows": rows}]}


def test_the_conclusion_says_what_is_slow_and_what_to_do() -> None:
    good = "Verdict: ok. It reads at 0.85 of the memory's speed or more, and nothing is faster."
    assert conclusion(invented()) == good
    assert conclusion(with_speedup(invented(), NORMS, 0.98)) == good
    slow = conclusion(invented(ours=0.5))
    assert slow.startswith(
        "Verdict: slow: it reads at 0.50 of the memory's speed (one layer, float32). Run it again on an"
    )
    beaten = conclusion(with_speedup(invented(), NORMS, 0.8))
    assert f"Verdict: slow: {NORMS} is 1.25 times as fast (per row, bfloat16)." in beaten
    assert "Set OMP_NUM_THREADS=2." in conclusion(invented(ours=0.5, threads=8))
    assert "nothing else uses the GPU" in conclusion(invented(ours=0.5, device="a GPU"))
    assert "there is no native core" in conclusion(invented(no_core="it is not there"))
    result = invented()
    for case in result["results"]:
        case["rows"] = [row for row in case["rows"] if row["implementation"] != COMPILE]
    assert conclusion(result) == f"{good} torch.compile was not compared."


def test_who_was_left_out_is_a_trouble() -> None:
    result = invented()
    result["results"][1] = {**result["results"][1], "left out": {COMPILE: "no compiler"}}
    assert troubles(result) == ["torch.compile was left out: no compiler (one layer, bfloat16)"]
    for measured in result["results"]:
        measured["left out"] = {COMPILE: "no compiler"}
    assert troubles(result) == ["torch.compile was left out: no compiler"]


def test_without_core_there_are_only_rates() -> None:
    result = invented(no_core="it is not there")
    assert (
        verdict(result)[0]
        == "GB/s of one layer, float32: eager (reference) 2.0, eager by hand 5.0, torch.compile 60.0."
    )
    assert troubles(result)[0].endswith("no native core: it is not there")
