"""The benchmark: headwise beside its peers, checked, then timed in turn."""

from headwise.bench.operators import all_peers, bench_shape, judged, select_peers
from headwise.bench.presets import PRESETS, Preset, select_shapes
from headwise.bench.results import LeftOut, Report, ShapeResult, Timed

__all__ = [
    "PRESETS",
    "LeftOut",
    "Preset",
    "Report",
    "ShapeResult",
    "Timed",
    "all_peers",
    "bench_shape",
    "judged",
    "select_peers",
    "select_shapes",
]
