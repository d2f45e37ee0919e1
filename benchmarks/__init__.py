"""Benchmarks of protofast: the harness is `protofast.bench`, results lie in ``results/``."""
