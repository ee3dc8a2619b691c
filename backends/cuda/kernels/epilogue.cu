// epilogue.cu -- the rest of gemm_w8a8.cu after a library's product: y[m,n] = float(acc[m,n] - zero * sums[n]) * scale[n]
// * largest[m] + bias[n]. One block for 1024 channels of a token, 4 a thread: N is a multiple of 4.
#include "prims.cuh"
#ifndef NAME
#define NAME epilogue
#define ELEMENT F16  // of y
#endif
typedef ELEMENT E;
constexpr int THREADS = 256, EACH = 4;

extern "C" __global__ void __launch_bounds__(THREADS)
NAME(const int* __restrict__ acc, const float* __restrict__ scale, const float* __restrict__ largest,
     const int* __restrict__ sums, const float* __restrict__ bias, E::bits* __restrict__ y, int N, int zero) {
  const int n = (blockIdx.y * THREADS + threadIdx.x) * EACH;
  if (n >= N) return;
  const long long at = (long long)blockIdx.x * N + n;
  const uint4 p = load_once(acc + at);
  const int parts[EACH] = {(int)p.x, (int)p.y, (int)p.z, (int)p.w};
  const float most = largest[blockIdx.x];
  E::bits v[EACH];
#pragma unroll
  for (int e = 0; e < EACH; e++) {
    const int sum = parts[e] - (sums ? zero * sums[n + e] : 0);
    v[e] = E::store((float)sum * scale[n + e] * most + (bias ? bias[n + e] : 0.f));
  }
  if constexpr (sizeof(E::bits) == 2) {
    *(uint2*)(y + at) = uint2{(u32)v[0] | (u32)v[1] << 16, (u32)v[2] | (u32)v[3] << 16};
  } else {
    *(uint4*)(y + at) = uint4{float_bits(v[0]), float_bits(v[1]), float_bits(v[2]), float_bits(v[3])};
  }
}
