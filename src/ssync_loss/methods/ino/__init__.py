"""INO: affinity consistency, centered cross-entropy and the losses that use it, label propagation."""
