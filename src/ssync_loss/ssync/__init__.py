"""SSync. Read ``labels``, ``merging``, ``regions``, ``distillation`` and ``modules`` in this order.

The first four are the method in plain torch. ``engines`` compute it faster. ``functions`` check arguments and
choose an engine. ``reference`` is the method in loops. ``adaptive`` chooses the form of the loss with ``fit``.
"""
