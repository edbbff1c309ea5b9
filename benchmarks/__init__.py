"""Microbenchmarks: one module per op, each run as `python -m benchmarks.bench_<op>`."""
