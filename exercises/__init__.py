"""A package only so that conftest.py here and the one in tests/ have different names."""
