"""The benchmark: headwise beside its peers, checked, then timed in turn."""

from headwise.bench.operators import bench_shape
from headwise.bench.results import Report
from headwise.bench.suites import Settings, bench_machine, bench_models, bench_operators

__all__ = [
    "Report",
    "Settings",
    "bench_machine",
    "bench_models",
    "bench_operators",
    "bench_shape",
]
