// What the forward and the backward scan share: tiles of TILE steps and 32 channels, their copies and their order.
//
// Macros: T type of u, dt, z, y; TB type of B and C; N states; WARPS of a block, which divide the states; TILE steps;
// PIPED 0 or 1; SHARED bytes of shared memory that the caller reserves.
#pragma once
#include "common.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int SLOTS = PIPED ? 4 : 2;    // tiles in shared memory as they come: PIPED keeps three and loads one
constexpr int BUFFERS = PIPED ? 2 : 1;  // of what one stage leaves to the next
static_assert(N % WARPS == 0 && TILE % WARPS == 0 && TILE % 8 == 0, "states and steps are dealt out evenly");

template <class X>
struct KeptType {
  using type = bf16;  // gradients of 16-bit tensors don't need more
};
template <>
struct KeptType<float> {
  using type = float;
};
using Kept = KeptType<T>::type;

enum Mark { REAL = 0, RESET = 1, PAD = 2 };

// A time step so long that the state before it is forgotten: exp2(FORGET * rate) is 0 for every decay rate, and gradients
// through the decay, which are multiplied by that 0, stay 0. Resets then cost the recurrence nothing.
constexpr float FORGET = 1e38f;
DEVICE float decay_rate(float A) { return fminf(A * LOG2E, -1e-30f); }

// ---- Rows of fp32 in shared memory, moved 16 bytes at a time.

template <int n>
DEVICE void read_row(float (&to)[n], const float* from) {
  constexpr int w = n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < n; k += w) {
    const Vec<float, w> v = load_vec<float, w>(from + k);
#pragma unroll
    for (int j = 0; j < w; ++j) to[k + j] = v.at[j];
  }
}

template <int n>
DEVICE void write_row(float* to, const float (&from)[n]) {
  constexpr int w = n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < n; k += w) {
    Vec<float, w> v;
#pragma unroll
    for (int j = 0; j < w; ++j) v.at[j] = from[k + j];
    store_vec<float, w>(to + k, v);
  }
}

// ---- Copies of one tile. Steps at or beyond L and channels at or beyond I arrive as zeros.

// One tensor's way through the tiles: ROWS rows of `width` numbers a tile, 16 bytes a thread and row. The threads that
// copy begin at warp `lead`, so that a block's tensors fall to different warps.
template <class X, int width, int ROWS = TILE>
struct Cursor {
  static constexpr int w = per_16_bytes<X>, pieces = width / w, total = ROWS * pieces;
  static constexpr int workers = total < THREADS ? total : THREADS, stride = workers / pieces;
  static_assert(workers % pieces == 0 && ROWS % stride == 0, "a thread copies one column");
  const X* at;
  int64 step, tile;
  int row, column;
  bool inside;

  // Rows lie `step` numbers apart, tiles `tile`; `from` is the first row of the first tile to copy, and columns from
  // `exist` on are zeros.
  DEVICE Cursor(const X* from, int64 step, int64 tile, int lead, int64 exist) : step(step), tile(tile) {
    const int worker = (threadIdx.x + THREADS - lead * 32 % THREADS) % THREADS;
    row = worker < workers ? worker / pieces : ROWS;
    column = worker % pieces * w;
    inside = column < exist;
    at = from ? from + row * step + column : nullptr;
  }

  // Copies into rows of `to_step` numbers, of which the first `rows` exist, and moves on to the next tile.
  DEVICE void copy(X* to, int to_step, int rows) {
    if (row < ROWS && at) {
#pragma unroll
      for (int k = 0; k < ROWS; k += stride)
        copy_async_16(to + (row + k) * to_step + column, at + k * step, inside && row + k < rows);
      at += tile;
    }
  }
};

constexpr int BC_ROW = 2 * N + per_16_bytes<TB>;  // B_t then C_t, padded against bank conflicts

// B and C as fp32, one row of steps a state (B's states, then C's); zeros at padding, whatever stands there.
DEVICE void widen_states(float (&to)[2 * N][TILE], const TB (&from)[TILE][BC_ROW], const int (&mark)[TILE]) {
  const int t = threadIdx.x % TILE;
  const bool pad = mark[t] == PAD;
#pragma unroll
  for (int k = 0; k < N; k += THREADS / TILE) {
    const int n = 2 * (k + threadIdx.x / TILE);
    if (N % (THREADS / TILE) == 0 || n < 2 * N) {
      const Vec<TB, 2> v = load_vec<TB, 2>(&from[t][n]);
      to[n][t] = pad ? 0.0f : to_float(v.at[0]);
      to[n + 1][t] = pad ? 0.0f : to_float(v.at[1]);
    }
  }
}

// Where documents begin and padding stands, one step a thread. A load's answer is stored one tile later, so that no
// thread waits for it.
struct Marker {
  const int* seq_idx;  // of this row, or null
  int L, t = 0, here = 0, before = 0;

  DEVICE Marker(const int* seq_idx, int L) : seq_idx(seq_idx), L(L) {}

  DEVICE void fetch(int t0) {
    if (threadIdx.x >= TILE) return;
    t = t0 + threadIdx.x;
    here = t < L ? 0 : -1;
    before = here;
    if (seq_idx && t < L) {
      here = seq_idx[t];
      before = t > 0 ? seq_idx[t - 1] : here;
    }
  }

  DEVICE void store(int (&mark)[TILE]) {
    if (threadIdx.x >= TILE) return;
    // Behind padding the document before it decides; a row that begins with padding continues what came before the call.
    for (int s = t - 2; here >= 0 && before < 0 && s >= 0; --s) before = seq_idx[s];
    mark[threadIdx.x] = here < 0 ? PAD : before >= 0 && here > before ? RESET : REAL;
  }
};

// ---- The order of the stages. `load` asks for a tile, `arrive` finishes its marks.

DEVICE void block_barrier() {
  if (WARPS == 1) __syncwarp();
  else __syncthreads();
}

template <class Load, class Arrive, class In, class Body, class Out>
DEVICE void run_tiles(int tiles, Load load, Arrive arrive, In stage_in, Body body, Out stage_out) {
  for (int i = -1; i < tiles + (PIPED ? 2 : 0); ++i) {
    load(i + 1);
    if (PIPED) {
      if (i >= 0 && i < tiles) stage_in(i);
      if (i >= 1 && i <= tiles) body(i - 1);
      if (i >= 2) stage_out(i - 2);
    } else if (i >= 0) {
      stage_in(i);
      block_barrier();
      body(i);
      block_barrier();
      stage_out(i);
    }
    arrive(i + 1);
    copy_async_wait<0>();
    block_barrier();
  }
}
