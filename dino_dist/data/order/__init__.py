"""Which samples stand where in the stream: epochs, mixtures, selections, the share of a rank."""
