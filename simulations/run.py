"""One simulated run, from configuration to report: the order of events, and nothing else.

    1. build the federation; make the manifest, or read the one of the run that is resumed
    2. the round loop over a cohort: in this process, or Flower's on Ray
    3. the test file, once; the adapter; the summary; the report

Everything that a later reader needs lies in the run's folder; the report reads only files.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
