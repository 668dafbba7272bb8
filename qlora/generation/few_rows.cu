// Matmuls of a few rows with weights in 4 bits, an adapter's part included; few_rows.py says what each is given.
//
// Both kernels multiply 16 rows of a matrix with all rows of x by mma.m16n8k16, whose first operand are the matrix's
// rows. Which 16 columns one mma takes is free, as long as both operands agree: each thread takes 16 neighbouring
// columns of a block of 64, so that it reads whole words. x is kept in that order ("fragments"): for each block and
// each 8 rows, the 16 bytes of each thread, twice. Codes become 16-bit numbers by byte permutations, of their upper bytes
// (T) and lower bytes (E) apart; a block's absmax multiplies the sum of its products, in 32 bits.
//
// Defined before: HALF ("bf16" or "f16"), T0..3 and E0..3 (the codebook), TILES (of 8 rows of x), WARPS, RESIDENT
// (blocks a multiprocessor), NESTED (double quantization, else 0), EVEN (whether a row has a multiple of 4 blocks).

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;

__device__ __forceinline__ u32 permute(u32 a, u32 b, u32 selection) {
  u32 result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selection));
  return result;
}

__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." HALF "." HALF ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
               "{%0,%1,%2,%3};"
               : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ u32 round16(float x) {
  u16 result;
  asm("cvt.rn." HALF ".f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
}

// Eight codes, the first of each byte in its upper half, as four pairs of numbers.
__device__ __forceinline__ void decode(u32 codes, u32* pairs) {
  u32 low = codes & 0x77777777u, side = ((codes >> 1) & 0x44444444u) | 0x32103210u;
#pragma unroll
  for (int half = 0; half < 2; half++, low >>= 16, side >>= 16) {
    u32 tops = permute(permute(T0, T1, low), permute(T2, T3, low), side);
    u32 ends = permute(permute(E0, E1, low), permute(E2, E3, low), side);
    pairs[2 * half] = permute(ends, tops, 0x4051u);
    pairs[2 * half + 1] = permute(ends, tops, 0x6273u);
  }
}

// Leaves each warp's sums, [rows of x, rows of the matrix], where all threads read them.
__device__ __forceinline__ void share(float (&acc)[TILES][4], float (*parts)[TILES * 8][17]) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int j = 0; j < TILES; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) parts[warp][j * 8 + 2 * t + i % 2][g + i / 2 * 8] = acc[j][i];
  __syncthreads();
}

__device__ __forceinline__ float sum_of(float (*parts)[TILES * 8][17], int m, int n) {
  float total = 0;
#pragma unroll
  for (int warp = 0; warp < WARPS; warp++) total += parts[warp][m][n];
  return total;
}

// xa [slices, rows, width] = x [rows, columns] a [width, columns]^T, a slice of the columns each; and x as fragments.
extern "C" __global__ void __launch_bounds__(32 * WARPS) read_rows(
    const u16* __restrict__ x, const u16* __restrict__ a, float* __restrict__ xa, uint4* __restrict__ fragments,
    int rows, int columns, int width) {
  __shared__ float parts[WARPS][TILES * 8][17];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = blockIdx.x * 16;
  const int n0 = min(first + g, width - 1), n1 = min(first + g + 8, width - 1), blocks = columns / 64;
  const int start = blocks * blockIdx.y / gridDim.y, stop = blocks * (blockIdx.y + 1) / gridDim.y;
  float acc[TILES][4] = {};
  for (int block = start + warp; block < stop; block += WARPS) {
    const int at = block * 64 + t * 16;
    uint4 p = {}, q = {}, r = {}, s = {};
    if (width > 0) {
      const uint4* from = (const uint4*)(a + (size_t)n0 * columns + at);
      p = from[0], q = from[1];
      from = (const uint4*)(a + (size_t)n1 * columns + at);
      r = from[0], s = from[1];
    }
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      const int m = j * 8 + g;
      uint4 u = {}, v = {};
      if (m < rows) {
        const uint4* from = (const uint4*)(x + (size_t)m * columns + at);
        u = from[0], v = from[1];
      }
      if (blockIdx.x == 0) {
        uint4* to = fragments + (block * TILES + j) * 64 + lane;
        to[0] = u, to[32] = v;
      }
      mma(acc[j], p.x, r.x, p.y, r.y, u.x, u.y);
      mma(acc[j], p.z, r.z, p.w, r.w, u.z, u.w);
      mma(acc[j], q.x, s.x, q.y, s.y, v.x, v.y);
      mma(acc[j], q.z, s.z, q.w, s.w, v.z, v.w);
    }
  }
  share(acc, parts);
  for (int i = threadIdx.x; i < TILES * 8 * 16; i += 32 * WARPS) {
    const int m = i / 16, n = first + i % 16;
    if (m < rows && n < width) xa[((size_t)blockIdx.y * rows + m) * width + n] = sum_of(parts, m, i % 16);
  }
}

// out [rows, width] = x weight^T + xa b^T. The weight's rows up to end0, up to end1 and the others have an adapter each.
extern "C" __global__ void __launch_bounds__(32 * WARPS, RESIDENT) multiply(
    const uint4* __restrict__ fragments, const u8* __restrict__ packed, const void* __restrict__ absmax,
    const float* __restrict__ nested_codebook, const float* __restrict__ nested_absmax,
    const float* __restrict__ nested_offset, const float* __restrict__ xa, const u16* __restrict__ b,
    u16* __restrict__ out, int rows, int columns, int width, int rank, int slices, int end0, int end1) {
  __shared__ float parts[WARPS][TILES * 8][17];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, first = blockIdx.x * 16;
  const int n[2] = {min(first + g, width - 1), min(first + g + 8, width - 1)};
  const int blocks = columns / 64, chunks = (blocks + 3) / 4;
  uint2 next[2][4];
  auto fetch = [&](int chunk, int i) {
    const int block = EVEN ? chunk * 4 + i : min(chunk * 4 + i, blocks - 1);
#pragma unroll
    for (int k = 0; k < 2; k++)
      next[k][i] = __ldcs((const uint2*)(packed + (size_t)n[k] * (columns / 2)) + block * 4 + t);
  };
#pragma unroll
  for (int i = 0; i < 4; i++) fetch(min(warp, chunks - 1), i);
  __shared__ float levels[256];
  if (NESTED) {
    for (int i = threadIdx.x; i < 256; i += 32 * WARPS) levels[i] = nested_codebook[i];
    __syncthreads();
  }
  float acc[TILES][4] = {};
  const int segments = 1 + (end0 < width) + (end1 < width), segment = (first >= end0) + (first >= end1);
  for (int r = warp * 16; r < rank; r += WARPS * 16) {
    const u32 *b0 = (const u32*)(b + (size_t)n[0] * rank + r) + t, *b1 = (const u32*)(b + (size_t)n[1] * rank + r) + t;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      const int m = min(j * 8 + g, rows - 1);
      const float2* part = (const float2*)(xa + ((size_t)m * segments + segment) * rank + r) + t;
      float2 u = {}, v = {};
#pragma unroll 8
      for (int slice = 0; slice < slices; slice++, part += rows * segments * rank / 2) {
        const float2 more = part[0], last = part[4];
        u.x += more.x, u.y += more.y, v.x += last.x, v.y += last.y;
      }
      mma(acc[j], b0[0], b1[0], b0[4], b1[4], round16(u.x) | round16(u.y) << 16, round16(v.x) | round16(v.y) << 16);
    }
  }
  int group[2] = {-1, -1};
  float scale[2], offset[2];
  for (int chunk = warp; chunk < chunks; chunk += WARPS) {
    u32 bytes[2];
#pragma unroll
    for (int k = 0; k < 2; k++)
      if (NESTED && EVEN) bytes[k] = *(const u32*)((const u8*)absmax + n[k] * blocks + chunk * 4);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int block = chunk * 4 + i;
      if (!EVEN && block >= blocks) break;
      float top[2];
      u32 a[2][8];
#pragma unroll
      for (int k = 0; k < 2; k++) {
        const int at = n[k] * blocks + block;
        if (NESTED) {
          if (!EVEN) bytes[k] = ((const u8*)absmax)[at] << 8 * i;
          // A group of 256 absmax values ends with a chunk, where rows have whole chunks.
          if ((!EVEN || i == 0) && at >> 8 != group[k])
            group[k] = at >> 8, scale[k] = nested_absmax[at >> 8], offset[k] = nested_offset[at >> 8];
          top[k] = levels[bytes[k] >> 8 * i & 255] * scale[k] + offset[k];
        } else {
          top[k] = ((const float*)absmax)[at];
        }
        decode(next[k][i].x, a[k]), decode(next[k][i].y, a[k] + 4);
      }
      fetch(min(chunk + WARPS, chunks - 1), i);
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        const uint4* read = fragments + (block * TILES + j) * 64 + lane;
        const uint4 u = read[0], v = read[32];
        float c[4] = {};
        mma(c, a[0][0], a[1][0], a[0][1], a[1][1], u.x, u.y);
        mma(c, a[0][2], a[1][2], a[0][3], a[1][3], u.z, u.w);
        mma(c, a[0][4], a[1][4], a[0][5], a[1][5], v.x, v.y);
        mma(c, a[0][6], a[1][6], a[0][7], a[1][7], v.z, v.w);
#pragma unroll
        for (int i = 0; i < 4; i++) acc[j][i] += top[i / 2] * c[i];
      }
    }
  }
  share(acc, parts);
  for (int i = threadIdx.x; i < TILES * 8 * 16; i += 32 * WARPS) {
    const int m = i / 16, row = first + i % 16;
    if (m < rows && row < width) out[(size_t)m * width + row] = round16(sum_of(parts, m, i % 16));
  }
}
