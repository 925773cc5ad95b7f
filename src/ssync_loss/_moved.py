"""Import paths of earlier versions. An old path is a module with the names of the modules that replaced it."""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

# old path and new paths, below `ssync_loss`
MOVED = {
    "attention.correlation": "methods.smtc.attention.correlation",
    "attention.semantic": "methods.smtc.attention.semantic",
    "curriculum.allotment": "methods.slotcurri.curriculum.allotment",
    "curriculum.children": "methods.slotcurri.curriculum.children",
    "curriculum.controller": "methods.slotcurri.curriculum.controller",
    "curriculum.error": "methods.slotcurri.curriculum.error",
    "curriculum.moments": "methods.slotcurri.curriculum.moments",
    "curriculum.schedule": "methods.slotcurri.curriculum.schedule",
    "distillation": "ssync.distillation ssync.functions ssync.settings",
    "inference": "methods.slotcurri.inference",
    # pickles of earlier versions need this path
    "losses._modules": "_module",
    "kernels": "ssync.engines.triton",
    "losses.affinity": "methods.ino.affinity",
    "losses.boundary": "ssync.functions ssync.modules",
    "losses.centered": "methods.ino.centered",
    "losses.dense": "methods.srl.dense",
    "losses.diversity": "methods.smtc.diversity",
    "losses.instance": "methods.smtc.instance",
    "losses.interior": "ssync.functions ssync.modules",
    "losses.masked_tokens": "methods.ino.masked_tokens",
    "losses.out_generative": "methods.ino.out_generative",
    "losses.prototypes": "methods.ino.prototypes",
    "losses.redundancy": "methods.srl.redundancy",
    "losses.semantic": "methods.smtc.semantic",
    "losses.ssync": "ssync.modules ssync.types",
    "losses.structure": "methods.slotcurri.structure",
    "losses.temporal": "methods.srl.temporal",
    "merging": "ssync.merging",
    "pseudo_labels": "ssync.labels ssync.functions",
    "propagation": "methods.ino.propagation",
    "reference.dense": "methods.srl.reference",
    "reference.ino": "methods.ino.reference",
    "reference.slotcurri": "methods.slotcurri.reference",
    "reference.smtc": "methods.smtc.reference",
    "reference.ssync": "ssync.reference",
    "regions": "ssync.regions",
    "sinkhorn": "methods.smtc.sinkhorn",
    "tube_mask": "methods.ino.tube_mask",
}

PACKAGE = __name__.partition(".")[0]


class _Moved(MetaPathFinder, Loader):
    """Finds old paths only."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 (the import system passes both)
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> ModuleSpec | None:
        package, _, old = fullname.partition(".")
        if package != PACKAGE or old not in MOVED:
            return None
        return ModuleSpec(fullname, self, is_package=any(one.startswith(f"{old}.") for one in MOVED))

    def exec_module(self, module: ModuleType) -> None:
        # the old module keeps its name, file and loader
        own = set(vars(module))
        places = MOVED[module.__name__.partition(".")[2]].split()
        module.__doc__ = f"Moved to {', '.join(f'{PACKAGE}.{one}' for one in places)}."
        for place in places:
            names = vars(import_module(f"{PACKAGE}.{place}"))
            vars(module).update({name: one for name, one in names.items() if name not in own})


_finder = _Moved()


def install() -> None:
    """Let old paths be imported; a second call changes nothing."""
    if _finder not in sys.meta_path:
        # before all other finders, which would import a folder that an update left behind
        sys.meta_path.insert(0, _finder)
