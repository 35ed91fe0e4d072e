"""Published figures of one GPU per architecture, and what follows from them.

That is the occupancy, the bytes that must be in flight, and the instructions that there is time for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

SOURCES = {
    "multiprocessors, clock, bandwidth": "NVIDIA's data sheets of A100 80GB SXM, H100 SXM, B200 and GeForce RTX 5090",
    "limits of a multiprocessor": "CUDA C++ Programming Guide, technical specifications per compute capability",
    "results per clock": "CUDA C++ Programming Guide, throughput of native arithmetic instructions; doubles agree with "
    "the peak rates of the data sheets; conversions to double are taken as 16 (2 on 12.0) throughout, the low figure",
    "latency of memory": "400 cycles idle (table 3 of doi:10.1016/j.ultsonch.2023.106546, for A100 and H100); 1000 "
    "cycles as the high figure (given for Hopper in a summary of arXiv:2512.02189). None is at hand for B200 and "
    "RTX 5090",
}
LATENCY_CYCLES = (400, 1000)
REGISTERS, ISSUE, WARP = 65536, 128, 32  # of a multiprocessor; lane-instructions per clock


@dataclass(frozen=True)
class Architecture:
    """Limits of a multiprocessor (shared memory in bytes), the GPU's figures, and results per clock and multiprocessor.

    Results are counted for float32; compare, logic and integers; float64; conversion to double.
    """

    name: str
    gpu: str
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    warps: int
    blocks: int
    shared: int
    shared_of_block: int
    fp32: int
    alu: int
    fp64: int
    convert: int

    @property
    def bytes_per_clock(self) -> float:
        """Of one multiprocessor, at the full bandwidth of memory."""
        return self.gigabytes_per_second / self.gigahertz / self.multiprocessors

    def resident(self, threads: int, registers: int, shared: int) -> int:
        """The number of blocks that fit on a multiprocessor.

        Registers are allocated to warps, 256 at a time, on four partitions. A block takes its shared memory and 1 KB.
        """
        warps = -(-threads // WARP)
        if shared > self.shared_of_block:
            return 0
        of_warp = -(-registers * WARP // 256) * 256
        by_registers = 4 * (REGISTERS // 4 // of_warp) // warps
        by_shared = self.shared // (-(-shared // 128) * 128 + 1024)
        return min(by_registers, by_shared, self.warps // warps, self.blocks)

    def needed_bytes(self) -> list[int]:
        """That must be in flight on a multiprocessor (Little's law), at the low and the high figure of the latency."""
        return [round(self.bytes_per_clock * cycles) for cycles in LATENCY_CYCLES]

    def shares(self, per_element: dict[str, float], bytes_of_element: int) -> dict[str, float]:
        """Of what each pipe (and the issue of instructions) can do while an element comes from memory."""
        elements = self.bytes_per_clock / bytes_of_element
        rates = {"fp32": self.fp32, "alu": self.alu, "fp64": self.fp64, "convert": self.convert}
        shares = {pipe: per_element[pipe] * elements / rate for pipe, rate in rates.items()}
        shares["issue"] = sum(per_element.values()) * elements / ISSUE
        return {name: round(share, 3) for name, share in shares.items()}

    def described(self) -> dict[str, Any]:
        """For the result file."""
        return {**asdict(self), "bytes needed in flight": self.needed_bytes()}


KB = 1024
ARCHITECTURES = {
    "80": Architecture("80", "A100 80GB SXM", 108, 1.41, 2039, 64, 32, 164 * KB, 163 * KB, 64, 64, 32, 16),
    "90": Architecture("90", "H100 SXM", 132, 1.98, 3350, 64, 32, 228 * KB, 227 * KB, 128, 64, 64, 16),
    "100": Architecture("100", "B200", 148, 1.965, 8000, 64, 32, 228 * KB, 227 * KB, 128, 64, 64, 16),
    "120": Architecture("120", "GeForce RTX 5090", 170, 2.41, 1792, 48, 24, 100 * KB, 99 * KB, 128, 64, 2, 2),
}
