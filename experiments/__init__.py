"""Measurements that are not part of the method: `python -m experiments.bench`, and others."""
