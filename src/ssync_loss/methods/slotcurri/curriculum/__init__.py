"""A curriculum of slots: training begins with few slots, and later copies slots with large errors."""
