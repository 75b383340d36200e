"""`Memory`: keys and values of past segments, in which a layer of attention looks things up."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from headwise.errors import OptionError, ShapeError, UnsupportedError
from headwise.ops import attention, in_backward, require_tensor, top_keys
from headwise.spec import AttentionSpec
from headwise.spec.checks import positive_int

# What the memory holds, and what waits for the end of its segment; None before there is any.
_ENTERED = ("keys", "values", "held", "count")
_WAITING = ("waiting_keys", "waiting_values", "waiting_held")
_HELD = _ENTERED + _WAITING
# Elements of retrieved rows that exist at once where nothing keeps them for a backward pass.
_MOST = 2**24


class Memory(nn.Module):
    """The last `size` rows of keys and values of a layer: each query retrieves `top` of them.

    Example:
        >>> import torch
        >>> from headwise import AttentionSpec
        >>> from headwise.nn import Attention, Memory, Rope
        >>> spec = AttentionSpec(heads=8, kv_heads=2, head_dim=16, value_dim=16)
        >>> layer = Attention(spec, rope=Rope(16), memory=Memory(size=1000, top=8))
        >>> for segment in torch.randn(2, 90, 128).split(30, dim=1):  # [B, S, E]
        ...     out = layer(segment)
        >>> print(layer.memory)
        Memory(size=1000, top=8, 90 rows of 2 sequences)
        >>> layer.memory.clear()

    A query and head retrieves the rows with the largest q . k, exactly, from those that its kv head
    has made in earlier segments. What it reads in them joins what the layer's own attention reads
    in the segment: (1 - g) * local + g * memory, with g = sigmoid(`gate`) of each head. Keys and
    queries meet as they are before the rotary embedding, after their norms; no bias, ALiBi or mask
    reaches the memory, and a learned sink belongs to the local part. A sequence with no rows yet
    has its local part alone.

    Rows enter without gradients, after the segment that made them: gradients reach the queries, the
    gate and the local part. A segment ends after `segment` tokens, within a call too, and, without
    a cache, with the call. With a cache the same tokens give the same in calls of any lengths.

    Each sequence of the batch has its own rows. Nothing but `clear` forgets them: clear when other
    sequences begin. A token that `mask` or a `bias` of -inf hides from every query of its call, as
    they do with padding, cannot be retrieved.

    Args:
        size: rows that are held per kv head; the oldest leave first. Tokens that are hidden count.
        top: rows that a query retrieves, or all where there are fewer.
        segment: tokens after which rows enter; by default the layer's window, and without one the
            call.
        gate: "head", a learned number per head, which begins at 0; None: one softmax over local and
            retrieved keys instead.
        persistent: whether the rows are part of `state_dict` (as for buffers of PyTorch), which can
            then be loaded into another memory of this size. Without it they are lost.

    Raises:
        SpecError: a size below 1.
        OptionError: `top` above `size`, or another `gate`.

    Source: Wu et al. 2022, Memorizing Transformers, arXiv 2203.08913.
    """

    keys: Tensor | None
    values: Tensor | None
    held: Tensor | None
    count: Tensor | None
    waiting_keys: Tensor | None
    waiting_values: Tensor | None
    waiting_held: Tensor | None

    def __init__(
        self,
        size: int = 65_536,
        top: int = 32,
        *,
        segment: int | None = None,
        gate: Literal["head"] | None = "head",
        persistent: bool = False,
    ) -> None:
        super().__init__()
        self.size, self.top = positive_int("size", size), positive_int("top", top)
        if top > size:
            raise OptionError(f"top is {top}, expected at most size, {size}")
        if gate not in ("head", None):
            raise OptionError(f"gate is {gate!r}, expected 'head' or None")
        self.segment = None if segment is None else positive_int("segment", segment)
        self.persistent, self._gated, self._heads = persistent, gate == "head", 0
        self.gate: nn.Parameter | None = None
        for name in _HELD:
            self.register_buffer(name, None, persistent=persistent)

    def serve(self, spec: AttentionSpec, **where: Any) -> None:
        """Become the memory of a layer, whose gate is made.

        Raises:
            OptionError: it is another layer's.
            UnsupportedError: the layer cannot have one.
        """
        if self._heads:
            raise OptionError("memory is another layer's: give each layer one of its own")
        if spec.cross or not spec.causal or spec.sparse is not None:
            raise UnsupportedError(
                f"{spec}: a memory is for causal self-attention without sparse choice"
            )
        self._heads, self.segment = spec.heads, self.segment or spec.window
        if self._gated:
            self.gate = nn.Parameter(torch.zeros(spec.heads, **where))

    def clear(self, sequences: int | Sequence[int] | None = None) -> None:
        """Forget all, or the rows of a sequence of the batch, or of some.

        Raises:
            ShapeError: a sequence that is not held.
        """
        if sequences is None:
            for name in _HELD:
                setattr(self, name, None)
            return
        listed = list(sequences) if isinstance(sequences, Sequence) else [sequences]
        there = [held for held in (self.held, self.waiting_held) if held is not None]
        batch = there[0].shape[0] if there else 0
        for index in listed:
            if type(index) is not int or not 0 <= index < batch:
                raise ShapeError(f"clear({index!r}): expected sequences of the {batch} held")
        for held in there:
            held[listed] = False

    @property
    def rows(self) -> int:
        """Rows that a query may retrieve from, hidden ones among them."""
        return 0 if self.count is None else min(int(self.count), self.size)

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values that can be retrieved."""
        each = (self.keys, self.values)
        return sum(x[:, :, : self.rows].numel() * x.element_size() for x in each if x is not None)

    def reads(self, length: int) -> bool:
        """Whether a query of a call of so many tokens may find rows."""
        return self.rows > 0 or (self.segment is not None and self._waiting + length > self.segment)

    def check(self, key: Tensor, value: Tensor, *, cached: bool) -> None:
        """Refuse, before anything is changed, what does not fit what is held.

        Raises:
            ShapeError: keys or values of another batch, size, dtype or device.
            UnsupportedError: a cache, and no segment; a second forward pass for the backward.
        """
        if in_backward():
            raise UnsupportedError(
                "a layer with a memory runs again in the backward pass, where its memory is "
                "another: leave it out of checkpointing"
            )
        if cached and self.segment is None:
            raise UnsupportedError(
                "a cache, and a memory without a segment: give Memory(segment=...), the tokens "
                "after which rows enter"
            )
        for name, new in (("keys", key), ("values", value)):
            for rows in (getattr(self, name), getattr(self, f"waiting_{name}")):
                if rows is not None and _kind(rows) != _kind(new):
                    raise ShapeError(
                        f"the memory holds {name} {_kind(rows)}, and these are {_kind(new)}: "
                        "clear() it first"
                    )

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        seen: Tensor,
        *,
        scale: float,
        softcap: float | None,
        cached: bool,
    ) -> tuple[Tensor, Tensor]:
        """What the queries of a call find, and then its rows enter.

        Args:
            query: [B, H, S, D]; key [B, K, S, D] and value [B, K, S, V], all not rotated.
            seen: boolean [B, S], the tokens that may be retrieved later.
            scale, softcap: of the scores.
            cached: whether a segment goes on after the call.

        Returns:
            out [B, H, S, V] and lse [B, H, S], in float32 or float64; 0 and -inf without rows.
        """
        first, parts = 0, []
        each = query.shape[0] * query.shape[1] * self.top * (key.shape[3] + value.shape[3])
        while first < query.shape[2]:
            take = query.shape[2] - first
            if self.segment is not None:
                take = max(0, min(take, self.segment - self._waiting))
            piece = slice(first, first + take)
            some = query[:, :, piece].split(max(1, _MOST // max(1, each)), dim=2)
            parts += [self._read(part, value, scale, softcap) for part in some]
            self._wait(key[:, :, piece], value[:, :, piece], seen[:, piece])
            if self.segment is not None and self._waiting >= self.segment:
                self._enter()
            first += take
        if not cached:
            self._enter()
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)

    def join(self, local: Tensor, lse: Tensor | None, found: Tensor, found_lse: Tensor) -> Tensor:
        """Both parts [B, H, S, V] in one, by the gate or by their log-sum-exps [B, H, S]."""
        none = found_lse.isneginf()
        if self.gate is None:
            assert lse is not None
            share = torch.sigmoid(found_lse.masked_fill(none, 0.0) - lse)
        else:
            share = torch.sigmoid(self.gate.to(found.dtype)).view(1, -1, 1).expand_as(found_lse)
        share = share.masked_fill(none, 0.0).unsqueeze(-1)
        return ((1 - share) * local + share * found).to(local.dtype)

    def extra_repr(self) -> str:
        """What `print` shows."""
        options = f"size={self.size}, top={self.top}"
        options += "" if self.segment is None else f", segment={self.segment}"
        batch = 0 if self.held is None else self.held.shape[0]
        return f"{options}, {self.rows} rows of {batch} sequences"

    @property
    def _waiting(self) -> int:
        return 0 if self.waiting_keys is None else self.waiting_keys.shape[2]

    def _read(
        self, query: Tensor, value: Tensor, scale: float, softcap: float | None
    ) -> tuple[Tensor, Tensor]:
        """As `attend`, of some queries and what is held now."""
        (batch, heads, length, _), rows = query.shape, self.rows
        exact = torch.promote_types(query.dtype, torch.float32)
        if rows == 0 or query.numel() == 0:
            out = query.new_zeros(batch, heads, length, value.shape[3], dtype=exact)
            return out, query.new_full(out.shape[:3], float("-inf"), dtype=exact)
        assert self.keys is not None
        assert self.values is not None
        assert self.held is not None
        keys, held = self.keys[:, :, :rows], self.held[:, :rows]
        mask = None if bool(held.all()) else held
        # a scale is above 0, so the largest q . k are the largest scores
        chosen = top_keys(query, keys, self.top, mask=mask)
        learns, kv_heads = torch.is_grad_enabled() and query.requires_grad, keys.shape[1]
        few = 4 * (self.top + heads // kv_heads * length) < rows
        if query.is_cpu and exact == torch.float32 and few and not learns:
            # one operator: elsewhere, and for gradients, attention scores all keys
            found, lse = attention(
                query.reshape(batch, kv_heads, -1, query.shape[3]),
                keys,
                self.values[:, :, :rows],
                scale=scale,
                softcap=softcap,
                indices=chosen.view(batch, kv_heads, -1, chosen.shape[3]),
                return_lse=True,
            )
            return found.view(batch, heads, length, -1).to(exact), lse.view(batch, heads, length)
        # whole rows are copied, not element by element as `gather` does
        first = torch.arange(batch * keys.shape[1], device=keys.device) * self.keys.shape[2]
        index = chosen.long().clamp(min=0).view(first.shape[0], -1) + first[:, None]

        none = chosen < 0
        fewer, empty = bool(none.any()), none.all(dim=-1, keepdim=True)

        def retrieved(rows: Tensor) -> Tensor:
            """[B, H, S, top, dim] of [B, K, rows, dim]."""
            taken = rows.flatten(0, 2).index_select(0, index.flatten())
            taken = taken.view(*chosen.shape, rows.shape[3]).to(exact)
            # what stands in for no row may be NaN
            return taken.masked_fill(none.unsqueeze(-1), 0.0) if fewer else taken

        with torch.autocast(query.device.type, enabled=False):
            score = scale * (retrieved(self.keys) @ query.to(exact).unsqueeze(-1)).squeeze(-1)
            if softcap is not None:
                score = softcap * torch.tanh(score / softcap)
            # a row of -inf alone has no softmax
            score = score.masked_fill(none, float("-inf")).masked_fill(empty, 0.0)
            weights = torch.softmax(score, dim=-1).masked_fill(empty, 0.0)
            lse = torch.logsumexp(score, dim=-1).masked_fill(empty.squeeze(-1), float("-inf"))
            return (weights.unsqueeze(-2) @ retrieved(self.values)).squeeze(-2), lse

    def remember(self, key: Tensor, value: Tensor, seen: Tensor | None = None) -> None:
        """Let rows enter at once, as a segment of their own.

        Args:
            key: [B, K, S, D], not rotated.
            value: [B, K, S, V].
            seen: boolean [B, S], the rows that may be retrieved; None: all.

        Raises:
            ShapeError: they do not fit together, or what is held.
        """
        require_tensor("key", key, 4)
        require_tensor("value", value, 4)
        batch, _, length, _ = key.shape
        if seen is None:
            seen = torch.ones(batch, length, dtype=torch.bool, device=key.device)
        require_tensor("seen", seen, 2)
        fits = value.shape[:3] == key.shape[:3] and seen.shape == (batch, length)
        if not fits or seen.dtype != torch.bool:
            raise ShapeError(
                f"key {list(key.shape)}, value {list(value.shape)} and seen {list(seen.shape)} in "
                f"{seen.dtype}: expected [B, K, S, D], [B, K, S, V] and boolean [B, S]"
            )
        self.check(key, value, cached=False)
        self._wait(key, value, seen)
        self._enter()

    @torch.no_grad()
    def _wait(self, key: Tensor, value: Tensor, seen: Tensor) -> None:
        """Put rows behind those that wait for the end of their segment."""
        with torch.inference_mode(False):  # a backward pass may use what is kept
            for name, new in zip(_WAITING, (key, value, seen)):
                before, dim = getattr(self, name), 2 if new.ndim > 2 else 1
                new = new.detach().clone() if before is None else torch.cat([before, new], dim)
                setattr(self, name, new)

    @torch.no_grad()
    def _enter(self) -> None:
        """Let what waits be held, in the place of the oldest rows."""
        key, value, seen = self.waiting_keys, self.waiting_values, self.waiting_held
        if key is None or value is None or seen is None:
            return
        self.waiting_keys = self.waiting_values = self.waiting_held = None
        with torch.inference_mode(False):
            count = 0 if self.count is None else int(self.count)
            count += max(0, key.shape[2] - self.size)
            new = [x[..., -self.size :, :] for x in (key, value)]
            new.append(seen[:, -self.size :])
            rows = new[0].shape[2]
            at = count % self.size
            here = min(rows, self.size - at)
            for name, some in zip(_ENTERED, new):
                dim = 2 if some.ndim > 2 else 1
                held = self._with_room(getattr(self, name), some, dim, min(count + rows, self.size))
                held.narrow(dim, at, here).copy_(some.narrow(dim, 0, here))
                held.narrow(dim, 0, rows - here).copy_(some.narrow(dim, here, rows - here))
                setattr(self, name, held)
            self.count = torch.tensor(count + rows)

    def _with_room(self, held: Tensor | None, like: Tensor, dim: int, needed: int) -> Tensor:
        """A buffer of `needed` rows or more, which begins with what is held."""
        have = 0 if held is None else held.shape[dim]
        if held is not None and have >= needed:
            return held
        sizes = list(like.shape)
        sizes[dim] = min(self.size, max(needed, 2 * have))
        grown = like.new_zeros(sizes)
        if held is not None:
            grown.narrow(dim, 0, have).copy_(held)
        return grown

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Make room for the rows of `state_dict`, or none where it has none.

        Raises:
            ShapeError: they are of a memory of another size.
        """
        if self.persistent:
            stored = {name: state_dict.get(prefix + name) for name in _HELD}
            _check_stored(stored, prefix, self.size)
            for name, rows in stored.items():
                setattr(self, name, None if rows is None else torch.empty_like(rows))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _kind(rows: Tensor) -> str:
    """What all rows [B, K, rows, dim] of a memory have in common."""
    batch, heads, _, dim = rows.shape
    return f"of B={batch}, K={heads} and {dim} dims in {rows.dtype} on {rows.device}"


def _check_stored(stored: dict[str, Any], prefix: str, size: int) -> None:
    """Raise `ShapeError` unless these are what a memory of `size` rows holds, or nothing."""
    for names in (_ENTERED, _WAITING):
        there = [name for name in names if stored[name] is not None]
        if there not in ([], list(names)):
            raise ShapeError(f"{prefix}: {there} without the others of {list(names)}")
        if not there:
            continue
        keys, values, held = (stored[name] for name in names[:3])
        batch, _, rows, _ = keys.shape
        if values.shape[:3] != keys.shape[:3] or held.shape != (batch, rows):
            raise ShapeError(f"{prefix}: {list(names)} differ in their sequences or rows")
        if names is _WAITING:
            continue
        count = int(stored["count"])
        if not min(count, size) <= rows <= size:
            raise ShapeError(
                f"{prefix}keys has {rows} rows, of {count} that entered: expected a memory of this "
                f"size, {size}"
            )
