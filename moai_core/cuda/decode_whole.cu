// moai: kernels decode_whole
// moai: macros T=bf16 R=bf16 N=16 RANK=128 NORMS=1 KC=4 FFN=1 DEPTH=10 W_IN=Plain,float,0 W_X=Plain,float,0 W_OUT=Plain,float,0 W_UP=Plain,float,0 W_DOWN=Plain,float,0 W_HEAD=Plain,float,0 W_EMBED=Plain,float,0
// moai: macros T=bf16 R=float N=16 RANK=128 NORMS=1 KC=4 FFN=1 DEPTH=8 W_IN=Int4,fp16,128 W_X=Plain,float,0 W_OUT=Int4,fp16,128 W_UP=Int4,fp16,128 W_DOWN=Int4,fp16,128 W_HEAD=Int8,fp16,0 W_EMBED=Int8,fp16,0
// moai: macros T=fp16 R=fp16 N=8 RANK=20 NORMS=0 KC=3 FFN=0 DEPTH=8 W_IN=Fp8,float,0 W_X=Plain,float,0 W_OUT=Int8,fp16,0 W_UP=Plain,float,0 W_DOWN=Plain,float,0 W_HEAD=Plain,float,0 W_EMBED=Plain,float,0
//
// A whole step of generation for one row in one launch: all layers and the head, from the token to its logits.
//
// A kernel for each product would wait for the one before it, and memory with it. Here every multiprocessor holds one
// block from the first layer to the last, and which tiles of which weights it multiplies is known beforehand: so weights
// are read ahead, through rings in shared memory, across the places where a block waits for numbers of others. Blocks
// give each other numbers as words of 4 bytes: one that hasn't come yet is VOID, and who needs it looks until it isn't.
// No barrier of the grid is needed, for every exchanged vector of every layer has its own place, and there are two sets
// of places: while a step uses one, it makes the other one void for the next step.
//
// 8 warps multiply: they share K of a tile of 16 rows of W as in decode_linear.cu, and everything is summed and rounded
// in the same order as in the kernels for more rows, so that a row has the same bits there. 4 warps feed the rings, and
// do what the next numbers don't wait for. What a layer runs is small on purpose, each part compiled once for all kinds
// of products that can share it: the caches of instructions are.
//
// All blocks must run at once: launch it as a cooperative kernel, one block a multiprocessor.
//
//   T, R    types of the arithmetic (16 bits) and of the residual stream     N, RANK, NORMS, KC  as in decode_step.cu
//   FFN     1: layers have gate, up and down                                 DEPTH  stages of a warp's ring
//   W_...   a weight's format, type of scales, columns that share a scale (0: a row): in_proj, x_proj, out_proj, gate
//           and up, down, head, embedding
#include "decode.cuh"

#ifndef FLIGHT
#define FLIGHT 4  // stages of a feeder that may be on their way
#endif

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int FED = 2, FEEDERS = WARPS / FED;  // warps that one warp reads weights for
constexpr int ALL_THREADS = THREADS + 32 * FEEDERS;
constexpr int PIECE = 16 / sizeof(T);          // numbers of 16 bytes
constexpr int SLOTS = 8;                       // tiles, or slices of a tile, whose sums wait for each other
static_assert(sizeof(T) == 2, "16-bit arithmetic");

template <template <class> class FORMAT, class S, int G>
struct Weight {
  using Format = typename Taken<FORMAT<T>, T, (G > 0)>::Type;
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

using Units = Vec<float, 2>;  // of a chunk of x (Codes)

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

// f(W{}) with the weight of a kind; kinds of the same weights share the code.
template <class F>
DEVICE void with_weight(int kind, F f) {
  constexpr bool alike = same<In, Out> && (!FFN || (same<In, Up> && same<In, Down>));
  if (!same<MixIn, In> && kind == MIX_IN) return f(MixIn{});
  if (!same<Head, In> && kind == HEAD) return f(Head{});
  if constexpr (alike) {
    f(In{});
  } else {
    if (kind == OUT) f(Out{});
    else if (FFN && kind == UP) f(Up{});
    else if (FFN && kind == DOWN) f(Down{});
    else f(In{});
  }
}

// ---- Between threads and blocks

#ifdef MOAI_HOST
void host_barrier(int id, int threads);
void host_yield();
#endif

// All threads but the feeders.
DEVICE void block_barrier() {
#ifdef MOAI_HOST
  host_barrier(1, THREADS);
#else
  asm volatile("bar.sync 1, %0;" ::"n"(THREADS) : "memory");
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

// What `told` has told of: volatile too, or the assembler reads it before it waits.
DEVICE Words told_words(const Words* from) {
#ifdef MOAI_HOST
  return *from;
#else
  Words w;
  asm volatile("ld.volatile.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
               : "r"((uint32)__cvta_generic_to_shared(from))
               : "memory");
  return w;
#endif
}

// A word that hasn't been sent: no number that is, but two NaNs, or one, which are sent as others.
constexpr uint32 VOID = 0xffffffffu, OTHER_NAN = 0x7fff7fffu;

DEVICE void send(uint32* to, uint32 data) {
  if (data == VOID) data = OTHER_NAN;
#ifdef MOAI_HOST
  *(volatile uint32*)to = data;
#else
  asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(data) : "memory");
#endif
}

// Words as they are now.
DEVICE uint32 look(const uint32* from) {
#ifdef MOAI_HOST
  return *(const volatile uint32*)from;
#else
  uint32 w;
  asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(w) : "l"(from) : "memory");
  return w;
#endif
}
DEVICE Words look_piece(const uint32* from) {
#ifdef MOAI_HOST
  return {{look(from), look(from + 1), look(from + 2), look(from + 3)}};
#else
  Words w;
  asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.at[0]), "=r"(w.at[1]), "=r"(w.at[2]), "=r"(w.at[3])
               : "l"(from)
               : "memory");
  return w;
#endif
}
DEVICE bool here(const Words& w) {
  return w.at[0] != VOID && w.at[1] != VOID && w.at[2] != VOID && w.at[3] != VOID;
}

// Between two looks. A kernel that waits for ever is worse than one that fails.
DEVICE void pause(int& looks) {
#ifdef MOAI_HOST
  host_yield();
#else
  if (++looks > 1 << 23) asm volatile("trap;");
#endif
}

// An address that the compiler keeps, in place of computing it anew at each look.
DEVICE const uint32* kept(const uint32* from) {
#ifndef MOAI_HOST
  asm volatile("" : "+l"(from));
#endif
  return from;
}

DEVICE void breathe() {
#ifdef MOAI_HOST
  host_yield();
#endif
}

// Of a feeder whose rings are full: a tenth of a microsecond is a small part of what they hold, and looking costs the
// warps that multiply their turns.
DEVICE void rest() {
#ifdef MOAI_HOST
  host_yield();
#else
  asm volatile("nanosleep.u32 100;");
#endif
}

// f(i, piece i, whether there is one) for this thread's pieces first, first + apart, ... before `end`, MOST of them looked
// for at once. Lanes of a warp have pieces beside each other and stay together.
template <int MOST, class F>
DEVICE void receive(const uint32* from, int first, int apart, int end, F f) {
  const int lane = threadIdx.x % 32;
#pragma unroll 1
  for (; first - lane < end; first += MOST * apart) {
    Words w[MOST] = {};
    const uint32* const own = kept(from + first * 4);
    bool missing = first < end;
    for (int looks = 0; missing; missing ? pause(looks) : void()) {
#pragma unroll
      for (int k = 0; k < MOST; k++)
        if (first + k * apart < end) w[k] = look_piece(own + k * apart * 4);
      missing = false;
#pragma unroll
      for (int k = 0; k < MOST; k++) missing |= !here(w[k]);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < MOST; k++)
      if (first - lane + k * apart < end) f(first + k * apart, w[k], first + k * apart < end);
  }
}

// PER words of 16 bytes.
template <int PER>
DEVICE void look_for(Words (&words)[PER], const uint32* from) {
  bool missing = true;
  for (int looks = 0; missing; missing ? pause(looks) : void()) {
    missing = false;
#pragma unroll
    for (int i = 0; i < PER; i++) words[i] = look_piece(from + 4 * i);
#pragma unroll
    for (int i = 0; i < PER; i++) missing |= !here(words[i]);
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
  int layers, blocks, block, warp, lane;
  int per_layer;  // units of a layer's kinds

  // The block's first unit of a product: units go round the blocks without a break from product to product.
  DEVICE int first(int layer, int kind) const {
    const int at = (int)((uint32)(layer * per_layer + (kind == HEAD ? 0 : shapes[kind].before)) % (uint32)blocks);
    return block >= at ? block - at : block - at + blocks;
  }
  DEVICE const unsigned char* pointer(int layer, int place) const { return numbers<unsigned char>(layer, place); }
  template <class X>
  DEVICE const X* numbers(int layer, int place) const {
    const X* const p = (const X*)records[layer * RECORD + place];
#ifndef MOAI_HOST
    __builtin_assume(__isGlobal(p));
#endif
    return p;
  }
};

// What a feeder reads next, for FED warps beside each other.
struct Fetch {
  int layer, kind, unit, slice, step;
  int chunk, upper_end, lower_end;
  const unsigned char *upper, *lower;
  const fp16* scales;  // of row `lane` of the tile, for 16 lanes
  int parity, shift, group_end;

  // `entered` is told of each kind of each layer.
  template <class Entered>
  DEVICE void begin(const Block& b, Entered entered) {
    while (layer <= b.layers && unit >= b.shapes[kind].units) {
      if (layer == b.layers || ++kind == LAYER_KINDS) layer++, kind = layer == b.layers ? HEAD : IN;
      if (layer > b.layers) break;
      unit = b.first(layer, kind);
      entered(layer, kind);
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
  template <class Entered>
  DEVICE void stage(const Block& b, Words* to, int apart, Entered entered) {
#pragma unroll
    for (int fed = 0; fed < FED; fed++, to += apart) {
      copy_async_16(to + b.lane, upper + fed * 64, chunk + fed < upper_end);
      copy_async_16(to + 32 + b.lane, lower + fed * 64, chunk + fed < lower_end);
      if constexpr (SCALED)
        if (chunk + fed < group_end) copy_async_4((uint32*)(to + 64) + b.lane, scales + ((parity + ((chunk + fed) >> shift)) & ~1));
    }
    copy_async_commit();
    upper += WARPS * 64, lower += WARPS * 64, chunk += WARPS;
    if (--step > 0 || layer > b.layers) return;
    const Shape& s = b.shapes[kind];
    if (++slice < s.inner) {  // the next one of the same rows
      const int own = slice * s.slice, skip = own + b.warp - chunk, end = own + s.slice < s.chunks ? own + s.slice : s.chunks;
      upper += skip * 64, lower += skip * 64, chunk += skip, step = s.steps;
      upper_end = upper_end ? end : 0, lower_end = lower_end ? end : 0;
      if constexpr (SCALED) group_end = group_end ? end : 0;
      return;
    }
    slice = 0, unit += b.blocks;
    begin(b, entered);
  }
};

// A feeder: it fills the rings of FED warps as far as there is room, but has few stages on their way at a time: memory is
// busy with those, and packets would wait behind more.
template <class Entered>
DEVICE void feed(const Block& b, Words* rings, int* landed, const int* taken, Entered entered) {
  Fetch fetch{};
  fetch.unit = b.first(0, IN);
  entered(0, IN);
  fetch.begin(b, entered);
  int step = 0, place = 0, known = 0;
  while (fetch.layer <= b.layers) {
    if (__any_sync(0xffffffffu, told(taken + b.lane % FED) <= step - DEPTH)) {
      copy_async_wait<0>();
      __syncwarp();
      if (b.lane == 0) tell(landed, known = step);
      while (__any_sync(0xffffffffu, told(taken + b.lane % FED) <= step - DEPTH)) rest();
    }
    fetch.stage(b, rings + place * STAGE, DEPTH * STAGE, entered);
    step++, place = place + 1 == DEPTH ? 0 : place + 1;
    copy_async_wait<FLIGHT>();
    __syncwarp();
    if (b.lane == 0 && step - FLIGHT > known) tell(landed, known = step - FLIGHT);
  }
  copy_async_wait<0>();
  __syncwarp();
  if (b.lane == 0) tell(landed, step);
}

// A stage as a lane holds it: 16 bytes of rows g and g + 8, 4 bytes that hold the scale of each.
struct Stage {
  Words upper, lower;
  uint32 scales[2];
};

// A warp's own side of its ring.
struct Ring {
  const Words* stages;
  const int* landed;
  int* taken;
  int step, place, known, lane;  // place: of the next stage, in words; known: stages that have landed

  // The stage that comes next. What was read is given back.
  DEVICE Stage take() {
    while (known <= step) {
      known = told(landed);
      if (known <= step) breathe();
    }
    const Words* const from = stages + place;
    Stage found;
    found.upper = told_words(from + lane), found.lower = told_words(from + 32 + lane);
    if constexpr (SCALED) {
      const int* const scales = (const int*)(from + 64) + lane / 4;
      found.scales[0] = (uint32)told(scales), found.scales[1] = (uint32)told(scales + 8);
    }
    step++, place = place == (DEPTH - 1) * STAGE ? 0 : place + STAGE;
    __syncwarp();
    if (lane == 0) tell(taken, step);
    return found;
  }
};

// ---- Products

template <class W>
DEVICE void multiply(float (&sum)[4], int lane, const Stage& stage, const Words* xs, const Units* units, int chunk, int groups, int shift) {
  using F = typename W::Format;
  constexpr int STEPS = F::COLUMNS / 4;
  Words x[F::XV];
#pragma unroll
  for (int j = 0; j < F::XV; j++) x[j] = xs[(chunk * F::XV + j) * 4 + lane % 4];  // of all 8 vectors: they are the same
  float fresh[2][4] = {};
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    uint32 w[4], v[2];
    F::weights(w[0], w[2], stage.upper, s);
    F::weights(w[1], w[3], stage.lower, s);
    F::vectors(v, x, s);
    if constexpr (W::GROUP == 0) mma_16<T>(sum, w, v);
    else mma_of<F, T>(fresh[s % 2], w, v);
  }
  if constexpr (W::GROUP > 0) {
    // 4 bytes hold the scales of two groups; rows g and g + 8 lie a multiple of 8 rows apart. The other sums are copies.
    const int high = 16 * ((lane / 4 * groups + (chunk >> shift)) & 1);
    const Units u = units[chunk];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float both = fresh[0][2 * i] + fresh[1][2 * i], scale = to_float(fp16{(uint16)(stage.scales[i] >> high)});
      sum[2 * i] += scale * (both * u.at[0] - u.at[1]);
    }
  }
}

DEVICE int tile_of(const Shape& s, int unit) { return s.parts > 1 ? unit / s.parts : unit; }

// The sums of the block's units from `first` on, up to SLOTS tiles or slices of a tile, each warp's for itself.
struct AddUp {
  const Block& b;
  Ring& ring;
  float* sums;
  const Shape& s;
  int first;
  const Words* xs;
  const Units* units;
  template <class W>
  DEVICE void operator()(W) const;
};
template <class W>
DEVICE void AddUp::operator()(W) const {
  const int lane = ring.lane, inner = s.inner, steps = s.steps, size = s.slice, chunks = s.chunks, groups = s.groups, shift = s.shift;
  float* to = sums + b.warp * 16 + lane / 4;
  int slot = 0;
#pragma unroll 1
  for (int unit = first; unit < s.units && slot < SLOTS; unit += b.blocks) {
    int own = s.parts > 1 ? unit % s.parts * size : 0;
#pragma unroll 1
    for (int slice = 0; slice < inner; slice++, slot++, own += size, to += WARPS * 16) {
      const int end = own + size < chunks ? own + size : chunks;
      float sum[4] = {};
      int chunk = own + b.warp;
#pragma unroll 1
      for (int step = 0; step < steps; step++, chunk += WARPS) {
        const Stage stage = ring.take();
        if (chunk < end) multiply<W>(sum, lane, stage, xs, units, chunk, groups, shift);
      }
      if (lane % 4 == 0) to[0] = sum[0], to[8] = sum[2];
    }
  }
}

// ---- A product's x, in shared memory in the order of its weight's fragments (gemv.cuh)

struct Vector {
  Words* words;
  Units* units;
};

struct PutPiece {
  const Vector& to;
  int piece;
  const Words& w;
  bool there;
  template <class W>
  DEVICE void operator()(W) const {
    using F = typename W::Format;
    const int chunk = piece / (4 * F::XV), t = piece / F::XV % 4, j = piece % F::XV;
    Words& place = to.words[(chunk * F::XV + j) * 4 + t];
    if constexpr (is_codes<F>) {
      Units units;
      const Words y = F::template arranged<T>(w, units);
      if (there) place = y;
      if (there && piece % 16 == 0) to.units[chunk] = units;
    } else {
      if (there) place = F::arranged(w);
    }
  }
};
// By all lanes of a warp, 16 of them beside each other for the pieces of a chunk.
DEVICE void put(const Vector& to, int kind, int piece, const Words& w, bool there) { with_weight(kind, PutPiece{to, piece, w, there}); }

// The residual stream as it is now comes to `stream`, its RMSNorm to xs. from: null where the stream is there already.
DEVICE void norm_stream(const Vector& x, int kind, R* stream, float* scratch, const uint32* from, const T* weight, int H, float eps) {
  constexpr int PER = sizeof(R) / 2;  // 16-byte words of a piece
  const int thread = threadIdx.x, pieces = H / PIECE;
  Vec<T, PIECE> w{};
  if (thread < pieces) w = load_vec<T, PIECE>(weight + thread * PIECE);
  float v[PIECE] = {}, sum = 0.0f;
#pragma unroll 1
  for (int piece = thread; piece < pieces; piece += THREADS) {
    Words* const own = (Words*)(stream + piece * PIECE);
    Words words[PER];
    if (from) {
      look_for<PER>(words, from + piece * PIECE * PER / 2);
#pragma unroll
      for (int i = 0; i < PER; i++) own[i] = words[i];
    } else {
#pragma unroll
      for (int i = 0; i < PER; i++) words[i] = own[i];
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
      float part[PIECE / PER];
      unpack<R>(part, words[i]);
#pragma unroll
      for (int j = 0; j < PIECE / PER; j++) v[i * (PIECE / PER) + j] = part[j], sum += part[j] * part[j];
    }
  }
  sum = warp_sum(sum);
  if (thread % 32 == 0) scratch[thread / 32] = sum;
  block_barrier();
  const float rstd = rstd_of(scratch, H, eps);
#pragma unroll 1
  for (int piece = thread; piece - thread % 32 < pieces; piece += THREADS) {
    if (pieces > THREADS && piece < pieces) {  // else v and w are this piece's
      w = load_vec<T, PIECE>(weight + piece * PIECE);
#pragma unroll
      for (int i = 0; i < PIECE; i++) v[i] = to_float(stream[piece * PIECE + i]);
    }
    Words y;
#pragma unroll
    for (int i = 0; i < PIECE; i += 2) {
      const Vec<T, 2> two = pair_from_floats<T>(v[i] * rstd * to_float(w.at[i]), v[i + 1] * rstd * to_float(w.at[i + 1]));
      y.at[i / 2] = *reinterpret_cast<const uint32*>(&two);
    }
    put(x, kind, piece, y, piece < pieces);
  }
}

// ---- Where a layer's words are

struct Exchange {
  uint32* base;
  int n, n_sums, n_stream, n_product;  // each a multiple of 4
  DEVICE uint32* u() const { return base; }
  DEVICE uint32* z() const { return base + n; }
  DEVICE uint32* sums() const { return base + 2 * n; }
  DEVICE uint32* y() const { return base + 2 * n + n_sums; }
  DEVICE uint32* middle() const { return base + 3 * n + n_sums; }  // the stream behind the mixer
  DEVICE uint32* product() const { return middle() + n_stream; }
  DEVICE uint32* end() const { return FFN ? product() + n_product : middle(); }  // the stream behind the layer
  DEVICE int words() const { return 3 * n + n_sums + n_stream + (FFN ? n_product + n_stream : 0); }
};

// ---- dt_proj, softplus, the scan's step and the gate

constexpr int MIX = RANK + 2 * N;
constexpr int VEC = RANK % PIECE == 0 ? PIECE : 1;
constexpr int PER = (RANK + 8 * VEC - 1) / (8 * VEC);
constexpr int LANES = N / 4;                   // a thread has 4 states
constexpr int SHARE = LANES > 8 ? LANES : 8;   // threads of a channel; dt_proj is summed by 8 of them
constexpr int CHANNELS = THREADS / SHARE;
constexpr int MOST_SLICES = 16;                // of x_proj
static_assert(N % 4 == 0 && 32 % SHARE == 0, "a channel stays in a warp");

// The sums of x_proj's slices, rounded, come to `mixed`; u and z are looked for along with them.
DEVICE void mix(float* mixed, uint32 (&own)[2], const uint32* const (&places)[2], bool wanted, const uint32* from, int slices) {
#pragma unroll 1
  for (int i = threadIdx.x; i < MIX || i == (int)threadIdx.x; i += THREADS) {
    const uint32* const column = kept(from + i);
    const bool sums = i < MIX, both = wanted && i == (int)threadIdx.x;
    uint32 w[MOST_SLICES] = {};
    bool missing = sums || both;
    for (int looks = 0; missing; missing ? pause(looks) : void()) {
      if (sums) {
#pragma unroll
        for (int k = 0; k < MOST_SLICES; k++)
          if (k < slices) w[k] = look(column + k * MIX);
      }
      if (both) own[0] = look(places[0]), own[1] = look(places[1]);
      missing = both && (own[0] == VOID || own[1] == VOID);
#pragma unroll
      for (int k = 0; k < MOST_SLICES; k++) missing |= w[k] == VOID;
    }
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < MOST_SLICES; k++)
      if (k < slices) sum += bits_float(w[k]);
    if (i < MIX) mixed[i] = rounded<T>(sum);
  }
}

// 1 / the root of the mean square of numbers in shared memory, in all lanes.
DEVICE float rstd_of_part(const float* row, int size, int lane, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int k = lane; k < size; k += 32) sum += row[k] * row[k];
  return rsqrtf(warp_sum(sum) / (float)size + eps);
}

// The first `there` of n numbers of shared memory after their norm.
template <int n>
DEVICE void normed(float (&to)[n], const float* from, float rstd, const Vec<T, n>& weight, int there) {
#pragma unroll
  for (int i = 0; i < n; i++) {
    to[i] = i < there ? from[i] : 0.0f;
    if constexpr (NORMS) to[i] *= rstd, to[i] *= to_float(weight.at[i]);
  }
  if constexpr (NORMS && n % 2 == 0) {
#pragma unroll
    for (int i = 0; i < n; i += 2) {
      const Vec<T, 2> two = pair_from_floats<T>(to[i], to[i + 1]);
      to[i] = to_float(two.at[0]), to[i + 1] = to_float(two.at[1]);
    }
  } else if constexpr (NORMS) {
    to[0] = rounded<T>(to[0]);
  }
}

DEVICE void scan(const Block& b, int layer, const Exchange& at, float* mixed, const float* state, float* next_state, int I,
                 int slices, float eps) {
  const int lane = threadIdx.x % SHARE, part = lane % 8;
#pragma unroll 1
  for (int first = b.block * CHANNELS, round = 0; first < I; first += b.blocks * CHANNELS, round++) {
    // What doesn't depend on other blocks is asked for first.
    const int own = first + (int)threadIdx.x / SHARE, c = own < I ? own : I - 1;
    const bool states = lane < LANES && own < I;
    Vec<T, VEC> w[PER], scale[NORMS ? PER : 1];
    Vec<T, 4> scale_b{}, scale_c{};
    Vec<float, 4> a{}, h{};
    const T* const row = b.numbers<T>(layer, DT_WEIGHT) + (int64)c * RANK;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int k = (i * 8 + part) * VEC;
      w[i] = k < RANK ? load_vec<T, VEC>(row + k) : Vec<T, VEC>{};
      if constexpr (NORMS) scale[i] = k < RANK ? load_vec<T, VEC>(b.numbers<T>(layer, NORM_DT) + k) : Vec<T, VEC>{};
    }
    const float bias = b.numbers<float>(layer, DT_BIAS)[c];
    float skip = 0.0f;
    if (states) {
      if constexpr (NORMS) {
#pragma unroll
        for (int j = 0; j < 4; j++) scale_b.at[j] = b.numbers<T>(layer, NORM_B)[lane * 4 + j], scale_c.at[j] = b.numbers<T>(layer, NORM_C)[lane * 4 + j];
      }
      a = load_vec<float, 4>(b.numbers<float>(layer, A_LOG2) + (int64)c * N + lane * 4);
      h = load_vec<float, 4>(state + (int64)c * N + lane * 4);
      skip = b.numbers<float>(layer, SKIP)[c];
    }
    uint32 inputs[2] = {};
    const uint32* const places[2] = {at.u() + c / 2, at.z() + c / 2};
    if (round == 0) {
      mix(mixed, inputs, places, states, at.sums(), slices);
      block_barrier();
    } else if (states) {
#pragma unroll
      for (int k = 0; k < 2; k++)
        for (int looks = 0; (inputs[k] = look(places[k])) == VOID;) pause(looks);
    }
    const float x = to_float(half_of(inputs[0], c % 2)), gate = to_float(half_of(inputs[1], c % 2));
    float rstd[3] = {};
    if constexpr (NORMS) {
      rstd[0] = rstd_of_part(mixed, RANK, b.lane, eps);
      rstd[1] = rstd_of_part(mixed + RANK, N, b.lane, eps);
      rstd[2] = rstd_of_part(mixed + RANK + N, N, b.lane, eps);
    }
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int k = (i * 8 + part) * VEC;
      float v[VEC];
      normed<VEC>(v, mixed + k, rstd[0], scale[NORMS ? i : 0], RANK - k);
#pragma unroll
      for (int j = 0; j < VEC; j++) sum += k + j < RANK ? to_float(w[i].at[j]) * v[j] : 0.0f;
    }
#pragma unroll
    for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    float B[4], C[4];
    normed<4>(B, mixed + RANK + lane % LANES * 4, rstd[1], scale_b, 4);
    normed<4>(C, mixed + RANK + N + lane % LANES * 4, rstd[2], scale_c, 4);
    const float step = softplus(rounded<T>(sum) + bias);
    sum = 0.0f;
    if (lane < LANES) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        h.at[j] = exp2_approx(step * a.at[j]) * h.at[j] + step * x * B[j];
        sum += h.at[j] * C[j];
      }
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    const uint32 bits = bits_of(from_float<T>((sum + skip * x) * (gate * sigmoid(gate))));
    const uint32 next = __shfl_xor_sync(0xffffffffu, bits, SHARE);
    if (states && lane == 0 && c % 2 == 0) send(at.y() + c / 2, bits | next << 16);
    if (states) store_vec<float, 4>(next_state + (int64)c * N + lane * 4, h);
  }
}

// ---- What becomes of a product's results: lane r and r + 16 of a warp have row r of a tile

// Of the row of a tile that a lane finishes, asked for while the product is made.
struct Prepared {
  float scale, weight[KC], bias, factor;
  T past[KC - 1];
};

struct RowScale {
  const Block& b;
  float& scale;
  int layer, place, row;
  template <class W>
  DEVICE void operator()(W) const {
    if constexpr (W::ROW_SCALED) scale = row < 0 ? 0.0f : to_float(b.numbers<typename W::Scale>(layer, place)[row]);
  }
};

struct Finish {
  const Block& b;
  const Exchange& at;
  int layer, kind, H, I, F, V;
  const T* window;
  T *next_window, *logits;
  const R* stream;

  // Rows of W that the lane finishes, where of two weights; rows of each.
  DEVICE int row(int tile) const { return kind == UP ? tile * 8 + b.lane % 8 : tile * 16 + b.lane % 16; }

  DEVICE void prepare(Prepared& p, int tile, int rows) const {
    const int r = row(tile);
    p.scale = 1.0f;
    with_weight(kind, RowScale{b, p.scale, layer, (kind == UP && b.lane % 16 >= 8 ? SECOND : 2 * kind) + 1, r < rows ? r : -1});
    if (kind != IN || r >= I) return;
    const T *w = b.numbers<T>(layer, CONV_WEIGHT), *add = b.numbers<T>(layer, CONV_BIAS), *times = b.numbers<T>(layer, CONV_SCALE);
#pragma unroll
    for (int k = 0; k < KC; k++) p.weight[k] = to_float(w[r * KC + k]);
#pragma unroll
    for (int k = 0; k < KC - 1; k++) p.past[k] = window[r * (KC - 1) + k];
    p.bias = add ? to_float(add[r]) : 0.0f;
    p.factor = times ? to_float(times[r]) : 1.0f;
  }

  // in_proj: u goes through a step of the convolution, whose window of the last KC - 1 inputs moves on; z as it is.
  DEVICE T convolved(const Prepared& p, int r, float value) const {
    float sum = p.bias;
#pragma unroll
    for (int k = 0; k < KC - 1; k++) sum += p.weight[k] * to_float(p.past[k]);
    sum += p.weight[KC - 1] * value;
    const float y = sum * sigmoid(sum);
    if (b.lane < 16) {
#pragma unroll
      for (int k = 1; k < KC - 1; k++) next_window[r * (KC - 1) + k - 1] = p.past[k];
      next_window[r * (KC - 1) + KC - 2] = from_float<T>(value);
    }
    return from_float<T>(b.numbers<T>(layer, CONV_SCALE) ? rounded<T>(y) * p.factor : y);
  }

  DEVICE void put(const Prepared& p, int tile, int part, float value) const {
    const int r = row(tile);
    value *= p.scale;
    if (kind == MIX_IN) {  // the slices' sums as they are
      if (b.lane < 16 && r < MIX) send(at.sums() + part * MIX + r, float_bits(value));
      return;
    }
    if (kind == HEAD) {
      if (b.lane < 16 && r < V) logits[r] = from_float<T>(value);
      return;
    }
    value = rounded<T>(value);
    if (sizeof(R) == 4 && (kind == OUT || kind == DOWN)) {
      if (b.lane < 16 && r < H) send((kind == OUT ? at.middle() : at.end()) + r, float_bits(to_float(stream[r]) + value));
      return;
    }
    // The others are pairs of 16 bits.
    uint32 bits;
    uint32* to;
    int rows = H, lanes = 16;
    if (kind == IN) {
      bits = bits_of(r < I ? convolved(p, r, value) : from_float<T>(value));
      to = at.u() + (r < I ? r / 2 : at.n + (r - I) / 2), rows = 2 * I;
    } else if (kind == UP) {  // silu(gate) up
      const float up = __shfl_down_sync(0xffffffffu, value, 8);
      bits = bits_of(from_float<T>(value * sigmoid(value) * up));
      to = at.product() + r / 2, rows = F, lanes = 8;
    } else {  // added to the residual stream
      const R sum = from_float<R>((r < H ? to_float(stream[r]) : 0.0f) + value);
      bits = *reinterpret_cast<const uint16*>(&sum);
      to = (kind == OUT ? at.middle() : at.end()) + r / 2;
    }
    const uint32 other = __shfl_xor_sync(0xffffffffu, bits, 1);
    if (b.lane < lanes && r % 2 == 0 && r < rows) send(to, bits | other << 16);
  }
};

// ---- What feeders do beside: numbers that a layer reads beside its large weights come into the L2 cache before they are
// waited for, and the other set of words becomes void.

DEVICE void bring(const void* from, int bytes, int thread, int threads) {
#pragma unroll 1
  for (int at = thread * 128; at < bytes; at += threads * 128) prefetch_line((const char*)from + at);
}

struct Beside {
  const Block& b;
  const T* window;
  const float* state;
  uint32* other;  // set of words
  int layer_words, H, I, feeder;
  int64 apart;    // channels from layer to layer of a state

  DEVICE void operator()(int layer, int kind) const {
    const int thread = feeder * 32 + b.lane, threads = FEEDERS * 32;
    const int first = b.block * CHANNELS, count = I - first < CHANNELS ? I - first : CHANNELS;
    if (layer == b.layers) return;
    if (kind == IN) {
      Words* const words = (Words*)(other + (int64)layer * layer_words);
#pragma unroll 1
      for (int i = b.block * threads + thread; i < layer_words / 4; i += b.blocks * threads) words[i] = {{VOID, VOID, VOID, VOID}};
      const T* const inputs = window + layer * apart * (KC - 1);
#pragma unroll 1
      for (int unit = b.first(layer, IN) + feeder * b.blocks; unit * 16 < I; unit += FEEDERS * b.blocks) {
        const int row = unit * 16, rows = I - row < 16 ? I - row : 16;
        bring(b.numbers<T>(layer, CONV_WEIGHT) + row * KC, rows * KC * (int)sizeof(T), b.lane, 32);
        bring(inputs + row * (KC - 1), rows * (KC - 1) * (int)sizeof(T), b.lane, 32);
        if (b.lane) continue;
        prefetch_line(inputs + (row + rows) * (KC - 1) - 1);
        if (const T* bias = b.numbers<T>(layer, CONV_BIAS)) prefetch_line(bias + row);
      }
      if (FFN) bring(b.numbers<T>(layer, NORM_FFN), H * (int)sizeof(T), thread, threads);
    } else if (kind == MIX_IN && count > 0) {
      bring(b.numbers<T>(layer, DT_WEIGHT) + (int64)first * RANK, count * RANK * (int)sizeof(T), thread, threads);
      bring(b.numbers<float>(layer, A_LOG2) + (int64)first * N, count * N * 4, thread, threads);
      bring(state + (layer * apart + first) * N, count * N * 4, thread, threads);
      if (feeder == 0 && b.lane < (NORMS ? 3 : 0)) prefetch_line(b.numbers<T>(layer, NORM_DT + b.lane));
      if (feeder == 1 && b.lane < 2) prefetch_line(b.numbers<float>(layer, b.lane ? SKIP : DT_BIAS) + first);
    } else if (kind == LAYER_KINDS - 1) {
      bring(b.numbers<T>(layer + 1, NORM), H * (int)sizeof(T), thread, threads);
    }
  }
};

// ---- The step. Grid: a block a multiprocessor. table: (layers + 1) RECORD pointers, KINDS SHAPE numbers. exchange: two
// sets of words of all layers, VOID before the first step. clock: steps so far, blocks that have ended this one. windows
// (layers, I, KC - 1) and states (layers, I, N), rows `capacity` apart. Shared memory: 8 rings of DEPTH stages; `room`
// bytes for x, a multiple of 512, and its units; the stream, H numbers of 16 bytes' multiple; the table.
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
decode_whole(const int64* table, uint32* exchange, int64* clock, const int64* token, const unsigned char* embedding,
             const Embedding::Scale* embedding_scales, const fp16* embedding_zeros, const T* window, T* next_window,
             const float* state, float* next_state, T* logits, int64 layers, int64 H, int64 I, int64 F, int64 V,
             int64 room, int64 row_bytes, int64 group, int64 groups, int64 capacity, float eps, float mix_eps) {
  extern __shared__ Words shared[];
  __shared__ float red[2][SLOTS * WARPS * 16], scratch[WARPS], mixed[MIX];
  __shared__ Shape shapes[KINDS];
  __shared__ int landed[FEEDERS], taken[WARPS];
  const Vector x{shared + WARPS * DEPTH * STAGE, (Units*)(shared + WARPS * DEPTH * STAGE + room / 16)};
  R* const stream = (R*)(x.units + room / 256);  // a chunk of 256 bytes has units
  int64* const records = (int64*)(stream + (H + 7) / 8 * 8);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x < FEEDERS) landed[threadIdx.x] = 0;
  if (threadIdx.x < WARPS) taken[threadIdx.x] = 0;
  const int turns = (int)(*(const volatile int64*)clock & 1);
  for (int i = threadIdx.x; i < (layers + 1) * RECORD; i += ALL_THREADS) records[i] = table[i];
  if (threadIdx.x < KINDS) {
    const int64* n = table + (layers + 1) * RECORD + threadIdx.x * SHAPE;
    shapes[threadIdx.x] = {n[0], (int)n[1], (int)n[2], (int)n[3], (int)n[4], (int)n[5], (int)n[6], (int)n[7], (int)n[8], (int)n[9], (int)n[10]};
  }
  __syncthreads();

  const bool feeder = warp >= WARPS;
  const Block b{records, shapes, (int)layers, (int)gridDim.x, (int)blockIdx.x, feeder ? (warp - WARPS) * FED : warp, lane,
                shapes[LAYER_KINDS - 1].before + shapes[LAYER_KINDS - 1].units};
  const int slices = shapes[MIX_IN].parts * shapes[MIX_IN].inner;
  const auto whole = [](int64 count) { return (int)(count + 3) / 4 * 4; };
  Exchange at{exchange, whole(I / 2), whole(slices * MIX), whole(sizeof(R) == 4 ? H : H / 2), FFN ? whole(F / 2) : 0};
  const int layer_words = at.words();
  const int64 set = layers * layer_words;
  if (feeder) {
    const int group = warp - WARPS;
    const Beside beside{b, window, state, exchange + (1 - turns) * set, layer_words, (int)H, (int)I, group, capacity * I};
    feed(b, shared + group * FED * DEPTH * STAGE, landed + group, taken + group * FED, beside);
    return;
  }

  Ring ring{shared + warp * DEPTH * STAGE, landed + warp / FED, taken + warp, 0, 0, 0, lane};
  const int64 id = *token < 0 ? 0 : *token;
  for (int c = threadIdx.x; c < H; c += THREADS)
    stream[c] = from_float<R>(embedded<Embedding::Format, T>(embedding + id * row_bytes, embedding_scales, embedding_zeros, id * groups, c, group));
  block_barrier();

  int turn = 0;
  const uint32* before = nullptr;  // the stream behind the last layer
  at.base += turns * set;
#pragma unroll 1
  for (int layer = 0; layer <= layers; layer++) {
    const int64 rows = layer * capacity * I;
    const bool last = layer == layers;
#pragma unroll 1
    for (int kind = last ? HEAD : IN; kind < (last ? KINDS : LAYER_KINDS); kind++) {
      const Shape& s = shapes[kind];
      const int first = b.first(layer, kind);
      if (kind == IN || kind == UP || kind == HEAD) {
        norm_stream(x, kind, stream, scratch, kind == UP ? at.middle() : before, b.numbers<T>(layer, kind == UP ? NORM_FFN : NORM), (int)H, eps);
      } else if (kind == MIX_IN) {  // the slices of the block's units
        const int pieces = s.slice * 4 * MixIn::Format::XV, all = s.chunks * 4 * MixIn::Format::XV;
        for (int unit = first + warp * b.blocks; unit < s.units; unit += WARPS * b.blocks) {
          const int begin = s.parts > 1 ? unit % s.parts * pieces : 0, end = s.parts > 1 && begin + pieces < all ? begin + pieces : all;
          receive<1>(at.u(), begin + lane, 32, end, [&](int i, const Words& w, bool there) { put(x, MIX_IN, i, w, there); });
        }
      } else {
        if (kind == OUT) scan(b, layer, at, mixed, state + rows * N, next_state + rows * N, (int)I, slices, mix_eps);
        if (first < s.units)
          receive<3>(kind == OUT ? at.y() : at.product(), threadIdx.x, THREADS, (int)(kind == OUT ? I : F) / PIECE,
                     [&](int i, const Words& w, bool there) { put(x, kind, i, w, there); });
      }
      block_barrier();

      const Finish finish{b, at, layer, kind, (int)H, (int)I, (int)F, (int)V, window + rows * (KC - 1), next_window + rows * (KC - 1), logits, stream};
      const int most = SLOTS / s.inner;
#pragma unroll 1
      for (int unit = first; unit < s.units; unit += most * b.blocks, turn ^= 1) {
        const int own = unit + warp * b.blocks, tile = tile_of(s, own);
        const bool finishes = warp < most && own < s.units;
        Prepared prepared{};
        if (finishes) finish.prepare(prepared, tile, s.rows);
        with_weight(kind, AddUp{b, ring, red[turn], s, unit, x.words, x.units});
        block_barrier();
        if (!finishes) continue;
        const float* from = red[turn] + warp * s.inner * WARPS * 16 + lane % 16;
        float total = 0.0f;
#pragma unroll 1
        for (int slice = 0; slice < s.inner; slice++, from += WARPS * 16) {
          float sum = 0.0f;
#pragma unroll
          for (int other = 0; other < WARPS; other++) sum += from[other * 16];
          total += sum;
        }
        finish.put(prepared, tile, own - tile * s.parts, total);
      }
    }
    before = at.end();
    at.base += layer_words;
  }

  block_barrier();
  if (threadIdx.x == 0 && count_one((int*)(clock + 1)) == (int)gridDim.x - 1) clock[0] += 1, clock[1] = 0;
}
