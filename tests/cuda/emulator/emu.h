// emu.h -- enough of CUDA C++ to run kernels on a CPU, one fiber per CUDA thread.
//
// A kernel's translation unit is compiled by g++ with `-DEMU -include emu.h`; sanitizers may instrument it.
// The scheduler (runtime.cpp) is never instrumented. Kernels reach what C++ cannot say through prims.cuh.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <utility>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __restrict__ __restrict
#define __align__(n) alignas(n)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
};
struct alignas(8) uint2 { unsigned x, y; };
struct alignas(16) uint4 { unsigned x, y, z, w; };
struct alignas(8) float2 { float x, y; };

// Models of warp operations run on behalf of 32 lanes, so the race detector must not see them.
#define EMU_MODEL inline __attribute__((no_sanitize("thread")))

namespace emu {
struct Thread {  // what a CUDA thread knows about itself
  dim3 tid;
  int lane, warp;
};
extern Thread* cur;
extern dim3 block_id, block_dim, grid_dim;
extern char* dynamic_smem;  // this block's dynamic shared memory, exactly as large as the launch asked
extern char error[4096];

// A rendezvous of a warp: every live lane deposits (in, out); the last to arrive runs fn(in[32], out[32], imm).
using WarpFn = void (*)(void** in, void** out, int imm);
void warp_op(int kind, int line, void* in, void* out, WarpFn fn, int imm, unsigned mask, bool orders_memory);
void block_barrier(int line);
void cp_async(void* dst, const void* src, int bytes, int src_bytes, int line);
void cp_async_commit();
void cp_async_wait(int pending);

void read(const void* p, int n);                       // tell the race detector what a collective reads
void count_shared(void* const* rows, int lanes, int bytes);  // one phase of a shared access: bank conflicts
void count_lds(const void* p, int bytes, int line);    // a plain shared load, counted per warp and source line
void count_ldg(const void* p, int bytes, int line);    // a global load: sectors per request
void count_mma();

struct Options {
  unsigned seed = 0;  // order of threads and blocks
  int schedule = 0;   // 0 round robin, 1 random, 2 one warp as far as it can go, 3 reversed
  int late = 1;       // 1: cp.async lands only at the wait that covers it; 0: at once
  int poison = 0xCD;  // what shared memory holds when a block starts
};
struct Stats {  // keep in step with COUNTERS of engines.py
  long long switches, barriers, mma, shared_requests, shared_waves, shared_ideal, global_requests, global_sectors, global_bytes;
};
extern Stats stats;

using Body = void (*)(void** args);
int launch(Body body, void** args, dim3 grid, dim3 block, size_t smem, const Options& options);

// Kernels by name, called with the very void** that cuLaunchKernel would get.
void add_kernel(const char* name, Body body);
template <class... A, size_t... I>
void call_with(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*static_cast<std::decay_t<A>*>(args[I])...);
}
template <class... A>
void call_kernel(void (*kernel)(A...), void** args) {
  call_with(kernel, args, std::index_sequence_for<A...>());
}
struct Registered {
  Registered(const char* name, Body body) { add_kernel(name, body); }
};
}  // namespace emu
#define EMU_KERNEL(k) static emu::Registered emu_registered_##k(#k, [](void** args) { emu::call_kernel(k, args); });

#define threadIdx (emu::cur->tid)
#define blockIdx emu::block_id
#define blockDim emu::block_dim
#define gridDim emu::grid_dim
#define DYNAMIC_SHARED(T, name) T* name = reinterpret_cast<T*>(emu::dynamic_smem)

inline void __syncthreads(int line = __builtin_LINE()) { emu::block_barrier(line); }
inline void __syncwarp(unsigned mask = ~0u, int line = __builtin_LINE()) {
  emu::warp_op(1, line, nullptr, nullptr, nullptr, 0, mask, true);
}
namespace emu {
EMU_MODEL void shfl_xor(void** in, void** out, int imm) {
  for (int l = 0; l < 32; l++)
    if (out[l]) std::memcpy(out[l], in[l ^ imm], 4);
}
}  // namespace emu
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int x, int = 32, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 4, "32 bits a lane");
  T r;
  emu::warp_op(2, line, &v, &r, emu::shfl_xor, x, mask, false);
  return r;
}
using std::max;
using std::min;
