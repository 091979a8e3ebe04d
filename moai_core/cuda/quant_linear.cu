// moai: kernels quant_linear
// moai: macros FROM=bf16 T=bf16 TO=bf16 WIDTH=4 GROUPS=1 ZEROS=0 MT=1 NT=1 STAGES=4 GLU=0 NORM=0 WARPS=8 BLOCKS=4
// moai: macros FROM=fp16 T=fp16 TO=fp16 WIDTH=4 GROUPS=4 ZEROS=1 MT=2 NT=2 STAGES=4 GLU=0 NORM=0 WARPS=16 BLOCKS=1
// moai: macros FROM=float T=float TO=float WIDTH=4 GROUPS=2 ZEROS=1 MT=1 NT=1 STAGES=4 GLU=1 NORM=1 WARPS=8 BLOCKS=4
// moai: macros FROM=float T=bf16 TO=bf16 WIDTH=4 GROUPS=1 ZEROS=1 MT=1 NT=1 STAGES=2 GLU=1 NORM=1 WARPS=8 BLOCKS=4
// moai: macros FROM=bf16 T=bf16 TO=bf16 WIDTH=4 GROUPS=1 ZEROS=0 MT=2 NT=4 STAGES=2 GLU=0 NORM=0 WARPS=12 BLOCKS=1
// moai: macros FROM=bf16 T=bf16 TO=bf16 WIDTH=8 GROUPS=0 ZEROS=0 MT=1 NT=1 STAGES=4 GLU=0 NORM=0 WARPS=8 BLOCKS=4
// moai: macros FROM=bf16 T=bf16 TO=bf16 WIDTH=8 GROUPS=0 ZEROS=0 MT=2 NT=2 STAGES=2 GLU=0 NORM=0 WARPS=16 BLOCKS=1
// moai: macros FROM=fp16 T=fp16 TO=fp16 WIDTH=8 GROUPS=1 ZEROS=0 MT=1 NT=4 STAGES=2 GLU=0 NORM=0 WARPS=16 BLOCKS=1
// moai: macros FROM=float T=float TO=float WIDTH=8 GROUPS=0 ZEROS=0 MT=1 NT=2 STAGES=2 GLU=0 NORM=0 WARPS=16 BLOCKS=1
//
// out = x W^T of few rows of x (M, K) and an integer W (O, K): for generation, where reading W is nearly all there is
// to do. On request x is normalized first (RMS), gate and up come as one product with silu(gate) up as its result, and
// a residual is added.
//
// Tensor cores multiply even a single row, so that a weight of 4 bits costs 2.8 instructions a lane, all told: integers
// become 16-bit numbers in pairs (quant.cuh), are summed exactly as they are, in fp32, and scaled group by group;
// weights are never rounded. Where T is float, x is split into three bf16 that add up to it.
//
// A unit is 16 rows of W (a tile) by 128 columns. W lies unit by unit, so that a lane's 16 bytes hold what it needs of
// a unit's columns for mma_16 (quant/cuda.py puts it there): with g = lane / 4, t = lane % 4 the lane has of rows g and
// g + 8, of each 32 columns, 8 t .. 8 t + 7, in two steps of 4. Which columns a step has is free as long as x has the
// same, and so a lane finds its part of x in one piece as well.
//
// The warps of a block share out the units of MT tiles, and each reads ahead STAGES of them into shared memory of its
// own, beyond the end of a tile, so that nothing waits for the others but the sum at a tile's end, in the order of the
// warps. Blocks take tiles in turns, with x in place.
//
//   FROM, TO  type of x in memory; of out and the residual      MT, NT   tiles of 16 rows of W, of 8 rows of x, at once
//   T         type of the arithmetic: bf16, fp16, float         STAGES   units that a warp reads ahead
//   WIDTH      4: q - 8 (or a zero point), or 8: signed          GLU      a tile has 8 rows of gate and 8 of up
//   GROUPS    scales of a row of a unit; 0: one for the whole row        ZEROS    scales come with zero points
//   NORM      x is normalized first                              WARPS, BLOCKS  what a multiprocessor has room for
#include "quant.cuh"

constexpr int UNIT = 128;
constexpr int PER = 16 / sizeof(T);        // numbers of x in 16 bytes of shared memory
constexpr int SLOTS = UNIT / PER;          // such pieces in a unit, 16 or 32
constexpr int ROW_BYTES = UNIT * sizeof(T);
constexpr int TILE_BYTES = 16 * UNIT * WIDTH / 8;
constexpr int SCALE_BYTES = GROUPS * 32 * (1 + ZEROS);
constexpr int PART_BYTES = TILE_BYTES + SCALE_BYTES;  // a tile's part of a unit: weights, then scales
constexpr int STAGE_BYTES = MT * PART_BYTES;
constexpr int HALVES = GROUPS > 0 ? 4 / GROUPS : 4;  // times 32 columns share a scale
constexpr int CHAINS = MT * NT == 1 ? 2 : 1;         // independent sums, where a warp has nothing else to overlap
constexpr int TILE_OUT = GLU ? 8 : 16;
static_assert(sizeof(FROM) >= sizeof(T) && (WIDTH == 4 || WIDTH == 8) && (ZEROS == 0 || WIDTH == 4), "no such product");

template <class A, class B>
constexpr bool same = false;
template <class A>
constexpr bool same<A, A> = true;

template <class A>
struct Arithmetic {
  using type = A;
  static constexpr int parts = 1;
};
template <>
struct Arithmetic<float> {
  using type = bf16;
  static constexpr int parts = 3;
};
using C = Arithmetic<T>::type;
constexpr int PARTS = Arithmetic<T>::parts;

// ---- x

// Where in its row a 16-byte piece lies: neighbouring rows are read together and must not share banks. Pieces of 16-bit
// numbers are read 4 in a row, those of fp32 every other one.
constexpr int SWAPPED = sizeof(T) == 2 ? 64 : 16;
DEVICE int place(int slot, int m) { return slot * 16 ^ m % 2 * SWAPPED; }


// PER numbers of x at k, zeros beyond K; with NORM times the norm's weight, their squares added to `square`.
DEVICE Words fetch_piece(const FROM* row, const T* norm, int k, int K, float& square) {
  if (k >= K) return {};
  if constexpr (same<FROM, T> && !NORM) {
    return *reinterpret_cast<const Words*>(row + k);
  } else {
    constexpr int some = per_16_bytes<FROM>;
    Vec<T, PER> y, weight;
    if constexpr (NORM) weight = load_vec<T, PER>(norm + k);
#pragma unroll
    for (int j = 0; j < PER; j += some) {
      const Vec<FROM, some> raw = load_vec<FROM, some>(row + k + j);
#pragma unroll
      for (int i = 0; i < some; i++) {
        float value = to_float(raw.at[i]);
        if constexpr (NORM) {
          square += value * value;
          value *= to_float(weight.at[j + i]);
        }
        y.at[j + i] = from_float<T>(value);
      }
    }
    return *reinterpret_cast<Words*>(&y);
  }
}

// The warp's units of ROWS rows from m0 on, PIECES pieces of each by a lane at once.
template <int ROWS, int PIECES>
DEVICE void fetch_x(const FROM* x, int64 x_row, const T* norm, unsigned char* x_s, float* squares, int m0, int rows,
                    int K, int units, int pass, int warp, int warps, int lane) {
  const int slot = lane % SLOTS;
  constexpr int TURNS = 32 / SLOTS;  // units that a warp's lanes read at once
  float square[ROWS] = {};
  for (int j0 = lane / SLOTS; warp + j0 * warps < units; j0 += TURNS * PIECES) {
    Words piece[ROWS][PIECES];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int k = (warp + (j0 + i * TURNS) * warps) * UNIT + slot * PER;
        piece[r][i] = fetch_piece(x + min(m0 + r, rows - 1) * x_row, norm, k, K, square[r]);
      }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int j = j0 + i * TURNS, m = m0 + r;
        if (warp + j * warps >= units || m >= rows) continue;
        unsigned char* to = x_s + ((warp + j * warps) * pass + m) * ROW_BYTES + place(slot, m);
        *reinterpret_cast<Words*>(to) = piece[r][i];
      }
  }
  if constexpr (NORM) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
      const float sum = warp_sum(square[r]);
      if (lane == 0 && m0 + r < rows) squares[warp * pass + m0 + r] = sum;
    }
  }
}

// The lane's 8 numbers of 32 columns of a row, in pairs; `row` points to what would be its first piece of those columns
// in an even row.
DEVICE void read_x(const unsigned char* row, int odd, uint32 (&b)[PARTS][4]) {
  if constexpr (PARTS == 1) {
    const Words v = *reinterpret_cast<const Words*>(row);
#pragma unroll
    for (int i = 0; i < 4; i++) b[0][i] = v.at[i];
  } else {
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      Vec<float, 4> v = *reinterpret_cast<const Vec<float, 4>*>(row + (i ? 16 - odd : odd));
#pragma unroll
      for (int part = 0; part < 3; part++)
#pragma unroll
        for (int j = 0; j < 2; j++) {
          float &low = v.at[2 * j], &high = v.at[2 * j + 1];
          const uint32 pair = pair_bits<bf16>(low, high);
          b[part][i + j] = pair;
          low -= bits_float(pair << 16);
          high -= bits_float(pair & 0xffff0000u);
        }
    }
  }
}

// ---- W

// Step s (of 2) of 32 columns: what mma_16 takes as a. `words` are the lane's: two of them for 4 bits, four for 8.
DEVICE void read_w(const uint32* words, int s, uint32 (&a)[4]) {
  if constexpr (WIDTH == 4) {
    from_nibbles<C>(words[s], a);
  } else {
#pragma unroll
    for (int i = 0; i < 4; i++) a[i] = Int8<C>::pair(words[2 * s + i / 2] >> (8 * (i % 2)));
  }
}

struct Scale {
  float scale[2], zero[2];  // of rows g and g + 8; the zero point less 8
};

DEVICE Scale read_scale(const unsigned char* at) {
  Scale s = {};
  const Vec<fp16, 2 + 2 * ZEROS> v = load_vec<fp16, 2 + 2 * ZEROS>(reinterpret_cast<const fp16*>(at));
#pragma unroll
  for (int i = 0; i < 2; i++) {
    s.scale[i] = to_float(v.at[i]);
    if constexpr (ZEROS) s.zero[i] = to_float(v.at[2 + i]) - 8.0f;
  }
  return s;
}

struct Sums {
  float part[CHAINS][MT][NT][4], x[NT][4];

  DEVICE void clear() { *this = {}; }

  // 32 columns: `x_at` has where the lane's part of each row of x begins in them, but for what `odd` adds in odd rows.
  DEVICE void add(int half, const unsigned char* tiles, const unsigned char* const (&x_at)[NT], int odd) {
    uint32 b[NT][PARTS][4];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      if constexpr (sizeof(T) == 2)
        read_x(x_at[n] + (half % 2 ? 64 - odd : odd) + half / 2 * 128, 0, b[n]);
      else
        read_x(x_at[n] + half * 128, odd, b[n]);
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
      const int vector = WIDTH == 4 ? half / 2 : half, first = WIDTH == 4 ? half % 2 * 2 : 0;
      const Words v = *reinterpret_cast<const Words*>(tiles + i * PART_BYTES + vector * 512);
#pragma unroll
      for (int s = 0; s < 2; s++) {
        uint32 a[4];
        read_w(v.at + first, s, a);
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int p = 0; p < PARTS; p++) {
            float(&d)[4] = part[CHAINS == 2 ? s : 0][i][n];
            mma_16<C>(d, a, {b[n][p][2 * s], b[n][p][2 * s + 1]});
          }
      }
    }
    if constexpr (ZEROS) {
      const uint32 one = (uint32)from_float<C>(1.0f).bits * 0x10001u, ones[4] = {one, one, one, one};
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int p = 0; p < PARTS; p++)
#pragma unroll
          for (int s = 0; s < 2; s++) mma_16<C>(x[n], ones, {b[n][p][2 * s], b[n][p][2 * s + 1]});
    }
  }

  DEVICE void scaled(int i, const Scale& s, float (&total)[MT][NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float sum = part[0][i][n][j];
        if constexpr (CHAINS == 2) sum += part[CHAINS - 1][i][n][j];
        if constexpr (ZEROS) sum -= s.zero[j / 2] * x[n][j % 2];
        total[i][n][j] += s.scale[j / 2] * sum;
      }
  }
};

// Grid: x blocks that take groups of MT tiles in turns, y passes over `pass` rows of x each; up to 16 warps. Dynamic
// shared memory: x, units * pass * ROW_BYTES; then STAGES * STAGE_BYTES a warp; then, a warp, 16 MT * (pass | 1) sums
// and `pass` more. x's rows are x_row apart and, like those of everything, begin at multiples of 16 bytes; K is a
// multiple of 8. norm (K) is the norm's weight; residual (M, O) may be null; out is dense. x and residual may come from
// a kernel that still runs when this one begins, W may not. So they are not __restrict__: the compiler would take them
// for constants.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    quant_linear(const FROM* x, const unsigned char* __restrict__ weights, const unsigned char* __restrict__ scales,
                 const T* __restrict__ norm, const TO* residual, TO* out, int64 M, int64 K, int64 O, int64 x_row,
                 int64 all_tiles, int64 all_units, int64 all_turns, int64 rows_a_pass, float eps) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tiles = (int)all_tiles, units = (int)all_units, turns = (int)all_turns, pass = (int)rows_a_pass;
  const int groups = (tiles + MT - 1) / MT, last_unit = turns * warps;
  const int64 first_row = (int64)blockIdx.y * pass;
  const int rows = (int)min((int64)pass, M - first_row), stride = pass | 1;
  unsigned char* const x_s = memory;
  unsigned char* const stages = memory + units * pass * ROW_BYTES;
  // The lane's place in the warp's stages, and that of its scales from there.
  const int mine = kept(units * pass * ROW_BYTES + warp * STAGES * STAGE_BYTES + lane * 16);
  const int scale_mine = kept(g * 4 * (1 + ZEROS) - lane * 16);
  float* const sums_s = reinterpret_cast<float*>(stages + warps * STAGES * STAGE_BYTES);
  float* const squares = sums_s + warps * MT * 16 * stride;

  // What is read ahead next. Tiles lie one after the other, MT of them together are whole (O is padded).
  int next_group = blockIdx.x, next_unit = warp;
  const unsigned char* next = weights + ((int64)next_group * MT * units + warp) * PART_BYTES + lane * 16;
  const int64 apart = (int64)units * PART_BYTES, a_turn = (int64)warps * PART_BYTES,
              a_group = (int64)gridDim.x * MT * apart - turns * a_turn;
  auto read_ahead = [&](int slot) {
    if (next_group < groups && next_unit < units) {
      unsigned char* to = memory + (mine + slot);
#pragma unroll
      for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int v = 0; v < TILE_BYTES; v += 512) copy_async_16(to + i * PART_BYTES + v, next + i * apart + v, true);
        if (lane < SCALE_BYTES / 16)
          copy_async_16(to + i * PART_BYTES + TILE_BYTES, next + i * apart + TILE_BYTES, true);
      }
    }
    copy_async_commit();
    next += a_turn, next_unit += warps;
    if (next_unit >= last_unit) next_unit = warp, next_group += gridDim.x, next += a_group;
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) read_ahead(i * STAGE_BYTES);

  wait_for_previous();
  let_next_begin();
  x += first_row * x_row;
  // As many loads at once as registers hold, for x is late already: it came after the first of W.
  if (NT == 1 && rows == 1)
    fetch_x<1, 4>(x, x_row, norm, x_s, squares, 0, rows, (int)K, units, pass, warp, warps, lane);
  else if (NT == 1 && rows <= 4)
    fetch_x<4, 2>(x, x_row, norm, x_s, squares, 0, rows, (int)K, units, pass, warp, warps, lane);
  else
    for (int m = 0; m < rows; m += 8)
      fetch_x<8, 1>(x, x_row, norm, x_s, squares, m, rows, (int)K, units, pass, warp, warps, lane);

  int x_lane[NT];  // where the lane's part of a row is in a unit of x; nobody reads the sums of rows beyond the last
#pragma unroll
  for (int n = 0; n < NT; n++) x_lane[n] = kept(min(n * 8 + g, rows - 1) * ROW_BYTES + t * 8 * (int)sizeof(T));
  const int odd = kept(g % 2 * SWAPPED);

  constexpr int GROUP_OUT = MT * TILE_OUT;
  const int row = threadIdx.x % GROUP_OUT, m_first = threadIdx.x / GROUP_OUT, m_step = blockDim.x / GROUP_OUT;
  const int x_turn = warps * pass * ROW_BYTES;
  int slot = 0;
  for (int group = blockIdx.x; group < groups; group += gridDim.x) {
    const int64 o = (int64)group * GROUP_OUT + row, at = (first_row + m_first) * O + o;
    float before = residual && m_first < rows && o < O ? to_float(residual[at]) : 0.0f;
    Scale whole[MT];
    if constexpr (GROUPS == 0) {
#pragma unroll
      for (int i = 0; i < MT; i++) whole[i] = read_scale(scales + ((group * MT + i) * 8 + g) * (4 * (1 + ZEROS)));
    }
    float total[MT][NT][4] = {};
    Sums sums;
    sums.clear();
    int x_unit = warp * pass * ROW_BYTES;
    for (int unit = warp; unit < last_unit; unit += warps, x_unit += x_turn) {
      copy_async_wait<STAGES - 1>();
      __syncwarp();
      if (unit < units) {
        const unsigned char *stage = memory + (mine + slot), *x_at[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) x_at[n] = memory + (x_unit + x_lane[n]);
#pragma unroll
        for (int half = 0; half < 4; half++) {
          sums.add(half, stage, x_at, odd);
          if constexpr (GROUPS > 0)
            if ((half + 1) % HALVES == 0) {
#pragma unroll
              for (int i = 0; i < MT; i++) {
                const int scale_at = i * PART_BYTES + TILE_BYTES + half / HALVES * (32 * (1 + ZEROS));
                sums.scaled(i, read_scale(stage + scale_mine + scale_at), total);
              }
              sums.clear();
            }
        }
      }
      __syncwarp();
      read_ahead(slot);
      slot = slot == (STAGES - 1) * STAGE_BYTES ? 0 : slot + STAGE_BYTES;
    }
    if constexpr (GROUPS == 0) {
#pragma unroll
      for (int i = 0; i < MT; i++) sums.scaled(i, whole[i], total);
    }

#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int m = n * 8 + 2 * t + j % 2;
          if (m < rows) sums_s[((warp * MT + i) * 16 + g + j / 2 * 8) * stride + m] = total[i][n][j];
        }
    __syncthreads();
    for (int m = m_first; m < rows && o < O; m += m_step) {
      float first = 0.0f, second = 0.0f, square = 0.0f;  // GLU: gate and up
      const float* from = sums_s + (row / TILE_OUT * 16 + row % TILE_OUT) * stride + m;
      for (int w = 0; w < warps; w++, from += MT * 16 * stride) {
        first += from[0];
        if constexpr (GLU) second += from[8 * stride];
        if constexpr (NORM) square += squares[w * pass + m];
      }
      if constexpr (NORM) {
        const float scale = 1.0f / sqrtf(square / (float)K + eps);
        first *= scale, second *= scale;
      }
      if constexpr (GLU) first *= sigmoid(first) * second;
      if (residual) first += m == m_first ? before : to_float(residual[(first_row + m) * O + o]);
      out[(first_row + m) * O + o] = from_float<TO>(first);
    }
    __syncthreads();
  }
}
