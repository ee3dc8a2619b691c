// runtime.cpp -- the scheduler of emu.h. Compiled WITHOUT sanitizers; it tells ASan and TSan about its fibers when they
// are in the program. One launch runs its blocks one after another; the threads of a block are fibers.
#include "emu.h"
#undef threadIdx
#undef blockIdx
#undef blockDim
#undef gridDim
#include <sys/mman.h>
#include <ucontext.h>

#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

extern "C" {
#define WEAK __attribute__((weak))
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned);
WEAK void __tsan_destroy_fiber(void*);
WEAK void __tsan_switch_to_fiber(void*, unsigned);
WEAK void __tsan_acquire(void*);
WEAK void __tsan_release(void*);
WEAK void __tsan_read_range(void*, unsigned long);
WEAK void __tsan_write_range(void*, unsigned long);
WEAK void __sanitizer_start_switch_fiber(void**, const void*, size_t);
WEAK void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
WEAK void __asan_unpoison_memory_region(void const volatile*, size_t);
void* __libc_malloc(size_t);
void __libc_free(void*);
}

// ---- switching stacks: a few instructions on x86-64 (swapcontext makes two system calls), ucontext elsewhere
#if defined(__x86_64__)
struct Stack { void* sp = nullptr; };
extern "C" void emu_switch(void** save, void* load);
asm(R"(
.text
.globl emu_switch
.type emu_switch,@function
emu_switch:
  pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
  ret
.size emu_switch,.-emu_switch
)");
static void prepare(Stack& s, char* base, size_t size, void (*entry)()) {
  void** top = reinterpret_cast<void**>(base + size) - 2;  // 16-byte aligned, as after a call
  *top = reinterpret_cast<void*>(entry);
  s.sp = top - 6;
}
static void switch_stack(Stack& from, Stack& to) { emu_switch(&from.sp, to.sp); }
#else
struct Stack { ucontext_t uc; };
static void prepare(Stack& s, char* base, size_t size, void (*entry)()) {
  getcontext(&s.uc);
  s.uc.uc_stack.ss_sp = base;
  s.uc.uc_stack.ss_size = size;
  s.uc.uc_link = nullptr;
  makecontext(&s.uc, entry, 0);
}
static void switch_stack(Stack& from, Stack& to) { swapcontext(&from.uc, &to.uc); }
#endif

namespace emu {
// The runtime's own containers: memory the sanitizers do not watch, for fibers share it without "synchronizing".
template <class T>
struct Raw {
  using value_type = T;
  Raw() = default;
  template <class U> Raw(const Raw<U>&) {}
  T* allocate(size_t n) { return static_cast<T*>(__libc_malloc(n * sizeof(T))); }
  void deallocate(T* p, size_t) { __libc_free(p); }
  template <class U> bool operator==(const Raw<U>&) const { return true; }
  template <class U> bool operator!=(const Raw<U>&) const { return false; }
};
template <class T> using Vec = std::vector<T, Raw<T>>;
template <class T> using Set = std::set<T, std::less<T>, Raw<T>>;
template <class K, class V> using Map = std::map<K, V, std::less<K>, Raw<std::pair<const K, V>>>;

enum State { READY, AT_BARRIER, AT_WARP, DONE };
struct Copy { void* dst; const void* src; int bytes, src_bytes; };
struct Access { int warp, line, count, bytes; bool shared; };
static bool operator<(const Access& a, const Access& b) {
  return std::tie(a.warp, a.line, a.count, a.shared) < std::tie(b.warp, b.line, b.count, b.shared);
}
struct Fiber : Thread {
  Stack stack;
  char* memory;
  State state;
  int kind, line, imm, barriers, syncs;  // barriers and warp synchronizations passed so far
  unsigned mask;
  void *in, *out, *tsan, *asan;
  WarpFn fn;
  Vec<Copy> open;          // cp.async issued, not committed
  Vec<Vec<Copy>> groups;   // committed, not waited for
  Map<int, int> accesses;  // source line -> how often this thread came by
};
constexpr size_t STACK = 64 * 1024;

Thread* cur;
dim3 block_id, block_dim, grid_dim;
char* dynamic_smem;
Stats stats;
char error[4096];
static Options options;
static Body body;
static void** arguments;
static Stack main_stack;
static void *main_tsan, *main_asan;
static const void* main_bottom;
static size_t main_size;
static std::vector<Fiber*> fibers;
static int live;
// What TSan takes for locks: of each block its own, two for barriers and two a warp. They take turns: a thread that has come
// to the next barrier must not hand what it did since this one to those that have yet to leave this one.
static char end_tag, *tags;
static Map<Access, Set<uintptr_t>> touched;  // what each warp-wide access touched: sectors, or words of shared memory
static std::mt19937 rng;
static std::map<std::string, Body>& kernels() {
  static std::map<std::string, Body> k;
  return k;
}
void add_kernel(const char* name, Body b) { kernels()[name] = b; }
static Fiber* me() { return static_cast<Fiber*>(cur); }

// ---- fibers
static void to_main(bool dying = false) {
  Fiber* f = me();
  stats.switches++;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(dying ? nullptr : &f->asan, main_bottom, main_size);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(main_tsan, 1);
  switch_stack(f->stack, main_stack);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(f->asan, nullptr, nullptr);
}
static void resume(Fiber* f) {
  cur = f;
  if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&main_asan, f->memory, STACK);
  if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(f->tsan, 1);
  switch_stack(main_stack, f->stack);
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(main_asan, nullptr, nullptr);
}
static void entry() {
  if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, &main_bottom, &main_size);
  body(arguments);
  me()->state = DONE;
  live--;
  if (__tsan_release) __tsan_release(&end_tag);  // before the end of the launch, not before the next block
  to_main(true);
}

// ---- what kernels call
void read(const void* p, int n) {
  if (__tsan_read_range) return __tsan_read_range(const_cast<void*>(p), n);
  (void)*static_cast<const volatile char*>(p);  // a bad address faults here
  (void)*(static_cast<const volatile char*>(p) + n - 1);
}
static void write(void* p, int n) {
  if (__tsan_write_range) __tsan_write_range(p, n);
}
static void land(const Copy& c) {
  write(c.dst, c.bytes);
  std::memcpy(c.dst, c.src, c.src_bytes);
  std::memset(static_cast<char*>(c.dst) + c.src_bytes, 0, c.bytes - c.src_bytes);
}
void cp_async(void* dst, const void* src, int bytes, int src_bytes, int line) {
  if (reinterpret_cast<uintptr_t>(dst) % bytes || (src_bytes && reinterpret_cast<uintptr_t>(src) % bytes))
    snprintf(error, sizeof error, "cp.async misaligned at line %d", line);
  if (src_bytes) count_ldg(src, src_bytes, line), read(src, src_bytes);
  write(dst, bytes);  // it may land from now on
  Copy c{dst, src, bytes, src_bytes};
  if (!options.late) return land(c);
  std::memset(dst, 0xA5, bytes);
  me()->open.push_back(c);
}
void cp_async_commit() {
  me()->groups.push_back(std::move(me()->open));
  me()->open.clear();
}
void cp_async_wait(int pending) {
  auto& groups = me()->groups;
  int n = static_cast<int>(groups.size()) - pending;
  for (int i = 0; i < n; i++)
    for (auto& c : groups[i]) land(c);
  if (n > 0) groups.erase(groups.begin(), groups.begin() + n);
}
void block_barrier(int line) {
  me()->state = AT_BARRIER;
  me()->line = line;
  char* tag = &tags[me()->barriers++ % 2];
  if (__tsan_release) __tsan_release(tag);
  to_main();
  if (__tsan_acquire) __tsan_acquire(tag);
}
void warp_op(int kind, int line, void* in, void* out, WarpFn fn, int imm, unsigned mask, bool orders_memory) {
  Fiber* f = me();
  f->state = AT_WARP;
  f->kind = kind, f->line = line, f->in = in, f->out = out, f->fn = fn, f->imm = imm, f->mask = mask;
  char* tag = orders_memory ? &tags[2 + 2 * f->warp + f->syncs++ % 2] : nullptr;
  if (tag && __tsan_release) __tsan_release(tag);
  to_main();
  if (tag && __tsan_acquire) __tsan_acquire(tag);
}

// ---- counters
static void count_banks(const Set<uintptr_t>& words) {
  int bank[32] = {}, worst = 0;
  for (uintptr_t w : words) worst = std::max(worst, ++bank[w % 32]);
  stats.shared_requests++;
  stats.shared_waves += worst;
  stats.shared_ideal += (words.size() + 31) / 32;
}
void count_shared(void* const* rows, int lanes, int bytes) {
  Set<uintptr_t> words;
  for (int i = 0; i < lanes; i++)
    for (int b = 0; b < bytes; b += 4) words.insert((static_cast<char*>(rows[i]) - dynamic_smem + b) / 4);
  count_banks(words);
}
static void count(const void* p, int bytes, int line, bool shared) {
  Fiber* f = me();
  uintptr_t a = shared ? static_cast<const char*>(p) - dynamic_smem : reinterpret_cast<uintptr_t>(p), unit = shared ? 4 : 32;
  auto& units = touched[{f->warp, line, f->accesses[line]++, bytes, shared}];
  for (uintptr_t u = a / unit; u <= (a + bytes - 1) / unit; u++) units.insert(u);
}
void count_lds(const void* p, int bytes, int line) { count(p, bytes, line, true); }
static const char* watched;  // reads of these bytes are counted one by one
static size_t watched_bytes;
static unsigned char* watched_reads;
void count_ldg(const void* p, int bytes, int line) {
  stats.global_bytes += bytes;
  if (reinterpret_cast<uintptr_t>(p) % bytes) snprintf(error, sizeof error, "%d bytes misaligned at line %d", bytes, line);
  const size_t from = static_cast<const char*>(p) - watched;
  if (watched && from < watched_bytes)
    for (int b = 0; b < bytes; b++) watched_reads[from + b] += watched_reads[from + b] < 255;
  count(p, bytes, line, false);
}
void count_mma() { stats.mma++; }
static void close_counters() {
  for (auto& [access, units] : touched)
    if (access.shared)
      count_banks(units);
    else
      stats.global_requests++, stats.global_sectors += units.size();
  touched.clear();
}

// ---- the scheduler
static bool fail(const char* what) {
  static const char* names[] = {"ready", "at __syncthreads on line", "at a warp operation on line", "exited"};
  int n = snprintf(error, sizeof error, "%s in block (%u,%u,%u):", what, block_id.x, block_id.y, block_id.z);
  std::map<std::pair<int, int>, int> tally;
  for (auto* f : fibers) tally[{f->state, f->state == DONE ? 0 : f->line}]++;
  for (auto& [where, threads] : tally)
    n += snprintf(error + n, sizeof error - n, " %d thread(s) %s %d;", threads, names[where.first], where.second);
  return false;
}
static size_t warp_end(size_t w) { return std::min(fibers.size(), (w + 1) * 32); }
// Runs the collective a warp is waiting at, once all its live lanes have come to the same one.
static bool release_warp(size_t w) {
  Fiber* first = nullptr;
  void *in[32] = {}, *out[32] = {};
  for (size_t i = w * 32; i < warp_end(w); i++) {
    Fiber* f = fibers[i];
    if (f->state == DONE) continue;
    if (f->state != AT_WARP) return true;
    if (!first) first = f;
    if (f->line != first->line || f->kind != first->kind || f->imm != first->imm) return fail("warp divergence at a collective");
  }
  if (!first) return true;
  for (int l = 0; l < 32; l++) {
    size_t i = w * 32 + l;
    bool here = i < fibers.size() && fibers[i]->state != DONE;
    if ((first->mask >> l & 1) != here) return fail("a collective's mask does not name the lanes that are live");
    if (here) in[l] = fibers[i]->in, out[l] = fibers[i]->out;
  }
  if (first->fn) cur = first, first->fn(in, out, first->imm);
  for (size_t i = w * 32; i < warp_end(w); i++)
    if (fibers[i]->state == AT_WARP) fibers[i]->state = READY;
  return true;
}
static bool release_barrier(bool& progress) {
  int at = 0, line = -1;
  bool mixed = false;
  for (auto* f : fibers)
    if (f->state == AT_BARRIER) at++, mixed |= line >= 0 && line != f->line, line = f->line;
  if (!at || at != live) return true;
  if (mixed) return fail("threads at different __syncthreads");
  if (live != static_cast<int>(fibers.size())) return fail("__syncthreads after some threads exited");
  for (auto* f : fibers) f->state = f->state == AT_BARRIER ? READY : f->state;
  stats.barriers++;
  return progress = true;
}
static bool run_block() {
  const size_t n = fibers.size(), warps = (n + 31) / 32;
  std::vector<size_t> order(n), warp_order(warps);
  for (size_t i = 0; i < n; i++) order[i] = i;
  for (size_t w = 0; w < warps; w++) warp_order[w] = w;
  if (options.schedule == 3) std::reverse(order.begin(), order.end());
  while (live) {
    bool progress = false;
    if (options.schedule == 2) {
      std::shuffle(warp_order.begin(), warp_order.end(), rng);
      for (size_t w : warp_order)
        for (bool again = true; again;) {
          again = false;
          for (size_t i = w * 32; i < warp_end(w); i++)
            if (fibers[i]->state == READY) resume(fibers[i]), progress = again = true;
          if (!release_warp(w)) return false;
        }
    } else {
      if (options.schedule == 1) std::shuffle(order.begin(), order.end(), rng);
      for (size_t i : order)
        if (fibers[i]->state == READY) resume(fibers[i]), progress = true;
      for (size_t w = 0; w < warps; w++) {
        bool waiting = false;
        for (size_t i = w * 32; i < warp_end(w); i++) waiting |= fibers[i]->state == AT_WARP;
        if (waiting && !release_warp(w)) return false;
        for (size_t i = w * 32; waiting && i < warp_end(w); i++) progress |= fibers[i]->state == READY;
      }
    }
    if (!release_barrier(progress)) return false;
    if (!progress && live) return fail("deadlock");
  }
  for (auto* f : fibers) {
    bool left = !f->open.empty();
    for (auto& g : f->groups) left |= !g.empty();
    if (left) return fail("a cp.async that nobody waits for");
  }
  return true;
}

static Vec<char*> stacks;  // reused from block to block, and from launch to launch
static char* new_stack() {
  return static_cast<char*>(mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
}
int launch(Body b, void** args, dim3 grid, dim3 block, size_t smem, const Options& o) {
  options = o, body = b, arguments = args, grid_dim = grid, block_dim = block, error[0] = 0;
  rng.seed(o.seed);
  const size_t n = block.x * block.y * block.z;
  std::vector<unsigned> blocks(grid.x * grid.y * grid.z);
  for (size_t i = 0; i < blocks.size(); i++) blocks[i] = i;
  if (o.schedule == 3) std::reverse(blocks.begin(), blocks.end());
  if (o.schedule == 1 || o.schedule == 2) std::shuffle(blocks.begin(), blocks.end(), rng);

  // TSan tells blocks apart only while their fibers live, and it has about 8000 of them.
  const bool tsan = __tsan_create_fiber != nullptr, keep = tsan && blocks.size() * n <= 4096;
  if (tsan) main_tsan = __tsan_get_current_fiber();
  std::vector<Fiber*> kept;
  std::vector<char*> old_smem, old_stacks, old_tags;
  bool ok = true;
  for (unsigned index : blocks) {
    block_id = dim3(index % grid.x, index / grid.x % grid.y, index / (grid.x * grid.y));
    dynamic_smem = nullptr;
    if (smem && posix_memalign(reinterpret_cast<void**>(&dynamic_smem), 128, smem)) return snprintf(error, sizeof error, "no memory"), 1;
    if (smem) std::memset(dynamic_smem, o.poison, smem);
    live = n;
    old_tags.push_back(tags = new char[2 + 2 * ((n + 31) / 32)]);
    for (size_t i = 0; i < n; i++) {
      Fiber* f = new Fiber;
      fibers.push_back(f);
      f->state = READY, f->line = f->barriers = f->syncs = 0, f->lane = i % 32, f->warp = i / 32, f->asan = nullptr;
      f->tid = dim3(i % block.x, i / block.x % block.y, i / (block.x * block.y));
      if (tsan) old_stacks.push_back(f->memory = new_stack());
      else if (i < stacks.size()) f->memory = stacks[i];
      else stacks.push_back(f->memory = new_stack());
      prepare(f->stack, f->memory, STACK, entry);
      f->tsan = tsan ? __tsan_create_fiber(0) : nullptr;
    }
    ok = run_block();
    close_counters();
    if (tsan && !keep) __tsan_acquire(&end_tag);
    for (auto* f : fibers) {
      if (tsan && !keep) __tsan_destroy_fiber(f->tsan);
      if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(f->memory, STACK);
      if (keep) kept.push_back(f);
      else delete f;
    }
    fibers.clear();
    if (keep) old_smem.push_back(dynamic_smem);
    else free(dynamic_smem);
    if (!ok) break;
  }
  if (__tsan_acquire) __tsan_acquire(&end_tag);
  for (auto* f : kept) __tsan_destroy_fiber(f->tsan), delete f;
  for (char* p : old_smem) free(p);
  for (char* p : old_tags) delete[] p;
  for (char* p : old_stacks) munmap(p, STACK);
  return !ok || error[0];
}
}  // namespace emu

// ---- for ctypes, the case runner and the stub driver
extern "C" int emu_has(const char* name) { return emu::kernels().count(name); }
extern "C" const char* emu_error() { return emu::error; }
extern "C" long long* emu_stats() { return reinterpret_cast<long long*>(&emu::stats); }
extern "C" void emu_reset() { emu::stats = {}, emu::watched = nullptr; }
extern "C" void emu_watch(const char* from, size_t bytes, unsigned char* reads) {
  emu::watched = from, emu::watched_bytes = bytes, emu::watched_reads = reads;
}
static emu::Options emu_settings;
extern "C" void emu_set(unsigned seed, int schedule, int late, int poison) {
  emu_settings = emu::Options{seed, schedule, late, poison};
}
extern "C" int emu_launch(const char* name, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                          unsigned smem, void** args) {
  auto k = emu::kernels().find(name);
  if (k == emu::kernels().end()) return snprintf(emu::error, sizeof emu::error, "no kernel %s", name), 1;
  return emu::launch(k->second, args, dim3(gx, gy, gz), dim3(bx, by, bz), smem, emu_settings);
}
