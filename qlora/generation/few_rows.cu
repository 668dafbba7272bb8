// Matmuls of a few rows with weights in 4 bits, an adapter's part included; few_rows.py says what each is given.
//
// Both kernels multiply 16 rows of a matrix with all rows of x by mma.m16n8k16, whose first operand are the matrix's
// rows. Which 16 columns one mma takes is free, as long as both operands agree: each thread takes 16 neighbouring
// columns of a block of 64, so that it reads whole words. x is kept in that order ("fragments"): for each block and each
// 8 rows, the 16 bytes of each thread, twice. Codes become 16-bit numbers by byte permutations, of their upper bytes
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

// Leaves each warp's sums, [matrix rows, rows of x], where all threads read them.
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
  const int n0 = min(first + g, width - 1), n1 = min(first + g + 8, width - 1);
  const int blocks = columns / 64, chunks = (blocks + 3) / 4;
  const uint2* from0 = (const uint2*)(packed + (size_t)n0 * (columns / 2)) + t;
  const uint2* from1 = (const uint2*)(packed + (size_t)n1 * (columns / 2)) + t;
  uint2 next0[4], next1[4];
  auto fetch = [&](int chunk) {
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int block = EVEN ? chunk * 4 + i : min(chunk * 4 + i, blocks - 1);
      next0[i] = __ldcs(from0 + block * 4), next1[i] = __ldcs(from1 + block * 4);
    }
  };
  fetch(min(warp, chunks - 1));
  __shared__ float levels[256];
  if (NESTED) {
    for (int i = threadIdx.x; i < 256; i += 32 * WARPS) levels[i] = nested_codebook[i];
    __syncthreads();
  }
  float acc[TILES][4] = {};
  const int segments = 1 + (end0 < width) + (end1 < width), segment = (first >= end0) + (first >= end1);
  for (int r = warp * 16; r < rank; r += WARPS * 16) {
    const u32 *b0 = (const u32*)(b + (size_t)n0 * rank + r) + t, *b1 = (const u32*)(b + (size_t)n1 * rank + r) + t;
#pragma unroll
    for (int j = 0; j < TILES; j++) {
      const int m = min(j * 8 + g, rows - 1);
      const float2* from = (const float2*)(xa + ((size_t)m * segments + segment) * rank + r) + t;
      float2 u = {}, v = {};
#pragma unroll 8
      for (int slice = 0; slice < slices; slice++, from += rows * segments * rank / 2) {
        const float2 more = from[0], last = from[4];
        u.x += more.x, u.y += more.y, v.x += last.x, v.y += last.y;
      }
      mma(acc[j], b0[0], b1[0], b0[4], b1[4], round16(u.x) | round16(u.y) << 16, round16(v.x) | round16(v.y) << 16);
    }
  }
  int group0 = -1, group1 = -1;
  float scale0 = 0, scale1 = 0, offset0 = 0, offset1 = 0;
  for (int chunk = warp; chunk < chunks; chunk += WARPS) {
    uint2 codes0[4], codes1[4];
#pragma unroll
    for (int i = 0; i < 4; i++) codes0[i] = next0[i], codes1[i] = next1[i];
    const int at0 = n0 * blocks + chunk * 4, at1 = n1 * blocks + chunk * 4;
    u32 levels0 = 0, levels1 = 0;
    if (NESTED && EVEN) levels0 = *(const u32*)((const u8*)absmax + at0), levels1 = *(const u32*)((const u8*)absmax + at1);
    fetch(min(chunk + WARPS, chunks - 1));
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int block = chunk * 4 + i;
      if (!EVEN && block >= blocks) break;
      float absmax0, absmax1;
      if (NESTED) {
        if (!EVEN) levels0 = ((const u8*)absmax)[at0 + i] << 8 * i, levels1 = ((const u8*)absmax)[at1 + i] << 8 * i;
        if (!EVEN || i == 0) {  // a group of 256 absmax values ends with a chunk, where rows have whole chunks
          if (at0 + i >> 8 != group0) group0 = at0 + i >> 8, scale0 = nested_absmax[group0], offset0 = nested_offset[group0];
          if (at1 + i >> 8 != group1) group1 = at1 + i >> 8, scale1 = nested_absmax[group1], offset1 = nested_offset[group1];
        }
        absmax0 = levels[levels0 >> 8 * i & 255] * scale0 + offset0;
        absmax1 = levels[levels1 >> 8 * i & 255] * scale1 + offset1;
      } else {
        absmax0 = ((const float*)absmax)[at0 + i], absmax1 = ((const float*)absmax)[at1 + i];
      }
      u32 a0[8], a1[8];
      decode(codes0[i].x, a0), decode(codes0[i].y, a0 + 4), decode(codes1[i].x, a1), decode(codes1[i].y, a1 + 4);
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        const uint4* from = fragments + (block * TILES + j) * 64 + lane;
        const uint4 u = from[0], v = from[32];
        float c[4] = {};
        mma(c, a0[0], a1[0], a0[1], a1[1], u.x, u.y);
        mma(c, a0[2], a1[2], a0[3], a1[3], u.z, u.w);
        mma(c, a0[4], a1[4], a0[5], a1[5], v.x, v.y);
        mma(c, a0[6], a1[6], a0[7], a1[7], v.z, v.w);
        acc[j][0] += absmax0 * c[0], acc[j][1] += absmax0 * c[1];
        acc[j][2] += absmax1 * c[2], acc[j][3] += absmax1 * c[3];
      }
    }
  }
  share(acc, parts);
  for (int i = threadIdx.x; i < TILES * 8 * 16; i += 32 * WARPS) {
    const int m = i / 16, n = first + i % 16;
    if (m < rows && n < width) out[(size_t)m * width + n] = round16(sum_of(parts, m, i % 16));
  }
}
