// quantize.cu -- per-token dynamic int8. One block a token:
//   largest = max(max_k |x[k]|, floor);  q[k] = clamp(rint(x[k] / largest / step) + zero, -128, 127)
// `zero` is the uint8 zero point minus 128, so 0 for a symmetric grid. Rows of q are `ld` bytes (a multiple of 64),
// zero-filled past K. A NaN anywhere in a token makes its `largest` NaN, and so its outputs.
// The row is read twice, the second time from a cache: 16 bytes at once where rows begin at multiples of them.
#include "prims.cuh"
#ifndef NAME
#define NAME quantize
#define ELEMENT F16  // of x
#endif
typedef ELEMENT E;
constexpr int THREADS = 256, EACH = 8;  // values a thread and turn

__device__ __forceinline__ void load_values(float (&v)[EACH], const E::bits* row, int k, int K, bool pieces) {
  if (!pieces) {
#pragma unroll
    for (int e = 0; e < EACH; e++) v[e] = k + e < K ? E::load(row[k + e]) : 0.f;
    return;
  }
  constexpr int LOADS = EACH * sizeof(E::bits) / 16;
#pragma unroll
  for (int i = 0; i < LOADS; i++) {
    const uint4 p = load_again(row + k + i * (EACH / LOADS));
    const u32 words[4] = {p.x, p.y, p.z, p.w};
#pragma unroll
    for (int w = 0; w < 4; w++)
      if constexpr (sizeof(E::bits) == 2) {
        v[2 * w] = E::load(words[w] & 0xffff);
        v[2 * w + 1] = E::load(words[w] >> 16);
      } else {
        v[4 * i + w] = bits_float(words[w]);
      }
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
NAME(const E::bits* __restrict__ x, s8* __restrict__ q, float* __restrict__ largest, int K, int ld, float step, int zero, float floor) {
  DYNAMIC_SHARED(u32, peaks);
  const E::bits* row = x + (long long)blockIdx.x * K;
  s8* out = q + (long long)blockIdx.x * ld;
  const bool pieces = K % EACH == 0 && (u64)x % 16 == 0;
  float v[EACH];
  u32 peak = float_bits(floor);  // non-negative floats compare as integers, and NaN is above all of them
  for (int k = threadIdx.x * EACH; k < K; k += THREADS * EACH) {
    load_values(v, row, k, K, pieces);
#pragma unroll
    for (int e = 0; e < EACH; e++) peak = max(peak, float_bits(v[e]) & 0x7fffffffu);
  }
#pragma unroll
  for (int o = 16; o; o >>= 1) peak = max(peak, __shfl_xor_sync(~0u, peak, o));
  if (threadIdx.x % 32 == 0) peaks[threadIdx.x / 32] = peak;
  __syncthreads();
#pragma unroll
  for (int w = 0; w < THREADS / 32; w++) peak = max(peak, load_shared(peaks + w));
  const float most = bits_float(peak);
  if (threadIdx.x == 0) largest[blockIdx.x] = most;
  for (int k = threadIdx.x * EACH; k < ld; k += THREADS * EACH) {
    u32 words[2] = {0, 0};
    if (k < K) load_values(v, row, k, K, pieces);
#pragma unroll
    for (int e = 0; e < EACH; e++) {
      if (k + e >= K) continue;
      const float steps = rintf(v[e] / most / step) + (float)zero;
      const int n = (int)fminf(fmaxf(steps, -128.f), 127.f);
      words[e / 4] |= (u32)(n & 0xff) << 8 * (e % 4);
    }
    *(uint2*)(out + k) = uint2{words[0], words[1]};
  }
}
