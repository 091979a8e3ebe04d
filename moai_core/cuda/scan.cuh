// What the forward and the backward scan share: tiles of TILE steps and 32 channels, their copies and their order.
//
// Macros: T type of u, dt, z, y; TB type of B and C; N states; WARPS of a team, which divide the states; TEAMS of a block;
// TILE steps; GATED 1 if z is given; SHARED bytes of shared memory that the caller reserves.
#pragma once
#include "common.cuh"

constexpr int THREADS = 32 * WARPS;  // of a team
constexpr int SLOTS = 2;           // tiles in shared memory as they come: one at work, one on its way
constexpr int STATES = N / WARPS;  // of one thread
static_assert(N % WARPS == 0 && WARPS >= 1 && WARPS <= 8, "states are dealt out evenly");
static_assert(TILE == 8 || TILE == 16 || TILE == 32, "steps are dealt out evenly");
static_assert(TEAMS >= 1 && TEAMS * WARPS <= 16, "a multiprocessor holds a block, and a barrier is left for each team");

// ---- Shared memory by addresses of 32 bits, which the machine's instructions take. NVRTC (unlike nvcc) gives a pointer to
// shared memory 64 bits, and the arithmetic that leads to it as many: in inner loops that was a tenth of the instructions,
// and registers that weren't there.

#ifdef MOAI_HOST
using Address = unsigned long long;
#else
using Address = uint32;
#endif

DEVICE Address address_of(const void* shared) {
#ifdef MOAI_HOST
  return (Address)shared;
#else
  return (Address)__cvta_generic_to_shared(shared);
#endif
}

// What lies `further` bytes behind an address; a constant there costs no instruction.
template <class X>
DEVICE X& at_address(Address shared, int further = 0) {
#ifdef MOAI_HOST
  auto bytes = reinterpret_cast<unsigned char*>(shared);
#else
  auto bytes = static_cast<unsigned char*>(__cvta_shared_to_generic(shared));
#endif
  return *reinterpret_cast<X*>(bytes + further);
}

// Where tile i stands among those in shared memory; so does tile -1, for SLOTS is even.
DEVICE uint32 slot_of(int i) { return (uint32)i % SLOTS; }

// ---- Teams: where rows are too few for the GPU, a block has several teams of WARPS, which take the tiles in turn. What is
// left to wait for the tile before is a state's recurrence alone, so that teams are at different states of different tiles.

DEVICE int team() { return TEAMS == 1 ? 0 : threadIdx.x / THREADS; }
DEVICE uint32 thread() { return TEAMS == 1 ? threadIdx.x : threadIdx.x % THREADS; }  // of the team

DEVICE void team_sync() {
  if (TEAMS == 1) {
    __syncthreads();
  } else {
#ifdef MOAI_HOST
    emu::barrier(1 + team(), THREADS, "bar.sync");
#else
    // A number that the compiler doesn't know reserves all 16 barriers, too many where blocks share a multiprocessor.
    if (TEAMS > 2) asm volatile("bar.sync %0, %1;" ::"r"(1 + team()), "n"(THREADS) : "memory");
    else if (team() == 0) asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
    else asm volatile("bar.sync 2, %0;" ::"n"(THREADS) : "memory");
#endif
  }
}

// What a lane leaves in shared memory for the same lane of the next team: the recurrence's value behind tile `turn` - 1 of
// the segment. Both are written and read as one, so that nothing else says when the value is there. A place is used again
// only after the value has gone through all teams, so after it was read.
struct alignas(8) Baton {
  uint32 value;
  int turn;
};

DEVICE void pass_on(Address to, float value, int turn) {
#ifdef MOAI_HOST
  at_address<Baton>(to) = {float_bits(value), turn};
#else
  asm volatile("{\n.reg .b64 both;\nmov.b64 both, {%1, %2};\nst.relaxed.cta.shared.b64 [%0], both;\n}" ::"r"(to),
               "r"(float_bits(value)), "r"(turn));
#endif
}

DEVICE Baton look_at(Address from) {
#ifdef MOAI_HOST
  return at_address<Baton>(from);
#else
  Baton b;
  asm volatile("{\n.reg .b64 both;\nld.relaxed.cta.shared.b64 both, [%2];\nmov.b64 {%0, %1}, both;\n}"
               : "=r"(b.value), "=r"(b.turn)
               : "r"(from));
  return b;
#endif
}

// By all lanes of a warp. `seen`: what an earlier look has seen.
DEVICE float take_over(Address from, int turn, Baton seen) {
  while (seen.turn != turn) {
#ifdef MOAI_HOST
    __nanosleep(20);
#endif
    seen = look_at(from);
  }
  __syncwarp();
  return bits_float(seen.value);
}

template <class X>
struct KeptType {
  using type = bf16;  // gradients of 16-bit tensors don't need more
};
template <>
struct KeptType<float> {
  using type = float;
};
using Kept = KeptType<T>::type;

// States whose summaries are one warp's (scan_summary.cu); each such group has its own sum of dt.
constexpr int GROUP = N < 8 ? N : 8, GROUPS = N / GROUP;

enum Mark { REAL = 0, RESET = 1, PAD = 2 };

// A time step so long that the state before it is forgotten: exp2(FORGET * rate) is 0 for every decay rate, and gradients
// through the decay, which are multiplied by that 0, stay 0. Resets then cost the recurrence nothing.
constexpr float FORGET = 1e38f;
DEVICE float decay_rate(float A) { return fminf(A * LOG2E, -1e-30f); }

// ---- Blocks that wait for other blocks of the same kernel. `flags`, zeros before the launch: how many blocks have begun,
// then of every block whether what it leaves to others is in memory; or null. Blocks are numbered in the order in which
// they begin, so that one that waits for a lower number waits for a block that runs or has run.

struct Chain {
  int* flags;

  DEVICE explicit operator bool() const { return flags; }
  // One thread calls it.
  DEVICE int begin() const { return atomicAdd(flags, 1); }

  // By all threads of a block.
  DEVICE void wait(int64 number) const {
    if (threadIdx.x == 0) {
#ifdef MOAI_HOST
      while (!*(volatile int*)&flags[1 + number]) {}
#else
      int there = 0;
      while (true) {
        asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(there) : "l"(flags + 1 + number) : "memory");
        if (there) break;
        __nanosleep(100);
      }
#endif
    }
    __syncthreads();
  }
  DEVICE void finish(int64 number) const {
    __syncthreads();
    if (threadIdx.x == 0) {
#ifdef MOAI_HOST
      flags[1 + number] = 1;
#else
      __threadfence();
      asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(flags + 1 + number), "r"(1) : "memory");
#endif
    }
  }
};

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
DEVICE void read_four(float* to, const float* from) {
  const Vec<float, 4> v = load_vec<float, 4>(from);
#pragma unroll
  for (int j = 0; j < 4; ++j) to[j] = v.at[j];
}
template <int n>
DEVICE void read_broadcast(float (&to)[n], const float* from) {
#pragma unroll
  for (int k = 0; k < n; k += 4) read_four(&to[k], from + k);
}

// ---- Edges: what is done once per step and channel. A thread takes two neighbouring channels and PER consecutive steps.

constexpr int PER = TILE * 16 / THREADS;
static_assert(PER >= 1, "every thread has work at the edges");

struct Edge {
  int c, t0;  // the first of its channels in the block, the first of its steps in the tile
  int swap;   // 1 where its steps are swapped in pairs in a tile as it comes (place_row)
  // `hold`: in registers all the time, where some are left.
  DEVICE explicit Edge(bool hold)
      : c(thread() % 16 * 2), t0(thread() / 16 * PER), swap(PER % 2 ? 0 : thread() / 16 % 2) {
    if (hold) c = keep(c), t0 = keep(t0), swap = keep(swap);
  }
  DEVICE int row(int k) const { return t0 + k + (k % 2 ? -swap : swap); }
};

// One number a channel, zeros where there are none.
DEVICE void read_channels(float (&to)[2], const float* from, int64 c, int64 I) {
#pragma unroll
  for (int k = 0; k < 2; ++k) to[k] = from && c + k < I ? from[c + k] : 0.0f;
}

// What marks do to an edge's numbers: padding takes no time and has no value; a step that begins a document forgets.
DEVICE void mark_values(float (&values)[2][PER], const int (&mark)[TILE + 1], const Edge& edge) {
#pragma unroll
  for (int k = 0; k < PER; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) values[j][k] = mark[edge.t0 + k] == PAD ? 0.0f : values[j][k];
  }
}
DEVICE void mark_times(float (&dts)[2][PER], const int (&mark)[TILE + 1], const Edge& edge) {
  mark_values(dts, mark, edge);
#pragma unroll
  for (int k = 0; k < PER; ++k) {
#pragma unroll
    for (int j = 0; j < 2; ++j) dts[j][k] = mark[edge.t0 + k] == RESET ? FORGET : dts[j][k];
  }
}

// The warps' shares of a sum, added in order: of each, the tile `which`.
template <class Share>
DEVICE void add_shares(float (&sum)[2][PER], const Share (&shares)[WARPS], Rows Share::*which, const Edge& edge) {
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    read_steps(sum[j], shares[0].*which, edge.c + j, edge.t0);
#pragma unroll
    for (int w = 1; w < WARPS; ++w) {
      float part[PER];
      read_steps(part, shares[w].*which, edge.c + j, edge.t0);
#pragma unroll
      for (int k = 0; k < PER; ++k) sum[j][k] += part[k];
    }
  }
}

// Where step t stands in a tile as it comes: every second thread's steps are swapped in pairs, so that the two halves of a
// warp, at steps PER apart, read from different banks.
DEVICE int place_row(int t) { return PER % 2 ? t : t ^ (t / PER % 2); }

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

// A thread's numbers of a tile as it comes.
template <class X>
DEVICE void read_edge(float (&to)[PER][2], const X (&from)[TILE][32], const Edge& edge) {
#pragma unroll
  for (int k = 0; k < PER; ++k) read_pair(to[k], &from[edge.row(k)][edge.c]);
}

// ---- Copies of one tile between memory and shared memory, 16 bytes a thread and row.

// One tensor's way through the tiles: ROWS rows of `width` numbers a tile, in order or as place_row() has them. Where a
// tensor leaves threads without work, those that copy begin at warp `lead`, so that a block's tensors fall to different
// warps.
template <class X, int width, bool PLACED = false, int ROWS = TILE>
struct Cursor {
  static constexpr int w = per_16_bytes<X>, pieces = width / w, total = ROWS * pieces;
  static constexpr int workers = total < THREADS ? total : THREADS, stride = workers / pieces;
  static_assert(workers % pieces == 0 && ROWS % stride == 0, "a thread copies one column");
  X* at;  // this thread's first number of the tile
  int64 step, tile;
  int lead, exist;

  // Rows lie `step` numbers apart; `from` is row 0; of each row the first `exist` numbers exist. The first tile begins at
  // row `begin`, the next one `advance` rows further.
  DEVICE Cursor(const X* from, int64 step, int lead, int64 exist, int begin, int advance)
      : step(step), tile(advance * step), lead(lead), exist(exist < width ? (int)exist : width) {
    at = const_cast<X*>(from) + (begin + (int)(worker() / pieces)) * step + worker() % pieces * w;
  }

  DEVICE uint32 worker() const { return worker(lead); }
  DEVICE static uint32 worker(int lead) {
    return workers == THREADS ? thread() : (thread() + THREADS - lead * 32 % THREADS) % THREADS;
  }
  DEVICE bool idle() const { return workers < THREADS && worker() >= workers; }

  // A tile's first `rows` rows exist; the others, and columns that don't, arrive as zeros.
  DEVICE void copy_in(X* to, int to_step, int rows) {
    const int row = worker() / pieces, column = worker() % pieces * w;
    if (idle()) return;
#pragma unroll
    for (int k = 0; k < ROWS; k += stride)
      copy_async_16(to + (PLACED ? place_row(row + k) : row + k) * to_step + column, at + k * step,
                    column < exist && row + k < rows);
    at += tile;
  }

  // A tile's way out in two steps, so that the reads of several tensors don't wait for one another.
  struct Taken {
    Vec<X, w> rows[ROWS / stride];
  };
  DEVICE Taken take(const X* from, int from_step) const {
    const int row = worker() / pieces, column = worker() % pieces * w;
    Taken taken;
#pragma unroll
    for (int k = 0; k < ROWS; k += stride)
      if (!idle())
        taken.rows[k / stride] =
            load_vec<X, w>(from + (PLACED ? place_row(row + k) : row + k) * from_step + column);
    return taken;
  }
  DEVICE void put(const Taken& taken, int rows) {
    const int row = worker() / pieces;
    const bool some = !idle() && worker() % pieces * w < exist;
#pragma unroll
    for (int k = 0; k < ROWS; k += stride)
      if (some && row + k < rows) store_vec<X, w>(at + k * step, taken.rows[k / stride]);
    at += tile;
  }
};

// B and C side by side, as one tensor of twice the width: a thread copies from one of them.
template <int states>
DEVICE Cursor<TB, 2 * states> both_states(const TB* B, const TB* C, int64 B_step, int64 C_step, int lead, int begin,
                                          int advance) {
  using Both = Cursor<TB, 2 * states>;
  const bool first = Both::worker(lead) % Both::pieces * Both::w < states;
  return Both(first ? B : C - states, first ? B_step : C_step, lead, 2 * states, begin, advance);
}

// A row of `states` numbers of B and C as they come, padded against bank conflicts.
template <int states>
constexpr int narrow_row = states + per_16_bytes<TB>;

// They as fp32, one row of steps (and 4 numbers against bank conflicts) a state; zeros at padding, whatever stands there.
// First all that a thread reads, then all that it writes: the compiler can't know that they don't overlap.
template <int states>
struct Widen {
  static constexpr int pairs = THREADS / 8;  // of states at once: 8 steps and 4 pairs a warp touch all 32 banks
  static constexpr int passes = (states + 2 * pairs - 1) / (2 * pairs);
  static constexpr int most = passes < 4 ? passes : 4;  // passes of states at once
  static_assert(passes % most == 0, "batches are whole");

  DEVICE static void run(float (&to)[states][TILE + 4], const TB (&from)[TILE][narrow_row<states>],
                         const int (&mark)[TILE + 1], bool special) {
#pragma unroll
    for (int first = 0; first < passes; first += most) {
      float both[most][TILE / 8][2];
#pragma unroll
      for (int pass = 0; pass < most; ++pass) {
#pragma unroll
        for (int k = 0; k < TILE / 8; ++k)
          if (exists(state(first + pass))) read_pair(both[pass][k], &from[step(k)][state(first + pass)]);
      }
#pragma unroll
      for (int pass = 0; pass < most; ++pass) {
#pragma unroll
        for (int k = 0; k < TILE / 8; ++k) {
          const int t = step(k), n = state(first + pass);
          if (!exists(n)) continue;
          const bool pad = special && mark[t] == PAD;
          to[n][t] = pad ? 0.0f : both[pass][k][0];
          to[n + 1][t] = pad ? 0.0f : both[pass][k][1];
        }
      }
    }
  }
  DEVICE static bool exists(int n) { return states % (2 * pairs) == 0 || n < states; }
  DEVICE static int step(int k) { return k * 8 + thread() % 8; }
  DEVICE static int state(int pass) { return pass * 2 * pairs + thread() / 8 * 2; }
};

// ---- Segments: a row's tiles in spans of `span`, each a block's, where rows alone are too few for the GPU.

struct Segment {
  int64 batch, c0;           // the row, the block's first channel
  int block, blocks;         // of a row's channels
  int index, count;          // the segment, and how many there are
  int first, tiles;          // its first tile, and how many it has
  // Blocks go through a row's channels, then its segments, then the rows; `chained`: through all rows, then the segments
  // from the last to the first, so that what a segment waits for was begun long before.
  DEVICE Segment(int64 L, int64 I, int64 segments, int64 span, int number, int all_blocks, bool chained = false) {
    blocks = (int)((I + 31) / 32);
    block = number % blocks;
    count = (int)segments;
    const int rest = number / blocks, rows = all_blocks / blocks / count;
    index = chained ? count - 1 - rest / rows : rest % count;
    batch = chained ? rest % rows : rest / count;
    c0 = (int64)block * 32;
    const int all = (int)((L + TILE - 1) / TILE);
    first = index * (int)span;
    tiles = all - first < (int)span ? all - first : (int)span;
  }
  DEVICE int64 row() const { return batch * count + index; }
  DEVICE int tile(int i) const { return first + i * TEAMS + team(); }         // this team's tile i
  DEVICE int turns() const { return (tiles - team() + TEAMS - 1) / TEAMS; }  // tiles of this team
};

// Where documents begin and padding stands, one step a thread of the team's first warp. The numbers of a tile's documents
// come with the tile, by copies, to where its marks will be, the one before the tile's first. (Loads to registers
// share their scoreboards with whatever the loop in between reads, which then waits for memory.)
struct Marker {
  const int* seq_idx;  // of this row, or null
  int L;

  // Part of a tile's copies; the tile begins at t0.
  DEVICE void fetch(int (&mark)[TILE + 1], int t0) const {
    if (!seq_idx || thread() > TILE) return;
    const int t = t0 - 1 + thread();
    copy_async_4(&mark[thread()], seq_idx + t, t >= 0 && t < L);  // nothing is read where it isn't valid
    if (TILE == 32 && thread() == 0) copy_async_4(&mark[TILE], seq_idx + t0 + TILE - 1, t0 + TILE - 1 < L);
  }

  // When this thread's copies have arrived. `special`: whether the tile has any mark, so that the others need not look.
  DEVICE void store(int (&mark)[TILE + 1], int& special, int t0) const {
    if (!seq_idx && t0 + TILE <= L) {
      if (thread() == 0) special = 0;
      return;
    }
    if (thread() >= 32) return;
    const int t = t0 + thread();
    const bool own = thread() < TILE, numbered = own && seq_idx;
    __syncwarp();  // a lane reads what its neighbour has copied, too
    const int before = numbered ? mark[thread()] : 0, here = numbered ? mark[thread() + 1] : 0;
    // Nearly every tile lies inside of one document; the team's other warps wait for this one.
    if (__all_sync(0xffffffffu, !own || (t < L && here == before && here >= 0))) {
      if (thread() == 0) special = 0;
      return;
    }
    int m = REAL;
    if (own) {
      if (t >= L) m = PAD;
      else if (here < 0) m = PAD;
      else if (seq_idx && t > 0) {
        // Behind padding the document before it decides; a row that begins with padding continues what was before the call.
        int number = before;
        for (int s = t - 2; number < 0 && s >= 0; --s) number = seq_idx[s];
        if (number >= 0 && here > number) m = RESET;
      }
      mark[thread()] = m;
    }
    const bool any = __any_sync(0xffffffffu, m != REAL);
    if (thread() == 0) special = any;
  }
};

// ---- The order of the stages, each of which may read what the one before it left in shared memory: load (asks for a tile),
// arrive (its marks), in, body, out, flush (stores the results). A team waits between stages; the multiprocessor's other
// teams are at other stages then. A tile's `out` and the next one's `in` are one stage, edges(tile, whether there is an
// out, whether an in): two chains of a few steps each that don't depend on one another. A thread reads there what it wrote
// itself, before it writes again.

template <class Load, class Arrive, class Edges, class Body, class Flush>
DEVICE void run_tiles(int tiles, Load load, Arrive arrive, Edges edges, Body body, Flush flush) {
  int i = -1;
  for (; i < tiles; ++i) {
    if (i > 0) flush(i - 1);
    if (i + 1 < tiles) load(i + 1);
    copy_async_commit();
    if (i >= 0) body(i);
    copy_async_wait<0>();
    if (i + 1 < tiles) arrive(i + 1);
    team_sync();
    edges(i, i >= 0, i + 1 < tiles);
    team_sync();
  }
  if (i > 0) flush(i - 1);
}
