"""Looking at a network: where it attends, what its patches hold, which images it finds alike."""
