"""Shards behind a URL: how they are asked for, and what goes wrong there."""
