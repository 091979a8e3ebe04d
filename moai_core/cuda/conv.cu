// moai: kernels conv_forward, conv_backward, conv_sum, conv_step
// moai: macros T=bf16 W=float K=4 | T=bf16 W=bf16 K=4 | T=float W=float K=4 | T=fp16 W=fp16 K=2 | T=bf16 W=bf16 K=8
//
// Causal depthwise convolution over time, then SiLU, channel-last:
//
//   p_t = bias + sum_k w_k x_(t-P+k),  y_t = p_t sigmoid(p_t),  k = 0..P,  P = K - 1
//
// backward, with g_t = dy_t y'(p_t):  dx_s = sum_k w_k g_(s+P-k),  dw_k = sum_t g_t x_(t-P+k),  dbias = sum_t g_t
//
// A thread owns C channels, a vector of 16 bytes (8 where K > 4), and walks over a run of time steps with the last P
// inputs in registers, so that memory sees each row once (but for P rows where a run begins). Rows come through a ring
// in shared memory, two stages of S steps ahead of their use; each thread reads only what it copied itself, so there
// are no barriers. A pass reads and writes each tensor once: memory is the limit, and the ring is deep enough to fill
// it.
//
// Documents (seq_idx) don't decrease along a row and padding (< 0) ends it, so a stage whose last number is that of
// the step before it lies within one document: one comparison a stage. The others, and a run's ends, take a second
// path, which looks at every step. A token's `age` is the number of inputs before it that belong to its document, at
// most P.
//
//   T  type of u, y and the states      W  type of weight and bias      K  width, 2 to 8
#include "common.cuh"

static_assert(K >= 2 && K <= 8, "a run is at least 8 steps long and must not be shorter than the window");
constexpr int P = K - 1;
constexpr int C = K <= 4 && sizeof(T) == 2 ? 8 : 4;  // 8 channels with a wide window don't fit into registers
constexpr int S = 4;                                 // steps of a stage
constexpr int STAGES = 3;
constexpr int THREADS = 128;
constexpr int WARPS = THREADS / 32;

// What one thread holds of a step. As words it moves in one instruction, and each half of a word is one more.
constexpr int WORDS = C * sizeof(T) / 4;
struct alignas(4 * WORDS) Row {
  uint32 word[WORDS];
};

template <int n>
DEVICE void load_words(uint32 (&to)[n], const void* from) {
  static_assert(n == 2 || n == 4, "8 or 16 bytes");
  if constexpr (n == 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else {
    const uint2 v = *reinterpret_cast<const uint2*>(from);
    to[0] = v.x, to[1] = v.y;
  }
}

// To global memory. Spelled out because the compiler may take a vector apart and not find it again. It needn't know of
// the writing: no kernel here reads what it wrote.
template <int n>
DEVICE void store_words(void* to, const uint32 (&from)[n]) {
  static_assert(n == 2 || n == 4, "8 or 16 bytes");
#ifdef MOAI_HOST
  __builtin_memcpy(to, from, 4 * n);
#else
  if constexpr (n == 4)
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from[0]), "r"(from[1]), "r"(from[2]),
                 "r"(from[3]));
  else
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(from[0]), "r"(from[1]));
#endif
}

DEVICE void copy_row(Row* shared, const T* global, bool valid) {
  if constexpr (sizeof(Row) == 16) {
    copy_async_16(shared, global, valid);
  } else {
#ifdef MOAI_HOST
    for (int i = 0; i < WORDS; ++i) shared->word[i] = valid ? reinterpret_cast<const uint32*>(global)[i] : 0;
#else
    uint32 to = (uint32)__cvta_generic_to_shared(shared);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(global), "r"(valid ? 8 : 0) : "memory");
#endif
  }
}

// Number i of words that hold numbers of type X.
template <class X, int n>
DEVICE float value(const uint32 (&words)[n], int i) {
  if constexpr (sizeof(X) == 4) return bits_float(words[i]);
  else return to_float(X{(uint16)(words[i / 2] >> 16 * (i % 2))});
}

// n values that stand one after another, n a multiple of C.
template <int n, class X>
DEVICE void load_floats(float (&to)[n], const X* from) {
  constexpr int width = C < per_16_bytes<X> ? C : per_16_bytes<X>;
#pragma unroll
  for (int i = 0; i < n; i += width) {
    uint32 words[width * sizeof(X) / 4];
    load_words(words, from + i);
#pragma unroll
    for (int j = 0; j < width; ++j) to[i + j] = value<X>(words, j);
  }
}

DEVICE Row load_row(const void* from) {
  Row row;
  load_words(row.word, from);
  return row;
}

template <int n>
DEVICE void store_floats(T* to, const float (&from)[n]) {
#pragma unroll
  for (int i = 0; i < n; i += C) {
    uint32 words[WORDS];
#pragma unroll
    for (int j = 0; j < WORDS; ++j) {
      if constexpr (sizeof(T) == 4) words[j] = float_bits(from[i + j]);
      else words[j] = from_float<T>(from[i + 2 * j]).bits | (uint32)from_float<T>(from[i + 2 * j + 1]).bits << 16;
    }
    store_words(to + i, words);
  }
}

// What is constant over time for C channels. Memory holds a channel's K weights side by side.
struct Filter {
  float w[C * K], bias[C];

  Filter() = default;
  DEVICE Filter(const W* weight, const W* bias_, int64 c) {
    load_floats(w, weight + c * K);
#pragma unroll
    for (int i = 0; i < C; ++i) bias[i] = 0.0f;
    if (bias_) load_floats(bias, bias_ + c);
  }

  // p of one token: `past` are the inputs before it, oldest first, `row` is its own.
  DEVICE void apply(float (&p)[C], const Row (&past)[P], const Row& row) const {
#pragma unroll
    for (int i = 0; i < C; ++i) {
      p[i] = bias[i];
#pragma unroll
      for (int k = 0; k < P; ++k) p[i] += w[i * K + k] * value<T>(past[k].word, i);
      p[i] += w[i * K + P] * value<T>(row.word, i);
    }
  }
};

// The window is kept as it is in memory: 16-bit numbers take half the registers.
DEVICE void shift(Row (&past)[P], const Row& row) {
#pragma unroll
  for (int k = 0; k + 1 < P; ++k) past[k] = past[k + 1];
  past[P - 1] = row;
}

DEVICE void clear(Row (&past)[P]) {
#pragma unroll
  for (int k = 0; k < P; ++k)
#pragma unroll
    for (int j = 0; j < WORDS; ++j) past[k].word[j] = 0;
}

// `to`, (m, n) of numbers, is `from`, (n, m), turned. A window is (P, C), a state in memory (C, P).
template <int m>
DEVICE void turn(Row (&to)[P], const Row (&from)[P]) {
  constexpr int n = P * C / m, each = 4 / sizeof(T);
  auto bits = [&](int at) {  // of number `at` of `to`, which is number `source` of `from`
    const int source = at % n * m + at / n;
    const uint32 word = from[source / C].word[source % C / each];
    return each == 1 ? word : source % 2 ? word >> 16 : word & 0xffff;
  };
#pragma unroll
  for (int k = 0; k < P; ++k)
#pragma unroll
    for (int j = 0; j < WORDS; ++j) {
      const int at = k * C + j * each;
      to[k].word[j] = each == 1 ? bits(at) : bits(at) | bits(at + 1) << 16;
    }
}

DEVICE void load_state(Row (&past)[P], const T* at) {
  Row flat[P];
#pragma unroll
  for (int k = 0; k < P; ++k) flat[k] = load_row(at + k * C);
  turn<P>(past, flat);
}

DEVICE void store_state(T* at, const Row (&past)[P]) {
  Row flat[P];
  turn<C>(flat, past);
#pragma unroll
  for (int k = 0; k < P; ++k) store_words(at + k * C, flat[k].word);
}

// Inputs that a run's first step can see, at most P: steps before it with the number `previous` of the last of them.
DEVICE int age_before(const int* seq, int previous) {
  if (!seq) return P;
  int age = 0;
#pragma unroll
  for (int k = 1; k <= P; ++k) age += seq[-k] == previous;
  return age;
}

// The window before a run, whose first step is at `u` and sees `age` inputs. All P are asked for: to wait for their
// numbers before asking takes as long as the copy of the first rows. A call's first run continues `state`, if any.
DEVICE void load_window(Row (&past)[P], const T* u, int64 u_step, int age, bool first_run, const T* state) {
  clear(past);
  if (first_run) {
    if (state) load_state(past, state);
    return;
  }
#pragma unroll
  for (int k = 0; k < P; ++k) {
    const Row row = load_row(u + (k - P) * u_step);
#pragma unroll
    for (int j = 0; j < WORDS; ++j) past[k].word[j] = P - k <= age ? row.word[j] : 0;
  }
}

// A run of the forward pass on its way through time.
struct Forward {
  Filter filter;
  T *y, *last;        // where the next step's row goes; this row's last state
  const int* seq;     // numbers from the run's first step on, or null
  int64 I;            // channels of a row
  bool first, final;  // whether this is the row's first run, its last one
  int n, previous;    // steps of the run; number of the step before
  Row past[P];

  // edge: the step may be none, padding or the first of its document.
  template <bool edge>
  DEVICE void step(const Row& row, int t) {
    if (edge && t >= n) return;
    float out[C];
    bool token = true;
    if (edge) {
      const int number = seq ? seq[t] : 0;
      token = number >= 0;
      if (token && number != previous) clear(past);
      if (!token && (previous >= 0 || (first && t == 0))) store_state(last, past);
      previous = number;
    }
    if (token) {
      filter.apply(out, past, row);
      shift(past, row);
    }
#pragma unroll
    for (int i = 0; i < C; ++i) out[i] = token ? out[i] * sigmoid(out[i]) : 0.0f;
    store_floats(y, out);
    y += I;
  }
};

// Grid: a thread for each (row, run, C channels), channels fastest. Steps of a run: `run`, at least 8. u has any stride
// between rows and steps; y and the states are contiguous. `bias`, `state` and `seq_idx` may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 4)
    conv_forward(const T* __restrict__ u, const W* __restrict__ weight, const W* __restrict__ bias,
                 const T* __restrict__ state, const int* __restrict__ seq_idx, T* __restrict__ y, T* __restrict__ last,
                 int64 batch, int64 L, int64 I, int64 run, int64 u_batch, int64 u_step) {
  __shared__ Row ring[STAGES][S][THREADS];
  const uint32 groups = (uint32)(I / C), runs = (uint32)(L + run - 1) / (uint32)run;
  const uint32 item = blockIdx.x * THREADS + threadIdx.x, place = item / groups;
  const int64 c = (int64)(item % groups) * C, b = place / runs, t0 = (place % runs) * run;
  if (b >= batch) return;
  const int n = (int)(t0 + run < L ? run : L - t0);
  const int* seq = seq_idx ? seq_idx + b * L + t0 : nullptr;
  u += b * u_batch + t0 * u_step + c;

  const T* ahead = u;  // the next row to be copied
  auto fetch = [&](int stage) {
#pragma unroll
    for (int s = 0; s < S; ++s, ahead += u_step)
      copy_row(&ring[stage % STAGES][s][threadIdx.x], ahead, stage * S + s < n);
    copy_async_commit();
  };
#pragma unroll
  for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);

  const int64 at = (b * I + c) * P;
  Forward now{Filter(weight, bias, c), y + (b * L + t0) * I + c, last + at, seq, I, t0 == 0, t0 + n == L, n};
  now.previous = seq ? seq[t0 > 0 ? -1 : 0] : 0;
  const int age = t0 > 0 ? age_before(seq, now.previous) : P;
  load_window(now.past, u, u_step, age, t0 == 0, state ? state + at : nullptr);

  int number = seq ? seq[n < S ? n - 1 : S - 1] : 0;  // of the last step of the coming stage, loaded a stage ahead
  for (int stage = 0, t = 0; t < n; ++stage, t += S) {
    fetch(stage + STAGES - 1);
    const int here = number, later = t + 2 * S - 1;
    if (seq) number = seq[later < n ? later : n - 1];
    copy_async_wait<STAGES - 1>();
    const auto& rows = ring[stage % STAGES];
    if (t + S <= n && here == now.previous && here >= 0) {
#pragma unroll
      for (int s = 0; s < S; ++s) now.step<false>(load_row(&rows[s][threadIdx.x]), t + s);
    } else {
#pragma unroll
      for (int s = 0; s < S; ++s) now.step<true>(load_row(&rows[s][threadIdx.x]), t + s);
    }
  }
  if (now.previous >= 0 && (now.final || (seq && seq[n] < 0))) store_state(now.last, now.past);
}

// A run of the backward pass on its way through time.
struct Backward {
  Filter filter;
  T *du, *d_state;  // the run's first row; gradient of this row's first state, or null
  const T* d_last;  // that of its last state, or null
  const int* seq;
  int64 du_step;
  bool first;
  int n, steps;     // steps of the run, whose du it owns; steps up to the end of the row, at most n + P
  int previous, age;
  Row past[P];      // inputs of the P steps before
  float dx[P][C];   // their gradients as far as they are known
  float dw[K][C], dbias[C];

  template <bool edge>
  DEVICE void step(const Row& u_row, const Row& dy_row, int t) {
    float own[C];  // the gradient of this step's input, so far
#pragma unroll
    for (int i = 0; i < C; ++i) own[i] = 0.0f;
    const bool token = edge ? mark(t) : true;
    if (token) {
      float g[C];
      filter.apply(g, past, u_row);
#pragma unroll
      for (int i = 0; i < C; ++i) {
        const float p = g[i], r = sigmoid(p);
        g[i] = value<T>(dy_row.word, i) * (r * (1.0f + p * (1.0f - r)));
        own[i] = filter.w[i * K + P] * g[i];
#pragma unroll
        for (int k = 0; k < P; ++k) {
          const float sum = fmaf(filter.w[i * K + k], g[i], dx[k][i]);
          dx[k][i] = !edge || P - k <= age ? sum : dx[k][i];
        }
        if (edge && t >= n) continue;  // the next run counts it
#pragma unroll
        for (int k = 0; k < P; ++k) dw[k][i] += g[i] * value<T>(past[k].word, i);
        dw[P][i] += g[i] * value<T>(u_row.word, i);
        dbias[i] += g[i];
      }
      shift(past, u_row);
      if (edge) age = age < P ? age + 1 : P;
    }
    if (!edge || (t >= P && t - P < n)) {
      store_floats(du + (t - P) * du_step, dx[0]);
    } else if (t < P && first && d_state) {
#pragma unroll
      for (int i = 0; i < C; ++i) d_state[i * P + t] = from_float<T>(dx[0][i]);
    }
#pragma unroll
    for (int i = 0; i < C; ++i) {
#pragma unroll
      for (int k = 0; k + 1 < P; ++k) dx[k][i] = dx[k + 1][i];
      dx[P - 1][i] = own[i];
    }
  }

  // Whether step t is a token, after what its number asks for.
  DEVICE bool mark(int t) {
    const int number = t >= steps ? -1 : seq ? seq[t] : 0;
    if (number >= 0 && number != previous) {
      age = 0;
      clear(past);
    }
    if (number < 0 && (previous >= 0 || (first && t == 0)) && d_last) {  // the row's last state is what came before
      Row add[P];
      load_state(add, d_last);
#pragma unroll
      for (int k = 0; k < P; ++k)
#pragma unroll
        for (int i = 0; i < C; ++i) dx[k][i] += P - k <= age ? value<T>(add[k].word, i) : 0.0f;
    }
    previous = number;
    return number >= 0;
  }
};

union BackwardPool {
  Row ring[2][STAGES][S][THREADS];         // u and dy
  float sums[WARPS][(K + 1) * C][32 + 1];  // then each warp's share of dw and dbias
};

// Grid: a block for each (row, WARPS runs, 32 * C channels), channels fastest, a warp a run. Time runs forwards: g_t
// completes dx_(t-P), and P further steps complete the run's last rows. Shares of dw (K rows) and dbias (one) of the
// block go to partial (rows * blocks of runs, K + 1, I). u, dy and du have any stride between rows and steps. `state`,
// `seq_idx`, `d_last` and `d_state` may be null.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
    conv_backward(const T* __restrict__ u, const W* __restrict__ weight, const W* __restrict__ bias,
                  const T* __restrict__ state, const int* __restrict__ seq_idx, const T* __restrict__ dy,
                  const T* __restrict__ d_last, T* __restrict__ du, T* __restrict__ d_state,
                  float* __restrict__ partial, int64 L, int64 I, int64 run, int64 u_batch, int64 u_step,
                  int64 dy_batch, int64 dy_step, int64 du_batch, int64 du_step) {
  __shared__ BackwardPool pool;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const uint32 columns = (uint32)(I + 32 * C - 1) / (32 * C), steps_of_block = (uint32)run * WARPS;
  const uint32 rounds = ((uint32)L + steps_of_block - 1) / steps_of_block;
  const uint32 share = blockIdx.x / columns;
  const int64 c0 = (int64)(blockIdx.x % columns) * 32 * C, c = c0 + lane * C;
  const int64 b = share / rounds, t0 = ((int64)(share % rounds) * WARPS + warp) * run;

  Backward now;
#pragma unroll
  for (int i = 0; i < C; ++i) {
    now.dbias[i] = 0.0f;
#pragma unroll
    for (int k = 0; k < K; ++k) now.dw[k][i] = 0.0f;
  }

  if (c < I && t0 < L) {
    const int n = (int)(t0 + run < L ? run : L - t0), steps = (int)(t0 + n + P < L ? n + P : L - t0);
    const int64 at = (b * I + c) * P;
    const int* seq = seq_idx ? seq_idx + b * L + t0 : nullptr;
    u += b * u_batch + t0 * u_step + c;

    const T *u_ahead = u, *dy_ahead = dy + b * dy_batch + t0 * dy_step + c;
    auto fetch = [&](int stage) {
#pragma unroll
      for (int s = 0; s < S; ++s, u_ahead += u_step, dy_ahead += dy_step) {
        copy_row(&pool.ring[0][stage % STAGES][s][threadIdx.x], u_ahead, stage * S + s < steps);
        copy_row(&pool.ring[1][stage % STAGES][s][threadIdx.x], dy_ahead, stage * S + s < steps);
      }
      copy_async_commit();
    };
#pragma unroll
    for (int stage = 0; stage < STAGES - 1; ++stage) fetch(stage);

    now.filter = Filter(weight, bias, c);
    now.du = du + b * du_batch + t0 * du_step + c;
    now.d_state = d_state ? d_state + at : nullptr;
    now.d_last = d_last ? d_last + at : nullptr;
    now.seq = seq, now.first = t0 == 0, now.du_step = du_step, now.n = n, now.steps = steps;
    now.previous = seq ? seq[t0 > 0 ? -1 : 0] : 0;
    now.age = t0 > 0 ? age_before(seq, now.previous) : P;
    load_window(now.past, u, u_step, now.age, t0 == 0, state ? state + at : nullptr);
#pragma unroll
    for (int k = 0; k < P; ++k)
#pragma unroll
      for (int i = 0; i < C; ++i) now.dx[k][i] = 0.0f;

    int number = seq ? seq[n < S ? n - 1 : S - 1] : 0;
    for (int stage = 0, t = 0; t < n + P; ++stage, t += S) {
      fetch(stage + STAGES - 1);
      const int here = number, later = t + 2 * S - 1;
      if (seq) number = seq[later < n ? later : n - 1];
      copy_async_wait<STAGES - 1>();
      const auto &us = pool.ring[0][stage % STAGES], &dys = pool.ring[1][stage % STAGES];
      if (t >= P && t + S <= n && here == now.previous && here >= 0 && now.age == P) {
#pragma unroll
        for (int s = 0; s < S; ++s)
          now.step<false>(load_row(us[s] + threadIdx.x), load_row(dys[s] + threadIdx.x), t + s);
      } else {
#pragma unroll
        for (int s = 0; s < S; ++s)
          now.step<true>(load_row(us[s] + threadIdx.x), load_row(dys[s] + threadIdx.x), t + s);
      }
    }
    copy_async_wait<0>();
  }

  __syncthreads();
#pragma unroll
  for (int i = 0; i < C; ++i) {
#pragma unroll
    for (int k = 0; k < K; ++k) pool.sums[warp][k * C + i][lane] = now.dw[k][i];
    pool.sums[warp][K * C + i][lane] = now.dbias[i];
  }
  __syncthreads();
  for (int e = threadIdx.x; e < (K + 1) * 32 * C; e += THREADS) {
    const int k = e / (32 * C), column = e % (32 * C);
    float sum = 0.0f;
#pragma unroll
    for (int other = 0; other < WARPS; ++other) sum += pool.sums[other][k * C + column % C][column / C];
    if (c0 + column < I) partial[((int64)share * (K + 1) + k) * I + c0 + column] = sum;
  }
}

// d_weight (I, K) and d_bias (I), which may be null, from `count` shares (K + 1, I). A block of 256 threads adds up 32
// columns of (K + 1) * I, always in the same order.
extern "C" __global__ void __launch_bounds__(256)
    conv_sum(const float* __restrict__ partial, W* __restrict__ d_weight, W* __restrict__ d_bias, int64 count,
             int64 I) {
  __shared__ float sums[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64 size = (K + 1) * I, column = (int64)blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (column < size) {
#pragma unroll 4
    for (int64 share = warp; share < count; share += 8) sum += partial[share * size + column];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || column >= size) return;
#pragma unroll
  for (int other = 1; other < 8; ++other) sum += sums[other][lane];
  const int64 k = column / I, channel = column % I;
  if (k < K) d_weight[channel * K + k] = from_float<W>(sum);
  else if (d_bias) d_bias[channel] = from_float<W>(sum);
}

// One token a row: u (batch, I) with any stride between rows. A thread for each (row, C channels), channels fastest.
extern "C" __global__ void __launch_bounds__(THREADS)
    conv_step(const T* __restrict__ u, const W* __restrict__ weight, const W* __restrict__ bias,
              const T* __restrict__ state, T* __restrict__ y, T* __restrict__ last, int64 batch, int64 I,
              int64 u_batch) {
  const int64 item = (int64)blockIdx.x * THREADS + threadIdx.x, groups = I / C;
  const int64 b = item / groups, c = item % groups * C;
  if (b >= batch) return;
  const Row row = load_row(u + b * u_batch + c);
  Row past[P];
  load_state(past, state + (b * I + c) * P);
  float out[C];
  Filter(weight, bias, c).apply(out, past, row);
#pragma unroll
  for (int i = 0; i < C; ++i) out[i] *= sigmoid(out[i]);
  store_floats(y + b * I + c, out);
  shift(past, row);
  store_state(last + (b * I + c) * P, past);
}
