"""Compiling, loading and launching kernels on a CUDA GPU. Run on a machine with one: `pytest -m gpu
tests/gpu/test_cuda_runtime.py`; needs torch and pytest alone.
"""

from __future__ import annotations

import logging
import threading

import pytest
import torch

from moai_core import cuda

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

SOURCE = """// moai: kernels axpy, echo, large, spin; macros T=float
extern "C" __global__ void axpy(const T* x, const T* y, T* out, long long n, float scale) {
  int64 i = blockIdx.x * (int64)blockDim.x + threadIdx.x;
  if (i < n) out[i] = from_float<T>(to_float(x[i]) + scale * (y ? to_float(y[i]) : 1.0f));
}
extern "C" __global__ void echo(long long* out, long long a, float b, long long c, float d, long long e) {
  out[0] = a; out[1] = (long long)b; out[2] = c; out[3] = (long long)(8 * d); out[4] = e;
  out[5] = gridDim.x; out[6] = gridDim.y; out[7] = gridDim.z; out[8] = blockDim.x;
}
extern "C" __global__ void large(float* out, long long n) {
  extern __shared__ float pool[];
  for (int64 i = threadIdx.x; i < n; i += blockDim.x) pool[i] = (float)i;
  __syncthreads();
  for (int64 i = threadIdx.x; i < n; i += blockDim.x) out[i] = pool[n - 1 - i];
}
extern "C" __global__ void spin(float* out, long long clocks) {
  long long start = clock64();
  while (clock64() - start < clocks) {}
  out[0] += 1.0f;
}
"""


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("source") / "trial.cu"
    path.write_text(SOURCE)
    return str(path)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MOAI_CACHE", str(tmp_path_factory.getbasetemp() / "cubins"))


def on(index: int = 0) -> torch.device:
    return torch.device("cuda", index)


def test_this_gpu_is_not_refused():
    assert cuda.why_not(on()) is None and cuda.why_not(torch.device("cuda")) is None and cuda.why_not() is None


@pytest.mark.parametrize(
    "name, dtype", [("float", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)], ids=str
)
@pytest.mark.parametrize("n", [1, 255, 256, 100_003])
def test_values_arrive(file, name, dtype, n):
    kernel = cuda.kernel(file, "axpy", on(), T=name)
    x, y = torch.randn(n, device="cuda").to(dtype), torch.randn(n, device="cuda").to(dtype)
    for other in (y, None):
        out = torch.full_like(x, float("nan"))
        kernel(-(-n // 256), 256, x, other, out, n, 0.25)
        want = x.double() + 0.25 * (1.0 if other is None else other.double())
        torch.testing.assert_close(out, want.to(dtype), rtol=2e-2 if dtype == torch.bfloat16 else 2e-3, atol=1e-6)


def test_every_kind_of_argument(file):
    out = torch.zeros(9, dtype=torch.int64, device="cuda")
    kernel = cuda.kernel(file, "echo", on(), T="float")
    kernel((2, 3, 4), 64, out, 2**40 + 1, -3.0, -7, 1.5, 2**62)
    assert out.tolist() == [2**40 + 1, -3, -7, 12, 2**62, 2, 3, 4, 64]
    kernel(5, 32, out, True, 0, 0, 7, -1)  # whole numbers for floats, once the kinds are known
    assert out.tolist() == [1, 0, 0, 56, -1, 5, 1, 1, 32]


def test_wrong_arguments_are_refused_before_they_reach_the_gpu(file):
    x, n = torch.zeros(8, device="cuda"), 8
    fresh = cuda.driver.Module(cuda.nvrtc.cubin(cuda.Path(file), {"T": "float"}, arch()), 0).kernel("axpy")
    with pytest.raises(AssertionError, match="axpy: arguments of"):
        fresh(1, 32, x, x, x, n)
    with pytest.raises(AssertionError, match="axpy: arguments of"):
        fresh(1, 32, x, x, x, n, 1)  # an int where the first launch must see a float
    with pytest.raises(AssertionError, match="is on cpu, not on cuda:0"):
        fresh(1, 32, x.cpu(), x, x, n, 1.0)
    fresh(1, 32, x, x, x, n, 1.0)
    torch.cuda.synchronize()


def arch() -> int:
    return cuda.nvrtc.load().architecture(torch.cuda.get_device_capability(0))


def test_errors_are_named(file):
    with pytest.raises(RuntimeError, match="kernel nowhere: CUDA error 500"):
        cuda.kernel(file, "nowhere", on(), T="float")
    with pytest.raises(cuda.nvrtc.CompileError, match=r"trial\.cu"):
        cuda.kernel(file, "axpy", on(), T="no_such_type")
    kernel, x = cuda.kernel(file, "axpy", on(), T="float"), torch.ones(8, device="cuda")
    with pytest.raises(RuntimeError, match=r"launch of axpy, grid \(1, 1, 1\), block 4096, shared 0: CUDA error 1"):
        kernel(1, 4096, x, None, x, 8, 1.0)
    with pytest.raises(RuntimeError, match="bytes of shared memory for axpy: CUDA error 1"):
        kernel(1, 32, x, None, x, 8, 1.0, shared=1 << 20)
    kernel(1, 32, x, None, x, 8, 1.0)  # none of this spoils the context
    assert x.tolist() == [2.0] * 8


def test_much_shared_memory(file):
    kernel = cuda.kernel(file, "large", on(), T="float")
    n = (96 << 10) // 4
    for count in (100, n, 200):
        out = torch.full((count,), float("nan"), device="cuda")
        kernel(1, 128, out, count, shared=4 * count)
        assert torch.equal(out, torch.arange(count - 1, -1, -1, device="cuda").float())


def test_runs_on_the_current_stream(file):
    """A kernel of a second waits in one stream; another stream's work isn't held up, its own is."""
    spin = cuda.kernel(file, "spin", on(), T="float")
    axpy = cuda.kernel(file, "axpy", on(), T="float")
    slow, fast = torch.cuda.Stream(), torch.cuda.Stream()
    x, y = torch.zeros(1, device="cuda"), torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(slow):
        spin(1, 1, x, 1_000_000_000)
        axpy(1, 1, x, None, x, 1, 10.0)
    with torch.cuda.stream(fast):
        axpy(1, 1, y, None, y, 1, 10.0)
    fast.synchronize()
    assert not slow.query(), "the fast stream waited for the slow one"
    slow.synchronize()
    assert (x.item(), y.item()) == (11.0, 10.0)


def test_graphs_record_and_replay(file):
    axpy = cuda.kernel(file, "axpy", on(), T="float")
    x = torch.zeros(1000, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        axpy(4, 256, x, None, x, 1000, 1.0)
        # The first use of a kernel may fall into a recording, too.
        cuda.kernel(file, "large", on(), T="bf16")(1, 128, x, 1000, shared=4000)
        axpy(4, 256, x, None, x, 1000, 2.0)
    assert x.sum().item() == 0, "recorded, not run"
    for _ in range(3):
        graph.replay()
    assert torch.equal(x, torch.arange(999, -1, -1, device="cuda") + 2.0)


def test_threads_launch_at_once(file):
    """As backward passes do: each thread's arguments are its own."""
    axpy = cuda.kernel(file, "axpy", on(), T="float")
    results = [torch.zeros(64, device="cuda") for _ in range(8)]

    def work(index: int) -> None:
        for _ in range(500):
            axpy(1, 64, results[index], None, results[index], 64, float(index))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [r.unique().tolist() for r in results] == [[500.0 * i] for i in range(8)]


def test_a_custom_op_in_the_backward_pass(file):
    """autograd's own thread has no context of its own until someone makes one current."""
    axpy = cuda.kernel(file, "axpy", on(), T="float")

    class Shift(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            out = torch.empty_like(grad)
            axpy(1, 64, grad.contiguous(), None, out, 64, 5.0)
            return out

    x = torch.zeros(64, device="cuda", requires_grad=True)
    Shift.apply(x).sum().backward()
    assert x.grad.unique().tolist() == [6.0]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_each_gpu_has_its_own(file):
    values = [torch.zeros(8, device=on(i)) for i in (0, 1)]
    for current in (0, 1):
        with torch.cuda.device(current):
            for i in (1, 0):
                cuda.kernel(file, "axpy", on(i), T="float")(1, 32, values[i], None, values[i], 8, float(i + 1))
    assert [v.unique().tolist() for v in values] == [[2.0], [4.0]]
    with pytest.raises(AssertionError, match="is on cuda:1, not on cuda:0"):
        cuda.kernel(file, "axpy", on(0), T="float")(1, 32, values[1], None, values[1], 8, 1.0)


def test_compiles_once_and_says_so(file, caplog):
    caplog.set_level(logging.INFO, "moai.cuda")
    cuda.kernel.cache_clear()
    first = cuda.kernel(file, "axpy", on(), T="float", M=1)
    assert caplog.messages == [f"compiling GPU kernels for sm_{arch()} (once): trial"]
    cuda.kernel.cache_clear()
    assert cuda.kernel(file, "axpy", on(), T="float", M=1) is first and len(caplog.messages) == 1
    assert first.attributes()["local"] == 0 and first.attributes()["registers"] > 0
