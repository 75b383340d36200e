"""The benchmark: headwise beside its peers, checked, then timed in turn."""

from headwise.bench.operators import bench_shape, judged
from headwise.bench.peers import all_peers, select_peers
from headwise.bench.presets import PRESETS, Preset, select_shapes
from headwise.bench.results import LeftOut, ModelResult, Report, ShapeResult, Timed
from headwise.bench.suites import Settings, bench_machine, bench_models, bench_operators

__all__ = [
    "PRESETS",
    "LeftOut",
    "ModelResult",
    "Preset",
    "Report",
    "Settings",
    "ShapeResult",
    "Timed",
    "all_peers",
    "bench_machine",
    "bench_models",
    "bench_operators",
    "bench_shape",
    "judged",
    "select_peers",
    "select_shapes",
]
