"""INO: affinity consistency, centered cross-entropy and what is built on it, label propagation."""
