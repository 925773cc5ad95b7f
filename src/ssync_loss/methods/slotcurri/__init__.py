"""SlotCurri: the structure of features, a curriculum of slots, cyclic inference."""
