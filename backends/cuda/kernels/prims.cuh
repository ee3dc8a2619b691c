// prims.cuh -- every instruction that C++ cannot say, once: PTX for the GPU and a lane-exact model for the CPU (EMU).
//
// No headers: NVRTC needs none, and a float operation outside these wrappers means the same on both sides
// (compile with --fmad=false on the GPU and -ffp-contract=off on the CPU). g = lane / 4, t = lane % 4 throughout.
#pragma once
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef signed char s8;
typedef unsigned long long u64;

#ifdef EMU
#define LINE_ARG , int line = __builtin_LINE()
#else
#define LINE_ARG
#define DYNAMIC_SHARED(T, name)                             \
  extern __shared__ __align__(128) unsigned char name##_raw[]; \
  T* name = reinterpret_cast<T*>(name##_raw)
#endif

// ---- element types: F16 and BF16 live in u16, F32 in float
struct F16 {
  typedef u16 bits;
  static __device__ __forceinline__ float load(u16 h) {
#ifdef EMU
    _Float16 x;
    std::memcpy(&x, &h, 2);
    return x;
#else
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
#endif
  }
  static __device__ __forceinline__ u16 store(float f) {
#ifdef EMU
    _Float16 x = (_Float16)f;
    u16 h;
    std::memcpy(&h, &x, 2);
    return h;
#else
    u16 h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
#endif
  }
};
struct BF16 {
  typedef u16 bits;
  static __device__ __forceinline__ float load(u16 h) {
#ifdef EMU
    u32 u = (u32)h << 16;
    float f;
    std::memcpy(&f, &u, 4);
    return f;
#else
    return __uint_as_float((u32)h << 16);
#endif
  }
  static __device__ __forceinline__ u16 store(float f) {
#ifdef EMU
    u32 u;
    std::memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (u16)((u + 0x7fffu + (u >> 16 & 1)) >> 16);
#else
    u16 h;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(h) : "f"(f));
    return h;
#endif
  }
};
struct F32 {
  typedef float bits;
  static __device__ __forceinline__ float load(float f) { return f; }
  static __device__ __forceinline__ float store(float f) { return f; }
};
__device__ __forceinline__ u32 float_bits(float f) {
#ifdef EMU
  u32 u;
  std::memcpy(&u, &f, 4);
  return u;
#else
  return __float_as_uint(f);
#endif
}
__device__ __forceinline__ float bits_float(u32 u) {
#ifdef EMU
  float f;
  std::memcpy(&f, &u, 4);
  return f;
#else
  return __uint_as_float(u);
#endif
}

// ---- 16 bytes of global memory a lane: weights, read once and never again / activations, read by every block
__device__ __forceinline__ uint4 load_once(const void* p LINE_ARG) {
#ifdef EMU
  emu::count_ldg(p, 16, line);
  return *(const uint4*)p;
#else
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
#endif
}
__device__ __forceinline__ uint4 load_again(const void* p LINE_ARG) {
#ifdef EMU
  emu::count_ldg(p, 16, line);
  return *(const uint4*)p;
#else
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
#endif
}
// ---- one word of shared memory a lane
__device__ __forceinline__ u32 load_shared(const void* p LINE_ARG) {
#ifdef EMU
  emu::count_lds(p, 4, line);
#endif
  return *(const u32*)p;
}

// ---- cp.async: 16 bytes global -> shared past L1; zeros where !valid (the address must be valid all the same)
__device__ __forceinline__ void cp_async16(void* shared, const void* global, bool valid LINE_ARG) {
#ifdef EMU
  emu::cp_async(shared, global, 16, valid ? 16 : 0, line);
#else
  u32 s = (u32)__cvta_generic_to_shared(shared);
  int n = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(s), "l"(global), "r"(n) : "memory");
#endif
}
__device__ __forceinline__ void cp_async_commit() {
#ifdef EMU
  emu::cp_async_commit();
#else
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
template <int PENDING> __device__ __forceinline__ void cp_async_wait() {
#ifdef EMU
  emu::cp_async_wait(PENDING);
#else
  asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

// ---- ldmatrix.x4: lane l names row l % 8 of matrix l / 8 (16 bytes), and gets bytes 4t..4t+3 of row g of each matrix
#ifdef EMU
namespace emu {
EMU_MODEL void ldmatrix(void** in, void** out, int line) {
  for (int m = 0; m < 4; m++) {
    void* rows[8];
    for (int r = 0; r < 8; r++) {
      rows[r] = *(void**)in[m * 8 + r];
      if ((uintptr_t)rows[r] % 16) snprintf(error, sizeof error, "ldmatrix misaligned at line %d", line);
    }
    count_shared(rows, 8, 16);
    for (int l = 0; l < 32; l++) std::memcpy((u32*)out[l] + m, (char*)rows[l / 4] + 4 * (l % 4), 4);
  }
}
}  // namespace emu
#endif
__device__ __forceinline__ void ldmatrix(u32 (&r)[4], const void* row LINE_ARG) {
#ifdef EMU
  emu::read(row, 16);  // each lane reads the row it named, as far as races go
  emu::warp_op(10, line, &row, r, emu::ldmatrix, line, ~0u, false);
#else
  u32 s = (u32)__cvta_generic_to_shared(row);
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(s) : "memory");
#endif
}

// ---- mma: D += A * B, with A 16 x 32 (row), B 32 x 8 (column), D 16 x 8:  D register i = D[g + 8*(i>>1)][2t + (i&1)]
// m16n8k32.s8  A register i, byte b = A[g + 8*(i&1)][4t + b + 16*(i>>1)]   B register i, byte b = B[4t + b + 16i][g]
#ifdef EMU
namespace emu {
struct MmaIn { const u32 *a, *b; };
EMU_MODEL void mma_s8(void** in, void** out, int) {
  static int a[16][32], b[32][8];
  count_mma();
  for (int l = 0; l < 32; l++) {
    auto* m = (MmaIn*)in[l];
    int g = l / 4, t = l % 4;
    for (int e = 0; e < 4; e++) {
      for (int i = 0; i < 4; i++) a[g + 8 * (i & 1)][4 * t + e + 16 * (i >> 1)] = (s8)(m->a[i] >> 8 * e);
      for (int i = 0; i < 2; i++) b[4 * t + e + 16 * i][g] = (s8)(m->b[i] >> 8 * e);
    }
  }
  for (int l = 0; l < 32; l++)
    for (int i = 0; i < 4; i++) {
      int sum = ((int*)out[l])[i];
      for (int k = 0; k < 32; k++) sum += a[l / 4 + 8 * (i >> 1)][k] * b[k][2 * (l % 4) + (i & 1)];
      ((int*)out[l])[i] = sum;
    }
}
}  // namespace emu
#endif
__device__ __forceinline__ void mma_s8(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1 LINE_ARG) {
#ifdef EMU
  u32 b[2] = {b0, b1};
  emu::MmaIn in{a, b};
  emu::warp_op(11, line, &in, d, emu::mma_s8, 0, ~0u, false);
#else
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}
