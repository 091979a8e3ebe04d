"""Loading cubins and launching kernels with CUDA's driver library, in the context and on the stream that torch uses.

A training step launches some thousands of kernels, so a launch costs as little as Python allows (2 to 3 µs for a dozen
arguments): all that CUDA reads is built once a kernel, and a launch packs the values into it. Nothing here allocates
on the device, copies or waits, so launches can be captured into a CUDA graph.

Source: CUDA 13.0 driver API, https://docs.nvidia.com/cuda/cuda-driver-api.
"""

from __future__ import annotations

import ctypes
import struct
import sys
import threading
from functools import lru_cache

import torch
from torch import Tensor

_MAX_DYNAMIC_SHARED, _PREFERRED_CARVEOUT = 8, 9  # CUfunction_attribute
_STATIC_SHARED, _LOCAL, _REGISTERS = 1, 3, 4
_CAPTURE_MODE_RELAXED = 2  # CUstreamCaptureMode
# CUlaunchConfig: grid and block (three numbers each), bytes of shared memory, stream, attributes and their count.
_CONFIG = struct.Struct("7I4xQQI4x")
_WITHOUT_ASKING = 48 << 10  # bytes of shared memory, static and dynamic, that every launch may have
# CUlaunchAttribute, of 72 bytes: programmatic stream serialization (6), allowed.
_OVERLAP = ctypes.create_string_buffer(struct.pack("I4xi", 6, 1), 72)
# The same for a cooperative launch (2).
_COOPERATIVE = ctypes.create_string_buffer(struct.pack("I4xi", 2, 1), 72)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    cuda.cuGetErrorString.argtypes = [ctypes.c_int, ctypes.c_void_p]
    return cuda


def _check(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _library().cuGetErrorString(status, ctypes.byref(text))
        why = text.value.decode() if text.value else "unknown error"
        raise RuntimeError(f"{what}: CUDA error {status}, {why}")


def version() -> tuple[int, int]:
    """The newest CUDA that the installed driver knows."""
    number = ctypes.c_int()
    _check(_library().cuDriverGetVersion(ctypes.byref(number)), "cuDriverGetVersion")
    return number.value // 1000, number.value % 1000 // 10


@lru_cache(maxsize=64)
def _context(index: int) -> int:
    """torch's context on GPU `index`: the device's primary one, as for everything that uses the CUDA runtime."""
    torch.cuda.init()
    device, context = ctypes.c_int(), ctypes.c_void_p()
    _check(_library().cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    _check(_library().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "cuDevicePrimaryCtxRetain")
    assert context.value is not None
    return context.value


class _Current:
    """`with _Current(context):` makes it this thread's context, for the calls inside."""

    def __init__(self, context: int) -> None:
        self._context = context

    def __enter__(self) -> None:
        _check(_library().cuCtxPushCurrent_v2(ctypes.c_void_p(self._context)), "cuCtxPushCurrent")

    def __exit__(self, *_: object) -> None:
        _check(_library().cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p())), "cuCtxPopCurrent")


class Module:
    """A cubin loaded on GPU `index`."""

    def __init__(self, cubin: bytes, index: int) -> None:
        self.index = index
        self._handle = ctypes.c_void_p()
        self._kernels: dict[str, Kernel] = {}
        # Loading is an unsafe call in the eyes of a stream that records a graph; it touches no stream.
        mode = ctypes.c_int(_CAPTURE_MODE_RELAXED)
        with _Current(_context(index)):
            _check(_library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode)), "capture mode")
            try:
                _check(_library().cuModuleLoadData(ctypes.byref(self._handle), cubin), "cuModuleLoadData")
            finally:
                _library().cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name. RuntimeError when there is none."""
        if name not in self._kernels:
            function = ctypes.c_void_p()
            with _Current(_context(self.index)):
                status = _library().cuModuleGetFunction(ctypes.byref(function), self._handle, name.encode())
                _check(status, f"kernel {name}")
                assert function.value is not None
                self._kernels[name] = Kernel(name, function.value, self.index)
        return self._kernels[name]


class Kernel:
    """A kernel on one GPU; calling it launches it."""

    def __init__(self, name: str, function: int, index: int) -> None:
        self.name = name
        self._function, self._index, self._context = ctypes.c_void_p(function), index, _context(index)
        self._launch, self._current = _library().cuLaunchKernelEx, _library().cuCtxGetCurrent
        self._stream = getattr(torch._C, "_cuda_getCurrentRawStream", _public_stream)
        self._config, self._here = ctypes.create_string_buffer(_CONFIG.size), ctypes.c_void_p()
        self._config_ref, self._here_ref = ctypes.byref(self._config), ctypes.byref(self._here)
        self._shared, self._beside = 0, False  # until the first launch
        self._sizes = self._parameter_sizes()
        self._values: struct.Struct | None = None
        self._lock = threading.Lock()

    def __call__(
        self,
        grid: int | tuple[int, int, int],
        block: int,
        *args: Tensor | int | float | None,
        shared: int = 0,
        overlap: bool = False,
        cooperative: bool = False,
    ) -> None:
        """Launch on torch's current stream of this GPU.

        grid: blocks, as a number or (x, y, z); block: threads of each; shared: bytes of dynamic shared memory.
        args: a tensor of this GPU gives its address, None a null pointer, int a `long long`, float a `float`.
        overlap: blocks may begin before the kernel in front of this one has ended (compute capability 9.0; the kernel
        says in its code from where on it needs the other's results). cooperative: all blocks run at once, or none does;
        they may wait for each other. Not both. Raises RuntimeError with CUDA's reason when the
        launch is refused (an earlier kernel's fault is reported here too).
        """
        x, y, z = grid if isinstance(grid, tuple) else (grid, 1, 1)
        index = self._index
        values: list[int | float] = []
        for arg in args:
            if isinstance(arg, Tensor):
                assert arg.get_device() == index, f"{self.name}: a tensor is on {arg.device}, not on cuda:{index}"
                values.append(arg.data_ptr())
            else:
                values.append(arg or 0)
        stream = self._stream(index)
        with self._lock:  # the buffers are one, and the backward pass runs in a thread of its own
            if self._values is None:
                self._bind(args)
            if shared > self._shared:
                self._allow(shared)
            if overlap and not self._beside:
                self._divide()
            self._values.pack_into(self._slots, 0, *values)  # type: ignore[union-attr]
            kind = _COOPERATIVE if cooperative else _OVERLAP if overlap else None
            attributes = (0, 0) if kind is None else (ctypes.addressof(kind), 1)
            _CONFIG.pack_into(self._config, 0, x, y, z, block, 1, 1, shared, stream, *attributes)
            self._current(self._here_ref)
            if self._here.value == self._context:
                status = self._launch(self._config_ref, self._function, self._pointers, None)
            else:
                with _Current(self._context):
                    status = self._launch(self._config_ref, self._function, self._pointers, None)
        if status:
            _check(status, f"launch of {self.name}, grid {(x, y, z)}, block {block}, shared {shared}")

    def attributes(self) -> dict[str, int]:
        """What a thread or block takes: `registers`, `local` (stack and spills) and static `shared` bytes."""
        found = {}
        with _Current(self._context):
            for key, number in (("registers", _REGISTERS), ("local", _LOCAL), ("shared", _STATIC_SHARED)):
                value = ctypes.c_int()
                status = _library().cuFuncGetAttribute(ctypes.byref(value), number, self._function)
                _check(status, f"attributes of {self.name}")
                found[key] = value.value
        return found

    def _parameter_sizes(self) -> list[int] | None:
        """Bytes of each parameter; None where the driver is older than CUDA 12.4 and can't tell."""
        ask = getattr(_library(), "cuFuncGetParamInfo", None)
        if ask is None:
            return None
        sizes: list[int] = []
        offset, size = ctypes.c_size_t(), ctypes.c_size_t()
        while not ask(self._function, ctypes.c_size_t(len(sizes)), ctypes.byref(offset), ctypes.byref(size)):
            sizes.append(size.value)
        return sizes

    def _bind(self, args: tuple[Tensor | int | float | None, ...]) -> None:
        """Eight bytes for each argument and the pointers to them; the first launch says which are floats."""
        given = [4 if isinstance(arg, float) else 8 for arg in args]
        assert self._sizes in (None, given), f"{self.name}: arguments of {given} bytes, parameters of {self._sizes}"
        layout = struct.Struct("".join("f4x" if size == 4 else "q" for size in given))
        self._slots = ctypes.create_string_buffer(max(8, layout.size))
        first = ctypes.addressof(self._slots)
        self._pointers = (ctypes.c_void_p * max(1, len(args)))(*(first + 8 * i for i in range(len(args))))
        self._values = layout
        self._shared = _WITHOUT_ASKING - self.attributes()["shared"]

    def _allow(self, shared: int) -> None:
        """More than 48 KB of shared memory, the static included, has to be asked for, once a kernel."""
        with _Current(self._context):
            what = f"{shared} bytes of shared memory for {self.name}"
            _check(_library().cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, ctypes.c_int(shared)), what)
        self._shared = shared
        self._divide()

    def _divide(self) -> None:
        """As much of a multiprocessor's memory as can be shared, once a kernel: blocks of two kernels stand beside each
        other only where both want it divided alike."""
        with _Current(self._context):
            status = _library().cuFuncSetAttribute(self._function, _PREFERRED_CARVEOUT, ctypes.c_int(100))
            _check(status, f"division of memory for {self.name}")
        self._beside = True


def _public_stream(index: int) -> int:
    return torch.cuda.current_stream(index).cuda_stream
