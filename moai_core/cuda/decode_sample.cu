// moai: kernels sample_best, sample_masses, sample_gather, sample_pick; spills 128; macros T=bf16 | T=float | T=fp16
//
// The next token of each row from its logits, as generation/sampling.py defines it: repetition penalty, temperature,
// top-k, top-p, min-p, and the number of the row's own random stream (Philox 4x64-10) looked up in the distribution.
// There in float64; here scores are fp32, and a token's weight, exp((score - best) / temperature), is an integer in
// units of 2^-40 of the best one's: sums of integers don't depend on their order, so that thousands of threads give
// the same token in every run.
//
//   sample_best    slices of the vocabulary: the largest score and where it first occurs
//   sample_masses  slices: how many tokens, and how much weight, at each distance from the best
//   sample_gather  slices: the tokens of the best bins, as many as the last kernel can keep
//   sample_pick    a block a row: the filters' thresholds, the draw
//
// Tokens are ordered by score, equal ones by id. So every filter is a threshold in that order: the token's key, score
// before id, as one integer. It is found in the bin of distances in which it must lie, whose tokens are gathered; a bin
// of too many is searched where it is, digit by digit of the keys.
//
//   T  type of the logits
#include "gemv.cuh"

using uint64 = unsigned long long;

constexpr int PIECE = 16 / sizeof(T);
constexpr int SLICE = 4096;   // tokens of a block of sample_best and sample_masses
constexpr int BINS = 1312;    // of 1/32 of a factor of two: down to 2^-41
constexpr int LIST = 4096;    // tokens of a bin that are gathered
constexpr float UNIT = 1099511627776.0f;  // 2^40
constexpr uint64 MOST = (1ull << 40) - 1;  // whose halves of 20 bits add up SLICE times in 32 bits

struct Row {
  const T* logits;
  const unsigned char* seen;  // null without a penalty
  int64 V;
  float penalty, inverse;  // inverse: log2(e) / temperature
  float best;

  DEVICE float penalized(float x, int64 id) const {
    return seen && seen[id] ? (x < 0.0f ? x * penalty : x / penalty) : x;
  }
  DEVICE float score(int64 id) const { return penalized(to_float(logits[id]), id); }
  // Powers of two below the best.
  DEVICE float distance(float score) const { return (best - score) * inverse; }
  DEVICE static float weight(float distance) { return exp2_approx(-distance); }
  DEVICE static uint64 mass(float distance) {
    const uint64 whole = (uint64)(weight(distance) * UNIT);
    return whole < MOST ? whole : MOST;
  }
  DEVICE static int bin(float distance) { return distance < (BINS - 1) / 32.0f ? (int)(distance * 32.0f) : BINS - 1; }
};

// Larger for larger scores; among equal scores for smaller ids.
DEVICE uint64 key_of(float score, int64 id) {
  const uint32 bits = float_bits(score + 0.0f);  // -0 counts as 0
  const uint32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64)ordered << 32 | (uint32)~(uint32)id;
}

// Temperature 0 takes the best.
DEVICE Row row_of(const T* logits, const unsigned char* seen, const double* temperature, const double* penalty, int64 row,
                  int64 V) {
  const double t = temperature[row], p = penalty[row];
  const float inverse = t > 0.0 ? (float)fmin(1.4426950408889634 / t, 1e30) : 0.0f;
  return {logits + row * V, p != 1.0 ? seen + row * V : nullptr, V, (float)p, inverse, 0.0f};
}

// What the kernels of slices begin with: the row, blockIdx.y, once the kernel before has written what is read here.
DEVICE Row begin_row(const T* logits, const unsigned char* seen, const double* temperature, const double* penalty, int64 V) {
  wait_for_previous();
  let_next_begin();
  return row_of(logits, seen, temperature, penalty, blockIdx.y, V);
}

// f(id, score) for the tokens from `begin`, a multiple of PIECE, to `end`, by `threads` threads of which this is number
// `thread`; 16 bytes of logits at once where rows allow it.
template <int AHEAD = 2, class F>  // AHEAD: loads under way, for a block alone waits for each
DEVICE void each_token(const Row& r, int64 begin, int64 end, int thread, int threads, F f) {
  const bool whole = r.V % PIECE == 0;
  const auto read = [&](int64 id) {
    Vec<T, PIECE> x{};
    if (whole) {
      if (id < end) x = load_vec<T, PIECE>(r.logits + id);
    } else {
#pragma unroll
      for (int i = 0; i < PIECE; i++) x.at[i] = id + i < end ? r.logits[id + i] : T{};
    }
    return x;
  };
  const int64 step = (int64)threads * PIECE;
  int64 id = begin + (int64)thread * PIECE;
  Vec<T, PIECE> next[AHEAD];
#pragma unroll
  for (int k = 0; k < AHEAD; k++) next[k] = read(id + k * step);
#pragma unroll 1  // more of them cost seconds of compilation
  for (; id < end; id += step) {
    const Vec<T, PIECE> x = next[0];
#pragma unroll
    for (int k = 1; k < AHEAD; k++) next[k - 1] = next[k];
    next[AHEAD - 1] = read(id + AHEAD * step);
#pragma unroll
    for (int i = 0; i < PIECE; i++)
      if (id + i < end) f(id + i, r.penalized(to_float(x.at[i]), id + i));
  }
}

struct Best {
  float score;
  int id;
  DEVICE void meet(float other, int where) {
    if (other > score || (other == score && where < id)) score = other, id = where;
  }
};

DEVICE Best warp_best(Best mine) {
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    const float score = __shfl_xor_sync(0xffffffffu, mine.score, other);
    const int id = __shfl_xor_sync(0xffffffffu, mine.id, other);
    mine.meet(score, id);
  }
  return mine;
}

DEVICE float infinite() { return bits_float(0x7f800000u); }

// Grid: x slices, y rows. best (rows, slices): NaN counts as infinity, which stops the row.
extern "C" __global__ void __launch_bounds__(256)
sample_best(const T* logits, const unsigned char* seen, const double* temperature, const double* penalty,
            float* best_score, int* best_id, int64 V, int64 known) {
  __shared__ Best warps[8];
  const Row r = begin_row(logits, seen, temperature, penalty, V);
  const int64 row = blockIdx.y;
  Best mine{-infinite(), 0x7fffffff};
  const int64 begin = (int64)blockIdx.x * SLICE, end = begin + SLICE < known ? begin + SLICE : known;
  each_token(r, begin, end, threadIdx.x, 256,
             [&](int64 id, float score) { mine.meet(score == score ? score : infinite(), (int)id); });
  mine = warp_best(mine);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x > 0) return;
  for (int w = 1; w < 8; w++) mine.meet(warps[w].score, warps[w].id);
  best_score[row * gridDim.x + blockIdx.x] = mine.score, best_id[row * gridDim.x + blockIdx.x] = mine.id;
}

// The row's best, in every thread of the first warp's; all threads call.
DEVICE Best whole_best(const float* score, const int* id, int64 row, int slices, Best* shared) {
  if (threadIdx.x < 32) {
    Best mine{-infinite(), 0x7fffffff};
    for (int s = threadIdx.x; s < slices; s += 32) mine.meet(score[row * slices + s], id[row * slices + s]);
    mine = warp_best(mine);
    if (threadIdx.x == 0) *shared = mine;
  }
  __syncthreads();
  return *shared;
}

DEVICE bool finite(float x) { return x - x == 0.0f; }

// Grid: x slices, y rows. counts, masses (rows, BINS), zeros before: sample_pick leaves them so.
extern "C" __global__ void __launch_bounds__(256)
sample_masses(const T* logits, const unsigned char* seen, const double* temperature, const double* penalty,
              const float* best_score, const int* best_id, int* counts, uint64* masses, int64 V, int64 known) {
  __shared__ int count[BINS];
  __shared__ uint32 low[BINS], high[BINS];  // of masses: adding 64 bits takes a loop
  __shared__ Best best;
  Row r = begin_row(logits, seen, temperature, penalty, V);
  const int64 row = blockIdx.y;
  if (r.inverse == 0.0f) return;
  for (int b = threadIdx.x; b < BINS; b += 256) count[b] = 0, low[b] = 0, high[b] = 0;
  r.best = whole_best(best_score, best_id, row, gridDim.x, &best).score;
  if (!finite(r.best)) return;
  const int64 begin = (int64)blockIdx.x * SLICE, end = begin + SLICE < known ? begin + SLICE : known;
  each_token(r, begin, end, threadIdx.x, 256, [&](int64, float score) {
    const float distance = r.distance(score);
    const int b = Row::bin(distance);
    if (b == BINS - 1) return;  // most of them, and never drawn
    atomicAdd(&count[b], 1);
    const uint64 mass = Row::mass(distance);
    atomicAdd(&low[b], (uint32)mass & 0xfffffu);
    atomicAdd(&high[b], (uint32)(mass >> 20));
  });
  __syncthreads();
  for (int b = threadIdx.x; b < BINS; b += 256) {
    if (count[b]) atomicAdd(&counts[row * BINS + b], count[b]);
    if (low[b] | high[b]) atomicAdd(&masses[row * BINS + b], ((uint64)high[b] << 20) + low[b]);
  }
}

// ---- Random numbers: number n of the stream `seed`, as numpy's Philox(key=seed, counter=n) begins.

DEVICE double uniform(uint64 seed, uint64 n) {
  uint64 c[4] = {n + 1, n + 1 == 0 ? 1ull : 0ull, 0, 0}, k0 = seed, k1 = 0;  // numpy counts on before it draws
#pragma unroll 1
  for (int round = 0; round < 10; round++) {
    const uint64 a = 0xD2E7470EE14C6C93ull, b = 0xCA5A826395121157ull;
    const uint64 high0 = __umul64hi(a, c[0]), low0 = a * c[0], high1 = __umul64hi(b, c[2]), low1 = b * c[2];
    const uint64 next[4] = {high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0};
    for (int i = 0; i < 4; i++) c[i] = next[i];
    k0 += 0x9E3779B97F4A7C15ull, k1 += 0xBB67AE8584CAA73Bull;
  }
  return (double)(c[0] >> 11) * 0x1p-53;
}

// With which mass, of all there is, top-p is reached: the token with which the sum goes beyond this is the last one kept.
DEVICE uint64 last_kept(double nucleus, uint64 all) {
  const double wanted = nucleus * (double)all;
  uint64 target = (uint64)wanted;
  if ((double)target == wanted && target > 0) target -= 1;
  return target < all ? target : all - 1;
}

// Which bins' tokens are gathered: those before `limit`, bin `extra`, and from `first` to `last`.
struct Listed {
  int filled, limit, extra, first, last, unused[3];
  DEVICE bool has(int bin) const { return bin < limit || bin == extra || (first <= bin && bin <= last); }
};

// Grid: x slices, y rows. The keys of the tokens in the bins that sample_pick will search, no more than LIST of them: as
// many of the best bins as there is room for. Where top-p alone reaches beyond them, the bin in which it ends and those in
// which the draw may lie, for what is kept is known but for a part of that bin. keys (rows, LIST); listed (rows),
// `filled` zero before.
extern "C" __global__ void __launch_bounds__(256)
sample_gather(const T* logits, const unsigned char* seen, const double* temperature, const double* top_p, const double* min_p,
              const double* penalty, const int64* top_k, const int64* seed, const int64* draws, const float* best_score,
              const int* best_id, const int* counts, const uint64* masses, uint64* keys, Listed* listed, int64 V, int64 known) {
  constexpr int OWN = (BINS - 1 + 255) / 256;  // bins of a thread
  __shared__ int warps[8], ends[2];            // ends: tokens before bin `first`, and with bin `last`
  __shared__ uint64 warp_masses[8], around[2];  // around: the mass before bin `extra`, and with it
  __shared__ uint64 own_keys[SLICE];
  __shared__ int own_filled, place;
  __shared__ Listed bins;
  __shared__ Best best;
  Row r = begin_row(logits, seen, temperature, penalty, V);
  const int64 row = blockIdx.y;
  if (r.inverse == 0.0f) return;
  if (threadIdx.x == 0) bins = {0, BINS - 1, -1, 0, -1}, own_filled = 0;
  r.best = whole_best(best_score, best_id, row, gridDim.x, &best).score;
  if (!finite(r.best)) return;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, first = threadIdx.x * OWN;
  int count[OWN], tokens = 0;
  uint64 mass[OWN], weight = 0, all = 0;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    const bool here = first + i < BINS - 1;
    tokens += count[i] = here ? counts[row * BINS + first + i] : 0;
    weight += mass[i] = here ? masses[row * BINS + first + i] : 0;
  }
  int until = tokens;
  uint64 until_mass = weight;
#pragma unroll
  for (int other = 1; other < 32; other *= 2) {
    const int left = __shfl_up_sync(0xffffffffu, until, other);
    const uint64 left_mass = __shfl_up_sync(0xffffffffu, until_mass, other);
    if (lane >= other) until += left, until_mass += left_mass;
  }
  if (lane == 31) warps[warp] = until, warp_masses[warp] = until_mass;
  __syncthreads();
  for (int w = 0; w < 8; w++) {
    if (w < warp) until += warps[w], until_mass += warp_masses[w];
    all += warp_masses[w];
  }
  // The first of the thread's bins whose mass goes beyond `target`, -1: none; the mass and the tokens before it.
  const auto beyond = [&](uint64 target, uint64& before, int& before_count) {
    before = until_mass - weight, before_count = until - tokens;
    int found = -1;
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      if (found >= 0) continue;
      if (before <= target && target < before + mass[i]) found = i;
      else before += mass[i], before_count += count[i];
    }
    return found;
  };
  uint64 before;
  int before_count = until - tokens;
#pragma unroll
  for (int i = 0; i < OWN; i++) {
    if (before_count <= LIST && before_count + count[i] > LIST) bins.limit = first + i;  // the first bin that is left out
    before_count += count[i];
  }
  const double nucleus = top_p[row];
  const int64 k = top_k[row];
  if (nucleus < 1.0 && !(k > 0 && k < known) && !(min_p[row] > 0.0)) {  // the same for all threads
    const int end = beyond(last_kept(nucleus, all), before, before_count);
    if (end >= 0) {
      bins.extra = first + end;
#pragma unroll
      for (int i = 0; i < OWN; i++)
        if (i == end) around[0] = before, around[1] = before + mass[i];
    }
    __syncthreads();
    if (bins.extra >= bins.limit) {
      const double u = uniform((uint64)seed[row], (uint64)draws[row]);
#pragma unroll
      for (int side = 0; side < 2; side++) {
        uint64 target = (uint64)(u * (double)around[side]);
        if (target >= around[1]) target = around[1] - 1;
        const int bin = beyond(target, before, before_count);
        if (bin < 0) continue;
        (side ? bins.last : bins.first) = first + bin;
        ends[side] = before_count;
#pragma unroll
        for (int i = 0; i < OWN; i++)
          if (side && i == bin) ends[side] += count[i];
      }
      __syncthreads();
      if (threadIdx.x == 0) {
        const int own = counts[row * BINS + bins.extra], range = ends[1] - ends[0];
        if (own + range > LIST) bins.last = -1;
        if (own > LIST) bins.extra = -1;
        else bins.limit = 0;
      }
    } else {
      __syncthreads();
      if (threadIdx.x == 0) bins.extra = -1;
    }
  }
  __syncthreads();
  const int64 begin = (int64)blockIdx.x * SLICE, end = begin + SLICE < known ? begin + SLICE : known;
  const Listed wanted = bins;
  each_token(r, begin, end, threadIdx.x, 256, [&](int64 id, float score) {
    const int b = Row::bin(r.distance(score));
    if (b < BINS - 1 && wanted.has(b)) own_keys[atomicAdd(&own_filled, 1)] = key_of(score, id);
  });
  __syncthreads();
  if (threadIdx.x == 0) {
    place = atomicAdd(&listed[row].filled, own_filled);
    if (blockIdx.x == 0) {
      listed[row].limit = wanted.limit, listed[row].extra = wanted.extra;
      listed[row].first = wanted.first, listed[row].last = wanted.last;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < own_filled; i += 256) keys[row * LIST + place + i] = own_keys[i];
}

// ---- Thresholds

constexpr int THREADS = 1024;
constexpr int DIGIT = 8, DIGITS = 1 << DIGIT;
#ifdef MOAI_HOST
#define OUT_OF_LINE inline
#else
#define OUT_OF_LINE __device__ __noinline__
#endif

struct Work {
  uint64 digit[DIGITS], scan[THREADS / 32], found, before;
  uint64 keys[LIST];
  int chosen, filled, bin;  // bin: whose keys are in the list; -1: none
  Best best;
};

// What a token counts for: one, or its mass if its key isn't below `least` nor its weight below `floor`.
struct Value {
  bool counting;
  uint64 least;
  float floor;
  DEVICE uint64 operator()(uint64 key, float distance) const {
    if (counting) return 1;
    return key >= least && Row::weight(distance) >= floor ? Row::mass(distance) : 0;
  }
};

// All functions are for all threads of the block, which get the same answers.
struct Picker {
  const Row& r;
  Work& w;
  const int* counts;
  const uint64* masses;
  const uint64* keys;  // of the tokens in the bins that `listed` has
  Listed listed;
  int64 known;

  // The first of n <= 2 THREADS values that takes their sum beyond `target`, n if none does; `before`: the sum in front
  // of it.
  template <class F>
  DEVICE int beyond(int n, uint64 target, uint64& before, F value) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = 2 * threadIdx.x;
    const uint64 one = i < n ? value(i) : 0, two = i + 1 < n ? value(i + 1) : 0;
    uint64 until = one + two;
    for (int other = 1; other < 32; other *= 2) {
      const uint64 left = __shfl_up_sync(0xffffffffu, until, other);
      if (lane >= other) until += left;
    }
    __syncthreads();
    if (lane == 31) w.scan[warp] = until;
    if (threadIdx.x == 0) w.chosen = n;
    __syncthreads();
    if (warp == 0) {
      uint64 sum = w.scan[lane];
      const uint64 own = sum;
      for (int other = 1; other < 32; other *= 2) {
        const uint64 left = __shfl_up_sync(0xffffffffu, sum, other);
        if (lane >= other) sum += left;
      }
      w.scan[lane] = sum - own;
    }
    __syncthreads();
    until += w.scan[warp];
    const uint64 from = until - one - two;
    if (from <= target && until > target) {
      w.chosen = from + one > target ? i : i + 1;
      w.before = from + one > target ? from : from + one;
    }
    __syncthreads();
    if (threadIdx.x == THREADS - 1 && w.chosen == n) w.before = until;
    __syncthreads();
    before = w.before;
    return w.chosen;
  }

  // f(key, distance) for each token of a bin, by whoever has it.
  template <class F>
  DEVICE void scan_row(int bin, F f) {
    each_token<1>(r, 0, known, threadIdx.x, THREADS, [&](int64 id, float score) {
      const float distance = r.distance(score);
      if (Row::bin(distance) == bin) f(key_of(score, id), distance);
    });
  }
  // The keys of a bin's tokens, at most LIST, come to w.keys.
  DEVICE void load(int bin) {
    if (w.bin == bin) return;  // the same for all threads: it changes between barriers only
    __syncthreads();
    if (threadIdx.x == 0) w.filled = 0, w.bin = bin;
    __syncthreads();
    const auto keep = [&](uint64 key) { w.keys[atomicAdd(&w.filled, 1)] = key; };
    if (listed.has(bin)) {
      for (int i = threadIdx.x; i < listed.filled; i += THREADS)
        if (Row::bin(distance_of(keys[i])) == bin) keep(keys[i]);
    } else {
      scan_row(bin, [&](uint64 key, float) { keep(key); });
    }
    __syncthreads();
  }
  template <class F>
  DEVICE void each(int bin, F f) {
    const int count = counts[bin];
    if (count == 0) return;
    if (count > LIST) return scan_row(bin, f);
    load(bin);
    for (int i = threadIdx.x; i < count; i += THREADS) f(w.keys[i], distance_of(w.keys[i]));
  }

  DEVICE float distance_of(uint64 key) const {
    const uint32 ordered = (uint32)(key >> 32);
    return r.distance(bits_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered));
  }

  // The sum of a bin's values.
  OUT_OF_LINE uint64 sum(int bin, Value value) {
    __syncthreads();
    if (threadIdx.x == 0) w.found = 0;
    __syncthreads();
    uint64 mine = 0;
    each(bin, [&](uint64 key, float distance) { mine += value(key, distance); });
    if (mine) atomicAdd(&w.found, mine);
    __syncthreads();
    return w.found;
  }

  // The mass of all bins before `last` and of bin `last` by `value`.
  DEVICE uint64 total(int last, Value value) {
    const bool all = value.least == 0 && value.floor == 0.0f;
    uint64 before;
    beyond(BINS, ~0ull, before, [&](int b) { return b < last || (all && b == last) ? masses[b] : 0; });
    const uint64 whole = before;
    return all ? whole : whole + sum(last, value);
  }

  // The sum of a value of each thread. Two sums in a row use two places.
  DEVICE uint64 add_all(uint64 mine, int place) {
    for (int other = 16; other > 0; other /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, other);
    if (threadIdx.x % 32 == 0) w.digit[place * 32 + threadIdx.x / 32] = mine;
    __syncthreads();
    mine = w.digit[place * 32 + threadIdx.x % 32];
    for (int other = 16; other > 0; other /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, other);
    return mine;
  }

  // As key_beyond, where a thread has one token, or none: `mine` 0. Bit by bit of the score first; tokens of a score have
  // one value, or come behind those that have it with 0, so that counting finds the id.
  OUT_OF_LINE uint64 key_of_few(uint64 key, uint64 mine, uint64 target) {
    const uint32 score = (uint32)(key >> 32), id = (uint32)key;
    __syncthreads();
    if (threadIdx.x == 0) w.found = 0, w.before = 0;
    __syncthreads();
    // Bits in which scores differ.
    const uint32 ones = __reduce_or_sync(0xffffffffu, mine ? score : 0u), zeros = __reduce_or_sync(0xffffffffu, mine ? ~score : 0u);
    if (threadIdx.x % 32 == 0) atomicOr((unsigned*)&w.found, ones), atomicOr((unsigned*)&w.before, zeros);
    __syncthreads();
    const uint32 differ = (uint32)w.found & (uint32)w.before;
    bool in = mine > 0;
    int place = 0;
    for (uint32 rest = differ; rest;) {
      const uint32 bit = 0x80000000u >> __clz(rest);
      rest ^= bit;
      const uint64 sum = add_all(in && score & bit ? mine : 0, place ^= 1);
      if (target >= sum) target -= sum, in = in && !(score & bit);
      else in = in && score & bit;
    }
    // What is left has one score.
    __syncthreads();
    if (in) w.before = mine;
    __syncthreads();
    int nth = (int)(target / w.before);
    for (uint32 bit = 0x80000000u >> __clz((uint32)known); bit; bit >>= 1) {
      const int count = __syncthreads_count(in && id & bit);
      if (nth >= count) nth -= count, in = in && !(id & bit);
      else in = in && id & bit;
    }
    if (in) w.found = key;
    __syncthreads();
    return w.found;
  }

  // Tokens of a bin from the largest key down: the key of the first whose value takes the sum beyond `target`, digit by
  // digit. The bin's sum is beyond it.
  OUT_OF_LINE uint64 key_beyond(int bin, uint64 target, Value value) {
    const int count = counts[bin], own = threadIdx.x;
    if (count <= THREADS) {  // few: a thread for each
      load(bin);
      uint64 key = 0, mine = 0;
      if (own < count) key = w.keys[own], mine = value(key, distance_of(key));
      return key_of_few(key, mine, target);
    }
    uint64 prefix = 0;
    for (int shift = 64 - DIGIT; shift >= 0; shift -= DIGIT) {
      __syncthreads();
      for (int d = threadIdx.x; d < DIGITS; d += THREADS) w.digit[d] = 0;
      __syncthreads();
      each(bin, [&](uint64 key, float distance) {
        if (shift + DIGIT < 64 && key >> (shift + DIGIT) != prefix >> (shift + DIGIT)) return;
        if (const uint64 v = value(key, distance)) atomicAdd(&w.digit[key >> shift & (DIGITS - 1)], v);
      });
      __syncthreads();
      uint64 before;
      const int place = beyond(DIGITS, target, before, [&](int i) { return w.digit[DIGITS - 1 - i]; });
      target -= before;
      prefix |= (uint64)(DIGITS - 1 - place) << shift;
    }
    return prefix;
  }

  // The token with which the mass of those before goes beyond `target`, in the order of keys, where all bins before
  // `last` count whole and bin `last` by `value`. `bin` becomes its bin.
  DEVICE uint64 heaviest_beyond(uint64 target, int last, Value value, int& bin) {
    uint64 before;
    bin = beyond(last + 1, target, before, [&](int b) { return b < last ? masses[b] : ~0ull >> 1; });
    return key_beyond(bin, target - before, bin < last ? Value{false, 0, 0.0f} : value);
  }
};

// Grid: a block a row. Writes the token (-1 where logits aren't finite), counts the draw, marks the token as seen.
extern "C" __global__ void __launch_bounds__(THREADS)
sample_pick(const T* logits, unsigned char* seen, const double* temperature, const double* top_p, const double* min_p,
            const double* penalty, const int64* top_k, const int64* seed, int64* draws, const float* best_score,
            const int* best_id, int* counts, uint64* masses, const uint64* keys, Listed* listed, int64* token, int64 slices,
            int64 V, int64 known) {
  extern __shared__ uint64 shared[];
  Work& w = *reinterpret_cast<Work*>(shared);
  wait_for_previous();
  let_next_begin();
  const int64 row = blockIdx.x;
  Row r = row_of(logits, seen, temperature, penalty, row, V);
  if (threadIdx.x == 0) w.bin = -1;
  const Best best = whole_best(best_score, best_id, row, (int)slices, &w.best);
  r.best = best.score;
  int64 chosen = best.id;
  if (!finite(best.score)) {
    if (threadIdx.x == 0) token[row] = -1;
    return;
  }
  if (r.inverse > 0.0f) {
    counts += row * BINS, masses += row * BINS;
    Picker p{r, w, counts, masses, keys + row * LIST, listed[row], known};
    Value kept{false, 0, 0.0f};  // what is kept in bin `last`; of those before, all
    int last = BINS - 2;
    uint64 before;
    const int64 k = top_k[row];
    const double nucleus = top_p[row];
    if (k > 0 && k < known) {
      const int b = p.beyond(BINS - 1, k - 1, before, [&](int b) { return (uint64)counts[b]; });
      if (b < BINS - 1) {  // and all of the same score
        const uint64 rest = k - 1 - before;
        kept.least = p.key_beyond(b, rest, Value{true, 0, 0.0f}) >> 32 << 32, last = b;
      }
    }
    if (nucleus < 1.0) {
      const uint64 all = p.total(last, kept);
      int b;
      const uint64 least = p.heaviest_beyond(last_kept(nucleus, all), last, kept, b);
      kept.least = least, last = b;
    }
    if (min_p[row] > 0.0) {
      kept.floor = (float)min_p[row];
      const int b = Row::bin(-log2_approx(kept.floor));
      if (b < last) last = b, kept.least = 0;
    }
    const uint64 all = p.total(last, kept);
    uint64 target = (uint64)(uniform((uint64)seed[row], (uint64)draws[row]) * (double)all);
    if (target >= all) target = all - 1;
    if (nucleus < 1.0) {  // in the order of the scores
      int b;
      chosen = (int64)(uint32)~(uint32)p.heaviest_beyond(target, last, kept, b);
    } else {  // in the order of the ids: first in which of 2 THREADS runs of the vocabulary, then token by token
      const auto mass = [&](int64 id, float score) {
        const float distance = r.distance(score);
        const int b = Row::bin(distance);
        return b > last ? 0 : b < last ? Row::mass(distance) : kept(key_of(score, id), distance);
      };
      const int64 run = ((known + 31) / 32 + PIECE - 1) / PIECE * PIECE;  // a warp's
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      const int64 begin = warp * run, end = begin + run < known ? begin + run : known;
      uint64 mine = 0;
      each_token<1>(r, begin, end, lane, 32, [&](int64 id, float score) { mine += mass(id, score); });
      for (int other = 16; other > 0; other /= 2) mine += __shfl_xor_sync(0xffffffffu, mine, other);
      __syncthreads();
      if (lane == 0) w.digit[warp] = mine;
      __syncthreads();
      const int64 first = p.beyond(32, target, before, [&](int i) { return w.digit[i]; }) * run;
      target -= before;
      const int64 behind = first + run < known ? first + run : known, share = (run + 2 * THREADS - 1) / (2 * THREADS);
      const auto part = [&](int i) {
        uint64 sum = 0;
        for (int64 id = first + i * share; id < first + (i + 1) * share && id < behind; id++) sum += mass(id, r.score(id));
        return sum;
      };
      const int64 from = first + p.beyond(2 * THREADS, target, before, part) * share;
      uint64 sum = before;
      for (chosen = from; chosen < behind - 1; chosen++)
        if ((sum += mass(chosen, r.score(chosen))) > target) break;
    }
    __syncthreads();
    for (int b = threadIdx.x; b < BINS; b += THREADS) counts[b] = 0, masses[b] = 0;
    if (threadIdx.x == 0) draws[row] += 1, listed[row].filled = 0;
  }
  if (threadIdx.x > 0) return;
  token[row] = chosen;
  if (r.seen) seen[row * V + chosen] = 1;
}
