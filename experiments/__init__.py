"""Measurements that are not part of the method: `python -m experiments.bench` and what else stands here."""
