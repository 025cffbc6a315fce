"""Batches ahead of time: a process with threads beside each rank, and the buffer between the two."""
