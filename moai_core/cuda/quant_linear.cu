// moai: kernels quant_linear
// moai: macros T=bf16 WIDTH=4 GROUPS=1 ZEROS=0 MT=1 NT=1 STAGES=4 WARPS=8 BLOCKS=4
// moai: macros T=bf16 WIDTH=4 GROUPS=1 ZEROS=0 MT=4 NT=1 STAGES=2 WARPS=16 BLOCKS=2
// moai: macros T=fp16 WIDTH=4 GROUPS=4 ZEROS=1 MT=2 NT=2 STAGES=4 WARPS=16 BLOCKS=1
// moai: macros T=float WIDTH=4 GROUPS=2 ZEROS=1 MT=1 NT=1 STAGES=4 WARPS=8 BLOCKS=4
// moai: macros T=bf16 WIDTH=8 GROUPS=0 ZEROS=0 MT=1 NT=1 STAGES=4 WARPS=8 BLOCKS=4
// moai: macros T=fp16 WIDTH=8 GROUPS=1 ZEROS=0 MT=1 NT=2 STAGES=2 WARPS=16 BLOCKS=1
// moai: macros T=float WIDTH=8 GROUPS=0 ZEROS=0 MT=1 NT=2 STAGES=2 WARPS=16 BLOCKS=1
//
// out = x W^T of few rows of x (M, K) and an integer W (O, K): for generation, where reading W is nearly all there is
// to do.
//
// Tensor cores multiply even a single row, so that a weight of 4 bits costs about 3 instructions a lane, all told:
// integers become 16-bit numbers in pairs (quant.cuh), are summed exactly as they are, in fp32, and scaled group by
// group; weights are never rounded. Where T is float, x is split into three bf16 that add up to it.
//
// The warps of a block share out the units of MT tiles, and each reads ahead STAGES of them into shared memory of its
// own, beyond the end of a tile, so that nothing waits for the others but the sum at a tile's end, in the order of the
// warps. Blocks take tiles in turns, with x in place.
//
// Launches may overlap (gemv.cuh): a block asks for its first weights at once and looks at x, and lets out be seen, only
// after the kernel in front has ended. The next kernel's blocks may begin from the start, and do where this one leaves
// room: memory is then never idle while kernels wait for each other.
//
//   T         type of x, of the arithmetic and of out: bf16, fp16, float
//   MT, NT    tiles of 16 rows of W, of 8 rows of x, at once
//   STAGES    units that a warp reads ahead
//   WARPS, BLOCKS  what a multiprocessor has room for
//   WIDTH, GROUPS, ZEROS: quant.cuh
#include "quant.cuh"

constexpr int PER = 16 / sizeof(T);   // numbers of x in 16 bytes of shared memory
constexpr int SLOTS = UNIT / PER;     // such pieces in a unit, 16 or 32
constexpr int ROW_BYTES = UNIT * sizeof(T);
constexpr int STAGE_BYTES = MT * PART_BYTES;
constexpr int CHAINS = MT * NT == 1 ? 2 : 1;  // independent sums, where a warp has nothing else to overlap

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

// The warp's units of ROWS rows from m0 on, PIECES pieces of each by a lane at once; zeros beyond K.
template <int ROWS, int PIECES>
DEVICE void fetch_x(const T* x, int64 x_row, unsigned char* x_s, int m0, int rows, int K, int units, int pass, int warp,
                    int warps, int lane) {
  const int slot = lane % SLOTS;
  constexpr int TURNS = 32 / SLOTS;  // units that a warp's lanes read at once
  for (int j0 = lane / SLOTS; warp + j0 * warps < units; j0 += TURNS * PIECES) {
    Words piece[ROWS][PIECES];
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int k = (warp + (j0 + i * TURNS) * warps) * UNIT + slot * PER;
        piece[r][i] = {};
        if (k < K) piece[r][i] = *reinterpret_cast<const Words*>(x + min(m0 + r, rows - 1) * x_row + k);
      }
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int i = 0; i < PIECES; i++) {
        const int j = j0 + i * TURNS, m = m0 + r;
        if (warp + j * warps >= units || m >= rows) continue;
        unsigned char* to = x_s + ((warp + j * warps) * pass + m) * ROW_BYTES + place(slot, m);
        *reinterpret_cast<Words*>(to) = sizeof(T) == 2 ? arranged(piece[r][i]) : piece[r][i];
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
      read_weights<C>(tiles + i * PART_BYTES, half, a);
#pragma unroll
      for (int s = 0; s < 2; s++) {
#pragma unroll
        for (int n = 0; n < NT; n++)
#pragma unroll
          for (int p = 0; p < PARTS; p++) {
            float(&d)[4] = part[CHAINS == 2 ? s : 0][i][n];
            mma_16<C>(d, a[s], {b[n][p][2 * s], b[n][p][2 * s + 1]});
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

// Grid: x blocks that take groups of MT tiles in turns, y passes over `pass` rows of x each; up to 16 warps, with MT / 2
// at least. Dynamic shared memory: x, units * pass * ROW_BYTES; then STAGES * STAGE_BYTES a warp; then, a warp, 16 MT *
// (pass | 1) sums. The rows of x are x_row numbers apart, those of W row_bytes; all of them begin at multiples of 16
// bytes; K is a multiple of 8. out is dense. x may come from a kernel that still runs when this one begins, W may not. So
// x is not __restrict__: the compiler would take it for constant.
extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    quant_linear(const T* x, const unsigned char* __restrict__ weights, const unsigned char* __restrict__ scales, T* out,
                 int64 M, int64 K, int64 O, int64 x_row, int64 row_bytes, int64 all_units, int64 all_turns,
                 int64 rows_a_pass) {
  let_next_begin();
  extern __shared__ __align__(16) unsigned char memory[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int tiles = (int)((O + TILE - 1) / TILE), units = (int)all_units, turns = (int)all_turns, pass = (int)rows_a_pass;
  const int groups = (tiles + MT - 1) / MT, last_unit = turns * warps;
  const int64 first_row = (int64)blockIdx.y * pass;
  const int rows = (int)min((int64)pass, M - first_row), stride = pass | 1;
  unsigned char* const x_s = memory;
  unsigned char* const stages = memory + units * pass * ROW_BYTES;
  // The lane's place in the warp's stages: where it copies to, where it reads weights and scales.
  const int stage_0 = units * pass * ROW_BYTES + warp * STAGES * STAGE_BYTES;
  const int copy_mine = kept(stage_0 + piece_place(lane / 8, lane % 8));
  const int mine = kept(stage_0 + lane_place(g, t)), scale_mine = kept(stage_0 + TILE_BYTES + g * 4 * (1 + ZEROS));
  float* const sums_s = reinterpret_cast<float*>(stages + warps * STAGES * STAGE_BYTES);

  // What is read ahead next.
  int next_group = blockIdx.x, next_unit = warp;
  const unsigned char* next = weights + ((int64)next_group * MT * TILE + lane % 8) * row_bytes + warp * UNIT_BYTES + lane / 8 * 16;
  const unsigned char* next_scale = scales + ((int64)next_group * MT * units + warp) * SCALE_BYTES + lane * 16;
  const int64 a_tile = TILE * row_bytes, a_group = (int64)gridDim.x * MT * a_tile - (int64)last_unit * UNIT_BYTES;
  const int64 scale_group = ((int64)gridDim.x * MT * units - last_unit) * SCALE_BYTES;
  auto read_ahead = [&](int slot) {
    if (next_group < groups && next_unit < units) {
      const int64 left = O - (int64)next_group * MT * TILE - lane % 8, bytes = row_bytes - next_unit * UNIT_BYTES - lane / 8 * 16;
#pragma unroll
      for (int i = 0; i < MT; i++) {
        copy_tile(memory + (copy_mine + slot + i * PART_BYTES), next + i * a_tile, row_bytes, left - i * TILE, bytes);
        if (lane < SCALE_BYTES / 16)
          copy_async_16(memory + (stage_0 + TILE_BYTES + lane * 16 + slot + i * PART_BYTES),
                        next_scale + (int64)i * units * SCALE_BYTES, next_group * MT + i < tiles);
      }
    }
    copy_async_commit();
    next += warps * UNIT_BYTES, next_scale += warps * SCALE_BYTES, next_unit += warps;
    if (next_unit >= last_unit) next_unit = warp, next_group += gridDim.x, next += a_group, next_scale += scale_group;
  };
#pragma unroll
  for (int i = 0; i < STAGES; i++) read_ahead(i * STAGE_BYTES);

  wait_for_previous();
  x += first_row * x_row;
  // As many loads at once as registers hold, for x is late already: it came after the first of W.
  if (NT == 1 && rows == 1)
    fetch_x<1, 4>(x, x_row, x_s, 0, rows, (int)K, units, pass, warp, warps, lane);
  else if (NT == 1 && rows <= 4)
    fetch_x<4, 2>(x, x_row, x_s, 0, rows, (int)K, units, pass, warp, warps, lane);
  else
    for (int m = 0; m < rows; m += 8)
      fetch_x<8, 1>(x, x_row, x_s, m, rows, (int)K, units, pass, warp, warps, lane);

  int x_lane[NT];  // where the lane's part of a row is in a unit of x; nobody reads the sums of rows beyond the last
#pragma unroll
  for (int n = 0; n < NT; n++) x_lane[n] = kept(min(n * 8 + g, rows - 1) * ROW_BYTES + t * 8 * (int)sizeof(T));
  const int odd = kept(g % 2 * SWAPPED);

  constexpr int GROUP_OUT = MT * TILE;
  const int row = threadIdx.x % GROUP_OUT, m_first = threadIdx.x / GROUP_OUT, m_step = blockDim.x / GROUP_OUT;
  const int x_turn = warps * pass * ROW_BYTES;
  int slot = 0;
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
              for (int i = 0; i < MT; i++)
                sums.scaled(i, read_scale(memory + (scale_mine + slot) + i * PART_BYTES + half / HALVES * (32 * (1 + ZEROS))), total);
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
          if (m < rows) sums_s[((warp * MT + i) * TILE + g + j / 2 * 8) * stride + m] = total[i][n][j];
        }
    __syncthreads();
    const int64 o = (int64)group * GROUP_OUT + row;
    for (int m = m_first; m < rows && o < O; m += m_step) {
      float sum = 0.0f;
#pragma unroll 4
      for (int w = 0; w < warps; w++) sum += sums_s[(w * GROUP_OUT + row) * stride + m];
      out[(first_row + m) * O + o] = from_float<T>(sum);
    }
    if (group + (int)gridDim.x < groups) __syncthreads();
  }
}
