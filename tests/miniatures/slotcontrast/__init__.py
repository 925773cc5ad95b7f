"""SlotContrast and its forks in small: a package with ``models``, ``losses`` and ``train``, as theirs."""
