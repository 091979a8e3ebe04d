// What the forward and the backward scan share: tiles of TILE steps and 32 channels, their copies and their order.
//
// Macros: T type of u, dt, z, y; TB type of B and C; N states; WARPS of a block, which divide the states; TILE steps;
// GATED 1 if z is given; SHARED bytes of shared memory that the caller reserves.
#pragma once
#include "common.cuh"

constexpr int THREADS = 32 * WARPS;
constexpr int SLOTS = 2;           // tiles in shared memory as they come: one at work, one on its way
constexpr int STATES = N / WARPS;  // of one thread
static_assert(N % WARPS == 0 && WARPS >= 2 && WARPS <= 8 && (TILE == 8 || TILE == 16), "states and steps are dealt out evenly");

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

// ---- fp32 tiles in shared memory: a row of TILE steps a channel, even channels' rows before the odd ones'. Groups of 4
// steps are swapped from row to row, so that 8 lanes on neighbouring channels, or on every second one, touch all 32 banks
// with 16 bytes each.

struct alignas(16) Rows {
  float at[32 * TILE];
};
DEVICE int place(int c, int t) {
  const int r = c / 2 + c % 2 * 16;
  return r * TILE + (t ^ ((r * TILE / 32 % (TILE / 4)) ^ (r / 16 * (TILE / 8))) * 4);
}

template <int n>
DEVICE void read_steps(float (&to)[n], const Rows& from, int c, int t0) {
  constexpr int w = n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < n; k += w) {
    const Vec<float, w> v = load_vec<float, w>(&from.at[place(c, t0 + k)]);
#pragma unroll
    for (int j = 0; j < w; ++j) to[k + j] = v.at[j];
  }
}

template <int n>
DEVICE void write_steps(Rows& to, int c, int t0, const float (&from)[n]) {
  constexpr int w = n % 4 == 0 ? 4 : n % 2 == 0 ? 2 : 1;
#pragma unroll
  for (int k = 0; k < n; k += w) {
    Vec<float, w> v;
#pragma unroll
    for (int j = 0; j < w; ++j) v.at[j] = from[k + j];
    store_vec<float, w>(&to.at[place(c, t0 + k)], v);
  }
}

// The same numbers for every lane of a warp.
template <int n>
DEVICE void read_broadcast(float (&to)[n], const float* from) {
#pragma unroll
  for (int k = 0; k < n; k += 4) {
    const Vec<float, 4> v = load_vec<float, 4>(from + k);
#pragma unroll
    for (int j = 0; j < 4; ++j) to[k + j] = v.at[j];
  }
}

// ---- Edges: what is done once per step and channel. A thread takes two neighbouring channels and PER consecutive steps.

constexpr int PER = TILE * 16 / THREADS;
static_assert(PER >= 1, "every thread has work at the edges");

struct Edge {
  int c, t0;  // the first of its channels in the block, the first of its steps in the tile
  DEVICE Edge() : c(threadIdx.x % 16 * 2), t0(threadIdx.x / 16 * PER) {}
};

// One number a channel, zeros where there are none.
DEVICE void read_channels(float (&to)[2], const float* from, int64 c, int64 I) {
#pragma unroll
  for (int k = 0; k < 2; ++k) to[k] = from && c + k < I ? from[c + k] : 0.0f;
}

// What marks do to an edge's numbers: padding takes no time and has no value; a step that begins a document forgets.
DEVICE void mark_values(float (&values)[2][PER], const int (&mark)[TILE], const Edge& edge) {
#pragma unroll
  for (int k = 0; k < PER; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) values[j][k] = mark[edge.t0 + k] == PAD ? 0.0f : values[j][k];
  }
}
DEVICE void mark_times(float (&dts)[2][PER], const int (&mark)[TILE], const Edge& edge) {
  mark_values(dts, mark, edge);
#pragma unroll
  for (int k = 0; k < PER; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) dts[j][k] = mark[edge.t0 + k] == RESET ? FORGET : dts[j][k];
  }
}

// The warps' shares of a sum, added in order.
DEVICE void add_shares(float (&sum)[2][PER], const Rows (&shares)[WARPS], const Edge& edge) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    read_steps(sum[j], shares[0], edge.c + j, edge.t0);
#pragma unroll
    for (int w = 1; w < WARPS; ++w) {
      float part[PER];
      read_steps(part, shares[w], edge.c + j, edge.t0);
#pragma unroll
      for (int k = 0; k < PER; ++k) sum[j][k] += part[k];
    }
  }
}

// Where channel c of step t stands in a tile as it comes: half a row further for every second thread's steps, so that the
// two halves of a warp read from different banks.
DEVICE int column(int t, int c) { return c ^ (t / PER % 2 * 16); }

template <class X>
DEVICE void read_pair(float (&to)[2], const X* from) {
  const Vec<X, 2> v = load_vec<X, 2>(from);
  to[0] = to_float(v.at[0]);
  to[1] = to_float(v.at[1]);
}

template <>
DEVICE void read_pair<bf16>(float (&to)[2], const bf16* from) {
  const uint32 v = *reinterpret_cast<const uint32*>(from);
  to[0] = bits_float(v << 16);
  to[1] = bits_float(v & 0xffff0000u);
}

template <class X>
DEVICE void write_pair(X* to, const float (&from)[2]) {
  store_vec<X, 2>(to, pair_from_floats<X>(from[0], from[1]));
}

// ---- Copies of one tile between memory and shared memory, 16 bytes a thread and row.

// One tensor's way through the tiles: ROWS rows of `width` numbers a tile, in order or as column() places them. The
// threads that copy begin at warp `lead`, so that a block's tensors fall to different warps.
template <class X, int width, bool PLACED = false, int ROWS = TILE>
struct Cursor {
  static constexpr int w = per_16_bytes<X>, pieces = width / w, total = ROWS * pieces;
  static constexpr int workers = total < THREADS ? total : THREADS, stride = workers / pieces;
  static_assert(workers % pieces == 0 && ROWS % stride == 0, "a thread copies one column");
  X* at;
  int64 step, tile;
  int row, column;

  // Rows lie `step` numbers apart, tiles `tile`; `from` is the first row of the first tile, or null; of each row the first
  // `exist` numbers exist. Without anything to copy `row` is out of reach.
  DEVICE Cursor(const X* from, int64 step, int64 tile, int lead, int64 exist) : step(step), tile(tile) {
    const int worker = (threadIdx.x + THREADS - lead * 32 % THREADS) % THREADS;
    column = worker % pieces * w;
    row = from && worker < workers ? worker / pieces : ROWS;
    if (column >= exist) row += 2 * ROWS;  // such a column arrives as zeros and is never stored
    at = const_cast<X*>(from) + worker / pieces * step + column;
  }

  DEVICE int place(int t) const { return PLACED ? ::column(t, column) : column; }

  // A tile's first `rows` rows exist; the others, and columns that don't, arrive as zeros.
  DEVICE void copy_in(X* to, int to_step, int rows) {
    const bool outside = row >= 2 * ROWS;
    if (row != ROWS && row != 3 * ROWS) {
      const int first = outside ? row - 2 * ROWS : row;
#pragma unroll
      for (int k = 0; k < ROWS; k += stride)
        copy_async_16(to + (first + k) * to_step + place(first + k), at + k * step, !outside && first + k < rows);
      at += tile;
    }
  }

  DEVICE void copy_out(const X* from, int from_step, int rows) {
    if (row < ROWS) {
#pragma unroll
      for (int k = 0; k < ROWS; k += stride)
        if (row + k < rows)
          store_vec<X, w>(at + k * step, load_vec<X, w>(from + (row + k) * from_step + place(row + k)));
      at += tile;
    }
  }
};

// A row of `states` numbers of B and C as they come, padded against bank conflicts.
template <int states>
constexpr int narrow_row = states + per_16_bytes<TB>;

// They as fp32, one row of steps a state; zeros at padding, whatever stands there.
template <int states>
DEVICE void widen_states(float (&to)[states][TILE], const TB (&from)[TILE][narrow_row<states>], const int (&mark)[TILE],
                         bool special) {
  const int t = threadIdx.x % TILE;
  const bool pad = special && mark[t] == PAD;
#pragma unroll
  for (int k = 0; k < states / 2; k += THREADS / TILE) {
    const int n = 2 * (k + threadIdx.x / TILE);
    if (states / 2 % (THREADS / TILE) == 0 || n < states) {
      float both[2];
      read_pair(both, &from[t][n]);
      to[n][t] = pad ? 0.0f : both[0];
      to[n + 1][t] = pad ? 0.0f : both[1];
    }
  }
}

// ---- Segments: a row's tiles in spans of `span`, each a block's, where rows alone are too few for the GPU.

struct Segment {
  int64 batch, c0;           // the row, the block's first channel
  int block, blocks;         // of a row's channels
  int index, count;          // the segment, and how many there are
  int first, tiles;          // its first tile, and how many it has
  DEVICE Segment(int64 L, int64 I, int64 segments, int64 span) {
    blocks = (int)((I + 31) / 32);
    block = blockIdx.x % blocks;
    count = (int)segments;
    index = blockIdx.x / blocks % count;
    batch = blockIdx.x / blocks / count;
    c0 = (int64)block * 32;
    const int all = (int)((L + TILE - 1) / TILE);
    first = index * (int)span;
    tiles = all - first < (int)span ? all - first : (int)span;
  }
  DEVICE int64 row() const { return batch * count + index; }
};

// Where documents begin and padding stands, one step a thread. What a load answers is looked at one tile later, so that no
// thread waits for it.
struct Marker {
  const int* seq_idx;  // of this row, or null
  int L, t = 0, here = -1, before = -1;

  DEVICE Marker(const int* seq_idx, int L) : seq_idx(seq_idx), L(L) {}

  DEVICE void fetch(int t0) {
    if (threadIdx.x >= TILE) return;
    t = t0 + threadIdx.x;
    if (seq_idx && t < L) here = seq_idx[t];
    if (seq_idx && t < L && t > 0) before = seq_idx[t - 1];
  }

  // `special`: whether the tile has any mark, so that the others need not look.
  DEVICE void store(int (&mark)[TILE], int& special) {
    if (threadIdx.x >= 32) return;
    int m = REAL;
    if (threadIdx.x < TILE) {
      if (t >= L) m = PAD;
      else if (seq_idx && here < 0) m = PAD;
      else if (seq_idx && t > 0) {
        // Behind padding the document before it decides; a row that begins with padding continues what was before the call.
        int number = before;
        for (int s = t - 2; number < 0 && s >= 0; --s) number = seq_idx[s];
        if (number >= 0 && here > number) m = RESET;
      }
      mark[threadIdx.x] = m;
    }
    const bool any = __any_sync(0xffffffffu, m != REAL);
    if (threadIdx.x == 0) special = any;
  }
};

// ---- The order of the stages, each of which may read what the one before it left in shared memory:
// load (asks for a tile), arrive (its marks), in, body, out, flush (stores the results). A block waits between stages;
// the multiprocessor's other blocks are at other stages then.

template <class Load, class Arrive, class In, class Body, class Out, class Flush>
DEVICE void run_tiles(int tiles, Load load, Arrive arrive, In stage_in, Body body, Out stage_out, Flush flush) {
  for (int i = -1; i < tiles; ++i) {
    if (i >= 0) {
      stage_in(i);
      __syncthreads();
    }
    if (i + 1 < tiles) load(i + 1);
    copy_async_commit();
    if (i >= 0) {
      body(i);
      __syncthreads();
      stage_out(i);
    }
    if (i + 1 < tiles) arrive(i + 1);
    copy_async_wait<0>();
    __syncthreads();
    if (i >= 0) flush(i);
  }
}
