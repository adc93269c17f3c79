"""Bilinear upsampling a tile at a time, in plain PyTorch, for work on maps too large to store.

Upsampling is separable: values = U_h z U_w^T with one small matrix a direction, two entries a
row. A strip of output columns needs a few low-resolution columns, and a tile of the strip a few
rows of those: one matrix product widens the low-resolution map for a strip, and one more stretches
it for a tile. Classes come last, so that a pixel's classes are neighbours in memory.

A tile has R x X output pixels of C classes, made of k x m low-resolution pixels.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from threading import Barrier, Lock, Thread
from typing import Callable, NamedTuple, TypeVar

import torch
from torch import Tensor

from ..runtime.tiling import accumulation_dtype

# exp(-60) is far below the rounding of a sum that is at least 1, and far above the numbers (about
# exp(-87) in fp32) at which exp and every product become a hundred times slower: denormals.
RANGE = 60.0

# Held while the number of threads that others start with is not theirs.
_setting = Lock()

# Entries of one tile: 2 MB in fp32, an L2 cache. Smaller ones lose more to calls than they gain.
TILE_ENTRIES = 512 * 1024
# Tiles of fewer classes are kept small, because the matrix products cost more the larger a tile is.
TILE_PIXELS = 8192
# On an accelerator a tile only bounds the memory.
TILE_ENTRIES_ACCELERATOR = 16 * 1024 * 1024

# Between two PyTorch calls a worker holds Python's lock; more than this many wait for one another.
WORKERS = 8

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Span(NamedTuple):
    """A run of output rows (or columns) and the low-resolution ones it is interpolated from."""

    full: slice
    low: slice
    weight: Tensor  # [full, low]


class Tile(NamedTuple):
    """Some rows of a strip, with the strip's scratch memory in the shapes they need.

    A call into PyTorch costs more than the work on a small map, so every view is made once.
    """

    low: slice
    weight: Tensor  # [R, k]
    weight_t: Tensor  # [k, R]
    values: Tensor  # [R, X, C]
    values_flat: Tensor  # [R, X C]
    factors: Tensor  # [R, m, X]
    narrow: Tensor  # [R, m, C]
    narrow_flat: Tensor  # [R, m C]


def span(low: int, full: int, start: int, stop: int, align_corners: bool, like: Tensor) -> Span:
    """The run `start` to `stop` of `full` outputs that are interpolated from `low` inputs."""
    if align_corners:
        slope, offset = (low - 1) / max(full - 1, 1), 0.0
    else:
        slope, offset = low / full, 0.5 * low / full - 0.5
    first, last = (int(min(max(slope * i + offset, 0), low - 1)) for i in (start, stop - 1))
    last = min(last + 1, low - 1)
    # Made on a GPU, for a copy there would wait for all that it has to do.
    device = like.device if like.is_cuda else "cpu"
    source = torch.arange(start, stop, dtype=torch.float64, device=device).mul_(slope).add_(offset)
    source = source.clamp_(0, low - 1)
    distance = source[:, None] - torch.arange(first, last + 1, dtype=torch.float64, device=device)
    weight = (1 - distance.abs_()).clamp_(min=0).to(like)
    return Span(slice(start, stop), slice(first, last + 1), weight)


def runs(full: int, longest: int) -> Iterator[tuple[int, int]]:
    """Cut `full` outputs into equal runs of at most `longest`: where each starts and stops."""
    count = -(-full // longest)
    edges = [full * i // count for i in range(count + 1)]
    return zip(edges, edges[1:])


def spans(low: int, full: int, longest: int, align_corners: bool, like: Tensor) -> list[Span]:
    """Cut `full` outputs interpolated from `low` inputs into runs of at most `longest`."""
    return [span(low, full, *run, align_corners, like) for run in runs(full, longest)]


def tile_shape(height: int, width: int, classes: int, device: torch.device) -> tuple[int, int]:
    """Rows and columns of the largest tile."""
    if device.type == "cpu":
        pixels = min(TILE_ENTRIES * _threads_each() // classes, TILE_PIXELS)
    else:
        pixels = TILE_ENTRIES_ACCELERATOR // classes
    pixels = max(pixels, 64)
    columns = min(width, math.isqrt(pixels))
    return min(height, pixels // columns), columns


class TiledUpsampling:
    """Low-resolution logits, ready to be upsampled a strip of columns at a time.

    The largest logit of each low-resolution pixel is subtracted from the pixel, which no softmax
    notices; so every value is at most 0.

    Args:
        logits: B x C x h x w, floating point.
        height, width: The size H x W upsampled to.
        align_corners: As in torch.nn.functional.interpolate.
    """

    def __init__(self, logits: Tensor, height: int, width: int, align_corners: bool) -> None:
        batch, classes, low_height, low_width = logits.shape
        self.low = logits.new_empty(
            (batch, low_height, low_width, classes), dtype=accumulation_dtype(logits)
        )
        self._floor = self.low.new_empty((batch, low_height, low_width))
        for _ in in_threads(partial(self._prepare, logits.detach()), range(batch), logits.device):
            pass
        rows, columns = tile_shape(height, width, classes, logits.device)
        self.rows = spans(low_height, height, rows, align_corners, self.low)
        self.columns = spans(low_width, width, columns, align_corners, self.low)
        self.scratch_shapes = self._scratch_shapes()
        # Asking an accelerator would stall it, so there no values are assumed to be safe.
        self._ask = logits.device.type == "cpu"
        self._safe = self._ask and bool((self._floor >= -RANGE).all())

    def _prepare(self, logits: Tensor, image: int) -> None:
        """Put an image's logits with the classes last and shift them."""
        low = self.low[image]
        # As matrices, the copy reaches PyTorch's blocked transposition.
        low.flatten(0, 1).copy_(logits[image].flatten(1).t())
        low.sub_(low.amax(2, keepdim=True))
        torch.amin(low, 2, out=self._floor[image])

    def _scratch_shapes(self) -> list[tuple[int, int, int]]:
        """Shapes of the largest strip's memory: widened map, and a tile's values, factors, sums."""
        height, classes = self.low.shape[1], self.low.shape[3]
        rows = max(len(s.weight) for s in self.rows)
        columns, m = (max(s.weight.shape[i] for s in self.columns) for i in (0, 1))
        return [
            (height, columns, classes),
            (rows, columns, classes),
            (rows, m, columns),
            (rows, m, classes),
        ]

    def each_strip(self, work: Callable[["Strip"], _Result]) -> Iterator[_Result]:
        """Call `work` with every strip, image by image; on a CPU with several at a time.

        The results come in that order. Iterate to the end.
        """
        places = [(i, c) for i in range(len(self.low)) for c in self.columns]
        # Made here for all: memory that short-lived threads allocate is not given back for long.
        unused: SimpleQueue[Tensor] = SimpleQueue()
        for _ in range(_workers(self.low.device, len(places))):
            unused.put(self.low.new_empty(sum(math.prod(shape) for shape in self.scratch_shapes)))

        def start(place: tuple[int, Span]) -> _Result:
            memory = unused.get()
            try:
                return work(Strip(self, *place, memory))
            finally:
                unused.put(memory)

        return in_threads(start, places, self.low.device)

    def in_range(self, image: int, rows: slice, columns: slice) -> bool:
        """Whether no value made of these can be below -RANGE, so that exp needs no further care."""
        if self._safe or not self._ask:
            return self._safe
        return bool((self._floor[image, rows, columns] >= -RANGE).all())


class Strip:
    """A run of columns of one upsampled image, worked through in tiles from the top."""

    def __init__(self, up: TiledUpsampling, image: int, columns: Span, memory: Tensor) -> None:
        self.image = image
        self.columns = columns
        self.low = up.low[image, :, columns.low]  # [h, m, C]
        self._up = up
        self._weight_t = columns.weight.t()
        self._ones = self.low.new_ones(self.low.shape[2])
        self._memory = memory.split([math.prod(shape) for shape in up.scratch_shapes])
        weight = columns.weight.expand(len(self.low), *columns.weight.shape)
        wide = self._scratch(0, len(self.low), len(columns.weight), self.low.shape[2])
        self._wide = torch.bmm(weight, self.low, out=wide).flatten(1)  # [h, X C]

    def _scratch(self, index: int, *shape: int) -> Tensor:
        return self._memory[index][: math.prod(shape)].view(shape)

    @property
    def here(self) -> tuple[int, slice, slice]:
        """The index of the strip in a map B x H x W."""
        return self.image, slice(None), self.columns.full

    def rows(self, strip: Tensor) -> Sequence[Tensor]:
        """The tiles of a map [H, ...] of the strip, as views."""
        return strip.split([len(s.weight) for s in self._up.rows])

    def tiles(self) -> list[Tile]:
        columns, m = self.columns.weight.shape
        classes = self.low.shape[2]
        fitted = {}
        for rows in {len(s.weight) for s in self._up.rows}:
            values = self._scratch(1, rows, columns, classes)
            factors = self._scratch(2, rows, m, columns)
            narrow = self._scratch(3, rows, m, classes)
            fitted[rows] = (values, values.flatten(1), factors, narrow, narrow.flatten(1))
        return [Tile(s.low, s.weight, s.weight.t(), *fitted[len(s.weight)]) for s in self._up.rows]

    def in_range(self, tile: Tile) -> bool:
        return self._up.in_range(self.image, tile.low, self.columns.low)

    def expand(self, tile: Tile) -> Tensor:
        """The upsampled values of the tile, [R, X, C]; the next call overwrites them."""
        torch.mm(tile.weight, self._wide[tile.low], out=tile.values_flat)
        return tile.values

    def new_total(self) -> Tensor:
        """Zeros for `reduce` to add to, [h, m C]."""
        return torch.zeros_like(self.low, memory_format=torch.contiguous_format).flatten(1)

    def reduce(self, tile: Tile, factor: Tensor, total: Tensor) -> None:
        """Add the transposed interpolation of factor [R, 1, X] times the values to `total`."""
        # The factor goes into the small matrix, which spares a pass over the values.
        torch.mul(self._weight_t, factor, out=tile.factors)
        torch.bmm(tile.factors, tile.values, out=tile.narrow)
        total[tile.low].addmm_(tile.weight_t, tile.narrow_flat)

    def sum_classes(self, tile: Tile, out: Tensor) -> None:
        """Fill the contiguous map `out`, [R, X], with the sums of the values over the classes."""
        # torch.sum would first fill `out` with zeros, and is no faster.
        torch.mv(tile.values.flatten(0, 1), self._ones, out=out.view(-1))

    def expand_map(self, low: Tensor) -> Tensor:
        """A single map [h, m] upsampled, [H, X]."""
        wide = low @ self._weight_t
        return torch.cat([span.weight @ wide[span.low] for span in self._up.rows])

    def reduce_map(self, full: Tensor) -> Tensor:
        """The transposed interpolation of a single map [H, X], [h, m]."""
        low = full.new_zeros(self.low.shape[:2])
        for span, part in zip(self._up.rows, self.rows(full)):
            low[span.low].addmm_(span.weight.t(), part @ self.columns.weight)
        return low


def _threads_each() -> int:
    return max(torch.get_num_threads() // WORKERS, 1)


def _workers(device: torch.device, items: int) -> int:
    return max(min(torch.get_num_threads(), WORKERS, items), 1) if device.type == "cpu" else 1


def in_threads(
    work: Callable[[_Item], _Result], items: Sequence[_Item], device: torch.device
) -> Iterator[_Result]:
    """`map`, on a CPU in threads, each of which computes with its share of PyTorch's threads.

    The operations of a tile are short. Split over all cores one by one, threads would synchronise
    two thousand times per call, and wait each time if another process (a data loader) has a core.
    """
    workers = _workers(device, len(items))
    if workers == 1:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()
    share = threads // workers
    inference = torch.is_inference_mode_enabled()

    def call(item: _Item) -> _Result:
        with torch.inference_mode(inference), torch.no_grad():
            return work(item)

    started = Barrier(workers + 1)

    def start() -> None:
        torch.get_num_threads()  # a thread that asks for the first time takes over what others set
        torch.set_num_threads(share)
        started.wait()

    def begin(pool: ThreadPoolExecutor) -> Iterator[_Result]:
        try:
            results = pool.map(call, items)
            started.wait()
        except BaseException:
            started.abort()  # a worker that could not be started is waited for
            raise
        # The setting counts for the thread that makes it and for all that ask for the first time
        # after it, also others': so a thread that then ends takes it back for those. This one makes
        # it too: its operations, split over cores, would leave idle threads spinning.
        torch.set_num_threads(share)
        back = Thread(target=torch.set_num_threads, args=(threads,))
        back.start()
        back.join()
        return results

    with ThreadPoolExecutor(workers, "upsample", start) as pool:
        try:
            with _setting:
                results = begin(pool)
            yield from results
        finally:
            torch.set_num_threads(threads)
