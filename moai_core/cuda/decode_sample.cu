// moai: kernels sample_best, sample_masses, sample_pick; macros T=bf16 | T=float | T=fp16
//
// The next token of each row from its logits, as generation/sampling.py defines it: repetition penalty, temperature,
// top-k, top-p, min-p, and the number of the row's own random stream (Philox 4x64-10) looked up in the distribution.
// There in float64; here scores are fp32, and a token's weight, exp((score - best) / temperature), is an integer in
// units of 2^-40 of the best one's: sums of integers don't depend on their order, so that thousands of threads give
// the same token in every run.
//
//   sample_best    slices of the vocabulary: the largest score and where it first occurs
//   sample_masses  slices: how many tokens, and how much weight, at each distance from the best
//   sample_pick    a block a row: the filters' thresholds, the draw
//
// Tokens are ordered by score, equal ones by id. So every filter keeps the tokens up to a threshold in that order: a
// key, score before id, as one integer. It is found in the bin of distances in which it must lie. One way through the
// row lists the tokens of that bin, and of those in which the draw may lie; few of them are compared each with each,
// many are spread over parts of the range of their keys first. A bin of too many is searched where it is.
//
// What a kernel reads before its wait: settings, what the last step left, and what the kernel before the previous one
// wrote. For the previous one's blocks have all waited for that, or this kernel wouldn't have begun. Logits may come
// from the first cache: no kernel of a step reads them before they are written.
//
//   T  type of the logits
#include "gemv.cuh"

using uint64 = unsigned long long;

constexpr int PIECE = 16 / sizeof(T);
constexpr int SHARE = 16;   // tokens of a thread of sample_best and sample_masses
constexpr int BINS = 1312;  // of 1/32 of a factor of two: down to 2^-41
constexpr float UNIT = 1099511627776.0f;  // 2^40
constexpr uint64 MOST = (1ull << 40) - 1;  // of a token
constexpr uint32 WARP = 0xffffffffu;

DEVICE float infinite() { return bits_float(0x7f800000u); }
DEVICE bool finite(float x) { return x - x == 0.0f; }

#ifdef MOAI_HOST
#define OUT_OF_LINE inline
#else
#define OUT_OF_LINE __device__ __noinline__  // what is rare mustn't lie in the way: instructions come from memory too
#endif

OUT_OF_LINE float penalize(const unsigned char* seen, int id, float x, float penalty) {
  return seen[id] ? (x < 0.0f ? x * penalty : x / penalty) : x;
}

// PIECE logits of a row that isn't aligned, zeros from `end`.
OUT_OF_LINE Words read_ragged(const T* logits, int id, int end) {
  Vec<T, PIECE> x{};
#pragma unroll
  for (int i = 0; i < PIECE; i++)
    if (id + i < end) x.at[i] = logits[id + i];
  return *reinterpret_cast<const Words*>(&x);
}

struct Row {
  const T* logits;
  const unsigned char* seen;  // null without a penalty
  int V;
  float penalty, inverse;  // inverse: log2(e) / temperature
  float below, above;      // what a penalty can multiply a logit by, below zero and above
  float best;

  DEVICE float score(int id) const {
    const float x = to_float(logits[id]);
    return seen ? penalize(seen, id, x, penalty) : x;
  }
  // Powers of two below the best.
  DEVICE float distance(float score) const { return (best - score) * inverse; }
  // In one of the first `bound` bins.
  DEVICE bool near(float score, int bound) const { return distance(score) * 32.0f < (float)bound; }
  // Logits below this are none of the first `bound` bins', whatever a penalty does to them; rounding is allowed for.
  DEVICE float reach(int bound) const {
    const float score = best - (float)bound / (inverse * 32.0f) * 1.00001f - fabsf(best) * 1e-6f;
    return score / (score < 0.0f ? below : above);
  }
  // Logits above this are none of bin `first` or a later one, unless a penalty makes them so.
  DEVICE float ceiling(int first) const {
    if (seen || first == 0) return infinite();
    return best - (float)first / (inverse * 32.0f) * 0.99999f + fabsf(best) * 1e-6f;
  }
  DEVICE static float weight(float distance) { return exp2_approx(-distance); }
  DEVICE static uint64 mass(float distance) {
    const uint64 whole = (uint64)(weight(distance) * UNIT);
    return whole < MOST ? whole : MOST;
  }
  DEVICE static int bin(float distance) { return distance < (BINS - 1) / 32.0f ? (int)(distance * 32.0f) : BINS - 1; }
};

// Larger for larger scores; among equal scores for smaller ids.
DEVICE uint64 key_of(float score, int id) {
  const uint32 bits = float_bits(score + 0.0f);  // -0 counts as 0
  const uint32 ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (uint64)ordered << 32 | ~(uint32)id;
}

DEVICE float score_of(uint64 key) {
  const uint32 ordered = (uint32)(key >> 32);
  return bits_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// Without `inverse`, which takes a division of float64.
DEVICE Row row_of(const T* logits, const unsigned char* seen, const double* penalty, int row, int64 V) {
  const double exact = penalty[row];
  const float p = (float)exact;
  const bool raises = p < 1.0f;
  return {logits + row * V, exact != 1.0 ? seen + row * V : nullptr, (int)V, p, 0.0f, raises ? p * 0.999999f : 1.0f,
          raises ? 1.000001f / p : 1.0f, 0.0f};
}

// Temperature 0 takes the best.
DEVICE float inverse_of(double temperature) {
  return temperature > 0.0 ? (float)fmin(1.4426950408889634 / temperature, 1e30) : 0.0f;
}

// Logits `id` to id + PIECE - 1, zeros from `end`; 16 bytes at once where rows allow it.
DEVICE Words read(const Row& r, int id, int end) {
  if (r.V % PIECE) return read_ragged(r.logits, id, end);
  return id < end ? load_vec<uint32, 4>((const uint32*)(r.logits + id)) : Words{};
}

DEVICE float largest(const Words& words) {
  float x[PIECE], most;
  unpack<T>(x, words);
  most = x[0];
#pragma unroll
  for (int i = 1; i < PIECE; i++) most = fmaxf(most, x[i]);
  return most;
}

// A thread's tokens of a slice, blockIdx.x, all asked for at once.
struct Share {
  Words x[SHARE / PIECE];
  int first, end;

  DEVICE Share(const Row& r, int known) {
    const int begin = blockIdx.x * SHARE * blockDim.x, behind = begin + SHARE * blockDim.x;
    first = begin + threadIdx.x * PIECE, end = behind < known ? behind : known;
#pragma unroll
    for (int k = 0; k < SHARE / PIECE; k++) x[k] = read(r, first + k * blockDim.x * PIECE, end);
  }
  // f(id, score), ids from small to large.
  template <class F>
  DEVICE void each(const Row& r, F f) {
    int id = first;
#pragma unroll 1
    for (int k = 0; k < SHARE / PIECE; k++, id += blockDim.x * PIECE) {
      float own[PIECE];
      unpack<T>(own, x[0]);
#pragma unroll
      for (int i = 1; i < SHARE / PIECE; i++) x[i - 1] = x[i];
      if (!r.seen && id + PIECE <= end) {
#pragma unroll
        for (int i = 0; i < PIECE; i++) f(id + i, own[i]);
      } else {
#pragma unroll 1
        for (int i = id; i < id + PIECE && i < end; i++) f(i, r.score(i));
      }
    }
  }
};

// Which of PIECE logits reach `least`, a bit each.
DEVICE uint32 reaching(const Words& words, float least) {
  float x[PIECE];
  unpack<T>(x, words);
  uint32 found = 0;
#pragma unroll
  for (int i = 0; i < PIECE; i++) found |= (uint32)(x[i] >= least) << i;
  return found;
}

// f(id, score, distance) for the tokens of `near`, a bit each, from `id` on that are in one of the first `bound` bins.
template <class F>
DEVICE void each_near(const Row& r, uint32 near, int id, int end, int bound, F f) {
  if (end - id < PIECE) near &= (1u << (end - id)) - 1;
#pragma unroll 1
  for (; near; near &= near - 1) {
    const int own = id + __ffs((int)near) - 1;
    const float score = r.score(own);
    if (r.near(score, bound)) f(own, score, r.distance(score));
  }
}

// So for the tokens from `begin`, a multiple of PIECE, to `end`, by `threads` threads of which this is number `thread`.
// MANY: most of them are near, and f is short.
template <bool MANY, class F>
DEVICE void each_token(const Row& r, int begin, int end, int bound, int thread, int threads, F f) {
  constexpr int AHEAD = 4;  // loads under way, for a block alone waits for each
  const int step = threads * PIECE;
  const float least = r.reach(bound);
  int id = begin + thread * PIECE;
  Words next[AHEAD];
#pragma unroll
  for (int k = 0; k < AHEAD; k++) next[k] = read(r, id + k * step, end);
#pragma unroll 1  // more of them cost seconds of compilation
  for (; id < end; id += step) {
    const Words x = next[0];
#pragma unroll
    for (int k = 1; k < AHEAD; k++) next[k - 1] = next[k];
    next[AHEAD - 1] = read(r, id + AHEAD * step, end);
    if (!(largest(x) >= least)) continue;
    if (MANY && !r.seen && id + PIECE <= end) {
      float own[PIECE];
      unpack<T>(own, x);
#pragma unroll
      for (int i = 0; i < PIECE; i++)
        if (r.near(own[i], bound)) f(id + i, own[i], r.distance(own[i]));
    } else {
      each_near(r, reaching(x, least), id, end, bound, f);
    }
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
    const float score = __shfl_xor_sync(WARP, mine.score, other);
    const int id = __shfl_xor_sync(WARP, mine.id, other);
    mine.meet(score, id);
  }
  return mine;
}

// Grid: x slices, y rows. best (rows, slices): NaN counts as infinity, which stops the row.
extern "C" __global__ void __launch_bounds__(1024)
sample_best(const T* logits, const unsigned char* seen, const double* penalty, float* best_score, int* best_id, int64 V,
            int64 known) {
  __shared__ Best warps[32];
  const int row = blockIdx.y;
  const Row r = row_of(logits, seen, penalty, row, V);
  if (threadIdx.x < 32) warps[threadIdx.x] = {-infinite(), 0x7fffffff};
  wait_for_previous();
  let_next_begin();
  Share share(r, (int)known);
  __syncthreads();
  Best mine{-infinite(), 0x7fffffff};
  share.each(r, [&](int id, float score) {
    if (!(score <= mine.score)) mine = {score == score ? score : infinite(), id};  // ids rise: of equal ones the first
  });
  mine = warp_best(mine);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = mine;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  mine = warp_best(warps[threadIdx.x]);
  if (threadIdx.x > 0) return;
  best_score[row * gridDim.x + blockIdx.x] = mine.score, best_id[row * gridDim.x + blockIdx.x] = mine.id;
}

// The row's best, in every thread, each warp for itself.
DEVICE Best whole_best(const float* score, const int* id, int row, int slices) {
  Best mine{-infinite(), 0x7fffffff};
  for (int s = threadIdx.x % 32; s < slices; s += 32)
    mine.meet(load_fresh_float(score + row * slices + s),
              (int)float_bits(load_fresh_float((const float*)id + row * slices + s)));
  return warp_best(mine);
}

// 64 bits in two words of shared memory: adding them in one takes a loop.
DEVICE void add_wide(uint32* low, uint32* high, int at, uint64 value) {
  const uint32 part = (uint32)value, carry = atomicAdd(&low[at], part) + part < part;
  if (const uint32 rest = (uint32)(value >> 32) + carry) atomicAdd(&high[at], rest);
}

// Grid: x slices, y rows. counts, masses (rows, BINS), zeros before: sample_pick leaves them so.
extern "C" __global__ void __launch_bounds__(1024)
sample_masses(const T* logits, const unsigned char* seen, const double* temperature, const double* penalty,
              const float* best_score, const int* best_id, int* counts, uint64* masses, int64 V, int64 known) {
  __shared__ int count[BINS];
  __shared__ uint32 low[BINS], high[BINS];  // of masses
  const int row = blockIdx.y;
  Row r = row_of(logits, seen, penalty, row, V);
  r.inverse = inverse_of(temperature[row]);
  Share share(r, (int)known);  // from before sample_best
  for (int b = threadIdx.x; b < BINS; b += blockDim.x) count[b] = 0, low[b] = 0, high[b] = 0;
  __syncthreads();
  wait_for_previous();
  let_next_begin();
  if (r.inverse == 0.0f) return;
  r.best = whole_best(best_score, best_id, row, gridDim.x).score;
  if (!finite(r.best)) return;
  share.each(r, [&](int, float score) {
    const float distance = r.distance(score);
    const int b = Row::bin(distance);
    if (b == BINS - 1) return;  // never drawn
    atomicAdd(&count[b], 1);
    if (const uint64 mass = Row::mass(distance)) add_wide(low, high, b, mass);
  });
  __syncthreads();
  for (int b = threadIdx.x; b < BINS; b += blockDim.x) {
    if (count[b] == 0) continue;
    atomicAdd(&counts[row * BINS + b], count[b]);
    if (low[b] | high[b]) atomicAdd(&masses[row * BINS + b], (uint64)high[b] << 32 | low[b]);
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

// With which mass, of all there is, top-p is reached: the token with which the sum goes beyond this is the last one
// kept.
DEVICE uint64 last_kept(double nucleus, uint64 all) {
  const double wanted = nucleus * (double)all;
  uint64 target = (uint64)wanted;
  if ((double)target == wanted && target > 0) target -= 1;
  return target < all ? target : all - 1;
}

// ---- Thresholds

constexpr int THREADS = 512;  // fewer wait for each other less, more read faster
constexpr int WARPS = THREADS / 32;
constexpr int LIST = 4096;                     // tokens that are listed
constexpr int FEW = 256;                       // tokens that are compared each with each
constexpr int TEAM = THREADS / FEW;            // threads that compare one
constexpr int PARTS = THREADS, PART_BITS = 9;  // of a range of keys
constexpr int GROUPS = 64 / sizeof(T);         // of pieces of a row, whose largest logit a thread remembers
constexpr int OWN = 4;                         // bins of a thread, as long as there are any

struct Sum {
  uint64 mass;
  int tokens;
};

// What is done with the tokens of a bin.
struct Task {
  enum What { RANGE, SPREAD, COMPARE, ADD } what;
  int bin;
  uint64 low, high;  // keys that count
  int shift;         // a part has 2^shift of the keys from `high` down
  bool counting;     // a token counts for one, not for its mass
  float floor;       // weights that count
};

struct Work {
  T most[GROUPS / PIECE][THREADS][PIECE];  // the largest logits of a thread's groups
  uint64 before[BINS + 1];                 // the mass in front of a bin
  uint64 keys[LIST];
  uint64 few[FEW], values[FEW];
  int few_bins[FEW];
  uint64 key, front;  // what was found, and the values in front of it
  double number;      // of the random stream
  Sum warps[WARPS];
  Row row;
  Task task;
  int tokens[BINS + 1];  // in front of a bin
  uint32 low[PARTS], high[PARTS];
  int count[PARTS];
  int first, last, extra;  // bins whose tokens are listed
  int filled, picked, part, left, bins[2];
};

constexpr int WORK = 97 << 10;  // as decode_choice.py has it
static_assert(sizeof(Work) <= WORK, "shared memory of sample_pick");

DEVICE bool listed(const Work& w, int bin) { return (w.first <= bin && bin <= w.last) || bin == w.extra; }
DEVICE int tokens_of(const Work& w, int bin) { return w.tokens[bin + 1] - w.tokens[bin]; }

// Functions are for all threads of the block, which get the same answers, but for `work`.

// w.task, by the tokens that this thread comes upon: in the list, or in the row. Returns its sum (ADD), or its largest
// and its smallest score (RANGE).
OUT_OF_LINE uint64 work(Work& w, int known) {
  const Row r = w.row;
  const Task task = w.task;
  uint32 most = 0, least = ~0u;
  uint64 sum = 0;
  const auto take = [&](uint64 key, float distance) {
    if (key < task.low || key > task.high) return;
    const uint64 value = task.counting ? 1 : Row::mass(distance);
    if (task.what == Task::COMPARE) {
      const int place = atomicAdd(&w.picked, 1);
      w.few[place] = key, w.values[place] = value;
    } else if (task.what == Task::SPREAD) {
      const int part = (int)((task.high - key) >> task.shift);
      atomicAdd(&w.count[part], 1);
      add_wide(w.low, w.high, part, value);
    } else if (task.what == Task::RANGE) {
      const uint32 score = (uint32)(key >> 32);
      most = score > most ? score : most, least = score < least ? score : least;
    } else if (Row::weight(distance) >= task.floor) {
      sum += value;
    }
  };
  if (listed(w, task.bin)) {
    for (int i = threadIdx.x; i < w.filled; i += THREADS) {
      const uint64 key = w.keys[i];
      const float distance = r.distance(score_of(key));
      if (Row::bin(distance) == task.bin) take(key, distance);
    }
  } else {
    each_token<false>(r, 0, known, task.bin + 1, threadIdx.x, THREADS, [&](int id, float score, float distance) {
      if (Row::bin(distance) == task.bin) take(key_of(score, id), distance);
    });
  }
  return task.what == Task::RANGE ? (uint64)most << 32 | least : sum;
}

DEVICE uint64 run(Work& w, Task task, int known) {
  if (threadIdx.x == 0) w.task = task, w.picked = 0;
  if (task.what == Task::SPREAD) w.count[threadIdx.x] = 0, w.low[threadIdx.x] = 0, w.high[threadIdx.x] = 0;
  __syncthreads();
  const uint64 mine = work(w, known);
  __syncthreads();
  return mine;
}

// Pieces of a group, of which a thread has GROUPS.
DEVICE int pieces(int known) { return (known + GROUPS * THREADS * PIECE - 1) / (GROUPS * THREADS * PIECE); }

// The largest logit of each group that this thread comes upon in `collect`.
DEVICE void look(Work& w, const Row& r, int known) {
  const int all = pieces(known);
  float most = -infinite();
  int group = 0, left = all;
#pragma unroll 4
  for (int k = 0; k < GROUPS * all; k++) {
    most = fmaxf(most, largest(read(r, (k * THREADS + (int)threadIdx.x) * PIECE, known)));
    if (--left > 0) continue;
    w.most[group / PIECE][threadIdx.x][group % PIECE] = from_float<T>(most);
    most = -infinite(), left = all, group++;
  }
}

// The tokens of bins `first` to `last` and `extra`, at most LIST, are listed, and no others.
DEVICE void collect(Work& w, const Row& r, int first, int last, int extra, int known) {
  __syncthreads();
  if (threadIdx.x == 0) w.first = first, w.last = last, w.extra = extra, w.filled = 0;
  __syncthreads();
  const int bound = (last > extra ? last : extra) + 1, all = pieces(known);
  const float least = r.reach(bound), range_least = r.reach(last + 1), range_most = r.ceiling(first);
  const float extra_most = r.ceiling(extra), extra_least = r.reach(extra + 1);
  uint32 near = 0;  // groups
#pragma unroll 1
  for (int from = 0; from < GROUPS; from += PIECE)
    near |= reaching(*reinterpret_cast<const Words*>(w.most[from / PIECE][threadIdx.x]), least) << from;
  int piece = 0;  // of the group
  const auto next = [&]() {
    if (!near) return known;
    const int begin = (((__ffs((int)near) - 1) * all + piece) * THREADS + (int)threadIdx.x) * PIECE;
    if (++piece == all) piece = 0, near &= near - 1;
    return begin;
  };
#pragma unroll 1
  while (near) {
    int begin = next(), behind = next();  // two, since each is waited for
    Words own = read(r, begin, known), then = read(r, behind, known);
#pragma unroll 1
    for (int turn = 0; turn < 2 && begin < known; turn++, begin = behind, own = then) {
      float x[PIECE];
      unpack<T>(x, own);
      uint32 found = 0;
#pragma unroll
      for (int i = 0; i < PIECE; i++) {
        const bool ranged = x[i] >= range_least && x[i] <= range_most;
        found |= (uint32)(ranged || (x[i] >= extra_least && x[i] <= extra_most)) << i;
      }
      each_near(r, found, begin, known, bound, [&](int id, float score, float distance) {
        const int bin = Row::bin(distance);
        if ((first <= bin && bin <= last) || bin == extra) w.keys[atomicAdd(&w.filled, 1)] = key_of(score, id);
      });
    }
  }
  __syncthreads();
}

// A bin's tokens are listed if there is room for them, and all better ones if there is room for those too.
OUT_OF_LINE void list(Work& w, int bin, int known) {
  if (listed(w, bin) || tokens_of(w, bin) > LIST) return;
  collect(w, w.row, w.tokens[bin + 1] <= LIST ? 0 : bin, bin, -1, known);
}

// The sum over the threads in front of this one.
DEVICE Sum in_front(Work& w, Sum mine) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  Sum until = mine;
#pragma unroll
  for (int other = 1; other < 32; other *= 2) {
    const uint64 mass = __shfl_up_sync(WARP, until.mass, other);
    const int tokens = __shfl_up_sync(WARP, until.tokens, other);
    if (lane >= other) until.mass += mass, until.tokens += tokens;
  }
  if (lane == 31) w.warps[warp] = until;
  __syncthreads();
  Sum front = lane < warp ? w.warps[lane] : Sum{0, 0};
#pragma unroll
  for (int other = 16; other > 0; other /= 2) {
    front.mass += __shfl_xor_sync(WARP, front.mass, other);
    front.tokens += __shfl_xor_sync(WARP, front.tokens, other);
  }
  return {front.mass + until.mass - mine.mass, front.tokens + until.tokens - mine.tokens};
}

DEVICE uint64 add_all(Work& w, uint64 mine) {
  for (int other = 16; other > 0; other /= 2) mine += __shfl_xor_sync(WARP, mine, other);
  if (threadIdx.x % 32 == 0) w.warps[threadIdx.x / 32].mass = mine;
  __syncthreads();
  mine = w.warps[threadIdx.x % WARPS].mass;
  for (int other = WARPS / 2; other > 0; other /= 2) mine += __shfl_xor_sync(WARP, mine, other);
  __syncthreads();
  return mine;
}

// The mass of a bin's tokens whose key isn't below `least` nor their weight below `floor`.
OUT_OF_LINE uint64 sum(Work& w, int bin, uint64 least, float floor, int known) {
  list(w, bin, known);
  return add_all(w, run(w, {Task::ADD, bin, least, ~0ull, 0, false, floor}, known));
}

// Sets w.bins[0] and w.bins[1] to the bins with which the sum goes beyond `target` and `other`.
template <class Number>
DEVICE void mark_bins(Work& w, const Number* before, uint64 target, uint64 other) {
  __syncthreads();
#pragma unroll 1
  for (int b = threadIdx.x; b < BINS; b += THREADS) {
    const uint64 from = before[b], to = before[b + 1];
    if (from <= target && target < to) w.bins[0] = b;
    if (from <= other && other < to) w.bins[1] = b;
  }
  __syncthreads();
}

// The keys from `low` to `high` of a bin shrink to those of its scores, or of the ids where it has one score.
DEVICE void tighten(Work& w, int bin, uint64& low, uint64& high, int known) {
  if (low >> 32 != high >> 32) {
    const uint64 mine = run(w, {Task::RANGE, bin, low, high, 0, false, 0.0f}, known);
    uint32 most = __reduce_max_sync(WARP, (uint32)(mine >> 32)), least = __reduce_min_sync(WARP, (uint32)mine);
    if (threadIdx.x % 32 == 0) w.warps[threadIdx.x / 32].mass = (uint64)most << 32 | least;
    __syncthreads();
    const uint64 all = w.warps[threadIdx.x % WARPS].mass;
    most = __reduce_max_sync(WARP, (uint32)(all >> 32)), least = __reduce_min_sync(WARP, (uint32)all);
    const uint64 from = (uint64)least << 32, to = (uint64)most << 32 | ~0u;
    low = low > from ? low : from, high = high < to ? high : to;
  }
  const uint64 last = low >> 32 << 32 | ~(uint32)(known - 1);
  if (low >> 32 == high >> 32 && low < last) low = last;
}

// Tokens of a bin from the largest key down: the first whose value takes the sum beyond `target`, as w.key, and the sum
// in front of it in w.front. The bin's sum is beyond `target`.
DEVICE void find(Work& w, int bin, uint64 target, bool counting, int known) {
  uint64 low = 0, high = ~0ull, passed = 0;
  list(w, bin, known);
  int tokens = tokens_of(w, bin);
#pragma unroll 1
  while (tokens > FEW) {
    tighten(w, bin, low, high, known);
    const int bits = 64 - __clzll((int64)(high - low)), shift = bits > PART_BITS ? bits - PART_BITS : 0;
    run(w, {Task::SPREAD, bin, low, high, shift, counting, 0.0f}, known);
    const Sum mine{(uint64)w.high[threadIdx.x] << 32 | w.low[threadIdx.x], w.count[threadIdx.x]};
    const uint64 before = in_front(w, mine).mass;
    if (before <= target && target < before + mine.mass) w.part = threadIdx.x, w.front = before, w.left = mine.tokens;
    __syncthreads();
    tokens = w.left, target -= w.front, passed += w.front;
    high -= (uint64)w.part << shift;
    const uint64 part = (1ull << shift) - 1;
    low = high - low > part ? high - part : low;
  }
  run(w, {Task::COMPARE, bin, low, high, 0, counting, 0.0f}, known);
  const int own = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
  uint64 before = 0;
  if (own < tokens)
    for (int i = member; i < tokens; i += TEAM)
      if (w.few[i] > w.few[own]) before += w.values[i];
#pragma unroll
  for (int other = 1; other < TEAM; other *= 2) before += __shfl_xor_sync(WARP, before, other);
  if (own < tokens && member == 0 && before <= target && target < before + w.values[own])
    w.key = w.few[own], w.front = passed + before;
  __syncthreads();
}

// The row's bins come to w.before and w.tokens, and are zeros in memory.
DEVICE void take_bins(Work& w, int* counts, uint64* masses) {
  const int first = threadIdx.x * OWN;
  const bool some = first < BINS;
  Vec<int, OWN> count{};
  Vec<uint64, 2> mass[OWN / 2]{};
  if (some) {
    const Words c = load_fresh(counts + first), one = load_fresh(masses + first), two = load_fresh(masses + first + 2);
    count = *reinterpret_cast<const Vec<int, OWN>*>(&c);
    mass[0] = *reinterpret_cast<const Vec<uint64, 2>*>(&one), mass[1] = *reinterpret_cast<const Vec<uint64, 2>*>(&two);
    store_vec(counts + first, Vec<int, OWN>{}), store_vec(masses + first, Vec<uint64, 2>{});
    store_vec(masses + first + 2, Vec<uint64, 2>{});
  }
  Sum mine{0, 0};
#pragma unroll
  for (int i = 0; i < OWN; i++) mine.mass += mass[i / 2].at[i % 2], mine.tokens += count.at[i];
  Sum front = in_front(w, mine);
  if (some)
#pragma unroll
    for (int i = 0; i < OWN; i++) {
      w.before[first + i] = front.mass, w.tokens[first + i] = front.tokens;
      front.mass += mass[i / 2].at[i % 2], front.tokens += count.at[i];
    }
  if (first + OWN == BINS) w.before[BINS] = front.mass, w.tokens[BINS] = front.tokens;
  __syncthreads();
}

DEVICE uint64 drawn(double number, uint64 all) {
  const uint64 target = (uint64)(number * (double)all);
  return target < all ? target : all - 1;
}

// Top-p alone: the bin in which it ends and those in which the draw may lie are known from the sums of the bins; their
// tokens, if they are few, are put in order all at once. -1: they are many, but perhaps listed.
DEVICE int pick_among_few(Work& w, const Row& r, double nucleus, int known) {
  const uint64 target = last_kept(nucleus, w.before[BINS]);
  mark_bins(w, w.before, target, target);
  const int bin = w.bins[1];
  mark_bins(w, w.before, w.before[bin] ? drawn(w.number, w.before[bin]) : 0, drawn(w.number, w.before[bin + 1]));
  const int first = w.bins[0], last = w.bins[1], most = tokens_of(w, bin) + w.tokens[last + 1] - w.tokens[first];
  if (most > LIST) return -1;
  collect(w, r, first, last, bin, known);
  const int tokens = w.filled;
  if (tokens > FEW) return -1;
  const int own = threadIdx.x / TEAM, member = threadIdx.x % TEAM;
  uint64 key = 0, mass = 0, before = 0;
  int own_bin = 0;
  if (own < tokens) {
    key = w.keys[own];
    const float distance = r.distance(score_of(key));
    mass = Row::mass(distance), own_bin = Row::bin(distance), before = member == 0 ? w.before[own_bin] : 0;
    if (member == 0) w.values[own] = mass, w.few_bins[own] = own_bin;
  }
  __syncthreads();
  if (own < tokens)
#pragma unroll 1
    for (int i = member; i < tokens; i += TEAM)
      if (w.few_bins[i] == own_bin && w.keys[i] > key) before += w.values[i];
#pragma unroll
  for (int other = 1; other < TEAM; other *= 2) before += __shfl_xor_sync(WARP, before, other);
  if (before <= target && target < before + mass) w.front = before + mass;  // all that is kept
  __syncthreads();
  const uint64 draw = drawn(w.number, w.front);
  if (before <= draw && draw < before + mass) w.part = (int)~(uint32)key;
  __syncthreads();
  return w.part;
}

// What the filters keep: bins before `last`, and of that one the tokens whose key isn't below `least` nor their weight
// below `floor`; the mass of all.
struct Kept {
  int last;
  uint64 least;
  float floor;
  uint64 all;
};

// The token with which the kept mass goes beyond `target`, in the order of ids: first in which of WARPS runs of the
// vocabulary, a warp each, then in which thread's tokens of that run.
OUT_OF_LINE int by_id(Work& w, Kept kept, uint64 target, int known) {
  const Row r = w.row;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const auto mass = [&](int id, float score, float distance) {
    const int b = Row::bin(distance);
    if (b > kept.last) return 0ull;
    if (b == kept.last && (key_of(score, id) < kept.least || Row::weight(distance) < kept.floor)) return 0ull;
    return Row::mass(distance);
  };
  const int run = ((known + WARPS - 1) / WARPS + PIECE - 1) / PIECE * PIECE;
  const int begin = warp * run, end = begin + run < known ? begin + run : known;
  uint64 mine = 0;
  each_token<true>(r, begin, end, kept.last + 1, lane, 32,
                   [&](int id, float score, float distance) { mine += mass(id, score, distance); });
  uint64 before = in_front(w, {mine, 0}).mass;
  for (int other = 16; other > 0; other /= 2) mine += __shfl_xor_sync(WARP, mine, other);
  before = __shfl_sync(WARP, before, 0);
  if (lane == 0 && before <= target && target < before + mine) w.part = warp, w.front = before;
  __syncthreads();
  target -= w.front;
  const int share = (run + THREADS - 1) / THREADS, run_end = (w.part + 1) * run < known ? (w.part + 1) * run : known;
  const int first = w.part * run + threadIdx.x * share, behind = first + share < run_end ? first + share : run_end;
  const auto at = [&](int id) {
    const float score = r.score(id);
    return mass(id, score, r.distance(score));
  };
  mine = 0;
  for (int id = first; id < behind; id++) mine += at(id);
  before = in_front(w, {mine, 0}).mass;
  if (before <= target && target < before + mine) {
    int id = first;
    while ((before += at(id)) <= target) id++;
    w.part = id;
  }
  __syncthreads();
  return w.part;
}

// The token for any settings.
OUT_OF_LINE int pick_among_many(Work& w, double nucleus, double floor, int64 k, int known) {
  Kept kept{BINS - 2, 0, 0.0f, w.before[BINS]};
  enum { TOP_K, TOP_P, DRAW };
#pragma unroll 1  // what finds a key stands once
  for (int stage = TOP_K; stage <= DRAW; stage++) {
    uint64 target = k - 1;
    if (stage == TOP_K && !(0 < k && k < known && k <= w.tokens[BINS])) continue;
    if (stage == TOP_P) {
      if (!(nucleus < 1.0)) continue;
      target = last_kept(nucleus, kept.all);
    }
    if (stage == DRAW) {
      const int b = floor > 0.0 ? Row::bin(-log2_approx((float)floor)) : BINS;
      if (b <= kept.last + 1) {
        if (b < kept.last) kept.last = b, kept.least = 0;
        kept.floor = (float)floor;
        kept.all = w.before[kept.last] + sum(w, kept.last, kept.least, kept.floor, known);
      }
      target = drawn(w.number, kept.all);
      if (!(nucleus < 1.0)) return by_id(w, kept, target, known);
    }
    if (stage == TOP_K) mark_bins(w, w.tokens, target, target);
    else mark_bins(w, w.before, target, target);
    const int bin = w.bins[0];
    const uint64 before = stage == TOP_K ? w.tokens[bin] : w.before[bin];
    find(w, bin, target - before, stage == TOP_K, known);
    const uint64 key = w.key;
    if (stage == DRAW) return (int)~(uint32)key;
    if (stage == TOP_P) {
      kept = {bin, key, 0.0f, before + w.front + Row::mass(w.row.distance(score_of(key)))};
    } else {  // and all of the same score
      kept = {bin, key >> 32 << 32, 0.0f, 0};
      kept.all = w.before[bin] + sum(w, bin, kept.least, 0.0f, known);
    }
  }
  return -1;
}

// Grid: a block a row. Writes the token (-1 where logits aren't finite), counts the draw, marks the token as seen.
extern "C" __global__ void __launch_bounds__(THREADS)
sample_pick(const T* logits, unsigned char* seen, const double* temperature, const double* top_p, const double* min_p,
            const double* penalty, const int64* top_k, const int64* seed, int64* draws, const float* best_score,
            const int* best_id, int* counts, uint64* masses, int64* token, int64 slices, int64 V, int64 known_) {
  extern __shared__ uint64 shared[];
  Work& w = *reinterpret_cast<Work*>(shared);
  const int row = blockIdx.x, known = (int)known_;
  const double nucleus = top_p[row], floor = min_p[row];
  const int64 k = top_k[row];
  Row r = row_of(logits, seen, penalty, row, V);
  r.inverse = inverse_of(temperature[row]);
  const Best best = whole_best(best_score, best_id, row, (int)slices);  // from before sample_masses
  r.best = best.score;
  if (threadIdx.x == 0) w.row = r, w.first = 0, w.last = -1, w.extra = -1;
  if (r.inverse > 0.0f) look(w, r, known);
  if (threadIdx.x == THREADS - 1) w.number = uniform((uint64)seed[row], (uint64)draws[row]);
  wait_for_previous();
  let_next_begin();
  if (!finite(r.best)) {
    if (threadIdx.x == 0) token[row] = -1;
    return;
  }
  int chosen = best.id;
  if (r.inverse > 0.0f) {
    take_bins(w, counts + row * BINS, masses + row * BINS);
    chosen = -1;
    if (nucleus < 1.0 && !(0 < k && k < known) && !(floor > 0.0)) chosen = pick_among_few(w, r, nucleus, known);
    if (chosen < 0) chosen = pick_among_many(w, nucleus, floor, k, known);
    if (threadIdx.x == 0) draws[row] += 1;
  }
  if (threadIdx.x > 0) return;
  token[row] = chosen;
  if (r.seen) seen[row * V + chosen] = 1;
}
