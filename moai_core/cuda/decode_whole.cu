// moai: kernels decode_whole; spills 208
// moai: macros T=bf16 R=bf16 N=16 RANK=128 NORMS=1 KC=4 FFN=1 DEPTH=10 W_IN=Plain,float,0 W_X=Plain,float,0 W_OUT=Plain,float,0 W_UP=Plain,float,0 W_DOWN=Plain,float,0 W_HEAD=Plain,float,0 W_EMBED=Plain,float,0
// moai: macros T=bf16 R=float N=16 RANK=128 NORMS=1 KC=4 FFN=1 DEPTH=8 W_IN=Int4,fp16,128 W_X=Plain,float,0 W_OUT=Int4,fp16,128 W_UP=Int4,fp16,128 W_DOWN=Int4,fp16,128 W_HEAD=Int8,fp16,0 W_EMBED=Int8,fp16,0
// moai: macros T=fp16 R=fp16 N=8 RANK=20 NORMS=0 KC=3 FFN=0 DEPTH=8 W_IN=Fp8,float,0 W_X=Plain,float,0 W_OUT=Int8,fp16,0 W_UP=Plain,float,0 W_DOWN=Plain,float,0 W_HEAD=Plain,float,0 W_EMBED=Plain,float,0
//
// A whole step of generation for one row in one launch: all layers and the head, from the token to its logits.
//
// A kernel for each product would wait for the one before it, and memory with it. Here every multiprocessor holds one
// block from the first layer to the last, and which tiles of which weights it multiplies is known beforehand: so its
// warps read weights ahead, through rings in shared memory, across the places where they wait for numbers of other
// blocks. Blocks give each other numbers as packets of 8 bytes, 4 of them the number of the step: who needs one reads it
// until that is right. No barrier of the grid is needed, for every exchanged vector of every layer has its own place.
//
// A block has two teams of 8 warps. The warps of a team share K of a tile of 16 rows of W as in decode_linear.cu, and
// everything is summed and rounded in the same order as in the kernels for more rows: a row has the same bits there.
//
// All blocks must run at once: launch it as a cooperative kernel, one block a multiprocessor.
//
//   T, R    types of the arithmetic (16 bits) and of the residual stream     N, RANK, NORMS, KC  as in decode_step.cu
//   FFN     1: layers have gate, up and down                                 DEPTH  stages of a warp's ring
//   W_...   a weight's format, type of scales, columns that share a scale (0: a row): in_proj, x_proj, out_proj, gate
//           and up, down, head, embedding
#include "decode.cuh"

#ifndef FLIGHT
#define FLIGHT 2  // stages of a feeder that may be on their way
#endif
#ifndef PAUSE
#define PAUSE 0  // nanoseconds between two looks for a packet
#endif

using uint64 = unsigned long long;

constexpr int TEAM = 8, TEAMS = 2, WARPS = TEAM * TEAMS, THREADS = 32 * WARPS, TEAM_THREADS = 32 * TEAM;
constexpr int FED = 4, FEEDERS = WARPS / FED;  // warps that one warp reads weights for
constexpr int PIECE = 16 / sizeof(T);  // numbers of 16 bytes
static_assert(sizeof(T) == 2, "16-bit arithmetic");

template <template <class> class FORMAT, class S, int G>
struct Weight {
  using Format = FORMAT<T>;
  using Scale = S;
  static constexpr int GROUP = G;
  static constexpr bool ROW_SCALED = G == 0 && Format::BITS < 16;
};
using In = Weight<W_IN>;
using MixIn = Weight<W_X>;
using Out = Weight<W_OUT>;
using Up = Weight<W_UP>;
using Down = Weight<W_DOWN>;
using Head = Weight<W_HEAD>;
using Embedding = Weight<W_EMBED>;
constexpr bool SCALED = In::GROUP || MixIn::GROUP || Out::GROUP || Up::GROUP || Down::GROUP || Head::GROUP;
constexpr int STAGE = SCALED ? 68 : 64;  // words of 16 bytes: rows g of each lane, rows g + 8, scales of 16 rows

// ---- What the host knows and writes into `table`: a record for each layer and one for the head, then the shapes.

// Kinds of products, in a layer's order; HEAD stands in the last record.
enum { IN, MIX_IN, OUT, UP, DOWN, HEAD, KINDS };
constexpr int LAYER_KINDS = FFN ? 5 : 3;
// Of a record: weight and scales of kind k at 2k and 2k + 1 (gate at UP, up itself where the head has its own).
enum { SECOND = 10, NORM = 12, CONV_WEIGHT, CONV_BIAS, CONV_SCALE, NORM_DT, NORM_B, NORM_C, DT_WEIGHT, DT_BIAS, A_LOG2, SKIP, NORM_FFN, RECORD };

struct Shape {
  int64 row_bytes;
  int rows, chunks;     // 64-byte chunks of a row
  int slice, parts;     // chunks of a slice; slices that are units of their own
  int inner, steps;     // slices that one unit adds; steps of a warp in a slice
  int units, groups;    // groups: scales of a row
  int shift, before;    // 2^shift chunks share a scale, negative: none; units of the layer's kinds before
};
constexpr int SHAPE = 12;  // numbers of a shape in `table`

// ---- Packets

#ifdef MOAI_HOST
void host_barrier(int id, int threads);
void host_yield();
#endif

DEVICE void team_barrier(int team) {
#ifdef MOAI_HOST
  host_barrier(1 + team, TEAM_THREADS);
#else
  asm volatile("bar.sync %0, %1;" ::"r"(1 + team), "n"(TEAM_THREADS) : "memory");
#endif
}

// How many came before.
DEVICE int count_one(int* counter) {
#ifdef MOAI_HOST
  return __atomic_fetch_add(counter, 1, __ATOMIC_SEQ_CST);
#else
  return atomicAdd(counter, 1);
#endif
}

// All threads but the feeders.
DEVICE void block_barrier() {
#ifdef MOAI_HOST
  host_barrier(3, THREADS);
#else
  asm volatile("bar.sync 3, %0;" ::"n"(THREADS) : "memory");
#endif
}

// Counters in shared memory, from warp to warp: what was read and written there before `tell` is done after `told`. Shared
// memory serves a warp in order, and a fence would wait for copies under way, so there is none.
DEVICE void tell(int* counter, int value) {
#ifdef MOAI_HOST
  *(volatile int*)counter = value;
#else
  asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"((uint32)__cvta_generic_to_shared(counter)), "r"(value) : "memory");
#endif
}
DEVICE int told(const int* counter) {
#ifdef MOAI_HOST
  return *(const volatile int*)counter;
#else
  int value;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(value) : "r"((uint32)__cvta_generic_to_shared(counter)) : "memory");
  return value;
#endif
}

DEVICE void send(uint64* to, uint32 data, uint32 tag) {
  const uint64 packet = (uint64)tag << 32 | data;
#ifdef MOAI_HOST
  *(volatile uint64*)to = packet;
#else
  asm volatile("st.relaxed.gpu.global.u64 [%0], %1;" ::"l"(to), "l"(packet) : "memory");
#endif
}

// Two packets side by side, whatever is in them.
DEVICE void look(uint64 (&v)[2], const uint64* from) {
#ifdef MOAI_HOST
  v[0] = ((const volatile uint64*)from)[0], v[1] = ((const volatile uint64*)from)[1];
#else
  asm volatile("ld.relaxed.gpu.global.v2.u64 {%0, %1}, [%2];" : "=l"(v[0]), "=l"(v[1]) : "l"(from) : "memory");
#endif
}

// Between two looks. A kernel that waits for ever is worse than one that fails.
DEVICE void pause(int& looks) {
#ifdef MOAI_HOST
  host_yield();
#else
  if (++looks > 1 << 23) asm volatile("trap;");
  if (PAUSE > 0) asm volatile("nanosleep.u32 %0;" ::"n"(PAUSE));
#endif
}

DEVICE void breathe() {
#ifdef MOAI_HOST
  host_yield();
#endif
}

// `pairs` pairs of packets that belong to step `tag`, as their data; here: whether this thread wants them.
template <int pairs>
DEVICE void receive(uint32 (&data)[2 * pairs], const uint64* from, uint32 tag, bool here) {
  int looks = 0;
  bool missing = here;
  while (missing) {
    uint64 v[pairs][2];
#pragma unroll
    for (int i = 0; i < pairs; i++) look(v[i], from + 2 * i);
    missing = false;
#pragma unroll
    for (int i = 0; i < 2 * pairs; i++) {
      data[i] = (uint32)v[i / 2][i % 2];
      missing |= (uint32)(v[i / 2][i % 2] >> 32) != tag;
    }
    if (missing) pause(looks);
  }
}

DEVICE uint32 bits_of(T x) { return x.bits; }
DEVICE T half_of(uint32 word, int high) {
  T x;
  x.bits = (uint16)(high ? word >> 16 : word);
  return x;
}

// ---- The block

struct Block {
  const int64* records;
  const Shape* shapes;
  int layers, teams, team, warp, lane;  // teams of the grid; warp: of the team
  int per_layer;                        // units of a layer's kinds
  uint32 tag;

  // The team's first unit of a product: units go round the teams without a break from product to product.
  DEVICE int first(int layer, int kind) const {
    const int at = (int)((uint32)(layer * per_layer + (kind == HEAD ? 0 : shapes[kind].before)) % (uint32)teams);
    return team >= at ? team - at : team - at + teams;
  }
  DEVICE const unsigned char* pointer(int layer, int place) const {
    return (const unsigned char*)records[layer * RECORD + place];
  }
  template <class X>
  DEVICE const X* numbers(int layer, int place) const { return (const X*)records[layer * RECORD + place]; }
};

// What a feeder reads next, for FED warps beside each other.
struct Fetch {
  int layer, kind, unit, slice, step;
  int chunk, upper_end, lower_end;
  const unsigned char *upper, *lower;
  const fp16* scales;  // of row `lane` of the tile, for 16 lanes
  int parity, shift, group_end;

  DEVICE void begin(const Block& b) {
    while (layer <= b.layers && unit >= b.shapes[kind].units) {
      if (layer == b.layers || ++kind == LAYER_KINDS) layer++, kind = layer == b.layers ? HEAD : IN;
      if (layer <= b.layers) unit = b.first(layer, kind);
    }
    if (layer > b.layers) {
      upper_end = lower_end = 0, step = 0;
      return;
    }
    const Shape& s = b.shapes[kind];
    const int g = b.lane / 4, tile = s.parts > 1 ? unit / s.parts : unit, own = (unit - tile * s.parts) * s.slice;
    const bool paired = kind == UP;
    const int row = paired ? tile * 8 + g : tile * 16 + g, below = paired ? row : row + 8;
    const int end = own + s.slice < s.chunks ? own + s.slice : s.chunks;
    chunk = own + b.warp, step = s.steps;
    upper_end = row < s.rows ? end : 0, lower_end = below < s.rows ? end : 0;
    const int64 byte = (int64)chunk * 64 + b.lane % 4 * 16;
    upper = b.pointer(layer, 2 * kind) + row * s.row_bytes + byte;
    lower = b.pointer(layer, paired ? SECOND : 2 * kind) + below * s.row_bytes + byte;
    if constexpr (SCALED) {
      const int own_row = paired ? tile * 8 + b.lane % 8 : tile * 16 + b.lane % 16;
      shift = s.shift;
      group_end = b.lane < 16 && own_row < s.rows && shift >= 0 ? end : 0;
      const int64 index = (int64)own_row * s.groups;
      scales = (const fp16*)b.pointer(layer, (paired && b.lane >= 8 ? SECOND : 2 * kind) + 1) + (index & ~1ll);
      parity = (int)(index & 1);
    }
  }

  // Starts a stage of each of the rings, `apart` words from each other, and moves on.
  DEVICE void stage(const Block& b, Words* to, int apart) {
#pragma unroll
    for (int fed = 0; fed < FED; fed++, to += apart) {
      copy_async_16(to + b.lane, upper + fed * 64, chunk + fed < upper_end);
      copy_async_16(to + 32 + b.lane, lower + fed * 64, chunk + fed < lower_end);
      if constexpr (SCALED)
        if (chunk + fed < group_end) copy_async_4((uint32*)(to + 64) + b.lane, scales + ((parity + ((chunk + fed) >> shift)) & ~1));
    }
    copy_async_commit();
    upper += TEAM * 64, lower += TEAM * 64, chunk += TEAM;
    if (--step > 0 || layer > b.layers) return;
    const Shape& s = b.shapes[kind];
    if (++slice < s.inner) {  // the next one of the same rows
      const int own = slice * s.slice, skip = own + b.warp - chunk, end = own + s.slice < s.chunks ? own + s.slice : s.chunks;
      upper += skip * 64, lower += skip * 64, chunk += skip, step = s.steps;
      upper_end = upper_end ? end : 0, lower_end = lower_end ? end : 0;
      if constexpr (SCALED) group_end = group_end ? end : 0;
      return;
    }
    slice = 0, unit += b.teams;
    begin(b);
  }
};

// A feeder: it fills the rings of FED warps as far as there is room, but has few stages on their way at a time: memory is
// busy with those, and packets would wait behind more.
DEVICE void feed(const Block& b, Words* rings, int* landed, const int* taken) {
  Fetch fetch{};
  fetch.unit = b.first(0, IN);
  fetch.begin(b);
  int step = 0, place = 0, known = 0;
  while (fetch.layer <= b.layers) {
    if (__any_sync(0xffffffffu, told(taken + b.lane % FED) <= step - DEPTH)) {
      copy_async_wait<0>();
      __syncwarp();
      if (b.lane == 0) tell(landed, known = step);
      while (__any_sync(0xffffffffu, told(taken + b.lane % FED) <= step - DEPTH)) breathe();
    }
    fetch.stage(b, rings + place * STAGE, DEPTH * STAGE);
    step++, place = place + 1 == DEPTH ? 0 : place + 1;
    copy_async_wait<FLIGHT>();
    __syncwarp();
    if (b.lane == 0 && step - FLIGHT > known) tell(landed, known = step - FLIGHT);
  }
  copy_async_wait<0>();
  __syncwarp();
  if (b.lane == 0) tell(landed, step);
}

// A warp's own side of its ring.
struct Ring {
  const Words* stages;
  const int* landed;
  int* taken;
  int step, place;

  // The stage that comes next; the one before is given back.
  DEVICE const Words* take(const Block& b) {
    __syncwarp();
    if (b.lane == 0) tell(taken, step);
    while (told(landed) <= step) breathe();
    const Words* found = stages + place * STAGE;
    step++, place = place + 1 == DEPTH ? 0 : place + 1;
    return found;
  }
};

// ---- Products

template <class W>
DEVICE void multiply(float (&sum)[4], const Block& b, const Words* stage, const Words* xs, int chunk, int groups, int shift) {
  using F = typename W::Format;
  constexpr int STEPS = F::COLUMNS / 4;
  const int g = b.lane / 4, t = b.lane % 4;
  const Words upper = stage[b.lane], lower = stage[32 + b.lane];
  Words x[F::XV];
#pragma unroll
  for (int j = 0; j < F::XV; j++) x[j] = g == 0 ? xs[(chunk * F::XV + j) * 4 + t] : Words{};
  float fresh[2][4] = {};
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    uint32 w[4], v[2];
    F::weights(w[0], w[2], upper, s);
    F::weights(w[1], w[3], lower, s);
    F::vectors(v, x, s);
    if constexpr (W::GROUP == 0) mma_16<T>(sum, w, v);
    else mma_16<T>(fresh[s % 2], w, v);
  }
  if constexpr (W::GROUP > 0) {
    // 4 bytes hold the scales of two groups; rows g and g + 8 lie a multiple of 8 rows apart.
    const int high = (g * groups + (chunk >> shift)) & 1;
    const uint32* scales = (const uint32*)(stage + 64);
    const fp16 upper_scale{(uint16)(scales[g] >> (16 * high))}, lower_scale{(uint16)(scales[g + 8] >> (16 * high))};
#pragma unroll
    for (int i = 0; i < 4; i++) sum[i] += to_float(i < 2 ? upper_scale : lower_scale) * (fresh[0][i] + fresh[1][i]);
  }
}

// The product of a kind: each tile's 16 sums go to `finish`, in the team's first warp, lane r and r + 16 for row r.
template <class W, class Finish>
DEVICE void product(const Block& b, Ring& ring, float* red, int& turn, int layer, int kind, const Words* xs, Finish finish) {
  const Shape s = b.shapes[kind];
  for (int unit = b.first(layer, kind); unit < s.units; unit += b.teams) {
    const int tile = s.parts > 1 ? unit / s.parts : unit, part = unit - tile * s.parts;
    if (b.warp == 0) finish.prepare(tile);
    float* const mine = red + turn * (4 * TEAM * 16);
#pragma unroll 1
    for (int slice = 0; slice < s.inner; slice++) {
      const int own = (s.parts > 1 ? part : slice) * s.slice;
      const int end = own + s.slice < s.chunks ? own + s.slice : s.chunks;
      float sum[4] = {};
      int chunk = own + b.warp;
#pragma unroll 1
      for (int step = 0; step < s.steps; step++, chunk += TEAM) {
        const Words* stage = ring.take(b);
        if (chunk < end) multiply<W>(sum, b, stage, xs, chunk, s.groups, s.shift);
      }
      if (b.lane % 4 == 0) {
        float* to = mine + (slice * TEAM + b.warp) * 16 + b.lane / 4;
        to[0] = sum[0], to[8] = sum[2];
      }
    }
    team_barrier(b.team >= b.teams / TEAMS);
    if (b.warp == 0) {
      float total = 0.0f;
      for (int slice = 0; slice < s.inner; slice++) {
        float sum = 0.0f;
#pragma unroll
        for (int warp = 0; warp < TEAM; warp++) sum += mine[(slice * TEAM + warp) * 16 + b.lane % 16];
        total += sum;
      }
      finish.put(tile, part, total);
    }
    turn ^= 1;
  }
}

// Whether one of the block's teams has a unit of this product.
DEVICE bool busy(const Block& b, int layer, int kind) {
  const int half = b.teams / TEAMS, one = b.first(layer, kind), units = b.shapes[kind].units;
  const int other = (one + (b.team < half ? half : b.teams - half)) % b.teams;
  return one < units || other < units;
}

// ---- What becomes of a product's results

// Scales of whole rows, read while the product is made.
template <class W>
struct RowScale {
  float scale = 1.0f;
  DEVICE void prepare(const Block& b, int layer, int place, int row, int rows) {
    if constexpr (W::ROW_SCALED) scale = row < rows ? to_float(b.numbers<typename W::Scale>(layer, place + 1)[row]) : 0.0f;
  }
  DEVICE float operator()(float x) const { return W::ROW_SCALED ? x * scale : x; }
};

// in_proj: u goes through a step of the convolution, whose window of the last KC - 1 inputs moves on; z as it is.
struct ConvolveInputs {
  const Block& b;
  int layer, I;
  const T* window;
  T* next_window;
  uint64 *u, *z;
  RowScale<In> scale{};
  float weight[KC] = {}, bias = 0.0f, factor = 1.0f;
  T past[KC - 1] = {};

  DEVICE int row(int tile) const { return tile * 16 + b.lane % 16; }
  DEVICE void prepare(int tile) {
    const int r = row(tile);
    scale.prepare(b, layer, 2 * IN, r, 2 * I);
    if (r >= I) return;
    const T *w = b.numbers<T>(layer, CONV_WEIGHT), *add = b.numbers<T>(layer, CONV_BIAS), *times = b.numbers<T>(layer, CONV_SCALE);
#pragma unroll
    for (int k = 0; k < KC; k++) weight[k] = to_float(w[r * KC + k]);
#pragma unroll
    for (int k = 0; k < KC - 1; k++) past[k] = window[r * (KC - 1) + k];
    bias = add ? to_float(add[r]) : 0.0f;
    factor = times ? to_float(times[r]) : 1.0f;
  }
  DEVICE void put(int tile, int, float value) {
    const int r = row(tile);
    value = rounded<T>(scale(value));
    T result = from_float<T>(value);
    if (r < I) {
      float sum = bias;
#pragma unroll
      for (int k = 0; k < KC - 1; k++) sum += weight[k] * to_float(past[k]);
      sum += weight[KC - 1] * value;
      const float y = sum * sigmoid(sum);
      result = from_float<T>(b.numbers<T>(layer, CONV_SCALE) ? rounded<T>(y) * factor : y);
      if (b.lane < 16) {
#pragma unroll
        for (int k = 1; k < KC - 1; k++) next_window[r * (KC - 1) + k - 1] = past[k];
        next_window[r * (KC - 1) + KC - 2] = from_float<T>(value);
      }
    }
    const uint32 other = __shfl_xor_sync(0xffffffffu, bits_of(result), 1);
    if (b.lane < 16 && r % 2 == 0 && r < 2 * I) send((r < I ? u + r / 2 : z + (r - I) / 2), bits_of(result) | other << 16, b.tag);
  }
};

// x_proj: the slices' sums as they are.
struct SendSums {
  const Block& b;
  int layer;
  uint64* sums;
  RowScale<MixIn> scale{};
  DEVICE void prepare(int tile) { scale.prepare(b, layer, 2 * MIX_IN, tile * 16 + b.lane % 16, RANK + 2 * N); }
  DEVICE void put(int tile, int part, float value) {
    const int r = tile * 16 + b.lane;
    if (b.lane < 16 && r < RANK + 2 * N) send(sums + part * (RANK + 2 * N) + r, float_bits(scale(value)), b.tag);
  }
};

// out_proj and down: added to the residual stream.
template <class W>
struct AddToStream {
  const Block& b;
  int layer, kind, H;
  const R* stream;
  uint64* to;
  RowScale<W> scale{};
  DEVICE void prepare(int tile) { scale.prepare(b, layer, 2 * kind, tile * 16 + b.lane % 16, H); }
  DEVICE void put(int tile, int, float value) {
    const int r = tile * 16 + b.lane % 16;
    const float old = r < H ? to_float(stream[r]) : 0.0f;
    const R sum = from_float<R>(old + rounded<T>(scale(value)));
    if constexpr (sizeof(R) == 4) {
      if (b.lane < 16 && r < H) send(to + r, float_bits(to_float(sum)), b.tag);
    } else {
      const uint32 bits = *reinterpret_cast<const uint16*>(&sum), other = __shfl_xor_sync(0xffffffffu, bits, 1);
      if (b.lane < 16 && r % 2 == 0 && r < H) send(to + r / 2, bits | other << 16, b.tag);
    }
  }
};

// gate and up: silu(gate) up.
struct Gated {
  const Block& b;
  int layer, F;
  uint64* to;
  RowScale<Up> scale{};
  DEVICE void prepare(int tile) { scale.prepare(b, layer, b.lane % 16 < 8 ? 2 * UP : SECOND, tile * 8 + b.lane % 8, F); }
  DEVICE void put(int tile, int, float value) {
    const int r = tile * 8 + b.lane % 8;
    value = rounded<T>(scale(value));
    const float up = __shfl_down_sync(0xffffffffu, value, 8);
    const T result = from_float<T>(value * sigmoid(value) * up);
    const uint32 other = __shfl_xor_sync(0xffffffffu, bits_of(result), 1);
    if (b.lane < 8 && r % 2 == 0 && r < F) send(to + r / 2, bits_of(result) | other << 16, b.tag);
  }
};

struct Logits {
  const Block& b;
  int V;
  T* to;
  RowScale<Head> scale{};
  DEVICE void prepare(int tile) { scale.prepare(b, b.layers, 2 * HEAD, tile * 16 + b.lane % 16, V); }
  DEVICE void put(int tile, int, float value) {
    const int r = tile * 16 + b.lane;
    if (b.lane < 16 && r < V) to[r] = from_float<T>(scale(value));
  }
};

// ---- A product's x, in shared memory in the order of its weight's fragments (gemv.cuh)

template <class F>
DEVICE void put_piece(Words* xs, int piece, const Words& w) {
  const int chunk = piece / (4 * F::XV), t = piece / F::XV % 4, j = piece % F::XV;
  xs[(chunk * F::XV + j) * 4 + t] = F::arranged(w);
}

// `count` pieces of 16 bytes from `first` on, by the `threads` threads of which this is number `thread`; two at a time.
template <class W>
DEVICE void take_vector(Words* xs, const uint64* from, int first, int count, int thread, int threads, uint32 tag) {
  for (int i = thread; i < count; i += 2 * threads) {
    uint32 one[4], two[4];
    const bool both = i + threads < count;
    uint64 early[2][2];
    if (both) look(early[0], from + (first + i + threads) * 4), look(early[1], from + (first + i + threads) * 4 + 2);
    receive<2>(one, from + (first + i) * 4, tag, true);
    put_piece<typename W::Format>(xs, first + i, Words{{one[0], one[1], one[2], one[3]}});
    if (!both) break;
    bool there = true;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      two[k] = (uint32)early[k / 2][k % 2];
      there = there && (uint32)(early[k / 2][k % 2] >> 32) == tag;
    }
    receive<2>(two, from + (first + i + threads) * 4, tag, !there);
    put_piece<typename W::Format>(xs, first + i + threads, Words{{two[0], two[1], two[2], two[3]}});
  }
}

// The residual stream as it is now comes to `stream`, its RMSNorm to xs. from: null where the stream is there already.
template <class W>
DEVICE void norm_stream(Words* xs, R* stream, float* scratch, const uint64* from, const T* weight, int H, float eps, uint32 tag) {
  const int thread = threadIdx.x;
  constexpr int PACKETS = sizeof(R) == 4 ? PIECE : PIECE / 2;
  Vec<T, PIECE> first{};
  if (thread < TEAM_THREADS) {
    if (thread * PIECE < H) first = load_vec<T, PIECE>(weight + thread * PIECE);
    float sum = 0.0f;
    for (int piece = thread; piece * PIECE < H; piece += TEAM_THREADS) {
      float v[PIECE];
      if (from) {
        uint32 data[PACKETS];
        receive<PACKETS / 2>(data, from + piece * PACKETS, tag, true);
#pragma unroll
        for (int i = 0; i < PIECE; i++) {
          if constexpr (sizeof(R) == 4) stream[piece * PIECE + i] = from_float<R>(v[i] = bits_float(data[i]));
          else v[i] = to_float(half_of(data[i / 2], i % 2));
        }
        if constexpr (sizeof(R) == 2) *(Words*)(stream + piece * PIECE) = Words{{data[0], data[1], data[2], data[3]}};
      } else {
#pragma unroll
        for (int i = 0; i < PIECE; i++) v[i] = to_float(stream[piece * PIECE + i]);
      }
#pragma unroll
      for (int i = 0; i < PIECE; i++) sum += v[i] * v[i];
    }
    sum = warp_sum(sum);
    if (thread % 32 == 0) scratch[thread / 32] = sum;
  }
  block_barrier();
  const float rstd = rstd_of(scratch, H, eps);
  for (int piece = thread; thread < TEAM_THREADS && piece * PIECE < H; piece += TEAM_THREADS) {
    const Vec<T, PIECE> w = piece == thread ? first : load_vec<T, PIECE>(weight + piece * PIECE);
    Vec<T, PIECE> y;
#pragma unroll
    for (int i = 0; i < PIECE; i++) y.at[i] = from_float<T>(to_float(stream[piece * PIECE + i]) * rstd * to_float(w.at[i]));
    put_piece<typename W::Format>(xs, piece, *reinterpret_cast<const Words*>(&y));
  }
  block_barrier();
}

// ---- dt_proj, softplus, the scan's step and the gate

constexpr int MIX = RANK + 2 * N;
constexpr int CHANNELS = 32;
constexpr int VEC = RANK % PIECE == 0 ? PIECE : 1;
constexpr int PER = (RANK + 8 * VEC - 1) / (8 * VEC);
constexpr int LANES = N / 4;
static_assert(CHANNELS * LANES <= THREADS, "a thread has 4 states");

// dt's vector, B and C from the sums of x_proj, as decode_mix makes them; `sums` is scratch of slices MIX numbers.
DEVICE void mix(float* mixed, float* sums, float* rstd, const Block& b, int layer, const uint64* from, int slices, float eps) {
  for (int i = threadIdx.x; i < slices * MIX / 2; i += THREADS) {
    uint32 data[2];
    receive<1>(data, from + 2 * i, b.tag, true);
    sums[2 * i] = bits_float(data[0]), sums[2 * i + 1] = bits_float(data[1]);
  }
  block_barrier();
  for (int i = threadIdx.x; i < MIX; i += THREADS) {
    float sum = 0.0f;
#pragma unroll 4
    for (int slice = 0; slice < slices; slice++) sum += sums[slice * MIX + i];
    mixed[i] = rounded<T>(sum);
  }
  block_barrier();
  if constexpr (NORMS) {
    const int part = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (part < 3) {
      const int size = part ? N : RANK;
      const float* row = mixed + (part ? RANK + (part - 1) * N : 0);
      float sum = 0.0f;
      for (int k = lane; k < size; k += 32) sum += row[k] * row[k];
      sum = warp_sum(sum);
      if (lane == 0) rstd[part] = rsqrtf(sum / (float)size + eps);
    }
    block_barrier();
    for (int i = threadIdx.x; i < MIX; i += THREADS) {
      const int which = i < RANK ? 0 : i < RANK + N ? 1 : 2;
      const T* weight = b.numbers<T>(layer, NORM_DT + which) + (i - (which == 0 ? 0 : RANK + (which - 1) * N));
      mixed[i] = rounded<T>(mixed[i] * rstd[which] * to_float(*weight));
    }
    block_barrier();
  }
}

struct Exchange {
  uint64 *u, *z, *sums, *y, *middle, *product, *end;  // middle, end: the stream behind the mixer, behind the layer
};

DEVICE void scan(const Block& b, int layer, const Exchange& at, float* mixed, float* sums, float* rstd, float* steps,
                 const float* state, float* next_state, int I, int slices, float eps) {
  const int half = b.teams / TEAMS;
  bool ready = false;
  for (int first = (int)blockIdx.x * CHANNELS; first < I; first += half * CHANNELS) {
    const int own = threadIdx.x / 8 % CHANNELS, part = threadIdx.x % 8;
    const int channel = first + own < I ? first + own : I - 1;
    const bool mine = threadIdx.x < CHANNELS * 8;
    Vec<T, VEC> w[PER];
    float bias = 0.0f;
    if (mine) {
      const T* row = b.numbers<T>(layer, DT_WEIGHT) + (int64)channel * RANK;
#pragma unroll
      for (int i = 0; i < PER; i++) w[i] = (i * 8 + part) * VEC < RANK ? load_vec<T, VEC>(row + (i * 8 + part) * VEC) : Vec<T, VEC>{};
      bias = b.numbers<float>(layer, DT_BIAS)[channel];
    }
    const int lane = threadIdx.x % LANES, place = threadIdx.x / LANES;
    const bool states = place < CHANNELS && first + place < I;
    const int c = states ? first + place : first;
    Vec<float, 4> a{}, h{};
    float x = 0.0f, gate = 0.0f, skip = 0.0f;
    if (states) {
      a = load_vec<float, 4>(b.numbers<float>(layer, A_LOG2) + (int64)c * N + lane * 4);
      h = load_vec<float, 4>(state + (int64)c * N + lane * 4);
      skip = b.numbers<float>(layer, SKIP)[c];
      uint32 data[2];
      receive<1>(data, at.u + c / 4 * 2, b.tag, true);
      x = to_float(half_of(c % 4 < 2 ? data[0] : data[1], c % 2));
      receive<1>(data, at.z + c / 4 * 2, b.tag, true);
      gate = to_float(half_of(c % 4 < 2 ? data[0] : data[1], c % 2));
    }
    if (!ready) mix(mixed, sums, rstd, b, layer, at.sums, slices, eps), ready = true;
    if (mine) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < PER; i++) {
        const int k = (i * 8 + part) * VEC;
#pragma unroll
        for (int j = 0; j < VEC; j++) sum += k + j < RANK ? to_float(w[i].at[j]) * mixed[k + j] : 0.0f;
      }
#pragma unroll
      for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
      if (part == 0) steps[own] = softplus(rounded<T>(sum) + bias);
    }
    block_barrier();
    if (threadIdx.x < CHANNELS * LANES) {
      const float step = steps[place];
      const float* B = mixed + RANK + lane * 4;
      float sum = 0.0f;
#pragma unroll
      for (int j = 0; j < 4; j++) {
        h.at[j] = exp2_approx(step * a.at[j]) * h.at[j] + step * x * B[j];
        sum += h.at[j] * B[N + j];
      }
#pragma unroll
      for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
      const uint32 bits = bits_of(from_float<T>((sum + skip * x) * (gate * sigmoid(gate))));
      const uint32 next = __shfl_xor_sync(0xffffffffu, bits, LANES);
      if (states && lane == 0 && c % 2 == 0) send(at.y + c / 2, bits | next << 16, b.tag);
      if (states) store_vec<float, 4>(next_state + (int64)c * N + lane * 4, h);
    }
    block_barrier();  // `steps` is free
  }
}

// What a layer reads beside its large weights comes into the L2 cache before it is waited for.
DEVICE void bring_layer(const Block& b, int layer, const T* window, const float* state, int H, int I) {
  const auto lines = [&](const void* from, int64 bytes, int thread, int threads) {
    for (int64 at = (int64)thread * 128; at < bytes; at += (int64)threads * 128) prefetch_line((const char*)from + at);
  };
  const int first = (int)blockIdx.x * CHANNELS, count = I - first < CHANNELS ? I - first : CHANNELS;
  if (count > 0) {
    lines(b.numbers<T>(layer, DT_WEIGHT) + (int64)first * RANK, (int64)count * RANK * sizeof(T), threadIdx.x, THREADS);
    lines(b.numbers<float>(layer, A_LOG2) + (int64)first * N, (int64)count * N * 4, threadIdx.x, THREADS);
    lines(state + (int64)first * N, (int64)count * N * 4, threadIdx.x, THREADS);
  }
  lines(b.numbers<T>(layer + 1, NORM), (int64)H * sizeof(T), threadIdx.x, THREADS);
  if (FFN) lines(b.numbers<T>(layer, NORM_FFN), (int64)H * sizeof(T), threadIdx.x, THREADS);
  if (b.warp > 0) return;
  for (int unit = b.first(layer, IN); unit < b.shapes[IN].units; unit += b.teams) {
    const int row = unit * 16, rows = I - row < 16 ? I - row : 16;
    if (rows <= 0) continue;
    lines(b.numbers<T>(layer, CONV_WEIGHT) + row * KC, rows * KC * sizeof(T), b.lane, 32);
    lines(window + row * (KC - 1), rows * (KC - 1) * sizeof(T), b.lane, 32);
    if (b.lane == 0) {
      prefetch_line(window + (row + rows) * (KC - 1) - 1);
      if (const T* bias = b.numbers<T>(layer, CONV_BIAS)) prefetch_line(bias + row);
    }
  }
}

// ---- The step. Grid: a block a multiprocessor. table: (layers + 1) RECORD pointers, KINDS SHAPE numbers. exchange:
// packets of all layers. clock: steps so far, blocks that have ended this one. windows (layers, I, KC - 1) and states
// (layers, I, N), rows `capacity` apart. Shared memory: 16 rings of DEPTH stages; 2 `room` bytes for x; the stream, H
// numbers of 16 bytes' multiple; the table.
extern "C" __global__ void __launch_bounds__(32 * (WARPS + FEEDERS), 1)
decode_whole(const int64* table, uint64* exchange, int64* clock, const int64* token, const unsigned char* embedding,
             const Embedding::Scale* embedding_scales, const fp16* embedding_zeros, const T* window, T* next_window,
             const float* state, float* next_state, T* logits, int64 layers, int64 H, int64 I, int64 F, int64 V,
             int64 room, int64 row_bytes, int64 group, int64 groups, int64 capacity, float eps, float mix_eps) {
  extern __shared__ Words shared[];
  __shared__ float red_of[TEAMS][2 * 4 * TEAM * 16], scratch[TEAM], rstd[3], steps[CHANNELS], mixed[MIX];
  __shared__ Shape shapes[KINDS];
  __shared__ int landed[FEEDERS], taken[WARPS];
  Words* const x = shared + WARPS * DEPTH * STAGE;
  R* const stream = (R*)(x + 2 * room / 16);
  int64* const records = (int64*)(x + 2 * room / 16 + (H * sizeof(R) + 15) / 16);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x < FEEDERS) landed[threadIdx.x] = 0;
  if (threadIdx.x < WARPS) taken[threadIdx.x] = 0;
  const uint32 tag = (uint32)(*(const volatile int64*)clock + 1);
  for (int i = threadIdx.x; i < (layers + 1) * RECORD; i += 32 * (WARPS + FEEDERS)) records[i] = table[i];
  if (threadIdx.x < KINDS) {
    const int64* n = table + (layers + 1) * RECORD + threadIdx.x * SHAPE;
    shapes[threadIdx.x] = {n[0], (int)n[1], (int)n[2], (int)n[3], (int)n[4], (int)n[5], (int)n[6], (int)n[7], (int)n[8], (int)n[9], (int)n[10]};
  }
  const int64 id = *token < 0 ? 0 : *token;
  for (int c = threadIdx.x; c < H; c += 32 * (WARPS + FEEDERS))
    stream[c] = from_float<R>(embedded<Embedding::Format, T>(embedding + id * row_bytes, embedding_scales, embedding_zeros, id * groups, c, group));
  __syncthreads();

  const bool feeder = warp >= WARPS;
  const int side = feeder ? (warp - WARPS) * FED / TEAM : warp / TEAM;
  const Block b{records, shapes, (int)layers, (int)gridDim.x * TEAMS, (int)blockIdx.x + side * (int)gridDim.x,
                feeder ? (warp - WARPS) * FED % TEAM : warp % TEAM, lane, shapes[LAYER_KINDS - 1].before + shapes[LAYER_KINDS - 1].units, tag};
  if (feeder) {
    const int group = warp - WARPS;
    feed(b, shared + group * FED * DEPTH * STAGE, landed + group, taken + group * FED);
    return;
  }
  Ring ring{shared + warp * DEPTH * STAGE, landed + warp / FED, taken + warp, 0, 0};

  float* const red = red_of[side];
  int turn = 0;
  int64 which = 0;  // where the next x goes
  const int slices = shapes[MIX_IN].parts * shapes[MIX_IN].inner;
  const int64 stream_packets = sizeof(R) == 4 ? H : H / 2;
  const uint64* before = nullptr;
  uint64* next = exchange;
  const auto take = [&](int64 count) { uint64* const found = next; next += (count + 1) / 2 * 2; return found; };

#pragma unroll 1
  for (int layer = 0; layer < layers; layer++) {
    Exchange at;
    at.u = take(I / 2), at.z = take(I / 2), at.sums = take((int64)slices * MIX), at.y = take(I / 2);
    at.middle = take(stream_packets), at.product = FFN ? take(F / 2) : nullptr, at.end = FFN ? take(stream_packets) : at.middle;

    const int64 rows = layer * capacity * I;
    bring_layer(b, layer, window + rows * (KC - 1), state + rows * N, (int)H, (int)I);
    norm_stream<In>(x + which, stream, scratch, before, b.numbers<T>(layer, NORM), (int)H, eps, tag);
    product<In>(b, ring, red, turn, layer, IN, x + which,
                ConvolveInputs{b, layer, (int)I, window + rows * (KC - 1), next_window + rows * (KC - 1), at.u, at.z});
    which = room / 16 - which;

    const Shape& s = shapes[MIX_IN];
    if (s.units <= b.teams) {  // at most one unit a team: one slice of x
      const int unit = b.first(layer, MIX_IN), pieces = s.slice * 4 * MixIn::Format::XV;
      const int begin = unit % s.parts * pieces, all = s.chunks * 4 * MixIn::Format::XV;
      if (unit < s.units)
        take_vector<MixIn>(x + which, at.u, begin, begin + pieces < all ? pieces : all - begin, threadIdx.x % TEAM_THREADS, TEAM_THREADS, tag);
    } else {
      take_vector<MixIn>(x + which, at.u, 0, (int)I / PIECE, threadIdx.x, THREADS, tag);
    }
    block_barrier();
    product<MixIn>(b, ring, red, turn, layer, MIX_IN, x + which, SendSums{b, layer, at.sums});
    which = room / 16 - which;

    scan(b, layer, at, mixed, (float*)(x + which), rstd, steps, state + rows * N, next_state + rows * N, (int)I, slices, mix_eps);
    which = room / 16 - which;

    if (busy(b, layer, OUT)) take_vector<Out>(x + which, at.y, 0, (int)I / PIECE, threadIdx.x, THREADS, tag);
    block_barrier();
    product<Out>(b, ring, red, turn, layer, OUT, x + which, AddToStream<Out>{b, layer, OUT, (int)H, stream, at.middle});
    which = room / 16 - which;

    if constexpr (FFN) {
      norm_stream<Up>(x + which, stream, scratch, at.middle, b.numbers<T>(layer, NORM_FFN), (int)H, eps, tag);
      product<Up>(b, ring, red, turn, layer, UP, x + which, Gated{b, layer, (int)F, at.product});
      which = room / 16 - which;
      if (busy(b, layer, DOWN)) take_vector<Down>(x + which, at.product, 0, (int)F / PIECE, threadIdx.x, THREADS, tag);
      block_barrier();
      product<Down>(b, ring, red, turn, layer, DOWN, x + which, AddToStream<Down>{b, layer, DOWN, (int)H, stream, at.end});
      which = room / 16 - which;
    }
    before = at.end;
  }
  norm_stream<Head>(x + which, stream, scratch, before, b.numbers<T>((int)layers, NORM), (int)H, eps, tag);
  product<Head>(b, ring, red, turn, (int)layers, HEAD, x + which, Logits{b, (int)V, logits});

  block_barrier();
  if (threadIdx.x == 0 && count_one((int*)(clock + 1)) == (int)gridDim.x - 1) clock[0] += 1, clock[1] = 0;
}
