"""Judging a network on labelled images, lists and videos, by any number of ranks; the measures are in eval."""
