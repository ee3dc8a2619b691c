// gemm_w8a8_small.cu -- the product of gemm_w8a8.cu for few tokens: bound by reading the weights once.
//
// The sides are swapped: 16 output channels are the rows of the tensor-core tile, 8*T tokens its columns. A block owns
// 16 channels; its warps share K in turns of 256 bytes and add up through shared memory, in a fixed order.
// No packing: since a dot product does not care for the order of k, lane (g, t) reads 16 consecutive bytes of rows
// g and g+8 at k0 + 16t, and the tokens in the same way; words 0,1 feed one mma and words 2,3 the next.
#include "prims.cuh"
#ifndef NAME
#define NAME gemm_w8a8_small
#define ELEMENT F16  // of y
#define TOKENS 1     // tiles of 8 tokens
#endif
typedef ELEMENT E;
constexpr int T = TOKENS, WARPS = 8, SPAN = 4;  // SPAN * 64 bytes of a row in flight a warp

extern "C" __global__ void __launch_bounds__(WARPS * 32)
NAME(const s8* __restrict__ x, const s8* __restrict__ w, const float* __restrict__ scale, const float* __restrict__ largest,
     const int* __restrict__ sums, const float* __restrict__ bias, E::bits* __restrict__ y, int M, int N, int K, int zero) {
  DYNAMIC_SHARED(int, parts);  // [WARPS][T][4 registers][32 lanes]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int n0 = blockIdx.x * 16, m0 = blockIdx.y * 8 * T;
  const s8* w0 = w + (long long)min(n0 + g, N - 1) * K + 16 * t;  // rows past the end: any row, never stored
  const s8* w1 = w + (long long)min(n0 + g + 8, N - 1) * K + 16 * t;
  const s8* xs[T];
#pragma unroll
  for (int j = 0; j < T; j++) xs[j] = x + (long long)min(m0 + j * 8 + g, M - 1) * K + 16 * t;

  int acc[T][4] = {};
  for (int k = warp * SPAN * 64; k < K; k += WARPS * SPAN * 64) {
    uint4 lo[SPAN], hi[SPAN];
#pragma unroll
    for (int s = 0; s < SPAN; s++) {
      const bool in = k + s * 64 < K;  // the same for the whole warp; K is a multiple of 64
      lo[s] = in ? load_once(w0 + k + s * 64) : uint4{0, 0, 0, 0};
      hi[s] = in ? load_once(w1 + k + s * 64) : uint4{0, 0, 0, 0};
    }
#pragma unroll
    for (int s = 0; s < SPAN; s++) {
      const int at = k + s * 64 < K ? k + s * 64 : 0;
#pragma unroll
      for (int j = 0; j < T; j++) {
        const uint4 b = load_again(xs[j] + at);
        mma_s8(acc[j], {lo[s].x, hi[s].x, lo[s].y, hi[s].y}, b.x, b.y);
        mma_s8(acc[j], {lo[s].z, hi[s].z, lo[s].w, hi[s].w}, b.z, b.w);
      }
    }
  }
#pragma unroll
  for (int j = 0; j < T; j++)
#pragma unroll
    for (int r = 0; r < 4; r++) parts[((warp * T + j) * 4 + r) * 32 + lane] = acc[j][r];
  __syncthreads();
  for (int i = threadIdx.x; i < T * 128; i += WARPS * 32) {
    const int r = i >> 5 & 3, l = i & 31, n = n0 + l / 4 + 8 * (r >> 1), m = m0 + (i >> 7) * 8 + 2 * (l % 4) + (r & 1);
    int sum = 0;
#pragma unroll
    for (int p = 0; p < WARPS; p++) sum += (int)load_shared(parts + p * T * 128 + i);
    if (n >= N || m >= M) continue;
    if (sums) sum -= zero * sums[n];
    y[(long long)m * N + n] = E::store((float)sum * scale[n] * largest[m] + (bias ? bias[n] : 0.f));
  }
}
