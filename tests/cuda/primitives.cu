// primitives.cu -- one warp runs every wrapper of prims.cuh on given inputs and stores what it got, so that a GPU can
// be compared with the CPU models bit for bit. out is [32 lanes][20 words]; floats are stored as bits.
#include "prims.cuh"

extern "C" __global__ void __launch_bounds__(32)
NAME(const u32* __restrict__ in, u32* __restrict__ out) {  // in: [32 lanes][16 words]
  DYNAMIC_SHARED(u32, shared);                              // 32 rows of 16 bytes, and 16 bytes a lane
  const int lane = threadIdx.x;
  const u32* w = in + lane * 16;
  u32* to = out + lane * 20;
  to[0] = float_bits(F16::load(w[0] & 0xffff));
  to[1] = F16::store(bits_float(w[1]));
  to[2] = float_bits(BF16::load(w[0] & 0xffff));
  to[3] = BF16::store(bits_float(w[1]));
  to[4] = __shfl_xor_sync(~0u, w[5], 5);
  to[5] = float_bits(rintf(bits_float(w[1]) / 3.f / 0.007f));

  // cp.async: lanes 0..15 copy their first 16 bytes, the others ask for zeros
  cp_async16(shared + lane * 4, in + lane * 16, lane < 16);
  cp_async_commit();
  cp_async_wait<0>();
  __syncwarp();
  u32 m[4];
  ldmatrix(m, shared + (lane * 7 % 32) * 4);
  for (int i = 0; i < 4; i++) to[6 + i] = m[i];

  const u32 a[4] = {w[6], w[7], w[8], w[9]};
  int d[4] = {(int)w[12], 1, 2, 3};
  mma_s8(d, a, w[10], w[11]);
  for (int i = 0; i < 4; i++) to[10 + i] = d[i];
  const uint4 once = load_once(in + lane * 16 + 4), again = load_again(in + lane * 16 + 8);
  to[14] = once.x ^ once.w, to[15] = again.y ^ again.z;
  to[16] = load_shared(shared + lane * 4 + 1);
  to[17] = float_bits(fminf(fmaxf(bits_float(w[13]), -128.f), 127.f));
  to[18] = (u32)(int)bits_float(w[1]), to[19] = float_bits(F32::store(F32::load(bits_float(w[14]))));
}
