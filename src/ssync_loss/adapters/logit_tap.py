"""The exact pre-softmax dots of slot attention, from forward hooks on two projections."""

from math import log
from typing import Any, Literal, TypeAlias, get_args

from einops import rearrange
from torch import Tensor, nn

from ssync_loss._autocast import no_autocast
from ssync_loss._checks import check_choice, check_int, check_number
from ssync_loss._inputs import widest
from ssync_loss.adapters._tap import Held, Tap, count

HeadSoftmax: TypeAlias = Literal["per_head", "joint"]
HEAD_SOFTMAXES = get_args(HeadSoftmax)


class LogitTap(Tap):
    """Rebuild the pre-softmax dots of the last attention iteration of every frame.

    With q and k what the two projections give, a frame's map is ``scale * q @ k^T``. One call of the key
    projection is one frame, and the last call of the query projection before the next key call is its last
    iteration, so a first frame with more iterations needs no setting. Some hosts need one:

    - All frames share one key call, (B, T, N, D), and one query call is one iteration of one frame:
      ``frames_in_key=True``. Every frame then has as many queries, or, with ``iterations``, that many, and the first
      frame what is left. Give ``iterations`` where the first frame has more: the total may happen to divide by T.
    - Frames are flattened into the batch, (B*T, N, D): ``pop(num_frames=T)``. Frames side by side,
      (B, T, S, D) and (B, T, N, D) in one call each, need nothing.
    - There are several heads, D = heads * dim_head. Their maps become one, whose softmax over slots is the host's
      attention: with a softmax of each head (``"per_head"``) the mean over heads,
      ``logsumexp_h(log_softmax_s(dots)) - log(heads)``, with one over slots and heads (``"joint"``) the sum,
      ``logsumexp_h(dots)``. These are no dots, and more slots merge: choose a threshold anew.

    A tap must see one forward at a time. With ``host``, the module whose call covers whole clips, it keeps what its
    last call made. What runs outside of a call is not kept, and then `pop` refuses: its map may be of an older forward.
    `SlotMaps.join` with the decoder's tap allows what runs after the decoder. The host must be called, ``host(...)``:
    where a step calls the model's ``forward`` or another method, name the module that the step does call; `pop` says
    which. Without a host, ``num_frames`` keeps that many frames, the last ones. Without either, ``pop()`` or
    ``reset()`` must follow every forward; leftovers are an error or a warning where they can be told from frames. Until
    then the tap holds what the projections gave, and the graph.

    Attach before the first call of a compiled model. What activation checkpointing computes again is ignored; with
    ``use_reentrant=True`` maps carry no gradient, and with ``fullgraph=True`` torch's compiler refuses it around what
    is tapped. Copies of a host are not tapped. Replicas of ``nn.DataParallel`` would all write to one tap.

    Args:
        query_projection: the module whose output is q, (B, S, D).
        key_projection: the module whose output is k, (B, N, D).
        scale: the factor of q k^T, above 0. Read it from the host: versions of one host differ.
        heads: number of heads, the outer part of D.
        head_softmax: ``"per_head"`` or ``"joint"``.
        frames_in_key: whether one key call holds all frames.
        iterations: queries of each frame but the first, with ``frames_in_key``.
        host: the module whose call starts the tap afresh and ends it; contains both projections.
        num_frames: in place of ``host``, T of what is popped: the tap keeps no more; 1 if frames are flattened.

    Raises: TypeError on an argument of another type; ValueError on a setting out of range, or a host that does not
        contain the projections.

    >>> import torch
    >>> to_q, to_k = nn.Identity(), nn.Identity()
    >>> tap = LogitTap(to_q, to_k, scale=0.5)
    >>> for patch in (1.0, 3.0):
    ...     _ = to_k(torch.tensor([[[patch]]]))
    ...     for slots in ([[[9.0], [9.0]]], [[[2.0], [4.0]]]):
    ...         _ = to_q(torch.tensor(slots))
    >>> tap.pop().tolist()
    [[[[1.0], [2.0]], [[3.0], [6.0]]]]
    """

    def __init__(
        self,
        query_projection: nn.Module,
        key_projection: nn.Module,
        scale: float,
        *,
        heads: int = 1,
        head_softmax: HeadSoftmax = "per_head",
        frames_in_key: bool = False,
        iterations: int | None = None,
        host: nn.Module | None = None,
        num_frames: int | None = None,
    ) -> None:
        check_number("scale", scale, 0.0, open_low=True)
        check_int("heads", heads, 1)
        check_choice("head_softmax", head_softmax, HEAD_SOFTMAXES)
        if iterations is not None:
            check_int("iterations", iterations, 1)
            if not frames_in_key:
                raise ValueError(f"`iterations` must be None without `frames_in_key`; got {iterations}.")
        if query_projection is key_projection:
            raise ValueError("`query_projection` and `key_projection` must be two modules; got one twice.")
        super().__init__(
            host,
            num_frames,
            query_projection=(query_projection, self._on_query),
            key_projection=(key_projection, self._on_key),
        )
        self._scale, self._heads, self._head_softmax = scale, heads, head_softmax
        self._frames_in_key, self._iterations = frames_in_key, iterations

    def reset(self) -> None:
        """Forget what was collected, and with it the graph."""
        super().reset()
        # the queries that came after each key
        self._queries: list[list[Held]] = []

    def pop(self, *, num_frames: int | None = None) -> Tensor:
        """Return the map of the last forward, (B, T, S, N), attached to the graph, and empty the tap.

        Products are taken in float32, or float64 if the projections are, under autocast too. ``num_frames``, T, is
        needed where frames are flattened into the batch, which gives (B*T, 1, S, N) without; elsewhere it is checked.

        Raises: RuntimeError if nothing was collected, or the calls do not make one clip of T frames; ValueError if
            shapes of queries and keys do not go together or with the settings.
        """
        if num_frames is not None:
            check_int("num_frames", num_frames, 1)
        queries, keys = self._queries, self._take("key_projection")
        place = self._places["key_projection"]
        for call, after in enumerate(queries, 1):
            if not after:
                raise RuntimeError(
                    f"{self._places['query_projection']} has not run after call {call} of {len(keys)} of "
                    f"{place}: a frame is one key call and then its queries, and keys are patches, queries slots. "
                    "Are the two the other way round? Swap them."
                )
        if len(keys) > 1 and (self._frames_in_key or keys[0].tensor.dim() == 4):
            raise RuntimeError(
                f"{place} gave {len(keys)} clips, one is wanted ({count([key.tensor for key in keys])}): "
                f"{self._leftovers()}."
            )
        if self._frames_in_key:
            clip = self._dots(self._last_queries(queries[0], keys[0].tensor), keys[0].get())
        else:
            pairs = zip(queries, keys, strict=True)
            frames = [self._dots(after[-1].get(), key.get()) for after, key in pairs]
            clip = frames[0] if frames[0].dim() == 4 else self._stack("key_projection", frames)
        self._check_frames("key_projection", clip.shape[1])
        if num_frames in (None, clip.shape[1]):
            return clip
        if not self._frames_in_key and clip.shape[1] == 1 and clip.shape[0] % num_frames == 0:
            return rearrange(clip, "(b t) 1 s n -> b t s n", t=num_frames)
        raise RuntimeError(
            f"{place} gave {clip.shape[1]} frames of {clip.shape[0]} samples, which do not make clips of "
            f"`num_frames`={num_frames}. If there are too many, {self._leftovers()}."
        )

    def _last_queries(self, queries: list[Held], key: Tensor) -> Tensor:
        """Pick every frame's last query, (B, T, S, D), by counting from the end."""
        if key.dim() != 4:
            raise ValueError(
                f"{self._places['key_projection']} must give (B, T, N, D) with `frames_in_key`; got {tuple(key.shape)}."
            )
        num_frames, num_queries = key.shape[1], len(queries)
        if self._iterations is None and num_queries % num_frames:
            raise RuntimeError(
                f"{num_queries} queries do not divide evenly among {num_frames} frames. If the first frame "
                "has more than the others, give `iterations`, the number that the others have."
            )
        iterations = self._iterations or num_queries // num_frames
        if num_queries < num_frames * iterations:
            raise RuntimeError(
                f"{num_frames} frames with `iterations`={iterations} take at least {num_frames * iterations} "
                f"queries; got {num_queries}."
            )
        last = queries[num_queries - 1 - (num_frames - 1) * iterations :: iterations]
        return self._stack("query_projection", [query.get() for query in last])

    def _dots(self, query: Tensor, key: Tensor) -> Tensor:
        """(..., S, D) and (..., N, D) -> (..., S, N), heads merged."""
        outer = [(*one.shape[:-2], one.shape[-1]) for one in (query, key) if one.dim() in (3, 4)]
        if len(outer) < 2 or outer[0] != outer[1]:
            raise ValueError(
                f"{self._places['query_projection']} and {self._places['key_projection']} must give "
                f"(B, S, D) and (B, N, D), or both with T after B; got {tuple(query.shape)} and "
                f"{tuple(key.shape)}. If only the keys have T, give `frames_in_key`."
            )
        if query.shape[-1] % self._heads:
            raise ValueError(f"`heads` must divide D={query.shape[-1]}; got {self._heads}.")
        dtype = widest(query, key)
        with no_autocast(key):
            # heads stand apart, also if there is one
            query, key = (rearrange(one.to(dtype), "... n (h d) -> ... h n d", h=self._heads) for one in (query, key))
            dots = self._scale * (query @ key.mT)
            if self._heads == 1:
                return dots.squeeze(-3)
            if self._head_softmax == "joint":
                return dots.logsumexp(-3)
            return dots.log_softmax(-2).logsumexp(-3) - log(self._heads)

    def _on_key(self, _module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        if self._listens():
            one_call = self._frames_in_key or (isinstance(output, Tensor) and output.dim() == 4)
            self._hold(self._places["key_projection"], output, 1 if one_call and self._num_frames else self._num_frames)
            self._queries.append([])
            if len(self._queries) > len(self._calls):
                self._queries.pop(0)

    def _on_query(self, _module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        # a query before all keys belongs to none
        if not self._listens() or not self._queries:
            return
        if not self._frames_in_key:
            # a frame's last iteration replaces those before. with one key for all frames only the end tells
            # which query was a frame's last, so there all are kept; they are small next to the key
            self._queries[-1].clear()
        self._queries[-1].append(Held.now(self._places["query_projection"], output))
