"""Making shards and checking them, before a run."""
