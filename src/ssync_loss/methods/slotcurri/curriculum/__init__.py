"""A curriculum of slots: few at first, then clones of those that reconstruct worst."""
