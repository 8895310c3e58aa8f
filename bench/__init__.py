"""Benchmarks: this server beside what people would use instead. See __main__.py."""
