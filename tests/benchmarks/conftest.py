"""`benchmarks` is not installed: its folder's parent is appended to the path, so that it shadows nothing."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))
