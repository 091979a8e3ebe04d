// moai: kernels quant_tiles
// moai: macros T=bf16 WIDTH=4 GROUPS=1 ZEROS=0 MT=2 NT=8 WO=4 WM=1 WK=2 STAGES=4 SPLIT=1 BLOCKS=1
// moai: macros T=bf16 WIDTH=4 GROUPS=1 ZEROS=0 MT=2 NT=8 WO=4 WM=2 WK=1 STAGES=4 SPLIT=1 BLOCKS=1
// moai: macros T=bf16 WIDTH=4 GROUPS=2 ZEROS=1 MT=2 NT=4 WO=4 WM=1 WK=2 STAGES=4 SPLIT=1 BLOCKS=1
// moai: macros T=fp16 WIDTH=8 GROUPS=0 ZEROS=0 MT=2 NT=4 WO=4 WM=1 WK=2 STAGES=3 SPLIT=1 BLOCKS=1
// moai: macros T=fp16 WIDTH=4 GROUPS=4 ZEROS=0 MT=2 NT=2 WO=4 WM=1 WK=2 STAGES=4 SPLIT=1 BLOCKS=1
//
// out = x W^T of some dozens of rows of x (M, K) and an integer W (O, K): too many for quant_linear.cu, too few for
// writing W out as numbers to be worth it.
//
// A block makes a tile of out, BO rows of W by BM of x. W and x come unit by unit (128 columns) through a ring of STAGES
// in shared memory; a warp turns the integers of MT tiles of 16 rows into fragments of 16-bit numbers in registers, once,
// and multiplies them with NT times 8 rows of x. Sums are exact integers times x in fp32, scaled group by group, as in
// quant_linear.cu.
//
// Where W has few rows, SPLIT blocks (a cluster, compute capability 9.0) share the columns of a tile and add up their
// sums through each other's shared memory: the rows of x are then read by fewer blocks, which is what such products
// are limited by. Launches may overlap, as in quant_linear.cu.
//
//   T         type of x and out: bf16, fp16              WO, WM, WK   warps along rows of W, rows of x, columns of a unit
//   MT, NT    16 rows of W, 8 rows of x of a warp         BLOCKS       what a multiprocessor has room for
//   WIDTH, GROUPS, ZEROS: quant.cuh
#include "quant.cuh"

constexpr int THREADS = 32 * WO * WM * WK;
constexpr int TILES = MT * WO, BO = TILE * TILES, BM = 8 * NT * WM;
constexpr int ROW_BYTES = UNIT * 2;
constexpr int X_BYTES = BM * ROW_BYTES, STAGE_BYTES = X_BYTES + TILES * PART_BYTES;
constexpr int PITCH = BM | 1;             // of sums in shared memory
constexpr int MINE = 4 / WK;              // times 32 columns of a unit that a warp has
constexpr int TOGETHER = HALVES < MINE ? HALVES : MINE;  // of them that share a scale
static_assert(sizeof(T) == 2 && WK * MINE == 4 && THREADS % 16 == 0, "no such division");

#if !defined(MOAI_HOST) && SPLIT > 1
#define CLUSTER __cluster_dims__(SPLIT, 1, 1)
#else
#define CLUSTER
#endif

// All blocks of the cluster have come so far, and see what the others wrote to their shared memory.
DEVICE void cluster_sync() {
#if !defined(MOAI_HOST) && SPLIT > 1
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// What block `rank` of the cluster has at this place of its shared memory.
DEVICE float of_block(const float* shared, int rank) {
#if !defined(MOAI_HOST) && SPLIT > 1
  uint32 at = (uint32)__cvta_generic_to_shared(shared);
  float x;
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(x) : "r"(at) : "memory");
  return x;
#else
  return *shared;
#endif
}

struct Sums {
  float part[MT][NT][4], x[NT][4], total[MT][NT][4];  // of a group; of x in it, for zero points; scaled

  DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        x[n][j] = 0.0f;
#pragma unroll
        for (int i = 0; i < MT; i++) part[i][n][j] = 0.0f;
      }
  }

  // 32 columns: `tiles` is the lane's place in the first of the warp's tiles, `row` its 8 columns of the first row of x.
  DEVICE void add(const unsigned char* tiles, int half, const unsigned char* row) {
    uint32 b[NT][4];
#pragma unroll
    for (int n = 0; n < NT; n++) {
      const Words v = arranged(*reinterpret_cast<const Words*>(row + n * 8 * ROW_BYTES));
#pragma unroll
      for (int i = 0; i < 4; i++) b[n][i] = v.at[i];
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
      uint32 a[2][4];
      read_weights<T>(tiles + i * PART_BYTES, half, a);
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int n = 0; n < NT; n++) mma_16<T>(part[i][n], a[s], {b[n][2 * s], b[n][2 * s + 1]});
    }
    if constexpr (ZEROS) {
      const uint32 one = (uint32)from_float<T>(1.0f).bits * 0x10001u, ones[4] = {one, one, one, one};
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int n = 0; n < NT; n++) mma_16<T>(x[n], ones, {b[n][2 * s], b[n][2 * s + 1]});
    }
  }

  DEVICE void scaled(int i, const Scale& s) {
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 4; j++) {
        float sum = part[i][n][j];
        if constexpr (ZEROS) sum -= s.zero[j / 2] * x[n][j % 2];
        total[i][n][j] += s.scale[j / 2] * sum;
      }
  }
};

// Grid: x, SPLIT blocks for each BO rows of W; y, BM rows of x each. Dynamic shared memory: STAGES * STAGE_BYTES, and WK
// * BO * PITCH sums at least. The rows of x are x_row numbers apart, those of W row_bytes; all of them begin at multiples
// of 16 bytes; K is a multiple of 8. out is dense. x may come from a kernel that still runs when this one begins, W may
// not.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, BLOCKS)
    quant_tiles(const T* x, const unsigned char* __restrict__ weights, const unsigned char* __restrict__ scales, T* out,
                int64 M, int64 K, int64 O, int64 x_row, int64 row_bytes, int64 all_units) {
  let_next_begin();
  extern __shared__ __align__(128) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int wo = warp % WO, wk = warp / WO % WK, wm = warp / (WO * WK);
  const int units = (int)all_units, tiles = (int)((O + TILE - 1) / TILE), rank = blockIdx.x % SPLIT;
  const int tile_0 = blockIdx.x / SPLIT * TILES, first = rank * units / SPLIT, last = (rank + 1) * units / SPLIT;
  const int64 m_0 = (int64)blockIdx.y * BM;

  // Each warp copies whole tiles, each thread one 16-byte piece of every THREADS / 16-th row of x.
  const unsigned char* const w_from = weights + ((int64)tile_0 * TILE + lane % 8) * row_bytes + lane / 8 * 16;
  const int w_to = kept(X_BYTES + piece_place(lane / 8, lane % 8));
  const int slot = threadIdx.x % 16, m_mine = threadIdx.x / 16;
  const T* const x_from = x + (m_0 + m_mine) * x_row + slot * 8;
  const int x_to = kept(m_mine * ROW_BYTES + (slot * 16 ^ m_mine % 2 * 64));
  auto copy_w = [&](int stage, int unit) {
    const int64 left = O - (int64)tile_0 * TILE - lane % 8, bytes = row_bytes - (int64)unit * UNIT_BYTES - lane / 8 * 16;
#pragma unroll
    for (int i = warp; i < TILES; i += THREADS / 32) {
      copy_tile(memory + (stage + w_to + i * PART_BYTES), w_from + (int64)i * TILE * row_bytes + (int64)unit * UNIT_BYTES,
                row_bytes, left - i * TILE, bytes);
      if (lane < SCALE_BYTES / 16)
        copy_async_16(memory + (stage + X_BYTES + i * PART_BYTES + TILE_BYTES + lane * 16),
                      scales + ((int64)(tile_0 + i) * units + unit) * SCALE_BYTES + lane * 16, tile_0 + i < tiles);
    }
  };
  auto copy_x = [&](int stage, int unit) {
    const bool inside = unit * UNIT + slot * 8 < K;
#pragma unroll
    for (int m = 0; m < BM; m += THREADS / 16)
      if (BM % (THREADS / 16) == 0 || m + m_mine < BM)
        copy_async_16(memory + (stage + x_to + m * ROW_BYTES), x_from + m * x_row + unit * UNIT,
                      inside && m_0 + m_mine + m < M);
  };

#pragma unroll
  for (int i = 0; i < STAGES - 1; i++)
    if (first + i < last) copy_w(i * STAGE_BYTES, first + i);
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (first + i < last) copy_x(i * STAGE_BYTES, first + i);
    copy_async_commit();
  }

  Sums sums;
  sums = {};
  const int w_mine = kept(X_BYTES + wo * MT * PART_BYTES + lane_place(g, t));
  const int scale_mine = kept(X_BYTES + wo * MT * PART_BYTES + TILE_BYTES + g * 4 * (1 + ZEROS));
  const int x_mine = kept((wm * NT * 8 + g) * ROW_BYTES + t * 16), odd = g % 2 * 64;
  int now = 0, next = (STAGES - 1) * STAGE_BYTES;
  for (int unit = first; unit < last; unit++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // everybody's copies are there, and the oldest stage has been read
    if (unit + STAGES - 1 < last) copy_w(next, unit + STAGES - 1), copy_x(next, unit + STAGES - 1);
    copy_async_commit();
#pragma unroll
    for (int h = 0; h < MINE; h++) {
      const int half = wk * MINE + h;
      sums.add(memory + (now + w_mine), half, memory + (now + x_mine + (half * 64 ^ odd)));
      if constexpr (GROUPS > 0)
        if ((h + 1) % TOGETHER == 0) {
#pragma unroll
          for (int i = 0; i < MT; i++)
            sums.scaled(i, read_scale(memory + (now + scale_mine + i * PART_BYTES + half / HALVES * (32 * (1 + ZEROS)))));
          sums.clear();
        }
    }
    now = now == (STAGES - 1) * STAGE_BYTES ? 0 : now + STAGE_BYTES;
    next = next == (STAGES - 1) * STAGE_BYTES ? 0 : next + STAGE_BYTES;
  }
  if constexpr (GROUPS == 0) {
#pragma unroll
    for (int i = 0; i < MT; i++)
      sums.scaled(i, read_scale(scales + (min(tile_0 + wo * MT + i, tiles - 1) * 8 + g) * (4 * (1 + ZEROS))));
  }

  copy_async_wait<0>();
  __syncthreads();
  float* const sums_s = reinterpret_cast<float*>(memory);
#pragma unroll
  for (int i = 0; i < MT; i++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int j = 0; j < 4; j++)
        sums_s[(wk * BO + (wo * MT + i) * TILE + g + j / 2 * 8) * PITCH + (wm * NT + n) * 8 + 2 * t + j % 2] =
            sums.total[i][n][j];
  cluster_sync();
  const int64 o_0 = (int64)tile_0 * TILE;
  for (int e = rank * THREADS + threadIdx.x; e < BO * BM; e += SPLIT * THREADS) {
    const int row = e % BO, m = e / BO;
    if (m_0 + m >= M || o_0 + row >= O) continue;
    float parts[SPLIT * WK], sum = 0.0f;
#pragma unroll
    for (int i = 0; i < SPLIT * WK; i++) parts[i] = of_block(sums_s + (i % WK * BO + row) * PITCH + m, i / WK);
#pragma unroll
    for (int i = 0; i < SPLIT * WK; i++) sum += parts[i];
    out[(m_0 + m) * O + o_0 + row] = from_float<T>(sum);
  }
  cluster_sync();  // nobody goes while others read
}
