"""A miniature of SlotContrast and its forks: a package with their modules ``models``, ``losses`` and ``train``."""
