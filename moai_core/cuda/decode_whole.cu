// moai: kernels decode_whole
// moai: macros T=bf16 R=bf16 N=16 RANK=128 NORMS=1 KC=4 SLICES=16 FFN=1 DEPTH=10 FLIGHT=3 FLIGHT_HEAD=3 SPAN=16 GROUPS=0 W_IN=Plain,float,0 W_X=Plain,float,0 W_OUT=Plain,float,0 W_UP=Plain,float,0 W_DOWN=Plain,float,0 W_HEAD=Plain,float,0 W_EMBED=Plain,float,0
// moai: macros T=bf16 R=float N=16 RANK=128 NORMS=1 KC=4 SLICES=16 FFN=1 DEPTH=10 FLIGHT=1 FLIGHT_HEAD=3 SPAN=16 GROUPS=44 W_IN=Int4,fp16,128 W_X=Plain,float,0 W_OUT=Int4,fp16,128 W_UP=Int4,fp16,128 W_DOWN=Int4,fp16,128 W_HEAD=Int8,fp16,0 W_EMBED=Int8,fp16,0
// moai: macros T=bf16 R=float N=16 RANK=128 NORMS=1 KC=4 SLICES=16 FFN=1 DEPTH=9 FLIGHT=1 FLIGHT_HEAD=4 SPAN=16 GROUPS=44 W_IN=Digits,fp16,128 W_X=Plain,float,0 W_OUT=Digits,fp16,128 W_UP=Digits,fp16,128 W_DOWN=Digits,fp16,128 W_HEAD=Int8,fp16,0 W_EMBED=Int8,fp16,0
// moai: macros T=fp16 R=fp16 N=8 RANK=20 NORMS=0 KC=3 SLICES=3 FFN=0 DEPTH=7 FLIGHT=3 FLIGHT_HEAD=3 SPAN=8 GROUPS=0 W_IN=Fp8,float,0 W_X=Plain,float,0 W_OUT=Int8,fp16,0 W_UP=Plain,float,0 W_DOWN=Plain,float,0 W_HEAD=Plain,float,0 W_EMBED=Plain,float,0
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
// in the same order as in the kernels for more rows, so that a row has the same bits there; but not with Digits, which the
// host takes where more rows go another way. 2 warps have the copy engine bring weights into a ring (before sm_90 they copy
// themselves), and one does what the next numbers don't wait for. What a layer runs is small on purpose, each part compiled
// once for all kinds of products that can share it: a warp takes about 5 cycles an instruction whatever the others do, and
// the caches of instructions are small.
//
// All blocks must run at once: launch it as a cooperative kernel, one block a multiprocessor.
//
//   T, R    types of the arithmetic (16 bits) and of the residual stream     N, RANK, NORMS, KC  as in decode_step.cu
//   SLICES  in which K of x_proj is summed
//   FFN     1: layers have gate, up and down                                 DEPTH  stages of the ring, of which
//   FLIGHT, FLIGHT_HEAD  are on their way at most: of layers, of the head     SPAN  chunks of 64 bytes of each row in a stage
//   GROUPS  scales of a row at most
//   W_...   a weight's format, type of scales, columns that share a scale (0: a row): in_proj, x_proj, out_proj, gate
//           and up, down, head, embedding. Formats of gemv.cuh, or Digits (digits.cuh) for codes in groups
#include "decode.cuh"
#include "digits.cuh"

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

// f(W{}) with the weight of a kind; kinds of the same weights share the code. with_large: of neither MIX_IN nor HEAD.
template <class F>
DEVICE void with_large(int kind, F f) {
  if constexpr (same<In, Out> && (!FFN || (same<In, Up> && same<In, Down>))) {
    f(In{});
  } else {
    if (kind == OUT) f(Out{});
    else if (FFN && kind == UP) f(Up{});
    else if (FFN && kind == DOWN) f(Down{});
    else f(In{});
  }
}
template <class F>
DEVICE void with_weight(int kind, F f) {
  if (!same<MixIn, In> && kind == MIX_IN) return f(MixIn{});
  if (!same<Head, In> && kind == HEAD) return f(Head{});
  with_large(kind, f);
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

// Where a gate is, kept in a register: what shared memory begins at is slow to ask for.
#ifdef MOAI_HOST
using At = Gate*;
DEVICE At gates_at(Gate* gates) { return gates; }
DEVICE At gate_at(At gates, int i) { return gates + i; }
#else
using At = uint32;
DEVICE At gates_at(Gate* gates) { return keep(address(gates)); }
DEVICE At gate_at(At gates, int i) { return gates + 8 * i; }
#endif

DEVICE void begin(At gate, int all) {
#ifdef MOAI_HOST
  *gate = {0, (unsigned char)all, (short)all, 0};
#else
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(gate), "r"(all) : "memory");
#endif
}

// What other threads have begun is seen by all, the copy engine too, behind this and a barrier.
DEVICE void begun() {
#if !defined(MOAI_HOST) && ENGINE
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

DEVICE void arrive(At gate) {
#ifdef MOAI_HOST
  gate->missing--, gate->look();
#else
  asm volatile("{.reg .b64 state; mbarrier.arrive.shared.b64 state, [%0];}" ::"r"(gate) : "memory");
#endif
}

// Whether the phase of this parity has ended: a gate has just ended one of parity 1 when it begins.
DEVICE bool ended(At gate, uint32 parity) {
#if defined(MOAI_HOST)
  return gate->phase != parity;
#else
  uint32 done;
#if ENGINE
  asm volatile("{.reg .pred done; mbarrier.try_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
#else
  asm volatile("{.reg .pred done; mbarrier.test_wait.parity.shared.b64 done, [%1], %2; selp.u32 %0, 1, 0, done;}"
#endif
               : "=r"(done)
               : "r"(gate), "r"(parity)
               : "memory");
  return done;
#endif
}

DEVICE void wait(At gate, uint32 parity) {
  if (ended(gate, parity)) return;  // mostly, and counting would take as long
#if defined(MOAI_HOST)
  while (!ended(gate, parity)) host_yield();
#else
#pragma unroll 1
  for (int looks = 0; !ended(gate, parity); looks++)
    if (looks > 1 << 22) asm volatile("trap;");
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
DEVICE void bring_one(At gate, unsigned char* to, const unsigned char* from, int bytes) {
#ifdef MOAI_HOST
  __builtin_memcpy(to, from, bytes), gate->bytes -= bytes, gate->look();
#elif ENGINE
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(address(to)),
               "l"(from), "r"(bytes), "r"(gate)
               : "memory");
#else
  for (int at = threadIdx.x % 32 * 16; at < bytes; at += 512) copy_async_16(to + at, from + at, true);
#endif
}
DEVICE void expect(At gate, int bytes) {
#ifdef MOAI_HOST
  gate->bytes += bytes, gate->missing--, gate->look();
#elif ENGINE
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(gate), "r"(bytes) : "memory");
#endif
}
DEVICE void all_brought(At gate) {
#if !ENGINE
  asm volatile("cp.async.mbarrier.arrive.noinc.shared.b64 [%0];" ::"r"(gate) : "memory");
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
DEVICE uint32 largest(uint32 a, uint32 b) { return a > b ? a : b; }
DEVICE bool here(const Words& w) {
  return largest(largest(w.at[0], w.at[1]), largest(w.at[2], w.at[3])) != VOID;
}

// Between two looks. A kernel that waits for ever is worse than one that fails.
DEVICE void pause(int& looks) {
#ifdef MOAI_HOST
  host_yield();
#else
  if (++looks > 1 << 23) asm volatile("trap;");
#endif
}

// An address in shared memory, kept in a register: where it begins is slow to ask for.
template <class X>
DEVICE X* kept_shared(X* at) {
#ifndef MOAI_HOST
  asm volatile("" : "+l"(at));
  __builtin_assume(__isShared(at));
#endif
  return at;
}

// Of the warp that works beside.
DEVICE void rest() {
#ifdef MOAI_HOST
  host_yield();
#else
  asm volatile("nanosleep.u32 500;");
#endif
}

// A product's x in pieces of 16 bytes, 2^p to a chunk. Where a chunk has 16, a warp takes those of the chunks that it
// multiplies, and waits for no other's; where it has less, that would ask memory for short runs, and a warp takes 32 pieces
// beside each other.
DEVICE constexpr bool owned(int p) { return p == 4; }
// The first of a lane's pieces, of which one is THREADS behind the other.
DEVICE int first_piece(int warp, int lane, int p) {
  return owned(p) ? ((warp + (lane >> p) * WARPS) << p) + (lane & ((1 << p) - 1)) : warp * 32 + lane;
}
// The last of them before `end` among a warp's first MOST from that of `lead`, lane 0's, on.
template <int MOST>
DEVICE int last_piece(int lead, int p, int end) {
  const int apart = owned(p) ? WARPS << p : THREADS;
  int last = lead + (MOST - 1) * THREADS + (owned(p) ? THREADS - apart + (1 << p) - 1 : 31);
  while (last >= end && last - apart >= lead) last -= apart;
  return last < end ? last : end - 1;
}

// f(i, piece i, whether there is one) for this thread's pieces before `end`, MOST of them looked for at once.
template <int MOST, class F>
DEVICE void receive(int warp, int lane, const uint32* from, int p, int end, F f) {
#pragma unroll 1
  for (int lead = first_piece(warp, 0, p), first = first_piece(warp, lane, p); lead < end; lead += MOST * THREADS, first += MOST * THREADS) {
    Words w[MOST] = {};
    const uint32* const own = keep(from + first * 4);
    // The last one first: most looks in vain are at one word a warp, and hold up less of what is being sent.
    const uint32* const one = keep(from + last_piece<MOST>(lead, p, end) * 4 + 3);
    for (int looks = 0; look(one) == VOID;) pause(looks);
    bool missing = first < end;
    for (int looks = 0; missing; missing ? pause(looks) : void()) {
#pragma unroll
      for (int k = 0; k < MOST; k++)
        if (first + k * THREADS < end) w[k] = look_piece(own + k * THREADS * 4);
      missing = false;
#pragma unroll
      for (int k = 0; k < MOST; k++) missing |= !here(w[k]);
    }
    __syncwarp();
#pragma unroll
    for (int k = 0; k < MOST; k++)
      if (lead + k * THREADS < end) f(first + k * THREADS, w[k], first + k * THREADS < end);
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
  DEVICE int thread() const { return warp * 32 + lane; }

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
  DEVICE void skip() {
    const bool round = ++at == DEPTH;
    at = round ? 0 : at, parity ^= round;
  }
};

// A warp that feeds: it brings its half of the stages' rows as far as there is room, but has few stages on their way at a
// time: memory is busy with those, and words would wait behind more. `entered` is told of each kind of each layer.
struct Feeder {
  const Block& b;
  int half;
  unsigned char* ring;
  At full, empty;
  Place next, landing;
  int coming;  // stages on their way

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

  DEVICE void stage(Half& h, int64 apart, int most) {
    wait(gate_at(empty, next.at), next.parity ^ 1);
    for (; coming >= most; coming--) wait(gate_at(full, landing.at), landing.parity), landing.skip();
    const At gate = gate_at(full, next.at);
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
    next.skip(), coming++;
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
          for (int piece = 0; piece < s.pieces; piece++) stage(h, s.row_bytes, last ? FLIGHT_HEAD : FLIGHT);
        }
      }
    }
  }
};

// The ring from a warp's side.
struct Ring {
  const Words* stages;
  At full, empty;
  Place place;
  int lane;

  DEVICE const Words* take() const {
    wait(gate_at(full, place.at), place.parity);
    return stages + place.at * STAGE;
  }
  DEVICE void give_back() {
    __syncwarp();
    if (lane == 0) arrive(gate_at(empty, place.at));
    place.skip();
  }
};

// ---- Products

// sum += COUNT chunks of rows g and g + 8 times x of them.
template <class W, int COUNT>
DEVICE void multiply(float (&sum)[COUNT][2][4], const Words (&upper)[COUNT], const Words (&lower)[COUNT], const Words (&x)[COUNT][W::Format::XV]) {
  using F = typename W::Format;
#pragma unroll
  for (int s = 0; s < F::COLUMNS / 4; s++)
#pragma unroll
    for (int c = 0; c < COUNT; c++) {
      uint32 w[4], v[2];
      F::weights(w[0], w[2], upper[c], s);
      F::weights(w[1], w[3], lower[c], s);
      F::vectors(v, x[c], s);
      mma_of<F, T>(sum[c][W::GROUP > 0 ? s % 2 : 0], w, v);
    }
}

// How a chunk of x lies in shared memory: a lane's XV words begin at its number modulo LANES and are as far apart; its units.
template <class F>
constexpr int LANES_OF = is_digits<F> ? Digits<T>::APART : 4;
template <class F>
constexpr int UNITS_OF = is_digits<F> ? Digits<T>::UNITS : 1;
template <class F>
constexpr int WORDS_OF = F::XV * LANES_OF<F>;  // of a chunk

template <class F>
DEVICE void load_x(Words (&x)[F::XV], const Words* chunk, int lane) {
#pragma unroll
  for (int j = 0; j < F::XV; j++) x[j] = chunk[j * LANES_OF<F> + lane % LANES_OF<F>];
}

// The sums of `slots` units, tiles or slices of a tile, the first of which is slice `part`, each warp's for itself.
struct AddUp {
  const Block& b;
  Ring& ring;
  float* sums;
  const Shape& s;
  int part, slots;
  const Words* xs;
  const Units* units;
  template <class W>
  DEVICE void operator()(W) const;
  template <class W>
  DEVICE void short_rows() const;
  template <class W>
  DEVICE void long_rows() const;
  template <class W>
  DEVICE void slices() const;
  DEVICE int place() const { return b.lane / 4 * ROW + b.lane % 4; }  // in a stage
  template <class F>
  DEVICE const Units& own_units(int chunk) const { return units[chunk * UNITS_OF<F> + b.lane % UNITS_OF<F>]; }
  // The places of a warp's sums: of the first unit, and from one to the next.
  DEVICE float* own_sums() const { return sums + b.warp * 16 + b.lane / 4; }
  static constexpr int NEXT = WARPS * 16;
  template <class W>
  DEVICE void put(float* to, float upper, float lower) const {
    if constexpr (is_digits<typename W::Format>) {
      upper += __shfl_xor_sync(0xffffffffu, upper, 1);
      lower += __shfl_xor_sync(0xffffffffu, lower, 1);
    }
    if (b.lane % 4 == 0) to[0] = upper, to[8] = lower;
  }
};

constexpr int CHUNKS = SPAN / WARPS;  // of a stage that a warp has

// What a lane adds up of a stage with grouped codes.
template <class W>
struct Coded {
  using F = typename W::Format;
  Words x[CHUNKS][F::XV];
  Units units[CHUNKS];
  int at[CHUNKS], scales[CHUNKS];  // places in the stage: of 16 bytes of row g, in words; of its scale, in scales

  // sum += rows g and g + 8 (the other sums are copies); `below`: from a scale of the one to that of the other.
  DEVICE void add(float (&sum)[2], const Words* stage, int below) const {
    Words upper[CHUNKS], lower[CHUNKS];
    fp16 scale[CHUNKS][2];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) upper[c] = stage[at[c]], lower[c] = stage[at[c] + 8 * ROW];
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) scale[c][i] = ((const fp16*)stage)[scales[c] + i * below];
    float found[CHUNKS][2];
    if constexpr (is_digits<F>) {
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        int sums[2];
        F::sums(sums, upper[c], lower[c], x[c]);
        found[c][0] = (float)sums[0], found[c][1] = (float)sums[1];
      }
    } else {
      float fresh[CHUNKS][2][4] = {};
      multiply<W>(fresh, upper, lower, x);
#pragma unroll
      for (int c = 0; c < CHUNKS; c++)
#pragma unroll
        for (int i = 0; i < 2; i++) found[c][i] = fresh[c][0][2 * i] + fresh[c][1][2 * i];
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++)
#pragma unroll
      for (int i = 0; i < 2; i++) sum[i] += to_float(scale[c][i]) * (found[c][i] * units[c].at[0] - units[c].at[1]);
  }
};

constexpr int SCALES = 16 * ROW * 8;  // where a stage has scales, in scales

// Tiles with grouped codes, each a stage: x stays in registers.
template <class W>
DEVICE void AddUp::short_rows() const {
  using F = typename W::Format;
  const int groups = s.groups, shift = s.shift;
  Coded<W> coded;
#pragma unroll
  for (int c = 0; c < CHUNKS; c++) {
    const int chunk = b.warp + c * WARPS;
    load_x<F>(coded.x[c], xs + chunk * WORDS_OF<F>, b.lane), coded.units[c] = own_units<F>(chunk);
    coded.at[c] = place() + chunk * 4, coded.scales[c] = SCALES + b.lane / 4 * groups + (chunk >> shift);
  }
  float* to = own_sums();
#pragma unroll 1
  for (int slot = 0; slot < slots; slot++, to += NEXT) {
    float sum[2] = {};
    coded.add(sum, ring.take(), 8 * groups);
    put<W>(to, sum[0], sum[1]);
    ring.give_back();
  }
}

// Tiles with grouped codes of other lengths: x comes chunk by chunk, as many at once as a stage has.
template <class W>
DEVICE void AddUp::long_rows() const {
  using F = typename W::Format;
  const int parts = s.parts, pieces = s.pieces, size = s.slice, chunks = s.chunks, groups = s.groups, shift = s.shift;
  const int scales = SCALES + b.lane / 4 * groups;
#pragma unroll 1
  for (int slot = 0, own = part; slot < slots; slot++, own = own + 1 < parts ? own + 1 : 0) {
    const int begin = own * size, last = (begin + size < chunks ? begin + size : chunks) - 1;
    int chunk = begin + b.warp;
    const Words* from_x = xs + chunk * WORDS_OF<F>;
    float sum[2] = {};
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++, chunk += SPAN, from_x += SPAN * WORDS_OF<F>) {
      if (chunk > last) {
        ring.take(), ring.give_back();
        continue;
      }
      // A chunk beyond the row counts nothing: the first one instead, in units of nothing.
      Coded<W> coded;
#pragma unroll
      for (int c = 0; c < CHUNKS; c++) {
        const bool there = chunk + c * WARPS <= last;
        const int apart = there ? c * WARPS : 0;
        load_x<F>(coded.x[c], from_x + apart * WORDS_OF<F>, b.lane), coded.units[c] = own_units<F>(chunk + apart);
        if (!there) coded.units[c] = {};
        coded.at[c] = place() + (b.warp + apart) * 4, coded.scales[c] = scales + ((chunk + apart) >> shift);
      }
      coded.add(sum, ring.take(), 8 * groups);
      ring.give_back();
    }
    put<W>(own_sums() + slot * NEXT, sum[0], sum[1]);
  }
}

// What has no groups.
template <class W>
DEVICE void AddUp::slices() const {
  using F = typename W::Format;
  const int parts = s.parts, pieces = s.pieces, size = s.slice, chunks = s.chunks;
#pragma unroll 1
  for (int slot = 0, own = part; slot < slots; slot++, own = own + 1 < parts ? own + 1 : 0) {
    const int begin = own * size, end = begin + size < chunks ? begin + size : chunks;
    int chunk = begin + b.warp;
    const Words* from_x = xs + chunk * WORDS_OF<F>;
    float sum[1][2][4] = {};
#pragma unroll 1
    for (int piece = 0; piece < pieces; piece++) {
      const Words* const stage = ring.take();
#pragma unroll
      for (int step = 0; step < CHUNKS; step++, chunk += WARPS, from_x += WARPS * WORDS_OF<F>)
        if (chunk < end) {
          const Words* const at = stage + place() + (b.warp + step * WARPS) * 4;
          Words x[1][F::XV];
          load_x<F>(x[0], from_x, b.lane);
          multiply<W, 1>(sum, {at[0]}, {at[8 * ROW]}, x);
        }
      ring.give_back();
    }
    put<W>(own_sums() + slot * NEXT, sum[0][0][0], sum[0][0][2]);
  }
}

template <class W>
DEVICE void AddUp::operator()(W) const {
  if constexpr (W::GROUP > 0) {
    if (s.chunks == SPAN && s.parts == 1) short_rows<W>();
    else long_rows<W>();
  } else {
    slices<W>();
  }
}

// ---- A product's x, in shared memory in the order of its weight's fragments (gemv.cuh)

struct Vector {
  Words* words;
  Units* units;
};

template <class W>
constexpr int PIECES = W::Format::COLUMNS == 32 ? 4 : W::Format::COLUMNS == 16 ? 3 : 2;  // 2^ of them to a chunk

// By all lanes of a warp, 16 of them beside each other for the pieces of a chunk.
template <class W>
DEVICE void put(const Vector& to, int piece, const Words& w, bool there) {
  using F = typename W::Format;
  constexpr int pieces = 1 << PIECES<W>;
  const int chunk = piece / pieces, i = piece % pieces;
  if constexpr (is_digits<F>) {
    F::put(to.words + chunk * WORDS_OF<F>, to.units + chunk * UNITS_OF<F>, i, w, there);
  } else {
    Words& place = to.words[(chunk * F::XV + i % F::XV) * 4 + i / F::XV];
    if constexpr (is_codes<F>) {
      Units units;
      const Words y = F::template arranged<T>(w, units);
      if (there) place = y;
      if (there && i == 0) to.units[chunk] = units;
    } else {
      if (there) place = F::arranged(w);
    }
  }
}

DEVICE int pieces_of(int kind) {
  return kind == HEAD ? PIECES<Head> : kind == OUT ? PIECES<Out> : kind == UP ? PIECES<Up> : kind == DOWN ? PIECES<Down> : PIECES<In>;
}

// What a product's x is received from, all of it.
struct ReceiveRow {
  const Block& b;
  const Vector& x;
  const uint32* from;
  int end;
  template <class W>
  DEVICE void operator()(W) const {
    receive<3>(b.warp, b.lane, from, PIECES<W>, end, [&](int i, const Words& w, bool there) { put<W>(x, i, w, there); });
  }
};

// x_proj's: of the slices of `units` units, the first of which has slice `part`.
DEVICE void receive_slices(const Block& b, const Vector& x, const Shape& s, const uint32* from, int units, int part) {
  constexpr int p = PIECES<MixIn>;
  const int warp = b.warp, lane = b.lane, slices = units < s.parts ? units : s.parts;
#pragma unroll 1
  for (int chunk = warp; chunk < s.slice; chunk += WARPS)
#pragma unroll 1
    for (int i = 0; i < slices; i += 32 >> p) {
      const int unit = i + (lane >> p), at = part + unit < s.parts ? part + unit : part + unit - s.parts;
      const int own = at * s.slice + chunk;
      const bool there = unit < slices && own < s.chunks;
      const int piece = (own << p) + (lane & ((1 << p) - 1));
      Words w[1] = {};
      if (there) look_for<1>(w, keep(from + piece * 4));
      __syncwarp();
      put<MixIn>(x, piece, w[0], there);
    }
}

struct PutNorm {
  const Vector& x;
  int piece;
  const Words& w;
  bool there;
  template <class W>
  DEVICE void operator()(W) const { put<W>(x, piece, w, there); }
};

// 1 / the root of the mean square from THREADS shares, 36 to 32 of them, by each warp for itself: in the order in which 8
// warps add up 32 each and then each other's sums (decode.cuh).
DEVICE float rstd_of_shares(const float* shares, int lane, int H, float eps) {
  float a[8];
#pragma unroll
  for (int i = 0; i < 8; i++) a[i] = shares[lane / 4 * 36 + lane % 4 + 4 * i];
#pragma unroll
  for (int other = 4; other > 0; other /= 2)
#pragma unroll
    for (int i = 0; i < other; i++) a[i] += a[i + other];
#pragma unroll
  for (int other = 2; other > 0; other /= 2) a[0] += __shfl_xor_sync(0xffffffffu, a[0], other);
  float sum = 0.0f;
#pragma unroll
  for (int w = 0; w < 8; w++) sum += __shfl_sync(0xffffffffu, a[0], 4 * w);
  return rsqrtf(sum / (float)H + eps);
}

// The residual stream as it is now comes to `stream`, its RMSNorm to xs. from: null where the stream is there already.
// shares: THREADS + 32 numbers that no warp still reads: those of the norm before.
DEVICE void norm_stream(const Block& b, const Vector& x, int kind, R* stream, float* shares, const uint32* from, const T* weight,
                        int H, float eps) {
  constexpr int PER = sizeof(R) / 2;  // 16-byte words of a piece
  const int pieces = H / PIECE, p = pieces_of(kind);
  const int first = first_piece(b.warp, b.lane, p), lead = first_piece(b.warp, 0, p);
  Words w{}, v[PER] = {};  // of this thread's last piece
  float sum = 0.0f;
  if (first < pieces) w = *(const Words*)(weight + first * PIECE);
#pragma unroll 1
  for (int piece = first; piece < pieces; piece += THREADS) {
    Words* const own = (Words*)(stream + piece * PIECE);
    if (from) {
      look_for<PER>(v, from + piece * PIECE * PER / 2);
#pragma unroll
      for (int i = 0; i < PER; i++) own[i] = v[i];
    } else {
#pragma unroll
      for (int i = 0; i < PER; i++) v[i] = own[i];
    }
#pragma unroll
    for (int i = 0; i < PER; i++) {
      float part[PIECE / PER];
      unpack<R>(part, v[i]);
#pragma unroll
      for (int j = 0; j < PIECE / PER; j++) sum += part[j] * part[j];
    }
  }
  shares[first + first / 32 * 4] = sum;
  block_barrier();
  const float rstd = rstd_of_shares(shares, b.lane, H, eps);
#pragma unroll 1
  for (int at = lead, piece = first; at < pieces; at += THREADS, piece += THREADS) {
    if (pieces > THREADS) {  // else v and w are this piece's
      const bool there = piece < pieces;
      w = there ? *(const Words*)(weight + piece * PIECE) : Words{};
#pragma unroll
      for (int i = 0; i < PER; i++) v[i] = there ? ((const Words*)(stream + piece * PIECE))[i] : Words{};
    }
    float value[PIECE], scale[PIECE];
#pragma unroll
    for (int i = 0; i < PER; i++) {
      float part[PIECE / PER];
      unpack<R>(part, v[i]);
#pragma unroll
      for (int j = 0; j < PIECE / PER; j++) value[i * (PIECE / PER) + j] = part[j];
    }
    unpack<T>(scale, w);
    Words y;
#pragma unroll
    for (int i = 0; i < PIECE; i += 2) {
      const Vec<T, 2> two = pair_from_floats<T>(value[i] * rstd * scale[i], value[i + 1] * rstd * scale[i + 1]);
      y.at[i / 2] = *reinterpret_cast<const uint32*>(&two);
    }
    const PutNorm one{x, piece, y, piece < pieces};
    if (!same<Head, In> && kind == HEAD) one(Head{});
    else with_large(kind, one);
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
static_assert(N % 4 == 0 && 32 % SHARE == 0, "a channel stays in a warp");

// Which of dt, B and C column i of x_proj belongs to: 0, 1, 2. Where they begin.
DEVICE constexpr int part_of(int i) { return i < RANK ? 0 : i < RANK + N ? 1 : 2; }
DEVICE constexpr int part_at(int part) { return part == 0 ? 0 : RANK + (part - 1) * N; }

// What threads i, i + THREADS, ... have of x_proj's columns: the weights of their norms.
constexpr int OWN_COLUMNS = (MIX + THREADS - 1) / THREADS;
struct Columns {
  T scale[OWN_COLUMNS];
  DEVICE void load(const Block& b, int layer) {
    if constexpr (NORMS) {
#pragma unroll
      for (int k = 0; k < OWN_COLUMNS; k++)
        if (const int i = b.thread() + k * THREADS; i < MIX) scale[k] = b.numbers<T>(layer, NORM_DT + part_of(i))[i - part_at(part_of(i))];
    }
  }
};

// The sums of x_proj's slices, rounded; u and z are looked for along with them.
DEVICE void mix(const Block& b, float* mixed, uint32 (&own)[2], const uint32* const (&places)[2], bool wanted, const uint32* from) {
#pragma unroll
  for (int first = 0; first < MIX; first += THREADS) {
    const int i = first + b.thread();
    const uint32* const column = keep(from + i);
    const bool sums = i < MIX, both = wanted && first == 0;
    uint32 w[SLICES] = {}, most = VOID;
    for (int looks = 0; most == VOID; most == VOID ? pause(looks) : void()) {
      if (sums) {
#pragma unroll
        for (int k = 0; k < SLICES; k++) w[k] = look(column + k * MIX);
      }
      if (both) own[0] = look(places[0]), own[1] = look(places[1]);
      uint32 m[4] = {};
#pragma unroll
      for (int k = 0; k < SLICES; k++) m[k % 4] = largest(m[k % 4], w[k]);
      most = largest(largest(m[0], m[1]), largest(m[2], m[3]));
      if (both) most = largest(most, largest(own[0], own[1]));
    }
    float sum = 0.0f;
#pragma unroll
    for (int k = 0; k < SLICES; k++) sum += bits_float(w[k]);
    if (sums) mixed[i] = rounded<T>(sum);
  }
}

// 1 / the root of the mean square of numbers in shared memory, in all lanes.
DEVICE float rstd_of_part(const float* row, int size, int lane, float eps) {
  float sum = 0.0f;
#pragma unroll
  for (int k = lane; k < size; k += 32) sum += row[k] * row[k];
  return rsqrtf(warp_sum(sum) / (float)size + eps);
}

// dt, B and C after their norms: each column by one thread.
DEVICE void norm_columns(float* to, const float* mixed, const Columns& columns, const Block& b, float eps) {
#pragma unroll
  for (int k = 0; k < OWN_COLUMNS; k++) {
    const int i = b.thread() + k * THREADS, first = i - b.lane, last = first + 31 < MIX ? first + 31 : MIX - 1;
    float rstd = 0.0f;
#pragma unroll
    for (int part = 0; part < 3; part++) {
      if (first >= MIX || part < part_of(first) || part > part_of(last)) continue;  // of all lanes
      const float found = rstd_of_part(mixed + part_at(part), part == 0 ? RANK : N, b.lane, eps);
      if (part_of(i) == part) rstd = found;
    }
    if (i < MIX) to[i] = rounded<T>(mixed[i] * rstd * to_float(columns.scale[k]));
  }
}

// What this thread needs of its channel c for the scan's step, beside words of others; w: dt's weights.
struct Channel {
  int c;
  bool states;  // whether it has some
  Vec<T, VEC> w[PER];
  Columns columns;
  float bias, skip;
  Vec<float, 4> a, h;

  DEVICE void load(const Block& b, int layer, int first, const float* state, int I) {
    const int lane = b.thread() % SHARE, own = first + b.thread() / SHARE;
    c = own < I ? own : I - 1, states = lane < LANES && own < I;
    const T* const row = b.numbers<T>(layer, DT_WEIGHT) + (int64)c * RANK;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int k = (i * 8 + lane % 8) * VEC;
      w[i] = k < RANK ? load_vec<T, VEC>(row + k) : Vec<T, VEC>{};
    }
    columns.load(b, layer);
    bias = b.numbers<float>(layer, DT_BIAS)[c];
    if (!states) return;
    a = load_vec<float, 4>(b.numbers<float>(layer, A_LOG2) + (int64)c * N + lane * 4);
    h = load_vec<float, 4>(state + (int64)c * N + lane * 4);
    skip = b.numbers<float>(layer, SKIP)[c];
  }
};

DEVICE void scan(const Block& b, int layer, const Exchange& at, float (&mixed)[2][MIX], const float* state,
                 float* next_state, int I, float eps) {
  const int lane = b.thread() % SHARE;
  const float* const columns = mixed[NORMS];
#pragma unroll 1
  for (int first = b.block * CHANNELS, round = 0; first < I; first += b.blocks * CHANNELS, round++) {
    Channel ch{};
    ch.load(b, layer, first, state, I);
    const int c = ch.c;
    uint32* const to = at.y() + c / 2;
    float* const to_state = next_state + (int64)c * N + lane * 4;
    uint32 inputs[2] = {};
    const uint32* const places[2] = {at.u() + c / 2, at.z() + c / 2};
    if (round == 0) {
      mix(b, mixed[0], inputs, places, ch.states, at.sums());
      block_barrier();
      if constexpr (NORMS) {
        norm_columns(mixed[1], mixed[0], ch.columns, b, eps);
        block_barrier();
      }
    } else if (ch.states) {
#pragma unroll
      for (int k = 0; k < 2; k++)
        for (int looks = 0; (inputs[k] = look(places[k])) == VOID;) pause(looks);
    }
    const float x = to_float(half_of(inputs[0], c % 2)), gate = to_float(half_of(inputs[1], c % 2)), gated = gate * sigmoid(gate);
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++)
#pragma unroll
      for (int j = 0; j < VEC; j++) {
        const int k = (i * 8 + lane % 8) * VEC + j;
        sum += k < RANK ? to_float(ch.w[i].at[j]) * columns[k] : 0.0f;
      }
#pragma unroll
    for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    const float step = softplus(rounded<T>(sum) + ch.bias);
    sum = 0.0f;
    if (lane < LANES) {
#pragma unroll
      for (int j = 0; j < 4; j++) {
        ch.h.at[j] = exp2_approx(step * ch.a.at[j]) * ch.h.at[j] + step * x * columns[RANK + lane * 4 + j];
        sum += ch.h.at[j] * columns[RANK + N + lane * 4 + j];
      }
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    const uint32 bits = bits_of(from_float<T>((sum + ch.skip * x) * gated));
    const uint32 next = __shfl_xor_sync(0xffffffffu, bits, SHARE);
    if (ch.states && lane == 0 && c % 2 == 0) send(to, bits | next << 16);
    if (ch.states) store_vec<float, 4>(to_state, ch.h);
  }
}

// ---- What becomes of a product's results: a warp finishes 32 of them, rows beside each other of the block's tiles, so that
// few and long writes reach the lines that others look at. A lane has one, where there are two weights one of each.

// Asked for while the product is made, and kept as it comes: who converts a number waits for it.
struct Prepared {
  void* to;              // where this lane sends to, none: nullptr
  uint32 scale, second;  // bits of a row's scale
  float before;          // the residual stream
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
  int64 rows_before;  // of the windows: other layers'

  // Of row r of a product with `rows`, of x_proj slice `part`. Pairs of lanes have rows 2n and 2n + 1.
  DEVICE void prepare(Prepared& p, int r, int part, int rows) const {
    const bool there = r < rows;
    if (there) with_weight(kind, RowScale{b, p, layer, kind, r});
    if (kind == MIX_IN || kind == HEAD) {
      if (there) p.to = kind == HEAD ? (void*)(logits + r) : (void*)(at.sums() + part * MIX + r);
      return;
    }
    const bool alone = sizeof(R) == 4 && (kind == OUT || kind == DOWN);
    uint32* const all = kind == IN ? at.u() : kind == UP ? at.product() : kind == OUT ? at.middle() : at.end();
    uint32* const to = all + (alone ? r : kind == IN && r >= I ? at.n + (r - I) / 2 : r / 2);
    if (there && (alone || r % 2 == 0)) p.to = to;
    if (there && (kind == OUT || kind == DOWN)) p.before = to_float(stream[r]);
    if (kind != IN || !there || r >= I) return;
    const T *w = b.numbers<T>(layer, CONV_WEIGHT), *add = b.numbers<T>(layer, CONV_BIAS), *times = b.numbers<T>(layer, CONV_SCALE);
#pragma unroll
    for (int k = 0; k < KC; k++) p.weight[k] = w[r * KC + k];
#pragma unroll
    for (int k = 0; k < KC - 1; k++) p.past[k] = window[(rows_before + r) * (KC - 1) + k];
    if (add) p.bias = add[r];
    if (times) p.factor = times[r];
  }

  // u goes through a step of the convolution, whose window of the last KC - 1 inputs moves on.
  DEVICE T convolved(const Prepared& p, float value) const {
    float sum = to_float(p.bias);
#pragma unroll
    for (int k = 0; k < KC - 1; k++) sum += to_float(p.weight[k]) * to_float(p.past[k]);
    sum += to_float(p.weight[KC - 1]) * value;
    const float y = sum * sigmoid(sum);
    return from_float<T>(b.numbers<T>(layer, CONV_SCALE) ? rounded<T>(y) * to_float(p.factor) : y);
  }
  DEVICE void move_on(const Prepared& p, int r, float value) const {
#pragma unroll
    for (int k = 1; k < KC - 1; k++) next_window[(rows_before + r) * (KC - 1) + k - 1] = p.past[k];
    next_window[(rows_before + r) * (KC - 1) + KC - 2] = from_float<T>(value);
  }

  // value of row r, negative: none; second: of the other weight.
  DEVICE void put(const Prepared& p, int r, float value, float second) const {
    with_weight(kind, Scaled{value, second, p});
    if (kind == MIX_IN) {  // the slices' sums as they are
      if (p.to) send((uint32*)p.to, float_bits(value));
      return;
    }
    if (kind == HEAD) {
      if (p.to) *(T*)p.to = from_float<T>(value);
      return;
    }
    value = rounded<T>(value);
    uint32 bits;
    if (kind == IN) {
      bits = bits_of(r < I ? convolved(p, value) : from_float<T>(value));
    } else if (kind == UP) {  // silu(gate) up
      bits = bits_of(from_float<T>(value * sigmoid(value) * rounded<T>(second)));
    } else {  // added to the residual stream
      const R sum = from_float<R>(p.before + value);
      if constexpr (sizeof(R) == 4) {
        if (p.to) send((uint32*)p.to, float_bits(to_float(sum)));
        return;
      }
      bits = *reinterpret_cast<const uint16*>(&sum);
    }
    const uint32 other = __shfl_xor_sync(0xffffffffu, bits, 1);
    if (p.to) send((uint32*)p.to, bits | other << 16);
    if (kind == IN && r >= 0 && r < I) move_on(p, r, value);
  }
};

// The sum of the warps' shares of a row; of two rows, the second of the tile's lower half.
DEVICE float added(const float* from) {
  float sum = 0.0f;
#pragma unroll
  for (int other = 0; other < WARPS; other++) sum += from[other * 16];
  return sum;
}
DEVICE void add_both(float& sum, float& second, const float* from) {
  float share[2][WARPS];
#pragma unroll
  for (int other = 0; other < WARPS; other++) share[0][other] = from[other * 16], share[1][other] = from[other * 16 + 8];
  sum = second = 0.0f;
#pragma unroll
  for (int other = 0; other < WARPS; other++) sum += share[0][other], second += share[1][other];
}

// ---- What a warp does beside: numbers that a layer reads beside its large weights come into the L2 cache before they are
// waited for, and the other set of words becomes void.

constexpr int SECTOR = 32;  // bytes that come together

DEVICE void fetch(const void* from, int bytes, int lane) {
#pragma unroll 1
  for (int at = lane * SECTOR; at < bytes; at += 32 * SECTOR) prefetch_line((const char*)from + at);
}

struct Beside {
  const Block& b;
  const T* window;
  const float* state;
  Exchange own;   // this step's words, of the first layer
  uint32* other;  // the other set
  int layer_words, H, I;
  int64 apart;    // channels from layer to layer of a state

  // Words that a product's results come to, by all blocks together.
  DEVICE void fetch_words(const uint32* from, int count) const {
#pragma unroll 1
    for (int i = (b.block * 32 + b.lane) * (SECTOR / 4); i < count; i += b.blocks * 8 * SECTOR) prefetch_line(from + i);
  }

  DEVICE void operator()(int layer, int kind, const Run& run) const {
    Exchange at = own;
    at.base += (int64)layer * layer_words;
    if (kind == IN) fetch_words(at.u(), 2 * at.n);
    else if (kind == MIX_IN) fetch_words(at.sums(), at.n_sums + at.n);
    else if (kind == OUT) fetch_words(at.middle(), at.n_stream);
    else if (FFN && kind == UP) fetch_words(at.product(), at.n_product);
    else if (FFN && kind == DOWN) fetch_words(at.end(), at.n_stream);
    const int first = b.block * CHANNELS, count = I - first < CHANNELS ? I - first : CHANNELS;
    if (layer == b.layers) return;
    if (kind == IN) {
      Words* const words = (Words*)(other + (int64)layer * layer_words);
#pragma unroll 1
      for (int i = b.block * 32 + b.lane; i < layer_words / 4; i += b.blocks * 32) words[i] = {{VOID, VOID, VOID, VOID}};
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
    } else if (FFN && kind == OUT) {
      fetch(b.numbers<T>(layer, NORM_FFN), H * (int)sizeof(T), b.lane);
    } else if (kind == MIX_IN && count > 0) {
      fetch(b.numbers<T>(layer, DT_WEIGHT) + (int64)first * RANK, count * RANK * (int)sizeof(T), b.lane);
      fetch(b.numbers<float>(layer, A_LOG2) + (int64)first * N, count * N * 4, b.lane);
      fetch(state + (layer * apart + first) * N, count * N * 4, b.lane);
      for (int part = 0; part < (NORMS ? 3 : 0); part++) fetch(b.numbers<T>(layer, NORM_DT + part), (part ? N : RANK) * (int)sizeof(T), b.lane);
      for (int place = DT_BIAS; place <= SKIP; place += SKIP - DT_BIAS) fetch(b.numbers<float>(layer, place) + first, count * 4, b.lane);
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

// What the warps of a block add up: shares of tiles, in turns; shares of a norm, of two kinds in turns; x_proj's columns,
// before and after their norms.
struct Sums {
  float tiles[2][SLOTS * WARPS * 16], norm[2][THREADS + 32];
  alignas(16) float mixed[2][MIX];
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
  extern __shared__ __align__(128) Words shared[];
  __shared__ Sums sums_of_block;
  Sums& sums = *kept_shared(&sums_of_block);
  __shared__ Shape all_shapes[KINDS];
  Shape* const shapes = kept_shared(all_shapes);
  __shared__ Gate gates[2 * DEPTH];
  __shared__ int entered;
  const Vector x{shared + DEPTH * STAGE, (Units*)(shared + DEPTH * STAGE + room / 16)};
  R* const stream = (R*)(x.units + room / 256);  // a chunk of 256 bytes has units
  int64* const records = (int64*)(stream + (H + 7) / 8 * 8);
  const int warp = keep((int)threadIdx.x / 32), lane = keep((int)threadIdx.x % 32);

  if (threadIdx.x == 0) entered = 0;
  const At full = gates_at(gates), empty = gate_at(full, DEPTH);
  if (threadIdx.x < 2 * DEPTH) begin(gate_at(full, threadIdx.x), threadIdx.x < DEPTH ? FEEDERS * ARRIVALS : WARPS), begun();
  const int turns = (int)(*(const volatile int64*)clock & 1);
  for (int i = threadIdx.x; i < (layers + 1) * RECORD; i += ALL_THREADS) records[i] = table[i];
  if (threadIdx.x < KINDS) {
    const int64* n = table + (layers + 1) * RECORD + threadIdx.x * SHAPE;
    shapes[threadIdx.x] = {n[0], (int)n[1], (int)n[2], (int)n[3], (int)n[4], (int)n[5], (int)n[6], (int)n[7], (int)n[8], (int)n[9]};
  }
  __syncthreads();

  const Block b{records, shapes, (int)layers, (int)gridDim.x, (int)blockIdx.x, warp, lane};
  const auto whole = [](int64 count) { return (int)(count + 3) / 4 * 4; };
  Exchange at{exchange, keep(whole(I / 2)), keep(whole(SLICES * MIX)), keep(whole(sizeof(R) == 4 ? H : H / 2)), FFN ? keep(whole(F / 2)) : 0};
  const int layer_words = at.words();
  const int64 set = layers * layer_words;
  if (warp >= WARPS) {
    const int helper = warp - WARPS;
    at.base += turns * set;
    if (helper == FEEDERS) return Beside{b, window, state, at, exchange + (1 - turns) * set, layer_words, (int)H, (int)I, capacity * I}.follow(&entered);
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
      const Finish finish{b, at, layer, kind, (int)H, (int)I, (int)F, (int)V, window, next_window, logits, stream, rows};
      int part = kind == MIX_IN ? run.first % SLICES : 0;  // of the first unit
      int tiles, r;
      bool finishes;
      Prepared prepared;
      const float* shares;  // of the warps, of this lane's row
      const auto begin_round = [&](int done) {
        const int left = run.count - done, unit = run.first + done;
        tiles = left < SLOTS ? left : SLOTS, finishes = warp * 32 < tiles << size, r = -1, prepared = {};
        shares = kept_shared(sums.tiles[turn] + (mine < tiles ? mine : 0) * WARPS * 16 + row);
        if (!finishes || mine >= tiles) return;
        const int tile = kind == MIX_IN ? (unit + mine) / SLICES : unit + mine;
        r = (tile << size) + row;
        finish.prepare(prepared, r, kind == MIX_IN ? unit + mine - tile * SLICES : 0, s.rows);
      };
      begin_round(0);
      if (kind == IN || kind == UP || kind == HEAD) {
        const uint32* const from = kind == UP ? at.middle() : layer ? at.end() - layer_words : nullptr;
        float* const shares_of_norm = sums.norm[FFN ? kind == UP : layer & 1];
        norm_stream(b, x, kind, stream, shares_of_norm, from, b.numbers<T>(layer, kind == UP ? NORM_FFN : NORM), (int)H, eps);
      } else if (kind == MIX_IN) {
        receive_slices(b, x, s, at.u(), run.count, part);
      } else {
        if (kind == OUT) scan(b, layer, at, sums.mixed, state + rows * N, next_state + rows * N, (int)I, mix_eps);
        if (run.count) with_large(kind, ReceiveRow{b, x, kind == OUT ? at.y() : at.product(), (int)(kind == OUT ? I : F) / PIECE});
      }
      if (kind == MIX_IN || owned(pieces_of(kind))) __syncwarp();
      else block_barrier();

#pragma unroll 1
      for (int done = 0; done < run.count;) {
        with_weight(kind, AddUp{b, ring, sums.tiles[turn], s, part, tiles, x.words, x.units});
        block_barrier();
        if (finishes) {
          float value, second = 0.0f;
          if (kind == UP) add_both(value, second, shares);
          else value = added(shares);
          finish.put(prepared, r, value, second);
        }
        done += SLOTS, turn ^= 1;
        if (done >= run.count) continue;
        if (kind == MIX_IN) part = (part + tiles) % SLICES;
        begin_round(done);
      }
    }
    at.base += layer_words;
  }

  block_barrier();
  if (threadIdx.x == 0 && count_one((int*)(clock + 1)) == (int)gridDim.x - 1) clock[0] += 1, clock[1] = 0;
}
