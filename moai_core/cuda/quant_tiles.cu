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
constexpr int PITCH = BO + 4;             // of sums in shared memory, those of a row of x side by side
constexpr int MINE = 4 / WK;              // times 32 columns of a unit that a warp has
constexpr int TOGETHER = HALVES < MINE ? HALVES : MINE;  // of them that share a scale
static_assert(sizeof(T) == 2 && WK * MINE == 4 && THREADS % 16 == 0, "no such division");

// A tile of W in shared memory: 16-byte pieces of the same columns side by side, so that neither copies nor reads of a
// warp share banks. Where piece `piece` (of UNIT_BYTES / 16) of a row lies, and where a lane's first word of row g is.
DEVICE int piece_place(int piece, int row) { return piece * 256 + (WIDTH == 4 ? row * 16 : row * 16 ^ piece % 2 * 64); }
DEVICE int lane_place(int g, int t) {
  return WIDTH == 4 ? g * 16 + t * 4 : t / 2 * 256 + (g * 16 ^ t / 2 * 64) + t % 2 * 8;
}

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
DEVICE Vec<float, 4> of_block(const float* shared, int rank) {
  Vec<float, 4> x;
#if !defined(MOAI_HOST) && SPLIT > 1
  uint32 at = (uint32)__cvta_generic_to_shared(shared);
  asm volatile("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(at) : "r"(rank));
  asm volatile("ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(x.at[0]), "=f"(x.at[1]), "=f"(x.at[2]), "=f"(x.at[3])
               : "r"(at)
               : "memory");
#else
  x = load_vec<float, 4>(shared);
#endif
  return x;
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
      read_weights<T, 64 * WIDTH, 128>(tiles + i * PART_BYTES, half, a);
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
// * BM * PITCH sums at least. The rows of x are x_row numbers apart, those of W row_bytes; all of them begin at multiples
// of 16 bytes; K is a multiple of 8. out is dense. x may come from a kernel that still runs when this one begins, W may
// not.
extern "C" __global__ void CLUSTER __launch_bounds__(THREADS, BLOCKS)
    quant_tiles(const T* x, const unsigned char* __restrict__ weights, const unsigned char* __restrict__ scales, T* out,
                int64 M, int64 K, int64 O, int64 x_row, int64 row_bytes, int64 all_units) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int wo = warp % WO, wk = warp / WO % WK, wm = warp / (WO * WK);
  const int units = (int)all_units, tiles = (int)((O + TILE - 1) / TILE), rank = blockIdx.x % SPLIT;
  const int tile_0 = blockIdx.x / SPLIT * TILES, first = rank * units / SPLIT, last = (rank + 1) * units / SPLIT;
  const int64 m_0 = (int64)blockIdx.y * BM;

  // Each warp copies whole tiles, each thread one 16-byte piece of every THREADS / 16-th row of x. Rows beyond the last
  // are the last once more: nobody stores what comes of them.
  constexpr int WARPS = THREADS / 32, OURS = (TILES + WARPS - 1) / WARPS;
  constexpr int APART = THREADS / 16, X_ROWS = (BM + APART - 1) / APART;
  const int slot = threadIdx.x % 16, m_mine = threadIdx.x / 16;
  const unsigned char* w_from[OURS][2];
  const unsigned char* scale_from[OURS];
  const T* x_from[X_ROWS];
#pragma unroll
  for (int i = 0; i < OURS; i++) {
    const int tile = min(tile_0 + warp + i * WARPS, tiles - 1);
#pragma unroll
    for (int down = 0; down < 2; down++)
      w_from[i][down] = weights + min((int64)tile * TILE + lane % 8 + down * 8, O - 1) * row_bytes + lane / 8 * 16 +
                        (int64)first * UNIT_BYTES;
    scale_from[i] = scales + ((int64)tile * units + first) * SCALE_BYTES + lane * 16;
  }
#pragma unroll
  for (int i = 0; i < X_ROWS; i++)
    x_from[i] = x + min(m_0 + m_mine + i * APART, M - 1) * x_row + slot * 8 + (int64)first * UNIT;
  const int w_to = keep(X_BYTES + piece_place(lane / 8, lane % 8) + warp * PART_BYTES);
  const int scale_to = keep(X_BYTES + warp * PART_BYTES + TILE_BYTES + lane * 16);
  const int x_to = keep(m_mine * ROW_BYTES + (slot * 16 ^ m_mine % 2 * 64));
  int64 w_left = row_bytes - lane / 8 * 16 - (int64)first * UNIT_BYTES, x_left = K - slot * 8 - (int64)first * UNIT;
  auto copy_w = [&](int stage) {
#pragma unroll
    for (int i = 0; i < OURS; i++)
      if (TILES % WARPS == 0 || warp + i * WARPS < TILES) {
#pragma unroll
        for (int c = 0; c < TILE_BYTES / 512; c++)
          copy_async_16(memory + (stage + w_to + i * WARPS * PART_BYTES + c % 2 * 128 + c / 2 * 1024),
                        w_from[i][c % 2] + c / 2 * 64, c / 2 * 64 < w_left);
        if (lane < SCALE_BYTES / 16)
          copy_async_16(memory + (stage + scale_to + i * WARPS * PART_BYTES), scale_from[i], true);
        w_from[i][0] += UNIT_BYTES, w_from[i][1] += UNIT_BYTES, scale_from[i] += SCALE_BYTES;
      }
    w_left -= UNIT_BYTES;
  };
  auto copy_x = [&](int stage) {
#pragma unroll
    for (int i = 0; i < X_ROWS; i++) {
      if (BM % APART == 0 || m_mine + i * APART < BM)
        copy_async_16(memory + (stage + x_to + i * APART * ROW_BYTES), x_from[i], x_left > 0);
      x_from[i] += UNIT;
    }
    x_left -= UNIT;
  };

#pragma unroll
  for (int i = 0; i < STAGES - 1; i++)
    if (first + i < last) copy_w(i * STAGE_BYTES);
  wait_for_previous();
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) {
    if (first + i < last) copy_x(i * STAGE_BYTES);
    copy_async_commit();
  }
  let_next_begin();  // what it reads ahead queues up behind x

  Sums sums;
  sums = {};
  // The lane's places in a stage, in the first of the warp's parts of a unit.
  const int w_mine = keep(X_BYTES + wo * MT * PART_BYTES + lane_place(g, t) + wk * MINE * (64 * WIDTH));
  const int scale_mine =
      keep(X_BYTES + wo * MT * PART_BYTES + TILE_BYTES + (g + wk * MINE / HALVES * 8) * 4 * (1 + ZEROS));
  int x_mine[MINE];
#pragma unroll
  for (int h = 0; h < MINE; h++)
    x_mine[h] = keep((wm * NT * 8 + g) * ROW_BYTES + t * 16 + ((wk * MINE + h) * 64 ^ g % 2 * 64));
  int now = 0, next = (STAGES - 1) * STAGE_BYTES;
  for (int unit = first; unit < last; unit++) {
    copy_async_wait<STAGES - 2>();
    __syncthreads();  // everybody's copies are there, and the oldest stage has been read
    if (unit + STAGES - 1 < last) copy_w(next), copy_x(next);
    copy_async_commit();
#pragma unroll
    for (int h = 0; h < MINE; h++) {
      sums.add(memory + (now + w_mine), h, memory + (now + x_mine[h]));
      if constexpr (GROUPS > 0)
        if ((h + 1) % TOGETHER == 0) {
#pragma unroll
          for (int i = 0; i < MT; i++)
            sums.scaled(i, read_scale(memory + (now + scale_mine) + i * PART_BYTES + h / HALVES * (32 * (1 + ZEROS))));
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
        sums_s[(wk * BM + (wm * NT + n) * 8 + 2 * t + j % 2) * PITCH + (wo * MT + i) * TILE + g + j / 2 * 8] =
            sums.total[i][n][j];
  cluster_sync();
  const int64 o_0 = (int64)tile_0 * TILE;
  for (int e = rank * THREADS + threadIdx.x; e < BO / 4 * BM; e += SPLIT * THREADS) {
    const int row = e % (BO / 4) * 4, m = e / (BO / 4);
    if (m_0 + m >= M || o_0 + row >= O) continue;
    Vec<float, 4> parts[SPLIT * WK];
#pragma unroll
    for (int i = 0; i < SPLIT * WK; i++) parts[i] = of_block(sums_s + (i % WK * BM + m) * PITCH + row, i / WK);
    Vec<T, 4> y;
#pragma unroll
    for (int j = 0; j < 4; j++) {
      float sum = 0.0f;
#pragma unroll
      for (int i = 0; i < SPLIT * WK; i++) sum += parts[i].at[j];
      y.at[j] = from_float<T>(sum);
    }
    T* const to = out + (m_0 + m) * O + o_0 + row;
    if (O % 4 == 0) store_vec<T, 4>(to, y);
    else
      for (int j = 0; j < 4 && o_0 + row + j < O; j++) to[j] = y.at[j];
  }
  cluster_sync();  // nobody goes while others read
}
