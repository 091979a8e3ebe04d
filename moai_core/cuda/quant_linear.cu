// moai: kernels quant_linear
// moai: macros T=bf16 WIDTH=4 GROUPS=1 ZEROS=0 CODES=1 MT=1 NT=1 UNITS=16 STAGES=2 WARPS=8 BLOCKS=2
// moai: macros T=bf16 WIDTH=4 GROUPS=1 ZEROS=0 CODES=1 MT=4 NT=1 UNITS=16 STAGES=1 WARPS=16 BLOCKS=1
// moai: macros T=fp16 WIDTH=4 GROUPS=4 ZEROS=1 CODES=0 MT=2 NT=2 UNITS=8 STAGES=4 WARPS=8 BLOCKS=1
// moai: macros T=float WIDTH=4 GROUPS=2 ZEROS=1 CODES=0 MT=1 NT=1 UNITS=8 STAGES=4 WARPS=8 BLOCKS=2
// moai: macros T=bf16 WIDTH=8 GROUPS=0 ZEROS=0 CODES=0 MT=1 NT=1 UNITS=16 STAGES=4 WARPS=8 BLOCKS=1
//
// out = x W^T of few rows of x (M, K) and an integer W (O, K): for generation, where reading W is nearly all there is
// to do.
//
// Tensor cores multiply even a single row: integers become 16-bit numbers in pairs (quant.cuh), are summed exactly as they
// are, in fp32, and scaled group by group; weights are never rounded. For a single row of x they are taken as they are,
// for then it is less work to give x another form (Codes in gemv.cuh). Where T is float, x is split into three bf16 that
// add up to it.
//
// A block takes groups of MT tiles in turns, with x in place. A group comes in pieces of UNITS units, through STAGES of
// shared memory, row by row by the copy engine (compute capability 9.0), which needs no warp's attention and whose queue
// is not the one in which x waits. The warps of a block share out the units; their sums are added in the order of the warps.
//
// Launches may overlap (gemv.cuh): a block asks for its first weights at once and looks at x, and lets out be seen, only
// after the kernel in front has ended. As soon as x is asked for, the next kernel may begin to read ahead.
//
//   T         type of x, of the arithmetic and of out: bf16, fp16, float
//   MT, NT    tiles of 16 rows of W, of 8 rows of x, at once
//   WARPS, BLOCKS  what a multiprocessor has room for
//   CODES     1: for a single row of x, of 16 bits, and 4 bits without zero points in groups of whole units
//   WIDTH, GROUPS, ZEROS: quant.cuh
#include "barrier.cuh"
#include "quant.cuh"

constexpr int PER = 16 / sizeof(T);   // numbers of x in 16 bytes of shared memory
constexpr int SLOTS = UNIT / PER;     // such pieces in a unit, 16 or 32
constexpr int ROW_BYTES = UNIT * sizeof(T);
constexpr int PITCH = UNITS * UNIT_BYTES + 4 * WIDTH;  // of rows of W in shared memory: neighbours share no banks
constexpr int SCALES_AT = MT * TILE * PITCH, STAGE_BYTES = SCALES_AT + MT * UNITS * SCALE_BYTES;
constexpr int BARRIERS = (8 * STAGES + 127) / 128 * 128;  // bytes
constexpr int CHAINS = MT * NT == 1 ? 2 : 1;  // independent sums, where a warp has nothing else to overlap

static_assert(!CODES || (WIDTH == 4 && GROUPS == 1 && !ZEROS && NT == 1 && sizeof(T) == 2), "a row of x, 4 bits in groups of whole units");
using Units = Vec<float, 2>;  // of a unit of a row of x (Codes)

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
template <bool codes>
struct Multiplied {
  using type = C;
};
template <>
struct Multiplied<true> {
  using type = fp16;
};
using Product = Multiplied<CODES>::type;

// Whether the copy engine brings W.
#if !defined(MOAI_HOST) && __CUDA_ARCH__ >= 900
#define ENGINE 1
#else
#define ENGINE 0  // every thread copies
#endif

// ---- x

// Where in its row a 16-byte piece lies: neighbouring rows are read together and must not share banks. Pieces of 16-bit
// numbers are read 4 in a row, those of fp32 every other one.
constexpr int SWAPPED = sizeof(T) == 2 ? 64 : 16;
DEVICE int place(int slot, int m) { return slot * 16 ^ m % 2 * SWAPPED; }

// The warp's units of ROWS rows from m0 on, PIECES pieces of each by a lane at once; zeros beyond K.
template <int ROWS, int PIECES>
DEVICE void fetch_x(const T* x, int64 x_row, unsigned char* x_s, Units* units_s, int m0, int rows, int K, int units, int pass, int warp,
                    int warps, int lane) {
  const int slot = lane % SLOTS;
  constexpr int TURNS = 32 / SLOTS;  // units that a warp's lanes read at once
  bool told = m0 > 0;
  for (int j0 = lane / SLOTS; warp + (CODES ? j0 - lane / SLOTS : j0) * warps < units; j0 += TURNS * PIECES) {
    Words piece[ROWS][PIECES];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int k = (warp + (j0 + i * TURNS) * warps) * UNIT + slot * PER;
        piece[r][i] = {};
        if (k < K) piece[r][i] = *reinterpret_cast<const Words*>(x + min(m0 + r, rows - 1) * x_row + k);
      }
    if (!told) let_next_begin(), told = true;  // what the next kernel reads ahead queues up behind x
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int j = j0 + i * TURNS, m = m0 + r;
        const bool there = warp + j * warps < units && m < rows;
        unsigned char* to = x_s + ((warp + j * warps) * pass + m) * ROW_BYTES + place(slot, m);
        if constexpr (CODES) {  // all lanes together
          Units own;
          const Words y = Codes::arranged<T>(piece[r][i], own);
          if (there) *reinterpret_cast<Words*>(to) = y;
          if (there && slot == 0) units_s[warp + j * warps] = own;
        } else if (there) {
          *reinterpret_cast<Words*>(to) = sizeof(T) == 2 ? arranged(piece[r][i]) : piece[r][i];
        }
      }
  }
  if (!told) let_next_begin();
}

// The lane's 8 numbers of 32 columns of a row, in pairs; `row` points to what would be its first piece of those columns
// in an even row.
DEVICE void read_x(const unsigned char* row, int odd, uint32 (&b)[PARTS][4]) {
  if constexpr (PARTS == 1) {
    const Words v = *reinterpret_cast<const Words*>(row);
#pragma unroll
    for (int i = 0; i < 4; i++) b[0][i] = v.at[i];
  } else {
    float v[8];
#pragma unroll
    for (int i = 0; i < 8; i += 4) {
      const Vec<float, 4> piece = *reinterpret_cast<const Vec<float, 4>*>(row + (i ? 16 - odd : odd));
#pragma unroll
      for (int j = 0; j < 4; j++) v[i + j] = piece.at[j];
    }
#pragma unroll
    for (int part = 0; part < 3; part++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        float &low = v[arranged_at(2 * i)], &high = v[arranged_at(2 * i + 1)];
        const uint32 pair = pair_bits<bf16>(low, high);
        b[part][i] = pair;
        low -= bits_float(pair << 16);
        high -= bits_float(pair & 0xffff0000u);
      }
  }
}

// ---- Sums of a warp

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
      uint32 a[2][4];
      read_weights<C, 4 * WIDTH, 8 * PITCH, CODES>(tiles + i * TILE * PITCH, half, a);
#pragma unroll
      for (int s = 0; s < 2; s++) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int p = 0; p < PARTS; p++) {
            float(&d)[4] = part[CHAINS == 2 ? s : 0][i][n];
            mma_16<Product>(d, a[s], {b[n][p][2 * s], b[n][p][2 * s + 1]});
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

  DEVICE void scaled(int i, const Scale& s, const Units& units, float (&total)[MT][NT][4]) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float sum = part[0][i][n][j];
        if constexpr (CHAINS == 2) sum += part[CHAINS - 1][i][n][j];
        if constexpr (CODES) sum = sum * units.at[0] - units.at[1];
        if constexpr (ZEROS) sum -= s.zero[j / 2] * x[n][j % 2];
        total[i][n][j] += s.scale[j / 2] * sum;
      }
  }
};

// Grid: x blocks that take groups of MT tiles in turns, y passes over `pass` rows of x each; up to 16 warps, with MT
// at least. Dynamic shared memory: BARRIERS; x, units * pass * ROW_BYTES, and its Units; STAGES * STAGE_BYTES; then, a warp, 16 MT *
// (pass | 1) sums. The rows of x are x_row numbers apart, those of W row_bytes; all of them begin at multiples of 16
// bytes; K is a multiple of 8. UNITS is a multiple of the warps or not less than all units. out is dense. x may come from
// a kernel that still runs when this one begins, W may not. So x is not __restrict__: the compiler would take it for
// constant.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    quant_linear(const T* x, const unsigned char* __restrict__ weights, const unsigned char* __restrict__ scales, T* out,
                 int64 M, int64 K, int64 O, int64 x_row, int64 row_bytes, int64 all_units, int64 rows_a_pass) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tiles = (int)((O + TILE - 1) / TILE), units = (int)all_units, pass = (int)rows_a_pass;
  const int groups = (tiles + MT - 1) / MT, pieces = (units + UNITS - 1) / UNITS;
  const int64 first_row = (int64)blockIdx.y * pass;
  const int rows = (int)min((int64)pass, M - first_row), stride = pass | 1;
  auto barrier = [&](int stage) { return reinterpret_cast<Barrier*>(memory + 8 * stage); };
  unsigned char* const x_s = memory + BARRIERS;
  Units* const units_s = reinterpret_cast<Units*>(x_s + units * pass * ROW_BYTES);
  unsigned char* const stages = x_s + units * pass * ROW_BYTES + (CODES ? (units + 15) / 16 * 128 : 0);
  float* const sums_s = reinterpret_cast<float*>(stages + STAGES * STAGE_BYTES);

  // What comes next: piece `next_piece` of group `next_group`.
  int next_group = blockIdx.x, next_piece = 0;
  auto fetch = [&](int stage) {
    if (next_group < groups) {
      unsigned char* const to = stages + stage * STAGE_BYTES;
      const int first = next_piece * UNITS, some = min(UNITS, units - first);
      const int bytes = (int)min((int64)some * UNIT_BYTES, row_bytes - (int64)first * UNIT_BYTES);
      const int w_rows = (int)min((int64)(MT * TILE), O - (int64)next_group * (MT * TILE));
      const int w_tiles = min(MT, tiles - next_group * MT);
      const unsigned char* const from = weights + (int64)next_group * (MT * TILE) * row_bytes + (int64)first * UNIT_BYTES;
      const unsigned char* const scales_from = scales + ((int64)next_group * MT * units + first) * SCALE_BYTES;
      if (ENGINE) {
        if (lane == 0) {  // of each warp, for a warp's copies are begun one after the other
          if (warp == 0) expect(barrier(stage), (uint32)(w_rows * bytes + w_tiles * some * SCALE_BYTES));
          for (int r = warp; r < w_rows; r += warps)
            copy_run(to + r * PITCH, from + r * row_bytes, bytes, barrier(stage));
          if (SCALE_BYTES && warp < w_tiles)
            copy_run(to + SCALES_AT + warp * UNITS * SCALE_BYTES, scales_from + (int64)warp * units * SCALE_BYTES,
                     some * SCALE_BYTES, barrier(stage));
        }
      } else {
        for (int i = threadIdx.x * 16; i < w_rows * bytes; i += blockDim.x * 16)
          copy_async_16(to + i / bytes * PITCH + i % bytes, from + i / bytes * row_bytes + i % bytes, true);
        for (int i = threadIdx.x * 16; i < w_tiles * some * SCALE_BYTES; i += blockDim.x * 16) {
          const int tile = i / (some * max(SCALE_BYTES, 1)), inside = i % (some * max(SCALE_BYTES, 1));
          copy_async_16(to + SCALES_AT + tile * UNITS * SCALE_BYTES + inside,
                        scales_from + (int64)tile * units * SCALE_BYTES + inside, true);
        }
      }
    }
    if (!ENGINE) copy_async_commit();
    if (++next_piece == pieces) next_piece = 0, next_group += gridDim.x;
  };
  if (ENGINE) {
    if (threadIdx.x < STAGES) make_barrier(barrier(threadIdx.x), 1), show_shared();
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < STAGES; i++) fetch(i);

  wait_for_previous();
  x += first_row * x_row;
  // As many loads at once as registers hold, for x is late already: it came after the first of W.
  if (CODES || (NT == 1 && rows == 1))
    fetch_x<1, 4>(x, x_row, x_s, units_s, 0, rows, (int)K, units, pass, warp, warps, lane);
  else if (NT == 1 && rows <= 4)
    fetch_x<4, 2>(x, x_row, x_s, units_s, 0, rows, (int)K, units, pass, warp, warps, lane);
  else
    for (int m = 0; m < rows; m += 8)
      fetch_x<8, NT == 1 ? 2 : 1>(x, x_row, x_s, units_s, m, rows, (int)K, units, pass, warp, warps, lane);
  __syncwarp();

  int x_lane[NT];  // where the lane's part of a row is in a unit of x; nobody reads the sums of rows beyond the last
#pragma unroll
  for (int n = 0; n < NT; n++) x_lane[n] = keep(min(n * 8 + g, rows - 1) * ROW_BYTES + t * 8 * (int)sizeof(T));
  const int odd = keep(g % 2 * SWAPPED), w_lane = keep(g * PITCH + t * WIDTH);
  const int scale_lane = keep(SCALES_AT + g * 4 * (1 + ZEROS));

  constexpr int GROUP_OUT = MT * TILE;
  const int row = threadIdx.x % GROUP_OUT, m_first = threadIdx.x / GROUP_OUT, m_step = blockDim.x / GROUP_OUT;
  int stage = 0;
  uint32 parity = 0;
  for (int group = blockIdx.x; group < groups; group += gridDim.x) {
    Scale whole[MT];
    if constexpr (GROUPS == 0) {
#pragma unroll
      for (int i = 0; i < MT; i++)
        whole[i] = read_scale(scales + (min(group * MT + i, tiles - 1) * 8 + g) * (4 * (1 + ZEROS)));
    }
    float total[MT][NT][4] = {};
    Sums sums;
    sums.clear();
    for (int piece = 0; piece < pieces; piece++) {
      if (ENGINE) wait_for(barrier(stage), parity);
      else copy_async_wait<STAGES - 1>(), __syncthreads();
      const unsigned char* const at = stages + stage * STAGE_BYTES;
      const int some = min(UNITS, units - piece * UNITS);
      for (int unit = warp; unit < some; unit += warps) {
        const unsigned char* x_at[NT];
#pragma unroll
        for (int n = 0; n < NT; n++) x_at[n] = x_s + ((piece * UNITS + unit) * pass * ROW_BYTES + x_lane[n]);
        const Units of_x = CODES ? units_s[piece * UNITS + unit] : Units{};
#pragma unroll
        for (int half = 0; half < 4; half++) {
          sums.add(half, at + (unit * UNIT_BYTES + w_lane), x_at, odd);
          if constexpr (GROUPS > 0)
            if ((half + 1) % HALVES == 0) {
              const unsigned char* const scale = at + (unit * SCALE_BYTES + scale_lane) + half / HALVES * (32 * (1 + ZEROS));
#pragma unroll
              for (int i = 0; i < MT; i++) sums.scaled(i, read_scale(scale + i * UNITS * SCALE_BYTES), of_x, total);
              sums.clear();
            }
        }
      }
      if (piece + 1 < pieces) {
        __syncthreads();
        fetch(stage);
        if (++stage == STAGES) stage = 0, parity ^= 1;
      }
    }
    if constexpr (GROUPS == 0) {
#pragma unroll
      for (int i = 0; i < MT; i++) sums.scaled(i, whole[i], {}, total);
    }

#pragma unroll
    for (int i = 0; i < MT; i++)
#pragma unroll
      for (int n = 0; n < NT; n++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          const int m = n * 8 + 2 * t + j % 2;
          if (m < rows) sums_s[((warp * MT + i) * TILE + g + j / 2 * 8) * stride + m] = total[i][n][j];
        }
    __syncthreads();
    const bool more = group + (int)gridDim.x < groups;
    if (more) {
      fetch(stage);
      if (++stage == STAGES) stage = 0, parity ^= 1;
    }
    const int64 o = (int64)group * GROUP_OUT + row;
    for (int m = m_first; m < rows && o < O; m += m_step) {
      float sum = 0.0f;
#pragma unroll 4
      for (int w = 0; w < warps; w++) sum += sums_s[(w * GROUP_OUT + row) * stride + m];
      out[(first_row + m) * O + o] = from_float<T>(sum);
    }
    if (more) __syncthreads();
  }
}
