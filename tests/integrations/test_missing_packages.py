"""Without their packages, callbacks say which extra installs them; the rest of fastfs does not need them."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import sys

for name in ("accelerate", "lightning", "pytorch_lightning", "torchtitan", "transformers"):
    sys.modules[name] = None  # as if it were not installed
import fastfs.integrations

print(fastfs.integrations.watch_torchtitan.__name__)
for name in ("FastfsCallback", "LightningCallback"):
    try:
        getattr(fastfs.integrations, name)
    except ImportError as error:
        print(error)
"""


def test_the_error_names_the_extra() -> None:
    found = subprocess.run([sys.executable, "-c", CODE], check=True, capture_output=True, text=True).stdout
    assert found.splitlines() == [
        "watch_torchtitan",
        'fastfs.integrations.FastfsCallback needs transformers and accelerate: pip install "fastfs[huggingface]"',
        'fastfs.integrations.LightningCallback needs lightning: pip install "fastfs[lightning]"',
    ]
