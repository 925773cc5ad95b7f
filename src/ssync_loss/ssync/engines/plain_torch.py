"""Engine ``"torch"``: the files of :mod:`ssync_loss.ssync`, on any device and under any compiler."""

from ssync_loss.ssync.distillation import distill
from ssync_loss.ssync.engines.contract import Engine
from ssync_loss.ssync.labels import find_labels, find_slots


class TorchEngine(Engine):
    """Plain torch."""

    pseudo_labels = staticmethod(find_labels)
    distill = staticmethod(distill)
    slot_labels = staticmethod(find_slots)
