"""The head that turns tokens into cosines with prototypes."""

from itertools import pairwise

import torch
from torch import Tensor, nn

from ssync_loss._autocast import at_least_float32, no_autocast
from ssync_loss._autograd import savable
from ssync_loss._checks import check_int
from ssync_loss._inputs import check_rows
from ssync_loss._vectors import directions, products


class PrototypeHead(nn.Module):
    """Map tokens to their cosines with learned prototypes, the logits of the losses with a center.

    ``cosines = unit(mlp(x)) unit(prototypes)^T`` within [-1, 1]. ``mlp`` is linear layers from C channels over
    ``hidden`` to ``bottleneck`` with GELU between them. The lengths of prototypes do not matter (weight normalization
    with a gain of 1). One head serves the class tokens and the patches of a network; the teacher needs a second head.
    Autocast applies to the layers; cosines are float32, or float64 if the layers are. If the layers return 0, all
    cosines are 0 and there is no gradient.

    ``forward(x)``, (..., C) -> (..., Kp); compiles to one graph.

    Args:
        C: channels of a token.
        Kp: number of prototypes.
        hidden: channels between layers.
        bottleneck: channels that are normalized.
        layers: linear layers before the prototypes, at least 1.

    Source: Caron et al., ICCV 2021 (arXiv:2104.14294); Pan et al., ACM MM 2022 (arXiv:2203.15312).
    Raises: TypeError on a wrong dtype, ValueError on wrong shapes or settings.

    >>> head = PrototypeHead(2, Kp=3, bottleneck=2, layers=1)
    >>> with torch.no_grad():
    ...     _ = head.mlp[0].weight.copy_(torch.eye(2))
    ...     _ = head.prototypes.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]))
    ...     print(head(torch.tensor([3.0, 4.0])))
    tensor([ 0.6000,  0.8000, -0.6000])
    """

    def __init__(self, C: int, *, Kp: int = 4096, hidden: int = 2048, bottleneck: int = 256, layers: int = 3) -> None:
        super().__init__()
        for name, value in (("C", C), ("Kp", Kp), ("hidden", hidden), ("bottleneck", bottleneck), ("layers", layers)):
            check_int(name, value, 1)
        self.in_features = C
        self.mlp = nn.Sequential()
        for width, next_width in pairwise([C, *[hidden] * (layers - 1), bottleneck]):
            if len(self.mlp):
                self.mlp.append(nn.GELU())
            self.mlp.append(nn.Linear(width, next_width))
        self.prototypes = nn.Parameter(torch.empty(Kp, bottleneck))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights with a standard deviation of 0.02; biases are 0."""
        for name, one in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(one)
            else:
                nn.init.trunc_normal_(one, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Return the cosines of tokens (..., C) with the prototypes, (..., Kp)."""
        check_rows("x", x, "C", self.in_features, prototypes=self.prototypes)
        # the layers get tokens of the weights' type; autocast may then use half precision
        projected = self.mlp(savable(x).to(next(self.mlp.parameters()).dtype))
        with no_autocast(x):
            tokens, _ = directions(at_least_float32(projected))
            prototypes, _ = directions(at_least_float32(self.prototypes))
            # tokens in one list, as `products` does not broadcast
            cosines = products(tokens.reshape(-1, tokens.shape[-1]), prototypes)
            return cosines.view(*x.shape[:-1], len(self.prototypes))

    def extra_repr(self) -> str:
        """Show the number of prototypes."""
        return f"Kp={len(self.prototypes)}"
