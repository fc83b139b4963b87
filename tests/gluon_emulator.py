"""Runs the warp-specialised parts of a Gluon kernel on the CPU, each in a thread, to test how they share buffers.

What is asynchronous on the GPU happens here at the worst moment that the barriers allow: loads land late, products and
stores read their operands as late as the next wait for them, and the parts take turns at random. A buffer that is
released too early, a wrong phase or a missing wait shows as a wrong result, or as `Deadlock`.

Only the subset of Gluon that hopper.py, hopper_rows.py and hopper_gated.py use. Tensors are numpy arrays; layouts mean
nothing.
"""

import inspect
import random
import textwrap
import threading
from collections import defaultdict
from types import SimpleNamespace

import numpy as np


class Deadlock(Exception):
    """All parts wait, and nothing is on its way."""


# Changes to hopper.py's source that break what dW, `down` and `dx` have in common.
BREAKS = [
    ("mbarrier.wait(free.index(1 - HALF if TURNS else 0), ", "max(0, "),  # a half is overwritten while it is stored
    ("free.index(1 - HALF if TURNS", "free.index(HALF if TURNS"),  # it waits for its own half to be stored
    ("to_tensor(1 - HALF", "to_tensor(1"),  # the second half comes before the first one was stored
    ("free_phase ^= 1", "free_phase ^= 0"),  # a later tile waits for the first one
    ("tma.store_wait(0)", "pass"),  # the buffer is given back before it was read
    ("fence_async_shared()  # TMA", "pass  # TMA"),
    ("_previous(stage, STAGES)), count=1, pred=k > 0", "stage), count=1, pred=k >= 0"),  # released too early
    ("warpgroup_mma_wait(0,", "warpgroup_mma_wait(1,"),  # a half is handed over without its last product
]


def is_broken(emulate, seeds=60):
    """Whether emulate(seed), results and what they should be, fails or differs for one of the seeds."""
    for seed in range(seeds):
        try:
            if not all(map(np.array_equal, *emulate(seed))):
                return True
        except (Deadlock, AssertionError):
            return True
    return False


class Tensor(np.ndarray):
    def to(self, dtype):
        return self


def tensor(value):
    return np.asarray(value).view(Tensor)


class Int(int):
    """A scalar in a kernel."""

    def to(self, dtype):
        return self


class Pointer:
    """A flat array and an offset, or an array of offsets."""

    def __init__(self, array, offset=0):
        self.array, self.offset = array, offset

    def __add__(self, more):
        return Pointer(self.array, self.offset + np.asarray(more))

    def __getitem__(self, index):
        return Pointer(self.array, np.asarray(self.offset)[index])

    def load(self, mask=True, other=0):
        offset, mask = np.broadcast_arrays(self.offset, mask)
        assert ((offset >= 0) & (offset < self.array.size) | ~mask).all(), "a load outside of its tensor"
        array = self.array if self.array.size else np.zeros(1)  # nothing is read of it
        values = tensor(np.where(mask, array[np.where(mask, offset, 0)], other))
        return values if values.ndim else Int(values)

    def store(self, value, mask):
        offset, value, mask = np.broadcast_arrays(self.offset, value, mask)
        assert ((offset >= 0) & (offset < self.array.size) | ~mask).all(), "a store outside of its tensor"
        self.array[offset[mask]] = value[mask]


class Descriptor:
    """A tensor read and written by blocks; what lies outside reads as zero and is not written."""

    def __init__(self, array, block):
        self.array, self.dtype = array, array.dtype
        self.block_type = SimpleNamespace(nbytes=int(np.prod(block)), shape=list(block))

    def _inside(self, start):
        ends = [min(a + n, size) for a, n, size in zip(start, self.block_type.shape, self.array.shape, strict=True)]
        return tuple(slice(int(a), int(max(a, b))) for a, b in zip(start, ends, strict=True))

    def read(self, start):
        block = np.zeros(self.block_type.shape)
        part = self.array[self._inside(start)]
        block[tuple(slice(0, n) for n in part.shape)] = part
        return block

    def write(self, start, block):
        place = self._inside(start)
        self.array[place] = block[tuple(slice(0, p.stop - p.start) for p in place)]


class Buffer:
    """Shared memory. Another part may run before each access."""

    switch = staticmethod(lambda: None)
    written = staticmethod(lambda array: None)

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def index(self, i):
        return Buffer(self.array[int(i)])

    def slice(self, start, length):
        return Buffer(self.array[start : start + length])

    def load(self, layout):
        Buffer.switch()
        return tensor(self.array.copy())

    def reshape(self, shape):
        return Buffer(self.array.reshape(shape))

    def permute(self, order):
        return Buffer(self.array.transpose(order))

    def store(self, value):
        Buffer.switch()
        self.array[...] = value
        Buffer.written(self.array)


class Barrier:
    """An mbarrier: a phase completes when `count` arrivals and all announced bytes have come."""

    def __init__(self, count):
        self.count, self.missing, self.bytes, self.parity = count, count, 0, 0

    def arrive(self, count):
        assert self.missing >= count, "more arrivals than the barrier expects"
        self.missing -= count
        self.settle()

    def settle(self):
        if not self.missing and not self.bytes:
            self.parity, self.missing = self.parity ^ 1, self.count


class Machine:
    """Threads that take turns at random, and operations under way."""

    def __init__(self, seed):
        self.random, self.turn = random.Random(seed), threading.Condition()
        self.ready, self.current, self.under_way, self.error = {}, None, [], None

    def run(self, parts):
        threads = [threading.Thread(target=self._part, args=(i, part), daemon=True) for i, part in enumerate(parts)]
        self.ready = {i: lambda: True for i in range(len(parts))}
        for thread in threads:
            thread.start()
        with self.turn:
            self._next()
        for thread in threads:
            thread.join()
        if self.error:
            raise self.error

    def _part(self, i, part):
        with self.turn:
            self.turn.wait_for(lambda: self.current == i or self.error)
            try:
                if not self.error:
                    part()
            except BaseException as error:
                self.error = self.error or error
            self.ready.pop(i)
            self._next()

    def _next(self):
        able = [i for i, ready in self.ready.items() if ready()]
        while not able and self.under_way:
            self._land()
            able = [i for i, ready in self.ready.items() if ready()]
        if self.ready and not able:
            self.error = self.error or Deadlock(f"parts {list(self.ready)} wait for each other")
        self.current = self.random.choice(able) if able else None
        self.turn.notify_all()

    def _land(self):
        try:
            self.under_way.pop(self.random.randrange(len(self.under_way)))()
        except AssertionError as error:
            self.error = self.error or error

    def switch(self, until=lambda: True):
        """Let another part run; come back when `until` holds."""
        me = self.current
        if self.under_way and self.random.random() < 0.3:
            self._land()
        self.ready[me] = until
        self._next()
        self.turn.wait_for(lambda: self.current == me or self.error)
        if self.error:
            raise self.error
        self.ready[me] = lambda: True


class Product:
    """An accumulator with products under way; a product reads its operands when somebody waits for it."""

    def __init__(self, shape):
        self.shape, self.sum, self.queue = shape, np.zeros(shape), []

    def wait(self, left):
        while len(self.queue) > left:
            a, b = self.queue.pop(0)
            self.sum = self.sum + a.array @ b.array
        return self

    def to(self, dtype):
        return self.sum


class Kernel:
    """The functions of a module that are decorated with gluon.jit, as plain functions on one emulated program."""

    def __init__(self, module, names, seed, program, programs, changes=()):
        self.machine = Machine(seed)
        Buffer.switch = self.machine.switch
        Buffer.written = lambda array: self.unfenced[self.machine.current].append(array)
        self.stores, self.fenced = [], False
        self.unfenced = defaultdict(list)  # what each part has written since its last fence
        self.gathered, self.groups = defaultdict(list), defaultdict(list)  # of each part
        scope = dict(vars(module)) | {
            "gl": self._language(program, programs),
            "mbarrier": SimpleNamespace(wait=self._wait, arrive=self._arrive, expect=self._expect),
            "async_copy": SimpleNamespace(
                mbarrier_arrive=self._arrive_gathered, commit_group=self._commit, wait_group=self._wait_group
            ),
            "tma": SimpleNamespace(store_wait=self._store_wait),
            "tma_load": self._tma_load,
            "tma_store": self._tma_store,
            "cp_async": self._copy,
            "fence_async_shared": self._fence,
            "warpgroup_mma": self._multiply,
            "warpgroup_mma_wait": lambda left, deps: deps[0].wait(left),
            "_split_columns": lambda product, parts: [tensor(p) for p in np.split(product.sum, parts, axis=1)],
        }
        for name in names:
            source = textwrap.dedent(inspect.getsource(getattr(module, name).fn)).replace("@gluon.jit", "")
            for old, new in changes:
                source = source.replace(old, new)
            exec(compile(source, f"<{name}>", "exec"), scope)
        self.functions = SimpleNamespace(**{name: scope[name] for name in names})

    def _language(self, program, programs):
        return SimpleNamespace(
            constexpr=None, int64="int64", float32="float32", to_tensor=int, num_warps=lambda: 8,
            program_id=lambda axis: program, num_programs=lambda axis: programs, static_range=range,
            arange=lambda start, end, layout: tensor(np.arange(start, end)), where=lambda c, a, b: a if c else b,
            load=lambda pointer, mask=True, other=0: pointer.load(mask, other),
            store=lambda pointer, value, mask: pointer.store(value, mask), sum=lambda x, axis: x.sum(axis),
            minimum=min, maximum=max, BlockedLayout=lambda *a: None,
            zeros=lambda shape, dtype, layout: Product(shape) if len(shape) == 2 else tensor(np.zeros(shape)),
            SliceLayout=lambda *a: None, NVMMADistributedLayout=lambda *a: None,
        )  # fmt: skip

    def _wait(self, barrier, parity):
        self.machine.switch(lambda: barrier.parity != int(parity))
        self.fenced = False

    def _arrive(self, barrier, count=1, pred=True):
        if pred:
            barrier.arrive(count)
        self.machine.switch()

    def _expect(self, barrier, size):
        barrier.bytes += size
        barrier.arrive(1)

    def _tma_load(self, descriptor, start, barrier, buffer):
        def land():
            buffer.array[...] = descriptor.read(start)
            barrier.bytes -= descriptor.block_type.nbytes
            barrier.settle()

        self.machine.under_way.append(land)

    def _copy(self, buffer, pointers, mask=True):
        def land():
            buffer.array[...] = pointers.load(mask)

        self.gathered[self.machine.current].append(land)

    def _take_gathered(self):
        return self.gathered.pop(self.machine.current, [])

    def _arrive_gathered(self, barrier, increment_count):
        copies = self._take_gathered()

        def land():
            for copy in copies:
                copy()
            barrier.arrive(128)

        self.machine.under_way.append(land)

    def _commit(self):
        """A group of copies lands at once, or as late as its part's next wait allows."""
        copies = self._take_gathered()
        self.groups[self.machine.current].append(copies)
        if self.machine.random.random() < 0.5:
            self._wait_group(0)

    def _wait_group(self, left):
        groups = self.groups[self.machine.current]
        while len(groups) > left:
            for copy in groups.pop(0):
                copy()

    def _fence(self):
        self.fenced = True
        self.unfenced[self.machine.current].clear()

    def _multiply(self, a, b, product, is_async):
        assert self.fenced, "operands that cp.async wrote need a fence before wgmma reads them"
        product.queue.append((a, b))
        return product

    def _tma_store(self, descriptor, start, buffer):
        written = (array for arrays in self.unfenced.values() for array in arrays)
        assert not any(np.may_share_memory(array, buffer.array) for array in written), "written without a fence"
        self.stores.append((descriptor, start, buffer))

    def _store_wait(self, left):
        self.machine.switch()  # TMA reads the buffers as late as this wait allows
        while len(self.stores) > left:
            descriptor, start, buffer = self.stores.pop(0)
            descriptor.write([int(i) for i in start], buffer.array)
