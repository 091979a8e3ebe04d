// moai: kernels decode_embed, decode_norm, decode_conv, decode_conv_x, decode_gate, decode_mix, decode_mix_wide, decode_scan, decode_scan_wide, decode_rotate
// moai: macros T=bf16 R=bf16 FORMAT=Plain S=float N=16 RANK=128 NORMS=1 MIXED=0 KC=4
// moai: macros T=bf16 R=float FORMAT=Int8 S=fp16 N=16 RANK=256 NORMS=1 MIXED=1 KC=4; spills 160
// moai: macros T=float R=float FORMAT=Plain S=float N=8 RANK=7 NORMS=0 MIXED=0 KC=3
// moai: macros T=fp16 R=fp16 FORMAT=Int4 S=fp16 N=64 RANK=20 NORMS=1 MIXED=0 KC=2
//
// What stands between the matrix products of a step of generation for one token a row:
//
//   decode_embed  the embedding's row of each token begins the residual stream
//   decode_norm   (wide batches) residual += sums of the product before, then its RMSNorm
//   decode_conv   (wide batches) the convolution's step behind in_proj, decode_gate silu(gate) up, from the sums of
//                 decode_wide.cu
//   decode_mix    (wide batches) the sums of x_proj to dt's vector, B and C, with their norms
//   decode_scan_wide  the same for many rows, where RANK is a multiple of 32, T has 16 bits and N is 64 at most
//   decode_scan   dt_proj, softplus, the selective scan's step, the gate; for few rows also what decode_mix does
//   decode_rotate the online Hadamard rotation of a product's inputs (moai_core/quant/hadamard.py)
//
// Source of the scan: arXiv 2312.00752, algorithm 2. Results are rounded where the model rounds, between operations.
//
//   T  type of activations and weights      R  type of the residual stream      FORMAT, S  of the embedding
//   N  states of a channel                  RANK  of dt                         NORMS  on dt, B and C
//   MIXED  1: decode_mix has been there     KC  width of the convolution
#include "decode.cuh"

constexpr int THREADS = 256, WARPS = 8;
constexpr int PIECE = 16 / sizeof(T);
constexpr int MIX = RANK + 2 * N;

// Grid: a block a row. group: columns that share a scale.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_embed(const int64* tokens, const unsigned char* weight, const S* scales, const fp16* zeros, R* residual,
             int64 row_bytes, int64 H, int64 group, int64 groups) {
  let_next_begin();
  const int64 token = tokens[blockIdx.x] < 0 ? 0 : tokens[blockIdx.x];  // -1: a row whose logits weren't finite
  const unsigned char* row = weight + token * row_bytes;
  for (int64 c = threadIdx.x; c < H; c += THREADS)
    residual[blockIdx.x * H + c] = from_float<R>(embedded<FORMAT<T>, T>(row, scales, zeros, token * groups, c, group));
}

// The numbers that a product in slices stands for, as the model stores them; `stride` from slice to slice. Four slices are
// asked for at once.
DEVICE void whole_sums(float (&to)[PIECE], const float* sums, int64 stride, int64 slices) {
#pragma unroll
  for (int i = 0; i < PIECE; i++) to[i] = 0.0f;
#pragma unroll 1
  for (int64 slice = 0; slice < slices; slice += 4) {
    float part[4][PIECE];
#pragma unroll
    for (int k = 0; k < 4; k++) load_piece<float, PIECE>(part[k], sums + (slice + k < slices ? slice + k : slices - 1) * stride);
#pragma unroll
    for (int k = 0; k < 4; k++)
#pragma unroll
      for (int i = 0; i < PIECE; i++) to[i] += slice + k < slices ? part[k][i] : 0.0f;
  }
#pragma unroll
  for (int i = 0; i < PIECE; i++) to[i] = rounded<T>(to[i]);
}

// Grid: a block a row. partial (slices, batch, H) fp32, or null. y: rows, or with `tiles` arranged for a weight of `vectors`
// times fewer bits than 16. H is a multiple of PIECE.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_norm(R* residual, const float* partial, const T* weight, T* y, int64 H, int64 slices, int64 tiles, int64 vectors, float eps) {
  __shared__ float scratch[WARPS];
  let_next_begin();
  const int64 own = (int64)threadIdx.x * PIECE;
  Vec<T, PIECE> times{};
  if (own < H) times = load_vec<T, PIECE>(weight + own);
  wait_for_previous();
  R* row = residual + blockIdx.x * H;
  float sum = 0.0f, first[PIECE] = {};
  for (int64 at = own; at < H; at += THREADS * PIECE) {
    float v[PIECE];
    load_piece<R, PIECE>(v, row + at);
    if (partial) {
      float total[PIECE];
      whole_sums(total, partial + blockIdx.x * H + at, gridDim.x * H, slices);
      constexpr int SOME = 16 / sizeof(R) < PIECE ? 16 / sizeof(R) : PIECE;
#pragma unroll
      for (int i = 0; i < PIECE; i += SOME) {
        Vec<R, SOME> stored;
#pragma unroll
        for (int k = 0; k < SOME; k++) stored.at[k] = from_float<R>(v[i + k] + total[i + k]), v[i + k] = to_float(stored.at[k]);
        store_vec<R, SOME>(row + at + i, stored);
      }
    }
#pragma unroll
    for (int i = 0; i < PIECE; i++) {
      sum += v[i] * v[i];
      if (at == own) first[i] = v[i];
    }
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  const float rstd = rstd_of(scratch, H, eps);
  for (int64 at = own; at < H; at += THREADS * PIECE) {
    if (at > own) {  // what this thread wrote itself
      load_piece<R, PIECE>(first, row + at);
      times = load_vec<T, PIECE>(weight + at);
    }
    Vec<T, PIECE> found;
#pragma unroll
    for (int i = 0; i < PIECE; i++) found.at[i] = from_float<T>(first[i] * rstd * to_float(times.at[i]));
    if constexpr (sizeof(T) == 2) {
      if (tiles > 0) {
        store_arranged((char*)y, *(const Words*)&found, blockIdx.x, (int)(at / 8), (int)tiles, (int)vectors);
        continue;
      }
    }
    store_vec<T, PIECE>(y + blockIdx.x * H + at, found);
  }
}

// Grid: x 256 PIECE numbers each, y a row each. sums (slices, rows, 2 I): u and z.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_conv(const float* sums, const T* weight, const T* bias, const T* scale, const T* window, T* next_window, T* u, T* z,
            int64 slices, int64 I) {
  let_next_begin();
  const int64 c = ((int64)blockIdx.x * THREADS + threadIdx.x) * PIECE, row = blockIdx.y, at = (row * I + c) * (KC - 1);
  const bool convolved = c < I;
  Taps<T, PIECE, KC> taps;
  Window<T, PIECE, KC> before;
  if (convolved) taps.load(weight, bias, scale, c), before.load(window + at);
  wait_for_previous();
  if (c >= 2 * I) return;
  float x[PIECE];
  whole_sums(x, sums + row * 2 * I + c, gridDim.y * 2 * I, slices);
  if (convolved) {
    store_vec<T, PIECE>(u + row * I + c, before.step(taps, x, next_window + at));
    return;
  }
  Vec<T, PIECE> y;
#pragma unroll
  for (int i = 0; i < PIECE; i++) y.at[i] = from_float<T>(x[i]);
  store_vec<T, PIECE>(z + row * I + c - I, y);
}

#if RANK % 32 == 0
// decode_conv and x_proj (MIX, I) in one: a block has 32 channels of all rows, a thread 8 of a row, and multiplies what
// comes out with its 32 columns of x_proj. I is a multiple of 32, there are 64 rows at most. found (I / 32, rows, MIX).
// Grid: 32 channels of u each, then 32 of z.
constexpr int MIX_TILES = (MIX + 15) / 16;

extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_conv_x(const float* sums, const T* weight, const T* bias, const T* scale, const T* x_weight, const T* window,
              T* next_window, T* u, T* z, float* found, int64 slices, int64 batch, int64 I) {
  if constexpr (sizeof(T) == 2) {
    __shared__ Vec<T, PIECE> xs[THREADS];  // as fragments: 8 rows, lane
    let_next_begin();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    const int64 row = threadIdx.x / 4, c = (int64)blockIdx.x * 32 + t * 8, at = (row * I + c) * (KC - 1);
    const bool mine = row < batch;
    if (c >= I) {
      wait_for_previous();
      if (!mine) return;
      float gate[PIECE];
      whole_sums(gate, sums + row * 2 * I + c, batch * 2 * I, slices);
      Vec<T, PIECE> stored;
#pragma unroll
      for (int i = 0; i < PIECE; i++) stored.at[i] = from_float<T>(gate[i]);
      store_vec<T, PIECE>(z + row * I + c - I, stored);
      return;
    }
    Taps<T, PIECE, KC> taps;
    Window<T, PIECE, KC> before;
    if (mine) taps.load(weight, bias, scale, c), before.load(window + at);
    constexpr int OWN = (MIX_TILES + WARPS - 1) / WARPS;
    Words w[OWN][2];
#pragma unroll
    for (int k = 0; k < OWN; k++)
#pragma unroll
      for (int half = 0; half < 2; half++) {
        const int r = (warp + k * WARPS) * 16 + half * 8 + g;
        w[k][half] = r < MIX ? *(const Words*)(x_weight + r * I + c) : Words{};
      }
    wait_for_previous();
    Vec<T, PIECE> y{};
    if (mine) {
      float x[PIECE];
      whole_sums(x, sums + row * 2 * I + c, batch * 2 * I, slices);
      y = before.step(taps, x, next_window + at);
      store_vec<T, PIECE>(u + row * I + c, y);
    }
    xs[threadIdx.x] = y;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < OWN; k++) {
      const int r = (warp + k * WARPS) * 16 + g;
      if (warp + k * WARPS >= MIX_TILES) break;
#pragma unroll
      for (int n = 0; n < 8; n++) {
        const Words v = *(const Words*)&xs[n * 32 + lane];
        float d[4] = {};
#pragma unroll
        for (int s = 0; s < 2; s++) {
          const uint32 a4[4] = {w[k][0].at[2 * s], w[k][1].at[2 * s], w[k][0].at[2 * s + 1], w[k][1].at[2 * s + 1]}, b2[2] = {v.at[2 * s], v.at[2 * s + 1]};
          mma_16<T>(d, a4, b2);
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int m = n * 8 + 2 * t + i % 2, to = r + i / 2 * 8;
          if (m < batch && to < MIX) found[((int64)blockIdx.x * batch + m) * MIX + to] = d[i];
        }
      }
    }
  }
}
#endif

// y = silu(gate) up. Grid: x 256 PIECE numbers each, y a row each. sums (slices, rows, 2 F): gate and up.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
decode_gate(const float* sums, T* y, int64 slices, int64 F) {
  let_next_begin();
  wait_for_previous();
  const int64 c = ((int64)blockIdx.x * THREADS + threadIdx.x) * PIECE, row = blockIdx.y;
  if (c >= F) return;
  float g[PIECE], x[PIECE];
  whole_sums(g, sums + row * 2 * F + c, gridDim.y * 2 * F, slices);
  whole_sums(x, sums + row * 2 * F + F + c, gridDim.y * 2 * F, slices);
  Vec<T, PIECE> found;
#pragma unroll
  for (int i = 0; i < PIECE; i++) found.at[i] = from_float<T>(g[i] * sigmoid(g[i]) * x[i]);
  store_vec<T, PIECE>(y + row * F + c, found);
}

// ---- dt's vector, B and C of `count` rows from the sums of x_proj, into mixed[row][MIX].

struct Norms {
  const T *dt, *B, *C;
  float eps;
};

DEVICE void mix(float* mixed, float* rstd, const float* partial, const Norms& norms, int64 slices, int64 batch,
                int64 first, int count) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int i = threadIdx.x; i < count * MIX; i += THREADS) {
    const int64 at = (first + i / MIX) * MIX + i % MIX;
    float sum = 0.0f;
#pragma unroll 4
    for (int64 slice = 0; slice < slices; slice++) sum += load_fresh_float(partial + slice * batch * MIX + at);
    mixed[i] = rounded<T>(sum);
  }
  __syncthreads();
  if constexpr (NORMS) {
    for (int part = warp; part < count * 3; part += WARPS) {
      const int which = part % 3, size = which ? N : RANK;
      const float* row = mixed + part / 3 * MIX + (which ? RANK + (which - 1) * N : 0);
      float sum = 0.0f;
      for (int k = lane; k < size; k += 32) sum += row[k] * row[k];
      sum = warp_sum(sum);
      if (lane == 0) rstd[part] = rsqrtf(sum / (float)size + norms.eps);
    }
    __syncthreads();
    for (int i = threadIdx.x; i < count * MIX; i += THREADS) {
      const int k = i % MIX, which = k < RANK ? 0 : k < RANK + N ? 1 : 2;
      const T* weight = which == 0 ? norms.dt + k : which == 1 ? norms.B + (k - RANK) : norms.C + (k - RANK - N);
      mixed[i] = rounded<T>(mixed[i] * rstd[i / MIX * 3 + which] * to_float(*weight));
    }
    __syncthreads();
  }
}

// Grid: a block a row.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_mix(const float* partial, const T* norm_dt, const T* norm_B, const T* norm_C, float* mixed, T* dt, int64 slices,
           int64 batch, float eps) {
  __shared__ float row[MIX], rstd[3];
  let_next_begin();
  wait_for_previous();
  mix(row, rstd, partial, Norms{norm_dt, norm_B, norm_C, eps}, slices, batch, blockIdx.x, 1);
  for (int k = threadIdx.x; k < MIX; k += THREADS) {
    mixed[blockIdx.x * MIX + k] = row[k];
    if (k < RANK) dt[blockIdx.x * RANK + k] = from_float<T>(row[k]);
  }
}

#if RANK % 32 == 0
// The same from very many slices: SETS threads a number add every SETS-th slice's, then the first their sums. It leaves
// registers to the scan, whose blocks would crowd on other multiprocessors. Grid: a block a row, of MIXERS.
constexpr int SETS = 16 * MIX <= 4096 ? 16 : 4096 / MIX, MIXERS = SETS * MIX / 4;

extern "C" __global__ void __launch_bounds__(MIXERS, MIXERS > 682 ? 1 : 2)
decode_mix_wide(const float* partial, const T* norm_dt, const T* norm_B, const T* norm_C, float* mixed, T* dt, int64 slices,
                int64 batch, float eps) {
  __shared__ alignas(16) float sums[SETS][MIX];
  __shared__ float rstd[3];
  let_next_begin();
  const int at = threadIdx.x % (MIX / 4) * 4, set = threadIdx.x / (MIX / 4), k = threadIdx.x;
  const int which = k < RANK ? 0 : k < RANK + N ? 1 : 2;
  const T* const norm = which == 0 ? norm_dt + k : which == 1 ? norm_B + (k - RANK) : norm_C + (k - RANK - N);
  const float times = NORMS && k < MIX ? to_float(*norm) : 1.0f;
  wait_for_previous();
  Vec<float, 4> sum{};
#pragma unroll 8
  for (int64 slice = set; slice < slices; slice += SETS) {
    const Words part = load_fresh(partial + (slice * batch + blockIdx.x) * MIX + at);
#pragma unroll
    for (int i = 0; i < 4; i++) sum.at[i] += bits_float(part.at[i]);
  }
  store_vec<float, 4>(sums[set] + at, sum);
  __syncthreads();
  float value = 0.0f;
  if (k < MIX) {
#pragma unroll
    for (int s = 0; s < SETS; s++) value += sums[s][k];
    value = rounded<T>(value);
    sums[0][k] = value;  // no other thread reads this column
  }
  __syncthreads();
  if constexpr (NORMS) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (warp < 3) {
      const int size = warp ? N : RANK;
      const float* row = sums[0] + (warp ? RANK + (warp - 1) * N : 0);
      float squares = 0.0f;
      for (int i = lane; i < size; i += 32) squares += row[i] * row[i];
      squares = warp_sum(squares);
      if (lane == 0) rstd[warp] = rsqrtf(squares / (float)size + eps);
    }
    __syncthreads();
    if (k < MIX) value = rounded<T>(value * rstd[which] * times);
  }
  if (k < MIX) {
    mixed[blockIdx.x * MIX + k] = value;
    if (k < RANK) dt[blockIdx.x * RANK + k] = from_float<T>(value);
  }
}
#endif

// ---- The step

constexpr int CHANNELS = 32;  // of a block; 8 threads each for dt_proj
constexpr int ROWS = 2;       // of a block at most
constexpr int VEC = RANK % PIECE == 0 ? PIECE : 1;
constexpr int PER = (RANK + 8 * VEC - 1) / (8 * VEC);  // vectors of dt_proj's row that a thread has
constexpr int LANES = N / 4;                           // threads that share a channel's states

// Blocks of the scan a multiprocessor: six where the states of a 2b model fit into 40 registers, timed; else without spills.
constexpr int SCAN_BLOCKS = sizeof(T) == 2 && N == 16 && RANK <= 128 ? 6 : 2;
constexpr int OWN = (ROWS * CHANNELS * LANES + THREADS - 1) / THREADS;  // pieces of a thread, where there are enough
constexpr int EARLY = OWN < 4 ? OWN : 4;
constexpr bool SAME = THREADS % (CHANNELS * LANES) == 0;  // a thread's channel is the same in each row

// Which row, channel and states thread i of a block has.
struct Place {
  int lane, own, m;
  int64 c;
  bool real;
  DEVICE Place(int i, int64 first, int64 I)
      : lane(i % LANES), own(i / LANES % CHANNELS), m(i / (LANES * CHANNELS)), c(first + own < I ? first + own : I - 1), real(first + own < I) {}
};

// Grid: x 32 channels each, y ROWS rows each. A_log2: -exp(A_log) log2(e), (I, N). Shared memory: mixed, ROWS MIX floats.
extern "C" __global__ void __launch_bounds__(THREADS, SCAN_BLOCKS)
decode_scan(const float* partial, const T* norm_dt, const T* norm_B, const T* norm_C, const T* dt_weight,
            const float* dt_bias, const float* A_log2, const float* D, const T* u, const T* z, const float* state,
            float* next_state, T* y, int64 slices, int64 batch, int64 I,
            float eps) {
  extern __shared__ float mixed[];
  __shared__ float rstd[3 * ROWS], steps[ROWS][CHANNELS];
  const int64 first = (int64)blockIdx.x * CHANNELS, row0 = (int64)blockIdx.y * ROWS;
  const int rows = (int)(batch - row0 < ROWS ? batch - row0 : ROWS);

  // What the previous kernels have no part in: weights, and the state that the last step left.
  const int own = threadIdx.x / 8, part = threadIdx.x % 8;
  const int64 channel = first + own < I ? first + own : I - 1;
  Vec<T, VEC> w[PER];
#pragma unroll
  for (int i = 0; i < PER; i++) {
    const int k = (i * 8 + part) * VEC;
    w[i] = k < RANK ? load_vec<T, VEC>(dt_weight + channel * RANK + k) : Vec<T, VEC>{};
  }
  const float bias = dt_bias[channel];
  // A thread has 4 states of a channel, of several rows; a warp whole channels.
  Vec<float, 4> h[EARLY], a[SAME ? 1 : EARLY];
#pragma unroll
  for (int e = 0; e < EARLY; e++) {
    const Place at(threadIdx.x + e * THREADS, first, I);
    if (at.m < rows) {
      h[e] = load_vec<float, 4>(state + ((row0 + at.m) * I + at.c) * N + at.lane * 4);
      if (!SAME || e == 0) a[SAME ? 0 : e] = load_vec<float, 4>(A_log2 + at.c * N + at.lane * 4);
    }
  }
  wait_for_previous();
  let_next_begin();
  float x[EARLY], gates[EARLY];
#pragma unroll
  for (int e = 0; e < EARLY; e++) {
    const Place at(threadIdx.x + e * THREADS, first, I);
    if (at.m < rows) {
      x[e] = load_fresh_number<T>(u + (row0 + at.m) * I + at.c);
      gates[e] = load_fresh_number<T>(z + (row0 + at.m) * I + at.c);
    }
  }
  if constexpr (MIXED) {
    for (int i = threadIdx.x; i < rows * MIX; i += THREADS) mixed[i] = load_fresh_float(partial + row0 * MIX + i);
    __syncthreads();
  } else {
    mix(mixed, rstd, partial, Norms{norm_dt, norm_B, norm_C, eps}, slices, batch, row0, rows);
  }
  for (int m = 0; m < rows; m++) {
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < PER; i++) {
      const int k = (i * 8 + part) * VEC;
#pragma unroll
      for (int j = 0; j < VEC; j++) sum += k + j < RANK ? to_float(w[i].at[j]) * mixed[m * MIX + k + j] : 0.0f;
    }
#pragma unroll
    for (int other = 4; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (part == 0) steps[m][own] = softplus(rounded<T>(sum) + bias);
  }
  __syncthreads();

  const auto go = [&](const Place& at, const Vec<float, 4>& a, Vec<float, 4> h, float x, float gate) {
    const float step = steps[at.m][at.own];
    const float* B = mixed + at.m * MIX + RANK + at.lane * 4;
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      h.at[j] = exp2_approx(step * a.at[j]) * h.at[j] + step * x * B[j];
      sum += h.at[j] * B[N + j];
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (!at.real) return;
    const int64 place = (row0 + at.m) * I + at.c;
    store_vec<float, 4>(next_state + place * N + at.lane * 4, h);
    if (at.lane == 0) y[place] = from_float<T>((sum + D[at.c] * x) * (gate * sigmoid(gate)));
  };
#pragma unroll
  for (int e = 0; e < EARLY; e++) {
    const Place at(threadIdx.x + e * THREADS, first, I);
    if (at.m < rows) go(at, a[SAME ? 0 : e], h[e], x[e], gates[e]);
  }
  for (int i = threadIdx.x + EARLY * THREADS; i < rows * CHANNELS * LANES; i += THREADS) {
    const Place at(i, first, I);
    const int64 row = row0 + at.m;
    go(at, load_vec<float, 4>(A_log2 + at.c * N + at.lane * 4), load_vec<float, 4>(state + (row * I + at.c) * N + at.lane * 4),
       load_fresh_number<T>(u + row * I + at.c), load_fresh_number<T>(z + row * I + at.c));
  }
}

// ---- The step of many rows: a block has 32 channels of all of them, makes their dt with tensor cores and lets their states
// flow through shared memory, FLOW pieces of each thread on their way. The first are asked for before the previous kernel
// has ended, with dt_proj's rows. dt (batch, RANK) and mixed (batch, MIX) are decode_mix's; batch is 64 at most, I a
// multiple of 8. y: rows, or arranged as decode_norm has it. Grid: 32 channels each. Shared memory: MANY_BYTES.
#if RANK % 32 == 0
#ifndef FLOW
#define FLOW 6
#endif
constexpr int MANY = 512;                                                                     // threads
constexpr int GROUPS = MANY / (CHANNELS * LANES) > 0 ? MANY / (CHANNELS * LANES) : 1;          // rows at once
constexpr int PARTS = CHANNELS / 8;                                                            // pieces of 16 bytes of a row of u

extern "C" __global__ void __launch_bounds__(MANY, 2)
decode_scan_wide(const float* mixed, const T* dt, const T* dt_weight, const float* dt_bias, const float* A_log2,
                 const float* D, const T* u, const T* z, const float* state, float* next_state, T* y, int64 batch, int64 I,
                 int64 tiles, int64 vectors) {
  extern __shared__ __align__(128) Words flowing[];
  __shared__ float steps[64][CHANNELS + 1];
  __shared__ alignas(16) T us[64][CHANNELS], zs[64][CHANNELS];
  constexpr int CHUNKS = RANK / 32;
  Words* const weights = flowing + FLOW * MANY;                       // dt_proj's rows as fragments: chunk, 8 rows, lane
  float(*const BC)[2 * N] = (float(*)[2 * N])(weights + CHUNKS * 128);  // of each row
  let_next_begin();
  const int64 first = (int64)blockIdx.x * CHANNELS;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES % CHANNELS, group = threadIdx.x / (LANES * CHANNELS);
  const bool real = first + own < I;
  const int64 c = real ? first + own : I - 1;
  for (int i = threadIdx.x; i < CHUNKS * 128; i += MANY) {
    const int row = i / (CHUNKS * 4), piece = i % (CHUNKS * 4);
    const int64 channel = first + row < I ? first + row : I - 1;
    copy_async_16(weights + (piece / 4 * 4 + row / 8) * 32 + row % 8 * 4 + piece % 4, dt_weight + channel * RANK + piece * 8, true);
  }
  copy_async_commit();
  const int64 stride = GROUPS * I * N;
  const float* from = state + (group * I + c) * N + lane * 4;
#pragma unroll
  for (int e = 0; e < FLOW; e++) {
    if (group + e * GROUPS < batch) copy_async_16(flowing + e * MANY + threadIdx.x, from + e * stride, true);
    copy_async_commit();
  }
  from += FLOW * stride;
  const Vec<float, 4> a = load_vec<float, 4>(A_log2 + c * N + lane * 4);
  const float skip = D[c];
  const int64 upper = first + warp % 2 * 16 + g, high = upper < I ? upper : I - 1, low = upper + 8 < I ? upper + 8 : I - 1;
  const float bias[2] = {dt_bias[high], dt_bias[low]};

  wait_for_previous();
  const int tile = warp / 2;  // of 8 rows
  Words v[CHUNKS];
  if (tile * 8 < batch) {
    const int64 row = tile * 8 + g < batch ? tile * 8 + g : batch - 1;
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) v[k] = load_fresh(dt + row * RANK + k * 32 + t * 8);
  }
  for (int i = threadIdx.x; i < 2 * PARTS * batch; i += MANY) {
    const int64 row = i / (2 * PARTS), at = first + i % PARTS * 8;
    const bool other = i / PARTS % 2;
    if (at < I) *(Words*)((other ? zs : us)[row] + i % PARTS * 8) = load_fresh((other ? z : u) + row * I + at);
  }
  for (int i = threadIdx.x; i < batch * N / 2; i += MANY)
    *(Words*)(BC[0] + i * 4) = load_fresh(mixed + i / (N / 2) * MIX + RANK + i % (N / 2) * 4);
  copy_async_wait<FLOW>();
  __syncthreads();
  if (tile * 8 < batch) {
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
      const Words above = weights[(k * 4 + warp % 2 * 2) * 32 + g * 4 + t], below = weights[(k * 4 + warp % 2 * 2 + 1) * 32 + g * 4 + t];
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const uint32 a4[4] = {above.at[2 * s], below.at[2 * s], above.at[2 * s + 1], below.at[2 * s + 1]}, b2[2] = {v[k].at[2 * s], v[k].at[2 * s + 1]};
        mma_16<T>(sums, a4, b2);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) steps[tile * 8 + 2 * t + i % 2][warp % 2 * 16 + g + i / 2 * 8] = softplus(rounded<T>(sums[i]) + bias[i / 2]);
  }
  __syncthreads();

  float* to = next_state + (group * I + c) * N + lane * 4;
  int slot = 0;
#pragma unroll 2
  for (int m = group; m < batch; m += GROUPS) {
    copy_async_wait<FLOW - 1>();
    Words* const place = flowing + slot * MANY + threadIdx.x;
    Vec<float, 4> now = *(const Vec<float, 4>*)place;
    const float input = to_float(us[m][own]), gate = to_float(zs[m][own]), step = steps[m][own];
    const Vec<float, 4> B = *(const Vec<float, 4>*)(BC[m] + lane * 4), C = *(const Vec<float, 4>*)(BC[m] + N + lane * 4);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      now.at[j] = exp2_approx(step * a.at[j]) * now.at[j] + step * input * B.at[j];
      sum += now.at[j] * C.at[j];
    }
    if (m + FLOW * GROUPS < batch) copy_async_16(place, from, true);
    copy_async_commit();
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (real) store_vec<float, 4>(to, now);
    if (lane == 0) us[m][own] = from_float<T>((sum + skip * input) * (gate * sigmoid(gate)));  // all lanes have read u
    from += stride, to += stride, slot = slot + 1 == FLOW ? 0 : slot + 1;
  }
  __syncthreads();
  for (int i = threadIdx.x; i < PARTS * batch; i += MANY) {
    const int64 at = first + i % PARTS * 8;
    if (at >= I) continue;
    const Words v = *(const Words*)(us[i / PARTS] + i % PARTS * 8);
    if (tiles > 0) store_arranged((char*)y, v, i / PARTS, (int)(at / 8), (int)tiles, (int)vectors);
    else *(Words*)(y + i / PARTS * I + at) = v;
  }
}
#endif

// ---- y <- y T for each row, T = M (x) S: M (odd, odd), null where odd is 1, and S Sylvester's matrix of a power of two
// times `scale`. Grid: a block a row. Shared memory: I floats.
extern "C" __global__ void __launch_bounds__(1024)
decode_rotate(T* y, const float* M, int64 I, int64 odd, float scale) {
  extern __shared__ float values[];
  let_next_begin();
  wait_for_previous();
  const int size = (int)I, power = (int)(I / odd);
  T* row = y + blockIdx.x * I;
  for (int i = threadIdx.x; i < size; i += 1024) values[i] = load_fresh_number<T>(row + i) * scale;
  __syncthreads();
  for (int half = 1; half < power; half *= 2) {
    for (int i = threadIdx.x; i < size / 2; i += 1024) {
      const int at = i / half * 2 * half + i % half;
      const float a = values[at], b = values[at + half];
      values[at] = a + b, values[at + half] = a - b;
    }
    __syncthreads();
  }
  for (int i = threadIdx.x; i < size; i += 1024) {
    float value = values[i];
    if (M) {
      value = 0.0f;
      for (int j = 0; j < (int)odd; j++) value += M[j * odd + i / power] * values[j * power + i % power];
    }
    row[i] = from_float<T>(value);
  }
}
