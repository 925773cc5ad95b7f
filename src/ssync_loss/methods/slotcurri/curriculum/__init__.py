"""A curriculum of slots: training begins with few slots, then adds copies of those with the largest error."""
