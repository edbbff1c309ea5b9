"""Tests in Triton's interpreter: `make test-triton`. Triton decides when a kernel is defined whether it is compiled or
interpreted, so these tests run in a process of their own, and any other process passes them over."""

from polymoe.backends.triton import INTERPRETED

if INTERPRETED:
    from polymoe.testing.triton_interpreter import repair

    repair()
else:
    collect_ignore_glob = ["*"]
