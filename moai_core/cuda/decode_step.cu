// moai: kernels decode_embed, decode_norm, decode_conv, decode_gate, decode_mix, decode_scan, decode_scan_wide, decode_rotate
// moai: macros T=bf16 R=bf16 FORMAT=Plain S=float N=16 RANK=128 NORMS=1 MIXED=0 KC=4
// moai: macros T=bf16 R=float FORMAT=Int8 S=fp16 N=16 RANK=256 NORMS=1 MIXED=1 KC=4
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

// Grid: a block a row. partial (slices, batch, H) fp32, or null.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_norm(R* residual, const float* partial, const T* weight, T* y, int64 H, int64 slices, float eps) {
  __shared__ float scratch[WARPS];
  wait_for_previous();
  let_next_begin();
  R* row = residual + blockIdx.x * H;
  float sum = 0.0f, v[PIECE];
  for (int64 at = (int64)threadIdx.x * PIECE; at < H; at += THREADS * PIECE) {
    load_piece<R, PIECE>(v, row + at);
    if (partial) {
      float total[PIECE] = {};
      for (int64 slice = 0; slice < slices; slice++) {
        float part[PIECE];
        load_piece<float, PIECE>(part, partial + (slice * gridDim.x + blockIdx.x) * H + at);
#pragma unroll
        for (int i = 0; i < PIECE; i++) total[i] += part[i];
      }
#pragma unroll
      for (int i = 0; i < PIECE; i++) {
        const R stored = from_float<R>(v[i] + rounded<T>(total[i]));
        row[at + i] = stored, v[i] = to_float(stored);
      }
    }
#pragma unroll
    for (int i = 0; i < PIECE; i++) sum += v[i] * v[i];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = sum;
  __syncthreads();
  const float rstd = rstd_of(scratch, H, eps);
  for (int64 at = (int64)threadIdx.x * PIECE; at < H; at += THREADS * PIECE) {  // what this thread wrote itself
    load_piece<R, PIECE>(v, row + at);
#pragma unroll
    for (int i = 0; i < PIECE; i++)
      y[blockIdx.x * H + at + i] = from_float<T>(v[i] * rstd * to_float(weight[at + i]));
  }
}

// The numbers that a product in slices stands for, as the model stores them. sums (slices, rows, size); at: from the first
// row on.
DEVICE void whole_sums(float (&to)[PIECE], const float* sums, int64 slices, int64 rows, int64 size, int64 at) {
#pragma unroll
  for (int i = 0; i < PIECE; i++) to[i] = 0.0f;
  for (int64 slice = 0; slice < slices; slice++) {
    float part[PIECE];
    load_piece<float, PIECE>(part, sums + slice * rows * size + at);
#pragma unroll
    for (int i = 0; i < PIECE; i++) to[i] += part[i];
  }
#pragma unroll
  for (int i = 0; i < PIECE; i++) to[i] = rounded<T>(to[i]);
}

// Grid: x 256 PIECE numbers each, y a row each. sums (slices, rows, 2 I): u and z.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_conv(const float* sums, const T* weight, const T* bias, const T* scale, const T* window, T* next_window, T* u, T* z,
            int64 slices, int64 I) {
  const int64 c = ((int64)blockIdx.x * THREADS + threadIdx.x) * PIECE, row = blockIdx.y;
  const bool convolved = c < I;
  alignas(16) T past[PIECE * (KC - 1)], w[PIECE * KC];
  Vec<T, PIECE> add{}, times{}, y;
  const int64 at = (row * I + c) * (KC - 1);
  if (convolved) {
#pragma unroll
    for (int i = 0; i < KC - 1; i++) *(Vec<T, PIECE>*)(past + i * PIECE) = load_vec<T, PIECE>(window + at + i * PIECE);
#pragma unroll
    for (int i = 0; i < KC; i++) *(Vec<T, PIECE>*)(w + i * PIECE) = load_vec<T, PIECE>(weight + c * KC + i * PIECE);
    if (bias) add = load_vec<T, PIECE>(bias + c);
    if (scale) times = load_vec<T, PIECE>(scale + c);
  }
  wait_for_previous();
  let_next_begin();
  if (c >= 2 * I) return;
  float x[PIECE];
  whole_sums(x, sums, slices, gridDim.y, 2 * I, row * 2 * I + c);
  if (!convolved) {
#pragma unroll
    for (int i = 0; i < PIECE; i++) y.at[i] = from_float<T>(x[i]);
    store_vec<T, PIECE>(z + row * I + c - I, y);
    return;
  }
#pragma unroll
  for (int i = 0; i < PIECE; i++) {
    float sum = bias ? to_float(add.at[i]) : 0.0f;
#pragma unroll
    for (int k = 0; k < KC - 1; k++) {
      const T before = past[i * (KC - 1) + k];
      sum += to_float(w[i * KC + k]) * to_float(before);
      if (k > 0) past[i * (KC - 1) + k - 1] = before;
    }
    past[i * (KC - 1) + KC - 2] = from_float<T>(x[i]);
    sum += to_float(w[i * KC + KC - 1]) * x[i];
    const float value = sum * sigmoid(sum);
    y.at[i] = from_float<T>(scale ? rounded<T>(value) * to_float(times.at[i]) : value);
  }
#pragma unroll
  for (int i = 0; i < KC - 1; i++) store_vec<T, PIECE>(next_window + at + i * PIECE, *(Vec<T, PIECE>*)(past + i * PIECE));
  store_vec<T, PIECE>(u + row * I + c, y);
}

// y = silu(gate) up. Grid: x 256 PIECE numbers each, y a row each. sums (slices, rows, 2 F): gate and up.
extern "C" __global__ void __launch_bounds__(THREADS)
decode_gate(const float* sums, T* y, int64 slices, int64 F) {
  wait_for_previous();
  let_next_begin();
  const int64 c = ((int64)blockIdx.x * THREADS + threadIdx.x) * PIECE, row = blockIdx.y;
  if (c >= F) return;
  float g[PIECE], x[PIECE];
  whole_sums(g, sums, slices, gridDim.y, 2 * F, row * 2 * F + c);
  whole_sums(x, sums, slices, gridDim.y, 2 * F, row * 2 * F + F + c);
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
  wait_for_previous();
  let_next_begin();
  mix(row, rstd, partial, Norms{norm_dt, norm_B, norm_C, eps}, slices, batch, blockIdx.x, 1);
  for (int k = threadIdx.x; k < MIX; k += THREADS) {
    mixed[blockIdx.x * MIX + k] = row[k];
    if (k < RANK) dt[blockIdx.x * RANK + k] = from_float<T>(row[k]);
  }
}

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
// flow through registers. dt (batch, RANK) and mixed (batch, MIX) are decode_mix's; batch is 64 at most. Grid: 32 channels
// each.
#if RANK % 32 == 0
constexpr int MANY = 512, FLOW = 4;                                  // threads; states on their way
constexpr int GROUPS = MANY / (CHANNELS * LANES) > 0 ? MANY / (CHANNELS * LANES) : 1;  // rows at once

extern "C" __global__ void __launch_bounds__(MANY, 1)
decode_scan_wide(const float* mixed, const T* dt, const T* dt_weight, const float* dt_bias, const float* A_log2,
                 const float* D, const T* u, const T* z, const float* state, float* next_state, T* y, int64 batch, int64 I) {
  __shared__ float steps[64][CHANNELS + 1], BC[64][2 * N];
  const int64 first = (int64)blockIdx.x * CHANNELS;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int lane = threadIdx.x % LANES, own = threadIdx.x / LANES % CHANNELS, group = threadIdx.x / (LANES * CHANNELS);
  const bool real = first + own < I;
  const int64 c = real ? first + own : I - 1;
  const Vec<float, 4> a = load_vec<float, 4>(A_log2 + c * N + lane * 4);
  const float skip = D[c];
  Vec<float, 4> h[FLOW];
#pragma unroll
  for (int e = 0; e < FLOW; e++)
    if (group + e * GROUPS < batch) h[e] = load_vec<float, 4>(state + ((group + e * GROUPS) * I + c) * N + lane * 4);
  constexpr int CHUNKS = RANK / 32;
  const int64 upper = first + warp % 2 * 16 + g, high = upper < I ? upper : I - 1, low = upper + 8 < I ? upper + 8 : I - 1;
  Words w[CHUNKS][2];
#pragma unroll
  for (int k = 0; k < CHUNKS; k++) {
    w[k][0] = *(const Words*)(dt_weight + high * RANK + k * 32 + t * 8);
    w[k][1] = *(const Words*)(dt_weight + low * RANK + k * 32 + t * 8);
  }
  const float bias[2] = {dt_bias[high], dt_bias[low]};

  wait_for_previous();
  let_next_begin();
  float x[FLOW], gates[FLOW];
#pragma unroll
  for (int e = 0; e < FLOW; e++)
    if (group + e * GROUPS < batch) {
      x[e] = load_fresh_number<T>(u + (group + e * GROUPS) * I + c);
      gates[e] = load_fresh_number<T>(z + (group + e * GROUPS) * I + c);
    }
  for (int i = threadIdx.x; i < batch * 2 * N; i += MANY) BC[i / (2 * N)][i % (2 * N)] = load_fresh_float(mixed + i / (2 * N) * MIX + RANK + i % (2 * N));
  const int tile = warp / 2;  // of 8 rows
  if (tile * 8 < batch) {
    const int64 row = tile * 8 + g < batch ? tile * 8 + g : batch - 1;
    float sums[4] = {};
#pragma unroll
    for (int k = 0; k < CHUNKS; k++) {
      const Words v = load_fresh(dt + row * RANK + k * 32 + t * 8);
#pragma unroll
      for (int s = 0; s < 2; s++) {
        const uint32 a4[4] = {w[k][0].at[2 * s], w[k][1].at[2 * s], w[k][0].at[2 * s + 1], w[k][1].at[2 * s + 1]}, b2[2] = {v.at[2 * s], v.at[2 * s + 1]};
        mma_16<T>(sums, a4, b2);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; i++) steps[tile * 8 + 2 * t + i % 2][warp % 2 * 16 + g + i / 2 * 8] = softplus(rounded<T>(sums[i]) + bias[i / 2]);
  }
  __syncthreads();

  for (int64 m = group; m < batch; m += GROUPS) {
    Vec<float, 4> now = h[0];
    const float input = x[0], gate = gates[0];
    const int64 at = m * I + c, later = m + FLOW * GROUPS;
#pragma unroll
    for (int e = 1; e < FLOW; e++) h[e - 1] = h[e], x[e - 1] = x[e], gates[e - 1] = gates[e];
    if (later < batch) {
      h[FLOW - 1] = load_vec<float, 4>(state + (later * I + c) * N + lane * 4);
      x[FLOW - 1] = load_fresh_number<T>(u + later * I + c), gates[FLOW - 1] = load_fresh_number<T>(z + later * I + c);
    }
    const float step = steps[m][own];
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      now.at[j] = exp2_approx(step * a.at[j]) * now.at[j] + step * input * BC[m][lane * 4 + j];
      sum += now.at[j] * BC[m][N + lane * 4 + j];
    }
#pragma unroll
    for (int other = LANES / 2; other > 0; other /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, other);
    if (!real) continue;
    store_vec<float, 4>(next_state + at * N + lane * 4, now);
    if (lane == 0) y[at] = from_float<T>((sum + skip * input) * (gate * sigmoid(gate)));
  }
}
#endif

// ---- y <- y T for each row, T = M (x) S: M (odd, odd), null where odd is 1, and S Sylvester's matrix of a power of two
// times `scale`. Grid: a block a row. Shared memory: I floats.
extern "C" __global__ void __launch_bounds__(1024)
decode_rotate(T* y, const float* M, int64 I, int64 odd, float scale) {
  extern __shared__ float values[];
  wait_for_previous();
  let_next_begin();
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
