"""The networks: a vision transformer over packed crops, its attention backends, and the DINO head."""
