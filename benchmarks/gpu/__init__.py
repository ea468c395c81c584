"""The parts of benchmarks/gpu.sh: `python -m benchmarks.gpu PART`."""
