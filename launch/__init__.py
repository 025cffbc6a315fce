"""The command line and the processes it starts; nothing in `dino_dist` imports this package."""
