"""Tar shards: which there are, what lies where in them."""
