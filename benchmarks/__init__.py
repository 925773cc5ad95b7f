"""Benchmarks of SSync, dense alignment and the neighboring methods."""

import os

# before torch is imported: compile in this process, and do not log the profiler
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
