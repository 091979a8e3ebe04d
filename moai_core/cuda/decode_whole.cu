// moai: kernels decode_whole
// moai: macros T=bf16 R=bf16 N=16 RANK=128 NORMS=1 KC=4 FFN=1 DEPTH=10 FLIGHT=3 SPAN=16 GROUPS=0 W_IN=Plain,float,0 W_X=Plain,float,0 W_OUT=Plain,float,0 W_UP=Plain,float,0 W_DOWN=Plain,float,0 W_HEAD=Plain,float,0 W_EMBED=Plain,float,0
// moai: macros T=bf16 R=float N=16 RANK=128 NORMS=1 KC=4 FFN=1 DEPTH=10 FLIGHT=3 SPAN=16 GROUPS=44 W_IN=Int4,fp16,128 W_X=Plain,float,0 W_OUT=Int4,fp16,128 W_UP=Int4,fp16,128 W_DOWN=Int4,fp16,128 W_HEAD=Int8,fp16,0 W_EMBED=Int8,fp16,0
// moai: macros T=fp16 R=fp16 N=8 RANK=20 NORMS=0 KC=3 FFN=0 DEPTH=7 FLIGHT=3 SPAN=8 GROUPS=0 W_IN=Fp8,float,0 W_X=Plain,float,0 W_OUT=Int8,fp16,0 W_UP=Plain,float,0 W_DOWN=Plain,float,0 W_HEAD=Plain,float,0 W_EMBED=Plain,float,0
//
// A whole step of generation for one row in one launch: all layers and the head, from the token to its logits.
//
// A kernel for each product would wait for the one before it, and memory with it. Here every multiprocessor holds one
// block from the first layer to the last, and which tiles of which weights it multiplies is known beforehand: so weights
// are read ahead, through a ring in shared memory, across the places where a block waits for numbers of others. Blocks
// give each other numbers as words of 4 bytes: one that hasn't come yet is VOID, and who needs it looks until it isn't.
// No barrier of the grid is needed, for every exchanged vector of every layer has its own place, and there are two sets
// of places: while a step uses one, it makes the other one void for the next step.
//
// 8 warps multiply: they share K of a tile of 16 rows of W as in decode_linear.cu, and everything is summed and rounded
// in the same order as in the kernels for more rows, so that a row has the same bits there. 2 warps have the copy engine
// bring weights into a ring (before sm_90 they copy themselves), and one does what the next numbers don't wait for. What a
// layer runs is small on purpose, each part compiled once for all kinds of products that can share it: a warp takes about
// 5 cycles an instruction whatever the others do, and the caches of instructions are small.
//
// All blocks must run at once: launch it as a cooperative kernel, one block a multiprocessor.
//
//   T, R    types of the arithmetic (16 bits) and of the residual stream     N, RANK, NORMS, KC  as in decode_step.cu
//   FFN     1: layers have gate, up and down                                 DEPTH  stages of the ring, of which
//   FLIGHT  are on their way at most     SPAN  chunks of 64 bytes of each row in a stage     GROUPS  scales of a row at most
//   W_...   a weight's format, type of scales, columns that share a scale (0: a row): in_proj, x_proj, out_proj, gate
//           and up, down, head, embedding
#include "decode.cuh"

constexpr int WARPS = 8, THREADS = 32 * WARPS;
constexpr int FEEDERS = 2;                     // warps that each bring half of a stage's rows
constexpr int ALL_THREADS = THREADS + 32 * (FEEDERS + 1);
constexpr int PIECE = 16 / sizeof(T);          // numbers of 16 bytes
constexpr int SLOTS = 8;                       // tiles, or slices of a tile, that are finished together
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

// Of a stage, in words of 16 bytes: a row, a multiple of 128 bytes and 64 more, so that rows beside each other don't share
// banks; 16 rows and the scales of the tile.
constexpr int ROW = SPAN * 4 + 4, STAGE = 16 * ROW + 2 * GROUPS;

// ---- What the host knows and writes into `table`: a record for each layer and one for the head, then the shapes.

// Kinds of products, in a layer's order; HEAD stands in the last record.
enum { IN, MIX_IN, OUT, UP, DOWN, HEAD, KINDS };
constexpr int LAYER_KINDS = FFN ? 5 : 3;
// Of a record: weight and scales of kind k at 2k and 2k + 1 (gate at UP, up itself where the head has its own).
enum { SECOND = 10, NORM = 12, CONV_WEIGHT, CONV_BIAS, CONV_SCALE, NORM_DT, NORM_B, NORM_C, DT_WEIGHT, DT_BIAS, A_LOG2, SKIP, NORM_FFN, RECORD };

struct Shape {
  int64 row_bytes;
  int rows, chunks;     // 64-byte chunks of a row
  int slice, parts;     // chunks of a slice; slices, each a unit: one but of x_proj
  int each, rest;       // units of a block; the first `rest` blocks have one more
  int groups, shift;    // groups: scales of a row; 2^shift chunks share a scale, negative: none
  int pieces;           // stages of a slice
};
constexpr int SHAPE = 10;  // numbers of a shape in `table`

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

// All threads that multiply.
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

// A number in shared memory that one warp tells another; nothing else is meant by it.
DEVICE void tell(int* to, int value) {
#ifdef MOAI_HOST
  *(volatile int*)to = value;
#else
  asm volatile("st.volatile.shared.u32 [%0], %1;" ::"r"((uint32)__cvta_generic_to_shared(to)), "r"(value) : "memory");
#endif
}
DEVICE int told(const int* from) {
#ifdef MOAI_HOST
  return *(const volatile int*)from;
#else
  int value;
  asm volatile("ld.volatile.shared.u32 %0, [%1];" : "=r"(value) : "r"((uint32)__cvta_generic_to_shared(from)) : "memory");
  return value;
#endif
}

// ---- A stage's barriers (mbarrier): a phase ends when all that should have arrived has, bytes on their way included.

#if defined(MOAI_HOST)
#define ENGINE 1
struct Gate {
  unsigned char phase, all;
  short missing;
  int bytes;
  void look() {
    if (missing == 0 && bytes == 0) phase ^= 1, missing = all;
  }
};
#else
#define ENGINE (__CUDA_ARCH__ >= 900)  // the copy engine: bulk copies
struct alignas(8) Gate {
  int64 state;
};
DEVICE uint32 address(const void* shared) { return (uint32)__cvta_generic_to_shared(shared); }
#endif

DEVICE void begin(Gate* gate, int all) {
#ifdef MOAI_HOST
  *gate = {0, (unsigned char)all, (short)all, 0};
#else
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(address(gate)), "r"(all) : "memory");
#endif
}

// What other threads have begun is seen by all, the copy engine too, behind this and a barrier.
DEVICE void begun() {
#if !defined(MOAI_HOST) && ENGINE
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DEVICE void arrive(Gate* gate) {
#ifdef MOAI_HOST
  gate->missing--, gate->look();
#else
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(address(gate)) : "memory");
#endif
}

// Until the phase of this parity has ended: a gate has just ended one of parity 1 when it begins.
DEVICE void wait(Gate* gate, uint32 parity) {
#if defined(MOAI_HOST)
  while (gate->phase == parity) host_yield();
#else
  uint32 done = 0;
  for (int looks = 0; !done; looks++) {
    if (looks > 1 << 22) asm volatile("trap;");
#if ENGINE
    asm volatile("{.reg .pred done; mbarrier.try_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
#else
    asm volatile("{.reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
#endif
                 : "=r"(done)
                 : "r"(address(gate)), "r"(parity)
                 : "memory");
  }
#endif
}

// What a warp brings to shared memory: a gate is told how many bytes to expect, and each copy of 16 and more bytes tells it
// what has come. The copy engine does it for one lane; where there is none, all lanes copy and arrive themselves.
constexpr int ARRIVALS = ENGINE ? 1 : 32;

DEVICE bool elected() {
#if defined(MOAI_HOST) || !ENGINE
  return threadIdx.x % 32 == 0;
#else
  uint32 one;
  asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(one));
  return one;
#endif
}
DEVICE void bring_one(Gate* gate, unsigned char* to, const unsigned char* from, int bytes) {
#ifdef MOAI_HOST
  __builtin_memcpy(to, from, bytes), gate->bytes -= bytes, gate->look();
#elif ENGINE
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
               "l"(from), "r"(bytes), "r"(address(gate))
               : "memory");
#else
  for (int at = threadIdx.x % 32 * 16; at < bytes; at += 512) copy_async_16(to + at, from + at, true);
#endif
}
DEVICE void expect(Gate* gate, int bytes) {
#ifdef MOAI_HOST
  gate->bytes += bytes, gate->missing--, gate->look();
#elif ENGINE
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(address(gate)), "r"(bytes) : "memory");
#endif
}
DEVICE void all_brought(Gate* gate) {
#if !ENGINE
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(address(gate)) : "memory");
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

// Of the warp that works beside.
DEVICE void rest() {
#ifdef MOAI_HOST
  host_yield();
#else
  asm volatile("nanosleep.u32 500;");
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
    // The last one first: most looks in vain are at one word a warp, and hold up less of what is being sent.
    const int most = first - lane + (MOST - 1) * apart + 31, last = most < end ? most : first - lane + 31 < end ? first - lane + 31 : end - 1;
    const uint32* const one = kept(from + last * 4 + 3);
    for (int looks = 0; look(one) == VOID;) pause(looks);
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

// The block's units of a product, one behind the other. Who has more than others goes round the blocks from product to
// product: each role counts along.
struct Run {
  int first, count;
};
struct Turns {
  int at;
  DEVICE Run next(const Block& b, const Shape& s) {
    const int rank = b.block >= at ? b.block - at : b.block - at + b.blocks;
    at = at + s.rest < b.blocks ? at + s.rest : at + s.rest - b.blocks;
    return {rank * s.each + (rank < s.rest ? rank : s.rest), s.each + (rank < s.rest)};
  }
};

// Where in the ring something is that goes on stage by stage, and which way round.
struct Place {
  int at;
  uint32 parity;
  DEVICE void skip(int stages) {
    for (at += stages; at >= DEPTH; at -= DEPTH) parity ^= 1;
  }
};

// A warp that feeds: it brings its half of the stages' rows as far as there is room, but has few stages on their way at a
// time: memory is busy with those, and words would wait behind more. `entered` is told of each kind of each layer.
struct Feeder {
  const Block& b;
  int half;
  unsigned char* ring;
  Gate *full, *empty;
  Place next, landing;
  int stages;

  // What a stage brings: rows of `bytes`, `apart` bytes from each other, and scales.
  struct Half {
    const unsigned char *from, *scales;
    int rows, chunks, scale_bytes, scales_at;
  };

  DEVICE Half half_of(const Shape& s, int layer, int kind, int unit) const {
    const bool paired = kind == UP;
    const int tile = s.parts > 1 ? unit / s.parts : unit, begin = (unit - tile * s.parts) * s.slice;
    const int row = paired ? tile * 8 : tile * 16 + half * 8, place = paired && half ? SECOND : 2 * kind, left = s.rows - row;
    Half h;
    h.rows = left < 0 ? 0 : left < 8 ? left : 8, h.chunks = s.chunks - begin < s.slice ? s.chunks - begin : s.slice;
    h.from = b.pointer(layer, place) + row * s.row_bytes + (int64)begin * 64;
    h.scale_bytes = GROUPS > 0 && s.shift >= 0 ? h.rows * s.groups * 2 : 0, h.scales_at = half * 8 * s.groups * 2;
    h.scales = b.pointer(layer, place + 1) + (int64)row * s.groups * 2;
    return h;
  }

  DEVICE void stage(Half& h, int64 apart) {
    wait(empty + next.at, next.parity ^ 1);
    if (stages >= FLIGHT) wait(full + landing.at, landing.parity), landing.skip(1);
    Gate* const gate = full + next.at;
    unsigned char *const stage = ring + next.at * (STAGE * 16), *const to = stage + half * 8 * ROW * 16;
    const int bytes = h.chunks <= 0 ? 0 : h.chunks < SPAN ? h.chunks * 64 : SPAN * 64;
    if (!ENGINE || elected()) {
      expect(gate, bytes > 0 ? h.rows * bytes + h.scale_bytes : 0);
      if (bytes > 0) {
#pragma unroll
        for (int row = 0; row < 8; row++)
          if (row < h.rows) bring_one(gate, to + row * (ROW * 16), h.from + row * apart, bytes);
        if (h.scale_bytes > 0) bring_one(gate, stage + 16 * ROW * 16 + h.scales_at, h.scales, h.scale_bytes);
      }
    }
    all_brought(gate);
    __syncwarp();
    h.from += SPAN * 64, h.chunks -= SPAN;
    next.skip(1), stages++;
  }

  DEVICE void run(int* entered) {
    Turns turns{0};
#pragma unroll 1
    for (int layer = 0; layer <= b.layers; layer++) {
      const bool last = layer == b.layers;
#pragma unroll 1
      for (int kind = last ? HEAD : IN; kind < (last ? KINDS : LAYER_KINDS); kind++) {
        if (half == 0 && b.lane == 0) tell(entered, layer * KINDS + kind + 1);
        const Shape& s = b.shapes[kind];
        const Run run = turns.next(b, s);
#pragma unroll 1
        for (int unit = run.first; unit < run.first + run.count; unit++) {
          Half h = half_of(s, layer, kind, unit);
#pragma unroll 1
          for (int piece = 0; piece < s.pieces; piece++) stage(h, s.row_bytes);
        }
      }
    }
  }
};

// The ring from a warp's side.
struct Ring {
  const Words* stages;
  Gate *full, *empty;
  Place place;
  int lane;

  DEVICE const Words* take() const {
    wait(full + place.at, place.parity);
    return stages + place.at * STAGE;
  }
  DEVICE void give_back() {
    __syncwarp();
    if (lane == 0) arrive(empty + place.at);
    place.skip(1);
  }
};

// ---- Products

// A chunk. stage: 16 bytes of row g, those of row g + 8 lie behind 8 rows; scales: of row g, those of row g + 8 are 8 rows
// behind; xs: of the chunk.
template <class W>
DEVICE void multiply(float (&sum)[4], const Words* stage, const fp16* scales, const Words* xs, const Units* units, int chunk, int groups, int shift) {
  using F = typename W::Format;
  constexpr int STEPS = F::COLUMNS / 4;
  const Words upper = stage[0], lower = stage[8 * ROW];
  Words x[F::XV];
#pragma unroll
  for (int j = 0; j < F::XV; j++) x[j] = xs[j * 4];  // of all 8 vectors: they are the same
  float fresh[2][4] = {};
#pragma unroll
  for (int s = 0; s < STEPS; s++) {
    uint32 w[4], v[2];
    F::weights(w[0], w[2], upper, s);
    F::weights(w[1], w[3], lower, s);
    F::vectors(v, x, s);
    if constexpr (W::GROUP == 0) mma_16<T>(sum, w, v);
    else mma_of<F, T>(fresh[s % 2], w, v);
  }
  if constexpr (W::GROUP > 0) {  // the other sums are copies
    const Units u = units[chunk];
    const fp16* const own = scales + (chunk >> shift);
#pragma unroll
    for (int i = 0; i < 2; i++)
      sum[2 * i] += to_float(own[i * 8 * groups]) * ((fresh[0][2 * i] + fresh[1][2 * i]) * u.at[0] - u.at[1]);
  }
}

// The sums of the block's units from `first` on, `slots` tiles or slices of a tile, each warp's for itself.
struct AddUp {
  const Block& b;
  Ring& ring;
  float* sums;
  const Shape& s;
  int first, slots;
  const Words* xs;
  const Units* units;
  template <class W>
  DEVICE void operator()(W) const;
};
template <class W>
DEVICE void AddUp::operator()(W) const {
  constexpr int X = W::Format::XV * 4;  // words of x of a chunk
  const int lane = b.lane, parts = s.parts, pieces = s.pieces, size = s.slice, chunks = s.chunks, groups = s.groups, shift = s.shift;
  const int part = lane / 4 * ROW + b.warp * 4 + lane % 4;
  float* to = sums + b.warp * 16 + lane / 4;
#pragma unroll 1
  for (int slot = 0; slot < slots; slot++, to += WARPS * 16) {
    const int begin = parts > 1 ? (first + slot) % parts * size : 0, end = begin + size < chunks ? begin + size : chunks;
    int chunk = begin + b.warp;
    const Words* x = xs + chunk * X + lane % 4;
    float sum[4] = {};
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++) {
      const Words* const stage = ring.take();
      const fp16* const scales = (const fp16*)(stage + 16 * ROW) + lane / 4 * groups;
#pragma unroll
      for (int step = 0; step < SPAN / WARPS; step++, chunk += WARPS, x += WARPS * X)
        if (chunk < end) multiply<W>(sum, stage + part + step * WARPS * 4, scales, x, units, chunk, groups, shift);
      ring.give_back();
    }
    if (lane % 4 == 0) to[0] = sum[0], to[8] = sum[2];
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

// ---- What becomes of a product's results: a warp finishes 32 of them, rows beside each other of the block's tiles, so that
// few and long writes reach the lines that others look at. A lane has one, where there are two weights one of each.

// Asked for while the product is made, and kept as it comes: who converts a number waits for it.
struct Prepared {
  uint32 scale, second;  // bits of a row's scale
  T weight[KC], past[KC - 1], bias, factor;
};

template <class Scale>
DEVICE uint32 bits_at(const Scale* from) {
  if constexpr (sizeof(Scale) == 2) return *(const uint16*)from;
  else return *(const uint32*)from;
}
struct RowScale {
  const Block& b;
  Prepared& p;
  int layer, kind, row;
  template <class W>
  DEVICE void operator()(W) const {
    if constexpr (W::ROW_SCALED) {
      p.scale = bits_at(b.numbers<typename W::Scale>(layer, 2 * kind + 1) + row);
      if (kind == UP) p.second = bits_at(b.numbers<typename W::Scale>(layer, SECOND + 1) + row);
    }
  }
};
struct Scaled {
  float &value, &second;
  const Prepared& p;
  template <class W>
  DEVICE void operator()(W) const {
    if constexpr (W::ROW_SCALED) {
      constexpr bool half = sizeof(typename W::Scale) == 2;
      value *= half ? to_float(fp16{(uint16)p.scale}) : bits_float(p.scale);
      second *= half ? to_float(fp16{(uint16)p.second}) : bits_float(p.second);
    }
  }
};

struct Finish {
  const Block& b;
  const Exchange& at;
  int layer, kind, H, I, F, V;
  const T* window;
  T *next_window, *logits;
  const R* stream;

  DEVICE void prepare(Prepared& p, int r, int rows) const {
    if (r < rows) with_weight(kind, RowScale{b, p, layer, kind, r});
    if (kind != IN || r >= I) return;
    const T *w = b.numbers<T>(layer, CONV_WEIGHT), *add = b.numbers<T>(layer, CONV_BIAS), *times = b.numbers<T>(layer, CONV_SCALE);
#pragma unroll
    for (int k = 0; k < KC; k++) p.weight[k] = w[r * KC + k];
#pragma unroll
    for (int k = 0; k < KC - 1; k++) p.past[k] = window[r * (KC - 1) + k];
    if (add) p.bias = add[r];
    if (times) p.factor = times[r];
  }

  // in_proj: u goes through a step of the convolution, whose window of the last KC - 1 inputs moves on; z as it is.
  DEVICE T convolved(const Prepared& p, int r, float value) const {
    float sum = to_float(p.bias);
#pragma unroll
    for (int k = 0; k < KC - 1; k++) sum += to_float(p.weight[k]) * to_float(p.past[k]);
    sum += to_float(p.weight[KC - 1]) * value;
    const float y = sum * sigmoid(sum);
#pragma unroll
    for (int k = 1; k < KC - 1; k++) next_window[r * (KC - 1) + k - 1] = p.past[k];
    next_window[r * (KC - 1) + KC - 2] = from_float<T>(value);
    return from_float<T>(b.numbers<T>(layer, CONV_SCALE) ? rounded<T>(y) * to_float(p.factor) : y);
  }

  // value of row r, second: of the other weight; part: of x_proj. r is negative where there is none; pairs of lanes have
  // rows 2n and 2n + 1.
  DEVICE void put(const Prepared& p, int r, int part, float value, float second) const {
    with_weight(kind, Scaled{value, second, p});
    if (kind == MIX_IN) {  // the slices' sums as they are
      if (r >= 0 && r < MIX) send(at.sums() + part * MIX + r, float_bits(value));
      return;
    }
    if (kind == HEAD) {
      if (r >= 0 && r < V) logits[r] = from_float<T>(value);
      return;
    }
    value = rounded<T>(value);
    if (sizeof(R) == 4 && (kind == OUT || kind == DOWN)) {
      if (r >= 0 && r < H) send((kind == OUT ? at.middle() : at.end()) + r, float_bits(to_float(stream[r]) + value));
      return;
    }
    // The others are pairs of 16 bits.
    uint32 bits;
    uint32* to;
    int rows = H;
    if (kind == IN) {
      bits = bits_of(r >= 0 && r < I ? convolved(p, r, value) : from_float<T>(value));
      to = at.u() + (r < I ? r / 2 : at.n + (r - I) / 2), rows = 2 * I;
    } else if (kind == UP) {  // silu(gate) up
      bits = bits_of(from_float<T>(value * sigmoid(value) * rounded<T>(second)));
      to = at.product() + r / 2, rows = F;
    } else {  // added to the residual stream
      const R sum = from_float<R>((r >= 0 && r < H ? to_float(stream[r]) : 0.0f) + value);
      bits = *reinterpret_cast<const uint16*>(&sum);
      to = (kind == OUT ? at.middle() : at.end()) + r / 2;
    }
    const uint32 other = __shfl_xor_sync(0xffffffffu, bits, 1);
    if (r >= 0 && r % 2 == 0 && r < rows) send(to, bits | other << 16);
  }
};

// The sum of the warps' shares of a row.
DEVICE float added(const float* from) {
  float sum = 0.0f;
#pragma unroll
  for (int other = 0; other < WARPS; other++) sum += from[other * 16];
  return sum;
}

// ---- What a warp does beside: numbers that a layer reads beside its large weights come into the L2 cache before they are
// waited for, and the other set of words becomes void.

DEVICE void fetch(const void* from, int bytes, int lane) {
#pragma unroll 1
  for (int at = lane * 128; at < bytes; at += 32 * 128) prefetch_line((const char*)from + at);
}

struct Beside {
  const Block& b;
  const T* window;
  const float* state;
  uint32 *own, *other;  // sets of words
  int layer_words, H, I;
  int64 apart;    // channels from layer to layer of a state

  DEVICE void operator()(int layer, int kind, const Run& run) const {
    const int first = b.block * CHANNELS, count = I - first < CHANNELS ? I - first : CHANNELS;
    if (layer == b.layers) return;
    if (kind == IN) {
      Words* const words = (Words*)(other + (int64)layer * layer_words);
#pragma unroll 1
      for (int i = b.block * 32 + b.lane; i < layer_words / 4; i += b.blocks * 32) words[i] = {{VOID, VOID, VOID, VOID}};
      const uint32* const lines = own + (int64)layer * layer_words;
#pragma unroll 1
      for (int i = (b.block * 32 + b.lane) * 32; i < layer_words; i += b.blocks * 1024) prefetch_line(lines + i);
      const T* const inputs = window + layer * apart * (KC - 1);
#pragma unroll 1
      for (int unit = run.first; unit < run.first + run.count && unit * 16 < I; unit++) {
        const int row = unit * 16, rows = I - row < 16 ? I - row : 16;
        fetch(b.numbers<T>(layer, CONV_WEIGHT) + row * KC, rows * KC * (int)sizeof(T), b.lane);
        fetch(inputs + row * (KC - 1), rows * (KC - 1) * (int)sizeof(T), b.lane);
        if (b.lane) continue;
        prefetch_line(inputs + (row + rows) * (KC - 1) - 1);
        if (const T* bias = b.numbers<T>(layer, CONV_BIAS)) prefetch_line(bias + row);
      }
      if (FFN) fetch(b.numbers<T>(layer, NORM_FFN), H * (int)sizeof(T), b.lane);
    } else if (kind == MIX_IN && count > 0) {
      fetch(b.numbers<T>(layer, DT_WEIGHT) + (int64)first * RANK, count * RANK * (int)sizeof(T), b.lane);
      fetch(b.numbers<float>(layer, A_LOG2) + (int64)first * N, count * N * 4, b.lane);
      fetch(state + (layer * apart + first) * N, count * N * 4, b.lane);
      if (b.lane < (NORMS ? 3 : 0)) prefetch_line(b.numbers<T>(layer, NORM_DT + b.lane));
      if (b.lane < 2) prefetch_line(b.numbers<float>(layer, b.lane ? SKIP : DT_BIAS) + first);
    } else if (kind == LAYER_KINDS - 1) {
      fetch(b.numbers<T>(layer + 1, NORM), H * (int)sizeof(T), b.lane);
    }
  }

  // As the feeding warp comes to each kind of each layer.
  DEVICE void follow(const int* entered) const {
    Turns turns{0};
#pragma unroll 1
    for (int layer = 0; layer < b.layers; layer++)
#pragma unroll 1
      for (int kind = IN; kind < LAYER_KINDS; kind++) {
        const Run run = turns.next(b, b.shapes[kind]);
        while (told(entered) <= layer * KINDS + kind) rest();
        (*this)(layer, kind, run);
      }
  }
};

// ---- The step. Grid: a block a multiprocessor. table: (layers + 1) RECORD pointers, KINDS SHAPE numbers. exchange: two
// sets of words of all layers, VOID before the first step. clock: steps so far, blocks that have ended this one. windows
// (layers, I, KC - 1) and states (layers, I, N), rows `capacity` apart. Shared memory: a ring of DEPTH stages; `room`
// bytes for x, a multiple of 512, and its units; the stream, H numbers of 16 bytes' multiple; the table.
extern "C" __global__ void __launch_bounds__(ALL_THREADS, 1)
decode_whole(const int64* table, uint32* exchange, int64* clock, const int64* token, const unsigned char* embedding,
             const Embedding::Scale* embedding_scales, const fp16* embedding_zeros, const T* window, T* next_window,
             const float* state, float* next_state, T* logits, int64 layers, int64 H, int64 I, int64 F, int64 V,
             int64 room, int64 row_bytes, int64 group, int64 groups, int64 capacity, float eps, float mix_eps) {
  extern __shared__ Words shared[];
  __shared__ float red[2][SLOTS * WARPS * 16], scratch[WARPS], mixed[MIX];
  __shared__ Shape shapes[KINDS];
  __shared__ Gate full[DEPTH], empty[DEPTH];
  __shared__ int entered;
  const Vector x{shared + DEPTH * STAGE, (Units*)(shared + DEPTH * STAGE + room / 16)};
  R* const stream = (R*)(x.units + room / 256);  // a chunk of 256 bytes has units
  int64* const records = (int64*)(stream + (H + 7) / 8 * 8);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;

  if (threadIdx.x == 0) entered = 0;
  if (threadIdx.x < DEPTH) begin(full + threadIdx.x, FEEDERS * ARRIVALS), begin(empty + threadIdx.x, WARPS), begun();
  const int turns = (int)(*(const volatile int64*)clock & 1);
  for (int i = threadIdx.x; i < (layers + 1) * RECORD; i += ALL_THREADS) records[i] = table[i];
  if (threadIdx.x < KINDS) {
    const int64* n = table + (layers + 1) * RECORD + threadIdx.x * SHAPE;
    shapes[threadIdx.x] = {n[0], (int)n[1], (int)n[2], (int)n[3], (int)n[4], (int)n[5], (int)n[6], (int)n[7], (int)n[8], (int)n[9]};
  }
  __syncthreads();

  const Block b{records, shapes, (int)layers, (int)gridDim.x, (int)blockIdx.x, warp, lane};
  const int slices = shapes[MIX_IN].parts;
  const auto whole = [](int64 count) { return (int)(count + 3) / 4 * 4; };
  Exchange at{exchange, whole(I / 2), whole(slices * MIX), whole(sizeof(R) == 4 ? H : H / 2), FFN ? whole(F / 2) : 0};
  const int layer_words = at.words();
  const int64 set = layers * layer_words;
  if (warp >= WARPS) {
    const int helper = warp - WARPS;
    uint32* const sets[2] = {exchange + turns * set, exchange + (1 - turns) * set};
    if (helper == FEEDERS) return Beside{b, window, state, sets[0], sets[1], layer_words, (int)H, (int)I, capacity * I}.follow(&entered);
    Feeder feeder{b, helper, (unsigned char*)shared, full, empty, {0, 0}, {0, 0}, 0};
    return feeder.run(&entered);
  }

  Ring ring{shared, full, empty, {0, 0}, lane};
  const int64 id = *token < 0 ? 0 : *token;
  for (int c = threadIdx.x; c < H; c += THREADS)
    stream[c] = from_float<R>(embedded<Embedding::Format, T>(embedding + id * row_bytes, embedding_scales, embedding_zeros, id * groups, c, group));
  block_barrier();

  int turn = 0;
  Turns units{0};
  const uint32* before = nullptr;  // the stream behind the last layer
  at.base += turns * set;
#pragma unroll 1
  for (int layer = 0; layer <= layers; layer++) {
    const int64 rows = layer * capacity * I;
    const bool last = layer == layers;
#pragma unroll 1
    for (int kind = last ? HEAD : IN; kind < (last ? KINDS : LAYER_KINDS); kind++) {
      const Shape& s = shapes[kind];
      const Run run = units.next(b, s);
      // Of a lane that finishes: its row of tile `mine`, which has 2^size.
      const int size = kind == UP ? 3 : 4, row = lane & ((1 << size) - 1), mine = (warp * 32 + lane) >> size;
      const Finish finish{b, at, layer, kind, (int)H, (int)I, (int)F, (int)V, window + rows * (KC - 1), next_window + rows * (KC - 1), logits, stream};
      if (kind == IN || kind == UP || kind == HEAD) {
        norm_stream(x, kind, stream, scratch, kind == UP ? at.middle() : before, b.numbers<T>(layer, kind == UP ? NORM_FFN : NORM), (int)H, eps);
      } else if (kind == MIX_IN) {  // the slices of the block's units
        const int pieces = s.slice * 4 * MixIn::Format::XV, all = s.chunks * 4 * MixIn::Format::XV;
        for (int i = warp; i < run.count; i += WARPS) {
          const int begin = s.parts > 1 ? (run.first + i) % s.parts * pieces : 0, end = s.parts > 1 && begin + pieces < all ? begin + pieces : all;
          receive<1>(at.u(), begin + lane, 32, end, [&](int i, const Words& w, bool there) { put(x, MIX_IN, i, w, there); });
        }
      } else {
        if (kind == OUT) scan(b, layer, at, mixed, state + rows * N, next_state + rows * N, (int)I, slices, mix_eps);
        if (run.count)
          receive<3>(kind == OUT ? at.y() : at.product(), threadIdx.x, THREADS, (int)(kind == OUT ? I : F) / PIECE,
                     [&](int i, const Words& w, bool there) { put(x, kind, i, w, there); });
      }
      block_barrier();

#pragma unroll 1
      for (int done = 0; done < run.count; done += SLOTS, turn ^= 1) {
        const int left = run.count - done, tiles = left < SLOTS ? left : SLOTS, unit = run.first + done;
        const bool finishes = warp * 32 < tiles << size;
        int r = -1, part = 0;
        Prepared prepared{};
        if (finishes && mine < tiles) {
          const int tile = kind == MIX_IN ? (unit + mine) / s.parts : unit + mine;
          r = (tile << size) + row, part = unit + mine - tile * s.parts;
          finish.prepare(prepared, r, s.rows);
        }
        with_weight(kind, AddUp{b, ring, red[turn], s, unit, tiles, x.words, x.units});
        block_barrier();
        if (!finishes) continue;
        const float* const from = red[turn] + (mine < tiles ? mine : 0) * WARPS * 16 + row;
        finish.put(prepared, r, part, added(from), kind == UP ? added(from + 8) : 0.0f);
      }
    }
    before = at.end();
    at.base += layer_words;
  }

  block_barrier();
  if (threadIdx.x == 0 && count_one((int*)(clock + 1)) == (int)gridDim.x - 1) clock[0] += 1, clock[1] = 0;
}
