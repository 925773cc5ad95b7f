"""SSync, to be read in this order: ``labels``, ``merging``, ``regions``, ``distillation``, ``modules``.

The first four are the method in plain torch. ``engines`` compute the same faster, ``functions`` check what a user gives
and choose an engine, ``reference`` is the method in loops. ``adaptive`` asks, by ``fit``, which form of the loss a
model's features allow.
"""
