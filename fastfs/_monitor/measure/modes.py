"""The capture modes by name.

batch   f(w + dw) - f(w) on the rows of the training batch: one more forward
jvp     the derivative of f along dw on the same rows, exact to first order: one more forward, in forward mode
probe   f(w + dw) - f(w) on a batch that the user gives: forward, backward, forward
"""

from __future__ import annotations

from fastfs._monitor.measure.batch_modes import AmplifiedMode, BatchMode
from fastfs._monitor.measure.capture_mode import CaptureMode
from fastfs._monitor.measure.jvp_mode import JvpMode
from fastfs._monitor.measure.probe_mode import ProbeMode

__all__ = ["MODES", "find_mode"]

MODES: dict[str, type[CaptureMode]] = {"batch": BatchMode, "probe": ProbeMode, "jvp": JvpMode}
"""The modes that ``Monitor(mode=...)`` accepts."""


def find_mode(name: str, amplify: bool) -> type[CaptureMode]:
    """Returns the class of a mode; ``amplify`` selects the variant of batch mode that enlarges the update."""
    return AmplifiedMode if amplify else MODES[name]
